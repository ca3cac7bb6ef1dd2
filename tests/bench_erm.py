"""Prints the speed figures of stage 1; asserts nothing.   python -m tests.bench_erm   (about 3 minutes)"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2

from common import augment, batches, build_model, load_split, normalize, read_metadata


def seconds(function, device="cpu", repeats=7):
    """Median time of a call after two warm-up calls."""
    times = []
    for i in range(repeats + 2):
        started = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times[2:])[repeats // 2]


def bench_augment():
    """One core, Table 1 at 224, a batch of 64 images of Waterbirds' size (500 x 375) as float tensor."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    smooth = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    picture = Image.fromarray(smooth).resize((500, 375), Image.BICUBIC)
    one_by_one = v2.Compose([
        v2.RandomResizedCrop(224, scale=(0.7, 1.0), ratio=(0.75, 1.33)), v2.RandomHorizontalFlip(0.5), v2.RandomRotation(15),
        v2.RandomAffine(0, translate=(0.1, 0.1), scale=(0.9, 1.1)), v2.RandomPerspective(0.2), v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True)])
    cached = torch.from_numpy(np.asarray(picture.resize((256, 256), Image.BILINEAR)).transpose(2, 0, 1).copy()).repeat(64, 1, 1, 1)
    sizes = torch.tensor([[375, 500]]).repeat(64, 1)
    reference = seconds(lambda: torch.stack([one_by_one(picture) for _ in range(64)])) / 64
    ours = seconds(lambda: augment(cached, sizes, 224, "table1")) / 64
    torch.set_num_threads(threads)
    print(f"augmentation, one core: {1e3 * ours:.2f} ms an image, transforms.v2 on PIL images {1e3 * reference:.2f} ms, ratio {ours / reference:.2f}")


def bench_epoch(arch, size, batch_size, device, cache):
    """Steps fed from the memory map through the augmentation, against the same steps on one resident batch."""
    train = load_split(read_metadata("synthetic"), "train", size, cache)
    model = build_model(arch, 2, size).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    count = min(len(train.y), 20 * batch_size)
    x = torch.rand(batch_size, 3, size, size, device=device)

    def step(x, y):
        loss = F.cross_entropy(model(normalize(x, model)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def fed():
        for index, images in batches(train, batch_size, torch.randperm(len(train.y))[:count], device):
            step(augment(images, train.original_sizes[index], size, "table1"), train.y[index].to(device))

    def resident():
        for index in torch.arange(count).split(batch_size):
            step(x[:len(index)], train.y[index].to(device))

    pairs = [(seconds(fed, device, 1), seconds(resident, device, 1)) for _ in range(5)]
    ratios = sorted(a / b for a, b in pairs)
    print(f"epoch of {arch} at {size} px, batch {batch_size}, {device}: {min(a for a, _ in pairs):.2f} s for {count} images, "
          f"on one resident batch {min(b for _, b in pairs):.2f} s, ratio {ratios[2]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    if device == "cuda":
        images, sizes = train.images[:batch_size].cuda(), train.original_sizes[:batch_size]
        share = seconds(lambda: augment(images, sizes, size, "table1"), device) / seconds(lambda: step(x, train.y[:batch_size].cuda()), device)
        print(f"augmentation on the GPU: {100 * share:.1f} % of a step")


def bench_start(cache):
    """Loading the three splits of the built-in set and CelebA's metadata (202,599 rows, made up)."""
    for attempt in ("first", "second"):
        started = time.perf_counter()
        meta = read_metadata("synthetic")
        for name in ("train", "val", "test"):
            load_split(meta, name, 48, cache)
        print(f"built-in set, {attempt} load: {time.perf_counter() - started:.2f} s")
    folder, rows = Path(cache), 202599
    signs = np.where(np.random.default_rng(0).random((rows, 40)) < 0.5, "-1", " 1")
    names = ["Blond_Hair", "Male", *(f"Attribute_{i}" for i in range(38))]
    lines = [f"{i:06d}.jpg {' '.join(row)}" for i, row in enumerate(signs, 1)]
    (folder / "list_attr_celeba.txt").write_text("\n".join([str(rows), " ".join(names), *lines]))
    (folder / "list_eval_partition.txt").write_text("\n".join(f"{i:06d}.jpg {i % 3}" for i in range(1, rows + 1)))
    started = time.perf_counter()
    read_metadata(folder)
    print(f"CelebA's metadata, {rows} rows: {time.perf_counter() - started:.2f} s")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {sys.platform}")
        bench_start(cache)
        bench_augment()
        bench_epoch("resnet10", 48, 128, "cpu", cache)
        if torch.cuda.is_available():
            bench_epoch("resnet50", 224, 256, "cuda", cache)
