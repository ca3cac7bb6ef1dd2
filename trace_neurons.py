"""Stage 2: unstructured tracing. Which few neurons carry a group's training accuracy?

    python trace_neurons.py                                     # the run of train_erm.py
    python trace_neurons.py --run runs/wb0 --max-per-group 200

Paper: section 2.1.1, Figures 2-5, 8, 11, 12, Tables 3, 11, 13, 14. The neurons with the largest
gradient (one set I_j for each group j) or magnitude (one set) are zeroed, replaced by noise or
disturbed by noise; beside them random neurons are zeroed, a control that the paper lacks. Changes
are signed, in percentage points; the paper's |change| of group j under I_j is the diagonal of the
printed matrix. Neurons are chosen on training images and stay the same on test images. Reads
RUN/erm/best.pt and its data; writes RUN/trace/ (as a whole): args.json, neurons.csv, accuracy.csv,
figures, results.json.
"""

import math
import signal
from itertools import product
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while torch is still loading; later common.script answers
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

import common
from common import Variant, short

FILES = ["args.json", "neurons.csv", "accuracy.csv", "results.json"]
FILES += ["fig0[23458]_*.png", "fig1[12]_*.png"]
CRITERIA = ("gradient", "magnitude")
KEY = ("criterion", "modification", "sigma", "k", "repeat", "selected_by")
FIGURES = {
    "zero": ["fig02_zero.png"],
    "random-init": ["fig04_random_init.png", "fig11_random_init_sigmas.png"],
    "random-noise": ["fig05_random_noise.png", "fig12_random_noise_sigmas.png"],
}
FEW_NEURONS = 3  # the random modifications and the figures stop there, as in the paper
FEW_IMAGES = 2  # critical neurons must cost over so many images more than random ones' mean

NOTES = """In brackets: the default.

--unit              a neuron is a channel or a single weight; auto: a weight where linear layers
                    hold most weights, as in transformers, else a channel
--max-per-group     a random sample; minority groups in training are always traced whole
--gradient-samples  of a group, all its traced training images (section 2.1.1), or 128 drawn from
                    its 256 with the highest loss (section 4.1)
--top-k             every K is zeroed; the random modifications and the figures use K up to 3
--repeats           draws of noise, the same ones for every k, sigma and criterion
--controls          N random sets of 3 neurons from all layers, and for each critical set N more
                    from that set's layers; 0: none, else at least 39, for their 95 % range
"""


def parse_args(argv=None):
    p = common.make_parser(__doc__, NOTES)
    g = p.add_argument_group("what is traced")
    g.add_argument("--checkpoint", type=Path, help="model to trace (RUN/erm/best.pt)")
    g.add_argument("--data", help="where the data are now, if they moved (as the checkpoint says)")
    most = "at most so many images of each group (all; built-in set 100)"
    g.add_argument("--max-per-group", type=int, metavar="N", help=most)
    g = p.add_argument_group("neurons")
    g.add_argument("--unit", choices=["auto", "channel", "weight"], default="auto", help="(auto)")
    samples = ["group", "worst"]
    g.add_argument("--gradient-samples", choices=samples, default="group", help="(group)")
    g = p.add_argument_group("modifications")
    ks = [1, 2, 3, 5, 10]
    g.add_argument("--top-k", type=int, nargs="+", default=ks, metavar="K", help="(1 2 3 5 10)")
    sigmas, of = [0.005, 0.01, 0.02], "standard deviation of noise, in units of weights"
    g.add_argument("--sigma", type=float, nargs="+", default=sigmas, help=f"{of} (0.005 0.01 0.02)")
    g.add_argument("--repeats", type=int, default=10, help="(10)")
    g.add_argument("--controls", type=int, default=40, help="(40)")
    g = p.add_argument_group("run")
    g.add_argument("--seed", type=int, default=0, help="of samples, noise, random neurons (0)")
    g.add_argument("--batch-size", type=int, default=128, help="images a pass (128)")
    return p.parse_args(argv)


