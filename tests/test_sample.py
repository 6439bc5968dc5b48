"""The synthetic sample: equal bytes for equal seeds, labels that fit the images, a folder that is whole or not there."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from extras import sample


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample.draw_sample(tmp_path_factory.mktemp("sample") / "new" / "autoimmune", images=8)


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "labels.csv", newline="") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_images_are_rgb_tiffs_of_the_papers_size(drawn: Path) -> None:
    rows = table(drawn)
    assert len(rows) == 8 and {drawn / row["image"] for row in rows} == set((drawn / "images").iterdir())
    for row in rows:
        with Image.open(drawn / row["image"]) as image:
            assert (image.format, image.mode, image.size) == ("TIFF", "RGB", (469, 352))
            assert "synthetic" in image.tag_v2[270].lower()
            pixels = np.asarray(image)
        assert pixels.dtype == np.uint8 and 5 < pixels.mean() < 80 and pixels.max() > 150  # dark, with bright cells


def test_files_hold_what_the_design_and_the_drawing_say(drawn: Path) -> None:
    groups, labels = sample.sample_design(images=8)
    for i, row in enumerate(table(drawn)):
        assert list(row) == ["image", "TFH-1", "TFH-217", "TFH-Like", "B cells", "others", "group"]
        assert [int(row[name]) for name in sample.CLASSES] == labels[i].tolist()
        assert row["group"] == f"patient-{groups[i] + 1}"
    with Image.open(drawn / table(drawn)[3]["image"]) as image:  # lossless
        np.testing.assert_array_equal(np.asarray(image), sample.draw_image(labels[3], groups[3], 3))
    assert "synthetic" in (drawn / "README.txt").read_text().lower()


def test_equal_seeds_give_equal_bytes_and_fewer_images_are_the_first_of_more(drawn: Path, tmp_path: Path) -> None:
    whole = contents(drawn)
    few = contents(sample.draw_sample(tmp_path / "few", images=3))
    other = contents(sample.draw_sample(tmp_path / "other", images=3, seed=1))
    for name in [f"images/synthetic-{n:03d}.tif" for n in (1, 2, 3)]:
        assert few[name] == whole[name] != other[name]
    assert whole["labels.csv"].startswith(few["labels.csv"])


def test_a_type_is_seen_only_where_its_label_is_set() -> None:
    """The colour of a type must rise with its label, all else equal: or labels and images would be strangers."""
    none = np.zeros(5, int)
    for k, channel in ((0, 1), (3, 0)):  # TFH-1 is green, B cells are red
        rise = [sample.draw_image(none + (np.arange(5) == k), 0, i).astype(int) - sample.draw_image(none, 0, i)
                for i in range(3)]
        rise = np.mean(rise, axis=(0, 1, 2))
        assert rise[channel] == rise[:2].max() and rise[channel] > 2 * rise[1 - channel] > 0


@pytest.mark.parametrize("seed", range(5))
def test_design_is_balanced_enough_to_learn_from(seed: int) -> None:
    groups, labels = sample.sample_design(seed=seed)
    counts = np.bincount(groups)
    assert len(counts) == 7 and counts.min() >= 5 and counts.max() > 1.3 * counts.min()
    assert (0.25 < labels.mean(0)).all() and (labels.mean(0) < 0.6).all() and labels.any(1).all()
    for patient in range(7):
        assert labels[groups == patient].any(0).all()
    many = sample.sample_design(images=2000, seed=seed)[1].mean(0)
    assert (0.3 < many).all() and (many < 0.6).all()


def test_design_keeps_its_start_when_it_grows() -> None:
    for short, long in zip(sample.sample_design(images=20), sample.sample_design(images=198)):
        np.testing.assert_array_equal(short, long[:20])
    assert set(sample.sample_design(images=7)[0].tolist()) == set(range(7))


def test_main_says_synthetic_and_fills_an_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample.main([str(tmp_path), "--images", "1", "--patients", "1", "--seed", "3"])
    assert len(table(tmp_path)) == 1 and "synthetic" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        sample.main(["--help"])
    assert stop.value.code == 0 and "synthetic" in capsys.readouterr().out


@pytest.mark.parametrize("where, options", [("full", []), ("full/file", []), ("full/file/below", []),
                                            ("new", ["--images", "0"]), ("new", ["--seed", "-1"])])
def test_a_wrong_request_ends_in_one_sentence(where: str, options: list[str], tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        sample.main([str(tmp_path / where), *options])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert contents(tmp_path) == {"full/file": b"mine"} and [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 2)])
def test_an_interruption_leaves_nothing_behind(error: BaseException, code: int, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    draw = sample.draw_image

    def stop_at_second(labels: np.ndarray, patient: int, index: int, seed: int) -> np.ndarray:
        if index == 1:
            raise error
        return draw(labels, patient, index, seed)

    monkeypatch.setattr(sample, "draw_image", stop_at_second)
    with pytest.raises(SystemExit) as stop:
        sample.main([str(tmp_path / "set")])
    assert stop.value.code == code and list(tmp_path.iterdir()) == []
