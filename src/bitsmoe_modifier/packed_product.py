"""Matrix times vector straight from the stored codes, for the few (token, expert) pairs of a decoding step.

Decoding an expert writes every weight several times to use it once. Here a table turns each stored byte into the digits
that it holds, and these meet the vector in the order in which the byte holds them: it is the vector that is reordered,
not the weights. Nothing decoded outlives the call.
"""

from functools import cache

import torch

from .layout import ExpertsLayout, UnitIndex
from .planes import WIDTHS, digits, levels


@cache
def _table(width: int, place: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What the digits of a byte of plane ``place`` are worth in units of the step, ``[256, digits per byte]``.

    Summed over the planes this is ``2 * code - (2**width - 1)``.
    """
    f = digits(width)[place]
    shifts = torch.arange(0, 8, f, device=device)
    digit = (torch.arange(256, device=device)[:, None] >> shifts) & levels(f)
    return ((2 * digit - levels(f)) << sum(digits(width)[place + 1 :])).to(dtype)


def _tiles_product(tiles: torch.Tensor, width: int, m: int, v: torch.Tensor) -> torch.Tensor:
    """Codes times vectors, tile by tile.

    Args:
        tiles: uint8 ``[N, width * m * n / 8]``, the planes of ``m`` rows of ``n`` codes.
        width: bits of a code.
        m: rows of a tile.
        v: floats ``[N, n]``.

    Returns:
        ``[N, m]`` of v's dtype, in units of the step.
    """
    count, n = v.shape
    result, start = v.new_zeros(count, m, 1), 0
    for place, f in enumerate(digits(width)):
        row, per_byte = n * f // 8, 8 // f
        plane = tiles[:, start : start + m * row].to(torch.int32)
        table = _table(width, place, v.dtype, v.device)
        values = torch.nn.functional.embedding(plane, table).view(count, m, n)
        result = torch.baddbmm(result, values, v.view(count, per_byte, row).transpose(1, 2).reshape(count, n, 1))
        start += m * row
    return result.squeeze(2)


def packed_product(
    codes: torch.Tensor,
    steps: torch.Tensor,
    widths: torch.Tensor,
    index: UnitIndex,
    layout: ExpertsLayout,
    side: str,
    v: torch.Tensor,
) -> torch.Tensor:
    """One vector times each of the given matrices.

    Args:
        codes: uint8 1-D, the side's whole payload.
        steps: fp16 1-D, the side's whole steps.
        widths: uint8 ``[matrices, units]`` of the matrices wanted; a matrix may come several times.
        index: their rows of the side's `UnitIndex`.
        layout: sizes.
        side: "in" (matrices ``[I, R]``) or "out" (``[R', I]``).
        v: float32 or float64, ``[matrices, R]`` or ``[matrices, I]``.

    Returns:
        ``[matrices, I]`` or ``[matrices, R']`` of v's dtype.
    """
    bs, gs, groups = layout.block_size, layout.group_size, layout.groups
    step_rows = steps.view(-1, bs)
    inward = side == "in"
    y = v.new_zeros(len(v), groups, gs) if inward else v.new_zeros(len(v), widths.shape[1], bs)
    for width in WIDTHS[1:]:
        matrix, unit = (widths == width).nonzero(as_tuple=True)
        if not len(matrix):
            continue
        # every stretch of ``width`` quanta, of which some are (unit, group)s of this width
        stretches = codes.unfold(0, width * layout.quantum, layout.quantum)
        tiles = stretches[index.code_offset[matrix, :, unit].flatten()]
        step = step_rows[index.step_offset[matrix, :, unit]].to(v.dtype)  # [units found, groups, bs]
        if inward:
            scaled = v.view(len(v), -1, bs)[matrix, unit][:, None] * step
            product = _tiles_product(tiles, width, gs, scaled.flatten(0, 1))
            y.index_add_(0, matrix, product.view(-1, groups, gs))
        else:
            product = _tiles_product(tiles, width, bs, v.view(len(v), groups, gs)[matrix].flatten(0, 1))
            y.index_put_((matrix, unit), (product.view(-1, groups, bs) * step).sum(1))
    return y.flatten(1)
