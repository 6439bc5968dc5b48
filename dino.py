"""DINO: self-distillation without labels, the method CASS is compared with, in one file.

    python dino.py --data ./autoimmune --arch resnet50.a1_in1k --epochs 100

A student and a teacher network see different crops of one image; a cross-entropy pulls the student's
output towards the teacher's, and the teacher follows the student as its moving average. That all
outputs become equal is held off twice: the teacher's are centred (none may win for every image) and
sharpened (they may not all be alike).

The paper ran the Dino class of vit-pytorch, once for each network. Where the paper, that package and
this file differ, and what DINO's authors do (option that changes it in brackets):

| question | the paper says | its package does | we do |
|---|---|---|---|
| student's crops | local | a local one (5-40 % of the area) of each of two views | the same [--local-crops N: the teacher's two and N local ones, as the authors] |
| teacher's crops | global | one (50-100 %) of each view | the same (authors: 40-100 %) |
| size of all crops | - | full input size | the same [--local-size; authors: 96 beside 224] |
| augmentation | "original implementation" | one draw for the whole batch | one for each image, same steps (authors: others) |
| images | 384 x 384 | of one size | resized to the square first, as for CASS |
| head | - | 3 x (Linear 256, GELU), L2-norm, Linear | the same (authors: wider, last layer weight-normed, first epoch frozen) |
| outputs | - | 65,336 (its README: 65,536) | 65,336 [--out-dim] |
| temperatures | - | student 0.9, teacher 0.04 | the same [--student-temperature, --teacher-temperature; authors: 0.1] |
| teacher | moving average | decay 0.9, parameters only, in training mode | the same [--momentum; authors: 0.996:1] |
| centre | named | decay 0.9, from 0, updated after the loss | the same |
| batch norm | - | statistics of each view alone | the same (authors: all views of a size together) |
| optimiser | - | its README: Adam, 3e-4, no schedule | the same [--lr, --warmup, --weight-decay, --clip] |
| network kept | - | its README: the student | the teacher, as the authors [--save] |
| which images | training split only | - | training split only |
| last batch of an epoch | - | - | left out if smaller; its images come up in other epochs |
| collapse | centring prevents it | not looked at | measured each epoch |
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
        tensor = (v2.ToImage(), v2.ToDtype(torch.float32, scale=True),  # normalised after cropping, not
                  v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))  # before: the same numbers
        self.teacher_crop = v2.Compose([v2.RandomResizedCrop(size, (0.5, 1.0)), *tensor])
        self.local_crop = v2.Compose([v2.RandomResizedCrop(local_size or size, (0.05, 0.4)), *tensor])

    def __call__(self, image: Image.Image) -> Views:
        image = self.resize(image)
        views = [self.augment(image), self.augment(image)]
        teacher_views = [self.teacher_crop(view) for view in views]
        if not self.local_crops:
            return teacher_views, [self.local_crop(view) for view in views]
        extra = [self.local_crop(self.augment(image)) for _ in range(self.local_crops)]
        return teacher_views, teacher_views + extra


def blur_3x3(image: Image.Image) -> Image.Image:
    """Gaussian blur over 3 x 3 pixels, sigma 1 to 2: torchvision's, but for the outermost pixels, in a
    tenth of the time."""
    side = math.exp(-0.5 / torch.empty(()).uniform_(1, 2).item() ** 2)  # the middle has weight 1
    return image.filter(ImageFilter.Kernel((3, 3), [a * b for a in (side, 1, side) for b in (side, 1, side)]))


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
    """The teacher's outputs `(V, N, K)`, centred and sharpened, as probabilities; no gradient passes."""
    return ((teacher_logits.detach().float() - centre) / temperature).softmax(-1)


def dino_loss(student_logits: Sequence[Tensor], targets: Tensor, temperature: float = 0.9) -> Tensor:
    """Cross-entropy of each student output `(N, K)` against each target `(N, K)` of another view: the
    mean over images and such pairs, a scalar. Output i and target i, for i < 2, come from one view;
    further outputs come from views of their own."""
    log_probs = [(logits.float() / temperature).log_softmax(-1) for logits in student_logits]
    pairs = [-(target * log_prob).sum(-1).mean() for j, target in enumerate(targets)
             for i, log_prob in enumerate(log_probs) if i != j]
    return torch.stack(pairs).mean()


