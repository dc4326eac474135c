"""Random models and layers of a given shape, for the benchmarks of time and memory: weights that compress to nothing in
particular, activations that are as unequal over directions as those of trained models."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig

#: experts in a file
_PER_FILE = 16


def anisotropic_inputs(tokens: int, hidden: int, generator: torch.Generator) -> torch.Tensor:
    """Inputs ``[T, H]`` whose standard deviations over a random basis fall from 1 to 1/H (a power law of the index)."""
    scale = torch.arange(1, hidden + 1, dtype=torch.float32).rsqrt()
    mixing, _ = torch.linalg.qr(torch.randn(hidden, hidden, generator=generator))
    return torch.randn(tokens, hidden, generator=generator) * scale @ mixing.T


def save_model(
    folder: Path,
    *,
    layers: int,
    experts: int,
    hidden: int,
    width: int,
    choices: int = 8,
    vocab: int = 4096,
    stored: str = "bf16",
) -> int:
    """Write a random Qwen3-MoE, some experts per file so that no more than those are ever in memory.

    Args:
        stored: "bf16"; or "fp8", 8-bit floats with a scale per block of 128 × 128, or "mxfp4", 4-bit floats in int8
            with a scale of E8M0 per 32, for the experts: published as DeepSeek-V3 and V4 are.

    Returns:
        bytes of its tensors.
    """
    config = Qwen3MoeConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=vocab,
        num_experts=experts,
        num_experts_per_tok=choices,
        moe_intermediate_size=width,
        intermediate_size=width,
        architectures=["Qwen3MoeForCausalLM"],
        dtype=torch.bfloat16,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    if stored != "bf16":
        content = json.loads((folder / "config.json").read_text())
        content["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
        (folder / "config.json").write_text(json.dumps(content))
    words = Tokenizer(models.WordLevel({f"word{i}": i for i in range(vocab)}, unk_token="word0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).bfloat16()

    index: dict[str, str] = {}

    def write(name: str, tensors: dict[str, torch.Tensor]) -> int:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
        return sum(t.nbytes for t in tensors.values())

    ones = torch.ones(hidden, dtype=torch.bfloat16)
    total = write(
        "embedding.safetensors",
        {
            "model.embed_tokens.weight": anisotropic_inputs(vocab, hidden, generator).bfloat16(),
            "lm_head.weight": matrix(vocab, hidden),
            "model.norm.weight": ones,
        },
    )
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors = {
            f"{prefix}.self_attn.q_proj.weight": matrix(512, hidden),
            f"{prefix}.self_attn.k_proj.weight": matrix(128, hidden),
            f"{prefix}.self_attn.v_proj.weight": matrix(128, hidden),
            f"{prefix}.self_attn.o_proj.weight": matrix(hidden, 512),
            f"{prefix}.self_attn.q_norm.weight": torch.ones(64, dtype=torch.bfloat16),
            f"{prefix}.self_attn.k_norm.weight": torch.ones(64, dtype=torch.bfloat16),
            f"{prefix}.input_layernorm.weight": ones.clone(),
            f"{prefix}.post_attention_layernorm.weight": ones.clone(),
            f"{prefix}.mlp.gate.weight": matrix(experts, hidden),
        }
        total += write(f"layer-{layer}.safetensors", tensors)
        for first in range(0, experts, _PER_FILE):
            tensors = {}
            for expert in range(first, min(first + _PER_FILE, experts)):
                for name, (rows, columns) in (
                    ("gate_proj", (width, hidden)),
                    ("up_proj", (width, hidden)),
                    ("down_proj", (hidden, width)),
                ):
                    key = f"{prefix}.mlp.experts.{expert}.{name}"
                    if stored == "bf16":
                        tensors[f"{key}.weight"] = matrix(rows, columns)
                    else:
                        tensors.update(low_precision(key, rows, columns, stored, generator))
            total += write(f"layer-{layer}-experts-{first}.safetensors", tensors)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    return total


def low_precision(
    key: str, rows: int, columns: int, stored: str, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Random codes of a matrix, of every finite value alike, and scales that make its elements about 1/√columns."""
    scale = columns**-0.5
    if stored == "fp8":
        codes = torch.randint(0, 127, (rows, columns), generator=generator, dtype=torch.uint8)  # 127 is NaN
        codes |= torch.randint(0, 2, (rows, columns), generator=generator, dtype=torch.uint8) << 7
        scales = torch.full((-(-rows // 128), -(-columns // 128)), scale / 100)
        return {f"{key}.weight": codes.view(torch.float8_e4m3fn), f"{key}.weight_scale_inv": scales}
    codes = torch.randint(-128, 128, (rows, columns // 2), generator=generator, dtype=torch.int8)
    exponent = round(math.log2(scale / 3)) + 127
    scales = torch.full((rows, columns // 32), exponent, dtype=torch.uint8)
    return {f"{key}.weight": codes, f"{key}.scale": scales.view(torch.float8_e8m0fnu)}


def random_text(words: int, vocab: int = 4096) -> str:
    """Text of the tokenizer that `save_model` writes, every word a token, drawn uniformly."""
    ids = torch.randint(vocab, (words,), generator=torch.Generator().manual_seed(0))
    return " ".join(f"word{i}" for i in ids.tolist())
