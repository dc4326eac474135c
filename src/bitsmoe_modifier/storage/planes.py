"""Digit planes: how b-bit codes become bytes (docs/format.md, "Codes").

A code of ``b`` bits is split into binary digits of 4, 2 or 1 bits, most significant first (6 = 4 + 2, 3 = 2 + 1,
8 = 4 + 4). The plane of a digit of ``f`` bits stores ``n`` elements of the reduction axis in ``n * f / 8`` bytes:
byte ``i``, bits ``[f * j, f * j + f)`` hold element ``j * (n * f / 8) + i``. One shift and mask of a row of bytes thus
gives a contiguous slice of the reduction axis, which feeds a dot product without reshaping.

The codes are mid-rise: ``value = step * (2 * code - (2**b - 1))``, one formula for every ``b`` including 1.
"""

import torch

#: Bit-widths a unit may have. 0 drops the unit: it stores nothing and contributes nothing.
WIDTHS = (0, 1, 2, 3, 4, 6, 8)

#: Bits of a digit, longest first.
DIGITS = (4, 2, 1)


def digits(width: int) -> tuple[int, ...]:
    """Digit sizes of a ``width``-bit code, most significant first: ``digits(6) == (4, 2)``.

    Raises ValueError when ``width`` is not one of `WIDTHS`.
    """
    if width not in WIDTHS:
        raise ValueError(f"width {width} is not storable; choose from {WIDTHS}")
    sizes: list[int] = []
    while width:
        size = next(f for f in DIGITS if f <= width)
        sizes.append(size)
        width -= size
    return tuple(sizes)


def levels(width: int) -> int:
    """Largest value of ``2 * code - (2**b - 1)``: 1, 3, 7, 15, 63, 255 for 1, 2, 3, 4, 6, 8 bits; 0 for 0 bits."""
    return (1 << width) - 1


def pack_codes(codes: torch.Tensor, width: int) -> torch.Tensor:
    """Pack codes into digit planes.

    Args:
        codes: uint8 ``[N, m, n]``, values in ``[0, 2**width)``; ``n`` is the reduction axis, a multiple of 8.
        width: bits per code, > 0.

    Returns:
        uint8 ``[N, width * m * n / 8]``: per entry its planes one after another, each ``[m, n * f / 8]``.
    """
    count, m, n = codes.shape
    if n % 8:
        raise ValueError(f"the reduction axis has {n} elements, which is not a multiple of 8")
    planes, rest = [], width
    for f in digits(width):
        rest -= f
        digit = ((codes >> rest) & levels(f)).view(count, m, 8 // f, n * f // 8)
        packed = digit[:, :, 0].clone()
        for j in range(1, 8 // f):
            packed |= digit[:, :, j] << (f * j)
        planes.append(packed.flatten(1))
    return torch.cat(planes, 1)


def unpack_codes(packed: torch.Tensor, width: int, m: int, n: int) -> torch.Tensor:
    """Inverse of `pack_codes`: uint8 ``[N, width * m * n / 8]`` to uint8 ``[N, m, n]``."""
    count = packed.shape[0]
    codes = torch.zeros(count, m, n, dtype=torch.uint8, device=packed.device)
    offset, rest = 0, width
    for f in digits(width):
        rest -= f
        row = n * f // 8
        plane = packed[:, offset : offset + m * row].view(count, m, row)
        for j in range(8 // f):
            digit, place = plane >> (f * j) & levels(f), codes[:, :, j * row : (j + 1) * row]
            if offset:
                place |= digit << rest if rest else digit
            else:
                place.copy_(digit << rest if rest else digit)
        offset += m * row
    return codes


def code_values(codes: torch.Tensor, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Mid-rise grid values in units of the step: ``2 * code - (2**width - 1)``, same shape as ``codes``."""
    return codes.to(dtype, copy=True).mul_(2).sub_(levels(width))
