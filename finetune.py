"""Fine-tune pretrained networks with few labels, measure them, and predict on new images.

    python finetune.py --data ./autoimmune --weights runs/cass-autoimmune --labels 0.1
    python finetune.py --data ./autoimmune --arch resnet50           # supervised, for comparison
    python finetune.py --predict ./new-images --weights runs/finetune-cass-autoimmune-0.1

Where the paper, its published notebook and this file differ (option that changes it in brackets):

| question | the paper says | its notebook does | we do |
|---|---|---|---|
| what is trained | all weights; its first version a linear classifier | all weights | all weights [--protocol] |
| class weights | min-max normalised class distribution | the same, from the whole set; grows with frequency | the same, from the labels the run may see [--class-weights] |
| schedule | cosine, no length | 16 batches down, 16 up | the same [--schedule] |
| early stopping | patience 5 on validation loss | summed validation loss over the number of training batches, and only when the training score improves | patience 5 on mean validation loss |
| labels of the validation part | - | - | all of them, whatever --labels |
| score | F1, no formula | pooled counts over all epochs so far, at 0.5 | pooled at 0.5 and macro at argmax, of the best epoch |
| images without any class above 0.5 | - | counted as an extra class | missed, no extra class |
| which arm to use | can't be told (Section 6) | - | chosen on validation; its test score beside the best arm's |
"""

import argparse
import csv
import itertools
import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any, Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

# %% the loss (paper, F.3.2)


def focal_loss(logits: Tensor, truth: Tensor, weights: Tensor | None = None, alpha: float = 1.0,
               gamma: float = 2.0) -> Tensor:
    """Focal loss on sigmoid outputs, each class by itself (Lin et al. 2017): the mean of
    alpha * w_k * (1 - p_t)^gamma * -log p_t, p_t being the probability of what is true.

    `logits` and multi-hot `truth` are `(N, K)`, `weights` `(K,)`; the result is a scalar. `alpha` is a
    plain factor. Computed in float32 from log-sigmoids, so logits of +-100 are safe in fp16 too.
    """
    wrong = nn.functional.binary_cross_entropy_with_logits(logits.float(), truth.float(), reduction="none")
    loss = alpha * (-torch.expm1(-wrong)) ** gamma * wrong  # wrong = -log p_t, so 1 - p_t = -expm1(-wrong)
    return (loss if weights is None else loss * weights).mean()


def class_weights(truth: np.ndarray, kind: str) -> np.ndarray:
    """One factor per class from multi-hot labels `(N, K)`: float32 `(K,)`.

    `paper`: class counts, min-max normalised to [0.2, 1]; it favours the most frequent class.
    `inverse`: N / (K * count), which favours rare ones; a class without a label counts as one.
    `none`: all 1.
    """
    counts = truth.sum(0).astype(np.float64)
    if kind == "paper" and counts.max() > counts.min():
        return (0.2 + 0.8 * (counts - counts.min()) / (counts.max() - counts.min())).astype(np.float32)
    if kind == "inverse":
        return (len(truth) / (len(counts) * counts.clip(1))).astype(np.float32)
    return np.ones(len(counts), np.float32)


def tuning_rate(step: int, lr: float, t_max: int, eta_min: float = 1e-6) -> float:
    """Cosine rate of a step: from `lr` down to `eta_min` in `t_max` steps, up again, and so on."""
    return eta_min + (lr - eta_min) * (1 + math.cos(math.pi * step / t_max)) / 2


# %% training and evaluation


