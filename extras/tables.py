"""Every table of the paper as a list of runs: our number, its spread, and the paper's, side by side.

    python -m extras.tables --list
    python -m extras.tables T4 --data ./brain-mri --size small --seeds 3
    python -m extras.tables T1 --data ./brain-mri --size paper

The tables are plain dicts in `extras/paper.py`; add a row by adding a dict. Their runs are made by the
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
from typing import Any

import cass
import dino
import finetune
from data import DataError, ImageSet, Row, open_images, read_table
from extras import audit, speed
from extras.paper import R50, SIZES, SMALL, TABLES, TIMED, VIT
from metrics import gain, mean_and_spread
from runtime import Options, UserError, clear_exit, positive, write_text

# %% the runs behind a table


def options_of(row: dict, args: argparse.Namespace) -> dict:
    """The options of a row's pretraining: those of the size, changed by the row's own. A row's
    `epochs` is a multiple of the size's, so that 50, 100, 200 and 300 keep their ratio when small."""
    size, own = SIZES[args.size] | ({"init": args.init} if args.init else {}), dict(row.get("options", {}))
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
    tune = {k: v for k, v in common.items() if row["method"] == "supervised" or k != "init"} | {
        "labels": labels, "epochs": SIZES[args.size]["tuning"], "schedule": args.schedule}
    if row["method"] == "CASS":
        pretraining = common | o
        return [(cass, pretraining, here),
                (finetune, tune | {"weights": here}, base / f"seed{seed}" / f"{here.name}-tuned-{labels:g}")]
    arch, folder = o[row["arm"]], base / f"seed{seed}" / f"{row['method'].lower()}-{o[row['arm']]}-init{o['init']}"
    if row["method"] == "supervised":
        return [(finetune, tune | {"arch": arch}, folder.with_name(f"{folder.name}-{labels:g}"))]
    folder = folder.with_name(f"{folder.name}-epochs{o['epochs']}")
    head = {"out_dim": SIZES[args.size]["out_dim"]} if "out_dim" in SIZES[args.size] else {}
    return [(dino, common | {"arch": arch, "epochs": o["epochs"]} | head, folder),
            (finetune, tune | {"weights": folder}, folder.with_name(f"{folder.name}-tuned-{labels:g}"))]


