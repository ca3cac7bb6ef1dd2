"""Every layout gives the same labels, every picture the usual pixels, and bad input is named."""

import io
import os
import random
import shutil
import signal
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import common
from common import BadInput, EpochOrder, Images, make_loader, make_transform, read_table

from .conftest import (
    COUNTS,
    labelled_rows,
    write_celeba,
    write_images,
    write_table,
    write_waterbirds,
)

WATERBIRDS = ((3498, 184, 56, 1057), (467, 466, 133, 133), (2255, 2255, 642, 642))
CELEBA = ((71629, 66874, 22880, 1387), (8535, 8276, 2874, 182), (9767, 7535, 2480, 180))
BIRDS = ["landbird on land", "landbird on water", "waterbird on land", "waterbird on water"]
FACES = ["non-blond woman", "non-blond man", "blond woman", "blond man"]
CODES = ["y=0 a=0", "y=0 a=1", "y=1 a=0", "y=1 a=1"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def counts(table):
    """Images per group in train, val and test."""
    found = np.zeros((3, len(table.groups)), int)
    np.add.at(found, (table.split, table.g), 1)
    return tuple(map(tuple, found.tolist()))


def names(table):
    return [group["name"] for group in table.groups]


def open_all(table):
    """How many images each split has, all of them found."""
    return [len(Images(table, split, None, 32)) for split in common.SPLITS]


def own(pattern="{number:06d}.jpg", y=(0, 1), a=(0, 1), split=(0, 1, 2)):
    """The cells of one's own 2 x 2 set, header first, classes and attributes spelt as given."""
    rows = labelled_rows(pattern=pattern)
    header = ["img_filename", "y", "place", "split"]
    return [header, *([name, y[c], a[b], split[part]] for name, c, b, part in rows)]


def save(folder, edit=lambda text: text, table=None):
    """Write metadata.csv, its text or bytes edited; returns the folder."""
    write_table(folder, table or own())
    path = folder / "metadata.csv"
    content = edit(path.read_text())
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.fixture
def birds(tmp_path):
    write_waterbirds(tmp_path)
    return tmp_path


@pytest.fixture
def no_waiting():
    """Whatever waits for ever gets a TimeoutError."""

    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# ---- layouts


def test_waterbirds(birds, capsys):
    table = read_table(birds)
    assert counts(table) == COUNTS and names(table) == BIRDS and open_all(table) == [32, 16, 20]
    assert table.classes == ["landbird", "waterbird"] and table.source == str(
        birds / "metadata.csv"
    )
    rows = zip(table.files, table.y, table.a, table.split)
    assert list(rows) == labelled_rows() and (table.g == 2 * table.y + table.a).all()
    warning = capsys.readouterr().err  # with both sets of numbers
    assert "[13, 5, 4, 10]" in warning and "[3498, 184, 56, 1057]" in warning


@pytest.mark.parametrize(
    "name, images",
    [
        ("metadata_waterbirds.csv", "waterbirds/waterbird_complete95_forest2water2"),
        ("metadata_waterbirds.csv", "waterbird_complete95_forest2water2"),
        ("metadata_celeba.csv", "celeba/img_align_celeba"),
        ("labels.csv", ""),
    ],
)
def test_derived_csv(tmp_path, name, images):
    """id,filename,split,y,a beside or above the images, as in SubpopBench."""
    rows = labelled_rows()
    write_images(tmp_path / images, rows)
    words = ("train", "Val", "test")
    cells = [[i, file, words[part], y, a] for i, (file, y, a, part) in enumerate(rows)]
    write_table(tmp_path, [["id", "filename", "split", "y", "a"], *cells], name)
    table = read_table(tmp_path / name if images == "" else tmp_path)
    assert counts(table) == COUNTS and open_all(table) == [32, 16, 20]


@pytest.mark.parametrize("form", ["txt", "csv"])
@pytest.mark.parametrize(
    "images, lists",
    [("", ""), ("img_align_celeba/img_align_celeba", ""), ("Img/img_align_celeba", "Anno")],
)
def test_celeba(tmp_path, form, images, lists):
    rows = write_celeba(tmp_path, form, images, lists)
    if lists:  # the folders of the official archive
        (tmp_path / "Eval").mkdir()
        shutil.move(tmp_path / f"Anno/list_eval_partition.{form}", tmp_path / "Eval")
    table = read_table(tmp_path)
    assert names(table) == FACES and open_all(table) == [32, 16, 20]
    # joined by name: the partition of the csv form is in another order
    assert list(zip(table.files, table.y, table.a, table.split)) == rows
    other = read_table(tmp_path, ("Male", "Blond_Hair"))
    assert counts(other)[0] == (13, 4, 5, 10) and names(other)[1] == "Male=0 Blond_Hair=1"


def test_built_in_set():
    table = read_table("synthetic")
    assert counts(table) == WATERBIRDS and names(table) == BIRDS
    assert open_all(table) == [4795, 1199, 5794]


SPELLINGS = [
    (("cow", "camel"), ("sand", "grass"), ["camel grass", "camel sand", "cow grass", "cow sand"]),
    ((-1, 1), (1, -1), CODES),
    (("True", "false"), ("FALSE", "true"), CODES),
    (("0.0", "1."), (1, 0), CODES),
]


@pytest.mark.parametrize("y, a, expected", SPELLINGS)
def test_spellings_of_classes_and_attributes(tmp_path, y, a, expected):
    table = read_table(save(tmp_path, table=own(y=y, a=a)))
    assert names(table) == expected
    first = (0 if str(y[0]) in ("-1", "0.0") else 1, 0 if str(a[0]) == "FALSE" else 1)
    assert (table.y[0], table.a[0]) == first
    moved = [13, 5, 4, 10]  # words are numbered in alphabetical order, whichever comes first
    moved = moved[2:] + moved[:2] if first[0] else moved
    moved = [moved[j ^ 1] for j in range(4)] if first[1] else moved
    assert counts(table)[0] == tuple(moved)


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace("\n", "\r\n").rstrip(),
        lambda text: text.replace("\n", "\n\n,,,\n") + " \n\n",
        lambda text: text.replace(",", "\t"),
        lambda text: text.replace(",", " ; "),
        lambda text: text.encode("utf-8-sig"),
        lambda text: text.encode("utf-16"),
        lambda text: text.replace("img_filename,y", "IMG_Filename,Y"),
        lambda text: text.replace("000007.jpg", '"000007.jpg"'),
        lambda text: text.replace(",0\n", ",TRAIN\n").replace(",1\n", ",valid\n"),
        lambda text: text.replace(",0\n", ",0.0\n"),
    ],
)
def test_csv_as_peoples_tools_write_it(tmp_path, edit):
    expected = read_table(save(tmp_path))
    (tmp_path / "._metadata.csv").write_bytes(b"\0\5\26\7")  # a Mac's copy
    table = read_table(save(tmp_path, edit))
    assert counts(table) == COUNTS and table.fingerprint() == expected.fingerprint()


