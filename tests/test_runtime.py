"""runtime.py and wrong input: one sentence, exit code 2, nothing half-written; start weights; checkpoints."""

import json
import os
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Callable

import huggingface_hub
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

import cass
import runtime
from helpers import class_folders, labels_csv, put, sentence
from runtime import Run, UserError, build_model, clear_exit, pick_device, pick_precision, pick_workers

TINY = ("--init random --cnn test_resnet --transformer test_vit --image-size 32 --batch-size 4 --workers 0 "
        "--epochs 1").split()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return class_folders(tmp_path / "images", cat=10, dog=10)


def command(images: Path, out: Path, *more: str) -> None:
    cass.main(["--data", str(images), "--out", str(out), *TINY, *more])


# %% wrong input


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:300])


@pytest.mark.parametrize("more, words", [
    (["--data", "nowhere"], ["nowhere is not a folder"]),
    (["--batch-size", "15"], ["14 training images", "a batch of 15", "--batch-size"]),
    (["--cnn", "resnet51"], ["resnet51", "nearest", "resnet50"]),
    (["--transformer", "vit_tiny_patch16_224.nope"], ["vit_tiny_patch16_224.nope", "nearest", "vit_tiny_patch16_224"]),
    (["--transformer", "vit_tiny_patch16_224.augreg_in21k"],
     ["same number of outputs", "test_resnet has 1000", "augreg_in21k has 21843"]),
    (["--image-size", "40"], ["--image-size 40", "no multiple", "test_vit", "16", "32 is"]),
    (["--image-size", "8"], ["--image-size 8", "no multiple", "16 is"]),
    (["--transformer", "test_coatnet", "--image-size", "48"], ["test_coatnet", "--image-size 48"]),
    (["--init", "nowhere"], ["--init nowhere is no folder", "imagenet", "random"]),
    (["--device", "gpu"], ["--device gpu", "--device cpu"]),
    (["--device", "cuda:99"], ["--device cuda:99", "--device cpu"]),
    (["--workers", "-1"], ["--workers -1"]),
    (["--split", "group"], ["no groups", "--split image"]),
    (["--split", "patients"], ["--split", "patients", "group"]),
    (["--ratios", "0.7,0.1"], ["--ratios", "0.7,0.1"]),
    (["--ratios", "0.9,0.9,-0.8"], ["--ratios", "sum to 1"]),
    (["--lr", "0"], ["--lr", "0"]),
    (["--lr", "nan"], ["--lr", "nan"]),
    (["--lr", "fast"], ["--lr", "fast"]),
    (["--epochs", "0"], ["--epochs", "0"]),
    (["--epochs", "1.5"], ["--epochs", "1.5"]),
    (["--image-size", "-32"], ["--image-size", "-32"]),
    (["--swa-start", "2"], ["--swa-start", "2"]),
    (["--augment", "mixup"], ["--augment", "mixup", "solarize"]),
    (["--precision", "fp8"], ["--precision", "fp8", "bf16"]),
    (["--learning-rate", "1"], ["--learning-rate"]),
    (["--epoch", "1"], ["--epoch"]),  # no abbreviations: an old one may mean something else later
])
def test_wrong_option(more: list[str], words: list[str], images: Path, tmp_path: Path,
                      capsys: pytest.CaptureFixture) -> None:
    said = sentence(capsys, lambda: command(images, tmp_path / "out", *more))
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make, words", [
    (lambda f: put(f, "notes/0.txt.png").joinpath("notes/0.txt.png").rename(f / "notes/0.txt"), ["holds no images"]),
    (lambda f: labels_csv(f, "image,label\n0.png,cat\n9.png,cat\n", "0.png"), ["line 3", "9.png", "not in"]),
    (lambda f: labels_csv(f, "image,label,site\n0.png,cat,x\n", "0.png"), ["unknown column 'site'"]),
    (lambda f: labels_csv(f, "image,label\n0.png,cat\n0.png,dog\n", "0.png"), ["lines 2 and 3", "0.png"]),
])
def test_wrong_data_set(make: Callable[[Path], object], words: list[str], tmp_path: Path,
                        capsys: pytest.CaptureFixture) -> None:
    make(tmp_path / "set")
    said = sentence(capsys, lambda: command(tmp_path / "set", tmp_path / "out"))
    assert all(word in said for word in [str(tmp_path / "set"), *words]), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("spoil", [cut, lambda f: f.write_bytes(b""), lambda f: f.write_text("hello")],
                         ids=["truncated", "empty", "text"])
