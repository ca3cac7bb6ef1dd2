"""Group accuracies, neurons, scores, masks and the trace of many modified networks."""

import copy
import re

import pytest
import torch
import torchvision

import common
from common import build_model, modified, top_neurons

# G1 and G2 are minorities
COUNTED = ("n", "correct_before", "correct_after", "to_wrong", "to_right")
GROUPS = common.describe_groups(["a", "b"], ["x", "y"], [60, 20, 5, 15])


def network(arch="resnet10"):
    torch.manual_seed(0)
    return build_model(arch, 2, 32)


def make_batches(sizes=(5, 3)):
    """Batches (x, y, g) of noise, with four groups."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for n in sizes:
        g = torch.randint(0, 4, (n,), generator=generator)
        batches.append((torch.randn(n, 3, 32, 32, generator=generator), g // 2, g))
    return batches


def whole(batches):
    """The same images as one batch."""
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


# ---- accuracies ----


def test_group_report_by_hand(capsys):
    """Eight images; group 3 has none and counts in no mean, nor as the worst."""
    g = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    predicted = torch.tensor([0, 0, 0, 1, 0, 1, 0, 1])  # right: 3 of 4, 1 of 2, 1 of 2
    report = common.group_report(predicted, g // 2, g, GROUPS)
    counts = [(row["n"], row["correct"], row["acc"]) for row in report["groups"]]
    assert counts == [(4, 3, 0.75), (2, 1, 0.5), (2, 1, 0.5), (0, 0, None)]
    assert [row["minority"] for row in report["groups"]] == [False, True, True, False]
    assert report["worst_group"] == 1  # the first of equals
    assert report["acc_worst"] == 0.5
    assert report["acc_mean"] == 5 / 8
    assert report["acc_mean_train_mix"] == pytest.approx((60 * 0.75 + 20 * 0.5 + 5 * 0.5) / 85)

    row = {"epoch": 1, "terms": {"loss": 1.0}, "lr": 0.1, "seconds": 5}
    common.print_epoch({**row, "train": report, "val": report}, 2)
    line = capsys.readouterr().out
    assert line.startswith("epoch 1/2 loss 1.0000 lr 1.0e-01 train  75.0  50.0*")
    assert " val  75.0  50.0*  50.0*     - " in line

    before = common.group_report(1 - predicted, g // 2, g, GROUPS)  # its worst group is 0
    common.print_splits("title", {"test": report}, {"test": before})
    lines = capsys.readouterr().out.splitlines()[3:]
    cells = [re.split(" {2,}", line.strip())[-1] for line in lines]
    assert cells == [
        "25.0 -> 75.0",
        "50.0 -> 50.0<",
        "50.0 -> 50.0",
        "- -> -",
        "25.0 -> 50.0",  # worst group
        "37.5 -> 62.5",  # mean: 3 and 5 of 8
        "32.4 -> 67.6",  # (60 * 25 + 25 * 50) / 85 and (60 * 75 + 25 * 50) / 85
    ]
    assert lines[1].startswith("G1* a y ")


def test_predict_is_a_pass_over_all_images_in_eval_mode():
    model = network().train()
    next(model.children()).eval()
    modes = [module.training for module in model.modules()]
    batches = make_batches()
    logits, classes, groups = common.predict(model, batches)
    assert [module.training for module in model.modules()] == modes
    x, y, g = whole(batches)
    assert torch.allclose(logits, model.eval()(x), atol=1e-5)
    assert torch.equal(classes, y)
    assert torch.equal(groups, g)


def test_sample_groups():
    g = torch.tensor([0] * 50 + [1] * 20 + [2] * 4)
    first, again, other = (common.sample_groups(g, GROUPS, 10, True, seed) for seed in (0, 0, 1))
    assert [len(part) for part in first] == [10, 20, 4, 0]  # minorities as a whole
    for group, part in enumerate(first):
        assert (g[part] == group).all()
        assert part.tolist() == sorted(set(part.tolist()))
    assert torch.equal(torch.cat(first), torch.cat(again))
    assert not torch.equal(torch.cat(first), torch.cat(other))
    assert [len(part) for part in common.sample_groups(g, GROUPS)] == [50, 20, 4, 0]


def draws_of_worst_images(index, **sizes):
    """What 20 seeds draw among `index`, sets; image i has the larger cross entropy the larger i."""
    n = max(index) + 1
    y = torch.zeros(n, dtype=torch.int64)
    logits = torch.stack([torch.zeros(n), torch.arange(float(n))], dim=1)
    drawn = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        found = common.worst_images(logits, y, torch.tensor([*index]), generator, **sizes).tolist()
        assert len(set(found)) == len(found)
        drawn.append(frozenset(found))
    return drawn


def test_worst_images_by_hand():
    """Of the three worst ones two are drawn."""
    drawn = draws_of_worst_images([0, 1, 2, 4, 5], highest=3, draw=2)  # 3 is not asked for
    assert set(drawn) == {frozenset(pair) for pair in ((2, 4), (2, 5), (4, 5))}


def test_worst_images_as_in_section_4():
    """128 drawn from the 256 of highest cross entropy."""
    drawn = draws_of_worst_images(range(600))
    assert {len(found) for found in drawn} == {128}
    assert frozenset.union(*drawn) == set(range(600 - 256, 600))


# ---- what a neuron is ----


@pytest.mark.parametrize(
    "arch, parameter, layers, unit, n",
    [
        ("resnet10", "conv1.weight", 13, "channel", 1504),
        ("resnet50", "layer1.0.downsample.0.weight", 53, "channel", 26560),  # section 2.1
        ("vit_tiny_patch16_224", "blocks.11.attn.qkv.weight", 48, "weight", 5308416),
    ],
)
def test_neurons_of_an_architecture(arch, parameter, layers, unit, n):
    weights = common.prunable_weights(network(arch))
    assert common.choose_unit(weights) == unit
    assert parameter in weights
    assert len(weights) == layers  # no head, no normalisation
    assert sum(common.count_neurons(weights, unit).values()) == n
    rows = sum(weight.shape[0] for weight in weights.values())
    assert sum(common.count_neurons(weights, "channel").values()) == rows


def test_a_head_that_is_a_convolution():
    weights = common.prunable_weights(torchvision.models.squeezenet1_1(num_classes=2))
    assert "features.0.weight" in weights
    assert "classifier.1.weight" not in weights


def test_attention_of_torchs_own():
    """Its query, key and value are one matrix that is called in_proj_weight."""
    transformer = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=2)
    weights = common.prunable_weights(transformer)
    layer = "encoder.layers.encoder_layer_1"
    assert weights[f"{layer}.self_attention.in_proj_weight"].shape == (48, 16)
    assert f"{layer}.self_attention.out_proj.weight" in weights
    assert f"{layer}.mlp.0.weight" in weights
    assert len(weights) == 2 * 4  # in two blocks: in and out of attention, and two of the MLP
    assert common.choose_unit(weights) == "weight"


def test_linear_layers_do_not_make_a_network_a_transformer():
    """9,408 weights in the convolution, 8,192 in the two linear layers before the head."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 64, 7),
        torch.nn.Linear(64, 64),
        torch.nn.Linear(64, 64),
        torch.nn.Linear(64, 2),
    )
    weights = common.prunable_weights(model)
    assert list(weights) == ["0.weight"]
    assert common.choose_unit(weights) == "channel"


