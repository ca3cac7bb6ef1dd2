"""train_erm.py as its user runs it: what it writes, selects, continues and refuses."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import train_erm

from .conftest import ROOT, write_table, write_waterbirds

SMALL = "--arch resnet10 --weights none --size 32 --batch-size 16 --lr 1e-3 --device cpu"
SMALL += " --epochs 4 --keep-epochs 2 --workers 0"
FIGURES = {"fig01_group_accuracy.png", "curves.png"}
FILES = {"args.json", "log.jsonl", "best.pt", "last.pt", "epoch_002.pt", "results.json", *FIGURES}


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("birds")
    write_waterbirds(folder)  # 32 training, 16 validation, 20 test images
    return folder


def flags(data, run, *more):
    return [str(flag) for flag in ("--data", data, "--run", run, *SMALL.split(), *more)]


def train(data, run, *more):
    train_erm.main(train_erm.parse_args(flags(data, run, *more)))


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Signals stay with pytest; figures, which take most of the time, are drawn in one test."""
    monkeypatch.setattr(common, "STOP_SIGNALS", [])
    monkeypatch.setattr(common, "save_figure", lambda fig, path: path.touch())


@pytest.fixture
def refuse(capsys):
    """Run stage 1 as its script does and return the one line in which it ends."""

    def run(data, folder, *more):
        with pytest.raises(SystemExit, match="2"), common.script(folder / "erm"):
            train(data, folder, *more)
        lines = [t for t in capsys.readouterr().err.splitlines() if not t.startswith("warning:")]
        assert len(lines) == 1, lines
        return lines[0]

    return run


def read(run, name="results.json"):
    return json.loads((run / "erm" / name).read_text())


def log_of(run):
    """log.jsonl, which says what last.pt says, without what depends on the clock."""
    rows = [json.loads(line) for line in (run / "erm/log.jsonl").read_text().splitlines()]
    assert rows == common.load_checkpoint(run / "erm/last.pt")["log"]
    return [{**row, "seconds": 0} for row in rows]


def assert_same(run, whole):
    """Both runs ended alike, bit for bit, and nothing else is left."""
    assert {*run.rglob("*")} == {run / "erm", *(run / "erm" / name for name in FILES)}
    assert read(run) == read(whole) and log_of(run) == log_of(whole)
    for name in ("best.pt", "last.pt", "epoch_002.pt"):
        one, two = (common.load_checkpoint(r / "erm" / name)["model"] for r in (run, whole))
        assert all(torch.equal(one[key], two[key]) for key in two)


@pytest.fixture(scope="module")
def whole(birds, tmp_path_factory):
    """A run that nobody disturbed."""
    run = tmp_path_factory.mktemp("whole")
    train(birds, run)
    return run


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


# ---- what a run writes ----


def test_run_folder(whole):
    log, results = log_of(whole), read(whole)
    assert {path.name for path in (whole / "erm").iterdir()} == FILES
    assert [row["epoch"] for row in log] == [1, 2, 3, 4] and results["stage"] == "erm"
    for key, epoch in (("splits", results["selected_epoch"]), ("last", 4)):
        assert list(results[key]) == ["train", "val", "test"]
        assert (
            results[key].items()
            >= {name: log[epoch - 1][name] for name in ("train", "val")}.items()
        )
        model, saved, table = common.reopen(
            whole / "erm" / f"{'best' if key == 'splits' else key}.pt"
        )
        images = common.make_loader(common.open_split(saved, table, "test"))
        assert common.evaluate(model, images, table.groups) == results[key]["test"]
    row = results["splits"]["test"]["groups"][2]
    assert list(row) == ["group", "name", "n", "correct", "acc", "minority"]
    assert (row["name"], row["n"], row["minority"]) == ("waterbird on land", 4, True)
    assert list(results["splits"]["test"])[1:] == [
        "worst_group",
        "acc_worst",
        "acc_mean",
        "acc_mean_train_mix",
    ]
    for name in FIGURES:
        with Image.open(whole / "erm" / name) as image:
            assert image.width > 500 and len(image.convert("L").getcolors(1 << 20)) > 20


@pytest.mark.parametrize("rule", ["val-wga", "val-mean", "last"])
def test_selection(birds, whole, tmp_path, rule):
    """The first epoch of the highest score; the test split is read after all epochs."""
    evaluated, evaluate = [], common.evaluate

    def spy(model, batches, groups):
        evaluated.append(len(batches.dataset))
        return evaluate(model, batches, groups)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "evaluate", spy)
        train(birds, tmp_path, "--select", rule)
    assert evaluated == [32, 16] * 4 + [20, 20] and log_of(tmp_path) == log_of(whole)
    key = {"val-wga": "acc_worst", "val-mean": "acc_mean"}.get(rule)
    scores = [row["val"][key] if key else row["epoch"] for row in log_of(whole)]
    assert len(set(scores)) > 1
    assert read(tmp_path)["selected_epoch"] == 1 + scores.index(max(scores))
    assert common.load_checkpoint(tmp_path / "erm/best.pt")["epoch"] == 1 + scores.index(
        max(scores)
    )


