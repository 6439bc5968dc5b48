"""Look into trained networks: feature maps, class attention and CKA, as arrays and as pictures.

    python -m extras.maps --weights runs/cass-mri --weights runs/finetune-supervised-mri-1 --image scan.jpg
    python -m extras.maps --weights runs/cass-mri --data ./mri --average 30
    python -m extras.maps --weights runs/cass-mri --data ./mri --cka

These are the paper's figures 3, 4 and 6 to 13 (5.6.6, E.2, E.3), and the measure of Raghu et al. 2021 that motivates
it. Each run stands beside the others and beside its start weights, built anew from what its `config.json` says.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torchvision.utils import make_grid

from data import DataError, ImageRows, Row, augmentation, label_fraction, load_image, make_loader, read_images, read_split
from finetune import find_networks
from metrics import MinibatchCKA
from runtime import UserError, build_model, clear_exit, load_network, pick_device, positive, read_network

# %% arrays


@torch.no_grad()
def watch(model: nn.Module, images: Tensor, layers: dict[Any, nn.Module], keep: Callable[[Any, Tensor], Any],
          most: int | None = None) -> dict:
    """Run images `(N, 3, H, W)` through `model` in evaluation mode; {name: keep(name, output)} for the first `most`
    of `layers`, in the order in which they run."""
    found, training = {}, model.training
    hooks = [layer.register_forward_hook(lambda layer, inputs, output, name=name: found.update(
        {} if name in found or len(found) == most else {name: keep(name, output)})) for name, layer in layers.items()]
    try:
        model.eval()(images.to(next(model.parameters()).device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return found


def feature_maps(model: nn.Module, images: Tensor, layers: int = 5) -> dict[str, np.ndarray]:
    """What the first convolutions make of images `(N, 3, H, W)` (paper, 5.6.6 and E.2): {name: `(N, C, h, w)`}, before
    normalisation and activation."""
    convolutions = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    # np.array copies: the activation that follows may work in place.
    return watch(model, images, convolutions, lambda name, output: np.array(output.float().cpu()), layers)


def attention_weights(model: nn.Module, images: Tensor, blocks: Sequence[int] | None = None) -> Tensor:
    """Attention in some Transformer blocks (None: in all), mean over heads: `(blocks, N, T, T)` for `(N, 3, H, W)`.

    Row t says how token t draws on all T tokens, and sums to one. The class token comes first, then others that are
    no patch (distillation, registers), then the patches. Raises `UserError` for a network without a class token.
    """
    name = getattr(model, "pretrained_cfg", {}).get("architecture", type(model).__name__)
    if getattr(model, "cls_token", None) is None or not hasattr(model, "blocks"):
        raise UserError(f"{name} has no class token and so no class attention; to see the other network of a run, name "
                        "its file of weights in place of the folder")
    if blocks and not 0 <= min(blocks) <= max(blocks) < len(model.blocks):
        raise UserError(f"{name} has blocks 0 to {len(model.blocks) - 1}, not {', '.join(map(str, blocks))}")
    layers = [getattr(model.blocks[i], "attn", None) for i in blocks or range(len(model.blocks))]
    if not all(isinstance(layer, Attention) for layer in layers):
        raise UserError(f"{name} has attention of another kind than ViT and DeiT, which maps.py can't read")

    def weights(i: int, qkv: Tensor) -> Tensor:  # timm's fused attention never holds them, so they are computed here
        q, k, _ = qkv.float().unflatten(-1, (3, layers[i].num_heads, -1)).permute(2, 0, 3, 1, 4)  # (N, heads, T, D)
        q, k = layers[i].q_norm(q) * layers[i].scale, layers[i].k_norm(k)
        return (q @ k.transpose(-2, -1)).softmax(-1).mean(1)

    return torch.stack(list(watch(model, images, {i: a.qkv for i, a in enumerate(layers)}, weights).values()))


def rollout(weights: Tensor) -> Tensor:
    """Attention through all blocks, `(blocks, N, T, T)` -> `(N, T, T)` (Abnar and Zuidema 2020): half of each token
    goes on as it is, along the skip connection, half is drawn from others. Rows sum to one."""
    result = one = torch.eye(weights.shape[-1], device=weights.device)
    for block in weights:
        result = (block + one) / 2 @ result
    return result


def class_attention(model: nn.Module, images: Tensor, block: int | None = 0) -> np.ndarray:
    """How much the class token draws on each patch in one block (paper, 5.6.6 and E.3: the first): `(N, rows, columns)`.
    What is missing of a sum of one goes to the class token itself. Raises `UserError` if there is none."""
    weights = attention_weights(model, images, None if block is None else [block])
    row = (rollout(weights) if block is None else weights[0])[:, 0, model.num_prefix_tokens:]
    return row.unflatten(1, model.patch_embed.grid_size).cpu().numpy()


def attention_rollout(model: nn.Module, images: Tensor) -> np.ndarray:
    """The same through all blocks, by `rollout`: `(N, rows, columns)`."""
    return class_attention(model, images, None)


def cka_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that CKA compares: timm's stages, in their blocks where they are sequences of such, and the output."""
    modules, names = dict(model.named_modules()), []
    for name in (info["module"] for info in model.feature_info if info["module"] in modules):
        parts = modules[name].named_children() if isinstance(modules[name], nn.Sequential) else ()
        names += [f"{name}.{part}" for part, _ in parts] or [name]
    return {name: modules[name] for name in names} | {"output": model}


