"""Decoding trellis codes in registers, in the layout in which a tensor core takes its first operand.

A lane of a tensor core holds rows g and g + 8 of each of a tile's 16-row blocks: of a sequence of T rows T/8
consecutive weights (docs/format.md, "Rows and positions"), a *segment*. Its bits are whole 32-bit words where T b is a
multiple of 128, and the window of a weight at the end of a word reaches into the next, for the last word of a segment
into the next lane's first. Both halves of a word belong to neighbouring columns, which are neighbours in the operand as
well, so shift, mask, multiplication and polynomial work on two weights at a time and nothing is moved between lanes.

Every function here treats both halves of a register alike: it is right in whatever layout the compiler chooses, which
decides only how fast it is.
"""

import triton
import triton.language as tl

from bitsmoe_modifier.storage.trellis import CODES


@triton.constexpr_function
def _chunk(words):
    """Words of a segment that are loaded together: 4, 2 or 1."""
    return 4 if words % 4 == 0 else 2 if words % 2 == 0 else 1


@triton.constexpr_function
def _twice(value):
    """A register of two copies of a normal number that float16 represents."""
    sign, value, exponent = (0x8000, -value, 15) if value < 0 else (0, value, 15)
    while value >= 2:
        value, exponent = value / 2, exponent + 1
    while value < 1:
        value, exponent = value * 2, exponent - 1
    return (sign | exponent << 10 | int((value - 1) * 1024)) * 0x10001


@triton.constexpr_function
def _move(width, shift):
    """(of the word moved by a byte, right shift, lowest bit of the window after it) for a window at bit ``shift``.

    Windows that lie up to two bits apart share a shifted word: the multiplication brings them to the same bits.
    """
    shifts = sorted({width * n % 16 for n in range(16)})
    moves = {}
    for late in (False, True):
        left = [s - 8 * late for s in shifts if (s >= 8) == late]
        while left:
            first = left[0]
            taken = [s for s in left if s <= first + 2 and s <= 8]
            moves.update({s + 8 * late: (late, first, s - first) for s in taken})
            left = [s for s in left if s not in taken]
    return moves[shift]


@triton.constexpr_function
def _assembly(width, shift):
    """PTX for the two windows at bit ``shift`` of the halves of $1, followed by the halves of $2: two float16 values.

    ``4 (m w mod 256)`` lies in bits 2 to 9 of each half after the multiplication. What the lower half's product has
    beyond 16 bits falls on bits 0 and 1 of the upper half, which are zero before it: no carry.
    """
    m, alpha, gamma = CODES[width]
    late, right, at = _move(width, shift)
    lines = [".reg .b32 w, u, r, k, l;", "mov.b32 w, $1;"]
    if late:
        lines.append("prmt.b32 w, w, $2, 0x6341;")
    if right:
        lines.append(f"shr.b32 w, w, {right};")
    lines += [
        f"and.b32 u, w, {0x00FF00FF << at:#x};",
        f"mul.lo.u32 u, u, {m << (2 - at)};",
        f"lop3.b32 u, u, 0x03fc03fc, {_twice(1.0):#x}, 0xea;",  # (u & mask) | 1.0: 1 + u / 256
        f"mov.b32 k, {_twice(2.0):#x};",
        f"mov.b32 l, {_twice(-(2 + 255 / 256)):#x};",
        "fma.rn.f16x2 r, u, k, l;",
    ]
    lines += [
        f"mov.b32 k, {_twice(alpha):#x};",
        "fma.rn.f16x2 u, r, r, k;",
        f"mov.b32 k, {_twice(gamma):#x};",
        "fma.rn.f16x2 u, u, u, k;",
        "mul.rn.f16x2 $0, r, u;",
    ]
    return "{ " + " ".join(lines) + " }"


@triton.jit
def _value(windows, b: tl.constexpr):
    """Values of windows, for the interpreter: one rounding to float16 where the assembly rounds."""
    m: tl.constexpr = CODES[b][0]
    r = ((windows.to(tl.int32) * m % 256) * 2 - 255).to(tl.float64) / 256
    t = (r * r + CODES[b][1]).to(tl.float16).to(tl.float64)
    q = (t * t + CODES[b][2]).to(tl.float16).to(tl.float64)
    return (r * q).to(tl.float16)


@triton.jit
def values_at(words, following, b: tl.constexpr, SHIFT: tl.constexpr, PACK: tl.constexpr):
    """Values, float16, of the windows at bit SHIFT of uint16 words; ``following``: the streams' next words."""
    if PACK:
        return tl.inline_asm_elementwise(
            _assembly(b, SHIFT), "=r,r,r", [words, following], dtype=tl.float16, is_pure=True, pack=2
        )
    else:  # noqa: RET505 - a compile-time branch
        both = words.to(tl.uint32) | following.to(tl.uint32) << 16
        return _value(both >> SHIFT & 255, b)


@triton.jit
def _parted(w, S: tl.constexpr, KP: tl.constexpr, C: tl.constexpr):
    """C words of every segment, uint16 in the order ``[S, KP, 8, C, 2]``, as a tuple of C ``[S, 8, 2 KP]``."""
    K: tl.constexpr = KP * 2
    w = tl.reshape(tl.permute(tl.reshape(w, [S, KP, 8, C, 2]), (0, 2, 1, 4, 3)), [S, 8, K, C])
    found = ()
    if C == 1:
        found = (tl.reshape(w, [S, 8, K]),)
    elif C == 2:
        found = tl.split(w)
    else:
        even, odd = tl.split(tl.reshape(w, [S, 8, K, 2, 2]))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        found = (a, b, c, d)
    return found


