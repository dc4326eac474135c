"""Factors in trellis codes to stored bytes and back (docs/format.md).

On the input side a sequence is one direction's column of a group along I; the payload has the order of scalar codes. On
the output side it is one channel's column of a *chain*: units of one width, as many as give 128 directions, because
short sequences lose. A chain's units are every n-th of their matrix, n being the layout's ``stripes``.
"""

import ctypes
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import torch

from . import native_trellis
from .layout import ExpertsLayout, UnitIndex, index_units
from .steps import step_values, stored_steps
from .trellis import pack_windows, trellis_values, unpack_windows

#: Directions that a chain has at most, unless one unit has more.
CHAIN_DIRECTIONS = 128
#: Weights whose windows are packed at once: bounds the copies that packing makes.
_BATCH_WEIGHTS = 1 << 25


def chains_of(widths: Sequence[int], stripes: int, block_size: int) -> list[list[int]]:
    """The chains of one matrix of the output side in the order of the payload: unit numbers of each.

    Units > 0 wide, widest first, then by stripe (unit modulo ``stripes``), then by index; of each stripe's units of a
    width the fewest chains that hold them, the first ones longer by a unit where they are not equally long.
    """
    runs: dict[tuple[int, int], list[int]] = defaultdict(list)
    for unit, width in enumerate(widths):
        if width:
            runs[-width, unit % stripes].append(unit)
    most = max(1, CHAIN_DIRECTIONS // block_size)
    chains = []
    for _, units in sorted(runs.items()):
        count = -(-len(units) // most)
        size, longer = divmod(len(units), count)
        at = 0
        for number in range(count):
            end = at + size + (number < longer)
            chains.append(units[at:end])
            at = end
    return chains


def index_side(widths: torch.Tensor, layout: ExpertsLayout, side: str) -> UnitIndex:
    """The payload index of one side (`index_units`) of either family of codes.

    All units of a chain have the ``code_offset`` of the chain.

    Args:
        widths: uint8 ``[matrices, units]``.
        layout: sizes.
        side: "in" or "out".
    """
    if side == "in" or not layout.codes:
        return index_units(widths, layout.groups, group_major=side == "in")
    # of each unit: where its chain's first group is, how much further the next is, and where its own steps are
    places = torch.zeros(3, *widths.shape, dtype=torch.int64, device="cpu")
    places[2] = -1
    found: list[list[int]] = [[], [], [], []]
    quanta = rows = 0
    for matrix, row in enumerate(widths.tolist()):
        for units in chains_of(row, layout.stripes, layout.block_size):
            size = len(units) * row[units[0]]
            for at, unit in enumerate(units):
                own = matrix * len(row) + unit, quanta, size, rows + at * layout.groups
                for column, value in zip(found, own, strict=True):
                    column.append(value)
            quanta, rows = quanta + size * layout.groups, rows + len(units) * layout.groups
    chosen, *values = torch.tensor(found, dtype=torch.int64, device="cpu")
    places.flatten(1)[:, chosen] = torch.stack(values)
    start, size, step = places.to(widths.device)[:, :, None]
    group = torch.arange(layout.groups, device=widths.device)[:, None]
    return UnitIndex(start + group * size, torch.where(size > 0, step + group, -1))


def _tiles(widths: torch.Tensor, layout: ExpertsLayout, side: str) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """Tiles of one shape each: (width, matrices ``[n]``, units ``[n, units of a tile]``)."""
    found: dict[tuple[int, int], list[tuple[int, list[int]]]] = defaultdict(list)
    for matrix, row in enumerate(widths.tolist()):
        if side == "in":
            chains = [[unit] for unit, width in enumerate(row) if width]
        else:
            chains = chains_of(row, layout.stripes, layout.block_size)
        for units in chains:
            found[row[units[0]], len(units)].append((matrix, units))
    device = widths.device
    return [
        (width, torch.tensor([m for m, _ in tiles], device=device), torch.tensor([u for _, u in tiles], device=device))
        for (width, _), tiles in sorted(found.items())
    ]


def _few_at_once(
    kinds: Iterable[tuple[int, torch.Tensor, torch.Tensor]], unit_weights: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """The tiles of `_tiles` in batches of at most `_BATCH_WEIGHTS`, each unit of so many weights."""
    for width, matrix, units in kinds:
        batch = max(1, _BATCH_WEIGHTS // (unit_weights * units.shape[1]))
        for some, own in zip(matrix.split(batch), units.split(batch), strict=True):
            yield width, some, own


def pack_trellis_factor(
    windows: torch.Tensor, steps: torch.Tensor, widths: torch.Tensor, layout: ExpertsLayout, side: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """`factors.pack_factor` of trellis codes; ``windows`` in place of codes."""
    bs, gs, groups = layout.block_size, layout.group_size, layout.groups
    flat = widths.reshape(-1, widths.shape[-1])
    if side == "in":
        # [matrix, group, unit, row of the sequence, column]
        tiles = windows.reshape(len(flat), groups, gs, layout.units_in, bs).transpose(2, 3)
    else:
        tiles = windows.reshape(len(flat), layout.units_out, bs, groups, gs).permute(0, 3, 1, 2, 4)
    step_rows = steps.reshape(len(flat), groups, -1, bs)
    index = index_side(flat, layout, side)
    bits = int(flat.sum(dtype=torch.int64)) * groups
    kept = int((flat > 0).sum()) * groups
    payload = torch.empty(bits, layout.quantum, dtype=torch.uint8, device=windows.device)
    packed_steps = torch.empty(kept, bs, dtype=layout.step_dtype, device=windows.device)
    step_rows = stored_steps(step_rows, layout.step_dtype)
    for width, matrix, units in _few_at_once(_tiles(flat, layout, side), groups * bs * gs):
        # the rows of a chain's units, one unit after the other; [tile, group, rows, columns]
        rows = tiles[matrix[:, None], :, units].transpose(1, 2).flatten(2, 3).flatten(0, 1)
        size = width * units.shape[1]
        start = index.code_offset[matrix, :, units[:, 0]].flatten()
        places = start[:, None] + torch.arange(size, device=windows.device)
        payload[places.flatten()] = pack_windows(rows, width).view(-1, layout.quantum)
        packed_steps[index.step_offset[matrix[:, None], :, units]] = step_rows[matrix[:, None], :, units]
    return payload.flatten(), packed_steps.flatten()


def decode_trellis_factor(
    codes: torch.Tensor,
    steps: torch.Tensor,
    widths: torch.Tensor,
    index: UnitIndex,
    layout: ExpertsLayout,
    side: str,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """`factors.decode_factor` of trellis codes."""
    library = native_trellis.library() if codes.device.type == "cpu" else None
    if library is not None:
        return _decode_compiled(library, codes, steps, widths, index, layout, side).to(dtype)
    bs, gs, groups = layout.block_size, layout.group_size, layout.groups
    matrices, units = widths.shape
    inward = side == "in"
    m, n = (gs, bs) if inward else (bs, gs)
    tiles = torch.zeros(matrices, groups, units, m, n, dtype=dtype, device=codes.device)
    payload, step_rows = codes.view(-1, layout.quantum), steps.view(-1, bs)
    for width, matrix, chosen in _tiles(widths, layout, side):
        joined = chosen.shape[1]
        start = index.code_offset[matrix, :, chosen[:, 0]].flatten()
        places = start[:, None] + torch.arange(width * joined, device=codes.device)
        windows = unpack_windows(payload[places].flatten(1), width, m * joined, n)
        values = trellis_values(windows, width).view(len(matrix), groups, joined, m, n).transpose(1, 2)
        step = step_values(step_rows[index.step_offset[matrix[:, None], :, chosen]])
        tiles[matrix[:, None], :, chosen] = (values * (step[..., None, :] if inward else step[..., None])).to(dtype)
    if inward:
        return tiles.transpose(2, 3).reshape(matrices, layout.intermediate_size, layout.rank_in)
    return tiles.permute(0, 2, 3, 1, 4).reshape(matrices, layout.rank_out, layout.intermediate_size)


def _decode_compiled(
    library: ctypes.CDLL,
    codes: torch.Tensor,
    steps: torch.Tensor,
    widths: torch.Tensor,
    index: UnitIndex,
    layout: ExpertsLayout,
    side: str,
) -> torch.Tensor:
    """`decode_trellis_factor` in float32 by the compiled decoder."""
    bs, gs, groups = layout.block_size, layout.group_size, layout.groups
    inward = side == "in"
    rows, columns = (
        (layout.intermediate_size, layout.rank_in) if inward else (layout.rank_out, layout.intermediate_size)
    )
    out = torch.zeros(len(widths), rows, columns, dtype=torch.float32, device="cpu")
    step_rows, group = steps.view(-1, bs), torch.arange(groups, device="cpu")[:, None]
    column, direction = torch.arange(gs, device="cpu"), torch.arange(bs, device="cpu")
    for width, matrix, units in _tiles(widths, layout, side):
        offset = index.code_offset[matrix, :, units[:, 0]] * layout.quantum
        scale = step_values(step_rows[index.step_offset[matrix[:, None], :, units]]).transpose(1, 2)
        # where a tile's rows begin: those of the group along I, or those of the chain's units
        if inward:
            own = ((group * gs + column) * columns)[None] + units[:, :, None] * bs
        else:
            own = ((units[:, :, None] * bs + direction).flatten(1) * columns)[:, None] + group * gs
        place = own + matrix[:, None, None] * (rows * columns)
        native_trellis.decode_tiles(
            library,
            codes,
            offset.flatten(),
            width,
            scale.flatten(2).flatten(0, 1),
            not inward,
            place.flatten(0, 1),
            bs if inward else gs,
            out,
        )
    return out