def cka_matrix(cnn: nn.Module, transformer: nn.Module, loader: Iterable) -> np.ndarray:
    """Linear CKA (Raghu et al. 2021) between the `cka_layers` of both arms, from batches of at least 4 images
    `(N, 3, H, W)`, or (images, labels): `(cnn's layers, transformer's layers)`. 1: the two layers tell images apart
    in the same way, up to rotation and scale; near 0: in unrelated ways."""
    layers = cka_layers(cnn), cka_layers(transformer)
    cka = MinibatchCKA(*map(len, layers))
    for batch in loader:
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        found = [watch(arm, images, wanted, small_copy) for arm, wanted in zip((cnn, transformer), layers)]
        cka.add(*([features[name] for name in wanted] for features, wanted in zip(found, layers)))
    return cka.matrix().numpy()


def small_copy(name: str, features: Tensor) -> Tensor:
    """`(N, ...)` -> `(N, N)` with the same inner products, all that CKA asks for, so that the layers of both arms fit
    in memory together: with X' = QR, X X' = R' R."""
    return torch.linalg.qr(features.flatten(1).float().cpu().T, mode="r").R.T


# %% drawing


def colour_table() -> np.ndarray:
    """256 colours `(256, 3)`, uint8, dark violet to pale yellow: lightness rises, and equal steps look equally large.
    Anchors (lightness, chroma, hue) are joined in Oklab (Ottosson 2020), where distance is perceived difference."""
    light, chroma, hue = np.array([(.20, .07, 285), (.36, .15, 300), (.50, .19, 340), (.64, .19, 380), (.78, .15, 422),
                                   (.95, .11, 465)]).T
    anchors = np.stack([light, chroma * np.cos(np.radians(hue)), chroma * np.sin(np.radians(hue))])
    walked = np.r_[0, np.linalg.norm(np.diff(anchors), axis=0).cumsum()]
    lab = np.stack([np.interp(np.linspace(0, walked[-1], 256), walked, row) for row in anchors])
    cones = np.array([[1, .39634, .21580], [1, -.10556, -.06385], [1, -.08948, -1.29149]]) @ lab
    rgb = np.array([[4.07674, -3.30771, .23097], [-1.26844, 2.60976, -.34132], [-.00420, -.70342, 1.70761]]) @ cones**3
    rgb = np.where(rgb < .0031308, 12.92 * rgb, 1.055 * rgb.clip(0)**(1 / 2.4) - .055)  # sRGB's own curve
    return (rgb.clip(0, 1) * 255).round().astype(np.uint8).T


