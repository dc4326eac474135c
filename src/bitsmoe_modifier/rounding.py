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
    count, m, n = w.shape
    turn = order[:, :, None]
    w = w.mT.gather(1, turn.expand(-1, -1, m))
    step = step.mT.gather(1, turn.expand(-1, -1, step.shape[1]))
    level = level.expand(count, -1, -1).mT
    level = level.gather(1, turn.expand(-1, -1, level.shape[2])) if level.shape[1] == n else level.expand(-1, n, -1)
    moment = moment.gather(1, turn.expand_as(moment)).gather(2, order[:, None, :].expand_as(moment))
    factor = feedback_factor(moment, dampening)
    codes, error, kept = torch.zeros_like(w), torch.empty_like(w), _kept(level)
    for start in range(0, n, _COLUMN_BLOCK):
        stop = min(start + _COLUMN_BLOCK, n)
        target = w[:, start:stop].clone()
        if start:
            target.baddbmm_(factor[:, :start, start:stop].mT, error[:, :start])
        for at in range(start, stop):
            column = target[:, at - start]
            # the error that later columns absorb is measured against the original weight
            if kept[at]:
                codes[:, at], step[:, at], value = _round_column(column, step[:, at], level[:, at], row_weight)
                error[:, at] = w[:, at] - value
            else:
                error[:, at] = w[:, at]
            if at + 1 < stop:
                target[:, at + 1 - start :].addcmul_(factor[:, at, at + 1 : stop, None], error[:, at, None])
    return (
        torch.empty_like(codes).scatter_(1, turn.expand_as(codes), codes).mT,
        torch.empty_like(step).scatter_(1, turn.expand_as(step), step).mT,
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
    count, m, n = w.shape
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    damping = dampening * diagonal.mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
    damped = moment + damping[:, None, None] * torch.eye(n, device=moment.device)
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    codes, step = (t.mT.clone(memory_format=torch.contiguous_format) for t in (codes, step))
    level = level.expand(count, -1, -1).mT.expand(-1, n, -1)
    kept = _kept(level)
    value = decode(codes, step.repeat_interleave(m // step.shape[2], dim=2), level)
    # H (W - Q)ᵀ: minus half the objective's slope in Qᵀ
    pull = torch.bmm(damped, w.mT - value)
    for start in range(0, n, _COLUMN_BLOCK):
        stop = min(start + _COLUMN_BLOCK, n)
        change = torch.zeros_like(pull[:, start:stop])
        for at in range(start, stop):
            if not kept[at]:
                continue
            target = value[:, at] + pull[:, at] / diagonal[:, at, None]
            codes[:, at], step[:, at], new = _round_column(target, step[:, at], level[:, at], row_weight, codes[:, at])
            moved = torch.sub(new, value[:, at], out=change[:, at - start])
            if at + 1 < stop:
                pull[:, at + 1 : stop].addcmul_(damped[:, at, at + 1 : stop, None], moved[:, None], value=-1)
        if stop < n:
            pull[:, stop:].baddbmm_(damped[:, stop:, start:stop], change, alpha=-1)
    return codes.mT, step.mT


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


def _kept(level: torch.Tensor) -> list[bool]:
    """Which columns any matrix keeps, of ``level [N, n, m]`` or ``[N, n, 1]``."""
    return (level.amax((0, 2)) > 0).tolist()


def _round_column(
    target: torch.Tensor,
    step: torch.Tensor,
    level: torch.Tensor,
    row_weight: torch.Tensor | None,
    codes: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, steps and values of one column.

    Args:
        target: ``[N, m]``; step: ``[N, groups]``; level: ``[N, m]`` or ``[N, 1]``.
        row_weight: ``[N, m]``: refit the steps, keeping of old and new what has the lower weighted error.
        codes: ``[N, m]`` codes from before, for the refit; None takes the nearest.
    """
    shape = (*step.shape, -1)
    grouped, steps = target.reshape(shape), step[:, :, None]
    limits = level[:, :, None] if level.shape[1] == 1 else level.reshape(shape)
    if row_weight is None:
        nearest = encode(grouped, steps, limits)
    else:
        weight = row_weight.reshape(shape)
        nearest, error = _nearest(grouped, steps, limits, weight)
        grid = (nearest if codes is None else codes.reshape(shape)) * 2 - limits
        weighted = weight * grid
        scale = grid.mul_(weighted).sum(2, keepdim=True)
        fitted = weighted.mul_(grouped).sum(2, keepdim=True) / scale.clamp_min(1e-30)
        fitted = torch.where(scale > 0, to_step(fitted), steps)
        refitted, new_error = _nearest(grouped, fitted, limits, weight)
        better = new_error < error
        nearest, steps = torch.where(better, refitted, nearest), torch.where(better, fitted, steps)
    value = decode(nearest, steps, limits)
    return nearest.view_as(target), steps.squeeze(2), value.view_as(target)


def _nearest(
    w: torch.Tensor, step: torch.Tensor, level: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`encode` along the last dimension, and the weighted squared error of the whole of it, ``[..., 1]``."""
    position = torch.addcmul(level * 0.5, w, 0.5 / step)
    codes = torch.minimum(position.round().clamp_min_(0), level)
    rest = position.sub_(codes).square_().mul_(weight)
    return codes, rest.sum(-1, keepdim=True) * (4 * step.square())
