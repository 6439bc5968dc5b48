"""CASS: Cross Architectural Self-Supervision, the whole method in one file.

    python cass.py --data ./autoimmune --epochs 100

One augmented view of each image goes through a CNN and a Transformer at once; a cosine loss pulls
their outputs together; both networks are trained, saved, and then fine-tuned with few labels.

Where the paper, its published notebook and this file differ (option that changes it in brackets):

| question | the paper says | its notebook does | we do |
|---|---|---|---|
| Equation 1 | prints a product of two sums; means the row-wise cosine | row-wise cosine | row-wise cosine |
| eps | "small" | 1e-8 in the cosine | 1e-8 |
| gradients | - | never cleared: each step adds to the last | cleared each step |
| averaging (SWA) | over Adam; names no start or cadence | wraps Adam, never uses the average | equal-weight average at each low point of the rate (every 32 steps) in the last quarter [--swa-start] |
| schedule | cosine, 16 iterations, down to 1e-6 | stepped each batch: 16 down, 16 up, for ever | the same, each batch |
| "jitter or perspective" | one or the other, p 0.3 | both in sequence, p 0.3 | one or the other, p 0.3 |
| hue of the jitter | changed, strength not named | not changed | 0.1 |
| blur, solarize (C.3) | named only | - | BYOL's: sigma 0.1-2, threshold 128, p 0.2 each [--augment] |
| SGD for the CNN (C.4) | named only | - | momentum 0.9 [--cnn-optimizer] |
| which images | training split only | the labelled 10 % | training split only |
| patients in two parts | not said | not prevented | kept together where known [--split] |
| last batch of an epoch | - | - | left out if smaller; its images come up in other epochs |
| collapse | "by design avoids" it | not looked at | measured each epoch, and said; a loss that does not collapse [--loss contrast] |
"""

import argparse
import math
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn
from tqdm import tqdm

# %% the loss (Equation 1) and the rate


def cass_loss(cnn_logits: Tensor, transformer_logits: Tensor, eps: float = 1e-8) -> Tensor:
    """Equation 1: the mean over the batch of 2 - 2 cos(R, T); both inputs `(N, D)`, result a scalar.

    For unit vectors 2 - 2 cos = |r - t|^2, which keeps its digits when the loss is tiny: 1 - cos
    would cancel to noise near 1e-7. Rows shorter than `eps` are divided by `eps`, so they are no
    unit vectors, and what is missing of their squared length is added back.
    """
    r, t = cnn_logits.float(), transformer_logits.float()  # (N, D), float32 under autocast too
    r_norm, t_norm = r.norm(dim=1, keepdim=True), t.norm(dim=1, keepdim=True)  # (N, 1)
    r, t = r / r_norm.clamp_min(eps), t / t_norm.clamp_min(eps)
    missing = sum(torch.where(norm < eps, 1 - x.square().sum(1, keepdim=True), 0.0)
                  for x, norm in ((r, r_norm), (t, t_norm)))  # (N, 1), 0 for unit vectors
    return ((r - t).square().sum(1, keepdim=True) + missing).mean()


def contrast_loss(cnn_logits: Tensor, transformer_logits: Tensor, temperature: float = 0.1) -> Tensor:
    """Not in the paper: in-batch contrast between the arms (InfoNCE, van den Oord et al. 2018, in the
    symmetric form of CLIP, Radford et al. 2021). Both inputs `(N, D)`, N >= 2, result a scalar.

    Each image must recognise its own output by the other arm among those of the whole batch, both
    ways round. One output for every image, which makes Equation 1 zero, is here no better than chance:
    log N. Same networks, one view, no teacher; `temperature` 0.1 was chosen on validation (RESULTS.md).
    """
    r, t = (nn.functional.normalize(x.float(), dim=1) for x in (cnn_logits, transformer_logits))
    cosine = (r[:, None] * t[None]).sum(2)  # (N, N), not a matmul: autocast would round that
    own = torch.arange(len(cosine), device=cosine.device)  # image i belongs to image i
    logits = cosine / temperature
    return (nn.functional.cross_entropy(logits, own) + nn.functional.cross_entropy(logits.T, own)) / 2


