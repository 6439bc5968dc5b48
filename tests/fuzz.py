"""Mutated files for all that is read, by hand: `python tests/fuzz.py 20000`.

Each input must be read, or be refused in one sentence with exit code 2: no traceback, no crash, at
most 20 seconds, at most 1 GB more. What breaks something is kept in the folder `broken`.
"""

import ast
import contextlib
import io
import logging
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
from PIL import Image
from safetensors.torch import save_file

import data
import finetune
import images
from extras import curves, prepare
from helpers import class_folders, make_run, noise, png, put, tiff
from runtime import Run, build_model, clear_exit, load_network

SECONDS, BYTES = 20, 2 ** 30
ODD = [b"", b"\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80", b"\n", b"\r", b'"', b",",
       b";", b"\t", b"|", b"../", b"/etc/passwd", b"=cmd|' /C calc'!A0", b"\x1b[2J", b"nan",
       b"1e999", b"-1", b"9" * 5000, b"[" * 3000, b"{}", b"null", b"\xef\xbb\xbf", b"\xff\xfe",
       b"\xed\xa0\x80", "é".encode(), b"train", b"a.png", b"image", b"\x80\x02cos\nsystem\n"]

# %% inputs


def changed(body: bytes, draw: random.Random) -> bytes:
    """One to four places of a file flipped, cut out, doubled, or filled with something odd."""
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(body) + 1)
        if draw.random() < 0.5:  # headers are at the start
            at = min(at, draw.randrange(200))
        end = at + draw.choice([0, 1, 1, 2, 4, 8, 50, len(body)])
        piece = draw.choice([draw.choice(ODD), draw.randbytes(end - at if end - at < 9 else 4),
                             body[at:end] * 2, bytes([*body[at:at + 1]]).swapcase(),
                             bytes(byte ^ 1 << draw.randrange(8) for byte in body[at:end][:8])])
        body = body[:at] + piece + body[end:]
    return body


