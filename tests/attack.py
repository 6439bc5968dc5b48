"""Attacks on the commands, by hand: `python tests/attack.py kills 200`; see ATTACKS at the end.

A parent that has imported everything forks a child for each run, since importing takes longer than
the run itself. Networks and images are tiny. What breaks is printed, and ends in exit code 1.
"""

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.util import _exit_function
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from safetensors.torch import save_file

import cass
import data
import dino
import finetune
import runtime
from extras import prepare, tables
from helpers import class_folders, equal, noise

torch.set_num_threads(1)
TINY = "--data ../set --init random --image-size 32 --batch-size 4 --workers 0 --out out "
CASS = TINY + "--cnn test_resnet --transformer test_vit "
JOBS = {  # name -> command and options, typed in a folder beside ../set, ../pre and ../tuned
    "cass fp32": (cass.main, CASS + "--precision fp32 --epochs 4"),
    "cass bf16": (cass.main, CASS + "--precision bf16 --epochs 4"),
    "cass, a worker": (cass.main, CASS + "--precision fp32 --epochs 4 --workers 1"),
    "dino fp32": (dino.main, TINY + "--arch test_vit --out-dim 16 --precision fp32 --epochs 4"),
    "dino bf16": (dino.main, TINY + "--arch test_resnet --out-dim 16 --precision bf16 --epochs 4"),
    "finetune fp32": (finetune.main, TINY + "--weights ../pre --precision fp32 --epochs 2 "
                      "--seeds 3"),
    "finetune bf16": (finetune.main, TINY + "--weights ../pre --precision bf16 --epochs 2 "
                      "--seeds 2"),
    "cache": (cass.main, CASS + "--data ../large --epochs 1 --precision fp32 --cache out/cache"),
    "sweep": (tables.main, "T0 --data ../set --seeds 1 --workers 0 --precision fp32 --out out"),
    "predict": (finetune.main, "--predict ../large --weights ../tuned --workers 0 --out out")}
MAIN = {"cass": cass.main, "dino": dino.main, "finetune": finetune.main}


# %% runs in a child


def start(call: Callable[[], object], folder: Path, group: bool = True) -> int:
    """Run `call` in a child, in `folder`, its words in the file `said`; returns the process."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        if group:
            os.setpgid(0, 0)
        os.chdir(folder)
        said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        call()
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            _exit_function()  # ends the loader's workers, as the end of a program does
        os._exit(code)


def job(name: str, *more: str) -> Callable[[], object]:
    """A job as it is typed; tables and prediction know no --resume and go on by themselves."""
    main, options = JOBS[name]
    words = [*options.split(), *more][:None if "sweep" not in name else len(options.split())]

    def call() -> None:
        sys.argv = [f"/somewhere/{main.__module__}.py", *words]
        main(words)
    return call


def run_in_a_fork(words: list, check: bool) -> None:
    """In place of `subprocess.run` in a sweep of tables."""
    call = MAIN[Path(words[1]).stem]
    os.waitpid(start(lambda: call([str(word) for word in words[2:]]), Path(), group=False), 0)


def ended(child: int, limit: float = 900) -> int:
    """Its exit code, or minus the signal that killed it; 99 if it did not end by itself."""
    begun = time.monotonic()
    while time.monotonic() - begun < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.0005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return 99


def often(save: Callable) -> Callable:
    """Half of the processes save at every epoch, the others by the 5 % rule."""
    def saved(run: runtime.Run, *arguments: object) -> None:
        run.cost *= os.getpid() % 2
        save(run, *arguments)
    return saved


def left(folder: Path) -> dict:
    """All that a run leaves behind, but for times and for how it was called."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(file.relative_to(folder))
        if file.suffix == ".pt":
            found[name] = torch.load(file, weights_only=True)
            found[name].pop("rows", None)
        elif file.suffix == ".jsonl":
            rows = map(json.loads, file.read_text().splitlines())
            found[name] = [row | {"seconds": 0} for row in rows]
        elif file.suffix == ".json":
            found[name] = json.loads(file.read_text())
            for varying in ("run", "command"):
                found[name].pop(varying, None)
            found[name].get("options", {}).pop("resume", None)
        elif name != ".lock" and file.suffix != ".tmp":
            found[name] = file.read_bytes()
    return found


def difference(a: dict, b: dict) -> list[str]:
    return [name for name in sorted({*a, *b}) if not equal(a.get(name), b.get(name))]


