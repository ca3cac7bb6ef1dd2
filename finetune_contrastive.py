"""Stage 4: fine-tune a network against a pruned copy of itself, and the controls beside it.

    python finetune_contrastive.py                              # the run of train_erm.py, magnitude criterion
    python finetune_contrastive.py --run runs/wb0 --criterion gradient --name finetune-gradient
    python finetune_contrastive.py --compare runs/wb*           # table over seeds and Figure 6

Paper: section 2.2, Figures 6 and 9, Tables 2, 4-10, 12. Each epoch the critical neurons of the network are
masked in an auxiliary branch that shares all its weights; two augmentations of an image, one through each
branch, are drawn together by NT-Xent (eq. 2.1), and the target branch also learns the labels (eq. 2.2, 2.3):

    x --augment--> x'  --> target    f(theta)      --> r    \\  NT-Xent(r, r_p), both directions
    x --augment--> x'' --> auxiliary f(m * theta)  --> r_p  /  + lambda * MSE(softmax(logits), one-hot)

Starts from a checkpoint of RUN/erm and writes RUN/NAME/: args.json, log.jsonl, pruned.csv, best.pt, last.pt,
results.json, curves.png, groups.png.
"""

import argparse
import csv
import json
import math
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call
from tqdm import tqdm

from common import (SPLITS, BadInput, augment, batches, check_flags, check_stage, classifier_heads, draw_with_replacement,
                    evaluate, fill_defaults, gradient_scores, group_report, load_checkpoint, load_model, locate,
                    magnitude_scores, neuron_masks, neuron_unit, normalize, one_line_errors, percent, plain, predict, reopen,
                    run_state, save_checkpoint, set_seed, start_run, top_neurons, warn, worst_images, write_csv,
                    write_json, write_lines)

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - after the choice of a backend that needs no screen

DEFAULTS = {"synthetic": dict(epochs=5), "other": dict(epochs=20)}  # by kind of data; section 4.1 for all but the built-in set
CRITERIA = ("magnitude", "gradient", "mixed", "random", "none")
BUDGET = ("epochs", "lr", "batch_size", "augment", "seed")  # what a run shares with its control
METHOD = ("method", "criterion", "prune_fraction", "order", "unit", "gradient_source", "views", "features", "aux_bn",
          "temperature", "loss", "lam", "lam_reduction")
