"""The whole story in about two minutes: synthetic slides, both losses, few labels, predictions.

    python -m extras.demo

It runs this project's own commands on the sample set of `extras/sample.py`, with two small networks
from random weights. What each command prints goes into a log beside its run. The images are
invented and the runs short: read its numbers as a rehearsal, not as a result.
"""

import sys
from pathlib import Path

if not __package__:  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import contextlib
import csv
import json
import shlex
import textwrap
import time

import torch

import cass
import finetune
from extras import curves, maps, sample
from extras.pictures import grid, words
from images import load_image
from runtime import UserError, clear_exit, command_parser

ARMS = "--cnn resnet10t --transformer test_vit"
SETTING = "--init random --image-size 64 --batch-size 32"
GAUGES = ("loss", "cnn_cosine", "cnn_rank", "transformer_cosine", "transformer_rank")


def run(command, arguments: str, log: Path) -> None:
    """Show a command as a user would type it, and run it with its output in a file."""
    name = command.__name__
    start = f"python -m {name}" if "." in name else f"python {name}.py"
    lines = textwrap.wrap(f"$ {start} {arguments}", 96, subsequent_indent="      ",
                          break_long_words=False, break_on_hyphens=False)
    print(" \\\n".join(lines), flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        command.main(shlex.split(arguments))


def show_log(folder: Path) -> None:
    """Five rows of a pretraining run's log."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    print("   epoch" + "".join(f"{name:>20}" for name in GAUGES))
    for row in [*rows[:3], rows[len(rows) // 2], rows[-1]]:
        cells = ["-" if row[name] is None else f"{row[name]:.3f}" for name in GAUGES]
        print(f"   {row['epoch']:5d}" + "".join(f"{cell:>20}" for cell in cells))


def sheet(images: Path, captions: dict[str, str], file: Path) -> None:
    """Images with a caption below each, four in a row, as a PNG."""
    tiles = []
    for path, caption in captions.items():
        image = load_image(images / path).resize((200, 200))
        tiles.append(grid([[image], [words(caption, 200, 12)]], 2))
    grid([tiles[i:i + 4] for i in range(0, len(tiles), 4)]).save(file)
    print(f"   look at {file}")


def tell_story(folder: Path, full: bool) -> None:
    """Run everything into `folder`."""
    images, data = folder / "slides", f"--data {folder / 'slides'} --cache {folder / 'cache'}"
    print("\n1. The images: 300 invented slides of seven patients, cells in five stains")
    if not (images / "labels.csv").exists():
        run(sample, f"{images} --images 300", folder / "sample.log")
    with open(images / "labels.csv", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    names = [name for name in lines[0] if name not in ("image", "group")]
    labels = {line["image"]: "|".join(name for name in names if line[name] == "1")
              for line in lines}
    sheet(images, dict(list(labels.items())[:8]), folder / "slides.png")
    for number, loss, meaning in (
            (2, "cosine", "The paper's loss from random weights. It falls, and cosine goes to 1: "
             "every\n   image gets the same output, so the low loss means nothing."),
            (3, "contrast", "Same networks, same images; each image must recognise its own output "
             "among\n   others. Outputs of different images move apart: cosine falls.")):
        print(f"\n{number}. {meaning}")
        run(cass, f"{data} {SETTING} {ARMS} --loss {loss} --epochs 12 --out {folder / loss}",
            folder / f"{loss}.log")
        show_log(folder / loss)
    run(curves, f"{folder / 'cosine'} {folder / 'contrast'} --gauges loss cosine rank "
        f"--out {folder / 'curves.png'}", folder / "curves.log")
    print("\n4. A tenth of the labels, drawn three times: a linear classifier on features,\n"
          "   beside networks trained from scratch (macro F1 on test patients)")
    few = f"{data} {SETTING} --labels 0.1 --seeds 3 --schedule run --epochs 20"
    starts = {"contrast": f"--weights {folder / 'contrast'} --protocol linear --lr 5e-3",
              "cosine": f"--weights {folder / 'cosine'} --protocol linear --lr 5e-3",
              "scratch": "--arch resnet10t --arch test_vit --lr 1e-3"}
    table = []
    for name, start in starts.items():
        out = folder / f"few-{name}"
        run(finetune, f"{few} {start} --out {out}", folder / f"few-{name}.log")
        result = json.loads((out / "result.json").read_text(encoding="utf-8"))
        scores = [result["mean_sd_n"][arm]["macro F1"] for arm in list(result["mean_sd_n"])[:2]]
        table.append(f"   {name:24}" + "".join(f"{m:10.3f} +-{sd:.3f}" for m, sd, _ in scores))
    guess = result["guess"]["threshold_0.5"]["f1_macro"]
    print(f"   {'':24}{'CNN':>17}{'Transformer':>17}", *table,
          f"   {'always the same answer':24}{guess:10.3f}{guess:17.3f}", sep="\n")
    print("\n5. Answers for eight slides (some trained on); marked where the arms disagree")
    (folder / "answers" / "predictions.csv").unlink(missing_ok=True)
    run(finetune, f"--predict {images} --weights {folder / 'few-contrast'} "
        f"--out {folder / 'answers'}", folder / "answers.log")
    with open(folder / "answers" / "predictions.csv", encoding="utf-8") as file:
        answers = list(csv.DictReader(file))[:8]
    sheet(images, {line["image"]: f"truth: {line['truth']}\nanswer: {line['class']}"
                   + "\n(the arms disagree)" * (line["arms disagree"] == "yes")
                   for line in answers}, folder / "answers.png")
    if full:
        print("\n6. Where the Transformer looks, and what the CNN's first layers see")
        first = next(iter(labels))
        run(maps, f"--weights {folder / 'contrast'} --image {images / first} --image-size 384 "
            f"--out {folder / 'maps'}", folder / "maps.log")


def main(argv: list[str] | None = None) -> None:
    parser = command_parser("python -m extras.demo", "The whole story on synthetic images.")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="a new folder "
                        "(default: %(default)s)")
    parser.add_argument("--full", action="store_true", help="feature maps and attention too")
    args = parser.parse_args(argv)
    begun = time.perf_counter()
    torch.set_num_threads(1)  # networks this small gain nothing by more
    with clear_exit():
        if any(letter.isspace() for letter in str(args.out)):
            raise UserError(f"--out {args.out} has a blank in it; the commands shown could not "
                            "be typed with it")
        if (args.out / "cosine").exists():
            raise UserError(f"{args.out} holds a demo already; choose another --out, or remove it")
        tell_story(args.out, args.full)
    print("\nYour own folder of images:\n"
          "  python data.py --data DIR\n  python cass.py --data DIR --epochs 100\n"
          "  python finetune.py --data DIR --weights runs/cass-DIR --labels 0.1\n"
          "  python finetune.py --predict NEW --weights runs/finetune-cass-DIR-0.1\n"
          f"{(time.perf_counter() - begun) / 60:.1f} minutes; everything is in {args.out}.")


if __name__ == "__main__":
    main()
