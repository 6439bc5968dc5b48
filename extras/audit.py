"""Look for what spoils a result before anything is trained: leaks, duplicates, damage.

    python -m extras.audit --data ./brain-mri --write-split

Every image is decoded once. --out gets `audit.json` with every file, `pairs.png` with the worst
pairs, and with --write-split a `split.csv` for --split-file without the test images that leak.

Near duplicates: the signs of the lowest 63 waves of a 32 x 32 grey copy (pHash) differ in at most
--near places, and the copies correlate by 0.98. That finds what was saved anew, resized or given
other contrast, and neighbouring slices of one patient; not what was cropped or mirrored.
"""

import argparse
import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # if it is run by its path

from data import (PARTS, DataError, ImageSet, Row, add_data_options, describe, load_image,
                  open_images, write_split)
from extras.pictures import grid, words
from runtime import clear_exit, command_parser, write_text

# A cosine transform: the lowest 8 waves (rows) over 32 pixels (columns).
WAVES = np.cos(np.pi * np.outer(np.arange(8), 2 * np.arange(32) + 1) / 64).astype(np.float32)
BITS, LIKENESS = 63, 0.98


class Look(NamedTuple):
    """What is kept of one image."""
    digest: bytes  # of its pixels
    signs: np.ndarray  # (63,) bool, of its lowest waves
    copy: np.ndarray  # (32, 32) uint8, grey
    flat: bool  # one colour everywhere


class Group(NamedTuple):
    """Rows that show the same, or nearly the same."""
    title: str
    rows: list[Row]

    def differ(self, column: str) -> bool:
        return len({getattr(row, column) for row in self.rows}) > 1

    def paths(self, part: str = "") -> list[str]:
        return [row.path for row in self.rows if row.split == part or not part]


# %% looking


def look_at(images: ImageSet, row: Row) -> Look | str:
    """Decode one image, as training would; a sentence if that fails."""
    try:
        image = load_image(images.folder / row.path, images.window)
    except DataError as error:
        return str(error)
    digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
    copy = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BILINEAR))
    waves = (WAVES @ copy.astype(np.float32) @ WAVES.T).ravel()[1:]  # the first is the brightness
    flat = all(low == high for low, high in image.getextrema())
    return Look(digest, waves > np.median(waves), copy, flat)


def near_pairs(signs: np.ndarray, copies: np.ndarray, limit: int) -> Iterator[tuple]:
    """(a, b, distance, likeness) of all pairs whose signs `(N, 63)` differ in at most `limit`
    places and whose copies `(N, 32, 32)` correlate. Signs written as +-1 have the product
    63 - 2 * distance, so one matrix product compares many pairs at once."""
    signs = signs.astype(np.float32) * 2 - 1
    copies = copies.reshape(len(copies), -1).astype(np.float32)
    copies -= copies.mean(1, keepdims=True)
    copies /= np.linalg.norm(copies, axis=1, keepdims=True).clip(1e-6)  # flat ones: like nothing
    for begin in range(0, len(signs), 512):
        product = signs[begin:begin + 512] @ signs[begin:].T
        for i, j in np.argwhere(np.triu(product >= BITS - 2 * limit, 1)):
            likeness = float(copies[begin + i] @ copies[begin + j])
            if likeness >= LIKENESS:
                yield int(begin + i), int(begin + j), int(BITS - product[i, j]) // 2, likeness


def find_alike(looks: dict[Row, Look], limit: int) -> tuple[list[Group], list[Group]]:
    """The sets of equal pixels, and the pairs of near duplicates; with each, its equal ones."""
    by_digest = defaultdict(list)
    for row, look in looks.items():
        by_digest[look.digest].append(row)
    sets, near = list(by_digest.values()), []
    signs = np.array([looks[rows[0]].signs for rows in sets])
    copies = np.array([looks[rows[0]].copy for rows in sets])
    for a, b, distance, likeness in sorted(near_pairs(signs, copies, limit), key=lambda x: x[2]):
        near.append(Group(f"distance {distance}, correlation {likeness:.3f}", sets[a] + sets[b]))
    return [Group("equal pixels", rows) for rows in sets if len(rows) > 1], near


# %% judging and showing


def leaks(groups: list[Group], part: str = "test", into: tuple = ("train", "val")) -> set[str]:
    """Paths of `part` in groups that also have a row in one of the parts `into`."""
    known = [group for group in groups if any(group.paths(other) for other in into)]
    return {path for group in known for path in group.paths(part)}


