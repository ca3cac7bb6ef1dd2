"""Stage 3: structured tracing. In which layers do a few neurons carry a group's training accuracy?

    python structured_trace.py                                  # the run of train_erm.py, seconds on two cores
    python structured_trace.py --run runs/wb0 --max-per-group 200

Paper: section 2.1.2, Figure 7. In every layer in turn, the k neurons with the largest gradient (of each group
its own) or magnitude are zeroed and the accuracy change of every group is recorded, signed, in percentage
points. Reads RUN/erm/best.pt and its data; writes RUN/structured/ (replaced): args.json, layers.csv,
results.json, fig07_layers.png.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch

from common import (BadInput, Variant, accuracy_under, check_flags, fill_defaults, gradient_scores, magnitude_scores,
                    neuron_unit, one_line_errors, plain, prunable_layers, reopen, sample_groups, top_neurons, warn, whole_folder,
                    write_csv, write_json)

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - after the choice of a backend that needs no screen

DEFAULTS = {"synthetic": dict(max_per_group=100), "other": dict(max_per_group=None)}  # by kind of data
CRITERIA = ("gradient", "magnitude")
THIRDS = ("first", "middle", "last")


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--run", type=Path, default="runs/synthetic", help="run folder shared by all stages (default %(default)s)")

    g = p.add_argument_group("what is traced")
    g.add_argument("--checkpoint", type=Path, help="model to trace (default RUN/erm/best.pt)")
    g.add_argument("--data", help="where the data are now, if they moved since training (default: as the checkpoint says)")
    g.add_argument("--split", choices=["train", "test"], default="train",
                   help="images whose accuracy is measured; neurons come from training images in any case (default "
                        "%(default)s)")
    g.add_argument("--max-per-group", type=int, metavar="N",
                   help="trace a random sample of so many images of each group; minority groups in training always whole "
                        "(default all; synthetic: 100)")

    g = p.add_argument_group("neurons")
    g.add_argument("--unit", choices=["auto", "channel", "weight"], default="auto",
                   help="a neuron is a channel or a single weight (default auto: channel, in transformers weight)")
    g.add_argument("--k", type=int, default=3, help="neurons zeroed in each layer (default %(default)s)")
    g.add_argument("--layers", nargs="+", metavar="NAME", help="layers to trace, by name (default all prunable ones)")

    g = p.add_argument_group("run")
    g.add_argument("--seed", type=int, default=0, help="of the sample (default %(default)s)")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default %(default)s)")
    g.add_argument("--batch-size", type=int, default=128, help="images per forward pass (default %(default)s)")
    g.add_argument("--cache", type=Path, default="runs/cache", help="where decoded images are kept (default %(default)s)")
    return p.parse_args()


def main():
    args = parse_args()
    check_flags(args, "k", "batch_size", *(["max_per_group"] if args.max_per_group is not None else []))
    args.checkpoint = args.checkpoint or args.run / "erm" / "best.pt"
    model, checkpoint, splits = reopen(args.checkpoint, args.data, args.cache, args.device, {"train", args.split})
    model.to(memory_format=torch.channels_last)  # the same numbers; convolution and pooling are faster so on a CPU
    size, train, split, groups = checkpoint["size"], splits["train"], splits[args.split], splits["train"].groups
    fill_defaults(args, DEFAULTS["synthetic" if (args.data or checkpoint["data"]["data"]) == "synthetic" else "other"])
    unit = neuron_unit(model, args.unit)
    sizes = {layer: w.numel() if unit == "weight" else len(w) for layer, w in prunable_layers(model).items()}
    layers = choose_layers(args, sizes)
    print(" ".join(f"{key}={value}" for key, value in plain(args).items()))

    # Neurons of every layer: one set by magnitude, one per group by gradient, from training images
    minority = [g["group"] for g in groups if g["minority"]]
    sample = {name: sample_groups(images, args.max_per_group, minority if name == "train" else (), args.seed)
              for name, images in splits.items()}
    scores = {("magnitude", "all"): magnitude_scores(model, unit)}
    for j in range(len(groups)):
        members = sample["train"][train.g[sample["train"]] == j]
        scores["gradient", j] = gradient_scores(model, train, members, size, unit, args.device, args.batch_size)
    keys = [(layer, criterion, by) for layer in layers for criterion, by in scores]
    variants = [Variant(top_neurons({layer: scores[criterion, by][layer]}, min(args.k, sizes[layer])),
                        groups=None if by == "all" else (by,)) for layer, criterion, by in keys]
    counts = accuracy_under(model, split, size, variants, unit, sample[args.split], args.device, args.batch_size)
    rows = [{"layer": layer, "criterion": criterion, "selected_by": by, "k": len(variant.neurons), "split": args.split,
             "group": j, **count, "change_percent": round(change(count), 4)}
            for (layer, criterion, by), variant, by_group in zip(keys, variants, counts) for j, count in by_group.items()]

    folder = args.run / "structured"
    heat = {criterion: heat_map(rows, criterion, layers, groups) for criterion in CRITERIA}
    summary = {criterion: summarize_layers(heat[criterion], layers, groups) for criterion in CRITERIA}
    with whole_folder(folder, args) as new:
        write_csv(new / "layers.csv", rows)
        plot_heat(heat, layers, groups, args, new / "fig07_layers.png")
        write_json(new / "results.json", {
            "stage": "structured", "checkpoint": str(args.checkpoint), "epoch": checkpoint.get("epoch"), "unit": unit,
            "split": args.split, "k": args.k, "layers": layers, "summary": summary})
    print_summary(summary, groups, args)
    print(f"wrote {folder}/")


def choose_layers(args, sizes):
    """Names of the layers to trace, in network order. Raises BadInput; says where k is clipped."""
    unknown = [layer for layer in args.layers or [] if layer not in sizes]
    if unknown:
        raise BadInput(f"--layers {unknown[0]}: not a prunable layer of this network; its {len(sizes)} layers are "
                       f"{', '.join(list(sizes)[:6])}, ...")
    layers = [layer for layer in sizes if layer in (args.layers or sizes)]
    small = [layer for layer in layers if sizes[layer] < args.k]
    if small:
        warn(f"layers with fewer than {args.k} neurons lose all of them: "
             + ", ".join(f"{layer} ({sizes[layer]})" for layer in small))
    return layers


def change(row):
    """Accuracy after minus before, in percentage points."""
    return 100 * (row["correct_after"] - row["correct_before"]) / row["n"]


def heat_map(rows, criterion, layers, groups):
    """Signed changes in percentage points, (groups, layers): each group under its own neurons; NaN: no image."""
    cells = {(row["group"], row["layer"]): change(row) for row in rows if row["criterion"] == criterion}
    return np.array([[cells.get((g["group"], layer), np.nan) for layer in layers] for g in groups])


def summarize_layers(heat, layers, groups):
    """Per group mean change, the change of largest size and its layer; and how the minority groups' change, summed
    in absolute value, is spread over the thirds of the network (None: nothing changed)."""
    result = {"groups": [], "thirds": None}
    for g, values in zip(groups, heat):
        if np.isfinite(values).all():
            largest = int(np.abs(values).argmax())
            result["groups"].append({"group": g["group"], "mean": float(values.mean()),
                                     "largest": float(values[largest]), "layer": layers[largest]})
    third = np.arange(len(layers)) * 3 // len(layers)
    total = np.nansum(np.abs(heat[[g["minority"] for g in groups]]), axis=0)
    if total.sum() > 0:
        result["thirds"] = {name: float(total[third == i].sum() / total.sum()) for i, name in enumerate(THIRDS)}
    return result


def print_summary(summary, groups, args):
    print(f"\nChange in {args.split} accuracy by zeroing {args.k} neurons of one layer, percentage points, * minority")
    for criterion in CRITERIA:
        for row in summary[criterion]["groups"]:
            name = f"{row['group']} {groups[row['group']]['name']}{'*' if groups[row['group']]['minority'] else ''}"
            print(f"{criterion:10s} {name:30s} mean {row['mean']:+7.2f}  largest {row['largest']:+7.2f} in {row['layer']}")
        thirds = summary[criterion]["thirds"]
        print(f"{criterion}: " + ("no minority accuracy changed" if thirds is None else "of all minority change (absolute) "
              + ", ".join(f"{100 * share:.0f} % in the {name} third" for name, share in thirds.items()) + " of the layers"))


def plot_heat(heat, layers, groups, args, path):
    """Figure 7: a heat map per criterion, layers in network order, one colour scale: the darker, the larger the
    change; a drop carries no sign, a rise a '+'."""
    fig, axes = plt.subplots(2, 1, figsize=(4 + 0.2 * len(layers), 5.6), layout="constrained", sharex=True)
    most = max(1e-9, *(float(np.nanmax(np.abs(values))) for values in heat.values()))
    for ax, criterion in zip(axes, CRITERIA):
        image = ax.imshow(np.abs(heat[criterion]), cmap="Greys", vmin=0, vmax=most, aspect="auto")
        for i, j in zip(*np.nonzero(heat[criterion] > 0)):
            colour = "white" if heat[criterion][i, j] > most / 2 else "black"
            ax.text(j, i, "+", ha="center", va="center", fontsize=7, color=colour)
        names = [f"G{g['group']}{'*' if g['minority'] else ''} {g['name']}" for g in groups]
        ax.set_yticks(range(len(groups)), names, fontsize=8)
        ax.set_title(f"{args.k} neurons of largest {criterion}", fontsize=10)
    axes[1].set_xticks(range(len(layers)), layers, rotation=90, fontsize=6)
    axes[1].set_xlabel("layer, from input to output (* minority group)")
    fig.colorbar(image, ax=axes, label=f"|change| in {args.split} accuracy\n(percentage points; + marks a rise)")
    fig.savefig(path, dpi=100)
    plt.close(fig)


if __name__ == "__main__":
    with one_line_errors("nothing was written"):
        main()
