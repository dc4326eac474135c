"""A layer's forward composed of the kernels: basis, gate_up, down, combine, basis. See docs/method.md for the
symbols."""

import torch

from bitsmoe_modifier.method.gating import Gating

from .activation import gating_arguments
from .basis import basis
from .combine import combine
from .down import down
from .gate_up import gate_up
from .launch import DECODE_PAIRS, decode_tile, prefill_tile
from .prepare import PreparedExperts
from .routing import sort_pairs


def moe_forward(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    experts: PreparedExperts,
    gating: Gating,
) -> torch.Tensor:
    """The layer's output for tokens whose experts are chosen.

    Args:
        x: ``[T, H]`` fp16 or bf16 (float32 under the interpreter), any strides.
        top_k_index: ``[T, k]`` integers; those outside ``[0, E)`` contribute nothing.
        top_k_weights: ``[T, k]`` floats, p.
        experts: from `prepare`.
        gating: the elementwise function between the projections.

    Returns:
        ``[T, H]`` of x's dtype. No value depends on the launch order, and nothing waits for the device.
    """
    layout, packed, side_in, side_out = experts.layout, experts.packed, experts.side_in, experts.side_out
    group = layout.basis_group_size
    x, ids, p = x.contiguous(), top_k_index.contiguous(), top_k_weights.contiguous()
    h = x if packed.basis_in is None else basis(x, packed.basis_in, packed.basis_in_step, layout.basis_in_bits, group)
    tiles, pairs, tile = None, None, decode_tile(ids.numel(), layout.num_experts)
    if ids.numel() > DECODE_PAIRS:
        tile = prefill_tile(ids.numel(), layout.num_experts)
        tiles, pairs = sort_pairs(ids, layout.num_experts, tile)
    sizes = layout.block_size, layout.group_size
    z = gate_up(
        h, ids, tiles, pairs, side_in.codes, side_in.steps, side_in.head, side_in.order, packed.in_bias,
        list(side_in.widths), side_in.gain, *sizes, layout.intermediate_size, tile, *gating_arguments(gating),
    )  # fmt: skip
    t = down(
        z, ids, tiles, pairs, side_out.codes, side_out.steps, side_out.head, side_out.order,
        list(side_out.widths), *sizes, tile,
    )  # fmt: skip
    base = _dense_experts(x, ids, p, experts, gating)
    if packed.basis_out is not None:
        t = combine(t, ids, p, None, None, layout.num_experts, layout.rank_out, x.dtype)
        y = basis(t, packed.basis_out, packed.basis_out_step, layout.basis_out_bits, group)
        if base is None and packed.out_bias is None:
            return y
        base, t = y if base is None else base + y, None
    return combine(t, ids, p, packed.out_bias, base, layout.num_experts, layout.hidden_size, x.dtype)


def _dense_experts(
    x: torch.Tensor, ids: torch.Tensor, p: torch.Tensor, experts: PreparedExperts, gating: Gating
) -> torch.Tensor | None:
    """What the super experts, which are stored dense, add to y; None where a layer has none.

    Plain matrix products over all tokens: such experts are one or two of a model, and most tokens may go to them.
    """
    packed = experts.packed
    if packed.dense_ids is None or packed.dense_in is None or packed.dense_out is None:
        return None
    y = x.new_zeros(x.shape, dtype=torch.float32)
    for place in range(experts.layout.num_dense):
        e = packed.dense_ids[place]
        chosen = ids == e
        p_e = torch.where(chosen, p, 0).sum(1, keepdim=True, dtype=torch.float32)
        a = (x @ packed.dense_in[place].to(x.dtype).T).float()
        if packed.in_bias is not None:
            a = a + packed.in_bias.index_select(0, e[None]).float()
        z = gating(*a.chunk(2, 1)).to(x.dtype)
        out = (z @ packed.dense_out[place].to(x.dtype).T).float()
        y = y + torch.where(chosen.any(1, keepdim=True), p_e * out, 0.0)
    return y
