"""Decoding a digit plane in registers, the innermost work of every kernel here (planes.py has the layout).

A plane of ``f``-bit digits holds ``8 / f`` of them per byte; digit ``j`` of ``K`` bytes is a contiguous slice of ``K``
elements, so each ``j`` feeds one tensor-core product. A digit counts ``2 d - (2**f - 1)``, times ``2**place`` where
lower digits follow: summed over the planes this is ``2 c - (2**b - 1)``, the value of the code in units of its step.

On NVIDIA GPUs four digits of a 32-bit register are converted at once: they are masked into the mantissa of a constant
(1024 in fp16, 128 in bf16, where one unit in the last place is 1), then one fused multiply-add removes the constant.
Every intermediate is an integer that the type represents, so the result is exact.

One mask takes the same digit of bytes 0 and 2, another that of bytes 1 and 3: of every four elements the middle two
come out in each other's place. A sum over the elements does not mind, as long as the other operand is `swapped` alike.
"""

import triton
import triton.language as tl

from bitsmoe_modifier.storage import planes

digits = triton.constexpr_function(planes.digits)


@triton.constexpr_function
def digit_count(width):
    """How many digits a code of ``width`` bits has."""
    return len(digits(width))


@triton.constexpr_function
def digit_size(width, i):
    """Bits of digit ``i``."""
    return digits(width)[i]


@triton.constexpr_function
def digit_start(width, i):
    """Bits of the planes stored before digit ``i``: its offset in quanta."""
    return sum(digits(width)[:i])


@triton.constexpr_function
def digit_weight(width, i):
    """``2**place`` of digit ``i``: what one unit of it is worth."""
    return 1 << sum(digits(width)[i + 1 :])


