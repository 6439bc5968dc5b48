"""extras/tables.py: runs are shared and never confused, and every number comes from its runs."""

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import class_folders, put

import cass
import dino
import finetune
from extras import tables

SCRIPTS = {"cass.py": (cass.cass_options, cass.main), "dino.py": (dino.dino_options, dino.main),
           "finetune.py": (finetune.tune_options, finetune.main)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders(tmp_path_factory.mktemp("images") / "tiny", cat=20, dog=20)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """In place of processes: the options of each run that is made. A run leaves the files of a
    finished one, its scores drawn from its options; 13 epochs fail, and so does what needs them."""
    runs = []

    def run(command: list, check: bool) -> None:
        script, words = Path(command[1]).name, command[2:]
        options = vars(SCRIPTS[script][0]().parse_args(words))  # the command knows every option
        runs.append({"script": script} | options)
        folder, weights = options["out"], options.get("weights")
        if options["epochs"] == 13 or weights and not tables.finished(weights):
            return
        draw = np.random.default_rng(list(repr(options).encode())).random
        folder.mkdir(parents=True)
        rows = []
        for epoch in range(2):
            gauges = {f"{arm}_{gauge}": draw() for arm in ("cnn", "transformer")
                      for gauge in ("cosine", "rank")}
            rows.append({"epoch": epoch, "seconds": 1800} | gauges)
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        several = weights and weights.name.startswith("cass-")
        names = ("cnn", "transformer", "ensemble") if several else ("its own",)
        arms = {name: {"test": {"headline": draw(), "multi_label": False,
                                "argmax": {"balanced_accuracy": draw()},
                                "threshold_0.5": {"f1_pooled": draw()}}} for name in names}
        result = {"seeds": [{"chosen": names[-1], "arms": arms}], "guess": {"headline": 0.321}}
        (folder / "result.json").write_text(json.dumps(result))
        (folder / "config.json").write_text('{"options": {}, "finished": true}')

    monkeypatch.setattr(tables, "subprocess", SimpleNamespace(run=run))
    return runs


def sweep(folder: Path, out: Path, *words: str, seeds: int = 2) -> None:
    tables.main([*words, "--data", str(folder), "--out", str(out), "--seeds", str(seeds)])


def read(out: Path, name: str) -> dict[tuple, list[str]]:
    """The cells of a written table: {(method, arm, share of labels): the others}."""
    cells = {}
    for line in (out / "tiny-small" / f"{name}.md").read_text().splitlines():
        if line.startswith("|"):
            method, arm, share, *others = line.strip("| ").split(" | ")
            cells[method, arm, share] = cells.get((method, arm, share), []) + others
    return cells


def scores_of(made: list[dict], start: str, arm: str, metric: str = "headline") -> np.ndarray:
    """Scores of `arm` with seeds 0 and 1, fine-tuned from what `start` says: "supervised NETWORK",
    "dino.py NETWORK" or "cass.py LOSS"."""
    starts, scores = {run["out"]: run for run in made}, {}
    for run in made:
        if run["script"] == "finetune.py":
            first = starts.get(run["weights"], {"script": "supervised", "arch": run["arch"]})
            if start == f"{first['script']} {''.join(first.get('arch') or first['loss'])}":
                result = json.loads((run["out"] / "result.json").read_text())
                arms = result["seeds"][0]["arms"]
                test = arms.get(arm, arms.get("its own"))["test"]
                scores[run["seed"]] = (test | test["threshold_0.5"])[metric]
    return np.array([scores[0], scores[1]])


def test_a_table_holds_the_numbers_of_its_runs(folder, tmp_path, made):
    sweep(folder, tmp_path, "T4", "--labels", "1")
    assert len(made) == 2 * (2 * 2 + 2 * 2 + 2)  # seeds; two losses, two of DINO's, two supervised
    ours = scores_of(made, "cass.py contrast", "cnn")
    pooled = scores_of(made, "cass.py contrast", "cnn", "f1_pooled")
    cells = read(tmp_path, "T4")
    row = cells["contrast", "cnn", "100%"]
    assert row[0] == f"{ours.mean():.3f}±{ours.std(ddof=1):.3f}"
    assert row[1] == f"{pooled.mean():.3f}±{pooled.std(ddof=1):.3f}"
    assert row[5] == "1.0"  # two epochs of half an hour
    assert cells["CASS", "transformer", "100%"][2] == "0.9279±0.0213"  # the paper's
    assert cells["always the same answer", "", "100%"][0] == "0.321"
    chosen, both = (cells["CASS", arm, "100%"][0] for arm in ("chosen", "ensemble"))
    assert chosen == both  # here validation chose the ensemble
    gaps = ours - scores_of(made, "supervised test_resnet", "cnn")
    said, error = re.match(r"([+-][\d.]+)±([\d.]+)", row[-1]).groups()
    assert float(said) == pytest.approx(gaps.mean(), abs=1e-3)
    assert float(error) == pytest.approx(gaps.std(ddof=1) / 2**0.5, abs=1e-3)


def test_the_gain_over_dino_is_the_sum_of_both_arms_in_points(folder, tmp_path, made):
    sweep(folder, tmp_path, "T4", "--labels", "1")
    text, gain = (tmp_path / "tiny-small" / "T4.md").read_text(), 0.0
    for arm, arch in (("cnn", "test_resnet"), ("transformer", "test_vit")):
        own = scores_of(made, "cass.py cosine", arm, "f1_pooled")
        gain += 100 * (own - scores_of(made, f"dino.py {arch}", arm, "f1_pooled")).mean()
    assert float(re.search(r"arms: ([+-][\d.]+) points", text)[1]) == pytest.approx(gain, abs=0.01)
    assert "paper's: +4.47" in text  # 100 * (0.9909 + 0.9279 - 0.9900 - 0.8841), by hand
    assert max(map(len, text.splitlines())) <= 100 and "Not the paper's set-up" in text


def test_tables_share_runs_and_options_or_images_make_others(folder, tmp_path, made):
    def new_runs(*words: str) -> int:
        before = len(made)
        sweep(folder, tmp_path, *words)
        return len(made) - before
    assert new_runs("T6") == 12
    # SGD; Adam is batch 16 of T6. How it is run changes no number.
    assert new_runs("T6", "T9", "--workers", "0") == 4
    assert new_runs("T9", "--schedule", "run") == 4
    assert new_runs("T9", "--epochs", "7") == new_runs("T9", "--precision", "bf16") == 8
    put(folder, "cat/another.png")
    assert new_runs("T9") == 8
    (folder / "cat/another.png").unlink()


def test_an_ablation_changes_pretraining_only(folder, tmp_path, made):
    for name in ("T6", "T7", "T8", "T9", "T14", "T15", "T21"):
        sweep(folder, tmp_path, name, "--size", "paper")
    tuned = [run | {"weights": None, "out": None} for run in made
             if run["script"] == "finetune.py" and run["seed"] == 0]
    assert len(tuned) > 10 and all(options == tuned[0] for options in tuned)
    epochs = {run["epochs"] for run in made if run["script"] == "cass.py"}
    assert epochs == {50, 100, 200, 300}


@pytest.mark.parametrize("size", ["small", "paper"])
def test_every_table_prints_runs_in_an_order_that_works(folder, tmp_path, capsys, size, made):
    names = [name for name in tables.TABLES if name != "T1"]
    assert [f"T{i}" for i in range(1, 22)] == list(tables.TABLES)[:21]
    sweep(folder, tmp_path / "out", *names, "--print", "--size", size)
    lines, there = capsys.readouterr().out.splitlines(), set()
    for line in lines:
        python, script, *words = shlex.split(line)
        options = SCRIPTS[script][0]().parse_args(words)
        assert python == "python" and options.out not in there  # each once
        assert getattr(options, "weights", None) in {None, *there}  # pretraining comes first
        there.add(options.out)
    tuned = [line for line in lines if line.startswith("python finetune.py")]
    assert 100 < len(lines) and lines[-len(tuned):] == tuned
    assert not (tmp_path / "out").exists() and not made


def test_a_failed_run_leaves_a_gap_and_an_exit_code(folder, tmp_path, made, said):
    words = "T7", "--epochs", 13, "--data", folder, "--out", tmp_path, "--seeds", 2
    assert "4 runs failed" in said(tables.main, *words)  # the row of 100 epochs has 13
    cells, count = read(tmp_path, "T7"), len(made)
    assert cells["100 epochs", "cnn", "100%"][:3] == ["", "", "0.8650±0.0001"]
    assert all(cells[f"{n} epochs", "cnn", "100%"][0] for n in (50, 200, 300))
    assert "4 runs failed" in said(tables.main, *words)
    assert len(made) == count + 4  # only those are tried again


def test_bad_options_end_before_anything_is_made(folder, tmp_path, said, made):
    flat, out = put(tmp_path / "flat", *(f"{i}.png" for i in range(20))), tmp_path / "out"
    for table, option, value, words in (
            ("T99", "--seeds", 1, "T99"), ("T4", "--labels", 0.5, "--labels"),
            ("T4", "--seeds", 0, "--seeds"), ("T4", "--device", "abacus", "--device"),
            ("T4", "--data", flat, "no labels"), ("T4", "--data", "nowhere", "nowhere")):
        assert words in said(tables.main, table, "--data", folder, "--out", out, option, value)
    assert "--data" in said(tables.main, "T4")
    assert not out.exists() and not made


def test_real_runs_make_a_table(folder, tmp_path, monkeypatch):
    def run(command: list, check: bool) -> None:  # as a process would, but without its imports
        SCRIPTS[Path(command[1]).name][1](command[2:])

    monkeypatch.setattr(tables, "subprocess", SimpleNamespace(run=run))
    size = {"image_size": 32, "epochs": 2, "tuning": 1, "out_dim": 16}
    monkeypatch.setitem(tables.SIZES, "small", tables.SIZES["small"] | size)
    rows = [row for row in tables.TABLES["T4"]["rows"] if row["arm"] == "transformer"]
    monkeypatch.setitem(tables.TABLES, "T4", tables.TABLES["T4"] | {"rows": rows})
    sweep(folder, tmp_path, "T4", "--labels", "1", "--workers", "0", seeds=1)
    cells = read(tmp_path, "T4")
    for method in ("CASS", "contrast", "DINO", "supervised"):
        row = cells[method, "transformer", "100%"]
        assert 0 <= float(row[0]) <= 1 and 0 <= float(row[1]) <= 1
        if method != "supervised":
            assert -1 <= float(row[3]) <= 1 and float(row[4]) >= 1
