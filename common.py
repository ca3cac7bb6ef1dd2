"""What the scripts share: data, models and checkpoints, evaluation, neurons and masks, runs.

Plain functions on tensors, in the order in which data flows. Nothing runs at import, and the file
needs no other of this project (but for the weights of resnet10): copy it and call what you need.
Sections, equations, tables and figures named here are those of the paper, "Uncovering Memorization
Effect in the Presence of Spurious Correlations" (You, Dai, Min et al.).
"""

import argparse
import contextlib
import copy
import csv
import ctypes
import errno
import hashlib
import inspect
import io
import json
import math
import multiprocessing
import multiprocessing.queues
import operator
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import unicodedata
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import safetensors.torch
import timm
import torch
import torchvision
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2
from tqdm import tqdm

try:
    import fcntl
    import resource
except ImportError:  # Windows has neither, so nothing is locked there
    fcntl = resource = None


class BadInput(ValueError):
    """What the user gave cannot be used. One line: what is wrong, where, what to do."""


def warn(message):
    """Say something on stderr that the user should know but that does not stop the run."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def reading(path, advice):
    """Around what reads a file of the user's or takes a name from them: whatever goes wrong inside
    becomes one BadInput that names the file and says what to do. Not for code of our own, whose
    faults should show a traceback."""
    try:
        if Path(path).is_fifo():  # to read it would wait for ever
            raise BadInput(f"{path}: not a file; {advice}")
        yield
    except BadInput:
        raise
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such file; {advice}") from error
    except (PermissionError, IsADirectoryError) as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise  # too many open files, for which this one cannot be blamed
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise BadInput(f"{path}: cannot be used ({reason}); {advice}") from error


# ------------------------------------------------------------------------------------------------
# 1. Data: labels, images, batches
# ------------------------------------------------------------------------------------------------

BIRDS = Path(__file__).resolve().parent / "data/birds"  # the built-in set, drawn by data/birds.py
SPLITS = ("train", "val", "test")
SPLIT_WORDS = {"0": 0, "1": 1, "2": 2, "train": 0, "val": 1, "valid": 1, "validation": 1, "test": 2}
# Waterbirds (Sagawa et al. 2020) is known by its images per group in train, val and test
WATERBIRDS = [[3498, 184, 56, 1057], [467, 466, 133, 133], [2255, 2255, 642, 642]]
CELEBA = ("Blond_Hair", "Male")  # and CelebA (Liu et al. 2015) by its columns
CELEBA_LISTS = ("list_attr_celeba", "list_eval_partition")  # in which they are, txt or csv
# Where images lie, seen from the labels, in the layouts in which the two sets circulate
IMAGE_FOLDERS = [
    "",
    "waterbird_complete95_forest2water2",
    "waterbirds/waterbird_complete95_forest2water2",
    "img_align_celeba",
    "img_align_celeba/img_align_celeba",
    "Img/img_align_celeba",
    "celeba/img_align_celeba",
    "celeba/img_align_celeba/img_align_celeba",
]


@dataclass
class Table:
    """The labels of all N images. y: class; a: spurious attribute; g: group, y * n_attributes + a;
    split: index into SPLITS; each an int64 array (N,). files: paths relative to root."""

    source: str  # the file that holds the labels
    root: Path
    files: list
    y: np.ndarray
    a: np.ndarray
    g: np.ndarray
    split: np.ndarray
    classes: list  # names
    groups: list  # a dict per group: group, name, train_n, minority

    def fingerprint(self, *splits):
        """A hash of labels and file names of these splits, by which a change is noticed. The folder
        that all files have in common is left out, so the data may move as a whole."""
        rows = zip(self.files, self.y.tolist(), self.a.tolist(), self.split.tolist(), strict=True)
        rows = [row for row in rows if SPLITS[row[-1]] in splits]
        above = len(os.path.commonpath([os.path.dirname(file) for file, *_ in rows]))
        known = []
        for file, *labels in rows:
            known.append([unicodedata.normalize("NFC", file[above:].lstrip("/")), *labels])
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]

    def fingerprint_of_images(self, *splits):
        """A hash of some 20 image files of these splits, by which other images under the same names
        are noticed; a single one that was replaced is not. None if one of them is missing."""
        rows = np.flatnonzero(np.isin(self.split, [SPLITS.index(split) for split in splits]))
        digest = hashlib.sha256()
        for row in rows[:: math.ceil(len(rows) / 20)]:
            path = find_file(self.root, self.files[row])
            if path is None:
                return None
            with reading(path, "replace it, or take its row out of the metadata"):
                digest.update(path.read_bytes())
        return digest.hexdigest()[:16]


def is_built_in(table):
    """Whether the table is that of the built-in set."""
    return os.path.realpath(table.source) == os.path.realpath(BIRDS / "metadata.csv")


def read_table(data, attributes=None):
    """The labels of a data set, recognised by content: a metadata csv (or the folder that holds
    one), or a folder with CelebA's attribute and partition lists. attributes: the columns of class
    and spurious attribute, by default y and place (or a), in CelebA's lists Blond_Hair and Male.
    Raises BadInput."""
    path = Path(data).absolute()
    if not path.exists():
        raise BadInput(f"{data}: no such file or folder; --data names where the labels are")
    if path.stem in CELEBA_LISTS:
        return read_celeba(path.parent, attributes or CELEBA)
    tables = sorted(path.glob("metadata*.csv")) if path.is_dir() else [path]
    if len(tables) > 1:
        raise BadInput(f"{path} holds {len(tables)} metadata*.csv; name one")
    if not tables:
        return read_celeba(path, attributes or CELEBA)
    y, place = attributes or ("y", "place|a")
    titles, columns = read_columns(tables[0], "img_filename|filename", y, place, "split")
    return make_table(tables[0], tables[0].parent, *columns, titles[1:3])


def read_celeba(folder, attributes=CELEBA):
    """The labels of CelebA from its two lists, txt or csv, joined by file name and never by the
    order of rows. Raises BadInput."""
    labels, partition = (find_list(folder, stem) for stem in CELEBA_LISTS)
    titles, (files, y, a) = read_columns(labels, "image_id", *attributes)
    _, (ids, parts) = read_columns(partition, "image_id", "partition")
    split_of = dict(zip(ids, parts, strict=True))
    if len(split_of) < len(ids):
        raise BadInput(
            f"{partition}: {len(ids) - len(split_of)} rows repeat an image; keep one of each"
        )
    alone = sorted(split_of.keys() ^ set(files))
    if alone:
        raise BadInput(
            f"{labels} and {partition.name} do not join: {len(alone)} images are in one of them "
            f"only ({', '.join(alone[:3])}); take both from one source"
        )
    return make_table(labels, folder, files, y, a, [split_of[file] for file in files], titles[1:])


def find_list(folder, stem):
    """One of CelebA's two lists, in the folder or one below it. Raises BadInput."""
    for pattern in (f"{stem}.*", f"*/{stem}.*"):
        found = [path for path in sorted(folder.glob(pattern)) if path.suffix in (".txt", ".csv")]
        if len(found) > 1:
            raise BadInput(
                f"{folder} holds {len(found)} lists {stem}; keep one, or name the folder of one"
            )
        if found:
            return found[0]
    raise BadInput(
        f"{folder} holds no {stem}.txt or .csv, nor a metadata*.csv; name the folder that does, or "
        "see the README"
    )


def read_columns(path, *wanted):
    """Columns of a csv, or of one of CelebA's txt lists: their titles in the header, and for each
    its cells, a list of str. wanted: their names in upper or lower case, or 'name|other' where it
    may be either. Raises BadInput."""
    with (
        reading(
            path, "expected UTF-8 text, a header and rows; is it cut off, or a quote left open?"
        ),
        open(path, encoding="utf-8-sig") as file,
    ):
        lines = file.readlines()
        while lines and (not lines[0].strip() or lines[0].startswith("sep=")):  # as of Excel
            lines.pop(0)
        if not lines:
            raise BadInput(f"{path}: it is empty")
        if path.name == "list_eval_partition.txt":  # has no header
            rows = map(str.split, ["image_id partition", *lines])
        elif path.name == "list_attr_celeba.txt":  # begins with the number of rows
            rows = map(str.split, [f"image_id {lines[1]}", *lines[2:]])
        else:
            rows = csv.reader(
                lines,
                delimiter=max(",;\t", key=lines[0].count),
                skipinitialspace=True,
                strict=True,
            )
        header = [title.strip() for title in next(rows)]
        places = [find_column(path, header, name) for name in wanted]
        titles = [header[place] for place in places]
        found = []
        for row in rows:
            if not "".join(row).strip():
                continue
            if len(row) != len(header):
                raise BadInput(
                    f"{path}: every row needs {len(header)} cells, as the header has; the first "
                    f"that has not is '{','.join(row)[:80]}'"
                )
            found.append([row[place].strip().strip("\u200b\ufeff") for place in places])
            if "" in found[-1]:
                raise BadInput(
                    f"{path}: {titles[found[-1].index('')]} is empty in row {len(found)}; fill it "
                    "or take the row out"
                )
    if not found:
        raise BadInput(f"{path}: it holds no rows")
    return titles, [*zip(*found, strict=True)]