class FineTuning:
    """Everything that changes while a network is fine-tuned, and so everything a checkpoint holds."""

    def __init__(self, network: nn.Module, lr: float, linear: bool, precision: torch.dtype) -> None:
        self.network, self.device = network, next(network.parameters()).device
        network.requires_grad_(not linear)
        head = network.get_classifier()  # two of them in distilled models
        nn.ModuleList(head if isinstance(head, tuple) else [head]).requires_grad_(True)
        trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.frozen = {name: value.clone() for name, value in network.state_dict().items()
                       if linear and name not in trained}
        self.optimizer = torch.optim.Adam(trained.values(), lr)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == torch.float16)
        self.epoch, self.losses = 0, []  # epochs done; the losses of this one
        self.best_loss, self.best_epoch, self.best = math.inf, 0, {}

    def state_dict(self) -> dict:
        """Tensors and plain values only."""
        return {"epoch": self.epoch, "losses": [x.item() for x in self.losses],
                "best": [self.best_loss, self.best_epoch, self.best],
                "parts": [part.state_dict() for part in (self.network, self.optimizer, self.scaler)],
                "random": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]}

    def load_state_dict(self, state: dict) -> None:
        for part, value in zip((self.network, self.optimizer, self.scaler), state["parts"], strict=True):
            part.load_state_dict(value)
        self.epoch = state["epoch"]
        self.losses = [torch.tensor(x, device=self.device) for x in state["losses"]]
        self.best_loss, self.best_epoch, self.best = state["best"]
        torch.set_rng_state(state["random"][0])
        for number, value in enumerate(state["random"][1:]):
            torch.cuda.set_rng_state(value, number)

    def check_loss(self, validation_loss: float = 0.0) -> None:
        """Raise `FloatingPointError` if a loss of this epoch is not finite."""
        bad = [step for step, x in enumerate(torch.stack(self.losses).tolist(), 1) if not math.isfinite(x)]
        if bad or not math.isfinite(validation_loss):
            where = f"step {bad[0]}" if bad else "validation"
            raise FloatingPointError(f"the loss is not finite in epoch {self.epoch + 1}, {where}; the last "
                                     "checkpoint is intact; try a lower --lr or --precision fp32")

    def end_epoch(self, validation_loss: float) -> None:
        """Count the epoch, and keep its weights if its validation loss is the lowest so far; with a
        linear classifier, check that nothing else has moved."""
        now = self.network.state_dict()
        for name, value in self.frozen.items():
            assert torch.equal(now[name], value), f"{name} was frozen but has moved"
        self.epoch, self.losses = self.epoch + 1, []
        if validation_loss < self.best_loss:
            self.best_loss, self.best_epoch = validation_loss, self.epoch
            self.best = {name: value.clone() for name, value in now.items()}


