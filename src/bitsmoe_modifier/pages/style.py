"""What charts and pages mean by a colour: methods, bit-widths, kinds of bytes, phases of time, lines.

All are told from each other without colour too (markers, dashes, labels), and can be seen on white and on black.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """How the runs of a quantization method are drawn: name, colour, and matplotlib's letter for the marker."""

    name: str
    colour: str
    marker: str


#: by modifier; a run is drawn as the first of these that its recipe has
METHODS: Mapping[str, Method] = {
    "BitsMoEModifier": Method("BitsMoE", "#3b82c4", "o"),
    "GPTQModifier": Method("GPTQ", "#d1701f", "s"),
    "AutoRoundModifier": Method("AutoRound", "#9a6cc4", "D"),
    "AWQModifier": Method("AWQ", "#3a9a5b", "^"),
    "QuantizationModifier": Method("round-to-nearest (RTN)", "#8a8a8a", "X"),
}
OTHER = Method("other", "#b0892a", "P")

#: bit-width -> colour, darker for more
WIDTHS: Mapping[int, str] = {
    0: "#f3f1ea",
    1: "#d9e6f2",
    2: "#b0cde6",
    3: "#7fabd3",
    4: "#4a83ba",
    6: "#1d5490",
    8: "#0a2a52",
}

#: kind of stored byte, or phase of a run's time -> colour
PARTS: Mapping[str, str] = {
    "codes": "#3b82c4",
    "scales": "#e0a458",
    "bases": "#3a9a5b",
    "bit-widths": "#9a6cc4",
    "dense experts": "#c75a4d",
    "biases": "#8a8a8a",
    "unpacked weights": "#c75a4d",
    "other": "#b5b5b5",
    "loading": "#b5b5b5",
    "quantizing": "#3b82c4",
    "saving": "#e0a458",
    "evaluating": "#3a9a5b",
    "tasks": "#9a6cc4",
}

#: colour and dashes of the first, second, … line of a chart
LINES: Sequence[tuple[str, str]] = (
    ("#3b82c4", "-"),
    ("#d1701f", "--"),
    ("#3a9a5b", ":"),
    ("#9a6cc4", "-."),
    ("#8a8a8a", "-"),
)


def method_of(modifiers: list[str]) -> Method:
    """How a run of these modifiers is drawn."""
    return next((method for kind, method in METHODS.items() if kind in modifiers), OTHER)