@pytest.mark.parametrize("form", ["{0}/{1}", "set/{1}", "{1}", "back\\slash", "link"])
def test_paths_in_the_csv(tmp_path, monkeypatch, form):
    """Full, relative to the working directory or to the csv: one set of labels."""
    folder = tmp_path / "set"
    table = write_waterbirds(folder)
    expected = read_table(folder).fingerprint()
    monkeypatch.chdir(tmp_path)
    for row in table[1:]:
        full = form.format(folder, row[1])
        row[1] = {"back\\slash": row[1].replace("/", "\\"), "link": f"{folder}/{row[1]}"}.get(
            form, full
        )
    write_table(folder, table)
    if form == "link":
        (tmp_path / "link").symlink_to(folder)
    found = read_table("link" if form == "link" else "set")
    assert found.fingerprint() == expected and open_all(found) == [32, 16, 20]


def test_fingerprint(birds, tmp_path):
    before = read_table(birds).fingerprint()
    moved = shutil.copytree(birds, tmp_path / "moved")
    assert read_table(moved).fingerprint() == before
    for column, value in ((1, "x.jpg"), (2, "1"), (3, "1"), (4, "1")):
        table = write_waterbirds(moved)
        table[1][column] = value
        write_table(moved, table)
        assert read_table(moved).fingerprint() != before


# ---- names, minorities, counts


