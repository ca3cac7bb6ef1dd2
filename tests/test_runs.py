"""What a run survives: accidents while files are written, what lies beside them, what changes."""

import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import common
import finetune_contrastive
import gradcam
import structured_trace
import trace_neurons
import train_erm

from .conftest import ROOT, SMALL, write_table, write_waterbirds
from .test_train_erm import as_script, content, report_on_test, stamps, without_figures

LATER = "--device cpu --workers 0"  # flags of stages 2 to 5
LITTER = (
    "slurm-1234.out",
    "Thumbs.db",
    "._best.pt",
    ".ipynb_checkpoints/best-checkpoint.pt",
    "best.pt.swp",
    "events.out.tfevents.1",
    "epoch_final.pt",
    "my_plot.png",
)


class Accident(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.fixture
def train(erm_run, tmp_path, monkeypatch, capsys):
    """A function that runs stage 1 as its script does, into tmp_path/run; see as_script. With
    stop_after it ends so many epochs after its start, as by a kill."""
    without_figures(monkeypatch)
    data = erm_run / "data"

    def run(more="", code=0, data=data, stop_after=None):
        flags = f"--data {data} --run {tmp_path}/run {SMALL} {more}"
        if stop_after is None:
            return as_script(train_erm, flags, capsys, code)
        written = []
        write = common.write

        def stopping(*args, **kwargs):
            if len(written) > stop_after:  # one more than epochs, for args.json
                raise Accident
            write(*args, **kwargs)
            written.append(args)

        with monkeypatch.context() as patch, pytest.raises(Accident):
            patch.setattr(common, "write", stopping)
            as_script(train_erm, flags, capsys)
        capsys.readouterr()
        return None

    return run


@pytest.fixture
def copy(erm_run, tmp_path):
    """A run folder of its own with the finished run of stage 1."""
    shutil.copytree(erm_run / "run/erm", tmp_path / "run/erm")
    return tmp_path / "run"


def in_fork(function):
    """Call a function in a fork of this process; returns the fork's id. It ends with code 0, or
    with 1 where the function raises."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return pid


def exit_code(pid):
    """Of a fork when it has ended; negative: the signal that ended it."""
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def accident_at(n, patch, what):
    """At the n-th time that a file is flushed, renamed or deleted, `what` is called."""
    count = 0

    def counting(function):
        def counted(*args, **kwargs):
            nonlocal count
            count += 1
            if count == n:
                what()
            return function(*args, **kwargs)

        return counted

    for name in ("fsync", "replace", "unlink"):
        patch.setattr(os, name, counting(getattr(os, name)))


# ---- files that are written together ----

OLD = {"a.csv": b"x\r\n1\r\n", "shown.png": b"old", "results.json": b'{\n "n": 1\n}\n'}
NEW = {"results.json": {"n": 2}, "a.csv": [{"x": 2}], "b.txt": "new"}  # in whatever order
AFTER = {"a.csv": b"x\r\n2\r\n", "b.txt": b"new", "results.json": b'{\n "n": 2\n}\n'}


@pytest.fixture
def folder(tmp_path):
    """A folder with OLD."""
    for name, data in OLD.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def found_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_write(folder):
    common.write(folder, NEW, remove=["shown.png"])
    assert found_in(folder) == AFTER
    rows = {"rows.jsonl": [{"a": 1}, {"a": 2}], "none.csv": []}
    common.write(folder, rows, remove=["missing.csv"])
    written = {"rows.jsonl": b'{"a": 1}\n{"a": 2}\n', "none.csv": b"\r\n"}
    assert found_in(folder) == {**AFTER, **written}
    common.write(folder, {"odd.csv": [{"name": "a\udce9"}]})  # a folder's name that is no UTF-8
    assert (folder / "odd.csv").read_text() == "name\na\\udce9\n"


def test_a_kill_while_files_are_written(folder):
    """At every step: no file is half-written, and where results.json stands all are of one time."""
    states = set()
    for n in range(1, 30):
        shutil.rmtree(folder)
        folder.mkdir()
        for name, data in OLD.items():
            (folder / name).write_bytes(data)

        def killed(n=n):
            kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
            accident_at(n, pytest.MonkeyPatch(), kill)
            common.write(folder, NEW, remove=["shown.png"])

        code = exit_code(in_fork(killed))
        found = {name: data for name, data in found_in(folder).items() if name[0] != "."}
        if "results.json" in found:
            assert found in (OLD, AFTER)
        for name, data in found.items():
            assert data in (OLD.get(name), AFTER.get(name))
        states.add(tuple(sorted(found.items())))
        if code == 0:
            break
    assert code == 0
    assert found_in(folder) == AFTER
    assert len(states) > 4  # old, without results.json, then file by file


def test_a_disk_that_is_full_or_broken(folder, monkeypatch):
    """The old files stand, nothing is left over, and one line names the file."""
    for n, name in enumerate(NEW, 1):
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO):

            def fail(number=number):
                raise OSError(number, os.strerror(number))

            with monkeypatch.context() as patch:
                accident_at(n, patch, fail)
                words = f"{name} cannot be written ({os.strerror(number)})"
                with pytest.raises(common.BadInput, match=re.escape(words)):
                    common.write(folder, NEW, remove=["shown.png"])
            assert found_in(folder) == OLD


def test_file_systems_without_fsync(folder, monkeypatch):
    def refuse(number):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", refuse)
    common.write(folder, NEW, remove=["shown.png"])
    assert found_in(folder) == AFTER


# ---- the lock ----


def hold(folder, worker=False):
    """Hold a folder in a fork of this process, which may start a process of its own that outlives
    it. Returns the id of the fork, when it holds it, and a pipe that the worker keeps open."""
    reader, writer = os.pipe()

    def holder():
        common.open_folder(folder, ("best.pt",))
        if worker and os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        os.write(writer, b"1")
        time.sleep(60)

    pid = in_fork(holder)
    os.close(writer)
    assert os.read(reader, 1) == b"1"
    return pid, reader


@pytest.mark.parametrize("worker", [False, True])
def test_a_folder_is_held_until_its_process_ends(tmp_path, worker):
    """However it ends, and though a worker of it lives on."""
    folder = tmp_path / "erm"
    pid, reader = hold(folder, worker)
    with pytest.raises(common.BadInput, match="erm is in use by another process; wait for it"):
        common.open_folder(folder, ("best.pt",))
    os.kill(pid, signal.SIGKILL)
    assert exit_code(pid) == -signal.SIGKILL
    common.open_folder(folder, ("best.pt",))
    assert [path.name for path in folder.iterdir()] == [".lock"]
    os.set_blocking(reader, False)
    if worker:
        with pytest.raises(BlockingIOError):  # the worker still holds the other end
            os.read(reader, 1)
    os.close(reader)


def test_what_a_kill_left_half_written_goes(tmp_path):
    for name in (".best.pt.new", ".epoch_001.pt.new", ".mine.txt.new"):
        (tmp_path / name).touch()
    common.open_folder(tmp_path, ("best.pt", "epoch_[0-9][0-9][0-9].pt"))
    assert {path.name for path in tmp_path.iterdir()} == {".lock", ".mine.txt.new"}


def test_a_disk_that_knows_neither_locks_nor_fsync(train, tmp_path, monkeypatch):
    """NFS may give ENOLCK, Lustre ENOSYS, CIFS EINVAL: a warning, and it runs."""

    def no_lock(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    def no_fsync(number):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(fcntl, "lockf", no_lock)
    monkeypatch.setattr(os, "fsync", no_fsync)
    said = train("--epochs 1")
    assert "erm cannot be locked (No locks available); keep other processes away" in said
    assert (tmp_path / "run/erm/results.json").exists()


def test_a_worker_that_cannot_hand_over_a_batch(erm_run, tmp_path):
    """With too few files that may be open, the script ends with one line and does not wait."""
    flags = f"--data {erm_run}/data --run {tmp_path}/run {SMALL} --workers 1"
    command = f"ulimit -n 24; exec {sys.executable} train_erm.py {flags}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        timeout=120,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert re.fullmatch(r"train_erm.py: error: .*\n", done.stderr)


# ---- what lies beside our files ----


def test_litter_is_no_obstacle_and_is_left_alone(train, tmp_path):
    """Before the first start, in an unfinished and in a finished run, and when it starts anew."""
    folder = tmp_path / "run/erm"
    for name in LITTER:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"mine: {name}")
    train(stop_after=2)
    assert "epoch 3/4" in train()
    assert "is finished" in train()
    assert "epoch 1/1" in train("--epochs 1 --overwrite")
    for name in LITTER:
        assert (folder / name).read_text() == f"mine: {name}"


def test_litter_of_later_stages(copy, capsys, monkeypatch):
    without_figures(monkeypatch)
    for name in LITTER:
        path = copy / "structured" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    for _ in range(2):
        as_script(structured_trace, f"--run {copy} {LATER} --controls 1", capsys)
    for name in LITTER:
        assert (copy / "structured" / name).read_text() == "mine"


# ---- the same command continues ----


@pytest.mark.parametrize("more", ["", "--overwrite"])
def test_a_run_that_was_stopped_twice(train, erm_run, tmp_path, more):
    """A queue repeats the command as it is, with --overwrite, too: an unfinished run of the same
    settings goes on. When it is finished, --overwrite starts anew."""
    folder = tmp_path / "run/erm"
    if more:
        train("--epochs 1 --seed 8")  # an older run of other settings, which is to go
    train(more, stop_after=1)
    train(more, stop_after=2)
    said = train(more)
    assert "epoch 3/4" not in said
    assert "epoch 4/4" in said
    assert content(folder) == content(erm_run / "run/erm")
    again = train(more)
    assert ("epoch 1/4" in again) == bool(more)
    assert content(folder) == content(erm_run / "run/erm")


def test_a_kill_while_an_older_run_is_deleted(train, tmp_path):
    """At every step of the start with --overwrite: the same command starts again."""
    folder = tmp_path / "run/erm"
    whole = tmp_path / "whole"
    train("--epochs 2 --seed 8")
    shutil.copytree(folder, whole)
    n = 0
    begun = False
    while not begun:
        n += 1
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        with pytest.MonkeyPatch.context() as patch:

            def stop():
                raise Accident

            accident_at(n, patch, stop)
            try:
                args = train_erm.parse_args(["--overwrite"])
                common.begin(folder, "erm", args, train_erm.FILES, None)
                begun = True
            except Accident:
                pass
        defaults = train_erm.parse_args([])
        for more in ("", "--epochs 2 --seed 8"):  # other settings, and those of the older run
            args = train_erm.parse_args([*f"{SMALL} {more}".split(), "--overwrite"])
            found = common.earlier_run(folder, args, defaults, train_erm.FILES, "x", labels="x")
            assert found == (None, None), (n, more)  # it starts
    assert n > len(train_erm.FILES)
    assert {path.name for path in folder.iterdir()} == {"args.json", ".lock"}


def test_weights_are_needed_at_the_start_alone(train, tmp_path):
    """A file that is gone after the first epoch stops nothing; one that changed is not the same."""
    torch.manual_seed(7)
    path = tmp_path / "w.pth"
    weights = common.build_model("test_resnet", 2, 32).state_dict()
    torch.save(weights, path)
    train(f"--weights {path}", stop_after=1)
    torch.save({**weights, "conv1.0.weight": weights["conv1.0.weight"] + 1}, path)
    assert "the weights changed" in train(f"--weights {path}", code=2)
    path.unlink()
    said = train(f"--weights {path}")
    assert "epoch 1/4" not in said
    assert "epoch 2/4" in said
    assert "is finished" in train(f"--weights {path}")
    settings = common.read_json(tmp_path / "run/erm/results.json")["erm"]["settings"]
    assert settings == common.load_checkpoint(tmp_path / "run/erm/epoch_001.pt")["erm"]["settings"]
    torch.save(weights, path)  # and it may come back
    assert "is finished" in train(f"--weights {path}")
    torch.save({**weights, "conv1.0.weight": weights["conv1.0.weight"] + 1}, path)
    assert "the weights changed" in train(f"--weights {path}", code=2)


def test_a_damaged_test_image_is_said_before_training(train, tmp_path):
    table = write_waterbirds(tmp_path / "birds")
    path = tmp_path / "birds" / table[-1][1]
    path.write_bytes(path.read_bytes()[:200])
    assert f"{path}: cannot be used" in train(code=2, data=tmp_path / "birds")
    assert not (tmp_path / "run").exists()


def test_other_images_of_the_same_labels(train, tmp_path):
    """As of one set with and without its backgrounds: neither a finished run nor one that is to go
    on is taken for one of them."""
    birds = tmp_path / "birds"
    table = write_waterbirds(birds)
    train("--epochs 1", data=birds)
    moved = tmp_path / "moved"
    shutil.move(birds, moved)
    assert "is finished" in train("--epochs 1", data=moved)
    for _, name, *_ in table[1:]:
        with Image.open(moved / name) as image:
            image.convert("L").save(moved / name)
    for more in ("--epochs 1", "--epochs 2"):
        assert "the images changed" in train(more, code=2, data=moved)


def test_a_test_row_that_is_taken_out(train, tmp_path):
    """As is advised where its image is damaged. Neither loses the training, finished or not, nor is
    unnoticed: the test split is measured anew."""
    birds = tmp_path / "birds"
    folder = tmp_path / "run/erm"
    table = write_waterbirds(birds)
    train("--epochs 2", stop_after=1, data=birds)
    (birds / table[-1][1]).write_bytes(b"")
    assert "replace it, or take its row out" in train("--epochs 2", code=2, data=birds)
    write_table(birds, table[:-1])
    said = train("--epochs 2", data=birds)
    assert "epoch 1/2" not in said
    _, log, weights = content(folder)
    write_table(birds, table[:-2])
    said = train("--epochs 2", data=birds)
    assert "is finished" not in said
    assert "epoch 2/2" not in said
    results, *others = content(folder)
    assert others == [log, weights]
    assert sum(group["n"] for group in results["splits"]["test"]["groups"]) == 18
    assert results["splits"]["test"] == report_on_test(folder / "best.pt")[0]
    assert "is finished" in train("--epochs 2", data=birds)


def say_best(folder, epoch):
    """Have the log of a run say that this epoch is the best one."""
    last = torch.load(folder / "last.pt", weights_only=True)
    for row in last["log"]:
        row["val"]["acc_worst"] = float(row["epoch"] == epoch)
    torch.save(last, folder / "last.pt")
    return last["model"]


def test_what_the_end_needs_is_said_before_training(train, tmp_path):
    folder = tmp_path / "run/erm"
    train(stop_after=2)
    say_best(folder, 1)
    (folder / "best.pt").unlink()
    before = stamps(tmp_path / "run")
    said = train(code=2)
    assert f"{folder}/best.pt: no such file" in said
    assert stamps(tmp_path / "run") == before


def test_a_best_checkpoint_of_another_run(train, tmp_path):
    """It would be measured at the end."""
    folder = tmp_path / "run/erm"
    train("--seed 8")
    of_other_run = common.load_checkpoint(folder / "best.pt")
    train("--overwrite", stop_after=2)
    say_best(folder, 1)
    torch.save({**of_other_run, "epoch": 1}, folder / "best.pt")
    assert "best.pt is not of epoch 1 of this run" in train(code=2)
    of_this_run = common.load_checkpoint(folder / "last.pt")
    torch.save(of_this_run, folder / "best.pt")
    assert "best.pt is not of epoch 1 of this run" in train(code=2)
    torch.save({**of_this_run, "epoch": 1}, folder / "best.pt")
    assert "epoch 3/4" in train()


@pytest.mark.parametrize("best", ["older", "lost"])
def test_a_kill_between_last_and_best_checkpoint(train, tmp_path, best):
    """last.pt is of an epoch that best.pt should be of. It is made from last.pt, and so the end
    measures the epoch that the log selects, even if the next ones are not what they were."""
    folder = tmp_path / "run/erm"
    train(stop_after=2)
    weights = say_best(folder, 2)
    if best == "older":
        checkpoint = common.load_checkpoint(folder / "epoch_001.pt")
        torch.save(checkpoint, folder / "best.pt")
    else:
        (folder / "best.pt").unlink()
    train(stop_after=1)  # goes on, and stops when args.json and best.pt stand
    found = common.load_checkpoint(folder / "best.pt")
    assert found["epoch"] == 2
    assert found.keys() == common.load_checkpoint(folder / "epoch_001.pt").keys()
    for name, values in weights.items():
        assert torch.equal(found["model"][name], values), name


def test_a_longer_run_that_overwrites(train, copy):
    """Starts anew, where without --overwrite it would extend the run; and when it is interrupted,
    the same command goes on."""
    flags = "--overwrite --epochs 5"
    train(flags, stop_after=3)
    said = train(flags)
    assert "epoch 1/5" not in said
    assert "epoch 5/5" in said
    log = common.load_checkpoint(copy / "erm/last.pt")["log"]
    assert [row["epoch"] for row in log] == [1, 2, 3, 4, 5]
    assert "epoch 1/6" in train("--overwrite --epochs 6")


@pytest.mark.parametrize("name", ["args.json", "results.json", "last.pt"])
@pytest.mark.parametrize("damage", ["empty", "lacking"])
def test_damaged_files_of_a_run_say_what_to_do(train, copy, name, damage):
    """And nothing else is touched; when the folder is moved away, it starts anew."""
    path = copy / "erm" / name
    if damage == "empty":
        path.write_bytes(b"")
    elif name == "last.pt":
        last = common.load_checkpoint(path)
        del last["optimizer"]
        torch.save(last, path)
    else:
        path.write_text('{"stage": "erm", "epochs": 4}')
    before = stamps(copy)
    more = "--epochs 5" if name == "last.pt" else ""  # which a finished run does without
    said = train(more, code=2)
    assert f"{path}: cannot be used" in said
    assert common.START_ANEW in said
    assert stamps(copy) == before
    (copy / "erm").rename(copy / "erm-damaged")
    assert "epoch 1/1" in train("--epochs 1")


def test_a_setting_that_an_older_run_did_not_know(train, copy):
    """Counts as its default, in finished runs and in those that go on."""
    path = copy / "erm/args.json"
    record = common.read_json(path)
    for key in ("precision", "augment", "attributes"):
        del record["args"][key]
    common.write(copy / "erm", {"args.json": record})
    assert "is finished" in train()
    said = train("--precision bf16 --augment none", code=2)
    assert "precision fp32, now bf16" in said
    assert "augment" not in said  # None, of which nobody knows what it was, is not compared
    assert "epoch 5/5" in train("--epochs 5")


def test_a_finished_run_that_cannot_be_written_is_shown(train, copy, monkeypatch):
    """As on a share that is mounted read-only."""
    shown = train()

    def refuse(path, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    for name in ("open", "mkdir", "replace", "unlink"):
        monkeypatch.setattr(os, name, refuse)
    assert train() == shown
    assert "Read-only file system" in train("--epochs 5", code=2)


# ---- what changes under a later stage ----


def test_before_is_what_was_read(copy, capsys, monkeypatch):
    """Though another process trains ERM on meanwhile, and writes another best.pt."""
    without_figures(monkeypatch)
    best = copy / "erm/best.pt"
    report, checkpoint = report_on_test(best)
    other = common.load_checkpoint(best)
    other["model"]["fc.bias"] += torch.tensor([100.0, 0.0])  # it calls everything class 0
    evaluate = common.evaluate

    def spy(*args):
        torch.save(other, best)
        return evaluate(*args)

    monkeypatch.setattr(common, "evaluate", spy)
    flags = f"--run {copy} {LATER} --epochs 1 --checkpoint {best}"
    as_script(finetune_contrastive, flags, capsys)
    results, log, _ = content(copy / "finetune")
    assert results["start_epoch"] == checkpoint["epoch"]
    before = {"train": log[0]["train"], "val": log[0]["val"], "test": report}
    assert results["before"] == before
    assert report_on_test(best)[0] != report


def test_a_network_of_another_training_is_said(train, copy, capsys):
    """By Grad-CAM, which shows both: ERM was trained anew since the fine-tuning started."""
    words = "did not start from the training that"
    gradcam_flags = f"--run {copy} {LATER} --n 4"
    as_script(finetune_contrastive, f"--run {copy} {LATER} --epochs 1", capsys)
    assert words not in as_script(gradcam, gradcam_flags, capsys)
    train("--epochs 5")  # the same training, which goes on
    assert words not in as_script(gradcam, gradcam_flags, capsys)
    train("--overwrite --seed 9 --epochs 4")
    assert words in as_script(gradcam, gradcam_flags, capsys)
    erm = common.load_checkpoint(copy / "erm/best.pt")["erm"]
    assert erm["settings"]["seed"] == 9


@pytest.mark.parametrize(
    "stage",
    [trace_neurons, structured_trace, finetune_contrastive, gradcam],
    ids=lambda s: s.__name__,
)
def test_an_unfinished_network_is_refused(copy, capsys, stage):
    """By every stage alike; stage 4 takes best.pt where there is no checkpoint of 40 %."""
    (copy / "erm/results.json").unlink()
    (copy / "erm/epoch_001.pt").unlink()
    words = "erm is unfinished, so its best.pt may still change"
    assert words in as_script(stage, f"--run {copy} {LATER}", capsys, code=2)
    assert [path.name for path in copy.iterdir()] == ["erm"]


def test_what_does_not_change_any_more_may_be_used(copy):
    (copy / "erm/results.json").unlink()
    shutil.copy(copy / "erm/best.pt", copy / "best.pt")
    _, checkpoint = common.load_model(copy / "best.pt")
    assert checkpoint["epoch"] == common.load_checkpoint(copy / "erm/best.pt")["epoch"]
    assert common.load_model(copy / "erm/epoch_002.pt")[1]["epoch"] == 2


# ---- figures cost no numbers ----


def test_a_figure_that_fails(train, erm_run, copy, capsys, monkeypatch):
    """The numbers stand, and the same command makes a training stage's figures."""

    def fail(*args, **kwargs):
        raise RuntimeError("latex could not be found")

    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", fail)
        with pytest.raises(RuntimeError, match="latex"):
            train("--overwrite --epochs 4")
        with pytest.raises(RuntimeError, match="latex"):
            as_script(structured_trace, f"--run {copy} {LATER} --controls 1", capsys)
    capsys.readouterr()
    assert content(copy / "erm") == content(erm_run / "run/erm")
    assert not (copy / "erm/curves.png").exists()
    for name in ("layers.csv", "results.json"):
        assert (copy / "structured" / name).exists()
    said = train()
    assert "epoch" not in said.partition("\n")[2].replace("selected epoch", "")
    assert (copy / "erm/curves.png").exists()
    assert content(copy / "erm") == content(erm_run / "run/erm")


# ---- where it is started from, and how it ends ----


def test_ctrl_c_says_so_in_one_line(erm_run, tmp_path, monkeypatch):
    """And the process dies of the signal, so that a loop in a shell ends with it."""
    monkeypatch.setattr(common, "finite_loss", lambda *args: os.kill(os.getpid(), signal.SIGINT))

    def interrupted():
        os.dup2(os.open(tmp_path / "err", os.O_WRONLY | os.O_CREAT), 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        flags = f"--data {erm_run}/data --run {tmp_path}/run {SMALL}"
        with common.script():
            train_erm.main(train_erm.parse_args(flags.split()))

    assert exit_code(in_fork(interrupted)) == -signal.SIGINT
    (line,) = (tmp_path / "err").read_text().strip().splitlines()
    assert line.endswith(": stopped; run the same command again")
    assert {path.name for path in (tmp_path / "run/erm").iterdir()} == {"args.json", ".lock"}


@pytest.fixture
def strange(tmp_path):
    """Data whose classes have names that few encodings know, and the flags of a short run."""
    rows = write_waterbirds(tmp_path / "data")
    for row in rows[1:]:
        row[2] = ("Kormorän", "水鳥")[int(row[2])]
    write_table(tmp_path / "data", rows)
    return f"--data {tmp_path}/data --run {tmp_path}/run {SMALL} --epochs 1".split()


@pytest.mark.parametrize(
    "environment,name",
    [
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "Kormor?n"),
        ({"PYTHONIOENCODING": "latin-1"}, "?? place=1"),
    ],
)
def test_output_that_is_not_utf8(strange, tmp_path, environment, name):
    """Other characters are printed as ?. A user's matplotlibrc that asks for LaTeX, which is not
    there, costs nothing; characters that no font has are said."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    environment = {**environment, "MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}
    command = [sys.executable, "train_erm.py", *strange]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        encoding="latin-1",
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert name in done.stdout
    assert "some characters are boxes, as no font here has them" in done.stderr
    assert "Traceback" not in done.stderr
    results = common.read_json(tmp_path / "run/erm/results.json")
    assert results["splits"]["test"]["groups"][0]["name"] == "Kormorän place=0"
    assert (tmp_path / "run/erm/curves.png").stat().st_size > 10_000


def test_closed_streams(strange, tmp_path):
    """With stderr closed it trains, and with stdout closed it says nothing of what it shows."""
    command = f"{sys.executable} train_erm.py {' '.join(strange)}"
    for stream, other in (("2>&-", "stdout"), (">&-", "stderr")):
        done = subprocess.run(
            ["bash", "-c", f"{command} {stream}"], cwd=ROOT, capture_output=True, check=False
        )
        assert done.returncode == 0, done
        assert (tmp_path / "run/erm/results.json").exists()
        assert bool(getattr(done, other)) == (other == "stdout")
