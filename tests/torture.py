"""What can go wrong, tried many times: kills, full disks, signals, second processes, damaged files,
impossible flags.

    python -m tests.torture                     # 20 minutes; prints what was tried, held and failed
    python -m tests.torture --seconds 60        # a sample of each kind

Every case runs a script as the command line does, in a fork of this process (torch is loaded once),
on a small data set, in folders in which others have left files. A case holds if the script ends
with exit code 0 and the results of a run that nothing happened to, or with exit code 2 and one line
that names the file. A killed process says nothing, and its command continues.
"""

import argparse
import contextlib
import errno
import hashlib
import json
import os
import random
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

import common

from .conftest import ROOT, write_celeba, write_waterbirds

ERM = (
    "train_erm.py --data base --run r --arch resnet10 --weights none --size 32 --epochs 2 "
    "--batch-size 16 --workers 0 --device cpu --keep-epochs 1"
)
ANEW = f"{ERM} --overwrite"
OLDER = f"{ERM} --seed 1 --keep-epochs 1 2".replace("--run r", "--run older")
FINETUNE = (
    "finetune_contrastive.py --run r --criterion mixed --prune-fraction 0.001 --epochs 2 "
    "--workers 0 --device cpu"
)
TRACE = "trace_neurons.py --run r --workers 0 --device cpu --repeats 1 --sigma 0.01 --controls 39"
STRUCTURED = "structured_trace.py --run r --workers 0 --device cpu"
GRADCAM = "gradcam.py --run r --workers 0 --device cpu --masks base"
STAGES = {  # command: (its folder, the folders that it needs, how often it is taken)
    ERM: ("erm", (), 2),
    ANEW: ("erm", (), 2),
    FINETUNE: ("finetune", ("erm",), 4),
    TRACE: ("trace", ("erm",), 1),
    STRUCTURED: ("structured", ("erm",), 1),
    GRADCAM: ("gradcam", ("erm", "finetune"), 1),
}
NUMBERS = ["-1", "0", "nan", "inf", "x", "-0.5", "1e400", "4294967296", "2"]
FLAGS = {  # of each script; with those numbers that are possible a run ends soon
    "train_erm.py": "--epochs --batch-size --lr --size --seed --keep-epochs --weights --attributes",
    "trace_neurons.py": "--max-per-group --top-k --sigma --repeats --controls --seed --batch-size",
    "structured_trace.py": "--max-per-group --k --controls --seed --batch-size --unit",
    "finetune_contrastive.py": "--prune-fraction --temperature --lam --kick-in --lr --seed --views",
    "gradcam.py": "--n --target --layer --seed --batch-size --after",
}
LITTER = ("slurm-1234.out", "._best.pt", "best.pt.swp")  # what others leave in a run folder


# ---- a script in a fork ----


def start(folder, command, sabotage=None):
    """Run a command in a fork, in a group of processes of its own; returns its process id.
    sabotage() is called in it first."""
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):  # in which two processes may write
        anew = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        os.dup2(os.open(folder / name, anew), number)
    sys.stdout = os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w")
    sys.argv = command.split()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 1
    try:
        if sabotage:
            sabotage()
        runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
        code = 0
    except KeyboardInterrupt:  # in front of the script's own first line
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:  # noqa: BLE001 - a traceback is what must not be
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def finish(folder, pid, seconds=120):
    """Exit code (negative: the signal; None: still there after `seconds`) and stderr."""
    until = time.time() + seconds
    while time.time() < until:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), (folder / "err").read_text()
        time.sleep(0.005)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None, (folder / "err").read_text()


def run(folder, command, sabotage=None):
    return finish(folder, start(folder, command, sabotage))


def group_ends(pid, seconds=20):
    """Whether all processes that a command started end, too."""
    until = time.time() + seconds
    while time.time() < until:
        try:
            os.killpg(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)
    return False


def lines(err):
    """What stderr holds besides warnings."""
    return [line for line in err.splitlines() if line and not line.startswith("warning:")]


def one_line(err, *words):
    """Whether stderr holds, besides warnings, one line with these words."""
    return len(lines(err)) == 1 and all(word in err for word in words)


