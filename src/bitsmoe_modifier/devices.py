"""Where Triton kernels take the place of plain PyTorch."""

import importlib.util
import os

import torch

# found once: torch.compile cannot trace the search
_INSTALLED = all(importlib.util.find_spec(name) is not None for name in ("triton", "bitsmoe_kernels"))


def kernels_wanted(tensor: torch.Tensor) -> bool:
    """Whether kernels may run on a tensor: it is on a GPU, they are installed, BITSMOE_FORCE_PLAIN is not 1."""
    return tensor.is_cuda and _allowed()


def kernels_usable() -> bool:
    """Whether there is a GPU on which `kernels_wanted` would let them run."""
    return torch.cuda.is_available() and _allowed()


def _allowed() -> bool:
    return _INSTALLED and os.environ.get("BITSMOE_FORCE_PLAIN") != "1"
