"""The pooled features of a run's networks, for whatever you like to do with them.

    python -m extras.features --weights runs/cass-mri --data ./mri --out features.npz

One array for each network, named like its file, such as `cnn` `(N, F)`; and for the same N images
`paths`, `parts` (train, val, test, as the run had them), `groups`, `labels` `(N, K)` of 0 and 1 and
their `classes` `(K,)`. To read it: `np.load("features.npz")["cnn"]`.
"""

import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # if it is run by its path

from data import (DataError, ImageCache, ImageRows, ImageSet, augmentation, good_rows, make_loader,
                  read_images, read_split, require, split_images)
from runtime import (aside, clear_exit, command_parser, load_network, network_files, pick_device,
                     pick_workers, read_network)


def read_networks(run: Path, device: torch.device,
                  size: int | None = None) -> dict[Path, nn.Module]:
    """{file: network} of a run, for images of `size`, None: of that in training. They carry
    `.window`, the range of intensities they were trained with."""
    networks = {}
    for file in network_files(run):
        saved = read_network(file)
        network = load_network(file, size or saved["image_size"]).to(device)
        network.window = saved["window"]
        networks[file] = network
    return networks


def plain_batches(images: ImageSet, network: nn.Module, batch_size: int = 16, workers: int = 0,
                  cache: ImageCache | None = None) -> Iterable[Tensor]:
    """All `images` in order, as `network` sees them: without labels and augmentation."""
    images = replace(images, window=getattr(network, "window", images.window))
    transform = augmentation(network.image_size, "none")
    dataset = ImageRows(images, images.rows, transform, cache=cache)
    return make_loader(dataset, batch_size, shuffle=False, workers=workers)


@torch.no_grad()
def pooled_features(network: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """What the classifier of a timm network would see, `(N, F)`."""
    device, features = next(network.parameters()).device, []
    network.eval()
    for images in batches:
        maps = network.forward_features(images.to(device))
        features.append(network.forward_head(maps, pre_logits=True).float().cpu())
    return torch.cat(features)


@clear_exit(DataError)
def main(argv: list[str] | None = None) -> None:
    parser = command_parser("python -m extras.features", "Write the features of a run's networks.")
    add = parser.add_argument
    add("--weights", type=Path, required=True, help="a run folder, or a file of weights in one")
    add("--data", type=Path, required=True, help="folder of images, with or without labels")
    add("--out", type=Path, required=True, help="the .npz file to write")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    add("--workers", type=int, help="loader processes (default: as in cass.py)")
    add("--skip-bad", action="store_true", help="leave out, and name, images that can't be read")
    args = parser.parse_args(argv)
    require(args.out.suffix == ".npz", f"--out {args.out} is no name of an .npz file")
    device, images = pick_device(args.device), read_images(args.data)
    workers = pick_workers(args.workers, device)
    split = network_files(args.weights)[0].parent / "split.csv"
    images = read_split(split, images, grow=True) if split.is_file() else images
    images = split_images(good_rows(images) if args.skip_bad else images)
    arrays = {name: np.array([getattr(row, field) for row in images.rows], str)
              for name, field in (("paths", "path"), ("parts", "split"), ("groups", "group"))}
    arrays |= {"labels": images.truth(images.rows), "classes": np.array(images.classes, str)}
    for note in images.notes:
        print(f"note: {note}")
    for file, network in read_networks(args.weights, device).items():
        batches = plain_batches(images, network, workers=workers)
        arrays[file.stem] = pooled_features(network, batches).numpy()
        print(f"{file.stem}: {' x '.join(map(str, arrays[file.stem].shape))} of {network.arch}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with aside(args.out) as file, open(file, "wb") as handle:
        np.savez(handle, **arrays)


if __name__ == "__main__":
    main()
