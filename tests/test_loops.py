"""The three commands, stopped anywhere and resumed: with any number of workers, with a cache or
without, a run equals one in a piece to the bit."""

import functools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import class_folders, command, equal, log_rows, sentence

import runtime
from images import EpochLoader
from runtime import Run

LOOPS = {  # options for each: enough for averages, for a teacher that moves, for two networks
    "cass": "--epochs 3 --batch-size 2",  # averages after step 16
    "dino": "--epochs 2",
    "finetune": "--epochs 2 --arch test_resnet --arch test_vit"}


def run(name: str, images: Path, out: Path, *more: str) -> None:
    command(name, images, out, LOOPS[name], *more)


def stop_after(calls: int, method: str, train: Callable[[], object]) -> None:
    """Ctrl-C after so many calls of `Run.save` or `Run.log`."""
    plain, seen = getattr(Run, method), []

    def counted(run: Run, *arguments: object) -> None:
        plain(run, *arguments)
        run.cost = 0  # the next save is not put off
        seen.append(arguments)
        if len(seen) == calls:
            signal.raise_signal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Run, method, counted)
        train()


def timeless(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


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
def undisturbed(pets: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict]:
    @functools.cache
    def in_a_piece(name: str, more: str = "") -> dict:
        out = tmp_path_factory.mktemp("runs") / name
        run(name, pets, out, more)
        return results(out)
    return in_a_piece


@pytest.mark.parametrize("name, precision, calls, method", [
    ("cass", "fp16", 3, "log"), ("cass", "bf16", 3, "save"),  # in the middle; at the end
    ("dino", "fp16", 1, "save"), ("dino", "fp32", 2, "log"),  # before the first checkpoint
    ("finetune", "fp16", 1, "save"), ("finetune", "bf16", 4, "log")])  # of the second network
def test_stopped_and_resumed_equals_one_in_a_piece(name, precision, calls, method, pets,
                                                   undisturbed, tmp_path):
    out, precision = tmp_path / "out", f"--precision {precision}"
    stop_after(calls, method, lambda: run(name, pets, out, precision, "--workers 2"))
    run(name, pets, out, precision, "--resume", f"--cache {tmp_path / 'cache'}")
    assert equal(results(out), undisturbed(name, precision))


@pytest.mark.parametrize("name, epochs", [
    ("cass", [0, 1, 2, 2]), ("dino", [0, 1]), ("finetune", [0, 1, 0, 1])])  # twice: for averages
def test_the_loader_is_told_each_epoch(name, epochs, pets, tmp_path, monkeypatch):
    told, tell = [], EpochLoader.set_epoch

    def telling(loader: EpochLoader, epoch: int) -> None:
        told.append(epoch)
        tell(loader, epoch)
    monkeypatch.setattr(EpochLoader, "set_epoch", telling)
    stop_after(1, "save", lambda: run(name, pets, tmp_path))
    run(name, pets, tmp_path, "--resume")
    assert told == epochs


@pytest.mark.parametrize("file", ["log.jsonl", "checkpoint.pt"])
def test_kill_before_a_file_gets_its_name(file, pets, undisturbed, tmp_path):
    child = os.fork()
    if not child:
        replace, seen = os.replace, []

        def deadly(source: Path, target: Path) -> None:
            seen.append(Path(target).name)
            if seen.count(file) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)
        os.replace = deadly
        try:
            run("dino", pets, tmp_path)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    run("dino", pets, tmp_path, "--resume")
    assert equal(results(tmp_path), undisturbed("dino"))


@pytest.mark.parametrize("name, more, most", [
    ("cass", "--epochs 7", 7), ("dino", "", 2)])  # averages are of the last quarter of all epochs
def test_a_finished_run_trains_on(name, more, most, pets, undisturbed, tmp_path, capsys):
    """As if it had never ended."""
    run(name, pets, tmp_path, f"--epochs {most // 2}")
    assert "a finished run" in sentence(capsys, lambda: run(name, pets, tmp_path, more))
    run(name, pets, tmp_path, more, "--resume")
    assert equal(results(tmp_path), undisturbed(name, more))
    run(name, pets, tmp_path, more, "--resume")
    assert "is finished" in capsys.readouterr().out
    said = sentence(capsys, lambda: run(name, pets, tmp_path, "--resume --epochs 1"))
    assert f"--epochs {most}, not 1" in said
    assert equal(results(tmp_path), undisturbed(name, more))


