"""extras/prepare.py: each odd form becomes the labels.csv one would have written by hand."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from data import read_images, split_images
from extras import prepare
from helpers import put, sentence


def run(folder: Path, *more: str | Path) -> None:
    prepare.main(["--data", str(folder), *map(str, more)])


def refused(capsys: pytest.CaptureFixture, words: list[str], folder: Path,
            *more: str | Path) -> None:
    said = sentence(capsys, lambda: run(folder, *more))
    assert all(word in said for word in words), said


def with_table(folder: Path, text: str, *names: str, file: str = "truth.csv") -> Path:
    put(folder, *names)
    (folder / file).write_text(text, encoding="utf-8")
    return folder


def rows(folder: Path) -> list[tuple[str, ...]]:
    """Path, labels and group of each image, as labels.csv has them."""
    return [(row.path, *row.labels, row.group) for row in read_images(folder).rows]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# %% ISIC 2019 and Dermofit


def test_isic_with_its_lesions_and_without(tmp_path: Path, capsys) -> None:
    names = [f"ISIC_2019_Training_Input/ISIC_{i}.jpg" for i in range(4)]
    truth = ("image,MEL,NV,BCC,UNK\nISIC_0,1.0,0.0,0.0,0.0\nISIC_1,0.0,1.0,0.0,0.0\n"
             "ISIC_2,0.0,0.0,1.0,0.0\nISIC_3,1.0,0.0,0.0,0.0\n")
    facts = "image,lesion_id,sex\nISIC_0,A,f\nISIC_1,B,m\nISIC_2,,\nISIC_3,A,f\n"
    with_table(tmp_path, facts, file=prepare.ISIC_FACTS)
    before = contents(with_table(tmp_path, truth, *names, file=prepare.ISIC))
    run(tmp_path)
    assert rows(tmp_path) == [(names[0], "MEL", "A"), (names[1], "NV", "B"),
                              (names[2], "BCC", names[2]), (names[3], "MEL", "A")]
    assert read_images(tmp_path).classes == ["MEL", "NV", "BCC"]  # there is no image of UNK
    after = contents(tmp_path)
    assert after.pop("labels.csv") and after == before  # nothing else has changed

    for name in (prepare.ISIC_FACTS, names[2], "labels.csv"):
        (tmp_path / name).unlink()
    refused(capsys, ["line 4", "ISIC_2", "1 of 4", "--skip-missing"], tmp_path)
    run(tmp_path, "--skip-missing", "--table", tmp_path / prepare.ISIC)
    said = capsys.readouterr().out
    assert "left out: 1 of 4" in said and "images of one lesion may come into two parts" in said
    assert rows(tmp_path) == [(names[0], "MEL", ""), (names[1], "NV", ""), (names[3], "MEL", "")]


def test_dermofit_without_its_masks_grouped_by_lesion(tmp_path: Path, capsys) -> None:
    folder, lesions = tmp_path / "set", ("AK/A1/A1", "AK/A2/A2", "MEL/D7b/D7b")
    put(folder, *(name + end for name in lesions for end in (".png", "mask.png")))
    run(put(folder, "AK/A1/second.PNG"), "--out", tmp_path / "out")
    assert rows(tmp_path / "out")[0] == ("set/AK/A1/A1.png", "AK", "set/AK/A1")
    run(folder)
    assert rows(folder) == [
        ("AK/A1/A1.png", "AK", "AK/A1"), ("AK/A1/second.PNG", "AK", "AK/A1"),
        ("AK/A2/A2.png", "AK", "AK/A2"), ("MEL/D7b/D7b.png", "MEL", "MEL/D7b")]
    (put(folder, "AK/stray.png") / "labels.csv").unlink()
    refused(capsys, [str(Path("AK", "stray.png"))], folder)


# %% other tables


@pytest.mark.parametrize("text", [
    ",image_name,diagnosis\n0,a,cat\n1,b,dog\n",
    "Unnamed: 0,path,target\n0,/content/drive/My Drive/x/a.png,cat\n1,../input/b.jpg,dog\n",
    "\ufeffFile Name;Label\r\nA.PNG;cat\r\n\r\nB;  dog \r\n",
    "path,age,target\nC:\\scans\\a.png,61,cat\nC:\\scans\\b.jpg,,dog\n",
    "Image,sex,finding\na.png,1,cat\nb.JPG,0,dog\n",
    "image,cat,dog,sex\na,TRUE,FALSE,1\nb,FALSE,TRUE,0\n",
])
def test_tables_that_say_the_same(tmp_path: Path, text: str) -> None:
    run(with_table(tmp_path, text, "a.png", "b.JPG"))
    assert rows(tmp_path) == [("a.png", "cat", ""), ("b.JPG", "dog", "")]
    assert not read_images(tmp_path).multi_label


@pytest.mark.parametrize("text, options", [
    ("file,TFH-1,B cells,others,patient\na,1,1,0,p1\nb,0,0,0,p1\nc,0,0,1,p2\n", []),
    ("file,labels,patient\na,TFH-1 | B cells,p1\nb,,p1\nc,others,p2\n", []),
    ("scan,cells,who,age\na,TFH-1|B cells,p1,4\nb,,p1,5\nc,others,p2,6\n",
     ["--image-column", "scan", "--label-column", "cells", "--group-column", "who"]),
    ("file,TFH-1,B cells,others,old,case\na,1,1,0,7,p1\nb,0,0,0,1,p1\nc,0,0,1,1,p2\n",
     ["--label-column", "TFH-1", "--label-column", "B cells", "--label-column", "others"]),
])
def test_several_labels_and_patients(tmp_path: Path, text: str, options: list[str]) -> None:
    run(with_table(tmp_path, text, *(f"slides/{name}.tif" for name in "abc")), *options)
    assert rows(tmp_path) == [("slides/a.tif", "TFH-1", "B cells", "p1"), ("slides/b.tif", "p1"),
                              ("slides/c.tif", "others", "p2")]
    assert read_images(tmp_path).multi_label


@pytest.mark.parametrize("text, words, left", [
    ("image,dx,PatientID\na,0,7\nb,0.0,7.0\nc,1,NA\nd,1.0,unknown\ne,nan,8\nf,Unknown,8\n",
     "line 6 has no clear label", [("a.png", "0", "7"), ("b.png", "0", "7"),
                                   ("c.png", "1", "c.png"), ("d.png", "1", "d.png")]),
    ("image,x,y,sex\na,1,0,1\nb,-1,1,0\nc,0,1,1\n", "line 3 has no clear label in column 'x'",
     [("a.png", "x", ""), ("c.png", "y", "")])])
def test_cells_without_a_value_are_no_class_and_no_patient(tmp_path: Path, text: str, words: str,
                                                           left: list, capsys) -> None:
    with_table(tmp_path, text, *(f"{name}.png" for name in "abcdef"))
    refused(capsys, [words], tmp_path)
    run(tmp_path, "--skip-missing")
    assert rows(tmp_path) == left


def test_names_of_every_kind(tmp_path: Path) -> None:
    found = {"a b/été 1.PNG": "e\u0301te\u0301 1",  # accents as a Mac writes them
             "a b/脳/２.png": "\uff12.png", "опухоль.jpg": "опухоль",
             "v1.2/x.y.png": "x.y"}
    put(tmp_path, *found, ".ipynb_checkpoints/x-checkpoint.jpg", "a b/._été 1.PNG")
    (tmp_path / ".ipynb_checkpoints" / "truth-checkpoint.csv").write_text("no,table\n")
    table = "image,label\n" + "".join(f"{x},двa b\n" for x in found.values())
    run(with_table(tmp_path, table))
    assert rows(tmp_path) == [(name, "двa b", "") for name in found]


def test_folders_tell_equal_names_apart(tmp_path: Path, capsys) -> None:
    names = ["train/cat/1.png", "train/dog/1.png", "test/dog/1.png", "1.png"]
    text = ("path,target,split\n/home/x/train/dog/1.png,dog,val\ntest/dog/1,dog,test\n"
            "train/cat/1,cat,Training\n1.png,cat,train\n")
    run(with_table(tmp_path, text, *names))
    found = [(row.path, row.split) for row in read_images(tmp_path).rows]
    assert found == [(names[1], "val"), (names[2], "test"), (names[0], "train"),
                     (names[3], "train")]
    with_table(tmp_path, "path,target\ndog/1.png,dog\n")
    (tmp_path / "labels.csv").unlink()
    refused(capsys, ["line 2", "test/dog/1.png or train/dog/1.png"], tmp_path)


@pytest.mark.parametrize("text, words", [
    ("image_name,diagnosis\na,cat\ngone,dog\n", ["line 3", "gone", "1 of 2"]),
    ("image_name,diagnosis\na,cat\na.png,dog\n", ["line 3", "a.png a second time"]),
    ("image_name,diagnosis\na,cat\nb,\n", ["line 3", "no clear label", "diagnosis"]),
    ("image_name,diagnosis\na,cat\nb, Cat \n", ["'Cat' and 'cat'"]),
    ("image_name,diagnosis\na,c\ntwin,c\n", ["line 3", "twin.jpg or twin.png"]),
    ("image,x,y\na,1,0\nb,,1\n", ["line 3", "'x'"]),
    ("image,MEL,NV\na,1,0\nb,0,0\n", ["MEL, NV", "--label-column"]),  # one class only is in use
    ("image,age,height,weight\na,3,4,5\nb,5,6,7\n", ["--label-column", "age, height, weight"]),
    ("who,what\nx,1\n", ["--image-column", "who, what"]),
    ("a.png,cat\nb.png,dog\n", ["first line says a.png, cat"]),  # would lose its first image
    ("image,label\n", ["no rows"]),
])
def test_tables_that_cant_be_used(tmp_path: Path, text: str, words: list[str], capsys) -> None:
    with_table(tmp_path, text, "a.png", "b.png", "twin.png", "twin.jpg")
    refused(capsys, words, tmp_path)
    assert not list(tmp_path.glob("labels.csv*"))


# %% MedMNIST


def medmnist(file: Path, *colour: int, classes: int = 1, **changes: np.ndarray) -> dict:
    """A file as MedMNIST writes them: 6, 2 and 3 images; labels (N, 1), or 0/1 (N, classes)."""
    rng, arrays = np.random.default_rng(0), {}
    for part, n in (("train", 6), ("val", 2), ("test", 3)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (n, 28, 28, *colour), dtype=np.uint8)
        arrays[f"{part}_labels"] = rng.integers(0, 2, (n, classes), dtype=np.uint8)
    np.savez_compressed(file, **(arrays | changes))
    return arrays


@pytest.mark.parametrize("colour, classes, more, out", [
    ([3], 1, "", "x"), ([], 14, "--out out", "out")])
def test_medmnist_keeps_pixels_parts_and_labels(tmp_path: Path, monkeypatch, colour: list[int],
                                                classes: int, more: str, out: str) -> None:
    monkeypatch.chdir(tmp_path)
    arrays = medmnist(tmp_path / "x.npz", *colour, classes=classes)
    run(tmp_path / "x.npz", *more.split())
    images = read_images(tmp_path / out)
    assert split_images(images).rows == images.rows  # nothing is split anew
    assert images.multi_label == (classes > 1)
    assert images.classes == [str(i) for i in range(max(classes, 2))]
    for part in data.PARTS:
        labels = arrays[f"{part}_labels"]
        wanted = labels if classes > 1 else np.eye(2)[labels[:, 0]]
        assert np.array_equal(images.truth(images.part(part)), wanted)
        for row, pixels in zip(images.part(part), arrays[f"{part}_images"], strict=True):
            with Image.open(images.folder / row.path) as image:
                assert image.format == "PNG" and np.array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("changes, word", [
    ({"train_images": np.zeros((6, 28, 28, 28), np.uint8)}, "28"),
    ({"train_images": np.zeros((6, 8, 8), np.uint16)}, "8-bit"),
    ({"train_labels": np.array([None] * 6, object)}, "allow_pickle=False"),  # runs no code
    ({"train_labels": np.zeros((3, 1), np.uint8)}, "label for each"),
    ({"train_labels": np.full((6, 1), -1)}, "label for each"),
])
def test_odd_medmnist_files_are_refused(tmp_path: Path, changes: dict, word: str, capsys) -> None:
    medmnist(tmp_path / "x.npz", **changes)
    refused(capsys, ["x.npz", word], tmp_path)
    assert not list(tmp_path.rglob("*.png"))


def test_damaged_and_foreign_npz(tmp_path: Path, capsys) -> None:
    file = tmp_path / "x.npz"
    np.savez(file, weights=np.zeros(3))
    refused(capsys, ["x.npz", "train_labels"], file)
    file.write_bytes(file.read_bytes()[:100])
    refused(capsys, ["x.npz"], file)


# %% the command


def test_a_folder_that_must_not_be_written_to_is_linked(tmp_path: Path, capsys,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    folder = with_table(tmp_path / "set", "image,dx\na,cat\nb,dog\n", "x/a.png", "b.png")
    out, before = tmp_path / "my" / "own", contents(folder)
    for attempt in range(2):
        run(folder, "--out", out)
        assert contents(folder) == before
        assert rows(out) == [("set/x/a.png", "cat", ""), ("set/b.png", "dog", "")]
        (out / "labels.csv").unlink()
    refused(capsys, ["gone"], tmp_path / "gone", "--out", out)

    def refuse(file: Path, mode: str, **rest: object) -> object:
        raise PermissionError(13, "Permission denied", str(file))
    monkeypatch.setattr(prepare, "open", refuse, raising=False)
    refused(capsys, ["Permission denied); --out"], folder)


def test_existing_labels_are_kept(tmp_path: Path, capsys) -> None:
    file = with_table(tmp_path, "image_name,diagnosis\na,cat\n", "a.png") / "labels.csv"
    file.write_text("mine")
    refused(capsys, ["there already"], tmp_path)
    refused(capsys, ["another name"], tmp_path, "--table", file)
    assert file.read_text() == "mine"
    file.unlink()
    run(tmp_path)
    assert file.read_text() == "image,label\na.png,cat\n"


def test_no_table_the_wrong_one_or_two(tmp_path: Path, capsys) -> None:
    put(tmp_path, "Training/cat/0.png", "Testing/cat/1.png")
    run(tmp_path)
    assert "nothing to do" in capsys.readouterr().out and not (tmp_path / "labels.csv").exists()
    refused(capsys, ["not a folder"], tmp_path / "gone")
    refused(capsys, ["gone.csv"], tmp_path, "--table", tmp_path / "gone.csv")
    with_table(tmp_path, "image,label\n0.png,x\n")
    refused(capsys, ["'dx'"], tmp_path, "--label-column", "dx")
    with_table(tmp_path, "image,label\n0.png,y\n", file="more.CSV")
    refused(capsys, ["more.CSV", "truth.csv", "--table"], tmp_path)
    run(tmp_path, "--table", tmp_path / "more.CSV")
    assert rows(tmp_path) == [("Training/cat/0.png", "y", "")]
