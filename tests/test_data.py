"""data.py: every form of folder and table, splits by their properties, augmentations by their
probabilities, and batches that follow from seed and epoch alone. Image files: test_images.py."""

import os
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import data
from data import MEAN, STD, EpochBatches, ImageRows, ImageSet, Row, augmentation, make_loader
from data import read_images, read_split, read_table, split_images, write_csv, write_split
from helpers import class_folders, complaint, labels_csv, noise, put


def found(folder: Path) -> list[tuple]:
    return [(row.path, *row.labels) for row in read_images(folder).rows]


def image_set(labels: list[tuple[str, ...]], groups: list[str] | None = None) -> ImageSet:
    """A data set without files, enough for splitting."""
    rows = [Row(f"{i}.png", names, groups[i] if groups else "") for i, names in enumerate(labels)]
    classes = sorted({name for names in labels for name in names})
    return ImageSet(Path("nowhere"), rows, classes, any(len(names) > 1 for names in labels))


def counts(images: ImageSet) -> list[int]:
    return [len(images.part(part)) for part in data.PARTS]


# %% folders


@pytest.mark.parametrize("names", [
    ("train", "val", "test"), ("Training", "validation", "Testing"), ("TRAIN", "Valid", "Test")])
def test_split_folders(tmp_path: Path, names: tuple[str, ...]) -> None:
    put(tmp_path, *(f"{name}/cat/{name}.png" for name in names), "extra/cat/x.png", "y.png")
    images = read_images(tmp_path)
    assert {(r.path, r.split, r.labels) for r in images.rows} == {
        (f"{name}/cat/{name}.png", part, ("cat",)) for name, part in zip(names, data.PARTS)}
    assert any("2 images beside" in note and "extra" in note for note in images.notes)
    assert split_images(images).rows == images.rows  # nothing moves


def test_missing_validation_is_an_eighth_of_training(tmp_path: Path) -> None:
    put(tmp_path, *(f"Training/{'dog' if i < 8 else 'cat'}/{i}.png" for i in range(32)),
        *(f"Testing/{name}/{i}.png" for name in ("cat", "dog") for i in range(3)))
    images = split_images(read_images(tmp_path))
    assert Counter((r.split, *r.labels) for r in images.rows) == {
        ("train", "cat"): 21, ("train", "dog"): 7, ("val", "cat"): 3, ("val", "dog"): 1,
        ("test", "cat"): 3, ("test", "dog"): 3}
    assert all(r.path.startswith("Testing/") == (r.split == "test") for r in images.rows)


def test_carved_validation_keeps_groups_together(tmp_path: Path) -> None:
    rows = [Row(f"{i}.png", ("a",), f"p{i // 4}", "train" if i < 64 else "test") for i in range(80)]
    split = split_images(ImageSet(tmp_path, rows, ["a"]))
    assert len(split.part("val")) == 8 and split.part("test") == rows[64:]
    assert not {r.group for r in split.part("val")} & {r.group for r in split.part("train")}


def test_a_patient_that_the_data_set_puts_into_two_parts_is_noted() -> None:
    rows = [Row(part, ("a",), "p1" if part != "val" else "p2", part) for part in data.PARTS]
    note = "1 groups stand in several parts, as the data set has them, such as p1"
    assert split_images(ImageSet(Path(), rows, ["a"])).notes == [note]


def test_all_images_below_a_folder_or_one_file(tmp_path: Path) -> None:
    put(tmp_path, "a/0.png", "a/b/1.png", "2.png")
    images, one = data.find_images(tmp_path), data.find_images(tmp_path / "a" / "0.png")
    assert images.rows == [Row("2.png"), Row("a/0.png"), Row("a/b/1.png")]
    assert one.folder == tmp_path / "a" and one.rows == [Row("0.png")]


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_a_part_without_labels_beside_labelled_ones(tmp_path: Path, part: str) -> None:
    names = [f"{p}/{'' if p == part else 'cat/'}{i}.png" for p in data.PARTS for i in range(2)]
    images = split_images(read_images(put(tmp_path, *names)))
    assert len(images.part(part)) == 2 and not images.labelled(images.part(part))
    assert len(images.labelled(images.rows)) == 4
    assert f"the {part} part has no labels" in images.notes
    if part != "train":
        images = split_images(read_images(class_folders(tmp_path / "train", bird=20).parent))
        assert f"the {part} part has no labels; training images are put into it" in images.notes
        assert len(images.labelled(images.part(part))) > 1


