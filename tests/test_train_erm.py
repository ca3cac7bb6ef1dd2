"""train_erm.py as its user runs it: what it writes, that it repeats, resumes, selects and refuses."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

import train_erm
from common import BadInput, load_model, load_split, predict, read_metadata, summarize

from .conftest import ROOT, assert_refused, run_script, write_celeba, write_table, write_waterbirds

SMALL = ("--arch", "resnet10", "--weights", "none", "--size", "32", "--batch-size", "16", "--lr", "1e-3", "--device", "cpu")


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    """A small set in Waterbirds' layout."""
    folder = tmp_path_factory.mktemp("birds")
    write_waterbirds(folder)
    return folder


def train(birds, run, *more, **options):
    return run_script("train_erm.py", "--data", birds, "--run", run, "--cache", birds / "cache", *SMALL, "--epochs", "3",
                      "--keep-epochs", "2", *more, **options)


def read(folder, name="results.json"):
    return json.loads((folder / "erm" / name).read_text())


@pytest.fixture(scope="module")
def finished(birds):
    process = train(birds, birds / "run")
    return birds / "run", process


def test_run_folder(finished, birds):
    run, process = finished
    assert {p.name for p in (run / "erm").iterdir()} == {"args.json", "log.jsonl", "best.pt", "last.pt", "epoch_002.pt", "results.json",
                                                         "fig01_group_accuracy.png", "curves.png"}
    settings, results = read(run, "args.json"), read(run)
    assert settings["args"]["lr"] == 1e-3 and settings["args"]["augment"] == "table1" and settings["args"]["keep_epochs"] == [2]
    assert "train_erm.py --data" in settings["command"] and settings["torch"] == torch.__version__
    assert results["stage"] == "erm" and set(results["splits"]) == {"train", "val", "test"} == set(results["last"])
    assert [g["n"] for g in results["splits"]["test"]["groups"]] == [6, 5, 4, 5]
    log = [json.loads(line) for line in (run / "erm" / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in log] == [1, 2, 3] and {"loss", "lr", "seconds", "train", "val"} <= log[0].keys()
    scores = [row["val"]["acc_worst"] for row in log]
    assert results["selected_epoch"] == 1 + scores.index(max(scores))  # the highest, and the first of equals
    for name in ("fig01_group_accuracy.png", "curves.png"):
        with Image.open(run / "erm" / name) as image:
            assert image.width > 500 and len(image.convert("L").getcolors(1 << 20)) > 20
    out = process.stdout
    assert "epoch 3/3 loss" in out and "1 landbird on water*" in out and out.count("<") == 4  # three splits and the legend
    assert "\r" not in process.stderr  # no progress bar where nobody looks


def test_checkpoints_describe_themselves(finished, birds):
    """The stored counts are those of the stored weights on data loaded from the checkpoint alone."""
    run, _ = finished
    for name, epoch in (("best.pt", read(run)["selected_epoch"]), ("epoch_002.pt", 2), ("last.pt", 3)):
        model, checkpoint = load_model(run / "erm" / name)
        assert checkpoint["epoch"] == epoch and checkpoint["arch"] == "resnet10"
        meta = read_metadata(checkpoint["data"]["data"], checkpoint["data"]["attributes"])
        split = load_split(meta, "val", checkpoint["size"], birds / "cache")
        correct = predict(model, split, checkpoint["size"]).argmax(1) == split.y
        assert [int(correct[split.g == j].sum()) for j in range(4)] == [g["correct"] for g in checkpoint["metrics"]["val"]["groups"]]
    log = (run / "erm" / "log.jsonl").read_text().splitlines()
    assert json.loads(log[1])["val"] == load_model(run / "erm" / "epoch_002.pt")[1]["metrics"]["val"]


def test_seeds(finished, birds):
    run, _ = finished
    train(birds, birds / "same")
    train(birds, birds / "other", "--seed", "1")
    assert read(birds / "same") == read(run)
    assert read(birds / "other") != read(run)
    logs = [[json.loads(line)["loss"] for line in (birds / name / "erm/log.jsonl").read_text().splitlines()] for name in ("run", "same", "other")]
    assert logs[0] == logs[1] != logs[2]


def test_resume_after_a_kill_is_bit_for_bit(birds, tmp_path):
    """Killed in the middle of an epoch, continued, and compared with a run that was left alone."""
    options = ["train_erm.py", "--data", str(birds), "--cache", str(birds / "cache"), *SMALL, "--epochs", "6", "--keep-epochs", "2"]
    run_script(*options, "--run", tmp_path / "alone")
    victim = subprocess.Popen([sys.executable, *options, "--run", str(tmp_path / "killed")], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})  # as run_script does: sums depend on the number of threads
    for line in victim.stdout:
        if line.startswith("epoch 2/"):
            time.sleep(0.05)  # now in the steps of epoch 3
            victim.send_signal(signal.SIGKILL)
            break
    victim.wait()
    assert victim.returncode == -signal.SIGKILL and not (tmp_path / "killed/erm/results.json").exists()
    assert_refused(run_script(*options, "--run", tmp_path / "killed", check=False), "interrupted run", "--resume", "--overwrite")
    run_script(*options, "--run", tmp_path / "killed", "--resume")
    assert read(tmp_path / "killed") == read(tmp_path / "alone")
    for name in ("best.pt", "last.pt", "epoch_002.pt"):
        a, b = (torch.load(tmp_path / run / "erm" / name, weights_only=True) for run in ("alone", "killed"))
        assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
        if name == "last.pt":
            assert torch.equal(a["rng"], b["rng"]) and a["scheduler"] == b["scheduler"] and a["best"] == b["best"]
            for key, state in a["optimizer"]["state"].items():
                assert all(torch.equal(state[k], b["optimizer"]["state"][key][k]) for k in state)
    losses = [[json.loads(line)["loss"] for line in (tmp_path / run / "erm/log.jsonl").read_text().splitlines()] for run in ("alone", "killed")]
    assert losses[0] == losses[1]


