"""What every training loop needs and no method cares about.

Options, device and precision; timm models and their weights; the folder a run leaves behind; one
clear exit for errors that a user can mend. Nothing here knows a loss, or how an image is read.
"""

import argparse
import difflib
import json
import multiprocessing
import os
import re
import shlex
import signal
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import numpy as np
import timm
import torch
import torchvision
from torch import Tensor, nn
from tqdm import tqdm

# %% errors a user can mend


class UserError(Exception):
    """Something the user can put right; its text is one sentence that says what and how."""


SMALLER = "memory ran out; add --checkpointing, or lower --batch-size or --image-size"
FEWER = "a loader process was killed, perhaps for memory; take fewer --workers"
MENDABLE = {  # a part of what PyTorch says -> what a user can do
    "shared memory": "/dev/shm has no room for the loader's batches; take --workers 0, or enlarge "
                     "it (docker run --shm-size=8g)",
    "out of memory": SMALLER, "can't allocate memory": SMALLER, "MemoryError": SMALLER,
    "bad_alloc": SMALLER, "exited unexpectedly": FEWER, "killed by signal": FEWER}


@contextmanager
def clear_exit(*errors: type[Exception], resumable: bool = False) -> Iterator[None]:
    """Inside it, a `UserError`, a file that can't be used, or one of `errors` ends in one sentence
    on stderr and exit code 2; Ctrl-C and SIGTERM in exit code 130 and a line on how to go on."""
    if threading.current_thread() is threading.main_thread():  # Python allows it only there
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    if hasattr(sys.stdout, "reconfigure"):  # not all names can be shown, as in a Windows console
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except (KeyboardInterrupt, UserError, OSError, RuntimeError, MemoryError, *errors) as error:
        _end_workers()
        if isinstance(error, KeyboardInterrupt) or "by signal: Terminated" in str(error):
            again = command_line().replace(" --resume", "") + " --resume"
            print(f"\nstopped; go on with\n  {again}" if resumable else "\nstopped",
                  file=sys.stderr)
            raise SystemExit(130) from None
        # An error from a loader's worker arrives with that worker's traceback in front of it.
        sentence = re.sub(r"^[\w.]*Error: ", "", str(error).strip().split("\n")[-1])
        if isinstance(error, (RuntimeError, MemoryError)):
            sentence = next((MENDABLE[part] for part in MENDABLE if part in repr(error)), None)
        if sentence is None:
            raise
        # What moves the cursor or changes colours is shown as \\x1b and the like.
        sentence = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in sentence)
        print(f"error: {sentence}", file=sys.stderr)
        raise SystemExit(2) from None


def _end_workers() -> None:
    """End the loader's processes, which torch would report as killed once the program ends."""
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD"):
        before = signal.signal(signal.SIGCHLD, lambda *_: None)
        for worker in multiprocessing.active_children():
            worker.kill()
            worker.join()
        signal.signal(signal.SIGCHLD, before)


# %% options, device, precision


def command_line() -> str:
    """The command that is running, as it can be typed again."""
    file = Path(sys.argv[0])
    script = ["-m", f"extras.{file.stem}"] if file.parent.name == "extras" else [file.name]
    return shlex.join(["python", *script, *sys.argv[1:]])


