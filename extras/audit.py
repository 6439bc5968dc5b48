"""Look for what spoils a result before anything is trained: leaks, duplicates, damage.

    python -m extras.audit --data ./brain-mri --write-split

Every image is decoded once. Found are images of equal pixels and near duplicates, within a part and across parts,
with equal and with different labels; groups in several parts; unreadable and one-coloured images; sizes and colour
modes out of line; uneven classes. A summary on the screen; in --out `audit.json` with every file, `pairs.png` with the
worst pairs side by side, and with --write-split a `split.csv` for --split-file, without the test images that leak.
--predictions RUN/predictions.csv (of finetune.py) tells how much the leaking ones flatter a score.

Near duplicates: the signs of the lowest 63 waves of a 32 x 32 grey copy (pHash) differ in at most --near places, and
the copies correlate by 0.98. That finds what was saved anew, resized, brightened or given more contrast, and
neighbouring slices of one patient; not what was cropped, turned or mirrored.
"""

import argparse
import hashlib
import json
import os
from collections import Counter
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from data import PARTS, DataError, ImageSet, add_data_options, describe, load_image, open_images, read_table, write_split
from metrics import class_counts, mean_and_spread, precision_recall_f1
from runtime import Options, clear_exit, positive, write_text

WAVES = np.cos(np.pi * np.outer(np.arange(8), 2 * np.arange(32) + 1) / 64).astype(np.float32)  # (8, 32): a DCT
BITS, LIKENESS = 63, 0.98


class Look(NamedTuple):
    """What is kept of one image: a digest of its pixels, signs of its lowest waves (63,), a grey copy (32, 32)."""
    digest: bytes
    signs: np.ndarray
    copy: np.ndarray
    size: tuple[int, int]
    mode: str  # as stored; a grey image may be stored in colour
    coloured: bool
    flat: bool


class Pair(NamedTuple):
    """Two images, as indices; `distance` of their signs and `likeness` of their copies. Equal pixels: -1 and 1."""
    a: int
    b: int
    distance: int
    likeness: float


# %% looking


def look_at(path: Path) -> Look | str:
    """Decode one image, as training would; a sentence if that fails."""
    try:
        image = load_image(path)
        with Image.open(path) as header:
            mode = header.mode
    except DataError as error:
        return str(error)
    digest = hashlib.blake2b(image.tobytes(), digest_size=16, key=repr(image.size).encode()).digest()
    copy = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BILINEAR))
    waves = (WAVES @ copy.astype(np.float32) @ WAVES.T).ravel()[1:]  # without the first, the mean brightness
    red, green, blue = image.split()
    coloured = any(ImageChops.difference(green, other).getbbox() for other in (red, blue))
    flat = all(low == high for low, high in image.getextrema())
    return Look(digest, waves > np.median(waves), copy, image.size, mode, coloured, flat)


def near_pairs(signs: np.ndarray, copies: np.ndarray, limit: int) -> Iterator[Pair]:
    """All pairs of images whose signs `(N, 63)` differ in at most `limit` places, and whose copies `(N, 32, 32)`
    correlate. Signs of +-1 have the product 63 - 2 * distance, so a matrix product compares many at once."""
    signs = signs.astype(np.float32) * 2 - 1
    copies = copies.reshape(len(copies), -1).astype(np.float32)
    copies -= copies.mean(1, keepdims=True)
    copies /= np.linalg.norm(copies, axis=1, keepdims=True).clip(1e-6)  # one-coloured images are like nothing
    for begin in range(0, len(signs), 512):
        product = signs[begin:begin + 512] @ signs[begin:].T
        first, second = np.nonzero(np.triu(product >= BITS - 2 * limit, 1))
        for piece in range(0, len(first), 65536):
            a, b = first[piece:piece + 65536], second[piece:piece + 65536]
            likeness = np.einsum("nd,nd->n", copies[begin + a], copies[begin + b])
            distances = (BITS - product[a, b]) / 2
            for i in np.flatnonzero(likeness >= LIKENESS):
                yield Pair(begin + int(a[i]), begin + int(b[i]), int(distances[i]), round(float(likeness[i]), 4))