COLUMNS = ("epoch", "criterion", "layer", "index", "score")


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--run", type=Path, default="runs/synthetic", help="run folder shared by all stages (default %(default)s)")
    p.add_argument("--name", default="finetune", help="folder of this stage in RUN, to keep several (default %(default)s)")
    p.add_argument("--compare", type=Path, nargs="+", metavar="FOLDER",
                   help="train nothing; one table over finished fine-tuning runs, and Figure 6: folders RUN/NAME, or RUN for "
                        "all in it")
    p.add_argument("--figure", type=Path, default="runs/fig06_compare.png", help="where --compare draws (default %(default)s)")

    g = p.add_argument_group("start")
    g.add_argument("--kick-in", type=int, metavar="N",
                   help="start from RUN/erm/epoch_N.pt (default 40, as in the paper, where the run kept it, else best.pt; the "
                        "released code starts after 41 epochs, for CelebA after 20)")
    g.add_argument("--checkpoint", type=Path, help="start from this checkpoint instead")
    g.add_argument("--data", help="where the data are now, if they moved since training (default: as the checkpoint says)")

    g = p.add_argument_group("method")
    g.add_argument("--method", choices=["contrastive", "supervised", "erm"], default="contrastive",
                   help="contrastive: the paper's; supervised: its second term alone; erm: cross entropy goes on, the control "
                        "of the same budget (default %(default)s)")
    g.add_argument("--criterion", choices=CRITERIA, default="magnitude",
                   help="neurons to mask: largest l2 norm of weights, of gradient, both sets (the released code keeps the "
                        "gradient's only), random ones, or none; the last two are controls (default %(default)s)")
    g.add_argument("--prune-fraction", type=float, default=1e-4,
                   help="fraction of all neurons to mask, at least one neuron; paper 0.0001 (0.01 %%), released code 0.01 "
                        "of the weights (default %(default)s)")
    g.add_argument("--order", choices=["largest", "smallest"], default="largest",
                   help="paper: largest; the released magnitude mask takes the smallest (default %(default)s)")
    g.add_argument("--unit", choices=["auto", "channel", "weight"], default="auto",
                   help="a neuron is a channel or a single weight; the released magnitude mask takes weights, its gradient "
                        "mask channels (default auto: channel, in transformers weight)")
    g.add_argument("--gradient-source", choices=["train", "minority"], default="train",
                   help="gradient of 128 images drawn from the 256 with the highest cross entropy of the training set or of "
                        "its minority groups; the released code takes the 200 lowest (default %(default)s)")
    g.add_argument("--views", choices=["two", "one"], default="two",
                   help="paper: two augmentations of each image; released code: one for both branches (default %(default)s)")
    g.add_argument("--features", choices=["probs", "logits", "projection"], default="probs",
                   help="what NT-Xent compares: softmax outputs (Table 2's 'projection size 2', and the released code), "
                        "logits, or a SimCLR projection head on the penultimate features (default %(default)s)")
    g.add_argument("--aux-bn", choices=["own", "shared", "frozen"], default="own",
                   help="BatchNorm of the auxiliary branch: statistics of its own, copied each epoch; shared: it also moves "
                        "the target's, as in the released code; frozen: it uses the target's and moves none; paper silent "
                        "(default %(default)s)")
    g.add_argument("--temperature", type=float, default=0.5,
                   help="tau of eq. 2.1; paper silent, released code 0.5 (default %(default)s)")
    g.add_argument("--loss", choices=["mse", "ce"], default="mse",
                   help="supervised term: squared error of softmax outputs or cross entropy of logits; paper: mse, released "
                        "code: ce, a mean, which is --loss ce --lam-reduction mean (default %(default)s)")
    g.add_argument("--lam", type=float, default=0.2,
                   help="lambda of eq. 2.3; of a sum over the batch, so that 0.2 weighs an image 0.2 x batch size; paper and released "
                        "code 0.2, the latter with batches of 100 (default %(default)s)")
    g.add_argument("--lam-reduction", choices=["sum", "mean"], default="sum",
                   help="supervised term summed over the batch, as the released code sums its squared error, or its mean, as "
                        "eq. 2.3 reads; NT-Xent is a mean in both (default %(default)s, the one that trains)")

    g = p.add_argument_group("training")
    g.add_argument("--epochs", type=int,
                   help="passes over the training images; paper 20, released code 21 (default 20; synthetic: 5)")
    g.add_argument("--lr", type=float, default=2e-4,
                   help="learning rate of Adam, halved after two epochs without a lower training loss; paper and released code "
                        "2e-4 (default %(default)s)")
    g.add_argument("--batch-size", type=int,
                   help="images per step; paper silent, released code 100 (default: that of the ERM run, 256 in the paper)")
    g.add_argument("--augment", choices=["table1", "crop-flip", "none"],
                   help="as in train_erm.py (default: that of the ERM run)")
    g.add_argument("--seed", type=int, help="of order, augmentation and random choices (default: that of the ERM run)")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default %(default)s)")
    g.add_argument("--cache", type=Path, default="runs/cache", help="where decoded images are kept (default %(default)s)")
    g.add_argument("--resume", action="store_true", help="continue from RUN/NAME/last.pt if it exists; may raise --epochs")
    g.add_argument("--overwrite", action="store_true", help="throw away what RUN/NAME holds")
    return p.parse_args()


def nt_xent(r, r_p, temperature=0.5):
    """NT-Xent, eq. 2.1: features r of the target and r_p of the auxiliary branch, both (B, F) -> scalar, the mean over
    all 2B features, each once as the anchor (both directions). An image's other feature is the positive; the sum in the
    denominator runs over it and the 2B - 2 features of other images, as in SimCLR."""
    z = F.normalize(torch.cat([r, r_p]), dim=1)
    similarity = (z @ z.T / temperature).masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -math.inf)
    positive = torch.arange(len(z), device=z.device).roll(len(r))  # i <-> i + B
    return F.cross_entropy(similarity, positive)


def supervised_loss(logits, y, loss="mse", reduction="sum"):
    """L_MSE of eq. 2.2, ||softmax(logits) - one-hot(y)||_2^2 of each image, or its cross entropy; logits (B, C), y (B,).
    Summed over the batch or its mean."""
    if loss == "ce":
        return F.cross_entropy(logits, y, reduction=reduction)
    per_image = (logits.softmax(1) - F.one_hot(y, logits.shape[1])).square().sum(1)
    return per_image.sum() if reduction == "sum" else per_image.mean()


