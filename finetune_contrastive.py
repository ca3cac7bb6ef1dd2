"""Stage 4: fine-tune a network against a masked version of itself, and the controls beside it.

    python finetune_contrastive.py                              # the run of train_erm.py
    python finetune_contrastive.py --run runs/wb0 --criterion gradient --name finetune-gradient
    python finetune_contrastive.py --method erm --name finetune-erm         # a control

Paper: section 2.2, Figures 6 and 9, Tables 2, 4-10, 12. Each epoch the critical neurons of the
network are masked in an auxiliary branch that shares all its weights. Two augmentations of an
image, one through each branch, are pulled together by NT-Xent (eq. 2.1), and the target branch also
learns the labels (eq. 2.2, 2.3):

    x --augment--> x'  --> target    f(theta)      --> r   = softmax(logits)
    x --augment--> x'' --> auxiliary f(m * theta)  --> r_p = softmax(logits)

    loss = NT-Xent(r, r_p) + lambda * ||r - one-hot(y)||^2

Starts from a checkpoint of RUN/erm and writes RUN/NAME/: args.json, log.jsonl, masked.csv, best.pt,
last.pt, results.json and curves.png. The same command again continues an interrupted run.
"""

import json
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also for python -P
import common
from common import BadInput

FILES = (
    "args.json",
    "log.jsonl",
    "masked.csv",
    "best.pt",
    "last.pt",
    "results.json",
    "curves.png",
)


def parse_args(argv=None):
    p = common.make_parser(
        f"{__doc__}\nIn brackets: the default. It follows the paper's text, except in the points "
        "that README.md\nlists under 'Where we differ, and it matters'; 'code' says what the "
        "released code does where\nthat is something else."
    )
    p.add_argument("--name", default="finetune", help="folder in RUN, to keep several (finetune)")
    g = p.add_argument_group("start")
    g.add_argument(
        "--kick-in",
        type=common.positive_int,
        metavar="N",
        help="start from RUN/erm/epoch_N.pt; paper: 40 of 100 (40 %% of ERM's epochs if it kept "
        "that one, else its best.pt; code: 41; CelebA 20)",
    )
    g.add_argument("--checkpoint", type=Path, help="start from this checkpoint instead")
    g.add_argument("--data", help="where the data are now, if they moved (as the checkpoint says)")
    g = p.add_argument_group("method")
    g.add_argument(
        "--method",
        choices=["contrastive", "supervised", "erm"],
        default="contrastive",
        help="contrastive: the paper's; supervised: its second term alone; erm: cross entropy goes "
        "on with this stage's optimizer, the control of the same budget (contrastive)",
    )
    g.add_argument(
        "--criterion",
        choices=[*common.CRITERIA, "mixed", "random", "none"],
        default="magnitude",
        help="which neurons are masked: those of largest score by this criterion; mixed: those of "
        "magnitude and those of gradient (code: the gradient's only); random ones and none are "
        "controls (magnitude)",
    )
    g.add_argument(
        "--prune-fraction",
        type=common.between(float, 1e-12, 1),
        default=1e-4,
        help="share of all neurons that is masked, rounded up; of mixed by each criterion (0.0001, "
        "so 0.01 %%; code: 0.01)",
    )
    g.add_argument(
        "--order",
        choices=["largest", "smallest"],
        default="largest",
        help="which end of the scores is masked (largest; code: the smallest magnitudes)",
    )
    g.add_argument(
        "--unit",
        choices=["auto", "channel", "weight"],
        default="auto",
        help="what a neuron is; auto: a weight where linear layers hold most weights, as in "
        "transformers, else a channel (auto; code: weights by magnitude, channels by gradient)",
    )
    g.add_argument(
        "--gradient-source",
        choices=["train", "minority"],
        default="train",
        help="the gradient is that of 128 images drawn from the 256 with the highest loss of all "
        "training images, or of the minority groups (train; code: the 200 with the lowest)",
    )
    g.add_argument(
        "--views",
        choices=["two", "one"],
        default="two",
        help="two: an augmentation for each branch; one: the same for both (two; code: one)",
    )
    g.add_argument(
        "--temperature",
        type=common.positive_float,
        default=0.5,
        help="tau of eq. 2.1, on which the paper is silent (0.5)",
    )
    g.add_argument(
        "--loss",
        choices=["mse", "ce"],
        default="mse",
        help="mse: squared error of softmax outputs (eq. 2.2 says 'prediction vector'); ce: cross "
        "entropy of logits (mse; code: ce)",
    )
    g.add_argument(
        "--lam",
        type=common.between(float, 0),
        default=0.2,
        help="lambda of eq. 2.3. It multiplies the squared error or cross entropy summed over the "
        "batch, as in a line of the released code that is commented out. To weigh the mean over "
        "the batch, as eq. 2.3 is written, divide it by the batch size (0.2)",
    )
    g = p.add_argument_group("training")
    g.add_argument(
        "--epochs",
        type=common.positive_int,
        help="passes over the training images (a fifth of ERM's, as the paper's 20 of 100, but at "
        "least 4)",
    )
    g.add_argument(
        "--lr", type=common.positive_float, default=2e-4, help="learning rate of Adam (2e-4)"
    )
    g.add_argument(
        "--batch-size",
        type=common.between(int, 2, 10**6),
        help="images a step, on which the paper is silent (that of ERM; code: 100)",
    )
    g.add_argument(
        "--augment", choices=["table1", "crop-flip", "none"], help="as in stage 1 (that of ERM)"
    )
    g.add_argument(
        "--seed",
        type=common.seed_int,
        help="draws the order of images, their augmentation, worst images, random neurons (ERM's)",
    )
    g.add_argument(
        "--overwrite",
        action="store_true",
        help="start anew where RUN/NAME holds a finished run, or one of other settings",
    )
    args = p.parse_args(argv)
    taken = args.name in ("erm", "trace", "structured", "gradcam") or not args.name.isprintable()
    if taken or Path(args.name).name != args.name or args.name[:1] in ("", "."):
        p.error(f"--name {args.name!r}: expected the name of a folder that no other stage uses")
    return args


