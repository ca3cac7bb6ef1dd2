"""Stage 1: train a network by empirical risk minimisation (ERM), which all later stages study.

    python train_erm.py                                         # built-in data, minutes
    python train_erm.py --data waterbirds/ --run runs/wb0 --seed 0

Paper: section 4.1, Table 2 (settings), Figure 1 (the gap between training and test accuracy). Reads
Waterbirds, CelebA or any metadata.csv with its images. Writes RUN/erm/: args.json, log.jsonl,
best.pt, last.pt, epoch_NNN.pt (NNN: epochs finished), fig01_group_accuracy.png, curves.png and
results.json. The same command again continues an interrupted run; a larger --epochs extends it.
"""

import json
import math
import signal
import time
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while torch is still loading; later common.script answers
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

import common

FILES = ("args.json", "log.jsonl", "best.pt", "last.pt", "epoch_[0-9]*.pt", "results.json")
FILES += ("fig01_group_accuracy.png", "curves.png")
# Defaults: section 4.1 and Table 2; and those of the built-in set
PAPER = {"arch": "resnet50", "weights": "default", "size": 224, "epochs": 100, "batch_size": 256}
PAPER |= {"lr": 1e-4, "augment": "table1", "keep_epochs": [30, 40, 50, 60]}
SYNTHETIC = {"arch": "resnet10", "weights": "default", "size": 48, "epochs": 25, "lr": 3e-4}
SYNTHETIC |= {"batch_size": 128, "augment": "crop-flip", "keep_epochs": [5, 10, 15, 20]}

NOTES = """In brackets: the default, which is the paper's, and behind a semicolon that of the
built-in set.

--weights  'default': those published with the network, for resnet50 IMAGENET1K_V2, for resnet10
           learned from drawn birds of all kinds (results/birds.py); 'none': random ones; or a
           file, .pth or .safetensors, of which all but the head is taken
--augment  table1: the paper's Table 1; crop-flip: its first two rows, which are all that the
           released code uses
--head     cross entropy of logits (linear) or, as the released code has it, of softmax outputs
--select   best.pt is the epoch of the highest validation worst-group accuracy (val-wga; the first
           of equals), of the highest validation mean (val-mean), or the last
"""


def parse_args(argv=None):
    p = common.make_parser(__doc__, NOTES)
    g = p.add_argument_group("data")
    g.add_argument("--data", default="synthetic", help="folder, metadata csv or 'synthetic'")
    celeba, names = "CelebA's lists: class and spurious attribute (Blond_Hair Male)", common.CELEBA
    g.add_argument("--attributes", nargs=2, default=names, metavar=("Y", "A"), help=celeba)
    spread = "built-in set: spread of shapes within a class, in half distances of classes (0.2)"
    g.add_argument("--difficulty", type=float, default=0.2, help=spread)
    g = p.add_argument_group("model")
    g.add_argument("--arch", help="any network of timm, or resnet10 (resnet50; resnet10)")
    g.add_argument("--weights", help="default, none or a file (default)")
    g.add_argument("--size", type=int, help="side of the network's input in pixels (224; 48)")
    g = p.add_argument_group("training")
    g.add_argument("--epochs", type=int, help="passes over the training images (100; 25)")
    g.add_argument("--batch-size", type=int, help="images a step (256; 128)")
    g.add_argument("--lr", type=float, help="learning rate of Adam (1e-4; 3e-4)")
    g.add_argument("--augment", choices=["table1", "crop-flip", "none"], help="(table1; crop-flip)")
    g.add_argument("--head", choices=["linear", "softmax"], default="linear", help="(linear)")
    g = p.add_argument_group("selection")
    rules = ["val-wga", "val-mean", "last"]
    g.add_argument("--select", choices=rules, default="val-wga", help="(val-wga)")
    kept = "keep epoch_NNN.pt after N epochs, for stage 4 (30 40 50 60; 5 10 15 20)"
    g.add_argument("--keep-epochs", type=int, nargs="*", metavar="N", help=kept)
    g = p.add_argument_group("run")
    g.add_argument("--seed", type=int, default=0, help="of new weights, order, augmentation (0)")
    g.add_argument("--overwrite", action="store_true", help="throw away what RUN/erm holds")
    return p.parse_args(argv)