def command_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser that says in one sentence what is wrong, and where to read more."""
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"error: {message}; see --help\n")
    parser.register("type", Path, user_path)
    return parser


def add_run_options(parser: argparse.ArgumentParser, *, epochs: int, lr: float | str) -> None:
    """Add the options that mean the same in every command; the defaults are the paper's."""
    add = parser.add_argument
    add("--out", type=Path, help="run folder (default: runs/<method>-<data set>)")
    add("--epochs", type=positive(int), default=epochs, help=f"passes over the data ({epochs})")
    add("--batch-size", type=positive(int), default=16, help="images a step (%(default)s)")
    add("--lr", type=positive(float), default=lr, help=f"highest learning rate ({lr})")
    add("--image-size", type=positive(int), default=384,
        help="images are resized to this square, in pixels (paper: 384)")
    add("--init", default="imagenet", metavar="imagenet|random|FOLDER",
        help="start weights: through timm (the paper's: %(default)s), random, or a folder of files "
             "named like the model; cass.py takes two for its two arms, joined by a comma")
    add("--seed", type=whole_number, default=0,
        help="drives weights, order and augmentation (0)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (%(default)s)")
    add("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"),
        help="auto: bf16 where the processor multiplies in it, else fp16 on a GPU, fp32 on a CPU")
    add("--checkpointing", action="store_true", help="keep fewer activations and compute them "
        "again in the backward pass: less memory, about a third slower, the same steps")
    add("--workers", type=whole_number, help="loader processes; any number gives the same "
        "bits (beside a CPU 1, where more would fight with training, or 0 on two cores; beside a "
        "GPU up to 8)")
    add("--cache", type=Path, metavar="DIR", help="keep resized images there, each in "
        "3 bytes a pixel; results are the same to the bit")
    add("--resume", action="store_true", help="go on from the last checkpoint of this run")


def user_path(text: str) -> Path:
    """What `type=Path` means to a parser; a shell leaves the ~ of --out=~/x as it is."""
    if not text:
        raise argparse.ArgumentTypeError("a path is empty; write . for the folder you are in")
    return Path(os.path.expanduser(text))


def whole_number(text: str) -> int:
    """An argparse type: from 0 to what torch and numpy both take as a seed."""
    if not text.isdecimal() or not int(text[:20]) < 2 ** 32:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 2^32 - 1")
    return int(text)


def positive(kind: type, most: float = sys.float_info.max) -> Callable[[str], Any]:
    """An argparse type: a number of `kind` above zero, and not above `most`."""
    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 < value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not a number above 0 and up to {most:g}")
        return value
    parse.__name__ = f"number above 0 ({kind.__name__})"  # argparse puts it into its own message
    return parse


def pick_device(name: str) -> torch.device:
    """The device called `name`; `auto` is the first GPU there is, else the CPU."""
    if name == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} can't be used on this machine; try --device cpu "
                        f"({str(error).splitlines()[0]})") from None
    repeat = torch.are_deterministic_algorithms_enabled()  # the fastest may change from run to run
    torch.backends.cudnn.benchmark = name.startswith("cuda") and not repeat
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # a checkpoint holds the random state of this one
    return device


