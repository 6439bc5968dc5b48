"""finetune.py: loss and loop against oracles, runs and scores recomputed from what they leave
behind, what of the images is seen, predictions."""

import csv
import itertools
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import finetune
import images as image_files
import runtime
from data import (ImageSet, Row, augmentation, label_fraction, load_image, read_images, read_split,
                  split_images, write_split)
from finetune import class_weights, evaluate, finetune_network, focal_loss, tuning_rate
from helpers import class_folders, labels_csv, put, sentence

# %% the loss, the class weights and the rate


def focal_by_loops(logits: Tensor, truth: Tensor, weights: list[float], alpha: float,
                   gamma: float) -> float:
    """The formula of Lin et al., one number after the other, in float64."""
    terms = []
    for row, labels in zip(logits.tolist(), truth.tolist()):
        for x, label, weight in zip(row, labels, weights):
            p_true = 1 / (1 + math.exp(-x if label else x))
            terms.append(alpha * weight * (1 - p_true) ** gamma * -math.log(p_true))
    return math.fsum(terms) / len(terms)


def some_logits(n: int = 7, k: int = 4) -> tuple[Tensor, Tensor]:
    stream = torch.Generator().manual_seed(0)
    return 3 * torch.randn(n, k, generator=stream), (torch.rand(n, k, generator=stream) < 0.4) * 1.0


@pytest.mark.parametrize("weights", [[1.0] * 4, [0.2, 1.0, 0.7, 0.0]])
@pytest.mark.parametrize("alpha, gamma", [(1, 2), (0.25, 2), (3, 1), (1, 0), (2, 5)])
def test_focal_loss_is_its_formula(alpha: float, gamma: float, weights: list[float]) -> None:
    logits, truth = some_logits()
    ours = focal_loss(logits, truth, torch.tensor(weights), alpha, gamma)
    assert ours.shape == () and ours.dtype == torch.float32
    assert ours.item() == pytest.approx(focal_by_loops(logits, truth, weights, alpha, gamma), 1e-5)


def test_focal_loss_is_torchvisions_with_its_gradient() -> None:
    logits, truth = some_logits(50, 6)
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    focal_loss(ours, truth).backward()
    loss = torchvision.ops.sigmoid_focal_loss(theirs, truth, alpha=-1, gamma=2, reduction="mean")
    loss.backward()
    assert focal_loss(logits, truth).item() == pytest.approx(loss.item(), rel=1e-6)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_focal_loss_far_out(dtype: torch.dtype) -> None:
    logits = torch.tensor([[100.0, -100.0, 100.0, -100.0, 0.0]], dtype=dtype, requires_grad=True)
    truth = torch.tensor([[1.0, 0.0, 0.0, 1.0, 1.0]])  # right, right, wrong, wrong, undecided
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        loss = focal_loss(logits, truth, torch.tensor([0.2, 1.0, 1.0, 1.0, 1.0]))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx((200 + 0.25 * math.log(2)) / 5, rel=1e-6)
    assert logits.grad[0, :4].tolist() == pytest.approx([0, 0, 0.2, -0.2], abs=1e-3)
    assert logits.grad[0, 4] < 0


def labels_of(*counts: int) -> np.ndarray:
    return np.repeat(np.eye(len(counts), dtype=np.float32), counts, axis=0)


def test_class_weights() -> None:
    isic = class_weights(labels_of(12875, 4522, 3323, 2624, 867, 628, 253, 239), "paper")
    notebook = [1.0, 0.4717, 0.3952, 0.3535, 0.2405, 0.2242, 0.2013, 0.2]
    assert isic.dtype == np.float32 and np.abs(isic - notebook).max() < 0.003
    truth = labels_of(6, 3, 0, 1)
    several = np.array([[1, 1, 0], [1, 0, 0], [1, 0, 0]], np.float32)  # labels an image
    for labels, kind, wanted in ((truth, "paper", [1, 0.6, 0.2, 0.2 + 0.8 / 6]),
                                 (truth, "inverse", [10 / 24, 10 / 12, 10 / 4, 10 / 4]),
                                 (truth, "none", [1] * 4), (labels_of(5, 5), "paper", [1, 1]),
                                 (several, "paper", [1, 0.2 + 0.8 / 3, 0.2]),
                                 (several, "inverse", [1 / 3, 1, 1])):
        assert class_weights(labels, kind).tolist() == pytest.approx(wanted), kind