def find_column(path, header, name):
    """Place of a column in the header. Raises BadInput unless there is one and only one."""
    lower = [title.lower() for title in header]
    for title in name.split("|"):
        for titles, wanted in ((header, title), (lower, title.lower())):
            n = titles.count(wanted)
            if n > 1:
                raise BadInput(f"{path}: {n} columns are called {title}; rename one")
            if n:
                return titles.index(wanted)
    raise BadInput(
        f"{path}: no column {name.replace('|', ' or ')} in the header {', '.join(header)[:200]}; "
        "rename one, or, of class and attribute, name it by --attributes Y A"
    )


def number_values(values, label):
    """A column of classes or attributes -> int64 (N,) and the names of its values, numbered from 0:
    whole numbers by size, so that -1 and 1, or 0.0 and 1.0, become 0 and 1; then words by the
    alphabet. Anything else that two cells spell differently, such as 0506 and 506, is different."""
    keys = {}  # of each spelling: what it is sorted by
    for text in set(values):
        word = unicodedata.normalize("NFC", str(text))
        number = re.fullmatch(r"(-?(?:0|[1-9]\d{0,17}))(?:\.0*)?", word)
        keys[text] = (0, int(number[1]), "") if number else (1, 0, word)
    ordered = sorted(set(keys.values()))
    codes = {key: code for code, key in enumerate(ordered)}
    names = []
    for _, number, word in ordered:
        names.append(word if word[:1].isalpha() else f"{label}={word or number}")
    return np.array([codes[keys[text]] for text in values], dtype=np.int64), names


def make_table(source, folder, files, y, a, split, labels=("y", "a")):
    """The Table of N images, from lists of length N: files (relative to folder or to the working
    directory, or absolute), y, a and split (words or numbers); labels: what y and a are called.
    source: the file that they come from, or a name by which read_table knows them. Raises
    BadInput."""
    parts = [SPLIT_WORDS.get(str(word).lower().removesuffix(".0")) for word in split]
    if None in parts:
        row = parts.index(None)
        raise BadInput(
            f"{source}: split of {files[row]} is {split[row]}; expected 0, 1, 2 or train, val, test"
        )
    y, classes = number_values(y, labels[0])
    a, places = number_values(a, labels[1])
    if len(classes) < 2 or len(places) < 2:
        raise BadInput(
            f"{source}: needs two or more of classes and of attributes; {labels[0]} has "
            f"{len(classes)}, {labels[1]} has {len(places)}"
        )
    g = y * len(places) + a
    split = np.array(parts)
    n = len(classes) * len(places)
    counts = np.bincount(split * n + g, minlength=3 * n).reshape(3, n).tolist()

    # Numbers get the names of a known set
    numbers = "=" in classes[0] and "=" in places[0]
    if numbers and counts == WATERBIRDS:
        classes = ["landbird", "waterbird"]
        places = ["on land", "on water"]
    elif numbers and tuple(labels) == CELEBA and len(classes) == len(places) == 2:
        classes = ["non-blond", "blond"]
        places = ["woman", "man"]

    groups = describe_groups(classes, places, counts[0])
    for name, n in zip(SPLITS, counts, strict=True):
        empty = [group["name"] for group in groups if n[group["group"]] == 0]
        if sum(n) == 0 or (empty and name == "train"):
            raise BadInput(
                f"{source}: needs each pair of class and attribute in training, and three splits; "
                f"{name} has no image of {', '.join(empty)[:200]}"
            )
        if empty:
            warn(f"{source}: {name} has no image of {', '.join(empty)}, so no accuracy of it")
    folders = (folder, Path(source).parent, Path(source).resolve().parent)
    root, files = locate_images(folders, files)
    repeats = len(files) - len(set(zip(files, split.tolist(), g.tolist(), strict=True)))
    if repeats:
        warn(f"{source}: {repeats} rows stand in it twice, and their images count twice")
    for word, values in (("split", split), ("class", y), ("attribute", a)):
        twice = len(set(zip(files, values.tolist(), strict=True))) - len(set(files))
        if twice:
            warn(f"{source}: {twice} images stand in more than one {word}")
    return Table(str(source), root, files, y, a, g, split, classes, groups)


def locate_images(folders, files):
    """Where the images lie: the folder to which all files are relative, and the files in it. It is
    looked for in the folders, then in the working directory. Where there are full paths, or such
    that lead out of that folder, it is the one that all have in common."""
    folders = [*dict.fromkeys(Path(folder).absolute() for folder in folders)]
    files = [os.path.normpath(str(file).replace("\\", "/")) for file in files]
    relative = [file for file in files if not os.path.isabs(file)]
    some = relative[:: math.ceil(len(files) / 20)]  # one that is missing must not lead elsewhere
    found = folders[0]
    for root in (*(folder / name for folder in folders for name in IMAGE_FOLDERS), Path.cwd()):
        if any(find_file(root, file) for file in some):
            found = root
            break
    if len(relative) == len(files) and not any(file.startswith("..") for file in files):
        return found, files
    found = found.resolve()  # as ".." leads out of the folder that a link points to
    paths = [os.path.normpath(found / file) for file in files]
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    return Path(root), [os.path.relpath(path, root) for path in paths]


def find_file(root, file):
    """The path of a file below root, or None. Letters with accents have two spellings in Unicode,
    and a Mac's disk may have the one, the labels the other."""
    for name in (file, unicodedata.normalize("NFC", file), unicodedata.normalize("NFD", file)):
        if (root / name).is_file():
            return root / name
    return None


def describe_groups(classes, attributes, train_counts):
    """A dict per group: group, name, train_n, minority. A minority group has fewer than half the
    training images of the largest group of its class: G1 and G2 of Waterbirds, G3 of CelebA."""
    groups = []
    for y, name in enumerate(classes):
        of_class = train_counts[y * len(attributes) :][: len(attributes)]
        for a, (attribute, n) in enumerate(zip(attributes, of_class, strict=True)):
            groups.append(
                {
                    "group": y * len(attributes) + a,
                    "name": f"{name} {attribute}",
                    "train_n": n,
                    "minority": 2 * n < max(of_class),
                }
            )
    return groups


def read_image(path):
    """An image file as RGB. Raises BadInput for what is no image of 8 bits."""
    with (
        reading(path, "replace it, or take its row out of the metadata"),
        Image.open(path) as image,
    ):
        # PIL cuts grey values off at 255, and of colours it takes the upper 8 bits
        bits = np.max(getattr(image, "tag_v2", {}).get(258, 8))  # of each colour of a TIFF
        largest = max((tile[3][-1] for tile in image.tile if tile[0] == "ppm"), default=255)
        if (
            image.mode[0] in "IF"
            or bits > 8
            or largest > 255
            or re.search(";16[BLN]", str(image.tile))
        ):
            raise BadInput(f"{path}: has more than 8 bits a pixel and colour; convert it to 8")
        return image.convert("RGB")


def make_transform(size, augment="none"):
    """What happens to a picture before it is normalised: Table 1 ('table1'), its first two rows,
    which are all that the released code uses ('crop-flip'), or, for evaluation ('none'), resize to
    256 x 256 and centre crop 224, as is usual for Waterbirds, in proportion for other sizes."""
    if augment == "none":
        side = round(size * 256 / 224)
        steps = [v2.Resize((side, side)), v2.CenterCrop(size)]
    else:
        steps = [
            v2.RandomResizedCrop(size, scale=(0.7, 1.0), ratio=(0.75, 1.33)),
            v2.RandomHorizontalFlip(p=0.5),
        ]
    if augment == "table1":
        steps += [
            v2.RandomRotation(degrees=15),
            v2.RandomAffine(degrees=0, translate=(0.1, 0.1), scale=(0.9, 1.1)),  # Table 1: "ratio"
            v2.RandomPerspective(distortion_scale=0.2),
        ]
    return v2.Compose([*steps, v2.PILToTensor()])


