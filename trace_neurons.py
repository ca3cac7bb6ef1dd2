"""Stage 2: unstructured tracing. Which few neurons of the whole network carry a group's training accuracy?

    python trace_neurons.py                                     # the run of train_erm.py, two minutes on one core
    python trace_neurons.py --run runs/wb0 --max-per-group 200

Paper: section 2.1.1, Figures 2-5, 8, 11, 12, Tables 3, 11, 13, 14. Neurons with the largest gradient (one set
I_j per group j) or magnitude (one set) are zeroed, replaced by noise or disturbed by noise, and beside them
random neurons are zeroed, a control that the paper lacks. Changes are signed, in percentage points; the
paper's |change| of group j under I_j is the diagonal. Neurons come from training images and stay the same
on test images. Reads RUN/erm/best.pt and its data; writes RUN/trace/ (replaced): args.json, neurons.csv,
accuracy.csv, results.json, fig02_zero.png, fig03_ranks.png, fig04_random_init.png, fig05_random_noise.png,
fig08_layers.png, fig11_random_init_sigmas.png, fig12_random_noise_sigmas.png.
"""

import argparse
import math
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np
import torch

from common import (MODIFICATIONS, BadInput, Variant, accuracy_under, check_flags, fill_defaults, gradient_scores,
                    group_report, locate, magnitude_scores, neuron_unit, one_line_errors, plain, predict,
                    prunable_layers, reopen, sample_groups, top_neurons, whole_folder, worst_images, write_csv,
                    write_json)

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - after the choice of a backend that needs no screen

DEFAULTS = {"synthetic": dict(max_per_group=100), "other": dict(max_per_group=None)}  # by kind of data
COLUMNS = ("criterion", "modification", "sigma", "k", "repeat", "selected_by", "split", "group", "n", "correct_before",
           "correct_after", "to_wrong", "to_right")
FEW = 2  # images; a loss larger than that of random neurons by no more is no finding, however rare


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--run", type=Path, default="runs/synthetic", help="run folder shared by all stages (default %(default)s)")

    g = p.add_argument_group("what is traced")
    g.add_argument("--checkpoint", type=Path, help="model to trace (default RUN/erm/best.pt)")
    g.add_argument("--data", help="where the data are now, if they moved since training (default: as the checkpoint says)")
    g.add_argument("--max-per-group", type=int, metavar="N",
                   help="trace a random sample of so many training and so many test images of each group; minority groups in "
                        "training always whole (default all; synthetic: 100)")

    g = p.add_argument_group("neurons")
    g.add_argument("--unit", choices=["auto", "channel", "weight"], default="auto",
                   help="a neuron is a channel or a single weight (default auto: channel, in transformers weight)")
    g.add_argument("--gradient-samples", choices=["group", "worst"], default="group",
                   help="gradient over all traced training images of a group, or over 128 drawn from its 256 with the highest "
                        "loss, as in section 4.1 (default %(default)s)")

    g = p.add_argument_group("modifications")
    g.add_argument("--modifications", nargs="+", choices=MODIFICATIONS, default=list(MODIFICATIONS), metavar="HOW",
                   help="what is done to the neurons: zero, random-init, random-noise (default: all three)")
    g.add_argument("--top-k", type=int, nargs="+", metavar="K", default=[1, 2, 3, 5, 10],
                   help="how many neurons are zeroed (default 1 2 3 5 10)")
    g.add_argument("--random-top-k", type=int, nargs="+", metavar="K", default=[1, 2, 3],
                   help="those of --top-k at which the random modifications are made and figures drawn (default 1 2 3)")
    g.add_argument("--sigma", type=float, nargs="*", metavar="S", default=[0.005, 0.01, 0.02],
                   help="standard deviations of the random modifications, in units of the weights; figures 4 and 5 show the "
                        "first (default 0.005 0.01 0.02)")
    g.add_argument("--repeats", type=int, default=10, help="draws of each random modification (default %(default)s)")
    g.add_argument("--all-groups", action="store_true",
                   help="random modifications under every I_j on all groups and on test images too, many times the work "
                        "(default: on group j, and on test images only the noise of Table 13; zeroing always on all groups)")

    g = p.add_argument_group("control")
    g.add_argument("--controls", type=int, default=40,
                   help="random neuron sets of each kind, 0 or at least 19 (default %(default)s)")
    g.add_argument("--control-k", type=int, default=3,
                   help="neurons in each of them, one of --top-k (default %(default)s)")

    g = p.add_argument_group("run")
    g.add_argument("--seed", type=int, default=0, help="of samples, noise and random neurons (default %(default)s)")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default %(default)s)")
    g.add_argument("--batch-size", type=int, default=128, help="images per forward pass (default %(default)s)")
    g.add_argument("--cache", type=Path, default="runs/cache", help="where decoded images are kept (default %(default)s)")
    return p.parse_args()


