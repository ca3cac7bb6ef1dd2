"""train_erm.py as its user runs it: what it writes, selects, continues and refuses."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import train_erm

from .conftest import ROOT, SMALL, run_script, write_table, write_waterbirds

FILES = {"args.json", "log.jsonl", "results.json", "fig01_group_accuracy.png", "curves.png"}
FILES |= {"best.pt", "last.pt", "epoch_002.pt", "epoch_003.pt"}
IMPOSSIBLE = "--lr inf,--lr nan,--epochs 0,--size 0,--batch-size 0,--batch-size 1,--seed -1"
IMPOSSIBLE += ",--seed 4294967296,--workers -1,--difficulty -1.0,--device gpu,--arch resnet51"
REFUSED = {"--epochs 3": "epochs 4, now 3", "--lr 1 --seed 1": "lr 0.01, now 1.0; seed 3, now 1"}
REFUSED |= {f"--overwrite {flag}": f"error: {flag}" for flag in IMPOSSIBLE.split(",")}
REFUSED |= {"--overwrite --epoch 5": "error: unrecognized arguments: --epoch 5"}


@pytest.fixture
def train(erm_run, tmp_path, monkeypatch, capsys):
    """Stage 1 as its script runs it, into tmp_path/run; returns what it prints or, where it ends
    with another exit code than 0, the one line that it says."""
    monkeypatch.setattr(common, "STOP_SIGNALS", [])  # pytest keeps its own
    monkeypatch.setattr(common, "save_figure", lambda fig, path: path.touch())  # they take longest

    def run(more="", code=0, data=erm_run / "data", folder=tmp_path / "run"):
        flags = f"--data {data} --run {folder} {SMALL} {more}"
        stopped = pytest.raises(SystemExit, match=str(code)) if code else nullcontext()
        with stopped, common.script(folder / "erm"):
            args = train_erm.parse_args(flags.split())
            with common.machine(args):
                train_erm.main(args)
        out, err = capsys.readouterr()
        told = [x for x in err.splitlines() if x and not x.startswith("warning:")]
        assert len(told) == (code > 0), told
        return told[0] if code else out

    return run


@pytest.fixture
def copy(erm_run, tmp_path):
    shutil.copytree(erm_run / "run/erm", tmp_path / "run/erm")
    return tmp_path / "run"


def content(folder):
    """results.json; log.jsonl, which says what last.pt says, without the clock's part; weights."""
    results = json.loads((folder / "results.json").read_text())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    networks = {path.name: common.load_model(path) for path in folder.glob("*.pt")}
    assert log == networks["last.pt"][1]["log"]
    weights = {name: common.fingerprint_of(model) for name, (model, _) in networks.items()}
    return results, [{**row, "seconds": 0} for row in log], weights


def stamps(run):
    return {path.name: path.stat().st_mtime_ns for path in (run / "erm").iterdir()}


