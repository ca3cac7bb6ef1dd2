"""results/compare.py on hand-made runs; the report agrees with numbers.jsonl."""

import importlib.util
import json
import re
import shutil

import pytest

import common

from .conftest import ROOT, assert_refused, run_script

PAGE = (ROOT / "results" / "README.md").read_text()
BUDGET = {"epochs": 5, "lr": 2e-4, "batch_size": 128, "augment": "none"}
CSV = "/x/a/metadata.csv"


def load(folder=ROOT / "results"):
    spec = importlib.util.spec_from_file_location("compare", folder / "compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compare = load()


def report(worst):
    groups = []
    for j, acc in enumerate((0.9, worst)):
        row = {"group": j, "name": f"kind {j}", "minority": j == 1}
        groups.append({**row, "n": 10, "correct": round(10 * acc)})
    return {"groups": groups, "acc_worst": worst, "acc_mean": 0.7, "acc_mean_train_mix": 0.9}


def put(folder, stage, args=None, **result):
    """A finished stage, as the scripts write it."""
    folder.mkdir(parents=True)
    result = {"stage": stage, "source": CSV, "arch": "net", **result}
    about = {"args": {"seed": 0, **(args or {})}, "inputs": {"start": "abc"}, "commit": None}
    (folder / "results.json").write_text(json.dumps(result))
    (folder / "args.json").write_text(json.dumps(about))


def put_erm(folder, worst, **result):
    put(folder, "erm", splits=dict.fromkeys(common.SPLITS, report(worst)), **result)


def put_tuned(folder, worst, before, method="contrastive", source=CSV, start=7, **args):
    splits = dict.fromkeys(common.SPLITS, report(worst))
    about = {"start": "best.pt", "start_epoch": start, "before": {"test": report(before)}}
    args = {**BUDGET, "method": method, **args}
    put(folder, "finetune", args, source=source, splits=splits, **about)


def table(block, *folders):
    """{(data, row): {column: cell}} of a block."""
    (found, shown), cells = compare.read_runs(folders), {}
    for heading, header, rows in compare.tables(block, shown, found):
        for name, *row in rows:
            cells[heading.split(":")[0], name] = dict(zip(header[1:], row))
    return cells


def test_t_quantiles_and_intervals():
    for df, value in ((1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (1000, 1.962)):
        assert abs(compare.t_quantile(df) - value) < 6e-4
    assert compare.with_interval([1, 2, 3]) == "+2.0 +- 1.0 (3) [-0.5, +4.5]"
    assert compare.with_interval([-1.26]) == "-1.3 (1)" and compare.cell([]) == "-"


def test_pairs_by_run_folder_start_and_budget(tmp_path, capsys):
    for run, (before, erm, tuned) in {"r0": (0.2, 0.3, 0.5), "r1": (0.4, 0.5, 0.6)}.items():
        put_erm(tmp_path / run / "erm", before)
        put_tuned(tmp_path / run / "finetune", tuned, before)
        put_tuned(tmp_path / run / "control", erm, before, "erm")
        put_tuned(tmp_path / run / "other-lr", 0.9, before, "erm", lr=1e-3)
        put_tuned(tmp_path / run / "other-start", 0.9, before, "erm", start=8)
    put_tuned(tmp_path / "alone" / "finetune", 0.9, 0.8)
    data, runs = "a/metadata.csv, net", [tmp_path / name for name in ("r0", "r1", "alone")]
    gains = table("differences", *runs)
    assert gains[data, "finetune"]["minus before"].startswith("+20.0 +- 10.0 (3) [-4.8, +44.8]")
    minus_erm = "+15.0 +- 7.1 (2) [-48.5, +78.5]"  # 20 and 10; 12.706 * 7.07 / sqrt(2) = 63.5
    assert gains[data, "finetune"]["minus ERM continued"] == minus_erm
    assert gains[data, "control"]["minus ERM continued"] == "-"
    rows = table("wga", *runs)
    erm = {"worst group": "30.0 +- 14.1 (2)", "mean": "70.0 +- 0.0 (2)"}
    erm["mean, groups in training mix"] = "90.0 +- 0.0 (2)"
    assert rows[data, "ERM, selected epoch"] == erm
    assert table("groups", *runs)[data, "G1* kind 1"]["test"] == "30.0 +- 14.1 (2)"
    assert rows[data, "before: best.pt"]["worst group"].endswith("(5)")  # two starts in r0 and r1
    one = [tmp_path / run / "finetune" for run in ("r0", "r1")]  # the control was not asked for
    assert table("differences", *one)[data, "finetune"]["minus ERM continued"] == minus_erm
    assert [row for _, row in table("wga", *one)] == ["before: best.pt", "finetune"]
    assert not capsys.readouterr().err


def test_csv_files_of_equal_name_stay_apart(tmp_path, capsys):
    for i, source in enumerate(("/x/a/metadata.csv", "/x/b/metadata.csv", "/y/b/metadata.csv")):
        put_tuned(tmp_path / f"r{i}" / "finetune", i / 10, 0, source=source, lam=i)
    rows = table("wga", *tmp_path.iterdir())
    found = {data: row["worst group"] for (data, name), row in rows.items() if name == "finetune"}
    names = [f"{name}/metadata.csv, net" for name in ("x/a", "x/b", "y/b")]
    assert found == dict(zip(names, ("0.0 (1)", "10.0 (1)", "20.0 (1)")))
    assert not capsys.readouterr().err
    put_tuned(tmp_path / "r3" / "finetune", 0.5, 0.2, source=source, lam=9)  # as that of r2
    compare.warn_of_differences(compare.read_runs([*tmp_path.iterdir()])[1])
    told = "warning: the runs called finetune differ in more than the seed: lam\n"
    assert capsys.readouterr().err == told


def test_traces_are_averaged_where_they_are_alike(tmp_path):
    groups = [{"group": 0, "minority": False}, {"group": 1, "minority": True}]
    control = {"gradient": {"tests": [{"group": 1, "random": "all layers", "mean": -1, "n": 10}]}}
    for run, points, unit in (("r0", -10, "channel"), ("r1", -20, "channel"), ("r2", 0, "weight")):
        line = {"table": "Table 3", "line": "top 1", "split": "train"}
        line |= {"points": [points, None], "images": [points / 10, None]}
        more = {"groups": groups, "tables": [line], "control": control, "unit": unit}
        put(tmp_path / run / "trace", "trace", **more)
    rows = table("trace", *sorted(tmp_path.iterdir()))
    channels, weights = "a/metadata.csv, net, channels", "a/metadata.csv, net, weights"
    assert rows[channels, "Table 3: top 1"] == {"G0": "-15.0 +- 7.1 (2)", "G1*": "-"}
    assert rows[weights, "Table 3: top 1"]["G0"] == "+0.0 (1)"
    null = "Control: random ones of all layers in place of gradient"
    assert rows[channels, null]["G1*"] == "-1.0 +- 0.0 (2)"


def test_damaged_and_foreign_files_are_one_line(tmp_path):
    put_tuned(tmp_path / "r" / "finetune", 0.5, 0.2)
    path = tmp_path / "r" / "finetune" / "results.json"
    whole = path.read_text()
    damaged = [whole[:100], "[]", "{}", "", whole.replace('"acc_worst": 0.5', '"acc_worst": NaN')]
    damaged += [whole.replace("0.5", '"0.5"'), whole.replace('"finetune"', '"cooking"')]
    damaged += [whole.replace('"groups"', '"grupps"'), whole.replace("best.pt", "\x00")]
    for text in damaged:
        path.write_text(text)
        with pytest.raises(common.BadInput, match=r"finetune/results\.json") as error:
            compare.read_runs([tmp_path / "r"])
        assert "\n" not in str(error.value)
    command = ["results/compare.py", "--figure", tmp_path / "f.png"]
    assert_refused(run_script(*command, tmp_path / "r", check=False), "r/finetune/results.json")
    path.write_text(whole)
    path.with_name("args.json").unlink()
    wrong = {"args.json": [f"{tmp_path}/r"], "no such folder": [f"{tmp_path}/no"]}
    wrong |= {"no run folder": ["--add"], "f.doc": ["--write", "--figure", "f.doc"]}
    for words, arguments in {**wrong, "no finished run": [str(tmp_path)]}.items():
        with pytest.raises(common.BadInput, match=words):
            compare.main(compare.parse_args(arguments))


def test_add_replaces_and_a_bad_line_is_named(tmp_path, capsys):
    for name in ("compare.py", "README.md"):
        shutil.copy(ROOT / "results" / name, tmp_path / name)
    copy = load(tmp_path)
    for worst, run in ((0.5, "r0"), (0.6, "r1"), (0.7, "r0")):
        shutil.rmtree(tmp_path / run, ignore_errors=True)
        put_tuned(tmp_path / run / "finetune", worst, 0.2)
        arguments = [tmp_path / run, "--add", "--write", "--figure", tmp_path / "f.svg"]
        copy.main(copy.parse_args(map(str, arguments)))
    store = tmp_path / "numbers.jsonl"
    lines = [json.loads(line) for line in store.read_text().splitlines()]
    found = {line["run"]: line["reports"]["test"]["acc_worst"] for line in lines}
    assert found == {"r0": 0.7, "r1": 0.6} and str(tmp_path) not in store.read_text()
    assert "| finetune | 65.0 +- 7.1 (2) |" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "f.svg").stat().st_size > 5000 and "65.0" not in capsys.readouterr().out
    for bad in ("{", "[]", "null", json.dumps({**lines[0], "reports": {}})):
        store.write_text(f"{json.dumps(lines[0])}\n{bad}\n")
        with pytest.raises(common.BadInput, match=r"numbers\.jsonl line 2"):
            copy.read_store(store)


def test_page_and_numbers_agree(tmp_path):
    """What --write would write stands there already; every flag that is named exists."""
    records = compare.read_store(ROOT / "results" / "numbers.jsonl")
    assert records and compare.with_tables(ROOT / "results" / "README.md", records) == PAGE
    for text in ("<!-- numbers: wga -->", "<!-- numbers: no -->\n<!-- end -->"):
        (tmp_path / "page.md").write_text(text)
        with pytest.raises(common.BadInput, match=r"page\.md"):
            compare.with_tables(tmp_path / "page.md", records)
    assert len(PAGE.splitlines()) <= 600 and "/tmp/" not in PAGE
    files = [*ROOT.glob("*.py"), ROOT / "results/compare.py", ROOT / "tests/torture.py"]
    sources = "".join(path.read_text() for path in files)
    flags = set(re.findall(r"(?<![\w<-])--[a-z][a-z-]*", PAGE))
    assert len(flags) > 20 and all(f'"{flag}"' in sources for flag in flags), flags
