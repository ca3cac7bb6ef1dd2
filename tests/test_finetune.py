"""finetune_contrastive.py: losses against sums by hand, the tied branches against two models, which
neurons are masked, whole runs and their continuation."""

import argparse
import copy
import csv
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import TensorDataset

import common
import finetune_contrastive as stage
from common import BadInput

FILES = {"args.json", "log.jsonl", "pruned.csv", "best.pt", "last.pt", "results.json"}
FILES |= {"groups.png", "curves.png"}
DEFAULTS = vars(stage.parse_args([]))
DEFAULTS |= {"batch_size": 64, "seed": 0, "unit": "channel", "minority": [1], "erm_head": "linear"}
F64 = torch.float64


def arguments(**changed):
    return argparse.Namespace(**{**DEFAULTS, **changed})


def network(arch="test_resnet"):
    """With BatchNorm away from its start, where branches and masked channels give nothing."""
    torch.manual_seed(0)
    model = common.build_model(arch, 2, 32)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
            torch.nn.init.constant_(module.bias, 0.1)
    return model


def batch():
    """Two views of 24 random images, and their classes."""
    x = torch.randn(24, 2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=F64)
    return x, torch.arange(24) % 2


# ---- the losses ----


def nt_xent_by_sums(r, r_p, temperature):
    """Eq. 2.1 word by word, the mean over all anchors."""
    features, total = [*r, *r_p], 0.0
    for i, anchor in enumerate(features):
        similar = [F.cosine_similarity(anchor, f, 0).item() for f in features]
        shares = [math.exp(s / temperature) for s in similar]
        others = sum(shares) - shares[i]
        total -= math.log(shares[(i + len(r)) % len(features)] / others)
    return total / len(features)


@pytest.mark.parametrize("batch,temperature", [(2, 0.5), (5, 0.1), (7, 2.0)])
def test_nt_xent_is_eq_2_1_in_both_directions(batch, temperature):
    generator = torch.Generator().manual_seed(batch)
    r, r_p = torch.randn(2, batch, 3, generator=generator, dtype=F64).unbind()
    expected = pytest.approx(nt_xent_by_sums(r, r_p, temperature), abs=1e-12)
    assert stage.nt_xent(r, r_p, temperature).item() == expected
    assert stage.nt_xent(r_p, r, temperature).item() == expected


def test_losses_by_hand():
    """Two images, features alike within one and at right angles between them: each anchor sees one
    1 and two 0. Softmax of (ln 3, 0) is (3/4, 1/4): 1/8 off (1, 0) and 9/8 off (0, 1)."""
    r = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    expected = math.log((math.e**2 + 2) / math.e**2)
    assert stage.nt_xent(r, 2 * r, 0.5).item() == pytest.approx(expected, abs=1e-6)
    logits, y = torch.tensor([[math.log(3), 0.0]] * 2), torch.tensor([0, 1])
    entropy = -math.log(3 / 4) - math.log(1 / 4)
    for loss, total in (("mse", 1 / 8 + 9 / 8), ("ce", entropy)):
        for reduction, value in (("sum", total), ("mean", total / 2)):
            found = stage.supervised_loss(logits, y, loss, reduction).item()
            assert found == pytest.approx(value, abs=1e-6)


def zeroed(model, neurons, unit="channel"):
    """A copy that really is pruned."""
    model = copy.deepcopy(model)
    for layer, i in neurons:
        weight = model.get_submodule(layer).weight.data
        (weight if unit == "channel" else weight.view(-1))[i] = 0
    return model


