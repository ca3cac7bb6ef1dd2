"""Labels in the layouts that circulate and as people write them; pixels by the standard way."""

import os
import re
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import BadInput, EpochOrder, make_loader, make_transform, read_table

from .conftest import (
    COUNTS,
    labelled_rows,
    write_celeba,
    write_images,
    write_table,
    write_waterbirds,
)

WORDS = (("cow", "camel"), ("grass", "sand"))


def counts_of(table):
    n = len(table.groups)
    splits = [np.bincount(table.g[table.split == i], minlength=n) for i in range(3)]
    return tuple(tuple(counts.tolist()) for counts in splits)


def own_rows(folder, pattern="{group}/{number}.png", **kinds):
    """A set of one's own: [file, y, place, split] as str, with its images written."""
    rows = labelled_rows(COUNTS, pattern)
    write_images(folder, rows)
    return [[name, str(y), str(a), str(split)] for name, y, a, split in rows]


GULL = "{group:03d}.Gull/Gull_{number:04d}_{number}.jpg"
HEADER = ["img_filename", "y", "place", "split"]


# ---- layouts ----


def test_waterbirds_and_its_derived_forms(tmp_path, capsys):
    _, *rows = write_waterbirds(tmp_path)
    table = read_table(tmp_path)
    assert counts_of(table) == COUNTS and table.files == [row[1] for row in rows]
    assert table.classes == ["landbird", "waterbird"]
    names = [(group["name"], group["minority"]) for group in table.groups]
    assert names[1:3] == [("landbird on water", True), ("waterbird on land", True)]
    assert "the official waterbirds has [[3498, 184, 56, 1057]" in capsys.readouterr().err
    (tmp_path / "metadata.csv").rename(tmp_path / "._metadata.csv")  # a Mac's copy
    derived = [["id", "filename", "split", "y", "a"]]
    derived += [[row[0], row[1], row[3], row[2], row[4]] for row in rows]
    write_table(tmp_path, derived, "metadata_waterbirds.csv")
    again = read_table(tmp_path)
    assert counts_of(again) == COUNTS and again.fingerprint() == table.fingerprint()


@pytest.mark.parametrize("form,images,lists", [
    ("txt", "img_align_celeba", ""), ("csv", "img_align_celeba/img_align_celeba", ""),
    ("txt", "Img/img_align_celeba", "Anno"), ("csv", "", "")])  # fmt: skip
def test_celebas_lists(tmp_path, form, images, lists):
    rows = write_celeba(tmp_path, form, images, lists)
    table = read_table(tmp_path)
    assert counts_of(table) == COUNTS and (table.root / table.files[0]).is_file()
    by_name = {name: (y, a, split) for name, y, a, split in rows}
    for file, *labels in zip(table.files, table.y, table.a, table.split):
        assert by_name[file] == tuple(labels)
    assert table.groups[3]["name"] == "blond man" and table.groups[0]["name"] == "non-blond woman"
    other = read_table(tmp_path, ("Bald", "Male"))  # Bald is the reverse of Blond_Hair here
    assert (other.y == 1 - table.y).all() and other.groups[2]["name"] == "Bald=1 Male=0"


def test_lists_that_do_not_join(tmp_path):
    write_celeba(tmp_path)
    path = tmp_path / "list_eval_partition.txt"
    path.write_text(path.read_text().replace("000003.jpg", "999999.jpg"))
    with pytest.raises(BadInput, match=r"do not join: 2 images .*000003.jpg, 999999.jpg"):
        read_table(tmp_path)


def test_the_built_in_set():
    table = read_table("synthetic")
    assert [list(c) for c in counts_of(table)] == common.OFFICIAL_COUNTS["waterbirds"]
    assert [group["group"] for group in table.groups if group["minority"]] == [1, 2]
    celeba = common.describe_groups(*common.NAMES["celeba"], common.OFFICIAL_COUNTS["celeba"][0])
    assert [group["group"] for group in celeba if group["minority"]] == [3]