@torch.no_grad()
def follow(averages: Iterable[Tensor], values: Iterable[Tensor], momentum: float) -> None:
    """Moving averages, in place: average <- momentum * average + (1 - momentum) * value."""
    for average, value in zip(averages, values, strict=True):
        average.lerp_(value, 1 - momentum)


def linear_between(step: float, steps: float, start: float, end: float) -> float:
    """From `start` at step 0 to `end` at step `steps` and after it, in a straight line."""
    return start + (end - start) * min(1.0, step / steps) if steps else end


def cosine_between(step: float, steps: float, start: float, end: float) -> float:
    """From `start` at step 0 to `end` at step `steps`, along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * step / steps)) / 2


def dino_rate(step: int, steps: int, lr: float = 3e-4, warmup: float | None = None) -> float:
    """Learning rate of a step: constant; or, with `warmup`, up to `lr` in so many steps and then, along
    a cosine, down to 1e-6 at the end, as DINO's authors have it."""
    if warmup is None:
        return lr
    if step < warmup:
        return lr * min(1.0, (step + 1) / warmup)
    return cosine_between(step - warmup, steps - warmup, lr, 1e-6)


# %% training


class DinoTraining:
    """Everything that changes while DINO trains, and so everything a checkpoint holds."""

    def __init__(self, backbone: nn.Module, out_dim: int, lr: float, weight_decay: float,
                 precision: torch.dtype) -> None:
        self.device = next(backbone.parameters()).device
        self.student = DinoNetwork(backbone, out_dim).to(self.device)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)  # equal at the start
        self.centre = torch.zeros(out_dim, device=self.device)
        parameters = list(self.student.parameters())
        self.optimizer = torch.optim.AdamW([  # without decay this is Adam; biases and norms have none
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}], lr)
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
    def remember(self, loss: Tensor, features: Tensor, targets: Tensor) -> None:
        """Keep this step's loss and, of the last 256 images, what the gauges need: the student's
        features `(N, F)`, the mean of the targets `(K,)` and the mean of their entropies."""
        self.losses.append(loss.detach())
        step = features.detach(), targets.mean((0, 1)), torch.special.entr(targets).sum(-1).mean()
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
    teacher_temperature: tuple[float, float, float] = (0.04, 0.04, 0),  # start, end, epochs from one
    # to the other; the package; authors: 0.04 in small runs, 0.04, 0.07, 30 in large ones
    momentum: tuple[float, float] = (0.9, 0.9),  # the teacher's; start, end; authors: 0.996, 1
    centre_momentum: float = 0.9,  # package and authors
    warmup: float | None = None,  # epochs up to lr, then a cosine down; None: constant; authors: 10
    weight_decay: float = 0.0,  # authors: 0.04 rising to 0.4
    clip: float | None = None,  # the longest gradient; authors: 3, for each tensor
    precision: torch.dtype = torch.float32,  # float16 and bfloat16 train under autocast
    log: Callable[[dict], Any] = lambda row: None,
    save: Callable[..., Any] = lambda state, force=False: None,
    gauges: Callable[..., dict] = lambda outputs, arm, start: {},
    stop: Callable[[], bool] = lambda: False,
    resume: dict | None = None,
) -> tuple[nn.Module, nn.Module]:
    """Train a timm model on batches of `DinoViews`; returns student and teacher, without heads.

    `log` gets one dict an epoch, from a row for the untrained start onwards; `save` all that
    `resume` needs; `gauges` the student's last features `(<=256, F)`, the student and its first
    weights; `stop` is asked after each step. A loader's `set_epoch(epoch, skip)` is called if it has
    one. Raises `FloatingPointError` if the loss is not finite, `KeyboardInterrupt` if stopped.
    """
    now = DinoTraining(student, out_dim, lr, weight_decay, precision)
    autocast = torch.autocast(now.device.type, precision, enabled=precision != torch.float32)
    measure, (coldest, warmest, rise) = gauge_student(gauges, student), teacher_temperature
    if resume:
        now.load_state_dict(resume)
    else:
        log({"epoch": 0} | measure(untrained_steps(now, loader, autocast, coldest)))
    steps, begin_epoch = len(loader), getattr(loader, "set_epoch", lambda epoch, skip: None)
    bar = tqdm(total=epochs * steps, initial=now.epoch * steps + len(now.losses), unit="step",
               disable=not sys.stdout.isatty())
    while now.epoch < epochs:
        begun, skip = time.perf_counter(), len(now.losses)
        begin_epoch(now.epoch, skip)
        for step, batch in enumerate(loader, now.epoch * steps + skip):
            for group in now.optimizer.param_groups:
                group["lr"] = dino_rate(step, epochs * steps, lr, warmup and warmup * steps)
            now.optimizer.zero_grad()
            teacher_views, student_views = ([x.to(now.device, non_blocking=True) for x in part] for part in batch)
            temperature = linear_between(step, rise * steps, coldest, warmest)
            with autocast:  # one view after the other: each has batch statistics of its own
                with torch.no_grad():
                    teacher_logits = torch.stack([now.teacher(view)[1] for view in teacher_views])
                features, student_logits = zip(*[now.student(view) for view in student_views])
                targets = dino_targets(teacher_logits, now.centre, temperature)  # (2, N, K)
                loss = dino_loss(student_logits, targets, student_temperature)
            now.scaler.scale(loss).backward()  # into the student alone
            if clip:
                now.scaler.unscale_(now.optimizer)
                nn.utils.clip_grad_norm_(now.student.parameters(), clip)
            now.scaler.step(now.optimizer)
            now.scaler.update()
            follow(now.teacher.parameters(), now.student.parameters(),  # not the buffers
                   cosine_between(step, epochs * steps, *momentum))
            follow([now.centre], [teacher_logits.float().mean((0, 1))], centre_momentum)
            now.remember(loss, features[0], targets)
            bar.update()
            if len(now.losses) % 50 == 0 or stop():  # not each step: it waits for the GPU
                now.check_loss()
            if stop() and len(now.losses) < steps:
                save(now.state_dict(), force=True)
                raise KeyboardInterrupt
        now.check_loss()
        rate = (steps - skip) * len(features[0]) / (time.perf_counter() - begun)
        row = {"epoch": now.epoch + 1, "loss": torch.stack(now.losses).mean().item()}
        row |= measure(now.recent) | {"images_per_second": round(rate, 2)}
        log(row)
        bar.set_postfix_str(f"loss {row['loss']:.3g}, kl {row['kl']:.3g}, {rate:.3g} images/s")
        now.epoch, now.losses = now.epoch + 1, []
        save(now.state_dict(), force=now.epoch == epochs or stop())
        if stop():
            raise KeyboardInterrupt
    bar.close()
    return now.student.backbone, now.teacher.backbone


