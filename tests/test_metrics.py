"""metrics.py: values by hand, explicit loops, and numbers recorded from scikit-learn 1.9.1."""

import itertools
import json
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

import metrics as m

pytestmark = pytest.mark.filterwarnings("error")  # undefined scores are None, not a warning


def named_score(truth, probabilities, multi_label):
    """`score` with classes c0, c1, ..."""
    classes = [f"c{k}" for k in range(truth.shape[1])]
    return m.score(truth, probabilities, classes, multi_label)


def random_case(seed, n, k, multi_label):
    """Truth and probabilities with one decimal: many ties, and exact halves."""
    generator = np.random.default_rng(seed)
    truth = np.eye(k, dtype=int)[generator.integers(k, size=n)]
    if multi_label:
        truth = generator.integers(2, size=(n, k))
    return truth, np.round(generator.random((n, k)) * 0.6 + truth * 0.2, 1)


# %% scores: recorded from scikit-learn 1.9.1 (f1_score, precision_score, recall_score,
# accuracy_score, balanced_accuracy_score, roc_auc_score, confusion_matrix,
# multilabel_confusion_matrix). 603 random and degenerate cases agreed with it to 3e-16.

NAMES = ("f1_pooled", "f1_macro", "precision_pooled", "precision_macro", "recall_pooled",
         "recall_macro")
RECORDED = {
    # class c3 has no image but is predicted, c2 is never the largest, and the two rules differ
    "absent": dict(
        truth=np.eye(4)[[0, 0, 0, 1, 1, 2, 2, 0]], multi_label=False,
        probabilities=[[.9, .1, .2, .3], [.6, .7, .1, .1], [.2, .3, .1, .8], [.1, .8, .4, .2],
                       [.55, .45, .1, .1], [.3, .6, .5, .1], [.7, .2, .6, .2], [.4, .1, .1, .1]],
        argmax=(.375, .225, .375, .20833333333333331, .375, .25),
        argmax_f1=[.5, .4, 0, 0], accuracy=.375, balanced=.3333333333333333,
        threshold=(.47058823529411764, .39166666666666666, .4444444444444444,
                   .4583333333333333, .5, .375),
        threshold_f1=[.5, .4, .6666666666666666, 0], subset=.25,
        auroc=[.625, .8333333333333334, 1., None],
        confusion=[[2, 1, 0, 1], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]),
    # ties in the probabilities, some exactly 0.5, and c2 in every image
    "multi-label": dict(
        truth=[[1, 0, 1], [1, 1, 1], [0, 1, 1], [0, 0, 1], [1, 0, 1], [0, 1, 1]],
        probabilities=[[.8, .5, .9], [.8, .5, .4], [.8, .7, .6], [.2, .5, .5], [.6, .2, .7],
                       [.2, .9, .1]], multi_label=True,
        threshold=(.7619047619047619, .7746031746031745, .8888888888888888, .9166666666666666,
                   .6666666666666666, .7222222222222222),
        threshold_f1=[.8571428571428571, .8, .6666666666666666], subset=.3333333333333333,
        auroc=[.7777777777777779, .8888888888888888, None],
        confusion=[[[2, 1], [0, 3]], [[3, 0], [1, 2]], [[0, 0], [3, 3]]]),
}