def paint(values: np.ndarray, low: float, high: float, size: tuple[int, int], resample: int = 0) -> Image.Image:
    """Values `(rows, columns)` as colours from `low` (dark) to `high` (bright), enlarged to `size`."""
    shares = Image.fromarray(np.nan_to_num((values - low) / ((high - low) or 1)).astype(np.float32)).resize(size, resample)
    return Image.fromarray(colour_table()[(np.asarray(shares).clip(0, 1) * 255).round().astype(int)])


def words(text: str, width: int, size: int = 15) -> Image.Image:
    """Text broken to `width` pixels."""
    font = ImageFont.load_default(size)
    fits = int(width / font.getlength("abcdeopst_") * 10)
    lines = [line for part in text.split("\n") for line in textwrap.wrap(part, fits)]
    image = Image.new("RGB", (width, len(lines) * (size + 5) + 1), "white")
    ImageDraw.Draw(image).multiline_text((0, 0), "\n".join(lines), "black", font)
    return image


def stack(images: Sequence[Image.Image], gap: int = 6, across: bool = False) -> Image.Image:
    """Images below one another, or beside."""
    if across:
        return stack([image.transpose(Image.Transpose.TRANSPOSE) for image in images], gap).transpose(Image.Transpose.TRANSPOSE)
    page = Image.new("RGB", (max(i.width for i in images), sum(i.height + gap for i in images) - gap), "white")
    for i, image in enumerate(images):
        page.paste(image, (0, sum(above.height + gap for above in images[:i])))
    return page


def draw_page(title: str, text: str, corner: list[Image.Image], heads: list[str], lines: list[tuple]) -> Image.Image:
    """A table of pictures under a title, which `corner` stands beside: `heads` over the columns, and for each line its
    caption, its pictures and a note below each."""
    width = max(picture.width for _, pictures, _ in lines for picture in pictures)
    lines = [("", [words(head, width) for head in heads], [""] * len(heads)), *lines]
    table = stack([stack([words(caption, 110), *(stack([picture, words(note, width, 13)])
                                                 for picture, note in zip(pictures, notes))], 20, across=True)
                   for caption, pictures, notes in lines], 8)
    space = max(table.width, 800) - sum(image.width + 20 for image in corner)
    top = stack([*corner, stack([words(title, space, 22), words(text, space)], 10)], 20, across=True)
    return ImageOps.expand(stack([top, table], 20), 20, "white")


def draw_matrix(matrix: np.ndarray, rows: list[str], columns: list[str], low: float = 0, high: float = 1) -> Image.Image:
    """Values `(rows, columns)` as coloured fields with their numbers, and the names of rows and columns."""
    image, font = paint(matrix, low, high, (38 * len(columns), 22 * len(rows))), ImageFont.load_default(13)
    for (i, j), value in np.ndenumerate(matrix):
        colour = "black" if value > low + 0.6 * (high - low) else "white"
        ImageDraw.Draw(image).text((38 * j + 19, 22 * i + 11), f"{value:.2f}", colour, font, "mm")
    left, above = (int(max(map(font.getlength, names))) + 12 for names in (rows, columns))
    page = ImageOps.expand(image, (left, above, 0, 0), "white")
    for i, name in enumerate(rows):
        page.paste(words(name, left, 13), (0, above + 22 * i + 2))
    for j, name in enumerate(columns):
        page.paste(words(name, above, 13).rotate(90, expand=True), (left + 38 * j + 10, 0))
    return page


# %% the command


class Network(NamedTuple):
    """One column of a picture: `group` is its run and whether it is trained; equal start weights have equal keys."""
    caption: str
    group: tuple[Path, bool]
    role: str
    model: nn.Module
    key: Any


def start_of(file: Path, run: Path, role: str) -> Network:
    """The start weights of the network in `file`, by its `config.json`; of a fine-tuned one, those of pretraining."""
    def read(name: str) -> dict:
        return json.loads((file.parent / name).read_text(encoding="utf-8"))

    while source := read("config.json")["options"].get("weights"):
        file = Path(source, file.name) if Path(source).is_dir() else Path(source)
    saved, options = read_network(file), read("config.json")["options"]
    seed = read("result.json")["kept_seed"] if (file.parent / "result.json").is_file() else options["seed"]
    arch, outputs, size, init = saved["arch"], saved["num_classes"], saved["image_size"], options["init"]
    text, key = (f"random, seed {seed}", (seed, outputs)) if init == "random" else (init, ())
    return Network(f"start of {file.resolve().parent.name} ({text})\n{arch}", (run, False), role,
                   build_model(arch, init, size, outputs=outputs, seed=seed), (arch, init, size, *key))


