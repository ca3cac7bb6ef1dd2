"""README.md keeps its word: its commands parse with the real parsers, its short ones run and print what the page says, and
every file, flag, function and heading that it names exists."""

import argparse
import ast
import importlib
import os
import re
import subprocess
import textwrap

import pytest
import timm

import common
from tests.conftest import ROOT, labelled_rows, run_script, write_images

PAGE = (ROOT / "README.md").read_text()
BLOCKS = [(language, textwrap.dedent(text)) for _, language, text in re.findall(r"^( *)```(\w*)\n(.*?)^\1```", PAGE, re.M | re.S)]
PROSE = re.sub(r"^( *)```.*?^\1```", "", PAGE, flags=re.M | re.S)
SPANS = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", PROSE)]
SCRIPTS = ("train_erm", "trace_neurons", "structured_trace", "finetune_contrastive", "gradcam")
SHELL = [text for language, text in BLOCKS if language == "sh"]
INLINE = [span.removeprefix("time ") for span in SPANS if re.match(r"(time )?([A-Z_]+=\S+ )*python ", span) and "..." not in span]
SOURCES = "\n".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")] if path.name != "test_readme.py")

STAND_IN = """#!/bin/sh
# In the place of python, python3 and pip: writes down what it was called with, and does nothing
arguments=$(printf '%s\\037' "$@")
printf '%s\\037%s\\036' "${0##*/}" "$arguments" >> "$RECORD"
"""
SBATCH = """#!/bin/sh
# Runs an array job here: --array=1-N --gpus=1 --wrap COMMAND
for i in $(seq 1 "${1#--array=1-}"); do SLURM_ARRAY_TASK_ID=$i sh -c "$4"; done
"""


