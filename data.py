"""From a folder of images to batches: reading, splitting, augmenting, loading.

`python data.py --data DIR` prints what was found, so that you see at once whether the folder was
read as you meant it. Understood are:

- class folders:  DIR/glioma/1.png, DIR/pituitary/2.png
- split folders:  DIR/train|Training/..., DIR/val|validation/..., DIR/test|Testing/...
- a labels.csv:   `image` and one column of labels (several joined by `|`) or one 0/1 column per
                  class; optional columns `group` (such as the patient) and `split`
- a flat folder of images without labels, for pretraining only

Everything odd (ISIC, Dermofit, MedMNIST, ...) becomes a labels.csv first: `extras/prepare.py`.
"""

import argparse
import contextlib
import csv
import hashlib
import io
import os
import posixpath
import shutil
import signal
import sys
import time
import uuid
import zlib
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable, Iterable, Iterator

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

PARTS = ("train", "val", "test")
PART_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val",
              "validation": "val", "test": "test", "testing": "test"}
ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # paper, F.2.2


class DataError(ValueError):
    """Images or labels that can't be used; one sentence that names the file and says what to do."""


@dataclass(frozen=True)
class Row:
    """One image: path relative to the data folder, names of its classes, group (such as the
    patient) and part of the split; "" where there is none."""
    path: str
    labels: tuple[str, ...] = ()
    group: str = ""
    split: str = ""


@dataclass
class ImageSet:
    """What was read: `rows` in a fixed order, `classes` in a fixed order (empty: no labels).
    `notes` are sentences the user should see."""
    folder: Path
    rows: list[Row]
    classes: list[str]
    multi_label: bool = False
    notes: list[str] = field(default_factory=list)

    def part(self, name: str) -> list[Row]:
        return [row for row in self.rows if row.split == name]

    def truth(self, rows: list[Row]) -> np.ndarray:
        """Multi-hot float labels `(N, K)`."""
        return np.array([[c in row.labels for c in self.classes] for row in rows],
                        np.float32).reshape(len(rows), len(self.classes))


# %% reading


def find_images(folder: str | Path, skip_bad: bool = False) -> ImageSet:
    """All images below a folder, whatever its form, without labels or parts."""
    if not Path(folder).is_dir():
        raise DataError(f"{folder} is not a folder of images")
    rows = [Row(path) for path in _image_files(Path(folder))]
    if not rows:
        raise DataError(f"{folder} holds no images ({' '.join(ENDINGS)})")
    images = ImageSet(Path(folder), rows, [])
    return good_rows(images) if skip_bad else images


def read_images(folder: str | Path) -> ImageSet:
    """Read a data folder of any of the four forms above. Raises `DataError`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; --data names the folder that holds the images")
    if (folder / "labels.csv").is_file():
        return _read_csv(folder)
    inside, _ = _inside(folder)
    if len(inside) == 1 and "train" in {PART_NAMES.get(name.lower()) for name in _inside(folder / inside[0])[0]}:
        raise DataError(f"{folder} holds one folder, which holds the parts; name that one: --data {folder / inside[0]}")
    parts = {name: PART_NAMES[name.lower()] for name in inside if name.lower() in PART_NAMES}
    rows, notes = [], []
    if "train" in parts.values():
        for name, part in parts.items():
            rows += [replace(row, path=f"{name}/{row.path}", split=part)
                     for row in _read_classes(folder / name, notes)]
        notes += [f"folder {name} beside {' and '.join(parts)} is not used" for name in inside
                  if name not in parts and next(_image_files(folder / name), None)]
    else:
        rows = _read_classes(folder, notes)
    if not rows:
        raise DataError(f"{folder} holds no images ({' '.join(ENDINGS)}); --data names the folder "
                        "that holds them")
    classes = sorted({label for row in rows for label in row.labels})
    return ImageSet(folder, rows, distinct_classes(classes), notes=notes)


def _read_classes(folder: Path, notes: list[str]) -> list[Row]:
    """Rows of a folder of class folders, or of a flat folder of images."""
    names, flat = _inside(folder)
    names = [name for name in names if not _leads_up(os.path.join(folder, name))]
    rows = [Row(f"{name}/{path}", (name,)) for name in names for path in _image_files(folder / name)]
    if rows and flat:
        notes.append(f"{len(flat)} images beside the class folders in {folder} are not used, "
                     f"such as {flat[0]}")
    return rows or [Row(name) for name in flat]


def _is_image(name: str) -> bool:
    return name.lower().endswith(ENDINGS) and not name.startswith(".")


def _inside(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the folders and of the images in a folder, hidden ones left out."""
    _, folders, files = next(os.walk(folder, onerror=_cant_list))
    return sorted(d for d in folders if not d.startswith(".")), sorted(filter(_is_image, files))


