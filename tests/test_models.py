"""Networks by name, weights from a file or the hub, checkpoints that describe themselves."""

import shutil

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

import common
from common import BadInput, build_model, load_model

from .conftest import write_images, write_waterbirds

ABOUT = {
    "arch": "resnet10",
    "n_classes": 2,
    "classes": ["a", "b"],
    "size": 32,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.2, 0.2, 0.2],
    "epoch": 7,
    "data": {"labels": "abc"},
    "args": {},
    "erm": {},
}


def assert_body(model, published, head="classifier."):
    """All weights but the head's are those that were published."""
    for key, value in model.state_dict().items():
        assert key.startswith(head) or torch.equal(value, published[key]), key


def flip_a_bit(path):
    """Damage a file in its middle, where weights lie; torch.load would read another weight."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# ---- networks ----


@pytest.mark.parametrize(
    "arch, size",
    [
        ("resnet10", 48),
        ("mobilenetv3_small_050.lamb_in1k", 64),
        ("timm/resnet10t.c3_in1k", 64),
        ("tf_efficientnet_lite0", 64),
        ("vit_tiny_patch16_224", 64),
        ("deit_tiny_distilled_patch16_224", 64),
        ("levit_128s", 224),
    ],
)
def test_every_head_starts_as_torchs_linear(arch, size):
    torch.manual_seed(0)
    model = build_model(arch, 3, size)
    assert not model.training
    assert model(torch.rand(2, 3, size, size)).shape == (2, 3)
    heads = common.head_names(model)
    assert len(heads) == (2 if arch in ("deit_tiny_distilled_patch16_224", "levit_128s") else 1)
    for name in heads:
        linear = model.get_submodule(name)
        bound = linear.in_features**-0.5
        assert 0.8 * bound < linear.weight.abs().max() <= bound
        assert linear.bias.abs().max() <= bound
        assert not any(key.startswith(f"{name}.") for key in common.prunable_weights(model))


def test_resnet50_is_torchvisions(tmp_path):
    """Keys and values of a file as torchvision publishes it; mean and std are ImageNet's."""
    published = torchvision.models.resnet50().state_dict()
    torch.save(published, tmp_path / "resnet50-11ad3fa6.pth")
    model = build_model("resnet50", 2, 64, str(tmp_path / "resnet50-11ad3fa6.pth"))
    assert_body(model, published, "fc.")
    assert common.ARCHS["resnet50"] == "resnet50.tv2_in1k"
    assert model.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    "arch, size, words",
    [
        ("resnet51.nonsense", 224, "--arch resnet51.nonsense: cannot be used .*Unknown model"),
        ("vit_tiny_patch16_224", 8, "--arch vit_tiny_patch16_224: .* takes --size 8"),
        ("vit_tiny_patch16_224", 10**7, "takes --size 10000000"),
        ("xcit_nano_12_p8_224", 100, "takes --size 100"),
        ("hf-hub:timm/resnet18.a1_in1k", 64, "--arch hf-hub:.* it is fetched from elsewhere"),
    ],
)
def test_what_cannot_be_built(arch, size, words):
    with pytest.raises(BadInput, match=words) as error:
        build_model(arch, 2, size)
    assert "\n" not in str(error.value)


def test_a_size_of_which_patches_would_leave_rows_over():
    """The last 8 rows and columns would change no logit; on a convolution, every row counts. The
    patches of PiT overlap."""
    with pytest.raises(BadInput, match="--size 56: .* last 8 rows; .* 48 and 64"):
        build_model("vit_tiny_patch16_224", 2, 56)
    with pytest.raises(BadInput, match="--size 60: .* last 4 rows; .* 56 and 64"):
        build_model("pit_ti_224", 2, 60)
    for arch, size in (("vit_tiny_patch16_224", 48), ("resnet10", 57), ("test_efficientnet", 57)):
        model = build_model(arch, 2, size)
        x = torch.rand(1, 3, size, size)
        other = x.clone()
        other[..., -1, :] = 9.0
        assert not torch.equal(model(x), model(other))


# ---- weights ----


def test_learned_weights_tell_body_neck_and_place_of_birds(birds, tmp_path):
    """Those beside data/birds.py, against those of two steps, which are as good as none."""
    few = tmp_path / "few.pth"
    birds.main(birds.parse_args(["--learn", "--steps", "2", "--weights", str(few)]))
    assert list(tmp_path.iterdir()) == [few]  # and no picture was drawn
    errors = []
    for path in (few, common.BIRD_WEIGHTS):
        published = common.load_tensors(path)["model"]
        assert_body(build_model("resnet10", 2, 48, path), published, "fc.")
        model = build_model("resnet10", 14, 48)
        model.load_state_dict(published)
        x, numbers = birds.draw_task(model, 500, torch.Generator().manual_seed(1))
        told, *_ = common.predict(model, [(x, numbers, numbers)])
        errors.append((told - numbers).square().mean(0))  # 1 is that of knowing nothing
    assert errors[0].min() > 0.9
    assert errors[1][[0, 1, 13]].max() < 0.3  # body, neck, place
    assert_body(build_model("resnet10", 2, 48, "default"), published, "fc.")


