"""Faults of llm-compressor 0.14 that this package meets in other people's models; importing this module mends them.

- Norms that multiply by ``1 + weight`` (Qwen3-Next, Qwen3.5, Gemma) are replaced by plain ones during calibration and
  put back as ``(1 + weight) - 1``, which rounds a bfloat16 weight to a multiple of 2⁻⁸ or more. A norm that no modifier
  has touched gets its own weight back.
- Linearizing a model keeps the fused experts of all layers until the last one is done, which doubles the memory of
  an MoE model. `linearize` lets go of each layer's.
- Llama 4's experts are linearized from ``config.text_config``, which a text-only Llama 4 does not have.
"""

import importlib
from types import SimpleNamespace
from typing import Any

import torch
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.linearize import get_non_linearized_moes
from llmcompressor.modeling.moe.llama4 import Llama4LinearExperts
from llmcompressor.modeling.offset_norm import CalibrationOffsetNorm
from torch import nn


def _install_norms() -> None:
    restore = CalibrationOffsetNorm.restore
    if getattr(restore, "exact", False):
        return

    def restore_exactly(norm: CalibrationOffsetNorm, original: Any) -> nn.Module:
        untouched = (1.0 + original.weight.data.float()).to(original.weight.dtype)
        if torch.equal(norm.weight.data.to(untouched.device), untouched):
            return original
        return restore(norm, original)

    restore_exactly.exact = True  # type: ignore[attr-defined]
    CalibrationOffsetNorm.restore = restore_exactly  # type: ignore[method-assign, assignment]


def linearize(model: nn.Module) -> nn.Module:
    """What llm-compressor's `linearize_moe` does, with one layer's experts in memory twice instead of all."""
    config: Any
    for name in [name for name, _ in get_non_linearized_moes(model)]:
        experts: Any = model.get_submodule(name)
        kind = LinearExperts2D.get_linear_experts_cls(type(experts))
        config = getattr(experts, "config", model.config)
        model.set_submodule(name, kind.from_experts_module(experts, config))
    return model


def _install_llama4() -> None:
    original = Llama4LinearExperts.from_experts_module.__func__  # type: ignore[attr-defined]
    if getattr(original, "takes_text_config", False):
        return

    def from_experts_module(cls: type[Llama4LinearExperts], experts: nn.Module, config: Any) -> Any:
        whole = config if hasattr(config, "text_config") else SimpleNamespace(text_config=config)
        return original(cls, experts, whole)

    from_experts_module.takes_text_config = True  # type: ignore[attr-defined]
    Llama4LinearExperts.from_experts_module = classmethod(from_experts_module)  # type: ignore[method-assign, assignment]


_install_norms()
_install_llama4()
# a function of the same name hides the module as an attribute of its package
_oneshot: Any = importlib.import_module("llmcompressor.entrypoints.oneshot")
_oneshot.linearize_moe = linearize
