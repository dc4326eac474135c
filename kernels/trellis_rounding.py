"""Rounding of a block of columns to trellis codes in one launch, a program of one warp per run of sequences.

What a column changes moves the targets of those after it row by row, and of the rows only those of one sequence
interact. So a group of rows of one matrix (gate, up), or the rows of one chain (down), goes through all columns of a
block without waiting for another: for each it moves the target, finds the step (gate, up), encodes the sequence
(`trellis_encoder`), refits, and keeps windows from before where the new ones are no better. In PyTorch that takes some
forty launches per column, and several waits for the GPU. The oracle is `rounding.round_block` in PyTorch.

A sequence's targets and gains pass through memory: from the order of the rows, in which all else is read and written,
to that of the stream.
"""

from collections.abc import Iterable
from functools import cache

import torch
import triton
import triton.language as tl

from bitsmoe_modifier.method.trellis import NORMAL_STEP
from bitsmoe_modifier.method.viterbi import PRELUDE
from bitsmoe_modifier.storage.steps import GREATEST_STEP, LEAST_STEP
from bitsmoe_modifier.storage.trellis import value_tables

from .launch import Launch
from .launcher import run
from .rounding import _divide, _storable
from .trellis_encoder import encode_sequence

#: A warp for a sequence. Without a bound the compiler for sm_80 aims for 168 registers and spills.
HOW = Launch(warps=1, stages=1, pack=0, registers=240)

#: Below it, sums of weights are taken for it.
_TINY = tl.constexpr(1e-30)
_LEAST, _MOST = tl.constexpr(LEAST_STEP), tl.constexpr(GREATEST_STEP)

_STRIDES = ("target_n", "target_k", "response_n", "response_k", "reference_n", "reference_k", "step_n", "step_k")
_STRIDES += ("level_n", "level_k", "before_n", "before_k", "out_n", "out_k")
#: Numbers for whose special values no kernel is compiled apart.
_NUMBERS = ("B", "m", "groups", "steps", "has_before", *_STRIDES, "weight_n", "step_out_n", "step_out_k")


@triton.jit
def _moved(target, response, change, c, response_k, change_k, row, here):
    """Targets of column c after the changes of those before it; target, response: pointers to the column's."""
    moved = tl.load(target + row, mask=here, other=0.0)
    for j in tl.range(c):
        moved -= tl.load(response + j * response_k) * tl.load(change + j * change_k + row, mask=here, other=0.0)
    return moved


@triton.jit
def _encoded(u, g, out, branches, length, width, tables_ptr, WIDTHS: tl.constexpr, PRELUDES: tl.constexpr):
    """`encode_sequence` for a width of WIDTHS that is known at run time."""
    tl.debug_barrier()  # threads read what others stored
    for i in tl.static_range(len(WIDTHS)):
        if width == WIDTHS[i]:
            encode_sequence(u, g, out, branches, length, tables_ptr + 256 * WIDTHS[i], WIDTHS[i], PRELUDES[i])


@triton.jit
def _fitted(w, weight, grid, step):
    """`trellis._fitted` of one sequence."""
    weighted = weight * grid
    scale, slope = tl.sum(weighted * grid, 0), tl.sum(weighted * w, 0)
    fitted = _storable(_divide(slope, tl.maximum(scale, _TINY)), _LEAST, _MOST)
    return tl.where((scale > 0) & (slope > 0), fitted, step)


@triton.jit
def _error(w, weight, value):
    rest = w - value
    return tl.sum(weight * (rest * rest), 0)


