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
import csv
import hashlib
import io
import os
import posixpath
import re
import shutil
import signal
import sys
import uuid
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable, Iterator

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
    """Images or labels that can't be used; one sentence that names the file and what to do."""


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
    `notes` are sentences the user should see. `window` is the range of intensities that images
    of more than 8 bits are shown in; None: each in its own."""
    folder: Path
    rows: list[Row]
    classes: list[str]
    multi_label: bool = False
    notes: list[str] = field(default_factory=list)
    window: tuple[float, float] | None = None

    def part(self, name: str) -> list[Row]:
        return [row for row in self.rows if row.split == name]

    def truth(self, rows: list[Row]) -> np.ndarray:
        """Multi-hot float labels `(N, K)`."""
        truth = np.zeros((len(rows), len(self.classes)), np.float32)
        column = {name: k for k, name in enumerate(self.classes)}
        for i, row in enumerate(rows):
            for name in row.labels:
                truth[i, column[name]] = 1
        return truth


# %% reading


def find_images(folder: str | Path, skip_bad: bool = False) -> ImageSet:
    """All images below a folder, whatever its form, without labels or parts."""
    if not Path(folder).is_dir():
        raise DataError(f"{folder} is not a folder of images")
    images = ImageSet(Path(folder), [Row(path) for path in _image_files(Path(folder))], [])
    return good_rows(images) if skip_bad else images


def read_images(folder: str | Path) -> ImageSet:
    """Read a data folder of any of the four forms above. Raises `DataError`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; --data names the folder that holds the images")
    if (folder / "labels.csv").is_file():
        return _read_csv(folder)
    rows, notes = _read_folders(folder, _image_files(folder))
    classes = {label for row in rows for label in row.labels}
    return ImageSet(folder, rows, distinct_classes(sorted(classes, key=_by_number)), notes=notes)


def _read_folders(folder: Path, paths: list[str]) -> tuple[list[Row], list[str]]:
    """Rows and notes from the folders in each path: the part, where one of them is called train,
    then the class. Below the class a path may go on."""
    folders = {path: path.split("/")[:-1] for path in paths}
    tops = {names[0] for names in folders.values() if names}
    parts = {name: PART_NAMES[name.lower()] for name in tops if name.lower() in PART_NAMES}
    if "train" not in parts.values():
        parts = {}
    below = {PART_NAMES.get(names[1].lower()) for names in folders.values() if len(names) > 1}
    if len(tops) == 1 and not parts and "train" in below:
        inner = folder / tops.pop()
        raise DataError(f"{folder} holds one folder, which holds the parts; "
                        f"name that one: --data {inner}")
    rows, notes, strays = [], [], []
    for path, names in folders.items():
        part = parts.get(names[0], "") if names else ""
        if parts and not part:
            strays.append(names[0] if names else path)
            continue
        names = names[1:] if parts else names
        rows.append(Row(path, tuple(names[:1]), split=part))
    for name in sorted(set(strays)):
        notes.append(f"{name} beside {' and '.join(sorted(parts))} is not used")
    labelled = {row.split for row in rows if row.labels}
    flat = [row.path for row in rows if not row.labels and row.split in labelled]
    if flat:
        rows = [row for row in rows if row.labels or row.split not in labelled]
        notes.append(f"{len(flat)} images beside the class folders are not used, such as {flat[0]}")
    return rows, notes


def _image_files(folder: Path) -> list[str]:
    """Paths of all images below `folder`, relative to it, sorted. What lies behind links comes
    after the rest, and each folder once, so that no link puts an image into two classes."""
    seen = {str(above) for above in folder.resolve().parents}
    found, waiting = [], [str(folder)]
    while waiting:
        for here, folders, files in os.walk(waiting.pop(0), onerror=_cant_list):
            if os.path.realpath(here) in seen:
                folders.clear()
                continue
            seen.add(os.path.realpath(here))
            folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
            waiting += [os.path.join(here, name) for name in folders
                        if os.path.islink(os.path.join(here, name))]
            found += [os.path.relpath(os.path.join(here, name), folder) for name in files
                      if name.lower().endswith(ENDINGS) and not name.startswith(".")]
    for path in found:  # what fits into no CSV file; bytes that are no UTF-8 come from old zips
        if re.search("[\r\n\ud800-\udfff]", path):
            raise DataError(f"the name of {ascii(os.path.join(folder, path))} is not plain text; "
                            "rename that file")
    if not found:
        raise DataError(f"{folder} holds no images ({' '.join(ENDINGS)}); --data names the folder "
                        "that holds them")
    return sorted(path.replace(os.sep, "/") for path in found)