NEURONS = [("conv1.0", 3), ("layer3.0.conv1", 7)]


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("features", ["probs", "logits", "projection"])
def test_terms_of_the_method(features, views):
    """Eq. 2.3 from the outputs of the network and of a pruned copy."""
    model, (x, y) = network().eval(), batch()
    project = stage.projection(model, features, 32).double()
    pruned, given = zeroed(model.double(), NEURONS), x if views == 2 else x[:, 0]
    args, masks = arguments(features=features, lam=0.7), common.neuron_masks(model, NEURONS)
    found = stage.losses(model, given, y, masks, {}, project, args)
    compared, logits = [], model(x[:, 0])
    for network_, images in ((model, x[:, 0]), (pruned, x[:, views - 1])):
        outputs = network_(images)
        if features == "projection":
            last = network_.forward_features(images)
            outputs = project(network_.forward_head(last, pre_logits=True))
        compared.append(outputs.softmax(1) if features == "probs" else outputs)
    error = 0.7 * (F.one_hot(y) - logits.softmax(1)).square().sum()
    assert list(found) == ["contrast", "supervised"] and compared[1].shape[1] in (2, 128)
    assert found["contrast"].item() == pytest.approx(nt_xent_by_sums(*compared, 0.5))
    assert found["supervised"].item() == pytest.approx(error.item())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_terms_of_the_controls():
    model, (x, y) = network().double().eval(), batch()
    logits = model(x[:, 0])
    cases = {"erm": F.cross_entropy(logits, y), "softmax": F.cross_entropy(logits.softmax(1), y)}
    cases["supervised"] = 0.2 * F.cross_entropy(logits, y, reduction="sum")
    for case, expected in cases.items():
        method = "supervised" if case == "supervised" else "erm"
        args = arguments(method=method, loss="ce", erm_head=case)
        found = stage.losses(model, x[:, 0], y, {}, {}, None, args)
        (name,) = found
        assert name == ("supervised" if case == "supervised" else "cross entropy")
        assert found[name].item() == pytest.approx(expected.item())


# ---- the two branches ----


@pytest.mark.parametrize("aux_bn", ["own", "shared"])
def test_gradients_meet_in_shared_weights(aux_bn):
    """A step against two explicit models: the gradients add up, the pruned one's where not masked.
    BatchNorm's statistics move by the target's images alone or, shared, by both."""
    model, (x, y) = network().double().train(), batch()
    masks, args = common.neuron_masks(model, NEURONS), arguments()
    buffers = {name: b.clone() for name, b in model.named_buffers()} if aux_bn == "own" else {}
    target = copy.deepcopy(model)
    sum(stage.losses(model, x, y, masks, buffers, torch.nn.Softmax(1), args).values()).backward()
    r = target(x[:, 0]).softmax(1)
    pruned = zeroed(target, NEURONS)
    r_p = pruned(x[:, 1]).softmax(1)
    (stage.nt_xent(r, r_p, 0.5) + 0.2 * (r - F.one_hot(y)).square().sum()).backward()
    for layer, i in NEURONS:
        gradient = pruned.get_submodule(layer).weight.grad
        assert gradient[i].any()
        gradient[i] = 0
    for (name, p), a, b in zip(model.named_parameters(), target.parameters(), pruned.parameters()):
        assert torch.allclose(p.grad, a.grad + b.grad, rtol=1e-8, atol=1e-12), name
    expected = target if aux_bn == "own" else pruned
    for (name, moved), statistic in zip(model.named_buffers(), expected.buffers()):
        assert torch.allclose(moved, statistic, rtol=1e-12), name


@pytest.mark.parametrize(
    "arch,unit,neurons",
    [
        ("resnet10", "channel", [("conv1", 0), ("layer4.0.conv2", 9)]),
        ("test_efficientnet", "channel", [("conv_stem", 1)]),
        ("test_vit", "weight", [("blocks.0.attn.qkv", 11), ("blocks.3.mlp.fc1", 12_000)]),
    ],
)
def test_auxiliary_is_the_pruned_network(arch, unit, neurons):
    model, x = network(arch).eval(), torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        found = stage.auxiliary(model, x, common.neuron_masks(model, neurons, unit), {})
        assert torch.equal(found, zeroed(model, neurons, unit)(x))
        assert not torch.equal(found, model(x))


# ---- which neurons, from which images ----


