"""Stage 2: unstructured tracing. Which few neurons carry a group's training accuracy?

    python trace_neurons.py                                     # the run of train_erm.py
    python trace_neurons.py --run runs/wb0 --max-per-group 200

Paper: section 2.1.1, Figures 2-5, 8, 11, 12, Tables 3, 11, 13, 14. The neurons of largest magnitude
(one set) or gradient (one set I_j for each group j) are zeroed, replaced by noise or disturbed by
noise; beside them random neurons are zeroed, a control that the paper lacks. Changes are signed, in
percentage points; where the paper gives |change| of group j under I_j, the printed table has it
signed. Neurons are chosen on training images and stay the same on test images. Reads
RUN/erm/best.pt and its data; writes RUN/trace/: args.json, neurons.csv, accuracy.csv, results.json
and the figures.
"""

import itertools
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also for python -P
import common
from common import BadInput, change, short

FEW_IMAGES = 2  # critical neurons must cost over so many images more than random ones on average
FIGURES = (
    "fig02_zero.png",
    "fig03_ranks.png",
    "fig04_random_init.png",
    "fig05_random_noise.png",
    "fig08_layers.png",
    "fig11_random_init_sigmas.png",
    "fig12_random_noise_sigmas.png",
)
FILES = ("args.json", "neurons.csv", "accuracy.csv", "results.json", *FIGURES)
LINE = ("criterion", "modification", "sigma", "k", "split", "selected_by")  # of printed changes


def parse_args(argv=None):
    p = common.make_parser(f"{__doc__}\nIn brackets: the default.")
    common.add_tracing_flags(p)
    g = p.add_argument_group("neurons")
    g.add_argument(
        "--gradient-samples",
        choices=["group", "worst"],
        default="group",
        help="the gradient is that of all traced training images of a group (section 2.1.1), or of "
        "128 drawn from its 256 with the highest loss (section 4.1) (group)",
    )
    g = p.add_argument_group("modifications")
    g.add_argument(
        "--top-k",
        type=common.positive_int,
        nargs="+",
        default=[1, 2, 3, 5, 10],
        metavar="K",
        help="every K is zeroed; noise and the figures of changes use the three smallest, and the "
        "random sets are as large as the largest of those three (1 2 3 5 10)",
    )
    g.add_argument(
        "--sigma",
        type=common.positive_float,
        nargs="+",
        default=[0.005, 0.01, 0.02],
        help="standard deviation of noise, in units of weights (0.005 0.01 0.02)",
    )
    g.add_argument(
        "--repeats",
        type=common.positive_int,
        default=10,
        help="draws of noise, the same ones for every K, sigma and criterion (10)",
    )
    g.add_argument(
        "--controls",
        type=common.between(int, 0, 10**6),
        default=40,
        help="random sets of neurons: so many drawn from all layers, and for each critical set so "
        "many drawn from that set's layers. 0 makes none; fewer than 39 give no 95 %% range and "
        "are refused (40)",
    )
    args = p.parse_args(argv)
    if 0 < args.controls < 39:
        p.error(f"--controls {args.controls}: expected 0, or at least 39 for a 95 % range")
    args.top_k = sorted(set(args.top_k))
    args.sigma = list(dict.fromkeys(args.sigma))  # the first one has figures of its own
    return args