def finetune_network(
    network: nn.Module, train: Iterable[tuple[Tensor, Tensor]], validation: Iterable[tuple[Tensor, Tensor]], *,
    epochs: int = 50,  # paper, F.3.2, at most
    lr: float = 3e-4,  # paper, F.3.2
    t_max: int = 16,  # steps from the highest rate to the lowest: the notebook's; the paper names none
    patience: int = 5,  # paper, F.3.2: epochs without a lower validation loss
    weights: Tensor | None = None,  # class weights (K,)
    linear: bool = False,  # True: the first paper's protocol, only the classifier is trained
    precision: torch.dtype = torch.float32,
    log: Callable[[dict], Any] = lambda row: None,
    save: Callable[..., Any] = lambda state, force=False: None,
    stop: Callable[[], bool] = lambda: False,
    resume: dict | None = None,
) -> dict:
    """Train `network` on batches of `(N, 3, H, W)` images and multi-hot labels `(N, K)`; leave it with
    the weights of its best epoch by validation loss, in evaluation mode.

    Returns `{"epochs", "best_epoch", "rate", "validation_loss"}`, `rate` being the last step's. `log`,
    `save`, `stop` and `resume` are as in `pretrain_cass`. Raises `FloatingPointError` if the loss is not
    finite, `KeyboardInterrupt` if stopped.
    """
    now = FineTuning(network, lr, linear, precision)
    if resume:
        now.load_state_dict(resume)
    weights = None if weights is None else weights.to(now.device)
    autocast = torch.autocast(now.device.type, precision, enabled=precision != torch.float32)
    steps, adam = len(train), now.optimizer.param_groups[0]
    while now.epoch < epochs and now.epoch - now.best_epoch < patience:
        skip = len(now.losses)
        if hasattr(train, "set_epoch"):
            train.set_epoch(now.epoch, skip)
        network.train(not linear)  # a frozen network keeps its batch-norm statistics
        bar = tqdm(train, f"epoch {now.epoch + 1}", leave=False, disable=not sys.stdout.isatty())
        for step, (images, truth) in enumerate(bar, now.epoch * steps + skip):
            adam["lr"] = tuning_rate(step, lr, t_max)
            now.optimizer.zero_grad()
            with autocast:
                logits = network(images.to(now.device, non_blocking=True))  # (N, K)
                loss = focal_loss(logits, truth.to(now.device), weights)
            now.scaler.scale(loss).backward()
            now.scaler.step(now.optimizer)
            now.scaler.update()
            now.losses.append(loss.detach())
            stopped = stop()
            if stopped or len(now.losses) % 50 == 0:  # not each step: it waits for the GPU
                now.check_loss()
            if stopped:
                save(now.state_dict(), force=True)
                raise KeyboardInterrupt
        train_loss = torch.stack(now.losses).mean().item()
        validation_loss = evaluate(network, validation, weights, precision)[0]
        now.check_loss(validation_loss)
        now.end_epoch(validation_loss)
        log({"epoch": now.epoch, "loss": train_loss, "validation_loss": validation_loss, "rate": adam["lr"],
             "best": now.best_epoch == now.epoch})
        save(now.state_dict())
    network.load_state_dict(now.best)
    network.eval()
    return {"epochs": now.epoch, "best_epoch": now.best_epoch, "rate": adam["lr"],
            "validation_loss": now.best_loss}


@torch.no_grad()
def evaluate(network: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], weights: Tensor | None = None,
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
    from data import AUGMENTATIONS, add_data_options
    from runtime import Options, add_run_options, positive

    parser = Options("finetune.py", "Fine-tune pretrained networks with few labels, score them, predict.")
    add = parser.add_argument
    add_data_options(parser, required=False)
    add_run_options(parser, epochs=50, batch_size=16, lr=3e-4, image_size=None)
    add("--weights", type=Path, metavar="RUN|FILE", help="a run folder, for all its networks and its "
        "split, or one file of weights; without it --arch is trained from --init (supervised baseline)")
    add("--arch", action="append", help="timm name for the supervised baseline; may be given twice")
    add("--protocol", choices=("full", "linear"), default="full",
        help="train all weights (paper) or only a classifier on the frozen network (its first version)")
    add("--labels", type=label_share, default=1.0, help="share of the training labels to use (paper: 0.01, "
        "0.1, 1); smaller shares lie inside larger ones (default: %(default)s)")
    add("--seeds", type=positive(int), default=1, help="repeat with this many seeds from --seed on, and give "
        "mean and standard deviation (paper: 5; default: %(default)s)")
    add("--class-weights", choices=("paper", "inverse", "none"), default="paper",
        help="focal loss weights by class: paper grows with the class's frequency and so favours the "
             "majority; inverse favours rare classes (default: %(default)s)")
    add("--schedule", choices=("16", "run"), default="16", help="the rate falls within 16 steps and rises "
        "again (the notebook), or falls once over all --epochs; with few labels 32 steps may outlast "
        "the patience (default: %(default)s)")
    add("--patience", type=positive(int), default=5,
        help="epochs without a lower validation loss before it ends (paper: 5)")
    add("--augment", choices=(*AUGMENTATIONS, "none"), default="cass", help="paper: the same as in pretraining")
    add("--predict", type=Path, metavar="FOLDER", help="classify the images of FOLDER with fine-tuned "
        "--weights, into predictions.csv (in --out, or here)")
    return parser