def planted(counts=(9, 4, 3, 8)):
    """One convolution of 40 filters, filter i of norm i + 1, and images for it."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 40, 1, bias=False), torch.nn.AdaptiveAvgPool2d(1)]
    model = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(40, 2)).eval()
    direction = torch.eye(3)[torch.arange(40) % 3].view(40, 3, 1, 1)
    model[0].weight.data = torch.arange(1.0, 41).view(40, 1, 1, 1) * direction
    g = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(len(g), 3, 8, 8, generator=generator)
    split = TensorDataset(x, g // 2, g, torch.arange(len(g)))
    split.y, split.g = g // 2, g
    return model, split


RESNET50 = 26_560  # channels
FRACTIONS = [(RESNET50, 1e-4, 3), (RESNET50, 2e-4, 6), (RESNET50, 1e-3, 27), (40, 1e-4, 1)]
FRACTIONS += [(RESNET50, 0.01, 266), (RESNET50, 0.1, 2656), (40, 0.1, 4)]


def chosen(logits=None, counts=(9, 4, 3, 8), epoch=1, **changed):
    model, split = planted(counts)
    logits = torch.zeros(len(split), 2) if logits is None else logits
    args = arguments(**{"prune_fraction": 0.1, **changed})
    rows = stage.critical_neurons(model, split, logits, args, {"0": 40}, epoch)
    return [(criterion, index) for criterion, _, index, _ in rows]


@pytest.mark.parametrize("total,fraction,k", FRACTIONS)
def test_fractions_and_random_neurons(total, fraction, k):
    def draw(seed, epoch):
        args = arguments(criterion="random", prune_fraction=fraction, seed=seed)
        rows = stage.critical_neurons(None, None, None, args, {"a": total - 9, "b": 9}, epoch)
        return {(layer, index) for _, layer, index, _ in rows}

    assert len(draw(0, 1)) == k and draw(0, 1) == draw(0, 1)
    assert total == 40 or (draw(0, 1) != draw(0, 2) and draw(0, 1) != draw(1, 1))


def test_largest_and_smallest():
    assert chosen() == [("magnitude", i) for i in (39, 38, 37, 36)]
    assert chosen(order="smallest") == [("magnitude", i) for i in (0, 1, 2, 3)]
    assert chosen(criterion="none") == chosen(method="erm") == chosen(method="supervised") == []


def test_gradient_is_that_of_the_worst_images(monkeypatch):
    """Of 600 images, the 300 of odd index are wrong, the higher the index the more: the 256 of
    highest loss start at index 89, of which 128 are drawn."""
    counts = (300, 100, 100, 100)  # of which group 1 is the only minority
    _, split = planted(counts)
    logits, odd = torch.zeros(600, 2), torch.arange(600) % 2 == 1
    logits[torch.arange(600), torch.where(odd, 1 - split.y, split.y)] = torch.arange(600) / 100
    seen, scores = [], common.gradient_scores

    def spy(model, batches, unit):
        seen.append(batches.dataset.indices)
        return scores(model, batches, unit)

    monkeypatch.setattr(common, "gradient_scores", spy)
    both = chosen(logits, counts, criterion="mixed")
    largest = chosen(logits, counts, criterion="gradient")
    smallest = chosen(logits, counts, criterion="gradient", order="smallest")
    assert both == chosen(logits, counts) + largest and len(both) == 8
    assert not {*largest} & {*smallest} and seen[0] == seen[1] == seen[2]
    assert len({*seen[0]}) == 128 and all(i % 2 == 1 and i >= 89 for i in seen[0])
    model, x = planted(counts)[0], split.tensors[0]
    loss = F.cross_entropy(model(x[seen[0]]), split.y[seen[0]])
    (v,) = torch.autograd.grad(loss, model[0].weight)
    order = v.flatten(1).norm(dim=1).argsort(descending=True).tolist()
    assert [i for _, i in largest] == order[:4] and [i for _, i in smallest] == order[:-5:-1]
    chosen(logits, counts, criterion="gradient", gradient_source="minority")
    assert {*seen[3]} == {*range(300, 400)}


# ---- how firmly validation chose ----


def test_selection_spread():
    """Epochs right on 100 and 50 % of 50 and 20 images, on all, and on all but later."""
    g = torch.repeat_interleave(torch.arange(2), torch.tensor([50, 20]))
    right = torch.ones(3, 70, dtype=torch.bool)
    right[0, 60:] = False
    expected = {"acc_worst_sd": 0.0, "chosen": {2: 1.0}}
    assert stage.selection_spread(right, g, 2, 0) == expected
    right[1, 60:], right[2, 65:] = False, False  # 50 and 75 %: sqrt(p (1 - p) / n)
    assert stage.selection_spread(right, g, 3, 0)["chosen"][3] > 0.9
    for epoch, accuracy in ((2, 0.5), (3, 0.75)):
        sd = stage.selection_spread(right, g, epoch, 0)["acc_worst_sd"]
        assert sd == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 20), rel=0.1)


# ---- whole runs ----


@pytest.fixture
def run(erm_run, tmp_path, monkeypatch):
    """A copy of the run of stage 1, without the time that figures take."""
    shutil.copytree(erm_run / "run/erm", tmp_path / "erm")
    monkeypatch.setattr(common, "save_figure", lambda fig, path: path.touch())
    return tmp_path


def finetune(run, name, more=""):
    flags = ["--run", str(run), "--name", name, "--device", "cpu", "--workers", "0"]
    stage.main(stage.parse_args([*flags, *more.split()]))
    return run / name


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def log_of(folder):
    """log.jsonl, which says what last.pt says, without what depends on the clock."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert rows == common.load_checkpoint(folder / "last.pt")["log"]
    return [{**row, "seconds": 0} for row in rows]


