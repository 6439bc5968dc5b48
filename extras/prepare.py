"""Data sets as they come, turned once into the `labels.csv` that data.py reads.

    python -m extras.prepare --data ./ISIC_2019

Written is `DIR/labels.csv` and nothing else; the images stay where they are and as they are. Known are:

- `isic2019`: ISIC_2019_Training_GroundTruth.csv, and as groups the lesions of the metadata CSV beside it
- `dermofit`: CLASS/LESION/NAME.png, beside each its NAMEmask.png, which is no image of a lesion
- `csv`:      any table with a column of image names and a column of labels, or one 0/1 column for each class, and
              perhaps patients and parts: the notebooks' `image_name,diagnosis` and `path,target`, the autoimmune slides
- `medmnist`: NAME.npz; its images are written as PNG, with its own split, into the folder NAME or --out
- `folders`:  class folders and split folders, such as brain tumour MRI, need nothing

Image names may lack their ending, or carry folders of another machine: the file that shares most of the path is meant.
"""

import argparse
import csv
import os
import unicodedata
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from data import (ENDINGS, PART_NAMES, PARTS, DataError, Row, describe, distinct_classes, find_images, read_images, read_table,
                  split_images)
from runtime import Options, clear_exit

ISIC, ISIC_FACTS = "ISIC_2019_Training_GroundTruth.csv", "ISIC_2019_Training_Metadata.csv"
# Column names by what they hold, the likeliest first; compared in lower case, with _ for blanks and hyphens.
IMAGE = ("image", "image_name", "image_id", "image_index", "isic_id", "image_path", "path", "filepath", "file_path",
         "file_name", "filename", "file", "img", "name", "id")
LABEL = ("label", "labels", "diagnosis", "finding_labels", "dx", "target", "class", "category")
GROUP = ("group", "patient", "patient_id", "lesion", "lesion_id", "case", "case_id", "subject", "subject_id")
SPLIT = ("split", "part", "set", "subset")


class Table(NamedTuple):
    """What labels.csv will hold, and sentences for the user."""
    rows: list[Row]
    classes: list[str] | None  # one 0/1 column for each; None: one column, several labels joined by |
    notes: list[str]


# %% a table with image names and labels


