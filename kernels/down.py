"""``t = F z`` for every pair: the output factor, decoded in registers.

A program owns a tile of pairs of one expert and BR directions of one unit, and walks the groups of I. Here the steps
belong to the rows of the product, so they scale the sum over a group once. Units of width 0 come last in the order and
store zeros, so that the sum over the token's experts needs no metadata.
"""

import torch
import triton
import triton.language as tl

from .digits import digit_count, digit_size, digit_start, digit_values, plane_values, product
from .launch import capability, down_tile, launch_down, on, power_of_two
from .routing import pair_tile


@triton.jit
def _plane(part, plane, z, here, n, f: tl.constexpr, GS: tl.constexpr, PACK: tl.constexpr):
    """``part [BR, BM] += D[n, group] z[group]`` for the plane D of one digit of ``f`` bits."""
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
        part = product(plane_values(w, f, DT), za, part, PACK)
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


@triton.jit(do_not_specialize=["P", "E"])
def down_kernel(
    z_ptr, ids_ptr, tiles_ptr, pairs_ptr, codes_ptr, steps_ptr, head_ptr, order_ptr, t_ptr, P, E,
    R: tl.constexpr, I: tl.constexpr, BS: tl.constexpr, GS: tl.constexpr, WIDTHS: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, PP: tl.constexpr, SORTED: tl.constexpr,
    STAGES: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Program (tile of pairs, tile of BR directions in payload order): t [P, R'] from z [P, I]."""
    UNITS: tl.constexpr = R // BS
    GROUPS: tl.constexpr = I // GS
    QUANTUM: tl.constexpr = BS * GS // 8
    TILES: tl.constexpr = BS // BR
    e, pair = pair_tile(ids_ptr, tiles_ptr, pairs_ptr, tl.program_id(0), P, E, BM, PP, SORTED)
    if e >= 0:
        place = tl.program_id(1) // TILES
        n = (tl.program_id(1) % TILES) * BR + tl.arange(0, BR)
        here = pair >= 0
        head = head_ptr + e * (2 + len(WIDTHS))
        code, row = tl.load(head), tl.load(head + 1)
        z = z_ptr + pair[None, :].to(tl.int64) * I
        acc = tl.zeros((BR, BM), tl.float32)
        lo = 0
        for s in tl.static_range(len(WIDTHS)):
            hi = tl.load(head + 2 + s)
            rounds = tl.where((place >= lo) & (place < hi), GROUPS, 0)  # a loop of no rounds instead of a branch
            for g in tl.range(0, rounds, num_stages=STAGES):
                codes = codes_ptr + (code + ((place - lo) * GROUPS + g) * WIDTHS[s]).to(tl.int64) * QUANTUM
                part = _group(codes, z + g * GS, here, n, WIDTHS[s], BS, GS, BM, BR, PACK)
                step = tl.load(steps_ptr + (row + place * GROUPS + g).to(tl.int64) * BS + n).to(tl.float32)
                acc += part * step[:, None]
            code += (hi - lo) * GROUPS * WIDTHS[s]
            lo = hi
        direction = tl.load(order_ptr + e * UNITS + place) * BS + n
        t = t_ptr + pair[None, :].to(tl.int64) * R + direction[:, None]
        tl.store(t, acc.to(t_ptr.dtype.element_ty), mask=here[None, :])


@torch.library.custom_op("bitsmoe::down", mutates_args=())
def down(
    z: torch.Tensor,
    ids: torch.Tensor,
    tiles: torch.Tensor | None,
    pairs: torch.Tensor | None,
    codes: torch.Tensor,
    steps: torch.Tensor,
    head: torch.Tensor,
    order: torch.Tensor,
    widths: list[int],
    block_size: int,
    group_size: int,
    pair_tile: int,
) -> torch.Tensor:
    """t ``[T k, R']``, float32 for decode and of z's dtype for prefill, where t is large; rows of pairs whose id is
    outside ``[0, E)`` are not written.

    Args:
        z: ``[T k, I]`` contiguous; the others as in `gate_up.gate_up`.
    """
    count, columns = z.shape
    directions = order.shape[1] * block_size
    t = torch.empty(count, directions, dtype=torch.float32 if tiles is None else z.dtype, device=z.device)
    if not count:
        return t
    programs = count if tiles is None else tiles.shape[0]
    br = down_tile(programs, directions, block_size, pair_tile)
    how = launch_down(pair_tile, br, capability(z.device))
    with on(z.device):
        down_kernel[(programs, directions // br)](
            z, ids, tiles, pairs, codes, steps, head, order, t, count, head.shape[0],
            R=directions, I=columns, BS=block_size, GS=group_size, WIDTHS=tuple(widths), BM=pair_tile, BR=br,
            PP=power_of_two(count) if tiles is None else 16, SORTED=tiles is not None,
            STAGES=how.stages, PACK=how.pack, num_warps=how.warps,
            maxnreg=how.registers,
        )  # fmt: skip
    return t


@down.register_fake
def _(
    z: torch.Tensor,
    ids: torch.Tensor,
    tiles: torch.Tensor | None,
    pairs: torch.Tensor | None,
    codes: torch.Tensor,
    steps: torch.Tensor,
    head: torch.Tensor,
    order: torch.Tensor,
    widths: list[int],
    block_size: int,
    group_size: int,
    pair_tile: int,
) -> torch.Tensor:
    dtype = torch.float32 if tiles is None else z.dtype
    return z.new_empty(z.shape[0], order.shape[1] * block_size, dtype=dtype)


def down_reference(z: torch.Tensor, ids: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Oracle: t float32 ``[T k, R']``; factor ``[E, R', I]`` decoded. Zero where an id is outside ``[0, E)``."""
    t = torch.zeros(len(z), factor.shape[1], device=z.device)
    for p, e in enumerate(ids.flatten().tolist()):
        if 0 <= e < len(factor):
            t[p] = factor[e].float() @ z[p].float()
    return t
