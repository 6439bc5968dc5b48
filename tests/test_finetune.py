"""finetune.py: loss and loop against oracles, runs and scores recomputed from what they leave
behind, what of the images is seen, predictions."""

import contextlib
import csv
import io
import itertools
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from helpers import (SMALL, TinyNet, class_folders, command, equal, half_cosine, labels_csv,
                     log_rows, make_run, put, sentence, state, weights_in)
from torch import Tensor, nn

import finetune
import runtime
from data import (ImageSet, Row, augmentation, label_fraction, load_image, read_images, read_split,
                  split_images, write_split)
from finetune import class_weights, evaluate, finetune_network, focal_loss
from metrics import bootstrap_interval, score

# %% the loss and the class weights


def focal_by_loops(logits: Tensor, truth: Tensor, weights: list[float], alpha: float,
                   gamma: float) -> float:
    """The formula of Lin et al., one number after the other, in float64."""
    terms = []
    for row, labels in zip(logits.tolist(), truth.tolist()):
        for x, label, weight in zip(row, labels, weights):
            p_true = 1 / (1 + math.exp(-x if label else x))
            terms.append(alpha * weight * (1 - p_true) ** gamma * -math.log(p_true))
    return math.fsum(terms) / len(terms)


@pytest.mark.parametrize("weights", [None, [0.2, 1.0, 0.7, 0.0]])
@pytest.mark.parametrize("options", [(), (0.25, 2), (3, 1), (2, 5)])
def test_focal_loss_is_its_formula(options, weights):
    stream = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(7, 4, generator=stream)
    truth = (torch.rand(7, 4, generator=stream) < 0.4) * 1.0
    ours = focal_loss(logits, truth, weights and torch.tensor(weights), *options)
    wanted = focal_by_loops(logits, truth, weights or [1.0] * 4, *(options or (1, 2)))
    assert ours.shape == () and ours.item() == pytest.approx(wanted, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_focal_loss_far_out(dtype):
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


TRUTH = labels_of(6, 3, 0, 1)
SEVERAL = np.array([[1, 1, 0], [1, 0, 0], [1, 0, 0]], np.float32)  # labels an image


@pytest.mark.parametrize("labels, kind, wanted", [
    (TRUTH, "paper", [1, 0.6, 0.2, 0.2 + 0.8 / 6]), (TRUTH, "none", [1] * 4),
    (TRUTH, "inverse", [10 / 24, 10 / 12, 10 / 4, 10 / 4]), (labels_of(5, 5), "paper", [1, 1]),
    (SEVERAL, "paper", [1, 0.2 + 0.8 / 3, 0.2]), (SEVERAL, "inverse", [1 / 3, 1, 1])])
def test_class_weights(labels, kind, wanted):
    found = class_weights(labels, kind)
    assert found.dtype == np.float32 and found.tolist() == pytest.approx(wanted)


def test_class_weights_of_isic_are_those_of_the_notebook():
    found = class_weights(labels_of(12875, 4522, 3323, 2624, 867, 628, 253, 239), "paper")
    notebook = [1.0, 0.4717, 0.3952, 0.3535, 0.2405, 0.2242, 0.2013, 0.2]
    assert np.abs(found - notebook).max() < 0.003


# %% label fractions


def image_set(labels: list[tuple[str, ...]]) -> ImageSet:
    """A data set without files, enough for choosing labels."""
    rows = [Row(f"{i}.png", names, f"patient {i // 6}") for i, names in enumerate(labels)]
    classes = sorted({name for names in labels for name in names})
    return ImageSet(Path("nowhere"), rows, classes, any(len(names) != 1 for names in labels))


ONE_LABEL = [("a",)] * 500 + [("b",)] * 120 + [("c",)] * 30 + [("d",)] * 2
DRAWN = np.random.default_rng(0).random((600, 4)) < (0.02, 0.1, 0.3, 0.7)
MANY_LABELS = [tuple(name for name, yes in zip("abcd", row) if yes) for row in DRAWN]


@pytest.mark.parametrize("labels, slack, seed", [(ONE_LABEL, 1.01, 0), (MANY_LABELS, 4, 1)])
def test_smaller_shares_lie_inside_larger_ones_and_are_stratified(labels, slack, seed):
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


def test_each_class_comes_once_before_one_comes_twice():
    images = image_set([("a",)] * 96 + [("b",)] * 2 + [("c",)] * 2)
    rows = label_fraction(images, images.rows, 0.01, 0)
    assert [row.labels for row in rows] == [("a",), ("b",), ("c",)]
    assert label_fraction(images, images.rows, 0.01, 1) != rows
    assert len(label_fraction(images, images.rows[:20], 0.1, 0)) == 2  # a class without images


# %% the loop


def batches(n: int = 5) -> list[tuple[Tensor, Tensor]]:
    stream = torch.Generator().manual_seed(1)
    images = torch.rand(n, 6, 3, 8, 8, generator=stream)
    truth = torch.eye(3)[torch.randint(3, (n, 6), generator=stream)]
    return list(zip(images, truth))


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


@pytest.mark.parametrize("options", [
    {}, {"lr": 0.001, "t_max": 7, "weights": torch.tensor([0.2, 1.0, 0.5])}])
def test_training_equals_a_loop_written_by_hand(script, options):
    """F.3.2 in plain PyTorch, with torchvision's focal loss."""
    script(4, 3, 2, 1)
    ours, hand = TinyNet(), TinyNet()
    torch.manual_seed(7)
    finetune_network(ours, batches(), [], epochs=4, **options)
    optimizer = torch.optim.Adam(hand.parameters(), options.get("lr", 3e-4))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, T_max=options.get("t_max", 16), eta_min=1e-6)
    torch.manual_seed(7)
    for images, truth in batches() * 4:
        optimizer.zero_grad()
        loss = torchvision.ops.sigmoid_focal_loss(hand(images), truth, alpha=-1, gamma=2)
        (loss * options.get("weights", 1)).mean().backward()
        optimizer.step()
        schedule.step()
    assert not moved(state(ours), state(hand), 2e-6) and moved(state(ours), state(TinyNet()), 1e-3)


