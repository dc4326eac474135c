"""How far the survey's prediction is off on a model that it was not fitted to, from a table of costs and losses.

    python benchmarks/prediction.py docs/quality.md

Reads the rows ``| model | bits | costs | … | measured | … |`` of every Markdown table in the file whose head has these
columns, fits measured = factor × costs to all models and to all but each, and prints predicted / measured.
"""

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Loss:
    """A measurement: what the costs of a size add up to, and the KL divergence measured, both × 1000."""

    model: str
    bits: float
    cost: float
    measured: float


def read(text: str) -> list[Loss]:
    """The measurements in a page."""
    found: list[Loss] = []
    at: dict[str, int] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if "costs x1000" in cells:
            at = {name: cells.index(name) for name in ("model", "bits", "costs x1000", "measured x1000")}
        elif not cells:
            at = {}
        elif at and not set(line) <= set("|- "):
            model, *numbers = (cells[place] for place in at.values())
            found.append(Loss(model, *(float(number.split()[0]) for number in numbers)))
    return found


def fit(losses: Sequence[Loss]) -> float:
    """Measured over cost: the geometric mean, in which every model counts the same."""
    models = {one.model for one in losses}
    own = {name: [math.log(one.measured / one.cost) for one in losses if one.model == name] for name in models}
    return math.exp(statistics.fmean(statistics.fmean(logs) for logs in own.values()))


def main() -> None:
    """Print the fits and their errors."""
    losses = read(Path(sys.argv[1]).read_text(encoding="utf-8"))
    models = list(dict.fromkeys(one.model for one in losses))
    for left_out in (None, *models):
        factor = fit([one for one in losses if one.model != left_out])
        print(f"fitted to {'all' if left_out is None else f'all but {left_out}'}: {factor:.2f} x costs")
        for model in models if left_out is None else [left_out]:
            shown = [f"{factor * m.cost / m.measured:.2f}" for m in losses if m.model == model]
            print(f"  {model}: predicted / measured {', '.join(shown)}")


if __name__ == "__main__":
    main()