def auxiliary(model, x, masks, buffers, aux_bn="own"):
    """f(m * theta, x), section 2.2.1: logits of the network with masked weights. Not a copy: the masks multiply the same
    parameters, so gradients meet in shared weights. buffers: what replaces the model's own, {} to use and move those."""
    parameters = dict(model.named_parameters())
    masked = {name: parameters[name] * mask for name, mask in masks.items()}
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm) and m.training]
    try:
        for norm in norms if aux_bn == "frozen" else []:
            norm.eval()
        return functional_call(model, {**masked, **buffers}, (x,))
    finally:
        for norm in norms:
            norm.train()


@contextmanager
def penultimate(model):
    """Inside the `with`, every forward pass appends what enters the classifier head, (B, D), to the list given."""
    found = []
    def keep(_, inputs):  # a convolution as head (SqueezeNet) sees maps, which are averaged
        found.append(inputs[0].flatten(2).mean(2) if inputs[0].dim() > 2 else inputs[0])
    hook = model.get_submodule(classifier_heads(model)[0]).register_forward_pre_hook(keep)
    try:
        yield found
    finally:
        hook.remove()


def projection_head(model, size, out=128):
    """SimCLR's g: a layer as wide as the penultimate features, ReLU, 128 outputs; thrown away after training."""
    with penultimate(model) as found, torch.inference_mode():
        model.eval()(torch.zeros(1, 3, size, size, device=model.input_mean.device))
    width = found[0].shape[1]
    return torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, out)).to(found[0].device)


def pruned_count(fraction, total):
    """How many neurons a fraction is: rounded up, at least one. ResNet-50 has 26,560 channels; 1e-4 of them are 3."""
    return max(1, math.ceil(round(fraction * total, 6)))


def critical_neurons(model, train, logits, args, size, unit, epoch):
    """The neurons to mask in this epoch, as rows of pruned.csv (`mixed` may list one under both criteria). logits (N, C)
    of all training images, by the current target model in eval mode."""
    generator = torch.Generator().manual_seed(10_000 * args.seed + epoch)
    magnitudes = magnitude_scores(model, unit)
    sizes = {layer: len(values) for layer, values in magnitudes.items()}
    k, rows = pruned_count(args.prune_fraction, sum(sizes.values())), []
    if args.criterion == "random":
        drawn = locate(torch.randperm(sum(sizes.values()), generator=generator)[:k].tolist(), sizes)
        rows = [("random", layer, i, "") for layer, i in drawn]
    scores = {"magnitude": magnitudes} if args.criterion in ("magnitude", "mixed") else {}
    if args.criterion in ("gradient", "mixed"):
        minority = torch.tensor([g["group"] for g in train.groups if g["minority"]])
        index = torch.arange(len(train.y)) if args.gradient_source == "train" else torch.isin(train.g, minority).nonzero()[:, 0]
        worst = worst_images(logits, train.y, index, generator)
        scores["gradient"] = gradient_scores(model, train, worst, size, unit, args.device, args.batch_size)
    for criterion, layers in scores.items():
        sign = 1 if args.order == "largest" else -1
        top = top_neurons({layer: sign * values for layer, values in layers.items()}, k)
        values = {layer: layers[layer].tolist() for layer in {layer for layer, _ in top}}
        rows += [(criterion, layer, i, values[layer][i]) for layer, i in top]
    return [dict(zip(COLUMNS, (epoch, *row))) for row in rows]


def step(model, project, images, sizes, y, masks, buffers, args, size, head="linear"):
    """The two terms of eq. 2.3 for a batch, NT-Xent and lambda * L (L alone for --method erm): images uint8 (B, 3, S, S),
    original sizes (B, 2), classes y (B,)."""
    def view():
        return normalize(augment(images, sizes, size, args.augment), model)
    x = view()  # x'
    if args.method != "contrastive":
        logits, contrast = model(x), torch.zeros((), device=x.device)
    else:
        x_p = view() if args.views == "two" else x  # x''
        with penultimate(model) if args.features == "projection" else nullcontext([]) as h:
            logits = model(x)
            logits_p = auxiliary(model, x_p, masks, buffers, args.aux_bn)
        r, r_p = map(project, h or (logits, logits_p))
        contrast = nt_xent(r, r_p, args.temperature)
    if args.method == "erm":
        return {"contrast": contrast, "supervised": F.cross_entropy(logits.softmax(1) if head == "softmax" else logits, y)}
    return {"contrast": contrast, "supervised": args.lam * supervised_loss(logits, y, args.loss, args.lam_reduction)}


