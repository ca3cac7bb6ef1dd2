"""Stage 3: structured tracing. In which layers do a few neurons carry a group's training accuracy?

    python structured_trace.py                                  # the run of train_erm.py
    python structured_trace.py --run runs/wb0 --max-per-group 200

Paper: section 2.1.2, Figure 7. In one layer after the other the k neurons of largest magnitude or,
for each group, of largest gradient are zeroed, and the change of the group's training accuracy is
recorded, signed, in percentage points. Random neurons of the layer are a control that the paper
lacks. Reads RUN/erm/best.pt and its data; writes RUN/structured/: args.json, layers.csv,
results.json and fig07_layers.png.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also for python -P
import common

FILES = ("args.json", "layers.csv", "results.json", "fig07_layers.png")
THIRDS = ("first", "middle", "last")  # of the network


def parse_args(argv=None):
    p = common.make_parser(f"{__doc__}\nIn brackets: the default.")
    common.add_tracing_flags(p)
    g = p.add_argument_group("neurons")
    g.add_argument(
        "--k", type=common.positive_int, default=3, help="neurons zeroed in each layer (3)"
    )
    g.add_argument(
        "--controls",
        type=common.positive_int,
        default=5,
        help="random sets in each layer, whose changes are averaged (5)",
    )
    return p.parse_args(argv)


def main(args):
    # The network, its data and a sample of each group
    model, checkpoint, table, weights, counts, about = common.open_traced(args)
    groups = table.groups
    folder = args.run / "structured"
    common.open_folder(folder, FILES)
    train = common.open_split(checkpoint, table, "train")
    index = common.sample_groups(train.g, groups, args.max_per_group, whole=True, seed=args.seed)

    def batches(members):
        return common.Batches(train, args.device, args.batch_size, args.workers, index=members)

    # Scores of all neurons: for each group or, where a criterion needs no gradient, for all of them
    gradients = {}
    for j, members in enumerate(index):
        gradients[j] = common.mean_gradient(model, weights, batches(members))
    scores = {}
    for criterion in common.CRITERIA:
        if common.needs_gradient(criterion):
            for j, gradient in gradients.items():
                scores[criterion, j] = common.score_neurons(weights, gradient, criterion, args.unit)
        else:
            scores[criterion, "all"] = common.score_neurons(weights, {}, criterion, args.unit)

    # The top neurons of each layer; random ones are those of largest random score
    sets = {}  # {(criterion, selected by): {layer: neurons}}
    for key, values in scores.items():
        sets[key] = {}
        for layer, n in counts.items():
            sets[key][layer] = common.top_neurons({layer: values[layer]}, min(args.k, n))
    rng = np.random.default_rng(args.seed)
    for i in range(args.controls):
        drawn = sets["random", f"set {i}"] = {}
        for layer, n in counts.items():
            values = torch.from_numpy(rng.random(n))
            drawn[layer] = common.top_neurons({layer: values}, min(args.k, n))

    # They are zeroed, those of a group on its own images alone
    planned = []
    for layer in counts:
        for (criterion, by), of_layers in sets.items():
            neurons = of_layers[layer]
            planned.append(
                {
                    "row": {
                        "parameter": layer,
                        "criterion": criterion,
                        "selected_by": by,
                        "k": len(neurons),
                    },
                    "group_numbers": [by] if by in gradients else list(gradients),
                    "variant": {"neurons": neurons},
                }
            )
    rows = common.count_planned(
        model,
        planned,
        (batches(members) for members in index),
        weights,
        args.unit,
        common.OnePass(),
    )
    for row in rows:
        row["change_percent"] = round(common.change(row), 4)

    # The heat map and its summary; numbers first, so that they do not depend on the figure
    changes = {}  # of one set of neurons, or of several random ones
    for row in rows:
        key = (row["criterion"], row["group"], row["parameter"])
        changes.setdefault(key, []).append(row["change_percent"])
    heat = {}
    summary = {}
    for criterion in (*common.CRITERIA, "random"):
        heat[criterion] = np.zeros((len(groups), len(counts)))
        sizes = np.zeros_like(heat[criterion])
        for j in range(len(groups)):
            for at, layer in enumerate(counts):
                of_sets = changes[criterion, j, layer]
                heat[criterion][j, at] = np.mean(of_sets)
                sizes[j, at] = np.mean(np.abs(of_sets))
        summary[criterion] = summarize_layers(heat[criterion], sizes, list(counts), groups)
    common.write(
        folder,
        {
            "args.json": common.run_record("structured", args),
            "layers.csv": rows,
            "results.json": {
                "stage": "structured",
                **about,
                "k": args.k,
                "groups": groups,
                "layers": list(counts),
                "summary": summary,
            },
        },
        remove=["fig07_layers.png"],
    )
    print_summary(summary, groups, args.k)
    common.write(folder, {"fig07_layers.png": plot_heat(heat, list(counts), groups, args.k)})
    print(f"wrote {folder}/")


def summarize_layers(heat, sizes, layers, groups):
    """Per group the mean change, the change of largest size and its layer; and how the size of the
    minority groups' changes is spread over the thirds of the network (None: nothing changed). heat,
    sizes (groups, layers): the mean change of the sets of neurons, and its mean size, |change|, in
    which a rise and a drop by two random sets do not cancel."""
    of_groups = []
    for group, values in zip(groups, heat, strict=True):
        at = int(np.abs(values).argmax())
        of_groups.append(
            {
                "group": group["group"],
                "mean": float(values.mean()),
                "largest": float(values[at]),
                "layer": layers[at] if values[at] else "-",
            }
        )
    minority = sizes[[group["minority"] for group in groups]].sum(0)
    thirds = None
    if minority.any():
        shares = [float(part.sum() / minority.sum()) for part in np.array_split(minority, 3)]
        thirds = dict(zip(THIRDS, shares, strict=True))
    return {"groups": of_groups, "thirds": thirds}


def print_summary(summary, groups, k):
    rows = []
    thirds = []
    for criterion, found in summary.items():
        for row, group in zip(found["groups"], groups, strict=True):
            rows.append({"criterion": criterion, **row, "group": common.long(group)})
        shares = found["thirds"] or dict.fromkeys(THIRDS, "-")
        thirds.append({"criterion": criterion, **shares})
    common.print_rows(
        f"Change in training accuracy by zeroing {k} neurons of one layer, percentage points (* "
        "minority)",
        rows,
    )
    common.print_rows("Share of the minorities' absolute change, by thirds of layers", thirds)


def plot_heat(heat, layers, groups, k):
    """Figure 7: a heat map per criterion, layers in network order, one scale: the darker, the
    larger the change; a drop carries no sign, a rise a '+'."""
    fig = Figure(figsize=(4 + 0.2 * len(layers), 2.4 * len(heat)))
    axes = fig.subplots(len(heat), 1, sharex=True)
    most = max(1e-9, np.abs([*heat.values()]).max())
    for ax, (criterion, values) in zip(axes, heat.items(), strict=True):
        image = common.heat_map(
            ax,
            np.abs(values),
            [common.long(group) for group in groups],
            layers,
            most,
            texts=dict.fromkeys(zip(*np.nonzero(values > 0), strict=True), "+"),
        )
        if criterion == "random":
            ax.set_title(f"control: {k} random neurons of the layer, mean")
        else:
            ax.set_title(f"{k} neurons of largest {criterion}")
    axes[-1].set_xlabel("layer, from input to output (* minority group)")
    fig.colorbar(
        image,
        ax=axes,
        label="|change| in training accuracy\n(percentage points; + marks a rise)",
    )
    return fig


if __name__ == "__main__":
    common.run_stage(parse_args, main)
