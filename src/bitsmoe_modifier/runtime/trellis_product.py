"""Experts in trellis codes times vectors, straight from the stored codes (trellis_product.cpp), for a decoding step.

Only compiled: in PyTorch, decoding the experts that a step reaches and keeping the last ones is faster.
"""

import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ..native import native_library
from ..storage.chains import chains_of, index_side
from ..storage.layout import ExpertsLayout
from ..storage.planes import WIDTHS
from ..storage.trellis import CODES, window_values

_SOURCE = Path(__file__).with_name("trellis_product.cpp")


@dataclass(frozen=True)
class TileIndex:
    """All tiles of codes of one side of a layer, expert after expert, on the CPU.

    Attributes:
        entries: int64 ``[tiles, 7]``: quantum where the tile begins; row of its first unit's steps; bit-width; units of
            its chain; where these begin in ``members``; row of the expert's vector that it meets; row of the expert's
            result that it adds to (input side).
        members: int64, the units of the chains, one chain after the other.
        bounds: where each expert's entries begin, and the end.
    """

    entries: torch.Tensor
    members: torch.Tensor
    bounds: list[int]


def index_tiles(widths: torch.Tensor, layout: ExpertsLayout, side: str) -> TileIndex:
    """The tiles of one side; ``widths``: uint8 ``[matrices, units]``."""
    index, matrices = index_side(widths, layout, side), 2 if side == "in" else 1
    code, step = index.code_offset.tolist(), index.step_offset.tolist()
    entries: list[tuple[int, ...]] = []
    members: list[int] = []
    bounds = [0]
    for matrix, row in enumerate(widths.tolist()):
        chains = (
            [[unit] for unit, width in enumerate(row) if width]
            if side == "in"
            else chains_of(row, layout.stripes, layout.block_size)
        )
        for units in chains:
            first = units[0]
            for group in range(layout.groups):
                places = (first, matrix % 2 * layout.groups + group) if side == "in" else (group, 0)
                begin = code[matrix][group][first], step[matrix][group][first]
                entries.append((*begin, row[first], len(units), len(members), *places))
            members += units
        if matrix % matrices == matrices - 1:
            bounds.append(len(entries))
    tiles = torch.tensor(entries, dtype=torch.int64, device="cpu").view(-1, 7)
    return TileIndex(tiles, torch.tensor(members, dtype=torch.int64, device="cpu"), bounds)


def is_available(x: torch.Tensor) -> bool:
    """Whether `trellis_product` multiplies for activations like ``x``: on a CPU with a compiler, without a gradient."""
    if x.device.type != "cpu" or x.dtype == torch.float64 or (torch.is_grad_enabled() and x.requires_grad):
        return False
    return native_library(_SOURCE) is not None


@cache
@torch.inference_mode(False)
def _tables() -> torch.Tensor:
    """`window_values` of every width, float32 ``[9, 256]``."""
    tables = torch.zeros(max(WIDTHS) + 1, 256, dtype=torch.float32, device="cpu")
    for width in CODES:
        tables[width] = window_values(width)
    return tables


@torch.compiler.disable
def trellis_product(
    codes: torch.Tensor,
    steps: torch.Tensor,
    tiles: TileIndex,
    layout: ExpertsLayout,
    side: str,
    experts: Sequence[int],
    v: torch.Tensor,
) -> torch.Tensor:
    """One vector times the factor of each of the given experts, in as many threads as torch has.

    Args:
        codes: uint8 1-D, the side's whole payload, checked (`storage.packed.check_structure`).
        steps: uint8 1-D, the side's whole steps.
        tiles: of the side, from `index_tiles`.
        layout: sizes.
        side: "in" (factors ``[2 I, R]``) or "out" (``[R', I]``).
        experts: whose factors; one may come several times.
        v: float32 ``[len(experts), R]`` or ``[len(experts), I]``.

    Returns:
        float32 ``[len(experts), 2 I]`` or ``[len(experts), R']``; its last bits depend on the CPU's instructions.

    Raises:
        RuntimeError: where `is_available` is false.
        ValueError: when steps are not stored as bytes.
    """
    library = native_library(_SOURCE)
    if library is None:
        raise RuntimeError("no compiled product of trellis codes here; decode the factors")
    if steps.dtype != torch.uint8 or codes.dtype != torch.uint8 or v.dtype != torch.float32:
        raise ValueError(f"the product reads bytes and float32, not {codes.dtype}, {steps.dtype} and {v.dtype}")
    inward, v = side == "in", v.contiguous()
    y = v.new_zeros(len(experts), 2 * layout.intermediate_size if inward else layout.rank_out)
    pieces = [(tiles.bounds[e], tiles.bounds[e + 1]) for e in experts]
    spans = torch.tensor(pieces, dtype=torch.int64, device="cpu").view(-1, 2)
    codes, steps = codes.detach(), steps.detach()

    def run(begin: int, end: int) -> None:
        tensors = (tiles.entries, spans[begin], tiles.members, codes, steps, _tables(), v[begin], y[begin])
        entry, span, member, code, step, table, source, target = (ctypes.c_void_p(t.data_ptr()) for t in tensors)
        numbers = (layout.quantum, layout.block_size, layout.group_size, layout.groups, int(inward))
        ends = source, ctypes.c_int64(v.shape[1]), target, ctypes.c_int64(y.shape[1])
        stored = entry, span, ctypes.c_int64(end - begin), member, code, step, table
        library.trellis_product(*stored, *map(ctypes.c_int64, numbers), *ends)

    threads = min(torch.get_num_threads(), len(experts))
    if threads < 2:
        if experts:
            run(0, len(experts))
        return y
    bounds = [len(experts) * i // threads for i in range(threads + 1)]
    list(_pool(threads).map(run, bounds[:-1], bounds[1:]))
    return y


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="bitsmoe")
