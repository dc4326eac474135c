"""Steps and codes: the mid-rise grid, its step search, and rounding with spectral error feedback (method.md section 5).

`round_with_feedback` goes through the columns once, each absorbing the errors of those before it; `refine` then lets
every column absorb the errors of all others, and refits the steps, as long as asked. Both work on a batch of matrices
(all experts of a layer); the only loops are over columns.

Grid: ``value = step * (2 * code - (2**b - 1))``; the step is half the distance between grid points and is stored in
fp16, so every function here rounds it to fp16 before it is used.
"""

import torch

from .numerics import note
from .planes import levels

_FP16_MIN, _FP16_MAX = 2.0**-24, 65504.0

#: Columns of a block inside which rounding runs one by one; between blocks it is one batched product.
_COLUMN_BLOCK = 32

#: Best half-step of the mid-rise grid for a standard normal variable, by width (found numerically).
_NORMAL_STEP = {1: 0.798, 2: 0.498, 3: 0.293, 4: 0.1677, 6: 0.0519, 8: 0.0155}
#: Where the search ends for coarse grids, relative to its start; finer ones go up to the covering step.
_COARSE_SPAN = {1: 1.8, 2: 2.2}


def to_step(step: torch.Tensor) -> torch.Tensor:
    """Round steps to storable ones: fp16 values (as float32), never 0 and never infinite."""
    return step.clamp(_FP16_MIN, _FP16_MAX).to(torch.float16).to(torch.float32)


def encode(w: torch.Tensor, step: torch.Tensor, level: torch.Tensor | int) -> torch.Tensor:
    """Nearest code of each weight, as float: ``clamp(round((w / step + level) / 2), 0, level)``.

    ``step`` and ``level = 2**b - 1`` broadcast against ``w``; at level 0 (a dropped weight) the code is 0.
    """
    codes = ((w / step + level) * 0.5).round_().clamp_min_(0)
    return codes.clamp_max_(level) if isinstance(level, int) else torch.minimum(codes, level)


def decode(codes: torch.Tensor, step: torch.Tensor, level: torch.Tensor | int) -> torch.Tensor:
    """Value of float codes: ``step * (2 * code - level)``."""
    return (codes * 2 - level) * step


def search_step(
    w: torch.Tensor, weight: torch.Tensor, width: int, candidates: int = 8
) -> tuple[torch.Tensor, torch.Tensor]:
    """Step of least weighted squared error per group, and that error.

    Tries ``candidates`` steps, spaced evenly in their logarithm, from below the best one for normally distributed
    weights up to the one that covers the largest weight, then one weighted least-squares fit to the best one's
    own codes.

    Args:
        w: float32 ``[..., n, g, r]``: groups run along dimension -2.
        weight: ``[..., n, g, 1]`` or broadcastable to it, ≥ 0: importance of each row of a group.
        width: bits, > 0.

    Returns:
        (step ``[..., n, 1, r]`` storable, error ``[..., n, r]``), float32.
    """
    if candidates < 2:
        raise ValueError(f"candidates must be at least 2, got {candidates}")
    level = levels(width)
    weight = weight.expand(*w.shape[:-1], 1)
    row = weight.transpose(-1, -2)
    rms = (row @ w.square() / row.sum(-1, keepdim=True).clamp_min(1e-30)).sqrt()
    covering = w.abs().amax(-2, keepdim=True) / level
    lowest = rms * (0.75 * _NORMAL_STEP[width])
    highest = torch.minimum(covering, lowest * _COARSE_SPAN.get(width, 1e6)).clamp_min(1e-30)
    lowest = torch.minimum(lowest, highest).clamp_min(1e-30)
    ratio = (highest / lowest) ** (1 / (candidates - 1))
    trial = lowest
    step = to_step(trial)
    error = _group_error(w, row, step, level)
    for attempt in range(candidates):
        if attempt == candidates - 1:
            grid = encode(w, step, level).mul_(2).sub_(level)
            fitted = (row @ (grid * w)) / (row @ grid.square()).clamp_min(1e-30)
        else:
            trial = trial * ratio
            fitted = trial
        storable = to_step(fitted)
        trial_error = _group_error(w, row, storable, level)
        better = trial_error < error
        step, error = torch.where(better, storable, step), torch.where(better, trial_error, error)
    return step, error.squeeze(-2)


def _group_error(w: torch.Tensor, row: torch.Tensor, step: torch.Tensor, level: int) -> torch.Tensor:
    """Weighted squared error per group ``[..., n, 1, r]``, in units of code distances until the end to save passes."""
    position = (w * (0.5 / step)).add_(level * 0.5)
    rest = position.round().clamp_(0, level).sub_(position)
    return (row @ rest.square_()) * (4 * step.square())


