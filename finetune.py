"""Fine-tune pretrained networks with few labels, measure them, and predict on new images.

    python finetune.py --data ./autoimmune --weights runs/cass-autoimmune --labels 0.1
    python finetune.py --data ./autoimmune --arch resnet50           # supervised, for comparison
    python finetune.py --predict ./new-images --weights runs/finetune-autoimmune

Where the paper, its published notebook and this file differ (option that changes it in brackets):

| question | the paper says | its notebook does | we do |
|---|---|---|---|
| what is trained | all weights; its first version a linear classifier | all weights | all weights [--protocol] |
| class weights | min-max normalised class distribution | the same, from the whole set; grows with frequency | the same, from the labels the run may see [--class-weights] |
| schedule | cosine, no length | 16 batches down, 16 up | the same [--schedule] |
| early stopping | patience 5 on validation loss | summed validation loss over the number of training batches, and only when the training score improves | patience 5 on mean validation loss |
| score | F1, no formula | pooled counts over all epochs so far, at 0.5 | pooled at 0.5 and macro at argmax, of the best epoch |
| images without any class above 0.5 | - | counted as an extra class | missed, no extra class |
| which arm to use | can't be told (Section 6) | - | chosen on validation; its test score beside the best arm's |
"""

import argparse
import csv
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
        network.get_classifier().requires_grad_(True)
        trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.frozen = {name: value.clone() for name, value in network.state_dict().items()
                       if linear and name not in trained}
        self.optimizer = torch.optim.Adam(trained.values(), lr)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == torch.float16)
        self.epoch, self.losses = 0, []
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

    def end_epoch(self, loss: float) -> None:
        """Count the epoch, and keep its weights if its validation loss is the lowest so far."""
        self.epoch, self.losses = self.epoch + 1, []
        if loss < self.best_loss:
            self.best_loss, self.best_epoch = loss, self.epoch
            self.best = {name: value.clone() for name, value in self.network.state_dict().items()}

    def restore_best(self) -> None:
        """Go back to the best epoch; with a linear classifier, check that nothing else has moved."""
        self.network.load_state_dict(self.best)
        now = self.network.state_dict()
        for name, value in self.frozen.items():
            assert torch.equal(now[name], value), f"{name} was frozen but has moved"


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
    steps, rate = len(train), lr
    while now.epoch < epochs and now.epoch - now.best_epoch < patience:
        skip = len(now.losses)
        if hasattr(train, "set_epoch"):
            train.set_epoch(now.epoch, skip)
        network.train(not linear)  # a frozen network keeps its batch-norm statistics
        for step, (images, truth) in enumerate(train, now.epoch * steps + skip):
            now.optimizer.param_groups[0]["lr"] = rate = tuning_rate(step, lr, t_max)
            now.optimizer.zero_grad()
            with autocast:
                logits = network(images.to(now.device, non_blocking=True))  # (N, K)
                loss = focal_loss(logits, truth.to(now.device), weights)
            now.scaler.scale(loss).backward()
            now.scaler.step(now.optimizer)
            now.scaler.update()
            now.losses.append(loss.detach())
            if stop():
                save(now.state_dict(), force=True)
                raise KeyboardInterrupt
        validation_loss = evaluate(network, validation, weights, precision)[0]
        train_loss = torch.stack(now.losses).mean().item()
        if not math.isfinite(train_loss + validation_loss):
            raise FloatingPointError(f"the loss is no finite number in epoch {now.epoch + 1}; the last "
                                     "checkpoint is intact; try a lower --lr or --precision fp32")
        now.end_epoch(validation_loss)
        log({"epoch": now.epoch, "loss": train_loss, "validation_loss": validation_loss, "rate": rate,
             "best": now.best_epoch == now.epoch})
        save(now.state_dict())
    now.restore_best()
    return {"epochs": now.epoch, "best_epoch": now.best_epoch, "rate": rate, "validation_loss": now.best_loss}


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
    from runtime import Options, add_run_options

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
    add("--seeds", type=int, default=1, help="repeat with this many seeds from --seed on, and give mean "
        "and standard deviation (paper: 5; default: %(default)s)")
    add("--class-weights", choices=("paper", "inverse", "none"), default="paper",
        help="focal loss weights by class: paper grows with the class's frequency and so favours the "
             "majority; inverse favours rare classes (default: %(default)s)")
    add("--schedule", choices=("16", "run"), default="16", help="the rate falls within 16 steps and rises "
        "again (the notebook), or falls once over all --epochs; with few labels 32 steps may outlast "
        "the patience (default: %(default)s)")
    add("--patience", type=int, default=5, help="epochs without a lower validation loss before it ends (paper: 5)")
    add("--augment", choices=(*AUGMENTATIONS, "none"), default="cass", help="paper: the same as in pretraining")
    add("--predict", type=Path, metavar="FOLDER", help="classify the images of FOLDER with fine-tuned "
        "--weights, into predictions.csv (in --out, or here)")
    return parser


