"""finetune_contrastive.py: losses by hand, the tied branches against two models, whole runs."""

import argparse
import copy
import json
import math
import shutil

import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

import common
import finetune_contrastive as stage
from common import BadInput, build_model, modified, neuron_masks
from finetune_contrastive import auxiliary, critical_neurons, losses, nt_xent, supervised_loss

SETTINGS = {"method": "contrastive", "criterion": "magnitude", "prune_fraction": 1e-4}
SETTINGS |= {"order": "largest", "gradient_source": "train", "temperature": 0.5, "loss": "mse"}
SETTINGS |= {"lam": 0.2, "lam_reduction": "sum", "features": "probs", "erm_head": "linear"}
SETTINGS |= {"seed": 0, "batch_size": 64, "unit": "channel", "minority": [1, 2]}
PROJECT = {"probs": torch.nn.Softmax(1), "logits": torch.nn.Identity()}


def arguments(**changed):
    return argparse.Namespace(**{**SETTINGS, **changed})


def network(arch="resnet10", size=32):
    torch.manual_seed(0)
    return build_model(arch, 2, size)


def batch(n=6, views=1, size=32):
    generator = torch.Generator().manual_seed(1)
    shape = (n, views, 3, size, size) if views > 1 else (n, 3, size, size)
    return torch.randn(shape, generator=generator), torch.arange(n) % 2


# ---- the losses ----


def nt_xent_by_sums(r, r_p, temperature):
    """Eq. 2.1 word by word, mean over all anchors."""
    features, total = [*r, *r_p], 0.0

    def weight(u, v):
        return math.exp(float(u @ v / (u.norm() * v.norm())) / temperature)

    for i, anchor in enumerate(features):
        positive = features[(i + len(r)) % len(features)]
        others = sum(weight(anchor, other) for k, other in enumerate(features) if k != i)
        total -= math.log(weight(anchor, positive) / others)
    return total / len(features)


@pytest.mark.parametrize("n,temperature", [(2, 0.5), (5, 0.1), (7, 2.0)])
def test_nt_xent_is_eq_2_1_in_both_directions(n, temperature):
    generator = torch.Generator().manual_seed(n)
    r, r_p = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = nt_xent_by_sums(r, r_p, temperature)
    assert nt_xent(r, r_p, temperature).item() == pytest.approx(expected, abs=1e-12)
    assert nt_xent(r_p, r, temperature).item() == pytest.approx(expected, abs=1e-12)


def test_nt_xent_by_hand():
    """Features alike within an image, at right angles between images: each sees one 1, two 0."""
    r = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    expected = math.log((math.e**2 + 2) / math.e**2)
    assert nt_xent(r, 2 * r, 0.5).item() == pytest.approx(expected, abs=1e-6)
    assert nt_xent(r, r, 0.5) < nt_xent(r, r.flip(0), 0.5)  # an image's own belong together


def test_supervised_loss_by_hand():
    """Softmax of (ln 3, 0) is (3/4, 1/4): 1/8 from (1, 0) and 9/8 from (0, 1)."""
    logits, y = torch.tensor([[math.log(3), 0.0]] * 2), torch.tensor([0, 1])
    entropy = -math.log(3 / 4) - math.log(1 / 4)
    expected = {("mse", "sum"): 10 / 8, ("mse", "mean"): 5 / 8}
    expected |= {("ce", "sum"): entropy, ("ce", "mean"): entropy / 2}
    for how, value in expected.items():
        assert supervised_loss(logits, y, *how).item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    "changed,names",
    [
        ({"method": "erm"}, {"cross entropy"}),
        ({"method": "supervised", "lam": 3.0}, {"supervised"}),
        ({}, {"contrast", "supervised"}),
        ({"features": "projection"}, {"contrast", "supervised"}),
    ],
)
def test_terms(changed, names):
    args, model, (x, y) = arguments(**changed), network().eval(), batch()
    project = stage.projection(model, args.features, 32)
    terms = losses(model, x, y, {}, {}, project, args)
    assert terms.keys() == names and all(term.requires_grad for term in terms.values())
    if "supervised" in terms:
        expected = args.lam * supervised_loss(model(x), y)
        assert torch.allclose(terms["supervised"], expected)
    if args.features == "projection":  # two equal branches: what enters the head, through the MLP
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        assert torch.allclose(terms["contrast"], nt_xent(project(pooled), project(pooled)))
    if args.method == "erm":
        softmax = losses(model, x, y, {}, {}, project, arguments(method="erm", erm_head="softmax"))
        expected = torch.nn.functional.cross_entropy(model(x).softmax(1), y)
        assert torch.allclose(softmax["cross entropy"], expected)


