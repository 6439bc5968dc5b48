"""Tests import the modules from the folder above, wherever pytest was started."""

import os
import signal
import sys
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
