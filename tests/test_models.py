"""Networks by name, weights from a file or the hub, checkpoints that describe themselves."""

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

import common
from common import BadInput, build_model, load_model, save_checkpoint
from results import birds

HEADS = {"resnet10": 48, "mobilenetv3_small_050.lamb_in1k": 64, "timm/resnet10t.c3_in1k": 64}
HEADS |= {"tf_efficientnet_lite0": 64, "vit_tiny_patch16_224": 64, "levit_128s": 224}
HEADS |= {"deit_tiny_distilled_patch16_224": 64}
UNKNOWN = [("resnet51.nonsense", 224, "resnet51.nonsense: cannot be used .*Unknown model")]
UNKNOWN += [("vit_tiny_patch16_224", size, f"--size {size}") for size in (8, 10**7)]
UNKNOWN += [("xcit_nano_12_p8_224", 100, "--size 100")]
ABOUT = {"arch": "resnet10", "n_classes": 2, "size": 32, "epoch": 7, "args": {}, "metrics": {}}
ABOUT |= {"classes": ["a", "b"], "mean": [0.5] * 3, "std": [0.2] * 3, "data": {}}
ODD = [{"size": "32"}, {"args": None}, {"mean": [0.5, 0.5]}, {"std": ["a", "b", "c"]}]
ODD += [{"arch": "resnet18"}, {"n_classes": 3}]


@pytest.mark.parametrize("arch,size", HEADS.items())
def test_every_head_starts_as_torchs_linear(arch, size):
    torch.manual_seed(0)
    model = build_model(arch, 3, size)
    assert not model.training and model(torch.rand(2, 3, size, size)).shape == (2, 3)
    for name in common.head_names(model):
        head = model.get_submodule(name)
        bound = head.in_features**-0.5
        assert 0.8 * bound < head.weight.abs().max() <= bound and head.bias.abs().max() <= bound
        assert name not in common.prunable_layers(model)


def assert_body(model, published, head="classifier."):
    for key, value in model.state_dict().items():
        assert key.startswith(head) or torch.equal(value, published[key]), key


def test_resnet50_is_torchvisions(tmp_path):
    """Keys and values of a file as torchvision publishes it; mean and std are ImageNet's."""
    published = torchvision.models.resnet50().state_dict()
    torch.save(published, tmp_path / "resnet50-11ad3fa6.pth")
    model = build_model("resnet50", 2, 64, str(tmp_path / "resnet50-11ad3fa6.pth"))
    assert_body(model, published, "fc.")
    assert common.ARCHS["resnet50"] == "resnet50.tv2_in1k"
    assert model.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)


def test_what_stands_for_imagenet_tells_body_neck_and_place_of_birds(tmp_path):
    birds.main(birds.parse_args(["--steps", "2", "--out", str(tmp_path / "few.pth")]))
    generator, errors = torch.Generator().manual_seed(1), []
    for path in (tmp_path / "few.pth", common.BIRDS):
        published = torch.load(path, weights_only=True)["model"]
        assert_body(build_model("resnet10", 2, 48, path), published, "fc.")
        model = build_model("resnet10", 14, 48)
        model.load_state_dict(published)
        x, numbers = birds.draw(500, generator)
        told, *_ = common.predict(model, [(x, numbers, numbers)])
        errors.append((told - numbers).square().mean(0))
    assert errors[0].min() > 0.9 and errors[1][[0, 1, 13]].max() < 0.3  # mean square: 1 is none
    assert_body(build_model("resnet10", 2, 48, "default"), published, "fc.")


def test_weights_as_trainers_wrap_them(tmp_path):
    published = timm.create_model("mobilenetv3_small_050").state_dict()
    published = {k: v + 0.5 if v.is_floating_point() else v for k, v in published.items()}
    save_file(published, tmp_path / "w.safetensors")
    torch.save({f"module.{k}": v for k, v in published.items()}, tmp_path / "module.pth")
    for wrapper in ("state_dict", "model_state_dict", "model"):
        torch.save({wrapper: published, "epoch": 3}, tmp_path / f"{wrapper}.pth")
    for path in tmp_path.iterdir():
        assert_body(build_model("mobilenetv3_small_050", 2, 64, str(path)), published)


def test_a_transformers_weights_of_another_size(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224")
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    small = build_model("vit_tiny_patch16_224", 2, 96, str(tmp_path / "vit.pth"))
    assert small.pos_embed.shape == (1, 37, 192) and small.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
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
    for name in ("refs", "snapshots/0"):
        (folder / name).mkdir(parents=True)
    (folder / "refs/main").write_text("0")
    save_file(published, folder / "snapshots/0/model.safetensors")
    assert_body(build_model("mobilenetv3_small_050", 2, 64, "default"), published)


def test_weights_that_are_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    narrow, other = torchvision.models.resnet18(), torchvision.models.squeezenet1_1()
    narrow.conv1 = torch.nn.Conv2d(1, 64, 7, bias=False)
    torch.save(narrow.state_dict(), "narrow.pth")
    torch.save(other.state_dict(), "other.pth")
    (tmp_path / "code.pth").write_bytes(b"cos\nmkdir\n(S'ran'\ntR.")  # calls os.mkdir("ran")
    torch.save(torchvision.models.resnet18().state_dict(), "bit.pth")
    data = bytearray((tmp_path / "bit.pth").read_bytes())
    data[len(data) // 2] ^= 1  # torch.load would read a slightly different weight
    (tmp_path / "bit.pth").write_bytes(data)
    bad = {"none.pth": "no such file", "other.pth": "Missing key.*conv1", "narrow.pth": "mismatch"}
    for name, words in {**bad, "code.pth": "cannot be used", "bit.pth": "damaged"}.items():
        with pytest.raises(BadInput, match=f"{name}: .*{words}"):
            build_model("resnet18", 2, 64, name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("arch,size,words", UNKNOWN)
def test_what_cannot_be_built(arch, size, words):
    with pytest.raises(BadInput, match=words):
        build_model(arch, 2, size)


def test_round_trip(tmp_path):
    model = build_model("resnet10", 2, 32)
    save_checkpoint(tmp_path / "a.pt", model, **ABOUT)
    again, saved = load_model(tmp_path / "a.pt")
    assert saved["epoch"] == 7 and not again.training and again.pretrained_cfg["mean"] == [0.5] * 3
    assert_body(again, model.state_dict(), head=())  # the head too
    assert common.fingerprint_of(model) == common.fingerprint_of(again)
    again.fc.bias.data[0] += 1e-3
    assert common.fingerprint_of(model) != common.fingerprint_of(again)


def test_damaged_foreign_and_odd_checkpoints(tmp_path):
    path, model = tmp_path / "a.pt", build_model("resnet10", 2, 32)
    torch.save({"weight": torch.zeros(2)}, path)
    bad = [path.read_bytes()]
    for change in [*ODD, {}]:
        save_checkpoint(path, model, **{**ABOUT, **change})
        bad.append(bytearray(path.read_bytes()))
    bad[-1][len(bad[-1]) // 2] ^= 1  # torch.load would read a slightly different weight
    for content in bad:
        path.write_bytes(content)
        with pytest.raises(BadInput, match="a.pt: cannot be used"):
            load_model(path)
    with pytest.raises(BadInput, match="a.pt/b cannot be written"):
        common.write(path / "b", "x")
