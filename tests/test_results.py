"""results/compare.py on hand-made runs; the report agrees with numbers.jsonl."""

import json
import re
import shutil

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import common
import finetune_contrastive
import gradcam
import structured_trace
import trace_neurons
from results import compare

from .conftest import ROOT, run_script

DATA = "a/metadata.csv, net"


def report(worst):
    group = {
        "group": 1,
        "name": "kind 1",
        "minority": True,
        "n": 10,
        "correct": 10 * worst,
    }
    return {"groups": [group], "acc_worst": worst, "acc_mean": 0.7, "acc_mean_train_mix": 0.9}


def put(folder, worst=0.5, before=0.2, result=None, start="w", **args):
    """A finished stage as the scripts write it, of fine-tuning unless `result` says otherwise;
    start: the fingerprint of the network that it started from."""
    results = {
        "stage": "finetune",
        "source": "/x/a/metadata.csv",
        "arch": "net",
        "splits": {"train": report(0.9), "val": report(0.1), "test": report(worst)},
        "before": {"test": report(before)},
        "start": "best.pt",
        "start_epoch": 7,
        **(result or {}),
    }
    arguments = {
        "seed": 0,
        "epochs": 5,
        "lr": 2e-4,
        "batch_size": 128,
        "augment": "none",
        "method": "contrastive",
        "criterion": "magnitude",
        "checkpoint": "r/erm/best.pt",
        "device": "cpu",
        **args,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))
    about = {"args": arguments, "inputs": {"start": start}}
    (folder / "args.json").write_text(json.dumps(about))


def put_pair(run, seed, worst, training=None, size=32):
    """ERM of a seed and a fine-tuning of it, as runs that know their ERM training write them.
    training: what the training is known by."""
    training = training or f"training {seed}"
    erm = {"id": training, "settings": {"seed": seed, "size": size}}
    put(run / "erm", worst, result={"stage": "erm", "erm": erm}, seed=seed, size=size)
    put(run / "finetune", worst, result={"erm": erm}, start=f"{training}, epoch 7", seed=seed)


def table(block, *folders):
    """{(data, row): cells} of a block."""
    found, shown = compare.read_runs(folders)
    cells = {}
    for heading, _, rows in compare.tables(block, compare.independent(shown), found):
        for name, *row in rows:
            cells[heading.split(":")[0], name] = row
    return cells


def test_t_quantiles_and_intervals():
    """As published tables of Student's t have them."""
    published = {1: 12.706, 2: 4.303, 4: 2.776, 9: 2.262, 30: 2.042, 60: 2.000, 1000: 1.962}
    for df, quantile in published.items():
        assert compare.t_quantile(df) == pytest.approx(quantile, abs=6e-4)
    # 2.776 * 1.5811 / sqrt(5) = 1.963
    assert compare.with_interval([1, 2, 3, 4, 5]) == "3.0 [1.0, 5.0] (5)"
    assert compare.with_interval([-1.26]) == "-1.3 (1)"
    assert compare.with_interval([]) == "-"
    assert compare.cell([]) == "-"


