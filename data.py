"""From a folder of images to batches: reading, splitting, augmenting, loading.

`python data.py --data DIR` shows how a folder is read. Understood are:

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
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError, features
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

PARTS = ("train", "val", "test")
PART_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val",
              "validation": "val", "test": "test", "testing": "test"}
ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif",
           *([".avif"] if features.check("avif") else []))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # paper, F.2.2


class DataError(ValueError):
    """Images or labels that can't be used; one sentence that names the file and what to do."""


def _need(fine: object, complaint: str) -> None:
    if not fine:
        raise DataError(complaint)


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
    """`rows` and `classes` in a fixed order (no classes: no labels), `notes` for the user.
    `window` is where the intensities of images of more than 8 bits lie; None: each in its own."""
    folder: Path
    rows: list[Row]
    classes: list[str]
    multi_label: bool = False
    notes: list[str] = field(default_factory=list)
    window: tuple[float, float] | None = None

    def part(self, name: str) -> list[Row]:
        return [row for row in self.rows if row.split == name]

    def labelled(self, rows: list[Row]) -> list[Row]:
        """Those whose classes are known; with several an image, "none of them" is known too."""
        return rows if self.multi_label else [row for row in rows if row.labels]

    def truth(self, rows: list[Row]) -> np.ndarray:
        """Multi-hot float labels `(N, K)`."""
        column = {name: k for k, name in enumerate(self.classes)}
        truth = np.zeros((len(rows), len(column)), np.float32)
        for i, row in enumerate(rows):
            truth[i, [column[name] for name in row.labels]] = 1
        return truth


# %% folders


def find_images(folder: str | Path, skip_bad: bool = False) -> ImageSet:
    """All images below a folder, whatever its form, without labels or parts."""
    paths, _, notes = _walk(Path(folder))
    images = ImageSet(Path(folder), [Row(path) for path in paths], [], notes=notes)
    return good_rows(images) if skip_bad else images


def read_images(folder: str | Path) -> ImageSet:
    """Read a data folder of any of the four forms above. Raises `DataError`."""
    folder = Path(folder)
    if (folder / "labels.csv").is_file():
        return _read_csv(folder)
    paths, folders, notes = _walk(folder)
    tops = [path for path in folders if "/" not in path]
    parts = {name: PART_NAMES[name.lower()] for name in tops if name.lower() in PART_NAMES}
    if "train" not in parts.values():
        parts = {}
        below = {PART_NAMES.get(path.split("/")[1].lower()) for path in folders if "/" in path}
        _need(len(tops) != 1 or "train" not in below, f"{folder} holds one folder, which holds "
              f"the parts; name that one: --data {folder / ''.join(tops[:1])}")
    depth = 1 if parts else 0  # of the class among the folders of a path
    rows, unused = [], []
    for path in paths:
        *names, _ = path.split("/")
        if parts and (not names or names[0] not in parts):
            unused.append(path)
        else:
            label = tuple(names[depth:depth + 1])
            rows.append(Row(path, label, split=parts[names[0]] if parts else ""))
    labelled = {row.split for row in rows if row.labels}
    unused += [row.path for row in rows if not row.labels and row.split in labelled]
    rows = [row for row in rows if row.labels or row.split not in labelled]
    classes = sorted({label for row in rows for label in row.labels}, key=_by_number)
    beside = " and ".join(sorted(parts)) or "the class folders"
    notes += _such(unused, f"images beside {beside} are not used")
    used = {"/".join(row.path.split("/")[:depth + 1]) for row in rows}
    notes += _such([path for path in folders if path.count("/") == depth and path not in used],
                   "folders hold no images of their own")
    notes += _doubts(rows, classes, depth + 1)
    return ImageSet(folder, rows, distinct_classes(classes), notes=notes)


