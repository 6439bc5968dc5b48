"""--cache and --split-file: the same bits with and without, whole files only, parts as told."""

import errno
import os
import shutil
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


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_the_same_to_the_bit(tmp_path: Path, workers: int) -> None:
    images = read_images(mixed(tmp_path / "set"))
    cache = ImageCache(tmp_path / "cache", 32)
    dino_views = dino.DinoViews(32)

    def views(image: Image.Image) -> torch.Tensor:
        return torch.cat([view.flatten() for view in sum(dino_views(image), [])])
    for transform in (augmentation(32, "none"), augmentation(32, "blur+solarize"), views):
        def batches(cache: ImageCache | None) -> list[torch.Tensor]:
            rows = ImageRows(images, images.rows[::-1], transform, 3, cache=cache)
            loader = make_loader(rows, 3, seed=3, workers=workers and transform is not views)
            return [b for epoch in (0, 1) if loader.set_epoch(epoch) is None for b in loader]
        assert all(map(torch.equal, batches(cache), batches(None))) and len(batches(cache)) == 4
    assert len(files(tmp_path / "cache")) == len(images.rows)


RUNS = [(cass, "--cnn test_resnet --transformer test_vit"),
        (dino, "--arch test_resnet --out-dim 16"), (finetune, "--arch test_resnet")]


@pytest.mark.parametrize("module, options", RUNS, ids=("cass", "dino", "finetune"))
def test_weights_are_the_same_to_the_bit(module, options: str, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """By a run that fills the cache, and by one that decodes nothing."""
    common = ["--data", str(class_folders(tmp_path / "set", a=6, b=6)), *options.split(),
              "--init", "random", "--image-size", "32", "--batch-size", "8", "--workers", "0",
              "--epochs", "1", "--cache"]
    module.main([*common[:-1], "--out", str(tmp_path / "plain")])
    module.main([*common, str(tmp_path / "cache"), "--out", str(tmp_path / "first")])
    monkeypatch.setattr("images.load_image", lambda path, *_: pytest.fail(f"{path} was decoded"))
    module.main([*common, str(tmp_path / "cache"), "--out", str(tmp_path / "second")])
    networks = [p.name for p in (tmp_path / "plain").glob("*.pt") if "checkpoint" not in p.name]
    assert networks
    for file in networks:
        plain, *cached = (torch.load(tmp_path / run / file, weights_only=True)["state_dict"]
                          for run in ("plain", "first", "second"))
        for weights in cached:
            assert all(torch.equal(plain[key], weights[key]) for key in plain)


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
    with pytest.raises(DataError, match="set/0.png can't be read"):
        cache.load(path)
    path.unlink()
    with pytest.raises(DataError, match="set/0.png can't be read"):
        cache.load(path)


def test_folder_that_cant_be_written_or_goes(tmp_path: Path, monkeypatch) -> None:
    """The first is said when the cache is opened, before anything is trained."""
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="--cache .*file can't be written"):
        ImageCache(tmp_path / "file", 8)
    path, cache = put(tmp_path / "set", "0.png") / "0.png", ImageCache(tmp_path / "cache", 8)
    shutil.rmtree(tmp_path / "cache")
    cache.load(path)
    assert len(files(tmp_path / "cache")) == 1

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DataError, match="--cache .*cache can't be written: No space left"):
        cache.load(path)


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
