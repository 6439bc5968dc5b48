"""extras/audit.py: what was planted is found, what was not is not; the split it writes does not leak."""

import csv
import json
import time
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


def run(folder: Path, *more: str) -> dict:
    """The findings of the command; the report is put beside the folder."""
    out = folder.with_name(folder.name + "-report")
    audit.main(["--data", str(folder), "--out", str(out), *more])
    return json.loads((out / "audit.json").read_text(encoding="utf-8"))


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """Train 0-9, val 10-13, test 20-29, all different, and then: train 0 again as test/cat/100; train 1 again as a
    BMP in train; train 2 brightened as test/dog/102, under another label; val 10 again as test/cat/110;
    test 20 again in test; train 3 again in val."""
    folder = tmp_path / "set"
    images = {f"{part}_{'cat' if n % 2 == 0 else 'dog'}_{n}": scene(n)
              for part, some in (("train", range(10)), ("val", range(10, 14)), ("test", range(20, 30))) for n in some}
    save(folder, **images, test_cat_100=scene(0), test_dog_102=ImageEnhance.Brightness(scene(2)).enhance(0.8),
         test_cat_110=scene(10), test_cat_120=scene(20), val_dog_3=scene(3))
    scene(1).save(folder / "train" / "dog" / "again.bmp")
    return folder


def test_planted_flaws_are_found_and_no_others(planted: Path, capsys: pytest.CaptureFixture) -> None:
    found = run(planted)
    equal, near = found["equal pixels"], found["near duplicates"]
    assert found["images"] == 30 and found["unreadable"] == [] and found["one-coloured"] == []
    assert equal["repeats"] == {"train": 1, "val": 0, "test": 1}
    assert equal["test files in training or validation"] == ["test/cat/100.png", "test/cat/110.png"]
    assert equal["distinct test images in training or validation"] == 2
    assert equal["validation files in training"] == ["val/dog/3.png"] and equal["different labels"] == []
    assert sorted(map(sorted, equal["sets"])) == [
        ["test/cat/100.png", "train/cat/0.png"], ["test/cat/110.png", "val/cat/10.png"],
        ["test/cat/120.png", "test/cat/20.png"], ["train/dog/1.png", "train/dog/again.bmp"],
        ["train/dog/3.png", "val/dog/3.png"]]
    (pair,) = near["pairs"]
    assert sorted(pair[:2]) == ["test/dog/102.png", "train/cat/2.png"] and pair[2] <= 4 and pair[3] > 0.98
    assert near["pairs by distance"] == near["across parts by distance"] == {str(pair[2]): 1}
    assert near["different labels"] == [pair[:3]]
    assert near["more test files near training or validation"] == ["test/dog/102.png"]
    said = capsys.readouterr().out
    assert "! leaks        2 distinct test images (2 files)" in said and "! labels " in said and "  groups " in said


@pytest.mark.parametrize("kind, gone", [([], {"cat/100", "cat/110"}), (["exact"], {"cat/100", "cat/110"}),
                                        (["near"], {"cat/100", "cat/110", "dog/102"})])
def test_written_split_leaves_out_leaking_test_images_alone(planted: Path, kind: list[str], gone: set[str]) -> None:
    (planted / "test" / "dog" / "broken.png").write_text("no image")
    run(planted, "--write-split", *kind)
    file = planted.with_name("set-report") / "split.csv"
    rows = data.read_split(file, data.read_images(planted)).rows
    before = data.split_images(data.read_images(planted)).rows
    left = {row.path for row in before} - {row.path for row in rows}
    assert left == {f"test/{name}.png" for name in gone} | {"test/dog/broken.png"}
    assert set(rows) <= set(before)  # parts and labels as they were
    again = run(planted, "--split-file", str(file))  # the split it wrote is clean
    assert again["equal pixels"]["test files in training or validation"] == []
    assert bool(again["near duplicates"]["more test files near training or validation"]) == (kind != ["near"])


def test_equal_pixels_whatever_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    grey = scene(1).convert("L")
    save(folder, a_1=scene(0), b_2=scene(0), a_3=grey, a_4=grey.convert("RGB"), a_5=scene(0).rotate(90))
    scene(0).save(folder / "a" / "6.tif", compression="tiff_lzw")
    found = run(folder)
    sets = sorted(map(sorted, found["equal pixels"]["sets"]))
    assert sets == [["a/1.png", "a/6.tif", "b/2.png"], ["a/3.png", "a/4.png"]]
    (conflict,) = found["equal pixels"]["different labels"]
    assert "b/2.png" in conflict and len(conflict) == 2
    assert found["modes"] == {"RGB": 5, "L": 1} and found["coloured"] == {"a": 3, "b": 1}


