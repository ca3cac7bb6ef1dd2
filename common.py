"""What the scripts share: data, models and checkpoints, evaluation, neurons, runs.

Plain functions on tensors, in the order in which data flows. Nothing runs at import and there is no
global state, so a function taken together with this one file survives being copied elsewhere.
Paper: "Uncovering Memorization Effect in the Presence of Spurious Correlations" (You, Dai, Min et al.).
"""

import contextlib
import csv
import glob
import hashlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from tqdm import tqdm


class BadInput(ValueError):
    """What the user gave cannot be used. One line: what is wrong, where, what to do."""


def warn(message):
    """Say something on stderr that the user should know but that does not stop the run."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------
# 1. Data: labels, pixels decoded once, batches, augmentation
# ------------------------------------------------------------------------------------------------

SPLITS = ("train", "val", "test")
# Images per group in the official splits: Waterbirds (Sagawa et al. 2020), CelebA (Liu et al. 2015)
OFFICIAL_COUNTS = {
    "waterbirds": [[3498, 184, 56, 1057], [467, 466, 133, 133], [2255, 2255, 642, 642]],
    "celeba": [[71629, 66874, 22880, 1387], [8535, 8276, 2874, 182], [9767, 7535, 2480, 180]],
}
GROUP_NAMES = {
    "waterbirds": ("landbird on land", "landbird on water", "waterbird on land", "waterbird on water"),
    "celeba": ("non-blond woman", "non-blond man", "blond woman", "blond man"),
}
# Where images lie, seen from the metadata file, in the layouts in which the two sets circulate
IMAGE_FOLDERS = (
    "", "img_align_celeba", "img_align_celeba/img_align_celeba", "celeba/img_align_celeba",
    "celeba/img_align_celeba/img_align_celeba", "Img/img_align_celeba",
    "waterbird_complete95_forest2water2", "waterbirds/waterbird_complete95_forest2water2",
)


@dataclass
class Metadata:
    """Labels of all splits, int64 arrays (N,): y class, a spurious attribute, g = y * n_attributes + a,
    split index into SPLITS. files are relative to root (the built-in set has neither)."""

    kind: str  # synthetic, waterbirds, celeba or other
    root: Path
    files: list
    y: np.ndarray
    a: np.ndarray
    g: np.ndarray
    split: np.ndarray
    n_classes: int
    groups: list  # a dict per group: group, name, train_n, minority


@dataclass
class Split:
    """One split of N images. images: uint8 (N, 3, S, S), memory-mapped; y, a, g: int64 (N,);
    original_sizes: (N, 2) height and width in pixels before the resize to S x S."""

    images: torch.Tensor
    y: torch.Tensor
    a: torch.Tensor
    g: torch.Tensor
    original_sizes: torch.Tensor
    files: list
    groups: list
    masks: torch.Tensor = None  # bool (N, S, S), where the object is; built-in set only


def read_metadata(data, attributes=("Blond_Hair", "Male")):
    """Labels of a data set, recognised by content: 'synthetic', a metadata csv (or the folder that
    holds one), or a folder with CelebA's attribute and partition files, of which `attributes` names
    the label and the spurious attribute. Raises BadInput with file, row and fix."""
    if str(data) == "synthetic":
        return synthetic_metadata()
    path = Path(data)
    if not path.exists():
        raise BadInput(f"--data {path}: no such file or folder; give a folder, a metadata csv or 'synthetic'")
    tables = [path] if path.is_file() else sorted(path.glob("*metadata*.csv"))
    celeba = [next((f for folder in ("", "Anno/", "Eval/") for f in sorted(path.glob(folder + name))), None)
              for name in ("list_attr_celeba.[ct][sx][vt]", "list_eval_partition.[ct][sx][vt]")]
    if len(tables) > 1:
        raise BadInput(f"{path} holds {', '.join(t.name for t in tables)}; give one of them as --data FILE")
    if tables:
        return _metadata(tables[0], *_read_table(tables[0]))
    if all(celeba):
        return _metadata(celeba[0], *_read_celeba(*celeba, attributes), root=path, attributes=attributes)
    found = sorted(p.name for p in path.iterdir())
    deeper = next(iter(sorted(path.glob("*/**/*metadata*.csv"))), None)
    raise BadInput(
        f"{path}: no known layout; looked for a metadata csv, or list_attr_celeba and list_eval_partition (.txt or "
        f".csv); found {', '.join(found[:4]) or 'nothing'}{f' and {len(found) - 4} more' if len(found) > 4 else ''}; "
        + (f"try --data {deeper.parent}" if deeper else
           "write a metadata.csv with the columns img_filename,y,split,place (README, 'Your own data')"))


def _read_columns(path, wanted):
    """Columns of a csv, or of one of CelebA's txt files, as lists of str, and the first row's line
    number. wanted: for each column the names it may have."""
    try:
        text = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not readable as text ({error}); was it downloaded completely?") from error
    first, lines = 2, csv.reader(text)
    if path.suffix == ".txt" and path.stem == "list_eval_partition":  # has no header
        first, lines = 1, [["image_id", "partition"], *map(str.split, text)]
    elif path.suffix == ".txt":  # line 1 holds the number of rows, line 2 the names of the 40 attributes
        if text and text[0].strip() != str(len(text) - 2):
            raise BadInput(f"{path} line 1 announces {text[0][:20]} rows and {max(len(text) - 2, 0)} follow; "
                           "was it downloaded completely?")
        first, lines = 3, map(str.split, ["image_id " + text[1], *text[2:]] if len(text) > 1 else [])
    lines = iter(lines)
    header = [cell.strip() for cell in next(lines, [])]
    if len(text) < first:
        raise BadInput(f"{path} {'has a header but no rows' if text else 'is empty'}; was it downloaded completely?")
    picked = [next((header.index(name) for name in names if name in header), None) for names in wanted]
    if None in picked:
        raise BadInput(f"{path}: no column {' or '.join(wanted[picked.index(None)])} in {','.join(header)[:120]}; needed are "
                       + ", ".join(" or ".join(names) for names in wanted))
    rows, pick = [], itemgetter(*picked)
    for number, row in enumerate(lines, first):
        if len(row) != len(header):
            raise BadInput(f"{path} row {number}: {len(row)} cells where the header has {len(header)}; is it truncated?")
        rows.append(pick(row))
    return [list(map(str.strip, column)) for column in zip(*rows)], first


def _translate(path, values, first, name, words, expected):
    """A column through the dict `words` -> int64 (N,); names the first row that holds anything else."""
    numbers = list(map(words.get, values))
    if None in numbers:
        i = numbers.index(None)
        hint = " (map -1/1 to 0/1)" if values[i] == "-1" else ""
        raise BadInput(f"{path} row {i + first}: {name} is {values[i][:40]!r}; expected {expected}{hint}")
    return np.array(numbers, dtype=np.int64)


def _read_table(path):
    """A metadata csv, Waterbirds' own, the derived forms or anyone's: first row, files, y, a, split."""
    (files, y, a, split), first = _read_columns(path, (("img_filename", "filename"), ("y",), ("place", "a"), ("split",)))
    numbers = {str(i): i for i in range(1000)}
    words = {"0": 0, "1": 1, "2": 2, "train": 0, "val": 1, "valid": 1, "validation": 1, "test": 2}
    return (first, files, _translate(path, y, first, "y", numbers, "a class number from 0"),
            _translate(path, a, first, "place (or a)", numbers, "an attribute number from 0"),
            _translate(path, [word.lower() for word in split], first, "split", words, "0, 1, 2 or train, val, test"))


def _read_celeba(attribute_file, partition_file, attributes):
    """CelebA's own files joined by file name, never by row order: first row, files, y, a, split."""
    (files, *labels), first = _read_columns(attribute_file, (("image_id",), *((name,) for name in attributes)))
    y, a = (_translate(attribute_file, values, first, name, {"-1": 0, "1": 1}, "-1 or 1")
            for values, name in zip(labels, attributes))
    (names, split), start = _read_columns(partition_file, (("image_id",), ("partition",)))
    split = _translate(partition_file, split, start, "partition", {"0": 0, "1": 1, "2": 2}, "0, 1 or 2")
    split_of = dict(zip(names, split))
    unmatched = sorted(split_of.keys() ^ set(files))
    if unmatched:
        raise BadInput(f"{attribute_file} and {partition_file.name} do not join by file name: {len(unmatched)} images are "
                       f"in one of them only ({', '.join(unmatched[:3])}); take both files from one source")
    return first, files, y, a, np.array([split_of[file] for file in files])


