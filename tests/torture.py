"""What can go wrong, tried many times: kills, full disks, signals, second processes, damaged files,
impossible flags.

    python -m tests.torture                     # 20 minutes; prints what was tried, held and failed
    python -m tests.torture --seconds 60        # a sample of each kind

Every case runs a script as the command line does, in a fork of this process (torch is loaded once),
on a small data set. A case holds if the script ends with exit code 0 and the results of a run that
nothing happened to, or with exit code 2 and one line that names the file.
"""

import argparse
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

ERM = "train_erm.py --data base --run r --arch resnet10 --weights none --size 32 --epochs 2"
ERM = f"{ERM} --batch-size 16 --workers 0 --device cpu --keep-epochs 1"
FINETUNE = "finetune_contrastive.py --run r --criterion mixed --prune-fraction 0.001 --epochs 2"
FINETUNE = f"{FINETUNE} --workers 0 --device cpu"
LATER = [
    "trace_neurons.py --run r --workers 0 --device cpu --repeats 1 --sigma 0.01 --controls 39",
    "structured_trace.py --run r --workers 0 --device cpu",
    "gradcam.py --run r --workers 0 --device cpu --masks base",
]


WEIGHTS = ERM.replace("--weights none", "--weights base/w.pth")
FACES = ERM.replace("--data base", "--data faces")
KICKED = f"{FINETUNE} --kick-in 1 --name kicked"
COMPARE = "results/compare.py r"
# Flags and the values that are tried for them; a run with those that are possible ends soon
NUMBERS = ["-1", "0", "nan", "inf", "x", "-0.5", "1e400", "4294967296", "2"]
FLAGS = {
    "train_erm.py": "--epochs --batch-size --lr --size --seed --difficulty --keep-epochs --head",
    "trace_neurons.py": "--max-per-group --top-k --sigma --repeats --controls --seed --batch-size",
    "structured_trace.py": "--max-per-group --k --seed --batch-size --unit",
    "finetune_contrastive.py": "--prune-fraction --temperature --lam --kick-in --lr --seed --views",
    "gradcam.py": "--n --target --layer --seed --batch-size --after",
}
FLAGS = {name: f"{flags} --device --precision --data".split() for name, flags in FLAGS.items()}


def start(folder, command, sabotage=None):
    """Run a command in a fork; returns its process id. sabotage() is called in it first."""
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)
    os.chdir(folder)
    anew = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND  # two processes may write
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, anew), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    script, *sys.argv = command.split()[0], *command.split()
    code = 1
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # what comes before a script's first line
    try:
        if sabotage:
            sabotage()
        runpy.run_path(str(ROOT / script), run_name="__main__")
        code = 0
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
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None, (folder / "err").read_text()


def run(folder, command, sabotage=None):
    return finish(folder, start(folder, command, sabotage))


def one_line(err, *words):
    """Whether stderr holds, besides warnings, one line with these words."""
    lines = [line for line in err.splitlines() if line and not line.startswith("warning:")]
    return len(lines) == 1 and all(word in lines[0] for word in words)


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


def content(folder, stage):
    """What a run comes to: every file of a stage, but for seconds and the folder's name."""
    found = {}
    for path in sorted((folder / "r" / stage).iterdir()):
        data = path.read_bytes()
        if path.suffix == ".pt":
            found[path.name] = plain(torch.load(path, weights_only=True))
        elif path.suffix in (".json", ".jsonl"):
            rows = [data] if path.suffix == ".json" else data.splitlines()
            found[path.name] = [plain(json.loads(row)) for row in rows]
        else:
            found[path.name] = data
    found.pop("args.json")
    return found


