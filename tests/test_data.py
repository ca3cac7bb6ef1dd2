"""Labels in the layouts that circulate and as people write them; pixels by the standard way."""

import shutil
import struct
import unicodedata
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import BadInput, Batches, EpochOrder, make_transform, read_table

from .conftest import COUNTS, ROOT, labelled_rows, write_celeba, write_images, write_table
from .conftest import write_waterbirds as waterbirds

HEADER = ["img_filename", "y", "place", "split"]
ROWS = [[name, str(y), str(a), str(s)] for name, y, a, s in labelled_rows(pattern="i/{number}.png")]


def counts_of(table):
    """Images per group in train, val and test."""
    counts = []
    for split in range(3):
        g = table.g[table.split == split]
        counts.append(np.bincount(g, minlength=len(table.groups)).tolist())
    return counts


def names_of(table):
    return [group["name"] for group in table.groups]


def table_of(folder, rows, header=HEADER):
    """The table of a set of one's own, after its rows were written."""
    write_table(folder, [header, *rows])
    return read_table(folder)


# ---- the sets that circulate ----


def test_waterbirds_and_its_derived_forms(tmp_path):
    _, *rows = waterbirds(tmp_path)
    table = read_table(tmp_path)
    assert counts_of(table) == COUNTS
    assert table.files == [row[1] for row in rows]
    assert [group["minority"] for group in table.groups] == [False, True, True, False]
    assert [group["train_n"] for group in table.groups] == COUNTS[0]
    (tmp_path / "metadata.csv").rename(tmp_path / "._metadata.csv")  # a Mac's copy
    derived = [["id", "filename", "split", "y", "a"]]
    for number, name, y, split, a, _ in rows:
        derived.append([number, name, split, y, a])
    write_table(tmp_path, derived, "metadata_waterbirds.csv")
    again = read_table(tmp_path)
    assert (again.g == table.g).all()
    assert again.fingerprint(*common.SPLITS) == table.fingerprint(*common.SPLITS)
    assert names_of(again)[1] == "y=0 a=1"
    write_table(tmp_path, derived, "metadata_old.csv")
    with pytest.raises(BadInput, match="holds 2 metadata.*name one"):
        read_table(tmp_path)
    with pytest.raises(BadInput, match="no such file or folder"):
        read_table(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "form, images, lists",
    [
        ("txt", "img_align_celeba", ""),
        ("csv", "img_align_celeba/img_align_celeba", ""),
        ("txt", "Img/img_align_celeba", "Anno"),
        ("csv", "", ""),
    ],
)
def test_celebas_lists(tmp_path, form, images, lists):
    by_name = {name: labels for name, *labels in write_celeba(tmp_path, form, images, lists)}
    table = read_table(tmp_path)
    assert counts_of(table) == COUNTS
    assert (table.root / table.files[0]).is_file()
    for file, y, a, split in zip(table.files, table.y, table.a, table.split, strict=True):
        assert by_name[file] == [y, a, split]
    assert names_of(table) == ["non-blond woman", "non-blond man", "blond woman", "blond man"]
    other = read_table(tmp_path, ("Bald", "Male"))  # Bald is the reverse of Blond_Hair here
    assert (other.y == 1 - table.y).all()
    assert names_of(other)[2] == "Bald=1 Male=-1"
    assert names_of(read_table(tmp_path, ("blond_hair", "MALE"))) == names_of(table)
    with pytest.raises(BadInput, match="no column Hat in the header"):
        read_table(tmp_path, ("Hat", "Male"))

    path = next(tmp_path.rglob("list_eval*"))
    path.with_suffix(".bak").write_text("")  # is not read
    assert counts_of(read_table(path)) == COUNTS  # either list stands for both
    text = path.read_text()
    path.write_text(text.replace("000003.jpg", "000004.jpg"))
    with pytest.raises(BadInput, match="1 rows repeat an image; keep one of each"):
        read_table(tmp_path)
    copy = path.with_suffix(".csv" if form == "txt" else ".txt")
    copy.write_text(text)
    with pytest.raises(BadInput, match="holds 2 lists list_eval_partition; keep one"):
        read_table(tmp_path)
    copy.unlink()
    path.write_text(text.replace("000003.jpg", "999999.jpg"))
    with pytest.raises(BadInput, match=r"do not join: 2 images .*000003.jpg, 999999.jpg"):
        read_table(tmp_path)
    path.unlink()
    with pytest.raises(BadInput, match=r"holds no list_eval_partition.txt or .csv, nor a metadata"):
        read_table(tmp_path)


