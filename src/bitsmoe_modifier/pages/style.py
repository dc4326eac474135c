"""What charts and pages mean by a colour: methods, bit-widths, kinds of bytes, phases of time, amounts.

A colour has one meaning on a page: each of these has hues of its own. All are told from each other without colour too
(markers, outlines, order, labels), and can be seen on white and on black.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: Colour of text and axes; replaced by the page's own (CSS's ``currentColor``).
INK = "#3a3a3b"


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
OTHER = Method("other", INK, "P")

#: bit-width -> colour, darker for more
WIDTHS: Mapping[int, str] = {
    0: "#f1efe6",
    1: "#cfe8e2",
    2: "#9dd0c5",
    3: "#63b3a4",
    4: "#2f8f80",
    6: "#12655a",
    8: "#053b34",
}

#: kind of stored byte -> colour
BYTES: Mapping[str, str] = {
    "codes": "#a83e6b",
    "scales": "#e08fb0",
    "bases": "#6d2245",
    "bit-widths": "#f7b6d2",
    "dense experts": "#c96590",
    "biases": "#b98aa0",
    "unpacked weights": "#8c5570",
    "other": "#e3c0d0",
}

#: phase of a run -> colour
PHASES: Mapping[str, str] = {
    "loading": "#d8cf8e",
    "quantizing": "#857a18",
    "saving": "#b5a83a",
    "evaluating": "#5c540f",
    "tasks": "#fff3a3",
}

#: an amount, from little to much
AMOUNTS: Sequence[str] = ("#c9cdf2", "#9fa8da", "#5c6bc0", "#303f9f", "#10154a")
#: where there should be an amount, and is none
NONE = "#c0392b"


def method_of(modifiers: list[str]) -> Method:
    """How a run of these modifiers is drawn."""
    return next((method for kind, method in METHODS.items() if kind in modifiers), OTHER)
