"""Look into trained networks: feature maps, class attention and CKA, as arrays and as pictures.

    python -m extras.maps --weights runs/cass-mri --weights runs/finetune-supervised-mri-1 --image scan.jpg
    python -m extras.maps --weights runs/cass-mri --data ./mri --average 30 --cka

These are the paper's figures 3, 4 and 6 to 13 (5.6.6, E.2, E.3), and the measure of Raghu et al. 2021 that motivates
it. Each run stands beside the others and beside its start weights, built anew from what its `config.json` says.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from data import (DataError, ImageRows, Row, augmentation, label_fraction, load_image, make_loader, read_images,
                  read_split)
from extras.pictures import draw_bar, draw_layers, draw_maps, draw_matrix, draw_page
from finetune import find_networks
from metrics import MinibatchCKA
from runtime import Options, UserError, build_model, clear_exit, load_network, pick_device, positive, read_network

# %% arrays


@torch.no_grad()
def watch(model: nn.Module, images: Tensor, layers: dict, keep: Callable, most: int | None = None) -> dict:
    """Run images `(N, 3, H, W)` through `model` in evaluation mode; {name: keep(name, output)} for the first `most`
    of `layers`, in the order in which they run, without those for which that is None."""
    found, training = {}, model.training

    def hook(name: Any, layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        if name not in found and len(found) != most and (kept := keep(name, output)) is not None:
            found[name] = kept
    hooks = [layer.register_forward_hook(partial(hook, name)) for name, layer in layers.items()]
    try:
        model.eval()(images.to(next(model.parameters()).device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return found


def feature_maps(model: nn.Module, images: Tensor, layers: int = 5) -> dict[str, np.ndarray]:
    """What the first convolutions make of images `(N, 3, H, W)` (paper, 5.6.6 and E.2): {name: `(N, C, h, w)`}, before
    normalisation and activation. Those on one pooled pixel, as in squeeze-and-excitation, do not count."""
    def keep(name: str, maps: Tensor) -> np.ndarray | None:  # a copy, as the activation may work in place
        return None if maps.shape[-1] == 1 else maps.float().cpu().numpy().copy()
    return watch(model, images, {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}, keep, layers)


def attention_weights(model: nn.Module, images: Tensor, blocks: Sequence[int] | None = None) -> Tensor:
    """Attention in some Transformer blocks (None: in all), mean over heads: `(blocks, N, T, T)` for `(N, 3, H, W)`.
    Row t says how token t draws on all T tokens, and sums to one. The class token comes first, then others that are
    no patch (distillation, registers), then the patches. Raises `UserError` for a network without a class token."""
    name = getattr(model, "pretrained_cfg", {}).get("architecture", type(model).__name__)
    if getattr(model, "cls_token", None) is None or not hasattr(model, "blocks"):
        raise UserError(f"{name} has no class token and so no class attention; to see another network, name its file")
    if blocks and not 0 <= min(blocks) <= max(blocks) < len(model.blocks):
        raise UserError(f"{name} has blocks 0 to {len(model.blocks) - 1}, not {', '.join(map(str, blocks))}")
    layers = [getattr(model.blocks[i], "attn", None) for i in blocks or range(len(model.blocks))]
    if not all(isinstance(layer, Attention) for layer in layers):
        raise UserError(f"{name} has attention of another kind than ViT and DeiT, which maps.py can't read")

    def weights(i: int, qkv: Tensor) -> Tensor:  # a fused attention never holds them, so they are computed here
        q, k, _ = qkv.float().unflatten(-1, (3, layers[i].num_heads, -1)).permute(2, 0, 3, 1, 4)  # (N, heads, T, D)
        q, k = layers[i].q_norm(q) * layers[i].scale, layers[i].k_norm(k)
        return (q @ k.transpose(-2, -1)).softmax(-1).mean(1)
    found = watch(model, images, {i: layer.qkv for i, layer in enumerate(layers)}, weights)
    return torch.stack([found[i] for i in range(len(layers))])


def rollout(weights: Tensor) -> Tensor:
    """Attention through all blocks, `(blocks, N, T, T)` -> `(N, T, T)` (Abnar and Zuidema 2020): half of each token
    goes on as it is, along the skip connection, half is drawn from others. Rows sum to one."""
    result = one = torch.eye(weights.shape[-1], device=weights.device)
    for block in weights:
        result = (block + one) / 2 @ result
    return result


def class_attention(model: nn.Module, images: Tensor, block: int | None = 0) -> np.ndarray:
    """How much the class token draws on each patch in one block, mean over heads (paper, 5.6.6 and E.3: the first):
    `(N, rows, columns)`. What is missing of a sum of one it draws from itself. Raises `UserError` if there is none."""
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
        if missing := [name for features, wanted in zip(found, layers) for name in wanted if name not in features]:
            raise UserError(f"layer {missing[0]} gives several outputs, or none, which CKA can't compare; take other networks")
        cka.add(*([features[name] for name in wanted] for features, wanted in zip(found, layers)))
    return cka.matrix().numpy()


def small_copy(name: str, features: Any) -> Tensor | None:
    """`(N, ...)` -> `(N, N)` with the same inner products, all that CKA asks for, so that the layers of both arms fit
    in memory together: with X' = QR, X X' = R' R."""
    if not isinstance(features, Tensor):  # some layers give several tensors: those are left out
        return None
    return torch.linalg.qr(features.flatten(1).float().cpu().T, mode="r").R.T


