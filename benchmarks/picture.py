"""The picture of the home page: loss against size, of a table of docs/quality.md.

    python benchmarks/picture.py docs/quality.md bookmoe docs/loss.png

Takes the first table under the heading, whose columns are method, bits and KLD x1000; in letters that can be read on a
phone.
"""

import re
import sys
from pathlib import Path

#: what a name of the table begins with -> name in the picture, colour, marker
FAMILIES = {
    "rtn_": ("round to nearest", "#888888", "s"),
    "autoround_": ("AutoRound", "#2a9d4a", "D"),
    "gptq_": ("GPTQ", "#c8701d", "o"),
    "bitsmoe_": ("BitsMoE, scalar codes", "#7fb2e0", "v"),
    "trellis_bitsmoe_": ("BitsMoE", "#1d5fa8", "^"),
}


def points(page: str, heading: str) -> dict[str, list[tuple[float, float, float]]]:
    """(bits, loss, half of its range) of every family, by size.

    Raises:
        ValueError: when there is no such heading, or no such table under it.
    """
    found = re.search(rf"^#+ {re.escape(heading)}\n.*?(^\| method \| bits \| KLD x1000 .*?)\n\n", page, re.M | re.S)
    if found is None:
        raise ValueError(f"no table '| method | bits | KLD x1000 …' under a heading {heading!r}")
    rows: dict[str, list[tuple[float, float, float]]] = {}
    for line in found[1].splitlines()[2:]:
        name, bits, loss = (cell.strip() for cell in line.strip("|").split("|")[:3])
        family = next((prefix for prefix in FAMILIES if name.startswith(prefix)), None)
        if family is not None:
            mean, _, spread = loss.partition(" ± ")
            rows.setdefault(family, []).append((float(bits), float(mean), float(spread or 0)))
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