def label_share(text: str) -> float:
    """An argparse type: a share above 0 and up to 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share of the labels: it must be above 0, at most 1")
    return value


def find_networks(args: argparse.Namespace) -> dict[str, tuple[str, Path | None]]:
    """The networks to train: name -> (timm name, file of weights or None)."""
    from runtime import UserError, read_network

    if args.weights is None:
        if not args.arch:
            raise UserError("name what to fine-tune: --weights with a run folder or a file, or --arch with "
                            "a timm model for the supervised baseline")
        if len(set(args.arch)) < len(args.arch):
            raise UserError(f"--arch names {args.arch[0]} twice")
        return {name.split(".")[0]: (name, None) for name in args.arch}
    if args.arch:
        raise UserError("--arch is for the supervised baseline; --weights know their architecture already")
    if args.weights.is_dir():
        files = [args.weights / f"{name}.pt" for name in ("cnn", "transformer", "backbone")]
        files = [file for file in files if file.is_file()] or sorted(
            file for file in args.weights.glob("*.pt") if not file.name.startswith("checkpoint"))
    else:
        files = [args.weights]
    if not files:
        raise UserError(f"{args.weights} holds no network; a finished run of cass.py or dino.py does")
    return {file.stem: (read_network(file)["arch"], file) for file in files}


def tuned_images(args: argparse.Namespace):
    """The data set with the split that pretraining had, and only if it can be fine-tuned on."""
    from data import open_images, read_images, read_split
    from runtime import UserError

    if args.data is None:
        raise UserError("--data names the folder of labelled images (or --predict FOLDER one to classify)")
    folder = args.weights if args.weights is None or args.weights.is_dir() else args.weights.parent
    split = folder and folder / "split.csv"
    images = read_split(split, read_images(args.data)) if split and split.is_file() else open_images(args)
    if not images.classes:
        raise UserError(f"{args.data} has no labels; fine-tuning needs class folders or a labels.csv")
    if len(images.classes) < 2 and not images.multi_label:
        raise UserError(f"{args.data} has one class only, {images.classes[0]}; there is nothing to tell apart")
    for part in ("train", "val", "test"):
        if not images.part(part):
            raise UserError(f"the {part} part of {args.data} is empty; fine-tuning needs training, "
                            "validation and test images (see --ratios)")
    return images


def run_tuning(args: argparse.Namespace) -> None:
    """Fine-tune every network with every seed; write weights, scores and predictions."""
    from data import label_fraction, write_split
    from runtime import Run, StopSignal, pick_device, pick_precision, read_network

    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    networks, images = find_networks(args), tuned_images(args)
    args.image_size = args.image_size or next(
        (read_network(file)["image_size"] for _, file in networks.values() if file), 384)
    source = args.weights.stem if args.weights else "supervised-" + args.data.resolve().name
    out = args.out or Path("runs", f"finetune-{source}-{args.labels:g}{'-linear' * (args.protocol == 'linear')}")
    run = Run(out, vars(args), show_tuning)
    if run.finished:
        return print(f"{out} is finished; there is nothing to resume")
    for arch, file in networks.values():  # refuse what can't be built before anything is written
        new_network(args, arch, file, len(images.classes))
    state = run.begin(arms={name: arch for name, (arch, _) in networks.items()}, classes=images.classes,
                      multi_label=images.multi_label, image_size=args.image_size)
    write_split(out / "split.csv", images)
    done, training = (state["done"], state["training"]) if state else ([], None)
    with StopSignal(run) as stop:
        for seed in range(args.seed, args.seed + args.seeds):
            rows = label_fraction(images, images.part("train"), args.labels, seed)
            missing = [c for c, n in zip(images.classes, images.truth(rows).sum(0)) if n == 0]
            if missing:
                print(f"note: no labelled training image of {', '.join(missing)}: it can't be learned")
            for name in networks:
                if any((entry["seed"], entry["arm"]) == (seed, name) for entry in done):
                    continue
                network = new_network(args, *networks[name], len(images.classes), seed).to(device)
                entry = tune_once(
                    args, network, images, rows, seed, precision, resume=training, stop=stop,
                    log=lambda row: run.log({"seed": seed, "arm": name, **row}),
                    save=lambda now, force=False: run.save({"done": done, "training": now}, force))
                done, training = [*done, {"seed": seed, "arm": name, "images": len(rows), **entry}], None
                run.save_network(f"{name}-seed{seed}.pt", network, networks[name][0])
                run.save({"done": done, "training": None}, force=True)
    report(run, done, images)


def new_network(args: argparse.Namespace, arch: str, file: Path | None, classes: int, seed: int = 0) -> nn.Module:
    """A network with a new head of `classes` outputs, from weights or from --init."""
    from runtime import build_model, load_network

    if file is None:
        return build_model(arch, args.init, args.image_size, outputs=classes, seed=seed)
    return load_network(file, args.image_size, outputs=classes, seed=seed)


def tune_once(args: argparse.Namespace, network: nn.Module, images: Any, rows: list, seed: int,
              precision: torch.dtype, **hooks: Any) -> dict:
    """Train one network on `rows` with one seed; how it ended, and its probabilities for the
    validation and the test part, which is looked at here and only here."""
    from data import ImageRows, augmentation, make_loader
    from runtime import pick_workers

    device = next(network.parameters()).device

    def loader(rows: list, augment: str, training: bool) -> Iterable:
        dataset = ImageRows(images.folder, rows, augmentation(args.image_size, augment), seed, images.truth(rows))
        return make_loader(dataset, args.batch_size, seed=seed, shuffle=training,
                           workers=pick_workers(args.workers, device))

    train, validation = loader(rows, args.augment, True), loader(images.part("val"), "none", False)
    weights = torch.from_numpy(class_weights(images.truth(rows), args.class_weights))
    torch.manual_seed(seed)
    entry = finetune_network(
        network, train, validation, epochs=args.epochs, lr=args.lr, patience=args.patience, weights=weights,
        t_max=16 if args.schedule == "16" else args.epochs * len(train), linear=args.protocol == "linear",
        precision=precision, **hooks)
    for part, batches in (("val", validation), ("test", loader(images.part("test"), "none", False))):
        entry[part] = torch.from_numpy(evaluate(network, batches, precision=precision)[1])  # (N, K)
    return entry


def show_tuning(row: dict) -> None:
    best = "  lowest so far" if row["best"] else ""
    tqdm.write(f"seed {row['seed']}  {row['arm']:12} epoch {row['epoch']:3d}  loss {row['loss']:.5f}  "
               f"validation {row['validation_loss']:.5f}  rate {row['rate']:.1e}{best}")


# %% the command: scores


def score_seeds(done: list[dict], images: Any) -> list[dict]:
    """Scores of each seed: every network, their ensemble (mean probability), the one chosen by its
    validation headline, and the oracle, which no one has at inference: the best on the test part."""
    from metrics import bootstrap_interval, score

    seeds, truth = [], {part: images.truth(images.part(part)) for part in ("val", "test")}
    for seed in dict.fromkeys(entry["seed"] for entry in done):
        entries = {entry["arm"]: entry for entry in done if entry["seed"] == seed}
        val, test = (with_ensemble({name: entry[part].numpy() for name, entry in entries.items()})
                     for part in ("val", "test"))
        arms = {}
        for name in test:
            facts = {key: value for key, value in entries.get(name, {}).items()
                     if key not in ("seed", "arm", "val", "test")}
            arms[name] = facts | {
                "validation": score(truth["val"], val[name], images.classes, images.multi_label)["headline"],
                "interval": bootstrap_interval(truth["test"], test[name], images.multi_label),
                "test": score(truth["test"], test[name], images.classes, images.multi_label)}
        chosen = max(arms, key=lambda name: arms[name]["validation"])
        oracle = max(arms, key=lambda name: arms[name]["test"]["headline"])
        seeds.append({"seed": seed, "chosen": chosen, "oracle": oracle, "arms": arms})
    return seeds


def report(run: Any, done: list[dict], images: Any) -> None:
    """Write result.json and predictions.csv, keep the weights of the seed that validation likes
    best, and show the table."""
    from metrics import mean_and_spread
    from runtime import write_text

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seeds = score_seeds(done, images)
    if caught:  # one sentence, not one for each network, part and seed
        print(f"note: {caught[0].message}")
    values = {(kind, name): [s["arms"][name]["test"][rule][key] if rule else s["arms"][name]["test"]["headline"]
                             for s in seeds]
              for name in seeds[0]["arms"] for kind, rule, key in table_columns(images.multi_label)}
    for what in ("chosen", "oracle"):
        values["headline", what] = [s["arms"][s[what]]["test"]["headline"] for s in seeds]
    means = {f"{name}: {kind}": mean_and_spread(v) for (kind, name), v in values.items() if None not in v}
    best = max(seeds, key=lambda s: s["arms"][s["chosen"]]["validation"])
    result = {"headline": best["arms"][best["chosen"]]["test"]["headline_name"], "kept_seed": best["seed"],
              "chosen": best["chosen"], "mean_sd_n": means, "seeds": seeds, "run": run.config}
    write_text(run.folder / "result.json", json.dumps(result, indent=1) + "\n")
    write_lines(run.folder / "predictions.csv", test_lines(done, seeds, images))
    for name in run.config["arms"]:
        (run.folder / f"{name}-seed{best['seed']}.pt").replace(run.folder / f"{name}.pt")
        for file in run.folder.glob(f"{name}-seed*.pt"):
            file.unlink()
    print("\n".join(score_table(seeds, values, images.multi_label)))
    run.finish(chosen=best["chosen"])
    print(f"weights, result.json and predictions.csv are in {run.folder}; for new images:\n"
          f"  python finetune.py --predict FOLDER --weights {run.folder}")


def test_lines(done: list[dict], seeds: list[dict], images: Any) -> Iterable[dict]:
    """The test part with its truth and what each network said: one line an image and seed."""
    for one in seeds:
        arms = with_ensemble({e["arm"]: e["test"].numpy() for e in done if e["seed"] == one["seed"]})
        for i, row in enumerate(images.part("test")):
            each = {name: p[i] for name, p in arms.items()}
            yield {"seed": one["seed"], "image": row.path, "truth": "|".join(row.labels),
                   **prediction_line(each, one["chosen"], images.classes, images.multi_label)}


def table_columns(multi_label: bool) -> list[tuple[str, str, str]]:
    """(title, decision rule, key in `score`'s dict) of the columns that follow the headline."""
    rule = "threshold_0.5" if multi_label else "argmax"
    other = ("macro F1", rule, "f1_macro") if multi_label else ("F1 pooled 0.5", "threshold_0.5", "f1_pooled")
    return [("headline", "", ""), other, ("recall", rule, "recall_macro"),
            ("accuracy", rule, "subset_accuracy" if multi_label else "accuracy"), ("AUROC", "auroc", "macro")]


def score_table(seeds: list[dict], values: dict, multi_label: bool) -> list[str]:
    """Lines for the screen, at most 100 columns: mean +- standard deviation over seeds."""
    from metrics import mean_and_spread

    def cell(kind: str, name: str) -> str:
        if (kind, name) not in values or None in values[kind, name]:
            return f"{'-':>14}"
        mean, spread, _ = mean_and_spread(values[kind, name])
        return f"{mean:7.3f} +-{spread:.3f}" if spread is not None else f"{mean:14.3f}"

    first = next(iter(seeds[0]["arms"].values()))["test"]
    kinds = [kind for kind, _, _ in table_columns(multi_label)]
    lines = [f"test scores on {first['n']} images, {len(seeds)} seed{'s' * (len(seeds) > 1)}; headline: "
             f"{first['headline_name']}",
             f"{'':14}" + "".join(f"{kind:>14}" for kind in kinds)]
    lines += [f"{name[:13]:14}" + "".join(cell(kind, name) for kind in kinds) for name in seeds[0]["arms"]]
    if len(seeds[0]["arms"]) > 1:
        picks = ", ".join(dict.fromkeys(s["chosen"] for s in seeds))
        lines.append(f"{'chosen':14}{cell('headline', 'chosen')}   by validation: {picks}")
        picks = ", ".join(dict.fromkeys(s["oracle"] for s in seeds))
        lines.append(f"{'oracle':14}{cell('headline', 'oracle')}   best on the test part: {picks}")
    for name, arm in seeds[0]["arms"].items():
        ended = f"; ended after epoch {arm['epochs']}, best {arm['best_epoch']}" if "epochs" in arm else ""
        lines.append(f"{name}, seed {seeds[0]['seed']}: 95 % of {arm['interval'][0]:.3f} to "
                     f"{arm['interval'][1]:.3f} over test images{ended}")
    return lines


# %% the command: predictions


def prediction_line(arms: dict[str, np.ndarray], chosen: str, classes: list[str], multi_label: bool) -> dict:
    """Cells for one image from each network's probabilities `(K,)`: the decision of the `chosen`
    one (several classes joined by |), whether the networks agree, and every probability."""
    def decide(p: np.ndarray) -> str:
        if multi_label:
            return "|".join(name for name, value in zip(classes, p) if value > 0.5)
        return classes[int(p.argmax())]

    decisions = {name: decide(p) for name, p in arms.items()}
    return {"class": decisions[chosen], "arms disagree": "yes" if len(set(decisions.values())) > 1 else "no",
            **{f"{name}: class": decision for name, decision in decisions.items()},
            **{f"{name}: {label}": f"{v:.6f}" for name, p in arms.items() for label, v in zip(classes, p)}}


def with_ensemble(arms: dict[str, Any]) -> dict[str, Any]:
    """The same, and the mean probability of all networks where there are several."""
    return arms | {"ensemble": sum(arms.values()) / len(arms)} if len(arms) > 1 else arms


def write_lines(file: Path, lines: Iterable[dict]) -> int:
    """Write dicts as CSV, aside and then renamed, as they come; returns how many there were."""
    aside, count = file.with_name(file.name + ".tmp"), 0
    with open(aside, "w", newline="", encoding="utf-8") as handle:
        for count, line in enumerate(lines, 1):
            if count == 1:
                table = csv.DictWriter(handle, list(line))
                table.writeheader()
            table.writerow(line)
    aside.replace(file)
    return count


def run_prediction(args: argparse.Namespace) -> None:
    """Classify a folder of images, batch by batch; the memory needed does not grow with it."""
    from data import find_images
    from runtime import UserError, load_network, pick_device, read_network

    if args.weights is None:
        raise UserError("--predict needs fine-tuned --weights, a run of finetune.py or one file of it")
    device, out = pick_device(args.device), (args.out or Path(".")) / "predictions.csv"
    if out.exists() and not args.overwrite:
        raise UserError(f"{out} is there already; name another folder with --out, or --overwrite it")
    saved = {name: read_network(file) | {"file": file} for name, (_, file) in find_networks(args).items()}
    for one in saved.values():
        if one["num_classes"] != len(one["classes"]) or not one["classes"]:
            raise UserError(f"{one['file']} has {one['num_classes']} outputs for {len(one['classes'])} classes: "
                            "it is pretrained only; fine-tune it first")
    first, config = next(iter(saved.values())), args.weights / "config.json"
    chosen = json.loads(config.read_text())["chosen"] if config.is_file() else next(iter(saved))
    networks = {name: load_network(one["file"], one["image_size"]).to(device) for name, one in saved.items()}
    images = find_images(args.predict, args.skip_bad)
    out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{len(images.rows)} images; the class is decided by {chosen}"
          + (", which did best on validation images" if len(saved) > 1 else ""))
    lines = predict_lines(args, networks, images, chosen, first["classes"], first["multi_label"], first["image_size"])
    print(f"wrote {write_lines(out, lines)} predictions to {out}")


