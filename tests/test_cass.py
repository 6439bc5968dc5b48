"""cass.py: both losses against explicit loops, the training loop against one written by hand, the
command against the functions it is made of, and every method file as a notebook cell."""

import copy
import json
import math
import re
import symtable
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import timm
import torch
from helpers import class_folders, equal, sentence
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.optim.lr_scheduler import CosineAnnealingLR

import cass
from cass import cass_loss, contrast_loss, cosine_rate, pretrain_cass
from data import ImageRows, augmentation, make_loader, read_images, split_images
from metrics import collapse_gauges
from runtime import build_model

ROOT = Path(__file__).resolve().parents[1]

# %% the losses


def cosine(a: list[float], b: list[float], eps: float = 1e-8) -> float:
    """Of two vectors, each divided by its length, or by `eps` if that is more; in float64."""
    length_a, length_b = (max(math.sqrt(math.fsum(x * x for x in v)), eps) for v in (a, b))
    return math.fsum(x / length_a * (y / length_b) for x, y in zip(a, b))


def loss_by_loops(r: Tensor, t: Tensor, eps: float = 1e-8) -> float:
    """Equation 1 as it is printed."""
    return sum(2 - 2 * cosine(a, b, eps) for a, b in zip(r.tolist(), t.tolist())) / len(r)


def contrast_by_loops(r: Tensor, t: Tensor, temperature: float) -> float:
    total = 0.0
    for rows, columns in ((r.tolist(), t.tolist()), (t.tolist(), r.tolist())):
        for i, row in enumerate(rows):
            powers = [math.exp(cosine(row, column) / temperature) for column in columns]
            total -= math.log(powers[i] / math.fsum(powers))
    return total / (2 * len(r))


def two(n: int = 6, d: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    stream = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=stream), torch.randn(n, d, generator=stream)


@pytest.mark.parametrize("n, d", [(1, 1), (1, 7), (6, 10), (16, 1000)])
def test_losses_equal_explicit_loops(n: int, d: int) -> None:
    r, t = two(n, d, seed=n)
    assert cass_loss(r, t).shape == () and cass_loss(r, t).dtype == torch.float32
    assert cass_loss(r, t).item() == pytest.approx(loss_by_loops(r, t), abs=1e-5)
    apart = (normalize(r) - normalize(t)).square().sum(1).mean().item()  # |r - t|^2 = 2 - 2 cos
    assert cass_loss(r, t).item() == pytest.approx(apart, abs=1e-5)
    for heat in (0.1, 0.5):
        wanted = contrast_by_loops(r, t, heat)
        assert contrast_loss(r, t, heat).item() == pytest.approx(wanted, abs=1e-5)
    assert contrast_loss(r, t) == contrast_loss(r, t, 0.1)


@pytest.mark.parametrize("scale_r, scale_t", [(0, 1), (0, 0), (1e-10, 1), (1, 3e-9), (3e-9, 3e-9)])
def test_rows_shorter_than_eps_are_divided_by_eps(scale_r: float, scale_t: float) -> None:
    r, t = two()
    r, t = normalize(r), normalize(r + t)
    r[2:4] *= scale_r
    t[3:5] *= scale_t
    for eps in (1e-8, 0.1):
        assert cass_loss(r, t, eps).item() == pytest.approx(loss_by_loops(r, t, eps), abs=1e-5)
    (cass_loss(r.requires_grad_(), t.requires_grad_()) + contrast_loss(r, t)).backward()
    assert r.grad.isfinite().all() and t.grad.isfinite().all()


@pytest.mark.parametrize("loss", [cass_loss, contrast_loss])
def test_losses_are_symmetric_free_of_scale_and_in_float32(loss: Callable) -> None:
    r, t = two()
    scale = torch.tensor([1e-3, 0.1, 1, 7, 100, 1e4])[:, None]
    for other in (loss(t, r), loss(r * scale, t), loss(r, t * scale), loss(r * scale, t * 5)):
        torch.testing.assert_close(other, loss(r, t))
    r, t = r.bfloat16(), t.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        under = loss(r, t)
    assert under.dtype == torch.float32 and under == loss(r.float(), t.float())