@pytest.mark.parametrize(
    "name, counts, minorities",
    [
        ("birds50", [[1078, 59, 21, 392], [98, 99, 35, 33], [283, 292, 98, 99]], [1, 2]),
        ("waterbirds", common.WATERBIRDS, [1, 2]),
        (
            "celeba",
            [[71629, 66874, 22880, 1387], [8535, 8276, 2874, 182], [9767, 7535, 2480, 180]],
            [3],
        ),
    ],
)
def test_counts_and_minorities_of_real_sets(name, counts, minorities):
    path = ROOT.parent / "shared/data" / name
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    table = read_table(path)
    assert counts_of(table) == counts
    assert [group["group"] for group in table.groups if group["minority"]] == minorities
    if name == "waterbirds":
        assert names_of(table)[1] == "landbird on water"


def test_half_of_the_largest_group_is_no_minority():
    groups = common.describe_groups(["a"], ["x", "y", "z"], [10, 5, 4])
    assert [group["minority"] for group in groups] == [False, False, True]


def test_names_of_waterbirds_are_given_to_its_own_counts_alone(tmp_path, monkeypatch):
    """Not to file names or columns as Waterbirds has them: y and place may stand the other way
    round. Words are never replaced."""
    waterbirds(tmp_path)
    assert names_of(read_table(tmp_path)) == [f"y={y} place={a}" for y in (0, 1) for a in (0, 1)]
    monkeypatch.setattr(common, "WATERBIRDS", COUNTS)
    table = read_table(tmp_path)
    assert table.classes == ["landbird", "waterbird"]
    assert names_of(table) == [
        "landbird on land",
        "landbird on water",
        "waterbird on land",
        "waterbird on water",
    ]
    rows = [[name, a, y, split] for name, y, a, split in ROWS]
    assert names_of(table_of(tmp_path, rows))[1] == "y=0 place=1"  # 4 images, and not 5
    words = [[name, y, ("sea", "shore")[int(a)], split] for name, y, a, split in ROWS]
    assert names_of(table_of(tmp_path, words))[1] == "y=0 shore"


def test_the_built_in_set_is_known_by_its_place(tmp_path, monkeypatch):
    waterbirds(tmp_path / "birds")
    table = read_table(tmp_path / "birds")
    assert not common.is_built_in(table)
    monkeypatch.setattr(common, "BIRDS", tmp_path / "birds")
    monkeypatch.chdir(tmp_path)
    assert common.is_built_in(table)
    assert common.is_built_in(read_table("birds/../birds/metadata.csv"))
    (tmp_path / "link").symlink_to(tmp_path / "birds")  # to another disk
    monkeypatch.setattr(common, "BIRDS", tmp_path / "link")
    assert common.is_built_in(read_table("link"))


def test_drawn_birds(birds, tmp_path, monkeypatch):
    """A small set: its table, its masks, and that classes differ in size and places in colour."""
    counts = [[20, 3, 4, 21], [40, 40, 40, 40], [2, 2, 2, 2]]
    monkeypatch.setattr(common, "WATERBIRDS", counts)
    folder = tmp_path / "birds"
    (tmp_path / ".birds.new/train").mkdir(parents=True)
    (tmp_path / ".birds.new/train/99999.bmp").write_text("of a process that was killed")
    birds.main(birds.parse_args(["--out", str(folder)]))
    table = read_table(folder)
    assert counts_of(table) == counts
    assert names_of(table)[2] == "waterbird on land"
    assert not (folder / "train/99999.bmp").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".birds.lock", "birds"]

    area = []
    blue = []
    for file in table.files:
        with Image.open(folder / file) as image:
            pixels = np.array(image.convert("RGB"), dtype=float)
        with Image.open(folder / "masks" / Path(file).with_suffix(".png")) as image:
            mask = np.array(image) > 0
        assert pixels.shape == (48, 48, 3)
        assert mask.shape == (48, 48)
        area.append(mask.mean())
        blue.append((pixels[..., 2] - pixels[..., 0])[~mask].mean())
    area = np.array(area)
    blue = np.array(blue)
    assert 0.01 < area.min() < area.max() < 0.6
    val = table.split == 1
    assert area[val & (table.y == 1)].mean() > 1.15 * area[val & (table.y == 0)].mean()
    assert blue[val & (table.a == 1)].mean() > blue[val & (table.a == 0)].mean() + 20

    # What is drawn is left alone, and the same again is the same
    (folder / "metadata.csv").write_text("mine")
    birds.main(birds.parse_args(["--out", str(folder)]))
    assert (folder / "metadata.csv").read_text() == "mine"
    monkeypatch.setattr(common, "WATERBIRDS", [counts[0], 4 * [1], 4 * [1]])
    for name, difficulty in (("again", []), ("hard", ["--difficulty", "1"])):
        birds.main(birds.parse_args(["--out", str(tmp_path / name), *difficulty]))
    first = (folder / "train/00007.bmp").read_bytes()
    assert (tmp_path / "again/train/00007.bmp").read_bytes() == first
    assert (tmp_path / "hard/train/00007.bmp").read_bytes() != first


