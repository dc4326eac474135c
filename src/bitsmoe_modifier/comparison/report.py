"""The report of a comparison: report.json for programs, report.html and report.md (with report.svg) for readers."""

import json
from pathlib import Path
from typing import Any

from ..evaluation.columns import table
from ..pages.comparison import comparison_page, loss_chart
from ..pages.verdicts import LEGEND, accuracies, against_gptq, environment_line, headline, how_measured
from ..storage.records import write_text


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write report.json, report.svg, report.md and report.html; each appears whole or not at all.

    Args:
        report: what `compare` returns.
        folder: of the comparison; the arms' checkpoints below it are read for the page.
    """
    write_text(folder / "report.json", json.dumps(report, indent=2, allow_nan=False, default=str))
    drawing = loss_chart(report)
    if drawing is not None:
        write_text(folder / "report.svg", drawing)
    write_text(folder / "report.md", markdown(report, picture="report.svg" if drawing else None))
    write_text(folder / "report.html", comparison_page(report, folder))


def markdown(report: dict[str, Any], picture: str | None) -> str:
    """The report as Markdown."""
    done = [arm for arm in report["arms"] if "error" not in arm]
    failed = [arm for arm in report["arms"] if "error" in arm]
    parts = [
        f"# Quantization of {Path(report['model']['name']).name}",
        f"**{headline(done)}**",
        table(report["reference"], done),
        f"{LEGEND} Bold: the best arm of a column.",
    ]
    if pairs := against_gptq(done):
        parts.append("Against the GPTQ arm of the next larger size:\n\n" + _bullets(pairs))
    if scores := accuracies(report["reference"], done):
        parts.append("Accuracy, with standard errors, and the difference to the unquantized model on the same items:")
        parts.append(_bullets(scores))
    if picture:
        parts.append(f"![KL divergence against bits per expert weight, one point per arm]({picture})")
    if failed:
        lines = [f"{arm['name']}: {arm['error']} (log: {arm['log']})" for arm in failed]
        parts.append(f"## Failed\n\n{_bullets(lines)}")
    if warnings := [f"{arm['name']}: {warning}" for arm in done for warning in arm.get("warnings", [])]:
        parts.append(f"## Warnings\n\n{_bullets(warnings)}")
    parts.append(f"## How this was measured\n\n{_bullets(how_measured(report))}")
    parts.append(f"    {report['command']}\n\n{environment_line(report)}")
    return "\n\n".join(parts) + "\n"


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