def test_the_head_is_what_pretrained_cfg_says():
    """Here the first layer and, of two heads, the first and the last; else it is the last one."""
    model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(4)])
    assert common.head_names(model) == ("3",)
    assert list(common.prunable_weights(model)) == ["0.weight", "1.weight", "2.weight"]
    model.pretrained_cfg = {"classifier": "0"}
    assert list(common.prunable_weights(model)) == ["1.weight", "2.weight", "3.weight"]
    model.pretrained_cfg = {"classifier": ("0", "3")}
    assert list(common.prunable_weights(model)) == ["1.weight", "2.weight"]
    model.pretrained_cfg = {"classifier": None}  # as of networks that timm builds without a head
    assert common.head_names(model) == ("3",)
    model.pretrained_cfg = {"classifier": "0"}
    model[0] = torch.nn.Identity()  # what timm leaves of a head that is taken off
    assert common.head_names(model) == ("3",)


def test_networks_without_neurons():
    for layers in ([torch.nn.Flatten(), torch.nn.Linear(3, 2)], [torch.nn.Flatten()]):
        with pytest.raises(ValueError, match="no convolution and no linear layer before its head"):
            common.prunable_weights(torch.nn.Sequential(*layers))


# ---- scores ----


def test_top_neurons_are_the_largest():
    scores = {"a": torch.tensor([1.0, 9.0, 3.0]), "b": torch.tensor([9.0, 2.0])}
    assert top_neurons(scores, 1) == [("a", 1)]  # of equals the earlier layer
    assert top_neurons(scores, 5) == [("a", 1), ("b", 0), ("a", 2), ("b", 1), ("a", 0)]
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"top {k} of 5 neurons: expected 1 to 5"):
            top_neurons(scores, k)
    assert common.locate([0, 2, 3], {"a": 3, "b": 2}) == [("a", 0), ("a", 2), ("b", 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_top_neurons_against_a_stable_sort(dtype):
    """Many equals, among them infinite ones of both signs and zeros of both."""
    generator = torch.Generator().manual_seed(0)
    scores = {}
    for name, n in (("a", 70), ("b", 3), ("c", 90)):
        scores[name] = torch.randint(-2, 3, (n,), generator=generator).to(dtype)
    scores["a"][[5, 60]] = torch.inf
    scores["c"][[1, 2]] = -torch.inf
    scores["c"][scores["c"] == 0] *= -1
    places = [(name, index) for name, values in scores.items() for index in range(len(values))]
    places.sort(key=lambda place: -scores[place[0]][place[1]].item())
    for k in (1, 2, 40, 162, 163):
        assert top_neurons(scores, k) == places[:k]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_scores_that_are_not_a_number_are_refused(k):
    scores = {"a": torch.tensor([1.0, torch.nan]), "b": torch.tensor([2.0, 3.0])}
    with pytest.raises(ValueError, match="not a number"):
        top_neurons(scores, k)


def test_needs_gradient(monkeypatch):
    criteria = {
        "product": (lambda z, v: z * v, True),
        "positive": (lambda z, v: z * (v > 0), True),
        "square": (lambda z, v: z.square(), False),
        "large": (lambda z, v: z * (v.abs() > 1e-3), True),
        "like v": (lambda z, v: torch.ones_like(v), True),
    }
    for name, (criterion, _) in criteria.items():
        monkeypatch.setitem(common.CRITERIA, name, criterion)
    assert not common.needs_gradient("magnitude")
    assert common.needs_gradient("gradient")
    for name, (_, needed) in criteria.items():
        assert common.needs_gradient(name) == needed, name


@pytest.mark.parametrize(
    "arch, unit", [("resnet10", "channel"), ("vit_tiny_patch16_224", "weight")]
)
def test_scores_against_a_slow_second_way(arch, unit):
    """Norms neuron by neuron; the gradient is of the mean over all images, however they are cut
    into batches, and there in a frozen network, too."""
    model = network(arch).train().requires_grad_(False)
    next(model.children()).eval()
    modes = [module.training for module in model.modules()]
    weights = common.prunable_weights(model)
    gradients = common.mean_gradient(model, weights, make_batches())
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    magnitude = common.score_neurons(weights, {}, "magnitude", unit)  # without a gradient
    gradient = common.score_neurons(weights, gradients, "gradient", unit)

    x, y, _ = whole(make_batches())
    logits = model.eval().requires_grad_()(x)
    torch.nn.functional.cross_entropy(logits, y).backward()
    for name in list(weights)[::4]:
        weight = model.get_parameter(name)
        for found, values in ((magnitude, weight.detach()), (gradient, weight.grad)):
            for i in (0, 3):
                part = values[i] if unit == "channel" else values.flatten()[i]
                norm = part.norm().item()
                assert found[name][i].item() == pytest.approx(norm, rel=1e-3, abs=1e-7)


def test_a_gradient_without_images_is_refused():
    model = network()
    with pytest.raises(ValueError, match="no image"):
        common.mean_gradient(model, common.prunable_weights(model), [])


def test_a_weight_that_eval_mode_skips_has_a_gradient_of_0():
    class Branch(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used = torch.nn.Linear(4, 4)
            self.skipped = torch.nn.Linear(4, 4)
            self.head = torch.nn.Linear(4, 2)

        def forward(self, x):
            x = self.used(x)
            if self.training:
                x = self.skipped(x)
            return self.head(x)

    model = Branch()
    batches = [(torch.ones(2, 4), torch.tensor([0, 1]))]
    found = common.mean_gradient(model, common.prunable_weights(model), batches)
    assert found.keys() == {"used.weight", "skipped.weight"}
    assert found["used.weight"].any()
    assert not found["skipped.weight"].any()


def test_mean_gradient_of_a_network_of_16_bits():
    """500 batches of two images: in bf16 itself the sum would stop to grow long before the end."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    model.bfloat16()
    x = torch.randn(1000, 4).bfloat16()
    y = (x[:, 0] > 0).long()
    weights = common.prunable_weights(model)
    found = common.mean_gradient(model, weights, zip(x.split(2), y.split(2), strict=True))
    at_once = common.mean_gradient(model, weights, [(x, y)])
    assert found["0.weight"].dtype == torch.float32
    assert found["0.weight"].norm().item() == pytest.approx(
        at_once["0.weight"].norm().item(), rel=0.02
    )


def test_mean_gradient_leaves_the_images_alone():
    """Also where a network overwrites what it is given."""
    model = torch.nn.Sequential(
        torch.nn.ReLU(inplace=True), torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)
    )
    x = torch.randn(2, 4)
    before = x.clone()
    common.mean_gradient(model, common.prunable_weights(model), [(x, torch.tensor([0, 1]))])
    assert torch.equal(x, before)


def test_mean_gradient_where_gradients_are_off():
    """As inside torch.inference_mode, where code that evaluates often stands."""
    model = network()
    weights = common.prunable_weights(model)
    expected = common.mean_gradient(model, weights, make_batches())
    with torch.inference_mode():
        found = common.mean_gradient(model, weights, make_batches())
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient)


# ---- changes of weights ----


@pytest.mark.parametrize("unit, index", [("channel", 5), ("weight", 200)])
@pytest.mark.parametrize("how", ["zero", "random-init", "random-noise"])
def test_masked_modified_and_as_it_was(unit, index, how):
    """Also where filters do not lie one behind the other in memory, and after an error."""
    model = network().to(memory_format=torch.channels_last)
    weights = common.prunable_weights(model)
    neurons = [("conv1.weight", index)]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    old = before["conv1.weight"]
    place = (index,) if unit == "channel" else (1, 1, 0, 4)  # 200 = 147 + 49 + 4
    with pytest.raises(KeyError), modified(weights, neurons, how, 0.1, 7, unit):
        now = model.conv1.weight.detach().clone()
        raise KeyError
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    noise = 0.1 * torch.randn(old[place].shape, generator=torch.Generator().manual_seed(7))
    expected = {"zero": 0 * noise, "random-init": noise, "random-noise": old[place] + noise}
    assert torch.allclose(now[place], expected[how])
    now[place] = old[place]
    assert torch.equal(now, old)

    masks = common.neuron_masks(weights, neurons, unit)
    assert masks.keys() == {"conv1.weight"}
    assert not masks["conv1.weight"][place].any()
    masks["conv1.weight"][place] = True
    assert masks["conv1.weight"].all()


def test_modified_under_autocast():
    """Autocast keeps copies of weights in 16 bits, which would outlive the change."""
    model = network()
    weights = common.prunable_weights(model)
    neurons = [("conv1.weight", index) for index in range(32)]
    x = make_batches((2,))[0][0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        with modified(weights, neurons):
            inside = model(x)
        after = model(x)
    assert not torch.equal(inside, before)
    assert torch.equal(after, before)


@pytest.mark.parametrize(
    "how, sigma", [("random-init", 0.0), ("random-noise", float("nan")), ("smallest", 1.0)]
)
def test_modifications_that_are_none(how, sigma):
    weights = common.prunable_weights(network())
    with pytest.raises(ValueError, match="sigma > 0"), modified(weights, [], how, sigma):
        pass


def test_noise_is_drawn_in_the_order_of_the_neurons():
    """So the top 2 get what the top 1 got, and noise for the second."""
    layer = torch.nn.Linear(3, 4)
    weights = {"w": layer.weight}
    with modified(weights, [("w", 2), ("w", 0)], "random-init", 0.5, 9):
        both = layer.weight.detach().clone()
    with modified(weights, [("w", 2)], "random-init", 0.5, 9):
        assert torch.equal(layer.weight[2], both[2])
    with modified(weights, [("w", 0), ("w", 2)], "random-init", 0.5, 9):
        assert torch.equal(layer.weight[0], both[2])


def test_a_neuron_named_twice_comes_back():
    layer = torch.nn.Linear(3, 4)
    before = layer.weight.detach().clone()
    with modified({"w": layer.weight}, [("w", 1), ("w", 1)], "random-noise", 1.0):
        assert not torch.equal(layer.weight[1], before[1])
    assert torch.equal(layer.weight, before)


# ---- the trace ----


class Odd(torch.nn.Module):
    """Overwrites its input, uses a convolution twice, overwrites in place what a view and a skip
    were taken of, and ends with a layer that no logit needs; on demand with a branch."""

    def __init__(self, branching):
        super().__init__()
        torch.manual_seed(0)
        self.stem = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.conv = torch.nn.Conv2d(8, 8, 3, padding=1)
        self.last = torch.nn.Conv2d(8, 8, 1)
        self.unused = torch.nn.Conv2d(8, 8, 1)
        self.head = torch.nn.Linear(8, 2)
        self.branching = branching

    def forward(self, x):
        skip = self.stem(x.sub_(0.1))
        view = skip.flatten(2)
        x = self.conv(skip)
        x = x + torch.nn.functional.relu(skip, inplace=True)  # changes view, too
        if self.branching and x.mean() > 0:  # torch.fx cannot follow this
            x = x * 2
        x = self.last(self.conv(x))
        x += skip
        return (self.head(x.mean((2, 3)) + view.mean(2)), self.unused(x))[0]


class Tied(torch.nn.Module):
    """Two convolutions that share a weight, which is known by the name of the first, and a further
    one between them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.first = torch.nn.Conv2d(8, 8, 3, padding=1)
        self.between = torch.nn.Conv2d(8, 8, 1)
        self.second = torch.nn.Conv2d(8, 8, 3, padding=1)
        self.second.weight = self.first.weight
        self.head = torch.nn.Linear(8, 2)

    def forward(self, x):
        x = self.first(self.stem(x).relu())
        x = self.second(self.between(x.relu()))
        return self.head(x.mean((2, 3)))


class Parameters(torch.nn.Module):
    """Uses the weight of a layer without the layer, as attention of torch's own does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = torch.nn.Conv2d(3, 8, 4, stride=4)
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = torch.nn.Linear(8, 64)
        self.head = torch.nn.Linear(64, 2)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = torch.nn.functional.linear(x, self.mlp.weight).relu()
        return self.head(x.mean(1))


class Kept(torch.nn.Module):
    """Keeps what it computes of a weight in eval mode, and clears it when its mode is set."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.conv = torch.nn.Conv2d(8, 8, 3, padding=1)
        self.head = torch.nn.Linear(8, 2)
        self.kept = None

    def train(self, mode=True):
        self.kept = None
        return super().train(mode)

    def forward(self, x):
        if self.kept is None or self.training:
            self.kept = 2 * self.conv.weight
        x = torch.nn.functional.conv2d(self.stem(x).relu(), self.kept)
        return self.head(x.mean((2, 3)))


class Borrowed(torch.nn.Module):
    """Hands the weight of one layer to another one that has no name for it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.borrower = Borrower(self.conv)
        self.last = torch.nn.Conv2d(8, 8, 1)
        self.head = torch.nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.last(self.borrower(x).relu()).mean((2, 3)))


class Borrower(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layers = [layer]

    def forward(self, x):
        return torch.nn.functional.conv2d(x, self.layers[0].weight)


KINDS = {
    "resnet10": network,
    "vit": lambda: network("vit_tiny_patch16_224"),
    "odd": lambda: Odd(branching=False),
    "branching": lambda: Odd(branching=True),
    "tied": Tied,
    "parameters": Parameters,
    "kept": Kept,
    "borrowed": Borrowed,
}


def make_variants(weights, unit):
    """Zeroed and replaced neurons of some layers, and of the first and last layer together."""
    counts = common.count_neurons(weights, unit)
    variants = []
    for n, name in enumerate(list(counts)[:: max(len(counts) // 5, 1)]):
        k = min(counts[name], 3 if unit == "channel" else 500)
        neurons = [(name, index) for index in range(k)]
        variants.append({"neurons": neurons})
        variants.append({"neurons": neurons[:2], "how": "random-init", "sigma": 100.0, "seed": n})
    first, *_, last = counts
    both = [(first, 0), (last, 1)]
    variants.append({"neurons": both, "how": "random-noise", "sigma": 100.0})
    return variants


def by_brute_force(model, batches, variant, unit):
    """Counts of one variant by full passes of a copy that really is modified."""
    model = copy.deepcopy(model).eval()
    other = copy.deepcopy(model)
    counts = {}
    for x, y, g in batches:
        with torch.inference_mode():
            before = model(x.clone()).argmax(1) == y
            with modified(dict(other.named_parameters()), unit=unit, **variant):
                after = other(x.clone()).argmax(1) == y
        for j in g.unique().tolist():
            b = before[g == j]
            a = after[g == j]
            numbers = (len(b), b.sum(), a.sum(), (b & ~a).sum(), (~b & a).sum())
            row = counts.setdefault(j, dict.fromkeys(COUNTED, 0))
            for name, value in zip(COUNTED, numbers, strict=True):
                row[name] += int(value)
    return counts


@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_against_full_passes_and_really_modified_copies(kind, capsys):
    """Logits bit for bit, counts number for number; weights, images and modes stay as they were."""
    model = KINDS[kind]().train()
    batches = make_batches((12, 9))
    weights = common.prunable_weights(model)
    unit = common.choose_unit(weights)
    variants = make_variants(weights, unit)
    state = copy.deepcopy(model.state_dict())
    images = copy.deepcopy(batches)

    passes = common.OnePass()
    x = batches[0][0]
    with common.evaluating(model), torch.inference_mode():
        logits, found = common.full_passes(model, x, variants, weights, unit)
        fast_logits, fast = passes(model, x, variants, weights, unit)
    assert torch.equal(logits, fast_logits)
    assert len(found) == len(fast) == len(variants)
    for slow, quick in zip(found, fast, strict=True):
        assert torch.equal(slow, quick)
    assert not all(torch.equal(logits, changed) for changed in found)

    expected = [by_brute_force(model, batches, variant, unit) for variant in variants]
    assert common.count_right(model, batches, variants, weights, unit) == expected
    assert common.count_right(model, batches, variants, weights, unit, passes) == expected
    assert any(row["to_wrong"] + row["to_right"] for by in expected for row in by.values())

    assert model.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    for (x, *_), (before, *_) in zip(batches, images, strict=True):
        assert torch.equal(x, before)
    full = kind in ("branching", "kept")
    assert ("takes a full pass" in capsys.readouterr().err) == full


def test_tied_weights_are_one():
    """Named once; zeroed in both places; and both places are in the gradient."""
    model = Tied().eval()
    weights = common.prunable_weights(model)
    assert list(weights) == ["stem.weight", "first.weight", "between.weight"]
    x, y, g = whole(make_batches())
    loss = torch.nn.functional.cross_entropy(model(x), y)
    (expected,) = torch.autograd.grad(loss, [model.first.weight])
    found = common.mean_gradient(model, weights, [(x, y, g)])["first.weight"]
    assert torch.allclose(found, expected, atol=1e-6)

    apart = copy.deepcopy(model)
    apart.second.weight = torch.nn.Parameter(model.first.weight.detach().clone())
    apart.first.weight.data[3] = 0
    apart.second.weight.data[3] = 0
    variants = [{"neurons": [("first.weight", 3)]}]
    with torch.inference_mode():
        for passes in (common.full_passes, common.OnePass()):
            logits, (changed,) = passes(model, x, variants, weights)
            assert torch.equal(changed, apart(x))
            assert not torch.equal(changed, logits)


def test_one_pass_runs_what_lies_before_a_changed_layer_once():
    """Three variants of the last layer: the stem runs once for all, the last layer four times."""
    model = Odd(branching=False).eval()
    weights = common.prunable_weights(model)
    variants = [{"neurons": [("last.weight", index)]} for index in range(3)]
    passes = common.OnePass()
    x = torch.randn(4, 3, 32, 32)
    calls = []
    with torch.inference_mode():
        passes(model, x, variants, weights)  # the first call traces
        model.stem.register_forward_hook(lambda *_: calls.append("stem"))
        model.last.register_forward_hook(lambda *_: calls.append("last"))
        passes(model, x, variants, weights)
    assert calls.count("stem") == 1
    assert calls.count("last") == 4


@pytest.mark.parametrize("of", ["detach", "data", "state_dict", "copy"])
def test_weights_that_are_not_the_parameters_themselves(of):
    """Tensors that share their memory with the parameters do as well; those of a copy would change
    nothing, and are refused."""
    model = KINDS["resnet10"]().eval()
    batches = make_batches()
    weights = common.prunable_weights(model)
    variants = make_variants(weights, "channel")
    expected = common.count_right(model, batches, variants, weights)
    others = {
        "detach": {name: weight.detach() for name, weight in weights.items()},
        "data": {name: weight.data for name, weight in weights.items()},
        "state_dict": {name: model.state_dict()[name] for name in weights},
        "copy": common.prunable_weights(copy.deepcopy(model)),
    }[of]
    for passes in (common.full_passes, common.OnePass()):
        if of == "copy":
            with pytest.raises(ValueError, match="weights of another model"):
                common.count_right(model, batches, variants, others, passes=passes)
        else:
            found = common.count_right(model, batches, variants, others, passes=passes)
            assert found == expected


def test_one_pass_of_two_networks():
    """One after the other through the same object: each gives its own logits."""
    passes = common.OnePass()
    x = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        for bias in (0, 1):
            model = Odd(branching=False).eval()
            model.head.bias += bias
            weights = common.prunable_weights(model)
            logits, _ = passes(model, x, [{"neurons": [("last.weight", 0)]}], weights)
            assert torch.equal(logits, model(x.clone()))