def test_losses_at_their_ends() -> None:
    r, _ = two()
    assert cass_loss(r, 3 * r) < 1e-6 and cass_loss(r, -2 * r) == pytest.approx(4)
    assert cass_loss(torch.tensor([[1.0, 0, 0]]), torch.tensor([[0, 5.0, 0]])).item() == 2
    same, own = torch.ones(8, 16), torch.eye(8, 16)
    assert contrast_loss(same, same).item() == pytest.approx(math.log(8), abs=1e-5)  # collapsed
    assert contrast_loss(own, own).item() < 1e-2 < contrast_loss(own, own.roll(1, 0)).item()


def test_gradient_goes_into_both_arms_and_fits_finite_differences() -> None:
    inputs = two(3, 4)
    inputs[0][2] *= 0.02  # shorter than eps
    grown = [x.clone().requires_grad_() for x in inputs]
    cass_loss(*grown, eps=0.1).backward()
    for arm, i, j in product(range(2), range(3), range(4)):
        ends = []
        for step in (1e-6, -1e-6):
            moved = [x.double() for x in inputs]
            moved[arm][i, j] += step
            ends.append(loss_by_loops(*moved, eps=0.1))
        assert abs(grown[arm].grad[i, j].item() - (ends[0] - ends[1]) / 2e-6) < 1e-4


def test_contrast_keeps_apart_what_cosine_lets_fall_together() -> None:
    images = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(1)) + 2
    alike = {}
    for loss in (cass_loss, contrast_loss):
        torch.manual_seed(0)
        arms = [nn.Sequential(nn.Flatten(), nn.Linear(48, 32)) for _ in range(2)]
        pretrain_cass(*arms, [images] * 10, epochs=10, loss=loss, lr=1e-2)
        alike[loss] = collapse_gauges(arms[0](images))["cosine"]
    assert alike[cass_loss] > 0.99 and alike[contrast_loss] < 0.6


def test_rate_is_pytorchs_cosine_annealing() -> None:
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], 1e-3)
    schedule = CosineAnnealingLR(optimizer, T_max=16, eta_min=1e-6)
    for step in range(100):
        assert cosine_rate(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        schedule.step()


# %% the loop


def tiny_arms() -> tuple[nn.Module, nn.Module]:
    """A CNN with batch norm and a network with dropout, for images of 8 x 8."""
    torch.manual_seed(0)
    cnn = nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)
    other = nn.Flatten(), nn.Linear(192, 16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 5)
    return nn.Sequential(*cnn), nn.Sequential(*other)


