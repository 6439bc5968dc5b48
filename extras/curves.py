"""Curves of a run's log: the loss, the gauges of collapse, and what frozen features know.

    python cass.py --data ./mri --out runs/cosine
    python -m extras.probe --every 2 cass.py --data ./mri --out runs/contrast --loss contrast
    python -m extras.curves runs/cosine runs/contrast

One column a network, one row a quantity, one colour a run; epoch 0 is the untrained network.
"""

import sys
from pathlib import Path

if not __package__:  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json

from PIL import Image

from extras.pictures import LINES, draw_curves, draw_page, grid, words
from runtime import UserError, clear_exit, command_parser

MEANING = {
    "loss": "what training makes small",
    "cosine": "how alike the outputs of different images are; 1: the same for all",
    "rank": "along how many directions outputs differ",
    "moved": "how far the weights have moved, as a share of their size",
    "knn": "F1 of nearest neighbours on frozen features, validation images",
    "linear": "F1 of a linear classifier on frozen features, validation images",
}
Curves = dict[str, dict[str, list[tuple[int, float]]]]


def read_curves(run: Path) -> Curves:
    """{network: {quantity: [(epoch, value)]}} from a run's `config.json` and `log.jsonl`."""
    try:
        options = json.loads((run / "config.json").read_text(encoding="utf-8"))["options"]
        lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
    except (OSError, ValueError, KeyError):
        rows = []
    arms = [key.removesuffix("_cosine") for key in (rows or [{}])[0] if key.endswith("_cosine")]
    if not arms:
        raise UserError(f"{run} is no run folder of cass.py or dino.py with a log")
    curves = {}
    for arm in arms:
        name = options.get(arm) or options["arch"]
        name = f"{name} ({arm})" if name in curves else name  # two arms of one kind
        curves[name] = {gauge: [] for gauge in MEANING}
        for gauge, points in curves[name].items():
            key = gauge if gauge == "loss" else f"{arm}_{gauge}"
            points += [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
    return curves


def draw_runs(runs: dict[str, Curves], gauges: list[str]) -> Image.Image:
    """A picture of `read_curves` of several runs, by what each is called."""
    columns = {network: [network] for curves in runs.values() for network in curves}
    for gauge in gauges:
        for network, column in columns.items():
            cell = [curves.get(network, {}).get(gauge, []) for curves in runs.values()]
            most = 1 if gauge in ("cosine", "knn", "linear") else 0
            column.append(draw_curves(cell, gauge, most, log=gauge == "loss"))
    meaning = "\n".join(f"{gauge}: {MEANING[gauge]}" for gauge in gauges)
    legend = []
    for run, colour in zip(runs, LINES):
        legend.append([Image.new("RGB", (28, 14), colour), words(run, 200)])
    columns["runs"] = ["runs", grid(legend)]
    return draw_page("Pretraining, epoch by epoch", meaning, list(columns.values()))


def main(argv: list[str] | None = None) -> None:
    parser = command_parser("python -m extras.curves", "Draw losses, gauges and probes of runs.")
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN",
        help=f"run folders of cass.py or dino.py, at most {len(LINES)}")
    add("--gauges", nargs="+", choices=tuple(MEANING), help="what to draw (default: all there is)")
    add("--out", type=Path, default=Path("curves.png"), help="PNG file (default: %(default)s)")
    args = parser.parse_args(argv)
    with clear_exit():
        if len(args.runs) > len(LINES) or args.out.suffix.lower() != ".png":
            raise UserError(f"at most {len(LINES)} runs, please, and an --out that ends in .png")
        runs = {str(run): read_curves(run) for run in args.runs}
        curves = [network for run in runs.values() for network in run.values()]
        found = [gauge for gauge in MEANING if any(network[gauge] for network in curves)]
        if missing := set(args.gauges or ()) - set(found):
            raise UserError(f"no log has {' or '.join(missing)}; extras.probe adds knn and linear")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        draw_runs(runs, args.gauges or found).save(args.out)
        print(f"wrote {args.out}")


if __name__ == "__main__" and "__file__" in globals():
    main()
