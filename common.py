"""What the scripts share: data, models and checkpoints, evaluation, neurons and masks, runs.

Plain functions on tensors, in the order in which data flows. Nothing runs at import, and the file
needs no other of this project (but resnet10 its weights): copy it and call what you need.
Sections, equations, tables and figures named here are those of the paper, "Uncovering Memorization
Effect in the Presence of Spurious Correlations" (You, Dai, Min et al.).
"""

import argparse
import contextlib
import copy
import csv
import ctypes
import fnmatch
import functools
import hashlib
import inspect
import io
import json
import logging
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import filelock
import matplotlib
import numpy as np
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from PIL import Image
from torch.func import functional_call
from torch.fx.passes.utils.fuser_utils import fuse_as_graphmodule
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2
from tqdm import tqdm


class BadInput(ValueError):
    """What the user gave cannot be used. One line: what is wrong, where, what to do."""

    def __init__(self, message):
        # A worker of the DataLoader hands over a whole traceback as its message; its end counts
        super().__init__(message.rpartition("BadInput: ")[2].strip())


class Stopped(BaseException):
    """A signal asked the script to stop; only `script` catches it."""


def warn(message):
    """Say something on stderr that the user should know but that does not stop the run."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def reading(path, advice):
    """Around everything that reads a file, or takes a name from the user: whatever goes wrong
    (parsing, types, missing keys, the operating system) becomes one BadInput that names it and says
    what to do."""
    try:
        if Path(path).exists() and not Path(path).is_file():  # a named pipe would be waited for
            raise BadInput(f"{path}: not a file; {advice}")
        yield
    except (BadInput, BrokenPipeError):
        raise
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such file; {advice}") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise BadInput(f"{path}: cannot be used ({reason}); {advice}") from error


def write(path, content):
    """Write bytes or text: afterwards `path` holds all of it or what it held before, on a full disk
    and after a kill too. Raises BadInput."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.new")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise BadInput(f"{path.absolute()} cannot be written ({error.strerror})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------
# 1. Data: labels, images, batches
# ------------------------------------------------------------------------------------------------

SPLITS = ("train", "val", "test")
SPLIT_WORDS = {"0": 0, "1": 1, "2": 2, "train": 0, "val": 1, "valid": 1, "validation": 1, "test": 2}
# Images per group in the official splits: Waterbirds (Sagawa et al. 2020), CelebA (Liu et al. 2015)
OFFICIAL_COUNTS = {
    "waterbirds": [[3498, 184, 56, 1057], [467, 466, 133, 133], [2255, 2255, 642, 642]],
    "celeba": [[71629, 66874, 22880, 1387], [8535, 8276, 2874, 182], [9767, 7535, 2480, 180]],
}
NAMES = {  # of classes and spurious attributes
    "waterbirds": (["landbird", "waterbird"], ["on land", "on water"]),
    "celeba": (["non-blond", "blond"], ["woman", "man"]),
}
CELEBA = ("Blond_Hair", "Male")
BLANK = ("", "nan", "na", "n/a", "null", "?")
CUB_FILE = r"\d{3}\.\w+/\w+_\d+_\d+\.jpg$"  # as CUB-200-2011, and so Waterbirds, names them
# Where images lie, seen from the labels, in the layouts in which the two sets circulate
CUB, ALIGNED = "waterbird_complete95_forest2water2", "img_align_celeba"
IMAGE_FOLDERS = ["", CUB, f"waterbirds/{CUB}", ALIGNED, f"{ALIGNED}/{ALIGNED}", f"Img/{ALIGNED}"]
IMAGE_FOLDERS += [f"celeba/{ALIGNED}", f"celeba/{ALIGNED}/{ALIGNED}"]


@dataclass
class Table:
    """The labels of all splits, N images: int64 arrays (N,) of y class, a spurious attribute,
    g = y * n_attributes + a group, split index into SPLITS; files are relative to root."""

    source: str  # 'synthetic', or the file that holds the labels
    root: Path
    files: list
    y: np.ndarray
    a: np.ndarray
    g: np.ndarray
    split: np.ndarray
    classes: list  # names
    groups: list  # a dict per group: group, name, train_n, minority

    def fingerprint(self):
        """Tells whether labels or file names changed."""
        text = json.dumps([self.files, self.y.tolist(), self.a.tolist(), self.split.tolist()])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_table(data, attributes=CELEBA):
    """The labels of a data set, recognised by content: 'synthetic', a metadata csv (or the folder
    that holds one), or a folder with CelebA's attribute and partition lists, of which `attributes`
    names class and spurious attribute. Raises BadInput."""
    if str(data) == "synthetic":
        return synthetic_table()
    path = Path(data).absolute()
    if not path.exists():
        raise BadInput(f"--data {data}: no such file or folder; give one, or 'synthetic'")
    tables = sorted(path.glob("metadata*.csv")) if path.is_dir() else [path]
    if len(tables) > 1:
        raise BadInput(f"{path} holds {len(tables)} metadata*.csv; name one")
    if tables:
        columns = read_columns(tables[0], "img_filename|filename", "y", "place|a", "split")
        return make_table(tables[0], tables[0].parent, *columns)
    stems, lists = ("list_attr_celeba", "list_eval_partition"), []
    for stem in stems:
        names = [f"{stem}.txt", f"{stem}.csv", f"*/{stem}.txt", f"*/{stem}.csv"]
        lists.append([file for name in names for file in sorted(path.glob(name))])
    if not all(lists):
        found = f"holds neither metadata*.csv nor {' and '.join(stems)}"
        raise BadInput(f"{path} {found}; name the folder that does, or see the README")
    # CelebA's lists are joined by file name, never by the order of rows
    (labels, *_), (splits, *_) = lists
    files, y, a = read_columns(labels, "image_id", *attributes)
    split_of = dict(zip(*read_columns(splits, "image_id", "partition")))
    alone = sorted(split_of.keys() ^ set(files))
    if alone:
        some = f"{len(alone)} images are in one of them only ({', '.join(alone[:3])})"
        raise BadInput(f"{labels} and {splits.name} do not join: {some}; take both from one source")
    return make_table(labels, path, files, y, a, [split_of[file] for file in files], attributes)


def read_columns(path, *wanted):
    """Columns of a csv, or of one of CelebA's txt lists, as lists of str; wanted: their names in
    the header, or 'name|other' where it may be either."""
    with reading(path, "expected UTF-8 text, a header and rows; cut off, or a quote left open?"):
        with open(path, encoding="utf-8-sig") as file:
            lines = file.readlines()
        separator = max(",;\t", key=lines[0].count)
        table = csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)
        if path.suffix == ".txt":
            table = [line.split() for line in lines]
            if "partition" in path.name:  # has no header
                table.insert(0, ["image_id", "partition"])
            else:  # first the number of rows, then the names of the 40 attributes
                (_,), names, *rows = table
                table = [["image_id", *names], *rows]
        header, *rows = [row for row in table if "".join(row).strip()]
        uneven = [row for row in rows if len(row) != len(header)]
        if uneven or not rows:
            where = f"first in '{separator.join(uneven[0])[:80]}'" if uneven else "it holds no rows"
            raise BadInput(f"{path}: every row needs {len(header)} cells, as the header; {where}")
    header = [name.strip().lower() for name in header]
    columns = []
    for names in wanted:
        found = [header.index(name) for name in names.lower().split("|") if name in header]
        if not found:
            missing = f"no column {names} in the header {','.join(header)[:120]}"
            raise BadInput(f"{path}: {missing}; needed are {', '.join(wanted)}")
        columns.append([row[found[0]].strip() for row in rows])
    return columns