@pytest.mark.parametrize("losses, patience, best", [
    ((5, 4, 3, 3.5, 3.2, 3.1, 3.0, 3.3), 5, 3), ((3, 2, 4), 1, 2),  # 3.0 again is not lower
    ((9, 8, 8.5, 8.6, 8.4, 8.3, 7, 7, 7, 7, 7, 7), 5, 7),  # a better one just before the end
    ((5, 4, 3, 2, 1, 2, 2, 2, 2), 8, 5)])  # the epochs end first
def test_early_stopping_restores_the_best_epoch(script, losses, patience, best):
    seen, rows, network, epochs = script(*losses), [], TinyNet(), len(losses)
    facts = finetune_network(network, batches(), [], patience=patience, log=rows.append,
                             epochs=9 if patience == 8 else 50)
    rates = [half_cosine(5 * epoch - 1, 16, 3e-4) for epoch in range(1, epochs + 1)]
    assert facts == {"epochs": epochs, "best_epoch": best, "rate": rates[-1],
                     "validation_loss": losses[best - 1]}
    assert equal(state(network), seen[best - 1]) and not network.training
    assert [row["validation_loss"] for row in rows] == list(losses) and len(seen) == epochs
    assert [(row["epoch"], row["learning_rate"]) for row in rows] == list(enumerate(rates, 1))


def test_a_validation_loss_that_is_not_finite_ends_training_before_it_is_kept(script):
    script(4, math.nan)
    rows, saved = [], []
    with pytest.raises(FloatingPointError, match="nan on validation, in epoch 2.*--lr"):
        finetune_network(TinyNet(), batches(), [], log=rows.append,
                         save=lambda parts, history: saved.append(history))
    assert len(rows) == len(saved) == 1


def test_evaluate_is_the_mean_over_images_of_uneven_batches():
    network, (first, (images, truth)) = TinyNet().train(), batches(2)
    weights = torch.tensor([0.2, 1.0, 0.5])
    loss, p = evaluate(network, [first, (images[:1], truth[:1])], weights)
    logits = network.eval()(torch.cat([first[0], images[:1]])).detach()
    wanted = focal_loss(logits, torch.cat([first[1], truth[:1]]), weights).item()
    assert loss == pytest.approx(wanted, rel=1e-6)
    assert np.allclose(p, logits.sigmoid().numpy(), atol=1e-6) and p.shape == (7, 3)


