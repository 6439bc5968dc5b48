"""cass.py: the loss against loops, the training loop against one written by hand, and runs equal to the bit."""

import ast
import copy
import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, Iterator

import pytest
import timm
import torch
from torch import Tensor, nn

import cass
import runtime
from cass import cass_loss, cosine_rate, pretrain_cass
from helpers import class_folders, sentence
from metrics import arm_gauges

ROOT = Path(__file__).resolve().parents[1]

# %% the loss


def loss_by_loops(r: Tensor, t: Tensor, eps: float = 1e-8) -> float:
    """Equation 1 as it is printed, in float64."""
    total = 0.0
    for a, b in zip(r.tolist(), t.tolist()):
        length_a = max(math.sqrt(math.fsum(x * x for x in a)), eps)
        length_b = max(math.sqrt(math.fsum(x * x for x in b)), eps)
        total += 2 - 2 * math.fsum(x / length_a * (y / length_b) for x, y in zip(a, b))
    return total / len(r)


def two(n: int = 6, d: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    stream = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=stream), torch.randn(n, d, generator=stream)


def test_loss_is_equation_1() -> None:
    for n, d, seed in ((1, 1, 0), (1, 7, 1), (6, 10, 2), (16, 1000, 3)):
        r, t = two(n, d, seed)
        assert cass_loss(r, t).shape == () and cass_loss(r, t).dtype == torch.float32
        assert abs(cass_loss(r, t).item() - loss_by_loops(r, t)) < 1e-5


@pytest.mark.parametrize("scale_r, scale_t", [(0, 1), (1, 0), (0, 0), (1e-10, 1), (1, 3e-9), (1e-9, 1e-10), (3e-9, 3e-9)])
def test_loss_of_rows_shorter_than_eps(scale_r: float, scale_t: float) -> None:
    r, t = two()
    r, t = torch.nn.functional.normalize(r), torch.nn.functional.normalize(r + t)
    r[2:4] *= scale_r
    t[3:5] *= scale_t
    assert abs(cass_loss(r, t).item() - loss_by_loops(r, t)) < 1e-5
    assert abs(cass_loss(r, t, eps=0.1).item() - loss_by_loops(r, t, eps=0.1)) < 1e-5


def test_loss_is_symmetric_and_free_of_scale() -> None:
    r, t = two()
    scale = torch.tensor([1e-3, 0.1, 1, 7, 100, 1e4])[:, None]
    loss = cass_loss(r, t)
    for other in (cass_loss(t, r), cass_loss(r * scale, t), cass_loss(r, t * scale), cass_loss(r * scale, t * 5)):
        assert abs(other - loss) < 1e-5


def test_loss_at_its_ends() -> None:
    r, _ = two()
    assert cass_loss(r, 3 * r) < 1e-12 and cass_loss(r, -2 * r) == pytest.approx(4)
    assert cass_loss(torch.tensor([[1.0, 0, 0]]), torch.tensor([[0, 5.0, 0]])).item() == 2


@pytest.mark.parametrize("size", [1e-3, 1e-4, 1e-5])
def test_tiny_losses_keep_their_digits(size: float) -> None:
    r, other = two(8, 1000)
    t = 3 * (r + size * other)
    true = loss_by_loops_of_differences(r, t)
    assert 0.5 * size ** 2 < true < 2 * size ** 2
    assert abs(cass_loss(r, t).item() / true - 1) < 1e-2


def loss_by_loops_of_differences(r: Tensor, t: Tensor) -> float:
    """|r - t|^2 of the unit vectors, in float64: free of cancellation, unlike 2 - 2 cos."""
    r, t = r.double(), t.double()
    unit_r, unit_t = r / r.square().sum(1, keepdim=True).sqrt(), t / t.square().sum(1, keepdim=True).sqrt()
    return (unit_r - unit_t).square().sum(1).mean().item()


def test_zeros_give_a_finite_loss_and_finite_gradients() -> None:
    for zero_r, zero_t in ((slice(None), slice(None)), (slice(0, 1), slice(None)), (slice(None), slice(0, 0))):
        r, t = two()
        r[zero_r], t[zero_t] = 0, 0
        r.requires_grad_(), t.requires_grad_()
        loss = cass_loss(r, t)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(r.grad).all() and torch.isfinite(t.grad).all()
    assert cass_loss(torch.zeros(3, 4), torch.zeros(3, 4)).item() == 2