def finished(folder: Path) -> dict | None:
    """The options that the finished run in `folder` had, or None."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return config["options"] if config["finished"] else None
    except (OSError, ValueError, KeyError):
        return None


def arms_of(row: dict) -> tuple[str, ...]:
    return ("cnn", "transformer") if row["arm"] == "best" else (row["arm"],)


def make(module, options: dict, folder: Path, shared: list[str]) -> str:
    """Make one run unless it is finished; returns "" or the sentence with which it failed. A finished one that was made
    with other options is not passed off as this one."""
    if (had := finished(folder)) is not None:
        for name, value in options.items():
            before = had.get(name)
            before = before[0] if isinstance(before, list) and len(before) == 1 else before  # --arch may come twice
            same = (before and Path(before).resolve() == value.resolve() if isinstance(value, Path) else
                    before is not None and float(before) == value if isinstance(value, (int, float)) else
                    str(before) == str(value))
            if not same:
                return f"{folder} was made with --{name.replace('_', '-')} {before}, not {value}; choose another --out"
        if "split_file" not in options and had.get("split_file") and Path(had["split_file"]).parent != options.get("weights"):
            return f"{folder} was made with --split-file {had['split_file']}; choose another --out"
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
            print("stopped; the same command goes on where it was", file=sys.stderr)
            raise
        return errors.getvalue().strip().splitlines()[-1].removeprefix("error: ") if end.code else ""
    except Exception as error:  # out of memory, say: the sweep goes on with the next run
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ""


# %% the numbers of a table


def scores_of(row: dict, seed: int, args: argparse.Namespace, metric: str) -> dict:
    """A row's scores with one seed, read from result.json, split.csv and log.jsonl: {column: value}."""
    found: dict[str, Any] = {}
    for module, _, folder in jobs_of(row, seed, args):
        if module is not finetune:
            lines = list(map(json.loads, (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()))
            arm = "backbone" if module is dino else row["arm"]
            found |= {gauge: lines[-1].get(f"{arm}_{gauge}") for gauge in ("cosine", "rank")}
            images = sum(line["split"] == "train" for _, line in read_table(folder / "split.csv")[1])
            found["hours"] = sum(images / line["images_per_second"] / 3600 for line in lines if "images_per_second" in line)
            continue
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        one = result["seeds"][0]
        test = one["arms"][row["arm"] if row["arm"] in one["arms"] else next(iter(one["arms"]))]["test"]
        rule = "threshold_0.5" if metric == "f1_pooled" or "argmax" not in test else "argmax"
        found |= {"headline": test["headline"], "metric": test[rule][metric], "images": test["n"],
                  "headline_name": result["headline"]}
        if "ensemble" in one["arms"]:
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


COLUMNS = ("headline", "metric", "chosen", "ensemble", "cosine", "rank", "hours")


def fill(row: dict, args: argparse.Namespace, shared: list[str], metric: str, made: dict[Path, str]) -> dict:
    """Make what a row needs, seed by seed; the row with (mean, spread, n) a column, its `seeds`, or its failure. `made`
    remembers what was tried. A `best` row is the arm with the better mean."""
    if row["arm"] == "best":
        arms = [fill(row | {"arm": arm}, args, shared, metric, made) for arm in ("cnn", "transformer")]
        better = max(arms, key=lambda one: one["values"].get("headline", (-1,))[0])
        words = filter(None, (row.get("name"), better["values"] and f"the {better['arm']}"))
        return better | {"arm": "best", "name": ", ".join(words)}
    seeds, failed = {}, ""
    for seed in range(args.seeds):
        for job in jobs_of(row, seed, args):
            if job[2] not in made:
                made[job[2]] = make(*job, shared)
            if made[job[2]]:
                failed = made[job[2]]
                break
        else:
            seeds[seed] = scores_of(row, seed, args, metric)
    each = list(seeds.values())
    values = {c: mean_and_spread([s[c] for s in each]) for c in COLUMNS if each and all(s.get(c) is not None for s in each)}
    return row | {"values": values, "failed": failed, "seeds": seeds}


def cell(value: tuple | None, form: str = ".4f") -> str:
    if value is None:
        return ""
    return f"{value[0]:{form}}" + (f" ± {value[1]:{'.2g' if form else ''}}" if value[1] is not None else "")


def head_lines(name: str, args: argparse.Namespace) -> list[str]:
    """The title of a table, and how it departs from the paper's set-up."""
    size = SIZES[args.size]
    lines = [f"### {name}: {TABLES[name]['title']} ({TABLES[name]['data']})", ""]
    departs = []
    if args.size == "small":
        departs += [f"{SMALL[R50]} and {SMALL[VIT]} (and small stand-ins for other networks) at {size['image_size']} pixels"
                    if name != "T1" else f"{' and '.join(TIMED['small'])} at {size['image_size']} pixels"]
    if (args.init or size["init"]) != "imagenet":
        departs.append(f"start weights: {args.init or size['init']}")
    if name != "T1" and (args.epochs or size["epochs"]) != 100:
        departs.append(f"{args.epochs or size['epochs']} epochs of pretraining for the paper's 100")
    if "out_dim" in size and name != "T1":
        departs.append(f"DINO's head with {size['out_dim']:,} outputs for 65,336")
    lines += [TABLES[name]["note"], ""] if "note" in TABLES[name] else []
    return lines + ([f"**{args.size.capitalize()}: not the paper's set-up.** {'; '.join(departs)}.", ""] if departs else [])


def table_lines(name: str, rows: list[dict], args: argparse.Namespace, leaks: int, metric_name: str) -> list[str]:
    """A finished table in Markdown."""
    some = next((one for row in rows for one in row["seeds"].values()), {"images": 0, "headline_name": "score"})
    lines = head_lines(name, args) + [
        f"Data: {args.data.resolve().name}; {some['images']} test images, of which {leaks} also stand in training or validation; "
        f"{args.seeds} seeds; schedule of fine-tuning: {args.schedule}. \"{metric_name}\" is what the paper's figure is nearest "
        "to; cosine and rank are the gauges at the end of pretraining; hours are those of pretraining.", "",
        f"| method | arm | labels | {some['headline_name']} | {metric_name} | paper | chosen arm | ensemble | cosine | rank | "
        "hours | remark |", "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|"]
    for row in rows:
        v, remark = row["values"], "; ".join(filter(None, (row.get("name"), row["failed"] and "failed: " + row["failed"])))
        lines.append(f"| {row['method']} | {row['arm']} | {row['labels']:.0%} | {cell(v.get('headline'))} | "
                     f"{cell(v.get('metric'))} | {cell(row['paper'], '')} | {cell(v.get('chosen'))} | {cell(v.get('ensemble'))} | "
                     f"{cell(v.get('cosine'), '.3f')} | {cell(v.get('rank'), '.1f')} | {cell(v.get('hours'), '.2g')} | {remark} |")
    return lines + gain_lines(rows) + paired_lines(rows)


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


def paired_lines(rows: list[dict]) -> list[str]:
    """What --loss contrast changes against each other method, paired by seed: mean difference of the first score, its
    standard error, and how many of these it is."""
    def of(like: dict, **wanted: str) -> dict:
        return next((row["seeds"] for row in rows if row["arm"] == like["arm"] and row["labels"] == like["labels"]
                     and all(row.get(key, "") == value for key, value in wanted.items())), {})

    others = {"CASS, cosine": {"method": "CASS", "name": ""}, "DINO": {"method": "DINO"}, "supervised": {"method": "supervised"}}
    lines = []
    for row in rows:
        cells = []
        for wanted in others.values() if row.get("name") == "--loss contrast" else ():
            baseline = of(row, **wanted)
            mean, spread, n = mean_and_spread([row["seeds"][s]["headline"] - baseline[s]["headline"]
                                               for s in row["seeds"] if s in baseline] or [0])
            cells.append("" if spread is None else f"{mean:+.4f} ± {spread / n**0.5:.4f}"
                         + (f" ({mean / spread * n**0.5:+.1f})" if spread else ""))
        if any(cells):
            lines.append(f"| {row['arm']} | {row['labels']:.0%} | " + " | ".join(cells) + " |")
    head = ["", "`--loss contrast` minus the others, paired by seed: mean difference of the first score ± its standard error (their "
            "ratio).", "", f"| arm | labels | minus {' | minus '.join(others)} |", "|---|---:|---:|---:|---:|"]
    return head + lines if lines else []


def write_table(name: str, rows: list[dict], lines: list[str], args: argparse.Namespace, leaks: int | None) -> Path:
    """The table as NAME.md and NAME.csv, in the folder of its data set and size."""
    file = args.out / f"{args.data.resolve().name}-{args.size}" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file.with_suffix(".md"), "\n".join(lines) + "\n")
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    if rows:
        table.writerow(["method", "arm", "labels", "name", *(f"{c}_{k}" for c in COLUMNS for k in ("mean", "sd", "n")),
                        "paper_mean", "paper_sd", "test_images", "test_images_leaking", "size", "failed"])
    else:  # Table 1: the cells of its Markdown
        table.writerows([cell.strip() for cell in line.strip("|").split("|")] for line in lines
                        if line.startswith("|") and not line.startswith("|---"))
    for row in rows:
        images = next((one["images"] for one in row["seeds"].values()), "")
        table.writerow([row["method"], row["arm"], row["labels"], row.get("name", ""),
                        *(x for c in COLUMNS for x in row["values"].get(c, ("", "", ""))),
                        *(row["paper"] or ("", "")), images, leaks, args.size, row["failed"]])
    write_text(file.with_suffix(".csv"), text.getvalue())
    return file


