"""finetune.py: losses and loop against oracles, runs and scores recomputed from what they leave behind, predictions."""

import contextlib
import copy
import csv
import io
import itertools
import json
import math
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import cass
import data
import finetune
import runtime
from data import ImageSet, Row, label_fraction, read_images, read_split, split_images, write_split
from finetune import class_weights, finetune_network, focal_loss, tuning_rate
from helpers import class_folders, labels_csv, put, sentence
from metrics import score

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--image-size", "32", "--init", "random", "--batch-size", "8", "--workers", "0", "--device", "cpu"]

# %% the loss and the class weights


def focal_by_loops(logits: Tensor, truth: Tensor, weights: list[float], alpha: float, gamma: float) -> float:
    """The formula of Lin et al., one number after the other, in float64."""
    terms = []
    for row, labels in zip(logits.tolist(), truth.tolist()):
        for x, label, weight in zip(row, labels, weights):
            p_true = 1 / (1 + math.exp(-x if label else x))
            terms.append(alpha * weight * (1 - p_true) ** gamma * -math.log(p_true))
    return math.fsum(terms) / len(terms)


def some_logits(n: int = 7, k: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    stream = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(n, k, generator=stream), (torch.rand(n, k, generator=stream) < 0.4).float()


@pytest.mark.parametrize("alpha, gamma", [(1, 2), (0.25, 2), (3, 1), (1, 0), (2, 5)])
def test_focal_loss_is_its_formula(alpha: float, gamma: float) -> None:
    for seed, weights in ((0, [1.0] * 4), (1, [0.2, 1.0, 0.7, 0.0])):
        logits, truth = some_logits(seed=seed)
        ours = focal_loss(logits, truth, torch.tensor(weights), alpha, gamma)
        assert ours.shape == () and ours.dtype == torch.float32
        assert ours.item() == pytest.approx(focal_by_loops(logits, truth, weights, alpha, gamma), rel=1e-5)


def test_focal_loss_is_torchvisions_with_its_gradient() -> None:
    logits, truth = some_logits(50, 6)
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    focal_loss(ours, truth).backward()
    loss = torchvision.ops.sigmoid_focal_loss(theirs, truth, alpha=-1, gamma=2, reduction="mean")
    loss.backward()
    assert focal_loss(logits, truth).item() == pytest.approx(loss.item(), rel=1e-6)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-7)


def test_gamma_0_is_binary_cross_entropy_and_alpha_a_plain_factor() -> None:
    logits, truth = some_logits()
    bce = nn.functional.binary_cross_entropy_with_logits(logits, truth)
    assert torch.equal(focal_loss(logits, truth, gamma=0), bce)
    assert focal_loss(logits, truth, alpha=2.5).item() == pytest.approx(2.5 * focal_loss(logits, truth).item())


def test_class_weights_multiply_their_column() -> None:
    logits, truth = some_logits()
    columns = torch.stack([focal_loss(logits[:, [k]], truth[:, [k]]) for k in range(4)])
    weights = torch.tensor([0.2, 1.0, 0.5, 3.0])
    assert torch.allclose(focal_loss(logits, truth, weights), (weights * columns).mean())


@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_focal_loss_far_out(dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    logits = torch.tensor([[100.0, -100.0, 100.0, -100.0, 0.0]], dtype=dtype, requires_grad=True)
    truth = torch.tensor([[1.0, 0.0, 0.0, 1.0, 1.0]])  # right, right, wrong, wrong, undecided
    with torch.autocast("cpu", autocast or torch.float16, enabled=autocast is not None):
        loss = focal_loss(logits, truth, torch.tensor([0.2, 1.0, 1.0, 1.0, 1.0]))
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx((200 + 0.25 * math.log(2)) / 5, rel=1e-6)
    assert logits.grad.dtype == dtype and torch.isfinite(logits.grad).all()
    assert logits.grad[0, :4].tolist() == pytest.approx([0, 0, 0.2, -0.2], abs=1e-3) and logits.grad[0, 4] < 0


def labels_of(*counts: int) -> np.ndarray:
    return np.repeat(np.eye(len(counts), dtype=np.float32), counts, axis=0)


def test_papers_class_weights_from_the_counts_of_isic() -> None:
    weights = class_weights(labels_of(12875, 4522, 3323, 2624, 867, 628, 253, 239), "paper")
    notebook = [1.0, 0.4717, 0.3952, 0.3535, 0.2405, 0.2242, 0.2013, 0.2]
    assert weights.dtype == np.float32 and np.abs(weights - notebook).max() < 0.003


def test_other_class_weights() -> None:
    truth = labels_of(6, 3, 0, 1)
    assert class_weights(truth, "paper").tolist() == pytest.approx([1, 0.6, 0.2, 0.2 + 0.8 / 6])
    assert class_weights(truth, "inverse").tolist() == pytest.approx([10 / 24, 10 / 12, 10 / 4, 10 / 4])
    assert class_weights(truth, "none").tolist() == [1] * 4
    for kind in ("paper", "inverse", "none"):
        assert class_weights(labels_of(5, 5, 5), kind).tolist() == [1] * 3
    several = np.array([[1, 1, 0], [1, 0, 0], [1, 0, 0]], np.float32)  # more than one label an image
    assert class_weights(several, "paper").tolist() == pytest.approx([1, 0.2 + 0.8 / 3, 0.2])
    assert class_weights(several, "inverse").tolist() == pytest.approx([1 / 3, 1, 1])


def test_rate_is_pytorchs_cosine_annealing() -> None:
    for t_max in (16, 100):
        optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], 3e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=t_max, eta_min=1e-6)
        for step in range(100):
            assert tuning_rate(step, 3e-4, t_max) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
            optimizer.step()
            schedule.step()


# %% label fractions

FRACTIONS = (0.01, 0.03, 0.1, 0.4, 1.0)


def image_set(labels: list[tuple[str, ...]], groups: list[str] | None = None) -> ImageSet:
    """A data set without files, enough for choosing labels."""
    rows = [Row(f"{i}.png", names, group) for i, (names, group) in
            enumerate(zip(labels, groups or [""] * len(labels), strict=True))]
    classes = sorted({name for names in labels for name in names})
    return ImageSet(Path("nowhere"), rows, classes, any(len(names) != 1 for names in labels))


def several_labels(n: int, seed: int = 0) -> list[tuple[str, ...]]:
    chosen = np.random.default_rng(seed).random((n, 4)) < (0.02, 0.1, 0.3, 0.7)
    return [tuple(np.array(list("abcd"))[row].tolist()) for row in chosen]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("labels", [[("a",)] * 500 + [("b",)] * 120 + [("c",)] * 30 + [("d",)] * 2,
                                    several_labels(600)], ids=["one label", "several"])
def test_smaller_shares_lie_inside_larger_ones_and_are_stratified(labels: list, seed: int) -> None:
    images = image_set(labels)
    whole = Counter(name for row in images.rows for name in row.labels or ("none",))
    before: set[str] = set()
    for fraction in FRACTIONS:
        rows = label_fraction(images, images.rows, fraction, seed)
        paths = [row.path for row in rows]
        assert rows == [row for row in images.rows if row.path in set(paths)]  # as they are, in order, none twice
        assert len(rows) == max(round(fraction * len(labels)), len(rows) if fraction == 0.01 else 0)
        assert before <= set(paths)
        before = set(paths)
        counts = Counter(name for row in rows for name in row.labels or ("none",))
        assert all(counts[name] >= 1 for name in whole)
        slack = 1.01 if not images.multi_label else 4
        assert all(abs(counts[name] - max(1, fraction * n)) <= slack for name, n in whole.items()), counts
    assert rows == images.rows