def test_names_are_given_only_where_they_are_right(tmp_path, monkeypatch, capsys):
    assert names(read_table(save(tmp_path))) == CODES  # 000001.jpg does not make it CelebA
    assert not capsys.readouterr().err
    bird = "{group:03d}.Gull/Gull_{number:04d}_{number}.jpg"
    words = own(bird, y=("gull", "tern"), a=("sea", "sky"))
    assert names(read_table(save(tmp_path, table=words)))[0] == "gull sea"
    monkeypatch.setitem(common.OFFICIAL_COUNTS, "celeba", list(map(list, COUNTS)))
    assert names(read_table(save(tmp_path))) == FACES  # its counts do
    capsys.readouterr()
    write_celeba(tmp_path / "x", counts=COUNTS)
    read_table(tmp_path / "x")
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "n_attributes, train, minority",
    [
        (2, WATERBIRDS[0], [1, 2]),
        (2, CELEBA[0], [3]),
        (2, (10, 5, 4, 10), [2]),  # half is not fewer than half
        (3, (9, 4, 5, 1, 3, 2), [1, 3]),
    ],
)
def test_minority_groups(n_attributes, train, minority):
    groups = common.describe_groups("abc", "xyz"[:n_attributes], train)
    assert [group["group"] for group in groups if group["minority"]] == minority
    assert groups[1]["name"] == "a y" and groups[n_attributes]["name"] == "b x"
    assert [group["train_n"] for group in groups] == list(train)


def test_twins(birds, capsys):
    table = write_waterbirds(birds)
    table.append([*table[1][:3], "2", "0", ""])  # a training image once more, in test
    table.append([*table[2][:3], "1", "0", ""])
    table.append([*table[3][:2], "1", "0", "0", ""])  # and one of another class
    write_table(birds, table)
    read_table(birds)
    assert "2 rows repeat an image of another split, 1 one of another class" in (
        capsys.readouterr().err
    )


def test_empty_groups(tmp_path, capsys):
    write_waterbirds(tmp_path, ((5, 2, 3, 4), (2, 2, 2, 2), (2, 2, 0, 2)))
    read_table(tmp_path)
    assert "no test image of waterbird on land; not in the worst group" in capsys.readouterr().err
    write_waterbirds(tmp_path, ((5, 0, 3, 4), (2, 2, 2, 2), (2, 2, 2, 2)))
    with pytest.raises(BadInput, match=r"every class with every .* in training.*\[5, 0, 3, 4\]"):
        read_table(tmp_path)


# ---- bad input: the message names the file, the line where there is one, and what to do


def cut(text):
    return text[: text.index("000007") + 8]


REFUSED = [
    (lambda t: t.replace("000004.jpg,0", '"000004.jpg,0'), "line 5: a quote is opened"),
    (
        lambda t: t.replace("000003.jpg,0", "000003.jpg,0,0"),
        "line 4: 5 cells where the header has 4",
    ),
    (cut, "line 8: 1 cells where the header has 4"),
    (lambda t: t.replace("000003.jpg,0", "000003.jpg,-1"), "line 4: y is '-1'; expected a whole"),
    (lambda t: t.replace("000003.jpg,0", "000003.jpg,bird"), "line 4: y is 'bird'"),
    (lambda t: t.replace("000003.jpg,0", "000003.jpg,"), "line 4: y is ''"),
    (lambda t: t.replace("000003.jpg,0", "000003.jpg,0.5"), "line 4: y is '0.5'"),
    (lambda t: t.replace("000003.jpg,0,0", "000003.jpg,0,9999"), "line 4: a is '9999'"),
    (lambda t: t.replace("000002.jpg,0,0,0", "000002.jpg,0,0,learn"), "line 3: split is not 0, 1"),
    (lambda t: t.replace(",y,", ",label,"), "no column y in the header img_filename,label,place"),
    (lambda t: t.replace("img_filename", "image"), "no column img_filename or filename"),
    (lambda t: t.split("\n", 1)[1], "no column img_filename or filename"),
    (lambda t: "", "no rows"),
    (lambda t: t.split("\n")[0] + "\n", "no rows"),
    (lambda t: "<html>404</html>\nno such page\n", "no column img_filename or filename"),
    (lambda t: b"\x89PNG\r\n\x1a\n\xff\xfe\0", "expected a csv in UTF-8"),
    (lambda t: t.replace(".jpg,1", ".jpg,0"), "two or more of each"),
    (lambda t: t.replace(",2\n", ",1\n"), "all three splits"),
]
OUTSIDE = ("../secret.jpg", "a/../../b.jpg", "/etc/passwd", "~/a.jpg", "C:\\a.jpg", "..\\b.jpg", "")


