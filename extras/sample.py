"""A synthetic stand-in for the paper's autoimmune biopsies, which cannot be shipped.

`python -m extras.sample ./autoimmune` draws 198 RGB TIFFs, 352 high and 469 wide, from 7 invented patients, in the
manner of muscle sections under a fluorescence microscope, and `labels.csv` with five cell types, present or absent.
No pixel comes from a person, and a score on these images says nothing about the real ones.

What makes it hard, as in the real set: the types overlap in colour, a single cell may carry the label, cells lie out
of focus, debris and glowing threads wear the same colours, and each patient has a light of their own.
Equal seeds give equal bytes on one machine with the same numpy and Pillow; elsewhere a few pixels may differ.
"""

# %% The design: who is in which image. Each image has its own random stream, so 20 images are the first 20 of 198.
import argparse
import csv
import math
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 352, 469  # paper, 4.3
MARGIN = 96  # around the image while it is drawn, so that a cell may hang over the edge
RATES = np.array((0.24, 0.20, 0.26, 0.32, 0.30))  # per type, of being there by chance
NOTE = "Synthetic: drawn by a program as a stand-in for the autoimmune biopsies; not data of any patient."


class Kind(NamedTuple):
    """How one sort of cell looks; the radius in pixels, the rest as parts of 1."""

    colour: tuple[float, float, float]
    radius: float
    rim: float = 0.2  # 0: the stain fills the cell, 1: it sits in the membrane
    grain: float = 0.3  # 0: smooth, 1: speckled
    nucleus: float = 0.6  # radius of the nucleus as a part of the cell's
    lumps: float = 0.08  # how far the outline departs from an ellipse
    stretch: float = 1.15
    clump: float = 0.3  # probability that the next cell touches this one


KINDS: dict[str, tuple[Kind, ...]] = {
    "TFH-1": (Kind((0.10, 0.85, 0.22), 14, rim=0.8, grain=0.2),),
    "TFH-217": (Kind((0.80, 0.72, 0.08), 15, grain=0.9),),
    "TFH-Like": (Kind((0.08, 0.62, 0.66), 17, rim=0.4, grain=0.5, lumps=0.12, stretch=1.35),),
    "B cells": (Kind((0.95, 0.16, 0.14), 12, rim=0.9, grain=0.2, nucleus=0.7, clump=0.7),),
    "others": (  # macrophage, granulocyte, fibroblast: no one colour or shape gives them away
        Kind((0.72, 0.16, 0.68), 23, rim=0.1, grain=0.8, nucleus=0.4, lumps=0.2, stretch=1.3),
        Kind((0.90, 0.42, 0.30), 15, rim=0.0, grain=1.0, lumps=0.15),
        Kind((0.55, 0.50, 0.62), 12, nucleus=0.5, lumps=0.1, stretch=3.0),
    ),
}
CLASSES = tuple(KINDS)
COLOURS = np.array([kind.colour for kinds in KINDS.values() for kind in kinds])
NUCLEI = (  # cells without a stain, in every image: long nuclei of the fibres, round ones that came with the others
    Kind((0.0, 0.0, 0.0), 8, nucleus=0.95, stretch=1.9, clump=0.1),
    Kind((0.03, 0.03, 0.04), 10, nucleus=0.8, clump=0.5),
)
DEBRIS = tuple(Kind(tuple(c), 4, grain=0.5, nucleus=0.0, lumps=0.1, stretch=1.5, clump=0.2) for c in COLOURS) + (
    Kind((0.25, 0.36, 0.20), 6, grain=0.4, nucleus=0.0, lumps=0.06, stretch=6.0),  # a thread that glows by itself
)


def sample_design(images: int = 198, patients: int = 7, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return each image's patient, (N,), and the types it shows, 0 or 1, (N, 5)."""
    share = np.array([np.random.default_rng((seed, 1, p)).uniform(1.0, 3.0) for p in range(patients)])
    lean = np.array([np.random.default_rng((seed, 2, p)).normal(0.0, 0.4, len(CLASSES)) for p in range(patients)])
    groups, labels, seen = np.zeros(images, int), np.zeros((images, len(CLASSES)), int), np.zeros(patients, int)
    for i in range(images):
        rng = np.random.default_rng((seed, 3, i))
        p = i if i < patients else rng.choice(patients, p=share / share.sum())  # first one image each, then uneven
        odds = RATES / (1.0 - RATES) * np.exp(lean[p])
        labels[i] = rng.random(len(CLASSES)) < odds / (1.0 + odds)
        labels[i, (p + seen[p]) % len(CLASSES)] = 1  # in turn, so five images of a patient show every type
        groups[i] = p
        seen[p] += 1
    return groups, labels


# %% The drawing: light adds up, so images are floats (32 bits, for speed) that are added, multiplied and blurred.
def _enlarge(image: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC))