def test_each_class_comes_once_before_one_comes_twice() -> None:
    images = image_set([("a",)] * 96 + [("b",)] * 2 + [("c",)] * 2)
    assert {row.labels for row in label_fraction(images, images.rows, 0.01, 0)} == {("a",), ("b",), ("c",)}
    several = image_set([("a", "b")] * 50 + [("c",)] * 50 + [()] * 50)
    rows = label_fraction(several, several.rows, 0.001, 0)
    assert {name for row in rows for name in row.labels} == {"a", "b", "c"} and len(rows) <= 4


def test_which_labels_follows_the_seed_alone() -> None:
    images = image_set([("a",)] * 100 + [("b",)] * 100)
    first = label_fraction(images, images.rows, 0.1, 0)
    torch.manual_seed(1), np.random.seed(1)
    assert label_fraction(images, images.rows, 0.1, 0) == first != label_fraction(images, images.rows, 0.1, 1)
    assert first != images.rows[:10] + images.rows[100:110]


def test_a_class_without_images_and_a_single_image() -> None:
    images = image_set([("a",)] * 20 + [("b",)])
    assert len(label_fraction(images, images.rows[:20], 0.1, 0)) == 2
    assert label_fraction(images, images.rows[:1], 0.01, 0) == images.rows[:1]


def test_a_share_of_the_labels_leaves_the_split_of_groups_alone() -> None:
    images = split_images(image_set([("a",), ("b",)] * 60, [f"p{i // 6}" for i in range(120)]))
    before = list(images.rows)
    rows = label_fraction(images, images.part("train"), 0.1, 0)
    assert images.rows == before and {row.split for row in rows} == {"train"}
    assert not {row.group for row in rows} & {row.group for part in ("val", "test") for row in images.part(part)}


# %% the loop


class Tiny(nn.Module):
    """A CNN with batch norm and dropout for images of 8 x 8."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                                  nn.Dropout(0.2))
        self.head = nn.Linear(36, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))

    def get_classifier(self) -> nn.Module:
        return self.head


def batches(n: int = 5, size: int = 6, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    stream = torch.Generator().manual_seed(seed)
    return [(torch.rand(size, 3, 8, 8, generator=stream), torch.eye(3)[torch.randint(3, (size,), generator=stream)])
            for _ in range(n)]


def state(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor], gap: float = 0.0) -> bool:
    return a.keys() == b.keys() and all((a[k].double() - b[k].double()).abs().max() <= gap for k in a)


def tune_by_hand(epochs: int, weights: Tensor | None = None, clear: bool = True, lr: float = 3e-4) -> dict[str, Tensor]:
    """F.3.2 in plain PyTorch, with torchvision's focal loss."""
    network = Tiny()
    optimizer = torch.optim.Adam(network.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=16, eta_min=1e-6)
    torch.manual_seed(7)
    network.train()
    for images, truth in batches() * epochs:
        if clear:
            optimizer.zero_grad()
        loss = torchvision.ops.sigmoid_focal_loss(network(images), truth, alpha=-1, gamma=2, reduction="none")
        (loss if weights is None else loss * weights).mean().backward()
        optimizer.step()
        schedule.step()
    return state(network)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """`seen = script(3, 2, 1)` makes these the validation losses of the coming epochs; `seen` collects the weights."""
    def plan(*losses: float) -> list[dict[str, Tensor]]:
        coming, seen = iter(losses), []

        def scripted(network: nn.Module, *rest) -> tuple[float, None]:
            seen.append(state(network))
            return next(coming), None
        monkeypatch.setattr(finetune, "evaluate", scripted)
        return seen
    return plan


def stop_after(steps: int) -> Callable[[], bool]:
    """Asked after each step, says yes after so many."""
    asked = itertools.count(1)
    return lambda: next(asked) >= steps


def tuned(**options) -> tuple[dict, dict[str, Tensor]]:
    network = Tiny()
    torch.manual_seed(7)
    train, validation = options.pop("train", batches()), options.pop("validation", [])
    return finetune_network(network, train, validation, **options), state(network)


@pytest.mark.parametrize("weights", [None, torch.tensor([0.2, 1.0, 0.5])])
def test_steps_equal_a_loop_written_by_hand(script: Callable, weights: Tensor | None) -> None:
    script(4, 3, 2, 1)
    facts, after = tuned(epochs=4, weights=weights)
    assert facts["best_epoch"] == 4 and same(after, tune_by_hand(4, weights), 2e-6)


def test_gradients_are_cleared(script: Callable) -> None:
    script(2, 1)
    assert not same(tuned(epochs=2)[1], tune_by_hand(2, clear=False), 1e-4)


@pytest.mark.parametrize("losses, epochs, best", [
    ((5, 4, 3, 3.5, 3.2, 3.1, 3.0, 3.3), 8, 3),  # 3.0 again is not lower
    ((1, 2, 2, 2, 2, 2), 6, 1),
    ((9, 8, 8.5, 8.6, 8.4, 8.3, 7, 7, 7, 7, 7, 7), 12, 7),  # one epoch before patience ends, a better one
    ((5, 4, 3, 2, 1, 2, 2, 2, 2), 9, 5),  # the epochs end first
])
def test_early_stopping_restores_the_best_epoch(script: Callable, losses: tuple, epochs: int, best: int) -> None:
    seen, rows = script(*losses), []
    facts, after = tuned(epochs=9 if best == 5 else 50, log=rows.append)
    assert facts == {"epochs": epochs, "best_epoch": best, "validation_loss": losses[best - 1],
                     "rate": tuning_rate(5 * epochs - 1, 3e-4, 16)}
    assert same(after, seen[best - 1]) and len(seen) == epochs
    assert [(r["epoch"], r["validation_loss"]) for r in rows] == list(enumerate(losses, 1))
    assert [r["epoch"] for r in rows if r["best"]][-1] == best
    assert [r["rate"] for r in rows] == [tuning_rate(5 * e - 1, 3e-4, 16) for e in range(1, epochs + 1)]


def test_patience_can_be_shorter_and_the_network_is_left_in_evaluation_mode() -> None:
    network = Tiny()
    held_out = batches(2, seed=2)
    facts = finetune_network(network, batches(), held_out, epochs=3, patience=1)
    loss, p = finetune.evaluate(network, held_out)
    assert not network.training and facts["validation_loss"] == loss and p.shape == (12, 3)


def test_evaluate_is_the_mean_over_images_of_uneven_batches() -> None:
    network, (first, second) = Tiny(), batches(2)
    uneven = [first, (second[0][:1], second[1][:1])]
    images, truth = (torch.cat(x) for x in zip(*uneven))
    weights = torch.tensor([0.2, 1.0, 0.5])
    loss, p = finetune.evaluate(network.train(), uneven, weights)
    with torch.no_grad():
        logits = network.eval()(images)
    assert loss == pytest.approx(focal_loss(logits, truth, weights).item(), rel=1e-6)
    assert np.allclose(p, logits.sigmoid().numpy(), atol=1e-6) and p.shape == (7, 3)


