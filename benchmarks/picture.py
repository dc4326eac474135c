"""Pictures of the docs: loss against size, of a table of docs/quality.md.

    python benchmarks/picture.py docs/quality.md "Real weights" docs/real-weights.png
    python benchmarks/picture.py docs/quality.md bookmoe docs/bookmoe.png

Takes the first table under the heading that has the columns bits and KLD x1000, or bits and WikiText-2; in letters that
can be read on a phone.
"""

import re
import sys
from pathlib import Path

#: what a name of the table is found by, first match first -> name in the picture, colour, marker
FAMILIES = {
    r"rtn_": ("round to nearest", "#888888", "s"),
    r"autoround_": ("AutoRound", "#2a9d4a", "D"),
    r"gptq_": ("GPTQ", "#c8701d", "o"),
    r"gguf_": ("llama.cpp", "#8a5cb8", "P"),
    r"ik_": ("ik_llama.cpp", "#c2559d", "X"),
    r"(scalar_bitsmoe_[0-9_]+|bitsmoe_[0-9._]+(:codes=scalar)?)$": ("BitsMoE, scalar codes", "#7fb2e0", "v"),
    r"(trellis_bitsmoe_[0-9_]+|bitsmoe_[0-9.]+:codes=trellis)$": ("BitsMoE", "#1d5fa8", "^"),
}
LOSSES = ("KLD x1000", "WikiText-2")


def points(page: str, heading: str) -> dict[str, list[tuple[float, float, float]]]:
    """(bits, loss, half of its range) of every family, by size.

    Raises:
        ValueError: when there is no such heading, or no such table under it.
    """
    _, found, rest = page.partition(f"# {heading}\n")
    rows: dict[str, list[tuple[float, float, float]]] = {}
    places: tuple[int, int] | None = None
    for line in rest.splitlines() if found else ():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if places is None and "bits" in cells and any(loss in cells for loss in LOSSES):
            places = cells.index("bits"), next(cells.index(loss) for loss in LOSSES if loss in cells)
        elif places is not None and not cells:
            break
        elif places is not None and (family := next((f for f in FAMILIES if re.match(f, cells[0])), None)):
            bits, (mean, _, spread) = float(cells[places[0]]), cells[places[1]].partition(" ± ")
            rows.setdefault(family, []).append((bits, float(mean), float(spread or 0)))
    if not rows:
        raise ValueError(f"no table with the columns bits and {' or '.join(LOSSES)} under a heading {heading!r}")
    return {family: sorted(rows[family]) for family in FAMILIES if family in rows}


def draw(families: dict[str, list[tuple[float, float, float]]], path: Path) -> None:
    """A line per family, loss on a logarithmic axis."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(6.4, 5.0), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    for family, members in families.items():
        label, colour, marker = FAMILIES[family]
        bits, losses, spreads = zip(*members, strict=True)
        line = "none" if len(members) == 1 else "-"
        axes.errorbar(bits, losses, spreads, color=colour, marker=marker, markersize=8, label=label, linestyle=line)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=14)
    axes.set_xlabel("bits per expert weight", fontsize=15)
    axes.set_ylabel("loss (KL divergence x 1000)", fontsize=15)
    axes.grid(True, color="#e0e0e0")
    figure.legend(frameon=False, fontsize=13, loc="outside upper left", ncols=2)
    figure.savefig(path)


def main() -> None:
    """Command line."""
    page, heading, out = sys.argv[1:]
    draw(points(Path(page).read_text(encoding="utf-8"), heading), Path(out))


if __name__ == "__main__":
    main()