def _walk(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """All images and all folders below `folder`, relative to it and sorted, and a note of what
    else is there. What lies behind links comes after the rest, and each folder once, so that no
    link puts an image into two classes."""
    _need(folder.is_dir(), f"{folder} is not a folder; --data names the one with the images")
    seen = {str(above) for above in folder.resolve().parents}
    images, below, others, waiting = [], [], Counter(), [str(folder)]
    while waiting:
        for here, folders, files in os.walk(waiting.pop(0), onerror=_cant_list):
            if os.path.realpath(here) in seen:
                folders.clear()
                continue
            seen.add(os.path.realpath(here))
            folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
            paths = [os.path.join(here, name) for name in folders]
            below += paths
            waiting += filter(os.path.islink, paths)
            for name in files:
                if name.startswith(".") or name in ("Thumbs.db", "labels.csv"):
                    continue
                if name.lower().endswith(ENDINGS):
                    images.append(os.path.join(here, name))
                else:
                    others[os.path.splitext(name)[1].lower() or name] += 1
    for path in images:  # what fits into no CSV file; bytes that are no UTF-8 come from old zips
        _need(not re.search("[\r\n\ud800-\udfff]", path),
              f"the name of {ascii(path)} is not plain text; rename that file")
    kinds = ", ".join(f"{count} {ending}" for ending, count in others.most_common(6))
    _need(images, f"{folder} holds no images ({' '.join(ENDINGS)})"
          + (f", but {kinds}" if kinds else "") + "; --data names the folder that holds them")
    images, below = ([os.path.relpath(path, folder).replace(os.sep, "/") for path in paths]
                     for paths in (images, below))
    return sorted(images), sorted(below), [f"files not read: {kinds}"] if kinds else []


def _cant_list(error: OSError) -> None:
    raise DataError(f"folder {error.filename} can't be read: {error.strerror}")


def _such(names: list[str], words: str) -> list[str]:
    """A note, if there is something to be noted."""
    return [f"{len(names)} {words}, such as {names[0]}"] if names else []


NO_CLASS = re.compile(r"(?i)images?|masks?|labels?|annotations?|(train|val|test)([ _-]\w+|set|\d*)")
MASK = re.compile(r"(?i)[_-](masks?|seg\w*|gt|label)(_?\d+)?$")


def _doubts(rows: list[Row], classes: list[str], depth: int) -> list[str]:
    """Notes on folders that look as if something else was meant."""
    other = [name for name in classes if NO_CLASS.fullmatch(name)]
    deeper = [row.path for row in rows if row.labels and row.path.count("/") > depth]
    stems = {os.path.splitext(row.path)[0] for row in rows}
    masks = sorted(stem for stem in stems if MASK.search(stem) and MASK.sub("", stem) in stems)
    return [*_such(other, "folders are taken for classes; parts are called train, val and test, "
                          "and masks must lie elsewhere"),
            *_such(deeper, "images lie deeper than their class folder, whose name counts; to name "
                           "other classes write a labels.csv"),
            *_such(masks, "images look like masks of others; move them out of the folder")]


def _by_number(name: str) -> tuple:
    """A key that sorts 2 before 10."""
    pieces = re.split(r"(\d+)", name)
    return [int(piece) if i % 2 else piece for i, piece in enumerate(pieces)], name


def distinct_classes(classes: list[str]) -> list[str]:
    """The same list, refused if names are as good as equal or hold a |."""
    plain: dict[str, str] = {}
    for name in classes:
        _need("|" not in name, f"class {name!r} has a | in its name, which separates labels; "
                               "rename it")
        other = plain.setdefault(" ".join(name.lower().split()).removesuffix(".0"), name)
        _need(other == name, "classes {!r} and {!r} differ by white space, .0 or case alone; "
                             "write them the same way".format(*sorted((other, name))))
    return classes


# %% tables

Lines = list[tuple[int, dict[str, str]]]  # number of the line, cells by column


def read_table(file: Path, strip: bool = True) -> tuple[list[str], Lines]:
    """The column names of a CSV file, and its lines without the empty ones: separators , ; or
    tab, quotes, UTF-8 or 16, any line ends. Columns without a name (of line numbers, or empty)
    are left out. `strip` takes white space off the cells."""
    try:
        raw = file.read_bytes()
        text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except OSError as error:
        raise DataError(f"{file} can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{file} is not UTF-8 text; save it as CSV UTF-8") from None
    first = next(filter(str.strip, text.splitlines()), "")
    table = csv.reader(io.StringIO(text, newline=None), delimiter=max(",;\t", key=first.count))
    header, lines = [], []
    try:
        for cells in table:
            where = f"{file} line {table.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            _need(not any("\n" in cell for cell in cells),
                  f"{where} ends a cell that goes over several lines; is a quote unclosed?")
            if not header:
                header = [cell.strip() for cell in cells]
                while not header[-1]:
                    header.pop()
                continue
            beyond = cells[len(header):]
            _need(len(cells) >= len(header) and not any(cell.strip() for cell in beyond),
                  f"{where} has {len(cells)} cells, not the {len(header)} of its first line")
            cells = [cell.strip() for cell in cells] if strip else cells
            lines.append((table.line_num, dict(zip(header, cells))))
    except csv.Error as error:
        raise DataError(f"{file} line {table.line_num} can't be read: {error}; "
                        "is a quote unclosed?") from None
    names = [name for name in header if name and not name.startswith("Unnamed:")]
    _need(len(set(names)) == len(names), f"{file} needs distinct column names in its first line, "
                                         f"not {', '.join(names)}")
    return names, lines