def test_hidden_files_are_passed_over_and_classes_stand_in_number_order(tmp_path: Path) -> None:
    put(tmp_path, "10/0.png", "10/.1.png", ".hidden/2.png", "10/.ipynb_checkpoints/3.png",
        "__MACOSX/10/0.png", "2/2024/may/0.JPG", "2/1.Tiff")
    for junk in ("10/._0.png", "10/Thumbs.db", ".DS_Store"):
        (tmp_path / junk).write_text("x")
    assert found(tmp_path) == [("10/0.png", "10"), ("2/1.Tiff", "2"), ("2/2024/may/0.JPG", "2")]
    assert read_images(tmp_path).classes == ["2", "10"]
    (note,) = read_images(tmp_path).notes
    assert "deeper than the folder taken for" in note and "2/2024/may/0.JPG" in note


def test_endings_that_pillow_opens_are_read(tmp_path: Path) -> None:
    known = Image.registered_extensions()  # Pillow 11.0 has no AVIF
    written = sorted(f"a/0{ending}" for ending in data.ENDINGS if ending in known)
    images = data.good_rows(read_images(put(tmp_path, *written)))
    assert [row.path for row in images.rows] == written and not images.notes
    assert {"a/0.jpe", "a/0.jfif", "a/0.bmp", "a/0.webp", "a/0.tiff"} < set(written)


@pytest.mark.parametrize("names, words", [
    (["a/0.png", "b/1.png", "0.png"], ["1 images beside the class folders", "0.png"]),
    (["a/0.png", "a/scan.dcm", "b/x.nii.gz", "b/1.png"], ["not read", "1 .dcm", "1 .gz"]),
    (["a/0.png", "b/readme"], ["1 folders hold no images", "such as b"]),
    (["images/0.png", "masks/0.png"], ["taken for classes", "masks"]),
    (["train_set/a/0.png", "testing_set/a/0.png"], ["2 folders are taken for classes"]),
    (["0.png", "Labels.csv"], ["not read", "1 .csv"]),
    (["a/0.png", *(f"a/0.x{i}" for i in range(10))], ["not read", "1 .x8, ..."]),
    (["p1/benign/0.png", "p2/malignant/1.png"], ["deeper", "p1/benign/0.png", "labels.csv"]),
    (["a/x.png", "a/x_mask.png", "b/y (1).png", "b/y (1)_mask_1.png"], ["2 images look like"]),
])
def test_what_may_be_meant_otherwise_is_noted(tmp_path: Path, names: list, words: list) -> None:
    put(tmp_path, *(name for name in names if name.endswith(".png")))
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert any(all(word in note for word in words) for note in read_images(tmp_path).notes)
    fine = put(tmp_path / "fine", "testis/0.png", "valve/0.png", "with_mask/0.png")
    assert not read_images(fine).notes  # these only begin like a part


def test_links_bring_each_folder_once_and_lead_nowhere_above(tmp_path: Path) -> None:
    names = ["train/cat/0.png", "train/dog/0.png", "test/cat/0.png", "test/dog/0.png"]
    folder = put(tmp_path / "set", *names)
    put(tmp_path / "store", "a.png", "b.png")
    before = found(folder)
    for link, target in (("train/cat/loop", "../.."), ("train/up", ".."), ("train/out", "../.."),
                         ("test/ant", "../train/dog"), ("train/cat/self", ".")):
        (folder / link).symlink_to(target, target_is_directory=True)
    assert found(folder) == before
    (folder / "train" / "new").symlink_to(tmp_path / "store", target_is_directory=True)
    more = [("train/new/a.png", "new"), ("train/new/b.png", "new")]
    assert found(folder) == sorted(before + more)


