"""Stops at random moments, by hand: `python tests/attack.py kills 200` (kill -9), and `stops 60`
(Ctrl-C, SIGTERM). Each job, typed again with --resume, must end as one that was left alone.

A parent that has imported everything forks a child for each run, since importing takes longer than
the run itself. Networks and images are tiny. The first job that ends otherwise ends the attack.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import cass
import dino
import finetune
from extras import tables
from helpers import class_folders, equal, noise
from runtime import Run

TABLE = {"title": "Tiny", "data": "any", "rows": [
    {"name": "Tiny", "labels": 1.0, "paper": "", "options": {}, "method": method, "arm": arm}
    for method, arm in (("CASS", "cnn"), ("DINO", "transformer"))]}
tables.TABLES["T0"] = TABLE
tables.SIZES["small"] |= {"image_size": 32, "epochs": 2, "tuning": 2, "out_dim": 16}
FORK = multiprocessing.get_context("fork")


def run_forked(words: list, check: bool) -> None:
    """In place of the table's subprocess.run."""
    main = {"cass": cass.main, "dino": dino.main, "finetune": finetune.main}[Path(words[1]).stem]
    child = FORK.Process(target=main, args=([str(word) for word in words[2:]],))
    child.start()
    child.join()


tables.subprocess = SimpleNamespace(run=run_forked)

TINY = "--data ../set --init random --image-size 32 --batch-size 4 --workers 0 --out out "
CASS = TINY + "--cnn test_resnet --transformer test_vit "
TUNE = TINY + "--weights ../cass-fp32/out --epochs 2 "
JOBS = {  # name -> command and options, typed in a folder beside ../set and those of other jobs
    "cass-fp32": (cass.main, CASS + "--precision fp32 --epochs 4"),
    "cass-bf16": (cass.main, CASS + "--precision bf16 --epochs 4"),
    "cass-worker": (cass.main, CASS + "--precision fp32 --epochs 4 --workers 1"),
    "dino-fp32": (dino.main, TINY + "--arch test_vit --out-dim 16 --precision fp32 --epochs 4"),
    "dino-bf16": (dino.main, TINY + "--arch test_resnet --out-dim 16 --precision bf16 --epochs 4"),
    "tune-fp32": (finetune.main, TUNE + "--precision fp32 --seeds 3"),
    "tune-bf16": (finetune.main, TUNE + "--precision bf16 --seeds 2"),
    "cache": (cass.main, CASS + "--data ../large --epochs 1 --precision fp32 --cache out/cache"),
    "sweep": (tables.main, "T0 --data ../set --seeds 1 --workers 0 --precision fp32 --out out"),
    "predict": (finetune.main, "--predict ../large --weights ../tune-fp32/out --workers 0 "
                "--out out")}


# %% a job


def start(name: str, folder: Path) -> BaseProcess:
    """A job in a child with a process group of its own, its words in the file `said`."""
    main, options = JOBS[name]
    words = [*options.split(), *["--resume"] * (name != "sweep")]  # which goes on by itself

    def child() -> None:
        os.setpgid(0, 0)
        os.chdir(folder)
        sys.stdout = sys.stderr = said = open("said", "a", buffering=1)
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        torch.set_num_threads(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
        save = Run.save

        def often(run: Run, *arguments: object) -> None:  # half of the processes: at every epoch
            run.cost *= os.getpid() % 2
            save(run, *arguments)
        Run.save = often
        main(words)
    process = FORK.Process(target=child)
    process.start()
    return process


def ended(process: BaseProcess) -> int:
    """Its exit code, or minus the signal that killed it."""
    process.join(900)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        raise TimeoutError("a job does not end")
    return process.exitcode


def finish(name: str, folder: Path) -> dict[str, object]:
    """Do a job, or what is left of it. Returns all that is in its folder then, but for times."""
    code = ended(start(name, folder))
    assert complete(name, code, folder), f"{name} ended with {code}: {words_of(folder)}"
    files = [file for file in (folder / "out").rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): content(file) for file in files
            if file.name != ".lock" and file.suffix != ".tmp"}


