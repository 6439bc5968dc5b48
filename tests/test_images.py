"""Image files: each is read as it means it, or refused with one sentence. The forms are written
by hand (helpers.tiff, helpers.png); a reference reader gives for each the values put in."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import finetune
import images as image_files
from data import load_image, read_images, split_images, with_window
from helpers import class_folders, command, complaint, noise, png, png_bytes, put, tiff

RAMP = np.arange(256, dtype=np.uint8).reshape(8, 32)
COLOUR = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], 2)
DEEP, DEEP_COLOUR = RAMP.astype(np.uint16) * 16, COLOUR.astype(np.uint16) * 16  # 12 of 16 bits
TWELVE = (0, 255 * 16)
HALF = ((RAMP > 99) * 255)[..., None]


def pixels(path: Path, window: tuple[float, float] | None = None) -> np.ndarray:
    image = load_image(path, window)
    assert image.mode == "RGB"
    return np.asarray(image)


def with_alpha(colour: np.ndarray, alpha: np.ndarray | int) -> np.ndarray:
    plane = np.broadcast_to(alpha, (*colour.shape[:2], 1)).astype(colour.dtype)
    return np.concatenate([colour if colour.ndim == 3 else colour[..., None], plane], 2)


# %% what Pillow alone would take for something else: file, window, what is seen

PALETTE = [*range(256)], [*range(255, -1, -1)], [i // 2 for i in range(256)]
BY_PALETTE = np.stack([RAMP, 255 - RAMP, RAMP // 2], 2)
BLACK_BELOW = COLOUR * (HALF > 0)
SIGNED = RAMP.astype(int) - 128
FORMS = {
    "colours of 12 bits": (DEEP_COLOUR, {}, TWELVE, COLOUR),
    "12 bits and alpha": (with_alpha(DEEP_COLOUR, 0), {338: [2]}, TWELVE, COLOUR),
    "12 bits times alpha": (with_alpha(DEEP_COLOUR, 9), {338: [1]}, TWELVE, COLOUR),
    "alpha of seven": (with_alpha(COLOUR, 7), {338: [2]}, None, COLOUR),
    "one more channel of zero": (with_alpha(COLOUR, 0), {338: [0]}, None, COLOUR),
    "times an alpha of zero": (with_alpha(COLOUR, 0), {338: [1]}, None, COLOUR),
    "alpha": (with_alpha(COLOUR, HALF), {338: [2]}, None, BLACK_BELOW),
    "times alpha": (with_alpha(BLACK_BELOW, HALF), {338: [1]}, None, BLACK_BELOW),
    "grey, alpha of zero": (with_alpha(RAMP, 0), {338: [2]}, None, RAMP),
    "uint32": (RAMP.astype(np.uint32) << 24, {}, (0, 255 << 24), RAMP),
    "int8": (SIGNED.astype(np.int8), {}, None, RAMP),
    "int16": (SIGNED.astype(np.int16), {}, (-128, 127), RAMP),
    "int32": (SIGNED.astype(np.int32), {}, (-128, 127), RAMP),
    "float": (RAMP / np.float32(255), {}, (0, 1), RAMP),
    "white is zero": (RAMP, {262: [0]}, None, 255 - RAMP),
    "white is zero, 16 bits": (DEEP, {262: [0]}, TWELVE, 255 - RAMP),
    "white is zero, float": (RAMP / np.float32(255), {262: [0]}, (0, 1), 255 - RAMP),
    "palette of 8 bits": (RAMP, {262: [3], 320: sum(PALETTE, [])}, None, BY_PALETTE),
    "palette of 16 bits": (RAMP, {262: [3], 320: [257 * value for value in sum(PALETTE, [])]},
                           None, BY_PALETTE),
    "turned by 6": (RAMP, {274: [6]}, None, np.rot90(RAMP, -1)),
    "turned by 8": (DEEP, {274: [8]}, TWELVE, np.rot90(RAMP)),
    "turned by 3, 12 bits": (DEEP_COLOUR, {274: [3]}, TWELVE, np.rot90(COLOUR, 2)),
}
REFUSED = {("uint32", ">"), ("white is zero, 16 bits", ">")}  # forms that Pillow doesn't know


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("name", FORMS)
def test_tiffs_are_read_as_their_tags_mean_them(tmp_path: Path, name: str, order: str,
                                                deflate: bool) -> None:
    values, tags, window, wanted = FORMS[name]
    tiff(tmp_path / "x.tif", values, tags, order=order, deflate=deflate)
    if (name, order) in REFUSED:
        complaint(lambda: load_image(tmp_path / "x.tif"), "no form", "save it as")
    else:
        wanted = np.repeat(wanted[..., None], 3, 2) if wanted.ndim == 2 else wanted
        assert np.array_equal(pixels(tmp_path / "x.tif", window), wanted)


@pytest.mark.parametrize("values, wanted", [
    (DEEP_COLOUR, COLOUR), (with_alpha(DEEP_COLOUR, 0), COLOUR),
    (with_alpha(DEEP_COLOUR, 4000), COLOUR), (DEEP[..., None], np.repeat(RAMP[..., None], 3, 2))])
def test_pngs_of_16_bits(tmp_path: Path, values: np.ndarray, wanted: np.ndarray) -> None:
    png(tmp_path / "x.png", values)
    assert np.array_equal(pixels(tmp_path / "x.png", TWELVE), wanted)


@pytest.mark.parametrize("values, key", [
    (with_alpha(DEEP, 9), None), (DEEP[..., None], 65_535), (DEEP_COLOUR, 16)])
def test_pngs_whose_transparency_has_16_bits_are_refused(tmp_path: Path, values: np.ndarray,
                                                         key: int | None) -> None:
    png(tmp_path / "x.png", values, key)
    complaint(lambda: load_image(tmp_path / "x.png"), "transparency of 16 bits", "save it as")


@pytest.mark.parametrize("values, tags, words", [
    (np.moveaxis(DEEP_COLOUR, 2, 0).reshape(DEEP_COLOUR.shape), {284: [2]}, ["planes 2", "3 x 16"]),
    (np.repeat(COLOUR, 2, 2)[..., :5], {262: [1], 284: [2], 338: [0] * 4}, ["planes other than"]),
    (RAMP / 255.0, {}, ["1 x 64 bits", "floats"]),
    ((RAMP / 255).astype(np.float16), {}, ["1 x 16 bits", "floats"]),
    (np.repeat(COLOUR, 2, 2)[..., :5], {262: [1], 338: [0] * 4}, ["5 x 8 bits"]),
    (COLOUR, {259: [34712]}, ["compression 34712"]),
    (with_alpha(DEEP, 9), {338: [2]}, ["2 x 16 bits"]),
    (with_alpha(RAMP, 9), {338: [1]}, ["2 x 8 bits"]),  # grey times alpha
])
def test_tiffs_that_are_refused_are_told_what_they_are(tmp_path: Path, values: np.ndarray,
                                                       tags: dict, words: list[str]) -> None:
    tiff(tmp_path / "x.tif", values, tags)
    said = complaint(lambda: load_image(tmp_path / "x.tif"), *words, "save it as")
    assert said.startswith(f"{tmp_path / 'x.tif'} can't") and said.count("x.tif") == 1


def test_a_bigtiff_too_is_told_what_it_is(tmp_path: Path) -> None:
    entries = b"".join(struct.pack("<HHQQ", tag, 3, 1, value)
                       for tag, value in ((256, 8), (257, 8), (262, 2), (277, 5)))
    head = struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, 4)
    (tmp_path / "x.tif").write_bytes(head + entries + bytes(8))
    complaint(lambda: load_image(tmp_path / "x.tif"), "a TIFF of 1 x 1 bits", "photometric 2")


# %% the usual


@pytest.mark.parametrize("mode, ending", [
    ("RGB", "png"), ("L", "png"), ("P", "png"), ("1", "png"), ("RGBA", "png"), ("LA", "png"),
    ("CMYK", "tif"), ("RGB", "bmp"), ("RGB", "webp"), ("CMYK", "jpg"), ("P", "gif"), ("L", "tiff")])
def test_each_mode_and_format_looks_as_it_was(tmp_path: Path, mode: str, ending: str) -> None:
    plain = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    lossless = {"lossless": True} if ending == "webp" else {}
    plain.convert(mode).save(tmp_path / f"x.{ending}", **lossless)
    wanted = np.asarray(plain.convert(mode).convert("RGB"), float)
    assert np.abs(pixels(tmp_path / f"x.{ending}") - wanted).mean() < 3


@pytest.mark.parametrize("mode, colour, clear", [
    ("RGBA", (200, 200, 200, 255), (9, 9, 9, 0)), ("LA", (200, 255), (9, 0)), ("P", 0, 1)])
def test_transparent_pixels_are_black(tmp_path: Path, mode: str, colour, clear) -> None:
    image = Image.new(mode, (2, 1), clear)
    image.putpixel((0, 0), colour)
    if mode == "P":
        image.putpalette([200, 200, 200, 9, 9, 9])
        image.info["transparency"] = 1
    image.save(tmp_path / "x.png")
    assert pixels(tmp_path / "x.png").tolist() == [[[200] * 3, [0] * 3]]


def test_jpegs_are_turned_as_their_exif_says(tmp_path: Path) -> None:
    plain, exif = Image.linear_gradient("L").resize((32, 16)).convert("RGB"), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    plain.save(tmp_path / "x.jpg", exif=exif)
    wanted = np.rot90(np.asarray(plain, float), -1)
    assert np.abs(pixels(tmp_path / "x.jpg") - wanted).mean() < 3


@pytest.mark.parametrize("ending", ["tif", "gif"])
def test_the_first_of_several_pages_counts_and_is_said(tmp_path: Path, ending: str) -> None:
    first, second = (Image.new("RGB", (4, 4), colour) for colour in ((200, 0, 0), (0, 200, 0)))
    first.save(tmp_path / f"x.{ending}", save_all=True, append_images=[second])
    assert (pixels(tmp_path / f"x.{ending}") == (200, 0, 0)).all()
    (note,) = with_window(read_images(put(tmp_path, "y.png"))).notes
    assert note.startswith("1 images of 2 looked at have several pages") and "x." in note


# %% more than 8 bits: the window


@pytest.mark.parametrize("values, kind, ending, wanted", [
    ([1000, 1200, 1400, 2000], "u2", "png", [0, 51, 102, 255]),
    ([1000, 1200, 1400, 2000], "u2", "tif", [0, 51, 102, 255]),
    ([-5, -3, -1, 5], "i4", "tif", [0, 51, 102, 255]),
    ([0.001, 0.0012, 0.0014, 0.002], "f4", "tif", [0, 51, 102, 255]),
    ([100] * 399 + [900], "u2", "tif", [0] * 399 + [255]),
    ([777] * 9, "u2", "tif", [0] * 9),  # the same everywhere: black
    ([np.nan] * 9, "f4", "tif", [0] * 9)])
def test_without_a_window_each_image_is_seen_in_its_own_range(
        tmp_path: Path, values: list, kind: str, ending: str, wanted: list[int]) -> None:
    Image.fromarray(np.array([values], kind)).save(tmp_path / f"x.{ending}")
    assert pixels(tmp_path / f"x.{ending}")[0, :, 0].tolist() == wanted


@pytest.mark.parametrize("odd, share", [(60_000, 0.004), (np.inf, 0.2), (np.nan, 0.2),
                                        (-3.4e38, 0.2), (-60_000, 0.004)])
def test_hot_pixels_and_fill_values_do_not_set_the_range(tmp_path: Path, odd: float,
                                                         share: float) -> None:
    values = np.linspace(1000, 2000, 1000, dtype=np.float32)
    values[500:500 + int(share * 1000)] = odd
    Image.fromarray(values.reshape(20, 50)).save(tmp_path / "x.tif")
    grey = pixels(tmp_path / "x.tif")[..., 0].ravel()
    assert grey[10] < 10 and abs(int(grey[250]) - 64) < 4 and grey[990] > 245
    assert grey[500] == (255 if odd > 0 else 0)


@pytest.fixture
def two_levels(tmp_path: Path) -> Path:
    """16 bits, two classes that differ by their intensity alone, in parts of their own."""
    rng = np.random.default_rng(0)
    for name, level in (("dark", 1000), ("light", 3000)):
        for part, add in (("train", 0), ("val", 0), ("test", 30_000)):
            (tmp_path / "set" / part / name).mkdir(parents=True)
            for i in range(4):
                values = rng.normal(level + add, 50, (30, 30)).astype(np.uint16)
                Image.fromarray(values).save(tmp_path / "set" / part / name / f"{i}.png")
    return tmp_path / "set"


def test_one_window_for_all_keeps_intensities_apart(two_levels: Path) -> None:
    images = split_images(read_images(two_levels))
    low, high = window = with_window(images).window
    assert 800 < low < 1000 and 3000 < high < 3200  # of the training part alone
    assert with_window(images, "auto").window == window
    assert with_window(images, "image").window is None
    assert with_window(images, (0, 4000)).window == (0, 4000)

    def means(window: tuple[float, float] | None) -> list[float]:
        return [pixels(two_levels / "train" / name / "0.png", window).mean()
                for name in ("dark", "light")]
    assert np.diff(means(window)) > 200 and np.abs(np.diff(means(None))) < 20
    assert np.abs(np.subtract(means((0, 4000)), [1000 / 4000 * 255, 3000 / 4000 * 255])).max() < 2


def test_the_window_of_pretraining_is_kept_up_to_prediction(
        two_levels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pre, tuned, seen = tmp_path / "pre", tmp_path / "tuned", set()
    monkeypatch.setattr(image_files, "load_image", lambda file, window=None: (
        seen.add(window), load_image(file, window))[1])
    command("cass", two_levels, pre, "--window 0,5000")
    command("finetune", two_levels, tuned, "--weights", pre)
    finetune.main(["--predict", str(two_levels / "test" / "light"), "--weights", str(tuned),
                   "--workers", "0", "--out", str(tmp_path / "new")])
    assert seen == {(0, 5000)}
    for run in (pre, tuned):
        assert json.loads((run / "config.json").read_text())["window"] == [0, 5000]


def test_images_of_8_bits_have_no_window(tmp_path: Path) -> None:
    images = with_window(read_images(class_folders(tmp_path, a=3)))
    assert images.window is None
    assert np.array_equal(pixels(tmp_path / "a" / "0.png", (0, 9)), np.asarray(noise(0)))


def test_command_shows_depth_window_and_alpha(two_levels: Path,
                                              capsys: pytest.CaptureFixture) -> None:
    Image.new("RGBA", (4, 4), (9, 9, 9, 0)).save(two_levels / "train" / "dark" / "9.png")
    data.main(["--data", str(two_levels), "--window", "0,4000"])
    said = capsys.readouterr().out
    assert "modes: I;16 of 16 bits or more (24), RGBA (1)" in said
    assert "16 bits or more: 0 to 4000" in said and "the same everywhere: left out (1)" in said


# %% damage


def truncated(file: Path) -> None:
    noise(0, 100, 100).save(file, "JPEG")
    file.write_bytes(file.read_bytes()[:2000])


def bomb(file: Path) -> None:
    """A PNG of 60,000 x 60,000 pixels, as its header says; the pixels are not there."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    file.write_bytes(png_bytes((b"IHDR", header), (b"IDAT", b"")))


