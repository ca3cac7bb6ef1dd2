"""gradcam.py: maps in closed form and against an independent library, the focus measures by hand, whole runs."""

import copy
import csv
import json
import math
import sys

import numpy as np
import pytest
import timm
import torch
import torchvision
from captum.attr import LayerGradCam
from PIL import Image

import gradcam as stage
from common import BadInput, Split, build_model, load_checkpoint, save_checkpoint
from gradcam import bootstrap, choose_images, choose_layer, focus, gaussian, grad_cam, is_empty, random_head, read_mask

from .conftest import assert_refused, run_script, write_waterbirds


def network(arch="resnet10", size=64):
    torch.manual_seed(0)
    return build_model(arch, 2, size).eval()


def pictures(n=3, size=64, seed=1):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


class OneConvolution(torch.nn.Module):
    """Grad-CAM in closed form: the gradient of logit c by channel k is head[c, k] / (H W) everywhere."""

    def __init__(self, after=torch.nn.Identity):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.after = torch.nn.Conv2d(3, 5, 3, padding=1), after()
        self.head = torch.nn.Linear(5, 4)

    def forward(self, x):
        return self.head(self.after(self.conv(x)).mean((2, 3)))


# ---- the maps ----

@pytest.mark.parametrize("target", [0, 3, [2, 0, 1], None])
def test_closed_form(target):
    model, x = OneConvolution(), pictures(3, 9)
    maps, logits = grad_cam(model, x, "conv", None if target is None else torch.tensor(target))
    classes = model(x).argmax(1) if target is None else torch.tensor(target).expand(3)
    assert torch.equal(logits, model(x))
    expected = torch.einsum("bk,bkhw->bhw", model.head.weight[classes], model.conv(x)).relu() / 81
    assert torch.allclose(maps, expected, atol=1e-7) and maps.max() > 0


def test_an_in_place_relu_behind_the_layer_does_no_harm():
    """The ReLU lets the gradient through where the activation is positive; the map is of the activation in front of it."""
    for relu in (torch.nn.ReLU, lambda: torch.nn.ReLU(inplace=True)):
        model, x = OneConvolution(relu), pictures(2, 9)
        activation = model.conv(x).detach()
        weights = model.head.weight[1] * (activation > 0).float().mean((2, 3)) / 81
        expected = torch.einsum("bk,bkhw->bhw", weights, activation).relu()
        assert torch.allclose(grad_cam(model, x, "conv", 1)[0], expected, atol=1e-7)


def scaled(maps):
    low, high = maps.flatten(1).aminmax(dim=1)
    return (maps - low[:, None, None]) / (high - low)[:, None, None]


@pytest.mark.parametrize("arch,layer,size", [("resnet10", "layer4.0.conv2", 96), ("resnet18", "layer2.1.conv1", 64),
                                             ("squeezenet1_1", "features.9.expand3x3", 64), ("vgg11", "features.18", 64)])
def test_agrees_with_captum_on_convolutional_networks(arch, layer, size):
    model, x = network(arch, size), pictures(3, size)
    for module in model.modules():  # captum keeps a reference to what an in-place ReLU overwrites
        if isinstance(module, torch.nn.ReLU):
            module.inplace = False
    target = torch.tensor([1, 0, 1])
    reference = LayerGradCam(model, model.get_submodule(layer)).attribute(x, target, relu_attributions=True)
    reference = torch.nn.functional.interpolate(reference, (size, size), mode="bilinear", align_corners=False)[:, 0].detach()
    maps, _ = grad_cam(model, x, layer, target)
    shows = ~is_empty(reference)
    assert shows.any() and torch.equal(is_empty(maps), ~shows)
    assert (scaled(maps[shows]) - scaled(reference[shows])).abs().max() < 1e-4


class PatchGrid(torch.nn.Module):
    """A norm whose patch tokens pass through `grid` as (B, C, h, w), where captum can take hold of them."""

    def __init__(self, norm, prefix, side):
        super().__init__()
        self.norm, self.prefix, self.side, self.grid = norm, prefix, side, torch.nn.Identity()

    def forward(self, x):
        x = self.norm(x)
        grid = self.grid(x[:, self.prefix:].transpose(1, 2).unflatten(2, (self.side, self.side)))
        return torch.cat([x[:, :self.prefix], grid.flatten(2).transpose(1, 2)], 1)