def gauge_student(gauges: Callable[..., dict], student: nn.Module) -> Callable[[list], dict]:
    """A function from the last steps, as `DinoTraining.remember` keeps them, to one row of gauges.

    DINO can collapse in two ways. `entropy` is that of the teacher's mean output, from 0 (one output
    wins for every image) to log K (all are alike); `kl` is the mean divergence of one image's output
    from that mean, 0 when every image gets the same, in either way.
    """
    start = [p.detach().clone() for p in student.parameters()]

    def measure(recent: list[tuple[Tensor, Tensor, Tensor]]) -> dict:
        features, means, entropies = zip(*recent)
        entropy = torch.special.entr(torch.stack(means).mean(0)).sum().item()
        kl = max(0.0, entropy - torch.stack(entropies).mean().item())  # equals the mean of KL(p | mean p)
        row = gauges(torch.cat(features)[-256:], student, start)
        return {"entropy": entropy, "kl": kl} | {f"backbone_{key}": value for key, value in row.items()}
    return measure


def output_warning(entropy: float, kl: float, out_dim: int) -> str | None:
    """One sentence if the teacher's output is the same for every image, in either of the two ways; else None."""
    if kl >= 0.01:
        return None
    way = "one output wins for all of them" if entropy < math.log(out_dim) / 2 else "all outputs are about alike"
    return (f"the teacher now gives almost the same output for every image (kl {kl:.3f}): {way} (entropy {entropy:.2f} of "
            f"{math.log(out_dim):.2f}), so the loss does not show that anything is learned; see README, Will it collapse?")