def read_pruned(path, finished):
    """Rows of pruned.csv up to the last finished epoch, without what an interruption may have cut off."""
    with open(path, newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values() and int(row["epoch"]) <= finished]


def starting_point(args):
    """The checkpoint to start from: --checkpoint, RUN/erm/epoch_N.pt, or RUN/erm/best.pt. Raises BadInput."""
    if args.checkpoint:
        return args.checkpoint
    kept = sorted((args.run / "erm").glob("epoch_*.pt"))
    path = args.run / "erm" / f"epoch_{40 if args.kick_in is None else args.kick_in:03d}.pt"
    if args.kick_in is None and path not in kept:
        return args.run / "erm" / "best.pt"
    if kept and path not in kept:
        raise BadInput(f"--kick-in {args.kick_in}: {args.run}/erm did not keep that epoch; it kept "
                       f"{', '.join(str(int(f.stem[6:])) for f in kept)} (train_erm.py --keep-epochs)")
    return path


def resolve(args, checkpoint):
    """Fill in what was left out from the ERM run and the kind of data, and refuse what cannot be."""
    check_stage(checkpoint, args.checkpoint)
    kind, erm = "synthetic" if (args.data or checkpoint["data"]["data"]) == "synthetic" else "other", checkpoint["args"]
    fill_defaults(args, {**DEFAULTS[kind], **{key: erm[key] for key in ("batch_size", "augment", "seed")}})
    check_flags(args, "epochs", "batch_size", "lr", "temperature")
    if not 0 < args.prune_fraction < 1:
        raise BadInput(f"--prune-fraction {args.prune_fraction}: must lie between 0 and 1, such as 0.0001 for 0.01 %")
    if not args.lam >= 0:
        raise BadInput(f"--lam {args.lam}: must not be negative")
    if args.batch_size < 2:
        raise BadInput(f"--batch-size {args.batch_size}: NT-Xent contrasts an image with others; use 2 or more")
    if Path(args.name).name != args.name or args.name in ("", "..", "erm", "trace", "structured", "gradcam"):
        raise BadInput(f"--name {args.name!r}: expected the name of a folder in {args.run} that no other stage uses")
    if args.checkpoint.resolve().parent == (args.run / args.name).resolve():
        raise BadInput(f"{args.checkpoint} lies in the folder that this run is to fill; choose another --name")