def main(args):
    # The network and its data; a folder to write into, before anything is computed
    args.checkpoint = args.checkpoint or args.run / "erm" / "best.pt"
    model, checkpoint, table = common.reopen(args.checkpoint, args.data, args.device)
    groups, most = table.groups, 100 if table.source == "synthetic" else None
    common.fill_defaults(args, table, max_per_group=most)
    unit, counts = common.count_neurons(model, args.unit)
    total = sum(counts.values())
    common.check_flags(args, "batch_size", "max_per_group", "repeats")
    if not all(0 < sigma < math.inf for sigma in args.sigma):
        raise common.BadInput(f"--sigma {args.sigma}: must be positive; noise of 0 does nothing")
    if min(args.top_k) < 1 or max(args.top_k) > total:
        raise common.BadInput(f"--top-k {args.top_k}: expected 1 to {total}, their number")
    if args.controls and not 39 <= args.controls <= 10**6:
        raise common.BadInput("--controls: expected 0, or 39 (for a 95 % range) to 1000000")
    new = common.new_folder(args.run / "trace", args, FILES)
    minority = [group["group"] for group in groups if group["minority"]]
    splits = {name: common.open_split(checkpoint, table, name) for name in ("train", "test")}

    def batches(name, parts=None):  # None: all images
        return common.make_loader(splits[name], args.batch_size, args.workers, parts=parts)

    # What there is to trace: accuracy over all images
    loaders = {name: batches(name) for name in splits}
    reports, logits = common.evaluate(model, loaders, groups)
    common.print_splits("The network as it is", groups, reports)

    # Scores of all neurons and the sets I_j, from training images alone
    index = {}
    for name, split in splits.items():
        whole = minority if name == "train" else ()
        index[name] = common.sample_groups(split.g, groups, args.max_per_group, whole, args.seed)
    train = splits["train"]
    scores = {("magnitude", "all"): common.magnitude_scores(model, unit)}
    for j, members in enumerate(index["train"]):
        if args.gradient_samples == "worst":
            generator = torch.Generator().manual_seed(args.seed)
            of_group = (train.g == j).nonzero()[:, 0]
            members = common.worst_images(logits["train"], train.y, of_group, generator)
        scores["gradient", j] = common.gradient_scores(model, batches("train", [members]), unit)
    everywhere = common.gradient_scores(model, batches("train", index["train"]), unit)
    listed = min(max(math.ceil(1e-4 * total), *args.top_k, FEW_NEURONS), total)
    ranked = {key: common.top_neurons(values, listed) for key, values in scores.items()}

    # All modified models, and their accuracies
    rows = []
    for name in splits:
        planned = plan(args, ranked, name)
        if name == "train":
            planned += random_sets(args, ranked, counts, minority)
        variants = [variant for _, variant in planned]
        found = common.accuracy_under(model, batches(name, index[name]), variants, unit)
        for (key, _), by_group in zip(planned, found):
            for j, images in by_group.items():
                rows.append({**dict(zip(KEY, key)), "split": name, "group": j, **images})

    # Tables, control and figures, which take the place of an older trace as a whole
    neurons = neuron_table(ranked, scores, everywhere)
    results = {"stage": "trace", "source": table.source, "arch": checkpoint["arch"]}
    results |= {"checkpoint": str(args.checkpoint), "epoch": checkpoint["epoch"], "unit": unit}
    results |= {"neurons": total, "layers": len(counts), "listed": listed}
    results |= {"groups": groups, "splits": reports}
    results |= {"tables": make_tables(rows, groups, args), "ranks": rank_shares(neurons)}
    results["control"] = {c: control_test(rows, c, groups, args) for c in CRITERIA}
    common.write_csv(new / "neurons.csv", neurons)
    common.write_csv(new / "accuracy.csv", rows)
    for how, figures in FIGURES.items():
        for figure, sigmas in zip(figures, (args.sigma[:1], args.sigma)):
            plot_changes(rows, groups, args, how, sigmas, new / figure)
    shown = f"top {listed} of {total} neurons ({100 * listed / total:.2g} %)"
    plot_ranks(neurons, shown, new / "fig03_ranks.png")
    plot_layers(neurons, groups, list(counts), shown, new / "fig08_layers.png")
    common.write_json(new / "results.json", results)
    common.replace_folder(new, args.run / "trace")
    print_tables(results, groups)
    print(f"wrote {args.run}/trace/")