def at_step(n, what):
    """A sabotage: when a file is flushed, renamed or deleted for the n-th time, the process is
    killed; or, if `what` is 'full', when one is flushed for the n-th time, the disk is full."""

    def sabotage():
        count = 0

        def counting(function):
            def counted(*args, **kwargs):
                nonlocal count
                count += 1
                if count == n and what == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if count == n:
                    os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return function(*args, **kwargs)

            return counted

        for name in ("fsync", "replace", "unlink") if what == "kill" else ("fsync",):
            setattr(os, name, counting(getattr(os, name)))

    return sabotage


# ---- what a run comes to ----


def plain(value):
    """A checkpoint's content with tensors as digests, without seconds and the folder's name."""
    if torch.is_tensor(value):
        return hashlib.sha256(value.numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        kept = value.keys() - {"seconds", "args"}
        return {str(key): plain(value[key]) for key in sorted(kept, key=str)}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return re.sub(r"\S*/base\b", "base", str(value))


def content(folder):
    """Every file of a stage but args.json and .lock, without seconds and the folder's name."""
    found = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        if path.suffix == ".pt" and path.name not in LITTER:
            data = plain(torch.load(path, weights_only=True))
        elif path.suffix in (".json", ".jsonl"):
            rows = [data] if path.suffix == ".json" else data.splitlines()
            data = [plain(json.loads(row)) for row in rows]
        if path.name not in ("args.json", ".lock"):
            found[path.name] = data
    return found


class Bench:
    """A folder with data and a finished run r of every stage, copied for every case, and counts of
    what was tried and what failed."""

    def __init__(self, folder, seed=0):
        self.folder = folder
        self.random = random.Random(seed)
        self.tried = Counter()
        self.failed = Counter()
        self.cases = []
        self.seconds = {}
        self.whole = folder / "whole"
        self.whole.mkdir()
        write_waterbirds(self.whole / "base")
        for image in list((self.whole / "base").rglob("*.jpg")):
            shutil.copy(image, image.with_suffix(".png"))  # masks
        write_celeba(self.whole / "faces")
        weights = common.build_model("resnet10", 2, 32).state_dict()
        torch.save(weights, self.whole / "base/w.pth")
        for command in (OLDER, *STAGES):
            began = time.time()
            code, err = run(self.whole, command)
            assert code == 0, err
            self.seconds[command] = time.time() - began

    def copy(self, command=None, stages=()):
        """A fresh folder with the data, the stages of the run that a command needs, and litter in
        its folder. With ANEW there is an older run, of other settings."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        for data in ("base", "faces"):
            shutil.copytree(self.whole / data, folder / data)
        if command:
            stage, stages, _ = STAGES[command]
            (folder / "r" / stage).mkdir(parents=True)
            for name in LITTER:
                (folder / "r" / stage / name).write_text("mine")
        if command == ANEW:
            shutil.copytree(self.whole / "older/erm", folder / "r/erm", dirs_exist_ok=True)
        for stage in stages:
            shutil.copytree(self.whole / "r" / stage, folder / "r" / stage)
        return folder

    def any_command(self):
        often = [how_often for _, _, how_often in STAGES.values()]
        return self.random.choices(list(STAGES), often)[0]

    def same(self, folder, command):
        """Whether a stage came to what it does without an accident, with nothing left over and
        nothing of others touched."""
        stage = STAGES[command][0]
        litter = dict.fromkeys(LITTER, b"mine")
        return content(folder / "r" / stage) == {**content(self.whole / "r" / stage), **litter}

    def note(self, kind, held, case, folder):
        self.tried[kind] += 1
        self.failed[kind] += not held
        if not held:
            self.cases.append(f"{kind}: {case}")
        shutil.rmtree(folder)


# ---- what is tried ----


def killed(bench):
    """SIGKILL at a step of what is written, or at a random moment; the same command again."""
    command = bench.any_command()
    folder = bench.copy(command)
    if bench.random.random() < 0.7:
        n = bench.random.randint(1, 40)
        case = f"{command}, killed at step {n}"
        run(folder, command, at_step(n, "kill"))
    else:
        after = bench.random.random() * bench.seconds[command]
        case = f"{command}, killed after {after:.2f} s"
        pid = start(folder, command)
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
        finish(folder, pid)
    code, err = run(folder, command)
    held = code == 0 and bench.same(folder, command)
    bench.note("kills", held, f"{case}: {code} {err[-300:]}", folder)


def signalled(bench):
    """SIGTERM, SIGHUP or SIGINT, also while workers start: it dies of the signal, with one line at
    Ctrl-C and silently else, no process stays, and the same command continues."""
    command = bench.any_command()
    number = bench.random.choice([signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
    folder = bench.copy(command)
    workers = bench.random.choice(["--workers 0", "--workers 2"])
    case = command.replace("--workers 0", workers)
    pid = start(folder, case)
    time.sleep(bench.random.random() * bench.seconds[command])
    send = bench.random.choice([os.kill, os.killpg])  # a terminal sends it to the whole group
    send(pid, number)
    code, err = finish(folder, pid)
    said = number == signal.SIGINT and one_line(err, "stopped; run the same command again")
    held = code == 0 or (code == -number and (said or not lines(err)))
    held = held and group_ends(pid)
    again, more = run(folder, command)
    held = held and again == 0 and bench.same(folder, command)
    bench.note(
        "signals", held, f"{case}, {number.name}: {code} {err[-300:]} {again} {more[-300:]}", folder
    )


def full(bench):
    """No room at a write; one line, nothing half-written, and later the command goes on."""
    command = bench.any_command()
    folder = bench.copy(command)
    n = bench.random.randint(1, 12)
    code, err = run(folder, command, at_step(n, "full"))
    held = code == 0 or (code == 2 and one_line(err, "r/", "No space left"))
    held = held and not list((folder / "r").rglob("*.new"))
    again, more = run(folder, command)
    held = held and again == 0 and bench.same(folder, command)
    bench.note(
        "full disks", held, f"{command}, write {n}: {code} {err[-300:]} {again} {more}", folder
    )


def two(bench):
    """A second process in the same folder is refused; after a crash nothing is held."""
    command = bench.any_command()
    folder = bench.copy(command)

    def hold():
        open_folder = common.open_folder

        def held(*args, **kwargs):
            open_folder(*args, **kwargs)
            Path("held").touch()
            time.sleep(100)

        common.open_folder = held

    pid = start(folder, command, hold)
    until = time.time() + 60
    while not (folder / "held").exists() and time.time() < until:
        time.sleep(0.01)
    code, err = run(folder, command)
    held = code == 2 and one_line(err, "is in use by another process")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    again, more = run(folder, command)
    held = held and again == 0 and bench.same(folder, command)
    bench.note("two processes", held, f"{command}: {code} {err[-300:]} {again} {more}", folder)


def damage(path, rng):
    """Spoil a file in one of the ways in which files are spoilt; returns what was done."""
    data = path.read_bytes()
    at = rng.randrange(max(len(data), 1))
    ways = {
        "emptied": b"",
        "cut": data[:at],
        "one bit flipped": data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :],
        "a page of an error": b"<html>404 Not Found</html>",
        "a line doubled": data[:at] + data[at : at + 60] + data[at:],
        "noise": rng.randbytes(len(data)),
        "other JSON": b'{"args": [], "stage": 3}',
        "a list": b"[]",
    }
    how = rng.choice([*ways, "missing", "a folder", "a named pipe"])
    path.unlink()
    if how in ways:
        path.write_bytes(ways[how])
    elif how == "a folder":
        path.mkdir()
    elif how == "a named pipe":
        os.mkfifo(path)
    return how


def damaged(bench):
    """A file that a script reads is spoilt: the same result (or that of the file as it now is), or
    one line that names the file."""
    image = sorted((bench.whole / "base").rglob("*.jpg"))[3].relative_to(bench.whole)
    weights = ERM.replace("--weights none", "--weights base/w.pth")
    faces = ERM.replace("--data base", "--data faces")
    both = ("erm", "finetune")
    cases = [
        (ERM, (), "base/metadata.csv"),
        (ERM, (), str(image)),
        (weights, (), "base/w.pth"),
        (faces, (), "faces/list_attr_celeba.txt"),
        (faces, (), "faces/list_eval_partition.txt"),
        (f"{FINETUNE} --kick-in 1 --name kicked", ("erm",), "r/erm/epoch_001.pt"),
        (GRADCAM, both, "r/finetune/best.pt"),
        (GRADCAM, both, str(image.with_suffix(".png"))),
    ]
    for command in (FINETUNE, TRACE, STRUCTURED, GRADCAM):
        cases.append((command, both, "r/erm/best.pt"))
    for name in ("args.json", "last.pt", "results.json", "log.jsonl", "best.pt"):
        cases.append((ERM, ("erm",), f"r/erm/{name}"))
        cases.append((FINETUNE, both, f"r/finetune/{name}"))
    for name in ("results.json", "args.json"):
        cases.append(("results/compare.py r", both, f"r/finetune/{name}"))
    command, stages, name = bench.random.choice(cases)
    folder = bench.copy(stages=stages)
    how = damage(folder / name, bench.random)
    code, err = run(folder, command)
    known = Path(name).name if name.startswith("r/") else name.partition("/")[0]
    named = one_line(err, known)
    if Path(name).name == "args.json":  # still JSON, but it tells of another run now
        named = named or one_line(err, f"{Path(name).parent} is of a run with other settings")
    held = code == 0 or (code == 2 and named)
    bench.note("damaged files", held, f"{command}, {name} {how}: {code} {err[-500:]}", folder)


def flagged(bench):
    """A flag with a value that may be impossible: a whole run or one line."""
    command = bench.random.choice([ERM, FINETUNE, TRACE, STRUCTURED, GRADCAM])
    flags = f"{FLAGS[command.split()[0]]} --device --precision --workers --data"
    flag = bench.random.choice(flags.split())
    number = bench.random.choice(NUMBERS)
    if flag in ("--epochs", "--repeats", "--controls") and number == "4294967296":
        number = "2"  # possible, but such a run would not end
    anew = " --overwrite" if command in (ERM, FINETUNE) else ""
    case = f"{command}{anew} {flag} {number}"
    folder = bench.copy(stages=("erm", "finetune"))
    code, err = run(folder, case)
    held = code == 0 or (code == 2 and one_line(err, "error: "))
    bench.note("flags", held, f"{case}: {code} {err[-500:]}", folder)


def bereft(bench):
    """A worker of the data loader is killed when all of them run: one line, and the same command
    continues. While others still start, torch may lose the signal and find out minutes later."""
    folder = bench.copy(ERM)
    (folder / "out").touch()
    pid = start(folder, ERM.replace("--workers 0", "--workers 2"))
    until = time.time() + 60
    while "epoch 1/" not in (folder / "out").read_text() and time.time() < until:
        time.sleep(0.01)
    time.sleep(0.2 * bench.random.random())
    workers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    with contextlib.suppress(IndexError, ProcessLookupError):  # all is done already
        os.kill(int(bench.random.choice(workers)), signal.SIGKILL)
    code, err = finish(folder, pid)
    # The latter where it dies between an image and its tensor
    told = one_line(err, "DataLoader worker") or one_line(err, "Connection reset by peer")
    held = code == 0 or (code == 2 and told)
    again, more = run(folder, ERM)
    held = held and again == 0 and bench.same(folder, ERM)
    bench.note("workers", held, f"{code} {err[-500:]} {again} {more}", folder)


KINDS = (killed, signalled, full, two, damaged, flagged, bereft)


def torture(folder, seconds, seed=0):
    """Try all kinds in turn for so many seconds; returns the Bench with what was found."""
    bench = Bench(folder, seed)
    until = time.time() + seconds
    while time.time() < until:
        for kind in KINDS:
            kind(bench)
    return bench


def main():
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--seconds", type=float, default=1200, help="how long to try (1200)")
    p.add_argument("--seed", type=int, default=0, help="of the cases (0)")
    args = p.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = torture(Path(folder), args.seconds, args.seed)
    print(f"{'kind':20s} {'tried':>8s} {'held':>8s} {'failed':>8s}")
    for kind, n in bench.tried.items():
        print(f"{kind:20s} {n:8d} {n - bench.failed[kind]:8d} {bench.failed[kind]:8d}")
    print(json.dumps(bench.cases, indent=1) if bench.cases else "nothing failed")


if __name__ == "__main__":
    main()