@torch.no_grad()
def untrained_steps(now: DinoTraining, loader: Iterable[Views], autocast: AbstractContextManager,
                    temperature: float) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What the gauges need of the first 256 images, in training mode, as later rows have it: in
    evaluation mode an untrained CNN gives nearly one output for all. Leaves no trace in `now`."""
    buffers = [(b, b.clone()) for part in (now.student, now.teacher) for b in part.buffers()]
    with torch.random.fork_rng([now.device] if now.device.type == "cuda" else []), autocast:
        for teacher_views, student_views in loader:
            logits = torch.stack([now.teacher(view.to(now.device))[1] for view in teacher_views])
            features = now.student(student_views[0].to(now.device))[0]
            now.remember(logits.new_zeros(()), features, dino_targets(logits, now.centre, temperature))
            if len(now.losses) * len(features) >= 256:
                break
    for buffer, value in buffers:
        buffer.copy_(value)
    recent, now.recent, now.losses = now.recent, [], []
    return recent


# %% the command: files, seeds, devices and disk

PAPER_NETWORKS = ("resnet50.a1_in1k", "vit_base_patch16_384.augreg_in21k_ft_in1k")


def dino_options() -> argparse.ArgumentParser:
    from data import add_data_options
    from runtime import Options, add_run_options, positive

    parser = Options("dino.py", "Pretrain a network by DINO on a folder of images, without labels.")
    add = parser.add_argument
    add_data_options(parser)
    add_run_options(parser, epochs=100, batch_size=16, lr=3e-4, image_size=384)
    add("--arch", action="append", metavar="NAME", help="timm name of a network; each --arch NAME is trained "
        f"after the one before, in its own folder (default, the paper's: {' and '.join(PAPER_NETWORKS)})")
    add("--student-temperature", type=between(1e-3, 1e3), default=0.9, metavar="T",
        help="divides the student's outputs (paper: %(default)s; DINO's authors: 0.1)")
    add("--teacher-temperature", type=between(1e-3, 1e3, parts=3), default=(0.04, 0.04, 0.0),
        metavar="T|START:END:EPOCHS", help="divides the teacher's; lower is sharper; the second form rises from "
        "START to END in so many epochs (paper: 0.04; authors: that, or 0.04:0.07:30)")
    add("--momentum", type=between(0, 1, parts=2), default=(0.9, 0.9), metavar="M|START:END",
        help="share of itself the teacher keeps in a step; START:END: along a cosine (paper: 0.9; authors: 0.996:1)")
    add("--local-crops", type=between(0, 100, kind=int), default=0, metavar="N", help="give the student the "
        "teacher's two crops and N local ones (paper: 0, one local crop of each of two views; authors: 8)")
    add("--local-size", type=positive(int), metavar="PIXELS",
        help="size of those N local crops (default: --image-size; authors: 96 beside 224)")
    add("--out-dim", type=positive(int), default=65336, metavar="K",
        help="outputs of the head (paper: %(default)s; authors: 65536)")
    add("--warmup", type=between(0, 1e6), metavar="EPOCHS", help="the rate rises so long, then falls along "
        "a cosine (default, the paper's: a constant rate; authors: 10)")
    add("--weight-decay", type=between(0, 1e3), default=0.0, metavar="W",
        help="AdamW's, on matrices (paper: none; authors: 0.04 rising to 0.4)")
    add("--clip", type=positive(float), metavar="NORM", help="longest gradient (paper: no limit; authors: 3)")
    add("--probe-every", type=positive(int), metavar="N", help="every N epochs, score simple classifiers on the "
        "student's frozen features; uses labels, for looking only (default: never)")
    add("--save", choices=("teacher", "student"), default="teacher",
        help="the network kept (default: %(default)s, as DINO's authors; the package's README: student)")
    return parser


def between(low: float, high: float, kind: type = float, parts: int = 1) -> Callable[[str], Any]:
    """An argparse type: a number from `low` to `high`, or as many with colons between as there are
    `parts`, as a tuple; a start alone is the end too."""
    def parse(text: str) -> Any:
        values = [kind(x) for x in text.split(":")]
        if len(values) not in (1, parts) or not all(low <= value <= high for value in values):
            raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to {high:g}")
        return tuple(values if len(values) == parts else [*values * 2, 0.0][:parts]) if parts > 1 else values[0]
    parse.__name__ = f"number{' or START:END' if parts > 1 else ''} ({kind.__name__})"
    return parse


def run_dino(args: argparse.Namespace) -> None:
    """Train one network after the other. Nothing is written before every option has been checked."""
    from data import open_images, read_split
    from metrics import collapse_warning
    from runtime import Run, Screen, UserError, build_model, pick_device

    device, names, images, ready = pick_device(args.device), args.arch or PAPER_NETWORKS, None, []
    short = {name: name.split(".")[0] for name in names}
    if len(set(short.values())) < len(names):
        raise UserError("two --arch are equal up to the dot and would share a folder; run them one by one")
    if args.local_size and not args.local_crops:
        raise UserError("--local-size is the size of extra local crops; say how many with --local-crops")
    for name in names:
        out = args.out or Path("runs") / f"dino-{short[name]}-{args.data.resolve().name}"
        out = out / short[name] if args.out and len(names) > 1 else out
        extra = ("entropy", "kl") + ("backbone_knn", "backbone_linear") * bool(args.probe_every)
        run = Run(out, vars(args) | {"arch": name}, Screen(("backbone",), collapse_warning, extra))
        if run.finished:
            print(f"{out} is finished; there is nothing to resume")
            continue
        images = images or open_images(args)
        if args.probe_every and not images.classes:
            raise UserError(f"{args.data} has no labels, which --probe-every needs to look with")
        if len(rows := images.part("train")) < args.batch_size:
            raise UserError(f"{args.data} has {len(rows)} training images, fewer than a batch of "
                            f"{args.batch_size}; take a smaller --batch-size")
        if run.resuming and read_split(out / "split.csv", images).rows != images.rows:
            raise UserError(f"the images in {args.data} or their split have changed since {out} began")
        ready.append((run, name, build_model(name, args.init, args.image_size, outputs=0, seed=args.seed,
                                             local_size=args.local_size)))
    notes = ["labels are used for the probes, to look at; nothing is trained on them"] if args.probe_every else []
    for note in images.notes + notes if images else ():
        print(f"note: {note}")
    while ready:  # with no list to hold it, the last network's memory is free for the next
        train_backbone(*ready.pop(0), device, images, args)


def train_backbone(run: Any, name: str, model: nn.Module, device: torch.device, images: Any,
                   args: argparse.Namespace) -> None:
    """Train one network and leave its files in the folder of `run`."""
    from data import ImageCache, ImageRows, make_loader, probe_loaders, write_split
    from metrics import arm_gauges, network_features, probe_scores
    from runtime import StopSignal, pick_precision, pick_workers

    precision, workers = pick_precision(args.precision, device), pick_workers(args.workers, device)
    cache = args.cache and ImageCache(images, args.image_size, args.cache, workers)
    state = run.begin(arms={"backbone": name}, classes=images.classes, multi_label=images.multi_label)
    write_split(run.folder / "split.csv", images)
    views = DinoViews(args.image_size, args.local_crops, args.local_size)
    loader = make_loader(ImageRows(images.folder, images.part("train"), views, args.seed, cache=cache),
                         args.batch_size, seed=args.seed, drop_last=True, workers=workers)
    looks = probe_loaders(images, args.image_size, args.batch_size, workers, cache) if args.probe_every else ()

    said: set[str] = set()

    def log(row: dict) -> None:
        if looks and (row["epoch"] % args.probe_every == 0 or row["epoch"] == args.epochs):
            scores = probe_scores(*network_features(model, *looks), images.multi_label)  # the student's
            row |= {f"backbone_{key}": value for key, value in scores.items()}
        run.log(row)
        sentence = output_warning(row["entropy"], row["kl"], args.out_dim) if row["epoch"] and not said else None
        if sentence:  # once
            said.add(sentence)
            tqdm.write(f"warning: {sentence}")

    torch.manual_seed(args.seed)
    with StopSignal(run) as stop:
        student, teacher = pretrain_dino(
            model.to(device), loader, epochs=args.epochs, lr=args.lr, out_dim=args.out_dim,
            student_temperature=args.student_temperature, teacher_temperature=args.teacher_temperature,
            momentum=args.momentum, warmup=args.warmup, weight_decay=args.weight_decay, clip=args.clip,
            precision=precision, log=log, save=run.save, gauges=arm_gauges, stop=stop, resume=state)
    print(run.save_network("backbone.pt", teacher if args.save == "teacher" else student, name))
    run.finish()


def main(argv: list[str] | None = None) -> None:
    from data import DataError
    from runtime import clear_exit

    args = dino_options().parse_args(argv)
    with clear_exit(DataError, FloatingPointError):
        run_dino(args)


if __name__ == "__main__" and "__file__" in globals():
    main()
