"""Tiny random checkpoints, written as `oneshot` does but without llm-compressor, which vLLM's environment lacks."""

from collections.abc import Callable
from pathlib import Path

import torch
from compressed_tensors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStatus,
    initialize_module_for_quantization,
)
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from helpers import _COMMON, _SPECIFIC, RandomLayer, pack_randomly

# vLLM's latent attention has a kernel for these sizes alone on CPU
_LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32}

#: Sizes that vLLM's CPU attention has kernels for, and at least two groups of 16 along I for two tensor-parallel ranks.
_SIZES: dict[str, dict[str, object]] = {
    "qwen3_moe": {"head_dim": 32},
    "mixtral": {"head_dim": 32, "intermediate_size": 64},
    "olmoe": {"num_attention_heads": 2},
    "deepseek_v2": {
        **_SPECIFIC["deepseek_v3"],
        **_LATENT,
        "topk_method": "greedy",
        "n_group": 1,
        "q_lora_rank": None,
    },
    "deepseek_v3": {**_LATENT, "topk_method": "noaux_tc"},
}


def random_model(architecture: str, seed: int = 0) -> PreTrainedModel:
    """A dense random model of the architecture, whose next tokens are far from equally likely."""
    sizes = {**_COMMON, **_SPECIFIC.get(architecture, {}), **_SIZES[architecture]}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.4 if name == "lm_head.weight" else 0.1)
    return model.eval()


def save_packed(model: PreTrainedModel, folder: Path) -> Path:
    """Write a model whose experts are packed (and whose other schemes are attached) with its config."""
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    return folder


def packed_checkpoint(
    architecture: str, folder: Path, *, names: list[str] | None = None, w4a16: bool = False, **layer: object
) -> Path:
    """A random model with random packed experts (see `helpers.random_layer`), and W4A16 attention on request."""
    model = random_model(architecture)
    if w4a16:
        quantize_attention(model)
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


def quantize_attention(model: PreTrainedModel) -> None:
    """Give the attention's projections a W4A16 scheme with round-to-nearest scales, as GPTQModifier attaches it."""
    arguments = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=32, symmetric=True)
    scheme = QuantizationScheme(targets=["re:.*self_attn\\.[qkvo]_proj$"], weights=arguments)
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "k_proj", "v_proj", "o_proj")):
            initialize_module_for_quantization(module, scheme)
            groups = module.weight.detach().unflatten(1, (-1, 32))
            scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
            module.weight_scale.data.copy_(scale)
            if hasattr(module, "weight_zero_point"):
                module.weight_zero_point.data.copy_(zero_point)
            module.quantization_status = QuantizationStatus.FROZEN


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite a checkpoint's only safetensors file after ``change`` has edited its tensors."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def add_tokenizer(folder: Path) -> None:
    """Give a checkpoint a tokenizer of one word per token, ``t0`` to ``t127``."""
    words = {f"t{i}": i for i in range(128)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0", bos_token="t1", eos_token="t2")
    fast.save_pretrained(folder)