def _metadata(path, first, files, y, a, split, root=None, attributes=("Blond_Hair", "Male")):
    """Checks that need the whole table: names stay inside, classes known, no training group empty."""
    listing = "\n".join(files)  # one search through all names: CelebA has 202,599
    outside = re.search(r"^$|^[/\\~]|^\w:|(^|[/\\])\.\.([/\\]|$)", listing, re.M)
    if outside:
        i = listing.count("\n", 0, outside.end())
        raise BadInput(f"{path} row {i + first}: file name {files[i]!r} is empty or leads out of the data folder")
    for i, name in enumerate(SPLITS):
        if not (split == i).any():
            raise BadInput(f"{path}: no row has split {i} ({name}); all three of train, val, test are needed")
    n_classes, n_attributes = (int(values[split == 0].max()) + 1 for values in (y, a))
    for name, values, n in (("y", y, n_classes), ("the spurious attribute", a, n_attributes)):
        if (values >= n).any() or n < 2:
            i = int(values.argmax())
            raise BadInput(f"{path} row {i + first}: {name} is {values[i]}, but the training rows have "
                           + (f"only 0 to {n - 1}" if n > 1 else "a single value; two or more are needed"))
    g = y * n_attributes + a
    counts = [np.bincount(g[split == i], minlength=n_classes * n_attributes).tolist() for i in range(3)]
    kind, names = "other", [f"y={c}, a={b}" for c in range(n_classes) for b in range(n_attributes)]
    def all_named(pattern):
        return n_classes == n_attributes == 2 and len(re.findall(pattern, listing, re.M)) == len(files)
    if all_named(r"^(?:.*/)?\d{3}\.\w+/\w+_\d+_\d+\.jpg$"):  # CUB-200-2011's names
        kind, names = "waterbirds", GROUP_NAMES["waterbirds"]
    elif all_named(r"^(?:.*/)?\d{6}\.(?:jpg|png)$"):
        kind, names = "celeba", GROUP_NAMES["celeba"]
        if tuple(attributes) != ("Blond_Hair", "Male"):
            names = [f"{attributes[0]}={c}, {attributes[1]}={b}" for c in (0, 1) for b in (0, 1)]
    for name, found in zip(SPLITS, counts):
        empty = [f"group {j} ({names[j]})" for j in range(len(found)) if found[j] == 0]
        if empty and name == "train":
            raise BadInput(f"{path}: no training image in {', '.join(empty[:5])}; every class must occur with every attribute")
        if empty:
            warn(f"{path}: no {name} image in {', '.join(empty)}; left out of the {name} worst-group accuracy")
    official = OFFICIAL_COUNTS.get(kind)
    if official and names == GROUP_NAMES[kind] and counts != official:
        warn(f"{path}: images per group in train, val, test are {counts}; the official {kind} has {official}")
    groups = describe_groups(names, counts[0], n_attributes)
    return Metadata(kind, Path(root or path.parent), files, y, a, g, split, n_classes, groups)


def describe_groups(names, train_counts, n_attributes):
    """A dict per group: group, name, train_n, minority. A group is a minority if it has fewer than half
    the training images of the largest group of its class: G1 and G2 of Waterbirds, G3 of CelebA."""
    groups = []
    for j, (name, n) in enumerate(zip(names, train_counts)):
        same_class = train_counts[j - j % n_attributes:][:n_attributes]
        groups.append({"group": j, "name": name, "train_n": int(n), "minority": bool(2 * n < max(same_class))})
    return groups