# %% judging


class Findings:
    """Everything the audit knows of the readable images; members are indices into `rows`."""

    def __init__(self, images: ImageSet, limit: int, workers: int) -> None:
        paths = [images.folder / row.path for row in images.rows]
        with ThreadPool(workers) as pool:  # decoding and hashing leave Python's lock to other threads
            looks = list(tqdm(pool.imap(look_at, paths, 8), "decoding", len(paths), unit="image", disable=None))
        self.images, self.limit = images, limit
        self.unreadable = [look for look in looks if isinstance(look, str)]
        kept = [(row, look) for row, look in zip(images.rows, looks) if isinstance(look, Look)]
        if not kept:
            raise DataError(f"{images.folder} holds no image that can be read")
        self.rows, self.looks = [row for row, _ in kept], [look for _, look in kept]
        sets: dict[bytes, list[int]] = {}
        for i, look in enumerate(self.looks):
            sets.setdefault(look.digest, []).append(i)
        self.sets = list(sets.values())  # images of equal pixels; most are alone
        first = [self.looks[members[0]] for members in self.sets]
        found = near_pairs(np.array([x.signs for x in first]), np.array([x.copy for x in first]), limit)
        self.near_sets = sorted(found, key=lambda pair: (pair.distance, -pair.likeness))  # indices into sets
        self.exact = [self.worst(m, m)._replace(distance=-1) for m in self.sets if len(m) > 1]
        self.near = [self.worst(self.sets[p.a], self.sets[p.b])._replace(distance=p.distance, likeness=p.likeness)
                     for p in self.near_sets]

    def worst(self, some: list[int], others: list[int]) -> Pair:
        """Of two sets, the two images that differ in label and part, as far as there are any."""
        few = [{(self.rows[i].labels, self.rows[i].split, n % 2): i for n, i in enumerate(members)}.values()
               for members in (some, others)]  # at most two of each label and part, however large the set
        pairs = [Pair(i, j, 0, 1.0) for i in few[0] for j in few[1] if i != j]
        return max(pairs, key=lambda pair: (self.conflict(pair), self.crosses(pair)))

    def conflict(self, pair: Pair) -> bool:
        return set(self.rows[pair.a].labels) != set(self.rows[pair.b].labels)

    def crosses(self, pair: Pair) -> bool:
        return self.rows[pair.a].split != self.rows[pair.b].split

    def leaks(self, part: str, into: set[str], near: bool = False) -> list[int]:
        """Images of `part` that also stand in one of the parts `into`; with `near`, their near duplicates too."""
        parts = [{self.rows[i].split for i in members} for members in self.sets]
        seen = {n for n, here in enumerate(parts) if here & into}
        leaking = {n for n in seen if part in parts[n]}
        for pair in self.near_sets if near else ():
            leaking |= {x for x, y in ((pair.a, pair.b), (pair.b, pair.a)) if y in seen and part in parts[x]}
        return sorted(i for n in leaking for i in self.sets[n] if self.rows[i].split == part)

    def groups(self) -> dict[str, list[str]]:
        """Groups, such as patients, that stand in several parts."""
        parts: dict[str, set[str]] = {}
        for row in self.rows:
            parts.setdefault(row.group, set()).add(row.split)
        return {group: sorted(here, key=PARTS.index) for group, here in parts.items() if group and len(here) > 1}

    def out_of_line(self) -> tuple[list[int], list[int]]:
        """Images less than half or more than twice as wide or high as the median; and of a rare mode (below 5 %)."""
        sizes = np.array([look.size for look in self.looks], float)
        ratio = sizes / np.median(sizes, axis=0)
        modes = Counter(look.mode for look in self.looks)
        return (np.flatnonzero(((ratio < 0.5) | (ratio > 2)).any(1)).tolist(),
                [i for i, look in enumerate(self.looks) if modes[look.mode] < 0.05 * len(self.looks)])

    def facts(self) -> dict:
        """All findings as plain values, for audit.json."""
        def names(indices: Iterable[int]) -> list[str]:
            return [self.rows[i].path for i in indices]

        def by_distance(pairs: Iterable[Pair]) -> dict[int, int]:
            return dict(Counter(pair.distance for pair in pairs))

        exact, near = self.leaks("test", {"train", "val"}), self.leaks("test", {"train", "val"}, near=True)
        sizes, modes = self.out_of_line()
        per_class = {c: [look for row, look in zip(self.rows, self.looks) if c in row.labels]
                     for c in self.images.classes}
        return {
            "data": str(self.images.folder), "images": len(self.rows), "unreadable": self.unreadable,
            "one-coloured": names(i for i, look in enumerate(self.looks) if look.flat),
            "equal pixels": {
                "repeats": {part: sum(max(0, sum(self.rows[i].split == part for i in members) - 1)
                                      for members in self.sets) for part in PARTS},
                "distinct test images in training or validation": len({self.looks[i].digest for i in exact}),
                "test files in training or validation": names(exact),
                "validation files in training": names(self.leaks("val", {"train"})),
                "different labels": [names(pair[:2]) for pair in self.exact if self.conflict(pair)],
                "sets": [names(members) for members in self.sets if len(members) > 1]},
            "near duplicates": {
                "at most": self.limit, "pairs by distance": by_distance(self.near),
                "across parts by distance": by_distance(filter(self.crosses, self.near)),
                "more test files near training or validation": names(sorted(set(near) - set(exact))),
                "different labels": [[*names(pair[:2]), pair.distance] for pair in self.near if self.conflict(pair)],
                "pairs": [[*names(pair[:2]), *pair[2:]] for pair in self.near]},
            "groups in several parts": self.groups(),
            "classes": {c: len(looks) for c, looks in per_class.items()},
            "coloured": {c: sum(look.coloured for look in looks) for c, looks in per_class.items()},
            "modes": dict(Counter(look.mode for look in self.looks)),
            "sizes out of line": names(sizes), "modes out of line": names(modes)}


