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
    assert float(re.search(r"contrast takes ([\d.]+) times", text)[1]) == pytest.approx(
        steps["CASS, --loss contrast"] / steps["CASS, both arms"], abs=0.02)
    assert "Paper: 0.31" in text and "0.375" in text and "extrapolated" in text


def test_the_plain_pipeline_takes_the_same_steps_and_loading_is_timed_by_turns(tmp_path, capsys):
    from torchvision import transforms as v1
    from torchvision.transforms import v2

    from data import augmentation

    ours, plain = augmentation(32).transforms, speed.plain_pipeline(32).transforms
    names = [[type(step).__name__ for step in steps] for steps in (ours, plain)]
    assert names[0][:5] == names[1][:5] == ["Resize", "RandomApply", "RandomApply", "RandomHorizontalFlip", "RandomVerticalFlip"]
    assert isinstance(plain[1], v1.RandomApply) and isinstance(ours[1], v2.RandomApply) and plain[1].p == ours[1].p
    speed.main(["--data", str(class_folders(tmp_path / "d", cat=8, dog=8)), "--loading", "--image-size", "32",
                "--batch-size", "4", "--steps", "1", "--rounds", "2"])
    rows = re.findall(r"^\| ([^|]+) \| (\d+) \| (\d+) - (\d+) \| ([\d.]+) \|$", capsys.readouterr().out, re.M)
    assert [name for name, *_ in rows] == ["from files", "from the cache", "plain Pillow and torchvision v1"]
    assert all(int(low) <= int(middle) <= int(high) for _, middle, low, high, _ in rows) and rows[2][4] == "1.00"
