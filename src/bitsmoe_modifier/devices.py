"""Where Triton kernels take the place of plain PyTorch."""

import importlib.util
import os

import torch
from torch import nn

# found once: torch.compile cannot trace the search
_INSTALLED = all(importlib.util.find_spec(name) is not None for name in ("triton", "bitsmoe_kernels"))


def kernels_wanted(tensor: torch.Tensor) -> bool:
    """Whether kernels may run on a tensor: it is on a GPU, they are installed, BITSMOE_FORCE_PLAIN is not 1."""
    return tensor.is_cuda and _allowed()


def kernels_usable() -> bool:
    """Whether there is a GPU on which `kernels_wanted` would let them run."""
    return torch.cuda.is_available() and _allowed()


def is_offloaded(module: nn.Module) -> bool:
    """Whether a module's tensors come and go with every call, by accelerate or compressed-tensors: kernels would hold
    on to them. accelerate's hook alone says nothing: a model on several GPUs has one on every module."""
    hook = getattr(module, "_hf_hook", None)
    offloading = any(getattr(one, "offload", False) for one in getattr(hook, "hooks", (hook,)))
    return offloading or not isinstance(module._parameters, dict)


def _allowed() -> bool:
    return _INSTALLED and os.environ.get("BITSMOE_FORCE_PLAIN") != "1"
