"""Means over finished runs: accuracies, paired differences, traces; Table 12 and Figure 6.

    python results/compare.py runs/wb*                  # every finished stage of every run folder
    python results/compare.py runs/wb*/finetune-erm     # one stage of each
    python results/compare.py runs/wb* --add --write    # into numbers.jsonl and into the report

A cell is the mean over run folders +- the sample standard deviation (n). Gains are paired by run
folder and have the 95 % t-interval of their mean, [low, high] (n), instead. "ERM continued" is the
run of --method erm in the same run folder with the same start, epochs, learning rate, batch size,
augmentation and seed. "random" is that of --criterion random which also has the same fraction and
unit of neurons, views and loss; a run of --criterion none or mixed masks other numbers. "finetune"
is the run of that name in it, whatever its start and epochs; "gradient" likewise, for other runs of
--criterion gradient. A copy of a run, and a run of the same settings and seed as another, count
once. Data are known by their labels and images, wherever they lie.
Tracing: each group under the neurons selected by it; Matrix: every group under every set. Reads
results.json and args.json of the stages; writes Figure 6.
"""

import argparse
import functools
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import finetune_contrastive
import gradcam
import structured_trace
import trace_neurons
import train_erm
from common import BadInput

HERE = Path(__file__).resolve().parent
FIGURE = Path("runs/fig06_compare.png")
STAGES = {
    "erm": train_erm,
    "trace": trace_neurons,
    "structured": structured_trace,
    "finetune": finetune_contrastive,
    "gradcam": gradcam,
}
# The controls of a fine-tuning: a setting, and the other settings that it shares with its control,
# besides start and seed
BUDGET = ("epochs", "lr", "batch_size", "augment")
CONTROLS = {
    "minus ERM continued": ("method", "erm", BUDGET),
    "minus random": (
        "criterion",
        "random",
        (*BUDGET, "prune_fraction", "unit", "views", "loss", "lam", "temperature"),
    ),
}
# Arguments that say where things lie, or leave the numbers alone; of weights the file name counts
PLACES = {*common.NOT_SETTINGS, "before", "after", "masks", "n", "seed"} - {"attributes", "weights"}
ARMS = {  # name of a run: what of Table 12, or its control, it is
    "finetune": "largest magnitude masked",
    "gradient": "largest gradient masked",
    "random": "random neurons masked",
    "none": "nothing masked",
    "supervised": "squared error alone",
}
# Changes that the paper's tables show: how their line's name begins, criterion, modification, and
# what the table has besides the first strength of noise, the few smallest k and training images:
# every "sigma", every "k", "test" images
PAPER_TABLES = (
    ("Table 3: ", "magnitude", "zero", {"k"}),
    ("Table 11: ", "gradient", "zero", set()),
    ("Table 11: ", "gradient", "random-init", {"sigma"}),
    ("Table 13: ", "gradient", "zero", {"test"}),
    ("Table 13: ", "gradient", "random-noise", {"sigma", "test"}),
    ("Table 14: Figure 4, ", "gradient", "random-init", set()),
    ("Table 14: Figure 4, ", "magnitude", "random-init", set()),
    ("Table 14: Figure 5, ", "gradient", "random-noise", set()),
    ("Table 14: Figure 5, ", "magnitude", "random-noise", set()),
)


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "runs",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="run folders (every finished stage in them), or RUN/NAME for one stage",
    )
    p.add_argument(
        "--figure",
        type=Path,
        metavar="FILE",
        help=f"where to draw Figure 6: .png, .pdf or .svg ({FIGURE})",
    )
    p.add_argument(
        "--add",
        action="store_true",
        help="keep what was found in results/numbers.jsonl, in the place of an equal run's line",
    )
    p.add_argument(
        "--write",
        action="store_true",
        help="rewrite the tables of results/README.md, and gains.png, from results/numbers.jsonl; "
        "needs no RUN",
    )
    return p.parse_args(argv)


