"""The loss that is not the paper's, and the probes that look at what either loss has made."""

import math

import numpy as np
import pytest
import torch

from cass import contrast_loss, pretrain_cass
from metrics import network_features, probe_scores


def by_hand(a: np.ndarray, b: np.ndarray, temperature: float) -> float:
    """The loss with explicit loops, in float64."""
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    n, total = len(a), 0.0
    for x, y in ((a, b), (b, a)):
        for i in range(n):
            scores = [math.exp(x[i] @ y[j] / temperature) for j in range(n)]
            total -= math.log(scores[i] / sum(scores))
    return total / (2 * n)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_contrast_loss_equals_explicit_loops(temperature):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 7, 5))
    got = contrast_loss(torch.tensor(a), torch.tensor(b), temperature).item()
    assert abs(got - by_hand(a, b, temperature)) < 1e-5


def test_contrast_loss_is_log_n_when_all_outputs_are_equal_and_near_zero_when_all_differ():
    same, own = torch.ones(8, 16), torch.eye(8, 16)
    assert contrast_loss(same, same).item() == pytest.approx(math.log(8), abs=1e-5)
    assert contrast_loss(own, own).item() < 1e-2 < contrast_loss(own, own.roll(1, 0)).item()


def test_contrast_loss_is_symmetric_and_free_of_scale_and_in_float32_under_autocast():
    a, b = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(0))
    value = contrast_loss(a, b)
    torch.testing.assert_close(value, contrast_loss(b, a))
    torch.testing.assert_close(value, contrast_loss(3 * a, 0.01 * b))
    with torch.autocast("cpu", torch.bfloat16):
        under = contrast_loss(a, b)
    assert under.dtype == torch.float32
    torch.testing.assert_close(under, value)


def test_contrast_keeps_apart_what_cosine_lets_fall_together():
    """Two linear arms on the same images: Equation 1 makes the outputs alike, contrast does not."""
    from metrics import collapse_gauges

    images = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(1)) + 2
    cosine = {}
    for loss in ("cosine", "contrast"):
        torch.manual_seed(0)
        arms = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 32)) for _ in range(2)]
        pretrain_cass(*arms, [images] * 10, epochs=10, loss=loss, lr=1e-2, swa_start=1)
        cosine[loss] = collapse_gauges(arms[0](images))["cosine"]
    assert cosine["cosine"] > 0.99 and cosine["contrast"] < 0.6


def clusters(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    label = rng.integers(3, size=n)
    x = np.eye(3, 8)[label] * 4 + rng.normal(size=(n, 8))
    return torch.tensor(x), torch.eye(3)[label]


def test_probes_find_clusters_and_only_guess_without_them():
    train, validation = clusters(90, 0), clusters(60, 1)
    good = probe_scores(train, validation, multi_label=False)
    assert min(good.values()) > 0.85
    shuffled = train[0], train[1][torch.randperm(90, generator=torch.Generator().manual_seed(0))]
    assert max(probe_scores(shuffled, validation, multi_label=False).values()) < 0.6
    few = (train[0][:5], train[1][:5])
    assert set(probe_scores(few, validation, multi_label=False)) == {"knn", "linear"}  # k = min(k, n)


def test_features_leave_the_network_and_the_random_stream_alone():
    import timm

    network = timm.create_model("test_resnet", num_classes=5)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    batches = [(torch.randn(4, 3, 32, 32), torch.eye(4)) for _ in range(2)]
    stream = torch.get_rng_state()
    (x, y), (z, _) = network_features(network, batches, batches[:1])
    assert x.shape == (8, network.num_features) and y.shape == (8, 4) and len(z) == 4 and network.training
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert torch.equal(stream, torch.get_rng_state())


@pytest.mark.parametrize("command", ["cass", "dino"])
def test_probing_adds_columns_and_changes_no_weight(command, tmp_path):
    """Labels are looked with and never trained on: the same bits with and without probes."""
    import importlib
    import json

    from helpers import class_folders

    class_folders(tmp_path / "d", cat=20, dog=20)
    networks = {"cass": ["--cnn", "test_resnet", "--transformer", "test_vit"], "dino":
                ["--arch", "test_vit", "--out-dim", "16"]}[command]
    states = []
    for probes in ([], ["--probe-every", "1"]):
        out = tmp_path / f"run{len(probes)}"
        importlib.import_module(command).main(
            ["--data", str(tmp_path / "d"), "--init", "random", "--image-size", "32", "--epochs", "2", "--batch-size",
             "8", "--workers", "0", "--out", str(out), *networks, *probes])
        file = out / ("cnn.pt" if command == "cass" else "backbone.pt")
        states.append(torch.load(file, weights_only=True)["state_dict"])
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        arm = "cnn" if command == "cass" else "backbone"
        assert all((f"{arm}_knn" in row and f"{arm}_linear" in row) == bool(probes) for row in rows) and len(rows) == 3
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