YES, NO = ("1", "1.0", "1,0", "true"), ("0", "0.0", "0,0", "false")  # cells of class columns
UNKNOWN = ("na", "nan", "n/a", "null", "-1")  # what programs write where no label is known


def _read_csv(folder: Path) -> ImageSet:
    """Read `labels.csv`; all that can be wrong with it is told here."""
    file = folder / "labels.csv"
    header, lines = read_table(file)
    column = {name.lower(): name for name in header if name.lower() in ("image", "group", "split")}
    names = [name for name in header if name not in column.values()]
    _need("image" in column, f"{file} needs a first line of column names, one of them `image`; it "
          f"has {', '.join(header) or 'none'}; for tables of another form see extras/prepare.py")
    _need(len(names) < 2 or not {"label", "labels"} & {name.lower() for name in names},
          f"{file} has the columns {', '.join(names)}; known are image, group, split and either "
          "one column of labels or one per class")
    _need(lines, f"{file} has no rows below its first line")
    rows: dict[str, Row] = {}
    for number, line in lines:
        where = f"{file} line {number}"
        path, group, part = (line.get(column.get(key), "") for key in ("image", "group", "split"))
        path = posixpath.normpath(path) if path else "no image"  # ./a.png and a.png are one
        _need(path not in rows, f"{where} names {path} again; keep one of the two lines")
        _need(not posixpath.isabs(path),
              f"{where} names {path}; write it relative to the folder of the table")
        _need((folder / path).is_file(), f"{where} names {path}, which is not in {folder}")
        _need(not part or part.lower() in PART_NAMES,
              f"{where} has split {part!r}; it must be train, val or test")
        rows[path] = Row(path, _labels(where, names, line), group, PART_NAMES.get(part.lower(), ""))
    for key in ("group", "split"):
        empty = [not getattr(row, key) for row in rows.values()]
        _need(all(empty) or not any(empty), f"{file}: column {key} must be filled in for every "
              f"image or for none; it is empty in line {lines[empty.index(max(empty))][0]}")
    classes = {label for row in rows.values() for label in row.labels}
    classes = names if len(names) > 1 else sorted(classes, key=_by_number)
    numbers = {len(row.labels) for row in rows.values()}
    several = max(numbers) > 1 or len(names) > 1 and min(numbers) == 0
    paths, _, notes = _walk(folder)
    notes += _such([path for path in paths if path not in rows],
                   "images that labels.csv does not name are left out")
    return ImageSet(folder, list(rows.values()), distinct_classes(classes), several, notes)


def _labels(where: str, names: list[str], line: dict[str, str]) -> tuple[str, ...]:
    """The labels in one line of a labels.csv, from its only column or from one for each class."""
    cells = [line[name] for name in names]
    if len(names) > 1:
        for name, cell in zip(names, cells):
            _need(cell.lower() in YES + NO, f"{where}, column {name!r} holds {cell!r}; with class "
                  "columns each cell must be 0 or 1; known besides are image, group and split")
        return tuple(name for name, cell in zip(names, cells) if cell.lower() in YES)
    labels = [label.strip() for cell in cells for label in cell.split("|")]
    for label in labels:
        _need(label.lower() not in UNKNOWN,
              f"{where} has the label {label!r}; leave the cell empty where none is known")
    return tuple(dict.fromkeys(filter(None, labels)))


# %% splitting


