"""Data sets as they come, turned once into the `labels.csv` that data.py reads.

    python -m extras.prepare --data ./ISIC_2019

Written is `DIR/labels.csv`; the images stay as they are. For folders that must not be written to,
--out takes another one, which gets a link to the images too. Known are:

- any table with a column of image names and one of labels, or a 0/1 column for each class, and
  perhaps patients and parts; names may lack their ending, or carry folders of another machine
- ISIC 2019: ISIC_2019_Training_GroundTruth.csv; groups are the lesions of the metadata beside it
- Dermofit:  CLASS/LESION/NAME.png, and beside each its NAMEmask.png, which is not used
- MedMNIST:  NAME.npz; its images are written as PNG into the folder NAME beside it, or --out
"""

import sys
from pathlib import Path

if not __package__:  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import csv
import re
import unicodedata
from collections import defaultdict
from dataclasses import replace

import numpy as np
from PIL import Image

from data import (PART_NAMES, PARTS, DataError, Row, describe, distinct_classes, find_images,
                  read_images, read_table, split_images)
from runtime import clear_exit, command_parser

ISIC, ISIC_FACTS = "ISIC_2019_Training_GroundTruth.csv", "ISIC_2019_Training_Metadata.csv"
# Names of columns by what they hold, the likeliest first, in lower case, with _ for blanks.
IMAGE = ("image", "image_name", "image_id", "image_index", "isic_id", "image_path", "path",
         "filepath", "file_path", "file_name", "filename", "file", "img", "name", "id")
LABEL = ("label", "labels", "diagnosis", "finding_labels", "dx", "target", "class", "category")
GROUP = ("group", "patient", "patient_id", "lesion", "lesion_id", "case", "case_id", "subject")
OTHER = ("", "index", "unnamed:_0", "sex", "gender", "age")  # never labels
YES, NO, UNCLEAR = {"1", "true"}, {"0", "false"}, {"", "?", "-1"}  # in the column of a class

# %% a table with image names and labels


def _cell(text: str) -> str:
    """1.0 and 1 are the same, and what says that nothing is known is a question mark."""
    unknown = text.lower() in ("na", "n/a", "nan", "null", "unknown")
    return "?" if unknown else re.sub(r"^(-?\d+)\.0+$", r"\1", text)


def _tails(path: str) -> list[str]:
    """A/b\\c.png becomes a/b/c.png, b/c.png, c.png; accents too are written in one way."""
    parts = unicodedata.normalize("NFC", path).lower().replace("\\", "/").split("/")
    return ["/".join(parts[i:]) for i in range(len(parts))]


def name_images(folder: Path) -> dict[str, list[str]]:
    """The images below a folder, under each name that a table may have for them."""
    named, paths = defaultdict(list), [row.path for row in find_images(folder).rows]
    for path in paths:
        for tail in _tails(path):
            named[tail].append(path)
            named[tail.rsplit(".", 1)[0]].append(path)  # without its ending
    return named | {path: [path] for path in paths}  # a whole path is clear


def choose_columns(file: Path, header: list[str], lines: list[dict[str, str]],
                   args: argparse.Namespace) -> tuple[str, list[str], str, str]:
    """The columns of image, labels (several: 0/1 columns), group, split; "" where there is none."""
    plain = {re.sub("[ -]", "_", name.lower()): name for name in reversed(header)}
    values = {name: {line[name].lower() for line in lines} for name in header}

    def known(names: tuple[str, ...]) -> list[str]:
        return [plain[name] for name in names if name in plain]

    image = args.image_column or next(iter(known(IMAGE)), "")
    group = args.group_column or next(iter(known(GROUP)), "")
    parts = [name for name in known(("split", "part")) if values[name] <= set(PART_NAMES)]
    others = [name for name in header if name not in (image, group, *parts, *known(OTHER))]
    binary = [name for name in others if values[name] & YES
              and values[name] <= YES | NO | UNCLEAR]
    labels = args.label_column or [name for name in known(LABEL) if name in others][:1]
    labels = labels or (others if len(others) == 1 else binary if len(binary) > 1 else ["label"])
    for name in (image or "image", *labels, group):
        if name and name not in header:
            raise DataError(f"{file} needs a column {name!r}, and its first line says "
                            f"{', '.join(header)}; choose with --image-column and --label-column")
    return image, labels, group, next(iter(parts), "")


