"""Decoding of trellis codes in C++ (trellis_decode.cpp) on a CPU: the same values as PyTorch's operations give."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from ..native import native_library
from .trellis import window_values

_SOURCE = Path(__file__).with_name("trellis_decode.cpp")


def library() -> ctypes.CDLL | None:
    """The compiled decoder, None where there is no compiler."""
    return native_library(_SOURCE)


@torch.compiler.disable
def decode_tiles(
    loaded: ctypes.CDLL,
    payload: torch.Tensor,
    offset: torch.Tensor,
    width: int,
    scale: torch.Tensor,
    by_row: bool,
    place: torch.Tensor,
    columns: int,
    out: torch.Tensor,
) -> None:
    """Decode tiles of one width and shape into ``out``, in as many threads as torch has. All on the CPU.

    Args:
        loaded: `library`.
        payload: uint8 1-D, a side's whole payload.
        offset: int64 ``[tiles]``: byte at which each begins.
        width: bits per weight, > 0.
        scale: float32 ``[tiles, rows]`` (``by_row``) or ``[tiles, columns]``.
        by_row: whose scales they are.
        place: int64 ``[tiles, rows]``: element of ``out`` at which each row begins.
        columns: of a tile.
        out: float32, contiguous; written to.

    Raises:
        ValueError: when a tile lies outside of the payload or of ``out``, or a dtype or shape is another one.
    """
    tiles, rows = place.shape
    size = rows * columns * width // 8
    dtypes = tuple(t.dtype for t in (payload, offset, scale, place, out))
    if dtypes != (torch.uint8, torch.int64, torch.float32, torch.int64, torch.float32) or not out.is_contiguous():
        raise ValueError(f"the decoder reads and writes other dtypes than {dtypes}")
    if rows % 16 or columns % 2 or offset.shape != (tiles,) or scale.shape != (tiles, rows if by_row else columns):
        raise ValueError("the decoder's tiles and scales do not belong together")
    if tiles and (int(offset.min()) < 0 or int(offset.max()) + size > payload.numel()):
        raise ValueError("the decoder's tiles lie outside of the payload")
    if tiles and (int(place.min()) < 0 or int(place.max()) + columns > out.numel()):
        raise ValueError("the decoder's rows lie outside of its result")
    payload, offset, scale, place = (t.contiguous() for t in (payload, offset, scale, place))
    table = window_values(width).contiguous()
    parts = max(1, min(torch.get_num_threads(), tiles))
    bounds = [tiles * part // parts for part in range(parts + 1)]

    def run(begin: int, end: int) -> None:
        of_tiles = ctypes.c_void_p(offset[begin:].data_ptr()), ctypes.c_int64(end - begin), ctypes.c_int(width)
        sizes = ctypes.c_int64(rows), ctypes.c_int64(columns), ctypes.c_void_p(table.data_ptr())
        scales = ctypes.c_void_p(scale[begin:].data_ptr()), ctypes.c_int(by_row)
        ends = ctypes.c_void_p(place[begin:].data_ptr()), ctypes.c_void_p(out.data_ptr())
        loaded.bitsmoe_trellis_decode(ctypes.c_void_p(payload.data_ptr()), *of_tiles, *sizes, *scales, *ends)

    if parts == 1:
        run(0, tiles)
    else:
        list(_pool(parts).map(run, bounds[:-1], bounds[1:]))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="bitsmoe")
