"""extras/features.py: the features are the network's own, beside the right names."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import class_folders, make_run, sentence

from data import augmentation, load_image, read_images, split_images
from extras import features
from runtime import build_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with two networks, and beside it its images."""
    folder = tmp_path_factory.mktemp("features")
    return make_run(folder / "run", class_folders(folder / "set", cat=5, dog=4))


def write(run: Path, *more: str) -> None:
    features.main(["--weights", str(run), "--data", str(run.with_name("set")),
                   "--out", str(run.with_name("new") / "features.npz"), *more])


def test_features_of_each_arm_beside_paths_parts_and_labels(run: Path) -> None:
    write(run, "--batch-size", "4", "--workers", "0", "--device", "cpu")  # not in TF32
    images = split_images(read_images(run.with_name("set")), seed=7)
    with np.load(run.with_name("new") / "features.npz", allow_pickle=False) as saved:
        found = dict(saved)
    rows = {row.path: row for row in images.rows}
    assert sorted(found["paths"]) == sorted(rows)
    assert [rows[path].split for path in found["paths"]] == found["parts"].tolist()
    assert found["classes"].tolist() == ["cat", "dog"] and not found["groups"].any()
    labels = found["classes"][found["labels"].argmax(1)]
    assert labels.tolist() == [rows[path].labels[0] for path in found["paths"]]
    for arm, arch in (("cnn", "test_resnet"), ("transformer", "test_vit")):
        network = build_model(arch, "random", 32, outputs=0)
        network.load_state_dict(torch.load(run / f"{arm}.pt", weights_only=True)["state_dict"],
                                strict=False)  # without its head a timm model gives its features
        network.eval()
        for path, own in zip(found["paths"], found[arm], strict=True):
            image = augmentation(32, "none")(load_image(images.folder / str(path)))
            wanted = network(image[None])[0].detach().numpy()
            np.testing.assert_allclose(own, wanted, rtol=1e-4, atol=1e-5)


def test_user_errors_are_one_sentence_and_write_nothing(run: Path, capsys) -> None:
    out = run.with_name("new")
    for more, words in ((["--out", str(out / "x.csv")], ".npz"),
                        (["--weights", str(out / "gone")], "gone"),
                        (["--data", str(out / "gone")], "not a folder")):
        before = sorted(run.parent.rglob("*"))
        assert words in sentence(capsys, lambda: write(run, *more))
        assert sorted(run.parent.rglob("*")) == before
