"""gradcam.py: maps in closed form and against captum, the focus by hand, whole runs."""

import csv
import json
import math
import shutil

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from PIL import Image

import common
import gradcam
from common import BadInput, build_model
from gradcam import bootstrap, check_layer, choose_layer, focus, grad_cam, is_empty


def network(arch="resnet10", size=64):
    torch.manual_seed(0)
    return build_model(arch, 2, size).eval()


def pictures(n=3, size=64, seed=1):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


class OneConvolution(torch.nn.Module):
    """Grad-CAM in closed form: the gradient of logit c by channel k is head[c, k] / (H W)."""

    def __init__(self, after=None):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.after = torch.nn.Conv2d(3, 5, 3, padding=1), after or torch.nn.Identity()
        self.head = torch.nn.Linear(5, 4)

    def forward(self, x):
        return self.head(self.after(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize("target", [0, 3, [2, 0, 1], None])
def test_closed_form(target):
    model, x = OneConvolution(), pictures(3, 9)
    maps, logits = grad_cam(model, x, "conv", None if target is None else torch.tensor(target))
    classes = model(x).argmax(1) if target is None else torch.tensor(target).expand(3)
    assert torch.equal(logits, model(x))
    expected = torch.einsum("bk,bkhw->bhw", model.head.weight[classes], model.conv(x)).relu() / 81
    assert torch.allclose(maps, expected, atol=1e-7) and maps.max() > 0


@pytest.mark.parametrize("inplace", [False, True])
def test_a_relu_behind_the_layer_does_no_harm(inplace):
    """It lets the gradient through where the activation, in front of it, is positive."""
    model, x = OneConvolution(torch.nn.ReLU(inplace)), pictures(2, 9)
    activation = model.conv(x).detach()
    weights = model.head.weight[1] * (activation > 0).float().mean((2, 3)) / 81
    expected = torch.einsum("bk,bkhw->bhw", weights, activation).relu()
    assert torch.allclose(grad_cam(model, x, "conv", 1)[0], expected, atol=1e-7)


def scaled(maps):
    low, high = maps.flatten(1).aminmax(dim=1)
    return (maps - low[:, None, None]) / (high - low)[:, None, None]


def by_captum(model, layer, x, target):
    maps = LayerGradCam(model, layer).attribute(x, target, relu_attributions=True)
    return F.interpolate(maps, x.shape[2:], mode="bilinear", align_corners=False)[:, 0].detach()


@pytest.mark.parametrize("layer", ["layer4.0.conv2", "layer2.0.conv1", "conv1"])
def test_agrees_with_captum(layer):
    model, x, target = network(size=96), pictures(3, 96), torch.tensor([1, 0, 1])
    for module in model.modules():  # captum keeps what an in-place ReLU overwrites
        if isinstance(module, torch.nn.ReLU):
            module.inplace = False
    reference = by_captum(model, model.get_submodule(layer), x, target)
    maps, _ = grad_cam(model, x, layer, target)
    shows = ~is_empty(reference)
    assert shows.any() and torch.equal(is_empty(maps), ~shows)
    assert (scaled(maps[shows]) - scaled(reference[shows])).abs().max() < 1e-4


def test_the_last_feature_map_is_what_the_pooling_sees():
    model, x = network("mobilenetv3_small_050"), pictures(2)
    reference = by_captum(model, model.blocks[-1], x, 1)
    maps, logits = grad_cam(model, x, None, 1)
    assert torch.allclose(scaled(maps), scaled(reference), atol=1e-4)
    assert torch.allclose(logits, model(x), atol=1e-6)


class PatchGrid(torch.nn.Module):
    """A norm whose patch tokens pass through `grid` as (B, C, h, w), for captum to take hold of."""

    def __init__(self, norm, prefix, side):
        super().__init__()
        self.norm, self.prefix, self.side, self.grid = norm, prefix, side, torch.nn.Identity()

    def forward(self, x):
        x = self.norm(x)
        patches = x[:, self.prefix :].transpose(1, 2).unflatten(2, (self.side, self.side))
        patches = self.grid(patches).flatten(2).transpose(1, 2)
        return torch.cat([x[:, : self.prefix], patches], 1)


@pytest.mark.parametrize("registers", [0, 4])
def test_agrees_with_captum_on_a_vit(registers):
    torch.manual_seed(0)
    options = {"img_size": 80, "num_classes": 2, "depth": 3, "reg_tokens": registers}
    model, x = timm.create_model("vit_tiny_patch16_224", **options).eval(), pictures(3, 80)
    layer = choose_layer(None, model, "vit_tiny_patch16_224")
    assert layer == "blocks.2.norm1"
    maps, _ = grad_cam(model, x, layer, 1)
    model.blocks[-1].norm1 = PatchGrid(model.blocks[-1].norm1, 1 + registers, 5)
    reference = by_captum(model, model.blocks[-1].norm1.grid, x, 1)
    assert not is_empty(maps).any() and (scaled(maps) - scaled(reference)).abs().max() < 1e-4


@pytest.mark.parametrize(
    "arch,size,layer,grid",
    [
        ("resnet50", 64, "layer4.2.conv3", [2, 2]),
        ("seresnet18", 64, None, [2, 2]),
        ("swin_tiny_patch4_window7_224", 224, None, [7, 7]),
        ("mobilevit_xxs", 64, None, [2, 2]),
        ("levit_128s", 224, None, [4, 4]),
        ("xcit_nano_12_p16_224", 64, "blocks.11.norm1", [4, 4]),
    ],
)
def test_default_layers_are_maps_of_the_image(arch, size, layer, grid):
    model = network(arch, size)
    for norm in model.modules():  # timm starts the last one of each block at zero
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(norm.weight)
    assert choose_layer(None, model, arch) == layer
    assert check_layer(model, layer, size) == grid


@pytest.mark.parametrize(
    "arch,size,layer,shape",
    [
        ("swin_tiny_patch4_window7_224", 224, "patch_embed.proj", (96, 56, 56)),
        ("convnext_atto", 64, "stages.3.blocks.1.mlp.fc2", (320, 2, 2)),
    ],
)
def test_channels_of_a_named_layer(arch, size, layer, shape):
    activation, _, _ = gradcam.activations(network(arch, size), pictures(1, size), layer, 0)
    assert activation.shape[1:] == shape


def test_swins_channels_come_last():
    """The right rows and columns: a picture that differs in one corner changes the map there."""
    model, x = network("swin_tiny_patch4_window7_224", 224), pictures(1, 224)
    features = model.forward_features(x)
    activation, _, _ = gradcam.activations(model, x, None, 0)
    assert torch.allclose(activation, features.permute(0, 3, 1, 2), atol=1e-6)


@pytest.mark.parametrize(
    "arch,layer,words",
    [
        ("cait_xxs24_224", None, "do not depend on the patches"),
        ("resnet10", "global_pool", "which is no map"),
        ("vit_tiny_patch16_224", "blocks.0.attn.qkv", None),
    ],
)
def test_layers_that_are_no_maps_are_refused(arch, layer, words):
    model = network(arch, 224 if arch.startswith("cait") else 32)
    if words:
        with pytest.raises(BadInput, match=words):
            check_layer(model, layer, 224 if arch.startswith("cait") else 32)
    else:
        check_layer(model, layer, 32)
    with pytest.raises(BadInput, match="no such module"):
        choose_layer("layer9", model, arch)


@pytest.mark.parametrize("raises", [False, True])
def test_leaves_the_model_as_it_was(raises):
    model, x = network().train(), pictures(2)
    model.layer1.eval()  # modes differ between modules, as where BatchNorm is frozen
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    target = torch.tensor([0, 7]) if raises else 0  # there is no class 7
    try:
        grad_cam(model, x, "layer3.0.conv1", target)
    except RuntimeError:
        assert raises
    assert torch.is_grad_enabled() and [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


# ---- the numbers ----


def test_focus_by_hand():
    maps, mask = torch.zeros(4, 2, 2), torch.tensor([[True, False], [False, False]])
    maps[0] = torch.tensor([[3.0, 1.0], [0.0, 0.0]])  # 3 of 4 inside, the maximum too
    maps[1] = torch.tensor([[2.0, 2.0], [0.0, 0.0]])  # a plateau shares the hit
    maps[2] = torch.tensor([[0.0, 0.0], [0.0, 5.0]])
    scores = focus(maps, mask.expand(4, 2, 2))
    assert scores[:3].tolist() == [[0.75, 1], [0.5, 0.5], [0, 0]]
    assert scores[3].isnan().all()  # an empty map says nothing
    assert focus(maps[:1], torch.zeros(1, 2, 2, dtype=torch.bool)).isnan().all()


def test_gaussian_and_random_head():
    blob = gradcam.gaussian(48)
    assert blob.argmax() in (48 * 23 + 23, 48 * 23 + 24, 48 * 24 + 23, 48 * 24 + 24)
    assert blob[23, 35].item() == pytest.approx(blob[23, 23].item() * math.exp(-0.5), rel=0.05)
    model = network()
    other = gradcam.random_head(model, 0)
    changed = [
        k for k, v in model.state_dict().items() if not torch.equal(v, other.state_dict()[k])
    ]
    assert changed == ["fc.weight", "fc.bias"]


def test_the_intervals_cover_95_percent():
    """1,000 data sets of a skewed quantity whose mean is known."""
    generator, covered = torch.Generator().manual_seed(0), 0
    for seed in range(1000):
        values = torch.rand(150, 1, generator=generator).square()  # mean 1/3
        values[torch.rand(150, 1, generator=generator) < 0.1] = math.nan  # empty maps
        _, (low, high) = bootstrap(values, seed, 400)
        covered += low.item() <= 1 / 3 <= high.item()
    assert 930 <= covered <= 970


def test_masks_go_the_way_of_the_images(tmp_path):
    """A mask of some columns, resized and cropped like a photograph of the same shape."""
    pixels = np.zeros((40, 64), np.uint8)
    pixels[:, 32:] = 255
    Image.fromarray(pixels).save(tmp_path / "m.png")
    Image.fromarray(np.stack([pixels] * 3, -1)).save(tmp_path / "i.jpg", quality=100)
    mask = gradcam.read_mask(tmp_path / "m.png", tmp_path / "i.jpg", 224)
    plain = common.make_transform(None, 224, [0, 0, 0], [1, 1, 1])
    assert torch.equal(mask, plain(common.read_image(tmp_path / "i.jpg"))[0] > 0.5)
    Image.fromarray(pixels[:20]).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("no mask")
    Image.fromarray(pixels * 0).save(tmp_path / "black.png")
    for name, why in {"none": "missing", "small": "another size", "text": "unreadable"}.items():
        assert why in gradcam.read_mask(tmp_path / f"{name}.png", tmp_path / "i.jpg", 224)
    assert "empty" in gradcam.read_mask(tmp_path / "black.png", tmp_path / "i.jpg", 224)


# ---- the script ----


@pytest.fixture
def run(erm_run, tmp_path):
    """A copy of the run with a "fine-tuned" network whose head is the reverse of the other's."""
    shutil.copytree(erm_run / "run/erm", tmp_path / "run/erm")
    model, checkpoint = common.load_model(tmp_path / "run/erm/best.pt")
    checkpoint["model"]["fc.weight"] *= -1
    checkpoint["model"]["fc.bias"] *= -1
    model.load_state_dict(checkpoint.pop("model"))
    (tmp_path / "run/finetune").mkdir()
    common.save_checkpoint(tmp_path / "run/finetune/best.pt", model, **checkpoint)
    table = (erm_run / "data/metadata.csv").read_text().splitlines()
    for row in csv.DictReader(table):
        path = (tmp_path / "masks" / row["img_filename"]).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((32, 40), np.uint8)
        pixels[8:24, 12:28] = 255
        Image.fromarray(pixels).save(path)
    path.unlink()  # that of the last test image
    return tmp_path / "run"


def draw(run, *flags):
    flags = ["--run", run, "--workers", 0, "--device", "cpu", "--layer", "layer1.0.conv2", *flags]
    gradcam.main(gradcam.parse_args(list(map(str, flags))))
    return json.loads((run / "gradcam/results.json").read_text())


def test_a_run_with_masks(run, capsys):
    results = draw(run, "--masks", run.parent / "masks", "--n", 4)
    names = {path.name for path in (run / "gradcam").iterdir()}
    assert names == set(gradcam.FILES)
    assert [row["label"] for row in results["images"]] == [0, 0, 1, 1]  # G1*, G1*, G2*, G2*
    for row in results["images"]:  # the reversed head says the opposite, as surely
        erm, finetune = row["networks"]["erm"], row["networks"]["finetune"]
        assert erm["predicted"] != finetune["predicted"]
        assert erm["confidence"] == pytest.approx(finetune["confidence"], abs=2e-4)
    assert results["without_mask"] == {"missing": 1}
    rows = {(row["model"], row["group"]): row for row in results["focus"]}
    assert [rows["erm", j]["n"] for j in range(4)] == [6, 5, 4, 4]
    for j in range(4):
        gain = rows["finetune - erm", j]
        both = rows["erm", j]["empty"] == rows["finetune", j]["empty"] == 0
        if both:
            change = rows["finetune", j]["mass"] - rows["erm", j]["mass"]
            assert gain["mass"] == pytest.approx(change, abs=2e-4)
    assert "without a usable mask: 1 missing" in capsys.readouterr().err
    with Image.open(run / "gradcam/focus.png") as image:
        assert np.asarray(image.convert("L")).std() > 5


def test_which_class_is_explained(run):
    """Own class of the one network is the other class of the network with the reversed head."""
    own = draw(run, "--masks", run.parent / "masks")["focus"]
    fixed = draw(run, "--masks", run.parent / "masks", "--target", 0)["focus"]
    at = {(row["model"], row["group"]): row["mass"] for row in fixed}
    for row in own:
        if row["model"] in ("erm", "finetune") and row["group"] in (0, 1):  # class 0
            assert row["mass"] == at[row["model"], row["group"]]
    assert any(row["mass"] != at[row["model"], row["group"]] for row in own if row["group"] > 1)


def test_own_files_and_no_masks(run):
    file = next((run.parent / "masks").rglob("*.png"))
    results = draw(run, "--images", file, "--masks", run.parent / "masks")
    assert results["target"] == "predicted" and results["focus"] == []
    assert results["images"][0]["label"] is None
    assert draw(run, "--groups", 3, "--n", 2)["images"][1]["caption"] == "G3 waterbird on water"


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--target", "2"], "expected label, predicted or a class, 0 .landbird."),
        (["--groups", 4], "expected numbers below 4"),
        (["--n", 0], "must be positive"),
        (["--after", "nowhere.pt"], "nowhere.pt: no such file"),
        (["--masks", "nowhere"], "none of 20 is usable .20 missing"),
        (["--images", "nowhere.jpg"], "nowhere.jpg: no such file"),
        (["--layer", "layer9"], "no such module"),
    ],
)
def test_refusals_leave_the_old_folder(run, flags, words):
    draw(run, "--n", 1)
    before = (run / "gradcam/results.json").read_bytes()
    with pytest.raises(BadInput, match=words):
        draw(run, *flags)
    assert (run / "gradcam/results.json").read_bytes() == before
    with pytest.raises(BadInput, match="name one checkpoint twice"):
        draw(run, "--after", run / "erm/best.pt")


def test_networks_must_be_alike(run):
    model, checkpoint = common.load_model(run / "finetune/best.pt")
    checkpoint.pop("model")
    path = run / "finetune/best.pt"
    common.save_checkpoint(path, model, **{**checkpoint, "classes": ["cow", "camel"]})
    with pytest.raises(BadInput, match="the networks must be alike"):
        draw(run)