def test_damaged_image_is_named_or_left_out(spoil: Callable[[Path], object], workers: str, images: Path, tmp_path: Path,
                                            capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    for file in images.glob("cat/*.png"):
        spoil(file)
    said = sentence(capsys, lambda: command(images, out, "--workers", workers))
    assert str(images / "cat") in said and ".png can't be read as an image" in said and "--skip-bad" in said
    assert not [file.name for file in (out.iterdir() if out.exists() else ()) if file.suffix in (".pt", ".tmp")]
    command(images, out, "--workers", workers, "--skip-bad")  # the folder of the run that failed can be used
    assert "cat" not in (out / "split.csv").read_text() and (out / "cnn.pt").exists()
    assert "left out 10 images" in capsys.readouterr().out


def test_folder_that_cant_be_written(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        said = sentence(capsys, lambda: command(images, out))
        assert f"--out {out} can't be written" in said
    assert (tmp_path / "file").read_text() == "mine" and {f.name for f in tmp_path.iterdir()} == {"file", "images"}


def test_files_of_others_in_the_folder_stay(tmp_path: Path) -> None:
    images = labels_csv(tmp_path, "image,label\n" + "".join(f"{i}.png,cat\n" for i in range(20)),
                        *(f"{i}.png" for i in range(20)))
    for name in ("mine.pt", "notes.csv", "other.jsonl"):
        (tmp_path / name).write_text("mine")
    command(images, tmp_path)
    assert all((tmp_path / name).read_text() == "mine" for name in ("mine.pt", "notes.csv", "other.jsonl"))
    command(images, tmp_path, "--overwrite")
    assert all((tmp_path / name).read_text() == "mine" for name in ("notes.csv", "other.jsonl"))
    assert (tmp_path / "labels.csv").read_text().startswith("image,label\n0.png,cat\n")


@pytest.mark.parametrize("error", [UserError("mend it"), ValueError("mend it"), RuntimeError(
    'Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File "x.py"\n'
    "data.DataError: mend it\n")])
def test_errors_become_one_sentence(error: Exception, capsys: pytest.CaptureFixture) -> None:
    def fail() -> None:
        with clear_exit(ValueError, RuntimeError):
            raise error
    assert sentence(capsys, fail) == "error: mend it\n"


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(KeyError), clear_exit(ValueError):
        raise KeyError("a bug")


# %% device, precision, workers


def test_automatic_choices_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == cpu and pick_precision("auto", cpu) == torch.float32
    assert pick_workers(None, cpu) == 1 and pick_workers(0, cpu) == 0 and pick_workers(5, cpu) == 5
    assert [pick_precision(name, cpu) for name in ("fp32", "bf16", "fp16")] == [
        torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("native, dtype", [(True, torch.bfloat16), (False, torch.float16)])
def test_automatic_precision_on_a_gpu_counts_no_emulation(native: bool, dtype: torch.dtype,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert pick_precision("auto", torch.device("cuda")) == dtype


# %% models and start weights


def same_weights(model: torch.nn.Module, state: dict) -> bool:
    ours = model.state_dict()
    return ours.keys() == state.keys() and all(torch.equal(ours[k], state[k]) for k in ours)


def test_model_follows_its_seed_and_leaves_it_in_training_mode() -> None:
    one, again, other = (build_model("test_vit", "random", 32, seed=s) for s in (1, 1, 2))
    assert same_weights(one, again.state_dict()) and not torch.equal(one.head.weight, other.head.weight)
    assert one.training and one(torch.zeros(2, 3, 32, 32)).shape == (2, 1000)
    assert build_model("test_resnet", "random", 40, outputs=3)(torch.zeros(2, 3, 40, 40)).shape == (2, 3)


@pytest.mark.parametrize("name, size", [("mixer_s32_224", 104), ("test_vit", 72)])
def test_patches_that_leave_pixels_over_are_refused(name: str, size: int) -> None:
    with pytest.raises(UserError, match=f"--image-size {size} is no multiple of {name}'s patch"):
        build_model(name, "random", size)


def test_overlapping_patches_take_any_size() -> None:
    assert build_model("pvt_v2_b0", "random", 96)(torch.zeros(2, 3, 96, 96)).shape == (2, 1000)


@pytest.fixture(scope="module")
def pretrained() -> dict[str, dict]:
    """Made-up ImageNet weights, for images of timm's own size."""
    torch.manual_seed(42)
    return {name: {k: torch.randn_like(v) if v.is_floating_point() else v
                   for k, v in timm.create_model(name).state_dict().items()} for name in ("test_resnet", "test_vit")}


@pytest.mark.parametrize("file", ["test_resnet.safetensors", "test_resnet.pt", "test_resnet.pth",
                                  "test_resnet.r160_in1k.safetensors", "test_resnet/model.safetensors"])
def test_start_from_a_folder_of_weights(file: str, tmp_path: Path, pretrained: dict) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    save = save_file if file.endswith(".safetensors") else torch.save
    save(pretrained["test_resnet"], tmp_path / file)
    name = "test_resnet.r160_in1k" if "r160" in file else "test_resnet"
    assert same_weights(build_model(name, str(tmp_path), 48), pretrained["test_resnet"])


def test_start_from_a_folder_without_the_weights(images: Path, tmp_path: Path, pretrained: dict,
                                                 capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    save_file(pretrained["test_resnet"], folder / "test_resnet.safetensors")
    said = sentence(capsys, lambda: command(images, tmp_path / "out", "--init", str(folder)))
    assert f"--init {folder}" in said and "test_vit.safetensors" in said
    (folder / "test_vit.pt").write_bytes(b"no weights")
    said = sentence(capsys, lambda: command(images, tmp_path / "out", "--init", str(folder)))
    assert "test_vit" in said and str(folder / "test_vit.pt") in said
    (folder / "test_vit.pt").unlink()
    save_file(pretrained["test_resnet"], folder / "test_vit.safetensors")  # of another model
    said = sentence(capsys, lambda: command(images, tmp_path / "out", "--init", str(folder)))
    assert "test_vit" in said and str(folder / "test_vit.safetensors") in said
    assert not (tmp_path / "out").exists()


def no_network(*args: object, **options: object) -> None:
    raise AssertionError("the network is asked though the weights are here")


def test_imagenet_weights_from_the_hub_cache(tmp_path: Path, pretrained: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def cached(repo: str, file: str) -> str:
        asked.append((repo, file))
        save_file(pretrained[repo.split("/")[1].split(".")[0]], tmp_path / file)
        return str(tmp_path / file)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    assert same_weights(build_model("test_resnet", "imagenet", 48), pretrained["test_resnet"])
    vit = build_model("test_vit.r160_in1k", "imagenet", 64)  # 4 x 4 patches, the weights have 10 x 10
    assert asked == [("timm/test_resnet.r160_in1k", "model.safetensors"), ("timm/test_vit.r160_in1k", "model.safetensors")]
    wanted = pretrained["test_vit"] | {"pos_embed": resample_abs_pos_embed(
        pretrained["test_vit"]["pos_embed"], (4, 4), num_prefix_tokens=vit.num_prefix_tokens)}
    assert vit.pos_embed.shape[1] == 16 + vit.num_prefix_tokens and same_weights(vit, wanted)


@pytest.mark.parametrize("error", [urllib.error.URLError("no route"), TimeoutError("timed out"),
                                   ConnectionResetError("reset")])
def test_imagenet_weights_that_cant_be_had(error: Exception, images: Path, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    limits = []

    def unreachable(request: urllib.request.Request, timeout: float) -> None:
        limits.append(timeout)
        raise error
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file: None)
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(timm, "create_model", no_network)
    begun = time.perf_counter()
    said = sentence(capsys, lambda: command(images, tmp_path / "out", "--init", "imagenet"))
    assert all(word in said for word in ("test_resnet", "--init random", "--init FOLDER"))
    assert sum(limits) <= 12 and len(limits) == 1 and time.perf_counter() - begun < 15
    assert not (tmp_path / "out").exists()


def test_models_without_imagenet_weights(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    said = sentence(capsys, lambda: command(images, tmp_path / "out", "--init", "imagenet", "--cnn", "resnet200"))
    assert "no ImageNet weights for resnet200" in said and "--init random" in said


# %% checkpoints


def begun_run(folder: Path, **options: object) -> tuple[Run, dict | None]:
    run = Run(folder, {"resume": False, "overwrite": False, "lr": 0.1} | options)
    return run, run.begin(classes=[])


def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run, state = begun_run(tmp_path)
    assert state is None
    for epoch in (1, 2, 3):
        run.log({"epoch": epoch})
        run.save({"epoch": epoch, "weights": torch.full((3,), float(epoch))}, force=True)
    run.log({"epoch": 4})
    assert begun_run(tmp_path, resume=True)[1]["epoch"] == 3
    cut(tmp_path / "checkpoint.pt")
    run, state = begun_run(tmp_path, resume=True)
    assert state["epoch"] == 2 and state["weights"].tolist() == [2, 2, 2]
    assert f"{tmp_path / 'checkpoint.pt'} can't be read" in capsys.readouterr().err
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2]
    (tmp_path / "checkpoint-prev.pt").write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint.*can be read.*--overwrite"):
        begun_run(tmp_path, resume=True)


def test_kill_between_two_renames_leaves_a_checkpoint(tmp_path: Path) -> None:
    run, _ = begun_run(tmp_path)
    for epoch in (1, 2):
        run.log({"epoch": epoch})
        run.save({"epoch": epoch}, force=True)
    os.replace(tmp_path / "checkpoint.pt", tmp_path / "checkpoint-prev.pt")
    assert begun_run(tmp_path, resume=True)[1]["epoch"] == 2


def test_a_write_that_is_cut_short_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = begun_run(tmp_path)
    run.log({"epoch": 1})
    run.save({"epoch": 1}, force=True)

    def killed(value: dict, file: object) -> None:
        file.write(b"half a")
        raise KeyboardInterrupt
    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run.save({"epoch": 2}, force=True)
    monkeypatch.undo()
    assert begun_run(tmp_path, resume=True)[1]["epoch"] == 1


def test_checkpoints_hold_no_code(tmp_path: Path) -> None:
    run, _ = begun_run(tmp_path)
    run.save({"epoch": 1, "path": tmp_path}, force=True)
    with pytest.raises(UserError, match="can be read"):
        begun_run(tmp_path, resume=True)


def test_saving_takes_at_most_five_percent_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = begun_run(tmp_path)
    clock = [run.saved_at]
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(runtime, "save_tensors", lambda value, path: (
        clock.__setitem__(0, clock[0] + 1), torch.save(value, path)))  # each save takes a second

    def saves(epoch: int, seconds: float, force: bool = False) -> bool:
        clock[0] += seconds
        run.save({"epoch": epoch}, force=force)
        return torch.load(tmp_path / "checkpoint.pt", weights_only=True)["epoch"] == epoch
    assert saves(1, 0.1)  # the first one, whose cost is not known yet
    assert not saves(2, 15) and saves(3, 6)  # 21 seconds since the last
    assert not saves(4, 19) and saves(4, 0, force=True)


def test_row_is_written_before_it_is_shown(tmp_path: Path) -> None:
    seen = []
    run = Run(tmp_path, {"resume": False, "overwrite": False}, lambda row: seen.append(
        (row, (tmp_path / "log.jsonl").read_text())))
    run.begin()
    run.log({"epoch": 0, "loss": 0.1})
    run.log({"epoch": 1, "loss": 1 / 3})
    assert seen[1] == ({"epoch": 1, "loss": 1 / 3}, '{"epoch": 0, "loss": 0.1}\n' + json.dumps({"epoch": 1, "loss": 1 / 3}) + "\n")


def test_nothing_is_written_before_the_run_begins(tmp_path: Path) -> None:
    Run(tmp_path / "out", {"resume": False, "overwrite": False})
    Run(tmp_path / "out", {"resume": True, "overwrite": True})
    assert not (tmp_path / "out").exists()


def test_options_that_may_change_on_resuming(tmp_path: Path) -> None:
    run, _ = begun_run(tmp_path, workers=0, device="cpu", data="here")
    run.log({"epoch": 1})
    run.save({"epoch": 1}, force=True)
    assert begun_run(tmp_path, resume=True, workers=2, device="auto", data="there")[1]["epoch"] == 1
    with pytest.raises(UserError, match=r"--lr 0.1, not 0.2"):
        begun_run(tmp_path, resume=True, lr=0.2)
