"""Experts times vectors straight from the stored codes, for the few (token, expert) pairs of a decoding step.

Decoding an expert writes every weight several times to use it once. Here a table turns each stored byte into the digits
that it holds, and these meet the vector in the order in which the byte holds them: it is the vector that is reordered,
not the weights. All planes of one digit size go through at once, whatever the width of their units; of a decoding
step's time, PyTorch's operations themselves are the larger part, so there are few of them. Nothing decoded outlives the
call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from ..storage.layout import ExpertsLayout, UnitIndex
from ..storage.planes import DIGITS, WIDTHS, digits, levels
from ..storage.steps import step_values


@dataclass(frozen=True)
class PlaneIndex:
    """All planes of one side of a layer: digit size after digit size (`DIGITS`), in each expert after expert.

    Attributes:
        entries: int64 ``[planes, 5]``: quantum where the plane begins; row of its steps; what its digits are worth; row
            of the expert's vector that it meets; row of the expert's result that it adds to.
        bounds: for each digit size, where each expert's entries begin, and the end.
    """

    entries: torch.Tensor
    bounds: list[list[int]]


def index_planes(widths: torch.Tensor, index: UnitIndex, layout: ExpertsLayout, side: str) -> PlaneIndex:
    """The planes of one side.

    Args:
        widths: uint8 ``[matrices, units]``.
        index: the side's.
        layout: sizes.
        side: "in" or "out".
    """
    matrices = 2 if side == "in" else 1  # of an expert
    experts = torch.arange(len(widths) // matrices + 1, device=widths.device)
    found, bounds, before = [], [], 0
    for f in DIGITS:
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
        table = table[table[:, 0].argsort(stable=True)]
        bounds.append((torch.searchsorted(table[:, 0].contiguous(), experts) + before).tolist())
        found.append(table[:, 1:])
        before += len(table)
    return PlaneIndex(torch.cat(found), bounds)


def packed_product(
    codes: torch.Tensor,
    steps: torch.Tensor,
    planes: PlaneIndex,
    layout: ExpertsLayout,
    side: str,
    experts: Sequence[int],
    v: torch.Tensor,
) -> torch.Tensor:
    """One vector times the factor of each of the given experts.

    Args:
        codes: uint8 1-D, the side's whole payload.
        steps: 1-D as stored, the side's whole steps.
        planes: of the side, from `index_planes`.
        layout: sizes.
        side: "in" (factors ``[2 I, R]``) or "out" (``[R', I]``).
        experts: whose factors; one may come several times.
        v: float32 or float64, ``[len(experts), R]`` or ``[len(experts), I]``.

    Returns:
        ``[len(experts), 2 I]`` or ``[len(experts), R']`` of v's dtype.
    """
    bs, gs, count, inward = layout.block_size, layout.group_size, len(experts), side == "in"
    n, m, size = (bs, gs, 2 * layout.intermediate_size) if inward else (gs, bs, layout.rank_out)
    spans = [(bounds[e], bounds[e + 1]) for bounds in planes.bounds for e in experts]
    entries = torch.cat([planes.entries[begin:end] for begin, end in spans])
    place, row, worth, source, target = entries.unbind(1)
    lengths = torch.tensor([end - begin for begin, end in spans], device=v.device)
    which = torch.tensor([*range(count)] * len(DIGITS), device=v.device)
    which = which.repeat_interleave(lengths, output_size=len(entries))

    x = v.reshape(-1, n).index_select(0, source.add(which, alpha=v.shape[1] // n))
    step = step_values(steps.view(-1, bs).index_select(0, row)).to(v.dtype) * worth[:, None]
    x = x * step if inward else x
    products, at = [], 0
    for number, f in enumerate(DIGITS):
        planned = sum(end - begin for begin, end in spans[number * count : (number + 1) * count])
        if planned:
            # every stretch of ``f`` quanta, of which the planes are some
            tiles = codes.unfold(0, f * layout.quantum, layout.quantum)[place[at : at + planned]]
            values = _table(f, v.dtype, v.device).index_select(0, tiles.int().flatten()).view(v.dtype).view(-1, m, n)
            met = x[at : at + planned].index_select(1, _order(n, f, v.device))
            products.append(torch.bmm(met[:, None], values.mT))  # on a CPU 4 times as fast as values @ met
            at += planned
    product = torch.cat(products).squeeze(1) if products else x.new_empty(0, m)
    y = v.new_zeros(count * size // m, m)
    y.index_add_(0, target.add(which, alpha=size // m), product if inward else product * step)
    return y.view(count, size)


# both serve later calls under any autograd mode


@cache
@torch.inference_mode(False)
def _table(f: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``2 d - (2**f - 1)`` of every digit d of ``f`` bits of every byte, ``[256, 8 / f]`` of ``dtype``.

    Where a number type is as large as a row, the rows are given as such numbers, ``[256]``: picking single elements is
    three times as fast as picking rows.
    """
    digit = (torch.arange(256, device=device)[:, None] >> torch.arange(0, 8, f, device=device)) & levels(f)
    rows = (2 * digit - levels(f)).to(dtype)
    whole = {8: torch.complex64, 16: torch.complex128}.get(rows[0].nbytes)
    return rows if whole is None else rows.view(whole).flatten()


@cache
@torch.inference_mode(False)
def _order(n: int, f: int, device: torch.device) -> torch.Tensor:
    """Element of the vector that each digit of a plane's row of ``n`` meets, in the order of the row's bytes."""
    return torch.arange(n, device=device).view(8 // f, n * f // 8).T.flatten()
