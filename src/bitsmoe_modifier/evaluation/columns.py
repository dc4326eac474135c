"""The summary of a comparison: a row per model, a column per figure, the best run and its ties marked."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Any, Literal

Run = dict[str, Any]
#: how a run stands in its column: the best, within twice the standard error of the difference to it, or neither
Mark = Literal["best", "tie", ""]
#: after a figure that ties with the best one
TIE = " ≈"


@dataclass(frozen=True)
class _Column:
    """A figure: its title, where a run has it, how to print it, which way is better (0: neither), where its standard
    error is, and where that of the difference of two runs."""

    title: str
    get: Callable[[Run], float | None]
    show: Callable[[float], str]
    better: int
    error: Callable[[Run], float | None] = lambda run: None
    between: Callable[[Run, Run], float] | None = None

    def cells(self, rows: Sequence[Run], runs: Sequence[Run]) -> list[tuple[str, Mark]]:
        """Text of every row, and how it stands among the runs (the unquantized one does not compete, nor one alone)."""
        contest = self.better != 0 and len(runs) > 1
        competing = [run for run in runs if self.get(run) is not None] if contest else []
        best = min(competing, key=lambda run: -self.better * (self.get(run) or 0.0), default=None)
        found: list[tuple[str, Mark]] = []
        for row in rows:
            value = self.get(row)
            if value is None:
                found.append(("–", ""))
                continue
            text = self.show(value) + self._spread(row)
            mark = self._mark(row, best) if best is not None and any(row is run for run in runs) else ""
            found.append((text + (TIE if mark == "tie" else ""), mark))
        return found

    def _spread(self, run: Run) -> str:
        error = self.error(run)
        return f" ± {self.show(error)}" if error else ""

    def _mark(self, run: Run, best: Run) -> Mark:
        """Figures that read the same are all the best; what differs by at most twice the standard error of the
        difference ties."""
        own, other = self.get(run) or 0.0, self.get(best) or 0.0
        if self.show(own) == self.show(other):
            return "best"
        if self.between is not None:
            error = self.between(run, best)
        else:  # as of independent runs, which is too large for runs on the same text, so that too many tie
            error = math.hypot(self.error(run) or 0.0, self.error(best) or 0.0)
        return "tie" if abs(own - other) <= 2 * error else ""


def kld_error(run: Run, other: Run) -> float:
    """Standard error of the difference of two runs' mean KL divergences, nats.

    Row by row, where both were measured on the same rows: a row that is hard for one is hard for the other, which does
    not blur their difference. Of runs whose rows are not known, as of independent ones; 0 where that is not known too.
    """
    rows = run.get("kld_rows") or (), other.get("kld_rows") or ()
    if len(rows[0]) == len(rows[1]) > 1:
        differences = [a - b for a, b in zip(*rows, strict=True)]
        return stdev(differences) / math.sqrt(len(differences))
    return math.hypot(run.get("kld_stderr") or 0.0, other.get("kld_stderr") or 0.0)


def _figure(
    title: str,
    key: str,
    show: Callable[[float], str],
    better: int,
    error: str = "",
    between: Callable[[Run, Run], float] | None = None,
) -> _Column:
    return _Column(title, lambda run: run.get(key), show, better, lambda run: run.get(error), between)


def _accuracy(task: str) -> _Column:
    def entry(run: Run) -> Run:
        found: Run = run.get("accuracy", {}).get(task, {})
        return found

    return _Column(
        f"{task}, %",
        lambda run: entry(run).get("acc"),
        lambda v: f"{100 * v:.1f}",
        1,
        lambda run: entry(run).get("stderr"),
    )


_COLUMNS = (
    _figure("bits per expert weight", "measured_bits_per_expert_weight", lambda v: f"{v:.3f}", -1),
    _figure("KLD × 1000", "kld_mean", lambda v: f"{1000 * v:.2f}", -1, "kld_stderr", kld_error),
    _figure("median", "kld_median", lambda v: f"{1000 * v:.2f}", -1),
    _figure("p90", "kld_p90", lambda v: f"{1000 * v:.2f}", -1),
    _figure("same top token, %", "top1_agreement", lambda v: f"{100 * v:.2f}", 1, "top1_stderr"),
    _figure("perplexity", "perplexity", lambda v: f"{v:.3f}", -1, "perplexity_stderr"),
    _figure("checkpoint, MB", "checkpoint_bytes", lambda v: f"{v / 1e6:.2f}", -1),
    _Column("bits of bases", lambda run: run.get("bits_apart", {}).get("bases"), lambda v: f"{v:.3f}", 0),
    _figure("quantize, s", "quantize_seconds", lambda v: f"{v:.0f}", -1),
    _figure("peak memory, MB", "peak_memory_bytes", lambda v: f"{v / 1e6:.0f}", -1),
)


def summary(
    reference: Run, runs: Sequence[Run], noise: Run | None = None
) -> tuple[list[str], list[list[tuple[str, Mark]]]]:
    """Titles, and a row for the unquantized model, the noise floor and every run that worked.

    Args:
        reference: the unquantized model's figures.
        runs: the others'.
        noise: how far the unquantized model is from itself, where that was measured.

    Returns:
        The columns' titles, and rows of cells: text, and how the run stands in its column. Figures that nobody has are
        left out.
    """
    rows = [reference, *([_floor(noise)] if noise else []), *runs]
    tasks = dict.fromkeys(task for row in rows for task in row.get("accuracy", {}))
    columns = [
        column for column in (*_COLUMNS, *map(_accuracy, tasks)) if any(column.get(row) is not None for row in rows)
    ]
    names: list[tuple[str, Mark]] = [(str(row["name"]), "") for row in rows]
    cells = [names, *(column.cells(rows, runs) for column in columns)]
    return ["model", *(column.title for column in columns)], [list(row) for row in zip(*cells, strict=True)]


def _floor(noise: Run) -> Run:
    """What of the noise floor stands in the table: its distances; its perplexity is of fewer rows than the runs'."""
    kept = ("kld_mean", "kld_stderr", "kld_median", "kld_p90", "top1_agreement", "top1_stderr")
    return {"name": "noise floor", **{key: noise[key] for key in kept if key in noise}}


def table(reference: Run, runs: Sequence[Run], noise: Run | None = None) -> str:
    """The summary as a Markdown table, the best of every column in bold."""
    heads, rows = summary(reference, runs, noise)
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    lines += [[f"**{text}**" if mark == "best" else text for text, mark in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