def test_no_bird_is_in_two_splits(birds, tmp_path, monkeypatch):
    """Two birds of one group in each split, which are six pictures."""
    monkeypatch.setattr(common, "WATERBIRDS", 3 * [[2, 0, 0, 0]])
    birds.draw_set(tmp_path / "birds", 0.2)
    assert len({path.read_bytes() for path in (tmp_path / "birds").glob("*/*.bmp")}) == 6


# ---- tables as people write them ----


def test_attributes_name_columns_of_a_csv(tmp_path):
    """Six columns of labels, of which two are asked for; the others may be anything."""
    header = ["img_filename", "y", "place", "split", "Gender", "age"]
    gender = ("m", "f", "f")
    rows = []
    for i, (name, y, a, split) in enumerate(ROWS):
        rows.append([name, y, a, split, gender[i % 3], i % 2 + 20])
    table = table_of(tmp_path, rows, header)
    assert names_of(table)[1] == "y=0 place=1"
    table = read_table(tmp_path, ("y", "gender"))
    assert table.a.tolist() == [(1, 0, 0)[i % 3] for i in range(len(ROWS))]
    assert table.y.tolist() == [int(y) for _, y, _, _ in ROWS]
    assert names_of(table) == ["y=0 f", "y=0 m", "y=1 f", "y=1 m"]
    table = read_table(tmp_path, ("age", "Gender"))
    assert table.classes == ["age=20", "age=21"]
    assert table.y.tolist() == [i % 2 for i in range(len(ROWS))]
    with pytest.raises(BadInput, match="no column sex in the header"):
        read_table(tmp_path, ("y", "sex"))


@pytest.mark.parametrize(
    "written",
    [
        lambda name, y, a, s: [name, f"{y}.0", a, f"{s}.0"],
        lambda name, y, a, s: [name, y, 2 * int(a) - 1, s],
        lambda name, y, a, s: [name, bool(int(y)), a, s],
        lambda name, y, a, s: [name, y, a, ("train", "Val", "TEST")[int(s)]],
        lambda name, y, a, s: [".\\" + name.replace("/", "\\"), f" {y} ", f' "{a}"', s],
    ],
    ids=["as floats", "as -1 and 1", "as bools", "as words", "on Windows"],
)
def test_the_same_labels_written_otherwise(tmp_path, written):
    write_images(tmp_path, labelled_rows(pattern="i/{number}.png"))
    expected = table_of(tmp_path, ROWS)
    assert names_of(expected)[1] == "y=0 place=1"
    assert expected.classes == ["y=0", "y=1"]
    blank = [["", "", "", ""], [""], [" "]]
    table = table_of(tmp_path, [*blank, *(written(*row) for row in ROWS), *blank])
    assert (table.g == expected.g).all()
    assert (table.split == expected.split).all()
    assert all((table.root / file).is_file() for file in table.files)


def test_words_name_classes_and_groups(tmp_path):
    """They are numbered by the alphabet: camel before cow, grass before sand."""
    rows = []
    for name, y, a, split in ROWS:
        rows.append([name, ("cow", "camel")[int(y)], ("grass", "sand")[int(a)], split])
    table = table_of(tmp_path, rows)
    assert table.classes == ["camel", "cow"]
    assert names_of(table) == ["camel grass", "camel sand", "cow grass", "cow sand"]
    assert counts_of(table)[0] == [4, 10, 13, 5]


def test_labels_are_text_but_for_plain_numbers():
    values = ["506", "0506", "1234567", "1234568", "0", "0.0", "0.", "-1", "2.5", "Nan", "0506"]
    codes, names = common.number_values(values, "a")
    assert codes.tolist() == [2, 5, 3, 4, 1, 1, 1, 0, 6, 7, 5]
    assert names == ["a=-1", "a=0", "a=506", "a=1234567", "a=1234568", "a=0506", "a=2.5", "Nan"]
    codes, names = common.number_values(["10", "9", "9.0", "100"], "y")  # by size
    assert codes.tolist() == [1, 0, 0, 2]
    assert names == ["y=9", "y=10", "y=100"]
    digits = "9" * 5000  # more than int() takes
    assert common.number_values([digits, "5"], "y")[0].tolist() == [1, 0]
    both = ["Möwe", unicodedata.normalize("NFD", "Möwe"), "Ente"]
    codes, names = common.number_values(both, "y")  # two spellings of one word in Unicode
    assert codes.tolist() == [1, 1, 0]
    assert names == ["Ente", "Möwe"]


