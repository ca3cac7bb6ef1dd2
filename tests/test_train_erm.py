"""train_erm.py as its user runs it: what it writes, selects, continues and refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image

import common
import train_erm

from .conftest import ROOT, SMALL, write_table, write_waterbirds

WRITTEN = {
    "args.json",
    "log.jsonl",
    "best.pt",
    "last.pt",
    "epoch_001.pt",  # 40 % of 4, which is always kept
    "epoch_002.pt",
    "epoch_003.pt",
    "results.json",
    "fig01_group_accuracy.png",
    "curves.png",
    ".lock",
}


def as_script(stage, flags, capsys, code=0):
    """Run a stage in this process, as its script does; to start Python anew would take seconds.
    Returns what it prints or, where it ends with another exit code than 0, the one line that it
    says besides warnings."""
    stopped = pytest.raises(SystemExit, match=f"^{code}$") if code else nullcontext()
    handler = signal.getsignal(signal.SIGINT)
    hook = sys.unraisablehook
    try:
        with stopped:
            common.run_stage(lambda: stage.parse_args(flags.split()), stage.main)
    finally:
        signal.signal(signal.SIGINT, handler)
        sys.unraisablehook = hook
        torch.use_deterministic_algorithms(False)
    out, err = capsys.readouterr()
    told = [line for line in err.splitlines() if line and not line.startswith("warning:")]
    assert len(told) == (1 if code else 0), told
    return told[0] if code else out + err


def without_figures(monkeypatch):
    """Figures are empty files, as to draw them takes longer than all else."""
    monkeypatch.setattr(Figure, "savefig", lambda *args, **kwargs: None)


@pytest.fixture
def train(erm_run, tmp_path, monkeypatch, capsys):
    """A function that runs stage 1 as its script does, into tmp_path/run; see as_script."""
    without_figures(monkeypatch)

    def run(more="", code=0, data=erm_run / "data", folder=tmp_path / "run"):
        return as_script(train_erm, f"--data {data} --run {folder} {SMALL} {more}", capsys, code)

    return run


@pytest.fixture
def copy(erm_run, tmp_path):
    """A run folder of its own with the finished run of stage 1."""
    shutil.copytree(erm_run / "run/erm", tmp_path / "run/erm")
    return tmp_path / "run"


def content(folder):
    """What a training stage left: results.json, its log without the seconds that epochs took, and
    the weights of its checkpoints as fingerprints."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    weights = {}
    for path in folder.glob("*.pt"):
        model, checkpoint = common.load_model(path)
        weights[path.name] = common.fingerprint_of(model)
        if path.name == "last.pt":
            assert checkpoint["log"] == log
    for row in log:
        row["seconds"] = 0
    return common.read_json(folder / "results.json"), log, weights


def stamps(run):
    """When each file of stage 1 was written last."""
    return {path.name: path.stat().st_mtime_ns for path in (run / "erm").iterdir()}


def report_on_test(path):
    """The group report of a checkpoint's network on the test split, and the checkpoint."""
    model, checkpoint, table = common.reopen(path)
    images = common.Batches(common.open_split(checkpoint, table, "test"))
    reports, _ = common.evaluate(model, {"test": images}, table.groups)
    return reports["test"], checkpoint


def test_what_a_run_writes(train, tmp_path, monkeypatch):
    """Selected is the first epoch of the highest worst-group accuracy in validation, and the test
    split is measured once, after all epochs."""
    evaluate = common.evaluate
    evaluated = []
    scores = [(0.1, 0.6), (0.2, 0.4), (0.3, 0.5), (0.3, 0.6)]  # worst group and mean, validation

    def spy(model, loaders, groups):
        reports, logits = evaluate(model, loaders, groups)
        for split, report in reports.items():
            if split == "val":
                epoch = evaluated.count("val")
                report["acc_worst"], report["acc_mean"] = scores[epoch]
            report["of"] = common.fingerprint_of(model)
            evaluated.append(split)
        return reports, logits

    monkeypatch.setattr(common, "evaluate", spy)
    train()
    folder = tmp_path / "run/erm"
    results, log, weights = content(folder)
    assert set(stamps(tmp_path / "run")) == WRITTEN
    assert evaluated == ["train", "val"] * 4 + ["test"]
    selected = results["selected_epoch"]
    assert selected == 3
    monkeypatch.undo()
    report, saved = report_on_test(folder / "best.pt")
    row = log[selected - 1]
    assert results["splits"] == {
        "train": row["train"],
        "val": row["val"],
        "test": {**report, "of": weights["best.pt"]},
    }
    for name, epoch in (("best.pt", selected), ("epoch_002.pt", 2), ("last.pt", 4)):
        assert common.load_checkpoint(folder / name)["epoch"] == log[epoch - 1]["epoch"] == epoch
        assert log[epoch - 1]["val"]["of"] == weights[name]
    assert saved["erm"]["id"] == results["erm"]["id"] == log[0]["val"]["of"]


