"""Trellis codes: what a window of a bit stream stands for, and how the streams lie in bytes (docs/format.md).

A *sequence* is the T weights that the rows of one column of a factor hold. It is stored as a circular stream of ``b``
bits per weight, and the code of weight t is a *window* of it, bits ``[b t, b t + 8)``: neighbours share bits, so that
every weight has 256 values to choose from, of which all but ``2**b`` are ruled out by the weights before it
(trellis-coded quantization; QTIP, arXiv 2406.11235). No table is stored: a value is an odd polynomial of the window
times an odd number, which a GPU computes in a few instructions on two windows at once.
"""

from functools import cache

import torch

from .planes import WIDTHS

#: Bits of a window.
WINDOW_BITS = 8
_WINDOWS = 1 << WINDOW_BITS

#: By width: the multiplier m, and α and γ of ``r ((r² + α)² + γ)``. Found by search for the least error of normally
#: distributed weights (benchmarks/trellis.py measures them).
CODES = {
    1: (123, 30 / 256, 576 / 256),
    2: (69, -61 / 256, 201 / 256),
    3: (95, -58 / 256, 173 / 256),
    4: (81, -59 / 256, 157 / 256),
    6: (95, -43 / 256, 145 / 256),
    8: (1, 8 / 256, 241 / 256),
}

#: Rows whose weights a thread of a tensor core's tile does not hold: it has every eighth.
_LANES = 8
#: Bits of a sequence's stream in a 32-bit word; the other half is its neighbour's.
_HALF = 16


@cache
@torch.inference_mode(False)
def value_tables(device: torch.device) -> torch.Tensor:
    """Values of all windows at all widths, float32 ``[9 * 256]``, row b for width b; 0 where b is no width > 0."""
    tables = torch.zeros(max(WIDTHS) + 1, _WINDOWS, dtype=torch.float64, device="cpu")
    window = torch.arange(_WINDOWS, device="cpu")
    for width, (multiplier, alpha, gamma) in CODES.items():
        r = (2 * (multiplier * window % _WINDOWS) - (_WINDOWS - 1)).double() / _WINDOWS
        square = _half(r * r + alpha)
        tables[width] = _half(r * _half(square * square + gamma))
    return tables.float().flatten().to(device)


def _half(x: torch.Tensor) -> torch.Tensor:
    """Float64 values rounded to float16 ones, as a fused multiply-add of halves rounds them."""
    return x.half().double()


def window_values(width: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """What the 256 windows stand for at a width > 0, in units of the step: float32 ``[256]``, exact in float16."""
    return value_tables(torch.device(device)).view(-1, _WINDOWS)[width]


def trellis_values(windows: torch.Tensor, width: torch.Tensor | int) -> torch.Tensor:
    """Values of windows in units of the step, float32; 0 at width 0.

    Args:
        windows: uint8, any shape.
        width: of each, broadcastable to ``windows``.
    """
    place = windows.int() + (width.int() if isinstance(width, torch.Tensor) else width) * _WINDOWS
    return value_tables(windows.device).index_select(0, place.flatten()).view(windows.shape)


@cache
@torch.inference_mode(False)
def sequence_order(length: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The row at each position of a sequence of ``length`` rows, int64 ``[length]``.

    Every eighth row in turn: rows 0, 8, 16, …, then 1, 9, 17, …. Of a tensor core's tiles of 8 or 16 rows one thread
    holds just these, so that it decodes consecutive weights of a stream.
    """
    return torch.arange(length, device=device).view(-1, _LANES).T.flatten()


def pack_windows(windows: torch.Tensor, width: int) -> torch.Tensor:
    """Streams of the columns' sequences, from windows that share the bits they must.

    Args:
        windows: uint8 ``[N, m, n]``: a sequence along the ``m`` rows, a multiple of 16, in each of ``n`` columns, an
            even number.
        width: bits per weight, > 0.

    Returns:
        uint8 ``[N, width * m * n / 8]``: for each pair of columns the 32-bit words of their streams, 16 bits of the
        even column below 16 bits of the odd one.

    Raises:
        ValueError: when neighbouring windows disagree on the bits that they share.
    """
    count, m, n = windows.shape
    if m % _HALF or n % 2:
        raise ValueError(f"sequences of {m} weights in {n} columns; lengths are multiples of 16, columns come in pairs")
    turned = windows.transpose(1, 2)[:, :, sequence_order(m, windows.device)]
    following = turned.roll(-1, 2)
    if bool((turned >> width != following & ((_WINDOWS >> width) - 1)).any()):
        raise ValueError("windows of a sequence disagree on the bits that they share")
    # a byte of the stream is a window itself, or the end of one and the beginning of the next
    start = WINDOW_BITS * torch.arange(m * width // WINDOW_BITS, device=windows.device)
    weight, over = start // width, (start % width).to(torch.uint8)
    octets = turned[:, :, weight] >> over | torch.where(over > 0, following[:, :, weight] << (width - over), 0)
    halves = octets.view(count, n // 2, 2, -1, 2)
    return halves.transpose(2, 3).reshape(count, -1)


def unpack_windows(packed: torch.Tensor, width: int, m: int, n: int) -> torch.Tensor:
    """Inverse of `pack_windows`: uint8 ``[N, width * m * n / 8]`` to uint8 ``[N, m, n]``."""
    count, device = len(packed), packed.device
    octets = packed.view(count, n // 2, -1, 2, 2).transpose(2, 3).reshape(count, n, -1, 2).int()
    halves = octets[..., 0] | octets[..., 1] << 8
    both = halves | halves.roll(-1, 2) << _HALF
    start = torch.empty(m, dtype=torch.int64, device=device)
    start[sequence_order(m, device)] = width * torch.arange(m, device=device)
    windows = both.index_select(2, start // _HALF) >> (start % _HALF).int()
    return windows.to(torch.uint8).transpose(1, 2)