# ---- the method ----


def critical_neurons(model, weights, images, logits, groups, args, epoch):
    """The neurons to mask in this epoch, a list of dicts (criterion, parameter, index, score);
    'mixed' may list one twice. images: the training set without augmentation; logits (N, C) of all
    of it, by the model as it is."""
    generator = torch.Generator().manual_seed(common.seed_of(args.seed, epoch))
    counts = common.count_neurons(weights, args.unit)
    total = sum(counts.values())
    k = max(1, math.ceil(round(args.prune_fraction * total, 6)))  # 0.07 * 100 is a hair above 7
    rows = []
    if args.criterion == "random":
        places = torch.randperm(total, generator=generator)[:k].tolist()
        for name, index in common.locate(places, counts):
            rows.append({"criterion": "random", "parameter": name, "index": index, "score": ""})
    for criterion in scored_criteria(args.criterion):
        gradients = {}
        if common.needs_gradient(criterion):
            index = torch.arange(len(images))
            if args.gradient_source == "minority":
                minority = torch.tensor([group["minority"] for group in groups])
                index = minority[images.g].nonzero()[:, 0]
            worst = common.worst_images(logits, images.y, index, generator)
            gradients = common.mean_gradient(
                model,
                weights,
                common.Batches(images, args.device, args.batch_size, index=worst),
            )
        scores = common.score_neurons(weights, gradients, criterion, args.unit)
        if args.order == "smallest":
            scores = {name: -values for name, values in scores.items()}
        for name, index in common.top_neurons(scores, k):
            rows.append(
                {
                    "criterion": criterion,
                    "parameter": name,
                    "index": index,
                    "score": abs(float(scores[name][index])),
                }
            )
    return rows


def scored_criteria(criterion):
    """The criteria by whose scores neurons are chosen under --criterion, a list of names."""
    if criterion in ("random", "none"):
        return []
    if criterion == "mixed":
        return ["magnitude", "gradient"]
    return [criterion]


def auxiliary(model, x, masks):
    """f(m * theta, x), section 2.2.1: logits of the network with masked weights. Not a copy: the
    masks multiply the same parameters, so gradients meet in shared weights. In training mode
    BatchNorm normalises by the batch, and what this pass would do to its running statistics is
    thrown away. Not for networks with gradient checkpointing, whose second forward pass would run
    without the masks."""
    masked = {name: model.get_parameter(name) * mask for name, mask in masks.items()}
    scratch = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return torch.func.functional_call(model, {**masked, **scratch}, (x,))