@pytest.mark.parametrize("edit, words", REFUSED)
def test_refused(tmp_path, edit, words):
    with pytest.raises(BadInput) as error:
        read_table(save(tmp_path, edit))
    assert str(error.value).startswith(f"{tmp_path}/metadata.csv") and words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out(tmp_path, name):
    with pytest.raises(BadInput, match="metadata.csv line 6: file name .* leads out of"):
        read_table(save(tmp_path, lambda text: text.replace("000005.jpg", name)))


@pytest.mark.parametrize(
    "file, old, new, words",
    [
        ("attr_celeba", "68\n", "202599\n", "announces 202599 rows, has 68"),
        ("attr_celeba", "Blond_Hair", "Blonde", "no column Blond_Hair"),
        ("attr_celeba", "3.jpg  1 -1 -1", "3.jpg  1 -1", "line 5: 3 cells where the header has 4"),
        ("attr_celeba", " 1 -1\n", " 2 -1\n", "list_attr_celeba.txt"),
        ("eval_partition", "2.jpg 0", "2.jpg 4", "line 4: split is not 0, 1, 2"),
        ("eval_partition", "2.jpg 0", "2.jpg", "line 2: 1 cells"),
        ("eval_partition", "7.jpg", "777.jpg", "2 images are in one of them only (000007.jpg, 0"),
    ],
)
def test_refused_celeba(tmp_path, file, old, new, words):
    write_celeba(tmp_path)
    path = tmp_path / f"list_{file}.txt"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(BadInput) as error:
        read_table(tmp_path)
    assert str(error.value).startswith(str(tmp_path)) and words in str(error.value)


def test_refused_attributes_of_three_values(tmp_path):
    write_celeba(tmp_path, "csv")
    path = tmp_path / "list_attr_celeba.csv"
    path.write_text(path.read_text().replace("-1", "0").replace("000009.jpg,1,0", "000009.jpg,1,2"))
    with pytest.raises(BadInput, match="list_attr_celeba.csv"):
        read_table(tmp_path)


def test_refused_places(tmp_path, no_waiting):
    with pytest.raises(BadInput, match="nowhere: no such file or folder"):
        read_table(tmp_path / "nowhere")
    write_waterbirds(tmp_path / "a/b")
    with pytest.raises(BadInput, match="neither a metadata csv nor list_attr_celeba.*try .*/a/b"):
        read_table(tmp_path)
    (tmp_path / "a/b/metadata_2.csv").touch()
    with pytest.raises(BadInput, match="holds 2 csv"):
        read_table(tmp_path / "a/b")
    os.mkfifo(tmp_path / "metadata.csv")
    with pytest.raises(BadInput, match="metadata.csv: not a file"):
        read_table(tmp_path)


def test_missing_images(birds, no_waiting):
    table = read_table(birds)
    (birds / table.files[2]).unlink()
    (birds / table.files[3]).unlink()
    os.mkfifo(birds / table.files[3])
    with pytest.raises(BadInput, match="2 of 32 train images are missing .*0003_3.jpg, .*0004_4.j"):
        Images(table, "train", None, 32)
    assert len(Images(table, "val", None, 32)) == 16


def png(size, mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "png")
    return buffer.getvalue()


def huge_png():
    """A one-bit PNG that announces 60000 x 60000 pixels."""
    data = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", 60000, 60000, 1, 0, 0, 0, 0)
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 9000)), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + kind + body
        data += struct.pack(">I", zlib.crc32(kind + body))
    return data


@pytest.mark.parametrize(
    "content, words",
    [
        (png((40, 32), "I;16"), "more than 8 bits"),
        (png((400, 320))[:300], "cannot be used"),
        (b"<html>404</html>", "cannot be used"),
        (b"", "cannot be used"),
        (huge_png(), "DecompressionBomb"),
        (None, "not a file"),
    ],
)
def test_images_that_cannot_be_read(tmp_path, no_waiting, content, words):
    path = tmp_path / "bird.png"
    path.write_bytes(content) if content is not None else os.mkfifo(path)
    with pytest.raises(BadInput) as error:
        common.read_image(path)
    assert str(error.value).startswith(f"{path}: ") and words in str(error.value)


