"""What every unit would cost and lose at every width (method.md section 3)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .rounding import search_step

#: Elements of a factor that the step search holds at once. Small enough for a CPU's cache, where the search's dozens of
#: passes over the same weights are three times faster than from memory.
_CHUNK_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class SideCosts:
    """Distortion and steps of one side at every candidate width.

    Attributes:
        widths: candidate widths, rising.
        distortion: float64 ``[matrices, units, widths]``, in the unit of the layer's squared output error.
        steps: float32 ``[widths, matrices, groups, directions]``, storable; meaningless at width 0.
    """

    widths: tuple[int, ...]
    distortion: torch.Tensor
    steps: torch.Tensor


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
    """Measure the distortion of every unit under the real quantizer.

    ``D = gain_r * Σ_i weight_i (a_ir - Q(a_ir))²`` summed over the directions r of a unit: with weight ρ and gain
    diag(B C[e] Bᵀ) for gate and up, weight diag Z[e] and gain diag(Uᵀ U) (or Uᵀ M U) for down.

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
    groups, units = length // group_size, directions // block_size
    # a row is one group of one matrix: [rows, group_size, directions]
    rows = factor.reshape(matrices * groups, group_size, directions)
    importance = weight.reshape(matrices * groups, group_size, 1)
    error = torch.empty(len(widths), len(rows), directions, device=factor.device)
    steps = torch.ones_like(error)
    chunk = max(1, _CHUNK_ELEMENTS // (group_size * directions))
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        w, rho = rows[part].contiguous(), importance[part]
        for column, width in enumerate(widths):
            if width:
                step, error[column, part] = search_step(w, rho, width)
                steps[column, part] = step.squeeze(-2)
            else:
                error[column, part] = (w.square() * rho).sum(-2)
    loss = error.view(len(widths), matrices, groups, directions).sum(2) * gain
    distortion = loss.view(len(widths), matrices, units, block_size).sum(-1, dtype=torch.float64)
    return SideCosts(widths, distortion.permute(1, 2, 0).cpu(), steps.view(len(widths), matrices, groups, directions))
