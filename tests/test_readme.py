"""README.md keeps its word: commands parse with the real parsers, short ones run, names exist."""

import ast
import importlib.util
import os
import re
import subprocess

import pytest
import torch

import common
import finetune_contrastive

from .conftest import ROOT, labelled_rows, run_script, write_images

PAGE = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
PROSE = re.sub(r"^```.*?^```", "", PAGE, flags=re.MULTILINE | re.DOTALL)
SPANS = re.findall(r"`([^`]+)`", PROSE)
SHELL = [text for language, text in BLOCKS if language == "sh"]
SHELL += [span for span in SPANS if span.startswith("python ")]
PYTHON = [text for language, text in BLOCKS if language == "python"]
SCRIPTS = ("train_erm", "trace_neurons", "structured_trace", "finetune_contrastive", "gradcam")
SOURCES = "\n".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("results/*.py")])

STAND_IN = """#!/bin/sh
# In the place of python and pip: writes down what it was called with, and does nothing
arguments=$(printf '%s\\037' "$@")
printf '%s\\037%s\\036' "${0##*/}" "$arguments" >> "$RECORD"
"""
SBATCH = """#!/bin/sh
# Runs an array job here: --array=1-N --requeue --open-mode=append --wrap COMMAND
for i in $(seq 1 "${1#--array=1-}"); do SLURM_ARRAY_TASK_ID=$i sh -c "$5"; done
"""


def load(path):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    """A folder in which bash finds stand-ins for python, pip and sbatch."""
    folder = tmp_path_factory.mktemp("sandbox")
    for name in ("python", "python3", ".venv/bin/python", ".venv/bin/pip", "sbatch"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SBATCH if name == "sbatch" else STAND_IN)
        path.chmod(0o755)
    (folder / "jobs.txt").touch()
    return folder


def recorded(text, folder):
    """What a shell text calls, loops and variables expanded: lists of str, the program first."""
    record = folder / "record"
    record.write_text("")
    paths = f"{folder}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": paths, "RECORD": str(record)}
    command = ["bash", "-euc", text]
    shell = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert shell.returncode == 0 and not shell.stderr, f"{text}\n{shell.stderr}"
    return [call.split("\037")[:-1] for call in record.read_text().split("\036")[:-1]]


def check_call(call):
    """A call that python or pip would accept; unknown and abbreviated flags fail."""
    program, *arguments = call
    assert not any("$" in argument for argument in arguments), f"not expanded: {call}"
    if program == "pip":
        assert arguments[:3] == ["install", "-r", "requirements.txt"]
    elif arguments[0] == "-m":
        assert (
            arguments[1] in ("venv", "pytest") or (ROOT / f"tests/{arguments[1][6:]}.py").exists()
        )
    else:
        load(ROOT / arguments[0]).parse_args(arguments[1:])


@pytest.mark.parametrize("text", SHELL, ids=lambda text: text.strip().splitlines()[0][:50])
def test_commands_parse(text, sandbox):
    calls = recorded(text, sandbox)
    assert calls or "jobs.txt" in text
    for call in calls:
        check_call(call)


def test_the_check_finds_wrong_commands(sandbox):
    wrong = ["python train_erm.py --epoch 3", "python train_erm.py --no-flag", "python no.py"]
    for text in [*wrong, "python finetune_contrastive.py --criterion largest"]:
        (call,) = recorded(text, sandbox)
        with pytest.raises((SystemExit, FileNotFoundError)):
            check_call(call)


def test_a_list_of_jobs_runs_every_line_once_per_way(sandbox):
    calls = recorded("\n".join(text for text in SHELL if "jobs.txt" in text), sandbox)
    seeds = sorted(int(call[-1]) for call in calls)
    assert seeds == sorted(2 * [*range(10)])  # on GPUs, and as an array job
    assert all(call[call.index("--run") + 1] == f"runs/wb{call[-1]}" for call in calls)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_worth_reading(script, sandbox):
    """Every flag has a help text; the examples at the top parse."""
    text = run_script(f"{script}.py", "--help").stdout
    flags = re.findall(r"^  (--\S+)(.*\n(?: {10,}.*\n)?)", text, re.MULTILINE)
    assert len(flags) > 8 and all("(" in rest or len(rest.split()) > 3 for _, rest in flags), flags
    examples = re.findall(r"^    (python \S+\.py.*)$", text, re.MULTILINE)
    assert len(examples) >= 2
    for call in recorded("\n".join(examples), sandbox):
        check_call(call)


