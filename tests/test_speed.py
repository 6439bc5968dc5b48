"""extras/speed.py: what is timed is the step, and the ratios come from what was timed."""

import re
import time

import pytest
import torch

from extras import speed
from helpers import class_folders


def test_a_timed_loader_measures_steps_and_the_wait_for_data():
    def slow():
        for _ in range(5):
            time.sleep(0.02)
            yield torch.zeros(1)

    class Slow:
        __iter__ = staticmethod(slow)

    timed = speed.TimedLoader(Slow(), 5, torch.device("cpu"))
    assert len(list(timed)) == 1  # before set_epoch, for the look at the untrained networks
    timed.set_epoch(0)
    for _ in timed:
        time.sleep(0.01)
    whole, wait = timed.seconds(warm_up=2)
    assert len(whole) == len(wait) == 3
    assert all(0.02 <= w < t for w, t in zip(wait, whole)) and min(whole) >= 0.03


def test_the_stopwatch_sees_every_optimiser_and_leaves_no_hook_behind():
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    optimizer, follow = torch.optim.Adam([parameter]), speed.dino.follow
    with speed.Stopwatch(torch.device("cpu")) as watch:
        optimizer.step()
        once = watch.total
        speed.dino.follow([torch.zeros(3)], [torch.ones(3)], 0.9)
        assert 0 < once < watch.total
    after = watch.total
    optimizer.step()
    assert watch.total == after and speed.dino.follow is follow


def test_the_table_holds_the_ratio_of_its_own_rows(tmp_path, capsys):
    class_folders(tmp_path / "d", cat=8, dog=8)
    speed.main(["--data", str(tmp_path / "d"), "--init", "random", "--cnn", "test_resnet", "--transformer", "test_vit",
                "--image-size", "32", "--batch-size", "4", "--steps", "1", "--warm-up", "1", "--rounds", "1",
                "--workers", "0"])
    text = capsys.readouterr().out
    steps = {m[1]: float(m[2]) for m in re.finditer(r"^\| ([^|]+) \| ([\d.]+) \|", text, re.M)}
    full = steps["DINO, test_resnet"] + steps["DINO, test_vit"]
    assert float(re.search(r"CASS / DINO, both arms: ([\d.]+)", text)[1]) == pytest.approx(
        steps["CASS, both arms"] / full, abs=0.01)
    assert "Paper: 0.31" in text and "0.375" in text and "extrapolated" in text
