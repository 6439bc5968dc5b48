"""extras/cka.py: CKA and unbiased HSIC against their definitions, and the command."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from helpers import make_run, put
from PIL import Image
from torch import Tensor, nn

from extras import cka, maps
from extras.features import plain_batches, read_networks


def test_hsic_is_the_mean_over_all_quadruples():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, generator=draw)
    y = x[:, :3] + torch.randn(6, 3, generator=draw)
    k, l = x.double() @ x.double().T, y.double() @ y.double().T
    terms = [k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q])
             for i, j, q, r in itertools.permutations(range(6), 4)]
    assert cka.hsic(k, l) == pytest.approx(float(sum(terms) / len(terms)), abs=1e-12)
    # Taking off a batch's mean changes nothing, so it may come first.
    assert cka.hsic(cka.gram(x), cka.gram(y)) == pytest.approx(cka.hsic(k, l), abs=1e-5)


class Noisy(nn.Module):
    """Of 8 numbers the first half is x, the second noise; layers for x + noise and for noise."""

    feature_info = [{"module": "both"}, {"module": "noise"}]

    def __init__(self) -> None:
        super().__init__()
        self.both, self.noise = nn.Linear(8, 4), nn.Linear(8, 4)
        self.both.weight.data = torch.cat([torch.eye(4), torch.eye(4)], 1)
        self.noise.weight.data = torch.cat([torch.zeros(4, 4), torch.eye(4)], 1)

    def forward(self, x: Tensor) -> Tensor:
        self.both(x), self.noise(x)
        return x[:, :4]


def test_small_batches_estimate_the_cka_of_all_images():
    """x and y = x + noise have CKA 1/2 (by covariances, all 4 dimensions alike); x and the noise
    have 0, where the biased estimate from batches of 8 says 0.33."""
    draw = torch.Generator().manual_seed(8)
    loader = [torch.randn(8, 8, generator=draw) for _ in range(200)]
    matrix = cka.cka_matrix(Noisy(), Noisy(), loader)
    expected = [[1, .5, .5], [.5, 1, 0], [.5, 0, 1]]  # both, noise, output x
    np.testing.assert_allclose(matrix, expected, atol=0.04)


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


def test_a_rotated_representation_is_the_same_and_a_constant_one_has_no_cka():
    draw = torch.Generator().manual_seed(3)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=draw)).Q
    loader = [torch.randn(12, 3, 3, 3, generator=draw) for _ in range(4)]
    matrix = cka.cka_matrix(Layers(torch.eye(8)), Layers(3 * rotation), loader)
    assert matrix.shape == (3, 3)  # a, b and the output
    np.testing.assert_allclose(np.diag(matrix), 1, atol=1e-4)
    assert matrix[0, 1] < 0.95
    assert np.isnan(cka.cka_matrix(Layers(torch.eye(8)), Layers(torch.zeros(8, 8)), loader)).all()


@pytest.mark.parametrize("name, layers", [
    ("test_resnet", ["act1", "layer1.0", "layer2.0", "layer3.0", "layer4.0", "output"]),
    ("test_vit", [*(f"blocks.{i}" for i in range(6)), "output"])])
def test_layers_are_blocks_and_the_output(name, layers):
    assert list(cka.cka_layers(timm.create_model(name))) == layers


def test_the_command_compares_both_networks(scans, scans_run, tmp_path):
    cka.main(["--weights", str(scans_run), "--data", str(scans), "--device", "cpu", "--out",
              str(tmp_path)])
    cnn, vit = read_networks(scans_run, torch.device("cpu")).values()
    images = maps.tested_images(scans, scans_run, 20)
    mixed = np.random.default_rng((0, 0)).permutation(20)[:16]  # one batch, as epoch 0 has it
    batches = plain_batches(replace(images, rows=[images.rows[i] for i in mixed]), cnn)
    found = np.load(tmp_path / "cka.npz")["cka"]
    assert found.shape == (6, 7)
    np.testing.assert_allclose(found, cka.cka_matrix(cnn, vit, batches), atol=1e-5)
    with Image.open(tmp_path / "cka.png") as picture:
        assert picture.width > 700


def test_user_errors_are_one_sentence(scans, tmp_path, said):
    alone = make_run(tmp_path / "alone", scans, backbone="test_vit")
    assert "alone has 1" in said(cka.main, "--data", scans, "--weights", alone)
    few = put(tmp_path / "few", "train/a/1.png", "train/b/1.png", "test/a/1.png", "test/b/1.png")
    run = make_run(tmp_path / "small", few)
    assert "at least 4" in said(cka.main, "--data", few, "--weights", run)