# ---- the two branches ----


@pytest.mark.parametrize("features", ["probs", "logits"])
def test_a_step_is_that_of_two_models_with_tied_weights(features):
    """Gradients of both branches, from two deep copies of which one is really pruned, add up."""
    args, neurons = arguments(features=features), [("conv1", 3), ("layer3.0.conv1", 7)]
    model, (x, y) = network().double().train(), batch(views=2)
    target, pruned = copy.deepcopy(model), copy.deepcopy(model)
    masks = neuron_masks(model, neurons)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    sum(losses(model, x.double(), y, masks, buffers, PROJECT[features], args).values()).backward()

    for layer, i in neurons:
        pruned.get_submodule(layer).weight.data[i] = 0
    logits, logits_p = target(x[:, 0].double()), pruned(x[:, 1].double())
    r, r_p = PROJECT[features](logits), PROJECT[features](logits_p)
    squared = (logits.softmax(1) - torch.eye(2)[y]).square().sum()
    (nt_xent(r, r_p, 0.5) + 0.2 * squared).backward()
    pairs = zip(model.named_parameters(), target.parameters(), pruned.parameters())
    for (name, p), a, b in pairs:
        expected = a.grad + b.grad * masks.get(name, 1)
        assert torch.allclose(p.grad, expected, rtol=1e-8, atol=1e-12), name


@pytest.mark.parametrize(
    "arch,unit,neurons",
    [
        ("resnet10", "channel", [("conv1", 0), ("layer4.0.conv2", 9)]),
        ("vit_tiny_patch16_224", "weight", [("blocks.0.attn.qkv", 11), ("blocks.3.mlp.fc1", 40)]),
    ],
)
def test_auxiliary_is_the_network_with_zeroed_neurons(arch, unit, neurons):
    model, (x, _) = network(arch).eval(), batch()
    with torch.inference_mode():
        got = auxiliary(model, x, neuron_masks(model, neurons, unit), {})
        with modified(model, neurons, unit=unit):
            assert torch.equal(got, model(x))
        assert not torch.equal(got, model(x))


def test_statistics_of_batchnorm():
    """A copy of its own leaves the target's as a single forward would; without, they move twice."""
    x, y = batch()
    moved = {}
    for case in ("own", "shared", "target alone"):
        model = network().train()
        buffers = {name: b.clone() for name, b in model.named_buffers()} if case == "own" else {}
        args = arguments(method="erm" if case == "target alone" else "contrastive")
        losses(model, x, y, neuron_masks(model, [("conv1", 3)]), buffers, PROJECT["probs"], args)
        moved[case] = {name: b.clone() for name, b in model.named_buffers()}
    for name, alone in moved["target alone"].items():
        assert torch.equal(moved["own"][name], alone), name
    assert not torch.equal(moved["shared"]["bn1.running_mean"], alone)
    assert moved["shared"]["bn1.num_batches_tracked"] == 2


# ---- which neurons, from which images ----


class Pictures(TensorDataset):
    """600 images of which 1 to 3 in a hundred matter: what critical_neurons takes of Images."""

    def __init__(self, counts=(300, 100, 100, 100)):
        self.g = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
        self.y = self.g // 2
        x = torch.randn(len(self.g), 3, 4, 4, generator=torch.Generator().manual_seed(0))
        super().__init__(x, self.y, self.g)


