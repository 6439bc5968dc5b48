"""DINO: self-distillation with no labels, the method CASS is compared with, in one file.

    python dino.py --data ./autoimmune --arch resnet50.a1_in1k --epochs 100

A student network and a teacher network see different crops of one image; a cross-entropy pulls the
student's output towards the teacher's. The teacher is a moving average of the student. Two things
keep all outputs from becoming equal: the teacher's are centred (no output may win for every image)
and sharpened (they may not be uniform either).

The paper ran the Dino class of the package vit-pytorch, once for each network. Where the paper,
that package and this file differ (option that changes it in brackets):

| question | the paper says | its package does | we do |
|---|---|---|---|
| student's crops | a local crop | a local one (5-40 % of the area) of each of two views | the same [--local-crops: the teacher's two and N local ones, as DINO's authors] |
| teacher's crops | a global crop | one (50-100 %) of each view | the same (authors: 40-100 %) |
| size of the crops | - | full input size, local ones too | the same [--local-size; authors: 96 for 224] |
| augmentation | "the original implementation" | one draw for the whole batch | a draw for each image, same steps |
| images | 384 x 384 | a batch of one size | first resized to the square, as for CASS |
| head | - | 3 x (Linear 256, GELU), L2-norm, Linear | the same (authors: wider, last layer weight-normed, frozen for an epoch) |
| outputs K | - | 65,336 (its README: 65,536) | 65,336 [--out-dim] |
| temperatures | - | student 0.9, teacher 0.04 | the same [--student-temperature; authors: 0.1] |
| warm-up of the teacher's | - | left to the user | none [--teacher-temperature, --temperature-warmup] |
| teacher | moving average | 0.9, parameters only, training mode | the same [--momentum; authors: 0.996:1] |
| centre | named | moving average 0.9, from 0 | the same |
| batch norm | - | statistics of each view alone | the same (authors: views of one size together) |
| optimiser | - | its README: Adam, 3e-4, no schedule | the same [--lr, --warmup, --weight-decay, --clip] |
| network kept | - | its README: the student | the teacher, as DINO's authors [--save] |
| which images | training split only | - | training split only |
| last batch of an epoch | - | - | left out if smaller; its images come up in other epochs |
| collapse | centring avoids it | not looked at | measured each epoch, and said |
"""

import argparse
import copy
import math
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

import torch
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
            v2.RandomHorizontalFlip(), v2.RandomApply([v2.GaussianBlur((3, 3), (1.0, 2.0))], p=0.2)])
        tensor = (v2.ToImage(), v2.ToDtype(torch.float32, scale=True),  # after cropping: 4 times faster,
                  v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))  # and the same numbers
        self.teacher_crop = v2.Compose([v2.RandomResizedCrop(size, (0.5, 1.0)), *tensor])
        self.local_crop = v2.Compose([v2.RandomResizedCrop(local_size or size, (0.05, 0.4)), *tensor])

    def __call__(self, image: Any) -> Views:
        image = self.resize(image)
        views = [self.augment(image), self.augment(image)]
        teacher_views = [self.teacher_crop(view) for view in views]
        if not self.local_crops:
            return teacher_views, [self.local_crop(view) for view in views]
        extra = [self.local_crop(self.augment(image)) for _ in range(self.local_crops)]
        return teacher_views, teacher_views + extra


# %% the networks