def number_values(values, label):
    """A column of classes or attributes -> int64 (N,) and the names of its values, numbered from 0:
    numbers by size, so that -1 and 1, or 0.0 and 1.0, become 0 and 1; words by the alphabet."""
    try:
        names, codes = np.unique(np.array(values, dtype=float), return_inverse=True)
        names = [f"{label}={value:g}" for value in names]
    except ValueError:
        names, codes = np.unique(values, return_inverse=True)
    return codes, list(map(str, names))


def make_table(source, folder, files, y, a, split, labels=("y", "a")):
    """The Table of N images, from lists of length N: files (relative to folder or to the working
    directory, or absolute), y, a and split (words or numbers). source: the file that they come
    from, or the name by which read_table knows them. Raises BadInput."""
    files = [str(file).replace("\\", "/") for file in files]
    for label, column in zip((*labels, "split"), (y, a, split)):
        blank = [file for file, value in zip(files, column) if str(value).lower() in BLANK]
        if blank:
            raise BadInput(f"{source}: {label} is empty for {blank[0]}; fill it or take it out")
    parts = [SPLIT_WORDS.get(str(word).lower().removesuffix(".0")) for word in split]
    if None in parts:
        odd = f"split of {files[parts.index(None)]} is {split[parts.index(None)]}"
        raise BadInput(f"{source}: {odd}; expected 0, 1, 2 or train, val, test")
    (y, classes), (a, places) = (number_values(*pair) for pair in zip((y, a), labels))
    g, split, n_groups = y * len(places) + a, np.array(parts), len(classes) * len(places)
    counts = [np.bincount(g[split == i], minlength=n_groups).tolist() for i in range(3)]
    sizes = (len(classes), len(places))
    kinds = [kind for kind, official in OFFICIAL_COUNTS.items() if official == counts]
    kind = "celeba" if tuple(labels) == CELEBA else next(iter(kinds), None)
    if all(re.search(CUB_FILE, file) for file in files):
        kind = "waterbirds"
    if kind and sizes == (2, 2) and "=" in classes[0] and "=" in places[0]:  # else the user's words
        classes, places = NAMES[kind]
        if counts != OFFICIAL_COUNTS[kind]:
            official = f"the official {kind} has {OFFICIAL_COUNTS[kind]}"
            warn(f"{source}: images per group in train, val, test are {counts}; {official}")
    groups = describe_groups(classes, places, counts[0])
    if min(sizes) < 2:
        raise BadInput(f"{source}: needs two or more of classes and of attributes; it has {sizes}")
    for name, n in zip(SPLITS, counts):
        empty = ", ".join(group["name"] for group, images in zip(groups, n) if images == 0)
        if sum(n) == 0 or (empty and name == "train"):
            needs = "each pair of class and attribute in training, and three splits"
            raise BadInput(f"{source}: needs {needs}; {name} has no image of {empty[:200]}")
        if empty:
            warn(f"{source}: no {name} image of {empty}; not in the worst group of {name}")
    folder = Path(folder).absolute()
    paths = [os.path.normpath(os.path.join(folder, file)) for file in files]
    for values, what in ((parts, "split"), (y.tolist(), "class"), (a.tolist(), "attribute")):
        twice = len({*zip(paths, values)}) - len({*paths})
        if twice:
            warn(f"{source}: {twice} images stand in more than one {what}")
    roots = [folder / name for name in IMAGE_FOLDERS] + [Path.cwd()]
    root = next((path for path in roots if (path / files[0]).is_file()), folder)
    return Table(str(source), root, files, y, a, g, split, classes, groups)


def describe_groups(classes, attributes, train_counts):
    """A dict per group: group, name, train_n, minority. A minority group has fewer than half the
    training images of the largest group of its class: G1 and G2 of Waterbirds, G3 of CelebA."""
    groups = []
    for j, n in enumerate(train_counts):
        c, b = divmod(j, len(attributes))
        largest = max(train_counts[j - b : j - b + len(attributes)])
        name = f"{classes[c]} {attributes[b]}"
        groups.append({"group": j, "name": name, "train_n": n, "minority": 2 * n < largest})
    return groups