def planted():
    """One convolution of 40 filters; filter i has norm i + 1."""
    convolution = torch.nn.Conv2d(3, 40, 1, bias=False)
    with torch.no_grad():
        convolution.weight.zero_()
        convolution.weight[:, 0, 0, 0] = torch.arange(40) + 1.0
    pool = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
    return torch.nn.Sequential(convolution, *pool, torch.nn.Linear(40, 2)).eval()


def chosen(model, images, logits, epoch=1, **changed):
    rows = critical_neurons(model, images, logits, arguments(**changed), {"0": 40}, epoch)
    return [(criterion, index) for criterion, _, index, _ in rows]


def test_magnitude_masks_the_largest():
    images, model = Pictures((9, 4, 3, 8)), planted()
    logits = torch.zeros(len(images), 2)
    top = chosen(model, images, logits, prune_fraction=0.1)
    assert top == [("magnitude", i) for i in (39, 38, 37, 36)]
    low = chosen(model, images, logits, prune_fraction=0.1, order="smallest")
    assert low == [("magnitude", i) for i in (0, 1, 2, 3)]
    assert critical_neurons(model, images, logits, arguments(), {"0": 40}, 1) == [
        ("magnitude", "0", 39, 40.0)
    ]
    assert chosen(model, images, logits, criterion="none") == []
    assert chosen(model, images, logits, method="erm") == []


@pytest.mark.parametrize("fraction,k", [(1e-4, 3), (2e-4, 6), (1e-3, 27), (0.01, 266), (0.1, 2656)])
def test_fractions_of_resnet50(fraction, k):
    args = arguments(criterion="random", prune_fraction=fraction)

    def draw(epoch):
        return critical_neurons(None, [], None, args, {"a": 20000, "b": 6560}, epoch)

    assert len(set(draw(1))) == k and draw(1) == draw(1) != draw(2)


def test_the_gradient_is_of_the_worst_images(monkeypatch):
    """The 300 images of odd index are wrong, the higher the index the more: the 256 worst start at
    index 89."""
    images = Pictures()
    odd = torch.arange(600) % 2 == 1
    logits = torch.zeros(600, 2)
    wrong_or_right = torch.where(odd, 1 - images.y, images.y)
    logits[torch.arange(600), wrong_or_right] = torch.arange(600) / 100
    seen = []

    def scores(model, batches, unit):
        seen.append([row for batch in batches for row in zip(*batch)])
        return {"0": torch.tensor([0.1, 0.9, 0.5])}

    monkeypatch.setattr(common, "gradient_scores", scores)
    monkeypatch.setattr(common, "magnitude_scores", lambda *_: {"0": torch.tensor([5.0, 1, 1])})
    assert chosen(None, images, logits, criterion="gradient") == [("gradient", 1)]
    assert chosen(None, images, logits, criterion="gradient", order="smallest") == [("gradient", 0)]
    assert chosen(None, images, logits, criterion="mixed") == [("magnitude", 0), ("gradient", 1)]
    known = {x.sum().item(): i for i, (x, _, _) in enumerate(images)}
    index = [known[x.sum().item()] for x, _, _ in seen[0]]
    assert len(set(index)) == 128 and all(i % 2 == 1 and i >= 89 for i in index)
    chosen(None, images, logits, criterion="gradient", gradient_source="minority")
    assert {int(g) for _, _, g in seen[-1]} == {1, 2}