@pytest.mark.parametrize("head", ["linear", "softmax"])
def test_steps_by_hand(birds, tmp_path, head):
    """An epoch of two steps of Adam, as Kingma and Ba (2015) write it."""
    train(birds, tmp_path, "--epochs", 1, "--augment", "crop-flip", "--head", head, "--seed", 3)
    saved, table = common.load_checkpoint(tmp_path / "erm/last.pt"), common.read_table(birds)
    torch.manual_seed(3)
    model = common.build_model("resnet10", 2, 32).train().to(memory_format=torch.channels_last)
    images = common.open_split(saved, table, "train", "crop-flip", seed=3)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(common.seed_of(3, 1)))
    mean, square = ([torch.zeros_like(p) for p in model.parameters()] for _ in range(2))
    losses = []
    for t, batch in enumerate(order.view(2, 16).tolist(), 1):
        logits = model(torch.stack([images[1, i][0] for i in batch]))
        logits = logits.softmax(1) if head == "softmax" else logits
        losses.append(F.cross_entropy(logits, images.y[batch]))
        gradients = torch.autograd.grad(losses[-1], list(model.parameters()))
        for p, g, m, v in zip(model.parameters(), gradients, mean, square):
            m.copy_(0.9 * m + 0.1 * g)
            v.copy_(0.999 * v + 0.001 * g * g)
            p.data -= 1e-3 * m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    assert log_of(tmp_path)[0]["loss"] == pytest.approx(sum(losses).item() / 2, abs=1e-6)
    for key, value in model.state_dict().items():
        assert torch.allclose(value, saved["model"][key], atol=3e-5), key


@pytest.mark.parametrize("size", [16, 32])
def test_a_last_batch_of_one_image(tmp_path, size):
    """33 training images: BatchNorm cannot take the last one alone. And a test group is empty."""
    write_waterbirds(tmp_path, ((13, 5, 4, 11), (1, 1, 1, 1), (1, 1, 0, 1)))
    train(tmp_path, tmp_path / "run", "--batch-size", size, "--epochs", 1)
    assert read(tmp_path / "run")["splits"]["test"]["groups"][2]["acc"] is None


# ---- the same command again ----


def stamps(run):
    return {path: path.stat().st_mtime_ns for path in (run / "erm").iterdir()}


def test_a_finished_run_shows_its_table(birds, copy, capsys):
    before, shown = stamps(copy), set()
    for data in (birds, f"{birds}/", birds / "metadata.csv", os.path.relpath(birds)):
        train(data, copy)
        shown.add(capsys.readouterr().out.partition("is finished")[2])
    assert stamps(copy) == before and len(shown) == 1 and "\n2 waterbird on land* " in shown.pop()


@pytest.mark.parametrize("workers", [0, 2])
def test_more_epochs_extend_a_run(birds, whole, tmp_path, workers):
    """Also with workers that read the images, which change nothing."""
    train(birds, tmp_path, "--epochs", 2, "--workers", workers)
    train(birds, tmp_path, "--workers", workers)
    assert_same(tmp_path, whole)


STEP, SAVE = (torch.optim.Adam, "step", 4), (common, "save_checkpoint", 4)


@pytest.mark.parametrize("place,name,call", [STEP, SAVE, (train_erm, "plot_curves", 1)])
def test_interrupted_runs_continue(birds, whole, tmp_path, place, name, call):
    """In a step of epoch 2, between its checkpoints, and in front of the last figure."""
    calls, function = [], getattr(place, name)

    def breaks(*arguments, **fields):
        calls.append(name)
        if len(calls) == call:
            raise KeyboardInterrupt
        return function(*arguments, **fields)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(place, name, breaks)
        train(birds, tmp_path)
    assert not (tmp_path / "erm/results.json").exists()
    (tmp_path / "erm/.last.pt.new").write_bytes(b"half")  # as a kill leaves them
    (tmp_path / ".erm.new").mkdir()
    train(birds, tmp_path)
    assert_same(tmp_path, whole)