@pytest.mark.parametrize("arch, heads", [
    ("test_resnet", {"fc"}), ("deit_tiny_distilled_patch16_224", {"head", "head_dist"})])
def test_linear_moves_nothing_but_the_classifier(script, arch, heads):
    script(1)
    network = timm.create_model(arch, num_classes=3, **{} if "res" in arch else {"img_size": 32})
    before, batch = state(network), (torch.rand(2, 3, 32, 32), torch.eye(3)[:2])
    finetune_network(network, [batch], [], epochs=1, linear=True)  # nor batch-norm statistics
    assert {name.split(".")[0] for name in moved(state(network), before)} == heads


# %% runs of the command

CLASSES, ARMS = ["ant", "bee", "cat"], ["cnn", "transformer", "ensemble"]
HALF = "--labels 0.5 --seeds 2"


def run(images: Path, out: Path, *more: object) -> dict:
    """`finetune.py` with small settings; returns what result.json holds, which has no nan."""
    command("finetune", images, out, "--epochs 2 --batch-size 8", *more)
    return json.loads((out / "result.json").read_text(), parse_constant=pytest.fail)


def table(file: Path) -> list[dict[str, str]]:
    with open(file, newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def truth_in(rows: list[dict[str, str]], classes: list[str] = CLASSES) -> np.ndarray:
    """Multi-hot labels `(N, K)` of a predictions.csv."""
    return np.array([[float(c in row["truth"].split("|")) for c in classes] for row in rows])


def numbers_in(rows: list[dict[str, str]], name: str, classes: list[str] = CLASSES) -> np.ndarray:
    """The probabilities `(N, K)` by the network `name` in a predictions.csv."""
    return np.array([[float(row[f"{name}: {c}"]) for c in classes] for row in rows])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders(tmp_path_factory.mktemp("set") / "insects", ant=10, bee=15, cat=20)


@pytest.fixture(scope="module")
def pretrained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pretrained on a split that finetune.py would not draw by itself."""
    return make_run(tmp_path_factory.mktemp("runs") / "cass-insects", images)


@pytest.fixture(scope="module")
def both(images: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Both arms fine-tuned with two seeds on half the labels, and what that printed."""
    out = tmp_path_factory.mktemp("tuned") / "both"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        found = run(images, out, HALF, "--weights", pretrained)
    return found | {"out": out, "said": said.getvalue().splitlines()}


def test_what_a_run_leaves_behind(both, pretrained):
    out = both["out"]
    assert {file.name for file in out.iterdir()} == {
        "cnn.pt", "transformer.pt", "config.json", "log.jsonl", "split.csv", "predictions.csv",
        "result.json"}
    assert (out / "split.csv").read_text() == (pretrained / "split.csv").read_text()
    order = list(itertools.product((0, 1), ARMS[:2], (1, 2)))
    assert [(row["seed"], row["arm"], row["epoch"]) for row in log_rows(out)] == order
    assert both["run"]["arms"] == {"cnn": "test_resnet", "transformer": "test_vit"}
    assert not any(word in json.dumps(both["seeds"]) for word in ("second", "time", "date"))


def test_scores_are_those_of_the_predictions(both):
    split = table(both["out"] / "split.csv")
    tested = [(row["path"], row["labels"]) for row in split if row["split"] == "test"]
    for one in both["seeds"]:
        rows = [r for r in table(both["out"] / "predictions.csv") if r["seed"] == str(one["seed"])]
        assert [(r["image"], r["truth"]) for r in rows] == tested
        truth, p = truth_in(rows), {name: numbers_in(rows, name) for name in ARMS}
        for name in ARMS:
            found, wanted = one["arms"][name], score(truth, p[name], CLASSES, False)
            for key in wanted.keys() - {"auroc"}:  # which six digits may not tell
                assert found["test"][key] == wanted[key]
            assert found["interval"] == list(bootstrap_interval(truth, p[name], False))
            answers = [CLASSES[k] for k in p[name].argmax(1)]
            assert [row[f"{name}: class"] for row in rows] == answers
        assert np.allclose(p["ensemble"], (p["cnn"] + p["transformer"]) / 2, atol=1.1e-6)
        for row in rows:
            assert row["class"] == row[f"{one['chosen']}: class"]
            differ = len({row[f"{name}: class"] for name in ARMS}) > 1
            assert row["arms disagree"] == ("yes" if differ else "no")


@pytest.mark.parametrize("name", [*ARMS, "chosen"])
def test_means_and_spreads_over_seeds_are_shown(both, name):
    values = [one["arms"][one.get(name, name)]["test"]["headline"] for one in both["seeds"]]
    mean, spread = np.mean(values), np.std(values, ddof=1)
    assert both["mean_sd_n"][name]["macro F1"] == pytest.approx((mean, spread, 2))
    [line] = [line for line in both["said"] if line.startswith(name + " ")]
    assert f"{mean:.3f} +-{spread:.3f}" in line and len(line) <= 100


def test_the_same_answer_for_every_image_is_scored_too(both):
    truth = truth_in(table(both["out"] / "predictions.csv")[:9])
    cats = score(truth, np.tile([0.2, 0.3, 0.4], (9, 1)), CLASSES, False)
    assert both["guess"] == cats and cats["auroc"]["macro"] == 0.5  # most labels are cats
    assert cats["headline"] == pytest.approx(2 * 4 / (9 + 4) / 3)  # 4 of the 9 are
    [line] = [line for line in both["said"] if line.startswith("always the same answer")]
    assert f"{cats['headline']:.3f}" in line


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, opened: list[Path]) -> list[dict]:
    """What `finetune_network` is called with, and the images it is given; it trains nothing. What
    is read after a call stands in `opened`."""
    found = []

    def tune(network: nn.Module, train: object, validation: object, **options) -> dict:
        here = options | {"start": state(network), "steps": len(train)}
        for part, loader in (("train", train), ("val", validation)):
            opened.clear()
            assert ("Flip" in str(loader.dataset.transform)) == (part == "train")  # augmented
            assert sum(len(truth) for _, truth in loader) == len(opened)
            here[part] = names_of(opened)
        opened.clear()
        found.append(here)
        return {"epochs": 1, "best_epoch": 1, "rate": 0.0, "validation_loss": 1.0}
    monkeypatch.setattr(finetune, "finetune_network", tune)
    return found


