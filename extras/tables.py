"""Every table of the paper as a list of runs: our number and the paper's, side by side.

    python -m extras.tables --list
    python -m extras.tables T4 --data ./brain-mri --size small --seeds 3
    python -m extras.tables T4 --data ./brain-mri --print > runs.txt

Each run is a command of this project in a folder named by a digest of options and images: tables
share runs, and a sweep that was stopped goes on. To share out the lines of runs.txt, pretraining
first: `grep -v finetune.py runs.txt | xargs -P 2 -L 1 env`.
"""

import argparse
import hashlib
import json
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # if it is run by its path

from data import DataError, read_images, read_split, require, split_images
from extras import speed
from extras.curves import read_log
from extras.paper import ARMS, ISIC, SIZES, SMALL, SMALL_TIMED, TABLES, TIMES
from metrics import mean_and_spread
from runtime import clear_exit, command_parser, pick_device, positive, read_config, write_text

# %% the runs behind a table


def typed(options: dict) -> list[str]:
    """Options as they are typed; None is left out."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()
            if value is not None]


def runs_of(row: dict, seed: int, args: argparse.Namespace) -> dict[Path, list[str]]:
    """The runs a row needs with one seed, in order: {folder: script and options}. Equal options
    and images give equal folders."""
    size, own, runs = args.setup, dict(row["options"]), {}
    arms = {arm: own.pop(arm, name) for arm, name in ARMS.items()}
    if args.size == "small":
        arms = {arm: SMALL[name] for arm, name in arms.items()}
    arch = arms.get(row["arm"], "")
    start = {"init": own.pop("init", "START").replace("START", size["init"]),
             "epochs": max(1, round(size["epochs"] * own.pop("epochs", 1)))}
    tuning = {"labels": row["labels"], "epochs": size["tuning"], "schedule": args.schedule}

    def add(script: str, name: str, options: dict, weights: Path | None = None) -> Path:
        options |= {"image_size": size["image_size"], "seed": seed, "precision": args.precision}
        words = [script, *typed(options)]
        digest = hashlib.sha256(" ".join([args.images, name, *words]).encode()).hexdigest()[:10]
        folder = args.folder / f"seed{seed}" / f"{name}-{digest}"
        runs[folder] = words + args.shared + typed({"weights": weights, "out": folder})
        return folder

    if row["method"] == "supervised":
        add("finetune.py", f"supervised-{arch}", tuning | {"init": start["init"], "arch": arch})
        return runs
    if row["method"] == "CASS":
        folder = add("cass.py", "cass", start | arms | own)
    else:
        folder = add("dino.py", f"dino-{arch}", start | {"arch": arch, "out_dim": size["out_dim"]})
    add("finetune.py", f"{folder.name}-tuned", tuning, folder)
    return runs


def missing_runs(rows: list[dict], args: argparse.Namespace) -> list[list[str]]:
    """Script and options of every run that the rows still need; pretraining before the others."""
    runs = {}
    for seed in range(args.seeds):
        for row in rows:
            runs |= runs_of(row, seed, args)
    missing = [words for folder, words in runs.items() if not finished(folder)]
    return sorted(missing, key=lambda words: words[0] == "finetune.py")


def finished(folder: Path) -> bool:
    return (folder / "config.json").is_file() and read_config(folder).get("finished") is True


def numbers_of(row: dict, seed: int, args: argparse.Namespace, metric: str) -> dict[str, float]:
    """What a row reached with one seed, from result.json and log.jsonl; {} before it is done."""
    *pretrained, tuned = runs_of(row, seed, args)
    if not finished(tuned):
        return {}
    result = json.loads((tuned / "result.json").read_text(encoding="utf-8"))
    one = result["seeds"][0]
    arm = one["chosen"] if row["arm"] == "chosen" else row["arm"]
    test = one["arms"].get(arm, next(iter(one["arms"].values())))["test"]  # some have one arm only
    rule = "threshold_0.5" if metric == "f1_pooled" or test["multi_label"] else "argmax"
    numbers = {"score": test["headline"], metric: test[rule][metric],
               "guess": result["guess"]["headline"]}
    for folder in pretrained:
        log = read_log(folder)
        arm = "backbone" if row["method"] == "DINO" else row["arm"]
        numbers |= {gauge: log[-1].get(f"{arm}_{gauge}") for gauge in ("cosine", "rank")}
        numbers["hours"] = sum(line["seconds"] for line in log) / 3600
    return {name: number for name, number in numbers.items() if number is not None}


def shown(row: dict, column: str, form: str = ".3f", spread: bool = True) -> str:
    """The mean over seeds as text, with ± its `spread`; "" without numbers."""
    numbers = [one[column] for one in row["seeds"].values() if column in one]
    pair = mean_and_spread(numbers)[:2 if spread else 1] if numbers else ()
    return "±".join(f"{number:{form}}" for number in pair if number is not None)


def markdown(columns: list[str], lines: list[list[str]]) -> list[str]:
    """A table with three columns of words, then numbers; nothing if it has no lines."""
    rule = ["---"] * 3 + ["---:"] * (len(columns) - 3)
    return ["", *(f"| {' | '.join(line)} |" for line in [columns, rule, *lines])] if lines else []


def score_lines(rows: list[dict], metric: str) -> list[str]:
    """Scores, mean gauges and hours of pretraining, and the score of one answer for all images."""
    lines, guesses = [], {}
    for row in rows:
        words = [row["name"], row["arm"], f"{row['labels']:.0%}"]
        gauges = [shown(row, "cosine", spread=False), shown(row, "rank", ".1f", spread=False)]
        lines.append([*words, shown(row, "score"), shown(row, metric), row["paper"], *gauges,
                      shown(row, "hours", ".1f", spread=False)])
        if guess := shown(row, "guess", spread=False):
            guesses[words[2]] = ["always the same answer", "", words[2], guess, *[""] * 5]
    columns = ["method", "arm", "labels", "score", metric, "paper", "cosine", "rank", "hours"]
    return markdown(columns, [*lines, *guesses.values()])


def difference(row: dict, other: dict | None) -> str:
    """Mean difference of the score, paired by seed, ± its standard error (and their ratio)."""
    seeds = row["seeds"].keys() & other["seeds"].keys() if other and other is not row else ()
    if len(seeds) < 2:
        return ""
    gaps = [row["seeds"][seed]["score"] - other["seeds"][seed]["score"] for seed in seeds]
    mean, spread, n = mean_and_spread(gaps)
    error = spread / n**0.5
    return f"{mean:+.3f}±{error:.3f}" + (f" ({mean / error:+.1f})" if error else "")


def compared_lines(rows: list[dict], metric: str) -> list[str]:
    """Each of CASS's rows minus each method in the paper's own form, and the gain over DINO (paper,
    G.0.3): points, the sum of both arms."""
    plain = {(r["method"], r["arm"], r["labels"]): r for r in rows if not r["options"]}
    lines, gains, methods = [], [], ("CASS", "DINO", "supervised")
    for row in rows:
        others = [plain.get((method, row["arm"], row["labels"])) for method in methods]
        cells = [difference(row, other) for other in others]
        if row["method"] == "CASS" and any(cells):
            lines.append([row["name"], row["arm"], f"{row['labels']:.0%}", *cells])
    for labels in sorted({row["labels"] for row in rows}):
        four = [plain.get((method, arm, labels)) for method in methods[:2] for arm in ARMS]
        if all(row and row["seeds"] for row in four):
            ours = its = 0.0
            for row, points in zip(four, (100, 100, -100, -100)):
                ours += points * float(shown(row, metric, ".6f", spread=False))
                its += points * float(row["paper"].split("±")[0])
            gains += ["", f"Gain of CASS over DINO, {labels:.0%} of the labels, both arms: "
                      f"{ours:+.2f} points; the paper's: {its:+.2f}."]
    columns = ["paired by seed", "arm", "labels", *(f"minus {method}" for method in methods)]
    return markdown(columns, lines) + gains


def write_table(name: str, rows: list[dict], args: argparse.Namespace) -> None:
    """Write NAME.md, and show it."""
    table = TABLES[name]
    text = "The paper's set-up" if args.setup == SIZES["paper"] else "**Not the paper's set-up**"
    text += f": {args.data.resolve().name}, {args.size} networks, {args.seeds} seeds"
    for option, value in (args.setup | {"schedule": args.schedule}).items():
        text += f", {option.replace('_', ' ')} {value}"
    lines = [f"### {name}: {table['title']} ({table['data']})", "", *textwrap.wrap(text, 100)]
    if name == "T1":
        options = (SMALL_TIMED if args.size == "small" else ARMS) | {
            "data": args.data, "image_size": args.setup["image_size"], "device": args.device}
        lines += ["", *textwrap.wrap(TIMES, 100), ""]
        lines += speed.time_lines(speed.speed_options().parse_args(typed(options)))
    else:
        metric = "balanced_accuracy" if table["data"] == ISIC else "f1_pooled"
        for number, row in enumerate(rows):
            found = {seed: numbers_of(row, seed, args, metric) for seed in range(args.seeds)}
            rows[number] = row | {"seeds": {seed: one for seed, one in found.items() if one}}
        lines += score_lines(rows, metric) + compared_lines(rows, metric)
    args.folder.mkdir(parents=True, exist_ok=True)
    write_text(args.folder / f"{name}.md", "\n".join(lines) + "\n")
    print("", *lines, "", f"written to {args.folder / name}.md", sep="\n")


def make_tables(args: argparse.Namespace) -> None:
    """Make the runs that are missing, then the tables."""
    for name in args.tables:
        require(name in TABLES, f"there is no table {name}; --list names {', '.join(TABLES)}")
    rows = [row | {"table": name} for name in args.tables for row in TABLES[name]["rows"]
            if not args.labels or row["labels"] in args.labels]
    require(rows or not args.labels, "no row of these tables has these --labels")
    require(args.data, "--data names the folder of images to make the tables on")
    pick_device(args.device)
    changed = {"init": args.init, "epochs": args.epochs}
    args.setup = SIZES[args.size] | {key: value for key, value in changed.items() if value}
    args.folder = args.out / f"{args.data.resolve().name}-{args.size}"
    images = read_images(args.data)
    images = read_split(args.split_file, images) if args.split_file else split_images(images)
    require(images.classes or args.tables == ["T1"],
            f"{args.data} has no labels, which these tables need")
    args.images = f"{args.data.resolve()} {images.rows}"
    same = ("data", "split_file", "cache", "device", "workers")  # which change no number
    args.shared = [*typed({name: getattr(args, name) for name in same}), "--resume"]
    for words in missing_runs(rows, args):
        print(shlex.join(["python", *words]), flush=True)
        if not args.print:  # a process of its own each: one that dies leaves the others alone
            script = Path(__file__).parents[1] / words[0]
            subprocess.run([sys.executable, script, *words[1:]], check=False)
    if not args.print:
        for name in args.tables:
            write_table(name, [row for row in rows if row["table"] == name], args)
        failed = len(missing_runs(rows, args))
        require(not failed, f"{failed} runs failed, see above; the same command tries them again")


@clear_exit(DataError)
def main(argv: list[str] | None = None) -> None:
    parser = command_parser("python -m extras.tables", "Make the paper's tables from runs.")
    add = parser.add_argument
    add("tables", nargs="*", metavar="TABLE", help="such as T4 or T4 T14; see --list")
    add("--list", action="store_true", help="name all tables")
    add("--print", action="store_true", help="write the runs still to be made, one command a line")
    add("--data", type=Path, help="folder of images")
    add("--split-file", type=Path, help="a split.csv to use, such as extras.audit's without leaks")
    add("--out", type=Path, default=Path("runs/tables"), help="where all goes (%(default)s)")
    add("--size", choices=tuple(SIZES), default="small", help="small networks, or the paper's")
    add("--seeds", type=positive(int), default=3, help="seeds a row (%(default)s; paper: 5)")
    add("--labels", type=float, nargs="+", help="only the rows with these shares of the labels")
    add("--epochs", type=positive(int), help="epochs of pretraining in place of the size's")
    add("--init", help="start weights in place of the size's: imagenet, random or a folder")
    add("--schedule", choices=("16", "run"), default="16", help="see finetune.py (%(default)s)")
    add("--cache", type=Path, help="see cass.py --help, as for the next three")
    add("--device", default="auto", help="(%(default)s)")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    add("--workers", type=int)
    args = parser.parse_args(argv)
    if args.tables and not args.list:
        return make_tables(args)
    for name, table in TABLES.items():
        print(f"{name:4} {table['data']:12} {len(table['rows']):3d} rows  {table['title']}")


if __name__ == "__main__":
    main()