RATES = {"cosine": 1e-3, "contrast": 3e-4}  # highest rate with each loss: paper, F.2.3; ours, chosen on validation

OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {  # paper, D.5; "none" is the method
    "none": lambda logits: logits,
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits: logits.float().softmax(dim=1),
}


def cosine_rate(step: int, lr: float = 1e-3, t_max: int = 16, eta_min: float = 1e-6) -> float:
    """Learning rate of a step (F.2.3): down from `lr` to `eta_min` in `t_max` steps, up again in
    as many, and so on: `CosineAnnealingLR`, stepped once a batch."""
    return eta_min + (lr - eta_min) * (1 + math.cos(math.pi * step / t_max)) / 2


# %% training (Algorithm 1)


class CassTraining:
    """Everything that changes while CASS trains, and so everything a checkpoint holds."""

    def __init__(self, cnn: nn.Module, transformer: nn.Module, lr: float, cnn_optimizer: str,
                 averaging: bool, precision: torch.dtype) -> None:
        self.arms, self.device = (cnn, transformer), next(cnn.parameters()).device
        self.optimizers = (torch.optim.SGD(cnn.parameters(), lr, momentum=0.9)  # paper, C.4
                           if cnn_optimizer == "sgd" else torch.optim.Adam(cnn.parameters(), lr),
                           torch.optim.Adam(transformer.parameters(), lr))
        self.averages = tuple(AveragedModel(arm) for arm in self.arms) if averaging else ()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == torch.float16)
        self.epoch, self.losses, self.recent = 0, [], []  # epochs done; this epoch's losses, outputs

    def _parts(self) -> list:
        return [*self.arms, *self.optimizers, *self.averages, self.scaler]

    def state_dict(self) -> dict:
        """Tensors and plain values only."""
        return {"epoch": self.epoch, "losses": [x.item() for x in self.losses], "recent": self.recent,
                "parts": [part.state_dict() for part in self._parts()],
                "random": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]}

    def load_state_dict(self, state: dict) -> None:
        for part, value in zip(self._parts(), state["parts"], strict=True):
            part.load_state_dict(value)
        self.epoch = state["epoch"]
        self.losses = [torch.tensor(x, device=self.device) for x in state["losses"]]
        self.recent = [tuple(x.to(self.device) for x in pair) for pair in state["recent"]]
        torch.set_rng_state(state["random"][0])
        for number, value in enumerate(state["random"][1:]):
            torch.cuda.set_rng_state(value, number)

    def average(self) -> None:
        for average, arm in zip(self.averages, self.arms):
            average.update_parameters(arm)

    def remember(self, loss: Tensor, logits: tuple[Tensor, Tensor]) -> None:
        """Keep this step's loss, and the outputs of the last 256 images for the gauges."""
        self.losses.append(loss.detach())
        keep = math.ceil(256 / len(logits[0]))
        self.recent = [*self.recent, tuple(x.detach() for x in logits)][-keep:]

    def check_loss(self) -> None:
        """Raise `FloatingPointError` if a loss of this epoch is not finite."""
        bad = (~torch.isfinite(torch.stack(self.losses))).nonzero().flatten().tolist()
        if bad:
            raise FloatingPointError(
                f"the loss became {self.losses[bad[0]].item()} in epoch {self.epoch + 1}, step "
                f"{bad[0] + 1}; the last checkpoint is intact; try a lower --lr or --precision fp32")

    def networks(self, loader: Iterable[Tensor], autocast: torch.autocast) -> tuple[nn.Module, nn.Module]:
        """The averaged networks, their batch-norm statistics computed anew; or, if no average was
        ever taken, the networks themselves (an AveragedModel would still hold the first weights)."""
        if not self.averages or self.averages[0].n_averaged == 0:
            return self.arms
        with keep_random(self.device), autocast:
            for average in self.averages:
                update_bn(loader, average, self.device)
        return tuple(average.module for average in self.averages)


BAR = ("loss", "cnn_cosine", "transformer_cosine", "images_per_second")  # shown beside the bar