def synthetic_metadata(seed=0):
    """The built-in set: Waterbirds' classes, places and group counts for images that draw_birds makes."""
    rng = np.random.default_rng(seed)
    counts = OFFICIAL_COUNTS["waterbirds"]
    g = np.concatenate([rng.permutation(np.repeat(np.arange(4), n)) for n in counts])
    split = np.repeat(np.arange(3), [sum(n) for n in counts])
    groups = describe_groups(GROUP_NAMES["waterbirds"], counts[0], 2)
    return Metadata("synthetic", None, None, g // 2, g % 2, g, split, 2, groups)


def draw_birds(y, a, rng, size=48, difficulty=0.2):
    """The built-in set, a tiny Waterbirds: images uint8 (N, 3, size, size) and exact bird masks, bool
    (N, size, size), for classes y (0 landbird, 1 waterbird) and places a (0 land, 1 water), each (N,).
    Waterbirds have longer bodies, necks and beaks: `difficulty` is the spread of these within a class,
    in units of half the distance between the classes. Land has vertical structure, water horizontal."""
    n = len(y)
    def uniform(low, high, *channels):
        return rng.uniform(low, high, (n, 1, 1, *channels)).astype(np.float32)
    def normal(*shape):
        return rng.standard_normal((n, *shape), dtype=np.float32)
    row, col = np.meshgrid(*[(np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1] * 2, indexing="ij")

    # Background: three waves across the picture, in a colour of the place
    land, waves = (a == 0)[:, None, None], np.zeros((n, size, size), np.float32)
    for amplitude in (1.0, 0.6, 0.4):
        frequency, slant = uniform(4, 22), uniform(-2.5, 2.5)
        along = np.where(land, frequency * col + slant * row, frequency * row + slant * col)
        waves += amplitude * np.sin(along + uniform(0, 6.28))
    colour = np.where(land[..., None], np.float32([0.36, 0.44, 0.30]), np.float32([0.32, 0.43, 0.48]))
    image = colour + 0.09 * normal(1, 1, 3) + 0.07 * waves[..., None] * uniform(0.5, 1.5, 3)

    # The bird in its own frame: u from tail to beak, v downwards, turned, mirrored and scaled
    sign = np.where(y == 1, 1, -1)[:, None, None].astype(np.float32)
    def by_class(middle, half):
        return middle + half * np.clip(sign + difficulty * normal(1, 1), -2, 2)
    body, neck, beak, head = by_class(1.6, 0.2), by_class(1.02, 0.48), by_class(0.92, 0.3), by_class(0.4, -0.04)
    scale, angle, facing = uniform(0.36, 0.52), uniform(-0.35, 0.35), np.sign(uniform(-1, 1))
    x, y_ = col - uniform(-0.25, 0.25), row - uniform(-0.2, 0.3)
    u = (x * np.cos(angle) + y_ * np.sin(angle)) * facing / scale
    v = (y_ * np.cos(angle) - x * np.sin(angle)) / scale

    # Each part as coverage in [0, 1] of every pixel, from the signed distance to its outline
    def cover(distance):
        return np.clip(0.5 - distance * scale * size / 3, 0, 1)
    def ellipse(u0, v0, half_u, half_v):
        return cover((np.hypot((u - u0) / half_u, (v - v0) / half_v) - 1) * half_v)
    def stick(u0, v0, du, dv, length, width, end_width):
        along = np.clip(((u - u0) * du + (v - v0) * dv) / length, 0, 1)
        return cover(np.hypot(u - u0 - along * length * du, v - v0 - along * length * dv) - width - (end_width - width) * along)
    lean, droop = uniform(0.2, 0.9), uniform(-0.1, 0.4)
    head_u, head_v = 0.7 * body + neck * np.sin(lean), -0.35 - neck * np.cos(lean)
    bird = np.maximum(ellipse(0, 0, body, 0.75), stick(0.7 * body, -0.35, np.sin(lean), -np.cos(lean), neck, 0.34, 0.2))
    bird = np.maximum(bird, ellipse(head_u, head_v, head, head))
    bill = stick(head_u + 0.25, head_v, np.cos(droop), np.sin(droop), beak, 0.17, 0.03)
    wing = ellipse(-0.25, -0.1, 0.6 * body, 0.45)[..., None]

    plumage = uniform(0.1, 0.85, 3) * (1 - wing * uniform(0, 0.5, 1))
    bill_colour = np.concatenate([uniform(0.3, 0.9, 1), uniform(0.2, 0.7, 1), uniform(0.05, 0.3, 1)], -1)
    alpha = np.maximum(bird, bill)
    image += alpha[..., None] * (np.where((bill > bird)[..., None], bill_colour, plumage) - image)
    image += 0.06 * normal(size, size, 3)
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8).transpose(0, 3, 1, 2), alpha > 0.5


def load_split(meta, name, size, cache="runs/cache", difficulty=0.2):
    """Pixels of one split (train, val or test), decoded once and kept as a memory map in `cache`: every
    image resized to S x S, S = size * 256 / 224 (the built-in set: S = size, drawn by draw_birds with
    `difficulty`). Raises BadInput naming images that are missing or unreadable."""
    rows = np.flatnonzero(meta.split == SPLITS.index(name))
    y, a, g = (torch.from_numpy(values[rows]) for values in (meta.y, meta.a, meta.g))
    if meta.kind == "synthetic":
        files, S, identity = [f"{name}/{i:05d}" for i in range(len(rows))], size, difficulty
        fill = partial(_draw_all, y.numpy(), a.numpy(), S, difficulty, SPLITS.index(name))
    else:
        files, S = [meta.files[i] for i in rows], round(size * 256 / 224)
        root, identity = _find_images(meta.root, files, name)
        fill = partial(_decode_all, [root / file for file in files], S)
    version = 1  # goes up when _decode_all or draw_birds makes other pixels
    key = hashlib.sha256(json.dumps([version, files, identity]).encode()).hexdigest()[:12]
    folder = Path(cache) / f"{meta.kind}-{name}-{S}px-{key}"
    if not folder.exists():
        need, free = len(files) * 3 * S * S, shutil.disk_usage(_existing_parent(folder)).free
        if need > free:
            raise BadInput(f"{folder}: the decoded {name} split needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
                           "point --cache to a larger disk")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as unfinished:
            fill(Path(unfinished) / "done")
            with contextlib.suppress(OSError):  # another process was faster: its result is the same
                os.rename(Path(unfinished) / "done", folder)
    arrays = {f.stem: torch.from_numpy(np.load(f, mmap_mode="c")) for f in folder.glob("*.npy")}
    return Split(y=y, a=a, g=g, files=files, groups=meta.groups, **arrays)


def _existing_parent(path):
    return next(p for p in path.absolute().parents if p.exists())


def _find_images(root, files, name):
    """The folder that the file names are relative to, and [size, mtime] per image for the cache key."""
    root = next((root / folder for folder in IMAGE_FOLDERS if (root / folder / files[0]).is_file()), root)
    identity, missing = [], []
    for file in files:
        try:
            stat = os.stat(root / file)
            identity.append([stat.st_size, stat.st_mtime_ns])
        except OSError:
            missing.append(file)
    if missing:
        raise BadInput(f"{root}: {len(missing)} of the {len(files)} images listed for {name} are missing "
                       f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}); was the archive unpacked completely?")
    return root, identity


def _decode_all(paths, S, folder):
    """images.npy (N, 3, S, S) uint8, RGB, the whole image squeezed to a square, and original_sizes.npy."""
    folder.mkdir()
    images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (len(paths), 3, S, S))

    def decode(i):
        try:
            with Image.open(paths[i]) as image:
                images[i] = np.asarray(image.convert("RGB").resize((S, S), Image.BILINEAR)).transpose(2, 0, 1)
                return image.height, image.width
        except (OSError, ValueError, SyntaxError) as error:  # PIL raises SyntaxError on a broken PNG
            return f"{paths[i]} ({error})"

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # PIL decodes without holding the interpreter lock
        sizes = list(tqdm(pool.map(decode, range(len(paths))), "decode", len(paths), disable=None, leave=False))
    bad = [size for size in sizes if isinstance(size, str)]
    if bad:
        raise BadInput(f"{len(bad)} of {len(paths)} images cannot be decoded: {'; '.join(bad[:3])}"
                       f"{'; ...' if len(bad) > 3 else ''}; replace them or take their rows out of the metadata")
    images.flush()
    np.save(folder / "original_sizes.npy", np.array(sizes))


def _draw_all(y, a, S, difficulty, stream, folder):
    """The built-in set's images.npy, masks.npy and original_sizes.npy, the same for every caller."""
    folder.mkdir()
    rng = np.random.default_rng([0, stream])
    drawn = [draw_birds(y[i:i + 500], a[i:i + 500], rng, S, difficulty)
             for i in tqdm(range(0, len(y), 500), "draw", disable=None, leave=False)]
    for name, parts in zip(("images", "masks"), zip(*drawn)):
        np.save(folder / f"{name}.npy", np.concatenate(parts))
    np.save(folder / "original_sizes.npy", np.full((len(y), 2), S))


def batches(split, batch_size, order=None, device="cpu"):
    """Yield (index (B,), images uint8 (B, 3, S, S)) on `device`, in `order` (default: as stored). For a
    GPU, the next batch is read from the memory map while the caller works on this one."""
    indices = (torch.arange(len(split.y)) if order is None else order).split(batch_size)
    if torch.device(device).type == "cpu":
        yield from ((index, split.images[index]) for index in indices)
        return

    def read(index):
        return split.images[index].pin_memory() if torch.cuda.is_available() else split.images[index]

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(read, indices[0])
        for k, index in enumerate(indices, 1):
            images = coming.result()
            if k < len(indices):
                coming = pool.submit(read, indices[k])
            yield index, images.to(device, non_blocking=True)


def center(images, size):
    """Evaluation transform: uint8 (B, 3, S, S) -> float (B, 3, size, size) in [0, 1], centre crop.
    Together with the resize to S x S: resize (256, 256), crop 224, as in every repository of the field."""
    start = (images.shape[-1] - size) // 2
    return images[..., start:start + size, start:start + size].float() / 255