def start(birds, run, word):
    """A process of its own, which has just printed a line that begins with this word."""
    numbers = (signal.SIGINT, signal.SIGHUP)  # which shells may ignore in the background
    process = subprocess.Popen(
        [sys.executable, "-u", "train_erm.py", *flags(birds, run)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: [signal.signal(n, signal.SIG_DFL) for n in numbers],  # noqa: PLW1509
    )
    assert any(line.startswith(word) for line in process.stdout), process.stderr.read()
    return process


def test_signals(birds, whole, tmp_path):
    for name, word in (("SIGTERM", "epoch"), ("SIGHUP", "run="), ("SIGINT", "epoch")):
        process = start(birds, tmp_path, word)
        process.send_signal(signal.Signals[name])
        lines = process.communicate()[1].splitlines()
        told = [line for line in lines if line and not line.startswith("warning:")]
        assert len(told) == 1 and f"stopped by {name}; the same command continues" in told[0]
        assert process.returncode == {"SIGTERM": 143, "SIGHUP": 129, "SIGINT": 130}[name]
    train(birds, tmp_path)
    assert_same(tmp_path, whole)


def test_one_process_a_folder_until_it_is_killed(birds, whole, tmp_path, monkeypatch, refuse):
    lock = common.filelock.FileLock
    monkeypatch.setattr(common.filelock, "FileLock", lambda path, timeout: lock(path, 0.1))
    process = start(birds, tmp_path, "epoch")
    time.sleep(0.2 * random.random())
    process.send_signal(signal.SIGSTOP)
    assert f"in use by process {process.pid} on " in refuse(birds, tmp_path)
    process.kill()
    process.communicate()
    with common.script(tmp_path / "erm"):
        train(birds, tmp_path)
    assert_same(tmp_path, whole)


def test_a_reader_that_leaves(birds, copy):
    command = f"{sys.executable} -u train_erm.py {' '.join(flags(birds, copy))} | head -1"
    call = ["bash", "-c", f"set -o pipefail; {command}"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 141 and done.stdout.startswith("run=")
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


# ---- refused in one line, and the old run still stands ----

IMPOSSIBLE = "--lr inf,--lr nan,--epochs 0,--size 0,--batch-size 0,--batch-size 1,--seed -1"
IMPOSSIBLE += ",--seed 4294967296,--workers -1,--difficulty -1.0,--device gpu,--arch resnet51"
OTHER = {"--lr 2e-3": "lr 0.001, now 0.002", "--epochs 3": "epochs 4, now 3"}
OTHER |= {"--seed 1 --augment none": "augment table1, now none; seed 0, now 1"}
OTHER |= {f"--overwrite {flag}": f"error: {flag}" for flag in IMPOSSIBLE.split(",")}


@pytest.mark.parametrize("more,words", OTHER.items())
def test_refused_settings(birds, copy, refuse, more, words):
    before = stamps(copy)
    assert words in refuse(birds, copy, *more.split())
    assert stamps(copy) == before


def test_overwrite_and_divergence(birds, copy, refuse):
    assert "diverged in epoch 1; try" in refuse(birds, copy, "--lr", 1e30, "--overwrite")
    assert read(copy, "args.json")["args"]["lr"] == 1e30 and len([*stamps(copy)]) == 1


def test_labels_that_change_in_between(tmp_path, refuse):
    table = write_waterbirds(tmp_path)
    train(tmp_path, tmp_path / "run", "--epochs", 1)
    table[1][2], table[25][2] = table[25][2], table[1][2]
    write_table(tmp_path, table)
    assert "the data changed" in refuse(tmp_path, tmp_path / "run")


def test_folders_that_are_not_ours(birds, copy, refuse):
    note = copy / "erm/notes.txt"
    note.write_text("mine")
    for more in ([], ["--overwrite"]):
        assert f"{note} is not of this stage" in refuse(birds, copy, *more)
    assert note.read_text() == "mine" and len(stamps(copy)) == 1 + len(FILES)
    assert f"{note}: File exists" in refuse(birds, note)


def test_a_link_is_written_through(birds, whole, tmp_path):
    for name in ("scratch", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "run/erm").symlink_to(tmp_path / "scratch")
    train(birds, tmp_path / "run")
    (tmp_path / "run/erm").unlink()
    (tmp_path / "scratch").rename(tmp_path / "run/erm")
    assert_same(tmp_path / "run", whole)


def cut(data):
    return data[: len(data) // 2]


def flip(data):
    return bytes([*data[:9999], data[9999] ^ 4, *data[10000:]])


@pytest.mark.parametrize("damage", [cut, flip, lambda _: b"", lambda _: b'{"stage": 1}'])
@pytest.mark.parametrize("name", ["args.json", "last.pt", "results.json"])
def test_damaged_files(birds, copy, refuse, name, damage):
    path = copy / "erm" / name
    if name == "last.pt" or damage is not flip:  # which JSON has no checksum to tell
        path.write_bytes(damage(path.read_bytes()))
        assert f"{path}: " in refuse(birds, copy)
