"""One rank's part of a stored layer: slices along I (tensor parallelism) and by expert (expert parallelism).

The payload order of `layout` makes both of them slices. Along I, an (expert, gate | up) of the input side and an
(expert, unit) of the output side, with trellis codes an (expert, chain), is a *run*: equal pieces for every group along
I, one after another, so a range of groups is one range of bytes. The bases are shared by all experts and have no axis
along I: every rank holds them whole, and the layer's output is the sum of what the ranks compute.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..errors import CheckpointError
from .chains import chains_of
from .layout import ExpertsLayout
from .packed import PackedExperts


def shard(
    packed: PackedExperts, tp_rank: int = 0, tp_size: int = 1, experts: Sequence[int] | None = None
) -> PackedExperts:
    """Cut a layer for one rank, without decoding it.

    Args:
        packed: the whole layer, its structure checked (`bitsmoe_modifier.storage.layout.check_structure`).
        tp_rank: which of the ``tp_size`` equal ranges of I.
        tp_size: ranks that share every expert.
        experts: ids of the experts to keep, in the order they get in the result; None keeps all.

    Returns:
        A layer of ``len(experts)`` experts with ``I / tp_size`` columns, without checksums, which are those of the
        whole layer. Summed over all ranks, the outputs of the shards are the output of ``packed``: the output bias is
        kept by rank 0 alone. Tensors that are not cut are shared with ``packed``.

    Raises:
        CheckpointError: when a rank's range of I is not whole groups, or an id is not one of the layer's experts.
    """
    whole = ExpertsLayout.from_tensor(packed.layout)
    kept = list(range(whole.num_experts)) if experts is None else list(experts)
    _check(whole, tp_rank, tp_size, kept)
    if tp_size == 1 and kept == list(range(whole.num_experts)):
        return replace(packed, checksums=None)

    groups = range(whole.groups // tp_size * tp_rank, whole.groups // tp_size * (tp_rank + 1))
    columns = slice(groups.start * whole.group_size, groups.stop * whole.group_size)
    chosen = torch.tensor(kept, device=packed.widths_in.device, dtype=torch.int64)
    dense_rows, dense_ids = _dense(packed, kept)
    part = replace(
        whole,
        num_experts=len(kept),
        intermediate_size=whole.intermediate_size // tp_size,
        num_dense=len(dense_rows),
    )
    tensors: dict[str, Any] = {
        "layout": part.to_tensor().to(packed.layout.device),
        "widths_in": packed.widths_in[chosen],
        "widths_out": packed.widths_out[chosen],
        "checksums": None,
        "dense_ids": None,
        "dense_in": None,
        "dense_out": None,
    }
    for side, widths in (("in", packed.widths_in), ("out", packed.widths_out)):
        bits, kept_units = _run_sizes(widths, side, whole)
        for name, sizes, row in (("codes", bits, whole.quantum), ("steps", kept_units, whole.block_size)):
            rows = getattr(packed, f"{name}_{side}").view(-1, row)
            tensors[f"{name}_{side}"] = _cut_runs(rows, sizes, whole.groups, groups, kept).flatten()
    if dense_rows and packed.dense_in is not None and packed.dense_out is not None:
        tensors["dense_ids"] = torch.tensor(dense_ids, dtype=torch.int32, device=packed.layout.device)
        tensors["dense_in"] = _cut_gate_and_up(packed.dense_in[dense_rows], columns)
        tensors["dense_out"] = packed.dense_out[dense_rows][:, :, columns].contiguous()
    if packed.in_bias is not None and packed.out_bias is not None:
        tensors["in_bias"] = _cut_gate_and_up(packed.in_bias[chosen], columns)
        out_bias = packed.out_bias[chosen]
        tensors["out_bias"] = out_bias if tp_rank == 0 else torch.zeros_like(out_bias)
    return replace(packed, **tensors)


def _check(whole: ExpertsLayout, tp_rank: int, tp_size: int, experts: list[int]) -> None:
    if tp_size < 1 or not 0 <= tp_rank < tp_size:
        raise CheckpointError(f"there is no rank {tp_rank} of {tp_size}")
    if whole.groups % tp_size:
        raise CheckpointError(
            f"{tp_size} tensor-parallel ranks would cut the experts' {whole.intermediate_size} intermediate channels "
            f"within a group of {whole.group_size}: use a number of ranks that divides {whole.groups}, or expert "
            f"parallelism (--enable-expert-parallel), or quantize with a smaller group_size"
        )
    unknown = [e for e in experts if not 0 <= e < whole.num_experts]
    if unknown or not experts or len(set(experts)) != len(experts):
        raise CheckpointError(f"{unknown or experts} are not distinct experts of the layer's {whole.num_experts}")


def _run_sizes(widths: torch.Tensor, side: str, layout: ExpertsLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """(quanta, rows of steps) that one group takes in every run: int64 ``[E, runs]`` each."""
    wide = widths.to(torch.int64)
    if side == "in":  # a run is a matrix: its units lie inside a group
        return wide.sum(-1), (wide > 0).sum(-1)
    bits = wide.sort(dim=-1, descending=True).values  # a run is a unit, widest first
    kept = (bits > 0).to(torch.int64)
    if layout.codes:  # or, of codes, a chain of units
        bits = torch.zeros_like(bits)
        for expert, row in enumerate(wide.tolist()):
            chains = chains_of(row, layout.stripes, layout.block_size)
            for number, units in enumerate(chains):
                bits[expert, number] = len(units) * row[units[0]]
    return bits, kept


def _cut_runs(rows: torch.Tensor, sizes: torch.Tensor, groups: int, wanted: range, experts: list[int]) -> torch.Tensor:
    """Rows of the wanted groups of every run of the given experts, in the order of the payload.

    Args:
        rows: ``[places, row]``, the whole payload.
        sizes: ``[E, runs]``, rows that one group takes in a run.
        groups: groups along I in ``rows``.
        wanted: consecutive groups to keep.
        experts: whose runs to keep.
    """
    starts = ((sizes.flatten().cumsum(0) - sizes.flatten()) * groups).view_as(sizes).tolist()
    pieces = [
        rows[start + wanted.start * size : start + wanted.stop * size]
        for e in experts
        for start, size in zip(starts[e], sizes[e].tolist(), strict=True)
        if size
    ]
    return torch.cat(pieces) if pieces else rows[:0]


def _cut_gate_and_up(tensor: torch.Tensor, columns: slice) -> torch.Tensor:
    """``[n, 2I, ...]``, gate before up, to the same with the wanted range of I in each half."""
    halves = tensor.unflatten(1, (2, -1))
    return halves[:, :, columns].flatten(1, 2).contiguous()


def _dense(packed: PackedExperts, experts: list[int]) -> tuple[list[int], list[int]]:
    """Rows of the super experts that are kept, and the ids that they have among ``experts``."""
    if packed.dense_ids is None:
        return [], []
    place = {e: i for i, e in enumerate(experts)}
    found = [(row, place[e]) for row, e in enumerate(packed.dense_ids.tolist()) if e in place]
    return [row for row, _ in found], [e for _, e in found]