@functools.lru_cache
def synthetic_table():
    """The built-in set: Waterbirds' classes, places and group counts for images that we draw."""
    rng, counts = np.random.default_rng(0), OFFICIAL_COUNTS["waterbirds"]
    g = np.concatenate([rng.permutation(np.repeat(np.arange(4), n)) for n in counts])
    split = np.repeat(np.arange(3), [sum(n) for n in counts])
    files = [f"{SPLITS[part]}/{i:05d}" for i, part in enumerate(split)]
    classes, places = map(np.array, NAMES["waterbirds"])  # in the order of the alphabet
    return make_table("synthetic", "", files, classes[g // 2], places[g % 2], split)


# Body, neck, beak and head of a drawn bird, in its own units: what lies in the middle of the two
# classes, and half their distance. Waterbirds have longer bodies, necks and beaks
PARTS = torch.tensor([[1.6, 1.02, 0.92, 0.4], [0.2, 0.48, 0.3, -0.04]])


def draw_birds(parts, a, generator, size=48):
    """The built-in set, a tiny Waterbirds, of parts (N, 4) and places a (N,), 0 land or 1 water:
    images uint8 (N, 3, S, S), bird masks bool (N, S, S), and pose and texture (N, 9)."""
    n = len(a)

    def pick(low, high, channels=1):
        return low + (high - low) * torch.rand(n, channels, 1, 1, generator=generator)

    line = (torch.arange(size) + 0.5) * 2 / size - 1  # pixel centres in [-1, 1]
    row, col = torch.meshgrid(line, line, indexing="ij")
    # Three waves across the picture, upright on land, lying on water
    land, waves = (a == 0)[:, None, None, None], 0
    for amplitude in (0.4, 0.6, 1.0):
        frequency, slant = pick(4, 22), pick(-2.5, 2.5)
        along = torch.where(land, frequency * col + slant * row, frequency * row + slant * col)
        waves = waves + amplitude * (along + pick(0, 6.28)).sin()
    colours = torch.tensor([[0.36, 0.44, 0.30], [0.32, 0.43, 0.48]])  # green, blue
    colour = colours[a][:, :, None, None] + 0.09 * torch.randn(n, 3, 1, 1, generator=generator)
    image = colour + 0.07 * waves * pick(0.5, 1.5, 3)

    # The bird in its own frame: u from tail to beak, v downwards; turned, mirrored, scaled, moved
    scale, angle, facing = pick(0.36, 0.52), pick(-0.35, 0.35), pick(-1, 1).sign()
    right, down, lean, droop = pick(-0.25, 0.25), pick(-0.2, 0.3), pick(0.2, 0.9), pick(-0.1, 0.4)
    col, row = col - right, row - down
    u = (col * angle.cos() + row * angle.sin()) * facing / scale
    v = (row * angle.cos() - col * angle.sin()) / scale

    def stick(u0, v0, turn, length, width, end_width):  # with round ends; coverage of every pixel
        along = ((u - u0) * turn.cos() + (v - v0) * turn.sin()) / length
        along = along.clamp(0, 1)
        du, dv = u - u0 - along * length * turn.cos(), v - v0 - along * length * turn.sin()
        outside = torch.hypot(du, dv) - width - (end_width - width) * along
        return (0.5 - outside * scale * size / 3).clamp(0, 1)

    body, neck, beak, head = parts[:, :, None, None, None].unbind(1)
    head_u, head_v = 0.7 * body + neck * lean.sin(), -0.35 - neck * lean.cos()
    level = torch.zeros(1)
    bird = stick(0.4 - body, 0, level, 2 * body - 1.1, 0.4, 0.7)
    bird = bird.maximum(stick(0.7 * body, -0.35, lean - math.pi / 2, neck, 0.34, 0.2))
    bird = bird.maximum(stick(head_u, head_v, level, 0.01, head, head))
    bill = stick(head_u + 0.25, head_v, droop, beak, 0.17, 0.03)
    wing = stick(-0.7 * body, -0.1, level, 0.8 * body, 0.2, 0.4)
    plumage = pick(0.1, 0.85, 3) * (1 - wing * pick(0, 0.5))
    orange = torch.cat([pick(0.3, 0.9), pick(0.2, 0.7), pick(0.05, 0.3)], 1)
    alpha = bird.maximum(bill)
    image += alpha * (torch.where(bill > bird, orange, plumage) - image)
    image += 0.06 * torch.randn(n, 3, size, size, generator=generator)
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    pose = [facing, angle, scale, right, down, lean, droop, frequency, slant]
    return pixels, alpha[:, 0] > 0.5, torch.cat(pose, 1).flatten(1)


@functools.lru_cache
def draw_split(split, size, difficulty):
    """All images and masks of a split of the built-in set, once a process: see draw_birds.
    difficulty: spread of parts within a class, in units of half the distance of the classes."""
    table, generator = synthetic_table(), torch.Generator().manual_seed(SPLITS.index(split))
    rows = np.flatnonzero(table.split == SPLITS.index(split))
    drawn = []
    for some in np.split(rows, range(100, len(rows), 100)):  # what fits into a CPU's cache
        y, a = torch.from_numpy(table.y[some]), torch.from_numpy(table.a[some])
        spread = difficulty * torch.randn(len(y), 4, generator=generator)
        parts = PARTS[0] + PARTS[1] * (2.0 * y[:, None] - 1 + spread).clamp(-2, 2)
        drawn.append(draw_birds(parts, a, generator, size)[:2])
    return [torch.cat(some) for some in zip(*drawn)]


def read_image(path):
    """An image file as RGB. Raises BadInput for what is no image of 8 bits."""
    with reading(path, "replace it or take its row out of the metadata"), Image.open(path) as image:
        if image.mode[0] in "IF":  # PIL would cut more bits off at 255
            raise BadInput(f"{path}: has more than 8 bits a pixel; convert it to 8")
        return image.convert("RGB")


def make_transform(size, augment="none", drawn=False):
    """What happens to a picture before it is normalised: Table 1 ('table1'), its first two rows,
    which are all that the released code uses ('crop-flip'), or, for evaluation ('none'), resize to
    256 x 256 and centre crop 224 as everywhere in the field, in proportion for other sizes. drawn:
    the pictures of the built-in set have the network's size."""
    squeeze = [v2.Resize((round(size * 256 / 224),) * 2), v2.CenterCrop(size)]
    table1 = [
        v2.RandomResizedCrop(size, scale=(0.7, 1.0), ratio=(0.75, 1.33)),
        v2.RandomHorizontalFlip(p=0.5),
        v2.RandomRotation(degrees=15),
        v2.RandomAffine(degrees=0, translate=(0.1, 0.1), scale=(0.9, 1.1)),  # "ratio" in Table 1
        v2.RandomPerspective(distortion_scale=0.2),
    ]
    evaluation = [] if drawn else squeeze
    steps = {"none": evaluation, "crop-flip": table1[:2], "table1": table1}[augment]
    return v2.Compose([*steps, v2.PILToTensor()])


def seed_of(*numbers):
    """One seed from several numbers. Everything random is a function of (seed, epoch, image)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class Images(Dataset):
    """One split. images[i], or images[epoch, i] in training, gives (x, y, g, i): x uint8 (3, S, S),
    or (V, 3, S, S) for V > 1 views; on_device normalises batches of it. What is random in view v of
    image i depends on (seed, epoch, i, v) alone: not on workers, nor on what was drawn before.
    difficulty: of the built-in set."""

    def __init__(self, table, split, size, augment="none", difficulty=0.2, views=1, seed=0):
        rows = np.flatnonzero(table.split == SPLITS.index(split))
        self.files = [table.files[row] for row in rows]
        self.y, self.g = torch.from_numpy(table.y[rows]), torch.from_numpy(table.g[rows])
        self.root, self.views, self.seed = table.root, views, seed
        self.built_in = (split, size, difficulty) if table.source == "synthetic" else None
        named = [] if self.built_in else self.files
        missing = [file for file in named if not (table.root / file).is_file()]
        if missing:
            some = f"{len(missing)} of {len(rows)} {split} images are missing ({missing[0]})"
            raise BadInput(f"{table.root}: {some}; was the archive unpacked completely?")
        self.transform = make_transform(size, augment, drawn=bool(self.built_in))
        # In evaluation the pixels are fixed: kept where they fit, for all workers together. From
        # torch.empty, as zeros would also take memory of the process
        fixed = augment == "none" and views == 1
        self.in_memory = fixed and bool(self.built_in)
        self.kept, there = None, Path("/dev/shm").exists()
        room = min(4e9, shutil.disk_usage("/dev/shm").free / 2) if there else 0
        if fixed and not self.in_memory and len(rows) * 3 * size**2 < room:
            self.kept = torch.empty(len(rows), 3, size, size, dtype=torch.uint8).share_memory_()
            self.known = torch.zeros(len(rows)).bool().share_memory_()

    def __len__(self):
        return len(self.files)

    def __getitem__(self, key):
        return self.__getitems__([key])[0]

    def __getitems__(self, keys):  # what a DataLoader asks for
        keys = [key if isinstance(key, tuple) else (0, int(key)) for key in keys]
        index = [i for _, i in keys]
        if self.in_memory:
            x = draw_split(*self.built_in)[0][index]
        else:
            with torch.random.fork_rng(devices=[]):
                x = torch.stack([self.pixels(epoch, i) for epoch, i in keys])
        return list(zip(x, self.y[index], self.g[index], index))

    def pixels(self, epoch, i):
        """An image, uint8 (3, S, S) or (V, 3, S, S). Seeds torch."""
        if self.kept is not None and self.known[i]:
            return self.kept[i]
        if self.built_in:
            picture = draw_split(*self.built_in)[0][i]
        else:
            picture = read_image(self.root / self.files[i])
        views = []
        for view in range(self.views):
            torch.default_generator.manual_seed(seed_of(self.seed, epoch, i, view))
            views.append(self.transform(picture))
        if self.kept is not None:
            self.kept[i], self.known[i] = views[0], True
        return views[0] if self.views == 1 else torch.stack(views)


class EpochOrder(Sampler):
    """Batches of an epoch, in an order drawn from (seed, epoch): lists of (epoch, i). Set `epoch`
    before each pass. A last batch of one image, which BatchNorm cannot take, is left out."""

    def __init__(self, n, batch_size, seed):
        self.n, self.batch_size, self.seed, self.epoch = n, batch_size, seed, 0

    def __len__(self):
        return self.n // self.batch_size + (self.n % self.batch_size > 1)

    def __iter__(self):
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        order = torch.randperm(self.n, generator=generator)
        for batch in order.split(self.batch_size)[: len(self)]:
            yield [(self.epoch, i) for i in batch.tolist()]


def make_loader(images, batch_size=128, workers=0, order=None, parts=None):
    """Batches (x uint8 (B, 3, S, S), y (B,), g (B,), index (B,)) of Images: as stored, in an
    EpochOrder, or of its parts, index tensors (n,), no two of them in one batch, as tracing goes
    group by group."""
    if parts is not None:
        order = [some.tolist() for part in parts for some in part.split(batch_size) if len(some)]
    workers = 0 if getattr(images, "in_memory", False) else workers  # there is nothing to read
    return DataLoader(
        images,
        **({"batch_size": batch_size} if order is None else {"batch_sampler": order}),
        num_workers=workers,
        persistent_workers=workers > 0,  # new ones would take seconds an epoch
        pin_memory=torch.cuda.is_initialized(),  # not under --device cpu: pinning would start CUDA
        worker_init_fn=_quiet_worker,
        generator=torch.Generator(),  # its own: else it would draw from the one that dropout uses
    )


def _quiet_worker(_):  # the script alone reports signals and killed workers
    sys.excepthook = lambda *_: None
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in STOP_SIGNALS[1:]:
        signal.signal(number, signal.SIG_DFL)


# ------------------------------------------------------------------------------------------------
# 2. Models and checkpoints
# ------------------------------------------------------------------------------------------------

# resnet50: torchvision's IMAGENET1K_V2, as in the paper; resnet10: one block a stage, half as wide
ARCHS = {"resnet50": "resnet50.tv2_in1k", "resnet10": "resnet18"}
BIRDS = Path(__file__).parent / "results/resnet10_birds.pth"  # made by results/birds.py


def build_model(arch, n_classes, size, weights="none"):
    """A network with logits (B, n_classes) for images (B, 3, size, size): any timm name, resnet50
    as in the paper, or resnet10, a ResNet with one basic block a stage for the built-in set.
    weights: 'default' (published ones), 'none' or a file; the head is always new. The network's
    mean and std stand in its pretrained_cfg. Raises BadInput."""
    name = ARCHS.get(arch, arch.removeprefix("timm/"))
    weights = BIRDS if (arch, weights) == ("resnet10", "default") else weights
    options = {"num_classes": n_classes, "pretrained": weights == "default"}
    if arch == "resnet10":
        options |= {"layers": (1, 1, 1, 1), "channels": (32, 64, 128, 256), "zero_init_last": False}
    expected = f"expected a network of timm that takes --size {size} and has --weights {weights}"
    with reading(f"--arch {arch}", expected):
        config = timm.get_pretrained_cfg(name)
        if config and config.fixed_input_size:
            options["img_size"] = size
        try:
            model = timm.create_model(name, **options)
        except OSError as error:  # what the hub raises
            hub = getattr(config, "hf_hub_id", None) or name
            fetch = f"bring model.safetensors of {hub} and give it as --weights FILE, or none"
            raise BadInput(f"--weights default: {name} cannot be fetched; {fetch}") from error
        for head in head_names(model):  # timm starts some where it takes epochs to recover
            model.get_submodule(head).reset_parameters()
        with evaluating(model), torch.inference_mode():
            logits = model(torch.zeros(2, 3, size, size))
        if not torch.is_tensor(logits) or logits.shape != (2, n_classes):
            raise ValueError("two images do not give logits of shape (2, n_classes)")
    if weights not in ("default", "none"):
        load_body(model, weights)
    return model.eval()


def head_names(model):
    """The layers that give the logits: model.pretrained_cfg["classifier"], which timm sets (a name
    or several), else the linear layer or convolution that was registered last."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier")
    if not names:
        kinds = (torch.nn.Linear, *CONVOLUTIONS)
        names = [name for name, module in model.named_modules() if isinstance(module, kinds)][-1:]
    return (names,) if isinstance(names, str) else tuple(names)


def load_tensors(path):
    """What torch.save wrote, on the CPU; runs no code that a file may hold. Raises if a checksum of
    the archive, at which torch.load does not look, is wrong."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise ValueError("damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_body(model, path):
    """Load a file of weights, .pth or .safetensors, plain or wrapped by a trainer, of this or (for
    transformers) of another input size; everything but the head must fit. Raises BadInput."""
    with reading(path, "expected weights of this --arch, .pth or .safetensors, or none"):
        if str(path).endswith(".safetensors"):
            state = safetensors.torch.load_file(path)
        else:
            state = load_tensors(path)
        for wrapper in ("state_dict", "model_state_dict", "model"):
            state = state.get(wrapper, state)
        state = {key.removeprefix("module."): value for key, value in state.items()}
        convert = getattr(inspect.getmodule(type(model)), "checkpoint_filter_fn", None)
        state = convert(state, model) if convert else state
        heads = tuple(f"{name}." for name in head_names(model))
        body = {key: value for key, value in state.items() if not key.startswith(heads)}
        own = {key: value for key, value in model.state_dict().items() if key.startswith(heads)}
        model.load_state_dict({**body, **own})


def save_checkpoint(path, model, **fields):
    """Write the model's state and `fields`, tensors and plain types only (weights_only)."""
    buffer = io.BytesIO()  # first to memory: torch's own writer has no good word for a full disk
    torch.save({"model": model.state_dict(), **fields}, buffer)
    write(path, buffer.getbuffer())  # not another copy


def load_checkpoint(path):
    """What a training stage wrote, on the CPU. Raises BadInput if it is missing, damaged,
    foreign."""
    with reading(path, "train_erm.py and finetune_contrastive.py make such checkpoints"):
        checkpoint = load_tensors(path)
        torch.tensor([checkpoint["mean"], checkpoint["std"]]).view(2, 3)  # raises unless of 3
        kinds = {"arch": str, "n_classes": int, "size": int, "epoch": int, "data": dict}
        for key, kind in {**kinds, "args": dict, "classes": list}.items():
            if not isinstance(checkpoint[key], kind):
                raise TypeError(f"{key} is {checkpoint[key]!r}")
        return checkpoint


def load_model(path, device="cpu"):
    """The model of a checkpoint, in eval mode on `device`, and the checkpoint itself."""
    checkpoint = load_checkpoint(path)
    with reading(path, "its weights do not fit its own description; run its stage again"):
        model = build_model(checkpoint["arch"], checkpoint["n_classes"], checkpoint["size"])
        model.load_state_dict(checkpoint["model"])
    model.pretrained_cfg |= {key: checkpoint[key] for key in ("mean", "std")}
    return model.to(device, memory_format=torch.channels_last).eval(), checkpoint


def fingerprint_of(model):
    """Tells whether two networks have the same weights."""
    values = [value.cpu().contiguous().numpy() for value in model.state_dict().values()]
    return hashlib.sha256(b"".join(values)).hexdigest()[:16]


def reopen(path, data=None, device="cpu"):
    """What a later stage starts from: the model of a checkpoint (eval mode), the checkpoint and the
    table of its data, or of `data` where they have moved. Raises BadInput if labels changed."""
    model, checkpoint = load_model(path, device)
    with reading(path, "is it a checkpoint of this project? Run its stage again"):
        source = checkpoint["data"]
        table = read_table(data or source["source"], source["attributes"])
        if table.fingerprint() != source["fingerprint"]:
            changed = f"labels or file names of {table.source} changed"
            raise BadInput(f"{changed} since {path} was trained on them; train again")
    return model, checkpoint, table


def open_split(checkpoint, table, name, augment="none", **options):
    """A split as the network of a checkpoint takes it; options: views and seed of Images."""
    difficulty = checkpoint["data"]["difficulty"]
    return Images(table, name, checkpoint["size"], augment, difficulty, **options)


# ------------------------------------------------------------------------------------------------
# 3. Evaluation
# ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def evaluating(model):
    """Inside the `with` every module is in eval mode; after it in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.train(mode)  # where LeViT and others clear what they keep of the weights


def on_device(model, *tensors):
    """Tensors on the model's device, on CUDA without waiting for them. Batches of pixels, uint8
    (B, ..., 3, H, W), are scaled to [0, 1] and normalised by the mean and std in the model's
    pretrained_cfg, if it has them: here, as bytes travel four times as fast as numbers, and a batch
    takes a third of the time that its images take one by one, or less."""
    device, moved = next(model.parameters(), tensors[0]).device, []
    config = getattr(model, "pretrained_cfg", {})
    fast = device.type == "cuda"  # mps would copy what is freed meanwhile
    for tensor in tensors:
        tensor = tensor.to(device, non_blocking=fast)
        if tensor.dtype == torch.uint8 and tensor.dim() > 3 and "mean" in config:
            mean, std = (torch.tensor(config[key]) for key in ("mean", "std"))
            mean, std = mean.to(device, non_blocking=fast), std.to(device, non_blocking=fast)
            tensor = v2.functional.to_dtype(tensor, scale=True)
            tensor = v2.functional.normalize(tensor, mean, std, inplace=True)
        moved.append(tensor)
    return moved


def predict(model, batches):
    """Logits (N, C), classes (N,) and groups (N,) of all batches (x, y, g, ...), on the CPU."""
    found = []
    with evaluating(model), torch.inference_mode():
        for x, y, g, *_ in tqdm(batches, "evaluate", disable=None, leave=False):
            found.append((model(*on_device(model, x)), y, g))
    logits, y, g = map(torch.cat, zip(*found))
    return logits.float().cpu(), y, g


MEANS = {"acc_worst": "worst group", "acc_mean": "mean"}
MEANS |= {"acc_mean_train_mix": "mean, groups in training mix"}


def group_report(predicted, y, g, groups):
    """Group accuracies in [0, 1] with counts, from predicted classes, classes and groups, each
    (N,). acc_mean: over the images as they are; acc_mean_train_mix: groups weighted by their
    training counts (what group_DRO and WILDS call 'adjusted' or 'average'). A group without images
    counts in neither and is not the worst."""
    rows, present = [], []
    for group in groups:
        member = g == group["group"]
        n, correct = int(member.sum()), int((predicted[member] == y[member]).sum())
        row = {"group": group["group"], "name": group["name"], "n": n, "correct": correct}
        rows.append({**row, "acc": correct / n if n else None, "minority": group["minority"]})
        if n:
            present.append((rows[-1], group["train_n"]))
    worst = min((row for row, _ in present), key=lambda row: row["acc"])
    mix = sum(row["acc"] * train_n for row, train_n in present)
    return {
        "groups": rows,
        "worst_group": worst["group"],
        "acc_worst": worst["acc"],
        "acc_mean": sum(row["correct"] for row in rows) / sum(row["n"] for row in rows),
        "acc_mean_train_mix": mix / sum(train_n for _, train_n in present),
    }


def evaluate(model, loaders, groups):
    """Group reports and logits (N, C) of a model on every split, {split: ...} each."""
    reports, logits = {}, {}
    for split, batches in loaders.items():
        logits[split], y, g = predict(model, batches)
        reports[split] = group_report(logits[split].argmax(1), y, g, groups)
    return reports, logits


def short(group):
    """'G1*': a group's number, starred where it is a minority group."""
    return f"G{group['group']}{'*' if group['minority'] else ''}"


def print_epoch(row, epochs):
    """One line on an epoch of a training stage: loss or its terms, and group accuracies in %."""
    terms = row.get("terms", {"loss": row["loss"]})
    told = [f"{name} {value:.4f}" for name, value in terms.items()] + [f"lr {row['lr']:.1e}"]
    if row.get("pruned"):
        told.append(f"pruned {row['pruned']} ({row['pruned_before']} as before)")
    for split in ("train", "val"):
        told.append(split)
        for group in row[split]["groups"]:
            star = "*" if group["minority"] else ""
            told.append(f"{100 * group['acc']:5.1f}{star}" if group["n"] else "-")
    told.append(f"worst {100 * row['val']['acc_worst']:.1f} (group {row['val']['worst_group']})")
    print(f"epoch {row['epoch']}/{epochs} {' '.join(told)} {row['seconds']:.0f} s", flush=True)


def print_splits(title, groups, after, before=None):
    """A table of group accuracies and their means, from reports {split: report} of one network, or
    of one before and after; the worst group of each split carries a '<'."""
    print(f"\n{title}; accuracy in %, * minority, < worst group")
    print(f"{'group':32s} {'train n':>8s}" + "".join(f"{split:>17s} " for split in after))
    names = {j: f"{j} {g['name']}{'*' if g['minority'] else ''}" for j, g in enumerate(groups)}
    for key, name in {**names, **MEANS}.items():
        line = f"{name:32s} {groups[key]['train_n'] if key in names else '':>8}"
        for split, report in after.items():
            cells = []
            for of in (before[split], report) if before else (report,):
                acc = of["groups"][key]["acc"] if key in names else of[key]
                cells.append("-" if acc is None else f"{100 * acc:.1f}")
            mark = "<" if key == report["worst_group"] else " "
            line += f"{' -> '.join(cells) + mark:>18s}"
        print(line)


def plot_groups(ax, reports):
    """Figure 1: group accuracies of two reports, {label: report}, side by side, as bars; n: images
    of the first."""
    styles = ({"color": "0.75"}, {"color": "0.35", "hatch": "///"})
    for offset, style, (label, report) in zip((-0.2, 0.2), styles, reports.items()):
        rows = report["groups"]
        places = [i + offset for i in range(len(rows))]
        heights = [100 * (row["acc"] or 0) for row in rows]
        bars = ax.bar(places, heights, 0.4, edgecolor="white", label=label, **style)
        cells = [f"{100 * row['acc']:.1f}" if row["n"] else "no image" for row in rows]
        ax.bar_label(bars, cells, fontsize=8)
    first = next(iter(reports.values()))["groups"]
    ticks = [f"{short(row)}\n{row['name']}\nn = {row['n']}" for row in first]
    ax.set_xticks(range(len(rows)), ticks, fontsize=7)
    ax.set(ylabel="accuracy (%)", ylim=(0, 122), yticks=range(0, 101, 20))
    ax.legend(loc="upper center", ncols=2, fontsize=8)


def plot_epochs(log, selected):
    """Training and validation accuracy of every group over the epochs of a log, a panel each, and
    an empty panel for the loss -> figure and that panel."""
    groups, epochs = log[0]["train"]["groups"], [row["epoch"] for row in log]
    fig = Figure(figsize=(2.7 * (len(groups) + 1), 2.6), layout="constrained")
    axes = fig.subplots(1, len(groups) + 1)
    for j, (ax, group) in enumerate(zip(axes, groups)):
        for name, style in (("train", {"color": "0.6"}), ("val", {"color": "0.0", "ls": "--"})):
            accuracies = [row[name]["groups"][j]["acc"] for row in log]
            percent = 100 * np.array(accuracies, dtype=float)  # None: NaN
            ax.plot(epochs, percent, marker=".", ms=3, label=name, **style)
        ax.set(title=f"{short(group)} {group['name']}", ylim=(-3, 103))
    axes[0].set_ylabel("accuracy (%)")
    axes[0].legend(loc="lower right", fontsize=8)
    for ax in axes:
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.axvline(selected, color="0.8", ls=":", zorder=0)
        ax.set_xlabel("epoch")
    return fig, axes[-1]


# ------------------------------------------------------------------------------------------------
# 4. Neurons and masks
# ------------------------------------------------------------------------------------------------

# A neuron is a pair (layer, index). Unit 'channel': an output filter of a convolution or an output
# row of a linear layer with all its weights; unit 'weight': one weight, by its place in the layer.
# Zeroing a filter in front of BatchNorm makes its channel the constant beta - gamma * mean / std,
# not 0; a filter's bias, where it has one, stays.
MODIFICATIONS = ("zero", "random-init", "random-noise")
COUNTS = ("n", "correct_before", "correct_after", "to_wrong", "to_right")
CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


@dataclass
class Variant:
    """A modified model: neurons, how (see `modified`), and the groups it is evaluated on (all)."""

    neurons: list
    how: str = "zero"
    sigma: float = 0.0
    seed: int = 0
    groups: tuple = None

    def applied(self, model, unit):
        return modified(model, self.neurons, self.how, self.sigma, self.seed, unit)


def prunable_layers(model):
    """The weights that hold neurons, {layer: parameter} in network order: of all convolutions, or
    of all linear layers where these hold more weights (transformers). The layers that give the
    logits, and normalisation, never. Raises BadInput if nothing is left."""
    heads, convolutions, linear = head_names(model), {}, {}
    for name, module in model.named_modules():
        if isinstance(module, CONVOLUTIONS) and name not in heads:
            convolutions[name] = module.weight
        if isinstance(module, torch.nn.Linear) and name not in heads:
            linear[name] = module.weight
        if isinstance(module, torch.nn.MultiheadAttention) and module.in_proj_weight is not None:
            linear[f"{name}.in_proj_weight"] = module.in_proj_weight
    layers = max(convolutions, linear, key=lambda found: sum(w.numel() for w in found.values()))
    if not layers:
        raise BadInput("this network has neither convolutions nor linear layers before its head")
    return layers


def count_neurons(model, unit="auto"):
    """The unit, 'channel' or 'weight' (auto: channel in convolutional networks, weight in
    transformers), and how many neurons each layer has, {layer: n}; prints both."""
    layers = prunable_layers(model)
    if unit == "auto":  # weights of convolutions alone have more than two dimensions
        unit = "channel" if next(iter(layers.values())).dim() > 2 else "weight"
    counts = {name: len(w) if unit == "channel" else w.numel() for name, w in layers.items()}
    share = sum(w.numel() for w in layers.values()) / sum(p.numel() for p in model.parameters())
    total = f"{sum(counts.values())} neurons ({unit}s) in {len(layers)} layers"
    print(f"{total}, which hold {100 * share:.1f} % of the network's weights")
    return unit, counts


def _norms(tensor, unit):
    """l2 norm of each neuron's part of a layer's weight or gradient, (n,)."""
    tensor = tensor.detach()
    return tensor.flatten(1).norm(dim=1) if unit == "channel" else tensor.abs().flatten()


def magnitude_scores(model, unit="channel"):
    """||z_i||_2 of section 2.1.1, {layer: (n,)}: the same for every group."""
    return {name: _norms(weight, unit) for name, weight in prunable_layers(model).items()}


def gradient_scores(model, batches, unit="channel"):
    """||v(i, j)||_2 of section 2.1.1, {layer: (n,)}: l2 norm, neuron by neuron, of the gradient of
    the mean cross entropy of the logits over batches (x, y, ...), those of group j. In eval mode;
    leaves no .grad and all modes as they were."""
    layers, n = prunable_layers(model), 0
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    # The same weights under another name, so that frozen ones have a gradient too
    z = {names[id(weight)]: weight.detach().requires_grad_() for weight in layers.values()}
    for weight in z.values():
        weight.grad = torch.zeros_like(weight)  # remains where eval mode skips a branch
    with evaluating(model), torch.enable_grad():
        for x, y, *_ in batches:
            x, y = on_device(model, x, y)
            logits = functional_call(model, z, (x,)).float()
            loss = F.cross_entropy(logits, y, reduction="sum")
            loss.backward(inputs=list(z.values()))  # adds up over batches
            n += len(y)
    if n == 0:
        raise BadInput("no image to take the gradient of")
    return {layer: _norms(v.grad / n, unit) for layer, v in zip(layers, z.values())}


def worst_images(logits, y, index, generator, highest=256, draw=128):
    """`draw` images at random of the `highest` with the LARGEST cross entropy among `index`
    (sections 2.2.1 and 4.1). logits (N, C), y (N,), index (n,) -> indices."""
    loss = F.cross_entropy(logits[index], y[index], reduction="none")
    worst = index[loss.topk(min(highest, len(index))).indices]
    return worst[torch.randperm(len(worst), generator=generator)[:draw]]


def top_neurons(scores, k):
    """The k neurons with the LARGEST scores over all layers, largest first; of equals the one in
    the earlier layer, then of the lower index. scores {layer: (n,)} -> list of (layer, index)."""
    flat = torch.cat(list(scores.values()))
    if not 1 <= k <= len(flat):
        raise BadInput(f"top {k} of {len(flat)} neurons: expected 1 to {len(flat)}")
    rounded = flat.detach().float()  # numpy has no bfloat16
    least = np.partition(rounded.cpu(), -k)[-k]  # takes a fifth of the time of topk on a CPU
    enough = (rounded >= float(least)).nonzero()[:, 0]
    best = enough[flat[enough].sort(descending=True, stable=True).indices[:k]]
    return locate(best.tolist(), {layer: len(values) for layer, values in scores.items()})


def locate(positions, counts):
    """Positions among the neurons of all layers, {layer: n}, as a list of (layer, index)."""
    names, starts = list(counts), np.cumsum([0, *counts.values()])
    layers = np.searchsorted(starts, positions, side="right") - 1
    indices = np.array(positions) - starts[layers]
    return [(names[layer], i) for layer, i in zip(layers.tolist(), indices.tolist())]


def neuron_masks(model, neurons, unit="channel"):
    """The mask m of section 2.1.1: {parameter name: bool tensor of its shape}, False at `neurons`;
    parameters without any are left out."""
    layers, chosen, masks = prunable_layers(model), {}, {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for layer, index in neurons:
        chosen.setdefault(layer, []).append(index)
    for layer, indices in chosen.items():
        weight = layers[layer]
        mask = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
        (mask if unit == "channel" else mask.view(-1))[indices] = False
        masks[names[id(weight)]] = mask
    return masks


@contextlib.contextmanager
def modified(model, neurons, how="zero", sigma=0.0, seed=0, unit="channel"):
    """Inside the `with`, neurons are zero, epsilon (random-init) or their weights + epsilon
    (random-noise), epsilon ~ N(0, sigma^2) drawn on the CPU in the order of `neurons`; after it the
    weights are what they were, bit for bit, whatever happened. Raises BadInput for noise of 0."""
    if how not in MODIFICATIONS or (how != "zero" and not sigma > 0):
        raise BadInput(f"{how} with sigma {sigma}: expected {', '.join(MODIFICATIONS)}, sigma > 0")
    layers, generator = prunable_layers(model), torch.Generator().manual_seed(seed)
    places = []
    for layer, index in neurons:
        weight = layers[layer].detach()
        places.append(weight[index if unit == "channel" else np.unravel_index(index, weight.shape)])
    before = [place.clone() for place in places]
    try:
        for place in places:
            if how != "random-noise":
                place.zero_()
            if how != "zero":
                place += sigma * torch.randn(place.shape, generator=generator).to(place.device)
        yield
    finally:
        for place, weights in zip(places, before):
            place.copy_(weights)


class _Fork(torch.fx.Interpreter):
    """One forward pass for all variants: in front of the first node that uses a weight which a
    variant changes, the rest is run for that variant; what lies before is computed once for all."""

    def __init__(self, traced, model, variants, unit):
        super().__init__(traced)
        self.model, self.unit, self.logits, self.waiting = model, unit, {}, {}
        layers = prunable_layers(model)  # by parameter, so that tied weights are right
        for number, variant in enumerate(variants):
            self.waiting[number] = {id(layers[layer]) for layer, _ in variant.neurons}, variant

    def run_node(self, node):
        used, rests = set(), self.module.rests
        if node.op in ("call_module", "get_attr"):
            part = attrgetter(node.target)(self.module)
            weights = part.parameters() if node.op == "call_module" else [part]
            used = {id(weight) for weight in weights}
        for number in [n for n, (changed, _) in self.waiting.items() if changed & used]:
            _, variant = self.waiting.pop(number)
            if node not in rests:  # as a module of its own, which is faster than node by node
                nodes = [*self.module.graph.nodes]
                nodes = nodes[nodes.index(node) : -1]  # the last one stands for the output
                rests[node] = fuse_as_graphmodule(self.module, nodes, "Rest")
            rest, inputs, outputs = rests[node]
            if not outputs:
                continue  # no logit needs this layer
            # Values are copied together, as layers may overwrite them and what shares their memory
            values = copy.deepcopy([self.env[earlier] for earlier in inputs])
            with variant.applied(self.model, self.unit):
                self.logits[number] = rest(*values)
        return super().run_node(node)


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, module, name):  # what has no parts need not be taken apart
        return not [*module.children()] or super().is_leaf_module(module, name)


def trace_graph(model, x):
    """The network as a torch.fx graph; None, with a warning, where that gives other logits."""
    with contextlib.suppress(Exception):  # tracing fails in as many ways as there are networks
        traced = torch.fx.GraphModule(model, _Tracer().trace(model))
        traced.rests = {}  # {node: the network from there on}
        if torch.equal(traced(x.clone()), model(x.clone())):  # clones: a network may overwrite x
            return traced
    warn("torch.fx cannot trace this network; every variant takes a full pass")
    return None


def logits_under(model, x, variants, unit="channel", traced=None):
    """Logits (B, C) of the model as it is, and a list of those under each variant, for images x
    (B, 3, H, W). traced: what trace_graph gave; without it every variant takes a full pass."""
    if traced:
        fork = _Fork(traced, model, variants, unit)
        whole = fork.run(x)
        return whole, [fork.logits.get(number, whole) for number in range(len(variants))]
    found = []
    for variant in variants:
        with variant.applied(model, unit):
            found.append(model(x.clone()))
    return model(x), found


def accuracy_under(model, batches, variants, unit="channel"):
    """Accuracy of many modified models over batches (x, y, g, ...): for every variant {group:
    counts of images, named by COUNTS}. Cheapest where a batch holds one group; memory does not
    grow with the number of variants."""
    counts, traced = [{} for _ in variants], None
    with evaluating(model), torch.inference_mode():
        for n, (x, y, g, *_) in enumerate(tqdm(batches, "trace", disable=None, leave=False)):
            x, y, g = on_device(model, x, y, g)
            traced = traced if n else trace_graph(model, x[:2])
            for j in g.unique().tolist():
                asked = [i for i, v in enumerate(variants) if v.groups is None or j in v.groups]
                some = [variants[i] for i in asked]
                whole, found = logits_under(model, x[g == j], some, unit, traced)
                right = torch.stack([whole, *found]).argmax(2) == y[g == j]  # (1 + V, B)
                before, after = right[:1].expand_as(right[1:]), right[1:]  # (V, B)
                images = (before | ~before, before, after, before & ~after, ~before & after)
                numbers = torch.stack(images).sum(2).T.tolist()  # V rows; a GPU is asked once
                for i, row in zip(asked, numbers):
                    old = counts[i].setdefault(j, dict.fromkeys(COUNTS, 0))
                    for key, number in zip(COUNTS, row):
                        old[key] += number
    return counts


def sample_groups(g, groups, most=None, whole=(), seed=0):
    """A list with the indices (n,) of at most `most` images (None: all) of each group, drawn
    without replacement; of the groups in `whole` always all. g (N,)."""
    generator, parts = torch.Generator().manual_seed(seed), []
    for group in groups:
        members = (g == group["group"]).nonzero()[:, 0]
        shuffled = members[torch.randperm(len(members), generator=generator)]
        parts.append((members if group["group"] in whole else shuffled[:most]).sort().values)
    return parts


# ------------------------------------------------------------------------------------------------
# 5. Runs: flags, folders, errors
# ------------------------------------------------------------------------------------------------

STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
STOP_SIGNALS = [getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)]
# Arguments that leave the results alone; data and start are compared by fingerprint instead
NOT_SETTINGS = {"run", "name", "data", "checkpoint", "device", "workers", "overwrite"}
NOT_SETTINGS |= {"keep_epochs", "deterministic"}