def seed_of(*numbers):
    """One seed from several numbers. All that is random follows from (seed, epoch, image, view)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class Images(Dataset):
    """One split. images[i], or images[epoch, i] in training, gives (x, y, g, i): x uint8 (3, S, S),
    or (V, 3, S, S) for V > 1 views. What is random in view v of image i depends on
    (seed, epoch, i, v) alone: not on workers, nor on what was drawn before. mean and std (3,):
    those of the network, by which Batches normalises."""

    def __init__(self, table, split, size, mean, std, augment="none", views=1, seed=0):
        rows = np.flatnonzero(table.split == SPLITS.index(split))
        self.files = [table.files[row] for row in rows]
        self.paths = [find_file(table.root, file) for file in self.files]
        if None in self.paths:
            raise BadInput(
                f"{table.root}: {self.paths.count(None)} of {len(rows)} {split} images are missing "
                f"({self.files[self.paths.index(None)]}); was the archive unpacked completely, and "
                "are names relative to the csv or to this working directory?"
            )
        self.y = torch.from_numpy(table.y[rows])
        self.g = torch.from_numpy(table.g[rows])
        self.mean = mean
        self.std = std
        self.size = size
        self.transform = make_transform(size, augment)
        self.views = views
        self.seed = seed
        # In evaluation the pixels are always the same. They are kept where they fill less than an
        # eighth of the memory, as there are three such splits. A worker keeps those of its batches.
        self.keeps = (
            augment == "none"
            and views == 1
            and len(rows) * 3 * size**2 < min(4e9, memory_limit() / 8)
        )
        self.kept = {}

    def __len__(self):
        return len(self.files)

    def __getitem__(self, key):
        epoch, i = key if isinstance(key, tuple) else (0, int(key))
        x = self.kept.get(i)
        if x is None:
            picture = read_image(self.paths[i])
            views = []
            with torch.random.fork_rng(devices=[]):
                for view in range(self.views):
                    # Of the CPU alone: torch.manual_seed would seed the GPU's dropout as well
                    torch.default_generator.manual_seed(seed_of(self.seed, epoch, i, view))
                    views.append(self.transform(picture))
            x = views[0] if self.views == 1 else torch.stack(views)
            # Only in evaluation (epoch 0): in training every worker would come to keep all images
            if self.keeps and epoch == 0:
                self.kept[i] = x
        return x, int(self.y[i]), int(self.g[i]), i


def memory_limit():
    """Bytes of memory that this job may use: the machine's, or less where a cgroup (Slurm, docker)
    or ulimit says so."""
    limits = [8e9]  # where nothing can be found out
    with contextlib.suppress(AttributeError, ValueError, OSError):
        limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    if resource:
        limits.append(resource.getrlimit(resource.RLIMIT_AS)[0])  # -1: none
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            group = Path("/sys/fs/cgroup", "memory" if controllers else "", path.lstrip("/"))
            for folder in (group, *group.parents):
                for name in ("memory.max", "memory.limit_in_bytes"):
                    with contextlib.suppress(OSError, ValueError):  # "max" is no number
                        limits.append(int((folder / name).read_text()))
    return min(limit for limit in limits if limit > 0)


class EpochOrder(Sampler):
    """Batches of an epoch, in an order drawn from (seed, epoch): lists of (epoch, i). Set `epoch`
    before each pass. A last batch of one image, which BatchNorm cannot take, is left out."""

    def __init__(self, n, batch_size, seed):
        self.n = n
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self):
        return self.n // self.batch_size + (self.n % self.batch_size > 1)

    def __iter__(self):
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        order = torch.randperm(self.n, generator=generator)
        for batch in order.split(self.batch_size)[: len(self)]:
            yield [(self.epoch, i) for i in batch.tolist()]


class Batches:
    """Batches (x, y, g, index) of Images, on the device: x (B, 3, S, S) float and normalised as the
    network takes it, or (B, V, 3, S, S) for V views; y, g and index (B,). Which images: by default
    all, as they are stored; those of index (n,); or those of an order, an EpochOrder or lists of
    indices."""

    def __init__(self, images, device="cpu", batch_size=128, workers=0, index=None, order=None):
        if order is None:
            index = range(len(images)) if index is None else index.tolist()
            order = [index[i : i + batch_size] for i in range(0, len(index), batch_size)]
        if workers and len(tempfile.gettempdir()) > 60:
            tempfile.tempdir = "/tmp"  # workers make sockets there, whose paths must be short
        self.images = images
        self.order = order
        self.workers = workers
        self.device = torch.device(device)
        self.mean = torch.tensor(images.mean, device=device)
        self.std = torch.tensor(images.std, device=device)
        self.loader = DataLoader(
            images,
            batch_sampler=order,
            num_workers=workers,
            persistent_workers=workers > 0,  # new ones would take seconds an epoch
            pin_memory=self.device.type == "cuda",
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # its own: else it would draw from dropout's
        )

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        try:
            for batch in self.loader:
                # Bytes travel, as numbers would take four times as long; on CUDA without waiting:
                # other devices might copy what is overwritten meanwhile
                x, *labels = (
                    tensor.to(self.device, non_blocking=self.loader.pin_memory) for tensor in batch
                )
                yield normalise(x, self.mean, self.std), *labels
        except BadInput as error:  # of a worker, with a whole traceback in front
            raise BadInput(str(error).rpartition("BadInput: ")[2].strip()) from error
        except (OSError, EOFError) as error:
            raise BadInput(
                f"--workers {self.workers}: a worker process cannot be started, or has ended "
                f"({error}); try --workers 0"
            ) from error


def normalise(x, mean, std):
    """Pixels uint8 (..., 3, H, W) as a network takes them: scaled to [0, 1], then by mean and std
    (3,)."""
    x = v2.functional.to_dtype(x, torch.float32, scale=True)
    return v2.functional.normalize(x, mean, std, inplace=True)


def start_worker(_):
    """What a worker process of a DataLoader does first: it leaves it to the script to report
    signals and errors, and ends if the script was killed meanwhile, or if it cannot hand over a
    batch, for which the script would wait for ever."""
    sys.excepthook = lambda *_: None
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(lambda *_: os._exit(1))
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as of a command in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if not multiprocessing.parent_process().is_alive():
        os._exit(1)


def sample_groups(g, groups, most=None, whole=False, seed=0):
    """A list with the indices (n,) of at most `most` images (None: all) of each group, drawn
    without replacement; with `whole`, always all images of minority groups. g (N,)."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for group in groups:
        members = (g == group["group"]).nonzero()[:, 0]
        drawn = torch.randperm(len(members), generator=generator)
        if not (whole and group["minority"]):
            drawn = drawn[:most]
        parts.append(members[drawn.sort().values])
    return parts


# ------------------------------------------------------------------------------------------------
# 2. Models and checkpoints
# ------------------------------------------------------------------------------------------------

# resnet50: torchvision's IMAGENET1K_V2, as in the paper; resnet10: one block a stage and half as
# wide, but for its first convolution
ARCHS = {"resnet50": "resnet50.tv2_in1k", "resnet10": "resnet18"}
RESNET10 = {"layers": (1, 1, 1, 1), "channels": (32, 64, 128, 256), "zero_init_last": False}
BIRD_WEIGHTS = BIRDS.parent / "resnet10_birds.pth"  # learned by data/birds.py


def build_model(arch, n_classes, size, weights="none"):
    """A network with logits (B, n_classes) for images (B, 3, size, size), in eval mode: any timm
    name, resnet50 as in the paper, or resnet10, a ResNet with one basic block a stage for the
    built-in set. weights: 'default' (published ones), 'none' or a file; the head is always new. The
    network's mean and std stand in its pretrained_cfg. Raises BadInput."""
    name = ARCHS.get(arch, arch.removeprefix("timm/"))
    if arch == "resnet10" and weights == "default":
        weights = BIRD_WEIGHTS
    options = RESNET10 if arch == "resnet10" else {}
    with reading(f"--arch {arch}", f"expected a network of timm that takes --size {size}"):
        if ":" in name:
            raise ValueError("it is fetched from elsewhere")
        config = timm.get_pretrained_cfg(name)
        if config and config.fixed_input_size:
            options = {**options, "img_size": size}
        try:
            model = timm.create_model(
                name, num_classes=n_classes, pretrained=weights == "default", **options
            )
        except OSError as error:  # what the hub raises
            hub = getattr(config, "hf_hub_id", None) or name
            raise BadInput(
                f"--weights default: {name} cannot be fetched; bring model.safetensors of {hub} "
                "and give it as --weights FILE, or use --weights none"
            ) from error
        for head in head_names(model):  # some of timm's start where they take epochs to recover
            model.get_submodule(head).reset_parameters()
        with evaluating(model), torch.inference_mode():
            logits = model(torch.zeros(2, 3, size, size))
        if not torch.is_tensor(logits) or logits.shape != (2, n_classes):
            raise ValueError("two images do not give logits of shape (2, n_classes)")
    check_patches(model, arch, size)
    if weights not in ("default", "none"):
        load_body(model, weights)
    return model.eval()


def check_patches(model, arch, size):
    """Raises BadInput if the network cuts its input into patches and rows are left over, as those
    would change no logit."""
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.in_channels == 3:
            stride = module.stride[0]
            padding = module.padding[0]
            left = (size + 2 * padding - module.kernel_size[0]) % stride - padding
            if left > 1:  # one is lost to many convolutions of stride 2
                raise BadInput(
                    f"--size {size}: {arch} cuts images into patches and would not see the last "
                    f"{left} rows; sizes that fit are {size - left} and {size - left + stride}"
                )
            return


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
        if str(path).lower().endswith(".safetensors"):
            state = safetensors.torch.load_file(path)
        else:
            state = load_tensors(path)
        for wrapper in ("state_dict", "model_state_dict", "model"):
            state = state.get(wrapper, state)
        state = timm.models.clean_state_dict(state)  # of what wrappers put in front of names
        first = {name.partition(".")[0] for name in state}
        if len(first) == 1 and not hasattr(model, *first):  # and trainers, such as "model."
            state = {name.partition(".")[2]: value for name, value in state.items()}
        convert = getattr(inspect.getmodule(type(model)), "checkpoint_filter_fn", None)
        if convert:
            state = convert(state, model)
        heads = tuple(f"{name}." for name in head_names(model))
        new = model.state_dict()
        body = {key: value for key, value in state.items() if not key.startswith(heads)}
        head = {key: value for key, value in new.items() if key.startswith(heads)}
        for key in body.keys() & new.keys():
            if new[key].is_floating_point() and not body[key].is_floating_point():
                raise ValueError(f"{key} holds {body[key].dtype}")  # as of a quantised network
        model.load_state_dict({**body, **head})
        check_finite_weights(model)


