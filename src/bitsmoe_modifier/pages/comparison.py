"""The page of a comparison: report.html."""

from html import escape
from pathlib import Path
from typing import Any

from ..checkpoints.describe import describe
from ..checkpoints.kinds import expert_kinds
from ..evaluation.columns import summary
from .charts import Point, loss_against_size, stacked_bars
from .checkpoint import layer_figures, layer_sections
from .style import bullets, figure, method_of, page, paragraph, table
from .verdicts import LEGEND, accuracies, against_gptq, environment_line, headline, how_measured

#: phase of an arm -> where its report entry has the seconds
_PHASES = {
    "loading": "load_seconds",
    "quantizing": "quantize_seconds",
    "saving": "save_seconds",
    "evaluating": "evaluate_seconds",
    "tasks": "tasks_seconds",
}


def loss_chart(report: dict[str, Any]) -> str | None:
    """Loss against size of every arm that worked; None without any."""
    points = [
        Point(arm["name"], method_of(arm["modifiers"]), arm["measured_bits_per_expert_weight"], 1000 * arm["kld_mean"])
        for arm in report["arms"]
        if "error" not in arm and arm["kld_mean"] > 0
    ]
    return loss_against_size(points, 1000 * report["noise_floor"]["kld_mean"]) if points else None


def comparison_page(report: dict[str, Any], folder: Path) -> str:
    """The report as one HTML file.

    Args:
        report: what `compare` returns.
        folder: of the comparison; the checkpoints of the arms that worked are read where they are still there.
    """
    done = [arm for arm in report["arms"] if "error" not in arm]
    failed = [arm for arm in report["arms"] if "error" in arm]
    folders = {arm["name"]: folder / arm["checkpoint"] for arm in done if "checkpoint" in arm}
    present = {name: checkpoint for name, checkpoint in folders.items() if checkpoint.is_dir()}
    found = {name: describe(checkpoint) for name, checkpoint in present.items()}

    parts = [f"<p><strong>{escape(headline(done))}</strong></p>"]
    parts.append(table("The best arm of every column is marked.", *summary(report["reference"], done)))
    parts.append(paragraph(LEGEND))
    parts += _section("Against the GPTQ arm of the next larger size", bullets(against_gptq(done)), against_gptq(done))
    scores = accuracies(report["reference"], done)
    parts += _section("Accuracy", bullets(scores), scores)
    lines = [f"{arm['name']}: {arm['error']} (log: {arm['log']})" for arm in failed]
    parts += _section("Failed arms", bullets(lines, "failed"), lines)
    warnings = [f"{arm['name']}: {warning}" for arm in done for warning in arm.get("warnings", [])]
    parts += _section("Warnings", bullets(warnings), warnings)
    chart = loss_chart(report)
    if chart:
        caption = "Lower and further left is better. The dashed line joins the arms that no other beats in both."
        parts.append("<h2>Loss against size</h2>" + figure(chart, caption))
    kinds = {name: {k: n / 1e6 for k, n in expert_kinds(at).items()} for name, at in present.items()}
    if kinds:
        caption = "Of the experts only. Steps: scales and zero points; other: headers, shapes, checksums."
        bars = stacked_bars("Where the experts' bytes went", kinds, "MB")
        parts.append("<h2>Where the bytes went</h2>" + figure(bars, caption))
    seconds = {arm["name"]: {phase: arm.get(key) or 0.0 for phase, key in _PHASES.items()} for arm in done}
    if seconds:
        caption = "Wall clock, as each arm ran; an arm taken from an earlier run has that run's figures."
        bars = stacked_bars("Time per phase", seconds, "s", digits=0)
        parts.append("<h2>Time</h2>" + figure(bars, caption))
    figures = layer_figures(found)
    parts += _section("Layers", "".join(figures), figures)
    for name, entry in found.items():
        if entry["layers"]:
            parts.append(f"<h2>{escape(name)}, layer by layer</h2>" + layer_sections(entry, present[name]))
    parts.append("<h2>How this was measured</h2>" + bullets(how_measured(report)))
    parts.append(f"<pre>{escape(report['command'])}</pre>" + paragraph(environment_line(report)))
    return page(f"Quantization of {Path(report['model']['name']).name}", *parts)


def _section(title: str, content: str, needed: list[str]) -> list[str]:
    return [f"<h2>{escape(title)}</h2>{content}"] if needed else []
