"""Curves of a run's log: the loss, the gauges of collapse, and what frozen features know.

    python cass.py --data ./mri --out runs/cosine
    python -m extras.probe --every 2 cass.py --data ./mri --out runs/contrast --loss contrast
    python -m extras.curves runs/cosine runs/contrast

One column a network, one row a quantity, one colour a run; epoch 0 is the untrained network.
"""

import json
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # if it is run by its path

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


def read_log(run: Path) -> list[dict]:
    """The rows of a pretraining run's `log.jsonl`."""
    try:
        lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [dict(json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError, RecursionError):
        rows = []
    whole = all("epoch" in row for row in rows)
    if not whole or not any(key.endswith("_cosine") for row in rows[:1] for key in row):
        raise UserError(f"{run} is no run folder of cass.py or dino.py with a log")
    return rows


def points(rows: list[dict], arm: str, gauge: str) -> list[tuple[int, float]]:
    """(epoch, value) of one quantity of one network, where there is a value."""
    key = gauge if gauge == "loss" else f"{arm}_{gauge}"
    return [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]


def draw_runs(runs: dict[str, list[dict]], gauges: list[str]) -> Image.Image:
    """A picture of the logs of several runs, by what each is called."""
    keys = [key for rows in runs.values() for key in rows[0] if key.endswith("_cosine")]
    columns = []
    for arm in dict.fromkeys(key.removesuffix("_cosine") for key in keys):
        columns.append([arm])
        for gauge in gauges:
            curves = [points(rows, arm, gauge) if f"{arm}_cosine" in rows[0] else []
                      for rows in runs.values()]
            most = 1 if gauge in ("cosine", "knn", "linear") else 0
            columns[-1].append(draw_curves(curves, gauge, most, log=gauge == "loss"))
    legend = [[Image.new("RGB", (28, 14), colour), words(run, 200)]
              for run, colour in zip(runs, LINES)]
    columns.append(["runs", grid(legend)])
    meaning = "\n".join(f"{gauge}: {MEANING[gauge]}" for gauge in gauges)
    return draw_page("Pretraining, epoch by epoch", meaning, columns)


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
        runs = {str(run): read_log(run) for run in args.runs}
        keys = {key.rpartition("_")[2] for rows in runs.values() for row in rows for key in row}
        if missing := set(args.gauges or ()) - keys:
            raise UserError(f"no log has {' or '.join(missing)}; extras.probe adds knn and linear")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        draw_runs(runs, args.gauges or [key for key in MEANING if key in keys]).save(args.out)
        print(f"wrote {args.out}")


if __name__ == "__main__" and "__file__" in globals():
    main()
