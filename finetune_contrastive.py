"""Stage 4: fine-tune a network against a pruned copy of itself, and the controls beside it.

    python finetune_contrastive.py                              # the run of train_erm.py
    python finetune_contrastive.py --run runs/wb0 --criterion gradient --name finetune-gradient
    python finetune_contrastive.py --method erm --name finetune-erm         # a control

Paper: section 2.2, Figures 6 and 9, Tables 2, 4-10, 12. Each epoch the critical neurons of the
network are masked in an auxiliary branch that shares all its weights. Two augmentations of an
image, one through each branch, are pulled together by NT-Xent (eq. 2.1), and the target branch also
learns the labels (eq. 2.2, 2.3):

    x --augment--> x'  --> target    f(theta)      --> r    \\  NT-Xent(r, r_p), both directions
    x --augment--> x'' --> auxiliary f(m * theta)  --> r_p  /  + lambda * ||softmax - one-hot||^2

Starts from a checkpoint of RUN/erm and writes RUN/NAME/: args.json, log.jsonl, pruned.csv, best.pt,
last.pt, groups.png, curves.png, results.json. The same command again continues an interrupted run.
"""

import json
import math
import signal
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while torch is still loading; later common.script answers
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.func import functional_call
from tqdm import tqdm

import common
from common import BadInput

FILES = ("args.json", "log.jsonl", "pruned.csv", "best.pt", "last.pt", "results.json")
FILES += ("groups.png", "curves.png")

NOTES = """In brackets: the default, which follows the paper's text; "code": what its released code
does.

--kick-in          start from RUN/erm/epoch_N.pt; paper: 40 of 100; default: 40 % of ERM's epochs
                   if it kept that one, else its best.pt (code: 41; CelebA 20)
--method           contrastive: the paper's; supervised: its second term alone; erm: cross entropy
                   goes on, the control of the same budget
--criterion        largest l2 norm of weights (magnitude), of gradient, or mixed, both sets (code:
                   the gradient's only); random ones and none are controls
--prune-fraction   of all neurons, rounded up (code: 0.01 of all weights)
--order            code: the smallest, for magnitude
--unit             what a neuron is; auto: a weight where linear layers hold most weights, as in
                   transformers, else a channel (code: weights by magnitude, channels by gradient)
--gradient-source  128 images drawn from the 256 with the highest loss of all training images
                   (train) or of the minority groups (code: the 200 with the lowest)
--views            two: an augmentation for each branch; one: the same for both (code)
--features         what NT-Xent compares; probs: softmax outputs (Table 2's "projection" of size
                   2, and the code); logits; projection: a SimCLR head
--aux-bn           BatchNorm statistics of the auxiliary branch; own: a copy made each epoch;
                   shared: the target's, which it also updates (code); paper silent
--temperature      tau of eq. 2.1; paper silent
--loss             mse: squared error of softmax outputs (eq. 2.2 says "prediction vector"); ce:
                   cross entropy of logits (code)
--lam-reduction    lambda weighs the sum over the batch, as the code's squared error does, or the
                   mean, as eq. 2.3 reads (with it, hardly anything is learned); NT-Xent is a mean
--batch-size       paper silent (code: 100)
"""