def test_loss_is_computed_in_float32_under_autocast() -> None:
    r, t = (x.bfloat16() for x in two(16, 100))
    with torch.autocast("cpu", torch.bfloat16):
        loss = cass_loss(r, t)
        tiny = cass_loss(r, r * 1.5)
    assert loss.dtype == torch.float32 and abs(loss.item() - loss_by_loops(r.float(), t.float())) < 1e-5
    assert tiny < 1e-4


def test_gradient_goes_into_both_arms_and_fits_finite_differences() -> None:
    r, t = two(3, 4)
    r[2] *= 0.02  # shorter than eps
    inputs = [x.clone().requires_grad_() for x in (r, t)]
    cass_loss(*inputs, eps=0.1).backward()
    for which, i, j in itertools.product((0, 1), range(3), range(4)):
        ends = []
        for step in (1e-6, -1e-6):
            moved = [x.double() for x in (r, t)]
            moved[which][i, j] += step
            ends.append(loss_by_loops(*moved, eps=0.1))
        assert abs(inputs[which].grad[i, j].item() - (ends[0] - ends[1]) / 2e-6) < 1e-4


# %% the rate


def test_rate_is_pytorchs_cosine_annealing() -> None:
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=16, eta_min=1e-6)
    for step in range(100):
        assert cosine_rate(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        schedule.step()


def test_rate_at_its_ends() -> None:
    assert [cosine_rate(s) for s in (0, 16, 32)] == pytest.approx([1e-3, 1e-6, 1e-3], rel=1e-12)
    assert cosine_rate(8) == pytest.approx((1e-3 + 1e-6) / 2) and cosine_rate(0, lr=0.5) == 0.5


# %% the loop, with two tiny networks


def tiny_arms() -> tuple[nn.Module, nn.Module]:
    """A CNN with batch norm and a network with dropout, for images of 8 x 8."""
    torch.manual_seed(0)
    cnn = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5))
    return cnn, nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 5))


def tiny_batches(n: int, size: int = 6) -> list[Tensor]:
    return list(torch.rand(n, size, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


def weights(arms: tuple[nn.Module, nn.Module]) -> dict[str, Tensor]:
    return {f"{i}.{k}": v.clone() for i, arm in enumerate(arms) for k, v in arm.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def near(a: dict[str, Tensor], b: dict[str, Tensor], gap: float = 1e-6) -> bool:
    return a.keys() == b.keys() and all((a[k].double() - b[k].double()).abs().max() <= gap for k in a)


def by_hand(batches: list[Tensor], epochs: int = 1, lr: float = 1e-3, sgd: bool = False, clear: bool = True,
            shape: Callable[[Tensor], Tensor] = lambda x: x) -> Iterator[dict[str, Tensor]]:
    """Algorithm 1 in plain PyTorch: the weights of both arms after each step."""
    cnn, transformer = tiny_arms()
    first = torch.optim.SGD(cnn.parameters(), lr, momentum=0.9) if sgd else torch.optim.Adam(cnn.parameters(), lr)
    both = [first, torch.optim.Adam(transformer.parameters(), lr)]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=16, eta_min=1e-6) for o in both]
    torch.manual_seed(7)
    for images in batches * epochs:
        for optimizer in both if clear else ():
            optimizer.zero_grad()
        r, t = shape(cnn(images)), shape(transformer(images))
        (2 - 2 * nn.functional.cosine_similarity(r, t, eps=1e-8)).mean().backward()
        for optimizer, schedule in zip(both, schedules):
            optimizer.step()
            schedule.step()
        yield weights((cnn, transformer))


def trained(batches: list[Tensor], **options) -> dict[str, Tensor]:
    arms = tiny_arms()
    torch.manual_seed(7)
    return weights(pretrain_cass(*arms, batches, **{"epochs": 1, "swa_start": 1} | options))


def parameters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if not re.search("running|tracked", k)}


def buffers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if re.search("running|tracked", k)}


@pytest.mark.parametrize("ours, hand", [
    ({}, {}), ({"lr": 0.01}, {"lr": 0.01}), ({"cnn_optimizer": "sgd"}, {"sgd": True}),
    ({"outputs": "sigmoid"}, {"shape": torch.sigmoid}), ({"outputs": "softmax"}, {"shape": lambda x: x.softmax(1)})])
def test_steps_equal_a_loop_written_by_hand(ours: dict, hand: dict) -> None:
    batches = tiny_batches(5)
    *_, wanted = by_hand(batches, epochs=2, **hand)
    assert near(trained(batches, epochs=2, **ours), wanted, 2e-6)