def main():
    args = parse_args()
    if args.compare:
        return compare(args.compare, args.figure)
    args.checkpoint = starting_point(args)
    resolve(args, load_checkpoint(args.checkpoint))
    folder = args.run / args.name
    state = run_state(folder, args)
    if state == "finished":
        print(f"{folder} is finished; --overwrite trains it again")
        return print_table(json.loads((folder / "results.json").read_text()))

    model, start, splits = reopen(args.checkpoint, args.data, args.cache, args.device, SPLITS)
    train, size = splits["train"], start["size"]
    unit = neuron_unit(model, args.unit)
    if args.gradient_source == "minority" and not any(g["minority"] for g in train.groups):
        raise BadInput("--gradient-source minority: no group of this data set is a minority; use train")
    print(" ".join(f"{key}={value}" for key, value in plain(args).items()))
    set_seed(args.seed)
    project = {"probs": torch.nn.Softmax(1), "logits": torch.nn.Identity()}.get(args.features) or projection_head(model, size)
    optimizer = torch.optim.Adam([*model.parameters(), *project.parameters()], lr=args.lr, betas=(0.9, 0.999), weight_decay=0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
    start_run(folder, args, state)
    describe = {key: start[key] for key in ("arch", "n_classes", "size", "head", "data")} | {"args": plain(args)}
    if args.data:
        describe["data"] = {**start["data"], "data": args.data if args.data == "synthetic" else str(Path(args.data).resolve())}

    def measure():
        logits = {name: predict(model, splits[name], size, args.device, args.batch_size) for name in ("train", "val")}
        reports = {name: group_report(z.argmax(1), splits[name].y, splits[name].g, train.groups) for name, z in logits.items()}
        return logits, reports

    log, right, neurons, best = [], [], [], {"epoch": 0, "score": -1.0}
    pruned = []  # of epochs finished before an interruption
    if state == "unfinished":
        last = load_checkpoint(folder / "last.pt")
        model.load_state_dict(last["model"])
        project.load_state_dict(last["projection"])
        optimizer.load_state_dict(last["optimizer"])
        scheduler.load_state_dict(last["scheduler"])
        best, right = last["best"], list(last["right"])
        pruned = read_pruned(folder / "pruned.csv", last["epoch"])
        neurons = [(row["layer"], int(row["index"])) for row in pruned if int(row["epoch"]) == last["epoch"]]
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()][:last["epoch"] + 1]
    logits, reports = measure()
    if not log:
        log = [{"epoch": 0, **reports}]  # the network as it came from ERM
    if state == "unfinished":
        torch.set_rng_state(last["rng"])
        if last["cuda_rng"]:
            torch.cuda.set_rng_state_all(last["cuda_rng"])
    write_csv(folder / "pruned.csv", pruned, COLUMNS)

    for epoch in range(len(log), args.epochs + 1):
        started, lr, sums = time.time(), optimizer.param_groups[0]["lr"], torch.zeros(2, device=args.device)
        rows = critical_neurons(model, train, logits["train"], args, size, unit, epoch) if args.method == "contrastive" else []
        previous, neurons = neurons, sorted({(row["layer"], row["index"]) for row in rows})
        masks = neuron_masks(model, neurons, unit)
        buffers = {name: b.clone() for name, b in model.named_buffers()} if args.aux_bn == "own" else {}
        order = torch.randperm(len(train.y))
        order = order[:-1] if len(order) % args.batch_size == 1 else order  # no batch of one image
        model.train()
        steps = batches(train, args.batch_size, order, args.device)
        for index, images in tqdm(steps, f"epoch {epoch}", math.ceil(len(order) / args.batch_size), disable=None, leave=False):
            y, sizes = train.y[index].to(args.device), train.original_sizes[index]
            terms = step(model, project, images, sizes, y, masks, buffers, args, size, start["head"])
            loss = terms["contrast"] + terms["supervised"]  # eq. 2.3
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sums += torch.stack(list(terms.values())).detach() * len(index)
        contrast, supervised = (sums / len(order)).tolist()
        loss = contrast + supervised
        if not (math.isfinite(loss) and all(value.isfinite().all() for value in model.state_dict().values())):
            kept = f"{folder}/last.pt holds epoch {epoch - 1}" if epoch > 1 else "no epoch was finished"
            raise BadInput(f"training diverged in epoch {epoch} (loss {loss}); {kept}; try a smaller --lr than {args.lr}")
        scheduler.step(loss)

        logits, reports = measure()
        right.append(logits["val"].argmax(1) == splits["val"].y)
        fields = {**describe, "epoch": epoch, "metrics": reports}
        if reports["val"]["acc_worst"] > best["score"]:
            best = {"epoch": epoch, "score": reports["val"]["acc_worst"]}
            save_checkpoint(folder / "best.pt", model, **fields)
        log.append({"epoch": epoch, "contrast": contrast, "supervised": supervised, "loss": loss, "lr": lr,
                    "seconds": round(time.time() - started, 2), "pruned": len(neurons),
                    "pruned_before": len(set(previous).intersection(neurons)), **reports})
        write_lines(folder / "log.jsonl", log)
        with open(folder / "pruned.csv", "a", newline="") as file:  # millions of rows where many weights are masked
            csv.DictWriter(file, COLUMNS).writerows(rows)
        save_checkpoint(folder / "last.pt", model, **fields, best=best, optimizer=optimizer.state_dict(),
                        scheduler=scheduler.state_dict(), projection=project.state_dict(), right=torch.stack(right),
                        rng=torch.get_rng_state(),
                        cuda_rng=torch.cuda.get_rng_state_all() if args.device.startswith("cuda") else [])
        print_epoch(log[-1], args.epochs)

    # The test split is read here and nowhere else: for the start, the selected and the last epoch
    results = {"stage": "finetune", "arch": start["arch"], "data": describe["data"]["data"], "start": args.checkpoint.name,
               "start_epoch": start["epoch"], **{key: getattr(args, key) for key in (*METHOD, *BUDGET)}, "unit": unit,
               "selected_epoch": best["epoch"],
               "selection": selection_spread(torch.stack(right), splits["val"].g, best["epoch"], args.seed)}
    for key, path, row in (("before", args.checkpoint, log[0]), ("splits", folder / "best.pt", log[best["epoch"]]),
                           ("last", folder / "last.pt", log[-1])):
        if key == "last" and best["epoch"] == args.epochs:
            test = results["splits"]["test"]
        else:
            test = evaluate(load_model(path, args.device)[0], splits["test"], size, args.device, args.batch_size)
        results[key] = {"train": row["train"], "val": row["val"], "test": test}
    write_json(folder / "results.json", results)
    plot_groups(results, folder / "groups.png")
    plot_curves(log, best["epoch"], folder / "curves.png")
    print_table(results)
    print(f"wrote {folder}/")


