"""finetune_contrastive.py: losses by hand, tied branches against two models, masks, whole runs."""

import argparse
import copy
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import TensorDataset

import common
import finetune_contrastive as stage

from .test_train_erm import content

DEFAULTS = vars(stage.parse_args([]))
DEFAULTS |= {"batch_size": 64, "seed": 0, "unit": "channel", "minority": [1], "erm_head": "linear"}
NEURONS = {"test_resnet": ("channel", [("conv1.0", 3), ("layer3.0.downsample.1", 7)])}
NEURONS |= {"test_efficientnet": ("channel", [("conv_stem", 1)])}
NEURONS |= {"test_vit": ("weight", [("blocks.0.attn.qkv", i) for i in range(11, 12_000)])}
ARMS = ["--method erm", "--method supervised --loss ce", "--features projection --criterion none"]
ARMS += ["--features logits --views one --criterion random --lam-reduction mean"]
ARMS += ["--criterion gradient --gradient-source minority --unit weight --aux-bn shared"]


def arguments(**changed):
    return argparse.Namespace(**{**DEFAULTS, **changed})


def zeroed(model, neurons, unit="channel"):
    """A copy that really is pruned."""
    model = copy.deepcopy(model)
    for layer, i in neurons:
        weight = model.get_submodule(layer).weight.data
        (weight if unit == "channel" else weight.view(-1))[i] = 0
    return model


