"""finetune_contrastive.py: losses by hand, tied branches against two models, masks, whole runs."""

import argparse
import copy
import csv
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import TensorDataset

import common
import finetune_contrastive as stage

from .test_train_erm import as_script, content, report_on_test, without_figures

MASKED = {  # architecture: (unit, neurons)
    "test_resnet": ("channel", [("conv1.0.weight", 3), ("layer3.0.downsample.1.weight", 7)]),
    "test_efficientnet": ("channel", [("conv_stem.weight", 1)]),
    "test_vit": ("weight", [("blocks.0.attn.qkv.weight", i) for i in range(11, 12_000)]),
}


def arguments(**changed):
    """The arguments of stage 4 as they are after `resolve`, with these changed."""
    args = stage.parse_args(["--device", "cpu"])
    resolved = {"batch_size": 64, "seed": 0, "unit": "channel"}
    return argparse.Namespace(**{**vars(args), **resolved, **changed})


def zeroed(model, neurons, unit="channel"):
    """A copy of the model that really is pruned."""
    model = copy.deepcopy(model)
    for name, index in neurons:
        weight = model.get_parameter(name).data
        if unit == "channel":
            weight[index] = 0
        else:
            weight.view(-1)[index] = 0
    return model


# ---- the method ----


def test_nt_xent_by_hand():
    """Two images, whose features are alike within one and at right angles between them: each
    anchor sees one 1 and two 0. Under autocast, too, in full precision."""
    r = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    expected = math.log((math.e**2 + 2) / math.e**2)
    assert stage.nt_xent(r, 2 * r, 0.5).item() == pytest.approx(expected, abs=1e-6)
    generator = torch.Generator().manual_seed(0)
    r, r_p = torch.rand(2, 9, 4, generator=generator).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = stage.nt_xent(r, r_p)
    assert found == stage.nt_xent(r.float(), r_p.float())


@pytest.mark.parametrize(
    "changed,name,expected",
    [
        ({"method": "supervised"}, "supervised", 0.2 * (1 / 8 + 9 / 8)),
        ({"method": "supervised", "lam": 3.0}, "supervised", 3 * (1 / 8 + 9 / 8)),
        ({"method": "supervised", "loss": "ce"}, "supervised", 0.2 * math.log(16 / 3)),
        ({"method": "erm"}, "cross entropy", math.log(16 / 3) / 2),
        ({"method": "erm", "loss": "mse", "lam": 3.0}, "cross entropy", math.log(16 / 3) / 2),
    ],
)
def test_controls_by_hand(changed, name, expected):
    """Softmax of (ln 3, 0) is (3/4, 1/4): in squares 1/8 off class 0 and 9/8 off class 1; the cross
    entropies are -ln 3/4 and -ln 1/4, together ln 16/3."""
    logits = torch.tensor([[math.log(3), 0.0]] * 2)
    terms = stage.losses(
        torch.nn.Identity(), logits, torch.tensor([0, 1]), {}, arguments(**changed)
    )
    assert list(terms) == [name]
    assert terms[name].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("arch", MASKED)
def test_terms_of_the_method(arch, views):
    """Eq. 2.3, in it 2.1 word by word, from the outputs of the network and of a pruned copy."""
    torch.manual_seed(0)
    model = common.build_model(arch, 2, 32).double()
    unit, neurons = MASKED[arch]
    x = torch.randn(8, 2, 3, 32, 32, dtype=torch.float64)
    y = torch.arange(8) % 2
    masks = common.neuron_masks(common.prunable_weights(model), neurons, unit)
    args = arguments(lam=0.7, temperature=0.3)
    terms = stage.losses(model, x if views == 2 else x[:, 0], y, masks, args)

    r = model(x[:, 0]).softmax(1)
    r_p = zeroed(model, neurons, unit)(x[:, views - 1]).softmax(1)
    features = [*r, *r_p]
    contrast = 0.0
    for i, anchor in enumerate(features):
        shares = [(F.cosine_similarity(anchor, f, 0) / 0.3).exp().item() for f in features]
        contrast -= math.log(shares[(i + 8) % 16] / (sum(shares) - shares[i])) / 16
    error = 0.7 * (F.one_hot(y) - r).square().sum().item()
    assert list(terms) == ["contrast", "supervised"]
    assert terms["contrast"].item() == pytest.approx(contrast)
    assert terms["supervised"].item() == pytest.approx(error)
    assert not torch.equal(r_p, model(x[:, views - 1]).softmax(1))