# %% the command


def list_tables(args: argparse.Namespace) -> list[str]:
    lines = []
    for name, table in TABLES.items():
        shares = sorted({row["labels"] for row in table["rows"]})
        runs = {job[2] for row in table["rows"] for seed in range(args.seeds) for arm in arms_of(row)
                for job in jobs_of(row | {"arm": arm}, seed, args)}
        lines.append(f"{name:14} {table['data']:12} {len(table['rows']):3d} rows {len(runs):4d} runs  {table['title']}"
                     + (f" ({', '.join(f'{s:.0%}' for s in shares)} of the labels)" if shares else ""))
    return [*lines, f"(runs of {args.seeds} seeds; tables share runs)"]


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
    head = ", 16 outputs" * ("out_dim" in size)  # a small head is nearer to 16 outputs than to 65,336
    step = {"cass": seconds["CASS, both arms"]}
    step |= {f"dino {a}": seconds[f"DINO, {a.split('.')[0]}{head}"] for a in arch.values()}
    lines, counted = [f"{len(images.part('train'))} training images, {steps} steps an epoch; at most, on this machine:"], set()
    for name in names:
        total, jobs = 0.0, [job for row in TABLES[name]["rows"] for s in range(args.seeds) for arm in arms_of(row)
                            for job in jobs_of(row | {"arm": arm}, s, args)]
        for module, o, folder in jobs:
            if folder in counted or finished(folder) is not None:
                continue
            counted.add(folder)
            one = step["cass"] if module is not dino else step.get(f"dino {o['arch']}", max(step.values()))
            total += one * steps * (o["labels"] if module is finetune else 1) * o["epochs"]
        lines.append(f"{name:14} {len({j[2] for j in jobs}):4d} runs {total / 3600:8.1f} hours (runs shared with a table above "
                     "counted there)" if jobs else f"{name:14} times some steps, which takes minutes")
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
    add("--seeds", type=positive(int), default=3, help="each pretrains and fine-tunes anew (paper: 5; default: %(default)s)")
    add("--init", metavar="imagenet|random|FOLDER", help="start weights, instead of the size's; see cass.py --help")
    add("--epochs", type=positive(int), help="epochs of pretraining for the paper's 100, instead of the size's")
    add("--labels", type=finetune.label_share, nargs="+", help="only rows with these shares of the labels, such as 0.01 0.1")
    add("--schedule", choices=("16", "run"), default="16", help="rate of fine-tuning, see finetune.py --help")
    add("--metric", choices=("f1", "recall"), help="the paper's metric (default: recall for ISIC 2019, else pooled F1)")
    add("--split-file", type=Path, help="a split.csv to use, such as the audit's without leaking test images")
    add("--cache", type=Path, metavar="DIR", help="see cass.py --help")
    add("--device", default="auto", help="see cass.py --help")
    add("--precision", default="auto", help="see cass.py --help")
    add("--workers", help="see cass.py --help")
    return parser


