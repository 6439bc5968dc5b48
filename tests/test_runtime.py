"""runtime.py: one clear exit, start weights of every make, and the folder that a run leaves."""

import io
import json
import math
import os
import pickle
import resource
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import nn
from torch.utils.data import DataLoader

import runtime
from data import DataError
from helpers import equal, sentence
from runtime import (Run, UserError, build_model, clear_exit, load_network, pick_attention,
                     pick_device, pick_precision, pick_workers, read_network, watch)

# %% the way out


def exits(call: Callable[[], object]) -> None:
    with clear_exit(DataError):
        call()


def fail(error: Exception, while_writing: Path | None = None) -> None:
    with runtime.aside(while_writing) if while_writing else nullcontext():
        raise error


@pytest.mark.parametrize("call, words", [
    (lambda: fail(UserError("mend it")), "mend it"), (lambda: fail(DataError("mend")), "mend"),
    (lambda: fail(DataError("In a worker\n  File x\nimages.DataError: a: b")), "error: a: b"),
    (lambda: open("nowhere.png"), "[Errno 2] No such file or directory: 'nowhere.png'"),
    (lambda: fail(torch.OutOfMemoryError("CUDA out of memory.")), "--batch-size or --image-size"),
    (lambda: torch.empty(10 ** 15), "--batch-size or --image-size"),
    (lambda: fail(RuntimeError("In a worker\nunable to allocate shared memory(shm) for file </t>: "
                               "No space left on device")), "--shm-size=8g)"),
    (lambda: fail(RuntimeError("DataLoader worker (pid 9) is killed by signal: Killed."),
                  while_writing=Path("cnn.pt")), "fewer --workers"),
    (lambda: fail(RuntimeError("DataLoader worker (pid 9) is killed by signal: Bus error. Are "
                               "workers out of shared memory?")), "--shm-size=8g)"),
    (lambda: next(iter(DataLoader([0], num_workers=1, collate_fn=lambda _: os.kill(
        os.getpid(), signal.SIGKILL)))), "fewer --workers")])
def test_what_a_user_can_mend_is_one_sentence(call, words, capsys):
    assert sentence(capsys, lambda: exits(call)).endswith(f"{words}\n")


def test_a_home_folder_is_expanded_and_an_empty_path_refused(capsys):
    parser = runtime.command_parser("x.py", "")
    parser.add_argument("--out", type=Path)
    assert parser.parse_args(["--out=~/x"]).out == Path.home() / "x"
    assert "a path is empty" in sentence(capsys, lambda: parser.parse_args(["--out="]))


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a bug"), ThreadPoolExecutor() as pool:
        pool.submit(exits, lambda: fail(RuntimeError("a bug"))).result()  # a thread: no signals