def split_images(images: ImageSet, *, seed: int = 0,
                 ratios: tuple[float, ...] = (0.7, 0.1, 0.2)) -> ImageSet:
    """Give a part to every row that has none: with its group (patient) where that has one, else
    by `ratios`, stratified. Parts that the data set names stay (paper, 4.3), but for a missing
    validation part an eighth of training is taken."""
    rows, notes = list(images.rows), list(images.notes)
    home = {row.group: row.split for row in rows if row.group and row.split}
    rows = [row if row.split else replace(row, split=home.get(row.group, "")) for row in rows]
    free, parts = [i for i, row in enumerate(rows) if not row.split], PARTS
    if not free and not any(row.split == "val" for row in rows):
        free, parts = [i for i, row in enumerate(rows) if row.split == "train"], ("train", "val")
        ratios = (7 / 8, 1 / 8)
    for i, part in zip(free, _stratify(images, [rows[i] for i in free], ratios, seed)):
        rows[i] = replace(rows[i], split=parts[part])
    for part in PARTS:
        here = {label for row in rows if row.split == part for label in row.labels}
        if not here and images.classes and any(row.split == part for row in rows):
            notes.append(f"the {part} part has no labels")
        elif missing := [name for name in images.classes if name not in here]:
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
    counts = np.array([truth[unit].sum(0) for unit in members]).reshape(-1, truth.shape[1])
    total = counts.sum(0)
    lack = np.outer(shares, total)  # (parts, classes and one)
    rarest = np.where(counts > 0, total, np.inf).argmin(1)
    order = np.random.default_rng(seed).permutation(len(members))
    result = [0] * len(rows)
    for unit in sorted(order, key=lambda unit: (total[rarest[unit]], -counts[unit, -1])):
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


def read_split(file: Path, images: ImageSet, grow: bool = False) -> ImageSet:
    """The rows that a `split.csv` and `images` share, in its order, with its parts. `grow` adds
    the other rows, without a part, for `split_images` to find them one."""
    _, table = read_table(file, strip=False)
    known, parts = {row.path: row for row in images.rows}, {}
    for number, line in table:
        path, part, labels = (line.get(name, "") for name in ("path", "split", "labels"))
        where = f"{file} line {number}"
        _need(path not in parts and part in PARTS,
              f"{where} names {path!r} twice, or in part {part!r}; known are {', '.join(PARTS)}")
        parts[path] = part
        now = "|".join(known[path].labels) if path in known else ""
        _need(labels in ("", now) or not now,  # they may have been added or taken away
              f"{where}: {path} has other labels in {images.folder} now")
    both = [replace(known[path], split=part) for path, part in parts.items() if path in known]
    others = [row for row in images.rows if row.path not in parts]
    _need(parts, f"{file} is empty")
    if grow and not both:
        note = f"{images.folder} holds no image of {file} and is split anew"
        return replace(images, notes=[*images.notes, note])
    for path in parts:
        _need((images.folder / path).is_file(), f"{file} names {path!r}, which is not in "
              f"{images.folder}: the split belongs to another data set, or that one has changed")
    what = "get parts of their own" if grow else "are left out"
    notes = _such([row.path for row in others], f"images that {file} does not name {what}")
    return replace(images, rows=both + others if grow else both, notes=images.notes + notes)


# %% images


def _header(file) -> tuple[Image.Image, dict, bool]:
    """An image opened but not decoded, its TIFF tags, and whether it has more than 8 bits."""
    image = Image.open(file)
    deep = image.mode[0] in "IF" or image.mode != "CMYK" and ";16" in str(image.tile)
    return image, getattr(image, "tag_v2", {}), deep


def _decode(file) -> tuple[Image.Image, np.ndarray | None, bool]:
    """The upright image; where it has more than 8 bits its values `(H, W)` or `(H, W, 3)`; and
    whether low values are bright. Where Pillow takes a file for what it isn't, its tags say so."""
    image, tags, deep = _header(file)
    bits, kind = tags.get(258, (8,))[0], tags.get(339, (1,))[0]
    alpha = tags.get(338, ())
    _need(tags.get(284) != 2 or bits == 8 and 1 not in alpha, "planes of 16 bits, or with alpha")
    image, values = _load(image), None
    if tags.get(262) == 3 and max(tags[320]) < 256:  # a palette of 8 bits
        image.putpalette(bytes(tags[320]), "RGB;L")
    if kind == 2 and image.mode == "L":  # signed bytes
        image = image.point(lambda value: value ^ 128)
    if deep and image.mode[0] in "IF":
        values = np.asarray(image, np.float64)
        values = values + 2.0 ** 32 * ((values < 0) & (bits == 32) & (kind == 1))
    elif deep:
        low = np.asarray(_load(_header(file)[0], lower=True))[..., :3]
        values = np.asarray(image)[..., :3] * 256.0 + low
    if 1 in alpha:  # colours are multiplied by it already, so as they look over black
        image = image.getchannel(0) if image.mode == "La" else image.convert("RGB")
    return image, values, tags.get(262) == 0