def test_weights_as_trainers_wrap_them(tmp_path):
    published = timm.create_model("mobilenetv3_small_050").state_dict()
    for value in published.values():
        if value.is_floating_point():
            value += 0.5
    save_file(published, tmp_path / "w.safetensors")
    parallel = {f"module.{key}": value for key, value in published.items()}
    torch.save(parallel, tmp_path / "module.pth")
    lightning = {f"model.{key}": value for key, value in published.items()}
    torch.save({"state_dict": lightning}, tmp_path / "lightning.pth")
    for wrapper in ("state_dict", "model_state_dict", "model"):
        torch.save({wrapper: published, "epoch": 3}, tmp_path / f"{wrapper}.pth")
    paths = list(tmp_path.iterdir())
    assert len(paths) == 6
    for path in paths:
        assert_body(build_model("mobilenetv3_small_050", 2, 64, str(path)), published)


def test_a_transformers_weights_of_another_size(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224")
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    small = build_model("vit_tiny_patch16_224", 2, 96, str(tmp_path / "vit.pth"))
    assert small.pos_embed.shape == (1, 37, 192)
    assert small.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    assert torch.equal(small.pos_embed[:, 0], model.pos_embed[:, 0])
    assert torch.equal(small.blocks[3].mlp.fc1.weight, model.blocks[3].mlp.fc1.weight)


def test_default_weights_are_those_of_the_hub(tmp_path, monkeypatch):
    """They lie in its cache, or cannot be had without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    words = "--weights default: .* model.safetensors of timm/mobilenetv3_small_050.*--weights FILE"
    with pytest.raises(BadInput, match=words):
        build_model("mobilenetv3_small_050", 2, 64, "default")
    published = timm.create_model("mobilenetv3_small_050").state_dict()
    folder = tmp_path / "models--timm--mobilenetv3_small_050.lamb_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("0")
    (folder / "snapshots/0").mkdir(parents=True)
    save_file(published, folder / "snapshots/0/model.safetensors")
    assert_body(build_model("mobilenetv3_small_050", 2, 64, "default"), published)


def test_weights_that_are_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    narrow = torchvision.models.resnet18()
    narrow.conv1 = torch.nn.Conv2d(1, 64, 7, bias=False)
    torch.save(narrow.state_dict(), "narrow.pth")
    torch.save(torchvision.models.squeezenet1_1().state_dict(), "other.pth")
    (tmp_path / "code.pth").write_bytes(b"cos\nmkdir\n(S'ran'\ntR.")  # calls os.mkdir("ran")
    torch.save(torchvision.models.resnet18().state_dict(), "bit.pth")
    flip_a_bit(tmp_path / "bit.pth")
    spoilt = torchvision.models.resnet18().state_dict()
    spoilt["layer1.0.conv1.weight"][3, 0, 0, 0] = torch.nan
    torch.save(spoilt, "nan.pth")
    spoilt["layer1.0.conv1.weight"][3, 0, 0, 0] = torch.inf
    save_file(spoilt, "inf.safetensors")
    spoilt["layer1.0.conv1.weight"] = torch.ones(64, 64, 3, 3, dtype=torch.int8)
    torch.save(spoilt, "quantised.pth")
    for name, words in {
        "none.pth": "no such file",
        "other.pth": "Missing key.*conv1",
        "narrow.pth": "mismatch",
        "code.pth": "cannot be used",
        "bit.pth": "damaged",
        "quantised.pth": "layer1.0.conv1.weight holds torch.int8",
        "nan.pth": "layer1.0.conv1.weight has a weight that is not a finite number",
        "inf.safetensors": "layer1.0.conv1.weight has a weight that is not a finite number",
    }.items():
        with pytest.raises(BadInput, match=f"{name}: .*{words}") as error:
            build_model("resnet18", 2, 64, name)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


# ---- checkpoints ----


def write_checkpoint(path, model, **changed):
    torch.save({**ABOUT, "model": model.state_dict(), **changed}, path)


def test_round_trip(tmp_path):
    model = build_model("resnet10", 2, 32)
    write_checkpoint(tmp_path / "a.pt", model)
    again, saved = load_model(tmp_path / "a.pt")
    assert saved["epoch"] == 7
    assert not again.training
    assert again.pretrained_cfg["mean"] == [0.5, 0.5, 0.5]
    assert_body(again, model.state_dict(), head=())  # the head too
    assert common.fingerprint_of(model) == common.fingerprint_of(again)
    again.fc.bias.data[0] += 1e-3
    assert common.fingerprint_of(model) != common.fingerprint_of(again)


@pytest.mark.parametrize("changed", [{"size": "32"}, {"arch": "resnet18"}, {"n_classes": 3}])
def test_odd_checkpoints(tmp_path, changed):
    write_checkpoint(tmp_path / "a.pt", build_model("resnet10", 2, 32), **changed)
    with pytest.raises(BadInput, match="cannot be used") as error:
        load_model(tmp_path / "a.pt")
    assert "\n" not in str(error.value)


def test_foreign_and_damaged_checkpoints(tmp_path):
    path = tmp_path / "a.pt"
    with pytest.raises(BadInput, match="a.pt: no such file; train_erm.py and"):
        load_model(path)
    torch.save({"model": {"weight": torch.zeros(2)}, "arch": "resnet10", "epoch": 3}, path)
    with pytest.raises(BadInput, match="a.pt: .*lacks n_classes, classes, size, mean, std, data"):
        load_model(path)
    write_checkpoint(path, build_model("resnet10", 2, 32))
    flip_a_bit(path)
    with pytest.raises(BadInput, match="a.pt: cannot be used .*damaged"):
        load_model(path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_checkpoint_with_a_number_that_is_not_finite(tmp_path, value):
    model = build_model("resnet10", 2, 32)
    model.conv1.weight.data[5] = value
    write_checkpoint(tmp_path / "a.pt", model)
    with pytest.raises(BadInput, match="a.pt: .*conv1.weight has a weight that is not") as error:
        load_model(tmp_path / "a.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_a_checkpoint_of_an_unfinished_stage_is_refused(tmp_path, name):
    """It may still change while it is studied. A copy elsewhere, or a kept epoch, may not."""
    model = build_model("resnet10", 2, 32)
    folder = tmp_path / "erm"
    folder.mkdir()
    write_checkpoint(folder / name, model)
    (folder / "args.json").write_text("{}")
    shutil.copy(folder / name, folder / "epoch_007.pt")
    shutil.copy(folder / name, tmp_path)
    with pytest.raises(BadInput, match=f"erm is unfinished, so its {name} may still change"):
        load_model(folder / name)
    for path in (folder / "epoch_007.pt", tmp_path / name):
        assert_body(load_model(path)[0], model.state_dict(), head=())
    (folder / "results.json").write_text("{}")
    assert_body(load_model(folder / name)[0], model.state_dict(), head=())


def test_data_that_changed_since_training(tmp_path):
    """Labels of training and validation are compared, those of test images are not; the data may
    lie elsewhere now."""
    rows = write_waterbirds(tmp_path / "data")
    table = common.read_table(tmp_path / "data")
    data = {
        "source": table.source,
        "attributes": None,
        "labels": table.fingerprint("train", "val"),
        "images": table.fingerprint_of_images("train", "val"),
    }
    erm = {"id": "abc", "settings": {"seed": 5}}
    write_checkpoint(tmp_path / "a.pt", build_model("resnet10", 2, 32), data=data, erm=erm)
    shutil.move(tmp_path / "data", tmp_path / "moved")
    with pytest.raises(BadInput, match="data/metadata.csv: no such file"):
        common.reopen(tmp_path / "a.pt")
    _, checkpoint, again = common.reopen(tmp_path / "a.pt", tmp_path / "moved")
    assert (again.g == table.g).all()
    assert checkpoint["erm"] == erm

    text = (tmp_path / "moved/metadata.csv").read_text()
    less = text.splitlines()[:-1]  # without the last test image
    (tmp_path / "moved/metadata.csv").write_text("\n".join(less))
    common.reopen(tmp_path / "a.pt", tmp_path / "moved")
    changed = text.replace(",".join(rows[1][1:5]), f"{rows[1][1]},1,0,0")
    assert changed != text
    (tmp_path / "moved/metadata.csv").write_text(changed)
    with pytest.raises(BadInput, match="changed since .*a.pt was trained on them; train again"):
        common.reopen(tmp_path / "a.pt", tmp_path / "moved")

    (tmp_path / "moved/metadata.csv").write_text(text)
    others = [(name, int(y), int(place), None) for _, name, y, _, place, _ in rows[1:]]
    write_images(tmp_path / "moved", others, size=(20, 20))  # the same labels, other pictures
    with pytest.raises(BadInput, match="are other ones than those that .*a.pt was trained on"):
        common.reopen(tmp_path / "a.pt", tmp_path / "moved")