def test_one_other_label_in_a_large_set_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    save(folder, **{f"{'odd' if n == 33 else 'even'}_{n}": scene(0) for n in range(70)})
    found = run(folder)["equal pixels"]
    assert len(found["sets"][0]) == 70 and len(found["different labels"]) == 1
    assert "odd/33.png" in found["different labels"][0]


def test_what_counts_as_near(tmp_path: Path) -> None:
    """Saved anew, made smaller, brighter or of more contrast: near. Another image, a mirrored one: not."""
    folder = tmp_path / "set"
    image = scene(5, 120)
    save(folder, a_1=image, a_half=image.resize((60, 60)), a_contrast=ImageEnhance.Contrast(image).enhance(1.2),
         a_mirrored=image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), a_other=scene(6, 120))
    image.save(folder / "a" / "jpeg.jpg", quality=40)
    pairs = run(folder)["near duplicates"]["pairs"]
    names = ["a/1.png", "a/contrast.png", "a/half.png", "a/jpeg.jpg"]
    assert {frozenset(p[:2]) for p in pairs} == {frozenset((x, y)) for i, x in enumerate(names) for y in names[:i]}
    assert run(folder, "--near", "0")["near duplicates"]["pairs by distance"].keys() <= {"0"}


def test_near_pairs_equal_a_loop_over_all_pairs() -> None:
    rng = np.random.default_rng(0)
    signs = rng.random((700, audit.BITS)) < 0.5
    signs[600:] = signs[:100] ^ (rng.random((100, audit.BITS)) < 0.04)
    copies = rng.integers(0, 256, (700, 32, 32), dtype=np.uint8)
    copies[600:] = copies[:100]
    copies[650:] = 255 - copies[:50]
    wanted = set()
    for i in range(700):
        distances = (signs[i] != signs[i + 1:]).sum(1)
        for j in np.flatnonzero(distances <= 3) + i + 1:
            if np.corrcoef(copies[i].ravel(), copies[j].ravel())[0, 1] >= audit.LIKENESS:
                wanted.add((i, int(j), int((signs[i] != signs[j]).sum())))
    assert {pair[:3] for pair in audit.near_pairs(signs, copies, 3)} == wanted and len(wanted) > 20
    assert max(i for i, _, _ in wanted) < 50  # from there on the copies are unlike, though the signs are near


def test_search_is_fast_enough_for_25000_images() -> None:
    """An eighth of the images is a sixty-fourth of the pairs: two minutes on two cores are 1.9 s here."""
    rng = np.random.default_rng(0)
    begun = time.perf_counter()
    list(audit.near_pairs(rng.random((3125, audit.BITS)) < 0.5, rng.integers(0, 256, (3125, 32, 32), np.uint8), 4))
    assert time.perf_counter() - begun < 1.9


