"""What every unit would cost and lose at every width (method.md section 3), and the steps of the widths that it got."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from .distributed import Ranks
from .rounding import search_step
from .trellis import chain_error, group_error

#: Elements of a factor that the step search holds at once. Small enough for a CPU's cache, where the search's dozens of
#: passes over the same weights are three times faster than from memory; on a GPU many enough to be worth a launch.
_CHUNK_ELEMENTS, _GPU_CHUNK_ELEMENTS = 1 << 18, 1 << 24
#: Elements of a factor that are rounded to learn what rounding loses.
SAMPLE_ELEMENTS = 1 << 18


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
    """Stored bits of one unit: payload and steps of a byte; nothing at width 0. Equal for gate, up and down."""
    steps = 8 * block_size * (intermediate_size // group_size) if width else 0
    return block_size * intermediate_size * width + steps


def side_costs(
    factors: Iterable[torch.Tensor],
    weight: torch.Tensor,
    gain: torch.Tensor,
    widths: Sequence[int],
    block_size: int,
    group_size: int,
    own: range | None = None,
    ranks: Ranks | None = None,
    trellis: Literal["group", "chain"] | None = None,
) -> SideCosts:
    """The distortion of every unit at every width.

    ``D = gain_r * Σ_i weight_i (a_ir - Q(a_ir))²`` summed over the directions r of a unit: with weight ρ and gain
    diag(B C[e] Bᵀ) for gate and up, weight diag Z[e] and gain diag(Uᵀ M U) for down. At width 0 this is exact. At the
    others it is that times the share which the real quantizer leaves, and this share is measured, for each width and
    each unit's place along the directions, on evenly spaced matrices of `SAMPLE_ELEMENTS` elements (all of a small
    layer's).

    Args:
        factors: the side's matrices in order, in parts of float32 ``[some, I, directions]`` (down factors transposed).
        weight: ``[matrices, I]``, ≥ 0.
        gain: ``[matrices, directions]``, ≥ 0.
        widths: candidate widths.
        block_size: directions per unit.
        group_size: columns along I per step.
        own: which matrices the factors are; None for all.
        ranks: the processes that have the others; None where this one has all.
        trellis: measure trellis codes: with sequences along I ("group", gate and up) or along the directions ("chain",
            down). None measures the grid.
    """
    ranks = ranks or Ranks.alone()
    matrices, directions = gain.shape
    widths = tuple(sorted(widths))
    whole = torch.zeros(matrices, directions // block_size, dtype=torch.float64, device=gain.device)
    left = torch.zeros(directions // block_size, len(widths), dtype=torch.float64, device=gain.device)
    stride = min(matrices, -(-matrices * weight.shape[1] * directions // SAMPLE_ELEMENTS))
    each = (matrix for part in factors for matrix in part)
    for at, factor in zip(range(matrices) if own is None else own, each, strict=True):
        whole[at] = _per_unit(weight[at] @ factor.square(), gain[at], block_size)
        if at % stride == 0:
            left += _left(factor, weight[at], gain[at], widths, block_size, group_size, trellis)
    whole, left = ranks.total(whole), ranks.total(left)
    reference = whole[::stride].sum(0).clamp_min(torch.finfo(torch.float64).tiny)
    distortion = whole[:, :, None] * (left / reference[:, None])
    if widths[0] == 0:
        distortion[:, :, 0] = whole
    return SideCosts(widths, distortion.cpu())


def _per_unit(error: torch.Tensor, gain: torch.Tensor, block_size: int) -> torch.Tensor:
    """Errors per direction to distortion per unit, float64 ``[units]``."""
    return (error * gain).view(-1, block_size).sum(-1, dtype=torch.float64)


def _left(
    factor: torch.Tensor,
    weight: torch.Tensor,
    gain: torch.Tensor,
    widths: Sequence[int],
    block_size: int,
    group_size: int,
    trellis: str | None,
) -> torch.Tensor:
    """Distortion of one matrix's units after rounding, float64 ``[units, widths]``; 0 at width 0."""
    w = factor.reshape(-1, group_size, factor.shape[1]).contiguous()
    rho = weight.view(-1, group_size, 1)
    left = torch.zeros(factor.shape[1] // block_size, len(widths), dtype=torch.float64, device=factor.device)
    for column, width in enumerate(widths):
        if width:
            if trellis is None:
                error = search_step(w, rho, width)[1].sum(0)
            elif trellis == "group":
                error = group_error(factor, weight, width, group_size)
            else:
                error = chain_error(factor, weight, gain, width, group_size, block_size)
            left[:, column] = _per_unit(error, gain, block_size)
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
    steps = torch.ones(matrices, groups, directions, dtype=torch.float32, device=factor.device)
    blocks = steps.view(matrices, groups, -1, block_size)
    rows = factor.reshape(matrices, groups, group_size, -1, block_size)
    rho = weight.reshape(matrices, groups, group_size, 1)
    elements = _GPU_CHUNK_ELEMENTS if factor.is_cuda else _CHUNK_ELEMENTS
    chunk = max(1, elements // (length * block_size))
    for width in widths.unique().tolist():
        if not width:
            continue
        matrix, unit = (widths == width).nonzero(as_tuple=True)
        for m, u in zip(matrix.split(chunk), unit.split(chunk), strict=True):
            step, _ = search_step(rows[m, :, :, u], rho[m], width)
            blocks[m, :, u] = step.squeeze(-2)
    return steps