def test_statistics_are_those_of_the_target_alone():
    """In training mode the auxiliary branch normalises by its own batch and moves no running
    statistic; the target's pass moves them by the target's images, as if it were alone."""
    torch.manual_seed(0)
    model = common.build_model("test_resnet", 2, 32).train()
    alone = copy.deepcopy(model)
    x = torch.randn(8, 2, 3, 32, 32)
    neurons = [("conv1.0.weight", 3), ("layer4.0.conv1.weight", 5)]
    masks = common.neuron_masks(common.prunable_weights(model), neurons)
    before = copy.deepcopy(model.state_dict())
    logits = stage.auxiliary(model, x[:, 1], masks)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.allclose(logits, zeroed(model, neurons)(x[:, 1]), atol=1e-6)

    stage.losses(model, x, torch.arange(8) % 2, masks, arguments())
    alone(x[:, 0])
    moved = 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, alone.state_dict()[name]), name
        moved += not torch.equal(value, before[name])
    assert moved == 3 * sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())


def test_gradients_of_both_branches_meet_in_shared_weights():
    """The target's gradient plus the pruned copy's; of a masked weight the target's alone."""
    torch.manual_seed(0)
    model = common.build_model("test_resnet", 2, 32)
    model.conv1[1].bias.data.fill_(0.1)  # else what is masked would have no gradient anyway
    neurons = [("conv1.0.weight", 3)]
    masks = common.neuron_masks(common.prunable_weights(model), neurons)
    x = torch.randn(8, 2, 3, 32, 32)
    y = torch.arange(8) % 2
    sum(stage.losses(model, x, y, masks, arguments()).values()).backward()

    target = copy.deepcopy(model)
    target.zero_grad()
    pruned = zeroed(target, neurons)
    r = target(x[:, 0]).softmax(1)
    loss = stage.nt_xent(r, pruned(x[:, 1]).softmax(1))
    (loss + 0.2 * (r - F.one_hot(y)).square().sum()).backward()
    assert pruned.conv1[0].weight.grad[3].abs().sum() > 0
    pruned.conv1[0].weight.grad[3] = 0
    for name, p in model.named_parameters():
        expected = target.get_parameter(name).grad + pruned.get_parameter(name).grad
        assert torch.allclose(p.grad, expected, atol=1e-6), name


# ---- the neurons of an epoch ----