def selection_spread(right, g, selected, seed, resamples=1000):
    """How firmly validation chose the epoch: right (epochs, N) says which validation images each epoch gets right, g (N,)
    their groups. Images are drawn anew with replacement within each group; returns the standard deviation of the
    selected epoch's worst-group accuracy and {epoch: share of draws in which it has the highest one}."""
    generator, accuracies = torch.Generator().manual_seed(seed), []
    for j in g.unique():
        n = int((g == j).sum())
        times = draw_with_replacement(n, generator, resamples)
        accuracies.append(times @ right[:, g == j].float().T / n)
    worst = torch.stack(accuracies).amin(0).numpy()  # (resamples, epochs)
    chosen = np.bincount(worst.argmax(1), minlength=len(right)) / resamples
    return {"acc_worst_sd": float(worst[:, selected - 1].std(ddof=1)),
            "chosen": {epoch: float(share) for epoch, share in enumerate(chosen, 1) if share > 0}}


def print_epoch(row, epochs):
    pruned = f"pruned {row['pruned']} ({row['pruned_before']} as before) " if row["pruned"] else ""
    print(f"epoch {row['epoch']}/{epochs} contrast {row['contrast']:.4f} supervised {row['supervised']:.4f} lr {row['lr']:.1e} "
          f"{pruned}train {percent(row['train'])} val {percent(row['val'])} worst {100 * row['val']['acc_worst']:.1f} "
          f"(group {row['val']['worst_group']}) {row['seconds']:.0f} s", flush=True)


def print_table(results):
    """Group accuracies before and after, and how firmly validation chose the epoch."""
    before, after = results["before"], results["splits"]
    print(f"\nbefore ({results['start']}, epoch {results['start_epoch']}) -> after (epoch {results['selected_epoch']} of "
          f"{results['epochs']}, {results['method']}); accuracy in %, * minority")
    print(f"{'group':32s}" + "".join(f"{name:>18s}" for name in SPLITS))
    for j, g in enumerate(before["train"]["groups"]):
        pairs = [(before[name]["groups"][j], after[name]["groups"][j]) for name in SPLITS]
        cells = [f"{100 * b['acc']:7.1f} -> {100 * a['acc']:5.1f}" if b["n"] else "-" for b, a in pairs]
        print(f"{g['group']} {g['name'] + ('*' if g['minority'] else ''):30s}" + "".join(f"{cell:>18s}" for cell in cells))
    for name, key in (("worst group", "acc_worst"), ("mean", "acc_mean"), ("mean, training mix", "acc_mean_train_mix")):
        cells = [f"{100 * before[split][key]:7.1f} -> {100 * after[split][key]:5.1f}" for split in SPLITS]
        print(f"{name:32s}" + "".join(f"{cell:>18s}" for cell in cells))
    spread, last = results["selection"], results["last"]["test"]["acc_worst"]
    chosen = sorted(spread["chosen"].items(), key=lambda item: -item[1])[:4]
    print(f"selection: validation worst-group accuracy +- {100 * spread['acc_worst_sd']:.1f}; drawn anew, these images would "
          f"choose epoch {', '.join(f'{epoch} ({100 * share:.0f} %)' for epoch, share in chosen)}; last epoch's test worst "
          f"group {100 * last:.1f}")


