"""dino.py: loss and gauges against explicit formulas, the loop against one written by hand and
against numbers recorded from vit-pytorch, the views, and what the command leaves behind."""

import copy
import itertools
import math
import re
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from helpers import TinyNet, command, equal, half_cosine, log_rows, noise, state
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

import dino
import runtime
from data import ImageRows, make_loader, read_images, read_split
from dino import (DinoNetwork, DinoViews, blur_3x3, dino_loss, dino_targets, output_facts,
                  output_gauges, pretrain_dino)

# %% the loss and the gauges


def loss_by_loops(students: list[Tensor], teachers: Tensor, centre: Tensor, hot: float,
                  cold: float) -> float:
    """The mean over images and over pairs of different views of -sum p log q, in float64."""
    total = pairs = 0
    for (i, student), (j, teacher) in itertools.product(enumerate(students), enumerate(teachers)):
        if i == j:
            continue
        pairs += 1
        for s, t in zip(student.double().numpy(), teacher.detach().double().numpy()):
            q, p = np.exp(s / hot), np.exp((t - centre.double().numpy()) / cold)
            total -= (p / p.sum() * np.log(q / q.sum())).sum() / len(student)
    return total / pairs


@pytest.mark.parametrize("views, given", [(2, ()), (5, (0.1, 0.04)), (3, (1.0, 0.5))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_is_the_cross_entropy_of_different_views(views, given, dtype):
    stream = torch.Generator().manual_seed(0)
    students = [torch.randn(5, 8, generator=stream).to(dtype) for _ in range(views)]
    teachers = torch.randn(2, 5, 8, generator=stream).mul(0.2).to(dtype).requires_grad_()
    centre = torch.randn(8, generator=stream)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        targets = dino_targets(teachers, centre, *given[1:])
        loss = dino_loss(students, targets, *given[:1])
    hot, cold = given or (0.9, 0.04)  # the package's
    assert loss.shape == () and loss.dtype == torch.float32 and not targets.requires_grad
    assert abs(loss.item() - loss_by_loops(students, teachers, centre, hot, cold)) < 1e-5


def test_entropy_and_kl_tell_the_two_collapses():
    def gauges(targets: Tensor) -> dict:
        return output_gauges([output_facts(torch.zeros(4, 3), x) for x in targets.split(4, dim=1)])
    targets = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0)).softmax(-1)
    rows = targets.flatten(0, 1).tolist()
    mean = [math.fsum(column) / len(rows) for column in zip(*rows)]
    entropy = -math.fsum(m * math.log(m) for m in mean)
    kl = math.fsum(p * math.log(p / m) for row in rows for p, m in zip(row, mean)) / len(rows)
    assert gauges(targets) == pytest.approx({"entropy": entropy, "kl": kl}, abs=1e-5) and kl > 0.1
    one = torch.eye(8)[3].expand(2, 12, 8)
    for collapsed, wanted in ((torch.full((2, 12, 8), 1 / 8), (math.log(8), 0)), (one, (0, 0))):
        assert tuple(gauges(collapsed).values()) == pytest.approx(wanted, abs=1e-5)


# %% the loop, with a tiny network


def network() -> DinoNetwork:
    return DinoNetwork(TinyNet(5, dropout=0), 7)


def batches(steps: int = 2, students: int = 2) -> list[dino.Views]:
    stream = torch.Generator().manual_seed(1)
    return [tuple([torch.rand(6, 3, 8, 8, generator=stream) for _ in range(number)]
                  for number in (2, students)) for _ in range(steps)]


def trained(student: DinoNetwork, loader: list, **options) -> tuple[list[dict], list]:
    """The rows of a training, and the student, teacher, centre, ... that it leaves."""
    rows, kept = [], []
    pretrain_dino(student, loader, log=rows.append,
                  save=lambda parts, history: kept.append(parts), **options)
    return rows, kept[-1]


