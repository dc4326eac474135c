"""Parts of vLLM that its build for CPUs lacks, in plain PyTorch, so that what surrounds them can be tested there.

They stand in for vLLM's own GPU code and never for the plugin's.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch


def install(patch: pytest.MonkeyPatch) -> None:
    """Let vLLM on a CPU route as its GPU code does, build layers of experts without a gate, and start beside numba."""
    from vllm.model_executor.layers.fused_moe import config
    from vllm.model_executor.layers.fused_moe.router import cpu_router

    original = cpu_router.CPURouter._compute_routing

    def compute_routing(self: Any, hidden: torch.Tensor, logits: torch.Tensor, *rest: Any, **named: Any) -> Any:
        plain = not self.use_grouped_topk and self.custom_routing_function is None
        if plain and self.scoring_func in _SCORES and self.e_score_correction_bias is not None:
            return _biased_choice(self, logits)
        return original(self, hidden, logits, *rest, **named)

    patch.setattr(cpu_router.CPURouter, "_compute_routing", compute_routing)
    # the check guards vLLM's own expert kernels, of which packed experts need none
    gpu = SimpleNamespace(is_cuda_alike=lambda: True, is_xpu=lambda: False)
    patch.setattr(config, "current_platform", gpu)
    _hide_dunders()


def _hide_dunders() -> None:
    """A model file for GPUs imports numba, over whose library object vLLM's search for kernels on a CPU stumbles.

    That object has an attribute of every name, ``__dict__`` too, and ends every later engine of the process, as long as
    which this stays.
    """
    try:
        from llvmlite.binding.ffi import _lib_wrapper
    except ImportError:
        return
    original = _lib_wrapper.__getattr__
    if getattr(original, "hides_dunders", False):
        return

    def getattribute(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return original(self, name)

    getattribute.hides_dunders = True
    _lib_wrapper.__getattr__ = getattribute


_SCORES = {"softmax": lambda logits: logits.softmax(-1), "sigmoid": torch.sigmoid}


def _biased_choice(router: Any, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bias takes part in choosing the experts and not in weighting them; the CPU router leaves it out."""
    scores = _SCORES[router.scoring_func](logits.float())
    ids = (scores + router.e_score_correction_bias).topk(router.top_k, -1).indices
    weights = scores.gather(1, ids)
    if router.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * router.routed_scaling_factor, ids.int()
