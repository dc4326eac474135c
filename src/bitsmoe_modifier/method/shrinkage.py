"""How far second moments are believed, as held-out rows decide (method.md section 5).

Error feedback lets columns absorb each other's errors by the correlations of their inputs, and of those a calibration
text shows some that other text does not have. With the off-diagonal parts of the moments scaled down, rounding serves
unseen text better, and the fewer tokens there are, the further.
"""

from collections.abc import Sequence

import torch

from .distributed import Ranks
from .rounding import damp_, feedback_factor

#: Shares by which off-diagonals may be scaled down.
SHARES = (0.0, 0.1, 0.2, 0.35, 0.5)
#: Experts on whose inputs a layer's share is chosen, evenly spread.
_SAMPLE_EXPERTS = 4


def towards_diagonal_(moments: torch.Tensor, share: float) -> torch.Tensor:
    """Scale the off-diagonal parts of moments ``[..., n, n]`` by ``1 - share``, in place."""
    if share:
        diagonal = moments.diagonal(dim1=-2, dim2=-1)
        kept = diagonal.clone()
        moments *= 1 - share
        diagonal.copy_(kept)
    return moments


def sample_experts(num_experts: int, own: range) -> list[int]:
    """Those of a process's experts by which a layer is judged."""
    stride = -(-num_experts // _SAMPLE_EXPERTS)
    return [expert for expert in range(stride // 2, num_experts, stride) if expert in own]


def absorbed_energy(
    moment: torch.Tensor,
    order: torch.Tensor,
    inputs: torch.Tensor,
    dampening: float,
    shares: Sequence[float] = SHARES,
) -> torch.Tensor:
    """What an error of every column costs on other inputs, once later columns absorb it by a moment, for every share.

    With M the feedback factor of the shrunk moment, rounding leaves errors ``E = R M⁻¹``, R what every column was off
    when its turn came. The columns of R are as good as independent, so that an input h loses ``Σ_k R_k² (M⁻¹ h)_k²``.

    Args:
        moment: ``[n, n]`` of one expert's fitted inputs, not damped.
        order: int64 ``[n]``, columns in order of rounding.
        inputs: ``[pairs, n]`` held-out inputs times the roots of their weights.
        dampening: as rounding will add it.
        shares: by which the moment's off-diagonals are scaled down.

    Returns:
        ``Σ (M⁻¹ h)_k²``, ``[shares, n]``, columns in their own order.
    """
    energy = torch.zeros(len(shares), len(order), dtype=torch.float32, device=moment.device)
    turned = inputs.T[order]
    for row, share in zip(energy, shares, strict=True):
        factor = feedback_factor(damp_(towards_diagonal_(moment.clone(), share), dampening)[None], order[None])[0]
        whitened = torch.linalg.solve_triangular(factor, turned, upper=True, unitriangular=True)
        row[order] = whitened.square().sum(1)
    return energy


def least_share(losses: Sequence[torch.Tensor], device: torch.device, ranks: Ranks) -> float:
    """The share with the least loss ``[len(SHARES)]`` over the samples of all processes; 0 where there is none."""
    total = torch.zeros(len(SHARES), dtype=torch.float64, device=device)
    for loss in losses:
        total += loss
    return SHARES[int(ranks.total(total).argmin())]
