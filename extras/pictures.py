"""Arrays and curves as pictures, drawn with Pillow; nothing of networks or runs is known here."""

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

RAMP = np.array([(12, 8, 45), (105, 25, 125), (220, 75, 85), (255, 175, 65), (255, 250, 210)])
LINES = ((31, 119, 180), (214, 88, 20), (44, 140, 60), (128, 60, 160), (110, 110, 110))

# %% arrays


def paint(values: np.ndarray, low: float, high: float, size: tuple[int, int],
          smooth: bool = False) -> Image.Image:
    """Values `(rows, columns)` as colours of `RAMP` from `low` to `high`, at `size`, (width,
    height); `smooth` draws no edges between them."""
    shares = np.nan_to_num((values - low) / ((high - low) or 1)).clip(0, 1).astype(np.float32)
    way = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    shares = np.asarray(Image.fromarray(shares).resize(size, way))
    channels = [np.interp(4 * shares, range(5), channel) for channel in RAMP.T]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def overlay(colours: Image.Image, image: Image.Image) -> Image.Image:
    """Colours over an image of the same size, which is made grey and pale for it."""
    pale = ImageOps.autocontrast(image.convert("L")).point(lambda value: 70 + 0.72 * value)
    return Image.blend(pale.convert("RGB"), colours, 0.55)


def tiles(maps: np.ndarray, side: int = 84) -> Image.Image:
    """Maps `(C, h, w)`, four in a row, each from its own lowest value to its highest."""
    pictures = [paint(values, values.min(), values.max(), (side, side)) for values in maps]
    return grid([pictures[i:i + 4] for i in range(0, len(pictures), 4)], 2)


def draw_bar(low: float, high: float, height: int, meaning: str) -> Image.Image:
    """The colours from `low` to `high` with numbers beside them, and what they mean above."""
    page, label = Image.new("RGB", (100, height), "white"), words(meaning, 100, 13)
    top, bottom = label.height + 8, height - 8
    page.paste(label, (0, 0))
    page.paste(paint(np.linspace(1, 0, 256)[:, None], 0, 1, (20, bottom - top)), (0, top))
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = bottom - share * (bottom - top)
        write(page, (26, y), f"{low + share * (high - low):.3g}", "lm")
    return page


def draw_matrix(matrix: np.ndarray, rows: list[str], columns: list[str]) -> Image.Image:
    """Values from 0 to 1 as coloured fields with their numbers, `rows` and `columns` named."""
    font = ImageFont.load_default(12)
    left, above = (int(max(map(font.getlength, names))) + 12 for names in (rows, columns))
    names = Image.new("RGB", (above, 38 * len(columns)), "white")
    for j, name in enumerate(columns):
        write(names, (6, 38 * j + 19), name, "lm")
    page = Image.new("RGB", (left + 38 * len(columns), above + 22 * len(rows)), "white")
    page.paste(names.rotate(90, expand=True), (left, 0))
    page.paste(paint(matrix, 0, 1, (38 * len(columns), 22 * len(rows))), (left, above))
    for i, name in enumerate(rows):
        write(page, (left - 6, above + 22 * i + 11), name, "rm")
        for j, value in enumerate(matrix[i]):
            ink = "black" if value > 0.6 else "white"
            write(page, (left + 38 * j + 19, above + 22 * i + 11), f"{value:.2f}", "mm", ink)
    return page


# %% pages


def write(page: Image.Image, at: tuple[float, float], text: str, anchor: str,
          colour: str = "black") -> None:
    """One line on a page; `anchor` says which of its points is `at`, as in Pillow."""
    ImageDraw.Draw(page).text(at, text, colour, ImageFont.load_default(12), anchor)


def words(text: str, width: int, size: int = 14) -> Image.Image:
    """Text in lines of at most `width` pixels."""
    font, lines = ImageFont.load_default(size), []
    for paragraph in text.splitlines():
        letters = int(0.9 * width * len(paragraph) / max(1, font.getlength(paragraph)))
        lines += textwrap.wrap(paragraph, max(1, letters))
    image = Image.new("RGB", (width, len(lines) * (size + 5) + 1), "white")
    ImageDraw.Draw(image).multiline_text((0, 0), "\n".join(lines), "black", font)
    return image


def grid(rows: Sequence[Sequence[Image.Image]], gap: int = 12) -> Image.Image:
    """Images in rows and columns, each column as wide and each row as high as its largest."""
    widths = [0] * max(len(row) for row in rows)
    for row in rows:
        for i, image in enumerate(row):
            widths[i] = max(widths[i], image.width)
    heights = [max(image.height for image in row) for row in rows]
    size = sum(widths) + gap * (len(widths) - 1), sum(heights) + gap * (len(heights) - 1)
    page = Image.new("RGB", size, "white")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            page.paste(image, (sum(widths[:j]) + gap * j, sum(heights[:i]) + gap * i))
    return page


def draw_page(title: str, text: str, columns: list[list[str | Image.Image]]) -> Image.Image:
    """Columns of pictures and of captions, each as wide as its column's pictures, under a title."""
    rows = [[Image.new("RGB", (1, 1), "white")] * len(columns) for _ in max(columns, key=len)]
    for j, column in enumerate(columns):
        width = max(cell.width for cell in column if not isinstance(cell, str))
        for i, cell in enumerate(column):
            rows[i][j] = words(cell, width) if isinstance(cell, str) else cell
    width = max(grid(rows).width, 700)
    page = grid([[words(title, width, 22)], [words(text, width)], [grid(rows)]])
    return ImageOps.expand(page, 20, "white")


# %% curves


def draw_curves(curves: Sequence[Sequence[tuple[float, float]]], name: str, most: float = 0,
                log: bool = False) -> Image.Image:
    """Curves of points (epoch, y) in the colours of `LINES`; `name` is that of y. It runs from 0 or
    below to `most` or above; with `log` by ratios, without values that are not above 0."""
    last = max([x for curve in curves for x, _ in curve], default=0) or 1
    if log:
        curves = [[(x, math.log10(y)) for x, y in curve if y > 0] for curve in curves]
    ys = [y for curve in curves for _, y in curve] or [0]
    low, high = (min(ys), max(ys)) if log else (min(0, *ys), max(most, *ys))
    high = high if high > low else low + 1

    def at(x: float, y: float) -> tuple[float, float]:
        return 80 + 286 * x / last, 160 - 150 * (y - low) / (high - low)

    large = Image.new("RGB", (760, 400), "white")  # halved below, so that slopes are smooth
    for y in (low, (low + high) / 2, high):
        ends = [2 * value for x in (0, last) for value in at(x, y)]
        ImageDraw.Draw(large).line(ends, (220, 220, 220), 2)
    for curve, colour in zip(curves, LINES):
        path = [2 * value for point in curve for value in at(*point)]
        if path:
            ImageDraw.Draw(large).line(path, colour, 5, joint="curve")
    page = large.resize((380, 200), Image.Resampling.LANCZOS)
    for share in (0, 0.5, 1):
        x, y = share * last, low + share * (high - low)
        write(page, (75, at(0, y)[1]), f"{10**y if log else y:.3g}", "rm")
        write(page, (at(x, low)[0], 165), f"{x:g}", "ma")
    write(page, (223, 198), "epoch", "md")
    label = Image.new("RGB", (150, 18), "white")
    write(label, (75, 9), name + ", log scale" * log, "mm")
    page.paste(label.rotate(90, expand=True), (0, 10))
    return page