def mutated(body: bytes, draw: random.Random) -> bytes:
    """`changed`, for zips and PNGs in half of the cases inside, under checksums that are right."""
    if body[:2] == b"PK" and draw.random() < 0.5:
        packed = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(body)) as old, zipfile.ZipFile(packed, "w") as new:
            names = old.namelist()
            chosen = draw.choice([names[0], draw.choice(names)])  # torch's pickle is the first
            for name in names:
                member = old.read(name)
                new.writestr(name, changed(member, draw) if name == chosen else member)
        return packed.getvalue()
    if body[:4] == b"\x89PNG" and draw.random() < 0.5:
        at, chunks = 8, []
        while at < len(body):
            length = struct.unpack(">I", body[at:at + 4])[0]
            chunks.append(body[at + 4:at + 8 + length])
            at += 12 + length
        chosen = draw.randrange(len(chunks))
        kind, inside = chunks[chosen][:4], chunks[chosen][4:]
        if kind == b"IDAT":
            inside = zlib.compress(changed(zlib.decompress(inside), draw))
        else:
            inside = changed(inside, draw)
        chunks[chosen] = kind + inside
        return body[:8] + b"".join(struct.pack(">I", len(chunk) - 4) + chunk
                                   + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return changed(body, draw)


def as_file(save: Callable[[Path], object], ending: str) -> tuple[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"a{ending}"
        save(file)
        return ending, file.read_bytes()


def image_files() -> list[tuple[str, bytes]]:
    """(ending, content) of images of all kinds."""
    deep = np.random.default_rng(0).integers(0, 60000, (20, 24, 3), dtype=np.uint16)
    picture = noise(0)
    found = [as_file(picture.save, ending) for ending in images.ENDINGS]
    found += [as_file(picture.convert(mode).save, ending) for mode, ending in (
        ("P", ".png"), ("P", ".gif"), ("RGBA", ".png"), ("1", ".tif"), ("CMYK", ".jpg"),
        ("LA", ".png"), ("L", ".bmp"), ("RGBA", ".webp"), ("I;16", ".png"), ("F", ".tif"))]
    found += [as_file(lambda file: picture.save(file, compression=name), ".tif")
              for name in ("tiff_lzw", "jpeg", "packbits", "tiff_adobe_deflate")]
    options = {"save_all": True, "append_images": [noise(1), noise(2)]}
    found.append(as_file(lambda file: picture.save(file, **options), ".gif"))
    found.append(as_file(lambda file: png(file, deep), ".png"))
    grey = deep[..., 0]
    for pixels in (deep, grey, grey.astype(np.float32), grey.astype(np.int32)):
        found.append(as_file(lambda file: tiff(file, pixels, deflate=True), ".tif"))
        found.append(as_file(lambda file: tiff(file, pixels, order=">"), ".tif"))
    return found


TABLES = ["image,label,group,split\na.png,cat,1,train\nb.png,dog,2,val\nc.png,cat,3,test\n",
          "image;cat;dog\na.png;1;0\nb.png;0;1\nc.png;0;0\n",
          "image\tlabels\na.png\tcat|dog\nb.png\t\n",
          '"image","label"\r\n"a.png","a cat"\r\n"b.png","a ""dog"""\r\n',
          ",image,label\n0,a.png,1\n1,b.png,10\n2,c.png,2\n"]


# %% readers: name -> (share of the inputs, [(name of the file, content)], what reads it)


def readers(root: Path) -> dict[str, tuple[float, list[tuple[str, bytes]], Callable]]:
    """Each gets a mutated file in the folder `root`/its name, and reads it."""
    tables = [("labels.csv", text.encode(code)) for text in TABLES for code in ("utf-8", "utf-16")]
    put(root / "table", "a.png", "b.png", "c.png")
    put(root / "foreign", "a.png", "b.png", "c.png")
    pets = class_folders(root / "pets", cat=10, dog=10)
    run_folder = make_run(root / "run", pets)
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
    state = {key: x.contiguous() for key, x in
             build_model("test_resnet", "random", 32).state_dict().items()}
    weights = [("test_resnet.pt", as_file(lambda file: torch.save(state, file), ".pt")[1]),
               ("test_resnet.pt", as_file(lambda file: torch.save(
                   {"model": state}, file, _use_new_zipfile_serialization=False), ".pt")[1])]
    tensors = as_file(lambda file: save_file(state, file), ".safetensors")
    array = np.random.default_rng(0).integers(0, 255, (4, 8, 8, 3), dtype=np.uint8)
    arrays = {f"{part}_{kind}": array if kind == "images" else array[:, :1, 0, 0]
              for part in data.PARTS for kind in ("images", "labels")}
    archive = as_file(lambda file: np.savez_compressed(file, **arrays), ".npz")

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

    return {
        "table": (0.15, tables, lambda file: data.main(["--data", str(file.parent)])),
        "foreign": (0.1, [("table.csv", body) for _, body in tables], converted),
        "split": (0.1, [("split.csv", (run_folder / "split.csv").read_bytes())],
                  lambda file: data.main(["--data", str(pets), "--split-file", str(file)])),
        "image": (0.4, [(f"a{ending}", body) for ending, body in image_files()], look),
        "config": (0.04, [("config.json", (run.folder / "config.json").read_bytes())],
                   lambda file: Run(file.parent, options)),
        "tuned": (0.04, [("config.json", (tuned.folder / "config.json").read_bytes())],
                  lambda file: finetune.fine_tuned(file.parent)),
        "log": (0.02, [("log.jsonl", (run.folder / "log.jsonl").read_bytes())],
                lambda file: curves.main([str(file.parent)])),
        "weights": (0.03, weights, from_init),
        "safetensors": (0.03, [("test_resnet.safetensors", tensors[1])], from_init),
        "network": (0.03, [("cnn.pt", (run_folder / "cnn.pt").read_bytes())],
                    lambda file: load_network(file, 32, outputs=3)),
        "checkpoint": (0.03, [("checkpoint.pt", (run.folder / "checkpoint.pt").read_bytes())],
                       restore),
        "npz": (0.03, [("a.npz", archive[1])], unpacked)}


# %% a reader and its inputs


def memory(name: str = "VmHWM") -> int:
    """The most memory used since `forget_peak`, or what is used now (VmRSS), in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def forget_peak() -> int:
    """What is used now, from where `memory` counts anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def complaint(read: Callable, file: Path) -> tuple[str, str]:
    """How `read` ends with this file, "read", "refused" or "broken", and what is wrong with it."""
    out, said, code, before = io.StringIO(), io.StringIO(), 0, forget_peak()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
        try:
            with clear_exit(data.DataError):
                read(file)
        except SystemExit as stopped:
            code = stopped.code
        except BaseException:
            traceback.print_exc()
            code = 1
    words, more = said.getvalue(), memory() - before
    lines = [line for line in words.splitlines() if "looking for the one before it" not in line]
    fine = code == 0 and not lines or (
        code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
        and lines[0].isprintable())
    if fine and "memory ran out" not in words and more <= BYTES:
        return "refused" if code else "read", ""
    return "broken", f"{code}, {more / 1e6:.0f} MB: {words[-1500:]}"


def attack(read: Callable, folder: Path, seeds: list, count: int, seed: int,
           broken: Path) -> Counter:
    """`count` mutated files, read in this process."""
    draw, found = random.Random(seed), Counter()
    warnings.simplefilter("ignore")  # Pillow's, as its log
    logging.disable()
    for number in range(count):
        name, body = draw.choice(seeds)
        file = folder / name
        for other in folder.glob("*.[sn][ap]*"):  # .safetensors and .npz of an earlier one
            other.unlink()
        file.write_bytes(mutated(body, draw))
        signal.alarm(SECONDS)
        how, why = complaint(read, file)
        signal.alarm(0)
        found[how] += 1
        if why:
            print(f"BROKEN {folder.name} {seed} {number}: {why}", flush=True)
            shutil.copy(file, broken / f"{seed}-{number}-{name}")
    return found


def apart(read: Callable, folder: Path, seeds: list, count: int, seed: int,
          broken: Path) -> Counter:
    """`attack` in a child, whose crash or hang breaks nothing here."""
    folder.mkdir(exist_ok=True)
    sys.stdout.flush()
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 4 * BYTES, -1))
        with contextlib.suppress(BaseException):
            found = attack(read, folder, seeds, count, seed, broken)
            os.write(theirs, repr(dict(found)).encode())
            sys.stdout.flush()
        os._exit(0)
    os.close(theirs)
    with open(ours) as pipe:
        found = Counter(ast.literal_eval(pipe.read() or "{'broken': 1}"))
    if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        print(f"BROKEN {folder.name} {seed}: ended by {code}", flush=True)
        shutil.copytree(folder, broken / f"{seed}-{folder.name}")
    return found


def fuzz(root: Path, count: int, broken: Path, only: str = "", at_once: int = 200) -> Counter:
    """`count` inputs, each reader's share of them, in folders in `root`."""
    total, seed = Counter(), 0
    for name, (share, seeds, read) in readers(root).items():
        found, left = Counter(), round(count * share) if only in ("", name) else 0
        while left > 0:
            seed += 1
            found += apart(read, root / name, seeds, min(left, at_once), seed, broken)
            left -= at_once
        print(f"{name:12} {found.total():6} inputs: {dict(found)}", flush=True)
        total += found
    return total


if __name__ == "__main__":
    kept = Path("broken")
    kept.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        result = fuzz(Path(folder), int(sys.argv[1]), kept, *sys.argv[2:])
    print(f"{result.total()} inputs: {dict(result)}")
    raise SystemExit(result["broken"] > 0)
