"""Look into trained networks: feature maps and class attention, as arrays and as pictures.

    python -m extras.maps --weights runs/cass-mri --image scan.jpg --image-size 384
    python -m extras.maps --weights runs/cass-mri --data ./mri --average 30

As in the paper's figures 3, 4 and 6 to 13 (5.6.6, E.2, E.3); networks stand side by side.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # if it is run by its path

from data import DataError, ImageSet, Row, label_fraction, load_image, read_images, read_split
from extras.features import plain_batches, read_networks
from extras.pictures import draw_page, overlay, paint, tiles
from runtime import UserError, clear_exit, command_parser, pick_device, positive

# %% arrays


@torch.no_grad()
def watch(model: nn.Module, images: Tensor, layers: dict[str, nn.Module],
          keep: Callable[[Tensor], Any]) -> dict[str, Any]:
    """Run images `(N, 3, H, W)` through `model` in evaluation mode: {name: keep(output)} of those
    `layers` that run, in the order in which they run."""
    found = {}

    def hook(name: str, layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        found[name] = keep(output)

    hooks = [layer.register_forward_hook(partial(hook, name)) for name, layer in layers.items()]
    model.eval()(images.to(next(model.parameters()).device))
    for handle in hooks:
        handle.remove()
    return found


def feature_maps(model: nn.Module, images: Tensor, most: int = 5) -> dict[str, np.ndarray]:
    """What the first convolutions make of images `(N, 3, H, W)` (paper, 5.6.6 and E.2), before
    normalisation and activation: {name: `(N, C, h, w)`}. Those on one pooled pixel, as in
    squeeze-and-excitation, do not count."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    # A copy, as the activation that follows may work in place.
    found = watch(model, images, layers, lambda maps: maps.float().cpu().numpy().copy())
    wide = [(name, maps) for name, maps in found.items() if maps.shape[-1] > 1]
    return dict(wide[:most])


def has_class_token(model: nn.Module) -> bool:
    return getattr(model, "cls_token", None) is not None and hasattr(model, "blocks")


def class_attention(model: nn.Module, images: Tensor, block: int = 0) -> np.ndarray:
    """How much the class token draws on each patch in one Transformer block, mean over heads
    (paper, 5.6.6 and E.3: the first): `(N, rows, columns)` for images `(N, 3, H, W)`. What is
    missing of a sum of one it draws from itself. Raises `UserError` if there is none."""
    blocks = model.blocks if has_class_token(model) else ()
    attention = getattr(blocks[block], "attn", None) if 0 <= block < len(blocks) else None
    if not hasattr(attention, "fused_attn") or not hasattr(attention, "attn_drop"):
        raise UserError(f"{type(model).__name__} has no class attention in a block {block}; ViT "
                        "and DeiT have it in each block, counted from 0")
    fused, attention.fused_attn = attention.fused_attn, False  # fused, it never holds its weights
    layers = {"weights": attention.attn_drop}
    found = watch(model, images, layers, lambda weights: weights.float().mean(1).cpu())
    attention.fused_attn = fused
    row = found["weights"][:, 0, model.num_prefix_tokens:]  # the class token is the first of these
    return row.unflatten(1, model.patch_embed.grid_size).numpy()


# %% pictures, each with the arrays in it: (page, {name: array})