def find_columns(runs: list[Path]) -> list[Network]:
    """All networks of the runs, each after its start weights where these can be built."""
    found = []
    for run in runs:
        for name, (arch, file) in find_networks(argparse.Namespace(weights=run, arch=None)).items():
            saved = read_network(file)
            few = sum(weights.ndim == 4 for weights in saved["state_dict"].values()) < 2  # a CNN has more
            role = name if run.is_dir() and name in ("cnn", "transformer") else "transformer" if few else "cnn"
            try:
                found.append(start_of(file, run, role))
            except (UserError, OSError, ValueError, KeyError) as error:
                print(f"note: the start weights of {file} are left out: {error}", file=sys.stderr)
            found.append(Network(f"{file.resolve().parent.name}\n{arch}", (run, True), role,
                                 load_network(file, saved["image_size"]), file))
    return found


def sample_rows(data: Path, runs: list[Path], count: int, seed: int) -> tuple[list[Row], str]:
    """`count` images that are test images of every run, in the test part's class proportions, and a word on them."""
    images = read_images(data)
    splits = [read_split((run if run.is_dir() else run.parent) / "split.csv", images) for run in runs]
    tested = set.intersection(*({row.path for row in split.part("test")} for split in splits))
    rows = [row for row in splits[0].part("test") if row.path in tested]
    if count > len(rows):
        raise UserError(f"{data} has {len(rows)} test images that the runs share, fewer than {count}")
    chosen = label_fraction(images, rows, count / len(rows), seed)
    counts = ", ".join(f"{n:.0f} {name}" for name, n in zip(images.classes, images.truth(chosen).sum(0)))
    return chosen, f"{len(chosen)} test images of {data.resolve().name} ({counts or 'no labels'})"


def batches(folder: Path, rows: list[Row], size: int, batch_size: int, whole: bool = False) -> Iterable[Tensor]:
    return make_loader(ImageRows(folder, rows, augmentation(size, "none")), batch_size, shuffle=whole, drop_last=whole)


def draw_attention(networks: list[Network], folder: Path, rows: list[Row], what: str, args: argparse.Namespace) -> tuple:
    """Class attention, averaged over images, of networks side by side: a picture, and the arrays in it."""
    block, side = None if args.rollout else args.block, (240, 240)
    maps = {n.caption: np.concatenate([class_attention(n.model, images, block) for images in batches(
        folder, rows, n.model.image_size, args.batch_size)]).mean(0) for n in networks}
    shares = [m / m.mean() for m in maps.values()]
    low, high = min(s.min() for s in shares), max(s.max() for s in shares)
    seen = np.mean([np.asarray(load_image(folder / row.path).resize(side, 2), np.float32) for row in rows], axis=0)
    seen = Image.fromarray(seen.astype(np.uint8))
    bar = draw_matrix(np.linspace(high, low, 10)[:, None], [""] * 10, ["1 = average"], low, high)
    lines = [("the same colours for all", [*(paint(s, low, high, side) for s in shares), bar],
              [*(f"a patch gets {s.min():.2f} to {s.max():.2f} times the average" for s in shares), ""]),
             ("over the image, each from its own lowest to highest",
              [Image.blend(seen, paint(s, s.min(), s.max(), side, 3), 0.55) for s in shares], [""] * len(shares))]
    title = "Attention rollout" if args.rollout else f"Class attention of Transformer block {args.block}"
    text = ("All blocks multiplied: which patches the class token of the last block draws on." if args.rollout else
            "Which patches the class token draws on, mean over heads. Block 0 is the first.")
    return draw_page(title, f"{text}\n{what}", [seen.resize((120, 120))], [*maps, ""], lines), maps