def main(args):
    # The network and its data
    model, checkpoint, table, weights, counts, about = common.open_traced(args)
    groups = table.groups
    minority = [group["group"] for group in groups if group["minority"]]
    total = sum(counts.values())
    if max(args.top_k) > total:
        raise BadInput(f"--top-k {max(args.top_k)}: the network has {total} neurons")
    folder = args.run / "trace"
    common.open_folder(folder, FILES)

    # What there is to trace: accuracy over all images, and a sample of each group
    def batches(images, index=None):
        return common.Batches(images, args.device, args.batch_size, args.workers, index=index)

    splits = {}
    loaders = {}
    index = {}
    for name in ("train", "test"):
        splits[name] = common.open_split(checkpoint, table, name)
        loaders[name] = batches(splits[name])
        index[name] = common.sample_groups(
            splits[name].g, groups, args.max_per_group, whole=name == "train", seed=args.seed
        )
    reports, logits = common.evaluate(model, loaders, groups)
    common.print_splits("The network as it is", reports)

    # Gradients of the traced training images: of each group, and of all of them together
    gradients = {}
    for j, members in enumerate(index["train"]):
        if args.gradient_samples == "worst":
            generator = torch.Generator().manual_seed(args.seed)
            of_group = (splits["train"].g == j).nonzero()[:, 0]
            members = common.worst_images(logits["train"], splits["train"].y, of_group, generator)
        gradients[j] = common.mean_gradient(model, weights, batches(splits["train"], members))
    gradients["all"] = common.mean_gradient(
        model, weights, batches(splits["train"], torch.cat(index["train"]))
    )

    # Scores, and the critical sets: I_j for each group j or, where a criterion needs no gradient,
    # one set for all
    listed = max(math.ceil(1e-4 * total), *args.top_k)
    scores = {}
    ranked = {}
    for criterion in common.CRITERIA:
        for by, gradient in gradients.items():
            scores[criterion, by] = common.score_neurons(weights, gradient, criterion, args.unit)
        for by in range(len(groups)) if common.needs_gradient(criterion) else ["all"]:
            ranked[criterion, by] = common.top_neurons(scores[criterion, by], listed)
    neurons = neuron_table(ranked, scores)

    # All modified networks, and what they get right
    rows = []
    few = args.top_k[:3]  # for noise, figures and, the largest of them, the control
    passes = common.OnePass()
    for name, images in splits.items():
        planned = plan(args, ranked, few, name, groups)
        if name == "train":
            planned += random_sets(args, ranked, few[-1], counts, minority)
        rows += common.count_planned(
            model,
            planned,
            (batches(images, members) for members in index[name]),
            weights,
            args.unit,
            passes,
            split=name,
        )

    # Numbers first, so that they do not depend on figures
    control = []
    for criterion in common.CRITERIA:
        control += control_test(rows, criterion, few[-1], groups)
    results = {
        "stage": "trace",
        **about,
        "neurons": total,
        "layers": len(counts),
        "listed": listed,
        "few": few[-1],
        "groups": groups,
        "splits": reports,
        "changes": mean_changes(rows),
        "ranks": rank_shares(neurons),
        "control": control,
    }
    common.write(
        folder,
        {
            "args.json": common.run_record("trace", args),
            "neurons.csv": neurons,
            "accuracy.csv": rows,
            "results.json": results,
        },
        remove=FIGURES,
    )
    print_changes(results["changes"], groups)
    if control:
        common.print_rows(
            f"Do the top {few[-1]} cost minorities more training accuracy than random ones? "
            "observed, mean, low and high in points; 95 % of random sets lie between low and high",
            [{**test, "group": short(groups[test["group"]])} for test in control],
        )
    else:
        print("\nno control: it takes a minority group and --controls")

    shown = f"top {listed} neurons of each set (of {total}, {100 * listed / total:.2g} %)"
    figures = {
        "fig02_zero.png": plot_changes(rows, groups, few, "zero", [""]),
        "fig03_ranks.png": plot_ranks(neurons, shown),
        "fig08_layers.png": plot_layers(neurons, groups, list(counts), shown),
    }
    for how, one_sigma, all_sigmas in (
        ("random-init", "fig04_random_init.png", "fig11_random_init_sigmas.png"),
        ("random-noise", "fig05_random_noise.png", "fig12_random_noise_sigmas.png"),
    ):
        figures[one_sigma] = plot_changes(rows, groups, few, how, args.sigma[:1])
        figures[all_sigmas] = plot_changes(rows, groups, few, how, args.sigma)
    common.write(folder, figures)
    print(f"wrote {folder}/")


# ---- what is modified ----


def planned_network(criterion, by, group_numbers, neurons, how="zero", sigma="", repeat="", seed=0):
    """A modified network to be counted (see common.count_planned)."""
    return {
        "row": {
            "criterion": criterion,
            "modification": how,
            "sigma": sigma,
            "k": len(neurons),
            "repeat": repeat,
            "selected_by": by,
        },
        "group_numbers": group_numbers,
        "variant": {"neurons": neurons, "how": how, "sigma": sigma or 0.0, "seed": seed},
    }