def test_pairs_by_run_folder_start_and_budget(tmp_path, capsys):
    r0 = tmp_path / "r0"
    r1 = tmp_path / "r1"
    alone = tmp_path / "alone"
    for run, before, erm, tuned in ((r0, 0.2, 0.3, 0.5), (r1, 0.4, 0.5, 0.6)):
        put(run / "finetune", tuned, before)
        put(run / "control", erm, before, method="erm")
        put(run / "other-random", erm, before, criterion="random")
        put(run / "random", erm + 0.1, before, criterion="random")
        put(run / "random-supervised", 0.9, before, method="supervised", criterion="random")
        put(run / "other-lr", 0.9, before, method="erm", lr=1e-3)
        put(run / "other-start", 0.9, before, {"start_epoch": 8}, method="erm")
        put(run / "other-batch", 0.9, before, method="erm", batch_size=64)
        put(run / "other-augment", 0.9, before, method="erm", augment="table1")
        put(run / "other-seed", 0.9, before, method="erm", seed=1)
    put(alone / "finetune", 0.9, 0.8)
    put(alone / "erm", 0.2, result={"stage": "erm"})
    put(r0 / "wider", 0.1, 0.2, prune_fraction=0.1)  # than the random runs are
    put(r0 / "ce", 0.1, 0.2, loss="ce")
    put(r0 / "lam1", 0.1, 0.2, epochs=9)
    put(r0 / "gradient", 0.3, 0.2, epochs=9, criterion="gradient")
    put(r0 / "minority", 0.4, 0.2, epochs=9, criterion="gradient")
    gains = table("differences", r0, r1, alone)
    assert "r1: two runs of criterion random; random is taken" in capsys.readouterr().err
    assert gains[DATA, "finetune"][1:] == [
        "20.0 [-4.8, 44.8] (3)",  # minus before
        "-",  # minus finetune, which it is
        "-",  # minus gradient, which is for runs of that criterion
        "70.0 (1)",  # minus the best epoch of ERM, which `alone` has beside it
        "15.0 [-48.5, 78.5] (2)",  # minus ERM: 20 and 10; 12.706 * 7.07 / sqrt(2) = 63.5
        "5.0 [-58.5, 68.5] (2)",  # minus random
    ]
    assert gains[DATA, "control"][2:] == ["-", "-", "-", "-", "-"]
    assert gains[DATA, "random"][2] == "-5.0 [-68.5, 58.5] (2)"  # minus finetune: -10 and 0
    assert gains[DATA, "lam1"] == ["10.0 (1)", "-10.0 (1)", "-40.0 (1)", "-", "-", "-", "-"]
    assert gains[DATA, "wider"][-2:] == gains[DATA, "ce"][-2:] == ["-20.0 (1)", "-"]
    assert gains[DATA, "gradient"][:4] == ["30.0 (1)", "10.0 (1)", "-20.0 (1)", "-"]
    assert gains[DATA, "minority"][:4] == ["40.0 (1)", "20.0 (1)", "-10.0 (1)", "10.0 (1)"]
    (alone_in_r0,) = table("differences", r0 / "finetune").values()  # its controls lie beside it
    assert alone_in_r0 == ["50.0 (1)", "30.0 (1)", "20.0 (1)", "10.0 (1)"]
    rows = table("wga", r0, r1, alone)
    assert rows[DATA, "before: erm/best.pt"][0].endswith("(5)")  # two starts in r0 and r1
    assert rows[DATA, "ERM, selected epoch"] == ["20.0 (1)", "70.0 (1)", "90.0 (1)"]
    assert table("groups", alone)[DATA, "G1* kind 1"] == ["90.0 (1)", "10.0 (1)", "20.0 (1)"]


def test_csv_files_of_equal_name_stay_apart(tmp_path, capsys):
    for i, source in enumerate(("/x/a/m.csv", "/x/b/m.csv", "/y/b/m.csv", "/y/b/m.csv")):
        put(tmp_path / f"r{i}/finetune", i / 10, result={"source": source}, precision="bf16", lr=i)
    rows = table("wga", *tmp_path.iterdir())
    for source, cell in (("x/a", "0.0 (1)"), ("x/b", "10.0 (1)"), ("y/b", "25.0 +- 7.1 (2)")):
        assert rows[f"{source}/m.csv, net, bf16", "finetune"][0] == cell
    compare.warn_of_differences(compare.read_runs([*tmp_path.iterdir()])[1])
    assert capsys.readouterr().err.endswith("finetune differ in more than the seed: lr\n")


@pytest.mark.parametrize("kind", ["a copy", "the same seed again", "extended and copied"])
def test_what_repeats_a_run_counts_once(tmp_path, capsys, kind):
    put_pair(tmp_path / "r0", 0, 0.4)
    put_pair(tmp_path / "r1", 1, 0.6)
    if kind == "the same seed again":  # with other rounding errors, as on another processor
        put_pair(tmp_path / "r2", 0, 0.41, training="another machine's")
    else:
        shutil.copytree(tmp_path / "r0", tmp_path / "r2")
    if kind == "extended and copied":
        erm = json.loads((tmp_path / "r2/erm/results.json").read_text())
        put(tmp_path / "r2/erm", 0.9, result={**erm, "epochs": 9}, epochs=9)
    rows = table("wga", tmp_path / "r0", tmp_path / "r1", tmp_path / "r2")
    assert rows[DATA, "ERM, selected epoch"][0] == "50.0 +- 14.1 (2)"
    assert rows[DATA, "finetune"][0] == "50.0 +- 14.1 (2)"
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "r2 repeats r0 in erm, finetune" in said


def test_runs_that_do_not_repeat_one_another_count(tmp_path, capsys):
    """Other seeds, other fine-tunings of one ERM training, other networks in one trace, and runs
    that do not say what they come from."""
    put_pair(tmp_path / "r0", 0, 0.4)
    put_pair(tmp_path / "r1", 1, 0.6)
    put(tmp_path / "r0/other", 0.4)
    put(tmp_path / "r1/other", 0.4)
    erm = {"id": "training 0", "settings": {"seed": 0}}
    for i, epoch in enumerate((5, 10)):
        result = {
            "stage": "structured",
            "groups": [],
            "summary": {"random": {"groups": [], "thirds": {"first": 1}}},
            "checkpoint": f"erm/epoch_{epoch:03d}.pt",
            "epoch": epoch,
            "network": f"epoch {epoch}",
            "erm": erm,
        }
        put(tmp_path / f"r{i + 2}/structured", result=result)
    folders = [tmp_path / f"r{i}" for i in range(4)]
    assert table("wga", *folders)[DATA, "finetune"][0] == "50.0 +- 14.1 (2)"
    assert table("wga", *folders)[DATA, "other"][0] == "40.0 +- 0.0 (2)"
    assert table("structured", *folders)[DATA, "random"] == ["100.0 +- 0.0 (2)"]
    assert capsys.readouterr().err == ""
    records = compare.read_runs(folders)[1]
    again = {**records[-1], "run": "r4", "seed": 7}  # the same network, and another draw
    assert compare.independent([*records, again]) == records
    assert "r4 repeats r3 in structured" in capsys.readouterr().err
    assert compare.store_key(again) == compare.store_key({**again, "seed": 8})
    assert compare.store_key(records[0]) != compare.store_key({**records[0], "seed": 8})
    compare.warn_of_differences(records)
    said = "the runs called structured differ in more than the seed: start\n"
    assert capsys.readouterr().err == f"warning: {said}"


