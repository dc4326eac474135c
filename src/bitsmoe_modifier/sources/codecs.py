"""Low-precision weights to float32, one format after the other, by their specifications (no framework).

A weight is a small code times one or two scales. All products here are formed in float32, where they are exact, or,
with float32 scales, rounded once; nothing is rounded to a narrower dtype on the way.
"""

import torch

from ..errors import CheckpointError

#: OCP Microscaling (MX) 1.0: the magnitudes of E2M1, by the three low bits of the code; the fourth is the sign
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
#: of E8M0, a power of two that is stored as its exponent
_E8M0_BIAS = 127
#: weights of a row that share a scale in MXFP4
MX_GROUP = 32


def e8m0_exponents(scales: torch.Tensor) -> torch.Tensor:
    """The exponents, int32, of powers of two stored as uint8 or float8_e8m0fnu.

    Raises:
        CheckpointError: on 255, which stands for NaN.
    """
    stored = scales.view(torch.uint8) if scales.dtype != torch.uint8 else scales
    if bool((stored == 255).any()):
        raise CheckpointError("a scale of MXFP4 weights is NaN; the checkpoint is damaged")
    return stored.to(torch.int32) - _E8M0_BIAS


def decode_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """4-bit floats, float32 ``[…, 2 n]``, of bytes ``[…, n]`` (uint8 or int8) that hold two each, the first one low."""
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=packed.device)
    stored = packed.view(torch.uint8)
    pairs = table[torch.arange(256, device=packed.device)[:, None] >> torch.tensor([0, 4], device=packed.device) & 15]
    return pairs[stored.to(torch.int32)].flatten(-2)


def decode_mxfp4(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """4-bit floats (E2M1) with a power of two (E8M0) per 32 along a row, float32 ``[…, rows, 32 groups]``.

    Args:
        packed: uint8 or int8, ``[…, rows, 16 groups]`` or, as gpt-oss has it, ``[…, rows, groups, 16]``.
        scales: uint8 or float8_e8m0fnu, ``[…, rows, groups]``.
    """
    if packed.ndim == scales.ndim + 1:
        packed = packed.flatten(-2)
    if packed.shape[-1] * 2 != scales.shape[-1] * MX_GROUP or packed.shape[:-1] != scales.shape[:-1]:
        raise CheckpointError(
            f"scales of {tuple(scales.shape)} for 4-bit floats in {tuple(packed.shape)} bytes: MXFP4 has one per 32 "
            "weights; the checkpoint is damaged or of another format"
        )
    values = decode_e2m1(packed).unflatten(-1, (-1, MX_GROUP))
    return torch.ldexp(values, e8m0_exponents(scales).unsqueeze(-1)).flatten(-2)


def decode_nvfp4(packed: torch.Tensor, scales: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    """4-bit floats (E2M1) with a scale per 16 and one for the matrix, float32 ``[…, rows, columns]``.

    Args:
        packed: uint8 ``[…, rows, columns / 2]``.
        scales: float8_e4m3fn ``[…, rows, columns / 16]``.
        divisor: float32, one number per matrix: compressed-tensors' ``weight_global_scale``, by which to divide.
    """
    values = decode_e2m1(packed)
    group = values.shape[-1] // scales.shape[-1]
    product = values.unflatten(-1, (-1, group)) * scales.to(torch.float32).unsqueeze(-1)  # eight bits: exact
    return product.flatten(-2) / divisor.to(torch.float32).reshape(*divisor.shape[:-1], 1, 1)


def decode_scaled(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Codes of one byte (8-bit floats or integers) with a scale per block, float32 ``[…, N, K]``.

    Args:
        weight: float8_e4m3fn, float8_e5m2 or int8, ``[…, N, K]``.
        scale: ``[…, ceil(N / block[0]), ceil(K / block[1])]`` to be multiplied with: any float dtype, float8_e8m0fnu
            among them.
        block: rows and columns that share a scale; blocks at the ends may be smaller.
    """
    rows, columns = weight.shape[-2:]
    wanted = (-(-rows // block[0]), -(-columns // block[1]))
    if tuple(scale.shape[-2:]) != wanted:
        raise CheckpointError(
            f"scales of {tuple(scale.shape)} for weights of {tuple(weight.shape)} in blocks of {block}"
        )
    wide = scale.to(torch.float32)
    if wanted[0] > 1:
        wide = wide.repeat_interleave(block[0], -2)[..., :rows, :]
    if wanted[1] > 1:
        wide = wide.repeat_interleave(block[1], -1)[..., :columns]
    return weight.to(torch.float32) * wide


def unpack_integers(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Signed integers of ``bits`` bits, int32 ``[rows, columns]``, of compressed-tensors' int32 words.

    A row is one stream of bits from the lowest bit of its first word on; integer i has bits i·b to (i + 1)·b − 1, as
    an unsigned number that is 2^(b − 1) too large.
    """
    start = torch.arange(columns, device=packed.device) * bits
    # two neighbouring words as one of 64 bits hold every integer whole
    low = packed.to(torch.int64) & 0xFFFFFFFF
    high = torch.nn.functional.pad(low[:, 1:], (0, 1))
    words = low | high << 32
    # the 64th bit never counts: an integer starts within the first 32 bits and has at most 8
    unsigned = words[:, start // 32] >> (start % 32) & ((1 << bits) - 1)
    return (unsigned - (1 << (bits - 1))).to(torch.int32)


def decode_packed_integers(
    packed: torch.Tensor,
    scale: torch.Tensor,
    shape: tuple[int, int],
    bits: int,
    zero_point: torch.Tensor | None = None,
    group_of_column: torch.Tensor | None = None,
) -> torch.Tensor:
    """Integers of compressed-tensors' format ``pack-quantized``, float32 ``shape``.

    Args:
        packed: int32 ``[rows, ceil(columns · bits / 32)]``.
        scale: ``[rows, groups]``, or one number for the matrix.
        shape: rows and columns.
        bits: 1 to 8.
        zero_point: int32 ``[ceil(rows · bits / 32), groups]``, packed along the rows, to be taken off first.
        group_of_column: int ``[columns]``; None where neighbouring columns share a scale.
    """
    rows, columns = shape
    integers = unpack_integers(packed, bits, columns)
    wide = scale.to(torch.float32).reshape(-1, scale.shape[-1] if scale.ndim else 1)
    groups = wide.shape[1]
    if columns % groups or wide.shape[0] not in (1, rows):
        raise CheckpointError(f"scales of {tuple(scale.shape)} for a matrix of {shape}; the checkpoint is damaged")
    columns_of = torch.arange(columns, device=packed.device) // (columns // groups)
    chosen = columns_of if group_of_column is None else group_of_column.to(torch.int64)
    if zero_point is not None:
        integers = integers - unpack_integers(zero_point.T.contiguous(), bits, rows).T[:, chosen]
    return integers.to(torch.float32) * (wide if groups == 1 else wide[:, chosen])
