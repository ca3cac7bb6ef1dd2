"""Every layout is read into the same labels, pixels are decoded once, and bad input is named."""

import os
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from common import OFFICIAL_COUNTS, SPLITS, BadInput, batches, center, describe_groups, load_split, read_metadata

from .conftest import COUNTS, labelled_rows, write_celeba, write_images, write_table, write_waterbirds


def counts(meta):
    return tuple(tuple(np.bincount(meta.g[meta.split == i], minlength=4).tolist()) for i in range(3))


def load_all(meta, tmp_path):
    return [load_split(meta, name, 28, tmp_path / "cache") for name in SPLITS]


# ---- layouts


def test_waterbirds_layout(tmp_path, capsys):
    table = write_waterbirds(tmp_path)
    meta = read_metadata(tmp_path)
    assert meta.kind == "waterbirds" and counts(meta) == COUNTS
    assert meta.files[0] == table[1][1] and meta.n_classes == 2
    assert [g["name"] for g in meta.groups] == ["landbird on land", "landbird on water", "waterbird on land", "waterbird on water"]
    assert (meta.g == 2 * meta.y + meta.a).all()
    warning = capsys.readouterr().err
    assert "[13, 5, 4, 10]" in warning and "[3498, 184, 56, 1057]" in warning  # both sets of numbers
    assert [len(split.y) for split in load_all(meta, tmp_path)] == [32, 16, 20]


@pytest.mark.parametrize("layout", ["balancing groups", "subpopbench", "file", "words", "celeba"])
def test_derived_metadata(tmp_path, layout):
    """The forms of other repositories: id,filename,split,y,a beside or above the images, words for splits."""
    rows = labelled_rows(pattern="{number:06d}.jpg" if layout == "celeba" else "{group:03d}.Bird/Bird_{number:04d}_{number}.jpg")
    images, name = {"balancing groups": ("waterbirds/waterbird_complete95_forest2water2", "metadata_waterbirds.csv"),
                    "subpopbench": ("waterbird_complete95_forest2water2", "metadata_waterbirds.csv"),
                    "file": ("", "labels.csv"), "words": ("", "metadata.csv"),
                    "celeba": ("celeba/img_align_celeba", "metadata_celeba.csv")}[layout]
    write_images(tmp_path / images, rows)
    words = ("train", "Val", "test") if layout == "words" else "012"
    write_table(tmp_path, [["id", "filename", "split", "y", "a"]] + [
        [str(i), file, words[split], str(y), str(a)] for i, (file, y, a, split) in enumerate(rows)], name)
    meta = read_metadata(tmp_path / name if layout == "file" else tmp_path)
    assert meta.kind == ("celeba" if layout == "celeba" else "waterbirds") and counts(meta) == COUNTS
    assert [len(split.y) for split in load_all(meta, tmp_path)] == [32, 16, 20]


@pytest.mark.parametrize("form", ["txt", "csv"])
@pytest.mark.parametrize("images", ["img_align_celeba", "img_align_celeba/img_align_celeba", "", "Img/img_align_celeba"])
def test_celeba_layout(tmp_path, form, images):
    rows = write_celeba(tmp_path, form, images)
    meta = read_metadata(tmp_path)
    assert meta.kind == "celeba" and counts(meta) == COUNTS
    labels = {file: (y, a, split) for file, y, a, split in rows}  # joined by name: the csv partition is in reverse order
    assert all(labels[file] == row for file, row in zip(meta.files, zip(meta.y, meta.a, meta.split)))
    load_all(meta, tmp_path)


def test_celeba_folders_of_the_official_archive(tmp_path):
    write_celeba(tmp_path, "txt", "Img/img_align_celeba")
    for folder, name in (("Anno", "list_attr_celeba.txt"), ("Eval", "list_eval_partition.txt")):
        (tmp_path / folder).mkdir()
        shutil.move(tmp_path / name, tmp_path / folder / name)
    assert counts(read_metadata(tmp_path)) == COUNTS
    load_all(read_metadata(tmp_path), tmp_path)


def test_celeba_other_attributes(tmp_path):
    write_celeba(tmp_path)
    meta = read_metadata(tmp_path, ("Male", "Blond_Hair"))
    assert counts(meta)[0] == (13, 4, 5, 10)  # groups 1 and 2 change places
    assert meta.groups[1]["name"] == "Male=0, Blond_Hair=1"


