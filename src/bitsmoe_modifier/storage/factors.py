"""Codes and scales of a factor or a basis to stored bytes and back (docs/format.md)."""

import torch

from .chains import decode_trellis_factor, pack_trellis_factor
from .layout import ExpertsLayout, UnitIndex, index_units
from .planes import code_values, pack_codes, unpack_codes
from .steps import step_values, stored_steps

#: Bytes of factors that kernels write out in 16 bits at a time, about: experts follow one another in parts of so many.
WRITTEN_BYTES = 2**28

# ------------------------------------------------------------------------------------------------- factors


def pack_factor(
    codes: torch.Tensor, steps: torch.Tensor, widths: torch.Tensor, layout: ExpertsLayout, side: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay out the codes and steps of one side in payload order.

    Args:
        codes: uint8, ``[E, 2, I, R]`` (side "in") or ``[E, R', I]`` (side "out"); windows where the layout's codes are
            trellis codes.
        steps: float, storable (`steps`), ``[E, 2, groups, R]`` or ``[E, groups, R']``.
        widths: uint8, ``[E, 2, units]`` or ``[E, units]``.
        layout: sizes.
        side: "in" or "out".

    Returns:
        (codes uint8 1-D, steps 1-D) as stored.
    """
    if layout.codes:
        return pack_trellis_factor(codes, steps, widths, layout, side)
    bs, gs, groups = layout.block_size, layout.group_size, layout.groups
    if side == "in":
        flat = widths.reshape(-1, layout.units_in)
        # [matrix, group, unit, column, direction]
        tiles = codes.reshape(len(flat), groups, gs, layout.units_in, bs).transpose(2, 3)
    else:
        flat = widths.reshape(-1, layout.units_out)
        # [matrix, group, unit, direction, column]
        tiles = codes.reshape(len(flat), layout.units_out, bs, groups, gs).permute(0, 3, 1, 2, 4)
    step_rows = steps.reshape(len(flat), groups, -1, bs)
    index = index_units(flat, groups, group_major=side == "in")
    bits = int(flat.sum(dtype=torch.int64)) * groups
    kept = int((flat > 0).sum()) * groups
    payload = torch.empty(bits, layout.quantum, dtype=torch.uint8, device=codes.device)
    packed_steps = torch.empty(kept, bs, dtype=layout.step_dtype, device=codes.device)
    step_rows = stored_steps(step_rows, layout.step_dtype)
    for width in flat.unique().tolist():
        if width:
            chosen = (flat == width)[:, None].expand(-1, groups, -1)
            rows = pack_codes(tiles[chosen], width).view(-1, width, layout.quantum)
            places = index.code_offset[chosen][:, None] + torch.arange(width, device=codes.device)
            payload[places.flatten()] = rows.flatten(0, 1)
            packed_steps[index.step_offset[chosen]] = step_rows[chosen]
    return payload.flatten(), packed_steps.flatten()


def decode_factor(
    codes: torch.Tensor,
    steps: torch.Tensor,
    widths: torch.Tensor,
    index: UnitIndex,
    layout: ExpertsLayout,
    side: str,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Decode the factors of the given matrices; the oracle of every faster path.

    Args:
        codes: uint8 1-D, the side's whole payload.
        steps: 1-D as stored, the side's whole steps.
        widths: uint8 ``[matrices, units]`` of the matrices wanted.
        index: their rows of the side's `UnitIndex`.
        layout: sizes.
        side: "in" or "out".
        dtype: of the result; the products are formed in float32, where they are exact.

    Returns:
        ``[matrices, I, R]`` (side "in") or ``[matrices, R', I]`` (side "out").
    """
    if layout.codes:
        return decode_trellis_factor(codes, steps, widths, index, layout, side, dtype)
    bs, gs, groups = layout.block_size, layout.group_size, layout.groups
    matrices, units = widths.shape
    m, n = (gs, bs) if side == "in" else (bs, gs)
    tiles = torch.zeros(matrices, groups, units, m, n, dtype=dtype, device=codes.device)
    payload, step_rows = codes.view(-1, layout.quantum), steps.view(-1, bs)
    for width in widths.unique().tolist():
        if width:
            chosen = (widths == width)[:, None].expand(-1, groups, -1)
            places = index.code_offset[chosen][:, None] + torch.arange(width, device=codes.device)
            values = code_values(unpack_codes(payload[places].flatten(1), width, m, n), width)
            step = step_values(step_rows[index.step_offset[chosen]])
            tiles[chosen] = (values * (step[:, None, :] if side == "in" else step[:, :, None])).to(dtype)
    if side == "in":
        return tiles.transpose(2, 3).reshape(matrices, layout.intermediate_size, layout.rank_in)
    return tiles.permute(0, 2, 3, 1, 4).reshape(matrices, layout.rank_out, layout.intermediate_size)


# --------------------------------------------------------------------------------------------------- bases


def pack_basis(codes: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Pack basis codes row by row: uint8 ``[rows, columns]`` to uint8 ``[rows, columns * bits / 8]``.

    The columns of each group of ``group`` elements form a row of one plane (4 or 8 bits: one or two 4-bit digits; an
    8-bit code is stored as itself).
    """
    if bits == 8:
        return codes.contiguous()
    rows, columns = codes.shape
    return pack_codes(codes.reshape(rows, columns // group, group), bits).view(rows, columns * bits // 8)


def decode_basis(basis: torch.Tensor, step: torch.Tensor | None, bits: int, group: int) -> torch.Tensor:
    """Decode a stored basis to float32 ``[rows, columns]``; ``step`` is fp16 ``[rows, columns / group]`` or None."""
    if bits == 16 or step is None:
        return basis.to(torch.float32)
    rows = basis.shape[0]
    columns = basis.shape[1] * 8 // bits
    codes = basis if bits == 8 else unpack_codes(basis.reshape(rows, -1), bits, columns // group, group)
    values = code_values(codes.reshape(rows, columns // group, group), bits)
    return (values * step.to(torch.float32)[:, :, None]).view(rows, columns)
