"""Every table of the paper as a list of runs: our number, its spread, and the paper's, side by side.

    python -m extras.tables --list
    python -m extras.tables T4 --data ./brain-mri --size small --seeds 3
    python -m extras.tables T1 --data ./brain-mri --size paper

A table is a list of plain dicts in `TABLES`; add a row by adding a dict. Its runs are made by the
commands of this project, each in a folder of its own; those that are finished are not made again,
and tables share them. A sweep that was stopped goes on where it was.
"""

import argparse
import contextlib
import csv
import io
import json
import shlex
import sys
from pathlib import Path

import cass
import dino
import finetune
from data import DataError, ImageSet, Row, open_images
from extras import audit, speed
from metrics import gain, mean_and_spread
from runtime import Options, UserError, clear_exit, pick_device, write_text

# %% the tables: rows are dicts; `paper` is (mean, spread) as printed; what is not named is the paper's set-up

R50, VIT = "resnet50.a1_in1k", "vit_base_patch16_384.augreg_in21k_ft_in1k"
SIZES = {  # small: what 2 CPU cores carry; it is not the paper's set-up, and every table says so
    "paper": {"cnn": R50, "transformer": VIT, "image_size": 384, "init": "imagenet", "epochs": 100, "tuning": 50},
    "small": {"cnn": R50, "transformer": VIT, "image_size": 96, "init": "random", "epochs": 20, "tuning": 50,
              "out_dim": 1024},  # DINO's head: 65,336 outputs would outweigh the small networks
}
SMALL = {  # the network that stands in for each of the paper's at --size small
    R50: "test_resnet", VIT: "test_vit", "resnet18.a1_in1k": "resnet10t", "resnet200": "resnet14t",
    "vit_large_patch16_384.augreg_in21k_ft_in1k": "test_vit2", "deit_base_patch16_384.fb_in1k": "test_vit3",
    "densenet161.tv_in1k": "test_efficientnet", "swin_base_patch4_window12_384.ms_in22k_ft_in1k": "test_vit4"}


def compare(*figures: tuple) -> list[dict]:
    """Rows of Tables 2 to 5 from (method, arm, {share of labels: (mean, spread)}); CASS's rows come again
    with the loss that is not the paper's."""
    rows = [{"method": method, "arm": arm, "labels": labels, "paper": paper}
            for method, arm, scores in figures for labels, paper in scores.items()]
    return rows + [row | {"paper": None, "name": "--loss contrast", "options": {"loss": "contrast"}}
                   for row in rows if row["method"] == "CASS"]


def ablate(*rows: tuple) -> list[dict]:
    """Rows of an ablation of pretraining from (name, options, CNN's figure, Transformer's figure)."""
    return [{"method": "CASS", "arm": arm, "labels": 1, "paper": paper, "name": name, "options": options}
            for name, options, *papers in rows for arm, paper in zip(("cnn", "transformer"), papers)]


def supervised(*rows: tuple) -> list[dict]:
    """Rows of supervised training from (name, timm name, figure, other options if any)."""
    return [{"method": "supervised", "arm": "cnn", "labels": 1, "paper": paper, "name": name,
             "options": {"cnn": arch} | (more[0] if more else {})} for name, arch, paper, *more in rows]


def best(method: str, scores: dict) -> list[dict]:
    return [{"method": method, "arm": "best", "labels": labels, "paper": paper} for labels, paper in scores.items()]