def test_a_place_called_na_is_a_word(tmp_path):
    rows = [[name, y, ("NA", "EU")[int(a)], split] for name, y, a, split in ROWS]
    table = table_of(tmp_path, rows)
    assert names_of(table) == ["y=0 EU", "y=0 NA", "y=1 EU", "y=1 NA"]
    assert table.a.tolist() == [1 - int(a) for _, _, a, _ in ROWS]
    rows[4][2] = ""
    with pytest.raises(BadInput, match="metadata.csv: place is empty in row 5; fill it or take"):
        table_of(tmp_path, rows)
    header = ["img_filename", "y", "a", "split"]
    with pytest.raises(BadInput, match="metadata.csv: a is empty in row 5"):
        table_of(tmp_path, rows, header)


@pytest.mark.parametrize(
    "encoding, separator, end",
    [("utf-8-sig", ";", "\r\n"), ("utf-8", "\t", "\r"), ("utf-8", ",", "\n")],
)
def test_encodings_and_separators(tmp_path, encoding, separator, end):
    text = end.join(separator.join(row) for row in [HEADER, *ROWS])
    for before in ("", end, f"sep={separator}{end}"):  # what Excel may write in front
        (tmp_path / "metadata.csv").write_bytes((before + text).encode(encoding))
        assert counts_of(read_table(tmp_path)) == COUNTS
    unseen = text.replace(f"{separator}1{separator}", f"{separator}1\u200b{separator}")
    (tmp_path / "metadata.csv").write_bytes(unseen.encode(encoding))
    assert counts_of(read_table(tmp_path)) == COUNTS


def test_a_tab_separated_file_of_another_name(tmp_path):
    text = "\n".join("\t".join(row) for row in [HEADER, *ROWS])
    (tmp_path / "labels.txt").write_text(text)
    table = read_table(tmp_path / "labels.txt")
    assert counts_of(table) == COUNTS
    assert table.files == [row[0] for row in ROWS]
    assert table.source == str(tmp_path / "labels.txt")


def test_names_relative_to_the_csv_or_the_working_directory_or_in_full(tmp_path, monkeypatch):
    write_images(tmp_path, labelled_rows(pattern="i/{number}.png"))
    outside = f"../{tmp_path.parent.name}/{tmp_path.name}/"  # of the working directory
    for prefix in ("", f"{tmp_path.name}/", f"{tmp_path}/", "i/../", outside):
        rows = [[prefix + name, *labels] for name, *labels in ROWS]
        monkeypatch.chdir(tmp_path.parent)
        table = table_of(Path(tmp_path.name), rows)
        monkeypatch.chdir("/")
        images = common.Images(table, "train", 32, [0.5] * 3, [0.5] * 3)
        assert [path.resolve() for path in images.paths] == [
            tmp_path / name for name, _, _, split in ROWS if split == "0"
        ]


def test_the_fingerprint_is_that_of_labels_and_names_below_the_common_folder(tmp_path):
    """So it stays when the data move as a whole, or are named in full or from elsewhere."""
    rows = labelled_rows(pattern="i/{number}.png")
    write_images(tmp_path / "one", rows)
    splits = common.SPLITS
    first = table_of(tmp_path / "one", ROWS).fingerprint(*splits)
    shutil.move(tmp_path / "one", tmp_path / "two")
    (tmp_path / "csv").mkdir()
    for folder, prefix in (
        ("two", ""),
        ("two", "./"),
        ("two", f"{tmp_path}/two/"),
        ("csv", f"{tmp_path}/two/"),
        ("csv", "../two/"),
        ("csv", "elsewhere/"),
    ):
        moved = [[prefix + name, *labels] for name, *labels in ROWS]
        assert table_of(tmp_path / folder, moved).fingerprint(*splits) == first, prefix

    # Each change is told, in the splits that it touches
    changes = {
        "train": [["i/0.png", *ROWS[0][1:]], *ROWS[1:]],
        "val": [[*row[:2], "0", "1"] if row[1:] == ["1", "1", "1"] else row for row in ROWS],
        "test": ROWS[:-1],
    }
    before = table_of(tmp_path / "two", ROWS)
    for changed, rows in changes.items():
        after = table_of(tmp_path / "two", rows)
        for split in splits:
            same = after.fingerprint(split) == before.fingerprint(split)
            assert same == (split != changed), (changed, split)
    apart = [[f"{'t' if row[-1] == '2' else 'i'}/{row[0]}", *row[1:]] for row in ROWS]
    moved = table_of(tmp_path / "two", apart)  # test images into a folder of their own
    for split in splits:
        assert moved.fingerprint(split) == before.fingerprint(split), split