def pretrain_cass(
    cnn: nn.Module, transformer: nn.Module, loader: Iterable[Tensor], *,
    epochs: int = 100,  # paper, F.2.3
    loss: str = "cosine",  # paper, Equation 1; "contrast" is ours, see contrast_loss
    lr: float | None = None,  # both arms; cosine: 1e-3 (paper, F.2.3), contrast: 3e-4
    cnn_optimizer: str = "adam",  # paper; "sgd" is its ablation C.4
    outputs: str = "none",  # paper; "sigmoid" and "softmax" are its ablation D.5
    swa_start: float = 0.75,  # ours: the last quarter, as in Izmailov et al. 2018; 1 is off
    precision: torch.dtype = torch.float32,  # float16 and bfloat16 train under autocast
    log: Callable[[dict], Any] = lambda row: None,
    save: Callable[..., Any] = lambda state, force=False: None,
    gauges: Callable[..., dict] = lambda outputs, arm, start: {},
    stop: Callable[[], bool] = lambda: False,
    resume: dict | None = None,
) -> tuple[nn.Module, nn.Module]:
    """Train both networks on batches `(N, 3, H, W)` from `loader`; returns the two to keep.

    `log` gets one dict an epoch, from a row for the untrained start onwards; `save` all that
    `resume` needs; `gauges` an arm's last outputs `(<=256, D)`, the arm and its first weights;
    `stop` is asked after each step. A loader's `set_epoch(epoch, skip)` is called if it has one.
    Raises `FloatingPointError` if the loss is not finite, `KeyboardInterrupt` if stopped.
    """
    lr, shape = lr or RATES[loss], OUTPUTS[outputs]
    objective = cass_loss if loss == "cosine" else contrast_loss
    now = CassTraining(cnn, transformer, lr, cnn_optimizer, swa_start < 1, precision)
    autocast = torch.autocast(now.device.type, precision, enabled=precision != torch.float32)
    measure = gauge_arms(gauges, now.arms)
    if resume:
        now.load_state_dict(resume)
    else:
        log({"epoch": 0} | measure(untrained_outputs(now.arms, loader, autocast)))
    steps = len(loader)
    bar = tqdm(total=epochs * steps, initial=now.epoch * steps + len(now.losses), unit="step",
               disable=not sys.stdout.isatty())
    while now.epoch < epochs:
        begun, skip = time.perf_counter(), len(now.losses)
        set_epoch(loader, now.epoch, skip)
        for step, images in enumerate(loader, now.epoch * steps + skip):
            for optimizer in now.optimizers:
                optimizer.param_groups[0]["lr"] = cosine_rate(step, lr)
                optimizer.zero_grad()  # the notebook never does
            images = images.to(now.device, non_blocking=True)
            with autocast:
                logits = cnn(images), transformer(images)  # one view, both arms; (N, D) each
                value = objective(shape(logits[0]), shape(logits[1]))  # Equation 1, unless told otherwise
            now.scaler.scale(value).backward()  # into both arms, no stop-gradient
            for optimizer in now.optimizers:
                now.scaler.step(optimizer)
            now.scaler.update()
            if step % 32 == 16 and step >= swa_start * epochs * steps:  # a low point of the rate
                now.average()
            now.remember(value, logits)
            bar.update()
            if len(now.losses) % 50 == 0 or stop():  # not each step: it waits for the GPU
                now.check_loss()
            if stop() and len(now.losses) < steps:
                save(now.state_dict(), force=True)
                raise KeyboardInterrupt
        now.check_loss()
        rate = (steps - skip) * len(images) / (time.perf_counter() - begun)
        row = {"epoch": now.epoch + 1, "loss": torch.stack(now.losses).mean().item()}
        row |= measure(now.recent) | {"images_per_second": round(rate, 2)}
        log(row)
        bar.set_postfix_str(", ".join(f"{k} {v:.3g}" for k, v in row.items() if k in BAR))
        now.epoch, now.losses = now.epoch + 1, []
        save(now.state_dict(), force=now.epoch == epochs or stop())
        if stop():
            raise KeyboardInterrupt
    bar.close()
    set_epoch(loader, epochs)
    return now.networks(loader, autocast)