def test_settings_of_the_erm_run_are_compared(tmp_path, capsys):
    put_pair(tmp_path / "r0", 0, 0.4, size=32)
    put_pair(tmp_path / "r1", 1, 0.6, size=64)
    shown = [tmp_path / f"r{i}/finetune" for i in range(2)]
    compare.warn_of_differences(compare.read_runs(shown)[1])
    assert capsys.readouterr().err == (
        "warning: the runs called finetune differ in more than the seed: size of ERM\n"
    )


def test_data_are_known_by_their_labels(tmp_path, capsys):
    """One name for those that moved; those that changed in their place are said."""
    for number, (source, labels) in enumerate(
        [("/x/a/metadata.csv", "l1"), ("/y/b/metadata.csv", "l1"), ("/x/a/metadata.csv", "l2")]
    ):
        folder = tmp_path / f"r{number}"
        put(folder / "finetune", result={"source": source}, seed=number)
        about = json.loads((folder / "finetune/args.json").read_text())
        about["inputs"]["labels"] = labels
        (folder / "finetune/args.json").write_text(json.dumps(about))
    runs = [tmp_path / f"r{number}" for number in range(3)]
    assert table("wga", *runs[:2])[DATA, "finetune"][0].endswith("(2)")
    assert "differ" not in capsys.readouterr().err
    _, shown = compare.read_runs([runs[0], runs[2]])
    compare.warn_of_differences(shown)
    assert (
        "the runs called finetune differ in more than the seed: labels" in capsys.readouterr().err
    )
    assert len({compare.store_key(run) for run in shown}) == 2


def test_other_images_of_the_same_labels_are_other_data(tmp_path, capsys):
    """As of one set with and without its backgrounds."""
    for number, source in enumerate(("/x/a/metadata.csv", "/x/grey/metadata.csv")):
        folder = tmp_path / f"r{number}/finetune"
        erm = {"id": f"training {number}", "settings": {"seed": 0}}
        result = {"source": source, "erm": erm}
        put(folder, 0.2 + number / 10, result=result, start=f"training {number}")
        about = json.loads((folder / "args.json").read_text())
        about["inputs"].update(labels="l", images=f"i{number}")
        (folder / "args.json").write_text(json.dumps(about))
    rows = table("wga", tmp_path / "r0", tmp_path / "r1")
    assert rows[DATA, "finetune"][0] == "20.0 (1)"
    assert rows["grey/metadata.csv, net", "finetune"][0] == "30.0 (1)"
    assert capsys.readouterr().err == ""


def test_a_setting_that_an_older_run_did_not_know_is_its_default(tmp_path, capsys):
    put(tmp_path / "r0/finetune")  # says nothing of views and precision
    put(tmp_path / "r1/finetune", views="two", precision="fp32", seed=1)
    put(tmp_path / "r2/finetune", views="one", seed=2)
    compare.warn_of_differences(compare.read_runs([tmp_path / "r0", tmp_path / "r1"])[1])
    assert capsys.readouterr().err == ""
    compare.warn_of_differences(compare.read_runs([tmp_path / "r0", tmp_path / "r2"])[1])
    assert "finetune differ in more than the seed: views\n" in capsys.readouterr().err


def test_rows_of_grad_cam_that_are_differences(capsys):
    """By the names of the networks, which may hold a dash."""
    names = ["erm", "lr 1 - big", "lr 1 - big - erm", "gaussian"]
    rows = []
    for number, name in enumerate(names):
        rows.append({"model": name, "group": 1, "minority": True, "mass": number / 10})
    result = {"networks": {"erm": "a", "lr 1 - big": "b"}, "focus": rows}
    for row in rows:
        row["pointing"] = None
    assert [*compare.gradcam_cells(result)] == [("mass, lr 1 - big - erm", "G1*", [20.0])]


