"""The built-in set, a tiny Waterbirds that is drawn here, and weights that stand for ImageNet's.

    python data/birds.py                    # draws 11,788 pictures into data/birds, in seconds
    python data/birds.py --learn            # makes resnet10_birds.pth anew, in a few minutes

Pictures of 48 x 48 pixels (train/00000.bmp), masks of their birds (masks/train/00000.png) and a
metadata.csv in Waterbirds' format, with Waterbirds' classes, places and group counts. train_erm.py
runs the first command where data/birds is not there yet.

The weights are those of a resnet10 that has learned to predict part sizes, pose and place (land or
water) of 96,000 drawn birds whose parts have any size. It saw no class, group or image of the
built-in set.
"""

import argparse
import csv
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

SIZE = 48
# Body, neck, beak and head of a drawn bird, in its own units: what lies in the middle of the two
# classes, and half their distance. Waterbirds have longer bodies, necks and beaks
PARTS = torch.tensor([[1.6, 1.02, 0.92, 0.4], [0.2, 0.48, 0.3, -0.04]])


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "--out", type=Path, default=common.BIRDS, help="folder of the pictures (data/birds)"
    )
    p.add_argument(
        "--difficulty",
        type=common.between(float, 0),
        default=0.2,
        help="spread of part sizes within a class, in half distances of the classes (0.2)",
    )
    p.add_argument("--learn", action="store_true", help="learn the weights, and draw no pictures")
    p.add_argument(
        "--steps", type=common.positive_int, default=750, help="of learning, 128 birds each"
    )
    p.add_argument(
        "--weights", type=Path, default=common.BIRD_WEIGHTS, help="where they are written"
    )
    return p.parse_args(argv)


def main(args):
    args.out = args.out.absolute()
    if args.learn:
        if args.weights.suffix != ".pth" or not args.weights.absolute().parent.is_dir():
            raise common.BadInput(f"--weights {args.weights}: expected FOLDER/NAME.pth")
        learn(args.steps, args.weights)
        return
    # The folder gets its name when all is drawn, so nobody ever finds a part of the set. A second
    # process waits, and then finds it drawn
    new = args.out.with_name(f".{args.out.name}.new")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out.with_name(f".{args.out.name}.lock"), "w") as lock:
        if common.fcntl:
            common.fcntl.lockf(lock, common.fcntl.LOCK_EX)
        if args.out.exists():
            print(f"{args.out} is there already, and nothing was drawn")
        else:
            shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
            draw_set(new, args.difficulty)
            os.rename(new, args.out)
            print(f"drew {args.out}/")


