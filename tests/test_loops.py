"""The three training loops and their commands: stopped anywhere and resumed, with any number of
workers, with a cache or without, a run equals one in a piece to the bit."""

import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import class_folders, equal, sentence
from torch import Tensor, nn

import cass
import dino
import finetune
from runtime import Run


def stop_after(calls: int, method: str, train: Callable[[], object], code: type) -> None:
    """Ctrl-C after so many calls of `Run.save` or `Run.log` ends `train` by an exception."""
    plain, seen = getattr(Run, method), []

    def counted(run: Run, *arguments: object) -> None:
        plain(run, *arguments)
        run.cost = 0  # the next save is not put off
        seen.append(arguments)
        if len(seen) == calls:
            signal.raise_signal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(code):
        patch.setattr(Run, method, counted)
        train()


def timeless(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


# %% the loops, on tiny networks


class TinyNet(nn.Sequential):
    """For images of 8 x 8, with what a run has to keep: batch-norm statistics, random dropout."""

    head_hidden_size = 36

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                         nn.Dropout(0.2), nn.Linear(36, 3))

    def forward_features(self, images: Tensor) -> Tensor:
        for layer in list(self)[:-1]:
            images = layer(images)
        return images  # (N, 36)

    def forward_head(self, features: Tensor, pre_logits: bool) -> Tensor:
        return features

    def get_classifier(self) -> nn.Module:
        return self[5]


class Batches:
    """Three batches an epoch, other ones in each; `shape` makes of images what a loop takes."""

    def __init__(self, shape: Callable[[Tensor], object]) -> None:
        self.shape, self.epoch = shape, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator:
        stream = torch.Generator().manual_seed(self.epoch)
        for _ in range(3):
            yield self.shape(torch.rand(4, 3, 8, 8, generator=stream))


def labelled(images: Tensor) -> tuple[Tensor, Tensor]:
    return images, (images[:, :, 0, 0] > 0.5).float()


def train(name: str, precision: torch.dtype, out: Path, resume: bool = False,
          epochs: int = 6) -> list:
    """Epochs of 3 steps; the networks, as dicts of tensors, the rows, and what comes back."""
    run = Run(out, {"epochs": epochs, "resume": resume})
    run.begin()
    options = {"epochs": epochs, "precision": precision, "log": run.log, "save": run.save,
               "restore": run.restore}
    torch.manual_seed(0)
    first, second = TinyNet(), TinyNet()
    if name == "cass":  # averages once, after step 16
        kept = cass.pretrain_cass(first, second, Batches(lambda x: x), **options)
    elif name == "dino":
        views = Batches(lambda x: ([x, x.flip(3)], [x, x.flip(2)]))
        kept = dino.pretrain_dino(dino.DinoNetwork(first, 8), views, **options)
    else:
        validation = list(Batches(labelled))
        facts = finetune.finetune_network(first, Batches(labelled), validation, patience=3,
                                          lr=0.02, **options)
        return [first.state_dict(), facts, timeless(run.rows)]
    return [*(network.state_dict() for network in kept), timeless(run.rows)]


@pytest.mark.parametrize("name", ["cass", "dino", "finetune"])
@pytest.mark.parametrize("precision, calls, method", [
    (torch.float32, 1, "log"), (torch.float32, 2, "save"), (torch.bfloat16, 5, "log"),
    (torch.float16, 3, "save"), (torch.float32, 6, "save")])
def test_loop_stopped_and_resumed_equals_one_in_a_piece(
        name: str, precision: torch.dtype, calls: int, method: str, tmp_path: Path) -> None:
    wanted = train(name, precision, tmp_path / "a")
    stop_after(calls, method, lambda: train(name, precision, tmp_path / "b"), KeyboardInterrupt)
    assert equal(train(name, precision, tmp_path / "b", resume=True), wanted)
    assert [row["epoch"] for row in wanted[-1]] == [*range(1, len(wanted[-1]) + 1)]


@pytest.mark.parametrize("name", ["cass", "dino"])
def test_finished_loop_trains_on(name: str, tmp_path: Path) -> None:
    """As if it had never ended: averages are of the last quarter of all epochs."""
    train(name, torch.float32, tmp_path / "a")
    longer = train(name, torch.float32, tmp_path / "a", resume=True, epochs=18)
    assert equal(longer, train(name, torch.float32, tmp_path / "b", epochs=18))


# %% the commands

COMMANDS = {"cass": (cass.main, "--cnn test_resnet --transformer test_vit --epochs 3 "
                                "--batch-size 2"),  # averages once, after step 16
            "dino": (dino.main, "--arch test_vit --out-dim 16 --epochs 2"),
            "finetune": (finetune.main, "--arch test_resnet --arch test_vit --epochs 2")}
SHARED = "--init random --image-size 32 --batch-size 4 --workers 0 --precision fp32"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders(tmp_path_factory.mktemp("images"), cat=10, dog=10)  # 14 to train on


def command(name: str, images: Path, out: Path, *more: str) -> None:
    main, options = COMMANDS[name]
    main(["--data", str(images), "--out", str(out), *SHARED.split(), *options.split(), *more])


