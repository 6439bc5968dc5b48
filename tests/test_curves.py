"""extras/curves.py: what is drawn is what the logs say."""

import json
from pathlib import Path

import numpy as np
from helpers import sentence
from PIL import Image

from extras import curves
from extras.pictures import LINES, draw_curves


def make_run(folder: Path, options: dict[str, str], rows: list[dict]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"options": options}))
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def places(image: Image.Image, colour: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels of one colour."""
    return np.nonzero((np.abs(np.asarray(image).astype(int) - colour) < 30).all(2))


def test_curves_are_read_by_network_and_gaps_are_left_out(tmp_path: Path) -> None:
    rows = [{"epoch": 0, "loss": None, "cnn_cosine": .5, "transformer_cosine": .9, "cnn_knn": .6},
            {"epoch": 1, "loss": .2, "cnn_cosine": .7, "transformer_cosine": None},
            {"epoch": 2, "loss": .1, "cnn_cosine": 1., "transformer_cosine": 1., "cnn_knn": .4}]
    options = {"cnn": "resnet18", "transformer": "vit"}
    found = curves.read_curves(make_run(tmp_path / "a", options, rows))
    assert found["resnet18"]["cosine"] == [(0, 0.5), (1, 0.7), (2, 1.0)]
    assert found["vit"]["cosine"] == [(0, 0.9), (2, 1.0)]
    assert found["resnet18"]["knn"] == [(0, 0.6), (2, 0.4)] and found["vit"]["knn"] == []
    assert found["resnet18"]["loss"] == found["vit"]["loss"] == [(1, 0.2), (2, 0.1)]
    twins = curves.read_curves(make_run(tmp_path / "b", {"cnn": "vit", "transformer": "vit"}, rows))
    assert list(twins) == ["vit", "vit (transformer)"]


def test_a_curve_goes_from_its_first_value_to_its_last_in_its_own_colour() -> None:
    rising, falling = [(0, 0.0), (1, 0.5), (2, 1.0)], [(0, 1.0), (1, 0.5), (2, 0.0)]
    image = draw_curves([rising, falling, []], "cosine", most=1)
    for colour, up in zip(LINES, (True, False)):
        y, x = places(image, colour)
        left, right = y[x < x.min() + 10].mean(), y[x > x.max() - 10].mean()
        assert bool(left > right) is up and x.min() < 90 and x.max() > 350  # y counts from the top
    half, _ = places(draw_curves([[(0, 0.5), (1, 0.5)]], "cosine", most=1), LINES[0])
    assert abs(half.mean() - 85) < 3  # in the middle of the frame, which ends at 1


def test_on_a_log_scale_equal_ratios_are_equal_steps() -> None:
    curve = [(0, 100.0), (1, 10.0), (2, 1.0), (3, 0.0)]
    y, x = places(draw_curves([curve], "loss", log=True), LINES[0])
    middle = y[np.abs(x - (x.min() + x.max()) / 2) < 3].mean()
    assert abs(middle - (y.min() + y.max()) / 2) < 3 and x.max() < 280  # 0 has no place on it


def test_the_command_draws_runs_beside_each_other(tmp_path: Path, capsys) -> None:
    rows = [{"epoch": e, "loss": 1.0, "backbone_cosine": 0.1 * e, "backbone_knn": 0.2}
            for e in range(4)]
    runs = [str(make_run(tmp_path / arch, {"arch": arch}, rows)) for arch in ("resnet18", "vit")]
    picture = tmp_path / "new" / "c.png"
    curves.main([*runs, "--gauges", "cosine", "--out", str(picture)])
    image = Image.open(picture)
    for colour, left in zip(LINES, (0, 392)):  # each in the column of its network
        _, x = places(image.crop((0, 0, 800, image.height)), colour)
        assert len(x) > 100 and left < x.min() and x.max() < left + 410

    def said(*options: str) -> str:
        return sentence(capsys, lambda: curves.main(list(options)))

    assert "no run folder" in said(str(tmp_path))
    assert "no log has linear" in said(*runs, "--gauges", "linear")
    assert "ends in .png" in said(*runs, "--out", "x.jpg")