@triton.jit
def _words(tile, pair, units, number, LW: tl.constexpr, JOINED: tl.constexpr):
    """The words of a unit's segments, of LW words each, and then those after them: LW + 1 of uint16 ``[S, 8, K]``.

    The compiler copies together what is contiguous along the last axis of a load.
    """
    S: tl.constexpr = pair.shape[0]
    KP: tl.constexpr = pair.shape[1]
    C: tl.constexpr = _chunk(LW)
    g = tl.arange(0, 8)
    words = ()
    if C == LW and not JOINED:  # all segments of a pair follow one another
        words = _parted(tl.load(tile + (pair[:, :, None] * (16 * LW) + tl.arange(0, 16 * C))), S, KP, C)
    else:
        place = ((pair[:, :, None] * 8 + g) * units + number)[:, :, :, None] * (2 * LW)
        for i in tl.static_range(LW // C):
            words = words + _parted(tl.load(tile + (place + (i * 2 * C + tl.arange(0, 2 * C)))), S, KP, C)
    # after the unit's last word comes the first of the next unit, or of the next segment's first unit
    after = pair[:, None, :, None] * (8 * units) + ((g * units + number + 1) % (8 * units))[:, None, None]
    last = tl.load(tile + (after * (2 * LW) + tl.arange(0, 2)))
    return words + (tl.reshape(last, [S, 8, KP * 2]),)  # noqa: RUF005 - not in a kernel


@triton.jit
def _joined(v, N: tl.constexpr):
    """Neighbours joined along a new last axis: half as many tensors."""
    found = ()
    for i in tl.static_range(N // 2):
        found = found + (tl.join(v[2 * i], v[2 * i + 1]),)  # noqa: RUF005 - not in a kernel
    return found


@triton.jit
def decoded(
    tile, pair, units, number, b: tl.constexpr, ROWS: tl.constexpr, JOINED: tl.constexpr, PACK: tl.constexpr
):  # fmt: skip
    """Values of a unit's rows in a tile, in the order of the rows: float16 ``[S, ROWS, K]``.

    tile: pointer to uint16. pair: ``[S, K / 2]``, the pairs of columns. units: of the tile's sequences, ROWS rows each,
    of which the unit is the ``number``-th; not JOINED: the only one. ROWS b is a multiple of 128.
    """
    N: tl.constexpr = ROWS // 8
    S: tl.constexpr = pair.shape[0]
    K: tl.constexpr = pair.shape[1] * 2
    words = _words(tile, pair, units, number, N * b // 16, JOINED)
    v = ()
    for n in tl.static_range(N):
        v = v + (  # noqa: RUF005
            values_at(words[n * b // 16], words[n * b // 16 + 1], b, n * b % 16, PACK),
        )
    if N == 16:
        v = _joined(_joined(_joined(_joined(v, 16), 8), 4), 2)
        return tl.reshape(tl.permute(v[0], (0, 6, 5, 4, 3, 1, 2)), [S, ROWS, K])
    elif N == 8:  # noqa: RET505
        v = _joined(_joined(_joined(v, 8), 4), 2)
        return tl.reshape(tl.permute(v[0], (0, 5, 4, 3, 1, 2)), [S, ROWS, K])
    elif N == 4:
        v = _joined(_joined(v, 4), 2)
        return tl.reshape(tl.permute(v[0], (0, 4, 3, 1, 2)), [S, ROWS, K])
    else:
        v = _joined(v, 2)
        return tl.reshape(tl.permute(v[0], (0, 3, 1, 2)), [S, ROWS, K])


@triton.jit
def gathered(tile, pair, units, number, b: tl.constexpr, ROWS: tl.constexpr, PACK: tl.constexpr):
    """`decoded` for any ROWS: every weight loads its own two words."""
    S: tl.constexpr = pair.shape[0]
    K: tl.constexpr = pair.shape[1] * 2
    row = number * ROWS + tl.arange(0, ROWS)
    bit = (row % 8 * (units * (ROWS // 8)) + row // 8) * b
    words = units * (ROWS * b // 16)
    half = tl.arange(0, 2)[None, None, :]
    column = tl.reshape(pair[:, :, None] * (2 * words) + half, [S, K])[:, None, :]
    w = tl.load(tile + (column + (bit // 16 * 2)[None, :, None])).to(tl.uint32)
    after = tl.load(tile + (column + ((bit // 16 + 1) % words * 2)[None, :, None])).to(tl.uint32)
    windows = ((w | after << 16) >> (bit % 16)[None, :, None] & 255).to(tl.uint16)
    return values_at(windows, windows, b, 0, PACK)


@triton.jit
def tile_values(
    tile, pair, units, number, b: tl.constexpr, ROWS: tl.constexpr, JOINED: tl.constexpr, PACK: tl.constexpr
):  # fmt: skip
    """Values of a unit's rows in a tile: `decoded` where its segments are whole words, else `gathered`."""
    if ROWS * b % 128 == 0:
        return decoded(tile, pair, units, number, b, ROWS, JOINED, PACK)
    else:  # noqa: RET505
        return gathered(tile, pair, units, number, b, ROWS, PACK)