def test_the_fingerprint_of_images(tmp_path):
    """It stays when the data move, differs for other pictures of the same names, and says nothing
    where one is missing."""
    rows = labelled_rows(pattern="i/{number}.png")
    found = []
    for name, size in (("one", (40, 32)), ("other", (32, 40))):
        write_images(tmp_path / name, rows, size)
        found.append(table_of(tmp_path / name, ROWS).fingerprint_of_images("train", "val"))
    assert None not in found
    assert found[0] != found[1]
    shutil.move(tmp_path / "one", tmp_path / "two")
    assert read_table(tmp_path / "two").fingerprint_of_images("train", "val") == found[0]
    (tmp_path / "two" / ROWS[0][0]).unlink()
    assert read_table(tmp_path / "two").fingerprint_of_images("train", "val") is None


def test_links_to_the_labels_and_to_their_folder(tmp_path):
    """A name that leads out of a folder does so where the folder really is; and beside a csv that
    is a link may be no images."""
    rows = labelled_rows(pattern="../i/{number}.png")
    (tmp_path / "real/labels").mkdir(parents=True)
    write_images(tmp_path / "real/labels", rows)
    (tmp_path / "link/i").mkdir(parents=True)
    for name, *_ in rows:
        (tmp_path / "link/i" / Path(name).name).write_text("another one")
    (tmp_path / "link/labels").symlink_to(tmp_path / "real/labels")
    text = [[name, str(y), str(a), str(split)] for name, y, a, split in rows]
    table_of(tmp_path / "real/labels", text)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/metadata.csv").symlink_to(tmp_path / "real/labels/metadata.csv")
    for place in ("real/labels", "link/labels", "alone"):
        images = common.Images(read_table(tmp_path / place), "train", 32, [0.5] * 3, [0.5] * 3)
        assert images.paths[0].resolve() == tmp_path / "real/i/1.png", place


@pytest.mark.parametrize("disk, table", [("NFD", "NFC"), ("NFC", "NFD")])
def test_letters_with_accents_have_two_spellings(tmp_path, disk, table):
    """As on the disk of a Mac and in a csv that was written elsewhere; the fingerprint is one."""
    rows = labelled_rows(pattern="Möwe é/{number}.png")
    fingerprints = set()
    for form in (disk, table):
        spelled = [[unicodedata.normalize(form, name), *labels] for name, *labels in rows]
        if form == disk:
            write_images(tmp_path, spelled)
        fingerprints.add(table_of(tmp_path, spelled).fingerprint("train"))
    images = common.Images(read_table(tmp_path), "train", 32, [0.5] * 3, [0.5] * 3)
    assert len(images) == 32
    assert images[5][0].shape == (3, 32, 32)
    assert len(fingerprints) == 1


TEXT = "\n".join(",".join(row) for row in [HEADER, *ROWS])


@pytest.mark.parametrize(
    "words, text",
    {
        "it holds no rows": ",".join(HEADER),
        "a quote left open": TEXT.replace("i/5", '"i/5'),
        "it is empty": "",
        "every row needs 4 cells": TEXT[:-2],
        "every row needs 4 cells.* is 'x,0,0'": f"{TEXT}\nx,0,0",
        "no column img_filename or filename in the header x": TEXT.replace("img_filename", "x"),
        "no column place or a in the header img_filename, y, where": TEXT.replace("place", "where"),
        "place is empty in row 69;": f"{TEXT}\nx,0,,0",
        "y is empty in row 69;": f"{TEXT}\nx,,0,0",
        "split of x is 3; expected 0, 1, 2": f"{TEXT}\nx,0,0,3",
        "y has 1, place has 2": TEXT.replace(",1,0,", ",0,0,").replace(",1,1,", ",0,1,"),
        "train has no image of y=1 place=0": TEXT.replace(",1,0,0", ",0,0,0"),
        "train has no image of y=2.5 place=1": f"{TEXT}\nx,2.5,0,0",
        "train has no image of y=1 sand": f"{TEXT}\nx,0,sand,0",
        "val has no image of y=0 place=0, y=0 place=1": "\n".join(
            line for line in TEXT.splitlines() if not line.endswith(",1")
        ),
    }.items(),
)
def test_tables_that_cannot_be_used(tmp_path, words, text):
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(BadInput, match=f"metadata.csv.*{words}") as error:
        read_table(tmp_path)
    assert "\n" not in str(error.value)


def test_images_beside_lists_in_a_folder_below(tmp_path):
    write_celeba(tmp_path / "data", "csv")
    table = read_table(tmp_path)
    assert (table.root / table.files[0]).is_file()