def pick_hardware(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """The device and precision that the options ask for; also sets `args.workers`."""
    device = pick_device(args.device)
    args.workers = pick_workers(args.workers, device)
    precision = pick_precision(args.precision, device)
    pick_attention(device, precision)
    return device, precision


def pick_workers(workers: int | None, device: torch.device) -> int:
    """The number of loader processes: `workers`, or what suits the device if that is None."""
    if workers is None:  # on two cores loading in turn with training is no slower than beside it
        cores = os.cpu_count() or 1
        return min(8, max(1, cores - 1)) if device.type == "cuda" else int(cores > 2)
    return workers


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype to autocast to; float32 means no autocast."""
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if device.type == "cuda":  # emulated bf16 counts as supported unless asked otherwise
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native and device.type == "cpu" else torch.float32


def pick_attention(device: torch.device, precision: torch.dtype) -> None:
    """Let models that timm builds from here on compute attention the faster way: in one fused
    step, but for bf16 on a CPU, where its backward pass takes longer than plain products do."""
    timm.layers.set_fused_attn(device.type != "cpu" or precision != torch.bfloat16)


# %% models and their weights


def build_model(name: str, init: str, image_size: int, *, outputs: int | None = None,
                seed: int = 0, dynamic: bool = False, checkpointing: bool = False,
                weights: dict[str, Tensor] | None = None) -> nn.Module:
    """A timm model that takes `(N, 3, image_size, image_size)` and gives `(N, outputs)` logits.

    `init` is `imagenet`, `random` or a folder of weight files, or says where `weights` are from;
    `outputs=None` keeps the classifier. Position embeddings are fitted to `image_size`, with
    `dynamic` to every batch's.
    `checkpointing` keeps a block's input alone and runs the block again in the backward pass; batch
    norms then see each batch twice, which moves their averages, not what is trained.
    The model carries `.arch`, `.image_size`, `.fixed_size` (was it built for that size alone) and
    `.origin`, a line on where its weights are from. Raises `UserError`.
    """
    known = {*timm.list_models(), *timm.list_pretrained()}  # without a tag, and with
    if name not in known:
        near = difflib.get_close_matches(name, sorted(known), 4, 0.5)
        raise UserError(f"timm {timm.__version__} knows no model {name!r}"
                        + f"; the nearest names are {', '.join(near)}" * bool(near))
    create = partial(_create, name, image_size, seed, dynamic, checkpointing)
    if weights is not None:
        return _with_weights(create, outputs, weights, init)
    if init == "random":
        return create(outputs)
    if init == "imagenet":
        return _with_weights(create, outputs, None, f"timm's ImageNet weights of {name}")
    folder = Path(init).expanduser()
    if not init or not folder.is_dir():
        raise UserError(f"--init {init} is no folder; the other starts are imagenet and random")
    for stem in (name, name.split(".")[0]):
        for ending in (".safetensors", ".pt", ".pth", ".bin"):
            if (file := folder / f"{stem}{ending}").is_file():
                return _with_weights(create, outputs, read_weights(file), file)
    raise UserError(f"--init {init} holds no weights for {name}: put {name}.safetensors there")


def load_network(file: Path, image_size: int, **options: Any) -> nn.Module:
    """The network in `file`, for images of `image_size`; `options` are those of `build_model`."""
    saved = read_network(file)
    weights = saved["state_dict"]
    return build_model(saved["arch"], str(file), image_size, weights=weights, **options)


def _create(name: str, image_size: int, seed: int, dynamic: bool, checkpointing: bool,
            outputs: int | None, **options: Any) -> nn.Module:
    """`timm.create_model` for images of one size, seeded. Raises `UserError` for a wrong size."""
    if outputs is not None:
        options["num_classes"] = outputs
    sizes = {"img_size": image_size, "dynamic_img_size": True}, {"img_size": image_size}, {}
    for size in sizes if dynamic else sizes[1:]:  # CNNs raise on them
        torch.manual_seed(seed)  # the same start weights, whichever attempt builds them
        try:
            model = timm.create_model(name, **size, **options)
            break
        except TypeError as error:
            if "img_size" not in str(error):
                raise
        except AssertionError as error:
            raise UserError(f"{name} can't be built for {image_size} pixels: {error}") from None
    model.to(memory_format=torch.channels_last)  # convolutions are faster so, on CPU and GPU
    model.arch, model.image_size, model.fixed_size = name, image_size, bool(size)
    model.origin = f"{name} starts from random weights"
    check_size(model, image_size)
    if checkpointing:
        try:
            model.set_grad_checkpointing()
        except (AssertionError, AttributeError):
            raise UserError(f"timm has no --checkpointing for {name}") from None
    return model


def check_size(model: nn.Module, image_size: int) -> None:
    """Refuse a size the model can't take: some timm models silently drop what no patch covers."""
    conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    patch = conv.stride[0] if conv is not None and conv.stride == conv.kernel_size else 1
    if image_size % patch:
        raise UserError(f"--image-size {image_size} is no multiple of {model.arch}'s patch of "
                        f"{patch} pixels; {max(1, image_size // patch) * patch} is")
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.eval()(torch.zeros(1, 3, image_size, image_size))
        model.train()
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        raise UserError(f"{model.arch} can't take --image-size {image_size}: "
                        f"{' '.join(str(error).split())[:200]}") from None


def _with_weights(create: Callable[..., nn.Module], outputs: int | None,
                  weights: dict[str, Tensor] | None, origin: Any) -> nn.Module:
    """A model with all `weights` (None: timm's own); with `outputs`, under a new classifier of so
    many classes. Raises `UserError` if a tensor is missing or does not fit."""
    model = create(outputs)
    heads = model.pretrained_cfg.get("classifier") or ()  # two in distilled models
    heads = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    classes, overlay = None, None
    if weights is None:
        reach_hub()
    else:
        weights = without_prefix(weights, list(model.state_dict()))
        classes = next((len(x) for key, x in weights.items() if key.startswith(heads)), 0)
        overlay = {"state_dict": weights, "num_classes": classes, "label_offset": 0}
    try:  # with as many classes as the weights have, timm insists on every tensor
        source = create(classes, pretrained=True, pretrained_cfg_overlay=overlay)
    except OSError:
        raise UserError(f"{origin} are not on this machine and the model hub can't be reached; "
                        "take --init random, or carry files here for --init FOLDER") from None
    except (RuntimeError, KeyError, AttributeError, ValueError) as error:
        words = " ".join(str(error).split())
        missing = re.search(r'Missing key\(s\) in state_dict: "(.+?)"', words)
        words = f"{missing[1]} is missing there" if missing else words[:200]
        raise UserError(f"{origin} can't be loaded as {model.arch}: {words}") from None
    found, own = source.state_dict(), {}
    bad = [key for key, x in found.items() if not torch.isfinite(x).all()]
    if bad:
        raise UserError(f"{origin} can't be trained from: {bad[0]} holds nan or infinity")
    if outputs is None:
        model = source
    else:
        own = {key: x for key, x in model.state_dict().items() if key.startswith(heads)}
        found = {key: x for key, x in found.items() if not key.startswith(heads)}
        model.load_state_dict(found | own)
    model.origin = f"{len(found)} of {len(found | own)} tensors from {origin}"
    model.origin += "; the classifier is new" * bool(own)
    return model


def reach_hub() -> None:
    """Ask the model hub once, briefly, where timm would retry for a minute; if it is silent, timm
    looks only at what was downloaded before."""
    from huggingface_hub import constants  # comes with timm
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=5).close()
    except urllib.error.HTTPError:
        pass  # it answers; what it refuses, timm will report
    except OSError:
        constants.HF_HUB_OFFLINE = True