def chosen(**changed):
    """A tenth of 40 filters, filter i of norm i + 1, by 600 images, of which group 1 is the only
    minority; those of odd index are wrong, the higher the index the more. Returns what is masked as
    (criterion, index), the model and the images."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 40, 1, bias=False),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(40, 2),
    ).eval()
    filters = F.normalize(torch.randn(40, 3)) * torch.arange(1, 41)[:, None]
    model[0].weight.data = filters.view(40, 3, 1, 1)
    g = torch.repeat_interleave(torch.arange(4), torch.tensor([300, 100, 100, 100]))
    y = g // 2
    i = torch.arange(600)
    images = TensorDataset(torch.randint(0, 256, (600, 3, 8, 8), dtype=torch.uint8), y, g, i)
    images.y = y
    images.g = g
    images.mean = [0.0, 0.0, 0.0]
    images.std = [1.0, 1.0, 1.0]
    logits = F.one_hot(y ^ (i % 2)) * i[:, None] / 100
    args = arguments(**{"prune_fraction": 0.1, **changed})
    weights = common.prunable_weights(model)
    groups = [{"minority": group == 1} for group in range(4)]
    rows = stage.critical_neurons(model, weights, images, logits, groups, args, 1)
    assert {row["parameter"] for row in rows} <= {"0.weight"}
    return [(row["criterion"], row["index"]) for row in rows], model, images


@pytest.mark.parametrize("fraction,k", [(1e-4, 3), (2e-4, 6), (1e-3, 27), (0.01, 266), (0.1, 2656)])
def test_random_neurons(fraction, k):
    """So many of as many channels as a ResNet-50 has, others for every epoch and seed."""
    weights = {"a": torch.zeros(26_551, 1), "b": torch.zeros(9, 1)}
    drawn = []
    for seed, epoch in ((0, 1), (0, 1), (0, 2), (1, 1)):
        args = arguments(criterion="random", prune_fraction=fraction, seed=seed)
        rows = stage.critical_neurons(None, weights, None, None, [], args, epoch)
        drawn.append({(row["parameter"], row["index"]) for row in rows})
        assert all(index < len(weights[name]) for name, index in drawn[-1])
    assert len(drawn[0]) == k
    assert drawn[0] == drawn[1]
    assert drawn[0] not in drawn[2:]


def test_seven_hundredths_of_a_hundred_are_seven():
    """Though 0.07 * 100 is a hair above 7 in floating point."""
    weights = {"a": torch.zeros(100, 1)}
    args = arguments(criterion="random", prune_fraction=0.07)
    assert len(stage.critical_neurons(None, weights, None, None, [], args, 1)) == 7


@pytest.mark.parametrize("criterion", ["magnitude", "gradient", "mixed", "random", "none"])
@pytest.mark.parametrize("method", ["contrastive", "supervised", "erm"])
def test_settings_that_change_nothing(method, criterion):
    """Those that are refused change neither the mask nor a term of the loss; all others do."""

    def outcome(**changed):
        changed = {"method": method, "criterion": criterion, **changed}
        found, model, images = chosen(**changed)
        if method != "contrastive":
            found = []
        args = arguments(**changed)
        neurons = [("0.weight", index) for _, index in found]
        masks = common.neuron_masks(common.prunable_weights(model), neurons, args.unit)
        x, y, *_ = images[:8]
        return found, stage.losses(model, x / 255, y, masks, args)

    others = {
        "prune_fraction": 0.5,
        "order": "smallest",
        "unit": "weight",
        "temperature": 0.1,
        "loss": "ce",
        "lam": 3.0,
    }
    unused = stage.unused_settings(arguments(method=method, criterion=criterion))
    assert ("criterion" in unused) == ("views" in unused) == (method != "contrastive")
    takes_gradient = method == "contrastive" and criterion in ("gradient", "mixed")
    assert ("gradient_source" in unused) != takes_gradient
    for setting, value in others.items():
        same = outcome(**{setting: value}) == outcome()
        assert same == (setting in unused), setting


def test_largest_and_smallest():
    assert chosen()[0] == [("magnitude", i) for i in (39, 38, 37, 36)]
    assert chosen(order="smallest")[0] == [("magnitude", i) for i in (0, 1, 2, 3)]
    assert chosen(criterion="none")[0] == []


def test_gradient_is_that_of_the_worst_images(monkeypatch):
    """The 256 of highest loss, of which 128 are drawn, start at index 89. 'mixed' has both sets,
    and a minority that is the source is taken whole where it has fewer images."""
    mean_gradient = common.mean_gradient
    seen = []

    def spy(model, weights, batches):
        seen.append(torch.cat([index for *_, index in batches]).tolist())
        return mean_gradient(model, weights, batches)

    monkeypatch.setattr(common, "mean_gradient", spy)
    both, model, images = chosen(criterion="mixed")
    x, y, *_ = images[seen[0]]
    assert len(set(seen[0])) == 128
    assert all(i % 2 == 1 and i >= 89 for i in seen[0])
    (v,) = torch.autograd.grad(F.cross_entropy(model(x / 255), y), model[0].weight)
    ranked = v.flatten(1).norm(dim=1).argsort(descending=True).tolist()
    by_gradient = [("gradient", i) for i in ranked]
    assert both == chosen()[0] + by_gradient[:4]
    assert chosen(criterion="gradient")[0] == by_gradient[:4]
    assert chosen(criterion="gradient", order="smallest")[0] == by_gradient[:-5:-1]
    assert seen[0] == seen[1] == seen[2]
    chosen(criterion="gradient", gradient_source="minority")
    assert sorted(seen[3]) == list(range(300, 400))


def test_a_criterion_of_ones_own(monkeypatch):
    """One line in CRITERIA: the product of weight and gradient, not that of their norms."""
    monkeypatch.setitem(common.CRITERIA, "product", lambda z, v: z * v)
    kept = {}
    mean_gradient = common.mean_gradient

    def spy(*args):
        kept.update(mean_gradient(*args))
        return kept

    monkeypatch.setattr(common, "mean_gradient", spy)
    found, model, _ = chosen(criterion="product")
    product = model[0].weight * kept["0.weight"]
    ranked = product.flatten(1).norm(dim=1).argsort(descending=True)
    assert found == [("product", i) for i in ranked[:4].tolist()]
    assert stage.parse_args(["--criterion", "product"]).criterion == "product"


# ---- whole runs ----


@pytest.fixture
def run(erm_run, tmp_path, monkeypatch):
    """A copy of the run of stage 1, without the time that figures take."""
    shutil.copytree(erm_run / "run/erm", tmp_path / "erm")
    without_figures(monkeypatch)
    return tmp_path


def finetune(run, name, more=""):
    flags = f"--run {run} --name {name} --device cpu --workers 0 {more}"
    if "--kick-in" not in more and "--checkpoint" not in more:
        flags += f" --checkpoint {run}/erm/best.pt"
    stage.main(stage.parse_args(flags.split()))
    return run / name


def masked_of(folder, epoch):
    """What masked.csv says of an epoch: {(parameter name, index)}."""
    with open(folder / "masked.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["epoch"] == str(epoch)]
    return {(row["parameter"], int(row["index"])) for row in rows}


def test_a_run_and_its_extension(run, monkeypatch):
    """What it writes; and the same in two goes."""
    monkeypatch.undo()  # with its figures
    more = "--criterion mixed --prune-fraction 0.01 --batch-size 16 --lr 0.02"
    folder = finetune(run, "whole", f"--epochs 3 {more}")
    results, log, weights = content(folder)
    assert {path.name for path in folder.iterdir()} == {*stage.FILES, ".lock"}
    for epoch in (1, 2, 3):
        row = log[epoch]
        assert row["epoch"] == epoch
        assert 11 <= row["masked"] <= 22
        assert row["masked"] == len(masked_of(folder, epoch))
        assert row["loss"] == pytest.approx(sum(row["terms"].values()), abs=1e-6)
    worst = [row["val"]["acc_worst"] for row in log]
    selected = 1 + worst[1:].index(max(worst[1:]))  # the first of equals; not the start
    expected = {
        "stage": "finetune",
        "start": "best.pt",
        "start_epoch": common.load_checkpoint(run / "erm/best.pt")["epoch"],
        "method": "contrastive",
        "epochs": 3,
        "selected_epoch": selected,
    }
    assert {key: results[key] for key in expected} == expected
    settings = common.read_json(folder / "args.json")["args"]
    assert (settings["seed"], settings["batch_size"], settings["augment"]) == (3, 16, "table1")
    networks = {"before": (run / "erm/best.pt", 0), "splits": (folder / "best.pt", selected)}
    for key, (path, epoch) in networks.items():
        report, checkpoint = report_on_test(path)
        row = log[epoch]
        assert results[key] == {"train": row["train"], "val": row["val"], "test": report}
        assert checkpoint["erm"] == results["erm"]
    assert len(Image.open(folder / "curves.png").convert("L").getcolors(1 << 20)) > 20
    finetune(run, "other", f"--epochs 1 {more}")
    other = finetune(run, "other", f"--epochs 3 {more}")
    assert content(other) == (results, log, weights)
    assert (other / "masked.csv").read_text() == (folder / "masked.csv").read_text()


@pytest.mark.parametrize(
    "losses,rates",
    [
        ([1.0, 1.0, 1.0, 1.0], [0.01, 0.01, 0.01, 0.005]),
        ([4.0, 3.0, 2.0, 1.0], [0.01, 0.01, 0.01, 0.01]),
    ],
)
def test_learning_rate_is_halved_on_a_plateau_alone(run, monkeypatch, losses, rates):
    """Section 4.1: a factor of 0.5 after more than one epoch in which the loss does not fall."""
    of_epochs = iter(losses)
    monkeypatch.setattr(common, "finite_loss", lambda *args: next(of_epochs))
    folder = finetune(run, "plateau", "--method erm --epochs 4 --lr 0.01")
    assert [row["lr"] for row in content(folder)[1][1:]] == rates


def test_worst_images_are_those_of_the_network_as_it_is(run, monkeypatch):
    """At the start of every epoch, and not those of the start of the stage."""
    seen = []
    critical_neurons = stage.critical_neurons

    def spy(model, weights, images, logits, *others):
        with common.evaluating(model), torch.no_grad():
            expected = torch.cat([model(x) for x, *_ in common.Batches(images)])
        assert torch.allclose(logits, expected, atol=1e-4)
        seen.append(logits)
        return critical_neurons(model, weights, images, logits, *others)

    monkeypatch.setattr(stage, "critical_neurons", spy)
    finetune(run, "worst", "--epochs 2 --lr 0.01")
    assert len(seen) == 2
    assert not torch.allclose(*seen, atol=1e-2)


@pytest.mark.parametrize("views", ["two", "one"])
def test_epochs_by_hand(run, views):
    """Two steps of Adam an epoch with the summed gradients of a network and a copy, in which the
    largest filters of when the epoch begins are pruned. One view: the first of two. BatchNorm's
    statistics move by the target's images alone."""
    fixed = "--epochs 2 --batch-size 16 --augment crop-flip --lr 1e-2 --prune-fraction 0.01"
    folder = finetune(run, "hand", f"{fixed} --views {views}")
    model, start, table = common.reopen(run / "erm/best.pt")
    images = common.open_split(start, table, "train", augment="crop-flip", views=2, seed=3)
    mean = torch.tensor(start["mean"]).view(3, 1, 1)
    std = torch.tensor(start["std"]).view(3, 1, 1)
    optimizer = torch.optim.Adam(model.train().parameters(), lr=1e-2)
    log = common.load_checkpoint(folder / "last.pt")["log"]
    for epoch in (1, 2):
        norms = {}
        for name, value in model.state_dict().items():
            if value.dim() == 4:
                norms.update({(name, i): z.norm().item() for i, z in enumerate(value)})
        neurons = sorted(norms, key=norms.get)[-11:]
        assert set(neurons) == masked_of(folder, epoch)
        order = torch.Generator().manual_seed(common.seed_of(3, epoch))
        total = 0.0
        for batch in torch.randperm(32, generator=order).view(2, 16).tolist():
            x = (torch.stack([images[epoch, i][0] for i in batch]) / 255 - mean) / std
            x_p = x[:, 1] if views == "two" else x[:, 0]
            optimizer.zero_grad()
            pruned = zeroed(model, neurons)
            r = model(x[:, 0]).softmax(1)
            r_p = pruned(x_p).softmax(1)
            loss = stage.nt_xent(r, r_p) + 0.2 * (r - F.one_hot(images.y[batch])).square().sum()
            loss.backward()
            for name, i in neurons:
                pruned.get_parameter(name).grad[i] = 0
            for p, q in zip(model.parameters(), pruned.parameters(), strict=True):
                p.grad += q.grad
            optimizer.step()
            total += loss.item() / 2
        assert log[epoch]["loss"] == pytest.approx(total, rel=1e-4)
    for name, value in common.load_checkpoint(folder / "last.pt")["model"].items():
        assert torch.allclose(model.state_dict()[name], value, atol=1e-3), name
    assert masked_of(folder, 1) != masked_of(folder, 2)


