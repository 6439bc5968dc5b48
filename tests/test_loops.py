"""The three training loops and their commands: stopped anywhere and resumed, with any number of
workers, with a cache or without, a run equals one in a piece to the bit."""

import functools
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import class_folders, sentence
from torch import Tensor, nn

import cass
import dino
import finetune
from cass import pretrain_cass
from dino import DinoNetwork, pretrain_dino
from finetune import finetune_network
from runtime import Run

# %% the loops, without files


class TinyNet(nn.Module):
    """For images of 8 x 8, with what a run has to keep: batch-norm statistics, random dropout."""

    head_hidden_size = 36

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4)
        self.drop, self.fc = nn.Dropout(0.2), nn.Linear(36, 3)

    def forward_features(self, images: Tensor) -> Tensor:
        return self.norm(self.conv(images)).relu()

    def forward_head(self, maps: Tensor, pre_logits: bool = False) -> Tensor:
        features = self.drop(maps.flatten(1))
        return features if pre_logits else self.fc(features)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def get_classifier(self) -> nn.Module:
        return self.fc


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


def run_loop(name: str, **options) -> list[dict]:
    """Train 6 epochs of 3 steps; the networks, as dicts of tensors, and what else comes back."""
    torch.manual_seed(0)
    first, second = TinyNet(), TinyNet()
    if name == "cass":  # averages once, after step 16
        kept = pretrain_cass(first, second, Batches(lambda x: x), epochs=6, **options)
    elif name == "dino":
        views = Batches(lambda x: ([x, x.flip(3)], [x, x.flip(2)]))
        kept = pretrain_dino(DinoNetwork(first, 8), views, epochs=6, **options)
    else:
        kept = [first, finetune_network(first, Batches(labelled), list(Batches(labelled)),
                                        epochs=6, patience=3, lr=0.02, **options)]
    return [one.state_dict() if isinstance(one, nn.Module) else one for one in kept]


@functools.cache
def undisturbed_loop(name: str, precision: torch.dtype) -> tuple[list[dict], list[dict]]:
    rows = []
    return run_loop(name, precision=precision, log=rows.append), rows


class Keeper:
    """`save` and `restore` in memory; Ctrl-C comes in epoch `stop`, after `save` or after `log`."""

    def __init__(self, stop: int, where: str) -> None:
        self.stop, self.where, self.file, self.rows = stop, where, b"", []

    def log(self, row: dict) -> None:
        self.rows.append(row)
        if (self.where, row["epoch"]) == ("log", self.stop):
            raise KeyboardInterrupt

    def save(self, parts: list, history: list[float]) -> None:
        state = {"parts": [part.state_dict() for part in parts], "history": history,
                 "random": torch.get_rng_state(), "rows": self.rows}
        torch.save(state, file := io.BytesIO())
        self.file = file.getvalue()
        if (self.where, len(history)) == ("save", self.stop):
            raise KeyboardInterrupt

    def restore(self, parts: list) -> list[float]:
        if not self.file:
            return []
        state = torch.load(io.BytesIO(self.file), weights_only=True)  # tensors and plain values
        for part, value in zip(parts, state["parts"], strict=True):
            part.load_state_dict(value)
        torch.set_rng_state(state["random"])
        self.rows, self.stop = state["rows"], 0
        return state["history"]


