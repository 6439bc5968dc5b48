"""extras/audit.py: what was planted is found, what was not is not; the split it writes is clean."""

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

import data
from data import load_image
from extras import audit
from helpers import put, sentence


def scene(seed: int, size: int = 64) -> Image.Image:
    """A smooth image like no other, as photographs are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


def save(folder: Path, **images: Image.Image) -> None:
    """`save(f, train_cat_1=image)` writes f/train/cat/1.png."""
    for name, image in images.items():
        file = folder / (name.replace("_", "/") + ".png")
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)


def run(folder: Path, *more: str) -> dict[str, list]:
    """What the command finds; the report is put beside the folder."""
    out = folder.with_name(folder.name + "-report")
    audit.main(["--data", str(folder), "--out", str(out), *more])
    return json.loads((out / "audit.json").read_text(encoding="utf-8"))


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """Train 0-9, val 10-13, test 20-29, all different, and then: train 0 again as test/cat/100;
    train 1 again as a BMP in train; train 2 darkened as test/dog/102, under another label; val 10
    again as test/cat/110; test 20 again in test; train 3 again in val."""
    folder, parts = tmp_path / "set", {"train": range(10), "val": range(10, 14),
                                       "test": range(20, 30)}
    for part, numbers in parts.items():
        save(folder, **{f"{part}_{('cat', 'dog')[n % 2]}_{n}": scene(n) for n in numbers})
    save(folder, test_cat_100=scene(0), test_dog_102=ImageEnhance.Brightness(scene(2)).enhance(0.8),
         test_cat_110=scene(10), test_cat_120=scene(20), val_dog_3=scene(3))
    scene(1).save(folder / "train" / "dog" / "again.bmp")
    return folder


def test_planted_flaws_are_found_and_no_others(planted: Path, capsys) -> None:
    found = run(planted)
    ((title, *near),) = found.pop("pairs of near duplicates")
    assert title.startswith("distance ") and float(title.split()[-1]) > 0.98
    assert near == ["test/dog/102.png", "train/cat/2.png"]
    assert {kind: entries for kind, entries in found.items() if entries} == {
        "test images that training or validation has too": ["test/cat/100.png", "test/cat/110.png"],
        "validation images that training has too": ["val/dog/3.png"],
        "more test images nearly like one there": ["test/dog/102.png"],
        "sets of equal or near images under different labels": [near],
        "repeats within train": ["train/dog/again.bmp"],
        "repeats within test": ["test/cat/20.png"]}
    said = capsys.readouterr().out
    assert "!      2 test images that training or validation has too" in said
    assert "       0 groups in several parts" in said


def test_written_split_lacks_leaking_test_images_alone(planted: Path) -> None:
    (planted / "test" / "dog" / "broken.png").write_text("no image")
    stamps = {path: path.stat().st_mtime_ns for path in planted.rglob("*")}
    images, file = data.read_images(planted), planted.with_name("set-report") / "split.csv"
    gone = ["test/cat/100.png", "test/cat/110.png", "test/dog/broken.png"]
    for kind, more in ([], []), (["near"], ["test/dog/102.png"]):
        run(planted, "--write-split", *kind)  # parts and labels are as they were
        left = [row for row in images.rows if row.path not in gone + more]
        assert data.read_split(file, images).rows == left
    again = run(planted, "--split-file", str(file))
    assert not again["test images that training or validation has too"]
    assert not again["more test images nearly like one there"]
    assert {path: path.stat().st_mtime_ns for path in planted.rglob("*")} == stamps


def test_equal_pixels_whatever_the_file(tmp_path: Path) -> None:
    folder, grey = tmp_path / "set", scene(1).convert("L")
    save(folder, train_a_1=scene(0), train_b_2=scene(0), train_a_3=grey,
         train_a_4=grey.convert("RGB"), train_a_5=scene(0).rotate(90))
    scene(0).save(folder / "train" / "a" / "6.tif", compression="tiff_lzw")
    found = run(folder, "--ratios", "1,0,0")
    (conflict,) = found["sets of equal or near images under different labels"]
    assert sorted(conflict) == ["train/a/1.png", "train/a/6.tif", "train/b/2.png"]
    assert sorted(found["repeats within train"]) == [
        "train/a/4.png", "train/a/6.tif", "train/b/2.png"]


def test_what_counts_as_near(tmp_path: Path) -> None:
    """Saved anew, made smaller or of more contrast: near. Another image, a mirrored one: not."""
    folder, image = tmp_path / "set", scene(5, 120)
    save(folder, a_1=image, a_half=image.resize((60, 60)), a_other=scene(6, 120),
         a_contrast=ImageEnhance.Contrast(image).enhance(1.2), a_mirrored=ImageOps.mirror(image))
    image.save(folder / "a" / "jpeg.jpg", quality=40)
    pairs = {tuple(pair[1:]) for pair in run(folder)["pairs of near duplicates"]}
    assert pairs == {*combinations(["a/1.png", "a/contrast.png", "a/half.png", "a/jpeg.jpg"], 2)}
    strict = run(folder, "--near", "0")["pairs of near duplicates"]
    assert all(pair[0].startswith("distance 0,") for pair in strict)


def test_near_pairs_equal_a_loop_over_all_pairs() -> None:
    rng = np.random.default_rng(0)
    signs = rng.random((700, audit.BITS)) < 0.5
    signs[600:] = signs[:100] ^ (rng.random((100, audit.BITS)) < 0.04)
    copies = rng.integers(0, 256, (700, 32, 32), dtype=np.uint8)
    copies[600:] = copies[:100]
    copies[650:] = 255 - copies[50:100]  # the signs are near, the copies unlike
    wanted = set()
    for i in range(700):
        distances = (signs[i] != signs[i + 1:]).sum(1)
        for j in np.flatnonzero(distances <= 3) + i + 1:
            if np.corrcoef(copies[i].ravel(), copies[j].ravel())[0, 1] >= audit.LIKENESS:
                wanted.add((i, int(j), int((signs[i] != signs[j]).sum())))
    assert {pair[:3] for pair in audit.near_pairs(signs, copies, 3)} == wanted
    assert len(wanted) > 20 and max(i for i, _, _ in wanted) < 50


def test_damage_and_groups_in_two_parts(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    save(folder, **{f"x_{n}": scene(n) for n in range(6)}, x_6=Image.new("RGB", (64, 64), "white"))
    (folder / "x" / "cut.png").write_bytes((folder / "x" / "0.png").read_bytes()[:300])
    lines = [f"x/{n}.png,a,p{n // 3},{'train' if n else 'test'}\n" for n in range(7)]
    (folder / "labels.csv").write_text(
        "image,label,group,split\n" + "".join(lines) + "x/cut.png,a,p3,train\n")
    found = run(folder)
    assert found["groups in several parts"] == ["p0"]
    assert found["one-coloured images"] == ["x/6.png"] and not found["pairs of near duplicates"]
    (broken,) = found["unreadable images"]
    assert "cut.png" in broken
    assert not (tmp_path / "set-report" / "pairs.png").exists()  # there is nothing to show


def test_contact_sheet_shows_the_worst_pair_first(planted: Path) -> None:
    run(planted)
    with Image.open(planted.with_name("set-report") / "pairs.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"), int)
    seen = []
    for name in ("test/dog/102.png", "train/cat/2.png"):  # their labels differ
        image = np.asarray(ImageOps.contain(load_image(planted / name), (190, 190)), int)
        places = [pixels[y:y + 190, x:x + 190] for x in (0, 198) for y in range(15, 45)]
        seen.append(any(np.abs(place - image).mean() < 3 for place in places))
    assert seen == [True, True]
    assert (pixels[236:265, :400].sum(2) < 100).sum() > 200  # captions in black


def test_user_errors_are_one_sentence(tmp_path: Path, capsys) -> None:
    assert "is not a folder" in sentence(capsys, lambda: run(tmp_path / "gone"))
    folder = put(tmp_path / "set", "train/a/1.png", "test/a/2.png")
    for file in folder.rglob("*.png"):
        scene(0).save(file)
    assert "every test image" in sentence(capsys, lambda: run(folder, "--write-split"))
    for file in folder.rglob("*.png"):
        file.write_text("x")
    assert "no image that can be read" in sentence(capsys, lambda: run(folder))
