"""Stops at random moments, by hand: `python tests/attack.py kills 200` (kill -9), and `stops 60`
(Ctrl-C, SIGTERM). Each job, typed again with --resume, must end as one that was left alone.

A parent that has imported everything forks a child for each run, since importing takes longer than
the run itself. Networks and images are tiny. What breaks is printed, and ends in exit code 1.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from multiprocessing.util import _exit_function
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


def sweep(words: list[str]) -> None:
    """`extras.tables` with a table of two rows, and forks in place of its processes."""
    def run(words: list, check: bool) -> None:
        main = {"cass": cass.main, "dino": dino.main, "finetune": finetune.main}
        command, options = main[Path(words[1]).stem], [str(word) for word in words[2:]]
        child = start(lambda: command(options), Path(), group=False)
        try:
            os.waitpid(child, 0)
        except BaseException:  # as subprocess.run does
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise
    row = {"name": "Tiny", "labels": 1.0, "paper": "", "options": {}}
    tables.SIZES["small"] |= {"image_size": 32, "epochs": 2, "tuning": 2, "out_dim": 16}
    tables.TABLES["T0"] = {"title": "Tiny", "data": "any", "rows": [
        row | {"method": "CASS", "arm": "cnn"}, row | {"method": "DINO", "arm": "transformer"}]}
    tables.subprocess = SimpleNamespace(run=run)
    tables.main(words)


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
    "sweep": (sweep, "T0 --data ../set --seeds 1 --workers 0 --precision fp32 --out out"),
    "predict": (finetune.main, "--predict ../large --weights ../tune-fp32/out --workers 0 "
                "--out out")}


# %% runs in a child


def start(call: Callable[[], object], folder: Path, group: bool = True) -> int:
    """Run `call` in a child, in `folder`, its words in the file `said`; returns the process."""
    sys.stdout.flush()
    child = os.fork()
    if group:  # here and there, whoever comes first
        with contextlib.suppress(OSError):
            os.setpgid(child, child)
    if child:
        return child
    code = 1
    try:
        os.chdir(folder)
        said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.stdout, sys.stderr = (open(i, "w", buffering=1, closefd=False) for i in (1, 2))
        torch.set_num_threads(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
        save = Run.save

        def often(run: Run, *arguments: object) -> None:  # half of the processes: at every epoch
            run.cost *= os.getpid() % 2
            save(run, *arguments)
        Run.save = often
        call()
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            _exit_function()  # ends the loader's workers, as the end of a program does
        os._exit(code)


def job(name: str, *more: str) -> Callable[[], object]:
    """A job as it is typed; a sweep knows no --resume, but goes on by itself."""
    main, options = JOBS[name]
    words = [*options.split(), *(more if name != "sweep" else ())]
    return lambda: main(words)


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


class Place:
    """A folder with data sets and, for each job, what it leaves behind undisturbed and the seconds
    that takes. `broken` counts what is not as it must be."""

    def __init__(self, root: Path) -> None:
        self.root, self.broken, self.undisturbed = root, 0, {}
        class_folders(root / "set", cat=12, dog=12)
        for i in range(24):
            (root / "large" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            noise(i, 200, 200).save(root / "large" / "ab"[i % 2] / f"{i}.png")

    def fresh(self, name: str) -> Path:
        shutil.rmtree(self.root / name, ignore_errors=True)
        (self.root / name).mkdir()
        return self.root / name

    def reference(self, name: str) -> tuple[dict, float]:
        """Its job is done first, and those whose weights it takes before it."""
        if name not in self.undisturbed:
            for other in JOBS:
                if f"../{other}/out" in JOBS[name][1]:
                    self.reference(other)
            folder, begun = self.fresh(name), time.monotonic()
            assert ended(start(job(name), folder)) == 0, (folder / "said").read_text()
            self.undisturbed[name] = left(folder / "out"), time.monotonic() - begun
        return self.undisturbed[name]

    def check(self, fine: bool, words: str, folder: Path) -> None:
        if not fine:
            self.broken += 1
            print(f"BROKEN {words}: {(folder / 'said').read_text()[-1500:]}", flush=True)

    def ends_as_undisturbed(self, name: str, folder: Path) -> None:
        """Resumed, a job ends with the same bits."""
        code, wanted = ended(start(job(name, "--resume"), folder)), self.reference(name)[0]
        found = left(folder / "out")
        differing = [file for file in {*found, *wanted} if not equal(found.get(file),
                                                                     wanted.get(file))]
        self.check((code == 0 or predicted(name, folder)) and not differing,
                   f"{name}, resumed: {code} {differing}", folder)


def predicted(name: str, folder: Path) -> bool:
    """Whether nothing was left to do for a job that knows no --resume."""
    return name == "predict" and "is there already" in (folder / "said").read_text()


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


def interrupt(place: Place, count: int, signals: tuple[int, ...], names: list[str] = [*JOBS],
              seed: int = 0) -> None:
    """Stop the jobs `count` times in all, some several times, and see that each ends the same."""
    draw, hits, files, slowest, tries = random.Random(seed), Counter(), Counter(), (0.0, ""), 0
    while hits.total() < count:
        name = names[tries % len(names)]
        folder, seconds = place.fresh("try"), place.reference(name)[1]
        tries += 1
        for _ in range(min(draw.randint(1, 3), count - hits.total())):
            how, group = draw.choice(signals), name == "sweep" or draw.random() < 0.5
            child = start(job(name, "--resume"), folder)
            aside = draw.choice(["", "", "*.tmp", "checkpoint*.tmp", "[!lc]*.tmp"])
            moment = draw.uniform(0, seconds * (0.6 if aside else 1.1))
            file = strike(child, folder, moment, aside, how, group)
            begun = time.monotonic()
            code = ended(child)
            slowest = max(slowest, (time.monotonic() - begun, name))
            if code == 0 or predicted(name, folder):
                break  # too late
            place.check(code in ((-how,) if how == signal.SIGKILL else (130, -how))
                        and "Traceback" not in (folder / "said").read_text(),
                        f"{name}, signal {how}: {code}", folder)
            hits[name] += 1
            files[file.split(".", 2)[0].split("-")[0] if file else "-"] += 1
        place.ends_as_undisturbed(name, folder)
        print(f"{hits.total()} times stopped: {dict(hits)}; while a file was written: "
              f"{dict(files)}; the slowest took {slowest[0]:.1f} s to end ({slowest[1]})",
              flush=True)


ATTACKS = {"kills": (signal.SIGKILL,), "stops": (signal.SIGINT, signal.SIGTERM)}

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as root:
        here = Place(Path(root))
        interrupt(here, int(sys.argv[2]), ATTACKS[sys.argv[1]])
    print(f"{here.broken} broken")
    raise SystemExit(here.broken > 0)
