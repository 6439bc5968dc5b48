"""From a folder of images to rows: path, labels, group and part of each image.

`python data.py --data DIR` shows how a folder is read. Understood are:

- class folders:  DIR/glioma/1.png, DIR/pituitary/2.png
- split folders:  DIR/train|Training/..., DIR/val|validation/..., DIR/test|Testing/...
- a labels.csv:   `image` and one column of labels (several joined by `|`) or one 0/1 column per
                  class; optional columns `group` (such as the patient) and `split`
- a flat folder of images without labels, for pretraining only

Everything odd becomes a labels.csv first: extras/prepare.py. How a file is decoded, and the way
to batches: images.py, whose names can be had from here too.
"""

import argparse
import csv
import io
import os
import posixpath
import re
import textwrap
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator

import numpy as np

from images import (AUGMENTATIONS, ENDINGS, MEAN, STD, DataError, EpochBatches, EpochLoader,
                    ImageCache, ImageRows, ImageSet, Row, augmentation, facts, good_rows,
                    load_image, make_loader, require, such, with_window)

PARTS = ("train", "val", "test")
PART_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val",
              "validation": "val", "test": "test", "testing": "test"}

# What fits into no CSV file or no terminal; bytes that are no UTF-8 come from old zips.
NOT_TEXT = re.compile("[\x00-\x08\n-\x1f\x7f-\x9f\ud800-\udfff]")

# %% folders


def find_images(folder: str | Path) -> ImageSet:
    """All images below a folder, whatever its form, or one file; without labels or parts."""
    folder = Path(folder)
    if folder.is_file():
        return ImageSet(folder.parent, [Row(folder.name)], [])
    paths, _, notes = _walk(folder)
    return ImageSet(folder, [Row(path) for path in paths], [], notes=notes)


def read_images(folder: str | Path) -> ImageSet:
    """Read a data folder of any of the four forms above. Raises `DataError`."""
    folder = Path(folder)
    if (folder / "labels.csv").is_file():
        return _read_csv(folder)
    paths, folders, notes = _walk(folder)
    tops = {path.split("/")[0] for path in folders}
    parts = {name: PART_NAMES[name.lower()] for name in tops if name.lower() in PART_NAMES}
    if "train" not in parts.values():
        parts = {}
        below = {PART_NAMES.get(path.split("/")[1].lower()) for path in folders if "/" in path}
        require(len(tops) != 1 or "train" not in below, f"{folder} holds one folder, which holds "
                f"the parts; name that one: --data {folder / ''.join(tops)}")
    depth = 1 if parts else 0  # of the class among the folders of a path
    rows = []
    for path in paths:
        *names, _ = path.split("/")
        part = parts.get(names[0], "") if names else ""
        if part or not parts:
            rows.append(Row(path, tuple(names[depth:depth + 1]), split=part))
    labelled = {row.split for row in rows if row.labels}
    rows = [row for row in rows if row.labels or row.split not in labelled]
    classes = sorted({label for row in rows for label in row.labels}, key=_by_number)
    notes += _doubts(rows, paths, folders, depth)
    return ImageSet(folder, rows, distinct_classes(classes), notes=notes)