def test_a_damaged_image_in_a_worker_is_one_line(birds):
    table = read_table(birds)
    path = birds / table.files[9]
    path.write_bytes(path.read_bytes()[:300])
    images = Images(table, "train", make_transform(table, 32, MEAN, STD), 32)
    with pytest.raises(BadInput) as error:
        list(make_loader(images, 8, workers=1))
    assert str(error.value).startswith(f"{path}: cannot be used") and "\n" not in str(error.value)


# ---- pixels


@pytest.mark.parametrize("size, resized", [(224, 256), (112, 128), (32, 37)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_evaluation_pixels(tmp_path, size, resized, mode):
    """Against PIL and numpy: resize to 256 x 256, cut out 224 in the middle, normalise."""
    shape = (90, 150, 3) if mode == "RGB" else (90, 150)
    picture = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "bird.png")
    image = common.read_image(tmp_path / "bird.png")
    found = make_transform(None, size, MEAN, STD)(image)
    small = Image.fromarray(picture).convert("RGB").resize((resized, resized), Image.BILINEAR)
    edge = round((resized - size) / 2)
    pixels = np.asarray(small)[edge : edge + size, edge : edge + size] / 255
    expected = ((pixels - MEAN) / STD).transpose(2, 0, 1)
    assert np.abs(found.numpy() - expected).max() < 1e-5 and found.dtype == torch.float32


def test_table_1():
    crop, flip, turn, shift, corners, *rest = make_transform(
        None, 224, MEAN, STD, "table1"
    ).transforms
    kinds = [v2.RandomResizedCrop, v2.RandomHorizontalFlip, v2.RandomRotation, v2.RandomAffine]
    assert [type(step) for step in (crop, flip, turn, shift)] == kinds
    assert (*crop.size, *crop.scale, *crop.ratio) == (224, 224, 0.7, 1, 0.75, 1.33)
    assert flip.p == 0.5 and list(turn.degrees) == [-15, 15] and list(shift.degrees) == [0, 0]
    assert [*shift.translate, *shift.scale] == [0.1, 0.1, 0.9, 1.1] and shift.shear is None
    assert isinstance(corners, v2.RandomPerspective) and corners.distortion_scale == 0.2
    assert (rest[2].mean, rest[2].std) == (MEAN, STD)
    released = make_transform(None, 224, MEAN, STD, "crop-flip").transforms
    assert [type(step) for step in released[:-4]] == kinds[:2]
    picture = Image.effect_noise((64, 48), 50).convert("RGB")
    for augment in ("table1", "crop-flip"):
        transform = make_transform(None, 32, MEAN, STD, augment)
        assert len({transform(picture).numpy().tobytes() for _ in range(8)}) == 8


def epoch_of(folder, epoch=1, seed=0, workers=0, views=1, order=0):
    """Pixels of an epoch, in the order in which they come, and the indices."""
    table = read_table(folder)
    transform = make_transform(table, 32, MEAN, STD, "table1")
    images = Images(table, "train", transform, 32, views=views, seed=seed)
    batches = EpochOrder(32, 8, order)
    batches.epoch = epoch
    x, y, g, index = map(torch.cat, zip(*make_loader(images, workers=workers, order=batches)))
    assert (y == images.y[index]).all() and (g == images.g[index]).all()
    return x, index


def test_pixels_depend_on_seed_epoch_image_and_view_alone(birds):
    states = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1]]
    x, index = epoch_of(birds)
    assert x.shape == (32, 3, 32, 32) and sorted(index.tolist()) == list(range(32))
    again, _ = epoch_of(birds, workers=2)
    assert torch.equal(again, x)
    other, elsewhere = epoch_of(birds, order=1)
    assert not torch.equal(elsewhere, index)
    assert torch.equal(other[elsewhere.argsort()], x[index.argsort()])
    views, _ = epoch_of(birds, views=2)
    assert torch.equal(views[:, 0], x) and not (views[:, 0] == views[:, 1]).all((1, 2, 3)).any()
    for changed in ({"epoch": 2}, {"seed": 1}):
        other, elsewhere = epoch_of(birds, **changed)
        other = other[elsewhere.argsort()]
        assert not (other == x[index.argsort()]).all((1, 2, 3)).any()
    after = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1]]
    assert torch.equal(after[0], states[0]) and after[1] == states[1]
    assert (after[2] == states[2]).all()


