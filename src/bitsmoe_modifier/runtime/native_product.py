"""`packed_product` in C++ where a compiler is: the same product in float32, an order of magnitude faster on a CPU."""

import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from ..native import native_library
from ..storage.layout import ExpertsLayout
from .packed_product import PlaneIndex, packed_product

_SOURCE = Path(__file__).with_name("packed_product.cpp")


def is_compiled(v: torch.Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether `fastest_product` multiplies ``v``, converted to ``dtype``, in C++.

    That takes float32 on a CPU, a compiler, and no gradient: the compiled product has none.
    """
    if (dtype or v.dtype) != torch.float32 or v.dtype == torch.float64 or v.device.type != "cpu":
        return False
    return not (torch.is_grad_enabled() and v.requires_grad) and native_library(_SOURCE) is not None


@torch.compiler.disable
def fastest_product(
    codes: torch.Tensor,
    steps: torch.Tensor,
    planes: PlaneIndex,
    layout: ExpertsLayout,
    side: str,
    experts: Sequence[int],
    v: torch.Tensor,
) -> torch.Tensor:
    """`packed_product`, compiled where that is possible (`is_compiled`).

    Arguments and result as there. The result depends on the CPU's instructions in its last bits, not on the number of
    threads.
    """
    library = native_library(_SOURCE) if is_compiled(v) else None
    if library is None:
        return packed_product(codes, steps, planes, layout, side, experts, v)
    inward = side == "in"
    n, m = (layout.block_size, layout.group_size) if inward else (layout.group_size, layout.block_size)
    v = v.contiguous()
    y = v.new_zeros(len(experts), 2 * layout.intermediate_size if inward else layout.rank_out)
    spans = torch.tensor([[(bounds[e], bounds[e + 1]) for bounds in planes.bounds] for e in experts], device="cpu")

    def run(begin: int, end: int) -> None:
        tensors = (planes.entries, spans[begin], codes, steps, v[begin], y[begin])
        index, span, code, step, source, target = (ctypes.c_void_p(t.data_ptr()) for t in tensors)
        sizes = map(ctypes.c_int64, (steps.element_size(), layout.quantum, n, m, inward))
        ends = ctypes.c_int64(v.shape[1]), target, ctypes.c_int64(y.shape[1])
        library.packed_product(index, span, ctypes.c_int64(end - begin), code, step, *sizes, source, *ends)

    threads = min(torch.get_num_threads(), len(experts))
    if threads < 2:
        if experts:
            run(0, len(experts))
        return y
    bounds = [len(experts) * i // threads for i in range(threads + 1)]
    list(_pool(threads).map(run, bounds[:-1], bounds[1:]))
    return y


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="bitsmoe")