class Files:
    """The images below a folder, to be found by whatever name a table has for them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.paths = folder, {row.path for row in find_images(folder).rows}
        self.named: dict[str, list[str]] = {}
        self.guessed: dict[str, str] = {}  # names in folders that share none with the file they were taken to mean
        for path in sorted(self.paths):
            name = _plain(path).split("/")[-1]
            for key in {name, name.rsplit(".", 1)[0]}:  # with its ending, and without
                self.named.setdefault(key, []).append(path)

    def find(self, name: str) -> str | None:
        """The path of the one image that `name` means, or None. Raises `DataError` if it may mean several."""
        if name in self.paths:
            return name
        parts = _plain(name).split("/")
        shared = {path: len(os.path.commonprefix([_plain(path).split("/")[::-1][1:], parts[::-1][1:]]))
                  for path in self.named.get(parts[-1], [])}  # folders in common, from the image upwards
        best = sorted(shared, key=shared.get, reverse=True)[:2]  # stable: equal ones in the order of their paths
        if len(best) == 2 and shared[best[0]] == shared[best[1]]:
            raise DataError(f"{name} may mean {best[0]} or {best[1]}; write the path")
        if best and len(parts) > 1 and not shared[best[0]]:
            self.guessed[name] = best[0]
        return best[0] if best else None


def _plain(text: str) -> str:
    """Lower case, one kind of slash, and accents written in one way: a Mac writes them in another."""
    return unicodedata.normalize("NFC", text).lower().replace("\\", "/")


def _column(header: list[str], known: tuple[str, ...], asked: str | None = None) -> str | None:
    """The column that was asked for, or else the likeliest of the `known` ones."""
    if asked is not None and asked not in header:
        raise DataError(f"there is no column {asked!r} in the table; it has {', '.join(header)}")
    plain = {name.lower().replace(" ", "_").replace("-", "_"): name for name in reversed(header)}
    return asked or next((plain[name] for name in known if name in plain), None)


def choose_columns(file: Path, header: list[str], lines: list[tuple[int, dict[str, str]]], files: Files,
                   options: argparse.Namespace) -> tuple[tuple[str | None, ...], list[str], list[str]]:
    """The columns of image, label, group and split, by their names and cells; if there is none with the label, the 0/1
    columns of the classes; and sentences that say so. Raises `DataError`."""
    values = {name: {line[name] for _, line in lines} for name in header}
    full = [name for name in header if all(v.lower().endswith(ENDINGS) for v in values[name])]  # file names, endings and all
    image = options.image_column and _column(header, IMAGE, options.image_column) or _column(full, IMAGE) or (
        full[0] if full else _column(header, IMAGE)) or next(  # of any name, if it names images
            (name for name in header if any(map(files.find, sorted(values[name])[:9]))), None)
    if image is None:
        raise DataError(f"no column of {file} names images in {files.folder}; it has {', '.join(header)}; choose one "
                        "with --image-column")
    group, split = _column(header, GROUP, options.group_column), _column(header, SPLIT)
    split = split if split and {value.lower() for value in values[split]} <= set(PART_NAMES) else None
    others = [name for name in header if name not in (image, group, split, "", "index", "Unnamed: 0")]
    label = _column(others, LABEL, options.label_column)
    binary = [name for name in others if values[name] <= {"0", "1", "0.0", "1.0", ""}] * (label is None)
    if label is None and len(binary) < 2:
        if len(others) != 1:
            raise DataError(f"{file} has no column of labels known by its name, nor a 0/1 column for each class; it "
                            f"has {', '.join(header)}; choose one with --label-column")
        label, binary = others[0], []
    classes = [name for name in binary if values[name] & {"1", "1.0"}]
    used = {"images": image, "labels": label or f"{len(classes)} 0/1 columns", "groups": group, "parts": split}
    notes = ["columns used: " + ", ".join(f"{what} from {name}" for what, name in used.items() if name)]
    for what, names in (("columns not used: ", [name for name in others if name != label and name not in binary]),
                        ("no image of ", [name for name in binary if name not in classes])):  # such as ISIC's UNK
        notes += [what + ", ".join(names)] if names else []
    if blank := [(number, name) for number, line in lines for name in classes if not line[name]]:
        raise DataError(f"{file} line {blank[0][0]} has nothing in column {blank[0][1]!r}; it must be 0 or 1")
    return (image, label, group, split), classes, notes


def read_any_table(folder: Path, file: Path, options: argparse.Namespace) -> Table:
    """Rows from a table of another form than labels.csv's. Raises `DataError`, naming the line."""
    header, lines = read_table(file)
    if not lines:
        raise DataError(f"{file} has no rows below its first line")
    files = Files(folder)
    (image, label, group, split), classes, notes = choose_columns(file, header, lines, files, options)
    rows, numbers, missing = {}, {}, []
    for number, line in lines:
        try:
            path = files.find(line[image])
        except DataError as error:
            raise DataError(f"{file} line {number}: {error}") from None
        if path is None:
            missing.append(f"{file} line {number} names {line[image] or 'no image'}, which is not in {folder}")
            continue
        if path in rows:
            raise DataError(f"{file} lines {numbers[path]} and {number} both name {path}; keep one of them")
        labels = line[label].split(options.separator) if label else [c for c in classes if line[c] in ("1", "1.0")]
        labels = tuple(dict.fromkeys(name.strip() for name in labels if name.strip()))
        numbers[path] = number
        rows[path] = Row(path, labels, line[group] if group else "", PART_NAMES[line[split].lower()] if split else "")
    if missing and not (options.skip_missing and rows):
        raise DataError(f"{missing[0]} ({len(missing)} of {len(lines)} are not); --skip-missing would leave them out")
    several = any(len(row.labels) > 1 for row in rows.values())  # then an empty cell means none of them
    if label and not several and (bare := [row.path for row in rows.values() if not row.labels]):
        raise DataError(f"{file} line {numbers[bare[0]]} has no label for {bare[0]}")
    if files.guessed:
        name, path = next(iter(files.guessed.items()))
        notes.append(f"{len(files.guessed)} names share no folder with the file taken for them, such as {name}: {path}")
    notes += [f"left out {len(missing)} images that are not there"] * bool(missing)
    if unnamed := len(files.paths) - len(rows):
        notes.append(f"{unnamed} images in {folder} are in no line of {file.name}, and not used")
    return Table(list(rows.values()), None if label else classes, notes)


def read_isic(folder: Path, file: Path, options: argparse.Namespace) -> Table:
    """ISIC 2019: the ground truth, and the lesion of each image as its group, where the metadata name it."""
    table, facts = read_any_table(folder, file, options), file.with_name(ISIC_FACTS)
    if not facts.is_file():
        table.notes.append(f"{facts.name} is not there: no lesions known, images of one may come into several parts")
        return table
    header, lines = read_table(facts)
    image, lesion = (_column(header, (), name) for name in ("image", "lesion_id"))
    lesions = {line[image]: line[lesion] for _, line in lines}
    known = sum(bool(lesions.get(Path(row.path).stem)) for row in table.rows)
    table.notes.append(f"groups from 'lesion_id' of {facts.name}, which names those of {known} of {len(table.rows)} images")
    return table._replace(rows=[Row(r.path, r.labels, lesions.get(Path(r.path).stem, "")) for r in table.rows])


