"""The charts: loss against size, stacked bars, lines over layers, spectra, tokens per expert."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .style import PARTS, Method
from .svg import FONT, Scale, element, frame, label, number, picture, scale_for, text_width


@dataclass(frozen=True)
class Point:
    """One arm: its name, how it is drawn, its size (bits per expert weight) and loss (KL divergence × 1000)."""

    name: str
    method: Method
    size: float
    loss: float


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both size and loss, by size."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.size, p.loss)):
        if not front or point.loss < front[-1].loss:
            front.append(point)
    return front


def loss_against_size(points: Sequence[Point], floor: float, width: float = 760, height: float = 440) -> str:
    """Every arm a point, loss on a logarithmic axis, with the Pareto front.

    Args:
        points: at least one; losses above 0.
        floor: the noise floor, drawn where it is near the points.
    """
    losses = [p.loss for p in points]
    near = [floor] if floor > min(losses) / 30 else []
    x = scale_for([p.size for p in points], 60, width - 20)
    y = scale_for([*losses, *near], height - 70, 50, log=True)
    front = pareto(points)
    parts = [frame(x, y, "bits per expert weight, everything stored counted", "KL divergence × 1000, nats")]
    if near:
        parts.append(
            element("line", x1=x.start, x2=x.end, y1=y(floor), y2=y(floor), stroke="#999", stroke_dasharray="2 3")
        )
        parts.append(label("noise floor", x.end, y(floor) - 4, "end", fill="#777"))
    path = " ".join(f"{number(x(p.size))},{number(y(p.loss))}" for p in front)
    parts.append(element("polyline", points=path, fill="none", stroke="#999", stroke_width=1.2, stroke_dasharray="6 4"))
    taken = [(x(p.size) - 6, y(p.loss) - 6, x(p.size) + 6, y(p.loss) + 6) for p in points]
    for p in points:
        said = f"{p.name}: {p.size:.3f} bits, {p.loss:.3g}"
        parts.append(_marker(p.method, x(p.size), y(p.loss), said))
        parts.append(_place(p.name, x(p.size), y(p.loss), p.method.colour, taken, (x.start, x.end)))
    methods = list(dict.fromkeys(p.method for p in points))
    at = x.start
    for method in methods:
        parts.append(_marker(method, at + 5, 16, method.name) + label(method.name, at + 14, 20))
        at += 30 + text_width(method.name)
    parts.append(element("line", x1=at, x2=at + 22, y1=16.0, y2=16.0, stroke="#999", stroke_dasharray="6 4"))
    parts.append(label("Pareto front", at + 27, 20))
    listed = "; ".join(f"{p.name} {p.size:.2f} bits, {p.loss:.3g}" for p in points)
    best = ", ".join(p.name for p in front)
    return picture(width, height, "Loss against size", f"{listed}. On the Pareto front: {best}.", *parts)


def _marker(method: Method, x: float, y: float, said: str) -> str:
    shapes = {
        "square": f"M{x - 4.5:.1f} {y - 4.5:.1f}h9v9h-9z",
        "diamond": f"M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z",
        "triangle": f"M{x:.1f} {y - 6:.1f}l6 10h-12z",
        "cross": f"M{x - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10",
    }
    title = element("title", said.replace("&", "&amp;").replace("<", "&lt;"))
    if method.marker == "circle":
        return element("circle", title, cx=x, cy=y, r=5, fill=method.colour)
    outline = method.marker == "cross"
    return element(
        "path",
        title,
        d=shapes[method.marker],
        fill="none" if outline else method.colour,
        stroke=method.colour if outline else None,
        stroke_width=2 if outline else None,
    )


def _place(
    text: str,
    x: float,
    y: float,
    colour: str,
    taken: list[tuple[float, float, float, float]],
    within: tuple[float, float],
) -> str:
    """A point's label where it covers nothing that is drawn already: right, left, above, below, then further out."""
    wide = text_width(text)
    spots = [(x + 9, y + 4), (x - 12 - wide, y + 4)]
    for away in (14, 26, 38):
        spots += [
            (x - wide / 2, y - away + 4),
            (x - wide / 2, y + away + 4),
            (x + 9, y - away + 4),
            (x + 9, y + away + 4),
        ]
    boxes = [(left, base - FONT, left + wide, base + 3) for left, base in spots]
    free = [
        box
        for box in boxes
        if within[0] <= box[0] and box[2] <= within[1] and not any(_overlap(box, other) for other in taken)
    ]
    chosen = free[0] if free else boxes[0]
    taken.append(chosen)
    return label(text, chosen[0], chosen[3] - 3, fill=colour)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def stacked_bars(
    title: str, rows: Mapping[str, Mapping[str, float]], unit: str, digits: int = 2, width: float = 760
) -> str:
    """A horizontal bar per row, divided into parts coloured by `PARTS`; row totals at their ends."""
    left = 16 + max(text_width(name) for name in rows)
    totals = {name: sum(parts.values()) for name, parts in rows.items()}
    x = Scale(0.0, max(*totals.values(), 1e-12) * 1.0, left, width - 90)
    kinds = [kind for kind in PARTS if any(parts.get(kind) for parts in rows.values())]
    drawn, at = [], left
    for kind in kinds:
        drawn.append(element("rect", x=at, y=6, width=12, height=12, fill=PARTS[kind]) + label(kind, at + 17, 16))
        at += 34 + text_width(kind)
    for place, (name, parts) in enumerate(rows.items()):
        y, start = 30 + 26 * place, 0.0
        drawn.append(label(name, left - 8, y + 14, "end"))
        for kind in kinds:
            value = parts.get(kind, 0.0)
            if value:
                said = element("title", f"{kind}: {value:.{digits}f} {unit}")
                wide = x(start + value) - x(start)
                drawn.append(element("rect", said, x=x(start), y=y, width=wide, height=18, fill=PARTS[kind]))
            start += value
        drawn.append(label(f"{start:.{digits}f} {unit}", x(start) + 6, y + 14))
    told = "; ".join(
        f"{name} {totals[name]:.{digits}f} {unit} ("
        + ", ".join(f"{kind} {value:.{digits}f}" for kind, value in parts.items() if value)
        + ")"
        for name, parts in rows.items()
    )
    return picture(width, 40 + 26 * len(rows), title, f"{told}.", *drawn)


