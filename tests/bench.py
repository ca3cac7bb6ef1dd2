"""How fast each part is, beside the arithmetic that it cannot do without.

    python -m tests.bench                       # all rows; half an hour on two cores
    python -m tests.bench --only masks tracing --json bench.json
    python -m tests.bench --device cuda --only training masks tracing maps

A row: seconds of our part, of what it is held against, their ratio (with its range) and the goal;
medians of 5 alternating pairs in one run, one thread, no progress bar. Off the CPU batches are of
the paper's size, and all cores read images.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2

import common
import finetune_contrastive
import gradcam
import trace_neurons
import train_erm

from .conftest import ROOT, labelled_rows, write_table

rows = []
machine = {"device": "cpu"}


def either(cpu, other):
    return cpu if machine["device"] == "cpu" else other


def seconds(work):
    started = time.perf_counter()
    work()
    if machine["device"] != "cpu":
        torch.accelerator.synchronize(machine["device"])
    return time.perf_counter() - started


def compare(name, goal, ours, limit):
    """Time two functions in turn, after a first call of each, and print their row."""
    ours()
    limit()
    found = []
    for _ in range(5):
        found.append((seconds(ours), seconds(limit)))
    a = statistics.median(of_pair[0] for of_pair in found)
    b = statistics.median(of_pair[1] for of_pair in found)
    ratios = sorted(of_pair[0] / of_pair[1] for of_pair in found)
    rows.append(
        {
            "row": name,
            "seconds": a,
            "limit": b,
            "ratio": a / b,
            "range": [ratios[0], ratios[-1]],
            "goal": goal,
        }
    )
    between = f"({ratios[0]:.2f}-{ratios[-1]:.2f})"
    print(f"{name:58s} {a:9.4f} {b:9.4f} {a / b:6.2f} {between} {goal}", flush=True)


def photographs(folder):
    """Images of 400 x 300 pixels and of the size of Waterbirds' files, 128 of them in training, and
    their table; off the CPU each stands 32 times in it."""
    rng = np.random.default_rng(0)
    table = [["img_filename", "y", "place", "split"]]
    counts = ((60, 20, 10, 38), [4] * 4, [4] * 4)
    for name, y, a, split in labelled_rows(counts, "{number}.jpg"):
        coarse = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((400, 300), Image.BICUBIC)) * 0.8
        pixels += rng.integers(0, 40, (300, 400, 1))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name, quality=90)
        table += [[name, y, a, split]] * either(1, 32)
    write_table(folder, table)
    return common.read_table(folder)


def split_of(table, size, augment="none"):
    return common.Images(table, "train", size, [0.5] * 3, [0.2] * 3, augment)


def network(arch, size):
    torch.manual_seed(0)
    model = common.build_model(arch, 2, size)
    return model.to(machine["device"], memory_format=torch.channels_last)


def noise(*shape):
    return torch.randn(shape).to(machine["device"])


def labels(n, count=2):
    """Classes or groups (n,), each as often as the others."""
    return torch.arange(n, device=machine["device"]) % count


def training(table):
    """An epoch and an evaluation, held against the same steps on batches that are there already."""
    if not common.BIRDS.exists():
        train_erm.draw_birds()
    drawn = common.read_table(common.BIRDS)
    passes("ResNet-50 at 224", table, "resnet50", 224, 64, 32, ("<= 1.10", "<= 1.10"))
    passes(
        "EfficientNet-Lite0 at 128",
        table,
        "tf_efficientnet_lite0",
        128,
        128,
        64,
        ("<= 1.15", "<= 1.20"),
    )
    passes("built-in set", drawn, "resnet10", 40, 128, 128, ("<= 1.25", "<= 1.25"))


def passes(name, table, arch, size, n, batch_size, goals):
    """The rows of one network, on n images; off the CPU on all of them."""
    model = network(arch, size)
    optimizer = torch.optim.Adam(model.parameters(), 1e-5)
    images = split_of(table, size, "crop-flip" if arch == "resnet10" else "table1")
    workers = either(0, os.cpu_count())
    batch_size = either(batch_size, 256)
    order = common.EpochOrder(either(n, len(images)), batch_size, 0)
    loader = common.Batches(images, machine["device"], workers=workers, order=order)
    batches = list(loader)

    def epoch(batches):
        model.train()
        for x, y, *_ in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    compare(f"ERM epoch, {name}", goals[0], lambda: epoch(loader), lambda: epoch(batches))
    evaluated = common.Batches(
        split_of(table, size),
        machine["device"],
        batch_size,
        workers,
        index=torch.arange(order.n),
    )

    def forward():
        model.eval()
        with torch.inference_mode():
            for x, *_ in batches:
                model(x)

    compare(f"evaluation, {name}", goals[1], lambda: common.predict(model, evaluated), forward)


def images(table):
    """Pixels as the network takes them, by a loader, by a bare loop; second passes; two workers."""
    ready("64 images with Table 1 at 224, bare loop", split_of(table, 224, "table1"))
    augmented = split_of(table, 128, "crop-flip")
    ready("64 images with crop and flip at 128, bare loop", augmented)
    kept = split_of(table, 224)

    def first():
        read_64(split_of(table, 224))

    compare(
        "64 images of an evaluation, second pass, first pass",
        "<= 0.20",
        lambda: read_64(kept),
        first,
    )
    order = [batch.tolist() for batch in (torch.arange(512) % 128).split(32)]
    alone = common.Batches(augmented, workers=0, order=order)
    two = common.Batches(augmented, workers=2, order=order)
    compare("512 images by 2 workers, by none", "<= 0.59", lambda: list(two), lambda: list(alone))


def read_64(split):
    return [split[i] for i in range(64)]


def ready(name, split):
    transform = v2.Compose(
        [
            *split.transform.transforms,
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(split.mean, split.std),
        ]
    )
    batches = common.Batches(split, machine["device"], order=[[(1, i) for i in range(64)]])

    def bare():
        for path in split.paths[:64]:
            with Image.open(path) as image:
                transform(image.convert("RGB"))

    compare(name, "<= 1.10", lambda: list(batches), bare)


def masks(_):
    """Fine-tuning: a step, and both masks."""
    model = network("resnet50", 128)
    weights = common.prunable_weights(model)
    args = finetune_contrastive.parse_args([])
    n = either(16, 128)
    side = either(128, 224)
    x = noise(n, 2, 3, side, side)
    y = labels(n)
    magnitudes = common.score_neurons(weights, {}, "magnitude")
    masked = common.neuron_masks(weights, common.top_neurons(magnitudes, 3))

    def step():
        terms = finetune_contrastive.losses(model, x, y, masked, args)
        sum(terms.values()).backward()

    def two_passes():
        loss = model(x[:, 0]).square().mean() + model(x[:, 1]).square().mean()
        loss.backward()

    compare("fine-tuning step, two forwards and their backward", "<= 1.10", step, two_passes)
    side = either(64, 224)
    batch = (noise(128, 3, side, side), labels(128))

    def by_gradient():
        gradients = common.mean_gradient(model, weights, [batch])
        common.top_neurons(common.score_neurons(weights, gradients, "gradient"), 3)

    def backward():
        F.cross_entropy(model.eval()(batch[0]), batch[1]).backward()

    compare(
        "mask by gradient, forward and backward of 128 images", "<= 1.20", by_gradient, backward
    )
    scores = common.score_neurons(weights, {}, "magnitude", "weight")
    flat = torch.cat(list(scores.values()))

    def of_weights():
        common.neuron_masks(weights, common.top_neurons(scores, 500_000), "weight")

    compare(
        "mask of 500,000 weights, top-k of all scores",
        "<= 2",
        of_weights,
        lambda: flat.topk(500_000),
    )


def tracing(_):
    """Stages 2 and 3 on ResNet-50, held against full passes; twice the images or variants."""
    model = network("resnet50", 224).eval()
    weights = common.prunable_weights(model)
    scores = common.score_neurons(weights, {}, "magnitude")
    variants = []
    for name, values in scores.items():
        variants.append({"neurons": common.top_neurons({name: values}, 3)})
    one_pass = common.OnePass()

    def structured(x, variants, passes=one_pass):
        with torch.inference_mode():
            passes(model, x, variants, weights)

    n = either(12, 128)
    x = noise(n, 3, 224, 224)
    compare(
        "structured trace at 224, every variant by full passes",
        "<= 0.52",
        lambda: structured(x, variants),
        lambda: structured(x, variants, common.full_passes),
    )
    small = noise(2 * n, 3, 96, 96)
    compare(
        "structured trace at 96, twice the images",
        "about 2",
        lambda: structured(small, variants),
        lambda: structured(small[:n], variants),
    )
    compare(
        "structured trace at 96, twice the variants",
        "about 2",
        lambda: structured(small, variants),
        lambda: structured(small, variants[::2]),
    )

    # Stage 2 as planned, of which a seventeenth; neurons of a network before training
    n = either(32, 512)
    x = noise(n, 3, 112, 112)
    g = labels(n, 4)
    of_group = [(x[g == j], g[g == j] // 2, g[g == j]) for j in range(4)]
    ranked = {("magnitude", "all"): common.top_neurons(scores, 10)}
    for j in range(4):
        gradients = common.mean_gradient(model, weights, [of_group[j]])
        by_gradient = common.score_neurons(weights, gradients, "gradient")
        ranked["gradient", j] = common.top_neurons(by_gradient, 10)
    groups = [{"group": j} for j in range(4)]
    args = trace_neurons.parse_args([])
    planned = trace_neurons.plan(args, ranked, args.top_k[:3], "train", groups)[::17]

    def as_planned():
        for j in range(4):
            asked = [row["variant"] for row in planned if j in row["groups"]]
            common.count_right(model, [of_group[j]], asked, weights, passes=one_pass)

    def full_passes():
        for j in range(4):
            everything = [row["variant"] for row in planned]
            structured(of_group[j][0], everything, common.full_passes)

    compare("unstructured trace as planned, all by full passes", "<= 0.35", as_planned, full_passes)


def maps(_):
    model = network("resnet50", 224).eval()
    x = noise(either(8, 128), 3, 224, 224)

    def backward():
        model(x)[:, 0].sum().backward()

    compare(
        "Grad-CAM of a batch, forward and backward",
        "<= 0.50",
        lambda: gradcam.grad_cam(model, x, "layer4.2.conv3", 0),
        backward,
    )


def python(*arguments):
    """A function that runs Python with these arguments."""

    def run():
        command = [sys.executable, *arguments]
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)

    return run


def starting(table):
    """From the command to --help, and to the first step of training."""
    imports = python("-c", "import torch, timm")
    helped = python("train_erm.py", "--help")
    compare("train_erm.py --help, import torch and timm", "+ 0.5 s", helped, imports)
    until_the_first_step = (
        "import os, runpy, torch; torch.optim.Adam.step = lambda _: os._exit(0); "
        "runpy.run_path('train_erm.py', run_name='__main__')"
    )
    with tempfile.TemporaryDirectory() as run:
        flags = (
            f"--data {table.source} --run {run}/r --arch resnet18 --weights none --size 64 "
            "--batch-size 16 --workers 0 --device cpu"
        )
        first = python("-c", until_the_first_step, *flags.split())
        compare("train_erm.py to its first step, the same import", "+ 1.5 s", first, imports)


def peak(table):
    """Peak memory of each stage, ResNet-50 at 160 pixels, batches of 32, beside that of a process
    with model, optimizer and two steps; of tracing, many images and variants beside few."""
    one = megabytes("-c", "import tests.bench as b; b.step(1)")
    two = megabytes("-c", "import tests.bench as b; b.step(2)")
    with tempfile.TemporaryDirectory() as run:
        data = f"--data {table.source} --arch resnet50 --weights none --size 160"
        few = "--max-per-group 8 --batch-size 32"
        stages = {
            f"train_erm.py {data} --epochs 1 --batch-size 32": one,
            f"trace_neurons.py {few} --controls 0 --repeats 1 --sigma 0.01": one,
            f"structured_trace.py {few}": one,
            "finetune_contrastive.py --epochs 1": two,
            "gradcam.py --batch-size 32": one,
        }
        for command, limit in stages.items():
            script, *flags = command.split()
            found = megabytes(script, *flags, "--run", run, "--workers", "0", "--device", "cpu")
            show(f"peak MB, {script}, a step of training", found, limit, "<= 1.30")
    few = megabytes("-c", "import tests.bench as b; b.trace(24, 20)")
    more_images = megabytes("-c", "import tests.bench as b; b.trace(96, 20)")
    more_variants = megabytes("-c", "import tests.bench as b; b.trace(24, 80)")
    show("peak MB, tracing, 4 x the images", more_images, few, "<= 1.05")
    show("peak MB, tracing, 4 x the variants", more_variants, few, "<= 1.05")


def megabytes(*arguments):
    """Peak memory of a process of Python."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)"
    )
    command = [sys.executable, "-c", code, sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def show(name, value, limit, goal):
    rows.append({"row": name, "MB": value, "limit": limit, "ratio": value / limit, "goal": goal})
    print(f"{name:58s} {value:9.0f} {limit:9.0f} {value / limit:6.2f} {goal}", flush=True)


def step(forwards):
    """Two steps of training, as Adam's moments are there from the second one on; so many forward
    passes in each."""
    model = network("resnet50", 160).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-5)
    for _ in range(2):
        optimizer.zero_grad()
        logits = [model(noise(32, 3, 160, 160)) for _ in range(forwards)]
        sum(F.cross_entropy(one, labels(32)) for one in logits).backward()
        optimizer.step()


