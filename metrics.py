"""Scores of a classifier, and gauges that show whether a network's outputs collapse.

Labels are multi-hot `(N, K)`, for multi-class tasks too; probabilities `(N, K)` are per class.
*Macro*: the mean over classes, so that rare ones count as much. *Pooled*: of all counts added."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor, nn

# %% scores


def decide(probabilities: ndarray, rule: str) -> ndarray:
    """0/1 decisions `(N, K)`: "threshold" takes every class above 0.5, "argmax" the first best."""
    if rule == "threshold":
        return (probabilities > 0.5).astype(np.int64)
    return np.eye(probabilities.shape[1], dtype=np.int64)[probabilities.argmax(axis=1)]


def precision_recall_f1(counts: dict[str, ndarray]) -> dict[str, ndarray]:
    """From counts of images `(K,)`, or from their sums for pooled scores. 0 / 0 is 0, as in
    scikit-learn."""
    tp, fp, fn = counts["tp"], counts["fp"], counts["fn"]
    parts = {"precision": (tp, tp + fp), "recall": (tp, tp + fn), "f1": (2 * tp, 2 * tp + fp + fn)}
    return {name: part / np.maximum(whole, 1) for name, (part, whole) in parts.items()}


def auroc_per_class(truth: ndarray, probabilities: ndarray) -> list[float | None]:
    """Area under the ROC curve of each class against the rest: the share of pairs (an image with
    the class, one without) in the right order, a tie counting one half. None without such pairs."""
    areas = []
    for yes, values in zip(truth.T > 0.5, probabilities.T, strict=True):
        have, lack = values[yes], np.sort(values[~yes])
        lower, up_to = (np.searchsorted(lack, have, side) for side in ("left", "right"))
        pairs = 2 * len(have) * len(lack)
        areas.append(float((lower + up_to).sum() / pairs) if pairs else None)
    return areas


def decision_scores(truth: ndarray, predicted: ndarray, classes: list[str], exact: str) -> dict:
    """Scores of 0/1 decisions `(N, K)`; `exact` names the share of images with all K right."""
    yes, said = truth > 0.5, predicted > 0.5
    counts = {"tp": (yes & said).sum(0), "fp": (~yes & said).sum(0),
              "fn": (yes & ~said).sum(0), "tn": (~yes & ~said).sum(0)}  # (K,) each
    each = precision_recall_f1(counts)
    pooled = precision_recall_f1({kind: values.sum() for kind, values in counts.items()})
    scores = {f"{name}_pooled": float(value) for name, value in pooled.items()}
    scores |= {f"{name}_macro": float(values.mean()) for name, values in each.items()}
    scores[exact] = float((truth == predicted).all(axis=1).mean())
    recalls = each["recall"][truth.any(axis=0)]  # as scikit-learn; recall_macro counts absent ones
    scores["balanced_accuracy"] = float(recalls.mean()) if recalls.size else None
    scores["per_class"] = []
    for k, name in enumerate(classes):
        row = {kind: values[k].item() for kind, values in (counts | each).items()}
        scores["per_class"].append({"class": name, "n": row["tp"] + row["fn"], **row})
    return scores


def score(truth: ndarray, probabilities: ndarray, classes: list[str], multi_label: bool) -> dict:
    """Score probabilities `(N, K)` against truth `(N, K)`: plain values, None where undefined.
    "argmax" (multi-class only) and "threshold_0.5" hold the scores by that rule; "confusion" has a
    row for each true class, or for multi-label tasks [[tn, fp], [fn, tp]] for each class."""
    if truth.shape != probabilities.shape or truth.shape[1] != len(classes) or not truth.size:
        raise ValueError(f"no match: {truth.shape}, {probabilities.shape}, {len(classes)} classes")
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError("probabilities must lie in [0, 1]; nan here means that training diverged")
    areas = auroc_per_class(truth, probabilities)
    defined = [area for area in areas if area is not None]
    mean = float(np.mean(defined)) if defined else None
    result = {"n": len(truth), "multi_label": bool(multi_label), "classes": list(classes),
              "auroc": {"macro": mean, "per_class": dict(zip(classes, areas))}}
    decided = decide(probabilities, "threshold")
    result["threshold_0.5"] = scores = decision_scores(truth, decided, classes, "subset_accuracy")
    if multi_label:
        tables = [[[c["tn"], c["fp"]], [c["fn"], c["tp"]]] for c in scores["per_class"]]
        return result | {"confusion": tables, "headline": scores["f1_pooled"],
                         "headline_name": "pooled F1 at threshold 0.5"}
    decided = decide(probabilities, "argmax")
    result["argmax"] = scores = decision_scores(truth, decided, classes, "accuracy")
    return result | {"confusion": (truth.astype(np.int64).T @ decided).tolist(),
                     "headline": scores["f1_macro"], "headline_name": "macro F1 at argmax"}


def bootstrap_interval(truth: ndarray, probabilities: ndarray, multi_label: bool,
                       draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of `score`'s headline over test sets drawn with replacement: the chance in
    which images were tested, not in training. Too narrow where images are related."""
    rule, headline = ("threshold", "f1_pooled") if multi_label else ("argmax", "f1_macro")
    decided, generator, values = decide(probabilities, rule), np.random.default_rng(seed), []
    for _ in range(draws):
        rows = generator.integers(len(truth), size=len(truth))
        values.append(decision_scores(truth[rows], decided[rows], [], "exact")[headline])
    return tuple(np.quantile(values, [0.025, 0.975]).tolist())


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None, int]:
    """(mean, sample standard deviation, n) over seeds; one value has no spread: None."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return float(np.mean(values)), spread, len(values)


# %% collapse


def collapse_gauges(outputs: Tensor) -> dict[str, float]:
    """How different the outputs `(N, D)` of N images are; each row is first divided by its norm.
    cosine: mean over pairs of different images; 1 = all the same direction.
    rank:   exp of the entropy of the singular values (Roy and Vetterli 2007): 1 = one direction,
            0 = all zero. With the mean taken off, mere rounding would look like full rank."""
    z = outputs.detach().cpu().double()  # on the CPU, as some devices have no float64
    if not torch.isfinite(z).all():
        return {"cosine": math.nan, "rank": math.nan}
    n, d = z.shape
    z = nn.functional.normalize(z, dim=1, eps=1e-60)  # tiny equal outputs are equal, not zero
    # The sum over all pairs is |sum of rows|^2; what a row has with itself is no pair.
    pairs = float(z.sum(0).square().sum() - z.square().sum())
    singular = torch.linalg.eigvalsh(z @ z.T if n <= d else z.T @ z).clamp(min=0).sqrt()
    shares = singular / singular.sum().clamp(min=1e-60)
    rank = float(torch.special.entr(shares).sum().exp()) if shares.any() else 0.0
    return {"cosine": min(1.0, pairs / (n * (n - 1))) if n > 1 else math.nan, "rank": rank}


class Gauges:
    """`gauges(outputs)` is part of an epoch's row: for each network cosine, rank, and moved: how
    far its weights w are from those when this object was made, as |w - start| / |start|."""

    def __init__(self, networks: dict[str, nn.Module]) -> None:
        self.networks, self.start, self.said = networks, {}, set()
        for name, network in networks.items():
            self.start[name] = [p.detach().clone() for p in network.parameters()]

    @staticmethod
    def columns(*names: str) -> list[str]:
        """What an epoch's row holds for networks of these names."""
        return [f"{name}_{gauge}" for name in names for gauge in ("cosine", "rank", "moved")]

    def __call__(self, outputs: Sequence[tuple[Tensor, ...]]) -> dict[str, float | None]:
        """From a tuple of outputs `(N, D)`, one a network, for each of the last steps; 256 images
        count, and what follows in a tuple does not."""
        row = {}
        for (name, network), steps in zip(self.networks.items(), zip(*outputs)):
            found = collapse_gauges(torch.cat(steps)[-256:])
            start = self.start[name]
            moves = [p.detach() - p0 for p, p0 in zip(network.parameters(), start, strict=True)]
            found["moved"] = float(nn.utils.get_total_norm(moves) / nn.utils.get_total_norm(start))
            for gauge, value in found.items():
                row[f"{name}_{gauge}"] = value if math.isfinite(value) else None  # JSON has no nan
        return row

    @torch.no_grad()
    def untrained(self, forward: Callable, loader: Iterable) -> list[tuple]:
        """`forward(batch)` for the first 256 images. Call it in training mode, as later rows are
        made: in evaluation mode an untrained CNN gives nearly one output for all. The buffers and
        torch's random streams stay as they were."""
        networks = list(self.networks.values())
        buffers = [(b, b.clone()) for network in networks for b in network.buffers()]
        device, outputs = next(networks[0].parameters()).device, []
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for batch in loader:
                outputs.append(forward(batch))
                if sum(len(step[0]) for step in outputs) >= 256:
                    break
        for buffer, value in buffers:
            buffer.copy_(value)
        return outputs

    def warnings(self, row: dict, first: dict | None) -> Iterator[str]:
        """A sentence, once, for a network that gives one output for all; `first`: epoch 0's row."""
        for name in self.networks:
            cosine, rank = row.get(f"{name}_cosine"), row.get(f"{name}_rank")
            before = (first or {}).get(f"{name}_cosine")
            if name not in self.said and cosine is not None and (cosine > 0.99 or rank == 0):
                self.said.add(name)
                start = "" if before is None else f"; before training cosine {before:.3f}"
                yield (f"{name} gives almost the same output for every image (cosine {cosine:.3f}, "
                       f"rank {rank:.1f}{start}), whatever the loss says")
