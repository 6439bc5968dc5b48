"""--cache: the same bits with and without, and whole files only."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dino
from data import (ImageCache, ImageRows, augmentation, load_image, make_loader, read_images,
                  with_window)
from helpers import class_folders, command, complaint, equal, noise, put, weights_in


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


def files(folder: Path) -> list[Path]:
    """What a cache holds of images."""
    return sorted(folder.glob("*.rgb"))


VIEWS = dino.DinoViews(32)


def dino_views(image: Image.Image) -> torch.Tensor:
    return torch.cat([view.flatten() for view in sum(VIEWS(image), [])])


@pytest.mark.parametrize("transform", [
    augmentation(32, "none"), augmentation(32, "blur+solarize"), dino_views])
def test_batches_are_the_same_to_the_bit(tmp_path: Path, transform: Callable) -> None:
    """With a cache or without, with workers or without, and after a pass that was broken off."""
    images = with_window(read_images(mixed(tmp_path / "set")), (1000, 9000))

    def batches(workers: int, cache: ImageCache | None = None) -> list[torch.Tensor]:
        rows = ImageRows(images, images.rows[::-1], transform, 3, cache=cache)
        loader = make_loader(rows, 3, seed=3, workers=workers)
        next(iter(loader))
        first = list(loader)
        loader.set_epoch(1)
        return [*first, *loader]
    before, plain = torch.get_rng_state(), batches(0)
    assert len(plain) == 4 and not torch.equal(plain[0], plain[2])
    assert equal(batches(2), plain)
    for workers in (0, 2):
        cache = ImageCache(tmp_path / f"cache-{workers}", 32)
        assert equal(batches(workers, cache), plain)
        assert len(files(tmp_path / f"cache-{workers}")) == len(images.rows)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name, options, networks", [
    ("cass", "", ["cnn.pt", "transformer.pt"]),
    ("dino", "", ["backbone.pt"]),
    ("finetune", "--arch test_resnet", ["test_resnet.pt"])])
def test_weights_are_the_same_to_the_bit(name: str, options: str, networks: list[str],
                                         tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a run that fills the cache, and by one that decodes nothing."""
    folder, cache = class_folders(tmp_path / "set", a=6, b=6), ["--cache", tmp_path / "cache"]
    command(name, folder, tmp_path / "plain", options)
    command(name, folder, tmp_path / "first", options, *cache)
    monkeypatch.setattr("images.load_image", lambda path, *_: pytest.fail(f"{path} was decoded"))
    command(name, folder, tmp_path / "second", options, *cache)
    for file in networks:
        plain = weights_in(tmp_path / "plain" / file)
        assert equal(weights_in(tmp_path / "first" / file), plain)
        assert equal(weights_in(tmp_path / "second" / file), plain)


def test_each_size_window_and_changed_image_has_a_file_of_its_own(tmp_path: Path) -> None:
    path, folder = put(tmp_path / "set", "0.bmp") / "0.bmp", tmp_path / "cache"
    for size, window, count in ((8, None, 1), (16, None, 2), (8, (0, 9), 3), (8, None, 3)):
        assert ImageCache(folder, size).load(path, window).size == (size, size)
        assert len(files(folder)) == count
    time_before = path.stat().st_mtime_ns
    noise(98).save(path)  # of the same size
    os.utime(path, ns=(0, time_before + 1))
    found = ImageCache(folder, 8).load(path)
    assert np.array_equal(np.asarray(found), resized(noise(98), 8)) and len(files(folder)) == 4


def test_file_that_is_cut_off_is_made_anew(tmp_path: Path) -> None:
    path, cache = put(tmp_path / "set", "0.png") / "0.png", ImageCache(tmp_path / "cache", 8)
    cache.load(path)
    (file,) = files(tmp_path / "cache")
    whole = file.read_bytes()
    for damaged in (whole[:-1], b""):
        file.write_bytes(damaged)
        assert cache.load(path).tobytes() == whole == file.read_bytes()


def test_nothing_half_written_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged image, a removed one, and an end before the renaming."""
    path, cache = put(tmp_path / "set", "0.png") / "0.png", ImageCache(tmp_path / "cache", 8)

    def stop(*_) -> None:
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", stop)
        cache.load(path)
    assert not files(tmp_path / "cache")
    assert np.array_equal(np.asarray(cache.load(path)), resized(load_image(path), 8))
    path.write_bytes(b"x")
    complaint(lambda: cache.load(path), "set/0.png can't be read")
    path.unlink()
    complaint(lambda: cache.load(path), "set/0.png can't be read")


def test_another_may_write_the_same_file_meanwhile(tmp_path: Path, monkeypatch) -> None:
    """Also in another container, where it may have the same process number."""
    path, rename = put(tmp_path / "set", "0.png") / "0.png", os.replace
    cache, other = (ImageCache(tmp_path / "cache", 8) for _ in range(2))

    def late(*files) -> None:
        monkeypatch.setattr(os, "replace", rename)
        other.load(path)
        rename(*files)
    monkeypatch.setattr(os, "replace", late)
    assert cache.load(path).tobytes() == other.load(path).tobytes()
    assert len(list((tmp_path / "cache").iterdir())) == 2  # the image and the tag


def test_folder_that_goes_or_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = put(tmp_path / "set", "0.png") / "0.png", ImageCache(tmp_path / "cache", 8)
    shutil.rmtree(tmp_path / "cache")
    cache.load(path)
    assert len(files(tmp_path / "cache")) == 1

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(Path, "write_bytes", full)
    complaint(lambda: cache.load(path), "--cache", "cache can't be written: No space left")