def augment(images, original_sizes, size, how="table1", generator=None):
    """Training transform: uint8 (B, 3, S, S) -> float (B, 3, size, size) in [0, 1]. how: 'table1' (the
    paper's Table 1), 'crop-flip' (its first two rows, all that the released code uses), 'none'.
    All of it is one homography per image, so pixels are interpolated once, on the images' device."""
    if how == "none":
        return center(images, size)
    return warp(images, *homographies(original_sizes, **draw_augmentation(original_sizes, how, generator)), size)


def draw_augmentation(original_sizes, how, generator=None):
    """Table 1 for B images (supplement): crop (B, 4) top, left, height, width in original pixels, drawn
    as torchvision's RandomResizedCrop(scale 0.7-1, ratio 0.75-1.33) does; flip (B,); angle (B,) degrees
    +-15; shift (B, 2) x, y in fractions of the frame +-0.1; zoom (B,) 0.9-1.1 (Table 1 calls it ratio);
    corners (B, 4, 2) x, y moved inwards by up to a tenth of the frame, for half of the images."""
    B, (height, width) = len(original_sizes), original_sizes.double().T
    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)
    area, ratio = uniform(0.7, 1, 10, B) * height * width, uniform(math.log(0.75), math.log(1.33), 10, B).exp()
    h, w = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (h <= height) & (w <= width)  # ten attempts, the first that fits counts, else a central crop
    first = fits.int().argmax(0, keepdim=True)
    h = torch.where(fits.any(0), h.gather(0, first)[0], torch.minimum(height, (width / 0.75).round()))
    w = torch.where(fits.any(0), w.gather(0, first)[0], torch.minimum(width, (height * 1.33).round()))
    top, left = (((n - m + 1) * uniform(0, 1, B)).floor() for n, m in ((height, h), (width, w)))
    central = ~fits.any(0)
    top, left = torch.where(central, ((height - h) / 2).floor(), top), torch.where(central, ((width - w) / 2).floor(), left)
    drawn = {"crop": torch.stack([top, left, h, w], 1), "flip": uniform(0, 1, B) < 0.5}
    if how == "table1":
        inwards = uniform(0, 0.1, B, 4, 2) * (uniform(0, 1, B, 1, 1) < 0.5)
        corners = torch.tensor([[0, 0], [1, 0], [1, 1], [0, 1]], dtype=torch.float64)
        drawn |= {"angle": uniform(-15, 15, B), "shift": uniform(-0.1, 0.1, B, 2), "zoom": uniform(0.9, 1.1, B),
                  "corners": corners + inwards * (1 - 2 * corners)}
    return drawn


def homographies(original_sizes, crop, flip, angle=None, shift=None, zoom=None, corners=None):
    """3 x 3 matrices (B, 3, 3) from output to input coordinates, both running from -1 to 1 across the
    frame: into the whole image, and a list of those into the frames in between, outside of which
    torchvision's operations, applied one after the other, see black."""
    B, one = len(crop), torch.ones(len(crop), dtype=torch.float64)
    top, left, h, w = crop.double().T
    height, width = original_sizes.double().T
    mirror = 1 - 2 * flip.double()
    to_image = _affine(w / width * mirror, 0 * one, (2 * left + w) / width - 1, 0 * one, h / height, (2 * top + h) / height - 1)
    if angle is None:
        return to_image, []
    radians = angle.double() * math.pi / 180
    rotate = _affine(radians.cos(), -radians.sin(), 0 * one, radians.sin(), radians.cos(), 0 * one)
    move = _affine(1 / zoom, 0 * one, -2 * shift[:, 0] / zoom, 0 * one, 1 / zoom, -2 * shift[:, 1] / zoom)
    # Perspective: the homography that takes the four moved corners (u, v) back to (x, y) = (+-1, +-1)
    u, v = (2 * corners.double() - 1).unbind(-1)  # (B, 4)
    x, y = torch.tensor([[-1, 1, 1, -1], [-1, -1, 1, 1]], dtype=torch.float64)[:, None].expand(2, B, 4)
    zero, ones = torch.zeros_like(u), torch.ones_like(u)
    system = torch.cat([torch.stack([u, v, ones, zero, zero, zero, -x * u, -x * v], -1),
                        torch.stack([zero, zero, zero, u, v, ones, -y * u, -y * v], -1)], 1)  # (B, 8, 8)
    p = torch.linalg.solve(system, torch.cat([x, y], 1))
    perspective = torch.cat([p, torch.ones(B, 1, dtype=p.dtype)], 1).view(B, 3, 3)
    moved = move @ perspective
    rotated = rotate @ moved
    return to_image @ rotated, [perspective, moved, rotated]


def _affine(a, b, c, d, e, f):
    row = torch.tensor([0, 0, 1], dtype=torch.float64).expand(len(a), 3)
    return torch.stack([torch.stack([a, b, c], -1), torch.stack([d, e, f], -1), row], 1)


def warp(images, to_image, frames, size):
    """Sample uint8 (B, 3, S, S) through homographies (B, 3, 3) -> float (B, 3, size, size) in [0, 1],
    bilinear, black outside any of `frames`."""
    line = (torch.arange(size, dtype=torch.float64) + 0.5) * 2 / size - 1  # pixel centres
    # h0 * u + (h1 * v + h2) for the numerators x, y and the denominator w: one column plus one row each
    across = (to_image[..., :1] * line).float().to(images.device)[:, :, None, :]  # (B, 3, 1, size)
    down = (to_image[..., 1:2] * line + to_image[..., 2:]).float().to(images.device)[..., None]  # (B, 3, size, 1)
    low, high = (edge.float().to(images.device) for edge in _visible(frames, line)) if frames else (None, None)
    column = line.float().to(images.device)
    out = torch.empty(len(images), 3, size, size, device=images.device)
    step = max(1, 400_000 // size ** 2) if images.device.type == "cpu" else len(images)  # what a CPU's cache holds
    for part in (slice(i, i + step) for i in range(0, len(images), step)):
        x, y, w = (across[part] + down[part]).unbind(1)
        grid = torch.empty(*w.shape, 2, device=images.device)
        torch.div(x, w, out=grid[..., 0])
        torch.div(y, w, out=grid[..., 1])
        pixels = F.grid_sample(images[part].float(), grid, padding_mode="border", align_corners=False)
        shown = ((column >= low[part]) & (column <= high[part]))[:, None] / 255 if frames else 1 / 255
        torch.mul(pixels, shown, out=out[part])
    return out


def _visible(frames, line):
    """First and last visible column of each output row, both (B, size, 1). 'Inside a frame' is w +- x >= 0
    and w +- y >= 0, half-planes in (u, v), so what is visible is convex: one interval a row."""
    planes = torch.cat([m[:, 2:] + sign * m[:, :2] for m in frames for sign in (1, -1)], 1)  # (B, 12, 3)
    slope = planes[..., 0].where(planes[..., 0].abs() > 1e-9, torch.tensor(1e-9, dtype=planes.dtype))
    crossing = -(planes[..., 1:2] * line + planes[..., 2:]) / slope[..., None]  # (B, 12, size)
    rising = slope[..., None] > 0
    return (crossing.where(rising, torch.tensor(-math.inf, dtype=line.dtype)).amax(1)[..., None],
            crossing.where(~rising, torch.tensor(math.inf, dtype=line.dtype)).amin(1)[..., None])


# ------------------------------------------------------------------------------------------------
# 2. Models and checkpoints
# ------------------------------------------------------------------------------------------------

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # section 4.1


def build_model(arch, n_classes, size, weights="none"):
    """A classifier with logits (B, n_classes) for images (B, 3, size, size) passed through `normalize`.
    arch: resnet10 (torchvision's ResNet, one basic block per stage, for the built-in set), any torchvision
    name, or any timm name. weights: 'default' (published ImageNet weights), 'none', or a file; all but
    the head is taken from them. Raises BadInput."""
    torchvision_names = torchvision.models.list_models(  # these two have auxiliary heads and their own normalisation
        module=torchvision.models, exclude=["googlenet", "inception_v3"])
    mean, std, head, state = IMAGENET_MEAN, IMAGENET_STD, None, None
    if arch == "resnet10":
        block = torchvision.models.resnet.BasicBlock
        model = torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=n_classes)
    elif arch in torchvision_names:
        model = torchvision.models.get_model(arch, num_classes=n_classes)
        if weights == "default":
            state = _fetch_torchvision(torchvision.models.get_model_weights(arch).DEFAULT)
    elif arch in timm.list_models():
        model = _build_timm(arch, n_classes, size, weights)
        mean, std, head = (model.pretrained_cfg[key] for key in ("mean", "std", "classifier"))
    else:
        similar = [name for name in torchvision_names + timm.list_models() if name.startswith(arch[:4])]
        raise BadInput(f"--arch {arch}: neither torchvision nor timm has it; similar names: {', '.join(similar[:5]) or 'none'}")
    if weights == "default" and arch == "resnet10":
        raise BadInput("--weights default: nobody publishes weights for resnet10; use --weights none")
    if weights not in ("default", "none"):
        state = _read_weights(weights)
    if state is not None:
        _load_body(model, state, head, weights)
    set_normalization(model, mean, std)
    try:
        with torch.inference_mode():
            shape = tuple(model.eval()(torch.zeros(2, 3, size, size)).shape)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"--arch {arch} does not take {size} x {size} images ({reason}); change --size") from error
    assert shape == (2, n_classes), f"{arch} returns {shape}, expected logits (2, {n_classes})"
    return model


