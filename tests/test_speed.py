"""extras/speed.py: equal work is timed on both sides, and the ratios are those of its own rows."""

import copy
import re

import pytest
import torch
from helpers import class_folders

from cass import pretrain_cass
from dino import DinoNetwork, pretrain_dino
from extras import speed
from finetune import finetune_network
from runtime import build_model

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELLED = IMAGES, torch.eye(4)[:, :2]
VIEWS = [IMAGES, IMAGES.flip(3)], [IMAGES.flip(2), IMAGES.flip((2, 3))]


def network(arch: str = "test_resnet", outputs: int | None = None) -> torch.nn.Module:
    return build_model(arch, "random", 32, outputs=outputs)


@pytest.mark.parametrize("ours, plain, build, batch, options", [
    (pretrain_cass, speed.plain_cass, lambda: [network(), network("test_vit")], IMAGES, {}),
    (pretrain_dino, speed.plain_dino, lambda: [DinoNetwork(network(outputs=0), 16)], VIEWS, {}),
    (finetune_network, speed.plain_tuning, lambda: [network(outputs=2)], LABELLED,
     {"validation": [LABELLED]})], ids=("cass", "dino", "finetune"))
def test_the_plain_loop_does_what_ours_does(ours, plain, build, batch, options):
    own = build()
    its, start = copy.deepcopy(own), copy.deepcopy(own)
    ours(*own, [batch], epochs=1, **options)
    plain(*its, [batch], precision=torch.float32)
    for one, other, first in zip(own, its, start):
        for a, b, before in zip(one.parameters(), other.parameters(), first.parameters()):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)
            moved = a.grad.abs() > 1e-4  # Adam's first step is of one size, whatever the gradient
            torch.testing.assert_close(a[moved], b[moved], rtol=0, atol=1e-5)
            assert not moved.any() or ((a - before)[moved].abs() > 1e-4).all()


def test_steps_and_the_wait_for_data_are_timed_after_the_warm_up(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])

    class Slow:
        def __len__(self):
            return 4

        def __iter__(self):
            for step in range(4):
                clock[0] += 2 if step == 0 else 0.25
                yield step

    timed = speed.TimedLoader(Slow(), 1, torch.device("cpu"))
    for _ in timed:
        clock[0] += 0.5
    assert (timed.waited, timed.seconds) == (0.25, 0.75)


def test_the_ratios_are_those_of_the_rows(tmp_path, capsys):
    folder = class_folders(tmp_path / "d", cat=4, dog=4)
    speed.main(["--data", str(folder), *"--cnn test_resnet --transformer test_vit --image-size 32 "
                "--batch-size 2 --steps 1 --warm-up 1 --rounds 1 --out-dim 16 --workers 0 "
                "--precision bf16".split()])
    text, method, found = capsys.readouterr().out, "", {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[1] == "precision":
            method = cells[0]
        elif line.startswith("| "):
            found[method, cells[0], cells[1].removeprefix("torch.")] = cells[2:]
    ms = {key: float(cells[0]) for key, cells in found.items()}
    assert {key[0] for key in found} == {"CASS", "DINO, test_resnet", "DINO, test_vit",
                                         "fine-tuning, test_resnet", "fine-tuning, test_vit"}
    ours, plain = ("CASS", "ours", "bfloat16"), ("CASS", "plain loop", "bfloat16")
    whole = ms["CASS", "plain loop", "float32"]
    assert float(found[ours][4]) == pytest.approx(ms[plain] / ms[ours], abs=0.02)
    assert float(found[ours][5]) == pytest.approx(whole / ms[ours], abs=0.02)
    dino = sum(ms[f"DINO, {arch}", "ours", "bfloat16"] for arch in ("test_resnet", "test_vit"))
    said = float(re.search(r"CASS / DINO, both arms: ([\d.]+)", text)[1])
    assert said == pytest.approx(ms[ours] / dino, abs=0.02)
