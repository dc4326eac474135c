"""Write the table of families in docs/serving.md: ``.venv-vllm/bin/python tests/serving/serving_page.py``."""

import os
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "families")]
    runpy.run_path(str(Path(__file__).with_name("torchvision_ops") / "sitecustomize.py"))

from building import config_of
from rows import FAMILIES, ROWS, Row

_PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
_BEGIN = "<!-- written by tests/serving/serving_page.py, not by hand: begin -->\n"
_END = "<!-- end -->\n"
#: of every family that is not refused; looked up at once: an engine replaces configs of transformers by vLLM's own
CLASSES = {name: str(config_of(family).architectures[0]) for name, family in FAMILIES.items() if not family.refusal}


def table() -> str:
    """The table and what stands below it."""
    head = "| model_type | class | vLLM on a CPU | |\n" + "|---" * 4 + "|\n"
    lines = [f"| {row.model_type} | {CLASSES[row.model_type]} | {_found(row)} | {row.note} |\n" for row in ROWS]
    without = sorted(CLASSES.keys() - {row.model_type for row in ROWS})
    return (
        head
        + "".join(lines)
        + "\nvLLM has no model class for these, and would run them by its Transformers backend, which no test does: "
        + f"{', '.join(without)}.\n"
    )


def current_table() -> str:
    """What stands in docs/."""
    return _PAGE.read_text(encoding="utf-8").split(_BEGIN)[1].split(_END)[0]


def _found(row: Row) -> str:
    if row.error:
        return f"cannot run it (`{row.error}`)"
    against = "transformers" if row.like == "transformers" else "vLLM with the decoded model"
    return f"served, tokens equal to {against}"


if __name__ == "__main__":
    before, rest = _PAGE.read_text(encoding="utf-8").split(_BEGIN)
    partial = _PAGE.with_suffix(".partial")
    partial.write_text(before + _BEGIN + table() + _END + rest.split(_END, 1)[1], encoding="utf-8")
    os.replace(partial, _PAGE)
