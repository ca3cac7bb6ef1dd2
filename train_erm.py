"""Stage 1: train a network by empirical risk minimisation (ERM), which all later stages study.

    python train_erm.py                                         # built-in data, minutes
    python train_erm.py --data waterbirds/ --run runs/wb0 --seed 0

Paper: section 4.1, Table 2 (settings), Figure 1 (the gap between training and test accuracy). Reads
Waterbirds, CelebA or any metadata.csv with its images. Writes RUN/erm/: args.json, log.jsonl,
best.pt (the epoch of the highest worst-group accuracy in validation), last.pt, epoch_NNN.pt (NNN:
epochs finished), results.json, fig01_group_accuracy.png and curves.png. The same command again
continues an interrupted run; a larger --epochs extends it.
"""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also for python -P
import common

FILES = (
    "args.json",
    "log.jsonl",
    "best.pt",
    "last.pt",
    "epoch_[0-9][0-9][0-9].pt",
    "epoch_[0-9][0-9][0-9][0-9].pt",
    "results.json",
    "fig01_group_accuracy.png",
    "curves.png",
)
DEFAULTS = {  # flag: (of the paper, section 4.1 and Table 2; of the built-in set)
    "arch": ("resnet50", "resnet10"),
    "size": (224, 40),
    "epochs": (100, 10),
    "batch_size": (256, 128),
    "lr": (1e-4, 3e-4),
    "augment": ("table1", "crop-flip"),
    "keep_epochs": ([30, 40, 50, 60], [3, 4, 5, 6]),
}


def parse_args(argv=None):
    p = common.make_parser(
        f"{__doc__}\nIn brackets: the default, the paper's and behind it that of the built-in set."
    )
    g = p.add_argument_group("data")
    g.add_argument(
        "--data",
        default=common.BIRDS,
        help="folder or metadata csv (data/birds, the built-in set, which is drawn on first use)",
    )
    g.add_argument(
        "--attributes",
        nargs=2,
        metavar=("Y", "A"),
        help="columns of class and spurious attribute (y place; in CelebA's lists Blond_Hair Male)",
    )
    g = p.add_argument_group("model")
    g.add_argument("--arch", help="any network of timm, or resnet10 (resnet50; resnet10)")
    g.add_argument(
        "--weights",
        default="default",
        help="default: those published with the network, for resnet50 IMAGENET1K_V2, for resnet10 "
        "learned from drawn birds of all kinds (data/birds.py); none: random ones; or a file, .pth "
        "or .safetensors, of which all but the head is taken (default)",
    )
    g.add_argument(
        "--size",
        type=common.between(int, 8, 10**5),
        help="side of the network's input in pixels (224; 40)",
    )
    g = p.add_argument_group("training")
    g.add_argument(
        "--epochs", type=common.positive_int, help="passes over the training images (100; 10)"
    )
    g.add_argument(
        "--batch-size",
        type=common.between(int, 2, 10**6),
        help="images a step, at least 2, as BatchNorm cannot take a single one (256; 128)",
    )
    g.add_argument("--lr", type=common.positive_float, help="learning rate of Adam (1e-4; 3e-4)")
    g.add_argument(
        "--augment",
        choices=["table1", "crop-flip", "none"],
        help="table1: the paper's Table 1; crop-flip: its first two rows, which are all that the "
        "released code uses (table1; crop-flip)",
    )
    g = p.add_argument_group("run")
    g.add_argument(
        "--keep-epochs",
        type=common.positive_int,
        nargs="*",
        metavar="N",
        help="keep epoch_NNN.pt after these epochs, as starts for stage 4. The one at 40 %% of "
        "--epochs is always kept, unless the run was past it when a larger --epochs was given (30 "
        "40 50 60; 3 4 5 6)",
    )
    g.add_argument(
        "--seed",
        type=common.seed_int,
        default=0,
        help="draws new weights, the order of images and their augmentation (0)",
    )
    g.add_argument(
        "--overwrite",
        action="store_true",
        help="start anew where RUN/erm holds a finished run, or one of other settings",
    )
    return p.parse_args(argv)


