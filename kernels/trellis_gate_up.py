"""`gate_up` for trellis codes: ``z = gating(A_gate h, A_up h) / 16`` for every pair, weights decoded in registers.

A program owns a tile of pairs of one expert and a group of I (for many tokens half of one, whose sums leave registers
free), and walks the units of the factor widest first, as `gate_up` does; a tile of codes is a (unit, group), whose
sequences run along the group. All warps hold all rows, for a
sequence of 128 weights is what a lane's registers hold of it; they share the directions, and their sums meet once.

The products are float16 whatever the activations are, since a weight's value is. Activations are multiplied by steps
and a power of two before they are rounded, which leaves them a factor of 16 below float16's range at the layer's
largest step; z is stored as a sixteenth, for the same room. What exceeds it (10⁶) becomes infinite, not wrong.
"""

import torch
import triton
import triton.language as tl

from bitsmoe_modifier.method.gating import Gating

from .activation import gate_value
from .arrival import arrive
from .digits import product
from .gate_up import gate_up_reference
from .routing import pair_tile
from .trellis_codes import tile_values

#: What z is multiplied by.
Z_SCALE = tl.constexpr(1 / 16)


@triton.jit
def _matrix(
    h, here, codes_ptr, steps_ptr, head, order, group, share, split, SPLIT, gain,
    BM: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, GS: tl.constexpr, WIDTHS: tl.constexpr, SPREAD: tl.constexpr,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr, PACK: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """``A[n, :] h`` of one matrix, float32 ``[BN, BM]``, over the ``split``-th of SPLIT parts of its units; n: of the
    group's columns the ``share``-th BN."""
    PER: tl.constexpr = GS // BN
    QUANTUM: tl.constexpr = BS * GS // 16  # of uint16
    K: tl.constexpr = COLUMNS if BS // SPREAD > COLUMNS else BS // SPREAD
    SLICES: tl.constexpr = BS // SPREAD // K
    part = tl.arange(0, SPREAD)[:, None]
    k = part * (K * SLICES) + tl.arange(0, K)[None, :]
    pair = part * (K * SLICES // 2) + tl.arange(0, K // 2)[None, :]
    code, row = tl.load(head), tl.load(head + 1)
    bits = 0  # of one group of this matrix
    lo = 0
    for s in tl.static_range(len(WIDTHS)):
        hi = tl.load(head + 2 + s)
        bits += (hi - lo) * WIDTHS[s]
        lo = hi
    code += group * bits  # where this group's units begin, in quanta
    row += group * lo  # lo: all units that are there
    begin, end = split * lo // SPLIT, (split + 1) * lo // SPLIT
    acc = tl.zeros((SPREAD, BN, BM), tl.float32)
    lo = 0
    for s in tl.static_range(len(WIDTHS)):
        hi = tl.load(head + 2 + s)
        first, last = tl.maximum(lo, begin), tl.minimum(hi, end)
        if first < last:  # most programs have units of one width, and each costs two loads that wait for each other
            unit = tl.load(order + first)
            step = tl.load(steps_ptr + (row + first).to(tl.int64) * BS + k)
            for at in tl.range(first * SLICES, last * SLICES, num_stages=STAGES):
                place, j = at // SLICES, at % SLICES
                tile = codes_ptr + (code + (place - lo) * WIDTHS[s]).to(tl.int64) * QUANTUM
                values = tile_values(tile, pair + j * (K // 2), PER, share, WIDTHS[s], BN, PER > 1, PACK)
                x = tl.load(h + unit * BS + j * K + k[:, :, None], mask=here[None, None, :], other=0.0)
                x = (x.to(tl.float32) * (step.to(tl.float32) * gain)[:, :, None]).to(DT)
                acc = product(values.to(DT), x, acc, PACK)
                then = tl.minimum(at + 1, last * SLICES - 1)  # the last round loads its own once more
                unit = tl.load(order + then // SLICES)
                step = tl.load(steps_ptr + (row + then // SLICES).to(tl.int64) * BS + then % SLICES * K + k)
        code += (hi - lo) * WIDTHS[s]
        lo = hi
    return tl.sum(acc, 0)


@triton.jit
def _finish(
    gate, up, bias_ptr, e, column, z, here,
    I: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """Store the gate's result of ``[BN, BM]`` sums at the pointers z."""
    if HAS_BIAS:
        bias = bias_ptr + e * (2 * I) + column
        gate += tl.load(bias).to(tl.float32)[:, None]
        up += tl.load(bias + I).to(tl.float32)[:, None]
    value = gate_value(gate, up, ACTIVATION, LIMIT, ALPHA, SHIFT) * Z_SCALE
    tl.store(z, value.to(z.dtype.scalar.element_ty), mask=here[None, :])


@triton.jit(do_not_specialize=["P", "PARTS"])
def trellis_gate_up_kernel(
    h_ptr, tiles_ptr, pairs_ptr, codes_ptr, steps_ptr, head_ptr, order_ptr, bias_ptr, z_ptr, part_ptr, arrivals_ptr,
    P, PARTS, gain, inverse_gain,
    TOP_K: tl.constexpr, R: tl.constexpr, I: tl.constexpr, BS: tl.constexpr, GS: tl.constexpr, WIDTHS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SHARED: tl.constexpr, SPREAD: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, SHIFT: tl.constexpr,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Program (tile of pairs, BN columns of I, SHARED: matrix and share of its units); as `gate_up.gate_up_kernel`.

    codes: uint16. z: [P, I] of float16 (or float32). SPREAD: warps, among which a unit's directions are shared.
    COLUMNS: of them that a warp takes in a round.
    """
    UNITS: tl.constexpr = R // BS
    HEAD: tl.constexpr = 2 + len(WIDTHS)
    TILES: tl.constexpr = GS // BN
    DT: tl.constexpr = z_ptr.dtype.element_ty
    e, pair = pair_tile(tiles_ptr, pairs_ptr, tl.program_id(0), BM)
    if e >= 0:
        group = tl.program_id(1) // TILES
        share = tl.program_id(1) % TILES if TILES > 1 else 0
        column = tl.program_id(1) * BN + tl.arange(0, BN)
        here = pair >= 0
        h = h_ptr + (pair // TOP_K)[None, None, :].to(tl.int64) * R
        row = pair[None, :].to(tl.int64)
        z = z_ptr + row * I + column[:, None]
        if SHARED:
            m = tl.program_id(2) % 2
            acc = _matrix(
                h, here, codes_ptr, steps_ptr, head_ptr + (e * 2 + m) * HEAD, order_ptr + (e * 2 + m) * UNITS,
                group, share, tl.program_id(2) // 2, PARTS // 2, gain, BM, BN, BS, GS, WIDTHS, SPREAD, COLUMNS,
                STAGES, PACK, DT,
            )  # fmt: skip
            part = part_ptr + row * (2 * I) + column[:, None]
            tl.store(
                part + (tl.program_id(2) // 2 * P.to(tl.int64) * 2 + m) * I, acc * inverse_gain, mask=here[None, :]
            )
            before = arrive(arrivals_ptr + tl.program_id(0) * (I // BN) + tl.program_id(1), e >= 0)
            if before == PARTS - 1:
                gate = tl.zeros((BN, BM), tl.float32)
                up = tl.zeros((BN, BM), tl.float32)
                for _ in tl.range(PARTS // 2):
                    gate += tl.load(part, mask=here[None, :], other=0.0, cache_modifier=".cg")
                    up += tl.load(part + I, mask=here[None, :], other=0.0, cache_modifier=".cg")
                    part += P.to(tl.int64) * (2 * I)
                _finish(gate, up, bias_ptr, e, column, z, here, I, HAS_BIAS, ACTIVATION, LIMIT, ALPHA, SHIFT)
        else:
            gate = tl.zeros((BN, BM), tl.float32)
            acc = tl.zeros((BN, BM), tl.float32)
            for m in tl.range(2, num_stages=1):  # a loop, not two copies: half the instructions to fetch
                gate = acc
                acc = _matrix(
                    h, here, codes_ptr, steps_ptr, head_ptr + (e * 2 + m) * HEAD, order_ptr + (e * 2 + m) * UNITS,
                    group, share, 0, 1, gain, BM, BN, BS, GS, WIDTHS, SPREAD, COLUMNS, STAGES, PACK, DT,
                )  # fmt: skip
            _finish(
                gate * inverse_gain, acc * inverse_gain, bias_ptr, e, column, z, here,
                I, HAS_BIAS, ACTIVATION, LIMIT, ALPHA, SHIFT,
            )  # fmt: skip


def trellis_gate_up_reference(
    h: torch.Tensor, ids: torch.Tensor, factor: torch.Tensor, bias: torch.Tensor | None, gating: Gating
) -> torch.Tensor:
    """Oracle: `gate_up_reference` times `Z_SCALE`; factor ``[E, 2, I, R]`` decoded."""
    return gate_up_reference(h, ids, factor, bias, gating) * Z_SCALE.value
