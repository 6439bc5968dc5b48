"""Tests import the modules from the folder above, wherever pytest was started."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background jobs ignore it
torch.set_num_threads(1)  # tiny models: threads that wait for each other cost more than they bring
if torch.cuda.is_available():  # there too what is said to be equal is equal to the bit
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)  # some operations have no such form


@pytest.fixture(scope="session")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 20 images in two classes, 14 to train on. Tests change it only in copies."""
    from helpers import class_folders
    return class_folders(tmp_path_factory.mktemp("pets"), cat=10, dog=10)


@pytest.fixture(scope="session")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two classes in parts of their own, 20 to test on. No test changes them."""
    from helpers import class_folders
    counts = {"train/a": 12, "train/b": 12, "test/a": 12, "test/b": 8}
    return class_folders(tmp_path_factory.mktemp("scans"), **counts)


@pytest.fixture(scope="session")
def scans_run(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a CNN and a Transformer on `scans`, as it is left behind. No test changes it."""
    from helpers import make_run
    return make_run(tmp_path_factory.mktemp("runs") / "cass-scans", scans)


@pytest.fixture
def said(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """`said(main, *words)`: the one sentence by which a command refuses these options."""
    from helpers import sentence
    return lambda main, *words: sentence(capsys, lambda: main([str(word) for word in words]))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The image files that are read from now on."""
    import images
    found, load = [], images.load_image

    def opening(file: Path, *rest: object) -> object:
        found.append(file)
        return load(file, *rest)
    monkeypatch.setattr(images, "load_image", opening)
    return found