def draw_attention(networks: dict[str, nn.Module], images: ImageSet, block: int) -> tuple:
    """Class attention of networks side by side: over one image, or the mean over several."""
    maps, several = {}, len(images.rows) > 1
    for caption, network in networks.items():
        batches = plain_batches(images, network)
        found = [class_attention(network, batch, block) for batch in batches]
        mean = np.concatenate(found).mean(0)
        maps[caption] = mean / mean.mean()
    low, high = min(map(np.min, maps.values())), max(map(np.max, maps.values()))
    image = load_image(images.folder / images.rows[0].path, network.window)
    image = image.resize((min(480, max(160, 240 * image.width // image.height)), 240))
    columns = [["one of the images" if several else "the image", image]]
    for caption, values in maps.items():
        picture = paint(values, low, high, image.size, smooth=True)
        columns.append([caption, picture if several else overlay(picture, image),
                        f"{values.min():.2f} to {values.max():.2f}"])
    over = f" and {len(images.rows)} images" if several else ""
    text = ("How much the class token, from which the answer is made, draws on each patch in block "
            f"{block} (0 is the first), mean over heads{over}. 1 is an even share; dark is "
            f"{low:.2f}, bright {high:.2f}.")
    return draw_page("Class attention", text, columns), maps


def draw_features(networks: dict[str, nn.Module], images: ImageSet) -> tuple:
    """The first convolutions of networks side by side, for one image."""
    arrays, columns = {}, []
    for caption, network in networks.items():
        columns.append([caption])
        batches = plain_batches(images, network)
        for name, values in feature_maps(network, next(iter(batches))).items():
            arrays[f"{caption} {name}"] = values
            size = "{} maps of {} x {}".format(*values.shape[1:])
            columns[-1] += [f"{name}: {size}", tiles(values[0, :8])]
    text = ("The first 8 maps of each of the first convolutions, before normalisation and "
            "activation; each from its own lowest value (dark) to its highest (bright).")
    return draw_page("Feature maps", text, columns), arrays


def tested_images(data: Path, run: Path, count: int) -> ImageSet:
    """At most `count` test images of a run, in the classes' proportions. Raises `UserError`."""
    images = read_split((run if run.is_dir() else run.parent) / "split.csv", read_images(data))
    rows = images.part("test")
    if len(rows) < 4:
        raise UserError(f"{data} has {len(rows)} test images of {run}, and at least 4 are needed")
    return replace(images, rows=label_fraction(images, rows, min(1, count / len(rows)), seed=0))


def write_page(out: Path, name: str, page: Image.Image, arrays: dict[str, np.ndarray]) -> None:
    """A picture as PNG, and the arrays in it as NPZ."""
    out.mkdir(parents=True, exist_ok=True)
    page.quantize(256, dither=Image.Dither.NONE).save(out / f"{name}.png")  # a third of the bytes
    np.savez(out / f"{name}.npz", **arrays)
    print(f"wrote {out / name}.png, and the arrays in it to {name}.npz")


# %% the command


def run_maps(args: argparse.Namespace) -> None:
    """Draw what was asked for; write it once all of it is there."""
    if bool(args.average) != bool(args.data) or not (args.image or args.average):
        raise UserError("say what to draw: --image FILE, or --data DIR and --average N, or both")
    device, readers, others, pages = pick_device(args.device), {}, {}, {}
    for run in args.weights:
        for file, network in read_networks(run, device, args.image_size).items():
            kind = readers if has_class_token(network) else others
            kind[f"{network.arch} {file}"] = network
    if args.average:
        if not readers:
            raise UserError("--average draws class attention, but no network has a class token")
        images = tested_images(args.data, args.weights[0], args.average)
        pages["attention-average"] = draw_attention(readers, images, args.block)
    if args.image:
        image = ImageSet(args.image.parent, [Row(args.image.name)], [])
        if readers:
            pages[f"attention-{args.image.stem}"] = draw_attention(readers, image, args.block)
        if others:
            pages[f"features-{args.image.stem}"] = draw_features(others, image)
    run = args.weights[0]
    for name, page in pages.items():
        write_page(args.out or (run if run.is_dir() else run.parent) / "maps", name, *page)


def main(argv: list[str] | None = None) -> None:
    parser = command_parser("python -m extras.maps", "Draw feature maps and class attention.")
    add = parser.add_argument
    add("--weights", type=Path, action="append", required=True, metavar="RUN|FILE",
        help="a run folder, or one file of weights in it; several times: side by side")
    add("--image", type=Path, help="draw feature maps and class attention of this image")
    add("--data", type=Path, help="folder of images the first run was made from, for --average")
    add("--average", type=positive(int), metavar="N",
        help="draw class attention averaged over N test images (paper: 30; ISIC 2019: 100)")
    add("--block", type=int, default=0, help="Transformer block of the attention (paper's: 0)")
    add("--image-size", type=positive(int), help="look at images of this size: more patches than "
        "in training make finer maps (default: as in training)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    add("--out", type=Path, help="folder for PNG and NPZ files (default: maps in the first run)")
    with clear_exit(DataError):
        run_maps(parser.parse_args(argv))


if __name__ == "__main__" and "__file__" in globals():
    main()