def names_of(files: list[Path]) -> list[str]:
    """As a split.csv has them."""
    return [f"{file.parent.name}/{file.name}" for file in files]


def part(split: ImageSet, name: str) -> list[str]:
    return sorted(row.path for row in split.part(name))


def test_no_test_image_is_seen_before_the_end_and_then_once(images, pretrained, tmp_path, calls,
                                                            opened):
    """Each seed has its own labels, and its own head on the pretrained network."""
    run(images, tmp_path, "--weights", pretrained / "cnn.pt", "--labels 0.1 --seeds 2 --seed 3")
    split = read_split(pretrained / "split.csv", read_images(images))
    before = weights_in(pretrained / "cnn.pt")
    for seed, one in zip((3, 4), calls, strict=True):
        rows = label_fraction(split, split.part("train"), 0.1, seed)
        assert sorted(one["train"]) == sorted(row.path for row in rows) and len(rows) == 3
        assert one["val"] == part(split, "val")
        assert equal(one["start"], before, but={"fc.weight", "fc.bias"})
    assert names_of(opened) == part(split, "val") + part(split, "test")
    assert "fc.weight" in moved(calls[0]["start"], calls[1]["start"])


def test_validation_chooses_arm_and_seed(
        images, pretrained, tmp_path, calls, monkeypatch):
    """With seed 1 the transformer is right on validation images alone; the CNN always is on test
    images alone."""
    def scripted(network: nn.Module, loader: object, **options) -> tuple[float, np.ndarray]:
        truth = np.concatenate([truth for _, truth in loader])
        cnn, tested = hasattr(network, "fc"), len(truth) == 9
        right = cnn if tested else not cnn and len(calls) > 2
        return 0.0, truth if right else truth[:, [1, 2, 0]]
    monkeypatch.setattr(finetune, "evaluate", scripted)
    found = run(images, tmp_path, HALF, "--weights", pretrained)
    assert (found["kept_seed"], found["chosen"]) == (1, "transformer")
    assert found["mean_sd_n"]["cnn"]["macro F1"] == [1, 0, 2]
    assert equal(weights_in(tmp_path / "cnn.pt"), calls[2]["start"])  # of seed 1
    rows = [row for row in table(tmp_path / "predictions.csv") if row["seed"] == "1"]
    assert all(row["class"] == row["transformer: class"] != row["truth"] for row in rows)