def check(args, n_neurons):
    """Refuse settings that do nothing or cannot be."""
    if set(args.modifications) != {"zero"} and not (args.sigma and min(args.sigma) > 0 and args.repeats > 0):
        raise BadInput("random modifications need --sigma above 0 and --repeats of at least 1; without noise they do nothing")
    if min(args.top_k + args.random_top_k) < 1 or max(args.top_k) > n_neurons:
        raise BadInput(f"--top-k {' '.join(map(str, args.top_k))}: expected 1 to {n_neurons}, the network's neurons")
    if not set(args.random_top_k) <= set(args.top_k):
        raise BadInput("--random-top-k: expected numbers that are among --top-k")
    if args.controls and (args.controls < 19 or args.control_k not in args.top_k or "zero" not in args.modifications):
        raise BadInput("--controls: at least 19 sets (fewer cannot give p <= 0.05), --control-k among --top-k and zero among "
                       "--modifications are needed; or --controls 0")


def main():
    args = parse_args()
    check_flags(args, "batch_size", *(["max_per_group"] if args.max_per_group is not None else []))
    args.checkpoint = args.checkpoint or args.run / "erm" / "best.pt"
    model, checkpoint, splits = reopen(args.checkpoint, args.data, args.cache, args.device)
    model.to(memory_format=torch.channels_last)  # the same numbers; convolution and pooling are faster so on a CPU
    size, groups, train = checkpoint["size"], splits["train"].groups, splits["train"]
    fill_defaults(args, DEFAULTS["synthetic" if (args.data or checkpoint["data"]["data"]) == "synthetic" else "other"])
    unit = neuron_unit(model, args.unit)
    sizes = {layer: w.numel() if unit == "weight" else len(w) for layer, w in prunable_layers(model).items()}
    check(args, sum(sizes.values()))
    print(" ".join(f"{key}={value}" for key, value in plain(args).items()))
    minority = [g["group"] for g in groups if g["minority"]]

    # How much was memorised at all, over all images
    logits = {name: predict(model, split, size, args.device, args.batch_size) for name, split in splits.items()}
    reports = {name: group_report(logits[name].argmax(1), split.y, split.g, groups) for name, split in splits.items()}
    print_memorised(reports)

    # Scores and the sets I_j, from training images alone
    index = {name: sample_groups(split, args.max_per_group, minority if name == "train" else (), args.seed)
             for name, split in splits.items()}
    scores = {("magnitude", "all"): magnitude_scores(model, unit)}
    for j in range(len(groups)):
        members = index["train"][train.g[index["train"]] == j]
        if args.gradient_samples == "worst":
            generator = torch.Generator().manual_seed(args.seed)
            members = worst_images(logits["train"], train.y, (train.g == j).nonzero()[:, 0], generator)
        scores["gradient", j] = gradient_scores(model, train, members, size, unit, args.device, args.batch_size)
    listed = max(math.ceil(1e-4 * sum(sizes.values())), *args.top_k)  # the top 0.01 % of Figures 3 and 8, or the largest k
    ranked = {key: top_neurons(values, listed) for key, values in scores.items()}

    # All modified models, and their accuracies
    rows = []
    for name, split in splits.items():
        keyed = plan(args, ranked, name) + (random_sets(args, ranked, sizes, minority) if name == "train" else [])
        variants = [variant for _, variant in keyed]
        counts = accuracy_under(model, split, size, variants, unit, index[name], args.device, args.batch_size)
        for (key, _), groups_of in zip(keyed, counts):
            rows += [dict(zip(COLUMNS, (*key, name, j, *count.values()))) for j, count in groups_of.items()]

    control = {criterion: compare(rows, criterion, groups, minority, args) for criterion in ("gradient", "magnitude")}
    results = {"stage": "trace", "checkpoint": str(args.checkpoint), "epoch": checkpoint.get("epoch"), "unit": unit,
               "neurons": sum(sizes.values()), "layers": len(sizes), "listed": listed, "splits": reports, "control": control,
               "images": {name: torch.bincount(split.g[index[name]], minlength=len(groups)).tolist()
                          for name, split in splits.items()},
               "matrix": {f"{criterion} {name}": matrix(rows, criterion, name, max(args.random_top_k), groups)
                          for criterion, name in product(("gradient", "magnitude"), splits)}}
    table = neuron_table(ranked, scores)

    folder = args.run / "trace"
    with whole_folder(folder, args) as new:
        write_csv(new / "neurons.csv", table)
        write_csv(new / "accuracy.csv", rows)
        if "zero" in args.modifications:
            plot_changes(rows, groups, args, "zero", args.sigma[:1], new / "fig02_zero.png")
        plot_ranks(table, new / "fig03_ranks.png", listed, sum(sizes.values()))
        plot_layers(table, groups, list(sizes), new / "fig08_layers.png", listed, sum(sizes.values()))
        for how, first, all_sigmas in (("random-init", "fig04_random_init", "fig11_random_init_sigmas"),
                                       ("random-noise", "fig05_random_noise", "fig12_random_noise_sigmas")):
            if how in args.modifications:
                plot_changes(rows, groups, args, how, args.sigma[:1], new / f"{first}.png")
                plot_changes(rows, groups, args, how, args.sigma, new / f"{all_sigmas}.png")
        write_json(new / "results.json", results)
    print_tables(rows, groups, args, results)
    print(f"wrote {folder}/")