AUTO, BRAIN = "autoimmune", "brain MRI"
BASE_AUTO, BASE_BRAIN = ((0.8650, 0.0001), (0.8894, 0.005)), ((0.9909, 0.0032), (0.9279, 0.0213))
TABLES = {
    "T1": {"title": "Time of CASS against DINO", "data": "any", "rows": []},
    "T2": {"title": "Autoimmune biopsies", "data": AUTO, "rows": compare(
        ("DINO", "cnn", {0.1: (0.8237, 0.001), 1: (0.84252, 0.008)}),
        ("CASS", "cnn", {0.1: (0.8158, 0.0055), 1: (0.8650, 0.0001)}),
        ("supervised", "cnn", {0.1: (0.819, 0.0216), 1: (0.83895, 0.007)}),
        ("DINO", "transformer", {0.1: (0.8445, 0.0008), 1: (0.8639, 0.002)}),
        ("CASS", "transformer", {0.1: (0.8717, 0.005), 1: (0.8894, 0.005)}),
        ("supervised", "transformer", {0.1: (0.8356, 0.007), 1: (0.8420, 0.009)}))},
    "T3": {"title": "Dermofit", "data": "Dermofit", "rows": compare(
        ("DINO", "cnn", {0.1: (0.3749, 0.0011), 1: (0.6775, 0.0005)}),
        ("CASS", "cnn", {0.1: (0.4367, 0.0002), 1: (0.7132, 0.0003)}),
        ("supervised", "cnn", {0.1: (0.33, 0.0001), 1: (0.6341, 0.0077)}),
        ("DINO", "transformer", {0.1: (0.332, 0.0002), 1: (0.4810, 0.0012)}),
        ("CASS", "transformer", {0.1: (0.3896, 0.0013), 1: (0.6667, 0.0002)}),
        ("supervised", "transformer", {0.1: (0.299, 0.002), 1: (0.456, 0.0077)}))},
    "T4": {"title": "Brain tumour MRI", "data": BRAIN, "rows": compare(
        ("DINO", "cnn", {0.01: (0.63405, 0.09), 0.1: (0.92325, 0.02819), 1: (0.9900, 0.0058)}),
        ("CASS", "cnn", {0.01: (0.40816, 0.13), 0.1: (0.8925, 0.0254), 1: (0.9909, 0.0032)}),
        ("supervised", "cnn", {0.01: (0.52, 0.018), 0.1: (0.9022, 0.011), 1: (0.9899, 0.003)}),
        ("DINO", "transformer", {0.01: (0.3211, 0.071), 0.1: (0.7529, 0.044), 1: (0.8841, 0.0052)}),
        ("CASS", "transformer", {0.01: (0.3345, 0.11), 0.1: (0.7833, 0.0259), 1: (0.9279, 0.0213)}),
        ("supervised", "transformer", {0.01: (0.3017, 0.077), 0.1: (0.747, 0.0245), 1: (0.8719, 0.017)}))},
    "T5": {"title": "ISIC 2019", "data": "ISIC 2019", "rows": compare(
        ("DINO", "cnn", {0.01: (0.328, 0.0016), 0.1: (0.3797, 0.0027), 1: (0.493, 3.9e-05)}),
        ("CASS", "cnn", {0.01: (0.3617, 0.0047), 0.1: (0.41, 0.0019), 1: (0.543, 2.85e-05)}),
        ("supervised", "cnn", {0.01: (0.2640, 0.031), 0.1: (0.3070, 0.0121), 1: (0.35, 0.006)}),
        ("DINO", "transformer", {0.01: (0.3676, 0.012), 0.1: (0.3998, 0.056), 1: (0.5408, 0.001)}),
        ("CASS", "transformer", {0.01: (0.3973, 0.0465), 0.1: (0.4395, 0.0179), 1: (0.5819, 0.0015)}),
        ("supervised", "transformer", {0.01: (0.3074, 0.0005), 0.1: (0.3586, 0.0314), 1: (0.42, 0.007)}))},
    "T6": {"title": "Batch size", "data": AUTO, "rows": ablate(
        ("batch 8", {"batch_size": 8}, (0.88285, 0.0011), (0.8844, 0.0009)), ("batch 16", {}, *BASE_AUTO),
        ("batch 32", {"batch_size": 32}, (0.8648, 0.0005), (0.889, 0.0064)))},
    "T7": {"title": "Epochs of pretraining", "data": AUTO, "rows": ablate(
        ("50 epochs", {"epochs": 0.5}, (0.8521, 0.0007), (0.8765, 0.0021)), ("100 epochs", {}, *BASE_AUTO),
        ("200 epochs", {"epochs": 2}, (0.8766, 0.001), (0.9053, 0.008)),
        ("300 epochs", {"epochs": 3}, (0.8777, 0.004), (0.9091, 8.2e-5)))},
    "T8": {"title": "Augmentations", "data": AUTO, "rows": ablate(
        ("CASS only", {}, *BASE_AUTO), ("+ solarize", {"augment": "solarize"}, (0.8551, 0.0004), (0.81455, 0.002)),
        ("+ blur", {"augment": "blur"}, (0.864, 4.2e-05), (0.8604, 0.0029)),
        ("+ blur, solarize", {"augment": "blur+solarize"}, (0.8573, 2.59e-05), (0.8513, 0.0066)))},
    "T9": {"title": "Optimiser of the CNN", "data": AUTO, "rows": ablate(
        ("Adam", {}, *BASE_AUTO), ("SGD", {"cnn_optimizer": "sgd"}, (0.8648, 0.0005), (0.82355, 0.0064)))},
    "T10": {"title": "Transformer", "data": AUTO, "rows": ablate(
        ("ViT-B/16", {}, (0.8650, 0.001), (0.8894, 0.005)),
        ("ViT-L/16", {"transformer": "vit_large_patch16_384.augreg_in21k_ft_in1k"}, (0.8481, 0.001), (0.853, 0.004)))},
    "T11": {"title": "Supervised, for T10", "data": AUTO, "rows": supervised(
        ("ResNet-50", R50, (0.83895, 0.007)), ("ViT-B/16", VIT, (0.8420, 0.009)),
        ("ViT-L/16", "vit_large_patch16_384.augreg_in21k_ft_in1k", (0.80495, 0.0077)))},
    "T12": {"title": "CNN", "data": AUTO, "rows": ablate(
        ("ResNet-18", {"cnn": "resnet18.a1_in1k"}, (0.8674, 4.8e-5), (0.8773, 5.29e-5)),
        ("ResNet-50", {}, (0.8680, 0.001), (0.8894, 0.0005)),
        ("ResNet-200, random start", {"cnn": "resnet200", "cnn_init": "random"}, (0.8517, 0.0009), (0.874, 0.0006)))},
    "T13": {"title": "Supervised, for T12", "data": AUTO, "rows": supervised(
        ("ResNet-18", "resnet18.a1_in1k", (0.8499, 0.0004)), ("ResNet-50", R50, (0.83895, 0.007)),
        ("ResNet-200, random start", "resnet200", (0.833, 0.0005), {"init": "random"}))},
    "T14": {"title": "Batch size", "data": BRAIN, "rows": ablate(
        ("batch 8", {"batch_size": 8}, (0.9895, 0.0025), (0.93158, 0.0109)), ("batch 16", {}, *BASE_BRAIN),
        ("batch 32", {"batch_size": 32}, (0.9848, 0.011), (0.9176, 0.006)))},
    "T15": {"title": "Epochs of pretraining", "data": BRAIN, "rows": ablate(
        ("50 epochs", {"epochs": 0.5}, (0.9795, 0.0109), (0.9262, 0.0181)), ("100 epochs", {}, *BASE_BRAIN),
        ("200 epochs", {"epochs": 2}, (0.9864, 0.008), (0.9476, 0.0012)),
        ("300 epochs", {"epochs": 3}, (0.9920, 0.001), (0.9484, 0.017)))},
    "T16": {"title": "CNN", "data": BRAIN, "rows": ablate(
        ("ResNet-18", {"cnn": "resnet18.a1_in1k"}, (0.9913, 0.002), (0.9801, 0.007)), ("ResNet-50", {}, *BASE_BRAIN),
        ("ResNet-200, random start", {"cnn": "resnet200", "cnn_init": "random"}, (0.9898, 0.005), (0.9276, 0.017)))},
    "T17": {"title": "Transformer", "data": BRAIN, "rows": ablate(
        ("DeiT-B/16", {"transformer": "deit_base_patch16_384.fb_in1k"}, (0.9902, 0.0025), (0.9844, 0.0048)),
        ("ViT-B/16", {}, *BASE_BRAIN),
        ("ViT-L/16", {"transformer": "vit_large_patch16_384.augreg_in21k_ft_in1k"}, (0.98945, 2.45e-5), (0.8896, 0.0009)))},
    "T18": {"title": "Two CNNs", "data": BRAIN, "rows": ablate(
        ("ResNet-50, ViT-B/16", {}, *BASE_BRAIN),
        ("ResNet-50, DenseNet-161", {"transformer": "densenet161.tv_in1k"}, (0.9743, 8.8e-5), (0.98365, 9.63e-5)))},
    "T19": {"title": "Two Transformers", "data": BRAIN, "rows": ablate(
        ("ResNet-50, ViT-B/16", {}, *BASE_BRAIN),
        ("Swin-B, ViT-B/16", {"cnn": "swin_base_patch4_window12_384.ms_in22k_ft_in1k"}, (0.9883, 1.26e-5), (0.94, 8.12e-5)))},
    "T20": {"title": "Start weights", "data": BRAIN, "rows": ablate(
        ("random", {"init": "random"}, (0.9907, 0.009), (0.9316, 0.027)), ("ImageNet", {"init": "imagenet"}, *BASE_BRAIN))},
    "T21": {"title": "Function on the outputs", "data": AUTO, "rows": ablate(
        ("none", {}, *BASE_AUTO), ("sigmoid", {"outputs": "sigmoid"}, (0.8296, 0.00024), (0.8322, 0.004)),
        ("softmax", {"outputs": "softmax"}, (0.8188, 0.0001), (0.8093, 0.00011)))},
    "F19-autoimmune": {"title": "First version, Table 19: best arm", "data": AUTO, "rows":
        best("CASS", {0.1: (0.8717, 0.005), 1: (0.8894, 0.005)}) + best("DINO", {0.1: (0.8445, 0.0008), 1: (0.8639, 0.002)})
        + best("supervised", {0.1: (0.8356, 0.007), 1: (0.8420, 0.009)})},
    "F19-brain": {"title": "First version, Table 19: best arm", "data": BRAIN, "rows":
        best("CASS", {0.01: (0.40816, 0.13), 0.1: (0.8925, 0.0254), 1: (0.9909, 0.0058)})
        + best("DINO", {0.01: (0.63405, 0.09), 0.1: (0.92325, 0.02819), 1: (0.9900, 0.0032)})
        + best("supervised", {0.01: (0.3717, 0.077), 0.1: (0.9022, 0.011), 1: (0.9899, 0.003)})},
    "F19-isic": {"title": "First version, Table 19: best arm", "data": "ISIC 2019", "rows":
        best("CASS", {0.01: (0.7258, 0.0465), 0.1: (0.6195, 0.0179), 1: (0.6519, 0.001)})
        + best("DINO", {0.01: (0.518, 3.9e-08), 0.1: (0.3646, 0.0765), 1: (0.3908, 0.001)})
        + best("supervised", {0.01: (0.52, 0.018), 0.1: (0.3097, 0.0314), 1: (0.35, 0.006)})},
}