def _cant_list(error: OSError) -> None:
    raise DataError(f"folder {error.filename} can't be read: {error.strerror}")


def _image_files(folder: Path) -> Iterator[str]:
    """Paths of all images below `folder`, relative to it, sorted; links are followed once."""
    seen, found = set(), []
    for here, folders, files in os.walk(folder, onerror=_cant_list, followlinks=True):
        real = os.path.realpath(here)
        folders[:] = [d for d in folders if not d.startswith((".", "__MACOSX")) and real not in seen
                      and not _leads_up(os.path.join(here, d))]
        if real not in seen:
            found += [os.path.relpath(os.path.join(here, f), folder) for f in files if _is_image(f)]
        seen.add(real)
    for path in found:
        if any(letter in "\r\n" or "\ud800" <= letter <= "\udfff" for letter in path):  # fits into no CSV file; the
            # second kind are bytes that are no UTF-8, from zips of old systems
            raise DataError(f"the name of {ascii(os.path.join(folder, path))} is not plain text; rename that file")
    return iter(sorted(path.replace(os.sep, "/") for path in found))


def _leads_up(folder: str) -> bool:
    """Whether this is a link to a folder that it lies in: all there would come again, under other labels."""
    real = os.path.realpath(folder)
    return os.path.islink(folder) and f"{os.path.realpath(os.path.dirname(folder))}/".startswith(f"{real}/".replace("//", "/"))


def distinct_classes(classes: list[str]) -> list[str]:
    """The same list, refused if two names differ by case or white space alone, or hold the separator."""
    plain: dict[str, str] = {}
    for name in classes:
        if (other := plain.setdefault(" ".join(name.lower().split()), name)) != name:
            a, b = sorted((other, name))
            raise DataError(f"classes {a!r} and {b!r} differ by white space or case alone; write them the same way")
    for name in classes:
        if "|" in name:
            raise DataError(f"class {name!r} has a | in its name, which separates labels; rename it")
    return classes


def read_table(file: Path, strip: bool = True) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The column names of a CSV file, and its lines as (number, cells by column), empty ones left
    out: separators , ; or tab, quotes, a byte-order mark and any line ends. `strip` takes white space off the cells."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} can't be read: " + (error.strerror if isinstance(error, OSError) else
                        "it is not UTF-8 text; save it as CSV UTF-8")) from None
    head = next(filter(str.strip, text.splitlines()), "")
    table = csv.reader(io.StringIO(text), delimiter=max(",;\t", key=head.count))
    header, lines = [], []
    try:
        for cells in table:
            if any("\n" in cell for cell in cells):
                raise DataError(f"{file} line {table.line_num} ends a cell that goes over several lines; is a quote unclosed?")
            if not header:
                header = [cell.strip() for cell in cells] if any(cell.strip() for cell in cells) else []
            elif any(cell.strip() for cell in cells):
                if len(cells) != len(header):
                    raise DataError(f"{file} line {table.line_num} has {len(cells)} cells, not the "
                                    f"{len(header)} of its first line")
                lines.append((table.line_num, dict(zip(header, (c.strip() if strip else c for c in cells)))))
    except csv.Error as error:
        raise DataError(f"{file} line {table.line_num} can't be read: {error}; is a quote unclosed?") from None
    if len(set(header)) < len(header):
        raise DataError(f"{file} needs distinct column names in its first line, not {', '.join(header)}")
    return header, lines


