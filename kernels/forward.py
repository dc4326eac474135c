"""A layer's forward composed of the kernels. See docs/method.md for the symbols.

A decoding step is three launches, and one more where there is an output basis: the input basis with the routing (or the
routing alone), gate and up, down with the sum over a token's experts.
"""

from dataclasses import dataclass

import torch

from bitsmoe_modifier.method.gating import Gating

from .activation import gating_arguments
from .ahead import fits_ahead
from .basis import basis, basis_and_route
from .combine import combine
from .decoded import decode_factor
from .grouped import grouped_down, grouped_gate_up
from .launch import (
    DECODE_PAIRS,
    decode_tile,
    down_splits,
    down_tile,
    expected_tiles,
    gate_up_tile,
    grouped_tile,
    prefill_rows,
    prefill_tile,
    swaps,
    trellis_prefill_tile,
    trellis_rows,
    written_experts,
)
from .prepare import PreparedExperts
from .products import down, down_launch, gate_up
from .routing import route, tile_count
from .tuned import RULES, sizes_of


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
        warps: of programs of gate_up and of down with trellis codes; 0: by the rules of `launch`.
        splits: programs of down that share a tile's groups.
        ahead: the weights are fetched by the programs that write the tiles (`ahead.py`).
        stages: of gate_up and of down; 0: as `launch` has them.
        written: experts whose factors are written out at a time (`decoded.py`); 0: they are decoded in registers, and
            only then what is said of programs of gate_up and down holds.
    """

    tile: int
    tiles: int
    bn: int
    parts: int
    br: int
    arrivals: tuple[int, int]
    total: bool
    swap: bool
    warps: tuple[int, int]
    splits: int
    ahead: bool
    stages: tuple[int, int] = (0, 0)
    written: int = 0


def plan(tokens: int, choices: int, experts: PreparedExperts) -> Plan:
    """The launch sizes for ``tokens`` that choose ``choices`` experts each."""
    layout, pairs = experts.layout, tokens * choices
    total = pairs <= DECODE_PAIRS
    expert_bytes = 4 * layout.intermediate_size * layout.rank_in
    written = 0 if total else written_experts(pairs, layout.num_experts, expert_bytes, bool(layout.codes))
    if written:
        tile = grouped_tile(pairs, layout.num_experts)
        tiles = tile_count(pairs, layout.num_experts, tile)
        return Plan(tile, tiles, 0, 1, 0, (0, 0), False, False, (0, 0), 1, False, written=written)
    widths = {*experts.side_in.widths, *experts.side_out.widths}
    tuned = sizes_of(experts.sizes, pairs) if total else RULES
    if total:
        tile = decode_tile(pairs, layout.num_experts)
    elif layout.codes:
        tile = trellis_prefill_tile(pairs, layout.num_experts, widths)
    else:
        tile = prefill_tile(pairs, layout.num_experts)
    filled = expected_tiles(pairs, layout.num_experts, tile)
    short = total and bool(layout.codes)
    columns, group = layout.intermediate_size, layout.group_size
    bn, parts = gate_up_tile(filled, columns, group, layout.units_in, short, experts.processors)
    parts = tuned.parts or parts
    br = down_tile(filled, layout.rank_out, layout.block_size)
    if not total:
        bn, br = (prefill_rows(size, experts.capability) for size in (layout.group_size, layout.block_size))
    if layout.codes:
        bn, br = (trellis_rows(tile, size, widths) for size in (layout.group_size, layout.block_size))
    br = tuned.rows or br
    tiles = tile_count(pairs, layout.num_experts, tile)
    arrivals = (tiles * (layout.intermediate_size // bn) if parts > 1 else 0, tokens * (layout.rank_out // br))
    swap = swaps(tile, br, experts.capability)
    warps = tuned.warps_in or 0, tuned.warps or 0
    splits = 1
    if total:
        own = down_launch(tile, br, layout.group_size, warps[1], experts.capability, bool(layout.codes))[1].warps
        groups = layout.intermediate_size // layout.group_size
        splits = tuned.splits or down_splits(
            filled, layout.rank_out // br, groups, br * layout.group_size, own, experts.processors
        )
    ahead = experts.spans is not None and fits_ahead(pairs, layout.num_experts, experts.payload, experts.cache)
    counters, stages = (arrivals[0], arrivals[1] if total else 0), (tuned.stages_in or 0, tuned.stages_out or 0)
    return Plan(tile, tiles, bn, parts, br, counters, total, swap, warps, splits, ahead, stages)


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
    layout, packed, group = experts.layout, experts.packed, experts.layout.basis_group_size
    x, ids, p = x.contiguous(), top_k_index.contiguous(), top_k_weights.contiguous()
    step = plan(*ids.shape, experts)
    ahead = [experts.spans, *experts.side_in.factor, *experts.side_out.factor] if step.ahead else []
    routing = ids, layout.num_experts, step.tile, sum(step.arrivals), ahead
    if packed.basis_in is None:
        h, (tiles, pairs, arrivals) = x, route(*routing)
    else:
        h, tiles, pairs, arrivals = basis_and_route(
            x, packed.basis_in, packed.basis_in_step, layout.basis_in_bits, group, *routing
        )
    base = _dense_experts(x, ids, p, experts, gating)
    # biases and dense experts live in the hidden channels, beside the output basis
    bias, first = (packed.out_bias, base) if packed.basis_out is None else (None, None)
    y = _products(h, (tiles, pairs, arrivals), ids, p, bias, first, experts, gating, step, x.dtype)
    if packed.basis_out is None:
        return y
    y = basis(y, packed.basis_out, packed.basis_out_step, layout.basis_out_bits, group)
    if packed.out_bias is None:
        return y if base is None else (base + y).to(x.dtype)
    base = y if base is None else base + y
    return combine(None, ids, p, packed.out_bias, base, layout.num_experts, layout.hidden_size, x.dtype)


def _products(
    h: torch.Tensor,
    routing: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    ids: torch.Tensor,
    p: torch.Tensor,
    bias: torch.Tensor | None,
    base: torch.Tensor | None,
    experts: PreparedExperts,
    gating: Gating,
    step: Plan,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``base + sum_j p_j (F[id_j] z_j + bias[id_j])``, ``[T, R']`` of ``dtype``; routing from `route`."""
    layout, side_in, side_out = experts.layout, experts.side_in, experts.side_out
    if step.written:
        t = _written_products(h, *routing[:2], ids.shape[1], experts, gating, step)
        return combine(t, ids, p, bias, base, layout.num_experts, layout.rank_out, dtype)
    (tiles, pairs, arrivals), trellis = routing, bool(layout.codes)
    sizes = trellis, layout.block_size, layout.group_size
    z = gate_up(
        h, tiles, pairs, arrivals[: step.arrivals[0]], side_in.factor, experts.packed.in_bias, list(side_in.widths),
        side_in.gain, trellis, ids.shape[1], *sizes[1:], layout.intermediate_size, step.tile, step.bn, step.parts,
        step.swap, *gating_arguments(gating), step.stages[0], step.warps[0],
    )  # fmt: skip
    total = (ids, p, bias, base) if step.total else (None,) * 4
    y = down(
        z, tiles, pairs, arrivals[step.arrivals[0] :], side_out.factor, *total, list(side_out.widths), *sizes,
        step.tile, step.br, step.warps[1], dtype, step.stages[1], step.splits,
    )  # fmt: skip
    if step.total:
        return y
    return combine(y, ids, p, bias, base, layout.num_experts, layout.rank_out, dtype)


