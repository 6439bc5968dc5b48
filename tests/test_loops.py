"""The three training loops and their commands: stopped anywhere and resumed, with any number of
workers, with a cache or without, a run equals one in a piece to the bit."""

import functools
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import TinyNet, class_folders, equal, log_rows, sentence, state
from helpers import command as short_command
from torch import Tensor

import cass
import dino
import finetune
from runtime import Run

LOOPS = "cass", "dino", "finetune"


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


class Batches:
    """Three batches an epoch, other ones in each; `shape` makes of images what a loop takes."""

    def __init__(self, shape: Callable[[Tensor], object], spoiled: int | None = None) -> None:
        self.shape, self.epoch, self.spoiled = shape, 0, spoiled

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator:
        stream = torch.Generator().manual_seed(self.epoch)
        for _ in range(3):
            images = torch.rand(4, 3, 8, 8, generator=stream)
            yield self.shape(images * math.nan if self.epoch == self.spoiled else images)


def labelled(images: Tensor) -> tuple[Tensor, Tensor]:
    return images, (images[:, :, 0, 0] > 0.5).float()


SHAPES = {"cass": lambda images: images, "finetune": labelled,
          "dino": lambda images: ([images, images.flip(3)], [images, images.flip(2)])}


def train(name: str, loader: Batches, **options: object) -> list:
    """The dicts of tensors of the networks, and what else comes back."""
    first, options = TinyNet(), {"epochs": 6} | options
    if name == "finetune":
        facts = finetune.finetune_network(first, loader, list(Batches(labelled)), patience=3,
                                          **{"lr": 0.02} | options)
        return [state(first), facts]
    if name == "dino":
        kept = dino.pretrain_dino(dino.DinoNetwork(first, 8), loader, **options)
    else:
        second = TinyNet()
        torch.nn.init.normal_(second.fc.weight)
        kept = cass.pretrain_cass(first, second, loader, **options)
    return [state(network) for network in kept]


def train_in(out: Path, name: str, resume: bool = False, **options: object) -> list:
    run = Run(out, {"epochs": options.get("epochs", 6), "resume": resume})
    run.begin()
    kept = train(name, Batches(SHAPES[name]), log=run.log, save=run.save, restore=run.restore,
                 **options)
    return [*kept, timeless(run.rows)]


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("precision, calls, method", [
    (torch.float32, 1, "log"), (torch.bfloat16, 5, "log"), (torch.float16, 3, "save"),
    (torch.float32, 6, "save")])
def test_loop_stopped_and_resumed_equals_one_in_a_piece(
        name: str, precision: torch.dtype, calls: int, method: str, tmp_path: Path) -> None:
    def part(out: str, resume: bool = False) -> list:
        return train_in(tmp_path / out, name, resume, precision=precision)
    wanted = part("a")
    stop_after(calls, method, lambda: part("b"), KeyboardInterrupt)
    assert equal(part("b", resume=True), wanted)
    assert [row["epoch"] for row in wanted[-1]] == [*range(1, len(wanted[-1]) + 1)]


def test_finished_loop_trains_on(tmp_path: Path) -> None:
    """As if it had never ended: averages are of the last quarter of all epochs."""
    train_in(tmp_path / "a", "cass")
    longer = train_in(tmp_path / "a", "cass", resume=True, epochs=18)
    assert equal(longer, train_in(tmp_path / "b", "cass", epochs=18))


def test_a_device_with_another_precision_goes_on(tmp_path: Path) -> None:
    for done, precision in ((2, torch.float32), (4, torch.float16), (6, torch.bfloat16)):
        *_, rows = train_in(tmp_path, "cass", resume=done > 2, epochs=done, precision=precision)
        assert [row["epoch"] for row in rows] == [*range(1, done + 1)]


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_mixed_precision_trains_weights_of_32_bits(name: str, precision: torch.dtype) -> None:
    rows, plain, parts = [], [], []
    kept = train(name, Batches(SHAPES[name]), precision=precision, log=rows.append,
                 save=lambda saved, history: parts.extend(saved))
    train(name, Batches(SHAPES[name]), log=plain.append)
    losses, wanted = ([row["loss"] for row in some] for some in (rows, plain))
    assert losses != wanted and losses == pytest.approx(wanted, rel=0.1)
    assert all(x.dtype == torch.float32 for x in kept[0].values() if x.is_floating_point())
    if precision == torch.float16:  # small gradients are scaled up, and down again for Adam
        [optimizer, *_] = [part for part in parts if isinstance(part, torch.optim.Optimizer)]
        assert parts[-1].get_scale() >= 1024
        assert all(x["exp_avg"].abs().max() < 10 for x in optimizer.state.values())


@pytest.mark.parametrize("name, part", [*((name, "train") for name in LOOPS),
                                        ("finetune", "validation")])
def test_a_loss_that_is_not_finite_ends_training_before_it_is_kept(name: str, part: str) -> None:
    rows, saved, loader = [], [], Batches(SHAPES[name], spoiled=1)
    options = {"log": rows.append, "save": lambda parts, history: saved.append(list(history))}
    with pytest.raises(FloatingPointError, match="nan.* in epoch [12].*--lr"):
        if part == "train":
            train(name, loader, **options)
        loader.set_epoch(1)
        finetune.finetune_network(TinyNet(), Batches(labelled), loader, **options)
    assert len(rows) == len(saved) == (part == "train")


# %% the commands

LONGER = {"cass": "--epochs 3 --batch-size 2 --precision bf16",  # averages after step 16
          "dino": "--epochs 2",
          "finetune": "--epochs 2 --precision bf16 --arch test_resnet --arch test_vit"}


def command(name: str, images: Path, out: Path, *more: str) -> None:
    short_command(name, images, out, LONGER[name], *more)