@pytest.mark.parametrize(
    "more,terms,masked",
    [
        ("--method erm", ["cross entropy"], 0),
        ("--method supervised --loss ce", ["supervised"], 0),
        ("--criterion none", ["contrast", "supervised"], 0),
        ("--criterion random --views one", ["contrast", "supervised"], 1),
        (
            "--criterion gradient --gradient-source minority --unit weight",
            ["contrast", "supervised"],
            38,
        ),
        ("--precision bf16 --loss ce", ["contrast", "supervised"], 1),
    ],
)
def test_every_arm_runs(run, capsys, more, terms, masked):
    """A ten-thousandth of 1,040 channels or of the 370,224 weights, rounded up."""
    flags = f"--run {run} --name arm --device cpu --workers 0 --epochs 1 {more}"
    as_script(stage, flags, capsys)
    _, log, _ = content(run / "arm")
    assert list(log[1]["terms"]) == terms
    assert log[1]["masked"] == len(masked_of(run / "arm", 1)) == masked


def test_the_same_command_and_others(run, capsys):
    finetune(run, "a", "--epochs 1")
    table = capsys.readouterr().out.partition("\n\n")[2]
    finetune(run, "a", "--epochs 1")
    again = capsys.readouterr().out
    assert "is finished; --overwrite starts anew" in again
    assert again.partition("\n\n")[2] + f"wrote {run}/a/\n" == table
    with pytest.raises(common.BadInput, match="lam 0.2, now 0.3"):
        finetune(run, "a", "--epochs 1 --lam 0.3")
    words = "--gradient-source minority changes nothing with --criterion magnitude; leave it out"
    with pytest.raises(common.BadInput, match=words):
        finetune(run, "b", "--gradient-source minority")
    with pytest.raises(
        common.BadInput, match="--criterion random changes nothing with --method erm"
    ):
        finetune(run, "b", "--method erm --criterion random")
    shutil.copy(run / "erm/epoch_003.pt", run / "erm/best.pt")  # as if ERM had been run again
    with pytest.raises(common.BadInput, match="the start changed"):
        finetune(run, "a", "--epochs 2")
    with pytest.raises(common.BadInput, match="diverged in epoch 1, .* try a lower --lr or --lam"):
        finetune(run, "a", "--overwrite --lr 1e12")
    assert {path.name for path in (run / "a").iterdir()} == {"args.json", ".lock"}


