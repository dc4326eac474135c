"""A comparison's report for readers: its figures become a view, and the view a page or a Markdown file.

`Summary` is everything in words and the table; `Drawings` are the charts of the page. The templates comparison.html and
comparison.md say where each stands.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..checkpoints.describe import describe
from ..evaluation.columns import summary, table
from ..rendering import render
from .charts import Point, loss_against_size, stacked_bars
from .checkpoint import Figure, LayerView, layer_figures, layer_views, stored_figures
from .style import method_of
from .verdicts import LEGEND, accuracies, against_gptq, environment_line, headline, how_measured, shown_command

#: phase of a run -> where its report entry has the seconds
_PHASES = {
    "loading": "load_seconds",
    "quantizing": "quantize_seconds",
    "saving": "save_seconds",
    "evaluating": "evaluate_seconds",
    "tasks": "tasks_seconds",
}


@dataclass(frozen=True)
class Summary:
    """What the report says in words, and its table.

    Attributes:
        title, headline: of the whole.
        heads, rows: of the table; a cell is its text and whether it is the best of its column.
        table: the same as Markdown.
        legend: what the columns are.
        against_gptq, accuracies, failed, warnings, how: a line per finding; without any, nothing is shown.
        command, environment: with what it was made.
    """

    title: str
    headline: str
    heads: list[str]
    rows: list[list[tuple[str, bool]]]
    table: str
    legend: str
    against_gptq: list[str]
    accuracies: list[str]
    failed: list[str]
    warnings: list[str]
    how: list[str]
    command: str
    environment: str


@dataclass(frozen=True)
class Drawings:
    """The charts of the page, by section, and the layers of every checkpoint by its name."""

    loss: list[Figure]
    stored: list[Figure]
    time: list[Figure]
    layers: list[Figure]
    checkpoints: dict[str, list[LayerView]]


def markdown(report: dict[str, Any], picture: str | None) -> str:
    """The report as Markdown, with the name of the file that shows loss against size."""
    return render("comparison.md", report=summarize(report), picture=picture)


def comparison_page(report: dict[str, Any], folder: Path) -> str:
    """The report as one HTML file.

    Args:
        report: what `compare` returns.
        folder: of the comparison; the checkpoints of the runs that worked are read where they are still there.
    """
    return render("comparison.html", report=summarize(report), drawings=draw(report, folder))


def summarize(report: dict[str, Any]) -> Summary:
    """The report in words."""
    done, reference = _done(report), report["reference"]
    heads, rows = summary(reference, done)
    return Summary(
        title=f"Quantization of {Path(report['model']['name']).name}",
        headline=headline(done),
        heads=heads,
        rows=rows,
        table=table(reference, done),
        legend=LEGEND,
        against_gptq=against_gptq(done),
        accuracies=accuracies(reference, done),
        failed=[f"{run['name']}: {run['error']} (log: {run['log']})" for run in report["arms"] if "error" in run],
        warnings=[f"{run['name']}: {warning}" for run in done for warning in run.get("warnings", [])],
        how=how_measured(report),
        command=shown_command(report["command"]),
        environment=environment_line(report),
    )


def draw(report: dict[str, Any], folder: Path) -> Drawings:
    """The report in charts; see `comparison_page`."""
    done = _done(report)
    folders = {run["name"]: folder / run["checkpoint"] for run in done if "checkpoint" in run}
    present = {name: checkpoint for name, checkpoint in folders.items() if checkpoint.is_dir()}
    found = {name: describe(checkpoint) for name, checkpoint in present.items()}
    views = {name: layer_views(entry, present[name]) for name, entry in found.items()}
    caption = "Lower and further left is better. The dashed line joins the runs that no other beats in both."
    return Drawings(
        loss=[Figure(chart, caption)] if (chart := loss_chart(report)) else [],
        stored=stored_figures(present),
        time=_time_figures(done),
        layers=layer_figures(found),
        checkpoints={name: layers for name, layers in views.items() if layers},
    )


def loss_chart(report: dict[str, Any]) -> Markup | None:
    """Loss against size of every run that worked; None without any."""
    points = [
        Point(run["name"], method_of(run["modifiers"]), run["measured_bits_per_expert_weight"], 1000 * run["kld_mean"])
        for run in _done(report)
        if run["kld_mean"] > 0
    ]
    return loss_against_size(points, 1000 * report["noise_floor"]["kld_mean"]) if points else None


def _done(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [run for run in report["arms"] if "error" not in run]


def _time_figures(done: list[dict[str, Any]]) -> list[Figure]:
    seconds = {run["name"]: {phase: run.get(key) or 0.0 for phase, key in _PHASES.items()} for run in done}
    caption = "Wall clock, as each run took it; a run taken from an earlier comparison has its figures."
    return [Figure(stacked_bars("Time per phase", seconds, "s", digits=0), caption)] if seconds else []