def trace(n, variants):
    """Count under so many variants, over n images in batches of 12."""
    model = network("resnet50", 96)
    weights = common.prunable_weights(model)
    scores = common.score_neurons(weights, {}, "magnitude")
    neurons = common.top_neurons(scores, variants)
    batches = ((noise(12, 3, 96, 96), labels(12, 4) // 2, labels(12, 4)) for _ in range(n // 12))
    changed = [{"neurons": [neuron]} for neuron in neurons]
    common.count_right(model, batches, changed, weights, passes=common.OnePass())


SECTIONS = (training, images, masks, tracing, maps, starting, peak)


def main():
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    names = [section.__name__ for section in SECTIONS]
    p.add_argument("--only", nargs="+", choices=names, default=names, help="(all)")
    p.add_argument("--json", type=Path, help="also write the rows to this file")
    p.add_argument("--device", default="cpu", help="(cpu)")
    p.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="(fp32)")
    args = p.parse_args()
    machine["device"] = args.device
    torch.set_num_threads(1)
    print(f"{'our part, held against':58s} {'seconds':>9s} {'limit':>9s} {'ratio':>6s} goal")
    flags = gradcam.parse_args(["--device", args.device, "--precision", args.precision])
    with common.machine(flags), tempfile.TemporaryDirectory() as folder:
        table = photographs(Path(folder))
        for section in SECTIONS:
            if section.__name__ in args.only:
                section(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
