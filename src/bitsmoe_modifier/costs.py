"""What every unit would cost and lose at every width (method.md section 3), and the steps of the widths that it got."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .rounding import search_step

#: Elements of a factor that the step search holds at once. Small enough for a CPU's cache, where the search's dozens of
#: passes over the same weights are three times faster than from memory.
_CHUNK_ELEMENTS = 1 << 18
#: Elements of a factor that are rounded to learn what rounding loses.
_SAMPLE_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class SideCosts:
    """Distortion of one side at every candidate width.

    Attributes:
        widths: candidate widths, rising.
        distortion: float64 ``[matrices, units, widths]``, in the unit of the layer's squared output error.
    """

    widths: tuple[int, ...]
    distortion: torch.Tensor


def unit_cost(width: int, block_size: int, intermediate_size: int, group_size: int) -> int:
    """Stored bits of one unit: payload and fp16 steps; nothing at width 0. Equal for gate, up and down."""
    steps = 16 * block_size * (intermediate_size // group_size) if width else 0
    return block_size * intermediate_size * width + steps


def side_costs(
    factor: torch.Tensor,
    weight: torch.Tensor,
    gain: torch.Tensor,
    widths: Sequence[int],
    block_size: int,
    group_size: int,
) -> SideCosts:
    """The distortion of every unit at every width.

    ``D = gain_r * Σ_i weight_i (a_ir - Q(a_ir))²`` summed over the directions r of a unit: with weight ρ and gain
    diag(B C[e] Bᵀ) for gate and up, weight diag Z[e] and gain diag(Uᵀ M U) for down. At width 0 this is exact. At the
    others it is that times the share which the real quantizer leaves, and this share is measured, for each width and
    each unit's place along the directions, on evenly spaced matrices of `_SAMPLE_ELEMENTS` elements (all of a small
    layer's).

    Args:
        factor: float32 ``[matrices, I, directions]`` (down factors transposed).
        weight: ``[matrices, I]``, ≥ 0.
        gain: ``[matrices, directions]``, ≥ 0.
        widths: candidate widths.
        block_size: directions per unit.
        group_size: columns along I per step.
    """
    matrices, length, directions = factor.shape
    widths = tuple(sorted(widths))
    energy = torch.stack([w @ a.square() for w, a in zip(weight, factor, strict=True)])
    whole = (energy * gain).view(matrices, -1, block_size).sum(-1, dtype=torch.float64)
    stride = -(-matrices * length * directions // _SAMPLE_ELEMENTS)
    picked = torch.arange(0, matrices, min(stride, matrices), device=factor.device)
    left = _left(factor, weight, gain, picked, widths, block_size, group_size)
    reference = whole[picked].sum(0).clamp_min(torch.finfo(torch.float64).tiny)
    distortion = whole[:, :, None] * (left / reference[:, None])
    for column, width in enumerate(widths):
        if width == 0:
            distortion[:, :, column] = whole
    return SideCosts(widths, distortion.cpu())


def _left(
    factor: torch.Tensor,
    weight: torch.Tensor,
    gain: torch.Tensor,
    picked: torch.Tensor,
    widths: Sequence[int],
    block_size: int,
    group_size: int,
) -> torch.Tensor:
    """Distortion of each unit's place summed over the picked matrices, float64 ``[units, widths]``."""
    directions = factor.shape[2]
    units = directions // block_size
    left = torch.zeros(units, len(widths), dtype=torch.float64, device=factor.device)
    for matrix in picked.tolist():
        w = factor[matrix].reshape(-1, group_size, directions)
        rho = weight[matrix].view(-1, group_size, 1)
        for column, width in enumerate(widths):
            if width:
                _, error = search_step(w.contiguous(), rho, width)
                left[:, column] += (error.sum(0) * gain[matrix]).view(units, block_size).sum(-1, dtype=torch.float64)
    return left


def chosen_steps(
    factor: torch.Tensor, weight: torch.Tensor, widths: torch.Tensor, block_size: int, group_size: int
) -> torch.Tensor:
    """Steps of every direction at its unit's width.

    Args:
        factor: float32 ``[matrices, I, directions]``.
        weight: ``[matrices, I]``, ≥ 0.
        widths: uint8 ``[matrices, units]``.
        block_size: directions per unit.
        group_size: columns along I per step.

    Returns:
        float32 ``[matrices, groups, directions]``, storable; meaningless at width 0.
    """
    matrices, length, directions = factor.shape
    groups = length // group_size
    steps = torch.ones(matrices, groups, directions, device=factor.device)
    blocks = steps.view(matrices, groups, -1, block_size)
    rows = factor.reshape(matrices, groups, group_size, -1, block_size)
    rho = weight.reshape(matrices, groups, group_size, 1)
    chunk = max(1, _CHUNK_ELEMENTS // (length * block_size))
    for width in widths.unique().tolist():
        if not width:
            continue
        matrix, unit = (widths == width).nonzero(as_tuple=True)
        for m, u in zip(matrix.split(chunk), unit.split(chunk), strict=True):
            step, _ = search_step(rows[m, :, :, u], rho[m], width)
            blocks[m, :, u] = step.squeeze(-2)
    return steps