def main(args):
    store = HERE / "numbers.jsonl"
    page = HERE / "README.md"
    if not args.runs and (args.add or not args.write):
        raise BadInput("no run folder given; name some, such as runs/wb*, or use --write alone")
    if args.figure and args.figure.suffix not in (".png", ".pdf", ".svg"):
        raise BadInput(f"--figure {args.figure}: expected a name that ends in .png, .pdf or .svg")

    if args.add or args.write:
        common.lock(HERE)
    if args.runs:
        found, shown = read_runs(args.runs)
        warn_of_differences(shown)
        shown = independent(shown)
        for block in TABLES:
            for heading, header, rows in tables(block, shown, found):
                common.print_rows(heading, [dict(zip(header, row, strict=True)) for row in rows])
        plot(shown, args.figure or FIGURE)
    if args.add:
        kept = {store_key(record): record for record in [*read_store(store), *shown]}
        ordered = [kept[key] for key in sorted(kept)]
        common.write(HERE, {store.name: ordered})
        print(f"{store} has {len(ordered)} lines")
    if args.write:
        records = read_store(store)
        warn_of_differences(records)
        records = independent(records)
        warn_of_two_controls(records)
        made = {page.name: with_tables(page, records), "gains.png": plot_gains(records)}
        common.write(HERE, made)
        print(f"wrote the tables of {page} and gains.png")
        if args.figure and not args.runs:
            plot(records, args.figure)


# ---- records: what one finished stage is worth, and a line of numbers.jsonl ----


def read_runs(folders):
    """Records of all stages of the run folders (the control of a stage may not have been asked
    for), and of those asked for."""
    runs = {}  # {run folder: {path of results.json: record}}
    shown = {}
    for folder in folders:
        if folder.is_file():  # such as an earlier Figure 6 in runs/*
            continue
        if not folder.is_dir():
            raise BadInput(f"{folder}: no such folder")
        folder = Path(os.path.abspath(folder))
        one_stage = (folder / "args.json").exists()
        run = (folder.parent if one_stage else folder).resolve()
        if run not in runs:
            runs[run] = read_stages(run)
        for path, record in runs[run].items():
            if one_stage:
                wanted = path.parent.name == folder.name
            else:
                wanted = not is_renamed(record)
            if wanted:
                shown[path] = record
    if not shown:
        raise BadInput(f"{folders[0]}: no finished run there (no RUN/NAME/results.json)")
    found = {}
    for of_run in runs.values():
        for path, record in of_run.items():
            if not is_renamed(record):
                found[path] = record
            elif path not in shown:
                common.warn(
                    f"{path.parent} is a stage {record['stage']} under another name; left out"
                )
    warn_of_other_starts(found)
    records = {**found, **shown}.values()
    name_by_labels(records)
    shorten(records, "source", 2)
    shorten(records, "run", 1)
    warn_of_two_controls(found.values())
    return list(found.values()), list(shown.values())


def read_stages(run):
    """Records of all finished stages of a run folder, {path of results.json: record}."""
    records = {}
    for folder in sorted(path for path in run.glob("[!.]*") if path.is_dir()):
        path = folder / "results.json"
        known = (folder / "args.json").exists()
        if path.exists() and known:
            advice = "is it of a finished run of this project? Run its stage again"
            with common.reading(path, advice):
                records[path] = check(make_record(path))
        elif known:
            common.warn(f"{folder} is unfinished; left out")
        elif path.exists():
            common.warn(f"{folder} is not of this project, as no args.json is there; left out")
    if not records:
        common.warn(f"{run}: no finished stage there")
    return records


def is_renamed(record):
    """Whether a stage lies in a folder of another name, such as erm-old. Beside the stage itself
    it would count as a further seed, so it is left out unless it was asked for."""
    return record["stage"] != "finetune" and record["stage"] != record["name"]


def name_by_labels(records):
    """Data that moved keep one name: sources with the same labels and images are called by the
    first."""
    images = {record["source"]: record["images"] for record in records if record.get("images")}
    first = {}
    names = {}
    for record in records:
        if record.get("labels"):
            content = (record["labels"], images.get(record["source"]))
            name = first.setdefault(content, record["source"])
            names.setdefault(record["source"], name)
    for record in records:  # also of the stages that do not know their labels
        record["source"] = names.get(record["source"], record["source"])


def shorten(records, key, length):
    """Give paths the shortest ends, of `length` parts or more, that tell them apart."""
    parts = {record[key]: Path(record[key]).parts for record in records}
    while len({path[-length:] for path in parts.values()}) < len(parts):
        length += 1
    for record in records:
        record[key] = str(Path(*parts[record[key]][-length:]))