def make_parser(description, notes):
    """The parser of a stage, with the flags that all have; it refuses in one line, exit code 2."""
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=description, epilog=notes, formatter_class=form)
    p.allow_abbrev = False
    p.error = lambda message: p.exit(2, f"{p.prog}: error: {message}\n")
    shared = "folder shared by all stages (%(default)s)"
    p.add_argument("--run", type=Path, default="runs/synthetic", help=shared)
    g = p.add_argument_group("machine")
    there = torch.accelerator.is_available()
    device = torch.accelerator.current_accelerator().type if there else "cpu"
    g.add_argument("--device", default=device, help="cpu, cuda, mps, xpu (%(default)s)")
    cores = "to read images (cores, at most 8; built-in set 0, but on CUDA)"
    g.add_argument("--workers", type=int, help=cores)
    choices, half = ["fp32", "bf16"], "bf16: 16 bits in convolutions and matrix products (fp32)"
    g.add_argument("--precision", choices=choices, default="fp32", help=half)
    same = "same bytes again on CUDA too; slower, an error where impossible"
    g.add_argument("--deterministic", action="store_true", help=same)
    return p


def check_flags(args, *positive):
    """Raises BadInput unless the arguments named are positive (or left out) and seed and workers
    are possible."""
    for name in positive:
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise BadInput(f"--{name.replace('_', '-')} {value}: must be positive")
    for name, most in (("seed", 2**32 - 1), ("workers", 1000)):
        if not 0 <= getattr(args, name) <= most:
            raise BadInput(f"--{name} {getattr(args, name)}: must be 0 to {most}")


