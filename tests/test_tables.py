"""extras/tables.py: runs are shared and never confused, and every number comes from its runs."""

import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import cass
import dino
import finetune
from extras import tables
from helpers import class_folders, put, sentence

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
        weights = options.get("weights")
        if options["epochs"] == 13 or weights and not tables.finished(weights):
            return
        draw = np.random.default_rng(list(repr(options).encode())).random
        folder = options["out"]
        folder.mkdir(parents=True)
        rows = [{"epoch": epoch, "seconds": 1800} | {
            f"{arm}_{gauge}": draw() for arm in ("cnn", "transformer", "backbone")
            for gauge in ("cosine", "rank")} for epoch in (0, 1)]
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if script == "finetune.py":
            method = weights.name.split("-")[0] if weights else options["arch"][0]
            names = ("cnn", "transformer", "ensemble") if method == "cass" else (method,)
            arms = {name: {"test": {
                "headline": draw(), "multi_label": False, "argmax": {"balanced_accuracy": draw()},
                "threshold_0.5": {"f1_pooled": draw()}}} for name in names}
            result = {"seeds": [{"chosen": names[-1], "arms": arms}], "guess": {"headline": 0.321}}
            (folder / "result.json").write_text(json.dumps(result))
        (folder / "config.json").write_text('{"options": {}, "finished": true}')

    monkeypatch.setattr(tables, "subprocess", SimpleNamespace(run=run))
    return runs


def sweep(folder: Path, out: Path, *words: str) -> None:
    tables.main([*words, "--data", str(folder), "--out", str(out), "--seeds", "2"])


def read(out: Path, name: str) -> dict[tuple, list[str]]:
    """The cells of a written table: {(method, arm, share of labels): the others}."""
    cells = {}
    for line in (out / "tiny-small" / f"{name}.md").read_text().splitlines():
        if line.startswith("|"):
            method, arm, share, *others = line.strip("| ").split(" | ")
            cells[method, arm, share] = cells.get((method, arm, share), []) + others
    return cells


def scores(made: list[dict], seed: int) -> dict[str, dict]:
    """{"supervised NETWORK", "dino.py NETWORK" or "cass.py LOSS": result.json's arms}."""
    found, starts = {}, {run["out"]: run for run in made}
    for run in made:
        if run["script"] == "finetune.py" and run["seed"] == seed:
            start = starts.get(run["weights"], {"script": "supervised", "arch": run["arch"]})
            name = "".join(start.get("arch") or start["loss"])
            result = json.loads((run["out"] / "result.json").read_text())
            found[f"{start['script']} {name}"] = result["seeds"][0]["arms"]
    return found


def test_a_table_holds_the_numbers_of_its_runs(folder, tmp_path, made):
    sweep(folder, tmp_path, "T4", "--labels", "1")
    assert len(made) == 2 * (2 * 2 + 2 * 2 + 2)  # seeds; two losses, two of DINO's, two supervised
    seeds = [scores(made, seed) for seed in (0, 1)]
    ours = [one["cass.py contrast"]["cnn"]["test"] for one in seeds]
    first = [test["headline"] for test in ours]
    cells = read(tmp_path, "T4")
    row = cells["contrast", "cnn", "100%"]
    assert row[0] == f"{np.mean(first):.3f}±{np.std(first, ddof=1):.3f}"
    assert row[1].startswith(f"{np.mean([x['threshold_0.5']['f1_pooled'] for x in ours]):.3f}")
    assert row[5] == "1.0"  # two epochs of half an hour
    assert cells["CASS", "transformer", "100%"][2] == "0.9279±0.0213"  # the paper's
    assert cells["always the same answer", "", "100%"][0] == "0.321"
    chosen, both = (cells["CASS", arm, "100%"][0] for arm in ("chosen", "ensemble"))
    assert chosen == both  # here validation chose the ensemble

    its = [next(iter(one["supervised test_resnet"].values()))["test"]["headline"] for one in seeds]
    gaps = np.subtract(first, its)
    said, error = re.match(r"([+-][\d.]+)±([\d.]+)", row[-1]).groups()
    assert float(said) == pytest.approx(gaps.mean(), abs=1e-3)
    assert float(error) == pytest.approx(gaps.std(ddof=1) / 2**0.5, abs=1e-3)

    text, gain = (tmp_path / "tiny-small" / "T4.md").read_text(), 0.0
    for one in seeds:
        for arm, arch in (("cnn", "test_resnet"), ("transformer", "test_vit")):
            own, other = one["cass.py cosine"][arm], one[f"dino.py {arch}"]["dino"]
            for sign, test in (50, own["test"]), (-50, other["test"]):  # points, mean of two seeds
                gain += sign * test["threshold_0.5"]["f1_pooled"]
    assert float(re.search(r"arms: ([+-][\d.]+) points", text)[1]) == pytest.approx(gain, abs=0.01)
    assert "paper's: +4.47" in text  # 100 * (0.9909 + 0.9279 - 0.9900 - 0.8841), by hand
    assert max(map(len, text.splitlines())) <= 100 and "Not the paper's set-up" in text