# %% Dermofit and MedMNIST


def read_dermofit(folder: Path) -> Table:
    """CLASS/LESION/NAME.png without NAMEmask.png; the lesion is the group."""
    paths = [row.path for row in find_images(folder).rows]
    lesions = [path.split("/") for path in paths if not Path(path).stem.lower().endswith("mask")]
    if not lesions or len(shortest := min(lesions, key=len)) < 3:
        raise DataError(f"{folder} holds masks only" if not lesions else
                        f"{folder / '/'.join(shortest)} is not in a folder CLASS/LESION, as Dermofit's images are")
    rows = [Row("/".join(parts), (parts[-3],), "/".join(parts[:-1])) for parts in lesions]
    return Table(rows, None, [f"left out {len(paths) - len(rows)} masks"])


def _read_npy(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], Iterator[np.ndarray]]:
    """Shape of one array in an .npz, and its items one by one, so that memory does not grow with it."""
    handle = archive.open(f"{name}.npy")
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, fortran, dtype = read_header[np.lib.format.read_magic(handle)](handle)
    if fortran and len(shape) > 1 or dtype.kind not in "uib" or name.endswith("_images") and dtype != np.uint8:  # objects would have to be unpickled: never
        raise ValueError(f"{name} is no plain array of whole numbers" + " from 0 to 255" * name.endswith("_images"))
    size = int(np.prod(shape[1:])) * dtype.itemsize
    return shape, (np.frombuffer(handle.read(size), dtype).reshape(shape[1:]) for _ in range(shape[0]))