def machine(args):
    """Keeps freed memory (glibc) and sets what --deterministic asks for, in the whole process.
    Returns the context for a stage's main(): torch.autocast, on for bf16, without its cache of
    weights, as they change inside. Raises BadInput if --device is not there."""
    with contextlib.suppress(AttributeError, TypeError):  # only glibc has mallopt
        # Freed memory is kept, of large tensors too: to fetch it anew takes a fifth of a step
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: give nothing back
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a tensor
    torch.use_deterministic_algorithms(args.deterministic)
    if args.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it cuBLAS refuses
    half = args.precision == "bf16"
    try:
        device = torch.empty(0, device=args.device).device.type
        return torch.autocast(device, torch.bfloat16, enabled=half, cache_enabled=False)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        reason = str(error).splitlines()[0]
        raise BadInput(f"--device {args.device}: {reason}; use cpu or what is there") from error


def bf16_gain(device):
    """How much faster a convolution is in bf16 on this device, by trying."""
    seconds = []
    n = 8 if device.startswith("cpu") else 256  # small kernels would hide what a GPU gains
    for dtype in (torch.float32, torch.bfloat16):
        kind = {"dtype": dtype, "device": device}
        x = torch.ones(n, 64, 64, 64, **kind).to(memory_format=torch.channels_last)
        weight = torch.ones(64, 64, 3, 3, **kind).to(memory_format=torch.channels_last)
        for _ in range(3):  # the first one is slow
            started = time.perf_counter()
            F.conv2d(x, weight).sum().item()
            last = time.perf_counter() - started
        seconds.append(last)
    return seconds[0] / seconds[1]


