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

from .conftest import ROOT, labelled_rows, write_table

rows, machine = [], {"device": "cpu"}


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
    ours(), limit()
    found = [(seconds(ours), seconds(limit)) for _ in range(5)]
    a, b = (statistics.median(times) for times in zip(*found))
    ratios = sorted(a / b for a, b in found)
    row = {"row": name, "seconds": a, "limit": b, "ratio": a / b, "range": ratios[::4]}
    rows.append({**row, "goal": goal})
    low, high = row["range"]
    print(f"{name:58s} {a:9.4f} {b:9.4f} {a / b:6.2f} ({low:.2f}-{high:.2f}) {goal}", flush=True)


def photographs(folder):
    """Images of 400 x 300 pixels and of the size of Waterbirds' files, 128 of them in training, and
    their table; off the CPU each stands 32 times in it."""
    rng, table = np.random.default_rng(0), [["img_filename", "y", "place", "split"]]
    for name, y, a, split in labelled_rows(((60, 20, 10, 38), [4] * 4, [4] * 4), "{number}.jpg"):
        coarse = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((400, 300), Image.BICUBIC)) * 0.8
        pixels += rng.integers(0, 40, (300, 400, 1))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name, quality=90)
        table += [[name, y, a, split]] * either(1, 32)
    write_table(folder, table)
    return common.read_table(folder)


def split_of(table, size, augment="none"):
    return common.Images(table, "train", size, augment)


def network(arch, size):
    torch.manual_seed(0)
    model = common.build_model(arch, 2, size)
    return model.to(machine["device"], memory_format=torch.channels_last)


def training(table):
    """An epoch and an evaluation, held against the same steps on batches that are there already."""
    drawn = common.read_table("synthetic")
    passes("ResNet-50 at 224", table, "resnet50", 224, 32, ("<= 1.10", "<= 1.10"))
    passes(
        "EfficientNet-Lite0 at 128", table, "tf_efficientnet_lite0", 128, 64, ("<= 1.15", "<= 1.20")
    )
    passes("built-in set", drawn, "resnet10", 48, 128, ("<= 1.25", "<= 1.25"))


def passes(name, table, arch, size, batch_size, goals):
    model, augment = network(arch, size), "crop-flip" if arch == "resnet10" else "table1"
    optimizer = torch.optim.Adam(model.parameters(), 1e-5)
    n, batch_size = (64 if arch == "resnet50" else 128), either(batch_size, 256)
    split, workers = split_of(table, size, augment), either(0, os.cpu_count())
    order = common.EpochOrder(either(n, len(split)), batch_size, 0)
    loader = common.make_loader(split, workers=workers, order=order)
    batches = [common.on_device(model, x, y) for x, y, *_ in loader]

    def epoch(batches):
        model.train()
        for x, y, *_ in batches:
            x, y = common.on_device(model, x, y)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    compare(f"ERM epoch, {name}", goals[0], lambda: epoch(loader), lambda: epoch(batches))
    some = [torch.arange(order.n)]
    evaluated = common.make_loader(split_of(table, size), batch_size, workers, parts=some)

    def forward():
        with torch.inference_mode():
            for x, *_ in batches:
                model.eval()(x)

    compare(f"evaluation, {name}", goals[1], lambda: common.predict(model, evaluated), forward)


def images(table):
    """Pixels as the network takes them, by a loader, by a bare loop; second passes; two workers."""
    ready("64 images with Table 1 at 224, bare loop", split_of(table, 224, "table1"))
    split = split_of(table, 128, "crop-flip")
    ready("64 images with crop and flip at 128, bare loop", split)
    kept, some = split_of(table, 224), range(64)

    def first():
        split_of(table, 224).__getitems__(some)

    second = "64 images of an evaluation, second pass, first pass"
    compare(second, "<= 0.20", lambda: kept.__getitems__(some), first)
    batches = list(np.array_split(np.arange(512) % 128, 16))  # of 32 images
    alone, two = (common.make_loader(split, workers=n, order=batches) for n in (0, 2))
    compare("512 images by 2 workers, by none", "<= 0.59", lambda: list(two), lambda: list(alone))