def test_figures_show_something(erm_run):
    for name in ("fig01_group_accuracy.png", "curves.png"):
        picture = Image.open(erm_run / "run/erm" / name).convert("L")
        assert len(picture.getcolors(1 << 20)) > 20


def test_figure_1_by_hand():
    """Training beside test, each with its own accuracy."""
    splits = {}
    for split, accuracy in (("train", 0.75), ("test", 0.5)):
        group = {"group": 0, "name": "a", "n": 4, "minority": True, "acc": accuracy}
        splits[split] = {"groups": [group]}
    (ax,) = train_erm.plot_gap({"splits": splits, "selected_epoch": 1}).axes
    bars = [(bars.get_label(), bars[0].get_height()) for bars in ax.containers]
    assert bars == [("train", 75), ("test", 50)]
    assert ax.get_xticklabels()[0].get_text().startswith("G0*\na")


def test_curves_of_many_groups_are_in_rows_of_six():
    groups = common.describe_groups("abcd", "xy", [1] * 8)
    report = common.group_report(*torch.arange(8).expand(3, 8), groups)
    row = {"epoch": 1, "terms": {"cross entropy": 0.5}, "train": report, "val": report}
    fig = common.plot_epochs([row])
    assert [ax.get_title() for ax in fig.axes][-2:] == ["accuracy of\nG7 d y", "training loss"]
    assert len(fig.axes) == 9
    assert fig.get_size_inches().tolist() == pytest.approx([6 * 2.7, 2 * 2.8])


def test_terms_below_zero_are_drawn():
    """A term that somebody adds may be a bonus; and a curve may be of one epoch alone."""
    report = common.group_report(
        torch.tensor([0]),
        torch.tensor([0]),
        torch.tensor([0]),
        common.describe_groups(["cow"], ["grass"], [1]),
    )
    start = {"epoch": 0, "terms": {}, "train": report, "val": report}
    row = {**start, "epoch": 1, "terms": {"squared error": 0.5, "entropy": -0.6}}
    accuracy, loss = common.plot_epochs([start, row]).axes
    assert accuracy.get_ylim()[1] == 1.05
    low, high = loss.get_ylim()
    assert low < -0.6 and high > 0.5
    assert loss.get_xlim() == accuracy.get_xlim()


