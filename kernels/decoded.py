"""Experts' factors written out in 16 bits, for steps of many tokens: decoded once, multiplied often.

Where an expert has many pairs, the kernels that decode in registers decode its weights once for every tile of them, and
instructions decide. Then it is faster to write the factors out, some experts at a time, and to multiply like a 16-bit
model (`grouped.py`). An element is its value times its step times a power of two (`PreparedSide.gain`), rounded once to
the activations' type; units of width 0 are written as zeros. The oracle is `reference.decode_expert_factors`.
"""

import torch
import triton
import triton.language as tl

from .digits import digit_count, digit_size, digit_start, digit_weight, plane_values
from .launch import Launch, capability
from .launcher import run
from .trellis_codes import tile_values

#: Weights of a program.
_PROGRAM = 8192


@triton.jit
def _digits(plane, n, f: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows n of a plane of ``f``-bit digits, float32 ``[rows, COLUMNS]``."""
    KB: tl.constexpr = COLUMNS * f // 8
    return plane_values(tl.load(plane + n[:, None] * KB + tl.arange(0, KB)[None, :]), f, tl.float32)


@triton.jit
def _scalar_tile(codes, first, b: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr):
    """Values of PART rows from ``first`` on of a tile of codes of ROWS rows, float32 ``[1, PART, COLUMNS]``."""
    value = tl.zeros((PART, COLUMNS), tl.float32)
    n = first + tl.arange(0, PART)
    for i in tl.static_range(digit_count(b)):
        plane = codes + digit_start(b, i) * (ROWS * COLUMNS // 8)
        value += _digits(plane, n, digit_size(b, i), COLUMNS) * digit_weight(b, i)
    return value[None, :, :]


@triton.jit
def _write(w, value, step):
    """Store ``value * step`` at the pointers ``w``, in their type."""
    tl.store(w, (value.to(tl.float32) * step).to(w.dtype.scalar.element_ty))


@triton.jit(do_not_specialize=["FIRST"])
def decode_in_kernel(
    codes_ptr, steps_ptr, head_ptr, order_ptr, w_ptr, FIRST, gain,
    R: tl.constexpr, I: tl.constexpr, BS: tl.constexpr, GS: tl.constexpr, WIDTHS: tl.constexpr, TRELLIS: tl.constexpr,
    PART: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Program (matrix and place of a unit, group, part): W [matrices, I, R] from the FIRST on, a matrix after another.

    A part is PART directions of the unit with trellis codes, whose sequences run along the group, and PART columns of
    the group with scalar codes.
    """
    UNITS: tl.constexpr = R // BS
    QUANTUM: tl.constexpr = BS * GS // (16 if TRELLIS else 8)
    matrix, place = tl.program_id(0) // UNITS, tl.program_id(0) % UNITS
    group, first = tl.program_id(1), tl.program_id(2) * PART
    head = head_ptr + (FIRST + matrix) * (2 + len(WIDTHS))
    unit = tl.load(order_ptr + (FIRST + matrix) * UNITS + place)
    code, row = tl.load(head), tl.load(head + 1)
    bits = 0  # of one group of this matrix
    kept = 0
    for s in tl.static_range(len(WIDTHS)):
        hi = tl.load(head + 2 + s)
        bits += (hi - kept) * WIDTHS[s]
        kept = hi
    code += group * bits
    if TRELLIS:
        n, k = tl.arange(0, GS), first + tl.arange(0, PART)
    else:
        n, k = first + tl.arange(0, PART), tl.arange(0, BS)
    w = w_ptr + matrix.to(tl.int64) * (I * R) + (group * GS + n)[None, :, None] * R + (unit * BS + k)[None, None, :]
    steps = steps_ptr + (row + group * kept + place).to(tl.int64) * BS + k
    lo = 0
    for s in tl.static_range(len(WIDTHS)):
        hi = tl.load(head + 2 + s)
        if (place >= lo) & (place < hi):
            codes = codes_ptr + (code + (place - lo) * WIDTHS[s]).to(tl.int64) * QUANTUM
            if TRELLIS:
                pair = (first // 2 + tl.arange(0, PART // 2))[None, :]
                value = tile_values(codes, pair, 1, 0, WIDTHS[s], GS, False, PACK)
            else:
                value = _scalar_tile(codes, first, WIDTHS[s], GS, BS, PART)
            _write(w, value, (tl.load(steps).to(tl.float32) * gain)[None, None, :])
        code += (hi - lo) * WIDTHS[s]
        lo = hi
    if place >= kept:
        tl.store(w, tl.zeros(w.shape, w.dtype.scalar.element_ty))


@triton.jit(do_not_specialize=["FIRST"])
def decode_out_kernel(
    codes_ptr, steps_ptr, head_ptr, order_ptr, w_ptr, FIRST, gain,
    R: tl.constexpr, I: tl.constexpr, BS: tl.constexpr, GS: tl.constexpr, WIDTHS: tl.constexpr, TRELLIS: tl.constexpr,
    JOINED: tl.constexpr, PART: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Program (expert and place of a unit, group, part): W [experts, R', I] from the FIRST on.

    A part is PART columns of the group with trellis codes, whose sequences run along the directions, and PART
    directions of the unit with scalar codes. JOINED: chains may have several units.
    """
    UNITS: tl.constexpr = R // BS
    GROUPS: tl.constexpr = I // GS
    QUANTUM: tl.constexpr = BS * GS // (16 if TRELLIS else 8)
    expert, place = tl.program_id(0) // UNITS, tl.program_id(0) % UNITS
    group, first = tl.program_id(1), tl.program_id(2) * PART
    if TRELLIS:
        n, k = tl.arange(0, BS), first + tl.arange(0, PART)
        numbers = order_ptr + ((FIRST + expert) * UNITS + place) * 6
        unit, width, code = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
        chain = tl.load(numbers + 3) if JOINED else 1
        number = tl.load(numbers + 4) if JOINED else 0
        row = tl.load(numbers + 5) + group
    else:
        n, k = first + tl.arange(0, PART), tl.arange(0, GS)
        head = head_ptr + (FIRST + expert) * (2 + len(WIDTHS))
        unit, code = tl.load(order_ptr + (FIRST + expert) * UNITS + place), tl.load(head)
        row = tl.load(head + 1) + place * GROUPS + group
    w = w_ptr + expert.to(tl.int64) * (R * I) + (unit * BS + n)[None, :, None] * I + (group * GS + k)[None, None, :]
    steps = steps_ptr + row.to(tl.int64) * BS + n
    if TRELLIS:
        pair = (first // 2 + tl.arange(0, PART // 2))[None, :]
        for s in tl.static_range(len(WIDTHS)):
            if width == WIDTHS[s]:
                codes = codes_ptr + (code + group * chain * WIDTHS[s]).to(tl.int64) * QUANTUM
                value = tile_values(codes, pair, chain, number, WIDTHS[s], BS, JOINED, PACK)
                _write(w, value, (tl.load(steps).to(tl.float32) * gain)[None, :, None])
        absent = width == 0
    else:
        lo = 0
        for s in tl.static_range(len(WIDTHS)):
            hi = tl.load(head + 2 + s)
            if (place >= lo) & (place < hi):
                codes = codes_ptr + (code + ((place - lo) * GROUPS + group) * WIDTHS[s]).to(tl.int64) * QUANTUM
                value = _scalar_tile(codes, first, WIDTHS[s], BS, GS, PART)
                _write(w, value, (tl.load(steps).to(tl.float32) * gain)[None, :, None])
            code += (hi - lo) * GROUPS * WIDTHS[s]
            lo = hi
        absent = place >= lo
    if absent:
        tl.store(w, tl.zeros(w.shape, w.dtype.scalar.element_ty))


def decode_launch(rows: int, columns: int, cc: int) -> tuple[int, Launch]:
    """(PART, launch) of a program that decodes a part of a tile of codes.

    Args:
        rows: elements of the tile that a program takes all of: along the sequences with trellis codes, along a row of
            the planes with scalar ones.
        columns: elements across, of which it takes PART.
        cc: `launch.capability`.
    """
    part = min(columns, max(16, _PROGRAM // rows))
    return part, Launch(warps=4, stages=1, pack=2 if cc else 0)


@torch.library.custom_op("bitsmoe::decode_factor", mutates_args=())
def decode_factor(
    factor: list[torch.Tensor],
    widths: list[int],
    gain: float,
    trellis: bool,
    output: bool,
    rank: int,
    columns: int,
    block_size: int,
    group_size: int,
    first: int,
    count: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``gain`` times the factors of the experts from ``first`` to ``first + count``, rounded to ``dtype``.

    Args:
        factor: codes, steps, head and order (`PreparedSide.factor`) of all experts.
        widths: of `PreparedSide`.
        gain: a power of two.
        trellis: the family of codes.
        output: the output side, F ``[count, R', I]``; otherwise gate and up, ``[count, 2, I, R]``.
        rank: R' or R.
        columns: I.
        block_size: directions of a unit.
        group_size: columns that share a step.
        first: expert.
        count: experts.
        dtype: of the result.
    """
    codes, steps, head, order = factor
    shape = (count, rank, columns) if output else (count, 2, columns, rank)
    w = torch.empty(shape, dtype=dtype, device=codes.device)
    matrices = 1 if output else 2
    rows, across = (block_size, group_size) if output else (group_size, block_size)
    if not trellis:
        rows, across = across, rows
    part, how = decode_launch(rows, across, capability(codes.device))
    run(
        decode_out_kernel if output else decode_in_kernel,
        (count * matrices * (rank // block_size), columns // group_size, across // part),
        (codes.view(torch.uint16) if trellis else codes, steps, head, order, w, first * matrices, gain),
        how,
        codes.device,
        {
            "R": rank, "I": columns, "BS": block_size, "GS": group_size, "WIDTHS": tuple(widths), "TRELLIS": trellis,
            "JOINED": block_size < 128, "PART": part,
        },
    )  # fmt: skip
    return w


@decode_factor.register_fake
def _(
    factor: list[torch.Tensor],
    widths: list[int],
    gain: float,
    trellis: bool,
    output: bool,
    rank: int,
    columns: int,
    block_size: int,
    group_size: int,
    first: int,
    count: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    shape = (count, rank, columns) if output else (count, 2, columns, rank)
    return factor[0].new_empty(shape, dtype=dtype)
