"""Charts of layers: one chart over all of them, whatever their number, and details of a single one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from markupsafe import Markup

from .charts import logarithmic, swatch
from .drawing import chart, label, new_figure, printable, svg, tip
from .style import AMOUNTS, INK, NONE, WIDTHS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: the narrowest and the widest chart, and what a layer adds, pixels
_NARROW, _WIDE, _LAYER = 360, 720, 26
_MATRICES = ("gate", "up", "down")


@dataclass(frozen=True)
class Series:
    """A value per layer: what it is of, its colour, and perhaps a second value to compare each with."""

    name: str
    colour: str
    values: Sequence[float]
    second: Sequence[float] | None = None


@chart
def bars_over_layers(title: str, axis: str, series: Sequence[Series], second: str = "") -> Markup:
    """A panel of bars per series, all on one scale; the second values are ticks across the bars.

    Args:
        title: what the chart shows.
        axis: of the values, with their unit.
        series: equally long, at least one.
        second: what the second values are.
    """
    layers = max(len(one.values) for one in series)
    across = max(1, min(len(series), 24 // max(layers, 1), 4))
    down = math.ceil(len(series) / across)
    width = _width(layers) if across == 1 else _WIDE
    figure, panels = new_figure(width, 70 + 130 * down, across, down)
    highest = max(*(v for one in series for v in (*one.values, *(one.second or ()))), 1e-12)
    for place, (axes, one) in enumerate(zip(panels, series, strict=False)):
        bars = axes.bar(range(len(one.values)), one.values, color=one.colour, width=0.7)
        for layer, (bar, value) in enumerate(zip(bars, one.values, strict=True)):
            tip(bar, f"{one.name}, layer {layer}: {value:.3g}")
        if one.second is not None:
            axes.plot(range(len(one.second)), one.second, "_", color=INK, markersize=9, markeredgewidth=2)
        axes.set_ylim(0, 1.08 * highest)
        _layer_axis(axes, len(one.values), labelled=place // across == down - 1)
        axes.set_title(label(one.name), fontsize=12, loc="left")
        axes.grid(axis="y")
    for axes in panels[len(series) :]:
        axes.set_visible(False)
    figure.supylabel(axis, fontsize=12)
    if second:
        from matplotlib.lines import Line2D

        mark = Line2D([], [], color=INK, marker="_", markersize=9, markeredgewidth=2, linestyle="none")
        figure.legend([mark], [second], loc="outside upper left")
    told = "; ".join(f"{one.name}: {', '.join(f'{v:.3g}' for v in one.values)}" for one in series)
    return svg(figure, title, f"By layer, {told}.")


@chart
def widths_over_layers(title: str, layers: Sequence[Mapping[str, Mapping[int, int]]]) -> Markup:
    """The share of every bit-width in a layer's units, a stacked bar per layer and a panel per matrix.

    Args:
        title: what the chart shows.
        layers: of each, matrix -> bit-width -> units (`describe`).
    """
    used = sorted({int(bits) for layer in layers for counts in layer.values() for bits in counts})
    figure, panels = new_figure(_width(len(layers)), 420, rows=3)
    told = []
    for axes, matrix in zip(panels, _MATRICES, strict=True):
        counts = [{int(bits): n for bits, n in layer[matrix].items()} for layer in layers]
        start = [0.0] * len(layers)
        for bits in used:
            shares = [100 * one.get(bits, 0) / sum(one.values()) for one in counts]
            bars = axes.bar(range(len(layers)), shares, bottom=start, color=WIDTHS[bits], width=0.85)
            for layer, (bar, share) in enumerate(zip(bars, shares, strict=True)):
                bar.set(edgecolor=INK, linewidth=0.4)
                tip(bar, f"{matrix}, layer {layer}: {share:.0f} % at {bits} bits")
            start = [s + share for s, share in zip(start, shares, strict=True)]
        axes.set_ylim(0, 100)
        axes.set_yticks([0, 50, 100])
        axes.set_title(matrix, fontsize=12, loc="left")
        _layer_axis(axes, len(layers), labelled=matrix == _MATRICES[-1])
        mean = [sum(bits * n for bits, n in one.items()) / sum(one.values()) for one in counts]
        told.append(f"{matrix}: {', '.join(f'{bits:.2f}' for bits in mean)}")
    figure.supylabel("% of the units of directions", fontsize=12)
    _widths_legend(figure, used)
    return svg(figure, title, f"Mean bit-width by layer, {'; '.join(told)}.")


@chart
def amounts_over_layers(
    title: str, x_axis: str, unit: str, panels: Mapping[str, Sequence[Sequence[float]]], none: str = ""
) -> Markup:
    """A map of amounts on a logarithmic scale: a row per layer, a column per value, a panel per name.

    Args:
        title: what the chart shows.
        x_axis: what the columns are.
        unit: of the amounts.
        panels: name -> layer -> values; rows of different lengths end early.
        none: what a value of 0 is called where it is to be seen as such.
    """
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    present = [v for rows in panels.values() for row in rows for v in row if v > 0]
    high = max(present, default=1.0)
    low = max(min(present, default=0.1), high / 1e4)
    colours = LinearSegmentedColormap.from_list("amounts", list(AMOUNTS)).with_extremes(bad=NONE)
    layers = max(len(rows) for rows in panels.values())
    figure, axes = new_figure(_WIDE, 120 + min(max(14 * layers, 60), 420), columns=len(panels))
    norm = LogNorm(low, high if high > low else 2 * low)
    for place, (ax, (name, rows)) in enumerate(zip(axes, panels.items(), strict=True)):
        longest = max(len(row) for row in rows)
        values = torch.full((len(rows), longest), torch.nan)
        for layer, row in enumerate(rows):
            values[layer, : len(row)] = torch.tensor([max(v, low) if v > 0 or not none else math.nan for v in row])
        ax.imshow(values.numpy(), colours, norm, aspect="auto", interpolation="none")
        ax.set_title(printable(name), fontsize=12, loc="left")
        ax.spines[:].set_visible(True)
        ax.set_xlabel(x_axis)
        ax.set_xticks(_ticks(longest))
        ax.set_yticks(_ticks(len(rows)))
        if not place:
            ax.set_ylabel("layer")
    _scale(figure, axes, colours, norm, unit)
    if none and any(v <= 0 for rows in panels.values() for row in rows for v in row):
        figure.legend([swatch(NONE)], [none], loc="outside upper left")
    told = "; ".join(
        f"{name}: " + ", ".join(f"layer {i} {min(row):.3g} to {max(row):.3g}" for i, row in enumerate(rows))
        for name, rows in panels.items()
    )
    return svg(figure, title, f"{unit}, {told}.")


def _scale(figure: "Figure", axes: "Sequence[Axes]", colours: object, norm: object, unit: str) -> None:
    """A scale of colours at the right; an image, where matplotlib's own would be hundreds of shapes."""
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(ScalarMappable(norm, colours), ax=list(axes), fraction=0.04, pad=0.02)  # type: ignore[arg-type]
    bar.set_label(unit)
    bar.outline.set_visible(False)
    if bar.solids is not None:
        bar.solids.set_rasterized(True)
    bar.ax.yaxis.set_major_formatter("{x:g}")
    bar.ax.minorticks_off()