def test_steps_by_hand(train, tmp_path):
    """Two epochs of one step of Adam, each with its own order and augmentation."""
    train("--epochs 2 --augment crop-flip --batch-size 32 --lr 1e-3")
    _, saved, table = common.reopen(tmp_path / "run/erm/last.pt")
    torch.manual_seed(3)
    model = common.build_model("test_resnet", 2, 32).train().to(memory_format=torch.channels_last)
    images = common.open_split(saved, table, "train", augment="crop-flip", seed=3)
    mean = torch.tensor(saved["mean"]).view(3, 1, 1)
    std = torch.tensor(saved["std"]).view(3, 1, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in (1, 2):
        order = torch.Generator().manual_seed(common.seed_of(3, epoch))
        batch = torch.randperm(32, generator=order).tolist()
        x = torch.stack([images[epoch, i][0] for i in batch])
        loss = F.cross_entropy(model((x / 255 - mean) / std), images.y[batch])
        assert saved["log"][epoch - 1]["loss"] == pytest.approx(loss.item(), abs=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for key, value in model.state_dict().items():
        assert torch.allclose(value, saved["model"][key], atol=3e-5), key


def test_learning_rate_is_halved_on_a_plateau(train, tmp_path, monkeypatch):
    """Table 2: the loss does not fall for more than 3 epochs. From outside it is made to stand."""
    monkeypatch.setattr(common, "finite_loss", lambda *args, **kwargs: 1.0)
    train("--epochs 6")
    log = common.load_checkpoint(tmp_path / "run/erm/last.pt")["log"]
    assert [row["lr"] for row in log] == [0.01] * 5 + [0.005]


def test_learning_rate_stays_while_the_loss_falls(train, tmp_path, monkeypatch):
    of_epochs = iter([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    monkeypatch.setattr(common, "finite_loss", lambda *args: next(of_epochs))
    train("--epochs 6")
    log = common.load_checkpoint(tmp_path / "run/erm/last.pt")["log"]
    assert [row["lr"] for row in log] == [0.01] * 6


def test_half_precision_is_near_full_precision(train, erm_run, tmp_path):
    train("--epochs 1 --precision bf16")
    half = content(tmp_path / "run/erm")[1][0]["loss"]
    full = content(erm_run / "run/erm")[1][0]["loss"]
    assert half != full
    assert half == pytest.approx(full, rel=0.05)


def test_more_epochs_extend_a_run(train, erm_run, tmp_path):
    """The same as in one go, also with workers that read the images, through a link to another
    disk, and with --deterministic."""
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "scratch").mkdir()
    (run / "erm").symlink_to(tmp_path / "scratch")
    train("--epochs 2 --workers 2")
    said = train("--deterministic")
    assert "epoch 2/4" not in said
    assert "epoch 3/4" in said
    assert (run / "erm").is_symlink()
    assert set(stamps(run)) == WRITTEN
    found = content(run / "erm")
    expected = content(erm_run / "run/erm")
    for results in (found[0], expected[0]):
        results["erm"]["settings"].pop("epochs")  # an extension may keep the best.pt it finds
    assert found == expected


def test_a_finished_run_shows_its_table(train, erm_run, copy):
    """Wherever the data are called from, and nothing is written."""
    before = stamps(copy)
    data = erm_run / "data"
    shown = set()
    for name in (data, f"{data}/", data / "metadata.csv", os.path.relpath(data)):
        said = train(data=name)
        assert "is finished; --overwrite starts anew" in said
        shown.add(said.partition("is finished")[2])
    assert len(shown) == 1
    assert "\nG2* " in shown.pop()
    assert "warning: " not in train()
    assert "erm has not kept epoch 4; --overwrite trains anew" in train("--keep-epochs 2 4 9")
    assert stamps(copy) == before


def test_a_reader_that_leaves(erm_run, copy):
    """As in `... | head -1`: no word, and the exit code of a process that SIGPIPE ended."""
    command = f"{sys.executable} train_erm.py --data {erm_run}/data --run {copy} {SMALL}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{command} | true"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 141
    assert done.stderr == ""


IMPOSSIBLE = (
    "--lr inf",
    "--lr nan",
    "--lr 0",
    "--epochs 0",
    "--size 0",
    "--batch-size 0",
    "--batch-size 1",
    "--seed -1",
    "--seed 4294967296",
    "--workers -1",
    "--keep-epochs 0",
    "--precision fp8",
    "--device gpu",
    "--arch resnet51",
    "--weights missing.pth",
)


@pytest.mark.parametrize("flag", IMPOSSIBLE)
def test_impossible_flags(train, copy, flag):
    """One line that names the flag (as argparse does, or its file), and nothing is written."""
    before = stamps(copy)
    said = train(f"--overwrite {flag}", code=2)
    name, value = flag.split()
    assert "error: " in said
    assert name in said or value in said
    assert stamps(copy) == before


@pytest.mark.parametrize(
    "more,words",
    [
        ("--epochs 3", "epochs 4, now 3"),
        ("--lr 1 --seed 1", "lr 0.01, now 1.0; seed 3, now 1"),
        ("--precision bf16", "precision fp32, now bf16"),
        ("--overwrite --epoch 5", "error: unrecognized arguments: --epoch 5"),
    ],
)
def test_other_settings_are_refused(train, copy, more, words):
    before = stamps(copy)
    assert words in train(more, code=2)
    assert stamps(copy) == before


def test_overwrite_leaves_nothing_of_the_older_run(train, copy):
    """But what the user put there stays, though its name begins alike."""
    (copy / "erm/epoch_1000.pt").touch()
    (copy / "erm/epoch_001_copy.pt").touch()
    train("--overwrite --epochs 1 --keep-epochs")
    left = WRITTEN - {"epoch_002.pt", "epoch_003.pt"}
    assert set(stamps(copy)) == {*left, "epoch_001_copy.pt"}
    assert common.read_json(copy / "erm/args.json")["args"]["epochs"] == 1


def test_divergence_is_said(train, copy):
    assert "diverged in epoch 1" in train("--lr 1e12 --overwrite", code=2)
    assert common.read_json(copy / "erm/args.json")["args"]["lr"] == 1e12
    assert set(stamps(copy)) == {"args.json", ".lock"}


def test_odd_counts_and_labels_that_change(train, tmp_path):
    """33 training images, of which BatchNorm cannot take the last one alone, and a test group
    without an image. Training and validation labels must stay."""
    table = write_waterbirds(tmp_path, ((13, 5, 4, 11), (1, 1, 1, 1), (1, 1, 0, 1)))
    assert "test has no image of" in train("--batch-size 16 --epochs 1", data=tmp_path)
    results, _, _ = content(tmp_path / "run/erm")
    assert results["splits"]["test"]["groups"][2]["acc"] is None
    for name in ("last.pt", "results.json"):
        (tmp_path / "run/erm" / name).unlink()
    said = train("--batch-size 16 --epochs 2", code=2, data=tmp_path)
    assert "has lost the last.pt of the run that its best.pt is of" in said
    (tmp_path / "run/erm/best.pt").unlink()  # as after a kill in the first epoch
    train("--batch-size 16 --epochs 2", data=tmp_path)
    assert common.read_json(tmp_path / "run/erm/args.json")["args"]["epochs"] == 2
    table[1][2], table[25][2] = table[25][2], table[1][2]
    write_table(tmp_path, table)
    assert "the labels changed" in train("--batch-size 16 --epochs 2", code=2, data=tmp_path)


@pytest.mark.parametrize("name", ["best.pt", "args.json", "epoch_007.pt"])
def test_files_of_others_are_not_overwritten(train, tmp_path, name):
    """What has one of our names but was not written by this project stays, and is refused."""
    folder = tmp_path / "run/erm"
    folder.mkdir(parents=True)
    (folder / name).write_text('{"lr": 1}')
    for more in ("", "--overwrite"):
        assert f"{folder}/{name} is not of this project" in train(more, code=2)
    assert (folder / name).read_text() == '{"lr": 1}'
    assert [path.name for path in folder.iterdir()] == [name]


def test_a_file_in_the_place_of_the_folder(train, tmp_path):
    (tmp_path / "taken").touch()
    assert f"Not a directory: '{tmp_path}/taken" in train(code=2, folder=tmp_path / "taken")


def test_the_built_in_set_is_drawn_when_it_is_not_there(tmp_path, monkeypatch, capsys):
    """Once, by data/birds.py; it has defaults of its own, and other data have the paper's."""
    monkeypatch.setattr(common, "BIRDS", tmp_path / "birds")
    write_waterbirds(tmp_path / "drawn")
    draw = "import os, sys\nos.chdir(os.path.dirname(sys.argv[0]))\nos.rename('drawn', 'birds')\n"
    (tmp_path / "birds.py").write_text(draw)

    def stop(arch, n_classes, size, weights):
        raise common.BadInput(f"{arch} {size}")

    monkeypatch.setattr(common, "build_model", stop)
    run = f"--run {tmp_path}/run --device cpu"
    for _ in range(2):
        assert as_script(train_erm, run, capsys, code=2).endswith("error: resnet10 40")
    (tmp_path / "birds").rename(tmp_path / "elsewhere")
    flags = f"{run} --data {tmp_path}/elsewhere"
    assert as_script(train_erm, flags, capsys, code=2).endswith("error: resnet50 224")
    (tmp_path / "birds.py").write_text("raise SystemExit(7)")
    with pytest.raises(SystemExit, match="^7$"), common.script():
        train_erm.main(train_erm.parse_args(run.split()))


@pytest.fixture
def stop(monkeypatch):
    """Nothing is trained, as if a run were finished."""
    monkeypatch.setattr(common, "earlier_run", lambda *args, **kwargs: (None, {"some": "results"}))
    monkeypatch.setattr(train_erm, "print_table", lambda _: None)


def test_defaults_are_those_of_the_paper(stop, erm_run, tmp_path):
    """Section 4.1 and Table 2."""
    args = train_erm.parse_args(["--data", str(erm_run / "data"), "--run", str(tmp_path)])
    train_erm.main(args)
    assert (args.arch, args.size, args.epochs, args.batch_size) == ("resnet50", 224, 100, 256)
    assert (args.lr, args.augment) == (1e-4, "table1")
    assert args.keep_epochs == [30, 40, 50, 60]


def test_defaults_of_the_built_in_set(stop, erm_run, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "is_built_in", lambda _: True)
    args = train_erm.parse_args(["--data", str(erm_run / "data"), "--run", str(tmp_path)])
    train_erm.main(args)
    assert (args.arch, args.size, args.epochs, args.batch_size) == ("resnet10", 40, 10, 128)
    assert (args.lr, args.augment) == (3e-4, "crop-flip")
    assert args.keep_epochs == [3, 4, 5, 6]