def _clouds(rng: np.random.Generator, height: int, width: int, spot: float) -> np.ndarray:
    """Smooth noise of about unit spread, with spots of the given size in pixels."""
    return _enlarge(rng.standard_normal((int(height / spot) + 3, int(width / spot) + 3)), height, width)


def _soft(distance: np.ndarray) -> np.ndarray:
    """A soft edge: 1 well above 0, 0 well below."""
    return 0.5 + 0.5 * np.tanh(0.5 * distance)


def _turned(y: np.ndarray, x: np.ndarray, turn: float) -> tuple[np.ndarray, np.ndarray]:
    return y * math.cos(turn) - x * math.sin(turn), x * math.cos(turn) + y * math.sin(turn)


def _blur(patch: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of a patch (S, S, 3) whose border is dark, so that it may wrap around."""
    square = np.fft.fftfreq(len(patch))[:, None] ** 2 + np.fft.rfftfreq(len(patch)) ** 2
    waves = np.fft.rfft2(patch, axes=(0, 1)) * np.exp(-2.0 * (math.pi * sigma) ** 2 * square)[..., None]
    return np.fft.irfft2(waves, s=patch.shape[:2], axes=(0, 1))


def _tissue(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Muscle cut across, (H, W) each: light of the fibres, light between them, and (half size) where cells gather."""
    height, width = HEIGHT // 2, WIDTH // 2  # half size is sharp enough for tissue, and four times as fast
    y, x = (axis + 5.0 * _clouds(rng, height, width, 45) for axis in np.mgrid[:height, :width].astype(np.float32))
    across, along = _turned(y, x, rng.uniform(0.0, math.pi))
    across, step = across * rng.uniform(1.0, 1.9), rng.uniform(28.0, 42.0)
    rows, columns = np.arange(across.min(), across.max() + step, step), np.arange(along.min(), along.max() + step, step)
    centres = np.stack(np.meshgrid(columns, rows), -1).reshape(-1, 2)
    centres += rng.uniform(-0.42, 0.42, centres.shape) * step
    first, second = np.full((2, height, width), 1e9, np.float32)
    owner = np.zeros((height, width), int)
    for k, (a, b) in enumerate(centres.tolist()):  # fibres are Voronoi cells: their edge is where two centres tie
        far = np.hypot(along - a, across - b)
        owner[far < first] = k
        second = np.minimum(second, np.maximum(first, far))
        first = np.minimum(first, far)
    inside = _soft(second - first - rng.uniform(3.0, 5.5))
    # A sheath of connective tissue crosses most sections: there the fibres give way to wavy strands.
    offset = along - float(rng.choice(centres[:, 0]))
    sheath = np.exp(-((offset / rng.uniform(10.0, 30.0)) ** 2)) * float(rng.random() < 0.7)
    strands = sum(np.sin(f * offset + 5.0 * _clouds(rng, height, width, 24)) for f in (0.6, 0.9, 1.4))
    inside = inside * (1.0 - _soft(12.0 * (sheath - 0.5)))
    bright = rng.uniform(0.6, 1.0, len(centres)) + 0.6 * (rng.random(len(centres)) < 0.04)  # a few glow by themselves
    fibres = inside * bright.astype(np.float32)[owner] + 0.5 * inside * (1.0 - inside)
    between = (1.0 - inside) * (0.12 + 0.5 * sheath * np.clip(strands * _clouds(rng, height, width, 12), 0.0, 1.5))
    gather = (1.0 - inside + 0.03) * (1.0 + sheath) * np.exp(0.9 * _clouds(rng, height, width, 60))
    return _enlarge(fibres, HEIGHT, WIDTH), _enlarge(between, HEIGHT, WIDTH), gather


def _cell(rng: np.random.Generator, kind: Kind, stain: np.ndarray, blur: float) -> np.ndarray:
    """One cell in the middle of a small dark patch (S, S, 3), S odd."""
    radius, stretch = kind.radius * rng.uniform(0.85, 1.2), 1.0 + (kind.stretch - 1.0) * rng.uniform(0.5, 1.3)
    half = int(1.3 * radius * stretch + 2.5 * blur) + 2
    b, a = _turned(*np.mgrid[-half : half + 1, -half : half + 1].astype(np.float32), rng.uniform(0.0, math.pi))
    a, b = a / stretch, b * stretch**0.3
    angle = np.arctan2(b, a)
    waves = kind.lumps * sum(rng.normal() / (k - 1) * np.cos(k * angle + rng.uniform(0.0, 6.3)) for k in (2, 3, 4))
    out = np.hypot(a, b) / (radius * np.clip(1.0 + waves, 0.6, 1.4))  # 1 at the outline
    rim = np.exp(-(((out - 0.86) / 0.17) ** 2)) * np.clip(0.9 + 0.5 * np.cos(angle + rng.uniform(0.0, 6.3)), 0.3, 1.2)
    fill = _soft((1.0 - out) * radius) * (0.7 - 0.55 * kind.rim) + kind.rim * rim
    speckles = np.clip(1.3 * _clouds(rng, *a.shape, 3.5), 0.0, 3.0)
    patch = (fill * (1.0 - kind.grain + kind.grain * speckles))[..., None] * stain.astype(np.float32)
    if kind.nucleus:
        dy, dx = rng.normal(0.0, 0.1 * radius * (1.0 - kind.nucleus), 2).tolist()
        core = _soft(kind.nucleus * (1.0 + 0.5 * waves) * radius - np.hypot(a - dx, b - dy))[..., None]
        chromatin = np.clip(0.8 + 0.3 * _clouds(rng, *a.shape, 4.0), 0.2, 1.4)[..., None] * rng.uniform(0.6, 1.1)
        patch = patch * (1.0 - 0.7 * core) + core * chromatin * np.array((0.10, 0.16, 0.72), np.float32)
    return _blur(patch, blur)


def _populate(image: np.ndarray, rng: np.random.Generator, kinds: tuple[Kind, ...], count: int, chance: np.ndarray,
              strength: float) -> None:
    """Add `count` cells to the image, which has a margin; `chance` is the running sum of where they gather."""
    y, x = HEIGHT, WIDTH
    for _ in range(count):
        kind = kinds[rng.integers(len(kinds))]
        turn, apart = rng.uniform(0.0, 6.3), kind.radius * rng.uniform(1.6, 2.4)
        y, x = y + int(apart * math.sin(turn)), x + int(apart * math.cos(turn))
        if rng.random() > kind.clump or not (0 <= y < HEIGHT and 0 <= x < WIDTH):
            row, column = divmod(int(np.searchsorted(chance, rng.random() * chance[-1])), WIDTH // 2)
            y, x = 2 * row, 2 * column
        stain = np.array(kind.colour)
        if stain.max() > 0.1:  # stains cross over, so the types overlap in colour
            stain += rng.uniform(0.0, 0.3) * (rng.choice(COLOURS) - stain)
        blur = 0.8 if rng.random() < 0.65 else rng.uniform(1.0, 4.0)  # in focus or not
        patch = _cell(rng, kind, stain * strength * rng.lognormal(0.0, 0.3), blur)
        top, left = y + MARGIN - len(patch) // 2, x + MARGIN - len(patch) // 2
        image[top : top + len(patch), left : left + len(patch)] += patch


def draw_image(labels: np.ndarray, patient: int = 0, index: int = 0, seed: int = 0) -> np.ndarray:
    """Draw one image, uint8 (352, 469, 3), that shows the types set in `labels` (5,), in the light of `patient`."""
    rng, light = np.random.default_rng((seed, 4, index)), np.random.default_rng((seed, 5, patient))
    exposure, strength, tint = rng.uniform(0.8, 1.25), light.uniform(0.75, 1.25), light.uniform(0.8, 1.2, 3)
    glow = np.array((0.085, 0.13, 0.065)) * light.uniform(0.6, 1.1) * light.uniform(0.8, 1.25, 3)
    fibres, between, gather = _tissue(rng)
    image = fibres[..., None] * glow.astype(np.float32) + between[..., None] * np.array((0.16, 0.24, 0.22), np.float32)
    mottle = 1.0 + 0.14 * _clouds(rng, HEIGHT, WIDTH, 2.5) + 0.12 * _clouds(rng, HEIGHT, WIDTH, 9)
    image = np.pad(image * np.clip(mottle, 0.3, 2.0)[..., None], ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)))
    chance = gather.ravel().cumsum()
    _populate(image, rng, NUCLEI, int(rng.integers(12, 45)), chance, 1.0)
    _populate(image, rng, DEBRIS, int(rng.integers(3, 16)), chance, 0.6 * strength)
    for name, shown in zip(CLASSES, labels):
        count = 1 + int(12 * rng.random() ** 1.2)  # one to a dozen
        _populate(image, rng, KINDS[name], count * int(shown), chance, strength)
    y, x = np.mgrid[-1 : 1 : HEIGHT * 1j, -1 : 1 : WIDTH * 1j].astype(np.float32)
    slope, vignette = light.uniform(0.1, 0.35), light.uniform(0.05, 0.2)
    lamp = 1.0 + slope * _turned(y, x, light.uniform(0.0, 6.3))[0] - vignette * (x * x + y * y)
    image = image[MARGIN:-MARGIN, MARGIN:-MARGIN] * (lamp * exposure)[..., None]
    image = np.clip(image * tint.astype(np.float32) + light.uniform(0.005, 0.03, 3).astype(np.float32), 0.0, None)
    noise = light.uniform(0.006, 0.013) * np.sqrt(0.15 + image)  # shot noise grows with the light
    image = np.clip(image + noise * rng.standard_normal(image.shape, np.float32), 0.0, None)
    return (255.0 * (1.0 - np.exp(-1.6 * image))).astype(np.uint8)  # a camera saturates