def plan(args, ranked, split):
    """Every modified model but the controls, as (KEY, variant). Random modifications are most of
    the work: only those are made that some table or figure shows."""
    planned = []
    for (criterion, by), neurons in ranked.items():
        for k in args.top_k:
            planned.append(((criterion, "zero", "", k, "", by), Variant(neurons[:k])))
        hows = ["random-init", "random-noise"]
        if split == "test":  # of the paper's tables only 13 has test columns
            hows = ["random-noise"] if criterion == "gradient" else []
        few = [k for k in args.top_k if k <= FEW_NEURONS]
        groups = None if by == "all" else (by,)
        for how, sigma, k, repeat in product(hows, args.sigma, few, range(args.repeats)):
            variant = Variant(neurons[:k], how, sigma, common.seed_of(args.seed, repeat), groups)
            planned.append(((criterion, how, sigma, k, repeat, by), variant))
    return planned


def random_sets(args, ranked, counts, minority):
    """The control: random sets of as many neurons as the figures zero, over the minority groups.
    One kind uniform over all neurons, one kind for each critical set with as many neurons in each
    layer as that set has. A list of (KEY, variant)."""
    rng, total, sets = np.random.default_rng(args.seed), sum(counts.values()), []
    k = min(FEW_NEURONS, total)
    for repeat in range(args.controls):
        drawn = common.locate(rng.choice(total, k, replace=False), counts)
        variant = Variant(drawn, groups=tuple(minority))
        sets.append((("random", "zero", "", k, repeat, "all layers"), variant))
        for (criterion, by), neurons in ranked.items():
            layers, drawn = [layer for layer, _ in neurons[:k]], []
            for layer in dict.fromkeys(layers):
                chosen = rng.choice(counts[layer], layers.count(layer), replace=False)
                drawn += [(layer, int(i)) for i in chosen]
            groups = tuple(j for j in minority if by in ("all", j))
            key = ("random", "zero", "", k, repeat, f"layers of {criterion} {by}")
            sets.append((key, Variant(drawn, groups=groups)))
    return sets


def change(row):
    """Accuracy after minus before, in percentage points."""
    return 100 * (row["correct_after"] - row["correct_before"]) / row["n"]


def pick(rows, **wanted):
    return [row for row in rows if wanted.items() <= row.items()]


def own(rows, group, **wanted):
    """The rows of a group under its own set: the one selected by it, or magnitude's."""
    return [r for r in pick(rows, group=group, **wanted) if r["selected_by"] in ("all", group)]


def p_value(observed, null):
    """Share of random sets, the observed one counted in, that lower accuracy at least as much."""
    return (1 + sum(value <= observed for value in null)) / (1 + len(null))


def middle_95(null):
    """The range into which a further random set falls in 95 % of cases; needs 39 sets."""
    return np.quantile(null, [0.025, 0.975], method="weibull")


def control_test(rows, criterion, groups, args):
    """Do the critical neurons of a criterion lower a minority group's training accuracy more than
    random ones? Yes if at most 5 % of the random sets of each kind lower it as much (p), AND it
    loses over FEW_IMAGES more images than under random sets on average: a small p means rare, not
    large. Returns {"beats": {group: bool}, "tests": a list of dicts, "sentence"}."""
    tests, beats = [], {}
    zeroed = {"criterion": criterion, "modification": "zero", "k": FEW_NEURONS, "split": "train"}
    for j in [group["group"] for group in groups if group["minority"]]:
        observed = own(rows, j, **zeroed)
        if not observed or not args.controls:
            continue
        images = observed[0]["correct_after"] - observed[0]["correct_before"]
        same, both = f"layers of {criterion} {observed[0]['selected_by']}", []
        for kind, name in (("all layers", "all layers"), (same, "the same layers")):
            others = pick(rows, criterion="random", selected_by=kind, group=j)
            null = [change(row) for row in others]
            test = {"group": j, "random": name, "n": observed[0]["n"], "sets": len(null)}
            test |= {"observed": change(observed[0]), "observed_images": images}
            test |= {"mean": float(np.mean(null)), "p": p_value(change(observed[0]), null)}
            low, high = middle_95(null)
            both.append({**test, "low": float(low), "high": float(high)})
        # Mean change in images under the kind of random sets that costs more; a gain counts as 0
        usual = min(0, both[0]["mean"], both[1]["mean"]) * both[0]["n"] / 100
        rare = both[0]["p"] <= 0.05 and both[1]["p"] <= 0.05
        beats[j] = rare and images < usual - FEW_IMAGES
        tests += both
    return {"beats": beats, "tests": tests, "sentence": verdict(criterion, beats, tests)}


