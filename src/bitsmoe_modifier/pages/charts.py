"""The charts: loss against size, stacked bars, lines over layers, spectra, columns, bit-widths of a layer.

Each takes numbers and returns an SVG (see `drawing`) that says in words what it shows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from markupsafe import Markup

from .drawing import INK, chart, new_figure, printable, svg, tip
from .style import LINES, PARTS, WIDTHS, Method

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Point:
    """One run: its name, how it is drawn, its size (bits per expert weight) and loss (KL divergence × 1000)."""

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


@chart
def loss_against_size(points: Sequence[Point], floor: float) -> Markup:
    """Every run a point, loss on a logarithmic axis, with the Pareto front.

    Args:
        points: at least one; losses above 0.
        floor: the noise floor, drawn where it is near the points.
    """
    figure, (axes,) = new_figure(720, 430)
    front = pareto(points)
    (line,) = axes.plot([p.size for p in front], [p.loss for p in front], "--", color=INK, alpha=0.5, linewidth=1.2)
    handles, names = [], []
    for p in points:
        (mark,) = axes.plot(p.size, p.loss, p.method.marker, color=p.method.colour, markersize=8, linestyle="none")
        tip(mark, f"{p.name}: {p.size:.3f} bits, {p.loss:.3g}")
        if p.method.name not in names:
            handles.append(mark)
            names.append(p.method.name)
    if floor > min(p.loss for p in points) / 30:
        axes.axhline(floor, color=INK, alpha=0.5, linewidth=1, linestyle=":")
        at_right = axes.get_yaxis_transform()
        axes.text(1, floor, "noise floor", transform=at_right, horizontalalignment="right", verticalalignment="bottom")
    axes.margins(0.08)
    _logarithmic(axes, [p.loss for p in points])
    axes.set_xlabel("bits per expert weight, everything stored counted")
    axes.set_ylabel("KL divergence × 1000, nats")
    figure.legend([*handles, line], [*names, "Pareto front"], loc="outside upper left", ncols=len(names) + 1)
    _label(figure, axes, points)
    listed = "; ".join(f"{p.name} {p.size:.2f} bits, {p.loss:.3g}" for p in points)
    return svg(figure, "Loss against size", f"{listed}. On the Pareto front: {', '.join(p.name for p in front)}.")


def _logarithmic(axes: "Axes", values: Sequence[float]) -> None:
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


def _label(figure: "Figure", axes: "Axes", points: Sequence[Point]) -> None:
    """Write every point's name where it covers nothing: right, left, above, below, then further out."""
    figure.draw_without_rendering()  # the layout, so that points have their places
    places = axes.transData.transform([(p.size, p.loss) for p in points])
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in places]
    ends = axes.transData.transform([(p.size, p.loss) for p in pareto(points)])
    for start, end in pairwise(ends):  # the line of the Pareto front, in pieces
        taken += [(x, y, x + 1, y + 1) for x, y in (start + (end - start) * i / 60 for i in range(61))]
    left_end, _, right_end, _ = axes.get_window_extent().extents
    for (x, y), p in zip(places, points, strict=True):
        text = axes.annotate(printable(p.name), (p.size, p.loss), (9, -4), textcoords="offset points")
        text.set_in_layout(False)
        box = text.get_window_extent()
        wide, high = box.width, box.height
        offsets = [(9.0, -4.0), (-9 - wide, -4.0)]
        for away in (14, 28, 42):
            offsets += [(side, up - 4) for up in (away, -away) for side in (-wide / 2, 9.0, -9 - wide)]
        boxes = [(x + dx, y + dy - 3, x + dx + wide, y + dy - 3 + high) for dx, dy in offsets]
        free = [
            place
            for place, box in enumerate(boxes)
            if left_end <= box[0] and box[2] <= right_end and not any(_overlap(box, other) for other in taken)
        ]
        chosen = free[0] if free else 0
        taken.append(boxes[chosen])
        text.set_position(offsets[chosen])


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@chart
def stacked_bars(title: str, rows: Mapping[str, Mapping[str, float]], unit: str, digits: int = 2) -> Markup:
    """A horizontal bar per row, divided into parts coloured by `PARTS`; row totals at their ends."""
    figure, (axes,) = new_figure(720, 70 + 26 * len(rows))
    totals = {name: sum(parts.values()) for name, parts in rows.items()}
    kinds = [kind for kind in PARTS if any(parts.get(kind) for parts in rows.values())]
    starts = [0.0] * len(rows)
    for kind in kinds:
        values = [parts.get(kind, 0.0) for parts in rows.values()]
        bars = axes.barh(range(len(rows)), values, left=starts, color=PARTS[kind], height=0.7)
        for bar, value in zip(bars, values, strict=True):
            tip(bar, f"{kind}: {value:.{digits}f} {unit}")
        starts = [start + value for start, value in zip(starts, values, strict=True)]
    for place, total in enumerate(starts):
        axes.annotate(f"{total:.{digits}f} {unit}", (total, place), (6, -4), textcoords="offset points")
    axes.set_yticks(range(len(rows)), [printable(name) for name in rows])
    axes.set_xlim(0, max(*starts, 1e-12) * 1.12)
    axes.invert_yaxis()
    axes.xaxis.set_visible(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(left=False)
    colours = [_swatch(PARTS[kind]) for kind in kinds]
    figure.legend(colours, kinds, loc="outside upper left", ncols=max(1, len(kinds)), columnspacing=1.2)
    told = "; ".join(
        f"{name} {totals[name]:.{digits}f} {unit} ("
        + ", ".join(f"{kind} {value:.{digits}f}" for kind, value in parts.items() if value)
        + ")"
        for name, parts in rows.items()
    )
    return svg(figure, title, f"{told}.")


def _swatch(colour: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, edgecolor=INK, linewidth=0.4)


@chart
def over_layers(title: str, y_title: str, lines: Mapping[str, Sequence[float]]) -> Markup:
    """One line per run over the layers, from 0."""
    from matplotlib.ticker import MaxNLocator

    figure, (axes,) = new_figure(720, 260)
    handles = []
    for place, (name, values) in enumerate(lines.items()):
        colour, dashes = LINES[place % len(LINES)]
        (line,) = axes.plot(range(len(values)), values, dashes, marker="o", markersize=4, color=colour)
        tip(line, f"{name}: {', '.join(f'{v:.3g}' for v in values)}")
        handles.append(line)
    axes.set_ylim(0, 1.08 * max(*(v for values in lines.values() for v in values), 1e-12))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")
    axes.set_ylabel(y_title)
    axes.grid()
    figure.legend(handles, [printable(name) for name in lines], loc="outside upper left", ncols=4)
    told = "; ".join(f"{name}: {', '.join(f'{v:.3g}' for v in values)}" for name, values in lines.items())
    return svg(figure, title, f"By layer, {told}.")


@chart
def spectrum(title: str, sides: Mapping[str, Sequence[float]]) -> Markup:
    """Share of each side's energy per unit of directions, on a logarithmic axis, strongest direction first."""
    figure, (axes,) = new_figure(360, 200)
    shares = {side: [v / sum(values) for v in values] for side, values in sides.items() if sum(values) > 0}
    low = 1e-6 * max(v for values in shares.values() for v in values)  # below it nothing is to be seen
    handles = []
    for (colour, dashes), values in zip(LINES, shares.values(), strict=False):
        shown = [max(v, low) for v in values]
        handles.append(axes.stairs(shown, baseline=None, edgecolor=colour, linestyle=dashes, linewidth=1.5))
    _logarithmic(axes, [low, 1.0])
    axes.set_xlabel("unit of directions")
    axes.set_ylabel("share of the energy")
    figure.legend(handles, [printable(side) for side in shares], loc="outside upper left", ncols=1)
    told = "; ".join(
        f"{side}: the first tenth of the directions holds {100 * sum(v[: max(1, len(v) // 10)]):.0f} %"
        for side, v in shares.items()
    )
    return svg(figure, title, f"{told}.")


@chart
def columns(title: str, y_title: str, values: Sequence[float], x_title: str) -> Markup:
    """A column per value, in the given order."""
    figure, (axes,) = new_figure(360, 160)
    axes.stairs(values, fill=True, color=LINES[0][0])
    axes.set_xlim(0, len(values))
    axes.set_ylim(0, 1.05 * max(*values, 1e-12))
    axes.set_xlabel(x_title)
    axes.set_ylabel(y_title)
    axes.grid()
    return svg(figure, title, f"{len(values)} values from {min(values):g} to {max(values):g}.")


@chart
def width_map(title: str, widths_in: torch.Tensor, widths_out: torch.Tensor) -> Markup:
    """Bit-widths of a layer: a row per expert, a column per unit of directions; one panel for gate, up and down.

    Args:
        title: names the layer.
        widths_in: uint8 ``[E, 2, units]``; gate, up.
        widths_out: uint8 ``[E, units]``.
    """
    from matplotlib.colors import BoundaryNorm, ListedColormap

    panels = {"gate": widths_in[:, 0], "up": widths_in[:, 1], "down": widths_out}
    used = sorted({int(w) for panel in panels.values() for w in panel.unique()})
    known = list(WIDTHS)
    figure, axes = new_figure(360, int(min(max(4 * len(widths_out), 60), 200)) + 90, columns=3)
    between = BoundaryNorm([*(bits - 0.5 for bits in known), known[-1] + 0.5], len(known))
    for place, (ax, (name, panel)) in enumerate(zip(axes, panels.items(), strict=True)):
        # a 128-expert layer has some 25,000 units: pixels of an image instead of a rectangle each
        colours = ListedColormap(list(WIDTHS.values()))
        ax.imshow(panel.numpy(), colours, between, aspect="auto", interpolation="none")
        ax.set_title(name, fontsize=11)
        ax.spines[:].set_visible(True)
        ax.set_xticks([])
        ax.set_yticks([] if place else [0, len(panel) - 1])
    axes[0].set_ylabel("expert")
    figure.supxlabel("directions, strongest first", fontsize=11)
    names = [f"{bits}" for bits in used]
    figure.legend(
        [_swatch(WIDTHS[bits]) for bits in used],
        [*names[:-1], f"{names[-1]} bits"],
        loc="outside upper left",
        ncols=len(used),
        columnspacing=0.8,
        handlelength=1,
        handletextpad=0.4,
    )
    told = "; ".join(
        f"{name}: "
        + ", ".join(f"{100 * (panel == b).float().mean():.0f} % at {b} bits" for b in used if (panel == b).any())
        for name, panel in panels.items()
    )
    return svg(figure, title, f"{told}.")