def results(out: Path) -> dict:
    """All that a run leaves behind, but for times and for how it was called."""
    found = {"rows": timeless(log_rows(out))}
    for file in out.iterdir():
        if file.suffix == ".csv":
            found[file.name] = file.read_text()
        elif file.suffix == ".pt":
            found[file.name] = torch.load(file, weights_only=True)
            found[file.name].pop("rows", None)
        elif file.name == "result.json":
            found |= json.loads(file.read_text()) | {"run": None}
    return found


@pytest.fixture(scope="module")
def undisturbed(pets: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict]:
    @functools.cache
    def run(name: str) -> dict:
        out = tmp_path_factory.mktemp("runs") / name
        command(name, pets, out)
        return results(out)
    return run


@pytest.mark.parametrize("name, calls, method, workers, cache", [
    ("cass", 2, "save", "02", "10"), ("dino", 3, "log", "20", "01"),
    ("finetune", 4, "log", "02", "10")])  # of the second network
def test_command_stopped_and_resumed_equals_one_in_a_piece(
        name: str, calls: int, method: str, workers: str, cache: str, pets: Path,
        undisturbed: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """After two saves the newest checkpoint is damaged, so that the one before is used."""
    out, cached = tmp_path / "out", {"0": "", "1": f"--cache {tmp_path / 'c'}"}
    halves = [f"--workers {n} {cached[with_cache]}" for n, with_cache in zip(workers, cache)]
    stop_after(calls, method, lambda: command(name, pets, out, halves[0]), SystemExit)
    damaged = method == "save"
    if damaged:
        [file] = [file for file in out.glob("checkpoint*.pt") if "prev" not in file.name]
        file.write_bytes(file.read_bytes()[:5000])
    command(name, pets, out, halves[1], "--resume")
    assert ("looking for the one before" in capsys.readouterr().err) == damaged
    assert equal(results(out), undisturbed(name))


@pytest.mark.parametrize("file, time", [("log.jsonl", 2), ("checkpoint.pt", 2)])
def test_kill_before_a_file_gets_its_name(file: str, time: int, pets: Path, undisturbed: Callable,
                                          tmp_path: Path) -> None:
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
            command("dino", pets, tmp_path)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    command("dino", pets, tmp_path, "--resume")
    assert equal(results(tmp_path), undisturbed("dino"))


@pytest.mark.parametrize("name", ["dino", "finetune"])
def test_finished_run_trains_on(name: str, pets: Path, undisturbed: Callable, tmp_path: Path,
                                capsys: pytest.CaptureFixture) -> None:
    """But not fine-tuning, of which the best epoch is final."""
    command(name, pets, tmp_path, "--epochs 1")
    before = results(tmp_path)
    assert "a finished run" in sentence(capsys, lambda: command(name, pets, tmp_path))
    command(name, pets, tmp_path, "--epochs 1 --resume")
    assert "is finished" in capsys.readouterr().out and equal(results(tmp_path), before)
    if name == "finetune":
        said = sentence(capsys, lambda: command(name, pets, tmp_path, "--resume"))
        assert "--epochs 1, not 2" in said and equal(results(tmp_path), before)
    else:
        command(name, pets, tmp_path, "--resume")
        assert equal(results(tmp_path), undisturbed(name))
        less = sentence(capsys, lambda: command(name, pets, tmp_path, "--resume --epochs 1"))
        assert "--epochs 2, not 1" in less


@pytest.mark.parametrize("name", LOOPS)
def test_what_can_not_be_resumed(name: str, pets: Path, tmp_path: Path, monkeypatch,
                                 capsys: pytest.CaptureFixture) -> None:
    out, others = tmp_path / "out", class_folders(tmp_path / "others", cat=12, dog=10)
    monkeypatch.setattr(sys, "argv", ["/somewhere/x.py", "--data", "my images"])
    stop_after(1, "save", lambda: command(name, pets, out, "--resume"), SystemExit)
    said = capsys.readouterr()
    assert f"{out} holds no checkpoint: starting at the beginning" in said.out
    assert said.err == "\nstopped; go on with\n  python x.py --data 'my images' --resume\n"
    before = {file: file.read_bytes() for file in out.iterdir()}
    rate = "its default" if name == "cass" else 0.0003
    for words, more in {"an unfinished run: --resume it": "",
                        f"{rate}, not 0.002": "--resume --lr 0.002",
                        "--seed 0, not 3": "--resume --seed 3",
                        "--image-size 32, not 48": "--resume --image-size 48",
                        "changed since": f"--resume --data {others}"}.items():
        said = sentence(capsys, lambda: command(name, pets, out, more))
        assert words in said and str(out) in said
    assert {file: file.read_bytes() for file in out.iterdir()} == before
    file = out / "config.json"
    file.write_text(file.read_text().replace('"seed"', '"patience": 5, "seed"'))  # of the past
    assert "another version" in sentence(capsys, lambda: command(name, pets, out, "--resume"))
    file.write_bytes(before[file])
    [checkpoint] = out.glob("checkpoint*.pt")
    checkpoint.write_bytes(b"damaged")
    with pytest.raises(SystemExit):
        command(name, pets, out, "--resume")
    assert "error: no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("name", LOOPS)
def test_loss_that_is_not_finite_ends_the_command(name: str, pets: Path, tmp_path: Path,
                                                  capsys: pytest.CaptureFixture) -> None:
    said = sentence(capsys, lambda: command(name, pets, tmp_path, "--lr 1e30"))
    assert "the loss became" in said and "--lr" in said and "epoch" in said
    assert not any(tmp_path.glob("*.pt")) and not (tmp_path / "result.json").exists()
