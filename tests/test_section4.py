"""Section 4 of common.py comes off the file, and takes a further criterion through all stages."""

import contextlib
import copy
import csv
import json
import math
import re
import runpy

import numpy as np
import pytest
import torch
import torchvision
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch.utils.data import DataLoader, TensorDataset

import common
import finetune_contrastive
import structured_trace
import trace_neurons

from .conftest import ROOT

# ---- the section beside a plain network of torchvision's and a DataLoader of torch's ----


@pytest.fixture(scope="module")
def section(tmp_path_factory):
    """The names that section 4 defines, as a file of its own, which finds contextlib, torch and
    numpy (np) and nothing else."""
    text = (ROOT / "common.py").read_text()
    part = text[text.index("# 4. Neurons and masks") : text.index("# 5. Speed only")]
    path = tmp_path_factory.mktemp("section") / "section4.py"
    path.write_text(part)
    return runpy.run_path(str(path), {"contextlib": contextlib, "torch": torch, "np": np})


@pytest.fixture(scope="module")
def network():
    """A resnet18 in training mode, three of whose parameters are frozen."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=2)
    for parameter in list(model.parameters())[:3]:
        parameter.requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def loader():
    """19 images of four groups in batches of 8, 8 and 3."""
    generator = torch.Generator().manual_seed(0)
    g = torch.arange(19) % 4
    x = torch.randn(19, 3, 32, 32, generator=generator)
    return DataLoader(TensorDataset(x, g // 2, g), batch_size=8)


@pytest.fixture(scope="module")
def gradients(network, loader):
    """The gradient of the mean over all images by autograd, in one batch of the three."""
    model = copy.deepcopy(network).eval().requires_grad_()
    x, y, _ = (torch.cat(parts) for parts in zip(*loader, strict=True))
    torch.nn.functional.cross_entropy(model(x), y).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_weights_of_a_plain_network(section, network):
    weights = section["prunable_weights"](network)
    parameters = dict(network.named_parameters())
    # 4 convolutions of each of 64, 128, 256 and 512 filters, a stem, and a shortcut in three stages
    assert len(weights) == 4 * 4 + 1 + 3
    filters = section["count_neurons"](weights)
    assert sum(filters.values()) == 4 * (64 + 128 + 256 + 512) + 64 + (128 + 256 + 512)
    assert section["choose_unit"](weights) == "channel"
    assert "fc.weight" not in weights and "bn1.weight" not in weights
    assert all(weight is parameters[name] for name, weight in weights.items())


def test_mean_gradient_of_a_plain_network(section, network, loader, gradients):
    """However the images are cut into batches, and of frozen weights, too."""
    weights = section["prunable_weights"](network)
    found = section["mean_gradient"](network, weights, loader)
    assert found.keys() == weights.keys()
    for name, gradient in found.items():
        assert gradients[name].norm() > 0
        assert torch.allclose(gradient, gradients[name], rtol=1e-3, atol=1e-6), name
    assert network.training
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("unit", ["channel", "weight"])
def test_scores_and_top_neurons_of_a_plain_network(section, network, gradients, unit):
    """Norms filter by filter or weight by weight, and a sort of all of them."""
    few = ("conv1.weight", "layer1.1.conv2.weight", "layer2.0.downsample.0.weight")
    weights = {name: section["prunable_weights"](network)[name] for name in few}
    for criterion in ("magnitude", "gradient"):
        ordered = []
        for name, weight in weights.items():
            values = weight.detach() if criterion == "magnitude" else gradients[name]
            parts = values if unit == "channel" else values.flatten()
            norms = [part.norm().item() for part in parts]
            ordered += [(-norm, name, index) for index, norm in enumerate(norms)]
        ordered.sort(key=lambda row: row[0])
        scores = section["score_neurons"](weights, gradients, criterion, unit)
        found = section["top_neurons"](scores, 20)
        assert found == [(name, index) for _, name, index in ordered[:20]]
        for norm, name, index in ordered[::1000]:
            assert scores[name][index].item() == pytest.approx(-norm, rel=1e-5)


def test_masks_of_a_plain_network(section, network):
    weights = section["prunable_weights"](network)
    place = ("layer1.0.conv1.weight", 7)  # of 64 filters of 64 x 3 x 3
    other = ("layer2.0.conv1.weight", 576 + 2 * 9 + 5)  # filter 1, input 2, row 1, column 2
    masks = section["neuron_masks"](weights, [place, place])
    assert masks.keys() == {place[0]}
    assert masks[place[0]].shape == (64, 64, 3, 3)
    masked = masks[place[0]].logical_not().nonzero()
    assert masked[:, 0].tolist() == 576 * [7]
    masks = section["neuron_masks"](weights, [other], "weight")
    assert masks[other[0]].logical_not().nonzero().tolist() == [[1, 2, 1, 2]]


@pytest.mark.parametrize("unit", ["channel", "weight"])
def test_modified_and_count_right_of_a_plain_network(section, network, loader, unit):
    """Against copies whose weights were changed by hand, batch by batch."""
    weights = section["prunable_weights"](network)
    before = copy.deepcopy(network.state_dict())
    neurons = [("conv1.weight", 3), ("layer3.0.conv2.weight", 9)]
    if unit == "weight":
        neurons = [("conv1.weight", index) for index in range(1500)]
    variants = [
        {"neurons": neurons},
        {"neurons": neurons, "how": "random-init", "sigma": 30.0, "seed": 1},
        {"neurons": neurons, "how": "random-noise", "sigma": 30.0, "seed": 2},
    ]
    found = section["count_right"](network, loader, variants, weights, unit)
    changed = 0
    for variant, by_group in zip(variants, found, strict=True):
        slow = count_by_hand(network, changed_by_hand(network, unit, **variant), loader)
        assert by_group == slow
        assert [by_group[group]["n"] for group in range(4)] == [5, 5, 5, 4]
        changed += sum(row["to_wrong"] + row["to_right"] for row in by_group.values())
    assert changed
    assert network.training
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), key


def changed_by_hand(network, unit, neurons, how="zero", sigma=0.0, seed=0):
    """A copy of the network in which neurons are changed one after the other."""
    model = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(seed)
    for name, index in neurons:
        weight = model.get_parameter(name).data
        if unit == "weight":
            weight = weight.view(-1)
        noise = sigma * torch.randn(weight[index].shape, generator=generator)
        kept = weight[index] if how == "random-noise" else 0
        weight[index] = kept + noise
    return model


def count_by_hand(network, changed, loader):
    """What count_right gives for one variant, image by image."""
    counts = {}
    with torch.no_grad():
        for x, y, g in loader:
            before = copy.deepcopy(network).eval()(x).argmax(1)
            after = changed.eval()(x).argmax(1)
            for i, group in enumerate(g.tolist()):
                names = ("n", "correct_before", "correct_after", "to_wrong", "to_right")
                row = counts.setdefault(group, dict.fromkeys(names, 0))
                was = bool(before[i] == y[i])
                now = bool(after[i] == y[i])
                row["n"] += 1
                row["correct_before"] += was
                row["correct_after"] += now
                row["to_wrong"] += was and not now
                row["to_right"] += now and not was
    return counts


# ---- a third criterion, which is one line in CRITERIA ----


@pytest.fixture
def product(monkeypatch):
    monkeypatch.setitem(common.CRITERIA, "product", lambda z, v: z * v)


@pytest.fixture
def figures(monkeypatch):
    """The texts of every figure that is written, {file name: list of str}."""
    texts = {}
    write = common.write

    def collect(folder, files, remove=()):
        for name, content in files.items():
            if isinstance(content, Figure):
                texts[name] = [text.get_text() for text in content.findobj(Text)]
        write(folder, files, remove)

    monkeypatch.setattr(common, "write", collect)
    return texts


def run(script, erm_run, folder, flags):
    """A stage in this process, from the checkpoint of erm_run and into a folder of its own."""
    shared = f"--checkpoint {erm_run}/run/erm/best.pt --run {folder} --device cpu --workers 0"
    script.main(script.parse_args([*shared.split(), *flags.split()]))


def read(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def is_printed(text, *cells):
    """Whether a line of a printed table has these cells."""
    lines = [re.split(" {2,}", line.strip()) for line in text.splitlines()]
    return any(set(cells) <= set(line) for line in lines)


def largest_product(erm_run, groups):
    """The filter of the largest ||z * v|| over the training images of these groups, by autograd."""
    model, checkpoint, table = common.reopen(erm_run / "run/erm/best.pt")
    images = common.open_split(checkpoint, table, "train")
    members = [i for i, group in enumerate(images.g.tolist()) if group in groups]
    ((x, y, *_),) = common.Batches(images, order=[members])
    torch.nn.functional.cross_entropy(model(x), y).backward()
    norms = []
    for name, weight in common.prunable_weights(model).items():
        for index, (z, v) in enumerate(zip(weight.detach(), weight.grad, strict=True)):
            norms.append(((z * v).norm().item(), name, str(index)))
    return max(norms)


def test_a_third_criterion_in_stage_2(product, figures, erm_run, tmp_path, capsys):
    flags = "--top-k 1 3 --repeats 2 --controls 39 --sigma 0.1 0.2"
    run(trace_neurons, erm_run, tmp_path, flags)
    folder = tmp_path / "trace"
    out = capsys.readouterr().out
    assert is_printed(out, "product", "zero", "3", "train", "own")
    assert is_printed(out, "product", "random-noise", "0.2", "1", "test")
    assert is_printed(out, "product", "the same layers")

    # Every group has a set of its own, and the sets and their ranks are as autograd has them
    neurons = read(folder / "neurons.csv")
    of_product = [row for row in neurons if row["criterion"] == "product"]
    assert {row["selected_by"] for row in of_product} == set("0123")
    for row in of_product:
        if row["rank"] == "1":
            assert row["product_percentile"] == "100.0"
            score, name, index = largest_product(erm_run, [int(row["selected_by"])])
            assert (row["parameter"], row["index"]) == (name, index)
            assert float(row["score"]) == pytest.approx(score, rel=1e-3)

    # Two splits, four sets, two k, four groups, zeroed; of each group's own set two draws of noise
    # with two sigmas, of both kinds in training and of one in test
    rows = read(folder / "accuracy.csv")
    of_product = [row for row in rows if row["criterion"] == "product"]
    assert len(of_product) == 2 * 4 * 2 * 4 + 3 * 4 * 2 * 2 * 2
    assert "layers of product 1" in {row["selected_by"] for row in rows}

    results = json.loads((folder / "results.json").read_text())
    assert {line["criterion"] for line in results["changes"]} == {
        "magnitude",
        "gradient",
        "product",
    }
    pairs = [(row["criterion"], row["by"]) for row in results["ranks"]]
    assert len(pairs) == 6
    assert ("product", "gradient") in pairs and ("magnitude", "product") in pairs
    tested = [row["group"] for row in results["control"] if row["criterion"] == "product"]
    assert set(tested) == {1, 2}  # the minorities

    # A panel, or a row of panels, in each figure
    assert figures.keys() == set(trace_neurons.FIGURES)
    for name in ("fig02_zero.png", "fig04_random_init.png", "fig05_random_noise.png"):
        titles = [text.partition(",")[0] for text in figures[name]]
        assert titles.count("product") == titles.count("magnitude") == 1, name
    for name in ("fig11_random_init_sigmas.png", "fig12_random_noise_sigmas.png"):
        assert {"product, sigma = 0.1", "product, sigma = 0.2"} <= set(figures[name])
    assert figures["fig03_ranks.png"].count("largest product of each group") == 2
    assert figures["fig03_ranks.png"].count("product ranking among all neurons (%)") == 2
    for name in ("product G0", "product G1*", "product G2*", "product G3"):
        assert name in figures["fig08_layers.png"]


def test_a_third_criterion_in_stage_3(product, figures, erm_run, tmp_path, capsys):
    run(structured_trace, erm_run, tmp_path, "--k 2 --controls 1")
    folder = tmp_path / "structured"
    assert is_printed(capsys.readouterr().out, "product", "G1* y=0 place=1")
    results = json.loads((folder / "results.json").read_text())
    rows = [row for row in read(folder / "layers.csv") if row["criterion"] == "product"]
    assert len(rows) == 4 * len(results["layers"])
    assert all(row["selected_by"] == row["group"] for row in rows)
    assert list(results["summary"]) == ["magnitude", "gradient", "product", "random"]
    assert "2 neurons of largest product" in figures["fig07_layers.png"]


def test_a_third_criterion_in_stage_4(product, figures, erm_run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        finetune_contrastive.parse_args(["--help"])
    assert "--criterion {magnitude,gradient,product,mixed,random,none}" in " ".join(
        capsys.readouterr().out.split()
    )
    flags = "--criterion product --epochs 1 --prune-fraction 0.02"
    run(finetune_contrastive, erm_run, tmp_path, flags)
    assert "criterion=product" in capsys.readouterr().out
    folder = tmp_path / "finetune"
    assert json.loads((folder / "args.json").read_text())["args"]["criterion"] == "product"
    rows = read(folder / "masked.csv")
    model, _ = common.load_model(erm_run / "run/erm/best.pt")
    total = sum(len(weight) for weight in common.prunable_weights(model).values())
    assert len(rows) == math.ceil(0.02 * total)
    assert {row["criterion"] for row in rows} == {"product"}
    score, name, index = largest_product(erm_run, range(4))  # there are less than 128 images
    assert (rows[0]["parameter"], rows[0]["index"]) == (name, index)
    assert float(rows[0]["score"]) == pytest.approx(score, rel=1e-3)
    assert "curves.png" in figures
    with pytest.raises(SystemExit):
        finetune_contrastive.parse_args(["--criterion", "quotient"])