def plot_groups(results, path):
    """Training and test accuracy of every group before and after fine-tuning."""
    n = len(results["before"]["train"]["groups"])
    fig, axes = plt.subplots(1, 2, figsize=(4 + 2 * n, 3.4), layout="constrained", sharey=True)
    bars = {"before": ("before", -0.2, {"color": "0.75"}), "splits": ("after", 0.2, {"color": "0.35", "hatch": "///"})}
    for ax, name, title in zip(axes, ("train", "test"), ("training", "test")):
        for key, (label, offset, style) in bars.items():
            rows = results[key][name]["groups"]
            heights = [100 * (g["acc"] or 0) for g in rows]
            drawn = ax.bar(np.arange(n) + offset, heights, 0.4, label=label, edgecolor="white", **style)
            ax.bar_label(drawn, [f"{100 * g['acc']:.1f}" if g["n"] else "no image" for g in rows], fontsize=8)
        ax.set_xticks(range(n), [f"G{g['group']}{'*' if g['minority'] else ''}\n{g['name']}\nn = {g['n']}" for g in rows],
                      fontsize=7)
        ax.set(title=title, ylim=(0, 122), yticks=range(0, 101, 20))
    axes[0].set_ylabel("accuracy (%)")
    axes[0].legend(loc="upper center", ncols=2, fontsize=8)
    fig.suptitle(f"Group accuracy before and after fine-tuning ({results['method']}, * minority)", fontsize=11)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def plot_curves(log, selected, path):
    """Accuracy of every group over the epochs (0: as ERM left it), and both loss terms."""
    groups, epochs = log[0]["train"]["groups"], [row["epoch"] for row in log]
    fig, axes = plt.subplots(1, len(groups) + 1, figsize=(2.7 * (len(groups) + 1), 2.6), layout="constrained")
    for j, (ax, group) in enumerate(zip(axes, groups)):
        for name, style in (("train", {"color": "0.6", "ls": "-"}), ("val", {"color": "0.0", "ls": "--"})):
            accuracy = [row[name]["groups"][j]["acc"] for row in log]
            ax.plot(epochs, [math.nan if acc is None else 100 * acc for acc in accuracy], label=name, **style)
        ax.set(title=f"G{j}{'*' if group['minority'] else ''} {group['name']}", ylim=(-3, 103), xlabel="epoch")
    axes[0].set_ylabel("accuracy (%)")
    axes[0].legend(loc="lower right", fontsize=8)
    for key, style in (("contrast", {"color": "0.0", "ls": "--"}), ("supervised", {"color": "0.5"})):
        axes[-1].plot(epochs[1:], [row[key] for row in log[1:]], label=key, **style)
    axes[-1].set(title="loss terms", ylabel="loss", xlabel="epoch")
    axes[-1].legend(fontsize=8)
    for ax in axes:
        ax.axvline(selected, color="0.8", ls=":", zorder=0)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def compare(folders, figure):
    """Table 12 and Figure 6 from finished runs: test worst-group accuracy of every NAME, mean and standard deviation over run
    folders (seeds), and its difference, paired within the run folder, from the network before fine-tuning and from ERM
    continued with the same start and budget."""
    if figure.suffix not in (".png", ".pdf", ".svg"):
        raise BadInput(f"--figure {figure}: expected a file name that ends in .png, .pdf or .svg")
    found = {}  # {data and arch: {name: {run: results}}}
    for folder in (path.resolve() for path in folders):
        for path in [folder / "results.json"] if (folder / "results.json").exists() else sorted(folder.glob("*/results.json")):
            result = json.loads(path.read_text())
            if result["stage"] == "finetune":
                key = (result["data"], result["arch"])
                found.setdefault(key, {}).setdefault(path.parent.name, {})[path.parents[1]] = result
    if not found:
        raise BadInput(f"--compare {' '.join(map(str, folders))}: no finished fine-tuning run there; give folders such as "
                       "runs/wb0 or runs/wb0/finetune")
    tables = {f"{Path(data).name}, {arch}": comparison(settings) for (data, arch), settings in found.items()}
    columns = {"worst group": "worst", "- before": "from_before", "- ERM continued": "from_erm", "last epoch": "last",
               "mean": "mean"}
    for data, table in tables.items():
        print(f"\n{data}: test worst-group accuracy in %, mean +- sd (n); differences in points, paired by run folder")
        print(f"{'':32s}" + "".join(f" {name:>18s}" for name in columns))
        for name, row in table.items():
            print(f"{name:32s}" + "".join(f" {cell(row[key]):>18s}" for key in columns.values()))
    figure.parent.mkdir(parents=True, exist_ok=True)
    plot_compare(tables, figure)
    write_json(figure.with_suffix(".json"), tables)
    print(f"wrote {figure} and {figure.with_suffix('.json')}")


