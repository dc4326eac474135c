"""examples/demo.ipynb runs on the demo model, from the first cell to the last."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "demo.ipynb"


def code() -> list[str]:
    """The code cells."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_cells_are_plain_python_without_outputs() -> None:
    """So that any kernel runs them, and nothing in the file goes stale."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        if cell["cell_type"] == "code":
            compile("".join(cell["source"]), "cell", "exec")
            assert cell["outputs"] == []


def test_the_notebook_runs() -> None:
    said = io.StringIO()
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(said):
        for cell in code():
            exec(compile(cell, str(NOTEBOOK), "exec"), names)
    text = said.getvalue()
    assert float(re.search(r"([\d.]+) bits per expert weight", text)[1]) == pytest.approx(2.0, abs=0.01)
    assert int(re.search(r"(\d+)% of the dense", text)[1]) < 30
    assert 0 < float(re.search(r"KL divergence x 1000: ([\d.]+)", text)[1]) < 100
    assert "2 bits: 'Return a new" in text