@torch.no_grad()
def predict_lines(args: argparse.Namespace, networks: dict[str, nn.Module], images: Any, chosen: str,
                  classes: list[str], multi_label: bool, size: int) -> Iterable[dict]:
    """One line an image, in the order of `images.rows`."""
    from data import ImageRows, augmentation, make_loader
    from runtime import pick_precision, pick_workers

    device = next(next(iter(networks.values())).parameters()).device
    precision = pick_precision(args.precision, device)
    loader = make_loader(ImageRows(images.folder, images.rows, augmentation(size, "none")), args.batch_size,
                         shuffle=False, workers=pick_workers(args.workers, device))
    rows = iter(images.rows)
    for network in networks.values():
        network.eval()
    for batch in tqdm(loader, unit="batch", disable=not sys.stdout.isatty()):
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            arms = {name: net(batch.to(device)).float().sigmoid().cpu().numpy() for name, net in networks.items()}
        arms = with_ensemble(arms)
        for i in range(len(batch)):
            each = {name: p[i] for name, p in arms.items()}
            yield {"image": next(rows).path, **prediction_line(each, chosen, classes, multi_label)}


def main(argv: list[str] | None = None) -> None:
    from data import DataError
    from runtime import clear_exit

    args = tune_options().parse_args(argv)
    with clear_exit(DataError, FloatingPointError):
        run_prediction(args) if args.predict else run_tuning(args)


if __name__ == "__main__" and "__file__" in globals():
    main()