def plan(args, ranked, few, split, groups):
    """Every modified network but the controls. Noise is most of the work: only what some table or
    figure shows is made."""
    planned = []
    everyone = [group["group"] for group in groups]
    for (criterion, by), neurons in ranked.items():
        for k in args.top_k:
            planned.append(planned_network(criterion, by, everyone, neurons[:k]))
        hows = ["random-init", "random-noise"]
        if split == "test":  # of the paper's tables, 13 alone has test columns
            hows = [] if by == "all" else ["random-noise"]
        shown = everyone if by == "all" else [by]
        for how, sigma, k, repeat in itertools.product(hows, args.sigma, few, range(args.repeats)):
            seed = common.seed_of(args.seed, repeat)
            planned.append(
                planned_network(criterion, by, shown, neurons[:k], how, sigma, repeat, seed)
            )
    return planned


def random_sets(args, ranked, k, counts, minority):
    """The control: random sets of k neurons, over the minority groups. One kind uniform over all
    neurons, one kind for each critical set with as many neurons in each layer as that set has."""
    rng = np.random.default_rng(args.seed)
    total = sum(counts.values())
    planned = []
    for repeat in range(args.controls):
        drawn = common.locate(rng.choice(total, k, replace=False), counts)
        planned.append(planned_network("random", "all layers", minority, drawn, repeat=repeat))
        for (criterion, by), neurons in ranked.items():
            drawn = []
            for layer, n in Counter(layer for layer, _ in neurons[:k]).items():
                drawn += [(layer, int(i)) for i in rng.choice(counts[layer], n, replace=False)]
            planned.append(
                planned_network(
                    "random",
                    f"layers of {criterion} {by}",
                    [j for j in minority if by in ("all", j)],
                    drawn,
                    repeat=repeat,
                )
            )
    return planned


# ---- what comes of it ----


def pick(rows, **wanted):
    """The rows that have all of these values."""
    return [row for row in rows if wanted.items() <= row.items()]


def own(rows, group, **wanted):
    """The rows of a group under its own set: the one selected by it, or the one for all groups."""
    return [
        row for row in pick(rows, group=group, **wanted) if row["selected_by"] in ("all", group)
    ]


def random_changes(rows, kind, group):
    """Changes of a group under the random sets of one kind."""
    return [change(row) for row in pick(rows, criterion="random", selected_by=kind, group=group)]


def mean_changes(rows):
    """Every modification of every critical set, with the mean change of each group over repeats: a
    list of dicts with `points` and `images`, {group: number}. The set 'own' stands for I_j of each
    group j; under 'zero' all groups are shown under the set of each other as well."""
    lines = {}  # {line: {group: rows}}
    for row in rows:
        if row["criterion"] == "random":
            continue
        sets = []
        if row["selected_by"] in ("all", row["group"]):
            sets.append("own")
        if row["modification"] == "zero" and row["selected_by"] != "all":
            sets.append(row["selected_by"])
        for by in sets:
            line = (*(row[name] for name in LINE[:-1]), by)
            lines.setdefault(line, {}).setdefault(row["group"], []).append(row)
    found = []
    for line in sorted(lines, key=lambda line: line[-1] != "own"):  # these first, else as they come
        points = {}
        images = {}
        for group, of_group in lines[line].items():
            gained = [row["correct_after"] - row["correct_before"] for row in of_group]
            points[group] = float(np.mean([change(row) for row in of_group]))
            images[group] = float(np.mean(gained))
        found.append({**dict(zip(LINE, line, strict=True)), "points": points, "images": images})
    return found


def p_value(observed, null):
    """Share of random sets, the observed one counted in, that lower accuracy at least as much."""
    return (1 + sum(value <= observed for value in null)) / (1 + len(null))


def middle_95(null):
    """The range into which a further random set falls in 95 % of cases; needs 39 sets."""
    return np.quantile(null, [0.025, 0.975], method="weibull")