def test_tables_share_runs_and_options_or_images_make_others(folder, tmp_path, made):
    sweep(folder, tmp_path, "T6")
    count = len(made)
    assert count == 12
    sweep(folder, tmp_path, "T6", "T9", "--workers", "0")  # how it is run changes no number
    assert len(made) == count + 4  # SGD; Adam is batch 16 of T6
    for words, more in ("--schedule run", 4), ("--epochs 7", 8), ("--precision bf16", 8):
        count = len(made)
        sweep(folder, tmp_path, "T9", *words.split())
        assert len(made) == count + more, words
    put(folder, "cat/another.png")
    sweep(folder, tmp_path, "T9")
    assert len(made) == count + more + 8
    (folder / "cat/another.png").unlink()


def test_an_ablation_changes_pretraining_only(folder, tmp_path, made):
    fixed = {"script", "weights", "out"}
    for name in ("T6", "T7", "T8", "T9", "T14", "T15", "T21"):
        sweep(folder, tmp_path, name, "--size", "paper")
    tuned = [{k: v for k, v in run.items() if k not in fixed}
             for run in made if run["script"] == "finetune.py" and run["seed"] == 0]
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


def test_a_failed_run_leaves_a_gap_and_an_exit_code(folder, tmp_path, made, capsys):
    call = sweep, folder, tmp_path, "T7", "--epochs", "13"  # the row of 100 epochs has 13
    assert "4 runs failed" in sentence(capsys, lambda: call[0](*call[1:]))
    cells = read(tmp_path, "T7")
    assert cells["100 epochs", "cnn", "100%"][:3] == ["", "", "0.8650±0.0001"]
    assert all(cells[f"{n} epochs", "cnn", "100%"][0] for n in (50, 200, 300))
    count = len(made)
    assert "4 runs failed" in sentence(capsys, lambda: call[0](*call[1:]))
    assert len(made) == count + 4  # only those are tried again


def test_bad_options_end_before_anything_is_made(folder, tmp_path, capsys, made):
    flat = put(tmp_path / "flat", *(f"{i}.png" for i in range(20)))
    for words, word in (["T99"], "T99"), (["T4", "--labels", "0.5"], "--labels"), (
            ["T4", "--seeds", "0"], "--seeds"), (["T4", "--device", "abacus"], "--device"), (
            ["T4", "--data", str(flat)], "no labels"), (["T4", "--data", "nowhere"], "nowhere"):
        options = ["--data", str(folder), "--out", str(tmp_path / "out"), *words]
        assert word in sentence(capsys, lambda: tables.main(options))
    assert "--data" in sentence(capsys, lambda: tables.main(["T4"]))
    assert not (tmp_path / "out").exists() and not made


def test_real_runs_make_a_table(folder, tmp_path, monkeypatch):
    def run(command: list, check: bool) -> None:  # as a process would, but without its imports
        SCRIPTS[Path(command[1]).name][1](command[2:])

    monkeypatch.setattr(tables, "subprocess", SimpleNamespace(run=run))
    size = {"image_size": 32, "epochs": 2, "tuning": 1, "out_dim": 16}
    monkeypatch.setitem(tables.SIZES, "small", tables.SIZES["small"] | size)
    rows = [row for row in tables.TABLES["T4"]["rows"] if row["arm"] == "transformer"]
    monkeypatch.setitem(tables.TABLES, "T4", tables.TABLES["T4"] | {"rows": rows})
    words = ["T4", "--data", str(folder), "--out", str(tmp_path), "--labels", "1", "--seeds", "1"]
    tables.main([*words, "--workers", "0"])
    cells = read(tmp_path, "T4")
    for method in ("CASS", "contrast", "DINO", "supervised"):
        row = cells[method, "transformer", "100%"]
        assert 0 <= float(row[0]) <= 1 and 0 <= float(row[1]) <= 1
        if method != "supervised":
            assert -1 <= float(row[3]) <= 1 and float(row[4]) >= 1
