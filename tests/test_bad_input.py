"""Input as it comes in life, through the commands: it works as a person expects, or one sentence names file or row."""

import math
import os
import struct
import zlib
from pathlib import Path
from typing import Callable

import numpy as np
import pytest
import torch
from PIL import Image

import cass
import data
import finetune
from data import load_image, read_images
from helpers import class_folders, labels_csv, noise, put, sentence

TINY = "--init random --image-size 32 --batch-size 4 --workers 0 --epochs 1".split()


def train(folder: Path, out: Path, *more: str) -> None:
    arms = ["--cnn", "test_resnet", "--transformer", "test_vit"]
    cass.main(["--data", str(folder), "--out", str(out), *TINY, *arms, *more])


def tiff(file: Path, pixels: np.ndarray, photometric: int, extra: list[int]) -> None:
    """A TIFF as microscopes write it: `(H, W, C)` bytes, of which the last `extra` channels are no colours."""
    height, width, channels = pixels.shape
    tags = {256: [width], 257: [height], 258: [8] * channels, 259: [1], 262: [photometric], 273: [8],
            277: [channels], 278: [height], 279: [pixels.size], 338: extra}
    start = 8 + pixels.size + pixels.size % 2
    entries, long, after = b"", b"", start + 2 + 12 * len(tags) + 4
    for tag, values in tags.items():
        cells = struct.pack(f"<{len(values)}H", *values)
        if len(cells) > 4:
            cells, long = struct.pack("<I", after + len(long)), long + cells + b"\0" * (len(cells) % 4)
        entries += struct.pack("<HHI", tag, 3, len(values)) + cells.ljust(4, b"\0")
    file.write_bytes(b"II*\0" + struct.pack("<I", start) + pixels.tobytes() + b"\0" * (pixels.size % 2)
                     + struct.pack("<H", len(tags)) + entries + b"\0" * 4 + long)


def channels(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (12, 10, n), dtype=np.uint8)


def exif_turned(file: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(1, 60, 20).save(file, exif=exif)


# %% odd images that work

ODD: dict[str, Callable[[Path], object]] = {
    "one-pixel.png": lambda f: Image.new("RGB", (1, 1), (9, 8, 7)).save(f),
    "constant-16-bit.png": lambda f: Image.fromarray(np.full((9, 9), 40000, np.uint16)).save(f),
    "three-pages.tif": lambda f: noise(1).save(f, save_all=True, append_images=[noise(2), noise(3, 50, 50)]),
    "four-channels.tif": lambda f: tiff(f, channels(4), 2, [0]),
    "five-channels.tif": lambda f: tiff(f, channels(5), 2, [0, 0]),
    "animated.gif": lambda f: noise(1).save(f, save_all=True, append_images=[noise(2)]),
    "turned.jpg": exif_turned,
    "twin.png": lambda f: noise(4).save(f),
    "twin.jpg": lambda f: noise(5).save(f),
    "UPPER.PNG": lambda f: noise(6).save(f),
    "été 脳 (1).png": lambda f: noise(7).save(f),
}


def test_odd_images_are_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "set"
    (folder / "cat" / ".ipynb_checkpoints").mkdir(parents=True)
    for name, make in ODD.items():
        make(folder / "cat" / name)
    for junk in ("Thumbs.db", ".DS_Store", "._twin.png", "notes.txt", ".ipynb_checkpoints/twin-checkpoint.png"):
        (folder / "cat" / junk).write_bytes(b"junk")
    (folder / "cat" / "folder.png").mkdir()
    (folder / "cat" / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "cat" / "round").symlink_to("round", target_is_directory=True)
    assert sorted(row.path for row in read_images(folder).rows) == sorted(f"cat/{name}" for name in ODD)
    train(folder, tmp_path / "out", "--ratios", "1,0,0", "--cache", str(tmp_path / "cache"))
    state = torch.load(tmp_path / "out" / "cnn.pt", weights_only=True)["state_dict"]
    assert all(torch.isfinite(value.float()).all() for value in state.values())


@pytest.mark.parametrize("n", [4, 5])
def test_channels_beyond_the_colours_are_left_out(tmp_path: Path, n: int) -> None:
    ODD[f"{('four', 'five')[n - 4]}-channels.tif"](tmp_path / "x.tif")
    assert np.array_equal(np.asarray(load_image(tmp_path / "x.tif")), channels(n)[..., :3])


# %% images that can't be used


def cut(file: Path) -> None:
    noise(0, 100, 100).save(file)
    file.write_bytes(file.read_bytes()[:2000])


def bomb(file: Path) -> None:
    """A PNG of 60,000 x 60,000 pixels, 10.8 GB when decoded, of which only the first row is there."""
    rows = zlib.compress(b"\0" + b"\xff" * 180_000)
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))))