def read_tensors(file: Path, **options: Any) -> Any:
    """`torch.load` of tensors and plain values, which runs no code; and, what it leaves out, with
    the checksums of the file compared. Raises many kinds of errors for a file that is none."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            packed = sum(entry.file_size for entry in archive.infolist()) > file.stat().st_size
            if packed or archive.testzip():  # torch packs nothing: it may be a bomb
                raise ValueError(f"{file} is damaged")
    return torch.load(file, map_location="cpu", weights_only=True, **options)


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors in a file of weights, out of their usual wrappers. Runs no code in it."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file  # comes with timm
            state = load_file(file)
        else:
            state = read_tensors(file)
    except Exception as error:  # torch raises many kinds for a file that is something else
        raise UserError(f"{file} can't be read as weights ({type(error).__name__}): it is damaged, "
                        "a Git LFS pointer, or holds code; save a state_dict() there") from None
    for wrapper in ("teacher", "student", "model_ema", "model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not any(isinstance(x, Tensor) for x in state.values()):
        raise UserError(f"{file} holds no tensors; save the network's state_dict() there")
    return {str(key): x for key, x in state.items() if isinstance(x, Tensor)}


def without_prefix(weights: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """The weights without what stands before all `names` of a model's tensors, such as `module.`
    or `encoder.`, and only those that begin so."""
    prefixes = [key.removesuffix(name) for name in names[:1] for key in weights
                if f".{key}".endswith(f".{name}")]
    prefix = max(["", *prefixes], key=lambda start: sum(start + name in weights for name in names))
    return {key.removeprefix(prefix): x for key, x in weights.items() if key.startswith(prefix)}


def read_network(file: Path) -> dict:
    """What `Run.save_network` wrote: "arch", "num_classes", "state_dict" and so on."""
    try:
        saved = read_tensors(file, mmap=True)
        assert {"arch", "num_classes", "image_size", "fixed_size", "classes", "multi_label",
                "state_dict"} <= set(saved)
        return {"window": None} | saved
    except Exception:  # torch raises many kinds for a file that is something else
        raise UserError(f"{file} is not there, or no network written by cass.py, dino.py or "
                        "finetune.py; --weights names a run folder or one file of it") from None


def network_files(weights: Path) -> list[Path]:
    """The files of networks in a run folder, or the one file that `weights` is."""
    if not weights.is_dir():
        return [weights]
    found = sorted(path for path in weights.glob("*.pt") if "checkpoint" not in path.name)
    if not found:
        raise UserError(f"{weights} holds no network; a finished run does")
    return found


# %% what a run leaves behind


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """`with aside(path) as file:` writes `file`, which takes the place of `path` once it is whole:
    a kill or a full disk leaves the old one or the new one, and no part of either."""
    file = path.with_name(path.name + ".tmp")
    try:
        yield file
        with open(file, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(file, path)
    except RuntimeError as error:
        if "worker" in str(error):  # of the loader, which was killed meanwhile
            raise
        raise OSError(f"{path} can't be written: the disk is full, or its folder is gone or "
                      "read-only") from None  # torch's zip writer speaks of its own workings
    finally:
        file.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text file, whole or not at all."""
    with aside(path) as file:
        file.write_text(text, encoding="utf-8")


