"""`down` for trellis codes: ``t = F z`` for every pair, weights decoded in registers.

A program owns a tile of pairs of one expert and BR directions of one unit, which are part of the sequences of its chain
(docs/format.md, "Tiles"), and walks the groups of I; the warps share the columns of a group. Everything else is as in
`down`: steps scale the sum over a group, for few tokens the last program of a token adds its experts, and where
programs would be few, several share the groups.
"""

import torch
import triton
import triton.language as tl

from .digits import product
from .down import down_reference, finish_tile, finish_without_experts
from .routing import pair_tile
from .trellis_codes import tile_values
from .trellis_gate_up import Z_SCALE


@triton.jit
def _unit_sum(
    z_ptr, token_pair, here, n, codes_ptr, steps_ptr, place, width, share, begin, end,
    I: tl.constexpr, BS: tl.constexpr, GS: tl.constexpr, WIDTHS: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
    SPREAD: tl.constexpr, JOINED: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """``[BR, BM]``: the ``share``-th BR directions of a unit times the groups from ``begin`` to ``end`` of z.

    place: pointer to the unit's six numbers, see `prepare`; width: the second of them.
    """
    QUANTUM: tl.constexpr = BS * GS // 16  # of uint16
    K: tl.constexpr = COLUMNS if GS // SPREAD > COLUMNS else GS // SPREAD
    SLICES: tl.constexpr = GS // SPREAD // K
    PER: tl.constexpr = BS // BR
    code = tl.load(place + 2)
    units = tl.load(place + 3) if JOINED else 1
    number = tl.load(place + 4) if JOINED else 0
    row = tl.load(place + 5)
    part = tl.arange(0, SPREAD)[:, None]
    k = part * (K * SLICES) + tl.arange(0, K)[None, :]
    pair = part * (K * SLICES // 2) + tl.arange(0, K // 2)[None, :]
    z = z_ptr + token_pair[None, None, :].to(tl.int64) * I + k[:, :, None]
    steps = steps_ptr + row.to(tl.int64) * BS + n
    acc = tl.zeros((SPREAD, BR, BM), tl.float32)
    for s in tl.static_range(len(WIDTHS)):
        if width == WIDTHS[s]:  # a loop of no rounds would begin all the same: copies to wait for, and a barrier
            step = tl.load(steps + begin * BS)
            for at in tl.range(begin * SLICES, end * SLICES, num_stages=STAGES):
                g, j = at // SLICES, at % SLICES
                tile = codes_ptr + (code + g * units * WIDTHS[s]).to(tl.int64) * QUANTUM
                values = tile_values(
                    tile, pair + j * (K // 2), units * PER, number * PER + share, WIDTHS[s], BR, JOINED or PER > 1, PACK
                )
                x = tl.load(z + (g * GS + j * K), mask=here[None, None, :], other=0.0)
                dot = product(values.to(x.dtype), x, tl.zeros((SPREAD, BR, BM), tl.float32), PACK)
                acc += dot * step.to(tl.float32)[None, :, None]
                then = tl.minimum(at + 1, end * SLICES - 1) // SLICES  # the last round loads its own once more
                step = tl.load(steps + then * BS)
    return tl.sum(acc, 0) * (1 / Z_SCALE)


@triton.jit(do_not_specialize=["T", "TILES", "E", "EACH"])
def trellis_down_kernel(
    z_ptr, tiles_ptr, pairs_ptr, codes_ptr, steps_ptr, places_ptr, t_ptr,
    ids_ptr, p_ptr, bias_ptr, base_ptr, y_ptr, arrivals_ptr, T, TILES, E, EACH,
    TOP_K: tl.constexpr, R: tl.constexpr, I: tl.constexpr, BS: tl.constexpr, GS: tl.constexpr, WIDTHS: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, SPREAD: tl.constexpr, JOINED: tl.constexpr, SUM: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_BASE: tl.constexpr, SPLIT: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    PACK: tl.constexpr,
):  # fmt: skip
    """Program (tile of pairs, tile of BR directions in payload order, SPLIT: EACH groups): t [P, R'] from z [P, I], a
    sixteenth of it.

    codes: uint16. places: [E, units, 6], see `prepare`. JOINED: chains may have several units. SUM and SPLIT as in
    `down_kernel`.
    """
    UNITS: tl.constexpr = R // BS
    GROUPS: tl.constexpr = I // GS
    PER: tl.constexpr = BS // BR
    program = tl.program_id(0)
    if program < TILES:
        e, token_pair = pair_tile(tiles_ptr, pairs_ptr, program, BM)
        if e >= 0:
            place = places_ptr + (e * UNITS + tl.program_id(1) // PER) * 6
            share = tl.program_id(1) % PER if PER > 1 else 0
            unit, width = tl.load(place), tl.load(place + 1)
            begin = tl.program_id(2) * EACH if SPLIT else 0
            end = tl.minimum(begin + EACH, GROUPS) if SPLIT else GROUPS
            if (not SPLIT) or ((width > 0) | (tl.program_id(2) == 0)):
                n = share * BR + tl.arange(0, BR)
                here = token_pair >= 0
                total = _unit_sum(
                    z_ptr, token_pair, here, n, codes_ptr, steps_ptr, place, width, share, begin, end,
                    I, BS, GS, WIDTHS, BM, BR, SPREAD, JOINED, COLUMNS, STAGES, PACK,
                )  # fmt: skip
                finish_tile(
                    total, token_pair, here, width > 0, unit * BS + n, unit * PER + share,
                    t_ptr, ids_ptr, p_ptr, bias_ptr, base_ptr, y_ptr, arrivals_ptr, T, E,
                    TOP_K, R, BR, SUM, HAS_BIAS, HAS_BASE, SPLIT,
                )  # fmt: skip
    elif SUM:
        finish_without_experts(program - TILES, ids_ptr, base_ptr, y_ptr, T, E, TOP_K, R, BM, BR, HAS_BASE)


def trellis_down_reference(z: torch.Tensor, ids: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Oracle: `down_reference` of a z that comes as a sixteenth; factor ``[E, R', I]`` decoded."""
    return down_reference(z, ids, factor) / Z_SCALE.value