def test_custom_folder_with_more_classes(tmp_path, capsys):
    rows = [(f"{s}/{y}{a}{i}.png", y, a, s) for s in range(3) for y in range(3) for a in range(2) for i in range(2 + 3 * (y == a))]
    write_images(tmp_path, rows)
    write_table(tmp_path, [["img_filename", "y", "split", "place"]] + [[f, str(y), str(s), str(a)] for f, y, a, s in rows])
    meta = read_metadata(tmp_path)
    assert (meta.kind, meta.n_classes, len(meta.groups)) == ("other", 3, 6)
    assert [g["minority"] for g in meta.groups] == [False, True, True, False, False, False]
    assert not capsys.readouterr().err


def test_minority_groups_of_the_paper():
    for kind, minority in (("waterbirds", [1, 2]), ("celeba", [3])):
        groups = describe_groups("abcd", OFFICIAL_COUNTS[kind][0], 2)
        assert [g["group"] for g in groups if g["minority"]] == minority


def test_official_waterbirds_metadata(real_data, capsys):
    meta = read_metadata(real_data / "waterbirds")
    assert [list(c) for c in counts(meta)] == OFFICIAL_COUNTS["waterbirds"] and not capsys.readouterr().err
    with pytest.raises(BadInput, match="of the 4795 images listed for train are missing"):
        load_split(meta, "train", 28)


def test_official_celeba_metadata(real_data, capsys):
    started = time.time()
    meta = read_metadata(real_data / "celeba")
    print(f"{time.time() - started:.2f} s for {len(meta.y)} rows")
    assert [list(c) for c in counts(meta)] == OFFICIAL_COUNTS["celeba"] and not capsys.readouterr().err


def test_real_images(real_data, tmp_path, capsys):
    celeba = read_metadata(real_data / "celeba_sample")
    assert "no val image in group 3 (blond man)" in capsys.readouterr().err
    assert load_split(celeba, "val", 28, tmp_path).images.shape == (50, 3, 32, 32)
    birds = read_metadata(real_data / "birds50")
    assert counts(birds) == ((1078, 59, 21, 392), (98, 99, 35, 33), (283, 292, 98, 99))
    assert load_split(birds, "val", 28, tmp_path).images.shape == (265, 3, 32, 32)


# ---- pixels


def test_pixels_equal_the_usual_evaluation_transform(tmp_path):
    """Resize((256, 256)), CenterCrop(224) of torchvision on the PIL image, here at 112: 128 and 112."""
    write_waterbirds(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 150), dtype=np.uint8)).save(tmp_path / "000.Bird/Bird_0001_1.jpg")
    meta = read_metadata(tmp_path)
    split = load_split(meta, "train", 112, tmp_path / "cache")
    with Image.open(tmp_path / meta.files[0]) as image:  # a grey image
        expected = TF.to_tensor(TF.center_crop(TF.resize(image.convert("RGB"), (128, 128)), 112))
    assert torch.equal(center(split.images[:1], 112)[0], expected)
    assert split.original_sizes[0].tolist() == [90, 150] and split.original_sizes[1].tolist() == [32, 40]


def test_decoded_once_and_again_when_an_image_changes(tmp_path):
    write_waterbirds(tmp_path)
    meta = read_metadata(tmp_path)
    before = load_split(meta, "val", 28, tmp_path / "cache")
    folder, = (tmp_path / "cache").iterdir()
    stamp = (folder / "images.npy").stat().st_mtime_ns
    load_split(meta, "val", 28, tmp_path / "cache")
    assert (folder / "images.npy").stat().st_mtime_ns == stamp and len(list((tmp_path / "cache").iterdir())) == 1
    first = tmp_path / before.files[0]
    Image.new("RGB", (30, 30), "white").save(first)
    after = load_split(meta, "val", 28, tmp_path / "cache")
    assert after.images[0].min() > 250 and torch.equal(after.images[1:], before.images[1:])


def test_images_are_mapped_not_held(tmp_path):
    write_waterbirds(tmp_path)
    split = load_split(read_metadata(tmp_path), "train", 28, tmp_path / "cache")
    mapped = open(f"/proc/{os.getpid()}/maps").read() if os.path.exists("/proc/self/maps") else "images.npy"
    assert "images.npy" in mapped and split.images.dtype == torch.uint8


@pytest.mark.parametrize("device", ["cpu", "meta"])  # "meta" takes the read-ahead path of a GPU
def test_batches(tmp_path, device):
    write_waterbirds(tmp_path)
    split = load_split(read_metadata(tmp_path), "train", 28, tmp_path / "cache")
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    parts = list(batches(split, 12, order, device))
    assert torch.equal(torch.cat([index for index, _ in parts]), order)
    assert [len(images) for _, images in parts] == [12, 12, 8]
    if device == "cpu":
        assert torch.equal(torch.cat([images for _, images in parts]), split.images[order])