def parser_of(script, monkeypatch):
    """The parser of a script, caught on its way to the command line."""
    caught = []
    with monkeypatch.context() as m:
        m.setattr(argparse.ArgumentParser, "parse_args", lambda self, *_: caught.append(self))
        importlib.import_module(script).parse_args()
    return caught[0]


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
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "RECORD": str(record)}
    shell = subprocess.run(["bash", "-euc", text], cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert shell.returncode == 0 and not shell.stderr, f"{text}\n{shell.stderr}"
    return [call.split("\037")[:-1] for call in record.read_text().split("\036")[:-1]]


def check_call(call, monkeypatch):
    """A call that python or pip would accept; unknown and abbreviated flags fail."""
    program, *arguments = call
    assert arguments[0] == "-c" or not any("$" in a for a in arguments), f"not expanded: {call}"
    if program == "pip":
        assert arguments[:3] == ["install", "-r", "requirements.txt"] and (ROOT / "requirements.txt").exists()
    elif arguments[0] == "-c":
        for node in ast.walk(ast.parse(arguments[1])):
            if isinstance(node, ast.ImportFrom):
                assert all(hasattr(importlib.import_module(node.module), name.name) for name in node.names), call
    elif arguments[0] == "-m":
        module, rest = arguments[1], arguments[2:]
        assert module in ("venv", "pytest") or (ROOT / f"{module.replace('.', '/')}.py").exists(), call
        assert all((ROOT / a).exists() for a in rest if a.startswith("tests")), call
        if module.startswith("tests."):
            source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
            assert all(f'"{a}"' in source for a in rest if a.startswith("--")), call
    else:
        assert (ROOT / arguments[0]).exists(), call
        parser_of(arguments[0].removesuffix(".py"), monkeypatch).parse_args(arguments[1:])


@pytest.mark.parametrize("text", SHELL + INLINE, ids=lambda text: text.strip().splitlines()[0][:60])
def test_commands_parse(text, sandbox, monkeypatch):
    calls = recorded(text, sandbox)
    assert calls or "jobs.txt" in text
    for call in calls:
        check_call(call, monkeypatch)


def test_the_check_finds_wrong_commands(sandbox, monkeypatch):
    for text in ("python train_erm.py --epoch 3", "python train_erm.py --no-such-flag", "python no_such_script.py",
                 "python finetune_contrastive.py --criterion largest", "python -c 'from common import no_such_function'",
                 "python -m tests.bench_trace --no-such-flag"):
        call, = recorded(text, sandbox)
        with pytest.raises((SystemExit, AssertionError)):
            check_call(call, monkeypatch)


def test_a_list_of_jobs_runs_every_line_once_per_way(sandbox):
    blocks = [text for text in SHELL if "jobs.txt" in text and not text.startswith("ft()")]
    calls = recorded("\n".join(blocks), sandbox)
    assert sorted(int(call[-1]) for call in calls) == sorted(2 * [*range(10)])  # on GPUs, and as an array job
    assert all(call[call.index("--run") + 1] == f"runs/wb{call[-1]}" for call in calls)


def test_the_ablations_as_a_list_of_jobs(sandbox, monkeypatch):
    """The same runs as the loops, written to jobs.txt by the other `ft` of the page, handed out over GPUs."""
    definition, = [text for text in SHELL if re.fullmatch(r"ft\(\) .*jobs\.txt; }\n", text)]
    loops, = [text for text in SHELL if text.startswith("ft()") and text != definition]
    over_gpus, = [line for text in SHELL for line in text.splitlines() if "CUDA_VISIBLE_DEVICES" in line]
    as_list = "\n".join([definition, *loops.splitlines()[1:-1], over_gpus])
    direct = [call for call in recorded(loops, sandbox) if "--compare" not in call]
    (sandbox / "jobs.txt").unlink()
    assert sorted(recorded(as_list.replace("runs/wb", "runs/synthetic"), sandbox)) == sorted(direct) and len(direct) > 80


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_worth_reading(script, sandbox, monkeypatch):
    """Every flag has a help text and stands in a group, closed sets have choices, and the examples at the top parse."""
    parser = parser_of(script, monkeypatch)
    own = [group for group in parser._action_groups if group.title not in ("positional arguments", "options") and group._group_actions]
    assert len(own) >= 3 and not parser.allow_abbrev
    for action in parser._actions:
        assert action.help, action.option_strings
    examples = re.findall(r"^    (python \S+\.py.*)$", parser.description, re.M)
    assert len(examples) >= 2
    for call in recorded("\n".join(examples), sandbox):
        check_call(call, monkeypatch)


def test_every_flag_named_exists(monkeypatch):
    known = {flag for script in SCRIPTS for action in parser_of(script, monkeypatch)._actions for flag in action.option_strings}
    named = {flag for span in SPANS for flag in re.findall(r"(?<!\S)--[a-z][a-z-]*", span)}
    assert named and named <= known | {"--help", "--batch", "--repeats"}, named - known


def test_every_file_named_exists():
    assert all((ROOT / target).exists() for target in re.findall(r"\]\((?!http|#)([^)]+)\)", PAGE))
    foreign = {"jobs.txt", "metadata_waterbirds.csv", "img_align_celeba.zip", "resnet50-11ad3fa6.pth", "model.safetensors", "squeezenet1_1.pth"}
    for name in {word for span in SPANS for word in re.findall(r"[\w-]+\.(?:py|png|csv|json|jsonl|pt|pth|zip|txt|safetensors)\b", span)}:
        pattern = re.escape(name).replace("epoch_040", r"epoch_(NNN|\{.*\})")
        assert name in foreign or (ROOT / name).exists() or (ROOT / "tests" / name).exists() or re.search(pattern, SOURCES), name


def test_every_function_named_exists():
    section = PAGE[PAGE.index("## Copy it"):PAGE.index("## Speed")]
    homes = [importlib.import_module(name) for name in ("common", "finetune_contrastive", "gradcam")]
    named = {name for row in re.findall(r"^\|.*\|$", section, re.M) for name in re.findall(r"`(\w+)`", row)}
    assert len(named) > 15
    for name in named:
        home, = {m.__name__ for m in homes if getattr(getattr(m, name, None), "__module__", None) == m.__name__}
        assert f"{home}.py" in next(row for row in section.splitlines() if f"`{name}`" in row)
    for name in {span for span in SPANS if re.fullmatch(r"[a-z]+(_[a-z0-9]+)+", span)}:
        assert re.search(rf"\b{name}\b", SOURCES) or name in timm.list_models(), name


def test_every_heading_linked_to_exists():
    def anchor(heading):
        return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
    headings = {anchor(h) for h in re.findall(r"^#+ (.*)$", PROSE, re.M)}
    linked = set(re.findall(r"\]\(#([^)]+)\)", PAGE))
    assert linked and linked <= headings, linked - headings


def test_tables_are_tables():
    for table in re.findall(r"(?:^\|.*\|\n)+", PAGE, re.M):
        rows = [row.replace("\\|", "").count("|") for row in table.splitlines()]
        assert len(set(rows)) == 1, table.splitlines()[rows.index(min(rows))]
    assert not re.findall(r"^[^|\s].*\n\|.*\n\|---", PAGE, re.M)  # a table right under a paragraph is not drawn as one


def test_every_table_and_figure_of_the_paper_has_a_row():
    section = PAGE[PAGE.index("## Every table and figure"):PAGE.index("## Results in detail")]
    first = " ".join(row.split("|")[1] for row in section.splitlines() if row.startswith("|"))
    numbers = {kind: {int(n) for group in re.findall(rf"{kind}s? ([\d, ]+)", first) for n in re.findall(r"\d+", group)}
               for kind in ("Table", "Figure")}
    assert numbers == {"Table": set(range(1, 15)), "Figure": set(range(1, 13))}


# ---- the short ones run ----


def python(*arguments, cwd):
    return run_script(*arguments, cwd=cwd, PYTHONPATH=str(ROOT)).stdout


def test_arithmetic_gives_what_the_page_says(sandbox, tmp_path):
    checked = 0
    for text in SHELL:
        expected = re.findall(r"^# (.*)$", text, re.M)
        if not text.startswith("python -c") or not expected:
            continue
        call, = recorded(text, sandbox)
        assert python(*call[1:], cwd=tmp_path).splitlines() == expected
        checked += 1
    assert checked == 2


def test_the_example_to_copy(tmp_path):
    """As printed; nothing trained: three neurons of a random network, whose counts add up to the test split."""
    example, = [text for language, text in BLOCKS if language == "python"]
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    whole, without = python("-c", example, cwd=tmp_path).splitlines()
    assert whole.startswith("[] ") and len(ast.literal_eval(without[:without.index(")] ") + 2])) == 3
    for line in (whole, without):
        counts = re.findall(r"[\w ]+: (\d+) of (\d+)", line)
        assert [int(n) for _, n in counts] == common.OFFICIAL_COUNTS["waterbirds"][2]


def test_your_own_data_and_means_over_seeds(tmp_path, sandbox):
    """The csv of the page with more rows of its kind, trained on by the command under it; then its averages over runs."""
    table, = [text for language, text in BLOCKS if language == "csv"]
    header, *lines = table.splitlines()
    rows = [(name, int(y), int(place), split) for name, y, place, split in (line.split(",") for line in lines)]
    rows += [(f"more/{i}.png", y, a, split) for i, (_, y, a, split) in enumerate(labelled_rows())]
    write_images(tmp_path / "mine", rows)
    (tmp_path / "mine" / "metadata.csv").write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    command, = [text for text in SHELL if "--data mine" in text]
    call, = recorded(command, sandbox)
    out = python(ROOT / call[1], *call[2:], cwd=tmp_path)
    assert "selected epoch" in out and "wrote runs/mine/erm/" in out

    averages = [text for text in [*SHELL, *INLINE] if "summarize" in text]
    assert len(averages) >= 3
    for name in ("synthetic0", "synthetic1", "birds0", "wb0", "wb1"):
        (tmp_path / "runs" / name).symlink_to(tmp_path / "runs" / "mine")
    for call in (call for text in averages for call in recorded(text, sandbox) if call[1] == "-c"):
        assert re.search(r"worst group +\d+\.\d+ \+- +(0\.00|nan) %  \(n = [12]\)", python(*call[1:], cwd=tmp_path))