@pytest.mark.parametrize("rule,selected", [("val-wga", 3), ("val-mean", 1), ("last", 4)])
def test_what_a_run_writes(train, erm_run, tmp_path, monkeypatch, rule, selected):
    """Selected: the first epoch of the highest score. The test split is read after all epochs."""
    evaluated, evaluate, folder = [], common.evaluate, tmp_path / "run/erm"
    scores = [(0.1, 0.6), (0.2, 0.4), (0.3, 0.6), (0.3, 0.5)]  # worst group, mean in validation

    def spy(model, loaders, groups):
        evaluated.extend(len(batches.dataset) for batches in loaders.values())
        reports, logits = evaluate(model, loaders, groups)
        for report in reports.values():
            report["of"] = common.fingerprint_of(model)
        val = reports.get("val", {})
        val["acc_worst"], val["acc_mean"] = scores[len(evaluated) // 2 % 4 - 1]
        return reports, logits

    monkeypatch.setattr(common, "evaluate", spy)
    train(f"--select {rule}")
    results, log, weights = content(folder)
    assert evaluated == [32, 16] * 4 + [20, 20] and results["selected_epoch"] == selected
    for key, name, epoch in (("splits", "best.pt", selected), ("last", "last.pt", 4)):
        model, saved, table = common.reopen(folder / name)
        images = {"test": common.make_loader(common.open_split(saved, table, "test"))}
        (test, _), row = evaluate(model, images, table.groups), log[epoch - 1]
        test["test"]["of"] = weights[name]
        assert results[key] == {"train": row["train"], "val": row["val"], **test}
        assert saved["epoch"] == row["epoch"] == epoch and row["val"]["of"] == weights[name]
    for path in (erm_run / "run/erm").glob("*.png"):
        assert len(Image.open(path).convert("L").getcolors(1 << 20)) > 20


@pytest.mark.parametrize("head", ["linear", "softmax"])
def test_steps_by_hand(train, tmp_path, head):
    """Two epochs of a step of Adam, each with its own order and augmentation."""
    train(f"--epochs 2 --augment crop-flip --batch-size 32 --lr 1e-3 --head {head}")
    _, saved, table = common.reopen(tmp_path / "run/erm/last.pt")
    torch.manual_seed(3)
    model = common.build_model("test_resnet", 2, 32).train().to(memory_format=torch.channels_last)
    images = common.open_split(saved, table, "train", "crop-flip", seed=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in (1, 2):
        order = torch.Generator().manual_seed(common.seed_of(3, epoch))
        batch = torch.randperm(32, generator=order).tolist()
        logits = model(*common.on_device(model, torch.stack([images[epoch, i][0] for i in batch])))
        loss = F.cross_entropy(logits.softmax(1) if head == "softmax" else logits, images.y[batch])
        assert saved["log"][epoch - 1]["loss"] == pytest.approx(loss.item(), abs=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for key, value in model.state_dict().items():
        assert torch.allclose(value, saved["model"][key], atol=3e-5), key


def test_half_precision_is_near_full_precision(erm_run, tmp_path, train, monkeypatch):
    half = ["--run", tmp_path, "--epochs", 1, "--precision", "bf16"]
    run_script("train_erm.py", "--data", erm_run / "data", *SMALL.split(), *half)
    run_script("finetune_contrastive.py", *half)
    half, full = (content(run / "erm")[1][0]["loss"] for run in (tmp_path, erm_run / "run"))
    assert half != full and half == pytest.approx(full, rel=0.05)
    for gain, hint in ((2, True), (1, False)):  # in the first line
        monkeypatch.setattr(common, "bf16_gain", lambda _, gain=gain: gain)
        assert ("bf16 is faster here" in train("--overwrite --epochs 1").splitlines()[0]) == hint


def test_more_epochs_extend_a_run(train, erm_run, tmp_path):
    """Also with workers that read the images, through a link to another disk."""
    run = tmp_path / "run"
    for folder in (tmp_path / "scratch", run):
        folder.mkdir()
    (run / "erm").symlink_to(tmp_path / "scratch")
    (run / "erm/.DS_Store").touch()
    train("--epochs 2 --workers 2")
    train("--deterministic")
    assert (run / "erm").is_symlink() and len([*tmp_path.iterdir()]) == 2
    assert [*run.iterdir()] == [run / "erm"] and {*stamps(run)} == FILES
    assert content(run / "erm") == content(erm_run / "run/erm")
    assert torch.are_deterministic_algorithms_enabled()


def test_a_finished_run_shows_its_table(train, erm_run, copy):
    before, birds = stamps(copy), erm_run / "data"
    written = (birds, f"{birds}/", birds / "metadata.csv", os.path.relpath(birds))
    shown = {train(data=data).partition("is finished")[2] for data in written}
    assert stamps(copy) == before and len(shown) == 1 and "\n2 waterbird on land* " in shown.pop()


def test_a_reader_that_leaves(erm_run, copy):
    command = f"{sys.executable} -u train_erm.py --data {erm_run}/data --run {copy} {SMALL}"
    call = ["bash", "-o", "pipefail", "-c", f"{command} | head -1"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 141 and done.stdout.startswith("run=") and "Error" not in done.stderr


@pytest.mark.parametrize("more,words", REFUSED.items())
def test_refused_settings(train, copy, more, words):
    before, said = stamps(copy), train(more, code=2)
    assert words in said and stamps(copy) == before


def test_odd_counts_and_labels_that_change(train, tmp_path):
    """33 training images: BatchNorm cannot take the last one alone. And a test group is empty."""
    table = write_waterbirds(tmp_path, ((13, 5, 4, 11), (1, 1, 1, 1), (1, 1, 0, 1)))
    train("--batch-size 16 --epochs 1", data=tmp_path)
    assert content(tmp_path / "run/erm")[0]["last"]["test"]["groups"][2]["acc"] is None
    for name in ("last.pt", "results.json"):  # as after a kill in the first epoch
        (tmp_path / "run/erm" / name).unlink()
    train("--batch-size 16 --epochs 2", data=tmp_path)
    assert common.read_json(tmp_path / "run/erm/args.json")["args"]["epochs"] == 2
    table[1][2], table[25][2] = table[25][2], table[1][2]
    write_table(tmp_path, table)
    assert "the data changed" in train(code=2, data=tmp_path)


def test_foreign_files_and_overwrite(train, copy):
    note = copy / "erm/my_plot.png"
    note.write_text("mine")
    for more in ("", "--overwrite"):
        assert f"{note} is not of this stage" in train(more, code=2)
    assert note.read_text() == "mine" and {*stamps(copy)} == FILES | {"my_plot.png"}
    assert f"{note}: File exists" in train(code=2, folder=note)
    note.rename(copy / "erm/.nfs0001")  # refuses nothing
    assert "diverged in epoch 1; try" in train("--lr 1e30 --overwrite", code=2)
    assert '"lr": 1e+30' in (copy / "erm/args.json").read_text() and len(stamps(copy)) == 1