def _load(image: Image.Image, lower: bool = False) -> Image.Image:
    """Decoded and upright. Of colours of 16 bits Pillow reads the upper bytes, and the `lower`
    ones if told that bytes come in the other order."""
    other = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
    for i, tile in enumerate(image.tile if image.format in ("TIFF", "PNG") else ()):
        form, *more = [tile.args] if isinstance(tile.args, str) else tile.args
        form = form.replace("RGBa", "RGBA")  # colours as they are, which is over black
        if tile.codec_name == "libtiff":  # which has put bytes in order already
            form = re.sub(r"(;\d+)B", r"\1N", form)
        form = form[:-1] + other[form[-1]] if lower else form
        image.tile[i] = tile._replace(args=(form, *more) if more else form)
    image.load()
    return ImageOps.exif_transpose(image)


def _range(values: np.ndarray) -> tuple[float, float]:
    """From where to where intensities lie, a few hot pixels and fill values left out."""
    values = values[np.abs(values) < 1e30]  # nor is anything that is no number
    if not values.size:
        return 0.0, 1.0
    low, high = np.percentile(values, (0.5, 99.5), method="nearest").tolist()
    return (low, high) if low < high else (float(values.min()), float(values.max()))


def load_image(path: str | Path, window: tuple[float, float] | None = None) -> Image.Image:
    """Any supported file as 8-bit RGB: grey, palette, alpha (over black; not where it is the same
    everywhere), CMYK; the first page of several; turned upright. More than 8 bits are scaled by
    `window`, else by the image's own range. Raises `DataError`, naming the file."""
    try:
        with open(path, "rb") as file:  # by its name, Pillow 13 scrambles some turned TIFFs
            image, values, inverted = _decode(file)
    except FileNotFoundError:
        raise DataError(f"{path} is not there") from None
    except Image.DecompressionBombError:
        raise DataError(f"{path} has more pixels than is safe to decode; make it smaller") from None
    except Exception as error:  # Pillow raises a dozen kinds for damaged files
        unknown = isinstance(error, UnidentifiedImageError)
        words = getattr(error, "strerror", None) or " ".join(str(error).split())
        words = "of no form that Pillow knows" if unknown else words
        raise DataError(f"{path} can't be read as an image ({_form(path)}{words}); mend it, save "
                        "it as 8-bit RGB or 16-bit grey, or add --skip-bad") from None
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if values is not None:
        low, high = window or _range(values)
        values = (np.nan_to_num(values, nan=low).clip(low, high) - low) / ((high - low) or 1)
        values = 1 - values if inverted else values
        image = Image.fromarray((255 * values).round().astype(np.uint8))
    image = image.convert("RGB")
    if alpha and len(set(alpha.getextrema())) > 1:
        image = Image.composite(image, Image.new("RGB", image.size), alpha)
    return image


def _form(path: str | Path) -> str:
    """What a TIFF holds, for one that Pillow can't read; "" for other files."""
    kinds = {1: "whole numbers", 2: "signed numbers", 3: "floats"}
    try:
        with open(path, "rb") as file:
            tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(8))
            file.seek(tags.next)
            tags.load(file)
        bits, kind = tags[258], kinds.get(tags.get(339, (1,))[0], "other numbers")
        return (f"a TIFF of {len(bits)} x {bits[0]} bits, {kind}, photometric {tags.get(262)}, "
                f"planes {tags.get(284)}, compression {tags.get(259)}: ")
    except Exception:
        return ""


