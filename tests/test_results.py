"""results/compare.py on hand-made runs; the report agrees with numbers.jsonl."""

import json

import pytest

import common
from results import compare

from .conftest import ROOT, run_script

ARGS = {"seed": 0, "epochs": 5, "lr": 2e-4, "batch_size": 128, "augment": "none", "method": "new"}
DATA = "a/metadata.csv, net"


def report(worst):
    group = {"group": 1, "name": "kind 1", "minority": True, "n": 10, "correct": 10 * worst}
    return {"groups": [group], "acc_worst": worst, "acc_mean": 0.7, "acc_mean_train_mix": 0.9}


def put(folder, worst=0.5, before=0.2, result=None, **args):
    """A finished stage as the scripts write it, of fine-tuning unless `result` says otherwise."""
    splits = {"train": report(0.9), "val": report(0.1), "test": report(worst)}
    whole = {"stage": "finetune", "source": "/x/a/metadata.csv", "arch": "net", "splits": splits}
    whole |= {"before": {"test": report(before)}, "start": "best.pt", "start_epoch": 7}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(whole | (result or {})))
    (folder / "args.json").write_text(json.dumps({"args": ARGS | args, "inputs": {"start": "w"}}))


def table(block, *folders):
    """{(data, row): cells} of a block."""
    (found, shown), cells = compare.read_runs(folders), {}
    for heading, _, rows in compare.tables(block, shown, found):
        cells |= {(heading.split(":")[0], name): row for name, *row in rows}
    return cells


def test_t_quantiles_and_intervals():
    for df, value in ((1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (1000, 1.962)):
        assert abs(compare.t_quantile(df) - value) < 6e-4
    assert compare.with_interval([-1.26]) == "-1.3 (1)" and compare.cell([]) == "-"


def test_pairs_by_run_folder_start_and_budget(tmp_path, capsys):
    r0, r1, alone = (tmp_path / name for name in ("r0", "r1", "alone"))
    for run, before, erm, tuned in ((r0, 0.2, 0.3, 0.5), (r1, 0.4, 0.5, 0.6)):
        put(run / "finetune", tuned, before)
        put(run / "control", erm, before, method="erm")
        put(run / "other-random", erm, before, criterion="random")
        put(run / "random", erm + 0.1, before, criterion="random")
        put(run / "other-lr", 0.9, before, method="erm", lr=1e-3)
        put(run / "other-start", 0.9, before, {"start_epoch": 8}, method="erm")
    put(alone / "finetune", 0.9, 0.8)
    put(alone / "erm", 0.2, result={"stage": "erm"})
    gains, rows = (table(block, r0, r1, alone) for block in ("differences", "wga"))
    assert "r1: two runs of criterion random; random is taken" in capsys.readouterr().err
    minus_erm = "+15.0 +- 7.1 (2) [-48.5, +78.5]"  # 20 and 10; 12.706 * 7.07 / sqrt(2) = 63.5
    minus_random = "+5.0 +- 7.1 (2) [-58.5, +68.5]"
    minus_before = "+20.0 +- 10.0 (3) [-4.8, +44.8]"
    assert gains[DATA, "finetune"][1:] == [minus_before, minus_erm, minus_random]
    assert gains[DATA, "control"][2:] == ["-", "-"]  # below, the controls were not asked for
    (alone_in_r0,) = table("differences", r0 / "finetune").values()
    assert alone_in_r0 == ["50.0 (1)", "+30.0 (1)", "+20.0 (1)", "+10.0 (1)"]
    assert rows[DATA, "before: best.pt"][0].endswith("(5)")  # two starts in r0 and r1
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


def test_traces_are_averaged_where_they_are_alike(tmp_path):
    groups = [{"group": 0, "minority": False}, {"group": 1, "minority": True}]
    line = {"table": "Table 3", "line": "top 1", "split": "train", "images": [0, None]}
    null = {"group": 1, "random": "all layers", "mean": -1, "observed": -4}
    trace = {"stage": "trace", "groups": groups, "control": {"gradient": {"tests": [null]}}}
    for run, points, unit in (("r0", -10, "channel"), ("r1", -20, "channel"), ("r2", 0, "weight")):
        tables = [{**line, "points": [points, None]}]
        put(tmp_path / run / "trace", result={**trace, "unit": unit, "tables": tables})
    rows = table("trace", *tmp_path.iterdir())
    assert rows[f"{DATA}, channels", "Table 3: top 1"] == ["-15.0 +- 7.1 (2)", "-"]
    row = "Control: random ones of all layers in place of gradient"
    assert rows[f"{DATA}, channels", row] == ["-", "-1.0 +- 0.0 (2) [-1.0, -1.0]"]
    row = "Control: gradient minus random ones of all layers"
    assert rows[f"{DATA}, channels", row] == ["-", "-3.0 +- 0.0 (2) [-3.0, -3.0]"]


def test_add_replaces_and_bad_files_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "HERE", tmp_path)
    store, page = tmp_path / "numbers.jsonl", tmp_path / "README.md"
    page.write_text("<!-- numbers: wga --><!-- end -->")
    for worst, run in ((0.5, "r1"), (0.6, "r0"), (0.8, "r1")):
        put(tmp_path / run / "finetune", worst)
        command = f"{tmp_path / run} --add --write --figure {tmp_path}/f.svg".split()
        compare.main(compare.parse_args(command))
    found = [(x["run"], x["reports"]["test"]["acc_worst"]) for x in compare.read_store(store)]
    assert found == [("r0", 0.6), ("r1", 0.8)] and str(tmp_path) not in store.read_text()
    assert "| finetune | 70.0 +- 14.1 (2) |" in page.read_text()
    assert (tmp_path / "f.svg").stat().st_size > 5000 and "14.1" not in capsys.readouterr().out
    bad = [("README.md", f"<!-- numbers: {rest}") for rest in ("wga -->", "no --><!-- end -->")]
    bad.append(("numbers.jsonl line 3", f"{store.read_text()}[]"))
    whole = (tmp_path / "r1/finetune/results.json").read_text()
    for old, new in (("0.8", "NaN"), ("0.8", '"0.8"'), ("finetune", "cooking"), ("groups", "x")):
        bad.append(("r1/finetune/results.json", whole.replace(old, new)))
    for where, text in bad:
        (tmp_path / where.split()[0]).write_text(text)
        with pytest.raises(common.BadInput, match=where):
            compare.main(compare.parse_args(command))


def test_refusals_are_one_line(tmp_path):
    done = run_script(ROOT / "results/compare.py", "no", cwd=tmp_path, check=False)
    assert done.returncode == 2 and done.stderr == "compare.py: error: no: no such folder\n"
    with pytest.raises(common.BadInput, match="no finished run there"):
        compare.main(compare.parse_args([str(tmp_path)]))


def test_page_and_numbers_agree():
    """What --write would write stands there already; 47.83 and 69.64 % are whole images."""
    path = ROOT / "results" / "README.md"
    records, text = compare.read_store(path.with_name("numbers.jsonl")), path.read_text()
    assert records and compare.with_tables(path, records) == text and "/tmp/" not in text
    _, water, land, _ = common.OFFICIAL_COUNTS["waterbirds"][0]  # accuracies of section 2.1
    assert round(100 * 88 / water, 2) == 47.83 and round(100 * 39 / land, 2) == 69.64