def plan(args, ranked, split):
    """Every modified model but the controls, as (key, variant); key: criterion, modification, sigma, k, repeat, selected_by.
    Random modifications are most of the work; they are made where a table or a figure shows them."""
    planned = []
    for (criterion, by), neurons in ranked.items():
        if "zero" in args.modifications:
            planned += [((criterion, "zero", "", k, "", by), Variant(neurons[:k])) for k in args.top_k]
        groups = None if args.all_groups or by == "all" else (by,)
        shown = ("random-init", "random-noise") if split == "train" or args.all_groups else (
            ("random-noise",) if criterion == "gradient" else ())  # of the tables only 13 has test columns
        random_ones = [how for how in args.modifications if how in shown]
        for how, sigma, k, repeat in product(random_ones, args.sigma, args.random_top_k, range(args.repeats)):
            planned.append(((criterion, how, sigma, k, repeat, by),
                            Variant(neurons[:k], how, sigma, args.seed * 10000 + repeat, groups)))
    return planned


def random_sets(args, ranked, sizes, minority):
    """The control: random sets of --control-k neurons, zeroed, over the minority groups, as (key, variant). One kind
    uniform over all neurons, one kind for each critical set with as many neurons in each layer as that set has."""
    rng, k, sets = np.random.default_rng(args.seed), args.control_k, []
    for repeat in range(args.controls):
        drawn = locate(rng.choice(sum(sizes.values()), k, replace=False), sizes)
        sets.append((("random", "zero", "", k, repeat, "all layers"), Variant(drawn, groups=tuple(minority))))
        for (criterion, by), neurons in ranked.items():
            layers = [layer for layer, _ in neurons[:k]]
            drawn = [(layer, int(i)) for layer in dict.fromkeys(layers)
                     for i in rng.choice(sizes[layer], layers.count(layer), replace=False)]
            if by == "all" or by in minority:
                sets.append((("random", "zero", "", k, repeat, f"layers of {criterion} {by}"),
                             Variant(drawn, groups=tuple(minority) if by == "all" else (by,))))
    return sets