def read_config(folder: Path) -> dict:
    """What a run has written into its `config.json`. Raises `UserError`."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        options = dict(config["options"])
        if not isinstance(options.get("epochs", 0), int):
            raise TypeError
        return config | {"options": options}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{folder / 'config.json'} is damaged; choose another folder, or remove "
                        "that one") from None


class Run:
    """The folder of one run: `config.json`, `log.jsonl`, checkpoints and networks.

    `options` must be the same on `--resume`, but for those in `FREE` and for more `--epochs`, by
    which a finished run trains on. `columns` of the log's rows are shown on screen, "arm_gauge"
    with the arm above the gauge. Raises `UserError` if the folder holds another run.
    """

    FREE = ("data", "out", "resume", "workers", "device", "cache")
    WIDTHS = {"seed": 5, "epoch": 6, "loss": 10, "seconds": 9}  # of columns; others have 12

    def __init__(self, folder: Path, options: dict, columns: tuple[str, ...] = ()) -> None:
        self.folder, self.columns, self.rows = folder, (*columns, "seconds"), []
        self.cost, self.saved_at = 0.0, time.perf_counter()  # of the last checkpoint
        options = json.loads(json.dumps(options, default=str))
        self.fixed = {name: value for name, value in options.items()
                      if name not in (*self.FREE, "epochs")}
        versions = {m.__name__: str(m.__version__) for m in (torch, torchvision, timm, np)}
        self.config = {"options": options, "command": command_line(), "finished": False,
                       "versions": {"python": sys.version.split()[0], **versions}}
        begun, old = any(folder.glob("checkpoint*.pt")), {"options": {}}
        if (folder / "config.json").is_file():
            old = read_config(folder)
        elif begun:
            raise UserError(f"{folder} holds a checkpoint but no config.json; choose another "
                            "--out, or move it away")
        made, self.lock = old["options"], None
        grows = (folder / "checkpoint.pt").is_file() and options["epochs"] > made.get("epochs", 0)
        self.resuming = options["resume"] and begun
        self.finished = bool(old.get("finished")) and not (self.resuming and grows)
        if (self.finished or begun) and not options["resume"]:
            kind = "a finished run" if self.finished else "an unfinished run: --resume it"
            raise UserError(f"{folder} holds {kind}; choose another --out, or remove that folder")
        if self.resuming and made.keys() != options.keys():
            raise UserError(f"{folder} is of another version, with other options; choose another "
                            "--out, or remove that folder")
        for name, value in options.items():
            before = made.get(name, value)
            free = name in self.FREE or name == "epochs" and grows
            if value != before and not free and (self.resuming or self.finished):
                was, now = ("its default" if x is None else x for x in (before, value))
                raise UserError(f"{folder} was made with --{name.replace('_', '-')} {was}, not "
                                f"{now}; resume with the options it had")
        if options["resume"] and not (begun or self.finished):
            print(f"{folder} holds no checkpoint: starting at the beginning")

    def begin(self, **facts: Any) -> None:
        """Make the folder and `config.json`, with `facts`. Before this, nothing is written."""
        self.config |= facts
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock()
            write_text(self.folder / "config.json", json.dumps(self.config, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--out {self.folder} can't be written: {error.strerror}") from None
        self.saved_at = self.logged_at = time.perf_counter()

    def _lock(self) -> None:
        """Keep other runs out of the folder until this process ends, in whatever way. A lock of
        this kind is not handed on to the loader's workers, which may outlive a killed run."""
        if fcntl and not self.lock:
            self.lock = open(self.folder / ".lock", "w")
            try:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise UserError(f"another run is writing into {self.folder} now; choose another "
                                "--out, or wait for its end") from None
            except OSError:  # disks of networks may know no locks
                pass

    def restore(self, parts: list, name: str = "checkpoint") -> list[float]:
        """Bring all `parts` and the random streams back to where the last checkpoint left them;
        returns its history, one loss for each epoch done, or [] without a checkpoint."""
        files = [self.folder / f"{name}{which}.pt" for which in ("", "-prev")]
        files = [file for file in files if self.resuming and file.is_file()]
        for file in files:
            try:
                state = read_tensors(file)
                history, rows = state["history"], state["rows"][len(self.rows):]
                assert state.get("options", self.fixed) == self.fixed
                for part, value in zip(parts, state["parts"], strict=True):
                    if value:  # a scaler is empty where another precision needs none
                        part.load_state_dict(value)
                torch.set_rng_state(state["random"][0])
                if len(state["random"]) > 1 and torch.cuda.is_available():
                    torch.cuda.set_rng_state(state["random"][1])
            except torch.OutOfMemoryError:
                raise
            except Exception:  # torch raises many kinds for a damaged file
                print(f"{file} is damaged or of another run; looking for the one before it",
                      file=sys.stderr)
                continue
            for row in rows:
                self._show(row)
            return history
        if files:
            raise UserError(f"no checkpoint in {self.folder} can be read; remove that folder")
        return []

    def save(self, parts: list, history: list[float], name: str = "checkpoint") -> None:
        """Keep all that `restore` needs, unless the last save cost over 5 % of the time since: a
        paper-size checkpoint is 1.8 GB, an epoch of a small set may take a second."""
        begun, last = time.perf_counter(), len(history) == self.config["options"]["epochs"]
        if self.cost > 0.05 * (begun - self.saved_at) and not last:
            return
        random = [torch.get_rng_state()]
        if torch.cuda.is_initialized():  # of the GPU in use; asking others would take memory there
            random.append(torch.cuda.get_rng_state())
        newest, state = self.folder / f"{name}.pt", [part.state_dict() for part in parts]
        tensors = [x for part, values in zip(parts, state) if isinstance(part, nn.Module)
                   for x in values.values()]
        if not all(x.isfinite().all() for x in tensors):
            raise UserError(f"weights became nan or infinite in epoch {len(history)}; start anew "
                            "with a lower --lr or --precision fp32")
        with aside(newest) as file:
            torch.save({"history": history, "rows": self.rows, "parts": state,
                        "random": random, "options": self.fixed}, file)
            if newest.exists():
                os.replace(newest, self.folder / f"{name}-prev.pt")
        self.saved_at = time.perf_counter()
        self.cost = self.saved_at - begun

    def log(self, row: dict) -> None:
        """Add one epoch's row to `log.jsonl`, with the seconds since the last, and show it."""
        now = time.perf_counter()
        self._show(row | {"seconds": round(now - self.logged_at, 2)})
        self.logged_at = now
        write_text(self.folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))

    def _show(self, row: dict) -> None:
        widths = [self.WIDTHS.get(column, 12) for column in self.columns]
        lines = [[_cell(row.get(column)) for column in self.columns]]
        if not self.rows:
            names = [column.rpartition("_") for column in self.columns]
            lines = [[arm for arm, _, _ in names], [gauge for _, _, gauge in names], *lines]
        for cells in lines:
            tqdm.write("".join(f" {cell:>{width - 1}}" for cell, width in zip(cells, widths)))
        self.rows.append(row)

    def save_network(self, file: str, network: nn.Module) -> str:
        """Write a network to `file`; returns the Python that loads it with timm."""
        path, outputs, size = self.folder / file, network.num_classes, network.image_size
        weights = {key: x.cpu() for key, x in network.state_dict().items()}
        saved = {"arch": network.arch, "num_classes": outputs, "image_size": size,
                 "fixed_size": network.fixed_size, "state_dict": weights}
        for fact in ("classes", "multi_label", "window"):
            saved[fact] = self.config.get(fact)
        with aside(path) as temporary:
            torch.save(saved, temporary)
        fixed = f", img_size={size}" if network.fixed_size else ""
        return (f'timm.create_model("{network.arch}", num_classes={outputs}{fixed}, '
                f'checkpoint_path="{path}")')

    def finish(self, **facts: Any) -> None:
        """Mark the run as finished; of its checkpoints the last one stays."""
        for path in self.folder.glob("checkpoint*-prev.pt"):
            path.unlink()  # first: a kill in between leaves a run to be resumed
        self.begin(finished=True, **facts)
        (self.folder / ".lock").unlink(missing_ok=True)