def read_any_table(file: Path, args: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """Rows, and classes if each has a 0/1 column. Raises `DataError`, naming the line."""
    header, numbered = read_table(file)
    lines = [{name: _cell(cell) for name, cell in line.items()} for _, line in numbered]
    image, labels, group, split = choose_columns(file, header, lines, args)
    print(f"images from {image}, labels from {', '.join(labels)}, groups from {group or 'none'}")
    one_column = len(labels) == 1
    several = any(args.separator in line[labels[0]] for line in lines)
    named, rows, problems = name_images(args.data), {}, []
    for (number, _), line in zip(numbered, lines):
        names = [part.strip() for part in line[labels[0]].split(args.separator) if part.strip()]
        unclear = labels if "?" in names or not (names or several) else []
        if not one_column:
            names = [name for name in labels if line[name].lower() in YES]
            unclear = [name for name in labels if line[name].lower() not in YES | NO]
        keys = [key for key in (line[image], *_tails(line[image])) if key in named]
        paths = named[keys[0]] if keys else []
        if not paths:
            problem = f"names {line[image] or 'no image'}, which is not in {args.data}"
        elif len(paths) > 1:
            problem = f"names {line[image]}, which may mean {' or '.join(paths)}"
        elif paths[0] in rows:
            problem = f"names {paths[0]} a second time"
        elif unclear:
            problem = f"has no clear label for {paths[0]} in column {unclear[0]!r}"
        else:
            part = PART_NAMES[line[split].lower()] if split else ""
            patient = line[group].strip("?") if group else ""
            rows[paths[0]] = Row(paths[0], tuple(dict.fromkeys(names)), patient, part)
            continue
        problems.append(f"line {number} {problem}")
    if not rows or problems and not args.skip_missing:
        raise DataError(f"{file} {[*problems, 'has no rows'][0]}; {len(problems)} of {len(lines)} "
                        "lines are like that; --skip-missing leaves them out")
    print(f"lines left out: {len(problems)} of {len(lines)}", *problems[:1], sep="; ")
    return list(rows.values()), [] if one_column else labels


def add_lesions(rows: list[Row], facts: Path) -> list[Row]:
    """ISIC 2019: the lesion of each image, from the metadata, as its group."""
    if not facts.is_file():
        print(f"note: {facts} is not there: images of one lesion may come into two parts")
        return rows
    lesions = {line["image"]: line["lesion_id"] for _, line in read_table(facts)[1]}
    return [replace(row, group=lesions.get(Path(row.path).stem, "")) for row in rows]


# %% Dermofit and MedMNIST


def read_dermofit(folder: Path) -> list[Row]:
    """CLASS/LESION/NAME.png without NAMEmask.png; the lesion is the group. No masks: no rows."""
    stems = {row.path: row.path.rsplit(".", 1)[0].lower() for row in find_images(folder).rows}
    masks, rows = {f"{stem}mask" for stem in stems.values()} & set(stems.values()), []
    for path, stem in stems.items() if masks else ():
        *above, _ = path.split("/")
        if len(above) < 2:
            raise DataError(f"{folder / path} is not in a folder CLASS/LESION, as Dermofit's are")
        if stem not in masks:
            rows.append(Row(path, (above[-2],), "/".join(above)))
    return rows


def unpack_medmnist(file: Path, out: Path) -> tuple[list[Row], list[str]]:
    """Write the images of a MedMNIST file to OUT/PART/NUMBER.png; classes are numbers there."""
    rows, classes = [], []
    try:
        with np.load(file) as arrays:  # which runs no code in it
            for part in PARTS:
                images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
                if images.dtype != np.uint8 or labels.min() < 0 or len(images) != len(labels):
                    raise ValueError(f"its {part} part has no 8-bit images, or no label for each")
                (out / part).mkdir(parents=True, exist_ok=True)
                for i, (image, label) in enumerate(zip(images, labels)):
                    if label.size > 1:  # ChestMNIST: 0 or 1 for each class
                        classes = [f"{n:02d}" for n in range(label.size)]
                        label = np.flatnonzero(label)
                    names = tuple(f"{n:02d}" for n in label.flat)
                    rows.append(Row(f"{part}/{i:06d}.png", names, "", part))
                    Image.fromarray(image).save(out / rows[-1].path)
    except Exception as error:  # numpy and zipfile raise many kinds for damaged files
        raise DataError(f"{file} can't be unpacked as a MedMNIST file: {error}") from None
    return rows, classes


# %% the command


def write_labels(file: Path, rows: list[Row], classes: list[str]) -> None:
    """Write labels.csv, with groups (an image without any is one of its own) and parts if known."""
    distinct_classes(classes or sorted({name for row in rows for name in row.labels}))
    columns = [name for name in ("group", "split") if any(getattr(row, name) for row in rows)]
    table = [["image", *(classes or ["label"]), *columns]]
    for row in rows:
        labels = [int(name in row.labels) for name in classes] or ["|".join(row.labels)]
        table.append([row.path, *labels, *(getattr(row, name) or row.path for name in columns)])
    with open(file, "w", newline="", encoding="utf-8") as handle:
        csv.writer(handle, lineterminator="\n").writerows(table)


def find_source(folder: Path, table: Path | None) -> Path | None:
    """The one file that tells the labels, a table or an .npz; None if the folders do."""
    if table or folder.is_file():
        return table or folder
    found = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".csv", ".npz")
             and path != folder / "labels.csv" and "/." not in f"/{path.relative_to(folder)}"]
    found = [path for path in found if path.name == ISIC] or found
    if len(found) > 1:
        raise DataError(f"{found[0]} and {found[1]} may both tell the labels; choose with --table")
    return found[0] if found else None


