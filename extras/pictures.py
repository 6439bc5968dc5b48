"""Arrays as pictures, drawn with Pillow: colours, text, heat maps, and pages of pictures with captions.

It knows nothing of networks; `extras/maps.py` says what to draw.
"""

import math
import re
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.utils import make_grid

# %% colours


@cache
def colour_table() -> np.ndarray:
    """256 colours `(256, 3)`, uint8, dark violet to pale yellow: lightness rises, and equal steps look equally large.

    Anchors (lightness, chroma, hue in degrees) are joined in Oklab (Ottosson 2020), where distance is perceived
    difference, and the line is walked in steps of one length.
    """
    light, chroma, hue = np.array([(.20, .07, 285), (.36, .15, 300), (.50, .19, 340), (.64, .19, 380), (.78, .15, 422),
                                   (.95, .11, 465)]).T
    anchors = np.stack([light, chroma * np.cos(np.radians(hue)), chroma * np.sin(np.radians(hue))])
    walked = np.r_[0, np.linalg.norm(np.diff(anchors), axis=0).cumsum()]
    lab = np.stack([np.interp(np.linspace(0, walked[-1], 256), walked, row) for row in anchors])
    cones = np.array([[1, .39634, .21580], [1, -.10556, -.06385], [1, -.08948, -1.29149]]) @ lab
    rgb = np.array([[4.07674, -3.30771, .23097], [-1.26844, 2.60976, -.34132], [-.00420, -.70342, 1.70761]]) @ cones**3
    rgb = np.where(rgb < .0031308, 12.92 * rgb, 1.055 * rgb.clip(0)**(1 / 2.4) - .055)  # sRGB's own curve
    return (rgb.clip(0, 1) * 255).round().astype(np.uint8).T


def paint(values: np.ndarray, low: float, high: float, size: tuple[int, int], smooth: bool = False) -> Image.Image:
    """Values `(rows, columns)` as colours from `low` (dark) to `high` (bright), resized to `size`, (width, height)."""
    shares = np.nan_to_num((values - low) / ((high - low) or 1)).clip(0, 1).astype(np.float32)
    way = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    shares = np.asarray(Image.fromarray(shares).resize(size, way))
    return Image.fromarray(colour_table()[(shares * 255).round().astype(int)])


def overlay(values: np.ndarray, image: Image.Image) -> Image.Image:
    """Values `(rows, columns)`, from their lowest to their highest, over an image."""
    pale = ImageOps.autocontrast(image.convert("L")).point(lambda grey: 70 + 0.72 * grey)  # black dulls the colours
    return Image.blend(pale.convert("RGB"), paint(values, values.min(), values.max(), image.size, smooth=True), 0.55)


def tiles(maps: np.ndarray, side: int = 84) -> Image.Image:
    """Maps `(C, h, w)`, four in a row, each from its own lowest value to its highest."""
    pictures = [np.array(paint(m, m.min(), m.max(), (side, side))) for m in maps]
    grid = make_grid(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), nrow=4, pad_value=255)
    return Image.fromarray(grid.permute(1, 2, 0).numpy())


# %% pages


def words(text: str, width: int, size: int = 15) -> Image.Image:
    """Text broken to `width` pixels; an empty one takes no room."""
    font = ImageFont.load_default(size)
    if not text:
        return Image.new("RGB", (1, 1), "white")
    lines = [""]
    pieces = re.findall(r"\n|[^\s_.-]*[ _.-]?", text)  # a name may be broken after these
    most = max(1, int(width / font.getlength("m")))
    for piece in (part for p in pieces for part in ([p] if font.getlength(p) <= width else  # or anywhere, if it must
                                                    [p[i:i + most] for i in range(0, len(p), most)])):
        if piece == "\n":
            lines.append("")
        elif lines[-1] and font.getlength(lines[-1] + piece.rstrip()) > width:
            lines.append(piece)
        else:
            lines[-1] += piece
    image = Image.new("RGB", (width, len(lines) * (size + 5) + 1), "white")
    ImageDraw.Draw(image).multiline_text((0, 0), "\n".join(lines), "black", font)
    return image


