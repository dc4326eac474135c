"""Charts of whole checkpoints: loss against size, and stacked bars (those of layers: `layers`).

Each takes numbers and returns an SVG (see `drawing`) that says in words what it shows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from .drawing import chart, label, new_figure, svg, tip
from .style import INK, METHODS, Method

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Point:
    """One run: its name, how it is drawn, its size (bits per expert weight), its loss (KL divergence × 1000) and the
    standard error of that, 0 where it is not known."""

    name: str
    method: Method
    size: float
    loss: float
    error: float = 0.0


@dataclass(frozen=True)
class Curve:
    """Losses (KL divergence × 1000) that a survey expected of sizes (bits per expert weight, rising)."""

    sizes: tuple[float, ...]
    losses: tuple[float, ...]


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both size and loss, by size."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.size, p.loss)):
        if not front or point.loss < front[-1].loss:
            front.append(point)
    return front


@chart
def loss_against_size(points: Sequence[Point], floor: float, curves: Sequence[Curve] = ()) -> Markup:
    """Every run a point with its standard error, loss on a logarithmic axis, with the Pareto front.

    Args:
        points: at least one; losses above 0.
        floor: the noise floor, drawn where `floor_is_near`.
        curves: what surveys expected; drawn between the least and the largest size of the points.
    """
    figure, (axes,) = new_figure(720, 430)
    front = pareto(points)
    expected = _draw_curves(axes, points, curves)
    (line,) = axes.plot([p.size for p in front], [p.loss for p in front], "--", color=INK, alpha=0.7, linewidth=1.2)
    handles, names = [], []
    for p in points:
        (mark,) = axes.plot(p.size, p.loss, p.method.marker, color=p.method.colour, markersize=8, linestyle="none")
        tip(mark, f"{p.name}: {p.size:.3f} bits, {p.loss:.3g}" + (f" ± {p.error:.2g}" if p.error else ""))
        low = max(p.loss - p.error, p.loss / 1e3)  # the axis has no zero
        axes.vlines(p.size, low, p.loss + p.error, color=p.method.colour, linewidth=1.5)
        axes.plot([p.size] * 2, [low, p.loss + p.error], "_", color=p.method.colour, markersize=9)
        if p.method.name not in names:
            handles.append(mark)
            names.append(p.method.name)
    near = floor_is_near(points, floor)
    if near:
        axes.axhline(floor, color=INK, alpha=0.7, linewidth=1, linestyle=":")
        at_right = axes.get_yaxis_transform()
        axes.text(1, floor, "noise floor", transform=at_right, horizontalalignment="right", verticalalignment="bottom")
    axes.margins(0.08)
    logarithmic(axes, [*(p.loss for p in points), *([floor] if near else [])])
    axes.set_xlabel("bits per expert weight, everything stored counted")
    axes.set_ylabel("KL divergence × 1000, nats")
    handles, names = [*handles, line, *expected], [*names, "Pareto front", *["expected by the survey"] * len(expected)]
    figure.legend(handles, names, loc="outside upper left", ncols=len(names) if len(names) <= 6 else 4)
    lines = [[(p.size, p.loss) for p in front], *(_between(points, curve) for curve in curves)]
    _label(figure, axes, points, lines)
    listed = "; ".join(f"{p.name} {p.size:.2f} bits, {p.loss:.3g}" for p in points)
    return svg(figure, "Loss against size", f"{listed}. On the Pareto front: {', '.join(p.name for p in front)}.")


def _between(points: Sequence[Point], curve: Curve) -> list[tuple[float, float]]:
    """(size, loss) of a curve between the least and the largest size of the points."""
    low, high = min(p.size for p in points), max(p.size for p in points)
    return [(size, loss) for size, loss in zip(curve.sizes, curve.losses, strict=True) if low <= size <= high]


def _draw_curves(axes: "Axes", points: Sequence[Point], curves: Sequence[Curve]) -> list[Any]:
    """Draw the parts of the curves that lie between the points, and return one for the legend, if any is drawn."""
    drawn: list[Any] = []
    for curve in curves:
        inside = _between(points, curve)
        if len(inside) > 1:
            sizes, losses = zip(*inside, strict=True)
            drawn += axes.plot(sizes, losses, "-.", color=METHODS["BitsMoEModifier"].colour, linewidth=1.5)
            tip(drawn[-1], f"expected by the survey: {losses[0]:.3g} at {sizes[0]:.2f} bits to {losses[-1]:.3g}")
    return drawn[:1]


def floor_is_near(points: Sequence[Point], floor: float) -> bool:
    """Whether the noise floor can be drawn without squeezing the points together."""
    return floor > min(p.loss for p in points) / 30


def logarithmic(axes: "Axes", values: Sequence[float]) -> None:
    """A logarithmic y axis with round ticks in plain numbers, two at least."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = min(values), max(values)
    if high < 5 * low:  # a factor of 5 always holds two of 1, 2, 5, 10
        axes.set_ylim(low / 2.5, high * 2.5)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e4 * low else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    axes.grid()


