"""How large a share of a step's gradient the contrast has, and how it moves with lambda.

    python results/share.py runs/birds*             # stage 1 has run in each; a minute a folder

In the first 20 steps of fine-tuning (stage 4, its defaults) the gradients of both terms of eq. 2.3
are taken apart: the l2 norm of each over all weights, and the contrast's share of the sum of norms.
The step itself is taken with both, as in training.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import finetune_contrastive

STEPS = 20
LAMBDAS = (0.002, 0.02, 0.2, 2.0)


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of stage 1")
    return p.parse_args(argv)


def main(args):
    rows = []
    for lam in LAMBDAS:
        of_runs = [norms(run, lam) for run in args.runs]
        contrast, supervised = np.mean(of_runs, axis=0)
        shares = [100 * c / (c + s) for c, s in of_runs]
        rows.append(
            {
                "lambda": lam,
                "contrast": float(contrast),
                "squared error": float(supervised),
                "share of the contrast, %": float(np.mean(shares)),
                "lowest": float(min(shares)),
                "highest": float(max(shares)),
            }
        )
    common.print_rows(
        f"Norm of each term's gradient, mean of the first {STEPS} steps, or of an epoch where that "
        f"is less, and of {len(args.runs)} runs",
        rows,
    )


def norms(run, lam):
    """Mean l2 norm of the gradients of the contrast and of lambda times the squared error."""
    flags = ["--run", str(run), "--lam", str(lam), "--device", "cpu", "--workers", "0"]
    args = finetune_contrastive.parse_args(flags)
    args.checkpoint = finetune_contrastive.starting_point(args)
    model, start, table = common.reopen(args.checkpoint)
    weights = common.prunable_weights(model)
    finetune_contrastive.resolve(args, start["erm"], table, weights)
    images = common.open_split(start, table, "train", augment=args.augment, views=2, seed=args.seed)
    order = common.EpochOrder(len(images), args.batch_size, args.seed)
    order.epoch = 1
    rows = finetune_contrastive.critical_neurons(
        model, weights, None, None, table.groups, args, epoch=1
    )
    neurons = [(row["parameter"], row["index"]) for row in rows]
    masks = common.neuron_masks(weights, neurons, args.unit)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    model.train()
    found = []
    for step, (x, y, *_) in enumerate(common.Batches(images, order=order)):
        if step == STEPS:
            break
        terms = finetune_contrastive.losses(model, x, y, masks, args)
        of_step = []
        total = [torch.zeros_like(p) for p in model.parameters()]
        for term in terms.values():
            gradients = torch.autograd.grad(term, list(model.parameters()), retain_graph=True)
            of_step.append(sum(g.square().sum() for g in gradients).sqrt().item())
            total = [a + g for a, g in zip(total, gradients, strict=True)]
        found.append(of_step)
        for p, gradient in zip(model.parameters(), total, strict=True):
            p.grad = gradient
        optimizer.step()
    return np.mean(found, axis=0)


if __name__ == "__main__":
    with common.script():
        main(parse_args())