def test_resume_may_add_epochs(finished, birds):
    run = birds / "longer"
    train(birds, run)
    assert_refused(train(birds, run, "--epochs", "4", check=False), "epochs 3, now 4")
    train(birds, run, "--epochs", "4", "--resume")
    train(birds, birds / "four", "--epochs", "4")
    assert read(run) == read(birds / "four")


def test_a_finished_run_is_not_spoilt(finished, birds):
    run, first = finished
    stamp = (run / "erm/best.pt").stat().st_mtime_ns
    again = train(birds, run)
    assert "is finished" in again.stdout and again.stdout.splitlines()[-9:] == first.stdout.splitlines()[-10:-1]
    assert_refused(train(birds, run, "--lr", "0.5", check=False), "other settings", "lr 0.001, now 0.5", "--overwrite", "another --run")
    assert (run / "erm/best.pt").stat().st_mtime_ns == stamp
    train(birds, birds / "again")
    train(birds, birds / "again", "--lr", "2e-3", "--overwrite")
    assert read(birds / "again", "args.json")["args"]["lr"] == 2e-3


@pytest.mark.parametrize("select", ["last", "val-mean"])
def test_selection(birds, tmp_path, select):
    train(birds, tmp_path, "--select", select)
    log = [json.loads(line) for line in (tmp_path / "erm/log.jsonl").read_text().splitlines()]
    scores = [row["epoch"] if select == "last" else row["val"]["acc_mean"] for row in log]
    assert read(tmp_path)["selected_epoch"] == 1 + scores.index(max(scores))


def test_test_images_are_evaluated_once_an_epoch(birds, tmp_path, monkeypatch):
    """Twice where the selected epoch is not the last one, once where it is."""
    evaluated, evaluate = [], train_erm.evaluate
    def counting(model, split, *more):
        evaluated.append(len(split.y))
        return evaluate(model, split, *more)
    monkeypatch.setattr(train_erm, "evaluate", counting)
    for select in ("last", "val-wga"):
        monkeypatch.setattr(sys, "argv", ["train_erm.py", "--data", str(birds), "--run", str(tmp_path / select), "--epochs", "2",
                                          "--cache", str(birds / "cache"), *SMALL, "--select", select])
        evaluated.clear()
        train_erm.main()
        results = read(tmp_path / select)
        assert evaluated.count(20) == (1 if results["selected_epoch"] == 2 else 2)  # 20 test images
        assert (results["splits"] == results["last"]) == (results["selected_epoch"] == 2)


def test_softmax_head_confines_the_loss(birds, tmp_path):
    """The released code's head: with two classes the loss cannot leave [0.3133, 1.3133]."""
    train(birds, tmp_path, "--head", "softmax", "--lr", "1e-2", "--epochs", "8")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "erm/log.jsonl").read_text().splitlines()]
    assert all(0.3132 < loss < 1.3134 for loss in losses)