@pytest.mark.parametrize("name", RECORDED)
def test_scores_equal_scikit_learn(name):
    case = RECORDED[name]
    truth, probabilities = np.asarray(case["truth"]), np.asarray(case["probabilities"])
    result = named_score(truth, probabilities, case["multi_label"])
    assert ("argmax" in result) == ("argmax" in case)
    for rule, key in (("argmax", "argmax"), ("threshold", "threshold_0.5")):
        if rule in case:
            scores = result[key]
            assert [scores[n] for n in NAMES] == pytest.approx(case[rule], abs=1e-12)
            each = [row["f1"] for row in scores["per_class"]]
            assert each == pytest.approx(case[rule + "_f1"], abs=1e-12)
            assert [row["n"] for row in scores["per_class"]] == truth.sum(0).tolist()
    assert result["threshold_0.5"]["subset_accuracy"] == pytest.approx(case["subset"])
    if case["multi_label"]:
        assert result["headline"] == case["threshold"][0] and "pooled" in result["headline_name"]
    else:
        assert result["headline"] == case["argmax"][1] and "macro" in result["headline_name"]
        assert result["argmax"]["accuracy"] == pytest.approx(case["accuracy"])
        assert result["argmax"]["balanced_accuracy"] == pytest.approx(case["balanced"])
    assert list(result["auroc"]["per_class"].values()) == pytest.approx(case["auroc"], abs=1e-12)
    assert result["confusion"] == case["confusion"]
    assert json.loads(json.dumps(result, allow_nan=False)) == result


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("n, k", [(1, 2), (40, 5)])
def test_areas_are_shares_of_pairs_in_the_right_order(multi_label, n, k):
    truth, p = random_case(3, n, k, multi_label)
    got, areas = named_score(truth, p, multi_label)["auroc"], []
    for c, area in enumerate(got["per_class"].values()):
        have, lack = p[truth[:, c] == 1, c], p[truth[:, c] == 0, c]
        right = [(a > b) + 0.5 * (a == b) for a in have for b in lack]
        assert area == (pytest.approx(np.mean(right)) if right else None)
        areas += [area] if right else []
    assert got["macro"] == (pytest.approx(np.mean(areas)) if areas else None)


def test_no_class_in_any_image_leaves_balanced_accuracy_undefined():
    nothing = named_score(np.zeros((3, 2)), np.full((3, 2), .9), True)["threshold_0.5"]
    assert nothing["balanced_accuracy"] is None and nothing["f1_macro"] == 0


def test_decisions():
    p = np.array([[.5, .50001, .5], [.2, .2, .1], [.9, .3, .9]])
    assert m.decide(p, "threshold").tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 1]]
    assert m.decide(p, "argmax").tolist() == [[0, 1, 0], [1, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize("truth, p, message", [
    (np.eye(2), [[np.nan, 0], [0, 1]], "probabilities must"),  # diverged
    (np.eye(2), [[1.5, 0], [0, 1]], "probabilities must"),     # logits, not probabilities
    (np.eye(2), [[1, -.1], [0, 1]], "probabilities must"),
    (np.eye(2), np.eye(3), "no match"), (np.zeros((0, 2)), np.zeros((0, 2)), "no match")])
def test_bad_input_is_refused(truth, p, message):
    with pytest.raises(ValueError, match=message):
        named_score(truth, np.asarray(p), True)


@pytest.mark.parametrize("multi_label", [False, True])
def test_bootstrap_is_the_quantile_of_resampled_headlines(multi_label):
    truth, p = random_case(5, 30, 4, multi_label)
    generator, headlines = np.random.default_rng(7), []
    for _ in range(50):
        rows = generator.integers(30, size=30)
        headlines.append(named_score(truth[rows], p[rows], multi_label)["headline"])
    got = m.bootstrap_interval(truth, p, multi_label, draws=50, seed=7)
    assert got == pytest.approx(tuple(np.quantile(headlines, [.025, .975])), abs=1e-12)
    assert got[0] < named_score(truth, p, multi_label)["headline"] < got[1]


def test_mean_and_spread():
    assert m.mean_and_spread([1, 2, 3, 6]) == (3, pytest.approx(math.sqrt(14 / 3)), 4)
    assert m.mean_and_spread([0.7]) == (pytest.approx(0.7), None, 1)


# %% collapse


def test_gauges_equal_explicit_loops():
    z = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)) + 0.5
    unit = np.array([row / math.sqrt((row**2).sum()) for row in z.double().numpy()])
    pairs = list(itertools.permutations(range(9), 2))
    cosine = sum(float(unit[i] @ unit[j]) for i, j in pairs) / len(pairs)
    shares = np.linalg.svd(unit, compute_uv=False)
    shares /= shares.sum()
    expected = {"cosine": cosine, "rank": math.exp(-sum(s * math.log(s) for s in shares))}
    scaled = z * torch.linspace(.1, 9, 9)[:, None]  # the length of a row must not matter
    assert m.collapse_gauges(scaled) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("outputs, cosine, rank", [
    (torch.eye(6), 0, 6), (torch.full((8, 8), 1e-20), 1, 1), (torch.zeros(4, 3), 0, 0),
    (torch.tensor([[1., 0], [-3., 0]]), -1, 1), (torch.ones(1, 4), math.nan, 1),
    (torch.cat([torch.zeros(2, 3), torch.eye(3)]), 0, 3),
    (torch.full((3, 3), math.inf), math.nan, math.nan)])
