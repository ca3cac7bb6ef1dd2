"""Scores, masks, modifications and the tracing engine against slow second ways and hand-made numbers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common import (BadInput, Split, Variant, accuracy_under, build_model, center, describe_groups, gradient_scores, is_transformer,
                    locate, logits_under, magnitude_scores, modified, neuron_masks, normalize, prunable_layers, sample_groups, stages,
                    top_neurons, worst_images)

SMALL = [("resnet10", 32), ("squeezenet1_1", 64), ("mobilenet_v3_small", 64), ("convnext_atto", 64), ("vit_tiny_patch16_224", 32),
         ("densenet121", 32)]


def network(arch="resnet10", size=32, seed=0):
    torch.manual_seed(seed)
    model = build_model(arch, 2, size)
    for module in model.modules():  # statistics of BatchNorm that are not 0 and 1
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def split(counts=(9, 4, 3, 8), size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    g = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    g = g[torch.randperm(len(g), generator=generator)]
    images = torch.randint(0, 256, (len(g), 3, size, size), generator=generator, dtype=torch.uint8)
    groups = describe_groups([f"group {j}" for j in range(len(counts))], counts, 2)
    return Split(images, g // 2, g % 2, g, torch.full((len(g), 2), size), [str(i) for i in range(len(g))], groups)


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_prunable():
    resnet = prunable_layers(build_model("resnet50", 2, 32))
    assert len(resnet) == 53 and sum(len(w) for w in resnet.values()) == 26560 and "layer1.0.downsample.0" in resnet and "fc" not in resnet
    vit = build_model("vit_small_patch16_224", 2, 32)
    assert sum(w.numel() for w in prunable_layers(vit).values()) == 21_233_664 and is_transformer(vit)
    assert {name.rsplit(".", 1)[-1] for name in prunable_layers(vit)} == {"qkv", "proj", "fc1", "fc2"}
    squeezenet = build_model("squeezenet1_1", 2, 64)
    assert "classifier.1" not in prunable_layers(squeezenet) and len(prunable_layers(squeezenet)) == 25 and not is_transformer(squeezenet)
    torchvision_vit = prunable_layers(build_model("vit_b_16", 2, 224))
    assert sum(w.numel() for w in torchvision_vit.values()) == 12 * 12 * 768 ** 2 and not any("head" in name for name in torchvision_vit)


@pytest.mark.parametrize("unit", ["channel", "weight"])
def test_scores_against_a_double_loop(unit):
    model, data, layer = network(), split(), "layer2.0.downsample.0"
    members = (data.g == 2).nonzero()[:, 0]
    scores, magnitudes = gradient_scores(model, data, members, 32, unit, batch_size=2), magnitude_scores(model, unit)
    weight, total = prunable_layers(model)[layer], torch.zeros_like(prunable_layers(model)[layer])
    for i in members.tolist():  # image by image
        x = normalize(center(data.images[i:i + 1], 32), model)
        total += torch.autograd.grad(F.cross_entropy(model(x), data.y[i:i + 1]), weight)[0] / len(members)
    for n in range(0, len(scores[layer]), 97):
        where = n if unit == "channel" else np.unravel_index(n, weight.shape)
        for found, values in ((scores, total), (magnitudes, weight)):
            slow = sum(value ** 2 for value in np.ravel(values.detach()[where].double())) ** 0.5
            assert float(found[layer][n]) == pytest.approx(slow, rel=1e-3, abs=1e-7)


def test_gradients_leave_nothing_behind():
    model, data = network(), split()
    model.train()
    before = snapshot(model)
    train_mode = gradient_scores(model, data, torch.arange(10), 32)
    assert model.training and all(p.grad is None for p in model.parameters()) and unchanged(model, before)
    eval_mode = gradient_scores(model.eval(), data, torch.arange(10), 32)
    assert not model.training and all(torch.equal(train_mode[layer], eval_mode[layer]) for layer in eval_mode)  # eval statistics both times


def test_top_neurons_are_the_largest_with_ties_by_layer_then_index():
    scores = {"first": torch.tensor([1.0, 5.0, 2.0]), "second": torch.tensor([5.0, 9.0, 5.0])}
    assert top_neurons(scores, 1) == [("second", 1)]
    assert top_neurons(scores, 3) == [("second", 1), ("first", 1), ("second", 0)]
    assert top_neurons(scores, 6)[-2:] == [("first", 2), ("first", 0)]
    for k in (0, 7):
        with pytest.raises(BadInput, match="of 6 neurons"):
            top_neurons(scores, k)
    assert locate([0, 2, 3, 5], {"a": 3, "b": 3}) == [("a", 0), ("a", 2), ("b", 0), ("b", 2)]


def test_worst_images_have_the_highest_loss():
    logits, y = torch.zeros(600, 2), torch.zeros(600, dtype=torch.long)
    logits[:, 1] = torch.arange(600)  # the later the image, the surer and the more wrong
    index = torch.arange(0, 600, 2)
    drawn = worst_images(logits, y, index, torch.Generator().manual_seed(0))
    assert len(drawn) == 128 == len(set(drawn.tolist())) and drawn.min() >= 88 and set((drawn % 2).tolist()) == {0}  # the last 256 of 300
    assert not torch.equal(drawn, worst_images(logits, y, index, torch.Generator().manual_seed(1)))
    assert sorted(worst_images(logits, y, index[:50], torch.Generator()).tolist()) == index[:50].tolist()


@pytest.mark.parametrize("unit", ["channel", "weight"])
@pytest.mark.parametrize("how", ["zero", "random-init", "random-noise"])
def test_modified_restores_bit_for_bit(how, unit):
    model = network()
    before, neurons = snapshot(model), [("layer1.0.conv1", 3), ("conv1", 0), ("layer1.0.conv1", 7)]
    with pytest.raises(KeyError, match="inside"):
        with modified(model, neurons, how, 0.1, seed=1, unit=unit):
            changed = [name for name in before if not torch.equal(model.state_dict()[name], before[name])]
            assert changed == ["conv1.weight", "layer1.0.conv1.weight"]
            count = sum(int((model.state_dict()[name] != before[name]).sum()) for name in changed)
            assert count == (3 * 49 + 2 * 64 * 9 if unit == "channel" else 3)
            raise KeyError("inside")
    assert unchanged(model, before)
    counts = accuracy_under(model, split(), 32, [Variant(neurons, how, 0.1)], unit)
    assert unchanged(model, before) and len(counts) == 1


def test_masks_equal_zeroing():
    model, neurons = network(), [("layer1.0.conv1", 3), ("conv1", 0)]
    for unit in ("channel", "weight"):
        masks = neuron_masks(model, neurons, unit)
        assert set(masks) == {"conv1.weight", "layer1.0.conv1.weight"} and set(masks["conv1.weight"].unique().tolist()) == {False, True}
        masked = {name: p * masks[name] if name in masks else p for name, p in model.named_parameters()}
        x = torch.randn(2, 3, 32, 32)
        with modified(model, neurons, unit=unit), torch.no_grad():
            zeroed = model(x)
        assert torch.equal(torch.func.functional_call(model, masked, (x,)).detach(), zeroed)


def test_random_modifications():
    model, neurons = network(), [("conv1", 2), ("conv1", 5)]
    weight = model.conv1.weight
    def under(*how, **more):
        with modified(model, neurons, *how, **more):
            return weight.detach()[[2, 5]].clone()
    assert under("random-init", 1e-9).abs().max() < 1e-7  # sigma to 0 tends to zeroing
    assert torch.allclose(under("random-noise", 0.1, 3) - weight.detach()[[2, 5]], under("random-init", 0.1, 3), atol=1e-6)
    assert torch.equal(under("random-init", 0.1, 3), under("random-init", 0.1, 3)) and not torch.equal(under("random-init", 0.1, 3), under("random-init", 0.1, 4))
    assert under("random-init", 0.02).std() == pytest.approx(0.02, rel=0.15)
    for how in ("random-init", "random-noise", "nonsense"):
        with pytest.raises(BadInput):
            under(how, 0.0)


@pytest.mark.parametrize("arch, size", SMALL)
def test_engine_equals_full_forward(arch, size):
    model = network(arch, size)
    unit = "weight" if is_transformer(model) else "channel"
    layers = list(prunable_layers(model))
    variants = [Variant([(layer, 0), (layer, 1)], "random-init", 2.0, seed=1) for layer in layers[::len(layers) // 6]]
    x = torch.randn(2, 3, size, size)
    chain = stages(model, x[:1])
    assert len(chain[0]) > 3 and max(chain[1].values()) == len(chain[0])  # there are cuts, and one lies in front of the last layers
    before = snapshot(model)
    with torch.inference_mode():
        fast = dict(logits_under(model, x, variants, unit, chain))
        assert torch.allclose(fast[None], model(x), rtol=1e-5, atol=1e-6)
        for number, v in enumerate(variants):
            with modified(model, v.neurons, v.how, v.sigma, v.seed, unit):
                assert torch.allclose(fast[number], model(x), rtol=1e-4, atol=1e-5)
    assert unchanged(model, before) and not any("forward" in vars(module) for module in model.modules())


def test_accuracy_under_counts_and_flips():
    model, data = network(), split((30, 20, 12, 25))
    variants = [Variant([("layer4.0.conv2", i) for i in range(200)]), Variant([("conv1", 0)], "random-init", 3.0, 1, groups=(2,))]
    index = torch.arange(5, 87)
    counts = accuracy_under(model, data, 32, variants, index=index, batch_size=7)
    def right():
        return model(normalize(center(data.images, 32), model)).argmax(1) == data.y
    with torch.no_grad():
        before = right()
        for v, found in zip(variants, counts):
            assert set(found) == ({2} if v.groups else {0, 1, 2, 3})
            with modified(model, v.neurons, v.how, v.sigma, v.seed):
                after = right()
            for j, row in found.items():
                b, a = before[index][data.g[index] == j], after[index][data.g[index] == j]
                assert row == {"n": len(b), "correct_before": int(b.sum()), "correct_after": int(a.sum()),
                               "to_wrong": int((b & ~a).sum()), "to_right": int((~b & a).sum())}


def test_sample_keeps_small_and_whole_groups():
    data = split((30, 20, 3, 25))
    index = sample_groups(data, 5, whole=(1,), seed=0)
    assert [int((data.g[index] == j).sum()) for j in range(4)] == [5, 20, 3, 5] and index.tolist() == sorted(index.tolist())
    assert torch.equal(index, sample_groups(data, 5, (1,), 0)) and not torch.equal(index, sample_groups(data, 5, (1,), 1))
    assert torch.equal(sample_groups(data), torch.arange(78))