def test_a_console_without_the_letters_of_a_name(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    exits(lambda: print("é \u732b", flush=True))
    assert console.buffer.getvalue() == "é \\u732b\n".encode("cp1252")


def test_stopped_from_outside(capsys):
    """test_loops has Ctrl-C, and what is said where a run can go on."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        exits(lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(9)))
    signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == 130 and capsys.readouterr().err == "\nstopped\n"


CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("native, on_gpu, on_cpu", [(True, torch.bfloat16, torch.bfloat16),
                                                    (False, torch.float16, torch.float32)])
def test_automatic_precision(native, on_gpu, on_cpu, monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: native)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation or native)
    assert pick_precision("auto", GPU) == on_gpu and pick_precision("auto", CPU) == on_cpu


@pytest.mark.parametrize("cores, on_gpu, on_cpu", [(4, 3, 1), (2, 1, 0)])
def test_automatic_device_and_workers(cores, on_gpu, on_cpu, monkeypatch):
    for place in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(place, "is_available", lambda: False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert pick_device("auto") == CPU
    assert [pick_workers(n, CPU) for n in (None, 0, 5)] == [on_cpu, 0, 5]
    assert [pick_workers(n, GPU) for n in (None, 0, 9)] == [on_gpu, 0, 9]


def test_attention_is_computed_in_the_faster_way():
    x, answers = torch.randn(2, 3, 32, 32), []
    for device, precision, fused in ((CPU, torch.bfloat16, False), (CPU, torch.float32, True),
                                     (GPU, torch.bfloat16, True)):
        pick_attention(device, precision)
        model = build_model("test_vit", "random", 32)
        assert {m.fused_attn for m in model.modules() if hasattr(m, "fused_attn")} == {fused}
        answers.append(model(x))
    torch.testing.assert_close(answers[0], answers[1])


# %% start weights

torch.manual_seed(42)
CNN, VIT = ({key: torch.randn_like(x) if x.is_floating_point() else x + 7  # as no model starts
             for key, x in timm.create_model(name).state_dict().items()}
            for name in ("test_resnet", "test_vit"))
HEAD = {"fc.weight", "fc.bias", "head.weight", "head.bias"}


def start(folder: Path, state: object, outputs: int | None = 5,
          name: str = "test_resnet") -> nn.Module:
    torch.save(state, folder / f"{name}.pt")
    return build_model(name, str(folder), 32, outputs=outputs)


def prefixed(*prefixes: str) -> dict:
    return {prefix + key: x + i for i, prefix in enumerate(prefixes) for key, x in CNN.items()}


def without(*names: str) -> dict:
    return {key: x for key, x in CNN.items() if key not in names}


def test_random_weights_follow_the_seed():
    one, same, other = (build_model("test_vit", "random", 32, seed=s) for s in (1, 1, 2))
    assert equal(one.state_dict(), same.state_dict()) and one.training
    assert not torch.equal(one.head.weight, other.head.weight)
    assert "test_vit starts from random weights" in one.origin


@pytest.mark.parametrize("state", [
    *[prefixed(f"{prefix}.") for prefix in ("backbone", "_orig_mod.module")],
    *[{wrapper: CNN, "epoch": 3} for wrapper in ("state_dict", "model", "teacher", "student",
                                                 "model_ema")], {"model": {"state_dict": CNN}},
    {"student": prefixed("", ""), "teacher": prefixed("backbone.")},
    {"state_dict": prefixed("module.encoder_q.", "module.encoder_k.") | {"queue": torch.ones(9)}},
    prefixed("backbone.") | {"head.mlp.0.weight": torch.ones(2, 2)}, without(*HEAD),
    CNN | {"fc.weight": torch.ones(7, CNN["fc.weight"].shape[1]), "fc.bias": torch.ones(7)}])
def test_weights_as_people_have_them(state, tmp_path):
    network = start(tmp_path, state)
    assert equal(network.state_dict(), CNN, HEAD) and network.fc.weight.shape[0] == 5
    assert network.origin == (f"90 of 92 tensors from {tmp_path / 'test_resnet.pt'}; "
                              "the classifier is new")


@pytest.mark.parametrize("state, words", [
    (VIT, "conv1.0.weight"), ([1], "no tensors"), ({"epoch": 3}, "no tensors"),
    (dict(list(CNN.items())[:46]), "layer2.0.downsample.2.running_var"),
    (dict(list(prefixed("encoder.").items())[:46]), "layer2.0.downsample.2.running_var"),
    (without("conv1.0.weight"), "conv1.0.weight"),
    (CNN | {"conv1.0.weight": CNN["conv1.0.weight"] * math.nan}, "conv1.0.weight holds nan"),
    ({key: CNN[key] for key in ("fc.weight", "fc.bias")}, "conv1.0.weight"),
    (CNN | {"layer2.0.conv1.weight": torch.ones(3, 3)}, "layer2.0.conv1.weight"),
    (CNN | {"layer9.weight": torch.ones(3)}, "layer9.weight")])
def test_weights_that_fit_nowhere_are_refused(state, words, tmp_path):
    for outputs in (None, 5, 0):
        with pytest.raises(UserError, match=words) as refused:
            start(tmp_path, state, outputs)
        assert str(tmp_path / "test_resnet.pt") in str(refused.value)


class Code:
    def __reduce__(self) -> tuple:  # what happens when it is unpickled
        return os.mkdir, ("made",)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 98\n"


@pytest.mark.parametrize("read", [lambda file: build_model("test_resnet", str(file.parent), 32),
                                  lambda file: load_network(file, 32)], ids=["init", "weights"])
@pytest.mark.parametrize("name", ["test_resnet.pt", "test_resnet.safetensors"])
def test_files_that_are_no_weights(read, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / name
    torch.save({"state_dict": CNN, "arch": "test_resnet", "hook": Code()}, file)
    zipped = file.read_bytes()
    torch.save(CNN, file)
    flipped = bytearray(file.read_bytes())
    flipped[len(flipped) // 2] ^= 1  # `torch.load` compares no checksums
    for body in (zipped, flipped, pickle.dumps(Code(), 2), POINTER, zipped[:9000], b"", b"hello"):
        file.write_bytes(body)
        with pytest.raises(UserError) as refused:
            read(file)
        assert str(file) in str(refused.value) and "\n" not in str(refused.value)
        assert not Path("made").exists()


@pytest.mark.parametrize("name", ["test_resnet.safetensors", "test_resnet.bin",
                                  "test_resnet.r160_in1k.pth"])
def test_names_with_and_without_a_tag(name, tmp_path):
    (save_file if name.endswith(".safetensors") else torch.save)(CNN, tmp_path / name)
    network = build_model("test_resnet.r160_in1k", str(tmp_path), 48)
    assert equal(network.state_dict(), CNN) and "92 of 92" in network.origin
    with pytest.raises(UserError, match="no model 'test_vit.r160'; .* test_vit.r160_in1k"):
        build_model("test_vit.r160", str(tmp_path), 48)


def test_models_without_outputs(tmp_path):
    """As DINOv2 in timm; or weights without a classifier for a model that has one; or on demand."""
    for network, size in ((build_model("eva02_tiny_patch14_224", "random", 28), 28),
                          (start(tmp_path, without(*HEAD), None), 32),
                          (start(tmp_path, CNN, 0), 32)):
        features = network.eval()(torch.zeros(1, 3, size, size))
        assert network.num_classes == 0 and features.shape == (1, network.num_features)


def test_models_with_two_classifiers(tmp_path):
    weights = timm.create_model("deit_tiny_distilled_patch16_224").state_dict()
    network = start(tmp_path, weights, 4, "deit_tiny_distilled_patch16_224")
    assert network.head.out_features == network.head_dist.out_features == 4
    heads = HEAD | {"head_dist.weight", "head_dist.bias", "pos_embed"}
    assert equal(network.state_dict(), weights, heads) and "151 of 155 tensors" in network.origin


def test_silent_hub(tmp_path, monkeypatch):
    limits, hub = [], tmp_path / "models--timm--test_resnet.r160_in1k"

    def silent(address: str, timeout: float) -> None:
        limits.append(timeout)
        raise urllib.error.URLError("no route to host")
    monkeypatch.setattr(urllib.request, "urlopen", silent)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    begun = time.perf_counter()
    for name, words in (("test_resnet", "test_resnet are not on this machine .*--init FOLDER"),
                        ("test_mambaout", "test_mambaout.*No pretrained weights exist")):
        with pytest.raises(UserError, match=words):
            build_model(name, "imagenet", 32)
    assert sum(limits) <= 10 and time.perf_counter() - begun < 60  # timm alone would ask for longer
    for folder in (hub / "refs", hub / "snapshots" / ("a" * 40)):  # as an earlier download left it
        folder.mkdir(parents=True, exist_ok=True)
    (hub / "refs" / "main").write_text("a" * 40)
    save_file(CNN, folder / "model.safetensors")
    network = build_model("test_resnet", "imagenet", 48, outputs=3)
    assert equal(network.state_dict(), CNN, HEAD) and "90 of 92 tensors from" in network.origin


# %% the folder of a run


def begun(folder: Path, **options: object) -> Run:
    run = Run(folder, {"resume": False, "epochs": 9} | options)
    run.begin(classes=["cat"], window=(1.0, 9.0))
    return run


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.iterdir()}


def test_a_checkpoint_or_else_the_one_before_brings_all_back(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file, network = Path("a/checkpoint.pt"), nn.Linear(2, 1)
    run, other = begun(Path("a"), seed=1), begun(Path("b"), seed=2)

    def restored() -> tuple[list[float], float]:
        history = begun(Path("a"), resume=True, seed=1).restore([network])
        return history, network.bias.item()
    for history in ([0.5], [0.5, 0.25]):
        nn.init.constant_(network.bias, len(history))
        run.cost = 0  # of the last time, so that this time too it is saved
        run.save([network], history)
    coming, fine = torch.rand(3), torch.load(file)
    other.save([network], [1.0])
    for state in (fine | {"hook": Code()}, {"history": [1.0]}, torch.load("b/checkpoint.pt")):
        torch.save(state, file)
        assert restored() == ([0.5], 1)
        assert "looking for the one before it" in capsys.readouterr().err
    torch.save(fine, file)
    file.write_bytes(file.read_bytes()[:-5])
    assert restored() == ([0.5], 1)
    torch.save(fine, file)
    assert restored() == ([0.5, 0.25], 2)
    assert torch.equal(torch.rand(3), coming) and not Path("made").exists()


def test_two_runs_in_one_folder_and_the_lock_of_a_killed_one(tmp_path):
    heard, told = os.pipe()
    if not (child := os.fork()):
        run = begun(tmp_path)
        os.write(told, b"begun")
        time.sleep(60)
        os._exit(len(run.rows))  # it lives until here
    os.read(heard, 5)
    with pytest.raises(UserError, match="another run is writing"):
        begun(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    begun(tmp_path)


@pytest.mark.parametrize("write", [
    lambda run: run.save([build_model("test_vit", "random", 32)], [1.0]),
    lambda run: run.log({"epoch": 2, "loss": "x" * 9000}), lambda run: run.begin(fact="x" * 9000),
    lambda run: run.save_network("cnn.pt", build_model("test_vit", "random", 32))])
def test_full_disk_leaves_what_was_there(write, tmp_path, capsys):
    run = begun(tmp_path)
    run.log({"epoch": 1, "loss": 0.5})
    run.save([], [0.5])
    files = contents(tmp_path)
    run.cost, limits = 0, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))  # bytes a file can have
    try:
        said = sentence(capsys, lambda: exits(lambda: write(run)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "the disk is full" in said or "too large" in said
    assert contents(tmp_path) == files


def test_poisoned_weights_do_not_take_the_place_of_good_ones(tmp_path):
    run, network = begun(tmp_path), nn.Linear(2, 1)
    run.save([network], [0.5])
    files = contents(tmp_path)
    run.cost, network.bias.data[0] = 0, math.inf
    with pytest.raises(UserError, match="nan or infinite in epoch 2"):
        run.save([network], [0.5, 0.4])
    assert contents(tmp_path) == files


def test_saving_takes_at_most_five_percent_of_the_time(tmp_path, monkeypatch):
    clock, save = [0.0], torch.save
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch, "save", lambda *args: (clock.append(clock.pop() + 1), save(*args)))
    run, kept = begun(tmp_path), []
    for epoch, seconds in enumerate((0.1, 15, 4, 2, 19, 19, 0, 0, 0), 1):
        clock[0] += seconds  # and a second whenever it is saved
        run.save([], [1.0] * epoch)
        kept.append(len(torch.load(tmp_path / "checkpoint.pt")["history"]))
    assert kept == [1, 1, 1, 4, 4, 6, 6, 6, 9]  # the first, of unknown cost, and the last of 9 too


def test_table_and_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runtime.time, "perf_counter", iter([0, 1, 3.25, 8.25, 9]).__next__)
    run = Run(tmp_path, {"resume": False, "epochs": 2}, ("epoch", "loss", "arm_rank", "kl"))
    run.begin()
    run.log({"epoch": 0, "loss": None, "arm_rank": 4})
    run.log({"epoch": 1, "loss": 1 / 3, "arm_rank": 12.5, "kl": 1e-9})
    assert capsys.readouterr().out.splitlines() == [
        "                         arm                     ",
        " epoch      loss        rank          kl  seconds",
        "     0         -           4           -    2.250",
        "     1    0.3333       12.50   1.000e-09    5.000"]
    run.log({"epoch": 2, "loss": "wider than its column"})
    assert capsys.readouterr().out.startswith("     2 wider than its column")
    assert (tmp_path / "log.jsonl").read_text().splitlines()[1:2] == [json.dumps(
        {"epoch": 1, "loss": 1 / 3, "arm_rank": 12.5, "kl": 1e-9, "seconds": 5.0})]


@pytest.mark.parametrize("name, size", [("test_resnet", 40), ("test_vit", 48)])
def test_saved_network_is_loaded_by_timm_and_by_us(name, size, tmp_path):
    file, network = tmp_path / "cnn.pt", build_model(name, "random", size, outputs=3, seed=5)
    line, weights = begun(tmp_path).save_network("cnn.pt", network), network.state_dict()
    assert equal(eval(line).state_dict(), weights)  # by the line that is printed
    assert equal(load_network(file, size).state_dict(), weights)
    facts = read_network(file)
    assert [facts[key] for key in ("arch", "num_classes", "image_size", "classes", "window")] == [
        name, 3, size, ["cat"], (1.0, 9.0)]
    first, same, other = (load_network(file, size, outputs=3, seed=seed).state_dict()
                          for seed in (1, 1, 2))
    assert equal(first, same) and equal(first, weights, HEAD)
    assert not equal(first, other) and not equal(first, weights)  # a new head, though as wide
    if name == "test_vit":
        weights["pos_embed"] = resample_abs_pos_embed(weights["pos_embed"], (2, 2))
    assert equal(load_network(file, 32).state_dict(), weights)


@pytest.mark.parametrize("text", ["", "[]", "{}", "{"])
def test_a_damaged_config(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json is damaged"):
        Run(tmp_path, {"epochs": 1, "resume": False})


def test_checkpointing_keeps_fewer_activations_and_the_same_gradients():
    kept, gradients = [0, 0], []
    for less in (False, True):
        network = build_model("test_vit", "random", 64, checkpointing=less)

        def count(tensor: torch.Tensor) -> torch.Tensor:
            kept[less] += tensor.nbytes
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            logits = network(torch.ones(2, 3, 64, 64))
        logits.square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    assert kept[True] < kept[False] / 2 and equal(*gradients)
    with pytest.raises(UserError, match="no --checkpointing for coat_tiny"):
        build_model("coat_tiny", "random", 64, checkpointing=True)


@pytest.mark.parametrize("seconds, images, epochs, said", [
    (600, 2560, 100, "100 epochs will take about 21 days here; smaller networks (--cnn resnet18"),
    (2, 10, 1, "1 epoch will take about 1 min\n")])
def test_a_run_says_how_long_it_takes_and_what_takes_less(seconds, images, epochs, said, capsys):
    rows = []
    run = SimpleNamespace(log=lambda row: rows.append(row | {"seconds": seconds}), rows=rows,
                          config={"options": {"epochs": epochs}})
    gauges = SimpleNamespace(networks={"cnn": nn.Linear(1, 1)})
    watch(run, gauges, lambda epoch, networks: {}, "", images)({"epoch": 0})
    assert capsys.readouterr().out.startswith(said)