def test_names_of_other_scripts_are_read_and_what_is_no_text_is_refused(tmp_path: Path) -> None:
    names = ["脳/имя.png", "café/1.png", "a/9.41\u202fAM.png", "a/\u00a0y.png", "a/\u3000z.png"]
    put(tmp_path, *names)  # among them the blanks that Macs write
    assert sorted(path for path, _ in found(tmp_path)) == sorted(names)
    os.rename(tmp_path / "café" / "1.png", os.fsencode(tmp_path / "café") + b"/\xe9.png")
    complaint(lambda: read_images(tmp_path), "rename")


@pytest.mark.parametrize("names, words", [
    (["Cat/0.png", "cat/0.png"], ["'Cat' and 'cat'", "case alone"]),
    (["1.0/0.png", "1/0.png"], ["'1' and '1.0'"]),
    (["a|b/0.png"], ["'a|b'", "rename"]),
    (["in/Training/a/0.png", "in/Testing/a/1.png"], ["--data", "set/in"]),
])
def test_folders_that_cant_be_used(tmp_path: Path, names: list[str], words: list[str]) -> None:
    put(tmp_path / "set", *names)
    complaint(lambda: read_images(tmp_path / "set"), *words)


# %% labels.csv


@pytest.mark.parametrize("text", [
    "image\tdiagnosis\na.png\tcat\nb.png\tdog\n",
    "Image,Label\r\na.png,cat\r\n./b.png,dog\r\n",
    "image,diagnosis\ra.png,cat\rb.png,dog\r",
    "\ufeffimage,diagnosis\na.png,cat\nb.png,dog",
    "image;diagnosis\na.png;cat\nb.png;dog\n".encode("utf-16"),
    "\n\ndiagnosis, image\ncat, a.png\n\n , \ndog, b.png\n\n",
    "Unnamed: 0,image,label\n0,a.png,cat\n1,b.png,dog\n",
    ",image,label\n0,a.png,cat\n1,b.png,dog\n",
    "image,label,,\na.png,cat,,\nb.png,dog,,\n",
    "image,cat,dog\na.png,1.0,0.0\nb.png,0.0,1.0\n",
    "image;cat;dog\na.png;1,0;0,0\nb.png;0,0;1,0\n",
    '"","image","cat","dog"\n"1","a.png",TRUE,FALSE\n"2","b.png",FALSE,TRUE\n',
])
def test_forms_of_labels_csv_that_say_the_same(tmp_path: Path, text: str | bytes) -> None:
    images = read_images(labels_csv(tmp_path, text, "a.png", "b.png"))
    assert [(r.path, r.labels) for r in images.rows] == [("a.png", ("cat",)), ("b.png", ("dog",))]
    assert images.classes == ["cat", "dog"] and not images.multi_label and not images.notes


@pytest.mark.parametrize("text", [
    "image,labels\na.png,cat|dog\nb.png,\nc.png, dog | dog\n",
    "image,cat,dog\na.png,1,1\nb.png,0,0\nc.png,0,1\n",
])
def test_several_labels_an_image(tmp_path: Path, text: str) -> None:
    images = read_images(labels_csv(tmp_path, text, "a.png", "b.png", "c.png"))
    assert [r.labels for r in images.rows] == [("cat", "dog"), (), ("dog",)]
    assert images.multi_label and images.labelled(images.rows) == images.rows
    assert images.truth(images.rows).tolist() == [[1, 1], [0, 0], [0, 1]]


@pytest.mark.parametrize("text, classes, rows", [
    ('image,label,Group,split\n"x, y.png","B cells, others",p1,Training\n'
     'b.png,"say ""hi""",p2,test\n', ["B cells, others", 'say "hi"'],
     [Row("x, y.png", ("B cells, others",), "p1", "train"),
      Row("b.png", ('say "hi"',), "p2", "test")]),
    ("image,label,group\na.png,10,p\nb.png,,q\nc.png,9,q\n", ["9", "10"],
     [Row("a.png", ("10",), "p"), Row("b.png", (), "q"), Row("c.png", ("9",), "q")]),
    ("image,group\na.png,p\nb.png,q\n", [], [Row("a.png", (), "p"), Row("b.png", (), "q")])])