def change(row):
    """Accuracy after minus before, in percentage points."""
    return 100 * (row["correct_after"] - row["correct_before"]) / row["n"]


def pick(rows, **wanted):
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def p_value(observed, null):
    """Share of random sets, the observed one counted in, that lower the accuracy at least as much."""
    return (1 + sum(value <= observed for value in null)) / (1 + len(null))


def compare(rows, criterion, groups, minority, args):
    """Do the critical neurons of a criterion lower a minority group's training accuracy more than random ones? Yes where
    of either kind of random sets at most 5 % lower it as much, AND the loss is more than FEW images larger than the mean
    loss of random sets: p says how rare a loss is, not how large, and where random sets change nothing one image is rare.
    Returns {"beats": {group: bool}, "sentence", "tests": list of dicts per group and kind of random set}."""
    tests, beats, k = [], {}, args.control_k
    for j in minority if args.controls else []:
        by = "all" if criterion == "magnitude" else j
        row = pick(rows, criterion=criterion, modification="zero", k=k, selected_by=by, split="train", group=j)[0]
        observed, images = change(row), row["correct_after"] - row["correct_before"]
        for kind in ("all layers", f"layers of {criterion} {by}"):
            null = [change(other) for other in pick(rows, criterion="random", selected_by=kind, split="train", group=j)]
            low, high = np.quantile(null, [0.025, 0.975])
            tests.append({"group": j, "random": "all layers" if kind == "all layers" else "same layers", "n": row["n"],
                          "observed": observed, "observed_images": images, "null_mean": float(np.mean(null)),
                          "null_low": float(low), "null_high": float(high), "sets": len(null), "p": p_value(observed, null)})
        random_loss = min(0, *(test["null_mean"] for test in tests[-2:])) * row["n"] / 100  # in images, 0 or less
        beats[j] = all(test["p"] <= 0.05 for test in tests[-2:]) and images < random_loss - FEW
    return {"beats": beats, "tests": tests, "sentence": verdict(criterion, beats, tests, groups, k)}


def verdict(criterion, beats, tests, groups, k):
    """One sentence that says yes, no or in part, and where a loss is rare among random sets but too small to count."""
    if not beats:
        why = "no --controls" if any(g["minority"] for g in groups) else "no minority group"
        return f"{criterion}: not compared with random neurons ({why})"
    parts = []
    for j in beats:
        both = [test for test in tests if test["group"] == j]
        observed = f"G{j}* {both[0]['observed']:+.1f} points ({both[0]['observed_images']:+d} of {both[0]['n']} images)"
        if not beats[j] and all(test["p"] <= 0.05 for test in both):
            observed += f", rare but within {FEW} images of what random ones lose,"
        null = [f"{t['null_mean']:+.1f} for random ones of {t['random'].replace('same', 'the same')} (p = {t['p']:.3f})"
                for t in both]
        parts.append(f"{observed} against {' and '.join(null)}")
    part = ", ".join(f"G{j}*" for j in beats if beats[j])
    answer = "yes" if all(beats.values()) else f"only for {part}" if part else "no"
    return (f"{criterion}: do its top {k} neurons lower minority accuracy more than random neurons? {answer}: "
            + "; ".join(parts))


