"""``t = F z`` for every pair: the output factor, decoded in registers.

A program owns a tile of pairs of one expert and BR directions of one unit, and walks the groups of I. Here the steps
belong to the rows of the product, so they scale the sum over a group once; they are loaded one round ahead. Units of
width 0 come last in the order and store zeros, so that the sum over the token's experts needs no metadata.

For few tokens the sum is part of the kernel: every pair's program of a token and BR directions counts itself, and the
last one adds the token's experts in their order. The programs of one more row of the grid see to tokens none of whose
experts is here.

Where such programs are few, several of them share a tile and a unit (SPLIT), EACH groups to one: a unit has one width,
so equal numbers of groups are equal work. Each stores a part of t in float32, and the last one of the token adds the
parts of all experts, in their order. A unit of width 0 has one program, which counts for all.
"""

import torch
import triton
import triton.language as tl

from .arrival import arrive
from .combine import token_sum
from .digits import digit_count, digit_size, digit_start, digit_values, plane_values, product, swapped
from .routing import pair_tile


@triton.jit
def _plane(part, plane, z, here, n, f: tl.constexpr, GS: tl.constexpr, PACK: tl.constexpr):
    """``part [BR, BM] += D[n, group] z[group]`` for the plane D of one digit of ``f`` bits, z in `swapped` order."""
    DT: tl.constexpr = z.dtype.scalar.element_ty
    KB: tl.constexpr = GS * f // 8  # bytes of a row, elements of a slice
    k = tl.arange(0, KB)
    w = tl.load(plane + n[:, None] * KB + k[None, :])
    if KB >= 16:
        for j in tl.static_range(8 // f):
            zj = tl.load(z + (j * KB + k)[:, None], mask=here[None, :], other=0.0)
            part = product(digit_values(w, f, j, DT, PACK), zj, part, PACK)
    else:
        za = tl.load(z + tl.arange(0, GS)[:, None], mask=here[None, :], other=0.0)
        part = product(plane_values(w, f, DT), swapped(za, 0, PACK), part, PACK)
    return part


@triton.jit
def _group(
    codes, z, here, n,
    b: tl.constexpr, BS: tl.constexpr, GS: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """``[BR, BM]`` in units of the step: one (unit, group) times its columns of z; z: ``[1, BM]`` pointers to them."""
    part = tl.zeros((BR, BM), tl.float32)
    for i in tl.static_range(digit_count(b)):
        if i > 0:  # the digits before this one are worth 2**f times as much
            part *= 1 << digit_size(b, i)
        plane = codes + digit_start(b, i) * (BS * GS // 8)
        part = _plane(part, plane, z, here, n, digit_size(b, i), GS, PACK)
    return part


@triton.jit
def _finish_tokens(
    tokens, n, t_ptr, ids_ptr, p_ptr, bias_ptr, base_ptr, y_ptr, T, E,
    TOP_K: tl.constexpr, R: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_BASE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Store y of the directions n ``[BR]`` of ``tokens`` ``[BM]``; -1: of none.

    One token after another, mostly there is one: ids and weights are scalars then, and all threads have a token's
    directions. Of all tokens at once, every expert's mask passed through shared memory.
    """
    token = tl.max(tokens, 0)
    while token >= 0:
        row = token.to(tl.int64)
        acc = token_sum(
            t_ptr, ids_ptr, p_ptr, bias_ptr, base_ptr, row, n, n >= 0, T, E,
            TOP_K, R, True, HAS_BIAS, HAS_BASE, SPLIT, ".cg",
        )  # fmt: skip
        tl.store(y_ptr + row * R + n, acc.to(y_ptr.dtype.element_ty))
        tokens = tl.where(tokens == token, -1, tokens)
        token = tl.max(tokens, 0)


@triton.jit
def _present(ids_ptr, tokens, here, E, TOP_K: tl.constexpr):
    """How many of the experts that the tokens chose are here."""
    count = tl.zeros(tokens.shape, tl.int32)
    for j in tl.static_range(TOP_K):
        e = tl.load(ids_ptr + tokens * TOP_K + j, mask=here, other=-1)
        count += ((e >= 0) & (e < E)).to(tl.int32)
    return count


@triton.jit
def finish_tile(
    total, pair, here, kept, direction, block, t_ptr, ids_ptr, p_ptr, bias_ptr, base_ptr, y_ptr, arrivals_ptr, T, E,
    TOP_K: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, SUM: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_BASE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Store a program's ``total [BR, BM]`` as (its part of) t of the pairs ``[BM]`` that are ``here``; SUM: the last
    program of a token stores y.

    kept: whether the unit has codes; direction: ``[BR]`` of R'; block: which BR of R' they are.
    """
    t = t_ptr + pair[None, :].to(tl.int64) * R + direction[:, None]
    splits = 1
    counts = 1
    if SPLIT:
        splits = tl.num_programs(2)
        counts = tl.where(kept, 1, splits)
        for s in tl.range(tl.program_id(2), tl.program_id(2) + counts):
            part = t + s * T.to(tl.int64) * (TOP_K * R)
            tl.store(part, total.to(t_ptr.dtype.element_ty), mask=here[None, :])
    else:
        tl.store(t, total.to(t_ptr.dtype.element_ty), mask=here[None, :])
    if SUM:
        tokens = tl.where(here, pair // TOP_K, 0)
        before = arrive(arrivals_ptr + tokens * (R // BR) + block, here, counts)
        last = here & (before + counts == splits * _present(ids_ptr, tokens, here, E, TOP_K))
        _finish_tokens(
            tl.where(last, tokens, -1), direction, t_ptr, ids_ptr, p_ptr, bias_ptr, base_ptr, y_ptr, T, E,
            TOP_K, R, HAS_BIAS, HAS_BASE, SPLIT,
        )  # fmt: skip


@triton.jit
def finish_without_experts(
    row, ids_ptr, base_ptr, y_ptr, T, E,
    TOP_K: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, HAS_BASE: tl.constexpr,
):  # fmt: skip
    """Store y, which is the base or 0, of those of the ``row``-th BM tokens none of whose experts is here."""
    end = tl.where(tl.program_id(2) == 0, T, 0)  # one program of those that share a tile
    tokens = row * BM + tl.arange(0, BM)
    alone = (tokens < end) & (_present(ids_ptr, tokens, tokens < end, E, TOP_K) == 0)
    n = tl.program_id(1) * BR + tl.arange(0, BR)
    place = tl.where(alone, tokens, 0).to(tl.int64)[None, :] * R + n[:, None]
    here = alone[None, :] & (n >= 0)[:, None]
    y = tl.zeros((BR, BM), tl.float32)
    if HAS_BASE:
        y += tl.load(base_ptr + place, mask=here, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=here)


@triton.jit
def _unit_sum(
    z, here, n, codes_ptr, steps, head, code, place, begin, end,
    BS: tl.constexpr, GS: tl.constexpr, GROUPS: tl.constexpr, WIDTHS: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
    STAGES: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """``[BR, BM]``: a unit, the ``place``-th of its matrix, times the groups from ``begin`` to ``end`` of z; steps: of
    the first of them."""
    QUANTUM: tl.constexpr = BS * GS // 8
    acc = tl.zeros((BR, BM), tl.float32)
    lo = 0
    for s in tl.static_range(len(WIDTHS)):
        hi = tl.load(head + 2 + s)
        if (place >= lo) & (place < hi):  # a loop of no rounds would begin all the same: copies to wait for, a barrier
            step = tl.load(steps)
            for g in tl.range(begin, end, num_stages=STAGES):
                codes = codes_ptr + (code + ((place - lo) * GROUPS + g) * WIDTHS[s]).to(tl.int64) * QUANTUM
                part = _group(codes, z + g * GS, here, n, WIDTHS[s], BS, GS, BM, BR, PACK)
                acc += part * step.to(tl.float32)[:, None]
                step = tl.load(steps + (tl.minimum(g + 1, end - 1) - begin) * BS)  # the last round loads its own again
        code += (hi - lo) * GROUPS * WIDTHS[s]
        lo = hi
    return acc


@triton.jit(do_not_specialize=["T", "TILES", "E", "EACH"])
def down_kernel(
    z_ptr, tiles_ptr, pairs_ptr, codes_ptr, steps_ptr, head_ptr, order_ptr, t_ptr,
    ids_ptr, p_ptr, bias_ptr, base_ptr, y_ptr, arrivals_ptr, T, TILES, E, EACH,
    TOP_K: tl.constexpr, R: tl.constexpr, I: tl.constexpr, BS: tl.constexpr, GS: tl.constexpr, WIDTHS: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, SUM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_BASE: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Program (tile of pairs, tile of BR directions in payload order, SPLIT: EACH groups): t [P, R'] from z [P, I].

    SUM: also y [T, R'] = base + sum_j p_j (t_j + bias), with arrivals int32 [T, R' / BR]; rows of programs from TILES
    on see to tokens without experts. SPLIT, with SUM only: t [programs of the third axis, P, R'].
    """
    UNITS: tl.constexpr = R // BS
    GROUPS: tl.constexpr = I // GS
    PER: tl.constexpr = BS // BR
    program = tl.program_id(0)
    if program < TILES:
        e, pair = pair_tile(tiles_ptr, pairs_ptr, program, BM)
        if e >= 0:
            place = tl.program_id(1) // PER
            n = (tl.program_id(1) % PER) * BR + tl.arange(0, BR)
            here = pair >= 0
            head = head_ptr + e * (2 + len(WIDTHS))
            code, row = tl.load(head), tl.load(head + 1)
            unit = tl.load(order_ptr + e * UNITS + place)
            begin = tl.program_id(2) * EACH if SPLIT else 0
            end = tl.minimum(begin + EACH, GROUPS) if SPLIT else GROUPS
            kept = place < tl.load(head + 1 + len(WIDTHS)) if SPLIT and len(WIDTHS) else len(WIDTHS) > 0
            if (not SPLIT) or (kept | (tl.program_id(2) == 0)):
                z = z_ptr + pair[None, :].to(tl.int64) * I
                steps = steps_ptr + (row + place * GROUPS + begin).to(tl.int64) * BS + n
                total = _unit_sum(
                    z, here, n, codes_ptr, steps, head, code, place, begin, end,
                    BS, GS, GROUPS, WIDTHS, BM, BR, STAGES, PACK,
                )  # fmt: skip
                finish_tile(
                    total, pair, here, kept, unit * BS + n, unit * PER + tl.program_id(1) % PER,
                    t_ptr, ids_ptr, p_ptr, bias_ptr, base_ptr, y_ptr, arrivals_ptr, T, E,
                    TOP_K, R, BR, SUM, HAS_BIAS, HAS_BASE, SPLIT,
                )  # fmt: skip
    elif SUM:
        finish_without_experts(program - TILES, ids_ptr, base_ptr, y_ptr, T, E, TOP_K, R, BM, BR, HAS_BASE)


def down_reference(z: torch.Tensor, ids: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Oracle: t float32 ``[T k, R']``; factor ``[E, R', I]`` decoded. Zero where an id is outside ``[0, E)``."""
    t = torch.zeros(len(z), factor.shape[1], device=z.device)
    for p, e in enumerate(ids.flatten().tolist()):
        if 0 <= e < len(factor):
            t[p] = factor[e].float() @ z[p].float()
    return t