def by_hand(loader: list, lr: Callable = lambda s: 3e-4, hot: float = 0.9,
            cold: Callable = lambda s: 0.04, keep: Callable = lambda s: 0.9,
            keep_centre: float = 0.9, decay: float = 0.0) -> tuple:
    """DINO in plain PyTorch, with Adam: losses, student, teacher and centre after 4 epochs."""
    student, losses = network(), []
    teacher, centre = copy.deepcopy(student), torch.zeros(7)
    adam = torch.optim.Adam(student.parameters(), fused=True)  # not the bits of the slower ones
    for step, (large, small) in enumerate(loader * 4):
        taught = torch.stack([teacher(x)[1].detach() for x in large])
        outputs = [student(x)[1] for x in small]
        loss = dino_loss(outputs, dino_targets(taught, centre, cold(step)), hot)
        adam.zero_grad()
        loss.backward()
        adam.param_groups[0]["lr"] = lr(step)
        for p in student.parameters():
            p.data *= 1 - lr(step) * decay * (p.ndim > 1 and p.grad is not None)
        adam.step()
        for old, new in zip(teacher.parameters(), student.parameters()):
            old.data.lerp_(new.data, 1 - keep(step))
        centre = centre.lerp(taught.mean((0, 1)), 1 - keep_centre)
        losses.append(loss.item())
    return losses, state(student), state(teacher), centre


OPTIONS = {"lr": 0.001, "warmup": 1, "student_temperature": 0.1, "centre_momentum": 0.8,
           "teacher_temperature": (0.1, 0.3, 2), "momentum": (0.5, 1.0), "weight_decay": 30.0}
BY_HAND = {"lr": lambda s: 0.001 * (s + 1) / 2 if s < 2 else half_cosine(s - 2, 6, 0.001),
           "hot": 0.1, "keep_centre": 0.8, "cold": lambda s: 0.1 + (0.3 - 0.1) * min(1, s / 4),
           "keep": lambda s: half_cosine(s, 8, 0.5, 1), "decay": 30.0}


@pytest.mark.parametrize("ours, hand, students", [
    ({}, {}, 2), ({}, {}, 4), (OPTIONS, BY_HAND, 2)])
def test_training_equals_a_loop_written_by_hand_to_the_bit(ours, hand, students):
    loader = batches(students=students)
    rows, (student, teacher, centre, *_) = trained(network(), loader, epochs=4, **ours)
    losses, *wanted = by_hand(loader, **hand)
    means = [(first + second) / 2 for first, second in zip(losses[::2], losses[1::2])]
    assert [row["loss"] for row in rows] == pytest.approx(means, abs=1e-6)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert equal([state(student), state(teacher), centre.value], wanted)


def wave(*shape: int, k: int) -> Tensor:
    """Numbers that no random generator has a part in."""
    x = torch.arange(math.prod(shape), dtype=torch.float64) + k
    return torch.sin(0.7 * x ** 1.2).reshape(shape).float()


def told(tensors: list[Tensor]) -> list[float]:
    """One number for each tensor, which depends on all it holds."""
    waves = [torch.cos(torch.arange(x.numel(), dtype=torch.float64)) for x in tensors]
    return [(x.detach().double().flatten() @ wave).item() for x, wave in zip(tensors, waves)]


# What the Dino class of vit-pytorch 1.26.11 gave for the network, weights and views below.
RECORDED = {
    "losses": [(1.5855312 + 1.6390187 + 1.5398796) / 3],
    "gradients": [0.225443, -0.0713314, -0.048704, 0.271285, 0.101832, -0.0308693, 0.0377439,
                  0.190516, 0.020661, 0.0782045, 0.20854],
    "student": [0.7182732, 0.7319822, 0.9901947, -2.3976872, -0.9624437, 101.6629964, 0.5227667,
                -45.1592926, -0.2542704, -0.6754605, -0.4218413],
    "teacher": [0.7144518, 0.7322336, 0.9891932, -2.3585203, -0.963335, 101.4906302, 0.5257717,
                -45.1501269, -0.246102, -0.6741932, -0.4196845],
    "centre": [-0.1315762, 0.0054555, 0.0892495, 0.0737753, -0.0216503, -0.1148315, 0.012284],
    "buffers": [0.0013731, -0.1774875],
}


