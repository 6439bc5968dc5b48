"""extras/probe.py: the ridge against scikit-learn, the probes on known features, the commands."""

import numpy as np
import pytest
import timm
import torch
from helpers import COMMANDS, SMALL, class_folders, equal, log_rows, state, weights_in
from torch import Tensor

from data import read_images, split_images
from extras import probe


def waves(n: int, f: int) -> tuple[Tensor, Tensor]:
    i, j = np.mgrid[1:n + 1, 1:f + 1]
    x = np.sin(i * j**1.5 + 0.3 * i)
    y = np.stack([x[:, 0] - x[:, 1] + np.cos(7 * i[:, 0]), np.cos(i[:, 0] * 2.0)], 1)
    return torch.tensor(x - x.mean(0)), torch.tensor(y - y.mean(0))


# scikit-learn 1.9.1, RidgeCV over the same 33 penalties (its leave-one-out error by a formula of
# its own): images, features, place of the penalty, first four weights. On 60 random cases, with
# fewer images than features and with more, penalty and weights agreed to 6e-15.
@pytest.mark.parametrize("n, f, place, expected", [
    (12, 4, 15, [0.4791188948893154, -0.000989394212205215, -0.17647658594556703,
                 0.09117204351976457]),
    (8, 10, 14, [0.6062540524820172, -0.013726827602245055, -0.10837646655226449,
                 0.03441209204711282])])
def test_the_ridge_equals_scikit_learns(n, f, place, expected):
    weights, penalty = probe.fit_ridge(*waves(n, f))
    assert penalty == pytest.approx(n * 10 ** (-4 + place / 4), rel=1e-6)
    np.testing.assert_allclose(weights[:4, 0], expected, atol=1e-12)


def features(n: int, rank: int, seed: int = 0) -> tuple[tuple, tuple]:
    """Training and validation: 4 noisy classes in 200 features, on as few directions as `rank`."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.eye(4)[torch.randint(4, (n + 1000,), generator=draw)]
    x = y @ torch.randn(4, 200, generator=draw) / 4 + torch.randn(n + 1000, 200, generator=draw)
    kept = torch.linalg.qr(torch.randn(200, rank, generator=draw)).Q
    x = (x @ kept @ kept.T).double()
    return (x[:n], y[:n]), (x[n:], y[n:])


@pytest.mark.parametrize("n", [100, 200])
def test_the_linear_probe_falls_as_features_collapse(n):
    """A fixed penalty of 0.01 N scores .68 at 200 images, fewer than at 100, where this has .95."""
    scores = [probe.probe_scores(*features(n, rank), False) for rank in (200, 50, 20, 8)]
    linear = [one["linear"] for one in scores]
    assert linear == sorted(linear, reverse=True) and linear[0] > 0.85
    assert all(one["linear"] > one["knn"] - 0.05 for one in scores)


def test_probes_only_guess_without_labels_or_features():
    (x, y), validation = features(100, 200)
    shuffled = y[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    scores = probe.probe_scores((x, shuffled), validation, False)
    assert max(scores["knn"], scores["linear"]) < 0.4
    same = torch.full_like(x, 0.7) * (1 + 1e-7 * x), torch.full_like(validation[0], 0.7)
    scores = probe.probe_scores((same[0], y), (same[1], validation[1]), False)
    assert scores["linear"] == pytest.approx(scores["guess"], abs=0.02)  # rounding is no feature
    assert scores["guess"] <= 0.1  # macro F1 of one class in four
    few = probe.probe_scores((x[:5], y[:5]), validation, True)  # fewer than 20 neighbours
    assert set(few) == {"knn", "linear", "guess"} and few["guess"] == 0


def test_features_leave_the_network_and_the_random_stream_alone(pets):
    network = timm.create_model("test_resnet", num_classes=5, drop_rate=0.5)
    network.image_size = 32
    before, stream = state(network), torch.get_rng_state()
    probe.probe_network(network, split_images(read_images(pets)), 4)
    assert network.training and torch.equal(stream, torch.get_rng_state())
    assert equal(state(network), before)


@pytest.mark.parametrize("name, arm", [("cass", "cnn"), ("dino", "backbone")])
def test_looking_adds_columns_and_changes_no_weight(name, arm, pets, tmp_path, capsys):
    main, own = COMMANDS[name]
    words = f"--data {pets} {own} {SMALL} --epochs 3 --batch-size 7 --out".split()
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    main([*words, str(plain)])
    probe.main(["--every", "2", f"{name}.py", *words, str(watched)])
    seen = [{f"{arm}_knn", f"{arm}_linear"} <= set(row) for row in log_rows(watched)]
    assert seen == [True, False, True, True]  # epochs 0 and 2, and the last
    for file in probe.network_files(plain):
        assert equal(weights_in(watched / file.name), weights_in(file))
    capsys.readouterr()
    probe.main(["--weights", str(watched), "--data", str(pets), "--workers", "0"])
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 1 + len(probe.network_files(plain)) + 1 and "test_vit" in rows[-2]
    assert max(map(len, rows)) <= 100


def test_user_errors_are_one_sentence(tmp_path, said):
    data = class_folders(tmp_path / "d", cat=3)
    file = tmp_path / "run.pt"
    assert "--weights RUN" in said(probe.main)
    assert "--weights RUN" in said(probe.main, "--weights", tmp_path)
    assert "cass.py or dino.py" in said(probe.main, "--every", 2, "finetune.py")
    assert "holds no network" in said(probe.main, "--weights", tmp_path, "--data", data)
    file.touch()
    assert "split.csv" in said(probe.main, "--weights", file, "--data", data)
