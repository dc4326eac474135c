"""Launch sizes that were found by trying them on a GPU, instead of by `launch`'s rules.

`benchmarks/gpu.py --stage tune` writes a table, JSON: GPU's name -> layer (`layer_key`) -> number of pairs, a power of
two -> `Sizes`. Read are ``tuned.json`` beside this file, where there is one, and over it the file that BITSMOE_TUNED
names. Steps without an entry go by the rules.
"""

import functools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

from bitsmoe_modifier.storage.layout import ExpertsLayout


@dataclass(frozen=True)
class Sizes:
    """How a decoding step of one layer is launched; None: by the rules.

    Attributes:
        parts: programs of gate_up that share a tile: 1, or an even number up to 16.
        warps_in: of a program of gate_up: 1, 2 or 4, of 16 directions of a unit or more; trellis codes only.
        rows: directions of a program of down: 32, 64 or 128, at most the block; scalar codes only.
        warps: of a program of down: 1, 2, 4 or 8, of 16 columns of a group or more; trellis codes only.
        splits: programs of down that share a tile's groups: 1 to 8.
        stages_in: of gate_up's pipeline, 2 to 5.
        stages_out: of down's.
    """

    parts: int | None = None
    warps_in: int | None = None
    rows: int | None = None
    warps: int | None = None
    splits: int | None = None
    stages_in: int | None = None
    stages_out: int | None = None

    def __post_init__(self) -> None:
        known = {
            "parts": (1, *range(2, 17, 2)),
            "warps_in": (1, 2, 4),
            "rows": (16, 32, 64, 128),
            "warps": (1, 2, 4, 8),
        }
        known |= {"splits": tuple(range(1, 9)), "stages_in": (2, 3, 4, 5), "stages_out": (2, 3, 4, 5)}
        for field in fields(self):
            value, allowed = getattr(self, field.name), known[field.name]
            if value is not None and value not in allowed:
                raise ValueError(f"{field.name} {value} is no launch size (known: {', '.join(map(str, allowed))})")

    def fits(self, layout: ExpertsLayout) -> bool:
        """Whether a layer can be launched so."""
        rows = self.rows is None or (not layout.codes and layout.block_size % self.rows == 0)
        warps = self.warps is None or (bool(layout.codes) and layout.group_size >= 16 * self.warps)
        warps &= self.warps_in is None or (bool(layout.codes) and layout.block_size >= 16 * self.warps_in)
        splits = self.splits is None or self.splits <= layout.intermediate_size // layout.group_size
        return rows and warps and splits and (self.parts is None or self.parts <= max(1, layout.units_in))


RULES = Sizes()
_forced: list[Sizes] = []


def layer_key(layout: ExpertsLayout) -> str:
    """The name of a layer's sizes in the table."""
    sizes = layout.num_experts, layout.rank_in, layout.rank_out, layout.intermediate_size
    return "x".join(map(str, (*sizes, layout.block_size, layout.group_size))) + "-trellis" * layout.codes


def rounded(pairs: int) -> int:
    """The power of two that stands for a number of pairs: the next one."""
    power = 1
    while power < pairs:
        power *= 2
    return power


def read(path: Path) -> dict[str, dict[str, dict[int, Sizes]]]:
    """The table of one file.

    Raises:
        ValueError: where the file is no such table.
    """
    try:
        content = json.loads(path.read_text())
        return {
            gpu: {
                layer: {int(pairs): Sizes(**sizes) for pairs, sizes in entries.items()}
                for layer, entries in layers.items()
            }
            for gpu, layers in content.items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no table of launch sizes ({error}); write it by benchmarks/gpu.py --stage tune"
        ) from error


@functools.cache
def table() -> dict[str, dict[str, dict[int, Sizes]]]:
    """All entries that are there, read once."""
    found: dict[str, dict[str, dict[int, Sizes]]] = {}
    own = Path(__file__).parent / "tuned.json"
    for path in ([own] if own.exists() else []) + [Path(p) for p in (os.environ.get("BITSMOE_TUNED"),) if p]:
        for gpu, layers in read(path).items():
            for layer, entries in layers.items():
                found.setdefault(gpu, {}).setdefault(layer, {}).update(entries)
    return found


def entries_of(gpu: str, layout: ExpertsLayout) -> dict[int, Sizes]:
    """The entries of a layer on the GPU of that name, by pairs."""
    found = table().get(gpu, {}).get(layer_key(layout), {})
    return {pairs: sizes for pairs, sizes in found.items() if sizes.fits(layout)}


def sizes_of(entries: dict[int, Sizes], pairs: int) -> Sizes:
    """The entry for a step, or `RULES`; while `forcing`, what is forced."""
    if _forced:
        return _forced[-1]
    return entries.get(rounded(pairs), RULES) if entries else RULES


@contextmanager
def forcing(sizes: Sizes) -> Iterator[None]:
    """Launch all steps so: how sizes are tried."""
    _forced.append(sizes)
    try:
        yield
    finally:
        _forced.pop()
