"""extras/features.py: the features are the network's own, beside the right names."""

import numpy as np
import pytest
from helpers import weights_in

from data import augmentation, load_image, read_images, read_split
from extras import features
from runtime import build_model


def test_features_of_each_arm_beside_paths_parts_and_labels(scans, scans_run, tmp_path):
    out = tmp_path / "new" / "features.npz"
    features.main(["--weights", str(scans_run), "--data", str(scans), "--out", str(out),
                   "--workers", "0", "--device", "cpu"])  # not in TF32
    images = read_split(scans_run / "split.csv", read_images(scans))
    with np.load(out, allow_pickle=False) as saved:
        found = dict(saved)
    rows = {row.path: row for row in images.rows}
    assert sorted(found["paths"]) == sorted(rows)
    assert [rows[path].split for path in found["paths"]] == found["parts"].tolist()
    assert found["classes"].tolist() == ["a", "b"] and not found["groups"].any()
    labels = found["classes"][found["labels"].argmax(1)]
    assert labels.tolist() == [rows[path].labels[0] for path in found["paths"]]
    for arm, arch in (("cnn", "test_resnet"), ("transformer", "test_vit")):
        network = build_model(arch, "random", 32, outputs=0)
        network.load_state_dict(weights_in(scans_run / f"{arm}.pt"), strict=False)  # but the head
        network.eval()  # without its head a timm model gives its features
        for path, own in zip(found["paths"], found[arm], strict=True):
            image = augmentation(32, "none")(load_image(scans / str(path)))
            wanted = network(image[None])[0].detach().numpy()
            np.testing.assert_allclose(own, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("option, value, words", [
    ("--out", "x.csv", ".npz"), ("--weights", "gone", "gone"), ("--data", "gone", "not a folder")])
def test_user_errors_are_one_sentence_and_write_nothing(option, value, words, scans, scans_run,
                                                        tmp_path, said):
    right = "--weights", scans_run, "--data", scans, "--out", tmp_path / "x.npz"
    assert words in said(features.main, *right, option, tmp_path / value)
    assert not list(tmp_path.iterdir())