@pytest.mark.parametrize("t_max", [16, 100])
def test_rate_is_pytorchs_cosine_annealing(t_max: int) -> None:
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], 3e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=t_max, eta_min=1e-6)
    for step in range(100):
        assert tuning_rate(step, 3e-4, t_max) == pytest.approx(schedule.get_last_lr()[0], 1e-6)
        optimizer.step()
        schedule.step()


# %% label fractions


def image_set(labels: list[tuple[str, ...]]) -> ImageSet:
    """A data set without files, enough for choosing labels."""
    rows = [Row(f"{i}.png", names, f"patient {i // 6}") for i, names in enumerate(labels)]
    classes = sorted({name for names in labels for name in names})
    return ImageSet(Path("nowhere"), rows, classes, any(len(names) != 1 for names in labels))


ONE_LABEL = [("a",)] * 500 + [("b",)] * 120 + [("c",)] * 30 + [("d",)] * 2
CHOSEN = np.random.default_rng(0).random((600, 4)) < (0.02, 0.1, 0.3, 0.7)
SEVERAL = [tuple(name for name, yes in zip("abcd", row) if yes) for row in CHOSEN]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("labels, slack", [(ONE_LABEL, 1.01), (SEVERAL, 4)])
def test_smaller_shares_lie_inside_larger_ones_and_are_stratified(labels, slack, seed) -> None:
    images, before = image_set(labels), set()
    whole = Counter(name for names in labels for name in names or ("none",))
    for fraction in (0.01, 0.03, 0.1, 0.4, 1.0):
        rows = label_fraction(images, images.rows, fraction, seed)
        paths = {row.path for row in rows}
        assert rows == [row for row in images.rows if row.path in paths] and before <= paths
        assert fraction == 0.01 or len(rows) == round(fraction * len(labels))
        before = paths
        counts = Counter(name for row in rows for name in row.labels or ("none",))
        for name, count in whole.items():  # at least one of each
            assert 1 <= counts[name] and abs(counts[name] - max(1, fraction * count)) <= slack
    assert rows == images.rows


def test_each_class_comes_once_before_one_comes_twice() -> None:
    images = image_set([("a",)] * 96 + [("b",)] * 2 + [("c",)] * 2)
    rows = label_fraction(images, images.rows, 0.01, 0)
    assert [row.labels for row in rows] == [("a",), ("b",), ("c",)]
    torch.manual_seed(1), np.random.seed(1)  # it follows its own seed alone
    assert label_fraction(images, images.rows, 0.01, 0) == rows
    assert label_fraction(images, images.rows, 0.01, 1) != rows
    assert len(label_fraction(images, images.rows[:20], 0.1, 0)) == 2  # a class without images


# %% the loop


class Tiny(nn.Module):
    """A CNN with batch norm and dropout for images of 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4),
                                  nn.ReLU(), nn.Flatten(), nn.Dropout(0.2))
        self.head = nn.Linear(36, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))

    def get_classifier(self) -> nn.Module:
        return self.head


def batches(n: int = 5, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    stream, found = torch.Generator().manual_seed(seed), []
    for _ in range(n):
        images = torch.rand(6, 3, 8, 8, generator=stream)
        found.append((images, torch.eye(3)[torch.randint(3, (6,), generator=stream)]))
    return found


def state(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def moved(a: dict[str, Tensor], b: dict[str, Tensor], gap: float = 0.0) -> set[str]:
    """The names of the tensors that differ by more than `gap`."""
    assert a.keys() == b.keys()
    return {name for name in a if (a[name].double() - b[name].double()).abs().max() > gap}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """`seen = script(3, 2, 1)` makes these the validation losses of the coming epochs; `seen`
    collects the weights that were evaluated."""
    def plan(*losses: float) -> list[dict[str, Tensor]]:
        coming, seen = iter(losses), []

        def scripted(network: nn.Module, *rest) -> tuple[float, None]:
            seen.append(state(network))
            return next(coming), None
        monkeypatch.setattr(finetune, "evaluate", scripted)
        return seen
    return plan


@pytest.mark.parametrize("weights", [None, torch.tensor([0.2, 1.0, 0.5])])
def test_training_equals_a_loop_written_by_hand(script: Callable, weights: Tensor | None) -> None:
    """F.3.2 in plain PyTorch, with torchvision's focal loss."""
    script(4, 3, 2, 1)
    ours, hand = Tiny(), Tiny()
    torch.manual_seed(7)
    assert finetune_network(ours, batches(), [], epochs=4, weights=weights)["best_epoch"] == 4
    optimizer = torch.optim.Adam(hand.parameters(), 3e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=16, eta_min=1e-6)
    torch.manual_seed(7)
    for images, truth in batches() * 4:
        optimizer.zero_grad()
        loss = torchvision.ops.sigmoid_focal_loss(hand(images), truth, alpha=-1, gamma=2)
        (loss if weights is None else loss * weights).mean().backward()
        optimizer.step()
        schedule.step()
    assert not moved(state(ours), state(hand), 2e-6) and moved(state(ours), state(Tiny()), 1e-3)