def make_record(path):
    """What results.json and args.json of a stage say, as far as it is compared; plain types."""
    result = common.read_json(path)
    recorded = common.read_json(path.with_name("args.json"))
    record = {
        "run": str(path.parents[1]),
        "name": path.parent.name,
        "stage": result["stage"],
        "source": str(Path(result["source"]).resolve()),
        "labels": result.get("labels") or recorded.get("inputs", {}).get("labels"),
        "images": recorded.get("inputs", {}).get("images"),  # of training stages
        "test_labels": result.get("test_labels"),  # likewise
        "arch": result["arch"],
        "unit": result.get("unit") or recorded["args"].get("unit", ""),
        "commit": (recorded.get("commit") or "")[:7],
        "seed": recorded["args"]["seed"],
        "settings": compared(recorded["args"]),
        "reports": {},
        "lines": {},
    }
    erm = result.get("erm")
    if erm and erm["id"]:  # of the ERM training that all comes from; older runs do not say
        record["erm"] = {
            "id": erm["id"],
            "seed": erm["settings"].get("seed"),
            "settings": compared(erm["settings"]),
        }

    # The network that a stage started from: file, epoch, fingerprint
    reports = dict(result.get("splits", {}))
    if record["stage"] == "finetune":
        reports["before"] = result["before"]["test"]
        file = file_of(recorded["args"]["checkpoint"])
        record["start"] = [file, result["start_epoch"], recorded["inputs"]["start"]]
    elif "checkpoint" in result:
        record["start"] = [file_of(result["checkpoint"]), result["epoch"], result["network"]]
    elif "networks" in result:
        record["networks"] = result["networks"]
    elif record["stage"] == "erm":
        record["network"] = result.get("network")  # of its best epoch

    # Counts and accuracies of each split, of training stages; lines of a table, of the others
    for split, report in reports.items():
        groups = report["groups"]
        record["groups"] = [common.long(group) for group in groups]
        record["reports"][split] = {
            **{key: report[key] for key in common.MEANS},
            "n": [group["n"] for group in groups],
            "correct": [group["correct"] for group in groups],
        }
    for share in result.get("ranks", []):
        row = f"largest {share['criterion']} in the upper 5 % by {share['by']}"
        record.setdefault("ranks", {})[row] = round(100 * share["upper"] / share["n"], 3)
    for line, column, values in cells_of(result):
        cells = record["lines"].setdefault(line, {})
        cells[column] = [round(value, 3) for value in values]
    return record


def file_of(checkpoint):
    """What a checkpoint is called wherever its run lies, such as erm/best.pt."""
    return "/".join(Path(checkpoint).parts[-2:])


def compared(args):
    """The arguments in which runs that are averaged should not differ."""
    settings = {}
    for key, value in args.items():
        if key not in PLACES:
            is_path = isinstance(value, str) and os.sep in value
            settings[key] = Path(value).name if is_path else value
    return settings


def cells_of(result):
    """What tracing and Grad-CAM found: (line, column, [points] or [points, images])."""
    cells = {"trace": trace_cells, "structured": structured_cells, "gradcam": gradcam_cells}
    if result["stage"] in cells:
        yield from cells[result["stage"]](result)


def trace_cells(result):
    names = {group["group"]: common.short(group) for group in result["groups"]}
    for line, row in trace_lines(result["changes"], result.get("few", 3)):
        for group, points in row["points"].items():  # of the groups that have images
            yield line, names[int(group)], [points, row["images"][group]]
    for test in result["control"]:
        column = names[test["group"]]
        criterion = test["criterion"]
        others = f"random ones of {test['random']}"
        yield f"Control: {others} in place of {criterion}", column, [test["mean"]]
        more = test["observed"] - test["mean"]
        yield f"Control: {criterion} minus {others}", column, [more]


def trace_lines(changes, few):
    """Name and change of every line: the paper's tables, which but for Table 3 stop at the top
    `few`, then the matrix of all groups under all sets, then what criteria that the paper does not
    have add."""
    own = [row for row in changes if row["selected_by"] == "own"]
    sigmas = [row["sigma"] for row in own if row["sigma"]]
    for table, criterion, modification, has in PAPER_TABLES:
        for row in trace_neurons.pick(own, criterion=criterion, modification=modification):
            if (
                ("sigma" in has or row["sigma"] in ("", *sigmas[:1]))
                and ("k" in has or row["k"] <= few)
                and ("test" in has or row["split"] == "train")
            ):
                yield table + line_name(row), row

    zeroed = [row for row in changes if row["modification"] == "zero"]
    of_groups = {row["criterion"] for row in zeroed if row["selected_by"] != "own"}
    for row in zeroed:
        of_group = row["selected_by"] != "own"
        if row["k"] == few and of_group == (row["criterion"] in of_groups):
            name = row["criterion"]
            if of_group:
                name += f" of G{row['selected_by']}"
            yield f"Matrix: {name}{of_split(row)}", row

    for row in own:
        if row["criterion"] not in ("magnitude", "gradient"):
            yield f"Not in the paper: {line_name(row)}", row