def test_every_name_on_the_page_exists():
    named = {flag for span in SPANS for flag in re.findall(r"(?<!\S)--[a-z][a-z-]*", span)}
    assert named and all(f'"{flag}"' in SOURCES for flag in named - {"--help", "--gpus"}), named
    foreign = {"resnet50-11ad3fa6.pth", "model.safetensors", "metadata_waterbirds.csv"}
    for span in SPANS:
        for name in re.findall(r"[\w-]+\.(?:py|png|csv|jsonl?|pt|pth|safetensors)\b", span):
            here = [ROOT / name, ROOT / "results" / name]
            assert name in foreign or name in SOURCES or any(p.exists() for p in here), name
        if re.fullmatch(r"[a-z]+(_[a-z0-9]+)+", span):
            assert re.search(rf"\b(def )?{span}\b", SOURCES), span


def anchors(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", ["README.md", "results/README.md"])
def test_links_and_tables(page):
    path = ROOT / page
    text = path.read_text()
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        linked = (path.parent / file) if file else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        rows = [row.replace("\\|", "").split("|")[1:-1] for row in table.splitlines()]
        assert len({len(row) for row in rows}) == 1, rows[0]
        assert max(len(cell.strip()) for row in rows for cell in row) <= 120, rows[0]
    assert not re.findall(
        r"^[^|\s].*\n\|.*\n\|---", text, re.MULTILINE
    )  # would not be drawn as a table


def test_the_page_is_short_and_complete():
    assert len(PAGE.splitlines()) <= 250 and len(PAGE.split()) <= 2500
    section = PAGE[PAGE.index("## Every table and figure") : PAGE.index("## Where we differ")]
    rows = " ".join(row.split("|")[1] for row in section.splitlines() if row.startswith("|"))
    for kind, n in (("Table", 14), ("Figure", 12)):
        found = set()
        for group in re.findall(rf"{kind}s? ([\d, -]+)", rows):
            for low, high in re.findall(r"(\d+)(?:-(\d+))?", group):
                found |= set(range(int(low), int(high or low) + 1))
        assert found == set(range(1, n + 1)), kind


def test_the_example_to_copy(tmp_path):
    """As printed: three neurons of a random network, and counts that add up to the batch."""
    example = PYTHON[0]
    out = run_script("-c", example, cwd=tmp_path, PYTHONPATH=str(ROOT)).stdout
    critical, counts = out.strip().split("] [")
    assert len(ast.literal_eval(f"{critical}]")) == 3
    (counts,) = ast.literal_eval(f"[{counts}")
    assert [row["n"] for row in counts.values()] == [2, 2, 2, 2]


def test_a_step_with_the_masked_branch():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4, 2))
    names = {**vars(common), **vars(finetune_contrastive), "model": model, "critical": [("0", 1)]}
    names |= {
        "x1": torch.randn(5, 3, 3, 3),
        "x2": torch.randn(5, 3, 3, 3),
        "y": torch.arange(5) % 2,
    }
    exec(PYTHON[1], names)  # noqa: S102 - the page's own lines
    assert model[0].weight.grad.abs().sum() > 0 and not names["masks"]["0.weight"][1].any()


def test_a_data_set_in_code(tmp_path, monkeypatch):
    rows = labelled_rows(pattern="{number:04d}.png")
    rows = [(f"{y}_{a}_{s}_{n}", y, a, s) for n, y, a, s in rows]
    write_images(tmp_path / "digits", rows)
    monkeypatch.chdir(tmp_path)
    names = dict(vars(common))
    exec(PYTHON[2], names)  # noqa: S102 - the page's own lines
    table = names["digits"]()
    assert table.source == "digits" and len(table.files) == len(rows) and len(table.groups) == 4
    assert all((table.root / file).is_file() for file in table.files)


def test_your_own_data(tmp_path, sandbox):
    """The csv of the page with more rows of its kind, trained on by the command under it."""
    (table,) = [text for language, text in BLOCKS if language == "csv"]
    header, *lines = table.splitlines()
    kinds = {"cow": 0, "camel": 1, "grass": 0, "sand": 1}
    rows = []
    for line in lines:
        name, y, place, split = line.split(",")
        rows.append((name, kinds[y], kinds[place], split))
    rows += [(f"more/{i}.png", y, a, s) for i, (_, y, a, s) in enumerate(labelled_rows())]
    write_images(tmp_path / "mine", rows)
    more = [f"{n},{('cow', 'camel')[y]},{('grass', 'sand')[a]},{s}" for n, y, a, s in rows]
    (tmp_path / "mine" / "metadata.csv").write_text("\n".join([header, *more]) + "\n")
    (command,) = [text for text in SHELL if "--data mine" in text]
    (call,) = recorded(command, sandbox)
    out = run_script(ROOT / call[1], *call[2:], "--workers", "0", cwd=tmp_path).stdout
    assert "selected epoch" in out and "camel grass" in out and "wrote runs/mine/erm/" in out


def test_official_counts_are_the_papers():
    """Training accuracies of section 2.1 are whole images of these counts."""
    counts = common.OFFICIAL_COUNTS["waterbirds"][0]
    assert round(100 * 88 / counts[1], 2) == 47.83 and round(100 * 39 / counts[2], 2) == 69.64
