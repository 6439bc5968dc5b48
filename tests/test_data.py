"""data.py: every form of folder and of image, splits by their properties, augmentations by their probabilities."""

import os
import struct
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import data
from data import DataError, EpochBatches, ImageRows, ImageSet, Row, augmentation, load_image
from data import make_loader, read_images, read_split, split_images, write_split
from helpers import class_folders, labels_csv, noise, put, sentence


def found(folder: Path) -> list[tuple]:
    return [(row.path, *row.labels) for row in read_images(folder).rows]


def image_set(labels: list[tuple[str, ...]], groups: list[str] | None = None) -> ImageSet:
    """A data set without files, enough for splitting."""
    groups = groups or [""] * len(labels)
    rows = [Row(f"{i}.png", names, group) for i, (names, group) in enumerate(zip(labels, groups, strict=True))]
    classes = sorted({name for names in labels for name in names})
    return ImageSet(Path("nowhere"), rows, classes, any(len(names) != 1 for names in labels))


# %% folders


def test_class_folders(tmp_path: Path) -> None:
    images = read_images(class_folders(tmp_path, cat=2, ant=1))
    assert [(r.path, r.labels) for r in images.rows] == [
        ("ant/0.png", ("ant",)), ("cat/0.png", ("cat",)), ("cat/1.png", ("cat",))]
    assert images.classes == ["ant", "cat"] and not images.multi_label
    assert images.truth(images.rows).tolist() == [[1, 0], [0, 1], [0, 1]]


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "validation", "Testing"),
                                   ("TRAIN", "Valid", "Test")])
def test_split_folders(tmp_path: Path, names: tuple[str, ...]) -> None:
    put(tmp_path, *(f"{name}/cat/{name}.png" for name in names), "extra/cat/x.png")
    images = read_images(tmp_path)
    assert {(r.path, r.split, r.labels) for r in images.rows} == {
        (f"{name}/cat/{name}.png", part, ("cat",)) for name, part in zip(names, data.PARTS)}
    assert any("extra" in note and "not used" in note for note in images.notes)
    assert [r.split for r in split_images(images).rows] == [r.split for r in images.rows]  # nothing moves


def test_missing_validation_is_an_eighth_of_training(tmp_path: Path) -> None:
    class_folders(tmp_path / "Training", cat=24, dog=8)
    class_folders(tmp_path / "Testing", cat=3, dog=3)
    images = split_images(read_images(tmp_path))
    counts = Counter((r.split, *r.labels) for r in images.rows)
    assert counts == {("train", "cat"): 21, ("train", "dog"): 7, ("val", "cat"): 3, ("val", "dog"): 1,
                      ("test", "cat"): 3, ("test", "dog"): 3}
    assert all(r.path.startswith("Testing/") == (r.split == "test") for r in images.rows)


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    images = split_images(read_images(put(tmp_path, *(f"{i}.png" for i in range(10)))))
    assert images.classes == [] and images.truth(images.rows).shape == (10, 0)
    assert [len(images.part(part)) for part in data.PARTS] == [7, 1, 2]


def test_split_folders_of_unlabelled_images(tmp_path: Path) -> None:
    images = read_images(put(tmp_path, "train/0.png", "test/0.png"))
    assert {(r.path, r.split, r.labels) for r in images.rows} == {
        ("train/0.png", "train", ()), ("test/0.png", "test", ())}


def test_images_beside_class_folders_are_noted(tmp_path: Path) -> None:
    images = read_images(put(tmp_path, "cat/0.png", "stray.png"))
    assert [r.path for r in images.rows] == ["cat/0.png"]
    assert any("stray.png" in note and "not used" in note for note in images.notes)


def test_hidden_files_and_other_endings_are_passed_over(tmp_path: Path) -> None:
    put(tmp_path, "cat/0.png", "cat/.1.png", ".hidden/2.png", "cat/.thumbs/3.png", "__MACOSX/cat/._0.png")
    (tmp_path / "cat" / "notes.txt").write_text("x")
    assert found(tmp_path) == [("cat/0.png", "cat")]


def test_nested_folders_and_upper_case_endings_belong_to_their_class(tmp_path: Path) -> None:
    put(tmp_path, "cat/2024/may/0.JPG", "cat/1.Tiff", "cat/2.png")
    assert found(tmp_path) == [("cat/1.Tiff", "cat"), ("cat/2.png", "cat"), ("cat/2024/may/0.JPG", "cat")]