def test_selection_spread():
    g = torch.repeat_interleave(torch.arange(2), torch.tensor([50, 20]))
    right = torch.zeros(3, 70, dtype=torch.bool)
    right[0, :60] = True  # 100 and 50 %
    right[1:] = True  # the third epoch is as good as the second, but later
    assert stage.selection_spread(right, g, 2, 0) == {"acc_worst_sd": 0.0, "chosen": {2: 1.0}}
    right[1, 60:], right[2, 65:] = False, False
    assert stage.selection_spread(right, g, 3, 0)["chosen"][3] > 0.9  # 75 % against 50 %
    sd = stage.selection_spread(right, g, 2, 0)["acc_worst_sd"]
    assert sd == pytest.approx(math.sqrt(0.25 / 20), rel=0.1)


# ---- the script ----


@pytest.fixture
def run(erm_run, tmp_path, monkeypatch):
    """A copy of the run of stage 1, without the time that figures take."""
    shutil.copytree(erm_run / "run/erm", tmp_path / "run/erm")
    monkeypatch.setattr(common, "save_figure", lambda fig, path: path.touch())
    return tmp_path / "run"


def tune(run, *flags):
    settings = ["--run", run, "--workers", 0, "--device", "cpu", "--epochs", 2, "--batch-size", 16]
    settings += flags
    stage.main(stage.parse_args(list(map(str, settings))))


def outcome(folder):
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for row in log:
        row.pop("seconds", None)
    saved = torch.load(folder / "best.pt", weights_only=True)["model"]
    texts = [(folder / name).read_text() for name in ("results.json", "pruned.csv")]
    return log, texts, [value.tolist() for value in saved.values() if value.dim() < 2]


def test_a_run_and_its_continuation(run, erm_run, monkeypatch):
    flags = ("--criterion", "mixed", "--prune-fraction", "0.002", "--features", "projection")
    seen, real = [], stage.losses

    def spy(model, x, y, masks, buffers, *rest):
        seen.append((x.shape, {k: (~m.flatten(1).any(1)).nonzero() for k, m in masks.items()}))
        if "interrupt" in seen:
            raise KeyboardInterrupt
        return real(model, x, y, masks, buffers, *rest)

    monkeypatch.setattr(stage, "losses", spy)
    tune(run, "--name", "whole", *flags)
    files = {path.name for path in (run / "whole").iterdir()}
    assert files == {*stage.FILES[:-1], "groups.png", "curves.png"}
    log, (results, pruned), _ = outcome(run / "whole")
    assert [row["epoch"] for row in log] == [0, 1, 2] and seen[0][0] == (16, 2, 3, 32, 32)
    rows = [line.split(",") for line in pruned.splitlines()[1:]]
    for row in log[1:]:
        assert row["loss"] == pytest.approx(sum(row["terms"].values()))
        listed = {(layer, int(i)) for e, _, layer, i, _ in rows if int(e) == row["epoch"]}
        masks = seen[2 * row["epoch"] - 2][1]  # two steps an epoch
        masked = {(k.removesuffix(".weight"), int(i)) for k, at in masks.items() for i in at}
        assert masked == listed and row["pruned"] == len(listed) >= 6
    best = max(log[1:], key=lambda row: (row["val"]["acc_worst"], -row["epoch"]))
    results = json.loads(results)
    assert results["selected_epoch"] == best["epoch"] and results["splits"]["val"] == best["val"]
    assert results["seed"] == 3 and results["augment"] == "table1"  # those of the ERM run

    seen[:] = ["interrupt"]  # before the first epoch is over: nothing to continue from
    with pytest.raises(KeyboardInterrupt):
        tune(run, "--name", "parts", *flags)
    seen.clear()
    tune(run, "--name", "parts", *flags, "--epochs", 1)
    with open(run / "parts/pruned.csv", "a") as file:  # what an interrupted epoch leaves
        file.write("2,magnitude,conv1,0,1.5\n2,magn")
    tune(run, "--name", "parts", *flags)
    assert outcome(run / "parts") == outcome(run / "whole")

    # Another network in the place of the start, as after stage 1 ran anew
    shutil.copy(run / "erm/last.pt", run / "erm/best.pt")
    with pytest.raises(BadInput, match="the start changed"):
        tune(run, "--name", "parts", *flags, "--epochs", 3)


