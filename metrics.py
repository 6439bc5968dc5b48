"""Scores of a classifier, gauges of collapse, and similarity of representations.

    scores (numpy)     decide, class_counts, precision_recall_f1, auroc_per_class, confusion_matrix,
                       score (all of them in one dict), bootstrap_interval, mean_and_spread, gain
    collapse (torch)   collapse_gauges, collapse_warning, weight_distance
    probes (torch)     network_features, probe_scores
    similarity (torch) linear_cka, hsic_unbiased, MinibatchCKA

Labels are multi-hot 0/1 of shape (N, K), for multi-class tasks too (one 1 a row); probabilities (N, K) are per
class, from a sigmoid, so a row need not sum to 1. Scores lie in [0, 1]. Nothing touches a global random state.
Two averages over classes: *macro* is the mean of the K per-class scores, so rare classes count as much as common
ones; *pooled* (micro) adds up the counts of all classes first, so common classes dominate. The formulas of G.0.2
are missing from the paper's text; its notebook pools F1, and its "balanced accuracy" (ISIC) is the mean recall.
"""

import copy
import math
import warnings
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

# %% Scores


def decide(probabilities: np.ndarray, rule: str) -> np.ndarray:
    """Turn probabilities (N, K) into 0/1 decisions (N, K).

    "threshold" takes every class above 0.5, none or several an image (strictly above, as the notebook's `ts > 0.5`);
    "argmax" takes exactly one, the most probable, and the first of equals. Raises ValueError for another rule.
    """
    p = np.asarray(probabilities)
    if rule == "threshold":
        return (p > 0.5).astype(np.int64)
    if rule == "argmax":
        return np.eye(p.shape[1], dtype=np.int64)[p.argmax(axis=1)]
    raise ValueError(f"rule must be 'threshold' or 'argmax', not {rule!r}")


def class_counts(truth: np.ndarray, predicted: np.ndarray) -> dict[str, np.ndarray]:
    """Count, for each class, the images of the four kinds: {"tp", "fp", "fn", "tn"}, each (K,) integers."""
    t, p = np.asarray(truth) > 0.5, np.asarray(predicted) > 0.5
    if t.shape != p.shape or t.ndim != 2:
        raise ValueError(f"truth {t.shape} and predicted {p.shape} must have the same shape (N, K)")
    return {"tp": (t & p).sum(0), "fp": (~t & p).sum(0), "fn": (t & ~p).sum(0), "tn": (~t & ~p).sum(0)}


