"""What stands for ImageNet's weights where the data are the built-in set: resnet10_birds.pth.

    python results/birds.py                     # makes the file anew, in a few minutes

A resnet10 that has learned to predict part sizes, pose and place (land or water) of 96,000 drawn
birds whose parts have any size. It saw no class, group or image of the built-in set.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("--steps", type=int, default=750, help="of 128 birds (750)")
    p.add_argument("--out", type=Path, default=common.BIRDS, help="(%(default)s)")
    return p.parse_args(argv)


def main(args):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = common.build_model("resnet10", 14, 48).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(model.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.steps)
    for _ in tqdm(range(args.steps), "birds", disable=None):
        x, numbers = draw(128, generator)
        loss = F.mse_loss(model(*common.on_device(model, x)), numbers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    common.save_checkpoint(args.out, model)
    print(f"wrote {args.out}")


def draw(n, generator):
    """Pixels of n birds, uint8 (n, 3, 48, 48), and what is to be told of them (n, 14): sizes of the
    four parts, pose, place; each with mean 0 and standard deviation 1."""
    a = torch.randint(2, (n,), generator=generator)
    any_size = 4 * torch.rand(n, 4, generator=generator) - 2
    parts = common.PARTS[0] + common.PARTS[1] * any_size
    x, _, pose = common.draw_birds(parts, a, generator)
    numbers = torch.cat([parts, pose, a[:, None]], 1)
    return x, (numbers - numbers.mean(0)) / numbers.std(0)


if __name__ == "__main__":
    arguments = parse_args()
    with common.script(arguments.out, "the same command starts again"):
        main(arguments)