# %% the runs behind a table


def options_of(row: dict, args: argparse.Namespace) -> dict:
    """The options of a row's pretraining: those of the size, changed by the row's own. A row's
    `epochs` is a multiple of the size's, so that 50, 100, 200 and 300 keep their ratio when small."""
    size, own = SIZES[args.size], dict(row.get("options", {}))
    options = {key: size[key] for key in ("cnn", "transformer", "image_size", "init", "epochs")} | own
    options["epochs"] = max(1, round(size["epochs"] * own.get("epochs", 1)))
    if args.epochs:
        options["epochs"] = max(1, round(args.epochs * own.get("epochs", 1)))
    if first := options.pop("cnn_init", None):  # cass.py takes a start for each arm, joined by a comma
        options["init"] = ",".join(dict.fromkeys((first, options["init"])))
    if args.size == "small":
        options |= {arm: SMALL[options[arm]] for arm in ("cnn", "transformer")}
    if row["method"] != "CASS":  # an ablation changes pretraining by CASS only
        options = {key: options[key] for key in ("cnn", "transformer", "image_size", "init", "epochs")}
    return options


def jobs_of(row: dict, seed: int, args: argparse.Namespace) -> list[tuple]:
    """The runs a row needs with one seed, in order: (module, options, folder). Equal options give
    equal folders, which is how tables share runs."""
    o, labels = options_of(row, args), row["labels"]
    base = args.out / f"{args.data.resolve().name}-{args.size}"
    common = {"data": args.data, "image_size": o["image_size"], "init": o["init"], "seed": seed} | (
        {"split_file": args.split_file} if args.split_file else {})
    changed = {k: v for k, v in o.items() if k not in ("cnn", "transformer", "image_size")}
    name = "-".join([o["cnn"], o["transformer"], *(f"{k.replace('_', '')}{v}" for k, v in sorted(changed.items()))])
    here = base / f"seed{seed}" / f"{row['method'].lower()}-{name}"
    tune = {k: v for k, v in common.items() if row["method"] == "supervised" or k != "init"} | {"labels": labels, "epochs": SIZES[args.size]["tuning"], "schedule": args.schedule}
    arms = ("cnn", "transformer") if row["arm"] == "best" or row["method"] == "CASS" else (row["arm"],)
    if row["method"] == "CASS":
        pretraining = common | o
        return [(cass, pretraining, here),
                (finetune, tune | {"weights": here}, base / f"seed{seed}" / f"{here.name}-tuned-{labels:g}")]
    found = []
    for arm in arms:
        arch, folder = o[arm], base / f"seed{seed}" / f"{row['method'].lower()}-{o[arm]}-init{o['init']}"
        if row["method"] == "DINO":
            folder = folder.with_name(f"{folder.name}-epochs{o['epochs']}")
            head = {"out_dim": SIZES[args.size]["out_dim"]} if "out_dim" in SIZES[args.size] else {}
            found.append((dino, common | {"arch": arch, "epochs": o["epochs"]} | head, folder))
            found.append((finetune, tune | {"weights": folder}, folder.with_name(f"{folder.name}-tuned-{labels:g}")))
        else:
            found.append((finetune, tune | {"arch": arch}, folder.with_name(f"{folder.name}-{labels:g}")))
    return found


