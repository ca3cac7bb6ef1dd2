"""Means over finished runs: accuracies, paired differences, traces; Table 12 and Figure 6.

    python results/compare.py runs/wb*                  # every finished stage of every run folder
    python results/compare.py runs/wb*/finetune-erm     # one stage of each
    python results/compare.py runs/wb* --add --write    # into numbers.jsonl and into the report

A cell is the mean over run folders +- the sample standard deviation (n). Gains are paired by run
folder and carry the 95 % t-interval of their mean. "ERM continued" is the run of --method erm, and
"random" that of --criterion random, in the same run folder with the same start, epochs, learning
rate, batch size, augmentation and seed.
Tracing: each group under the neurons selected by it; Matrix: every group under every set. Reads
results.json and args.json of the stages; writes Figure 6.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
from common import BadInput, reading

HERE, FIGURE = Path(__file__).resolve().parent, Path("runs/fig06_compare.png")
STAGES = ("erm", "trace", "structured", "finetune", "gradcam")
BUDGET = ("epochs", "lr", "batch_size", "augment")  # and seed: what a run shares with its control
CONTROLS = {"minus ERM continued": ("method", "erm"), "minus random": ("criterion", "random")}
# Arguments that say where things lie, or leave the numbers alone
PLACES = {"run", "name", "data", "checkpoint", "kick_in", "before", "after", "masks"}
PLACES |= {"seed", "device", "workers", "deterministic", "overwrite", "keep_epochs"}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    runs = "run folders (every finished stage in them), or RUN/NAME for one stage"
    p.add_argument("runs", nargs="*", type=Path, metavar="RUN", help=runs)
    figure = f"where to draw Figure 6: .png, .pdf or .svg ({FIGURE})"
    p.add_argument("--figure", type=Path, metavar="FILE", help=figure)
    keep = "keep what was found in results/numbers.jsonl, in the place of an equal run's line"
    p.add_argument("--add", action="store_true", help=keep)
    page = "rewrite the tables of results/README.md from results/numbers.jsonl; needs no RUN"
    p.add_argument("--write", action="store_true", help=page)
    return p.parse_args(argv)


def main(args):
    store, page = HERE / "numbers.jsonl", HERE / "README.md"
    if not args.runs and (args.add or not args.write):
        raise BadInput("no run folder given; name some, such as runs/wb*, or use --write alone")
    if args.figure and args.figure.suffix not in (".png", ".pdf", ".svg"):
        raise BadInput(f"--figure {args.figure}: expected a name that ends in .png, .pdf or .svg")

    if args.runs:
        found, shown = read_runs(args.runs)
        warn_of_differences(shown)
        for block in TABLES:
            for table in tables(block, shown, found):
                print_table(*table)
        plot(shown, args.figure or FIGURE)
    if args.add:
        kept = {identity(record): record for record in [*read_store(store), *shown]}
        ordered = sorted(kept.values(), key=identity)
        common.write(store, "".join(f"{json.dumps(record)}\n" for record in ordered))
        print(f"{store} has {len(ordered)} lines")
    if args.write:
        records = read_store(store)
        warn_of_differences(records)
        common.write(page, with_tables(page, records))
        print(f"wrote the tables of {page}")
        if args.figure and not args.runs:
            plot(records, args.figure)


# ---- records: what one finished stage is worth, and a line of numbers.jsonl ----


def read_runs(folders):
    """Records of all stages of the run folders (the control of a stage may not have been asked
    for), and of those asked for."""
    found, shown = {}, {}
    for folder in folders:
        if folder.is_file():  # such as an earlier Figure 6 in runs/*
            continue
        if not folder.is_dir():
            raise BadInput(f"{folder}: no such folder")
        folder, one_stage = folder.resolve(), (folder / "results.json").exists()
        run = folder.parent if one_stage else folder
        paths = sorted(run.glob("[!.]*/results.json"))  # .NAME.new is not finished
        if not paths:
            common.warn(f"{folder}: no finished stage there")
        for path in paths:
            if path not in found:
                with reading(path, "is it of a finished run of this project? Run its stage again"):
                    found[path] = check(make_record(path))
            if path.parent == folder or not one_stage:
                shown[path] = found[path]
    if not shown:
        raise BadInput(f"{folders[0]}: no finished run there (no RUN/NAME/results.json)")
    shorten(found.values(), "source", 2)
    shorten(found.values(), "run", 1)
    return list(found.values()), list(shown.values())


def shorten(records, key, length):
    """Give paths the shortest ends, of `length` parts or more, that tell them apart."""
    parts = {record[key]: Path(record[key]).parts for record in records}
    while len({path[-length:] for path in parts.values()}) < len(parts):
        length += 1
    for record in records:
        record[key] = str(Path(*parts[record[key]][-length:]))


def make_record(path):
    """What results.json and args.json of a stage say, as far as it is compared; plain types."""
    result, about = (common.read_json(path.with_name(f"{n}.json")) for n in ("results", "args"))
    source = result["source"]
    record = {"run": str(path.parents[1]), "name": path.parent.name, "stage": result["stage"]}
    record["source"] = source if source == "synthetic" else str(Path(source).resolve())
    record |= {"arch": result["arch"], "unit": result.get("unit", "")}
    record |= {"commit": (about.get("commit") or "")[:7], "seed": about["args"]["seed"]}
    record["settings"] = {}
    for key, value in about["args"].items():
        is_path = isinstance(value, str) and os.sep in value  # of --weights FILE the name will do
        if key not in PLACES:
            record["settings"][key] = Path(value).name if is_path else value

    # Counts and accuracies of each split, of training stages; lines of a table, of the others
    reports, record["reports"], record["lines"] = dict(result.get("splits", {})), {}, {}
    if record["stage"] == "finetune":
        reports["before"] = result["before"]["test"]
        weights = about["inputs"]["start"]  # their fingerprint
        record["start"] = [result["start"], result["start_epoch"], weights]
    for split, report in reports.items():
        groups, kept = report["groups"], {key: report[key] for key in common.MEANS}
        record["groups"] = [f"{common.short(group)} {group['name']}" for group in groups]
        kept["n"] = [group["n"] for group in groups]
        kept["correct"] = [group["correct"] for group in groups]
        record["reports"][split] = kept
    for line, column, values in cells_of(result):
        record["lines"].setdefault(line, {})[column] = [round(value, 3) for value in values]
    return record


def cells_of(result):
    """What tracing and Grad-CAM found: (line, column, [points] or [points, images])."""
    if result["stage"] == "trace":
        names = [common.short(group) for group in result["groups"]]
        for row in result["tables"]:
            line = f"{row['table']}: {row['line']}{', test images' * (row['split'] == 'test')}"
            for name, points, images in zip(names, row["points"], row["images"]):
                if points is not None:  # a group without images
                    yield line, name, [points, images]
        for criterion, control in result["control"].items():
            for test in control["tests"]:
                group, random = names[test["group"]], f"random ones of {test['random']}"
                yield f"Control: {random} in place of {criterion}", group, [test["mean"]]
                more = test["observed"] - test["mean"]
                yield f"Control: {criterion} minus {random}", group, [more]
    if result["stage"] == "structured":
        cells = {}
        for criterion, found in result["summary"].items():
            thirds = (found["thirds"] or {}).items()
            cells[criterion] = {f"{third} third, %": 100 * share for third, share in thirds}
            for group, of_group in zip(result["groups"], found["groups"]):
                if group["minority"]:
                    cells[criterion][f"{common.short(group)}, points"] = of_group["mean"]
        for criterion, values in cells.items():
            for column, value in values.items():
                yield criterion, column, [value]
                if criterion != "random" and column in cells["random"]:
                    more = value - cells["random"][column]
                    yield f"Control: {criterion} minus random", column, [more]
    if result["stage"] == "gradcam":
        for row in result["focus"]:
            for measure in ("mass", "pointing"):
                if " - " in row["model"] and row[measure] is not None:
                    yield f"{measure}, {row['model']}", common.short(row), [100 * row[measure]]


def check(record):
    """The record itself. What is missing or odd in it raises here, where its file is known."""
    if record["stage"] not in STAGES:
        raise ValueError(f"stage {record['stage']!r}")
    "".join(record[key] for key in ("source", "arch", "unit", "run", "name"))  # they are text
    identity(record)
    warn_of_differences([record])
    for block in TABLES:
        list(tables(block, [record], [record]))
    for split, report in record["reports"].items():
        accuracies = [report[key] for key in common.MEANS]
        if not all(0 <= accuracy <= 1 for accuracy in accuracies):
            raise ValueError(f"accuracies of {split}: {accuracies}")
    return record


def identity(record):
    """Where a record stands in numbers.jsonl; of those at one place the later stays."""
    keys = ("source", "arch", "run", "stage", "name", "seed", "settings")
    return json.dumps([record[key] for key in keys], sort_keys=True)


def read_store(path):
    records = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        with reading(f"{path} line {number}", "mend it, or delete it and --add its run again"):
            records.append(check(json.loads(line)))
    return records


def warn_of_differences(records):
    """Runs of one name are averaged, so they should differ in the seed alone."""
    named = {}
    for run in records:
        settings = {**run["settings"], "start": run.get("start", [""])[0]}
        named.setdefault((data_of(run), run["unit"], run["name"]), []).append(settings)
    for (*_, name), of_name in named.items():
        differ = []
        for key in dict.fromkeys(key for settings in of_name for key in settings):
            if len({json.dumps(settings.get(key)) for settings in of_name}) > 1:
                differ.append(key)
        if differ:
            common.warn(f"the runs called {name} differ in more than the seed: {', '.join(differ)}")


# ---- statistics ----


def t_quantile(df):
    """The 97.5 % quantile of Student's t. With t = sqrt(df) tan(angle) its density becomes that of
    cos(angle) ** (df - 1), of which a sum of rectangles is a good integral."""
    edges = np.linspace(0, np.pi / 2, 100_001)
    middles = (edges[1:] + edges[:-1]) / 2
    area = np.cumsum([0, *np.cos(middles) ** (df - 1)])
    return float(np.sqrt(df) * np.tan(np.interp(0.95 * area[-1], area, edges)))


def cell(values, sign=""):
    """Mean +- sample standard deviation (n)."""
    if not values:
        return "-"
    spread = f" +- {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.1f}{spread} ({len(values)})"


def signed(values):
    return cell(values, "+")


def with_interval(values):
    """Of differences, with the 95 % t-interval of their mean."""
    if len(values) < 2:
        return signed(values)
    half = t_quantile(len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{signed(values)} [{np.mean(values) - half:+.1f}, {np.mean(values) + half:+.1f}]"


# ---- what is averaged: (data set and network, row, column, value) one by one ----


def data_of(run):
    half = run["settings"].get("precision") == "bf16"
    return f"{run['source']}, {run['arch']}{', bf16' * half}"


def of_stage(runs, stage):
    return [run for run in runs if run["stage"] == stage]


def worst(run, split="test"):
    return 100 * run["reports"][split]["acc_worst"]


def accuracies(shown, *_):
    rows = {}  # what counts once: (run, row, split)
    for run in of_stage(shown, "erm"):
        rows[identity(run)] = run, "ERM, selected epoch", "test"
    for run in of_stage(shown, "finetune"):
        once = json.dumps([data_of(run), run["run"], run["start"]])
        rows[once] = run, f"before: {run['start'][0]}", "before"
    for run in of_stage(shown, "finetune"):
        rows[identity(run)] = run, run["name"], "test"
    for run, row, split in rows.values():
        for key, column in common.MEANS.items():
            yield data_of(run), row, column, 100 * run["reports"][split][key]


def differences(shown, found, _):
    def budget(run):  # what a fine-tuning and its control have in common
        settings = [run["settings"][key] for key in BUDGET]
        return json.dumps([data_of(run), run["run"], run["start"], run["seed"], settings])

    tuned = of_stage(shown, "finetune")
    for run in tuned:
        yield data_of(run), run["name"], "worst group", worst(run)
        yield data_of(run), run["name"], "minus before", worst(run) - worst(run, "before")
    for column, (key, value) in CONTROLS.items():
        control = {}
        for run in of_stage(found, "finetune"):
            if run["settings"].get(key) == value:
                if budget(run) in control:
                    common.warn(f"{run['run']}: two runs of {key} {value}; {run['name']} is taken")
                control[budget(run)] = worst(run)
        for run in tuned:
            compared = run["settings"]["method"] != "erm" and run["settings"].get(key) != value
            if compared and budget(run) in control:
                yield data_of(run), run["name"], column, worst(run) - control[budget(run)]


def erm_groups(shown, *_):
    for run in of_stage(shown, "erm"):
        for split in common.SPLITS:
            report = run["reports"][split]
            for group, n, correct in zip(run["groups"], report["n"], report["correct"]):
                if n:
                    yield data_of(run), group, split, 100 * correct / n


def table_lines(shown, _, stage):
    for run in of_stage(shown, stage):
        of = f"{data_of(run)}, {run['unit']}s" if run["unit"] else data_of(run)
        for line, cells in run["lines"].items():
            for column, (value, *_) in cells.items():
                yield of, line, column, value


# ---- tables and Figure 6 ----

TABLES = {  # what is averaged, how its mean is written, what it is
    "wga": (accuracies, cell, "test accuracy in %, mean +- sd (n)"),
    "differences": (differences, cell, "test worst group in %, and its paired gain [95 %]"),
    "groups": (erm_groups, cell, "accuracy of ERM at the selected epoch in %"),
    "trace": (table_lines, signed, "change in accuracy in points"),
    "structured": (table_lines, cell, "minorities' change, share of it and mean of all layers"),
    "gradcam": (table_lines, signed, "focus on the object, after minus before, points"),
}


def tables(block, shown, found):
    """Tables of a block, one a data set and network: (heading, header, rows of text)."""
    entries, form, what = TABLES[block]
    by_data = {}
    for data, row, column, value in entries(shown, found, block):
        rows, columns = by_data.setdefault(data, ({}, {}))
        if not np.isfinite(value):
            raise ValueError(f"{row}, {column}: {value}")
        columns[column] = None  # a set that keeps its order
        rows.setdefault(row, {}).setdefault(column, []).append(value)
    for data, (rows, columns) in by_data.items():
        body = []
        for row, values in rows.items():
            cells = []
            for column in columns:
                paired = row.startswith("Control") or column.startswith("minus")
                cells.append((with_interval if paired else form)(values.get(column, [])))
            body.append([row, *cells])
        yield f"{data}: {what}", ["", *columns], body


def print_table(heading, header, rows):
    print(f"\n{heading}")
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    for name, *cells in [header, *rows]:
        aligned = [f"{text:>{width}s}" for text, width in zip(cells, widths[1:])]
        print(f"{name:{widths[0]}s}  {'  '.join(aligned)}")


def with_tables(page, records):
    """The text of the page, the tables between its markers made anew. A marker names a block and,
    behind an @, a pattern of data and network, behind a space, one of rows, if not all shall stand
    there."""

    def fill(marker):
        parts, (block, _, pattern) = [], marker[1].partition(" ")
        block, _, data = block.partition("@")
        for heading, header, rows in tables(block, records, records):
            lines, rows = [f"{heading}:", ""], [row for row in rows if re.search(pattern, row[0])]
            if not rows or not re.search(data, heading):
                continue
            for row in [header, ["---"] * len(header), *rows]:
                lines.append(f"| {' | '.join(row)} |".replace("*", r"\*"))
            parts.append("\n".join([*lines, ""]))
        made = "\n".join(parts) or "No run yet.\n"
        return f"<!-- numbers: {marker[1]} -->\n{made}\n<!-- end -->"

    advice = f"tables stand between <!-- numbers: {' or '.join(TABLES)} --> and <!-- end -->"
    with reading(page, advice):
        text = page.read_text()
        new, n = re.subn("<!-- numbers: (.*?) -->.*?<!-- end -->", fill, text, flags=re.DOTALL)
        if n != text.count("<!-- numbers:"):
            raise ValueError("a marker has no end")
    return new


def plot(records, path):
    """Figure 6: test worst-group accuracy before and after every fine-tuning, a panel a data set;
    bars: mean, whiskers: standard deviation, dots: single runs."""
    panels = {}
    for run in of_stage(records, "finetune"):
        panels.setdefault(data_of(run), {}).setdefault(run["name"], []).append(run)
    if not panels:
        return print("\nno fine-tuning run, so no Figure 6")
    widths = [0.6 + len(names) for names in panels.values()]
    fig = Figure(figsize=(max(4, 1.8 + 0.75 * sum(widths)), 4), layout="constrained")
    axes = fig.subplots(1, len(panels), sharey=True, squeeze=False, width_ratios=widths)[0]
    whisker = {"lw": 0.9, "capsize": 3}
    for ax, (data, names) in zip(axes, panels.items()):
        for i, runs in enumerate(names.values()):
            for split, x, colour in (("before", i - 0.2, "0.85"), ("test", i + 0.2, "0.5")):
                values = [worst(run, split) for run in runs]
                spread = np.std(values, ddof=1) if len(values) > 1 else None
                style = {"color": colour, "edgecolor": "black", "lw": 0.5}
                label = None if i else {"before": "before", "test": "after"}[split]
                ax.bar(x, np.mean(values), 0.4, yerr=spread, error_kw=whisker, label=label, **style)
                ax.plot([x] * len(values), values, "o", color="black", mfc="white", ms=3.5)
        ticks = [name.removeprefix("finetune-") for name in names]
        ax.set_xticks(range(len(names)), ticks, rotation=35, ha="right", fontsize=8)
        ax.set_title(data, fontsize=9)
        ax.grid(axis="y", color="0.92")
        ax.set_axisbelow(True)
    axes[0].set_ylabel("test worst-group accuracy (%)")
    handles = axes[0].get_legend_handles_labels()
    fig.legend(*handles, loc="outside lower center", ncols=2, fontsize=8)
    fig.suptitle("Mean, standard deviation and single runs", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    common.save_figure(fig, path)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    arguments = parse_args()
    writes_here = arguments.add or arguments.write
    folder = HERE if writes_here else (arguments.figure or FIGURE).parent
    again = "nothing is half-written; the same command starts again"
    with common.script(folder / "compare", again):
        main(arguments)