# %% The command.
def draw_sample(folder: str | Path, images: int = 198, patients: int = 7, seed: int = 0) -> Path:
    """Write images/*.tif, labels.csv and README.txt into a new or empty folder: all of it or, when stopped, nothing."""
    if images < 1 or patients < 1 or seed < 0:
        raise ValueError("images and patients must be at least 1, and the seed at least 0")
    target = Path(folder).resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder: name another one, or delete it first")
    work = target.with_name(f".{target.name}-{os.getpid()}")
    groups, labels = sample_design(images, patients, seed)
    try:
        (work / "images").mkdir(parents=True)
        table = [("image", *CLASSES, "group")]
        for i in range(images):
            table.append((f"images/synthetic-{i + 1:03d}.tif", *labels[i], f"patient-{groups[i] + 1}"))
            picture = Image.fromarray(draw_image(labels[i], int(groups[i]), i, seed))
            tags = {270: NOTE, 317: 2}  # the description, and deflate on differences: a tenth smaller
            picture.save(work / table[-1][0], compression="tiff_deflate", tiffinfo=tags)
        with open(work / "labels.csv", "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(table)
        recipe = f"python -m extras.sample FOLDER --images {images} --patients {patients} --seed {seed}"
        (work / "README.txt").write_text(f"{NOTE}\nIn labels.csv, group is the invented patient.\nDrawn by: {recipe}\n")
        if target.exists():
            target.rmdir()  # it is empty; only POSIX would rename over it
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def main(argv: list[str] | None = None) -> None:
    """Read the options, draw, and say where it is; a request that cannot be met ends in one sentence and code 2."""
    about = "Draw a synthetic stand-in for the autoimmune biopsies: TIFF images and labels.csv."
    parser = argparse.ArgumentParser(prog="python -m extras.sample", allow_abbrev=False, description=about)
    parser.add_argument("folder", help="Folder to write the synthetic set into, a new or an empty one.")
    parser.add_argument("--images", type=int, default=198, help="Number of images (default and paper: %(default)s).")
    parser.add_argument("--patients", type=int, default=7, help="Number of patients (default and paper: %(default)s).")
    parser.add_argument("--seed", type=int, default=0, help="Equal seeds draw equal images (default: %(default)s).")
    args = parser.parse_args(argv)
    try:
        target = draw_sample(args.folder, args.images, args.patients, args.seed)
    except (OSError, ValueError) as error:
        reason = error if isinstance(error, ValueError) else f"cannot write {args.folder}: {error.strerror or error}"
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped: nothing was written; start again when you like", file=sys.stderr)
        sys.exit(130)
    size = sum(file.stat().st_size for file in target.rglob("*")) / 1e6
    print(f"{args.images} synthetic images of {args.patients} invented patients in {args.folder}, {size:.0f} MB")


if __name__ == "__main__" and "__file__" in globals():
    main()