@pytest.mark.parametrize("share, used, steps, kind, schedule, protocol", [
    (0.01, 3, 1, "paper", "16", "full"), (0.29, 9, 1, "inverse", "run", "linear"),
    (1, 32, 4, "inverse", "run", "full")])
def test_options_arrive_and_follow_the_labels_in_use(share, used, steps, kind, schedule, protocol,
                                                     images, pretrained, tmp_path, calls):
    """One image a class at least; a last batch of one joins the one before."""
    run(images, tmp_path, "--weights", pretrained / "cnn.pt", f"--labels {share} --lr {share} "
        f"--class-weights {kind} --schedule {schedule} --protocol {protocol}")
    one, counts = calls[0], Counter(path.split("/")[0] for path in calls[0]["train"])
    wanted = class_weights(labels_of(*(counts[name] for name in CLASSES)), kind)
    assert one["weights"].tolist() == pytest.approx(wanted.tolist())
    assert (sum(counts.values()), one["steps"], one["lr"], one["epochs"]) == (used, steps, share, 2)
    assert one["linear"] == (protocol == "linear")
    assert one["t_max"] == (16 if schedule == "16" else 2 * steps)
    assert one["patience"] == (5 if schedule == "16" else math.ceil(100 / steps))


# %% which split a run has


def test_one_file_without_its_run(images, pretrained, tmp_path, monkeypatch, capsys, calls):
    monkeypatch.chdir(tmp_path)
    shutil.copy(pretrained / "cnn.pt", "cnn.pt")
    finetune.main(["--data", str(images), "--weights", "cnn.pt", *SMALL.split()])
    assert "split.csv is not there; make sure" in capsys.readouterr().out
    row = table(Path(f"runs/finetune-{tmp_path.name}-cnn-1/predictions.csv"))[0]
    assert list(row) == ["seed", "image", "truth", "class", "arms disagree", "cnn: class",
                         *(f"cnn: {c}" for c in CLASSES)] and row["arms disagree"] == "no"


def test_supervised_baseline(images, tmp_path, calls):
    (tmp_path / "checkpoint-notes.csv").touch()  # a user's own
    run(images, tmp_path, "--arch test_resnet --arch test_vit")
    assert (tmp_path / "checkpoint-notes.csv").exists()
    split = split_images(read_images(images))
    assert read_split(tmp_path / "split.csv", read_images(images)).rows == split.rows
    for arch, one in zip(("test_resnet", "test_vit"), calls, strict=True):
        start = runtime.build_model(arch, "random", 32, outputs=3, seed=0)
        assert equal(one["start"], state(start)) and (tmp_path / f"{arch}.pt").is_file()
        assert sorted(one["train"]) == part(split, "train")


def test_images_new_since_pretraining_move_none_from_test_to_train(tmp_path, calls, capsys):
    folder = class_folders(tmp_path / "set", a=12, b=12)
    weights = make_run(tmp_path / "cass", folder) / "cnn.pt"
    before = read_split(tmp_path / "cass" / "split.csv", read_images(folder))
    class_folders(folder, a=20, b=20)
    run(folder, tmp_path / "out", "--weights", weights)
    after = read_split(tmp_path / "out" / "split.csv", read_images(folder))
    assert len(after.rows) == 40 and all(row in after.rows for row in before.rows)
    assert sorted(calls[0]["train"]) == part(after, "train")
    assert "get parts of their own" in capsys.readouterr().out


def test_labels_may_come_after_pretraining(tmp_path, calls):
    names = [f"{i}.png" for i in range(30)]
    weights = make_run(tmp_path / "cass", put(tmp_path / "flat", *names))
    lines = [f"{name},{'ab'[i % 2]}\n" for i, name in enumerate(names)]
    folder = labels_csv(tmp_path / "flat", "image,label\n" + "".join(lines))
    found = run(folder, tmp_path / "out", "--weights", weights)
    assert found["run"]["classes"] == ["a", "b"] and len(calls[0]["train"]) == 21


