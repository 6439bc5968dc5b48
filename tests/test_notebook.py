"""extras/notebook.py: the notebook's cells run in their order, and hold all of the file; extras run
by their path."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from helpers import sentence

from extras import notebook

ROOT = Path(__file__).resolve().parents[1]


def cells(file: Path, kind: str) -> list[str]:
    book = json.loads(file.read_text(encoding="utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 4)  # from 4.5 on cells need an id
    return ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == kind]


@pytest.mark.parametrize("name", sorted(notebook.TRY))
def test_cells_run_in_order_and_train(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    notebook.main([str(ROOT / f"{name}.py")])
    code, prose = (cells(tmp_path / f"{name}.ipynb", kind) for kind in ("code", "markdown"))
    text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    assert all(title in "".join(prose) for title in re.findall("^# %% (.*)", text, re.M))
    assert prose[0].splitlines()[0] in text.splitlines()[0]
    lines = [line for cell in code[:-1] for line in cell.splitlines() if line.strip()]
    assert [line for line in text.splitlines() if line in lines and line.strip()] == lines
    assert len(lines) > 100
    capsys.readouterr()
    kernel = {"__name__": "__main__"}  # as in a notebook: a main module without a file
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    for cell in code:
        exec(compile(cell, "cell", "exec"), kernel)
    assert "loss" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.ipynb"]


def test_a_file_of_ones_own(tmp_path: Path, capsys) -> None:
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


def test_extras_run_by_their_path_too(monkeypatch) -> None:
    """Python then looks for modules in their own folder alone, beside the libraries."""
    libraries = [path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "tests")]
    for file in sorted((ROOT / "extras").glob("*.py")):
        monkeypatch.setattr(sys, "path", [str(file.parent), *libraries])
        for name, module in list(sys.modules.items()):
            if Path(getattr(module, "__file__", None) or "/").parent in (ROOT, file.parent):
                monkeypatch.delitem(sys.modules, name)
        runpy.run_path(str(file), run_name="by its path")