def at_write(n, what):
    """A sabotage: at the n-th time that a file is flushed to the disk, `what` happens."""

    def sabotage():
        count, fsync = [0], os.fsync

        def counting(number):
            count[0] += 1
            if count[0] == n:
                if what == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                os.ftruncate(number, os.fstat(number).st_size // 2)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(number)

        os.fsync = counting

    return sabotage


class Bench:
    """A folder with data and a finished run r of every stage, copied for every case."""

    def __init__(self, folder, seed=0):
        self.folder, self.random = folder, random.Random(seed)
        self.whole = folder / "whole"
        self.whole.mkdir()
        write_waterbirds(self.whole / "base")
        for mask in list((self.whole / "base").rglob("*.jpg")):
            shutil.copy(mask, mask.with_suffix(".png"))
        write_celeba(self.whole / "faces")
        weights = common.build_model("resnet10", 2, 32).state_dict()
        torch.save(weights, self.whole / "base" / "w.pth")
        self.seconds = {}
        for command in (ERM, FINETUNE, *LATER):
            began = time.time()
            code, err = run(self.whole, command)
            assert code == 0, err
            self.seconds[command] = time.time() - began
        self.tried, self.failed, self.cases = Counter(), Counter(), []

    def copy(self, *stages):
        """A fresh folder with the data and these stages of the run."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        for data in ("base", "faces"):
            shutil.copytree(self.whole / data, folder / data)
        for stage in stages:
            shutil.copytree(self.whole / "r" / stage, folder / "r" / stage)
        return folder

    def note(self, kind, held, case):
        self.tried[kind] += 1
        self.failed[kind] += not held
        if not held:
            self.cases.append(f"{kind}: {case}")

    def same(self, folder, stage):
        """Whether a stage came to what it does without an accident, with nothing left over."""
        left = [path for path in (folder / "r").rglob(".*")]
        return not left and content(folder, stage) == content(self.whole, stage)

    def any_stage(self):
        """(command, stage, stages it needs), a training stage in two of three cases."""
        if self.random.random() < 0.65:
            both = [(ERM, "erm", ()), (FINETUNE, "finetune", ("erm",))]
            return self.random.choice(both)
        command = self.random.choice(LATER)
        stage = {"t": "trace", "s": "structured", "g": "gradcam"}[command[0]]
        return command, stage, ("erm", "finetune")


def killed(bench):
    """SIGKILL at a write or at a random moment; the same command again."""
    command, stage, needs = bench.any_stage()
    folder = bench.copy(*needs)
    if bench.random.random() < 0.5:
        n = bench.random.randint(1, 14)
        case = f"{command}, killed at write {n}"
        run(folder, command, at_write(n, "kill"))
    else:
        after = bench.random.random() * bench.seconds[command]
        case = f"{command}, killed after {after:.2f} s"
        pid = start(folder, command)
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
        finish(folder, pid)
    code, err = run(folder, command)
    bench.note("killed", code == 0 and bench.same(folder, stage), f"{case}: {code} {err[-300:]}")
    shutil.rmtree(folder)


def signalled(bench):
    """SIGTERM, SIGHUP or SIGINT; one line and the right code, then the same command again."""
    command, stage, needs = bench.any_stage()
    folder, number = bench.copy(*needs), bench.random.choice(common.STOP_SIGNALS)
    pid = start(folder, command)
    time.sleep(bench.random.random() * bench.seconds[command])
    os.kill(pid, number)
    code, err = finish(folder, pid)
    before = not err and code in (128 + number, -number)  # while torch was loading
    held = code == 0 or (code == 128 + number and one_line(err, "the same command")) or before
    again, more = run(folder, command)
    held = held and again == 0 and bench.same(folder, stage)
    bench.note("signals", held, f"{command}, {number.name}: {code} {err[-300:]} {again} {more}")
    shutil.rmtree(folder)


def full(bench):
    """No room at a write; one line naming the file, the old stands, later the command goes on."""
    command, stage, needs = bench.any_stage()
    folder, n = bench.copy(*needs), bench.random.randint(1, 14)
    code, err = run(folder, command, at_write(n, "full"))
    held = code == 0 or (code == 2 and one_line(err, "No space left"))
    held = held and not [path for path in (folder / "r").rglob(".*")]
    again, more = run(folder, command)
    held = held and again == 0 and bench.same(folder, stage)
    bench.note("full disks", held, f"{command}, write {n}: {code} {err[-300:]} {again} {more}")
    shutil.rmtree(folder)


def two(bench):
    """A second process on the same folder is told who is there; after a crash nothing is held."""
    command, stage, needs = bench.any_stage()
    folder = bench.copy(*needs)
    pid = start(folder, command, lambda: setattr(common, "build_model", lambda *_: time.sleep(60)))
    lock = folder / "r" / f".{stage}.lock"
    while not lock.exists() or not lock.read_text():
        time.sleep(0.01)
    second = start(folder, command)
    code, err = finish(folder, second)
    held = code == 2 and one_line(err, str(pid))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    again, more = run(folder, command)
    held = held and again == 0 and bench.same(folder, stage)
    bench.note("two processes", held, f"{command}: {code} {err[-300:]} {again} {more}")
    shutil.rmtree(folder)


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
    cases = [(ERM, (), "base/metadata.csv"), (ERM, (), str(image))]
    for name in ("args.json", "last.pt", "results.json", "log.jsonl"):
        cases += [
            (ERM, ("erm",), f"r/erm/{name}"),
            (FINETUNE, ("erm", "finetune"), f"r/finetune/{name}"),
        ]
    cases += [(FINETUNE, ("erm", "finetune"), "r/finetune/pruned.csv")]
    cases += [(KICKED, ("erm",), "r/erm/epoch_001.pt")]
    cases += [(LATER[2], ("erm", "finetune"), "r/finetune/best.pt")]
    for command in (*LATER, FINETUNE):
        cases.append((command, ("erm", "finetune"), "r/erm/best.pt"))
    cases += [(LATER[2], ("erm", "finetune"), str(image.with_suffix(".png")))]
    cases += [(WEIGHTS, (), "base/w.pth"), (FACES, (), "faces/list_attr_celeba.txt")]
    cases += [(FACES, (), "faces/list_eval_partition.txt")]
    for name in ("results.json", "args.json"):
        cases += [(COMPARE, ("erm", "finetune"), f"r/finetune/{name}")]
    command, needs, name = bench.random.choice(cases)
    folder = bench.copy(*needs)
    how = damage(folder / name, bench.random)
    code, err = run(folder, command)
    known = name.partition("/")[0] if name[0] in "bf" else Path(name).name
    held = code == 0 or (code == 2 and one_line(err, known))
    bench.note("damaged files", held, f"{command}, {name} {how}: {code} {err[-500:]}")
    shutil.rmtree(folder)


def flagged(bench):
    """A flag with a value that may be impossible: a whole run or one line."""
    command = bench.random.choice([ERM, FINETUNE, *LATER])
    flag = bench.random.choice(FLAGS[command.split()[0]])
    anew = " --overwrite" if command in (ERM, FINETUNE) else ""
    number = bench.random.choice(NUMBERS)
    if flag in ("--epochs", "--repeats") and number == "4294967296":
        number = "2"  # possible, but such a run would not end
    case = f"{command}{anew} {flag} {number}"
    folder = bench.copy("erm", "finetune")
    code, err = run(folder, case)
    held = code == 0 or (code == 2 and one_line(err, "error: "))
    bench.note("flags", held, f"{case}: {code} {err[-500:]}")
    shutil.rmtree(folder)


def bereft(bench):
    """A worker of the data loader is killed: one line."""
    folder, command = bench.copy(), ERM.replace("--workers 0", "--workers 2")
    pid = start(folder, command.replace("--epochs 2", "--epochs 90"))
    workers, children = [], Path(f"/proc/{pid}/task/{pid}/children")
    while len(workers) < 2 and children.exists():  # one alone may be git
        workers = children.read_text().split()
        time.sleep(0.02)
    time.sleep(2 * bench.random.random())
    os.kill(int(bench.random.choice(workers)), signal.SIGKILL)
    code, err = finish(folder, pid)
    bench.note("workers", code == 2 and one_line(err, "DataLoader worker"), f"{code} {err[-500:]}")
    shutil.rmtree(folder)


KINDS = (killed, signalled, full, two, damaged, flagged, bereft)


def torture(folder, seconds, seed=0):
    """Try all kinds in turn for so many seconds; returns the Bench with what was found."""
    bench, until = Bench(folder, seed), time.time() + seconds
    while time.time() < until:
        for kind in KINDS:
            kind(bench)
    return bench


def main():
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
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
