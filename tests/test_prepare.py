"""extras/prepare.py: each odd form becomes the labels.csv one would have written by hand, and nothing else changes."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import read_images, split_images
from extras import prepare
from helpers import put, sentence


def run(folder: Path, *more: str) -> None:
    prepare.main(["--data", str(folder), *more])


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "labels.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def with_table(folder: Path, text: str, *names: str, file: str = "truth.csv") -> Path:
    put(folder, *names)
    (folder / file).write_text(text, encoding="utf-8")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def isic(folder: Path, metadata: bool = True) -> Path:
    """ISIC 2019 in small: two images of one lesion, one image without a lesion's name."""
    images = [f"ISIC_000000{i}" for i in range(5)]
    text = "image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK\n" + "".join(
        f"{name},{','.join('1.0' if k == i % 3 else '0.0' for k in range(9))}\n" for i, name in enumerate(images))
    with_table(folder, text, *(f"ISIC_2019_Training_Input/{name}.jpg" for name in images), file=prepare.ISIC)
    if metadata:
        facts = ["image,age_approx,anatom_site_general,lesion_id,sex", "ISIC_0000000,55.0,anterior torso,MSK4_1,female",
                 "ISIC_0000001,30.0,,MSK4_2,male", "ISIC_0000002,,,,", "ISIC_0000003,55.0,,MSK4_1,female",
                 "ISIC_0000004,60.0,,MSK4_4,"]
        (folder / prepare.ISIC_FACTS).write_text("\n".join(facts) + "\n")
    return folder


# %% ISIC 2019


