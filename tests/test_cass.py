"""cass.py: both losses against explicit loops, the training loop against one written by hand, the
command against the functions it is made of."""

import json
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from helpers import TinyNet, command, equal, half_cosine, log_rows, sentence, state, weights_in
from torch import Tensor, nn
from torch.nn.functional import normalize

from cass import cass_loss, contrast_loss, pretrain_cass
from data import ImageRows, augmentation, make_loader, read_images, split_images
from runtime import build_model, pick_device


def cosine(a: list[float], b: list[float], eps: float = 1e-8) -> float:
    """Of two vectors, each divided by its length, or by `eps` if that is more; in float64."""
    length_a, length_b = (max(math.sqrt(math.fsum(x * x for x in v)), eps) for v in (a, b))
    return math.fsum(x / length_a * (y / length_b) for x, y in zip(a, b))


def loss_by_loops(r: Tensor, t: Tensor, eps: float = 1e-8) -> float:
    """Equation 1 as it is printed."""
    return sum(2 - 2 * cosine(a, b, eps) for a, b in zip(r.tolist(), t.tolist())) / len(r)


def contrast_by_loops(r: Tensor, t: Tensor, temperature: float = 0.1) -> float:
    total = 0.0
    for rows, columns in ((r.tolist(), t.tolist()), (t.tolist(), r.tolist())):
        for i, row in enumerate(rows):
            powers = [math.exp(cosine(row, column) / temperature) for column in columns]
            total -= math.log(powers[i] / math.fsum(powers))
    return total / (2 * len(r))


def two(n: int = 6, d: int = 10) -> tuple[Tensor, Tensor]:
    stream = torch.Generator().manual_seed(n)
    return torch.randn(n, d, generator=stream), torch.randn(n, d, generator=stream)


@pytest.mark.parametrize("loss, by_loops, options", [
    (cass_loss, loss_by_loops, ()),
    (contrast_loss, contrast_by_loops, ()),
    (contrast_loss, contrast_by_loops, (0.5,))])
def test_losses_equal_explicit_loops(loss, by_loops, options):
    for n, d in ((1, 1), (1, 7), (6, 10), (16, 1000)):
        r, t = two(n, d)
        ours = loss(r, t, *options)
        assert ours.shape == () and ours.item() == pytest.approx(by_loops(r, t, *options), abs=1e-5)
    r, t = r.bfloat16(), t.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        under = loss(r, t)
    assert under.dtype == torch.float32 and under == loss(r.float(), t.float())


@pytest.mark.parametrize("scale_r, scale_t", [(0, 1), (0, 0), (1e-10, 1), (1, 3e-9), (3e-9, 3e-9)])
def test_rows_shorter_than_eps_are_divided_by_eps(scale_r, scale_t):
    r, t = two()
    r, t = normalize(r), normalize(r + t)
    r[2:4] *= scale_r
    t[3:5] *= scale_t
    for eps in (1e-8, 0.1):
        assert cass_loss(r, t, eps).item() == pytest.approx(loss_by_loops(r, t, eps), abs=1e-5)
    (cass_loss(r.requires_grad_(), t.requires_grad_()) + contrast_loss(r, t)).backward()
    assert r.grad.isfinite().all() and t.grad.isfinite().all()


def test_losses_at_their_ends():
    r, _ = two()
    assert cass_loss(r, 3 * r) < 1e-6 and cass_loss(r, -2 * r) == pytest.approx(4)
    same, own = torch.ones(8, 16), torch.eye(8, 16)
    assert contrast_loss(same, same).item() == pytest.approx(math.log(8), abs=1e-5)  # collapsed
    assert contrast_loss(own, own).item() < 1e-2 < contrast_loss(own, own.roll(1, 0)).item()


def tiny_arms() -> tuple[nn.Module, nn.Module]:
    """A CNN with batch norm and a network with dropout, for images of 8 x 8."""
    return TinyNet(5, dropout=0), nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(192, 5))


