"""Tiny random checkpoints, written as `oneshot` writes them but without llm-compressor, which vLLM's environment lacks."""

from pathlib import Path

import torch
from compressed_tensors import ModelCompressor
from helpers import RandomLayer, pack_randomly, tiny_model
from transformers import PreTrainedModel

#: Sizes that vLLM's CPU attention has kernels for, and two groups of 16 along I for two tensor-parallel ranks.
_SIZES: dict[str, dict[str, object]] = {
    "qwen3_moe": {"head_dim": 32},
    "mixtral": {"head_dim": 32, "intermediate_size": 64},
    "olmoe": {"num_attention_heads": 2},
    "deepseek_v2": {
        "n_routed_experts": 8,
        "moe_intermediate_size": 32,
        "intermediate_size": 96,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
        "n_shared_experts": 1,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 32,
        "num_key_value_heads": 4,
    },
    "deepseek_v3": {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32},
}


def random_model(architecture: str, **overrides: object) -> PreTrainedModel:
    """A dense random model of the architecture."""
    return tiny_model(architecture, **{**_SIZES[architecture], **overrides})


def save_packed(model: PreTrainedModel, folder: Path) -> Path:
    """Write a model whose experts are packed (and whose other schemes are attached) with its config."""
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    return folder


def packed_checkpoint(architecture: str, folder: Path, *, names: list[str] | None = None, **layer: object) -> Path:
    """A random model with random packed experts (see `helpers.random_layer`)."""
    model = random_model(architecture)
    pack_randomly(model, names, **layer)
    return save_packed(model, folder)


def decoded_checkpoint(architecture: str, folder: Path, **layer: object) -> Path:
    """The dense model that `packed_checkpoint` with the same arguments stands for."""
    model, packed = random_model(architecture), random_model(architecture)
    for name, expected in pack_randomly(packed, **layer).items():
        insert_dense(model.get_submodule(name), expected)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def insert_dense(experts: torch.nn.Module, layer: RandomLayer) -> None:
    """Give one of transformers' fused experts modules the weights that a packed layer stands for."""
    gate_up, down = layer.dense()
    experts.gate_up_proj.copy_(gate_up)
    experts.down_proj.copy_(down)