def test_layers_by_hand():
    """Shares in %, means of the minorities, and what a criterion has more than random neurons."""
    summary = {}
    for criterion, mean in (("gradient", -4.0), ("random", -1.0)):
        summary[criterion] = {
            "groups": [{"mean": 9.0, "largest": 8.0}, {"mean": mean, "largest": 7.0}],
            "thirds": {"first": -mean / 10},
        }
    groups = [{"group": 0, "minority": False}, {"group": 1, "minority": True}]
    result = {"stage": "structured", "groups": groups, "summary": summary}
    cells = {(line, column): value for line, column, (value,) in compare.cells_of(result)}
    assert cells == {
        ("gradient", "first third, %"): 40,
        ("gradient", "G1*, points"): -4,
        ("random", "first third, %"): 10,
        ("random", "G1*, points"): -1,
        ("Control: gradient minus random", "first third, %"): 30,
        ("Control: gradient minus random", "G1*, points"): -3,
    }


def test_ranks_by_hand(tmp_path):
    """2 of the gradient's 50 neurons are in magnitude's upper 5 %: 4 %."""
    result = {
        "stage": "trace",
        "groups": [],
        "changes": [],
        "control": [],
        "ranks": [{"criterion": "gradient", "by": "magnitude", "n": 50, "upper": 2}],
        "checkpoint": "erm/best.pt",
        "epoch": 1,
        "network": "n",
    }
    put(tmp_path / "r/trace", result=result)
    record = compare.make_record(tmp_path / "r/trace/results.json")
    assert record["ranks"] == {"largest gradient in the upper 5 % by magnitude": 4}


def test_folders_that_are_not_ours_and_links(tmp_path, capsys):
    put(tmp_path / "r/erm", 0.4, result={"stage": "erm"})
    put(tmp_path / "elsewhere")
    (tmp_path / "r/finetune").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "r/tool").mkdir()
    (tmp_path / "r/tool/results.json").write_text("{}")
    cells = table("differences", tmp_path / "r/finetune")
    assert cells[DATA, "finetune"][2] == "10.0 (1)"  # minus ERM's best
    assert "r/tool is not of this project" in capsys.readouterr().err
    (tmp_path / "r/results.json").write_text("{}")  # somebody's own
    assert (DATA, "ERM, selected epoch") in table("wga", tmp_path / "r")


def test_stages_under_other_names_and_unfinished_ones(tmp_path, capsys):
    """An ERM run that was renamed would count as another seed, and be what gains are over."""
    put(tmp_path / "r/erm", 0.4, result={"stage": "erm"})
    put(tmp_path / "r/erm-older", 0.9, result={"stage": "erm"})
    put(tmp_path / "r/finetune", 0.5)
    put(tmp_path / "r/lam1")
    (tmp_path / "r/lam1/results.json").unlink()
    assert table("differences", tmp_path / "r")[DATA, "finetune"][2] == "10.0 (1)"
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"warning: {tmp_path}/r/lam1 is unfinished; left out",
        f"warning: {tmp_path}/r/erm-older is a stage erm under another name; left out",
    ]
    rows = table("wga", tmp_path / "r/erm-older")  # asked for by name
    assert rows[DATA, "ERM, selected epoch"][0] == "90.0 (1)"


def test_other_test_images_are_no_pair(tmp_path, capsys):
    for seed in range(2):
        put(tmp_path / f"r{seed}/erm", 0.4, result={"stage": "erm", "test_labels": "all"})
        put(tmp_path / f"r{seed}/finetune", 0.5, result={"test_labels": f"{seed}"}, seed=seed)
    runs = [tmp_path / "r0", tmp_path / "r1"]
    assert len(table("differences", *runs)[DATA, "finetune"]) == 2  # nothing over ERM's best
    compare.warn_of_differences(compare.read_runs(runs)[1])
    assert "finetune differ in more than the seed: test_labels\n" in capsys.readouterr().err


def test_checkpoints_are_known_by_folder_and_file(tmp_path, capsys):
    for seed, stage in enumerate(("erm", "finetune")):
        put(tmp_path / f"r{seed}/two", seed=seed, checkpoint=f"runs/r{seed}/{stage}/best.pt")
    rows = table("wga", tmp_path / "r0", tmp_path / "r1")
    assert (DATA, "before: finetune/best.pt") in rows
    compare.warn_of_differences(compare.read_runs([tmp_path / "r0", tmp_path / "r1"])[1])
    assert "two differ in more than the seed: start\n" in capsys.readouterr().err


def test_a_fine_tuning_of_another_erm_training_is_said(tmp_path, capsys):
    put_pair(tmp_path / "r0", 0, 0.4)
    put_pair(tmp_path / "r1", 1, 0.4)
    compare.read_runs([tmp_path / "r0", tmp_path / "r1"])
    assert capsys.readouterr().err == ""
    erm = {"id": "trained anew", "settings": {"seed": 0, "size": 32}}
    put(tmp_path / "r0/erm", 0.5, result={"stage": "erm", "erm": erm}, size=32)
    compare.read_runs([tmp_path / "r0/finetune", tmp_path / "r1"])
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}/r0/finetune does not come from the network in {tmp_path}/r0/erm; "
        "was ERM run again, or extended, since?\n"
    )