def _read_csv(folder: Path) -> ImageSet:
    """Read `labels.csv`."""
    file = folder / "labels.csv"
    header, lines = read_table(file)
    if "image" not in header:
        raise DataError(f"{file} needs a first line of column names, one of them `image`; it has "
                        f"{', '.join(header) or 'none'}; for tables of another form see extras/prepare.py")
    columns = [name for name in header if name not in ("image", "group", "split")]
    named = [name for name in columns if name.lower() in ("label", "labels")]
    if named and len(columns) > 1:
        other = [name for name in columns if name != named[0]]
        raise DataError(f"{file} has the unknown column {other[0]!r} beside {named[0]!r}; known are "
                        "image, group, split and either one column of labels or one per class")
    by_class = len(columns) > 1
    rows = [_csv_row(file, number, line, columns, by_class) for number, line in lines]
    _check_csv_files(folder, file, rows, [number for number, _ in lines])
    classes = columns if by_class else sorted({label for row in rows for label in row.labels})
    multi_label = any(len(row.labels) > 1 for row in rows) or by_class and any(
        not row.labels for row in rows)
    if columns and not multi_label:  # with several labels an image, an empty cell means none of them
        for row, (number, _) in zip(rows, lines):
            if not row.labels:
                raise DataError(f"{file} line {number} has no label for {row.path}")
    return ImageSet(folder, rows, distinct_classes(classes), multi_label)


def _csv_row(file: Path, number: int, line: dict, columns: list[str], by_class: bool) -> Row:
    """One line of labels.csv as a `Row`."""
    split = line.get("split", "")
    if split and split.lower() not in PART_NAMES:
        raise DataError(f"{file} line {number} has split {split!r}; it must be train, val or test")
    labels = []
    for name in columns:
        if not by_class:
            labels = list(dict.fromkeys(x.strip() for x in line[name].split("|") if x.strip()))
        elif line[name] in ("1", "1.0"):
            labels.append(name)
        elif line[name] not in ("0", "0.0"):
            raise DataError(f"{file} line {number}, column {name!r} holds {line[name]!r}; with several "
                            "class columns each cell must be 0 or 1; known besides are "
                            "image, group and split")
    path = posixpath.normpath(line["image"]) if line["image"] else ""  # ./a.png and a.png are one image
    if posixpath.isabs(path):
        raise DataError(f"{file} line {number} names {path}; write it relative to the folder of the table")
    return Row(path, tuple(labels), line.get("group", ""), PART_NAMES.get(split.lower(), ""))


def _check_csv_files(folder: Path, file: Path, rows: list[Row], numbers: list[int]) -> None:
    """Every image there, no image twice, split and group given for all rows or for none."""
    if not rows:
        raise DataError(f"{file} has no rows below its first line")
    first: dict[str, int] = {}
    for row, number in zip(rows, numbers):
        if row.path in first:
            raise DataError(f"{file} lines {first[row.path]} and {number} both name {row.path}; "
                            "keep one of them")
        first[row.path] = number
        if not row.path or not (folder / row.path).is_file():
            raise DataError(f"{file} line {number} names {row.path or 'no image'}, "
                            f"which is not in {folder}")
        for column in ("group", "split"):
            if bool(getattr(row, column)) != bool(getattr(rows[0], column)):
                raise DataError(f"{file} line {number}: column {column} must be filled in for every "
                                "image or for none")


# %% splitting