def test_symlinks_are_followed_once(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", "1.png")
    put(tmp_path / "set", "cat/0.png")
    (tmp_path / "set" / "cat" / "loop").symlink_to(tmp_path / "set" / "cat", target_is_directory=True)
    (tmp_path / "set" / "cat" / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert found(tmp_path / "set") == [("cat/0.png", "cat"), ("cat/more/1.png", "cat")]


@pytest.mark.parametrize("make, words", [
    (lambda f: None, ["holds no images", "--data"]),
    (lambda f: f.rmdir(), ["is not a folder", "--data"]),
    (lambda f: put(f, "Cat/0.png", "cat/0.png"), ["'Cat' and 'cat'", "case alone"]),
    (lambda f: put(f, "a|b/0.png"), ["'a|b'", "rename"]),
])
def test_folders_that_cant_be_used(tmp_path: Path, make, words: list[str]) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    make(folder)
    with pytest.raises(DataError) as error:
        read_images(folder)
    assert all(word in str(error.value) for word in [*words, str(folder) if "folder" in words[0] else ""])


# %% labels.csv


@pytest.mark.parametrize("text", [
    "image,diagnosis\na.png,cat\nb.png,dog\n",
    "image;diagnosis\na.png;cat\nb.png;dog\n",
    "image\tdiagnosis\na.png\tcat\nb.png\tdog\n",
    "image,diagnosis\r\na.png,cat\r\nb.png,dog\r\n",
    "\ufeffimage,diagnosis\na.png,cat\nb.png,dog",
    "diagnosis, image\ncat, a.png\n\n , \ndog, b.png\n\n",
    "image,cat,dog\na.png,1,0\nb.png,0,1\n",
    "image,cat,dog\na.png,1.0,0.0\nb.png,0.0,1.0\n",
])
def test_forms_of_labels_csv_that_say_the_same(tmp_path: Path, text: str) -> None:
    images = read_images(labels_csv(tmp_path, text, "a.png", "b.png"))
    assert [(r.path, r.labels) for r in images.rows] == [("a.png", ("cat",)), ("b.png", ("dog",))]
    assert images.classes == ["cat", "dog"] and not images.multi_label


@pytest.mark.parametrize("text", [
    "image,labels\na.png,cat|dog\nb.png,\nc.png, dog | dog\n",
    "image,cat,dog\na.png,1,1\nb.png,0,0\nc.png,0,1\n",
])
def test_several_labels_an_image(tmp_path: Path, text: str) -> None:
    images = read_images(labels_csv(tmp_path, text, "a.png", "b.png", "c.png"))
    assert [r.labels for r in images.rows] == [("cat", "dog"), (), ("dog",)]
    assert images.multi_label and images.truth(images.rows).tolist() == [[1, 1], [0, 0], [0, 1]]


def test_quoted_cells_groups_and_splits(tmp_path: Path) -> None:
    text = 'image,label,group,split\n"x, y.png","B cells, others",p1,Training\nb.png,"say ""hi""",p2,test\n'
    images = read_images(labels_csv(tmp_path, text, "x, y.png", "b.png"))
    assert images.rows == [Row("x, y.png", ("B cells, others",), "p1", "train"),
                           Row("b.png", ('say "hi"',), "p2", "test")]


def test_labels_csv_without_labels(tmp_path: Path) -> None:
    images = read_images(labels_csv(tmp_path, "image,group\na.png,p\nb.png,q\n", "a.png", "b.png"))
    assert images.classes == [] and [r.group for r in images.rows] == ["p", "q"]


@pytest.mark.parametrize("text, words", [
    ("image,label\na.png,cat\ngone.png,dog\n", ["line 3", "gone.png", "not in"]),
    ("image,label\na.png,cat\nb.png,cat\na.png,dog\n", ["lines 2 and 4", "a.png"]),
    ("image,label,age\na.png,cat,61\n", ["unknown column 'age'"]),
    ("image,cat,age\na.png,1,61\n", ["line 2", "'age'", "'61'", "0 or 1"]),
    ("file,label\na.png,cat\n", ["`image`", "file, label"]),
    ("image,cat,cat\na.png,1,0\n", ["distinct"]),
    ("", ["first line"]),
    ("image,label\n", ["no rows"]),
    ("image,label\na.png\n", ["line 2", "1 cells", "2"]),
    ("image,label\na.png,cat\nb.png,\n", ["line 3", "no label", "b.png"]),
    ("image,label,group\na.png,cat,p\nb.png,cat,\n", ["line 3", "group", "every"]),
    ("image,label,split\na.png,cat,train\nb.png,cat,\n", ["line 3", "split", "every"]),
    ("image,label,split\na.png,cat,dev\n", ["line 2", "'dev'", "train, val or test"]),
    ("image,label\n,cat\n", ["line 2", "no image"]),
    (b"image,label\na.png,caf\xe9\n", ["UTF-8"]),
    ('image,label\na.png,cat|dog\nb.png,Cat\n', ["'Cat' and 'cat'"]),
])
def test_labels_csv_that_cant_be_used(tmp_path: Path, text: str | bytes, words: list[str]) -> None:
    with pytest.raises(DataError) as error:
        read_images(labels_csv(tmp_path, text, "a.png", "b.png"))
    said = str(error.value)
    assert all(word in said for word in words) and "\n" not in said, said


# %% splits

SHARES = np.array([0.7, 0.1, 0.2])


def parts_of(images: ImageSet, **options) -> dict[str, str]:
    return {r.path: r.split for r in split_images(images, **options).rows}


@pytest.mark.parametrize("seed", range(5))
def test_split_is_complete_and_stratified_within_rounding(seed: int) -> None:
    images = image_set([("a",)] * 101 + [("b",)] * 43 + [("c",)] * 10)
    split = split_images(images, seed=seed)
    assert [replace(r, split="") for r in split.rows] == images.rows and {r.split for r in split.rows} == set(data.PARTS)
    for name, n in (("a", 101), ("b", 43), ("c", 10)):
        counts = Counter(r.split for r in split.rows if r.labels == (name,))
        assert all(abs(counts[part] - share * n) < 1 for part, share in zip(data.PARTS, SHARES))
    counts = Counter(r.split for r in split.rows)
    assert all(abs(counts[part] - share * 154) <= 1.5 for part, share in zip(data.PARTS, SHARES))


def test_split_follows_its_seed_and_nothing_else() -> None:
    images = image_set([("a",)] * 40 + [("b",)] * 40)
    first = parts_of(images, seed=0)
    torch.manual_seed(5), np.random.seed(5)
    assert parts_of(images, seed=0) == first != parts_of(images, seed=1)
    assert any(first[f"{i}.png"] != first[f"{i + 1}.png"] for i in range(6))  # not just in the order of the files


def test_other_ratios() -> None:
    counts = Counter(parts_of(image_set([("a",)] * 50), ratios=(0.8, 0.1, 0.1)).values())
    assert counts == {"train": 40, "val": 5, "test": 5}


@pytest.mark.parametrize("seed", range(3))
def test_several_labels_keep_their_prevalence(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.random((600, 5)) < (0.05, 0.1, 0.3, 0.5, 0.8)
    images = image_set([tuple(np.array(list("abcde"))[row]) for row in truth])
    split = split_images(images, seed=seed)
    whole = images.truth(images.rows).mean(0)
    for part, share in zip(data.PARTS, SHARES):
        rows = split.part(part)
        assert abs(len(rows) - share * 600) <= 6
        assert np.abs(images.truth(rows).mean(0) - whole).max() < 0.03


@pytest.mark.parametrize("seed", range(3))
def test_groups_stay_together_with_shares_near_the_ratios(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = [f"p{g}" for g in range(60) for _ in range(rng.integers(1, 9))]
    images = image_set([(("a", "b")[rng.integers(2)],) for _ in groups], groups)
    split = split_images(images, seed=seed)  # auto: by group, as there are groups
    together = {(r.group, r.split) for r in split.rows}
    assert len(together) == 60
    shares = np.array([len(split.part(part)) for part in data.PARTS]) / len(groups)
    assert np.abs(shares - SHARES).max() < 0.05
    by_image = split_images(images, by="image", seed=seed)
    assert len({(r.group, r.split) for r in by_image.rows}) > 60


@pytest.mark.parametrize("seed", range(5))
def test_seven_patients_with_198_images(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = [f"p{g}" for g, n in enumerate((40, 35, 32, 28, 25, 22, 16)) for _ in range(n)]
    split = split_images(image_set([tuple(np.array(list("abcde"))[rng.random(5) < 0.4]) for _ in groups], groups),
                         seed=seed)
    patients = [{r.group for r in split.part(part)} for part in data.PARTS]
    assert [len(p) > 0 for p in patients] == [True] * 3 and sum(map(len, patients)) == 7
    shares = np.array([len(split.part(part)) for part in data.PARTS]) / 198
    assert np.abs(shares - SHARES).max() < 0.12, shares


def test_carved_validation_keeps_groups_together(tmp_path: Path) -> None:
    rows = [Row(f"{i}.png", ("a",), f"p{i // 4}", "train" if i < 64 else "test") for i in range(80)]
    split = split_images(ImageSet(tmp_path, rows, ["a"]))
    assert len(split.part("val")) == 8 and split.part("test") == rows[64:]
    assert not {r.group for r in split.part("val")} & {r.group for r in split.part("train")}


def test_class_missing_from_a_part_is_named() -> None:
    notes = split_images(image_set([("a",)] * 30 + [("rare",)])).notes
    assert sorted(notes) == ["the test part has no image of rare", "the val part has no image of rare"]


def test_splitting_by_groups_that_are_not_known() -> None:
    with pytest.raises(DataError, match="no groups.*--split image"):
        split_images(image_set([("a",)] * 5), by="group")


def test_unknown_way_to_split_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    class_folders(tmp_path, a=10)
    with pytest.raises(SystemExit) as stopped:  # --split groups must not quietly mean --split image
        data.main(["--data", str(tmp_path), "--split", "groups"])
    assert stopped.value.code == 2 and "--split" in capsys.readouterr().err.splitlines()[-1]


def test_split_file_round_trip(tmp_path: Path) -> None:
    labels = [("a, b", "c"), (), ("c",)] * 5
    images = split_images(image_set(labels, [f'p"{i // 3}' for i in range(15)]))
    write_split(tmp_path / "split.csv", images)
    assert read_split(tmp_path / "split.csv", replace(images, rows=[replace(r, split="") for r in images.rows])).rows \
        == images.rows
    assert [p.name for p in tmp_path.iterdir()] == ["split.csv"]
    assert (tmp_path / "split.csv").read_text().splitlines()[0] == "path,split,labels,group"


@pytest.mark.parametrize("old, new, words", [
    ("1.png,", "gone.png,", ["line 3", "'gone.png'"]),
    ("train", "dev", ["'dev'"]),
    (",a,", ",b,", ["other labels"]),
    ("1.png,", "0.png,", ["twice"]),
    (None, "", ["empty"]),
    (None, "path,split,labels,group\n", ["empty"]),
])
def test_split_file_that_does_not_fit(tmp_path: Path, old: str | None, new: str, words: list[str]) -> None:
    images = split_images(image_set([("a",)] * 10))
    file = tmp_path / "split.csv"
    write_split(file, images)
    file.write_text(file.read_text().replace(old, new) if old else new)
    with pytest.raises(DataError) as error:
        read_split(file, images)
    assert all(word in str(error.value) for word in [str(file), *words])


def test_missing_split_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="split.csv can't be read"):
        read_split(tmp_path / "split.csv", image_set([("a",)]))


# %% images


def pixels(path: Path) -> np.ndarray:
    image = load_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("mode, ending", [("RGB", "png"), ("L", "png"), ("P", "png"), ("1", "png"), ("RGBA", "png"),
                                          ("LA", "png"), ("CMYK", "tif"), ("RGB", "bmp"), ("RGB", "webp"),
                                          ("CMYK", "jpg"), ("P", "gif"), ("L", "tiff")])
def test_each_mode_and_format_looks_as_it_was(tmp_path: Path, mode: str, ending: str) -> None:
    plain = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    plain.convert(mode).save(tmp_path / f"x.{ending}", **({"lossless": True} if ending == "webp" else {}))
    wanted = np.asarray(plain.convert(mode).convert("RGB"), float)
    assert np.abs(pixels(tmp_path / f"x.{ending}") - wanted).mean() < 3


def test_transparent_pixels_are_black(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1), (200, 100, 50, 255))
    image.putpixel((1, 0), (200, 100, 50, 0))
    image.save(tmp_path / "rgba.png")
    grey = Image.new("LA", (2, 1), (200, 255))
    grey.putpixel((1, 0), (200, 0))
    grey.save(tmp_path / "la.png")
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([200, 100, 50, 9, 9, 9])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=1)
    assert pixels(tmp_path / "rgba.png").tolist() == [[[200, 100, 50], [0, 0, 0]]]
    assert pixels(tmp_path / "la.png").tolist() == [[[200] * 3, [0] * 3]]
    assert pixels(tmp_path / "p.png").tolist() == [[[200, 100, 50], [0, 0, 0]]]


@pytest.mark.parametrize("values, dtype, ending", [
    ([1000, 1100, 1300, 2000], np.uint16, "png"), ([1000, 1100, 1300, 2000], np.uint16, "tif"),
    ([-5, -4, -2, 5], np.int32, "tif"), ([0.001, 0.0011, 0.0013, 0.002], np.float32, "tif")])
def test_deep_grey_is_scaled_by_its_own_range(tmp_path: Path, values: list, dtype: type, ending: str) -> None:
    Image.fromarray(np.array([values], dtype)).save(tmp_path / f"x.{ending}")
    low, high = min(values), max(values)
    grey = pixels(tmp_path / f"x.{ending}")[0]
    assert np.abs(grey - [[(v - low) / (high - low) * 255] * 3 for v in values]).max() < 0.51


def test_pixels_that_are_no_number_do_not_set_the_range(tmp_path: Path) -> None:
    Image.fromarray(np.array([[1000, np.nan, 1001, np.inf, 1002, -np.inf]], np.float32)).save(tmp_path / "x.tif")
    grey = pixels(tmp_path / "x.tif")[0, :, 0].tolist()
    assert grey[0] == 0 and grey[2] in (127, 128) and grey[4] == 255


@pytest.mark.parametrize("array", [np.full((3, 4), 777, np.uint16), np.full((3, 4), np.nan, np.float32)])
def test_constant_deep_images_are_black(tmp_path: Path, array: np.ndarray) -> None:
    Image.fromarray(array).save(tmp_path / "x.tif")
    assert pixels(tmp_path / "x.tif").tolist() == np.zeros((3, 4, 3)).tolist()


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (30, 10), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 15, 10))  # left half blue
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "x.jpg", exif=exif)
    shown = pixels(tmp_path / "x.jpg")
    assert shown.shape == (30, 10, 3) and shown[3, 5, 2] > 200 and shown[26, 5, 0] > 200  # blue on top


