"""train_erm.py as its user runs it: what it writes, selects, continues and refuses."""

import json
import os
import random
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import train_erm

from .conftest import ROOT, SMALL, write_table, write_waterbirds

FIGURES = {"fig01_group_accuracy.png", "curves.png"}
CHECKPOINTS = ("best.pt", "last.pt", "epoch_001.pt", "epoch_002.pt")
FILES = {"args.json", "log.jsonl", "results.json", *CHECKPOINTS, *FIGURES}


@pytest.fixture
def train(erm_run, tmp_path, monkeypatch, capsys):
    """Stage 1 as its script runs it, into tmp_path/run; returns what it prints or, where it ends
    with another exit code than 0, the one line that it says."""
    monkeypatch.setattr(common, "STOP_SIGNALS", [])  # pytest keeps its own
    monkeypatch.setattr(common, "save_figure", lambda fig, path: path.touch())  # they take longest

    def run(more="", code=0, data=erm_run / "data", folder=tmp_path / "run"):
        stopped = pytest.raises(SystemExit, match=str(code)) if code else nullcontext()
        with stopped, common.script(folder / "erm"):
            train_erm.main(train_erm.parse_args([*flags(data, folder), *more.split()]))
        out, err = capsys.readouterr()
        told = [x for x in err.splitlines() if x and not x.startswith("warning:")]
        assert len(told) == (code > 0), told
        return told[0] if code else out

    return run


def flags(data, folder):
    return ["--data", str(data), "--run", str(folder), *SMALL.split()]


@pytest.fixture
def copy(erm_run, tmp_path):
    return Path(shutil.copytree(erm_run / "run/erm", tmp_path / "run/erm")).parent


def read(run, name="results.json"):
    return json.loads((run / "erm" / name).read_text())


def log_of(run):
    """log.jsonl, which says what last.pt says, without what depends on the clock."""
    rows = [json.loads(line) for line in (run / "erm/log.jsonl").read_text().splitlines()]
    assert rows == common.load_checkpoint(run / "erm/last.pt")["log"]
    return [{**row, "seconds": 0} for row in rows]


def stamps(run):
    return {path.name: path.stat().st_mtime_ns for path in (run / "erm").iterdir()}


def assert_same(run, erm_run):
    """The run ended as erm_run did, undisturbed, bit for bit, and nothing else is left."""
    whole = erm_run / "run"
    assert [*run.iterdir()] == [run / "erm"] and {*stamps(run)} == FILES
    assert read(run) == read(whole) and log_of(run) == log_of(whole)
    for name in CHECKPOINTS:
        one, two = (common.load_checkpoint(r / "erm" / name)["model"] for r in (run, whole))
        assert all(torch.equal(one[key], two[key]) for key in two)


# ---- what a run writes ----


def test_run_folder(erm_run):
    run = erm_run / "run"
    log, results = log_of(run), read(run)
    assert {*stamps(run)} == FILES and [row["epoch"] for row in log] == [1, 2, 3, 4]
    places = {"splits": ("best.pt", results["selected_epoch"]), "last": ("last.pt", 4)}
    for key, (name, epoch) in places.items():
        model, saved, table = common.reopen(run / "erm" / name)
        images = common.make_loader(common.open_split(saved, table, "test"))
        test = common.evaluate(model, images, table.groups)
        row = log[epoch - 1]
        assert results[key] == {"train": row["train"], "val": row["val"], "test": test}
    means = ["worst_group", "acc_worst", "acc_mean", "acc_mean_train_mix"]
    assert results["stage"] == "erm" and list(test) == ["groups", *means]
    group = {"group": 2, "name": "waterbird on land", "n": 4, "correct": 4, "acc": 1.0}
    assert results["splits"]["test"]["groups"][2] == {**group, "minority": True}
    for name in FIGURES:
        with Image.open(run / "erm" / name) as image:
            assert image.width > 500 and len(image.convert("L").getcolors(1 << 20)) > 20


