"""Data sets as they come, turned once into the `labels.csv` that data.py reads.

    python -m extras.prepare --data ./ISIC_2019

Written is `DIR/labels.csv`; the images stay as they are. Where DIR must not be written to, --out
names a folder that gets the table, and a link to DIR beside it. Known are:

- any table with a column of image names and one of labels, or a 0/1 column for each class, and
  perhaps patients and parts; names may lack their ending, or carry folders of another machine
- ISIC 2019: ISIC_2019_Training_GroundTruth.csv; groups are the lesions of the metadata beside it
- Dermofit:  CLASS/LESION/NAME.png, and beside each its NAMEmask.png, which is not used
- MedMNIST:  NAME.npz; its images are written as PNG into the folder NAME beside it, or --out
"""

import argparse
import csv
import re
import sys
import unicodedata
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # if it is run by its path

from data import (NO, PART_NAMES, PARTS, UNKNOWN, YES, DataError, describe, find_images,
                  read_images, read_table, require, split_images)
from runtime import aside, clear_exit, command_parser

Table = list[list]  # the lines of a labels.csv; the first holds the names of its columns
ISIC, ISIC_FACTS = "ISIC_2019_Training_GroundTruth.csv", "ISIC_2019_Training_Metadata.csv"
# Names of columns by what they hold, the likeliest first, in lower case and without blanks and _.
IMAGE = ("image", "imagename", "imageid", "imageindex", "isicid", "imagepath", "path", "filepath",
         "filename", "file", "img", "name", "id", "idcode")
LABEL = ("label", "labels", "diagnosis", "finding", "findinglabels", "dx", "target", "class",
         "category")
GROUP = ("group", "patient", "patientid", "lesion", "lesionid", "case", "caseid", "subject",
         "subjectid")
OTHER = ("index", "sex", "gender", "age")  # never labels
UNCLEAR = {*UNKNOWN, ""}

# %% a table with image names and labels


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
    plain = {re.sub("[ _-]", "", name.lower()): name for name in reversed(header)}
    values = {name: {line[name].lower() for line in lines} for name in header}

    def first(names: tuple[str, ...]) -> str:
        return next((plain[name] for name in names if name in plain), "")

    image, group = args.image_column or first(IMAGE), args.group_column or first(GROUP)
    split = first(("split", "part"))
    split = split if split and values[split] <= set(PART_NAMES) else ""
    used = (image, group, split, *map(plain.get, OTHER))
    binary = [name for name in header if name not in used and values[name] & {*YES}
              and values[name] <= {*YES, *NO, *UNCLEAR}]
    labels = args.label_column or [first(LABEL)]
    labels = binary if labels == [""] and len(binary) > 1 else labels
    for name in (image, *labels, *([group] if group else [])):
        require(name in header, f"{file} needs a column "
                f"{name or 'of images and one of labels'!r}, and its first line says "
                f"{', '.join(header)}; choose with --image-column and --label-column")
    return image, labels, group, split


def convert_table(file: Path, args: argparse.Namespace) -> Table:
    """Any table with image names and labels as a labels.csv. Raises `DataError`."""
    header, lines = read_table(file)
    lines = [(number, {name: re.sub(r"^(\d+)\.0$", r"\1", cell) for name, cell in line.items()})
             for number, line in lines]  # 1.0 and 1 are one class, and one patient
    image, labels, group, split = choose_columns(file, header, [line for _, line in lines], args)
    print(f"images from {image}, labels from {', '.join(labels)}, groups from {group or 'none'}")
    several = any("|" in line[labels[0]] for _, line in lines)  # then an empty cell is an answer
    unclear = UNCLEAR - {""} if several else UNCLEAR
    names = ["label"] if len(labels) == 1 else labels
    first = ["image", *names, *["group"] * bool(group), *["split"] * bool(split)]
    named, rows, problems = name_images(args.data), {}, []
    for number, line in lines:
        keys = [key for key in (line[image], *_tails(line[image])) if key in named]
        paths = named[keys[0]] if keys else []
        doubtful = [name for name in labels if line[name].lower() in unclear]
        if len(paths) != 1:
            meant = f"may mean {' or '.join(paths)}" if paths else f"is not in {args.data}"
            problems.append(f"line {number} names {line[image] or 'no image'}, which {meant}")
        elif doubtful:
            problems.append(f"line {number} has no clear label in column {doubtful[0]!r}")
        elif paths[0] in rows:
            problems.append(f"line {number} names {paths[0]} a second time")
        else:
            cells = rows[paths[0]] = [*paths, *(line[name] for name in labels)]
            if group:  # an image without a patient is a group of its own
                cells.append(paths[0] if line[group].lower() in UNCLEAR else line[group])
            if split:
                cells.append(line[split])
    require(rows and (args.skip_missing or not problems),
            f"{file} {[*problems, 'has no rows'][0]}; {len(problems)} of {len(lines)} lines are "
            "like that; --skip-missing leaves them out")
    print(f"lines left out: {len(problems)} of {len(lines)}", *problems[:1], sep="; ")
    return [first, *rows.values()]


def add_lesions(table: Table, facts: Path) -> None:
    """ISIC 2019: the lesion of each image, from the metadata, as its group."""
    if not facts.is_file():
        print(f"note: {facts} is not there: images of one lesion may come into two parts")
        return
    lesions = {line["image"]: line["lesion_id"] for _, line in read_table(facts)[1]}
    table[0].append("group")
    for line in table[1:]:
        line.append(lesions.get(Path(line[0]).stem) or line[0])