def _width(layers: int) -> int:
    return max(_NARROW, min(_WIDE, 150 + _LAYER * layers))


def _layer_axis(axes: "Axes", layers: int, labelled: bool) -> None:
    axes.set_xlim(-0.6, max(layers, 6) - 0.4)  # two layers are no two walls
    axes.set_xticks(_ticks(layers))
    axes.tick_params(bottom=False)
    if labelled:
        axes.set_xlabel("layer")


def _ticks(count: int) -> list[int]:
    """At most some ten whole numbers below ``count``."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if count <= 10 * step or step == 1000)
    return list(range(0, count, step))


@chart
def spectrum(title: str, sides: Mapping[str, Sequence[float]]) -> Markup:
    """Share of each side's energy per unit of directions, on a logarithmic axis, strongest direction first."""
    figure, (axes,) = new_figure(360, 200)
    shares = {side: [v / sum(values) for v in values] for side, values in sides.items() if sum(values) > 0}
    low = 1e-6 * max(v for values in shares.values() for v in values)  # below it nothing is to be seen
    handles = []
    for dashes, values in zip(("-", ":"), shares.values(), strict=False):
        shown = [max(v, low) for v in values]
        handles.append(axes.stairs(shown, baseline=None, edgecolor=INK, linestyle=dashes, linewidth=1.5))
    logarithmic(axes, [low, 1.0])
    axes.set_xticks(_ticks(max(map(len, shares.values()))))
    axes.set_xlabel("unit of directions, strongest first")
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
    axes.stairs(values, fill=True, color=INK, alpha=0.7)
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
    figure.supxlabel("units of directions, strongest first", fontsize=11)
    _widths_legend(figure, used)
    told = "; ".join(
        f"{name}: "
        + ", ".join(f"{100 * (panel == b).float().mean():.0f} % at {b} bits" for b in used if (panel == b).any())
        for name, panel in panels.items()
    )
    return svg(figure, title, f"{told}.")


def _widths_legend(figure: "Figure", used: Sequence[int]) -> None:
    names = [f"{bits}" for bits in used]
    figure.legend(
        [swatch(WIDTHS[bits]) for bits in used],
        [*names[:-1], f"{names[-1]} bits"],
        loc="outside upper left",
        ncols=len(used),
        columnspacing=0.8,
        handlelength=1,
        handletextpad=0.4,
    )
