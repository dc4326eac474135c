"""From a matplotlib figure to an SVG that stands in a page: text alternatives, no network, dark mode.

Text stays text, so it is searched, copied and read aloud. What is drawn in `INK` takes the colour of the page's text.
The same figure gives the same bytes.
"""

import functools
import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec

from markupsafe import Markup

from ..errors import BitsMoEError
from ..extras import install_line
from .style import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_TIP = "tip:"
#: letters of a name in a chart; the middle of longer ones is left out
_LONGEST = 30
_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.grid.axis": "y",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 12,
    "grid.alpha": 0.18,
    "grid.color": INK,
    "legend.borderaxespad": 0.0,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",  # text instead of outlines
    "svg.hashsalt": "bitsmoe",  # names of definitions depend on what they define only
    "text.color": INK,
    "text.parse_math": False,  # a name with dollar signs is no formula
    "xtick.color": INK,
    "ytick.color": INK,
}


def chart(draw: Callable[P, Markup]) -> Callable[P, Markup]:
    """Decorator of a chart: everything in it is drawn in the style of the pages.

    Raises:
        BitsMoEError: where matplotlib is not installed.
    """

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Markup:
        try:
            from matplotlib import rc_context
        except ImportError:
            raise BitsMoEError(f"charts need matplotlib: {install_line('quantize')}") from None
        with rc_context(_STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # browsers have more fonts; only widths are a guess
            return draw(*args, **kwargs)

    return drawn


def new_figure(width: int, height: int, columns: int = 1, rows: int = 1) -> "tuple[Figure, list[Axes]]":
    """An empty figure and its axes, row by row.

    Args:
        width, height: in pixels of CSS; a point of matplotlib is one of them.
        columns, rows: of axes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def printable(text: str) -> str:
    """A text that can be drawn: control characters, which XML forbids, become dots."""
    shown = "".join(character if character.isprintable() else "·" for character in text)
    return f"\u200b{shown}" if shown.startswith("_") else shown  # matplotlib hides names with an underscore in front


def label(name: str) -> str:
    """A name as it stands in a chart: printable, and not wider than some 200 pixels."""
    shown = printable(name)
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 9]}…{shown[-8:]}"


def tip(artist: Any, text: str) -> None:
    """Let a browser show a text where the pointer rests on what is drawn, and a screen reader read it."""
    artist.set_gid(_TIP + printable(text))


def svg(figure: "Figure", title: str, description: str) -> Markup:
    """The figure as SVG.

    Args:
        figure: of `new_figure`.
        title: what the drawing shows.
        description: what there is to see, for those who do not see it.
    """
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    drawn = re.sub(r"; font-family: [^;\"]*", "", stream.getvalue()).replace(INK, "currentColor")
    root = ET.fromstring(drawn)
    used = {element for defs in root.iter(f"{{{_SVG}}}defs") for element in defs}  # by their names
    for element in [element for element in root.iter() if element not in used]:
        name = element.attrib.pop("id", "")
        if name.startswith(_TIP):
            ET.SubElement(element, f"{{{_SVG}}}title").text = name.removeprefix(_TIP)
    return Markup(_finished(root, printable(title), printable(description)))


def _finished(root: ET.Element, title: str, description: str) -> str:
    """The drawing without what matplotlib says of itself, with its text alternatives and its size in pixels."""
    for tag in ("metadata", "defs"):
        for element in root.findall(f"{{{_SVG}}}{tag}"):
            if tag == "metadata" or element.find(f"{{{_SVG}}}style") is not None:
                root.remove(element)
    _, _, width, height = root.attrib["viewBox"].split()
    root.attrib.update(width=f"{float(width):g}", height=f"{float(height):g}", role="img")
    root.attrib.update({"aria-label": f"{title}. {description}", "font-family": "system-ui, sans-serif"})
    root.attrib.update({"stroke-linejoin": "round"})
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ET.Element(f"{{{_SVG}}}{tag}")
        element.text = text
        root.insert(place, element)
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    return ET.tostring(root, encoding="unicode")
