"""Stage 3: structured tracing. In which layers do a few neurons carry a group's training accuracy?

    python structured_trace.py                                  # the run of train_erm.py
    python structured_trace.py --run runs/wb0 --max-per-group 200

Paper: section 2.1.2, Figure 7. In one layer after the other the k neurons of largest magnitude or,
for each group, of largest gradient are zeroed, and the change of the group's training accuracy is
recorded, signed, in percentage points. Random neurons of the layer are a control that the paper
lacks. Reads RUN/erm/best.pt and its data; writes RUN/structured/ (as a whole): args.json,
layers.csv, fig07_layers.png, results.json.
"""

import signal
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while torch is still loading; later common.script answers
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
from matplotlib.figure import Figure

import common

FILES = ("args.json", "layers.csv", "fig07_layers.png", "results.json")
CRITERIA = ("gradient", "magnitude", "random")

NOTES = """In brackets: the default.

--unit           a neuron is a channel or a single weight; auto: a weight where linear layers hold
                 most weights, as in transformers, else a channel
--max-per-group  a random sample; minority groups in training are always traced whole
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
    g.add_argument("--k", type=int, default=3, help="neurons zeroed in each layer (3)")
    sets = "random sets in each layer, whose changes are averaged (5)"
    g.add_argument("--controls", type=int, default=5, help=sets)
    g = p.add_argument_group("run")
    g.add_argument("--seed", type=int, default=0, help="of samples and random neurons (0)")
    g.add_argument("--batch-size", type=int, default=128, help="images a pass (128)")
    return p.parse_args(argv)


def main(args):
    # The network and its data; a folder to write into, before anything is computed
    args.checkpoint = args.checkpoint or args.run / "erm" / "best.pt"
    model, checkpoint, table = common.reopen(args.checkpoint, args.data, args.device)
    groups, most = table.groups, 100 if table.source == "synthetic" else None
    common.fill_defaults(args, table, max_per_group=most)
    common.check_flags(args, "k", "controls", "batch_size", "max_per_group")
    new = common.new_folder(args.run / "structured", args, FILES)
    unit, counts = common.count_neurons(model, args.unit)

    # Neurons of every layer: one set by magnitude, one per group by gradient, some at random
    train = common.open_split(checkpoint, table, "train")
    minority = [group["group"] for group in groups if group["minority"]]
    index = common.sample_groups(train.g, groups, args.max_per_group, minority, args.seed)

    def batches(parts):
        return common.make_loader(train, args.batch_size, args.workers, parts=parts)

    scores = {("magnitude", "all"): common.magnitude_scores(model, unit)}
    for j, members in enumerate(index):
        scores["gradient", j] = common.gradient_scores(model, batches([members]), unit)
    rng = np.random.default_rng(args.seed)
    for i in range(args.controls):  # the neurons of largest random score
        drawn = {layer: torch.from_numpy(rng.random(n)) for layer, n in counts.items()}
        scores["random", f"set {i}"] = drawn
    keys, variants = [], []
    for layer, n in counts.items():
        for (criterion, by), values in scores.items():
            neurons = common.top_neurons({layer: values[layer]}, min(args.k, n))
            keys.append({"layer": layer, "criterion": criterion, "selected_by": by})
            own = (by,) if criterion == "gradient" else None
            variants.append(common.Variant(neurons, groups=own))

    # Each variant on the groups that it is for: the gradient's on its own, the others on all
    rows = []
    found = common.accuracy_under(model, batches(index), variants, unit)
    for key, variant, by_group in zip(keys, variants, found):
        for j, images in by_group.items():
            points = 100 * (images["correct_after"] - images["correct_before"]) / images["n"]
            row = {**key, "k": len(variant.neurons), "group": j, **images}
            rows.append({**row, "change_percent": round(points, 4)})
    # The heat map and its summary
    heat = {criterion: heat_map(rows, criterion, counts, groups) for criterion in CRITERIA}
    summary = {c: summarize_layers(heat[c], list(counts), groups) for c in CRITERIA}
    common.write_csv(new / "layers.csv", rows)
    plot_heat(heat, counts, groups, args.k, new / "fig07_layers.png")
    results = {"stage": "structured", "source": table.source, "arch": checkpoint["arch"]}
    results |= {"checkpoint": str(args.checkpoint), "epoch": checkpoint["epoch"], "unit": unit}
    results |= {"k": args.k, "groups": groups, "layers": list(counts), "summary": summary}
    common.write_json(new / "results.json", results)
    common.replace_folder(new, args.run / "structured")
    print_summary(summary, groups, args.k)
    print(f"wrote {args.run}/structured/")


def heat_map(rows, criterion, layers, groups):
    """Signed changes in percentage points, (groups, layers): each group under its own neurons, the
    mean over random sets."""
    points = [row["change_percent"] for row in rows if row["criterion"] == criterion]
    by_layer_set_group = np.reshape(points, (len(layers), -1, len(groups)))  # in this order
    return by_layer_set_group.mean(1).T


def summarize_layers(heat, layers, groups):
    """Per group the mean change, the change of largest size and its layer; and how the minority
    groups' change, summed in absolute value, is spread over the thirds of the network (None:
    nothing changed)."""
    of_groups, minority = [], np.zeros(len(layers))
    for group, values in zip(groups, heat):
        at = int(np.abs(values).argmax())
        row = {"group": group["group"], "mean": float(values.mean())}
        of_groups.append({**row, "largest": float(values[at]), "layer": layers[at]})
        minority += np.abs(values) * group["minority"]
    thirds = None
    if minority.sum() > 0:
        parts = zip(("first", "middle", "last"), np.array_split(minority, 3))
        thirds = {third: float(part.sum() / minority.sum()) for third, part in parts}
    return {"groups": of_groups, "thirds": thirds}


def print_summary(summary, groups, k):
    print(f"\nChange in training accuracy by zeroing {k} neurons of one layer, points, * minority")
    for criterion, found in summary.items():
        for row, group in zip(found["groups"], groups):
            name = f"{common.short(group)} {group['name']}"
            largest = f"largest {row['largest']:+7.2f} in {row['layer']}"
            print(f"{criterion:10s} {name:30s} mean {row['mean']:+7.2f}  {largest}")
        spread = "no minority accuracy changed"
        if found["thirds"]:
            shares = [f"{100 * x:.0f} % in the {t} third" for t, x in found["thirds"].items()]
            spread = f"of all minority change (absolute) {', '.join(shares)} of the layers"
        print(f"{criterion}: {spread}")


def plot_heat(heat, layers, groups, k, path):
    """Figure 7: a heat map per criterion, layers in network order, one scale: the darker, the
    larger the change; a drop carries no sign, a rise a '+'."""
    fig = Figure(figsize=(4 + 0.2 * len(layers), 7.2), layout="constrained")
    axes = fig.subplots(len(heat), 1, sharex=True)
    most = max(1e-9, *(float(np.abs(values).max()) for values in heat.values()))
    for ax, (criterion, values) in zip(axes, heat.items()):
        image = ax.imshow(np.abs(values), cmap="Greys", vmin=0, vmax=most, aspect="auto")
        for i, j in zip(*np.nonzero(values > 0)):
            colour = "white" if values[i, j] > most / 2 else "black"
            ax.text(j, i, "+", ha="center", va="center", fontsize=7, color=colour)
        names = [f"{common.short(g)} {g['name']}" for g in groups]
        ax.set_yticks(range(len(groups)), names, fontsize=8)
        largest = f"{k} neurons of largest {criterion}"
        random = f"control: {k} random neurons of the layer, mean"
        ax.set_title(random if criterion == "random" else largest, fontsize=10)
    axes[-1].set_xticks(range(len(layers)), layers, rotation=90, fontsize=6)
    axes[-1].set_xlabel("layer, from input to output (* minority group)")
    label = "|change| in training accuracy\n(percentage points; + marks a rise)"
    fig.colorbar(image, ax=axes, label=label)
    common.save_figure(fig, path, dpi=100)


if __name__ == "__main__":
    arguments = parse_args()
    again = "nothing was written; the same command starts again"
    with common.script(arguments.run / "structured", again), common.machine(arguments):
        main(arguments)
