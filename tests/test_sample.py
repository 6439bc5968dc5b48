"""The synthetic sample: equal bytes for equal seeds, labels that fit the images, all or nothing."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from extras import sample


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample.draw_sample(tmp_path_factory.mktemp("sample") / "new" / "autoimmune", images=5)


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_files_hold_what_the_design_and_the_drawing_say(drawn):
    groups, labels = sample.sample_design(5, 7, 0)
    rows = list(csv.DictReader((drawn / "labels.csv").read_text().splitlines()))
    assert {drawn / row["image"] for row in rows} == set((drawn / "images").iterdir())
    for i, row in enumerate(rows):
        assert list(row) == ["image", "TFH-1", "TFH-217", "TFH-Like", "B cells", "others", "group"]
        assert [int(row[name]) for name in sample.CLASSES] == labels[i].tolist()
        assert row["group"] == f"patient-{groups[i] + 1}"
        with Image.open(drawn / row["image"]) as image:
            assert (image.format, image.mode, image.size) == ("TIFF", "RGB", (469, 352))
            assert "synthetic" in image.tag_v2[270].lower()
            pixels = np.asarray(image)
        assert 5 < pixels.mean() < 80 and pixels.max() > 150  # dark, with bright cells
    np.testing.assert_array_equal(pixels, sample.draw_image(labels[4], groups[4], 4, 0))  # lossless


def test_equal_seeds_give_equal_bytes_and_fewer_are_the_first_of_more(drawn, tmp_path, capsys):
    whole = contents(drawn)
    few = contents(sample.draw_sample(tmp_path / "few", images=2))
    (tmp_path / "other").mkdir()  # an empty folder may be filled
    sample.main([str(tmp_path / "other"), "--images", "2", "--seed", "1"])
    other = contents(tmp_path / "other")
    for name in ("images/synthetic-001.tif", "images/synthetic-002.tif"):
        assert few[name] == whole[name] != other[name]
    assert whole["labels.csv"].startswith(few["labels.csv"])
    assert "synthetic" in capsys.readouterr().out


@pytest.mark.parametrize("k, channel", [(0, 1), (3, 0)])  # TFH-1 is green, B cells are red
def test_the_colour_of_a_type_rises_with_its_label_all_else_equal(k, channel):
    one, none = (np.arange(5) == k).astype(int), np.zeros(5, int)
    rise = [sample.draw_image(one, 0, i, 0).astype(int) - sample.draw_image(none, 0, i, 0)
            for i in range(2)]
    rise = np.mean(rise, axis=(0, 1, 2))
    assert rise[channel] == rise[:2].max() and rise[channel] > 2 * rise[1 - channel] > 0


@pytest.mark.parametrize("seed", range(3))
def test_design_is_balanced_enough_to_learn_from(seed):
    groups, labels = sample.sample_design(198, 7, seed)
    counts = np.bincount(groups)
    assert len(counts) == 7 and counts.min() >= 5 and counts.max() > 1.3 * counts.min()
    assert (0.25 < labels.mean(0)).all() and (labels.mean(0) < 0.6).all() and labels.any(1).all()
    assert all(labels[groups == patient].any(0).all() for patient in range(7))
    assert set(groups[:7]) == set(range(7))
    for short, long in zip(sample.sample_design(20, 7, seed), (groups, labels)):
        np.testing.assert_array_equal(short, long[:20])


@pytest.mark.parametrize("where, options", [("full", []), ("full/file", []), ("full/file/x", []),
                                            ("new", ["--images", 0]), ("new", ["--seed", -1])])
def test_a_wrong_request_ends_in_one_sentence(where, options, tmp_path, said):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    said(sample.main, tmp_path / where, *options)
    assert contents(tmp_path) == {str(Path("full", "file")): b"mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt(), 130),
                                         (OSError(28, "No space left on device"), 2)])
def test_an_interruption_leaves_nothing_behind(error, code, tmp_path, monkeypatch):
    def stop_at_second(labels: np.ndarray, patient: int, index: int, seed: int) -> np.ndarray:
        if index == 1:
            raise error
        return np.zeros((4, 4, 3), np.uint8)

    monkeypatch.setattr(sample, "draw_image", stop_at_second)
    with pytest.raises(SystemExit) as stop:
        sample.main([str(tmp_path / "set")])
    assert stop.value.code == code and list(tmp_path.iterdir()) == []