def test_quoted_cells_groups_splits_and_few_labels_or_none(tmp_path: Path, text: str, classes: list,
                                                           rows: list[Row]) -> None:
    images = read_images(labels_csv(tmp_path, text, *(row.path for row in rows), "more.png"))
    assert images.rows == rows and images.classes == classes and not images.multi_label
    assert [row for row in rows if row.labels] == images.labelled(images.rows)
    assert images.notes == ["1 images that labels.csv does not name are left out, such as more.png"]


@pytest.mark.parametrize("text, words", [
    ("image,label\na.png,cat\ngone.png,dog\n", ["line 3", "gone.png", "not in"]),
    ("image,label\na.png,cat\nb.png,cat\n./a.png,dog\n", ["line 4", "a.png again"]),
    ("image,label\n/a.png,cat\nb.png,dog\n", ["line 2", "relative"]),
    ("image,label,age\na.png,cat,61\n", ["label, age", "known are"]),
    ("image,cat,age\na.png,1,61\n", ["line 2", "'age'", "'61'", "0 or 1"]),
    ("image,cat,dog\na.png,1,-1\n", ["line 2", "'dog'", "'-1'", "0 or 1"]),
    *((f"image,label\na.png,cat\nb.png,{word}\n", ["line 3", repr(word), "leave it empty"])
      for word in ("NA", "-1.0", "Unknown", "?", "<NA>")),
    ("image,label\na.png,1\nb.png,1.0\n", ["'1' and '1.0'"]),
    ("file,label\na.png,cat\n", ["`image`", "file, label"]),
    ("image,cat,cat\na.png,1,0\n", ["distinct"]),
    ("", ["first line"]),
    ("image,label\n", ["no rows"]),
    ("image,label\na.png\n", ["line 2", "1 cells", "2"]),
    ("image,label\na.png,cat,x\n", ["line 2", "3 cells", "2"]),
    ("image,label,group\na.png,cat,p\nb.png,cat,\n", ["line 3", "group", "every"]),
    ("image,label,group\na.png,cat,p\nb.png,cat,NaN\n", ["line 3", "group", "every"]),
    ("image,label,split\na.png,cat,dev\n", ["line 2", "'dev'", "train, val or test"]),
    ("image,label\n,cat\n", ["line 2", "no image"]),
    (b"image,label\na.png,caf\xe9\n", ["UTF-8"]),
    ('image,label\na.png,"cat\nb.png,dog\n', ["quote"]),
    ('image,label\na.png,"' + "x" * 140_000, ["quote"]),
])
def test_labels_csv_that_cant_be_used(tmp_path: Path, text: str | bytes, words: list[str]) -> None:
    folder = labels_csv(tmp_path, text, "a.png", "b.png")
    complaint(lambda: read_images(folder), *words)


# %% splits

SHARES = np.array([0.7, 0.1, 0.2])


@pytest.mark.parametrize("seed", range(3))
def test_split_is_complete_and_stratified_within_rounding(seed: int) -> None:
    images = image_set([("a",)] * 101 + [("b",)] * 43 + [("c",)] * 10)
    split = split_images(images, seed=seed)
    assert [replace(r, split="") for r in split.rows] == images.rows
    for name, n in (("a", 101), ("b", 43), ("c", 10)):
        here = Counter(r.split for r in split.rows if r.labels == (name,))
        assert all(abs(here[part] - share * n) < 1 for part, share in zip(data.PARTS, SHARES))
    assert np.abs(counts(split) - SHARES * 154).max() <= 1.5


def test_split_follows_its_seed_and_ratios_and_nothing_else() -> None:
    images = image_set([("a",)] * 40 + [("b",)] * 40)
    first = split_images(images, seed=0)
    torch.manual_seed(5)
    np.random.seed(5)
    assert split_images(images, seed=0) == first != split_images(images, seed=1)
    assert len({row.split for row in first.rows[:12]}) > 1  # not just in the order of the files
    assert counts(split_images(images, ratios=(0.8, 0.1, 0.1))) == [64, 8, 8]