def set_normalization(model, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Tell `normalize` the mean and std per colour that the model's weights were trained with. They are kept as buffers that
    are not in the state dict, whose keys stay torchvision's or timm's."""
    for name, values in (("mean", mean), ("std", std)):
        buffer = torch.tensor(values, device=next(model.parameters()).device).view(3, 1, 1)
        model.register_buffer(f"input_{name}", buffer, persistent=False)


def normalize(x, model):
    """Images (B, 3, H, W) in [0, 1] -> what the model's weights were trained on (see set_normalization)."""
    return (x - model.input_mean) / model.input_std


def _build_timm(arch, n_classes, size, weights):
    cfg = timm.get_pretrained_cfg(arch)
    options = {"img_size": size} if cfg and cfg.fixed_input_size else {}
    try:
        return timm.create_model(arch, pretrained=weights == "default", num_classes=n_classes, **options)
    except (OSError, RuntimeError) as error:  # OSError: the hub's errors when there is no network
        raise BadInput(f"--weights default: cannot fetch the weights of {arch} ({type(error).__name__}); bring model.safetensors "
                       f"of {cfg.hf_hub_id if cfg else arch} yourself and pass --weights FILE, or use --weights none") from error


def _fetch_torchvision(weights):
    name = weights.url.rsplit("/", 1)[-1]
    try:
        return weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError, a wrong hash a RuntimeError
        raise BadInput(f"--weights default: cannot fetch {weights.url} ({error}); bring {name} yourself and pass --weights FILE "
                       f"(or put it into {torch.hub.get_dir()}/checkpoints), or use --weights none") from error


def _read_weights(path):
    """A state dict from .pth or .safetensors, plain or under 'state_dict' or 'model'."""
    try:
        return timm.models.load_state_dict(str(path), use_ema=False)
    except Exception as error:  # noqa: BLE001 - a damaged file fails in as many ways as there are formats
        raise BadInput(f"--weights {path}: not a readable state dict ({type(error).__name__}); expected a .pth or "
                       ".safetensors file, 'default' or 'none'") from error


def _load_body(model, state, head, source):
    """Load everything but the head (default: the last layer with parameters); anything else must fit."""
    own = model.state_dict()
    head = head or next(reversed(list(model.named_parameters())))[0].rsplit(".", 1)[0]
    heads = tuple(f"{name}." for name in ([head] if isinstance(head, str) else head))
    body = {key: value for key, value in state.items() if not key.startswith(heads)}
    wrong = [f"{key} missing" for key in own if key not in body and not key.startswith(heads) and "num_batches" not in key]
    wrong += [f"{key} unknown" for key in body if key not in own]
    wrong += [f"{key} is {tuple(body[key].shape)}, not {tuple(own[key].shape)}" for key in body
              if key in own and body[key].shape != own[key].shape]
    if wrong:
        raise BadInput(f"--weights {source} do not fit the architecture: {len(wrong)} differences ({'; '.join(wrong[:3])})")
    model.load_state_dict(body, strict=False)


@contextlib.contextmanager
def atomic(path):
    """Gives a temporary path beside `path`, renamed to it if all goes well, removed if not."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, model, **fields):
    """Write model state, its mean and std, and `fields` (tensors and plain types only: weights_only)."""
    statistics = {name: getattr(model, f"input_{name}").flatten().tolist() for name in ("mean", "std")}
    with atomic(path) as temporary:
        torch.save({"model": model.state_dict(), **statistics, **fields}, temporary)


def load_checkpoint(path):
    """What save_checkpoint wrote, on the CPU. Raises BadInput for a missing, foreign or truncated file."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such checkpoint; run train_erm.py first") from error
    except Exception as error:  # noqa: BLE001 - damaged archives raise anything from EOFError to RuntimeError
        raise BadInput(f"{path}: not a readable checkpoint ({type(error).__name__}); is it truncated?") from error
    if not isinstance(checkpoint, dict) or not {"model", "arch", "n_classes", "size", "mean", "std"} <= checkpoint.keys():
        raise BadInput(f"{path}: not a checkpoint of this project (it lacks model, arch, n_classes, size, mean or std)")
    return checkpoint


def check_stage(checkpoint, path):
    """Raises BadInput unless a training stage wrote the checkpoint, with what later stages take from it."""
    if not {"data", "args", "metrics"} <= checkpoint.keys():
        raise BadInput(f"{path}: not a checkpoint of a training stage (it lacks data, args or metrics)")


def load_model(path, device="cpu"):
    """The model of a checkpoint, in eval mode on `device`, and the checkpoint itself."""
    checkpoint = load_checkpoint(path)
    model = build_model(checkpoint["arch"], checkpoint["n_classes"], checkpoint["size"])
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()[:120]
        raise BadInput(f"{path}: its weights are not those of a {checkpoint['arch']} ({reason})") from error
    set_normalization(model, checkpoint["mean"], checkpoint["std"])
    return model.to(device).eval(), checkpoint


# ------------------------------------------------------------------------------------------------
# 3. Evaluation
# ------------------------------------------------------------------------------------------------