def _cant_list(error: OSError) -> None:
    raise DataError(f"folder {error.filename} can't be read: {error.strerror}")


def _by_number(name: str) -> tuple:
    """A key that sorts 2 before 10."""
    pieces = re.split(r"(\d+)", name)
    return [int(piece) if i % 2 else piece for i, piece in enumerate(pieces)], name


def distinct_classes(classes: list[str]) -> list[str]:
    """The same list, refused if names differ by case or white space alone, or hold a |."""
    plain: dict[str, str] = {}
    for name in classes:
        if "|" in name:
            raise DataError(f"class {name!r} has a | in its name, which separates labels; "
                            "rename it")
        other = plain.setdefault(" ".join(name.lower().split()), name)
        if other != name:
            a, b = sorted((other, name))
            raise DataError(f"classes {a!r} and {b!r} differ by white space or case alone; "
                            "write them the same way")
    return classes


# %% tables

Lines = list[tuple[int, dict[str, str]]]  # number of the line, cells by column


def read_table(file: Path, strip: bool = True) -> tuple[list[str], Lines]:
    """The column names of a CSV file, and its lines without the empty ones: separators , ; or
    tab, quotes, a byte-order mark, any line ends. `strip` takes white space off the cells."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{file} can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{file} is not UTF-8 text; save it as CSV UTF-8") from None
    head = next(filter(str.strip, text.splitlines()), "")
    table = csv.reader(io.StringIO(text), delimiter=max(",;\t", key=head.count))
    header, lines = [], []
    try:
        for cells in table:
            where = f"{file} line {table.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            if any("\n" in cell for cell in cells):
                raise DataError(f"{where} ends a cell that goes over several lines; "
                                "is a quote unclosed?")
            if not header:
                header = [cell.strip() for cell in cells]
                continue
            if len(cells) != len(header):
                raise DataError(f"{where} has {len(cells)} cells, not the {len(header)} of its "
                                "first line")
            cells = [cell.strip() for cell in cells] if strip else cells
            lines.append((table.line_num, dict(zip(header, cells))))
    except csv.Error as error:
        raise DataError(f"{file} line {table.line_num} can't be read: {error}; "
                        "is a quote unclosed?") from None
    if len(set(header)) < len(header):
        raise DataError(f"{file} needs distinct column names in its first line, "
                        f"not {', '.join(header)}")
    return header, lines


def _read_csv(folder: Path) -> ImageSet:
    """Read `labels.csv`."""
    file = folder / "labels.csv"
    header, lines = read_table(file)
    columns = [name for name in header if name not in ("image", "group", "split")]
    rows = [_csv_row(line, columns) for _, line in lines]
    by_class = len(columns) > 1
    classes = columns if by_class else sorted({x for row in rows for x in row.labels}, key=_by_number)
    several = any(len(row.labels) > 1 for row in rows) or by_class and not all(
        row.labels for row in rows)
    for complaint in _complaints(folder, header, columns, lines, rows, several):
        raise DataError(f"{file} {complaint}")
    return ImageSet(folder, rows, distinct_classes(classes), several)


def _csv_row(line: dict[str, str], columns: list[str]) -> Row:
    """One line of labels.csv as it is; what is wrong with it, `_complaints` tells."""
    path = line.get("image", "")
    if path:
        path = posixpath.normpath(path)  # ./a.png and a.png are one image
    if len(columns) > 1:
        labels = [name for name in columns if line[name] in ("1", "1.0")]
    else:
        labels = [label.strip() for name in columns for label in line[name].split("|")]
    labels = tuple(dict.fromkeys(filter(None, labels)))
    return Row(path, labels, line.get("group", ""), PART_NAMES.get(line.get("split", "").lower(), ""))


def _complaints(folder: Path, header: list[str], columns: list[str], lines: Lines, rows: list[Row],
                several: bool) -> Iterator[str]:
    """All that is wrong with a labels.csv, the end of a sentence each."""
    known = "known are image, group, split and either one column of labels or one per class"
    if "image" not in header:
        yield (f"needs a first line of column names, one of them `image`; it has "
               f"{', '.join(header) or 'none'}; for tables of another form see extras/prepare.py")
    named = [name for name in columns if name.lower() in ("label", "labels")]
    if named and len(columns) > 1:
        other = next(name for name in columns if name != named[0])
        yield f"has the unknown column {other!r} beside {named[0]!r}; {known}"
    if not rows:
        yield "has no rows below its first line"
    first: dict[str, int] = {}
    for (number, line), row in zip(lines, rows):
        where = f"line {number}"
        if line.get("split") and not row.split:
            yield f"{where} has split {line['split']!r}; it must be train, val or test"
        for name in columns if len(columns) > 1 else ():
            if line[name] not in ("0", "0.0", "1", "1.0"):
                yield (f"{where}, column {name!r} holds {line[name]!r}; with several class columns "
                       f"each cell must be 0 or 1; {known}")
        if posixpath.isabs(row.path):
            yield f"{where} names {row.path}; write it relative to the folder of the table"
        if row.path in first:
            yield f"lines {first[row.path]} and {number} both name {row.path}; keep one of them"
        first[row.path] = number
        if not row.path or not (folder / row.path).is_file():
            yield f"{where} names {row.path or 'no image'}, which is not in {folder}"
        for column in ("group", "split"):
            if bool(getattr(row, column)) != bool(getattr(rows[0], column)):
                yield f"{where}: column {column} must be filled in for every image or for none"
        if columns and not several and not row.labels:  # else an empty cell means: none of them
            yield f"{where} has no label for {row.path}"


# %% splitting


def split_images(images: ImageSet, *, seed: int = 0,
                 ratios: tuple[float, ...] = (0.7, 0.1, 0.2)) -> ImageSet:
    """Give every row its part: the folder's own split where it has one (paper, 4.3), with a
    missing validation part carved from training, an eighth of it; else by `ratios`, stratified.
    Groups (patients) stay together where they are known."""
    rows, notes = list(images.rows), list(images.notes)
    free, shares = range(len(rows)), ratios
    if rows[0].split:
        whole = any(row.split == "val" for row in rows)
        free = [] if whole else [i for i, row in enumerate(rows) if row.split == "train"]
        shares = (7 / 8, 1 / 8)
    parts = _stratify(images, [rows[i] for i in free], shares, seed) if free else []
    for i, part in zip(free, parts):
        rows[i] = replace(rows[i], split=PARTS[part])
    for part in PARTS:
        here = {label for row in rows if row.split == part for label in row.labels}
        if missing := [name for name in images.classes if name not in here]:
            notes.append(f"the {part} part has no image of {', '.join(missing)}")
    return replace(images, rows=rows, notes=notes)


def _stratify(images: ImageSet, rows: list[Row], shares: tuple[float, ...], seed: int) -> list[int]:
    """The part of each row, for one label an image or several: units (images or groups) of the
    rarest class first, each to the part that lacks most of it (after Sechidis et al. 2011)."""
    units: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        units.setdefault(row.group or str(i), []).append(i)
    members = list(units.values())
    truth = np.c_[images.truth(rows), np.ones(len(rows))]  # the last column counts images
    counts = np.array([truth[unit].sum(0) for unit in members])
    total = counts.sum(0)
    lack = np.outer(shares, total)  # (parts, classes and one)
    rarest = np.where(counts > 0, total, np.inf).argmin(1)
    order = np.random.default_rng(seed).permutation(len(members))
    order = sorted(order, key=lambda unit: (total[rarest[unit]], -counts[unit, -1]))
    result = [0] * len(rows)
    for unit in order:
        wanted = lack[:, [rarest[unit], -1]].round(9).tolist()
        part = wanted.index(max(wanted))
        lack[part] -= counts[unit]
        for i in members[unit]:
            result[i] = part
    return result


def label_fraction(images: ImageSet, rows: list[Row], fraction: float, seed: int) -> list[Row]:
    """The share `fraction` of `rows` whose labels may be used: stratified, and nested, so that a
    smaller share lies inside a larger one of the same seed. Each class comes once, as far as
    there is any, before one comes twice."""
    truth = images.truth(rows)
    truth = np.c_[truth, truth.sum(1) == 0]  # images without any class count as one more class
    total, count = truth.sum(0), np.zeros(truth.shape[1])
    order = np.random.default_rng(seed).permutation(len(rows))
    queues = [[i for i in order[::-1] if truth[i, k]] for k in range(len(total))]
    wanted = max(round(fraction * len(rows)), int((total > 0).sum()))
    taken: set[int] = set()
    while len(taken) < min(wanted, len(rows)):
        lack = total * (len(taken) + 1) / len(rows) - count
        once = (count == 0) & (total > 0)
        lack[once] += len(rows) + 1 / total[once]  # the rarest first
        lack[[not queue for queue in queues]] = -np.inf
        i = queues[int(lack.argmax())].pop()
        if i not in taken:
            taken.add(i)
            count += truth[i]
    return [rows[i] for i in sorted(taken)]


def write_split(file: Path, images: ImageSet) -> None:
    """Write `split.csv` (path, split, labels, group): what fine-tuning reads, so that no test
    image was ever seen."""
    aside = file.with_name(file.name + ".tmp")
    with open(aside, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(("path", "split", "labels", "group"))
        for row in images.rows:
            writer.writerow((row.path, row.split, "|".join(row.labels), row.group))
    os.replace(aside, file)


def read_split(file: Path, images: ImageSet) -> ImageSet:
    """The rows of a `split.csv`, in its order, checked against what the folder holds."""
    _, table = read_table(file, strip=False)
    known, rows = {row.path: row for row in images.rows}, []
    labelled = any(line.get("labels") for _, line in table)  # else made before there were labels
    for number, line in table:
        row = known.get(line.get("path", ""))
        if row is None or line.get("split") not in PARTS:
            raise DataError(f"{file} line {number} names {line.get('path')!r} in part "
                            f"{line.get('split')!r}, which does not fit {images.folder}: the "
                            "split belongs to another data set, or that one has changed")
        if labelled and line.get("labels", "") != "|".join(row.labels):
            raise DataError(f"{file} line {number}: {row.path} has other labels in "
                            f"{images.folder} now")
        rows.append(replace(row, split=line["split"]))
    if not rows or len({row.path for row in rows}) < len(rows):
        raise DataError(f"{file} is empty or names an image twice")
    left = len(known) - len(rows)
    note = [f"{left} images that {file} does not name are left out"] if left else []
    return replace(images, rows=rows, notes=images.notes + note)


# %% images


def load_image(path: str | Path, window: tuple[float, float] | None = None) -> Image.Image:
    """Any supported file as 8-bit RGB: grey, palette, alpha (over black), CMYK; the first page of
    several; turned upright as its EXIF says. Grey of more than 8 bits is scaled by `window`, or
    by the image's own range. Raises `DataError`, naming the file."""
    try:
        with Image.open(path) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise DataError(f"{path} is not there") from None
    except Image.DecompressionBombError:
        raise DataError(f"{path} has more pixels than is safe to decode; "
                        "make it smaller first") from None
    except Exception as error:  # Pillow raises a dozen kinds for damaged files
        words = " ".join(str(error).split())[:80]
        raise DataError(f"{path} can't be read as an image ({type(error).__name__}: {words}); "
                        "mend or remove it, or add --skip-bad") from None
    if image.mode.startswith(("I", "F")):
        image = _to_bytes(np.asarray(image, np.float64), window)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image)
    return image.convert("RGB")