def split_images(images: ImageSet, *, by: str = "auto", seed: int = 0,
                 ratios: tuple[float, float, float] = (0.7, 0.1, 0.2)) -> ImageSet:
    """Give every row its part: the folder's own split where it has one (paper, 4.3), with a
    missing validation part carved from training, an eighth of it; else by `ratios`, stratified.

    `by` is `image` or `group`; `auto` keeps groups (patients) together where they are known.
    """
    if by == "auto":
        by = "group" if images.rows[0].group else "image"
    if by == "group" and not images.rows[0].group:
        raise DataError(f"{images.folder} names no groups; give labels.csv a column `group`, or "
                        "take --split image")
    rows, notes = list(images.rows), list(images.notes)
    if rows[0].split:
        if not any(row.split == "val" for row in rows):
            train = [i for i, row in enumerate(rows) if row.split == "train"]
            for i, part in zip(train, _stratify(images, [rows[i] for i in train], by, (7 / 8, 1 / 8), seed)):
                rows[i] = replace(rows[i], split=PARTS[part])
    else:
        parts = _stratify(images, rows, by, ratios, seed)
        rows = [replace(row, split=PARTS[part]) for row, part in zip(rows, parts)]
    for part in PARTS:
        here = {label for row in rows if row.split == part for label in row.labels}
        if missing := [c for c in images.classes if c not in here]:
            notes.append(f"the {part} part has no image of {', '.join(missing)}")
    return replace(images, rows=rows, notes=notes)


def _stratify(images: ImageSet, rows: list[Row], by: str, ratios: tuple[float, ...],
              seed: int) -> list[int]:
    """The part of each row, shares as in `ratios`, for one label an image or several (iterative
    stratification: Sechidis et al. 2011): the rarest class first, each unit to the part that
    lacks most of it. A unit is an image or a group."""
    units: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        units.setdefault(row.group if by == "group" else str(i), []).append(i)
    truth = images.truth(rows)
    members = list(units.values())
    counts = np.stack([truth[m].sum(0) for m in members])
    sizes = np.array([len(m) for m in members], float)
    shares = np.array(ratios) / sum(ratios)
    need, room = np.outer(shares, counts.sum(0)), shares * len(rows)
    order = np.random.default_rng(seed).permutation(len(members))
    order = order[np.argsort(-sizes[order], kind="stable")]  # large groups while there is room
    part = np.full(len(members), -1)
    while (part < 0).any():
        left = counts[part < 0].sum(0)
        rarest = np.argmin(np.where(left > 0, left, np.inf)) if left.any() else None
        for u in order:
            if part[u] < 0 and (rarest is None or counts[u, rarest] > 0):
                lack = room if rarest is None else need[:, rarest]
                p = max(range(len(shares)), key=lambda p: (lack[p] > 1e-9, round(lack[p], 9), room[p]))
                part[u] = p
                need[p] -= counts[u]
                room[p] -= sizes[u]
    result = [0] * len(rows)
    for m, p in zip(members, part):
        for i in m:
            result[i] = int(p)
    return result


def label_fraction(images: ImageSet, rows: list[Row], fraction: float, seed: int) -> list[Row]:
    """The share `fraction` of `rows` whose labels may be used: stratified, and nested, so that a
    smaller share lies inside a larger one of the same seed. Each class comes once, as far as there
    is any, before one comes twice."""
    truth = images.truth(rows)
    truth = np.c_[truth, truth.sum(1) == 0]  # images without any class count as one more class
    total, count = truth.sum(0), np.zeros(truth.shape[1])
    order = np.random.default_rng(seed).permutation(len(rows))
    queues = [[i for i in order[::-1] if truth[i, k]] for k in range(len(total))]
    wanted = max(round(fraction * len(rows)), int((total > 0).sum()))
    taken: dict[int, None] = {}
    while len(taken) < min(wanted, len(rows)):
        lack = total * (len(taken) + 1) / len(rows) - count
        once = (count == 0) & (total > 0)
        lack[once] += len(rows) + 1 / total[once]  # the rarest first
        lack[[not queue for queue in queues]] = -np.inf
        i = queues[int(lack.argmax())].pop()
        if i not in taken:
            taken[i] = None
            count += truth[i]
    return [rows[i] for i in sorted(taken)]


def write_split(file: Path, images: ImageSet) -> None:
    """Write `split.csv` (path, split, labels, group): what fine-tuning reads, so that no test
    image was ever seen."""
    aside = file.with_name(file.name + ".tmp")
    with open(aside, "w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows(
            [("path", "split", "labels", "group"),
             *((r.path, r.split, "|".join(r.labels), r.group) for r in images.rows)])
    os.replace(aside, file)