def summary(facts: dict) -> Iterator[str]:
    """Lines for the screen; what deserves a look is marked with !."""
    def line(what: str, said: str, bad: Any) -> str:
        return f"{'!' if bad else ' '} {what:13}{said}"

    for what in ("unreadable", "one-coloured"):
        yield line(what, f"{len(facts[what])} images", facts[what])
    equal, near = facts["equal pixels"], facts["near duplicates"]
    yield line("repeats", "files whose pixels stand in their own part already: " + ", ".join(
        f"{n:,} in {part}" for part, n in equal["repeats"].items()), any(equal["repeats"].values()))
    n, files = (equal[f"{x} in training or validation"] for x in ("distinct test images", "test files"))
    yield line("leaks", f"{n} distinct test images ({len(files)} files) stand in training or validation too", files)
    files = equal["validation files in training"]
    yield line("", f"{len(files)} validation files stand in training too", files)
    files = near["more test files near training or validation"]
    yield line("near", f"{len(files)} more test files are near duplicates of training or validation", files)
    yield line("", f"pairs by distance (of {BITS}): " + (", ".join(
        f"{n:,} at {d}" for d, n in near["pairs by distance"].items()) or "none")
        + f"; {sum(near['across parts by distance'].values()):,} of them across parts", False)
    sets, pairs = equal["different labels"], near["different labels"]
    yield line("labels", f"differ in {len(sets)} sets of equal pixels and in {len(pairs)} near pairs", sets or pairs)
    groups = facts["groups in several parts"]
    yield line("groups", f"{len(groups)} stand in several parts", groups)
    counts = sorted(facts["classes"].values()) or [1]
    ratio = counts[-1] / max(1, counts[0])
    yield line("classes", f"the largest has {ratio:.1f} times the images of the smallest", ratio > 10)
    yield line("sizes", f"{len(facts['sizes out of line'])} out of line", facts["sizes out of line"])
    yield line("modes", ", ".join(f"{n:,} {mode}" for mode, n in facts["modes"].items())
               + f"; {len(facts['modes out of line'])} out of line", facts["modes out of line"])
    share = {c: n / max(1, facts["classes"][c]) for c, n in facts["coloured"].items()}
    low, high = min(share, key=share.get, default=""), max(share, key=share.get, default="")
    if share and share[high] - share[low] > 0.5:
        yield line("", f"{share[low]:.0%} of {low} are in colour, {share[high]:.0%} of {high}: a give-away?", True)