@triton.jit(do_not_specialize=_NUMBERS)
def round_groups_kernel(
    target_ptr, response_ptr, reference_ptr, step_ptr, level_ptr, weight_ptr, before_ptr,
    codes_ptr, step_out_ptr, change_ptr, tables_ptr, normal_ptr, aim_ptr, branches_ptr, windows_ptr,
    B, m, groups, steps, has_before,
    target_n, target_k, response_n, response_k, reference_n, reference_k, step_n, step_k,
    level_n, level_k, before_n, before_k, out_n, out_k, weight_n, step_out_n, step_out_k,
    TILE: tl.constexpr, WEIGHTED: tl.constexpr, WIDTHS: tl.constexpr, PRELUDES: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Program (group, matrix) of gate or up; arguments as in `rounding.round_block`, with their strides.

    codes, step_out and change hold what columns of width 0 get. tables float32 [9, 256], normal float32 [9]: by width.
    Of each program: aim float32 [2, TILE], branches uint8 [steps, STATES], windows uint8 [TILE].
    """
    n, group = tl.program_id(1).to(tl.int64), tl.program_id(0)
    number = n * groups + group
    u, out = aim_ptr + number * 2 * TILE, windows_ptr + number * TILE
    g, branches = u + TILE, branches_ptr + number * steps * STATES
    length = m // groups
    q = tl.arange(0, TILE)
    here = q < length
    row = group * length + q
    place = (q % 8) * (length // 8) + q // 8  # in the stream (`trellis.sequence_order`)
    if WEIGHTED:
        weight = tl.load(weight_ptr + n * weight_n + row, mask=here, other=0.0)
        weight = _divide(weight, tl.maximum(_divide(tl.sum(weight, 0), length.to(tl.float32)), _TINY))
    else:
        weight = tl.where(here, 1.0, 0.0)
    root = tl.sqrt_rn(weight)
    total = tl.maximum(tl.sum(weight, 0), _TINY)
    tl.store(g + place, root, mask=here)
    for c in tl.range(B):
        level = tl.load(level_ptr + n * level_n + c * level_k)
        if level > 0:
            width = ((level + 1).to(tl.int32, bitcast=True) >> 23) - 127
            values = tables_ptr + 256 * width
            response, change = response_ptr + n * response_n + c, change_ptr + n * out_n
            w = _moved(
                target_ptr + n * target_n + c * target_k, response, change, c, response_k, out_k, row, here
            )  # fmt: skip
            old_windows = tl.zeros((TILE,), tl.int32)
            old = tl.zeros((TILE,), tl.float32)
            if has_before:
                old_windows = tl.load(before_ptr + n * before_n + c * before_k + row, mask=here, other=0.0).to(tl.int32)
                old = tl.load(values + old_windows, mask=here, other=0.0)
                start = _fitted(w, weight, old, tl.load(step_ptr + n * step_n + c * step_k + group))
            else:
                rms = tl.sqrt_rn(_divide(tl.sum(w * w * weight, 0), total))
                start = _storable(rms * tl.load(normal_ptr + width), _LEAST, _MOST)
            tl.store(u + place, _divide(root * w, start), mask=here)
            _encoded(u, g, out, branches, length, width, tables_ptr, WIDTHS, PRELUDES)
            windows = tl.load(out + place, mask=here, other=0).to(tl.int32)
            grid = tl.load(values + windows, mask=here, other=0.0)
            # the windows were found for the step before the fit, and a step is coarse
            step = _fitted(w, weight, grid, start)
            step = tl.where(_error(w, weight, grid * step) < _error(w, weight, grid * start), step, start)
            if has_before:
                kept = _error(w, weight, grid * step) >= _error(w, weight, old * start)
                step = tl.where(kept, start, step)
                windows, grid = tl.where(kept, old_windows, windows), tl.where(kept, old, grid)
            reference = tl.load(reference_ptr + n * reference_n + c * reference_k + row, mask=here, other=0.0)
            tl.store(step_out_ptr + n * step_out_n + c * step_out_k + group, step)
            tl.store(codes_ptr + n * out_n + c * out_k + row, windows.to(tl.float32), mask=here)
            tl.store(change + c * out_k + row, grid * step - reference, mask=here)
            tl.debug_barrier()  # the next column reads it


@triton.jit(do_not_specialize=_NUMBERS)
def round_chains_kernel(
    target_ptr, response_ptr, reference_ptr, step_ptr, gain_ptr, before_ptr,
    codes_ptr, change_ptr, begin_ptr, place_ptr, width_ptr, tables_ptr, aim_ptr, branches_ptr, windows_ptr,
    B, m, steps, has_before,
    target_n, target_k, response_n, response_k, reference_n, reference_k, step_n, step_k,
    before_n, before_k, out_n, out_k,
    TILE: tl.constexpr, WIDTHS: tl.constexpr, PRELUDES: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Program (chain) of down; arguments as in `rounding.round_block`, with their strides, a step for every row.

    gain float32 [m]: roots of what an error of each row does. begin int64 [chains + 1], place int64, width int32
    [chains]: `viterbi.Sequences` of the rows of all matrices. The others as in `round_groups_kernel`.
    """
    s = tl.program_id(0).to(tl.int64)
    u, out = aim_ptr + s * 2 * TILE, windows_ptr + s * TILE
    g, branches = u + TILE, branches_ptr + s * steps * STATES
    begin, width = tl.load(begin_ptr + s), tl.load(width_ptr + s)
    length = (tl.load(begin_ptr + s + 1) - begin).to(tl.int32)
    q = tl.arange(0, TILE)
    here = q < length
    place = (q % 8) * (length // 8) + q // 8
    n = tl.load(place_ptr + begin) // m
    row = (tl.load(place_ptr + begin + place, mask=here, other=0) - n * m).to(tl.int32)
    gain = tl.load(gain_ptr + row, mask=here, other=0.0)
    values = tables_ptr + 256 * width
    for c in tl.range(B):
        response, change = response_ptr + n * response_n + c, change_ptr + n * out_n
        w = _moved(target_ptr + n * target_n + c * target_k, response, change, c, response_k, out_k, row, here)
        step = tl.load(step_ptr + n * step_n + c * step_k + row, mask=here, other=1.0)
        # in units of each direction's step, scaled so that a sequence's weights have mean 1
        root = gain * step
        mean = _divide(tl.sum(root * root, 0), length.to(tl.float32))
        root *= _divide(1.0, tl.sqrt_rn(tl.maximum(mean, _TINY)))
        aim = _divide(root * w, step)
        tl.store(u + place, aim, mask=here)
        tl.store(g + place, root, mask=here)
        _encoded(u, g, out, branches, length, width, tables_ptr, WIDTHS, PRELUDES)
        windows = tl.load(out + place, mask=here, other=0).to(tl.int32)
        grid = tl.load(values + windows, mask=here, other=0.0)
        if has_before:
            old_windows = tl.load(before_ptr + n * before_n + c * before_k + row, mask=here, other=0.0).to(tl.int32)
            old = tl.load(values + old_windows, mask=here, other=0.0)
            better = _error(aim, 1.0, root * grid) < _error(aim, 1.0, root * old)
            windows, grid = tl.where(better, windows, old_windows), tl.where(better, grid, old)
        reference = tl.load(reference_ptr + n * reference_n + c * reference_k + row, mask=here, other=0.0)
        tl.store(codes_ptr + n * out_n + c * out_k + row, windows.to(tl.float32), mask=here)
        tl.store(change + c * out_k + row, grid * step - reference, mask=here)
        tl.debug_barrier()  # the next column reads it


# ------------------------------------------------------------------------------------------------------- launching


@cache
@torch.inference_mode(False)
def _normal_steps(device: torch.device) -> torch.Tensor:
    """`NORMAL_STEP` by width, float32 ``[9]``."""
    return torch.tensor([NORMAL_STEP.get(width, 0.0) for width in range(9)], device=device)


def constants_of(widths: Iterable[int], longest: int) -> dict[str, object]:
    """What both kernels are compiled for.

    Args:
        widths: that occur, 0 among them or not.
        longest: weights of a sequence at most.
    """
    known = tuple(sorted({int(width) for width in widths} - {0}))
    return {
        "TILE": _tile(longest),
        "WIDTHS": known,
        "PRELUDES": tuple(PRELUDE[width] for width in known),
        "STATES": _states(known),
    }


def _tile(longest: int) -> int:
    return max(32, triton.next_power_of_2(longest))


def _states(widths: Iterable[int]) -> int:
    """States at the least of the widths > 0."""
    return 256 >> min((width for width in widths if width), default=8)


def _scratch(
    programs: int, longest: int, widths: Iterable[int], device: torch.device
) -> tuple[int, tuple[torch.Tensor, ...]]:
    """Weights that branches are kept for, and what programs keep in memory: aim, branches, windows."""
    steps, tile = max(longest, 2 * min(max(PRELUDE.values()), longest)), _tile(longest)
    return steps, (
        torch.empty(programs * 2 * tile, dtype=torch.float32, device=device),
        torch.empty(programs * steps * _states(widths), dtype=torch.uint8, device=device),
        torch.empty(programs * tile, dtype=torch.uint8, device=device),
    )


def round_groups(
    target: torch.Tensor,
    response: torch.Tensor,
    reference: torch.Tensor,
    step: torch.Tensor,
    level: torch.Tensor,
    row_weight: torch.Tensor | None,
    windows: torch.Tensor | None,
    widths: Iterable[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`rounding.round_block` with `trellis.GroupTrellis`, in one launch; ``target`` stays as it is.

    Arguments may be slices: their last dimension must be contiguous.

    Args:
        target, response, reference, step, level, row_weight: float32, as there; windows: its ``codes``.
        widths: all that may occur.
    """
    count, columns, rows = target.shape
    groups, device = step.shape[2], target.device
    widths, length = tuple(widths), rows // groups
    steps, scratch = _scratch(count * groups, length, widths, device)
    found, change = torch.zeros(target.shape, dtype=torch.float32, device=device), (-reference).contiguous()
    new_step = step.clone(memory_format=torch.contiguous_format)
    before, weight = reference if windows is None else windows, step if row_weight is None else row_weight
    run(
        round_groups_kernel,
        (groups, count),
        (
            target, response, reference, step, level, weight, before, found, new_step, change,
            value_tables(device), _normal_steps(device), *scratch,
            columns, rows, groups, steps, int(windows is not None),
            *target.stride()[:2], *response.stride()[:2], *reference.stride()[:2], *step.stride()[:2],
            *level.stride()[:2], *before.stride()[:2], *found.stride()[:2], weight.stride(0), *new_step.stride()[:2],
        ),
        HOW,
        device,
        {**constants_of(widths, length), "WEIGHTED": row_weight is not None},
    )  # fmt: skip
    return found, new_step, change


def round_chains(
    target: torch.Tensor,
    response: torch.Tensor,
    reference: torch.Tensor,
    step: torch.Tensor,
    windows: torch.Tensor | None,
    gain: torch.Tensor,
    chains: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    widths: Iterable[int],
    longest: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`rounding.round_block` with `trellis.ChainTrellis`, in one launch; ``target`` stays as it is.

    Args:
        target, response, reference, step: float32, as there, slices whose last dimension is contiguous.
        windows: its ``codes``.
        gain: float32 ``[m]``: roots of what an error of each row does.
        chains: begin, place and width of `viterbi.Sequences`, on the GPU.
        widths: all that occur among them.
        longest: weights of a chain at most.
    """
    device, (columns, rows), count = target.device, target.shape[1:], len(chains[2])
    found, change = torch.zeros(target.shape, dtype=torch.float32, device=device), (-reference).contiguous()
    if count:
        widths = tuple(widths)
        steps, scratch = _scratch(count, longest, widths, device)
        before = reference if windows is None else windows
        run(
            round_chains_kernel,
            (count,),
            (
                target, response, reference, step, gain, before, found, change, *chains, value_tables(device), *scratch,
                columns, rows, steps, int(windows is not None),
                *target.stride()[:2], *response.stride()[:2], *reference.stride()[:2], *step.stride()[:2],
                *before.stride()[:2], *found.stride()[:2],
            ),
            HOW,
            device,
            constants_of(widths, longest),
        )  # fmt: skip
    return found, step.clone(), change
