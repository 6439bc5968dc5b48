"""DINO: self-distillation without labels, the method CASS is compared with, in one file.

    python dino.py --data ./autoimmune --arch resnet50.a1_in1k --epochs 100

A student and a teacher network see different crops of one image; a cross-entropy pulls the
student's output towards the teacher's, and the teacher follows the student as its moving average.
That all outputs become equal is held off twice: the teacher's are centred (none may win for every
image) and sharpened (they may not all be alike).

The paper ran the Dino class of vit-pytorch, once for each network; so do we, and where the paper is
silent we do as that package. `--recipe authors` comes nearer to DINO's authors:

| question         | package, and we                          | DINO's authors                 |
|------------------|------------------------------------------|--------------------------------|
| student's crops  | one local (5-40 % of the area) of each   | the teacher's, and 8 local ones|
|                  | of two views, at full input size         | at 96 beside 224 pixels   [*]  |
| teacher's crops  | one (50-100 %) of each view              | two of 40-100 %                |
| augmentation     | the package's steps, drawn anew for each | others                         |
|                  | image (the package: for the batch)       |                                |
| head             | 3 x (Linear 256, GELU), L2-norm, Linear  | wider, last layer weight-normed|
| outputs          | 65,336 (its README: 65,536)              | 65,536                         |
| temperatures     | student 0.9, teacher 0.04                | 0.1, 0.04 to 0.07         [*]  |
| teacher          | decay 0.9, parameters only, in training  | decay 0.996 to 1          [*]  |
|                  | mode                                     |                                |
| centre           | decay 0.9, from 0, updated after the loss| the same                       |
| batch norm       | statistics of each view alone            | all views of a size together   |
| optimiser        | Adam, 3e-4, no schedule                  | AdamW, warm-up, cosine    [*]  |
| network kept     | the teacher (its README: the student)    | the teacher                    |
"""

import argparse
import copy
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torchvision.transforms import v2
from tqdm import tqdm

# %% the views: what teacher and student see of one image

Views = tuple[list[Tensor], list[Tensor]]  # the teacher's crops, the student's crops