def check_finite_weights(model):
    """Raises ValueError if a weight is NaN or infinite: scores of neurons could not be compared."""
    for name, value in model.state_dict().items():
        if not value.isfinite().all():
            raise ValueError(f"{name} has a weight that is not a finite number")


# What every checkpoint holds; last.pt holds also what a training stage needs to go on
CHECKPOINT = [
    "model",
    "arch",
    "n_classes",
    "classes",
    "size",
    "mean",
    "std",
    "epoch",
    "data",
    "args",
    "erm",
]


def load_checkpoint(path, advice="train_erm.py and finetune_contrastive.py make such checkpoints"):
    """What a training stage wrote, on the CPU. Raises BadInput if it is missing, damaged or
    foreign."""
    with reading(path, advice):
        checkpoint = load_tensors(path)
        missing = [key for key in CHECKPOINT if key not in checkpoint]
        if missing or "labels" not in checkpoint["data"]:
            raise ValueError(f"it lacks {', '.join(missing) or 'labels'}")
        return checkpoint


def load_model(path, device="cpu"):
    """The model of a checkpoint, in eval mode on `device`, and the checkpoint itself. Raises
    BadInput if it cannot be used, or may still change."""
    folder = path.parent
    if (
        path.name in ("best.pt", "last.pt")
        and (folder / "args.json").exists()
        and not (folder / "results.json").exists()
    ):
        raise BadInput(
            f"{folder} is unfinished, so its {path.name} may still change; run its stage to the "
            "end, or give a copy that lies elsewhere"
        )
    checkpoint = load_checkpoint(path)
    with reading(path, "its weights do not fit its own description; run its stage again"):
        model = build_model(checkpoint["arch"], checkpoint["n_classes"], checkpoint["size"])
        model.load_state_dict(checkpoint["model"])
        check_finite_weights(model)
    model.pretrained_cfg.update(mean=checkpoint["mean"], std=checkpoint["std"])
    return model.to(device, memory_format=torch.channels_last).eval(), checkpoint


def fingerprint_of(model):
    """Tells whether two networks have the same weights."""
    values = [value.cpu().contiguous().numpy() for value in model.state_dict().values()]
    return hashlib.sha256(b"".join(values)).hexdigest()[:16]


def reopen(path, data=None, device="cpu"):
    """What a later stage starts from: the model of a checkpoint (eval mode), the checkpoint and the
    table of its data, or of `data` where they have moved. Raises BadInput if labels changed."""
    model, checkpoint = load_model(path, device)
    source = checkpoint["data"]
    table = read_table(data or source["source"], source["attributes"])
    if source["labels"] != table.fingerprint("train", "val"):
        raise BadInput(
            f"labels or file names of {table.source}, or their order, changed since {path} was "
            "trained on them; train again"
        )
    images = table.fingerprint_of_images("train", "val")
    if None not in (images, source.get("images")) and images != source["images"]:
        raise BadInput(
            f"the images of {table.source} are other ones than those that {path} was trained on; "
            "name the right ones (--data), or train again"
        )
    return model, checkpoint, table


def open_split(checkpoint, table, split, **options):
    """A split as the network of a checkpoint takes it; options: augment, views, seed of Images."""
    return Images(
        table, split, checkpoint["size"], checkpoint["mean"], checkpoint["std"], **options
    )


def training_batches(checkpoint, table, args, views=1):
    """What a training stage learns from, Batches in an order of their own (set train.order.epoch);
    and what it evaluates on, {split: Batches} of training and validation, and of test. Test images
    are looked at here: the end needs them, and a damaged one is better found now than after the
    last epoch. Raises BadInput."""
    images = open_split(
        checkpoint, table, "train", augment=args.augment, views=views, seed=args.seed
    )
    train = Batches(
        images,
        args.device,
        workers=args.workers,
        order=EpochOrder(len(images), args.batch_size, args.seed),
    )
    loaders = {}
    for split in SPLITS:
        images = open_split(checkpoint, table, split)
        loaders[split] = Batches(images, args.device, args.batch_size, args.workers)
    for _ in tqdm(loaders["test"], "look at test images", disable=None, leave=False):
        pass
    return train, loaders, {"test": loaders.pop("test")}


# ------------------------------------------------------------------------------------------------
# 3. Evaluation
# ------------------------------------------------------------------------------------------------


def predict(model, batches):
    """Logits (N, C), classes (N,) and groups (N,) of all batches (x, y, g, ...), on the CPU."""
    logits, classes, groups = [], [], []
    with evaluating(model), torch.inference_mode():
        for x, y, g, *_ in tqdm(batches, "evaluate", disable=None, leave=False):
            logits.append(model(x))
            classes.append(y)
            groups.append(g)
    return torch.cat(logits).float().cpu(), torch.cat(classes).cpu(), torch.cat(groups).cpu()


MEANS = {
    "acc_worst": "worst group",
    "acc_mean": "mean",
    "acc_mean_train_mix": "mean, groups in training mix",
}


def group_report(predicted, y, g, groups):
    """Group accuracies in [0, 1] with counts, from predicted classes, classes and groups, each
    (N,). acc_mean: over the images as they are; acc_mean_train_mix: groups weighted by their
    training counts (what group_DRO and WILDS call 'adjusted' or 'average'). A group without images
    counts in neither and is not the worst."""
    rows = []
    weighted = 0.0
    train_n = 0
    right = predicted == y
    for group in groups:
        member = g == group["group"]
        n = int(member.sum())
        correct = int(right[member].sum())
        rows.append(
            {
                "group": group["group"],
                "name": group["name"],
                "n": n,
                "correct": correct,
                "acc": correct / n if n else None,
                "minority": group["minority"],
            }
        )
        if n:
            weighted += correct / n * group["train_n"]
            train_n += group["train_n"]
    worst = min((row for row in rows if row["n"]), key=lambda row: row["acc"])
    return {
        "groups": rows,
        "worst_group": worst["group"],
        "acc_worst": worst["acc"],
        "acc_mean": int(right.sum()) / len(right),
        "acc_mean_train_mix": weighted / train_n,
    }


def evaluate(model, loaders, groups):
    """Group reports and logits (N, C) of a model on every split, {split: ...} each."""
    reports = {}
    logits = {}
    for split, batches in loaders.items():
        logits[split], y, g = predict(model, batches)
        reports[split] = group_report(logits[split].argmax(1), y, g, groups)
    return reports, logits


def short(group):
    """'G1*': a group's number, starred where it is a minority group."""
    return f"G{group['group']}{'*' if group['minority'] else ''}"


def long(group):
    """'G1* landbird on water'."""
    return f"{short(group)} {group['name']}"


def print_epoch(row, epochs):
    """One line on an epoch of a training stage: loss terms, and group accuracies in %."""
    cells = [f"{name} {value:.4f}" for name, value in row["terms"].items()]
    cells.append(f"lr {row['lr']:.1e}")
    for split in ("train", "val"):
        cells.append(split)
        for group in row[split]["groups"]:
            star = "*" if group["minority"] else ""
            cells.append(f"{percent(row[split], group['group']):>5s}{star}")
    print(f"epoch {row['epoch']}/{epochs}", *cells, f"{row['seconds']:.0f} s", flush=True)


def print_splits(title, after, before=None):
    """Group accuracies and their means in %, from reports {split: report} of one network, or of one
    before and after; the worst group of each split carries a '<'."""
    names = {group["group"]: long(group) for group in after["test"]["groups"]}
    rows = []
    for key, name in {**names, **MEANS}.items():
        cells = {"group": name}
        for split, report in after.items():
            cells[split] = percent(report, key)
            if before:
                cells[split] = f"{percent(before[split], key)} -> {cells[split]}"
            cells[split] += "<" if key == report["worst_group"] else " "
        rows.append(cells)
    print_rows(f"{title}; accuracy in %, * minority, < worst group", rows)


def percent(report, key):
    """Accuracy of a report in %, of a group by its number or of one of MEANS."""
    accuracy = report[key] if key in MEANS else report["groups"][key]["acc"]
    return "-" if accuracy is None else f"{100 * accuracy:.1f}"


def print_rows(title, rows):
    """A title and dicts with the same keys, as a table with aligned columns."""
    print(f"\n{title}")
    table = [list(rows[0])]
    for row in rows:
        cells = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row.values()]
        table.append(cells)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for first, *others in table:
        cells = map(str.rjust, others, widths[1:])
        print(first.ljust(widths[0]), *cells, sep="  ")


def selected(log):
    """The selected epoch, a row of the log: of the highest worst-group accuracy in validation; of
    equals the first, and never the start."""
    return max((row for row in log if row["epoch"]), key=lambda row: row["val"]["acc_worst"])


