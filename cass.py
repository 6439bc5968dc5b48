"""CASS: Cross Architectural Self-Supervision, the whole method in one file.

    python cass.py --data ./autoimmune --epochs 100

One augmented view of each image goes through a CNN and a Transformer at once; a cosine loss pulls
their outputs together; both networks are trained, saved, and then fine-tuned with few labels.

What the paper leaves open, and what its published notebook does:

| question         | the paper says            | its notebook does         | we do                 |
|------------------|---------------------------|---------------------------|-----------------------|
| Equation 1       | a product of two sums;    | row-wise cosine, eps 1e-8 | row-wise cosine, 1e-8 |
|                  | means row-wise cosine     |                           |                       |
| gradients        | -                         | never cleared             | cleared each step     |
| averaging (SWA)  | over Adam; no start named | never uses the average    | at low points of the  |
|                  |                           |                           | rate, last quarter    |
| schedule         | cosine, 16 iterations,    | stepped each batch: 16    | the same              |
|                  | down to 1e-6              | down, 16 up, for ever     |                       |
| SGD (C.4)        | named only                | -                         | momentum 0.9          |
| which images     | training part             | its labelled 10 %         | training part         |
| last small batch | -                         | -                         | left out of the epoch |
| collapse         | "by design avoids" it     | not looked at             | measured, and said    |
"""

import argparse
import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.optim.swa_utils import AveragedModel, update_bn

# %% the loss (Equation 1) and the rate


def cass_loss(cnn_logits: Tensor, transformer_logits: Tensor, eps: float = 1e-8) -> Tensor:
    """Equation 1: the mean over the batch of 2 - 2 cos(R, T); both inputs `(N, D)`, a scalar."""
    r = normalize(cnn_logits.float(), dim=1, eps=eps)  # (N, D), float32 under autocast too
    t = normalize(transformer_logits.float(), dim=1, eps=eps)
    return (2 - 2 * (r * t).sum(dim=1)).mean()


def contrast_loss(cnn_logits: Tensor, transformer_logits: Tensor,
                  temperature: float = 0.1) -> Tensor:
    """Not in the paper: in-batch contrast between the arms (InfoNCE, van den Oord et al. 2018, in
    the symmetric form of CLIP, Radford et al. 2021). Both inputs `(N, D)`, N >= 2, a scalar.

    Each image must recognise its own output by the other arm among those of the whole batch, both
    ways round. One output for every image, which makes Equation 1 zero, is here no better than
    chance: log N. `temperature` 0.1 was chosen on validation (RESULTS.md).
    """
    r = normalize(cnn_logits.float(), dim=1)
    t = normalize(transformer_logits.float(), dim=1)
    cosine = (r[:, None] * t[None]).sum(dim=2)  # (N, N), no matmul: autocast would round that
    own = torch.arange(len(cosine), device=cosine.device)  # image i belongs to image i
    return (cross_entropy(cosine / temperature, own)
            + cross_entropy(cosine.T / temperature, own)) / 2


def cosine_rate(step: int, lr: float = 1e-3, t_max: int = 16, eta_min: float = 1e-6) -> float:
    """Learning rate of a step (F.2.3): down from `lr` to `eta_min` in `t_max` steps, up again in
    as many, and so on: `CosineAnnealingLR`, stepped once a batch."""
    return eta_min + (lr - eta_min) * (1 + math.cos(math.pi * step / t_max)) / 2


# %% training (Algorithm 1)

adam = partial(torch.optim.Adam, fused=True)  # one pass over the weights, on CPU and GPU