def _to_bytes(pixels: np.ndarray, window: tuple[float, float] | None) -> Image.Image:
    finite = pixels[np.isfinite(pixels)]
    low, high = window or ((finite.min(), finite.max()) if finite.size else (0, 0))
    pixels = np.nan_to_num(pixels, nan=low, posinf=high, neginf=low).clip(low, high)
    return Image.fromarray(((pixels - low) * (255 / ((high - low) or 1))).round().astype(np.uint8))


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
    # A PIL image comes channels last; put in order first, the rest takes half the time.
    return v2.Compose([*steps, v2.ToImage(), torch.Tensor.contiguous,
                       v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD, inplace=True)])


# %% loading


class ImageRows(Dataset):
    """Images of `rows`, with their labels `(K,)` if `labelled`, asked for by (epoch, index): the
    augmentation of image i in epoch e is drawn from a stream seeded by (seed, e, i), so workers,
    a cache or a pause change nothing."""

    def __init__(self, images: ImageSet, rows: list[Row], transform: Callable, seed: int = 0,
                 labelled: bool = False, cache: "ImageCache | None" = None) -> None:
        self.folder, self.window = images.folder, images.window
        self.paths = [row.path for row in rows]
        self.transform, self.seed, self.cache = transform, seed, cache
        self.truth = torch.from_numpy(images.truth(rows)) if labelled else None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        path = self.paths[index]
        image = self.cache[path] if self.cache else load_image(self.folder / path, self.window)
        stream = np.random.SeedSequence((self.seed, epoch, index)).generate_state(1, np.uint64)[0]
        with torch.random.fork_rng(devices=[]):  # the training loop's own stream stays as it was
            torch.default_generator.manual_seed(int(stream >> 1))
            image = self.transform(image)
        return image if self.truth is None else (image, self.truth[index])