def gauge_arms(gauges: Callable[..., dict], arms: tuple[nn.Module, nn.Module]) -> Callable[[list], dict]:
    """A function from the last steps' outputs, [(CNN's, Transformer's), ...], to one row of gauges;
    it keeps a copy of the first weights to measure how far they have moved."""
    start = [[p.detach().clone() for p in arm.parameters()] for arm in arms]

    def measure(recent: list[tuple[Tensor, Tensor]]) -> dict:
        return {f"{name}_{gauge}": value
                for name, outputs, arm, first in zip(("cnn", "transformer"), zip(*recent), arms, start)
                for gauge, value in gauges(torch.cat(outputs)[-256:], arm, first).items()}
    return measure


def keep_random(device: torch.device) -> AbstractContextManager:
    """Inside `with keep_random(device):` the training loop's random stream stands still."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


@torch.no_grad()
def untrained_outputs(arms: tuple[nn.Module, nn.Module], loader: Iterable[Tensor],
                      autocast: AbstractContextManager) -> list[tuple[Tensor, Tensor]]:
    """Outputs for the first 256 images in training mode, as later rows have them: in evaluation
    mode an untrained CNN gives nearly one output for all, its batch-norm statistics being unset."""
    device, recent = next(arms[0].parameters()).device, []
    buffers = [(b, b.clone()) for arm in arms for b in arm.buffers()]
    with keep_random(device), autocast:
        for images in loader:
            recent.append(tuple(arm(images.to(device)) for arm in arms))
            if sum(len(outputs) for outputs, _ in recent) >= 256:
                break
    for buffer, value in buffers:
        buffer.copy_(value)
    return recent


def set_epoch(loader: Iterable, epoch: int, skip: int = 0) -> None:
    """Tell a loader that can be told: its order and augmentation follow from the epoch."""
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(epoch, skip)


# %% the command: files, seeds, devices and disk


def cass_options() -> argparse.ArgumentParser:
    from data import AUGMENTATIONS, add_data_options
    from runtime import Options, add_run_options, positive

    parser = Options("cass.py", "Pretrain a CNN and a Transformer together on a folder of images, without labels.")
    add = parser.add_argument
    add_data_options(parser)
    add_run_options(parser, epochs=100, batch_size=16, lr=None, image_size=384)
    add("--cnn", default="resnet50.a1_in1k", help="timm name of the first arm (paper: %(default)s)")
    add("--transformer", default="vit_base_patch16_384.augreg_in21k_ft_in1k",
        help="timm name of the second arm (paper: %(default)s); two CNNs or two Transformers work too")
    add("--loss", choices=tuple(RATES), default="cosine", help="cosine: the paper's Equation 1; contrast: not "
        "the paper's, in-batch contrast between the arms, which does not collapse (default: %(default)s)")
    add("--cnn-optimizer", choices=("adam", "sgd"), default="adam", help="paper: adam; sgd: its ablation C.4")
    add("--outputs", choices=tuple(OUTPUTS), default="none",
        help="what is applied to the logits before the loss (paper: none; its ablation D.5)")
    add("--augment", choices=AUGMENTATIONS, default="cass",
        help="paper: cass; the others add BYOL's blur and solarize (its ablation C.3)")
    add("--probe-every", type=positive(int), metavar="N", help="every N epochs, score simple classifiers on the "
        "frozen features of both arms; uses labels, for looking only (default: never)")
    add("--swa-start", type=share, default=0.75, help="share of the run after which weights are averaged "
        "at each low point of the rate; 1: never (default: %(default)s; the paper names none)")
    return parser


def share(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def build_arms(args: argparse.Namespace) -> dict[str, nn.Module]:
    """Both networks, with equally many outputs."""
    from runtime import UserError, build_model

    names, inits = (args.cnn, args.transformer), args.init.split(",")  # one start for both, or one each
    arms = [build_model(name, init, args.image_size, seed=args.seed) for name, init in zip(names, inits * 2)]
    if arms[0].num_classes != arms[1].num_classes:
        raise UserError("both arms need the same number of outputs, but " + " and ".join(
            f"{name} has {arm.num_classes}" for name, arm in zip(names, arms)) + "; choose other weights")
    return dict(zip(("cnn", "transformer"), arms))


def run_cass(args: argparse.Namespace) -> None:
    """Read, split, train, save. Nothing is written before every option has been checked."""
    from data import (ImageCache, ImageRows, augmentation, make_loader, open_images, probe_loaders, read_split,
                      write_split)
    from metrics import arm_gauges, collapse_warning, network_features, probe_scores
    from runtime import Run, Screen, StopSignal, UserError, pick_device, pick_precision, pick_workers

    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    args.lr = args.lr or RATES[args.loss]
    out = args.out or Path("runs") / f"cass-{args.data.resolve().name}"

    def warn(*gauges: dict | None) -> str | None:
        sentence = collapse_warning(*gauges)
        return sentence and sentence + (" --loss contrast does not collapse like this (README, Will it collapse?)."
                                        if args.loss == "cosine" else "")

    probes = [f"{arm}_{probe}" for arm in ("cnn", "transformer") for probe in ("knn", "linear") if args.probe_every]
    run = Run(out, vars(args), Screen(("cnn", "transformer"), warn, tuple(probes)))
    if run.finished:
        return print(f"{out} is finished; there is nothing to resume")
    images = open_images(args)
    rows = images.part("train")
    if args.probe_every and not images.classes:
        raise UserError(f"{args.data} has no labels, which --probe-every needs to look with")
    if len(rows) < args.batch_size:
        raise UserError(f"{args.data} has {len(rows)} training images, fewer than a batch of "
                        f"{args.batch_size}; take a smaller --batch-size")
    names, arms = {"cnn": args.cnn, "transformer": args.transformer}, build_arms(args)
    if run.resuming and read_split(out / "split.csv", images).rows != images.rows:
        raise UserError(f"the images in {args.data} or their split have changed since {out} began")
    workers = pick_workers(args.workers, device)
    cache = args.cache and ImageCache(images, args.image_size, args.cache, workers)
    state = run.begin(arms=names, classes=images.classes, multi_label=images.multi_label)
    write_split(out / "split.csv", images)
    notes = ["labels are used for the probes, to look at; nothing is trained on them"] if args.probe_every else []
    for note in images.notes + notes:
        print(f"note: {note}")
    augment = augmentation(args.image_size, args.augment)
    loader = make_loader(ImageRows(images.folder, rows, augment, args.seed, cache=cache), args.batch_size,
                         seed=args.seed, drop_last=True, workers=workers)
    looks = probe_loaders(images, args.image_size, args.batch_size, workers, cache) if args.probe_every else ()

    def log(row: dict) -> None:
        if looks and (row["epoch"] % args.probe_every == 0 or row["epoch"] == args.epochs):
            for name, arm in arms.items():
                scores = probe_scores(*network_features(arm, *looks), images.multi_label)
                row |= {f"{name}_{key}": value for key, value in scores.items()}
        run.log(row)

    torch.manual_seed(args.seed)
    with StopSignal(run) as stop:
        networks = pretrain_cass(
            *(arm.to(device) for arm in arms.values()), loader, epochs=args.epochs, loss=args.loss, lr=args.lr,
            cnn_optimizer=args.cnn_optimizer, outputs=args.outputs, swa_start=args.swa_start,
            precision=precision, log=log, save=run.save, gauges=arm_gauges, stop=stop, resume=state)
    if args.swa_start < 1 and networks[0] is arms["cnn"]:
        print("no low point of the rate fell into the averaging: the networks are saved as the last step left them")
    for arm, network in zip(names, networks):
        print(run.save_network(f"{arm}.pt", network, names[arm]))
    run.finish()


def main(argv: list[str] | None = None) -> None:
    from data import DataError
    from runtime import clear_exit

    args = cass_options().parse_args(argv)
    with clear_exit(DataError, FloatingPointError):
        run_cass(args)


if __name__ == "__main__" and "__file__" in globals():
    main()