def verdict(criterion, beats, tests):
    """One sentence: yes, no or only for some groups, and where a loss is too small to count."""
    if not beats:
        why = f"that takes a minority group, --controls, and zeroing of the top {FEW_NEURONS}"
        return f"{criterion}: not compared with random neurons; {why}"
    yes = ", ".join(f"G{j}*" for j in beats if beats[j])
    answer = "yes" if all(beats.values()) else f"only for {yes}" if yes else "no"
    for j in beats:
        if not beats[j] and max(test["p"] for test in pick(tests, group=j)) <= 0.05:
            answer += f"; G{j}*: rare, but within {FEW_IMAGES} images of what random ones lose"
    asked = f"do its top {FEW_NEURONS} neurons cost minorities more than random ones"
    return f"{criterion}: {asked}? {answer}"


def percentile(neurons, scores):
    """Place of m neurons among all, by scores {layer: (n,)} -> (m,): 0 the smallest, 100 the
    largest, equals in the middle of their places."""
    values = torch.stack([scores[layer][i] for layer, i in neurons]).cpu()
    ordered = torch.cat([part.cpu() for part in scores.values()]).sort().values
    places = torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)
    return 50 * (places - 1).double() / max(len(ordered) - 1, 1)


def neuron_table(ranked, scores, everywhere):
    """Rows of neurons.csv. Percentiles are among all neurons of the network; that of the gradient
    is by the set's own group or, for magnitude's set, by the gradient of all images together."""
    rows = []
    for (criterion, by), neurons in ranked.items():
        gradients = everywhere if by == "all" else scores["gradient", by]
        magnitude = percentile(neurons, scores["magnitude", "all"])
        gradient = percentile(neurons, gradients)
        for rank, (layer, i) in enumerate(neurons):
            row = {"criterion": criterion, "selected_by": by, "rank": rank + 1}
            row |= {"layer": layer, "index": i, "score": float(scores[criterion, by][layer][i])}
            row["magnitude_percentile"] = round(float(magnitude[rank]), 4)
            row["gradient_percentile"] = round(float(gradient[rank]), 4)
            rows.append(row)
    return rows


def rank_shares(neurons):
    """Figure 3 in numbers: how many of one criterion's neurons are in the other's upper 5 %."""
    shares = {}
    for criterion, other in (CRITERIA, CRITERIA[::-1]):
        places = [row[f"{other}_percentile"] for row in pick(neurons, criterion=criterion)]
        upper = sum(place >= 95 for place in places)
        shares[criterion] = {"n": len(places), "upper": upper, "median": float(np.median(places))}
    return shares


def make_tables(rows, groups, args):
    """Tables 3, 11, 13, 14 and the matrix of every group under every set, as dicts of table, line,
    split and, per group, change in points and in images (means over repeats; None: no image)."""
    few, first = [k for k in args.top_k if k <= FEW_NEURONS], args.sigma[:1]
    # Table, what stands before the line's name, criterion, modification, k, sigma
    plans = [("Table 3", "", "magnitude", "zero", args.top_k, [""])]
    plans += [("Table 11", "", "gradient", "zero", few, [""])]
    plans += [("Table 11", "", "gradient", "random-init", few, args.sigma)]
    plans += [("Table 13", "", "gradient", "zero", few, [""])]
    plans += [("Table 13", "", "gradient", "random-noise", few, args.sigma)]
    for figure, how in (("Figure 4", "random-init"), ("Figure 5", "random-noise")):
        for side, criterion in zip(("left", "right"), CRITERIA):
            plans += [("Table 14", f"{figure} ({side}) ", criterion, how, few, first)]
    lines = []
    for table, label, criterion, how, ks, sigmas in plans:
        for split, sigma, k in product(("train", "test"), sigmas, ks):
            if split == "test" and table != "Table 13":
                continue
            wanted = dict(zip(KEY[:4], (criterion, how, sigma, k)))
            cells = [own(rows, g["group"], **wanted, split=split) for g in groups]
            line = f"{label}{criterion} {how} top {k}" + (f" sigma {sigma}" if sigma else "")
            lines.append({"table": table, "line": line, "split": split, **averages(cells)})
    for split, criterion in product(("train", "test"), CRITERIA):
        zeroed = pick(
            rows, criterion=criterion, modification="zero", k=max(few, default=0), split=split
        )
        for by in dict.fromkeys(row["selected_by"] for row in zeroed):
            cells = [pick(zeroed, selected_by=by, group=g["group"]) for g in groups]
            line = f"{criterion} {'' if by == 'all' else f'of G{by}'}".strip()
            lines.append({"table": "Matrix", "line": line, "split": split, **averages(cells)})
    return lines


