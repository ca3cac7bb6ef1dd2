"""gradcam.py: maps in closed form and against captum, the focus by hand, whole runs."""

import json
import shutil
from types import SimpleNamespace

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
from gradcam import activations, choose_layer, focus, grad_cam, is_empty, map_size, read_mask

from .conftest import write_table


def network(arch="resnet10", size=64):
    torch.manual_seed(0)
    return common.build_model(arch, 2, size)


def pictures(n=3, size=64):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


# ---- maps ----


@pytest.mark.parametrize("relu", [None, nn.ReLU(), nn.ReLU(inplace=True)])
@pytest.mark.parametrize("target", [0, 3, torch.tensor([2, 0, 1]), None])
def test_closed_form(relu, target):
    """The gradient of logit c by channel k is head[c, k] / (H W); a ReLU behind the layer lets it
    through where the activation, in front of it, is positive."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3, padding=1)
    head = nn.Linear(5, 4)
    model = nn.Sequential(conv, relu or nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    x = pictures(3, 9)
    maps, logits = grad_cam(model, x, "0", target)
    assert torch.equal(logits, model(x))
    classes = logits.argmax(1) if target is None else torch.as_tensor(target).expand(3)
    activation = conv(x)
    through = (activation > 0).float().mean((2, 3)) if relu else 1
    weights = head.weight[classes] * through / 81
    expected = torch.einsum("bk,bkhw->bhw", weights, activation).relu()
    assert torch.allclose(maps, expected, atol=1e-7)
    assert maps.max() > 0


def test_images_stay_as_they_were():
    """Though the network overwrites what it is given."""
    conv = nn.Conv2d(3, 5, 3)
    model = nn.Sequential(
        nn.ReLU(inplace=True), conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)
    )
    x = pictures(3, 9)
    before = x.clone()
    maps, _ = grad_cam(model, x, "1", 0)
    assert torch.equal(x, before)
    assert torch.equal(grad_cam(model, x, "1", 0)[0], maps)


@pytest.mark.parametrize(
    "arch,layer,size",
    [
        ("resnet10", "layer4.0.conv2", 96),
        ("resnet10", "layer2.0.conv1", 96),
        ("resnet10", "conv1", 96),
        ("mobilenetv3_small_050", None, 96),
        ("vit_tiny_patch16_224", None, 80),
        ("vit_small_patch14_reg4_dinov2", None, 70),
    ],
)
def test_agrees_with_captum(arch, layer, size):
    model = network(arch, size)
    x = pictures(3, size)
    target = torch.tensor([1, 0, 1])
    layer = choose_layer(layer, model, arch)
    maps, logits = grad_cam(model, x, layer, target)
    assert torch.allclose(logits, model(x), atol=1e-6)
    module = model.get_submodule(layer or "blocks")  # the last feature map is what is pooled
    if "vit" in arch:  # its 5 x 5 patches have to pass through a module as a map
        assert layer == "blocks.11.norm1"
        prefix = 5 if "reg4" in arch else 1
        grid = nn.Identity()

        def through_grid(_, inputs, out):
            patches = grid(out[:, prefix:].transpose(1, 2).unflatten(2, (5, 5)))
            return torch.cat([out[:, :prefix], patches.flatten(2).transpose(1, 2)], 1)

        module.register_forward_hook(through_grid)
        module = grid
    theirs = LayerGradCam(model, module).attribute(x, target, relu_attributions=True)
    theirs = nn.functional.interpolate(theirs, x.shape[2:], mode="bilinear")[:, 0]
    shows = ~is_empty(theirs)
    assert shows.any()
    assert torch.equal(is_empty(maps), ~shows)
    ours = maps[shows] / maps[shows].amax((1, 2), keepdim=True)
    theirs = theirs[shows] / theirs[shows].amax((1, 2), keepdim=True)
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize(
    "arch,size,layer,grid",
    [
        ("resnet50", 64, "layer4.2.conv3", [2, 2]),
        ("seresnet18", 64, None, [2, 2]),
        ("mobilevit_xxs", 64, None, [2, 2]),
        ("levit_128s", 224, None, [4, 4]),
        ("xcit_nano_12_p16_224", 64, "blocks.11.norm1", [4, 4]),
    ],
)
def test_default_layers_are_maps_of_the_image(arch, size, layer, grid):
    model = network(arch, size)
    for norm in model.modules():  # timm starts the last one of each block at zero
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.ones_(norm.weight)
    found = choose_layer(None, model, arch)
    assert found == layer
    assert map_size(model, found, size) == grid


def test_a_layer_on_which_no_logit_depends_is_refused():
    with pytest.raises(BadInput, match="do not depend on the patches"):
        map_size(network("cait_xxs24_224", 224), None, 224)


def test_where_the_channels_are_in_swin():
    """They are the last dimension, as timm says of the whole network, but for its convolution."""
    model = network("swin_tiny_patch4_window7_224", 224)
    x = pictures(1, 224)
    features = model.forward_features(x).permute(0, 3, 1, 2)
    assert torch.allclose(activations(model, x)[0], features, atol=1e-6)
    assert activations(model, x, "patch_embed.proj")[0].shape[1:] == (96, 56, 56)


def test_where_the_channels_are_in_edgenext():
    """In front, as timm says, but a linear layer always has them last; of a norm between the two
    only the caller can tell."""
    model = network("edgenext_xx_small")
    x = pictures(1)
    block = model.stages[3].blocks[1]
    assert isinstance(block.mlp.fc2, nn.Linear)
    kept = {}
    for layer in ("mlp.fc2", "norm"):  # both behind a permutation
        block.get_submodule(layer).register_forward_hook(
            lambda *args, layer=layer: kept.update({layer: args[-1].permute(0, 3, 1, 2)})
        )
    model(x)
    assert kept["mlp.fc2"].shape == kept["norm"].shape == (1, 168, 2, 2)
    last, _, _ = activations(model, x, "stages.3.blocks.1.mlp.fc2")
    assert torch.allclose(last, kept["mlp.fc2"], atol=1e-6)
    told, gradient, _ = activations(model, x, "stages.3.blocks.1.norm", channels_last=True)
    assert torch.allclose(told, kept["norm"], atol=1e-6)
    assert gradient.shape == told.shape
    assert activations(model, x, "stages.0.blocks.0.conv_dw")[0].shape[1:] == (24, 16, 16)


def test_where_the_channels_are_in_another_library():
    """Of torchvision's Swin nothing tells but channels_last."""
    torch.manual_seed(0)
    model = torchvision.models.swin_t(num_classes=2)
    wide = torch.randn(1, 3, 128, 224)
    told, _, _ = activations(model, wide, "features.7", channels_last=True)
    assert told.shape[1:] == (768, 4, 7)
    maps, _ = grad_cam(model, wide, "features.7", 0, channels_last=True)
    assert maps.shape == (1, 128, 224)
    assert activations(model, wide, "features.0.0")[0].shape[1:] == (96, 32, 56)
    said, _, _ = activations(model, wide, "features.0.0", channels_last=False)
    assert said.shape[1:] == (96, 32, 56)