def unpack_medmnist(file: Path, out: Path) -> Table:
    """Write the images of a MedMNIST file to OUT/PART/NUMBER.png. Raises `DataError`."""
    try:
        with zipfile.ZipFile(file) as archive:
            return _unpack(archive, out)
    except (KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{file} can't be read as a MedMNIST file: {error}") from None


def _unpack(archive: zipfile.ZipFile, out: Path) -> Table:
    parts = [part for part in PARTS if f"{part}_images.npy" in archive.namelist()]
    if not parts:
        raise ValueError("it holds no train_images, val_images or test_images")
    if damaged := archive.testzip():  # before anything is written
        raise ValueError(f"{damaged} in it is damaged")
    rows, names = [], None
    if min(int(label.min()) for part in parts for label in _read_npy(archive, f"{part}_labels")[1]) < 0:
        raise ValueError("it has labels below 0")
    top = max(int(label.max()) for part in parts for label in _read_npy(archive, f"{part}_labels")[1])
    for part in parts:
        (shape, images), (wide, labels) = (_read_npy(archive, f"{part}_{what}") for what in ("images", "labels"))
        if len(shape) not in (3, 4) or len(shape) == 4 and shape[3] != 3 or len(wide) not in (1, 2):
            raise ValueError(f"its {part} part has arrays {' x '.join(map(str, shape[1:]))}, not flat images")
        if shape[0] != wide[0]:
            raise ValueError(f"its {part} part has {shape[0]} images and {wide[0]} labels")
        several = len(wide) == 2 and wide[1] > 1  # ChestMNIST: one 0/1 for each class
        count = wide[1] if several else top + 1
        numbers = [f"{i:0{len(str(count - 1))}d}" for i in range(count)]  # equally long, so that they sort well
        names = numbers if several else None
        (out / part).mkdir(parents=True, exist_ok=True)
        for i, (image, label) in enumerate(zip(tqdm(images, part, shape[0], unit="image", disable=None), labels)):
            path = f"{part}/{i:06d}.png"
            Image.fromarray(image.astype(np.uint8)).save(out / path)
            one = tuple(n for n, on in zip(numbers, label) if on) if several else (numbers[int(label.max())],)
            rows.append(Row(path, one, "", part))
    return Table(rows, names, ["classes are numbers in such files; their names are on medmnist.com"])


# %% the command


def write_labels(folder: Path, table: Table) -> Path:
    """Write labels.csv: groups where one has several images (an image without any is one of its own), parts if known."""
    if table.classes and len(table.classes) == 1:  # a lone 0/1 column would be read as labels called 0 and 1
        if bare := [row.path for row in table.rows if not row.labels]:
            raise DataError(f"{table.classes[0]} is the only class in use, and {bare[0]} has none; nothing can be told apart")
        table = table._replace(classes=None)
    grouped = max(Counter(row.group for row in table.rows if row.group).values(), default=0) > 1
    parted, several = bool(table.rows[0].split), any(len(row.labels) > 1 for row in table.rows)
    aside, file = folder / "labels.csv.tmp", folder / "labels.csv"
    with open(aside, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["image", *(table.classes or ["labels" if several else "label"]), *["group"] * grouped,
                         *["split"] * parted])
        for row in table.rows:
            cells = [int(c in row.labels) for c in table.classes] if table.classes else ["|".join(row.labels)]
            writer.writerow([row.path, *cells, *[row.group or row.path] * grouped, *[row.split] * parted])
    os.replace(aside, file)
    return file


def guess_kind(folder: Path, table: Path | None) -> tuple[str, Path | None, str]:
    """The kind of data set, the file that tells its labels, and by what it was known. Raises `DataError`."""
    if table and table.name == ISIC:
        return "isic2019", table, table.name
    if table or folder.is_file() and folder.suffix.lower() == ".npz":
        return "csv" if table else "medmnist", table or folder, (table or folder).name
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; --data names the folder that holds the images")
    seen = sorted(p for p in folder.rglob("*") if not any(x.startswith(".") for x in p.relative_to(folder).parts))
    for kind, found in (("isic2019", [p for p in seen if p.name == ISIC]),
                        ("medmnist", [p for p in seen if p.suffix.lower() == ".npz"]),
                        ("csv", [p for p in seen if p.suffix.lower() == ".csv" and p != folder / "labels.csv"])):
        if len(found) > 1:
            raise DataError(f"{found[0]} and {found[1]} may both tell the labels; choose one with --table or --data")
        if found:
            return kind, found[0], found[0].name
    stems = {str(p.with_suffix("")).lower(): p.name for p in seen}
    masks = [name for stem, name in stems.items() if f"{stem}mask" in stems]
    return ("dermofit", None, f"a mask of {masks[0]}") if masks else ("folders", None, "no table, no mask: nothing to do")


def run_prepare(args: argparse.Namespace) -> None:
    """Guess, read, write labels.csv, and show how it is read."""
    plain = args.kind in ("dermofit", "folders")  # these need no table
    kind, file, why = (args.kind, None, "") if plain else guess_kind(args.data, args.table)
    print(f"kind: {args.kind}" if args.kind else f"kind: {kind} (there is {why})")
    kind = args.kind or kind
    if kind not in ("dermofit", "folders") and file is None:
        raise DataError(f"{args.data} holds no file that tells the labels; name it with --table")
    folder = args.out or file.with_suffix("") if kind == "medmnist" else args.data
    if kind != "folders":
        if (folder / "labels.csv").exists() and not args.overwrite:
            raise DataError(f"{folder / 'labels.csv'} is there already; --overwrite writes it anew")
        if file == folder / "labels.csv":
            raise DataError(f"{file} is where the new table goes; give the old one another name first")
        table = (read_dermofit(folder) if kind == "dermofit" else unpack_medmnist(file, folder) if kind == "medmnist"
                 else read_isic(folder, file, args) if kind == "isic2019" else read_any_table(folder, file, args))
        distinct_classes(table.classes or sorted({label for row in table.rows for label in row.labels}))
        print("".join(f"  note: {note}\n" for note in table.notes) + f"wrote {write_labels(folder, table)}")
    print("so it is read:", *describe(split_images(read_images(folder))), sep="\n")


def main(argv: list[str] | None = None) -> None:
    parser = Options("python -m extras.prepare", "Write a labels.csv for a data set that has another form.")
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of the data set, or a MedMNIST file NAME.npz")
    add("--kind", choices=("isic2019", "dermofit", "csv", "medmnist", "folders"), help="form of the data set (default: guessed)")
    add("--table", type=Path, metavar="FILE", help="the CSV with the labels, where there are several")
    for what, known in (("image", IMAGE), ("label", LABEL), ("group", GROUP)):
        add(f"--{what}-column", metavar="NAME", help=f"column of the table (default: the first of {', '.join(known)})")
    add("--separator", default="|", help="what stands between several labels in one cell (default: %(default)s)")
    add("--skip-missing", action="store_true", help="leave out, and count, lines whose image is not there")
    add("--out", type=Path, help="folder for the images of a MedMNIST file (default: NAME beside it)")
    add("--overwrite", action="store_true", help="write labels.csv though there is one")
    with clear_exit(DataError):
        run_prepare(parser.parse_args(argv))


if __name__ == "__main__" and "__file__" in globals():
    main()