def test_agrees_with_vit_pytorch():
    student = network()
    own = [p for name, p in student.named_parameters() if ".fc." not in name]
    for k, p in enumerate(own):
        p.data = 0.4 * wave(*p.shape, k=k) + (k == 1)
    steps = [[[wave(3, 3, 8, 8, k=100 * step + 10 * part + view) * (1 + view) for view in (0, 1)]
              for part in (0, 1)] for step in range(3)]
    rows, (_, teacher, centre, *_) = trained(student, steps, epochs=1)
    taught = [p for name, p in teacher.named_parameters() if ".fc." not in name]
    norm = teacher.backbone.body[1]
    now = {"losses": [rows[0]["loss"]], "gradients": told([p.grad for p in own]),
           "student": told(own), "teacher": told(taught), "centre": centre.value.tolist(),
           "buffers": told([norm.running_mean, norm.running_var])}
    for key, numbers in RECORDED.items():
        assert now[key] == pytest.approx(numbers, rel=1e-5, abs=1e-5), key


def test_gauges_see_features_of_the_last_256_images_in_training_mode():
    facts, loader = [], batches(50)
    trained(network(), loader, epochs=1, lr=1e-12, gauges=lambda seen: facts.extend(seen) or {})
    features, backbone = torch.cat([fact[0] for fact in facts]), network().backbone
    wanted = torch.cat([backbone.forward_features(small[0]) for _, small in loader])
    assert 256 <= len(features) < 262
    assert torch.allclose(features, wanted[-len(features):], atol=1e-6)


# %% the views


def plain(view: Tensor) -> Tensor:
    """Without the normalisation: from 0 to 1."""
    return v2.functional.normalize(view, [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225],
                                   [1 / 0.229, 1 / 0.224, 1 / 0.225])


def area(view: Tensor) -> float:
    """The share of an image that a crop shows, if red grows from left to right and green down."""
    red, green, _ = plain(view)
    width, height = red.max() - red.min(), green.max() - green.min()
    assert 0.7 < width / height < 1.43
    return (width * height).item()


@pytest.mark.parametrize("local_crops, sizes, sources", [
    (0, [64, 64], [10, 20]), (3, [64, 64, 32, 32, 32], [10, 20, 30, 40, 50])])
def test_crops_have_their_areas_and_sizes_and_come_from_their_views(local_crops, sizes, sources):
    ramp = np.linspace(0, 255, 240).round().astype(np.uint8)
    red, green = np.meshgrid(ramp, ramp)
    image = Image.fromarray(np.dstack([red, green, 0 * red]))
    views, grey = DinoViews(64, local_crops, 32 if local_crops else None), itertools.count(10, 10)
    views.augment = lambda image: image
    torch.manual_seed(0)
    drawn = [views(image) for _ in range(150)]
    large = [area(view) for views, _ in drawn for view in views]
    small = [area(view) for _, views in drawn for view in views[-(local_crops or 2):]]
    assert 0.46 < min(large) < 0.56 and 0.92 < max(large) < 1.01 and 0.64 < np.mean(large) < 0.78
    assert 0.03 < min(small) < 0.07 and 0.36 < max(small) < 0.42 and 0.19 < np.mean(small) < 0.25
    assert [view.shape for view in drawn[0][0]] == [(3, 64, 64)] * 2
    assert [view.shape for view in drawn[0][1]] == [(3, size, size) for size in sizes]
    views.augment = lambda image: Image.new("RGB", image.size, (next(grey),) * 3)  # one a view
    shades = [[round(255 * plain(x).mean().item()) for x in part] for part in views(noise())]
    assert shades == [[10, 20], sources]


def test_augmentations_come_as_often_as_they_should():
    image, steps = noise(0, 16, 16), DinoViews(16).augment.transforms
    jitter = steps[0].transforms[0]
    for strength in (jitter.brightness, jitter.contrast, jitter.saturation):
        assert strength == pytest.approx((0.2, 1.8))
    assert jitter.hue == pytest.approx((-0.2, 0.2)) and steps[3].transforms == [blur_3x3]
    torch.manual_seed(0)
    for step, chance in zip(steps, (0.3, 0.2, 0.5, 0.2), strict=True):
        changed = sum(step(image).tobytes() != image.tobytes() for _ in range(1000)) / 1000
        assert abs(changed - chance) < 0.05, step