def run_prepare(args: argparse.Namespace) -> None:
    """Find what tells the labels, write labels.csv, and show how it is read."""
    source, folder = find_source(args.data, args.table), args.data.resolve()
    packed = source is not None and source.suffix.lower() == ".npz"
    out = args.out or (source.with_suffix("") if packed else args.data)
    file = out / "labels.csv"
    if file.exists() and (source == file or not args.overwrite):
        raise DataError(f"{file} is there already: give it another name, or add --overwrite")
    if packed:
        rows, classes = unpack_medmnist(source, out)
    elif source:
        rows, classes = read_any_table(source, args)
        if source.name == ISIC:
            rows = add_lesions(rows, source.with_name(ISIC_FACTS))
    else:
        rows, classes = read_dermofit(args.data), []
    if rows and not packed and out.resolve() != folder:
        out.mkdir(parents=True, exist_ok=True)
        if (out / folder.name).resolve() != folder:
            (out / folder.name).symlink_to(folder, target_is_directory=True)
        rows = [replace(row, path=f"{folder.name}/{row.path}") for row in rows]
    if rows:
        write_labels(file, rows, classes)
    print(f"wrote {file}" if rows else "folders tell the labels: nothing to do")
    images = read_images(out if rows else args.data)
    print("so it is read:", *describe(split_images(images)), sep="\n")


def main(argv: list[str] | None = None) -> None:
    parser = command_parser("python -m extras.prepare", "Write labels.csv for other data sets.")
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of the data set, or a MedMNIST file .npz")
    add("--table", type=Path, help="the CSV with the labels, where there are several")
    add("--image-column", metavar="NAME", help="column of the table (default: by its name)")
    add("--label-column", metavar="NAME", action="append", help="several: 0/1 columns of classes")
    add("--group-column", metavar="NAME", help="such as the patient (default: by its name)")
    add("--separator", default="|", help="between several labels in a cell (default: %(default)s)")
    add("--skip-missing", action="store_true", help="leave out lines without image or clear label")
    add("--out", type=Path, help="folder for labels.csv (default: --data; MedMNIST: NAME)")
    add("--overwrite", action="store_true", help="write labels.csv though there is one")
    with clear_exit(DataError):
        run_prepare(parser.parse_args(argv))


if __name__ == "__main__" and "__file__" in globals():
    main()