@pytest.mark.parametrize("seed", range(3))
def test_several_labels_keep_their_prevalence(seed: int) -> None:
    truth = np.random.default_rng(seed).random((600, 5)) < (0.05, 0.1, 0.3, 0.5, 0.8)
    images = image_set([tuple(np.array(list("abcde"))[row]) for row in truth])
    split = split_images(images, seed=seed)
    assert np.abs(counts(split) - SHARES * 600).max() <= 6
    for part in data.PARTS:
        shares = images.truth(split.part(part)).mean(0)
        assert np.abs(shares - truth.mean(0)).max() < 0.03


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sizes, near", [(None, 0.07), ((40, 35, 32, 28, 25, 22, 16), 0.12)])
def test_groups_stay_together_with_shares_near_the_ratios(seed: int, sizes, near: float) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 9, 60) if sizes is None else sizes
    groups = [f"p{g}" for g, n in enumerate(sizes) for _ in range(n)]
    names = np.array(list("abcde"))
    images = image_set([tuple(names[rng.random(5) < 0.4]) for _ in groups], groups)
    split = split_images(images, seed=seed)
    assert len({(r.group, r.split) for r in split.rows}) == len(sizes)
    assert np.abs(np.array(counts(split)) / len(groups) - SHARES).max() < near


def test_unlabelled_images_are_shared_out_like_the_others() -> None:
    split = split_images(image_set([("a",), ("b",), (), (), ()] * 20))
    assert counts(split) == [70, 10, 20]
    assert [len(split.labelled(split.part(part))) for part in data.PARTS] == [28, 4, 8]
    none = split_images(image_set([()] * 10))
    assert counts(none) == [7, 1, 2] and none.truth(none.rows).shape == (10, 0)


# %% split.csv


def saved(folder: Path, images: ImageSet) -> tuple[Path, ImageSet]:
    """Its split, in `folder`/split.csv and in memory; empty files stand for the images."""
    images = split_images(replace(images, folder=folder / "set"))
    for row in images.rows:
        (images.folder / row.path).parent.mkdir(parents=True, exist_ok=True)
        (images.folder / row.path).touch()
    write_split(folder / "split.csv", images)
    return folder / "split.csv", images