def main(args):
    # Data, settings, and what an earlier run of this command left
    if os.path.realpath(args.data) == os.path.realpath(common.BIRDS) and not common.BIRDS.exists():
        draw_birds()
    table = common.read_table(args.data, args.attributes)
    for flag, (paper, built_in) in DEFAULTS.items():
        if getattr(args, flag) is None:
            setattr(args, flag, built_in if common.is_built_in(table) else paper)
    args.keep_epochs = sorted({*args.keep_epochs, common.default_kick_in(args.epochs)})
    common.print_settings(args)
    folder = args.run / "erm"
    inputs = {
        "labels": table.fingerprint("train", "val"),
        "images": table.fingerprint_of_images("train", "val"),
        "weights": fingerprint_of_weights(args.weights),
    }
    test_labels = table.fingerprint("test")
    last, results = common.earlier_run(folder, args, parse_args([]), FILES, test_labels, **inputs)
    if results:
        with common.reading(folder / "results.json", common.START_ANEW):
            print_table(results)
        for epoch in args.keep_epochs:
            if epoch <= args.epochs and not (folder / f"epoch_{epoch:03d}.pt").exists():
                common.warn(f"{folder} has not kept epoch {epoch}; --overwrite trains anew")
        return

    # Model, optimizer, and where an interrupted run left them
    torch.manual_seed(args.seed)
    model = common.build_model(
        args.arch, len(table.classes), args.size, "none" if last else args.weights
    )
    model.to(args.device, memory_format=torch.channels_last)  # a quarter less time a step
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=3)
    log = []
    if last:
        log = common.restore(folder, last, model, optimizer, scheduler)
        if inputs["weights"] is None:  # the file was deleted since, but last.pt has its hash
            inputs["weights"] = last["erm"]["settings"]["weights"]
    erm = {  # what training this is, for checkpoints and later stages to carry along
        "id": last["erm"]["id"] if last else None,  # set after the first epoch
        "settings": {
            **common.settings(args),
            "weights": inputs["weights"],
            "attributes": args.attributes,
        },
    }

    # What checkpoints say, what is learned from, and what is evaluated on
    description = {
        "arch": args.arch,
        "n_classes": len(table.classes),
        "classes": table.classes,
        "size": args.size,
        "mean": list(model.pretrained_cfg["mean"]),
        "std": list(model.pretrained_cfg["std"]),
        "data": {
            "source": table.source,
            "attributes": args.attributes,
            "labels": inputs["labels"],
            "images": inputs["images"],
        },
        "args": common.plain(args),
    }
    train, loaders, test = common.training_batches(description, table, args)
    common.begin(folder, "erm", args, FILES, last, **inputs)

    for epoch in range(len(log) + 1, args.epochs + 1):
        started = time.time()
        lr = optimizer.param_groups[0]["lr"]
        total = torch.zeros((), device=args.device)
        n = 0
        # Order, augmentation and dropout follow from (seed, epoch), so a continued run sees the
        # same as one that was never interrupted
        torch.manual_seed(common.seed_of(args.seed, epoch))
        train.order.epoch = epoch
        model.train()
        for x, y, *_ in tqdm(train, f"epoch {epoch}", disable=None, leave=False):
            optimizer.zero_grad()  # first, so that old gradients do not lie beside activations
            logits = model(x).float()  # (B, C); bf16 has 3 digits, which are too few for a loss
            loss = torch.nn.functional.cross_entropy(logits, y)
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(y)
            n += len(y)
        loss = common.finite_loss(total / n, epoch, model, f"try an --lr below {args.lr}")
        scheduler.step(loss)
        if epoch == 1:
            erm["id"] = common.fingerprint_of(model)  # tells this training from any other

        # Training accuracy, too, is measured without augmentation and in eval mode
        reports, _ = common.evaluate(model, loaders, table.groups)
        row = {
            "epoch": epoch,
            "loss": loss,
            "terms": {"cross entropy": loss},
            "lr": lr,
            "seconds": round(time.time() - started, 2),
            **reports,
        }
        log.append(row)
        common.print_epoch(row, args.epochs)

        checkpoint = {**description, "erm": erm, "epoch": epoch, "model": model.state_dict()}
        kept = {}
        if epoch in args.keep_epochs:
            kept[f"epoch_{epoch:03d}.pt"] = checkpoint
        common.save_epoch(folder, checkpoint, log, optimizer, scheduler, kept)

    results = {
        "stage": "erm",
        "source": table.source,
        "arch": args.arch,
        "epochs": args.epochs,
        **common.measure_selected(folder, model, test, table, log),
        "erm": erm,
        "test_labels": test_labels,
    }
    common.write(folder, {"results.json": results})
    print_table(results)
    common.write(
        folder,
        {
            "fig01_group_accuracy.png": plot_gap(results),
            "curves.png": common.plot_epochs(log),
        },
    )
    print(f"wrote {folder}/")


def draw_birds():
    """Have data/birds.py draw the built-in set; it says itself what goes wrong."""
    command = [sys.executable, common.BIRDS.parent / "birds.py"]
    done = subprocess.run(command, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def fingerprint_of_weights(weights):
    """How --weights is compared when a run is continued: a file by a hash of its content. None if
    it was deleted, which does no harm after the start."""
    if weights in ("default", "none"):
        return weights
    if not Path(weights).is_file():
        return None
    return hashlib.sha256(Path(weights).read_bytes()).hexdigest()[:16]


def print_table(results):
    common.print_splits(
        f"selected epoch {results['selected_epoch']} of {results['epochs']}",
        results["splits"],
    )


def plot_gap(results):
    """Figure 1: training and test accuracy of every group at the selected epoch."""
    train = results["splits"]["train"]["groups"]
    fig = Figure(figsize=(2 + 1.3 * len(train), 3.6))
    ax = fig.subplots()
    for split, width in (("train", -0.4), ("test", 0.4)):
        groups = results["splits"][split]["groups"]
        accuracies = np.array([group["acc"] for group in groups], dtype=float)  # NaN: no image
        bars = ax.bar(range(len(train)), 100 * accuracies, width, align="edge", label=split)
        ax.bar_label(bars, fmt="%.1f")
    ax.set_xticks(
        range(len(train)),
        [f"{common.short(group)}\n{group['name']}\nn = {group['n']}" for group in train],
    )
    ax.set(ylabel="accuracy (%)", ylim=(0, 122), yticks=range(0, 101, 20))
    ax.legend(loc="upper center", ncols=2)
    ax.set_title(f"Group accuracy, ERM, epoch {results['selected_epoch']} (* minority)")
    return fig


if __name__ == "__main__":
    common.run_stage(parse_args, main)
