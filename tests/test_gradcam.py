"""gradcam.py: maps in closed form and against captum, the focus by hand, whole runs."""

import json
import shutil

import numpy as np
import pytest
import torch
import torchvision
from captum.attr import LayerGradCam
from PIL import Image
from torch import nn

import common
import gradcam
from common import BadInput
from gradcam import activations, check_layer, choose_layer, focus, grad_cam, is_empty, read_mask

CAPTUM = [("resnet10", layer, 96) for layer in ("layer4.0.conv2", "layer2.0.conv1", "conv1")]
CAPTUM += [("mobilenetv3_small_050", None, 96), ("vit_tiny_patch16_224", None, 80)]
CAPTUM += [("vit_small_patch14_reg4_dinov2", None, 70)]


def network(arch="resnet10", size=64):
    torch.manual_seed(0)
    return common.build_model(arch, 2, size)


def pictures(n=3, size=64):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("relu", [None, nn.ReLU(), nn.ReLU(inplace=True)])
@pytest.mark.parametrize("target", [0, 3, torch.tensor([2, 0, 1]), None])
def test_closed_form(relu, target):
    """The gradient of logit c by channel k is head[c, k] / (H W); a ReLU behind the layer lets it
    through where the activation, in front of it, is positive."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 5, 3, padding=1), relu or nn.Identity(), nn.AdaptiveAvgPool2d(1)]
    model, x = nn.Sequential(*layers, nn.Flatten(), nn.Linear(5, 4)), pictures(3, 9)
    maps, logits = grad_cam(model, x, "0", target)
    assert torch.equal(logits, model(x))
    classes = logits.argmax(1) if target is None else torch.as_tensor(target).expand(3)
    activation = layers[0](x)
    through = (activation > 0).float().mean((2, 3)) if relu else 1
    weights = model[-1].weight[classes] * through / 81
    expected = torch.einsum("bk,bkhw->bhw", weights, activation).relu()
    assert torch.allclose(maps, expected, atol=1e-7) and maps.max() > 0


@pytest.mark.parametrize("arch,layer,size", CAPTUM)
def test_agrees_with_captum(arch, layer, size):
    model, x, target = network(arch, size), pictures(3, size), torch.tensor([1, 0, 1])
    layer = choose_layer(layer, model, arch)
    maps, logits = grad_cam(model, x, layer, target)
    assert torch.allclose(logits, model(x), atol=1e-6)
    module = model.get_submodule(layer or "blocks")  # the last feature map is what is pooled
    if "vit" in arch:  # its 5 x 5 patches have to pass through a module as a map
        assert layer == "blocks.11.norm1"
        grid, prefix = nn.Identity(), 5 if "reg4" in arch else 1

        def through_grid(_, inputs, out):
            patches = grid(out[:, prefix:].transpose(1, 2).unflatten(2, (5, 5)))
            return torch.cat([out[:, :prefix], patches.flatten(2).transpose(1, 2)], 1)

        module.register_forward_hook(through_grid)
        module = grid
    theirs = LayerGradCam(model, module).attribute(x, target, relu_attributions=True)
    theirs = nn.functional.interpolate(theirs, x.shape[2:], mode="bilinear")[:, 0]
    shows = ~is_empty(theirs)
    assert shows.any() and torch.equal(is_empty(maps), ~shows)
    ours, theirs = (m[shows] / m[shows].amax((1, 2), keepdim=True) for m in (maps, theirs))
    assert (ours - theirs).abs().max() < 1e-4


def test_default_layers_are_maps_of_the_image():
    layers = {"resnet50": (64, "layer4.2.conv3", [2, 2]), "seresnet18": (64, None, [2, 2])}
    layers |= {"mobilevit_xxs": (64, None, [2, 2]), "levit_128s": (224, None, [4, 4])}
    layers |= {"xcit_nano_12_p16_224": (64, "blocks.11.norm1", [4, 4])}
    for arch, (size, layer, grid) in layers.items():
        model = network(arch, size)
        for norm in model.modules():  # timm starts the last one of each block at zero
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.ones_(norm.weight)
        found = choose_layer(None, model, arch)
        assert (found, check_layer(model, found, size)) == (layer, grid), arch
    with pytest.raises(BadInput, match="do not depend on the patches"):
        check_layer(network("cait_xxs24_224", 224), None, 224)


def test_where_the_channels_are():
    """Last in Swin, but for its convolution; in front in EdgeNeXt, but for these layers."""
    model, x = network("swin_tiny_patch4_window7_224", 224), pictures(1, 224)
    features = model.forward_features(x).permute(0, 3, 1, 2)
    assert torch.allclose(activations(model, x)[0], features, atol=1e-6)
    assert activations(model, x, "patch_embed.proj")[0].shape[1:] == (96, 56, 56)
    model = network("edgenext_xx_small")
    for layer in ("stages.3.blocks.1.mlp.fc2", "stages.3.blocks.1.norm"):
        assert activations(model, pictures(1), layer)[0].shape[1:] == (168, 2, 2)
    model, wide = torchvision.models.swin_t(num_classes=2), torch.zeros(1, 3, 128, 224)
    assert activations(model, wide, "features.7")[0].shape[1:] == (768, 4, 7)


def test_leaves_the_model_as_it_was():
    model = network().train()
    model.layer1.eval()  # modes differ between modules, as where BatchNorm is frozen
    modes, before = [m.training for m in model.modules()], common.fingerprint_of(model)
    with pytest.raises(RuntimeError):
        grad_cam(model, pictures(2), "layer3.0.conv1", torch.tensor([0, 7]))  # no class 7
    grad_cam(model, pictures(2), "layer3.0.conv1", 0)
    assert torch.is_grad_enabled() and [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert common.fingerprint_of(model) == before


def test_focus_and_its_controls_by_hand():
    # 3 of 4 inside, the maximum too; a plateau, which shares the hit; all outside; empty
    maps = torch.tensor([[3.0, 1, 0, 0], [2, 2, 0, 0], [0, 0, 0, 5], [0, 0, 0, 0]]).view(4, 2, 2)
    mask = torch.tensor([[True, False], [False, False]]).expand(4, 2, 2)
    assert focus(maps, mask)[:3].tolist() == [[0.75, 1], [0.5, 0.5], [0, 0]]
    assert focus(maps, mask)[3].isnan().all() and focus(maps, mask & False).isnan().all()
    blob = gradcam.gaussian(48)
    assert torch.allclose(blob, blob.rot90())
    # 11.5 pixels and half a pixel off the middle; the standard deviation is 12
    assert (blob[23, 35] / blob[23, 23]).log() == pytest.approx((0.5**2 - 11.5**2) / (2 * 12**2))
    model = network()
    old, new = model.state_dict(), gradcam.random_head(model).state_dict()
    assert [k for k in old if not torch.equal(old[k], new[k])] == ["fc.weight", "fc.bias"]


def test_the_intervals_cover_95_percent():
    """1,000 data sets of a skewed quantity whose mean is known."""
    generator, covered = torch.Generator().manual_seed(0), 0
    for seed in range(1000):
        values = torch.rand(150, 1, generator=generator).square()  # mean 1/3
        values[torch.rand(150, 1, generator=generator) < 0.1] = torch.nan  # empty maps
        with torch.autocast("cpu", torch.bfloat16):
            _, (low, high) = gradcam.bootstrap(values, seed, 400)
        covered += low.item() <= 1 / 3 <= high.item()
    assert 930 <= covered <= 970


def test_masks_go_the_way_of_the_images(tmp_path):
    """A mask of some columns, resized and cropped like a photograph of the same shape."""
    pixels, image = np.uint8([[0] * 32 + [255] * 32] * 40), tmp_path / "i.jpg"
    Image.fromarray(np.stack([pixels] * 3, -1)).save(image, quality=100)
    masks = {"m": 1 + pixels // 85, "another size": pixels[:20], "empty": 0 * pixels}
    masks["deep"] = 257 * pixels.astype(np.uint16)
    for name, mask in masks.items():  # m: one and four annotators
        Image.fromarray(mask).save(tmp_path / f"{name}.png")
    (tmp_path / "unreadable.png").write_text("no mask")
    for size in (224, 130):  # of 256 and 149
        expected = common.make_transform(size)(common.read_image(image))[0] > 127
        assert torch.equal(read_mask(tmp_path / "m.png", image, size), expected)
    for name in ("empty", "missing"):
        assert not read_mask(tmp_path / f"{name}.png", image, 224).any()
    for name in ("another size.png", "unreadable.png", "deep.png", "i.jpg"):  # itself
        with pytest.raises(BadInput, match=f"{name}: .*of its image's size"):
            read_mask(tmp_path / name, image, 224)


@pytest.fixture(scope="module")
def run(erm_run, tmp_path_factory):
    """A copy of the run with a "fine-tuned" network whose head is the reverse of the other's, one
    of other classes, and masks of all images but the last."""
    run = shutil.copytree(erm_run / "run", tmp_path_factory.mktemp("gradcam") / "run")
    model, checkpoint = common.load_model(run / "erm/best.pt")
    del checkpoint["model"]
    for value in model.fc.parameters():
        value.data *= -1
    for name, classes in (("finetune", checkpoint["classes"]), ("cattle", ["cow", "camel"])):
        (run / name).mkdir()
        common.save_checkpoint(run / name / "best.pt", model, **checkpoint | {"classes": classes})
    pixels = np.pad(np.full((16, 16), 255, np.uint8), ((8, 8), (12, 12)))
    shutil.copytree(erm_run / "data", run / "masks")
    for image in sorted((run / "masks").rglob("*.jpg"))[:-1]:
        Image.fromarray(pixels).save(image.with_suffix(".png"))
    return run


def draw(run, more):
    flags = f"--run {run} --workers 0 --device cpu --layer layer1.0.conv2.weight {more}"
    gradcam.main(gradcam.parse_args(flags.split()))
    return json.loads((run / "gradcam/results.json").read_text())


def test_a_run_with_masks(run, capsys):
    results = draw(run, f"--masks {run}/masks --n 4")
    assert "1 of 20 images have no mask" in capsys.readouterr().err
    assert [row["label"] for row in results["images"]] == [0, 0, 1, 1]  # G1*, G1*, G2*, G2*
    for row in results["images"]:  # the reversed head says the opposite, as surely
        erm, finetune = row["networks"].values()
        assert erm["predicted"] != finetune["predicted"]
        assert erm["confidence"] == pytest.approx(finetune["confidence"], abs=2e-4)
    rows = {(row["model"], row["group"]): row for row in results["focus"]}
    assert [rows["erm", j]["n"] for j in range(4)] == [6, 5, 4, 4]
    j = next(j for j in range(4) if rows["finetune - erm", j]["empty"] == 0)
    gain = rows["finetune", j]["mass"] - rows["erm", j]["mass"]
    assert rows["finetune - erm", j]["mass"] == pytest.approx(gain, abs=2e-4)
    fixed = draw(run, f"--masks {run}/masks --target 0")["focus"]
    same = [ours["mass"] == theirs["mass"] for ours, theirs in zip(results["focus"], fixed)]
    assert all(same[:10]) and not all(same[10:])  # five rows a group; G0 and G1 are of class 0


def test_refusals_that_leave_the_old_folder(run):
    assert draw(run, "--target predicted")["focus"] == []  # without masks nothing is measured
    before = (run / "gradcam/results.json").read_bytes()
    bad = {"--target 2": "expected label, each .*; 0, class 0 .landbird.", "--n 0": "positive"}
    bad |= {"--masks nowhere": "of 20 images none has a mask", "--after nowhere": "no such file"}
    bad |= {"--layer layer9": "layer9: cannot be used", "--layer global_pool": "which is no map"}
    bad |= {f"--after {run}/erm/best.pt": "twice", f"--after {run}/cattle/best.pt": "must be alike"}
    for more, words in bad.items():
        with pytest.raises(BadInput, match=words):
            draw(run, more)
        assert (run / "gradcam/results.json").read_bytes() == before, more
