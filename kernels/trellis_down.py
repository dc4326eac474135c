"""`down` for trellis codes: ``t = F z`` for every pair, weights decoded in registers.

A program owns a tile of pairs of one expert and BR directions of one unit, which are part of the sequences of its chain
(docs/format.md, "Tiles"), and walks the groups of I; the warps share the columns of a group. Everything else is as in
`down`: steps scale the sum over a group, and for few tokens the last program of a token adds its experts.
"""

import torch
import triton
import triton.language as tl

from .arrival import arrive
from .digits import product
from .down import _finish_tokens, _present, down_reference
from .routing import pair_tile
from .trellis_codes import slices, tile_values
from .trellis_gate_up import Z_SCALE


@triton.jit(do_not_specialize=["T", "TILES", "E"])
def trellis_down_kernel(
    z_ptr, tiles_ptr, pairs_ptr, codes_ptr, steps_ptr, places_ptr, t_ptr,
    ids_ptr, p_ptr, bias_ptr, base_ptr, y_ptr, arrivals_ptr, T, TILES, E,
    TOP_K: tl.constexpr, R: tl.constexpr, I: tl.constexpr, BS: tl.constexpr, GS: tl.constexpr, WIDTHS: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, SPREAD: tl.constexpr, JOINED: tl.constexpr, SUM: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_BASE: tl.constexpr, STAGES: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Program (tile of pairs, tile of BR directions in payload order): t [P, R'] from z [P, I], a sixteenth of it.

    codes: uint16. places: [E, units, 6], see `prepare`. JOINED: chains may have several units. SUM as in `down_kernel`.
    """
    UNITS: tl.constexpr = R // BS
    GROUPS: tl.constexpr = I // GS
    QUANTUM: tl.constexpr = BS * GS // 16  # of uint16
    SLICES: tl.constexpr = slices(GS // SPREAD)
    K: tl.constexpr = GS // SPREAD // SLICES
    PER: tl.constexpr = BS // BR
    program = tl.program_id(0)
    if program < TILES:
        e, token_pair = pair_tile(tiles_ptr, pairs_ptr, program, BM)
        if e >= 0:
            place = places_ptr + (e * UNITS + tl.program_id(1) // PER) * 6
            share = tl.program_id(1) % PER if PER > 1 else 0
            unit, width, code = tl.load(place), tl.load(place + 1), tl.load(place + 2)
            units = tl.load(place + 3) if JOINED else 1
            number = tl.load(place + 4) if JOINED else 0
            row = tl.load(place + 5)
            n = share * BR + tl.arange(0, BR)
            part = tl.arange(0, SPREAD)[:, None]
            k = part * (K * SLICES) + tl.arange(0, K)[None, :]
            pair = part * (K * SLICES // 2) + tl.arange(0, K // 2)[None, :]
            here = token_pair >= 0
            z = z_ptr + token_pair[None, None, :].to(tl.int64) * I + k[:, :, None]
            steps = steps_ptr + row.to(tl.int64) * BS + n
            acc = tl.zeros((SPREAD, BR, BM), tl.float32)
            for s in tl.static_range(len(WIDTHS)):
                rounds = tl.where(width == WIDTHS[s], GROUPS, 0)  # a loop of no rounds instead of a branch
                step = tl.load(steps, mask=n * 0 + rounds > 0, other=0.0)
                for g in tl.range(0, rounds, num_stages=STAGES):
                    tile = codes_ptr + (code + g * units * WIDTHS[s]).to(tl.int64) * QUANTUM
                    dot = tl.zeros((SPREAD, BR, BM), tl.float32)
                    for j in tl.static_range(SLICES):
                        values = tile_values(
                            tile, pair + j * (K // 2), units * PER, number * PER + share, WIDTHS[s], BR,
                            JOINED or PER > 1, PACK,
                        )  # fmt: skip
                        x = tl.load(z + (g * GS + j * K), mask=here[None, None, :], other=0.0)
                        dot = product(values.to(x.dtype), x, dot, PACK)
                    acc += dot * step.to(tl.float32)[None, :, None]
                    step = tl.load(steps + tl.minimum(g + 1, GROUPS - 1) * BS)  # the last round loads its own once more
            total = tl.sum(acc, 0) * (1 / Z_SCALE)
            direction = unit * BS + n
            t = t_ptr + token_pair[None, :].to(tl.int64) * R + direction[:, None]
            tl.store(t, total.to(t_ptr.dtype.element_ty), mask=here[None, :])
            if SUM:
                tokens = tl.where(here, token_pair // TOP_K, 0)
                before = arrive(arrivals_ptr + tokens * (R // BR) + unit * PER + share, here)
                last = here & (before + 1 == _present(ids_ptr, tokens, here, E, TOP_K))
                if tl.max(last.to(tl.int32), 0) > 0:
                    _finish_tokens(
                        tokens, direction, last, t_ptr, ids_ptr, p_ptr, bias_ptr, base_ptr, y_ptr, E,
                        TOP_K, R, HAS_BIAS, HAS_BASE,
                    )  # fmt: skip
    elif SUM:
        tokens = (program - TILES) * BM + tl.arange(0, BM)
        n = tl.program_id(1) * BR + tl.arange(0, BR)
        alone = (tokens < T) & (_present(ids_ptr, tokens, tokens < T, E, TOP_K) == 0)
        _finish_tokens(
            tokens, n, alone, t_ptr, ids_ptr, p_ptr, bias_ptr, base_ptr, y_ptr, E, TOP_K, R, HAS_BIAS, HAS_BASE
        )


def trellis_down_reference(z: torch.Tensor, ids: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Oracle: `down_reference` of a z that comes as a sixteenth; factor ``[E, R', I]`` decoded."""
    return down_reference(z, ids, factor) / Z_SCALE.value