def control_test(rows, criterion, k, groups):
    """Do the top k neurons of a criterion lower a minority group's training accuracy more than k
    random ones? Two tests a group, against random sets of all layers and of the same layers, a list
    of dicts. `more` is True if at most 5 % of the random sets of each kind lower it as much (p),
    AND it loses over FEW_IMAGES more images than under random sets on average: a small p means
    rare, not large."""
    tests = []
    for group in groups:
        if not random_changes(rows, "all layers", group["group"]):
            continue
        (observed,) = own(
            rows,
            group["group"],
            criterion=criterion,
            modification="zero",
            k=k,
            split="train",
        )
        of_group = []
        for name, kind in (
            ("all layers", "all layers"),
            ("the same layers", f"layers of {criterion} {observed['selected_by']}"),
        ):
            null = random_changes(rows, kind, group["group"])
            low, high = middle_95(null)
            of_group.append(
                {
                    "criterion": criterion,
                    "group": group["group"],
                    "random": name,
                    "n": observed["n"],
                    "images": observed["correct_after"] - observed["correct_before"],
                    "observed": change(observed),
                    "sets": len(null),
                    "mean": float(np.mean(null)),
                    "low": float(low),
                    "high": float(high),
                    "p": p_value(change(observed), null),
                }
            )
        rare = all(test["p"] <= 0.05 for test in of_group)
        # Images lost to the kind of random sets that costs more; a gain counts as 0
        usual = min(0, *(test["mean"] * test["n"] / 100 for test in of_group))
        more = rare and of_group[0]["images"] < usual - FEW_IMAGES
        tests += [{**test, "more": more} for test in of_group]
    return tests


def percentile(neurons, scores):
    """Place of m neurons among all, by scores {parameter name: (n,)} -> (m,): 0 the smallest, 100
    the largest, equals in the middle of their places."""
    values = torch.stack([scores[name][i] for name, i in neurons]).cpu()
    ordered = torch.cat([part.cpu() for part in scores.values()]).sort().values
    places = torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)
    return 50 * (places - 1).double() / max(len(ordered) - 1, 1)


def neuron_table(ranked, scores):
    """Rows of neurons.csv: the critical neurons of each set, and where they stand among all neurons
    of the network by every criterion; by the gradient of the set's own group or, for a set of all
    groups, of all traced training images together."""
    rows = []
    for (criterion, by), neurons in ranked.items():
        places = {}
        for other in common.CRITERIA:
            places[f"{other}_percentile"] = percentile(neurons, scores[other, by]).tolist()
        for rank, (name, i) in enumerate(neurons):
            rows.append(
                {
                    "criterion": criterion,
                    "selected_by": by,
                    "rank": rank + 1,
                    "parameter": name,
                    "index": i,
                    "score": float(scores[criterion, by][name][i]),
                    **{key: round(values[rank], 4) for key, values in places.items()},
                }
            )
    return rows


def rank_shares(neurons):
    """Figure 3 in numbers: how many of one criterion's neurons are in another's upper 5 %."""
    shares = []
    for criterion, other in itertools.permutations(common.CRITERIA, 2):
        rows = pick(neurons, criterion=criterion)
        places = [row[f"{other}_percentile"] for row in rows]
        shares.append(
            {
                "criterion": criterion,
                "by": other,
                "n": len(places),
                "upper": sum(place >= 95 for place in places),
                "median": float(np.median(places)),
            }
        )
    return shares


def print_changes(changes, groups):
    """Each group under its own set, and every group under the zeroed set of each other group."""
    rows = []
    for line in changes:
        row = {key: line[key] for key in LINE}
        if row["selected_by"] != "own":
            row["selected_by"] = short(groups[row["selected_by"]])
        for group in groups:
            row[short(group)] = "-"
        for j, points in line["points"].items():
            row[short(groups[j])] = f"{points:+.2f} ({line['images'][j]:+.1f})"
        rows.append(row)
    common.print_rows(
        "Change in accuracy in percentage points (images); * minority; selected by: the group "
        "whose neurons they are; own: each group's or, where a criterion needs no gradient, those "
        "of all",
        rows,
    )


# ---- the figures ----


