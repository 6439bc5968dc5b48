"""A file of this project as a notebook: the `.py` file stays the source.

    python -m extras.notebook cass.py

`cass.ipynb` gets a cell for each part between `# %%` marks, with the text at the top of the file
and the titles of the parts as Markdown, and a last cell that trains small networks on random
tensors. It needs torch, torchvision, timm and tqdm, and no other file of this project.
"""

import argparse
import ast
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # if it is run by its path

from runtime import UserError, clear_exit, command_parser, write_text

TRY = {
    "cass": """\
cnn = timm.create_model("test_resnet", num_classes=16)
transformer = timm.create_model("test_vit", img_size=32, num_classes=16)
batches = [torch.rand(8, 3, 32, 32) for _ in range(4)]  # in place of images
networks = pretrain_cass(cnn, transformer, batches, epochs=2, log=print)""",
    "dino": """\
student = DinoNetwork(timm.create_model("test_vit", img_size=32), out_dim=64)
crops = [torch.rand(8, 3, 32, 32) for _ in range(4)]  # in place of images
batches = [(crops[:2], crops[2:])] * 4  # the teacher's crops, the student's
backbones = pretrain_dino(student, batches, epochs=2, log=print)""",
    "finetune": """\
network = timm.create_model("test_resnet", num_classes=3)
images, labels = torch.rand(8, 3, 32, 32), torch.eye(3)[torch.arange(8) % 3]
batches = [(images, labels)] * 4
finetune_network(network, batches, batches, epochs=2, log=print)"""}


def make_cell(kind: str, text: str) -> dict:
    """A cell as notebooks keep it; `kind` is code or markdown."""
    cell = {"cell_type": kind, "metadata": {}, "source": text.strip("\n").splitlines(keepends=True)}
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def make_notebook(text: str, last: str = "") -> dict:
    """The notebook of a Python file with the given `text`, and with `last` in a cell of its own."""
    tree = ast.parse(text)
    docstring = ast.get_docstring(tree) or ""
    begin = tree.body[0].end_lineno if docstring else 0
    code = "\n".join(text.split("\n")[begin:])
    first, *parts = re.split(r"^# %% *", code, flags=re.MULTILINE)
    cells = [make_cell("markdown", docstring), make_cell("code", first)]
    for part in parts:
        title, _, code = part.partition("\n")
        cells += [make_cell("markdown", f"## {title}"), make_cell("code", code)]
    if last:
        cells += [make_cell("markdown", "## try it on random tensors"),
                  make_cell("code", "import timm\n\n" + last)]
    return {"cells": cells, "metadata": {"language_info": {"name": "python"}, "kernelspec": {
        "name": "python3", "display_name": "Python 3"}}, "nbformat": 4, "nbformat_minor": 4}


def run_notebook(args: argparse.Namespace) -> None:
    """Write the notebook, but not over another file, which somebody may have worked in."""
    out = args.out or Path(args.file.stem + ".ipynb")
    if out.exists():
        raise UserError(f"{out} is there already; give the new one another name with --out")
    try:
        notebook = make_notebook(args.file.read_text(encoding="utf-8"), TRY.get(args.file.stem, ""))
    except (SyntaxError, UnicodeDecodeError):
        raise UserError(f"{args.file} is no Python file") from None
    write_text(out, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {out} with {len(notebook['cells'])} cells; open it with any notebook program")


def main(argv: list[str] | None = None) -> None:
    parser = command_parser("python -m extras.notebook", "Make a notebook of a Python file.")
    parser.add_argument("file", type=Path, help="such as cass.py, dino.py or finetune.py")
    parser.add_argument("--out", type=Path, help="default: NAME.ipynb in this folder")
    with clear_exit():
        run_notebook(parser.parse_args(argv))


if __name__ == "__main__" and "__file__" in globals():
    main()