def with_window(images: ImageSet, choice: str | tuple[float, float] = "auto") -> ImageSet:
    """The same with a window: `image` (each its own), (low, high), or `auto`, which is the range
    of a sample of the training part."""
    rows = images.part("train") or images.rows
    rows = rows[:: max(1, len(rows) // 200)]
    draw, values, pages = np.random.default_rng(0), [], []
    for row in rows:
        try:
            with open(images.folder / row.path, "rb") as file:
                image, _, deep = _header(file)
                if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                    pages.append(row.path)
                if deep and choice == "auto":
                    flat = _decode(file)[1].ravel()
                    values.append(flat[draw.integers(flat.size, size=10_000)])
        except Exception:  # `load_image` says what is wrong
            continue
    notes = images.notes + _such(pages, f"images of {len(rows)} looked at have several pages, of "
                                        "which the first is read")
    window = None if isinstance(choice, str) else choice
    return replace(images, notes=notes, window=_range(np.concatenate(values)) if values else window)


def good_rows(images: ImageSet) -> ImageSet:
    """Decode every image once and leave out, with a note, those that can't be read."""
    rows, bad = [], []
    for row in images.rows:
        try:
            load_image(images.folder / row.path)
            rows.append(row)
        except DataError:
            bad.append(row.path)
    _need(rows, f"{images.folder} holds no image that can be read")
    notes = images.notes + _such(bad, "images that can't be read are left out")
    return replace(images, rows=rows, notes=notes)


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
    add("--data", type=_path, required=required,
        help="folder of images; `python data.py --data DIR` shows how it is read")
    add("--ratios", type=ratios, default=(0.7, 0.1, 0.2), metavar="T,V,T",
        help="shares of training, validation and test where the folder has no split of its own "
             "(paper: 0.7,0.1,0.2; its first version: 0.8,0.1,0.1)")
    add("--split-seed", type=int, default=0, help="fixes the split (default: %(default)s)")
    add("--split-file", type=_path, metavar="FILE", help="take the parts from a split.csv (of a "
        "run, or of extras.audit); images it does not name are left out")
    add("--window", type=window, default="auto", metavar="auto|image|LOW,HIGH",
        help="range of intensities in which images of more than 8 bits are shown; auto: one for "
             "all, of the training part; image: of each its own (paper: 8 bits)")
    add("--skip-bad", action="store_true",
        help="decode every image first, leave out and count the damaged ones")


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))  # a shell leaves --data=~/images as it is


def ratios(text: str) -> tuple[float, ...]:
    """An argparse type: three shares, the first above zero, summing to one."""
    values = _numbers(text)
    if len(values) != 3 or min(values) < 0 or not values[0] or not abs(sum(values) - 1) <= 1e-6:
        raise argparse.ArgumentTypeError(f"{text} is not three shares that sum to 1, like "
                                         "0.7,0.1,0.2")
    return values


def window(text: str) -> str | tuple[float, ...]:
    """An argparse type: auto, image, or two numbers."""
    values = _numbers(text)
    if text not in ("auto", "image") and not (len(values) == 2 and values[0] < values[1]):
        raise argparse.ArgumentTypeError(f"{text} is not auto, image or LOW,HIGH like -160,240")
    return values or text


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        return ()


def open_images(args: argparse.Namespace) -> ImageSet:
    """Read and split the data set named by the options of `add_data_options`."""
    images = read_images(args.data)
    if args.split_file:
        images = read_split(args.split_file, images)
    if args.skip_bad:
        images = good_rows(images)
    images = split_images(images, seed=args.split_seed, ratios=args.ratios)
    return with_window(images, args.window)


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
    sizes, modes, alpha = Counter(), Counter(), Counter()
    for row in images.rows[:: max(1, len(images.rows) // 2000)]:  # headers; 2,000 are enough
        try:
            with open(images.folder / row.path, "rb") as file:
                image, _, deep = _header(file)
                sizes[f"{image.width} x {image.height}"] += 1
                modes[f"{image.mode} of 16 bits or more" if deep else image.mode] += 1
                if image.has_transparency_data and alpha.total() < 100:
                    low, high = image.convert("RGBA").getextrema()[3]
                    alpha["the same everywhere: left out" if low == high else "used"] += 1
        except Exception:
            modes["unreadable"] += 1
    if images.window:
        yield "  window of the images of 16 bits or more: {:g} to {:g}".format(*images.window)
    for name, seen in (("sizes", sizes), ("modes", modes), ("alpha", alpha)):
        if not seen:
            continue
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
