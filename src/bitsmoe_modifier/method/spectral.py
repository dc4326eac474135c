"""Bases that all experts of a layer share, rounded, and the experts refitted to them (method.md section 2)."""

from dataclasses import dataclass

import torch

from ..errors import RecipeError
from ..storage.factors import decode_basis, pack_basis
from ..storage.planes import levels
from .distributed import Ranks
from .layer import Matrices
from .numerics import note
from .rounding import encode, search_step

#: Largest expected relative residual ‖A B̂ − W‖ / ‖W‖ of a refit before a basis gets more bits.
_REFIT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class SharedBasis:
    """A basis of one side as stored, with what the refit needs.

    Attributes:
        bits: 4, 8 or 16.
        stored: uint8 codes ``[rows, columns * bits / 8]`` or bfloat16 ``[rows, columns]``.
        step: fp16 ``[rows, columns / group]``, None at 16 bits.
        matrix: float32 ``[rows, columns]``, the decoded basis: B ``[R, H]`` or U ``[H, R']``.
    """

    bits: int
    stored: torch.Tensor
    step: torch.Tensor | None
    matrix: torch.Tensor


def symmetric_sqrt(moment: torch.Tensor, dampening: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``(S, S⁻¹)`` with ``S Sᵀ = moment + damping``, float64.

    S is the Cholesky factor L of method.md where it exists, and an eigendecomposition's square root otherwise.

    Args:
        moment: ``[n, n]`` symmetric, positive semidefinite.
        dampening: fraction of the mean diagonal added to the diagonal.
    """
    wide = moment.to(torch.float64)
    n = len(wide)
    mean = wide.diagonal().mean().clamp_min(1e-300)
    eye = torch.eye(n, dtype=torch.float64, device=wide.device)
    damped = wide + dampening * mean * eye
    factor, info = torch.linalg.cholesky_ex(damped)
    if int(info) == 0:
        return factor, torch.linalg.solve_triangular(factor, eye, upper=False)
    note(
        "a second moment of the layer is singular even with its dampening, and its root leaves directions out; "
        "calibrate with more text, or raise `dampening_frac`"
    )
    values, vectors = torch.linalg.eigh(damped)
    values = values.clamp_min(1e-9 * float(values.max().clamp_min(1e-300)))
    return vectors * values.sqrt(), (vectors / values.sqrt()).T


def input_directions(
    input_moment: torch.Tensor,
    gate_up: Matrices,
    row_importance: torch.Tensor,
    rank: int,
    dampening: float,
    ranks: Ranks | None = None,
) -> torch.Tensor:
    """Unrounded B: directions in which the calibration input is white, strongest first (method.md section 2).

    Args:
        input_moment: C, ``[H, H]``.
        gate_up: ``[E, 2I, H]``.
        row_importance: ρ, ``[E, 2I]``.
        rank: R ≤ H.
        dampening: see `symmetric_sqrt`.
        ranks: the processes that divide the experts among them; None for this one alone.

    Returns:
        B, float32 ``[R, H]`` with rows of norm 1.
    """
    ranks = ranks or Ranks.alone()
    root, inverse = symmetric_sqrt(input_moment, dampening)
    energy = torch.zeros_like(input_moment)
    for expert in ranks.mine(len(gate_up)):
        scaled = gate_up[expert].to(torch.float32) * row_importance[expert].sqrt()[:, None]
        energy.addmm_(scaled.T, scaled)
    energy = ranks.total(energy).to(torch.float64)
    _, vectors = torch.linalg.eigh(root.T @ energy @ root)
    b = vectors.flip(1).T[:rank] @ inverse
    return (b / b.norm(dim=1, keepdim=True)).to(torch.float32)


def output_directions(down_output_moment: torch.Tensor, rank: int, metric: torch.Tensor | None = None) -> torch.Tensor:
    """Unrounded U: eigenvectors of Σ_e W_down Z W_downᵀ, strongest first (method.md section 2).

    With a loss metric M the directions are those of ``Mᵗᐟ² (·) M¹ᐟ²``, mapped back so that errors in different
    directions do not interact in the loss: ``Uᵀ M U`` is diagonal.

    Args:
        down_output_moment: ``[H, H]``.
        rank: R' ≤ H.
        metric: M, ``[H, H]``, or None for the identity.

    Returns:
        U, float32 ``[H, R']`` with columns of norm 1.
    """
    moment = down_output_moment.to(torch.float64)
    if metric is None:
        _, vectors = torch.linalg.eigh(moment)
        return vectors.flip(1)[:, :rank].to(torch.float32)
    root, inverse = symmetric_sqrt(metric, 1e-2)
    _, vectors = torch.linalg.eigh(root.T @ moment @ root)
    u = inverse.T @ vectors.flip(1)[:, :rank]
    return (u / u.norm(dim=0, keepdim=True)).to(torch.float32)


def round_basis(matrix: torch.Tensor, bits: int, group: int) -> SharedBasis:
    """Round a basis to bfloat16, or to 8- or 4-bit codes with a step per row and ``group`` columns."""
    if bits == 16:
        stored = matrix.to(torch.bfloat16)
        return SharedBasis(16, stored, None, stored.to(torch.float32))
    rows, columns = matrix.shape
    if columns % group:
        raise RecipeError(f"basis groups of {group} do not divide {columns} columns; set basis_bits: 16")
    grouped = matrix.view(rows, columns // group, group, 1)
    step, _ = search_step(grouped, torch.ones_like(matrix[0, 0]), bits, 32, _in_fp16)
    codes = encode(grouped, step, levels(bits)).to(torch.uint8).view(rows, columns)
    step = step.view(rows, -1).to(torch.float16)
    stored = pack_basis(codes, bits, group)
    return SharedBasis(bits, stored, step, decode_basis(stored, step, bits, group))


def _in_fp16(step: torch.Tensor) -> torch.Tensor:
    """Steps of a basis, which are few, as they are stored; never 0 and never infinite."""
    return step.clamp(2.0**-24, 65504.0).to(torch.float16).to(torch.float32)


def refit_inverse(basis: SharedBasis, moment: torch.Tensor | None, side: str) -> torch.Tensor:
    """The matrix that turns weights into factors of the *rounded* basis, float64.

    A square basis is only a change of coordinates: ``A = W B̂⁻¹`` represents W exactly. A truncated one gives the
    least-squares fit under the moment: ``A = W C B̂ᵀ (B̂ C B̂ᵀ)⁻¹`` (input side), ``F = (Ûᵀ Û)⁻¹ Ûᵀ W`` (output side).

    Args:
        basis: the rounded basis.
        moment: C ``[H, H]`` for a truncated input basis (ignored for a square one).
        side: "in" or "out".

    Returns:
        ``[H, R]`` with ``A = W @ result`` (side "in"), or ``[R', H]`` with ``F = result @ W`` (side "out"); infinity
        where the basis is exactly singular.
    """
    wide = basis.matrix.to(torch.float64)
    if wide.shape[0] == wide.shape[1]:
        result, info = torch.linalg.inv_ex(wide)
    elif side == "in":
        weighted = (wide if moment is None else wide @ moment.to(torch.float64)).T
        result, info = torch.linalg.solve_ex(wide @ weighted, weighted, left=False)
    else:
        result, info = torch.linalg.solve_ex(wide.T @ wide, wide.T)
    return torch.full_like(result, torch.inf) if int(info) else result


def round_and_refit(
    matrix: torch.Tensor, bits: int, group: int, moment: torch.Tensor | None, side: str
) -> tuple[SharedBasis, torch.Tensor]:
    """Round a basis and invert it, with more bits where the rounded one is too badly conditioned to refit.

    Returns:
        (basis, `refit_inverse`).

    Raises:
        RecipeError: when even 16 bits cannot represent the weights.
    """
    warning = ""
    for attempt in [b for b in (4, 8, 16) if b >= bits]:
        basis = round_basis(matrix, attempt, group)
        inverse = refit_inverse(basis, moment, side)
        # Factors rounded to float32 come back with 2^-24 times this relative error, for weights that prefer no
        # direction. An orthogonal basis has 1 at every size, which norms of single columns would not give.
        condition = float(inverse.norm() * basis.matrix.norm()) / min(basis.matrix.shape)
        if condition * 2.0**-24 < _REFIT_TOLERANCE:
            if warning:
                note(warning)
            return basis, inverse
        warning = (
            f"the {side}put basis at {attempt} bits has condition number {condition:.0f}; using more bits for it, or "
            f"set {side}put_basis: none"
        )
    raise RecipeError(f"the {side}put basis cannot be inverted ({warning}); set {side}put_basis: none")


def output_coupling(
    basis: SharedBasis | None, metric: torch.Tensor | None, hidden: int, device: torch.device | str
) -> torch.Tensor:
    """Uᵀ M U: how errors of two output directions act together in the loss, float32 ``[R', R']``."""
    metric = torch.eye(hidden, dtype=torch.float32, device=device) if metric is None else metric
    return metric if basis is None else basis.matrix.T @ metric @ basis.matrix


def project(x: torch.Tensor, basis: SharedBasis | None) -> torch.Tensor:
    """h = B x of every token, float32 ``[T, R]``."""
    wide = x.to(torch.float32)
    return wide if basis is None else wide @ basis.matrix.T