def make(module, options: dict, folder: Path, shared: list[str]) -> str:
    """Make one run unless it is finished; returns "" or the sentence with which it failed."""
    config = folder / "config.json"
    if config.is_file() and json.loads(config.read_text(encoding="utf-8"))["finished"]:
        return ""
    arguments = [x for key, value in options.items() for x in (f"--{key.replace('_', '-')}", str(value))]
    arguments += [*shared, "--out", str(folder), "--resume"]
    print(f"$ python {module.__name__}.py {shlex.join(arguments)}", flush=True)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            module.main(arguments)
    except SystemExit as end:
        if end.code == 130:  # Ctrl-C ends the sweep, too
            raise
        return errors.getvalue().strip().splitlines()[-1].removeprefix("error: ") if end.code else ""
    except Exception as error:  # out of memory, say: the sweep goes on with the next run
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ""


# %% the numbers of a table


def scores_of(row: dict, seed: int, args: argparse.Namespace, metric: tuple[str, str]) -> dict[str, float]:
    """A row's scores with one seed, read from result.json and log.jsonl: {column: value}."""
    found: dict[str, float] = {}
    for module, _, folder in jobs_of(row, seed, args):
        if module is not finetune:
            lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
            last, arm = json.loads(lines[-1]), "backbone" if module is dino else row["arm"]
            found |= {gauge: last[f"{arm}_{gauge}"] for gauge in ("cosine", "rank") if f"{arm}_{gauge}" in last}
            continue
        one = json.loads((folder / "result.json").read_text(encoding="utf-8"))["seeds"][0]
        names = list(one["arms"])
        wanted = [row["arm"]] if row["arm"] in names else [n for n in names if n != "ensemble"]
        for name in wanted:
            test = one["arms"][name]["test"]
            value = {"headline": test["headline"], "metric": test[metric[0]][metric[1]], "images": test["n"]}
            if value["headline"] > found.get("headline", -1):
                found |= value
        if "ensemble" in names:
            found |= {"ensemble": one["arms"]["ensemble"]["test"]["headline"],
                      "chosen": one["arms"][one["chosen"]]["test"]["headline"]}
    return found


