"""metrics.py: values by hand, explicit loops, and numbers recorded from scikit-learn 1.9.1."""

import itertools
import json
import math

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


def random_case(n, k, multi_label):
    """Truth and probabilities with one decimal: many ties, and exact halves."""
    generator = np.random.default_rng(3)
    truth = np.eye(k, dtype=int)[generator.integers(k, size=n)]
    if multi_label:
        truth = generator.integers(2, size=(n, k))
    return truth, np.round(generator.random((n, k)) * 0.6 + truth * 0.2, 1)


def named(*values, **more):
    names = ("f1_pooled", "f1_macro", "precision_pooled", "precision_macro", "recall_pooled",
             "recall_macro")
    return dict(zip(names, values, strict=True)) | more


# Recorded from scikit-learn 1.9.1 (f1_score, precision_score, recall_score, accuracy_score,
# balanced_accuracy_score, roc_auc_score, confusion_matrix, multilabel_confusion_matrix). 603
# random and degenerate cases agreed with it to 3e-16.
RECORDED = {
    # class c3 has no image but is predicted, c2 is never the largest, and the two rules differ
    "absent": dict(
        truth=np.eye(4)[[0, 0, 0, 1, 1, 2, 2, 0]],
        probabilities=[[.9, .1, .2, .3], [.6, .7, .1, .1], [.2, .3, .1, .8], [.1, .8, .4, .2],
                       [.55, .45, .1, .1], [.3, .6, .5, .1], [.7, .2, .6, .2], [.4, .1, .1, .1]],
        rules={"argmax": named(3/8, 9/40, 3/8, 5/24, 3/8, 1/4, accuracy=3/8,
                               balanced_accuracy=1/3),
               "threshold_0.5": named(8/17, 47/120, 4/9, 11/24, 1/2, 3/8, subset_accuracy=1/4)},
        f1={"argmax": [1/2, 2/5, 0, 0], "threshold_0.5": [1/2, 2/5, 2/3, 0]},
        headline=9/40, headline_name="macro F1 at argmax", auroc=[5/8, 5/6, 1, None],
        confusion=[[2, 1, 0, 1], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]),
    # ties in the probabilities, some exactly 0.5, and c2 in every image
    "several": dict(
        truth=[[1, 0, 1], [1, 1, 1], [0, 1, 1], [0, 0, 1], [1, 0, 1], [0, 1, 1]],
        probabilities=[[.8, .5, .9], [.8, .5, .4], [.8, .7, .6], [.2, .5, .5], [.6, .2, .7],
                       [.2, .9, .1]],
        rules={"threshold_0.5": named(16/21, 244/315, 8/9, 11/12, 2/3, 13/18,
                                      subset_accuracy=1/3)},
        f1={"threshold_0.5": [6/7, 4/5, 2/3]},
        headline=16/21, headline_name="pooled F1 at threshold 0.5", auroc=[7/9, 8/9, None],
        confusion=[[[2, 1], [0, 3]], [[3, 0], [1, 2]], [[0, 0], [3, 3]]]),
}


@pytest.mark.parametrize("name", RECORDED)
def test_scores_equal_scikit_learn(name):
    case = RECORDED[name]
    truth = np.array(case["truth"])
    result = named_score(truth, np.array(case["probabilities"]), multi_label=name == "several")
    assert result.keys() & {"argmax", "threshold_0.5"} == case["rules"].keys()
    for rule, wanted in case["rules"].items():
        scores, classes = result[rule], result[rule]["per_class"]
        assert {key: scores[key] for key in wanted} == pytest.approx(wanted, abs=1e-12)
        assert [row["f1"] for row in classes] == pytest.approx(case["f1"][rule], abs=1e-12)
        assert [row["n"] for row in classes] == truth.sum(0).tolist()
    assert result["headline"] == pytest.approx(case["headline"], abs=1e-12)
    assert result["headline_name"] == case["headline_name"]
    assert list(result["auroc"]["per_class"].values()) == pytest.approx(case["auroc"], abs=1e-12)
    assert result["confusion"] == case["confusion"]
    assert json.loads(json.dumps(result, allow_nan=False)) == result