def parse_args(argv=None):
    p = common.make_parser(__doc__, NOTES)
    p.add_argument("--name", default="finetune", help="folder in RUN, to keep several (finetune)")
    g = p.add_argument_group("start")
    g.add_argument("--kick-in", type=int, metavar="N", help="ERM's epoch to start at (40 of 100)")
    g.add_argument("--checkpoint", type=Path, help="start from this checkpoint instead")
    g.add_argument("--data", help="where the data are now, if they moved (as the checkpoint says)")
    g = p.add_argument_group("method")

    def choice(flag, *values):
        g.add_argument(flag, choices=values, default=values[0], help=f"({values[0]})")

    choice("--method", "contrastive", "supervised", "erm")
    choice("--criterion", "magnitude", "gradient", "mixed", "random", "none")
    g.add_argument("--prune-fraction", type=float, default=1e-4, help="(0.0001, that is 0.01 %%)")
    choice("--order", "largest", "smallest")
    choice("--unit", "auto", "channel", "weight")
    choice("--gradient-source", "train", "minority")
    choice("--views", "two", "one")
    choice("--features", "probs", "logits", "projection")
    choice("--aux-bn", "own", "shared")
    g.add_argument("--temperature", type=float, default=0.5, help="(0.5)")
    choice("--loss", "mse", "ce")
    g.add_argument("--lam", type=float, default=0.2, help="lambda of eq. 2.3 (0.2)")
    choice("--lam-reduction", "sum", "mean")
    g = p.add_argument_group("training")
    g.add_argument("--epochs", type=int, help="passes over the training images (20; built-in 5)")
    g.add_argument("--lr", type=float, default=2e-4, help="learning rate of Adam (2e-4)")
    g.add_argument("--batch-size", type=int, help="images a step (that of ERM)")
    g.add_argument("--augment", choices=["table1", "crop-flip", "none"], help="(that of ERM)")
    g.add_argument("--seed", type=int, help="of order, augmentation, random choices (that of ERM)")
    g.add_argument("--overwrite", action="store_true", help="throw away what RUN/NAME holds")
    args = p.parse_args(argv)
    taken = ("", "erm", "trace", "structured", "gradcam")
    if Path(args.name).name != args.name or args.name in taken or args.name[0] == ".":
        p.error(f"--name {args.name!r}: expected the name of a folder that no other stage uses")
    return args


# ---- the method ----


def critical_neurons(model, images, logits, args, counts, epoch):
    """The neurons to mask in this epoch: (criterion, layer, index, score); 'mixed' may list one
    twice. images: the training set without augmentation; logits (N, C) of all of it, by the model
    as it is."""
    if args.method != "contrastive":
        return []
    generator = torch.Generator().manual_seed(common.seed_of(args.seed, epoch))
    total, scores, rows = sum(counts.values()), {}, []
    k = max(1, math.ceil(round(args.prune_fraction * total, 6)))  # 0.07 * 100 is a hair above 7
    if args.criterion == "random":
        drawn = torch.randperm(total, generator=generator)[:k].tolist()
        rows = [("random", layer, i, "") for layer, i in common.locate(drawn, counts)]
    if args.criterion in ("magnitude", "mixed"):
        scores["magnitude"] = common.magnitude_scores(model, args.unit)
    if args.criterion in ("gradient", "mixed"):
        index = torch.arange(len(images))
        if args.gradient_source == "minority":
            index = torch.isin(images.g, torch.tensor(args.minority)).nonzero()[:, 0]
        worst = common.worst_images(logits, images.y, index, generator)
        batches = common.make_loader(images, args.batch_size, parts=[worst])
        scores["gradient"] = common.gradient_scores(model, batches, args.unit)
    sign = 1 if args.order == "largest" else -1
    for criterion, layers in scores.items():
        top = common.top_neurons({layer: sign * values for layer, values in layers.items()}, k)
        values = {layer: layers[layer].tolist() for layer in dict(top)}
        rows += [(criterion, layer, i, values[layer][i]) for layer, i in top]
    return rows


def auxiliary(model, x, masks, buffers):
    """f(m * theta, x), section 2.2.1: logits of the network with masked weights. Not a copy: the
    masks multiply the same parameters, so gradients meet in shared weights. buffers: what stands in
    for the model's own (BatchNorm's statistics), {} to use and move those."""
    parameters = dict(model.named_parameters())
    masked = {name: parameters[name] * mask for name, mask in masks.items()}
    return functional_call(model, {**masked, **buffers}, (x,))