def test_a_stage_of_an_earlier_best_epoch_is_said(tmp_path, capsys):
    """ERM was extended, and another epoch is its best now."""
    for network in ("epoch 1", "epoch 2"):
        put(tmp_path / "r/erm", result={"stage": "erm", "network": network})
        put(tmp_path / "r/finetune", start="epoch 1")
        networks = {"networks": {"erm": "epoch 1", "finetune": "another"}, "focus": []}
        put(tmp_path / "r/gradcam", result={"stage": "gradcam", **networks})
        compare.read_runs([tmp_path / "r"])
        said = capsys.readouterr().err
        expected = ["finetune", "gradcam"] if network == "epoch 2" else []
        lines = [f"r/{name} does not come from the network in" for name in expected]
        assert said.count("\n") == len(lines)
        assert all(line in said for line in lines)


def test_what_the_scripts_write_is_read(erm_run, tmp_path, monkeypatch, capsys):
    """A run of all five stages, and a copy of it. Figures are not drawn."""
    run = tmp_path / "r0"
    shutil.copytree(erm_run / "run", run)
    for image in (erm_run / "data").rglob("*.jpg"):
        mask = tmp_path / "masks" / image.relative_to(erm_run / "data").with_suffix(".png")
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.repeat(np.uint8([[0, 255]]), [20, 20], 1).repeat(32, 0)).save(mask)
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    for script, flags in (
        (trace_neurons, "--top-k 1 3 --repeats 1 --sigma 0.1 --controls 39"),
        (structured_trace, "--controls 1"),
        (finetune_contrastive, "--epochs 1 --kick-in 2"),
        (gradcam, f"--layer layer1.0.conv2 --n 1 --masks {tmp_path}/masks"),
    ):
        command = f"--run {run} --device cpu --workers 0 {flags}"
        script.main(script.parse_args(command.split()))
    shutil.copytree(run, tmp_path / "r1")
    data = "data/metadata.csv, test_resnet"

    capsys.readouterr()
    compare.main(compare.parse_args([str(run), f"--figure={tmp_path}/f.png"]))
    out, err = capsys.readouterr()
    assert err == ""
    assert "Matrix: gradient of G3" in out
    (row,) = table("wga", run / "erm").values()
    results = common.read_json(run / "erm/results.json")
    assert row[0] == f"{100 * results['splits']['test']['acc_worst']:.1f} (1)"
    assert (data, "before: erm/epoch_002.pt") in table("wga", run)
    rows = table("trace", run)
    changes = common.read_json(run / "trace/results.json")["changes"]
    (change,) = trace_neurons.pick(
        changes, criterion="gradient", modification="zero", k=3, split="test", selected_by="own"
    )
    expected = [f"{change['points'][j]:+.1f} (1)" for j in "0123"]
    assert rows[f"{data}, channels", "Table 13: gradient zero top 3, test images"] == expected
    assert len(table("gradcam", run)) == 2
    assert len(table("structured", run)) == 5

    capsys.readouterr()
    _, shown = compare.read_runs([run, tmp_path / "r1"])
    assert len(compare.independent(shown)) == 5
    assert len({record["labels"] for record in shown} - {None}) == 1
    said = "r1 repeats r0 in erm, finetune, gradcam, structured, trace (a copy, or"
    assert said in capsys.readouterr().err


def test_claims_by_hand():
    """Each quantity has the sign and the partner that its row says."""
    run = {
        "stage": "erm",
        "groups": ["G0 a", "G1* b"],
        "reports": {
            "train": {"n": [10, 10], "correct": [10, 9]},
            "test": {"n": [10, 10], "correct": [9, 5]},
        },
        "lines": {},
    }
    gaps = dict(compare.claims_of(run))
    assert gaps["1: training minus test, G0"] == pytest.approx(10)
    assert gaps["1: training minus test, G1*"] == pytest.approx(40)
    columns = {"G0": [-1.0, -1], "G1*": [-8.0, -3]}
    lines = {
        "Matrix: gradient of G0": {"G0": [-2.0, -1], "G1*": [-99.0, -9]},
        "Matrix: gradient of G1": {"G0": [-99.0, -9], "G1*": [-7.0, -3]},
        "Matrix: gradient of G1, test images": {"G0": [-99.0, -9], "G1*": [-3.0, -3]},
        "Matrix: magnitude": columns,
        "Matrix: magnitude, test images": {"G1*": [-10.0, -3]},
        "Control: gradient minus random ones of the same layers": {"G1*": [-5.0]},
        "Control: gradient minus random ones of all layers": {"G1*": [-99.0]},
        "Control: gradient minus random": {"G1*, points": [-0.5], "first third, %": [99.0]},
        "gradient": {"first third, %": [60.0], "last third, %": [99.0], "G1*, points": [-99.0]},
        "mass, finetune - erm": {"G0": [99.0], "G1*": [2.0]},
        "mass, erm-continued - erm": {"G1*": [3.0]},
    }
    ranks = {"largest gradient in the upper 5 % by magnitude": 4.0}
    run = {"stage": "trace", "lines": lines, "ranks": ranks}
    assert dict(compare.claims_of(run)) == {
        "2: largest gradient zeroed, G1*": -7,
        "2: minus random ones of the same layers zeroed, G1*": -5,
        "3: largest magnitude zeroed, G1*": -8,
        "4: largest gradient zeroed, G0": -2,
        "4: largest magnitude zeroed, G0": -1,
        "5: largest gradient zeroed, training minus test, G1*": -4,
        "5: largest magnitude zeroed, training minus test, G1*": 2,
        "6: largest gradient in the upper 5 % by magnitude, %": 4,
        "7: first third's share of the change, gradient, %": 60,
        "8: largest gradient of a layer minus random ones, G1*, points": -0.5,
        "12: mass on the object, minus ERM continued, G1*": -1,
    }