def stack(images: Sequence[Image.Image], gap: int = 6, across: bool = False) -> Image.Image:
    """Images below one another, or beside."""
    turn = Image.Transpose.TRANSPOSE
    if across:
        return stack([image.transpose(turn) for image in images], gap).transpose(turn)
    page = Image.new("RGB", (max(i.width for i in images), sum(i.height + gap for i in images) - gap), "white")
    for i, image in enumerate(images):
        page.paste(image, (0, sum(above.height + gap for above in images[:i])))
    return page


def draw_page(title: str, text: str, corner: list[Image.Image], heads: list[str], lines: list[tuple]) -> Image.Image:
    """A table of pictures under a title, which `corner` stands beside: `heads` over the columns, and for each line its
    caption, its pictures and a note below each. A picture without a head, such as a colour bar, ends its line."""
    width = max(picture.width for _, pictures, _ in lines for picture in pictures[:len(heads)])
    rows = []
    for caption, pictures, notes in [("", [words(head, width) for head in heads], []), *lines]:
        notes, wide = [*notes, *[""] * len(pictures)], [110, *[width] * len(heads), 0]
        cells = [stack([picture, words(note, width, 13)]) for picture, note in zip(pictures, notes)]
        rows.append(stack([ImageOps.expand(cell, (0, 0, max(0, w - cell.width), 0), "white")
                           for cell, w in zip([words(caption, 110), *cells], wide)], 20, across=True))
    table = stack(rows, 8)
    space = max(table.width, 800) - sum(image.width + 20 for image in corner)
    top = stack([*corner, stack([words(title, space, 22), words(text, space)], 10)], 20, across=True)
    return ImageOps.expand(stack([top, table], 20), 20, "white")


def draw_bar(low: float, high: float, height: int, text: str) -> Image.Image:
    """The colours from `low` to `high`, five numbers beside them, and what they mean above."""
    page = Image.new("RGB", (90, height), "white")
    page.paste(words(text, 90, 13), (0, 0))
    top, bottom = words(text, 90, 13).height + 8, height - 8
    page.paste(paint(np.linspace(1, 0, 256)[:, None], 0, 1, (20, bottom - top)), (0, top))
    for share in np.linspace(0, 1, 5):
        digits = max(0, 2 - math.floor(math.log10((high - low) or 1)))
        number, y = f"{low + share * (high - low):.{digits}f}", bottom - share * (bottom - top)
        ImageDraw.Draw(page).text((26, y), number, "black", ImageFont.load_default(13), "lm")
    return page


def draw_maps(title: str, text: str, maps: dict[str, np.ndarray], pixels: np.ndarray) -> Image.Image:
    """Maps `(rows, columns)` of one image `(H, W, 3)`, by what each is called: side by side in the same colours, and
    below over the image, each in its own."""
    image = Image.fromarray(pixels.astype(np.uint8))
    shares = [values / values.mean() for values in maps.values()]
    low, high = min(s.min() for s in shares), max(s.max() for s in shares)
    bar = draw_bar(low, high, image.height, "1 = the average patch")
    lines = [("attention, in the same colours for all", [*(paint(s, low, high, image.size) for s in shares), bar],
              [f"{s.min():.3f} to {s.max():.3f} times the average" for s in shares]),
             ("over the image, each from its own lowest to its highest", [overlay(s, image) for s in shares], [])]
    return draw_page(title, text, [image.resize((120, 120))], list(maps), lines)


