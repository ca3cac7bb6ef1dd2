"""Stage 1: train a network by empirical risk minimisation (ERM), the model that all later stages study.

    python train_erm.py                                         # built-in data, 3 minutes on two cores
    python train_erm.py --data waterbirds/ --run runs/wb0 --seed 0

Paper: section 4.1, Table 2 (settings), Figure 1 (the gap between training and test accuracy). Reads the
images (Waterbirds, CelebA, any folder with a metadata.csv) and writes RUN/erm/: args.json, log.jsonl,
best.pt, last.pt, epoch_NNN.pt (NNN = epochs finished), results.json, fig01_group_accuracy.png, curves.png.
"""

import argparse
import json
import math
import time
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import (SPLITS, BadInput, augment, batches, build_model, check_flags, evaluate, fill_defaults, load_checkpoint, load_model,
                    load_split, normalize, one_line_errors, percent, plain, read_metadata, run_state, save_checkpoint,
                    set_seed, start_run, write_json, write_lines)

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - after the choice of a backend that needs no screen

PAPER = dict(arch="resnet50", weights="default", size=224, epochs=100, batch_size=256, lr=1e-4, augment="table1",
             keep_epochs=[30, 40, 50, 60])
DEFAULTS = {  # by kind of data; section 4.1 and Table 2 for all but the built-in set
    "synthetic": dict(arch="resnet10", weights="none", size=48, epochs=20, batch_size=128, lr=1e-3, augment="crop-flip",
                      keep_epochs=[5, 10, 15, 20]),
    "waterbirds": PAPER, "celeba": PAPER, "other": PAPER,
}


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--run", type=Path, default="runs/synthetic", help="run folder shared by all stages (default %(default)s)")

    g = p.add_argument_group("data")
    g.add_argument("--data", default="synthetic", help="'synthetic' (built in), a folder or a metadata csv (default %(default)s)")
    g.add_argument("--attributes", nargs=2, default=["Blond_Hair", "Male"], metavar=("Y", "A"),
                   help="CelebA only: label and spurious attribute (default Blond_Hair Male)")
    g.add_argument("--difficulty", type=float, default=0.2,
                   help="built-in set only: spread of the birds' shapes within a class, in half distances between the classes "
                        "(default %(default)s)")

    g = p.add_argument_group("model")
    g.add_argument("--arch", help="resnet10, or any torchvision or timm name (default resnet50; synthetic: resnet10)")
    g.add_argument("--weights", help="initial weights: 'default' (published ImageNet weights; resnet50: IMAGENET1K_V2), "
                                     "'none', or a file (default 'default'; synthetic: 'none')")
    g.add_argument("--size", type=int, help="side of the network's input in pixels (default 224; synthetic: 48)")

    g = p.add_argument_group("training")
    g.add_argument("--epochs", type=int, help="passes over the training images (default 100; synthetic: 20)")
    g.add_argument("--batch-size", type=int, help="images per step (default 256; synthetic: 128)")
    g.add_argument("--lr", type=float, help="learning rate of Adam (default 1e-4; synthetic: 1e-3)")
    g.add_argument("--augment", choices=["table1", "crop-flip", "none"],
                   help="table1: the paper's Table 1; crop-flip: what its released code does (default table1; "
                        "synthetic: crop-flip)")
    g.add_argument("--head", choices=["linear", "softmax"], default="linear",
                   help="linear: cross entropy of logits, as in the paper; softmax: of softmax outputs, as in its released "
                        "code (default %(default)s)")

    g = p.add_argument_group("selection")
    g.add_argument("--select", choices=["val-wga", "val-mean", "last"], default="val-wga",
                   help="best.pt is the epoch with the highest validation worst-group accuracy (the paper; first of equals), the "
                        "highest validation mean, or the last (default %(default)s)")
    g.add_argument("--keep-epochs", type=int, nargs="*", metavar="N",
                   help="keep epoch_NNN.pt after so many epochs, to start stage 4 from (default 30 40 50 60; synthetic: 5 10 15 20)")

    g = p.add_argument_group("run")
    g.add_argument("--seed", type=int, default=0, help="of initial head, order and augmentation (default %(default)s)")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default %(default)s)")
    g.add_argument("--cache", type=Path, default="runs/cache",
                   help="where decoded images are kept, for all stages and seeds (default %(default)s)")
    g.add_argument("--resume", action="store_true", help="continue from RUN/erm/last.pt if it exists; may raise --epochs")
    g.add_argument("--overwrite", action="store_true", help="throw away what RUN/erm holds")
    return p.parse_args()