def matrix(rows, criterion, split, k, groups):
    """Signed changes by zeroing the top k, a list per selection set over all groups (None: no image)."""
    cells = {(row["selected_by"], row["group"]): {"points": change(row), **{key: row[key] for key in COLUMNS[8:]}}
             for row in pick(rows, criterion=criterion, modification="zero", k=k, split=split)}
    sets = ["all"] if criterion == "magnitude" else [g["group"] for g in groups]
    return [[cells.get((by, g["group"])) for g in groups] for by in sets]


def percentile(values, ordered):
    """Place of values (m,) among all scores, given in ascending order (M,): 0 the smallest, 100 the largest, equals in
    the middle of their places."""
    below, up_to = torch.searchsorted(ordered, values), torch.searchsorted(ordered, values, right=True)
    return 50 * (below + up_to - 1).double() / max(len(ordered) - 1, 1)


def neuron_table(ranked, scores):
    """Rows of neurons.csv. Percentiles are among all neurons of the network; the gradient's is that of the set's own
    group, for the magnitude's set the highest over the groups."""
    ordered = {key: torch.cat([values.cpu() for values in layers.values()]).sort().values for key, layers in scores.items()}
    rows = []
    for (criterion, by), neurons in ranked.items():
        at = {key: torch.stack([scores[key][layer][i] for layer, i in neurons]).cpu() for key in scores}
        places = {key: percentile(at[key], ordered[key]) for key in scores if key[0] == "magnitude" or by in ("all", key[1])}
        gradient = torch.stack([place for key, place in places.items() if key[0] == "gradient"]).amax(0)
        for rank, (layer, i) in enumerate(neurons):
            rows.append({"criterion": criterion, "selected_by": by, "rank": rank + 1, "layer": layer, "index": i,
                         "score": float(at[criterion, by][rank]),
                         "magnitude_percentile": round(float(places["magnitude", "all"][rank]), 4),
                         "gradient_percentile": round(float(gradient[rank]), 4)})
    return rows


def title(group):
    return f"G{group['group']}{'*' if group['minority'] else ''}"


def print_memorised(reports):
    """What there is to trace: images the model gets right, and training minus test accuracy."""
    print(f"\nHow much was memorised\n{'group':32s} {'train right':>16s} {'train %':>8s} {'test %':>8s} {'train - test':>13s}")
    for train, test in zip(reports["train"]["groups"], reports["test"]["groups"]):
        gap = (f"{100 * test['acc']:8.1f} {100 * (train['acc'] - test['acc']):+13.1f}") if test["n"] else f"{'-':>8s}"
        name = f"{train['group']} {train['name']}{'*' if train['minority'] else ''}"
        print(f"{name:32s} {train['correct']:7d} of {train['n']:5d} {100 * train['acc']:8.1f} {gap}")


def cell(rows):
    """Mean change in points over repeats with the mean number of images gained or lost."""
    if not rows:
        return f"{'-':>18s}"
    images = np.mean([row["correct_after"] - row["correct_before"] for row in rows])
    return f"{np.mean([change(row) for row in rows]):+8.2f} ({images:+7.1f})"


def own(rows, group, **wanted):
    """The rows of a group under its own set: the one selected by it, or magnitude's."""
    return [row for row in pick(rows, group=group["group"], **wanted) if row["selected_by"] in ("all", group["group"])]


def print_table(head, rows, groups, lines, splits=("train",)):
    """One of the paper's tables; lines: (label, dict of what a row must have), each group under its own set."""
    print(f"\n{head}\n{'':34s}" + "".join(f" {f'{title(g)} {split}':>18s}" for split in splits for g in groups))
    for label, wanted in lines:
        print(f"{label:34s}" + "".join(f" {cell(own(rows, g, split=split, **wanted))}" for split in splits for g in groups))