def test_split_file_round_trip_even_through_a_spreadsheet(tmp_path: Path) -> None:
    images = image_set([("a, b", "c"), (), ("c",)] * 5, [f'p"{i // 3}' for i in range(15)])
    for i, name in enumerate(("=1+1", "'=1+1", "@x", "+1", "-1")):  # no cell may be a formula
        images.rows[i] = replace(images.rows[i], path=f"{name}/a.png", group=f"{name}")
    file, images = saved(tmp_path, images)
    bare = replace(images, rows=[replace(r, split="") for r in images.rows])
    assert read_split(file, bare).rows == images.rows
    assert file.read_text().splitlines()[0] == "path,split,labels,group"
    assert not re.search(r'(^|[,"])[=+@-]', file.read_text(), re.MULTILINE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set", "split.csv"]


def test_a_spreadsheet_may_save_the_split_file_its_own_way(tmp_path: Path) -> None:
    file, images = saved(tmp_path, image_set([("a",), ("b",)] * 5))
    file.write_text("\ufeff" + file.read_text().replace(",", ";"), encoding="utf-8")
    assert read_split(file, images).rows == images.rows


@pytest.mark.parametrize("old, new, words", [
    ("1.png,", "gone.png,", ["'gone.png'", "not in"]),
    ("train", "dev", ["'dev'"]),
    (",a,", ",b,", ["other labels"]),
    ("1.png,", "0.png,", ["line 3", "twice"]),
])
def test_split_file_that_does_not_fit(tmp_path: Path, old: str, new: str, words: list) -> None:
    file, images = saved(tmp_path, image_set([("a",)] * 10))
    file.write_text(file.read_text().replace(old, new))
    for grow in (False, True):
        complaint(lambda: read_split(file, images, grow), str(file), *words)


@pytest.mark.parametrize("text", ["", "path,split,labels,group\n"])
def test_empty_split_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "split.csv"
    file.write_text(text)
    for grow in (False, True):
        complaint(lambda: read_split(file, image_set([("a",)] * 10), grow), str(file), "empty")


def test_a_grown_set_keeps_its_parts_and_new_images_follow_their_patients(tmp_path: Path) -> None:
    labels, groups = [("a",), ("b",)] * 60, [f"p{i // 3}" for i in range(120)]
    whole = image_set(labels, groups)
    bare = [replace(row, labels=()) for row in whole.rows[:60]]  # before there were labels
    bare = [row for row in bare if int(row.path[:-4]) % 3]  # nor one image of each patient
    file, first = saved(tmp_path, replace(whole, rows=bare, classes=[]))
    whole.folder = first.folder
    second = split_images(read_split(file, whole, grow=True))
    parts = {row.path: row.split for row in second.rows}
    assert len(parts) == 120 and all(parts[row.path] == row.split for row in first.rows)
    assert len({(row.group, row.split) for row in second.rows}) == 40
    assert all(row.labels for row in second.rows) and "80 images" in second.notes[0]
    assert len({parts[f"{i}.png"] for i in range(60, 120)}) == 3  # new patients: by the ratios
    assert len(read_split(file, whole).rows) == 40


def test_few_labels_among_many_images(tmp_path: Path) -> None:
    folder = put(tmp_path / "set", *(f"{i}.png" for i in range(24)))
    write_split(tmp_path / "split.csv", split_images(read_images(folder)))
    before = {r.path: r.split for r in read_split(tmp_path / "split.csv", read_images(folder)).rows}
    rows = "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(12))
    images = read_images(labels_csv(folder, "image,label\n" + rows))
    after = split_images(read_split(tmp_path / "split.csv", images, grow=True))
    assert sorted(r.path for r in after.rows) == sorted(f"{i}.png" for i in range(12))
    assert all((r.split == "test") == (before[r.path] == "test") for r in after.rows)
    assert after.part("val")  # taken from training, where none of the first was labelled


def test_another_data_set_is_split_anew_and_says_so(tmp_path: Path) -> None:
    file, _ = saved(tmp_path, image_set([("a",)] * 10))
    images = read_images(class_folders(tmp_path / "mine", a=10))
    again = split_images(read_split(file, images, grow=True))
    assert counts(again) == [7, 1, 2] and "split anew" in again.notes[-1]
    complaint(lambda: read_split(file, images), "another data set")


# %% augmentations

BILINEAR = "interpolation=InterpolationMode.BILINEAR"
JITTER = ("ColorJitter(brightness=(0.8, 1.2), contrast=(0.8, 1.2), saturation=(0.8, 1.2), "
          "hue=(-0.1, 0.1))")
PERSPECTIVE = f"RandomPerspective(p=1.0, distortion_scale=0.2, {BILINEAR}, fill=0)"
AFFINE = f"RandomAffine(degrees=[-10.0, 10.0], {BILINEAR}, fill=0)"
RESIZE = f"Resize(size=[224, 224], {BILINEAR}, antialias=True)"
PAPER = [
    RESIZE,
    f"RandomApply(RandomChoice(transforms=[{JITTER}, {PERSPECTIVE}], p=[0.5, 0.5]))",
    f"RandomApply(RandomChoice(transforms=[{JITTER}, {AFFINE}], p=[0.5, 0.5]))",
    "RandomHorizontalFlip(p=0.3)",
    "RandomVerticalFlip(p=0.3)"]
BLUR = "RandomApply(GaussianBlur(kernel_size=(23, 23), sigma=[0.1, 2.0]))"
SOLARIZE = "RandomSolarize(p=0.2, threshold=128)"


@pytest.mark.parametrize("name, wanted, chances", [
    ("none", [RESIZE], []),
    ("cass", PAPER, [0.3, 0.3]),
    ("blur", [*PAPER, BLUR], [0.3, 0.3, 0.2]),
    ("solarize", [*PAPER, SOLARIZE], [0.3, 0.3]),
    ("blur+solarize", [*PAPER, BLUR, SOLARIZE], [0.3, 0.3, 0.2]),
])
def test_the_papers_list_in_order_and_the_ablations(name: str, wanted: list[str],
                                                    chances: list[float]) -> None:
    *steps, _ = augmentation(224, name).transforms
    assert [str(step).replace("(    ", "(") for step in steps] == wanted
    assert [step.p for step in steps if isinstance(step, v2.RandomApply)] == chances


@pytest.mark.parametrize("number", [1, 2])
def test_jitter_or_the_other_with_probability_three_tenths_each_as_likely(number: int) -> None:
    torch.manual_seed(number)
    step, image = augmentation(16).transforms[number], Image.new("RGB", (32, 32), (160, 40, 10))
    after = [step(image) for _ in range(1000)]
    changed = np.mean([other != image for other in after])
    # Jitter alone changes the centre of an image of one colour, the other alone its corners.
    jittered = np.mean([other.getpixel((16, 16)) != (160, 40, 10) for other in after])
    near = 0.045  # three standard deviations of a share of 1,000 draws
    assert abs(changed - 0.3) < near and abs(jittered - 0.15) < near


def test_output_is_resized_and_normalised_as_in_the_paper() -> None:
    image = noise(3, 50, 31)
    small = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR), np.float32) / 255
    wanted = (small - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    plain = augmentation(16, "none")(image)
    assert np.abs(plain.numpy() - wanted.transpose(2, 0, 1)).max() < 1e-5
    steps = v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)
    assert torch.equal(plain, v2.Compose(steps)(v2.Resize((16, 16))(image)))  # to the bit
    for x in (augmentation(16)(image), augmentation(16)(Image.new("RGB", (1, 1)))):
        assert x.shape == (3, 16, 16) and x.dtype == torch.float32


