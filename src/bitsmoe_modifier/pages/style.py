"""What the pages look like: colours of methods, widths and kinds of bytes; the style sheet; the frame of a page."""

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Method:
    """How the arms of a quantization method are drawn: name, colour, and a marker that tells it without colour."""

    name: str
    colour: str
    marker: str


#: by modifier; an arm is drawn as the first of these that its recipe has
METHODS: Mapping[str, Method] = {
    "BitsMoEModifier": Method("BitsMoE", "#1f5fa8", "circle"),
    "GPTQModifier": Method("GPTQ", "#c2591b", "square"),
    "AutoRoundModifier": Method("AutoRound", "#7b4aa0", "diamond"),
    "AWQModifier": Method("AWQ", "#2f7d4f", "triangle"),
    "QuantizationModifier": Method("round to nearest", "#777777", "cross"),
}
OTHER = Method("other", "#333333", "cross")

#: width in bits -> colour, darker for more
WIDTHS: Mapping[int, str] = {
    0: "#f3f1ea",
    1: "#d9e6f2",
    2: "#b0cde6",
    3: "#7fabd3",
    4: "#4a83ba",
    6: "#1d5490",
    8: "#0a2a52",
}

#: kind of stored byte, or of time, -> colour
PARTS: Mapping[str, str] = {
    "codes": "#4a83ba",
    "steps": "#e0a458",
    "bases": "#2f7d4f",
    "widths": "#7b4aa0",
    "dense experts": "#b5473c",
    "biases": "#888888",
    "unpacked weights": "#b5473c",
    "other": "#bbbbbb",
    "loading": "#bbbbbb",
    "quantizing": "#4a83ba",
    "saving": "#e0a458",
    "evaluating": "#2f7d4f",
    "tasks": "#7b4aa0",
}

_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; } h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: #555; padding-bottom: .3rem; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd; vertical-align: bottom; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td.best { font-weight: 700; background: #e8f0f8; }
figure { margin: 1rem 0; break-inside: avoid; } figcaption { color: #555; }
svg { max-width: 100%; height: auto; }
.layers { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); gap: 1rem 2rem; }
.layers section { break-inside: avoid; }
pre { background: #f4f4f1; padding: .7rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.failed { color: #a3271c; }
@media print {
  body { margin: 0; max-width: none; font-size: 10pt; }
  th, td { padding: .15rem .35rem; white-space: normal; }
  table { font-size: 8pt; }
  .wide { overflow: visible; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""


def method_of(modifiers: list[str]) -> Method:
    """How an arm of these modifiers is drawn."""
    return next((method for kind, method in METHODS.items() if kind in modifiers), OTHER)


def page(title: str, *parts: str) -> str:
    """A whole document."""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<style>{_CSS}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def figure(drawing: str, caption: str) -> str:
    """A drawing with a caption below it."""
    return f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


def paragraph(text: str, kind: str | None = None) -> str:
    """A paragraph of plain text."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def bullets(lines: list[str], kind: str | None = None) -> str:
    """A list of plain texts."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="{kind}">{items}</ul>' if kind else f"<ul>{items}</ul>"


def table(caption: str, heads: list[str], rows: list[list[tuple[str, bool]]]) -> str:
    """A table; a cell is its text and whether it is the best of its column."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "".join(
        "<tr>"
        + "".join(f'<td class="best">{escape(t)}</td>' if best else f"<td>{escape(t)}</td>" for t, best in row)
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