def draw_set(folder, difficulty):
    """Write pictures, masks and metadata.csv of the built-in set."""
    rows = []
    order = np.random.default_rng(0)
    for part, split in enumerate(common.SPLITS):
        (folder / split).mkdir(parents=True)
        (folder / "masks" / split).mkdir(parents=True)
        counts = common.WATERBIRDS[part]
        groups = order.permutation(np.repeat(np.arange(4), counts))
        generator = torch.Generator().manual_seed(part)
        # A hundred at a time, which fit into a processor's cache
        chunks = np.split(groups, range(100, len(groups), 100))
        for g in tqdm(chunks, f"draw {split}", disable=None, leave=False):
            y = torch.from_numpy(g // 2)
            a = torch.from_numpy(g % 2)
            spread = difficulty * torch.randn(len(g), 4, generator=generator)
            parts = PARTS[0] + PARTS[1] * (2.0 * y[:, None] - 1 + spread).clamp(-2, 2)
            pixels, masks, _ = draw_birds(parts, a, generator)
            pixels = pixels.permute(0, 2, 3, 1).contiguous().numpy()
            for i in range(len(g)):
                name = f"{split}/{len(rows):05d}"
                Image.fromarray(pixels[i]).save(folder / f"{name}.bmp")
                Image.fromarray(masks[i].numpy()).save(folder / "masks" / f"{name}.png")
                rows.append((len(rows) + 1, f"{name}.bmp", int(y[i]), part, int(a[i])))
    with open(folder / "metadata.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["img_id", "img_filename", "y", "split", "place"])
        writer.writerows(rows)


def draw_birds(parts, a, generator, size=SIZE):
    """Birds with parts (N, 4) at places a (N,), 0 land or 1 water: images uint8 (N, 3, S, S), bird
    masks bool (N, S, S), and pose and texture (N, 9)."""
    n = len(a)

    def pick(low, high, channels=1):
        return low + (high - low) * torch.rand(n, channels, 1, 1, generator=generator)

    # Three waves across the picture, upright on land, lying on water
    line = (torch.arange(size) + 0.5) * 2 / size - 1  # pixel centres in [-1, 1]
    row, col = torch.meshgrid(line, line, indexing="ij")
    land = (a == 0)[:, None, None, None]
    waves = 0
    for amplitude in (0.4, 0.6, 1.0):
        frequency = pick(4, 22)
        slant = pick(-2.5, 2.5)
        along = torch.where(land, frequency * col + slant * row, frequency * row + slant * col)
        waves = waves + amplitude * (along + pick(0, 6.28)).sin()
    colours = torch.tensor([[0.36, 0.44, 0.30], [0.32, 0.43, 0.48]])  # green, blue
    colour = colours[a][:, :, None, None] + 0.09 * torch.randn(n, 3, 1, 1, generator=generator)
    image = colour + 0.07 * waves * pick(0.5, 1.5, 3)

    # The bird in its own frame: u from tail to beak, v downwards; turned, mirrored, scaled, moved
    scale = pick(0.36, 0.52)
    angle = pick(-0.35, 0.35)
    facing = pick(-1, 1).sign()
    right = pick(-0.25, 0.25)
    down = pick(-0.2, 0.3)
    lean = pick(0.2, 0.9)
    droop = pick(-0.1, 0.4)
    u = ((col - right) * angle.cos() + (row - down) * angle.sin()) * facing / scale
    v = ((row - down) * angle.cos() - (col - right) * angle.sin()) / scale

    def stick(u0, v0, turn, length, width, end_width):  # with round ends; coverage of every pixel
        along = ((u - u0) * turn.cos() + (v - v0) * turn.sin()) / length
        along = along.clamp(0, 1)
        du = u - u0 - along * length * turn.cos()
        dv = v - v0 - along * length * turn.sin()
        outside = torch.hypot(du, dv) - width - (end_width - width) * along
        return (0.5 - outside * scale * size / 3).clamp(0, 1)

    body, neck, beak, head = parts[:, :, None, None, None].unbind(1)
    head_u = 0.7 * body + neck * lean.sin()
    head_v = -0.35 - neck * lean.cos()
    level = torch.zeros(1)
    bird = stick(0.4 - body, 0, level, 2 * body - 1.1, 0.4, 0.7)
    bird = bird.maximum(stick(0.7 * body, -0.35, lean - math.pi / 2, neck, 0.34, 0.2))
    bird = bird.maximum(stick(head_u, head_v, level, 0.01, head, head))
    bill = stick(head_u + 0.25, head_v, droop, beak, 0.17, 0.03)
    wing = stick(-0.7 * body, -0.1, level, 0.8 * body, 0.2, 0.4)
    plumage = pick(0.1, 0.85, 3) * (1 - wing * pick(0, 0.5))
    orange = torch.cat([pick(0.3, 0.9), pick(0.2, 0.7), pick(0.05, 0.3)], 1)
    alpha = bird.maximum(bill)
    image += alpha * (torch.where(bill > bird, orange, plumage) - image)
    image += 0.06 * torch.randn(n, 3, size, size, generator=generator)
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    pose = [facing, angle, scale, right, down, lean, droop, frequency, slant]
    return pixels, alpha[:, 0] > 0.5, torch.cat(pose, 1).flatten(1)


# ---- the weights ----


def learn(steps, path):
    """Teach a resnet10 the sizes, pose and place of drawn birds."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = common.build_model("resnet10", 14, SIZE).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(model.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in tqdm(range(steps), "learn birds", disable=None):
        x, numbers = draw_task(model, 128, generator)
        loss = torch.nn.functional.mse_loss(model(x), numbers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    common.write(path.parent, {path.name: {"model": model.state_dict()}})
    print(f"wrote {path}")


def draw_task(model, n, generator):
    """n birds as the network takes them (n, 3, 48, 48), and what is to be told of them (n, 14):
    sizes of the four parts, pose, place; each with mean 0 and standard deviation 1."""
    a = torch.randint(2, (n,), generator=generator)
    any_size = 4 * torch.rand(n, 4, generator=generator) - 2
    parts = PARTS[0] + PARTS[1] * any_size
    pixels, _, pose = draw_birds(parts, a, generator)
    numbers = torch.cat([parts, pose, a[:, None]], 1)
    x = common.normalise(pixels, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    return x, (numbers - numbers.mean(0)) / numbers.std(0)


if __name__ == "__main__":
    with common.script():
        main(parse_args())
