"""Fine-tune pretrained networks with few labels, measure them, and predict on new images.

    python finetune.py --data ./autoimmune --weights runs/cass-autoimmune --labels 0.1
    python finetune.py --data ./autoimmune --arch resnet50           # supervised, for comparison
    python finetune.py --predict ./new-images --weights runs/finetune-cass-autoimmune-0.1

| question         | the paper says            | its notebook does         | we do                 |
|------------------|---------------------------|---------------------------|-----------------------|
| what is trained  | all weights; first version| all weights               | all weights           |
|                  | a linear classifier       |                           | [--protocol linear]   |
| class weights    | min-max normalised class  | the same, of the whole set| the same, of the      |
|                  | distribution              |                           | labels it may see     |
| schedule         | cosine, no length         | 16 batches down, 16 up    | the same [--schedule] |
| early stopping   | patience 5, validation    | of the sum over the number| of the mean           |
|                  | loss                      | of training batches       |                       |
| validation labels| -                         | -                         | all, always           |
| score            | F1, no formula            | pooled counts over all    | pooled at 0.5, macro  |
|                  |                           | epochs so far, at 0.5     | at argmax, best epoch |
| no class over 0.5| -                         | an extra class            | missed, no extra class|
| which arm to use | can't be told (Section 6) | -                         | chosen on validation  |
"""

import argparse
import copy
import json
import math
import shlex
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

# %% the loss (paper, F.3.2)


def focal_loss(logits: Tensor, truth: Tensor, weights: Tensor | None = None, alpha: float = 1.0,
               gamma: float = 2.0) -> Tensor:
    """Focal loss on sigmoid outputs, each class by itself (Lin et al. 2017): the mean of
    alpha * w_k * (1 - p_t)^gamma * -log p_t, p_t being the probability of what is true.

    `logits` and multi-hot `truth` are `(N, K)`, `weights` `(K,)`; the result is a scalar. `alpha`
    is a plain factor. In float32 from log-sigmoids, so logits of +-100 are safe in fp16 too.
    """
    wrong = binary_cross_entropy_with_logits(logits.float(), truth.float(), reduction="none")
    loss = alpha * (-torch.expm1(-wrong)) ** gamma * wrong  # wrong is -log p_t
    return (loss if weights is None else loss * weights).mean()


def class_weights(truth: np.ndarray, kind: str) -> np.ndarray:
    """One factor per class from multi-hot labels `(N, K)`: float32 `(K,)`.

    `paper`: class counts, min-max normalised to [0.2, 1]; it favours the most frequent class.
    `inverse`: N / (K * count), which favours rare ones; a class without a label counts as one.
    `none`: all 1.
    """
    counts = truth.sum(0).astype(np.float64)
    lowest, highest = counts.min(), counts.max()
    if kind == "paper" and highest > lowest:
        return (0.2 + 0.8 * (counts - lowest) / (highest - lowest)).astype(np.float32)
    if kind == "inverse":
        return (len(truth) / (len(counts) * counts.clip(1))).astype(np.float32)
    return np.ones(len(counts), np.float32)


def tuning_rate(step: int, lr: float, t_max: int, eta_min: float = 1e-6) -> float:
    """Cosine rate of a step: from `lr` down to `eta_min` in `t_max` steps, up again, and so on."""
    return eta_min + (lr - eta_min) * (1 + math.cos(math.pi * step / t_max)) / 2


# %% training and evaluation