def print_tables(rows, groups, args, results):
    """Tables 3, 11, 13, 14, the full matrix and the control: signed points (and images), means over repeats."""
    def lines(criterion, how, ks, sigmas, name=""):
        return [(f"{name or how} top {k}{f' sigma {sigma}' if sigma else ''}",
                 dict(criterion=criterion, modification=how, k=k, sigma=sigma))
                for sigma in sigmas for k in ks if how in args.modifications]
    ks, first = args.random_top_k, args.sigma[:1]
    zero = lines("gradient", "zero", ks, [""])
    print("\nChange in accuracy, percentage points (images); each group under the neurons selected by it; * minority")
    print_table("Table 3. Magnitude, zero", rows, groups, lines("magnitude", "zero", args.top_k, [""]))
    print_table("Table 11. Gradient, zero and random init", rows, groups,
                zero + lines("gradient", "random-init", ks, args.sigma))
    print_table("Table 13. Gradient, training against test images", rows, groups,
                zero + lines("gradient", "random-noise", ks, args.sigma), ("train", "test"))
    print_table("Table 14. Values of Figures 4 and 5", rows, groups,
                lines("gradient", "random-init", ks, first, "Figure 4 (left)")
                + lines("magnitude", "random-init", ks, first, "Figure 4 (right)")
                + lines("gradient", "random-noise", ks, first, "Figure 5 (left)")
                + lines("magnitude", "random-noise", ks, first, "Figure 5 (right)"))
    print(f"\nZeroing the top {max(ks)}: points (images right to wrong, wrong to right), every group under every set")
    for name, sets in results["matrix"].items():
        for g, cells in zip(groups, sets):
            print(f"{name + ('' if name.startswith('magnitude') else f' {title(g)}'):24s}" + "".join(
                f" {c['points']:+8.2f} (-{c['to_wrong']}, +{c['to_right']})".ljust(22) if c else f"{'-':>22s}" for c in cells))
    print("\nControl: the critical neurons against random ones, zeroed, training images")
    for criterion in results["control"].values():
        for t in criterion["tests"]:
            print(f"  {title(groups[t['group']])} {t['observed']:+7.2f}; {t['sets']} random sets, {t['random']}: "
                  f"mean {t['null_mean']:+.2f}, 95 % between {t['null_low']:+.2f} and {t['null_high']:+.2f}, p = {t['p']:.3f}")
        print(criterion["sentence"])


def plot_changes(rows, groups, args, how, sigmas, path):
    """Figures 2, 4, 5, 11, 12: change of each group under its own neurons, a bar per k. One panel per criterion and
    sigma; whiskers: standard deviation over repeats. Zeroing also shows random neurons (mean and 95 % range)."""
    zero, ks = how == "zero", args.random_top_k
    sigmas, slots = [""] if zero else sigmas, len(ks) + zero  # one more slot for the random neurons
    shape = (2, len(sigmas)) if len(sigmas) > 1 else (1, 2)
    fig, axes = plt.subplots(*shape, figsize=(4.6 * shape[1], 3.2 * shape[0]), layout="constrained", sharey=True,
                             squeeze=False)
    names = [f"{title(g)}\n{g['name'].replace(' on ', chr(10) + 'on ')}" for g in groups]
    for ax, (criterion, sigma) in zip(axes.flat, product(("gradient", "magnitude"), sigmas)):
        for n, k in enumerate(ks):
            wanted = dict(criterion=criterion, modification=how, sigma=sigma, k=k, split="train")
            found = [[change(row) for row in own(rows, g, **wanted)] for g in groups]
            spread = [np.std(values, ddof=1) if len(values) > 1 else 0 for values in found]
            ax.bar(np.arange(len(groups)) + 0.8 * (n + 0.5) / slots - 0.4, [np.mean(values) for values in found], 0.76 / slots,
                   color=plt.cm.Greys(0.2 + 0.5 * n / max(len(ks) - 1, 1)), edgecolor="black", lw=0.5, label=f"top {k}",
                   yerr=spread if any(spread) else None, error_kw={"lw": 0.8, "capsize": 2})
        if zero:
            plot_null(ax, rows, groups, args.control_k)
        ax.axhline(0, color="black", lw=0.6)
        ax.set_xticks(range(len(groups)), names, fontsize=7)
        ax.set_title(f"{criterion}{f', sigma = {sigma}' if sigma else ''}", fontsize=10)
        ax.grid(axis="y", color="0.9")
        ax.set_axisbelow(True)
    for ax in axes[:, 0]:
        ax.set_ylabel("change in training\naccuracy (points)")
    fig.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    what = {"zero": "Zeroing", "random-init": "Random initialisation of", "random-noise": "Random noise added to"}[how]
    spread = f"; mean and standard deviation of {args.repeats} draws" if not zero and args.repeats > 1 else ""
    fig.suptitle(f"{what} the top neurons (* minority{spread})", fontsize=11)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def plot_null(ax, rows, groups, k):
    """Random neurons of all layers, zeroed: mean and 95 % range for each minority group."""
    label = f"random {k}, mean and 95 % range"
    for j, g in enumerate(groups):
        null = [change(row) for row in pick(rows, criterion="random", selected_by="all layers", group=g["group"])]
        if null:
            mean, (low, high) = np.mean(null), np.quantile(null, [0.025, 0.975])
            ax.errorbar(j + 0.3, mean, [[max(mean - low, 0)], [max(high - mean, 0)]], fmt="D", color="black", mfc="white",
                        ms=4, capsize=3, label=label)
            label = None  # once in the legend