def test_gradients_are_cleared() -> None:
    batches = tiny_batches(4)
    assert not near(trained(batches), list(by_hand(batches, clear=False))[-1], 1e-4)


def test_average_is_the_mean_of_the_weights_at_the_low_points() -> None:
    batches = tiny_batches(30)  # 3 epochs: 90 steps, low points after the steps 16, 48 and 80
    states = list(by_hand(batches, epochs=3))
    for start, low_points in ((0, (16, 48, 80)), (0.5, (48, 80)), (0.75, (80,))):
        ours = trained(batches, epochs=3, swa_start=start)
        mean = {k: torch.stack([states[s][k].double() for s in low_points]).mean(0)
                for k in parameters(states[0])}
        assert near(parameters(ours), mean, 2e-6)
        cnn = tiny_arms()[0]
        cnn[0].load_state_dict({"weight": ours["0.0.weight"]})
        inside = [cnn[0](images) for images in batches]  # what batch norm sees, with the averaged weights
        statistics = {"running_mean": torch.stack([x.mean((0, 2, 3)) for x in inside]).mean(0),
                      "running_var": torch.stack([x.var((0, 2, 3)) for x in inside]).mean(0)}
        assert near({k: ours[f"0.1.{k}"] for k in statistics}, statistics, 1e-5)
        assert ours["0.1.num_batches_tracked"] == 30


def test_without_a_low_point_the_trained_networks_come_back() -> None:
    batches = tiny_batches(16)  # steps 0 to 15: the first low point would be step 16
    *_, last = by_hand(batches)
    assert near(trained(batches, swa_start=0), last, 2e-6)
    assert near(trained(batches * 2, swa_start=0.75), list(by_hand(batches * 2))[-1], 2e-6)


def test_averaging_draws_nothing_from_the_random_stream() -> None:
    states = []
    for swa_start in (0, 1):
        arms = nn.Sequential(nn.Dropout(0.2), tiny_arms()[0]), tiny_arms()[1]
        torch.manual_seed(7)
        pretrain_cass(*arms, tiny_batches(18), epochs=1, swa_start=swa_start)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_averaging_can_be_off() -> None:
    batches = tiny_batches(40)
    arms = tiny_arms()
    torch.manual_seed(7)
    kept = pretrain_cass(*arms, batches, epochs=1, swa_start=1)
    assert kept[0] is arms[0] and kept[1] is arms[1]
    assert near(weights(kept), list(by_hand(batches))[-1], 1e-5)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_mixed_precision_trains(precision: torch.dtype) -> None:
    rows, batches = [], tiny_batches(8)
    before = weights(tiny_arms())
    after = trained(batches, epochs=3, precision=precision, log=rows.append, gauges=arm_gauges, swa_start=0)
    assert all(math.isfinite(row["loss"]) for row in rows[1:]) and rows[3]["loss"] < rows[1]["loss"]
    assert all(v.dtype == before[k].dtype and torch.isfinite(v).all() for k, v in after.items())
    assert all(rows[-1][f"{arm}_{key}"] > 0 for arm in ("cnn", "transformer") for key in ("moved", "gradient"))
    assert not same(after, trained(batches, epochs=3, swa_start=0))  # autocast did something


def test_float16_gradients_are_scaled_up_and_down_again() -> None:
    states = []
    trained(tiny_batches(3), precision=torch.float16, save=lambda state, force: states.append(copy.deepcopy(state)))
    assert states[-1]["parts"][-1]["scale"] >= 1024  # the scaler is on, and in the checkpoint
    # Adam's average of gradients is theirs, not that of a loss 65,536 times as high.
    assert all(v["exp_avg"].abs().max() < 10 for v in states[-1]["parts"][3]["state"].values())


# %% rows and gauges


def test_one_row_an_epoch_from_the_untrained_start_onwards() -> None:
    rows, batches = [], tiny_batches(5)
    trained(batches, epochs=2, log=rows.append, gauges=arm_gauges)
    gauges = {f"{arm}_{key}" for arm in ("cnn", "transformer")
              for key in ("cosine", "spread", "rank", "gradient", "moved")}
    assert [row["epoch"] for row in rows] == [0, 1, 2] and set(rows[0]) == gauges | {"epoch"}
    assert all(set(row) == gauges | {"epoch", "loss", "images_per_second"} for row in rows[1:])
    assert rows[0]["cnn_moved"] == rows[0]["transformer_moved"] == 0 and rows[0]["cnn_gradient"] is None
    assert rows[1]["cnn_moved"] > 0 and rows[1]["transformer_gradient"] > 0 and rows[1]["images_per_second"] > 0
    json.dumps(rows)


