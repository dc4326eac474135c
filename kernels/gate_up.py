"""``z = gating(A_gate h, A_up h)`` for every pair: both input factors, decoded in registers, and the gate, in one
kernel.

A program owns a tile of pairs of one expert and BN columns of I, and walks the units of the factor widest first. The
steps belong to (direction, group of columns), so they scale the activations: one multiplication serves all BN columns.
With SPLIT = 1 the program sees all directions and stores z. With SPLIT > 1 the units are dealt out to SPLIT programs
per matrix, each stores a float32 partial sum, and a second small kernel adds them in a fixed order and applies the
gate: more programs where a small batch would leave most of the GPU idle.
"""

import torch
import triton
import triton.language as tl

from bitsmoe_modifier.method.gating import Gating

from .activation import gate_value
from .digits import digit_count, digit_size, digit_start, digit_values, digit_weight, plane_values, product
from .launch import capability, gate_up_tile, launch, on, power_of_two
from .routing import pair_tile


@triton.jit
def _plane(
    acc, plane, h, here, steps, scale, n, f: tl.constexpr, BS: tl.constexpr, PACK: tl.constexpr
):  # fmt: skip
    """``acc [BN, BM] += D[n, unit] (scale * step * h)[unit]`` for the plane D of one digit of ``f`` bits."""
    DT: tl.constexpr = h.dtype.scalar.element_ty
    KB: tl.constexpr = BS * f // 8  # bytes of a row, elements of a slice
    k = tl.arange(0, KB)
    w = tl.load(plane + n[:, None] * KB + k[None, :])
    if KB >= 16:
        for j in tl.static_range(8 // f):
            step = tl.load(steps + j * KB + k).to(tl.float32) * scale
            hs = tl.load(h + (j * KB + k)[:, None], mask=here[None, :], other=0.0).to(tl.float32) * step[:, None]
            acc = product(digit_values(w, f, j, DT, PACK), hs.to(DT), acc, PACK)
    else:
        r = tl.arange(0, BS)
        step = tl.load(steps + r).to(tl.float32) * scale
        hs = tl.load(h + r[:, None], mask=here[None, :], other=0.0).to(tl.float32) * step[:, None]
        acc = product(plane_values(w, f, DT), hs.to(DT), acc, PACK)
    return acc


@triton.jit
def _unit(
    acc, codes, h, here, steps, gain, n,
    b: tl.constexpr, BS: tl.constexpr, GS: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """``acc [BN, BM] += A[n, unit] (gain * h)[unit]`` for one unit of ``b`` bits.

    codes: the (unit, group)'s bytes, one plane after another, each ``[GS, BS * f / 8]``. h: ``[1, BM]`` pointers to the
    unit's first direction in the pairs' rows. steps: pointer to the unit's ``[BS]`` steps.
    """
    for i in tl.static_range(digit_count(b)):
        plane = codes + digit_start(b, i) * (BS * GS // 8)
        acc = _plane(acc, plane, h, here, steps, gain * digit_weight(b, i), n, digit_size(b, i), BS, PACK)
    return acc


@triton.jit
def _matrix(
    h, here, codes_ptr, steps_ptr, head, order, group, n, split, gain,
    BM: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, GS: tl.constexpr,
    WIDTHS: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """``A[n, :] h`` of one matrix, float32 ``[BN, BM]``, over the units that are ``split`` modulo SPLIT."""
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
    acc = tl.zeros((BN, BM), tl.float32)
    lo = 0
    for s in tl.static_range(len(WIDTHS)):
        hi = tl.load(head + 2 + s)
        first = lo + (split + SPLIT - lo % SPLIT) % SPLIT
        for place in tl.range(first, hi, SPLIT, num_stages=STAGES):
            unit = tl.load(order + place)
            # multiplied by a constant here, so that the compiler knows the alignment of the address
            unit_codes = codes_ptr + (code + (place - lo) * WIDTHS[s]).to(tl.int64) * QUANTUM
            unit_steps = steps_ptr + (row + place).to(tl.int64) * BS
            acc = _unit(acc, unit_codes, h + unit * BS, here, unit_steps, gain, n, WIDTHS[s], BS, GS, PACK)
        code += (hi - lo) * WIDTHS[s]
        lo = hi
    return acc


@triton.jit(do_not_specialize=["P", "E"])
def gate_up_kernel(
    h_ptr, ids_ptr, tiles_ptr, pairs_ptr, codes_ptr, steps_ptr, head_ptr, order_ptr, bias_ptr, out_ptr,
    P, E, gain, inverse_gain,
    TOP_K: tl.constexpr, R: tl.constexpr, I: tl.constexpr, BS: tl.constexpr, GS: tl.constexpr, WIDTHS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PP: tl.constexpr, SPLIT: tl.constexpr, SORTED: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, SHIFT: tl.constexpr,
    STAGES: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Program (tile of pairs, tile of BN columns, SPLIT > 1: matrix and share of its units).

    h [T, R]; head, order: `PreparedSide`; bias [E, 2 I]; out: z [P, I], or partial sums float32 [SPLIT, P, 2, I].
    """
    UNITS: tl.constexpr = R // BS
    HEAD: tl.constexpr = 2 + len(WIDTHS)
    e, pair = pair_tile(ids_ptr, tiles_ptr, pairs_ptr, tl.program_id(0), P, E, BM, PP, SORTED)
    if e >= 0:
        TILES: tl.constexpr = GS // BN
        group = tl.program_id(1) // TILES
        n = (tl.program_id(1) % TILES) * BN + tl.arange(0, BN)
        column = group * GS + n
        here = pair >= 0
        h = h_ptr + (pair // TOP_K)[None, :].to(tl.int64) * R
        row = pair.to(tl.int64)
        if SPLIT == 1:
            gate = tl.zeros((BN, BM), tl.float32)
            acc = tl.zeros((BN, BM), tl.float32)
            for m in tl.range(2, num_stages=1):  # a loop, not two copies: half the instructions to fetch
                gate = acc
                acc = _matrix(
                    h, here, codes_ptr, steps_ptr, head_ptr + (e * 2 + m) * HEAD, order_ptr + (e * 2 + m) * UNITS,
                    group, n, 0, gain, BM, BN, BS, GS, WIDTHS, 1, STAGES, PACK,
                )  # fmt: skip
            gate *= inverse_gain
            up = acc * inverse_gain
            if HAS_BIAS:
                bias = bias_ptr + e * (2 * I) + column
                gate += tl.load(bias).to(tl.float32)[:, None]
                up += tl.load(bias + I).to(tl.float32)[:, None]
            z = gate_value(gate, up, ACTIVATION, LIMIT, ALPHA, SHIFT)
            tl.store(out_ptr + row[None, :] * I + column[:, None], z.to(out_ptr.dtype.element_ty), mask=here[None, :])
        else:
            m = tl.program_id(2) // SPLIT
            split = tl.program_id(2) % SPLIT
            acc = _matrix(
                h, here, codes_ptr, steps_ptr, head_ptr + (e * 2 + m) * HEAD, order_ptr + (e * 2 + m) * UNITS,
                group, n, split, gain, BM, BN, BS, GS, WIDTHS, SPLIT, STAGES, PACK,
            )  # fmt: skip
            out = out_ptr + ((split * P + row[None, :]) * 2 + m) * I + column[:, None]
            tl.store(out, acc * inverse_gain, mask=here[None, :])


@triton.jit(do_not_specialize=["P", "E"])
def gate_kernel(
    part_ptr, ids_ptr, bias_ptr, z_ptr, P, E, I: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """z [P, I] from the partial sums float32 [SPLIT, P, 2, I], added in order; program (pair, BLOCK columns)."""
    p = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    e = tl.load(ids_ptr + p).to(tl.int32)
    here = column < tl.where((e >= 0) & (e < E), I, 0)
    gate = tl.zeros((BLOCK,), tl.float32)
    up = tl.zeros((BLOCK,), tl.float32)
    for s in tl.static_range(SPLIT):
        part = part_ptr + (s * P + p) * 2 * I + column
        gate += tl.load(part, mask=here, other=0.0)
        up += tl.load(part + I, mask=here, other=0.0)
    if HAS_BIAS:
        bias = bias_ptr + e * (2 * I) + column
        gate += tl.load(bias, mask=here, other=0.0).to(tl.float32)
        up += tl.load(bias + I, mask=here, other=0.0).to(tl.float32)
    z = gate_value(gate, up, ACTIVATION, LIMIT, ALPHA, SHIFT)
    tl.store(z_ptr + p * I + column, z.to(z_ptr.dtype.element_ty), mask=here)


@torch.library.custom_op("bitsmoe::gate_up", mutates_args=())
def gate_up(
    h: torch.Tensor,
    ids: torch.Tensor,
    tiles: torch.Tensor | None,
    pairs: torch.Tensor | None,
    codes: torch.Tensor,
    steps: torch.Tensor,
    head: torch.Tensor,
    order: torch.Tensor,
    bias: torch.Tensor | None,
    widths: list[int],
    gain: float,
    block_size: int,
    group_size: int,
    columns: int,
    pair_tile: int,
    activation: str,
    limit: float | None,
    alpha: float,
    up_shift: float,
    split: int = 0,
) -> torch.Tensor:
    """z ``[T k, I]`` of h's dtype; rows of pairs whose id is outside ``[0, E)`` are not written.

    Args:
        h: ``[T, R]`` contiguous.
        ids: ``[T, k]`` contiguous integers.
        tiles: with ``pairs``, from `routing.sort_pairs` (prefill); None for decode.
        pairs: see ``tiles``.
        codes: as in `PreparedSide`, likewise steps, head, order, widths and gain.
        bias: ``[E, 2 I]`` or None.
        block_size: directions of a unit.
        group_size: columns that share a step.
        columns: I.
        pair_tile: BM: the ``tile`` given to `sort_pairs`, or 8 or 16 for decode.
        activation: with limit, alpha and up_shift the fields of `Gating`.
        split: programs that share the units of a matrix (1, 2, 4, 8); 0 chooses by the grid.
    """
    count, experts = ids.numel(), head.shape[0] // 2
    z = torch.empty(count, columns, dtype=h.dtype, device=h.device)
    if not count:
        return z
    programs = count if tiles is None else tiles.shape[0]
    bn, chosen = gate_up_tile(programs, columns, group_size, order.shape[1])
    split = split or chosen
    how = launch(pair_tile, bn, capability(h.device))
    out = z if split == 1 else torch.empty(split, count, 2, columns, dtype=torch.float32, device=h.device)
    gate = {"HAS_BIAS": bias is not None, "ACTIVATION": activation, "LIMIT": limit, "ALPHA": alpha, "SHIFT": up_shift}
    with on(h.device):
        gate_up_kernel[(programs, columns // bn, 2 * split if split > 1 else 1)](
            h, ids, tiles, pairs, codes, steps, head, order, bias, out, count, experts, gain, 1 / gain,
            TOP_K=ids.shape[1], R=h.shape[1], I=columns, BS=block_size, GS=group_size, WIDTHS=tuple(widths),
            BM=pair_tile, BN=bn, PP=power_of_two(count) if tiles is None else 16,
            SPLIT=split, SORTED=tiles is not None, **gate, STAGES=how.stages, PACK=how.pack,
            num_warps=how.warps,
        )  # fmt: skip
        if split > 1:
            block = min(1024, triton.next_power_of_2(columns))
            gate_kernel[(count, triton.cdiv(columns, block))](
                out, ids, bias, z, count, experts, I=columns, SPLIT=split, BLOCK=block, **gate, num_warps=4
            )
    return z


@gate_up.register_fake
def _(h: torch.Tensor, ids: torch.Tensor, *rest: object, **named: object) -> torch.Tensor:
    columns = named["columns"] if "columns" in named else rest[11]
    return h.new_empty(ids.shape[0] * ids.shape[1], columns)


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
