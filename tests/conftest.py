"""Small data sets in the layouts that circulate, and the scripts run as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
COUNTS = ((13, 5, 4, 10), (4, 4, 4, 4), (6, 5, 4, 5))  # images per group in train, val, test


@pytest.fixture
def real_data():
    """Folder of real data sets, which only some machines have."""
    if not SHARED.exists():
        pytest.skip(f"real data not found at {SHARED}")
    return SHARED


def labelled_rows(counts=COUNTS, pattern="{group:03d}.Bird/Bird_{number:04d}_{number}.jpg"):
    """(file name, y, a, split) of every image of a small set with four groups."""
    rows = []
    for split, per_group in enumerate(counts):
        for group, n in enumerate(per_group):
            for _ in range(n):
                rows.append((pattern.format(group=group, number=len(rows) + 1), group // 2, group % 2, split))
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


def write_waterbirds(folder, counts=COUNTS):
    """Waterbirds' own layout. Returns the rows of metadata.csv as lists of str, header first."""
    rows = labelled_rows(counts)
    write_images(folder, rows)
    table = [["img_id", "img_filename", "y", "split", "place", "place_filename"]]
    table += [[str(i), name, str(y), str(split), str(a), "/o/ocean/1.jpg"] for i, (name, y, a, split) in enumerate(rows, 1)]
    write_table(folder, table)
    return table


def write_table(folder, table, name="metadata.csv"):
    (folder / name).write_text("\n".join(",".join(row) for row in table) + "\n")


def write_celeba(folder, form="txt", images="img_align_celeba", counts=COUNTS):
    """CelebA's layout, official (txt) or mirrored (csv, CRLF, no newline at the end); y Blond_Hair, a Male."""
    rows = labelled_rows(counts, "{number:06d}.jpg")
    write_images(folder / images, rows)
    sign = {0: "-1", 1: "1"}
    if form == "txt":
        lines = [f"{name} {sign[1 - y]:>2s} {sign[y]:>2s} {sign[a]:>2s}" for name, y, a, _ in rows]
        (folder / "list_attr_celeba.txt").write_text(f"{len(rows)}\nBald Blond_Hair Male \n" + "\n".join(lines) + "\n")
        (folder / "list_eval_partition.txt").write_text("".join(f"{name} {split}\n" for name, _, _, split in rows))
    else:
        lines = ["image_id,Bald,Blond_Hair,Male"] + [f"{name},{sign[1 - y]},{sign[y]},{sign[a]}" for name, y, a, _ in rows]
        (folder / "list_attr_celeba.csv").write_bytes("\r\n".join(lines).encode())
        lines = ["image_id,partition"] + [f"{name},{split}" for name, _, _, split in reversed(rows)]  # another order
        (folder / "list_eval_partition.csv").write_bytes("\r\n".join(lines).encode())
    return rows


def run_script(*arguments, check=True, cwd=ROOT, **environment):
    """Run a script of the project in a process of its own, without a network; returns the finished process."""
    settings = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https")}  # nothing listens there
    settings["OMP_NUM_THREADS"] = "1"  # the networks are too small to gain from more, and lose much where cores are shared
    process = subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300,
                             env={**os.environ, **settings, **environment})
    assert not check or process.returncode == 0, process.stderr
    return process


def assert_refused(process, *words):
    """Exit code 2, one line on stderr besides warnings, no traceback, and the words a user needs."""
    lines = [line for line in process.stderr.splitlines() if line and not line.startswith(("warning:", "Downloading:"))]
    assert process.returncode == 2, process.stderr
    assert len(lines) == 1 and "error: " in lines[0], process.stderr
    for word in words:
        assert word in lines[0], f"{word!r} not in {lines[0]!r}"
