"""Labels in the layouts that circulate and as people write them; pixels by the standard way."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import BadInput, EpochOrder, make_loader, make_transform, read_table

from .conftest import COUNTS, ROOT, labelled_rows, write_celeba, write_images, write_table
from .conftest import write_waterbirds as waterbirds

HEADER = ["img_filename", "y", "place", "split"]
ROWS = [[name, str(y), str(a), str(s)] for name, y, a, s in labelled_rows(pattern="i/{number}.png")]
FORMS = [("txt", "img_align_celeba", ""), ("csv", "img_align_celeba/img_align_celeba", "")]
FORMS += [("txt", "Img/img_align_celeba", "Anno"), ("csv", "", "")]
BIRDS50 = [[1078, 59, 21, 392], [98, 99, 35, 33], [283, 292, 98, 99]]
WRITTEN = {
    "as floats": lambda n, y, a, s: [n, f"{y}.0", a, f"{s}.0"],
    "as -1 and 1": lambda n, y, a, s: [n, y, str(2 * int(a) - 1), s],
    "as bools": lambda n, y, a, s: [n, str(bool(int(y))), a, s],
    "as words": lambda n, y, a, s: [n, y, a, ("train", "Val", "TEST")[int(s)]],
    "on Windows": lambda n, y, a, s: [".\\" + n.replace("/", "\\"), f" {y} ", f' "{a}"', s],
}


def counts_of(table):
    n = len(table.groups)
    return [np.bincount(table.g[table.split == i], minlength=n).tolist() for i in range(3)]


def mine(folder, rows):
    """The table of a set of one's own, after its rows were written."""
    write_table(folder, [HEADER, *rows])
    return read_table(folder)


def test_waterbirds_and_its_derived_forms(tmp_path, capsys):
    _, *rows = waterbirds(tmp_path)
    table = read_table(tmp_path)
    assert counts_of(table) == COUNTS and table.files == [row[1] for row in rows]
    assert table.classes == ["landbird", "waterbird"]
    names = [(group["name"], group["minority"]) for group in table.groups]
    assert names[1:3] == [("landbird on water", True), ("waterbird on land", True)]
    assert "the official waterbirds has [[3498, 184, 56, 1057]" in capsys.readouterr().err
    (tmp_path / "metadata.csv").rename(tmp_path / "._metadata.csv")  # a Mac's copy
    derived = [["id", "filename", "split", "y", "a"]]
    derived += [[i, name, split, y, a] for i, name, y, split, a, _ in rows]
    write_table(tmp_path, derived, "metadata_waterbirds.csv")
    assert read_table(tmp_path).fingerprint() == table.fingerprint()
    write_table(tmp_path, derived, "metadata_old.csv")
    with pytest.raises(BadInput, match="holds 2 metadata"):
        read_table(tmp_path)


@pytest.mark.parametrize("form,images,lists", FORMS)
def test_celebas_lists(tmp_path, form, images, lists):
    by_name = {name: labels for name, *labels in write_celeba(tmp_path, form, images, lists)}
    table = read_table(tmp_path)
    assert counts_of(table) == COUNTS and (table.root / table.files[0]).is_file()
    found = zip(table.files, zip(table.y, table.a, table.split))
    assert all(by_name[file] == list(labels) for file, labels in found)
    assert table.groups[3]["name"] == "blond man" and table.groups[0]["name"] == "non-blond woman"
    other = read_table(tmp_path, ("Bald", "Male"))  # Bald is the reverse of Blond_Hair here
    assert (other.y == 1 - table.y).all() and other.groups[2]["name"] == "Bald=1 Male=-1"
    path = next(tmp_path.rglob("list_eval*"))
    path.with_suffix(".bak").write_text("")  # is not read
    path.write_text(path.read_text().replace("000003.jpg", "999999.jpg"))
    with pytest.raises(BadInput, match=r"do not join: 2 images .*000003.jpg, 999999.jpg"):
        read_table(tmp_path)


@pytest.mark.parametrize("name", ["synthetic", "birds50", "waterbirds", "celeba"])
def test_counts_and_minorities_of_real_sets(name):
    path = ROOT.parent / "shared/data" / name  # which only some machines have
    if name != "synthetic" and not path.exists():
        pytest.skip(f"{path} not found")
    table = read_table(name if name == "synthetic" else path)
    official = {**common.OFFICIAL_COUNTS, "birds50": BIRDS50}
    assert counts_of(table) == official.get(name, official["waterbirds"])
    minorities = [group["group"] for group in table.groups if group["minority"]]
    assert minorities == ([3] if name == "celeba" else [1, 2])


