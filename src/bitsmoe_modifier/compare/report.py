"""The report of a comparison: report.json for programs, report.md and report.png for readers."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .plot import draw
from .workspace import write_text

Arm = dict[str, Any]


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write report.json, report.png and report.md; each appears whole or not at all."""
    write_text(folder / "report.json", json.dumps(report, indent=2, allow_nan=False, default=str))
    drawn = draw(report, folder / "report.png")
    write_text(folder / "report.md", markdown(report, picture="report.png" if drawn else None))


# ------------------------------------------------------------------------------------------------ table


class _Column:
    """A column of the table: title, the figure, how to print it, and which way is better (0: neither)."""

    def __init__(self, title: str, key: str, show: Callable[[float], str], better: int) -> None:
        self.title, self.key, self.show, self.better = title, key, show, better

    def cells(self, rows: Sequence[Arm], arms: Sequence[Arm]) -> list[str]:
        """The column's cells, the best arm's in bold (the unquantized model does not compete)."""
        values = [arm[self.key] for arm in arms if arm.get(self.key) is not None]
        best = (max if self.better > 0 else min)(values) if values and self.better else None
        cells = []
        for row in rows:
            value = row.get(self.key)
            shown = "–" if value is None else self.show(value)
            wins = best is not None and value == best and any(row is arm for arm in arms)
            cells.append(f"**{shown}**" if wins else shown)
        return cells


_COLUMNS = (
    _Column("nominal bits", "nominal_bits", lambda v: f"{v:g}", 0),
    _Column("bits per expert weight", "measured_bits_per_expert_weight", lambda v: f"{v:.3f}", -1),
    _Column("checkpoint, MB", "checkpoint_bytes", lambda v: f"{v / 1e6:.2f}", -1),
    _Column("KLD × 1000", "kld_mean", lambda v: f"{1000 * v:.2f}", -1),
    _Column("median", "kld_median", lambda v: f"{1000 * v:.2f}", -1),
    _Column("p90", "kld_p90", lambda v: f"{1000 * v:.2f}", -1),
    _Column("same top token, %", "top1_agreement", lambda v: f"{100 * v:.2f}", 1),
    _Column("perplexity", "perplexity", lambda v: f"{v:.3f}", -1),
    _Column("quantize, s", "quantize_seconds", lambda v: f"{v:.0f}", -1),
    _Column("peak memory, MB", "peak_memory_bytes", lambda v: f"{v / 1e6:.0f}", -1),
)


def table(reference: Arm, arms: Sequence[Arm]) -> str:
    """The summary as a Markdown table: the unquantized model first, then the arms that worked."""
    rows = [reference, *arms]
    columns = [["model", *[row["name"] for row in rows]]]
    columns += [[column.title, *column.cells(rows, arms)] for column in _COLUMNS]
    lines = [" | ".join(cells) for cells in zip(*columns, strict=True)]
    rule = " | ".join(["---", *["---:"] * len(_COLUMNS)])
    return "\n".join(f"| {line} |" for line in [lines[0], rule, *lines[1:]])


# -------------------------------------------------------------------------------------------- sentences


def is_bitsmoe(arm: Arm) -> bool:
    """Whether the arm's experts are BitsMoE's."""
    return "BitsMoEModifier" in arm["modifiers"]


def is_gptq(arm: Arm) -> bool:
    """Whether the arm's experts are GPTQ's."""
    return "GPTQModifier" in arm["modifiers"] and not is_bitsmoe(arm)


def verdict(arm: Arm, rival: Arm) -> str:
    """How one arm's KL divergence compares with another's, in a sentence."""
    own, other = arm["kld_mean"], rival["kld_mean"]
    size = f"{arm['name']} ({arm['measured_bits_per_expert_weight']:.2f} bits per expert weight)"
    whom = f"{rival['name']} ({rival['measured_bits_per_expert_weight']:.2f} bits)"
    figures = f"{1000 * own:.2f} against {1000 * other:.2f} × 10⁻³ nats"
    if own < other:
        said = f"{size} has a KL divergence {_percent(1 - own / other)} lower than {whom}: {figures}"
    elif own == other:
        said = f"{size} has the same KL divergence as {whom}: {figures}"
    else:
        said = f"{size} misses {whom} by {_percent(own / other - 1)} in KL divergence: {figures}"
    errors = [e for e in (arm.get("kld_stderr"), rival.get("kld_stderr")) if e is not None]
    if abs(own - other) < 2 * math.hypot(*errors):
        said += ", a difference within the sampling error of this text"
    return said + "."


