"""Time CASS beside DINO, step by step, in one run on one machine (paper, Table 1).

    python -m extras.speed --data ./autoimmune --init random --cnn resnet18 \\
        --transformer vit_tiny_patch16_224 --image-size 96
    python -m extras.speed --data ./autoimmune --loading

The loops timed are the ones of cass.py and dino.py themselves, on real images. Rounds of all
contestants follow each other, so that a machine that slows down slows all of them; the first steps
of each round are left out. With --loading, images are loaded and nothing is trained: from their files, from
the cache, and by a plain Pillow and torchvision (v1) pipeline of the same steps, by turns.
"""

import argparse
import contextlib
import ctypes
import gc
import platform
import re
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Iterator

import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torchvision import transforms as v1

import cass
import dino
from data import MEAN, STD, ImageCache, ImageRows, add_data_options, augmentation, make_loader, open_images
from runtime import (Options, UserError, add_run_options, build_model, clear_exit, pick_device, pick_precision, pick_workers,
                     positive)

FLOOR = 3 / 8  # forward units an image and arm: CASS 1 + 2 backward; DINO (2 student views) * 3 + 2 teacher views
PAPER = 0.31  # Table 1: "69 % less time"


class TimedLoader:
    """Hands on `steps` batches and notes when each was asked for and when it came. Before its
    first `set_epoch` (the look at the untrained networks) it gives one batch only."""

    def __init__(self, loader: Any, steps: int, device: torch.device) -> None:
        self.loader, self.steps, self.device, self.started = loader, steps, device, False

    def __len__(self) -> int:
        return self.steps

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        self.started = True

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __iter__(self) -> Iterator[Any]:
        self.asked, self.came, batches = [], [], iter(self.loader)
        for _ in range(self.steps if self.started else 1):
            self.asked.append(self.now())
            batch = next(batches)
            self.came.append(self.now())
            yield batch
        self.asked.append(self.now())

    def seconds(self, warm_up: int) -> tuple[list[float], list[float]]:
        """Seconds of each step after the warm-up: all of it, and the wait for data in it."""
        whole = [after - before for before, after in zip(self.asked, self.asked[1:])]
        wait = [came - asked for asked, came in zip(self.asked, self.came)]
        return whole[warm_up:], wait[warm_up:]


class Stopwatch:
    """Inside `with`, adds up the seconds spent in all optimisers, and in DINO's moving averages."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.total, self.began = device, 0.0, 0.0

    def begin(self, *_: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.began = time.perf_counter()

    def end(self, *_: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.total += time.perf_counter() - self.began

    def __enter__(self) -> "Stopwatch":
        def timed_follow(*args: Any) -> None:
            self.begin()
            self.follow(*args)
            self.end()

        self.hooks = (register_optimizer_step_pre_hook(self.begin), register_optimizer_step_post_hook(self.end))
        self.follow, dino.follow = dino.follow, timed_follow
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        dino.follow = self.follow


def reset_memory(device: torch.device) -> float:
    """Start a new peak; returns what is in use now, in GB (on the CPU, of the process; Linux only)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 1e9
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # memory that Python has freed, but the process still holds
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is in use now
    except OSError:
        return float("nan")
    return peak_memory(device)


