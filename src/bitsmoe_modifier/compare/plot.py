"""The picture of a comparison: loss against size, every arm a point."""

import os
from pathlib import Path
from typing import Any

#: a colour and a marker per method, readable without colour
_METHODS = {
    "BitsMoEModifier": ("BitsMoE", "#1f5fa8", "o"),
    "GPTQModifier": ("GPTQ", "#c2591b", "s"),
}
_OTHER = ("other", "#666666", "^")
_TEXT = "#333333"


def draw(report: dict[str, Any], path: Path) -> bool:
    """Draw KL divergence (log scale) against measured bits per expert weight.

    Returns:
        Whether there was anything to draw.
    """
    arms = [arm for arm in report["arms"] if "error" not in arm and arm["kld_mean"] > 0]
    if not arms:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.5), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    methods: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for arm in arms:
        style = next((_METHODS[kind] for kind in _METHODS if kind in arm["modifiers"]), _OTHER)
        methods.setdefault(style, []).append(arm)
    for (label, colour, marker), members in methods.items():
        members.sort(key=lambda arm: arm["measured_bits_per_expert_weight"])
        bits = [arm["measured_bits_per_expert_weight"] for arm in members]
        losses = [1000 * arm["kld_mean"] for arm in members]
        line = "" if label == _OTHER[0] else "-"
        axes.plot(bits, losses, linestyle=line, marker=marker, color=colour, label=label, linewidth=1.2, markersize=6)
        for arm, x, y in zip(members, bits, losses, strict=True):
            axes.annotate(arm["name"], (x, y), (7, 5), textcoords="offset points", fontsize=8, color=colour)
    floor = 1000 * report["noise_floor"]["kld_mean"]
    lowest = min(1000 * arm["kld_mean"] for arm in arms)
    if floor > lowest / 30:  # a floor far below every arm would only flatten the picture
        axes.axhline(floor, color="#999999", linewidth=1, linestyle=":", label="noise floor")
    axes.set_yscale("log")
    axes.margins(x=0.12, y=0.15)
    axes.set_xlabel("bits per expert weight, everything stored counted", color=_TEXT)
    axes.set_ylabel("KL divergence to the unquantized model × 1000", color=_TEXT)
    axes.set_title(f"{Path(report['model']['name']).name}: loss against size", loc="left", fontsize=11, color=_TEXT)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
    axes.tick_params(colors=_TEXT, which="both")
    axes.yaxis.set_major_formatter(_plain)
    axes.yaxis.set_minor_formatter(_plain_few)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    temporary = path.with_name(f".{path.name}.partial")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)
    return True


def _plain(value: float, _: float) -> str:
    """A tick as a plain number instead of a power of ten."""
    return f"{value:g}"


def _plain_few(value: float, _: float) -> str:
    """Minor ticks at 2 and 5 only: a log axis of one decade would have no numbers otherwise."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""