@pytest.mark.parametrize("rule", ["val-wga", "val-mean", "last"])
def test_selection(train, erm_run, tmp_path, monkeypatch, rule):
    """The first epoch of the highest score; the test split is read after all epochs."""
    evaluated, evaluate = [], common.evaluate

    def spy(model, batches, groups):
        evaluated.append(len(batches.dataset))
        return evaluate(model, batches, groups)

    monkeypatch.setattr(common, "evaluate", spy)
    train(f"--select {rule}")
    log = log_of(tmp_path / "run")
    assert evaluated == [32, 16] * 4 + [20, 20] and log == log_of(erm_run / "run")
    key = {"val-wga": "acc_worst", "val-mean": "acc_mean"}.get(rule)
    scores = [row["val"][key] if key else row["epoch"] for row in log]
    selected = 1 + scores.index(max(scores))
    assert len(set(scores)) > 1 and read(tmp_path / "run")["selected_epoch"] == selected
    assert common.load_checkpoint(tmp_path / "run/erm/best.pt")["epoch"] == selected


@pytest.mark.parametrize("head", ["linear", "softmax"])
def test_steps_by_hand(train, tmp_path, head):
    """Two epochs of a step of Adam, as Kingma and Ba (2015) write it, each in its own order."""
    train(f"--epochs 2 --augment crop-flip --batch-size 32 --lr 1e-3 --head {head}")
    _, saved, table = common.reopen(tmp_path / "run/erm/last.pt")
    torch.manual_seed(3)
    model = common.build_model("test_resnet", 2, 32).train().to(memory_format=torch.channels_last)
    images, losses = common.open_split(saved, table, "train", "crop-flip", seed=3), []
    mean, square = ([torch.zeros_like(p) for p in model.parameters()] for _ in range(2))
    for t in (1, 2):
        order = torch.Generator().manual_seed(common.seed_of(3, t))
        batch = torch.randperm(32, generator=order).tolist()
        logits = model(torch.stack([images[t, i][0] for i in batch]))
        logits = logits.softmax(1) if head == "softmax" else logits
        losses.append(F.cross_entropy(logits, images.y[batch]))
        gradients = torch.autograd.grad(losses[-1], list(model.parameters()))
        for p, g, m, v in zip(model.parameters(), gradients, mean, square):
            m.copy_(0.9 * m + 0.1 * g)
            v.copy_(0.999 * v + 0.001 * g * g)
            p.data -= 1e-3 * m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    assert [row["loss"] for row in saved["log"]] == pytest.approx(
        [x.item() for x in losses], abs=1e-5
    )
    for key, value in model.state_dict().items():
        assert torch.allclose(value, saved["model"][key], atol=3e-5), key


@pytest.mark.parametrize("size", [16, 32])
def test_a_last_batch_of_one_image(train, tmp_path, size):
    """33 training images: BatchNorm cannot take the last one alone. And a test group is empty."""
    write_waterbirds(tmp_path, ((13, 5, 4, 11), (1, 1, 1, 1), (1, 1, 0, 1)))
    train(f"--batch-size {size} --epochs 1", data=tmp_path)
    assert read(tmp_path / "run")["splits"]["test"]["groups"][2]["acc"] is None


# ---- the same command again ----


def test_a_finished_run_shows_its_table(train, erm_run, copy):
    before, birds = stamps(copy), erm_run / "data"
    written = (birds, f"{birds}/", birds / "metadata.csv", os.path.relpath(birds))
    shown = {train(data=data).partition("is finished")[2] for data in written}
    assert stamps(copy) == before and len(shown) == 1 and "\n2 waterbird on land* " in shown.pop()


@pytest.mark.parametrize("workers", [0, 2])
def test_more_epochs_extend_a_run(train, erm_run, tmp_path, workers):
    """Also with workers that read the images, and through a link to another disk."""
    for name in ("scratch", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "run/erm").symlink_to(tmp_path / "scratch")
    train(f"--epochs 2 --workers {workers}")
    train(f"--workers {workers}")
    assert (tmp_path / "run/erm").is_symlink() and len([*tmp_path.iterdir()]) == 2
    assert_same(tmp_path / "run", erm_run)


STEP = (torch.optim.Adam, "step", 6), "SIGTERM", 143  # in epoch 2
SAVE = (common, "save_checkpoint", 5), "SIGHUP", 129  # in front of a file of epoch 2
FIGURE = (train_erm, "plot", 1), "SIGINT", 130