def make_tables(args: argparse.Namespace) -> None:
    """Make the tables asked for, one after the other; each is written as soon as it is done."""
    for name in args.tables:
        if name not in TABLES:
            raise UserError(f"there is no table {name}; --list names {', '.join(TABLES)}")
        if args.labels and TABLES[name]["rows"]:
            TABLES[name]["rows"] = [row for row in TABLES[name]["rows"] if row["labels"] in args.labels]
            if not TABLES[name]["rows"]:
                raise UserError(f"{name} has no rows with these --labels; see --list")
    if not args.estimate and (args.list or not args.tables):
        args.data = args.data or Path("data")
        return print("\n".join(list_tables(args)))
    if args.data is None:
        raise UserError("--data names the folder of images to make the tables on")
    args.split, args.ratios, args.split_seed, args.skip_bad = "auto", (0.7, 0.1, 0.2), 0, False
    images = open_images(args)
    if args.estimate:
        return print("\n".join(estimate(args.tables or list(TABLES), args)))
    if not images.classes and args.tables != ["T1"]:
        raise UserError(f"{args.data} has no labels, which these tables need")
    args.out.mkdir(parents=True, exist_ok=True)
    shared = ["--device", args.device, "--precision", args.precision] + (
        ["--workers", args.workers] if args.workers else []) + (["--cache", str(args.cache)] if args.cache else [])
    leaks, made, scored = None, {}, False
    for name in args.tables:
        rows: list[dict] = []
        if name == "T1":
            cnn, transformer = TIMED[args.size]
            lines = head_lines(name, args) + speed.time_table(speed.speed_options().parse_args(
                ["--data", str(args.data), "--cnn", cnn, "--transformer", transformer, "--init", "random", "--image-size",
                 str(SIZES[args.size]["image_size"]), "--epochs", str(args.epochs or 100), *shared]))
            scored = True
        else:
            recall = args.metric == "recall" or not args.metric and TABLES[name]["data"] == "ISIC 2019"
            metric = "balanced_accuracy" if recall else "f1_pooled"
            rows = [fill(row, args, shared, metric, made) for row in TABLES[name]["rows"]]
            leaks = count_leaks(images) if leaks is None else leaks
            lines = table_lines(name, rows, args, leaks, "recall" if recall else "pooled F1 at 0.5")
            scored |= any(row["values"] for row in rows)
        file = write_table(name, rows, lines, args, leaks)
        print("\n".join(["", *lines, "", f"written to {file}.md and .csv"]))
    if not scored:
        raise UserError("every run failed; the remarks in the table say why")


def main(argv: list[str] | None = None) -> None:
    args = tables_options().parse_args(argv)
    with clear_exit(DataError):
        make_tables(args)


if __name__ == "__main__" and "__file__" in globals():
    main()