def test_a_missing_image_does_not_lead_elsewhere(tmp_path, monkeypatch):
    """To a tree of the same names in the working directory."""
    for name in ("one", "two"):
        rows = labelled_rows(pattern="i/{number}.png")
        write_images(tmp_path / name, rows)
        write_table(tmp_path / name, [HEADER, *ROWS])
    (tmp_path / "one" / ROWS[0][0]).unlink()
    monkeypatch.chdir(tmp_path / "two")
    assert read_table(tmp_path / "one").root == tmp_path / "one"
    shutil.rmtree(tmp_path / "one/i")
    assert read_table(tmp_path / "one").root == tmp_path / "two"


def test_a_file_of_ones_own_is_read_by_its_content(tmp_path):
    """Whatever it is called, and whatever lies beside it."""
    waterbirds(tmp_path)
    turned = [[file, str(1 - int(y)), a, split] for file, y, a, split in ROWS]
    write_table(tmp_path, [HEADER, *turned], "list_birds.csv")
    there = read_table(tmp_path)
    table = read_table(tmp_path / "list_birds.csv")
    assert (table.y == 1 - there.y).all()


def test_what_is_said_but_not_refused(tmp_path, capsys):
    rows = [row for row in ROWS if row[1:] != ["1", "0", "1"]]  # no val image of group 2
    table_of(tmp_path, rows)
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}/metadata.csv: val has no image of y=1 place=0, so no accuracy of it\n"
    )
    again = [f"./{ROWS[0][0]}", "0", "0", "2"]  # is there in training
    other = [f"{tmp_path}/{ROWS[1][0]}", "1", "1", "0"]  # is of group 0
    table_of(tmp_path, [*ROWS, again, other])
    err = capsys.readouterr().err
    for what in ("split", "class", "attribute"):
        assert f"1 images stand in more than one {what}\n" in err
    table_of(tmp_path, [*ROWS, ROWS[0], [f"./{ROWS[1][0]}", *ROWS[1][1:]]])
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}/metadata.csv: 2 rows stand in it twice, and their images count "
        "twice\n"
    )


# ---- pixels ----

MEAN = [0.4, 0.5, 0.6]
STD = [0.2, 0.3, 0.4]