def precision_recall_f1(counts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{"precision", "recall", "f1"} from counts: (K,) for per-class scores, their sums for pooled ones.

    0 / 0 is 0, as in scikit-learn: recall of a class without images, precision of a class never predicted.
    """
    tp, fp, fn = counts["tp"], counts["fp"], counts["fn"]
    above, below = np.array([tp, tp, 2 * tp], dtype=float), np.array([tp + fp, tp + fn, 2 * tp + fp + fn], dtype=float)
    precision, recall, f1 = np.divide(above, below, out=np.zeros_like(below), where=below != 0)
    return {"precision": precision, "recall": recall, "f1": f1}


def auroc_per_class(truth: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each class against the rest, (K,); nan where all images or none hold the class.

    It is the share of pairs (an image with the class, one without) in the right order, a tie counting one half.
    """
    areas = []
    for t, p in zip((np.asarray(truth) > 0.5).T, np.asarray(probabilities, dtype=np.float64).T, strict=True):
        positives = int(t.sum())
        pairs = positives * (len(t) - positives)
        _, place, counts = np.unique(p, return_inverse=True, return_counts=True)
        ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # from 1; equal values share their mean rank
        areas.append((ranks[t].sum() - positives * (positives + 1) / 2) / pairs if pairs else math.nan)
    return np.array(areas)


def confusion_matrix(truth: np.ndarray, predicted: np.ndarray, multi_label: bool) -> np.ndarray:
    """Counts of truth (rows) against decision (columns): (K, K), or for multi-label (K, 2, 2), one table a class.

    The table is [[tn, fp], [fn, tp]]. ValueError for a multi-class input without exactly one 1 a row.
    """
    c = class_counts(truth, predicted)
    if multi_label:
        return np.stack([c["tn"], c["fp"], c["fn"], c["tp"]], axis=1).reshape(-1, 2, 2)
    if (np.sum(truth, axis=1) != 1).any() or (np.sum(predicted, axis=1) != 1).any():
        raise ValueError("a multi-class confusion matrix needs exactly one true and one predicted class an image")
    return np.asarray(truth, dtype=np.int64).T @ np.asarray(predicted, dtype=np.int64)


def _scores_of(truth: np.ndarray, predicted: np.ndarray, classes: Sequence[str], match_name: str) -> dict:
    """Every score that follows from decisions; `match_name` names the share of images with all K decisions right."""
    counts = class_counts(truth, predicted)
    each = precision_recall_f1(counts)
    pooled = precision_recall_f1({kind: values.sum() for kind, values in counts.items()})
    present = truth.sum(0) > 0
    scores = {f"{name}_pooled": float(value) for name, value in pooled.items()}
    scores |= {f"{name}_macro": float(values.mean()) for name, values in each.items()}
    # As scikit-learn: classes without images are left out here, while recall_macro counts them as 0.
    scores["balanced_accuracy"] = float(each["recall"][present].mean()) if present.any() else None
    scores[match_name] = float((truth == predicted).all(axis=1).mean())
    scores["per_class"] = [{"class": name, "n": int(truth[:, k].sum())}
                           | {what: values[k].item() for what, values in (counts | each).items()}
                           for k, name in enumerate(classes)]
    return scores


def score(truth: np.ndarray, probabilities: np.ndarray, classes: Sequence[str], multi_label: bool) -> dict:
    """Score probabilities (N, K) against truth (N, K); the dict holds plain values only, ready for JSON.

    Per decision rule ("argmax", for multi-class only, and "threshold_0.5"): f1, precision and recall, each "_pooled"
    and "_macro"; "balanced_accuracy"; "accuracy" (argmax) or "subset_accuracy" (threshold: all K decisions right);
    "per_class" (n: images with the class). Besides: "auroc" {"macro", "per_class"}, None where undefined, and then
    left out of the mean; "confusion", for the first rule; "n"; "headline" and "headline_name".
    The notebook differs in one point: it counts an image without any decision as one more class, "healthy".

    Warns at most once, naming the classes without a defined score. Raises ValueError on shapes that do not match, no
    images, probabilities outside [0, 1] (nan too), labels other than 0 and 1, a multi-class row without exactly one 1.
    """
    truth, probabilities = np.asarray(truth), np.asarray(probabilities, dtype=np.float64)
    if truth.shape != probabilities.shape or truth.ndim != 2 or truth.shape[1] != len(classes) or not truth.size:
        raise ValueError(f"no match: truth {truth.shape}, probabilities {probabilities.shape}, {len(classes)} classes")
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError("probabilities must lie in [0, 1]; nan here usually means that training diverged")
    if not np.isin(truth, (0, 1)).all() or not (multi_label or (truth.sum(1) == 1).all()):
        raise ValueError("truth must hold 0 and 1 only, and for a multi-class task exactly one 1 a row")
    truth = truth.astype(np.int64)
    rules = {"threshold_0.5": "threshold"} if multi_label else {"argmax": "argmax", "threshold_0.5": "threshold"}
    decided = {key: decide(probabilities, rule) for key, rule in rules.items()}
    areas = auroc_per_class(truth, probabilities)
    defined = ~np.isnan(areas)
    result = {"n": len(truth), "multi_label": bool(multi_label), "classes": list(classes)}
    for key, predicted in decided.items():
        result[key] = _scores_of(truth, predicted, classes, "accuracy" if key == "argmax" else "subset_accuracy")
    per_class = {name: float(a) if ok else None for name, a, ok in zip(classes, areas, defined, strict=True)}
    result["auroc"] = {"macro": float(areas[defined].mean()) if defined.any() else None, "per_class": per_class}
    first = next(iter(decided))
    result["confusion"] = confusion_matrix(truth, decided[first], multi_label).tolist()
    result["headline"] = result[first]["f1_pooled" if multi_label else "f1_macro"]
    result["headline_name"] = "pooled F1 at threshold 0.5" if multi_label else "macro F1 at argmax"
    gaps = {"no image has (recall 0)": truth.sum(0) == 0, "AUROC is undefined for": ~defined}
    gaps |= {f"never predicted by {key} (precision 0)": predicted.sum(0) == 0 for key, predicted in decided.items()}
    found = [f"{text}: {', '.join(np.array(classes)[mask])}" for text, mask in gaps.items() if mask.any()]
    if found:
        warnings.warn("some scores are undefined; " + "; ".join(found), stacklevel=2)
    return result


def bootstrap_interval(truth: np.ndarray, probabilities: np.ndarray, multi_label: bool,
                       draws: int = 1000, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval (low, high) of `score`'s headline, over test sets of N images drawn with replacement.

    It shows the chance in which images were tested, not in training (seeds do that), and is too narrow where images
    are related, as those of one patient are. A class that a draw misses counts 0. Raises ValueError without images.
    """
    t, p = np.asarray(truth) > 0.5, decide(probabilities, "threshold" if multi_label else "argmax") > 0.5
    if t.shape != p.shape or not t.size:
        raise ValueError(f"needs images: truth {t.shape}, probabilities {p.shape}")
    n, rng = len(t), np.random.default_rng(seed)
    hits_and_errors = np.concatenate([t & p, t ^ p], axis=1).astype(np.float64)  # (N, 2K); an error is fp or fn
    values = np.empty(draws)
    for i in range(draws):
        times_drawn = np.bincount(rng.integers(n, size=n), minlength=n)
        tp, errors = np.split(times_drawn @ hits_and_errors, 2)
        if multi_label:
            tp, errors = tp.sum(), errors.sum()
        values[i] = precision_recall_f1({"tp": tp, "fp": errors, "fn": 0})["f1"].mean()  # F1 needs only fp + fn
    return tuple(np.quantile(values, [(1 - level) / 2, (1 + level) / 2]).tolist())


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None, int]:
    """(mean, sample standard deviation with n - 1, n) over seeds; one value has no spread: None, not a certain 0."""
    v = np.asarray(values, dtype=np.float64)
    if v.ndim != 1 or not v.size:
        raise ValueError("needs a list of at least one value")
    return float(v.mean()), float(v.std(ddof=1)) if v.size > 1 else None, v.size


def gain(ours: dict[str, Sequence[float]], baseline: dict[str, Sequence[float]], data_sets: Sequence[str]) -> float:
    """Gain in points (paper, G.0.3): the improvement of both arms, summed, over the number of data sets, times 100.

    `ours` (CASS) and `baseline` (DINO) give each data set's scores as (CNN, Transformer). As the arms are added up,
    this is twice the mean gain of one network. KeyError: a data set is missing; ValueError: unequal numbers of arms.
    """
    total = sum(a - b for name in data_sets for a, b in zip(ours[name], baseline[name], strict=True))
    return float(100 * total / len(data_sets))


# %% Collapse


def collapse_gauges(logits: Tensor) -> dict[str, float]:
    """Tell how different the outputs (N, D) of N images are; each row is first divided by its L2 norm.

    cosine: mean over pairs of different images; 1 = all the same direction. An all-zero row counts 0 with any other.
    spread: standard deviation over the batch, mean over dimensions, times sqrt(D) (Chen and He 2021): 1 = spread
            evenly over the sphere, 0 = all the same. At most sqrt(1 - cosine) for nonzero rows.
    rank:   exp of the entropy of the singular values (Roy and Vetterli 2007): 1 = one direction, min(N, D) = all
            directions alike, 0 = all outputs zero. With the mean taken off, mere rounding would look like full rank.
    N = 1 has no cosine and no spread (nan); logits that are not finite give nan everywhere. ValueError unless (N, D).
    """
    if logits.ndim != 2 or not logits.numel():
        raise ValueError(f"needs outputs of shape (N, D), got {tuple(logits.shape)}")
    z = logits.detach().cpu().double()  # on the CPU, as some devices have no float64
    if not torch.isfinite(z).all():
        return dict.fromkeys(("cosine", "spread", "rank"), math.nan)
    n, d = z.shape
    z = torch.nn.functional.normalize(z, dim=1, eps=1e-60)  # far below float32: tiny equal outputs are equal, not zero
    cosine = spread = math.nan
    if n > 1:
        # The sum over all pairs is |sum of rows|^2; what a row has with itself is not a pair.
        cosine = min(1.0, float((z.sum(0).square().sum() - z.square().sum()) / (n * (n - 1))))
        spread = float(z.std(dim=0).mean() * math.sqrt(d))
    s = torch.linalg.eigvalsh(z @ z.T if n <= d else z.T @ z).clamp(min=0).sqrt()  # singular values of z
    rank = float(torch.special.entr(s / s.sum()).sum().exp()) if s.sum() > 0 else 0.0
    return {"cosine": cosine, "spread": spread, "rank": rank}


def collapse_warning(gauges: dict[str, float], start: dict[str, float] | None) -> str | None:
    """One sentence if a network's outputs are the same for every image, else None; `start`: its gauges untrained."""
    # Spread 0.1 is cosine 0.99 where all D dimensions vary alike; where few do, outputs that differ have a low spread
    # too, so the cosine must agree. Rank 0 is all zeros.
    equal, equal_before = (g is not None and g["spread"] < 0.1 and (g["cosine"] > 0.9 or g["rank"] == 0)
                           for g in (gauges, start))
    if not equal:
        return None
    what = f"average similarity {gauges['cosine']:.3f}, where 1 means identical" if gauges["rank"] else "all zeros"
    was = "was so already" if equal_before else "was not so"
    before = "" if start is None else f"; it {was} before training (similarity {start['cosine']:.3f})"
    return (f"The network now gives almost the same output for every image ({what}){before}, so a low loss does not "
            "show that it has learned anything: the loss alone cannot tell success from collapse.")


def weight_distance(parameters: Iterable[Tensor], start: Iterable[Tensor]) -> float:
    """|p - p0| / |p0|, L2 over all tensors: 0 = nothing moved, inf = moved from zero. ValueError: unequal lists."""
    moved = size = 0.0
    for p, p0 in zip(parameters, start, strict=True):
        p0 = p0.detach().to(p.device).float()
        moved += (p.detach().float() - p0).norm().item() ** 2
        size += p0.norm().item() ** 2
    return math.sqrt(moved / size) if size else (math.inf if moved else 0.0)


# %% Similarity of representations


def _gram(features: Tensor) -> Tensor:
    """(N, ...) features -> (N, N) inner products after taking off the mean image; 0 if equal up to rounding."""
    x = features.detach().flatten(1)
    x = x if x.dtype == torch.float64 else x.float()
    centred = x - x.mean(0)
    if centred.norm() <= 1e-6 * x.norm():  # CKA is free of scale: it would compare rounding noise
        return torch.zeros(len(x), len(x), dtype=torch.float64)
    return (centred @ centred.T).cpu().double()


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment (Kornblith et al. 2019) of features (N, D1) and (N, D2) of the same N images.

    1 for features rotated, shifted or scaled; near 0 for unrelated ones if N >> D1, D2; nan if either is constant.
    """
    k, l = _gram(x), _gram(y)
    return float((k * l).sum() / (k.norm() * l.norm()))


def hsic_unbiased(k: Tensor, l: Tensor) -> float:
    """Unbiased HSIC of two (N, N) Gram matrices, N >= 4 (Song et al. 2012; equation 3 of Nguyen et al. 2021)."""
    n = len(k)
    if n < 4:
        raise ValueError(f"unbiased HSIC needs batches of at least 4 images, got {n}")
    k, l = k - torch.diag(k.diagonal()), l - torch.diag(l.diagonal())  # an image with itself is not a pair
    rows_k, rows_l = k.sum(1), l.sum(1)
    pairs = (k * l).sum() + rows_k.sum() * rows_l.sum() / ((n - 1) * (n - 2)) - 2 * (rows_k @ rows_l) / (n - 2)
    return float(pairs / (n * (n - 3)))


class MinibatchCKA:
    """CKA between n_x and n_y layers from batches, without all features in memory (Nguyen et al. 2021).

    `add` takes one batch: a list of n_x and one of n_y feature tensors (N, ...), the same N >= 4 images everywhere
    (drop a short last batch). `matrix` gives (n_x, n_y), nan for a layer that is the same for every image.
    """
    def __init__(self, n_x: int, n_y: int) -> None:
        self.xy = torch.zeros(n_x, n_y, dtype=torch.float64)
        self.xx, self.yy = self.xy.new_zeros(n_x), self.xy.new_zeros(n_y)

    def add(self, x_features: Sequence[Tensor], y_features: Sequence[Tensor]) -> None:
        if (len(x_features), len(y_features)) != self.xy.shape:
            raise ValueError(f"expected {tuple(self.xy.shape)} layers, got {len(x_features)} and {len(y_features)}")
        ks, ls = [_gram(f) for f in x_features], [_gram(f) for f in y_features]
        self.xy += torch.tensor([[hsic_unbiased(k, l) for l in ls] for k in ks], dtype=torch.float64)
        self.xx += torch.tensor([hsic_unbiased(k, k) for k in ks], dtype=torch.float64)
        self.yy += torch.tensor([hsic_unbiased(l, l) for l in ls], dtype=torch.float64)

    def matrix(self) -> Tensor:
        return self.xy / (self.xx[:, None] * self.yy[None]).sqrt()


# %% Probes


@torch.no_grad()
def network_features(network: torch.nn.Module, train: Iterable, validation: Iterable) -> list[tuple[Tensor, Tensor]]:
    """[(features (N, F), truth (N, K)) of `train`, of `validation`]: pooled, before the head, in evaluation mode.

    Batches are (images, multi-hot truth). Works on a copy of the network whose batch-norm statistics are computed
    anew from `train`: those of an untrained network are unset, and half-way through training they lag behind.
    """
    device, network = next(network.parameters()).device, copy.deepcopy(network)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # dropout must not draw from the run's stream
        torch.optim.swa_utils.update_bn(train, network, device)
    network.eval()
    found = []
    for batches in (train, validation):
        pairs = [(network.forward_head(network.forward_features(x.to(device)), pre_logits=True).cpu().double(), y)
                 for x, y in batches]
        found.append(tuple(torch.cat(column) for column in zip(*pairs)))
    return found


def probe_scores(train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor], multi_label: bool,
                 k: int = 20) -> dict[str, float]:
    """What simple classifiers on frozen features (N, F) reach on `validation`, as macro F1 (pooled for multi-label).

    knn: the mean labels of the k nearest training images by cosine (of all, if there are fewer).
    linear: ridge regression of the labels on standardised features, penalty 0.01 N. Neither draws a random number.
    """
    (x, y), (z, truth) = train, validation
    mean, sd = x.mean(0), x.std(0, correction=0).clamp_min(1e-8)
    x, z, y = (x - mean) / sd, (z - mean) / sd, y.double()
    unit_x, unit_z = (torch.nn.functional.normalize(v, dim=1) for v in (x, z))
    votes = y[(unit_z @ unit_x.T).topk(min(k, len(x))).indices].mean(1)  # (N, K)
    weights = torch.linalg.solve(x.T @ x + 0.01 * len(x) * torch.eye(x.shape[1], dtype=x.dtype), x.T @ (y - y.mean(0)))
    scores = {}
    for name, values in (("knn", votes), ("linear", z @ weights + y.mean(0))):
        counts = class_counts(truth.numpy(), decide(values.numpy(), "threshold" if multi_label else "argmax"))
        counts = {kind: n.sum() for kind, n in counts.items()} if multi_label else counts
        scores[name] = float(precision_recall_f1(counts)["f1"].mean())
    return scores


def arm_gauges(outputs: Tensor, arm: torch.nn.Module, start: Sequence[Tensor]) -> dict[str, float | None]:
    """The gauges of one arm for a row of the log: those of its outputs (N, D), the norm of the gradient it has now
    (None before the first step), and how far its weights have moved from `start`. JSON knows no nan: it becomes None."""
    gradients = [p.grad for p in arm.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients).item() if gradients else None
    gauges = {key: None if math.isnan(value) else value for key, value in collapse_gauges(outputs).items()}
    return gauges | {"gradient": norm, "moved": weight_distance(arm.parameters(), start)}