def feedback_factor(moment: torch.Tensor, dampening: float) -> torch.Tensor:
    """Unit upper-triangular M with ``H + damping = M D Mᵀ``, per batch entry.

    With errors E = W - Q, ``tr(E H Eᵀ) = Σ_k D_k ‖(E M)_k‖²``: when column k is rounded after columns < k, its best
    target is ``w_k + Σ_{j<k} E_j M_jk``. This is GPTQ's update (OPTQ; LDLQ) without an inverse.

    Args:
        moment: float32 ``[N, n, n]`` symmetric, positive semidefinite.
        dampening: added to the diagonal, as a fraction of its mean; raised tenfold until the factorization exists.

    Returns:
        float32 ``[N, n, n]``.
    """
    n = moment.shape[-1]
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
    eye = torch.eye(n, device=moment.device)
    # Cholesky of the matrix with rows and columns reversed gives an upper factor of the matrix itself
    scaled = (moment / mean[:, None, None]).flip((-2, -1))
    while True:
        factor, info = torch.linalg.cholesky_ex(scaled + dampening * eye)
        if not bool(info.any()):
            break
        dampening = max(dampening, 1e-6) * 10
        note(
            "second moments of its experts could not be factored, and more was added to their diagonals; calibrate "
            "with more text, or raise `dampening_frac`"
        )
    factor = factor.flip((-2, -1))
    return factor / factor.diagonal(dim1=-2, dim2=-1)[:, None, :]


