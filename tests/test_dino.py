"""dino.py: the loss against loops, the training loop against one written by hand and against numbers
recorded from vit-pytorch, the views, and runs equal to the bit."""

import copy
import io
import itertools
import json
import math
import re
import signal
import sys
from pathlib import Path
from typing import Callable, Iterator
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

import dino
import runtime
from data import ImageRows, make_loader, read_images
from dino import (DinoHead, DinoNetwork, DinoViews, blur_3x3, cosine_between, dino_loss, dino_rate, dino_targets,
                  follow, linear_between, pretrain_dino)
from helpers import class_folders, noise, sentence
from metrics import arm_gauges

ROOT = Path(__file__).resolve().parents[1]

# %% the loss


def softmax(row: list[float]) -> list[float]:
    high = max(row)
    powers = [math.exp(x - high) for x in row]
    return [x / math.fsum(powers) for x in powers]


def loss_by_loops(students: list[Tensor], teachers: list[Tensor], centre: Tensor, hot: float, cold: float) -> float:
    """The mean over images and over pairs of different views of -sum p log q, in float64."""
    total = pairs = 0
    for (i, student), (j, teacher) in itertools.product(enumerate(students), enumerate(teachers)):
        if i != j:
            pairs += 1
            for s, t in zip(student.tolist(), teacher.tolist()):
                q = softmax([x / hot for x in s])
                p = softmax([(x - c) / cold for x, c in zip(t, centre.tolist())])
                total -= math.fsum(a * math.log(b) for a, b in zip(p, q)) / len(student)
    return total / pairs


def logits(views: int, n: int = 5, k: int = 8, seed: int = 0, scale: float = 1.0) -> list[Tensor]:
    stream = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(n, k, generator=stream) for _ in range(views)]


@pytest.mark.parametrize("views, hot, cold", [(2, 0.9, 0.04), (2, 0.1, 0.07), (2, 1.0, 1.0), (5, 0.1, 0.04), (3, 0.9, 0.5)])
def test_loss_is_the_cross_entropy_of_different_views(views: int, hot: float, cold: float) -> None:
    students, teachers, centre = logits(views), logits(2, seed=1, scale=0.2), logits(1, 1, seed=2)[0][0]
    loss = dino_loss(students, dino_targets(torch.stack(teachers), centre, cold), hot)
    assert loss.shape == () and loss.dtype == torch.float32
    assert abs(loss.item() - loss_by_loops(students, teachers, centre, hot, cold)) < 1e-5


def test_default_temperatures_are_the_papers() -> None:
    students, teachers, centre = logits(2), logits(2, seed=1), torch.zeros(8)
    loss = dino_loss(students, dino_targets(torch.stack(teachers), centre))
    assert abs(loss.item() - loss_by_loops(students, teachers, centre, 0.9, 0.04)) < 1e-5


def test_gradient_goes_into_the_student_alone_and_fits_the_formula() -> None:
    students, teachers, centre = logits(2), torch.stack(logits(2, seed=1)), torch.zeros(8)
    leaves = [x.clone().requires_grad_() for x in (*students, teachers)]
    targets = dino_targets(leaves[2], centre, 0.5)
    dino_loss(leaves[:2], targets, 0.9).backward()
    assert leaves[2].grad is None and not targets.requires_grad
    for i in (0, 1):  # of student i: (q - p of the other view) / temperature, over images and two pairs
        wanted = ((students[i] / 0.9).softmax(1) - (teachers[1 - i] / 0.5).softmax(1)) / 0.9 / 5 / 2
        assert torch.allclose(leaves[i].grad, wanted, atol=1e-7)


def test_loss_is_computed_in_float32_under_autocast() -> None:
    students, teachers = logits(2, k=500), logits(2, k=500, seed=1, scale=0.1)
    students, teachers = [x.bfloat16() for x in students], [x.bfloat16() for x in teachers]
    with torch.autocast("cpu", torch.bfloat16):
        loss = dino_loss(students, dino_targets(torch.stack(teachers), torch.zeros(500)))
    assert loss.dtype == torch.float32
    wanted = loss_by_loops([x.float() for x in students], [x.float() for x in teachers], torch.zeros(500), 0.9, 0.04)
    assert abs(loss.item() - wanted) < 1e-5


def test_head_by_hand() -> None:
    torch.manual_seed(0)
    head, x = DinoHead(5, 7), torch.randn(4, 5)
    parts = list(head.parameters())
    assert [tuple(p.shape) for p in parts] == [(256, 5), (256,), (256, 256), (256,), (256, 256), (256,), (7, 256), (7,)]
    y = x
    for weight, bias in zip(parts[0:6:2], parts[1:6:2]):
        y = y @ weight.T + bias
        y = y * (1 + torch.erf(y / math.sqrt(2))) / 2
    y = y / y.square().sum(1, keepdim=True).sqrt()
    assert torch.allclose(head(x), y @ parts[6].T + parts[7], atol=1e-6)
    with torch.no_grad():
        parts[4].mul_(0), parts[5].fill_(1e-9)  # GELU gives 5e-10 everywhere: norm 8e-9, below eps
    assert torch.allclose(head(x) - parts[7], 5e-4 * parts[6].sum(1) * torch.ones(4, 1), atol=1e-5)


def test_both_ways_to_collapse_are_said_in_a_sentence() -> None:
    assert dino.output_warning(3.0, 0.5, 1000) is None
    assert "one output wins" in dino.output_warning(0.01, 0.0, 1000)
    assert "alike" in dino.output_warning(6.9, 0.001, 1000)


# %% averages and schedules


def test_moving_average_by_hand() -> None:
    old, new = [torch.tensor([1.0, 2.0]), torch.tensor([[4.0]])], [torch.tensor([3.0, 0.0]), torch.tensor([[-4.0]])]
    kept = old[0]
    follow(old, new, 0.75)
    assert kept.tolist() == [1.5, 1.5] and old[1].item() == 2 and new[0].tolist() == [3, 0]
    follow(old, new, 1.0)
    assert kept.tolist() == [1.5, 1.5]
    follow(old, new, 0.0)
    assert kept.tolist() == [3, 0]
    with pytest.raises(ValueError):
        follow(old, new[:1], 0.5)