def read_split(file: Path, images: ImageSet) -> ImageSet:
    """The rows of a `split.csv`, in its order, checked against what the folder holds."""
    _, table = read_table(file, strip=False)
    known, rows = {row.path: row for row in images.rows}, []
    labelled = any(line.get("labels") for _, line in table)  # else made before there were labels
    for number, line in table:
        row = known.get(line.get("path") or "")
        if row is None or line.get("split") not in PARTS:
            raise DataError(f"{file} line {number} names {line.get('path')!r} in part "
                            f"{line.get('split')!r}, which does not fit {images.folder}: the split "
                            "belongs to another data set, or that one has changed")
        if labelled and tuple(filter(None, (line.get("labels") or "").split("|"))) != row.labels:
            raise DataError(f"{file} line {number}: {row.path} has other labels in {images.folder} now")
        rows.append(replace(row, split=line["split"]))
    if not rows or len({row.path for row in rows}) < len(rows):
        raise DataError(f"{file} is empty or names an image twice")
    left = len(known) - len(rows)
    note = [f"{left} images that {file} does not name are left out"] if left else []
    return replace(images, rows=rows, notes=images.notes + note)


# %% images


def load_image(path: str | Path) -> Image.Image:
    """Any supported file as 8-bit RGB: grey, palette, alpha (over black), CMYK; 16-bit and float
    grey is scaled by its own range; the first page of several; turned upright as its EXIF says.
    Raises `DataError`, naming the file."""
    try:
        with Image.open(path) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise DataError(f"{path} is not there") from None
    except Image.DecompressionBombError:
        raise DataError(f"{path} has more pixels than is safe to decode; make it smaller first") from None
    except Exception as error:  # Pillow raises a dozen kinds for damaged files
        raise DataError(f"{path} can't be read as an image ({type(error).__name__}: "
                        f"{' '.join(str(error).split())[:80]}); mend or remove it, or add --skip-bad") from None
    if image.mode.startswith(("I", "F")):
        pixels = np.asarray(image, np.float64)
        finite = pixels[np.isfinite(pixels)]
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
        pixels = np.nan_to_num(pixels, nan=low, posinf=high, neginf=low)
        image = Image.fromarray(((pixels - low) * (255 / ((high - low) or 1))).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert("RGB")


def good_rows(images: ImageSet) -> ImageSet:
    """Decode every image once and leave out, with a note, those that can't be read."""
    rows, bad = [], []
    for row in images.rows:
        try:
            load_image(images.folder / row.path)
            rows.append(row)
        except DataError:
            bad.append(row.path)
    if not rows:
        raise DataError(f"{images.folder} holds no image that can be read")
    note = [f"left out {len(bad)} images that can't be read: {', '.join(bad[:5])}"] if bad else []
    return replace(images, rows=rows, notes=images.notes + note)


AUGMENTATIONS = ("cass", "blur", "solarize", "blur+solarize")


def augmentation(size: int, name: str = "cass") -> Callable[[Image.Image], torch.Tensor]:
    """PIL image -> normalised float tensor `(3, size, size)`, by the paper's list (F.2.2).

    `cass` is the paper's; `blur`, `solarize` and `blur+solarize` add BYOL's (C.3); `none` only
    resizes and normalises, for evaluation. "Jitter or perspective" and "jitter or affine" are
    read as the paper words them: one of the two, each as likely.
    """
    def one_of(other: v2.Transform) -> v2.Transform:
        jitter = v2.ColorJitter(0.2, 0.2, 0.2, hue=0.1)  # strengths: the notebook's; hue: ours
        return v2.RandomApply([v2.RandomChoice([jitter, other])], p=0.3)

    bilinear = v2.InterpolationMode.BILINEAR
    steps: list[Callable] = [v2.Resize((size, size), bilinear)]
    if name != "none":
        steps += [one_of(v2.RandomPerspective(0.2, p=1.0, interpolation=bilinear)),
                  one_of(v2.RandomAffine(10, interpolation=bilinear)),
                  v2.RandomHorizontalFlip(0.3), v2.RandomVerticalFlip(0.3)]
        if "blur" in name:
            kernel = 2 * (size // 20) + 1  # BYOL: 23 of 224 pixels
            steps.append(v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], p=0.2))
        if "solarize" in name:
            steps.append(v2.RandomSolarize(128, p=0.2))
    # A PIL image comes channels last; put in order first, the rest takes half the time, for equal bits.
    return v2.Compose([*steps, v2.ToImage(), torch.Tensor.contiguous, v2.ToDtype(torch.float32, scale=True),
                       v2.Normalize(MEAN, STD, inplace=True)])