@pytest.mark.parametrize("losses, patience, best", [
    ((5, 4, 3, 3.5, 3.2, 3.1, 3.0, 3.3), 5, 3),  # 3.0 again is not lower
    ((1, 2, 2, 2, 2, 2), 5, 1), ((3, 2, 4), 1, 2),
    ((9, 8, 8.5, 8.6, 8.4, 8.3, 7, 7, 7, 7, 7, 7), 5, 7),  # a better one just before the end
    ((5, 4, 3, 2, 1, 2, 2, 2, 2), 8, 5)])  # the epochs end first
def test_early_stopping_restores_the_best_epoch(script, losses, patience, best) -> None:
    seen, rows, network, epochs = script(*losses), [], Tiny(), len(losses)
    facts = finetune_network(network, batches(), [], patience=patience, log=rows.append,
                             epochs=9 if patience == 8 else 50)
    rates = [tuning_rate(5 * epoch - 1, 3e-4, 16) for epoch in range(1, epochs + 1)]
    assert facts == {"epochs": epochs, "best_epoch": best, "rate": rates[-1],
                     "validation_loss": losses[best - 1]}
    assert not moved(state(network), seen[best - 1]) and not network.training
    assert [row["validation_loss"] for row in rows] == list(losses) and len(seen) == epochs
    assert [row["epoch"] for row in rows] == list(range(1, epochs + 1))
    assert [row["rate"] for row in rows] == rates


def test_evaluate_is_the_mean_over_images_of_uneven_batches() -> None:
    network, (first, (images, truth)) = Tiny().train(), batches(2)
    weights = torch.tensor([0.2, 1.0, 0.5])
    loss, p = evaluate(network, [first, (images[:1], truth[:1])], weights)
    logits = network.eval()(torch.cat([first[0], images[:1]])).detach()
    wanted = focal_loss(logits, torch.cat([first[1], truth[:1]]), weights).item()
    assert loss == pytest.approx(wanted, rel=1e-6)
    assert np.allclose(p, logits.sigmoid().numpy(), atol=1e-6) and p.shape == (7, 3)


@pytest.mark.parametrize("arch, heads", [
    ("test_resnet", {"fc"}), ("test_vit", {"head"}),
    ("deit_tiny_distilled_patch16_224", {"head", "head_dist"})])
def test_linear_moves_nothing_but_the_classifier(script: Callable, arch: str, heads: set) -> None:
    script(1)
    network = timm.create_model(arch, num_classes=3, **{} if "res" in arch else {"img_size": 32})
    before, batch = state(network), (torch.rand(2, 3, 32, 32), torch.eye(3)[:2])
    finetune_network(network, [batch], [], epochs=1, linear=True)  # nor batch-norm statistics
    assert {name.split(".")[0] for name in moved(state(network), before)} == heads


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_mixed_precision_trains(precision: torch.dtype) -> None:
    rows, network = [], Tiny()
    finetune_network(network, batches(), batches(2), epochs=8, lr=3e-3, precision=precision,
                     log=rows.append)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert {p.dtype for p in network.parameters()} == {torch.float32}


@pytest.mark.parametrize("where", [0, 1])
def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_kept(where: int) -> None:
    parts, kept = (batches(), batches(1)), []
    parts[where][-1][0][0] = math.inf
    with pytest.raises(FloatingPointError, match="nan.* in epoch 1.*--lr"):
        finetune_network(Tiny(), *parts, save=lambda parts, history: kept.append(history))
    assert not kept


# %% runs of the command

CLASSES, ARMS = ["ant", "bee", "cat"], ["cnn", "transformer", "ensemble"]
TINY = "--image-size 32 --init random --batch-size 8 --workers 0 --precision fp32".split()


def pretrain(folder: Path, images: ImageSet) -> Path:
    """What a run of cass.py leaves behind, without training."""
    run = runtime.Run(folder, {"resume": False, "epochs": 1})
    run.begin(classes=images.classes, multi_label=images.multi_label)
    write_split(folder / "split.csv", images)
    for name, arch in (("cnn", "test_resnet"), ("transformer", "test_vit")):
        network = runtime.build_model(arch, "random", 32, outputs=16, seed=9)
        run.save_network(f"{name}.pt", network, arch)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders(tmp_path_factory.mktemp("set") / "insects", ant=20, bee=15, cat=10)