SMALL_RUN = ("smaller networks (--cnn resnet18 --transformer vit_tiny_patch16_224; dino.py: "
             "--arch resnet18), a smaller --image-size (96) or fewer --epochs take less")


def about(hours: float) -> str:
    """A length of time, for people."""
    if hours > 36:
        return f"{hours / 24:.0f} days"
    return f"{hours:.0f} hours" if hours > 1.5 else f"{max(1, 60 * hours):.0f} min"


def watch(run: Run, gauges: Any, look: Callable[[int, dict], dict], hint: str,
          images: int) -> Callable:
    """A `log` for pretraining on so many `images`: it adds what `look` sees to a row, keeps and
    shows it, and says what its numbers alone do not. `gauges` is a `metrics.Gauges`; `hint` ends
    its warnings."""
    device = next(next(iter(gauges.networks.values())).parameters()).device.type
    timed = 0 if device == "cpu" else 1  # the first steps on a GPU tell nothing of the others
    if run.config["options"].get("cache"):  # nor do epochs in which images are still decoded
        timed = 2

    def log(row: dict) -> None:
        run.log(row | look(row["epoch"], gauges.networks))
        if row["epoch"] == timed:
            epochs, hours = run.config["options"]["epochs"], run.rows[-1]["seconds"] / 3600
            if not timed:  # 256 images went through; training takes three times as long
                hours *= 3 * max(1, images / 256)
            words = f"{epochs} epoch{'s' * (epochs > 1)} will take about {about(epochs * hours)}"
            longer = f" here; {SMALL_RUN}" * (epochs * hours > 1.5)
            tqdm.write(textwrap.fill(words + longer, 100))
        if not row["epoch"]:
            return
        for sentence in gauges.warnings(row, run.rows[0]):
            tqdm.write(textwrap.fill(f"warning: {sentence}; {hint}", 100))
        for name in gauges.networks:
            if row[f"{name}_moved"] == 0:
                raise UserError(f"the weights of {name} have not moved in epoch {row['epoch']}: "
                                "nothing is being trained; look at --lr")
    return log


def _cell(value: Any) -> str:
    return f"{value:#.4g}" if isinstance(value, float) else "-" if value is None else str(value)