def tiny_batches(n: int, size: int = 6) -> list[Tensor]:
    return list(torch.rand(n, size, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


def weights(arms: tuple[nn.Module, nn.Module]) -> list[dict]:
    return [copy.deepcopy(arm.state_dict()) for arm in arms]


ADAM = partial(torch.optim.Adam, fused=True)
SGD = partial(torch.optim.SGD, momentum=0.9)


def by_hand(batches: list[Tensor], epochs: int = 1, lr: float = 1e-3,
            cnn_optimizer: Callable = ADAM) -> Iterator[tuple[list[dict], list[Tensor], Tensor]]:
    """Algorithm 1 in plain PyTorch: after each step the weights; its outputs; its loss."""
    arms = cnn, transformer = tiny_arms()
    optimizers = cnn_optimizer(cnn.parameters(), lr), ADAM(transformer.parameters(), lr)
    torch.manual_seed(7)
    for step, images in enumerate(batches * epochs):
        outputs = [cnn(images), transformer(images)]
        r, t = (x / x.norm(dim=1, keepdim=True).clamp(min=1e-8) for x in outputs)
        loss = (2 - 2 * (r * t).sum(1)).mean()
        cnn.zero_grad()
        transformer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            rate = 1e-6 + (lr - 1e-6) * (1 + math.cos(math.pi * step / 16)) / 2
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
        yield weights(arms), outputs, loss.detach()


def trained(batches: list[Tensor], **options) -> list[dict]:
    arms = tiny_arms()
    torch.manual_seed(7)
    return weights(pretrain_cass(*arms, batches, **{"epochs": 1} | options))


@pytest.mark.parametrize("n, swa_start, options", [
    (60, 1, {}), (60, 1, {"lr": 0.01}), (60, 1, {"cnn_optimizer": SGD}), (8, 0, {}),
    (16, 0.75, {})])  # averaged never, nor at the low points, which are after steps 16 and 48
def test_loop_equals_one_written_by_hand_to_the_bit(n: int, swa_start: float,
                                                    options: dict) -> None:
    arms, rows, saved, seen = tiny_arms(), [], [], []
    batches = tiny_batches(n)
    states, outputs, losses = zip(*by_hand(batches, epochs=2, **options))
    torch.manual_seed(7)
    kept = pretrain_cass(
        *arms, batches, epochs=2, swa_start=swa_start, log=rows.append, **options,
        save=lambda parts, history: saved.append([weights(parts[:2]), list(history)]),
        gauges=lambda steps: {"n": seen.append(steps) or len(steps)})
    assert kept[0] is arms[0] and kept[1] is arms[1] and equal(weights(kept), states[-1])
    means = [torch.stack(half).mean().item() for half in (losses[:n], losses[n:])]
    looked = min(n, 43)  # steps of 6 images: the last 256, as trained
    assert rows == [{"epoch": e, "loss": means[e - 1], "n": looked} for e in (1, 2)]
    assert equal(saved, [[states[n - 1], means[:1]], [states[-1], means]])
    assert equal(seen, [outputs[n - looked:n], outputs[2 * n - looked:]])
    assert not seen[0][0][0].requires_grad


@pytest.mark.parametrize("start, low_points", [(0, (16, 48, 80)), (0.5, (48, 80)), (0.75, (80,))])
def test_average_is_the_mean_of_weights_at_low_points(start: float, low_points: tuple) -> None:
    batches = tiny_batches(30)  # 3 epochs: 90 steps
    steps = list(by_hand(batches, epochs=3))
    ours = trained(batches, epochs=3, swa_start=start)
    for arm, state in enumerate(ours):
        for key in (key for key in state if not re.search("running|tracked", key)):
            mean = torch.stack([steps[step][0][arm][key] for step in low_points]).mean(0)
            torch.testing.assert_close(state[key], mean, atol=2e-6, rtol=0)
    cnn, norm = tiny_arms()[0], nn.BatchNorm2d(4, momentum=None)  # None: the mean over batches
    cnn.load_state_dict(ours[0])
    for images in batches:
        norm(cnn[0](images))
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(ours[0][f"1.{key}"], norm.state_dict()[key])


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_mixed_precision_trains(precision: torch.dtype) -> None:
    rows, batches, parts = [], tiny_batches(8), []
    after = trained(batches, epochs=3, precision=precision, log=rows.append, swa_start=0,
                    save=lambda all_parts, history: parts.append(all_parts))
    assert rows[2]["loss"] < rows[0]["loss"] and not equal(after, trained(batches, epochs=3))
    assert after[0]["0.weight"].dtype == torch.float32
    if precision == torch.float16:  # small gradients are scaled up, and down again for Adam
        assert parts[-1][-1].get_scale() >= 1024
        state = parts[-1][2].state_dict()["state"]
        assert all(one["exp_avg"].abs().max() < 10 for one in state.values())


def test_loss_that_is_not_finite_ends_training_and_nothing_is_saved() -> None:
    class Spoiled(list):
        def set_epoch(self, epoch: int) -> None:
            self[2] = self[1] * (math.nan if epoch == 1 else 1)

    rows, saved = [], []
    with pytest.raises(FloatingPointError, match="loss became nan in epoch 2"):
        trained(Spoiled(tiny_batches(4)), epochs=3, log=rows.append,
                save=lambda parts, history: saved.append(list(history)))
    assert [row["epoch"] for row in rows] == [1] and saved == [[rows[0]["loss"]]]


# %% the command

TINY = ("--cnn test_resnet --transformer test_vit --image-size 32 --batch-size 4 --workers 0 "
        "--precision fp32 --init random").split()
ARMS = "cnn", "transformer"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders(tmp_path_factory.mktemp("images"), cat=10, dog=10)  # 14 to train on


def command(images: Path, out: Path, *more: str, epochs: int = 1) -> None:
    cass.main(["--data", str(images), "--out", str(out), *TINY, "--epochs", str(epochs), *more])


def networks(out: Path) -> list[dict]:
    return [torch.load(out / f"{arm}.pt", weights_only=True)["state_dict"] for arm in ARMS]


def by_functions(folder: Path, seed: int = 0, augment: str = "cass", **options) -> list[dict]:
    """What the command does, with the functions it is made of."""
    images = split_images(read_images(folder))
    rows = ImageRows(images, images.part("train"), augmentation(32, augment), seed)
    arms = [build_model(arm, "random", 32, seed=seed) for arm in ("test_resnet", "test_vit")]
    torch.manual_seed(seed)
    loader = make_loader(rows, 4, seed=seed, drop_last=True)
    return weights(pretrain_cass(*arms, loader, **{"epochs": 1} | options))


def test_run_leaves_its_files_and_prints_what_loads_them(
        images: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command(images, tmp_path, epochs=6)  # 18 steps, averaged once
    out = capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} == {
        "config.json", "split.csv", "log.jsonl", "cnn.pt", "transformer.pt", "checkpoint.pt"}
    config = json.loads((tmp_path / "config.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert config["finished"] and config["classes"] == ["cat", "dog"]
    assert config["options"]["data"] == str(images) and config["options"]["seed"] == 0
    assert config["versions"]["timm"] == timm.__version__ and config["arms"]["cnn"] == "test_resnet"
    assert [row["epoch"] for row in rows] == list(range(7)) and rows[0]["loss"] is None
    gauges = [f"{arm}_{gauge}" for arm in ARMS for gauge in ("cosine", "rank", "moved")]
    assert all(set(row) == {"epoch", "loss", *gauges, "seconds"} for row in rows)
    assert [rows[e]["cnn_moved"] > 0 for e in (0, 1)] == [False, True]
    split = (tmp_path / "split.csv").read_text().splitlines()[1:]
    assert len(split) == 20 and sum(",train," in line for line in split) == 14
    assert equal(networks(tmp_path), by_functions(images, epochs=6))
    lines = re.findall(r"timm\.create_model\(.*\)", out)
    for line, saved, fixed in zip(lines, networks(tmp_path), (False, True), strict=True):
        model = eval(line, {"timm": timm})
        assert equal(model.state_dict(), saved) and ("img_size=32" in line) == fixed
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 1000)
    table = re.findall(r"^ +\d+ .*$", out, re.M)
    assert len(table) == 7 and max(map(len, table)) <= 100 and "too short to average" not in out


@pytest.mark.parametrize("more, options", [
    ([], {}), (["--seed", "1"], {"seed": 1}), (["--lr", "0.01"], {"lr": 0.01}),
    (["--cnn-optimizer", "sgd"], {"cnn_optimizer": SGD}),
    (["--loss", "contrast"], {"loss": contrast_loss, "lr": 3e-4}),
    (["--outputs", "sigmoid"], {"loss": lambda r, t: cass_loss(r.sigmoid(), t.sigmoid())}),
    (["--outputs", "softmax"], {"loss": lambda r, t: cass_loss(r.softmax(1), t.softmax(1))}),
    (["--augment", "blur+solarize"], {"augment": "blur+solarize"}),
    (["--precision", "bf16"], {"precision": torch.bfloat16})], ids=" ".join)
def test_each_option_does_what_its_function_does(more: list[str], options: dict, images: Path,
                                                 tmp_path: Path, capsys) -> None:
    command(images, tmp_path, *more)
    assert "too short to average weights" in capsys.readouterr().out
    assert equal(networks(tmp_path), by_functions(images, **options))
    assert not more or not equal(networks(tmp_path), by_functions(images))


def test_validation_and_test_images_are_never_opened(images: Path, tmp_path: Path) -> None:
    command(images, tmp_path / "a")
    others = class_folders(tmp_path / "images", cat=10, dog=10)
    for line in (tmp_path / "a" / "split.csv").read_text().splitlines()[1:]:
        path, part, *_ = line.split(",")
        if part != "train":
            (others / path).write_bytes(b"no image")
    command(others, tmp_path / "b")
    assert equal(networks(tmp_path / "a"), networks(tmp_path / "b"))


@pytest.mark.parametrize("cnn, vit, kept", [(7, 7, 7), (7, 5, 1000), (0, 0, 1000), (7, 0, 1000)])
def test_arms_without_equally_many_outputs_get_new_heads(
        cnn: int, vit: int, kept: int, images: Path, tmp_path: Path) -> None:
    for name, outputs in (("test_resnet", cnn), ("test_vit", vit)):
        model = build_model(name, "random", 32, outputs=outputs)
        torch.save(model.state_dict(), tmp_path / f"{name}.pt")
    command(images, tmp_path / "out", "--init", str(tmp_path))
    assert [len(state.popitem()[1]) for state in networks(tmp_path / "out")] == [kept, kept]


def test_collapse_is_said_once(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = timm.create_model("test_vit", img_size=32)
    nn.init.normal_(model.head.bias, std=1000)  # far above what differs between images
    torch.save(model.state_dict(), tmp_path / "test_vit.pt")
    command(images, tmp_path / "out", "--init", f"random,{tmp_path}", epochs=2)
    said = capsys.readouterr().out
    assert said.count("warning: transformer gives almost the same output for every image") == 1
    assert "--loss contrast" in said and "warning: cnn" not in said


def test_weights_that_do_not_move_end_the_command(images: Path, tmp_path: Path, capsys) -> None:
    still = ["--lr", "1e-30", "--batch-size", "14"]  # one step, at that rate
    said = sentence(capsys, lambda: command(images, tmp_path, *still))
    assert "weights of cnn have not moved in epoch 1" in said and "--lr" in said
    assert not (tmp_path / "cnn.pt").exists()


# %% the files as a whole

FILES = sorted(ROOT.glob("*.py"))
METHODS = {"cass", "dino", "finetune"}


def public(file: Path) -> set[str]:
    """Names that a file defines at its top level."""
    table = symtable.symtable(file.read_text(encoding="utf-8"), file.name, "exec")
    names = {x.get_name() for x in table.get_symbols() if x.is_assigned() and not x.is_imported()}
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_method_file_pasted_into_a_notebook(name: str, monkeypatch, capsys) -> None:
    """It defines everything, runs nothing, needs no other file, and trains."""
    for file in FILES:
        monkeypatch.setitem(sys.modules, file.stem, None)  # importing it fails
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "/nowhere/kernel.json"])
    cell, stream, rows = {"__name__": "__main__"}, torch.get_rng_state(), []
    text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    exec(compile(text, "<cell>", "exec"), cell)
    assert public(ROOT / f"{name}.py") <= set(cell) and "main" in cell
    assert capsys.readouterr() == ("", "") and torch.equal(torch.get_rng_state(), stream)
    cnn = timm.create_model("test_resnet", num_classes=3)
    x, truth = torch.rand(4, 3, 32, 32), torch.eye(3)[[0, 1, 2, 0]]
    if name == "cass":
        cell["pretrain_cass"](cnn, copy.deepcopy(cnn), [x, x], epochs=1, log=rows.append)
    elif name == "dino":
        student, views = cell["DinoNetwork"](cnn, 8), ([x, x], [x, x])
        cell["pretrain_dino"](student, [views], epochs=1, log=rows.append)
    else:
        cell["finetune_network"](cnn, [(x, truth)], [(x, truth)], epochs=1, log=rows.append)
    assert [row["epoch"] for row in rows] == [1] and math.isfinite(rows[0]["loss"])


def test_public_names_are_unique_and_no_file_needs_a_method() -> None:
    owners: dict[str, list[str]] = {}
    for file in FILES:
        for name in public(file) - {"main"}:
            owners.setdefault(name, []).append(file.name)
        modules = re.findall(r"^ *(?:from|import) (\w+)", file.read_text(encoding="utf-8"), re.M)
        assert not {"__future__", "extras", "tests", *METHODS} & set(modules), file
    assert {name: files for name, files in owners.items() if len(files) > 1} == {}