def check_finite(loss, model, epoch, lr):
    """The loss () as a float. Raises BadInput if it or a weight is no longer a finite number."""
    if not (loss.isfinite() and all(v.isfinite().all() for v in model.state_dict().values())):
        kept = "epochs finished before are kept"
        raise BadInput(f"training diverged in epoch {epoch}; try an --lr below {lr}; {kept}")
    return loss.item()


def fill_defaults(args, table, **defaults):
    """Give arguments that were left out (None) their default, and print all of them and whether
    bf16 would gain. Of --workers it is the cores at hand, at most 8; 0 for the built-in set, which
    lies in memory, but on CUDA, where one core augments it slower than a step takes."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    alone = table.source == "synthetic" and not args.device.startswith("cuda")
    defaults["workers"] = 0 if alone else min(8, len(cores))
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    settings = " ".join(f"{key}={value}" for key, value in plain(args).items())
    if args.precision == "fp32" and bf16_gain(args.device) > 1.4:
        settings += " (--precision bf16 is faster here)"
    print(settings)


def plain(args):
    """An argparse namespace as a dict of plain types, for JSON and checkpoints."""
    return json.loads(json.dumps(vars(args), default=str))


def read_json(path):
    """What a JSON file of a run folder holds. Raises BadInput."""
    with reading(path, "it should be JSON that this project wrote; run its stage again"):
        content = json.loads(Path(path).read_text())
        return dict(content.items())  # raises where it is a list


def write_json(path, content):
    """A number that is not finite raises ValueError instead of becoming NaN."""
    write(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_csv(path, rows):
    """Rows, one or more dicts with the same keys, as csv with a header."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    write(path, text.getvalue())


