"""Look into trained networks: feature maps and class attention, as arrays and as pictures.

    python -m extras.maps --weights runs/cass-mri --image scan.jpg --image-size 384
    python -m extras.maps --weights runs/cass-mri --data ./mri --average 30

As in the paper's figures 3, 4 and 6 to 13 (5.6.6, E.2, E.3). Networks stand side by side; those of
pretraining after their start weights, which are built anew.
"""

import sys
from pathlib import Path

if not __package__:  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from data import (DataError, ImageRows, ImageSet, Row, augmentation, label_fraction, load_image,
                  make_loader, read_images, read_split)
from extras.pictures import draw_bar, draw_page, overlay, paint, tiles
from runtime import (UserError, build_model, clear_exit, command_parser, load_network,
                     network_files, pick_device, positive, read_network)

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


# %% networks and images


class Network(NamedTuple):
    """One column of a picture."""
    caption: str
    trained: bool
    model: nn.Module
    window: tuple[float, float] | None  # of intensities, in training


def read_networks(run: Path, size: int | None, device: torch.device) -> list[Network]:
    """The networks of a run, each after its start weights if it was pretrained, for images of
    `size`; None: of the size in training."""
    found = []
    for file in network_files(run):
        saved, home = read_network(file), file.resolve().parent
        arch, own = saved["arch"], saved["image_size"]
        options = json.loads((home / "config.json").read_text(encoding="utf-8"))["options"]
        if not (home / "result.json").exists():  # which fine-tuning writes
            inits, seed = options["init"].split(","), options["seed"]
            init = inits[-1 if file.stem == "transformer" else 0]  # one for both arms, or two
            start = build_model(arch, init, own, outputs=saved["num_classes"], seed=seed).to(device)
            if start.fixed_size:
                start.set_input_size(img_size=size or own)
            start.image_size = size or own
            caption = f"{arch}, before training ({init}, seed {seed})\n{file}"
            found.append(Network(caption, False, start, saved["window"]))
        model = load_network(file, size or own).to(device)
        found.append(Network(f"{arch}, trained\n{file}", True, model, saved["window"]))
    return found


def tested_images(data: Path, run: Path, count: int) -> ImageSet:
    """At most `count` test images of a run, in the classes' proportions. Raises `UserError`."""
    images = read_split((run if run.is_dir() else run.parent) / "split.csv", read_images(data))
    rows = images.part("test")
    if len(rows) < 4:
        raise UserError(f"{data} has {len(rows)} test images of {run}, and at least 4 are needed")
    return replace(images, rows=label_fraction(images, rows, min(1, count / len(rows)), seed=0))


def batches(images: ImageSet, network: Network, whole: bool = False) -> Iterable[Tensor]:
    """The images as `network` takes them, 16 at a time; `whole`: shuffled, no smaller batch."""
    images = replace(images, window=network.window)
    dataset = ImageRows(images, images.rows, augmentation(network.model.image_size, "none"))
    return make_loader(dataset, min(16, len(dataset)), shuffle=whole, drop_last=whole)


# %% pictures, with the arrays in them


def draw_attention(networks: list[Network], images: ImageSet, block: int) -> tuple:
    """Class attention of networks side by side: over one image, or the mean over several."""
    maps = {}
    for network in networks:
        loader = batches(images, network)
        found = [class_attention(network.model, batch, block) for batch in loader]
        mean = np.concatenate(found).mean(0)
        maps[network.caption] = mean / mean.mean()
    low, high = min(map(np.min, maps.values())), max(map(np.max, maps.values()))
    image = load_image(images.folder / images.rows[0].path, networks[0].window)
    image = image.resize((min(480, max(160, 240 * image.width // image.height)), 240))
    several = len(images.rows) > 1
    over = f" and {len(images.rows)} images" if several else ""
    columns = [["one of the images" if several else "the image", image]]
    for caption, values in maps.items():
        picture = paint(values, low, high, image.size, smooth=True)
        if not several:
            picture = overlay(picture, image)
        columns.append([caption, picture, f"{values.min():.2f} to {values.max():.2f}"])
    columns.append(["", draw_bar(low, high, 240, "1 = an even share")])
    text = ("How much the class token, from which the answer is made, draws on each patch in block "
            f"{block} (0 is the first), mean over heads{over}.")
    return draw_page("Class attention", text, columns), maps


def draw_features(networks: list[Network], images: ImageSet) -> tuple:
    """The first convolutions of networks side by side, for one image."""
    arrays, columns = {}, []
    for network in networks:
        columns.append([network.caption])
        maps = feature_maps(network.model, next(iter(batches(images, network))))
        for name, values in maps.items():
            arrays[f"{network.caption} {name}"] = values
            size = "{} maps of {} x {}".format(*values.shape[1:])
            columns[-1] += [f"{name}: {size}", tiles(values[0, :8])]
    text = ("The first 8 maps of each of the first convolutions, before normalisation and "
            "activation; each from its own lowest value (dark) to its highest (bright).")
    return draw_page("Feature maps", text, columns), arrays


# %% the command


def map_options() -> argparse.ArgumentParser:
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
    return parser


def run_maps(args: argparse.Namespace) -> None:
    """Draw what was asked for; write it once all of it is there."""
    if bool(args.average) != bool(args.data) or not (args.image or args.average):
        raise UserError("say what to draw: --image FILE, or --data DIR and --average N, or both")
    device, networks, pages = pick_device(args.device), [], {}
    for run in args.weights:
        networks += read_networks(run, args.image_size, device)
    readers = [network for network in networks if has_class_token(network.model)]
    others = [network for network in networks if not has_class_token(network.model)]
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
    write_pages(args.out or network_files(args.weights[0])[0].parent / "maps", pages)


def write_pages(out: Path, pages: dict[str, tuple[Image.Image, dict[str, np.ndarray]]]) -> None:
    """Pictures as PNG, and the arrays in them as NPZ."""
    out.mkdir(parents=True, exist_ok=True)
    for name, (page, arrays) in pages.items():
        page.save(out / f"{name}.png")
        np.savez(out / f"{name}.npz", **{key.replace("\n", " "): arrays[key] for key in arrays})
        print(f"wrote {out / name}.png, and the arrays in it to {name}.npz")


def main(argv: list[str] | None = None) -> None:
    args = map_options().parse_args(argv)
    with clear_exit(DataError):
        run_maps(args)


if __name__ == "__main__" and "__file__" in globals():
    main()