def pruned_of(folder, epoch):
    with open(folder / "pruned.csv") as file:
        rows = [row for row in csv.DictReader(file) if int(row["epoch"]) == epoch]
    return {(row["layer"], int(row["index"])) for row in rows}


def assert_same(one, two):
    assert {path.name for path in one.iterdir()} == FILES
    assert results_of(one) == results_of(two) and log_of(one) == log_of(two)
    assert (one / "pruned.csv").read_text() == (two / "pruned.csv").read_text()
    for name in ("best.pt", "last.pt"):
        a, b = (common.load_checkpoint(folder / name)["model"] for folder in (one, two))
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_run(run, monkeypatch):
    monkeypatch.undo()  # with its figures
    folder = finetune(
        run, "a", "--criterion mixed --prune-fraction 0.01 --batch-size 31 --epochs 3"
    )
    log, results = log_of(folder), results_of(folder)
    assert {path.name for path in folder.iterdir()} == FILES and len(log) == 4
    for epoch in (1, 2, 3):
        row, now = log[epoch], pruned_of(folder, epoch)
        assert row["epoch"] == epoch and row["pruned"] == len(now) >= 11
        assert row["pruned_before"] == len(now & pruned_of(folder, epoch - 1))
        assert list(row["terms"]) == ["contrast", "supervised"]
        assert row["loss"] == pytest.approx(sum(row["terms"].values()), abs=1e-6)
    scores = [row["val"]["acc_worst"] for row in log[1:]]
    selected = 1 + scores.index(max(scores))
    assert (
        results["selected_epoch"] == common.load_checkpoint(folder / "best.pt")["epoch"] == selected
    )
    for key, epoch in (("before", 0), ("splits", selected), ("last", 3)):
        assert [results[key][name] for name in ("train", "val")] == [
            log[epoch]["train"],
            log[epoch]["val"],
        ]
        assert [row["n"] for row in results[key]["test"]["groups"]] == [6, 5, 4, 5]
    inherited = {"stage": "finetune", "start": "best.pt", "start_epoch": 2, "seed": 3}
    assert results.items() >= {**inherited, "batch_size": 31, "augment": "table1"}.items()
    for name in ("curves.png", "groups.png"):
        with Image.open(folder / name) as image:
            assert min(image.size) > 200 and np.asarray(image.convert("L")).std() > 5


def test_an_epoch_is_that_of_two_models(run):
    """Two steps of Adam on two deep copies, one of them pruned, with the same summed gradients."""
    more = "--epochs 1 --batch-size 16 --augment crop-flip --lr 1e-4 --prune-fraction 0.003"
    folder = finetune(run, "hand", more)
    saved, neurons = common.load_checkpoint(folder / "last.pt"), sorted(pruned_of(folder, 1))
    model, start, table = common.reopen(run / "erm/best.pt")
    split = common.open_split(start, table, "train", "crop-flip", views=2, seed=3)
    optimizer, total = torch.optim.Adam(model.train().parameters(), lr=1e-4), 0.0
    order = torch.randperm(32, generator=torch.Generator().manual_seed(common.seed_of(3, 1)))
    for images in order.view(2, 16).tolist():
        x, y = torch.stack([split[1, i][0] for i in images]), split.y[images]
        pruned = zeroed(model, neurons)
        optimizer.zero_grad()
        r, r_p = model(x[:, 0]).softmax(1), pruned(x[:, 1]).softmax(1)
        loss = stage.nt_xent(r, r_p, 0.5) + 0.2 * (r - F.one_hot(y)).square().sum()
        loss.backward()
        for layer, i in neurons:
            pruned.get_submodule(layer).weight.grad[i] = 0
        for p, q in zip(model.parameters(), pruned.parameters()):
            p.grad += q.grad
        optimizer.step()
        total += loss.item() / 2
    assert len(neurons) == 4 and saved["log"][1]["loss"] == pytest.approx(total, rel=1e-4)
    for name, value in model.state_dict().items():
        close = torch.isclose(value, saved["model"][name], atol=2e-5)
        assert close.double().mean() > 0.999, name  # gradients near 0 have either sign