def test_leaves_the_model_as_it_was():
    model = network().train()
    model.layer1.eval()  # modes differ between modules, as where BatchNorm is frozen
    modes = [module.training for module in model.modules()]
    before = common.fingerprint_of(model)
    with pytest.raises(RuntimeError):
        grad_cam(model, pictures(2), "layer3.0.conv1", torch.tensor([0, 7]))  # no class 7
    grad_cam(model, pictures(2), "layer3.0.conv1", 0)
    assert torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert common.fingerprint_of(model) == before


# ---- numbers ----


def test_focus_by_hand():
    maps = torch.tensor(
        [
            [[3.0, 1], [0, 0]],  # 3 of 4 inside, the maximum too
            [[2.0, 2], [0, 0]],  # a plateau, which shares the hit
            [[0.0, 0], [0, 5]],  # all outside
            [[0.0, 0], [0, 0]],  # empty
        ]
    )
    mask = torch.tensor([[True, False], [False, False]]).expand(4, 2, 2)
    assert focus(maps, mask)[:3].tolist() == [[0.75, 1], [0.5, 0.5], [0, 0]]
    assert focus(maps, mask)[3].isnan().all()
    assert focus(maps, mask & False).isnan().all()


def test_controls_by_hand():
    blob = gradcam.gaussian(48)
    assert torch.allclose(blob, blob.rot90())
    # 11.5 pixels and half a pixel off the middle; the standard deviation is 12
    assert (blob[23, 35] / blob[23, 23]).log() == pytest.approx((0.5**2 - 11.5**2) / (2 * 12**2))
    model = network()
    old = model.state_dict()
    new = gradcam.random_head(model).state_dict()
    assert [k for k in old if not torch.equal(old[k], new[k])] == ["fc.weight", "fc.bias"]