def test_where_it_starts(run, capsys):
    def start(more=""):
        return stage.starting_point(stage.parse_args(f"--run {run} {more}".split())).name

    assert start() == "epoch_001.pt"  # of 4, as 40 of 100
    assert start("--kick-in 3") == "epoch_003.pt"
    assert start("--checkpoint x.pt") == "x.pt"
    (run / "erm/epoch_001.pt").unlink()  # as after an extension
    assert start() == "best.pt"
    assert "has not kept epoch 1, 40 % of its epochs; using best.pt" in capsys.readouterr().err
    record = common.read_json(run / "erm/args.json")
    record["args"]["epochs"] = 8  # as if it were extended so far
    common.write(run / "erm", {"args.json": record})
    assert start() == "epoch_003.pt"  # 3.2, rounded down
    short = finetune(run, "short", "--kick-in 3 --prune-fraction 0.01")
    settings = common.read_json(short / "args.json")["args"]
    assert (settings["epochs"], settings["lr"]) == (4, 2e-4)  # a fifth would be one
    record["args"]["epochs"] = 30
    common.write(run / "erm", {"args.json": record})
    finetune(run, "long", "--kick-in 3 --prune-fraction 0.01")
    assert common.read_json(run / "long/args.json")["args"]["epochs"] == 6  # a fifth
    first = finetune(run, "first", "--epochs 1 --kick-in 2")
    assert content(first)[0]["start_epoch"] == 2
    with pytest.raises(common.BadInput, match="lies in the folder to be filled"):
        finetune(run, "first", f"--overwrite --checkpoint {first}/best.pt")
    second = finetune(run, "second", f"--epochs 1 --checkpoint {first}/best.pt")
    results = content(second)[0]
    assert results["start"] == "best.pt"
    assert results["erm"] == content(first)[0]["erm"]


