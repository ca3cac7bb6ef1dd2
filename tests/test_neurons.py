"""Group accuracies, neurons, scores, masks and the trace of many modified networks."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision

import common
from common import BadInput, Variant, accuracy_under, build_model, modified, top_neurons

GROUPS = common.describe_groups(["a", "b"], ["x", "y"], [60, 20, 5, 15])


def network(arch="resnet10", size=32):
    torch.manual_seed(0)
    return build_model(arch, 2, size)


def batches(sizes=(5, 3), size=32):
    generator = torch.Generator().manual_seed(0)
    found = []
    for n in sizes:
        g = torch.randint(0, 4, (n,), generator=generator)
        found.append((torch.randn(n, 3, size, size, generator=generator), g // 2, g))
    return found


# ---- evaluation ----


def test_group_report_by_hand():
    """Eight images; group 3 has none and counts in no mean, nor as the worst."""
    g = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    y = g // 2
    predicted = torch.tensor([0, 0, 0, 1, 0, 1, 0, 1])  # right: 3 of 4, 1 of 2, 1 of 2
    report = common.group_report(predicted, y, g, GROUPS)
    counts = [(row["n"], row["correct"], row["acc"]) for row in report["groups"]]
    assert counts == [(4, 3, 0.75), (2, 1, 0.5), (2, 1, 0.5), (0, 0, None)]
    assert report["worst_group"] == 1 and report["acc_worst"] == 0.5  # the first of equals
    assert report["acc_mean"] == 5 / 8
    assert report["acc_mean_train_mix"] == pytest.approx((60 * 0.75 + 20 * 0.5 + 5 * 0.5) / 85)
    assert [row["minority"] for row in report["groups"]] == [False, True, True, False]
    assert common.in_percent(report) == " 75.0  50.0*  50.0* -"


def test_predict_takes_any_batches_and_puts_modes_back():
    model = torchvision.models.resnet18(num_classes=2).train()
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    logits, y, g = common.predict(model, batches())
    assert [module.training for module in model.modules()] == modes
    expected = copy.deepcopy(model).eval()(torch.cat([x for x, *_ in batches()]))
    assert torch.allclose(logits, expected, atol=1e-5) and torch.equal(y, g // 2)
    report = common.evaluate(model, batches(), GROUPS)
    assert sum(row["n"] for row in report["groups"]) == 8


# ---- which weights are neurons ----


def test_convolutions_but_never_the_head():
    model = network("resnet50", 64)
    layers = common.prunable_layers(model)
    assert sum(len(weight) for weight in layers.values()) == 26560  # section 2.1: channels
    assert "layer1.0.downsample.0" in layers and "fc" not in layers and len(layers) == 53
    squeezenet = torchvision.models.squeezenet1_1(num_classes=2)  # its head is a convolution
    assert "classifier.1" not in common.prunable_layers(squeezenet)


def test_linear_layers_of_transformers():
    layers = common.prunable_layers(network("vit_tiny_patch16_224"))
    kinds = {name.split(".", 2)[-1] for name in layers}
    assert kinds == {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"} and len(layers) == 48
    distilled = network("deit_tiny_distilled_patch16_224")
    assert not {"head", "head_dist"} & common.prunable_layers(distilled).keys()
    other = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=2)
    assert "encoder.layers.encoder_layer_0.self_attention.in_proj_weight" in (
        common.prunable_layers(other)
    )


@pytest.mark.parametrize(
    "arch,unit,n",
    [("resnet10", "channel", 2880), ("vit_tiny_patch16_224", "weight", 5308416)],
)
def test_auto_units(arch, unit, n, capsys):
    found, counts = common.find_neurons(network(arch))
    assert found == unit and sum(counts.values()) == n
    assert f"{n} neurons ({unit}s)" in capsys.readouterr().out
    assert common.find_neurons(network(arch), "channel")[0] == "channel"


def test_attention_in_a_convolutional_network():
    """An attention pool with a qkv of its own does not make it a transformer."""
    pool = timm.layers.AttentionPool2d(64, feat_size=4, num_heads=4)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 64, 3), torch.nn.Conv2d(64, 64, 7), pool, torch.nn.Linear(64, 2)
    )
    assert common.find_neurons(model)[0] == "channel"
    for layers in ([torch.nn.Flatten(), torch.nn.Linear(3, 2)], [torch.nn.Flatten()]):
        with pytest.raises(BadInput, match="neither convolutions nor linear layers"):
            common.prunable_layers(torch.nn.Sequential(*layers))


# ---- scores ----


def test_top_neurons_are_the_largest():
    scores = {"a": torch.tensor([1.0, 9.0, 3.0]), "b": torch.tensor([9.0, 2.0])}
    assert top_neurons(scores, 1) == [("a", 1)]  # of equals the earlier layer
    assert top_neurons(scores, 4) == [("a", 1), ("b", 0), ("a", 2), ("b", 1)]
    for k in (0, 6):
        with pytest.raises(BadInput, match="expected 1 to 5"):
            top_neurons(scores, k)
    generator = torch.Generator().manual_seed(0)
    random = {name: torch.rand(50, generator=generator) for name in "abc"}
    ranked = sorted(((float(v), n, i) for n, vs in random.items() for i, v in enumerate(vs)))
    assert top_neurons(random, 20) == [(n, i) for _, n, i in ranked[::-1][:20]]
    positions = common.locate([0, 2, 3, 4], {"a": 3, "b": 2})
    assert positions == [("a", 0), ("a", 2), ("b", 0), ("b", 1)]


@pytest.mark.parametrize("arch,unit", [("resnet10", "channel"), ("vit_tiny_patch16_224", "weight")])
def test_scores_against_a_slow_second_way(arch, unit):
    """Norms filter by filter; the gradient is of the mean over all images, however they are cut
    into batches."""
    model, data = network(arch).train(), batches()
    modes = [module.training for module in model.modules()]
    magnitude = common.magnitude_scores(model, unit)
    gradient = common.gradient_scores(model, data, unit)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    x, y = (torch.cat(parts) for parts in list(zip(*data))[:2])
    F.cross_entropy(model(x), y).backward()
    for layer in list(magnitude)[::4]:
        weight = model.get_submodule(layer).weight
        for i in (0, 3):
            w, v = weight[i], weight.grad[i]
            if unit == "weight":
                w, v = weight.flatten()[i : i + 1], weight.grad.flatten()[i : i + 1]
            assert magnitude[layer][i].item() == pytest.approx(w.norm().item(), rel=1e-5)
            assert gradient[layer][i].item() == pytest.approx(v.norm().item(), rel=1e-3, abs=1e-7)


def test_no_image_has_no_gradient():
    with pytest.raises(BadInput, match="no image"):
        common.gradient_scores(network(), [])


def test_worst_images_have_the_highest_loss():
    """Image i of 400 is right with a logit that grows with i, so the first are the worst."""
    logits = torch.stack([torch.arange(400) / 100, torch.zeros(400)], 1)
    y, index = torch.zeros(400, dtype=torch.long), torch.arange(0, 400, 2)
    worst = common.worst_images(logits, y, index, torch.Generator().manual_seed(0), 50, 20)
    assert len(set(worst.tolist())) == 20 and worst.max() < 100 and (worst % 2 == 0).all()


def test_masks():
    model = network().to(memory_format=torch.channels_last)
    masks = common.neuron_masks(model, [("conv1", 3), ("conv1", 5), ("layer2.0.conv1", 0)])
    assert masks.keys() == {"conv1.weight", "layer2.0.conv1.weight"}
    assert (~masks["conv1.weight"]).nonzero()[:, 0].unique().tolist() == [3, 5]
    (mask,) = common.neuron_masks(model, [("conv1", 150)], "weight").values()
    assert (~mask).nonzero().tolist() == [[1, 0, 0, 3]]  # 150 = 147 + 3, filters of 3 x 7 x 7


@pytest.mark.parametrize("unit,index", [("channel", 5), ("weight", 200)])
@pytest.mark.parametrize("how", common.MODIFICATIONS)
def test_modified_and_as_it_was(unit, index, how):
    model = network().to(memory_format=torch.channels_last)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    old = before["conv1.weight"]
    place = (index,) if unit == "channel" else (1, 1, 0, 4)  # 200 = 147 + 49 + 4
    with pytest.raises(KeyError), modified(model, [("conv1", index)], how, 0.1, 7, unit):
        now = model.conv1.weight.detach().clone()
        raise KeyError
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    noise = torch.randn(old[place].shape, generator=torch.Generator().manual_seed(7)) * 0.1
    expected = {"zero": 0 * noise, "random-init": noise, "random-noise": old[place] + noise}
    assert torch.allclose(now[place], expected[how])
    now[place] = old[place]
    assert torch.equal(now, old)


def test_noise_of_nothing_is_refused():
    for how, sigma in (("random-init", 0.0), ("random-noise", float("nan")), ("smallest", 1.0)):
        with pytest.raises(BadInput, match="sigma > 0"), modified(network(), [], how, sigma):
            pass


# ---- many modified networks ----


class Tied(torch.nn.Module):
    """One convolution used twice, a value that a later in-place ReLU overwrites, and a skip."""

    def __init__(self, branching=False):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.conv = (
            torch.nn.Conv2d(3, 8, 3, padding=1),
            torch.nn.Conv2d(8, 8, 3, padding=1),
        )
        self.last, self.head = torch.nn.Conv2d(8, 8, 1), torch.nn.Linear(8, 2)
        self.branching = branching

    def forward(self, x):
        skip = self.stem(x)
        x = self.conv(skip)
        x = x + F.relu(skip, inplace=True)
        if self.branching and x.mean() > 0:  # torch.fx cannot follow this
            x = x * 2
        x = self.last(self.conv(x))
        x += skip
        return self.head(x.mean((2, 3)))


def by_brute_force(model, data, variant, unit):
    """Counts of one variant by a full pass of a really modified copy."""
    other = copy.deepcopy(model).eval()
    counts = {}
    with torch.inference_mode(), variant.applied(other, unit):
        modified_logits = [other(x) for x, *_ in data]
    with torch.inference_mode():
        logits = [copy.deepcopy(model).eval()(x) for x, *_ in data]
    y, g = torch.cat([y for _, y, _ in data]), torch.cat([g for *_, g in data])
    before, after = (torch.cat(z).argmax(1) == y for z in (logits, modified_logits))
    for j in g.unique().tolist():
        if variant.groups is None or j in variant.groups:
            b, a = before[g == j], after[g == j]
            numbers = (len(b), b.sum(), a.sum(), (b & ~a).sum(), (~b & a).sum())
            counts[j] = dict(zip(common.COUNTS, map(int, numbers)))
    return counts


@pytest.mark.parametrize("kind", ["resnet10", "vit_tiny_patch16_224", "tied", "branching"])
def test_accuracy_under_against_really_modified_copies(kind, capsys):
    own = kind in ("tied", "branching")
    model = Tied(kind == "branching") if own else network(kind)
    data = batches((12, 9))
    unit, counts = common.find_neurons(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    variants = []
    for n, layer in enumerate(list(counts)[:: max(len(counts) // 5, 1)]):
        neurons = [(layer, i) for i in range(min(counts[layer], 3 if unit == "channel" else 3000))]
        variants.append(Variant(neurons, groups=(1, 2) if n % 2 else None))
        variants.append(Variant(neurons[:2], "random-init", 100.0, n))
    first, *_, last = counts
    variants.append(Variant([(first, 0), (last, 1)]))
    found = accuracy_under(model.train(), data, variants, unit)
    assert found == [by_brute_force(model, data, variant, unit) for variant in variants]
    assert any(row["to_wrong"] + row["to_right"] for by in found for row in by.values())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.training and ("full pass" in capsys.readouterr().err) == (kind == "branching")


@pytest.mark.parametrize("kind", ["resnet10", "tied"])
def test_the_graph_gives_the_same_logits(kind):
    """Bit for bit, from whichever layer on the network is run anew."""
    model = (Tied() if kind == "tied" else network(kind)).eval()
    x = batches((4,))[0][0]
    variants = [Variant([(layer, 0)]) for layer in common.prunable_layers(model)]
    with torch.inference_mode():
        traced = common.trace_graph(model, x[:2])
        whole, found = common.logits_under(model, x, variants, traced=traced)
        plain, expected = common.logits_under(model, x, variants)
    assert traced is not None and torch.equal(whole, plain)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert sum(not torch.equal(logits, plain) for logits in found) > len(found) // 2


class Aliased(torch.nn.Module):
    """A view taken before the value is overwritten in place."""

    def __init__(self, overwrite_input=False):
        super().__init__()
        torch.manual_seed(1)
        self.overwrite_input = overwrite_input
        self.first, self.second = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 1)
        self.head = torch.nn.Linear(8, 2)

    def forward(self, x):
        if self.overwrite_input:
            x.sub_(1)
        y = self.first(x)
        flat = y.flatten(1)
        z = self.second(y)
        y.relu_()  # changes flat, too
        mean = flat.mean(1, keepdim=True)
        return self.head(z.mean((2, 3))) + torch.cat([mean, -mean], 1)


def test_views_stay_views_in_the_graph():
    model, x = Aliased().eval(), torch.randn(6, 3, 8, 8)
    variants = [Variant([("second", 0)], "random-noise", 3.0)]
    with torch.inference_mode():
        traced = common.trace_graph(model, x[:2])
        _, (found,) = common.logits_under(model, x, variants, traced=traced)
        _, (expected,) = common.logits_under(model, x, variants)
    assert torch.allclose(found, expected)


def test_tracing_leaves_the_batch_as_it_was():
    """A model that overwrites its input sees every image once a pass, not three times."""
    model, x = Aliased(overwrite_input=True).eval(), torch.randn(6, 3, 8, 8)
    with torch.inference_mode():
        common.trace_graph(model, before := x.clone())
        accuracy_under(model, [(x, *torch.zeros(2, 6).long())], [Variant([("first", 0)])])
    assert torch.equal(before, x)


def test_a_frozen_network_has_gradients_too():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4, 2))
    batch = (torch.randn(2, 3, 3, 3), torch.tensor([0, 1]))
    expected = common.gradient_scores(model, [batch])["0"]
    found = common.gradient_scores(model.requires_grad_(False), [batch])["0"]
    assert torch.equal(found, expected) and not model[0].weight.requires_grad


def test_sample_groups():
    g = torch.tensor([0] * 50 + [1] * 20 + [2] * 4)
    index = common.sample_groups(g, GROUPS, 10, whole=(2,))
    counts = torch.bincount(g[index]).tolist()
    assert counts == [10, 10, 4] and len(index.unique()) == 24
    assert torch.equal(index, common.sample_groups(g, GROUPS, 10, whole=(2,)))
    assert not torch.equal(index, common.sample_groups(g, GROUPS, 10, (2,), seed=1))
    assert len(common.sample_groups(g, GROUPS)) == 74