def test_evaluation_order_is_as_stored(birds):
    table = read_table(birds)
    images = Images(table, "val", make_transform(table, 32, MEAN, STD), 32)
    batches = list(make_loader(images, 7))
    assert [len(x) for x, *_ in batches] == [7, 7, 2]
    assert torch.cat([batch[3] for batch in batches]).tolist() == list(range(16))
    assert torch.equal(batches[1][0][0], images[7][0])


@pytest.mark.parametrize("n, batch_size, expected", [(33, 16, [16, 16]), (34, 16, [16, 16, 2])])
def test_epoch_order(n, batch_size, expected):
    order = EpochOrder(n, batch_size, seed=3)
    seen = []
    for epoch in (1, 2, 1):
        order.epoch = epoch
        batches = list(order)
        assert [len(batch) for batch in batches] == expected and len(order) == len(expected)
        flat = sum(batches, [])
        assert {key for key, _ in flat} == {epoch}
        seen.append([i for _, i in flat])
        assert len(set(seen[-1])) == sum(expected) and max(seen[-1]) < n
    assert seen[0] == seen[2] != seen[1] and list(EpochOrder(n, batch_size, 4)) != batches


def drawn(y, a, seed=0, size=48):
    labels = np.full(60, y), np.full(60, a)
    return common.draw_birds(*labels, np.random.default_rng(seed), size, difficulty=0)


def test_drawn_birds():
    """The same draws with another class or place: only the bird or only the background changes."""
    pixels, masks = drawn(0, 0)
    water, longer = drawn(1, 0)
    assert pixels.shape == (60, 3, 48, 48) and masks.shape == (60, 48, 48)
    assert (drawn(0, 0)[0] == pixels).all() and not (drawn(0, 0, seed=1)[0] == pixels).all()
    share = masks.mean((1, 2))
    assert 0.02 < share.min() and share.max() < 0.6
    assert (longer.sum((1, 2)) > 1.1 * masks.sum((1, 2))).all()
    outside = np.repeat(~(masks | longer)[:, None], 3, 1)
    assert (pixels == water)[outside].mean() > 0.95 > 0.5 > (pixels == water)[~outside].mean()
    lake, same = drawn(0, 1)
    assert (same == masks).all() and (pixels == lake)[outside].mean() < 0.1
    for picture, upright in ((pixels, True), (lake, False)):  # land changes across, water downwards
        grey = picture.mean(1)
        across, down = (np.abs(np.diff(grey, axis=axis)).mean((1, 2)) for axis in (2, 1))
        assert ((across > down) == upright).mean() > 0.8


def test_built_in_images(monkeypatch):
    table = read_table("synthetic")
    images = Images(table, "val", make_transform(table, 32, (0, 0, 0), (1, 1, 1)), 32)
    pixels, masks = common.draw_split("val", 32, 0.2)
    x, y, g, i = images[5]
    assert torch.equal(x, pixels[5] / 255) and (y, g, i) == (table.y[4800], table.g[4800], 5)
    assert masks.shape == (1199, 32, 32) and masks.dtype == torch.bool


# ---- real data


def test_real_waterbirds(real_data, capsys):
    table = read_table(real_data / "waterbirds")
    assert counts(table) == WATERBIRDS and names(table) == BIRDS and not capsys.readouterr().err
    with pytest.raises(BadInput, match="of 4795 train images are missing"):
        Images(table, "train", None, 32)


def test_real_celeba(real_data, capsys):
    started = time.process_time()
    table = read_table(real_data / "celeba")
    assert counts(table) == CELEBA and names(table) == FACES and not capsys.readouterr().err
    assert len(table.y) == 202_599 and time.process_time() - started < 20


def test_real_images(real_data, capsys):
    faces = read_table(real_data / "celeba_sample")
    assert "no val image of blond man" in capsys.readouterr().err
    birds = read_table(real_data / "birds50")
    assert counts(birds) == ((1078, 59, 21, 392), (98, 99, 35, 33), (283, 292, 98, 99))
    assert names(birds) == BIRDS and sum(open_all(birds)) == 2587
    for table, n in ((faces, 50), (birds, 265)):
        images = Images(table, "val", make_transform(table, 64, MEAN, STD), 64)
        assert len(images) == n and images[0][0].shape == (3, 64, 64)
