"""Steps and codes: the mid-rise grid, its step search, and rounding with spectral error feedback (method.md section 5).

Grid: ``value = step * (2 * code - (2**b - 1))``; the step is half the distance between grid points and is stored in
fp16, so every function here rounds it to fp16 before it is used.
"""

import torch

from .planes import levels

_FP16_MIN, _FP16_MAX = 2.0**-24, 65504.0

#: Columns of a block inside which feedback runs one by one; between blocks it is one batched product.
_FEEDBACK_BLOCK = 32


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
    w: torch.Tensor, weight: torch.Tensor, width: int, candidates: int = 16
) -> tuple[torch.Tensor, torch.Tensor]:
    """Step of least weighted squared error per group, and that error.

    Tries ``candidates`` steps from the one that covers the largest weight downwards, then refines the best by one
    weighted least-squares fit to its own codes.

    Args:
        w: float32 ``[..., n, g, r]``: groups run along dimension -2.
        weight: broadcastable to ``w``, ≥ 0: importance of each element.
        width: bits, > 0.

    Returns:
        (step ``[..., n, 1, r]`` storable, error ``[..., n, r]``), float32.
    """
    if candidates < 1:
        raise ValueError(f"candidates must be at least 1, got {candidates}")
    level = levels(width)
    covering = w.abs().amax(-2, keepdim=True) / level
    # with one or two bits the best step lies far below the covering one, with many bits just below
    lowest = {1: 0.2, 2: 0.25, 3: 0.35}.get(width, 0.5)
    step = to_step(covering)
    error = _group_error(w, weight, step, level)

    def keep_better(trial: torch.Tensor) -> None:
        nonlocal step, error
        trial_error = _group_error(w, weight, trial, level)
        better = trial_error < error
        step, error = torch.where(better, trial, step), torch.where(better, trial_error, error)

    for factor in torch.linspace(1.0, lowest, candidates)[1:].tolist():
        keep_better(to_step(covering * factor))
    grid = encode(w, step, level) * 2 - level
    weighted = grid * weight
    fitted = (weighted * w).sum(-2, keepdim=True) / (weighted * grid).sum(-2, keepdim=True).clamp_min(1e-30)
    keep_better(to_step(fitted))
    return step, error.squeeze(-2)


def _group_error(w: torch.Tensor, weight: torch.Tensor, step: torch.Tensor, level: int) -> torch.Tensor:
    rest = decode(encode(w, step, level), step, level).sub_(w)
    return rest.square_().mul_(weight).sum(-2, keepdim=True)


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
    factor = factor.flip((-2, -1))
    return factor / factor.diagonal(dim1=-2, dim2=-1)[:, None, :]


def round_with_feedback(
    w: torch.Tensor,
    moment: torch.Tensor,
    step: torch.Tensor,
    level: torch.Tensor,
    order: torch.Tensor,
    dampening: float,
) -> torch.Tensor:
    """Round the columns of a batch of matrices in order, each absorbing the errors of those before it.

    Args:
        w: float32 ``[N, m, n]``.
        moment: float32 ``[N, n, n]``, second moment of the inputs of the columns.
        step: float32 ``[N, m, n]`` storable steps.
        level: float32 ``[N, m, n]``, ``2**b - 1``; 0 drops the weight, whose whole value is then absorbed.
        order: int64 ``[N, n]``, columns in order of rounding.
        dampening: fraction of the mean diagonal added to the moment.

    Returns:
        float32 codes ``[N, m, n]`` in the original column order.
    """
    columns = order[:, None, :].expand_as(w)
    w, step, level = (tensor.gather(2, columns) for tensor in (w, step, level))
    n = w.shape[2]
    moment = moment.gather(1, order[:, :, None].expand_as(moment)).gather(2, order[:, None, :].expand_as(moment))
    factor = feedback_factor(moment, dampening)
    codes, error = torch.empty_like(w), torch.empty_like(w)
    for start in range(0, n, _FEEDBACK_BLOCK):
        stop = min(start + _FEEDBACK_BLOCK, n)
        target = w[:, :, start:stop].clone()
        if start:
            target.baddbmm_(error[:, :, :start], factor[:, :start, start:stop])
        for k in range(stop - start):
            at = start + k
            code = encode(target[:, :, k], step[:, :, at], level[:, :, at])
            codes[:, :, at] = code
            # the error that later columns absorb is measured against the original weight
            error[:, :, at] = w[:, :, at] - decode(code, step[:, :, at], level[:, :, at])
            if at + 1 < stop:
                target[:, :, k + 1 :].addcmul_(error[:, :, at, None], factor[:, at, None, at + 1 : stop])
    return torch.empty_like(codes).scatter_(2, columns, codes)