@pytest.fixture(scope="module")
def pretrained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pretrained on a split that finetune.py would not draw by itself."""
    split = split_images(read_images(images), seed=5)
    return pretrain(tmp_path_factory.mktemp("runs") / "cass-insects", split)


def run(images: Path, out: Path, *more: object) -> dict:
    """`finetune.py` with small settings; returns what result.json holds, which has no nan."""
    options = ("--data", images, "--out", out, "--epochs", 2, *TINY, *more)
    finetune.main([str(option) for option in options])
    return json.loads((out / "result.json").read_text(), parse_constant=pytest.fail)


def table(file: Path) -> list[dict[str, str]]:
    with open(file, newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def weights_in(file: Path) -> dict[str, Tensor]:
    return torch.load(file, weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def both(images: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Both arms fine-tuned with two seeds on half the labels."""
    out = tmp_path_factory.mktemp("tuned") / "both"
    return {"out": out, "more": (more := ["--weights", pretrained, "--labels", 0.5, "--seeds", 2]),
            **run(images, out, *more)}


def f1_by_hand(truth: list[str], predicted: list[str], classes: list[str]) -> tuple[float, float]:
    """(macro, pooled) from the definition; several labels are joined by |."""
    counts = []
    for name in classes:
        have, said = ([name in x.split("|") for x in some] for some in (truth, predicted))
        counts.append((sum(a and b for a, b in zip(have, said)), sum(map(int.__ne__, have, said))))
    f1 = [2 * tp / (2 * tp + wrong) if tp + wrong else 0.0
          for tp, wrong in [*counts, np.sum(counts, 0)]]
    return statistics.mean(f1[:-1]), f1[-1]


def answers(row: dict[str, str], name: str, classes: list[str]) -> tuple[str, str]:
    """The likeliest class by the network `name`, and those above 0.5."""
    p = {label: float(row[f"{name}: {label}"]) for label in classes}
    return max(p, key=p.get), "|".join(label for label in classes if p[label] > 0.5)


def test_what_a_run_leaves_behind(both: dict, pretrained: Path) -> None:
    out = both["out"]
    assert {file.name for file in out.iterdir()} == {
        "cnn.pt", "transformer.pt", "config.json", "log.jsonl", "split.csv", "predictions.csv",
        "result.json"}
    assert (out / "split.csv").read_text() == (pretrained / "split.csv").read_text()
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    order = list(itertools.product((0, 1), ARMS[:2], (1, 2)))
    assert [(row["seed"], row["arm"], row["epoch"]) for row in rows] == order
    about = both["run"]
    assert about["options"]["labels"] == 0.5 and about["options"]["seeds"] == 2
    assert {"torch", "timm", "numpy", "python"} <= set(about["versions"])
    assert about["arms"] == {"cnn": "test_resnet", "transformer": "test_vit"}
    assert not any(word in json.dumps(both["seeds"]) for word in ("second", "time", "date"))


def test_scores_are_those_of_the_predictions(both: dict) -> None:
    out = both["out"]
    split = {row["path"]: row for row in table(out / "split.csv") if row["split"] == "test"}
    found: dict[str, list[float]] = {name: [] for name in (*ARMS, "chosen", "oracle")}
    for one in both["seeds"]:
        rows = [r for r in table(out / "predictions.csv") if r["seed"] == str(one["seed"])]
        assert {r["image"]: r["truth"] for r in rows} == {p: r["labels"] for p, r in split.items()}
        assert len(rows) == len(split) == 9
        truth = [row["truth"] for row in rows]
        for name in ARMS:
            picked, above = zip(*(answers(row, name, CLASSES) for row in rows))
            test, (low, high) = one["arms"][name]["test"], one["arms"][name]["interval"]
            found[name].append(f1_by_hand(truth, picked, CLASSES)[0])
            assert test["headline"] == test["argmax"]["f1_macro"] == pytest.approx(found[name][-1])
            pooled = test["threshold_0.5"]["f1_pooled"]
            assert pooled == pytest.approx(f1_by_hand(truth, above, CLASSES)[1])
            assert low <= test["headline"] <= high and low < high
            assert [row[f"{name}: class"] for row in rows] == list(picked)
        for row in rows:
            assert row["class"] == row[f"{one['chosen']}: class"]
            differ = len({row[f"{name}: class"] for name in ARMS}) > 1
            assert row["arms disagree"] == ("yes" if differ else "no")
            for c in CLASSES:
                mean = (float(row[f"cnn: {c}"]) + float(row[f"transformer: {c}"])) / 2
                assert float(row[f"ensemble: {c}"]) == pytest.approx(mean, abs=1.1e-6)
        validation = {name: arm["validation"] for name, arm in one["arms"].items()}
        test = {name: arm["test"]["headline"] for name, arm in one["arms"].items()}
        assert validation[one["chosen"]] == max(validation.values())
        assert test[one["oracle"]] == max(test.values())
        found["chosen"].append(test[one["chosen"]])
        found["oracle"].append(test[one["oracle"]])
    for name, values in found.items():
        wanted = statistics.mean(values), statistics.stdev(values), 2
        assert both["mean_sd_n"][name]["macro F1"] == pytest.approx(wanted)