@pytest.mark.parametrize("more", ["", " --views one", " --aux-bn shared"])
def test_what_a_step_is_given(run, erm_run, monkeypatch, more):
    """Masks of an epoch: the largest filters of the network as it is when the epoch begins. Views:
    two of the same images, the first of them what a run with one view takes."""
    seen, losses = [], stage.losses

    def spy(model, x, y, masks, buffers, *rest):
        state, given = ({k: v.clone() for k, v in d.items()} for d in (model.state_dict(), buffers))
        seen.append((x, state, masks, given))
        return losses(model, x, y, masks, buffers, *rest)

    monkeypatch.setattr(stage, "losses", spy)
    fixed = "--epochs 2 --batch-size 32 --prune-fraction 0.01 --lr 0.05"
    folder = finetune(run, "spied", fixed + more)
    _, start, table = common.reopen(run / "erm/best.pt")
    split = common.open_split(start, table, "train", "table1", seed=3)
    for epoch, (x, state, masks, buffers) in enumerate(seen, 1):
        norms = []
        for key, value in state.items():
            if value.dim() == 4:
                norms += [(n, key, i) for i, n in enumerate(value.flatten(1).norm(dim=1))]
        largest = {(key, i) for _, key, i in sorted(norms)[-11:]}
        assert largest == {(f"{layer}.weight", i) for layer, i in pruned_of(folder, epoch)}
        for key, mask in masks.items():
            for i, row in enumerate(mask):
                assert not row.any() if (key, i) in largest else row.all()
        moving = {key for key in state if "running" in key or "tracked" in key}
        assert {*buffers} == (set() if "shared" in more else moving)
        assert all(torch.equal(value, state[key]) for key, value in buffers.items())
        order = torch.Generator().manual_seed(common.seed_of(3, epoch))
        order = torch.randperm(32, generator=order).tolist()
        first = torch.stack([split[epoch, i][0] for i in order])
        assert torch.equal(x if "one" in more else x[:, 0], first)
        assert "one" in more or not any(torch.equal(view[0], view[1]) for view in x)
    assert pruned_of(folder, 1) != pruned_of(folder, 2) and len(seen) == 2


ARMS = ["--method erm", "--method supervised --loss ce", "--features projection --criterion none"]
ARMS += ["--features logits --views one --criterion random --lam-reduction mean"]
ARMS += ["--criterion gradient --gradient-source minority --unit weight --aux-bn shared"]


@pytest.mark.parametrize("more", ARMS)
def test_every_arm_runs(run, more):
    folder = finetune(run, "arm", f"--epochs 1 {more}")
    row = log_of(folder)[1]
    assert ("contrast" in row["terms"]) == ("--method" not in more)
    assert row["pruned"] == (38 if "weight" in more else 1 if "random" in more else 0)
    assert results_of(folder)["method"] in ("contrastive", *more.split())


def test_interrupted_runs_continue(run, monkeypatch):
    """Broken off in the middle of the second epoch of three, and extended from one."""
    more = "--features projection --criterion mixed --prune-fraction 0.01 --batch-size 16 --lr 0.01"
    whole, calls, losses = finetune(run, "whole", f"--epochs 3 {more}"), [], stage.losses

    def breaks(*given):
        calls.append(1)
        return losses(*given) if len(calls) < 4 else 1 / 0

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(stage, "losses", breaks)
        finetune(run, "broken", f"--epochs 3 {more}")
    finetune(run, "extended", f"--epochs 1 {more}")
    for name in ("broken", "extended"):
        with open(run / name / "pruned.csv", "a") as file:
            file.write("2,magnitude,conv1.0,0,1.5\n2,magn")  # written before a kill
        assert_same(finetune(run, name, f"--epochs 3 {more}"), whole)


