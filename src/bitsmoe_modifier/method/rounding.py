"""Steps and codes: the mid-rise grid, its step search, and rounding with spectral error feedback (method.md section 5).

`round_with_feedback` goes through the columns once, each absorbing the errors of those before it; `refine` then lets
every column absorb the errors of all others, and refits the steps, as long as asked. Both work on a batch of matrices
(all experts of a layer); the only loops are over columns.

Grid: ``value = step * (2 * code - (2**b - 1))``; the step is half the distance between grid points and is stored in a
byte (storage/steps.py), so every function here rounds it to what a byte can hold before it is used.
"""

from collections.abc import Callable

import torch

from ..devices import kernels_wanted
from ..errors import CalibrationError
from ..storage.planes import levels
from ..storage.steps import storable_steps
from .coders import ColumnCoder
from .numerics import all_finite, note

#: Columns of a block inside which rounding runs one by one; between blocks it is one batched product.
_COLUMN_BLOCK = 32

#: Best half-step of the mid-rise grid for a standard normal variable, by width (found numerically).
_NORMAL_STEP = {1: 0.798, 2: 0.498, 3: 0.293, 4: 0.1677, 6: 0.0519, 8: 0.0155}
#: Where the search ends for coarse grids, relative to its start; finer ones go up to the covering step.
_COARSE_SPAN = {1: 1.8, 2: 2.2}


def encode(w: torch.Tensor, step: torch.Tensor, level: torch.Tensor | int) -> torch.Tensor:
    """Nearest code of each weight, as float: ``clamp(round((w / step + level) / 2), 0, level)``.

    ``step`` and ``level = 2**b - 1`` broadcast against ``w``; at level 0 (a dropped weight) the code is 0.
    """
    codes = (w / step + level).mul_(0.5).round_().clamp_min_(0)
    return codes.clamp_max_(level) if isinstance(level, int) else torch.minimum(codes, level)


def decode(codes: torch.Tensor, step: torch.Tensor, level: torch.Tensor | int) -> torch.Tensor:
    """Value of float codes: ``step * (2 * code - level)``."""
    return (codes * 2 - level) * step