def count_leaks(images: ImageSet) -> int:
    """Test images whose decoded pixels also stand in training or validation (extras/audit.py says more)."""
    def digest(row: Row) -> bytes | str:
        look = audit.look_at(images.folder / row.path)
        return look if isinstance(look, str) else look.digest

    seen = {digest(row) for part in ("train", "val") for row in images.part(part)}
    return sum(digest(row) in seen for row in images.part("test"))


COLUMNS = ("headline", "metric", "chosen", "ensemble", "cosine", "rank")


def fill(row: dict, args: argparse.Namespace, shared: list[str], metric: tuple[str, str]) -> dict:
    """Make what a row needs, seed by seed; the row with (mean, spread, n) a column, or its failure."""
    seeds, failed = [], ""
    for seed in range(args.seeds):
        reasons = [make(*job, shared) for job in jobs_of(row, seed, args)]
        failed = next(filter(None, reasons), "") or failed
        if not any(reasons):
            seeds.append(scores_of(row, seed, args, metric))
    values = {c: mean_and_spread([s[c] for s in seeds]) for c in COLUMNS if seeds and all(s.get(c) is not None for s in seeds)}
    return row | {"values": values, "failed": failed, "images": seeds[0]["images"] if seeds else None}


def cell(value: tuple | None) -> str:
    if value is None:
        return ""
    mean, spread = value[0], value[1]
    return f"{mean:.4f}" + (f" ± {spread:.2g}" if spread is not None else "")


