"""A layer's forward composed of the kernels. See docs/method.md for the symbols.

A decoding step is three launches, and one more where there is an output basis: the input basis with the routing (or the
routing alone), gate and up, down with the sum over a token's experts.
"""

from dataclasses import dataclass

import torch

from bitsmoe_modifier.method.gating import Gating

from .activation import gating_arguments
from .basis import basis, basis_and_route
from .combine import combine
from .down import down, down_and_combine
from .gate_up import gate_up
from .launch import (
    DECODE_PAIRS,
    decode_tile,
    down_tile,
    expected_tiles,
    gate_up_tile,
    prefill_tile,
    swaps,
)
from .prepare import PreparedExperts
from .routing import route, tile_count


@dataclass(frozen=True)
class Plan:
    """How a step of one layer is launched: what follows from shapes and the GPU.

    Attributes:
        tile: BM, pairs of a tile.
        tiles: that are laid out.
        bn: columns of a program of gate_up.
        parts: programs of gate_up that share a tile.
        br: directions of a program of down.
        arrivals: counters of gate_up and of down.
        total: down adds a token's experts up.
        swap: the order of z (`launch.swaps`).
    """

    tile: int
    tiles: int
    bn: int
    parts: int
    br: int
    arrivals: tuple[int, int]
    total: bool
    swap: bool


def plan(tokens: int, choices: int, experts: PreparedExperts) -> Plan:
    """The launch sizes for ``tokens`` that choose ``choices`` experts each."""
    layout, pairs = experts.layout, tokens * choices
    total = pairs <= DECODE_PAIRS
    tile = (decode_tile if total else prefill_tile)(pairs, layout.num_experts)
    filled = expected_tiles(pairs, layout.num_experts, tile)
    bn, parts = gate_up_tile(filled, layout.intermediate_size, layout.group_size, layout.units_in)
    br = down_tile(filled, layout.rank_out, layout.block_size)
    tiles = tile_count(pairs, layout.num_experts, tile)
    arrivals = (tiles * (layout.intermediate_size // bn) if parts > 1 else 0, tokens * (layout.rank_out // br))
    swap = swaps(tile, br, experts.capability)
    return Plan(tile, tiles, bn, parts, br, (arrivals[0], arrivals[1] if total else 0), total, swap)


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
    step = plan(*ids.shape, experts)
    routing = ids, layout.num_experts, step.tile, sum(step.arrivals)
    if packed.basis_in is None:
        h, (tiles, pairs, arrivals) = x, route(*routing)
    else:
        h, tiles, pairs, arrivals = basis_and_route(
            x, packed.basis_in, packed.basis_in_step, layout.basis_in_bits, group, *routing
        )
    sizes = layout.block_size, layout.group_size
    z = gate_up(
        h, tiles, pairs, arrivals[: step.arrivals[0]], side_in.codes, side_in.steps, side_in.head, side_in.order,
        packed.in_bias, list(side_in.widths), side_in.gain, ids.shape[1], *sizes, layout.intermediate_size,
        step.tile, step.bn, step.parts, step.swap, *gating_arguments(gating),
    )  # fmt: skip
    base = _dense_experts(x, ids, p, experts, gating)
    # biases and dense experts live in the hidden channels, beside the output basis
    bias, first = (packed.out_bias, base) if packed.basis_out is None else (None, None)
    factor = side_out.codes, side_out.steps, side_out.head, side_out.order
    if step.total:
        y = down_and_combine(
            z, tiles, pairs, arrivals[step.arrivals[0] :], *factor, ids, p, bias, first,
            list(side_out.widths), *sizes, step.tile, step.br,
        )  # fmt: skip
    else:
        t = down(z, tiles, pairs, *factor, list(side_out.widths), *sizes, step.tile, step.br)
        y = combine(t, ids, p, bias, first, layout.num_experts, layout.rank_out, x.dtype)
    if packed.basis_out is None:
        return y
    y = basis(y, packed.basis_out, packed.basis_out_step, layout.basis_out_bits, group)
    if packed.out_bias is None:
        return y if base is None else (base + y).to(x.dtype)
    base = y if base is None else base + y
    return combine(None, ids, p, packed.out_bias, base, layout.num_experts, layout.hidden_size, x.dtype)


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