BAD: dict[str, Callable[[Path], object]] = {
    "cut.jpg": cut,
    "zero.png": lambda f: f.write_bytes(b""),
    "text.png": lambda f: f.write_text("hello"),
    "bomb.png": bomb,
    "no-colours.tif": lambda f: tiff(f, channels(5), 1, [0] * 4),
    "loop.png": lambda f: f.symlink_to(f),
    "dangling.png": lambda f: f.symlink_to(f.with_name("gone.png")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_image_is_named(tmp_path: Path, name: str, capsys: pytest.CaptureFixture) -> None:
    folder = class_folders(tmp_path / "set", cat=3)
    BAD[name](folder / "cat" / name)
    said = sentence(capsys, lambda: train(folder, tmp_path / "out", "--ratios", "1,0,0"))
    assert str(folder / "cat" / name) in said and not (tmp_path / "out" / "cnn.pt").exists()


def test_bad_images_can_be_skipped(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = class_folders(tmp_path / "set", cat=4)
    for name, make in BAD.items():
        make(folder / "cat" / name)
    train(folder, tmp_path / "out", "--ratios", "1,0,0", "--skip-bad")
    assert (tmp_path / "out" / "cnn.pt").is_file()
    assert (tmp_path / "out" / "split.csv").read_text().count("\n") == 5
    data.main(["--data", str(folder), "--skip-bad"])
    said = capsys.readouterr().out
    assert f"left out {len(BAD)} images that can't be read: " in said and "4 images, 1 classes" in said


def test_file_without_the_right_to_read(tmp_path: Path, capsys: pytest.CaptureFixture,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    folder, opened = class_folders(tmp_path / "set", cat=4), Image.open

    def refuse(path: Path, *rest) -> Image.Image:  # root may read all, so the refusal has to be played
        if Path(path).name == "2.png":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *rest)
    monkeypatch.setattr(Image, "open", refuse)
    said = sentence(capsys, lambda: train(folder, tmp_path / "out", "--ratios", "1,0,0"))
    assert str(folder / "cat" / "2.png") in said and "Permission" in said


def test_folder_without_the_right_to_read(tmp_path: Path, capsys: pytest.CaptureFixture,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    folder, scan = put(tmp_path / "set", "cat/0.png", "dog/secret/1.png"), os.scandir

    def refuse(path: Path):
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)
    monkeypatch.setattr(os, "scandir", refuse)
    said = sentence(capsys, lambda: data.main(["--data", str(folder)]))  # else its images would just be missing
    assert "secret" in said and "Permission denied" in said


# %% tables and classes


@pytest.mark.parametrize("text", [
    "\ufeffimage,label\na.png,cat\nb.png,dog\nc.png,cat\nd.png,dog\n",
    "image;label\r\na.png;cat\r\nb.png;dog\r\n\r\nc.png;cat\r\nd.png;dog\r\n\r\n",
    'label,image\n"cat",a.png\n" dog","b.png"\ncat ,c.png\n\tdog,d.png',
])
def test_tables_that_a_spreadsheet_writes(tmp_path: Path, text: str) -> None:
    folder = labels_csv(tmp_path / "set", text, *(f"{x}.png" for x in "abcd"))
    train(folder, tmp_path / "out", "--ratios", "1,0,0")
    written = (tmp_path / "out" / "split.csv").read_text().splitlines()
    assert written == ["path,split,labels,group", *(f"{x}.png,train,{y},"
                                                    for x, y in zip("abcd", ("cat", "dog") * 2))]


@pytest.mark.parametrize("text, words", [
    ("image,label\na.png,cat\nb.png,\n", ["labels.csv line 3", "b.png"]),
    ("image,label\na.png,cat\nb.png,CAT\n", ["'CAT' and 'cat'"]),
    ("image,label\na.png,B cells\nb.png,B  cells\n", ["'B  cells' and 'B cells'", "white space"]),
    ("image,label\na.png,B\xa0cells\nb.png,B cells\n", ["'B cells'", "white space"]),
    ("image,B cells,b cells\na.png,1,0\nb.png,0,1\n", ["'B cells' and 'b cells'"]),
    ("image,label\na.png,cat\nb,dog\n", ["labels.csv line 3", "names b"]),
    ('image,label\na.png,cat\n"b.png,dog\n', ["labels.csv line"]),
    ("a.png,cat\nb.png,dog\n", ["labels.csv", "`image`", "prepare"]),
])
def test_tables_that_cant_be_used(tmp_path: Path, text: str, words: list[str], capsys: pytest.CaptureFixture) -> None:
    folder = labels_csv(tmp_path / "set", text, "a.png", "b.png")
    said = sentence(capsys, lambda: train(folder, tmp_path / "out"))
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


def test_one_class_can_be_pretrained_on_but_not_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = class_folders(tmp_path / "set", cat=8)
    train(folder, tmp_path / "out")
    tune = ["--data", str(folder), "--out", str(tmp_path / "tuned"), "--weights", str(tmp_path / "out"), *TINY]
    said = sentence(capsys, lambda: finetune.main(tune))
    assert "one class" in said and "cat" in said and not (tmp_path / "tuned").exists()


def test_class_with_one_image(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = class_folders(tmp_path / "set", cat=12, dog=12, rare=1)
    data.main(["--data", str(folder)])
    said = capsys.readouterr().out
    assert "note: the val part has no image of rare" in said and "note: the test part has no image of rare" in said
    finetune.main(["--data", str(folder), "--out", str(tmp_path / "out"), "--arch", "test_resnet", *TINY])
    said = capsys.readouterr().out
    assert "rare" in said and (tmp_path / "out" / "result.json").is_file()
    assert math.isfinite(float((tmp_path / "out" / "predictions.csv").read_text().splitlines()[1].rsplit(",", 1)[1]))