class EpochBatches:
    """Batches of (epoch, index); the order of epoch e is a permutation seeded by (seed, e)."""

    def __init__(self, images: int, batch_size: int, seed: int, shuffle: bool,
                 drop_last: bool) -> None:
        self.images, self.size = images, min(batch_size, images)
        self.seed, self.shuffle, self.epoch = seed, shuffle, 0
        stops = list(range(self.size, images + 1, self.size))
        left = images - stops[-1]
        if left == 1 and shuffle and not drop_last:  # batch norm can't train on one image:
            stops[-1] = images  # a last batch of one joins the one before
        elif left and not drop_last:
            stops.append(images)
        self.bounds = list(zip([0, *stops], stops))

    def __len__(self) -> int:
        return len(self.bounds)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.arange(self.images)
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.images)
        for begin, end in self.bounds:
            yield [(self.epoch, int(i)) for i in order[begin:end]]


class EpochLoader(DataLoader):
    """A DataLoader whose order and augmentation follow from (seed, epoch) alone."""

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next, from 0."""
        self.batch_sampler.epoch = epoch

    def __iter__(self) -> Iterator:
        batches = super().__iter__()
        if not (self.batch_sampler.shuffle and sys.stdout.isatty()):
            return batches
        return iter(tqdm(batches, f"epoch {self.batch_sampler.epoch + 1}", len(self), leave=False,
                         unit=" images", unit_scale=self.batch_sampler.size))


def make_loader(dataset: Dataset, batch_size: int, *, seed: int = 0, shuffle: bool = True,
                drop_last: bool = False, workers: int = 0) -> EpochLoader:
    """Batches `(N, 3, size, size)`, with `(N, K)` labels where the dataset has them."""
    batches = EpochBatches(len(dataset), batch_size, seed, shuffle, drop_last)
    return EpochLoader(dataset, batch_sampler=batches, num_workers=workers,
                       persistent_workers=workers > 0, worker_init_fn=_quiet_worker,
                       pin_memory=torch.cuda.is_available(),
                       generator=torch.Generator())  # else it draws from the global stream


def _quiet_worker(_: int) -> None:
    """One thread a worker; Ctrl-C is for the main process, which ends the workers itself."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# %% the cache