def over_layers(title: str, y_title: str, lines: Mapping[str, Sequence[float]], width: float = 760) -> str:
    """One line per arm over the layers, from 0; a shade of blue and a dash pattern each."""
    shades = ("#1f5fa8", "#c2591b", "#2f7d4f", "#7b4aa0", "#333333")
    count = max(len(values) for values in lines.values())
    x = Scale(-0.5, count - 0.5, 60.0, width - 20)
    y = scale_for([v for values in lines.values() for v in values], 210, 50, zero=True)
    every = max(1, count // 16)
    parts = [frame(x, y, "layer", y_title, {float(i): str(i) for i in range(0, count, every)})]
    at = x.start
    for place, (name, values) in enumerate(lines.items()):
        colour, dash = shades[place % len(shades)], (None, "7 3", "2 3", "9 3 2 3")[place % 4]
        path = " ".join(f"{number(x(i))},{number(y(v))}" for i, v in enumerate(values))
        parts.append(
            element("polyline", points=path, fill="none", stroke=colour, stroke_width=1.6, stroke_dasharray=dash)
        )
        for i, value in enumerate(values):
            said = element("title", f"{name}, layer {i}: {value:.3g}")
            parts.append(element("circle", said, cx=x(i), cy=y(value), r=3, fill=colour))
        parts.append(
            element("line", x1=at, x2=at + 22, y1=16, y2=16, stroke=colour, stroke_dasharray=dash, stroke_width=1.6)
        )
        parts.append(label(name, at + 27, 20))
        at += 45 + text_width(name)
    told = "; ".join(f"{name}: {', '.join(f'{v:.3g}' for v in values)}" for name, values in lines.items())
    return picture(width, 252, title, f"By layer, {told}.", *parts)


def spectrum(title: str, sides: Mapping[str, Sequence[float]], width: float = 340) -> str:
    """Share of each side's energy per unit of directions, on a logarithmic axis, strongest direction first."""
    shares = {side: [v / sum(values) for v in values] for side, values in sides.items() if sum(values) > 0}
    positive = [v for values in shares.values() for v in values if v > 0]
    x = Scale(0.0, float(max(len(values) for values in shares.values())), 52.0, width - 10)
    y = scale_for([max(v, max(positive) * 1e-6) for v in positive], 118, 44, log=True)
    parts = [frame(x, y, "unit of directions", "share of the energy")]
    at = x.start
    for colour, dash, (side, values) in zip(("#1f5fa8", "#c2591b"), (None, "5 3"), shares.items(), strict=False):
        corners = [(i + j, max(v, y.low)) for i, v in enumerate(values) for j in (0, 1)]
        path = " ".join(f"{number(x(i))},{number(y(v))}" for i, v in corners)
        parts.append(
            element("polyline", points=path, fill="none", stroke=colour, stroke_width=1.5, stroke_dasharray=dash)
        )
        parts.append(
            element("line", x1=at, x2=at + 18, y1=14, y2=14, stroke=colour, stroke_dasharray=dash, stroke_width=1.5)
        )
        parts.append(label(side, at + 22, 18))
        at += 40 + text_width(side)
    told = "; ".join(
        f"{side}: the first tenth of the directions holds {100 * sum(v[: max(1, len(v) // 10)]):.0f} %"
        for side, v in shares.items()
    )
    return picture(width, 160, title, f"{told}.", *parts)


def columns(title: str, y_title: str, values: Sequence[float], x_title: str, width: float = 340) -> str:
    """A column per value, in the given order."""
    x = Scale(0.0, float(len(values)), 52.0, width - 10)
    y = scale_for([float(v) for v in values], 108, 30, zero=True)
    parts = [frame(x, y, x_title, y_title)]
    wide = (x.end - x.start) / len(values)
    for i, value in enumerate(values):
        said = element("title", f"{i}: {value:g}")
        gap = 1.0 if wide > 4 else 0.0
        bar = {"x": x(i), "y": y(value), "width": wide - gap, "height": max(0.0, y.start - y(value))}
        parts.append(element("rect", said, **bar, fill="#4a83ba"))
    told = f"{len(values)} values from {min(values):g} to {max(values):g}"
    return picture(width, 150, title, f"{told}.", *parts)
