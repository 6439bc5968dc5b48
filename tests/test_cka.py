"""extras/cka.py: CKA and unbiased HSIC against their definitions, and the command."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import make_run, put, sentence
from PIL import Image
from torch import Tensor, nn

from extras import cka, maps
from extras.features import plain_batches, read_networks


def some_features(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(N, 5) and, from three of these and noise, (N, 3)."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=draw)
    return x, x[:, :3] + torch.randn(n, 3, generator=draw)


class Layers(nn.Module):
    """Two layers of 8 features; what they give can be turned by `turn` (8, 8)."""
    feature_info = [{"module": "a"}, {"module": "b"}, {"module": "gone"}]

    def __init__(self, turn: Tensor) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(2)
        self.a, self.b = nn.Linear(27, 8), nn.Linear(8, 8)
        self.a.weight.data = turn @ torch.randn(8, 27, generator=draw)
        self.b.weight.data = turn @ torch.randn(8, 8, generator=draw) @ turn.T

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.flatten(1)))


def test_hsic_is_the_mean_over_all_quadruples() -> None:
    x, y = some_features(6)
    k, l = x.double() @ x.double().T, y.double() @ y.double().T
    terms = [k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q])
             for i, j, q, r in itertools.permutations(range(6), 4)]
    assert cka.hsic(k, l) == pytest.approx(float(sum(terms) / len(terms)), abs=1e-12)
    # Taking off a batch's mean changes nothing, so it may come first.
    assert cka.hsic(cka.gram(x), cka.gram(y)) == pytest.approx(cka.hsic(k, l), abs=1e-5)


def test_small_batches_estimate_the_cka_of_all_images() -> None:
    """x and y = x + noise have CKA 1/2 (by covariances, all 4 dimensions alike); x and the noise
    have 0, where the biased estimate from batches of 8 says 0.33."""
    class Noisy(nn.Module):
        feature_info = [{"module": "both"}, {"module": "noise"}]

        def __init__(self) -> None:
            super().__init__()
            self.both, self.noise = nn.Linear(8, 4), nn.Linear(8, 4)
            self.both.weight.data = torch.cat([torch.eye(4), torch.eye(4)], 1)
            self.noise.weight.data = torch.cat([torch.zeros(4, 4), torch.eye(4)], 1)

        def forward(self, x: Tensor) -> Tensor:
            self.both(x), self.noise(x)
            return x[:, :4]

    draw = torch.Generator().manual_seed(8)
    loader = [torch.randn(8, 8, generator=draw) for _ in range(200)]
    matrix = cka.cka_matrix(Noisy(), Noisy(), loader)
    expected = [[1, .5, .5], [.5, 1, 0], [.5, 0, 1]]  # both, noise, output x
    np.testing.assert_allclose(matrix, expected, atol=0.04)


def test_a_rotated_representation_is_the_same_and_a_constant_one_has_no_cka() -> None:
    draw = torch.Generator().manual_seed(3)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=draw)).Q
    loader = [torch.randn(12, 3, 3, 3, generator=draw) for _ in range(4)]
    matrix = cka.cka_matrix(Layers(torch.eye(8)), Layers(3 * rotation), loader)
    assert matrix.shape == (3, 3)  # a, b and the output
    np.testing.assert_allclose(np.diag(matrix), 1, atol=1e-4)
    assert matrix[0, 1] < 0.95
    constant = cka.cka_matrix(Layers(torch.eye(8)), Layers(torch.zeros(8, 8)), loader)
    assert np.isnan(constant).all()


def test_layers_are_blocks_and_the_output() -> None:
    assert list(cka.cka_layers(timm.create_model("test_resnet"))) == [
        "act1", "layer1.0", "layer2.0", "layer3.0", "layer4.0", "output"]
    assert list(cka.cka_layers(timm.create_model("test_vit"))) == [
        *(f"blocks.{i}" for i in range(6)), "output"]


def test_the_command_compares_both_networks(tmp_path: Path, capsys) -> None:
    counts = {"train/a": 12, "train/b": 12, "test/a": 8, "test/b": 12}
    data = put(tmp_path / "d", *(f"{part}/{i}.png" for part, n in counts.items() for i in range(n)))
    run = make_run(tmp_path / "run", data)
    cka.main(["--weights", str(run), "--data", str(data), "--device", "cpu"])
    arrays = np.load(run / "maps" / "cka.npz")
    cnn, vit = read_networks(run, torch.device("cpu")).values()
    images = maps.tested_images(data, run, 20)
    mixed = np.random.default_rng((0, 0)).permutation(20)[:16]  # one batch, as epoch 0 has it
    rows = [images.rows[i] for i in mixed]
    batches = plain_batches(replace(images, rows=rows), 32)
    assert arrays["cka"].shape == (6, 7)
    np.testing.assert_allclose(arrays["cka"], cka.cka_matrix(cnn, vit, batches), atol=1e-5)
    with Image.open(run / "maps" / "cka.png") as picture:
        assert picture.width > 700
    alone = make_run(tmp_path / "alone", data, backbone="test_vit")
    options = ["--data", str(data), "--weights"]
    assert "alone has 1" in sentence(capsys, lambda: cka.main([*options, str(alone)]))
    few = put(tmp_path / "few", "train/a/1.png", "train/b/1.png", "test/a/1.png", "test/b/1.png")
    run = make_run(tmp_path / "small", few)
    options = ["--data", str(few), "--weights", str(run)]
    assert "at least 4" in sentence(capsys, lambda: cka.main(options))
