"""A comparison's report for readers: its figures become a view, and the view a page or a Markdown file.

`Summary` is everything in words and the table; `Drawings` are the charts of the page. The templates comparison.html and
comparison.md say where each stands.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..checkpoints.describe import describe
from ..evaluation.columns import Mark, summary, table
from ..rendering import render
from .charts import Curve, Point, floor_is_near, loss_against_size, stacked_bars
from .checkpoint import Figure, LayersView, layer_figures, layers_view, stored_figures
from .samples import EXPLAINED, SampleView, sample_views
from .style import PHASES, method_of
from .verdicts import (
    LEGEND,
    TERMS,
    accuracies,
    against_gptq,
    environment_line,
    headliner,
    how_measured,
    of_model,
    shown_command,
    without_folders,
)

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
        terms: what the headline's words mean.
        heads, rows: of the table; a cell is its text and how it stands in its column.
        table: the same as Markdown.
        legend: what the columns are.
        against_gptq, accuracies, failed, warnings, how: a line per finding; without any, nothing is shown.
        command, environment: with what it was made.
    """

    title: str
    headline: str
    terms: str
    heads: list[str]
    rows: list[list[tuple[str, Mark]]]
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
    """The charts and texts of the page, by section.

    Attributes:
        loss, stored, time, layers: charts of all runs.
        samples: what the models write.
        detailed: the layers of the run that the headline is about, or of another one whose checkpoint is there, and its
            name; None where there is none.
    """

    loss: list[Figure]
    stored: list[Figure]
    time: list[Figure]
    layers: list[Figure]
    samples: list[SampleView]
    detailed: tuple[str, LayersView] | None


def markdown(report: dict[str, Any], picture: str | None) -> str:
    """The report as Markdown, with the name of the file that shows loss against size."""
    return render("comparison.md", report=summarize(report), picture=picture)


def comparison_page(report: dict[str, Any], folder: Path) -> str:
    """The report as one HTML file.

    Args:
        report: what `compare` returns.
        folder: of the comparison; the checkpoints of the runs that worked are read where they are still there.
    """
    drawings = draw(report, folder)
    return render("comparison.html", report=summarize(report), drawings=drawings, explained=EXPLAINED)


def summarize(report: dict[str, Any]) -> Summary:
    """The report in words."""
    done, reference = _done(report), report["reference"]
    noise = report["noise_floor"]
    heads, rows = summary(reference, done, noise)
    return Summary(
        title=f"Quantization of {Path(report['model']['name']).name}",
        headline=of_model(report),
        terms=TERMS,
        heads=heads,
        rows=rows,
        table=table(reference, done, noise),
        legend=LEGEND,
        against_gptq=against_gptq(done),
        accuracies=accuracies(reference, done),
        failed=[
            without_folders(f"{run['name']}: {run['error']} (log: {run['log']})")
            for run in report["arms"]
            if "error" in run
        ],
        warnings=_warnings(done),
        how=how_measured(report),
        command=shown_command(report["command"]),
        environment=environment_line(report),
    )


def _warnings(done: list[dict[str, Any]]) -> list[str]:
    """Every warning once, with the runs that it is about."""
    runs: dict[str, list[str]] = {}
    for run in done:
        for warning in run.get("warnings", []):
            runs.setdefault(without_folders(warning), []).append(run["name"])
    return [f"{', '.join(names)}: {warning}" for warning, names in runs.items()]


def draw(report: dict[str, Any], folder: Path) -> Drawings:
    """The report in charts; see `comparison_page`."""
    done = _done(report)
    folders = {run["name"]: folder / run["checkpoint"] for run in done if "checkpoint" in run}
    present = {name: checkpoint for name, checkpoint in folders.items() if checkpoint.is_dir()}
    found = {name: describe(checkpoint) for name, checkpoint in present.items()}
    first = headliner(done)
    readable = [name for name in found if found[name]["layers"]]
    detailed = first if first in readable else next(iter(readable), None)
    layers = layers_view(found[detailed], present[detailed]) if detailed else None
    in_order = sorted(done, key=lambda run: run["name"] != first)  # the headline's run marks the tokens
    return Drawings(
        loss=_loss_figures(report),
        stored=stored_figures(present),
        time=_time_figures(done),
        layers=layer_figures(found),
        samples=sample_views({run["name"]: run.get("samples") or [] for run in in_order}),
        detailed=(detailed, layers) if detailed and layers else None,
    )


def _curves(report: dict[str, Any]) -> list[Curve]:
    """What the surveys of the runs expected, each once: runs that differ in their size only have the same."""
    noted = [run["prediction"] for run in _done(report) if run.get("prediction")]
    curves = [Curve(tuple(one["bits"]), tuple(1000 * kld for kld in one["kld"])) for one in noted]
    return list(dict.fromkeys(curves))


def _points(report: dict[str, Any]) -> list[Point]:
    return [
        Point(
            run["name"],
            method_of(run["modifiers"]),
            run["measured_bits_per_expert_weight"],
            1000 * run["kld_mean"],
            1000 * (run.get("kld_stderr") or 0.0),
        )
        for run in _done(report)
        if run["kld_mean"] > 0
    ]


def loss_chart(report: dict[str, Any]) -> Markup | None:
    """Loss against size of every run that worked; None without any."""
    points = _points(report)
    return loss_against_size(points, 1000 * report["noise_floor"]["kld_mean"], _curves(report)) if points else None


def _loss_figures(report: dict[str, Any]) -> list[Figure]:
    chart, floor = loss_chart(report), 1000 * report["noise_floor"]["kld_mean"]
    if chart is None:
        return []
    where = "dotted" if floor_is_near(_points(report), floor) else "below the chart"
    caption = (
        "Lower and further left is better. The dashed line joins the runs that no other beats in both (the Pareto "
        "front); the bars through the points are standard errors, where they are larger than the points. Noise floor "
        f"({where}): the unquantized model against itself, {floor:.3g}."
    )
    if _curves(report):
        caption += " The dash-dotted line is what the survey expected of every size before anything was rounded."
    return [Figure(chart, caption)]


def _done(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [run for run in report["arms"] if "error" not in run]


def _time_figures(done: list[dict[str, Any]]) -> list[Figure]:
    seconds = {run["name"]: {phase: run.get(key) or 0.0 for phase, key in _PHASES.items()} for run in done}
    caption = "Wall clock, as each run took it; a run taken from an earlier comparison has its figures."
    drawn = [stacked_bars("Time per phase", "seconds", seconds, "s", PHASES, digits=0)] if seconds else []
    return [Figure(chart, caption) for chart in drawn]