@pytest.mark.parametrize("ending", ["tif", "gif"])
def test_the_first_of_several_pages_counts(tmp_path: Path, ending: str) -> None:
    first, second = (Image.new("RGB", (4, 4), colour) for colour in ((200, 0, 0), (0, 200, 0)))
    first.save(tmp_path / f"x.{ending}", save_all=True, append_images=[second])
    assert (pixels(tmp_path / f"x.{ending}") == (200, 0, 0)).all()


def test_one_pixel(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path / "x.png")
    assert pixels(tmp_path / "x.png").tolist() == [[[9, 8, 7]]]
    assert augmentation(16)(load_image(tmp_path / "x.png")).shape == (3, 16, 16)


def truncated(file: Path) -> None:
    noise(0, 100, 100).save(file, "JPEG")
    file.write_bytes(file.read_bytes()[:2000])


def bomb(file: Path) -> None:
    """A PNG of 60,000 x 60,000 pixels, as its header says; the pixels are not there."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", header), (b"IDAT", b""))))


@pytest.mark.parametrize("name, make, words", [
    ("cut.jpg", truncated, ["--skip-bad"]),
    ("empty.png", lambda f: f.write_bytes(b""), ["--skip-bad"]),
    ("text.png", lambda f: f.write_text("hello"), ["--skip-bad"]),
    ("bomb.png", bomb, ["pixels"]),
    ("gone.png", lambda f: None, ["not there"]),
])
def test_files_that_are_no_image_are_named(tmp_path: Path, name: str, make, words: list[str]) -> None:
    make(tmp_path / name)
    with pytest.raises(DataError) as error:
        load_image(tmp_path / name)
    assert all(word in str(error.value) for word in [str(tmp_path / name), *words])
    assert "\n" not in str(error.value)


def test_good_rows_leaves_out_and_counts_damaged_images(tmp_path: Path) -> None:
    class_folders(tmp_path, cat=3)
    truncated(tmp_path / "cat" / "cut.jpg")
    (tmp_path / "cat" / "empty.png").touch()
    images = data.good_rows(read_images(tmp_path))
    assert [r.path for r in images.rows] == ["cat/0.png", "cat/1.png", "cat/2.png"]
    assert images.notes == ["left out 2 images that can't be read: cat/cut.jpg, cat/empty.png"]
    for file in tmp_path.glob("cat/?.png"):
        file.unlink()
    with pytest.raises(DataError, match="no image that can be read"):
        data.good_rows(read_images(tmp_path))


# %% augmentations

DRAWS = 1500
NEAR = 0.04  # three standard deviations of a share of 1,500 draws


def quarters() -> Image.Image:
    """Four quarters of colours that no augmentation can mistake for each other."""
    image = Image.new("RGB", (16, 16))
    for i, colour in enumerate(((250, 60, 20), (160, 40, 10), (90, 25, 6), (30, 8, 2))):
        image.paste(colour, (8 * (i % 2), 8 * (i // 2), 8 * (i % 2) + 8, 8 * (i // 2) + 8))
    return image


@pytest.fixture(scope="module")
def drawn() -> torch.Tensor:
    """The paper's augmentation of one image, many times."""
    torch.manual_seed(0)
    transform, image = augmentation(16), quarters()
    return torch.stack([transform(image) for _ in range(DRAWS)])


