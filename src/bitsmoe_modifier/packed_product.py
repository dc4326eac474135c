"""Experts times vectors straight from the stored codes, for the few (token, expert) pairs of a decoding step.

Decoding an expert writes every weight several times to use it once. Here a table turns each stored byte into the digits
that it holds, and these meet the vector in the order in which the byte holds them: it is the vector that is reordered,
not the weights. All planes of one digit size go through at once, whatever the width of their units. Nothing decoded
outlives the call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from .layout import ExpertsLayout, UnitIndex
from .planes import WIDTHS, digits, levels


@dataclass(frozen=True)
class PlaneIndex:
    """All planes of one digit size on one side of a layer, expert after expert.

    Attributes:
        digit: bits of a digit.
        entries: int64 ``[planes, 5]``: quantum where the plane begins; row of its steps; what its digits are worth; row
            of the expert's vector that it meets; row of the expert's result that it adds to.
        bounds: where each expert's entries begin, and the end.
    """

    digit: int
    entries: torch.Tensor
    bounds: list[int]


def index_planes(widths: torch.Tensor, index: UnitIndex, layout: ExpertsLayout, side: str) -> list[PlaneIndex]:
    """The planes of one side, by digit size.

    Args:
        widths: uint8 ``[matrices, units]``.
        index: the side's.
        layout: sizes.
        side: "in" or "out".
    """
    matrices = 2 if side == "in" else 1  # of an expert
    found = []
    for f in (4, 2, 1):
        parts = []
        for width in WIDTHS:
            sizes = digits(width)
            for place in (i for i, size in enumerate(sizes) if size == f):
                matrix, unit = (widths == width).nonzero(as_tuple=True)
                group = torch.arange(layout.groups, device=widths.device).expand(len(matrix), -1)
                unit_row, group_row = unit[:, None].expand_as(group), matrix[:, None] % matrices * layout.groups + group
                start, worth = sum(sizes[:place]), 1 << sum(sizes[place + 1 :])
                columns = (
                    matrix[:, None].expand_as(group) // matrices,
                    index.code_offset[matrix, :, unit] + start,
                    index.step_offset[matrix, :, unit],
                    torch.full_like(group, worth),
                    *((unit_row, group_row) if side == "in" else (group_row, unit_row)),
                )
                parts.append(torch.stack([column.flatten() for column in columns], 1))
        table = torch.cat(parts)
        if len(table):
            table = table[table[:, 0].argsort(stable=True)]
            experts = torch.arange(len(widths) // matrices + 1, device=widths.device)
            bounds = torch.searchsorted(table[:, 0].contiguous(), experts).tolist()
            found.append(PlaneIndex(f, table[:, 1:].contiguous(), bounds))
    return found


def packed_product(
    codes: torch.Tensor,
    steps: torch.Tensor,
    planes: Sequence[PlaneIndex],
    layout: ExpertsLayout,
    side: str,
    experts: Sequence[int],
    v: torch.Tensor,
) -> torch.Tensor:
    """One vector times the factor of each of the given experts.

    Args:
        codes: uint8 1-D, the side's whole payload.
        steps: fp16 1-D, the side's whole steps.
        planes: of the side, from `index_planes`.
        layout: sizes.
        side: "in" (factors ``[2 I, R]``) or "out" (``[R', I]``).
        experts: whose factors; one may come several times.
        v: float32 or float64, ``[len(experts), R]`` or ``[len(experts), I]``.

    Returns:
        ``[len(experts), 2 I]`` or ``[len(experts), R']`` of v's dtype.
    """
    bs, gs, count = layout.block_size, layout.group_size, len(experts)
    step_rows, inward = steps.view(-1, bs), side == "in"
    n, m, size = (bs, gs, 2 * layout.intermediate_size) if inward else (gs, bs, layout.rank_out)
    vectors, y = v.reshape(-1, n), v.new_zeros(count * size // m, m)
    numbers = torch.arange(count, device=v.device).unbind()
    for part in planes:
        f, bounds = part.digit, part.bounds
        spans = [(bounds[e], bounds[e + 1]) for e in experts]
        which = torch.cat([number.expand(end - begin) for number, (begin, end) in zip(numbers, spans, strict=True)])
        entries = torch.cat([part.entries[begin:end] for begin, end in spans])
        place, row, worth, source, target = entries.unbind(1)
        # every stretch of ``f`` quanta, of which the planes are some
        tiles = codes.unfold(0, f * layout.quantum, layout.quantum)[place]
        values = torch.nn.functional.embedding(tiles.to(torch.int32), _table(f, v.dtype, v.device)).view(-1, m, n)
        step = step_rows[row].to(v.dtype) * worth[:, None]
        x = vectors[which * (len(vectors) // count) + source]
        x = (x * step if inward else x).view(-1, 8 // f, n * f // 8).transpose(1, 2).reshape(-1, 1, n)
        product = torch.bmm(x, values.transpose(1, 2)).squeeze(1)  # on a CPU 4 times as fast as values @ x
        y.index_add_(0, which * (size // m) + target, product if inward else product * step)
    return y.view(count, size)


@cache
def _table(f: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``2 d - (2**f - 1)`` of every digit d of ``f`` bits of every byte, ``[256, 8 / f]``."""
    digit = (torch.arange(256, device=device)[:, None] >> torch.arange(0, 8, f, device=device)) & levels(f)
    return (2 * digit - levels(f)).to(dtype)
