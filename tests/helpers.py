"""Small images, folders and networks for the tests."""

import json
import math
import struct
import zlib
from pathlib import Path
from typing import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import cass
import dino
import finetune
from data import DataError, read_images, split_images, write_split
from runtime import Run, build_model


def noise(seed: int = 0, width: int = 24, height: int = 20) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def put(folder: Path, *names: str) -> Path:
    """Save a small image, each another one, under every name."""
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise(seed).save(folder / name)
    return folder


def class_folders(folder: Path, **counts: int) -> Path:
    """`class_folders(f, cat=2)` makes f/cat/0.png and f/cat/1.png, all images different."""
    return put(folder, *(f"{name}/{i}.png" for name, n in counts.items() for i in range(n)))


def labels_csv(folder: Path, text: str | bytes, *names: str) -> Path:
    """Save images under `names`, and beside them a labels.csv holding exactly `text`."""
    put(folder, *names)
    (folder / "labels.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def tiff(file: Path, pixels: np.ndarray, tags: dict[int, list[int]] | None = None, *,
         order: str = "<", deflate: bool = False) -> None:
    """A TIFF as instruments write it: `(H, W)` or `(H, W, C)` values of any kind, and any tags."""
    height, width, *more = pixels.shape
    channels = more[0] if more else 1
    body = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    body = zlib.compress(body) if deflate else body
    kind = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    tags = {256: [width], 257: [height], 258: [8 * pixels.itemsize] * channels,
            259: [8 if deflate else 1], 262: [2 if channels > 2 else 1], 273: [8], 277: [channels],
            278: [height], 279: [len(body)], 339: [kind] * channels, **(tags or {})}
    body += b"\0" * (len(body) % 2)
    entries, long, start = b"", b"", 8 + len(body)
    for tag, values in sorted(tags.items()):
        cells = struct.pack(f"{order}{len(values)}H", *values)
        if len(cells) > 4:
            place = start + 2 + 12 * len(tags) + 4 + len(long)
            cells, long = struct.pack(f"{order}I", place), long + cells
        entries += struct.pack(f"{order}HHI", tag, 3, len(values)) + cells.ljust(4, b"\0")
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, start)
    count = struct.pack(f"{order}H", len(tags))
    file.write_bytes(head + body + count + entries + b"\0" * 4 + long)


def png(file: Path, pixels: np.ndarray, key: int | None = None) -> None:
    """A PNG of `(H, W, C)` values of 16 bits: grey, grey and alpha, RGB, or RGB and alpha. Of the
    colours without alpha, `key` in every channel is transparent."""
    height, width, channels = pixels.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    keys = [] if key is None else [(b"tRNS", struct.pack(">H", key) * channels)]
    chunks = [(b"IHDR", header), *keys, (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    file.write_bytes(png_bytes(*chunks))


def png_bytes(*chunks: tuple[bytes, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks)


def make_run(folder: Path, data: Path, **networks: str) -> Path:
    """A run folder with a split of its own of `data`, and networks, `FILE="ARCHITECTURE"`."""
    images = split_images(read_images(data), seed=7)
    run = Run(folder, {"resume": False})
    run.begin(classes=images.classes, multi_label=False)
    write_split(folder / "split.csv", images)
    for name, arch in (networks or {"cnn": "test_resnet", "transformer": "test_vit"}).items():
        run.save_network(f"{name}.pt", build_model(arch, "random", 32, outputs=4, seed=3))
    return folder


COMMANDS = {"cass": (cass.main, "--cnn test_resnet --transformer test_vit"),
            "dino": (dino.main, "--arch test_vit --out-dim 16"), "finetune": (finetune.main, "")}
SMALL = "--init random --image-size 32 --batch-size 4 --workers 0 --precision fp32 --epochs 1"


def command(name: str, data: Path, out: Path, *more: object) -> None:
    """`cass.py`, `dino.py` or `finetune.py` on small networks. A text in `more` may be several
    options; what comes later counts."""
    main, own = COMMANDS[name]
    words = ["--data", str(data), "--out", str(out), *own.split(), *SMALL.split()]
    for options in more:
        words += options.split() if isinstance(options, str) else [str(options)]
    main(words)


def sentence(capsys: pytest.CaptureFixture, call: Callable[[], object]) -> str:
    """The one line that `call` leaves on stderr when it ends with exit code 2."""
    capsys.readouterr()
    code = None
    try:  # pytest.raises would keep the traceback, and with it the loader's workers
        call()
    except SystemExit as stopped:
        code = stopped.code
    said = capsys.readouterr().err
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1, (code, said)
    return said


def complaint(call: Callable[[], object], *words: str) -> str:
    """What the `DataError` says that `call` raises: one line with all the `words`."""
    with pytest.raises(DataError) as error:
        call()
    said = str(error.value)
    assert all(word in said for word in words) and "\n" not in said, said
    return said


def equal(a: object, b: object, but: set = frozenset()) -> bool:
    """Equal to the bit, through lists and dicts; a dict's values named in `but` don't count."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        same = isinstance(b, dict) and a.keys() == b.keys()
        return same and all(equal(a[key], b[key]) for key in a.keys() - but)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


class TinyNet(nn.Module):
    """A CNN for images of 8 x 8 with what a run has to keep (batch-norm statistics, random dropout)
    and timm's names for its parts; always of the same weights."""

    head_hidden_size = 36

    def __init__(self, outputs: int = 3, dropout: float = 0.2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4),
                                  nn.ReLU(), nn.Flatten(), nn.Dropout(dropout))
        self.fc = nn.Linear(36, outputs)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.body(images))

    def forward_features(self, images: Tensor) -> Tensor:
        return self.body(images)  # (N, 36)

    def forward_head(self, features: Tensor, pre_logits: bool) -> Tensor:
        return features

    def get_classifier(self) -> nn.Module:
        return self.fc


def state(network: nn.Module) -> dict[str, Tensor]:
    """A copy of its tensors, on the CPU."""
    return {key: x.to("cpu", copy=True) for key, x in network.state_dict().items()}


def weights_in(file: Path) -> dict[str, Tensor]:
    return torch.load(file, weights_only=True)["state_dict"]


def half_cosine(step: int, steps: int, start: float, end: float = 1e-6) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * step / steps)) / 2


def log_rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
