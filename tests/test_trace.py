"""trace_neurons.py and structured_trace.py: a planted filter, slow second ways, the control."""

import copy
import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import TensorDataset

import common
import structured_trace
import trace_neurons

COUNTS = (24, 9, 8, 24)
GROUPS = common.describe_groups(*common.NAMES["waterbirds"], COUNTS)  # G1 and G2 are minorities
OURS = {"args.json", "neurons.csv", "accuracy.csv", "results.json", "fig02_zero.png"}
OURS |= {"fig03_ranks.png", "fig04_random_init.png", "fig05_random_noise.png", "fig08_layers.png"}
OURS |= {"fig11_random_init_sigmas.png", "fig12_random_noise_sigmas.png"}
pick = trace_neurons.pick


def planted():
    """A network in which one filter, conv2[12], alone carries the answer for group 2. Six filters
    each copy red, green, blue in conv1; in conv2 six each see green (the place) and red, one sees
    blue, and 200 see nothing much. Half of any six may go without a change of any answer."""
    first, second, head = torch.zeros(18, 3), torch.zeros(213, 18), torch.zeros(2, 213)
    first[range(18), torch.arange(18) // 6] = 1
    second[:6, 6:12] = second[6:12, :6] = 1 / 6
    second[12, 12:18] = 1
    second[13:] = 1e-3
    head[1, :6], head[1, 6:12], head[1, 12] = 1.0, -2.0, 0.5
    model = torch.nn.Sequential()
    model.add_module("conv1", torch.nn.Conv2d(3, 18, 1, bias=False))
    model.add_module("relu1", torch.nn.ReLU())
    model.add_module("conv2", torch.nn.Conv2d(18, 213, 1, bias=False))
    model.add_module("rest", torch.nn.Sequential(torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1)))
    model.add_module("flat", torch.nn.Flatten())
    model.add_module("head", torch.nn.Linear(213, 2))
    for layer, weight in ((model.conv1, first), (model.conv2, second), (model.head, head)):
        layer.weight.data = weight.view_as(layer.weight)
    model.head.bias.data = torch.tensor([0.0, -1.0])
    return model.eval()