def test_nt_xent_and_the_other_losses_by_hand():
    """Two images, features alike within one and at right angles between them: each anchor sees one
    1 and two 0. Softmax of (ln 3, 0) is (3/4, 1/4): 1/8 off (1, 0) and 9/8 off (0, 1)."""
    r = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    expected = pytest.approx(math.log((math.e**2 + 2) / math.e**2), abs=1e-6)
    assert stage.nt_xent(r, 2 * r, 0.5).item() == expected
    half = torch.rand(9, 2, 4, generator=torch.Generator().manual_seed(0)).bfloat16().unbind(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert stage.nt_xent(*half) == stage.nt_xent(*(r.float() for r in half))
    logits, y = torch.tensor([[math.log(3), 0.0]] * 2), torch.tensor([0, 1])
    entropy = -math.log(3 / 4) - math.log(1 / 4)
    again = math.log(1 + math.e**-0.5) + math.log(1 + math.e**0.5)  # of the softmax of that softmax
    cases = [({"method": "erm"}, entropy / 2)]
    cases += [({"method": "erm", "erm_head": "softmax"}, again / 2)]
    for loss, total in (("mse", 1 / 8 + 9 / 8), ("ce", entropy)):
        terms = {"method": "supervised", "loss": loss, "lam": 0.2}
        cases += [(terms, 0.2 * total), ({**terms, "lam_reduction": "mean"}, 0.2 * total / 2)]
    for changed, value in cases:
        args = arguments(**changed)
        (found,) = stage.losses(torch.nn.Identity(), logits, y, {}, {}, None, args).values()
        assert found.item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("arch", NEURONS)
@pytest.mark.parametrize("features,views", [("probs", 1), ("logits", 2), ("projection", 2)])
def test_terms_of_the_method(arch, features, views):
    """Eq. 2.3, in it 2.1 word by word, from the outputs of the network and of a pruned copy."""
    torch.manual_seed(0)
    model, (unit, neurons) = common.build_model(arch, 2, 32), NEURONS[arch]
    x, y = torch.randn(8, 2, 3, 32, 32, dtype=torch.float64), torch.arange(8) % 2
    project = stage.projection(model, features, 32).double()
    args = arguments(features=features, lam=0.7, temperature=0.3)
    masks = common.neuron_masks(model.double(), neurons, unit)
    found = stage.losses(model, x if views == 2 else x[:, 0], y, masks, {}, project, args)
    compared, contrast = [], 0.0
    for other, images in ((model, x[:, 0]), (zeroed(model, neurons, unit), x[:, views - 1])):
        last = other.forward_head(other.forward_features(images), pre_logits=True)
        outputs = other.get_classifier()(last)
        ways = {"probs": outputs.softmax(1), "logits": outputs, "projection": project(last)}
        compared += ways[features]
    for i, anchor in enumerate(compared):
        shares = [(F.cosine_similarity(anchor, f, 0) / 0.3).exp() for f in compared]
        contrast -= (shares[(i + 8) % 16] / (sum(shares) - shares[i])).log().item() / 16
    error = 0.7 * (F.one_hot(y) - model(x[:, 0]).softmax(1)).square().sum().item()
    assert [*found] == ["contrast", "supervised"]
    assert [term.item() for term in found.values()] == pytest.approx([contrast, error])
    assert len(compared[0]) == (128 if features == "projection" else 2)
    assert not any(module._forward_pre_hooks for module in model.modules())


def chosen(**changed):
    """A tenth of 40 filters, filter i of norm i + 1, from 600 images, group 1 the only minority;
    those of odd index are wrong, the higher the index the more. Model and images, too."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 40, 1, bias=False), torch.nn.AdaptiveAvgPool2d(1)]
    model = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(40, 2)).eval()
    filters = F.normalize(torch.randn(40, 3)) * torch.arange(1, 41)[:, None]
    model[0].weight.data = filters.view(40, 3, 1, 1)
    g = torch.repeat_interleave(torch.arange(4), torch.tensor([300, 100, 100, 100]))
    y, i = g // 2, torch.arange(600)
    split = TensorDataset(torch.rand(600, 3, 8, 8), y, g, i)
    split.y, split.g = y, g
    logits = F.one_hot(y ^ (i % 2)) * i[:, None] / 100
    args = arguments(prune_fraction=0.1, **changed)
    rows = stage.critical_neurons(model, split, logits, args, {"0": 40}, 1)
    return [(criterion, index) for criterion, _, index, _ in rows], model, split


@pytest.mark.parametrize("fraction,k", [(1e-4, 3), (2e-4, 6), (1e-3, 27), (0.01, 266), (0.1, 2656)])
def test_random_neurons(fraction, k):
    """So many of a ResNet-50's 26,560 channels, others for every epoch and seed."""
    drawn = []
    for seed, epoch in ((0, 1), (0, 1), (0, 2), (1, 1)):
        args = arguments(criterion="random", prune_fraction=fraction, seed=seed)
        rows = stage.critical_neurons(None, None, None, args, {"a": 26_551, "b": 9}, epoch)
        drawn.append({(layer, index) for _, layer, index, _ in rows})
    assert len(drawn[0]) == k and drawn[0] == drawn[1] and drawn[0] not in drawn[2:]


def test_largest_and_smallest():
    assert chosen()[0] == [("magnitude", i) for i in (39, 38, 37, 36)]
    assert chosen(order="smallest")[0] == [("magnitude", i) for i in (0, 1, 2, 3)]
    assert chosen(method="erm")[0] == chosen(method="supervised")[0] == []
    assert chosen(criterion="none")[0] == []


def test_gradient_is_that_of_the_worst_images(monkeypatch):
    """The 256 of highest loss, of which 128 are drawn, start at index 89."""
    seen, scores = [], common.gradient_scores

    def spy(model, batches, unit):
        seen.append(torch.cat([index for *_, index in batches]).tolist())
        return scores(model, batches, unit)

    monkeypatch.setattr(common, "gradient_scores", spy)
    both, model, split = chosen(criterion="mixed")
    x, y, *_ = split[seen[0]]
    assert len({*seen[0]}) == 128 and all(i % 2 == 1 and i >= 89 for i in seen[0])
    (v,) = torch.autograd.grad(F.cross_entropy(model(x), y), model[0].weight)
    order = [("gradient", i) for i in v.flatten(1).norm(dim=1).argsort(descending=True).tolist()]
    assert both == chosen()[0] + order[:4] == chosen()[0] + chosen(criterion="gradient")[0]
    assert chosen(criterion="gradient", order="smallest")[0] == order[:-5:-1]
    chosen(criterion="gradient", gradient_source="minority")
    assert {*seen[3]} == {*range(300, 400)} and seen[0] == seen[1] == seen[2]


@pytest.fixture
def run(erm_run, tmp_path, monkeypatch):
    """A copy of the run of stage 1, without the time that figures take."""
    shutil.copytree(erm_run / "run/erm", tmp_path / "erm")
    monkeypatch.setattr(common, "save_figure", lambda fig, path: path.touch())
    return tmp_path


def finetune(run, name, more=""):
    flags = f"--run {run} --name {name} --device cpu --workers 0 {more}"
    stage.main(stage.parse_args(flags.split()))
    return run / name


def pruned_of(folder, epoch):
    rows = [line.split(",") for line in (folder / "pruned.csv").read_text().splitlines()]
    return {(layer, int(i)) for number, _, layer, i, _ in rows if number == str(epoch)}


def test_a_run_and_its_extension(run, monkeypatch):
    """What it writes; and the same after one epoch and a kill in the middle of the second."""
    monkeypatch.undo()  # with its figures
    more = "--features projection --criterion mixed --prune-fraction 0.01 --batch-size 16 --lr 0.02"
    folder = finetune(run, "whole", f"--epochs 3 {more}")
    results, log, weights = content(folder)
    for epoch in (1, 2, 3):
        row, now = log[epoch], pruned_of(folder, epoch)
        assert row["epoch"] == epoch and row["pruned"] == len(now) >= 11
        assert row["pruned_before"] == len(now & pruned_of(folder, epoch - 1))
        assert row["loss"] == pytest.approx(sum(row["terms"].values()), abs=1e-6)
    selected = max((1, 2, 3), key=lambda epoch: log[epoch]["val"]["acc_worst"])  # the first one
    inherited = {"stage": "finetune", "start": "best.pt", "start_epoch": 2, "seed": 3}
    inherited |= {"batch_size": 16, "augment": "table1", "selected_epoch": selected}
    settings = common.read_json(folder / "args.json")["args"]
    assert {**settings, **results}.items() >= inherited.items()
    networks = {"before": (run / "erm/best.pt", 0), "splits": (folder / "best.pt", selected)}
    for key, (path, epoch) in {**networks, "last": (folder / "last.pt", 3)}.items():
        model, saved, table = common.reopen(path)
        images = {"test": common.make_loader(common.open_split(saved, table, "test"))}
        (test, _), row = common.evaluate(model, images, table.groups), log[epoch]
        assert results[key] == {"train": row["train"], "val": row["val"], **test}
    assert len(common.load_checkpoint(folder / "last.pt")["project"]) == 4
    for name in ("groups.png", "curves.png"):
        assert len(Image.open(folder / name).convert("L").getcolors(1 << 20)) > 20
    other = finetune(run, "other", f"--epochs 1 {more}")
    with open(other / "pruned.csv", "a") as file:
        file.write("2,magnitude,conv1.0,0,1.5\n2,magn")
    finetune(run, "other", f"--epochs 3 {more}")
    assert content(other) == (results, log, weights)
    assert (other / "pruned.csv").read_text() == (folder / "pruned.csv").read_text()


@pytest.mark.parametrize("more", ["", "--views one", "--aux-bn shared"])
def test_epochs_by_hand(run, more):
    """Two steps of Adam an epoch with the summed gradients of a network and a copy, in which the
    largest filters of when the epoch begins are pruned. One view: the first of two. BatchNorm's
    statistics move by the target's images alone or, shared, by both."""
    fixed = "--epochs 2 --batch-size 16 --augment crop-flip --lr 1e-2 --prune-fraction 0.01"
    folder = finetune(run, "hand", f"{fixed} {more}")
    model, start, table = common.reopen(run / "erm/best.pt")
    split = common.open_split(start, table, "train", "crop-flip", views=2, seed=3)
    optimizer = torch.optim.Adam(model.train().parameters(), lr=1e-2)
    results, log, _ = content(folder)
    for epoch in (1, 2):
        norms, total = {}, 0.0
        for key, value in model.state_dict().items():
            for i, weights in enumerate(value if value.dim() == 4 else ()):
                norms[key.removesuffix(".weight"), i] = weights.norm().item()
        neurons = sorted(norms, key=norms.get)[-11:]
        assert {*neurons} == pruned_of(folder, epoch)
        order = torch.Generator().manual_seed(common.seed_of(3, epoch))
        for images in torch.randperm(32, generator=order).view(2, 16).tolist():
            (x,) = common.on_device(model, torch.stack([split[epoch, i][0] for i in images]))
            optimizer.zero_grad()
            r = model(x[:, 0]).softmax(1)
            pruned = zeroed(model, neurons)
            r_p = pruned(x[:, 0 if "one" in more else 1]).softmax(1)
            loss = stage.nt_xent(r, r_p) + 0.2 * (r - F.one_hot(split.y[images])).square().sum()
            loss.backward()
            for layer, i in neurons:
                pruned.get_submodule(layer).weight.grad[i] = 0
            for p, q in zip(model.parameters(), pruned.parameters()):
                p.grad += q.grad
            for b, c in zip(model.buffers(), pruned.buffers() if "shared" in more else ()):
                b.copy_(c)
            optimizer.step()
            total += loss.item() / 2
        assert log[epoch]["loss"] == pytest.approx(total, rel=1e-4)
    for name, value in common.load_checkpoint(folder / "last.pt")["model"].items():
        assert torch.allclose(model.state_dict()[name], value, atol=1e-3), name
    assert results["selected_epoch"] == max((1, 2), key=lambda i: log[i]["val"]["acc_worst"])
    assert pruned_of(folder, 1) != pruned_of(folder, 2)


@pytest.mark.parametrize("more", ARMS)
def test_every_arm_runs(run, more):
    _, log, _ = content(finetune(run, "arm", f"--epochs 1 {more}"))
    assert ("contrast" in log[1]["terms"]) == ("--method" not in more)
    assert log[1]["pruned"] == (38 if "weight" in more else 1 if "random" in more else 0)


def test_the_same_command_and_others(run, capsys):
    finetune(run, "a", "--epochs 1")
    table = capsys.readouterr().out.partition("\n\n")[2]
    finetune(run, "a", "--epochs 1")
    assert table == capsys.readouterr().out.partition("\n\n")[2] + f"wrote {run}/a/\n"
    with pytest.raises(common.BadInput, match="lam 0.2, now 0.3"):
        finetune(run, "a", "--epochs 1 --lam 0.3")
    shutil.copy(run / "erm/epoch_003.pt", run / "erm/best.pt")  # ERM was run again
    with pytest.raises(common.BadInput, match="the start changed"):
        finetune(run, "a", "--epochs 2")
    with pytest.raises(common.BadInput, match="diverged in epoch 1; try an --lr below 1e"):
        finetune(run, "a", "--overwrite --lr 1e30")
    assert [path.name for path in (run / "a").iterdir()] == ["args.json"]


def test_where_it_starts(run):
    def start(more=""):
        return stage.starting_point(stage.parse_args(f"--run {run} {more}".split())).name

    assert start() == "best.pt" and start("--kick-in 3") == "epoch_003.pt"
    (run / "erm/epoch_001.pt").touch()  # of 4, as 40 of 100
    assert start() == "epoch_001.pt" and start("--checkpoint x.pt") == "x.pt"
    first = finetune(run, "first", "--epochs 1 --kick-in 2")
    assert content(first)[0]["start_epoch"] == 2
    with pytest.raises(common.BadInput, match="lies in the folder to be filled"):
        finetune(run, "first", f"--overwrite --checkpoint {first}/best.pt")
    finetune(run, "second", f"--epochs 1 --checkpoint {first}/best.pt")
    for name in ("results.json", "epoch_001.pt"):
        (run / "erm" / name).unlink()
    with pytest.raises(common.BadInput, match="erm is unfinished"):
        start()


IMPOSSIBLE = "--temperature 0,--epochs 0,--seed -1,--lr inf,--lam nan,--lam -1,--batch-size 1"
IMPOSSIBLE += ",--prune-fraction 0.0,--prune-fraction 1.0,--prune-fraction nan"
OTHERS = ("erm", "trace", "structured", "gradcam", "..", ".", "a/b", ".erm.new")
REFUSED = {flag: f"{flag}.*: .*(must|use)" for flag in IMPOSSIBLE.split(",")}
REFUSED |= {"--kick-in 7": "it kept 2, 3 ", **{f"--name {name}": "^2$" for name in OTHERS}}
REFUSED |= {"--checkpoint missing.pt": "missing.pt: no such file", "--data no": "no: no such file"}


@pytest.mark.parametrize("more,words", REFUSED.items())
def test_refused_settings(run, more, words):
    with pytest.raises((common.BadInput, SystemExit), match=words):
        finetune(run, "bad", more)
    assert [*run.iterdir()] == [run / "erm"]