def line_name(row):
    name = f"{row['criterion']} {row['modification']} top {row['k']}"
    if row["sigma"]:
        name += f" sigma {row['sigma']}"
    return name + of_split(row)


def of_split(row):
    return ", test images" if row["split"] == "test" else ""


def structured_cells(result):
    cells = {}
    for criterion, found in result["summary"].items():
        columns = {}
        for third, share in (found["thirds"] or {}).items():
            columns[f"{third} third, %"] = 100 * share
        for group, of_group in zip(result["groups"], found["groups"], strict=True):
            if group["minority"]:
                columns[f"{common.short(group)}, points"] = of_group["mean"]
        cells[criterion] = columns
    for criterion, columns in cells.items():
        for column, value in columns.items():
            yield criterion, column, [value]
            if criterion != "random" and column in cells["random"]:
                more = value - cells["random"][column]
                yield f"Control: {criterion} minus random", column, [more]


def gradcam_cells(result):
    networks = (*result["networks"], "random head", "gaussian")  # the other rows are differences
    for row in result["focus"]:
        for measure in ("mass", "pointing"):
            if row["model"] not in networks and row[measure] is not None:
                yield f"{measure}, {row['model']}", common.short(row), [100 * row[measure]]


def check(record):
    """The record itself. What is missing or odd in it raises here, where its file is known."""
    if record["stage"] not in STAGES:
        raise ValueError(f"stage {record['stage']!r}")
    for key in ("source", "arch", "unit", "run", "name"):
        if not isinstance(record[key], str):
            raise TypeError(f"{key} {record[key]!r} is no text")
    for block in TABLES:
        list(tables(block, [record], [record]))
    for split, report in record["reports"].items():
        for key in common.MEANS:
            if not 0 <= report[key] <= 1:
                raise ValueError(f"{key} of {split}: {report[key]}")
    return record


def store_key(record):
    """Where a record stands in numbers.jsonl; of those at one place the later stays."""
    keys = ("source", "labels", "images", "arch", "run", "stage", "name", "settings")
    erm = record.get("erm", {}).get("settings")
    start = record.get("start", [None])[0]
    known = [*(record.get(key) for key in keys), training_seed(record), erm, start]
    return json.dumps(known, sort_keys=True)


def training_seed(record):
    """The seed of a training stage. None for tracing and Grad-CAM, of which another draw is no
    further network."""
    return record["seed"] if record["stage"] in ("erm", "finetune") else None


def read_store(path):
    records = []
    lines = path.read_text().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        advice = "mend it, or delete it and --add its run again"
        with common.reading(f"{path} line {number}", advice):
            records.append(check(json.loads(line)))
    return records


# ---- what runs that are averaged should be: alike, independent, of the network beside them ----


@functools.cache
def default_settings(stage):
    """What a run of a stage does whose version did not know a setting; without those whose default
    depends on the data."""
    settings = compared(common.plain(STAGES[stage].parse_args([])))
    return {key: value for key, value in settings.items() if value is not None}


def warn_of_differences(records):
    """Runs of one name are averaged, so they should differ in the seed alone; so should the ERM
    runs from which they started."""
    named = {}
    for run in records:
        settings = {**default_settings(run["stage"]), **run["settings"]}
        settings.pop("unit", None)  # runs of different units are not averaged
        if "start" in run:
            settings["start"] = run["start"][0]
        for key in ("labels", "images", "test_labels"):
            if run.get(key):
                settings[key] = run[key]
        if "erm" in run:
            for key, value in run["erm"]["settings"].items():
                # Of stage 1 they are the same, but that weights are known by their content
                if run["stage"] != "erm" or key == "weights":
                    settings[f"{key} of ERM"] = value
        named.setdefault((data_of(run), run["unit"], run["name"]), []).append(settings)
    for (*_, name), of_name in named.items():
        keys = {}
        for settings in of_name:
            keys.update(dict.fromkeys(settings))  # a set that keeps its order
        differ = []
        for key in keys:
            # What nobody knows of a run is not compared
            values = {json.dumps(settings[key]) for settings in of_name if key in settings}
            if len(values) > 1:
                differ.append(key)
        if differ:
            common.warn(f"the runs called {name} differ in more than the seed: {', '.join(differ)}")


def independent(records):
    """The records, each run once. A copy of a run, or a second run of the same settings and seed,
    is left out with a warning, wherever it lies: chance has no part in their agreement."""
    first = {}
    kept = []
    repeated = {}
    for run in records:
        keys = identities(run)
        earlier = [first[key] for key in keys if key in first]
        if earlier:
            repeated.setdefault((run["run"], earlier[0]["run"]), []).append(run["name"])
        else:
            kept.append(run)
            first.update(dict.fromkeys(keys, run))
    for (later, earlier), names in repeated.items():
        common.warn(
            f"{later} repeats {earlier} in {', '.join(names)} (a copy, or the same settings and "
            "seed), which counts once"
        )
    return kept