def test_gauges_by_hand(outputs, cosine, rank):
    expected = {"cosine": cosine, "rank": rank}
    assert m.collapse_gauges(outputs) == pytest.approx(expected, abs=1e-5, nan_ok=True)


def test_rounding_noise_is_not_rank():
    generator = torch.Generator().manual_seed(1)
    one, noise = (torch.randn(n, 300, generator=generator) for n in (1, 128))
    ranks = [m.collapse_gauges(one * (1 + size * noise))["rank"] for size in (0, 1e-7, 1e-3, .1)]
    assert ranks[0] < 1.001 and ranks[1] < 1.001 and ranks == sorted(ranks) and ranks[3] > 10
    gauges = m.collapse_gauges((one * (1 + 1e-3 * noise)).to(torch.bfloat16))
    assert gauges["rank"] < 1.5 and gauges["cosine"] > 0.99


def two_networks():
    torch.manual_seed(0)
    cnn = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
    return {"cnn": cnn, "vit": nn.Linear(4, 3)}


def test_a_row_of_gauges():
    networks = two_networks()
    gauges = m.Gauges(networks)
    generator = torch.Generator().manual_seed(1)
    steps = [(torch.randn(8, 6, generator=generator), torch.ones(8, 3)) for _ in range(40)]
    row = gauges(steps)
    last = torch.cat([a for a, _ in steps])[-256:]
    assert row["cnn_rank"] == m.collapse_gauges(last)["rank"] != m.collapse_gauges(last[8:])["rank"]
    assert list(row) == [f"{a}_{g}" for a in ("cnn", "vit") for g in ("cosine", "rank", "moved")]
    assert row["vit_cosine"] == pytest.approx(1) and row["cnn_moved"] == row["vit_moved"] == 0
    with torch.no_grad():
        for parameter in networks["vit"].parameters():
            parameter *= 3  # |3 p - p| / |p| = 2
    row = gauges([(steps[0][0] * math.inf, steps[0][1], "more is left alone")])
    assert row["vit_moved"] == pytest.approx(2)
    assert row["cnn_cosine"] is None and row["cnn_rank"] is None and row["vit_rank"] is not None


def test_the_untrained_row_leaves_buffers_graph_and_random_streams_alone():
    networks, teacher = two_networks(), nn.BatchNorm1d(4)
    kept = [*networks.values(), teacher]
    before = [b.clone() for network in kept for b in network.buffers()]
    loader = torch.utils.data.DataLoader(torch.randn(512, 4) + 3, 100, shuffle=True)
    gauges = m.Gauges(networks)

    def forward(batch):
        return tuple(network(teacher(batch)) for network in networks.values())
    streams = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    outputs = gauges.untrained(forward, loader, teacher)
    assert len(outputs) == 3  # no more than 256 images need
    assert (outputs[0][0] == 0).any() and not outputs[0][0].requires_grad  # dropout: training mode
    assert torch.equal(streams[0], torch.get_rng_state())
    assert (np.random.get_state()[1].tolist(), random.getstate()) == streams[1:]
    after = [b for network in kept for b in network.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_collapsed_network_is_named_once():
    gauges = m.Gauges(two_networks())
    first = {"cnn_cosine": .1, "cnn_rank": 30., "vit_cosine": .995, "vit_rank": 1.2}
    fine = {"cnn_cosine": .98, "cnn_rank": 9., "vit_cosine": None, "vit_rank": None}
    assert gauges.warnings(fine, first) == []
    same = {"cnn_cosine": .9991, "cnn_rank": 1.1, "vit_cosine": .5, "vit_rank": 9.}
    sentence, = gauges.warnings(same, first)
    assert sentence.startswith("cnn ") and "0.999" in sentence and "0.100" in sentence
    zero = {"cnn_cosine": 1., "cnn_rank": 1., "vit_cosine": 0., "vit_rank": 0.}
    sentence, = gauges.warnings(zero, None)
    assert sentence.startswith("vit ") and "before" not in sentence
    assert gauges.warnings(zero, first) == []