def finetune_network(
    network: nn.Module, train: Iterable[tuple[Tensor, Tensor]],
    validation: Iterable[tuple[Tensor, Tensor]], *,
    epochs: int = 50,  # paper, F.3.2, at most
    lr: float = 3e-4,  # paper, F.3.2
    t_max: int = 16,  # steps from the highest rate to the lowest: the notebook's
    patience: int = 5,  # paper, F.3.2: epochs without a lower validation loss
    weights: Tensor | None = None,  # class weights (K,)
    linear: bool = False,  # True: the first paper's protocol, only the classifier is trained
    precision: torch.dtype = torch.float32,
    log: Callable[[dict], Any] = lambda row: None,
    save: Callable[[list, list], Any] = lambda parts, history: None,
    restore: Callable[[list], list] = lambda parts: [],
) -> dict:
    """Train `network` on batches of `(N, 3, H, W)` images and multi-hot labels `(N, K)`; leave it
    with the weights of its best epoch by validation loss, in evaluation mode.

    Returns `{"epochs", "best_epoch", "rate", "validation_loss"}`, `rate` being the last step's.
    `log`, `save` and `restore` are as in `pretrain_cass`. Raises `FloatingPointError` if a loss is
    not finite.
    """
    device = next(network.parameters()).device
    head = network.get_classifier()  # two of them in distilled models
    network.requires_grad_(not linear)
    nn.ModuleList(head if isinstance(head, tuple) else [head]).requires_grad_(True)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr, fused=True)
    best = copy.deepcopy(network)
    weights = None if weights is None else weights.to(device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    autocast = torch.autocast(device.type, precision, enabled=precision != torch.float32)
    parts = [network, best, optimizer, scaler]  # all that changes while training
    history, steps = restore(parts), len(train)  # the validation loss of each epoch that is done
    set_epoch = getattr(train, "set_epoch", lambda epoch: None)  # a plain DataLoader has none
    for epoch in range(len(history), epochs):
        if history and epoch - 1 - history.index(min(history)) >= patience:
            break
        set_epoch(epoch)
        network.train(not linear)  # a frozen network keeps its batch-norm statistics
        losses = []
        for step, (images, truth) in enumerate(train, epoch * steps):
            optimizer.param_groups[0]["lr"] = tuning_rate(step, lr, t_max)
            optimizer.zero_grad()
            images = images.to(device, non_blocking=True)
            with autocast:
                logits = network(images)  # (N, K)
                value = focal_loss(logits, truth.to(device), weights)
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(value.detach())
        history.append(evaluate(network, validation, weights, precision)[0])
        loss = torch.stack(losses).mean().item()
        if not math.isfinite(loss + history[-1]):
            raise FloatingPointError(f"the loss became {loss}, and {history[-1]} on validation, in "
                                     f"epoch {epoch + 1}; start anew with a lower --lr or "
                                     "--precision fp32")
        if history.index(min(history)) == epoch:
            best.load_state_dict(network.state_dict())
        log({"epoch": epoch + 1, "loss": loss, "validation_loss": history[-1],
             "learning_rate": optimizer.param_groups[0]["lr"]})
        save(parts, history)
    network.load_state_dict(best.state_dict())
    network.eval()
    best_epoch = history.index(min(history))
    return {"epochs": len(history), "best_epoch": best_epoch + 1,
            "rate": tuning_rate(len(history) * steps - 1, lr, t_max),
            "validation_loss": history[best_epoch]}


@torch.no_grad()
def evaluate(network: nn.Module, loader: Iterable[tuple[Tensor, Tensor]],
             weights: Tensor | None = None,
             precision: torch.dtype = torch.float32) -> tuple[float, np.ndarray]:
    """Mean focal loss over the images of `loader`, and their probabilities `(N, K)` by sigmoid."""
    device, total, probabilities = next(network.parameters()).device, 0.0, []
    network.eval()
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        for images, truth in loader:
            logits = network(images.to(device, non_blocking=True)).float()
            total += focal_loss(logits, truth.to(device), weights).item() * len(images)
            probabilities.append(logits.sigmoid().cpu().numpy())
    probabilities = np.concatenate(probabilities)
    return total / len(probabilities), probabilities


# %% the command: a run of fine-tuning


def tune_options() -> argparse.ArgumentParser:
    from data import add_data_options
    from runtime import add_run_options, command_parser, positive

    parser = command_parser("finetune.py", "Fine-tune pretrained networks with few labels, score "
                            "them, predict.")
    add = parser.add_argument
    add_data_options(parser, required=False)
    add_run_options(parser, epochs=50, lr=3e-4)
    parser.set_defaults(image_size=None)  # that of --weights
    add("--weights", type=Path, metavar="RUN|FILE", help="a run folder, for all its networks, "
        "its split and its size of images, or one file of it; without it --arch is trained from "
        "--init, supervised")
    add("--arch", action="append", help="timm name for training from --init; may be given twice")
    add("--protocol", choices=("full", "linear"), default="full", help="train all weights (paper) "
        "or only a classifier on the frozen network (its first version)")
    add("--labels", type=positive(float, 1), default=1.0, help="share of the training labels to "
        "use (paper: 0.01, 0.1, 1); smaller shares lie inside larger ones (%(default)s)")
    add("--seeds", type=positive(int), default=1, help="repeat with so many seeds, from --seed on, "
        "for mean and standard deviation (paper: 5)")
    add("--class-weights", choices=("paper", "inverse", "none"), default="paper", help="paper: "
        "growing with the class's frequency, which favours the majority; inverse: rare classes")
    add("--schedule", choices=("16", "run"), default="16", help="the rate falls within 16 steps "
        "and rises again (the notebook), or falls once over all --epochs, which suits few labels")
    add("--predict", type=Path, metavar="FOLDER", help="classify the images of FOLDER, or one "
        "image, with fine-tuned --weights, into predictions.csv (in --out, or here)")
    return parser


def find_starts(args: argparse.Namespace) -> dict[str, Path | str]:
    """What to train: name -> a file of weights or, to start from --init, a timm name."""
    from runtime import UserError, network_files

    if bool(args.weights) == bool(args.arch):
        raise UserError("name either --weights, a run folder or a file of it, or --arch, a timm "
                        "model to train from --init" + ", not both" * bool(args.arch))
    if args.weights:
        return {file.stem: file for file in network_files(args.weights)}
    starts = {name.split(".")[0]: name for name in args.arch}
    if len(starts) < len(args.arch):
        raise UserError("two --arch are equal up to the dot and would share a file; run them one "
                        "by one")
    return starts


def new_network(args: argparse.Namespace, start: Path | str, classes: int, seed: int) -> nn.Module:
    """A network with a new head of `classes` outputs."""
    from runtime import build_model, load_network

    options = {"outputs": classes, "seed": seed, "checkpointing": args.checkpointing}
    if isinstance(start, Path):
        return load_network(start, args.image_size, **options)
    return build_model(start, args.init, args.image_size, **options)


def tuned_images(args: argparse.Namespace, file: Path | None, window: Any) -> Any:
    """The data set, with the split that pretraining had, and only if it can be fine-tuned on.
    `file` holds pretrained weights, which had this `window`."""
    from data import PARTS, open_images, read_split, require

    require(args.data, "--data names the folder of labelled images (--predict one to classify)")
    require(args.batch_size > 1, "--batch-size 1 is too small for batch norm; take 2 or more")
    split = file.parent / "split.csv" if file else None
    if file and not split.is_file():
        print(f"note: {split} is not there; make sure that these weights were not pretrained on "
              "what is now the test part")
        split = None
    images = open_images(args, split)
    if window and args.window == "auto":
        images = replace(images, window=window)
    seen = read_split(split, images, grow=True).part("train") if split else []
    todo = "take another --split-file" if args.split_file else f"label test images of {split}"
    require(not {row.path for row in seen} & {row.path for row in images.part("test")},
            "there are test images that these weights were pretrained on; " + todo)
    require(len(images.classes) > 1 or images.multi_label,
            f"{args.data} has {len(images.classes) or 'no'} class; fine-tuning needs class folders "
            "or a labels.csv, with two classes or more")
    for part in PARTS:
        require(images.labelled(images.part(part)), f"the {part} part of {args.data} has no "
                "labelled images; fine-tuning needs them in all three parts (see --ratios; images "
                "without labels are for --predict)")
    return images


def run_tuning(args: argparse.Namespace) -> None:
    """Fine-tune every network with every seed; write weights, scores and predictions."""
    from data import ImageCache, begin_run, write_csv
    from runtime import Run, UserError, pick_hardware, read_network

    device, precision = pick_hardware(args)
    starts = find_starts(args)
    file = next(iter(starts.values())) if args.weights else None
    saved = read_network(file) if file else {"image_size": 384, "window": None}
    images = tuned_images(args, file, saved["window"])
    args.image_size = args.image_size or saved["image_size"]
    source = f"supervised-{args.data.resolve().name}"
    if file:
        source = file.resolve().parent.name + f"-{file.stem}" * args.weights.is_file()
    linear = "-linear" * (args.protocol == "linear")
    out = args.out or Path("runs", f"finetune-{source}-{args.labels:g}{linear}")
    if file and out.resolve() == file.resolve().parent:
        raise UserError(f"--out {out} holds the --weights, which must stay; choose another --out")
    run = Run(out, vars(args), ("seed", "arm", "epoch", "loss", "validation_loss", "learning_rate"))
    if run.finished:
        return print(f"{out} is finished; there is nothing to resume")
    arms = {name: new_network(args, start, len(images.classes), args.seed)
            for name, start in starts.items()}
    cache = args.cache and ImageCache(args.cache, args.image_size)
    begin_run(run, images, arms, (device, precision))
    seeds, lines, highest = [], [], -1.0
    for seed in range(args.seed, args.seed + args.seeds):
        facts, val, test = {}, {}, {}
        for name, start in starts.items():
            arms[name] = new_network(args, start, len(images.classes), seed).to(device)
            facts[name], val[name], test[name] = tune_once(
                args, run, name, arms[name], images, cache, seed, precision)
        val, test = with_ensemble(val), with_ensemble(test)
        seeds.append({"seed": seed, **score_seed(facts, val, test, images)})
        chosen = seeds[-1]["chosen"]
        lines += prediction_lines(test, chosen, images, images.part("test"), {"seed": seed})
        reached = seeds[-1]["arms"][chosen]["validation"]
        if reached > highest:  # the weights of the seed that validation likes best are kept
            highest, best = reached, seeds[-1]
            loads = [run.save_network(f"{name}.pt", arm) for name, arm in arms.items()]
    write_csv(run.folder / "predictions.csv", [lines[0], *map(dict.values, lines)])
    report(run, seeds, best, loads, images)


def tune_once(args: argparse.Namespace, run: Any, name: str, network: nn.Module, images: Any,
              cache: Any, seed: int, precision: torch.dtype) -> tuple[dict, np.ndarray, np.ndarray]:
    """Train one network with one seed: facts on how it ended, and its probabilities `(N, K)` for
    the labelled validation and for all test images, which are looked at here and only here."""
    from data import ImageRows, augmentation, label_fraction, make_loader

    def loader(rows: list, augment: str = "none") -> Iterable:
        dataset = ImageRows(images, rows, augmentation(args.image_size, augment), seed,
                            labelled=True, cache=cache)
        return make_loader(dataset, args.batch_size, seed=seed, shuffle=augment != "none",
                           workers=args.workers)

    rows = label_fraction(images, images.labelled(images.part("train")), args.labels, seed)
    train, validation = loader(rows, "cass"), loader(images.labelled(images.part("val")))
    weights = torch.from_numpy(class_weights(images.truth(rows), args.class_weights))
    checkpoint = f"checkpoint-{name}-seed{seed}"
    torch.manual_seed(seed)
    t_max, patience = 16, 5
    if args.schedule == "run":  # few labels: 5 epochs may be 10 steps, too few to judge by
        t_max, patience = args.epochs * len(train), max(5, math.ceil(100 / len(train)))
    facts = finetune_network(
        network, train, validation, epochs=args.epochs, lr=args.lr, t_max=t_max,
        patience=patience, weights=weights, linear=args.protocol == "linear", precision=precision,
        log=lambda row: run.log({"seed": seed, "arm": name, **row}),
        save=lambda parts, history: run.save(parts, history, checkpoint),
        restore=lambda parts: run.restore(parts, checkpoint))
    (run.folder / f"{checkpoint}-prev.pt").unlink(missing_ok=True)  # may be 1.4 GB for each network
    val = evaluate(network, validation, precision=precision)[1]
    test = evaluate(network, loader(images.part("test")), precision=precision)[1]
    return {"images": len(rows), **facts}, val, test


# %% the command: scores


def with_ensemble(arms: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same, and the mean probability of all networks where there are several."""
    return arms | {"ensemble": sum(arms.values()) / len(arms)} if len(arms) > 1 else arms


def score_seed(facts: dict, val: dict, test: dict, images: Any) -> dict:
    """Scores of one seed's networks and their ensemble, and which of them was `chosen`, by its
    score on the validation part."""
    from metrics import bootstrap_interval, score

    kind, rows = (images.classes, images.multi_label), images.part("test")
    val_truth = images.truth(images.labelled(images.part("val")))
    known, test_truth = images.known(rows), images.truth(images.labelled(rows))
    arms = {}
    for name in test:
        tested = test[name][known]
        arms[name] = {**facts.get(name, {}),
                      "validation": score(val_truth, val[name], *kind)["headline"],
                      "interval": bootstrap_interval(test_truth, tested, images.multi_label),
                      "test": score(test_truth, tested, *kind)}
    return {"arms": arms, "chosen": max(arms, key=lambda name: arms[name]["validation"])}


def guess_score(truth: np.ndarray, known: np.ndarray, images: Any) -> dict:
    """The score of one answer for every image: how frequent each class is among `known` labels."""
    from metrics import score

    answers = np.tile(known.mean(0), (len(truth), 1))
    return score(truth, answers, images.classes, images.multi_label)


def summary(tests: list[dict]) -> dict[str, tuple]:
    """(mean, standard deviation, n) over seeds of the main scores; of those that are defined."""
    from metrics import mean_and_spread

    several = tests[0]["multi_label"]
    rule, exact = ("threshold_0.5", "subset_accuracy") if several else ("argmax", "accuracy")
    found = {"macro F1": [test[rule]["f1_macro"] for test in tests],
             "pooled F1": [test["threshold_0.5"]["f1_pooled"] for test in tests],
             "accuracy": [test[rule][exact] for test in tests],
             "AUROC": [test["auroc"]["macro"] for test in tests]}
    return {name: mean_and_spread(values) for name, values in found.items() if None not in values}


def print_scores(rows: dict[str, dict[str, tuple]]) -> None:
    """Show a `summary` for each row."""
    titles = next(iter(rows.values()))  # the same in each row: the truth decides what is defined
    print(f"{'':27}" + "".join(f"{title:>16}" for title in titles))
    for name, scores in rows.items():
        line = f"{name[:26]:27}"
        for mean, spread, _ in scores.values():
            cell = f"{mean:.3f}" if spread is None else f"{mean:.3f} +-{spread:.3f}"
            line += f"{cell:>16}"
        print(line)


def report(run: Any, seeds: list[dict], best: dict, loads: list[str], images: Any) -> None:
    """Write result.json and show its scores. `seeds` are `score_seed`'s, `best` is the one whose
    networks were kept, which `loads` load."""
    from runtime import write_text

    truth, known = (images.truth(images.labelled(images.part(part))) for part in ("test", "train"))
    guess = guess_score(truth, known, images)
    tests = {name: [one["arms"][name]["test"] for one in seeds] for name in best["arms"]}
    tests["chosen"] = [one["arms"][one["chosen"]]["test"] for one in seeds]
    means = {name: summary(found) for name, found in tests.items()}
    config = {key: value for key, value in run.config.items() if key != "finished"}
    result = {"headline": guess["headline_name"], "kept_seed": best["seed"],
              "chosen": best["chosen"], "mean_sd_n": means, "guess": guess, "seeds": seeds,
              "run": config}
    write_text(run.folder / "result.json", json.dumps(result, indent=1) + "\n")
    run.finish(chosen=best["chosen"])
    for file in run.folder.glob("checkpoint-*-seed*.pt"):
        file.unlink()
    print(f"\nscores on {len(truth)} test images, seeds: {len(seeds)}; chosen: best on validation")
    print_scores(means | {"always the same answer": summary([guess])})
    for one in seeds:
        arm = one["arms"][one["chosen"]]
        print(f"seed {one['seed']}: {one['chosen']} is chosen, {guess['headline_name']} is "
              f"{arm['test']['headline']:.3f}, 95 % interval {arm['interval'][0]:.3f} to "
              f"{arm['interval'][1]:.3f}")
    print(f"\n{run.folder} holds result.json, predictions.csv and the weights of seed "
          f"{best['seed']}; timm loads them with")
    print("  " + "\n  ".join(loads))
    print("for new images:\n  python finetune.py --predict FOLDER --weights "
          + shlex.quote(str(run.folder)))


# %% the command: predictions


def prediction_lines(arms: dict[str, np.ndarray], chosen: str, images: Any, rows: list,
                     first: dict) -> list[dict]:
    """A dict for each image from the probabilities `(N, K)` of networks and ensemble: the classes
    by the `chosen` one, joined by |, whether they disagree, and every answer and probability."""
    from metrics import decide

    rule, lines = "threshold" if images.multi_label else "argmax", []
    decided = {name: decide(probabilities, rule) for name, probabilities in arms.items()}
    for i, row in enumerate(rows):
        answers, numbers = {}, {}
        for name in arms:
            said = [label for label, yes in zip(images.classes, decided[name][i]) if yes]
            answers[f"{name}: class"] = "|".join(said)
            for label, value in zip(images.classes, arms[name][i]):
                numbers[f"{name}: {label}"] = f"{value:.6f}"
        lines.append({**first, "image": row.path, "truth": "|".join(row.labels),
                      "class": answers[f"{chosen}: class"],
                      "arms disagree": "yes" if len(set(answers.values())) > 1 else "no",
                      **answers, **numbers})
    return lines


def fine_tuned(weights: Path | None) -> tuple[dict[str, Path], dict, str]:
    """The files of fine-tuned networks, what the first holds, and the name of the chosen one."""
    from runtime import UserError, network_files, read_config, read_network

    if weights is None:
        raise UserError("--predict needs fine-tuned --weights, a run of finetune.py or one file")
    files = {file.stem: file for file in network_files(weights)}
    first = read_network(next(iter(files.values())))
    for file in files.values():
        saved = read_network(file)
        if not saved["classes"] or saved["num_classes"] != len(saved["classes"]):
            raise UserError(f"{file} is pretrained only; fine-tune it first")
        if any(saved[key] != first[key] for key in ("classes", "image_size", "window")):
            raise UserError(f"the networks in {weights} are for different classes or image sizes; "
                            "name one file with --weights")
    if not (weights / "config.json").is_file():
        return files, first, next(iter(files))
    chosen = read_config(weights).get("chosen")
    if chosen not in (*files, "ensemble"):
        raise UserError(f"{weights} is no finished run of finetune.py; --resume it, or name one "
                        "file with --weights")
    return files, first, chosen


def predicted_images(path: Path, saved: dict, skip_bad: bool) -> tuple[Any, list[int]]:
    """One image, or all below a folder, and which of them have labels to be scored by: those of a
    data set whose classes the network knows. `saved` is what a file of weights holds."""
    from data import DataError, find_images, good_rows, read_images, require

    images, known = find_images(path), {}
    images = good_rows(images) if skip_bad else images
    if path.is_dir():
        try:
            found = read_images(path)
            known = {row.path: row for row in found.labelled(found.rows)}
            others = set(found.classes) - set(saved["classes"])
            require(not others, f"the network knows no class {', '.join(sorted(others))}")
        except DataError as error:
            known, note = {}, f"answers are not scored: {error}"
            images = replace(images, notes=[*images.notes, note])
    rows = [known.get(row.path, row) for row in images.rows]
    facts = {key: saved[key] for key in ("classes", "multi_label", "window")}
    images = replace(images, rows=rows, **facts)
    return images, [i for i, row in enumerate(rows) if row.path in known]


def run_prediction(args: argparse.Namespace) -> None:
    """Classify a folder of images, and score the answers where it is labelled."""
    from data import ImageRows, augmentation, make_loader, write_csv
    from metrics import score
    from runtime import UserError, load_network, pick_hardware, write_text

    device, precision = pick_hardware(args)
    files, saved, chosen = fine_tuned(args.weights)
    size, out = saved["image_size"], (args.out or Path(".")) / "predictions.csv"
    if out.parent.is_file():
        raise UserError(f"--out {args.out} is a file; name a folder")
    for file in (out, out.with_name("result.json")):
        if file.exists():
            raise UserError(f"{file} is there already; name another folder with --out")
    images, known = predicted_images(args.predict, saved, args.skip_bad)
    for note in images.notes:
        print(f"note: {note}")
    print(f"{len(images.rows)} images; the class is decided by {chosen}"
          + ", which did best on validation images" * (len(files) > 1))
    dataset = ImageRows(images, images.rows, augmentation(size, "none"), labelled=True)
    loader = make_loader(dataset, args.batch_size, shuffle=False, workers=args.workers)
    arms = {}
    for name, file in files.items():
        network = load_network(file, size).to(device)
        arms[name] = evaluate(network, loader, precision=precision)[1]
    arms = with_ensemble(arms)
    out.parent.mkdir(parents=True, exist_ok=True)
    if known:
        truth = images.truth([images.rows[i] for i in known])
        scores = {name: score(truth, values[known], images.classes, images.multi_label)
                  for name, values in arms.items()}
        scores["always the same answer"] = guess_score(truth, truth, images)
        write_text(out.with_name("result.json"), json.dumps(scores, indent=1) + "\n")
        print(f"scores on {len(known)} labelled images, in result.json too")
        print_scores({name: summary([one]) for name, one in scores.items()})
    lines = prediction_lines(arms, chosen, images, images.rows, {})
    write_csv(out, [lines[0], *map(dict.values, lines)])
    print(f"wrote {len(images.rows)} predictions to {out}")


def main(argv: list[str] | None = None) -> None:
    from data import DataError
    from runtime import clear_exit

    args = tune_options().parse_args(argv)
    with clear_exit(DataError, FloatingPointError, resumable=not args.predict):
        run_prediction(args) if args.predict else run_tuning(args)


if __name__ == "__main__" and "__file__" in globals():
    main()