@pytest.mark.parametrize(
    "flags",
    [
        ("--method", "erm", "--kick-in", 1),
        ("--method", "supervised", "--loss", "ce", "--lam-reduction", "mean"),
        ("--features", "logits", "--views", "one", "--criterion", "random", "--aux-bn", "shared"),
        ("--criterion", "gradient", "--gradient-source", "minority", "--unit", "weight"),
        ("--criterion", "none", "--order", "smallest"),
    ],
)
def test_every_arm_runs(run, flags):
    tune(run, *flags, "--epochs", 1)
    row = json.loads((run / "finetune/log.jsonl").read_text().splitlines()[1])
    assert ("contrast" in row["terms"]) == ("--method" not in flags)
    assert (row["pruned"] > 0) == ("random" in flags or "gradient" in flags)
    results = json.loads((run / "finetune/results.json").read_text())
    assert results["start"] == ("epoch_001.pt" if "--kick-in" in flags else "best.pt")


def test_two_views_begin_with_the_one(erm_run):
    """The first of two augmentations is that of a run with one view, the second is another."""
    checkpoint = common.load_checkpoint(erm_run / "run/erm/best.pt")
    table = common.read_table(erm_run / "data")
    one, two = (common.open_split(checkpoint, table, "train", "table1", views=v) for v in (1, 2))
    assert torch.equal(one[3, 5][0], two[3, 5][0][0])
    assert not torch.equal(two[3, 5][0][0], two[3, 5][0][1])


def test_figures(erm_run, tmp_path):
    shutil.copytree(erm_run / "run/erm", tmp_path / "run/erm")
    tune(tmp_path / "run", "--epochs", 1)
    for name in ("groups.png", "curves.png"):
        with Image.open(tmp_path / "run/finetune" / name) as image:
            low, high = image.convert("L").getextrema()
            assert min(image.size) > 200 and high - low > 100


@pytest.mark.parametrize(
    "flags,words",
    [
        (("--kick-in", 7), "--kick-in 7: .* it kept 1, 2"),
        (("--prune-fraction", 0), "--prune-fraction 0.0: must lie between 0 and 1"),
        (("--prune-fraction", 1), "--prune-fraction 1.0: must lie between 0 and 1"),
        (("--batch-size", 1), "use 2 or more"),
        (("--lam", "nan"), "--lam nan: must not be negative"),
        (("--lam", -1), "--lam -1.0: must not be negative"),
        (("--temperature", 0), "--temperature 0.0: must be positive"),
        (("--seed", -1), "--seed -1: must be 0 to"),
        (("--checkpoint", "missing.pt"), "missing.pt: no such file"),
        (("--data", "nowhere"), "nowhere: no such file"),
        (("--lr", "1e30"), "diverged in epoch 1"),
    ],
)
def test_refusals(run, flags, words):
    with pytest.raises(BadInput, match=words):
        tune(run, "--name", "bad", *flags)
    assert not (run / "bad/results.json").exists()
    assert "--lr" in flags or not (run / "bad").exists()


def test_folders_that_are_not_to_be_touched(run):
    for name in ("erm", "..", "", "a/b"):
        with pytest.raises(SystemExit):
            tune(run, "--name", name)
    (run / "notes").mkdir()
    (run / "notes/mine.txt").write_text("mine")
    with pytest.raises(BadInput, match="mine.txt is not of this stage"):
        tune(run, "--name", "notes", "--overwrite")
    assert (run / "notes/mine.txt").read_text() == "mine"
    tune(run, "--name", "first", "--epochs", 1)
    with pytest.raises(BadInput, match="lies in the folder to be filled"):
        tune(run, "--name", "first", "--overwrite", "--checkpoint", run / "first/best.pt")
    tune(run, "--name", "second", "--epochs", 1, "--checkpoint", run / "first/best.pt")