def predict(model, split, size, device="cpu", batch_size=256):
    """Logits (N, n_classes) of a split on the CPU: eval mode, evaluation transform, mode put back."""
    training = model.training
    model.eval()
    with torch.inference_mode():
        logits = [model(normalize(center(images, size), model)).cpu()
                  for _, images in tqdm(batches(split, batch_size, device=device), "evaluate",
                                        math.ceil(len(split.y) / batch_size), disable=None, leave=False)]
    model.train(training)
    return torch.cat(logits)


def group_report(predicted, y, g, groups):
    """Group accuracies in [0, 1] with counts, from predicted and true classes and groups, each (N,).
    acc_mean: over the images as they are; acc_mean_train_mix: groups weighted by their training counts
    (what group_DRO and WILDS call 'adjusted' or 'average'); groups without images count in neither, nor
    as worst group."""
    report, present = [], []
    for group in groups:
        member = g == group["group"]
        n, correct = int(member.sum()), int((predicted[member] == y[member]).sum())
        report.append({"group": group["group"], "name": group["name"], "n": n, "correct": correct,
                       "acc": correct / n if n else None, "minority": group["minority"]})
        present += [(report[-1], group["train_n"])] if n else []
    worst = min((row for row, _ in present), key=lambda row: row["acc"])
    return {"groups": report, "worst_group": worst["group"], "acc_worst": worst["acc"],
            "acc_mean": sum(row["correct"] for row, _ in present) / sum(row["n"] for row, _ in present),
            "acc_mean_train_mix": sum(row["acc"] * n for row, n in present) / sum(n for _, n in present)}


def evaluate(model, split, size, device="cpu", batch_size=256):
    """group_report of a model on a split."""
    return group_report(predict(model, split, size, device, batch_size).argmax(1), split.y, split.g, split.groups)


def percent(report):
    """Group accuracies of a report in percent, in one line, minority groups starred."""
    return " ".join(f"{100 * g['acc']:5.1f}{'*' if g['minority'] else ''}" for g in report["groups"] if g["n"])


# ------------------------------------------------------------------------------------------------
# 4. Neurons and masks
# ------------------------------------------------------------------------------------------------

# A neuron is a pair (layer, index). Unit 'channel': an output filter of a convolution, or an output row
# of a linear layer, with all its weights; unit 'weight': one weight, by its place in the flattened layer.
# Zeroing a filter in front of BatchNorm makes its channel the constant beta - gamma * mean / std, not 0.
MODIFICATIONS = ("zero", "random-init", "random-noise")
CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


@dataclass
class Variant:
    """A modified model: which neurons, how (see `modified`), and the groups it is evaluated on (default all)."""

    neurons: list
    how: str = "zero"
    sigma: float = 0.0
    seed: int = 0
    groups: tuple = None


def is_transformer(model):
    """Whether any module attends: torch's own attention, or one with a `qkv` projection."""
    return any(isinstance(m, torch.nn.MultiheadAttention) or hasattr(m, "qkv") for m in model.modules())


def neuron_unit(model, unit="auto"):
    """'channel' or 'weight': --unit, where auto is channel, in transformers weight."""
    return {"auto": "weight" if is_transformer(model) else "channel"}.get(unit, unit)


def prunable_layers(model):
    """The weights that hold neurons, {layer: parameter} in network order: of every convolution, downsampling
    included; in a transformer of every linear layer instead (qkv, proj, fc1, fc2; torchvision keeps qkv as
    ...in_proj_weight, which is listed by that name). The classifier head, which may itself be a convolution,
    and normalisation layers never. What a convolutional network computes with linear layers (VGG, ConvNeXt)
    is left out, as the paper's neurons are convolutional channels."""
    kind, layers = torch.nn.Linear if is_transformer(model) else CONVOLUTIONS, {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.MultiheadAttention) and module.in_proj_weight is not None:
            layers[f"{name}.in_proj_weight"] = module.in_proj_weight
        if isinstance(module, kind):
            layers[name] = module.weight
    heads = classifier_heads(model)
    return {name: weight for name, weight in layers.items() if name not in heads}


def classifier_heads(model):
    """Names of the layers that give the logits: what timm calls classifier, else the last linear layer or convolution."""
    named = getattr(model, "pretrained_cfg", {}).get("classifier") or [
        name for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, *CONVOLUTIONS))][-1]
    return (named,) if isinstance(named, str) else tuple(named)


def _norms(tensor, unit):
    """l2 norm of each neuron's part of a layer's weight or gradient, (n,)."""
    return tensor.detach().flatten(1).norm(dim=1) if unit == "channel" else tensor.detach().abs().flatten()


def magnitude_scores(model, unit="channel"):
    """||z_i||_2 of section 2.1.1, {layer: (n,)}: the same for every group."""
    return {name: _norms(weight, unit) for name, weight in prunable_layers(model).items()}


def gradient_scores(model, split, index, size, unit="channel", device="cpu", batch_size=128):
    """||v(i, j)||_2 of section 2.1.1, {layer: (n,)}: l2 norm of the gradient of the mean cross entropy of the
    logits over the images `index` of a split with respect to each neuron. In eval mode and without
    augmentation; leaves no .grad and the mode as it was."""
    layers, training = prunable_layers(model), model.training
    total = {name: torch.zeros_like(weight) for name, weight in layers.items()}
    model.eval()
    try:
        with torch.enable_grad():
            for part, images in batches(split, batch_size, index, device):
                logits = model(normalize(center(images, size), model))
                loss = F.cross_entropy(logits, split.y[part].to(device), reduction="sum") / len(index)
                for name, v in zip(layers, torch.autograd.grad(loss, layers.values(), allow_unused=True)):
                    total[name] += 0 if v is None else v  # None: an auxiliary branch that eval mode skips
    finally:
        model.train(training)
    return {name: _norms(v, unit) for name, v in total.items()}


def worst_images(logits, y, index, generator, highest=256, draw=128):
    """`draw` images at random of the `highest` with the largest cross entropy among `index` (section 4.1,
    2.2.1); all arguments over one split: logits (N, C), y (N,), index (n,)."""
    loss = F.cross_entropy(logits[index], y[index], reduction="none")
    worst = index[loss.topk(min(highest, len(index))).indices]
    return worst[torch.randperm(len(worst), generator=generator)[:draw]]


def top_neurons(scores, k):
    """The k neurons with the LARGEST scores over all layers given, largest first; of equals, the one in the
    earlier layer and then of the lower index. Raises BadInput if there are fewer than k."""
    flat, sizes = torch.cat(list(scores.values())), [len(values) for values in scores.values()]
    if not 1 <= k <= len(flat):
        raise BadInput(f"top {k} of {len(flat)} neurons: k must be 1 to {len(flat)}")
    enough = (flat >= flat.topk(k).values[-1]).nonzero()[:, 0]
    best = enough[flat[enough].sort(descending=True, stable=True).indices[:k]]
    return locate(best.tolist(), dict(zip(scores, sizes)))


def locate(positions, sizes):
    """Positions in the concatenation of layers of so many neurons, {layer: n} -> list of (layer, index)."""
    names, starts = list(sizes), np.cumsum([0, *sizes.values()])
    layers = np.searchsorted(starts, positions, side="right") - 1
    return [(names[layer], int(position - starts[layer])) for layer, position in zip(layers, positions)]


def _view(weight, index, unit):
    return weight.detach()[index if unit == "channel" else np.unravel_index(index, weight.shape)]