def test_schedules_at_start_middle_and_end() -> None:
    assert [cosine_between(s, 100, 0.996, 1) for s in (0, 50, 100)] == pytest.approx([0.996, 0.998, 1])
    assert {cosine_between(s, 100, 0.9, 0.9) for s in range(101)} == {0.9}
    assert [linear_between(s, 30, 0.04, 0.07) for s in (0, 15, 30, 99)] == pytest.approx([0.04, 0.055, 0.07, 0.07])
    assert linear_between(0, 0, 0.04, 0.07) == 0.07
    assert {dino_rate(s, 100) for s in range(100)} == {3e-4}
    rates = [dino_rate(s, 110, 0.5, 10) for s in (0, 4, 9, 10, 60, 110)]
    assert rates == pytest.approx([0.05, 0.25, 0.5, 0.5, (0.5 + 1e-6) / 2, 1e-6])
    assert dino_rate(0, 10, 0.5, 0) == 0.5 and dino_rate(5, 10, 0.5, 0) == pytest.approx(0.25, rel=1e-5)
    assert dino_rate(9, 10, 0.5, 10) == 0.5 and max(dino_rate(s, 100, 0.5, 6.5) for s in range(100)) == 0.5


# %% the loop, with a tiny network


class Tiny(nn.Module):
    """A network with batch norm for images of 8 x 8, with the parts of timm's that DINO uses."""
    head_hidden_size, drop = 36, 0.0

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), nn.Linear(36, 5)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x)).relu()
        return nn.functional.dropout(x, self.drop, self.training) if self.drop else x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x.flatten(1) if pre_logits else self.fc(x.flatten(1))


def tiny(drop: float = 0.0) -> Tiny:
    torch.manual_seed(0)
    network = Tiny()
    network.drop = drop  # with it, training draws random numbers
    return network


Batches = list[tuple[list[Tensor], list[Tensor]]]


def tiny_batches(steps: int, size: int = 6, students: int = 2) -> Batches:
    stream = torch.Generator().manual_seed(1)
    return [tuple([torch.rand(size, 3, 8, 8, generator=stream) for _ in range(views)] for views in (2, students))
            for _ in range(steps)]


class Training(dino.DinoTraining):
    """Notes what it holds after each step."""
    last: "Training"

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.notes, Training.last = [], self

    def remember(self, loss: Tensor, features: Tensor, targets: Tensor) -> None:
        super().remember(loss, features, targets)
        if loss.requires_grad:
            self.notes.append({
                "loss": loss.item(), "centre": self.centre.clone(), "student": clones(self.student.parameters()),
                "teacher": clones(self.teacher.parameters()), "buffers": clones(self.teacher.buffers()),
                "gradients": [None if p.grad is None else p.grad.clone() for p in self.student.parameters()]})


def clones(tensors: Iterator[Tensor]) -> list[Tensor]:
    return [x.detach().clone() for x in tensors]


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[dict]]:
    monkeypatch.setattr(dino, "DinoTraining", Training)
    return lambda: Training.last.notes


def trained(batches: Batches, network: nn.Module | None = None, **options) -> tuple[nn.Module, nn.Module]:
    network = network or tiny()
    torch.manual_seed(7)
    return pretrain_dino(network, batches, **{"epochs": 1, "out_dim": 7} | options)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def near(a: list[Tensor], b: list[Tensor], gap: float = 1e-6) -> bool:
    return len(a) == len(b) and all((x.double() - y.double()).abs().max() <= gap for x, y in zip(a, b))


def values(network: nn.Module) -> list[Tensor]:
    return clones(network.state_dict().values())