def test_loss_of_a_row_is_the_mean_over_its_epoch() -> None:
    rows, batches = [], tiny_batches(3)
    trained(batches, epochs=1, log=rows.append)
    states = [weights(tiny_arms()), *by_hand(batches)]
    arms, losses = tiny_arms(), []
    torch.manual_seed(7)
    for images, state in zip(batches, states):
        for i, arm in enumerate(arms):
            arm.load_state_dict({k[2:]: v for k, v in state.items() if k.startswith(f"{i}.")})
        losses.append(loss_by_loops(arms[0](images).detach(), arms[1](images).detach()))
    assert rows[1]["loss"] == pytest.approx(sum(losses) / 3, abs=1e-5)


def test_gauges_see_the_last_256_outputs_in_training_mode() -> None:
    seen = []
    batches = tiny_batches(50)  # 300 images

    def look(outputs: Tensor, arm: nn.Module, start: list[Tensor]) -> dict:
        seen.append(outputs.clone())
        return {"n": len(outputs)}
    rows = []
    trained(batches, log=rows.append, gauges=look)
    assert [row["cnn_n"] for row in rows] == [row["transformer_n"] for row in rows] == [256, 256]
    cnn = tiny_arms()[0]
    wanted = torch.cat([cnn(images) for images in batches[:43]])[-256:]  # batch statistics, as in training
    assert torch.allclose(seen[0], wanted, atol=1e-6)
    assert not torch.allclose(seen[0], torch.cat([cnn.eval()(images) for images in batches[:43]])[-256:], atol=0.1)


def test_the_row_of_the_untrained_start_changes_nothing() -> None:
    arms, rows = tiny_arms(), []
    before, stream = weights(arms), torch.get_rng_state()
    pretrain_cass(*arms, tiny_batches(5), epochs=0, log=rows.append, gauges=arm_gauges)
    assert len(rows) == 1 and same(weights(arms), before)  # batch-norm statistics included
    assert torch.equal(torch.get_rng_state(), stream) and arms[0].training and arms[1].training


@pytest.mark.parametrize("swa_start", [0, 1])
def test_gauges_change_no_bit(swa_start: float) -> None:
    batches = tiny_batches(10)
    assert same(trained(batches, epochs=2, swa_start=swa_start, gauges=arm_gauges),
                trained(batches, epochs=2, swa_start=swa_start))


def test_loss_that_is_not_finite_names_epoch_and_step() -> None:
    batches = tiny_batches(4)
    arms, saved = tiny_arms(), []

    class Spoiled(list):
        def set_epoch(self, epoch: int, skip: int) -> None:
            self[2] = batches[2] * (math.nan if epoch == 1 else 1)
    with pytest.raises(FloatingPointError, match="loss became nan in epoch 2, step 3"):
        pretrain_cass(*arms, Spoiled(batches), epochs=3, save=lambda state, force: saved.append(state["epoch"]))
    assert saved == [1]


def test_loss_that_is_not_finite_is_seen_every_50_steps() -> None:
    taken = []
    batches = ((taken.append(1), x * math.nan if i == 60 else x)[1] for i, x in enumerate(tiny_batches(120)))

    class Stream:
        def __len__(self) -> int:
            return 120

        def __iter__(self) -> Iterator[Tensor]:
            return batches
    with pytest.raises(FloatingPointError, match="epoch 1"):
        trained(Stream())
    assert len(taken) <= 43 + 50


@pytest.mark.parametrize("steps", [1, 5, 6, 8, 17, 18])  # 3 epochs of 6 steps, an average at step 16
def test_stopped_and_resumed_loop_equals_one_in_a_piece(steps: int) -> None:
    batches, options = tiny_batches(6), {"epochs": 3, "swa_start": 0, "gauges": arm_gauges}
    straight, rows, file = [], [], io.BytesIO()
    wanted = trained(batches, log=straight.append, **options)

    class Skipping:
        """A loader that can leave out the first batches of an epoch, as those of data.py can."""
        skip, told, steps = 0, False, 0

        def __len__(self) -> int:
            return len(batches)

        def set_epoch(self, epoch: int, skip: int) -> None:
            self.skip, self.told = skip, True

        def __iter__(self) -> Iterator[Tensor]:
            for batch in batches[self.skip:]:
                self.steps += self.told  # not while the untrained start is measured
                yield batch

    loader = Skipping()
    with pytest.raises(KeyboardInterrupt):
        trained(loader, log=rows.append, stop=lambda: loader.steps >= steps,
                save=lambda state, force: force and torch.save(state, file), **options)
    file.seek(0)
    state = torch.load(file, weights_only=True)  # tensors and plain values only
    arms = tiny_arms()
    torch.manual_seed(99)
    rows = rows[:state["epoch"] + 1]
    kept = pretrain_cass(*arms, Skipping(), resume=state, log=rows.append, **options)
    assert same(weights(kept), wanted)
    assert [timeless(row) for row in rows] == [timeless(row) for row in straight]


