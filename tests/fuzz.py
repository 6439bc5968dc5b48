"""Mutated files for all that is read, by hand: `python tests/fuzz.py 20000`.

Each input must be read, or be refused in one sentence with exit code 2: no traceback, no crash, at
most 20 seconds, at most 1 GB more. What breaks something is kept in the folder `broken`.
"""

import contextlib
import io
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from safetensors.torch import save as safetensors

import data
import finetune
import images
from extras import curves, prepare
from helpers import class_folders, make_run, noise, png, png_bytes, put, tiff
from runtime import Run, build_model, clear_exit, load_network

SECONDS, BYTES = 20, 2 ** 30
ODD = [b"", b"\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80", b"\n", b"\r", b'"', b",",
       b";", b"\t", b"|", b"../", b"/etc/passwd", b"=cmd|' /C calc'!A0", b"\x1b[2J", b"nan",
       b"1e999", b"-1", b"9" * 5000, b"[" * 3000, b"{}", b"null", b"\xef\xbb\xbf", b"\xff\xfe",
       b"\xed\xa0\x80", "é".encode(), b"train", b"a.png", b"image", b"\x80\x02cos\nsystem\n"]

# %% mutating


def changed(body: bytes, draw: random.Random) -> bytes:
    """One to four places of a file flipped, cut out, doubled, or filled with something odd."""
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(body) + 1)
        if draw.random() < 0.5:  # headers are at the start
            at = min(at, draw.randrange(200))
        end = at + draw.choice([0, 1, 1, 2, 4, 8, 50, len(body)])
        flipped = bytes(byte ^ 1 << draw.randrange(8) for byte in body[at:end][:8])
        piece = draw.choice([draw.choice(ODD), draw.randbytes(4), body[at:end] * 2, flipped])
        body = body[:at] + piece + body[end:]
    return body


def changed_zip(body: bytes, draw: random.Random) -> bytes:
    """One member of it `changed`."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(body)) as old, zipfile.ZipFile(packed, "w") as new:
        names = old.namelist()
        chosen = draw.choice([names[0], draw.choice(names)])  # torch's pickle is the first
        for name in names:
            member = old.read(name)
            new.writestr(name, changed(member, draw) if name == chosen else member)
    return packed.getvalue()


def changed_png(body: bytes, draw: random.Random) -> bytes:
    """One chunk of it `changed`, its pixels as they are before they are packed."""
    at, chunks = 8, []
    while at < len(body):
        length, kind = struct.unpack(">I4s", body[at:at + 8])
        chunks.append((kind, body[at + 8:at + 8 + length]))
        at += 12 + length
    chosen = draw.randrange(len(chunks))
    kind, inside = chunks[chosen]
    if kind == b"IDAT":
        inside = zlib.compress(changed(zlib.decompress(inside), draw))
    else:
        inside = changed(inside, draw)
    chunks[chosen] = kind, inside
    return png_bytes(*chunks)


def mutated(body: bytes, draw: random.Random) -> bytes:
    """`changed`, for zips and PNGs in half of the cases inside, under checksums that are right."""
    inside = {b"PK": changed_zip, b"\x89P": changed_png}.get(body[:2], changed)
    return draw.choice([changed, inside])(body, draw)


# %% inputs, as [(name of the file, content)]

TABLES = ["image,label,group,split\na.png,cat,1,train\nb.png,dog,2,val\nc.png,cat,3,test\n",
          "image;cat;dog\na.png;1;0\nb.png;0;1\nc.png;0;0\n",
          "image\tlabels\na.png\tcat|dog\nb.png\t\n",
          '"image","label"\r\n"a.png","a cat"\r\n"b.png","a ""dog"""\r\n',
          ",image,label\n0,a.png,1\n1,b.png,10\n2,c.png,2\n"]