def test_settings_of_the_paper(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_erm.py"])
    args = train_erm.parse_args()
    assert (args.head, args.select, args.run.as_posix()) == ("linear", "val-wga", "runs/synthetic")
    for kind in ("waterbirds", "celeba", "other"):
        assert train_erm.DEFAULTS[kind] == dict(arch="resnet50", weights="default", size=224, epochs=100, batch_size=256, lr=1e-4,
                                                augment="table1", keep_epochs=[30, 40, 50, 60])


def test_celeba_runs_too(tmp_path):
    write_celeba(tmp_path)
    train(tmp_path, tmp_path / "run", "--epochs", "1")
    assert [g["name"] for g in read(tmp_path / "run")["splits"]["test"]["groups"]] == [
        "non-blond woman", "non-blond man", "blond woman", "blond man"]


def test_an_empty_test_group_is_left_out(tmp_path):
    write_waterbirds(tmp_path, ((9, 4, 4, 6), (3, 3, 3, 3), (3, 3, 0, 3)))
    process = train(tmp_path, tmp_path / "run", "--epochs", "1")
    assert "no test image in group 2" in process.stderr
    group = read(tmp_path / "run")["splits"]["test"]["groups"][2]
    assert (group["n"], group["acc"]) == (0, None)


def test_summarize(finished, birds, capsys, monkeypatch):
    train(birds, birds / "other", "--seed", "1", "--overwrite")
    monkeypatch.chdir(birds)
    values = [read(birds / name)["splits"]["test"]["acc_worst"] for name in ("run", "other")]
    summary = summarize("[ro][ut][nh]*/erm")
    mean = sum(values) / 2
    assert summary["worst group"] == pytest.approx((mean, (sum((v - mean) ** 2 for v in values)) ** 0.5, 2))
    assert "(n = 2)" in capsys.readouterr().out
    one = summarize(f"{birds}/run/erm", "train")
    assert one["worst group"][0] == read(birds / "run")["splits"]["train"]["acc_worst"] and one["worst group"][2] == 1
    with pytest.raises(BadInput, match="no results.json"):
        summarize("nothing*/erm")


# ---- bad input: one line, exit code 2, no traceback, nothing half-written


def test_refusals(birds, tmp_path):
    run = tmp_path / "run"
    assert_refused(train(tmp_path / "nowhere", run, check=False), "no such file or folder")
    table = write_waterbirds(tmp_path / "bad")
    table[3][2] = "-1"
    write_table(tmp_path / "bad", table)
    assert_refused(train(tmp_path / "bad", run, check=False), "metadata.csv row 4", "map -1/1 to 0/1")
    assert_refused(train(birds, run, "--weights", birds / "metadata.csv", check=False), "metadata.csv: not a readable state dict")
    assert_refused(train(birds, run, "--arch", "resnet51", check=False), "neither torchvision nor timm")
    assert_refused(train(birds, run, "--arch", "resnet18", "--weights", "default", check=False, TORCH_HOME=str(tmp_path)),
                   "cannot fetch https://", "resnet18-f37072fd.pth", "--weights FILE", "--weights none")
    assert not run.exists()
    process = train(birds, run, "--epoch", "3", check=False)  # an abbreviation would break when flags are added
    assert process.returncode == 2 and "unrecognized arguments" in process.stderr
    for flag, value in (("--epochs", "0"), ("--batch-size", "-1"), ("--lr", "nan"), ("--size", "0"), ("--device", "gpu")):
        assert_refused(train(birds, run, flag, value, check=False), f"{flag} {value}")
    assert not run.exists()


def test_an_image_that_breaks_is_found_before_training(birds, tmp_path):
    table = write_waterbirds(tmp_path)
    last = tmp_path / table[-1][1]  # of the test split, which is only read at the end
    last.write_bytes(last.read_bytes()[:200])
    assert_refused(train(tmp_path, tmp_path / "run", check=False), "1 of 20 images cannot be decoded", last.name)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite(birds, tmp_path):
    train(birds, tmp_path, "--epochs", "1")
    args = json.loads((tmp_path / "erm/args.json").read_text())
    last = torch.load(tmp_path / "erm/last.pt", weights_only=True)
    last["optimizer"]["param_groups"][0]["lr"] = 1e30  # as if --lr had been far too large
    torch.save(last, tmp_path / "erm/last.pt")
    before = (tmp_path / "erm/last.pt").read_bytes()
    process = train(birds, tmp_path, "--epochs", "3", "--resume", check=False)
    assert_refused(process, "training diverged in epoch 2", "last.pt holds epoch 1", "smaller --lr")
    assert (tmp_path / "erm/last.pt").read_bytes() == before and args["args"]["epochs"] == 1


def test_interrupt_says_how_to_go_on(birds, tmp_path):
    options = [sys.executable, "train_erm.py", "--data", str(birds), "--cache", str(birds / "cache"), *SMALL, "--epochs", "500", "--run", str(tmp_path)]
    process = subprocess.Popen(options, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"},
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell's background jobs ignore it
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate()
    assert process.returncode == 130 and "--resume continues" in err and "Traceback" not in err


# ---- the phenomenon


def test_the_built_in_set_shows_the_gap(tmp_path):
    """A short run with the defaults: minority groups are memorised (training far above test accuracy),
    majority groups are learned (no such gap), and the worst test group is a minority."""
    run_script("train_erm.py", "--run", tmp_path, "--cache", tmp_path / "cache", "--epochs", "12", "--select", "last", "--device", "cpu",
               OMP_NUM_THREADS=str(os.cpu_count()))
    train, test = (read(tmp_path)["splits"][name]["groups"] for name in ("train", "test"))
    gaps = [100 * (a["acc"] - b["acc"]) for a, b in zip(train, test)]
    print("gaps in points:", [round(gap, 1) for gap in gaps])
    assert abs(gaps[0]) < 3 and abs(gaps[3]) < 8
    assert gaps[2] > 5 and gaps[1] + gaps[2] > max(20, 3 * (gaps[0] + gaps[3]))
    assert read(tmp_path)["splits"]["test"]["worst_group"] in (1, 2)
