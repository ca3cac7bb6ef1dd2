"""trace_neurons.py and structured_trace.py: a planted phenomenon, whole runs, directions, bad input."""

import argparse
import csv
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import structured_trace
import trace_neurons
from common import BadInput, Split, build_model, describe_groups, read_metadata, save_checkpoint, whole_folder

from .conftest import assert_refused, run_script

COUNTS = (24, 9, 8, 24)
NAMES = ("landbird on land", "landbird on water", "waterbird on land", "waterbird on water")


def planted():
    """A network in which one filter, conv2[12], alone carries the answer for group 2 (class 1, place 0). Six filters
    each copy red, green, blue in conv1; in conv2 six filters each see green (the place) and red, one sees blue,
    and 200 see nothing much. Half of any six may go without a change of any answer."""
    conv1, conv2, head = torch.nn.Conv2d(3, 18, 1, bias=False), torch.nn.Conv2d(18, 213, 1, bias=False), torch.nn.Linear(213, 2)
    for parameter in (conv1.weight, conv2.weight, head.weight, head.bias):
        parameter.data.zero_()
    for colour in range(3):
        conv1.weight.data[6 * colour:6 * colour + 6, colour] = 1
    conv2.weight.data[:6, 6:12] = 1 / 6
    conv2.weight.data[6:12, :6] = 1 / 6
    conv2.weight.data[12, 12:18] = 1
    conv2.weight.data[13:] = 1e-3
    head.weight.data[1, :6], head.weight.data[1, 6:12], head.weight.data[1, 12], head.bias.data[1] = 1.0, -2.0, 0.5, -1.0
    model = torch.nn.Sequential()
    for name, module in (("conv1", conv1), ("relu1", torch.nn.ReLU()), ("conv2", conv2), ("relu2", torch.nn.ReLU()),
                         ("pool", torch.nn.AdaptiveAvgPool2d(1)), ("flat", torch.nn.Flatten()), ("head", head)):
        model.add_module(name, module)
    model.register_buffer("input_mean", torch.zeros(3, 1, 1))
    model.register_buffer("input_std", torch.ones(3, 1, 1))
    return model.eval()


