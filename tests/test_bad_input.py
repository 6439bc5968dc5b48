"""What users do wrong, through the commands: one sentence, exit code 2, and nothing is written."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import cass
import data
import dino
import finetune
import images as image_files
from helpers import class_folders, labels_csv, put, sentence

TINY = "--init random --image-size 32 --batch-size 4 --workers 0 --epochs 1 "
COMMANDS = {  # right, until something is added; options that come later count
    "cass": "--data set --out out --cnn test_resnet --transformer test_vit " + TINY,
    "dino": "--data set --out out --arch test_vit --out-dim 8 " + TINY,
    "finetune": "--data set --out out --arch test_vit " + TINY,
    "tune": "--data set --out out --weights pre " + TINY,
    "predict": "--out out --weights tuned --predict set --workers 0", "data": "--data set",
    "bare": ""}
MAIN = {"cass": cass.main, "dino": dino.main, "data": data.main}


def run(command: str, more: str = "") -> None:
    MAIN.get(command, finetune.main)([*COMMANDS[command].split(), *more.split()])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything in it that wrong options can name."""
    folder = tmp_path_factory.mktemp("root")
    class_folders(folder / "set", cat=10, dog=10)
    class_folders(folder / "single", cat=20)
    put(folder / "flat", *(f"{i}.png" for i in range(8)))
    put(class_folders(folder / "flat-train", **{"val/a": 4, "val/b": 4, "test/a": 4, "test/b": 4}),
        "train/0.png", "train/1.png")
    labels_csv(folder / "quote", 'image,label\na.png,cat\n"b.png,dog\n', "a.png", "b.png")
    for name in ("text/notes.txt", "pointers/test_resnet.pt", "pointers/test_vit.pt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    (folder / "twice.csv").write_text("path,split\ncat/0.png,train\ncat/0.png,val\n")
    (folder / "other.csv").write_text("path,split\nmouse/0.png,train\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("cass", "--out pre")
        run("tune", "--out tuned")
    return folder


@pytest.fixture(autouse=True)
def inside(root: Path, monkeypatch) -> None:
    monkeypatch.chdir(root)


def refused(capsys, root: Path, command: str, more: str, words: str) -> None:
    before = {file: file.stat().st_mtime_ns for file in root.rglob("*")}
    said = sentence(capsys, lambda: run(command, more))
    assert all(word in said for word in words.split(" & ")), said
    assert {file: file.stat().st_mtime_ns for file in root.rglob("*")} == before


ANYWHERE = [  # options that all commands share
    ("--data set/cat/0.png", "is not a folder"), ("--data quote", "quote/labels.csv"),
    ("--seed -1", "--seed & -1"), ("--seed x", "x is not a whole number"), ("--init=", "no folder"),
    ("--seed 9999999999", "--seed"), ("--split-seed -1", "--split-seed & -1"),
    ("--image-size 8", "--image-size 8 & 16 is"), ("--image-size -32", "--image-size & -32"),
    ("--device gpu", "--device gpu & --device cpu"), ("--device cuda:99", "--device cuda:99"),
    ("--batch-size 0", "--batch-size & 0"), ("--workers two", "--workers & two"),
    ("--ratios 0.7,0.1", "--ratios & 0.7,0.1"), ("--ratios 0.9,0.9,-0.8", "sum to 1"),
    ("--ratios 70,10,20", "sum to 1"), ("--ratios 0,0.5,0.5", "sum to 1"),
    ("--ratios nan,0,1", "sum to 1"), ("--window 5,4", "--window & LOW,HIGH"),
    ("--window 5", "LOW,HIGH"), ("--window all", "LOW,HIGH"), ("--window nan,1", "LOW,HIGH"),
    ("--lr 0", "--lr & 0"), ("--lr nan", "--lr & nan"), ("--lr inf", "--lr & inf"),
    ("--epochs 0", "--epochs & 0"), ("--epochs 1.5", "--epochs & '1.5'"),
    ("--precision fp8", "--precision & fp8 & bf16"), ("--split-file set", "set can't be"),
    ("--split-file twice.csv", "line 3 & cat/0.png & twice"), ("--epoch 1", "--epoch"),
    ("--out set/cat/0.png/x", "--out set/cat/0.png/x can't be written"), ("extra", "extra")]
EVERYWHERE = [  # what each command has to look at itself
    ("--data nowhere", "nowhere is not a folder"), ("--data text", "text holds no images & 1 .txt"),
    ("--device meta", "--device meta"), ("--batch-size 1", "--batch-size 1"),
    ("--image-size 40", "--image-size 40 & no multiple & test_vit & 16 & 32 is"),
    ("--workers -1", "--workers & -1"), ("--split-file other.csv", "other.csv"),
    ("--out set/cat/0.png", "--out set/cat/0.png can't be written"),
    ("--cache set/cat/0.png", "--cache set/cat/0.png can't be written")]


OWN = [
    ("cass", "--batch-size 15", "14 training images & 15"), ("cass", "--cnn resnet51", "resnet50"),
    ("cass", "--ratios 0.1,0.1,0.8", "2 training images"),
    ("cass", "--transformer test_vit.nope", "test_vit.nope & nearest & test_vit"),
    ("cass", "--transformer levit_128s --image-size 40", "levit_128s & --image-size 40"),
    ("cass", "--init nowhere", "--init nowhere is no folder & imagenet & random"),
    ("cass", "--init random,set", "--init set & put test_vit.safetensors there"),
    ("cass", "--init pointers", "pointers/test_resnet.pt & Git LFS"),
    ("cass", "--augment mixup", "mixup & solarize"), ("cass", "--loss focal", "focal & contrast"),
    ("cass", "--outputs relu", "relu"), ("cass", "--cnn-optimizer adamw", "adamw & sgd"),
    ("dino", "--batch-size 15", "14 training images & 15"), ("dino", "--out-dim 0", "--out-dim"),
    ("dino", "--arch resnet51", "resnet50"), ("dino", "--recipe best", "best & authors"),
    ("dino", "--init pointers", "pointers/test_vit.pt"),
    ("dino", "--arch cait_xxs24_224 --recipe authors --image-size 64", "cait_xxs24_224 & 32"),
    ("bare", "--data set", "--weights & --arch"), ("bare", "--arch test_vit", "--data"),
    ("tune", "--arch test_vit", "not both"), ("finetune", "--arch resnet51", "resnet50"),
    ("finetune", "--arch test_vit.r160_in1k", "two --arch"),
    ("finetune", "--init pointers", "test_vit.pt"),
    ("tune", "--weights nowhere", "nowhere is not there"), ("tune", "--weights flat", "no network"),
    ("tune", "--weights pre/config.json", "pre/config.json & cass.py"),
    ("tune", "--weights pre/checkpoint.pt", "pre/checkpoint.pt"),
    ("tune", "--weights pointers", "pointers/test_resnet.pt"),
    ("tune", "--out pre", "--out pre holds the --weights"), ("tune", "--labels 0", "--labels"),
    ("tune", "--labels 1.5", "1.5"), ("tune", "--seeds 0", "--seeds"),
    ("tune", "--protocol frozen", "frozen & linear"), ("tune", "--schedule 8", "'8' & run"),
    ("tune", "--class-weights max", "max & inverse"), ("tune", "--data flat", "flat has no class"),
    ("finetune", "--data single", "has 1 class"),
    ("tune", "--data flat-train", "the train part of flat-train has no labelled"),
    ("finetune", "--ratios 0.9,0.1,0", "the test part of set has no labelled"),
    ("predict", "--predict nowhere", "nowhere"), ("predict", "--predict text", "no images"),
    ("predict", "--predict text/notes.txt", "text/notes.txt can't be read as an image"),
    ("predict", "--weights pre", "pre/cnn.pt is pretrained only"),
    ("predict", "--weights nowhere", "nowhere"), ("predict", "--workers -1", "--workers & -1"),
    ("predict", "--out tuned", "tuned/predictions.csv is there already"),
    ("predict", "--out set/cat/0.png", "set/cat/0.png"),
    ("bare", "--predict set", "--predict needs fine-tuned --weights"),
    ("data", "--data text", "no images"), ("data", "--split-file twice.csv", "line 3")]


@pytest.mark.parametrize("command, more, words", [
    *OWN, *(("cass", *case) for case in ANYWHERE),
    *((command, *case) for command in ("cass", "dino", "finetune") for case in EVERYWHERE)])
def test_options_that_cant_be_used(command: str, more: str, words: str, root: Path, capsys) -> None:
    refused(capsys, root, command, more, words)


# %% images that can't be used: only found when they are read


@pytest.mark.parametrize("command, workers", [
    ("cass", 0), ("cass", 1), ("dino", 0), ("finetune", 0)])
def test_bad_image_is_named(command: str, workers: int, tmp_path: Path, monkeypatch,
                            capsys) -> None:
    monkeypatch.chdir(tmp_path)
    class_folders(Path("set"), **{"train/cat": 4, "train/dog": 4, "val/cat": 1, "test/dog": 1})
    file = Path("set/train/cat/text.png")
    file.write_text("x")
    assert str(file) in sentence(
        capsys, lambda: run(command, f"--workers {workers} --batch-size 9"))
    assert not list(Path("out").glob("*.[pt]*"))  # no .pt, no .tmp


def test_bad_images_can_be_skipped_and_files_of_others_stay(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = class_folders(tmp_path, cat=4) / "cat"
    (folder / "text.png").write_text("x")
    (folder / "dangling.png").symlink_to("gone.png")
    mine = [Path(name) for name in ("mine.pt", "notes.csv", "other.jsonl", "x.tmp")]
    for file in mine:
        file.write_text("mine")
    run("cass", "--data . --out . --ratios 1,0,0 --skip-bad --cache cache")
    assert Path("split.csv").read_text().count("\n") == 5 and Path("cnn.pt").exists()
    assert all(file.read_text() == "mine" for file in mine)


def test_files_and_folders_without_the_right_to_read(tmp_path: Path, monkeypatch, capsys) -> None:
    """Root may read all, so the refusal has to be played."""
    monkeypatch.chdir(tmp_path)
    put(Path("set"), "cat/0.png", "dog/secret/1.png", "dog/2.png")

    def refuse(path: object, *rest: object, act: Callable = open, name: str = "2.png"):
        if Path(path).name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return act(path, *rest)
    monkeypatch.setattr(image_files, "open", refuse, raising=False)
    said = sentence(capsys, lambda: run("cass", "--ratios 1,0,0 --batch-size 3"))
    assert str(Path("set/dog/2.png")) in said and "Permission denied" in said
    monkeypatch.setattr(os, "scandir", partial(refuse, act=os.scandir, name="secret"))
    said = sentence(capsys, lambda: run("data"))
    assert "secret" in said and "Permission denied" in said  # else its images would be missing


def test_a_tilde_is_the_home_folder(root: Path, monkeypatch, capsys) -> None:
    """In --data=~/set a shell leaves it as it is."""
    monkeypatch.setenv("HOME", str(root))
    run("data", "--data=~/set")
    assert f"{root / 'set'}: 20 images" in capsys.readouterr().out
    refused(capsys, root, "cass", "--data=~/gone", f"{root / 'gone'} is not a folder")
