"""``sum_j p_j t_j`` over a token's experts, in a fixed order, with the experts' output biases where there are some.

In a decoding step `down` does this itself, in the last of the programs that contribute to a token; the kernel here
serves many tokens.
"""

import torch
import triton
import triton.language as tl

from .launch import Launch
from .launcher import run


@triton.jit
def _chosen(id_ptr, here, E):
    """The expert at ``id_ptr``, int64 of the shape of ``here``; -1 where that is false or no expert of 0 to E - 1."""
    e = tl.where(here, tl.load(id_ptr).to(tl.int64), -1)
    return tl.where(e < E, e, -1)


@triton.jit
def token_sum(
    t_ptr, ids_ptr, p_ptr, bias_ptr, base_ptr, token, n, here, T, E,
    TOP_K: tl.constexpr, N: tl.constexpr, HAS_T: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_BASE: tl.constexpr,
    SPLIT: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """``base + sum_j p_j (t_j + bias[id_j])`` of elements n of tokens' rows of N, float32; ``here`` masks them.

    token, an int64, and n broadcast to the shape of ``here``; CACHE: cache modifier of the loads of t. SPLIT: t comes
    as that many parts ``[T k, N]``, one after another, as the grid's third axis has programs.
    """
    acc = tl.zeros(here.shape, tl.float32)
    if HAS_BASE:
        acc += tl.load(base_ptr + token * N + n, mask=here, other=0.0).to(tl.float32)
    if HAS_T:
        for _ in tl.range(0, tl.num_programs(2) if SPLIT else 1):
            for j in tl.static_range(TOP_K):  # the rows of a part are loaded all at once
                pair = token * TOP_K + j
                chosen = _chosen(ids_ptr + pair, here, E) >= 0  # rows of other ids were never written
                t = tl.load(t_ptr + pair * N + n, mask=chosen, other=0.0, cache_modifier=CACHE)
                acc += tl.load(p_ptr + pair).to(tl.float32) * t.to(tl.float32)
            if SPLIT:
                t_ptr += T.to(tl.int64) * (TOP_K * N)
    if HAS_BIAS:
        for j in tl.static_range(TOP_K):
            e = _chosen(ids_ptr + token * TOP_K + j, here, E)
            bias = tl.load(bias_ptr + e * N + n, mask=e >= 0, other=0.0).to(tl.float32)
            acc += tl.load(p_ptr + token * TOP_K + j).to(tl.float32) * bias
    return acc


@triton.jit(do_not_specialize=["E"])
def combine_kernel(
    t_ptr, ids_ptr, p_ptr, bias_ptr, base_ptr, y_ptr, E,
    TOP_K: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
    HAS_T: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_BASE: tl.constexpr,
):  # fmt: skip
    """Program (token, BLOCK elements of its row)."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = token_sum(
        t_ptr, ids_ptr, p_ptr, bias_ptr, base_ptr, token, n, n < N, 0, E, TOP_K, N, HAS_T, HAS_BIAS, HAS_BASE, False, ""
    )
    tl.store(y_ptr + token * N + n, acc.to(y_ptr.dtype.element_ty), mask=n < N)


@torch.library.custom_op("bitsmoe::combine", mutates_args=())
def combine(
    t: torch.Tensor | None,
    ids: torch.Tensor,
    p: torch.Tensor,
    bias: torch.Tensor | None,
    base: torch.Tensor | None,
    num_experts: int,
    size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``y = base + sum_j p_j (t_j + bias[id_j])`` over the ids inside ``[0, num_experts)``.

    Args:
        t: ``[T k, size]`` floats or None.
        ids: ``[T, k]`` contiguous integers.
        p: ``[T, k]`` contiguous floats.
        bias: ``[E, size]`` or None.
        base: ``[T, size]`` or None.
        num_experts: E.
        size: elements of a row.
        dtype: of the result ``[T, size]``; sums are float32.
    """
    tokens, k = ids.shape
    y = torch.empty(tokens, size, dtype=dtype, device=ids.device)
    if tokens:
        block = min(512, triton.next_power_of_2(size))
        run(
            combine_kernel,
            (tokens, triton.cdiv(size, block)),
            (t, ids, p, bias, base, y, num_experts),
            Launch(warps=4, stages=1, pack=0),
            ids.device,
            {
                "TOP_K": k, "N": size, "BLOCK": block, "HAS_T": t is not None, "HAS_BIAS": bias is not None,
                "HAS_BASE": base is not None,
            },
        )  # fmt: skip
    return y


@combine.register_fake
def _(
    t: torch.Tensor | None,
    ids: torch.Tensor,
    p: torch.Tensor,
    bias: torch.Tensor | None,
    base: torch.Tensor | None,
    num_experts: int,
    size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return ids.new_empty(ids.shape[0], size, dtype=dtype)


def combine_reference(
    t: torch.Tensor | None,
    ids: torch.Tensor,
    p: torch.Tensor,
    bias: torch.Tensor | None,
    base: torch.Tensor | None,
    num_experts: int,
    size: int,
) -> torch.Tensor:
    """Oracle: float32 ``[T, size]``."""
    tokens, k = ids.shape
    y = torch.zeros(tokens, size, device=ids.device) if base is None else base.float().clone()
    for token in range(tokens):
        for j in range(k):
            e = int(ids[token, j])
            if 0 <= e < num_experts:
                if t is not None:
                    y[token] += p[token, j].float() * t[token * k + j]
                if bias is not None:
                    y[token] += p[token, j].float() * bias[e].float()
    return y