def test_linear_moves_the_head_alone(script: Callable) -> None:
    script(3, 2, 1)
    modes, before = [], state(Tiny())
    network = Tiny()
    finetune_network(network, batches(), [], epochs=3, linear=True, stop=lambda: modes.append(network.training))
    after = state(network)
    assert {name for name in after if not torch.equal(after[name], before[name])} == {"head.weight", "head.bias"}
    assert modes and not any(modes)  # no dropout, no batch statistics


@pytest.mark.parametrize("name", ["body.0.weight", "body.1.running_mean", "body.1.num_batches_tracked"])
def test_linear_notices_what_moves_in_the_frozen_network(script: Callable, name: str) -> None:
    script(3, 2, 1)
    network = Tiny()

    def push() -> bool:
        network.state_dict()[name].add_(1)
        return False
    with pytest.raises(AssertionError, match=f"{name} was frozen but has moved"):
        finetune_network(network, batches(), [], epochs=3, linear=True, stop=push)


@pytest.mark.parametrize("arch", ["test_resnet", "test_vit", "deit_tiny_distilled_patch16_224"])
def test_linear_finds_the_classifier_of_timm_models(script: Callable, arch: str) -> None:
    script(1)
    size = {} if arch == "test_resnet" else {"img_size": 32}
    network = timm.create_model(arch, num_classes=3, **size)
    before = state(network)
    finetune_network(network, [(torch.rand(2, 3, 32, 32), torch.eye(3)[:2])], [], epochs=1, linear=True)
    moved = {name.split(".")[0] for name, value in state(network).items() if not torch.equal(value, before[name])}
    assert moved == {"test_resnet": {"fc"}, "test_vit": {"head"}}.get(arch, {"head", "head_dist"})


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_mixed_precision_trains(precision: torch.dtype) -> None:
    rows, network = [], Tiny()
    finetune_network(network, batches(), batches(2), epochs=8, lr=3e-3, precision=precision, log=rows.append)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all(value.isfinite().all() and value.dtype != precision for value in state(network).values())


@pytest.mark.parametrize("where", ["step 3", "validation"])
def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_kept(where: str) -> None:
    train, held_out, kept = batches(), batches(1), []
    (train[2] if where == "step 3" else held_out[0])[0][0] = math.inf
    with pytest.raises(FloatingPointError, match=f"epoch 1, {where}.*--lr"):
        finetune_network(Tiny(), train, held_out, save=lambda state, force=False: kept.append(state))
    assert not kept


def test_a_loss_that_is_not_finite_is_not_saved_on_stopping_either() -> None:
    train, kept = batches(), []
    train[2][0][0] = math.inf
    with pytest.raises(FloatingPointError, match="epoch 1, step 3"):
        finetune_network(Tiny(), train[:3], [], save=lambda state, force=False: kept.append(state), stop=stop_after(3))
    with pytest.raises(KeyboardInterrupt):
        finetune_network(Tiny(), train[:3], [], save=lambda state, force=False: kept.append(state), stop=stop_after(2))
    assert len(kept) == 1 and len(kept[0]["losses"]) == 2


def test_a_finished_checkpoint_gives_the_same_facts_and_weights() -> None:
    kept: list[dict] = []
    train, held_out = batches(), batches(2, seed=2)
    network = Tiny()
    facts = finetune_network(network, train, held_out, epochs=3, save=lambda state, force=False: kept.append(state))
    buffer = io.BytesIO()
    torch.save(kept[-1], buffer)
    buffer.seek(0)
    again = Tiny()
    assert finetune_network(again, train, held_out, epochs=3, resume=torch.load(buffer, weights_only=True)) == facts
    assert same(state(again), state(network)) and not again.training


class Told(list):
    """Batches of a loader that can be told the epoch and how many batches to leave out."""
    skip = 0

    def set_epoch(self, epoch: int, skip: int) -> None:
        self.skip = skip

    def __iter__(self) -> Iterator:
        return iter(list(super().__iter__())[self.skip:])


@pytest.mark.parametrize("step", [1, 5, 7])
def test_a_stopped_loop_goes_on_where_it_was_dropout_included(step: int) -> None:
    kept: list[dict] = []
    held_out, rows = batches(2, seed=2), ([], [])
    facts, straight = tuned(train=Told(batches()), epochs=3, validation=held_out, log=rows[0].append)
    with pytest.raises(KeyboardInterrupt):
        tuned(train=Told(batches()), epochs=3, validation=held_out, stop=stop_after(step), log=rows[1].append,
              save=lambda state, force=False: kept.append(copy.deepcopy(state)))
    torch.manual_seed(99)
    again = tuned(train=Told(batches()), epochs=3, validation=held_out, resume=kept[-1], log=rows[1].append)
    assert again[0] == facts and same(again[1], straight) and rows[0] == rows[1]


def test_finetunes_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in {f.stem for f in ROOT.glob("*.py")}:
        monkeypatch.setitem(sys.modules, name, None)  # importing a sibling would fail
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "/nowhere/kernel.json"])
    cell, rows = {"__name__": "__main__"}, []
    exec(compile((ROOT / "finetune.py").read_text(), "<cell>", "exec"), cell)
    network = timm.create_model("test_vit", img_size=32, num_classes=3)
    loader = [(torch.rand(4, 3, 32, 32), torch.eye(3)[[0, 1, 2, 0]]) for _ in range(2)]
    assert cell["finetune_network"](network, loader, loader, epochs=1, log=rows.append)["epochs"] == len(rows) == 1


# %% runs of the command


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders(tmp_path_factory.mktemp("set") / "insects", ant=20, bee=15, cat=10)


@pytest.fixture(scope="module")
def pretrained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of cass.py on a split that finetune.py would not draw by itself."""
    folder = tmp_path_factory.mktemp("runs") / "cass-insects"
    cass.main(["--data", str(images), "--out", str(folder), "--cnn", "test_resnet", "--transformer", "test_vit",
               "--epochs", "1", "--split-seed", "5", *TINY])
    return folder


def run(images: Path, out: Path, *more: str | Path) -> dict:
    """`finetune.py` with small settings; returns what result.json holds."""
    finetune.main([str(x) for x in ("--data", images, "--out", out, "--epochs", 2, *TINY, *more)])
    return result(out)


def result(out: Path) -> dict:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")
    return json.loads((out / "result.json").read_text(), parse_constant=refuse)


def scores(out: Path) -> list[dict]:
    return result(out)["seeds"]


def network_state(file: Path) -> dict[str, Tensor]:
    return torch.load(file, weights_only=True)["state_dict"]


def lines(file: Path) -> list[dict[str, str]]:
    with open(file, newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


@pytest.fixture(scope="module")
def both(images: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Both arms fine-tuned with three seeds on half the labels: the folder, and what was said."""
    out, said = tmp_path_factory.mktemp("tuned") / "both", io.StringIO()
    with contextlib.redirect_stdout(said):
        run(images, out, "--weights", pretrained, "--labels", "0.5", "--seeds", "3")
    return out, said.getvalue()


def f1_by_hand(truth: list[set[str]], predicted: list[set[str]], classes: list[str]) -> tuple[float, float]:
    """(macro, pooled) from the definition."""
    counts = np.array([[sum(c in t and c in p for t, p in zip(truth, predicted)),
                        sum((c in t) != (c in p) for t, p in zip(truth, predicted))] for c in classes])
    f1 = [2 * tp / (2 * tp + wrong) if tp + wrong else 0.0 for tp, wrong in [*counts.tolist(), counts.sum(0).tolist()]]
    return sum(f1[:-1]) / len(classes), f1[-1]