def plot_epochs(log):
    """Training and validation accuracy of every group over the epochs of a log, a panel each, and
    the terms of the loss in one more."""
    panels = {}  # {title: {line: its values}}, in rows of six
    for j, group in enumerate(log[-1]["train"]["groups"]):
        panels[f"accuracy of\n{long(group)}"] = {
            split: [row[split]["groups"][j]["acc"] for row in log] for split in ("train", "val")
        }
    panels["training loss"] = {
        name: [row["terms"].get(name) for row in log] for name in log[-1]["terms"]
    }
    epochs = [row["epoch"] for row in log]
    columns = min(len(panels), 6)
    rows = math.ceil(len(panels) / columns)
    fig = Figure(figsize=(2.7 * columns, 2.8 * rows))
    axes = [*fig.subplots(rows, columns, sharex=True, squeeze=False).flat]
    for ax in axes[len(panels) :]:
        ax.remove()
    for ax, (title, lines) in zip(axes, panels.items(), strict=False):
        ax.tick_params(labelbottom=True)
        for name, values in lines.items():
            ax.plot(epochs, np.array(values, dtype=float), marker=".", label=name)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.axvline(selected(log)["epoch"], color="0.8", ls=":", zorder=0)
        ax.set(
            title=title,
            xlabel="epoch",
            ylim=(
                min(0, ax.get_ylim()[0]),  # a term of the loss may be negative
                None if title == "training loss" else 1.05,
            ),
        )
        ax.legend()
    return fig


def heat_map(ax, values, rows, layers, most, texts):
    """A heat map of values (rows, layers), grey up to `most`, layers in network order, with a text
    in some cells, {(i, j): text}. Returns what a colour bar needs."""
    image = ax.imshow(values, cmap="Greys", vmin=0, vmax=most, aspect="auto")
    for (i, j), text in texts.items():
        ax.text(
            j,
            i,
            text,
            ha="center",
            va="center",
            color="white" if values[i, j] > most / 2 else "black",
        )
    ax.set_xticks(
        range(len(layers)),
        [layer.removesuffix(".weight") for layer in layers],
        rotation=90,
    )
    ax.set_yticks(range(len(rows)), rows)
    return image


# ------------------------------------------------------------------------------------------------
# 4. Neurons and masks
# ------------------------------------------------------------------------------------------------

# This section needs contextlib, torch and numpy (np) alone. Take all of it, or single functions:
# head_names needs LAYERS, prunable_weights needs both, mean_gradient needs evaluating,
# score_neurons and needs_gradient need CRITERIA, top_neurons needs locate, full_passes needs
# modified and evaluating, count_right needs these three, and count_planned needs count_right. The
# pass with masked weights is `auxiliary` of finetune_contrastive.py.
#
# A neuron is a pair (parameter name, index), such as ("layer4.2.conv3.weight", 12). With the unit
# "channel" it is weight[12], an output filter of a convolution or an output row of a linear layer
# with all its weights; with the unit "weight" it is a single weight, by its place in the flattened
# tensor. Zeroing a filter in front of BatchNorm makes its channel the constant
# beta - gamma * mean / std and not 0 (in training mode beta); a filter's bias, where it has one,
# stays.
#
# The functions take `weights`, {parameter name: weight}: what prunable_weights gives, or any other
# choice of the parameters of the very model that is run (of a DataParallel, that of its `module`).

# What stands for a neuron, element by element, from its weight z and its gradient v; its score is
# the l2 norm of that (section 2.1.1). Another criterion is one more line.
CRITERIA = {
    "magnitude": lambda z, v: z,
    "gradient": lambda z, v: v,
}


LAYERS = (
    torch.nn.Conv1d,
    torch.nn.Conv2d,
    torch.nn.Conv3d,
    torch.nn.Linear,
    torch.nn.MultiheadAttention,
)


