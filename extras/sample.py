"""A synthetic stand-in for the paper's autoimmune biopsies, which cannot be shipped.

    python -m extras.sample ./autoimmune

draws 198 RGB TIFFs from 7 invented patients, in the manner of muscle sections under a fluorescence
microscope, and `labels.csv` with five cell types, present or absent. No pixel comes from a person,
and a score on these images says nothing about the real ones. Equal seeds give equal bytes on one
machine with the same numpy and Pillow, and 20 images are the first 20 of 198.
"""

import argparse
import math
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # if it is run by its path

from runtime import UserError, clear_exit, command_parser, positive, whole_number

HEIGHT, WIDTH = 352, 469  # paper, 4.3
MARGIN = 110  # while drawing, as half a large cell may hang over the edge
NOTE = "Synthetic: drawn by a program, a stand-in for the autoimmune biopsies; of no patient."


class Kind(NamedTuple):
    """How one sort of cell looks."""
    colour: tuple[float, float, float]
    radius: float  # in pixels
    rim: float = 0.2  # 0: the stain fills the cell, 1: it sits in the membrane
    grain: float = 0.2  # 0: smooth, 1: speckled
    stretch: float = 1.15
    nucleus: float = 0.6  # its radius, as a part of the cell's


KINDS = {
    "TFH-1": (Kind((0.10, 0.85, 0.22), 22, rim=0.8),),
    "TFH-217": (Kind((0.80, 0.72, 0.08), 24, grain=0.9),),
    "TFH-Like": (Kind((0.08, 0.62, 0.66), 25, rim=0.4, grain=0.5, stretch=1.5),),
    "B cells": (Kind((0.95, 0.16, 0.14), 19, rim=0.9),),
    "others": (Kind((0.72, 0.16, 0.68), 30, grain=0.8, nucleus=0.4),  # such as macrophages,
               Kind((0.55, 0.50, 0.62), 18, stretch=3.0, nucleus=0.5)),  # and fibroblasts
}
CLASSES = tuple(KINDS)
NUCLEI = (Kind((0.0, 0.0, 0.0), 12, stretch=1.9, nucleus=0.95),)  # cells without a stain
RATES = np.array((0.24, 0.20, 0.26, 0.32, 0.30))  # of each type, of being there by chance


