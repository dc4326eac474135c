"""Experts that stay dense go back to transformers' fused form before the model is saved.

llm-compressor saves linearized experts as ``experts.0.gate_proj.weight`` and so on. A family whose checkpoints name
them otherwise (Mixtral's ``w1``, gpt-oss's fused tensors) would load such a layer with random experts and only log it.
"""

from typing import Any

import torch
from compressed_tensors.offload import disable_offloading, update_offload_parameter
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from torch import nn

from ..sources.stacks import read_parameters
from .stored_experts import stored_matrices


def fuse_dense_experts(model: nn.Module) -> None:
    """Fuse every linearized experts module that nothing has quantized; the others keep the form they were packed in.

    Llama 4's, which transformers reads as a list of MLPs in quantized checkpoints, stay as they are.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, LinearExperts2D):
            continue
        stored = stored_matrices(module)
        if stored is not None:
            model.set_submodule(name, read_parameters(stored.experts))
        elif hasattr(module, "_source_experts_cls") and not _is_claimed(module):
            model.set_submodule(name, _fused(module))


def _is_claimed(module: LinearExperts2D) -> bool:
    return any(getattr(child, "quantization_scheme", None) is not None for child in module.modules())


def _fused(module: LinearExperts2D) -> nn.Module:
    fused: Any = module.to_experts_module()
    if not module.is_concatenated:  # llm-compressor 0.14 writes gate and up as halves for gpt-oss too
        with disable_offloading():
            halves = {name: getattr(fused, name) for name in ("gate_up_proj", "gate_up_proj_bias")}
        for name, tensor in halves.items():
            gate, up = tensor.detach().chunk(2, dim=-1)
            update_offload_parameter(fused, name, torch.stack([gate, up], dim=-1).flatten(-2))
    return fused
