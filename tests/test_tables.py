"""extras/tables.py: runs are shared and resumed, and every number comes from a result.json."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from extras import tables
from helpers import put, sentence
from metrics import mean_and_spread


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images in two classes, dark and bright."""
    root, rng = tmp_path_factory.mktemp("images") / "tiny", np.random.default_rng(0)
    for name, level in (("dark", 60), ("bright", 190)):
        (root / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.normal(level, 20, (32, 32, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    small = tables.SIZES["small"] | {"image_size": 32, "epochs": 2, "tuning": 1, "out_dim": 16}
    monkeypatch.setitem(tables.SIZES, "small", small)
    rows = [row for row in tables.TABLES["T4"]["rows"] if row["labels"] == 1]
    monkeypatch.setitem(tables.TABLES, "T4", tables.TABLES["T4"] | {"rows": rows})


def sweep(folder: Path, out: Path, *names: str, seeds: int = 2) -> None:  # names of tables, and other options
    tables.main([*names, "--data", str(folder), "--out", str(out), "--seeds", str(seeds), "--workers", "0"])


def read(file: Path) -> list[dict]:
    with open(file, newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_a_table_is_computed_from_its_runs_and_shared_with_others(folder, tmp_path, capsys, monkeypatch):
    sweep(folder, tmp_path, "T4")
    shown = capsys.readouterr().out
    assert shown.count("$ python cass.py") == 4 and shown.count("$ python dino.py") == 4  # 2 losses, 2 arms; 2 seeds
    assert shown.count("$ python finetune.py") == 12  # CASS 2, DINO 2, supervised 2; 2 seeds
    row = next(r for r in read(tmp_path / "tiny-small" / "T4.csv") if (r["method"], r["arm"], r["name"]) == ("CASS", "transformer", ""))
    results = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("tiny-small/seed*/cass-*tuned-1/result.json"))
               if "contrast" not in str(file)]
    scores = [r["seeds"][0]["arms"]["transformer"]["test"]["headline"] for r in results]
    assert len(scores) == 2
    mean, spread, n = mean_and_spread(scores)
    assert (float(row["headline_mean"]), float(row["headline_sd"]), int(row["headline_n"])) == (mean, spread, n)
    assert float(row["paper_mean"]) == 0.9279 and float(row["cosine_mean"]) <= 1

    text = (tmp_path / "tiny-small" / "T4.md").read_text()
    assert "not the paper's set-up" in text and "8 test images, of which 0 also stand in training or validation" in text
    assert "0.9279 ± 0.0213" in text and "Gain of CASS over DINO at 100% of the labels" in text

    ours, scratch = ({json.loads(file.read_text())["seeds"][0]["seed"]: json.loads(file.read_text())["seeds"][0]["arms"]
                      for file in tmp_path.glob(f"tiny-small/seed*/{name}/result.json")}
                     for name in ("cass-*contrast*tuned-1", "supervised-test_vit-*"))
    gaps = [ours[s]["transformer"]["test"]["headline"] - next(iter(scratch[s].values()))["test"]["headline"] for s in (0, 1)]
    line = next(line for line in text.splitlines() if line.startswith("| transformer | 100% | ") and line.count("|") == 6)
    said, error = line.split("|")[5].split("(")[0].split("±")
    assert float(said) == pytest.approx(np.mean(gaps), abs=1e-4)
    assert float(error) == pytest.approx(np.std(gaps, ddof=1) / 2**0.5, abs=1e-4)

    before = read(tmp_path / "tiny-small" / "T4.csv")
    sweep(folder, tmp_path, "T4")  # nothing is computed twice
    assert "$ python" not in capsys.readouterr().out
    assert read(tmp_path / "tiny-small" / "T4.csv") == before and not any(row["failed"] for row in before)
    monkeypatch.setitem(tables.TABLES, "T14", tables.TABLES["T14"] | {"rows": tables.TABLES["T14"]["rows"][2:4]})
    sweep(folder, tmp_path, "T14")  # batch 16 is the base of T4
    assert "$ python" not in capsys.readouterr().out
    file = next(tmp_path.glob("tiny-small/seed0/cass-*tuned-1/result.json"))
    changed = json.loads(file.read_text())
    for arm in changed["seeds"][0]["arms"].values():
        arm["test"]["headline"] = 0.123
    file.write_text(json.dumps(changed))
    sweep(folder, tmp_path, "T4", seeds=1)
    assert any(r["headline_mean"] == "0.123" for r in read(tmp_path / "tiny-small" / "T4.csv"))  # read, never remembered


def test_a_stopped_sweep_goes_on_where_it_was(folder, tmp_path, capsys, monkeypatch):
    made, real = [], tables.finetune.main

    def stops_once(arguments):
        made.append(arguments)
        if len(made) == 2:
            raise SystemExit(130)
        real(arguments)

    monkeypatch.setattr(tables.finetune, "main", stops_once)
    rows = [row for row in tables.TABLES["T4"]["rows"] if row["method"] == "supervised"]
    monkeypatch.setitem(tables.TABLES, "T4", tables.TABLES["T4"] | {"rows": rows})
    with pytest.raises(SystemExit) as stop:
        sweep(folder, tmp_path, "T4", seeds=1)
    assert stop.value.code == 130
    sweep(folder, tmp_path, "T4", seeds=1)
    assert len(made) == 3 and made[1] == made[2] != made[0]  # the first is not made again


def test_a_failed_run_is_a_row_with_its_reason_and_the_sweep_goes_on(folder, tmp_path, capsys, monkeypatch):
    broken = {"method": "supervised", "arm": "cnn", "labels": 1, "paper": None, "options": {"init": "nowhere"}}
    rows = [broken] + [row for row in tables.TABLES["T4"]["rows"] if row["method"] == "supervised"]
    monkeypatch.setitem(tables.TABLES, "T4", tables.TABLES["T4"] | {"rows": rows})
    sweep(folder, tmp_path, "T4", seeds=1)
    found = read(tmp_path / "tiny-small" / "T4.csv")
    assert "nowhere" in found[0]["failed"] and not found[0]["headline_mean"]
    assert all(row["headline_mean"] and not row["failed"] for row in found[1:])
    assert "| failed: --init nowhere" in (tmp_path / "tiny-small" / "T4.md").read_text()


def test_every_table_is_listed_and_an_unknown_one_named(capsys):
    tables.main(["--list"])
    shown = capsys.readouterr().out
    assert all(f"T{i} " in shown for i in range(1, 22)) and "F19-brain" in shown
    assert "T9             autoimmune     4 rows   12 runs" in shown  # 2 pretrainings and 2 fine-tunings, 3 seeds
    with pytest.raises(SystemExit) as stop:
        tables.main(["T99", "--data", "x"])
    assert stop.value.code == 2 and "T99" in capsys.readouterr().err


def test_an_ablation_changes_pretraining_only():
    args = tables.tables_options().parse_args(["T6", "--data", "d", "--size", "paper"])
    for name in ("T6", "T7", "T8", "T9", "T14", "T15", "T21"):
        tuned = []
        for row in tables.TABLES[name]["rows"]:
            (_, _, pretrained), (module, options, _) = tables.jobs_of(row, 0, args)
            assert module is tables.finetune and options["weights"] == pretrained
            tuned.append({key: value for key, value in options.items() if key != "weights"})
        assert all(options == tuned[0] for options in tuned)
    epochs = [tables.jobs_of(row, 0, args)[0][1]["epochs"] for row in tables.TABLES["T7"]["rows"][::2]]
    assert epochs == [50, 100, 200, 300]


def test_a_finished_run_is_not_passed_off_as_one_with_other_options(folder, tmp_path, capsys, monkeypatch):
    rows = [row for row in tables.TABLES["T4"]["rows"] if row["method"] == "supervised" and row["arm"] == "cnn"]
    monkeypatch.setitem(tables.TABLES, "T4", tables.TABLES["T4"] | {"rows": rows})
    sweep(folder, tmp_path / "out", "T4", seeds=1)
    for other in (["--schedule", "run"], ["--split-file", str(next((tmp_path / "out").rglob("split.csv")))]):
        with pytest.raises(SystemExit) as stop:
            sweep(folder, tmp_path / "out", "T4", *other, seeds=1)
        assert stop.value.code == 2
        (row,) = read(tmp_path / "out" / "tiny-small" / "T4.csv")
        assert other[0] in row["failed"] and not row["headline_mean"]
    moved = folder.parent / "elsewhere" / "tiny"  # another data set of the same name
    shutil.copytree(folder, moved)
    with pytest.raises(SystemExit):
        sweep(moved, tmp_path / "out", "T4", seeds=1)
    assert "--data" in read(tmp_path / "out" / "tiny-small" / "T4.csv")[0]["failed"]


def test_the_best_arm_is_the_one_with_the_better_mean(folder, tmp_path, capsys, monkeypatch):
    rows = tables.TABLES["F19-brain"]["rows"][-1:]
    assert rows[0]["method"] == "supervised" and rows[0]["arm"] == "best"
    monkeypatch.setitem(tables.TABLES, "F19-brain", tables.TABLES["F19-brain"] | {"rows": rows})
    scores = {("test_resnet", 0): 0.9, ("test_resnet", 1): 0.1, ("test_vit", 0): 0.6, ("test_vit", 1): 0.5}

    def fake(row, seed, args, metric):
        arch = tables.jobs_of(row, seed, args)[0][1]["arch"]
        return {"headline": scores[arch, seed], "metric": 0.0, "images": 8, "headline_name": "macro F1"}

    monkeypatch.setattr(tables, "make", lambda *job: "")
    monkeypatch.setattr(tables, "scores_of", fake)
    sweep(folder, tmp_path, "F19-brain")
    (row,) = read(tmp_path / "tiny-small" / "F19-brain.csv")
    assert float(row["headline_mean"]) == pytest.approx(0.55) and "transformer" in row["name"]


def test_bad_options_end_before_anything_is_made(folder, tmp_path, capsys):
    for options, word in ((["T4", "--labels", "0.5"], "--labels"), (["T4", "--seeds", "0"], "--seeds"),
                          (["T4", "--epochs", "0"], "--epochs"), (["t4"], "T4")):
        assert word in sentence(capsys, lambda: tables.main([*options, "--data", str(folder), "--out", str(tmp_path / "o")]))
    flat = put(tmp_path / "flat", *(f"{i}.png" for i in range(20)))
    assert "no labels" in sentence(capsys, lambda: tables.main(["T4", "--data", str(flat), "--out", str(tmp_path / "o")]))
    assert "nowhere" in sentence(capsys, lambda: tables.main(["T4", "--data", "nowhere", "--out", str(tmp_path / "o")]))
    assert not (tmp_path / "o").exists()