def read_predictions(file: Path, images: ImageSet) -> list[dict[str, str]]:
    """The lines of a fine-tuning run's `predictions.csv`, if they are of this test part. Raises `DataError`."""
    header, lines = read_table(file)
    if not lines or not {"image", "truth", "seed"} <= set(header):
        raise DataError(f"{file} is no predictions.csv of a test part, as finetune.py leaves it in its run folder")
    truth = {row.path: "|".join(row.labels) for row in images.part("test")}
    for number, line in lines:
        if truth.get(line["image"]) != line["truth"]:
            raise DataError(f"{file} line {number} is of {line['image']}, which is no test image of {images.folder} with that "
                            "label; name the split of that run with --split-file RUN/split.csv")
    return [line for _, line in lines]


def flattery(rows: list[dict[str, str]], leaking: set[str], classes: list[str]) -> Iterator[str]:
    """Lines with the scores of each network in `read_predictions`, mean over seeds: macro F1 on all test images and on
    those that do not leak; and how many of the leaking ones are right, beside as many others of the same classes, as
    leaking images may be of the easier classes or of the harder ones."""
    seeds, images = list(dict.fromkeys(row["seed"] for row in rows)), {row["image"]: row["truth"] for row in rows}
    shares = Counter(truth for image, truth in images.items() if image in leaking)

    def scores(network: str, seed: str) -> list[float]:
        own = [row for row in rows if row["seed"] == seed]
        clean = [row for row in own if row["image"] not in leaking]
        truth, said = ([np.array([[c in row[key].split("|") for c in classes] for row in some]).reshape(-1, len(classes))
                        for some in (own, clean)] for key in ("truth", f"{network}: class"))
        f1 = [float(precision_recall_f1(class_counts(t, p))["f1"].mean()) for t, p in zip(truth, said)]
        right = {leaks: {c: [row["truth"] == row[f"{network}: class"] for row in own if row["truth"] == c
                             and (row["image"] in leaking) == leaks] for c in shares} for leaks in (True, False)}
        common = [c for c in shares if right[False][c]]  # classes of which some images do not leak
        return f1 + [sum(shares[c] * np.mean(right[leaks][c]) for c in common) / (sum(shares[c] for c in common) or 1)
                     for leaks in (True, False)]
    yield (f"{len(images)} test images, {sum(shares.values())} leaking ("
           + (", ".join(f"{n} {c or 'no class'}" for c, n in shares.items()) or "none") + f"); seeds: {len(seeds)}")
    for name in (key[:-7] for key in rows[0] if key.endswith(": class")):
        cells = [f"{mean:.4f}" + (f" +- {spread:.4f}" if spread is not None else "")
                 for mean, spread, _ in map(mean_and_spread, zip(*(scores(name, seed) for seed in seeds)))]
        yield f"  {name}: macro F1 {cells[0]}, without the leaking images {cells[1]}" + (
            f"; right: {cells[2]} of the leaking, {cells[3]} of others of the same classes" * bool(shares))


# %% showing