def ready(name, split):
    to_float = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.2] * 3)]
    transform = v2.Compose([*split.transform.transforms, *to_float])
    some, model = [[(1, i) for i in range(64)]], network("resnet10", 48)

    def ours():
        for x, *_ in common.make_loader(split, order=some):
            common.on_device(model, x)

    def bare():
        for file in split.files[:64]:
            with Image.open(split.root / file) as image:
                transform(image.convert("RGB"))

    compare(name, "<= 1.10", ours, bare)


def masks(_):
    """Fine-tuning: a step, and both masks."""
    model, args = network("resnet50", 128), finetune_contrastive.parse_args([])
    vars(args).update(erm_head="linear", unit="channel", minority=[], batch_size=32, seed=0)
    n, side = either(16, 128), either(128, 224)
    x, y = common.on_device(model, torch.randn(n, 2, 3, side, side), torch.arange(n) % 2)
    neurons = common.top_neurons(common.magnitude_scores(model), 3)
    mask, softmax = common.neuron_masks(model, neurons), torch.nn.Softmax(1)
    buffers = {name: b.clone() for name, b in model.named_buffers()}

    def step():
        sum(
            finetune_contrastive.losses(model, x, y, mask, buffers, softmax, args).values()
        ).backward()

    def passes():
        (model(x[:, 0]).square().mean() + model(x[:, 1]).square().mean()).backward()

    compare("fine-tuning step, two forwards and their backward", "<= 1.10", step, passes)
    side = either(64, 224)
    batch = common.on_device(model, torch.randn(128, 3, side, side), torch.arange(128) % 2)

    def backward():
        F.cross_entropy(model.eval()(batch[0]), batch[1]).backward()

    compare(
        "mask by gradient, forward and backward of 128 images",
        "<= 1.20",
        lambda: common.top_neurons(common.gradient_scores(model, [batch]), 3),
        backward,
    )
    scores = common.magnitude_scores(model, "weight")
    flat = torch.cat(list(scores.values()))
    compare(
        "mask of 500,000 weights, top-k of all scores",
        "<= 2",
        lambda: common.neuron_masks(model, common.top_neurons(scores, 500_000), "weight"),
        lambda: flat.topk(500_000),
    )