@pytest.mark.parametrize("name,expected", [
    ("birds50", [[1078, 59, 21, 392], [98, 99, 35, 33], [283, 292, 98, 99]]),
    ("waterbirds", common.OFFICIAL_COUNTS["waterbirds"]),
    ("celeba", common.OFFICIAL_COUNTS["celeba"])])  # fmt: skip
def test_real_labels(real_data, name, expected):
    assert [list(counts) for counts in counts_of(read_table(real_data / name))] == expected


# ---- tables as people write them ----


def words(rows):
    return [[name, WORDS[0][int(y)], WORDS[1][int(a)], split] for name, y, a, split in rows]


def spelled(rows, y="{}", a="{}", split="{}"):
    return [[n, y.format(c), a.format(b), split.format(s)] for n, c, b, s in rows]


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: spelled(rows, "{}.0", "{}", "{}.0"),
        lambda rows: [[n, str(bool(int(y))), str(2 * int(a) - 1), s] for n, y, a, s in rows],
        lambda rows: [[n, y, a, ("train", "Val", "TEST")[int(s)]] for n, y, a, s in rows],
        lambda rows: [[n.replace("/", "\\"), f" {y} ", f'"{a}"', s] for n, y, a, s in rows],
        lambda rows: [["./" + n, y, a, s] for n, y, a, s in rows],
        lambda rows: [*rows[:3], ["", "", "", ""], *rows[3:], [""], [" "]],
    ],
)
def test_the_same_labels_in_other_words(tmp_path, change):
    rows = own_rows(tmp_path)
    write_table(tmp_path, [HEADER, *rows])
    expected = read_table(tmp_path)
    assert expected.groups[1]["name"] == "y=0 a=1" and expected.classes == ["y=0", "y=1"]
    write_table(tmp_path, [HEADER, *change(rows)])
    table = read_table(tmp_path)
    assert (table.g == expected.g).all() and (table.split == expected.split).all()
    assert [table.root / file for file in table.files] == [tmp_path / row[0] for row in rows]


def test_words_name_classes_and_groups(tmp_path):
    write_table(tmp_path, [HEADER, *words(own_rows(tmp_path))])
    table = read_table(tmp_path)
    assert table.classes == ["camel", "cow"]  # in alphabetical order
    names = [group["name"] for group in table.groups]
    assert names == ["camel grass", "camel sand", "cow grass", "cow sand"]
    assert counts_of(table)[0] == (4, 10, 13, 5)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("separator,end", [(",", "\r\n"), (";", "\n"), ("\t", "\r")])
def test_encodings_and_separators(tmp_path, encoding, separator, end):
    rows = [HEADER, *own_rows(tmp_path)]
    text = end.join(separator.join(row) for row in rows)
    (tmp_path / "metadata.csv").write_bytes(text.encode(encoding))
    assert counts_of(read_table(tmp_path)) == COUNTS


@pytest.mark.parametrize("base", ["absolute", "linked", "working directory"])
def test_full_paths_and_those_from_the_working_directory(tmp_path, base, monkeypatch):
    folder = tmp_path / "data/mine"
    rows = own_rows(folder)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    prefix = {"absolute": f"{folder}/", "linked": f"{folder}/", "working directory": "data/mine/"}
    write_table(folder, [HEADER, *rows])
    plain = read_table(folder)
    write_table(folder, [HEADER, *([prefix[base] + row[0], *row[1:]] for row in rows)])
    given = {"absolute": folder, "linked": "link", "working directory": "data/mine/metadata.csv"}
    table = read_table(given[base])
    assert table.files == [row[0] for row in rows] and (table.root / table.files[0]).is_file()
    assert table.fingerprint() == plain.fingerprint()  # moved or named otherwise, the same data


def test_names_are_official_only_where_the_set_is(tmp_path):
    write_table(tmp_path, [HEADER, *own_rows(tmp_path, "{number:06d}.jpg")])
    assert read_table(tmp_path).groups[2]["name"] == "y=1 a=0"