def averages(cells):
    """cells: for each group its rows -> {"points", "images"}, lists of means over the rows."""
    points, images = [], []
    for rows in cells:
        gained = [row["correct_after"] - row["correct_before"] for row in rows]
        points.append(float(np.mean([change(row) for row in rows])) if rows else None)
        images.append(float(np.mean(gained)) if rows else None)
    return {"points": points, "images": images}


def print_tables(results, groups):
    """The tables, each group under the neurons selected by it, and the control."""
    print("\nChange in accuracy, percentage points (images), * minority")
    table = None
    for line in results["tables"]:
        if line["table"] != table:
            table = line["table"]
            note = ": every group under every set, zeroed" if table == "Matrix" else ""
            print(f"\n{table + note:56s}" + "".join(f"{short(group):>18s}" for group in groups))
        cells = []
        for points, images in zip(line["points"], line["images"]):
            cells.append("-" if points is None else f"{points:+.2f} ({images:+.1f})")
        name = line["line"] + (", test" if line["split"] == "test" else "")
        print(f"{name:56s}" + "".join(f"{cell:>18s}" for cell in cells))
    print("\nControl: the critical neurons against random ones, zeroed, training images")
    for control in results["control"].values():
        for t in control["tests"]:
            null = f"mean {t['mean']:+.2f}, 95 % between {t['low']:+.2f} and {t['high']:+.2f}"
            found = f"G{t['group']}* {t['observed']:+7.2f} ({t['observed_images']:+d} of {t['n']})"
            print(f"  {found}; {t['sets']} random sets of {t['random']}: {null}, p = {t['p']:.3f}")
        print(control["sentence"])


def plot_changes(rows, groups, args, how, sigmas, path):
    """Figures 2, 4, 5, 11, 12: change of each group under its own neurons, a bar per k, a panel per
    criterion and sigma; whiskers: standard deviation over repeats. Zeroing also shows random
    neurons (mean and 95 % range)."""
    zero, ks = how == "zero", [k for k in args.top_k if k <= FEW_NEURONS]
    sigmas, slots = [""] if zero else sigmas, len(ks) + zero  # one more slot for random neurons
    shape = (2, len(sigmas)) if len(sigmas) > 1 else (1, 2)
    fig = Figure(figsize=(4.6 * shape[1], 3.2 * shape[0]), layout="constrained")
    axes = fig.subplots(*shape, sharey=True, squeeze=False)
    for ax, (criterion, sigma) in zip(axes.flat, product(CRITERIA, sigmas)):
        for n, k in enumerate(ks):
            wanted = dict(zip(KEY[:4], (criterion, how, sigma, k)))
            means, spread = [], []
            for g in groups:
                found = own(rows, g["group"], **wanted, split="train")
                changes = [change(row) for row in found]
                means.append(np.mean(changes))
                spread.append(np.std(changes, ddof=1) if len(changes) > 1 else 0)
            ax.bar(
                np.arange(len(groups)) + 0.8 * (n + 0.5) / slots - 0.4,
                means,
                0.76 / slots,
                color=matplotlib.colormaps["Greys"](0.2 + 0.5 * n / max(len(ks) - 1, 1)),
                edgecolor="black",
                lw=0.5,
                label=f"top {k}",
                yerr=spread if any(spread) else None,
                error_kw={"lw": 0.8, "capsize": 2},
            )
        if zero:
            plot_null(ax, rows, groups)
        ax.axhline(0, color="black", lw=0.6)
        names = [f"{short(g)}\n" + g["name"].replace(" on ", "\non ") for g in groups]
        ax.set_xticks(range(len(groups)), names, fontsize=7)
        ax.set_title(f"{criterion}{f', sigma = {sigma}' if sigma else ''}", fontsize=10)
        ax.grid(axis="y", color="0.9")
        ax.set_axisbelow(True)
    for ax in axes[:, 0]:
        ax.set_ylabel("change in training\naccuracy (points)")
    handles = axes.flat[0].get_legend_handles_labels()
    fig.legend(*handles, loc="outside lower center", ncols=4, fontsize=8)
    what = {"zero": "Zeroing", "random-init": "Random initialisation of"}
    spread = "" if zero else f"; mean and standard deviation of {args.repeats} draws"
    heading = f"{what.get(how, 'Random noise added to')} the top neurons (* minority{spread})"
    fig.suptitle(heading, fontsize=11)
    common.save_figure(fig, path)


