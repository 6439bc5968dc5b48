"""The whole story, small: synthetic images, CASS, DINO, supervised, fine-tuning, tables, predictions.

    python -m extras.demo --quick     # under 3 minutes on 2 CPU cores
    python -m extras.demo             # under 10

It draws the sample set of `extras/sample.py` and runs this project's own commands on it with two
small networks from random weights at 96 pixels. The images are synthetic and the runs short: read
its numbers as a rehearsal, not as a result.
"""

import argparse
import shlex
import time
from pathlib import Path

import cass
import data
import dino
import finetune
from extras import sample

CNN, TRANSFORMER = "resnet10t", "test_vit"


def step(title: str, look: str, command, arguments: str) -> None:
    """Say what comes and what to look at, show the command as a user would type it, run it."""
    name = command.__name__.replace(".", "/")
    print(f"\n== {title}\n   {look}\n$ python {name}.py {arguments}" if "/" not in name else
          f"\n== {title}\n   {look}\n$ python -m {command.__name__} {arguments}", flush=True)
    command.main(shlex.split(arguments))


def tell_story(folder: Path, quick: bool) -> None:
    """Run everything into `folder`."""
    images, shared = folder / "autoimmune", "--init random --image-size 96 --seed 0 --overwrite"
    cass_epochs, dino_epochs, epochs = (4, 1, 8) if quick else (30, 8, 50)
    arms = f"--arch {CNN} --arch {TRANSFORMER}"
    if not (images / "labels.csv").exists():
        step("1. Images", "198 synthetic slides from 7 patients, a stand-in for the paper's biopsies.",
             sample, f"{images}")
    step("2. How they are read", "Patients are kept together: none has images in two parts.",
         data, f"--data {images}")
    step("3. CASS: two networks pull each other's outputs together, without labels",
         "The loss falls. Look at cosine: at 1.000 all images give the same output, and the low loss means nothing.",
         cass, f"--data {images} {shared} --cnn {CNN} --transformer {TRANSFORMER} --epochs {cass_epochs} "
               f"--out {folder / 'cass'}")
    step("4. DINO, one network after the other", "Two passes for two networks, and more work an image (a small "
         "output layer here: 1,024 instead of 65,336).",
         dino, f"--data {images} {shared} {arms} --epochs {dino_epochs} --out-dim 1024 --out {folder / 'dino'}")
    shared += f" --data {images} --epochs {epochs}"
    for labels in ("0.1", "1") if not quick else ("1",):
        share = {"0.1": "10 %", "1": "100 %"}[labels]
        step(f"5. Fine-tuning with {share} of the labels, from CASS",
             "Look at AUROC too: 0.5 is chance. 'chosen' is what validation picks, 'oracle' what hindsight would.",
             finetune, f"--weights {folder / 'cass'} {shared} --labels {labels} --out {folder / f'tuned-cass-{labels}'}")
        for arch in (CNN, TRANSFORMER):
            step(f"6. The same from DINO ({arch})", "One network a run.",
                 finetune, f"--weights {folder / 'dino' / arch} {shared} --labels {labels} "
                           f"--out {folder / f'tuned-dino-{arch}-{labels}'}")
        step(f"7. The same without pretraining ({share} of the labels)", "The baseline: is CASS above it?",
             finetune, f"{arms} {shared} --labels {labels} --out {folder / f'supervised-{labels}'}")
    step("8. Predictions for images without labels", "predictions.csv: one line an image; a flag where the arms disagree.",
         finetune, f"--predict {images} --weights {folder / 'tuned-cass-1'} --out {folder} --overwrite")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m extras.demo", allow_abbrev=False,
                                     description="The whole story on synthetic images, small.")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="where to (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="fewer epochs, full labels only: under 3 minutes")
    args = parser.parse_args(argv)
    begun = time.perf_counter()
    tell_story(args.out, args.quick)
    print(f"\nThe demo took {(time.perf_counter() - begun) / 60:.1f} minutes; everything is in {args.out}.")


if __name__ == "__main__" and "__file__" in globals():
    main()