def nt_xent(r, r_p, temperature=0.5):
    """NT-Xent, eq. 2.1: features r of the target and r_p of the auxiliary branch, both (B, F) ->
    scalar, the mean over all 2B features, each once as the anchor (both directions). An image's
    other feature is the positive; the sum in the denominator runs over it and the 2B - 2 features
    of other images, as in SimCLR."""
    z = F.normalize(torch.cat([r, r_p]).float(), dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    with torch.autocast(z.device.type, enabled=False):  # else the products would be of bf16
        similarity = (z @ z.T / temperature).masked_fill(itself, -math.inf)  # (2B, 2B)
    positive = torch.arange(len(z), device=z.device).roll(len(r))  # i <-> i + B
    return F.cross_entropy(similarity, positive)


def supervised_loss(logits, y, loss="mse", reduction="sum"):
    """L_MSE of eq. 2.2, ||softmax(logits) - one-hot(y)||_2^2 of each image, or its cross entropy,
    summed over the batch or its mean; logits (B, C), y (B,)."""
    if loss == "ce":
        return F.cross_entropy(logits, y, reduction=reduction)
    error = logits.softmax(1) - F.one_hot(y, logits.shape[1])
    per_image = error.square().sum(1)
    return per_image.sum() if reduction == "sum" else per_image.mean()


def losses(model, x, y, masks, buffers, project, args):
    """The terms whose sum is minimised, {name: scalar}: eq. 2.3, or a control's. x (B, 3, S, S), or
    (B, 2, 3, S, S) with two views; y (B,). A further term is one more line in front of the end."""
    terms = {}
    x, x_p = x.unbind(1) if x.dim() == 5 else (x, x)  # x', x''
    with penultimate(model) if args.features == "projection" else nullcontext() as features:
        logits = model(x).float()  # (B, C); bf16 has 3 digits, too few for a loss
        if args.method == "contrastive":
            logits_p = auxiliary(model, x_p, masks, buffers).float()
            pair = features if args.features == "projection" else (logits, logits_p)
            terms["contrast"] = nt_xent(*map(project, pair), args.temperature)
    if args.method == "erm":
        softmax_head = args.erm_head == "softmax"
        terms["cross entropy"] = F.cross_entropy(logits.softmax(1) if softmax_head else logits, y)
    else:
        error = supervised_loss(logits, y, args.loss, args.lam_reduction)
        terms["supervised"] = args.lam * error
    return terms


@contextmanager
def penultimate(model):
    """Inside the `with`, every forward pass appends what enters the head, (B, D), to the list."""
    found, head = [], model.get_submodule(common.head_names(model)[0])
    hook = head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].flatten(1)))
    try:
        yield found
    finally:
        hook.remove()


def projection(model, features, size):
    """What is compared of the logits or, for a SimCLR head, of the penultimate features."""
    if features != "projection":
        return {"probs": torch.nn.Softmax(1), "logits": torch.nn.Identity()}[features]
    with penultimate(model) as found, common.evaluating(model), torch.no_grad():
        model(*common.on_device(model, torch.zeros(1, 3, size, size)))
    width = found[0].shape[1]
    layers = [torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, 128)]
    return torch.nn.Sequential(*layers).to(found[0].device)


# ---- the run ----