def save_figure(fig, path, dpi=120):
    """Write a matplotlib Figure, in the format that the file's ending names."""
    buffer = io.BytesIO()
    fig.savefig(buffer, dpi=dpi, format=Path(path).suffix[1:])
    write(path, buffer.getvalue())


def _beside(folder, what):
    folder = Path(os.path.realpath(folder))  # a link is written through, not replaced
    return folder.with_name(f".{folder.name}.{what}")


LITTER = (".DS_Store", ".nfs*")  # of macOS; of NFS, where a file is replaced while it is read


def check_folder(folder, names):
    """Raises BadInput if a stage's folder holds anything but LITTER and what this stage writes
    (`names`, file patterns), as it may be emptied. Before, undoes what a kill left half-done."""
    old = _beside(folder, "old")
    if old.exists() and not folder.exists():
        old.rename(os.path.realpath(folder))
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(_beside(folder, "new"), ignore_errors=True)
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file; move it away or choose another --run")
    found = sorted(folder.iterdir()) if folder.exists() else []
    found = [path for path in found if not any(map(path.match, LITTER))]
    for path in found:
        unfinished = re.fullmatch(r"\.(.*)\.new", path.name)  # what `write` was writing
        file = unfinished[1] if unfinished else path.name
        if not any(fnmatch.fnmatch(file, name) for name in names):
            raise BadInput(f"{path} is not of this stage; move it away or choose another --run")
        if unfinished:
            path.unlink()
    if any(path.exists() for path in found) and "stage" not in read_json(folder / "args.json"):
        raise BadInput(f"{folder}/args.json is not of this project; choose another --run")