def draw_features(networks: list[Network], file: Path) -> tuple:
    """The first convolutions of networks side by side: a picture, and the arrays in it."""
    found = [(n.caption, feature_maps(n.model, next(iter(batches(file.parent, [Row(file.name)], n.model.image_size, 1)))))
             for n in networks]
    lines = []
    for i in range(min(len(maps) for _, maps in found)):
        layers = [list(maps.items())[i] for _, maps in found]
        tiles = [[np.asarray(paint(m, m.min(), m.max(), (84, 84))).copy() for m in maps[0, :8]] for _, maps in layers]
        grids = [make_grid(torch.from_numpy(np.stack(t)).permute(0, 3, 1, 2), 4, pad_value=255) for t in tiles]
        lines.append((f"convolution {i + 1}", [Image.fromarray(grid.permute(1, 2, 0).numpy()) for grid in grids],
                      [f"{name}: {m.shape[1]} maps of {m.shape[2]} x {m.shape[3]}" for name, m in layers]))
    text = ("The first 8 maps of each convolution, before normalisation and activation, each from its own lowest value "
            f"(dark) to its highest (bright).\nImage: {file.name}")
    page = draw_page("Feature maps of the first convolutions", text, [load_image(file).resize((120, 120))],
                     [caption for caption, _ in found], lines)
    return page, {f"{caption} {name}": m for caption, maps in found for name, m in maps.items()}


def draw_cka(networks: list[Network], folder: Path, rows: list[Row], what: str, args: argparse.Namespace) -> tuple:
    """CKA between the two arms of each run, before and after training: a picture, and the arrays in it."""
    found, pictures = {}, []
    for group in dict.fromkeys(n.group for n in networks):
        pair = sorted((n for n in networks if n.group == group), key=lambda n: n.role)
        if len(pair) != 2:
            raise UserError(f"--cka compares the two arms of a run, but {group[0]} has {len(pair)}")
        one, other = (n.model for n in pair)
        matrix = cka_matrix(one, other, batches(folder, rows, one.image_size, args.batch_size, whole=True))
        found["\n".join([pair[0].caption, pair[1].caption.split("\n")[1]])] = matrix
        pictures.append(draw_matrix(matrix, *map(list, (cka_layers(one), cka_layers(other)))))
    bar = draw_matrix(np.linspace(1, 0, 11)[:, None], [""] * 11, [""])
    text = ("1: the two layers tell images apart in the same way, up to rotation and scale; 0: in unrelated ways. Rows: "
            f"layers of the first network named, columns: of the second.\n{what}, in batches of {args.batch_size}")
    return draw_page("Linear CKA between the layers of the two arms", text, [], [*found, ""],
                     [("", [*pictures, bar], [""] * (len(pictures) + 1))]), found


def map_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m extras.maps", allow_abbrev=False, description="Draw feature maps, "
                                     "class attention and CKA of trained networks, beside their start weights.")
    add = parser.add_argument
    add("--weights", type=Path, action="append", required=True, metavar="RUN|FILE",
        help="a run folder, or one file of weights in it; several, side by side, by giving the option again")
    add("--image", type=Path, metavar="FILE", help="draw feature maps and class attention of this image")
    add("--data", type=Path, help="folder of images the runs were made from, for --average and --cka")
    add("--average", type=positive(int), metavar="N", help="draw class attention averaged over N test images, in "
        "the test part's class proportions (paper: 30; 100 for ISIC 2019)")
    add("--cka", type=positive(int), nargs="?", const=256, metavar="N", help="draw linear CKA between the layers of "
        "both arms, on N test images (default: 256, or all there are)")
    add("--block", type=int, default=0, help="Transformer block, from 0 on (default: %(default)s, the paper's)")
    add("--rollout", action="store_true", help="attention through all blocks in place of one (not in the paper)")
    add("--batch-size", type=positive(int), default=16, help="images at a time (default: %(default)s)")
    add("--seed", type=int, default=0, help="chooses the N test images (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    add("--out", type=Path, help="folder for the PNG and NPZ files (default: maps in the first run's folder)")
    return parser
