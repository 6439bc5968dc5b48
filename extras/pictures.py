"""Arrays and curves as pictures, drawn with Pillow; nothing of networks or runs is known here."""

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

RAMP = ((12, 8, 45), (255, 250, 210), (220, 75, 85))  # lowest, highest, and between
LINES = ((31, 119, 180), (214, 88, 20), (44, 140, 60), (128, 60, 160), (110, 110, 110))

# %% arrays


def paint(values: np.ndarray, low: float, high: float, size: tuple[int, int],
          smooth: bool = False) -> Image.Image:
    """Values `(rows, columns)` as colours of `RAMP` from `low` to `high`, at `size`, (width,
    height); `smooth` draws no edges between them."""
    shares = np.nan_to_num((values - low) / ((high - low) or 1)).clip(0, 1)
    grey = Image.fromarray((255 * shares).round().astype(np.uint8))
    way = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    return ImageOps.colorize(grey.resize(size, way), *RAMP)


def overlay(colours: Image.Image, image: Image.Image) -> Image.Image:
    """Colours over an image of the same size, which is made grey and pale for it."""
    pale = ImageOps.autocontrast(image.convert("L")).point(lambda value: 70 + 0.72 * value)
    return Image.blend(pale.convert("RGB"), colours, 0.55)


def tiles(maps: np.ndarray, side: int = 84) -> Image.Image:
    """Maps `(C, h, w)`, four in a row, each from its own lowest value to its highest."""
    pictures = [paint(values, values.min(), values.max(), (side, side)) for values in maps]
    return grid([pictures[i:i + 4] for i in range(0, len(pictures), 4)], 2)


def draw_matrix(matrix: np.ndarray, rows: list[str], columns: list[str]) -> Image.Image:
    """Values from 0 to 1 as coloured fields with their numbers, `rows` and `columns` named."""
    room = 12 + 7 * max(map(len, rows + columns))

    def label(name: str, height: int) -> Image.Image:
        field = Image.new("RGB", (room, height), "white")
        write(field, (room - 6, height / 2), name, "rm")
        return field

    lines = [[label("", 22), *(label(name, 38).rotate(270, expand=True) for name in columns)]]
    for name, values in zip(rows, matrix):
        lines.append([label(name, 22)])
        for value in values:
            field = paint(np.array([[value]]), 0, 1, (38, 22))
            write(field, (19, 11), f"{value:.2f}", "mm", "black" if value > 0.6 else "white")
            lines[-1].append(field)
    return grid(lines, 0)


# %% pages


def write(page: Image.Image, at: tuple[float, float], text: str, anchor: str,
          colour: str = "black", size: int = 12) -> None:
    """One line on a page; `anchor` says which of its points is `at`, as in Pillow."""
    ImageDraw.Draw(page).text(at, text, colour, ImageFont.load_default(size), anchor)


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
    count = max(map(len, rows))
    widths = [max(row[j].width for row in rows if j < len(row)) + gap for j in range(count)]
    heights = [max(image.height for image in row) + gap for row in rows]
    page = Image.new("RGB", (sum(widths) - gap, sum(heights) - gap), "white")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            page.paste(image, (sum(widths[:j]), sum(heights[:i])))
    return page


def draw_page(title: str, text: str, columns: list[list[str | Image.Image]]) -> Image.Image:
    """Columns of pictures and of captions, each as wide as its column's pictures, under a title."""
    rows = [[Image.new("RGB", (1, 1), "white")] * len(columns) for _ in max(columns, key=len)]
    for j, column in enumerate(columns):
        width = max(cell.width for cell in column if not isinstance(cell, str))
        for i, cell in enumerate(column):
            rows[i][j] = words(cell, width) if isinstance(cell, str) else cell
    body = grid(rows)
    width = max(body.width, 700)
    page = grid([[words(title, width, 22)], [words(text, width)], [body]])
    return ImageOps.expand(page, 20, "white")


# %% curves


def draw_curves(curves: Sequence[Sequence[tuple[float, float]]], name: str, most: float = 0,
                log: bool = False) -> Image.Image:
    """Curves of points (epoch, y) in the colours of `LINES`; `name` is that of y, which runs from 0
    or below to `most` or above. `log`: on a log scale, without values that are 0."""
    if log:
        curves = [[(x, math.log10(y)) for x, y in curve if y > 0] for curve in curves]
        name += ", log scale"
    last = max([x for curve in curves for x, _ in curve], default=0) or 1
    ys = [y for curve in curves for _, y in curve] or [0]
    low = math.floor(min(ys)) if log else min(0, *ys)
    high = math.ceil(max(ys)) if log else max(most, *ys)
    high = high if high > low else low + 1
    marks = range(low, high + 1, 1 + (high - low) // 10) if log else (low, (low + high) / 2, high)
    page = Image.new("RGB", (760, 400), "white")  # halved below, so that slopes are smooth

    def at(x: float, y: float) -> tuple[float, float]:
        return 140 + 590 * x / last, 326 - 270 * (y - low) / (high - low)

    for y in marks:
        ImageDraw.Draw(page).line([at(0, y), at(last, y)], (220, 220, 220), 2)
        write(page, (130, at(0, y)[1]), f"{10 ** y if log else y:.3g}", "rm", size=24)
    for x in (0, last / 2, last):
        write(page, (at(x, low)[0], 338), f"{x:g}", "ma", size=24)
    write(page, (10, 10), name, "la", size=26)
    write(page, (435, 400), "epoch", "md", size=24)
    for curve, colour in zip(curves, LINES):
        if curve:
            ImageDraw.Draw(page).line([at(*point) for point in curve], colour, 5, joint="curve")
    return page.resize((380, 200), Image.Resampling.LANCZOS)
