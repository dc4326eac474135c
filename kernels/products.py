"""The two products of a layer as custom operators, `gate_up` and `down`, of either family of codes.

Scalar and trellis codes have kernels of their own (`gate_up.py` and `down.py`, `trellis_gate_up.py` and
`trellis_down.py`), whose arguments differ in a few constants: here a kernel and its launch are chosen, and the rest is
one path.
"""

from dataclasses import replace

import torch
import triton

from .down import down_kernel
from .gate_up import gate_up_kernel
from .launch import (
    ROUND_WEIGHTS_IN,
    Launch,
    capability,
    even_splits,
    launch,
    launch_down,
    launch_trellis,
    launch_trellis_down,
    round_columns,
    spread,
)
from .launcher import run
from .trellis_down import trellis_down_kernel
from .trellis_gate_up import trellis_gate_up_kernel


def z_dtype(dtype: torch.dtype, trellis: bool) -> torch.dtype:
    """Of z, for activations of ``dtype``: products of trellis codes are float16 (float32 is the interpreter's)."""
    return torch.float16 if trellis and dtype != torch.float32 else dtype


def gate_up_launch(
    tile: int, columns: int, block: int, widths: tuple[int, ...], cc: int, trellis: bool, shared: bool, warps: int = 0
) -> tuple[triton.JITFunction, Launch, int]:
    """(kernel, launch, parts that its warps cut a unit's directions into) of gate_up.

    Args:
        tile: BM, pairs of a tile.
        columns: BN, of a program.
        block: directions of a unit.
        widths: that the kernel is compiled for.
        cc: `launch.capability`.
        trellis: the family of codes.
        shared: whether several programs share a tile.
        warps: of a program with trellis codes; 0: as `launch.launch_trellis` has them.
    """
    if trellis:
        how = launch_trellis(tile, columns, block, cc, warps or None)
        if tile <= 16:
            how = replace(how, columns=round_columns(columns, ROUND_WEIGHTS_IN))
        if shared and tile <= 8:  # five programs of two warps on a multiprocessor; not shared, it spills (Triton 3.6)
            how = replace(how, registers=200)
        return trellis_gate_up_kernel, how, how.warps
    how = launch(tile, columns, cc)
    return gate_up_kernel, how, spread(tile, block, how.warps, widths)


def down_launch(
    tile: int, rows: int, group: int, warps: int, cc: int, trellis: bool
) -> tuple[triton.JITFunction, Launch, int]:
    """(kernel, launch, parts that its warps cut a group's columns into) of down.

    Args:
        tile: BM, pairs of a tile.
        rows: BR, directions of a program.
        group: columns that share a step.
        warps: of a program with trellis codes; 0: as `launch.launch_trellis_down` has them.
        cc: `launch.capability`.
        trellis: the family of codes.
    """
    if trellis:
        how = launch_trellis_down(tile, rows, group, cc, warps or None)
        return trellis_down_kernel, how, how.warps
    return down_kernel, launch_down(tile, rows, cc), 1


def _staged(how: Launch, stages: int) -> Launch:
    """``how`` with so many stages; 0: as it is."""
    return replace(how, stages=stages or how.stages)