def share(mask: torch.Tensor | list[bool]) -> float:
    return torch.as_tensor(mask).float().mean().item()


def test_output_is_resized_and_normalised_as_in_the_paper() -> None:
    image = noise(3, 50, 31)
    small = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR), np.float32) / 255
    wanted = (small - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    plain = augmentation(16, "none")(image)
    assert plain.shape == (3, 16, 16) and plain.dtype == torch.float32
    assert np.abs(plain.numpy() - wanted.transpose(2, 0, 1)).max() < 1e-5
    assert torch.equal(plain, augmentation(16, "none")(image))
    assert augmentation(16)(image).shape == (3, 16, 16) and augmentation(16)(image).dtype == torch.float32


def test_flips_have_probability_a_third_less_a_bit(drawn: torch.Tensor) -> None:
    red = drawn[:, 0]
    top_left, top_right, bottom_left, bottom_right = red[:, 4, 4], red[:, 4, 11], red[:, 11, 4], red[:, 11, 11]
    flipped_h = top_left + bottom_left < top_right + bottom_right
    flipped_v = top_left + top_right < bottom_left + bottom_right
    assert abs(share(flipped_h) - 0.3) < NEAR and abs(share(flipped_v) - 0.3) < NEAR
    assert abs(share(flipped_h & flipped_v) - 0.09) < NEAR


def test_two_chances_of_three_tenths_to_change_more_than_flips(drawn: torch.Tensor) -> None:
    plain = augmentation(16, "none")(quarters())
    flips = [plain, plain.flip(1), plain.flip(2), plain.flip(1, 2)]
    untouched = torch.stack([(drawn - flip).abs().amax((1, 2, 3)) < 1e-6 for flip in flips]).any(0)
    assert abs(share(untouched) - 0.7 * 0.7) < NEAR


def test_the_papers_list_in_order() -> None:
    steps = augmentation(384).transforms
    assert [type(step) for step in steps] == [
        v2.Resize, v2.RandomApply, v2.RandomApply, v2.RandomHorizontalFlip, v2.RandomVerticalFlip, v2.ToImage,
        type(torch.Tensor.contiguous), v2.ToDtype, v2.Normalize]
    assert list(steps[0].size) == [384, 384] and steps[0].interpolation == v2.InterpolationMode.BILINEAR
    (jitter, perspective), (jitter_2, affine) = (step.transforms[0].transforms for step in steps[1:3])
    for each in (jitter, jitter_2):
        assert isinstance(each, v2.ColorJitter)
        ranges = np.array([each.brightness, each.contrast, each.saturation, each.hue])
        assert np.allclose(ranges, [[0.8, 1.2]] * 3 + [[-0.1, 0.1]])
    assert isinstance(perspective, v2.RandomPerspective) and (perspective.distortion_scale, perspective.p) == (0.2, 1)
    assert isinstance(affine, v2.RandomAffine) and affine.degrees == [-10, 10]
    assert affine.translate is affine.scale is affine.shear is affine.center is None
    assert perspective.interpolation == affine.interpolation == v2.InterpolationMode.BILINEAR
    assert [steps[3].p, steps[4].p] == [0.3, 0.3]


@pytest.mark.parametrize("number", [1, 2])
def test_jitter_or_the_other_with_probability_three_tenths_each_as_likely(number: int) -> None:
    torch.manual_seed(number)
    step, before = augmentation(16).transforms[number], np.asarray(quarters())
    after = [np.asarray(step(quarters())) for _ in range(DRAWS)]
    changed = share([bool((a != before).any()) for a in after])
    # Colours at the centres of the quarters change by jitter alone, the edges between them by the other alone.
    centres = (slice(3, 13, 8), slice(3, 13, 8))
    jittered = share([bool((a[centres] != before[centres]).any()) for a in after])
    assert abs(changed - 0.3) < NEAR and abs(jittered - 0.15) < NEAR


@pytest.mark.parametrize("name, kinds", [
    ("blur", ["blur"]), ("solarize", ["solarize"]), ("blur+solarize", ["blur", "solarize"])])
def test_the_ablations_add_blur_and_solarize(name: str, kinds: list[str]) -> None:
    steps = augmentation(224, name).transforms
    base = augmentation(224).transforms
    assert [type(s) for s in steps[:5]] == [type(s) for s in base[:5]]
    added = steps[5:len(steps) - 4]
    assert [type(s) for s in steps[-4:]] == [type(s) for s in base[-4:]]
    assert ["blur" if isinstance(s, v2.RandomApply) else "solarize" for s in added] == kinds
    torch.manual_seed(0)
    image = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (16, 8))[..., None].repeat(3, 2))
    for step, kind in zip(added, kinds):
        assert step.p == 0.2
        if kind == "blur":
            (blur,) = step.transforms
            assert isinstance(blur, v2.GaussianBlur) and list(blur.sigma) == [0.1, 2] and list(blur.kernel_size) == [23] * 2
        else:
            assert isinstance(step, v2.RandomSolarize) and step.threshold == 128
            after = [np.asarray(step(image)) for _ in range(400)]
            assert abs(share([bool((a != np.asarray(image)).any()) for a in after]) - 0.2) < 0.06
            assert all(a.max() in (0, 255) for a in after)  # solarized: white is black