def timeless(row: dict) -> dict:
    return {k: v for k, v in row.items() if k != "images_per_second"}


# %% the command

TINY = ("--init random --cnn test_resnet --transformer test_vit --image-size 32 --batch-size 4 --workers 0 "
        "--epochs 6 --swa-start 0").split()  # 14 training images: 3 steps an epoch, an average at step 16


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders(tmp_path_factory.mktemp("images"), cat=10, dog=10)


@pytest.fixture(scope="module")
def straight(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in a piece, for others to be compared with."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    command(images, out)
    return out


def command(images: Path, out: Path, *more: str) -> None:
    cass.main(["--data", str(images), "--out", str(out), *TINY, *more])


def networks(out: Path) -> dict[str, Tensor]:
    return {f"{arm}.{key}": value for arm in ("cnn", "transformer")
            for key, value in torch.load(out / f"{arm}.pt", weights_only=True)["state_dict"].items()}


def log(out: Path) -> list[dict]:
    return [timeless(json.loads(line)) for line in (out / "log.jsonl").read_text().splitlines()]


def equal_runs(a: Path, b: Path) -> bool:
    return same(networks(a), networks(b)) and log(a) == log(b)


class Steps:
    """Counts the steps of the training loop through its loss; `at(n, act)` acts in step n."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n, self.acts, loss = 0, {}, cass.cass_loss

        def counted(r: Tensor, t: Tensor) -> Tensor:
            self.n += 1
            factor = self.acts.get(self.n, lambda: None)()
            return loss(r, t) * (1 if factor is None else factor)
        monkeypatch.setattr(cass, "cass_loss", counted)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)


def test_a_run_leaves_what_it_should(straight: Path, images: Path, capsys: pytest.CaptureFixture) -> None:
    assert {file.name for file in straight.iterdir()} >= {
        "config.json", "split.csv", "log.jsonl", "cnn.pt", "transformer.pt", "checkpoint.pt", "checkpoint-prev.pt"}
    assert not list(straight.glob("*.tmp")) and not list(straight.glob("*next*"))
    config = json.loads((straight / "config.json").read_text())
    assert config["finished"] and config["options"]["seed"] == 0 and config["versions"]["timm"] == timm.__version__
    assert config["options"]["data"] == str(images) and config["arms"]["cnn"] == "test_resnet"
    assert [row["epoch"] for row in log(straight)] == list(range(7)) and "loss" not in log(straight)[0]
    split = (straight / "split.csv").read_text().splitlines()[1:]
    assert len(split) == 20 and sum(",train," in line for line in split) == 14
    state = torch.load(straight / "checkpoint.pt", weights_only=True)
    assert state["epoch"] == 6


def test_trained_on_the_training_part_alone(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import data
    opened, load = set(), data.load_image
    monkeypatch.setattr(data, "load_image", lambda path: (opened.add(str(path)), load(path))[1])
    command(images, tmp_path, "--epochs", "3")
    split = [line.split(",") for line in (tmp_path / "split.csv").read_text().splitlines()[1:]]
    assert opened == {str(images / path) for path, part, *_ in split if part == "train"}


def test_printed_lines_load_the_networks_strictly(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command(images, tmp_path, "--epochs", "1")
    lines = re.findall(r"timm\.create_model\(.*\)", capsys.readouterr().out)
    assert len(lines) == 2
    for line, arm in zip(lines, ("cnn", "transformer")):
        saved = torch.load(tmp_path / f"{arm}.pt", weights_only=True)["state_dict"]
        model = eval(line, {"timm": timm})
        assert same(dict(model.state_dict()), saved) and model(torch.zeros(2, 3, 32, 32)).shape == (2, 1000)
    assert "img_size" not in lines[0] and "img_size=32" in lines[1]


@pytest.mark.parametrize("workers", ["0", "1", "2"])
def test_equal_seeds_give_equal_bits(workers: str, images: Path, straight: Path, tmp_path: Path) -> None:
    torch.manual_seed(int(workers))
    command(images, tmp_path, "--workers", workers)
    assert equal_runs(tmp_path, straight)


def test_seed_draws_the_first_weights(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = []

    def look(cnn: nn.Module, transformer: nn.Module, loader: object, **options: object) -> None:
        first.append(weights((cnn, transformer)))
        raise KeyboardInterrupt
    monkeypatch.setattr(cass, "pretrain_cass", look)
    for i, seed in enumerate(("0", "0", "1")):
        with pytest.raises(SystemExit):
            command(images, tmp_path / str(i), "--seed", seed)
    assert same(first[0], first[1])
    assert all((first[0][k] != first[2][k]).any() for k in ("0.fc.weight", "1.head.weight", "1.pos_embed"))


def test_looking_at_labels_changes_no_bit(images: Path, straight: Path, tmp_path: Path) -> None:
    command(images, tmp_path, "--probe-every", "2")
    assert same(networks(tmp_path), networks(straight))
    seen = [{k for k in row if k.endswith(("knn", "linear"))} for row in log(tmp_path)]
    assert [len(keys) for keys in seen] == [4, 0, 4, 0, 4, 0, 4]
    assert all(0 <= log(tmp_path)[6][key] <= 1 for key in seen[6])


def test_the_other_loss_can_be_chosen(images: Path, tmp_path: Path, steps: Steps) -> None:
    command(images, tmp_path, "--loss", "contrast")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["options"]["lr"] == 3e-4 and steps.n == 0  # Equation 1 was never asked
    assert log(tmp_path)[6]["loss"] < log(tmp_path)[1]["loss"]


def test_a_run_without_a_low_point_says_so(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = "no low point of the rate"
    command(images, tmp_path / "short", "--epochs", "1")  # 3 steps
    assert words in capsys.readouterr().out
    command(images, tmp_path / "off", "--epochs", "1", "--swa-start", "1")
    command(images, tmp_path / "long")
    assert words not in capsys.readouterr().out


def test_another_seed_gives_other_weights_and_the_same_split(images: Path, straight: Path, tmp_path: Path) -> None:
    command(images, tmp_path, "--seed", "1")
    ours, theirs = networks(tmp_path), networks(straight)
    assert not any(torch.equal(ours[k], theirs[k]) for k in ("cnn.conv1.0.weight", "cnn.fc.weight",
                                                             "transformer.pos_embed") if k in ours)
    assert (tmp_path / "split.csv").read_text() == (straight / "split.csv").read_text()
    assert log(tmp_path)[0] != log(straight)[0]


@pytest.mark.parametrize("n", [1, 3, 8, 17])
def test_resumed_after_ctrl_c_inside_an_epoch(n: int, images: Path, straight: Path, tmp_path: Path, steps: Steps,
                                              monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/cass.py", "--data", "my images"])
    handler = signal.getsignal(signal.SIGINT)
    steps.acts[n] = lambda: signal.raise_signal(signal.SIGTERM if n == 8 else signal.SIGINT)
    with pytest.raises(SystemExit) as stopped:
        command(images, tmp_path)
    said = capsys.readouterr().err
    assert stopped.value.code == 130 and "python cass.py --data 'my images' --resume" in said
    assert steps.n == n and not (tmp_path / "cnn.pt").exists()
    command(images, tmp_path, "--resume", "--workers", "1")
    assert equal_runs(tmp_path, straight)
    assert signal.getsignal(signal.SIGINT) is handler  # as it was before


def test_resumed_after_a_stop_between_epochs(images: Path, straight: Path, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    save = runtime.Run.save

    def save_and_end(self: runtime.Run, state: dict, force: bool = False) -> None:
        save(self, state, force=True)
        if state["epoch"] == 2:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(runtime.Run, "save", save_and_end)
        command(images, tmp_path)
    assert [row["epoch"] for row in log(tmp_path)] == [0, 1, 2]
    command(images, tmp_path, "--resume")
    assert equal_runs(tmp_path, straight)


def test_resumed_after_kill_9_inside_a_later_epoch(images: Path, straight: Path, tmp_path: Path,
                                                   capsys: pytest.CaptureFixture) -> None:
    code = ("import os, sys, cass, torch; torch.set_num_threads(1); loss, n = cass.cass_loss, []\n"
            "def counted(r, t):\n"
            "    n.append(1)\n"
            "    if len(n) == 14: os.kill(os.getpid(), 9)\n"  # in epoch 5
            "    return loss(r, t)\n"
            "cass.cass_loss = counted; cass.main(sys.argv[1:])")
    done = subprocess.run([sys.executable, "-c", code, "--data", str(images), "--out", str(tmp_path), *TINY],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert [row["epoch"] for row in log(tmp_path)] == [0, 1, 2, 3, 4]
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"epoch": 5, "lo')  # a line that was being written
    command(images, tmp_path, "--resume")
    assert "starting at the beginning" not in capsys.readouterr().out
    assert equal_runs(tmp_path, straight)


def test_ctrl_c_in_a_terminal(images: Path, straight: Path, tmp_path: Path) -> None:
    """The whole process group gets the signal, workers too."""
    run = subprocess.Popen([sys.executable, "cass.py", "--data", str(images), "--out", str(tmp_path), *TINY,
                            "--workers", "2", "--epochs", "100000"], cwd=ROOT, text=True, start_new_session=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        while '"epoch": 2' not in ((tmp_path / "log.jsonl").read_text() if (tmp_path / "log.jsonl").exists() else ""):
            assert run.poll() is None, run.communicate()
            time.sleep(0.05)
        os.killpg(run.pid, signal.SIGINT)
        out, said = run.communicate(timeout=60)
    finally:
        run.poll() is None and run.kill()
    assert run.returncode == 130
    assert said.split("\n")[1:] == [f"stopped; the checkpoint in {tmp_path} is safe. Go on with",
                                    f"  python cass.py --data {images} --out {tmp_path} {' '.join(TINY)} --workers 2 "
                                    "--epochs 100000 --resume", ""]
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["epoch"] >= 2


def test_resume_on_a_finished_run_says_so(images: Path, straight: Path, capsys: pytest.CaptureFixture) -> None:
    before = {file.name: file.read_bytes() for file in straight.iterdir()}
    command(images, straight, "--resume")
    said = capsys.readouterr()
    assert "finished" in said.out and not said.err
    assert {file.name: file.read_bytes() for file in straight.iterdir()} == before


def test_resume_without_a_checkpoint_starts_at_the_beginning(images: Path, straight: Path, tmp_path: Path,
                                                             capsys: pytest.CaptureFixture) -> None:
    command(images, tmp_path / "new", "--resume")
    assert "no checkpoint: starting at the beginning" in capsys.readouterr().out
    assert equal_runs(tmp_path / "new", straight)


def test_a_folder_with_a_run_is_refused_unless_asked(images: Path, straight: Path, tmp_path: Path, steps: Steps,
                                                     capsys: pytest.CaptureFixture) -> None:
    before = {file.name: file.read_bytes() for file in straight.iterdir()}
    said = sentence(capsys, lambda: command(images, straight))
    assert "finished run" in said and "--overwrite" in said and str(straight) in said
    assert {file.name: file.read_bytes() for file in straight.iterdir()} == before
    steps.acts[2] = lambda: signal.raise_signal(signal.SIGINT)
    with pytest.raises(SystemExit):
        command(images, tmp_path, "--seed", "1")
    said = sentence(capsys, lambda: command(images, tmp_path))
    assert "unfinished run" in said and "--resume" in said and "--overwrite" in said
    command(images, tmp_path, "--overwrite")
    assert equal_runs(tmp_path, straight)


@pytest.mark.parametrize("more, words", [
    (["--lr", "0.002"], ["--lr 0.001", "0.002"]), (["--epochs", "7"], ["--epochs 6", "7"]),
    (["--image-size", "48"], ["--image-size 32", "48"]), (["--seed", "3"], ["--seed 0", "3"]),
    (["--cnn", "resnet10t"], ["--cnn test_resnet", "resnet10t"])])
def test_resume_with_a_changed_option_names_it(more: list[str], words: list[str], images: Path, straight: Path,
                                               capsys: pytest.CaptureFixture) -> None:
    said = sentence(capsys, lambda: command(images, straight, "--resume", *more))
    assert all(word in said for word in [str(straight), *words])


def test_resume_with_other_images_is_refused(tmp_path: Path, steps: Steps, capsys: pytest.CaptureFixture) -> None:
    images = class_folders(tmp_path / "images", cat=10, dog=10)
    steps.acts[2] = lambda: signal.raise_signal(signal.SIGINT)
    with pytest.raises(SystemExit):
        command(images, tmp_path / "out")
    class_folders(images, cat=11)
    assert "changed" in sentence(capsys, lambda: command(images, tmp_path / "out", "--resume"))


def test_loss_that_is_not_finite_ends_the_command(images: Path, straight: Path, tmp_path: Path, steps: Steps,
                                                  capsys: pytest.CaptureFixture) -> None:
    steps.acts[5] = lambda: math.nan
    said = sentence(capsys, lambda: command(images, tmp_path))
    assert "nan in epoch 2, step 2" in said and "checkpoint" in said
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["epoch"] == 1
    assert not (tmp_path / "cnn.pt").exists()
    command(images, tmp_path, "--resume")
    assert equal_runs(tmp_path, straight)


def test_weights_that_do_not_move_end_the_command(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture) -> None:
    build = runtime.build_model
    monkeypatch.setattr(runtime, "build_model", lambda name, *more, **options: build(name, *more, **options)
                        .requires_grad_(name != "test_resnet"))
    said = sentence(capsys, lambda: command(images, tmp_path))
    assert "weights of cnn have not moved in epoch 1" in said


def test_collapse_is_said_once(images: Path, tmp_path: Path, steps: Steps, monkeypatch: pytest.MonkeyPatch,
                               capsys: pytest.CaptureFixture) -> None:
    build = runtime.build_model

    def constant(name: str, *more, **options) -> nn.Module:
        model = build(name, *more, **options)
        if name == "test_vit":
            nn.init.normal_(model.head.bias, std=1000)  # far above what differs between images
        return model
    monkeypatch.setattr(runtime, "build_model", constant)
    command(images, tmp_path, "--epochs", "2")
    said = capsys.readouterr().out
    assert said.count("warning, transformer: ") == 1 and "almost the same output for every image" in said
    assert "warning, cnn" not in said


# %% the files as a whole

FILES = sorted(file for file in ROOT.glob("*.py"))
METHODS = {"cass", "dino", "finetune"}


def pasted(file: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """The namespace after a notebook cell that holds the whole file."""
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "/nowhere/kernel.json"])
    namespace = {"__name__": "__main__"}
    exec(compile(file.read_text(), "<cell>", "exec"), namespace)
    return namespace


def public(file: Path) -> set[str]:
    """Names a file defines at its top level, by function, class or assignment."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                names |= {leaf.id for leaf in ast.walk(target) if isinstance(leaf, ast.Name)}
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_pasted_into_a_notebook_defines_everything_and_runs_nothing(
        file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "path", [p for p in sys.path if Path(p or ".").resolve() != ROOT])
    stream = torch.get_rng_state()
    with monkeypatch.context() as alone:
        for name in {f.stem for f in FILES}:
            alone.setitem(sys.modules, name, None)  # importing a sibling would fail
        namespace = pasted(file, alone)
    assert public(file) <= set(namespace) and public(file)
    said = capsys.readouterr()
    assert not said.out + said.err and torch.equal(torch.get_rng_state(), stream)


def test_cass_trains_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in {f.stem for f in FILES}:
        monkeypatch.setitem(sys.modules, name, None)
    cell, rows = pasted(ROOT / "cass.py", monkeypatch), []
    cnn, vit = timm.create_model("test_resnet"), timm.create_model("test_vit", img_size=32)
    loader = [torch.rand(4, 3, 32, 32) for _ in range(3)]
    kept = cell["pretrain_cass"](cnn, vit, loader, epochs=1, log=rows.append)
    assert [row["epoch"] for row in rows] == [0, 1] and 0 <= rows[1]["loss"] <= 4
    assert kept[0](loader[0]).shape == kept[1](loader[0]).shape == (4, 1000)


def test_public_names_are_unique_across_files() -> None:
    owners: dict[str, list[str]] = {}
    for file in FILES:
        for name in public(file) - {"main"}:
            owners.setdefault(name, []).append(file.name)
    assert {name: files for name, files in owners.items() if len(files) > 1} == {}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_imports_follow_the_arrows(file: Path) -> None:
    tree = ast.parse(file.read_text())
    inside = {id(node) for function in ast.walk(tree) if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
              for node in ast.walk(function)}
    ours = {f.stem for f in FILES} | {"extras", "tests"}
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        siblings = {name.split(".")[0] for name in names} & ours
        assert "__future__" not in names and getattr(node, "level", 0) == 0
        assert not siblings or id(node) in inside, f"line {node.lineno}: siblings are imported in functions"
        assert siblings <= ({"data", "metrics", "runtime"} if file.stem in METHODS else set()), f"line {node.lineno}"