def plot_ranks(table, path, listed, total):
    """Figure 3: where the neurons of one criterion stand in the ranking of the other, in bins of 5 %."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    for ax, criterion, other in zip(axes, ("gradient", "magnitude"), ("magnitude", "gradient")):
        values = [row[f"{other}_percentile"] for row in pick(table, criterion=criterion)]
        ax.hist(values, np.arange(0, 101, 5), color="0.6", edgecolor="black", lw=0.5)
        ax.yaxis.get_major_locator().set_params(integer=True)  # they are counts
        ax.set(xlabel=f"{other} ranking among all neurons (%)", ylabel="neurons", xlim=(0, 100),
               title=f"the {listed} largest by {criterion}{' of each group' if criterion == 'gradient' else ''}")
    fig.suptitle(f"Ranking of the top {listed} of {total} neurons ({100 * listed / total:.2g} %) by the other criterion",
                 fontsize=11)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def plot_layers(table, groups, layers, path, listed, total):
    """Figure 8: in which layers the critical neurons lie, a row per selection set, layers in network order."""
    sets = [("gradient", g["group"], f"gradient {title(g)}") for g in groups] + [("magnitude", "all", "magnitude")]
    counts = np.array([[len(pick(table, criterion=criterion, selected_by=by, layer=layer)) for layer in layers]
                       for criterion, by, _ in sets])
    fig, ax = plt.subplots(figsize=(4.5 + 0.2 * len(layers), 3.6), layout="constrained")
    image = ax.imshow(counts, cmap="Greys", aspect="auto", vmin=0)
    for i, j in zip(*counts.nonzero()):
        colour = "white" if counts[i, j] > counts.max() / 2 else "black"
        ax.text(j, i, counts[i, j], ha="center", va="center", fontsize=7, color=colour)
    ax.set_xticks(range(len(layers)), layers, rotation=90, fontsize=6)
    ax.set_yticks(range(len(sets)), [name for *_, name in sets], fontsize=8)
    ax.set(title=f"Where the top {listed} of {total} neurons ({100 * listed / total:.2g} %) lie (* minority)",
           xlabel="layer, from input to output", ylabel="selected by")
    fig.colorbar(image, label="neurons")
    fig.savefig(path, dpi=120)
    plt.close(fig)


if __name__ == "__main__":
    with one_line_errors("nothing was written"):
        main()