@pytest.mark.parametrize("place,stop,code", [STEP, SAVE, FIGURE])
def test_stopped_runs_continue(train, erm_run, tmp_path, monkeypatch, place, stop, code):
    (owner, name, call), number, calls = place, signal.Signals[stop], []
    function = getattr(owner, name)

    def interrupted(*arguments, **fields):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return function(*arguments, **fields)

    before = signal.signal(number, signal.SIG_DFL)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        patch.setattr(common, "STOP_SIGNALS", [number])
        line = train(code=code)
    signal.signal(number, before)
    assert f"stopped by {stop}; the same command continues: python " in line
    assert not (tmp_path / "run/erm/results.json").exists()
    (tmp_path / "run/erm/.last.pt.new").write_bytes(b"half")  # as a kill leaves them
    (tmp_path / "run/.erm.new").mkdir()
    train()
    assert_same(tmp_path / "run", erm_run)


def test_one_process_a_folder_until_it_is_killed(train, erm_run, tmp_path, monkeypatch):
    lock = common.filelock.FileLock
    monkeypatch.setattr(common.filelock, "FileLock", lambda path, timeout: lock(path, 0.1))
    command = [sys.executable, "-u", "train_erm.py", *flags(erm_run / "data", tmp_path / "run")]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with Popen(command, cwd=ROOT, stdout=PIPE, stderr=DEVNULL, text=True) as process:
        assert any(line.startswith("epoch") for line in process.stdout)
        time.sleep(0.2 * random.random())
        process.send_signal(signal.SIGSTOP)
        assert f"in use by process {process.pid} on " in train(code=2)
        process.kill()
    train()
    assert_same(tmp_path / "run", erm_run)


def test_a_reader_that_leaves(erm_run, copy):
    command = f"{sys.executable} -u train_erm.py {' '.join(flags(erm_run / 'data', copy))}"
    call = ["bash", "-c", f"set -o pipefail; {command} | head -1"]
    with Popen(call, cwd=ROOT, stdout=PIPE, stderr=PIPE, text=True) as process:
        out, err = process.communicate()
    assert process.returncode == 141 and out.startswith("run=")
    assert "Traceback" not in err and "BrokenPipe" not in err


# ---- refused in one line, and the old run still stands ----

IMPOSSIBLE = "--lr inf,--lr nan,--epochs 0,--size 0,--batch-size 0,--batch-size 1,--seed -1"
IMPOSSIBLE += ",--seed 4294967296,--workers -1,--difficulty -1.0,--device gpu,--arch resnet51"
OTHER = {"--lr 2e-3": "lr 0.01, now 0.002", "--epochs 3": "epochs 4, now 3"}
OTHER |= {"--seed 1 --augment none": "augment table1, now none; seed 3, now 1"}
OTHER |= {f"--overwrite {flag}": f"error: {flag}" for flag in IMPOSSIBLE.split(",")}


@pytest.mark.parametrize("more,words", OTHER.items())
def test_refused_settings(train, copy, more, words):
    before = stamps(copy)
    assert words in train(more, code=2)
    assert stamps(copy) == before


def test_overwrite_and_divergence(train, copy):
    assert "diverged in epoch 1; try" in train("--lr 1e30 --overwrite", code=2)
    assert read(copy, "args.json")["args"]["lr"] == 1e30 and [*stamps(copy)] == ["args.json"]


def test_labels_that_change_in_between(train, tmp_path):
    table = write_waterbirds(tmp_path)
    train("--epochs 1", data=tmp_path)
    table[1][2], table[25][2] = table[25][2], table[1][2]
    write_table(tmp_path, table)
    assert "the data changed" in train(code=2, data=tmp_path)


def test_folders_that_are_not_ours(train, copy):
    note = copy / "erm/notes.txt"
    note.write_text("mine")
    for more in ("", "--overwrite"):
        assert f"{note} is not of this stage" in train(more, code=2)
    assert note.read_text() == "mine" and {*stamps(copy)} == FILES | {"notes.txt"}
    assert f"{note}: File exists" in train(code=2, folder=note)


DAMAGE = {"cut": lambda data: data[: len(data) // 2], "empty": lambda _: b""}
DAMAGE |= {"other": lambda _: b'{"stage": 1}'}
DAMAGE |= {"bit": lambda data: data[:9999] + bytes([data[9999] ^ 4]) + data[10000:]}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["args.json", "last.pt", "results.json"])
def test_damaged_files(train, copy, name, damage):
    path = copy / "erm" / name
    if name == "last.pt" or damage != "bit":  # which JSON has no checksum to tell
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
        assert f"{path}: " in train(code=2)