@pytest.mark.parametrize(
    "more,words",
    [
        ("--kick-in 7", "erm/epoch_007.pt: no such file"),
        ("--checkpoint missing.pt", "missing.pt: no such file"),
        ("--data no", "no: no such file"),
        ("--temperature 0", "argument --temperature: 0 is not between"),
        ("--epochs 0", "argument --epochs: 0 is not between"),
        ("--seed -1", "argument --seed: -1 is not between"),
        ("--lr inf", "argument --lr: inf is not between"),
        ("--lam nan", "argument --lam: nan is not between"),
        ("--lam -1", "argument --lam: -1 is not between"),
        ("--batch-size 1", "argument --batch-size: 1 is not between"),
        ("--prune-fraction 0.0", "argument --prune-fraction: 0.0 is not between"),
        ("--prune-fraction 1.1", "argument --prune-fraction: 1.1 is not between"),
        ("--prune-fraction nan", "argument --prune-fraction: nan is not between"),
        ("--name erm", "--name 'erm'"),
        ("--name trace", "--name 'trace'"),
        ("--name structured", "--name 'structured'"),
        ("--name gradcam", "--name 'gradcam'"),
        ("--name ..", "--name '..'"),
        ("--name .", "--name '.'"),
        ("--name a/b", "--name 'a/b'"),
        ("--name a\x07b", r"--name 'a\x07b'"),
        ("--name a\udce9", r"--name 'a\udce9'"),  # a byte that is not UTF-8
        ("--device hpu", "--device hpu: "),
    ],
)
def test_refused_settings(run, capsys, more, words):
    flags = f"--run {run} --name bad --device cpu {more}"
    assert words in as_script(stage, flags, capsys, code=2)
    assert list(run.iterdir()) == [run / "erm"]