def judge(looks: dict[Row, Look], equal: list[Group], near: list[Group]) -> dict[str, list]:
    """For each kind of flaw, one entry for each that was found."""
    leaking, parts = leaks(equal), defaultdict(set)
    for row in looks:
        parts[row.group].add(row.split)
    different = [group.paths() for group in equal + near if group.differ("labels")]
    flaws = {
        "test images that training or validation has too": sorted(leaking),
        "validation images that training has too": sorted(leaks(equal, "val", ("train",))),
        "more test images nearly like one there": sorted(leaks(near) - leaking),
        "sets of equal or near images under different labels": different,
        "groups in several parts": [g for g, here in parts.items() if g and len(here) > 1],
        "one-coloured images": [row.path for row, look in looks.items() if look.flat]}
    for part in PARTS:
        flaws[f"repeats within {part}"] = [x for group in equal for x in group.paths(part)[1:]]
    flaws["pairs of near duplicates"] = [[group.title, *group.paths()] for group in near]
    return flaws


def contact_sheet(images: ImageSet, groups: list[Group], side: int = 190) -> Image.Image:
    """Two images of each group, side by side, three groups in a row."""
    pairs = []
    for group in groups:
        title = group.title + ", across parts" * group.differ("split")
        title = words(title + ", LABELS DIFFER" * group.differ("labels"), 2 * side, 12)
        first, *rest = group.rows
        other = max(rest, key=lambda row: (row.labels != first.labels, row.split != first.split))
        columns = []
        for row in (first, other):
            image = load_image(images.folder / row.path, images.window)
            caption = f"{row.split}: {'|'.join(row.labels)}"[:26] + "\n" + row.path[-26:]
            image = ImageOps.pad(image, (side, side), color="white")
            columns.append(grid([[image], [words(caption, side, 12)]], 4))
        pairs.append(grid([[title], [grid([columns], 8)]], 4))
    return grid([pairs[i:i + 3] for i in range(0, len(pairs), 3)], 24)


# %% the command


def run_audit(args: argparse.Namespace) -> None:
    """Look, tell, and write what was found."""
    images = open_images(args)
    print(*describe(images), sep="\n")
    with ThreadPool() as pool:  # decoding and hashing run on all cores at once
        found = pool.imap(lambda row: look_at(images, row), images.rows, 8)
        found = list(tqdm(found, "decoding", len(images.rows), disable=None))
    looks = {row: look for row, look in zip(images.rows, found) if isinstance(look, Look)}
    if not looks:
        raise DataError(f"{images.folder} holds no image that can be read")
    equal, near = find_alike(looks, args.near)
    flaws = judge(looks, equal, near)
    flaws["unreadable images"] = [look for look in found if isinstance(look, str)]
    for kind, entries in flaws.items():
        print(f"{'!' if entries else ' '} {len(entries):6,} {kind}")
    out = args.out or Path("runs", f"audit-{args.data.resolve().name}")
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "audit.json", json.dumps(flaws, indent=1, ensure_ascii=False) + "\n")
    if worst := sorted(equal + near, key=lambda x: (x.differ("labels"), x.differ("split")))[-24:]:
        contact_sheet(images, worst[::-1]).save(out / "pairs.png")
    print(f"every file: {out / 'audit.json'}; the worst pairs, if any: {out / 'pairs.png'}")
    if args.write_split:
        leaking = leaks(equal + near if args.write_split == "near" else equal)
        rows = [row for row in looks if row.path not in leaking]
        if leaking and not any(row.split == "test" for row in rows):
            raise DataError(f"every test image of {args.data} leaks: no test part is left")
        write_split(out / "split.csv", replace(images, rows=rows))
        print(f"{len(leaking)} test images and the unreadable ones are left out of this split; "
              f"train and test with --split-file {out / 'split.csv'}")


def main(argv: list[str] | None = None) -> None:
    parser = command_parser("python -m extras.audit", "Find leaks, duplicates and damage.")
    add_data_options(parser)
    add = parser.add_argument
    add("--out", type=Path, help="folder of the report (default: runs/audit-<data set>)")
    add("--near", type=int, default=4, help=f"signs, of {BITS}, that may differ (default: 4)")
    add("--write-split", nargs="?", const="exact", choices=("exact", "near"),
        help="write split.csv without the test images that leak; near: nor those that nearly do")
    with clear_exit(DataError):
        run_audit(parser.parse_args(argv))


if __name__ == "__main__" and "__file__" in globals():
    main()
