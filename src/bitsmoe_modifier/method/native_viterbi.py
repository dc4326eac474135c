"""The encoder of trellis codes in C++ (viterbi.cpp): what `viterbi.encode_plain` does, much faster on a CPU."""

import ctypes
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from ..native import native_library
from ..storage.planes import WIDTHS
from ..storage.trellis import CODES, window_values

_SOURCE = Path(__file__).with_name("viterbi.cpp")
#: Costs are never NaN, and the sign of a zero is of no matter. Not -ffast-math, which changes the process's arithmetic.
_FLAGS = ("-ffp-contract=fast", "-ffinite-math-only", "-fno-signed-zeros", "-fno-trapping-math", "-Wno-psabi")
#: Sequences that one call to C++ encodes side by side.
_LANES = 16


def library() -> ctypes.CDLL | None:
    """The compiled encoder, None where there is no compiler."""
    return native_library(_SOURCE, _FLAGS)


@cache
@torch.inference_mode(False)
def _tables() -> torch.Tensor:
    """`window_values` of every width, float32 ``[9, 256]``."""
    tables = torch.zeros(max(WIDTHS) + 1, 256, dtype=torch.float32, device="cpu")
    for width in CODES:
        tables[width] = window_values(width)
    return tables


def encode(
    loaded: ctypes.CDLL,
    target: torch.Tensor,
    gain: torch.Tensor,
    begin: torch.Tensor,
    place: torch.Tensor,
    width: torch.Tensor,
    preludes: Mapping[int, int],
) -> torch.Tensor:
    """`viterbi.encode`, with the sequences' tensors one by one, in as many threads as torch has.

    The result depends on the CPU's instructions where two sequences are equally good, not on the number of threads.

    Raises:
        ValueError: when a tensor's dtype is not the one that the C++ reads, or a place lies outside of ``target``.
    """
    target, gain = target.contiguous(), gain.contiguous()
    begin, place, width = begin.contiguous(), place.contiguous(), width.contiguous()
    dtypes = (torch.float32, torch.float32, torch.int64, torch.int64, torch.int32)
    if tuple(t.dtype for t in (target, gain, begin, place, width)) != dtypes or gain.shape != target.shape:
        raise ValueError("the encoder reads float32 targets and gains of one shape, int64 places and int32 widths")
    if len(begin) != len(width) + 1 or int(begin[-1]) != len(place) or not set(width.unique().tolist()) <= set(CODES):
        raise ValueError("the encoder's sequences do not belong together")
    if len(place) and not 0 <= int(place.min()) <= int(place.max()) < target.numel():
        raise ValueError("the encoder's places lie outside of its targets")
    spans = torch.tensor([preludes.get(b, 0) for b in range(max(WIDTHS) + 1)], dtype=torch.int32, device="cpu")
    windows = torch.zeros(target.shape, dtype=torch.uint8, device="cpu")
    arrays = [ctypes.c_void_p(t.data_ptr()) for t in (target, gain, begin, place, width)]
    tables = [ctypes.c_void_p(t.data_ptr()) for t in (_tables(), spans)]
    found = ctypes.c_void_p(windows.data_ptr())
    parts = max(1, min(torch.get_num_threads(), len(width) // _LANES))

    def run(part: int) -> None:
        count = ctypes.c_int64(len(width))
        loaded.bitsmoe_encode(*arrays, count, *tables, ctypes.c_int(part), ctypes.c_int(parts), found)

    if parts == 1:
        run(0)
    else:
        list(_pool(parts).map(run, range(parts)))
    return windows


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="bitsmoe")