def vit(**options):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=80, num_classes=2, depth=3, **options).eval()


@pytest.mark.parametrize("registers", [0, 4])
def test_agrees_with_captum_on_a_vit(registers):
    """Also with register tokens, and at random weights, where every token matters."""
    model, x = vit(reg_tokens=registers), pictures(3, 80)
    maps, _ = grad_cam(model, x, choose_layer(None, model), 1)
    model.blocks[-1].norm1 = PatchGrid(model.blocks[-1].norm1, 1 + registers, 5)
    reference = LayerGradCam(model, model.blocks[-1].norm1.grid).attribute(x, 1, relu_attributions=True)
    reference = torch.nn.functional.interpolate(reference, (80, 80), mode="bilinear", align_corners=False)[:, 0].detach()
    assert not is_empty(maps).any() and (scaled(maps) - scaled(reference)).abs().max() < 1e-4


def test_torchvisions_vit_and_a_swin():
    """Their token layouts: a class token in front, and channels last."""
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=2)
    torch.nn.init.normal_(model.heads.head.weight)  # torchvision starts it at zero
    assert choose_layer(None, model) == "encoder.layers.encoder_layer_1.ln_1"
    maps, _ = grad_cam(model, pictures(2, 32), choose_layer(None, model), 0, upsampled=False)
    assert maps.shape == (2, 4, 4) and maps.max() > 0
    model = torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=2)
    layer = choose_layer(None, model)
    assert layer == "features.3.0.norm1" and grad_cam(model, pictures(2, 32), layer, 0, upsampled=False)[0].shape == (2, 4, 4)


@pytest.mark.parametrize("arch,size,layer", [
    ("resnet50", 32, "layer4.2.conv3"), ("resnet10", 32, "layer4.0.conv2"), ("squeezenet1_1", 64, "features.12.expand3x3"),
    ("vgg11", 32, "features.18"), ("vit_tiny_patch16_224", 32, "blocks.11.norm1"), ("resnet18d", 64, "layer4.1.conv2")])
def test_default_layers(arch, size, layer):
    model = network(arch, size)
    assert choose_layer(None, model) == layer
    assert choose_layer(f"{layer}.weight", model) == layer  # as the paper writes it
    with pytest.raises(BadInput, match=f"--layer layer9: .* {layer}"):
        choose_layer("layer9", model)


