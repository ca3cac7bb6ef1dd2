"""finetune_contrastive.py: losses against sums by hand, the tied branches against two models, directions, whole runs."""

import argparse
import copy
import csv
import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.func import functional_call

import finetune_contrastive as stage
from common import (BadInput, Split, build_model, describe_groups, load_checkpoint, modified, neuron_masks, normalize, prunable_layers,
                    write_json)
from finetune_contrastive import auxiliary, critical_neurons, nt_xent, penultimate, pruned_count, selection_spread, supervised_loss

from .conftest import assert_refused, run_script, write_waterbirds

ARGS = dict(method="contrastive", criterion="magnitude", prune_fraction=1e-4, order="largest", gradient_source="train", views="two",
            features="probs", aux_bn="own", temperature=0.5, loss="mse", lam=0.2, lam_reduction="sum", augment="crop-flip", seed=0,
            batch_size=64, device="cpu")


def arguments(**changed):
    return argparse.Namespace(**{**ARGS, **changed})


def network(arch="resnet10", size=32):
    torch.manual_seed(0)
    return build_model(arch, 2, size)


def small_split(counts=(9, 4, 3, 8), size=32):
    generator = torch.Generator().manual_seed(0)
    g = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    images = torch.randint(0, 256, (len(g), 3, size, size), generator=generator, dtype=torch.uint8)
    groups = describe_groups([f"group {j}" for j in range(4)], counts, 2)
    return Split(images, g // 2, g % 2, g, torch.full((len(g), 2), size), [str(i) for i in range(len(g))], groups)


# ---- the losses ----

def nt_xent_by_sums(r, r_p, temperature):
    """Eq. 2.1 word by word, mean over all anchors."""
    features = [*r, *r_p]
    def sim(u, v):
        return float(u @ v / (u.norm() * v.norm()))
    total = 0.0
    for i, anchor in enumerate(features):
        positive = (i + len(r)) % len(features)
        others = sum(math.exp(sim(anchor, other) / temperature) for k, other in enumerate(features) if k != i)
        total -= math.log(math.exp(sim(anchor, features[positive]) / temperature) / others)
    return total / len(features)


@pytest.mark.parametrize("batch,temperature", [(2, 0.5), (5, 0.1), (7, 2.0)])
def test_nt_xent_is_eq_2_1_in_both_directions(batch, temperature):
    generator = torch.Generator().manual_seed(batch)
    r, r_p = (torch.randn(batch, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    assert nt_xent(r, r_p, temperature).item() == pytest.approx(nt_xent_by_sums(r, r_p, temperature), abs=1e-12)
    assert nt_xent(r, r_p, temperature).item() == pytest.approx(nt_xent(r_p, r, temperature).item(), abs=1e-12)
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, temperature), (r.requires_grad_(), r_p.requires_grad_()))


def test_nt_xent_by_hand():
    """Two images, features alike within an image and at right angles between them: each anchor sees one 1 and two 0."""
    r = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    assert nt_xent(r, 2 * r, 0.5).item() == pytest.approx(math.log((math.e ** 2 + 2) / math.e ** 2), abs=1e-6)
    assert nt_xent(r, r, 0.5) < nt_xent(r, r.flip(0), 0.5)  # an image's own features belong together


def test_supervised_loss_by_hand():
    """Softmax of (ln 3, 0) is (3/4, 1/4): ||(3/4, 1/4) - (1, 0)||^2 = 1/8, and 9/8 for the other class."""
    logits, y = torch.tensor([[math.log(3), 0.0]] * 2), torch.tensor([0, 1])
    assert supervised_loss(logits, y, "mse", "sum").item() == pytest.approx(1 / 8 + 9 / 8)
    assert supervised_loss(logits, y, "mse", "mean").item() == pytest.approx(5 / 8)
    assert supervised_loss(logits, y, "ce", "sum").item() == pytest.approx(-math.log(3 / 4) - math.log(1 / 4), abs=1e-6)
    assert supervised_loss(logits, y, "ce", "mean").item() == pytest.approx((-math.log(3 / 4) - math.log(1 / 4)) / 2, abs=1e-6)


# ---- the two branches ----

def one_step(model, neurons, args):
    torch.manual_seed(1)
    masks, buffers = neuron_masks(model, neurons), {name: b.clone() for name, b in model.named_buffers()}
    split = small_split()
    project = {"probs": torch.nn.Softmax(1), "logits": torch.nn.Identity()}[args.features]
    return stage.step(model, project, split.images.double(), split.original_sizes, split.y, masks, buffers, args, 32)


@pytest.mark.parametrize("features", ["probs", "logits"])
def test_gradient_of_a_step_is_that_of_two_models_with_tied_weights(features):
    args, neurons = arguments(features=features), [("conv1", 3), ("layer3.0.conv1", 7)]
    model = network().double().train()
    target, pruned = copy.deepcopy(model), copy.deepcopy(model)
    sum(one_step(model, neurons, args).values()).backward()

    layers = dict(pruned.named_modules())
    for layer, i in neurons:
        layers[layer].weight.data[i] = 0
    torch.manual_seed(1)
    split = small_split()
    def view():
        return normalize(stage.augment(split.images.double(), split.original_sizes, 32, "crop-flip"), target)
    output, output_p = target(view()), pruned(view())
    r, r_p = (output.softmax(1), output_p.softmax(1)) if features == "probs" else (output, output_p)
    squared = sum(((p - torch.eye(2).double()[c]) ** 2).sum() for p, c in zip(output.softmax(1), split.y))
    (nt_xent(r, r_p, 0.5) + 0.2 * squared).backward()
    masks = neuron_masks(model, neurons)
    for (name, p), a, b in zip(model.named_parameters(), target.parameters(), pruned.parameters()):
        expected = a.grad + (b.grad * masks[name] if name in masks else b.grad)
        assert torch.allclose(p.grad, expected, rtol=1e-8, atol=1e-12), name


def test_masked_neurons_learn_from_the_target_branch_alone():
    model, x = network().train(), torch.rand(4, 3, 32, 32)
    masks = neuron_masks(model, [("layer1.0.conv1", 5)])
    weight = model.layer1[0].conv1.weight
    by_auxiliary, = torch.autograd.grad(auxiliary(model, x, masks, {})[:, 0].sum(), weight)
    by_target, = torch.autograd.grad(model(x)[:, 0].sum(), weight)
    assert by_auxiliary[5].abs().max() == 0 and by_auxiliary[4].abs().max() > 0 and by_target[5].abs().max() > 0


@pytest.mark.parametrize("arch,unit,neurons", [
    ("resnet10", "channel", [("conv1", 0), ("layer4.0.conv2", 9)]), ("squeezenet1_1", "channel", [("features.0", 1)]),
    ("vit_tiny_patch16_224", "weight", [("blocks.0.attn.qkv", 11), ("blocks.3.mlp.fc1", 40_000)])])
def test_auxiliary_is_the_network_with_zeroed_neurons(arch, unit, neurons):
    model, x = network(arch, 64).eval(), torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        got = auxiliary(model, x, neuron_masks(model, neurons, unit), {})
        with modified(model, neurons, unit=unit):
            expected = model(x)
        assert torch.equal(got, expected) and not torch.equal(got, model(x))


def test_statistics_of_batchnorm():
    """own and frozen leave the target's running statistics as a single forward would; shared moves them twice."""
    images, moved = small_split(), {}
    for aux_bn in ("own", "shared", "frozen", "target alone"):
        model = network().train()
        buffers = {name: b.clone() for name, b in model.named_buffers()} if aux_bn == "own" else {}
        torch.manual_seed(1)
        args = arguments(aux_bn=aux_bn, method="erm" if aux_bn == "target alone" else "contrastive")
        masks = neuron_masks(model, [("conv1", 3)])
        stage.step(model, torch.nn.Softmax(1), images.images, images.original_sizes, images.y, masks, buffers, args, 32)
        moved[aux_bn] = {name: b.clone() for name, b in model.named_buffers()}
        assert all(module.training for module in model.modules())
    for name, alone in moved["target alone"].items():
        assert torch.equal(moved["own"][name], alone) and torch.equal(moved["frozen"][name], alone), name
    assert not torch.equal(moved["shared"]["bn1.running_mean"], moved["target alone"]["bn1.running_mean"])
    assert moved["shared"]["bn1.num_batches_tracked"] == 2 and moved["own"]["bn1.num_batches_tracked"] == 1


def test_frozen_branch_uses_the_running_statistics():
    model, x = network().train(), torch.rand(4, 3, 32, 32)
    expected = functional_call(copy.deepcopy(model).eval(), {}, (x,))
    assert torch.equal(auxiliary(model, x, {}, {}, "frozen"), expected)
    assert not torch.allclose(auxiliary(model, x, {}, {}, "shared"), expected)


@pytest.mark.parametrize("arch,width", [("resnet10", 512), ("squeezenet1_1", 512), ("vit_tiny_patch16_224", 192), ("mobilenet_v3_small", 1024)])
def test_penultimate_features(arch, width):
    model = network(arch, 64).eval()
    with penultimate(model) as found:
        logits = model(torch.rand(2, 3, 64, 64))
    assert found[0].shape == (2, width)
    if arch == "resnet10":
        assert torch.equal(model.fc(found[0]), logits)
    with pytest.raises(RuntimeError), penultimate(model):
        raise RuntimeError
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert stage.projection_head(model, 64)(found[0]).shape == (2, 128)


# ---- which neurons, from which images ----

def planted():
    """One convolution of 40 filters; filter i has norm i + 1."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 40, 1, bias=False), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(40, 2))
    model[0].weight.data = (torch.arange(40.0) + 1)[:, None, None, None] * torch.eye(3)[torch.arange(40) % 3][:, :, None, None]
    model.register_buffer("input_mean", torch.zeros(3, 1, 1))
    model.register_buffer("input_std", torch.ones(3, 1, 1))
    return model.eval()


def chosen(model, split, logits, **changed):
    rows = critical_neurons(model, split, logits, arguments(**changed), 32, "channel", 1)
    return [(row["criterion"], row["index"]) for row in rows]


def test_fractions():
    assert [pruned_count(f, 26560) for f in (1e-4, 2e-4, 1e-3, 1e-2, 1e-1)] == [3, 6, 27, 266, 2656]
    assert pruned_count(1e-4, 40) == 1 and pruned_count(0.1, 40) == 4 and pruned_count(1e-4, 21_233_664) == 2124


def test_magnitude_masks_the_largest():
    split, model = small_split(), planted()
    logits = torch.zeros(len(split.y), 2)
    assert chosen(model, split, logits, prune_fraction=0.1) == [("magnitude", i) for i in (39, 38, 37, 36)]
    assert chosen(model, split, logits, prune_fraction=0.1, order="smallest") == [("magnitude", i) for i in (0, 1, 2, 3)]
    row, = critical_neurons(model, split, logits, arguments(), 32, "channel", 7)
    assert row == {"epoch": 7, "criterion": "magnitude", "layer": "0", "index": 39, "score": 40.0}


def test_gradient_is_taken_of_the_worst_images(monkeypatch):
    """Of 600 images, the 300 of odd index are wrong, the higher the index the more: the worst 256 start at index 89."""
    split = small_split((300, 100, 100, 100))
    odd, strength = torch.arange(600) % 2 == 1, torch.arange(600) / 100
    logits = torch.zeros(600, 2)
    logits[torch.arange(600), torch.where(odd, 1 - split.y, split.y)] = strength
    seen = []
    def scores(model, split, index, *_):
        seen.append(index)
        return {"0": torch.tensor([0.1, 0.9, 0.5])}
    monkeypatch.setattr(stage, "gradient_scores", scores)
    monkeypatch.setattr(stage, "magnitude_scores", lambda *_: {"0": torch.tensor([5.0, 1.0, 1.0])})
    assert chosen(None, split, logits, criterion="gradient") == [("gradient", 1)]
    assert chosen(None, split, logits, criterion="gradient", order="smallest") == [("gradient", 0)]
    assert chosen(None, split, logits, criterion="mixed") == [("magnitude", 0), ("gradient", 1)]
    assert chosen(None, split, logits, criterion="none") == []
    assert len(seen[0].unique()) == 128 and all(i % 2 == 1 and i >= 89 for i in seen[0].tolist())
    chosen(None, split, logits, criterion="gradient", gradient_source="minority")
    assert set(split.g[seen[-1]].tolist()) == {1} and len(seen[-1]) == 100  # G1 is the only minority of these counts


def test_mixed_masks_the_union():
    split, model = small_split(), planted()
    rows = critical_neurons(model, split, torch.randn(len(split.y), 2), arguments(criterion="mixed", prune_fraction=0.1), 32, "channel", 1)
    parts = {c: {(r["layer"], r["index"]) for r in rows if r["criterion"] == c} for c in ("magnitude", "gradient")}
    mask, = neuron_masks(model, parts["magnitude"] | parts["gradient"]).values()
    zero = {("0", i) for i in range(40) if not mask[i].any()}
    assert zero == parts["magnitude"] | parts["gradient"] and len(parts["magnitude"]) == len(parts["gradient"]) == 4


def test_a_transformer_is_masked_by_weight():
    split, model = small_split(), network("vit_tiny_patch16_224")
    args = arguments(criterion="mixed", prune_fraction=1e-5)
    rows = critical_neurons(model, split, torch.randn(len(split.y), 2), args, 32, "weight", 1)
    layers = prunable_layers(model)
    k = math.ceil(1e-5 * sum(w.numel() for w in layers.values()))
    by = {c: [row for row in rows if row["criterion"] == c] for c in ("magnitude", "gradient")}
    assert len(by["magnitude"]) == len(by["gradient"]) == k
    everything = torch.cat([w.detach().abs().flatten() for w in layers.values()])
    assert sorted(row["score"] for row in by["magnitude"]) == sorted(everything.topk(k).values.tolist())
    masks = neuron_masks(model, {(row["layer"], row["index"]) for row in rows}, "weight")
    assert sum(int((mask == 0).sum()) for mask in masks.values()) == len({(row["layer"], row["index"]) for row in rows})


def test_erm_goes_on_with_the_head_it_began_with():
    split, model = small_split(), network().eval()
    def loss(head):
        torch.manual_seed(1)
        return stage.step(model, None, split.images, split.original_sizes, split.y, {}, {},
                          arguments(method="erm", augment="none"), 32, head)["supervised"].item()
    logits = model(normalize(split.images.float() / 255, model))
    assert loss("linear") == pytest.approx(torch.nn.functional.cross_entropy(logits, split.y).item(), abs=1e-5)
    assert loss("softmax") == pytest.approx(torch.nn.functional.cross_entropy(logits.softmax(1), split.y).item(), abs=1e-5)


def test_random_masks_differ_by_epoch_and_seed_only():
    split, model = small_split(), planted()
    logits = torch.zeros(len(split.y), 2)
    def draw(epoch, seed):
        rows = critical_neurons(model, split, logits, arguments(criterion="random", prune_fraction=0.2, seed=seed), 32, "channel", epoch)
        return [row["index"] for row in rows]
    assert draw(1, 0) == draw(1, 0) and len(set(draw(1, 0))) == 8
    assert draw(1, 0) != draw(2, 0) and draw(1, 0) != draw(1, 1)


# ---- selection and comparison ----

def test_selection_spread():
    g = torch.repeat_interleave(torch.arange(2), torch.tensor([50, 20]))
    right = torch.zeros(3, 70, dtype=torch.bool)
    right[0, :60] = True  # 100 and 50 %
    right[1] = True
    right[2] = True  # as good, but later
    spread = selection_spread(right, g, 2, 0)
    assert spread == {"acc_worst_sd": 0.0, "chosen": {2: 1.0}}
    right[1, 60:] = False
    right[2, 65:] = False
    right[2, 50:51] = False
    assert selection_spread(right, g, 3, 0)["chosen"][3] > 0.9  # 75 % in the worst group, against 50 %
    for epoch, accuracy in ((2, 0.5), (3, 0.75)):
        sd = selection_spread(right, g, epoch, 0)["acc_worst_sd"]
        assert sd == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 20), rel=0.1)


def results(method, before, after, last, start_epoch=40, epochs=20, data="/data/waterbirds"):
    def splits(worst):
        return {"test": {"acc_worst": worst, "acc_mean_train_mix": 0.9}}
    settings = {key: value for key, value in {**ARGS, "unit": "channel"}.items() if key in stage.METHOD}
    return {**settings, "stage": "finetune", "method": method, "arch": "resnet50", "data": data, "start_epoch": start_epoch,
            "start": f"epoch_{start_epoch:03d}.pt", "epochs": epochs, "lr": 2e-4, "batch_size": 256, "augment": "table1", "seed": 0,
            "before": splits(before), "splits": splits(after), "last": splits(last)}


def test_compare_pairs_by_run_folder(tmp_path, capsys):
    """Gains over ERM continued: 10 and 20 points, paired; over the start 30 and 10."""
    for run, numbers in (("wb0", (0.4, 0.6, 0.7)), ("wb1", (0.5, 0.4, 0.6))):
        before, erm, ours = numbers
        for name, content in (("erm", {"stage": "erm", "splits": {"test": {"acc_worst": 0.3, "acc_mean_train_mix": 0.9}}}), ("finetune-erm", results("erm", before, erm, erm)),
                              ("finetune-magnitude", results("contrastive", before, ours, 0.1)),
                              ("finetune-short", results("contrastive", before, ours, 0.1, epochs=10))):
            (tmp_path / run / name).mkdir(parents=True)
            write_json(tmp_path / run / name / "results.json", content)
    stage.compare([tmp_path / "wb0", tmp_path / "wb1"], tmp_path / "out" / "fig06.png")
    table = json.loads((tmp_path / "out" / "fig06.json").read_text())["waterbirds, resnet50"]
    assert table["finetune-magnitude"]["worst"] == pytest.approx([70, 60])
    assert table["finetune-magnitude"]["from_erm"] == pytest.approx([10, 20])
    assert table["finetune-magnitude"]["from_before"] == pytest.approx([30, 10])
    assert table["before: epoch_040.pt"]["worst"] == pytest.approx([40, 50]) and table["finetune-short"]["from_erm"] == []
    out = capsys.readouterr().out
    assert "65.0 +- 7.1 (2)" in out and "15.0 +- 7.1 (2)" in out and "20.0 +- 14.1 (2)" in out and "10.0 +- 0.0 (2)" in out
    with Image.open(tmp_path / "out" / "fig06.png") as image:
        assert min(image.size) > 200 and np.asarray(image.convert("L")).std() > 5


    stage.compare([tmp_path / run / "finetune-magnitude" for run in ("wb0", "wb1")], tmp_path / "out" / "fig06.png")
    table = json.loads((tmp_path / "out" / "fig06.json").read_text())["waterbirds, resnet50"]  # the control is found all the same
    assert list(table) == ["ERM, selected epoch", "before: epoch_040.pt", "finetune-magnitude"]
    assert table["finetune-magnitude"]["from_erm"] == pytest.approx([10, 20])


def test_compare_without_runs(tmp_path):
    with pytest.raises(BadInput, match="no finished fine-tuning run"):
        stage.compare([tmp_path], tmp_path / "fig06.png")
    with pytest.raises(BadInput, match="ends in .png, .pdf or .svg"):
        stage.compare([tmp_path], tmp_path / "fig06.doc")


# ---- the script ----

@pytest.fixture(scope="module")
def erm_run(tmp_path_factory):
    """A Waterbirds-like folder and a run of stage 1 on it, epochs 1 and 2 kept."""
    folder = tmp_path_factory.mktemp("finetune")
    write_waterbirds(folder / "data")
    run_script("train_erm.py", "--data", folder / "data", "--run", folder / "run", "--cache", folder / "cache", "--arch", "resnet10",
               "--weights", "none", "--size", "32", "--epochs", "2", "--batch-size", "16", "--keep-epochs", "1", "2", "--seed", "3")
    return folder


def flags_for(folder, *flags):
    return ["finetune_contrastive.py", "--run", folder / "run", "--cache", folder / "cache", "--device", "cpu", *flags]


def finetune(folder, *flags):
    return run_script(*flags_for(folder, *flags))


def finetune_here(monkeypatch, folder, *flags):
    """The same in this process, which saves the seconds that a start takes."""
    monkeypatch.setattr(sys, "argv", list(map(str, flags_for(folder, *flags))))
    stage.main()


def test_a_run_and_its_resumption(erm_run):
    """Two epochs at once give what one epoch and one resumed epoch give; 32 images in batches of 31 leave one over."""
    flags = ("--criterion", "mixed", "--prune-fraction", "0.01", "--batch-size", "31")
    out = finetune(erm_run, "--name", "whole", "--epochs", "2", *flags).stdout
    assert "before (best.pt, epoch" in out and "selection: validation worst-group accuracy" in out
    whole = erm_run / "run" / "whole"
    assert {f.name for f in whole.iterdir()} == {"args.json", "log.jsonl", "pruned.csv", "best.pt", "last.pt", "results.json", "curves.png", "groups.png"}
    log = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in log] == [0, 1, 2]
    rows = list(csv.DictReader(open(whole / "pruned.csv")))
    for row in log[1:]:
        now, before = ({(r["layer"], r["index"]) for r in rows if int(r["epoch"]) == row["epoch"] - back} for back in (0, 1))
        assert row["pruned"] == len(now) > 0 and row["pruned_before"] == len(now & before)
        assert row["loss"] == pytest.approx(row["contrast"] + row["supervised"]) and row["contrast"] > 0 and row["supervised"] > 0
    saved = json.loads((whole / "args.json").read_text())["args"]
    assert saved["seed"] == 3 and saved["batch_size"] == 31 and saved["augment"] == "table1" and saved["checkpoint"].endswith("best.pt")
    results = json.loads((whole / "results.json").read_text())
    best = max(log[1:], key=lambda row: (row["val"]["acc_worst"], -row["epoch"]))
    assert results["selected_epoch"] == best["epoch"] and results["splits"]["val"] == best["val"] and results["before"]["val"] == log[0]["val"]
    assert load_checkpoint(whole / "best.pt")["epoch"] == best["epoch"]
    for name in ("curves.png", "groups.png"):
        with Image.open(whole / name) as image:
            assert min(image.size) > 200 and np.asarray(image.convert("L")).std() > 5

    finetune(erm_run, "--name", "parts", *flags, "--epochs", "1")
    parts = erm_run / "run" / "parts"
    with open(parts / "pruned.csv", "a") as file:  # cut off in the middle of epoch 2
        file.write("2,magnitude,conv1,0,1.5\r\n2,magn")
    finetune(erm_run, "--name", "parts", *flags, "--epochs", "2", "--resume")
    assert (parts / "results.json").read_text() == (whole / "results.json").read_text()
    assert (parts / "pruned.csv").read_text() == (whole / "pruned.csv").read_text()
    assert "is finished" in finetune(erm_run, "--name", "parts", *flags, "--epochs", "2").stdout


@pytest.mark.parametrize("flags", [
    ("--method", "erm"), ("--method", "supervised", "--loss", "ce"), ("--features", "projection", "--criterion", "none"),
    ("--features", "logits", "--views", "one", "--aux-bn", "frozen", "--criterion", "random"),
    ("--criterion", "gradient", "--gradient-source", "minority", "--unit", "weight", "--aux-bn", "shared", "--order", "smallest")])
def test_every_arm_runs(erm_run, flags, monkeypatch):
    finetune_here(monkeypatch, erm_run, "--name", "arm", "--overwrite", "--epochs", "1", *flags)
    row = json.loads((erm_run / "run" / "arm" / "log.jsonl").read_text().splitlines()[1])
    assert (row["contrast"] > 0) == ("--method" not in flags) and (row["pruned"] > 0) == ("random" in flags or "gradient" in flags)
    assert (erm_run / "run" / "arm" / "pruned.csv").read_text().startswith("epoch,criterion,layer,index,score")


@pytest.mark.parametrize("aux_bn", ["own", "shared", "frozen"])
def test_what_a_step_is_given(erm_run, aux_bn, monkeypatch):
    """The masks of an epoch are zero where pruned.csv of that epoch says, for both criteria, and nowhere else."""
    seen, step = [], stage.step
    def spy(model, project, images, sizes, y, masks, buffers, *rest):
        names = {id(p): name for name, p in model.named_parameters()}
        layer_of = {names[id(weight)]: layer for layer, weight in prunable_layers(model).items()}
        zero = {(layer_of[name], i) for name, mask in masks.items() for i, row in enumerate(mask.flatten(1)) if not row.any()}
        seen.append((zero, set(buffers)))
        assert all(mask.dtype == torch.bool and mask.any() for mask in masks.values())
        return step(model, project, images, sizes, y, masks, buffers, *rest)
    monkeypatch.setattr(stage, "step", spy)
    finetune_here(monkeypatch, erm_run, "--name", "spied", "--overwrite", "--epochs", "2", "--criterion", "mixed",
                  "--prune-fraction", "0.002", "--aux-bn", aux_bn, "--batch-size", "32")
    rows = list(csv.DictReader(open(erm_run / "run" / "spied" / "pruned.csv")))
    for epoch, (zero, buffers) in enumerate(seen, 1):  # one batch an epoch
        assert zero == {(row["layer"], int(row["index"])) for row in rows if int(row["epoch"]) == epoch} and len(zero) >= 6
        assert ("bn1.running_mean" in buffers) == (aux_bn == "own")
    assert len(seen) == 2


def test_an_interrupted_run_goes_on(erm_run, monkeypatch):
    """Broken off in its third epoch, after the learning rate was halved, it ends as if it had not been."""
    flags = ("--epochs", "4", "--features", "projection", "--criterion", "gradient", "--lr", "0.01", "--batch-size", "16")
    finetune_here(monkeypatch, erm_run, "--name", "unbroken", *flags)
    calls, step = [], stage.step
    def breaks(*arguments):
        calls.append(1)
        if len(calls) == 5:  # two steps an epoch
            raise KeyboardInterrupt
        return step(*arguments)
    monkeypatch.setattr(stage, "step", breaks)
    with pytest.raises(KeyboardInterrupt):
        finetune_here(monkeypatch, erm_run, "--name", "broken", *flags)
    with pytest.raises(BadInput, match="interrupted"):
        finetune_here(monkeypatch, erm_run, "--name", "broken", *flags)
    finetune_here(monkeypatch, erm_run, "--name", "broken", "--resume", *flags)
    unbroken, broken = (erm_run / "run" / name for name in ("unbroken", "broken"))
    assert (broken / "results.json").read_text() == (unbroken / "results.json").read_text()
    states = [load_checkpoint(folder / "best.pt")["model"] for folder in (unbroken, broken)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_run_may_not_start_from_its_own_folder(erm_run, monkeypatch):
    finetune_here(monkeypatch, erm_run, "--name", "first", "--epochs", "1")
    with pytest.raises(BadInput, match="lies in the folder that this run is to fill"):
        finetune_here(monkeypatch, erm_run, "--name", "first", "--overwrite", "--checkpoint", erm_run / "run" / "first" / "best.pt")
    finetune_here(monkeypatch, erm_run, "--name", "second", "--epochs", "1", "--checkpoint", erm_run / "run" / "first" / "best.pt")


@pytest.mark.parametrize("views,drawn", [("one", 1), ("two", 2)])
def test_views(views, drawn, monkeypatch):
    calls, split = [], small_split()
    augment = stage.augment
    monkeypatch.setattr(stage, "augment", lambda *arguments: calls.append(1) or augment(*arguments))
    stage.step(network().train(), torch.nn.Softmax(1), split.images, split.original_sizes, split.y, {}, {}, arguments(views=views), 32)
    assert len(calls) == drawn


def test_kick_in_and_checkpoint(erm_run):
    args = argparse.Namespace(run=erm_run / "run", kick_in=None, checkpoint=None)
    assert stage.starting_point(args).name == "best.pt"  # the run kept no epoch 40
    assert stage.starting_point(argparse.Namespace(**{**vars(args), "kick_in": 1})).name == "epoch_001.pt"
    (erm_run / "run" / "erm" / "epoch_040.pt").touch()
    assert stage.starting_point(args).name == "epoch_040.pt"
    (erm_run / "run" / "erm" / "epoch_040.pt").unlink()
    assert stage.starting_point(argparse.Namespace(**{**vars(args), "checkpoint": "x.pt"})) == "x.pt"


@pytest.mark.parametrize("flags,words", [
    (("--kick-in", "7"), "--kick-in 7: .* it kept 1, 2"),
    (("--prune-fraction", "0"), "--prune-fraction 0.0: must lie between 0 and 1"),
    (("--prune-fraction", "1"), "--prune-fraction 1.0: must lie between 0 and 1"),
    (("--batch-size", "1"), "--batch-size 1: .* 2 or more"),
    (("--batch-size", "1", "--method", "erm"), "--batch-size 1: .* 2 or more"),
    (("--lam", "nan"), "--lam nan: must not be negative"),
    (("--name", "erm"), "--name 'erm': expected the name of a folder"),
    (("--name", ".."), "--name '..': expected the name of a folder"),
    (("--name", "../other"), "--name '../other': expected the name of a folder"),
    (("--name", ""), "--name '': expected the name of a folder"),
    (("--temperature", "0"), "--temperature .* positive"),
    (("--lam", "-1"), "--lam .* negative"),
    (("--checkpoint", "missing.pt"), "missing.pt: no such checkpoint"),
    (("--data", "nowhere"), "nowhere: no such file"),
    (("--lr", "1e30"), "diverged in epoch 1"),
])
def test_bad_input(erm_run, flags, words, monkeypatch):
    with pytest.raises(BadInput, match=words):
        finetune_here(monkeypatch, erm_run, "--name", "bad", "--epochs", "1", *flags)
    assert (erm_run / "run" / "erm" / "best.pt").exists() and not (erm_run / "run" / "bad" / "results.json").exists() and (flags[0] == "--lr" or not (erm_run / "run" / "bad").exists())


def test_a_run_without_erm(tmp_path):
    assert_refused(run_script("finetune_contrastive.py", "--run", tmp_path / "none", check=False), "no such checkpoint", "train_erm.py")
    assert_refused(run_script("finetune_contrastive.py", "--compare", tmp_path, check=False), "no finished fine-tuning run")


def test_minority_source_needs_a_minority(tmp_path, monkeypatch):
    write_waterbirds(tmp_path / "data", ((8, 8, 8, 8), (4, 4, 4, 4), (4, 4, 4, 4)))
    run_script("train_erm.py", "--data", tmp_path / "data", "--run", tmp_path / "run", "--cache", tmp_path / "cache", "--arch", "resnet10",
               "--weights", "none", "--size", "32", "--epochs", "1")
    with pytest.raises(BadInput, match="--gradient-source minority: no group"):
        finetune_here(monkeypatch, tmp_path, "--gradient-source", "minority", "--criterion", "gradient")
