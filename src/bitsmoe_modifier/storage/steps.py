"""Steps of the experts' codes to stored bytes and back (docs/format.md).

A step is a byte c that stands for ``(1 + (c mod 8) / 8) * 2 ** (c // 8 - 23)``: a float without a sign, of 5 bits of
exponent and 3 of mantissa, in which every byte is a positive number. It is off by at most one part in 17; at its best
place a step that is off by 3 % loses 0.2 % more, and the byte that fp16 would take in addition costs 128 weights as
much as 0.06 bits each (docs/quality.md). Layers of format version 1 have steps in fp16.
"""

import torch

#: The range of a stored step.
LEAST_STEP, GREATEST_STEP = 2.0**-23, 480.0
#: A byte is bits 20 to 27 of a float32, less this.
_BIAS = (127 - 23) << 3


def storable_steps(steps: torch.Tensor) -> torch.Tensor:
    """Steps rounded to storable ones (ties to even), float32, those out of range to the nearest that there is."""
    bits = steps.to(torch.float32).clamp(LEAST_STEP, GREATEST_STEP).view(torch.int32)
    kept = bits + 0x7FFFF + ((bits >> 20) & 1)
    return (kept & -(1 << 20)).view(torch.float32).clamp_max(GREATEST_STEP)


def stored_steps(steps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Storable steps (`storable_steps`) as they are stored: as bytes, or in fp16 (version 1)."""
    if dtype != torch.uint8:
        return steps.to(dtype)
    return ((steps.to(torch.float32).view(torch.int32) >> 20) - _BIAS).to(torch.uint8)


def step_values(stored: torch.Tensor) -> torch.Tensor:
    """Stored steps, uint8 or fp16, in float32."""
    if stored.dtype != torch.uint8:
        return stored.to(torch.float32)
    return ((stored.to(torch.int32) + _BIAS) << 20).view(torch.float32)
