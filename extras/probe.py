"""How much do frozen features know? Nearest neighbours and a linear classifier on them.

    python -m extras.probe --weights runs/cass-mri --data ./mri
    python -m extras.probe --every 5 cass.py --data ./mri --epochs 50

The first scores the networks of a run; the second runs a pretraining command and adds the scores of
every fifth epoch to its log. Labels are used to look with: no network is trained on them.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # if it is run by its path

from cass import cass_options, run_cass
from data import DataError, ImageCache, ImageSet, open_images, read_images, read_split, require
from dino import dino_options, run_dino
from extras.features import plain_batches, pooled_features, read_networks
from metrics import decide, score
from runtime import (clear_exit, command_parser, network_files, pick_device, pick_workers,
                     positive)

METHODS = {"cass": (cass_options, run_cass), "dino": (dino_options, run_dino)}

# %% scores of features


def probe_network(network: nn.Module, images: ImageSet, batch_size: int = 16, workers: int = 0,
                  cache: ImageCache | None = None) -> dict[str, float]:
    """`probe_scores` of the pooled features of a network, which, as the random streams, stays as it
    is. Batch-norm statistics, in training behind and before it unset, are computed anew."""
    require_labels(images)
    device, network, parts = next(network.parameters()).device, copy.deepcopy(network), []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for part in ("train", "val"):
            rows = images.labelled(images.part(part))
            shown = replace(images, rows=rows)
            batches = plain_batches(shown, network, batch_size, workers, cache)
            if part == "train":
                torch.optim.swa_utils.update_bn(batches, network, device)
            features = pooled_features(network, batches).double()
            parts.append((features, torch.from_numpy(images.truth(rows))))
    return probe_scores(*parts, images.multi_label)


def fit_ridge(x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """Ridge regression of centred `y` `(N, K)` on centred `x` `(N, F)`: weights `(F, K)`, penalty.

    The penalty has the lowest squared error on images left out, one at a time. That needs no
    second fit: leaving out image i makes its residual r_i into r_i / (1 - h_i), where h_i, its
    leverage, is the share of its own label in its prediction. A fixed penalty is worst with as
    many features as images: then a network that collapses, and so has fewer, seems to improve."""
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    penalties = (len(x) * torch.logspace(-4, 4, 33)).tolist()
    errors = []
    for penalty in penalties:
        kept = s.square() / (s.square() + penalty)  # how much of each direction is used
        residual = y - u @ (kept[:, None] * (u.T @ y))
        leverage = 1 / len(x) + u.square() @ kept  # the mean, taken off before, is a fit too
        errors.append((residual / (1 - leverage)[:, None]).square().mean().item())
    best = penalties[errors.index(min(errors))]
    return v.T @ ((s / (s.square() + best))[:, None] * (u.T @ y)), best


def probe_scores(train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor],
                 multi_label: bool, neighbours: int = 20) -> dict[str, float]:
    """What simple classifiers on features reach on `validation`: macro F1, pooled for multi-label.

    knn: the mean labels of the nearest training images by cosine. linear: `fit_ridge`. guess: the
    most frequent answer for every image, to compare with. No random number is drawn."""
    (x, y), (z, truth) = train, validation
    noise = 1e-5 * x.abs().amax(0) + 1e-12  # what differs by less is rounding, not a feature
    mean, spread = x.mean(0), x.std(0, correction=0).maximum(noise)
    x, z, y = (x - mean) / spread, (z - mean) / spread, y.double()
    unit_x, unit_z = nn.functional.normalize(x, dim=1), nn.functional.normalize(z, dim=1)
    nearest = (unit_z @ unit_x.T).topk(min(neighbours, len(x))).indices  # (N, neighbours)
    weights, _ = fit_ridge(x, y - y.mean(0))
    answers = {"knn": y[nearest].mean(1), "linear": z @ weights + y.mean(0),
               "guess": y.mean(0).expand_as(truth)}
    scores = {}
    for name, values in answers.items():
        decided = decide(values.numpy(), "threshold" if multi_label else "argmax")
        classes = [""] * decided.shape[1]
        scores[name] = score(truth.numpy(), decided, classes, multi_label)["headline"]
    return scores


# %% the command


def require_labels(images: ImageSet) -> None:
    require(images.classes and images.part("val"),
            f"{images.folder} has no labels or no validation part, as probes need")


def look_into(args: argparse.Namespace, every: int) -> Callable[[int, dict[str, nn.Module]], dict]:
    """A `look` for `run_cass` or `run_dino` with options `args`: scores of every so many epochs."""
    images, workers = open_images(args), pick_workers(args.workers, pick_device(args.device))
    require_labels(images)  # a complaint comes before all else

    def look(epoch: int, networks: dict[str, nn.Module]) -> dict[str, float]:
        if epoch % every and epoch != args.epochs:
            return {}
        cache = args.cache and ImageCache(args.cache, args.image_size)
        row = {}
        for name, network in networks.items():
            scores = probe_network(network, images, args.batch_size, workers, cache)
            row |= {f"{name}_{probe}": scores[probe] for probe in ("knn", "linear")}
        return row
    return look


def probe_run(weights: Path, data: Path, device: torch.device, workers: int) -> None:
    """Print a row for each network of a run, scored on the split it was pretrained with."""
    split = network_files(weights)[0].parent / "split.csv"
    images = read_split(split, read_images(data))
    print(f"{'macro F1, pooled for several labels':72}{'width':>6}{'knn':>7}{'linear':>8}")
    for file, network in read_networks(weights, device).items():
        scores = probe_network(network, images, workers=workers)
        print(f"{str(file)[-40:]:42}{network.arch[:28]:30}{network.num_features:6d}"
              f"{scores['knn']:7.3f}{scores['linear']:8.3f}", flush=True)
    print(f"{'the same answer for every image':78}{scores['guess']:7.3f}{scores['guess']:8.3f}")


def main(argv: list[str] | None = None) -> None:
    parser = command_parser("python -m extras.probe", "Score simple classifiers on features.")
    add = parser.add_argument
    add("--weights", type=Path, metavar="RUN|FILE", help="a run folder, or one file in it")
    add("--data", type=Path, help="folder of the labelled images that the run was made from")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    add("--workers", type=int, help="loader processes (default: as in cass.py)")
    add("--every", type=positive(int), metavar="N", help="or score every N epochs of the command")
    add("command", nargs=argparse.REMAINDER, metavar="cass.py|dino.py ...", help="after --every N")
    args = parser.parse_args(argv)
    with clear_exit(DataError, FloatingPointError, resumable=bool(args.every)):
        if args.every:
            script, *words = args.command or [""]
            require(Path(script).stem in METHODS,
                    "--every N is followed by cass.py or dino.py and its options")
            method_options, run_method = METHODS[Path(script).stem]
            options = method_options().parse_args(words)
            return run_method(options, look=look_into(options, args.every))
        require(args.weights and args.data and not args.command,
                "give --weights RUN --data DIR, or --every N cass.py OPTIONS")
        device = pick_device(args.device)
        probe_run(args.weights, args.data, device, pick_workers(args.workers, device))


if __name__ == "__main__":
    main()