def changes_of(criteria, groups=4):
    """What stage 2 says of every modification that it makes with its default flags."""
    changes = []

    def add(selected_by, criterion, modification, k, split, sigma=""):
        number = len(changes)
        changes.append(
            {
                "criterion": criterion,
                "modification": modification,
                "sigma": sigma,
                "k": k,
                "split": split,
                "selected_by": selected_by,
                "points": {str(j): number + j / 10 for j in range(groups)},
                "images": {str(j): -1.0 for j in range(groups)},
            }
        )

    for split in ("train", "test"):
        for criterion, own_sets in criteria.items():
            for k in (1, 2, 3, 5, 10):
                for by in ["own", *(range(groups) if own_sets else [])]:
                    add(by, criterion, "zero", k, split)
            for how in ("random-init", "random-noise"):
                for sigma in (0.005, 0.01, 0.02):
                    for k in (1, 2, 3):
                        if split == "train" or (own_sets and how == "random-noise"):
                            add("own", criterion, how, k, split, sigma)
    return changes


def test_lines_of_a_trace_are_named_as_ever():
    """Every line that a run of an earlier version has in numbers.jsonl, and no other."""
    result = {
        "stage": "trace",
        "groups": [{"group": j, "minority": j in (1, 2)} for j in range(4)],
        "changes": changes_of({"magnitude": False, "gradient": True}),
        "control": [],
    }
    lines = {}
    for line, column, (points, _) in compare.cells_of(result):
        lines.setdefault(line, {})[column] = points
    records = compare.read_store(ROOT / "results/numbers.jsonl")
    older = next(run for run in records if run["stage"] == "trace" and run["run"] == "birds0")
    assert set(lines) == {line for line in older["lines"] if not line.startswith("Control")}

    def of(**wanted):
        (number,) = (i for i, row in enumerate(result["changes"]) if wanted.items() <= row.items())
        return dict(
            zip(older["lines"]["Matrix: magnitude"], number + np.arange(4) / 10, strict=True)
        )

    zero = {"modification": "zero", "sigma": "", "k": 3}
    noise = {"modification": "random-noise", "k": 2, "selected_by": "own"}
    cases = {
        "Table 3: magnitude zero top 10": of(
            **{**zero, "k": 10}, criterion="magnitude", split="train"
        ),
        "Table 13: gradient zero top 3, test images": of(
            **zero, criterion="gradient", split="test", selected_by="own"
        ),
        "Table 13: gradient random-noise top 2 sigma 0.02": of(
            **noise, criterion="gradient", split="train", sigma=0.02
        ),
        "Table 14: Figure 5, magnitude random-noise top 2 sigma 0.005": of(
            **noise, criterion="magnitude", sigma=0.005
        ),
        "Matrix: magnitude, test images": of(**zero, criterion="magnitude", split="test"),
        "Matrix: gradient of G2": of(**zero, criterion="gradient", split="train", selected_by=2),
    }
    for line, expected in cases.items():
        assert lines[line] == expected, line
    # A criterion that the paper does not have
    more = changes_of({"product": True})
    names = [line for line, _ in compare.trace_lines(more, 3)]
    assert "Matrix: product of G3" in names
    assert "Not in the paper: product random-noise top 1 sigma 0.01, test images" in names


