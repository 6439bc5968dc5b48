"""extras/curves.py: what is drawn is what the logs say."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from extras import curves
from extras.pictures import LINES, draw_curves
from helpers import sentence


def run(folder: Path, arms: dict[str, str], rows: list[dict]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"arms": arms}))
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def places(image: Image.Image, colour: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels of one colour."""
    return np.nonzero((np.abs(np.asarray(image).astype(int) - colour) < 30).all(2))


def test_curves_are_read_by_network_and_gaps_are_left_out(tmp_path):
    rows = [{"epoch": 0, "cnn_cosine": 0.5, "transformer_cosine": 0.9, "cnn_knn": 0.6},
            {"epoch": 1, "cnn_cosine": 0.7, "transformer_cosine": None},
            {"epoch": 2, "cnn_cosine": 1.0, "transformer_cosine": 1.0, "cnn_knn": 0.4}]
    found = curves.read_curves(run(tmp_path / "a", {"cnn": "resnet18", "transformer": "vit"}, rows))
    assert found["resnet18"]["cosine"] == ([0, 1, 2], [0.5, 0.7, 1.0])
    assert found["resnet18"]["knn"] == ([0, 2], [0.6, 0.4]) and found["vit"]["knn"] == ([], [])
    assert found["vit"]["cosine"] == ([0, 2], [0.9, 1.0])


def test_a_curve_goes_from_its_first_value_to_its_last_in_its_own_colour():
    image = draw_curves([([0, 1, 2], [0.0, 0.5, 1.0]), ([0, 1, 2], [1.0, 0.5, 0.0])], (360, 180))
    for colour, rising in zip(LINES, (True, False)):
        y, x = places(image, colour)
        left, right = y[x < x.min() + 10].mean(), y[x > x.max() - 10].mean()
        assert bool(left > right) is rising and x.min() < 60 and x.max() > 330  # y counts from the top
    beyond = draw_curves([([0, 1], [0.0, 40.0])])  # not between 0 and 1: the frame grows with it
    y, _ = places(beyond, LINES[0])
    assert y.min() < 15 and y.max() > 150


def test_the_command_draws_runs_beside_each_other_and_names_what_is_no_run(tmp_path, capsys):
    rows = [{"epoch": e, "backbone_cosine": 0.1 * e, "backbone_knn": 0.2} for e in range(4)]
    a, b = (run(tmp_path / name, {"backbone": arch}, rows) for name, arch in (("one", "resnet18"), ("two", "vit")))
    curves.main([str(a), str(b), "--out", str(tmp_path / "c.png")])
    image = Image.open(tmp_path / "c.png")
    assert image.width > 2 * 360  # a column for each network
    for colour, left in zip(LINES, (True, False)):  # below the legend, each in the column of its network
        y, x = places(image.crop((0, 80, *image.size)), colour)
        assert len(x) > 100 and ((x < image.width / 2).all() if left else (x > image.width / 2 - 10).all())
    assert "no run folder" in sentence(capsys, lambda: curves.main([str(tmp_path), "--out", str(tmp_path / "d.png")]))
    assert "--probe-every" in sentence(capsys, lambda: curves.main([str(a), "--gauges", "linear", "--out", "x.png"]))