def draw_layers(title: str, text: str, maps: dict[str, dict[str, np.ndarray]], image: Image.Image) -> Image.Image:
    """The first 8 maps of each layer, {network: {layer: `(N, C, h, w)`}}, of the first image: networks side by side."""
    text = ("The first 8 maps of each convolution, before normalisation and activation; each from its own lowest value "
            f"(dark) to its highest (bright).\n{text}")
    lines = [(f"convolution {i}", [tiles(values[0, :8]) for _, values in layers],
              ["{}: {} maps of {} x {}".format(name, *values.shape[1:]) for name, values in layers])
             for i, layers in enumerate(zip(*(layers.items() for layers in maps.values())), 1)]
    return draw_page(title, text, [image.resize((120, 120))], list(maps), lines)


def draw_matrix(matrix: np.ndarray, rows: list[str], columns: list[str]) -> Image.Image:
    """Values `(rows, columns)` from 0 to 1 as coloured fields with their numbers, and the names of rows and columns."""
    image, font = paint(matrix, 0, 1, (38 * len(columns), 22 * len(rows))), ImageFont.load_default(13)
    for (i, j), value in np.ndenumerate(matrix):
        at = 38 * j + 19, 22 * i + 11
        ImageDraw.Draw(image).text(at, f"{value:.2f}", "black" if value > 0.6 else "white", font, "mm")
    left, above = (int(max(map(font.getlength, names))) + 12 for names in (rows, columns))
    page = ImageOps.expand(image, (left, above, 0, 0), "white")
    for i, name in enumerate(rows):
        page.paste(words(name, left, 13), (0, above + 22 * i + 3))
    for j, name in enumerate(columns):
        page.paste(words(name, above, 13).rotate(90, expand=True), (left + 38 * j + 11, 0))
    return page


# %% curves

LINES = ((31, 119, 180), (214, 88, 20), (44, 140, 60), (128, 60, 160), (110, 110, 110), (190, 150, 0))  # one a run


def draw_curves(curves: list[tuple[Sequence[float], Sequence[float]]], size: tuple[int, int] = (360, 180)) -> Image.Image:
    """Curves (x, y) in one frame, in the colours of `LINES`, with their numbers at the axes; an empty one is left out.
    y runs from the lowest to the highest value of all, and from 0 to 1 where all lie there."""
    shown = [y for _, y in curves if len(y)]
    low, high = min(map(min, shown)), max(map(max, shown))
    low, high = (0.0, 1.0) if 0 <= low <= high <= 1 else (min(low, 0.0), high if high > low else low + 1)
    last = max(max(x) for x, _ in curves if len(x)) or 1
    left, top, right, bottom = 44, 8, size[0] - 14, size[1] - 22
    big = Image.new("RGB", (2 * size[0], 2 * size[1]), "white")  # drawn twice as large, so that slopes are smooth
    draw = ImageDraw.Draw(big)

    def at(x: float, y: float) -> tuple[float, float]:
        return 2 * (left + x / last * (right - left)), 2 * (bottom - (y - low) / (high - low) * (bottom - top))
    for share in (0, 0.25, 0.5, 0.75, 1):
        draw.line([at(0, low + share * (high - low)), at(last, low + share * (high - low))], (225, 225, 225), 2)
    for (x, y), colour in zip(curves, LINES):
        if len(x):
            draw.line([at(*point) for point in zip(x, y)], colour, 5, joint="curve")
    page = big.resize(size, Image.Resampling.LANCZOS)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for share in (0, 0.5, 1):
        value = low + share * (high - low)
        draw.text((left - 6, at(0, value)[1] / 2), f"{value:.3g}", "black", font, "rm")
        draw.text((at(share * last, low)[0] / 2, bottom + 5), f"{share * last:g}", "black", font, "ma")
    return page


def draw_legend(names: Sequence[str], width: int) -> Image.Image:
    """The colours of `LINES`, and what each stands for, one below the other."""
    lines = []
    for name, colour in zip(names, LINES):
        mark = Image.new("RGB", (30, 20), "white")
        ImageDraw.Draw(mark).line([(0, 10), (26, 10)], colour, 4)
        lines.append(stack([mark, words(name, width - 36)], 6, across=True))
    return stack(lines, 2)