def table_lines(name: str, rows: list[dict], args: argparse.Namespace, leaks: int, metric_name: str) -> list[str]:
    """A finished table in Markdown."""
    size = SIZES[args.size]
    images = next((row["images"] for row in rows if row["images"]), 0)
    lines = [f"### {name}: {TABLES[name]['title']} ({TABLES[name]['data']})", ""]
    if args.size == "small":
        lines += [f"**Small: not the paper's set-up.** {SMALL[R50]} and {SMALL[VIT]} (and small stand-ins for other "
                  f"networks) at {size['image_size']} pixels from random weights, {args.epochs or size['epochs']} epochs "
                  f"of pretraining for the paper's 100, DINO's head with {size['out_dim']:,} outputs for 65,336.", ""]
    lines += [f"Data: {args.data.name}; {images} test images, of which {leaks} also stand in training; {args.seeds} "
              f"seeds; schedule of fine-tuning: {args.schedule}. \"{metric_name}\" is what the paper's figure is nearest to.", "",
              f"| method | arm | labels | macro F1 (argmax) | {metric_name} | paper | chosen arm | ensemble | "
              "cosine | rank | remark |", "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|"]
    for row in rows:
        v = row["values"]
        lines.append(f"| {row['method']} | {row['arm']} | {row['labels']:.0%} | {cell(v.get('headline'))} | "
                     f"{cell(v.get('metric'))} | {cell(row['paper'])} | {cell(v.get('chosen'))} | "
                     f"{cell(v.get('ensemble'))} | {cell(v.get('cosine'))} | {cell(v.get('rank'))} | "
                     f"{row.get('name', '')}{'; ' if row['failed'] and row.get('name') else ''}"
                     f"{'failed: ' + row['failed'] if row['failed'] else ''} |")
    return lines + gain_lines(rows)