def tiny_batches(n: int) -> list[Tensor]:
    return list(torch.rand(n, 6, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


def states(arms: tuple[nn.Module, ...]) -> list[dict]:
    return [state(arm) for arm in arms]


ADAM = partial(torch.optim.Adam, fused=True)
SGD = partial(torch.optim.SGD, momentum=0.9)


def by_hand(batches: list[Tensor], epochs: int, lr: float = 1e-3,
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
            optimizer.param_groups[0]["lr"] = half_cosine(step, 16, lr)
            optimizer.step()
        yield states(arms), outputs, loss.detach()


@pytest.mark.parametrize("n, swa_start, options", [
    (60, 1, {"lr": 0.01, "cnn_optimizer": SGD}),  # averaged never
    (8, 0, {}), (16, 0.75, {})])  # nor without a low point, which are after steps 16 and 48
def test_loop_equals_one_written_by_hand_to_the_bit(n, swa_start, options):
    arms, rows, saved, seen = tiny_arms(), [], [], []
    batches = tiny_batches(n)
    weights, outputs, losses = zip(*by_hand(batches, epochs=2, **options))
    torch.manual_seed(7)
    kept = pretrain_cass(
        *arms, batches, epochs=2, swa_start=swa_start, log=rows.append, **options,
        save=lambda parts, history: saved.append([states(parts[:2]), list(history)]),
        gauges=lambda steps: {"n": seen.append(steps) or len(steps)})
    assert kept[0] is arms[0] and kept[1] is arms[1] and equal(states(kept), weights[-1])
    means = [torch.stack(half).mean().item() for half in (losses[:n], losses[n:])]
    looked = min(n, 43)  # steps of 6 images: the last 256, as trained
    assert rows == [{"epoch": e, "loss": means[e - 1], "n": looked} for e in (1, 2)]
    assert equal(saved, [[weights[n - 1], means[:1]], [weights[-1], means]])
    assert equal(seen, [outputs[n - looked:n], outputs[2 * n - looked:]])
    assert not seen[0][0][0].requires_grad


@pytest.mark.parametrize("options, low_points", [
    ({"swa_start": 0}, (16, 48, 80)), ({"swa_start": 0.5}, (48, 80)), ({}, (80,))])
def test_average_is_the_mean_of_weights_at_low_points(options, low_points):
    batches, arms = tiny_batches(30), tiny_arms()
    steps = [weights for weights, _, _ in by_hand(batches, epochs=3)]
    torch.manual_seed(7)
    ours = states(pretrain_cass(*arms, batches, epochs=3, **options))
    for arm, average in enumerate(ours):
        for key in (key for key in average if not re.search("running|tracked", key)):
            mean = torch.stack([steps[step][arm][key] for step in low_points]).mean(0)
            torch.testing.assert_close(average[key], mean, atol=2e-6, rtol=0)
    cnn, norm = TinyNet(5), nn.BatchNorm2d(4, momentum=None)  # None: the mean over batches
    cnn.load_state_dict(ours[0])
    for images in batches:
        norm(cnn.body[0](images))
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(ours[0][f"body.1.{key}"], state(norm)[key])


def networks(out: Path) -> list[dict]:
    return [weights_in(out / f"{arm}.pt") for arm in ("cnn", "transformer")]


def by_functions(folder: Path, seed: int = 0, augment: str = "cass", **options) -> list[dict]:
    """What the command does, with the functions it is made of."""
    images = split_images(read_images(folder))
    rows = ImageRows(images, images.part("train"), augmentation(32, augment), seed)
    arms = [build_model(arm, "random", 32, seed=seed) for arm in ("test_resnet", "test_vit")]
    arms = [arm.to(pick_device("auto")) for arm in arms]
    torch.manual_seed(seed)
    loader = make_loader(rows, 4, seed=seed, drop_last=True)
    return states(pretrain_cass(*arms, loader, **{"epochs": 1} | options))


def test_what_a_run_leaves_and_prints(pets, tmp_path, opened, capsys):
    command("cass", pets, tmp_path, "--epochs 6")  # 18 steps, averaged once
    out, rows = capsys.readouterr().out, log_rows(tmp_path)
    split = [line.split(",") for line in (tmp_path / "split.csv").read_text().splitlines()[1:]]
    trained_on = {pets / line[0] for line in split if line[1] == "train"}
    assert set(opened) == trained_on and len(split) == 20 and len(trained_on) == 14
    assert {file.name for file in tmp_path.iterdir()} == {
        "config.json", "split.csv", "log.jsonl", "cnn.pt", "transformer.pt", "checkpoint.pt"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["finished"] and config["classes"] == ["cat", "dog"]
    assert config["options"]["data"] == str(pets) and config["options"]["seed"] == 0
    assert config["versions"]["timm"] == timm.__version__ and config["arms"]["cnn"] == "test_resnet"
    assert [row["epoch"] for row in rows] == list(range(7)) and rows[0]["loss"] is None
    gauges = {f"{arm}_{gauge}" for arm in ("cnn", "transformer")
              for gauge in ("cosine", "rank", "moved")}
    assert all(set(row) == {"epoch", "loss", "seconds"} | gauges for row in rows)
    assert rows[0]["cnn_moved"] == 0 < rows[1]["cnn_moved"]
    assert equal(networks(tmp_path), by_functions(pets, epochs=6))
    lines = re.findall(r"timm\.create_model\(.*\)", out)
    for line, saved, fixed in zip(lines, networks(tmp_path), (False, True), strict=True):
        assert equal(state(eval(line)), saved) and ("img_size=32" in line) == fixed
    assert "too short to average" not in out and "a GPU's work" not in out


@pytest.mark.parametrize("more, options", [
    ("--seed 1 --lr 0.01 --cnn-optimizer sgd --augment blur+solarize",
     {"seed": 1, "lr": 0.01, "cnn_optimizer": SGD, "augment": "blur+solarize"}),
    ("--loss contrast --precision bf16",
     {"loss": contrast_loss, "lr": 3e-4, "precision": torch.bfloat16}),
    ("--outputs sigmoid", {"loss": lambda r, t: cass_loss(r.sigmoid(), t.sigmoid())}),
    ("--outputs softmax", {"loss": lambda r, t: cass_loss(r.softmax(1), t.softmax(1))})])
def test_options_do_what_the_functions_do(more, options, pets, tmp_path, capsys):
    command("cass", pets, tmp_path, more)
    assert "too short to average weights" in capsys.readouterr().out
    assert equal(networks(tmp_path), by_functions(pets, **options))


@pytest.mark.parametrize("cnn, vit, kept", [(7, 7, 7), (7, 5, 1000), (0, 0, 1000)])
def test_arms_without_equally_many_outputs_get_new_heads(cnn, vit, kept, pets, tmp_path, capsys):
    for name, outputs in (("test_resnet", cnn), ("test_vit", vit)):
        model = build_model(name, "random", 32, outputs=outputs)
        torch.save(model.state_dict(), tmp_path / f"{name}.pt")
    command("cass", pets, tmp_path / "out", f"--init {tmp_path} --batch-size 14")
    assert [len(saved.popitem()[1]) for saved in networks(tmp_path / "out")] == [kept, kept]
    note = f"note: the arms have {cnn} and {vit} outputs: both get new heads of 1,000\n"
    assert capsys.readouterr().out.count(note) == (kept == 1000)


def test_two_arms_have_no_three_starts(pets, tmp_path, capsys):
    three = "--init random,random,random"
    said = sentence(capsys, lambda: command("cass", pets, tmp_path / "out", three))
    assert "more than two starts" in said and not (tmp_path / "out").exists()


def test_collapse_is_said_once(pets, tmp_path, capsys):
    model = timm.create_model("test_vit", img_size=32)
    nn.init.normal_(model.head.bias, std=1000)  # far above what differs between images
    torch.save(model.state_dict(), tmp_path / "test_vit.pt")
    command("cass", pets, tmp_path / "out", f"--init random,{tmp_path} --epochs 2")
    said = capsys.readouterr().out
    assert said.count("warning: transformer gives almost the same output for every image") == 1
    assert "--loss contrast" in said and "warning: cnn" not in said
    first = log_rows(tmp_path / "out")[0]["transformer_cosine"]
    assert f"before training cosine {first:.3f}" in " ".join(said.split())


def test_weights_that_do_not_move_end_the_command(pets, tmp_path, capsys):
    still = "--lr 1e-30 --batch-size 14"  # one step, at that rate
    said = sentence(capsys, lambda: command("cass", pets, tmp_path, still))
    assert "weights of cnn have not moved in epoch 1" in said and "--lr" in said
    assert not (tmp_path / "cnn.pt").exists()


def test_large_images_without_a_gpu_are_noted_before_training(pets, tmp_path, capsys):
    command("cass", pets, tmp_path, "--image-size 384 --batch-size 14 --device cpu")
    before, _, _ = capsys.readouterr().out.partition("cosine")  # the title of a column
    assert "a GPU's work" in before and "resnet18" in before
