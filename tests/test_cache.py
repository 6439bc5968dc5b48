"""--cache and --split-file: the same bits with and without, whole files only, parts as told."""

import copy
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cass
import data
import dino
import finetune
from data import (DataError, ImageCache, ImageRows, augmentation, load_image, make_loader,
                  read_images)
from helpers import class_folders, noise, put

fork = multiprocessing.get_context("fork")


def mixed(folder: Path) -> Path:
    """Images of several modes, sizes and endings, one of them turned by its EXIF."""
    put(folder, "a/0.png", "a/1.jpg", "b/2.bmp")
    noise(5, 40, 40).convert("RGBA").save(folder / "b" / "alpha.png")
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


@pytest.mark.parametrize("workers", [0, 1])
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
        assert all(map(torch.equal, batches(cache), batches(None))) and len(batches(cache)) == 4


RUNS = [(cass, "--cnn test_resnet --transformer test_vit"),
        (dino, "--arch test_resnet --out-dim 16"), (finetune, "--arch test_resnet")]


@pytest.mark.parametrize("module, options", RUNS, ids=("cass", "dino", "finetune"))
def test_weights_are_the_same_to_the_bit(module, options: str, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    folder = class_folders(tmp_path / "set", a=6, b=6)
    ImageCache(read_images(folder), 32, tmp_path / "cache")
    common = ["--data", str(folder), *options.split(), "--init", "random", "--image-size", "32",
              "--batch-size", "8", "--workers", "0", "--epochs", "1", "--out"]
    module.main([*common, str(tmp_path / "plain")])
    monkeypatch.setattr("images.load_image", lambda path, *_: pytest.fail(f"{path} was decoded"))
    module.main([*common, str(tmp_path / "cached"), "--cache", str(tmp_path / "cache")])
    files = [p.name for p in (tmp_path / "plain").glob("*.pt") if "checkpoint" not in p.name]
    assert files and len(names(tmp_path / "cache")) == 1
    for file in files:
        plain, cached = (torch.load(tmp_path / run / file, weights_only=True)["state_dict"]
                         for run in ("plain", "cached"))
        assert all(torch.equal(plain[key], cached[key]) for key in plain)


def test_one_array_of_bytes_in_the_order_of_the_paths_read_by_any_process(tmp_path: Path) -> None:
    images = read_images(class_folders(tmp_path / "set", a=20, b=2))
    cache = ImageCache(images, 32, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    array, sent = np.memmap(file, np.uint8, "r", shape=(22, 32, 32, 3)), copy.deepcopy(cache)
    assert len(pickle.dumps(sent)) < 10_000  # what a worker gets: the way there, not the pixels
    for i, path in enumerate(sorted(row.path for row in images.rows)):
        wanted = resized(load_image(images.folder / path), 32)
        assert np.array_equal(array[i], wanted)
        assert np.array_equal(np.asarray(sent[path]), wanted)


# %% when it is made anew


def test_each_size_each_list_of_files_and_each_changed_image_has_its_own(tmp_path: Path) -> None:
    folder, caches = put(tmp_path / "set", "a/0.bmp", "a/1.bmp"), tmp_path / "cache"
    images, changed = read_images(folder), folder / "a" / "1.bmp"
    for size, count in ((8, 1), (16, 2), (8, 2)):
        assert ImageCache(images, size, caches)["a/0.bmp"].size == (size, size)
        assert len(names(caches)) == count
    images.rows.reverse()  # the order of the rows is not the order of the files
    ImageCache(images, 16, caches)
    assert len(names(caches)) == 2
    shutil.copytree(folder, tmp_path / "copy")  # same names, sizes and times, perhaps others
    ImageCache(read_images(tmp_path / "copy"), 8, caches)
    assert len(names(caches)) == 3
    time_before = changed.stat().st_mtime_ns
    noise(98).save(changed)  # of the same size
    os.utime(changed, ns=(0, time_before + 1))
    after = ImageCache(images, 8, caches)
    assert np.array_equal(np.asarray(after["a/1.bmp"]), resized(noise(98), 8))
    put(folder, "a/9.png")
    ImageCache(read_images(folder), 8, caches)
    assert len(names(caches)) == 5


def test_file_of_a_wrong_length_is_made_anew(tmp_path: Path) -> None:
    images = read_images(class_folders(tmp_path / "set", a=3))
    ImageCache(images, 8, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole + b"x"):
        cache = ImageCache(images, 8, tmp_path / "cache")
        assert file.read_bytes() == whole
        file.write_bytes(damaged)
        if len(damaged) < len(whole):  # while it is in use
            with pytest.raises(DataError, match="cut off while in use"):
                cache["a/2.png"]


# %% killed, crowded, full


def slow(monkeypatch: pytest.MonkeyPatch, fast: int, seconds: float) -> None:
    """Put a decoder that is as fast as ever for `fast` images, then slow."""
    left = [fast]

    def slow_load(path: Path, *window) -> Image.Image:
        left[0] -= 1
        time.sleep(seconds if left[0] < 0 else 0)
        return load_image(path, *window)
    monkeypatch.setattr("images.load_image", slow_load)


def test_killed_half_way_leaves_nothing_that_counts(tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    images, cache = read_images(class_folders(tmp_path / "set", a=70)), tmp_path / "cache"
    with monkeypatch.context() as patch:
        slow(patch, 40, 60)
        patch.setattr(torch.cuda, "is_available", lambda: False)  # not to be used in a fork
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
    images, cache = read_images(class_folders(tmp_path / "set", a=20)), tmp_path / "cache"
    slow(monkeypatch, 0, 0.01)  # 0.2 s each, so that they overlap
    with ThreadPoolExecutor() as pool:
        for built in pool.map(lambda _: ImageCache(images, 32, cache), range(2)):
            for n in range(20):
                assert np.array_equal(np.asarray(built[f"a/{n}.png"]), resized(noise(n), 32))
    assert len(names(cache)) == 1 and not list(cache.glob("*.tmp"))


def test_a_damaged_image_or_ctrl_c_leaves_nothing(tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    images = read_images(class_folders(tmp_path / "set", a=3))
    file = tmp_path / "set" / "a" / "1.png"
    file.write_bytes(b"x")
    for workers in (0, 1):
        with pytest.raises(DataError, match="set/a/1.png can't be read"):
            ImageCache(images, 8, tmp_path / "cache", workers)
    file.unlink()
    with pytest.raises(DataError, match="set/a/1.png can't be read"):
        ImageCache(images, 8, tmp_path / "cache")
    file.touch()

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


# %% --split-file


def test_split_file_sets_the_parts_and_leaves_the_rest_out(tmp_path: Path,
                                                           capsys: pytest.CaptureFixture) -> None:
    """Also where the folder has parts of its own, and with a damaged image that can be skipped."""
    folder = put(tmp_path / "set", *(f"{part}/a/{i}.png" for part in ("train", "test")
                                     for i in range(3)))
    file, parts = tmp_path / "mine.csv", ("train", "train", "val", "test", "test")
    paths = [row.path for row in read_images(folder).rows][::-1]
    lines = [f"{path},{part}\n" for path, part in zip(paths, parts)]
    file.write_text("path,split\n" + "".join(lines))
    (folder / paths[0]).write_bytes(b"")
    data.main(["--data", str(folder), "--split-file", str(file), "--skip-bad"])
    said = capsys.readouterr().out
    assert f"1 images that {file} does not name are left out, such as {paths[-1]}" in said
    assert ["images", "1", "1", "2", "4"] in [line.split() for line in said.splitlines()]
