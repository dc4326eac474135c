"""``y = x @ W.T`` with a stored basis W ``[N, K]``: 16 bits, or 8 / 4 bits with a step per (row, group), decoded in
the kernel.

Used for h = B x and y = U t. Bases are read once per layer whatever the number of experts; at one token their bytes
decide. Few tokens: a program owns 16 rows and deals the reduction axis out to its four warps (a batched product, one
slice per warp, added at the end), so that 128 programs keep a whole basis of 2,048 rows in flight. Many tokens: decode
once, then an ordinary matrix product.

In a decoding step further programs of the same launch write the tiles of pairs (`routing.py`): nothing depends on both.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from bitsmoe_modifier.storage.factors import decode_basis

from .ahead import arguments, constants, fetch
from .digits import digit_values, product, swapped
from .launch import BASIS_TOKENS, Launch, basis_stages, capability
from .launcher import run
from .routing import route, route_arguments, route_expert, routed_tensors


@triton.jit
def _multiply(
    x_ptr, w_ptr, step_ptr, y_ptr, T,
    N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SLICES: tl.constexpr, STAGES: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Program (BN rows, BM tokens); the groups of BK elements are dealt out to SLICES. BK: the basis group (8, 4
    bits)."""
    DT: tl.constexpr = x_ptr.dtype.element_ty
    n = (tl.program_id(0) * BN + tl.arange(0, BN))[None, :, None]
    token = (tl.program_id(1) * BM + tl.arange(0, BM))[None, None, :]
    slice_ = tl.arange(0, SLICES)[:, None, None]
    x_row = x_ptr + token.to(tl.int64) * K
    acc = tl.zeros((SLICES, BN, BM), tl.float32)
    for turn in tl.range(0, tl.cdiv(K, BK * SLICES), num_stages=STAGES):
        g = turn * SLICES + slice_
        k = tl.arange(0, BK)
        if BITS == 16:
            row_k = g * BK + k[None, None, :]
            col_k = g * BK + k[None, :, None]
            w = tl.load(w_ptr + n * K + row_k, mask=(n < N) & (row_k < K), other=0.0)
            x = tl.load(x_row + col_k, mask=(token < T) & (col_k < K), other=0.0)
            acc = product(w.to(DT), x, acc, PACK)
        else:
            there = g < K // BK
            step = tl.load(step_ptr + n * (K // BK) + g, mask=(n < N) & there, other=0.0).to(tl.float32)
            part = tl.zeros((SLICES, BN, BM), tl.float32)
            if BITS == 8:  # a byte is a code: both of its digits meet the same elements
                w = tl.load(w_ptr + n * K + g * BK + k[None, None, :], mask=(n < N) & there, other=0)
                x = tl.load(x_row + g * BK + k[None, :, None], mask=(token < T) & there, other=0.0)
                x = swapped(x, 1, PACK)
                part = product(digit_values(w, 4, 1, DT, PACK), x, part, PACK) * 16
                part = product(digit_values(w, 4, 0, DT, PACK), x, part, PACK)
            else:
                HALF: tl.constexpr = BK // 2
                i = tl.arange(0, HALF)
                w = tl.load(w_ptr + n * (K // 2) + g * HALF + i[None, None, :], mask=(n < N) & there, other=0)
                for j in tl.static_range(2):
                    x = tl.load(x_row + g * BK + (j * HALF + i)[None, :, None], mask=(token < T) & there, other=0.0)
                    part = product(digit_values(w, 4, j, DT, PACK), swapped(x, 1, PACK), part, PACK)
            acc += part * step
    y = y_ptr + (tl.program_id(1) * BM + tl.arange(0, BM))[None, :].to(tl.int64) * N
    n2 = (tl.program_id(0) * BN + tl.arange(0, BN))[:, None]
    token2 = (tl.program_id(1) * BM + tl.arange(0, BM))[None, :]
    tl.store(y + n2, tl.sum(acc, 0).to(y_ptr.dtype.element_ty), mask=(n2 < N) & (token2 < T))


@triton.jit(do_not_specialize=["T", "P", "E", "TILES", "ARRIVALS"])
def basis_kernel(
    x_ptr, w_ptr, step_ptr, y_ptr, T, ids_ptr, tiles_ptr, pairs_ptr, arrivals_ptr, P, E, TILES, ARRIVALS,
    spans_ptr, codes_in_ptr, steps_in_ptr, head_in_ptr, order_in_ptr,
    codes_out_ptr, steps_out_ptr, head_out_ptr, order_out_ptr,
    N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SLICES: tl.constexpr, STAGES: tl.constexpr, PACK: tl.constexpr,
    ROUTE: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr,
    AHEAD: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Program (BN rows, BM tokens): y [T, N]; ROUTE: and (cdiv(N, BN) + expert, 0): its tiles of TILE pairs, and with
    AHEAD its share of the weights that are fetched."""
    ROWS: tl.constexpr = (N + BN - 1) // BN
    if tl.program_id(0) < ROWS:
        _multiply(x_ptr, w_ptr, step_ptr, y_ptr, T, N, K, BITS, BM, BN, BK, SLICES, STAGES, PACK)
    elif ROUTE and tl.program_id(1) == 0:
        e = tl.program_id(0) - ROWS
        if AHEAD:
            fetch(
                ids_ptr, spans_ptr, codes_in_ptr, steps_in_ptr, head_in_ptr, order_in_ptr,
                codes_out_ptr, steps_out_ptr, head_out_ptr, order_out_ptr, e, E, P, E, PAIRS,
            )  # fmt: skip
        route_expert(e, ids_ptr, tiles_ptr, pairs_ptr, arrivals_ptr, P, E, TILES, ARRIVALS, TILE, CHUNK, BINS)


@triton.jit
def decode_kernel(
    w_ptr, step_ptr, out_ptr, N, K: tl.constexpr, BITS: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """W [N, K] in out's dtype from its codes and steps; program (BN rows, group of BK)."""
    n = (tl.program_id(0) * BN + tl.arange(0, BN))[:, None]
    g = tl.program_id(1)
    step = tl.load(step_ptr + n * (K // BK) + g, mask=n < N, other=0.0).to(tl.float32)
    BYTES: tl.constexpr = BK * BITS // 8
    w = tl.load(w_ptr + n * (K // BK * BYTES) + g * BYTES + tl.arange(0, BYTES)[None, :], mask=n < N, other=0)
    out = out_ptr + n.to(tl.int64) * K + g * BK + tl.arange(0, BYTES)[None, :]
    if BITS == 8:
        tl.store(out, ((w.to(tl.float32) * 2 - 255) * step).to(out_ptr.dtype.element_ty), mask=n < N)
    else:
        low, high = w & 15, w >> 4
        tl.store(out, ((low.to(tl.float32) * 2 - 15) * step).to(out_ptr.dtype.element_ty), mask=n < N)
        tl.store(out + BYTES, ((high.to(tl.float32) * 2 - 15) * step).to(out_ptr.dtype.element_ty), mask=n < N)


def _launch(
    x: torch.Tensor, weight: torch.Tensor, step: torch.Tensor | None, bits: int, group: int, y: torch.Tensor,
    ids: torch.Tensor | None = None, routed: list[torch.Tensor] | None = None, experts: int = 0, tile: int = 16,
    ahead: Sequence[torch.Tensor] = (),
) -> None:  # fmt: skip
    """Multiply few tokens, and write ``routed`` where ids are given."""
    (tokens, k), n = x.shape, weight.shape[0]
    tiles, pairs, arrivals = routed or (None, None, None)
    counts = (0, 0, 0, 0) if routed is None else (len(routed[1]), experts, len(routed[0]), len(routed[2]))
    bm = 8 if tokens <= 8 else 16
    chunk = 64 if bits == 16 else group
    how = Launch(warps=4, stages=basis_stages(bits, chunk, bm), pack=4 if capability(x.device) else 0)
    run(
        basis_kernel,
        (triton.cdiv(n, 16) + experts, triton.cdiv(tokens, bm)),
        (x, weight, step, y, tokens, ids, tiles, pairs, arrivals, *counts, *arguments(ahead)),
        how,
        x.device,
        {
            "N": n, "K": k, "BITS": bits, "BM": bm, "BN": 16, "BK": chunk, "SLICES": 4, "ROUTE": routed is not None,
            "TILE": tile, **route_arguments(counts[0], counts[1]), **constants(ahead),
        },
    )  # fmt: skip


@torch.library.custom_op("bitsmoe::basis", mutates_args=())
def basis(x: torch.Tensor, weight: torch.Tensor, step: torch.Tensor | None, bits: int, group: int) -> torch.Tensor:
    """``x @ W.T`` for x ``[T, K]``, contiguous; W bf16 ``[N, K]``, or uint8 rows with ``step`` fp16 ``[N, K / group]``.

    Returns ``[T, N]`` of x's dtype; products accumulate in float32.
    """
    (tokens, k), n = x.shape, weight.shape[0]
    if tokens > BASIS_TOKENS:
        if step is None:
            return x @ weight.to(x.dtype).T
        decoded = torch.empty(n, k, dtype=x.dtype, device=x.device)
        run(
            decode_kernel,
            (triton.cdiv(n, 16), k // group),
            (weight, step, decoded, n),
            Launch(warps=2, stages=1, pack=0),
            x.device,
            {"K": k, "BITS": bits, "BK": group, "BN": 16},
        )
        return x @ decoded.T
    y = torch.empty(tokens, n, dtype=x.dtype, device=x.device)
    if tokens:
        _launch(x, weight, step, bits, group, y)
    return y


@basis.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, step: torch.Tensor | None, bits: int, group: int) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("bitsmoe::basis_and_route", mutates_args=())
def basis_and_route(
    x: torch.Tensor,
    weight: torch.Tensor,
    step: torch.Tensor | None,
    bits: int,
    group: int,
    ids: torch.Tensor,
    experts: int,
    tile: int,
    arrivals: int,
    ahead: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`basis` and `routing.route`, for few tokens in one launch: (h, tiles, pairs, arrivals)."""
    if x.shape[0] > BASIS_TOKENS or not ids.numel():
        return basis(x, weight, step, bits, group), *route(ids, experts, tile, arrivals, ahead)
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    routed = routed_tensors(ids, experts, tile, arrivals)
    _launch(x, weight, step, bits, group, y, ids, routed, experts, tile, ahead)
    tiles, pairs, zeros = routed
    return y, tiles, pairs, zeros


@basis_and_route.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    step: torch.Tensor | None,
    bits: int,
    group: int,
    ids: torch.Tensor,
    experts: int,
    tile: int,
    arrivals: int,
    ahead: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    tiles, pairs, zeros = routed_tensors(ids, experts, tile, arrivals)
    return x.new_empty(x.shape[0], weight.shape[0]), tiles, pairs, zeros


def basis_reference(
    x: torch.Tensor, weight: torch.Tensor, step: torch.Tensor | None, bits: int, group: int
) -> torch.Tensor:
    """Oracle: float32 ``[T, N]``."""
    return x.float() @ decode_basis(weight, step, bits, group).T