# %% loading


class ImageRows(Dataset):
    """Images of `rows`, asked for by (epoch, index): the augmentation of image i in epoch e is
    drawn from a stream seeded by (seed, e, i), so workers, a cache or a pause change nothing."""

    def __init__(self, folder: Path, rows: list[Row], transform: Callable, seed: int = 0,
                 truth: np.ndarray | None = None, cache: "ImageCache | None" = None) -> None:
        self.folder, self.paths = folder, [row.path for row in rows]
        self.transform, self.seed, self.cache = transform, seed, cache
        self.truth = None if truth is None else torch.from_numpy(truth)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        path = self.paths[index]
        image = self.cache[path] if self.cache else load_image(self.folder / path)
        stream = np.random.SeedSequence((self.seed, epoch, index)).generate_state(1, np.uint64)[0]
        with torch.random.fork_rng(devices=[]):  # the training loop's own stream stays as it was
            torch.default_generator.manual_seed(int(stream >> 1))
            image = self.transform(image)
        return image if self.truth is None else (image, self.truth[index])


class EpochBatches:
    """Batches of (epoch, index); the order of epoch e is a permutation seeded by (seed, e)."""

    def __init__(self, images: int, batch_size: int, seed: int, shuffle: bool, drop_last: bool) -> None:
        self.images, self.seed, self.shuffle, self.epoch, self.skip = images, seed, shuffle, 0, 0
        size = min(batch_size, images)
        stops = list(range(size, images + 1, size))
        if stops[-1] < images and not drop_last:
            # Batch norm can't train on one image: a last batch of one joins the one before.
            stops[-1:] = [images] if images - stops[-1] == 1 and shuffle else [stops[-1], images]
        self.bounds = list(zip([0, *stops], stops))

    def __len__(self) -> int:
        return len(self.bounds)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.arange(self.images)
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.images)
        for begin, end in self.bounds[self.skip:]:
            yield [(self.epoch, int(i)) for i in order[begin:end]]


class EpochLoader(DataLoader):
    """A DataLoader whose order and augmentation follow from (seed, epoch) alone."""

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Say which epoch comes next, and how many of its batches to leave out (on resuming)."""
        self.batch_sampler.epoch, self.batch_sampler.skip = epoch, skip


def make_loader(dataset: Dataset, batch_size: int, *, seed: int = 0, shuffle: bool = True,
                drop_last: bool = False, workers: int = 0) -> EpochLoader:
    """Batches `(N, 3, size, size)`, with `(N, K)` labels where the dataset has them."""
    batches = EpochBatches(len(dataset), batch_size, seed, shuffle, drop_last)
    return EpochLoader(dataset, batch_sampler=batches, num_workers=workers,
                       persistent_workers=workers > 0, worker_init_fn=_quiet_worker,
                       pin_memory=torch.cuda.is_available(),
                       generator=torch.Generator())  # else each pass draws from the global stream


def probe_loaders(images: ImageSet, size: int, batch_size: int, workers: int,
                  cache: "ImageCache | None" = None) -> tuple[EpochLoader, EpochLoader]:
    """The training and the validation part with labels, in order and without augmentation."""
    return tuple(make_loader(ImageRows(images.folder, rows, augmentation(size, "none"), truth=images.truth(rows),
                                       cache=cache), batch_size, shuffle=False, workers=workers)
                 for rows in (images.part("train"), images.part("val")))


def _quiet_worker(_: int) -> None:
    """One thread a worker; Ctrl-C is for the main process, which ends the workers itself."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# %% the cache