class DinoHead(nn.Module):
    """The projector: features `(N, F)` -> three times (Linear to 256, GELU), L2-norm, outputs `(N, K)`."""

    def __init__(self, features: int, out_dim: int, hidden: int = 256) -> None:
        super().__init__()
        self.projector = nn.Sequential(nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, hidden),
                                       nn.GELU(), nn.Linear(hidden, hidden), nn.GELU())
        self.last = nn.Linear(hidden, out_dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.last(nn.functional.normalize(self.projector(features), dim=1, eps=1e-6))


class DinoNetwork(nn.Module):
    """A timm backbone with a `DinoHead` on its pooled features: images -> `(N, F)`, `(N, K)`."""

    def __init__(self, backbone: nn.Module, out_dim: int) -> None:
        super().__init__()
        self.backbone, self.head = backbone, DinoHead(backbone.head_hidden_size, out_dim)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone.forward_head(self.backbone.forward_features(images), pre_logits=True)
        return features, self.head(features)


# %% the loss, the averages and the schedules


def dino_targets(teacher_logits: Tensor, centre: Tensor, temperature: float = 0.04) -> Tensor:
    """The teacher's outputs `(V, N, K)` centred, sharpened, as probabilities; no gradient passes."""
    return ((teacher_logits.detach().float() - centre) / temperature).softmax(-1)


def dino_loss(student_logits: Sequence[Tensor], targets: Tensor, temperature: float = 0.9) -> Tensor:
    """Cross-entropy of each student output `(N, K)` against each target `(N, K)` of another view:
    the mean over images and over all such pairs, a scalar. Student output i and target i, for
    i < 2, come from one view; further student outputs come from views of their own."""
    log_probs = [(logits.float() / temperature).log_softmax(-1) for logits in student_logits]
    pairs = [-(target * log_prob).sum(-1).mean() for j, target in enumerate(targets)
             for i, log_prob in enumerate(log_probs) if i != j]
    return torch.stack(pairs).mean()


@torch.no_grad()
def follow(averages: Iterable[Tensor], values: Iterable[Tensor], momentum: float) -> None:
    """Moving averages, in place: average <- momentum * average + (1 - momentum) * value."""
    for average, value in zip(averages, values, strict=True):
        average.lerp_(value, 1 - momentum)


def cosine_between(step: float, steps: float, start: float, end: float) -> float:
    """From `start` at step 0 to `end` at step `steps`, along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * step / steps)) / 2


def dino_rate(step: int, steps: int, lr: float = 3e-4, warmup: float | None = None) -> float:
    """Learning rate of a step: constant; or, with `warmup`, up to `lr` in so many steps, and by a
    cosine down to 1e-6 at the end, as DINO's authors have it."""
    if warmup is None:
        return lr
    if step < warmup:
        return lr * (step + 1) / math.ceil(warmup)
    return cosine_between(step - warmup, steps - warmup, lr, 1e-6)


def sharpness(step: int, warmup: float, start: float, end: float) -> float:
    """The teacher's temperature in a step: from `start` to `end` in a straight line of `warmup` steps."""
    return start + (end - start) * min(1.0, step / warmup) if warmup else end


# %% training


class DinoTraining:
    """Everything that changes while DINO trains, and so everything a checkpoint holds."""

    def __init__(self, backbone: nn.Module, out_dim: int, lr: float, weight_decay: float,
                 precision: torch.dtype) -> None:
        self.device = next(backbone.parameters()).device
        self.student = DinoNetwork(backbone, out_dim).to(self.device)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)  # equal at the start
        self.centre = torch.zeros(out_dim, device=self.device)
        decayed = [p for p in self.student.parameters() if p.ndim > 1]  # no biases, no norms
        spared = [p for p in self.student.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW([  # without decay this is Adam
            {"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}], lr)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == torch.float16)
        self.epoch, self.losses, self.recent = 0, [], []  # epochs done; this epoch's losses; see remember

    def _parts(self) -> list:
        return [self.student, self.teacher, self.optimizer, self.scaler]

    def state_dict(self) -> dict:
        """Tensors and plain values only."""
        return {"epoch": self.epoch, "losses": [x.item() for x in self.losses], "recent": self.recent,
                "centre": self.centre, "parts": [part.state_dict() for part in self._parts()],
                "random": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]}

    def load_state_dict(self, state: dict) -> None:
        for part, value in zip(self._parts(), state["parts"], strict=True):
            part.load_state_dict(value)
        self.epoch = state["epoch"]
        self.centre.copy_(state["centre"])
        self.losses = [torch.tensor(x, device=self.device) for x in state["losses"]]
        self.recent = [tuple(x.to(self.device) for x in step) for step in state["recent"]]
        torch.set_rng_state(state["random"][0])
        for number, value in enumerate(state["random"][1:]):
            torch.cuda.set_rng_state(value, number)

    @torch.no_grad()
    def remember(self, features: Tensor, targets: Tensor) -> None:
        """Keep what the gauges need of the last 256 images: the student's features `(N, F)`, the
        mean of the targets `(K,)`, and the mean of their entropies."""
        entropy = torch.special.entr(targets).sum(-1).mean()
        step = features.detach(), targets.mean((0, 1)), entropy
        self.recent = [*self.recent, step][-math.ceil(256 / len(features)):]

    def check_loss(self) -> None:
        """Raise `FloatingPointError` if a loss of this epoch is not finite."""
        bad = (~torch.isfinite(torch.stack(self.losses))).nonzero().flatten().tolist()
        if bad:
            raise FloatingPointError(
                f"the loss became {self.losses[bad[0]].item()} in epoch {self.epoch + 1}, step "
                f"{bad[0] + 1}; the last checkpoint is intact; try a lower --lr or --precision fp32")


def pretrain_dino(
    student: nn.Module, loader: Iterable[Views], *,
    epochs: int = 100,  # paper, F.2.1: as for CASS
    lr: float = 3e-4,  # the package's README
    out_dim: int = 65336,  # the package; its README and DINO's authors: 65,536
    student_temperature: float = 0.9,  # the package; authors: 0.1
    teacher_temperature: tuple[float, float] = (0.04, 0.04),  # start, end; the package, the authors
    temperature_warmup: float = 0,  # epochs from start to end; authors: 30, where they differ
    momentum: tuple[float, float] = (0.9, 0.9),  # of the teacher; start, end; authors: 0.996, 1
    centre_momentum: float = 0.9,  # the package, the authors
    warmup: float | None = None,  # epochs up to lr, then a cosine down; None: constant; authors: 10
    weight_decay: float = 0.0,  # authors: 0.04, rising to 0.4
    clip: float | None = None,  # longest gradient; authors: 3, for each tensor
    precision: torch.dtype = torch.float32,  # float16 and bfloat16 train under autocast
    log: Callable[[dict], Any] = lambda row: None,
    save: Callable[..., Any] = lambda state, force=False: None,
    gauges: Callable[..., dict] = lambda outputs, arm, start: {},
    stop: Callable[[], bool] = lambda: False,
    resume: dict | None = None,
) -> tuple[nn.Module, nn.Module]:
    """Train a timm model on batches of `DinoViews`; returns (student, teacher), without their heads.

    `log`, `save`, `gauges`, `stop` and `resume` are those of `pretrain_cass`; `gauges` gets the
    student's features of its first crop. Each row also has the `entropy` and `kl` of `measure_row`.
    Raises `FloatingPointError` if the loss is not finite, `KeyboardInterrupt` if stopped.
    """
    now = DinoTraining(student, out_dim, lr, weight_decay, precision)
    autocast = torch.autocast(now.device.type, precision, enabled=precision != torch.float32)
    start = [p.detach().clone() for p in student.parameters()]
    if resume:
        now.load_state_dict(resume)
    else:
        look_at_untrained(now, loader, autocast, teacher_temperature[0])
        log({"epoch": 0} | measure_row(now, gauges, start))
        now.recent = []
    steps, begin_epoch = len(loader), getattr(loader, "set_epoch", lambda epoch, skip: None)
    bar = tqdm(total=epochs * steps, initial=now.epoch * steps + len(now.losses), unit="step",
               disable=not sys.stdout.isatty())
    while now.epoch < epochs:
        begun, skip = time.perf_counter(), len(now.losses)
        begin_epoch(now.epoch, skip)
        for step, batch in enumerate(loader, now.epoch * steps + skip):
            for group in now.optimizer.param_groups:
                group["lr"] = dino_rate(step, epochs * steps, lr, None if warmup is None else warmup * steps)
            now.optimizer.zero_grad()
            teacher_views, student_views = ([x.to(now.device, non_blocking=True) for x in part] for part in batch)
            with autocast:
                with torch.no_grad():  # one view after the other: each has its own batch statistics
                    teacher_logits = torch.stack([now.teacher(view)[1] for view in teacher_views])  # (2, N, K)
                features, student_logits = zip(*[now.student(view) for view in student_views])
                temperature = sharpness(step, temperature_warmup * steps, *teacher_temperature)
                targets = dino_targets(teacher_logits, now.centre, temperature)
                loss = dino_loss(student_logits, targets, student_temperature)
            now.scaler.scale(loss).backward()  # into the student alone
            if clip:
                now.scaler.unscale_(now.optimizer)
                nn.utils.clip_grad_norm_(now.student.parameters(), clip)
            now.scaler.step(now.optimizer)
            now.scaler.update()
            follow(now.teacher.parameters(), now.student.parameters(),
                   cosine_between(step, epochs * steps, *momentum))
            follow([now.centre], [teacher_logits.float().mean((0, 1))], centre_momentum)
            now.losses.append(loss.detach())
            now.remember(features[0], targets)
            bar.update()
            if len(now.losses) % 50 == 0 or stop():  # not each step: it waits for the GPU
                now.check_loss()
            if stop():
                save(now.state_dict(), force=True)
                raise KeyboardInterrupt
        now.check_loss()
        rate = (steps - skip) * len(features[0]) / (time.perf_counter() - begun)
        row = {"epoch": now.epoch + 1, "loss": torch.stack(now.losses).mean().item()}
        row |= measure_row(now, gauges, start) | {"images_per_second": round(rate, 2)}
        log(row)
        bar.set_postfix_str(f"loss {row['loss']:.3g}, kl {row['kl']:.3g}, {rate:.3g} images/s")
        now.epoch, now.losses = now.epoch + 1, []
        save(now.state_dict(), force=now.epoch == epochs)
    bar.close()
    return now.student.backbone, now.teacher.backbone
