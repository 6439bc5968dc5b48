"""extras/curves.py: what is drawn is what the logs say."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from extras import curves
from extras.pictures import LINES, draw_curves


def write_log(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def places(image: Image.Image, colour: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels of one colour."""
    return np.nonzero((np.abs(np.asarray(image).astype(int) - colour) < 30).all(2))


@pytest.mark.parametrize("arm, gauge, wanted", [
    ("cnn", "cosine", [(0, .5), (1, .7), (2, 1)]), ("transformer", "cosine", [(0, .9), (2, 1)]),
    ("cnn", "knn", [(0, .6), (2, .4)]), ("transformer", "knn", []),
    ("cnn", "loss", [(1, .2), (2, .1)])])
def test_points_are_read_by_network_and_gaps_are_left_out(arm, gauge, wanted, tmp_path):
    rows = [{"epoch": 0, "loss": None, "cnn_cosine": .5, "transformer_cosine": .9, "cnn_knn": .6},
            {"epoch": 1, "loss": .2, "cnn_cosine": .7, "transformer_cosine": None},
            {"epoch": 2, "loss": .1, "cnn_cosine": 1., "transformer_cosine": 1., "cnn_knn": .4}]
    found = curves.read_log(write_log(tmp_path / "a", rows))
    assert curves.points(found, arm, gauge) == wanted


def test_a_curve_goes_from_its_first_value_to_its_last_in_its_own_colour():
    rising, falling = [(0, 0.0), (1, 0.5), (2, 1.0)], [(0, 1.0), (1, 0.5), (2, 0.0)]
    image = draw_curves([rising, falling, []], "cosine", most=1)
    for colour, up in zip(LINES, (True, False)):
        y, x = places(image, colour)
        left, right = y[x < x.min() + 10].mean(), y[x > x.max() - 10].mean()
        assert bool(left > right) is up and x.min() < 80 and x.max() > 350  # y counts from the top
    half, _ = places(draw_curves([[(0, 0.5), (1, 0.5)]], "cosine", most=1), LINES[0])
    assert abs(half.mean() - 95.5) < 3  # in the middle of the frame, which ends at 1


def test_the_command_draws_runs_beside_each_other(tmp_path, said):
    runs, picture = [], tmp_path / "new" / "c.png"
    for arm in ("cnn", "backbone"):
        rows = [{"epoch": e, "loss": 1.0, f"{arm}_cosine": 0.1 * e, f"{arm}_knn": 0.2}
                for e in range(4)]
        runs.append(str(write_log(tmp_path / arm, rows)))
    curves.main([*runs, "--gauges", "cosine", "--out", str(picture)])
    image = Image.open(picture)
    for colour, left in zip(LINES, (0, 392)):  # each in the column of its network
        _, x = places(image.crop((0, 0, 800, image.height)), colour)
        assert len(x) > 100 and left < x.min() and x.max() < left + 410
    assert "no run folder" in said(curves.main, tmp_path)
    assert "no log has linear" in said(curves.main, *runs, "--gauges", "linear")
    assert "ends in .png" in said(curves.main, *runs, "--out", "x.jpg")