def head_names(model):
    """Names of the layers that give the logits: model.pretrained_cfg["classifier"], which timm sets
    (one name or several), else the linear layer or convolution that was registered last."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    # A network of timm's still names its head where that was taken off
    if not any(list(model.get_submodule(name).parameters()) for name in names):
        names = [name for name, module in model.named_modules() if isinstance(module, LAYERS)][-1:]
    return tuple(names)


def prunable_weights(model):
    """The weights that hold neurons, {parameter name: parameter} in network order: of all
    convolutions, or of all linear layers where these hold more weights (transformers, but ConvNeXt
    too). The layers that give the logits, and normalisation, never; nor layers whose weight is
    computed from others (torch's parametrizations, such as weight norm). Raises ValueError if there
    is none."""
    convolutions = {}
    linear = {}
    heads = set()
    for name in head_names(model):
        heads.update(model.get_submodule(name).parameters())
    for name, weight in model.named_parameters():  # what layers share has one name
        layer, _, part = name.rpartition(".")
        if (
            isinstance(model.get_submodule(layer), LAYERS)
            and part.endswith("weight")
            and weight not in heads
        ):
            kind = convolutions if weight.dim() > 2 else linear
            kind[name] = weight
    weights = max(convolutions, linear, key=lambda kind: sum(w.numel() for w in kind.values()))
    if not weights:
        raise ValueError("this network has no convolution and no linear layer before its head")
    return weights


def choose_unit(weights):
    """'channel' for convolutions, whose weights have more than two dimensions, else 'weight'."""
    return "channel" if next(iter(weights.values())).dim() > 2 else "weight"


def count_neurons(weights, unit="channel"):
    """How many neurons each parameter has, {parameter name: n}."""
    return {name: len(w) if unit == "channel" else w.numel() for name, w in weights.items()}


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


def mean_gradient(model, weights, batches):
    """v of section 2.1.1: the gradient of the mean cross entropy over batches (x, y, ...) by each
    weight, {parameter name: tensor like the weight}. In eval mode; leaves no .grad, and all modes
    as they were. Raises ValueError if there is no image."""
    # The same weights under another name, so that frozen ones have a gradient too
    sums = dict.fromkeys(weights, 0)
    n = 0
    with evaluating(model), torch.inference_mode(False), torch.enable_grad():
        z = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        for x, y, *_ in batches:
            logits = torch.func.functional_call(model, z, (x.clone(),)).float()
            loss = torch.nn.functional.cross_entropy(logits, y.clone(), reduction="sum")
            # A branch that eval mode skips has a gradient of 0
            gradients = torch.autograd.grad(loss, list(z.values()), materialize_grads=True)
            for name, gradient in zip(z, gradients, strict=True):
                # In 16 bits later batches would hardly add to the sum of the earlier ones
                precise = torch.promote_types(gradient.dtype, torch.float32)
                sums[name] += gradient.to(precise)
            n += len(y)
    if n == 0:
        raise ValueError("no image to take the gradient of")
    return {name: total / n for name, total in sums.items()}


def needs_gradient(criterion):
    """Whether a criterion cannot do without the gradient, so that every group has neurons of its
    own."""
    with contextlib.suppress(Exception):
        return not torch.is_tensor(CRITERIA[criterion](torch.ones(2), None))
    return True


def score_neurons(weights, gradients, criterion, unit="channel"):
    """Score of every neuron, {parameter name: (n,)}: the l2 norm of what CRITERIA[criterion] makes
    of its weight and its gradient. gradients: what mean_gradient gives, or {} for criteria that
    need none."""
    scores = {}
    for name, weight in weights.items():
        value = CRITERIA[criterion](weight.detach(), gradients.get(name))
        if unit == "channel":
            scores[name] = value.flatten(1).norm(dim=1)
        else:
            scores[name] = value.flatten().abs()
    return scores


def top_neurons(scores, k):
    """The k neurons with the LARGEST scores over all layers, largest first; of equals the one in
    the earlier layer, then of the lower index. scores {parameter name: (n,)} -> list of
    (parameter name, index). Raises ValueError for a k that cannot be, or a score that is NaN."""
    flat = torch.cat(list(scores.values()))
    if not 1 <= k <= len(flat):
        raise ValueError(f"top {k} of {len(flat)} neurons: expected 1 to {len(flat)}")
    if flat.isnan().any():
        raise ValueError("a score is not a number, so neurons cannot be compared")
    # Of equals topk may take any: so all that are as large as the k-th largest or larger, sorted
    places = (flat >= flat.topk(k).values[-1]).nonzero()[:, 0]
    places = places[flat[places].sort(descending=True, stable=True).indices[:k]]
    return locate(places.tolist(), {name: len(values) for name, values in scores.items()})


def locate(places, counts):
    """Places among the neurons of all layers, {parameter name: n}, as a list of (parameter name,
    index)."""
    found = []
    for place in places:
        for name, n in counts.items():
            if place < n:
                break
            place -= n
        found.append((name, int(place)))
    return found


def neuron_masks(weights, neurons, unit="channel"):
    """The mask m of section 2.1.1: {parameter name: bool tensor like the weight}, False at
    `neurons`; parameters without any are left out."""
    chosen = {}
    for name, index in neurons:
        chosen.setdefault(name, []).append(index)
    masks = {}
    for name, indices in chosen.items():
        mask = torch.ones(weights[name].shape, dtype=torch.bool, device=weights[name].device)
        flat = mask if unit == "channel" else mask.view(-1)
        flat[indices] = False
        masks[name] = mask
    return masks


def worst_images(logits, y, index, generator, highest=256, draw=128):
    """`draw` images at random of the `highest` with the LARGEST cross entropy among `index`
    (sections 2.2.1 and 4.1). logits (N, C), y (N,), index (n,) -> indices."""
    loss = torch.nn.functional.cross_entropy(logits[index], y[index], reduction="none")
    worst = index[loss.topk(min(highest, len(index))).indices]
    return worst[torch.randperm(len(worst), generator=generator)[:draw]]


@contextlib.contextmanager
def modified(weights, neurons, how="zero", sigma=0.0, seed=0, unit="channel"):
    """Inside the `with`, neurons are zero, epsilon (random-init) or their weights + epsilon
    (random-noise), epsilon ~ N(0, sigma^2) drawn on the CPU in the order of `neurons`; after it the
    weights are what they were, bit for bit, whatever happened. For evaluation alone: what is
    computed inside has no gradient afterwards, and in training mode BatchNorm's statistics would
    move. Raises ValueError for another `how`, or noise without a sigma above 0."""
    if how not in ("zero", "random-init", "random-noise") or (how != "zero" and not sigma > 0):
        raise ValueError(f"{how} with sigma {sigma}: expected zero, or noise with sigma > 0")
    generator = torch.Generator().manual_seed(seed)
    places = []  # views of the weights, so that they can be written to
    for name, index in neurons:
        weight = weights[name].detach()
        place = index if unit == "channel" else np.unravel_index(index, weight.shape)
        places.append(weight[place])
    before = [place.clone() for place in places]
    try:
        for place in places:
            if how != "random-noise":
                place.zero_()
            if how != "zero":
                place += sigma * torch.randn(place.shape, generator=generator).to(place.device)
        torch.clear_autocast_cache()  # under torch.autocast, copies of the weights as they were
        yield
    finally:
        for place, values in zip(places, before, strict=True):
            place.copy_(values)
        torch.clear_autocast_cache()


def full_passes(model, x, variants, weights, unit="channel"):
    """Logits (B, C) of the model as it is, and a list of those under each variant, by a forward
    pass for every one. A variant: keyword arguments of `modified`, {"neurons": ..., "how": ...}."""
    found = []
    for variant in variants:
        # A network that keeps what it computes of its weights clears it when its mode is set
        with modified(weights, unit=unit, **variant), evaluating(model):
            found.append(model(x.clone()))
    with evaluating(model):
        return model(x.clone()), found


def count_right(model, batches, variants, weights, unit="channel", passes=full_passes):
    """How many images the model gets right as it is and under each variant (see full_passes), over
    batches (x, y, g, ...): for every variant {group: {n, correct_before, correct_after, to_wrong,
    to_right}}. to_wrong: right before and wrong after; to_right: wrong before and right after.
    Memory hardly grows with the number of variants, of which only the logits are kept. Raises
    ValueError for weights of another model, as those of this one would not be changed."""
    of_model = {weight.data_ptr() for weight in model.parameters()}
    if not of_model.issuperset(weight.data_ptr() for weight in weights.values()):
        raise ValueError("these are weights of another model; take prunable_weights(model)")
    counts = [{} for _ in variants]
    with evaluating(model), torch.inference_mode():
        for x, y, g, *_ in batches:
            logits, found = passes(model, x, variants, weights, unit)
            right = torch.stack([logits, *found]).argmax(2) == y  # (1 + V, B)
            for group in g.unique().tolist():
                after = right[1:, g == group]
                before = right[:1, g == group].expand_as(after)
                of_images = {
                    "n": torch.ones_like(after),
                    "correct_before": before,
                    "correct_after": after,
                    "to_wrong": before & ~after,
                    "to_right": ~before & after,
                }
                # All sums at once, (V, 5), as each question to a GPU takes a wait
                sums = torch.stack(list(of_images.values()), 1).sum(2).tolist()
                for count, row in zip(counts, sums, strict=True):
                    total = count.setdefault(group, dict.fromkeys(of_images, 0))
                    for key, n in zip(of_images, row, strict=True):
                        total[key] += n
    return counts


def count_planned(model, planned, batches, weights, unit, passes, **columns):
    """A row for each planned network and group it is tried on, a dict: the plan's `row`, the
    further columns, and what count_right finds under its `variant`. A plan: {"row": ...,
    "group_numbers": ..., "variant": ...}. batches: those of each group; a group without images has
    no row."""
    rows = []
    for group, of_group in enumerate(batches):
        asked = [plan for plan in planned if group in plan["group_numbers"]]
        found = count_right(
            model,
            of_group,
            [plan["variant"] for plan in asked],
            weights,
            unit,
            passes,
        )
        for plan, by_group in zip(asked, found, strict=True):
            if group in by_group:
                rows.append({**plan["row"], **columns, "group": group, **by_group[group]})
    return rows


def change(row):
    """Accuracy after minus before, in percentage points, of counts as count_right gives them."""
    return 100 * (row["correct_after"] - row["correct_before"]) / row["n"]


# ------------------------------------------------------------------------------------------------
# 5. Speed only: without this section everything works, with full_passes in place of OnePass
# ------------------------------------------------------------------------------------------------


class OnePass:
    """Stands for full_passes, two to three times as fast: one forward pass for all variants, from
    which each branches off where its first changed weight is used. Where torch.fx cannot record
    the forward pass it warns, and takes full passes. Not for networks that use a weight first by
    way of another module, to which torch.fx does not look, and later by its name."""

    def __init__(self):
        self.model = None
        self.traced = None
        self.used = {}

    def __call__(self, model, x, variants, weights, unit="channel"):
        if model is not self.model:
            self.traced = trace_graph(model, x[:2])
            self.used = weights_of_nodes(self.traced) if self.traced else {}
            self.model = model
        if self.traced is None:
            return full_passes(model, x, variants, weights, unit)
        fork = Fork(self.traced, self.used, variants, weights, unit)
        logits = fork.run(x.clone())
        if fork.left_out:
            _, rest = full_passes(model, x, fork.left_out.values(), weights, unit)
            fork.logits.update(zip(fork.left_out, rest, strict=True))
        return logits, [fork.logits[number] for number in range(len(variants))]


def trace_graph(model, x):
    """The network as a torch.fx graph; None, with a warning, where that fails or gives other
    logits."""
    with contextlib.suppress(Exception):  # it fails in as many ways as there are networks
        traced = torch.fx.GraphModule(model, Tracer().trace(model))
        if torch.equal(traced(x.clone()), model(x.clone())):  # clones: a network may overwrite x
            return traced
    warn("torch.fx cannot follow this network, so every changed network takes a full pass")
    return None


def weights_of_nodes(traced):
    """The weights that each node of a graph uses, {node: their ids}: by weight and not by name, so
    that tied weights are right."""
    used = {}
    for node in traced.graph.nodes:
        weights = []
        if node.op == "call_module":
            weights = traced.get_submodule(node.target).parameters()
        elif node.op == "get_attr":
            weights = [operator.attrgetter(node.target)(traced)]
        used[node] = {id(weight) for weight in weights}
    return used


class Tracer(torch.fx.Tracer):
    """Takes no module apart that has no parts."""

    def is_leaf_module(self, module, name):
        return not list(module.children()) or super().is_leaf_module(module, name)


class Fork(torch.fx.Interpreter):
    """One forward pass for all variants: in front of the first node that uses a weight which a
    variant changes, the rest is run for that variant; what lies before is computed once for all.
    Left out are variants with a changed weight that no node is seen to use."""

    def __init__(self, traced, used, variants, weights, unit):
        super().__init__(traced)
        self.rest = torch.fx.Interpreter(traced)
        self.used = used
        self.weights = weights
        self.unit = unit
        self.logits = {}
        self.done = {}  # nodes that need not be run again, without their values
        self.waiting = {}
        self.left_out = {}
        self.changed = {}  # ids of the weights
        seen = set().union(*used.values())
        for number, variant in enumerate(variants):
            changed = {id(weights[name]) for name, _ in variant["neurons"]}
            self.changed[number] = changed
            if changed <= seen:
                self.waiting[number] = variant
            else:
                self.left_out[number] = variant

    def run_node(self, node):
        for number in [n for n in self.waiting if self.changed[n] & self.used[node]]:
            variant = self.waiting.pop(number)
            # Copied together, as layers may overwrite values and what shares their memory
            values = copy.deepcopy([*self.env.values()])
            known = {**self.done, **dict(zip(self.env, values, strict=True))}
            with modified(self.weights, unit=self.unit, **variant):
                self.logits[number] = self.rest.run(initial_env=known)
        self.done[node] = None
        return super().run_node(node)


# ------------------------------------------------------------------------------------------------
# 6. Runs: flags, files, errors
# ------------------------------------------------------------------------------------------------

# What to do where a run folder is damaged
START_ANEW = "if its run cannot be repaired, move its folder away and start anew"

# Arguments that leave the results alone, or whose content is compared instead of their spelling
NOT_SETTINGS = {
    "run",
    "name",
    "data",
    "attributes",
    "checkpoint",
    "kick_in",
    "weights",
    "device",
    "workers",
    "deterministic",
    "overwrite",
    "keep_epochs",
}


def make_parser(description):
    """The parser of a stage, with the flags that all have; it refuses in one line, exit code 2."""
    p = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.error = lambda message: p.exit(2, f"{p.prog}: error: {message}\n")
    p.add_argument(
        "--run",
        type=Path,
        default="runs/birds",
        help="folder shared by all stages (%(default)s)",
    )
    g = p.add_argument_group("machine")
    device = "cpu"
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator().type
    g.add_argument("--device", default=device, help="cpu, cuda, mps, xpu (%(default)s)")
    g.add_argument(
        "--workers",
        type=between(int, 0, 1000),
        help="processes that read images, so many for training and for each split that is "
        "evaluated (the cores at hand, at most 8; 0 where the network itself runs on the CPU)",
    )
    g.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        default="fp32",
        help="bf16: convolutions and matrix products in 16 bits, faster on most GPUs (fp32)",
    )
    g.add_argument(
        "--deterministic",
        action="store_true",
        help="the same bytes again on CUDA too; slower, and an error where that is impossible",
    )
    return p


def add_tracing_flags(p):
    """The flags that stages 2 and 3 share."""
    g = p.add_argument_group("what is traced")
    g.add_argument("--checkpoint", type=Path, help="model to trace (RUN/erm/best.pt)")
    g.add_argument("--data", help="where the data are now, if they moved (as the checkpoint says)")
    g.add_argument(
        "--max-per-group",
        type=positive_int,
        metavar="N",
        help="at most so many images of each group, a random sample; of minority groups in "
        "training always all (all; built-in set 50)",
    )
    g.add_argument(
        "--unit",
        choices=["auto", "channel", "weight"],
        default="auto",
        help="what a neuron is; auto: a weight where linear layers hold most weights, as in "
        "transformers, else a channel (auto)",
    )
    g.add_argument(
        "--batch-size", type=positive_int, default=128, help="images in a forward pass (128)"
    )
    g.add_argument(
        "--seed",
        type=seed_int,
        help="draws samples, random neurons and, in stage 2, noise (that of ERM)",
    )


def open_traced(args):
    """What stages 2 and 3 trace: model, checkpoint, table, the weights that hold neurons, how many
    neurons each has, and what results.json says of all this. Fills in the arguments that were left
    out, and prints them."""
    args.checkpoint = args.checkpoint or args.run / "erm" / "best.pt"
    model, checkpoint, table = reopen(args.checkpoint, args.data, args.device)
    if args.max_per_group is None and is_built_in(table):
        args.max_per_group = 50
    if args.seed is None:
        args.seed = checkpoint["erm"]["settings"]["seed"]
    weights = prunable_weights(model)
    if args.unit == "auto":
        args.unit = choose_unit(weights)
    counts = count_neurons(weights, args.unit)
    print_settings(args)
    print(f"{sum(counts.values())} neurons ({args.unit}s) in {len(counts)} layers")
    about = {
        "source": table.source,
        "labels": checkpoint["data"]["labels"],  # reopen has compared them
        "arch": checkpoint["arch"],
        "checkpoint": str(args.checkpoint),
        "epoch": checkpoint["epoch"],
        "erm": checkpoint["erm"],
        "network": fingerprint_of(model),
        "unit": args.unit,
    }
    return model, checkpoint, table, weights, counts, about


def between(kind, low, high=math.inf):
    """A type for argparse: an int or float (kind) from low to high, but never infinite."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    parse.__name__ = kind.__name__  # named where the text is no number at all
    return parse


positive_float = between(float, 1e-12, 1e12)
positive_int = between(int, 1, 10**9)
seed_int = between(int, 0, 2**32 - 1)


def default_kick_in(epochs):
    """The epoch of ERM at which stage 4 starts by default: 40 % of all, the paper's 40 of 100."""
    return max(1, epochs * 2 // 5)


def plain(args):
    """An argparse namespace as a dict of plain types, for JSON and checkpoints."""
    return json.loads(json.dumps(vars(args), default=str))


def settings(args):
    """The arguments on which results depend, as plain types."""
    return {key: value for key, value in plain(args).items() if key not in NOT_SETTINGS}


def print_settings(args):
    """All arguments on one line, as they were given or filled in."""
    print(" ".join(f"{key}={value}" for key, value in plain(args).items()))


def run_stage(parse_args, main):
    """What the script of a stage does: main(parse_args()), on the machine that its flags name."""
    with script():
        args = parse_args()
        with machine(args):
            main(args)


@contextlib.contextmanager
def machine(args):
    """Around a stage's main(): sets what the machine's flags ask for. Raises BadInput if --device
    is not there."""
    with contextlib.suppress(AttributeError, TypeError):  # only glibc has mallopt
        # Freed memory is kept, of large tensors too: to fetch it anew takes a fifth of a step
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: give nothing back
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a tensor
    torch.use_deterministic_algorithms(args.deterministic)
    if args.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it cuBLAS refuses
    try:
        device = torch.empty(0, device=args.device).device.type
        autocast = torch.autocast(
            device,
            torch.bfloat16,
            enabled=args.precision == "bf16",
            cache_enabled=False,  # as weights change inside
        )
    except (RuntimeError, AssertionError, ImportError) as error:  # as torch was built without it
        raise BadInput(
            f"--device {args.device}: {str(error).splitlines()[0]}; use cpu or what is there"
        ) from error
    if args.workers is None:
        cores = os.cpu_count()
        if hasattr(os, "sched_getaffinity"):
            cores = len(os.sched_getaffinity(0))
        args.workers = 0 if device == "cpu" else min(8, cores)
    with autocast:
        yield


def finite_loss(loss, epoch, model, advice):
    """The loss () as a float. Raises BadInput if it or a weight is not a finite number."""
    if not (loss.isfinite() and all(v.isfinite().all() for v in model.state_dict().values())):
        raise BadInput(
            f"training diverged in epoch {epoch}, as its loss or a weight is no longer finite; "
            f"{advice}; epochs finished before are kept"
        )
    return loss.item()


def read_json(path):
    """What a JSON file of a run folder holds, a dict. Raises BadInput."""
    with reading(path, START_ANEW):
        content = json.loads(Path(path).read_text())
        if not isinstance(content, dict):
            raise TypeError("not a dict")
        return content


def encode(name, content):
    """What a file of a stage holds, as bytes, by the ending of its name."""
    kind = Path(name).suffix
    buffer = io.BytesIO()
    if kind in (".pt", ".pth"):
        torch.save(content, buffer)
    elif isinstance(content, Figure):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            content.savefig(buffer, dpi=120, format=kind[1:])
        if any("Glyph" in str(warning.message) for warning in caught):
            warn(f"{name}: some characters are boxes, as no font here has them")
    else:
        text = io.StringIO(newline="")
        if kind == ".json":
            print(json.dumps(content, indent=1, allow_nan=False), file=text)
        elif kind == ".jsonl":
            for row in content:
                print(json.dumps(row, allow_nan=False), file=text)
        elif kind == ".csv":
            rows = csv.DictWriter(text, content[0].keys() if content else [])
            rows.writeheader()
            rows.writerows(content)
        else:
            text.write(content)
        buffer.write(text.getvalue().encode(errors="backslashreplace"))  # of odd folder names
    return buffer.getbuffer()


def write(folder, files, remove=()):
    """Write files, {name: content}, together: whatever happens, on a full disk or after a kill, no
    file is half-written, and where results.json stands, what was written with it is whole. Content:
    see `encode`. remove: names of files that show something older. Raises BadInput."""
    made = {}  # {path: the new content, in a file beside it}
    try:
        for name, content in files.items():
            path = folder / name
            made[path] = path.with_name(f".{path.name}.new")
            with open(made[path], "wb") as file:
                file.write(encode(name, content))
                file.flush()
                flush_to_disk(file)
        # The old results.json goes first, and the new one comes last
        if "results.json" in files:
            remove = ["results.json", *remove]
        for name in remove:
            path = folder / name
            path.unlink(missing_ok=True)
        for path in sorted(made, key=lambda path: path.name == "results.json"):
            os.replace(made[path], path)
    except OSError as error:
        raise BadInput(f"{path.absolute()} cannot be written ({error.strerror})") from error
    finally:
        for temporary in made.values():
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def flush_to_disk(file):
    """os.fsync, where the file system has it (CIFS and others may not)."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


def check_own(folder, names):
    """Raises BadInput if a folder holds files of these names (patterns) that this project did not
    write. What else lies there is left alone."""
    found = [path for name in names for path in sorted(folder.glob(name))]
    args = folder / "args.json"
    if found and not (args.exists() and "stage" in read_json(args)):
        raise BadInput(
            f"{found[0]} is not of this project; move it away, or choose another --run or --name"
        )


def open_folder(folder, names):
    """Make a stage's folder and hold it until this process ends, however it ends. names: of the
    files that the stage writes. Raises BadInput if another process holds it."""
    check_own(folder, names)
    folder.mkdir(parents=True, exist_ok=True)
    lock(folder)
    for name in names:  # what a kill left half-written
        for path in folder.glob(f".{name}.new"):
            path.unlink()


def lock(folder):
    """Lock a folder until this process ends. Raises BadInput if another process holds it."""
    if fcntl is not None:
        # Never closed and never written to. Unlike flock, lockf is not inherited by workers
        file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise BadInput(
                f"{folder} is in use by another process; wait for it, or use another folder"
            ) from error
        except OSError as error:
            warn(f"{folder} cannot be locked ({error.strerror}); keep other processes away from it")


def run_record(stage, args, **inputs):
    """What args.json says of a run: every resolved argument, fingerprints of the inputs, command,
    versions and, in a git checkout, its commit."""
    commit = None
    with contextlib.suppress(OSError):  # no git
        commit = subprocess.run(
            ["git", "-C", Path(__file__).resolve().parent, "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
    return {
        "stage": stage,
        "args": plain(args),
        "inputs": inputs,
        "command": shlex.join(sys.argv),
        "commit": commit or None,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def changed_settings(folder, args, defaults, inputs):
    """In which settings and inputs a command differs from the run in a folder, a list of words. A
    setting that the run did not know counts as its default (`defaults`, as parse_args([]) has it);
    an input, a fingerprint, that is None or that the run did not know counts as unchanged."""
    before = read_json(folder / "args.json")
    changed = []
    with reading(folder / "args.json", START_ANEW):
        known = {**plain(defaults), **before["args"]}
        for key, value in settings(args).items():
            known_value = known.get(key)
            if key not in before["args"] and known_value is None:
                continue  # its default depends on the data
            if key == "epochs" and value > known_value:
                continue  # a run may be extended
            if value != known_value:
                changed.append(f"{key} {known_value}, now {value}")
        for key, value in inputs.items():
            known_value = before["inputs"].get(key)
            if None not in (value, known_value) and value != known_value:
                changed.append(f"the {key} changed")
    return changed


def earlier_run(folder, args, defaults, names, test_labels, **inputs):
    """What an earlier run left in the folder of a training stage, as (last, results). Nothing to go
    on from: (None, None). An unfinished run, or one that needs a lost figure or other test images:
    the content of last.pt, and None. A finished one: None, and the content of results.json. Writes
    nothing. names: the files of the stage; test_labels: the fingerprint of the test images, for
    which alone results.json holds; defaults, inputs: see changed_settings. Raises BadInput if the
    folder holds a run of other settings or inputs, or is damaged."""
    check_own(folder, names)
    ended = (folder / "results.json").exists()
    if not ended and not (folder / "last.pt").exists():
        # What no kill leaves: an epoch writes last.pt before best.pt
        if (folder / "best.pt").exists() and not args.overwrite:
            raise BadInput(
                f"{folder} has lost the last.pt of the run that its best.pt is of; bring it back, "
                "or use another --run or --name, or --overwrite"
            )
        return None, None
    changed = changed_settings(folder, args, defaults, inputs)
    shorter = False
    finished = False
    if ended:
        results = read_json(folder / "results.json")
        with reading(folder / "results.json", START_ANEW):
            shorter = results["epochs"] < args.epochs
            finished = (
                not shorter
                and results.get("test_labels", test_labels) == test_labels
                and all((folder / name).exists() for name in names if name.endswith(".png"))
            )
    # Even with --overwrite an unfinished run of these settings goes on: it may be this very
    # command, which was interrupted
    if args.overwrite and (changed or shorter or finished):
        return None, None
    if changed:
        raise BadInput(
            f"{folder} is of a run with other settings ({'; '.join(changed[:4])}); use another "
            "--run or --name, or --overwrite"
        )
    if finished:
        print(f"{folder} is finished; --overwrite starts anew")
        return None, results
    return load_checkpoint(folder / "last.pt", START_ANEW), None


def restore(folder, last, model, optimizer, scheduler):
    """Bring a training stage back to where last.pt left it; returns its log. Raises BadInput, also
    if best.pt, which the end needs, is lost or of another run; but where the last epoch is the best
    one, `begin` makes best.pt from last.pt."""
    with reading(folder / "last.pt", START_ANEW):
        model.load_state_dict(last["model"])
        optimizer.load_state_dict(last["optimizer"])
        scheduler.load_state_dict(last["scheduler"])
        log = last["log"]
        epoch = selected(log)["epoch"]
    if epoch != last["epoch"]:
        best = load_checkpoint(folder / "best.pt", START_ANEW)
        if best["epoch"] != epoch or best["erm"]["id"] != last["erm"]["id"]:
            raise BadInput(
                f"{folder / 'best.pt'} is not of epoch {epoch} of this run; {START_ANEW}"
            )
    return log


def save_epoch(folder, checkpoint, log, optimizer, scheduler, files, **more):
    """Write what an epoch of a training stage came to, and further files. last.pt holds the log
    (and `more`) as well, so that log and weights cannot disagree. It comes before best.pt, which
    `begin` can make from it if a kill comes between the two."""
    last = {
        **checkpoint,
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "log": log,
        **more,
    }
    written = {"log.jsonl": log, **files, "last.pt": last}
    if selected(log) is log[-1]:
        written["best.pt"] = checkpoint
    write(folder, written)


def measure_selected(folder, model, test, table, log):
    """What results.json says of the selected epoch. The accuracy of the test split is measured here
    and nowhere else."""
    model.load_state_dict(load_checkpoint(folder / "best.pt", START_ANEW)["model"])
    reports, _ = evaluate(model, test, table.groups)
    row = selected(log)
    return {
        "selected_epoch": row["epoch"],
        "splits": {"train": row["train"], "val": row["val"], **reports},
        "network": fingerprint_of(model),
    }


def begin(folder, stage, args, names, last, **inputs):
    """Open the folder of a training stage, 'erm' or 'finetune', that starts (last is None) or goes
    on: nothing of an older run is left that is not of this one, and args.json says what it is."""
    open_folder(folder, names)
    if last is None and not args.overwrite and (folder / "last.pt").exists():
        raise BadInput(f"{folder} was filled by another process meanwhile; run the command again")
    # last.pt goes first: after a kill here the command begins again, while a last.pt that is left
    # over would be continued
    gone = ["last.pt", "results.json", *names] if last is None else ["results.json"]
    for name in gone:
        for path in folder.glob(name):
            if name != "args.json":  # which marks the files as ours
                path.unlink()
    files = {"args.json": run_record(stage, args, **inputs)}
    if last is not None and selected(last["log"])["epoch"] == last["epoch"]:
        # A kill may have come between last.pt and best.pt
        files["best.pt"] = {key: last[key] for key in CHECKPOINT}
    write(folder, files)


STYLE = {  # of all figures: small type, readable in grey
    "axes.axisbelow": True,
    "axes.prop_cycle": matplotlib.cycler(
        color=["0.35", "0.65", "0.9", "0.5"], linestyle=["-", "--", "-.", ":"]
    ),
    "figure.constrained_layout.use": True,
    "font.size": 8,
    "grid.color": "0.9",
    "patch.edgecolor": "black",
    "patch.force_edgecolor": True,
    "patch.linewidth": 0.5,
    "text.parse_math": False,  # a name may hold two $
}


@contextlib.contextmanager
def script():
    """Around all that a script does. What the user can mend is said in one line, with exit code 2;
    a fault of the code shows its traceback. Ctrl-C says so in one line and ends the process by that
    signal, so that a loop in the shell ends, too; other signals do what the system does."""
    program = Path(sys.argv[0]).name
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by 2>&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for as long as we run
        getattr(sys, name).reconfigure(errors="replace")  # of characters that it does not have
    matplotlib.rcdefaults()  # figures do not depend on a user's matplotlibrc
    matplotlib.rcParams.update(STYLE)
    warnings.simplefilter("ignore")  # what the user should know, we say
    sys.unraisablehook = lambda _: None  # torch's own clean-up fails where workers have died
    main_process = os.getpid()

    def stop(number, _):
        if os.getpid() == main_process:  # and not a worker that has just been forked
            with contextlib.suppress(OSError):
                os.write(2, f"\n{program}: stopped; run the same command again\n".encode())
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # the reader left, as in ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except Exception as error:
        message = in_one_line(error)
        if message is None:
            raise
        print(f"{program}: error: {message}", file=sys.stderr)
        raise SystemExit(2) from None


# Where torch says that the machine has too little of something
LIMITS = (
    r"out of memory|can't allocate|bad_alloc|can't start new thread|shared memory|ancdata|"
    r"Too many open files|could not create a primitive|DataLoader worker \(pid"
)


def in_one_line(error):
    """What to say of an error that the user can mend; None of a fault of the code."""
    if isinstance(error, (BadInput, OSError)):
        return str(error)
    advice = "try a smaller --batch-size or --workers 0"
    if isinstance(error, RuntimeError):
        for line in str(error).splitlines():
            if "deterministic" in line:
                return f"{line[:200]}; leave --deterministic out"
            if re.search(LIMITS, line):
                return f"{line[:200]}; {advice}"
    if isinstance(error, MemoryError) or isinstance(error.__context__, MemoryError):
        return f"out of memory; {advice}"
    return None