def results(out: Path) -> dict:
    """All that a run leaves behind, but for times and for how it was called."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    found = {"rows": timeless(rows)}
    for file in out.iterdir():
        if file.suffix == ".csv":
            found[file.name] = file.read_text()
        elif file.suffix == ".pt":
            found[file.name] = torch.load(file, weights_only=True)
            found[file.name].pop("rows", None)
        elif file.name == "result.json":
            found |= {key: value for key, value in json.loads(file.read_text()).items()
                      if key != "run"}
    return found


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict]:
    @functools.cache
    def run(name: str, precision: str = "fp32") -> dict:
        out = tmp_path_factory.mktemp("runs") / name
        command(name, images, out, "--precision", precision)
        return results(out)
    return run


@pytest.mark.parametrize("name, precision, calls, method, workers, cache", [
    ("cass", "fp32", 2, "save", "02", "10"), ("cass", "bf16", 3, "log", "20", "01"),
    ("cass", "fp32", 3, "save", "00", "00"), ("cass", "fp32", 1, "log", "00", "00"),
    ("dino", "fp32", 2, "save", "20", "01"), ("dino", "bf16", 3, "log", "02", "11"),
    ("finetune", "fp32", 2, "save", "20", "01"), ("finetune", "fp32", 3, "save", "02", "10"),
    ("finetune", "bf16", 4, "log", "00", "00")])  # calls 3 and 4 are of the second network
def test_command_stopped_and_resumed_equals_one_in_a_piece(
        name: str, precision: str, calls: int, method: str, workers: str, cache: str, images: Path,
        undisturbed: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """After two saves the newest checkpoint is damaged, so that the one before is used."""
    out, halves = tmp_path / "out", []
    for processes, cached in zip(workers, cache):
        halves.append(["--precision", precision, "--workers", processes])
        halves[-1] += ["--cache", str(tmp_path / "cache")] * int(cached)
    stop_after(calls, method, lambda: command(name, images, out, *halves[0]), SystemExit)
    damaged = (calls, method) == (2, "save")
    if damaged:
        [file] = [file for file in out.glob("checkpoint*.pt") if "prev" not in file.name]
        file.write_bytes(file.read_bytes()[:5000])
    command(name, images, out, *halves[1], "--resume")
    assert ("can't be read; looking for the one before" in capsys.readouterr().err) == damaged
    assert equal(results(out), undisturbed(name, precision))


@pytest.mark.parametrize("file, time", [("log.jsonl", 2), ("checkpoint.pt", 1),
                                        ("checkpoint-prev.pt", 1), ("checkpoint.pt", 2)])
def test_kill_before_a_file_gets_its_name(file: str, time: int, images: Path,
                                          undisturbed: Callable, tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        replace, seen = os.replace, []

        def deadly(source: Path, target: Path) -> None:
            seen.append(Path(target).name)
            if seen.count(file) == time:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)
        os.replace = deadly
        try:
            command("dino", images, tmp_path)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    command("dino", images, tmp_path, "--resume")
    assert equal(results(tmp_path), undisturbed("dino"))


@pytest.mark.parametrize("name, epochs", [("cass", "3"), ("dino", "2"), ("finetune", "2")])
def test_finished_run_trains_on(name: str, epochs: str, images: Path, undisturbed: Callable,
                                tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """But not fine-tuning, of which the best epoch is final."""
    command(name, images, tmp_path, "--epochs", "1")
    before = results(tmp_path)
    assert "a finished run" in sentence(capsys, lambda: command(name, images, tmp_path))
    command(name, images, tmp_path, "--epochs", "1", "--resume")
    assert "is finished" in capsys.readouterr().out
    if name == "finetune":
        said = sentence(capsys, lambda: command(name, images, tmp_path, "--resume"))
        assert "--epochs 1, not 2" in said and equal(results(tmp_path), before)
        return
    assert equal(results(tmp_path), before)
    command(name, images, tmp_path, "--resume")
    assert equal(results(tmp_path), undisturbed(name))
    less = sentence(capsys, lambda: command(name, images, tmp_path, "--resume", "--epochs", "1"))
    assert f"--epochs {epochs}, not 1" in less


@pytest.mark.parametrize("name", ["cass", "dino", "finetune"])
def test_what_can_not_be_resumed(name: str, images: Path, tmp_path: Path, monkeypatch,
                                 capsys: pytest.CaptureFixture) -> None:
    out, others = tmp_path / "out", class_folders(tmp_path / "others", cat=12, dog=10)
    monkeypatch.setattr(sys, "argv", ["/somewhere/x.py", "--data", "my images"])
    stop_after(1, "save", lambda: command(name, images, out, "--resume"), SystemExit)
    said = capsys.readouterr()
    assert f"{out} holds no checkpoint: starting at the beginning" in said.out
    assert said.err == "\nstopped; go on with\n  python x.py --data 'my images' --resume\n"
    before = {file: file.read_bytes() for file in out.iterdir()}
    for words, more in {"an unfinished run: --resume it": [],
                        "not 0.002": ["--resume", "--lr", "0.002"],
                        "--seed 0, not 3": ["--resume", "--seed", "3"],
                        "--image-size 32, not 48": ["--resume", "--image-size", "48"],
                        "changed since": ["--resume", "--data", str(others)]}.items():
        said = sentence(capsys, lambda: command(name, images, out, *more))
        assert words in said and str(out) in said
    assert {file: file.read_bytes() for file in out.iterdir()} == before
    [checkpoint] = out.glob("checkpoint*.pt")
    torch.save({"epoch": 1, "parts": []}, checkpoint)  # as the first version wrote them
    assert "older version" in sentence(capsys, lambda: command(name, images, out, "--resume"))
    checkpoint.write_bytes(b"damaged")
    with pytest.raises(SystemExit):
        command(name, images, out, "--resume")
    assert "error: no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cass", "dino", "finetune"])
def test_loss_that_is_not_finite_ends_the_command(name: str, images: Path, tmp_path: Path,
                                                  capsys: pytest.CaptureFixture) -> None:
    said = sentence(capsys, lambda: command(name, images, tmp_path, "--lr", "1e30"))
    assert "the loss became" in said and "--lr" in said and "epoch" in said
    assert not any(tmp_path.glob("*.pt")) and not (tmp_path / "result.json").exists()