def test_damage_and_oddities(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "set"
    save(folder, **{f"a_{n}": scene(n) for n in range(30)}, b_wide=scene(50).resize((200, 64)), b_small=scene(51, 16),
         b_black=Image.new("RGB", (64, 64)), b_grey=scene(52).convert("L"), b_white=Image.new("RGB", (64, 64), "white"))
    (folder / "a" / "cut.png").write_bytes((folder / "a" / "0.png").read_bytes()[:300])
    (folder / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    found = run(folder)
    assert len(found["unreadable"]) == 2
    assert "cut.png" in found["unreadable"][0] and "gone.png" in found["unreadable"][1]
    assert found["one-coloured"] == ["b/black.png", "b/white.png"] and found["near duplicates"]["pairs"] == []
    assert found["sizes out of line"] == ["b/small.png", "b/wide.png"] and found["modes out of line"] == ["b/grey.png"]
    assert found["classes"] == {"a": 30, "b": 5}
    said = capsys.readouterr().out
    for line in ("! unreadable   2 images", "! one-coloured 2 images", "! sizes        2 out of line",
                 "modes        34 RGB, 1 L; 1 out of line", "  classes      the largest has 6.0 times"):
        assert line in said, said


def test_group_in_two_parts_and_uneven_classes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "set"
    save(folder, **{f"x_{n}": scene(n) for n in range(24)})
    lines = [f"x/{n}.png,{'often' if n else 'rare'},p{n // 4},{data.PARTS[n // 4 % 3]}" for n in range(24)]
    lines[8] = "x/8.png,often,p0,test"
    (folder / "labels.csv").write_text("\n".join(["image,label,group,split", *lines]) + "\n")
    assert run(folder)["groups in several parts"] == {"p0": ["train", "test"]}
    said = capsys.readouterr().out
    assert "! groups       1 stand in several parts" in said
    assert "! classes      the largest has 23.0 times the images of the smallest" in said


def test_colour_that_tells_the_class(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    grey = [scene(n).convert("L") for n in range(6)]
    save(tmp_path / "set", **{f"grey_{n}": grey[n] for n in range(6)}, **{f"not_{n}": scene(n + 9) for n in range(6)})
    run(tmp_path / "set")
    assert "! " + " " * 13 + "0% of grey are in colour, 100% of not" in capsys.readouterr().out
    save(tmp_path / "set", **{f"not_{n}": image.rotate(90).convert("RGB") for n, image in enumerate(grey)})
    run(tmp_path / "set")  # stored in colour, but grey: nothing can be told from that
    assert "in colour" not in capsys.readouterr().out


def test_contact_sheet_shows_the_worst_pairs(planted: Path) -> None:
    run(planted)
    with Image.open(planted.with_name("set-report") / "pairs.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"), int)
    assert pixels.shape[1] > 1000 and pixels.shape[0] > 400
    # The first pair is the one with different labels: both images stand in the top row, with captions in black below.
    left, right = (np.asarray(ImageOps.contain(load_image(planted / name), (190, 190)), int)  # small ones are enlarged
                   for name in ("test/dog/102.png", "train/cat/2.png"))
    seen = [any(np.abs(pixels[26:216, x:x + 190] - image).mean() < 3 for x in (8, 206)) for image in (left, right)]
    assert seen == [True, True]
    assert (pixels[215:265, :400].sum(2) < 100).sum() > 200


def test_nothing_to_show(tmp_path: Path) -> None:
    save(tmp_path / "set", a_1=scene(1), a_2=scene(2))
    run(tmp_path / "set")
    assert [p.name for p in (tmp_path / "set-report").iterdir()] == ["audit.json"]


def test_user_errors_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "is not a folder" in sentence(capsys, lambda: run(tmp_path / "gone"))
    folder = put(tmp_path / "set", "train/a/1.png", "test/a/2.png")
    for file in folder.rglob("*.png"):
        scene(0).save(file)
    assert "every test image" in sentence(capsys, lambda: run(folder, "--write-split"))
    for file in folder.rglob("*.png"):
        file.write_text("x")
    assert "no image that can be read" in sentence(capsys, lambda: run(folder))


def test_folder_is_left_as_it_is(planted: Path) -> None:
    before = {str(p): p.stat().st_mtime_ns for p in planted.rglob("*")}
    run(planted, "--write-split")
    assert {str(p): p.stat().st_mtime_ns for p in planted.rglob("*")} == before
    with open(planted.with_name("set-report") / "split.csv", newline="") as file:
        assert next(csv.reader(file)) == ["path", "split", "labels", "group"]


def test_scores_with_and_without_leaks(planted: Path, capsys: pytest.CaptureFixture) -> None:
    """A network that knows the leaking cats, and one cat of the six others; to all else it says dog."""
    rows = data.split_images(data.read_images(planted)).part("test")
    file = planted.with_name("predictions.csv")
    file.write_text("seed,image,truth,class,net: class\n" + "".join(
        f"{seed},{row.path},{row.labels[0]},{said},{said}\n" for seed in (0, 1) for row in rows
        for said in ["cat" if Path(row.path).stem in ("100", "110", "20") else "dog"]))
    run(planted, "--predictions", str(file))
    said = capsys.readouterr().out
    assert "14 test images, 2 leaking (2 cat); seeds: 2" in said
    # All: 3 of 8 cats, 6 of 6 dogs with 5 errors; without the leaking ones: 1 of 6 cats, 6 of 6 dogs with 5 errors.
    assert f"net: macro F1 {(6 / 11 + 12 / 17) / 2:.4f} +- 0.0000, without the leaking images {(2 / 7 + 12 / 17) / 2:.4f}" in said
    assert f"right: 1.0000 +- 0.0000 of the leaking, {1 / 6:.4f} +- 0.0000 of others of the same classes" in said
    file.write_text(file.read_text().replace("test/cat/20.png", "train/cat/0.png"))  # of another split
    assert "--split-file" in sentence(capsys, lambda: run(planted, "--predictions", str(file)))
    file.write_text("image,class\na.png,cat\n")  # that of finetune.py --predict, which knows no truth
    assert "predictions.csv" in sentence(capsys, lambda: run(planted, "--predictions", str(file)))