def label_share(text: str) -> float:
    """An argparse type: a share above 0 and up to 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share of the labels, which is above 0 and at most 1")
    return value


def find_networks(args: argparse.Namespace) -> dict[str, tuple[str, Path | None]]:
    """The networks to train: name -> (timm name, file of weights or None)."""
    from runtime import UserError, read_network

    if bool(args.weights) == bool(args.arch):
        raise UserError("name either --weights, a run folder or a file of weights, or --arch, a timm model for "
                        "the supervised baseline" + (", not both" if args.arch else ""))
    if args.arch:
        networks = {name.split(".")[0]: (name, None) for name in args.arch}
        if len(networks) < len(args.arch):
            raise UserError("two --arch are equal up to the dot and would share a file; run them one by one")
        return networks
    files = [args.weights]
    if args.weights.is_dir():
        files = [file for name in ("cnn", "transformer", "backbone") if (file := args.weights / f"{name}.pt").is_file()]
        files = files or sorted(file for file in args.weights.glob("*.pt") if not file.name.startswith("checkpoint"))
        if not files:
            raise UserError(f"{args.weights} holds no network; a finished run of cass.py or dino.py does")
    return {file.stem: (read_network(file)["arch"], file) for file in files}


def tuned_images(args: argparse.Namespace):
    """The data set with the split that pretraining had, and only if it can be fine-tuned on."""
    from data import open_images, read_images, read_split
    from runtime import UserError

    if args.data is None:
        raise UserError("--data names the folder of labelled images (or --predict FOLDER one to classify)")
    split = args.weights and (args.weights if args.weights.is_dir() else args.weights.parent) / "split.csv"
    if split and not split.is_file():
        print(f"note: {split} is not there; make sure that these weights were not pretrained on what is "
              "now the test part")
    if split and split.is_file() and not args.split_file:
        args.split_file = split
    images = open_images(args)
    if split and split.is_file() and args.split_file != split:
        seen = {row.path for row in read_split(split, read_images(args.data)).part("train")}
        if any(row.path in seen for row in images.part("test")):
            raise UserError(f"{args.split_file} has test images that these weights were pretrained on")
    if not images.classes:
        raise UserError(f"{args.data} has no labels; fine-tuning needs class folders or a labels.csv")
    if len(images.classes) < 2 and not images.multi_label:
        raise UserError(f"{args.data} has one class only, {images.classes[0]}; there is nothing to tell apart")
    for part in ("train", "val", "test"):
        if not images.part(part):
            raise UserError(f"the {part} part of {args.data} is empty; fine-tuning needs training, "
                            "validation and test images (see --ratios)")
    missing = [c for c, n in zip(images.classes, images.truth(images.part("train")).sum(0)) if n == 0]
    if missing:
        images.notes.append(f"no training image is labelled {' or '.join(missing)}, so that can't be learned")
    return images


def run_tuning(args: argparse.Namespace) -> None:
    """Fine-tune every network with every seed; write weights, scores and predictions."""
    from data import ImageCache, label_fraction, read_split, write_split
    from runtime import Run, StopSignal, UserError, pick_device, pick_precision, pick_workers, read_network

    device = pick_device(args.device)
    precision, args.workers = pick_precision(args.precision, device), pick_workers(args.workers, device)
    networks, images = find_networks(args), tuned_images(args)
    files = [file.resolve() for _, file in networks.values() if file]
    args.image_size = args.image_size or (read_network(files[0])["image_size"] if files else 384)
    source = f"supervised-{args.data.resolve().name}"
    if files:
        source = files[0].parent.name + ("" if args.weights.is_dir() else f"-{files[0].stem}")
    out = args.out or Path("runs", f"finetune-{source}-{args.labels:g}{'-linear' * (args.protocol == 'linear')}")
    if files and out.resolve() == files[0].parent:
        raise UserError(f"--out {out} holds the --weights, which must stay as they are; choose another --out")
    run = Run(out, vars(args), show_tuning)
    if run.finished:
        return print(f"{out} is finished; there is nothing to resume")
    if run.resuming and read_split(out / "split.csv", images).rows != images.rows:
        raise UserError(f"the images in {args.data} or their split have changed since {out} began")
    for arch, file in networks.values():  # refuse what can't be built before anything is written
        new_network(args, arch, file, len(images.classes))
    cache = args.cache and ImageCache(images, args.image_size, args.cache, args.workers)
    state = run.begin(arms={name: arch for name, (arch, _) in networks.items()}, classes=images.classes,
                      multi_label=images.multi_label, image_size=args.image_size)
    write_split(out / "split.csv", images)
    for note in images.notes:
        print(f"note: {note}")
    done, training = (state["done"], state["training"]) if state else ([], None)
    with StopSignal(run) as stop:
        for seed, name in itertools.product(range(args.seed, args.seed + args.seeds), networks):
            if any((entry["seed"], entry["arm"]) == (seed, name) for entry in done):
                continue
            rows = label_fraction(images, images.part("train"), args.labels, seed)
            network = new_network(args, *networks[name], len(images.classes), seed).to(device)
            entry = tune_once(args, network, images, rows, cache, seed, precision, resume=training, stop=stop,
                              log=lambda row: run.log({"seed": seed, "arm": name, **row}),
                              save=lambda now, force=False: run.save({"done": done, "training": now}, force))
            load = run.save_network(f"{name}-seed{seed}.pt", network, networks[name][0])
            done, training = [*done, {"seed": seed, "arm": name, "load": load, **entry}], None
            run.save({"done": done, "training": None}, force=True)
    report(run, done, images)


def new_network(args: argparse.Namespace, arch: str, file: Path | None, classes: int, seed: int = 0) -> nn.Module:
    """A network with a new head of `classes` outputs, from weights or from --init."""
    from runtime import build_model, load_network

    if file is None:
        return build_model(arch, args.init, args.image_size, outputs=classes, seed=seed)
    return load_network(file, args.image_size, outputs=classes, seed=seed)


def tune_once(args: argparse.Namespace, network: nn.Module, images: Any, rows: list, cache: Any, seed: int,
              precision: torch.dtype, **hooks: Any) -> dict:
    """Train one network on `rows` with one seed: facts on how it ended, and its probabilities for the
    validation and the test part, which is looked at here and only here."""
    from data import ImageRows, augmentation, make_loader

    def loader(rows: list, augment: str = "none", shuffle: bool = False) -> Iterable:
        dataset = ImageRows(images.folder, rows, augmentation(args.image_size, augment), seed,
                            images.truth(rows), cache)
        return make_loader(dataset, args.batch_size, seed=seed, shuffle=shuffle, workers=args.workers)

    train, validation = loader(rows, args.augment, shuffle=True), loader(images.part("val"))
    weights = torch.from_numpy(class_weights(images.truth(rows), args.class_weights))
    torch.manual_seed(seed)
    facts = finetune_network(
        network, train, validation, epochs=args.epochs, lr=args.lr, patience=args.patience, weights=weights,
        t_max=16 if args.schedule == "16" else args.epochs * len(train), linear=args.protocol == "linear",
        precision=precision, **hooks)
    val, test = (torch.from_numpy(evaluate(network, batches, precision=precision)[1])  # (N, K)
                 for batches in (validation, loader(images.part("test"))))
    return {"facts": {"images": len(rows), **facts}, "val": val, "test": test}


def show_tuning(row: dict) -> None:
    best = "  lowest so far" if row["best"] else ""
    tqdm.write(f"seed {row['seed']}  {row['arm']:12} epoch {row['epoch']:3d}  loss {row['loss']:.5f}  "
               f"validation {row['validation_loss']:.5f}  rate {row['rate']:.1e}{best}")


# %% the command: scores


def with_ensemble(arms: dict[str, Any]) -> dict[str, Any]:
    """The same, and the mean probability of all networks where there are several."""
    return arms | {"ensemble": sum(arms.values()) / len(arms)} if len(arms) > 1 else arms


def score_seeds(done: list[dict], images: Any) -> list[dict]:
    """Scores of each seed: every network, their ensemble (mean probability), the one chosen by its
    validation headline, and the oracle, which no one has at inference: the best on the test part."""
    from metrics import bootstrap_interval, score

    seeds, truth = [], {part: images.truth(images.part(part)) for part in ("val", "test")}
    for seed in dict.fromkeys(entry["seed"] for entry in done):
        entries = {entry["arm"]: entry for entry in done if entry["seed"] == seed}
        val, test = (with_ensemble({name: entry[part].numpy() for name, entry in entries.items()})
                     for part in ("val", "test"))
        arms = {name: (entries[name]["facts"] if name in entries else {}) | {
                    "validation": score(truth["val"], val[name], images.classes, images.multi_label)["headline"],
                    "interval": bootstrap_interval(truth["test"], test[name], images.multi_label),
                    "test": score(truth["test"], test[name], images.classes, images.multi_label)} for name in test}
        chosen = max(arms, key=lambda name: arms[name]["validation"])
        oracle = max(arms, key=lambda name: arms[name]["test"]["headline"])
        seeds.append({"seed": seed, "chosen": chosen, "oracle": oracle, "arms": arms})
    return seeds


def average_seeds(seeds: list[dict]) -> dict[str, dict[str, tuple]]:
    """For each network, the ensemble, the chosen one and the oracle, every score over all classes as
    (mean, standard deviation, number of seeds); one that a seed leaves undefined is left out."""
    from metrics import mean_and_spread

    def flat(test: dict) -> dict[str, float | None]:
        scores = {"headline": test["headline"], "auroc": test["auroc"]["macro"]}
        for rule in ("argmax", "threshold_0.5"):
            scores |= {f"{rule} {key}": value for key, value in test.get(rule, {}).items() if key != "per_class"}
        return scores

    means: dict[str, dict[str, tuple]] = {}
    for name in (*seeds[0]["arms"], "chosen", "oracle"):
        runs = [flat(one["arms"][one.get(name, name)]["test"]) for one in seeds]
        means[name] = {key: mean_and_spread([scores[key] for scores in runs])
                       for key in runs[0] if all(scores[key] is not None for scores in runs)}
    return means


def score_table(seeds: list[dict], means: dict[str, dict[str, tuple]]) -> Iterable[str]:
    """Lines for the screen, at most 100 columns: mean +- standard deviation over seeds, and each run."""
    def cell(value: tuple | None) -> str:
        if value is None:
            return f"{'-':>15}"
        return f"{value[0]:15.3f}" if value[1] is None else f"{value[0]:7.3f} +-{value[1]:.3f}"

    names, test = list(seeds[0]["arms"]), next(iter(seeds[0]["arms"].values()))["test"]
    columns = {"headline": "headline", "F1 pooled 0.5": "threshold_0.5 f1_pooled", "recall": "argmax recall_macro",
               "accuracy": "argmax accuracy", "AUROC": "auroc"}
    if test["multi_label"]:
        columns = {"headline": "headline", "macro F1": "threshold_0.5 f1_macro", "AUROC": "auroc",
                   "recall": "threshold_0.5 recall_macro", "all labels": "threshold_0.5 subset_accuracy"}
    yield (f"test scores on {test['n']} images, {len(seeds)} seed{'s' * (len(seeds) > 1)}; headline: "
           f"{test['headline_name']}")
    yield f"{'':25}" + "".join(f"{title:>15}" for title in columns)
    for name in means if len(names) > 1 else names:
        yield f"{name[:24]:25}" + "".join(cell(means[name].get(key)) for key in columns.values())
    if len(names) > 1:
        yield "(chosen: the best on the validation part; oracle: the best on the test part, in hindsight)"
    yield f"\n{'each run':25}{'seed':>6}{'headline':>10}{'95 % interval':>17}{'epochs':>8}{'best':>6}{'last rate':>11}"
    for one in seeds:
        for name, arm in one["arms"].items():
            title = f"{name[:15]}{' (chosen)' if name == one['chosen'] and len(names) > 1 else ''}"
            ended = f"{arm['epochs']:8d}{arm['best_epoch']:6d}{arm['rate']:11.1e}" if "epochs" in arm else ""
            yield (f"{title:25}{one['seed']:6d}{arm['test']['headline']:10.3f}"
                   f"{arm['interval'][0]:9.3f} - {arm['interval'][1]:.3f}{ended}")


def report(run: Any, done: list[dict], images: Any) -> None:
    """Write result.json and predictions.csv, keep the weights of the seed that validation likes
    best, and show the table."""
    from runtime import write_text

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seeds = score_seeds(done, images)
    if caught:  # one sentence, not one for each network, part and seed
        print(f"note: at least once, {caught[0].message}")
    means, best = average_seeds(seeds), max(seeds, key=lambda s: s["arms"][s["chosen"]]["validation"])
    write_text(run.folder / "result.json", json.dumps({
        "headline": best["arms"][best["chosen"]]["test"]["headline_name"], "kept_seed": best["seed"],
        "chosen": best["chosen"], "mean_sd_n": means, "seeds": seeds,
        "run": {key: value for key, value in run.config.items() if key != "finished"}}, indent=1) + "\n")
    write_lines(run.folder / "predictions.csv", tested_lines(done, seeds, images))
    for file in run.folder.glob("*-seed*.pt"):
        name, seed = file.stem.rsplit("-seed", 1)
        file.replace(run.folder / f"{name}.pt") if int(seed) == best["seed"] else file.unlink()
    print("", *score_table(seeds, means), "", sep="\n")
    run.finish(chosen=best["chosen"])
    print(f"result.json, predictions.csv and the weights (of seed {best['seed']}) are in {run.folder}; "
          "timm loads the weights with")
    for entry in done:
        if entry["seed"] == best["seed"]:
            print("  " + entry["load"].replace(f"-seed{best['seed']}.pt", ".pt"))
    print(f"for new images:\n  python finetune.py --predict FOLDER --weights {run.folder}")


def tested_lines(done: list[dict], seeds: list[dict], images: Any) -> Iterable[dict]:
    """The test part with its truth and what each network said: one line an image and seed."""
    for one in seeds:
        arms = {entry["arm"]: entry["test"].numpy() for entry in done if entry["seed"] == one["seed"]}
        for i, row in enumerate(images.part("test")):
            each = {name: p[i] for name, p in arms.items()}
            yield {"seed": one["seed"], "image": row.path, "truth": "|".join(row.labels),
                   **prediction_line(each, one["chosen"], images.classes, images.multi_label)}


# %% the command: predictions


def prediction_line(arms: dict[str, np.ndarray], chosen: str, classes: list[str], multi_label: bool) -> dict:
    """Cells for one image from each network's probabilities `(K,)`: the decision of the `chosen`
    one (several classes joined by |), whether the networks disagree, and every probability."""
    from metrics import decide

    arms, rule = with_ensemble(arms), "threshold" if multi_label else "argmax"
    decisions = {name: "|".join(c for c, yes in zip(classes, decide(p[None], rule)[0]) if yes)
                 for name, p in arms.items()}
    return {"class": decisions[chosen], "arms disagree": "yes" if len(set(decisions.values())) > 1 else "no",
            **{f"{name}: class": decision for name, decision in decisions.items()},
            **{f"{name}: {label}": f"{v:.6f}" for name, p in arms.items() for label, v in zip(classes, p)}}


def write_lines(file: Path, lines: Iterable[dict]) -> None:
    """Write dicts as CSV as they come, aside and then renamed."""
    lines, aside = iter(lines), file.with_name(file.name + ".tmp")
    first = next(lines)
    try:
        with open(aside, "w", newline="", encoding="utf-8") as handle:
            table = csv.DictWriter(handle, list(first))
            table.writeheader()
            table.writerows(itertools.chain([first], lines))
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def run_prediction(args: argparse.Namespace) -> None:
    """Classify a folder of images, batch by batch; the memory needed does not grow with it."""
    from data import find_images
    from runtime import UserError, load_network, pick_device, read_network

    if args.weights is None:
        raise UserError("--predict needs fine-tuned --weights, a run of finetune.py or one file of it")
    device, out = pick_device(args.device), (args.out or Path(".")) / "predictions.csv"
    if out.exists() and not args.overwrite:
        raise UserError(f"{out} is there already; name another folder with --out, or --overwrite it")
    files = {name: file for name, (_, file) in find_networks(args).items()}
    first = read_network(next(iter(files.values())))
    for file in files.values():
        saved = read_network(file)
        if saved["num_classes"] != len(saved["classes"]) or not saved["classes"]:
            raise UserError(f"{file} has {saved['num_classes']} outputs for {len(saved['classes'])} classes: "
                            "it is pretrained only; fine-tune it first")
        if saved["classes"] != first["classes"] or saved["image_size"] != first["image_size"]:
            raise UserError(f"the networks in {args.weights} were trained for different classes or image sizes; "
                            "name one file with --weights")
    chosen, config = next(iter(files)), args.weights / "config.json"
    if config.is_file():
        chosen = json.loads(config.read_text(encoding="utf-8")).get("chosen")
        if chosen not in (*files, "ensemble"):
            raise UserError(f"{args.weights} is no finished run of finetune.py; finish it with --resume, or name "
                            "one file with --weights")
    networks = {name: load_network(file, first["image_size"]).to(device) for name, file in files.items()}
    images = find_images(args.predict, args.skip_bad)
    out.parent.mkdir(parents=True, exist_ok=True)
    for note in images.notes:
        print(f"note: {note}")
    print(f"{len(images.rows)} images; the class is decided by {chosen}"
          + (", which did best on validation images" if len(files) > 1 else ""))
    write_lines(out, predict_lines(args, networks, images, chosen, first))
    print(f"wrote {len(images.rows)} predictions to {out}")


@torch.no_grad()
def predict_lines(args: argparse.Namespace, networks: dict[str, nn.Module], images: Any, chosen: str,
                  saved: dict) -> Iterable[dict]:
    """One line an image, in the order of `images.rows`; `saved` is what one network's file holds."""
    from data import ImageRows, augmentation, make_loader
    from runtime import pick_precision, pick_workers

    device = next(next(iter(networks.values())).parameters()).device
    precision = pick_precision(args.precision, device)
    dataset = ImageRows(images.folder, images.rows, augmentation(saved["image_size"], "none"))
    loader = make_loader(dataset, args.batch_size, shuffle=False, workers=pick_workers(args.workers, device))
    rows = iter(images.rows)
    for network in networks.values():
        network.eval()
    for batch in tqdm(loader, unit="batch", disable=not sys.stdout.isatty()):
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            arms = {name: net(batch.to(device)).float().sigmoid().cpu().numpy() for name, net in networks.items()}
        for i in range(len(batch)):
            each = {name: p[i] for name, p in arms.items()}
            yield {"image": next(rows).path, **prediction_line(each, chosen, saved["classes"], saved["multi_label"])}


def main(argv: list[str] | None = None) -> None:
    from data import DataError
    from runtime import clear_exit

    args = tune_options().parse_args(argv)
    with clear_exit(DataError, FloatingPointError):
        run_prediction(args) if args.predict else run_tuning(args)


if __name__ == "__main__" and "__file__" in globals():
    main()
