"""Prints the speed figures of stage 5; asserts nothing.   python -m tests.bench_gradcam [--arch resnet50 --size 224 --batch 16]"""

import argparse
import time

import torch

from common import build_model
from gradcam import choose_layer, focus, grad_cam


def seconds(function):
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def main():
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    p.add_argument("--arch", default="resnet10", help="(default %(default)s)")
    p.add_argument("--size", type=int, default=48, help="side of the input in pixels (default %(default)s)")
    p.add_argument("--batch", type=int, default=128, help="images per batch (default %(default)s)")
    p.add_argument("--repeats", type=int, default=9, help="rounds, each of one measurement of everything (default %(default)s)")
    options = p.parse_args()
    torch.manual_seed(0)
    model = build_model(options.arch, 2, options.size).to(memory_format=torch.channels_last)
    x, layer = torch.randn(options.batch, 3, options.size, options.size), choose_layer(None, model)
    maps, masks = grad_cam(model, x, layer, 0)[0], torch.rand(options.batch, options.size, options.size) > 0.8

    def forward():
        with torch.inference_mode():
            model(x)

    def forward_and_backward():
        model(x)[:, 0].sum().backward()
        model.zero_grad()

    first = next(name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d))  # the dearest to map
    jobs = {"forward": forward, "forward and backward": forward_and_backward, "maps": lambda: grad_cam(model, x, layer, 0),
            "maps of the first layer": lambda: grad_cam(model, x, first, 0), "focus": lambda: focus(maps, masks)}
    rounds = [{name: seconds(job) for name, job in jobs.items()} for _ in range(options.repeats + 1)][1:]
    print(f"{options.arch} at {options.size}, {options.batch} images, {layer}: " + ", ".join(
        f"{name} {1000 * min(r[name] for r in rounds):.0f} ms" for name in jobs))
    for name in ("maps", "maps of the first layer"):
        ratios = sorted(r[name] / r["forward and backward"] for r in rounds)
        print(f"{name} against one forward and backward: ratio {ratios[len(ratios) // 2]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    main()