def test_guess_is_the_score_of_a_constant_answer(both: dict) -> None:
    """A third of each class is tested; ants are most among the labels, and none is above half."""
    truth = [row["labels"] for row in table(both["out"] / "split.csv") if row["split"] == "test"]
    wanted = f1_by_hand(truth, ["ant"] * len(truth), CLASSES)[0]
    assert both["guess"]["headline"] == pytest.approx(wanted)
    assert both["guess"]["auroc"]["macro"] == 0.5
    assert both["guess"]["threshold_0.5"]["f1_pooled"] == 0


def test_a_finished_run_keeps_the_weights_of_the_best_seed_and_shows_its_scores(
        both: dict, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Once more, with workers and a cache, for what it prints: equal bits."""
    again = run(images, tmp_path / "out", *both["more"], "--workers", 1, "--cache", tmp_path / "c")
    assert again["seeds"] == both["seeds"]
    for name in ("predictions.csv", "split.csv"):
        assert (tmp_path / "out" / name).read_text() == (both["out"] / name).read_text()
    best = {one["seed"]: one["arms"][one["chosen"]]["validation"] for one in both["seeds"]}
    kept = both["kept_seed"]
    assert best[kept] == max(best.values())
    said = capsys.readouterr().out.splitlines()
    loading = [line for line in said if line.strip().startswith("timm.create_model")]
    rows = [r for r in table(both["out"] / "predictions.csv") if r["seed"] == str(kept)]
    transform = augmentation(32, "none")
    pixels = torch.stack([transform(load_image(images / row["image"])) for row in rows])
    for arm, line in zip(ARMS[:2], loading, strict=True):
        network = eval(line.strip(), {"timm": timm}).eval()
        p = network(pixels).sigmoid().detach().numpy()
        wanted = [[float(row[f"{arm}: {c}"]) for c in CLASSES] for row in rows]
        assert np.abs(p - wanted).max() < 1e-5
        assert not moved(weights_in(both["out"] / f"{arm}.pt"), state(network))
    scores = [line for line in said if line.split(" ")[0] in (*ARMS, "chosen", "oracle")]
    for line in scores:
        mean, spread, _ = both["mean_sd_n"][line.split()[0]]["macro F1"]
        assert f"{mean:.3f} +-{spread:.3f}" in line and len(line) <= 100
    assert len(scores) == 5 and f"{both['guess']['headline']:.3f}" in "".join(
        line for line in said if line.startswith("always the same answer"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What `finetune_network` is called with, and the images it is given; it trains nothing. The
    last entry holds what was opened since."""
    found, load = [{"opened": []}], image_files.load_image

    def opening(file: Path, *rest) -> object:
        found[-1]["opened"].append(f"{file.parent.name}/{file.name}")
        return load(file, *rest)

    def tune(network: nn.Module, train: object, validation: object, **options) -> dict:
        here = found[-1] | options | {"start": state(network), "steps": len(train)}
        for part, loader in (("train", train), ("val", validation)):
            found[-1]["opened"] = here[part] = []
            assert sum(len(truth) for _, truth in loader) == len(here[part])
        found[-1] = here
        found.append({"opened": []})
        return {"epochs": 1, "best_epoch": 1, "rate": 0.0, "validation_loss": 1.0}
    monkeypatch.setattr(image_files, "load_image", opening)
    monkeypatch.setattr(finetune, "finetune_network", tune)
    return found


def part(split: ImageSet, name: str) -> list[str]:
    return sorted(row.path for row in split.part(name))
