"""How fast each part is, beside the arithmetic that it cannot do without.

    python -m tests.bench                       # all rows; twenty minutes on two cores
    python -m tests.bench --only masks tracing --json bench.json

A row: seconds of our part, of what it is held against, their ratio (with its range) and the goal;
medians of alternating pairs in one run, one thread, without a progress bar.
"""

import argparse
import json
import resource
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

rows = []


def seconds(work):
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def compare(name, goal, ours, limit, pairs=5):
    """Time two functions in turn, after a first call of each, and print their row."""
    ours(), limit()
    found = [(seconds(ours), seconds(limit)) for _ in range(pairs)]
    a, b = (statistics.median(times) for times in zip(*found))
    ratios = sorted(a / b for a, b in found)
    row = {"row": name, "seconds": a, "limit": b, "ratio": a / b, "range": ratios[:: pairs - 1]}
    rows.append({**row, "goal": goal})
    low, high = row["range"]
    print(f"{name:58s} {a:9.4f} {b:9.4f} {a / b:6.2f} ({low:.2f}-{high:.2f}) {goal}", flush=True)


def photographs(folder):
    """128 training images, 400 x 300 and of the size of Waterbirds' files, and their table."""
    rng, table = np.random.default_rng(0), [["img_filename", "y", "place", "split"]]
    for name, y, a, split in labelled_rows(((60, 20, 10, 38), [4] * 4, [4] * 4), "{number}.jpg"):
        coarse = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((400, 300), Image.BICUBIC)) * 0.8
        pixels += rng.integers(0, 40, (300, 400, 1))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name, quality=90)
        table.append([name, y, a, split])
    write_table(folder, table)
    return common.read_table(folder)


def split_of(table, size, augment="none"):
    return common.Images(table, "train", size, [0.5] * 3, [0.2] * 3, augment)


def network(arch, size):
    torch.manual_seed(0)
    return common.build_model(arch, 2, size).to(memory_format=torch.channels_last)


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
    order = common.EpochOrder(64 if arch == "resnet50" else 128, batch_size, 0)
    loader = common.make_loader(split_of(table, size, augment), order=order)
    batches = list(loader)

    def epoch(batches):
        model.train()
        for x, y, *_ in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    compare(f"ERM epoch, {name}", goals[0], lambda: epoch(loader), lambda: epoch(batches))
    some = torch.utils.data.Subset(split_of(table, size), range(order.n))
    evaluated = common.make_loader(some, batch_size)

    def forward():
        with torch.inference_mode():
            for x, *_ in batches:
                model.eval()(x)

    compare(f"evaluation, {name}", goals[1], lambda: common.predict(model, evaluated), forward)


def images(table):
    """Pixels: by the Dataset, by a bare loop; a first and a second pass; two workers."""
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

    def bare():
        for file in split.files[:64]:
            with Image.open(split.root / file) as image:
                transform(image.convert("RGB"))

    compare(name, "<= 1.10", lambda: split.__getitems__([(1, i) for i in range(64)]), bare)