def neuron_masks(model, neurons, unit="channel"):
    """The mask m of section 2.1.1, {parameter name: boolean tensor of the weight's shape}, False at `neurons`; only
    parameters that hold one of them are in it. A mask takes a quarter of its parameter's memory."""
    layers, names = prunable_layers(model), {id(p): name for name, p in model.named_parameters()}
    indices, masks = {}, {}
    for layer, index in neurons:
        indices.setdefault(layer, []).append(index)
    for layer, chosen in indices.items():
        mask = torch.ones(layers[layer].shape, dtype=torch.bool, device=layers[layer].device)
        (mask if unit == "channel" else mask.view(-1))[chosen] = False
        masks[names[id(layers[layer])]] = mask
    return masks


@contextlib.contextmanager
def modified(model, neurons, how="zero", sigma=0.0, seed=0, unit="channel"):
    """Inside the `with`, neurons are zero, epsilon (random-init) or their weights + epsilon (random-noise),
    epsilon ~ N(0, sigma^2) drawn on the CPU in the order of `neurons`; after it the weights are what they
    were, bit for bit, whatever happened inside. Biases stay. Raises BadInput if it would do nothing new."""
    if how not in MODIFICATIONS or (how != "zero" and not sigma > 0):
        raise BadInput(f"modification {how} with sigma {sigma}: expected one of {', '.join(MODIFICATIONS)}, the random ones with "
                       "sigma > 0")
    layers, generator = prunable_layers(model), torch.Generator().manual_seed(seed)
    places = [_view(layers[layer], index, unit) for layer, index in neurons]
    before = [place.clone() for place in places]
    try:
        for place in places:
            epsilon = 0 if how == "zero" else sigma * torch.randn(place.shape, generator=generator).to(place.device)
            place.copy_(place + epsilon if how == "random-noise" else torch.zeros_like(place) + epsilon)
        yield
    finally:
        for place, value in zip(places, before):
            place.copy_(value)


class _Reached(Exception):
    """Ends a forward pass at the module that it was to reach."""


@contextlib.contextmanager
def _replaced(outputs):
    """Inside the `with`, modules return outputs[module] without running."""
    for module, out in outputs.items():
        module.forward = lambda *_, out=out, **__: out
    try:
        yield
    finally:
        for module in outputs:
            del module.forward


def _run_to(model, x, done, kept):
    """Run on from `kept` until the last module of `done` has its output. Returns {module: output} of `done`, of
    which only the last is real: the others are NaN of the same shape, without memory of their own."""
    def blank(out):
        return out.new_full((1,) * out.dim(), math.nan).expand(out.shape)
    found = {module: blank(out) for module, out in kept.items()}
    def keep(module, _, out):
        if module is done[-1]:
            found[module] = out
            raise _Reached
        if isinstance(out, torch.Tensor) and out.is_floating_point():
            found[module] = blank(out)
    hooks = [module.register_forward_hook(keep) for module in done if module not in kept]
    try:
        with _replaced(kept), contextlib.suppress(_Reached):
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return {module: found[module] for module in done if module in found}


def stages(model, x):
    """Where the forward pass of images x (B, 3, H, W) can be cut, so that what follows needs nothing of what came
    before but one tensor: stem, blocks, head. Returns cuts, a list in network order of the modules finished by
    then (the last one's output is that tensor), and {layer: how many cuts lie before it}. Works for any network:
    in front of every prunable layer modules of sequences are tried, with NaN for whatever else was computed; where
    the logits stay the same bit for bit and nothing overwrites the tensor (in-place activations), there is a cut."""
    begin, end, calls, clock = {}, {}, {}, iter(range(10 ** 9))
    def enter(module, _):
        begin.setdefault(module, next(clock))
        calls[module] = calls.get(module, 0) + 1
    def leave(module, _, out):
        end[module] = next(clock) if isinstance(out, torch.Tensor) else math.inf
    hooks = [hook for m in model.modules() for hook in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    with torch.inference_mode():
        try:
            model(x)
        finally:
            for hook in hooks:
                hook.remove()
        starts, modules = {}, dict(model.named_modules())
        for layer in prunable_layers(model):
            path = layer.split(".")  # a weight used without a call of its module counts for the module around it
            around = (modules.get(".".join(path[:n])) for n in range(len(path), -1, -1))
            starts[layer] = begin[next(module for module in around if module in begin)]
        parent = {child: module for module in model.modules() for child in module.children()}
        once = sorted((m for m in end if calls[m] == 1 and end[m] < end[model]), key=end.get)
        sequences = (type(model), torch.nn.Sequential, torch.nn.ModuleList)
        logits, kept, cuts = model(x), {}, []
        ticks = sorted(starts.values())
        for after, before in zip([-1, *ticks], ticks):
            for module in reversed([m for m in once if after < end[m] < before and isinstance(parent[m], sequences)]):
                done = [m for m in once if end[m] <= end[module] and end.get(parent[m], math.inf) > end[module]]
                trial = _run_to(model, x, done, kept)
                value = trial[module].clone()
                with _replaced(trial), contextlib.suppress(RuntimeError):  # an in-place operation on what is not there
                    if torch.equal(model(x), logits) and torch.equal(trial[module], value):
                        kept = trial
                        cuts.append(done)
                        break
        return cuts, {layer: sum(end[done[-1]] < start for done in cuts) for layer, start in starts.items()}


def logits_under(model, x, variants, unit="channel", chain=None):
    """Logits (B, C) of modified models, as (number, logits), and last of the model as it is, as (None, logits);
    x: normalised images (B, 3, H, W). Each variant is computed from its first modified stage on; of the
    unchanged part only the tensor that enters this stage is kept. chain: what `stages` returned."""
    cuts, first = chain or stages(model, x[:1])
    start = [min(first[layer] for layer, _ in variant.neurons) for variant in variants]
    kept, position = {}, 0
    for number in sorted(range(len(variants)), key=start.__getitem__):
        variant = variants[number]
        while position < start[number]:
            kept, position = _run_to(model, x, cuts[start[number] - 1], kept), start[number]
        with _replaced(kept), modified(model, variant.neurons, variant.how, variant.sigma, variant.seed, unit):
            logits = model(x)
        yield number, logits
    with _replaced(kept):
        logits = model(x)
    yield None, logits


def accuracy_under(model, split, size, variants, unit="channel", index=None, device="cpu", batch_size=128):
    """Accuracy of many modified models over the images `index` (default all) of a split. Returns for every
    variant {group: {n, correct_before, correct_after, to_wrong, to_right}}, counts of images. Batches are
    outermost, so memory does not grow with the number of variants. Eval mode, put back afterwards."""
    index = torch.arange(len(split.y)) if index is None else index
    counts, chain, training = [{} for _ in variants], None, model.training
    members = {j: index[split.g[index] == j] for j in split.g[index].unique().tolist()}
    asked = {j: [i for i, v in enumerate(variants) if v.groups is None or j in v.groups] for j in members}
    model.eval()
    with torch.inference_mode(), tqdm(total=sum(len(members[j]) * len(asked[j]) for j in members), desc="trace", unit="image",
                                      unit_scale=True, disable=None, leave=False) as progress:
        try:
            for j in (j for j in members if asked[j]):
                for part, images in batches(split, batch_size, members[j], device):
                    x, y = normalize(center(images, size), model), split.y[part].to(device)
                    chain = chain or stages(model, x[:1])
                    right = {}
                    for number, logits in logits_under(model, x, [variants[i] for i in asked[j]], unit, chain):
                        right[number] = logits.argmax(1) == y
                        progress.update(len(part))
                    for number, i in enumerate(asked[j]):
                        before, after = right[None], right[number]
                        row = {"n": len(part), "correct_before": before.sum(), "correct_after": after.sum(),
                               "to_wrong": (before & ~after).sum(), "to_right": (~before & after).sum()}
                        counts[i][j] = {key: int(value) + counts[i].get(j, {}).get(key, 0) for key, value in row.items()}
        finally:
            model.train(training)
    return counts


def sample_groups(split, most=None, whole=(), seed=0):
    """Indices (n,), in order, of at most `most` images of each group (None: all), drawn without replacement; of
    the groups in `whole` always all."""
    generator, parts = torch.Generator().manual_seed(seed), []
    for group in split.groups:
        members = (split.g == group["group"]).nonzero()[:, 0]
        shuffled = members[torch.randperm(len(members), generator=generator)]
        parts.append(members if group["group"] in whole else shuffled[:most])
    return torch.cat(parts).sort().values


# ------------------------------------------------------------------------------------------------
# 5. Runs: seeds, settings, logs, errors, summaries
# ------------------------------------------------------------------------------------------------

NOT_SETTINGS = ("run", "name", "device", "cache", "resume", "overwrite", "compare", "figure")  # arguments that leave the results alone


def check_flags(args, *positive):
    """Raises BadInput unless the arguments named are positive and --device is there."""
    for name in positive:
        if not getattr(args, name) > 0:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(args, name)}: must be positive")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise BadInput(f"--device {args.device}: {str(error).splitlines()[0]}; use cpu or cuda") from error