def by_hand(batches: Batches, epochs: int = 1, lr: Callable[[int], float] = lambda s: 3e-4, hot: float = 0.9,
            cold: Callable[[int], float] = lambda s: 0.04, keep: Callable[[int], float] = lambda s: 0.9,
            keep_centre: float = 0.9, decay: float = 0.0, clip: float = math.inf) -> Iterator[dict]:
    """DINO in plain PyTorch, Adam written out, without a word in common with the loop of dino.py."""
    backbone = tiny()
    torch.manual_seed(7)
    student = DinoNetwork(backbone, 7)
    teacher, centre = copy.deepcopy(student), torch.zeros(7)
    for step, (large, small) in enumerate(batches * epochs):
        outputs = [student(x)[1] for x in small]
        taught = [teacher(x)[1].detach() for x in large]
        loss, pairs = 0, 0
        for j, i in itertools.product(range(2), range(len(small))):
            if i != j:
                p = torch.exp((taught[j] - centre) / cold(step))
                q = torch.exp(outputs[i] / hot)
                p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
                loss, pairs = loss - (p * q.log()).sum(1).mean(), pairs + 1
        loss = loss / pairs
        used = [p for name, p in student.named_parameters() if ".fc." not in name]
        gradients = torch.autograd.grad(loss, used)
        length = math.sqrt(sum(g.square().sum().item() for g in gradients))
        for p, g in zip(used, gradients):
            g = g * min(1, clip / (length + 1e-6))
            p.m = 0.9 * getattr(p, "m", 0) + 0.1 * g
            p.v = 0.999 * getattr(p, "v", 0) + 0.001 * g * g
            change = p.m / (1 - 0.9 ** (step + 1)) / ((p.v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            p.data = p.data * (1 - lr(step) * decay * (p.ndim > 1)) - lr(step) * change
        for old, new in zip(teacher.parameters(), student.parameters()):
            old.data = keep(step) * old.data + (1 - keep(step)) * new.data
        centre = keep_centre * centre + (1 - keep_centre) * torch.cat(taught).mean(0)
        yield {"loss": loss.item(), "centre": centre, "student": clones(student.parameters()),
               "teacher": clones(teacher.parameters()), "buffers": clones(teacher.buffers())}


@pytest.mark.parametrize("ours, hand, students", [
    ({}, {}, 2), ({}, {}, 4), ({"lr": 0.001}, {"lr": lambda s: 0.001}, 2),
    ({"student_temperature": 0.1, "centre_momentum": 0.8}, {"hot": 0.1, "keep_centre": 0.8}, 2),
    ({"teacher_temperature": (0.04, 0.3, 1)}, {"cold": lambda s: 0.04 + 0.26 * min(1, s / 4)}, 2),
    ({"momentum": (0.5, 1.0)}, {"keep": lambda s: 1 - 0.25 * (1 + math.cos(math.pi * s / 8))}, 2),
    ({"warmup": 0.5, "lr": 0.001}, {"lr": lambda s: 0.001 * (s + 1) / 2 if s < 2 else
                                   1e-6 + (0.001 - 1e-6) * (1 + math.cos(math.pi * (s - 2) / 6)) / 2}, 2),
    ({"weight_decay": 30.0}, {"decay": 30.0}, 2), ({"clip": 0.01}, {"clip": 0.01}, 2)])
def test_steps_equal_a_loop_written_by_hand(ours: dict, hand: dict, students: int, notes: Callable) -> None:
    batches = tiny_batches(4, students=students)
    trained(batches, epochs=2, **ours)
    wanted = list(by_hand(batches, epochs=2, **hand))
    assert len(notes()) == len(wanted) == 8
    for a, b in zip(notes(), wanted):
        assert abs(a["loss"] - b["loss"]) < 1e-5 and near([a["centre"]], [b["centre"]])
        assert all(near(a[key], b[key], 1e-5) for key in ("student", "teacher", "buffers"))
    if hand:  # the option made a difference
        assert not near(notes()[-1]["teacher"], list(by_hand(batches, epochs=2))[-1]["teacher"], 1e-5)


def wave(*shape: int, k: int) -> Tensor:
    """Numbers that no random generator has a part in."""
    x = torch.arange(math.prod(shape), dtype=torch.float64) + k
    return torch.sin(0.7 * x ** 1.2).reshape(shape).float()


def told(tensors: list[Tensor]) -> list[float]:
    """One number for each tensor, which depends on all it holds."""
    return [(t.double().flatten() * torch.cos(torch.arange(t.numel(), dtype=torch.float64))).sum().item() for t in tensors]


# What the Dino class of vit-pytorch 1.26.11 gave for the network, weights and views below (torch 2.15, CPU, Adam).
RECORDED = [({}, {
    "losses": [1.5855312, 1.6390187, 1.5398796],
    "gradients": [0.225443, -0.0713314, -0.048704, 0.271285, 0.101832, -0.0308693, 0.0377439, 0.190516, 0.020661,
                  0.0782045, 0.20854],
    "student": [0.7182732, 0.7319822, 0.9901947, -2.3976872, -0.9624437, 101.6629964, 0.5227667, -45.1592926, -0.2542704,
                -0.6754605, -0.4218413],
    "teacher": [0.7144518, 0.7322336, 0.9891932, -2.3585203, -0.963335, 101.4906302, 0.5257717, -45.1501269, -0.246102,
                -0.6741932, -0.4196845],
    "centre": [-0.1315762, 0.0054555, 0.0892495, 0.0737753, -0.0216503, -0.1148315, 0.012284],
    "buffers": [0.0013731, -0.1774875],
}), ({"lr": 0.01, "student_temperature": 0.1, "teacher_temperature": (0.07, 0.07, 0), "momentum": (0.99, 0.99),
      "centre_momentum": 0.8}, {
    "losses": [1.1821942, 4.913856, 5.4269991],
    "gradients": [-0.0282217, -0.871594, -1.21244, 6.1462, 0.516005, -1.07508, 0.50002, 3.15576, -0.206223, -1.48089,
                  -2.31162],
    "student": [0.9591397, 0.7244009, 1.0453998, -3.1064956, -1.0706231, 102.9030538, 0.4889665, -46.7298972, -0.3263291,
                -0.6380032, -0.4330731],
    "teacher": [0.7191829, 0.7319754, 0.9900492, -2.366463, -0.9658877, 101.473612, 0.5253924, -45.179455, -0.2467862,
                -0.6781191, -0.4198241],
    "centre": [-0.2379933, 0.0108525, 0.1576822, 0.1277233, -0.0374546, -0.2067539, 0.0194205],
    "buffers": [0.0014071, -0.1777604],
})]


@pytest.mark.parametrize("options, recorded", RECORDED)
def test_agrees_with_vit_pytorch(options: dict, recorded: dict, notes: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    head = dino.DinoHead

    def filled(*sizes: int) -> nn.Module:
        module = head(*sizes)
        for k, p in enumerate(module.parameters(), 3):
            p.data = 0.4 * wave(*p.shape, k=k)
        return module
    monkeypatch.setattr(dino, "DinoHead", filled)
    network = tiny()
    for k, p in enumerate([network.conv.weight, network.bn.weight, network.bn.bias]):
        p.data = 0.4 * wave(*p.shape, k=k) + (k == 1)
    views = [[[wave(3, 3, 8, 8, k=100 * step + 10 * part + view) * (1 + view) for view in range(2)] for part in range(2)]
             for step in range(3)]
    trained(views, network, **options)
    assert [note["loss"] for note in notes()] == pytest.approx(recorded["losses"], rel=1e-5, abs=1e-5)
    last = notes()[-1]
    assert last["centre"].tolist() == pytest.approx(recorded["centre"], rel=1e-5, abs=1e-5)
    own = [i for i, (name, _) in enumerate(Training.last.student.named_parameters()) if ".fc." not in name]
    for key in ("gradients", "student", "teacher"):
        assert told([last[key][i] for i in own]) == pytest.approx(recorded[key], rel=1e-5, abs=1e-5), key
    assert told(last["buffers"][:2]) == pytest.approx(recorded["buffers"], rel=1e-5, abs=1e-5)


def test_a_classifier_on_the_network_is_left_alone(notes: Callable) -> None:
    network = tiny()
    before = clones(network.fc.parameters())
    student, teacher = trained(tiny_batches(3), network, weight_decay=0.1)
    assert student is network and same(before, clones(network.fc.parameters())) and network.fc.weight.grad is None
    assert same(before, clones(teacher.fc.parameters()))


def test_teacher_learns_from_the_student_alone_and_shares_nothing_with_it(notes: Callable) -> None:
    student, teacher = trained(tiny_batches(3), lr=0.01)
    now = Training.last
    assert student is now.student.backbone and teacher is now.teacher.backbone and student is not teacher
    assert all(p.grad is None and not p.requires_grad for p in now.teacher.parameters())
    assert all(p.requires_grad for p in now.student.parameters())
    assert teacher.training and now.teacher.head.training
    for part in ("parameters", "buffers"):
        ours, theirs = ({x.untyped_storage().data_ptr() for x in getattr(n, part)()} for n in (now.student, now.teacher))
        assert ours and not ours & theirs
    with torch.no_grad():
        before = values(now.teacher)
        for x in now.student.state_dict().values():
            x.fill_(9)
        assert same(values(now.teacher), before)


def test_teachers_statistics_are_its_own(notes: Callable) -> None:
    batches = tiny_batches(3)
    _, teacher = trained(batches, momentum=(1.0, 1.0))  # its weights stay
    student, fresh = tiny(), tiny()
    for large, _ in batches:
        for view in large:
            fresh.forward_features(view)
    assert near([teacher.bn.running_mean, teacher.bn.running_var], [fresh.bn.running_mean, fresh.bn.running_var])
    assert teacher.bn.num_batches_tracked == 6
    assert same(clones(teacher.parameters()), clones(student.parameters()))


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_mixed_precision_trains(precision: torch.dtype) -> None:
    rows, states = [], []
    student, teacher = trained(tiny_batches(8), epochs=3, precision=precision, log=rows.append, gauges=arm_gauges,
                               save=lambda state, force: states.append(state), clip=100.0)
    assert all(math.isfinite(row["loss"]) for row in rows[1:]) and rows[3]["backbone_moved"] > 0
    assert all(x.dtype == torch.float32 for x in (*student.parameters(), *teacher.parameters(), states[-1]["centre"]))
    assert not same(values(teacher), values(trained(tiny_batches(8), epochs=3, clip=100.0)[1]))  # autocast did something
    if precision == torch.float16:
        assert states[-1]["parts"][-1]["scale"] >= 1024  # the scaler is on, and in the checkpoint
        assert rows[3]["backbone_gradient"] < 10  # of the loss, not of 65,536 times the loss
        trained(tiny_batches(8), precision=precision, log=rows.append, gauges=arm_gauges, clip=0.01)
        assert 1e-4 < rows[-1]["backbone_gradient"] <= 0.0101  # clipped after scaling down


# %% rows and gauges


def gauges_by_loops(rows: list[list[float]]) -> tuple[float, float]:
    """Entropy of the mean of the rows, and mean KL divergence of a row from that mean."""
    mean = [math.fsum(column) / len(rows) for column in zip(*rows)]
    kl = [math.fsum(p * math.log(p / m) for p, m in zip(row, mean) if p > 0) for row in rows]
    return -math.fsum(m * math.log(m) for m in mean if m > 0), math.fsum(kl) / len(kl)


def test_entropy_and_kl_tell_the_two_collapses(notes: Callable) -> None:
    measure = dino.gauge_student(lambda *_: {}, tiny())

    def row(targets: Tensor) -> dict:
        now = dino.DinoTraining(tiny(), 8, 1e-3, 0.0, torch.float32)
        for part in targets.split(4, dim=1):
            now.remember(torch.zeros(()), torch.zeros(4, 3), part)
        return measure(now.recent)
    targets = dino_targets(torch.stack(logits(2, 12)), torch.zeros(8), 0.5)
    entropy, kl = gauges_by_loops(targets.flatten(0, 1).tolist())
    assert row(targets) == pytest.approx({"entropy": entropy, "kl": kl}, abs=1e-5) and kl > 0.1
    uniform, one = torch.full((2, 12, 8), 1 / 8), torch.eye(8)[torch.full((2, 12), 3)]
    assert row(uniform) == pytest.approx({"entropy": math.log(8), "kl": 0}, abs=1e-5)
    assert row(one) == pytest.approx({"entropy": 0, "kl": 0}, abs=1e-5)
    assert row(torch.eye(8)[torch.arange(24).reshape(2, 12) % 8]) == pytest.approx({"entropy": math.log(8), "kl": math.log(8)})


def test_one_row_an_epoch_from_the_untrained_start_onwards(notes: Callable) -> None:
    rows = []
    trained(tiny_batches(5), epochs=2, log=rows.append, gauges=arm_gauges)
    keys = {"epoch", "entropy", "kl", *(f"backbone_{key}" for key in ("cosine", "spread", "rank", "gradient", "moved"))}
    assert [row["epoch"] for row in rows] == [0, 1, 2] and set(rows[0]) == keys
    assert all(set(row) == keys | {"loss", "images_per_second"} for row in rows[1:])
    assert rows[0]["backbone_moved"] == 0 and rows[0]["backbone_gradient"] is None and rows[1]["backbone_gradient"] > 0
    assert all(0 <= row["kl"] <= row["entropy"] <= math.log(7) + 1e-5 for row in rows)
    assert rows[1]["loss"] == pytest.approx(sum(note["loss"] for note in notes()[:5]) / 5, abs=1e-6)
    json.dumps(rows)


def test_gauges_see_the_last_256_features_of_the_first_view_in_training_mode() -> None:
    seen, batches = [], tiny_batches(50)  # 300 images
    trained(batches, lr=1e-12, gauges=lambda features, arm, start: seen.append(features.clone()) or {})
    assert [x.shape for x in seen] == [(256, 36), (256, 36)]
    network = tiny()
    for features, part in zip(seen, (batches[:43], batches)):  # of the untrained start, of the epoch
        wanted = torch.cat([network.forward_features(small[0]).flatten(1) for _, small in part])[-256:]
        assert torch.allclose(features, wanted, atol=1e-6)


def test_the_row_of_the_untrained_start_changes_nothing(notes: Callable) -> None:
    network, rows = tiny(), []
    before = values(network)
    torch.manual_seed(7)
    DinoHead(36, 7)
    stream = torch.get_rng_state()  # as after building the head
    network.drop = 0.2
    student, teacher = trained(tiny_batches(5), network, epochs=0, log=rows.append, gauges=arm_gauges)
    assert len(rows) == 1 and same(values(student), before) and same(values(teacher), before)
    assert torch.equal(torch.get_rng_state(), stream) and student.training and teacher.training
    assert Training.last.recent == Training.last.losses == [] and not Training.last.centre.any()
    assert same(values(trained(tiny_batches(5), gauges=arm_gauges)[1]), values(trained(tiny_batches(5))[1]))


def test_loss_that_is_not_finite_names_epoch_and_step() -> None:
    batches, saved = tiny_batches(4), []

    class Spoiled(list):
        def set_epoch(self, epoch: int, skip: int) -> None:
            self[2] = (batches[2][0], [x * (math.nan if epoch == 1 else 1) for x in batches[2][1]])
    with pytest.raises(FloatingPointError, match="loss became nan in epoch 2, step 3"):
        trained(Spoiled(batches), epochs=3, save=lambda state, force: saved.append(state["epoch"]))
    assert saved == [1]


@pytest.mark.parametrize("steps", [1, 5, 7, 10])
def test_stopped_and_resumed_loop_equals_one_in_a_piece(steps: int, notes: Callable) -> None:
    batches, straight, rows, file = tiny_batches(5), [], [], io.BytesIO()
    options = {"epochs": 3, "gauges": arm_gauges, "warmup": 1, "momentum": (0.5, 1.0)}
    wanted = [values(x) for x in trained(batches, tiny(0.2), log=straight.append, **options)]

    class Skipping:
        """A loader that can leave out the first batches of an epoch, as those of data.py can."""
        skip, told, steps = 0, False, 0

        def __len__(self) -> int:
            return len(batches)

        def set_epoch(self, epoch: int, skip: int) -> None:
            self.skip, self.told = skip, True

        def __iter__(self) -> Iterator:
            for batch in batches[self.skip:]:
                self.steps += self.told  # not while the untrained start is measured
                yield batch

    loader = Skipping()
    with pytest.raises(KeyboardInterrupt):
        trained(loader, tiny(0.2), log=rows.append, stop=lambda: loader.steps >= steps,
                save=lambda state, force: force and torch.save(state, file), **options)
    file.seek(0)
    state = torch.load(file, weights_only=True)  # tensors and plain values only
    network, rows = tiny(0.2), rows[:state["epoch"] + 1]
    torch.manual_seed(99)  # another head, before the checkpoint is read
    kept = pretrain_dino(network, Skipping(), out_dim=7, resume=state, log=rows.append, **options)
    assert same(values(kept[0]), wanted[0]) and same(values(kept[1]), wanted[1])
    assert [timeless(row) for row in rows] == [timeless(row) for row in straight]
    ours, theirs = ({x.untyped_storage().data_ptr() for x in n.parameters()} for n in kept)
    assert not ours & theirs


def timeless(row: dict) -> dict:
    return {k: v for k, v in row.items() if k != "images_per_second"}


# %% the views


def ramps(size: int = 240) -> Image.Image:
    """Red grows from left to right, green from top to bottom: a crop's colours tell where it lies."""
    ramp = np.round(np.arange(size) * 255 / (size - 1)).astype(np.uint8)
    return Image.fromarray(np.stack([np.tile(ramp, (size, 1)), np.tile(ramp[:, None], (1, size)),
                                     np.zeros((size, size), np.uint8)], axis=2))


def plain(view: Tensor) -> Tensor:
    """Without the normalisation: from 0 to 1."""
    return view * torch.tensor([0.229, 0.224, 0.225])[:, None, None] + torch.tensor([0.485, 0.456, 0.406])[:, None, None]


def box(view: Tensor) -> list[float]:
    """Left, right, top and bottom of a crop of `ramps()`, each from 0 to 1."""
    view = plain(view)
    return [view[0].min().item(), view[0].max().item(), view[1].min().item(), view[1].max().item()]


def many_views(views: DinoViews, image: Image.Image, n: int) -> list:
    views.augment = lambda image: image
    torch.manual_seed(0)
    return [views(image) for _ in range(n)]


def test_areas_of_the_crops() -> None:
    for options, students in (({}, 2), ({"local_crops": 3, "local_size": 32}, 5)):
        drawn = many_views(DinoViews(64, **options), ramps(), 150)
        assert all(len(large) == 2 and len(small) == students for large, small in drawn)
        areas = {}
        for large, small in drawn:
            for kind, crops in (("large", large), ("small", small[-options.get("local_crops", 2):])):
                for left, right, top, bottom in map(box, crops):
                    areas.setdefault(kind, []).append((right - left) * (bottom - top))
                    assert 0.7 < (right - left) / (bottom - top) < 1.43
        assert 0.46 < min(areas["large"]) < 0.56 and 0.92 < max(areas["large"]) < 1.01
        assert 0.03 < min(areas["small"]) < 0.07 and 0.36 < max(areas["small"]) < 0.42
        assert 0.64 < np.mean(areas["large"]) < 0.78 and 0.19 < np.mean(areas["small"]) < 0.25  # even, so in the middle


def test_sizes_types_and_numbers_of_views() -> None:
    image = noise(0, 50, 40)
    large, small = DinoViews(48)(image)
    assert [x.shape for x in large + small] == [(3, 48, 48)] * 4 and all(x.dtype == torch.float32 for x in large + small)
    large, small = DinoViews(48, 3, 32)(image)
    assert [x.shape for x in large] == [(3, 48, 48)] * 2 and [x.shape for x in small] == [(3, 48, 48)] * 2 + [(3, 32, 32)] * 3
    assert large[0] is small[0] and large[1] is small[1]
    assert [x.shape for x in DinoViews(48, 1)(image)[1]] == [(3, 48, 48)] * 3


def test_every_view_differs() -> None:
    torch.manual_seed(0)
    for views in (DinoViews(48), DinoViews(48, 2)):
        large, small = views(noise(0, 64, 64))
        crops = large + small[2 if views.local_crops else 0:]
        assert all(not torch.equal(a, b) for a, b in itertools.combinations(crops, 2))
    boxes = [[round(x, 3) for x in box(crop)] for part in many_views(DinoViews(48), ramps(), 1)[0] for crop in part]
    assert all(a != b for a, b in itertools.combinations(boxes, 2))


def test_crops_of_one_number_come_from_one_view() -> None:
    def shades(views: DinoViews) -> list[list[float]]:
        grey = itertools.count(10, 10)  # each view gets a shade of its own
        views.augment = lambda image: Image.new("RGB", image.size, (next(grey),) * 3)
        return [[round(plain(x).mean().item() * 255) for x in part] for part in views(noise())]
    assert shades(DinoViews(32)) == [[10, 20], [10, 20]]
    assert shades(DinoViews(32, 3)) == [[10, 20], [10, 20, 30, 40, 50]]


def test_augmentations_come_as_often_as_they_should() -> None:
    views, image, n = DinoViews(16), noise(0, 16, 16), 2000
    kinds = [v2.ColorJitter, v2.RandomGrayscale, v2.RandomHorizontalFlip]
    assert [type(getattr(t, "transforms", [t])[0]) for t in views.augment.transforms[:3]] == kinds
    assert views.augment.transforms[3].transforms == [blur_3x3]
    jitter = views.augment.transforms[0].transforms[0]
    assert [list(x) for x in (jitter.brightness, jitter.contrast, jitter.saturation)] == [pytest.approx([0.2, 1.8])] * 3
    assert list(jitter.hue) == pytest.approx([-0.2, 0.2])
    torch.manual_seed(0)
    before = np.asarray(image)
    for step, chance in zip(views.augment.transforms, (0.3, 0.2, 0.5, 0.2)):
        changed = sum(not np.array_equal(np.asarray(step(image)), before) for _ in range(n)) / n
        assert abs(changed - chance) < 0.04, step


@pytest.mark.parametrize("sigma", [1.0, 1.3, 2.0])
def test_blur_is_torchvisions(sigma: float) -> None:
    image = noise(0, 30, 20)
    wanted = np.asarray(v2.functional.gaussian_blur(image, [3, 3], [sigma, sigma])).astype(int)
    with mock.patch.object(Tensor, "uniform_", lambda x, low, high: x.fill_(sigma if (low, high) == (1, 2) else 0)):
        ours = np.asarray(blur_3x3(image)).astype(int)
    assert np.abs(ours - wanted)[1:-1, 1:-1].max() <= 1


def test_normalising_after_the_crop_is_normalising_before_it() -> None:
    views, image = DinoViews(48), noise(0, 48, 48)
    torch.manual_seed(0)
    ours = views.teacher_crop(image)
    crop, *tensor = views.teacher_crop.transforms
    torch.manual_seed(0)
    assert (crop(v2.Compose(tensor)(image)) - ours).abs().max() < 0.02  # a crop of bytes is rounded to bytes


# %% the command

TINY = ("--init random --image-size 32 --batch-size 4 --workers 0 --out-dim 32 --epochs 2 "
        "--arch test_resnet").split()  # 14 training images: 3 steps an epoch


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders(tmp_path_factory.mktemp("images"), cat=10, dog=10)


@pytest.fixture(scope="module")
def straight(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in a piece of two networks, for others to be compared with."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    command(images, out, "--arch", "test_vit")
    return out


def command(images: Path, out: Path, *more: str) -> None:
    dino.main(["--data", str(images), "--out", str(out), *TINY, *more])


def backbone(out: Path) -> dict:
    return torch.load(out / "backbone.pt", weights_only=True)


def log(out: Path) -> list[dict]:
    return [timeless(json.loads(line)) for line in (out / "log.jsonl").read_text().splitlines()]


def equal_runs(a: Path, b: Path) -> bool:
    return same(*(list(backbone(out)["state_dict"].values()) for out in (a, b))) and log(a) == log(b)


class Steps:
    """Counts the steps of the training loop through its loss; `acts[n]` is called in step n."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n, self.acts, loss = 0, {}, dino.dino_loss

        def counted(*args) -> Tensor:
            self.n += 1
            factor = self.acts.get(self.n, lambda: None)()
            return loss(*args) * (1 if factor is None else factor)
        monkeypatch.setattr(dino, "dino_loss", counted)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)


def test_a_run_leaves_what_it_should(straight: Path, images: Path) -> None:
    assert {folder.name for folder in straight.iterdir()} == {"test_resnet", "test_vit"}
    for out in straight.iterdir():
        assert {file.name for file in out.iterdir()} >= {"config.json", "split.csv", "log.jsonl", "backbone.pt", "checkpoint.pt"}
        config = json.loads((out / "config.json").read_text())
        assert config["finished"] and config["options"]["arch"] == config["arms"]["backbone"] == out.name
        assert config["options"]["out_dim"] == 32 and config["options"]["momentum"] == [0.9, 0.9]
        assert [row["epoch"] for row in log(out)] == [0, 1, 2]
        split = (out / "split.csv").read_text().splitlines()[1:]
        assert len(split) == 20 and sum(",train," in line for line in split) == 14
        assert torch.load(out / "checkpoint.pt", weights_only=True)["epoch"] == 2
        assert backbone(out)["num_classes"] == 0 and not any("head.projector" in k for k in backbone(out)["state_dict"])


def test_trained_on_the_training_part_alone(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import data
    opened, load = set(), data.load_image
    monkeypatch.setattr(data, "load_image", lambda path: (opened.add(str(path)), load(path))[1])
    command(images, tmp_path)
    split = [line.split(",") for line in (tmp_path / "split.csv").read_text().splitlines()[1:]]
    train = {str(images / path) for path, part, *_ in split if part == "train"}
    assert opened <= train and len(opened) >= 12


def test_printed_lines_load_the_networks_strictly(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command(images, tmp_path, "--arch", "test_vit", "--epochs", "1")
    lines = re.findall(r"timm\.create_model\(.*\)", capsys.readouterr().out)
    assert len(lines) == 2
    for line, arch in zip(lines, ("test_resnet", "test_vit")):
        model = eval(line, {"timm": timm})
        assert same(values(model), list(backbone(tmp_path / arch)["state_dict"].values()))
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, model.num_features)
    assert "img_size" not in lines[0] and "img_size=32" in lines[1]


def test_each_network_is_trained_as_if_alone(images: Path, straight: Path, tmp_path: Path) -> None:
    command(images, tmp_path / "resnet")
    assert equal_runs(tmp_path / "resnet", straight / "test_resnet")
    vit = [x if x != "test_resnet" else "test_vit" for x in TINY]
    torch.manual_seed(99)
    dino.main(["--data", str(images), "--out", str(tmp_path / "vit"), *vit])
    assert equal_runs(tmp_path / "vit", straight / "test_vit")


def test_folders_are_named_after_the_network_and_the_data(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dino.main(["--data", str(images), *TINY, "--epochs", "1"])
    assert (tmp_path / f"runs/dino-test_resnet-{images.name}/backbone.pt").is_file()


def test_networks_of_the_paper_by_default() -> None:
    assert dino.dino_options().parse_args(["--data", "d"]).arch is None
    assert dino.PAPER_NETWORKS == ("resnet50.a1_in1k", "vit_base_patch16_384.augreg_in21k_ft_in1k")


def test_options_have_the_papers_defaults_and_arrive(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = vars(dino.dino_options().parse_args(["--data", "d"]))
    other = {"epochs": 3, "lr": 0.5, "out_dim": 11, "student_temperature": 0.3, "teacher_temperature": (0.1, 0.2, 1.0),
             "momentum": (0.5, 0.6), "warmup": 1.0, "weight_decay": 0.7, "clip": 0.8}
    assert {key: args[key] for key in other} == {key: pretrain_dino.__kwdefaults__[key] for key in other}
    assert args["batch_size"] == 16 and args["image_size"] == 384
    assert len(args) <= 31  # a command of too many options helps nobody
    given, made = {}, []
    monkeypatch.setattr(dino, "pretrain_dino", lambda model, loader, **options: given.update(options) or (model, model))
    monkeypatch.setattr(dino, "DinoViews", lambda *sizes: made.append(sizes))
    command(images, tmp_path, "--local-crops", "3", "--local-size", "16", *itertools.chain.from_iterable(
        (f"--{key.replace('_', '-')}", ":".join(map(str, value)) if isinstance(value, tuple) else str(value))
        for key, value in other.items()))
    assert {key: given[key] for key in other} == other and made == [(32, 3, 16)]


@pytest.mark.parametrize("more", [["--workers", "1"], ["--workers", "2"], ["--cache", "."]])
def test_workers_and_a_cache_change_no_bit(more: list[str], images: Path, straight: Path, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command(images, tmp_path / "out", *more)
    assert equal_runs(tmp_path / "out", straight / "test_resnet")


def test_another_seed_gives_other_weights_and_the_same_split(images: Path, straight: Path, tmp_path: Path) -> None:
    command(images, tmp_path, "--seed", "1")
    assert not torch.equal(*(backbone(out)["state_dict"]["conv1.0.weight"] for out in (tmp_path, straight / "test_resnet")))
    assert (tmp_path / "split.csv").read_text() == (straight / "test_resnet" / "split.csv").read_text()


def test_student_is_kept_on_request(images: Path, straight: Path, tmp_path: Path) -> None:
    command(images, tmp_path, "--save", "student")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["parts"]
    for network, out in ((0, tmp_path), (1, straight / "test_resnet")):
        assert same([v for k, v in state[network].items() if k.startswith("backbone.")],
                    list(backbone(out)["state_dict"].values()))
    assert log(tmp_path) == log(straight / "test_resnet") and not equal_runs(tmp_path, straight / "test_resnet")


@pytest.mark.parametrize("n", [1, 3, 5, 8])
def test_resumed_after_ctrl_c_inside_an_epoch(n: int, images: Path, straight: Path, tmp_path: Path, steps: Steps,
                                              monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/dino.py", "--data", "my images"])
    steps.acts[n] = lambda: signal.raise_signal(signal.SIGTERM if n == 5 else signal.SIGINT)
    with pytest.raises(SystemExit) as stopped:
        command(images, tmp_path, "--arch", "test_vit")
    said = capsys.readouterr().err
    assert stopped.value.code == 130 and "python dino.py --data 'my images' --resume" in said and steps.n == n
    command(images, tmp_path, "--arch", "test_vit", "--resume", "--workers", "1")
    assert ("test_resnet is finished" in capsys.readouterr().out) == (n == 8)  # steps 7 to 12 are the second network's
    assert all(equal_runs(tmp_path / arch, straight / arch) for arch in ("test_resnet", "test_vit"))


def test_resume_on_a_finished_run_says_so(images: Path, straight: Path, capsys: pytest.CaptureFixture) -> None:
    before = {file: file.read_bytes() for file in straight.rglob("*.*")}
    command(images, straight, "--arch", "test_vit", "--resume")
    said = capsys.readouterr()
    assert said.out.count("is finished; there is nothing to resume") == 2 and not said.err
    assert {file: file.read_bytes() for file in straight.rglob("*.*")} == before
    assert "finished run" in sentence(capsys, lambda: command(images, straight / "test_vit"))
    assert "--momentum [0.9, 0.9], not [0.5, 1.0]" in sentence(
        capsys, lambda: command(images, straight, "--arch", "test_vit", "--resume", "--momentum", "0.5:1"))


@pytest.mark.parametrize("more, words", [
    (["--batch-size", "15"], ["14 training images", "15"]), (["--arch", "resnet5"], ["resnet5", "resnet50"]),
    (["--arch", "test_resnet.r160_in1k"], ["share a folder"]), (["--local-size", "16"], ["--local-crops"]),
    (["--device", "tpu9"], ["--device tpu9"]), (["--workers", "-1"], ["--workers -1"]),
    (["--arch", "test_vit", "--image-size", "40"], ["40", "patch of 16", "32"]),
    (["--arch", "test_vit", "--local-crops", "1", "--local-size", "20"], ["--local-size 20", "patch of 16", "16"]),
    (["--arch", "cait_xxs24_224", "--local-crops", "1", "--local-size", "16"], ["cait_xxs24_224", "--local-size 16"])])
def test_wrong_input_is_one_sentence_and_nothing_is_written(more: list[str], words: list[str], images: Path, tmp_path: Path,
                                                            capsys: pytest.CaptureFixture) -> None:
    said = sentence(capsys, lambda: command(images, tmp_path / "out", *more))
    assert all(word in said for word in words), said
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("split.csv"))


@pytest.mark.parametrize("more", [
    ["--momentum", "1.1"], ["--momentum", "0.9:1:1"], ["--momentum", "nan"], ["--student-temperature", "0"],
    ["--teacher-temperature", "a:b"], ["--teacher-temperature", "0.04:0.07"], ["--local-crops", "-1"],
    ["--local-crops", "1.5"], ["--weight-decay", "-1"], ["--warmup", "inf"], ["--student-temperature", "0.1:0.2"],
    ["--out-dim", "0"], ["--mom", "0.9"]])
def test_numbers_out_of_range_are_refused(more: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        dino.dino_options().parse_args(["--data", "d", *more])
    assert stopped.value.code == 2 and more[0] in capsys.readouterr().err


def test_pairs_of_numbers() -> None:
    args = dino.dino_options().parse_args(["--data", "d", "--momentum", "0.996:1", "--teacher-temperature", "0.05"])
    assert args.momentum == (0.996, 1) and args.teacher_temperature == (0.05, 0.05, 0)
    args = dino.dino_options().parse_args(["--data", "d", "--teacher-temperature", "0.04:0.07:30"])
    assert args.teacher_temperature == (0.04, 0.07, 30) and args.momentum == (0.9, 0.9)


def test_the_recipe_of_dinos_authors_runs(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe = ("--student-temperature 0.1 --momentum 0.996:1 --teacher-temperature 0.04:0.07:1 --local-crops 2 "
              "--local-size 16 --warmup 1 --weight-decay 0.04 --clip 3")
    command(images, tmp_path, "--arch", "test_vit", *recipe.split())
    out = capsys.readouterr().out
    assert "entropy       kl" in out and out.count("timm.create_model") == 2
    assert all(row["kl"] >= 0 and math.isfinite(row["entropy"]) for arch in ("test_resnet", "test_vit")
               for row in log(tmp_path / arch))


def test_loss_that_is_not_finite_ends_the_command(images: Path, straight: Path, tmp_path: Path, steps: Steps,
                                                  capsys: pytest.CaptureFixture) -> None:
    steps.acts[5] = lambda: math.nan
    said = sentence(capsys, lambda: command(images, tmp_path))
    assert "nan in epoch 2, step 2" in said and not (tmp_path / "backbone.pt").exists()
    command(images, tmp_path, "--resume")
    assert equal_runs(tmp_path, straight / "test_resnet")


def test_resume_with_other_images_is_refused(tmp_path: Path, steps: Steps, capsys: pytest.CaptureFixture) -> None:
    images = class_folders(tmp_path / "images", cat=10, dog=10)
    steps.acts[2] = lambda: signal.raise_signal(signal.SIGINT)
    with pytest.raises(SystemExit):
        command(images, tmp_path / "out")
    class_folders(images, cat=11)
    assert "changed" in sentence(capsys, lambda: command(images, tmp_path / "out", "--resume"))


def test_models_built_for_smaller_images_too_start_alike() -> None:
    """Taking a second size changes neither the weights nor what the network gives at the first."""
    a, b = (runtime.build_model("test_vit", "random", 48, outputs=0, local_size=size).eval() for size in (None, 16))
    x = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    assert same(values(a), values(b)) and torch.equal(a(x), b(x)) and b(x[..., :16, :16]).shape == (2, 64)


def test_trains_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cass", "data", "dino", "finetune", "metrics", "runtime"):
        monkeypatch.setitem(sys.modules, name, None)  # importing a sibling would fail
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "/nowhere/kernel.json"])
    cell, rows = {"__name__": "__main__"}, []
    exec(compile((ROOT / "dino.py").read_text(), "<cell>", "exec"), cell)
    model = timm.create_model("test_vit", img_size=32)
    views = [([torch.rand(4, 3, 32, 32) for _ in range(2)], [torch.rand(4, 3, 32, 32) for _ in range(2)]) for _ in range(3)]
    student, teacher = cell["pretrain_dino"](model, views, epochs=1, out_dim=16, log=rows.append)
    assert student is model and [row["epoch"] for row in rows] == [0, 1] and 0 < rows[1]["loss"] < 2 * math.log(16)
    assert student(views[0][0][0]).shape == teacher(views[0][0][0]).shape == (4, 1000)


def test_loader_of_folders_gives_views(images: Path) -> None:
    loader = make_loader(ImageRows(images, read_images(images).rows, DinoViews(32, 2, 16)), 4, drop_last=True)
    large, small = next(iter(loader))
    assert [x.shape for x in large] == [(4, 3, 32, 32)] * 2
    assert [x.shape for x in small] == [(4, 3, 32, 32)] * 2 + [(4, 3, 16, 16)] * 2
