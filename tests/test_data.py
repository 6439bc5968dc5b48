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
    groups = groups or [""] * len(labels)
    rows = [Row(f"{i}.png", *facts) for i, facts in enumerate(zip(labels, groups, strict=True))]
    classes = sorted({name for names in labels for name in names})
    return ImageSet(Path("nowhere"), rows, classes, any(len(names) > 1 for names in labels))


def counts(images: ImageSet) -> list[int]:
    return [len(images.part(part)) for part in data.PARTS]


# %% folders


def test_class_folders(tmp_path: Path) -> None:
    images = read_images(class_folders(tmp_path, cat=2, ant=1))
    assert [(r.path, r.labels) for r in images.rows] == [
        ("ant/0.png", ("ant",)), ("cat/0.png", ("cat",)), ("cat/1.png", ("cat",))]
    assert images.classes == ["ant", "cat"] and not images.multi_label and not images.notes
    assert images.truth(images.rows).tolist() == [[1, 0], [0, 1], [0, 1]]


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "validation", "Testing"),
                                   ("TRAIN", "Valid", "Test")])
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


def test_a_patient_that_the_data_set_puts_into_two_parts_is_noted(tmp_path: Path) -> None:
    text = "image,label,group,split\na.png,x,p1,train\nb.png,x,p1,test\nc.png,y,p2,val\n"
    folder = labels_csv(tmp_path, text, "a.png", "b.png", "c.png")
    note = "1 groups stand in several parts, as the data set has them, such as p1"
    assert note in split_images(read_images(folder)).notes


def test_one_file_is_found_as_well_as_a_folder(tmp_path: Path) -> None:
    put(tmp_path, "a/0.png", "a/b/1.png", "2.png")
    images = data.find_images(tmp_path)
    assert [row.path for row in images.rows] == ["2.png", "a/0.png", "a/b/1.png"]
    images = data.find_images(tmp_path / "a" / "0.png")
    assert images.folder == tmp_path / "a" and images.rows == [Row("0.png")]


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
    written = put(tmp_path, *(f"a/0{ending}" for ending in data.ENDINGS if ending in known))
    assert {f"a/0{ending}" for ending in (".jpe", ".jfif", ".bmp", ".webp", ".tiff")} <= {
        path for path, _ in found(written)}
    assert len(found(written)) == len(os.listdir(written / "a")) >= 10
    assert not data.good_rows(read_images(written)).notes


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
    folder = put(tmp_path / "set", *(f"{part}/{name}/0.png" for part in ("train", "test")
                                     for name in ("cat", "dog")))
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
    names = ["脳/имя.png", "café/1.png"]
    names += ["a/9.41\u202fAM.png", "a/\u00a0y.png", "a/\u3000z.png"]  # blanks, as Macs write them
    put(tmp_path, *names)
    assert sorted(path for path, _ in found(tmp_path)) == sorted(names)
    os.rename(tmp_path / "café" / "1.png", os.fsencode(tmp_path / "café") + b"/\xe9.png")
    complaint(lambda: read_images(tmp_path), "rename")


@pytest.mark.parametrize("make, words", [
    (lambda f: None, ["holds no images", "--data"]),
    (lambda f: (f / "x.dcm").touch(), ["holds no images", "1 .dcm"]),
    (lambda f: f.rmdir(), ["is not a folder", "--data"]),
    (lambda f: put(f, "Cat/0.png", "cat/0.png"), ["'Cat' and 'cat'", "case alone"]),
    (lambda f: put(f, "1.0/0.png", "1/0.png"), ["'1' and '1.0'"]),
    (lambda f: put(f, "a|b/0.png"), ["'a|b'", "rename"]),
    (lambda f: put(f, "in/Training/a/0.png", "in/Testing/a/1.png"), ["--data", "set/in"]),
])
def test_folders_that_cant_be_used(tmp_path: Path, make, words: list[str]) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    make(folder)
    complaint(lambda: read_images(folder), *words)


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


def parts_of(images: ImageSet, **options) -> dict[str, str]:
    return {r.path: r.split for r in split_images(images, **options).rows}


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
    first = parts_of(images, seed=0)
    torch.manual_seed(5), np.random.seed(5)
    assert parts_of(images, seed=0) == first != parts_of(images, seed=1)
    assert len({first[f"{i}.png"] for i in range(12)}) > 1  # not just in the order of the files
    assert Counter(parts_of(images, ratios=(0.8, 0.1, 0.1)).values()) == {
        "train": 64, "val": 8, "test": 8}


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