@triton.constexpr_function
def slices_before(width, i, block):
    """Slices of a row of ``block`` elements in the planes before digit ``i``; rows under 16 bytes are not sliced."""
    return sum(8 // f if block * f // 8 >= 16 else 1 for f in digits(width)[:i])


@triton.constexpr_function
def _twice(value, bf16):
    """A register of two copies of a normal number, bf16 or fp16, that the type represents."""
    mantissa, exponent = (7, 127) if bf16 else (10, 15)
    sign, value = (0x8000, -value) if value < 0 else (0, value)
    while value >= 2:
        value, exponent = value / 2, exponent + 1
    while value < 1:
        value, exponent = value * 2, exponent - 1
    return (sign | exponent << mantissa | int((value - 1) * 2**mantissa)) * 0x10001


@triton.constexpr_function
def _moves(f, top_bit):
    """For each digit of bytes 0 and 2, and of bytes 1 and 3: (right shift of the word, lowest bit ``p`` after it).

    Few distinct shifts, each of which brings as many digits as possible between bit 1 and ``top_bit`` of a half.
    """
    per = 8 // f
    places = [f * j for j in range(per)] + [8 + f * j for j in range(per)]
    moves = {}
    while len(moves) < len(places):
        at = min(place for place in places if place not in moves)
        shift = at - 1
        moves.update({p: (shift, p - shift) for p in places if p not in moves and p - shift + f <= top_bit})
    return [[moves[f * j] for j in range(per)], [moves[8 + f * j] for j in range(per)]]


@triton.constexpr_function
def _splice(f, j, bf16, pack):
    """PTX for digit ``j``: 2 or 4 bytes of a register in, as many half-precision values out, two to a register.

    A digit is moved to a bit ``p >= 1`` inside the mantissa and masked into the constant: ``M + 2**p d``. One
    multiply-add gives ``2 d - top``. Of 4 bytes, values 0 and 2 leave in the first register, 1 and 3 in the second; all
    digits of a word share its shifted forms. 2 bytes are spread to a half each, and leave in order.
    """
    mantissa, big, kind = (7, 128, "bf16x2") if bf16 else (10, 1024, "f16x2")
    top = (1 << f) - 1
    if pack == 2:
        p = f * j + 1 if f * j + 1 + f <= mantissa else f * j - 1
        moves = [(f * j - p, p)]
        lines = [".reg .b32 w, u, s, m;", "mov.b32 w, {$1, 0};", "prmt.b32 w, w, 0, 0x4140;"]
    else:
        moves = [half[j] for half in _moves(f, mantissa)]
        lines = [".reg .b32 w, u, s, m;", "mov.b32 w, $2;"]
    for half in range(len(moves)):  # Triton 3.6 takes no tuple after `for` even here
        right, p = moves[half]
        scale = 2.0 ** (1 - p)
        base, one, minus = _twice(big, bf16), _twice(scale, bf16), _twice(-(big * scale + top), bf16)
        lines += [
            f"mov.b32 s, {one:#x};",
            f"mov.b32 m, {minus:#x};",
            f"shl.b32 u, w, {-right};" if right < 0 else f"shr.b32 u, w, {right};",
            f"lop3.b32 u, u, {(top << p) * 0x10001:#x}, {base:#x}, 0xea;",  # (u & digit) | M
            f"fma.rn.{kind} ${half}, u, s, m;",
        ]
    return "{ " + " ".join(lines) + " }"


@triton.constexpr_function
def _constraints(pack):
    """Operands of `_splice`: two bytes travel in a 16-bit register."""
    return "=r,h" if pack == 2 else "=r,=r,r"


@triton.jit
def digit_values(w, f: tl.constexpr, j: tl.constexpr, DT: tl.constexpr, PACK: tl.constexpr):
    """``2 d - (2**f - 1)`` of digit ``j`` of every byte of ``w``, exact in DT, along the last axis in `swapped` order.

    PACK: bytes converted by one instance of the assembly; 2 or 4, whichever the product's layout keeps side by side in
    a thread (see `launch.Launch`); 0 for the interpreter. With 2 the order stays.
    """
    if PACK:
        if DT == tl.bfloat16:  # noqa: SIM300 - and literal dtypes below: the builtin does not unwrap a constexpr one
            return tl.inline_asm_elementwise(
                _splice(f, j, True, PACK), _constraints(PACK), [w], dtype=tl.bfloat16, is_pure=True, pack=PACK
            )
        else:  # noqa: RET505 - a compile-time branch: the untaken one is not compiled
            return tl.inline_asm_elementwise(
                _splice(f, j, False, PACK), _constraints(PACK), [w], dtype=tl.float16, is_pure=True, pack=PACK
            )
    else:
        top: tl.constexpr = (1 << f) - 1
        values = (((w >> (f * j)) & top).to(tl.int32) * 2 - top).to(tl.float32).to(DT)
        last: tl.constexpr = len(w.shape) - 1
        return tl.trans(swapped(tl.trans(values), 0, PACK)) if last == 1 else swapped(values, 2, PACK)


@triton.jit
def swapped(x, axis: tl.constexpr, PACK: tl.constexpr):
    """``x`` with the middle two of every four elements along ``axis`` exchanged: the order of `digit_values`.

    For ``[K, N]`` along 0, ``[S, K, N]`` along 1 and ``[S, N, K]`` along 2. As it is where PACK is 2.
    """
    if PACK == 2:
        return x
    if axis == 0:
        parts = tl.reshape(x, [x.shape[0] // 4, 2, 2, x.shape[1]])
        return tl.reshape(tl.permute(parts, (0, 2, 1, 3)), x.shape)
    elif axis == 1:  # noqa: RET505
        parts = tl.reshape(x, [x.shape[0], x.shape[1] // 4, 2, 2, x.shape[2]])
        return tl.reshape(tl.permute(parts, (0, 1, 3, 2, 4)), x.shape)
    else:
        parts = tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 4, 2, 2])
        return tl.reshape(tl.permute(parts, (0, 1, 2, 4, 3)), x.shape)


@triton.jit
def plane_values(w, f: tl.constexpr, DT: tl.constexpr):
    """All digits of the rows of a plane at once: uint8 ``[N, K]`` to DT ``[N, K * 8 / f]``, elements in order.

    For rows of fewer than 16 bytes (blocks or groups under 128), whose slices are too short for a tensor-core product.
    """
    PER: tl.constexpr = 8 // f
    top: tl.constexpr = (1 << f) - 1
    shift = (tl.arange(0, PER) * f).to(tl.uint8)
    d = (w[:, None, :] >> shift[None, :, None]) & top
    values = (d.to(tl.int32) * 2 - top).to(tl.float32).to(DT)
    return tl.reshape(values, [w.shape[0], PER * w.shape[1]])


@triton.jit
def product(w, x, acc, PACK: tl.constexpr):
    """``acc + w @ x``, accumulated in float32. The interpreter keeps bf16 as integers: there the operands are
    widened."""
    if PACK:
        return tl.dot(w, x, acc)
    else:  # noqa: RET505
        return tl.dot(w.to(tl.float32), x.to(tl.float32), acc, input_precision="ieee")
