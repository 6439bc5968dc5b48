"""A method's file as notebook cells; extras run by their path; names and imports of all files."""

import json
import re
import runpy
import symtable
import sys
from pathlib import Path

import pytest
import torch
from helpers import sentence

from extras import notebook

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(ROOT.glob("*.py"))
METHODS = {"cass", "dino", "finetune"}


def cells(file: Path, kind: str) -> list[str]:
    book = json.loads(file.read_text(encoding="utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 4)  # from 4.5 on cells need an id
    return ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == kind]


def public(file: Path) -> set[str]:
    """Names that a file defines at its top level."""
    table = symtable.symtable(file.read_text(encoding="utf-8"), file.name, "exec")
    names = {x.get_name() for x in table.get_symbols() if x.is_assigned() and not x.is_imported()}
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_cells_hold_all_of_the_file_and_train_without_another(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = ROOT / f"{name}.py"
    notebook.main([str(source)])
    code, prose = (cells(tmp_path / f"{name}.ipynb", kind) for kind in ("code", "markdown"))
    text = source.read_text(encoding="utf-8")
    assert all(title in "".join(prose) for title in re.findall("^# %% (.*)", text, re.M))
    assert prose[0].splitlines()[0] in text.splitlines()[0]
    lines = [line for cell in code[:-1] for line in cell.splitlines() if line.strip()]
    assert [line for line in text.splitlines() if line in lines and line.strip()] == lines
    assert len(lines) > 100
    capsys.readouterr()
    for file in FILES:
        monkeypatch.setitem(sys.modules, file.stem, None)  # importing it fails
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    kernel = {"__name__": "__main__"}  # as in a notebook: a main module without a file
    *definitions, training = [compile(cell, "cell", "exec") for cell in code]
    stream = torch.get_rng_state()
    for cell in definitions:
        exec(cell, kernel)
    assert public(source) <= set(kernel) and "main" in kernel
    assert capsys.readouterr() == ("", "") and torch.equal(torch.get_rng_state(), stream)
    exec(training, kernel)
    assert "'epoch': 2, 'loss': " in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.ipynb"]


def test_a_file_of_ones_own(tmp_path, capsys):
    file, out = tmp_path / "mine.py", tmp_path / "x.ipynb"
    file.write_text('x = "# %% no mark"\n# %% a part: é\ny = [x]\n', encoding="utf-8")
    notebook.main([str(file), "--out", str(out)])
    assert cells(out, "code") == ['x = "# %% no mark"', "y = [x]"]
    assert cells(out, "markdown") == ["", "## a part: é"]
    assert "another name" in sentence(capsys, lambda: notebook.main([str(file), "--out", str(out)]))
    file.write_text("no python")
    new = ["--out", str(tmp_path / "y.ipynb")]
    assert "no Python" in sentence(capsys, lambda: notebook.main([str(file), *new]))
    assert "gone.py" in sentence(capsys, lambda: notebook.main([str(tmp_path / "gone.py"), *new]))


def test_public_names_are_unique_and_no_file_needs_a_method():
    owners: dict[str, str] = {}
    for file in FILES:
        for name in public(file) - {"main"}:
            assert owners.setdefault(name, file.name) == file.name, name
        modules = re.findall(r"^ *(?:from|import) (\w+)", file.read_text(encoding="utf-8"), re.M)
        assert not {"__future__", "extras", "tests", *METHODS} & set(modules), file


def test_extras_run_by_their_path_too(monkeypatch):
    """Python then looks for modules in their own folder alone, beside the libraries."""
    libraries = [path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "tests")]
    for file in sorted((ROOT / "extras").glob("*.py")):
        monkeypatch.setattr(sys, "path", [str(file.parent), *libraries])
        for name, module in list(sys.modules.items()):
            if Path(getattr(module, "__file__", None) or "/").parent in (ROOT, file.parent):
                monkeypatch.delitem(sys.modules, name)
        runpy.run_path(str(file), run_name="by its path")