class Place:
    """A folder with a data set, pretrained and fine-tuned weights and, for each job, what it
    leaves behind undisturbed and the seconds it takes. `complaints` gathers what breaks."""

    def __init__(self, root: Path) -> None:
        self.root, self.complaints, self.undisturbed = root, [], {}
        class_folders(root / "set", cat=12, dog=12)
        for i in range(24):
            (root / "large" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            noise(i, 200, 200).save(root / "large" / "ab"[i % 2] / f"{i}.png")
        for name, (main, options) in {"pre": JOBS["cass fp32"],
                                      "tuned": JOBS["finetune fp32"]}.items():
            folder = self.fresh(f"make-{name}")
            assert ended(start(lambda: main(options.split()), folder)) == 0, self.said(folder)
            (folder / "out").rename(root / name)
        start_row = {"name": "Tiny", "labels": 1.0, "paper": "", "options": {}}
        tables.SIZES["small"] |= {"image_size": 32, "epochs": 2, "tuning": 2, "out_dim": 16}
        tables.TABLES["T0"] = {"title": "Tiny", "data": "any", "rows": [
            {"method": "CASS", "arm": "cnn", **start_row},
            {"method": "DINO", "arm": "transformer", **start_row}]}
        tables.subprocess = SimpleNamespace(run=run_in_a_fork)
        runtime.Run.save = often(runtime.Run.save)

    def fresh(self, name: str) -> Path:
        shutil.rmtree(self.root / name, ignore_errors=True)
        (self.root / name).mkdir()
        return self.root / name

    def said(self, folder: Path) -> str:
        return (folder / "said").read_text() if (folder / "said").is_file() else ""

    def reference(self, name: str) -> tuple[dict, float]:
        if name not in self.undisturbed:
            folder, begun = self.fresh("reference"), time.monotonic()
            assert ended(start(job(name), folder)) == 0, self.said(folder)
            self.undisturbed[name] = left(folder / "out"), time.monotonic() - begun
        return self.undisturbed[name]

    def check(self, fine: object, words: str, folder: Path) -> None:
        if not fine:
            self.complaints.append(f"{words}: {self.said(folder)[-1500:]}")
            print("BROKEN", self.complaints[-1], flush=True)

    def ends_as_undisturbed(self, name: str, folder: Path, words: str) -> None:
        """Resumed, a job ends with the same bits."""
        code = ended(start(job(name, "--resume"), folder))
        whole = name == "predict" and "is there already" in self.said(folder)  # nothing to do
        differing = difference(left(folder / "out"), self.reference(name)[0])
        self.check((code == 0 or whole) and not differing, f"{words}: then {code} {differing}",
                   folder)


@contextlib.contextmanager
def place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory() as root:
        yield Place(Path(root))


# %% interruptions


def strike(child: int, folder: Path, moment: float, aside: str, how: int, group: bool) -> str:
    """Send a signal once `moment` seconds have passed and, with `aside`, a file of that form is
    being written. Returns its name."""
    begun, file = time.monotonic(), ""
    while not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if aside:
            file = next((path.name for path in folder.glob(f"out/**/{aside}")), "")
        if time.monotonic() - begun > moment and (file or not aside):
            (os.killpg if group else os.kill)(child, how)
            break
        time.sleep(0.0003)
    return file


def interrupt(count: int, signals: tuple[int, ...], names: list[str], place: Place,
              seed: int = 0) -> None:
    """Stop the jobs `count` times in all, some several times, and see that each ends the same."""
    draw, hits, files, slowest, tries = random.Random(seed), Counter(), Counter(), 0.0, 0
    while sum(hits.values()) < count and tries < 5 * count:
        name = names[tries % len(names)]
        folder, seconds = place.fresh("try"), place.reference(name)[1]
        tries += 1
        for _ in range(draw.randint(1, 3)):
            how, group = draw.choice(signals), name == "sweep" or draw.random() < 0.5
            child = start(job(name, "--resume"), folder)
            aside = draw.choice(["", "", "*.tmp", "checkpoint*.tmp", "[!lc]*.tmp"])
            moment = draw.uniform(0, seconds * (0.6 if aside else 1.1))
            file = strike(child, folder, moment, aside, how, group)
            begun = time.monotonic()
            code = ended(child)
            slowest = max(slowest, time.monotonic() - begun)
            fine = code in ((-how,) if how == signal.SIGKILL else (130, -how))
            if code == 0 or name == "predict" and "is there already" in place.said(folder):
                break  # too late
            place.check(fine and "Traceback" not in place.said(folder), f"{name} {how} {code}",
                        folder)
            hits[name] += 1
            files[file.split(".", 2)[0].split("-")[0] if file else "-"] += 1
        place.ends_as_undisturbed(name, folder, f"{name}, stopped")
        print(f"{sum(hits.values())} times stopped: {dict(hits)}; while a file was written: "
              f"{dict(files)}; the slowest took {slowest:.1f} s to end", flush=True)


def kills(count: int) -> None:
    """kill -9."""
    with place() as here:
        interrupt(count, (signal.SIGKILL,), list(JOBS), here)
    finish(here)


def stops(count: int) -> None:
    """Ctrl-C and SIGTERM."""
    with place() as here:
        interrupt(count, (signal.SIGINT, signal.SIGTERM), list(JOBS), here)
    finish(here)


def finish(here: Place) -> None:
    print(f"{len(here.complaints)} broken")
    raise SystemExit(bool(here.complaints))


ATTACKS = {"kills": kills, "stops": stops}

if __name__ == "__main__":
    ATTACKS[sys.argv[1]](*map(int, sys.argv[2:]))