def image_files(folder: Path) -> list[tuple[str, bytes]]:
    """Images of all kinds."""
    folder.mkdir()
    picture = noise(0)
    for ending in images.ENDINGS:
        picture.save(folder / f"plain{ending}")
    for mode, ending in (("P", ".png"), ("P", ".gif"), ("RGBA", ".png"), ("1", ".tif"),
                         ("CMYK", ".jpg"), ("LA", ".png"), ("L", ".bmp"), ("RGBA", ".webp"),
                         ("I;16", ".png"), ("F", ".tif")):
        picture.convert(mode).save(folder / f"{mode}{ending}")
    for packing in ("tiff_lzw", "jpeg", "packbits", "tiff_adobe_deflate"):
        picture.save(folder / f"{packing}.tif", compression=packing)
    picture.save(folder / "several.gif", save_all=True, append_images=[noise(1), noise(2)])
    deep = np.random.default_rng(0).integers(0, 60000, (20, 24, 3), dtype=np.uint16)
    png(folder / "deep.png", deep)
    grey = deep[..., 0]
    for i, pixels in enumerate((deep, grey, grey.astype(np.float32), grey.astype(np.int32))):
        tiff(folder / f"packed{i}.tif", pixels, deflate=True)
        tiff(folder / f"turned{i}.tif", pixels, order=">")
    return [(f"a{file.suffix}", file.read_bytes()) for file in sorted(folder.iterdir())]


def written(save: Callable[[io.BytesIO], object]) -> bytes:
    file = io.BytesIO()
    save(file)
    return file.getvalue()


def medmnist() -> bytes:
    array = np.random.default_rng(0).integers(0, 255, (4, 8, 8, 3), dtype=np.uint8)
    arrays = {f"{part}_images": array for part in data.PARTS}
    arrays |= {f"{part}_labels": array[:, :1, 0, 0] for part in data.PARTS}
    return written(lambda file: np.savez_compressed(file, **arrays))


# %% readers


def readers(root: Path) -> dict[str, tuple[float, list[tuple[str, bytes]], Callable]]:
    """name -> share of all inputs, the inputs, and what reads a file in the folder `root`/name."""
    tables = [text.encode(code) for text in TABLES for code in ("utf-8", "utf-16")]
    put(root / "table", "a.png", "b.png", "c.png")
    put(root / "foreign", "a.png", "b.png", "c.png")
    pets = class_folders(root / "pets", cat=10, dog=10)
    pretrained = make_run(root / "pretrained", pets)

    tuned = Run(root / "tuned", {"resume": False})
    tuned.begin(classes=["cat", "dog"], multi_label=False)
    tuned.save_network("cnn.pt", build_model("test_resnet", "random", 32, outputs=2))
    tuned.finish(chosen="cnn")

    options, network = {"resume": True, "epochs": 9}, build_model("test_vit", "random", 32)
    parts = [network, torch.optim.Adam(network.parameters())]
    network(torch.zeros(2, 3, 32, 32)).sum().backward()
    parts[1].step()
    run = Run(root / "checkpoint", options)
    run.begin()
    run.log({"epoch": 1, "loss": 0.5, "cnn_cosine": 0.5, "cnn_rank": 3.0, "cnn_moved": 0.1})
    run.save(parts, [0.5])
    shutil.copytree(run.folder, root / "config")

    state = build_model("test_resnet", "random", 32).state_dict()
    state = {key: tensor.contiguous() for key, tensor in state.items()}
    older = {"_use_new_zipfile_serialization": False}
    weights = [
        ("test_resnet.pt", written(lambda file: torch.save(state, file))),
        ("test_resnet.pt", written(lambda file: torch.save({"model": state}, file, **older))),
        ("test_resnet.safetensors", safetensors(state))]

    def restore(file: Path) -> None:
        again = Run(file.parent, options)
        again.begin()
        again.restore(parts)

    def look(file: Path) -> None:
        one = images.ImageSet(file.parent, [images.Row(file.name)], [])
        images.facts(file)
        images.load_image(file, images.with_window(one).window)

    def from_init(file: Path) -> None:
        build_model("test_resnet", str(file.parent), 32, outputs=3)

    def converted(file: Path) -> None:
        (file.parent / "labels.csv").unlink(missing_ok=True)
        prepare.main(["--data", str(file.parent), "--table", str(file)])

    def unpacked(file: Path) -> None:
        shutil.rmtree(file.with_suffix(""), ignore_errors=True)
        prepare.main(["--data", str(file)])

    def inputs(folder: Path, name: str) -> list[tuple[str, bytes]]:
        return [(name, (folder / name).read_bytes())]

    return {
        "table": (0.15, [("labels.csv", table) for table in tables],
                  lambda file: data.main(["--data", str(file.parent)])),
        "foreign": (0.1, [("table.csv", table) for table in tables], converted),
        "split": (0.1, inputs(pretrained, "split.csv"),
                  lambda file: data.main(["--data", str(pets), "--split-file", str(file)])),
        "image": (0.4, image_files(root / "images"), look),
        "config": (0.04, inputs(run.folder, "config.json"), lambda file: Run(file.parent, options)),
        "tuned": (0.04, inputs(tuned.folder, "config.json"),
                  lambda file: finetune.fine_tuned(file.parent)),
        "log": (0.02, inputs(run.folder, "log.jsonl"),
                lambda file: curves.main([str(file.parent)])),
        "weights": (0.06, weights, from_init),
        "network": (0.03, inputs(pretrained, "cnn.pt"),
                    lambda file: load_network(file, 32, outputs=3)),
        "checkpoint": (0.03, inputs(run.folder, "checkpoint.pt"), restore),
        "npz": (0.03, [("a.npz", medmnist())], unpacked)}


