"""Prints the speed and memory figures of stages 2 and 3; asserts nothing.   python -m tests.bench_trace [--images 8]"""

import argparse
import subprocess
import sys
import time

import torch

from common import Variant, build_model, logits_under, magnitude_scores, modified, prunable_layers, stages, top_neurons


def ratio(name, model, x, variants, repeats):
    """Sharing the prefix against full forward passes of the same variants, interleaved, stage search included."""
    shared, full = [], []
    with torch.inference_mode():
        for _ in range(repeats):
            started = time.perf_counter()
            chain = stages(model, x[:1])
            searched = time.perf_counter()
            for _ in logits_under(model, x, variants, chain=chain):
                pass
            middle = time.perf_counter()
            model(x)
            for v in variants:
                with modified(model, v.neurons, v.how, v.sigma, v.seed):
                    model(x)
            shared.append(middle - searched)
            full.append(time.perf_counter() - middle)
            print(f"  {name}: shared {shared[-1]:.1f} s, full {full[-1]:.1f} s, search for cuts (once a run) {searched - started:.1f} s", flush=True)
    ratios = sorted(a / b for a, b in zip(shared, full))
    print(f"{name}, {len(variants)} variants, {len(x)} images: ratio {ratios[len(ratios) // 2]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)


def memory(what, arch, size, images):
    """Peak resident memory in MB of a fresh process: one evaluation pass, or the trace of every layer."""
    import resource
    torch.manual_seed(0)
    model, x = build_model(arch, 2, size), torch.rand(images, 3, size, size)
    with torch.inference_mode():
        if what == "pass":
            model(x)
        else:
            for _ in logits_under(model, x, [Variant([(layer, 0)]) for layer in prunable_layers(model)] * 2):
                pass
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main():
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    p.add_argument("--images", type=int, default=8, help="images per forward pass (default %(default)s)")
    p.add_argument("--repeats", type=int, default=2, help="(default %(default)s)")
    p.add_argument("--memory", choices=["pass", "trace"], help="used by the benchmark itself, in a process of its own")
    args = p.parse_args()
    if args.memory:
        return memory(args.memory, "resnet50", 224, 32)
    torch.manual_seed(0)
    model, x = build_model("resnet50", 2, 224), torch.rand(args.images, 3, 224, 224)
    scores = magnitude_scores(model)
    structured = [Variant(top_neurons({layer: values}, 3)) for layer, values in scores.items() for _ in range(2)]  # one for each criterion
    ratio("structured, ResNet-50", model, x, structured, args.repeats)
    # Where the top neurons lie decides the gain: the largest by magnitude, and single neurons at random
    generator = torch.Generator().manual_seed(0)
    layers = [layer for layer, values in scores.items() for _ in values]
    drawn = [Variant([(layers[i], 0)]) for i in torch.randint(len(layers), (40,), generator=generator).tolist()]
    top = [Variant(top_neurons(scores, k), how, 0.01 if how != "zero" else 0) for k in (1, 2, 3, 5, 10) for how in ("zero", "random-init", "random-noise")]
    ratio("unstructured, ResNet-50, by magnitude", model, x, top, args.repeats)
    ratio("unstructured, ResNet-50, single neurons at random", model, x, drawn, args.repeats)
    peaks = {what: float(subprocess.run([sys.executable, "-m", "tests.bench_trace", "--memory", what], capture_output=True, text=True, check=True).stdout.split()[-1])
             for what in ("pass", "trace")}
    print(f"peak memory, ResNet-50, 32 images: one pass {peaks['pass']:.0f} MB, trace {peaks['trace']:.0f} MB, ratio {peaks['trace'] / peaks['pass']:.2f}")


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    main()
