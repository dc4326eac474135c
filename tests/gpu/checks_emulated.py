"""The emulated GPU itself: it refuses what CUDA refuses, and allows what CUDA allows."""

import copy
import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from emulated import GPU, GPUTensor, emulated_gpu

HERE, NUMBERS, NUMBER = torch.arange(4.0), torch.tensor([0, 2]), torch.tensor(2.0)

REFUSED: dict[str, Callable[[torch.Tensor], object]] = {
    "add": lambda x: x + HERE,
    "add in place": lambda x: HERE.clone().add_(x),
    "to a number in place": lambda x: NUMBER.clone().add_(x.sum()),
    "compare": lambda x: x == HERE,
    "equal": lambda x: torch.equal(x, HERE),
    "close": lambda x: torch.allclose(x, HERE),
    "product": lambda x: x @ HERE,
    "stack": lambda x: torch.stack([x, HERE]),
    "stack of numbers": lambda x: torch.stack([x.sum(), NUMBER]),
    "where": lambda x: torch.where(HERE > 1, x, 0.0),
    "index_select": lambda x: x.index_select(0, NUMBERS),
    "gather": lambda x: x.gather(0, NUMBERS),
    "scatter": lambda x: x.scatter(0, NUMBERS, 1.0),
    "index_add_": lambda x: x.clone().index_add_(0, NUMBERS, x[:2]),
    "index of a tensor here": lambda x: HERE[x.long()],
    "values from here": lambda x: x.index_put((NUMBERS,), torch.ones(2)),
    "searchsorted": lambda x: torch.searchsorted(x, HERE),
    "bincount of weights": lambda x: torch.bincount(x.long(), weights=HERE),
    "clamp": lambda x: x.clamp(min=NUMBER, max=NUMBER),
    "result given": lambda x: torch.add(x, x, out=torch.empty(4)),
    "random numbers": lambda x: torch.empty_like(x).normal_(generator=torch.Generator()),
    "whole-number product": lambda x: x.long()[None] @ x.long()[:, None],
    "numpy": lambda x: x.numpy(),
    "asarray": lambda x: np.asarray(x),
    "address": lambda x: ctypes.c_void_p(x.data_ptr()),
    "storage": lambda x: x.untyped_storage(),
}

ALLOWED: dict[str, tuple[Callable[[torch.Tensor], object], object]] = {
    "a number from here": (lambda x: x * NUMBER, [0.0, 2.0, 4.0, 6.0]),
    "from a number": (lambda x: NUMBER - x, [2.0, 1.0, 0.0, -1.0]),
    "where of numbers": (lambda x: torch.where(x > 1, NUMBER, torch.tensor(0.0)), [0.0, 0.0, 2.0, 2.0]),
    "index from here": (lambda x: x[NUMBERS], [0.0, 2.0]),
    "mask from here": (lambda x: x[HERE > 2], [3.0]),
    "number written": (lambda x: x.index_put((NUMBERS,), NUMBER), [2.0, 1.0, 2.0, 3.0]),
    "copy from here": (lambda x: x.clone().copy_(HERE + 1), [1.0, 2.0, 3.0, 4.0]),
    "moved in passing": (lambda x: HERE.to(x) + x, [0.0, 2.0, 4.0, 6.0]),
    "made there": (lambda x: torch.arange(4, device=x.device) + x, [0.0, 2.0, 4.0, 6.0]),
    "listed there": (lambda x: torch.tensor([1.0], device=GPU) + x, [1.0, 2.0, 3.0, 4.0]),
    "like": (lambda x: torch.ones_like(x) + x.new_zeros(4), [1.0] * 4),
    "in place, seen through a view": (lambda x: _changed(x.clone()), [0.0, 7.0, 7.0, 3.0]),
    "shape in place": (lambda x: x.clone().unsqueeze_(0), [[0.0, 1.0, 2.0, 3.0]]),
    "result given": (lambda x: torch.add(x, x, out=torch.empty_like(x)), [0.0, 2.0, 4.0, 6.0]),
    "empty for the result": (lambda x: torch.add(x, x, out=x.new_empty(0)), [0.0, 2.0, 4.0, 6.0]),
    "fewer at once": (lambda x: x.nonzero()[:, 0], [1, 2, 3]),
}


def _changed(x: torch.Tensor) -> torch.Tensor:
    x.view(2, 2)[:, 1:].flatten()  # a copy
    x[1:3].fill_(7.0)
    return x


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_cuda_refuses(name: str) -> None:
    with emulated_gpu(), pytest.raises((RuntimeError, TypeError), match=r"device|cuda|pointer"):
        REFUSED[name](HERE.to(GPU))


@pytest.mark.parametrize("name", ALLOWED)
def test_allows_what_cuda_allows(name: str) -> None:
    run, expected = ALLOWED[name]
    with emulated_gpu():
        made = run(HERE.to(GPU))
        assert isinstance(made, GPUTensor)
        assert made.device == GPU
        assert made.is_cuda
        assert made.tolist() == expected == made.cpu().tolist()


def test_copies_do_not_share_memory() -> None:
    with emulated_gpu():
        x = torch.ones(2)
        there = x.to(GPU)
        back = there.cpu()
        x.zero_(), back.zero_()
        assert there.tolist() == [1.0, 1.0]
        assert type(back) is torch.Tensor
        assert back.numpy().tolist() == [0.0, 0.0]


def test_other_threads_and_lists_make_tensors_there() -> None:
    with emulated_gpu(), ThreadPoolExecutor(1) as pool:
        there = pool.submit(lambda: (HERE.to(GPU, torch.bfloat16), torch.tensor([[1, 2]], device=GPU))).result()
        assert [(t.device, t.tolist()) for t in there] == [(GPU, HERE.tolist()), (GPU, [[1, 2]])]


def test_modules_and_gradients() -> None:
    with emulated_gpu():
        module = torch.nn.Linear(4, 2).to(GPU)
        twin = copy.deepcopy(module)
        assert isinstance(twin.weight, torch.nn.Parameter)
        assert twin.weight.device == GPU
        module(HERE.to(GPU)).sum().backward()
        assert module.weight.grad is not None
        assert module.weight.grad.device == GPU
        assert module.weight.grad.tolist() == [HERE.tolist()] * 2
        with torch.inference_mode(), pytest.raises(RuntimeError, match="same device"):
            module(HERE)
    assert torch.zeros(2).device.type == "cpu"