def comparison(settings):
    """Rows of the comparison, {name: {column: values in percent, one per run folder}}; settings {name: {run: results}}. The
    controls, ERM continued, are looked up in the run folders."""
    def budget(r):
        return tuple(r[key] for key in ("start", "start_epoch", *BUDGET))
    def worst(reports):
        return 100 * reports["test"]["acc_worst"]
    def row(selected, **more):
        return {"worst": [worst(r) for r in selected], "from_before": [], "from_erm": [], "last": [],
                "mean": [100 * r["test"]["acc_mean_train_mix"] for r in selected], **more}
    runs = dict.fromkeys(run for by_run in settings.values() for run in by_run)
    stages = [(path.parents[1], json.loads(path.read_text())) for run in runs for path in sorted(run.glob("*/results.json"))]
    continued = {(run, budget(r)): worst(r["splits"]) for run, r in stages if r["stage"] == "finetune" and r["method"] == "erm"}
    start = {}
    for run, r in ((run, r) for by_run in settings.values() for run, r in by_run.items()):
        start.setdefault(r["start"], {})[run] = r["before"]
    table = {"ERM, selected epoch": row([r["splits"] for _, r in stages if r["stage"] == "erm"])}
    table |= {f"before: {name}": row(by_run.values()) for name, by_run in start.items()}
    for name, by_run in settings.items():
        differ = [key for key in (*METHOD, *BUDGET[:-1]) if len({r[key] for r in by_run.values()}) > 1]
        if differ:
            warn(f"the runs called {name} differ in more than the seed: {', '.join(differ)}")
        table[name] = row(
            [r["splits"] for r in by_run.values()], last=[worst(r["last"]) for r in by_run.values()],
            from_before=[worst(r["splits"]) - worst(r["before"]) for r in by_run.values()],
            from_erm=[worst(r["splits"]) - continued[run, budget(r)] for run, r in by_run.items()
                      if r["method"] != "erm" and (run, budget(r)) in continued])
    return {name: columns for name, columns in table.items() if columns["worst"]}


def cell(values):
    """Mean +- sample standard deviation (n)."""
    if not values:
        return "-"
    return f"{np.mean(values):.1f}" + (f" +- {np.std(values, ddof=1):.1f}" if len(values) > 1 else "") + f" ({len(values)})"


def plot_compare(tables, path):
    """Figure 6: test worst-group accuracy before fine-tuning and after each setting; bars: mean, whiskers: standard
    deviation, dots: single runs."""
    most = max(len(table) for table in tables.values())
    width = len(tables) * (1.5 + 0.75 * most)
    fig, axes = plt.subplots(1, len(tables), figsize=(width, 3.8), layout="constrained", sharey=True, squeeze=False)
    for ax, (data, table) in zip(axes[0], tables.items()):
        for i, (name, row) in enumerate(table.items()):
            spread = np.std(row["worst"], ddof=1) if len(row["worst"]) > 1 else None
            colour = "0.8" if name.startswith(("ERM", "before")) else "0.55"
            ax.bar(i, np.mean(row["worst"]), 0.7, yerr=spread, color=colour, edgecolor="black", lw=0.5, error_kw={"capsize": 3})
            ax.plot([i] * len(row["worst"]), row["worst"], "o", mfc="white", color="black", ms=3.5, lw=0)
        ax.set_xticks(range(len(table)), [name.replace("finetune-", "") for name in table], rotation=35, ha="right", fontsize=8)
        ax.set_title(data, fontsize=10)
        ax.grid(axis="y", color="0.9")
        ax.set_axisbelow(True)
    axes[0][0].set_ylabel("test worst-group\naccuracy (%)")
    fig.suptitle("Worst-group accuracy before and after fine-tuning (mean, standard deviation, single runs)", fontsize=11)
    fig.savefig(path, dpi=120)
    plt.close(fig)


if __name__ == "__main__":
    with one_line_errors():
        main()