def identities(run):
    """What identifies a run wherever its folder lies: two keys, and two runs that share one of
    them are the same run. One is its settings and seed with those of its ERM run, the other one the
    training or the network that it is of."""
    if "erm" not in run:
        return []
    erm = run["erm"]
    own = [run["stage"], run["name"], training_seed(run), run["settings"]]
    start = run.get("start", [None])
    networks = run.get("networks", {})  # of Grad-CAM
    data = [data_of(run), run.get("labels"), run.get("images")]
    keys = [[*own, data, start[0], sorted(networks), erm["seed"], erm["settings"]]]
    if run["stage"] == "erm":
        keys.append([erm["id"]])
    else:
        keys.append([*own, start[-1], networks])
    return [json.dumps(key, sort_keys=True) for key in keys]


def warn_of_other_starts(found):
    """Later stages should come from the ERM training that lies beside them, {path: record}, and
    from its best epoch if they say so; it may have been run anew since, or extended."""
    for path, run in found.items():
        beside = found.get(path.parents[1] / "erm/results.json", {})
        best = run.get("networks", {}).get("erm")  # of Grad-CAM
        if "start" in run and run["start"][0] == "erm/best.pt":
            best = run["start"][-1]
        ids = [record.get("erm", {}).get("id") for record in (run, beside)]
        for pair in (ids, [best, beside.get("network")]):
            if None not in pair and pair[0] != pair[1]:
                common.warn(
                    f"{path.parent} does not come from the network in {path.parents[1]}/erm; was "
                    "ERM run again, or extended, since?"
                )
                break


def warn_of_two_controls(found):
    """A fine-tuning is compared with one control of a kind."""
    for key, value, shared in CONTROLS.values():
        taken = controls(found, key, value, shared)
        for run in of_stage(found, "finetune"):
            other = taken.get(budget(run, shared), run)
            if run["settings"].get(key) == value and other is not run:
                common.warn(f"{run['run']}: two runs of {key} {value}; {other['name']} is taken")


# ---- statistics ----


@functools.cache
def t_quantile(df):
    """The 97.5 % quantile of Student's t, by summing up its density, which with
    t = sqrt(df) tan(angle) is proportional to cos(angle) ** (df - 1)."""
    edges = np.linspace(0, np.pi / 2, 100_001)
    area = np.cumsum(np.cos((edges[1:] + edges[:-1]) / 2) ** (df - 1))
    return np.sqrt(df) * np.tan(np.interp(0.95 * area[-1], area, edges[1:]))


def cell(values, sign=""):
    """Mean +- sample standard deviation (n)."""
    if not values:
        return "-"
    spread = f" +- {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.1f}{spread} ({len(values)})"


def signed(values):
    return cell(values, "+")