def test_the_same_command_and_others(run, capsys):
    finetune(run, "a", "--epochs 1")
    table = capsys.readouterr().out.partition("\n\n")[2]
    finetune(run, "a", "--epochs 1")
    assert table == capsys.readouterr().out.partition("\n\n")[2] + f"wrote {run}/a/\n"
    for more, words in (("--lam 0.3", "lam 0.2, now 0.3"), ("--criterion mixed", "now mixed")):
        with pytest.raises(BadInput, match=words):
            finetune(run, "a", f"--epochs 1 {more}")
    shutil.copy(run / "erm/epoch_001.pt", run / "erm/best.pt")  # ERM was run again
    with pytest.raises(BadInput, match="the start changed"):
        finetune(run, "a", "--epochs 2")
    assert results_of(finetune(run, "a", "--epochs 1 --lam 0.3 --overwrite"))["lam"] == 0.3


def test_where_it_starts(run):
    def start(*more):
        args = stage.parse_args(["--run", str(run), *more])
        return str(stage.starting_point(args)).removeprefix(f"{run}/erm/")

    assert start() == "best.pt" and start("--kick-in", "1") == "epoch_001.pt"
    (run / "erm/epoch_040.pt").touch()
    assert start() == "epoch_040.pt" and start("--checkpoint", "x.pt") == "x.pt"
    first = finetune(run, "first", "--epochs 1 --kick-in 2")
    assert results_of(first)["start_epoch"] == 2
    with pytest.raises(BadInput, match="lies in the folder to be filled; choose another --name"):
        finetune(run, "first", f"--overwrite --checkpoint {first}/best.pt")
    finetune(run, "second", f"--epochs 1 --checkpoint {first}/best.pt")


REFUSED = {"--kick-in 7": "--kick-in 7: .* did not keep that epoch; it kept 1, 2 "}
REFUSED |= {"--lam nan": "--lam nan: must not be", "--lam -1": "--lam -1.0: must not be negative"}
REFUSED |= {"--temperature 0": "--temperature 0.0: must be", "--epochs 0": "--epochs 0: must be"}
REFUSED |= {"--seed -1": "--seed -1: must be", "--lr inf": "--lr inf: must be positive"}
REFUSED |= {"--batch-size 1": "use 2 or more", "--batch-size 1 --method erm": "use 2 or more"}
REFUSED |= {"--checkpoint missing.pt": "missing.pt: no such file", "--data no": "no: no such file"}
REFUSED |= {f"--prune-fraction {f}": f"{f}: must lie between 0 and 1" for f in (0.0, 1.0, "nan")}


@pytest.mark.parametrize("more,words", REFUSED.items())
def test_refused_settings(run, more, words):
    with pytest.raises(BadInput, match=words):
        finetune(run, "bad", more)
    assert [*run.iterdir()] == [run / "erm"]


@pytest.mark.parametrize("name", ["erm", "trace", "structured", "gradcam", "..", ".", "", "a/b"])
def test_refused_names(name, capsys):
    with pytest.raises(SystemExit, match="2"):
        stage.parse_args(["--name", name])
    assert f"--name {name!r}: expected the name of a folder" in capsys.readouterr().err


def test_refused_folders_data_and_divergence(run):
    (run / "notes").mkdir()
    (run / "notes/a.txt").write_text("mine")
    for more in ("", "--overwrite"):
        with pytest.raises(BadInput, match="notes/a.txt is not of this stage"):
            finetune(run, "notes", more)
    assert (run / "notes/a.txt").read_text() == "mine"
    with pytest.raises(BadInput, match="diverged in epoch 1; try an --lr below 1e"):
        finetune(run, "far", "--lr 1e30")
    args = stage.parse_args(["--gradient-source", "minority", "--checkpoint", "x.pt"])
    start = {"args": {"batch_size": 8, "augment": "none", "seed": 0, "head": "linear"}}
    table = argparse.Namespace(source="x", groups=[{"group": 0, "minority": False}])
    with pytest.raises(BadInput, match="--gradient-source minority: no group of these data is one"):
        stage.resolve(args, start, table)
