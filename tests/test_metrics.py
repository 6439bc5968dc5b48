"""metrics.py: hand-computed values, explicit loops, and numbers recorded from scikit-learn 1.9.1."""

import ast
import itertools
import json
import math
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

FILE = Path(__file__).resolve().parent.parent / "metrics.py"
import metrics as m  # noqa: E402


def quiet_score(truth, probabilities, multi_label):
    """`score` with classes c0, c1, ... and its warning muted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return m.score(truth, probabilities, [f"c{k}" for k in range(np.shape(truth)[1])], multi_label)


def random_case(rng, n, k, multi_label):
    truth = rng.integers(2, size=(n, k)) if multi_label else np.eye(k, dtype=int)[rng.integers(k, size=n)]
    return truth, np.round(rng.random((n, k)) * 0.6 + truth * 0.2, 1)  # one decimal: many ties, and exact halves


# %% Scores: recorded from scikit-learn 1.9.1 (f1_score, precision_score, recall_score, accuracy_score,
# balanced_accuracy_score, roc_auc_score, confusion_matrix, multilabel_confusion_matrix), zero_division at its default

NAMES = ("f1_pooled", "f1_macro", "precision_pooled", "precision_macro", "recall_pooled", "recall_macro")
RECORDED = {
    # class c3 has no image but is predicted, c2 is never the largest, and the two rules differ
    "absent": dict(
        truth=np.eye(4)[[0, 0, 0, 1, 1, 2, 2, 0]], multi_label=False,
        probabilities=[[.9, .1, .2, .3], [.6, .7, .1, .1], [.2, .3, .1, .8], [.1, .8, .4, .2],
                       [.55, .45, .1, .1], [.3, .6, .5, .1], [.7, .2, .6, .2], [.4, .1, .1, .1]],
        argmax=(.375, .225, .375, .20833333333333331, .375, .25),
        argmax_f1=[.5, .4, 0, 0], accuracy=.375, balanced=.3333333333333333,
        threshold=(.47058823529411764, .39166666666666666, .4444444444444444, .4583333333333333, .5, .375),
        threshold_f1=[.5, .4, .6666666666666666, 0], subset=.25,
        auroc=[.625, .8333333333333334, 1., None],
        confusion=[[2, 1, 0, 1], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]),
    # ties in the probabilities, some exactly 0.5, and c2 in every image
    "multi-label": dict(
        truth=[[1, 0, 1], [1, 1, 1], [0, 1, 1], [0, 0, 1], [1, 0, 1], [0, 1, 1]], multi_label=True,
        probabilities=[[.8, .5, .9], [.8, .5, .4], [.8, .7, .6], [.2, .5, .5], [.6, .2, .7], [.2, .9, .1]],
        threshold=(.7619047619047619, .7746031746031745, .8888888888888888, .9166666666666666,
                   .6666666666666666, .7222222222222222),
        threshold_f1=[.8571428571428571, .8, .6666666666666666], subset=.3333333333333333,
        auroc=[.7777777777777779, .8888888888888888, None],
        confusion=[[[2, 1], [0, 3]], [[3, 0], [1, 2]], [[0, 0], [3, 3]]]),
    "one image": dict(
        truth=[[0, 1, 0]], probabilities=[[.6, .3, .2]], multi_label=False,
        argmax=(0, 0, 0, 0, 0, 0), argmax_f1=[0, 0, 0], accuracy=0, balanced=0,
        threshold=(0, 0, 0, 0, 0, 0), threshold_f1=[0, 0, 0], subset=0,
        auroc=[None, None, None], confusion=[[0, 0, 0], [1, 0, 0], [0, 0, 0]]),
    "constant scores": dict(
        truth=np.eye(3)[[0, 1, 1, 2]], probabilities=np.full((4, 3), .5), multi_label=False,
        argmax=(.25, .13333333333333333, .25, .08333333333333333, .25, .3333333333333333),
        argmax_f1=[.4, 0, 0], accuracy=.25, balanced=.3333333333333333,
        threshold=(0, 0, 0, 0, 0, 0), threshold_f1=[0, 0, 0], subset=0,
        auroc=[.5, .5, .5], confusion=[[1, 0, 0], [2, 0, 0], [1, 0, 0]]),
}


@pytest.mark.parametrize("name", RECORDED)
def test_scores_equal_scikit_learn(name):
    case = RECORDED[name]
    result = quiet_score(case["truth"], case["probabilities"], case["multi_label"])
    for rule, key in (("argmax", "argmax"), ("threshold", "threshold_0.5")):
        if rule not in case:
            assert key not in result
            continue
        assert [result[key][n] for n in NAMES] == pytest.approx(case[rule], abs=1e-12)
        assert [row["f1"] for row in result[key]["per_class"]] == pytest.approx(case[rule + "_f1"], abs=1e-12)
    assert result["threshold_0.5"]["subset_accuracy"] == pytest.approx(case["subset"])
    if not case["multi_label"]:
        assert result["argmax"]["accuracy"] == pytest.approx(case["accuracy"])
        assert result["argmax"]["balanced_accuracy"] == pytest.approx(case["balanced"])
    assert list(result["auroc"]["per_class"].values()) == pytest.approx(case["auroc"], abs=1e-12)
    defined = [a for a in case["auroc"] if a is not None]
    assert result["auroc"]["macro"] == (pytest.approx(np.mean(defined)) if defined else None)
    assert result["confusion"] == case["confusion"]
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_headline():
    absent, multi = RECORDED["absent"], RECORDED["multi-label"]
    result = quiet_score(absent["truth"], absent["probabilities"], False)
    assert (result["headline"], result["n"]) == (pytest.approx(.225), 8) and "argmax" in result["headline_name"]
    result = quiet_score(multi["truth"], multi["probabilities"], True)
    assert result["headline"] == pytest.approx(16 / 21) and "pooled" in result["headline_name"]


@pytest.mark.parametrize("multi_label", [False, True])
def test_scores_equal_explicit_loops(multi_label):
    rng = np.random.default_rng(3)
    for n, k in [(1, 2), (7, 3), (40, 5)]:
        truth, p = random_case(rng, n, k, multi_label)
        result = quiet_score(truth, p, multi_label)
        f1s, recalls, total = [], [], dict(tp=0, fp=0, fn=0)
        for c in range(k):
            tp = sum(truth[i, c] == 1 and p[i, c] > 0.5 for i in range(n))
            fp = sum(truth[i, c] == 0 and p[i, c] > 0.5 for i in range(n))
            fn = sum(truth[i, c] == 1 and not p[i, c] > 0.5 for i in range(n))
            row = result["threshold_0.5"]["per_class"][c]
            assert (row["tp"], row["fp"], row["fn"], row["tn"], row["n"]) == (tp, fp, fn, n - tp - fp - fn, tp + fn)
            total = {"tp": total["tp"] + tp, "fp": total["fp"] + fp, "fn": total["fn"] + fn}
            f1s.append(2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0)
            recalls.append(tp / (tp + fn) if tp + fn else 0)
            pairs = [(a, b) for a in range(n) for b in range(n) if truth[a, c] and not truth[b, c]]
            area = [(p[a, c] > p[b, c]) + 0.5 * (p[a, c] == p[b, c]) for a, b in pairs]
            assert result["auroc"]["per_class"][f"c{c}"] == (pytest.approx(np.mean(area)) if pairs else None)
        got = result["threshold_0.5"]
        both = 2 * total["tp"]
        assert got["f1_macro"] == pytest.approx(np.mean(f1s))
        assert got["recall_macro"] == pytest.approx(np.mean(recalls))
        assert got["f1_pooled"] == pytest.approx(both / max(1, both + total["fp"] + total["fn"]))
        exact = [((p[i] > .5) == truth[i]).all() for i in range(n)]
        assert got["subset_accuracy"] == pytest.approx(np.mean(exact))


def test_macro_recall_counts_absent_classes_and_balanced_accuracy_does_not():
    truth, p = np.eye(3)[[0, 0, 1, 1]], np.eye(3)[[0, 0, 1, 2]] * 0.9
    got = quiet_score(truth, p, False)["argmax"]
    assert got["balanced_accuracy"] == pytest.approx((1 + .5) / 2)
    assert got["recall_macro"] == pytest.approx((1 + .5) / 3)


def test_decide():
    p = np.array([[.5, .50001, .5], [.2, .2, .1], [.9, .3, .9]])
    assert m.decide(p, "threshold").tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 1]]
    assert m.decide(p, "argmax").tolist() == [[0, 1, 0], [1, 0, 0], [1, 0, 0]]
    with pytest.raises(ValueError, match="rule"):
        m.decide(p, "softmax")


def test_one_warning_names_the_classes():
    case = RECORDED["absent"]
    with pytest.warns(UserWarning) as caught:
        m.score(case["truth"], case["probabilities"], ["glioma", "pituitary", "notumor", "meningioma"], False)
    text = str(caught[0].message)
    assert len(caught) == 1 and "no image has (recall 0): meningioma" in text
    assert "never predicted by argmax (precision 0): notumor" in text and "glioma" not in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        m.score(np.eye(2), np.eye(2), ["a", "b"], False)


@pytest.mark.parametrize("truth, p, k, multi_label, message", [
    (np.eye(2), [[np.nan, 0], [0, 1]], 2, False, "probabilities must"),    # diverged
    (np.eye(2), [[1.5, 0], [0, 1]], 2, False, "probabilities must"),       # logits instead of probabilities
    (np.eye(2), [[1, -.1], [0, 1]], 2, False, "probabilities must"),
    (np.ones((2, 2)), np.eye(2), 2, False, "truth must"),                  # two classes in a multi-class row
    (np.eye(2) * 2, np.eye(2), 2, True, "truth must"),                     # not 0 or 1
    (np.eye(2), np.eye(3), 2, False, "no match"), (np.eye(2), np.eye(2), 3, False, "no match"),
    (np.zeros((0, 2)), np.zeros((0, 2)), 2, True, "no match"),
])
def test_bad_input_is_refused(truth, p, k, multi_label, message):
    with pytest.raises(ValueError, match=message):
        m.score(truth, p, ["x"] * k, multi_label)


def test_counts_and_confusion_refuse_what_they_cannot_count():
    with pytest.raises(ValueError):
        m.class_counts(np.eye(3), np.ones((3, 1)))  # would broadcast
    with pytest.raises(ValueError):
        m.confusion_matrix(np.eye(2), np.array([[1, 1], [0, 1]]), multi_label=False)


@pytest.mark.parametrize("multi_label", [False, True])
def test_bootstrap_is_the_quantile_of_resampled_headlines(multi_label):
    truth, p = random_case(np.random.default_rng(5), 30, 4, multi_label)
    rng, headlines = np.random.default_rng(7), []
    for _ in range(50):
        rows = rng.integers(30, size=30)
        headlines.append(quiet_score(truth[rows], p[rows], multi_label)["headline"])
    expected = np.quantile(headlines, [.05, .95])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = m.bootstrap_interval(truth, p, multi_label, draws=50, seed=7, level=0.9)
    assert got == pytest.approx(tuple(expected), abs=1e-12) and got[0] < got[1]


def test_bootstrap_properties():
    truth, p = random_case(np.random.default_rng(6), 400, 4, False)
    low, high = m.bootstrap_interval(truth, p, False, draws=200)
    assert low < quiet_score(truth, p, False)["headline"] < high
    assert (low, high) == m.bootstrap_interval(truth, p, False, draws=200)
    few = m.bootstrap_interval(truth[:50], p[:50], False, draws=200)
    assert few[1] - few[0] > 1.5 * (high - low)  # about 1 / sqrt(N): 2.8 times
    assert m.bootstrap_interval(truth, truth, False, draws=20) == (1, 1)
    with pytest.raises(ValueError):
        m.bootstrap_interval(truth[:0], p[:0], False)


def test_mean_and_spread():
    assert m.mean_and_spread([1, 2, 3, 6]) == (3, pytest.approx(math.sqrt(14 / 3)), 4)
    assert m.mean_and_spread([0.7]) == (pytest.approx(0.7), None, 1)
    with pytest.raises(ValueError):
        m.mean_and_spread([])


# Later paper, Tables 2 to 5: (ResNet-50, ViT-B/16) of each data set at 1, 10 and 100 % of the labels.
PAPER = {
    100: ({"autoimmune": (.8650, .8894), "dermofit": (.7132, .6667), "mri": (.9909, .9279), "isic": (.543, .5819)},
          {"autoimmune": (.84252, .8639), "dermofit": (.6775, .4810), "mri": (.9900, .8841), "isic": (.493, .5408)}),
    10: ({"autoimmune": (.8158, .8717), "dermofit": (.4367, .3896), "mri": (.8925, .7833), "isic": (.41, .4395)},
         {"autoimmune": (.8237, .8445), "dermofit": (.3749, .332), "mri": (.92325, .7529), "isic": (.3797, .3998)}),
    1: ({"mri": (.40816, .3345), "isic": (.3617, .3973)}, {"mri": (.63405, .3211), "isic": (.328, .3676)}),
}


@pytest.mark.parametrize("percent, points", [(100, 10.13), (10, 5.21), (1, -7.45)])
def test_gain_from_the_papers_tables(percent, points):
    cass, dino = PAPER[percent]
    assert m.gain(cass, dino, list(cass)) == pytest.approx(points, abs=0.005)


def test_gain_counts_the_named_data_sets_only():
    ours, base = {"a": (.5, .6), "b": (.9, .9)}, {"a": (.4, .4), "b": (.1, .1)}
    assert m.gain(ours, base, ["a"]) == pytest.approx(30)
    with pytest.raises(KeyError):
        m.gain(ours, {"a": (.4, .4)}, ["a", "b"])
    with pytest.raises(ValueError):
        m.gain(ours, {"a": (.4,)}, ["a"])


# %% Collapse


def test_gauges_equal_explicit_loops():
    z = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)) + 0.5
    unit = [[float(x) / math.sqrt(sum(float(y) ** 2 for y in row)) for x in row] for row in z]
    pairs = list(itertools.permutations(range(9), 2))
    cosine = sum(sum(a * b for a, b in zip(unit[i], unit[j])) for i, j in pairs) / len(pairs)
    spread = np.mean([np.std([row[d] for row in unit], ddof=1) for d in range(5)]) * math.sqrt(5)
    s = np.linalg.svd(np.array(unit), compute_uv=False)
    rank = math.exp(-sum(v / s.sum() * math.log(v / s.sum()) for v in s))
    assert m.collapse_gauges(z) == pytest.approx({"cosine": cosine, "spread": spread, "rank": rank}, abs=1e-6)
    scaled = m.collapse_gauges(z * torch.linspace(.1, 9, 9)[:, None])  # the length of a row must not matter
    assert scaled == pytest.approx({"cosine": cosine, "spread": spread, "rank": rank}, abs=1e-6)
    assert spread <= math.sqrt(1 - cosine)


def test_gauges_by_hand():
    assert m.collapse_gauges(torch.eye(6)) == pytest.approx({"cosine": 0, "spread": 1, "rank": 6})
    assert m.collapse_gauges(torch.full((4, 3), 2.)) == pytest.approx({"cosine": 1, "spread": 0, "rank": 1}, abs=1e-5)
    assert m.collapse_gauges(torch.ones(5, 3))["cosine"] == 1  # not 1 + 4e-16, of which sqrt(1 - cosine) is nan
    assert m.collapse_gauges(torch.zeros(4, 3)) == {"cosine": 0, "spread": 0, "rank": 0}
    opposite = m.collapse_gauges(torch.tensor([[1., 0], [-3., 0]]))
    assert opposite["cosine"] == pytest.approx(-1) and opposite["rank"] == pytest.approx(1, abs=1e-5)
    with_zeros = m.collapse_gauges(torch.cat([torch.zeros(2, 3), torch.eye(3)]))
    assert with_zeros["cosine"] == 0 and with_zeros["rank"] == pytest.approx(3)
    assert with_zeros["spread"] == pytest.approx(math.sqrt(3 / 5))
    one = m.collapse_gauges(torch.ones(1, 4))
    assert math.isnan(one["cosine"]) and math.isnan(one["spread"]) and one["rank"] == pytest.approx(1)
    assert all(math.isnan(v) for v in m.collapse_gauges(torch.full((3, 3), math.inf)).values())
    with pytest.raises(ValueError):
        m.collapse_gauges(torch.zeros(0, 3))


def test_rounding_noise_is_not_rank():
    generator = torch.Generator().manual_seed(1)
    one, noise = torch.randn(1, 300, generator=generator), torch.randn(128, 300, generator=generator)
    ranks = [m.collapse_gauges(one * (1 + size * noise))["rank"] for size in (0, 1e-7, 1e-3, 1e-1)]
    assert ranks[0] < 1.001 and ranks[1] < 1.001 and ranks == sorted(ranks) and ranks[3] > 10
    for dtype in (torch.bfloat16, torch.float16):
        gauges = m.collapse_gauges((one * (1 + 1e-3 * noise)).to(dtype))
        assert gauges["rank"] < 1.5 and m.collapse_warning(gauges, None)
        assert m.collapse_gauges(noise.to(dtype))["spread"] == pytest.approx(1, abs=0.02)


def test_gauges_leave_graph_and_random_state_alone():
    logits = torch.randn(8, 4, requires_grad=True)
    state = torch.random.get_rng_state()
    np_state = np.random.get_state()[1].copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns when a tensor in the graph becomes a number
        m.collapse_gauges(logits)
    m.bootstrap_interval(np.eye(3), np.eye(3), False, draws=5)
    assert torch.equal(state, torch.random.get_rng_state()) and (np_state == np.random.get_state()[1]).all()
    assert logits.grad is None


def test_collapse_warning():
    fine, same = m.collapse_gauges(torch.eye(8)), m.collapse_gauges(torch.ones(8, 8))
    tiny, zero = m.collapse_gauges(torch.full((8, 8), 1e-20)), m.collapse_gauges(torch.zeros(8, 8))
    assert m.collapse_warning(fine, None) is None and m.collapse_warning(fine, same) is None
    later, already, unknown = (m.collapse_warning(same, start) for start in (fine, same, None))
    assert "not so before training" in later and "so already before training" in already
    assert "before" not in unknown and "1.000" in unknown and "loss alone" in unknown
    assert m.collapse_warning(tiny, fine) and "all zeros" in m.collapse_warning(zero, fine)
    assert m.collapse_warning(m.collapse_gauges(torch.ones(1, 8)), fine) is None
    assert m.collapse_warning({"cosine": .97, "spread": .17, "rank": 30.}, fine) is None
    assert m.collapse_warning({"cosine": .992, "spread": .09, "rank": 40.}, fine)
    few_dimensions = m.collapse_gauges(torch.eye(4, 1000))  # orthogonal, yet the spread is low
    assert few_dimensions["spread"] < 0.1 and m.collapse_warning(few_dimensions, None) is None


def test_weight_distance():
    start = [torch.tensor([3., 0]), torch.tensor([[4.]])]
    assert m.weight_distance(start, start) == 0
    assert m.weight_distance([torch.tensor([3., 3]), torch.tensor([[8.]])], start) == pytest.approx(1)  # 5 / 5
    layer = torch.nn.Linear(2, 2)
    before = [p.detach().clone() for p in layer.parameters()]
    torch.nn.utils.vector_to_parameters(2 * torch.nn.utils.parameters_to_vector(layer.parameters()), layer.parameters())
    assert m.weight_distance(layer.parameters(), before) == pytest.approx(1)
    assert m.weight_distance([torch.ones(2)], [torch.zeros(2)]) == math.inf
    assert m.weight_distance([torch.zeros(2)], [torch.zeros(2)]) == 0
    with pytest.raises(ValueError):
        m.weight_distance(start[:1], start)


# %% Similarity


def some_features(n=12, d1=5, d2=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d1, generator=generator, dtype=torch.float64)
    return x, x[:, :d2] + torch.randn(n, d2, generator=generator, dtype=torch.float64)


def test_linear_cka_equals_its_definition():
    x, y = some_features()
    xc, yc = x.numpy() - x.numpy().mean(0), y.numpy() - y.numpy().mean(0)
    expected = np.linalg.norm(yc.T @ xc) ** 2 / np.linalg.norm(xc.T @ xc) / np.linalg.norm(yc.T @ yc)  # D x D form
    assert m.linear_cka(x, y) == pytest.approx(expected, abs=1e-12) and 0.1 < expected < 0.95
    assert m.linear_cka(y, x) == pytest.approx(expected, abs=1e-12)


def test_linear_cka_properties():
    x, _ = some_features()
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0]
    assert m.linear_cka(x, 3 * x @ rotation + 7) == pytest.approx(1, abs=1e-12)
    assert m.linear_cka(x, x * torch.tensor([9., 1, 1, 1, 1])) < 0.95  # no invariance to a general linear map
    apart = torch.tensor([[1.], [1], [-1], [-1]]), torch.tensor([[1.], [-1], [1], [-1]])
    assert m.linear_cka(*apart) == pytest.approx(0, abs=1e-12)
    equal = torch.randn(1, 6, generator=torch.Generator().manual_seed(3)).repeat(12, 1)
    noise = 1 + 1e-8 * torch.randn(12, 6, generator=torch.Generator().manual_seed(4))
    assert math.isnan(m.linear_cka(x, equal)) and math.isnan(m.linear_cka(x, equal * noise))


def test_hsic_equals_the_mean_over_all_quadruples():
    x, y = some_features(n=6)
    k, l = x @ x.T, y @ y.T
    terms = [k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]) for i, j, q, r in itertools.permutations(range(6), 4)]
    assert m.hsic_unbiased(k, l) == pytest.approx(float(sum(terms) / len(terms)), abs=1e-12)
    xc = x - x.mean(0)  # taking off a batch's mean changes nothing, so it may come first
    assert m.hsic_unbiased(xc @ xc.T, l) == pytest.approx(m.hsic_unbiased(k, l), abs=1e-12)
    with pytest.raises(ValueError):
        m.hsic_unbiased(k[:3, :3], l[:3, :3])


def test_minibatch_cka():
    x, y = some_features(n=24)
    maps, flat = x[:, :4].reshape(24, 1, 2, 2), y.float()
    cka = m.MinibatchCKA(2, 3)
    num, den = np.zeros((2, 3)), [np.zeros(2), np.zeros(3)]
    for rows in (slice(0, 8), slice(8, 16), slice(16, 24)):
        xs, ys = [maps[rows], x[rows]], [flat[rows], x[rows] * 5 + 1, torch.ones(8, 2)]
        cka.add(xs, ys)
        ks, ls = ([f.flatten(1).double() @ f.flatten(1).double().T for f in fs] for fs in (xs, ys))
        num += [[m.hsic_unbiased(k, l) for l in ls] for k in ks]
        den[0] += [m.hsic_unbiased(k, k) for k in ks]
        den[1] += [m.hsic_unbiased(l, l) for l in ls]
    got = cka.matrix().numpy()
    assert got.shape == (2, 3) and np.isnan(got[:, 2]).all()
    assert got[:, :2] == pytest.approx(num[:, :2] / np.sqrt(np.outer(den[0], den[1][:2])), abs=1e-5)
    assert got[1, 1] == pytest.approx(1) and got[0, 0] < 0.9
    with pytest.raises(ValueError):
        cka.add([x], [y, y, y])


def test_minibatch_cka_does_not_depend_on_the_batch_size():
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(1600, 4, generator=generator)
    y = x + torch.randn(1600, 4, generator=generator)
    small, unrelated = m.MinibatchCKA(1, 1), m.MinibatchCKA(1, 1)
    for part_x, part_y in zip(x.split(8), y.split(8)):
        small.add([part_x], [part_y])
        unrelated.add([part_x], [part_y - part_x])
    assert float(small.matrix()) == pytest.approx(m.linear_cka(x, y), abs=0.03)
    assert float(unrelated.matrix()) == pytest.approx(0, abs=0.03)  # the biased estimate gives 0.33


# %% The file by itself


def test_file_runs_alone_and_imports_nothing_of_ours(capsys):
    text = FILE.read_text()
    names = {"__name__": "__main__"}
    exec(compile(text, "<cell>", "exec"), names)  # as pasted into a notebook: no __file__
    assert capsys.readouterr().out == ""
    assert names["gain"]({"a": [1.]}, {"a": [.5]}, ["a"]) == 50
    imported = {alias.name.split(".")[0] for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import)
                for alias in node.names}
    imported |= {node.module.split(".")[0] for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    assert imported == {"copy", "math", "warnings", "collections", "numpy", "torch"}