class ImageCache:
    """The images of a data set resized to `(size, size)`: one uint8 array `(N, size, size, 3)` in a
    file in `folder`, mapped into memory. Resizing is the first step of every augmentation, so
    what comes out of the others is the same to the bit.

    The file's name is a hash of what it was made from, so a changed image makes another file. It is
    written aside and renamed: what bears the name is whole, whoever else builds it or was killed.
    A checksum of each image stands at the end: one that was damaged later is read from its own file.
    Raises `DataError`.
    """

    def __init__(self, images: ImageSet, size: int, folder: Path, workers: int = 0) -> None:
        paths = sorted(row.path for row in images.rows)
        self.index, self.shape = {path: i for i, path in enumerate(paths)}, (size, size, 3)
        key = hashlib.sha256(repr((images.folder.resolve(), self.shape, PIL.__version__)).encode())
        for path in paths:
            try:
                facts = os.stat(images.folder / path)
            except OSError as error:
                raise DataError(f"{images.folder / path} can't be read: {error.strerror}") from None
            key.update(repr((path, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)).encode())
        self.file, self.folder = folder / f"images-{size}-{key.hexdigest()[:32]}.uint8", images.folder
        self.resize = v2.Resize((size, size), v2.InterpolationMode.BILINEAR)
        bytes_needed = len(paths) * (size * size * 3 + 4)
        if not self.file.is_file() or self.file.stat().st_size != bytes_needed:
            try:
                self._build(images, bytes_needed, workers)
            except OSError as error:
                raise DataError(f"--cache {folder} can't be written: {error.strerror}") from None
        self.checksums = np.fromfile(self.file, np.uint32, offset=len(paths) * size * size * 3)

    def __getitem__(self, path: str) -> Image.Image:
        # Mapped anew each time: a map does not survive the way to a worker process.
        number = self.index[path]
        pixels = np.memmap(self.file, np.uint8, "r", number * self.shape[0] * self.shape[1] * 3, self.shape)
        if zlib.crc32(pixels) != self.checksums[number]:
            return self.resize(load_image(self.folder / path))
        return Image.fromarray(pixels)

    def _build(self, images: ImageSet, bytes_needed: int, workers: int) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        for old in self.file.parent.glob("images-*.tmp"):  # of runs that were killed
            with contextlib.suppress(OSError):
                if time.time() - old.stat().st_mtime > 24 * 3600:
                    old.unlink()
        if (free := shutil.disk_usage(self.file.parent).free) < bytes_needed:
            raise DataError(f"--cache {self.file.parent} has {free / 1e9:.1f} GB left, and "
                            f"{bytes_needed / 1e9:.1f} are needed")
        rows = ImageRows(images.folder, [Row(path) for path in self.index], v2.Compose([self.resize, np.array]))
        loader = make_loader(rows, 32, shuffle=False, workers=workers)
        aside = self.file.with_suffix(f".{uuid.uuid4().hex}.tmp")
        checksums: list[int] = []
        print(f"writing {len(rows)} images, {bytes_needed / 1e9:.1f} GB, to the cache {self.file}")
        try:
            with open(aside, "wb") as file:
                for batch in tqdm(loader, unit="batch", disable=not sys.stdout.isatty()):
                    file.write(batch.numpy())
                    checksums += [zlib.crc32(pixels) for pixels in batch.numpy()]
                file.write(np.array(checksums, np.uint32))
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, self.file)
        finally:
            aside.unlink(missing_ok=True)


# %% the command