def main():
    args = parse_args()
    meta = read_metadata(args.data, args.attributes)
    fill_defaults(args, DEFAULTS[meta.kind])
    check_flags(args, "epochs", "batch_size", "lr", "size")
    folder = args.run / "erm"
    state = run_state(folder, args)
    if state == "finished":
        print(f"{folder} is finished; --overwrite trains it again")
        return print_table(json.loads((folder / "results.json").read_text()), meta.groups)
    print(" ".join(f"{key}={value}" for key, value in plain(args).items()))

    set_seed(args.seed)
    splits = {name: load_split(meta, name, args.size, args.cache, args.difficulty) for name in SPLITS}
    train = splits["train"]
    model = build_model(args.arch, meta.n_classes, args.size, args.weights).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=3)
    start_run(folder, args, state)
    describe = {"arch": args.arch, "n_classes": meta.n_classes, "size": args.size, "head": args.head, "args": plain(args),
                "data": {"data": args.data if meta.kind == "synthetic" else str(Path(args.data).resolve()),
                         "attributes": args.attributes, "difficulty": args.difficulty}}
    log, best = [], {"epoch": 0, "score": -1.0}
    if state == "unfinished":
        last = load_checkpoint(folder / "last.pt")
        model.load_state_dict(last["model"])
        optimizer.load_state_dict(last["optimizer"])
        scheduler.load_state_dict(last["scheduler"])
        best = last["best"]
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()][:last["epoch"]]
        torch.set_rng_state(last["rng"])
        if last["cuda_rng"]:
            torch.cuda.set_rng_state_all(last["cuda_rng"])

    for epoch in range(len(log) + 1, args.epochs + 1):
        started, lr, total = time.time(), optimizer.param_groups[0]["lr"], torch.zeros((), device=args.device)
        model.train()
        steps = batches(train, args.batch_size, torch.randperm(len(train.y)), args.device)
        for index, images in tqdm(steps, f"epoch {epoch}", math.ceil(len(train.y) / args.batch_size), disable=None, leave=False):
            x = augment(images, train.original_sizes[index], args.size, args.augment)
            logits = model(normalize(x, model))  # (B, C)
            loss = F.cross_entropy(logits.softmax(1) if args.head == "softmax" else logits, train.y[index].to(args.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(index)
        loss = total.item() / len(train.y)
        if not (math.isfinite(loss) and all(value.isfinite().all() for value in model.state_dict().values())):
            kept = f"{folder}/last.pt holds epoch {epoch - 1}" if epoch > 1 else "no epoch was finished"
            raise BadInput(f"training diverged in epoch {epoch} (loss {loss}); {kept}; try a smaller --lr than {args.lr}")
        scheduler.step(loss)

        reports = {name: evaluate(model, splits[name], args.size, args.device, args.batch_size) for name in ("train", "val")}
        score = {"val-wga": reports["val"]["acc_worst"], "val-mean": reports["val"]["acc_mean"], "last": epoch}[args.select]
        fields = {**describe, "epoch": epoch, "metrics": reports}
        if score > best["score"]:
            best = {"epoch": epoch, "score": score}
            save_checkpoint(folder / "best.pt", model, **fields)
        if epoch in args.keep_epochs:
            save_checkpoint(folder / f"epoch_{epoch:03d}.pt", model, **fields)
        log.append({"epoch": epoch, "loss": loss, "lr": lr, "seconds": round(time.time() - started, 2), **reports})
        write_lines(folder / "log.jsonl", log)
        save_checkpoint(folder / "last.pt", model, **fields, best=best, optimizer=optimizer.state_dict(),
                        scheduler=scheduler.state_dict(), rng=torch.get_rng_state(),
                        cuda_rng=torch.cuda.get_rng_state_all() if args.device.startswith("cuda") else [])
        print_epoch(log[-1], args.epochs)

    # The test split is read here and nowhere else: for the selected epoch, and for the last one where that is another
    results = {"stage": "erm", "select": args.select, "epochs": args.epochs, "selected_epoch": best["epoch"]}
    for key, name in (("splits", "best.pt"), ("last", "last.pt")):
        model, checkpoint = load_model(folder / name, args.device)
        known = key == "last" and best["epoch"] == args.epochs
        test = results["splits"]["test"] if known else evaluate(model, splits["test"], args.size, args.device, args.batch_size)
        results[key] = {**checkpoint["metrics"], "test": test}
    write_json(folder / "results.json", results)
    plot_groups(results, folder / "fig01_group_accuracy.png")
    plot_curves(log, best["epoch"], folder / "curves.png")
    print_table(results, meta.groups)
    print(f"wrote {folder}/")


def print_epoch(row, epochs):
    """One line: loss and group accuracies in percent, the minority groups starred."""
    val = row["val"]
    print(f"epoch {row['epoch']}/{epochs} loss {row['loss']:.4f} lr {row['lr']:.1e} train {percent(row['train'])} "
          f"val {percent(val)} worst {100 * val['acc_worst']:.1f} (group {val['worst_group']}) {row['seconds']:.0f} s", flush=True)


def print_table(results, groups):
    """Group accuracies at the selected epoch; the worst group of each split carries a '<'."""
    print(f"\nselected epoch {results['selected_epoch']} of {results['epochs']} ({results['select']}); accuracy in %, "
          "* minority, < worst group")
    print(f"{'group':32s} {'train n':>8s} {'train':>8s} {'val':>8s} {'test':>8s}")
    reports = [results["splits"][name] for name in SPLITS]
    for j, group in enumerate(groups):
        rows = [report["groups"][j] for report in reports]
        cells = [f"{100 * row['acc']:7.1f}{' <'[report['worst_group'] == j]}" if row["n"] else "      - "
                 for row, report in zip(rows, reports)]
        print(f"{j} {group['name'] + ('*' if group['minority'] else ''):30s} {group['train_n']:8d} {' '.join(cells)}")
    for name, key in (("worst group", "acc_worst"), ("mean", "acc_mean"), ("mean, groups in training mix", "acc_mean_train_mix")):
        print(f"{name:32s} {'':8s} {' '.join(f'{100 * r[key]:7.1f} ' for r in reports)}")


def plot_groups(results, path):
    """Figure 1: training and test accuracy of every group at the selected epoch."""
    train, test = (results["splits"][name]["groups"] for name in ("train", "test"))
    names = [f"G{g['group']}{'*' if g['minority'] else ''}\n{g['name']}\nn = {g['n']}" for g in train]
    fig, ax = plt.subplots(figsize=(2 + 1.3 * len(train), 3.6), layout="constrained")
    for offset, rows, style in ((-0.2, train, {"label": "training", "color": "0.75"}),
                                (0.2, test, {"label": "test", "color": "0.35", "hatch": "///"})):
        heights = [100 * (g["acc"] or 0) for g in rows]
        bars = ax.bar([j + offset for j in range(len(rows))], heights, 0.4, edgecolor="white", **style)
        ax.bar_label(bars, [f"{100 * g['acc']:.1f}" if g["n"] else "no image" for g in rows], fontsize=8)
    ax.set_xticks(range(len(names)), names, fontsize=8)
    ax.set(ylabel="accuracy (%)", ylim=(0, 122), yticks=range(0, 101, 20),
           title=f"Group accuracy, ERM, epoch {results['selected_epoch']} (* minority)")
    ax.legend(loc="upper center", ncols=2, fontsize=8)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def plot_curves(log, selected, path):
    """Training and validation accuracy of every group over the epochs, and the training loss."""
    groups = log[0]["train"]["groups"]
    epochs = [row["epoch"] for row in log]
    fig, axes = plt.subplots(1, len(groups) + 1, figsize=(2.7 * (len(groups) + 1), 2.6), layout="constrained")
    for j, (ax, group) in enumerate(zip(axes, groups)):
        for name, style in (("train", {"color": "0.6", "ls": "-"}), ("val", {"color": "0.0", "ls": "--"})):
            accuracy = [row[name]["groups"][j]["acc"] for row in log]
            ax.plot(epochs, [math.nan if acc is None else 100 * acc for acc in accuracy], label=name, **style)
        ax.set(title=f"G{j}{'*' if group['minority'] else ''} {group['name']}", ylim=(-3, 103), xlabel="epoch")
    axes[0].set_ylabel("accuracy (%)")
    axes[0].legend(loc="lower right", fontsize=8)
    axes[-1].plot(epochs, [row["loss"] for row in log], color="0.3")
    axes[-1].set(title="training loss", ylabel="cross entropy", xlabel="epoch")
    for ax in axes:
        ax.axvline(selected, color="0.8", ls=":", zorder=0)
    fig.savefig(path, dpi=120)
    plt.close(fig)


if __name__ == "__main__":
    with one_line_errors():
        main()