def content(file: Path) -> object:
    if file.suffix == ".pt":
        return torch.load(file, weights_only=True) | {"rows": None}
    if file.suffix == ".json":
        return json.loads(file.read_text()) | {"run": None}
    if file.suffix == ".jsonl":
        return [json.loads(line) | {"seconds": None} for line in file.read_text().splitlines()]
    return file.read_bytes()


def complete(name: str, code: int, folder: Path) -> bool:
    """Whether a job came to its end, or was there before: a prediction knows no --resume."""
    return code == 0 or name == "predict" and "is there already" in words_of(folder)


def words_of(folder: Path) -> str:
    return (folder / "said").read_text()


# %% interruptions


class Place:
    """A folder with data sets and, for each job, what it leaves behind undisturbed and the seconds
    that takes."""

    def __init__(self, root: Path) -> None:
        self.root, self.undisturbed = root, {}
        class_folders(root / "set", cat=12, dog=12)
        for file in class_folders(root / "large", a=12, b=12).rglob("*.png"):
            noise(int(file.stem), 200, 200).save(file)

    def fresh(self) -> Path:
        shutil.rmtree(self.root / "try", ignore_errors=True)
        (self.root / "try").mkdir()
        return self.root / "try"

    def reference(self, name: str) -> tuple[dict, float]:
        """Its job is done first, and those whose weights it takes before it."""
        if name not in self.undisturbed:
            for other in JOBS:
                if f"../{other}/out" in JOBS[name][1]:
                    self.reference(other)
            folder, begun = self.fresh(), time.monotonic()  # a cache holds the way to images
            self.undisturbed[name] = finish(name, folder), time.monotonic() - begun
            folder.rename(self.root / name)  # where other jobs look for its weights
        return self.undisturbed[name]


def strike(process: BaseProcess, folder: Path, moment: float, aside: str, how: int,
           group: bool) -> str:
    """Send a signal once `moment` seconds have passed and, with `aside`, a file of that form is
    being written. Returns its name."""
    begun = time.monotonic()
    while process.is_alive():
        file = next((path.name for path in folder.glob(f"out/**/{aside}")), "") if aside else ""
        if time.monotonic() - begun > moment and (file or not aside):
            with contextlib.suppress(ProcessLookupError):  # it has no group of its own yet
                (os.killpg if group else os.kill)(process.pid, how)
                return file
        time.sleep(0.0003)
    return ""


def interrupt(place: Place, count: int, signals: tuple[int, ...], names: list[str] = [*JOBS],
              seed: int = 0) -> None:
    """Stop the jobs `count` times in all, some several times, and see that each ends the same."""
    draw, hits, files, slowest = random.Random(seed), Counter(), Counter(), 0.0
    for name in itertools.cycle(names):
        wanted, seconds = place.reference(name)
        folder = place.fresh()
        for _ in range(min(draw.randint(1, 3), count - hits.total())):
            how, group = draw.choice(signals), name == "sweep" or draw.random() < 0.5
            aside = draw.choice(["", "", "*.tmp", "checkpoint*.tmp", "[!lc]*.tmp"])
            moment = draw.uniform(0, seconds * (0.6 if aside else 1.1))
            process = start(name, folder)
            file = strike(process, folder, moment, aside, how, group)
            begun = time.monotonic()
            code = ended(process)
            slowest = max(slowest, time.monotonic() - begun)
            if complete(name, code, folder):
                break  # too late
            fine = code == -how or how != signal.SIGKILL and code == 130
            assert fine and "Traceback" not in words_of(folder), (name, how, code, words_of(folder))
            hits[name] += 1
            files[re.split("[.-]", file)[0] or "none"] += 1
        found = finish(name, folder)
        differing = [file for file in {*found, *wanted}
                     if not equal(found.get(file), wanted.get(file))]
        assert not differing, f"{name}, resumed, leaves other files: {differing}"
        print(f"{hits.total()} times stopped: {dict(hits)}; while a file was written: "
              f"{dict(files)}; the slowest took {slowest:.1f} s to end", flush=True)
        if hits.total() >= count:
            return


ATTACKS = {"kills": (signal.SIGKILL,), "stops": (signal.SIGINT, signal.SIGTERM)}

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as root:
        interrupt(Place(Path(root)), int(sys.argv[2]), ATTACKS[sys.argv[1]])
    print("0 broken")
