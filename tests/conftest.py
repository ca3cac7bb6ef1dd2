"""Small data sets in the layouts that circulate, and the scripts run as a user runs them."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import train_erm

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
COUNTS = [[13, 5, 4, 10], [4, 4, 4, 4], [6, 5, 4, 5]]  # images per group in train, val, test
BIRD = "{group:03d}.Bird/Bird_{number:04d}_{number}.jpg"  # as CUB-200-2011 names its files


def labelled_rows(counts=COUNTS, pattern=BIRD):
    """(file name, y, a, split) of every image of a small set with four groups."""
    rows = []
    for split, per_group in enumerate(counts):
        for group, n in enumerate(per_group):
            for _ in range(n):
                name = pattern.format(group=group, number=len(rows) + 1)
                rows.append((name, group // 2, group % 2, split))
    return rows


def write_images(folder, rows, size=(40, 32)):
    """A learnable picture per row: brightness tells the class, colour the spurious attribute."""
    rng = np.random.default_rng(0)
    for name, y, a, _ in rows:
        pixels = rng.integers(0, 80, (size[1], size[0], 3))
        pixels[..., 2 * a] += 60
        pixels[8:24, 12:28] += 90 * y
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)


def write_table(folder, table, name="metadata.csv"):
    """Rows of cells, the header first, as a csv."""
    lines = [",".join(map(str, row)) for row in table]
    (folder / name).write_text("\n".join(lines) + "\n")


def write_waterbirds(folder, counts=COUNTS):
    """Waterbirds' own layout. Returns the rows of metadata.csv as lists of str, header first."""
    rows = labelled_rows(counts)
    write_images(folder, rows)
    table = [["img_id", "img_filename", "y", "split", "place", "place_filename"]]
    for number, (name, y, a, split) in enumerate(rows, 1):
        table.append([str(number), name, str(y), str(split), str(a), "/o/ocean/1.jpg"])
    write_table(folder, table)
    return table


def write_celeba(folder, form="txt", images="img_align_celeba", lists=""):
    """CelebA's layout, official (txt) or mirrored (csv with CRLF, no newline at the end, the
    partition in another order); y is Blond_Hair, a is Male, and Bald is the reverse of Blond_Hair.
    Returns the rows as labelled_rows does."""
    rows = labelled_rows(pattern="{number:06d}.jpg")
    write_images(folder / images, rows)
    (folder / lists).mkdir(exist_ok=True)
    labels = [(name, 1 - 2 * y, 2 * y - 1, 2 * a - 1) for name, y, a, _ in rows]
    parts = [(name, split) for name, _, _, split in rows]
    if form == "txt":
        header = ("Bald", "Blond_Hair", "Male", "")
        labels = [(len(rows),), header, *labels, ()]  # the first line is the number of images
        separator = "  "
        end = "\n"
    else:
        labels = [("image_id", "Bald", "Blond_Hair", "Male"), *labels]
        parts = [("image_id", "partition"), *reversed(parts)]
        separator = ","
        end = "\r\n"
    for stem, table in (("attr_celeba", labels), ("eval_partition", parts)):
        lines = [separator.join(map(str, row)) for row in table]
        (folder / lists / f"list_{stem}.{form}").write_bytes(end.join(lines).encode())
    return rows


def run_script(*arguments, check=True, cwd=ROOT, **environment):
    """Run a script in a process of its own, without a network; returns the finished process."""
    nowhere = "http://127.0.0.1:9"  # nothing listens there
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={
            **os.environ,
            "http_proxy": nowhere,
            "https_proxy": nowhere,
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        timeout=300,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="session")
def birds():
    """The names in data/birds.py; from its path, as `data` is no package."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / "data/birds.py")))


SMALL = (
    "--arch test_resnet --weights none --size 32 --batch-size 8 --lr 1e-2 --device cpu --seed 3 "
    "--epochs 4 --keep-epochs 2 3 --workers 0"
)


@pytest.fixture(scope="session")
def erm_run(tmp_path_factory):
    """A folder with Waterbirds-like data (32 training, 16 validation, 20 test images) in data/ and
    a run folder, run/, in which stage 1 was run on them with the flags SMALL."""
    folder = tmp_path_factory.mktemp("erm")
    write_waterbirds(folder / "data")
    flags = ["--data", str(folder / "data"), "--run", str(folder / "run"), *SMALL.split()]
    train_erm.main(train_erm.parse_args(flags))
    return folder