def round_with_feedback(
    w: torch.Tensor,
    moment: torch.Tensor,
    step: torch.Tensor,
    level: torch.Tensor,
    order: torch.Tensor,
    dampening: float,
    row_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round the columns of a batch of matrices in order, each absorbing the errors of those before it.

    Args:
        w: float32 ``[N, m, n]``.
        moment: float32 ``[N, n, n]``, second moment of the inputs of the columns.
        step: float32 ``[N, groups, n]`` storable steps; a group is ``m / groups`` consecutive rows.
        level: float32 broadcastable to ``w``, ``2**b - 1``; 0 drops the weight, whose whole value is then absorbed.
        order: int64 ``[N, n]``, columns in order of rounding.
        dampening: fraction of the mean diagonal added to the moment.
        row_weight: importance of the rows, ``[N, m]``: steps are refitted to what each column has to absorb. None keeps
            the steps.

    Returns:
        (codes float32 ``[N, m, n]``, steps ``[N, groups, n]``) in the original column order.
    """
    columns = order[:, None, :].expand_as(w)
    groups = step.shape[1]
    w, level = w.gather(2, columns), level.expand_as(w).gather(2, columns)
    step = step.gather(2, order[:, None, :].expand(-1, groups, -1))
    moment = moment.gather(1, order[:, :, None].expand_as(moment)).gather(2, order[:, None, :].expand_as(moment))
    factor = feedback_factor(moment, dampening)
    codes, error = torch.empty_like(w), torch.empty_like(w)
    n = w.shape[2]
    for start in range(0, n, _COLUMN_BLOCK):
        stop = min(start + _COLUMN_BLOCK, n)
        target = w[:, :, start:stop].clone()
        if start:
            target.baddbmm_(error[:, :, :start], factor[:, :start, start:stop])
        for k in range(stop - start):
            at = start + k
            codes[:, :, at], step[:, :, at], value = _round_column(
                target[:, :, k], step[:, :, at], level[:, :, at], row_weight
            )
            # the error that later columns absorb is measured against the original weight
            error[:, :, at] = w[:, :, at] - value
            if at + 1 < stop:
                target[:, :, k + 1 :].addcmul_(error[:, :, at, None], factor[:, at, None, at + 1 : stop])
    return (
        torch.empty_like(codes).scatter_(2, columns, codes),
        torch.empty_like(step).scatter_(2, order[:, None, :].expand(-1, groups, -1), step),
    )


def refine(
    w: torch.Tensor,
    moment: torch.Tensor,
    codes: torch.Tensor,
    step: torch.Tensor,
    level: torch.Tensor,
    dampening: float,
    row_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One pass of coordinate descent on ``tr((W - Q) H (W - Q)ᵀ)``: every column absorbs the errors of all others.

    No column's change can raise the objective (with ``row_weight``, the objective weighted by it), so passes may be
    repeated. Arguments as in `round_with_feedback`, with the codes to start from.

    Returns:
        (codes float32 ``[N, m, n]``, steps ``[N, groups, n]``).
    """
    n = w.shape[2]
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    damping = dampening * diagonal.mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
    damped = moment + damping[:, None, None] * torch.eye(n, device=moment.device)
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    codes, step, level = codes.clone(), step.clone(), level.expand_as(w)
    value = decode(codes, _per_row(step, w.shape[1]), level)
    # (W - Q) H: minus half the objective's slope in Q
    pull = torch.bmm(w - value, damped)
    for start in range(0, n, _COLUMN_BLOCK):
        stop = min(start + _COLUMN_BLOCK, n)
        change = torch.empty_like(pull[:, :, start:stop])
        for at in range(start, stop):
            target = value[:, :, at] + pull[:, :, at] / diagonal[:, at, None]
            codes[:, :, at], step[:, :, at], new = _round_column(
                target, step[:, :, at], level[:, :, at], row_weight, codes[:, :, at]
            )
            moved = new - value[:, :, at]
            change[:, :, at - start] = moved
            if at + 1 < stop:
                pull[:, :, at + 1 : stop].addcmul_(moved[:, :, None], damped[:, at, None, at + 1 : stop], value=-1)
        if stop < n:
            pull[:, :, stop:].baddbmm_(change, damped[:, start:stop, stop:], alpha=-1)
    return codes, step


def refit_row_steps(
    w: torch.Tensor,
    moment: torch.Tensor,
    codes: torch.Tensor,
    step: torch.Tensor,
    level: torch.Tensor,
    dampening: float,
) -> torch.Tensor:
    """Least-squares steps of groups of columns, given their codes, one group after another.

    Args:
        w, codes: float32 ``[N, m, n]``; moment ``[N, n, n]``; level broadcastable to ``w``.
        step: float32 ``[N, m, groups]``: a group is ``n / groups`` consecutive columns of a row.
        dampening: as in `refine`.

    Returns:
        float32 ``[N, m, groups]``, storable; a step that would raise the row's objective is left as it was.
    """
    groups = step.shape[2]
    size = w.shape[2] // groups
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
    damped = moment + (dampening * mean)[:, None, None] * torch.eye(w.shape[2], device=w.device)
    grid = codes * 2 - level
    step = step.clone()
    for group in range(groups):
        part = slice(group * size, (group + 1) * size)
        rest = w - grid * step.repeat_interleave(size, dim=2)
        slope = (grid[:, :, part] * torch.bmm(rest, damped[:, :, part])).sum(2)
        curvature = (grid[:, :, part] * torch.bmm(grid[:, :, part], damped[:, part, part])).sum(2)
        old = step[:, :, group]
        new = to_step(old + slope / curvature.clamp_min(1e-30))
        # the objective changes by (new - old) * (curvature * (new - old) - 2 * slope)
        better = (new - old) * (curvature * (new - old) - 2 * slope) < 0
        step[:, :, group] = torch.where(better, new, old)
    return step


def _per_row(step: torch.Tensor, rows: int) -> torch.Tensor:
    """Steps ``[N, groups, n]`` to one per row, ``[N, rows, n]``."""
    return step.repeat_interleave(rows // step.shape[1], dim=1)


def _round_column(
    target: torch.Tensor,
    step: torch.Tensor,
    level: torch.Tensor,
    row_weight: torch.Tensor | None,
    codes: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, steps and values of one column.

    Args:
        target: ``[N, m]``; step: ``[N, groups]``; level: ``[N, m]``.
        row_weight: ``[N, m]``: refit the steps, keeping of old and new what has the lower weighted error.
        codes: ``[N, m]`` codes from before, for the refit; None takes the nearest.
    """
    shape = (*step.shape, -1)
    grouped, steps, limits = target.reshape(shape), step[:, :, None], level.reshape(shape)
    nearest = encode(grouped, steps, limits)
    if row_weight is None:
        value = decode(nearest, steps, limits)
        return nearest.view_as(target), step, value.view_as(target)
    weight = row_weight.reshape(shape)
    grid = (nearest if codes is None else codes.reshape(shape)) * 2 - limits
    weighted = weight * grid
    scale = (weighted * grid).sum(2, keepdim=True)
    fitted = (weighted * grouped).sum(2, keepdim=True) / scale.clamp_min(1e-30)
    fitted = torch.where(scale > 0, to_step(fitted), steps)
    refitted = encode(grouped, fitted, limits)
    value, new_value = decode(nearest, steps, limits), decode(refitted, fitted, limits)
    old_error = (weight * (value - grouped).square()).sum(2, keepdim=True)
    new_error = (weight * (new_value - grouped).square()).sum(2, keepdim=True)
    better = new_error < old_error
    value = torch.where(better, new_value, value)
    nearest = torch.where(better, refitted, nearest)
    return nearest.view_as(target), torch.where(better, fitted, steps).squeeze(2), value.view_as(target)