def masks(_):
    """Fine-tuning: a step, and both masks."""
    model, args = network("resnet50", 128), finetune_contrastive.parse_args([])
    args.erm_head, args.unit, args.minority, args.batch_size, args.seed = (
        "linear",
        "channel",
        [],
        32,
        0,
    )
    x, y = torch.randn(16, 2, 3, 128, 128), torch.arange(16) % 2
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
    batch = torch.randn(128, 3, 64, 64), torch.arange(128) % 2

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
    model, x = network("resnet50", 96).eval(), torch.randn(12, 3, 96, 96)
    scores = common.magnitude_scores(model)
    variants = [common.Variant(common.top_neurons({n: s}, 3)) for n, s in scores.items()]
    with torch.inference_mode():
        traced = common.trace_graph(model, x[:2])

        def run(x, variants, traced):
            return lambda: common.logits_under(model, x, variants, traced=traced)

        full = run(x, variants, None)
        compare(
            "structured trace, every variant by full passes",
            "<= 0.50",
            run(x, variants, traced),
            full,
            3,
        )
        twice, fewer = run(torch.cat([x, x]), variants, traced), run(x, variants[::2], traced)
        compare("structured trace, 24 and 12 images", "about 2", twice, run(x, variants, traced), 3)
        compare(
            "structured trace, 53 and 27 variants", "about 2", run(x, variants, traced), fewer, 3
        )
    args = trace_neurons.parse_args(["--repeats", "1", "--controls", "0"])
    ranked = {("magnitude", "all"): common.top_neurons(scores, 10)}
    ranked |= {("gradient", j): common.top_neurons(scores, 10 + j)[j:] for j in range(4)}
    planned = [variant for _, variant in trace_neurons.plan(args, ranked, "train")]
    g = torch.arange(12) % 4
    batch = [(x, g // 2, g)]
    everywhere = [common.Variant(v.neurons, v.how, v.sigma, v.seed) for v in planned]

    def full_passes():
        with torch.inference_mode():
            for j in range(4):
                common.logits_under(model, x[g == j], everywhere)

    ours = lambda: common.accuracy_under(model, batch, planned)
    compare("unstructured trace as planned, all by full passes", "<= 0.35", ours, full_passes, 3)


def maps(_):
    model, x = network("resnet50", 224).eval(), torch.randn(8, 3, 224, 224)

    def backward():
        model(x)[:, 0].sum().backward()

    ours = lambda: gradcam.grad_cam(model, x, "layer4.2.conv3", 0)
    compare("Grad-CAM of 8 images, forward and backward", "<= 0.50", ours, backward)


def starting(_):
    def python(*arguments):
        command = [sys.executable, *arguments]
        return lambda: subprocess.run(command, cwd=ROOT, capture_output=True, check=True)

    imports = python("-c", "import torch, timm")
    compare(
        "train_erm.py --help, import torch and timm",
        "+ 0.5 s",
        python("train_erm.py", "--help"),
        imports,
        3,
    )


def peak(table):
    """Peak memory of tracing in a process of its own: many images and variants beside few."""
    code = "import sys, tests.bench as b; print(b.traced_peak(int(sys.argv[1]), int(sys.argv[2])))"
    found = []
    for images, variants in ((24, 20), (96, 20), (24, 80)):
        command = [sys.executable, "-c", code, str(images), str(variants)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        found.append(float(done.stdout.split()[-1]))
    for name, value in zip(("4 x the images", "4 x the variants"), found[1:]):
        ratio = value / found[0]
        rows.append({"row": f"peak MB, tracing, {name}", "ratio": ratio, "goal": "<= 1.05"})
        print(f"{'peak MB, tracing, ' + name:58s} {value:9.0f} {found[0]:9.0f} {ratio:6.2f}")


def traced_peak(n, variants):
    model = network("resnet50", 96)
    neurons = common.top_neurons(common.magnitude_scores(model), variants)
    g = torch.arange(12) % 4
    batches = ((torch.randn(12, 3, 96, 96), g // 2, g) for _ in range(n // 12))
    common.accuracy_under(model, batches, [common.Variant([neuron]) for neuron in neurons])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


SECTIONS = (training, images, masks, tracing, maps, starting, peak)


def main():
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    names = [section.__name__ for section in SECTIONS]
    p.add_argument("--only", nargs="+", choices=names, default=names, help="(all)")
    p.add_argument("--json", type=Path, help="also write the rows to this file")
    args = p.parse_args()
    torch.set_num_threads(1)
    print(f"{'our part, held against':58s} {'seconds':>9s} {'limit':>9s} {'ratio':>6s} goal")
    with tempfile.TemporaryDirectory() as folder:
        table = photographs(Path(folder))
        for section in SECTIONS:
            if section.__name__ in args.only:
                section(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