# %% a reader and its inputs


def peak() -> int:
    """The most memory this process has used, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def outcome(read: Callable, file: Path) -> str:
    """How `read` ends with this file: "read", "refused", or what is wrong with that."""
    said, code = io.StringIO(), 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            with clear_exit(data.DataError):
                read(file)
        except SystemExit as stopped:
            code = stopped.code
        except BaseException:
            traceback.print_exc()
            code = 1
    lines = [line for line in said.getvalue().splitlines()
             if "looking for the one before it" not in line]
    if code == 0 and not lines:
        return "read"
    if (code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
            and lines[0].isprintable() and "memory ran out" not in lines[0]):
        return "refused"
    return f"{code}: {said.getvalue()[-1500:]}"


def attack(read: Callable, folder: Path, inputs: list, count: int, broken: Path) -> Counter:
    """`count` mutated files, read in this process."""
    draw, found, allowed = random.Random(folder.name), Counter(), peak() + BYTES
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * BYTES, -1))
    warnings.simplefilter("ignore")  # Pillow's, as its log
    logging.disable()
    for number in range(count):
        name, body = draw.choice(inputs)
        file, before = folder / name, peak()
        for other in folder.glob("*.[sn][ap]*"):  # .safetensors and .npz of an earlier one
            other.unlink()
        file.write_bytes(mutated(body, draw))
        signal.alarm(SECONDS)
        how = outcome(read, file)
        signal.alarm(0)
        if peak() > max(before, allowed):
            how += f", with {peak() / 1e6:.0f} MB"
        if how not in ("read", "refused"):
            print(f"BROKEN {folder.name} {number}: {how}", flush=True)
            shutil.copy(file, broken / f"{folder.name}-{number}-{name}")
            how = "broken"
        found[how] += 1
    return found


def attack_apart(read: Callable, folder: Path, *rest: object) -> Counter:
    """`attack` in a child, whose crash or hang breaks nothing here."""
    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()
    child = fork.Process(target=lambda: results.put(attack(read, folder, *rest)))
    child.start()
    child.join()
    if child.exitcode:
        print(f"BROKEN {folder.name}: ended by {child.exitcode} at what is in {folder}", flush=True)
        return Counter(broken=1)
    return results.get()


def fuzz(root: Path, count: int, broken: Path) -> Counter:
    """`count` inputs, each reader's share of them, in folders in `root`."""
    total = Counter()
    for name, (share, inputs, read) in readers(root).items():
        (root / name).mkdir(exist_ok=True)
        found = attack_apart(read, root / name, inputs, round(count * share), broken)
        print(f"{name:12} {found.total():6} inputs: {dict(found)}", flush=True)
        total += found
    return total


if __name__ == "__main__":
    kept = Path("broken")
    kept.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        result = fuzz(Path(folder), int(sys.argv[1]), kept)
    print(f"{result.total()} inputs: {dict(result)}")
    raise SystemExit(result["broken"] > 0)