CLASSES, ARMS = ["ant", "bee", "cat"], ["cnn", "transformer", "ensemble"]


def test_files_of_a_run(both: tuple[Path, str], pretrained: Path) -> None:
    out, said = both
    assert {file.name for file in out.iterdir()} == {
        "checkpoint.pt", "checkpoint-prev.pt", "cnn.pt", "transformer.pt", "config.json", "log.jsonl", "split.csv",
        "predictions.csv", "result.json"}
    assert (out / "split.csv").read_text() == (pretrained / "split.csv").read_text()
    for arm in ("cnn", "transformer"):
        saved = torch.load(out / f"{arm}.pt", weights_only=True)
        assert saved["classes"] == CLASSES and saved["num_classes"] == 3 and saved["multi_label"] is False
    assert f"--predict FOLDER --weights {out}" in said


def test_result_holds_scores_options_versions_and_no_times(both: tuple[Path, str]) -> None:
    found = result(both[0])
    assert found["headline"] == "macro F1 at argmax" and [s["seed"] for s in found["seeds"]] == [0, 1, 2]
    about = found["run"]
    assert about["options"]["labels"] == 0.5 and about["options"]["lr"] == 3e-4 and about["options"]["seeds"] == 3
    assert {"torch", "timm", "numpy", "python"} <= set(about["versions"]) and "finished" not in about
    assert about["arms"] == {"cnn": "test_resnet", "transformer": "test_vit"} and about["classes"] == CLASSES
    for one in found["seeds"]:
        assert list(one["arms"]) == ARMS
        for name, arm in one["arms"].items():
            assert ({"images", "epochs", "best_epoch", "rate"} <= set(arm)) == (name != "ensemble")
            assert arm["interval"][0] <= arm["test"]["headline"] <= arm["interval"][1]
            assert arm.get("images", 16) == 16  # half of 32
            assert {"argmax", "threshold_0.5", "auroc", "confusion"} <= set(arm["test"])
    assert not [word for word in ("second", "minute", "time", "date") if word in json.dumps(found)]


def test_scores_are_those_of_the_predictions(both: tuple[Path, str]) -> None:
    out, _ = both
    table, found = lines(out / "predictions.csv"), result(out)
    test_part = {row["path"]: row["labels"] for row in lines(out / "split.csv") if row["split"] == "test"}
    headlines: dict[str, list[float]] = {name: [] for name in ARMS}
    for one in found["seeds"]:
        rows = [row for row in table if row["seed"] == str(one["seed"])]
        assert {row["image"]: row["truth"] for row in rows} == test_part and len(rows) == len(test_part) == 9
        for name in ARMS:
            truth = [{row["truth"]} for row in rows]
            p = np.array([[float(row[f"{name}: {c}"]) for c in CLASSES] for row in rows])
            picked = [{CLASSES[k]} for k in p.argmax(1)]
            above = [{c for c, x in zip(CLASSES, values) if x > 0.5} for values in p]
            test = one["arms"][name]["test"]
            headlines[name].append(f1_by_hand(truth, picked, CLASSES)[0])
            assert test["headline"] == test["argmax"]["f1_macro"] == pytest.approx(headlines[name][-1])
            assert test["threshold_0.5"]["f1_pooled"] == pytest.approx(f1_by_hand(truth, above, CLASSES)[1])
            assert test["argmax"]["accuracy"] == pytest.approx(sum(t == q for t, q in zip(truth, picked)) / 9)
            assert [row[f"{name}: class"] for row in rows] == [name for q in picked for name in q]
        assert [row["class"] for row in rows] == [row[f"{one['chosen']}: class"] for row in rows]
        assert all((row["arms disagree"] == "yes") == (row["cnn: class"] != row["transformer: class"]) for row in rows)
        for row, c in itertools.product(rows, CLASSES):
            mean = (float(row[f"cnn: {c}"]) + float(row[f"transformer: {c}"])) / 2
            assert float(row[f"ensemble: {c}"]) == pytest.approx(mean, abs=1.1e-6)
    for name, values in headlines.items():
        mean, spread, n = found["mean_sd_n"][name]["headline"]
        assert (mean, spread, n) == (pytest.approx(statistics.mean(values)), pytest.approx(statistics.stdev(values)), 3)


def test_validation_chooses_and_the_oracle_is_the_best_on_the_test_part(both: tuple[Path, str]) -> None:
    found = result(both[0])
    for which in ("chosen", "oracle"):
        values = [one["arms"][one[which]]["test"]["headline"] for one in found["seeds"]]
        assert found["mean_sd_n"][which]["headline"][0] == pytest.approx(statistics.mean(values))
    for one in found["seeds"]:
        validation = {name: arm["validation"] for name, arm in one["arms"].items()}
        test = {name: arm["test"]["headline"] for name, arm in one["arms"].items()}
        assert validation[one["chosen"]] == max(validation.values()) and test[one["oracle"]] == max(test.values())
    best = {one["seed"]: one["arms"][one["chosen"]]["validation"] for one in found["seeds"]}
    assert best[found["kept_seed"]] == max(best.values())


def pixels(images: Path, paths: list[str]) -> Tensor:
    transform = data.augmentation(32, "none")
    return torch.stack([transform(data.load_image(images / path)) for path in paths])


def test_kept_weights_give_the_predictions_by_the_line_that_is_printed(both: tuple[Path, str], images: Path) -> None:
    out, said = both
    found = result(out)
    rows = [row for row in lines(out / "predictions.csv") if row["seed"] == str(found["kept_seed"])]
    loading = [line.strip() for line in said.splitlines() if line.strip().startswith("timm.create_model")]
    assert len(loading) == 2
    for arm, line in zip(("cnn", "transformer"), loading):
        network = eval(line, {"timm": timm}).eval()
        with torch.no_grad():
            p = network(pixels(images, [row["image"] for row in rows])).sigmoid().numpy()
        assert np.abs(p - [[float(row[f"{arm}: {c}"]) for c in CLASSES] for row in rows]).max() < 1e-5
        held_out = [row for row in lines(out / "split.csv") if row["split"] == "val"]
        with torch.no_grad():
            picked = network(pixels(images, [row["path"] for row in held_out])).argmax(1).tolist()
        one = next(one for one in found["seeds"] if one["seed"] == found["kept_seed"])
        wanted = f1_by_hand([{row["labels"]} for row in held_out], [{CLASSES[k]} for k in picked], CLASSES)[0]
        assert one["arms"][arm]["validation"] == pytest.approx(wanted)


def test_table_fits_100_columns_and_shows_the_means(both: tuple[Path, str]) -> None:
    out, said = both
    means = result(out)["mean_sd_n"]
    begin = said.index("test scores on 9 images, 3 seeds; headline: macro F1 at argmax")
    table = said[begin:said.index("result.json, predictions.csv")].splitlines()
    for name in (*ARMS, "chosen", "oracle"):
        mean, spread, _ = means[name]["headline"]
        line = next(line for line in table if line.split()[:1] == [name])
        assert f"{mean:.3f} +-{spread:.3f}" in line
    assert max(map(len, [*table, *(line for line in said.splitlines() if line.startswith("seed"))])) <= 100
    assert any("epochs" in line and "last rate" in line and "95 % interval" in line for line in table)