def nt_xent(r, r_p, temperature=0.5):
    """NT-Xent, eq. 2.1: features r of the target and r_p of the auxiliary branch, both (B, F) ->
    scalar, the mean over all 2B features, each once as the anchor (both directions). An image's
    other feature is the positive; the sum in the denominator runs over it and the 2B - 2 features
    of other images, as in SimCLR."""
    z = torch.nn.functional.normalize(torch.cat([r, r_p]).float(), dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    with torch.autocast(z.device.type, enabled=False):  # else the products would be of bf16
        similarity = (z @ z.T / temperature).masked_fill(itself, -math.inf)  # (2B, 2B)
    positive = torch.arange(len(z), device=z.device).roll(len(r))  # i <-> i + B
    return torch.nn.functional.cross_entropy(similarity, positive)


def supervised_loss(logits, y, loss="mse"):
    """L_MSE of eq. 2.2, ||softmax(logits) - one-hot(y)||_2^2, or the cross entropy, summed over the
    batch; logits (B, C), y (B,)."""
    if loss == "ce":
        return torch.nn.functional.cross_entropy(logits, y, reduction="sum")
    error = logits.softmax(1) - torch.nn.functional.one_hot(y, logits.shape[1])
    return error.square().sum()


def losses(model, x, y, masks, args):
    """The terms whose sum is minimised, {name: scalar}: eq. 2.3, or a control's. x (B, 3, S, S), or
    (B, 2, 3, S, S) with two views; y (B,). A further term is one more line."""
    terms = {}
    if x.dim() == 5:
        x, x_p = x.unbind(1)  # x', x''
    else:
        x_p = x
    logits = model(x).float()  # (B, C); bf16 has 3 digits, which are too few for a loss
    if args.method == "contrastive":
        logits_p = auxiliary(model, x_p, masks).float()
        terms["contrast"] = nt_xent(logits.softmax(1), logits_p.softmax(1), args.temperature)
    if args.method == "erm":
        terms["cross entropy"] = torch.nn.functional.cross_entropy(logits, y)
    else:
        terms["supervised"] = args.lam * supervised_loss(logits, y, args.loss)
    return terms


# ---- the run ----


def main(args):
    # The start, its data, settings, and what an earlier run of this command left
    args.checkpoint = starting_point(args)
    model, start, table = common.reopen(args.checkpoint, args.data, args.device)
    weights = common.prunable_weights(model)
    resolve(args, start["erm"], table, weights)
    common.print_settings(args)
    folder = args.run / args.name
    inputs = {
        "labels": start["data"]["labels"],  # reopen has compared these two
        "images": start["data"].get("images"),
        "start": common.fingerprint_of(model),
    }
    test_labels = table.fingerprint("test")
    last, results = common.earlier_run(folder, args, parse_args([]), FILES, test_labels, **inputs)
    if results:
        with common.reading(folder / "results.json", common.START_ANEW):
            print_table(results)
        return

    # Optimizer, and where an interrupted run left it
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
    log = []
    masked = []  # rows of masked.csv, of all epochs
    if last:
        log = common.restore(folder, last, model, optimizer, scheduler)
        masked = last["masked"]

    # What is learned from, and what is evaluated on
    views = 2 if args.method == "contrastive" and args.views == "two" else 1
    train, loaders, test = common.training_batches(start, table, args, views)
    common.begin(folder, "finetune", args, FILES, last, **inputs)

    reports, logits = common.evaluate(model, loaders, table.groups)
    if not log:
        log.append({"epoch": 0, "terms": {}, **reports})  # the network as it came from ERM
    for epoch in range(len(log), args.epochs + 1):
        started = time.time()
        lr = optimizer.param_groups[0]["lr"]
        # The mask of this epoch, from the network as it is now
        rows = []
        if args.method == "contrastive":
            rows = critical_neurons(
                model,
                weights,
                loaders["train"].images,
                logits["train"],
                table.groups,
                args,
                epoch,
            )
        neurons = [(row["parameter"], row["index"]) for row in rows]
        masks = common.neuron_masks(weights, neurons, args.unit)
        masked += [{"epoch": epoch, **row} for row in rows]
        # Order, augmentation and dropout follow from (seed, epoch), so a continued run sees the
        # same as one that was never interrupted
        torch.manual_seed(common.seed_of(args.seed, epoch))
        train.order.epoch = epoch
        model.train()
        sums = {}
        n = 0
        for x, y, *_ in tqdm(train, f"epoch {epoch}", disable=None, leave=False):
            optimizer.zero_grad()  # first, so that old gradients do not lie beside activations
            terms = losses(model, x, y, masks, args)
            loss = sum(terms.values())  # eq. 2.3
            loss.backward()
            optimizer.step()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term.detach() * len(y)
            n += len(y)
        loss = common.finite_loss(
            sum(sums.values()) / n,
            epoch,
            model,
            "try a lower --lr or --lam, or a higher --temperature",
        )
        scheduler.step(loss)

        reports, logits = common.evaluate(model, loaders, table.groups)
        row = {
            "epoch": epoch,
            "loss": loss,
            "terms": {name: (value / n).item() for name, value in sums.items()},
            "lr": lr,
            "masked": len(set(neurons)),
            "seconds": round(time.time() - started, 2),
            **reports,
        }
        log.append(row)
        common.print_epoch(row, args.epochs)

        checkpoint = {
            **start,
            "data": {**start["data"], "source": table.source},
            "args": common.plain(args),
            "epoch": epoch,
            "model": model.state_dict(),
        }
        common.save_epoch(
            folder,
            checkpoint,
            log,
            optimizer,
            scheduler,
            {"masked.csv": masked},
            masked=masked,
        )

    # The selected epoch and, to compare, the start as it was when it was read
    selected = common.measure_selected(folder, model, test, table, log)
    model.load_state_dict(start["model"])
    start_test, _ = common.evaluate(model, test, table.groups)
    results = {
        "stage": "finetune",
        "source": table.source,
        "arch": start["arch"],
        "start": args.checkpoint.name,
        "start_epoch": start["epoch"],
        "method": args.method,
        "epochs": args.epochs,
        "before": {"train": log[0]["train"], "val": log[0]["val"], **start_test},
        **selected,
        "erm": start["erm"],
        "test_labels": test_labels,
    }
    common.write(folder, {"results.json": results})
    print_table(results)
    common.write(folder, {"curves.png": common.plot_epochs(log)})
    print(f"wrote {folder}/")


def starting_point(args):
    """--checkpoint, or the epoch of --kick-in, by default 40 % of ERM's epochs; best.pt where that
    one was not kept. Raises BadInput."""
    folder = args.run / "erm"
    if args.checkpoint:
        return args.checkpoint
    if args.kick_in:
        path = folder / f"epoch_{args.kick_in:03d}.pt"
        if not path.exists():
            raise BadInput(
                f"{path}: no such file; train_erm.py keeps the epochs of its --keep-epochs, and "
                "--checkpoint takes any other file"
            )
        return path
    kick_in = common.default_kick_in(erm_epochs(args.run))
    path = folder / f"epoch_{kick_in:03d}.pt"
    if path.exists():
        return path
    common.warn(f"{folder} has not kept epoch {kick_in}, 40 % of its epochs; using best.pt")
    return folder / "best.pt"


def erm_epochs(run):
    """How many epochs RUN/erm has, or will have. Raises BadInput."""
    path = run / "erm" / "args.json"
    with common.reading(path, "train_erm.py writes it; or give --checkpoint"):
        return json.loads(path.read_text())["args"]["epochs"]


def resolve(args, erm, table, weights):
    """Fill in what was left out, from the settings of the ERM run; refuse what cannot be."""
    for key in ("batch_size", "augment", "seed"):
        if getattr(args, key) is None:
            setattr(args, key, erm["settings"][key])
    if args.epochs is None:
        epochs = erm["settings"]["epochs"]
        # That of RUN/erm may have been extended since
        if args.checkpoint.resolve().parent == (args.run / "erm").resolve():
            epochs = erm_epochs(args.run)
        args.epochs = max(4, epochs // 5)
    cause = f"--criterion {args.criterion}"
    if args.method != "contrastive":
        cause = f"--method {args.method}"
    defaults = parse_args([])
    for key in unused_settings(args):
        if getattr(args, key) != getattr(defaults, key):
            flag = f"--{key.replace('_', '-')} {getattr(args, key)}"
            raise BadInput(f"{flag} changes nothing with {cause}; leave it out")
    if args.unit == "auto":
        args.unit = common.choose_unit(weights)
    minority = any(group["minority"] for group in table.groups)
    if args.gradient_source == "minority" and not minority:
        raise BadInput("--gradient-source minority: no group of these data is one; use train")
    if args.checkpoint.resolve().parent == (args.run / args.name).resolve():
        raise BadInput(f"{args.checkpoint} lies in the folder to be filled; choose another --name")


def unused_settings(args):
    """The settings, a list of names, that change nothing under --method and --criterion."""
    if args.method != "contrastive":
        unused = ["criterion", "prune_fraction", "order", "unit", "gradient_source"]
        unused += ["views", "temperature"]
        if args.method == "erm":
            unused += ["loss", "lam"]
        return unused
    scored = scored_criteria(args.criterion)
    unused = []
    if args.criterion == "none":
        unused += ["prune_fraction", "unit"]
    if not scored:
        unused += ["order"]
    if not any(map(common.needs_gradient, scored)):
        unused += ["gradient_source"]
    return unused


def print_table(results):
    common.print_splits(
        f"before ({results['start']}, epoch {results['start_epoch']}) -> after (epoch "
        f"{results['selected_epoch']} of {results['epochs']}, {results['method']})",
        results["splits"],
        results["before"],
    )


if __name__ == "__main__":
    common.run_stage(parse_args, main)
