"""What a step costs: each training loop beside its own plain loop, and CASS beside DINO (Table 1).

    python -m extras.speed --data ./autoimmune --image-size 96 --cnn resnet18

Our loops train on real files through the cache; plain loops, written out below, train the same
networks on batches in memory. All take turns in one process: what slows one down slows all.
"""

import argparse
import copy
import ctypes
import gc
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.optim import Adam

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # if it is run by its path

from cass import pretrain_cass
from data import (DataError, ImageCache, ImageRows, ImageSet, add_data_options, augmentation,
                  make_loader, open_images)
from dino import DinoNetwork, DinoViews, pretrain_dino
from extras.paper import ARMS
from finetune import finetune_network
from runtime import (add_run_options, build_model, clear_exit, command_parser, pick_attention,
                     pick_hardware, positive)


def plain_cass(cnn: nn.Module, transformer: nn.Module, batches: Iterable, precision: torch.dtype,
               fused: bool = False, layout: torch.memory_format = torch.contiguous_format) -> None:
    """CASS; `fused` Adam and a channels-last CNN make it faster."""
    device = next(cnn.to(memory_format=layout).parameters()).device
    optimizers = [Adam(arm.parameters(), 1e-3, fused=fused) for arm in (cnn, transformer)]
    for images in batches:
        images = images.to(device, memory_format=layout)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            r, t = cnn(images), transformer(images)
        loss = (2 - 2 * nn.functional.cosine_similarity(r.float(), t.float())).mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()


