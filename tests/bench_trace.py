"""Prints the speed and memory figures of stages 2 and 3; asserts nothing.   python -m tests.bench_trace [--images 12]"""

import argparse
import random
import subprocess
import sys
import time
from collections import Counter
from unittest import mock

import torch

import trace_neurons
from common import (Split, Variant, build_model, describe_groups, gradient_scores, logits_under, magnitude_scores, modified,
                    normalize, prunable_layers, stages, top_neurons)

COUNTS = (3498, 184, 56, 1057)  # Waterbirds' training groups; G1 and G2 are minorities


def seconds(work):
    """Processor time: unlike the clock on the wall it leaves out whatever else the machine does."""
    started = time.process_time()
    with torch.inference_mode():
        work()
    return time.process_time() - started


def engine(model, x, variants, chain):
    for _ in logits_under(model, x, variants, chain=chain):
        pass


def full_passes(model, x, variants):
    """The plain way: every variant by a full forward pass, and the model as it is."""
    model(x)
    for v in variants:
        with modified(model, v.neurons, v.how, v.sigma, v.seed):
            model(x)


def spread(ratios):
    ratios = sorted(ratios)
    return f"ratio {ratios[len(ratios) // 2]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def structured(model, x, repeats):
    """Three neurons of every layer, both criteria, on one batch; the plain way in turn with the engine."""
    variants = [Variant(top_neurons({layer: values}, 3)) for layer, values in magnitude_scores(model).items()] * 2
    chain, ratios = stages(model, x[:1]), []
    for _ in range(repeats):
        shared = seconds(lambda: engine(model, x, variants, chain))
        full = seconds(lambda: full_passes(model, x, variants))
        ratios.append(shared / full)
        print(f"  structured: engine {shared:.1f} s, full passes {full:.1f} s", flush=True)
    print(f"structured trace, {len(variants)} variants, against full forward passes: {spread(ratios)}", flush=True)


def planned(model, images):
    """What trace_neurons.py evaluates by default for four groups: a list of (group, variant), training images first."""
    generator = torch.Generator().manual_seed(0)
    g = torch.repeat_interleave(torch.arange(4), images)
    pixels = torch.randint(0, 256, (len(g), 3, 224, 224), generator=generator, dtype=torch.uint8)
    split = Split(pixels, g // 2, g % 2, g, None, None, describe_groups("abcd", COUNTS, 2))
    scores = {("magnitude", "all"): magnitude_scores(model)}
    for j in range(4):
        scores["gradient", j] = gradient_scores(model, split, (g == j).nonzero()[:, 0], 224)
    ranked = {key: top_neurons(values, 10) for key, values in scores.items()}
    with mock.patch("sys.argv", ["trace_neurons.py"]):
        args = trace_neurons.parse_args()
    sizes = {layer: len(values) for layer, values in scores["magnitude", "all"].items()}
    sets = (trace_neurons.plan(args, ranked, "train") + trace_neurons.random_sets(args, ranked, sizes, [1, 2])
            + trace_neurons.plan(args, ranked, "test"))
    for (criterion, by), neurons in ranked.items():
        print(f"  top 3 by {criterion} {by}: " + ", ".join(layer for layer, _ in neurons[:3]))
    pairs = [(j, v) for _, v in sets for j in (range(4) if v.groups is None else v.groups)]
    print(f"  default trace: {len(sets)} variants, {len(pairs)} pairs of a variant and a group, against {4 * len(sets)} "
          f"for every variant on every group: {len(pairs) / len(sets) / 4:.2f}", flush=True)
    return split, pairs, 4 * len(sets)


def unstructured(model, images, repeats, share):
    """The default trace as trace_neurons.py plans it, of which a random share of the (variant, group) pairs is timed,
    as many images for each group. Against (i) the same pairs by full passes, (ii) every variant on every group."""
    split, pairs, everything = planned(model, images)
    x = normalize(split.images.float() / 255, model)
    chain, same, plain = stages(model, x[:1]), [], []
    for repeat in range(repeats):
        chosen = random.Random(repeat).sample(pairs, round(share * len(pairs)))
        of_group = {j: [v for i, v in chosen if i == j] for j in range(4)}
        shared = sum(seconds(lambda: engine(model, x[split.g == j], of_group[j], chain)) for j in range(4))
        full = sum(seconds(lambda: full_passes(model, x[split.g == j], of_group[j])) for j in range(4))
        same.append(shared / full)
        plain.append(shared / full * len(pairs) / everything)
        print(f"  unstructured, {len(chosen)} pairs: engine {shared:.1f} s, full passes {full:.1f} s", flush=True)
    first = Counter(min(chain[1][layer] for layer, _ in v.neurons) for _, v in pairs).most_common(5)
    print(f"  first modified stage, from 0 to {len(chain[0])}: "
          + ", ".join(f"{stage} of {100 * n / len(pairs):.0f} %" for stage, n in sorted(first)))
    print(f"unstructured trace, against the same variants and images by full passes: {spread(same)}")
    print(f"unstructured trace, against every variant on every group by full passes: {spread(plain)}", flush=True)


def memory(what, images):
    """Peak resident memory in MB of a fresh process: one evaluation pass, or the trace of every layer."""
    import resource
    torch.manual_seed(0)
    model, x = build_model("resnet50", 2, 224), torch.rand(images, 3, 224, 224)
    variants = [Variant([(layer, 0)]) for layer in prunable_layers(model)] * 2
    seconds(lambda: model(x) if what == "pass" else engine(model, x, variants, None))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main():
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    p.add_argument("--images", type=int, default=12, help="images per forward pass, of each group (default %(default)s)")
    p.add_argument("--repeats", type=int, default=2, help="(default %(default)s)")
    p.add_argument("--share", type=float, default=0.02, help="of the unstructured trace that is timed (default %(default)s)")
    p.add_argument("--memory", choices=["pass", "trace"], help="used by the benchmark itself, in a process of its own")
    args = p.parse_args()
    if args.memory:
        return memory(args.memory, 32)
    # First, as a new process starts with the peak of the one that starts it
    peaks = {what: float(subprocess.run([sys.executable, "-m", "tests.bench_trace", "--memory", what], capture_output=True,
                                        text=True, check=True).stdout.split()[-1]) for what in ("pass", "trace")}
    print(f"peak memory, 32 images: one pass {peaks['pass']:.0f} MB, trace {peaks['trace']:.0f} MB, "
          f"ratio {peaks['trace'] / peaks['pass']:.2f}")
    torch.manual_seed(0)
    model = build_model("resnet50", 2, 224).to(memory_format=torch.channels_last)  # as in the scripts
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, untrained ResNet-50, {args.images} images")
    structured(model, torch.rand(args.images, 3, 224, 224), args.repeats)
    unstructured(model, args.images, args.repeats, args.share)


if __name__ == "__main__":
    main()