def test_a_flat_test_part_is_predicted_and_others_are_scored(tmp_path, calls):
    folder = put(class_folders(tmp_path / "d", **{"train/a": 20, "train/b": 20}), "test/new.png")
    result = run(folder, tmp_path / "out", "--arch test_vit")
    rows = table(tmp_path / "out" / "predictions.csv")
    [unknown] = [row for row in rows if not row["truth"]]
    assert unknown["image"] == "test/new.png" and unknown["class"] in ("a", "b")
    test = result["seeds"][0]["arms"]["test_vit"]["test"]
    assert test["n"] == len(rows) - 1 == 8  # a fifth of 40


def test_split_file_may_not_test_what_was_pretrained_on(images, pretrained, calls, tmp_path,
                                                        capsys):
    weights = f"--weights {pretrained / 'cnn.pt'} --split-file {tmp_path / 'split.csv'}"
    write_split(tmp_path / "split.csv", split_images(read_images(images), seed=6))
    said = sentence(capsys, lambda: run(images, tmp_path / "out", weights))
    assert "test images that these weights were pretrained on" in said and not calls
    split = read_split(pretrained / "split.csv", read_images(images))
    fewer = replace(split, rows=[row for row in split.rows if row.path != "ant/0.png"])
    write_split(tmp_path / "split.csv", fewer)
    run(images, tmp_path / "out", weights)
    assert len(table(tmp_path / "out" / "split.csv")) == 44


# %% several labels an image, and predictions


def predict(path: Path, weights: Path, out: Path, more: str = "") -> list[dict[str, str]]:
    words = f"--predict {path} --weights {weights} --out {out} --workers 0 --precision fp32 {more}"
    finetune.main(words.split())
    return table(out / "predictions.csv")


def test_several_labels_an_image(tmp_path):
    draw, names = np.random.default_rng(3), [f"{i}.png" for i in range(40)]
    classes, cells = ["fibrous", "cystic", "rare"], draw.random((40, 3)) < (0.6, 0.4, 0.1)
    lines = [f"{name},{a:d},{b:d},{c:d}\n" for name, (a, b, c) in zip(names, cells)]
    folder = labels_csv(tmp_path / "set", f"image,{','.join(classes)}\n" + "".join(lines), *names)
    found = run(folder, tmp_path / "out", "--arch test_resnet --labels 0.5 --lr 0.01")
    rows = table(tmp_path / "out" / "predictions.csv")
    assert "" in {row["truth"] for row in rows} and any("|" in row["truth"] for row in rows)
    p = numbers_in(rows, "test_resnet", classes)
    for row, yes in zip(rows, p > 0.5):
        assert row["class"] == "|".join(c for c, said in zip(classes, yes) if said)
    test = found["seeds"][0]["arms"]["test_resnet"]["test"]
    wanted = score(truth_in(rows, classes), p, classes, True)
    assert all(test[key] == wanted[key] for key in wanted if key != "auroc")
    predicted = {r["image"]: r for r in predict(folder, tmp_path / "out", tmp_path / "new")}
    assert all(predicted[row["image"]]["class"] == row["class"] for row in rows)
    scores = json.loads((tmp_path / "new" / "result.json").read_text())["test_resnet"]
    assert scores["n"] == len(predicted) == 40  # "none of them" is known too


def test_predictions_are_those_of_the_networks(both, tmp_path, capsys):
    """Which are those of the run's best seed, and what timm loads by the lines that it printed."""
    new = put(tmp_path / "new", "z.png", "b.png", "deep/er/a.png", "deep/c.png", "10.png", "9.jpg")
    rows = predict(new, both["out"], tmp_path)
    assert f"6 images; the class is decided by {both['chosen']}" in capsys.readouterr().out
    paths = sorted(str(file.relative_to(new)) for file in new.rglob("*.*g"))
    assert [row["image"] for row in rows] == paths and len(rows) == 6
    assert {row["truth"] for row in rows} == {""} and not (tmp_path / "result.json").exists()
    assert list(rows[0]) == list(table(both["out"] / "predictions.csv")[0])[1:]
    transform = augmentation(32, "none")
    pixels = torch.stack([transform(load_image(new / path)) for path in paths])
    loading = [line for line in both["said"] if line.strip().startswith("timm.create_model")]
    for arm, line in zip(ARMS[:2], loading, strict=True):
        p = eval(line.strip()).eval()(pixels).sigmoid().detach().numpy()
        ours = numbers_in(rows, arm)
        assert np.abs(p - ours).max() < 1e-4  # a GPU multiplies in 10 bits
        assert [row[f"{arm}: class"] for row in rows] == [CLASSES[k] for k in ours.argmax(1)]
    assert all(row["class"] == row[f"{both['chosen']}: class"] for row in rows)


