"""The summary of a comparison: a row per model, a column per figure, the best run of each column marked."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Run = dict[str, Any]


@dataclass(frozen=True)
class _Column:
    """A figure: its title, where a run has it, how to print it, which way is better (0: neither), where its standard
    error is."""

    title: str
    get: Callable[[Run], float | None]
    show: Callable[[float], str]
    better: int
    error: str | None = None

    def cells(self, rows: Sequence[Run], runs: Sequence[Run]) -> list[tuple[str, bool]]:
        """Text of every row, and whether it is the best run (the unquantized model does not compete)."""
        competing = [run for run in runs if self.get(run) is not None] if self.better else []
        best = min(competing, key=lambda run: -self.better * (self.get(run) or 0.0), default=None)
        return [
            ("–", False)
            if (value := self.get(row)) is None
            else (
                self.show(value) + self._spread(row),
                best is not None and any(row is run for run in runs) and self._ties(row, best),
            )
            for row in rows
        ]

    def _spread(self, run: Run) -> str:
        error = self._error(run)
        return f" ± {self.show(error)}" if error else ""

    def _error(self, run: Run) -> float:
        return (run.get(self.error) or 0.0) if self.error else 0.0

    def _ties(self, run: Run, best: Run) -> bool:
        """Whether a run equals the best one, within twice the standard error of their difference."""
        difference = abs((self.get(run) or 0.0) - (self.get(best) or 0.0))
        return difference <= 2 * math.hypot(self._error(run), self._error(best))


def _figure(title: str, key: str, show: Callable[[float], str], better: int, error: str | None = None) -> _Column:
    return _Column(title, lambda run: run.get(key), show, better, error)


def _accuracy(task: str) -> _Column:
    return _Column(
        f"{task}, %", lambda run: run.get("accuracy", {}).get(task, {}).get("acc"), lambda v: f"{100 * v:.1f}", 1
    )


_COLUMNS = (
    _figure("bits per expert weight", "measured_bits_per_expert_weight", lambda v: f"{v:.3f}", -1),
    _figure("KLD × 1000", "kld_mean", lambda v: f"{1000 * v:.2f}", -1, "kld_stderr"),
    _figure("median", "kld_median", lambda v: f"{1000 * v:.2f}", -1),
    _figure("p90", "kld_p90", lambda v: f"{1000 * v:.2f}", -1),
    _figure("same top token, %", "top1_agreement", lambda v: f"{100 * v:.2f}", 1),
    _figure("perplexity", "perplexity", lambda v: f"{v:.3f}", -1),
    _figure("checkpoint, MB", "checkpoint_bytes", lambda v: f"{v / 1e6:.2f}", -1),
    _Column("bits of bases", lambda run: run.get("bits_apart", {}).get("bases"), lambda v: f"{v:.3f}", 0),
    _figure("quantize, s", "quantize_seconds", lambda v: f"{v:.0f}", -1),
    _figure("peak memory, MB", "peak_memory_bytes", lambda v: f"{v / 1e6:.0f}", -1),
)


def summary(reference: Run, runs: Sequence[Run]) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """Titles, and a row for the unquantized model and every run that worked: cells as (text, best of its column)."""
    rows = [reference, *runs]
    tasks = dict.fromkeys(task for row in rows for task in row.get("accuracy", {}))
    columns = [*_COLUMNS, *map(_accuracy, tasks)]
    cells = [[(str(row["name"]), False) for row in rows], *(column.cells(rows, runs) for column in columns)]
    return ["model", *(column.title for column in columns)], [list(row) for row in zip(*cells, strict=True)]


def table(reference: Run, runs: Sequence[Run]) -> str:
    """The summary as a Markdown table, the best of every column in bold."""
    heads, rows = summary(reference, runs)
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    lines += [[f"**{text}**" if best else text for text, best in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
