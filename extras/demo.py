"""The whole story in about two minutes: synthetic slides, both losses, few labels, predictions.

    python -m extras.demo
    python -m extras.demo --full      # and DINO, feature maps, attention and CKA: a minute more

It runs this project's own commands on the sample set of `extras/sample.py`, with two small networks
from random weights. What each command prints goes into a log beside its run. The images are
invented and the runs short: read its numbers as a rehearsal, not as a result.
"""

import contextlib
import csv
import json
import re
import shlex
import sys
import textwrap
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # if it is run by its path

import cass
import dino
import finetune
from extras import cka, curves, maps, sample
from extras.pictures import grid, words
from images import load_image
from runtime import UserError, clear_exit, command_parser, whole_number

GAUGES = ("loss", "cnn_cosine", "cnn_rank", "transformer_cosine", "transformer_rank")
OWN = """{}. Your own folder DIR of images (README, Your images, says which networks suit a CPU):
  python data.py --data DIR                      # how is it read?
  python cass.py --data DIR --epochs 100         # two pretrained networks, no labels needed
  python finetune.py --data DIR --weights runs/cass-DIR --labels 0.1
  python finetune.py --predict NEW --weights runs/finetune-cass-DIR-0.1"""


def run(command, arguments: str, log: Path) -> None:
    """Show a command as a user would type it, and run it with its output in a file."""
    name = command.__name__
    start = f"python -m {name}" if "." in name else f"python {name}.py"
    text = f"$ {start} " + re.sub(r"(--\S+) (?!-)", "\\1\u00a0", arguments)  # on one line
    lines = textwrap.wrap(text, 96, subsequent_indent="      ", break_long_words=False,
                          break_on_hyphens=False)
    print(" \\\n".join(lines).replace("\u00a0", " "), flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    words = shlex.split(arguments)
    sys.argv = [name.replace(".", "/") + ".py", *words]  # by which a stopped command names itself
    with open(log, "w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        command.main(words)


def show_log(folder: Path) -> None:
    """Four rows of a pretraining run's log."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    print("   epoch   " + "   ".join(GAUGES).replace("_", " "))
    for row in (rows[0], rows[1], rows[len(rows) // 2], rows[-1]):
        cells = {name: "-" if row[name] is None else f"{row[name]:.3f}" for name in GAUGES}
        line = "".join(f"{cell:>{len(name) + 3}}" for name, cell in cells.items())
        print(f"   {row['epoch']:5d}{line}")


def sheet(images: Path, captions: dict[str, str], file: Path) -> None:
    """Images with a caption below each, four in a row, as a PNG."""
    tiles = []
    for path, caption in captions.items():
        image = load_image(images / path)
        image = image.resize((240, 240 * image.height // image.width))
        tiles.append(grid([[image], [words(caption, 240, 12)]], 2))
    grid([tiles[i:i + 4] for i in range(0, len(tiles), 4)]).save(file)
    print(f"   look at {file}")


def read_table(file: Path) -> list[dict[str, str]]:
    with open(file, encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def show_scores(folder: Path) -> None:
    """Macro F1 of fine-tuned runs, and of the same answer for every image."""
    print(f"   {'mean +- spread of three':32}{'CNN':>16}{'Transformer':>18}")
    rows = []
    for run_name, title in (("few-contrast", "learned with contrast (step 3)"),
                            ("few-cosine", "collapsed (step 2)"), ("few-scratch", "from scratch")):
        result = json.loads((folder / run_name / "result.json").read_text(encoding="utf-8"))
        rows.append([result["mean_sd_n"][arm]["macro F1"][:2] for arm in result["seeds"][0]["arms"]
                     if arm != "ensemble"])
        print(f"   {title:32}" + "".join(f"{mean:9.3f} +- {sd:.3f}" for mean, sd in rows[-1]))
    guess = result["guess"]["threshold_0.5"]["f1_macro"]
    print(f"   {'the same answer for all':32}{guess:9.3f}{guess:18.3f}")
    line = f"   {'step 3 minus from scratch':32}"
    for (learned, sd), (scratch, other_sd) in zip(rows[0], rows[-1]):
        sign = ">" if learned - scratch > max(sd, other_sd) else "<"
        line += f"{learned - scratch:+9.3f} {sign} spread"
    print(line)


def tell_story(folder: Path, seed: int, full: bool) -> None:
    """Run everything into `folder`."""
    slides, new = folder / "slides", folder / "new"
    setting = (f"--data {slides} --cache {folder / 'cache'} --seed {seed} --init random "
               "--image-size 64")
    arms = "--cnn resnet10t --transformer test_vit --batch-size 32 --epochs 12"

    print("\n1. The images: invented slides of seven patients, with cells in five stains")
    run(sample, f"{slides} --images 300 --seed {seed}", folder / "sample.log")
    lines = read_table(slides / "labels.csv")[:8]
    names = [name for name in lines[0] if name not in ("image", "group")]
    sheet(slides, {line["image"]: ", ".join(name for name in names if line[name] == "1")
                   for line in lines}, folder / "slides.png")

    collapses = ("2. The paper's loss from random weights: it falls, but cosine rises to 1, all\n"
                 "   images get one output, and nothing is learned: this is "
                 "collapse (epoch 0: untrained)")
    holds = ("3. Same networks, images, time; now each image must recognise its own output among\n"
             "   those of others. Cosine stays below 1 and rank, the directions in use, high")
    for title, loss in ((collapses, "cosine"), (holds, "contrast")):
        print(f"\n{title}")
        run(cass, f"{setting} {arms} --loss {loss} --out {folder / loss}", folder / f"{loss}.log")
        show_log(folder / loss)
    run(curves, f"{folder / 'cosine'} {folder / 'contrast'} --gauges loss cosine rank "
        f"--out {folder / 'curves.png'}", folder / "curves.log")
    print(f"   look at {folder / 'curves.png'}")

    print("\n4. About ten labelled images, drawn three times: a linear classifier on what was\n"
          "   learned, and training from scratch; macro F1 on another patient's slides. Look at "
          "the\n   Transformer: a CNN sees colours without any learning, so it may gain "
          "nothing here")
    few = f"{setting} --labels 0.05 --seeds 3 --schedule run --epochs 30"
    for loss in ("contrast", "cosine"):
        run(finetune, f"{few} --weights {folder / loss} --protocol linear --lr 5e-3 "
            f"--out {folder / 'few'}-{loss}", folder / f"few-{loss}.log")
    run(finetune, f"{few} --arch resnet10t --arch test_vit --lr 1e-3 "
        f"--out {folder / 'few-scratch'}", folder / "few-scratch.log")
    show_scores(folder)

    print("\n5. Eight new slides of other patients, and what the networks of step 4 answer")
    run(sample, f"{new} --images 8 --seed {seed + 1}", folder / "new.log")
    run(finetune, f"--predict {new} --weights {folder / 'few-contrast'} --out {folder / 'answers'}",
        folder / "answers.log")
    answers = read_table(folder / "answers" / "predictions.csv")
    sheet(new, {line["image"]: f"truth: {line['truth']}\nanswer: {line['class'] or 'none'}"
                + "\n(the arms disagree)" * (line["arms disagree"] == "yes")
                for line in answers}, folder / "answers.png")
    if full:
        show_more(folder, setting)


def show_more(folder: Path, setting: str) -> None:
    """DINO, feature maps, attention and CKA."""
    print("\n6. DINO, the method CASS is compared with, one network at a time: five\n"
          "   epochs, to see it run and what it leaves, too few to judge it")
    for arch in ("resnet10t", "test_vit"):
        run(dino, f"{setting} --arch {arch} --out-dim 1024 --batch-size 32 --epochs 5 "
            f"--out {folder / 'dino'}-{arch}", folder / f"dino-{arch}.log")
    print("\n7. Where the Transformer looks, what the CNN's first layers see, and how alike their\n"
          "   layers are (linear CKA), collapsed and not")
    image = folder / "slides" / "images" / "synthetic-001.tif"
    run(maps, f"--weights {folder / 'cosine'} --weights {folder / 'contrast'} --image {image} "
        f"--image-size 384 --out {folder / 'maps'}", folder / "maps.log")
    for loss in ("cosine", "contrast"):
        run(cka, f"--weights {folder / loss} --data {folder / 'slides'} "
            f"--out {folder / 'cka'}-{loss}", folder / f"cka-{loss}.log")
    print(f"   look at the pictures in {folder / 'maps'}, {folder / 'cka'}-cosine and -contrast")


def main(argv: list[str] | None = None) -> None:
    parser = command_parser("python -m extras.demo", "The whole story on synthetic images.")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="a new folder "
                        "(default: %(default)s)")
    parser.add_argument("--full", action="store_true", help="DINO, maps and CKA too")
    parser.add_argument("--seed", type=whole_number, default=0, help="other images, start weights "
                        "and labels (0)")
    args = parser.parse_args(argv)
    begun = time.perf_counter()
    torch.set_num_threads(1)  # networks this small gain nothing by more
    with clear_exit():
        if any(letter.isspace() for letter in str(args.out)):
            raise UserError(f"--out {args.out} has a blank in it; the commands shown could not "
                            "be typed with it")
        if args.out.exists():
            raise UserError(f"{args.out} is there already; choose another --out, or remove it")
        tell_story(args.out, args.seed, args.full)
    print(f"\n{OWN.format(8 if args.full else 6)}\n")
    print(f"{(time.perf_counter() - begun) / 60:.1f} minutes; all is in {args.out}")


if __name__ == "__main__":
    main()