# %% loading


@pytest.fixture(scope="module")
def ten(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    return read_images(class_folders(tmp_path_factory.mktemp("ten"), a=5, b=5))


@pytest.mark.parametrize("seed, epoch, index, wanted", [
    (5, 0, 0, [5253, 2638, 2575]), (5, 0, 7, [1685, 5172, 8983]), (5, 3, 7, [1320, 6624, 8443]),
    (6, 3, 7, [3260, 5379, 8356])])
def test_random_numbers_follow_seed_epoch_and_index_alone(ten: ImageSet, seed: int, epoch: int,
                                                          index: int, wanted: list) -> None:
    """Recorded, so that results of earlier versions can be had again."""
    rows = ImageRows(ten, ten.rows, lambda image: torch.randint(10_000, (3,)), seed)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert rows[epoch, index].tolist() == wanted
    assert torch.equal(torch.get_rng_state(), before)  # the loop's own stream stands still


def test_labels_travel_with_their_images(ten: ImageSet) -> None:
    rows = ImageRows(ten, ten.rows, augmentation(16, "none"), labelled=True)
    loader = make_loader(rows, 4, seed=1)
    order = [i for batch in loader.batch_sampler for _, i in batch]
    images, labels = (torch.cat(parts) for parts in zip(*loader))
    assert order != list(range(10))
    assert torch.equal(labels, torch.from_numpy(ten.truth(ten.rows))[order])
    assert all(torch.equal(image, rows[0, i][0]) for image, i in zip(images, order))


def batches(images: int, size: int, *, seed: int = 0, epoch: int = 0, shuffle: bool = True,
            drop_last: bool = False) -> list[list[int]]:
    sampler = EpochBatches(images, size, seed, shuffle, drop_last)
    sampler.epoch = epoch
    assert len(sampler) == len(list(sampler)) and {e for b in sampler for e, _ in b} == {epoch}
    return [[i for _, i in batch] for batch in sampler]


def test_each_epoch_is_another_permutation() -> None:
    orders = [sum(batches(20, 6, seed=seed, epoch=e), []) for seed in (0, 1) for e in (0, 1, 2)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6
    assert batches(10, 4, seed=5, epoch=3) == [[9, 1, 0, 3], [4, 2, 7, 8], [6, 5]]  # as recorded
    assert batches(5, 3, shuffle=False) == [[0, 1, 2], [3, 4]]


@pytest.mark.parametrize("images, size, options, sizes", [
    (20, 6, {}, [6, 6, 6, 2]), (20, 6, {"drop_last": True}, [6, 6, 6]), (18, 6, {}, [6, 6, 6]),
    (13, 6, {}, [6, 7]), (13, 6, {"drop_last": True}, [6, 6]), (3, 16, {}, [3]),
    (3, 16, {"drop_last": True}, [3]), (1, 16, {}, [1]), (3, 1, {}, [1, 1, 1]),
    (13, 6, {"shuffle": False}, [6, 6, 1])])  # one alone does no harm where nothing is trained
def test_sizes_of_batches(images: int, size: int, options: dict, sizes: list[int]) -> None:
    assert [len(batch) for batch in batches(images, size, **options)] == sizes


def test_a_bar_is_shown_on_a_terminal_alone_and_for_training_alone(
        ten: ImageSet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for terminal, shuffle in ((True, True), (True, False), (False, True)):
        loader = make_loader(ImageRows(ten, ten.rows, augmentation(16)), 3, shuffle=shuffle)
        loader.set_epoch(4)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
        assert len(list(loader)) == 4 - shuffle
        said = capsys.readouterr().err
        assert ("epoch 5" in said and "images/s" in said) == (terminal and shuffle), said


# %% the command


def told(folder: Path, capsys: pytest.CaptureFixture) -> str:
    data.main(["--data", str(folder)])
    return capsys.readouterr().out


def test_command_tells_what_was_found(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lines = [f"{i}.png,{'cat' if i % 2 else 'dog'},p{i // 2}\n" for i in range(20)]
    labels_csv(tmp_path, "image,label,group\n" + "".join(lines), *(f"{i}.png" for i in range(20)))
    Image.new("L", (7, 5)).save(tmp_path / "3.png")
    said = told(tmp_path, capsys)
    assert f"{tmp_path}: 20 images, 2 classes, one label an image, 10 groups\n" in said
    assert "sizes: 24 x 20 (19), 7 x 5 (1)" in said and "modes: RGB (19), L (1)" in said
    lines = [line.split() for line in said.splitlines()]
    for row in ("cat 7 1 2 10", "dog 7 1 2 10", "images 14 2 4 20", "groups 7 1 2 10"):
        assert row.split() in lines
    examples = [line[1:] for line in lines if line[0] == "e.g."]
    assert len(examples) == 3 and examples[0][:3] == ["0.png", "dog", "p0"]
    assert examples[0][3] in data.PARTS


def test_command_shows_several_labels_none_notes_and_damage(tmp_path: Path, capsys) -> None:
    text = "image,labels\na.png,cat|dog\nb.png,\n"
    said = told(labels_csv(tmp_path / "several", text, "a.png", "b.png"), capsys)
    assert "2 images, 2 classes, several labels an image" in said and "a.png  cat|dog" in said
    assert "note: the val part has no image of cat, dog" in said
    (put(tmp_path / "flat", "a.png") / "broken.png").touch()
    said = told(tmp_path / "flat", capsys)
    assert "2 images, no labels" in said and "unreadable (1)" in said


def test_split_file_overrules_folders_and_leaves_the_rest_out(tmp_path: Path, capsys) -> None:
    folder = put(tmp_path / "set", *(f"{part}/a/{i}.png" for part in data.PARTS for i in range(2)))
    (folder / "val" / "a" / "0.png").write_bytes(b"")
    file = tmp_path / "mine.csv"
    file.write_text("path,split\ntest/a/0.png,train\ntest/a/1.png,train\ntrain/a/0.png,test\n"
                    "val/a/0.png,test\nval/a/1.png,val\n")
    data.main(["--data", str(folder), "--split-file", str(file), "--skip-bad"])
    said = capsys.readouterr().out
    assert f"1 images that {file} does not name are left out, such as train/a/1.png" in said
    assert ["images", "2", "1", "1", "4"] in [line.split() for line in said.splitlines()]