def new_folder(folder, args, names, **inputs):
    """After check_folder, an empty folder beside `folder`, to be filled and put in its place by
    replace_folder. Holds args.json: every resolved argument, fingerprints of the inputs, command,
    versions and, in a git checkout, its commit."""
    check_folder(folder, names)
    new, commit = _beside(folder, "new"), None
    new.mkdir(parents=True)
    if shutil.which("git"):
        git = ["git", "-C", Path(__file__).resolve().parent, "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    versions = {m.__name__: m.__version__ for m in (torch, torchvision, timm)}
    content = {"stage": folder.name, "args": plain(args), "inputs": inputs, **versions}
    content |= {"command": shlex.join(sys.argv), "commit": commit or None}
    content |= {"python": platform.python_version(), "machine": platform.machine()}
    write_json(new / "args.json", content)
    return new


def replace_folder(new, folder):
    """Put `new` in the place of `folder`; after a kill one of the two is there, whole."""
    folder, old = Path(os.path.realpath(folder)), _beside(folder, "old")
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def start_or_continue(folder, args, names, **inputs):
    """(last, results) of a training stage, what last.pt and results.json hold: both if the run is
    finished, (last, None) if it can go on, (None, None) if it starts, in a folder with
    args.json. Raises BadInput if settings or inputs differ from those of the run in the folder."""
    check_folder(folder, names)
    results = folder / "results.json"
    begun = results.exists() or any(folder.glob("*.pt"))
    if args.overwrite or not begun:  # else there is something that would be missed
        replace_folder(new_folder(folder, args, names, **inputs), folder)
        return None, None
    before, now = read_json(folder / "args.json"), plain(args)
    changed = []
    with reading(folder / "args.json", "use --overwrite or another --run"):
        for key in now:
            old = before["args"].get(key, "unknown")
            longer = key == "epochs" and now[key] > old
            if key not in NOT_SETTINGS and old != now[key] and not longer:
                changed.append(f"{key} {old}, now {now[key]}")
        changed += [f"the {key} changed" for key in inputs if before["inputs"][key] != inputs[key]]
    if changed:
        what = f"is of a run with other settings ({'; '.join(changed[:4])})"
        raise BadInput(f"{folder}/args.json {what}; use another folder or --overwrite")
    last = None  # after a kill in the first epoch
    if (folder / "last.pt").exists() or results.exists():
        last = load_checkpoint(folder / "last.pt")
    if last is None or last["epoch"] < now["epochs"]:
        results.unlink(missing_ok=True)
        write_json(folder / "args.json", {**before, "args": now})
    if not results.exists():
        return last, None
    print(f"{folder} is finished; --overwrite starts anew")
    return last, read_json(results)


@contextlib.contextmanager
def script(folder, afterwards="the same command continues"):
    """Around a script's main(): one process a folder; errors in one line and exit code 2; after
    SIGINT, SIGTERM and SIGHUP one line on what to do, and exit code 130, 143, 129."""
    program, folder = Path(sys.argv[0]).name, Path(os.path.realpath(folder))
    received = []  # signals
    matplotlib.rcParams["text.parse_math"] = False  # a name may hold two $
    warnings.simplefilter("ignore")  # what the user should know, we say
    logging.disable(logging.WARNING)
    sys.unraisablehook = lambda _: None  # a dead worker is reported from every corner, once by us
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as SIGHUP is under nohup
            signal.signal(number, functools.partial(_stop, received))
    try:
        with _locked(folder):
            yield
            sys.stdout.flush()
    except BrokenPipeError:  # ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except (Stopped, Exception) as error:
        if received:  # libraries in C may have made something else of Stopped
            said = f"stopped by {received[0].name}; {afterwards}: python {shlex.join(sys.argv)}"
            print(f"\n{program}: {said}", file=sys.stderr)
            raise SystemExit(128 + received[0]) from None
        message = _in_one_line(error, folder)
        if message is None:  # a fault of ours: its traceback tells where
            raise
        print(f"{program}: error: {message}", file=sys.stderr)
        raise SystemExit(2) from None


def _stop(received, number, _):
    received.append(signal.Signals(number))
    for other in STOP_SIGNALS:  # the first one is enough
        signal.signal(other, signal.SIG_IGN)
    if hasattr(signal, "SIGCHLD"):  # that workers end as well is no error now
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    raise Stopped


@contextlib.contextmanager
def _locked(folder):
    lock, owner, there = folder.parent / f".{folder.name}.lock", "", folder.parent.exists()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        owner = lock.read_text()
    try:
        with filelock.FileLock(lock, timeout=8):  # workers of a killed run take seconds to end
            try:
                lock.write_text(f"{os.getpid()} on {platform.node()}")
                yield
            finally:
                shutil.rmtree(_beside(folder, "new"), ignore_errors=True)
                lock.unlink(missing_ok=True)
                if not there:
                    with contextlib.suppress(OSError):
                        folder.parent.rmdir()  # only if it is empty
    except filelock.Timeout as error:
        used = f"{folder} is in use by process {owner}; wait for it or choose another --run"
        raise BadInput(used) from error


def _in_one_line(error, folder):
    if isinstance(error, BadInput):
        return " ".join(str(error).split())
    if isinstance(error, OSError):
        return f"{error.filename or folder}: {error.strerror or error}"
    limits = "out of memory|can't allocate|DataLoader worker|deterministic"
    if not isinstance(error, RuntimeError) or not re.search(limits, str(error)):
        return None
    reason = str(error).splitlines()[0][:160].rstrip(". ")
    advice = "without --deterministic" if "deterministic" in reason else "a smaller --batch-size"
    return f"{reason}; try {advice} or --workers 0"