def _walk(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """All images and all folders below `folder`, relative to it and sorted, and a note of what
    else is there. What lies behind links comes after the rest, and each folder once, so that no
    link puts an image into two classes."""
    require(folder.is_dir(), f"{folder} is not a folder; --data names the one with the images")
    seen = {str(above) for above in folder.resolve().parents}
    images, folders, others = [], [], Counter()
    waiting, links = [""], []  # folders to look into, with a / at the end
    while waiting or links:
        here = (waiting or links).pop(0)
        real = os.path.realpath(folder / here)
        if real in seen:
            continue
        seen.add(real)
        for entry in sorted(os.scandir(folder / here), key=lambda entry: entry.name):
            path, name = here + entry.name, entry.name.lower()
            if name.startswith((".", "__macosx")):
                continue
            if os.path.isdir(entry):
                folders.append(path)
                (links if entry.is_symlink() else waiting).append(path + "/")
            elif name.endswith(ENDINGS):
                images.append(path)
            elif path != "labels.csv" and name != "thumbs.db":
                others[os.path.splitext(name)[1] or name] += 1
    kinds = [f"{count} {ascii(ending)[1:-1]}" for ending, count in others.most_common()]
    kinds = ", ".join(kinds[:9]) + ", ..." * (len(kinds) > 9)
    require(images, f"{folder} holds no images ({' '.join(ENDINGS)}), but {kinds or 'no files'}; "
                    "--data names the folder that holds them")
    for path in images + folders:
        require(not NOT_TEXT.search(path), f"the name {ascii(path)} is not plain text; rename it")
    return sorted(images), sorted(folders), [f"files not read: {kinds}"] if kinds else []


NO_CLASS = re.compile(r"(?i)(images?|masks?|labels?|annotations?"
                      r"|(train|test|training|testing|val|validation)([ _-]\w+|set)?)")
MASK = re.compile(r"(?i)[_-](masks?|seg\w*|gt|label)(_?\d+)?$")


def _doubts(rows: list[Row], paths: list[str], folders: list[str], depth: int) -> list[str]:
    """Notes on what is not used, and on folders that look as if something else was meant."""
    used = {row.path for row in rows}
    full = {"/".join(path.split("/")[:depth + 1]) for path in used}
    classes = sorted({label for row in rows for label in row.labels})
    stems = {os.path.splitext(path)[0] for path in used}
    return [
        *such([path for path in paths if path not in used],
              "images beside the class folders are not used"),
        *such([path for path in folders if path.count("/") == depth and path not in full],
              "folders hold no images of their own"),
        *such([name for name in classes if NO_CLASS.fullmatch(name)],
              "folders are taken for classes (parts are train, val and test; masks are no images)"),
        *such([row.path for row in rows if row.labels and row.path.count("/") > depth + 1],
              "images lie deeper than the folder taken for their class (write a labels.csv if "
              "another is meant)"),
        *such(sorted(stem for stem in stems if MASK.search(stem) and MASK.sub("", stem) in stems),
              "images look like masks of others (which should be moved out of the folder)")]


def _by_number(name: str) -> tuple:
    """A key that sorts 2 before 10."""
    pieces = re.split(r"(\d{1,99})", name)  # Python makes no number of 5,000 digits
    return [int(piece) if i % 2 else piece for i, piece in enumerate(pieces)], name


def distinct_classes(classes: list[str]) -> list[str]:
    """The same list, refused if names are as good as equal or hold a |."""
    plain: dict[str, str] = {}
    for name in classes:
        require("|" not in name, f"class {name!r} has a |, which separates labels; rename it")
        other = plain.setdefault(" ".join(name.lower().split()).removesuffix(".0"), name)
        require(other == name, "classes {!r} and {!r} differ by white space, .0 or case alone; "
                               "write them the same way".format(*sorted((other, name))))
    return classes


# %% tables

YES, NO = ("1", "1.0", "1,0", "true"), ("0", "0.0", "0,0", "false")  # cells of class columns
# What people and programs write where no label or group is known.
UNKNOWN = ("na", "nan", "n/a", "<na>", "null", "unknown", "?", "-1", "-1.0")


def read_table(file: Path, strip: bool = True) -> tuple[list[str], list[tuple[int, dict]]]:
    """The column names of a CSV file, and its lines as (number, cells by column): separators , ;
    or tab, quotes, UTF-8 or 16, any line ends. Empty lines and columns without a name (of line
    numbers, or empty) are left out. `strip` takes white space off the cells."""
    try:
        raw = file.read_bytes()
        text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        first = next(filter(str.strip, text.splitlines()), "")
        mark = re.search("[,;\t]", re.sub('"[^"]*"', "", first) + ",")[0]
        table = csv.reader(io.StringIO(text, newline=None), delimiter=mark)
        lines = [(table.line_num, cells) for cells in table if any(map(str.strip, cells))]
    except OSError as error:
        raise DataError(f"{file} can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{file} is not UTF-8 text; save it as CSV UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{file} line {table.line_num} can't be read: {error}; "
                        "is a quote unclosed?") from None
    header = [cell.strip() for cell in lines[0][1]] if lines else []
    while header and not header[-1]:
        header.pop()
    for number, cells in lines:
        bare, where = [cell.strip() for cell in cells], f"{file} line {number}"
        require(not NOT_TEXT.search("".join(bare)), f"{where} ends a cell that goes over several "
                "lines or holds control characters; is a quote unclosed?")
        require(len(bare) >= len(header) and not any(bare[len(header):]),
                f"{where} has {len(bare)} cells, not the {len(header)} of its first line")
        cells[:] = bare if strip else cells
    names = [name for name in header if name and not name.startswith("Unnamed:")]
    require(len(set(names)) == len(names),
            f"{file} needs distinct column names in its first line, not {', '.join(names)}")
    return names, [(number, dict(zip(header, cells))) for number, cells in lines[1:]]


def _read_csv(folder: Path) -> ImageSet:
    """Read `labels.csv`; what can be wrong with it is told here and in `_labels`."""
    file = folder / "labels.csv"
    header, lines = read_table(file)
    names = [name for name in header if name.lower() not in ("image", "group", "split")]
    require("image" in [name.lower() for name in header],
            f"{file} needs a first line of column names, one of them `image`; it has "
            f"{', '.join(header) or 'none'}; for tables of another form see extras/prepare.py")
    require(len(names) < 2 or not {"label", "labels"} & {name.lower() for name in names},
            f"{file} has the columns {', '.join(names)}; known are image, group, split and either "
            "one column of labels or one per class")
    require(lines, f"{file} has no rows below its first line")
    rows: dict[str, Row] = {}
    for number, line in lines:
        where, cells = f"{file} line {number}", {name.lower(): line[name] for name in line}
        path, group, part = (cells.get(name, "") for name in ("image", "group", "split"))
        path = posixpath.normpath(path) if path else "no image"  # ./a.png and a.png are one
        require(path not in rows, f"{where} names {path} again; keep one of the two lines")
        require(not posixpath.isabs(path) and not path.startswith(".."),
                f"{where} names {path}; write it relative to the folder of the table, and inside")
        require((folder / path).is_file(), f"{where} names {path}, which is not in {folder}")
        require(not part or part.lower() in PART_NAMES,
                f"{where} has split {part!r}; it must be train, val or test")
        rows[path] = Row(path, _labels(where, names, line), group, PART_NAMES.get(part.lower(), ""))
    for key in ("group", "split"):
        empty = [getattr(row, key).lower() in ("", *UNKNOWN) for row in rows.values()]
        require(all(empty) or not any(empty), f"{file}: column {key} must be filled in for every "
                f"image or for none; it is empty in line {lines[empty.index(any(empty))][0]}")
    classes = {label for row in rows.values() for label in row.labels}
    classes = names if len(names) > 1 else sorted(classes, key=_by_number)
    numbers = {len(row.labels) for row in rows.values()}
    several = max(numbers) > 1 or len(names) > 1 and min(numbers) == 0
    paths, _, notes = _walk(folder)
    notes += such([path for path in paths if path not in rows],
                   "images that labels.csv does not name are left out")
    return ImageSet(folder, list(rows.values()), distinct_classes(classes), several, notes)


def _labels(where: str, names: list[str], line: dict[str, str]) -> tuple[str, ...]:
    """The labels in one line of a labels.csv, from its only column or from one for each class."""
    if len(names) > 1:
        for name in names:
            require(line[name].lower() in YES + NO,
                    f"{where}, column {name!r} holds {line[name]!r}; with class columns each cell "
                    "must be 0 or 1; known besides are image, group and split")
        return tuple(name for name in names if line[name].lower() in YES)
    labels = [label.strip() for name in names for label in line[name].split("|")]
    for label in labels:
        require(label.lower() not in UNKNOWN, f"{where} has label {label!r}; leave it empty")
    return tuple(dict.fromkeys(filter(None, labels)))


# %% splitting


def split_images(images: ImageSet, *, seed: int = 0,
                 ratios: tuple[float, ...] = (0.7, 0.1, 0.2)) -> ImageSet:
    """Give a part to every row that has none: with its group (patient) where that has one, else
    by `ratios`, stratified. Parts that the data set names stay (paper, 4.3), but a validation or
    test part that is missing or has no labels is taken from training, in the same ratios."""
    home = {row.group: row.split for row in images.rows if row.group and row.split}
    rows = [replace(row, split=row.split or home.get(row.group, "")) for row in images.rows]
    free, wanted = [i for i, row in enumerate(rows) if not row.split], dict(zip(PARTS, ratios))
    if not free:  # a part that is missing, or has no labels, is taken from training
        full = {row.split for row in (images.labelled(rows) if images.classes else rows)}
        wanted = {part: wanted[part] for part in PARTS if part == "train" or part not in full}
        free = [i for i, row in enumerate(rows) if row.split == "train" and len(wanted) > 1]
    parts, shares = list(wanted), np.array(list(wanted.values())) / sum(wanted.values())
    for i, part in zip(free, _stratify(images, [rows[i] for i in free], shares, seed)):
        rows[i] = replace(rows[i], split=parts[part])
    notes = list(images.notes)
    for part in PARTS:
        here = [row for row in rows if row.split == part]
        known = {label for row in here for label in row.labels}
        missing = [name for name in images.classes if name not in known]
        what = f"image of {', '.join(missing)}" if known or not here else "labels"
        notes += [f"the {part} part has no {what}"] * bool(missing)
        before = images.part(part)
        if known and before and not images.labelled(before):
            notes.append(f"the {part} part has no labels; training images are put into it")
    homes = {(row.group, row.split) for row in rows if row.group}
    several = [group for group, count in Counter(group for group, _ in homes).items() if count > 1]
    notes += such(sorted(several), "groups stand in several parts, as the data set has them")
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
    result = np.zeros(len(rows), int)
    for unit in sorted(order, key=lambda unit: (total[rarest[unit]], -counts[unit, -1])):
        wanted = lack[:, [rarest[unit], -1]].round(9).tolist()
        part = wanted.index(max(wanted))
        lack[part] -= counts[unit]
        result[members[unit]] = part
    return result.tolist()


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


FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")  # no number of ours begins so


def write_csv(file: Path, lines: Iterable[Iterable]) -> None:
    """Write CSV, whole or not at all. A text that a spreadsheet would run as a formula, or that
    begins with a ', gets a ' in front, which `read_split` takes away again."""
    from runtime import aside

    with aside(file) as new, open(new, "w", newline="", encoding="utf-8") as handle:
        for cells in lines:
            texts = map(str, cells)
            csv.writer(handle).writerow("'" * text.startswith(FORMULA) + text for text in texts)


def write_split(file: Path, images: ImageSet) -> None:
    """Write `split.csv`; fine-tuning reads it, so that no test image was ever seen."""
    table = [(row.path, row.split, "|".join(row.labels), row.group) for row in images.rows]
    write_csv(file, [("path", "split", "labels", "group"), *table])


def read_split(file: Path, images: ImageSet, grow: bool = False) -> ImageSet:
    """The rows that a `split.csv` and `images` share, in its order, with its parts. `grow` adds
    the other rows, without a part, for `split_images` to find them one."""
    _, table = read_table(file, strip=False)
    known, parts = {row.path: row for row in images.rows}, {}
    for number, line in table:
        cells = [line.get(name, "").removeprefix("'") for name in ("path", "split", "labels")]
        path, part, labels = cells
        where = f"{file} line {number}"
        require(path not in parts and part in PARTS,
                f"{where} names {path!r} twice, or in part {part!r}; known are {', '.join(PARTS)}")
        parts[path] = part
        now = "|".join(known[path].labels) if path in known else ""
        require(labels in ("", now) or not now,  # they may have been added or taken away
                f"{where}: {path} has other labels in {images.folder} now")
    rows = [replace(known[path], split=part) for path, part in parts.items() if path in known]
    require(parts and (rows or grow), f"{file} is empty or of another data set than the images")
    if not rows:
        note = f"{images.folder} holds no image of {file} and is split anew"
        return replace(images, notes=[*images.notes, note])
    for path in parts:
        require((images.folder / path).is_file(), f"{file} names {path!r}, which is not in "
                f"{images.folder}: the split is of another data set, or that one has changed")
    others = [row for row in images.rows if row.path not in parts]
    what = "get parts of their own" if grow else "are left out"
    notes = such([row.path for row in others], f"images that {file} does not name {what}")
    return replace(images, rows=rows + others * grow, notes=images.notes + notes)


# %% the command


def add_data_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """The options of every command that reads images."""
    from runtime import whole_number

    shares = _numbers(lambda v: len(v) == 3 and min(v) >= 0 < v[0] and abs(sum(v) - 1) < 1e-6,
                      "three shares that sum to 1, like 0.7,0.1,0.2")
    window = _numbers(lambda v: len(v) == 2 and v[0] < v[1],
                      "auto, image or LOW,HIGH like -160,240", "auto", "image")
    add = parser.add_argument
    add("--data", type=Path, required=required,
        help="folder of images; `python data.py --data DIR` shows how it is read")
    add("--ratios", type=shares, default=(0.7, 0.1, 0.2), metavar="T,V,T",
        help="shares of training, validation and test where the folder has no split of its own "
             "(paper: 0.7,0.1,0.2; its first version: 0.8,0.1,0.1)")
    add("--split-seed", type=whole_number, default=0, help="fixes the split (default: %(default)s)")
    add("--split-file", type=Path, metavar="FILE", help="take the parts from a split.csv, of a run "
        "or of extras.audit; images it does not name are left out")
    add("--window", type=window, default="auto", metavar="auto|image|LOW,HIGH",
        help="range of intensities in which images of more than 8 bits are shown; auto: one for "
             "all, of the training part; image: of each its own (paper: 8 bits)")
    add("--skip-bad", action="store_true", help="decode all images first, leave out damaged ones")


def _numbers(fine: Callable, what: str, *words: str) -> Callable[[str], str | tuple[float, ...]]:
    """An argparse type: one of `words`, or numbers with commas between that are `fine`."""
    def read(text: str) -> str | tuple[float, ...]:
        try:
            values = tuple(float(number) for number in text.split(","))
        except ValueError:
            values = ()
        if text not in words and not fine(values):
            raise argparse.ArgumentTypeError(f"{text} is not {what}")
        return values or text
    return read


def open_images(args: argparse.Namespace, before: Path | None = None) -> ImageSet:
    """Read and split the data set named by the options of `add_data_options`; without another
    --split-file, in the parts it had in the split.csv `before`."""
    images = read_images(args.data)
    if args.split_file:
        images = read_split(args.split_file, images)
    elif before:
        images = read_split(before, images, grow=True)
    if args.skip_bad:
        images = good_rows(images)
    images = split_images(images, seed=args.split_seed, ratios=args.ratios)
    return with_window(images, args.window)


def training_loader(args: argparse.Namespace, images: ImageSet,
                    transform: Callable) -> EpochLoader:
    """Whole batches of the training part, for pretraining."""
    rows = images.part("train")
    require(1 < args.batch_size <= len(rows), f"--batch-size {args.batch_size} does not lie "
            f"between 2 and the {len(rows)} training images of {args.data}")
    cache = args.cache and ImageCache(args.cache, args.image_size)
    return make_loader(ImageRows(images, rows, transform, args.seed, cache=cache), args.batch_size,
                       seed=args.seed, drop_last=True, workers=args.workers)


def begin_run(run: Any, images: ImageSet, networks: dict[str, Any], hardware: tuple) -> None:
    """Begin a `runtime.Run` of `build_model`'s networks on these images: its config.json and
    split.csv, and notes for the user. Raises `DataError` if it began with other images."""
    from runtime import SMALL_RUN

    split = run.folder / "split.csv"
    require(not run.resuming or read_split(split, images).rows == images.rows,
            f"the images in {images.folder} or their split have changed since {run.folder} began")
    device, precision = hardware
    run.begin(classes=images.classes, multi_label=images.multi_label, window=images.window,
              arms={name: network.arch for name, network in networks.items()},
              precision=str(precision))
    write_split(split, images)
    notes = [*images.notes, *(network.origin for network in networks.values())]
    notes.append(f"runs on {device} in {str(precision).removeprefix('torch.')}")
    if device.type == "cpu" and max(network.image_size for network in networks.values()) >= 384:
        notes.append(f"images of 384 pixels are a GPU's work, and no GPU is used: {SMALL_RUN}")
    for note in notes:
        print(textwrap.fill(f"note: {note}", 100, break_long_words=False, break_on_hyphens=False))


def describe(images: ImageSet) -> Iterator[str]:
    """Lines that tell what was found, for a person."""
    kind = "several labels" if images.multi_label else "one label"
    classes = f"{len(images.classes)} classes, {kind} an image" if images.classes else "no labels"
    groups = len({row.group for row in images.rows if row.group})
    yield (f"{images.folder}: {len(images.rows)} images, {classes}"
           + (f", {groups} groups" if groups else ""))
    parts = [*(images.part(part) for part in PARTS), images.rows]
    counts = np.array([images.truth(rows).sum(0) for rows in parts], int)
    table = [*zip(images.classes, counts.T.tolist()), ("images", map(len, parts))]
    if groups:
        table.append(("groups", [len({row.group for row in rows}) for rows in parts]))
    width = max(len(name) for name, _ in table)
    yield f"  {'':{width}} " + "".join(f"{part:>8}" for part in (*PARTS, "all"))
    for name, numbers in table:
        yield f"  {name:{width}} " + "".join(f"{number:8,}" for number in numbers)
    if images.window:
        yield "  window of the images of 16 bits or more: {:g} to {:g}".format(*images.window)
    seen = defaultdict(Counter)
    for row in images.rows[:: max(1, len(images.rows) // 500)]:
        for name, fact in facts(images.folder / row.path).items():
            seen[name][fact] += 1
    for name, count in seen.items():
        words = [f"{fact} ({n})" for fact, n in count.most_common(4)]
        yield f"  {name}: {', '.join(words)}{', ...' * (len(count) > 4)}"
    for row in images.rows[:: max(1, len(images.rows) // 3)][:3]:
        words = filter(None, (row.path, "|".join(row.labels), row.group, row.split))
        yield "  e.g. " + "  ".join(words)
    for note in images.notes:
        yield f"  note: {note}"


def main(argv: list[str] | None = None) -> None:
    from runtime import clear_exit, command_parser

    parser = command_parser("data.py", __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_data_options(parser)
    args = parser.parse_args(argv)
    with clear_exit(DataError):
        print("\n".join(describe(open_images(args))))


if __name__ == "__main__" and "__file__" in globals():
    main()