def test_carved_validation_keeps_groups_together(tmp_path: Path) -> None:
    rows = [Row(f"{i}.png", ("a",), f"p{i // 4}", "train" if i < 64 else "test") for i in range(80)]
    split = split_images(ImageSet(tmp_path, rows, ["a"]))
    assert len(split.part("val")) == 8 and split.part("test") == rows[64:]
    assert not {r.group for r in split.part("val")} & {r.group for r in split.part("train")}


def test_class_missing_from_a_part_is_named() -> None:
    notes = split_images(image_set([("a",)] * 30 + [("rare",)])).notes
    assert sorted(notes) == [f"the {part} part has no image of rare" for part in ("test", "val")]


def test_unlabelled_images_are_shared_out_like_the_others() -> None:
    split = split_images(image_set([("a",), ("b",), (), (), ()] * 20))
    assert counts(split) == [70, 10, 20]
    assert [len(split.labelled(split.part(part))) for part in data.PARTS] == [28, 4, 8]
    none = split_images(image_set([()] * 10))
    assert counts(none) == [7, 1, 2] and none.truth(none.rows).shape == (10, 0)


# %% split.csv


def saved(file: Path, images: ImageSet) -> Path:
    for row in images.rows:
        (images.folder / row.path).parent.mkdir(parents=True, exist_ok=True)
        (images.folder / row.path).touch()
    write_split(file, images)
    return file