def tracing(_):
    """Stages 2 and 3 on ResNet-50, held against full passes; twice the images or variants."""
    model = network("resnet50", 224).eval()
    scores = common.magnitude_scores(model)
    variants = [common.Variant(common.top_neurons({n: s}, 3)) for n, s in scores.items()]
    traced = common.trace_graph(model, *common.on_device(model, torch.zeros(2, 3, 64, 64)))

    def structured(x, variants, traced=traced):
        with torch.inference_mode():
            common.logits_under(model, x, variants, traced=traced)

    n = either(12, 128)
    x, small = common.on_device(model, torch.randn(n, 3, 224, 224), torch.randn(2 * n, 3, 96, 96))
    ours, full = lambda: structured(x, variants), lambda: structured(x, variants, None)
    compare("structured trace at 224, every variant by full passes", "<= 0.50", ours, full)
    fewer = lambda: structured(small[:n], variants)
    more = lambda: structured(small, variants)
    compare("structured trace at 96, twice the images", "about 2", more, fewer)
    less = lambda: structured(small, variants[::2])
    compare("structured trace at 96, twice the variants", "about 2", more, less)

    # Stage 2 as planned, of which a seventeenth; neurons of a network before training
    n, args = either(32, 512), trace_neurons.parse_args([])
    x, g = common.on_device(model, torch.randn(n, 3, 112, 112), torch.arange(n) % 4)
    ranked = {("magnitude", "all"): common.top_neurons(scores, 10)}
    for j in range(4):
        gradient = common.gradient_scores(model, [(x[g == j], g[g == j] // 2)])
        ranked["gradient", j] = common.top_neurons(gradient, 10)
    planned = [variant for _, variant in trace_neurons.plan(args, ranked, "train")][::17]
    everywhere = [common.Variant(v.neurons, v.how, v.sigma, v.seed) for v in planned]

    def full_passes():
        for j in range(4):
            structured(x[g == j], everywhere, None)

    ours = lambda: common.accuracy_under(model, [(x, g // 2, g)], planned)
    compare("unstructured trace as planned, all by full passes", "<= 0.35", ours, full_passes)


def maps(_):
    model = network("resnet50", 224).eval()
    (x,) = common.on_device(model, torch.randn(either(8, 128), 3, 224, 224))

    def backward():
        model(x)[:, 0].sum().backward()

    ours = lambda: gradcam.grad_cam(model, x, "layer4.2.conv3", 0)
    compare("Grad-CAM of a batch, forward and backward", "<= 0.50", ours, backward)


def starting(table):
    """From the command to --help, and to the first step of training."""

    def python(*arguments):
        command = [sys.executable, *arguments]
        return lambda: subprocess.run(command, cwd=ROOT, capture_output=True, check=True)

    imports = python("-c", "import torch, timm")
    helped = python("train_erm.py", "--help")
    compare("train_erm.py --help, import torch and timm", "+ 0.5 s", helped, imports)
    until = "import os, runpy, torch; torch.optim.Adam.step = lambda _: os._exit(0); "
    until += "runpy.run_path('train_erm.py', run_name='__main__')"
    with tempfile.TemporaryDirectory() as run:
        flags = f"--data {table.source} --run {run}/r --arch resnet18 --weights none --size 64"
        flags += " --batch-size 16 --workers 0 --device cpu"
        first = python("-c", until, *flags.split())
        compare("train_erm.py to its first step, the same import", "+ 1.5 s", first, imports)


def peak(table):
    """Peak memory of each stage, ResNet-50 at 160 pixels, batches of 32, beside that of a process
    with model, optimizer and two steps; of tracing, many images and variants beside few."""

    def process(*arguments):
        code = "import resource, subprocess as s, sys; s.run(sys.argv[1:], check=True); "
        code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)"
        command = [sys.executable, "-c", code, sys.executable, *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return float(done.stdout.split()[-1])

    def show(name, value, limit, goal):
        rows.append({"row": name, "MB": value, "limit": limit, "ratio": value / limit} | goal)
        print(f"{name:58s} {value:9.0f} {limit:9.0f} {value / limit:6.2f} {goal['goal']}")

    bare = "import sys, tests.bench as b; b."
    step, two = (process("-c", f"{bare}step(int(sys.argv[1]))", n) for n in (1, 2))
    with tempfile.TemporaryDirectory() as run:
        resnet = f"--data {table.source} --arch resnet50 --weights none --size 160"
        few = "--max-per-group 8 --batch-size 32"
        stages = {
            f"train_erm.py {resnet} --epochs 1 --batch-size 32": step,
            f"trace_neurons.py {few} --controls 0 --repeats 1 --sigma 0.01": step,
            f"structured_trace.py {few}": step,
            "finetune_contrastive.py --epochs 1": two,
            "gradcam.py --batch-size 32": step,
        }
        for command, limit in stages.items():
            name = f"peak MB, {command.partition(' ')[0]}, a step of training"
            command += f" --run {run} --workers 0 --device cpu"
            show(name, process(*command.split()), limit, {"goal": "<= 1.30"})
    found = []
    for numbers in ((24, 20), (96, 20), (24, 80)):
        found.append(process("-c", f"{bare}trace(*map(int, sys.argv[1:]))", *numbers))
    for name, value in zip(("4 x the images", "4 x the variants"), found[1:]):
        show(f"peak MB, tracing, {name}", value, found[0], {"goal": "<= 1.05"})


def step(forwards):
    """Two steps of training, as Adam's moments are there from the second one on; so many forward
    passes in each."""
    model, y = network("resnet50", 160).train(), torch.arange(32) % 2
    optimizer = torch.optim.Adam(model.parameters(), 1e-5)
    for _ in range(2):
        optimizer.zero_grad()
        logits = [model(torch.randn(32, 3, 160, 160)) for _ in range(forwards)]
        sum(F.cross_entropy(one, y) for one in logits).backward()
        optimizer.step()


def trace(n, variants):
    model = network("resnet50", 96)
    neurons = common.top_neurons(common.magnitude_scores(model), variants)
    g = torch.arange(12) % 4
    batches = ((torch.randn(12, 3, 96, 96), g // 2, g) for _ in range(n // 12))
    common.accuracy_under(model, batches, [common.Variant([neuron]) for neuron in neurons])


SECTIONS = (training, images, masks, tracing, maps, starting, peak)


def main():
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
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
