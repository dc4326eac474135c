"""The report of a comparison: report.json for programs, report.html and report.md (with report.svg) for readers."""

import json
from pathlib import Path
from typing import Any

from ..pages.comparison import comparison_page, loss_chart, markdown
from ..storage.records import write_text


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write report.json, report.svg, report.md and report.html; each appears whole or not at all.

    Args:
        report: what `compare` returns.
        folder: of the comparison; the runs' checkpoints below it are read for the page.
    """
    write_text(folder / "report.json", json.dumps(report, indent=2, allow_nan=False, default=str))
    drawing = loss_chart(report)
    if drawing is not None:
        write_text(folder / "report.svg", drawing)
    write_text(folder / "report.md", markdown(report, picture="report.svg" if drawing else None))
    write_text(folder / "report.html", comparison_page(report, folder))
