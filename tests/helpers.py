"""Small images and folders for the tests."""

from pathlib import Path
from typing import Callable

import numpy as np
import pytest
from PIL import Image


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