def test_a_planted_object_is_found():
    """A network that by construction sees the left half only, its logits the mean brightness there and its negative."""
    class LeftHalf(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 2, 1, bias=False)
            torch.nn.init.ones_(self.conv.weight)

        def forward(self, x):
            seen = torch.ones(x.shape[-1]).masked_fill(torch.arange(x.shape[-1]) >= x.shape[-1] // 2, 0)
            return self.conv(x * seen).mean((2, 3))
    left = torch.zeros(4, 64, 64, dtype=torch.bool)
    left[:, :, :32] = True
    maps, _ = grad_cam(LeftHalf(), torch.rand(4, 3, 64, 64), "conv", 0)
    assert (focus(maps, left)[:, 0] > 0.95).all() and (focus(maps, ~left)[:, 0] < 0.05).all()


class Failing(torch.nn.Module):
    def forward(self, x):
        raise RuntimeError("broken on purpose")


@pytest.mark.parametrize("raises", [False, True])
def test_leaves_the_model_as_it_was(raises):
    model, x = network(), pictures(2)
    if raises:
        model.avgpool = Failing()
    model.train()
    model.layer1.eval()  # modes differ between modules, as where BatchNorm is frozen
    modes, state = [m.training for m in model.modules()], {key: value.clone() for key, value in model.state_dict().items()}
    try:
        grad_cam(model, x, "layer3.0.conv1", 0)
    except RuntimeError:
        assert raises
    assert torch.is_grad_enabled() and [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks or m._backward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters()) and not x.requires_grad
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_works_where_gradients_are_off():
    model, x = network(), pictures(2)
    expected = grad_cam(model, x, "layer2.0.conv2", 1)[0]
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert torch.equal(grad_cam(model, x, "layer2.0.conv2", 1)[0], expected)
    model.requires_grad_(False)
    assert torch.equal(grad_cam(model, x, "layer2.0.conv2", 1)[0], expected)


def test_a_batch_gives_what_single_images_give():
    model, x = network(), pictures(4)
    maps, logits = grad_cam(model, x, "layer3.0.conv2")
    for i in range(4):
        alone, single = grad_cam(model, x[i:i + 1], "layer3.0.conv2")
        assert torch.allclose(alone[0], maps[i], atol=1e-6) and torch.allclose(single[0], logits[i], atol=1e-5)


@pytest.mark.parametrize("layer,words", [("fc", "which is no map; candidates are .*layer4.0.conv2"), ("avgpool", None)])
def test_a_layer_without_a_map(layer, words):
    if words:
        with pytest.raises(BadInput, match=words):
            grad_cam(network(), pictures(1), layer)
    else:  # a single position is a map, but a flat one
        assert is_empty(grad_cam(network(), pictures(1), layer)[0]).all()


def test_flat_maps_are_empty_and_nothing_else_is():
    maps = torch.zeros(5, 6, 6)
    maps[1], maps[2, 3, 3], maps[3], maps[4] = 0.7, 1e-20, math.nan, torch.rand(6, 6)
    assert is_empty(maps).tolist() == [True, True, False, True, False]


def test_a_network_against_the_class_gives_an_empty_map():
    model = OneConvolution(torch.nn.ReLU)
    torch.nn.init.constant_(model.head.weight, -1.0)
    maps, _ = grad_cam(model, pictures(2, 9).abs(), "after", 0)
    assert is_empty(maps).all() and not maps.isnan().any()
    assert focus(maps, torch.ones(2, 9, 9, dtype=torch.bool)).isnan().all()


def test_random_head_changes_the_head_only():
    for arch, head in (("resnet10", "fc"), ("squeezenet1_1", "classifier.1")):
        model = network(arch)
        random, again = random_head(model, 5), random_head(model, 5)
        for name, value in model.state_dict().items():
            assert torch.equal(value, random.state_dict()[name]) == (not name.startswith(head))
            assert torch.equal(again.state_dict()[name], random.state_dict()[name])


# ---- the numbers ----

def test_focus_by_hand():
    """Object: the upper row of 2 x 3. First map: values 4 3 0 / 2 1 0, mass 7 of 10; maximum inside; the three highest are
    4 3 2, of which two are inside, IoU 2 / 4. Second: maximum shared by one pixel inside and three outside."""
    mask = torch.tensor([[True, True, True], [False, False, False]]).expand(3, 2, 3)
    maps = torch.tensor([[[4.0, 3, 0], [2, 1, 0]], [[8.0, 0, 0], [8, 8, 8]], [[0.0, 0, 0], [0, 5, 0]]])
    scores = focus(maps, mask)
    assert scores[0].tolist() == pytest.approx([0.7, 1, 2 / 4])
    both = 3 / 4  # three slots for four equal pixels, one of them inside
    assert scores[1].tolist() == pytest.approx([0.25, 0.25, both / (6 - both)])
    both = 2 * 3 / 5  # one slot for the maximum, two for five pixels of 0, three of them inside
    assert scores[2].tolist() == pytest.approx([0, 0, both / (6 - both)])
    assert torch.allclose(focus(1000 * maps, mask), scores)


def test_focus_at_its_ends():
    masks = torch.rand(4, 12, 12) > 0.7
    assert torch.allclose(focus(masks.float(), masks), torch.ones(4, 3))
    assert torch.allclose(focus((~masks).float(), masks)[:, :2], torch.zeros(4, 2))
    assert focus(torch.rand(1, 12, 12), torch.zeros(1, 12, 12, dtype=torch.bool)).isnan().all()
    better = torch.rand(4, 12, 12)
    assert (focus(better + masks, masks) >= focus(better, masks)).all()  # moving mass onto the object never lowers a score


def test_gaussian_is_centred():
    blob = gaussian(7)
    assert blob.argmax() == 24 and torch.allclose(blob, blob.T) and torch.allclose(blob, blob.flip(0))
    assert gaussian(400)[200, 300] == pytest.approx(math.exp(-0.5), rel=0.02)  # a quarter of the side from the centre


def test_bootstrap_has_the_width_of_the_standard_error():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(400, 3, generator=generator)
    values[:200, 1], values[:, 2] = math.nan, math.nan
    mean, interval = bootstrap(values, 0)
    for column, n in ((0, 400), (1, 200)):
        known = values[-n:, column]
        assert mean[column] == pytest.approx(known.mean().item(), abs=1e-6)
        assert (interval[1] - interval[0])[column] == pytest.approx(2 * 1.96 * known.std().item() / math.sqrt(n), rel=0.15)
    assert mean[2].isnan() and interval[:, 2].isnan().all()
    assert torch.equal(bootstrap(values, 0)[1][:, :2], interval[:, :2])


def test_masks_of_every_kind(tmp_path):
    """1-bit, grey counts of annotators, and 0/1 files mean the same; what cannot be used says why."""
    object_ = np.zeros((20, 30), bool)
    object_[5:15, 10:20] = True
    kinds = {"bit": object_, "grey": np.where(object_, 255, 102).astype(np.uint8), "small": object_.astype(np.uint8)}
    for name, pixels in kinds.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    for name in kinds:
        mask = read_mask(tmp_path / f"{name}.png", 40, (20, 30))
        assert mask.shape == (40, 40) and mask[20, 20] and not mask[5, 20] and mask.sum() == pytest.approx(40 * 40 / 6, rel=0.06)
    assert read_mask(tmp_path / "bit.png", 40, (30, 20)) == "of another size than the image"
    assert read_mask(tmp_path / "none.png", 40, (20, 30)) == "missing" and read_mask(tmp_path / "broken.png", 40, (20, 30)) == "unreadable"


def test_real_masks_fit_their_images(real_data):
    files = sorted((real_data / "birds50" / "masks").rglob("*.png"))[::100]
    for path in files:
        with Image.open(real_data / "birds50" / path.relative_to(real_data / "birds50" / "masks").with_suffix(".jpg")) as image:
            mask = read_mask(path, 128, (image.height, image.width))
        assert 0.005 < mask.mean() < 0.9, path


def test_choice_of_images_is_seeded_and_even():
    g = torch.arange(4).repeat_interleave(torch.tensor([50, 2, 40, 9]))
    split = Split(None, None, None, g, None, None, None)
    index = choose_images(split, [2, 0], 7, 3)
    assert split.g[index].tolist() == [2] * 4 + [0] * 3 and len(index.unique()) == 7
    assert torch.equal(index, choose_images(split, [2, 0], 7, 3)) and not torch.equal(index, choose_images(split, [2, 0], 7, 4))
    assert split.g[choose_images(split, [1, 3], 8, 0)].tolist() == [1] * 2 + [3] * 4  # group 1 has only two


# ---- the script ----

@pytest.fixture(scope="module")
def erm_run(tmp_path_factory):
    """A Waterbirds-like folder, a run of stage 1 on it, the stage-4 checkpoint (here: another epoch), and masks."""
    folder = tmp_path_factory.mktemp("gradcam")
    table = write_waterbirds(folder / "data")
    run_script("train_erm.py", "--data", folder / "data", "--run", folder / "run", "--cache", folder / "cache", "--arch", "resnet10",
               "--weights", "none", "--size", "64", "--epochs", "2", "--batch-size", "16", "--keep-epochs", "1", "2")
    for name, epoch in (("finetune", 1), ("other", 2)):
        (folder / "run" / name).mkdir()
        (folder / "run" / name / "best.pt").write_bytes((folder / "run" / "erm" / f"epoch_00{epoch}.pt").read_bytes())
    object_ = np.zeros((32, 40), bool)
    object_[8:24, 12:28] = True  # where write_images puts it
    for row in table[1:]:
        path = (folder / "masks" / row[1]).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(object_).save(path)
    return folder


def flags_for(folder, *flags):
    return ["gradcam.py", "--run", folder / "run", "--cache", folder / "cache", "--device", "cpu", "--layer", "layer2.0.conv2", *flags]


def gradcam_here(monkeypatch, folder, *flags):
    monkeypatch.setattr(sys, "argv", list(map(str, flags_for(folder, *flags))))
    stage.main()


def assert_drawn(path):
    with Image.open(path) as image:
        assert min(image.size) > 200 and np.asarray(image.convert("L")).std() > 5


def test_a_run(erm_run):
    out = run_script(*flags_for(erm_run, "--masks", erm_run / "masks", "--n", "4")).stdout
    assert "Grad-CAM of layer2.0.conv2 (8 x 8) for the logit of class 0 (landbird)" in out and "2 waterbird on land*" in out
    folder = erm_run / "run" / "gradcam"
    assert {f.name for f in folder.iterdir()} == {"args.json", "fig10_gradcam.png", "focus.csv", "focus.png", "results.json"}
    assert_drawn(folder / "fig10_gradcam.png")
    assert_drawn(folder / "focus.png")
    results, rows = json.loads((folder / "results.json").read_text()), list(csv.DictReader(open(folder / "focus.csv")))
    assert [row["group"] for row in results["images"]] == [1, 1, 2, 2] and results["grid"] == [8, 8] and results["without_mask"] == {}
    assert [row["model"] for row in rows[:5]] == ["erm", "finetune", "random head", "gaussian", "finetune - erm"] and len(rows) == 20
    for row in results["focus"]:
        assert row["n"] == (6, 5, 4, 5)[row["group"]] and row["area"] == pytest.approx(0.2 * (256 / 224) ** 2, rel=0.1)
        for key in ("mass", "pointing", "iou"):
            if row[key] is not None:
                assert -1 <= row[f"{key}_low"] <= row[key] <= row[f"{key}_high"] <= 1
    gauss = next(row for row in results["focus"] if row["model"] == "gaussian")
    assert gauss["pointing"] == 1 and gauss["mass"] > gauss["area"]  # the object is in the middle


def test_several_networks_and_more_targets(erm_run, monkeypatch, capsys):
    after = [erm_run / "run" / name / "best.pt" for name in ("finetune", "other")]
    expected = {"label": "each image's own label", "predicted": "the class that each network predicts", "1": "class 1 (waterbird)"}
    for target, words in expected.items():
        gradcam_here(monkeypatch, erm_run, "--after", *after, "--target", target, "--groups", "3", "--n", "2")
        captured = capsys.readouterr().out
        assert f"for the logit of {words}" in captured and "no object masks" in captured
    folder = erm_run / "run" / "gradcam"
    results = json.loads((folder / "results.json").read_text())
    assert list(results["images"][0]["networks"]) == ["erm", "finetune", "other"] and {row["group"] for row in results["images"]} == {3}
    assert results["focus"] == [] and not (folder / "focus.csv").exists()  # that of the run before is gone as well
    assert_drawn(folder / "fig10_gradcam.png")


def test_own_images(erm_run, monkeypatch, capsys):
    files = [str(path) for path in sorted((erm_run / "data").rglob("*.jpg"))[:2]]
    gradcam_here(monkeypatch, erm_run, "--images", *files)
    results = json.loads((erm_run / "run" / "gradcam" / "results.json").read_text())
    assert [row["file"] for row in results["images"]] == files and results["images"][0]["label"] is None
    assert_drawn(erm_run / "run" / "gradcam" / "fig10_gradcam.png")


def test_some_masks_missing_or_of_another_size(erm_run, tmp_path, monkeypatch, capsys):
    rows = csv.DictReader(open(erm_run / "data" / "metadata.csv"))
    files, masks = [row["img_filename"] for row in rows if row["split"] == "2"], tmp_path / "masks"
    for i, file in enumerate(files):
        path = (masks / file).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        if i != 0:
            Image.fromarray(np.full((32, 40 if i > 2 else 41), 255, np.uint8) * (i != 3)).save(path)
    gradcam_here(monkeypatch, erm_run, "--masks", masks)
    assert "1 missing, 2 of another size than the image, 1 empty in the centre crop" in capsys.readouterr().err
    results = json.loads((erm_run / "run" / "gradcam" / "results.json").read_text())
    assert sum(row["n"] for row in results["focus"] if row["model"] == "erm") == len(files) - 4
    assert sum(results["without_mask"].values()) == 4


def test_the_coarse_map_of_the_default_layer(erm_run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gradcam.py", "--run", str(erm_run / "run"), "--cache", str(erm_run / "cache"), "--device", "cpu"])
    stage.main()
    captured = capsys.readouterr()
    assert "layer4.0.conv2 (2 x 2)" in captured.out and "a finer one: --layer layer3.0.conv2" in captured.err


@pytest.mark.parametrize("flags,words", [
    (("--target", "2"), r"--target 2: expected .* 0 \(landbird\), 1 \(waterbird\)"),
    (("--groups", "7"), r"--groups 7: the groups are .* 2 \(waterbird on land\)"),
    (("--n", "0"), "--n 0: must be positive"),
    (("--layer", "layer9"), "no such module; candidates are conv1, .*layer4.0.conv2"),
    (("--after", "missing.pt"), "missing.pt: no such checkpoint; run finetune_contrastive.py first or pass --after"),
    (("--images", "README.md"), "--images README.md: cannot be read as an image"),
    (("--images", "README.md", "--target", "label"), "--target label: files given with --images have no label"),
    (("--masks", "nowhere"), "--masks nowhere: no usable mask for any of the 20 test images .* looked for nowhere/"),
])
def test_bad_input(erm_run, flags, words, monkeypatch):
    before = {f: f.stat().st_mtime_ns for f in (erm_run / "run").rglob("*")}
    with pytest.raises(BadInput, match=words):
        gradcam_here(monkeypatch, erm_run, *flags)
    assert {f: f.stat().st_mtime_ns for f in (erm_run / "run").rglob("*")} == before


def test_networks_that_are_not_alike(erm_run, tmp_path, monkeypatch):
    start = load_checkpoint(erm_run / "run" / "erm" / "best.pt")
    fields = {key: value for key, value in start.items() if key not in ("model", "mean", "std")}
    for key, value in (("arch", "resnet18"), ("n_classes", 3), ("size", 32)):
        changed = {**fields, key: value}
        save_checkpoint(tmp_path / "best.pt", build_model(changed["arch"], changed["n_classes"], changed["size"]), **changed)
        with pytest.raises(BadInput, match=f"best.pt has {key} {value} and .* must be alike"):
            gradcam_here(monkeypatch, erm_run, "--after", tmp_path / "best.pt")
    other = copy.deepcopy(fields)
    for group in other["metrics"]["train"]["groups"]:
        group["name"] = group["name"].replace("bird", "frog")
    model = build_model(fields["arch"], fields["n_classes"], fields["size"])
    save_checkpoint(tmp_path / "best.pt", model, **other)
    with pytest.raises(BadInput, match="best.pt tells landfrog, waterfrog apart and .* landbird, waterbird; networks must be alike"):
        gradcam_here(monkeypatch, erm_run, "--after", tmp_path / "best.pt")
    save_checkpoint(tmp_path / "best.pt", model, **{key: value for key, value in fields.items() if key != "metrics"})
    with pytest.raises(BadInput, match="it lacks data, args or metrics"):
        gradcam_here(monkeypatch, erm_run, "--after", tmp_path / "best.pt")
    with pytest.raises(BadInput, match="name one checkpoint twice"):
        gradcam_here(monkeypatch, erm_run, "--after", erm_run / "run" / "erm" / "best.pt")


def test_a_run_without_fine_tuning(tmp_path):
    assert_refused(run_script("gradcam.py", "--run", tmp_path / "none", check=False), "no such checkpoint", "train_erm.py")