# %% the command


class Network(NamedTuple):
    """One column of a picture; start weights with equal keys are equal."""
    caption: str
    run: Path
    trained: bool
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
    options["init"] = options["init"].split(",")[-1 if file.stem == "transformer" else 0]  # one for both arms, or one each
    seed = read("result.json")["kept_seed"] if (file.parent / "result.json").is_file() else options["seed"]
    arch, outputs, size, init = saved["arch"], saved["num_classes"], saved["image_size"], options["init"]
    text, key = (f"random, seed {seed}", (seed, outputs)) if init == "random" else (init, ())
    return Network(f"start of {file.resolve().parent.name} ({text})\n{arch}", run, False, role,
                   build_model(arch, init, size, outputs=outputs, seed=seed), (arch, init, size, *key))


def find_columns(runs: list[Path]) -> list[Network]:
    """All networks of the runs, each after its start weights where these can be built."""
    found = []
    for run in runs:
        for name, (arch, file) in find_networks(argparse.Namespace(weights=run, arch=None)).items():
            saved = read_network(file)
            few = sum(weights.ndim == 4 for weights in saved["state_dict"].values()) < 2  # a CNN has more
            role = "transformer" if few or "cls_token" in saved["state_dict"] else "cnn"
            try:
                found.append(start_of(file, run, role))
            except (UserError, OSError, ValueError, KeyError) as error:
                print(f"note: the start weights of {file} are left out: {error}")
            found.append(Network(f"{file.resolve().parent.name}\n{arch}", run, True, role,
                                 load_network(file, saved["image_size"]), file.resolve()))
    return found


def sample_rows(data: Path, runs: list[Path], count: int) -> tuple[list[Row], str]:
    """At most `count` images that are test images of every run, in the classes' proportions, and a word on them."""
    images = read_images(data)
    splits = [read_split((run if run.is_dir() else run.parent) / "split.csv", images) for run in runs]
    rows = sorted(set.intersection(*(set(split.part("test")) for split in splits)), key=lambda row: row.path)
    if not rows:
        raise UserError(f"no image of {data} is a test image in all of these runs")
    chosen = label_fraction(images, rows, min(1.0, count / len(rows)), seed=0)
    counts = ", ".join(f"{n:.0f} {name}" for name, n in zip(images.classes, images.truth(chosen).sum(0)))
    return chosen, f"{len(chosen)} test images of {data.resolve().name} ({counts or 'no labels'})"


def batches(folder: Path, rows: list[Row], size: int, batch_size: int = 1, whole: bool = False) -> Iterable[Tensor]:
    return make_loader(ImageRows(folder, rows, augmentation(size, "none")), batch_size, shuffle=whole, drop_last=whole)


def draw_attention(nets: list[Network], folder: Path, rows: list[Row], what: str, args: argparse.Namespace) -> tuple:
    """Class attention, averaged over images, of networks side by side: a picture, and the arrays in it."""
    block = None if args.rollout else args.block
    maps = {n.caption: np.concatenate([class_attention(n.model, images, block) for images in batches(
        folder, rows, n.model.image_size, args.batch_size)]).mean(0) for n in nets}
    seen = np.mean([np.asarray(load_image(folder / row.path).resize((240, 240))) for row in rows], axis=0)
    title = "Attention rollout" if args.rollout else f"Class attention of Transformer block {block}"
    text = "in the end, through all blocks." if args.rollout else "in this block (0 is the first), mean over heads."
    return draw_maps(title, f"Which patches the class token draws on {text}\n{what}", maps, seen), maps


def draw_features(nets: list[Network], file: Path) -> tuple:
    """The first convolutions of networks side by side: a picture, and the arrays in it."""
    found = {n.caption: feature_maps(n.model, next(iter(batches(file.parent, [Row(file.name)], n.model.image_size))))
             for n in nets}
    page = draw_layers("Feature maps of the first convolutions", f"Image: {file.name}", found, load_image(file))
    return page, {f"{caption} {name}": values for caption, maps in found.items() for name, values in maps.items()}