def peak_memory(device: torch.device) -> float:
    """The highest memory since `reset_memory`, in GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    kilobytes = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
    return int(kilobytes[1]) * 1024 / 1e9 if kilobytes else float("nan")


def contestants(args: argparse.Namespace, device: torch.device) -> dict[str, tuple[bool, Callable[[Any], None]]]:
    """Name -> (needs DINO's views, a function that trains new networks for one epoch of a loader)."""
    precision = pick_precision(args.precision, device)

    def network(name: str, **options: Any) -> torch.nn.Module:
        return build_model(name, args.init, args.image_size, seed=args.seed, **options).to(device)

    def run_cass(loss: str) -> Callable[[Any], None]:
        return lambda loader: cass.pretrain_cass(network(args.cnn), network(args.transformer), loader, epochs=1, loss=loss,
                                                 swa_start=1, precision=precision)

    def run_dino(name: str, out_dim: int) -> Callable[[Any], None]:
        return lambda loader: dino.pretrain_dino(network(name, outputs=0), loader, epochs=1, out_dim=out_dim,
                                                 precision=precision)

    runs = {"CASS, both arms": (False, run_cass("cosine")), "CASS, --loss contrast": (False, run_cass("contrast"))}
    for out_dim, remark in ((65336, ""), (16, ", 16 outputs")):
        for name in (args.cnn, args.transformer) if not args.cass_only else ():
            runs[f"DINO, {name.split('.')[0]}{remark}"] = (True, run_dino(name, out_dim))
    return runs


def measure(args: argparse.Namespace) -> tuple[dict[str, dict[str, float]], int]:
    """Seconds a step of each contestant, where they go, and peak memory; and the steps of an epoch."""
    device, images = pick_device(args.device), open_images(args)
    rows = images.part("train")
    if len(rows) < args.batch_size:
        raise UserError(f"{args.data} has {len(rows)} training images, fewer than a batch of {args.batch_size}")
    runs, cache = contestants(args, device), args.cache and ImageCache(images, args.image_size, args.cache)
    found: dict[str, dict] = {name: {"step": [], "wait": [], "update": 0.0, "memory": 0.0} for name in runs}
    for turn in range(args.rounds + 1):
        for name, (views, train) in runs.items():
            transform = dino.DinoViews(args.image_size) if views else augmentation(args.image_size)
            loader = make_loader(ImageRows(images.folder, rows, transform, args.seed, cache=cache), args.batch_size,
                                 seed=args.seed + turn, drop_last=True, workers=pick_workers(args.workers, device))
            timed = TimedLoader(loader, min(args.steps + args.warm_up, len(loader)), device)
            warm_up = min(args.warm_up, timed.steps - 1)  # of a small set one step is timed at least
            before = reset_memory(device)
            if turn < args.rounds:
                train(timed)
                whole, wait = timed.seconds(warm_up)
                found[name]["step"] += whole
                found[name]["wait"] += wait
                found[name]["memory"] = max(found[name]["memory"], peak_memory(device) - before)
            else:  # once more, to see where the time goes: looking costs a little itself
                with Stopwatch(device) as watch:
                    train(timed)
                found[name]["update"] = watch.total / timed.steps
            print(f"round {turn + 1} of {args.rounds + 1}: {name}", flush=True)
    return found, len(rows) // args.batch_size


def time_table(args: argparse.Namespace) -> list[str]:
    """Table 1 as Markdown lines."""
    found, steps = measure(args)
    mean = {name: statistics.median(one["step"]) for name, one in found.items()}  # one stall is no trend
    lines = [f"{args.cnn} and {args.transformer}, {args.image_size} pixels, batch {args.batch_size}, "
             f"{machine(pick_device(args.device))}, {pick_precision(args.precision, pick_device(args.device))}; "
             f"{len(next(iter(found.values()))['step'])} steps each in {args.rounds} interleaved rounds, "
             f"{args.warm_up} warm-up steps a round left out; steps of {steps} an epoch", "",
             "| | ms/step (median) | s.d. | waiting for data | forward, backward | optimiser, averages | images/s | "
             f"s/epoch | {args.epochs} epochs (extrapolated) | peak memory |", "|---|" + "---:|" * 9]
    for name, one in found.items():
        wait = statistics.median(one["wait"])
        hours = mean[name] * steps * args.epochs / 3600
        lines.append(
            f"| {name} | {mean[name] * 1e3:.1f} | {statistics.pstdev(one['step']) * 1e3:.1f} | {wait * 1e3:.1f} | "
            f"{(mean[name] - wait - one['update']) * 1e3:.1f} | {one['update'] * 1e3:.1f} | "
            f"{args.batch_size / mean[name]:.1f} | {mean[name] * steps:.1f} | {hours:.2f} h | {one['memory']:.2f} GB |")
    dinos = [name for name in mean if name.startswith("DINO")]
    if dinos:
        full = sum(mean[name] for name in dinos if "16 outputs" not in name)
        small = sum(mean[name] for name in dinos if "16 outputs" in name)
        own = mean["CASS, both arms"]
        lines += ["", f"--loss contrast takes {mean['CASS, --loss contrast'] / own:.2f} times as long as the paper's loss. "
                  f"CASS / DINO, both arms: {own / full:.3f}; without DINO's output layer (16 outputs instead of "
                  f"65,336): {own / small:.3f}; the output layer takes {1 - small / full:.0%} of DINO's time. "
                  f"Paper: {PAPER}. Arithmetic floor (3 forward units against 8): {FLOOR}."]
    return lines


def machine(device: torch.device) -> str:
    """What it ran on, with versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else (
        f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)")
    return f"{name}, torch {torch.__version__}"


# %% loading


def plain_pipeline(size: int) -> Callable[[Image.Image], torch.Tensor]:
    """The steps of `augmentation(size)` in torchvision's first transforms, as most scripts have them."""
    jitter = v1.ColorJitter(0.2, 0.2, 0.2, 0.1)

    def one_of(other: torch.nn.Module) -> v1.RandomApply:
        return v1.RandomApply([v1.RandomChoice([jitter, other])], p=0.3)

    bilinear = v1.InterpolationMode.BILINEAR
    return v1.Compose([v1.Resize((size, size)), one_of(v1.RandomPerspective(0.2, 1.0, bilinear)),
                       one_of(v1.RandomAffine(10, interpolation=bilinear)), v1.RandomHorizontalFlip(0.3),
                       v1.RandomVerticalFlip(0.3), v1.ToTensor(), v1.Normalize(MEAN, STD)])


def loading_table(args: argparse.Namespace) -> list[str]:
    """Images a second that one core loads and augments, as Markdown lines."""
    images, threads = open_images(args), torch.get_num_threads()
    rows, plain = images.part("train")[:args.steps * args.batch_size], plain_pipeline(args.image_size)
    with tempfile.TemporaryDirectory() as folder:
        cache = ImageCache(replace(images, rows=rows), args.image_size, Path(folder))
        ours, cached = (ImageRows(images.folder, rows, augmentation(args.image_size), args.seed, cache=c)
                        for c in (None, cache))
        ways: dict[str, Callable[[int, int], Any]] = {
            "from files": lambda epoch, i: ours[epoch, i], "from the cache": lambda epoch, i: cached[epoch, i],
            "plain Pillow and torchvision v1": lambda epoch, i: plain(
                Image.open(images.folder / rows[i].path).convert("RGB"))}
        found: dict[str, list[float]] = {name: [] for name in ways}
        torch.set_num_threads(1)
        for turn in range(args.rounds + 1):  # the first warms up
            for name, load in ways.items():
                begun = time.perf_counter()
                for i in range(len(rows)):
                    load(turn, i)
                found[name].append(len(rows) / (time.perf_counter() - begun))
        torch.set_num_threads(threads)
    plain_speed = statistics.median(found["plain Pillow and torchvision v1"][1:])
    lines = [f"{len(rows)} images a round, {args.rounds} rounds by turns after one to warm up, {args.image_size} pixels, "
             f"one process and thread, torch {torch.__version__}", "",
             "| | images/s on one core (median) | lowest - highest | of the plain pipeline |", "|---|---:|---:|---:|"]
    for name, values in found.items():
        middle = statistics.median(values[1:])
        lines.append(f"| {name} | {middle:.0f} | {min(values[1:]):.0f} - {max(values[1:]):.0f} | {middle / plain_speed:.2f} |")
    return lines


# %% the command


def speed_options() -> argparse.ArgumentParser:
    parser = Options("python -m extras.speed", "Time CASS beside DINO on your images and machine.")
    add_data_options(parser)
    add_run_options(parser, epochs=100, batch_size=16, lr=1e-3, image_size=384)
    add = parser.add_argument
    add("--cnn", default="resnet50.a1_in1k", help="first arm (paper: %(default)s)")
    add("--transformer", default="vit_base_patch16_384.augreg_in21k_ft_in1k", help="second arm (paper: %(default)s)")
    add("--steps", type=positive(int), default=10, help="steps timed in a round (default: %(default)s)")
    add("--warm-up", type=int, default=3, help="steps before them, left out (default: %(default)s)")
    add("--rounds", type=positive(int), default=3, help="rounds of all contestants (default: %(default)s)")
    add("--cass-only", action="store_true", help="time CASS alone")
    add("--loading", action="store_true", help="time the loading of --steps batches of images, and no training")
    return parser


def main(argv: list[str] | None = None) -> None:
    from data import DataError

    args = speed_options().parse_args(argv)
    with clear_exit(DataError):
        print("\n".join(loading_table(args) if args.loading else time_table(args)))


if __name__ == "__main__" and "__file__" in globals():
    main()