def test_isic_with_its_lesions(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    before = contents(isic(tmp_path))
    run(tmp_path)
    said = capsys.readouterr().out
    assert "kind: isic2019" in said and "no image of AK, BKL, DF, VASC, SCC, UNK" in said
    images = read_images(tmp_path)
    assert [(r.path, r.labels) for r in images.rows] == [
        (f"ISIC_2019_Training_Input/ISIC_000000{i}.jpg", (("MEL", "NV", "BCC")[i % 3],)) for i in range(5)]
    groups = [r.group for r in images.rows]
    assert groups[0] == groups[3] == "MSK4_1" and len(set(groups)) == 4 and all(groups)  # no lesion: one of its own
    assert images.classes == ["MEL", "NV", "BCC"] and not images.multi_label
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before and set(after) - set(before) == {"labels.csv"}


def test_isic_without_metadata_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(isic(tmp_path, metadata=False))
    assert "no lesions known" in capsys.readouterr().out
    assert list(table(tmp_path)[0]) == ["image", "MEL", "NV", "BCC"]


def test_isic_image_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (isic(tmp_path) / "ISIC_2019_Training_Input" / "ISIC_0000002.jpg").unlink()
    said = sentence(capsys, lambda: run(tmp_path))
    assert "line 4" in said and "ISIC_0000002" in said and "1 of 5" in said and "--skip-missing" in said
    assert not (tmp_path / "labels.csv").exists()
    run(tmp_path, "--skip-missing")
    assert "left out 1 image" in capsys.readouterr().out and len(read_images(tmp_path).rows) == 4


# %% Dermofit


def dermofit(folder: Path) -> Path:
    lesions = ("AK/A1/A1", "AK/A2/A2", "MEL/D7b/D7b")
    return put(folder, *(f"{name}{end}" for name in lesions for end in (".png", "mask.png")))


def test_dermofit_without_its_masks(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(dermofit(tmp_path))
    said = capsys.readouterr().out
    assert "kind: dermofit" in said and "left out 3 masks" in said
    assert table(tmp_path) == [{"image": "AK/A1/A1.png", "label": "AK"}, {"image": "AK/A2/A2.png", "label": "AK"},
                               {"image": "MEL/D7b/D7b.png", "label": "MEL"}]


def test_dermofit_lesion_with_two_images_is_a_group(tmp_path: Path) -> None:
    run(put(dermofit(tmp_path), "AK/A1/second.PNG"))
    assert [row["group"] for row in table(tmp_path)] == ["AK/A1", "AK/A1", "AK/A2", "MEL/D7b"]


def test_dermofit_image_outside_a_lesion(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    put(dermofit(tmp_path), "AK/stray.png")
    assert str(Path("AK", "stray.png")) in sentence(capsys, lambda: run(tmp_path))


# %% other tables

PLAIN = [("a.png", ("cat",)), ("b.JPG", ("dog",))]


@pytest.mark.parametrize("text", [
    "image_name,diagnosis\na,cat\nb,dog\n",
    "path,target\na.png,cat\nb.JPG,dog\n",
    ",image_name,diagnosis\n0,a,cat\n1,b,dog\n",
    "Unnamed: 0,path,target\n0,/content/drive/My Drive/x/a.png,cat\n1,../input/b.jpg,dog\n",
    "\ufeffFile Name;Label\r\nA.PNG;cat\r\n\r\nB;  dog \r\n",
    "path,age,target\nC:\\scans\\a.png,61,cat\nC:\\scans\\b.jpg,,dog\n",
    "scan,finding\na.png,cat\nb.JPG,dog\n",
    'image_name,diagnosis\n"a","cat"\nb,"dog"\n',
])
def test_tables_that_say_the_same(tmp_path: Path, text: str, capsys: pytest.CaptureFixture) -> None:
    run(with_table(tmp_path, text, "a.png", "b.JPG"))
    images = read_images(tmp_path)
    assert [(r.path, r.labels) for r in images.rows] == PLAIN and not images.multi_label
    said = capsys.readouterr().out
    assert "kind: csv" in said and "2 images, 2 classes" in said and ("not used: age" in said) == (",age" in text)


@pytest.mark.parametrize("text, options", [
    ("file,TFH-1,B cells,others,patient\na,1,1,0,p1\nb,0,0,0,p1\nc,0,0,1,p2\n", []),
    ("file,labels,patient\na,TFH-1|B cells,p1\nb,,p1\nc,others,p2\n", []),
    ("file,labels,patient\na,TFH-1; B cells,p1\nb,,p1\nc,others,p2\n", ["--separator", ";"]),
    ("scan,cells,who,age\na,TFH-1|B cells,p1,4\nb,,p1,5\nc,others,p2,6\n",
     ["--image-column", "scan", "--label-column", "cells", "--group-column", "who"]),
])
def test_slides_with_several_labels_and_patients(tmp_path: Path, text: str, options: list[str]) -> None:
    run(with_table(tmp_path, text, *(f"slides/{name}.tif" for name in "abc")), *options)
    images = read_images(tmp_path)
    assert [(r.path, set(r.labels), r.group) for r in images.rows] == [
        ("slides/a.tif", {"TFH-1", "B cells"}, "p1"), ("slides/b.tif", set(), "p1"), ("slides/c.tif", {"others"}, "p2")]
    assert images.multi_label


def test_parts_of_a_table_are_kept(tmp_path: Path) -> None:
    run(with_table(tmp_path, "image_id,dx,split\na,x,Training\nb,y,validation\nc,x,test\n", "a.png", "b.png", "c.png"))
    assert [r.split for r in read_images(tmp_path).rows] == ["train", "val", "test"]


def test_names_of_every_kind(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = ["a b/été 1.PNG", "a b/脳/２.png", "опухоль.jpg", "v1.2/x.y.png"]
    put(tmp_path, *names, ".ipynb_checkpoints/опухоль-checkpoint.jpg", "a b/._été 1.PNG")
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    (tmp_path / ".ipynb_checkpoints" / "truth-checkpoint.csv").write_text("no,table\n")
    text = "image,label\ne\u0301te\u0301 1,één\n２.png,二\nопухоль,да\nx.y,b c\n"  # accents as a Mac writes them
    (tmp_path / "truth.csv").write_text(text, encoding="utf-8")
    run(tmp_path)
    assert [(r.path, *r.labels) for r in read_images(tmp_path).rows] == list(zip(names, ["één", "二", "да", "b c"]))


def test_folders_tell_equal_names_apart(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = ["train/cat/1.png", "train/dog/1.png", "test/dog/1.png"]
    text = "path,target\n/home/x/train/dog/1.png,dog\n/home/x/test/dog/1.png,dog\ntrain/cat/1,cat\n"
    run(with_table(tmp_path / "good", text, *names))
    assert [row["image"] for row in table(tmp_path / "good")] == [names[1], names[2], names[0]]
    with_table(tmp_path / "bad", "path,target\ndog/1.png,dog\n", *names)
    said = sentence(capsys, lambda: run(tmp_path / "bad"))
    assert "line 2" in said and "test/dog/1.png or train/dog/1.png" in said


def test_images_that_no_line_names_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(with_table(tmp_path, "image,label\na,x\n", "a.png", "b.png", "c.png"))
    assert "2 images" in capsys.readouterr().out and len(table(tmp_path)) == 1


@pytest.mark.parametrize("text, words", [
    ("image_name,diagnosis\na,cat\ngone,dog\n", ["line 3", "gone", "1 of 2"]),
    ("image_name,diagnosis\na,cat\n,dog\n", ["line 3", "no image"]),
    ("image_name,diagnosis\na,cat\na.png,dog\n", ["lines 2 and 3", "a.png"]),
    ("image_name,diagnosis\na,cat\nb,\n", ["line 3", "no label", "b.png"]),
    ("image_name,diagnosis\na,cat\nb, Cat \n", ["'Cat' and 'cat'"]),
    ("image_name,diagnosis\na,c\ntwin,c\n", ["line 3", "twin.jpg or twin.png"]),
    ("image,x,y\na,1,0\nb,,1\n", ["line 3", "'x'"]),
    ("image,age,height\na,3,4\nb,5,6\n", ["--label-column", "age, height"]),
    ("who,what\nx,1\n", ["--image-column", "who, what"]),
    ("image,image\na,1\n", ["distinct"]),
    ("image,label\n", ["no rows"]),
    ("image,label\na,b,c\n", ["line 2", "3 cells"]),
])
def test_tables_that_cant_be_used(tmp_path: Path, text: str, words: list[str], capsys: pytest.CaptureFixture) -> None:
    with_table(tmp_path, text, "a.png", "b.png", "twin.png", "twin.jpg")
    said = sentence(capsys, lambda: run(tmp_path))
    assert all(word in said for word in [*words, "" if "'Cat'" in words[0] else "truth.csv"]), said
    assert not list(tmp_path.glob("labels.csv*"))


def test_column_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with_table(tmp_path, "image,label\na,x\n", "a.png")
    assert "'dx'" in sentence(capsys, lambda: run(tmp_path, "--label-column", "dx"))


# %% MedMNIST


def medmnist(file: Path, colour: bool = False, classes: int = 0, **changes) -> dict[str, np.ndarray]:
    """A file as MedMNIST writes them: 6, 2 and 3 images of 28 x 28; labels (N, 1), or 0/1 (N, classes)."""
    rng, arrays = np.random.default_rng(0), {}
    for part, n in (("train", 6), ("val", 2), ("test", 3)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (n, 28, 28, 3)[:4 if colour else 3], dtype=np.uint8)
        arrays[f"{part}_labels"] = (rng.integers(0, 2, (n, classes)) if classes else np.arange(n)[:, None] * 2 % 11
                                    ).astype(np.uint8)
    np.savez_compressed(file, **(arrays | changes))
    return arrays


@pytest.mark.parametrize("colour", [False, True])
def test_medmnist_keeps_pixels_parts_and_labels(tmp_path: Path, colour: bool, capsys: pytest.CaptureFixture) -> None:
    arrays = medmnist(tmp_path / "bloodmnist.npz", colour)
    run(tmp_path)
    assert "kind: medmnist" in capsys.readouterr().out
    folder = tmp_path / "bloodmnist"
    images = read_images(folder)
    assert images.classes == ["00", "02", "04", "06", "08", "10"] and not images.multi_label  # in their order
    assert split_images(images).rows == images.rows  # nothing is split anew
    for part in ("train", "val", "test"):
        rows = images.part(part)
        assert [int(row.labels[0]) for row in rows] == arrays[f"{part}_labels"][:, 0].tolist()
        for row, pixels in zip(rows, arrays[f"{part}_images"], strict=True):
            with Image.open(folder / row.path) as image:
                assert image.format == "PNG" and np.array_equal(np.asarray(image), pixels)


def test_chestmnist_has_several_labels_an_image(tmp_path: Path) -> None:
    arrays = medmnist(tmp_path / "chestmnist.npz", classes=14)
    run(tmp_path / "chestmnist.npz", "--out", str(tmp_path / "out"))
    images = read_images(tmp_path / "out")
    assert images.multi_label and images.classes == [f"{i:02d}" for i in range(14)]
    for part in ("train", "val", "test"):
        assert np.array_equal(images.truth(images.part(part)), arrays[f"{part}_labels"])


@pytest.mark.parametrize("changes, words", [
    ({"train_images": np.zeros((6, 28, 28, 28), np.uint8)}, ["28 x 28 x 28"]),
    ({"train_labels": np.array([None] * 6, object)}, ["plain array"]),
])
def test_medmnist_files_that_cant_be_used(tmp_path: Path, changes: dict, words: list[str],
                                          capsys: pytest.CaptureFixture) -> None:
    medmnist(tmp_path / "x.npz", **changes)
    said = sentence(capsys, lambda: run(tmp_path / "x.npz"))
    assert all(word in said for word in ["x.npz", *words])


def test_damaged_and_foreign_npz(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    medmnist(tmp_path / "x.npz")
    whole = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(whole[:len(whole) // 2])
    assert "x.npz" in sentence(capsys, lambda: run(tmp_path / "x.npz"))
    np.savez(tmp_path / "x.npz", weights=np.zeros(3))
    assert "train_images" in sentence(capsys, lambda: run(tmp_path / "x.npz"))


# %% the command


def test_existing_labels_are_kept_unless_asked(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with_table(tmp_path, "image_name,diagnosis\na,cat\n", "a.png")
    (tmp_path / "labels.csv").write_text("mine")
    assert "--overwrite" in sentence(capsys, lambda: run(tmp_path))
    assert (tmp_path / "labels.csv").read_text() == "mine"
    run(tmp_path, "--overwrite")
    assert table(tmp_path) == [{"image": "a.png", "label": "cat"}]


def test_labels_csv_of_another_form_is_not_its_own_source(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with_table(tmp_path, "image_name,diagnosis\na,cat\n", "a.png", file="labels.csv")
    more = ["--table", str(tmp_path / "labels.csv"), "--overwrite"]
    assert "another name" in sentence(capsys, lambda: run(tmp_path, *more))


def test_several_tables_ask_for_a_choice(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with_table(tmp_path, "image,label\na,x\n", "a.png")
    with_table(tmp_path, "image,label\na,y\n", file="more.CSV")
    said = sentence(capsys, lambda: run(tmp_path))
    assert "more.CSV" in said and "truth.csv" in said and "--table" in said
    run(tmp_path, "--table", str(tmp_path / "more.CSV"))
    assert table(tmp_path)[0]["label"] == "y"


def test_class_folders_need_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    put(tmp_path, "Training/cat/0.png", "Testing/cat/1.png")
    run(tmp_path)
    assert "nothing to do" in capsys.readouterr().out and not (tmp_path / "labels.csv").exists()


def test_asked_kind_without_its_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    put(tmp_path, "cat/0.png")
    assert "--table" in sentence(capsys, lambda: run(tmp_path, "--kind", "isic2019"))
    assert "not a folder" in sentence(capsys, lambda: run(tmp_path / "gone"))
    assert "gone.csv" in sentence(capsys, lambda: run(tmp_path, "--table", str(tmp_path / "gone.csv")))


def test_file_names_win_over_numbers_that_happen_to_fit(tmp_path: Path) -> None:
    folder = put(tmp_path / "set", *(f"{i}.png" for i in range(1, 5)))
    (folder / "t.csv").write_text("id,scan,label\n" + "".join(f"{i - 1},{i}.png,{'ab'[i % 2]}\n" for i in range(1, 5)))
    prepare.main(["--data", str(folder), "--skip-missing"])
    assert {row.path: row.labels[0] for row in read_images(folder).rows} == {f"{i}.png": "ab"[i % 2] for i in range(1, 5)}


def test_a_name_with_other_folders_is_taken_and_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = put(tmp_path / "set", "x/1.png", "x/2.png")
    (folder / "t.csv").write_text("path,target\n/old/machine/1.png,a\n/old/machine/2.png,b\n")
    prepare.main(["--data", str(folder)])
    assert "2 names share no folder with the file taken for them, such as /old/machine/1.png: x/1.png" in capsys.readouterr().out


def test_one_class_in_use_keeps_its_name(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = put(tmp_path / "set", "1.png", "2.png")
    (folder / "t.csv").write_text("image,MEL,NV\n1.png,1,0\n2.png,1,0\n")
    prepare.main(["--data", str(folder)])
    assert {row.labels for row in read_images(folder).rows} == {("MEL",)}
    (folder / "t.csv").write_text("image,MEL,NV\n1.png,1,0\n2.png,0,0\n")
    assert "MEL" in sentence(capsys, lambda: prepare.main(["--data", str(folder), "--overwrite"]))


def test_isic_named_as_the_table_keeps_its_lesions(tmp_path: Path) -> None:
    folder = put(tmp_path / "set", "a.jpg", "b.jpg")
    (folder / prepare.ISIC).write_text("image,MEL,NV\na,1.0,0.0\nb,0.0,1.0\n")
    (folder / prepare.ISIC_FACTS).write_text("image,lesion_id\na,L1\nb,L1\n")
    prepare.main(["--data", str(folder), "--table", str(folder / prepare.ISIC)])
    assert {row.group for row in read_images(folder).rows} == {"L1"}


@pytest.mark.parametrize("change, word", [({"train_labels": np.zeros((3, 1), np.uint8)}, "4 images and 3 labels"),
                                          ({"train_labels": np.full((4, 1), -1)}, "below 0"),
                                          ({"train_images": np.zeros((4, 8, 8), np.uint16)}, "0 to 255")])
def test_medmnist_arrays_that_do_not_fit_are_refused(tmp_path: Path, change: dict, word: str,
                                                     capsys: pytest.CaptureFixture) -> None:
    arrays = {"train_images": np.zeros((4, 8, 8), np.uint8), "train_labels": np.arange(4, dtype=np.uint8)[:, None]}
    np.savez(tmp_path / "m.npz", **arrays | change)
    assert word in sentence(capsys, lambda: prepare.main(["--data", str(tmp_path / "m.npz")]))
    assert not list(tmp_path.rglob("*.png"))