@torch.library.custom_op("bitsmoe::gate_up", mutates_args=("arrivals",))
def gate_up(
    h: torch.Tensor,
    tiles: torch.Tensor,
    pairs: torch.Tensor,
    arrivals: torch.Tensor,
    factor: list[torch.Tensor],
    bias: torch.Tensor | None,
    widths: list[int],
    gain: float,
    trellis: bool,
    top_k: int,
    block_size: int,
    group_size: int,
    columns: int,
    pair_tile: int,
    bn: int,
    parts: int,
    swap: bool,
    activation: str,
    limit: float | None,
    alpha: float,
    up_shift: float,
    stages: int = 0,
    warps: int = 0,
) -> torch.Tensor:
    """z ``[T k, I]`` of `z_dtype`, with trellis codes a sixteenth of it; rows of pairs whose id is outside ``[0, E)``
    are not written.

    Args:
        h: ``[T, R]`` contiguous.
        tiles: from `routing.route`, likewise pairs.
        pairs: see ``tiles``.
        arrivals: int32 zeros, ``tiles * I / bn`` where parts > 1; not zeros afterwards.
        factor: codes, steps, head and order of the input side (`PreparedSide.factor`).
        bias: ``[E, 2 I]`` or None.
        widths: of `PreparedSide`, likewise gain.
        gain: see ``widths``.
        trellis: the family of codes.
        top_k: k.
        block_size: directions of a unit.
        group_size: columns that share a step.
        columns: I.
        pair_tile: BM: the ``tile`` given to `route`.
        bn: columns of a program, likewise parts (`launch.gate_up_tile`).
        parts: programs that share a tile: 1, 2, 4, 8 or 16.
        swap: z's columns in the order that `down` takes (`launch.swaps`); not with trellis codes.
        activation: with limit, alpha and up_shift the fields of `Gating`.
        stages: of the pipeline; 0: by the rules of `launch`.
        warps: of a program with trellis codes; 0: by the rules of `launch`.
    """
    count, device = pairs.numel(), h.device
    z = torch.empty(count, columns, dtype=z_dtype(h.dtype, trellis), device=device)
    if not count:
        return z
    shared, (codes, *rest) = parts > 1, factor
    part = torch.empty(parts // 2, count, 2, columns, dtype=torch.float32, device=device) if shared else None
    kernel, how, share = gate_up_launch(
        pair_tile, bn, block_size, tuple(widths), capability(device), trellis, shared, warps
    )
    gain = 1.0 if h.dtype == torch.bfloat16 and not trellis else gain
    run(
        kernel,
        (tiles.shape[0], columns // bn, parts),
        (
            h, tiles, pairs, codes.view(torch.uint16) if trellis else codes, *rest, bias, z, part,
            arrivals if shared else None, count, parts, gain, 1 / gain,
        ),
        _staged(how, stages),
        device,
        {
            "TOP_K": top_k, "R": h.shape[1], "I": columns, "BS": block_size, "GS": group_size, "WIDTHS": tuple(widths),
            "BM": pair_tile, "BN": bn, "SHARED": shared, "SWAP": swap, "SPREAD": share, "HAS_BIAS": bias is not None,
            "ACTIVATION": activation, "LIMIT": limit, "ALPHA": alpha, "SHIFT": up_shift,
        },
    )  # fmt: skip
    return z


@gate_up.register_fake
def _(
    h: torch.Tensor,
    tiles: torch.Tensor,
    pairs: torch.Tensor,
    arrivals: torch.Tensor,
    factor: list[torch.Tensor],
    bias: torch.Tensor | None,
    widths: list[int],
    gain: float,
    trellis: bool,
    top_k: int,
    block_size: int,
    group_size: int,
    columns: int,
    *rest: object,
    **named: object,
) -> torch.Tensor:
    return h.new_empty(pairs.shape[0], columns, dtype=z_dtype(h.dtype, trellis))


@torch.library.custom_op("bitsmoe::down", mutates_args=("arrivals",))
def down(
    z: torch.Tensor,
    tiles: torch.Tensor,
    pairs: torch.Tensor,
    arrivals: torch.Tensor,
    factor: list[torch.Tensor],
    ids: torch.Tensor | None,
    p: torch.Tensor | None,
    bias: torch.Tensor | None,
    base: torch.Tensor | None,
    widths: list[int],
    trellis: bool,
    block_size: int,
    group_size: int,
    pair_tile: int,
    rows: int,
    warps: int,
    dtype: torch.dtype,
    stages: int = 0,
    splits: int = 1,
) -> torch.Tensor:
    """``t = F z`` of every pair, ``[T k, R']``; with ids ``y = base + sum_j p_j (F[id_j] z_j + bias[id_j])`` of every
    token, ``[T, R']``, which is `combine` in the same launch. Both of ``dtype``.

    Rows of t of pairs whose id is outside ``[0, E)`` are not written; they do not count in y.

    Args:
        z: ``[T k, I]`` contiguous, as `gate_up` leaves it: in `digits.swapped` order unless this launch keeps the order
            (`launch.swaps`), or a sixteenth.
        tiles: from `routing.route`, likewise pairs.
        pairs: see ``tiles``.
        arrivals: int32 zeros, ``T * R' / rows`` with ids; not zeros afterwards.
        factor: codes, steps, head and order of the output side (`PreparedSide.factor`).
        ids: ``[T, k]`` contiguous integers; None: t.
        p: ``[T, k]`` contiguous floats, with ids.
        bias: ``[E, R']`` or None.
        base: ``[T, R']`` or None.
        widths: of `PreparedSide`.
        trellis: the family of codes.
        block_size: directions of a unit.
        group_size: columns that share a step.
        pair_tile: BM: the ``tile`` given to `route`.
        rows: directions of a program (`launch.down_tile`, `launch.trellis_rows`).
        warps: of a program with trellis codes (`launch.trellis_down_warps`); 0: by the rules of `launch`.
        dtype: of the result; sums are float32.
        stages: of the pipeline; 0: by the rules of `launch`.
        splits: programs that share a tile's groups (`launch.down_splits`), with ids only; fewer where some of them
            would have none.
    """
    directions, device, total = factor[3].shape[1] * block_size, z.device, ids is not None
    groups = z.shape[1] // group_size
    splits = even_splits(splits, groups) if total else 1
    t = torch.empty(splits * z.shape[0], directions, dtype=torch.float32 if total else dtype, device=device)
    tokens, top_k = (0, 1) if ids is None else ids.shape
    y = torch.empty(tokens, directions, dtype=dtype, device=device) if total else t
    if not len(y):
        return y
    codes, steps, head, order = factor
    payload = (codes.view(torch.uint16), steps, order) if trellis else (codes, steps, head, order)
    kernel, how, share = down_launch(pair_tile, rows, group_size, warps, capability(device), trellis)
    run(
        kernel,
        (tiles.shape[0] + triton.cdiv(tokens, pair_tile), directions // rows, splits),
        (
            z, tiles, pairs, *payload, t, *((ids, p, bias, base, y, arrivals) if total else (None,) * 6),
            tokens, tiles.shape[0], len(order), triton.cdiv(groups, splits),
        ),
        _staged(how, stages),
        device,
        {
            "TOP_K": top_k, "R": directions, "I": z.shape[1], "BS": block_size, "GS": group_size,
            "WIDTHS": tuple(widths), "BM": pair_tile, "BR": rows, "SPREAD": share, "JOINED": block_size < 128,
            "SUM": total, "HAS_BIAS": bias is not None, "HAS_BASE": base is not None, "SPLIT": splits > 1,
        },
    )  # fmt: skip
    return y


@down.register_fake
def _(
    z: torch.Tensor,
    tiles: torch.Tensor,
    pairs: torch.Tensor,
    arrivals: torch.Tensor,
    factor: list[torch.Tensor],
    ids: torch.Tensor | None,
    p: torch.Tensor | None,
    bias: torch.Tensor | None,
    base: torch.Tensor | None,
    widths: list[int],
    trellis: bool,
    block_size: int,
    group_size: int,
    pair_tile: int,
    rows: int,
    warps: int,
    dtype: torch.dtype,
    stages: int = 0,
    splits: int = 1,
) -> torch.Tensor:
    return z.new_empty(z.shape[0] if ids is None else ids.shape[0], factor[3].shape[1] * block_size, dtype=dtype)