def training_images(folder, augment="none", size=28, **options):
    return common.Images(read_table(folder), "train", size, MEAN, STD, augment=augment, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_evaluation_transform(tmp_path, workers):
    """Squeezed to 256/224 of the size, cut to the middle, normalised; by PIL and numpy. A second
    pass takes the pixels that the first one kept."""
    waterbirds(tmp_path)
    images = training_images(tmp_path)
    batches = Batches(images, batch_size=16, workers=workers)
    assert len(batches) == 2
    (x, y, g, index), (other, *_) = batches
    with Image.open(tmp_path / images.files[7]) as file:
        pixels = np.asarray(file.resize((32, 32), Image.BILINEAR))[2:30, 2:30] / 255
    assert images[7][0].dtype == torch.uint8
    assert np.allclose(x[7].permute(1, 2, 0), (pixels - MEAN) / STD, atol=1e-6)
    assert (y[7], g[7], index[7]) == (images.y[7], images.g[7], 7)
    assert g.tolist() == 13 * [0] + 3 * [1]
    for file in images.files:
        (tmp_path / file).unlink()
    (again, *_), (other_again, *_) = batches
    assert torch.equal(x, again)
    assert torch.equal(other, other_again)


def test_the_built_in_sets_size_is_rounded():
    assert make_transform(40).transforms[0].size == [46, 46]  # 40 * 256 / 224 is 45.7


def test_table_1():
    steps = make_transform(224, "table1").transforms
    assert [type(step).__name__ for step in steps] == [
        "RandomResizedCrop",
        "RandomHorizontalFlip",
        "RandomRotation",
        "RandomAffine",
        "RandomPerspective",
        "PILToTensor",
    ]
    crop, flip, rotation, affine, perspective, _ = steps
    assert (list(crop.size), crop.scale, crop.ratio) == ([224, 224], (0.7, 1.0), (0.75, 1.33))
    assert flip.p == 0.5
    assert list(rotation.degrees) == [-15, 15]
    assert list(affine.degrees) == [0, 0]
    assert list(affine.translate) == [0.1, 0.1]
    assert list(affine.scale) == [0.9, 1.1]
    assert perspective.distortion_scale == 0.2
    few = make_transform(224, "crop-flip").transforms
    assert [type(step) for step in few] == [type(step) for step in (crop, flip, steps[-1])]


def test_pixels_follow_from_seed_epoch_image_and_view(tmp_path):
    waterbirds(tmp_path)
    images = training_images(tmp_path, "table1")
    state = torch.get_rng_state()
    first = images[3, 5][0]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(images[3, 5][0], first)
    other_seed = training_images(tmp_path, "table1", seed=1)
    for x, *_ in (images[4, 5], images[3, 6], other_seed[3, 5]):
        assert not torch.equal(first, x)
    two = training_images(tmp_path, "table1", views=2)[3, 5][0]
    assert two.shape == (2, 3, 28, 28)
    assert torch.equal(two[0], first)
    assert not torch.equal(two[1], first)


@pytest.mark.parametrize("batch_size, sizes", [(5, 6 * [5] + [2]), (31, [31]), (32, [32])])
def test_the_order_of_an_epoch(tmp_path, batch_size, sizes):
    """Every image once, in another order in every epoch, whatever the number of workers; of a last
    batch that would have one image, none."""
    waterbirds(tmp_path)
    images = training_images(tmp_path, "crop-flip")
    order = EpochOrder(32, batch_size, seed=4)
    order.epoch = 1
    alone = Batches(images, workers=0, order=order)
    helped = Batches(images, workers=2, order=order)
    assert len(alone) == len(sizes)
    seen = []
    for ours, theirs in zip(alone, helped, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)
        seen.append(ours[3].tolist())
    assert [len(batch) for batch in seen] == sizes
    flat = [i for batch in seen for i in batch]
    assert len(set(flat)) == sum(sizes)
    order.epoch = 2
    assert [i for batch in order for _, i in batch] != flat


def test_pixels_are_kept_where_the_memory_of_the_job_has_room(tmp_path, monkeypatch):
    """32 images of 28 x 28 pixels take 75,264 bytes; three such splits may not fill half of it."""
    waterbirds(tmp_path)
    monkeypatch.setattr(common, "memory_limit", lambda: 8 * 75264 + 8)
    images = training_images(tmp_path)
    assert images.kept == {}
    x = images[4][0]
    assert images.kept.keys() == {4}
    assert images[4][0] is x
    assert not training_images(tmp_path, "crop-flip").keeps
    monkeypatch.setattr(common, "memory_limit", lambda: 8 * 75264)
    images = training_images(tmp_path)
    assert torch.equal(images[4][0], x)
    assert images.kept == {}


@pytest.mark.parametrize(
    "files, limit",
    [
        ({}, None),
        (
            {
                "/proc/self/cgroup": "0::/slurm/job_1/step_0\n",
                "/sys/fs/cgroup/slurm/job_1/step_0/memory.max": "max\n",
                "/sys/fs/cgroup/slurm/job_1/memory.max": "4000\n",
                "/sys/fs/cgroup/slurm/memory.max": "9000\n",
            },
            4000,
        ),
        (
            {
                "/proc/self/cgroup": "4:cpu,cpuacct:/\n3:memory:/docker/1\n",
                "/sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes": "5000\n",
            },
            5000,
        ),
    ],
    ids=["none", "cgroup 2", "cgroup 1"],
)
def test_the_memory_of_a_job(monkeypatch, files, limit):
    """The machine's, or less by a cgroup of Slurm or docker, or by ulimit -v."""

    def read_text(path, *args, **kwargs):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    infinity = common.resource.RLIM_INFINITY
    limits = [infinity, infinity]
    stand_in = SimpleNamespace(
        RLIMIT_AS=7, RLIM_INFINITY=infinity, getrlimit=lambda which: limits if which == 7 else [1]
    )
    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(common, "resource", stand_in)
    machine = common.memory_limit()
    if limit is None:
        assert machine > 10**8
    else:
        assert machine == limit
    limits[0] = 3000
    assert common.memory_limit() == 3000


def test_images_of_other_modes(tmp_path):
    for mode in ("L", "P", "RGBA", "CMYK", "1", "LA"):
        Image.new("RGB", (9, 7), (200, 200, 200)).convert(mode).save(tmp_path / "x.tif")
        image = common.read_image(tmp_path / "x.tif")
        assert (image.mode, image.size) == ("RGB", (9, 7))


def write_png_of_16_bits(path, colours):
    """A PNG of 2 x 2 pixels with 16 bits a colour, put together by hand, as PIL cannot write it.
    colours: its kind of pixels, 2 for RGB, 6 for RGBA."""
    channels = {2: 3, 6: 4}[colours]
    row = b"\0" + struct.pack(">H", 200) * 2 * channels  # no filter; 200 of 65535 is nearly black
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", 2, 2, 16, colours, 0, 0, 0),
        b"IDAT": zlib.compress(row + row),
        b"IEND": b"",
    }
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in chunks.items():
        data += struct.pack(">I", len(content)) + kind + content
        data += struct.pack(">I", zlib.crc32(kind + content))
    path.write_bytes(data)