def test_rows_of_focus_by_hand():
    """Means and the ends of their intervals, mass before pointing, as `focus` gives them."""
    values = torch.tensor([[0.2, 1.0], [0.4, 0.0]])
    groups = [{"group": 0, "name": "a", "minority": True}]
    (row,) = gradcam.focus_rows(
        {"erm": values}, torch.ones(2), torch.tensor([0, 0]), groups, "erm", [], 0
    )
    assert (row["mass"], row["mass_low"], row["mass_high"]) == (0.3, 0.2, 0.4)
    assert (row["pointing"], row["pointing_low"], row["pointing_high"]) == (0.5, 0, 1)


@pytest.mark.parametrize("n,shown", [(1, [1]), (3, [1, 1, 2, 2]), (4, [1, 1, 2, 2])])
def test_images_are_of_the_minorities(n, shown):
    split = SimpleNamespace(g=torch.arange(40) % 4)
    groups = common.describe_groups(["a", "b"], ["x", "y"], [24, 9, 8, 24])
    index = gradcam.choose_images(split, groups, n, 0)
    assert split.g[index].tolist() == shown


def test_the_class_that_is_explained():
    """Each image's own, the one that the network predicts, or a fixed one."""
    model = network()
    x = pictures()
    predicted = model(x).argmax(1)
    y = 1 - predicted
    for target, expected in (("label", y), ("predicted", predicted), ("1", 1)):
        found, _ = gradcam.explain(model, x, y, "layer3.0.conv1", target)
        assert torch.equal(found, grad_cam(model, x, "layer3.0.conv1", expected)[0])
    assert not torch.equal(*[grad_cam(model, x, "layer3.0.conv1", c)[0] for c in (y, predicted)])


def test_wrong_predictions_are_marked():
    says = {"predicted": 1, "confidence": 0.9, "empty": False}
    images = [{"caption": "G1", "label": y, "networks": {"erm": says}} for y in (0, 1)]
    shown = {"erm": (torch.rand(2, 8, 8), None)}
    x = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    fig = gradcam.plot_images(x, shown, images, None, ["a", "b"], "heading")
    assert [ax.get_xlabel() for ax in fig.axes[2:4]] == ["b 90 %\n(wrong)", "b 90 %"]