def test_fine_tuning_that_ended_is_final(pets, tmp_path, capsys):
    run("finetune", pets, tmp_path, "--epochs 1")
    before = results(tmp_path)
    run("finetune", pets, tmp_path, "--epochs 1 --resume")
    assert "is finished" in capsys.readouterr().out
    said = sentence(capsys, lambda: run("finetune", pets, tmp_path, "--resume"))
    assert "--epochs 1, not 2" in said
    assert equal(results(tmp_path), before)


@pytest.mark.parametrize("name", LOOPS)
def test_what_can_not_be_resumed(name, pets, tmp_path, monkeypatch, capsys):
    out, others = tmp_path / "out", class_folders(tmp_path / "others", cat=12, dog=10)
    monkeypatch.setattr(sys, "argv", ["/somewhere/x.py", "--data", "my images"])
    stop_after(1, "save", lambda: run(name, pets, out, "--resume"))
    said = capsys.readouterr()
    assert f"{out} holds no checkpoint: starting at the beginning" in said.out
    assert said.err == "\nstopped; go on with\n  python x.py --data 'my images' --resume\n"
    before = {file: file.read_bytes() for file in out.iterdir()}
    rate = "its default" if name == "cass" else 0.0003
    for words, more in {"an unfinished run: --resume it": "",
                        f"{rate}, not 0.002": "--resume --lr 0.002",
                        "--seed 0, not 3": "--resume --seed 3",
                        "changed since": f"--resume --data {others}"}.items():
        said = sentence(capsys, lambda: run(name, pets, out, more))
        assert words in said and str(out) in said
    assert {file: file.read_bytes() for file in out.iterdir()} == before
    file = out / "config.json"
    file.write_text(file.read_text().replace('"seed"', '"patience": 5, "seed"'))  # of the past
    assert "another version" in sentence(capsys, lambda: run(name, pets, out, "--resume"))
    file.write_bytes(before[file])
    [checkpoint] = out.glob("checkpoint*.pt")
    checkpoint.write_bytes(b"damaged")
    with pytest.raises(SystemExit):
        run(name, pets, out, "--resume")
    assert "error: no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_trains_weights_of_32_bits(name, precision, pets, undisturbed, tmp_path):
    stop_after(1, "save", lambda: run(name, pets, tmp_path, f"--precision {precision}"))
    losses = [row["loss"] for row in log_rows(tmp_path) if row["epoch"]]
    wanted = [row["loss"] for row in undisturbed(name)["rows"] if row["epoch"]]
    assert losses != wanted[:1] and losses == pytest.approx(wanted[:1], rel=0.1)
    [file] = tmp_path.glob("checkpoint*.pt")
    network, *others, scaler = torch.load(file, weights_only=True)["parts"]
    assert all(x.dtype == torch.float32 for x in network.values() if x.is_floating_point())
    if precision == "fp16":  # small gradients are scaled up, and down again for Adam
        [adam, *_] = [part for part in others if "param_groups" in part]
        assert scaler["scale"] >= 1024
        assert all(x["exp_avg"].abs().max() < 10 for x in adam["state"].values())


def test_a_device_with_another_precision_goes_on(pets, tmp_path, monkeypatch):
    for epochs, precision in ((1, torch.float32), (2, torch.float16), (3, torch.bfloat16)):
        monkeypatch.setattr(runtime, "pick_precision", lambda name, device: precision)
        run("dino", pets, tmp_path, f"--resume --epochs {epochs}")
    assert [row["epoch"] for row in log_rows(tmp_path)] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", LOOPS)
def test_a_loss_that_is_not_finite_ends_the_command(name, pets, tmp_path, capsys):
    said = sentence(capsys, lambda: run(name, pets, tmp_path, "--lr 1e30"))
    assert "the loss became" in said and "--lr" in said and "epoch" in said
    assert not any(tmp_path.glob("*.pt")) and not (tmp_path / "result.json").exists()
    assert not any('"epoch": 1' in log.read_text() for log in tmp_path.glob("log.jsonl"))