def add_data_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """The options of every command that reads images."""
    add = parser.add_argument
    add("--data", type=Path, required=required, help="folder of images; `python data.py --data DIR` "
        "shows how it is read")
    add("--split", default="auto", choices=("auto", "image", "group"),
        help="split by image, or keep groups such as patients together; auto: by group where "
             "labels.csv has that column (the paper does not say)")
    add("--ratios", type=ratios, default=(0.7, 0.1, 0.2), metavar="T,V,T",
        help="shares of training, validation and test where the folder has no split of its own "
             "(paper: 0.7,0.1,0.2; its first version: 0.8,0.1,0.1)")
    add("--split-seed", type=int, default=0, help="fixes the split (default: %(default)s)")
    add("--split-file", type=Path, metavar="FILE", help="take the parts from a split.csv (of a run, or of "
        "extras.audit) in place of --split; images it does not name are left out")
    add("--skip-bad", action="store_true", help="decode every image first, leave out and count "
        "the damaged ones")


def ratios(text: str) -> tuple[float, ...]:
    """An argparse type: three shares, the first two above zero, summing to one."""
    try:
        values = tuple(float(x) for x in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3 or min(values) < 0 or not values[0] or not abs(sum(values) - 1) <= 1e-6:
        raise argparse.ArgumentTypeError(f"{text} is not three shares that sum to 1, like 0.7,0.1,0.2")
    return values


def open_images(args: argparse.Namespace) -> ImageSet:
    """Read and split the data set named by the options of `add_data_options`."""
    images = read_images(args.data)
    if args.split_file:
        images = read_split(args.split_file, images)
    if args.skip_bad:
        images = good_rows(images)
    return images if args.split_file else split_images(images, by=args.split, ratios=args.ratios, seed=args.split_seed)


def describe(images: ImageSet) -> Iterable[str]:
    """Lines that tell what was found, for a person."""
    kind = "several labels an image" if images.multi_label else "one label an image"
    groups = {row.group for row in images.rows if row.group}
    yield (f"{images.folder}: {len(images.rows)} images, "
           + (f"{len(images.classes)} classes, {kind}" if images.classes else "no labels")
           + (f", {len(groups)} groups" if groups else ""))
    width = max([len(c) for c in images.classes] + [9])
    yield f"  {'':{width}} " + "".join(f"{part:>8}" for part in PARTS) + f"{'all':>8}"
    per = {part: Counter(label for row in images.part(part) for label in row.labels) for part in PARTS}
    for name in images.classes:
        counts = [per[part][name] for part in PARTS]
        yield f"  {name:{width}} " + "".join(f"{n:8,}" for n in (*counts, sum(counts)))
    counts = [len(images.part(part)) for part in PARTS]
    yield f"  {'images':{width}} " + "".join(f"{n:8,}" for n in (*counts, sum(counts)))
    if groups:
        counts = [len({row.group for row in images.part(part)}) for part in PARTS]
        yield f"  {'groups':{width}} " + "".join(f"{n:8,}" for n in (*counts, len(groups)))
    sizes, modes = Counter(), Counter()
    for row in images.rows[:: max(1, len(images.rows) // 2000)]:  # headers only; 2,000 are enough
        try:
            with Image.open(images.folder / row.path) as image:
                sizes[image.size] += 1
                modes[image.mode] += 1
        except Exception:
            modes["unreadable"] += 1
    yield "  sizes: " + ", ".join(f"{w} x {h} ({n})" for (w, h), n in sizes.most_common(4)) + (
        f" and {len(sizes) - 4} more" if len(sizes) > 4 else "")
    yield "  modes: " + ", ".join(f"{mode} ({n})" for mode, n in modes.most_common())
    for row in images.rows[:: max(1, len(images.rows) // 3)][:3]:
        yield "  e.g. " + "  ".join(filter(None, (row.path, "|".join(row.labels), row.group, row.split)))
    for note in images.notes:
        yield f"  note: {note}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="data.py", allow_abbrev=False,
                                     description="Show how a folder of images is read and split.")
    add_data_options(parser)
    args = parser.parse_args(argv)
    try:
        print("\n".join(describe(open_images(args))))
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__" and "__file__" in globals():
    main()
