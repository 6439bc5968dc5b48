"""How alike are the layers of two networks? Linear CKA, which told the paper that CNNs and
Transformers see differently (Raghu et al. 2021): as arrays and as a picture.

    python -m extras.cka --weights runs/cass-mri --data ./mri

compares all layers of a run's two networks, on test images.
"""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # if it is run by its path

from data import DataError, ImageRows, augmentation, make_loader
from extras.features import read_networks
from extras.maps import tested_images, watch, write_page
from extras.pictures import draw_matrix, draw_page
from runtime import UserError, clear_exit, command_parser, pick_device, positive

# %% linear CKA (Kornblith et al. 2019)


def gram(features: Tensor) -> Tensor:
    """Inner products `(N, N)` of N images' features `(N, ...)`, their mean taken off; 0 if they are
    equal up to rounding, as CKA is free of scale and would compare that."""
    x = features.flatten(1).float()
    centred = x - x.mean(0)
    if centred.norm() <= 1e-6 * x.norm():
        return torch.zeros(len(x), len(x), dtype=torch.float64)
    return (centred @ centred.T).cpu().double()


def hsic(k: Tensor, l: Tensor) -> float:
    """Unbiased HSIC of two Gram matrices `(N, N)`, N >= 4 (Nguyen et al. 2021, equation 3)."""
    n = len(k)
    k, l = k - torch.diag(k.diagonal()), l - torch.diag(l.diagonal())  # an image and itself
    both = (k * l).sum() + k.sum() * l.sum() / ((n - 1) * (n - 2))
    return float(both - 2 * (k.sum(1) @ l.sum(1)) / (n - 2)) / (n * (n - 3))


def cka_layers(model: nn.Module) -> dict[str, nn.Module]:
    """What CKA compares: the blocks of timm's stages, or stages without blocks, and the output."""
    modules, found = dict(model.named_modules()), {}
    for stage in (info["module"] for info in model.feature_info):
        layer = modules.get(stage)
        if isinstance(layer, nn.Sequential):
            found |= {f"{stage}.{name}": block for name, block in layer.named_children()}
        elif layer is not None:
            found[stage] = layer
    return found | {"output": model}


def cka_matrix(first: nn.Module, second: nn.Module, loader: Iterable[Tensor]) -> np.ndarray:
    """CKA between the `cka_layers` of two networks, `(first's, second's)`, from batches of at least
    4 images. 1: two layers tell images apart in the same way, up to rotation and scale; near 0: in
    unrelated ways; nan: one is the same for all images. HSIC is summed over batches, so that the
    features need not be in memory together (Nguyen et al. 2021)."""
    rows, columns = cka_layers(first), cka_layers(second)
    both = np.zeros((len(rows), len(columns)))
    own, other = np.zeros(len(rows)), np.zeros(len(columns))
    for images in loader:
        found, others = watch(first, images, rows, gram), watch(second, images, columns, gram)
        ks, ls = [found[name] for name in rows], [others[name] for name in columns]
        both += [[hsic(k, l) for l in ls] for k in ks]
        own += [hsic(k, k) for k in ks]
        other += [hsic(l, l) for l in ls]
    with np.errstate(invalid="ignore"):
        return both / np.sqrt(np.outer(own, other))


# %% the command


def draw_cka(args: argparse.Namespace) -> tuple:
    """CKA between the two networks of a run: picture and arrays."""
    networks = read_networks(args.weights, pick_device(args.device))
    if len(networks) != 2:
        raise UserError(f"CKA compares two networks of a run; {args.weights} has {len(networks)}")
    (row_file, first), (column_file, second) = networks.items()
    images = replace(tested_images(args.data, args.weights, args.images), window=first.window)
    dataset = ImageRows(images, images.rows, augmentation(first.image_size, "none"))
    batches = make_loader(dataset, min(16, len(dataset)), drop_last=True)  # of mixed classes
    matrix = cka_matrix(first, second, batches)
    text = (f"Between the layers of two networks, on {len(images.rows)} test images. 1: both tell "
            "images apart in the same way, up to rotation and scale; 0: in unrelated ways.")
    caption = f"rows: {first.arch} {row_file}\ncolumns: {second.arch} {column_file}"
    picture = draw_matrix(matrix, list(cka_layers(first)), list(cka_layers(second)))
    return draw_page("Linear CKA", text, [[caption, picture]]), {"cka": matrix}


def main(argv: list[str] | None = None) -> None:
    parser = command_parser("python -m extras.cka", "Draw linear CKA between two networks.")
    add = parser.add_argument
    add("--weights", type=Path, required=True, metavar="RUN", help="a run folder of two networks")
    add("--data", type=Path, required=True, help="folder of images the run was made from")
    add("--images", type=positive(int), default=256, help="test images, at most (default: 256)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    add("--out", type=Path, help="folder for cka.png and cka.npz (default: maps in the run)")
    args = parser.parse_args(argv)
    with clear_exit(DataError):
        write_page(args.out or args.weights / "maps", "cka", *draw_cka(args))


if __name__ == "__main__" and "__file__" in globals():
    main()