def headline(arms: Sequence[Arm]) -> str:
    """BitsMoE at 2.0 bits against GPTQ at W3 where both are there; else the best pair of the two methods."""
    ours, theirs = [a for a in arms if is_bitsmoe(a)], [a for a in arms if is_gptq(a)]
    if not ours or not theirs:
        return "No pair of a BitsMoE and a GPTQ arm was measured, so there is nothing to compare."
    arm = min(ours, key=lambda a: abs((a["nominal_bits"] or math.inf) - 2.0))
    three = [a for a in theirs if a["nominal_bits"] == 3]
    return verdict(arm, three[0] if three else next_larger(arm, theirs))


def next_larger(arm: Arm, rivals: Sequence[Arm]) -> Arm:
    """The smallest rival that takes at least as many bits; the largest where none does."""
    by_bits = sorted(rivals, key=lambda a: a["measured_bits_per_expert_weight"])
    # half a hundredth of a bit is the size of headers, not of a method
    bits = arm["measured_bits_per_expert_weight"] - 0.005
    return next((r for r in by_bits if r["measured_bits_per_expert_weight"] >= bits), by_bits[-1])


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.0f} %" if ratio >= 0.1 else f"{100 * ratio:.1f} %"


# --------------------------------------------------------------------------------------------- document


def markdown(report: dict[str, Any], picture: str | None) -> str:
    """The report as Markdown."""
    done = [arm for arm in report["arms"] if "error" not in arm]
    failed = [arm for arm in report["arms"] if "error" in arm]
    calibration, evaluation, noise = report["calibration"], report["evaluation"], report["noise_floor"]
    parts = [
        f"# Quantization of {Path(report['model']['name']).name}",
        f"**{headline(done)}**",
        table(report["reference"], done),
        "KLD: Kullback-Leibler divergence of the arm's next-token distribution from the unquantized model's; mean, "
        "median and 90th percentile over positions, nats × 1000. Bits: everything stored for the experts. "
        "Bold: the best arm of a column.",
    ]
    rivals = [arm for arm in done if is_gptq(arm)]
    pairs = [verdict(arm, next_larger(arm, rivals)) for arm in done if is_bitsmoe(arm) and rivals]
    if pairs:
        parts.append("Against the GPTQ arm of the next larger size:\n\n" + "\n".join(f"- {line}" for line in pairs))
    if picture:
        parts.append(f"![KL divergence against bits per expert weight, one point per arm]({picture})")
    if failed:
        lines = [f"- {arm['name']}: {arm['error']} (log: {arm['log']})" for arm in failed]
        parts.append("## Failed\n\n" + "\n".join(lines))
    warnings = [f"- {arm['name']}: {warning}" for arm in done for warning in arm.get("warnings", [])]
    if warnings:
        parts.append("## Warnings\n\n" + "\n".join(warnings))
    experts = "every token through every expert" if calibration["all_experts"] else "routed tokens only"
    parts.append(
        "## How this was measured\n\n"
        f"- Calibration: {calibration['rows']} rows of {calibration['seq_len']} tokens from {calibration['source']}, "
        f"seed {calibration['seed']}, {experts}; the same rows, and causal attention, for every arm.\n"
        f"- Evaluation: {evaluation['rows']} rows of {evaluation['seq_len']} tokens ({report['reference']['tokens']} "
        f"positions) of {evaluation['source']}, on the checkpoints as loaded from disk.\n"
        f"- Computed in {report['compute']['dtype']} on {report['environment']['device']}.\n"
        f"- Noise floor: KLD × 1000 of {1000 * noise['kld_mean']:.3f} for the unquantized model {noise['how']} "
        f"({noise['rows']} rows).\n"
        f"- Peak memory: of the process that quantized, libraries included."
    )
    packages = ", ".join(f"{name} {v}" for name, v in report["environment"]["packages"].items())
    machine = f"{report['environment']['cpu']}, {report['environment']['threads']} threads"
    parts.append(f"    {report['command']}\n\n{packages}, Python {report['environment']['python']}; {machine}.")
    return "\n\n".join(parts) + "\n"
