"""SVG as strings: elements, axis scales, and the frame that every chart of the pages shares."""

import math
from dataclasses import dataclass
from html import escape

#: size of a character of the charts' text, on average, per unit of font size
_CHARACTER = 0.56
FONT = 12


def element(tag: str, content: str = "", /, **attributes: object) -> str:
    """An element; ``content`` is markup, attribute values are escaped, and ``_`` in their names becomes ``-``.

    >>> element("text", "a", x=1.0, class_="label")
    '<text x="1" class="label">a</text>'
    """
    pairs = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(number(value) if isinstance(value, float) else str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    return f"<{tag}{pairs}>{content}</{tag}>"


def number(value: float) -> str:
    """A coordinate or a figure without needless digits: ``12.3``, ``0.004``, ``1e-05``."""
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def label(text: str, x: float, y: float, anchor: str = "start", **attributes: object) -> str:
    """A piece of text."""
    return element("text", escape(text), x=x, y=y, text_anchor=anchor, **attributes)


def text_width(text: str, size: float = FONT) -> float:
    """About how wide a text is drawn."""
    return _CHARACTER * size * len(text)


def picture(width: float, height: float, title: str, description: str, *parts: str) -> str:
    """A drawing with its text alternative: ``title`` says what it shows, ``description`` what there is to see."""
    head = element("title", escape(title)) + element("desc", escape(description))
    return element(
        "svg",
        head + "".join(parts),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {number(width)} {number(height)}",
        width=width,
        role="img",
        aria_label=f"{title}. {description}",
        font_family="system-ui, sans-serif",
        font_size=FONT,
        fill="#333",
    )


@dataclass(frozen=True)
class Scale:
    """Maps values to coordinates.

    Attributes:
        low, high: values at the ends, low < high; both above 0 where ``log``.
        start, end: coordinates of the ends.
        log: logarithmic.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The coordinate of a value."""
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values within the scale, four to nine or so.

        >>> Scale(0, 4.2, 0, 100).ticks()
        [0.0, 1.0, 2.0, 3.0, 4.0]
        >>> Scale(0.8, 60, 0, 100, log=True).ticks()
        [1.0, 2.0, 5.0, 10.0, 20.0, 50.0]
        """
        if not self.log:
            step = _round_up((self.high - self.low) / 6)
            first = math.ceil(self.low / step - 1e-9)
            return [round(step * i, 12) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for factors in ((1, 2, 5), (1,)):
            inside = [f * 10.0**d for d in decades for f in factors if self.low <= f * 10.0**d <= self.high]
            if len(inside) <= 9:
                return inside
        return inside[:: math.ceil(len(inside) / 9)]


def scale_for(values: list[float], start: float, end: float, *, log: bool = False, zero: bool = False) -> Scale:
    """A scale that holds the values with some air around them; from 0 where ``zero``."""
    low, high = min(values), max(values)
    if log:
        air = max((high / low) ** 0.08, 1.1)
        return Scale(low / air, high * air, start, end, log=True)
    air = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return Scale(0.0 if zero else low - air, high + air, start, end)


def _round_up(value: float) -> float:
    """The next of 1, 2, 5, 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(f * power for f in (1, 2, 5, 10) if f * power >= value * (1 - 1e-9))


def frame(x: Scale, y: Scale, x_title: str, y_title: str, x_names: dict[float, str] | None = None) -> str:
    """Grid, ticks and titles of a chart; ``y.start`` is the bottom. ``x_names`` replaces the ticks of x."""
    parts = []
    for value in y.ticks():
        at = y(value)
        parts.append(element("line", x1=x.start, x2=x.end, y1=at, y2=at, stroke="#ddd"))
        parts.append(label(number(value), x.start - 6, at + 4, "end"))
    names = x_names if x_names is not None else {value: number(value) for value in x.ticks()}
    for value, name in names.items():
        at = x(value)
        parts.append(element("line", x1=at, x2=at, y1=y.start, y2=y.start + 4, stroke="#888"))
        parts.append(label(name, at, y.start + 17, "middle"))
    parts.append(element("line", x1=x.start, x2=x.end, y1=y.start, y2=y.start, stroke="#888"))
    parts.append(label(x_title, (x.start + x.end) / 2, y.start + 36, "middle"))
    parts.append(label(y_title, x.start, y.end - 10))
    return "".join(parts)