def interval(values):
    """The 95 % t-interval of the mean of two or more values."""
    half = t_quantile(len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return np.mean(values) - half, np.mean(values) + half


def with_interval(values):
    """Mean with its 95 % t-interval (n)."""
    if not values:
        return "-"
    spread = ""
    if len(values) > 1:
        low, high = interval(values)
        spread = f" [{low:.1f}, {high:.1f}]"
    return f"{np.mean(values):.1f}{spread} ({len(values)})"


# ---- what is averaged: (data set and network, row, column, value) one by one ----


def data_of(run):
    half = ", bf16" if run["settings"].get("precision") == "bf16" else ""
    return f"{run['source']}, {run['arch']}{half}"


def of_stage(runs, stage):
    return [run for run in runs if run["stage"] == stage]


def worst(run, split="test"):
    return 100 * run["reports"][split]["acc_worst"]


def accuracies(shown, _):
    tuned = of_stage(shown, "finetune")
    starts = {}  # several runs have one start, which counts once
    for run in tuned:
        starts[json.dumps([data_of(run), run["run"], run["start"]])] = run
    entries = [(run, "ERM, selected epoch", "test") for run in of_stage(shown, "erm")]
    entries += [(run, f"before: {run['start'][0]}", "before") for run in starts.values()]
    entries += [(run, run["name"], "test") for run in tuned]
    for run, row, split in entries:
        for key, column in common.MEANS.items():
            yield data_of(run), row, column, 100 * run["reports"][split][key]


def differences(shown, found):
    tuned = of_stage(shown, "finetune")
    # What the paper compares all runs with; and the two runs of default settings, by magnitude and
    # by gradient, that those of other settings are compared with
    best = {family(run): worst(run) for run in of_stage(found, "erm")}
    defaults = {"finetune": {}, "gradient": {}}
    for run in of_stage(found, "finetune"):
        if run["name"] in defaults:
            defaults[run["name"]][family(run)] = worst(run)
    for run in tuned:
        of = family(run)
        yield data_of(run), run["name"], "worst group", worst(run)
        yield data_of(run), run["name"], "minus before", worst(run) - worst(run, "before")
        if of in best:
            yield data_of(run), run["name"], "minus ERM's best", worst(run) - best[of]
        if run["settings"]["method"] == "erm" or run["name"] == "finetune":
            continue
        if of in defaults["finetune"]:
            yield data_of(run), run["name"], "minus finetune", worst(run) - defaults["finetune"][of]
        by_gradient = run["settings"].get("criterion") == "gradient" and run["name"] != "gradient"
        if by_gradient and of in defaults["gradient"]:
            yield data_of(run), run["name"], "minus gradient", worst(run) - defaults["gradient"][of]
    for column, (key, value, shared) in CONTROLS.items():
        control = controls(found, key, value, shared)
        for run in tuned:
            is_control = run["settings"]["method"] == "erm" or run["settings"].get(key) == value
            if not is_control and budget(run, shared) in control:
                more = worst(run) - worst(control[budget(run, shared)])
                yield data_of(run), run["name"], column, more


def controls(found, key, value, shared):
    """The fine-tunings with a setting, {budget: run}; of two with one budget the later."""
    taken = {}
    for run in of_stage(found, "finetune"):
        # Of the other methods the criterion says nothing, as they mask nothing
        means_it = key != "criterion" or run["settings"]["method"] == "contrastive"
        if means_it and run["settings"].get(key) == value:
            taken[budget(run, shared)] = run
    return taken


def budget(run, shared):
    """What a fine-tuning and its control have in common, the settings `shared` among it."""
    known = {**default_settings("finetune"), **run["settings"]}
    settings = [known.get(key) for key in shared]
    return json.dumps([*family(run), run["start"], run["seed"], settings])


def family(run):
    """What all training stages of one run folder have in common: data, folder, ERM training and
    test images."""
    erm = run.get("erm", {}).get("id")
    return data_of(run), run["run"], erm, run.get("test_labels")


def erm_groups(shown, _):
    for run in of_stage(shown, "erm"):
        for split in common.SPLITS:
            report = run["reports"][split]
            for group, n, correct in zip(
                run["groups"], report["n"], report["correct"], strict=True
            ):
                if n:
                    yield data_of(run), group, split, 100 * correct / n


def table_lines(stage, shown, _):
    for run in of_stage(shown, stage):
        of = data_of(run)
        if run["unit"]:
            of += f", {run['unit']}s"
        for line, cells in run["lines"].items():
            for column, (value, *_) in cells.items():
                yield of, line, column, value


GAINS = {  # fine-tuning and what it is compared with: the claim that rests on it
    ("finetune", "minus before"): "9: largest magnitude masked, minus its start",
    ("finetune", "minus ERM's best"): "9: largest magnitude masked, minus ERM's best epoch",
    ("gradient", "minus ERM's best"): "9: largest gradient masked, minus ERM's best epoch",
    ("finetune", "minus ERM continued"): "9: largest magnitude masked, minus ERM continued",
    ("gradient", "minus ERM continued"): "9: largest gradient masked, minus ERM continued",
    ("supervised", "minus ERM continued"): "9: squared error alone, minus ERM continued",
    ("finetune", "minus random"): "10: largest magnitude minus random neurons masked",
    ("gradient", "minus random"): "10: largest gradient minus random neurons masked",
}


def claims(shown, found):
    """What the verdicts of the report rest on, in points: a row a quantity, in the order of the
    claims, and a column a data set and network."""
    entries = []
    for run in shown:
        for row, value in claims_of(run):
            entries.append(("all data sets and networks", row, data_of(run), value))
    for data, name, column, value in differences(shown, found):
        if (name, column) in GAINS:
            entries.append(("all data sets and networks", GAINS[name, column], data, value))
    yield from sorted(entries, key=lambda entry: int(entry[1].partition(":")[0]))


def claims_of(run):
    """(row, value) of one run, whatever its stage."""
    if run["stage"] == "erm":
        train = run["reports"]["train"]
        test = run["reports"]["test"]
        for j, group in enumerate(run["groups"]):
            if train["n"][j] and test["n"][j]:
                accuracies = [report["correct"][j] / report["n"][j] for report in (train, test)]
                gap = 100 * (accuracies[0] - accuracies[1])
                yield f"1: training minus test, {group.split()[0]}", gap
    for row, share in run.get("ranks", {}).items():
        yield f"6: {row}, %", share
    cells = {}
    for line, columns in run["lines"].items():
        for column, (value, *_) in columns.items():
            cells[line, column] = value
    for (line, column), value in cells.items():
        for claim, criterion in ((2, "gradient"), (3, "magnitude")):
            own = f"Matrix: {criterion}"
            if criterion == "gradient":
                own += f" of {column.rstrip('*')}"
            if line == own:
                number = claim if column.endswith("*") else 4
                yield f"{number}: largest {criterion} zeroed, {column}", value
            if line == f"{own}, test images" and column.endswith("*"):
                more = cells[own, column] - value
                yield f"5: largest {criterion} zeroed, training minus test, {column}", more
            if line == f"Control: {criterion} minus random ones of the same layers":
                yield f"{claim}: minus random ones of the same layers zeroed, {column}", value
            if line == f"Control: {criterion} minus random" and column.endswith("points"):
                yield f"8: largest {criterion} of a layer minus random ones, {column}", value
        if column == "first third, %" and not line.startswith("Control"):
            yield f"7: first third's share of the change, {line}, %", value
        control = cells.get(("mass, erm-continued - erm", column))
        if line == "mass, finetune - erm" and column.endswith("*") and control is not None:
            yield f"12: mass on the object, minus ERM continued, {column}", value - control


# ---- tables and figures ----

TABLES = {  # what is averaged, how its mean is written, what it is
    "wga": (accuracies, cell, "test accuracy in %, mean +- sd (n)"),
    "differences": (differences, cell, "test worst group in %, and its paired gain [95 %]"),
    "groups": (erm_groups, cell, "accuracy of ERM at the selected epoch in %"),
    "trace": (
        functools.partial(table_lines, "trace"),
        signed,
        "change in accuracy in points",
    ),
    "structured": (
        functools.partial(table_lines, "structured"),
        cell,
        "minorities' change, share of it and mean of all layers",
    ),
    "gradcam": (
        functools.partial(table_lines, "gradcam"),
        signed,
        "focus on the object, after minus before, points",
    ),
    "claims": (claims, with_interval, "what the verdicts rest on, in points, mean [95 %] (n)"),
}


def tables(block, shown, found):
    """Tables of a block, one a data set and network: (heading, header, rows of text)."""
    entries, form, what = TABLES[block]
    by_data = {}
    for data, row, column, value in entries(shown, found):
        if not np.isfinite(value):
            raise ValueError(f"{row}, {column}: {value}")
        rows, columns = by_data.setdefault(data, ({}, {}))
        rows.setdefault(row, {}).setdefault(column, []).append(value)
        columns[column] = None  # a set that keeps its order
    for data, (rows, columns) in by_data.items():
        body = []
        for row, cells in rows.items():
            texts = [row]
            for column in columns:
                paired = row.startswith("Control") or column.startswith("minus")
                write = with_interval if paired else form
                texts.append(write(cells.get(column, [])))
            body.append(texts)
        yield f"{data}: {what}", ["", *columns], body


MARKED = re.compile("<!-- numbers: (.*?) -->.*?<!-- end -->", flags=re.DOTALL)


def with_tables(page, records):
    """The text of the page, the tables between its markers made anew. Raises BadInput."""
    advice = f"tables stand between <!-- numbers: {' or '.join(TABLES)} --> and <!-- end -->"
    with common.reading(page, advice):
        text = page.read_text(encoding="utf-8")
        markers = MARKED.findall(text)
        for marker in markers:
            re.compile(marker)
    blocks = {re.split("[@ ]", marker)[0] for marker in markers}
    if len(markers) != text.count("<!-- numbers:") or not blocks <= set(TABLES):
        raise BadInput(f"{page}: a marker has no end, or names an unknown block; {advice}")
    return MARKED.sub(lambda marker: marked_tables(marker[1], records), text)


def marked_tables(marker, records):
    """A marker of the page with its tables. It names a block and, behind an @, a pattern of data
    and network, behind a space, one of rows, if not all shall stand there."""
    block, _, row_pattern = marker.partition(" ")
    block, _, data_pattern = block.partition("@")
    made = ""
    for heading, header, rows in tables(block, records, records):
        rows = [row for row in rows if re.search(row_pattern, row[0])]
        if rows and re.search(data_pattern, heading):
            made += f"{heading}:\n\n"
            # Without columns of which these rows have nothing
            columns = [
                column for column in zip(header, *rows, strict=True) if set(column[1:]) != {"-"}
            ]
            header, *rows = zip(*columns, strict=True)
            for row in [header, ["---"] * len(header), *rows]:
                line = " | ".join(row).replace("*", r"\*")
                made += f"| {line} |\n"
            made += "\n"
    if not made:
        made = "No run yet.\n\n"
    return f"<!-- numbers: {marker} -->\n{made}<!-- end -->"


def plot(records, path):
    """Figure 6: test worst-group accuracy before and after every fine-tuning, a panel a data set;
    bars: mean, whiskers: standard deviation, dots: single runs. A dotted line is the mean of ERM's
    best epoch, the paper's light bars."""
    panels = {}
    best = {}
    for run in of_stage(records, "finetune"):
        panels.setdefault(data_of(run), {}).setdefault(run["name"], []).append(run)
    for run in of_stage(records, "erm"):
        best.setdefault(data_of(run), []).append(worst(run))
    if not panels:
        print("\nno fine-tuning run, so no Figure 6")
        return
    widths = [0.6 + len(names) for names in panels.values()]
    fig = Figure(figsize=(max(4, 1.8 + 0.75 * sum(widths)), 4))
    axes = fig.subplots(1, len(panels), sharey=True, squeeze=False, width_ratios=widths)[0]
    for ax, (data, names) in zip(axes, panels.items(), strict=True):
        for i, runs in enumerate(names.values()):
            plot_pair(ax, i, runs)
        if data in best:
            ax.axhline(np.mean(best[data]), color="black", ls=":", label="ERM's best epoch")
        ticks = [name.removeprefix("finetune-") for name in names]
        ax.set_xticks(range(len(names)), ticks, rotation=35, ha="right")
        ax.set_title(data)
        ax.grid(axis="y")
    axes[0].set_ylabel("test worst-group accuracy (%)")
    handles = axes[0].get_legend_handles_labels()
    fig.legend(*handles, loc="outside lower center", ncols=3)
    fig.suptitle("Mean, standard deviation and single runs")
    path.parent.mkdir(parents=True, exist_ok=True)
    common.write(path.parent, {path.name: fig})
    print(f"\nwrote {path}")


def plot_pair(ax, i, runs):
    """The bars of one fine-tuning, number i of its panel."""
    styles = {
        "before": {"x": i - 0.2, "color": "0.85", "label": "before"},
        "test": {"x": i + 0.2, "color": "0.5", "label": "after"},
    }
    for split, style in styles.items():
        values = [worst(run, split) for run in runs]
        if i > 0:
            style["label"] = None  # once in the legend
        ax.bar(
            height=np.mean(values),
            width=0.4,
            yerr=np.std(values, ddof=1) if len(values) > 1 else None,
            error_kw={"lw": 0.9, "capsize": 3},
            **style,
        )
        ax.plot([style["x"]] * len(values), values, "o", color="black", mfc="white", ms=3.5)


def plot_gains(records):
    """Test worst-group accuracy minus that of ERM continued, a row for each data set and network
    and each kind of fine-tuning: mean, 95 % interval and single seeds."""
    gains = {}
    for data, name, column, value in differences(records, records):
        if column == "minus ERM continued" and name in ARMS:
            gains.setdefault(data, {}).setdefault(name, []).append(value)
    fig = Figure(figsize=(7.5, 1 + 1.3 * len(gains)))
    axes = fig.subplots(max(len(gains), 1), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (data, of_data) in zip(axes, gains.items(), strict=False):
        names = [name for name in ARMS if name in of_data]
        for i, name in enumerate(names):
            values = of_data[name]
            ax.plot(values, [i] * len(values), "o", color="0.6", mfc="none", ms=4)
            ax.plot(np.mean(values), i, "D", color="black", ms=6)
            if len(values) > 1:
                ax.plot(interval(values), [i, i], "-", color="black", lw=1.5)
        ticks = [f"{ARMS[name]} (n = {len(of_data[name])})" for name in names]
        ax.set_yticks(range(len(names)), ticks)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.axvline(0, color="black", lw=0.6)
        ax.grid(axis="x")
        ax.set_title(data, loc="left")
    axes[-1].set_xlabel(
        "test worst-group accuracy minus that of ERM continued (points)\n"
        "diamond and line: mean and its 95 % interval; circles: seeds"
    )
    return fig


if __name__ == "__main__":
    with common.script():
        main(parse_args())
