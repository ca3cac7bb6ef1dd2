"""trace_neurons.py and structured_trace.py: a planted filter, slow second ways, the control."""

import copy
import csv
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.data import TensorDataset

import common
import structured_trace
import trace_neurons
from trace_neurons import pick

COUNTS = (24, 9, 8, 24)
CLASSES = ("landbird", "waterbird")
PLACES = ("on land", "on water")
GROUPS = common.describe_groups(CLASSES, PLACES, COUNTS)  # G1 and G2 are minorities


@pytest.fixture
def on_planted(monkeypatch):
    """Images that name their group, and a network of 213 filters: number 12 alone carries the
    answer for group 2, six that for group 3, of which half may go; the others see nothing. Figures
    are made but not drawn."""
    g = torch.repeat_interleave(torch.arange(4), torch.tensor(COUNTS))
    x = (255 * torch.eye(4)[g, 1:, None, None]).to(torch.uint8)
    split = TensorDataset(x, g // 2, g, torch.arange(len(g)))
    split.y = g // 2
    split.g = g
    split.mean = [0.0, 0.0, 0.0]
    split.std = [1.0, 1.0, 1.0]
    filters = torch.zeros(213, 3, 1, 1)
    filters[:6, 2] = 1
    filters[12, 1] = 2
    head = torch.zeros(2, 213)
    head[1, :6] = 1
    head[1, 12] = 1
    conv = torch.nn.Conv2d(3, 213, 1, bias=False)
    conv.weight.data = filters
    linear = torch.nn.Linear(213, 2)
    linear.weight.data = head
    linear.bias.data = torch.tensor([0.0, -1])
    model = torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.Flatten(), linear)
    table = SimpleNamespace(source="planted", groups=GROUPS)
    erm = {"id": "planted", "settings": {"seed": 3}}
    about = {"arch": "planted", "epoch": 1, "erm": erm, "data": {"labels": "planted"}}
    monkeypatch.setattr(common, "reopen", lambda *_: (model, about, table))
    monkeypatch.setattr(common, "open_split", lambda *_: split)
    monkeypatch.setattr(Figure, "savefig", lambda _, buffer, **__: buffer.write(b"a figure"))


def trace(script, run, more=""):
    args = script.parse_args(f"--run {run} --device cpu --workers 0 {more}".split())
    with common.machine(args):
        script.main(args)