def test_one_network_or_image_and_images_that_cant_be_read(both, tmp_path, capsys):
    new = put(tmp_path / "new", "a.png", "b.png", "c.png")
    alone = predict(new, both["out"] / "cnn.pt", tmp_path / "alone")
    assert all(row["class"] == row["cnn: class"] for row in alone)
    assert "ensemble: ant" not in alone[0]
    assert predict(new / "b.png", both["out"] / "cnn.pt", tmp_path / "one") == [alone[1]]
    (new / "a.png").write_bytes(b"")
    said = sentence(capsys, lambda: predict(new, both["out"], tmp_path / "bad"))
    assert "a.png can't be read" in said and not (tmp_path / "bad").exists()
    assert len(predict(new, both["out"], tmp_path / "bad", "--skip-bad")) == 2


def test_a_labelled_folder_is_scored(both, images, tmp_path, capsys):
    """If the network knows all its classes, though not the other way round. Here are images of the
    run's test part too, of which the best seed's network said the same."""
    for name in ("bee", "cat"):
        shutil.copytree(images / name, tmp_path / "set" / name)
    put(tmp_path / "set", "unknown.png")
    rows = {row["image"]: row for row in predict(tmp_path / "set", both["out"], tmp_path)}
    assert rows.pop("unknown.png")["truth"] == ""
    scores, said = json.loads((tmp_path / "result.json").read_text()), capsys.readouterr().out
    before = [row for row in table(both["out"] / "predictions.csv")
              if row["seed"] == str(both["kept_seed"]) and row["image"] in rows]
    for name in ARMS:
        again = numbers_in([rows[row["image"]] for row in before], name)
        assert np.allclose(again, numbers_in(before, name), atol=1e-4) and len(again) == 7
        wanted = score(truth_in(rows.values()), numbers_in(rows.values(), name), CLASSES, False)
        assert scores[name]["argmax"] == wanted["argmax"] and scores[name]["n"] == 35
        assert f"{wanted['headline']:.3f}" in said and "+-" not in said
    guess = scores["always the same answer"]["argmax"]["accuracy"]
    assert guess == 20 / 35 and f"{guess:.3f}" in said  # of the cats
    (tmp_path / "predictions.csv").unlink()
    again = sentence(capsys, lambda: predict(tmp_path / "set", both["out"], tmp_path))
    assert "result.json is there already" in again


@pytest.mark.parametrize("text, words", [
    ("image,label\na.png,cat\nb.png,dog\n", "knows no class dog"),
    ("image,label\na.png,cat\nb.png,NA\n", "line 3 has label 'NA'")])
def test_labels_that_cant_be_used_are_not_scored(text, words, both, tmp_path, capsys):
    folder = labels_csv(tmp_path / "set", text, "a.png", "b.png")
    rows = predict(folder, both["out"], tmp_path)
    assert {row["truth"] for row in rows} == {""} and words in capsys.readouterr().out
    assert not (tmp_path / "result.json").exists()


def test_networks_that_cant_predict_together(both, pets, tmp_path, capsys):
    shutil.copy(both["out"] / "cnn.pt", tmp_path)
    (tmp_path / "config.json").write_text('{"options": {}, "finished": false}')
    said = sentence(capsys, lambda: predict(pets, tmp_path, tmp_path / "new"))
    assert "no finished run" in said and "--resume" in said
    other = torch.load(both["out"] / "transformer.pt", weights_only=True)
    torch.save(other | {"classes": list("xyz")}, tmp_path / "transformer.pt")
    said = sentence(capsys, lambda: predict(pets, tmp_path, tmp_path / "new"))
    assert "different classes" in said and "one file" in said and not (tmp_path / "new").exists()