def search_step(
    w: torch.Tensor,
    weight: torch.Tensor,
    width: int,
    candidates: int = 8,
    storable: Callable[[torch.Tensor], torch.Tensor] = storable_steps,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Step of least weighted squared error per group, and that error.

    Tries ``candidates`` steps, spaced evenly in their logarithm, from below the best one for normally distributed
    weights up to the one that covers the largest weight, then one weighted least-squares fit to the best one's
    own codes.

    Args:
        w: float32 ``[..., n, g, r]``: groups run along dimension -2.
        weight: ``[..., n, g, 1]`` or broadcastable to it, ≥ 0: importance of each row of a group.
        width: bits, > 0.
        candidates: at least 2.
        storable: rounds steps to those that can be stored.

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
    step = storable(trial)
    error = _group_error(w, row, step, level)
    for attempt in range(candidates):
        if attempt == candidates - 1:
            grid = encode(w, step, level).mul_(2).sub_(level)
            fitted = (row @ (grid * w)) / (row @ grid.square()).clamp_min(1e-30)
        else:
            trial = trial * ratio
            fitted = trial
        rounded = storable(fitted)
        trial_error = _group_error(w, row, rounded, level)
        better = trial_error < error
        step, error = torch.where(better, rounded, step), torch.where(better, trial_error, error)
    return step, error.squeeze(-2)


def _group_error(w: torch.Tensor, row: torch.Tensor, step: torch.Tensor, level: int) -> torch.Tensor:
    """Weighted squared error per group ``[..., n, 1, r]``, in units of code distances until the end to save passes."""
    position = (w * (0.5 / step)).add_(level * 0.5)
    rest = position.round().clamp_(0, level).sub_(position)
    return (row @ rest.square_()) * (4 * step.square())


def damp_(moment: torch.Tensor, dampening: float) -> torch.Tensor:
    """Add ``dampening`` times the mean of its diagonal to the diagonal of every moment ``[N, n, n]``, in place."""
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    diagonal += dampening * diagonal.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return moment


def feedback_factor(moment: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Unit upper-triangular M with ``H = M D Mᵀ``, per batch entry, of moments H whose columns are put in order.

    With errors E = W - Q, ``tr(E H Eᵀ) = Σ_k D_k ‖(E M)_k‖²``: when column k is rounded after columns < k, its best
    target is ``w_k + Σ_{j<k} E_j M_jk``. This is GPTQ's update (OPTQ; LDLQ) without an inverse.

    Args:
        moment: float32 ``[N, n, n]`` symmetric, positive semidefinite, damped (`damp_`). Where that is not enough, more
            is added until the factorization exists.
        order: int64 ``[N, n]``, columns in order of rounding.

    Returns:
        float32 ``[N, n, n]``.

    Raises:
        CalibrationError: when a moment holds NaN or infinity.
    """
    factor = torch.empty_like(moment, memory_format=torch.contiguous_format)
    info = torch.stack([_factor(m, turn, out) for m, turn, out in zip(moment, order, factor, strict=True)])
    if bool(info.any()) and not bool(all_finite(moment)):
        raise CalibrationError("second moments of its experts overflow; check the base model and the calibration text")
    dampening = 1e-5
    while bool(info.any()):
        note(
            "second moments of its experts could not be factored, and more was added to their diagonals; calibrate "
            "with more text, or raise `dampening_frac`"
        )
        dampening *= 10
        for at in info.nonzero().flatten().tolist():
            info[at] = _factor(moment[at], order[at], factor[at], dampening)
    return factor


def _factor(moment: torch.Tensor, order: torch.Tensor, out: torch.Tensor, dampening: float = 0.0) -> torch.Tensor:
    """One matrix of `feedback_factor`, to ``out``; returns 0 where it exists. One at a time stays in a CPU's cache."""
    # Cholesky of the matrix with rows and columns reversed gives an upper factor of the matrix itself
    turn = order.flip(0)
    scaled = moment.index_select(0, turn).index_select(1, turn)
    diagonal = scaled.diagonal()
    scaled /= diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny)
    diagonal += dampening
    factor, info = torch.linalg.cholesky_ex(scaled)
    factor /= factor.diagonal().clone()
    out.copy_(factor.flip((0, 1)))
    return info


def round_with_feedback(
    w: torch.Tensor,
    factor: torch.Tensor,
    step: torch.Tensor,
    level: torch.Tensor,
    order: torch.Tensor,
    row_weight: torch.Tensor | None = None,
    coder: ColumnCoder | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round the columns of a batch of matrices in order, each absorbing the errors of those before it.

    Args:
        w: float32 ``[N, m, n]``.
        factor: float32 ``[N, n, n]``, the `feedback_factor` of the second moment of the columns' inputs in this order.
        step: float32 ``[N, groups, n]`` storable steps; a group is ``m / groups`` consecutive rows.
        level: float32 broadcastable to ``w``, ``2**b - 1``; 0 drops the weight, whose whole value is then absorbed.
        order: int64 ``[N, n]``, columns in order of rounding.
        row_weight: importance of the rows, ``[N, m]``: steps are refitted to what each column has to absorb. None keeps
            the steps.
        coder: of other codes than the grid's.

    Returns:
        (codes float32 ``[N, m, n]``, steps ``[N, groups, n]``) in the original column order.
    """
    count, m, n = w.shape
    turn = order[:, :, None]
    w = w.mT.gather(1, turn.expand(-1, -1, m))
    step = step.mT.gather(1, turn.expand(-1, -1, step.shape[1]))
    level = level.expand(count, -1, -1).mT
    level = level.gather(1, turn.expand(-1, -1, level.shape[2])) if level.shape[1] == n else level.expand(-1, n, -1)
    codes, change = torch.empty_like(w), torch.empty_like(w)
    for block in column_blocks(n):
        target = w[:, block].clone()
        if block.start:
            target.baddbmm_(factor[:, : block.start, block].mT, change[:, : block.start], alpha=-1)
        # what later columns absorb is measured against the original weight
        codes[:, block], step[:, block], change[:, block] = round_block(
            target, factor[:, block, block], w[:, block], step[:, block], level[:, block], row_weight, coder=coder
        )
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
    row_weight: torch.Tensor | None = None,
    coder: ColumnCoder | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One pass of coordinate descent on ``tr((W - Q) H (W - Q)ᵀ)``: every column absorbs the errors of all others.

    No column's change can raise the objective (with ``row_weight``, the objective weighted by it), so passes may be
    repeated.

    Args:
        moment: H, float32 ``[N, n, n]``, damped.
        codes, step: to start from, ``[N, m, n]`` and ``[N, groups, n]``.
        w, level, row_weight, coder: as in `round_with_feedback`.

    Returns:
        (codes float32 ``[N, m, n]``, steps ``[N, groups, n]``).
    """
    count, _, n = w.shape
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    codes, step = (t.mT.clone(memory_format=torch.contiguous_format) for t in (codes, step))
    level = level.expand(count, -1, -1).mT.expand(-1, n, -1)
    groups = step.shape[2]
    limits = level[..., None] if level.shape[2] == 1 else level.unflatten(2, (groups, -1))
    value = (grid_of(codes.unflatten(2, (groups, -1)), limits, coder) * step[..., None]).flatten(2)
    # H (W - Q)ᵀ: minus half the objective's slope in Qᵀ
    pull, change = torch.bmm(moment, w.mT - value), torch.empty_like(value)
    for block in column_blocks(n):
        target = pull[:, block]
        if block.start:
            target.baddbmm_(moment[:, block, : block.start], change[:, : block.start], alpha=-1)
        # the minimum of the quadratic in one column, all others as they are
        target.div_(diagonal[:, block, None]).add_(value[:, block])
        response = moment[:, block, block] / diagonal[:, None, block]
        codes[:, block], step[:, block], change[:, block] = round_block(
            target, response, value[:, block], step[:, block], level[:, block], row_weight, codes[:, block], coder
        )
    return codes.mT, step.mT


def column_blocks(columns: int, size: int = _COLUMN_BLOCK) -> list[slice]:
    """Consecutive blocks of ``size`` columns."""
    return [slice(at, min(at + size, columns)) for at in range(0, columns, size)]


def columns_at_once(w: torch.Tensor) -> int:
    """Columns to give `round_block` where none moves another: a block to the kernel, in PyTorch one by one."""
    return _COLUMN_BLOCK if _on_kernels(w) else 1


def round_block(
    target: torch.Tensor,
    response: torch.Tensor,
    reference: torch.Tensor,
    step: torch.Tensor,
    level: torch.Tensor,
    row_weight: torch.Tensor | None = None,
    codes: torch.Tensor | None = None,
    coder: ColumnCoder | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round a few columns one after another; what one changes moves the targets of those after it.

    Args:
        target: float32 ``[N, B, m]``, what each of the columns is to be rounded to if none before it changes; spent.
        response: ``[N, B, B]``: a change δ of column j moves the target of column k > j by ``-response_jk δ``.
        reference: ``[N, B, m]``: a column's change is its value minus this.
        step: ``[N, B, groups]``; level: ``[N, B, m]`` or ``[N, B, 1]``.
        row_weight: ``[N, m]`` or None, as in `round_with_feedback`.
        codes: ``[N, B, m]`` codes from before, which the steps are refitted to; None takes the nearest.
        coder: as in `round_with_feedback`.

    Returns:
        (codes ``[N, B, m]``, steps ``[N, B, groups]``, changes ``[N, B, m]``).
    """
    if _on_kernels(target):
        if coder is not None:
            return coder.block(target, response, reference, step, level, row_weight, codes)
        from bitsmoe_kernels.rounding import round_block as fused

        return fused(target, response, reference, step, level, row_weight, codes)
    found, step, change = torch.zeros_like(target), step.clone(), -reference
    round_column = _round_column if coder is None else coder.column
    kept = (level.amax((0, 2)) > 0).tolist()  # what every matrix drops needs no rounding
    for at, needed in enumerate(kept):
        if needed:
            column = target[:, at], step[:, at], level[:, at]
            before = None if codes is None else codes[:, at]
            found[:, at], step[:, at], value = round_column(*column, row_weight, before)
            change[:, at] += value
        target[:, at + 1 :].addcmul_(response[:, at, at + 1 :, None], change[:, at, None], value=-1)
    return found, step, change


def grid_of(codes: torch.Tensor, level: torch.Tensor, coder: ColumnCoder | None) -> torch.Tensor:
    """Values of float codes in units of the step."""
    return codes * 2 - level if coder is None else coder.grid(codes, level)


def refit_row_steps(
    w: torch.Tensor,
    moment: torch.Tensor,
    codes: torch.Tensor,
    step: torch.Tensor,
    level: torch.Tensor,
    coder: ColumnCoder | None = None,
) -> torch.Tensor:
    """Least-squares steps of groups of columns, given their codes, one group after another.

    Args:
        w, codes: float32 ``[N, m, n]``; moment ``[N, n, n]``, damped; level broadcastable to ``w``.
        step: float32 ``[N, m, groups]``: a group is ``n / groups`` consecutive columns of a row.
        coder: as in `round_with_feedback`.

    Returns:
        float32 ``[N, m, groups]``, storable; a step that would raise the row's objective is left as it was.
    """
    groups = step.shape[2]
    size = w.shape[2] // groups
    grid = grid_of(codes, level, coder)
    step = step.clone()
    rest = w - grid * step.repeat_interleave(size, dim=2)
    for group in range(groups):
        part = slice(group * size, (group + 1) * size)
        own = grid[:, :, part]
        slope = (own * torch.bmm(rest, moment[:, :, part])).sum(2)
        curvature = (own * torch.bmm(own, moment[:, part, part])).sum(2)
        old = step[:, :, group]
        new = storable_steps(old + slope / curvature.clamp_min(1e-30))
        # the objective changes by (new - old) * (curvature * (new - old) - 2 * slope)
        better = (new - old) * (curvature * (new - old) - 2 * slope) < 0
        new = torch.where(better, new, old)
        rest[:, :, part].addcmul_(own, (new - old)[:, :, None], value=-1)
        step[:, :, group] = new
    return step


def _on_kernels(target: torch.Tensor) -> bool:
    """Whether a block is rounded by the Triton kernel."""
    return target.dtype == torch.float32 and kernels_wanted(target)


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
        fitted = torch.where(scale > 0, storable_steps(fitted), steps)
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
