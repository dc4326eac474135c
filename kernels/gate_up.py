"""``z = gating(A_gate h, A_up h)`` for every pair: both input factors, decoded in registers, and the gate, in one
kernel.

A program owns a tile of pairs of one expert and BN columns of I, and walks the units of the factor widest first. The
steps belong to (direction, group of columns), so they scale the activations: one multiplication serves all BN columns.
Where one program per tile would leave most of the GPU idle, PARTS of them share it: gate or up, and of these an equal
number of neighbouring units, so that most programs have units of one width, and one loop to fetch. Each stores a
float32 partial sum, and the last to arrive adds them in a fixed order and applies the gate.

Which unit comes next, and its steps, are loaded one round ahead: they are needed at once when the round begins, the
first for the address of its activations.
"""

import torch
import triton
import triton.language as tl

from bitsmoe_modifier.method.gating import Gating

from .activation import gate_value
from .arrival import arrive
from .digits import (
    digit_count,
    digit_size,
    digit_start,
    digit_values,
    digit_weight,
    plane_values,
    product,
    slices_before,
    swapped,
)
from .routing import pair_tile


@triton.jit
def _along(KB: tl.constexpr, SPREAD: tl.constexpr):
    """Numbers of the elements of a slice, as the warps share them: ``[KB]`` or ``[SPREAD, KB / SPREAD]``."""
    if SPREAD == 1:
        return tl.arange(0, KB)
    else:  # noqa: RET505
        return tl.arange(0, SPREAD)[:, None] * (KB // SPREAD) + tl.arange(0, KB // SPREAD)[None, :]


@triton.jit
def _plane_steps(steps, place, end, f: tl.constexpr, BS: tl.constexpr, SPREAD: tl.constexpr):
    """The ``[BS]`` steps of a unit, cut as a plane's slices need them: a tuple of tensors."""
    KB: tl.constexpr = BS * f // 8
    there = tl.where(place < end, 1, 0)  # one predicate for all elements; a bare condition fails in the interpreter
    found = ()
    if KB // SPREAD >= 16:
        for j in tl.static_range(8 // f):
            k = j * KB + _along(KB, SPREAD)
            found = found + (tl.load(steps + k, mask=k * 0 + there > 0, other=0.0),)  # noqa: RUF005 - not in a kernel
    else:
        k = _along(BS, SPREAD)
        found = found + (tl.load(steps + k, mask=k * 0 + there > 0, other=0.0),)  # noqa: RUF005
    return found


@triton.jit
def _steps(steps, place, end, b: tl.constexpr, BS: tl.constexpr, SPREAD: tl.constexpr):
    """`_plane_steps` of all planes of a unit of ``b`` bits, one after another; zeros unless ``place < end``."""
    found = ()
    for i in tl.static_range(digit_count(b)):
        found = found + _plane_steps(steps, place, end, digit_size(b, i), BS, SPREAD)
    return found


@triton.jit
def _scaled(h, here, k, step, gain, WEIGHT: tl.constexpr):
    """``[K, BM]`` or ``[SPREAD, K, BM]``: the directions k of the pairs' rows times ``gain * WEIGHT * step``, in h's
    type; bf16 needs no gain."""
    factor = step.to(tl.float32)
    if h.dtype.scalar.element_ty != tl.bfloat16:
        factor *= gain * WEIGHT
    elif WEIGHT != 1:
        factor *= WEIGHT
    if len(k.shape) == 1:
        values = tl.load(h + k[:, None], mask=here[None, :], other=0.0).to(tl.float32) * factor[:, None]
    else:
        h3 = h[None, :, :] + k[:, :, None]
        values = tl.load(h3, mask=here[None, None, :], other=0.0).to(tl.float32) * factor[:, :, None]
    return values.to(h.dtype.scalar.element_ty)


@triton.jit
def _plane(
    acc, plane, h, here, steps, gain, n,
    f: tl.constexpr, WEIGHT: tl.constexpr, AT: tl.constexpr, BS: tl.constexpr, SPREAD: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """``acc += D[n, unit] (gain * WEIGHT * step * h)[unit]`` for the plane D of one digit of ``f`` bits.

    AT: where the plane's tensors of steps begin among those of `_steps`.
    """
    DT: tl.constexpr = h.dtype.scalar.element_ty
    KB: tl.constexpr = BS * f // 8  # bytes of a row, elements of a slice
    if KB // SPREAD >= 16:
        k = _along(KB, SPREAD)
        if SPREAD == 1:
            w = tl.load(plane + n[:, None] * KB + k[None, :])
        else:
            w = tl.load(plane + n[None, :, None] * KB + k[:, None, :])
        for j in tl.static_range(8 // f):
            hs = _scaled(h, here, j * KB + k, steps[AT + j], gain, WEIGHT)
            acc = product(digit_values(w, f, j, DT, PACK), swapped(hs, len(hs.shape) - 2, PACK), acc, PACK)
    else:
        w = plane_values(tl.load(plane + n[:, None] * KB + tl.arange(0, KB)[None, :]), f, DT)
        if SPREAD > 1:
            w = tl.permute(tl.reshape(w, [w.shape[0], SPREAD, BS // SPREAD]), (1, 0, 2))
        acc = product(w, _scaled(h, here, _along(BS, SPREAD), steps[AT], gain, WEIGHT), acc, PACK)
    return acc


@triton.jit
def _unit(
    acc, codes, h, here, steps, gain, n,
    b: tl.constexpr, BS: tl.constexpr, GS: tl.constexpr, SPREAD: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """``acc += A[n, unit] (gain * h)[unit]`` for one unit of ``b`` bits.

    acc: ``[BN, BM]``, or ``[SPREAD, BN, BM]`` where the warps share the directions. codes: the (unit, group)'s bytes,
    one plane after another, each ``[GS, BS * f / 8]``. h: ``[1, BM]`` pointers to the unit's first direction in the
    pairs' rows. steps: from `_steps`.
    """
    for i in tl.static_range(digit_count(b)):
        plane = codes + digit_start(b, i) * (BS * GS // 8)
        acc = _plane(
            acc, plane, h, here, steps, gain, n,
            digit_size(b, i), digit_weight(b, i), slices_before(b, i, BS // SPREAD), BS, SPREAD, PACK,
        )  # fmt: skip
    return acc


@triton.jit
def _matrix(
    h, here, codes_ptr, steps_ptr, head, order, group, n, split, SPLIT, gain,
    BM: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, GS: tl.constexpr,
    WIDTHS: tl.constexpr, SPREAD: tl.constexpr, STAGES: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """``A[n, :] h`` of one matrix, float32 ``[BN, BM]``, over the ``split``-th of SPLIT parts of its units."""
    QUANTUM: tl.constexpr = BS * GS // 8
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
    acc = tl.zeros((BN, BM) if SPREAD == 1 else (SPREAD, BN, BM), tl.float32)
    lo = 0
    for s in tl.static_range(len(WIDTHS)):
        hi = tl.load(head + 2 + s)
        first, last = tl.maximum(lo, begin), tl.minimum(hi, end)
        if first < last:  # most programs have units of one width, and each costs two loads that wait for each other
            unit = tl.load(order + first)
            steps = _steps(steps_ptr + (row + first).to(tl.int64) * BS, first, last, WIDTHS[s], BS, SPREAD)
            for place in tl.range(first, last, num_stages=STAGES):
                # multiplied by a constant here, so that the compiler knows the alignment of the address
                unit_codes = codes_ptr + (code + (place - lo) * WIDTHS[s]).to(tl.int64) * QUANTUM
                acc = _unit(acc, unit_codes, h + unit * BS, here, steps, gain, n, WIDTHS[s], BS, GS, SPREAD, PACK)
                then = place + 1
                unit = tl.load(order + then, mask=then < last, other=0)
                steps = _steps(steps_ptr + (row + then).to(tl.int64) * BS, then, last, WIDTHS[s], BS, SPREAD)
        code += (hi - lo) * WIDTHS[s]
        lo = hi
    return acc if SPREAD == 1 else tl.sum(acc, 0)


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
    value = gate_value(gate, up, ACTIVATION, LIMIT, ALPHA, SHIFT)
    tl.store(z, value.to(z.dtype.scalar.element_ty), mask=here[None, :])


@triton.jit(do_not_specialize=["P", "PARTS"])
def gate_up_kernel(
    h_ptr, tiles_ptr, pairs_ptr, codes_ptr, steps_ptr, head_ptr, order_ptr, bias_ptr, z_ptr, part_ptr, arrivals_ptr,
    P, PARTS, gain, inverse_gain,
    TOP_K: tl.constexpr, R: tl.constexpr, I: tl.constexpr, BS: tl.constexpr, GS: tl.constexpr, WIDTHS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SHARED: tl.constexpr, SWAP: tl.constexpr, SPREAD: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, SHIFT: tl.constexpr,
    STAGES: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Program (tile of pairs, tile of BN columns, SHARED: matrix and share of its units).

    h [T, R]; head, order: `PreparedSide`; bias [E, 2 I]; z [P, I]. SHARED: PARTS programs, an even number, share a tile
    through part float32 [PARTS / 2, P, 2, I] and arrivals int32 [tiles, I / BN]. SWAP: z in `swapped` order.
    """
    UNITS: tl.constexpr = R // BS
    HEAD: tl.constexpr = 2 + len(WIDTHS)
    TILES: tl.constexpr = GS // BN
    e, pair = pair_tile(tiles_ptr, pairs_ptr, tl.program_id(0), BM)
    if e >= 0:
        group = tl.program_id(1) // TILES
        n = (tl.program_id(1) % TILES) * BN + tl.arange(0, BN)
        column = group * GS + n
        here = pair >= 0
        h = h_ptr + (pair // TOP_K)[None, :].to(tl.int64) * R
        row = pair[None, :].to(tl.int64)
        place = column ^ tl.where(((column ^ column >> 1) & 1) != 0, 3, 0) if SWAP else column
        z = z_ptr + row * I + place[:, None]
        if SHARED:
            m = tl.program_id(2) % 2
            acc = _matrix(
                h, here, codes_ptr, steps_ptr, head_ptr + (e * 2 + m) * HEAD, order_ptr + (e * 2 + m) * UNITS,
                group, n, tl.program_id(2) // 2, PARTS // 2, gain, BM, BN, BS, GS, WIDTHS, SPREAD, STAGES, PACK,
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
                    group, n, 0, 1, gain, BM, BN, BS, GS, WIDTHS, SPREAD, STAGES, PACK,
                )  # fmt: skip
            _finish(
                gate * inverse_gain, acc * inverse_gain, bias_ptr, e, column, z, here,
                I, HAS_BIAS, ACTIVATION, LIMIT, ALPHA, SHIFT,
            )  # fmt: skip


def gate_up_reference(
    h: torch.Tensor, ids: torch.Tensor, factor: torch.Tensor, bias: torch.Tensor | None, gating: Gating
) -> torch.Tensor:
    """Oracle: z float32 ``[T k, I]``; factor ``[E, 2, I, R]`` decoded. Zero where an id is outside ``[0, E)``."""
    experts, k = len(factor), ids.shape[1]
    z = torch.zeros(ids.numel(), factor.shape[2], device=h.device)
    for p, e in enumerate(ids.flatten().tolist()):
        if 0 <= e < experts:
            gate, up = factor[e].float() @ h[p // k].float()
            if bias is not None:
                b_gate, b_up = bias[e].float().chunk(2)
                gate, up = gate + b_gate, up + b_up
            z[p] = gating(gate, up)
    return z