def planted_split():
    """Green is the place, blue marks group 2, red marks group 1."""
    g = torch.repeat_interleave(torch.arange(4), torch.tensor(COUNTS))
    colours = torch.stack([g == 1, g % 2 == 1, g == 2], 1).to(torch.uint8) * 255
    images = colours[:, :, None, None].expand(-1, 3, 8, 8).contiguous()
    return Split(images, g // 2, g % 2, g, torch.full((len(g), 2), 8), [""] * len(g), describe_groups(NAMES, COUNTS, 2))


def run_main(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
    script.main()


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    args = argparse.Namespace(run=tmp_path, device="cpu")
    for content in ("old", "new"):
        with whole_folder(tmp_path / "trace", args) as folder:
            (folder / content).touch()
    assert {path.name for path in (tmp_path / "trace").iterdir()} == {"args.json", "new"}
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "trace", args) as folder:
        (folder / "half").touch()
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["trace"] and (tmp_path / "trace" / "new").exists()


def read(path):
    return list(csv.DictReader(open(path)))


@pytest.fixture
def on_planted(monkeypatch):
    splits = {"train": planted_split(), "test": planted_split()}
    for script in (trace_neurons, structured_trace):
        monkeypatch.setattr(script, "reopen", lambda *_: (planted(), {"size": 8, "data": {"data": "planted"}}, splits))
    return monkeypatch


def test_planted_filter_is_found(on_planted, tmp_path):
    run_main(trace_neurons, on_planted, "--run", tmp_path, "--top-k", 1, 3, "--random-top-k", 1, "--repeats", 2, "--control-k", 1)
    neurons = read(tmp_path / "trace/neurons.csv")
    for criterion, by in (("gradient", "2"), ("magnitude", "all")):
        first = next(row for row in neurons if (row["criterion"], row["selected_by"], row["rank"]) == (criterion, by, "1"))
        assert (first["layer"], first["index"]) == ("conv2", "12") and float(first["magnitude_percentile"]) == 100
        rows = [row for row in read(tmp_path / "trace/accuracy.csv") if (row["criterion"], row["selected_by"], row["modification"], row["k"])
                == (criterion, by, "zero", "1")]
        assert len(rows) == 8  # four groups, training and test
        for row in rows:
            assert row["correct_before"] == row["n"] and row["correct_after"] == ("0" if row["group"] == "2" else row["n"])
    results = json.loads((tmp_path / "trace/results.json").read_text())
    for criterion in ("gradient", "magnitude"):
        tests = [t for t in results["control"][criterion]["tests"] if t["group"] == 2]
        assert len(tests) == 2 and all(t["observed"] == -100 and t["null_mean"] > -15 and t["p"] <= 0.05 for t in tests)
        assert results["control"][criterion]["beats"] == {"1": False, "2": True}
        assert "only for G2*" in results["control"][criterion]["sentence"]
    assert results["matrix"]["magnitude train"][0][2]["to_wrong"] == COUNTS[2]


def test_planted_layer_lights_up(on_planted, tmp_path):
    run_main(structured_trace, on_planted, "--run", tmp_path)
    rows = read(tmp_path / "structured/layers.csv")
    assert len(rows) == 2 * 2 * 4
    for row in rows:
        assert float(row["change_percent"]) == (-100 if (row["layer"], row["group"]) == ("conv2", "2") else 0)
    summary = json.loads((tmp_path / "structured/results.json").read_text())["summary"]["gradient"]
    assert summary["groups"][2] == {"group": 2, "mean": -50, "largest": -100, "layer": "conv2"}
    assert summary["thirds"] == {"first": 0, "middle": 1, "last": 0}  # two layers: the second lies in the middle third


def rows_for(observed, null, n=100):
    """Rows of accuracy.csv for group 1 as the only minority: magnitude's change and random ones, in images."""
    def row(criterion, by, repeat, lost):
        return dict(zip(trace_neurons.COLUMNS, (criterion, "zero", "", 3, repeat, by, "train", 1, n, 80, 80 + lost, max(-lost, 0), max(lost, 0))))
    return ([row("magnitude", "all", "", observed)] + [row("random", kind, i, lost) for i, lost in enumerate(null)
                                                        for kind in ("all layers", "layers of magnitude all")])


def test_verdict_says_yes_and_no():
    groups = describe_groups(NAMES, (90, 10, 50, 50), 2)
    args = type("args", (), {"controls": 39, "control_k": 3})
    null = list(range(-10, 10)) + [0] * 19
    yes = trace_neurons.compare(rows_for(-30, null), "magnitude", groups, [1], args)
    assert yes["beats"] == {1: True} and "? yes: G1* -30.0 points (-30 of 100 images)" in yes["sentence"] and yes["tests"][0]["p"] == 1 / 40
    for observed in (-5, 0, 30):  # a small loss, nothing, and a gain however large
        no = trace_neurons.compare(rows_for(observed, null), "magnitude", groups, [1], args)
        assert no["beats"] == {1: False} and "? no: " in no["sentence"]
    for lost in (-1, -2):  # where random sets only gain this is as rare as a loss of 30
        small = trace_neurons.compare(rows_for(lost, [0, 1] * 20), "magnitude", groups, [1], args)
        assert small["tests"][0]["p"] == 1 / 41 and small["beats"] == {1: False}
        assert f"? no: G1* {lost:+.1f} points ({lost:+d} of 100 images), rare but within 2 images" in small["sentence"]
    assert trace_neurons.compare(rows_for(-3, [0, 1] * 20), "magnitude", groups, [1], args)["beats"] == {1: True}
    for lost, beats in ((-22, False), (-23, True)):  # where random sets lose 20 each, what counts is the rest
        assert trace_neurons.compare(rows_for(lost, [-20] * 40), "magnitude", groups, [1], args)["beats"] == {1: beats}
    args.controls = 0
    assert "not compared" in trace_neurons.compare([], "magnitude", groups, [1], args)["sentence"]
    assert trace_neurons.p_value(-5, [-6, -5, -4, 7]) == 3 / 5  # as low or lower, the observed set counted in


def test_random_modifications_are_made_where_they_are_shown(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["trace_neurons.py"])
    args = trace_neurons.parse_args()
    ranked = {key: [("conv1", i) for i in range(10)] for key in (("magnitude", "all"), ("gradient", 0), ("gradient", 1))}
    draws = 3 * 3 * 10  # sigmas, ks, repeats
    train, test = ([(key[0], key[1], key[5], variant.groups) for key, variant in trace_neurons.plan(args, ranked, name)]
                   for name in ("train", "test"))
    for planned in (train, test):
        assert planned.count(("gradient", "zero", 0, None)) == planned.count(("magnitude", "zero", "all", None)) == 5
        assert planned.count(("gradient", "random-noise", 1, (1,))) == draws  # on its own group; zeroing on all groups
    assert train.count(("gradient", "random-init", 1, (1,))) == draws
    assert train.count(("magnitude", "random-noise", "all", None)) == draws
    assert len(train) == 3 * (5 + 2 * draws) and len(test) == 3 * 5 + 2 * draws
    args.all_groups = True
    for name in ("train", "test"):
        planned = trace_neurons.plan(args, ranked, name)
        assert len(planned) == len(train) and all(v.groups is None for _, v in planned)


def test_changes_are_signed_and_percentiles_ascend():
    assert trace_neurons.change({"correct_before": 88, "correct_after": 66, "n": 184}) == pytest.approx(-11.9565, abs=1e-4)  # the paper's 11.96
    found = trace_neurons.percentile(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert found.tolist() == [0, 50, 100]
    heat = np.array([[0.0, 0, 0], [-10, 0, 5], [0, -5, 0]])
    summary = structured_trace.summarize_layers(heat, ["a", "b", "c"], describe_groups(NAMES[:3], (90, 10, 50), 3))
    assert summary["groups"][1]["largest"] == -10 and summary["groups"][1]["mean"] == pytest.approx(-5 / 3)
    assert summary["thirds"] == {"first": 10 / 15, "middle": 0, "last": 5 / 15}  # group 2 is no minority


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A folder of 4 groups of small images and a run folder with an untrained checkpoint of it."""
    root = tmp_path_factory.mktemp("trace")
    rng, lines = np.random.default_rng(0), ["img_filename,y,place,split"]
    (root / "data").mkdir()
    for split, counts in enumerate((COUNTS, (3, 3, 3, 3), (5, 5, 5, 5))):
        for g, n in enumerate(counts):
            for i in range(n):
                name = f"{split}_{g}_{i}.png"
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(root / "data" / name)
                lines.append(f"{name},{g // 2},{g % 2},{split}")
    (root / "data/metadata.csv").write_text("\n".join(lines))
    (root / "run/erm").mkdir(parents=True)
    checkpoint(root, root / "run/erm/best.pt")
    return root


def checkpoint(root, path, arch="resnet10", size=32):
    torch.manual_seed(0)
    groups = [{"name": g["name"], "n": g["train_n"]} for g in read_metadata(root / "data").groups]
    save_checkpoint(path, build_model(arch, 2, size), arch=arch, n_classes=2, size=size, head="linear", args={}, epoch=1, metrics={"train": {"groups": groups}},
                    data={"data": str(root / "data"), "attributes": ["Blond_Hair", "Male"], "difficulty": 0.35})


def test_trace_script_twice(run):
    outputs = []
    for _ in range(2):
        done = run_script("trace_neurons.py", "--run", run / "run", "--cache", run / "cache", "--repeats", 2, "--controls", 19, "--sigma", 0.01)
        folder = run / "run/trace"
        outputs.append([(folder / name).read_bytes() for name in ("neurons.csv", "accuracy.csv")])
    assert outputs[0] == outputs[1]
    assert {p.name for p in folder.iterdir()} == {
        "args.json", "neurons.csv", "accuracy.csv", "results.json", "fig02_zero.png", "fig03_ranks.png", "fig04_random_init.png",
        "fig05_random_noise.png", "fig08_layers.png", "fig11_random_init_sigmas.png", "fig12_random_noise_sigmas.png"}
    for text in ("How much was memorised", "Table 3", "Table 11", "Table 13", "Table 14", "gradient: do its top 3", "magnitude: do its top 3"):
        assert text in done.stdout
    assert done.stdout.index("How much was memorised") < done.stdout.index("Table 3")
    rows = read(folder / "accuracy.csv")
    zero = [row for row in rows if (row["criterion"], row["modification"], row["k"], row["split"]) == ("gradient", "zero", "3", "train")]
    assert len(zero) == 16 and {(row["selected_by"], row["group"]) for row in zero} == {(str(i), str(j)) for i in range(4) for j in range(4)}
    noise = [row for row in rows if row["modification"] == "random-noise" and row["criterion"] == "gradient"]
    assert noise and all(row["selected_by"] == row["group"] for row in noise) and {row["split"] for row in noise} == {"train", "test"}
    assert all(int(r["correct_after"]) - int(r["correct_before"]) == int(r["to_right"]) - int(r["to_wrong"]) for r in rows)


@pytest.mark.parametrize("arch, size", [("vit_tiny_patch16_224", 32), ("squeezenet1_1", 48)])
def test_other_architectures(run, tmp_path, monkeypatch, arch, size):
    checkpoint(run, tmp_path / "other.pt", arch, size)
    common = ("--run", tmp_path, "--checkpoint", tmp_path / "other.pt", "--cache", tmp_path / "cache", "--max-per-group", 4)
    run_main(trace_neurons, monkeypatch, *common, "--repeats", 1, "--controls", 19, "--gradient-samples", "worst", "--sigma", 0.01)
    run_main(structured_trace, monkeypatch, *common, "--split", "test")
    assert len(read(tmp_path / "structured/layers.csv")) == 8 * (48 if "vit" in arch else 25)


def test_bad_input_is_one_line(run):
    assert_refused(run_script("structured_trace.py", "--run", run / "nowhere", check=False), "no such checkpoint")
    assert not (run / "nowhere").exists()


def test_bad_input(run, tmp_path, monkeypatch):
    (tmp_path / "erm").mkdir()
    best = tmp_path / "erm/best.pt"

    def refused(script, match, *arguments):
        with pytest.raises(BadInput, match=match):
            run_main(script, monkeypatch, "--run", tmp_path, "--cache", run / "cache", *arguments)
        assert [p.name for p in tmp_path.iterdir()] == ["erm"]

    whole = (run / "run/erm/best.pt").read_bytes()
    for content, match in ((whole[:1000], "truncated"), (b"not a checkpoint", "not a readable checkpoint")):
        best.write_bytes(content)
        refused(trace_neurons, match)
    torch.save({"state_dict": {}}, best)
    refused(structured_trace, "not a checkpoint of this project")
    torch.save({key: value for key, value in torch.load(run / "run/erm/best.pt", weights_only=True).items() if key != "metrics"}, best)
    refused(structured_trace, "lacks data, args or metrics")
    best.write_bytes(whole)
    refused(trace_neurons, "no such file", "--data", tmp_path / "gone")
    refused(trace_neurons, "is not what", "--data", "synthetic")
    refused(trace_neurons, "expected 1 to 2880", "--top-k", 1, 2, 3, 9999)
    refused(trace_neurons, "do nothing", "--sigma")
    refused(trace_neurons, "do nothing", "--sigma", 0.0)
    refused(trace_neurons, "at least 19", "--controls", 5)
    refused(structured_trace, "not a prunable layer", "--layers", "fc")
    for script in (trace_neurons, structured_trace):
        refused(script, "--max-per-group 0: must be positive", "--max-per-group", 0)
        refused(script, "--device nonsense", "--device", "nonsense")


def test_structured_clips_k(run, monkeypatch, capsys):
    run_main(structured_trace, monkeypatch, "--run", run / "run", "--cache", run / "cache", "--k", 100, "--layers", "conv1", "layer4.0.conv1")
    assert "fewer than 100 neurons lose all of them: conv1 (64)\n" in capsys.readouterr().err
    assert {(row["layer"], row["k"]) for row in read(run / "run/structured/layers.csv")} == {("conv1", "64"), ("layer4.0.conv1", "100")}


def test_real_birds(real_data, tmp_path):
    """A real set from training to both traces, as a user runs it: few images, few repeats, all of the minorities."""
    run = ("--run", tmp_path / "run", "--cache", tmp_path / "cache")
    weights, few = real_data / "weights/squeezenet1_1.pth", ("--max-per-group", 5, "--device", "cpu")
    run_script("train_erm.py", *run, "--data", real_data / "birds50", "--arch", "squeezenet1_1", "--weights", weights,
               "--size", 64, "--batch-size", 64, "--epochs", 1, "--augment", "crop-flip", "--device", "cpu")
    done = run_script("trace_neurons.py", *run, *few, "--repeats", 1, "--controls", 19)
    results = json.loads((tmp_path / "run/trace/results.json").read_text())
    assert results["images"] == {"train": [5, 59, 21, 5], "test": [5, 5, 5, 5]}
    assert [g["n"] for g in results["splits"]["train"]["groups"]] == [1078, 59, 21, 392]
    for criterion in ("gradient", "magnitude"):
        assert [(t["group"], t["n"]) for t in results["control"][criterion]["tests"]] == [(1, 59), (1, 59), (2, 21), (2, 21)]
        assert results["control"][criterion]["sentence"] in done.stdout
    run_script("structured_trace.py", *run, *few)
    rows = read(tmp_path / "run/structured/layers.csv")
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    assert len(rows) == 25 * 2 * 4 and layers[::24] == ["features.0", "features.12.expand3x3"]
