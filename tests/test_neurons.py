"""Group accuracies, neurons, scores, masks and the trace of many modified networks."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision

import common
from common import BadInput, Variant, accuracy_under, build_model, modified, top_neurons

GROUPS = common.describe_groups(["a", "b"], ["x", "y"], [60, 20, 5, 15])
NEURONS = [("resnet10", "conv1", 13, "channel", 1504)]
NEURONS += [("resnet50", "layer1.0.downsample.0", 53, "channel", 26560)]  # section 2.1
NEURONS += [("vit_tiny_patch16_224", "blocks.11.attn.qkv", 48, "weight", 5308416)]


def network(arch="resnet10"):
    torch.manual_seed(0)
    return build_model(arch, 2, 32)


def batches(sizes=(5, 3)):
    generator, found = torch.Generator().manual_seed(0), []
    for n in sizes:
        g = torch.randint(0, 4, (n,), generator=generator)
        found.append((torch.randn(n, 3, 32, 32, generator=generator), g // 2, g))
    return found


def test_group_report_by_hand(capsys):
    """Eight images; group 3 has none and counts in no mean, nor as the worst."""
    g = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    predicted = torch.tensor([0, 0, 0, 1, 0, 1, 0, 1])  # right: 3 of 4, 1 of 2, 1 of 2
    report = common.group_report(predicted, g // 2, g, GROUPS)
    counts = [(row["n"], row["correct"], row["acc"]) for row in report["groups"]]
    assert counts == [(4, 3, 0.75), (2, 1, 0.5), (2, 1, 0.5), (0, 0, None)]
    assert report["worst_group"] == 1 and report["acc_worst"] == 0.5  # the first of equals
    assert report["acc_mean"] == 5 / 8
    assert report["acc_mean_train_mix"] == pytest.approx((60 * 0.75 + 20 * 0.5 + 5 * 0.5) / 85)
    row = {"epoch": 1, "loss": 1.0, "lr": 0.1, "seconds": 5, "train": report, "val": report}
    common.print_epoch(row, 2)
    assert " val  75.0  50.0*  50.0* - worst 50.0 (group 1)" in capsys.readouterr().out
    before = common.group_report(1 - predicted, g // 2, g, GROUPS)  # its worst group is 0
    common.print_splits("title", GROUPS, {"test": report}, {"test": before})
    ends = [line.split("  ")[-1].strip() for line in capsys.readouterr().out.splitlines()[3:]]
    assert ends[:5] == ["25.0 -> 75.0", "50.0 -> 50.0<", "50.0 -> 50.0", "- -> -", "25.0 -> 50.0"]


@pytest.mark.parametrize("arch,layer,layers,unit,n", NEURONS)
def test_neurons_of_an_architecture(arch, layer, layers, unit, n, capsys):
    model = network(arch)
    found, counts = common.count_neurons(model)
    assert found == unit and sum(counts.values()) == n
    assert layer in counts and len(counts) == layers  # no head, no normalisation
    assert f"{n} neurons ({unit}s)" in capsys.readouterr().out
    assert common.count_neurons(model, "channel")[0] == "channel"


def test_odd_architectures():
    """A head that is a convolution, attention of torch's own, linear layers that do not make a
    network a transformer, and nothing in front of the head."""
    squeezenet = common.prunable_layers(torchvision.models.squeezenet1_1(num_classes=2))
    assert "features.0" in squeezenet and "classifier.1" not in squeezenet
    transformer = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=2)
    attention = "encoder.layers.encoder_layer_0.self_attention.in_proj_weight"
    assert attention in common.prunable_layers(transformer)
    layers = [torch.nn.Conv2d(3, 64, 7), *(torch.nn.Linear(64, n) for n in (64, 64, 2))]
    assert common.count_neurons(torch.nn.Sequential(*layers))[0] == "channel"
    for layers in ([torch.nn.Flatten(), torch.nn.Linear(3, 2)], [torch.nn.Flatten()]):
        with pytest.raises(BadInput, match="neither convolutions nor linear layers"):
            common.prunable_layers(torch.nn.Sequential(*layers))


def test_top_neurons_are_the_largest():
    scores = {"a": torch.tensor([1.0, 9.0, 3.0]), "b": torch.tensor([9.0, 2.0])}
    assert top_neurons(scores, 1) == [("a", 1)]  # of equals the earlier layer
    assert top_neurons(scores, 5) == [("a", 1), ("b", 0), ("a", 2), ("b", 1), ("a", 0)]
    for k in (0, 6):
        with pytest.raises(BadInput, match="expected 1 to 5"):
            top_neurons(scores, k)
    assert common.locate([0, 2, 3], {"a": 3, "b": 2}) == [("a", 0), ("a", 2), ("b", 0)]


@pytest.mark.parametrize("arch,unit", [("resnet10", "channel"), ("vit_tiny_patch16_224", "weight")])
def test_logits_and_scores_against_a_slow_second_way(arch, unit):
    """Norms filter by filter; the gradient is of the mean over all images, however they are cut
    into batches, and there in a frozen network too."""
    model, data = network(arch).train().requires_grad_(False), batches()
    next(model.children()).eval()
    modes = [module.training for module in model.modules()]
    logits, *_ = common.predict(model, data)
    magnitude = common.magnitude_scores(model, unit)
    gradient = common.gradient_scores(model, data, unit)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    x, y, _ = (torch.cat(parts) for parts in zip(*data))
    expected = model.eval().requires_grad_()(x)
    assert torch.allclose(logits, expected, atol=1e-5)
    F.cross_entropy(expected, y).backward()
    for layer in list(magnitude)[::4]:
        weight = model.get_submodule(layer).weight
        for found, values in ((magnitude, weight.detach()), (gradient, weight.grad)):
            for i in (0, 3):
                norm = (values[i] if unit == "channel" else values.flatten()[i]).norm().item()
                assert found[layer][i].item() == pytest.approx(norm, rel=1e-3, abs=1e-7)
    with pytest.raises(BadInput, match="no image"):
        common.gradient_scores(model, [])


@pytest.mark.parametrize("unit,index", [("channel", 5), ("weight", 200)])
@pytest.mark.parametrize("how", common.MODIFICATIONS)
def test_masked_modified_and_as_it_was(unit, index, how):
    model, neurons = network().to(memory_format=torch.channels_last), [("conv1", index)]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    old = before["conv1.weight"]
    place = (index,) if unit == "channel" else (1, 1, 0, 4)  # 200 = 147 + 49 + 4
    with pytest.raises(KeyError), modified(model, neurons, how, 0.1, 7, unit):
        now = model.conv1.weight.detach().clone()
        raise KeyError
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    noise = torch.randn(old[place].shape, generator=torch.Generator().manual_seed(7)) * 0.1
    expected = {"zero": 0 * noise, "random-init": noise, "random-noise": old[place] + noise}
    assert torch.allclose(now[place], expected[how])
    now[place] = old[place]
    assert torch.equal(now, old)
    masks = common.neuron_masks(model, neurons, unit)
    assert masks.keys() == {"conv1.weight"} and not masks["conv1.weight"][place].any()
    masks["conv1.weight"][place] = True
    assert masks["conv1.weight"].all()
    for other, sigma in (("random-init", 0.0), ("random-noise", float("nan")), ("smallest", 1.0)):
        with pytest.raises(BadInput, match="sigma > 0"), modified(model, [], other, sigma):
            pass


class Odd(torch.nn.Module):
    """Overwrites its input, uses a convolution twice, overwrites in place what a view and a skip
    were taken of, and ends with a layer that no logit needs; on demand with a branch."""

    def __init__(self, branching):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.conv = (torch.nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8))
        self.last, self.unused = (torch.nn.Conv2d(8, 8, 1) for _ in range(2))
        self.head, self.branching = torch.nn.Linear(8, 2), branching

    def forward(self, x):
        skip = self.stem(x.sub_(0.1))
        view = skip.flatten(2)
        x = self.conv(skip)
        x = x + F.relu(skip, inplace=True)  # changes view, too
        if self.branching and x.mean() > 0:  # torch.fx cannot follow this
            x = x * 2
        x = self.last(self.conv(x))
        x += skip
        return (self.head(x.mean((2, 3)) + view.mean(2)), self.unused(x))[0]


def by_brute_force(model, data, variant, unit):
    """Counts of one variant by a full pass of a really modified copy."""
    model, other, counts = copy.deepcopy(model).eval(), copy.deepcopy(model).eval(), {}
    x, y, g = (torch.cat(parts) for parts in zip(*data))
    with torch.inference_mode(), variant.applied(other, unit):
        before, after = (net(x.clone()).argmax(1) == y for net in (model, other))
    for j in g.unique().tolist():
        if variant.groups is None or j in variant.groups:
            b, a = before[g == j], after[g == j]
            numbers = (len(b), b.sum(), a.sum(), (b & ~a).sum(), (~b & a).sum())
            counts[j] = dict(zip(common.COUNTS, map(int, numbers)))
    return counts


@pytest.mark.parametrize("kind", ["resnet10", "vit_tiny_patch16_224", "odd", "branching"])
def test_accuracy_under_against_really_modified_copies(kind, capsys):
    model = Odd(kind == "branching") if kind in ("odd", "branching") else network(kind)
    data, (unit, counts) = batches((12, 9)), common.count_neurons(model)
    state, images = copy.deepcopy(model.state_dict()), copy.deepcopy(data)
    variants = []
    for n, layer in enumerate(list(counts)[:: max(len(counts) // 5, 1)]):
        neurons = [(layer, i) for i in range(min(counts[layer], 3 if unit == "channel" else 3000))]
        variants.append(Variant(neurons, groups=(1, 2) if n % 2 else None))
        variants.append(Variant(neurons[:2], "random-init", 100.0, n))
    first, *_, last = counts
    variants.append(Variant([(first, 0), (last, 1)], "random-init", 100.0))
    x = data[0][0]
    with torch.inference_mode():  # the graph gives the same logits, bit for bit
        traced = common.trace_graph(model.eval(), x[:2])
        ways = [common.logits_under(model, x.clone(), variants, unit, t) for t in (traced, None)]
    assert all(map(torch.equal, *([whole, *found] for whole, found in ways)))
    found = accuracy_under(model.train(), data, variants, unit)
    assert found == [by_brute_force(model, data, variant, unit) for variant in variants]
    assert any(row["to_wrong"] + row["to_right"] for by in found for row in by.values())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(x, image) for (x, *_), (image, *_) in zip(data, images))
    assert model.training and ("full pass" in capsys.readouterr().err) == (kind == "branching")


def test_sample_groups():
    g = torch.tensor([0] * 50 + [1] * 20 + [2] * 4)
    drawn = [common.sample_groups(g, GROUPS, 10, (1,), seed) for seed in (0, 0, 1)]
    loader = common.make_loader(torch.utils.data.TensorDataset(g), 10, parts=drawn[0])
    assert [of.tolist() for (of,) in loader] == [10 * [0], 10 * [1], 10 * [1], 4 * [2]]
    first, again, other = map(torch.cat, drawn)
    assert len(first.unique()) == 34 and first.equal(again) and not first.equal(other)
    assert [len(part) for part in common.sample_groups(g, GROUPS)] == [50, 20, 4, 0]