def plot_changes(rows, groups, ks, how, sigmas):
    """Figures 2, 4, 5, 11, 12: change of each group under its own neurons, a bar per k, a column of
    panels per criterion, a row per sigma; whiskers: standard deviation over repeats. Zeroing also
    shows random neurons for minority groups (mean and 95 % range)."""
    slots = len(ks) + (how == "zero")  # one more slot for random neurons
    fig = Figure(figsize=(4.6 * len(common.CRITERIA), 3.2 * len(sigmas)))
    axes = fig.subplots(len(sigmas), len(common.CRITERIA), sharey=True, squeeze=False)
    for ax, (sigma, criterion) in zip(
        axes.flat, itertools.product(sigmas, common.CRITERIA), strict=True
    ):
        wanted = {"criterion": criterion, "modification": how, "sigma": sigma, "split": "train"}
        for n, k in enumerate(ks):
            changes = []  # of each group: one, or one a draw of noise
            for g in groups:
                changes.append([change(row) for row in own(rows, g["group"], k=k, **wanted)])
            ax.bar(
                np.arange(len(groups)) + 0.8 * (n + 0.5) / slots - 0.4,
                np.mean(changes, axis=1),
                0.76 / slots,
                label=f"top {k}",
                yerr=np.std(changes, axis=1, ddof=1) if len(changes[0]) > 1 else None,
                error_kw={"lw": 0.8, "capsize": 2},
            )
        if how == "zero":
            plot_random(ax, rows, groups, ks[-1], 0.8 * (len(ks) + 0.5) / slots - 0.4)
        ax.axhline(0, color="black", lw=0.6)
        ax.set_xticks(
            range(len(groups)),
            [common.long(g).replace(" ", "\n", 2) for g in groups],
        )
        ax.set_title(f"{criterion}, sigma = {sigma}" if sigma else criterion)
        ax.grid(axis="y")
    fig.supylabel("change in training accuracy (points)")
    handles = axes.flat[0].get_legend_handles_labels()
    fig.legend(*handles, loc="outside lower center", ncols=4)
    what = {
        "zero": "Zeroing the top neurons (* minority)",
        "random-init": "Random initialisation of the top neurons",
        "random-noise": "Random noise added to the top neurons",
    }[how]
    if how != "zero":
        what += f" (* minority; mean and standard deviation, draws: {len(changes[0])})"
    fig.suptitle(what)
    return fig


def plot_random(ax, rows, groups, k, shift):
    """k random neurons of all layers, zeroed: mean and 95 % range for each minority group, so far
    to the right of its tick."""
    label = f"random {k}, mean and 95 % range"
    for j, g in enumerate(groups):
        null = random_changes(rows, "all layers", g["group"])
        if null:
            ax.vlines(j + shift, *middle_95(null), color="black")
            ax.plot(j + shift, np.mean(null), "D", color="black", mfc="white", ms=4, label=label)
            label = None  # once in the legend


def plot_ranks(neurons, shown):
    """Figure 3: where the neurons of one criterion stand in the ranking by each other one."""
    pairs = list(itertools.permutations(common.CRITERIA, 2))
    fig = Figure(figsize=(9, 3 * len(pairs) / 2))
    axes = fig.subplots(len(pairs) // 2, 2, squeeze=False)
    for ax, (criterion, other) in zip(axes.flat, pairs, strict=True):
        ax.hist(
            [row[f"{other}_percentile"] for row in pick(neurons, criterion=criterion)],
            np.arange(0, 101, 5),
            color="0.6",
        )
        ax.yaxis.get_major_locator().set_params(integer=True)  # they are counts
        of = "of each group" if common.needs_gradient(criterion) else "of the network"
        ax.set(
            title=f"largest {criterion} {of}",
            xlabel=f"{other} ranking among all neurons (%)",
            ylabel="neurons",
            xlim=(0, 100),
        )
    fig.suptitle(f"Ranking of the {shown} by another criterion")
    return fig


def plot_layers(neurons, groups, layers, shown):
    """Figure 8: in which layers the critical neurons lie, a row per set, layers in network
    order."""
    names = {"all": "", **{group["group"]: f" {short(group)}" for group in groups}}
    sets = {}
    for row in neurons:
        name = row["criterion"] + names[row["selected_by"]]
        sets.setdefault(name, []).append(row["parameter"])
    counts = np.array([[of_set.count(layer) for layer in layers] for of_set in sets.values()])
    fig = Figure(figsize=(4.5 + 0.2 * len(layers), 2 + 0.32 * len(sets)))
    ax = fig.subplots()
    image = common.heat_map(
        ax,
        counts,
        sets,
        layers,
        most=counts.max(),
        texts={place: counts[place] for place in zip(*counts.nonzero(), strict=True)},
    )
    ax.set(
        title=f"Where the {shown} lie (* minority)",
        xlabel="layer, from input to output",
        ylabel="selected by",
    )
    fig.colorbar(image, label="neurons")
    return fig


if __name__ == "__main__":
    common.run_stage(parse_args, main)