def pretrain_cass(
    cnn: nn.Module, transformer: nn.Module, loader: Iterable[Tensor], *,
    epochs: int = 100,  # paper, F.2.3
    loss: Callable[[Tensor, Tensor], Tensor] = cass_loss,  # paper, Equation 1
    lr: float = 1e-3,  # paper, F.2.3; both arms
    cnn_optimizer: Callable[..., torch.optim.Optimizer] = adam,  # paper; SGD is its C.4
    swa_start: float = 0.75,  # ours: the last quarter, as in Izmailov et al. 2018; 1: never
    precision: torch.dtype = torch.float32,  # float16 and bfloat16 train under autocast
    log: Callable[[dict], Any] = lambda row: None,
    save: Callable[[list, list], Any] = lambda parts, history: None,
    restore: Callable[[list], list] = lambda parts: [],
    gauges: Callable[[Iterable], dict] = lambda outputs: {},
) -> tuple[nn.Module, nn.Module]:
    """Train both networks on batches `(N, 3, H, W)` from `loader`; returns the two to keep.

    After each epoch `log` gets a row, with what `gauges` makes of the last steps' outputs, and
    `save` all that `restore` needs to go on from there. A loader's `set_epoch(epoch)` is called if
    it has one. Raises `FloatingPointError` if the loss is not finite.
    """
    device = next(cnn.parameters()).device
    arms = (cnn, transformer)
    optimizers = cnn_optimizer(cnn.parameters(), lr), adam(transformer.parameters(), lr)
    averages = [AveragedModel(arm) for arm in arms]
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    autocast = torch.autocast(device.type, precision, enabled=precision != torch.float32)
    parts = [*arms, *optimizers, *averages, scaler]  # all that changes while training
    history, steps = restore(parts), len(loader)  # the loss of each epoch that is done
    set_epoch = getattr(loader, "set_epoch", lambda epoch: None)  # a plain DataLoader has none
    if len(history) < swa_start * epochs:  # of a finished run that trains on, far enough
        for average in averages:
            average.n_averaged.zero_()
    for epoch in range(len(history), epochs):
        set_epoch(epoch)
        losses, outputs = [], []
        for step, images in enumerate(loader, epoch * steps):
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = cosine_rate(step, lr)
                optimizer.zero_grad()  # the notebook never does
            images = images.to(device, non_blocking=True)
            with autocast:
                logits = cnn(images), transformer(images)  # one view, both arms; (N, D) each
                value = loss(*logits)
            scaler.scale(value).backward()  # into both arms, no stop-gradient
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            if step % 32 == 16 and step >= swa_start * epochs * steps:  # a low point of the rate
                for average, arm in zip(averages, arms):
                    average.update_parameters(arm)
            losses.append(value.detach())
            outputs.append([x.detach() for x in logits])
            del outputs[:-math.ceil(256 / len(images))]  # all but those of the last 256 images
        history.append(torch.stack(losses).mean().item())
        if not math.isfinite(history[-1]):
            raise FloatingPointError(f"the loss became {history[-1]} in epoch {epoch + 1}; start "
                                     "anew with a lower --lr or --precision fp32")
        log({"epoch": epoch + 1, "loss": history[-1], **gauges(outputs)})
        save(parts, history)
    if averages[0].n_averaged == 0:  # never averaged: an AveragedModel holds the first weights
        return arms
    set_epoch(epochs - 1)  # resumed after the last epoch, the loader has not been told
    with autocast:
        for average in averages:
            update_bn(loader, average, device)
    return averages[0].module, averages[1].module


# %% the command: files, seeds, devices and disk

LOSSES = {  # with the highest rate, and what a warning of collapse advises
    "cosine": (cass_loss, 1e-3,  # paper, F.2.3
               "--loss contrast does not collapse like this (README, Which loss?)"),
    "contrast": (contrast_loss, 3e-4,  # chosen on validation
                 "a larger --batch-size, or a lower --lr, may help")}