def test_synthetic_is_the_same_everywhere_and_has_masks(tmp_path):
    meta = read_metadata("synthetic")
    assert [list(c) for c in counts(meta)] == OFFICIAL_COUNTS["waterbirds"]
    a, b = (load_split(meta, "val", 32, tmp_path / str(i)) for i in range(2))
    assert torch.equal(a.images, b.images) and torch.equal(a.masks, b.masks)
    assert a.masks.dtype == torch.bool and a.masks.shape == (1199, 32, 32)
    share = a.masks.float().mean((1, 2))
    assert 0.02 < share.min() and share.max() < 0.7  # every picture has a bird and a background
    harder = load_split(meta, "val", 32, tmp_path / "0", difficulty=0.9)
    assert not torch.equal(harder.images, a.images)


def test_synthetic_backgrounds_run_the_right_way(tmp_path):
    """Land is vertical: it changes from column to column; water is horizontal."""
    split = load_split(read_metadata("synthetic"), "val", 48, tmp_path)
    grey = split.images.float().mean(1)
    across, down = grey.diff(dim=2).abs().mean((1, 2)), grey.diff(dim=1).abs().mean((1, 2))
    land = split.a == 0
    assert (across > down)[land].float().mean() > 0.8 and (down > across)[~land].float().mean() > 0.8


def test_synthetic_waterbirds_are_longer(tmp_path):
    split = load_split(read_metadata("synthetic"), "val", 48, tmp_path, difficulty=0.0)
    area = split.masks.float().sum((1, 2))
    assert area[split.y == 1].mean() > 1.15 * area[split.y == 0].mean()


# ---- bad input: every message names the file, the row where there is one, and the fix


def edit(tmp_path, row=None, **cells):
    """Waterbirds with the given cells of one row (1 = first image) changed."""
    table = write_waterbirds(tmp_path)
    for column, value in cells.items():
        table[row][table[0].index(column)] = value
    write_table(tmp_path, table)
    return tmp_path


BAD_CELLS = [
    (dict(row=3, y="-1"), ["metadata.csv row 4", "y is '-1'", "map -1/1 to 0/1"]),
    (dict(row=3, y="bird"), ["row 4", "y is 'bird'"]),
    (dict(row=40, y="2"), ["row 41", "y is 2", "only 0 to 1"]),
    (dict(row=40, place="5"), ["row 41", "spurious attribute is 5", "only 0 to 1"]),
    (dict(row=2, place=""), ["row 3", "place (or a) is ''"]),
    (dict(row=7, split="training"), ["row 8", "split is 'training'", "train, val, test"]),
    (dict(row=1, split=""), ["row 2", "split is ''"]),
    (dict(row=5, img_filename="../secret.jpg"), ["row 6", "../secret.jpg", "leads out of the data folder"]),
    (dict(row=5, img_filename="/etc/passwd.jpg"), ["row 6", "leads out of the data folder"]),
    (dict(row=5, img_filename="C:\\a.jpg"), ["row 6", "leads out of the data folder"]),
    (dict(row=5, img_filename=""), ["row 6", "is empty"]),
]


@pytest.mark.parametrize("change, words", BAD_CELLS)
def test_bad_cells(tmp_path, change, words):
    with pytest.raises(BadInput) as error:
        read_metadata(edit(tmp_path, **change))
    for word in words:
        assert word in str(error.value)


BAD_TEXTS = [
    (b"", ["is empty"]),
    (b"img_filename,y,split,place\n", ["header but no rows"]),
    (b"img_filename,y,split,place\na.jpg,0,0,0\nb.jpg,1,", ["row 3", "3 cells where the header has 4", "truncated"]),
    (b"img_filename,label,split,place\na.jpg,0,0,0\n", ["no column y", "img_filename,label,split,place", "needed are"]),
    (b"1,001.Bird/a.jpg,1,0,1,/o/1.jpg\n2,001.Bird/b.jpg,1,0,1,/o/1.jpg\n", ["no column img_filename or filename"]),
    (b"<html><body>404 not found</body></html>\nplease\n", ["no column img_filename"]),
    (b"\x89PNG\r\n\x1a\n\xff\xfe\x00", ["not readable as text"]),
    (b"img_filename,y,split,place\na.jpg,0,0,0\nb.jpg,1,0,1\n", ["no row has split 1 (val)"]),
    (b"img_filename,y,split,place\na.jpg,0,0,0\nb.jpg,0,1,1\nc.jpg,0,2,1\n", ["a single value"]),
]


