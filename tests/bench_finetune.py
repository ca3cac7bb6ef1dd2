"""Prints the speed and memory figures of stage 4; asserts nothing.   python -m tests.bench_finetune [--arch resnet50 --size 224]"""

import argparse
import subprocess
import sys
import time

import torch

from common import Split, build_model, describe_groups, neuron_masks, predict
from finetune_contrastive import critical_neurons, step

from .test_finetune import arguments


def random_split(n, size):
    """Images of noise, a quarter of them in each group."""
    g = torch.arange(n) % 4
    return Split(torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8), g // 2, g % 2, g, torch.full((n, 2), size), [""] * n,
                 describe_groups([f"group {j}" for j in range(4)], [n // 4] * 4, 2))


def steps(model, split, size, method, n, batch):
    """Seconds of n training steps."""
    args = arguments(method=method, augment="table1")
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
    neurons = [(row["layer"], row["index"]) for row in critical_neurons(model, split, None, args, size, "channel", 1)]
    masks, buffers = neuron_masks(model, neurons), {name: b.clone() for name, b in model.named_buffers()}
    model.train()
    started = time.perf_counter()
    for i in range(n):
        index = torch.arange(i * batch, (i + 1) * batch) % len(split.y)
        terms = step(model, torch.nn.Softmax(1), split.images[index], split.original_sizes[index], split.y[index], masks, buffers, args, size)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
    return time.perf_counter() - started


def memory(method, options):
    """Peak resident memory in MB of a fresh process that makes two steps."""
    torch.manual_seed(0)
    steps(build_model(options.arch, 2, options.size), random_split(options.batch, options.size), options.size, method, 2, options.batch)
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # Linux
    print(int(peak.split()[1]) / 1024)


def main():
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    p.add_argument("--arch", default="resnet10", help="(default %(default)s)")
    p.add_argument("--size", type=int, default=48, help="side of the input in pixels (default %(default)s)")
    p.add_argument("--batch", type=int, default=128, help="images per step (default %(default)s)")
    p.add_argument("--steps", type=int, default=10, help="per measurement (default %(default)s)")
    p.add_argument("--repeats", type=int, default=5, help="pairs of measurements (default %(default)s)")
    p.add_argument("--images", type=int, default=4795, help="training images of an epoch (default %(default)s)")
    p.add_argument("--memory", choices=["erm", "contrastive"], help="used by the benchmark itself, in a process of its own")
    options = p.parse_args()
    if options.memory:
        return memory(options.memory, options)
    torch.manual_seed(0)
    model, split = build_model(options.arch, 2, options.size), random_split(options.batch * 8, options.size)
    steps(model, split, options.size, "contrastive", 2, options.batch)
    pairs = [[steps(model, split, options.size, method, options.steps, options.batch) for method in ("erm", "contrastive")]
             for _ in range(options.repeats)]
    ratios = sorted(contrastive / erm for erm, contrastive in pairs)
    print(f"{options.arch} at {options.size}, batches of {options.batch}: a contrastive step against an ERM step, ratio "
          f"{ratios[len(ratios) // 2]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), ERM {1000 * min(pairs)[0] / options.steps:.0f} ms")

    logits, evaluation, masks = None, [], {"magnitude": [], "gradient": []}
    for _ in range(options.repeats):
        started = time.perf_counter()
        logits = predict(model, split, options.size, batch_size=options.batch)
        evaluation.append(time.perf_counter() - started)
        for criterion, seconds in masks.items():
            started = time.perf_counter()
            rows = critical_neurons(model, split, logits, arguments(criterion=criterion), options.size, "channel", 1)
            neuron_masks(model, [(row["layer"], row["index"]) for row in rows])
            seconds.append(time.perf_counter() - started)
    epoch = min(contrastive for _, contrastive in pairs) / options.steps * options.images / options.batch
    a_pass = min(evaluation) / len(split.y) * options.images
    magnitude, gradient = (min(masks[criterion]) for criterion in ("magnitude", "gradient"))
    print(f"masks: magnitude {1000 * magnitude:.1f} ms, {100 * magnitude / epoch:.2f} % of the steps of an epoch of {options.images} "
          f"images; gradient {1000 * gradient:.0f} ms with the logits that the log's evaluation gives, {gradient / a_pass:.2f} of an "
          f"evaluation pass over them")
    peaks = {method: float(subprocess.run(
        [sys.executable, "-m", "tests.bench_finetune", "--memory", method, "--arch", options.arch, "--size", str(options.size), "--batch",
         str(options.batch)], capture_output=True, text=True, check=True).stdout.split()[-1]) for method in ("erm", "contrastive")}
    parameters = sum(p.numel() for p in model.parameters()) * 4 / 2 ** 20
    print(f"peak memory of two steps: ERM {peaks['erm']:.0f} MB, contrastive {peaks['contrastive']:.0f} MB (parameters {parameters:.0f} MB)")


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    main()