@pytest.mark.parametrize("sigma", [1.0, 1.3, 2.0])
def test_blur_is_torchvisions(sigma):
    image = noise(0, 30, 20)
    wanted = np.asarray(v2.functional.gaussian_blur(image, [3, 3], [sigma, sigma])).astype(int)
    with mock.patch.object(Tensor, "uniform_", lambda x, low, high: x.fill_(sigma)):
        ours = np.asarray(blur_3x3(image)).astype(int)
    assert np.abs(ours - wanted)[1:-1, 1:-1].max() <= 1


# %% the command


def test_the_command_trains_on_the_training_part_and_saves_the_teacher(pets, tmp_path, opened,
                                                                       capsys):
    command("dino", pets, tmp_path, "--arch test_resnet --epochs 2 --seed 3 --lr 0.01")
    split = read_split(tmp_path / "split.csv", read_images(pets))
    assert set(opened) <= {pets / row.path for row in split.part("train")}
    assert len(set(opened)) >= 12
    line = re.search(r"timm\.create_model\(.*\)", capsys.readouterr().out)[0]
    saved = eval(line, {"timm": timm})  # strict: timm raises if a tensor is missing
    loader = make_loader(ImageRows(split, split.part("train"), DinoViews(32), 3), 4, seed=3,
                         drop_last=True)
    backbone, rows = runtime.build_model("test_resnet", "random", 32, outputs=0, seed=3), []
    torch.manual_seed(3)
    student = DinoNetwork(backbone, 16).to(runtime.pick_device("auto"))
    _, teacher = pretrain_dino(student, loader, epochs=2, lr=0.01, log=rows.append)
    assert equal(state(saved), state(teacher)) and saved.num_classes == 0
    assert [row["loss"] for row in log_rows(tmp_path)] == [None, *(row["loss"] for row in rows)]


@pytest.fixture
def arrived(monkeypatch: pytest.MonkeyPatch) -> dict:
    """What the command calls `pretrain_dino` with; it logs `arrived["rows"]` in place of it."""
    found = {"rows": [], **pretrain_dino.__kwdefaults__}

    def pretrain(student: DinoNetwork, loader: object, **options) -> tuple:
        found.update(options, loader=loader)
        for row in found["rows"]:
            options["log"](row)
        return student.backbone, student.backbone
    monkeypatch.setattr(dino, "pretrain_dino", pretrain)
    return found


@pytest.mark.parametrize("recipe, wanted, crops", [
    ("paper", (0.9, (0.04, 0.04, 1), (0.9, 0.9), 0, 0.0), [64, 64]),
    ("authors", (0.1, (0.04, 0.07, 30), (0.996, 1.0), 10, 0.04), [64, 64] + [32] * 8)])
def test_recipes(recipe, wanted, crops, pets, tmp_path, arrived):
    command("dino", pets, tmp_path, f"--recipe {recipe} --image-size 64")
    assert wanted == tuple(arrived[key] for key in (
        "student_temperature", "teacher_temperature", "momentum", "warmup", "weight_decay"))
    assert [view.shape[-1] for view in next(iter(arrived["loader"]))[1]] == crops


def test_defaults():
    args = vars(dino.dino_options().parse_args(["--data", "d"]))
    keys = ("epochs", "lr", "batch_size", "image_size", "out_dim")
    assert [args[key] for key in keys] == [100, 3e-4, 16, 384, 65336] and len(args) <= 25


def test_the_authors_recipe_runs(pets, tmp_path):
    command("dino", pets, tmp_path, "--recipe authors --image-size 64 --batch-size 14")
    rows = log_rows(tmp_path)
    assert all(0 <= row["kl"] <= row["entropy"] <= math.log(16) + 1e-5 for row in rows)
    assert rows[0]["backbone_moved"] == 0 < rows[1]["backbone_moved"]


@pytest.mark.parametrize("entropy, way", [(0.01, "one output wins"), (2.7, "all alike")])
def test_collapse_is_said_once(entropy, way, pets, tmp_path, arrived, capsys):
    row = {"loss": 1.0, "entropy": entropy, "backbone_cosine": 0.5, "backbone_rank": 4.0,
           "backbone_moved": 0.1}
    arrived["rows"] = [row | {"epoch": e, "kl": kl} for e, kl in enumerate((0.5, 0.001, 0.0), 1)]
    command("dino", pets, tmp_path)
    said = capsys.readouterr().out
    assert said.count("warning: ") == said.count(f"same output for every image ({way})") == 1