class ImageCache:
    """The images of a data set resized to `(size, size)`: one uint8 array `(N, size, size, 3)` in
    a file in `folder`, mapped into memory. Resizing is the first step of every augmentation, so
    what comes out of the others is the same to the bit.

    The file's name is a hash of what it was made from, so a changed image makes another file. It
    is written aside and renamed when whole, whoever else builds it. Raises `DataError`.
    """

    def __init__(self, images: ImageSet, size: int, folder: Path, workers: int = 0) -> None:
        paths = sorted(row.path for row in images.rows)
        self.index, self.shape = {path: i for i, path in enumerate(paths)}, (size, size, 3)
        made_from = [images.folder.resolve(), self.shape, images.window, PIL.__version__]
        for path in paths:
            try:
                facts = os.stat(images.folder / path)
            except OSError as error:
                raise DataError(f"{images.folder / path} can't be read: {error.strerror}") from None
            made_from.append((path, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns))
        key = hashlib.sha256(repr(made_from).encode()).hexdigest()[:32]
        self.file = folder / f"images-{size}-{key}.uint8"
        whole = len(paths) * size * size * 3
        if not self.file.is_file() or self.file.stat().st_size != whole:
            try:
                self._build(images, whole, workers)
            except OSError as error:
                raise DataError(f"--cache {folder} can't be written: {error.strerror}") from None

    def __getitem__(self, path: str) -> Image.Image:
        # Mapped anew each time: a map does not survive the way to a worker process.
        offset = self.index[path] * int(np.prod(self.shape))
        return Image.fromarray(np.memmap(self.file, np.uint8, "r", offset, self.shape))

    def _build(self, images: ImageSet, whole: int, workers: int) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.file.parent).free
        if free < whole:
            raise DataError(f"--cache {self.file.parent} has {free / 1e9:.1f} GB left, and "
                            f"{whole / 1e9:.1f} are needed")
        resize = v2.Resize(self.shape[:2], v2.InterpolationMode.BILINEAR)
        rows = [Row(path) for path in self.index]
        dataset = ImageRows(images, rows, v2.Compose([resize, np.array]))
        loader = make_loader(dataset, 32, shuffle=False, workers=workers)
        aside = self.file.with_suffix(f".{uuid.uuid4().hex}.tmp")
        print(f"writing {len(rows)} images, {whole / 1e9:.1f} GB, to the cache {self.file}")
        try:
            with open(aside, "wb") as file:
                for batch in tqdm(loader, unit="batch", disable=not sys.stdout.isatty()):
                    file.write(batch.numpy())
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, self.file)
        finally:
            aside.unlink(missing_ok=True)