def main(args):
    # Start, settings and data; everything that can be refused is looked at before anything changes
    args.checkpoint = starting_point(args)
    model, start, table = common.reopen(args.checkpoint, args.data, args.device)
    resolve(args, start, table)
    folder, groups = args.run / args.name, table.groups
    views = 2 if args.method == "contrastive" and args.views == "two" else 1
    augmented = common.open_split(start, table, "train", args.augment, views=views, seed=args.seed)
    order = common.EpochOrder(len(augmented), args.batch_size, args.seed)
    batches = common.make_loader(augmented, workers=args.workers, order=order)
    splits, loaders = {}, {}
    for name in common.SPLITS:
        splits[name] = common.open_split(start, table, name)
        loaders[name] = common.make_loader(splits[name], args.batch_size, args.workers)
    test = {"test": loaders.pop("test")}  # for the end
    args.unit, counts = common.count_neurons(model, args.unit)
    inputs = {"data": table.fingerprint(), "start": common.fingerprint_of(model)}
    last, finished = common.start_or_continue(folder, args, FILES, **inputs)
    if finished is not None:
        with common.reading(folder / "results.json", "use --overwrite"):
            return print_table(finished, groups)

    torch.manual_seed(args.seed)  # of a projection head
    project = projection(model, args.features, start["size"])
    parameters = [*model.parameters(), *project.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=args.lr, betas=(0.9, 0.999), weight_decay=0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
    parts = {"optimizer": optimizer, "scheduler": scheduler, "project": project}
    about = {key: start[key] for key in ("arch", "n_classes", "classes", "size", "mean", "std")}
    about |= {"data": {**start["data"], "source": table.source}, "args": common.plain(args)}
    log, best = [], {"epoch": 0, "score": -1.0}
    pruned_csv, neurons = "epoch,criterion,layer,index,score\n", set()  # neurons: of the mask
    if last:
        with common.reading(folder / "last.pt", "use --overwrite"):
            for name, part in {"model": model, **parts}.items():
                part.load_state_dict(last[name])
            log, best = last["log"], last["best"]
            pruned_csv, neurons = last["pruned"], set(last["neurons"])

    reports, logits = common.evaluate(model, loaders, groups)
    log = log or [{"epoch": 0, **reports}]  # the network as it came from ERM
    for epoch in range(len(log), args.epochs + 1):
        started, lr, n, sums = time.time(), optimizer.param_groups[0]["lr"], 0, {}
        # The mask of this epoch, from the network as it is now
        rows = critical_neurons(model, splits["train"], logits["train"], args, counts, epoch)
        before, neurons = neurons, {(layer, index) for _, layer, index, _ in rows}
        masks = common.neuron_masks(model, neurons, args.unit)
        buffers = {}  # BatchNorm's statistics of the auxiliary branch; none: the target's
        if args.aux_bn == "own":
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        torch.manual_seed(common.seed_of(args.seed, epoch))  # of dropout
        order.epoch = epoch  # order and augmentation follow from (seed, epoch)
        model.train()
        for x, y, *_ in tqdm(batches, f"epoch {epoch}", disable=None, leave=False):
            optimizer.zero_grad()  # in front, as old gradients need not lie beside activations
            x, y = common.on_device(model, x, y)
            terms = losses(model, x, y, masks, buffers, project, args)
            loss = sum(terms.values())  # eq. 2.3
            loss.backward()
            optimizer.step()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term.detach() * len(y)
            n += len(y)
        loss = common.check_finite(sum(sums.values()) / n, model, epoch, args.lr)
        scheduler.step(loss)

        reports, logits = common.evaluate(model, loaders, groups)
        fields = {**about, "epoch": epoch, "metrics": reports}
        if reports["val"]["acc_worst"] > best["score"]:
            best = {"epoch": epoch, "score": reports["val"]["acc_worst"]}
            common.save_checkpoint(folder / "best.pt", model, **fields)
        row = {"epoch": epoch, "terms": {name: (s / n).item() for name, s in sums.items()}}
        row |= {"loss": loss, "lr": lr, "seconds": round(time.time() - started, 2)}
        row |= {"pruned": len(neurons), "pruned_before": len(before & neurons)}
        log.append({**row, **reports})
        pruned_csv += "".join(f"{epoch},{','.join(map(str, neuron))}\n" for neuron in rows)
        common.write(folder / "pruned.csv", pruned_csv)
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"log": log, "best": best, "pruned": pruned_csv, "neurons": sorted(neurons)}
        common.write(folder / "log.jsonl", "".join(f"{json.dumps(row)}\n" for row in log))
        common.save_checkpoint(folder / "last.pt", model, **fields, **state)
        common.print_epoch(log[-1], args.epochs)

    # The test split is read here and nowhere else: for the start, the selected and the last epoch
    results = {"stage": "finetune", "arch": start["arch"], "source": table.source}
    results |= {"start": args.checkpoint.name, "start_epoch": start["epoch"]}
    results |= {"method": args.method, "epochs": args.epochs, "selected_epoch": best["epoch"]}
    networks = {"before": (args.checkpoint, 0), "splits": (folder / "best.pt", best["epoch"])}
    networks["last"] = (folder / "last.pt", args.epochs)
    for key, (path, epoch) in networks.items():
        saved, _ = common.load_model(path, args.device)
        results[key] = {split: log[epoch][split] for split in loaders}
        results[key] |= common.evaluate(saved, test, groups)[0]
    plot(results, log, folder)
    common.write_json(folder / "results.json", results)
    print_table(results, groups)
    print(f"wrote {folder}/")