def test_the_intervals_cover_95_percent():
    """1,000 data sets of a skewed quantity whose mean is known."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for seed in range(1000):
        values = torch.rand(150, 1, generator=generator).square()  # mean 1/3
        values[torch.rand(150, 1, generator=generator) < 0.1] = torch.nan  # empty maps
        with torch.autocast("cpu", torch.bfloat16):
            _, (low, high) = gradcam.bootstrap(values, seed, 400)
        covered += low.item() <= 1 / 3 <= high.item()
    assert 930 <= covered <= 970


def test_masks_go_the_way_of_the_images(tmp_path):
    """A mask of some columns, resized and cropped like a photograph of the same shape."""
    pixels = np.uint8([[0] * 32 + [255] * 32] * 40)
    image = tmp_path / "i.jpg"
    Image.fromarray(np.stack([pixels] * 3, -1)).save(image, quality=100)
    masks = {
        "m": 1 + pixels // 85,  # one and four annotators
        "another size": pixels[:20],
        "empty": 0 * pixels,
        "deep": 257 * pixels.astype(np.uint16),
    }
    for name, mask in masks.items():
        Image.fromarray(mask).save(tmp_path / f"{name}.png")
    (tmp_path / "unreadable.png").write_text("no mask")
    for name, opacity in (("opaque", 0 * pixels + 255), ("cut-out", pixels)):
        mask = Image.fromarray(np.stack([pixels] * 3 + [opacity], -1))
        mask.save(tmp_path / f"{name}.png")
    for size in (224, 130):  # of 256 and 149
        expected = common.make_transform(size)(common.read_image(image))[0] > 127
        assert 0 < expected.float().mean() < 1
        assert torch.equal(read_mask(tmp_path / "m.png", image, size), expected)
        assert torch.equal(read_mask(tmp_path / "opaque.png", image, size), expected)
    assert not read_mask(tmp_path / "empty.png", image, 224).any()
    with pytest.raises(BadInput, match="cut-out.png: .* some transparent"):
        read_mask(tmp_path / "cut-out.png", image, 224)
    for name in ("another size.png", "unreadable.png", "deep.png", "i.jpg"):  # itself
        with pytest.raises(BadInput, match=f"{name}: .*of its image's size"):
            read_mask(tmp_path / name, image, 224)


@pytest.mark.parametrize(
    "arch,size,layer,words",
    [
        ("test_convnext", 64, "stages.1.blocks.0.norm", "8 x 32 is no map of a square image"),
        ("test_vit", 160, "patch_embed", "10 x 64 is no map of a square image"),
        ("hiera_tiny_224", 224, "blocks.2", "its tokens do not lie in rows"),
    ],
)
def test_layers_whose_places_are_not_known_are_refused(arch, size, layer, words):
    """Where channels would be taken for places, or places lie in another order."""
    model = common.build_model(arch, 2, size)
    gradcam.map_size(model, gradcam.choose_layer(None, model, arch), size)  # the default is one
    with pytest.raises(BadInput, match=f"--layer {layer}: {words}"):
        gradcam.map_size(model, layer, size)


# ---- whole runs ----


@pytest.fixture(scope="module")
def run(erm_run, tmp_path_factory):
    """A copy of the run with a "fine-tuned" network whose head is the reverse of the other's, one
    of other classes, one of another training, and masks of all images but the last."""
    run = tmp_path_factory.mktemp("gradcam") / "run"
    shutil.copytree(erm_run / "run", run)
    checkpoint = common.load_checkpoint(run / "erm/best.pt")
    weights = dict(checkpoint["model"])
    for name in ("fc.weight", "fc.bias"):
        weights[name] = -weights[name]
    others = {
        "finetune": {"model": weights},
        "cattle": {"classes": ["cow", "camel"]},
        "stranger": {"model": weights, "erm": {**checkpoint["erm"], "id": "another training"}},
    }
    for name, differs in others.items():
        (run / name).mkdir()
        torch.save({**checkpoint, **differs}, run / name / "best.pt")
    pixels = np.pad(np.full((16, 16), 255, np.uint8), ((8, 8), (12, 12)))
    shutil.copytree(erm_run / "data", run / "masks")
    for image in sorted((run / "masks").rglob("*.jpg"))[:-1]:
        Image.fromarray(pixels).save(image.with_suffix(".png"))
    return run


def draw(run, more):
    flags = f"--run {run} --workers 0 --device cpu --layer layer1.0.conv2.weight --n 2 {more}"
    gradcam.main(gradcam.parse_args(flags.split()))
    return json.loads((run / "gradcam/results.json").read_text())


def test_a_run_with_masks(run, monkeypatch, capsys):
    replaced = []
    random_head = gradcam.random_head

    def spy(model, seed):
        replaced.append(common.fingerprint_of(model))
        return random_head(model, seed)

    monkeypatch.setattr(gradcam, "random_head", spy)
    results = draw(run, f"--masks {run}/masks --n 4")
    assert replaced == [results["networks"]["erm"]]  # the control is the earlier network's
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
    same = []
    for ours, theirs in zip(results["focus"], fixed, strict=True):
        same.append(ours["mass"] == theirs["mass"])
    # Five rows a group; G0 and G1 are of class 0
    assert all(same[:10])
    assert not all(same[10:])


def test_a_network_of_another_training_is_said(run, capsys):
    draw(run, "")
    assert "did not start from the training" not in capsys.readouterr().err
    draw(run, f"--after {run}/stranger/best.pt")
    warned = capsys.readouterr().err
    assert f"{run}/stranger/best.pt did not start from the training that" in warned


def test_a_network_is_called_by_its_folder_even_if_that_is_a_link(run, tmp_path):
    (tmp_path / "erm").symlink_to(run / "erm")
    args = SimpleNamespace(before=tmp_path / "erm/best.pt", after=[], data=None, device="cpu")
    models, _, _ = gradcam.load_networks(args)
    assert [*models] == ["erm"]


def masks_of(folder, names, right):
    """Masks (PNGs) of all images, in which the right or the left half is the object."""
    pixels = np.zeros((32, 40), np.uint8)
    if right:
        pixels[:, 20:] = 255
    else:
        pixels[:, :20] = 255
    for name in names:
        path = (folder / name).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def masses(results):
    return [row["mass"] for row in results["focus"] if row["model"] == "erm"]


def test_the_folder_of_masks_that_is_used(run, erm_run, tmp_path, monkeypatch, capsys):
    """Also where a csv has full paths: the folder that was named and not what lies beside the
    images, and by itself the folder `masks` beside the metadata."""
    data = tmp_path / "data"
    shutil.copytree(erm_run / "data", data)
    table = common.read_table(data)
    masks_of(data, table.files, right=False)  # beside the images, where nobody asked for them
    named = tmp_path / "masks2"
    masks_of(named, table.files, right=True)
    rows = []
    for line in (data / "metadata.csv").read_text().splitlines():
        rows.append(line.split(","))
    at = rows[0].index("img_filename")
    for row in rows[1:]:
        row[at] = str(data / row[at])
    write_table(data, rows)
    used = []

    def spy(*args):
        used.append(args[0])
        return read_mask(*args)

    monkeypatch.setattr(gradcam, "read_mask", spy)
    results = draw(run, f"--data {data} --masks {named}")
    assert results["without_mask"] == 0
    assert {path.is_relative_to(named) for path in used} == {True}
    right = masses(results)

    used.clear()
    assert draw(run, f"--data {data}")["focus"] == []
    assert used == []
    assert "nothing measured" in capsys.readouterr().out

    masks_of(data / "masks", [f"other/{file}" for file in table.files], right=True)
    assert draw(run, f"--data {data}")["focus"] == []
    assert "masks holds no mask of a test image; nothing is measured" in capsys.readouterr().err

    masks_of(data / "masks", table.files, right=False)
    results = draw(run, f"--data {data}")
    assert {path.is_relative_to(data / "masks") for path in used} == {True}
    assert masses(results) != right


def test_numbers_do_not_wait_for_the_figure(run, monkeypatch):
    draw(run, f"--masks {run}/masks")
    folder = run / "gradcam"
    (folder / "notes.txt").write_text("mine")
    assert (folder / "fig10_gradcam.png").exists()
    with monkeypatch.context() as crash:
        crash.setattr(gradcam, "plot_images", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            draw(run, f"--masks {run}/masks --target predicted")
    assert json.loads((folder / "results.json").read_text())["target"] == "predicted"
    assert (folder / "focus.csv").exists()
    assert not (folder / "fig10_gradcam.png").exists()  # it would show the older target
    draw(run, "--target predicted")  # without masks
    assert not (folder / "focus.csv").exists()
    assert (folder / "fig10_gradcam.png").exists()
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "more,words",
    [
        ("--target 2", "expected label, each .*; 0, class 0 .y=0."),
        ("--masks nowhere", "nowhere: holds no mask, DIR/NAME.png, of a test image"),
        ("--after nowhere", "no such file"),
        ("--layer layer9", "layer9: cannot be used"),
        ("--layer global_pool", "which is no map"),
        ("--after RUN/erm/best.pt", "twice"),
        ("--after RUN/cattle/best.pt", "must be alike"),
    ],
)
def test_refusals_leave_the_old_numbers(run, more, words):
    results = run / "gradcam/results.json"
    if not results.exists():
        draw(run, "")
    before = results.read_bytes()
    with pytest.raises(BadInput, match=words):
        draw(run, more.replace("RUN", str(run)))
    assert results.read_bytes() == before