def read(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("by", ["magnitude", "gradient"])
def test_the_planted_filter_is_found(on_planted, tmp_path, by):
    trace(trace_neurons, tmp_path, "--top-k 1 3 --repeats 2")
    wanted = {"criterion": by, "selected_by": "all" if by == "magnitude" else "2"}
    (first,) = pick(read(tmp_path / "trace/neurons.csv"), **wanted, rank="1")
    assert (first["parameter"], first["index"]) == ("0.weight", "12")
    assert first["magnitude_percentile"] == "100.0"
    zeroed = pick(read(tmp_path / "trace/accuracy.csv"), **wanted, modification="zero", k="1")
    for split in ("train", "test"):
        found = [(row["group"], row["correct_after"]) for row in pick(zeroed, split=split)]
        assert found == [("0", "24"), ("1", "9"), ("2", "0"), ("3", "24")]
    control = common.read_json(tmp_path / "trace/results.json")["control"]
    tests = pick(control, criterion=by)
    assert [test["more"] for test in tests] == [False, False, True, True]  # two of G1, two of G2
    for test in pick(tests, group=2):
        assert test["observed"] == -100
        assert test["p"] <= 2 / 41
        assert test["sets"] == 40


def test_the_seed_is_that_of_training(on_planted, tmp_path):
    """So that several trainings do not draw the same random neurons."""
    trace(structured_trace, tmp_path)
    args = common.read_json(tmp_path / "structured/args.json")["args"]
    assert args["seed"] == 3
    before = (tmp_path / "structured/layers.csv").read_text()
    trace(structured_trace, tmp_path, "--seed 4 --max-per-group 9")
    trace(structured_trace, tmp_path, "--seed 3")
    assert (tmp_path / "structured/layers.csv").read_text() == before


def test_the_planted_filter_is_found_in_its_layer(on_planted, tmp_path):
    trace(structured_trace, tmp_path)
    rows = read(tmp_path / "structured/layers.csv")
    for criterion in ("magnitude", "gradient"):
        found = [float(row["change_percent"]) for row in pick(rows, criterion=criterion)]
        assert found == [0, 0, -100, 0]
    assert len(pick(rows, criterion="random")) == 5 * 4
    summary = common.read_json(tmp_path / "structured/results.json")["summary"]["gradient"]
    assert summary["groups"][2] == {
        "group": 2,
        "mean": -100,
        "largest": -100,
        "layer": "0.weight",
    }


def test_a_further_criterion_is_one_line(on_planted, tmp_path, monkeypatch):
    """Weight times gradient: of group 3 the six filters that see it, and the first of them first,
    though number 12 has the largest weight."""
    monkeypatch.setitem(common.CRITERIA, "product", lambda z, v: z * v)
    trace(trace_neurons, tmp_path, "--top-k 3 --repeats 1 --sigma 0.01")
    neurons = read(tmp_path / "trace/neurons.csv")
    found = pick(neurons, criterion="product", selected_by="3")
    assert [row["index"] for row in found] == ["0", "1", "2"]
    assert {row["product_percentile"] for row in found} == {"98.8208"}  # places 207 to 212 of 212
    results = common.read_json(tmp_path / "trace/results.json")
    assert len(results["ranks"]) == 6
    tests = pick(results["control"], criterion="product")
    assert [test["more"] for test in tests] == [False, False, True, True]
    trace(structured_trace, tmp_path)
    summary = common.read_json(tmp_path / "structured/results.json")["summary"]
    assert summary["product"]["groups"][2]["mean"] == -100


@pytest.mark.parametrize("samples,seen", [("group", [4, 9, 8, 4]), ("worst", [24, 9, 8, 24])])
def test_images_of_the_gradient(on_planted, tmp_path, monkeypatch, samples, seen):
    """'worst' draws from all images of a group, whatever is traced; minorities are traced whole."""
    counts = []
    mean_gradient = common.mean_gradient

    def spy(*args):
        *others, batches = args
        batches = list(batches)
        groups = torch.cat([g for _, _, g, _ in batches])
        counts.append(groups.bincount(minlength=4).tolist())
        return mean_gradient(*others, batches)

    monkeypatch.setattr(common, "mean_gradient", spy)
    trace(trace_neurons, tmp_path, f"--gradient-samples {samples} --max-per-group 4 --controls 0")
    expected = []
    for j, n in enumerate(seen):
        expected.append([n if group == j else 0 for group in range(4)])
    assert counts == [*expected, [4, 9, 8, 4]]


@pytest.mark.parametrize(
    "script,plot,few,csv_file",
    [
        (trace_neurons, "plot_layers", "--repeats 1 --sigma 0.01 --controls 0", "accuracy.csv"),
        (structured_trace, "plot_heat", "--controls 1", "layers.csv"),
    ],
)
def test_numbers_do_not_wait_for_figures(
    on_planted, tmp_path, monkeypatch, script, plot, few, csv_file
):
    other = f"{few} --max-per-group 5"
    trace(script, tmp_path, few)
    (folder,) = tmp_path.iterdir()
    (folder / "notes.txt").write_text("mine")
    before = contents(folder)
    figures = {name for name in before if name.endswith(".png")}
    assert set(script.FILES) == set(before) - {".lock", "notes.txt"}

    # A crash while it computes: the old trace stands
    with monkeypatch.context() as crash:
        crash.setattr(common, "count_right", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trace(script, tmp_path, other)
    assert contents(folder) == before

    # A figure that fails: its numbers stand, and no figure of the old ones beside them
    with monkeypatch.context() as crash:
        crash.setattr(script, plot, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trace(script, tmp_path, other)
    numbers = contents(folder)
    assert set(numbers) == set(before) - figures
    assert numbers["args.json"] != before["args.json"]
    assert numbers[csv_file] != before[csv_file]

    # The same command again
    trace(script, tmp_path, other)
    after = contents(folder)
    assert set(after) == set(before)
    assert {name: after[name] for name in numbers} == numbers
    assert after["notes.txt"] == b"mine"


@pytest.fixture(scope="module", params=["test_resnet", "test_vit"])
def traced(erm_run, tmp_path_factory, request):
    """Model, batch of each split and folder of both traces: that of erm_run, and a transformer, of
    which no figures are drawn."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = erm_run / "run/erm/best.pt"
    if request.param == "test_vit":
        torch.manual_seed(0)
        other = {
            **common.load_checkpoint(checkpoint),
            "arch": "test_vit",
            "model": common.build_model("test_vit", 2, 32).state_dict(),
        }
        checkpoint = folder / "vit.pt"
        torch.save(other, checkpoint)
    flags = f"--checkpoint {checkpoint} --seed 5"
    more = "--repeats 2 --controls 39 --sigma 0.3 0.1 --top-k 5 3 2 1"
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "test_vit":
            patch.setattr(Figure, "savefig", lambda *_, **__: None)
        trace(trace_neurons, folder, f"{flags} {more}")
        trace(structured_trace, folder, flags)
    model, saved, table = common.reopen(checkpoint)
    splits = {}
    for name in ("train", "test"):
        (batch,) = common.Batches(common.open_split(saved, table, name))
        splits[name] = batch[:3]
    return model, splits, folder


def largest(values, k, unit):
    """The k largest norms over all parameters {name: weight or its gradient}, by a plain sort."""
    norms = []
    for layer, value in enumerate(values.values()):
        n = len(value) if unit == "channel" else value.numel()
        rows = value.detach().reshape(n, -1)
        norms += [(-norm, layer, i) for i, norm in enumerate(rows.norm(dim=1).tolist())]
    names = list(values)
    return [(names[layer], i) for _, layer, i in sorted(norms)[:k]]


def changed(model, neurons, how, sigma, seed, unit):
    """A copy of the model with changed neurons."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for name, index in neurons:
        weight = model.get_parameter(name).data
        if unit == "weight":
            weight = weight.view(-1)
        noise = sigma * torch.randn(weight[index].shape, generator=generator)
        if how == "zero":
            weight[index] = 0
        elif how == "random-init":
            weight[index] = noise
        else:
            weight[index] += noise
    return model


@pytest.fixture(scope="module")
def critical(traced):
    """The sets of neurons by the slow way, {(criterion, by): neurons}, and the unit."""
    model, splits, folder = traced
    results = common.read_json(folder / "trace/results.json")
    weights = common.prunable_weights(model)
    x, y, g = splits["train"]
    values = {("magnitude", "all"): weights}
    for j in range(4):
        log_p = model(x[g == j]).log_softmax(1)
        loss = -log_p[range(len(log_p)), y[g == j]].mean()
        gradients = torch.autograd.grad(loss, list(weights.values()))
        values["gradient", str(j)] = dict(zip(weights, gradients, strict=True))
    sets = {}
    for key, of_set in values.items():
        sets[key] = largest(of_set, results["listed"], results["unit"])
    return sets, results["unit"]


def test_neurons(traced, critical):
    _, _, folder = traced
    sets, unit = critical
    results = common.read_json(folder / "trace/results.json")
    assert unit == ("weight" if results["arch"] == "test_vit" else "channel")
    assert results["listed"] == max(5, np.ceil(1e-4 * results["neurons"]))
    rows = read(folder / "trace/neurons.csv")
    for (criterion, by), expected in sets.items():
        found = pick(rows, criterion=criterion, selected_by=by)
        assert [(row["parameter"], int(row["index"])) for row in found] == expected
    assert len(rows) == 5 * results["listed"]


def assert_counts(row, model, other, split):
    """The counts of a row, by a pass of the model as it is and of the changed one."""
    x, y, g = split
    member = g == int(row["group"])
    with torch.no_grad():
        before = model(x[member]).argmax(1) == y[member]
        after = other(x[member]).argmax(1) == y[member]
    expected = {
        "n": len(before),
        "correct_before": before.sum().item(),
        "correct_after": after.sum().item(),
        "to_wrong": (before & ~after).sum().item(),
        "to_right": (~before & after).sum().item(),
    }
    assert {key: int(row[key]) for key in expected} == expected


def test_counts_of_the_trace(traced, critical):
    model, splits, folder = traced
    sets, unit = critical
    rows = read(folder / "trace/accuracy.csv")
    rows = [row for row in rows if row["criterion"] != "random"]
    zeroed = 2 * 4 * 5 * 4  # splits, k, sets, groups
    draws = 2 * 2 * 3  # repeats, sigmas, the three smallest k
    assert len(rows) == zeroed + draws * (2 * (4 + 4) + 4)  # both kinds in train, one in test
    noise = {(row["criterion"], row["modification"]) for row in pick(rows, split="test", k="1")}
    assert noise == {("magnitude", "zero"), ("gradient", "zero"), ("gradient", "random-noise")}
    assert {row["modification"] for row in pick(rows, k="5")} == {"zero"}
    # The control has as many neurons as the largest of the three
    control = pick(read(folder / "trace/accuracy.csv"), criterion="random")
    assert {row["k"] for row in control} == {"3"}
    for row in rows[::7]:
        chosen = sets[row["criterion"], row["selected_by"]][: int(row["k"])]
        sigma = float(row["sigma"] or 0)
        seed = common.seed_of(5, int(row["repeat"] or 0))
        other = changed(model, chosen, row["modification"], sigma, seed, unit)
        assert_counts(row, model, other, splits[row["split"]])


def test_counts_of_the_layers(traced, critical):
    model, splits, folder = traced
    _, unit = critical
    weights = common.prunable_weights(model)
    rows = pick(read(folder / "structured/layers.csv"), criterion="magnitude")
    assert len(rows) == 4 * len(weights)
    for row in rows[::3]:
        name = row["parameter"]
        assert row["k"] == "3"
        chosen = largest({name: weights[name]}, 3, unit)
        assert_counts(row, model, changed(model, chosen, "zero", 0, 0, unit), splits["train"])
        points = 100 * (int(row["correct_after"]) - int(row["correct_before"])) / int(row["n"])
        assert float(row["change_percent"]) == pytest.approx(points, abs=1e-4)
    # Of a group's own gradient, on its own images
    x, y, g = splits["train"]
    for j in range(4):
        loss = F.cross_entropy(model(x[g == j]), y[g == j])
        v = torch.autograd.grad(loss, list(weights.values()))
        gradients = dict(zip(weights, v, strict=True))
        rows = pick(read(folder / "structured/layers.csv"), criterion="gradient", group=str(j))
        assert len(rows) == len(weights)
        for row in rows[::3]:
            chosen = largest({row["parameter"]: gradients[row["parameter"]]}, 3, unit)
            assert row["selected_by"] == str(j)
            assert_counts(row, model, changed(model, chosen, "zero", 0, 0, unit), splits["train"])


@pytest.mark.parametrize("traced", ["test_resnet"], indirect=True)
def test_random_neurons_of_the_layers(traced):
    """The mean of several sets, which are not one and the same."""
    _, _, folder = traced
    rows = pick(read(folder / "structured/layers.csv"), criterion="random")
    results = common.read_json(folder / "structured/results.json")
    summary = results["summary"]["random"]
    changes = {}
    for row in rows:
        changes.setdefault(row["group"], []).append(float(row["change_percent"]))
    for j, of_group in changes.items():
        assert summary["groups"][int(j)]["mean"] == pytest.approx(np.mean(of_group))
    # Shares are those of the sizes of single sets, and not of their mean
    first_third = np.array_split(results["layers"], 3)[0]
    total = 0
    first = 0
    for row in rows:
        if results["groups"][int(row["group"])]["minority"]:
            total += abs(float(row["change_percent"]))
            first += abs(float(row["change_percent"])) * (row["parameter"] in first_third)
    assert summary["thirds"]["first"] == pytest.approx(first / total)
    of_layers = {(row["parameter"], row["group"]) for row in rows}
    different = {(row["parameter"], row["group"], row["change_percent"]) for row in rows}
    assert len(different) > len(of_layers)


def test_changes(traced):
    """Each group under its own neurons; where they are zeroed, under those of the others, too."""
    _, _, folder = traced
    rows = read(folder / "trace/accuracy.csv")
    changes = common.read_json(folder / "trace/results.json")["changes"]
    gained = {}
    wanted = {"criterion": "gradient", "modification": "zero", "split": "train"}
    for row in pick(rows, **wanted, k="3"):
        images = int(row["to_right"]) - int(row["to_wrong"])
        gained[row["selected_by"], row["group"]] = images
    (own,) = pick(changes, **wanted, k=3, selected_by="own")
    assert own["images"] == {j: gained[j, j] for j in "0123"}
    for j in range(4):
        (line,) = pick(changes, **wanted, k=3, selected_by=j)
        assert line["images"] == {i: gained[str(j), i] for i in "0123"}

    # The mean over two draws of noise
    wanted = {"criterion": "magnitude", "modification": "random-init", "split": "train"}
    draws = pick(rows, **wanted, k="1", sigma="0.1", group="2")
    assert len(draws) == 2
    points = [100 * (int(row["to_right"]) - int(row["to_wrong"])) / int(row["n"]) for row in draws]
    (line,) = pick(changes, **wanted, k=1, sigma=0.1)
    assert line["points"]["2"] == pytest.approx(sum(points) / 2)


@pytest.mark.parametrize("traced", ["test_resnet"], indirect=True)
def test_figures(traced):
    _, _, folder = traced
    figures = [*folder.glob("*/*.png")]
    assert len(figures) == 8  # 2 to 5, 7, 8, 11, 12
    for path in figures:
        with Image.open(path) as image:
            assert min(image.size) > 200, path
            assert np.asarray(image.convert("L")).std() > 5, path


def test_figure_2_by_hand():
    """A panel a criterion, of each group under its own neurons, in points."""
    rows = []
    for j, after in enumerate((9, 5)):
        row = {
            "criterion": "magnitude",
            "modification": "zero",
            "sigma": "",
            "k": 1,
            "split": "train",
            "selected_by": "all",
            "group": j,
            "n": 10,
            "correct_before": 10,
            "correct_after": after,
        }
        own = {**row, "criterion": "gradient", "selected_by": j, "correct_after": after - 1}
        other = {**own, "selected_by": 1 - j, "correct_after": 0}
        rows += [row, own, other, {**row, "split": "test", "correct_after": 0}]
    magnitude, gradient = trace_neurons.plot_changes(rows, GROUPS[:2], [1], "zero", [""]).axes
    assert magnitude.get_title() == "magnitude"
    assert [bar.get_height() for bar in magnitude.containers[0]] == [-10, -50]
    assert gradient.get_title() == "gradient"
    assert [bar.get_height() for bar in gradient.containers[0]] == [-20, -60]


def test_figure_7_by_hand():
    """As dark as the change is large; a rise is marked."""
    heat = {"magnitude": np.array([[-5.0, 3.0]]), "random": np.zeros((1, 2))}
    ax, *_ = structured_trace.plot_heat(heat, ["a", "b"], GROUPS[:1], 3).axes
    (rise,) = ax.texts
    assert (rise.get_text(), rise.get_position()) == ("+", (1, 0))
    assert ax.images[0].get_array().tolist() == [[5, 3]]


@pytest.mark.parametrize(
    "script,file,counts",
    [
        (trace_neurons, "trace/accuracy.csv", {"train": [4, 9, 8, 4], "test": [4, 4, 4, 4]}),
        (structured_trace, "structured/layers.csv", {None: [4, 9, 8, 4]}),
    ],
)
def test_images_that_are_counted(on_planted, tmp_path, script, file, counts):
    """Minorities are counted whole in training, and in test like the others."""
    trace(script, tmp_path, "--max-per-group 4")
    found = {}
    for row in pick(read(tmp_path / file), criterion="magnitude"):
        found.setdefault(row.get("split"), set()).add((row["group"], row["n"]))
    for split, of_groups in counts.items():
        assert found[split] == {(str(j), str(n)) for j, n in enumerate(of_groups)}


def test_random_sets_by_hand():
    """Of one kind from all neurons; of the other with as many from each layer as the critical set
    has among its first three; no neuron twice in a set, and another set every time."""
    ranked = {("gradient", 1): [("a", 0), ("a", 1), ("b", 4), ("c", 0)]}
    args = SimpleNamespace(seed=0, controls=40)
    counts = {"a": 5, "b": 50, "c": 500}
    drawn = {}
    for planned in trace_neurons.random_sets(args, ranked, 3, counts, [1, 2]):
        kind = (planned["row"]["selected_by"], tuple(planned["group_numbers"]))
        drawn.setdefault(kind, []).append(tuple(planned["variant"]["neurons"]))
    assert [*drawn] == [("all layers", (1, 2)), ("layers of gradient 1", (1,))]
    for sets in drawn.values():
        assert len(sets) == 40
        assert len(set(sets)) > 30
        for neurons in sets:
            assert len(set(neurons)) == 3
            assert all(index < counts[layer] for layer, index in neurons)
    for neurons in drawn["layers of gradient 1", (1,)]:
        assert [layer for layer, _ in neurons] == ["a", "a", "b"]


def compared(observed, null, same_layers, k=3, n=100):
    """What control_test says of magnitude's set and the two kinds of random ones, by images."""
    rows = []

    def add(criterion, selected_by, gained):
        rows.append(
            {
                "criterion": criterion,
                "modification": "zero",
                "k": 3,
                "selected_by": selected_by,
                "split": "train",
                "group": 1,
                "n": n,
                "correct_before": 80,
                "correct_after": 80 + gained,
            }
        )

    add("magnitude", "all", observed)
    for images in null:
        add("random", "all layers", images)
    for images in same_layers:
        add("random", "layers of magnitude all", images)
    return trace_neurons.control_test(rows, "magnitude", k, GROUPS)


NULL = [*range(-10, 10), *[0] * 19]
OFTEN = [-31] * 3 + [0] * 37  # p = 4 / 41 for -30
GAIN = [0, 1] * 20
LOSE = [-20] * 40


@pytest.mark.parametrize(
    "observed,null,same_layers,more",
    [
        (-30, NULL, NULL, True),
        (-30, NULL, OFTEN, False),
        (-30, OFTEN, NULL, False),
        (-5, NULL, NULL, False),
        (30, NULL, NULL, False),
        # As rare as it has to be, with p = 2 / 40, and not quite, with p = 3 / 41
        (-30, [-31, *[0] * 38], [-31, *[0] * 38], True),
        (-30, [-31, -31, *[0] * 38], [-31, -31, *[0] * 38], False),
        # Rare, but within 2 images of what random ones lose: where they gain, of none
        (-2, GAIN, GAIN, False),
        (-3, GAIN, GAIN, True),
        (-22, LOSE, LOSE, False),
        (-23, LOSE, LOSE, True),
        # The kind that loses more counts
        (-22, NULL, LOSE, False),
        (-22, NULL, NULL, True),
    ],
)
def test_verdict(observed, null, same_layers, more):
    tests = compared(observed, null, same_layers)
    assert [test["random"] for test in tests] == ["all layers", "the same layers"]
    for test in tests:
        assert test["group"] == 1
        assert test["images"] == observed
        assert test["more"] == more


def test_the_verdict_is_by_images_and_not_by_points():
    """20 of 1,000 images are 2 points: the loss of 22 images is two more, and not twenty."""
    assert [test["more"] for test in compared(-22, LOSE, LOSE, n=1000)] == [False, False]
    assert [test["more"] for test in compared(-23, LOSE, LOSE, n=1000)] == [True, True]


def test_p_values_and_printed_ranges_under_the_null():
    """1,000 traces in which the observed set is just one more random one."""
    rng = np.random.default_rng(0)
    p = []
    inside = []
    for observed, *null in rng.normal(-2e4, 5e3, (1000, 41)).astype(int).tolist():
        test, _ = compared(observed, null, null)
        p.append(test["p"])
        inside.append(test["low"] <= test["observed"] <= test["high"])
    assert 0.93 <= np.mean(inside) <= 0.97
    for level in (0.05, 0.25, 0.5, 0.9):
        assert np.mean(np.array(p) <= level) == pytest.approx(int(41 * level) / 41, abs=0.04)


def test_the_control_by_hand():
    assert trace_neurons.p_value(-5, [-6, -5, -4, 7]) == 3 / 5  # as low or lower, itself counted in
    test, _ = compared(0, range(39), range(39))
    # A 40th set would lie outside once in 20 times
    assert [test[key] for key in ("low", "mean", "high")] == pytest.approx([0, 19, 38])
    assert compared(-30, [], []) == []  # --controls 0


def test_changes_by_hand():
    row = {
        "criterion": "gradient",
        "modification": "random-init",
        "sigma": 0.01,
        "k": 1,
        "selected_by": 1,
        "split": "train",
        "group": 1,
        "n": 184,
        "correct_before": 88,
        "correct_after": 66,
    }
    assert trace_neurons.change(row) == pytest.approx(-11.9565, abs=1e-4)  # the paper's 11.96
    rows = [
        row,
        {**row, "correct_after": 90},
        {**row, "criterion": "random", "correct_after": 0},
        {**row, "selected_by": 2, "correct_after": 0},  # not its own, and not zeroed
    ]
    (line,) = trace_neurons.mean_changes(rows)
    assert line["selected_by"] == "own"
    assert line["images"] == {1: -10}
    assert line["points"] == {1: pytest.approx(100 * -10 / 184)}


def test_percentiles_by_hand():
    scores = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([5.0, 2.0, 3.0])}
    neurons = [("a", 0), ("b", 0), ("b", 2), ("a", 1), ("b", 1)]
    found = trace_neurons.percentile(neurons, scores)
    assert found.tolist() == [0, 100, 75, 37.5, 37.5]  # of places 0 to 4
    rows = []
    for place in (10, 95, 99.5):
        rows.append({"criterion": "magnitude", "gradient_percentile": place})
        rows.append({"criterion": "gradient", "magnitude_percentile": 94.9})
    scores = {
        ("magnitude", 1): {"a": torch.tensor([1.0, 2.0, 3.0])},
        ("gradient", 1): {"a": torch.tensor([7.0, 9.0, 8.0])},
    }
    (row,) = trace_neurons.neuron_table({("gradient", 1): [("a", 1)]}, scores)
    assert row["score"] == 9
    assert (row["gradient_percentile"], row["magnitude_percentile"]) == (100, 50)
    shares = trace_neurons.rank_shares(rows)
    (share,) = pick(shares, criterion="magnitude")
    assert share == {"criterion": "magnitude", "by": "gradient", "n": 3, "upper": 2, "median": 95}
    (share,) = pick(shares, criterion="gradient")
    assert share["upper"] == 0


def test_the_summary_of_layers_by_hand():
    heat = np.array([[0.0, 0, 0], [-10, 0, 5], [0, 0, 0], [0, -5, 0]])
    summary = structured_trace.summarize_layers(heat, np.abs(heat), ["a", "b", "c"], GROUPS)
    assert summary["groups"][1] == {"group": 1, "mean": -5 / 3, "largest": -10, "layer": "a"}
    assert summary["thirds"] == {"first": 10 / 15, "middle": 0, "last": 5 / 15}  # G3 is no minority
    heat[2, 0] = 10  # a rise does not make up for a drop
    summary = structured_trace.summarize_layers(heat, np.abs(heat), ["a", "b", "c"], GROUPS)
    assert summary["thirds"] == {"first": 20 / 25, "middle": 0, "last": 5 / 25}
    nothing = structured_trace.summarize_layers(0 * heat, 0 * heat, ["a", "b", "c"], GROUPS)
    assert nothing["thirds"] is None


SHARED = ("--max-per-group 0", "--batch-size 0", "--device nonsense", "--seed -1")
OWN = (
    "--repeats 0",
    "--sigma inf",
    "--sigma 0.01 nan",
    "--sigma 0.01 0",
    "--top-k 3 0",
    "--top-k 3 214",
    "--controls 38",
    "--controls -1",
)
REFUSED = [
    *((trace_neurons, more) for more in (*SHARED, *OWN)),
    *((structured_trace, more) for more in (*SHARED, "--k 0", "--controls 0")),
]


@pytest.mark.parametrize("script,more", REFUSED)
def test_refused_settings(on_planted, tmp_path, capsys, script, more):
    with pytest.raises((SystemExit, common.BadInput)) as refusal:
        trace(script, tmp_path, f"{more} ")
    if refusal.type is SystemExit:
        assert refusal.value.code == 2
        message = capsys.readouterr().err
    else:
        message = str(refusal.value)
    assert len(message.splitlines()) == 1
    flag, *_, value = more.split()
    assert flag in message
    assert value in message
    assert not [*tmp_path.iterdir()]