def equal(a: object, b: object) -> bool:
    """Equal to the bit, through lists and dicts."""
    if isinstance(a, Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("name", ["cass", "dino", "finetune"])
@pytest.mark.parametrize("precision, stop, where", [
    (torch.float32, 1, "log"), (torch.float32, 2, "save"), (torch.bfloat16, 5, "log"),
    (torch.float16, 3, "save"), (torch.float32, 6, "save")])
def test_loop_stopped_and_resumed_equals_one_in_a_piece(name: str, precision: torch.dtype,
                                                        stop: int, where: str) -> None:
    wanted, rows = undisturbed_loop(name, precision)
    keeper = Keeper(stop, where)
    options = {"precision": precision, "log": keeper.log, "save": keeper.save}
    with pytest.raises(KeyboardInterrupt):
        run_loop(name, **options)
    if not keeper.file:
        keeper = Keeper(0, "")
        options |= {"log": keeper.log, "save": keeper.save}
    assert equal(run_loop(name, restore=keeper.restore, **options), wanted)
    assert keeper.rows == rows and [row["epoch"] for row in rows] == [*range(1, len(rows) + 1)]


# %% the commands

MAIN = {"cass": cass.main, "dino": dino.main, "finetune": finetune.main}
NETWORKS = {"cass": "--cnn test_resnet --transformer test_vit --epochs 6",
            "dino": "--arch test_vit --out-dim 16 --epochs 3",
            "finetune": "--arch test_resnet --arch test_vit --epochs 3"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders(tmp_path_factory.mktemp("images"), cat=10, dog=10)  # 3 steps an epoch


def command(name: str, images: Path, out: Path, *more: str) -> None:
    shared = "--init random --image-size 32 --batch-size 4 --workers 0 --precision fp32"
    MAIN[name](["--data", str(images), "--out", str(out), *shared.split(),
                *NETWORKS[name].split(), *more])


def results(out: Path) -> dict:
    """All that a run leaves behind, but for times and for how it was called."""
    found = {"log": [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]}
    for row in found["log"]:
        del row["seconds"]
    for file in out.iterdir():
        if file.suffix == ".csv":
            found[file.name] = file.read_text()
        elif file.suffix == ".pt":
            found[file.name] = torch.load(file, weights_only=True)
    if (out / "result.json").is_file():
        found["scores"] = json.loads((out / "result.json").read_text())
        del found["scores"]["run"]
    for row in found.get("checkpoint.pt", {}).get("rows", ()):
        del row["seconds"]
    return found


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    @functools.cache
    def folder(name: str, precision: str = "fp32") -> Path:
        out = tmp_path_factory.mktemp("runs") / name
        command(name, images, out, "--precision", precision)
        return out
    return folder


def stop_after(monkeypatch: pytest.MonkeyPatch, method: str, calls: int) -> None:
    """After so many calls of `Run.save` or `Run.log` comes a signal that ends the program."""
    plain, seen = getattr(Run, method), []

    def counted(run: Run, *arguments: object) -> None:
        plain(run, *arguments)
        run.cost = 0  # the next save is not put off
        seen.append(arguments)
        if len(seen) == calls:
            signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(Run, method, counted)


def stopped(name: str, images: Path, out: Path, *more: str, method: str = "save",
            calls: int = 2) -> None:
    """A run of a command that ends after so many calls."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        stop_after(patch, method, calls)
        command(name, images, out, *more)
    assert end.value.code == 130 and not {"cnn.pt", "backbone.pt", "result.json"} & {
        file.name for file in out.iterdir()}


@pytest.mark.parametrize("name, precision, method, calls, workers, cache", [
    ("cass", "fp32", "save", 2, "02", "10"), ("cass", "bf16", "log", 5, "20", "01"),
    ("cass", "fp32", "save", 6, "00", "00"), ("cass", "fp32", "log", 1, "00", "00"),
    ("dino", "fp32", "log", 3, "20", "01"), ("dino", "bf16", "save", 3, "02", "11"),
    ("finetune", "fp32", "save", 2, "20", "01"), ("finetune", "fp32", "save", 3, "02", "10"),
    ("finetune", "bf16", "log", 5, "00", "00")])  # saves and rows 4 to 6 are the second network's
def test_command_stopped_and_resumed_equals_one_in_a_piece(
        name: str, precision: str, method: str, calls: int, workers: str, cache: str,
        images: Path, undisturbed: Callable, tmp_path: Path) -> None:
    out, halves = tmp_path / "out", []
    for processes, cached in zip(workers, cache):
        halves.append(["--precision", precision, "--workers", processes])
        halves[-1] += ["--cache", str(tmp_path / "cache")] * (cached == "1")
    stopped(name, images, out, *halves[0], method=method, calls=calls)
    command(name, images, out, *halves[1], "--resume")
    assert equal(results(out), results(undisturbed(name, precision)))


def test_stopped_run_says_how_to_go_on(images: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/cass.py", "--data", "my images"])
    stopped("cass", images, tmp_path, calls=1)
    said = capsys.readouterr().err
    assert said == "\nstopped; go on with\n  python cass.py --data 'my images' --resume\n"


@pytest.mark.parametrize("name", sorted(MAIN))
def test_damaged_checkpoint_is_replaced_by_the_one_before(
        name: str, images: Path, undisturbed: Callable, tmp_path: Path, capsys) -> None:
    stopped(name, images, tmp_path, calls=2)
    newest = tmp_path / ("checkpoint-test_resnet-seed0.pt" if name == "finetune"
                         else "checkpoint.pt")
    newest.write_bytes(newest.read_bytes()[:5000])
    capsys.readouterr()
    command(name, images, tmp_path, "--resume")
    assert f"{newest} can't be read" in capsys.readouterr().err
    assert equal(results(tmp_path), results(undisturbed(name)))


@pytest.mark.parametrize("replacement", range(2, 10))
def test_kill_at_any_renaming_of_a_file(replacement: int, images: Path, undisturbed: Callable,
                                        tmp_path: Path) -> None:
    """Two epochs have 8: of the log, and three of checkpoints; the first run's config comes 1st."""
    child = os.fork()
    if not child:
        rename, seen = os.replace, []

        def deadly(*paths: object) -> None:
            seen.append(paths)
            if len(seen) == replacement:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(*paths)
        os.replace = deadly
        command("dino", images, tmp_path)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    command("dino", images, tmp_path, "--resume")
    assert equal(results(tmp_path), results(undisturbed("dino")))


@pytest.mark.parametrize("name, epochs", [("cass", "6"), ("dino", "3")])
def test_finished_run_trains_on(name: str, epochs: str, images: Path, undisturbed: Callable,
                                tmp_path: Path, capsys) -> None:
    """Averages are of the last quarter of all epochs, however these were come by."""
    command(name, images, tmp_path, "--epochs", "2")
    for words in ([], ["--epochs", epochs]):
        command(name, images, tmp_path, "--epochs", "2", "--resume", *words)
        assert ("is finished" in capsys.readouterr().out.splitlines()[-1]) == (not words)
    assert equal(results(tmp_path), results(undisturbed(name)))
    said = sentence(capsys, lambda: command(name, images, tmp_path, "--resume", "--epochs", "1"))
    assert f"--epochs {epochs}, not 1" in said


def test_finished_fine_tuning_does_not(images: Path, undisturbed: Callable, capsys) -> None:
    out = undisturbed("finetune")
    before = {file: file.read_bytes() for file in out.iterdir()}
    words = "--resume",
    command("finetune", images, out, *words)
    assert "is finished" in capsys.readouterr().out
    said = sentence(capsys, lambda: command("finetune", images, out, *words, "--epochs", "9"))
    assert "--epochs 3, not 9" in said
    assert {file: file.read_bytes() for file in out.iterdir()} == before


@pytest.mark.parametrize("name", sorted(MAIN))
def test_folder_with_a_run(name: str, images: Path, tmp_path: Path, capsys) -> None:
    """What is refused, and that a refusal writes nothing."""
    stopped(name, images, tmp_path, "--resume", calls=1)  # there is nothing to resume yet
    assert f"{tmp_path} holds no checkpoint: starting at the beginning" in capsys.readouterr().out
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    refused = {"an unfinished run: --resume it": [], "--lr": ["--resume", "--lr", "0.002"],
               "--seed 0, not 3": ["--resume", "--seed", "3"],
               "--image-size 32, not 48": ["--resume", "--image-size", "48"],
               "changed since": ["--resume", "--data", str(class_folders(tmp_path.with_name("x"),
                                                                         cat=12, dog=10))]}
    for words, more in refused.items():
        said = sentence(capsys, lambda: command(name, images, tmp_path, *more))
        assert words in said and str(tmp_path) in said
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    state = {"epoch": 1, "parts": []}  # as the first version of this program wrote it
    for file in tmp_path.glob("checkpoint*.pt"):
        torch.save(state, file)
    assert "older version" in sentence(capsys, lambda: command(name, images, tmp_path, "--resume"))
    for file in tmp_path.glob("checkpoint*.pt"):
        file.write_bytes(b"damaged")
    with pytest.raises(SystemExit):
        command(name, images, tmp_path, "--resume")
    assert "error: no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(MAIN))
def test_loss_that_is_not_finite_ends_the_command(name: str, images: Path, tmp_path: Path,
                                                  capsys) -> None:
    said = sentence(capsys, lambda: command(name, images, tmp_path, "--lr", "1e30"))
    assert "the loss became" in said and "--lr" in said and "epoch" in said
    assert not any(tmp_path.glob("*.pt")) and not (tmp_path / "result.json").exists()
