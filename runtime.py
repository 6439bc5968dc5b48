"""What every training loop needs and no method cares about.

Seed, device and precision; building a timm model; the folder a run leaves behind (config, log,
checkpoint, weights); stopping on a signal; one clear exit for user errors. Nothing here knows a
loss, an image or a label.
"""

import argparse
import difflib
import json
import os
import re
import shlex
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
import timm
import torch
import torchvision
from torch import nn
from tqdm import tqdm

# %% errors a user can mend


class UserError(Exception):
    """Something the user can put right; its text is one sentence that says what and how."""


@contextmanager
def clear_exit(*errors: type[Exception]) -> Iterator[None]:
    """Turn a `UserError`, a file that can't be used, or one of `errors`, into one sentence on stderr and exit code 2."""
    try:
        yield
    except (UserError, OSError, *errors) as error:
        # An error from a loader's worker arrives with that worker's traceback in front of it.
        sentence = re.sub(r"^[\w.]*Error: ", "", str(error).strip().splitlines()[-1])
        print(f"error: {sentence}", file=sys.stderr)
        raise SystemExit(2) from None


# %% options, seed, device, precision


class Options(argparse.ArgumentParser):
    """An argument parser that says in one sentence what is wrong, and where to read more."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> None:
        print(f"error: {message}; see --help", file=sys.stderr)
        raise SystemExit(2)


def add_run_options(parser: argparse.ArgumentParser, *, epochs: int, batch_size: int, lr: float | None,
                    image_size: int | None) -> None:
    """Add the options that mean the same in every command; the defaults are the paper's."""
    add = parser.add_argument
    add("--out", type=Path, help="run folder (default: runs/<method>-<data set>)")
    add("--epochs", type=positive(int), default=epochs, help="passes over the data (paper: %(default)s)")
    add("--batch-size", type=positive(int), default=batch_size, help="images a step (paper: %(default)s)")
    add("--lr", type=positive(float), default=lr,
        help="highest learning rate (default: " + (f"{lr:g})" if lr else "1e-3, the paper's; 3e-4 with --loss contrast)"))
    add("--image-size", type=positive(int), default=image_size,
        help="images are resized to this square, in pixels (default: "
             + (f"{image_size}, the paper's)" if image_size else "as in pretraining, else the paper's 384)"))
    add("--init", default="imagenet", metavar="imagenet|random|FOLDER",
        help="start weights: ImageNet through timm (paper), random, or a folder of weight files "
             "named like the model, for machines without internet; cass.py takes two joined by a comma for its "
             "two arms (default: %(default)s)")
    add("--seed", type=int, default=0, help="drives weights, order and augmentation (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    add("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"),
        help="auto is bf16 or fp16 on a GPU and fp32 on the CPU (default: %(default)s)")
    add("--workers", type=int, help="loader processes; any number gives the same bits (default: 1 on the "
        "CPU, where more would fight with the training threads, and up to 8 beside a GPU)")
    add("--cache", type=Path, metavar="DIR", help="keep the resized images there, one file of 3 bytes a "
        "pixel, and read them from it from then on; the results are the same to the bit")
    add("--resume", action="store_true", help="go on from the last checkpoint of this run")
    add("--overwrite", action="store_true", help="start anew in a folder that already holds a run")


def positive(kind: type) -> Any:
    """An argparse type: a number of `kind` above zero."""
    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
        return value
    parse.__name__ = f"number above 0 ({kind.__name__})"  # argparse puts it into its own message
    return parse


def pick_device(name: str) -> torch.device:
    """The device called `name`; `auto` is the first GPU there is, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} can't be used on this machine; try --device cpu "
                        f"({str(error).splitlines()[0]})") from None
    torch.backends.cudnn.benchmark = device.type == "cuda"  # every batch has the same size
    return device


def pick_workers(workers: int | None, device: torch.device) -> int:
    """The number of loader processes: `workers`, or what suits the device if that is None."""
    if workers is not None and workers < 0:
        raise UserError(f"--workers {workers} is below 0")
    if workers is None:
        workers = min(8, max(1, (os.cpu_count() or 1) - 1)) if device.type == "cuda" else 1
    return workers


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype to autocast to; float32 means no autocast. `auto` on the CPU is float32."""
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        # Emulated bf16 counts as supported unless asked otherwise, and is slow.
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