@pytest.mark.parametrize("text, words", BAD_TEXTS)
def test_bad_metadata_files(tmp_path, text, words):
    (tmp_path / "metadata.csv").write_bytes(text)
    with pytest.raises(BadInput) as error:
        read_metadata(tmp_path)
    for word in ["metadata.csv", *words]:
        assert word in str(error.value)


def test_unknown_places(tmp_path):
    with pytest.raises(BadInput, match="no such file or folder"):
        read_metadata(tmp_path / "nowhere")
    (tmp_path / "photos").mkdir()
    with pytest.raises(BadInput, match="looked for a metadata csv, or list_attr_celeba.*found photos; write a metadata.csv"):
        read_metadata(tmp_path)
    write_waterbirds(tmp_path / "cub/data/waterbird_complete95_forest2water2")
    with pytest.raises(BadInput, match="try --data .*waterbird_complete95_forest2water2"):
        read_metadata(tmp_path)
    for name in ("metadata_waterbirds.csv", "metadata_celeba.csv"):
        (tmp_path / name).write_text("x")
    with pytest.raises(BadInput, match="give one of them"):
        read_metadata(tmp_path)


def test_empty_groups(tmp_path, capsys):
    write_waterbirds(tmp_path, ((5, 0, 3, 4), (2, 2, 2, 2), (2, 2, 2, 2)))
    with pytest.raises(BadInput, match=r"no training image in group 1 \(landbird on water\)"):
        read_metadata(tmp_path)
    write_waterbirds(tmp_path, ((5, 2, 3, 4), (2, 2, 2, 2), (2, 2, 0, 2)))
    read_metadata(tmp_path)
    assert "no test image in group 2 (waterbird on land); left out of the test worst-group" in capsys.readouterr().err


def test_celeba_files_that_do_not_join(tmp_path):
    write_celeba(tmp_path)
    lines = (tmp_path / "list_eval_partition.txt").read_text().replace("000007.jpg", "000777.jpg")
    (tmp_path / "list_eval_partition.txt").write_text(lines)
    with pytest.raises(BadInput, match="do not join by file name: 2 images.*000007.jpg, 000777.jpg"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("file, old, new, words", [
    ("list_attr_celeba.txt", "000003.jpg  1", "000003.jpg  7", None),  # Bald is not used
    ("list_attr_celeba.txt", "68\n", "202599\n", "line 1 announces 202599 rows and 68 follow"),
    ("list_attr_celeba.txt", "Blond_Hair", "Blonde", "no column Blond_Hair"),
    ("list_attr_celeba.txt", "000003.jpg  1 -1 -1", "000003.jpg  1 0 -1", "row 5: Blond_Hair is '0'; expected -1 or 1"),
    ("list_attr_celeba.txt", "000003.jpg  1 -1 -1", "000003.jpg  1 -1", "row 5: 3 cells where the header has 4"),
    ("list_eval_partition.txt", "000002.jpg 0", "000002.jpg 4", "row 2: partition is '4'"),
    ("list_eval_partition.txt", "000002.jpg 0", "000002.jpg", "row 2: 1 cells"),
])
def test_bad_celeba_files(tmp_path, file, old, new, words):
    write_celeba(tmp_path)
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new, 1))
    if words is None:
        read_metadata(tmp_path)
        return
    with pytest.raises(BadInput, match=words):
        read_metadata(tmp_path)


def test_missing_and_broken_images(tmp_path):
    table = write_waterbirds(tmp_path)
    meta, cache = read_metadata(tmp_path), tmp_path / "cache"
    paths = [tmp_path / row[1] for row in table[1:]]
    paths[2].unlink()
    paths[3].unlink()
    with pytest.raises(BadInput, match="2 of the 32 images listed for train are missing .*Bird_0003_3.jpg, .*Bird_0004_4.jpg"):
        load_split(meta, "train", 28, cache)
    write_waterbirds(tmp_path)
    paths[0].write_bytes(paths[0].read_bytes()[:300])
    paths[1].write_bytes(b"<html>404</html>")
    with pytest.raises(BadInput, match="2 of 32 images cannot be decoded: .*Bird_0001_1.jpg.*; .*Bird_0002_2.jpg"):
        load_split(meta, "train", 28, cache)
    assert not list(cache.iterdir())  # nothing half-written


def test_cache_that_does_not_fit(tmp_path, monkeypatch):
    write_waterbirds(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(BadInput, match="point --cache to a larger disk"):
        load_split(read_metadata(tmp_path), "train", 28, tmp_path / "cache")
