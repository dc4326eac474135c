"""What the packed kernels are compared with: a 16-bit layer as two fused launches, of the quality of vLLM's kernel.

One grouped product multiplies by gate and up and applies the gate, another multiplies by down and by the router's
weights; tiles of pairs are laid out as for our own kernels, and the sum over a token's experts is one reduction. The
tile sizes are tried per batch, once, and the fastest is kept.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from bitsmoe_kernels.digits import product
from bitsmoe_kernels.launch import interpreting, on
from bitsmoe_kernels.routing import pair_tile, route
from layers import Layer, seconds_per_call

#: (columns, terms of a round, warps, stages) that are tried.
CONFIGS = [
    (32, 64, 4, 4), (32, 128, 4, 4), (64, 64, 4, 4), (64, 128, 4, 3), (64, 128, 4, 4), (128, 64, 4, 4), (128, 64, 8, 4),
    (128, 128, 8, 3),
]  # fmt: skip


@triton.jit
def grouped_kernel(
    x_ptr, w_ptr, p_ptr, out_ptr, tiles_ptr, pairs_ptr,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, GATED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Program (tile of pairs, BN columns). GATED: out [P, N] = silu(x w_gate.T) * (x w_up.T) of the pairs' tokens, w
    [E, 2 N, K]; otherwise out [P, N] = p * (x w.T), x [P, K], w [E, N, K]."""
    e, pair = pair_tile(tiles_ptr, pairs_ptr, tl.program_id(0), BM)
    if e >= 0:
        here = pair >= 0
        row = (pair // TOP_K if GATED else pair).to(tl.int64)
        n, k = tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BK)
        x = x_ptr + row[None, :] * K + k[:, None]
        w = w_ptr + e.to(tl.int64) * (N * K * (2 if GATED else 1)) + n[:, None] * K + k[None, :]
        acc = tl.zeros((BN, BM), tl.float32)
        up = tl.zeros((BN, BM), tl.float32)
        for start in tl.range(0, K, BK):
            inside = start + k < K
            there = (n < N)[:, None] & inside[None, :]
            xs = tl.load(x + start, mask=inside[:, None] & here[None, :], other=0.0)
            acc = product(tl.load(w + start, mask=there, other=0.0), xs, acc, PACK)
            if GATED:
                up = product(tl.load(w + N * K + start, mask=there, other=0.0), xs, up, PACK)
        if GATED:
            acc = acc * tl.sigmoid(acc) * up
        else:
            acc *= tl.load(p_ptr + pair, mask=here, other=0.0)[None, :]
        out = out_ptr + pair[None, :].to(tl.int64) * N + n[:, None]
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=here[None, :] & (n < N)[:, None])


def fused_layer(w_in: torch.Tensor, w_out: torch.Tensor) -> Layer:
    """The 16-bit layer over experts ``[E, 2 I, H]`` and ``[E, H, I]``."""
    experts, both, hidden = w_in.shape
    chosen: dict[tuple[int, int], tuple[int, int, int, int]] = {}

    def run(
        x: torch.Tensor, ids: torch.Tensor, p: torch.Tensor, tile: int, config: tuple[int, int, int, int]
    ) -> torch.Tensor:
        (bn, bk, warps, stages), (tokens, k) = config, ids.shape
        tiles, pairs, _ = route(ids, experts, tile, 0, [])
        z = x.new_empty(ids.numel(), both // 2)
        t = x.new_empty(ids.numel(), hidden)  # every id is an expert here
        pack = 0 if interpreting() else 4
        for gated, given, w, out in ((True, x, w_in, z), (False, z, w_out, t)):
            size, terms = out.shape[1], given.shape[1]
            with on(x.device):
                grouped_kernel[(len(tiles), triton.cdiv(size, bn))](
                    given, w, p, out, tiles, pairs, N=size, K=terms, TOP_K=k, GATED=gated,
                    BM=tile, BN=bn, BK=bk, PACK=pack, num_warps=warps, num_stages=stages,
                )  # fmt: skip
        return t.view(tokens, k, hidden).sum(1)

    def layer(x: torch.Tensor, ids: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        tile = 16 if ids.numel() <= 16 * experts else 64
        config = chosen.get(tuple(ids.shape))
        if config is None:
            candidates = CONFIGS[:1] if interpreting() else CONFIGS
            config = _fastest(lambda c: run(x, ids, p, tile, c), candidates, x.device)
            chosen[tuple(ids.shape)] = config
        return run(x, ids, p, tile, config)

    return layer


def _fastest(
    call: Callable[[tuple[int, int, int, int]], torch.Tensor],
    candidates: list[tuple[int, int, int, int]],
    device: torch.device,
) -> tuple[int, int, int, int]:
    """The candidate whose call takes least; those that do not fit the GPU's shared memory fall out."""
    times = {}
    for candidate in candidates if len(candidates) > 1 else []:
        try:
            times[candidate] = seconds_per_call([lambda c=candidate: call(c)], 10, device)
        except triton.runtime.errors.OutOfResources:
            continue
    return min(times, key=times.__getitem__) if times else candidates[0]