def starting_point(args):
    """--checkpoint, RUN/erm/epoch_N.pt or, where ERM did not keep it, best.pt. Raises BadInput."""
    folder, kick_in = args.run / "erm", args.kick_in
    if args.checkpoint:
        return args.checkpoint
    if kick_in is None and (folder / "args.json").exists():
        with common.reading(folder / "args.json", "give --kick-in or --checkpoint"):
            kick_in = common.read_json(folder / "args.json")["args"]["epochs"] * 2 // 5
    path = folder / f"epoch_{kick_in or 0:03d}.pt"
    if args.kick_in is None and not path.exists():
        if kick_in and not (folder / "results.json").exists():
            raise BadInput(f"{folder} is unfinished; run train_erm.py again, or give --checkpoint")
        if kick_in:
            common.warn(f"{folder} did not keep epoch {kick_in}, 40 % of its epochs; using best.pt")
        return folder / "best.pt"
    if not path.exists() and (folder / "args.json").exists():
        kept = [file.stem[6:].lstrip("0") for file in sorted(folder.glob("epoch_*.pt"))]
        kept = f"it kept {', '.join(kept) or 'none'} (train_erm.py --keep-epochs)"
        raise BadInput(f"--kick-in {kick_in}: {folder} did not keep that epoch; {kept}")
    return path


def resolve(args, start, table):
    """Fill in what was left out from the ERM run and the kind of data; refuse what cannot be."""
    erm, defaults = start["args"], {"epochs": 5 if table.source == "synthetic" else 20}
    with common.reading(args.checkpoint, "it was not written by a training stage"):
        defaults |= {key: erm[key] for key in ("batch_size", "augment", "seed")}
        args.erm_head = erm.get("head") or erm["erm_head"]  # the latter: of a fine-tuned one
    common.fill_defaults(args, table, **defaults)
    common.check_flags(args, "epochs", "batch_size", "lr", "temperature")
    if not 0 < args.prune_fraction < 1:
        fraction = f"--prune-fraction {args.prune_fraction}"
        raise BadInput(f"{fraction}: must lie between 0 and 1, such as 0.0001 for 0.01 %")
    if not 0 <= args.lam < math.inf:
        raise BadInput(f"--lam {args.lam}: must not be negative")
    if args.batch_size < 2:
        raise BadInput("--batch-size 1: NT-Xent contrasts an image with others; use 2 or more")
    args.minority = [group["group"] for group in table.groups if group["minority"]]
    if args.gradient_source == "minority" and not args.minority:
        raise BadInput("--gradient-source minority: no group of these data is one; use train")
    if args.checkpoint.resolve().parent == (args.run / args.name).resolve():
        raise BadInput(f"{args.checkpoint} lies in the folder to be filled; choose another --name")


def print_table(results, groups):
    """Group accuracies before and after, and the worst group of the last epoch."""
    start = f"before ({results['start']}, epoch {results['start_epoch']})"
    end = f"after (epoch {results['selected_epoch']} of {results['epochs']}, {results['method']})"
    common.print_splits(f"{start} -> {end}", groups, results["splits"], results["before"])
    print(f"last epoch: test worst group {100 * results['last']['test']['acc_worst']:.1f}")


def plot(results, log, folder):
    """Every group before and after; and all epochs (0: as ERM left it) with the loss's terms."""
    fig = Figure(figsize=(4 + 2 * len(log[0]["train"]["groups"]), 3.4), layout="constrained")
    for ax, name in zip(fig.subplots(1, 2), ("train", "test")):
        pair = {"before": results["before"][name], "after": results["splits"][name]}
        common.plot_groups(ax, pair)
        ax.set_title(name)
    heading = f"Group accuracy before and after fine-tuning ({results['method']}, * minority)"
    fig.suptitle(heading, fontsize=11)
    common.save_figure(fig, folder / "groups.png")
    fig, ax = common.plot_epochs(log, results["selected_epoch"])
    for i, name in enumerate(log[-1]["terms"]):
        values = [row["terms"].get(name, math.nan) for row in log[1:]]
        style = {"color": str(0.2 * i % 0.8), "ls": ("--", "-", "-.")[i % 3], "marker": "."}
        ax.plot(range(1, len(log)), values, label=name, **style)
    ax.set(title="loss terms", ylabel="loss")
    ax.legend(fontsize=8)
    common.save_figure(fig, folder / "curves.png")


if __name__ == "__main__":
    arguments = parse_args()
    with common.script(arguments.run / arguments.name), common.machine(arguments):
        main(arguments)