# %% Dermofit and MedMNIST


def list_dermofit(folder: Path) -> Table:
    """CLASS/LESION/NAME.png without NAMEmask.png; the lesion is the group. No masks: no table."""
    stems = {row.path: row.path.rsplit(".", 1)[0].lower() for row in find_images(folder).rows}
    masks = {f"{stem}mask" for stem in stems.values()} & set(stems.values())
    table = [["image", "label", "group"]]
    for path, stem in stems.items():
        *above, _ = path.split("/")
        require(len(above) > 1 or not masks,
                f"{folder / path} is not in a folder CLASS/LESION, as Dermofit's are")
        if masks and stem not in masks:
            table.append([path, above[-2], "/".join(above)])
    return table if masks else []


def unpack_part(images: np.ndarray, labels: np.ndarray, out: Path) -> Table:
    """Write the images of a part as OUT/NUMBER.png; its lines of the table."""
    if images.dtype != np.uint8 or labels.min() < 0 or len(images) != len(labels):
        raise ValueError(f"its {out.name} part has no 8-bit images, or no label for each")
    out.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(out / f"{i:06d}.png")
    return [[f"{out.name}/{i:06d}.png", *label, out.name]
            for i, label in enumerate(labels.reshape(len(labels), -1).tolist())]


def unpack_medmnist(file: Path, out: Path) -> Table:
    """Write the images of a MedMNIST file to OUT/PART; one part at a time is in memory."""
    table = []
    try:
        with zipfile.ZipFile(file) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > 300 * file.stat().st_size:
                raise ValueError("it unpacks to more than 300 times its size")
        with np.load(file) as arrays:  # which runs no code in it
            for part in PARTS:
                labels = arrays[f"{part}_labels"]
                table += unpack_part(arrays[f"{part}_images"], labels, out / part)
    except Exception as error:  # numpy and zipfile raise many kinds for damaged files
        raise DataError(f"{file} can't be unpacked as a MedMNIST file: {error}") from None
    classes = len(table[0]) - 2
    return [["image", *(range(classes) if classes > 1 else ["label"]), "split"], *table]


# %% the command


def find_source(folder: Path) -> Path | None:
    """The one file that tells the labels, a table or an .npz; None if the folders do."""
    if folder.is_file():
        return folder
    found = [path for path in sorted(folder.glob("*")) if path.suffix.lower() in (".csv", ".npz")
             and path.name != "labels.csv"]
    found = [path for path in found if path.name == ISIC] or found
    names = " and ".join(map(str, found[:2]))
    require(len(found) < 2, f"{names} may both tell the labels; choose with --table")
    return found[0] if found else None


def link_images(folder: Path, out: Path) -> Path:
    """Make `out`, which holds the images of `folder` through a link."""
    folder, link = folder.resolve(strict=True), out / folder.resolve().name
    out.mkdir(parents=True, exist_ok=True)
    if link.resolve() != folder:
        link.symlink_to(folder, target_is_directory=True)
    return out


def run_prepare(args: argparse.Namespace) -> None:
    """Find what tells the labels, write labels.csv, and show how it is read."""
    source = args.table or find_source(args.data)
    packed = source is not None and source.suffix.lower() == ".npz"
    out = args.out or (source.with_suffix("") if packed else args.data)
    file = out / "labels.csv"
    require(not file.exists(), f"{file} is there already; give it another name, and name it with "
            "--table if it is the table to read")
    if packed:
        table = unpack_medmnist(source, out)
    else:
        args.data = link_images(args.data, args.out) if args.out else args.data
        table = convert_table(source, args) if source else list_dermofit(args.data)
    if source and source.name == ISIC:
        add_lesions(table, source.with_name(ISIC_FACTS))
    try:
        if table:
            with aside(file) as new, open(new, "w", newline="", encoding="utf-8") as handle:
                csv.writer(handle, lineterminator="\n").writerows(table)
    except OSError as error:
        why = error.strerror or error
        raise DataError(f"{file} can't be written ({why}); --out names another folder") from None
    print(f"wrote {file}" if table else "folders tell the labels: nothing to do")
    try:
        print("so it is read:", *describe(split_images(read_images(out))), sep="\n")
    except DataError:
        file.unlink(missing_ok=True)
        raise


def main(argv: list[str] | None = None) -> None:
    parser = command_parser("python -m extras.prepare", "Write labels.csv for other data sets.")
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of the data set, or a MedMNIST file .npz")
    add("--table", type=Path, help="the CSV with the labels, where there are several")
    add("--image-column", metavar="NAME", help="column of the table (default: by its name)")
    add("--label-column", metavar="NAME", action="append", help="several: 0/1 columns of classes")
    add("--group-column", metavar="NAME", help="such as the patient (default: by its name)")
    add("--skip-missing", action="store_true", help="leave out lines without image or clear label")
    add("--out", type=Path, help="folder for the table, or for MedMNIST's images (default: "
        "the folder of the images, or one named like the file)")
    with clear_exit(DataError):
        run_prepare(parser.parse_args(argv))


if __name__ == "__main__" and "__file__" in globals():
    main()