def test_traces_are_averaged_where_they_are_alike(tmp_path):
    test = {
        "criterion": "gradient",
        "group": 1,
        "random": "all layers",
        "mean": -1,
        "observed": -4,
    }
    for run, points, unit in (("r0", -10, "channel"), ("r1", -20, "channel"), ("r2", 0, "weight")):
        change = {
            "criterion": "magnitude",
            "modification": "zero",
            "sigma": "",
            "k": 1,
            "split": "train",
            "selected_by": "own",
            "points": {"0": points},  # of group 1 there is no image
            "images": {"0": 0},
        }
        result = {
            "stage": "trace",
            "groups": [{"group": 0, "minority": False}, {"group": 1, "minority": True}],
            "control": [test],
            "unit": unit,
            "changes": [change],
        }
        put(tmp_path / run / "trace", result=result)
    rows = table("trace", *tmp_path.iterdir())
    channels = f"{DATA}, channels"
    assert rows[channels, "Table 3: magnitude zero top 1"] == ["-15.0 +- 7.1 (2)", "-"]
    row = "Control: random ones of all layers in place of gradient"
    assert rows[channels, row] == ["-", "-1.0 [-1.0, -1.0] (2)"]
    row = "Control: gradient minus random ones of all layers"
    assert rows[channels, row] == ["-", "-3.0 [-3.0, -3.0] (2)"]


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """numbers.jsonl and the page of two runs, one of which was added twice, and the command."""
    monkeypatch.setattr(compare, "HERE", tmp_path)
    (tmp_path / "README.md").write_text("<!-- numbers: wga --><!-- end -->")
    for worst, run in ((0.5, "r1"), (0.6, "r0"), (0.8, "r1")):
        put(tmp_path / run / "finetune", worst)
        command = f"{tmp_path / run} --add --write --figure {tmp_path}/f.svg".split()
        compare.main(compare.parse_args(command))
    return command


def test_add_replaces_and_write_makes_the_page(kept, tmp_path, capsys):
    store = tmp_path / "numbers.jsonl"
    records = compare.read_store(store)
    found = [(x["run"], x["reports"]["test"]["acc_worst"]) for x in records]
    assert found == [("r0", 0.6), ("r1", 0.8)]
    assert str(tmp_path) not in store.read_text()
    assert "| finetune | 70.0 +- 14.1 (2) |" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "f.svg").stat().st_size > 5000
    assert "14.1" not in capsys.readouterr().out  # a single run was shown each time
    page = (tmp_path / "README.md").read_text()
    compare.main(compare.parse_args(["--write"]))
    assert (tmp_path / "README.md").read_text() == page


def test_the_store_keeps_experiments_apart(kept, tmp_path):
    """Folders of one name, with other settings of ERM: four more lines, and each fine-tuning is
    compared with its own ERM."""
    for experiment, size, worst in (("a", 32, 0.2), ("b", 64, 0.6)):
        run = tmp_path / experiment / "r9"
        put_pair(run, 0, worst, training=experiment, size=size)
        compare.main(compare.parse_args([str(run), "--add", *kept[-2:]]))
    records = [x for x in compare.read_store(tmp_path / "numbers.jsonl") if x["run"] == "r9"]
    assert len(records) == 4
    gains = [*compare.differences(records, records)]
    assert [value for *_, column, value in gains if column == "minus ERM's best"] == [0, 0]


def test_figure_6_by_hand(monkeypatch, tmp_path):
    """Bars before and after, in this order, and a line at the mean of ERM's best epoch."""
    written = {}
    monkeypatch.setattr(common, "write", lambda _, files: written.update(files))
    about = {"source": "birds", "arch": "net", "settings": {}}
    reports = {"before": {"acc_worst": 0.2}, "test": {"acc_worst": 0.5}}
    records = [{**about, "stage": "finetune", "name": "finetune", "reports": reports}]
    for accuracy in (0.6, 0.7):
        reports = {"test": {"acc_worst": accuracy}}
        records.append({**about, "stage": "erm", "name": "erm", "reports": reports})
    compare.plot(records, tmp_path / "f.png")
    (ax,) = written["f.png"].axes
    (line,) = [line for line in ax.lines if line.get_label() == "ERM's best epoch"]
    assert line.get_ydata() == pytest.approx([65, 65])
    bars = [bars for bars in ax.containers if hasattr(bars, "patches")]  # and not whiskers
    assert [(bar.get_label(), bar[0].get_height()) for bar in bars] == [
        ("before", 20),
        ("after", 50),
    ]
    assert bars[0][0].get_x() < bars[1][0].get_x()