@pytest.mark.parametrize(
    "spoil,message",
    [
        (lambda t: t[:1], "no rows"),
        (lambda t: [], "no rows"),
        (lambda t: [["x", *HEADER[1:]], *t[1:]], "no column img_filename or filename"),
        (lambda t: [HEADER[:3] + ["part"], *t[1:]], "no column split in the header"),
        (lambda t: [*t[:4], ['"x.png', "0", "0", "0"], *t[4:]], "line 5: a quote is opened"),
        (lambda t: [*t[:6], t[6][:2]], "line 7: 2 cells where the header has 4"),
        (lambda t: [*t, ["x.png", "2.5", "0", "0"]], "line 70: y is '2.5'"),
        (lambda t: [*t, ["x.png", "-1", "0", "0"]], "line 70: y is '-1'"),
        (lambda t: [*t, ["x.png", "0", "", "0"]], "line 70: the spurious attribute is ''"),
        (lambda t: [*t, ["x.png", "0", "sand", "0"]], "line 70: the spurious attribute is 'sand'"),
        (lambda t: [*t, ["x.png", "0", "0", "3"]], "line 70: split is not 0, 1, 2"),
        (lambda t: [*t, ["../x.png", "0", "0", "0"]], "line 70: file name '../x.png'"),
        (lambda t: [*t, ["/etc/x.png", "0", "0", "0"]], "leads out of"),
        (lambda t: [*t, ["C:\\x.png", "0", "0", "0"]], "leads out of"),
        (lambda t: [*t, ["~/x.png", "0", "0", "0"]], "leads out of"),
        (lambda t: [*t, ["", "0", "0", "0"]], "is empty or leads out"),
        (lambda t: [*t, ["x.png", "7", "0", "0"]], "every class with every spurious attribute"),
        (lambda t: [row for row in t if row[1] != "1"], "two or more of each"),
        (lambda t: [row for row in t if row[3] != "1"], "all three splits"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, spoil, message):
    table = [HEADER, *own_rows(tmp_path)]
    assert len(table) == 69
    write_table(tmp_path, spoil(table))
    with pytest.raises(BadInput, match=f"metadata.csv.*{re.escape(message)}"):
        read_table(tmp_path)


def test_other_things_in_the_place_of_data(tmp_path):
    with pytest.raises(BadInput, match="nowhere: no such file or folder"):
        read_table(tmp_path / "nowhere")
    write_waterbirds(tmp_path / "deep/er")
    with pytest.raises(BadInput, match=f"try {tmp_path}/deep/er"):
        read_table(tmp_path)
    os.mkfifo(tmp_path / "metadata.csv")  # would be waited for
    with pytest.raises(BadInput, match="metadata.csv: not a file"):
        read_table(tmp_path)
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.csv").write_bytes(b"\xff\xd8\xff\xe0" + bytes(range(256)))
    with pytest.raises(BadInput, match="metadata.csv: cannot be used .UnicodeDecodeError"):
        read_table(tmp_path)
    shutil.copy(tmp_path / "metadata.csv", tmp_path / "metadata_old.csv")
    with pytest.raises(BadInput, match="holds 2 csv with metadata in their name"):
        read_table(tmp_path)


def test_what_is_said_but_not_refused(tmp_path, capsys):
    rows = own_rows(tmp_path)
    rows = [row for row in rows if row[1:] != ["1", "0", "1"]]  # no val image of group 2
    twins = [[rows[0][0], "0", "0", "2"], [rows[1][0], "1", "0", "0"]]
    write_table(tmp_path, [HEADER, *rows, *twins])
    table = read_table(tmp_path)
    err = capsys.readouterr().err
    assert "no val image of y=1 a=0; not in the worst group of val" in err
    assert "1 rows repeat an image of another split, 1 one of another class" in err
    before = table.fingerprint()
    write_table(tmp_path, [HEADER, *rows, twins[0], [rows[1][0], "0", "0", "0"]])
    assert read_table(tmp_path).fingerprint() != before


def test_reading_takes_time_in_proportion_to_the_rows(tmp_path):
    """Labels without their images, as CelebA's lists come."""
    rows = [[f"{i}.jpg", i % 2, i // 2 % 2, i % 3] for i in range(20_000)]
    write_table(tmp_path, [HEADER, *rows])
    started = time.process_time()
    read_table(tmp_path)
    assert time.process_time() - started < 5


def test_words_of_the_user_name_the_groups(tmp_path):
    """File names as in CUB-200-2011 make a set Waterbirds only where its classes have no names."""
    words = [
        [name, ("gull", "tern")[y], ("sea", "sky")[a], split]
        for name, y, a, split in labelled_rows(pattern=GULL)
    ]
    write_table(tmp_path, [HEADER, *words])
    assert read_table(tmp_path).groups[0]["name"] == "gull sea"


def test_attributes_of_three_values(tmp_path):
    write_celeba(tmp_path, "csv")
    path = tmp_path / "list_attr_celeba.csv"
    path.write_text(path.read_text().replace("-1", "0").replace("000009.jpg,1,0", "000009.jpg,1,2"))
    with pytest.raises(BadInput, match="list_attr_celeba.csv"):
        read_table(tmp_path)


def test_the_empty_cell_is_named_not_the_word_before_it(tmp_path):
    words = [[name, ("cow", "camel")[y], a, s] for name, y, a, s in labelled_rows()]
    words[6][1] = ""
    write_table(tmp_path, [HEADER, *words])
    with pytest.raises(BadInput, match="line 8: y is ''"):
        read_table(tmp_path)


# ---- pixels ----


def a_split(folder, augment="none", size=28, views=1, seed=0, split="train"):
    table = read_table(folder)
    transform = make_transform(table, size, [0.4, 0.5, 0.6], [0.2, 0.3, 0.4], augment)
    return common.Images(table, split, transform, size, views=views, seed=seed)


def test_the_evaluation_transform(tmp_path):
    """Squeezed to 256/224 of the size, cut to the middle, normalised; by PIL and numpy."""
    write_waterbirds(tmp_path)
    images = a_split(tmp_path)
    x, y, g, i = images[7]
    with Image.open(tmp_path / images.files[7]) as file:
        pixels = np.asarray(file.resize((32, 32), Image.BILINEAR))[2:30, 2:30] / 255
    expected = (pixels - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.4]
    assert np.allclose(x.permute(1, 2, 0), expected, atol=1e-6)
    assert (y, g, i) == (images.y[7], images.g[7], 7)


def test_table_1(tmp_path):
    steps = make_transform(None, 224, [0.5] * 3, [0.5] * 3, "table1").transforms
    names = [type(step).__name__ for step in steps]
    crop, flip, rotation, affine, perspective, *_ = steps
    assert names[:3] == ["RandomResizedCrop", "RandomHorizontalFlip", "RandomRotation"]
    assert names[3:5] == ["RandomAffine", "RandomPerspective"]
    assert (list(crop.size), crop.scale, crop.ratio) == ([224, 224], (0.7, 1.0), (0.75, 1.33))
    assert flip.p == 0.5 and list(rotation.degrees) == [-15, 15]
    assert list(affine.degrees) == [0, 0] and list(affine.translate) == [0.1, 0.1]
    assert list(affine.scale) == [0.9, 1.1] and perspective.distortion_scale == 0.2
    few = make_transform(None, 224, [0.5] * 3, [0.5] * 3, "crop-flip").transforms
    assert [type(step).__name__ for step in few[:2]] == names[:2] and len(few) == len(steps) - 3


def test_pixels_follow_from_seed_epoch_image_and_view(tmp_path):
    write_waterbirds(tmp_path)
    images = a_split(tmp_path, "table1")
    state = torch.get_rng_state()
    first = images[3, 5][0]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(images[3, 5][0], first)
    others = [images[4, 5], images[3, 6], a_split(tmp_path, "table1", seed=1)[3, 5]]
    assert not any(torch.equal(first, x) for x, *_ in others)
    two = a_split(tmp_path, "table1", views=2)[3, 5][0]
    assert torch.equal(two[0], first) and not torch.equal(two[1], first)


def test_the_number_of_workers_does_not_matter(tmp_path):
    write_waterbirds(tmp_path)
    images, order = a_split(tmp_path, "table1"), EpochOrder(32, 5, seed=4)
    order.epoch = 2
    alone, helped = (list(make_loader(images, workers=n, order=order)) for n in (0, 2))
    assert len(alone) == len(order) == 7
    for ours, theirs in zip(alone, helped):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_orders():
    order, batches = EpochOrder(33, 16, seed=0), {}
    for epoch in (1, 2, 1):
        order.epoch = epoch
        batches[epoch] = list(order)
        assert [len(batch) for batch in batches[epoch]] == [16, 16]  # one image is left over
    flat = {epoch: [i for batch in found for _, i in batch] for epoch, found in batches.items()}
    assert len(set(flat[1])) == 32 and flat[1] != flat[2]
    assert list(EpochOrder(33, 16, seed=1)) != batches[1]
    assert len(list(EpochOrder(34, 16, seed=0))) == 3


@pytest.mark.parametrize("kind,words", [
    ("16 bits", "more than 8 bits a pixel"), ("cut", "cannot be used"), ("text", "cannot be used"),
    ("pipe", "not a file"), ("huge", "DecompressionBomb"),
    ("missing", "no such file")])  # fmt: skip
def test_images_that_are_none(tmp_path, kind, words):
    path = tmp_path / "x.png"
    Image.fromarray(np.full((40, 30), 40000, np.uint16)).save(path)
    if kind == "cut":
        Image.effect_noise((64, 64), 50).save(path)
        path.write_bytes(path.read_bytes()[:900])
    elif kind == "text":
        path.write_text("<html>")
    elif kind == "huge":
        Image.new("1", (14000, 14000)).save(path)
    elif kind in ("pipe", "missing"):
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
    with pytest.raises(BadInput, match=f"x.png: .*{words}"):
        common.read_image(path)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_images_of_other_modes(tmp_path, mode):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.new("RGB", (9, 7), (200, 200, 200)).convert(mode).save(path)
    image = common.read_image(path)
    assert image.mode == "RGB" and image.size == (9, 7)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_in_one_line(tmp_path, workers):
    write_waterbirds(tmp_path)
    images = a_split(tmp_path)
    (tmp_path / images.files[2]).write_text("no image")
    with pytest.raises(BadInput) as error:
        list(make_loader(images, workers=workers))
    assert "\n" not in str(error.value) and images.files[2] in str(error.value)
    (tmp_path / images.files[2]).unlink()
    with pytest.raises(BadInput, match=f"1 of 32 train images are missing .{images.files[2]}"):
        a_split(tmp_path)


def test_drawn_birds():
    images, masks = common.draw_split("val", 32, 0.2)
    table = read_table("synthetic")
    rows = table.split == 1
    again = common.draw_birds(
        table.y[rows][:500], table.a[rows][:500], np.random.default_rng([0, 1]), 32
    )
    assert torch.equal(images[:500], torch.from_numpy(again[0]))
    assert images.shape == (1199, 3, 32, 32) and images.dtype == torch.uint8
    y, a = torch.from_numpy(table.y[rows]), torch.from_numpy(table.a[rows])
    area = masks.float().mean((1, 2))
    assert area[y == 1].mean() > 1.15 * area[y == 0].mean()  # longer body, neck and beak
    outside = images.float().masked_fill(masks[:, None], torch.nan)
    red, _, blue = outside.nanmean((2, 3)).T
    assert (blue - red)[a == 1].mean() > (blue - red)[a == 0].mean() + 20
