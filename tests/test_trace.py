"""trace_neurons.py and structured_trace.py: a planted filter, slow second ways, the control."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

import common
import structured_trace
import trace_neurons
from trace_neurons import pick

COUNTS = (24, 9, 8, 24)
GROUPS = common.describe_groups(*common.NAMES["waterbirds"], COUNTS)  # G1 and G2 are minorities
SHARED = "--max-per-group 0,--batch-size 0,--device nonsense,--seed -1"
OWN = "--repeats 0,--sigma inf,--sigma nan 0.01,--sigma 0.01 0,--top-k 0 3,--top-k 3 214"
OWN += ",--controls 38,--controls -1"
REFUSED = [(trace_neurons, more) for more in f"{SHARED},{OWN}".split(",")]
REFUSED += [(structured_trace, more) for more in f"{SHARED},--k 0".split(",")]


@pytest.fixture
def on_planted(monkeypatch):
    """Images that name their group, and a network of 213 filters: number 12 alone carries the
    answer for group 2, six that for group 3, of which half may go; the others see nothing."""
    g = torch.repeat_interleave(torch.arange(4), torch.tensor(COUNTS))
    split = TensorDataset(torch.eye(4)[g, 1:, None, None], g // 2, g, torch.arange(len(g)))
    split.y, split.g = g // 2, g
    filters, head = torch.zeros(213, 3, 1, 1), torch.zeros(2, 213)
    filters[:6, 2], filters[12, 1], head[1, :6], head[1, 12] = 1, 2, 1, 1
    conv, linear = torch.nn.Conv2d(3, 213, 1, bias=False), torch.nn.Linear(213, 2)
    conv.weight.data, linear.weight.data, linear.bias.data = filters, head, torch.tensor([0.0, -1])
    model = torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.Flatten(), linear)
    table, about = SimpleNamespace(source="planted", groups=GROUPS), {"arch": "planted", "epoch": 1}
    monkeypatch.setattr(common, "reopen", lambda *_: (model, about, table))
    monkeypatch.setattr(common, "open_split", lambda *_: split)
    monkeypatch.setattr(common, "save_figure", lambda fig, path, dpi=0: path.touch())


def trace(script, run, more=""):
    args = script.parse_args(f"--run {run} --device cpu --workers 0 {more}".split())
    with common.machine(args):
        script.main(args)


def read(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_the_planted_filter_is_found(on_planted, tmp_path):
    trace(trace_neurons, tmp_path, "--top-k 1 3 --repeats 2")
    neurons, rows = (read(tmp_path / f"trace/{name}.csv") for name in ("neurons", "accuracy"))
    for wanted in ({"criterion": "magnitude"}, {"criterion": "gradient", "selected_by": "2"}):
        first = {"layer": "0", "index": "12", "magnitude_percentile": "100.0"}
        assert pick(neurons, **wanted, rank="1")[0].items() >= first.items()
        zeroed = pick(rows, **wanted, modification="zero", k="1")
        assert [int(row["correct_after"]) for row in zeroed] == 2 * [24, 9, 0, 24]  # train, test
    for control in common.read_json(tmp_path / "trace/results.json")["control"].values():
        assert control["beats"] == {"1": False, "2": True}
        assert "random ones? only for G2*" in control["sentence"]
        for test in pick(control["tests"], group=2):
            assert test["observed"] == -100 and test["p"] <= 2 / 41 and test["sets"] == 40
    trace(structured_trace, tmp_path)
    found = read(tmp_path / "structured/layers.csv")
    assert [float(row["change_percent"]) for row in found[:8]] == 2 * [0, 0, -100, 0]
    assert len(found) == 28 and {row["criterion"] for row in found[8:]} == {"random"}
    summary = common.read_json(tmp_path / "structured/results.json")["summary"]["gradient"]
    assert summary["groups"][2] == {"group": 2, "mean": -100, "largest": -100, "layer": "0"}


@pytest.mark.parametrize("samples,seen", [("group", [4, 9, 8, 4]), ("worst", [24, 9, 8, 24])])
def test_images_of_the_gradient(on_planted, tmp_path, monkeypatch, samples, seen):
    """'worst' draws from all images of a group, whatever is traced; minorities are traced whole."""
    counts = []

    def spy(model, batches, unit):
        counts.append(torch.cat([g for _, _, g, _ in batches]).bincount().tolist())
        return common.magnitude_scores(model, unit)

    monkeypatch.setattr(common, "gradient_scores", spy)
    trace(trace_neurons, tmp_path, f"--gradient-samples {samples} --max-per-group 4 --top-k 5")
    assert counts == [*(j * [0] + [n] for j, n in enumerate(seen)), [4, 9, 8, 4]]


def test_an_old_folder_stands(on_planted, tmp_path, monkeypatch):
    """After a crash in the middle, and where somebody else's file lies in it."""
    few, notes = "--controls 0 --top-k 5", tmp_path / "trace/notes.txt"  # no k that a figure shows
    trace(trace_neurons, tmp_path, few)
    before = {p: p.read_bytes() for p in tmp_path.glob("trace/*")}
    monkeypatch.setattr(trace_neurons, "plot_layers", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trace(trace_neurons, tmp_path, few)
    notes.write_text("mine")
    with pytest.raises(common.BadInput, match="trace/notes.txt is not of this stage"):
        trace(trace_neurons, tmp_path, few)
    assert {p: p.read_bytes() for p in tmp_path.glob("trace/*")} == {**before, notes: b"mine"}


@pytest.fixture(scope="module", params=["test_resnet", "test_vit"])
def traced(erm_run, tmp_path_factory, request):
    """Model, batch of each split and folder of both traces: that of erm_run, and a transformer."""
    folder, checkpoint = tmp_path_factory.mktemp(request.param), erm_run / "run/erm/best.pt"
    if request.param == "test_vit":
        torch.manual_seed(0)
        other = {"arch": "test_vit", "model": common.build_model("test_vit", 2, 32).state_dict()}
        torch.save({**common.load_checkpoint(checkpoint), **other}, folder / "vit.pt")
        checkpoint = folder / "vit.pt"
    flags = f"--checkpoint {checkpoint} --seed 5"
    more = "--repeats 2 --controls 39 --sigma 0.3 0.1 --top-k 1 3 5"
    trace(trace_neurons, folder, f"{flags} {more}")
    trace(structured_trace, folder, flags)
    (model, saved, table), splits = common.reopen(checkpoint), {}
    for name in ("train", "test"):
        batch = next(iter(common.make_loader(common.open_split(saved, table, name))))
        splits[name] = common.on_device(model, *batch[:3])
    return model, splits, folder


def neurons_of(layers, k, unit):
    """The k largest norms over all layers, by a plain sort; {layer: weight or its gradient}."""
    norms = []
    for layer, value in layers.items():
        parts = value.detach().reshape(len(value) if unit == "channel" else value.numel(), -1)
        norms += [(-norm, layer, i) for i, norm in enumerate(parts.norm(dim=1).tolist())]
    return [(layer, i) for _, layer, i in sorted(norms)[:k]]


def test_neurons_and_counts(traced):
    model, splits, folder = traced
    right = {name: model(x).argmax(1) == y for name, (x, y, _) in splits.items()}
    results = common.read_json(folder / "trace/results.json")
    unit, layers = results["unit"], common.prunable_layers(model)
    assert unit == ("weight" if results["arch"] == "test_vit" else "channel")
    assert results["listed"] == max(5, np.ceil(1e-4 * results["neurons"]))
    x, y, g = splits["train"]
    expected, ranked = {("magnitude", "all"): layers}, {}
    for j in range(4):
        loss = -model(x[g == j]).log_softmax(1)[range(sum(g == j)), y[g == j]].mean()
        gradients = torch.autograd.grad(loss, list(layers.values()))
        expected["gradient", str(j)] = dict(zip(layers, gradients))
    for (criterion, by), values in expected.items():
        found = pick(read(folder / "trace/neurons.csv"), criterion=criterion, selected_by=by)
        ranked[criterion, by] = neurons_of(values, results["listed"], unit)
        assert ranked[criterion, by] == [(row["layer"], int(row["index"])) for row in found]
    rows = [row for row in read(folder / "trace/accuracy.csv") if row["criterion"] != "random"]
    zeroed, draws = 2 * 3 * 5 * 4, 2 * 2 * 2  # splits, k, sets, groups; repeats, sigmas, k up to 3
    assert len(rows) == zeroed + draws * (2 * (4 + 4) + 4)  # both kinds in train, one in test
    noise = {(row["criterion"], row["modification"]) for row in pick(rows, split="test", k="1")}
    assert noise == {("magnitude", "zero"), ("gradient", "zero"), ("gradient", "random-noise")}
    layered = pick(read(folder / "structured/layers.csv"), criterion="magnitude")
    assert len(layered) == 4 * len(layers)
    for row in rows[::3] + layered:  # at least one of the four groups of each zeroed set
        k, seed = int(row["k"]), common.seed_of(5, int(row.get("repeat") or 0))
        chosen = ranked[row["criterion"], row["selected_by"]][:k]
        if "layer" in row:
            chosen = neurons_of({row["layer"]: layers[row["layer"]]}, k, unit)
            points = 100 * (int(row["correct_after"]) - int(row["correct_before"])) / int(row["n"])
            assert float(row["change_percent"]) == pytest.approx(points, abs=1e-4)
        how = (row.get("modification", "zero"), float(row.get("sigma") or 0), seed)
        x, y, g = splits[row.get("split", "train")]
        counts = [torch.ones(len(y)), right[row.get("split", "train")]]
        with torch.no_grad(), common.modified(model, chosen, *how, unit=unit):
            counts.append(model(x).argmax(1) == y)
        n, before, after = (int(count[g == int(row["group"])].sum()) for count in counts)
        assert [int(row[key]) for key in common.COUNTS[:3]] == [n, before, after]
        assert int(row["to_right"]) - int(row["to_wrong"]) == after - before


def test_tables_and_figures(traced):
    """Each group under its own neurons; the matrix has all of them."""
    gained, folder, groups = {}, traced[2], "0123"
    wanted = {"criterion": "gradient", "modification": "zero", "k": "3", "split": "train"}
    for row in pick(read(folder / "trace/accuracy.csv"), **wanted):
        gained[row["selected_by"], row["group"]] = int(row["to_right"]) - int(row["to_wrong"])
    tables = pick(common.read_json(folder / "trace/results.json")["tables"], split="train")
    lines = {(t["table"], t["line"]): t["images"] for t in tables}
    assert lines["Table 11", "gradient zero top 3"] == [gained[j, j] for j in groups]
    for j in groups:
        assert lines["Matrix", f"gradient of G{j}"] == [gained[j, i] for i in groups]
    figures = [*folder.glob("*/*.png")]
    assert len(figures) == 8  # 2 to 5, 7, 8, 11, 12
    for path in figures:
        with Image.open(path) as image:
            assert min(image.size) > 200 and np.asarray(image.convert("L")).std() > 5, path


def compared(observed, null, same_layers, controls=40):
    """What control_test says of magnitude's set and the two kinds of random ones, by images."""
    key = {"modification": "zero", "k": 3, "split": "train", "group": 1, "n": 100}
    key |= {"correct_before": 80, "criterion": "magnitude", "selected_by": "all"}
    rows = [{**key, "correct_after": 80 + observed}]
    for kind, gained in (("all layers", null), ("layers of magnitude all", same_layers)):
        key |= {"criterion": "random", "selected_by": kind}
        rows += [{**key, "correct_after": 80 + images} for images in gained]
    return trace_neurons.control_test(rows, "magnitude", GROUPS, SimpleNamespace(controls=controls))


NULL, GAIN, LOSE = [*range(-10, 10), *[0] * 19], [0, 1] * 20, [-20] * 40
OFTEN = [-31] * 3 + [0] * 37  # p = 4 / 41 for -30
YES, NO, RARE = "ones? yes", "ones? no", "? no; G1*: rare, but within 2 images of what random ones"
CASES = [(-30, NULL, NULL, YES), (-30, NULL, OFTEN, NO), (-30, OFTEN, NULL, NO)]
CASES += [(-5, NULL, NULL, NO), (30, NULL, NULL, NO)]
CASES += [(-2, GAIN, GAIN, RARE), (-3, GAIN, GAIN, YES)]  # where a loss of one image is rare
CASES += [(-22, LOSE, LOSE, RARE), (-23, LOSE, LOSE, YES)]  # the rest counts


@pytest.mark.parametrize("observed,null,same_layers,words", CASES)
def test_verdict(observed, null, same_layers, words):
    found = compared(observed, null, same_layers)
    assert found["beats"] == {1: words == YES} and words in found["sentence"]


def test_p_values_and_printed_ranges_under_the_null():
    """1,000 traces in which the observed set is just one more random one."""
    rng, p, inside = np.random.default_rng(0), [], []
    for observed, *null in rng.normal(-2e4, 5e3, (1000, 41)).astype(int).tolist():
        test = compared(observed, null, null)["tests"][0]
        p.append(test["p"])
        inside.append(test["low"] <= test["observed"] <= test["high"])
    assert 0.93 <= np.mean(inside) <= 0.97
    for level in (0.05, 0.25, 0.5, 0.9):
        assert np.mean(np.array(p) <= level) == pytest.approx(int(41 * level) / 41, abs=0.04)


def test_numbers_by_hand():
    assert trace_neurons.p_value(-5, [-6, -5, -4, 7]) == 3 / 5  # as low or lower, itself counted in
    (test, _) = compared(0, range(39), range(39))["tests"]  # a 40th is outside once in 20 times
    assert [test[key] for key in ("low", "mean", "high")] == pytest.approx([0, 19, 38])
    assert "not compared with random" in compared(-30, NULL, NULL, controls=0)["sentence"]
    row = {"correct_before": 88, "correct_after": 66, "n": 184}
    assert trace_neurons.change(row) == pytest.approx(-11.9565, abs=1e-4)  # the paper's 11.96
    found = trace_neurons.averages([[row, {**row, "correct_after": 90}], []])
    assert found == {"points": [pytest.approx(100 * -10 / 184), None], "images": [-10, None]}
    scores = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([5.0, 2.0, 3.0])}
    found = trace_neurons.percentile([("a", 0), ("b", 0), ("b", 2), ("a", 1), ("b", 1)], scores)
    assert found.tolist() == [0, 100, 75, 37.5, 37.5]  # of places 0 to 4
    heat = np.array([[0.0, 0, 0], [-10, 0, 5], [0, 0, 0], [0, -5, 0]])
    summary = structured_trace.summarize_layers(heat, ["a", "b", "c"], GROUPS)
    assert summary["groups"][1] == {"group": 1, "mean": -5 / 3, "largest": -10, "layer": "a"}
    assert summary["thirds"] == {"first": 10 / 15, "middle": 0, "last": 5 / 15}  # G3 is no minority


@pytest.mark.parametrize("script,more", REFUSED)
def test_refused_settings(on_planted, tmp_path, script, more):
    with pytest.raises(common.BadInput, match=f"^{more.split()[0]}"):
        trace(script, tmp_path, more)
    assert not [*tmp_path.iterdir()]