def _written_products(
    h: torch.Tensor,
    tiles: torch.Tensor,
    pairs: torch.Tensor,
    choices: int,
    experts: PreparedExperts,
    gating: Gating,
    step: Plan,
) -> torch.Tensor:
    """``t = F z`` of every pair, ``[T k, R']`` of h's dtype, from factors written out some experts at a time."""
    layout, sides = experts.layout, (experts.side_in, experts.side_out)
    z, t = (h.new_empty(pairs.numel(), size) for size in (layout.intermediate_size, layout.rank_out))
    for first in range(0, layout.num_experts, step.written):
        count = min(step.written, layout.num_experts - first)
        for side, output, rank in zip(sides, (False, True), (layout.rank_in, layout.rank_out), strict=True):
            w = decode_factor(
                side.factor, list(side.widths), side.gain, bool(layout.codes), output, rank, layout.intermediate_size,
                layout.block_size, layout.group_size, first, count, h.dtype,
            )  # fmt: skip
            routed = tiles, pairs, w
            if output:
                grouped_down(t, z, *routed, first, 1 / side.gain, step.tile)
            else:
                bias, gate = experts.packed.in_bias, gating_arguments(gating)
                grouped_gate_up(z, h, *routed, bias, first, 1 / side.gain, step.tile, choices, *gate)
            del w, routed  # before the next are written
    return t


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