OPTIMIZERS = {"adam": adam,
              "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr, momentum=0.9)}
OUTPUTS = {"none": lambda logits: logits, "sigmoid": torch.sigmoid,  # paper, D.5
           "softmax": lambda logits: logits.float().softmax(dim=1)}


def cass_options() -> argparse.ArgumentParser:
    from data import AUGMENTATIONS, add_data_options
    from runtime import add_run_options, command_parser

    parser = command_parser("cass.py", "Pretrain a CNN and a Transformer together on a folder of "
                            "images, without labels.")
    add = parser.add_argument
    add_data_options(parser)
    add_run_options(parser, epochs=100, lr="1e-3; 3e-4 with --loss contrast")
    parser.set_defaults(lr=None)  # the loss's own
    add("--cnn", default="resnet50.a1_in1k", help="timm name of the first arm (%(default)s)")
    add("--transformer", default="vit_base_patch16_384.augreg_in21k_ft_in1k", help="timm name of "
        "the second arm (%(default)s); two CNNs or two Transformers work too")
    add("--loss", choices=tuple(LOSSES), default="cosine", help="cosine: the paper's Equation 1; "
        "contrast: not the paper's, in-batch contrast, which does not collapse (%(default)s)")
    add("--cnn-optimizer", choices=tuple(OPTIMIZERS), default="adam",
        help="paper: adam; sgd: its ablation C.4")
    add("--outputs", choices=tuple(OUTPUTS), default="none",
        help="what is applied to the logits before the loss (paper: none; its ablation D.5)")
    add("--augment", choices=AUGMENTATIONS, default="cass",
        help="paper: cass; the others add BYOL's blur and solarize (its ablation C.3)")
    return parser


def build_arms(args: argparse.Namespace) -> dict[str, nn.Module]:
    """Both networks, with equally many outputs."""
    from runtime import UserError, build_model

    inits = args.init.split(",") * 2  # one start for both, or one each
    if len(inits) > 4:
        raise UserError(f"--init {args.init} names more than two starts; there are two arms")
    names = args.cnn, args.transformer
    for outputs in (None, 1000):  # their own, or new heads
        arms = [build_model(name, init, args.image_size, seed=args.seed, outputs=outputs,
                            checkpointing=args.checkpointing) for name, init in zip(names, inits)]
        if arms[0].num_classes == arms[1].num_classes > 0:
            break
        print("note: the arms have {} and {} outputs: both get new heads of 1,000".format(
            *(arm.num_classes for arm in arms)))
    return dict(zip(("cnn", "transformer"), arms))


def run_cass(args: argparse.Namespace, look: Callable = lambda epoch, networks: {}) -> None:
    """Read, split, train, save. Nothing is written before every option has been checked. What
    `look(epoch, {"cnn": ..., "transformer": ...})` returns is added to that epoch's row."""
    from data import augmentation, begin_run, open_images, training_loader
    from metrics import Gauges
    from runtime import Run, pick_hardware, watch

    device, precision = pick_hardware(args)
    loss, rate, hint = LOSSES[args.loss]
    out = args.out or Path("runs", f"cass-{args.data.resolve().name}")
    run = Run(out, vars(args), ("epoch", "loss", *Gauges.columns("cnn", "transformer")))
    if run.finished:
        return print(f"{out} is finished; more --epochs train it on")
    images = open_images(args)
    arms = build_arms(args)
    loader = training_loader(args, images, augmentation(args.image_size, args.augment))
    begin_run(run, images, arms, (device, precision))
    arms = {name: arm.to(device) for name, arm in arms.items()}

    def forward(batch: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            return tuple(arm(batch.to(device)) for arm in arms.values())

    def compare(*logits: Tensor) -> Tensor:
        return loss(*map(OUTPUTS[args.outputs], logits))

    gauges = Gauges(arms)
    log = watch(run, gauges, look, hint, len(loader.dataset))
    if not run.resuming:
        log({"epoch": 0, "loss": None, **gauges(gauges.untrained(forward, loader))})
    torch.manual_seed(args.seed)
    networks = pretrain_cass(
        *arms.values(), loader, epochs=args.epochs, loss=compare, lr=args.lr or rate,
        precision=precision, cnn_optimizer=OPTIMIZERS[args.cnn_optimizer], log=log, save=run.save,
        restore=run.restore, gauges=gauges)
    if networks[0] is arms["cnn"]:
        print("too short to average weights: the networks are saved as the last step left them")
    print("timm loads the networks with")
    for name, network in zip(arms, networks):
        print("  " + run.save_network(f"{name}.pt", network))
    run.finish()


def main(argv: list[str] | None = None) -> None:
    from data import DataError
    from runtime import clear_exit

    args = cass_options().parse_args(argv)
    with clear_exit(DataError, FloatingPointError, resumable=True):
        run_cass(args)


if __name__ == "__main__" and "__file__" in globals():
    main()