@pytest.mark.parametrize("name, make, words", [
    ("cut.jpg", truncated, ["truncated", "--skip-bad"]),
    ("empty.png", lambda f: f.write_bytes(b""), ["no form", "--skip-bad"]),
    ("text.png", lambda f: f.write_text("hello"), ["no form", "--skip-bad"]),
    ("bomb.png", bomb, ["pixels"]),
    ("gone.png", lambda f: None, ["No such file"]),
    ("folder.png", lambda f: f.mkdir(), ["directory"]),
    ("loop.png", lambda f: f.symlink_to(f), ["symbolic link"]),
    ("dangling.png", lambda f: f.symlink_to(f.with_name("gone")), ["No such file"]),
])
def test_files_that_are_no_image_are_named(tmp_path: Path, name: str, make, words) -> None:
    make(tmp_path / name)
    said = complaint(lambda: load_image(tmp_path / name), *words)
    assert said.startswith(f"{tmp_path / name} can't be read as") and said.count(name) == 1


def test_good_rows_leaves_out_and_counts_damaged_images(tmp_path: Path) -> None:
    class_folders(tmp_path, cat=3)
    truncated(tmp_path / "cat" / "cut.jpg")
    (tmp_path / "cat" / "empty.png").touch()
    images = data.good_rows(read_images(tmp_path))
    assert [r.path for r in images.rows] == ["cat/0.png", "cat/1.png", "cat/2.png"]
    assert images.notes == ["2 images that can't be read are left out, such as cat/cut.jpg"]
    assert data.good_rows(data.find_images(tmp_path)).notes == images.notes
    for file in tmp_path.glob("cat/?.png"):
        file.unlink()
    complaint(lambda: data.good_rows(read_images(tmp_path)), "no image that can be read")