def plain_dino(student: nn.Module, batches: Iterable, precision: torch.dtype) -> None:
    """DINO, with the paper's values."""
    device, teacher, centre = next(student.parameters()).device, copy.deepcopy(student), 0.0
    optimizer = Adam(student.parameters(), 3e-4)
    for teacher_views, student_views in batches:
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            with torch.no_grad():
                targets = torch.stack([teacher(x.to(device))[1] for x in teacher_views]).float()
            outputs = torch.stack([student(x.to(device))[1] for x in student_views]).float()
        wanted = ((targets - centre) / 0.04).softmax(-1).flip(0)  # from the other view
        loss = -(wanted * (outputs / 0.9).log_softmax(-1)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for average, value in zip(teacher.parameters(), student.parameters()):
                average.lerp_(value, 0.1)
            centre = 0.9 * centre + 0.1 * targets.mean((0, 1))


def plain_tuning(network: nn.Module, batches: Iterable, precision: torch.dtype) -> None:
    """Fine-tuning end to end."""
    device = next(network.parameters()).device
    optimizer = Adam(network.parameters(), 3e-4)
    for images, truth in batches:
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            logits = network(images.to(device)).float()
        wrong = nn.functional.softplus(logits * (1 - 2 * truth.to(device)))  # -log p of the truth
        loss = ((1 - (-wrong).exp()) ** 2 * wrong).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# %% the measurement and its table


class TimedLoader:
    """Hands on batches; `seconds` is then what a step took after `warm_up` steps, `waited` the part
    of it spent waiting for data. A GPU is waited for only at both ends."""

    def __init__(self, batches: Iterable, warm_up: int, device: torch.device) -> None:
        self.batches, self.device = batches, device
        self.warm_up = min(warm_up, len(batches) - 1)  # of a small set one step at least is timed

    def __len__(self) -> int:
        return len(self.batches)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __iter__(self) -> Iterator:
        batches, begun, waited, steps = iter(self.batches), 0.0, 0.0, len(self) - self.warm_up
        for step in range(len(self)):
            if step == self.warm_up:
                begun, waited = self.now(), 0.0
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            yield batch
        self.seconds, self.waited = (self.now() - begun) / steps, waited / steps


def peak_memory(device: torch.device, reset: bool = False) -> float:
    """The highest memory since the last reset, in GB; on a CPU the whole process's, Linux only."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        if reset:  # what Python has freed goes back first, as far as the C library can
            gc.collect()
            getattr(ctypes.CDLL(None), "malloc_trim", lambda keep: None)(0)
            Path("/proc/self/clear_refs").write_text("5")
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e6
    except OSError:
        return float("nan")


def contestants(args: argparse.Namespace, hardware: tuple, images: ImageSet,
                cache: ImageCache) -> dict[tuple, tuple]:
    """All that is timed: {(method, name, precision): (batches, build() -> networks, loop)}."""
    (device, auto), found, classes = hardware, {}, len(images.classes)
    augment = augmentation(args.image_size)

    def load(transform: Callable, labelled: bool = False) -> Iterable:
        rows = ImageRows(images, images.rows, transform, labelled=labelled, cache=cache)
        return make_loader(rows, args.batch_size, drop_last=True, workers=args.workers)

    def networks(*archs: str, outputs: int | None = None) -> list[nn.Module]:
        return [build_model(arch, args.init, args.image_size, outputs=outputs).to(device)
                for arch in archs]

    def student(arch: str) -> list[nn.Module]:
        return [DinoNetwork(*networks(arch, outputs=0), args.out_dim).to(device)]

    def add(method: str, batches: Iterable, build: Callable, ours: Callable,
            plain: Callable) -> None:
        in_memory = list(batches)
        for precision in (torch.float32, auto):
            found[method, "plain loop", precision] = in_memory, build, plain
            found[method, "ours", precision] = batches, build, ours

    batches, build = load(augment), partial(networks, args.cnn, args.transformer)
    add("CASS", batches, build, partial(pretrain_cass, epochs=1, swa_start=1), plain_cass)
    on, in_memory = {"fused": True, "layout": torch.channels_last}, list(batches)
    for off in ("nothing", "precision", "attention", *on):
        precision = torch.float32 if off == "precision" else auto
        loop = partial(plain_cass, **{name: on[name] for name in on if name != off})
        found["CASS", f"plain, fast, {off} off", precision] = in_memory, build, loop
    views, labelled = load(DinoViews(args.image_size)), load(augment, labelled=classes > 0)
    tuning = partial(finetune_network, validation=[next(iter(labelled))], epochs=1)
    for arch in (args.cnn, args.transformer):
        add(f"DINO, {arch}", views, partial(student, arch), partial(pretrain_dino, epochs=1),
            plain_dino)
        if classes:
            add(f"fine-tuning, {arch}", labelled, partial(networks, arch, outputs=classes), tuning,
                plain_tuning)
    return found


def measure(args: argparse.Namespace, hardware: tuple) -> dict[tuple, list[tuple]]:
    """{(method, name, precision): for each round (seconds a step, of them waiting, GB)}."""
    images, found, device = open_images(args), {}, hardware[0]
    count = (args.warm_up + args.steps) * args.batch_size
    images = replace(images, rows=images.part("train")[:count])
    with tempfile.TemporaryDirectory() as folder:
        cache = ImageCache(Path(folder), args.image_size)
        everything = contestants(args, hardware, images, cache)
        for turn in range(args.rounds):
            for key, (batches, build, loop) in everything.items():
                timed = TimedLoader(batches, args.warm_up, device)
                before = peak_memory(device, reset=True)
                _, name, precision = key
                fused = name in ("plain loop", "plain, fast, attention off")
                pick_attention(device, torch.float32 if fused else precision)
                networks = build()
                if name == "plain loop":  # as timm gives them
                    networks = [one.to(memory_format=torch.contiguous_format) for one in networks]
                loop(*networks, timed, precision=precision)
                grown = peak_memory(device) - before
                found.setdefault(key, []).append((timed.seconds, timed.waited, grown))
                print(f"round {turn + 1} of {args.rounds}:", *key, flush=True)
    return found


def time_lines(args: argparse.Namespace) -> list[str]:
    """The tables as Markdown lines, and Table 1's ratio."""
    load, (device, auto) = os.getloadavg()[0], pick_hardware(args)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else os.uname().machine
    lines = [f"{name}, {torch.get_num_threads()} threads, load before {load:.1f}, torch "
             f"{torch.__version__}, batch {args.batch_size}, {args.image_size} pixels"]
    found = measure(args, (device, auto))
    seconds = {key: median(one[0] for one in rounds) for key, rounds in found.items()}
    for key, rounds in found.items():
        method, name, precision = key
        if (name, precision) == ("plain loop", torch.float32):
            lines += ["", f"| {method} | precision | ms a step | low | high | waiting | of plain | "
                      "of plain fp32 | GB |", "|---|---|" + "---:|" * 7]
        each, waited, memory = zip(*rounds)
        cells = [f"{1e3 * x:.1f}" for x in (seconds[key], min(each), max(each), median(waited))]
        for base in (precision, torch.float32):
            cells.append(f"{seconds[method, 'plain loop', base] / seconds[key]:.2f}")
        lines.append(f"| {name} | {precision} | {' | '.join(cells)} | {median(memory):.2f} |")
    dino = sum(seconds[f"DINO, {arch}", "ours", auto] for arch in (args.cnn, args.transformer))
    ratio = seconds["CASS", "ours", auto] / dino
    lines += ["", f"CASS / DINO, both arms: {ratio:.3f}; paper: 0.31; arithmetic floor: 0.375."]
    return lines


def speed_options() -> argparse.ArgumentParser:
    parser = command_parser("python -m extras.speed", "Time every training loop on your images.")
    add_data_options(parser)
    add_run_options(parser, epochs=1, lr=1e-3)
    parser.set_defaults(init="random")
    add = parser.add_argument
    add("--cnn", default=ARMS["cnn"], help="first arm (paper: %(default)s)")
    add("--transformer", default=ARMS["transformer"], help="second arm (paper: %(default)s)")
    add("--out-dim", type=positive(int), default=65336, help="outputs of DINO's head (%(default)s)")
    add("--steps", type=positive(int), default=10, help="steps timed in a round (%(default)s)")
    add("--warm-up", type=positive(int), default=3, help="steps before them (%(default)s)")
    add("--rounds", type=positive(int), default=3, help="rounds of all loops (%(default)s)")
    return parser


@clear_exit(DataError)
def main(argv: list[str] | None = None) -> None:
    print(*time_lines(speed_options().parse_args(argv)), sep="\n")


if __name__ == "__main__":
    main()