@pytest.mark.parametrize("n", [1, 40])
def test_areas_are_shares_of_pairs_in_the_right_order(n):
    truth, p = random_case(n, 5, False)
    got, areas = named_score(truth, p, False)["auroc"], []
    for c, area in enumerate(got["per_class"].values()):
        have, lack = p[truth[:, c] == 1, c], p[truth[:, c] == 0, c]
        right = [(a > b) + 0.5 * (a == b) for a in have for b in lack]
        assert area == (pytest.approx(np.mean(right)) if right else None)
        areas += [area] if right else []
    assert got["macro"] == (pytest.approx(np.mean(areas)) if areas else None)


def test_no_class_in_any_image_leaves_balanced_accuracy_undefined():
    nothing = named_score(np.zeros((3, 2)), np.full((3, 2), .9), True)["threshold_0.5"]
    assert nothing["balanced_accuracy"] is None and nothing["f1_macro"] == 0


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
    truth, p = random_case(30, 4, multi_label)
    generator, headlines = np.random.default_rng(7), []
    for _ in range(50):
        rows = generator.integers(30, size=30)
        headlines.append(named_score(truth[rows], p[rows], multi_label)["headline"])
    got = m.bootstrap_interval(truth, p, multi_label, draws=50, seed=7)
    assert got == pytest.approx(tuple(np.quantile(headlines, [.025, .975])), abs=1e-12)


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


def two_networks():
    torch.manual_seed(0)
    cnn = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
    return {"cnn": cnn, "vit": nn.Linear(4, 3)}


def test_a_row_of_gauges():
    networks = two_networks()
    gauges = m.Gauges(networks)
    generator = torch.Generator().manual_seed(1)
    steps = [(torch.randn(8, 6, generator=generator), torch.ones(8, 3)) for _ in range(40)]
    row, last = gauges(steps), torch.cat([a for a, _ in steps[-32:]])  # 256 images
    assert list(row) == [f"{a}_{g}" for a in ("cnn", "vit") for g in ("cosine", "rank", "moved")]
    assert row["cnn_rank"] == m.collapse_gauges(last)["rank"] and row["cnn_moved"] == 0
    with torch.no_grad():
        for parameter in networks["vit"].parameters():
            parameter *= 3  # |3 p - p| / |p| = 2
    row = gauges([(steps[0][0] * math.inf, steps[0][1], "more is left alone")])
    assert row["vit_moved"] == pytest.approx(2) and row["vit_cosine"] == pytest.approx(1)
    assert row["cnn_cosine"] is None and row["cnn_rank"] is None


def test_the_untrained_row_leaves_buffers_graph_and_random_stream_alone():
    networks = two_networks()
    buffers = list(networks["cnn"].buffers())
    before = [buffer.clone() for buffer in buffers]
    loader = torch.utils.data.DataLoader(torch.randn(512, 4) + 3, 100, shuffle=True)

    def forward(batch):
        return tuple(network(batch) for network in networks.values())
    stream = torch.get_rng_state()
    outputs = m.Gauges(networks).untrained(forward, loader)
    assert len(outputs) == 3  # no more than 256 images need
    assert (outputs[0][0] == 0).any() and not outputs[0][0].requires_grad  # dropout: training mode
    assert torch.equal(stream, torch.get_rng_state()) and all(map(torch.equal, before, buffers))


def test_a_collapsed_network_is_named_once():
    gauges = m.Gauges(two_networks())
    first = {"cnn_cosine": .1, "cnn_rank": 30., "vit_cosine": .995, "vit_rank": 1.2}
    fine = {"cnn_cosine": .98, "cnn_rank": 9., "vit_cosine": None, "vit_rank": None}
    assert not list(gauges.warnings(fine, first))
    same = {"cnn_cosine": .9991, "cnn_rank": 1.1, "vit_cosine": .5, "vit_rank": 9.}
    sentence, = gauges.warnings(same, first)
    assert sentence.startswith("cnn ") and "0.999" in sentence and "0.100" in sentence
    zero = {"cnn_cosine": 1., "cnn_rank": 1., "vit_cosine": 0., "vit_rank": 0.}
    sentence, = gauges.warnings(zero, None)
    assert sentence.startswith("vit ") and "before" not in sentence
    assert not list(gauges.warnings(zero, first))