def main(args):
    table = common.read_table(args.data, args.attributes)
    common.fill_defaults(args, table, **(SYNTHETIC if table.source == "synthetic" else PAPER))
    common.check_flags(args, "epochs", "batch_size", "lr", "size")
    if args.batch_size < 2:
        raise common.BadInput("--batch-size 1: BatchNorm cannot take a single image; use 2 or more")
    if not 0 <= args.difficulty < math.inf:
        raise common.BadInput(f"--difficulty {args.difficulty}: must not be negative")
    if args.weights not in ("default", "none"):
        args.weights = str(Path(args.weights).resolve())

    # Everything that can be refused is looked at before the folder is touched
    folder = args.run / "erm"
    torch.manual_seed(args.seed)  # of new weights
    model = common.build_model(args.arch, len(table.classes), args.size, args.weights)
    about = describe(args, table, model)
    images = common.open_split(about, table, "train", args.augment, seed=args.seed)
    order = common.EpochOrder(len(images), args.batch_size, args.seed)
    train = common.make_loader(images, workers=args.workers, order=order)
    loaders = {}
    for name in common.SPLITS:
        split = common.open_split(about, table, name)
        loaders[name] = common.make_loader(split, args.batch_size, args.workers)
    test = {"test": loaders.pop("test")}  # for the end
    last, finished = common.start_or_continue(folder, args, FILES, data=table.fingerprint())
    if finished is not None:
        with common.reading(folder / "results.json", "use --overwrite"):
            return print_table(finished, table.groups)

    # Model, optimizer, and where an interrupted run left them
    model.to(args.device, memory_format=torch.channels_last)  # a quarter less time a step
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=3)
    parts = {"optimizer": optimizer, "scheduler": scheduler}
    log, best = [], {"epoch": 0, "score": -1.0}
    if last:
        with common.reading(folder / "last.pt", "use --overwrite"):
            for name, part in {"model": model, **parts}.items():
                part.load_state_dict(last[name])
            log, best = last["log"], last["best"]

    for epoch in range(len(log) + 1, args.epochs + 1):
        started, lr, n = time.time(), optimizer.param_groups[0]["lr"], 0
        total = torch.zeros((), device=args.device)
        # Order and augmentation follow from (seed, epoch), so a continued run sees the same
        torch.manual_seed(common.seed_of(args.seed, epoch))  # of dropout
        order.epoch = epoch
        model.train()
        for x, y, *_ in tqdm(train, f"epoch {epoch}", disable=None, leave=False):
            optimizer.zero_grad()  # in front, as old gradients need not lie beside activations
            x, y = common.on_device(model, x, y)
            logits = model(x).float()  # (B, C); bf16 has 3 digits, too few for a loss
            loss = F.cross_entropy(logits.softmax(1) if args.head == "softmax" else logits, y)
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(y)
            n += len(y)
        loss = common.check_finite(total / n, model, epoch, args.lr)
        scheduler.step(loss)

        # Training accuracy too is measured without augmentation, in eval mode
        reports, _ = common.evaluate(model, loaders, table.groups)
        val = reports["val"]
        score = {"val-wga": val["acc_worst"], "val-mean": val["acc_mean"], "last": epoch}
        # best.pt before last.pt: a kill in between repeats the epoch and writes the same again
        fields = {**about, "epoch": epoch, "metrics": reports}
        if score[args.select] > best["score"]:
            best = {"epoch": epoch, "score": score[args.select]}
            common.save_checkpoint(folder / "best.pt", model, **fields)
        if epoch in args.keep_epochs:
            common.save_checkpoint(folder / f"epoch_{epoch:03d}.pt", model, **fields)
        # The log lies in last.pt, too, so that log and weights cannot disagree
        seconds = round(time.time() - started, 2)
        log.append({"epoch": epoch, "loss": loss, "lr": lr, "seconds": seconds, **reports})
        state = {name: part.state_dict() for name, part in parts.items()}
        common.write(folder / "log.jsonl", "".join(f"{json.dumps(row)}\n" for row in log))
        common.save_checkpoint(folder / "last.pt", model, **fields, **state, log=log, best=best)
        common.print_epoch(log[-1], args.epochs)

    # The test split is read here and nowhere else: for the selected epoch and the last one
    results = {"stage": "erm", "source": table.source, "arch": args.arch, "select": args.select}
    results |= {"epochs": args.epochs, "selected_epoch": best["epoch"]}
    networks = {"splits": ("best.pt", best["epoch"]), "last": ("last.pt", args.epochs)}
    for key, (name, epoch) in networks.items():
        saved, _ = common.load_model(folder / name, args.device)
        results[key] = {split: log[epoch - 1][split] for split in loaders}
        results[key] |= common.evaluate(saved, test, table.groups)[0]
    # results.json comes last: where it stands, the run is whole
    plot(results, log, folder)
    common.write_json(folder / "results.json", results)
    print_table(results, table.groups)
    print(f"wrote {folder}/")


def describe(args, table, model):
    """What a checkpoint says of itself, so that a later stage needs nothing else."""
    source = {"source": table.source, "attributes": args.attributes, "difficulty": args.difficulty}
    about = {"arch": args.arch, "n_classes": len(table.classes), "classes": table.classes}
    about |= {key: list(model.pretrained_cfg[key]) for key in ("mean", "std")}
    about |= {"data": {**source, "fingerprint": table.fingerprint()}}
    return {**about, "size": args.size, "args": common.plain(args)}


def print_table(results, groups):
    chosen = f"selected epoch {results['selected_epoch']} of {results['epochs']}"
    common.print_splits(f"{chosen} ({results['select']})", groups, results["splits"])


def plot(results, log, folder):
    """Figure 1, at the selected epoch; and all epochs with their loss."""
    selected, reports = results["selected_epoch"], results["splits"]
    fig = Figure(figsize=(2 + 1.3 * len(reports["train"]["groups"]), 3.6), layout="constrained")
    ax = fig.subplots()
    common.plot_groups(ax, {name: reports[name] for name in ("train", "test")})
    ax.set_title(f"Group accuracy, ERM, epoch {selected} (* minority)")
    common.save_figure(fig, folder / "fig01_group_accuracy.png")
    fig, ax = common.plot_epochs(log, selected)
    ax.plot([row["epoch"] for row in log], [row["loss"] for row in log], ".-", color="0.3")
    ax.set(title="training loss", ylabel="cross entropy")
    common.save_figure(fig, folder / "curves.png")


if __name__ == "__main__":
    arguments = parse_args()
    with common.script(arguments.run / "erm"), common.machine(arguments):
        main(arguments)