def planted_split(*_):
    """Green is the place, blue marks group 2, red marks group 1."""
    g = torch.repeat_interleave(torch.arange(4), torch.tensor(COUNTS))
    colours = torch.stack([g == 1, g % 2 == 1, g == 2], 1).float()
    x = colours[:, :, None, None].expand(-1, 3, 8, 8).contiguous()
    split = TensorDataset(x, g // 2, g, torch.arange(len(g)))
    split.y, split.g = g // 2, g
    return split


@pytest.fixture
def on_planted(monkeypatch):
    table, about = SimpleNamespace(source="planted", groups=GROUPS), {"arch": "planted", "epoch": 1}
    monkeypatch.setattr(common, "reopen", lambda *_: (planted(), about, table))
    monkeypatch.setattr(common, "open_split", planted_split)
    monkeypatch.setattr(common, "save_figure", lambda fig, path, dpi=0: path.touch())


def trace(script, run, more=""):
    flags = ["--run", str(run), "--device", "cpu", "--workers", "0", *more.split()]
    script.main(script.parse_args(flags))


def read(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


# ---- the planted filter ----


def test_the_planted_filter_is_found(on_planted, tmp_path):
    trace(trace_neurons, tmp_path, "--top-k 1 3 --repeats 2")
    neurons, rows = (read(tmp_path / f"trace/{name}.csv") for name in ("neurons", "accuracy"))
    for criterion, by in (("gradient", "2"), ("magnitude", "all")):
        wanted = {"criterion": criterion, "selected_by": by}
        first = pick(neurons, **wanted, rank="1")[0]
        assert (first["layer"], first["index"]) == ("conv2", "12")
        assert float(first["magnitude_percentile"]) == 100
        zeroed = pick(rows, **wanted, modification="zero", k="1")
        assert len(zeroed) == 8  # four groups, training and test
        for row in zeroed:
            assert row["correct_before"] == row["n"] == str(COUNTS[int(row["group"])])
            assert row["correct_after"] == ("0" if row["group"] == "2" else row["n"])
            assert row["to_wrong"] == ("8" if row["group"] == "2" else "0")
    for control in results_of(tmp_path / "trace")["control"].values():
        assert control["beats"] == {"1": False, "2": True}
        assert "neurons? only for G2*: G1* +0.0 points (+0 of 9)" in control["sentence"]
        for test in pick(control["tests"], group=2):
            assert test["observed"] == -100 and test["p"] <= 2 / 41 and test["sets"] == 40


def test_the_planted_layer_lights_up(on_planted, tmp_path):
    trace(structured_trace, tmp_path)
    rows = read(tmp_path / "structured/layers.csv")
    assert len(rows) == 2 * 2 * 4
    for row in rows:
        carries = (row["layer"], row["group"]) == ("conv2", "2")
        assert float(row["change_percent"]) == (-100 if carries else 0)
    summary = results_of(tmp_path / "structured")["summary"]["gradient"]
    largest = {"group": 2, "mean": -50, "largest": -100, "layer": "conv2"}
    assert summary["groups"][2] == largest
    assert summary["thirds"] == {"first": 0, "middle": 1, "last": 0}  # of two layers


@pytest.mark.parametrize("samples,seen", [("group", [4, 9, 8, 4]), ("worst", [24, 9, 8, 24])])
def test_images_of_the_gradient(on_planted, tmp_path, monkeypatch, samples, seen):
    """'worst' draws from all images of a group, whatever is traced; minorities are traced whole."""
    counts, scores = [], common.gradient_scores

    def spy(model, batches, unit):
        counts.append([len(batches.dataset), *{int(g) for _, _, g, _ in batches.dataset}])
        return scores(model, batches, unit)

    monkeypatch.setattr(common, "gradient_scores", spy)
    few = "--max-per-group 4 --controls 0 --modifications zero"
    trace(trace_neurons, tmp_path, f"--gradient-samples {samples} {few}")
    assert counts == [*([n, j] for j, n in enumerate(seen)), [25, 0, 1, 2, 3]]


def test_folders_are_replaced_as_a_whole(on_planted, tmp_path, monkeypatch):
    few = "--repeats 1 --controls 0 --top-k 5"  # no k that a figure shows
    trace(trace_neurons, tmp_path, few)
    before = {path: path.read_bytes() for path in (tmp_path / "trace").iterdir()}
    assert {path.name for path in before} == OURS
    monkeypatch.setattr(common, "STOP_SIGNALS", [])
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(trace_neurons, "plot_layers", lambda *_: 1 / 0)
        with common.script(tmp_path / "trace"):
            trace(trace_neurons, tmp_path, "--repeats 2")
    assert {path: path.read_bytes() for path in (tmp_path / "trace").iterdir()} == before
    (tmp_path / ".trace.new").mkdir()  # as a kill leaves it
    trace(trace_neurons, tmp_path, few)
    assert [path.name for path in tmp_path.iterdir()] == ["trace"]
    for name in ("neurons.csv", "accuracy.csv", "results.json"):
        assert (tmp_path / "trace" / name).read_bytes() == before[tmp_path / "trace" / name]


# ---- slow second ways on networks of two kinds ----


@pytest.fixture(scope="module", params=["test_resnet", "test_vit"])
def traced(erm_run, tmp_path_factory, request):
    """Model, batch of each split and folder of both traces: that of erm_run, and a transformer."""
    folder, checkpoint = tmp_path_factory.mktemp(request.param), erm_run / "run/erm/best.pt"
    if request.param == "test_vit":
        fields = common.load_checkpoint(checkpoint)
        fields.pop("model")
        torch.manual_seed(0)
        model, checkpoint = common.build_model("test_vit", 2, 32), folder / "vit.pt"
        common.save_checkpoint(checkpoint, model, **{**fields, "arch": "test_vit"})
    few = "--repeats 2 --controls 19 --sigma 0.3 --seed 5"
    trace(trace_neurons, folder, f"--checkpoint {checkpoint} {few}")
    trace(structured_trace, folder, f"--checkpoint {checkpoint}")
    model, saved, table = common.reopen(checkpoint)
    splits = {}
    for name in ("train", "test"):
        batch = next(iter(common.make_loader(common.open_split(saved, table, name))))
        splits[name] = batch[:3]
    return model, splits, folder


def neurons_of(layer_values, k, unit):
    """The k largest norms over all layers, by a plain sort; {layer: weight or its gradient}."""
    norms = []
    for layer, value in layer_values.items():
        parts = value.detach().flatten(1) if unit == "channel" else value.detach().reshape(-1, 1)
        norms += [(-norm, layer, i) for i, norm in enumerate(parts.norm(dim=1).tolist())]
    return [(layer, i) for _, layer, i in sorted(norms)[:k]]


def right_by_hand(model, neurons, how, unit, split, sigma=0.0, seed=0):
    """How many images of each group a changed copy of the network gets right."""
    changed, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for layer, i in neurons:
        weight = changed.get_submodule(layer).weight.data
        weight = weight if unit == "channel" else weight.view(-1)
        noise = sigma * torch.randn(weight[i].shape, generator=generator)
        weight[i] = {"zero": 0, "random-init": noise, "random-noise": weight[i] + noise}[how]
    x, y, g = split
    with torch.no_grad():
        return (changed(x).argmax(1) == y).float() @ F.one_hot(g).float()


def test_neurons_and_counts(traced):
    model, splits, folder = traced
    results, neurons = results_of(folder / "trace"), read(folder / "trace/neurons.csv")
    unit, layers = results["unit"], common.prunable_layers(model)
    assert unit == ("weight" if results["arch"] == "test_vit" else "channel")
    assert results["listed"] == max(10, math.ceil(1e-4 * results["neurons"]))
    ranked = {}
    for row in neurons:
        key = (row["criterion"], row["selected_by"])
        ranked.setdefault(key, []).append((row["layer"], int(row["index"])))
    x, y, g = splits["train"]
    expected = {("magnitude", "all"): layers}
    for j in range(4):
        loss = -model(x[g == j]).log_softmax(1)[range(sum(g == j)), y[g == j]].mean()
        gradients = torch.autograd.grad(loss, list(layers.values()))
        expected["gradient", str(j)] = dict(zip(layers, gradients))
    for key, values in expected.items():
        assert ranked[key] == neurons_of(values, len(ranked[key]), unit)
    rows = [
        row
        for row in pick(read(folder / "trace/accuracy.csv"), k="3")
        if row["criterion"] != "random"
    ]
    # Zeroing: 5 sets x 4 groups x 2 splits; noise: own group or all of magnitude's, two draws
    assert len(rows) == 40 + (4 + 4) * 2 + (4 + 4 + 4) * 2
    for row in rows:
        chosen, split = ranked[row["criterion"], row["selected_by"]][:3], splits[row["split"]]
        seed = common.seed_of(5, int(row["repeat"] or 0))
        after = right_by_hand(model, chosen, row["modification"], unit, split, 0.3, seed)
        before, j = right_by_hand(model, [], "zero", unit, split), int(row["group"])
        assert int(row["n"]) == int((split[2] == j).sum())
        assert int(row["correct_before"]) == before[j] and int(row["correct_after"]) == after[j]
        assert int(row["to_right"]) - int(row["to_wrong"]) == after[j] - before[j]


def test_layers(traced):
    model, splits, folder = traced
    rows, results = read(folder / "structured/layers.csv"), results_of(folder / "structured")
    layers = common.prunable_layers(model)
    assert results["layers"] == list(layers) and len(rows) == 8 * len(layers)
    before = right_by_hand(model, [], "zero", results["unit"], splits["train"])
    for row in pick(rows, criterion="magnitude"):
        chosen = neurons_of({row["layer"]: layers[row["layer"]]}, 3, results["unit"])
        after = right_by_hand(model, chosen, "zero", results["unit"], splits["train"])
        j = int(row["group"])
        change = 100 * (after[j] - before[j]).item() / int(row["n"])
        assert float(row["change_percent"]) == pytest.approx(change, abs=1e-4)


def test_tables(traced):
    """Each group under its own neurons; the matrix has all of them."""
    rows, results = read(traced[2] / "trace/accuracy.csv"), results_of(traced[2] / "trace")
    points = {}
    for row in pick(rows, criterion="gradient", modification="zero", k="3", split="train"):
        lost = int(row["to_wrong"]) - int(row["to_right"])
        points[row["selected_by"], row["group"]] = -100 * lost / int(row["n"])
    lines = {(t["table"], t["line"], t["split"]): t["points"] for t in results["tables"]}
    diagonal = [points[str(j), str(j)] for j in range(4)]
    assert lines["Table 11", "gradient zero top 3", "train"] == pytest.approx(diagonal)
    for j in range(4):
        row = [points[str(j), str(i)] for i in range(4)]
        assert lines["Matrix", f"gradient of G{j}", "train"] == pytest.approx(row)


def test_figures(traced):
    _, _, folder = traced
    assert {path.name for path in (folder / "trace").iterdir()} == OURS
    for path in [folder / "structured/fig07_layers.png", *(folder / "trace").glob("*.png")]:
        with Image.open(path) as image:
            assert min(image.size) > 200 and np.asarray(image.convert("L")).std() > 5, path


# ---- the control ----


def compared(observed, null, group=1, n=100, controls=40):
    """What control_test says of magnitude's set and random ones that lose or gain so many."""
    kinds = ("all layers", "layers of magnitude all")
    sets = [("random", kind, images) for kind in kinds for images in null]
    rows = []
    for criterion, by, images in [("magnitude", "all", observed), *sets]:
        key = {"criterion": criterion, "modification": "zero", "k": 3, "selected_by": by}
        after = {"correct_before": 80, "correct_after": 80 + images}
        rows += [{**key, "split": "train", "group": group, "n": n, **after}]
    return trace_neurons.control_test(rows, "magnitude", GROUPS, SimpleNamespace(controls=controls))


NULL = [*range(-10, 10), *[0] * 19]


@pytest.mark.parametrize(
    "observed,null,beats,words",
    [
        (-30, NULL, True, "? yes: G1* -30.0 points (-30 of 100) against -0.3 for random ones of"),
        (-5, NULL, False, "? no: G1* -5.0 points"),
        (0, NULL, False, "? no: G1* +0.0 points"),
        (30, NULL, False, "? no: G1* +30.0 points"),
        # Where random sets only gain, a loss of one image is as rare as one of thirty
        (-1, [0, 1] * 20, False, "(-1 of 100), rare but within 2 images of what random ones lose,"),
        (-2, [0, 1] * 20, False, "(-2 of 100), rare but within 2 images"),
        (-3, [0, 1] * 20, True, "? yes: "),
        # Where random sets lose 20 each, the rest counts
        (-22, [-20] * 40, False, "rare but within 2 images"),
        (-23, [-20] * 40, True, "? yes: "),
    ],
)
def test_verdict(observed, null, beats, words):
    found = compared(observed, null)
    assert found["beats"] == {1: beats} and words in found["sentence"]
    assert len(found["tests"]) == 2 and found["tests"][0]["mean"] == pytest.approx(np.mean(null))


def test_verdict_without_or_in_part():
    assert "not compared with random neurons" in compared(-30, NULL, controls=0)["sentence"]
    found = {j: compared(lost, NULL, group=j) for j, lost in ((1, -30), (2, 0))}
    beats, tests = {1: True, 2: False}, found[1]["tests"] + found[2]["tests"]
    assert "? only for G1*: G1* -30.0" in trace_neurons.verdict("magnitude", beats, tests, 3)


def test_p_values_are_uniform_under_the_null():
    """By hand: as low or lower, the observed set counted in. Then 4000 sets like the random ones"""
    assert trace_neurons.p_value(-5, [-6, -5, -4, 7]) == 3 / 5
    draws = np.random.default_rng(0).standard_normal((4000, 41))
    p = np.array([trace_neurons.p_value(row[0], row[1:]) for row in draws])
    for level in (0.05, 0.25, 0.5, 0.9):
        assert (p <= level).mean() == pytest.approx(math.floor(41 * level) / 41, abs=0.025)
    assert 0.04 < (p <= 0.05).mean() < 0.06


@pytest.mark.parametrize("sets", [40, 400])
def test_printed_ranges_hold_95_percent(sets):
    """Of the random sets themselves; where there are many, of further ones too."""
    rng = np.random.default_rng(sets)
    for _ in range(20):
        null = rng.normal(-200, 50, sets).tolist()
        for test in compared(0, null, n=1000)["tests"]:
            own = [test["low"] <= images / 10 <= test["high"] for images in null]
            assert 0.93 <= np.mean(own) <= 0.97
            further = rng.normal(-20, 5, 4000)
            inside = np.mean((test["low"] <= further) & (further <= test["high"]))
            assert sets < 400 or inside == pytest.approx(0.95, abs=0.04)


# ---- parts by hand ----


def test_random_modifications_are_made_where_they_are_shown():
    args = trace_neurons.parse_args([])
    keys = (("magnitude", "all"), ("gradient", 0), ("gradient", 1))
    ranked = {key: [("conv1", i) for i in range(10)] for key in keys}
    draws = 3 * 3 * 10  # sigmas, ks, repeats
    planned = {name: trace_neurons.plan(args, ranked, name) for name in ("train", "test")}
    found = {}
    for name, variants in planned.items():
        found[name] = [(key[0], key[1], key[5], variant.groups) for key, variant in variants]
        assert found[name].count(("gradient", "zero", 0, None)) == 5
        assert found[name].count(("magnitude", "zero", "all", None)) == 5
        assert found[name].count(("gradient", "random-noise", 1, (1,))) == draws
    assert found["train"].count(("gradient", "random-init", 1, (1,))) == draws
    assert found["train"].count(("magnitude", "random-noise", "all", None)) == draws
    assert len(found["train"]) == 3 * (5 + 2 * draws) and len(found["test"]) == 3 * 5 + 2 * draws
    # The same noise for every k, sigma and criterion, another one for every repeat
    seeds = {(key[4], variant.seed) for key, variant in planned["train"] if key[1] != "zero"}
    assert len(seeds) == 10 == len({seed for _, seed in seeds})


def test_numbers_by_hand():
    row = {"correct_before": 88, "correct_after": 66, "n": 184}
    assert trace_neurons.change(row) == pytest.approx(-11.9565, abs=1e-4)  # the paper's 11.96
    other = {"correct_before": 88, "correct_after": 90, "n": 184}
    found = trace_neurons.averages([[row, other], []])
    assert found == {"points": [pytest.approx(100 * -10 / 184), None], "images": [-10, None]}
    scores = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([5.0, 2.0, 3.0])}
    found = trace_neurons.percentile([("a", 0), ("b", 0), ("b", 2), ("a", 1), ("b", 1)], scores)
    assert found.tolist() == [0, 100, 75, 37.5, 37.5]  # of places 0 to 4
    heat = np.array([[0.0, 0, 0], [-10, 0, 5], [0, 0, 0], [0, -5, 0]])
    summary = structured_trace.summarize_layers(heat, ["a", "b", "c"], GROUPS)
    assert summary["groups"][1] == {"group": 1, "mean": -5 / 3, "largest": -10, "layer": "a"}
    assert summary["thirds"] == {"first": 10 / 15, "middle": 0, "last": 5 / 15}  # G3 is no minority


# ---- refused, and nothing written ----

BOTH = (trace_neurons, structured_trace)
ALIKE = ["--max-per-group 0", "--batch-size 0", "--device nonsense", "--seed -1"]
REFUSED = [(script, flag, flag) for script in BOTH for flag in ALIKE]
REFUSED += [(structured_trace, "--k 0", "--k 0"), (trace_neurons, "--repeats 0", "--repeats 0")]
for flag in ("--sigma inf", "--sigma nan"):
    REFUSED += [(trace_neurons, flag, flag), (trace_neurons, f"{flag} 0.01", "must be positive")]
for more in ("0 3", "3 232"):
    REFUSED += [(trace_neurons, f"--top-k {more}", "expected 1 to 231, all neurons")]
for more in (5, -1):
    REFUSED += [(trace_neurons, f"--controls {more}", "fewer than 19 sets cannot give p <= 0.05")]
REFUSED += [(trace_neurons, "--sigma 0.01 0", "noise of 0 does nothing")]


@pytest.mark.parametrize("script,more,words", REFUSED)
def test_refused_settings(on_planted, tmp_path, script, more, words):
    with pytest.raises(common.BadInput, match=words):
        trace(script, tmp_path, more)
    assert not [*tmp_path.iterdir()]


def test_refused_files(on_planted, tmp_path):
    for script, name in zip(BOTH, ("trace", "structured")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
        with pytest.raises(common.BadInput, match=f"{name}/notes.txt is not of this stage"):
            trace(script, tmp_path)
        assert (tmp_path / name / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("script", BOTH)
def test_no_checkpoint(tmp_path, script):
    with pytest.raises(common.BadInput, match="erm/best.pt: no such file; train_erm.py and"):
        trace(script, tmp_path)
    assert not [*tmp_path.iterdir()]