def test_the_figure_of_gains(monkeypatch):
    """Table 12's fine-tunings over ERM continued alone: seeds, mean, interval."""
    found = [
        ("birds, net", "finetune", "minus ERM continued", 2),
        ("birds, net", "finetune", "minus ERM continued", 4),
        ("birds, net", "finetune", "minus before", 99),
        ("birds, net", "lam1", "minus ERM continued", 99),
        ("faces, net", "random", "minus ERM continued", -1),
    ]
    monkeypatch.setattr(compare, "differences", lambda *_: found)
    birds, faces = compare.plot_gains([]).axes
    assert (birds.get_title("left"), faces.get_title("left")) == ("birds, net", "faces, net")
    seeds, mean, line, _ = birds.lines
    assert [*seeds.get_xdata()] == [2, 4]
    assert mean.get_xdata() == 3
    assert line.get_xdata() == pytest.approx((3 - 12.7062, 3 + 12.7062))  # sd / sqrt(n) is 1
    assert [tick.get_text() for tick in birds.get_yticklabels()] == [
        "largest magnitude masked (n = 2)"
    ]
    seed, mean, _ = faces.lines
    assert [*seed.get_xdata()] == [-1]
    assert mean.get_xdata() == -1


@pytest.mark.parametrize(
    "path,old,new",
    [
        ("README.md", "<!-- end -->", ""),
        ("README.md", "numbers: wga", "numbers: no"),
        ("README.md", "numbers: wga", "numbers: wga (x"),
        ("numbers.jsonl", '{"run": "r1"', '[{"run": "r1"'),
        ("r1/finetune/results.json", "0.8", "NaN"),
        ("r1/finetune/results.json", "0.8", '"0.8"'),
        ("r1/finetune/results.json", '"net"', "1"),
        ("r1/finetune/results.json", "finetune", "cooking"),
        ("r1/finetune/results.json", "groups", "x"),
    ],
)
def test_bad_files_are_named(kept, tmp_path, path, old, new):
    text = (tmp_path / path).read_text()
    assert old in text
    (tmp_path / path).write_text(text.replace(old, new))
    with pytest.raises(common.BadInput, match=path):
        compare.main(compare.parse_args(kept))


def test_refusals_are_one_line(tmp_path):
    done = run_script(ROOT / "results/compare.py", "no", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr == "compare.py: error: no: no such folder\n"
    with pytest.raises(common.BadInput, match="no finished run there"):
        compare.main(compare.parse_args([str(tmp_path)]))


def test_page_and_numbers_agree():
    """What --write would write stands there already."""
    path = ROOT / "results/README.md"
    records = compare.independent(compare.read_store(path.with_name("numbers.jsonl")))
    text = path.read_text()
    assert records
    assert compare.with_tables(path, records) == text
    assert "/tmp/" not in text


def cells_of_page(table, columns):
    """{row: cells} of a table in Markdown that has these columns."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert rows[0][1:] == columns
    return {name: cells for name, *cells in rows[2:]}


def test_front_page_and_numbers_agree():
    """Every measured cell of the front page's two tables."""
    data = {
        "built-in set": "birds/metadata.csv, resnet10",
        "real birds, CNN": "birds50/metadata.csv, tf_efficientnet_lite0",
        "real birds, ViT": "birds50/metadata.csv, vit_tiny_patch16_224",
        "faces, CNN": "celeba10k/list_attr_celeba.txt, tf_efficientnet_lite0",
        "faces, ViT": "celeba10k/list_attr_celeba.txt, vit_tiny_patch16_224",
    }
    rows = {
        "ERM (ordinary training), best epoch": "ERM, selected epoch",
        "ERM continued from the start of the method": "erm-continued",
        "the method (largest magnitude masked)": "finetune",
        "the method with the largest gradient masked": "gradient",
        "random neurons masked instead": "random",
    }
    gains = {
        "largest magnitude, minus ERM's best epoch": "9: largest magnitude masked, {}",
        "largest gradient, minus ERM's best epoch": "9: largest gradient masked, {}",
        "largest magnitude, minus ERM continued": "9: largest magnitude masked, {}",
        "largest gradient, minus ERM continued": "9: largest gradient masked, {}",
        "largest magnitude, minus random neurons": "10: largest magnitude {} masked",
        "largest gradient, minus random neurons": "10: largest gradient {} masked",
    }
    records = compare.independent(compare.read_store(ROOT / "results/numbers.jsonl"))
    accuracies = {}
    for heading, header, lines in compare.tables("wga", records, records):
        assert header[1] == "worst group"
        for row, worst, *_ in lines:
            accuracies.setdefault(row, {})[heading.partition(":")[0]] = worst
    claims = {}
    ((_, header, lines),) = compare.tables("claims", records, records)
    for row, *cells in lines:
        claims[row] = dict(zip(header[1:], cells, strict=True))

    page = (ROOT / "README.md").read_text().split("## What came out")[1].split("\n## ")[0]
    first, second = re.findall(r"(?m)^\| .*\n(?:\|.*\n)+", page)
    found = cells_of_page(first, [*data])
    for row, name in rows.items():
        assert found[row] == [accuracies[name][of] for of in data.values()]
    found = cells_of_page(second, [*data])
    assert [*found] == [*gains]
    for row, name in gains.items():
        measured = claims[name.format(row.partition(", ")[2])]
        assert found[row] == [measured[of].rpartition(" ")[0] for of in data.values()]