@pytest.mark.parametrize("how", WRITTEN)
def test_the_same_labels_written_otherwise(tmp_path, how):
    write_images(tmp_path, labelled_rows(pattern="i/{number}.png"))
    expected, blank = mine(tmp_path, ROWS), [["", "", "", ""], [""], [" "]]
    assert expected.groups[1]["name"] == "y=0 a=1" and expected.classes == ["y=0", "y=1"]
    table = mine(tmp_path, [*blank, *(WRITTEN[how](*row) for row in ROWS), *blank])
    assert (table.g == expected.g).all() and (table.split == expected.split).all()
    assert all((table.root / file).is_file() for file in table.files)


def test_words_name_classes_and_groups(tmp_path):
    kinds = {"0": ("cow", "grass"), "1": ("camel", "sand")}
    rows = [[name, kinds[y][0], kinds[a][1], split] for name, y, a, split in ROWS]
    table = mine(tmp_path, rows)
    names = [group["name"] for group in table.groups]
    assert names == ["camel grass", "camel sand", "cow grass", "cow sand"]  # by the alphabet
    assert counts_of(table)[0] == [4, 10, 13, 5]
    for i, row in enumerate(rows):
        row[0] = f"001.Gull/Gull_{i:04d}_{i}.jpg"
    assert mine(tmp_path, rows).classes == ["camel", "cow"]
    codes, names = common.number_values(["10", "9", "-1", "9"], "y")
    assert codes.tolist() == [2, 1, 0, 1] and names == ["y=-1", "y=9", "y=10"]


def test_encodings_and_separators(tmp_path):
    for encoding, separator, end in (("utf-8-sig", ";", "\r\n"), ("utf-8", "\t", "\r")):
        text = end.join(separator.join(row) for row in [HEADER, *ROWS])
        (tmp_path / "metadata.csv").write_bytes(text.encode(encoding))
        assert counts_of(read_table(tmp_path)) == COUNTS


def test_names_relative_to_the_csv_or_the_working_directory_or_in_full(tmp_path, monkeypatch):
    write_images(tmp_path, labelled_rows(pattern="i/{number}.png"))
    for prefix in ("", f"{tmp_path.name}/", f"{tmp_path}/"):
        monkeypatch.chdir(tmp_path.parent)
        table = mine(Path(tmp_path.name), [[prefix + row[0], *row[1:]] for row in ROWS])
        monkeypatch.chdir("/")
        assert len(common.Images(table, "train", 32)) == 32  # all are there


TEXT = "\n".join(",".join(row) for row in [HEADER, *ROWS])
SPOILT = {TEXT[:26]: "it holds no rows", TEXT[:-2]: "every row needs 4 cells"}
SPOILT |= {TEXT.replace("img_filename", "x"): "no column img_filename.filename in the header"}
SPOILT |= {TEXT.replace("i/5", '"i/5'): "a quote left open"}
SPOILT |= {TEXT.replace(",1,0,0", ",0,0,0"): "train has no image of y=1 a=0"}
MORE = {"0,,0": "a is empty for x", "NA,0,0": "y is empty for x", "0,0,3": "split of x is 3"}
MORE |= {"2.5,0,0": "train has no image of y=2.5 a=1", "0,sand,0": "has no image of y=1 sand"}
SPOILT |= {f"{TEXT}\nx,{cells}": message for cells, message in MORE.items()}


@pytest.mark.parametrize("text,words", SPOILT.items(), ids=SPOILT.values())
def test_tables_that_cannot_be_used(tmp_path, text, words):
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(BadInput, match=f"metadata.csv.*{words}"):
        read_table(tmp_path)


def test_what_is_said_but_not_refused(tmp_path, capsys):
    rows = [row for row in ROWS if row[1:] != ["1", "0", "1"]]  # no val image of group 2
    rows.append([f"./{rows[0][0]}", "0", "0", "2"])
    before = mine(tmp_path, [*rows, [f"{tmp_path}/{rows[1][0]}", "1", "1", "0"]])
    err = capsys.readouterr().err
    assert "no val image of y=1 a=0; not in the worst group of val" in err
    for what in ("split", "class", "attribute"):
        assert f"1 images stand in more than one {what}" in err
    after = mine(tmp_path, [*rows, [rows[1][0], "0", "0", "0"]])
    assert after.fingerprint() != before.fingerprint()


