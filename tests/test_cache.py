"""--cache and --split-file: the same bits with and without, whole files only, parts as told."""

import multiprocessing
import os
import pickle
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Callable

import numpy as np
import pytest
import torch
from PIL import Image

import cass
import data
import dino
import finetune
from data import DataError, ImageCache, ImageRows, augmentation, make_loader, read_images
from data import split_images, write_split
from helpers import class_folders, noise, put, sentence

fork = multiprocessing.get_context("fork")


def mixed(folder: Path) -> Path:
    """Images of many modes, sizes and endings, one of them turned by its EXIF."""
    put(folder, "a/0.png", "a/1.jpg", "b/2.bmp")
    noise(3, 70, 33).convert("L").save(folder / "a" / "grey.png")
    noise(4, 33, 70).convert("P").save(folder / "b" / "palette.gif")
    noise(5, 40, 40).convert("RGBA").save(folder / "b" / "alpha.png")
    noise(6, 50, 20).convert("CMYK").save(folder / "b" / "cmyk.tif")
    deep = np.random.default_rng(7).integers(0, 9999, (31, 30), dtype=np.uint16)
    Image.fromarray(deep).save(folder / "a" / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(8, 60, 20).save(folder / "a" / "turned.jpg", exif=exif)
    return folder


def resized(image: Image.Image, size: int) -> np.ndarray:
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# %% what comes out of it


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_to_the_bit(tmp_path: Path, workers: int) -> None:
    images = read_images(mixed(tmp_path / "set"))
    cache = ImageCache(images, 32, tmp_path / "cache", workers)
    dino_views = dino.DinoViews(32)

    def views(image: Image.Image) -> torch.Tensor:
        return torch.cat([view.flatten() for view in sum(dino_views(image), [])])
    for transform in (augmentation(32, "none"), augmentation(32, "blur+solarize"), views):
        def batches(cache: ImageCache | None) -> list[torch.Tensor]:
            rows = ImageRows(images, images.rows[::-1], transform, 3, cache=cache)
            loader = make_loader(rows, 3, seed=3, workers=workers and transform is not views)
            return [b for epoch in (0, 1) if loader.set_epoch(epoch) is None for b in loader]
        assert all(map(torch.equal, batches(cache), batches(None))) and len(batches(cache)) == 6


RUNS = {
    "cass": (cass, "--cnn test_resnet --transformer test_vit --epochs 2"),
    "dino": (dino, "--arch test_resnet --out-dim 16 --epochs 2"),
    "finetune": (finetune, "--arch test_resnet --epochs 2"),
}


@pytest.mark.parametrize("method", RUNS)
def test_weights_are_the_same_to_the_bit(method: str, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    folder = class_folders(tmp_path / "set", a=12, b=12)
    module, options = RUNS[method]
    common = ["--data", str(folder), *options.split(), "--init", "random", "--image-size", "32",
              "--batch-size", "8", "--workers", "0"]
    cached = [*common, "--cache", str(tmp_path / "cache")]
    module.main([*common, "--out", str(tmp_path / "plain")])
    module.main([*cached, "--out", str(tmp_path / "first")])
    monkeypatch.setattr("images.load_image", lambda path, *_: pytest.fail(f"{path} was decoded"))
    module.main([*cached, "--out", str(tmp_path / "second")])
    files = [p.name for p in (tmp_path / "plain").glob("*.pt") if "checkpoint" not in p.name]
    assert files and len(names(tmp_path / "cache")) == 1
    for file in files:
        plain, *others = (torch.load(tmp_path / run / file, weights_only=True)["state_dict"]
                          for run in ("plain", "first", "second"))
        assert all(torch.equal(plain[key], other[key]) for other in others for key in plain)


def test_one_array_of_bytes_in_the_order_of_the_paths(tmp_path: Path) -> None:
    images = read_images(class_folders(tmp_path / "set", a=3, b=2))
    cache = ImageCache(images, 8, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    array = np.memmap(file, np.uint8, "r", shape=(5, 8, 8, 3))
    for i, path in enumerate(sorted(row.path for row in images.rows)):
        wanted = resized(data.load_image(images.folder / path), 8)
        assert np.array_equal(array[i], wanted)
        assert np.array_equal(np.asarray(cache[path]), wanted)


def test_cache_goes_to_a_spawned_process(tmp_path: Path) -> None:
    images = read_images(class_folders(tmp_path / "set", a=200))
    cache = ImageCache(images, 32, tmp_path / "cache")
    sent = pickle.dumps(cache)
    assert len(sent) < 20_000  # the way there, not the pixels
    assert np.array_equal(np.asarray(pickle.loads(sent)["a/7.png"]), np.asarray(cache["a/7.png"]))


# %% when it is made anew


def other_pixels(file: Path) -> None:
    noise(99).save(file)


def same_size_and_time(file: Path) -> None:
    before, other = file.stat(), file.with_name("other.bmp")
    noise(98).save(other)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns + 1))  # one nanosecond later
    other.replace(file)


@pytest.mark.parametrize("ending, change", [("png", other_pixels), ("bmp", same_size_and_time)])
def test_changed_image_is_seen(tmp_path: Path, ending: str, change: Callable) -> None:
    images = read_images(put(tmp_path / "set", f"a/0.{ending}", f"a/1.{ending}"))
    before = ImageCache(images, 20, tmp_path / "cache")
    change(tmp_path / "set" / "a" / f"1.{ending}")
    after = ImageCache(images, 20, tmp_path / "cache")
    wanted = resized(data.load_image(tmp_path / "set" / "a" / f"1.{ending}"), 20)
    assert np.array_equal(np.asarray(after[f"a/1.{ending}"]), wanted)
    assert not np.array_equal(np.asarray(before[f"a/1.{ending}"]), wanted)


def test_each_size_and_each_list_of_files_has_its_own(tmp_path: Path) -> None:
    folder, cache = class_folders(tmp_path / "set", a=3), tmp_path / "cache"
    images = read_images(folder)
    for size in (8, 16, 8):
        assert ImageCache(images, size, cache)["a/0.png"].size == (size, size)
    assert len(names(cache)) == 2
    shutil.copytree(folder, tmp_path / "copy")  # same names, sizes and times, perhaps others
    ImageCache(read_images(tmp_path / "copy"), 8, cache)
    put(folder, "a/9.png")
    ImageCache(read_images(folder), 8, cache)
    assert len(names(cache)) == 4
    images.rows.reverse()  # the order of the rows is not the order of the files
    ImageCache(images, 16, cache)
    ImageCache(split_images(images), 16, cache)
    assert len(names(cache)) == 4


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b + b"x"])
def test_file_of_a_wrong_length_is_made_anew(tmp_path: Path, damage: Callable) -> None:
    images = read_images(class_folders(tmp_path / "set", a=3))
    ImageCache(images, 8, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    ImageCache(images, 8, tmp_path / "cache")
    assert file.read_bytes() == whole


# %% killed, crowded, full


def slow(monkeypatch: pytest.MonkeyPatch, fast: int, seconds: float) -> None:
    """Put a decoder that is as fast as ever for `fast` images, then slow."""
    load, left = data.load_image, [fast]

    def slow_load(path: Path, *window) -> Image.Image:
        left[0] -= 1
        time.sleep(seconds if left[0] < 0 else 0)
        return load(path, *window)
    monkeypatch.setattr("images.load_image", slow_load)


def test_killed_half_way_leaves_nothing_that_counts(tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    images, cache = read_images(class_folders(tmp_path / "set", a=70)), tmp_path / "cache"
    with monkeypatch.context() as patch:
        slow(patch, 40, 60)
        process = fork.Process(target=ImageCache, args=(images, 32, cache))
        process.start()
        deadline = time.time() + 20
        while not list(cache.glob("*.tmp")) and time.time() < deadline:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    (left,) = names(cache)
    assert left.endswith(".tmp")
    built = ImageCache(images, 32, cache)
    assert np.array_equal(np.asarray(built["a/69.png"]), resized(noise(69), 32))


def test_two_that_build_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, cache = read_images(class_folders(tmp_path / "set", a=40)), tmp_path / "cache"

    def build() -> None:
        built = ImageCache(images, 32, cache)
        for n in range(40):
            assert np.array_equal(np.asarray(built[f"a/{n}.png"]), resized(noise(n), 32))
    with monkeypatch.context() as patch:
        slow(patch, 0, 0.01)  # 0.4 s each, so that they overlap
        processes = [fork.Process(target=build) for _ in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(names(cache)) == 1 and not list(cache.glob("*.tmp"))


def test_a_damaged_image_or_ctrl_c_leaves_nothing(tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    images = read_images(class_folders(tmp_path / "set", a=3))
    (tmp_path / "set" / "a" / "1.png").write_bytes(b"x")
    for workers in (0, 1):
        with pytest.raises(DataError, match="set/a/1.png can't be read"):
            ImageCache(images, 8, tmp_path / "cache", workers)
    (tmp_path / "set" / "a" / "1.png").unlink()
    with pytest.raises(DataError, match="set/a/1.png can't be read"):
        ImageCache(images, 8, tmp_path / "cache")
    put(tmp_path / "set", "a/1.png")

    def stop(*_) -> None:
        raise KeyboardInterrupt
    monkeypatch.setattr("images.load_image", stop)
    with pytest.raises(KeyboardInterrupt):
        ImageCache(images, 8, tmp_path / "cache")
    assert names(tmp_path / "cache") == []


def test_no_room_and_no_right_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = read_images(class_folders(tmp_path / "set", a=3))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="--cache .*file can't be written"):
        ImageCache(images, 8, tmp_path / "file")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=575))
    with pytest.raises(DataError, match="GB left"):
        ImageCache(images, 8, tmp_path / "cache")  # 3 * 8 * 8 * 3 = 576 bytes


def test_damaged_image_stops_a_cached_run_before_it_begins(tmp_path: Path,
                                                           capsys: pytest.CaptureFixture) -> None:
    folder = class_folders(tmp_path / "set", a=10)
    (folder / "a" / "cut.png").write_bytes((folder / "a" / "0.png").read_bytes()[:100])
    module, options = RUNS["cass"]
    command = ["--data", str(folder), "--out", str(tmp_path / "out"), "--cache",
               str(tmp_path / "cache"), *options.split(), "--init", "random", "--epochs", "1",
               *"--image-size 32 --batch-size 4 --workers 0".split()]
    assert "cut.png" in sentence(capsys, lambda: module.main(command))
    assert not (tmp_path / "out").exists()
    module.main([*command, "--skip-bad"])
    assert (tmp_path / "out" / "cnn.pt").is_file()


# %% --split-file


def split_file(folder: Path, file: Path, parts: dict[str, str]) -> list[str]:
    """A split.csv that gives each image of `parts` its part, and the options that use it."""
    images = read_images(folder)
    images.rows = [replace(row, split=parts[row.path]) for row in images.rows if row.path in parts]
    write_split(file, images)
    return ["--data", str(folder), "--split-file", str(file)]


def test_split_file_sets_the_parts_and_leaves_the_rest_out(tmp_path: Path,
                                                           capsys: pytest.CaptureFixture) -> None:
    folder = class_folders(tmp_path / "set", a=6, b=6)
    parts = {f"{c}/{i}.png": part for c in "ab"
             for i, part in enumerate(("test", "train", "train", "val", "train"))}
    options = split_file(folder, tmp_path / "mine.csv", parts)
    data.main([*options, "--split-seed", "7"])
    said = capsys.readouterr().out
    assert "10 images" in said and f"2 images that {tmp_path / 'mine.csv'} does not name" in said
    assert ["images", "6", "2", "2", "10"] in [line.split() for line in said.splitlines()]


def test_split_file_takes_the_place_of_the_folders_own(tmp_path: Path,
                                                       capsys: pytest.CaptureFixture) -> None:
    folder = put(tmp_path / "set", *(f"{part}/a/{i}.png" for part in ("train", "test")
                                     for i in range(2)))
    parts = {"train/a/0.png": "train", "train/a/1.png": "val", "test/a/1.png": "test"}
    data.main(split_file(folder, tmp_path / "mine.csv", parts))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["images", "1", "1", "1", "3"] in lines


def test_split_file_that_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = class_folders(tmp_path / "set", a=6)
    options = split_file(folder, tmp_path / "mine.csv", {"a/0.png": "train", "a/1.png": "test"})
    (folder / "a" / "1.png").unlink()
    said = sentence(capsys, lambda: data.main(options))
    assert "mine.csv" in said and "a/1.png" in said
    options[-1] = str(tmp_path / "gone.csv")
    assert "gone.csv" in sentence(capsys, lambda: data.main(options))


def test_damaged_images_that_the_split_names_can_be_skipped(tmp_path: Path,
                                                            capsys: pytest.CaptureFixture) -> None:
    folder = class_folders(tmp_path / "set", a=4)
    options = split_file(folder, tmp_path / "mine.csv", {f"a/{i}.png": "train" for i in range(3)})
    (folder / "a" / "1.png").write_bytes(b"")
    data.main([*options, "--skip-bad"])
    said = capsys.readouterr().out
    assert "2 images" in said and "1 images that can't be read are left out" in said