def draw_cka(nets: list[Network], folder: Path, rows: list[Row], what: str, batch_size: int) -> tuple:
    """CKA between the two arms of each run, before and after training: a picture, and the arrays in it."""
    found, lines = {}, [(run.resolve().name, [], []) for run in dict.fromkeys(n.run for n in nets)]
    for run, (_, pictures, notes) in zip(dict.fromkeys(n.run for n in nets), lines):
        for trained in (False, True):
            pair = sorted((n for n in nets if n.run == run and n.trained == trained), key=lambda n: n.role)
            if trained and len(pair) != 2:
                raise UserError(f"--cka compares two networks of a run; those in {run} number {len(pair)}")
            picture, note = Image.new("RGB", (1, 1), "white"), "the start weights are not at hand"
            if len(pair) == 2:
                names, arms = [n.caption.replace("\n", ", ") for n in pair], [n.model for n in pair]
                for n in pair:  # the batch-norm statistics of random weights are unset
                    if not n.trained and "(random" in n.caption:
                        update_bn(batches(folder, rows, n.model.image_size, batch_size), n.model, next(n.model.parameters()).device)
                matrix = cka_matrix(*arms, batches(folder, rows, arms[0].image_size, batch_size, whole=True))
                found[" and ".join(names)], note = matrix, "rows: {}\ncolumns: {}".format(*names)
                picture = draw_matrix(matrix, *map(list, map(cka_layers, arms)))
            pictures.append(picture)
            notes.append(note)
    lines[0][1].append(draw_bar(0, 1, 240, "linear CKA"))
    text = ("1: the two layers tell images apart in the same way, up to rotation and scale; 0: in unrelated ways.\n"
            f"{what}: {len(rows) // batch_size} whole batches of {batch_size}.")
    return draw_page("Linear CKA between the layers of two arms", text, [], ["before", "after training"], lines), found


def map_options() -> argparse.ArgumentParser:
    parser = Options("python -m extras.maps", "Draw feature maps, class attention and CKA of trained networks, beside "
                     "their start weights.")
    add = parser.add_argument
    add("--weights", type=Path, action="append", required=True, metavar="RUN|FILE",
        help="a run folder, or one file of weights in it; give it several times to see them side by side")
    add("--image", type=Path, metavar="FILE", help="draw feature maps and class attention of this image")
    add("--data", type=Path, help="folder of images the runs were made from, for --average and --cka")
    add("--average", type=positive(int), metavar="N",
        help="draw class attention averaged over N test images, classes in proportion (paper: 30; ISIC 2019: 100)")
    add("--cka", type=positive(int), nargs="?", const=256, metavar="N",
        help="draw linear CKA between the layers of both arms, on N test images (default: %(const)s)")
    add("--block", type=int, default=0, help="Transformer block, from 0 on (default: %(default)s, the paper's)")
    add("--rollout", action="store_true", help="attention through all blocks in place of one (not in the paper)")
    add("--batch-size", type=positive(int), default=16, help="images at a time (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    add("--out", type=Path, help="folder for the PNG and NPZ files (default: maps in the first run's folder)")
    return parser


def run_maps(args: argparse.Namespace) -> None:
    """Draw what was asked for; write it once all of it is there."""
    if not (args.image or args.average or args.cka) or (args.average or args.cka) and not args.data:
        raise UserError("say what to draw: --image FILE, or --data DIR with --average N or --cka")
    device, pages, networks = pick_device(args.device), {}, find_columns(args.weights)
    for network in networks:
        network.model.to(device)
    first = {n.key: n for n in reversed(networks)}  # the same start weights need one column only
    shown = [n for n in networks if first[n.key] is n]
    cnns, transformers = ([n for n in shown if n.role == role] for role in ("cnn", "transformer"))
    if len({(n.caption, n.role) for n in shown}) < len(shown):
        raise UserError("two of the runs lie in folders of the same name; rename one of them")
    how = "rollout" if args.rollout else f"block{args.block}"
    if args.average and not transformers:
        raise UserError("--average is for class attention, and there is no Transformer among the networks")
    if args.image and transformers:
        pages[f"attention-{args.image.stem}-{how}"] = draw_attention(
            transformers, args.image.parent, [Row(args.image.name)], f"Image: {args.image.name}", args)
    if args.image and cnns:
        pages[f"features-{args.image.stem}"] = draw_features(cnns, args.image)
    if args.average:
        rows, what = sample_rows(args.data, args.weights, args.average)
        pages[f"attention-average{len(rows)}-{how}"] = draw_attention(
            transformers, args.data, rows, f"Mean over {what}, whose mean is on the left.", args)
    if args.cka:
        rows, what = sample_rows(args.data, args.weights, args.cka)
        if min(len(rows), args.batch_size) < 4:
            raise UserError("--cka compares the images of a batch, and needs at least 4 of them")
        pages["cka"] = draw_cka(networks, args.data, rows, what, min(len(rows), args.batch_size))
    out = args.out or (args.weights[0] if args.weights[0].is_dir() else args.weights[0].parent) / "maps"
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, (page, arrays) in pages.items():
            page.save(out / f"{name}.png")
            np.savez(out / f"{name}.npz", **{key.replace("\n", " "): array for key, array in arrays.items()})
            print(f"wrote {out / name}.png, and the arrays in it to {name}.npz")
    except OSError as error:
        raise UserError(f"--out {out} can't be written: {error.strerror}") from None


def main(argv: list[str] | None = None) -> None:
    args = map_options().parse_args(argv)
    with clear_exit(DataError):
        run_maps(args)


if __name__ == "__main__" and "__file__" in globals():
    main()