def plot_null(ax, rows, groups):
    """Random neurons of all layers, zeroed: mean and 95 % range for each minority group."""
    label = f"random {FEW_NEURONS}, mean and 95 % range"
    for j, g in enumerate(groups):
        others = pick(rows, criterion="random", selected_by="all layers", group=g["group"])
        null = [change(row) for row in others]
        if null:
            mean, (low, high) = np.mean(null), middle_95(null)
            reach = [[max(mean - low, 0)], [max(high - mean, 0)]]
            style = {"fmt": "D", "color": "black", "mfc": "white", "ms": 4, "capsize": 3}
            ax.errorbar(j + 0.3, mean, reach, label=label, **style)
            label = None  # once in the legend


def plot_ranks(neurons, shown, path):
    """Figure 3: where the neurons of one criterion stand in the ranking of the other."""
    fig = Figure(figsize=(9, 3), layout="constrained")
    for ax, criterion, other in zip(fig.subplots(1, 2), CRITERIA, CRITERIA[::-1]):
        values = [row[f"{other}_percentile"] for row in pick(neurons, criterion=criterion)]
        ax.hist(values, np.arange(0, 101, 5), color="0.6", edgecolor="black", lw=0.5)
        ax.yaxis.get_major_locator().set_params(integer=True)  # they are counts
        of = "of each group" if criterion == "gradient" else "of the network"
        ax.set(title=f"largest {criterion} {of}", xlim=(0, 100), ylabel="neurons")
        ax.set_xlabel(f"{other} ranking among all neurons (%)")
    fig.suptitle(f"Ranking of the {shown} by the other criterion", fontsize=11)
    common.save_figure(fig, path)


def plot_layers(neurons, groups, layers, shown, path):
    """Figure 8: in which layers the critical neurons lie, a row per set, layers in network
    order."""
    sets = {("gradient", g["group"]): f"gradient {short(g)}" for g in groups}
    sets["magnitude", "all"] = "magnitude"
    counts = np.zeros((len(sets), len(layers)), int)
    for row in neurons:
        at = list(sets).index((row["criterion"], row["selected_by"]))
        counts[at, layers.index(row["layer"])] += 1
    fig = Figure(figsize=(4.5 + 0.2 * len(layers), 3.6), layout="constrained")
    ax = fig.subplots()
    image = ax.imshow(counts, cmap="Greys", aspect="auto", vmin=0)
    for i, j in zip(*counts.nonzero()):
        colour = "white" if counts[i, j] > counts.max() / 2 else "black"
        ax.text(j, i, counts[i, j], ha="center", va="center", fontsize=7, color=colour)
    ax.set_xticks(range(len(layers)), layers, rotation=90, fontsize=6)
    ax.set_yticks(range(len(sets)), sets.values(), fontsize=8)
    ax.set(title=f"Where the {shown} lie (* minority)", xlabel="layer, from input to output")
    ax.set_ylabel("selected by")
    fig.colorbar(image, label="neurons")
    common.save_figure(fig, path)


if __name__ == "__main__":
    arguments = parse_args()
    again = "nothing was written; the same command starts again"
    with common.script(arguments.run / "trace", again), common.machine(arguments):
        main(arguments)