# %% models


def build_model(name: str, init: str, image_size: int, *, outputs: int | None = None,
                local_size: int | None = None, seed: int = 0) -> nn.Module:
    """A timm model that takes `(N, 3, image_size, image_size)` and gives `(N, outputs)` logits.

    `init` is `imagenet`, `random` or a folder of weight files; `outputs=None` keeps the model's
    own number. Position embeddings are fitted to `image_size`; with `local_size` it must take images
    of that size too. The model carries `.image_size` and
    `.fixed_size`, whether it was built for that size alone. Raises `UserError`.
    """
    known = set(timm.list_models()) | set(timm.list_models(pretrained=True))
    if name not in known:
        near = difflib.get_close_matches(name, sorted(known), 4, 0.5)
        raise UserError(f"timm {timm.__version__} knows no model {name!r}"
                        + (f"; the nearest names are {', '.join(near)}" if near else ""))
    file = None if init == "random" else _weight_file(name, init)
    options: dict[str, Any] = {} if outputs is None else {"num_classes": outputs}
    if file is not None:
        options |= {"pretrained": True, "pretrained_cfg_overlay": {"file": str(file)} if file else {}}
    model = None
    any_size = [{"img_size": image_size, "dynamic_img_size": True}] if local_size else []
    for size in (*any_size, {"img_size": image_size}, {}):  # Transformers take img_size, CNNs raise on it
        torch.manual_seed(seed)  # the same start weights, whichever attempt builds them
        try:
            model = timm.create_model(name, **size, **options)
            break
        except TypeError as error:
            if "img_size" not in str(error):
                raise
        except (RuntimeError, AssertionError, ValueError, OSError, KeyError) as error:
            where = f" from {file or 'the model hub'}" if file is not None else ""
            raise UserError(f"{name} can't be built{where} for {image_size} pixels: "
                            f"{' '.join(str(error).split())[:300]}") from None
    model.image_size, model.fixed_size = image_size, bool(size)
    _check_size(model, name, image_size, "--image-size")
    if local_size:
        _check_size(model, name, local_size, "--local-size")
    return model


