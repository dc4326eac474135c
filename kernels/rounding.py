"""Rounding of a block of columns in one launch: the inner loop of error feedback and refinement.

The columns of a block are rounded one after another, each to a target that the changes of those before it moved. Rows
do not interact, except that the rows of a group share a step: a program takes the rows of one group (or any 128, where
steps are kept) and goes through the columns with its targets in registers. In PyTorch the same takes some twenty
launches per column.
"""

import torch
import triton
import triton.language as tl

from bitsmoe_modifier.storage.steps import GREATEST_STEP, LEAST_STEP

from .launch import NO_FUSION, Launch
from .launcher import run

#: Rows of a program where steps are kept.
_ROWS = 128


@triton.jit
def _divide(a, b):
    """a / b, rounded once: what `/` is for float64 only."""
    return a / b if b.dtype.scalar == tl.float64 else tl.div_rn(a, b)


@triton.jit
def _storable(step, LEAST: tl.constexpr, MOST: tl.constexpr):
    """`storable_steps`."""
    bits = tl.minimum(tl.maximum(step.to(tl.float32), LEAST), MOST).to(tl.int32, bitcast=True)
    kept = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -1048576
    return tl.minimum(kept.to(tl.float32, bitcast=True), MOST)


@triton.jit
def _nearest(target, step, level, BIG: tl.constexpr):
    """Nearest codes, and how far in codes the target lies from them. Adding and subtracting BIG rounds half to even."""
    position = level * 0.5 + target * _divide(0.5, step)
    code = tl.minimum(tl.maximum(position, 0.0), level)
    code = (code + BIG) - BIG
    return code, position - code


@triton.jit
def round_block_kernel(
    target_ptr, response_ptr, reference_ptr, step_ptr, level_ptr, weight_ptr, before_ptr,
    codes_ptr, step_out_ptr, change_ptr,
    B, m, groups,
    target_n, target_k, response_n, response_k, reference_n, reference_k, step_n, step_k,
    level_n, level_k, level_r, weight_n, before_n, before_k, out_n, out_k, step_out_n, step_out_k,
    TILE: tl.constexpr, BLOCK: tl.constexpr, REFIT: tl.constexpr, HAS_BEFORE: tl.constexpr, BIG: tl.constexpr,
    LEAST: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Program (rows, matrix); arguments as in `rounding.round_block`, with their strides over matrices and columns.

    REFIT: the rows are one group. Otherwise they are TILE rows, and their steps stay.
    """
    n = tl.program_id(1).to(tl.int64)
    size = m // groups
    r = tl.arange(0, TILE)
    row = tl.program_id(0) * size + r if REFIT else tl.program_id(0) * TILE + r
    here = r < size if REFIT else row < m
    group = tl.program_id(0) if REFIT else row // size
    k = tl.arange(0, BLOCK)
    target = tl.load(
        target_ptr + n * target_n + k[:, None] * target_k + row[None, :],
        mask=(k < B)[:, None] & here[None, :], other=0.0,
    )  # fmt: skip
    if REFIT:
        weight = tl.load(weight_ptr + n * weight_n + row, mask=here, other=0.0)
    for c in range(B):
        column = tl.sum(tl.where((k == c)[:, None], target, 0.0), 0)
        reference = tl.load(reference_ptr + n * reference_n + c * reference_k + row, mask=here, other=0.0)
        level = tl.load(level_ptr + n * level_n + c * level_k + row * level_r, mask=here, other=0.0)
        if REFIT:
            step = tl.load(step_ptr + n * step_n + c * step_k + group)
            code, rest = _nearest(column, step, level, BIG)
            error = tl.sum(rest * rest * weight, 0) * (4 * step * step)
            if HAS_BEFORE:
                fitted_to = tl.load(before_ptr + n * before_n + c * before_k + row, mask=here, other=0.0)
            else:
                fitted_to = code
            grid = fitted_to * 2 - level
            weighted = weight * grid
            scale = tl.sum(grid * weighted, 0)
            fitted = _divide(tl.sum(weighted * column, 0), tl.maximum(scale, 1e-30))
            fitted = _storable(fitted, LEAST, MOST).to(step.dtype)
            fitted = tl.where(scale > 0, fitted, step)
            refitted, rest = _nearest(column, fitted, level, BIG)
            better = tl.sum(rest * rest * weight, 0) * (4 * fitted * fitted) < error
            code = tl.where(better, refitted, code)
            step = tl.where(better, fitted, step)
            tl.store(step_out_ptr + n * step_out_n + c * step_out_k + group, step)
        else:
            step = tl.load(step_ptr + n * step_n + c * step_k + group, mask=here, other=1.0)
            code, _ = _nearest(column, step, level, BIG)
        change = step * (code * 2 - level) - reference
        out = n * out_n + c * out_k + row
        tl.store(codes_ptr + out, code, mask=here)
        tl.store(change_ptr + out, change, mask=here)
        response = tl.load(response_ptr + n * response_n + c * response_k + k, mask=(k > c) & (k < B), other=0.0)
        target -= response[:, None] * change[None, :]


def constants_of(columns: int, group: int | None, before: bool, dtype: torch.dtype) -> dict[str, object]:
    """What `round_block_kernel` is compiled for.

    Args:
        columns: of the block.
        group: rows that share a step which is refitted; None where steps are kept.
        before: codes to refit to are given.
        dtype: of the weights.
    """
    tile = _ROWS if group is None else triton.next_power_of_2(group)
    return {
        "TILE": max(16, tile),
        "BLOCK": max(16, triton.next_power_of_2(columns)),
        "REFIT": group is not None,
        "HAS_BEFORE": before,
        "BIG": 1.5 / torch.finfo(dtype).eps,
        "LEAST": LEAST_STEP,
        "MOST": GREATEST_STEP,
    }


def round_block(
    target: torch.Tensor,
    response: torch.Tensor,
    reference: torch.Tensor,
    step: torch.Tensor,
    level: torch.Tensor,
    row_weight: torch.Tensor | None = None,
    codes: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`rounding.round_block`, its oracle, in one launch: same arguments and results; ``target`` stays as it is.

    Arguments may be slices: their last dimension must be contiguous, that of ``level`` may be expanded.
    """
    count, columns, rows = target.shape
    groups = step.shape[2]
    found, change = (torch.empty(target.shape, dtype=target.dtype, device=target.device) for _ in range(2))
    refit = row_weight is not None
    new_step = torch.empty(step.shape, dtype=step.dtype, device=step.device) if refit else step.clone()
    constants = constants_of(columns, rows // groups if refit else None, codes is not None, target.dtype)
    weight = step if row_weight is None else row_weight
    before = reference if codes is None else codes
    run(
        round_block_kernel,
        (groups if refit else triton.cdiv(rows, _ROWS), count),
        (
            target, response, reference, step, level, weight, before, found, new_step, change, columns, rows, groups,
            *target.stride()[:2], *response.stride()[:2], *reference.stride()[:2], *step.stride()[:2],
            *level.stride()[:2], level.stride(2) if level.shape[2] > 1 else 0, weight.stride(0), *before.stride()[:2],
            *found.stride()[:2], *new_step.stride()[:2],
        ),
        Launch(warps=4, stages=1, pack=0),
        target.device,
        constants,
        NO_FUSION,
    )  # fmt: skip
    return found, new_step, change