Box = tuple[float, float, float, float]


def _label(
    figure: "Figure", axes: "Axes", points: Sequence[Point], lines: Sequence[Sequence[tuple[float, float]]]
) -> None:
    """Write every point's name where it covers nothing, or least: right, left, above, below, then further out.

    Args:
        lines: (size, loss) of what is drawn besides the points.
    """
    figure.draw_without_rendering()  # the layout, so that points have their places
    places = axes.transData.transform([(p.size, p.loss) for p in points])
    taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in places]
    crossed = [piece for line in lines if len(line) > 1 for piece in _pieces(axes.transData.transform(line))]
    left_end, _, right_end, _ = axes.get_window_extent().extents
    for (x, y), p in zip(places, points, strict=True):
        text = axes.annotate(label(p.name), (p.size, p.loss), (9, -4), textcoords="offset points")
        text.set_in_layout(False)
        box = text.get_window_extent()
        wide, high = box.width, box.height
        offsets = [(9.0, -4.0), (-9 - wide, -4.0)]
        for away in (14, 28, 42, 56):
            offsets += [(side, up - 4) for up in (away, -away) for side in (-wide / 2, 9.0, -9 - wide)]
        boxes = [(x + dx, y + dy - 3, x + dx + wide, y + dy - 3 + high) for dx, dy in offsets]

        def covered(box: Box) -> tuple[int, int]:
            """How many points, names and edges it lies on, and how many pieces of lines."""
            outside = box[0] < left_end or box[2] > right_end
            return outside + sum(_overlap(box, other) for other in taken), sum(_overlap(box, one) for one in crossed)

        chosen = min(range(len(boxes)), key=lambda place: (*covered(boxes[place]), place))
        taken.append(boxes[chosen])
        text.set_position(offsets[chosen])


def _pieces(line: Any) -> list[Box]:
    """A line of pixels, ``[n, 2]``, in boxes of a few pixels."""
    boxes: list[Box] = []
    for start, end in pairwise(line):
        count = 1 + int(max(abs(end - start)) / 3)
        boxes += [
            (x - 1, y - 1, x + 1, y + 1) for x, y in (start + (end - start) * i / count for i in range(count + 1))
        ]
    return boxes


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@chart
def stacked_bars(
    title: str,
    axis: str,
    rows: Mapping[str, Mapping[str, float]],
    unit: str,
    colours: Mapping[str, str],
    digits: int = 2,
) -> Markup:
    """A horizontal bar per row, divided into parts; row totals at their ends.

    Args:
        title: what the chart shows.
        axis: what the length of a bar is, with its unit.
        rows: name -> part -> amount.
        unit: of the amounts.
        colours: of the parts, in the order in which they stand in a bar.
        digits: of the amounts, after the point.
    """
    totals = {name: sum(parts.values()) for name, parts in rows.items()}
    kinds = [kind for kind in colours if any(parts.get(kind) for parts in rows.values())]
    across = len(kinds) if len(kinds) <= 6 else 4  # more do not fit into a line
    figure, (axes,) = new_figure(720, (100 if across == len(kinds) else 120) + 26 * len(rows))
    starts = [0.0] * len(rows)
    for kind in kinds:
        values = [parts.get(kind, 0.0) for parts in rows.values()]
        bars = axes.barh(
            range(len(rows)), values, left=starts, color=colours[kind], height=0.7, edgecolor=INK, linewidth=0.4
        )
        for bar, value in zip(bars, values, strict=True):
            tip(bar, f"{kind}: {value:.{digits}f} {unit}")
        starts = [start + value for start, value in zip(starts, values, strict=True)]
    for place, total in enumerate(starts):
        axes.annotate(f"{total:.{digits}f} {unit}", (total, place), (6, -4), textcoords="offset points")
    axes.set_yticks(range(len(rows)), [label(name) for name in rows])
    axes.set_xlim(0, max(*starts, 1e-12) * 1.12)
    axes.invert_yaxis()
    axes.set_xlabel(axis)
    axes.spines["left"].set_visible(False)
    axes.tick_params(left=False)
    figure.legend(
        [swatch(colours[kind]) for kind in kinds],
        kinds,
        loc="outside upper left",
        ncols=max(1, across),
        columnspacing=1.2,
    )
    told = "; ".join(
        f"{name} {totals[name]:.{digits}f} {unit} ("
        + ", ".join(f"{kind} {value:.{digits}f}" for kind, value in parts.items() if value)
        + ")"
        for name, parts in rows.items()
    )
    return svg(figure, title, f"{told}.")


def swatch(colour: str) -> Any:
    """A box of a colour, for a legend."""
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, edgecolor=INK, linewidth=0.4)