def contact_sheet(findings: Findings, most: int = 24, side: int = 190) -> Image.Image | None:
    """The worst pairs side by side, three in a row, at first a few of each kind; None if there are none."""
    kinds: dict[tuple, list[Pair]] = {}
    for pair in findings.exact + findings.near:
        kinds.setdefault((not findings.conflict(pair), not findings.crosses(pair), pair.distance >= 0), []).append(pair)
    few = [pair for kind in sorted(kinds) for pair in kinds[kind][::max(1, len(kinds[kind]) // 4)][:4]]
    order = (few + [pair for kind in sorted(kinds) for pair in kinds[kind] if pair not in few])[:most]
    if not order:
        return None
    wide, high = 2 * side + 24, side + 78
    sheet = Image.new("RGB", (3 * wide, -(-len(order) // 3) * high), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for n, pair in enumerate(order):
        x, y = n % 3 * wide + 8, n // 3 * high + 6
        title = "equal pixels" if pair.distance < 0 else f"distance {pair.distance}, correlation {pair.likeness:.3f}"
        title += ", across parts" * findings.crosses(pair) + ", LABELS DIFFER" * findings.conflict(pair)
        draw.text((x, y), title, "black", font)
        for k, i in enumerate((pair.a, pair.b)):
            row, left = findings.rows[i], x + k * (side + 8)
            image = load_image(findings.images.folder / row.path)
            sheet.paste(ImageOps.contain(image, (side, side)), (left, y + 20))
            for line, text in enumerate((f"{row.split}: {' | '.join(row.labels)}", row.path)):
                while draw.textlength(text, font) > side:  # the part of the split stays, and the end of the path
                    text = "…" + text[2:] if line else text[:-2] + "…"
                draw.text((left, y + side + 24 + 17 * line), text, "black", font)
    return sheet


# %% the command


def run_audit(args: argparse.Namespace) -> None:
    """Look, tell, and write what was found."""
    images = open_images(args)
    told = read_predictions(args.predictions, images) if args.predictions else []
    print("\n".join(describe(images)))
    findings = Findings(images, args.near, args.workers)
    facts, out = findings.facts(), args.out or Path("runs", f"audit-{args.data.resolve().name}")
    print("\n".join(summary(facts)))
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "audit.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    print(f"every file: {out / 'audit.json'}")
    if sheet := contact_sheet(findings):
        sheet.save(out / "pairs.png")
        print(f"the worst pairs: {out / 'pairs.png'}")
    if args.predictions:
        leaking = {findings.rows[i].path for i in findings.leaks("test", {"train", "val"})}
        print("\n".join(flattery(told, leaking, images.classes)))
    if args.write_split:
        leaking = {findings.rows[i].path for i in findings.leaks("test", {"train", "val"}, args.write_split == "near")}
        rows = [row for row in findings.rows if row.path not in leaking]
        if leaking and not any(row.split == "test" for row in rows):
            raise DataError(f"every test image of {args.data} leaks; there is no test part to be written")
        write_split(out / "split.csv", replace(images, rows=rows))
        print(f"{len(leaking)} test images and {len(findings.unreadable)} unreadable ones are left out of "
              f"{out / 'split.csv'}; train and test with --split-file {out / 'split.csv'}")


def main(argv: list[str] | None = None) -> None:
    parser = Options("python -m extras.audit", "Find leaks, duplicates and damage in a data set.")
    add_data_options(parser)
    add = parser.add_argument
    add("--out", type=Path, help="folder of the report (default: runs/audit-<data set>)")
    add("--near", type=int, default=4, help=f"largest distance, of {BITS}, of near duplicates (default: %(default)s)")
    add("--write-split", nargs="?", const="exact", choices=("exact", "near"), help="write split.csv without the test "
        "images of which training or validation has equal pixels (exact, if nothing is said) or near duplicates (near)")
    add("--predictions", type=Path, metavar="FILE", help="score a predictions.csv with and without the leaking test images")
    add("--workers", type=positive(int), default=os.cpu_count() or 1, help="threads that decode (default: one for each core)")
    with clear_exit(DataError):
        run_audit(parser.parse_args(argv))


if __name__ == "__main__" and "__file__" in globals():
    main()