def write_tiff_of_16_bits(path):
    """A TIFF of 2 x 2 pixels with 16 bits a colour, whose three colours lie one after the other."""
    start = 8
    plane = struct.pack("<4H", 200, 200, 200, 200)
    after = start + 3 * len(plane)
    offsets = [start, start + len(plane), start + 2 * len(plane)]
    values = struct.pack("<3H", 16, 16, 16) + struct.pack("<3I", *offsets)
    values += struct.pack("<3I", *[len(plane)] * 3)
    tags = [
        (256, 3, 1, 2),
        (257, 3, 1, 2),
        (258, 3, 3, after),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 3, after + 6),
        (277, 3, 1, 3),
        (278, 3, 1, 2),
        (279, 4, 3, after + 18),
        (284, 3, 1, 2),
    ]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = b"II*\0" + struct.pack("<I", after + len(values))
    table = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    path.write_bytes(head + 3 * plane + values + table)


def test_of_columns_that_differ_in_case_the_exact_one_is_read(tmp_path):
    header = [*HEADER, "Y"]
    rows = [[name, y, a, split, "0"] for name, y, a, split in ROWS]
    write_table(tmp_path, [header, *rows])
    assert read_table(tmp_path).y.tolist() == [int(row[1]) for row in ROWS]
    with pytest.raises(BadInput, match="metadata.csv: 2 columns are called y; rename one"):
        write_table(tmp_path, [[*HEADER, "y"], *rows])
        read_table(tmp_path)


def test_a_bitmap_of_16_bits_a_pixel_has_less_than_8_a_colour(tmp_path):
    """5, 6 and 5 bits for the colours: what PIL makes of it is right."""
    row = np.array([0xF800, 0x07E0, 0x001F, 0xFFFF], "<u2")  # red, green, blue, white
    pixels = row.tobytes()
    masks = np.array([0xF800, 0x07E0, 0x001F], "<u4").tobytes()
    info = np.array([40, 4, 1], "<i4").tobytes() + np.array([1, 16], "<u2").tobytes()
    info += np.array([3, len(pixels), 0, 0, 0, 0], "<i4").tobytes()
    start = 14 + len(info) + len(masks)
    head = b"BM" + np.array([start + len(pixels), 0, start], "<i4").tobytes()
    (tmp_path / "x.bmp").write_bytes(head + info + masks + pixels)
    image = np.asarray(common.read_image(tmp_path / "x.bmp"))
    assert image[0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]


def test_images_of_more_than_8_bits_are_refused_by_name(tmp_path):
    """PIL would take the upper 8 bits of colours, and cut grey values off at 255."""
    write_png_of_16_bits(tmp_path / "colour.png", 2)
    write_png_of_16_bits(tmp_path / "alpha.png", 6)
    with Image.open(tmp_path / "colour.png") as image:
        assert image.convert("RGB").getpixel((0, 0)) == (0, 0, 0)
    Image.fromarray(np.full((40, 30), 40000, np.uint16)).save(tmp_path / "grey.png")
    Image.fromarray(np.full((40, 30), 0.5, np.float32)).save(tmp_path / "float.tif")
    pixels = struct.pack(">H", 200) * 12
    (tmp_path / "colour.ppm").write_bytes(b"P6 2 2 65535\n" + pixels)
    write_tiff_of_16_bits(tmp_path / "planes.tif")
    for name in ("colour.png", "alpha.png", "grey.png", "float.tif", "colour.ppm", "planes.tif"):
        with pytest.raises(BadInput, match=f"/{name}: has more than 8 bits a pixel"):
            common.read_image(tmp_path / name)


def test_an_image_that_is_too_large_is_refused_by_name(tmp_path):
    Image.new("1", (14000, 14000)).save(tmp_path / "huge.png")
    with pytest.raises(BadInput, match="huge.png: .*DecompressionBomb"):
        common.read_image(tmp_path / "huge.png")


def test_a_damaged_image_is_named_in_one_line(tmp_path):
    waterbirds(tmp_path)
    images = training_images(tmp_path)
    (tmp_path / images.files[2]).write_text("no image")
    for workers in (0, 1):
        with pytest.raises(BadInput) as error:
            list(Batches(images, workers=workers))
        assert "\n" not in str(error.value)
        assert str(error.value).startswith(f"{tmp_path / images.files[2]}: cannot be used")
    (tmp_path / images.files[2]).unlink()
    with pytest.raises(BadInput, match=f"1 of 32 train images are missing .{images.files[2]}"):
        training_images(tmp_path)