class DinoViews:
    """PIL image -> the teacher's two crops and the student's, normalised float tensors
    `(3, size, size)`; the i-th of each come from the same view.

    Without `local_crops` the student has a local crop of either view. With them it has the
    teacher's own two and as many local ones, each of a view of its own, `local_size` pixels wide.
    """

    def __init__(self, size: int, local_crops: int = 0, local_size: int | None = None) -> None:
        self.resize, self.local_crops = v2.Resize((size, size)), local_crops
        self.augment = v2.Compose([
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.3), v2.RandomGrayscale(0.2),
            v2.RandomHorizontalFlip(), v2.RandomApply([blur_3x3], p=0.2)])
        # Normalised after cropping, where the package does so before: the same numbers.
        tensor = (v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
                  v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        self.teacher_crop = v2.Compose([v2.RandomResizedCrop(size, (0.5, 1.0)), *tensor])
        local = v2.RandomResizedCrop(local_size or size, (0.05, 0.4))
        self.local_crop = v2.Compose([local, *tensor])

    def __call__(self, image: Image.Image) -> Views:
        image = self.resize(image)
        views = [self.augment(image), self.augment(image)]
        teacher_views = [self.teacher_crop(view) for view in views]
        if not self.local_crops:
            return teacher_views, [self.local_crop(view) for view in views]
        extra = [self.local_crop(self.augment(image)) for _ in range(self.local_crops)]
        return teacher_views, teacher_views + extra


def blur_3x3(image: Image.Image) -> Image.Image:
    """Gaussian blur over 3 x 3 pixels, sigma 1 to 2: torchvision's, but for the outermost pixels,
    in a tenth of the time."""
    side = math.exp(-0.5 / torch.empty(()).uniform_(1, 2).item() ** 2)  # the middle has weight 1
    corner = side * side
    weights = (corner, side, corner, side, 1, side, corner, side, corner)
    return image.filter(ImageFilter.Kernel((3, 3), weights))


# %% the networks


class DinoHead(nn.Module):
    """The projector: features `(N, F)` -> 3 x (Linear to 256, GELU), L2-norm, outputs `(N, K)`."""

    def __init__(self, features: int, out_dim: int, hidden: int = 256) -> None:
        super().__init__()
        self.projector = nn.Sequential(
            nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
            nn.Linear(hidden, hidden), nn.GELU())
        self.last = nn.Linear(hidden, out_dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.last(nn.functional.normalize(self.projector(features), dim=1, eps=1e-6))


class DinoNetwork(nn.Module):
    """A timm backbone with a `DinoHead` on its pooled features: images -> `(N, F)`, `(N, K)`."""

    def __init__(self, backbone: nn.Module, out_dim: int = 65336) -> None:
        super().__init__()
        self.backbone, self.head = backbone, DinoHead(backbone.head_hidden_size, out_dim)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.backbone.forward_features(images)
        features = self.backbone.forward_head(maps, pre_logits=True)
        return features, self.head(features)


# %% the loss, the averages and the schedules


def dino_targets(teacher_logits: Tensor, centre: Tensor, temperature: float = 0.04) -> Tensor:
    """The teacher's outputs `(V, N, K)`, centred and sharpened, as probabilities; no gradient."""
    return ((teacher_logits.detach().float() - centre) / temperature).softmax(-1)


def dino_loss(student_logits: Sequence[Tensor], targets: Tensor,
              temperature: float = 0.9) -> Tensor:
    """Cross-entropy of each student output `(N, K)` against each target `(N, K)` of another view:
    the mean over images and such pairs, a scalar. Output i and target i, for i < 2, come from one
    view; further outputs come from views of their own."""
    pairs = []
    for i, logits in enumerate(student_logits):
        log_prob = (logits.float() / temperature).log_softmax(-1)
        pairs += [-(target * log_prob).sum(-1).mean() for j, target in enumerate(targets) if i != j]
    return torch.stack(pairs).mean()


@torch.no_grad()
def follow(averages: Iterable[Tensor], values: Iterable[Tensor], momentum: float) -> None:
    """Moving averages, in place: average <- momentum * average + (1 - momentum) * value."""
    for average, value in zip(averages, values, strict=True):
        average.lerp_(value, 1 - momentum)


def cosine_between(step: float, steps: float, start: float, end: float) -> float:
    """From `start` at step 0 to `end` at step `steps`, along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * step / steps)) / 2


def dino_rate(step: int, steps: int, lr: float, warmup: int) -> float:
    """Learning rate of a step: constant; or, with `warmup`, up to `lr` in so many steps and then
    along a cosine down to 1e-6 at the end, as DINO's authors have it."""
    if not warmup:
        return lr
    if step < warmup:
        return lr * (step + 1) / warmup
    return cosine_between(step - warmup, steps - warmup, lr, 1e-6)


@torch.no_grad()
def output_facts(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the gauges need of a step: the student's features `(N, F)`, the mean target `(K,)`, and
    the mean entropy of the targets."""
    return features.detach(), targets.mean((0, 1)), torch.special.entr(targets).sum(-1).mean()


def output_gauges(facts: Iterable[tuple[Tensor, Tensor, Tensor]]) -> dict[str, float]:
    """DINO can collapse in two ways. `entropy` is that of the teacher's mean output, from 0 (one
    output wins for every image) to log K (all are alike); `kl` is the mean divergence of an image's
    output from that mean, 0 when every image gets the same, in either way."""
    _, means, entropies = zip(*facts)
    entropy = torch.special.entr(torch.stack(means).mean(0)).sum().item()
    kl = entropy - torch.stack(entropies).mean().item()  # equals the mean of KL(p | mean p)
    return {"entropy": entropy, "kl": max(0.0, kl)}


# %% training


def pretrain_dino(
    student: DinoNetwork, loader: Iterable[Views], *,
    epochs: int = 100,  # paper, F.2.1: as for CASS
    lr: float = 3e-4,  # the package's README
    student_temperature: float = 0.9,  # the package
    teacher_temperature: tuple[float, float, int] = (0.04, 0.04, 1),  # from, to, in so many epochs
    momentum: tuple[float, float] = (0.9, 0.9),  # the teacher's, from first step to last
    centre_momentum: float = 0.9,  # package and authors
    warmup: int = 0,  # epochs up to lr, then a cosine down; 0: constant
    weight_decay: float = 0.0,  # of matrices
    precision: torch.dtype = torch.float32,  # float16 and bfloat16 train under autocast
    log: Callable[[dict], Any] = lambda row: None,
    save: Callable[[list, list], Any] = lambda parts, history: None,
    restore: Callable[[list], list] = lambda parts: [],
    gauges: Callable[[Iterable], dict] = lambda outputs: {},
) -> tuple[nn.Module, nn.Module]:
    """Train a network on batches of `DinoViews`; returns student and teacher, without heads.

    `log`, `save`, `restore` and `gauges` are as in `pretrain_cass`; `gauges` gets `output_facts`.
    Raises `FloatingPointError` if the loss is not finite.
    """
    device = next(student.parameters()).device
    teacher = copy.deepcopy(student).requires_grad_(False)  # equal at the start
    centre = nn.Module()  # holds one tensor (K,), for a checkpoint to find
    centre.register_buffer("value", torch.zeros(student.head.last.out_features, device=device))
    matrices = [p for p in student.parameters() if p.ndim > 1]
    others = [p for p in student.parameters() if p.ndim <= 1]  # biases and norms: no decay
    optimizer = torch.optim.AdamW([  # without decay this is Adam
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0}], lr, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    autocast = torch.autocast(device.type, precision, enabled=precision != torch.float32)
    parts = [student, teacher, centre, optimizer, scaler]  # all that changes while training
    history, steps = restore(parts), len(loader)  # the loss of each epoch that is done
    set_epoch = getattr(loader, "set_epoch", lambda epoch: None)  # a plain DataLoader has none
    coldest, warmest, rise = teacher_temperature
    for epoch in range(len(history), epochs):
        set_epoch(epoch)
        losses, outputs = [], []
        for step, batch in enumerate(loader, epoch * steps):
            for group in optimizer.param_groups:
                group["lr"] = dino_rate(step, epochs * steps, lr, warmup * steps)
            optimizer.zero_grad()
            teacher_views = [view.to(device, non_blocking=True) for view in batch[0]]
            student_views = [view.to(device, non_blocking=True) for view in batch[1]]
            temperature = coldest + (warmest - coldest) * min(1, step / (rise * steps))
            with autocast:  # one view after the other: each has batch statistics of its own
                with torch.no_grad():
                    teacher_logits = torch.stack([teacher(view)[1] for view in teacher_views])
                features, student_logits = zip(*[student(view) for view in student_views])
                targets = dino_targets(teacher_logits, centre.value, temperature)  # (2, N, K)
                value = dino_loss(student_logits, targets, student_temperature)
            scaler.scale(value).backward()  # into the student alone
            scaler.step(optimizer)
            scaler.update()
            follow(teacher.parameters(), student.parameters(),  # not the buffers
                   cosine_between(step, epochs * steps, *momentum))
            follow([centre.value], [teacher_logits.float().mean((0, 1))], centre_momentum)
            losses.append(value.detach())
            outputs.append(output_facts(features[0], targets))
            del outputs[:-math.ceil(256 / len(features[0]))]  # all but those of 256 images
        history.append(torch.stack(losses).mean().item())
        if not math.isfinite(history[-1]):
            raise FloatingPointError(f"the loss became {history[-1]} in epoch {epoch + 1}; start "
                                     "anew with a lower --lr or --precision fp32")
        log({"epoch": epoch + 1, "loss": history[-1], **gauges(outputs)})
        save(parts, history)
    return student.backbone, teacher.backbone


# %% the command: files, seeds, devices and disk

RECIPES = {"paper": {},  # the defaults above
           "authors": {"student_temperature": 0.1, "teacher_temperature": (0.04, 0.07, 30),
                       "momentum": (0.996, 1.0), "warmup": 10, "weight_decay": 0.04}}


def dino_options() -> argparse.ArgumentParser:
    from data import add_data_options
    from runtime import add_run_options, command_parser, positive

    parser = command_parser("dino.py", "Pretrain a network by DINO on a folder of images, without "
                            "labels.")
    add = parser.add_argument
    add_data_options(parser)
    add_run_options(parser, epochs=100, lr=3e-4)
    add("--arch", default="resnet50.a1_in1k", metavar="NAME", help="timm name of the network "
        "(paper: %(default)s, and then vit_base_patch16_384.augreg_in21k_ft_in1k)")
    add("--recipe", choices=tuple(RECIPES), default="paper", help="temperatures, crops, momentum "
        "and schedule of the paper's package, or nearer to DINO's authors (%(default)s)")
    add("--out-dim", type=positive(int), default=65336, metavar="K",
        help="outputs of the head (paper: %(default)s; DINO's authors: 65536)")
    return parser


def run_dino(args: argparse.Namespace, look: Callable = lambda epoch, networks: {}) -> None:
    """Read, split, train, save. Nothing is written before every option has been checked. What
    `look(epoch, {"backbone": ...})` returns is added to that epoch's row."""
    from data import begin_run, open_images, training_loader
    from metrics import Gauges
    from runtime import Run, build_model, check_size, pick_hardware, watch

    device, precision = pick_hardware(args)
    out = args.out or Path("runs", f"dino-{args.arch.split('.')[0]}-{args.data.resolve().name}")
    run = Run(out, vars(args), ("epoch", "loss", "entropy", "kl", *Gauges.columns("backbone")))
    if run.finished:
        return print(f"{out} is finished; more --epochs train it on")
    images = open_images(args)
    crops, local_size = 8 if args.recipe == "authors" else 0, args.image_size
    if crops:  # 96 beside 224 pixels, and the like
        local_size = max(32, round(args.image_size * 3 / 7 / 32) * 32)
    backbone = build_model(args.arch, args.init, args.image_size, outputs=0, seed=args.seed,
                           dynamic=crops > 0, checkpointing=args.checkpointing)
    check_size(backbone, local_size)
    loader = training_loader(args, images, DinoViews(args.image_size, crops, local_size))
    begin_run(run, images, {"backbone": backbone}, (device, precision))
    torch.manual_seed(args.seed)
    student = DinoNetwork(backbone, args.out_dim).to(device)
    gauges = Gauges({"backbone": backbone})

    def forward(batch: Views) -> tuple:  # before training, student and teacher are one
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            logits = torch.stack([student(view.to(device))[1] for view in batch[0]])
            features = student(batch[1][0].to(device))[0]
        return output_facts(features, dino_targets(logits, torch.zeros((), device=device)))

    watched = watch(run, gauges, look, "a larger --batch-size, or a lower --lr, may help",
                    len(loader.dataset))

    def log(row: dict) -> None:
        watched(row)
        if row["epoch"] and row["kl"] < 0.01 <= run.rows[-2]["kl"]:
            way = "one output wins" if row["entropy"] < math.log(args.out_dim) / 2 else "all alike"
            tqdm.write(f"warning: the teacher now gives the same output for every image ({way}),\n"
                       "so the loss does not show that anything is learned")

    if not run.resuming:
        facts = gauges.untrained(forward, loader)
        log({"epoch": 0, "loss": None, **output_gauges(facts), **gauges(facts)})
    _, teacher = pretrain_dino(
        student, loader, epochs=args.epochs, lr=args.lr, precision=precision, log=log,
        save=run.save, restore=run.restore, **RECIPES[args.recipe],
        gauges=lambda facts: output_gauges(facts) | gauges(facts))
    print("timm loads the teacher with\n  " + run.save_network("backbone.pt", teacher))
    run.finish()


def main(argv: list[str] | None = None) -> None:
    from data import DataError
    from runtime import clear_exit

    args = dino_options().parse_args(argv)
    with clear_exit(DataError, FloatingPointError, resumable=True):
        run_dino(args)


if __name__ == "__main__" and "__file__" in globals():
    main()