def set_seed(seed):
    """Seed NumPy and torch on every device. Same seed, device and versions: same numbers."""
    np.random.seed(seed)
    torch.manual_seed(seed)


def fill_defaults(args, defaults):
    """Give arguments that were left out (None) their default."""
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)


def draw_with_replacement(n, generator, resamples=1000):
    """For a bootstrap: how often each of n images is drawn in n draws with replacement, (resamples, n)."""
    drawn = torch.randint(n, (resamples, n), generator=generator)
    return torch.zeros(resamples, n).scatter_add_(1, drawn, torch.ones(resamples, n))


def plain(args):
    """An argparse namespace as a dict of plain types, for JSON and checkpoints."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}


def write_json(path, content):
    """Write JSON atomically; a number that is not finite raises ValueError instead of becoming NaN."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_lines(path, rows):
    """Write rows as JSON, one a line, atomically."""
    with atomic(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_csv(path, rows, columns=None):
    """Write rows (dicts with the same keys; without any, `columns` alone) as csv with a header, atomically."""
    with atomic(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns or rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def run_state(folder, args):
    """'new', 'unfinished' (to be resumed) or 'finished'. Raises BadInput where going on would spoil what
    `folder` holds: a run with other settings (only --resume may raise --epochs), or an interrupted one
    and no --resume."""
    if args.overwrite or not (folder / "last.pt").exists():
        return "new"
    before, now = json.loads((folder / "args.json").read_text())["args"], plain(args)
    changed = [key for key in now if key not in NOT_SETTINGS and before.get(key) != now[key]]
    extends = args.resume and changed == ["epochs"] and now["epochs"] > before["epochs"]
    if changed and not extends:
        differences = ", ".join(f"{key} {before.get(key)}, now {now[key]}" for key in changed[:4])
        raise BadInput(f"{folder} holds a run with other settings ({differences}); use --overwrite or another --run")
    if (folder / "results.json").exists() and not extends:
        return "finished"
    if not args.resume:
        raise BadInput(f"{folder} holds an interrupted run; --resume continues it, --overwrite starts again")
    return "unfinished"


def start_run(folder, args, state):
    """Make the folder (emptied if the run is new) and write args.json: every resolved argument, the
    command, versions, device and, where the scripts lie in a git checkout, its commit."""
    if state == "new":
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").unlink(missing_ok=True)
    commit = None
    if shutil.which("git"):
        commit = subprocess.run(["git", "-C", Path(__file__).resolve().parent, "rev-parse", "HEAD"],
                                capture_output=True, text=True).stdout.strip() or None
    write_json(folder / "args.json", {
        "args": plain(args), "command": shlex.join(sys.argv), "commit": commit, "python": platform.python_version(),
        "torch": torch.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__,
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.machine()})


@contextlib.contextmanager
def whole_folder(folder, args):
    """Gives a folder with args.json to write results into, which takes the place of `folder` if all goes well; if not,
    `folder` is left as it was."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        start_run(Path(temporary) / "new", args, "new")
        yield Path(temporary) / "new"
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(Path(temporary) / "new", folder)


def reopen(path, data=None, cache="runs/cache", device="cpu", names=("train", "test")):
    """What a later stage starts from: the model of a checkpoint (eval mode), the checkpoint, and the splits `names`
    of its data, or of `data` where they have moved. Raises BadInput if these are not the groups trained on."""
    model, checkpoint = load_model(path, device)
    check_stage(checkpoint, path)
    source = checkpoint["data"]
    meta = read_metadata(data or source["data"], source["attributes"])
    then = [(row["name"], row["n"]) for row in checkpoint["metrics"]["train"]["groups"]]
    now = [(group["name"], group["train_n"]) for group in meta.groups]
    if meta.n_classes != checkpoint["n_classes"] or now != then:
        now, then = (", ".join(f"{name} {n}" for name, n in groups[:8]) for groups in (now, then))
        raise BadInput(f"{data or source['data']} is not what {path} was trained on: training images per group are {now}; in "
                       f"training {then}")
    return model, checkpoint, {name: load_split(meta, name, checkpoint["size"], cache, source["difficulty"]) for name in names}


@contextlib.contextmanager
def one_line_errors(interrupted="finished epochs are kept and --resume continues"):
    """Around a script's main(): BadInput becomes one line on stderr and exit code 2; interrupted: what Ctrl-C leaves."""
    try:
        yield
    except BadInput as error:
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: interrupted; {interrupted}", file=sys.stderr)
        raise SystemExit(130) from None


def summarize(pattern, split="test"):
    """Mean, sample standard deviation and n over finished runs, of a split at the selected epoch. pattern:
    of stage folders, such as 'runs/wb*/erm'. Prints a table, returns {name: (mean, std, n)}."""
    results = [json.loads(Path(path).read_text()) for path in sorted(glob.glob(f"{pattern}/results.json"))]
    if not results:
        raise BadInput(f"{pattern}: no results.json in any such folder")
    reports = [result["splits"][split] for result in results]
    rows = {"worst group": [r["acc_worst"] for r in reports], "mean": [r["acc_mean"] for r in reports],
            "mean, training mix": [r["acc_mean_train_mix"] for r in reports]}
    for j, group in enumerate(reports[0]["groups"]):
        rows[f"{j} {group['name']}{'*' if group['minority'] else ''}"] = [r["groups"][j]["acc"] for r in reports]
    summary = {}
    for name, values in rows.items():
        values = [value for value in values if value is not None]  # a group without images has no accuracy
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
        summary[name] = (float(np.mean(values)) if values else math.nan, spread, len(values))
    for name, (mean, std, n) in summary.items():
        print(f"{name:32s} {100 * mean:6.2f} +- {100 * std:5.2f} %  (n = {n})")
    return summary