def _check_size(model: nn.Module, name: str, image_size: int, option: str) -> None:
    """Refuse a size the model can't take: some timm models silently drop what no patch covers."""
    conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    patch = conv.stride[0] if conv is not None and conv.stride == conv.kernel_size else 1
    if image_size % patch:
        fits = max(1, image_size // patch) * patch
        raise UserError(f"{option} {image_size} is no multiple of {name}'s patch of {patch} "
                        f"pixels; {fits} is")
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.eval()(torch.zeros(1, 3, image_size, image_size))
        model.train()
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        raise UserError(f"{name} can't take {option} {image_size}: "
                        f"{' '.join(str(error).split())[:200]}") from None


def _weight_file(name: str, init: str) -> Path | str:
    """The file with the start weights of `name`, or "" to let timm download them."""
    starts = "--init random, or --init FOLDER with weight files carried to this machine"
    if init != "imagenet":
        folder = Path(init)
        if not folder.is_dir():
            raise UserError(f"--init {init} is no folder; the other starts are imagenet and random")
        stems = dict.fromkeys((name, name.split(".")[0]))
        files = [f"{stem}{ending}" for stem in stems
                 for ending in (".safetensors", ".pt", ".pth", ".bin", "/model.safetensors")]
        for file in files:
            if (folder / file).is_file():
                return folder / file
        raise UserError(f"--init {init} holds no weights for {name}: put {files[0]} there")
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        raise UserError(f"timm has no ImageNet weights for {name}; the other starts are {starts}")
    if not cfg.hf_hub_id:
        return ""
    from huggingface_hub import hf_hub_url, try_to_load_from_cache  # comes with timm
    file = cfg.hf_hub_filename or "model.safetensors"
    cached = try_to_load_from_cache(cfg.hf_hub_id, file)
    if isinstance(cached, str):
        return Path(cached)
    try:  # ask once, briefly: timm would retry for a minute
        request = urllib.request.Request(hf_hub_url(cfg.hf_hub_id, file), method="HEAD")
        urllib.request.urlopen(request, timeout=10).close()
    except urllib.error.HTTPError:
        pass  # the hub answers; what it refuses, timm will report
    except OSError:
        raise UserError(f"the ImageNet weights of {name} are not on this machine and the model hub "
                        f"can't be reached; the other starts are {starts}") from None
    return ""


def read_network(file: Path) -> dict:
    """What `Run.save_network` wrote: "arch", "num_classes", "image_size", "state_dict", and so on."""
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        assert {"arch", "num_classes", "image_size", "fixed_size", "classes", "state_dict"} <= set(saved)
    except FileNotFoundError:
        raise UserError(f"{file} is not there; --weights names a run folder or a file of weights") from None
    except Exception:  # torch raises many kinds for a file that is something else
        raise UserError(f"{file} is no network written by cass.py, dino.py or finetune.py") from None
    return saved


def load_network(file: Path, image_size: int, outputs: int | None = None, seed: int = 0) -> nn.Module:
    """The network in `file`, for images of `image_size`; with `outputs`, under a new random head of
    that many classes. Every other weight must be there and fit. Raises `UserError`."""
    saved = read_network(file)
    size = saved["image_size"] if saved["fixed_size"] else image_size
    model = build_model(saved["arch"], "random", size, seed=seed,
                        outputs=saved["num_classes"] if outputs is None else outputs)
    heads = model.pretrained_cfg["classifier"] or ()
    heads = tuple(f"{h}." for h in ([heads] if isinstance(heads, str) else heads))
    own = {} if outputs is None else {k: v for k, v in model.state_dict().items() if k.startswith(heads)}
    body = {k: v for k, v in saved["state_dict"].items() if outputs is None or not k.startswith(heads)}
    try:
        model.load_state_dict(body | own)
        if size != image_size:
            model.set_input_size(img_size=image_size)
            model.image_size = image_size
            _check_size(model, saved["arch"], image_size, "--image-size")
    except (RuntimeError, AttributeError) as error:
        raise UserError(f"{file} can't be loaded as {saved['arch']} for {image_size} pixels: "
                        f"{' '.join(str(error).split())[:200]}") from None
    return model


# %% what a run leaves behind


def write_text(path: Path, text: str) -> None:
    """Write a small file aside and rename it, so that a kill leaves the old one or the new one."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def save_tensors(value: dict, path: Path) -> None:
    """`torch.save` aside, flushed to disk and renamed. Tensors and plain values only."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


class Run:
    """The folder of one run: `config.json`, `log.jsonl`, `checkpoint.pt` and the one before it, and
    the networks. Raises `UserError` if the folder holds another run or can't be written.

    `options` are compared on `--resume`: all but those in `FREE` must be as they were. `show` is
    called with each row of the log, on resuming with the old ones too.
    """

    FREE = {"data", "out", "resume", "overwrite", "workers", "device", "cache"}

    def __init__(self, folder: Path, options: dict, show: Callable[[dict], None] = lambda row: None) -> None:
        self.folder, self.show, self.save_cost, self.saved_at = folder, show, 0.0, time.perf_counter()
        self.rows = 0  # of the log; a checkpoint remembers them, as later ones will be made again
        self.checkpoints = folder / "checkpoint.pt", folder / "checkpoint-prev.pt"
        plain = json.loads(json.dumps(options, default=str))
        self.config = {"options": plain, "command": command_line(), "finished": False, "versions": {
            "python": sys.version.split()[0], "torch": str(torch.__version__), "timm": timm.__version__,
            "torchvision": str(torchvision.__version__), "numpy": np.__version__}}
        old, begun = {}, any(path.exists() for path in self.checkpoints)
        if (folder / "config.json").is_file() and not options["overwrite"]:
            old = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.finished = bool(old.get("finished"))
        self.resuming = bool(options["resume"] and old and begun)
        if not options["resume"] and (self.finished or old and begun):
            raise UserError(f"{folder} holds {'a finished' if self.finished else 'an unfinished'} run; "
                            + ("" if self.finished else "--resume it, ") + "choose another --out, or "
                            "--overwrite it")
        for name, value in plain.items() if self.resuming or self.finished else ():
            if name not in self.FREE and value != old["options"].get(name, value):
                raise UserError(f"{folder} was made with --{name.replace('_', '-')} {old['options'][name]}, "
                                f"not {value}; resume with the options it had")
        if options["resume"] and not (begun or self.finished):
            print(f"{folder} holds no checkpoint: starting at the beginning")

    def begin(self, **facts: Any) -> dict | None:
        """Make the folder and write `config.json`, `facts` included; return the checkpoint to go on
        from, or None. Before this call nothing is written."""
        state = self._load() if self.resuming else None
        self.config |= facts
        log, had_run = self.folder / "log.jsonl", (self.folder / "config.json").is_file()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / "config.json", json.dumps(self.config, indent=1) + "\n")
            if state is None:
                for old in ("*.pt", "log.jsonl", "split.csv", "predictions.csv", "result.json"):
                    for path in self.folder.glob(old) if had_run else ():  # else these are no run's files
                        path.unlink()
        except OSError as error:
            raise UserError(f"--out {self.folder} can't be written: {error.strerror}") from None
        if state is not None:  # rows after the checkpoint will be made again, a last half line too
            lines = log.read_text(encoding="utf-8").split("\n")[:state["rows"]] if state["rows"] else []
            write_text(log, "".join(line + "\n" for line in lines))
            for line in lines:
                self.show(json.loads(line))
            self.rows = len(lines)
        self.saved_at = time.perf_counter()
        return state

    def _load(self) -> dict:
        for path in self.checkpoints:
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except Exception:  # torch raises many kinds for a missing or damaged file
                print(f"{path} can't be read; looking for the one before it", file=sys.stderr)
        raise UserError(f"no checkpoint in {self.folder} can be read; start anew with --overwrite")

    def log(self, row: dict) -> None:
        """Append one epoch's row to `log.jsonl`, and show it."""
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.rows += 1
        self.show(row)

    def save(self, state: dict, force: bool = False) -> None:
        """Keep what resuming needs, unless the last save cost over 5 % of the time since then: a
        paper-size checkpoint is 1.8 GB, an epoch of a small set may take a second."""
        begun = time.perf_counter()
        if not force and self.save_cost > 0.05 * (begun - self.saved_at):
            return
        newest, before = self.checkpoints
        save_tensors(state | {"rows": self.rows}, self.folder / "checkpoint-next.pt")
        if newest.exists():
            os.replace(newest, before)
        os.replace(self.folder / "checkpoint-next.pt", newest)
        self.saved_at = time.perf_counter()
        self.save_cost = self.saved_at - begun

    def save_network(self, file: str, network: nn.Module, arch: str) -> str:
        """Write a network to `file`; returns the Python that loads it with timm."""
        path, outputs, size = self.folder / file, network.num_classes, network.image_size
        save_tensors({"arch": arch, "num_classes": outputs, "image_size": size, "fixed_size": network.fixed_size,
                      "classes": self.config["classes"], "multi_label": self.config["multi_label"],
                      "state_dict": network.state_dict()}, path)
        fixed = f", img_size={size}" if network.fixed_size else ""
        return f'timm.create_model("{arch}", num_classes={outputs}{fixed}, checkpoint_path="{path}")'

    def finish(self, **facts: Any) -> None:
        """Mark the run as finished."""
        self.config |= {"finished": True, **facts}
        write_text(self.folder / "config.json", json.dumps(self.config, indent=1) + "\n")