# %% loading


@pytest.fixture(scope="module")
def ten(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    return read_images(class_folders(tmp_path_factory.mktemp("ten"), a=5, b=5))


def test_image_follows_seed_epoch_and_index_alone(ten: ImageSet) -> None:
    def draw(seed: int, epoch: int, index: int) -> torch.Tensor:
        return ImageRows(ten.folder, [ten.rows[0]] * 9, augmentation(16), seed)[epoch, index]
    first = draw(0, 3, 5)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    draws = [draw(0, 3, i) for i in range(9)]
    assert torch.equal(torch.get_rng_state(), before)  # the loop's own stream stands still
    assert torch.equal(draws[5], first) and len({d.sum().item() for d in draws}) > 3
    assert len({draw(0, e, 5).sum().item() for e in range(9)}) > 3
    assert len({draw(s, 3, 5).sum().item() for s in range(9)}) > 3


def test_labels_travel_with_their_images(ten: ImageSet) -> None:
    truth = ten.truth(ten.rows)
    rows = ImageRows(ten.folder, ten.rows, augmentation(16, "none"), truth=truth)
    loader = make_loader(rows, 4, seed=1)
    order = [i for batch in loader.batch_sampler for _, i in batch]
    images, labels = (torch.cat(parts) for parts in zip(*loader))
    assert sorted(order) == list(range(10)) != order
    assert torch.equal(labels, torch.from_numpy(truth)[order])
    assert all(torch.equal(image, rows[0, i][0]) for image, i in zip(images, order))


def batches(images: int, size: int, *, seed: int = 0, epoch: int = 0, skip: int = 0, shuffle: bool = True,
            drop_last: bool = False) -> list[list[int]]:
    sampler = EpochBatches(images, size, seed, shuffle, drop_last)
    assert len(sampler) == len(list(sampler))
    sampler.epoch, sampler.skip = epoch, skip
    assert all(e == epoch for batch in sampler for e, _ in batch)
    return [[i for _, i in batch] for batch in sampler]


def test_each_epoch_is_another_permutation() -> None:
    orders = [sum(batches(20, 6, seed=seed, epoch=e), []) for seed in (0, 1) for e in (0, 1, 2)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6
    assert batches(20, 6, epoch=1) == batches(20, 6, epoch=1)
    assert sum(batches(20, 6, shuffle=False), []) == list(range(20))


def test_skip_leaves_out_the_first_batches() -> None:
    whole = batches(20, 6, epoch=2)
    assert all(batches(20, 6, epoch=2, skip=n) == whole[n:] for n in range(5))


@pytest.mark.parametrize("images, size, drop_last, sizes", [
    (20, 6, False, [6, 6, 6, 2]), (20, 6, True, [6, 6, 6]), (18, 6, False, [6, 6, 6]), (13, 6, False, [6, 7]),
    (13, 6, True, [6, 6]), (3, 16, False, [3]), (3, 16, True, [3]), (1, 16, False, [1]), (3, 1, False, [1, 1, 1])])
def test_sizes_of_batches(images: int, size: int, drop_last: bool, sizes: list[int]) -> None:
    assert [len(batch) for batch in batches(images, size, drop_last=drop_last)] == sizes


def test_a_last_image_stays_alone_when_nothing_is_trained() -> None:
    assert [len(batch) for batch in batches(13, 6, shuffle=False)] == [6, 6, 1]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(ten: ImageSet, workers: int) -> None:
    def passes(workers: int) -> list[torch.Tensor]:
        loader = make_loader(ImageRows(ten.folder, ten.rows, augmentation(16)), 3, seed=4, workers=workers)
        next(iter(loader))  # an iteration that was broken off
        result = []
        for epoch, skip in ((0, 0), (1, 2), (2, 0)):
            loader.set_epoch(epoch, skip)
            result += list(loader)
        return result
    torch.manual_seed(0)
    before = torch.get_rng_state()
    ours, plain = passes(workers), passes(0)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(ours) == len(plain) == 3 + 1 + 3 and all(map(torch.equal, ours, plain))


# %% the command


def test_command_tells_what_was_found(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = "image,label,group\n" + "".join(f"{i}.png,{'cat' if i % 2 else 'dog'},p{i // 2}\n" for i in range(20))
    labels_csv(tmp_path, text, *(f"{i}.png" for i in range(20)))
    Image.new("L", (7, 5)).save(tmp_path / "3.png")
    data.main(["--data", str(tmp_path)])
    said = capsys.readouterr().out
    lines = [line.split() for line in said.splitlines()]
    assert said.startswith(f"{tmp_path}: 20 images, 2 classes, one label an image, 10 groups\n")
    assert ["cat", "7", "1", "2", "10"] in lines and ["dog", "7", "1", "2", "10"] in lines
    assert ["images", "14", "2", "4", "20"] in lines and ["groups", "7", "1", "2", "10"] in lines
    assert "sizes: 24 x 20 (19), 7 x 5 (1)" in said and "modes: RGB (19), L (1)" in said
    examples = [line.split()[1:] for line in said.splitlines() if line.startswith("  e.g. ")]
    assert len(examples) == 3 and examples[0][:3] == ["0.png", "dog", "p0"] and examples[0][3] in data.PARTS


def test_command_shows_notes_and_damage(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    class_folders(tmp_path, cat=9, dog=1)
    (tmp_path / "cat" / "broken.png").touch()
    data.main(["--data", str(tmp_path), "--split-seed", "1"])
    said = capsys.readouterr().out
    assert "unreadable (1)" in said and "11 images" in said and "note: the val part has no image of dog" in said
    data.main(["--data", str(tmp_path), "--skip-bad"])
    said = capsys.readouterr().out
    assert "10 images" in said and "note: left out 1 images that can't be read: cat/broken.png" in said


def test_command_with_several_labels_and_without(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    labels_csv(tmp_path / "several", "image,labels\na.png,cat|dog\nb.png,\n", "a.png", "b.png")
    put(tmp_path / "flat", "a.png")
    data.main(["--data", str(tmp_path / "several")])
    data.main(["--data", str(tmp_path / "flat")])
    said = capsys.readouterr().out
    assert "2 images, 2 classes, several labels an image" in said and "a.png  cat|dog" in said
    assert "1 images, no labels" in said


def test_command_ends_with_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "is not a folder" in sentence(capsys, lambda: data.main(["--data", str(tmp_path / "gone")]))
    class_folders(tmp_path, a=5)
    assert "no groups" in sentence(capsys, lambda: data.main(["--data", str(tmp_path), "--split", "group"]))


@pytest.mark.parametrize("text", ["0.7,0.1", "a,b,c", "0.7,0.2,0.2", "-0.1,0.5,0.6", "0,0.5,0.5", "nan,nan,nan"])
def test_ratios_that_cant_be_used(tmp_path: Path, text: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        data.main(["--data", str(tmp_path), f"--ratios={text}"])
    assert stopped.value.code == 2 and "three shares" in capsys.readouterr().err.splitlines()[-1]


# %% what would go wrong without a word


def test_a_link_to_a_folder_above_does_not_bring_its_images_again(tmp_path: Path) -> None:
    folder = put(tmp_path / "set", *(f"{part}/{name}/{i}.png" for part in ("train", "test") for name in ("cat", "dog")
                                     for i in range(3)))
    before = read_images(folder).rows
    (folder / "train" / "cat" / "loop").symlink_to("../..", target_is_directory=True)
    (folder / "train" / "up").symlink_to("..", target_is_directory=True)
    assert read_images(folder).rows == before


def test_a_link_to_a_folder_elsewhere_is_followed(tmp_path: Path) -> None:
    folder = put(tmp_path / "set", "dog/1.png")
    put(tmp_path / "store", "a.png", "b.png")
    (folder / "cat").symlink_to(tmp_path / "store", target_is_directory=True)
    assert sorted(row.path for row in read_images(folder).rows) == ["cat/a.png", "cat/b.png", "dog/1.png"]


def test_a_name_that_is_no_text_is_refused_and_one_of_another_script_is_not(tmp_path: Path) -> None:
    names = ("脳/имя.png", "café/1.png", "a/at 9.41\u202fAM.png", "a/x\u00a0y.png", "a/\u3000z.png")
    put(tmp_path / "set", *names)  # with the blanks of other scripts, and of a Mac's screenshots
    assert sorted(row.path for row in read_images(tmp_path / "set").rows) == sorted(names)
    os.rename(tmp_path / "set" / "café" / "1.png", os.fsencode(tmp_path / "set" / "café") + b"/\xe9.png")
    with pytest.raises(DataError, match="rename"):
        read_images(tmp_path / "set")


def test_parts_one_folder_further_down_are_pointed_at(tmp_path: Path) -> None:
    put(tmp_path / "set", "archive/Training/cat/1.png", "archive/Testing/cat/1.png")
    with pytest.raises(DataError, match="archive"):
        read_images(tmp_path / "set")


@pytest.mark.parametrize("text, word", [
    ('image,label\na.png,"cat\nb.png,dog\n', "quote"), ("image,label\n/a.png,cat\nb.png,dog\n", "relative"),
    ("image,label\na.png,cat\n./a.png,dog\n", "both name"), ('image,label\na.png,"' + "x" * 140_000, "quote")])
def test_tables_that_would_lose_or_double_images_are_refused(tmp_path: Path, text: str, word: str) -> None:
    labels_csv(tmp_path, text, "a.png", "b.png")
    with pytest.raises(DataError, match=word):
        read_images(tmp_path)


def test_a_table_may_begin_with_empty_lines(tmp_path: Path) -> None:
    labels_csv(tmp_path, "\n\nimage;label\na.png;cat\nb.png;dog\n", "a.png", "b.png")
    assert [row.labels for row in read_images(tmp_path).rows] == [("cat",), ("dog",)]


def test_a_split_may_come_back_from_a_spreadsheet(tmp_path: Path) -> None:
    images = split_images(read_images(class_folders(tmp_path / "set", cat=10, dog=10)))
    write_split(tmp_path / "split.csv", images)
    text = (tmp_path / "split.csv").read_text()
    (tmp_path / "split.csv").write_text("﻿" + text.replace(",", ";"), encoding="utf-8")
    assert read_split(tmp_path / "split.csv", images).rows == images.rows