def gain_lines(rows: list[dict]) -> list[str]:
    """CASS's gain over DINO on this data set (paper, G.0.3), ours and the paper's, for each share."""
    lines = []
    for labels in dict.fromkeys(row["labels"] for row in rows):
        ours, paper = {}, {}
        for row in rows:
            if row["labels"] == labels and row["arm"] != "best" and not row.get("options"):
                ours[row["method"], row["arm"]] = row["values"].get("metric", (None,))[0]
                paper[row["method"], row["arm"]] = row["paper"] and row["paper"][0]
        needed = [(method, arm) for method in ("CASS", "DINO") for arm in ("cnn", "transformer")]
        if all(ours.get(key) is not None for key in needed):
            each = [gain({"here": [v[k] for k in needed[:2]]}, {"here": [v[k] for k in needed[2:]]}, ["here"])
                    for v in (ours, paper)]
            lines.append(f"Gain of CASS over DINO at {labels:.0%} of the labels, both arms: {each[0]:+.2f} points; "
                         f"the paper's figures give {each[1]:+.2f}.")
    return ["", *lines] if lines else []


def write_table(name: str, rows: list[dict], lines: list[str], folder: Path) -> None:
    """The table as NAME.md and NAME.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{name}.md", "\n".join(lines) + "\n")
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["method", "arm", "labels", "name", *(f"{c}_{k}" for c in COLUMNS for k in ("mean", "sd", "n")),
                    "paper_mean", "paper_sd", "failed"])
    for row in rows:
        table.writerow([row["method"], row["arm"], row["labels"], row.get("name", ""),
                        *(x for c in COLUMNS for x in row["values"].get(c, ("", "", ""))),
                        *(row["paper"] or ("", "")), row["failed"]])
    write_text(folder / f"{name}.csv", text.getvalue())


# %% the command


def list_tables() -> list[str]:
    lines = []
    for name, table in TABLES.items():
        shares = sorted({row["labels"] for row in table["rows"]})
        lines.append(f"{name:14} {table['data']:12} {len(table['rows']):3d} rows  {table['title']}"
                     + (f" ({', '.join(f'{s:.0%}' for s in shares)} of the labels)" if shares else ""))
    return lines


def estimate(names: list[str], args: argparse.Namespace) -> list[str]:
    """Hours that the runs still missing will take at most, from steps timed on this machine with the
    networks of the size; other networks of an ablation are taken to cost the same."""
    size, images = SIZES[args.size], open_images(args)
    arch = {arm: SMALL[size[arm]] if args.size == "small" else size[arm] for arm in ("cnn", "transformer")}
    parsed = speed.speed_options().parse_args(
        ["--data", str(args.data), "--cnn", arch["cnn"], "--transformer", arch["transformer"], "--init", "random",
         "--image-size", str(size["image_size"]), "--steps", "4", "--warm-up", "1", "--rounds", "1",
         "--device", args.device, "--precision", args.precision])
    found, steps = speed.measure(parsed)
    seconds = {name: sum(one["step"]) / len(one["step"]) for name, one in found.items()}
    step = {"cass": seconds["CASS, both arms"]}
    step |= {f"dino {a}": seconds[f"DINO, {a.split('.')[0]}"] for a in arch.values()}
    lines, made = [f"{len(images.part('train'))} training images, {steps} steps an epoch; at most, on this machine:"], set()
    for name in names:
        total = 0.0
        jobs = [job for row in TABLES[name]["rows"] for s in range(args.seeds) for job in jobs_of(row, s, args)]
        for module, o, folder in jobs:
            if folder in made or (folder / "result.json").exists():
                continue
            made.add(folder)
            one = step["cass"] if module is not dino else step.get(f"dino {o['arch']}", max(step.values()))
            share = o["labels"] if module is finetune else 1
            total += one * steps * share * o["epochs"]
        lines.append(f"{name:14} {len({j[2] for j in jobs}):4d} runs {total / 3600:8.1f} hours (runs shared with a table above counted there)")
    return lines


def tables_options() -> argparse.ArgumentParser:
    parser = Options("python -m extras.tables", "Make the paper's tables from runs of this project.")
    add = parser.add_argument
    add("tables", nargs="*", metavar="TABLE", help="such as T4 or T4 T14; see --list")
    add("--list", action="store_true", help="name all tables")
    add("--estimate", action="store_true", help="say how many hours the tables would take here, and make nothing")
    add("--data", type=Path, help="folder of images")
    add("--out", type=Path, default=Path("runs/tables"), help="where runs and tables go (default: %(default)s)")
    add("--size", choices=tuple(SIZES), default="small", help="small: small networks, 96 pixels, random weights, "
        "20 epochs; paper: the paper's set-up (default: %(default)s)")
    add("--seeds", type=int, default=3, help="each pretrains and fine-tunes anew (paper: 5; default: %(default)s)")
    add("--epochs", type=int, help="epochs of pretraining for the paper's 100, instead of the size's")
    add("--labels", type=float, nargs="*", help="only rows with these shares of the labels, such as 0.01 0.1")
    add("--schedule", choices=("16", "run"), default="16", help="rate of fine-tuning, see finetune.py --help")
    add("--metric", choices=("f1", "recall"), help="the paper's metric (default: recall for ISIC 2019, else pooled F1)")
    add("--split-file", type=Path, help="a split.csv to use, such as the audit's without leaking test images")
    add("--device", default="auto", help="see cass.py --help")
    add("--precision", default="auto", help="see cass.py --help")
    add("--workers", help="see cass.py --help")
    return parser


def make_tables(args: argparse.Namespace) -> None:
    """Make the tables asked for, one after the other; each is written as soon as it is done."""
    for name in args.tables:
        if name not in TABLES:
            raise UserError(f"there is no table {name}; --list names {', '.join(TABLES)}")
        if args.labels:
            TABLES[name]["rows"] = [row for row in TABLES[name]["rows"] if row["labels"] in args.labels]
    if args.list or not args.tables:
        return print("\n".join(list_tables()))
    if args.data is None:
        raise UserError("--data names the folder of images to make the tables on")
    args.split, args.ratios, args.split_seed, args.skip_bad = "auto", (0.7, 0.1, 0.2), 0, False
    if args.estimate:
        return print("\n".join(estimate(args.tables, args)))
    shared = ["--device", args.device, "--precision", args.precision] + (
        ["--workers", args.workers] if args.workers else [])
    for name in args.tables:
        if name == "T1":
            size = SIZES[args.size]
            arch = {arm: SMALL[size[arm]] if args.size == "small" else size[arm] for arm in ("cnn", "transformer")}
            lines = speed.time_table(speed.speed_options().parse_args(
                ["--data", str(args.data), "--cnn", arch["cnn"], "--transformer", arch["transformer"], "--init", "random",
                 "--image-size", str(size["image_size"]), "--epochs", str(args.epochs or 100), *shared]))
            rows: list[dict] = []
        else:
            recall = args.metric == "recall" or not args.metric and TABLES[name]["data"] == "ISIC 2019"
            metric = ("argmax", "balanced_accuracy") if recall else ("threshold_0.5", "f1_pooled")
            rows = [fill(row, args, shared, metric) for row in TABLES[name]["rows"]]
            leaks = count_leaks(open_images(args))
            lines = table_lines(name, rows, args, leaks, "recall" if recall else "pooled F1 at 0.5")
        write_table(name, rows, lines, args.out)
        print("\n".join(["", *lines, "", f"written to {args.out / name}.md and .csv"]))


def main(argv: list[str] | None = None) -> None:
    args = tables_options().parse_args(argv)
    with clear_exit(DataError):
        make_tables(args)


if __name__ == "__main__" and "__file__" in globals():
    main()
