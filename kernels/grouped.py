"""Products of many pairs with experts' factors in 16 bits (`decoded.py`): gate and up with the gate, and down.

A program owns a tile of pairs of one expert and some rows of its factor, as in any grouped matrix product; programs of
experts that are not written out at present end at once. z is a sixteenth, as with trellis codes in registers, so the
oracles are theirs: `trellis_gate_up_reference` and `trellis_down_reference`.
"""

import torch
import triton
import triton.language as tl

from .activation import gate_value
from .digits import product
from .launch import Launch, capability, launch_grouped
from .launcher import run
from .routing import pair_tile
from .trellis_gate_up import Z_SCALE


@triton.jit(do_not_specialize=["FIRST", "COUNT"])
def grouped_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, tiles_ptr, pairs_ptr, FIRST, COUNT, scale,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, GATED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, SHIFT: tl.constexpr,
    STAGES: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Program (tile of pairs and BN columns of the result), those of a tile one after another, for they share its rows.

    GATED: out [P, N] = gate(scale w[0] x + bias, scale w[1] x + bias) / 16 of the pairs' tokens' rows x [T, K], w
    [COUNT, 2, N, K], bias [E, 2 N]. Otherwise out [P, N] = scale w x of the pairs' rows, w [COUNT, N, K].
    """
    BLOCKS: tl.constexpr = N // BN
    e, pair = pair_tile(tiles_ptr, pairs_ptr, tl.program_id(0) // BLOCKS, BM)
    at = e - FIRST
    if (at >= 0) & (at < COUNT):
        here = pair >= 0
        n, k = tl.program_id(0) % BLOCKS * BN + tl.arange(0, BN), tl.arange(0, BK)
        x = x_ptr + (pair // TOP_K if GATED else pair)[:, None].to(tl.int64) * K + k[None, :]
        w = w_ptr + at.to(tl.int64) * (N * K * (2 if GATED else 1)) + n[:, None] * K + k[None, :]
        acc = tl.zeros((BM, BN), tl.float32)
        up = tl.zeros((BM, BN), tl.float32)
        for start in tl.range(0, K, BK, num_stages=STAGES):
            xs = tl.load(x + start, mask=here[:, None], other=0.0)
            acc = product(xs, tl.trans(tl.load(w + start)), acc, PACK)
            if GATED:
                up = product(xs, tl.trans(tl.load(w + N * K + start)), up, PACK)
        acc *= scale
        if GATED:
            up *= scale
            if HAS_BIAS:
                bias = bias_ptr + e.to(tl.int64) * (2 * N) + n
                acc += tl.load(bias).to(tl.float32)[None, :]
                up += tl.load(bias + N).to(tl.float32)[None, :]
            acc = gate_value(acc, up, ACTIVATION, LIMIT, ALPHA, SHIFT) * Z_SCALE
        out = out_ptr + pair[:, None].to(tl.int64) * N + n[None, :]
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=here[:, None])


def _product(
    x: torch.Tensor, tiles: torch.Tensor, pairs: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None,
    out: torch.Tensor, first: int, scale: float, tile: int, top_k: int,
    gate: tuple[str, float | None, float, float] | None,
) -> None:  # fmt: skip
    """Launch; gate: the constants of a `Gating`, None: down."""
    (bn, bk), how = grouped_sizes(tile, w.shape[-2], w.shape[-1], gate is not None, capability(x.device))
    activation, limit, alpha, shift = gate or ("silu", None, 1.0, 0.0)
    run(
        grouped_kernel,
        (len(tiles) * (w.shape[-2] // bn),),
        (x, w, bias, out, tiles, pairs, first, len(w), scale),
        how,
        x.device,
        {
            "N": w.shape[-2], "K": w.shape[-1], "TOP_K": top_k, "GATED": gate is not None, "BM": tile, "BN": bn,
            "BK": bk, "HAS_BIAS": bias is not None, "ACTIVATION": activation, "LIMIT": limit, "ALPHA": alpha,
            "SHIFT": shift,
        },
    )  # fmt: skip


def grouped_sizes(tile: int, rows: int, columns: int, gated: bool, cc: int) -> tuple[tuple[int, int], Launch]:
    """((BN, BK), launch) for factors ``[rows, columns]``: the largest sizes of `launch.launch_grouped` that divide
    them."""
    bn, bk, how = launch_grouped(tile, gated, cc)
    while rows % bn:
        bn //= 2
    while columns % bk:
        bk //= 2
    return (bn, bk), how


@torch.library.custom_op("bitsmoe::grouped_gate_up", mutates_args=("z",))
def grouped_gate_up(
    z: torch.Tensor,
    h: torch.Tensor,
    tiles: torch.Tensor,
    pairs: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    first: int,
    scale: float,
    pair_tile: int,
    top_k: int,
    activation: str,
    limit: float | None,
    alpha: float,
    up_shift: float,
) -> None:
    """A sixteenth of z ``[T k, I]``, of the pairs whose experts are written out; the other rows stay as they are.

    Args:
        z: of h's dtype.
        h: ``[T, R]`` contiguous.
        tiles: from `routing.route`, likewise pairs.
        pairs: see ``tiles``.
        w: ``[count, 2, I, R]`` of h's dtype, from `decoded.decode_factor`.
        bias: ``[E, 2 I]`` or None.
        first: the expert of ``w[0]``.
        scale: that w is to be multiplied by.
        pair_tile: BM: the ``tile`` given to `route`.
        top_k: k.
        activation: with limit, alpha and up_shift the fields of `Gating`.
    """
    gate = activation, limit, alpha, up_shift
    _product(h, tiles, pairs, w, bias, z, first, scale, pair_tile, top_k, gate)


@torch.library.custom_op("bitsmoe::grouped_down", mutates_args=("t",))
def grouped_down(
    t: torch.Tensor,
    z: torch.Tensor,
    tiles: torch.Tensor,
    pairs: torch.Tensor,
    w: torch.Tensor,
    first: int,
    scale: float,
    pair_tile: int,
) -> None:
    """``t = scale F z`` ``[T k, R']`` of the pairs whose experts are written out, where z comes as a sixteenth; the
    other rows stay as they are.

    Args:
        t: of z's dtype.
        z: ``[T k, I]`` contiguous, from `grouped_gate_up`.
        tiles: from `routing.route`, likewise pairs.
        pairs: see ``tiles``.
        w: ``[count, R', I]``, from `decoded.decode_factor`.
        first: the expert of ``w[0]``.
        scale: that w is to be multiplied by.
        pair_tile: BM: the ``tile`` given to `route`.
    """
    _product(z, tiles, pairs, w, None, t, first, scale / Z_SCALE.value, pair_tile, 1, None)


@grouped_gate_up.register_fake
def _(z: torch.Tensor, *rest: object, **named: object) -> None:
    return None


@grouped_down.register_fake
def _(t: torch.Tensor, *rest: object, **named: object) -> None:
    return None