def a_split(folder, augment="none", **options):
    return common.Images(read_table(folder), "train", 28, augment, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_evaluation_transform(tmp_path, workers):
    """Squeezed to 256/224 of the size, cut to the middle, normalised; by PIL and numpy. A second
    pass takes the pixels that the first one kept."""
    waterbirds(tmp_path)
    images = a_split(tmp_path)
    loader = make_loader(images, 16, workers)
    (x, y, g, index), _ = loader
    model = torch.nn.Identity()
    model.pretrained_cfg = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    values, _ = common.on_device(model, x, y)
    with Image.open(tmp_path / images.files[7]) as file:
        pixels = np.asarray(file.resize((32, 32), Image.BILINEAR))[2:30, 2:30] / 255
    expected = (pixels - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.4]
    assert np.allclose(values[7].permute(1, 2, 0), expected, atol=1e-6)
    assert (y[7], g[7], index[7]) == (images.y[7], images.g[7], 7)
    for file in images.files:
        (tmp_path / file).unlink()
    assert torch.equal(x, next(iter(loader))[0])


def test_table_1():
    steps = make_transform(224, "table1").transforms
    names = "RandomResizedCrop RandomHorizontalFlip RandomRotation RandomAffine RandomPerspective"
    assert [type(step).__name__ for step in steps[:5]] == names.split()
    crop, flip, rotation, affine, perspective = steps[:5]
    assert (list(crop.size), crop.scale, crop.ratio) == ([224, 224], (0.7, 1.0), (0.75, 1.33))
    assert (flip.p, perspective.distortion_scale) == (0.5, 0.2)
    turned = [list(rotation.degrees), list(affine.degrees), list(affine.translate)]
    assert turned == [[-15, 15], [0, 0], [0.1, 0.1]] and list(affine.scale) == [0.9, 1.1]
    few = make_transform(224, "crop-flip").transforms
    assert [type(step) for step in few] == [type(step) for step in steps[:2] + steps[5:]]


def test_pixels_follow_from_seed_epoch_image_and_view(tmp_path):
    waterbirds(tmp_path)
    images, state = a_split(tmp_path, "table1"), torch.get_rng_state()
    first = images[3, 5][0]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(images[3, 5][0], first)
    others = [images[4, 5], images[3, 6], a_split(tmp_path, "table1", seed=1)[3, 5]]
    assert not any(torch.equal(first, x) for x, *_ in others)
    two = a_split(tmp_path, "table1", views=2)[3, 5][0]
    assert torch.equal(two[0], first) and not torch.equal(two[1], first)
    order = EpochOrder(32, 5, seed=4)  # and the number of workers does not matter
    alone, helped = (list(make_loader(images, workers=n, order=order)) for n in (0, 2))
    assert len(alone) == len(order) == 7
    for ours, theirs in zip(alone, helped):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_images_of_other_modes_and_images_that_are_none(tmp_path):
    for mode in ("L", "P", "RGBA", "CMYK", "1", "LA"):
        Image.new("RGB", (9, 7), (200, 200, 200)).convert(mode).save(tmp_path / "x.tif")
        image = common.read_image(tmp_path / "x.tif")
        assert (image.mode, image.size) == ("RGB", (9, 7))
    Image.fromarray(np.full((40, 30), 40000, np.uint16)).save(tmp_path / "deep.png")
    Image.new("1", (14000, 14000)).save(tmp_path / "huge.png")
    for name, words in (("deep", "more than 8 bits a pixel"), ("huge", "DecompressionBomb")):
        with pytest.raises(BadInput, match=f"{name}.png: .*{words}"):
            common.read_image(tmp_path / f"{name}.png")


def test_a_damaged_image_is_named_in_one_line(tmp_path):
    waterbirds(tmp_path)
    images = a_split(tmp_path)
    (tmp_path / images.files[2]).write_text("no image")
    with pytest.raises(BadInput) as error:
        list(make_loader(images, workers=1))
    assert "\n" not in str(error.value) and images.files[2] in str(error.value)
    (tmp_path / images.files[2]).unlink()
    with pytest.raises(BadInput, match=f"1 of 32 train images are missing .{images.files[2]}"):
        a_split(tmp_path)


def test_drawn_birds():
    (images, masks), table = common.draw_split("val", 32, 0.2), read_table("synthetic")
    y, a = (torch.from_numpy(labels[table.split == 1]) for labels in (table.y, table.a))
    assert images.shape == (1199, 3, 32, 32) and images.dtype == torch.uint8
    area = masks.float().mean((1, 2))
    assert area[y == 1].mean() > 1.15 * area[y == 0].mean()  # longer body, neck and beak
    outside = images.float().masked_fill(masks[:, None], torch.nan)
    red, _, blue = outside.nanmean((2, 3)).T
    assert (blue - red)[a == 1].mean() > (blue - red)[a == 0].mean() + 20
