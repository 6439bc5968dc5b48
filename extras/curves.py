"""Curves of a run's log: the gauges of collapse, and what probes find in the frozen features, over the epochs.

    python cass.py --data ./mri --probe-every 1 --out runs/cosine
    python cass.py --data ./mri --probe-every 1 --out runs/contrast --loss contrast
    python -m extras.curves runs/cosine runs/contrast

One column a network, one row a quantity, one colour a run; epoch 0 is the untrained network.
"""

import json
from pathlib import Path

from PIL import Image, ImageOps

from extras.pictures import LINES, draw_curves, draw_legend, stack, words
from runtime import Options, UserError, clear_exit

MEANING = {
    "cosine": "how alike the outputs of different images are (1: the same for all)",
    "spread": "how far they are spread out (0: one point)",
    "rank": "along how many directions they differ",
    "moved": "how far the weights have moved",
    "knn": "F1 of nearest neighbours on frozen features, validation images",
    "linear": "F1 of a linear classifier on frozen features, validation images"}


def read_curves(run: Path) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """{timm name: {quantity: (epochs, values)}} of one run, from its `config.json` and `log.jsonl`."""
    try:
        arms = json.loads((run / "config.json").read_text(encoding="utf-8"))["arms"]
        text = (run / "log.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.split("\n")[:-1]]  # a last half line belongs to a run that goes on
    except (OSError, ValueError, KeyError):
        raise UserError(f"{run} is no run folder of cass.py or dino.py with a log") from None
    alike = len(set(arms.values())) < len(arms)  # two arms of one kind need two columns
    return {f"{arch} ({arm})" if alike else arch: {gauge: tuple(map(list, zip(*[(row["epoch"], row[f"{arm}_{gauge}"]) for row in rows
                                                if row.get(f"{arm}_{gauge}") is not None]))) or ([], [])
                   for gauge in MEANING} for arm, arch in arms.items()}


def draw_runs(runs: dict[str, dict], gauges: list[str]) -> Image.Image:
    """A picture of `read_curves` of several runs, by what each is called."""
    archs = list(dict.fromkeys(arch for curves in runs.values() for arch in curves))
    width = 360 * len(archs) + 20 * (len(archs) - 1)
    rows = [draw_legend(list(runs), width), stack([words(arch, 360) for arch in archs], 20, across=True)]
    for gauge in gauges:
        cells = [[curves.get(arch, {}).get(gauge, ([], [])) for curves in runs.values()] for arch in archs]
        if any(y for cell in cells for _, y in cell):
            rows += [words(f"{gauge}: {MEANING[gauge]}", width, 13), stack(
                [draw_curves(cell) if any(y for _, y in cell) else Image.new("RGB", (360, 180), "white") for cell in cells],
                20, across=True)]
    if len(rows) == 2:
        raise UserError(f"no log has {' or '.join(gauges)}; knn and linear are there with --probe-every")
    return ImageOps.expand(stack([*rows, words("epoch", width, 13)], 8), 16, "white")


def main(argv: list[str] | None = None) -> None:
    parser = Options("python -m extras.curves", "Draw the gauges and probes of runs over their epochs.")
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help=f"run folders of cass.py or dino.py, at most {len(LINES)}")
    add("--gauges", nargs="+", choices=tuple(MEANING), default=["cosine", "knn", "linear"],
        help="what to draw (default: cosine knn linear)")
    add("--out", type=Path, default=Path("curves.png"), help="PNG file (default: %(default)s)")
    args = parser.parse_args(argv)
    with clear_exit():
        if len(args.runs) > len(LINES):
            raise UserError(f"{len(args.runs)} runs are more than the {len(LINES)} that can be told apart")
        if len({run.resolve().name for run in args.runs}) < len(args.runs):
            raise UserError("two of the runs lie in folders of the same name; rename one of them")
        if args.out.suffix.lower() != ".png":
            raise UserError(f"--out {args.out} must end in .png")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        draw_runs({run.resolve().name: read_curves(run) for run in args.runs}, args.gauges).save(args.out)
        print(f"wrote {args.out}")


if __name__ == "__main__" and "__file__" in globals():
    main()