def test_split_file_round_trip_even_through_a_spreadsheet(tmp_path: Path) -> None:
    images = image_set([("a, b", "c"), (), ("c",)] * 5, [f'p"{i // 3}' for i in range(15)])
    for i, name in enumerate(("=1+1", "'=1+1", "@x", "+1", "-1")):  # no cell may be a formula
        images.rows[i] = replace(images.rows[i], path=f"{name}/a.png", group=f"{name}")
    images.folder = tmp_path / "set"
    images = split_images(images)
    file = saved(tmp_path / "split.csv", images)
    bare = replace(images, rows=[replace(r, split="") for r in images.rows])
    assert read_split(file, bare).rows == images.rows
    assert file.read_text().splitlines()[0] == "path,split,labels,group"
    assert not re.search(r'(^|[,"])[=+@-]', file.read_text(), re.MULTILINE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set", "split.csv"]
    images = replace(images, rows=[replace(r, labels=r.labels[:1]) for r in images.rows[1:]])
    write_split(file, images)
    file.write_text("\ufeff" + file.read_text().replace('"c"', "c").replace(",", ";")
                    .replace("a; b", "a, b"), encoding="utf-8")
    assert [r.split for r in read_split(file, images).rows] == [r.split for r in images.rows]


@pytest.mark.parametrize("old, new, words", [
    ("1.png,", "gone.png,", ["'gone.png'", "not in"]),
    ("train", "dev", ["'dev'"]),
    (",a,", ",b,", ["other labels"]),
    ("1.png,", "0.png,", ["line 3", "twice"]),
    (None, "", ["empty"]),
    (None, "path,split,labels,group\n", ["empty"]),
])
def test_split_file_that_does_not_fit(tmp_path: Path, old: str | None, new: str,
                                      words: list[str]) -> None:
    images = split_images(replace(image_set([("a",)] * 10), folder=tmp_path / "set"))
    file = saved(tmp_path / "split.csv", images)
    file.write_text(file.read_text().replace(old, new) if old else new)
    for grow in (False, True):
        complaint(lambda: read_split(file, images, grow), str(file), *words)
    complaint(lambda: read_split(tmp_path / "gone.csv", images), "gone.csv can't be read")


def test_a_grown_set_keeps_its_parts_and_new_images_follow_their_patients(tmp_path: Path) -> None:
    labels, groups = [("a",), ("b",)] * 60, [f"p{i // 3}" for i in range(120)]
    whole = replace(image_set(labels, groups), folder=tmp_path / "set")
    bare = [replace(row, labels=()) for row in whole.rows[:60]]  # before there were labels
    bare = [row for row in bare if int(row.path[:-4]) % 3]  # nor one image of each patient
    first = split_images(replace(whole, rows=bare, classes=[]))
    file = saved(tmp_path / "split.csv", first)
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
    other = replace(image_set([("a",)] * 10), folder=tmp_path / "set")
    images = read_images(class_folders(tmp_path / "mine", a=10))
    file = saved(tmp_path / "split.csv", split_images(other))
    again = split_images(read_split(file, images, grow=True))
    assert counts(again) == [7, 1, 2] and "split anew" in again.notes[-1]
    complaint(lambda: read_split(file, images), "another data set")


# %% augmentations

DRAWS = 1000
NEAR = 0.045  # three standard deviations of a share of 1,000 draws


def quarters() -> Image.Image:
    """Four quarters of colours that no augmentation can mistake for each other."""
    image = Image.new("RGB", (16, 16))
    for i, colour in enumerate(((250, 60, 20), (160, 40, 10), (90, 25, 6), (30, 8, 2))):
        image.paste(colour, (8 * (i % 2), 8 * (i // 2), 8 * (i % 2) + 8, 8 * (i // 2) + 8))
    return image


def share(mask: torch.Tensor | list[bool]) -> float:
    return torch.as_tensor(mask).float().mean().item()


def test_output_is_resized_and_normalised_as_in_the_paper() -> None:
    image = noise(3, 50, 31)
    small = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR), np.float32) / 255
    wanted = (small - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    plain = augmentation(16, "none")(image)
    steps = (v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD))
    assert torch.equal(plain, v2.Compose(steps)(v2.Resize((16, 16))(image)))  # to the bit
    assert np.abs(plain.numpy() - wanted.transpose(2, 0, 1)).max() < 1e-5
    assert torch.equal(plain, augmentation(16, "none")(image))
    for x in (plain, augmentation(16)(image), augmentation(16)(Image.new("RGB", (1, 1)))):
        assert x.shape == (3, 16, 16) and x.dtype == torch.float32


def test_the_papers_list_in_order() -> None:
    steps = augmentation(384).transforms
    assert [type(step).__name__ for step in steps] == [
        "Resize", "RandomApply", "RandomApply", "RandomHorizontalFlip", "RandomVerticalFlip",
        "function"]
    assert list(steps[0].size) == [384, 384]
    (jitter, perspective), (jitter_2, affine) = (s.transforms[0].transforms for s in steps[1:3])
    for each in (jitter, jitter_2):
        assert isinstance(each, v2.ColorJitter)
        ranges = np.array([each.brightness, each.contrast, each.saturation, each.hue])
        assert np.allclose(ranges, [[0.8, 1.2]] * 3 + [[-0.1, 0.1]])
    assert isinstance(perspective, v2.RandomPerspective) and isinstance(affine, v2.RandomAffine)
    assert (perspective.distortion_scale, perspective.p) == (0.2, 1) and affine.degrees == [-10, 10]
    assert affine.translate is affine.scale is affine.shear is affine.center is None
    assert {s.interpolation for s in (steps[0], perspective, affine)} == {
        v2.InterpolationMode.BILINEAR}
    assert [steps[3].p, steps[4].p] == [0.3, 0.3]


@pytest.mark.parametrize("number", [1, 2])
def test_jitter_or_the_other_with_probability_three_tenths_each_as_likely(number: int) -> None:
    torch.manual_seed(number)
    step, before = augmentation(16).transforms[number], np.asarray(quarters())
    after = [np.asarray(step(quarters())) for _ in range(DRAWS)]
    changed = share([bool((a != before).any()) for a in after])
    # Jitter alone changes colours at the centres of the quarters, the other alone the edges.
    centres = (slice(3, 13, 8), slice(3, 13, 8))
    jittered = share([bool((a[centres] != before[centres]).any()) for a in after])
    assert abs(changed - 0.3) < NEAR and abs(jittered - 0.15) < NEAR


def test_the_ablations_add_blur_and_solarize() -> None:
    base = [type(step) for step in augmentation(224).transforms]
    for name in ("blur", "solarize", "blur+solarize"):
        steps = augmentation(224, name).transforms
        added = steps[5:-1]
        assert [type(step) for step in [*steps[:5], *steps[-1:]]] == base
        assert len(added) == len(name.split("+")) and all(step.p == 0.2 for step in added)
    (blur,), solarize = added[0].transforms, added[1]
    assert list(blur.sigma) == [0.1, 2] and list(blur.kernel_size) == [23, 23]
    white = Image.new("RGB", (8, 8), "white")
    after = [np.asarray(solarize(white)).max() for _ in range(100)]
    assert {0, 255} == set(after)  # solarized: white is black


# %% loading


@pytest.fixture(scope="module")
def ten(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    return read_images(class_folders(tmp_path_factory.mktemp("ten"), a=5, b=5))


def test_image_follows_seed_epoch_and_index_alone(ten: ImageSet) -> None:
    def draw(seed: int, epoch: int, index: int) -> torch.Tensor:
        return ImageRows(ten, [ten.rows[0]] * 9, augmentation(16), seed)[epoch, index]
    first = draw(0, 3, 5)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    draws = [draw(0, 3, i) for i in range(9)]
    assert torch.equal(torch.get_rng_state(), before)  # the loop's own stream stands still
    assert torch.equal(draws[5], first) and len({d.sum().item() for d in draws}) > 3
    assert len({draw(0, e, 5).sum().item() for e in range(9)}) > 3
    assert len({draw(s, 3, 5).sum().item() for s in range(9)}) > 3


def test_streams_and_orders_are_those_of_earlier_versions(ten: ImageSet) -> None:
    """Recorded, so that results can be had again."""
    rows = ImageRows(ten, ten.rows, lambda image: torch.randint(10_000, (3,)), seed=5)
    assert [rows[e, i].tolist() for e, i in ((0, 0), (0, 7), (3, 7))] == [
        [5253, 2638, 2575], [1685, 5172, 8983], [1320, 6624, 8443]]
    assert batches(10, 4, seed=5, epoch=3) == [[9, 1, 0, 3], [4, 2, 7, 8], [6, 5]]


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
    assert batches(20, 6, epoch=1) == batches(20, 6, epoch=1)
    assert sum(batches(20, 6, shuffle=False), []) == list(range(20))


@pytest.mark.parametrize("images, size, options, sizes", [
    (20, 6, {}, [6, 6, 6, 2]), (20, 6, {"drop_last": True}, [6, 6, 6]), (18, 6, {}, [6, 6, 6]),
    (13, 6, {}, [6, 7]), (13, 6, {"drop_last": True}, [6, 6]), (3, 16, {}, [3]),
    (3, 16, {"drop_last": True}, [3]), (1, 16, {}, [1]), (3, 1, {}, [1, 1, 1]),
    (13, 6, {"shuffle": False}, [6, 6, 1])])  # one alone does no harm where nothing is trained
def test_sizes_of_batches(images: int, size: int, options: dict, sizes: list[int]) -> None:
    assert [len(batch) for batch in batches(images, size, **options)] == sizes


def test_workers_change_nothing(ten: ImageSet) -> None:
    def passes(workers: int) -> list[torch.Tensor]:
        rows = ImageRows(ten, ten.rows, augmentation(16))
        loader = make_loader(rows, 3, seed=4, workers=workers)
        next(iter(loader))  # an iteration that was broken off
        return [batch for epoch in (0, 1) if loader.set_epoch(epoch) is None for batch in loader]
    before = torch.get_rng_state()
    plain, others = passes(0), passes(2)
    assert torch.equal(torch.get_rng_state(), before) and len(plain) == 6
    assert all(map(torch.equal, plain, others))


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


def test_command_tells_what_was_found(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = "image,label,group\n" + "".join(
        f"{i}.png,{'cat' if i % 2 else 'dog'},p{i // 2}\n" for i in range(20))
    labels_csv(tmp_path, text, *(f"{i}.png" for i in range(20)))
    Image.new("L", (7, 5)).save(tmp_path / "3.png")
    data.main(["--data", str(tmp_path)])
    said = capsys.readouterr().out
    lines = [line.split() for line in said.splitlines()]
    assert said.startswith(
        f"{tmp_path}: 20 images, 2 classes, one label an image, 10 groups\n")
    assert ["cat", "7", "1", "2", "10"] in lines and ["dog", "7", "1", "2", "10"] in lines
    assert ["images", "14", "2", "4", "20"] in lines and ["groups", "7", "1", "2", "10"] in lines
    assert "sizes: 24 x 20 (19), 7 x 5 (1)" in said and "modes: RGB (19), L (1)" in said
    examples = [line.split()[1:] for line in said.splitlines() if line.startswith("  e.g. ")]
    assert len(examples) == 3 and examples[0][:3] == ["0.png", "dog", "p0"]
    assert examples[0][3] in data.PARTS


def test_command_shows_several_labels_none_notes_and_damage(tmp_path: Path, capsys) -> None:
    labels_csv(tmp_path / "several", "image,labels\na.png,cat|dog\nb.png,\n", "a.png", "b.png")
    data.main(["--data", str(tmp_path / "several")])
    said = capsys.readouterr().out
    assert "2 images, 2 classes, several labels an image" in said and "a.png  cat|dog" in said
    assert "note: the val part has no image of cat, dog" in said
    (put(tmp_path / "flat", "a.png") / "broken.png").touch()
    data.main(["--data", str(tmp_path / "flat")])
    said = capsys.readouterr().out
    assert "2 images, no labels" in said and "unreadable (1)" in said