@pytest.mark.parametrize("multi_label", [False, True])
def test_table_fits_with_long_names_and_undefined_scores(multi_label: bool) -> None:
    names = ["swin_base_patch4_window12_384", "vit_base_patch16_384_augreg_long", "ensemble"]
    truth, p = np.eye(3)[[0, 1, 2, 0]], np.random.default_rng(0).random((4, 3)) * [1, 0, 0]
    with pytest.warns(UserWarning, match="undefined"):
        test = score(truth * 0 if multi_label else truth, p, CLASSES, multi_label)  # zeros: no AUROC either
    arm = {"validation": 1.0, "interval": (0.0, 1.0), "test": test, "epochs": 50, "best_epoch": 45, "rate": 1e-6}
    seeds = [{"seed": seed, "chosen": names[1], "oracle": "ensemble", "arms": dict.fromkeys(names, arm)}
             for seed in (0, 1234)]
    for some in (seeds, seeds[:1]):
        table = "\n".join(finetune.score_table(some, finetune.average_seeds(some))).splitlines()
        assert max(map(len, table)) <= 100 and len(table) == 10 + 3 * len(some)
        assert all(name[:15] in "\n".join(table) for name in names)


def test_no_test_image_is_seen_before_the_end_and_then_once(
        images: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, train, looks = data.load_image, finetune.finetune_network, {"training": Counter(), "after": Counter()}
    phase, changes, augmentation = ["after"], [], data.augmentation
    monkeypatch.setattr(data, "augmentation", lambda size, name: (changes.append(name), augmentation(size, name))[1])

    def watched(path: Path):
        looks[phase[0]][Path(path).relative_to(images).as_posix()] += 1
        return load(path)

    def training(*args, **options):
        phase[0] = "training"
        facts = train(*args, **options)
        phase[0] = "after"
        return facts
    monkeypatch.setattr(data, "load_image", watched)
    monkeypatch.setattr(finetune, "finetune_network", training)
    run(images, tmp_path / "out", "--weights", pretrained, "--labels", "0.3", "--epochs", "1")
    part = {row["path"]: row["split"] for row in lines(pretrained / "split.csv")}
    assert {part[path] for path in looks["training"]} == {"train", "val"}
    assert sum(part[path] == "train" for path in looks["training"]) == 10  # 0.3 of 32, the same for both arms
    after = {path: n for path, n in looks["after"].items() if part[path] == "test"}
    assert set(after.values()) == {2} and len(after) == 9  # once for each arm
    assert changes == ["cass", "none", "none"] * 2  # training, validation and test of each arm


def test_one_file_on_its_runs_split(images: Path, pretrained: Path, tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    finetune.main([str(x) for x in ("--data", images, "--weights", pretrained / "cnn.pt", "--epochs", 1, *TINY)])
    out = tmp_path / "runs" / "finetune-cass-insects-cnn-1"
    assert list(scores(out)[0]["arms"]) == ["cnn"] and {f.name for f in out.glob("c*nn.pt")} == {"cnn.pt"}
    assert (out / "split.csv").read_text() == (pretrained / "split.csv").read_text()
    assert set(lines(out / "predictions.csv")[0]) == {
        "seed", "image", "truth", "class", "arms disagree", "cnn: class", *(f"cnn: {c}" for c in CLASSES)}


def test_weights_without_a_split_are_told(images: Path, pretrained: Path, tmp_path: Path,
                                          capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "cnn.pt").write_bytes((pretrained / "cnn.pt").read_bytes())
    run(images, tmp_path / "out", "--weights", tmp_path / "cnn.pt", "--epochs", "1")
    assert "split.csv is not there; make sure" in capsys.readouterr().out


def test_supervised_baseline(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                             capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    finetune.main([str(x) for x in ("--data", images, "--arch", "test_resnet", "--arch", "test_vit", "--labels", 0.1,
                                    "--epochs", 1, *TINY)])
    out = tmp_path / "runs" / "finetune-supervised-insects-0.1"
    arms = scores(out)[0]["arms"]
    assert list(arms) == ["test_resnet", "test_vit", "ensemble"] and arms["test_vit"]["images"] == 3
    start = runtime.build_model("test_vit", "random", 32, outputs=3, seed=0)
    after = network_state(out / "test_vit.pt")
    assert after.keys() == start.state_dict().keys() and not torch.equal(after["head.weight"], start.head.weight)
    assert (after["head.weight"] - start.head.weight).abs().max() < 1e-3  # one step from that seed's start
    split = {row["path"]: row["split"] for row in lines(out / "split.csv")}
    assert split == {row.path: row.split for row in split_images(read_images(images)).rows}


@pytest.mark.parametrize("share, images_used, steps", [("0.01", 3, 1), ("0.29", 9, 1), ("1", 32, 4)])
def test_steps_an_epoch_with_few_labels(images: Path, pretrained: Path, tmp_path: Path, share: str, images_used: int,
                                        steps: int) -> None:
    """One image a class in a batch larger than that; a last batch of one joins the one before; schedules follow."""
    for schedule, t_max in (("16", 16), ("run", 2 * steps)):
        arm = run(images, tmp_path / schedule, "--weights", pretrained / "cnn.pt", "--labels", share, "--schedule",
                  schedule)["seeds"][0]["arms"]["cnn"]
        rows = [json.loads(line) for line in (tmp_path / schedule / "log.jsonl").read_text().splitlines()]
        assert arm["images"] == images_used and arm["epochs"] == len(rows) == 2
        assert [row["rate"] for row in rows] == [tuning_rate(steps * e - 1, 3e-4, t_max) for e in (1, 2)]


def test_linear_by_the_command(images: Path, pretrained: Path, tmp_path: Path) -> None:
    run(images, tmp_path / "out", "--weights", pretrained, "--protocol", "linear", "--epochs", "1")
    for arm, head in (("cnn", "fc."), ("transformer", "head.")):
        before, after = network_state(pretrained / f"{arm}.pt"), network_state(tmp_path / "out" / f"{arm}.pt")
        assert before.keys() == after.keys()
        assert all(torch.equal(after[k], before[k]) for k in before if not k.startswith(head))
        assert after[f"{head}weight"].shape[0] == 3


def test_class_weights_come_from_the_labels_in_use(images: Path, pretrained: Path, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    used, train = [], finetune.finetune_network
    monkeypatch.setattr(finetune, "finetune_network", lambda *args, weights, **options: (
        used.append(weights.tolist()), train(*args, weights=weights, **options))[1])
    for share, kind in (("1", "paper"), ("0.01", "paper"), ("1", "inverse"), ("1", "none")):
        run(images, tmp_path / "out", "--weights", pretrained / "cnn.pt", "--labels", share, "--class-weights", kind,
            "--epochs", "1", "--overwrite")
    counts = Counter(row["labels"] for row in lines(pretrained / "split.csv") if row["split"] == "train")
    low, high = min(counts.values()), max(counts.values())
    assert used[0] == pytest.approx([0.2 + 0.8 * (counts[c] - low) / (high - low) for c in CLASSES])
    assert used[1] == used[3] == [1, 1, 1]  # one image a class
    assert used[2] == pytest.approx([32 / 3 / counts[c] for c in CLASSES])


def test_each_seed_has_its_own_labels_and_head(images: Path, pretrained: Path, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    choose, chosen, build, starts = data.label_fraction, [], finetune.new_network, []

    def built(*args) -> nn.Module:
        network = build(*args)
        starts.append(state(network))
        return network
    monkeypatch.setattr(finetune, "new_network", built)
    monkeypatch.setattr(data, "label_fraction", lambda *args: (chosen.append(choose(*args)), chosen[-1])[1])
    found = run(images, tmp_path / "out", "--weights", pretrained / "cnn.pt", "--labels", "0.1", "--seeds", "2",
                "--seed", "3", "--epochs", "1")
    assert [one["seed"] for one in found["seeds"]] == [3, 4] and chosen[0] != chosen[1]
    split = read_split(pretrained / "split.csv", read_images(images))
    assert chosen == [choose(split, split.part("train"), 0.1, seed) for seed in (3, 4)]
    differs = {name for name in starts[1] if not torch.equal(starts[1][name], starts[2][name])}
    assert {"fc.weight"} <= differs <= {"fc.weight", "fc.bias"} and len(starts) == 3  # the first is a rehearsal


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images with 0/1 columns: several labels an image, or none."""
    rng, names = np.random.default_rng(3), [f"{i}.png" for i in range(40)]
    lines = [f"{name},{int(rng.random() < 0.6)},{int(rng.random() < 0.4)},{int(i % 8 == 0)}"
             for i, name in enumerate(names)]
    text = "\n".join(["image,fibrous,cystic,rare", *lines])
    return labels_csv(tmp_path_factory.mktemp("several"), text, *names)


def test_several_labels_an_image(several: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    found = run(several, out, "--arch", "test_resnet", "--arch", "test_vit", "--labels", "0.5", "--lr", "0.01")
    classes = ["fibrous", "cystic", "rare"]
    assert found["headline"] == "pooled F1 at threshold 0.5" and found["run"]["multi_label"] is True
    rows = lines(out / "predictions.csv")
    assert any(row["truth"] == "" for row in rows) and any("|" in row["truth"] for row in rows)
    for name, arm in found["seeds"][0]["arms"].items():
        above = [{c for c in classes if float(row[f"{name}: {c}"]) > 0.5} for row in rows]
        assert [row[f"{name}: class"] for row in rows] == ["|".join(c for c in classes if c in some) for some in above]
        truth = [set(filter(None, row["truth"].split("|"))) for row in rows]
        assert arm["test"]["headline"] == pytest.approx(f1_by_hand(truth, above, classes)[1])
        assert "argmax" not in arm["test"]
    said = capsys.readouterr().out
    assert "headline: pooled F1 at threshold 0.5" in said
    assert max(map(len, said.split("test scores")[1].splitlines()[:11])) <= 100
    finetune.main(["--predict", str(several), "--weights", str(out), "--out", str(tmp_path / "new"), "--workers", "0"])
    predicted = {row["image"]: row for row in lines(tmp_path / "new" / "predictions.csv")}
    assert all(predicted[row["image"]]["class"] == row["class"] for row in rows) and len(predicted) == 40


def test_equal_seeds_give_equal_bits_with_any_number_of_workers(images: Path, pretrained: Path, tmp_path: Path) -> None:
    for name, workers in (("a", "0"), ("b", "0"), ("c", "1")):
        run(images, tmp_path / name, "--weights", pretrained, "--labels", "0.5", "--workers", workers, "--epochs", "1")
    run(images, tmp_path / "other", "--weights", pretrained, "--labels", "0.5", "--seed", "1", "--epochs", "1")
    for name in ("b", "c"):
        for file in ("predictions.csv", "log.jsonl", "split.csv"):
            assert (tmp_path / name / file).read_text() == (tmp_path / "a" / file).read_text()
        for arm in ("cnn", "transformer"):
            assert same(network_state(tmp_path / name / f"{arm}.pt"), network_state(tmp_path / "a" / f"{arm}.pt"))
        assert scores(tmp_path / name) == scores(tmp_path / "a")
    assert scores(tmp_path / "other") != scores(tmp_path / "a")


def test_cache_changes_nothing(images: Path, pretrained: Path, tmp_path: Path) -> None:
    for name, more in (("a", ()), ("b", ("--cache", tmp_path / "cache"))):
        run(images, tmp_path / name, "--weights", pretrained / "cnn.pt", "--epochs", "1", *more)
    assert (tmp_path / "a" / "predictions.csv").read_text() == (tmp_path / "b" / "predictions.csv").read_text()


# %% stopping and going on


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Ctrl-C arrive in that step of the whole run."""
    says = stop_after(step)
    monkeypatch.setattr(runtime.StopSignal, "__call__", lambda self: says())


@pytest.mark.parametrize("step", [2, 4, 11])  # in an epoch, after its last step, in the second arm
def test_stopped_and_resumed_is_as_never_stopped(images: Path, pretrained: Path, tmp_path: Path, step: int, whole: Path,
                                                 capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        stop_at(step, patch)
        run(images, out, "--weights", pretrained)
    assert stopped.value.code == 130 and "--resume" in capsys.readouterr().err
    assert not (out / "result.json").exists() and not (out / "predictions.csv").exists()
    assert "unfinished run" in sentence(capsys, lambda: run(images, out, "--weights", pretrained))
    assert scores(whole) == run(images, out, "--weights", pretrained, "--resume")["seeds"]
    for file in ("predictions.csv", "log.jsonl"):
        assert (out / file).read_text() == (whole / file).read_text()
    for arm in ("cnn", "transformer"):
        assert same(network_state(out / f"{arm}.pt"), network_state(whole / f"{arm}.pt"))


@pytest.fixture(scope="module")
def whole(images: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    run(images, out, "--weights", pretrained)  # 2 arms x 2 epochs x 4 steps
    return out


def test_killed_while_reporting_can_be_resumed(images: Path, pretrained: Path, tmp_path: Path, whole: Path,
                                               capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        def killed(*args, **facts) -> None:
            raise KeyboardInterrupt
        patch.setattr(runtime.Run, "finish", killed)
        run(images, out, "--weights", pretrained)
    assert run(images, out, "--weights", pretrained, "--resume")["seeds"] == scores(whole)
    assert sorted(file.stem for file in out.glob("*.pt")) == ["checkpoint", "checkpoint-prev", "cnn", "transformer"]
    capsys.readouterr()
    run(images, out, "--weights", pretrained, "--resume")
    assert capsys.readouterr().out == f"{out} is finished; there is nothing to resume\n"


def test_images_that_changed_since_are_refused_on_resuming(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, out = class_folders(tmp_path / "set", a=12, b=12), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        stop_at(1, patch)
        run(folder, out, "--arch", "test_resnet")
    put(folder, "a/new.png")
    assert "have changed since" in sentence(capsys, lambda: run(folder, out, "--arch", "test_resnet", "--resume"))


# %% predictions


@pytest.fixture(scope="module")
def new_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return put(tmp_path_factory.mktemp("new"), "z.png", "b.png", "deep/er/a.png", "deep/c.png", "10.png", "9.png",
               *(f"more/{i}.jpg" for i in range(14)))


def predict(folder: Path, weights: Path, out: Path, *more: str) -> list[dict[str, str]]:
    finetune.main(["--predict", str(folder), "--weights", str(weights), "--out", str(out), "--batch-size", "8",
                   "--workers", "0", *more])
    return lines(out / "predictions.csv")


def test_predictions_are_those_of_the_networks(both: tuple[Path, str], new_images: Path, tmp_path: Path,
                                               capsys: pytest.CaptureFixture) -> None:
    weights, chosen = both[0], result(both[0])["chosen"]
    rows = predict(new_images, weights, tmp_path)
    paths = sorted(str(file.relative_to(new_images)) for file in new_images.rglob("*.*g"))
    assert [row["image"] for row in rows] == paths and len(rows) == 20
    assert list(rows[0]) == ["image", "class", "arms disagree", *(f"{name}: class" for name in ARMS),
                             *(f"{name}: {c}" for name in ARMS for c in CLASSES)]
    p = {}
    for arm in ("cnn", "transformer"):
        network = runtime.load_network(weights / f"{arm}.pt", 32)
        loader = [(x, torch.zeros(len(x), 3)) for x in pixels(new_images, paths).split(8)]
        p[arm] = finetune.evaluate(network, loader)[1]
    p["ensemble"] = (p["cnn"] + p["transformer"]) / 2
    for name, values in p.items():
        assert np.abs(values - [[float(row[f"{name}: {c}"]) for c in CLASSES] for row in rows]).max() < 1e-6
        assert [row[f"{name}: class"] for row in rows] == [CLASSES[k] for k in values.argmax(1)]
    assert [row["class"] for row in rows] == [row[f"{chosen}: class"] for row in rows]
    disagree = p["cnn"].argmax(1) != p["transformer"].argmax(1)
    assert [row["arms disagree"] for row in rows] == ["yes" if x else "no" for x in disagree]
    said = capsys.readouterr().out
    assert f"20 images; the class is decided by {chosen}" in said and "wrote 20 predictions" in said


def test_one_network_of_a_run_predicts_alone(both: tuple[Path, str], new_images: Path, tmp_path: Path) -> None:
    rows = predict(new_images, both[0] / "cnn.pt", tmp_path)
    assert list(rows[0]) == ["image", "class", "arms disagree", "cnn: class", *(f"cnn: {c}" for c in CLASSES)]
    assert all(row["class"] == row["cnn: class"] and row["arms disagree"] == "no" for row in rows)


def test_predictions_are_written_as_the_images_come(both: tuple[Path, str], new_images: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    load, loaded = data.load_image, []
    monkeypatch.setattr(data, "load_image", lambda path: (loaded.append(path), load(path))[1])
    args = finetune.tune_options().parse_args(["--batch-size", "4", "--workers", "0"])
    images, saved = data.find_images(new_images), runtime.read_network(both[0] / "cnn.pt")
    networks = {"cnn": runtime.load_network(both[0] / "cnn.pt", 32)}
    ahead = []
    for done, _ in enumerate(finetune.predict_lines(args, networks, images, "cnn", saved)):
        ahead.append(len(loaded) - done)
    assert len(ahead) == 20 and max(ahead) <= 4


def test_csv_lines_are_not_collected(tmp_path: Path) -> None:
    file, sizes = tmp_path / "x.csv", []

    def many() -> Iterator[dict]:
        for i in range(5000):
            sizes.append((tmp_path / "x.csv.tmp").stat().st_size if i else 0)
            yield {"image": f"{i}.png", "class": "a,b"}
    finetune.write_lines(file, many())
    assert sizes[2500] > 10000 and len(lines(file)) == 5000 and lines(file)[7] == {"image": "7.png", "class": "a,b"}
    assert [f.name for f in tmp_path.iterdir()] == ["x.csv"]


def test_predictions_are_not_overwritten_unasked(both: tuple[Path, str], new_images: Path, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "predictions.csv").write_text("mine")
    said = sentence(capsys, lambda: predict(new_images, both[0], tmp_path))
    assert "is there already" in said and (tmp_path / "predictions.csv").read_text() == "mine"
    assert len(predict(new_images, both[0], tmp_path, "--overwrite")) == 20


def test_a_damaged_image_is_named_and_can_be_skipped(both: tuple[Path, str], tmp_path: Path,
                                                     capsys: pytest.CaptureFixture) -> None:
    folder, out = put(tmp_path / "new", *(f"{i}.png" for i in range(12))), tmp_path / "out"
    (folder / "5.png").write_bytes((folder / "5.png").read_bytes()[:300])
    said = sentence(capsys, lambda: predict(folder, both[0], out))
    assert "5.png can't be read" in said and "--skip-bad" in said and not list(out.iterdir())
    assert len(predict(folder, both[0], out, "--skip-bad")) == 11
    assert "note: left out 1 images that can't be read: 5.png" in capsys.readouterr().out


# %% wrong input


def tampered(source: Path, target: Path, **changes) -> Path:
    torch.save(torch.load(source, weights_only=True) | changes, target)
    return target


def text_file(folder: Path) -> Path:
    (folder / "notes.pt").write_text("these are no weights\n")
    return folder / "notes.pt"


# name: ((images, a CASS run, an empty folder) -> options, words of the sentence)
WRONG: dict[str, tuple[Callable, list[str]]] = {
    "weights of another architecture": (
        lambda i, c, f: ["--weights", tampered(c / "cnn.pt", f / "x.pt", arch="test_vit")],
        ["x.pt can't be loaded as test_vit"]),
    "weights of no architecture": (
        lambda i, c, f: ["--weights", tampered(c / "cnn.pt", f / "x.pt", arch="resnet_fifty")],
        ["knows no model 'resnet_fifty'"]),
    "weights without a layer": (
        lambda i, c, f: ["--weights", tampered(c / "cnn.pt", f / "x.pt", state_dict={
            k: v for k, v in network_state(c / "cnn.pt").items() if k != "conv1.0.weight"})],
        ["x.pt can't be loaded", "conv1.0.weight"]),
    "no such file": (lambda i, c, f: ["--weights", f / "gone.pt"], ["gone.pt is not there", "--weights"]),
    "a text file": (lambda i, c, f: ["--weights", text_file(f)], ["notes.pt is no network"]),
    "a plain state_dict": (
        lambda i, c, f: ["--weights", (torch.save({"w": torch.zeros(1)}, f / "w.pt"), f / "w.pt")[1]],
        ["w.pt is no network"]),
    "a folder without networks": (lambda i, c, f: ["--weights", f], ["holds no network", "finished run"]),
    "neither weights nor arch": (lambda i, c, f: [], ["--weights", "--arch"]),
    "both weights and arch": (lambda i, c, f: ["--weights", c, "--arch", "test_vit"],
                              ["--weights", "--arch", "not both"]),
    "arch twice": (lambda i, c, f: ["--arch", "resnet18.a1_in1k", "--arch", "resnet18.a2_in1k"], ["two --arch"]),
    "unknown arch": (lambda i, c, f: ["--arch", "test_resnett"], ["knows no model", "test_resnet"]),
    "another data set": (lambda i, c, f: ["--weights", c, "--data", class_folders(f / "set", a=9, b=9)],
                         ["split.csv", "belongs to another data set"]),
    "no labels": (lambda i, c, f: ["--arch", "test_vit", "--data", put(f / "set", *(f"{n}.png" for n in range(9)))],
                  ["has no labels"]),
    "one class": (lambda i, c, f: ["--arch", "test_vit", "--data", class_folders(f / "set", a=9)],
                  ["one class only, a"]),
    "no test part": (lambda i, c, f: ["--arch", "test_vit", "--ratios", "0.8,0.2,0"], ["the test part", "is empty"]),
    "no validation part": (lambda i, c, f: ["--arch", "test_vit", "--ratios", "0.8,0,0.2"],
                           ["the val part", "is empty"]),
    "no data": (lambda i, c, f: ["--arch", "test_vit", "--data", f / "gone"], ["gone is not a folder"]),
    "out is the weights' folder": (lambda i, c, f: ["--weights", c, "--out", c, "--overwrite"],
                                   ["choose another --out"]),
    "workers below 0": (lambda i, c, f: ["--weights", c, "--workers", "-1"], ["--workers -1"]),
    "size no patch fits": (lambda i, c, f: ["--weights", c, "--image-size", "37"], ["37", "patch"]),
    "out is a file": (lambda i, c, f: ["--weights", c, "--out", text_file(f)], ["notes.pt", "can't be written"]),
    **{f"--labels {x}": (lambda i, c, f, x=x: ["--weights", c, "--labels", x], ["--labels", x, "share"])
       for x in ("0", "1.5", "abc", "-0.1", "nan")},
    **{f"{name} {x}": (lambda i, c, f, name=name, x=x: ["--weights", c, name, x], [name, x])
       for name, x in (("--seeds", "0"), ("--patience", "0"), ("--epochs", "0"), ("--protocol", "half"))},
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_ends_with_one_sentence_and_leaves_nothing(
        case: str, images: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make, words = WRONG[case]
    (tmp_path / "made").mkdir()
    options = [str(x) for x in make(images, pretrained, tmp_path / "made")]

    def files() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns
                for folder in (tmp_path, images, pretrained) for file in folder.rglob("*")}
    before, common = files(), ["--data", str(images), "--out", str(tmp_path / "out"), *TINY]
    said = sentence(capsys, lambda: finetune.main([*common, *options]))
    assert all(word in said for word in words) and files() == before, said


# name: ((a CASS run, a fine-tuned one, an empty folder) -> weights, words of the sentence)
WRONG_PREDICTIONS: dict[str, tuple[Callable, list[str]]] = {
    "pretrained only": (lambda c, t, f: c, ["cnn.pt", "1000 outputs for 3 classes", "pretrained only"]),
    "pretrained without labels": (lambda c, t, f: tampered(c / "cnn.pt", f / "x.pt", classes=[]), ["pretrained only"]),
    "other classes": (
        lambda c, t, f: (tampered(t / "cnn.pt", f / "cnn.pt"),
                         tampered(t / "transformer.pt", f / "transformer.pt", classes=["x", "y", "z"]), f)[-1],
        ["different classes", "one file"]),
    "another number of classes": (lambda c, t, f: tampered(t / "cnn.pt", f / "x.pt", classes=["x", "y"]),
                                  ["3 outputs for 2 classes"]),
    "another architecture": (lambda c, t, f: tampered(t / "cnn.pt", f / "x.pt", arch="test_vit"), ["can't be loaded"]),
    "a run that did not finish": (
        lambda c, t, f: (tampered(t / "cnn.pt", f / "cnn-seed0.pt"),
                         (f / "config.json").write_text('{"finished": false}'), f)[-1],
        ["no finished run", "--resume"]),
    "no weights": (lambda c, t, f: None, ["--predict needs", "--weights"]),
}


@pytest.mark.parametrize("case", WRONG_PREDICTIONS)
def test_wrong_weights_for_predictions(case: str, both: tuple[Path, str], pretrained: Path, new_images: Path,
                                       tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make, words = WRONG_PREDICTIONS[case]
    (tmp_path / "made").mkdir()
    weights = make(pretrained, both[0], tmp_path / "made")
    options = [] if weights is None else ["--weights", str(weights)]
    common = ["--predict", str(new_images), "--out", str(tmp_path / "out")]
    said = sentence(capsys, lambda: finetune.main([*common, *options]))
    assert all(word in said for word in words) and not (tmp_path / "out").exists(), said


@pytest.mark.parametrize("name, words", [("gone", "is not a folder"), ("empty", "holds no images"),
                                         ("a.png", "is not a folder")])
def test_folders_that_cant_be_predicted(name: str, words: str, both: tuple[Path, str], tmp_path: Path,
                                        capsys: pytest.CaptureFixture) -> None:
    put(tmp_path, "a.png")
    (tmp_path / "empty").mkdir()
    said = sentence(capsys, lambda: predict(tmp_path / name, both[0], tmp_path / "out"))
    assert words in said and not (tmp_path / "out").exists()


def test_a_class_that_cant_be_learned_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = class_folders(tmp_path / "set", a=20, b=20, rare=1)
    split = split_images(read_images(folder))
    write_split(tmp_path / "split.csv", ImageSet(folder, [
        Row(r.path, r.labels, r.group, "test" if "rare" in r.labels else r.split) for r in split.rows], split.classes))
    run(folder, tmp_path / "out", "--arch", "test_resnet", "--epochs", "1", "--seeds", "2",
        "--split-file", tmp_path / "split.csv")
    said = capsys.readouterr().out
    assert said.count("no training image is labelled rare") == 1


def test_test_images_that_were_pretrained_on_are_refused(images: Path, pretrained: Path, tmp_path: Path,
                                                         capsys: pytest.CaptureFixture) -> None:
    write_split(tmp_path / "other.csv", split_images(read_images(images), seed=6))
    said = sentence(capsys, lambda: run(
        images, tmp_path / "out", "--weights", pretrained, "--split-file", tmp_path / "other.csv"))
    assert "test images that these weights were pretrained on" in said
    rows = [row for row in read_split(pretrained / "split.csv", read_images(images)).rows if row.path != "ant/0.png"]
    write_split(tmp_path / "fewer.csv", ImageSet(images, rows, CLASSES))
    run(images, tmp_path / "out", "--weights", pretrained / "cnn.pt", "--epochs", "1",
        "--split-file", tmp_path / "fewer.csv")
    assert len(lines(tmp_path / "out" / "split.csv")) == 44


def test_labels_may_come_after_pretraining(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(30)]
    folder, run_folder = put(tmp_path / "flat", *names), tmp_path / "cass"
    write_split(tmp_path / "split.csv", split_images(read_images(folder)))
    run_folder.mkdir()
    (tmp_path / "split.csv").rename(run_folder / "split.csv")
    network = runtime.build_model("test_resnet", "random", 32)
    saver = runtime.Run(tmp_path / "aside", {"overwrite": False, "resume": False})
    saver.begin(classes=[], multi_label=False)
    saver.save_network("cnn.pt", network, "test_resnet")
    (tmp_path / "aside" / "cnn.pt").rename(run_folder / "cnn.pt")
    labels_csv(folder, "image,label\n" + "".join(f"{n},{'ab'[i % 2]}\n" for i, n in enumerate(names)))
    found = run(folder, tmp_path / "out", "--weights", run_folder, "--epochs", "1")
    assert found["run"]["classes"] == ["a", "b"]


def test_a_run_in_a_folder_of_images_deletes_nothing(tmp_path: Path) -> None:
    folder = labels_csv(tmp_path, "image,label\n" + "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(30)),
                        *(f"{i}.png" for i in range(30)))
    for more in ((), ("--overwrite",)):
        run(folder, folder, "--arch", "test_resnet", "--epochs", "1", *more)
        assert (folder / "labels.csv").is_file()