def sample_design(images: int, patients: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Each image's patient `(N,)`, and the types it shows, 0 or 1, `(N, 5)`."""
    share = np.random.default_rng((seed, 1)).uniform(1.0, 3.0, patients)
    groups, labels = np.zeros(images, int), np.zeros((images, len(CLASSES)), int)
    for i in range(images):
        rng = np.random.default_rng((seed, 2, i))  # first one image each, then uneven
        groups[i] = i if i < patients else rng.choice(patients, p=share / share.sum())
        labels[i] = rng.random(len(CLASSES)) < RATES
        before = (groups[:i] == groups[i]).sum()
        labels[i, (groups[i] + before) % len(CLASSES)] = 1  # in turn: no patient lacks a type
    return groups, labels


# %% the drawing: light adds up, so images are floats that are added and multiplied


def clouds(rng: np.random.Generator, height: int, width: int, spot: float) -> np.ndarray:
    """Smooth noise `(height, width)` of about unit spread, with spots of that size in pixels."""
    coarse = rng.standard_normal((int(height / spot) + 3, int(width / spot) + 3), np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def edge(distance: np.ndarray, softness: float) -> np.ndarray:
    """1 well above 0, 0 well below, and soft between."""
    return 0.5 + 0.5 * np.tanh(0.5 * distance / softness)


def draw_tissue(rng: np.random.Generator) -> np.ndarray:
    """Muscle cut across `(H, W)`: fibres are Voronoi cells, dark where two centres are as near."""
    height, width, step = HEIGHT // 3, WIDTH // 3, rng.uniform(18.0, 28.0)  # a third: soon drawn
    y, x = np.mgrid[:height, :width] + 4.0 * clouds(rng, height, width, 30)
    centres = np.mgrid[-step:height + step:step, -step:width + step:step].reshape(2, -1, 1, 1)
    centres = centres + rng.uniform(-0.42, 0.42, centres.shape) * step
    far = np.hypot(y - centres[0], x - centres[1]).astype(np.float32)  # (centres, height, width)
    first, second = np.partition(far, 1, axis=0)[:2]
    bright = rng.uniform(0.6, 1.0, len(far))[far.argmin(0)]
    fibres = Image.fromarray((bright * edge(second - first - 2.5, 0.7)).astype(np.float32))
    return np.asarray(fibres.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))


def draw_cell(rng: np.random.Generator, kind: Kind, stain: np.ndarray) -> np.ndarray:
    """One cell in the middle of a small dark patch `(S, S, 3)`, S odd."""
    radius, turn = kind.radius * rng.uniform(0.85, 1.2), rng.uniform(0.0, math.pi)
    softness = 1.0 if rng.random() < 0.7 else rng.uniform(2.0, 5.0)  # in focus or not
    half = int(1.2 * radius * kind.stretch + 4 * softness)
    y, x = np.mgrid[-half:half + 1, -half:half + 1]
    along = (x * math.cos(turn) + y * math.sin(turn)) / kind.stretch
    out = np.hypot(along, y * math.cos(turn) - x * math.sin(turn))  # to the middle, in pixels
    rim = np.exp(-((out - 0.86 * radius) / (0.14 * radius + softness)) ** 2)
    fill = kind.rim * rim + (0.7 - 0.55 * kind.rim) * edge(radius - out, softness)
    speckles = np.clip(1.3 * clouds(rng, *out.shape, 4), 0.0, 3.0)
    fill = fill * (1.0 - kind.grain + kind.grain * speckles)
    core = edge(kind.nucleus * radius - out, softness)[..., None]
    return fill[..., None] * stain * (1.0 - 0.7 * core) + core * (0.08, 0.13, 0.58)


def draw_image(labels: np.ndarray, patient: int, index: int, seed: int) -> np.ndarray:
    """An image, uint8 `(352, 469, 3)`, of the types in `labels` `(5,)`, in a `patient`'s light."""
    rng, light = (np.random.default_rng((seed, *key)) for key in ((3, index), (4, patient)))
    exposure, glow = rng.uniform(0.85, 1.2), light.uniform(0.6, 1.2) * np.array((0.05, 0.08, 0.04))
    image = np.pad(draw_tissue(rng)[..., None] * glow, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)))
    cells = [NUCLEI] * int(rng.integers(12, 30))
    for name, shown in zip(CLASSES, labels):
        cells += [KINDS[name]] * (int(shown) * int(rng.integers(3, 12)))
    for kinds in cells:
        kind = kinds[rng.integers(len(kinds))]
        other = KINDS[CLASSES[rng.integers(len(CLASSES))]][0]  # stains cross over a little
        stain = np.array(kind.colour) + 0.15 * max(kind.colour) * np.array(other.colour)
        patch = draw_cell(rng, kind, stain * rng.lognormal(0.0, 0.2))
        top = MARGIN + rng.integers(HEIGHT) - len(patch) // 2
        left = MARGIN + rng.integers(WIDTH) - len(patch) // 2
        image[top:top + len(patch), left:left + len(patch)] += patch
    image = image[MARGIN:-MARGIN, MARGIN:-MARGIN] * exposure * light.uniform(0.85, 1.15, 3) + 0.015
    image += 0.01 * np.sqrt(0.15 + image) * rng.standard_normal(image.shape, np.float32)
    return (255.0 * (1.0 - np.exp(-1.6 * image.clip(0.0)))).astype(np.uint8)  # a camera saturates


# %% the command


def draw_sample(folder: str | Path, images: int = 198, patients: int = 7, seed: int = 0) -> Path:
    """Write images/*.tif and labels.csv into a new or empty folder; when stopped, nothing."""
    target = Path(folder).resolve()
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder: name another one")
    groups, labels = sample_design(images, patients, seed)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as aside:
        work = Path(aside) / "set"
        (work / "images").mkdir(parents=True)

        def draw(i: int) -> str:
            name, group = f"images/synthetic-{i + 1:03d}.tif", int(groups[i])
            image = Image.fromarray(draw_image(labels[i], group, i, seed))
            image.save(work / name, compression="tiff_lzw", tiffinfo={270: NOTE, 317: 2})
            return f"{name},{','.join(map(str, labels[i]))},patient-{group + 1}\n"

        with ThreadPoolExecutor() as pool:  # each image has a random stream of its own
            lines = list(pool.map(draw, range(images)))
        (work / "labels.csv").write_text(f"image,{','.join(CLASSES)},group\n" + "".join(lines))
        if target.exists():
            target.rmdir()  # it is empty; only POSIX would rename over it
        work.rename(target)
    return target


def main(argv: list[str] | None = None) -> None:
    parser = command_parser("python -m extras.sample", "Draw synthetic images and labels.csv.")
    add = parser.add_argument
    add("folder", help="folder to write the synthetic set into, a new or an empty one")
    add("--images", type=positive(int), default=198, help="images (default and paper: 198)")
    add("--patients", type=positive(int), default=7, help="patients (default and paper: 7)")
    add("--seed", type=whole_number, default=0, help="equal seeds draw equal images (default: 0)")
    args = parser.parse_args(argv)
    with clear_exit():
        draw_sample(args.folder, args.images, args.patients, args.seed)
    print(f"{args.images} synthetic images of {args.patients} invented patients in {args.folder}")


if __name__ == "__main__" and "__file__" in globals():
    main()
