"""The whole story, small: synthetic images, CASS with both losses, DINO, supervised; fine-tuning; table and figures.

    python -m extras.demo --quick     # under 3 minutes on 2 CPU cores
    python -m extras.demo             # under 10

It draws the sample set of `extras/sample.py` and runs this project's own commands on it with two
small networks from random weights at 96 pixels. The images are synthetic and the runs short: read
its numbers as a rehearsal, not as a result.
"""

import json
import shlex
import time
from pathlib import Path

import cass
import data
import dino
import finetune
from extras import curves, maps, sample
from runtime import Options

CNN, TRANSFORMER = "resnet10t", "test_vit"


def step(title: str, look: str, command, arguments: str) -> None:
    """Say what comes and what to look at, show the command as a user would type it, run it."""
    name = command.__name__
    print(f"\n== {title}\n   {look}\n$ python {f'-m {name}' if '.' in name else f'{name}.py'} {arguments}", flush=True)
    command.main(shlex.split(arguments))


def tell_story(folder: Path, quick: bool) -> None:
    """Run everything into `folder`."""
    images, arms = folder / "autoimmune", f"--arch {CNN} --arch {TRANSFORMER}"
    cass_epochs, dino_epochs, epochs, shares = (4, 1, 6, ("1",)) if quick else (15, 5, 16, ("0.1", "1"))
    shared = f"--data {images} --init random --image-size 96 --seed 0 --overwrite"
    if not (images / "labels.csv").exists():
        step("Images", "198 synthetic slides from 7 patients, a stand-in for the paper's biopsies.", sample, f"{images}")
    step("How they are read", "Patients are kept together: none has images in two parts.", data, f"--data {images}")
    for loss, look in (
            ("cosine", "The loss falls. Look at cosine: at 1.000 all images give the same output, and the low loss means "
                       "nothing."),
            ("contrast", "Not the paper's: each image must recognise its own output by the other arm. Look at cosine again.")):
        step(f"CASS, --loss {loss}: two networks pull each other's outputs together, without labels", look, cass,
             f"{shared} --loss {loss} --cnn {CNN} --transformer {TRANSFORMER} --epochs {cass_epochs} --probe-every {max(1, cass_epochs // 5)} "
             f"--out {folder / loss}")
    step("The two losses over the epochs", "Look at curves.png: the left-out half of the story of a falling loss.", curves,
         f"{folder / 'cosine'} {folder / 'contrast'} --out {folder / 'curves.png'}")
    step("DINO, one network after the other", "Two passes for two networks, and more work an image (a small output layer "
         "here: 1,024 instead of 65,336).", dino,
         f"{shared} {arms} --epochs {dino_epochs} --out-dim 1024 --out {folder / 'dino'}")
    tuned = {}
    for share in shares:
        for name, start in (("CASS, cosine", f"--weights {folder / 'cosine'}"),
                            ("CASS, contrast", f"--weights {folder / 'contrast'}"),
                            *((f"DINO, {arch}", f"--weights {folder / 'dino' / arch}") for arch in (CNN, TRANSFORMER)),
                            ("supervised", arms)):
            tuned[name, share] = folder / f"tuned-{name.replace(', ', '-').lower()}-{share}"
            step(f"Fine-tuning with {float(share):.0%} of the labels: {name}", "Look at AUROC too: 0.5 is chance. 'chosen' is "
                 "what validation picks, 'oracle' what hindsight would.", finetune,
                 f"{start} {shared} --epochs {epochs} --labels {share} --out {tuned[name, share]}")
    print("\n== The table\n   One seed and 40 or so test images: differences of a few points are chance.")
    print("\n".join(summary(tuned)))
    step("Figures", "Does attention look at cells? Do pretrained filters differ from random ones?", maps,
         f"--weights {folder / 'contrast'} --weights {tuned['supervised', '1']} --image {images}/images/synthetic-002.tif "
         f"--data {images} --average 30 --cka --out {folder / 'maps'}")
    step("Predictions for images without labels", "predictions.csv: one line an image; a flag where the arms disagree.",
         finetune, f"--predict {images} --weights {tuned['CASS, contrast', '1']} --out {folder} --overwrite")


def summary(tuned: dict[tuple[str, str], Path]) -> list[str]:
    """Test scores of the fine-tuned runs, read from their `result.json`."""
    lines = [f"{'pretraining':22}{'labels':>8}   {'arm':14}{'pooled F1':>10}{'AUROC':>8}"]
    for (name, share), run in tuned.items():
        for arm, scores in json.loads((run / "result.json").read_text(encoding="utf-8"))["seeds"][0]["arms"].items():
            lines.append(f"{name:22}{float(share):8.0%}   {arm:14}{scores['test']['headline']:10.3f}"
                         f"{scores['test']['auroc']['macro'] or float('nan'):8.3f}")
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = Options("python -m extras.demo", "The whole story on synthetic images, small.")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="where to (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="fewer epochs, full labels only: under 3 minutes")
    args = parser.parse_args(argv)
    if any(letter.isspace() for letter in str(args.out)):
        parser.error(f"--out {args.out} has a blank in it, which the commands shown could not be typed with")
    begun = time.perf_counter()
    tell_story(args.out, args.quick)
    print(f"\nThe demo took {(time.perf_counter() - begun) / 60:.1f} minutes; everything is in {args.out}.")


if __name__ == "__main__" and "__file__" in globals():
    main()