def command_line() -> str:
    """The command that is running, as it can be typed again."""
    return shlex.join(["python", os.path.basename(sys.argv[0]), *sys.argv[1:]])


class Screen:
    """Shows the rows of a log as a table, and says once what their numbers alone do not.

    `warn(gauges, gauges of the untrained start)` returns a sentence about one arm, or None. Raises
    `UserError` if the weights of an arm have not moved since the start. `extra` are more columns, of
    no one arm.
    """

    COLUMNS = (("cosine", 7, ".3f"), ("spread", 7, ".3f"), ("rank", 6, ".1f"), ("gradient", 9, ".1e"),
               ("moved", 7, ".1e"))

    def __init__(self, arms: tuple[str, ...], warn: Callable[[dict, dict | None], str | None],
                 extra: tuple[str, ...] = ()) -> None:
        self.arms, self.warn, self.extra, self.start, self.said = arms, warn, extra, {}, set()

    def _widths(self) -> list[int]:
        return [max(9, len(name) + 2) for name in self.extra]

    def __call__(self, row: dict) -> None:
        gauges = {arm: {key: row.get(f"{arm}_{key}") for key, _, _ in self.COLUMNS} for arm in self.arms}
        if not self.start:
            names = "".join(f"{name:>{width + 1}}" for name, width, _ in self.COLUMNS)
            tqdm.write(" " * (21 + sum(self._widths())) + "".join(f" | {arm:{len(names) - 1}}" for arm in self.arms))
            tqdm.write("epoch     loss  img/s" + "".join(f"{name:>{width}}" for name, width in zip(self.extra, self._widths()))
                       + "".join(" |" + names[1:] for _ in self.arms))
            self.start = gauges
        cells = [f"{row['epoch']:5d}", _cell(row.get("loss"), 9, ".5f"),
                 _cell(row.get("images_per_second"), 7, ".1f"),
                 *(_cell(row.get(name), width, ".3g") for name, width in zip(self.extra, self._widths()))]
        for arm in self.arms:
            cells.append(" |" + "".join(_cell(gauges[arm][key], width + (key != "cosine"), form)
                                        for key, width, form in self.COLUMNS))
        tqdm.write("".join(cells))
        for arm in self.arms if row["epoch"] else ():
            if gauges[arm]["moved"] == 0:
                raise UserError(f"the weights of {arm} have not moved in epoch {row['epoch']}: nothing "
                                "is being trained; look at --lr")
            known = arm not in self.said and gauges[arm]["spread"] is not None
            sentence = self.warn(gauges[arm], self.start.get(arm)) if known else None
            if sentence:
                self.said.add(arm)
                tqdm.write(f"warning, {arm}: {sentence}")


def _cell(value: float | None, width: int, form: str) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}{form}}"


class StopSignal:
    """`with StopSignal(run) as stop:` makes Ctrl-C and SIGTERM set a flag that `stop()` returns, so
    that a loop can save and end between two steps; a second Ctrl-C ends it at once."""

    def __init__(self, run: Run) -> None:
        self.run, self.caught, self.handlers = run, False, {}

    def __call__(self) -> bool:
        return self.caught

    def _catch(self, number: int, frame: Any) -> None:
        if self.caught:
            raise KeyboardInterrupt
        self.caught = True

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # Python allows it only there
            self.handlers = {s: signal.signal(s, self._catch) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type | None, *rest: Any) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if kind is KeyboardInterrupt:
            command = self.run.config["command"].replace(" --overwrite", "").replace(" --resume", "")
            print(f"\nstopped; the checkpoint in {self.run.folder} is safe. Go on with\n  {command} --resume",
                  file=sys.stderr)
            raise SystemExit(130)