# %% the command


def add_data_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """The options of every command that reads images."""
    add = parser.add_argument
    add("--data", type=_folder, required=required,
        help="folder of images; `python data.py --data DIR` shows how it is read")
    add("--ratios", type=ratios, default=(0.7, 0.1, 0.2), metavar="T,V,T",
        help="shares of training, validation and test where the folder has no split of its own "
             "(paper: 0.7,0.1,0.2; its first version: 0.8,0.1,0.1)")
    add("--split-seed", type=int, default=0, help="fixes the split (default: %(default)s)")
    add("--split-file", type=Path, metavar="FILE", help="take the parts from a split.csv (of a "
        "run, or of extras.audit); images it does not name are left out")
    add("--skip-bad", action="store_true",
        help="decode every image first, leave out and count the damaged ones")


def _folder(text: str) -> Path:
    return Path(text).expanduser()  # a shell leaves --data=~/images as it is


def ratios(text: str) -> tuple[float, ...]:
    """An argparse type: three shares, the first two above zero, summing to one."""
    try:
        values = tuple(float(x) for x in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3 or min(values) < 0 or not values[0] or not abs(sum(values) - 1) <= 1e-6:
        raise argparse.ArgumentTypeError(f"{text} is not three shares that sum to 1, like "
                                         "0.7,0.1,0.2")
    return values


def open_images(args: argparse.Namespace) -> ImageSet:
    """Read and split the data set named by the options of `add_data_options`."""
    images = read_images(args.data)
    if args.split_file:
        images = read_split(args.split_file, images)
    if args.skip_bad:
        images = good_rows(images)
    if args.split_file:
        return images
    return split_images(images, seed=args.split_seed, ratios=args.ratios)


def describe(images: ImageSet) -> Iterator[str]:
    """Lines that tell what was found, for a person."""
    kind = "several labels an image" if images.multi_label else "one label an image"
    classes = f"{len(images.classes)} classes, {kind}" if images.classes else "no labels"
    groups = len({row.group for row in images.rows if row.group})
    yield f"{images.folder}: {len(images.rows)} images, {classes}" + (
        f", {groups} groups" if groups else "")
    parts = [*(images.part(part) for part in PARTS), images.rows]
    counts = [Counter(label for row in rows for label in row.labels) for rows in parts]
    table = [(name, [count[name] for count in counts]) for name in images.classes]
    table.append(("images", [len(rows) for rows in parts]))
    if groups:
        table.append(("groups", [len({row.group for row in rows}) for rows in parts]))
    width = max(len(name) for name, _ in table)
    yield f"  {'':{width}} " + "".join(f"{part:>8}" for part in (*PARTS, "all"))
    for name, numbers in table:
        yield f"  {name:{width}} " + "".join(f"{number:8,}" for number in numbers)
    sizes, modes = Counter(), Counter()
    for row in images.rows[:: max(1, len(images.rows) // 2000)]:  # headers; 2,000 are enough
        try:
            with Image.open(images.folder / row.path) as image:
                sizes[f"{image.width} x {image.height}"] += 1
                modes[image.mode] += 1
        except Exception:
            modes["unreadable"] += 1
    for name, seen in (("sizes", sizes), ("modes", modes)):
        more = f" and {len(seen) - 4} more" if len(seen) > 4 else ""
        yield f"  {name}: " + ", ".join(f"{x} ({n})" for x, n in seen.most_common(4)) + more
    for row in images.rows[:: max(1, len(images.rows) // 3)][:3]:
        facts = (row.path, "|".join(row.labels), row.group, row.split)
        yield "  e.g. " + "  ".join(filter(None, facts))
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
