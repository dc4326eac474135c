"""Folders that transformers saved, under the names that they are published with where it has others."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

_RATIOS = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}


def deepseek_v4(folder: Path) -> None:
    """DeepSeek-V4's: of the tensors in ``model.safetensors``, and in config.json."""
    file, path = folder / "model.safetensors", folder / "config.json"
    save_file({_deepseek_v4(key): tensor for key, tensor in load_file(file).items()}, file, {"format": "pt"})
    config = json.loads(path.read_text())
    config["compress_ratios"] = [_RATIOS[kind] for kind in config.pop("layer_types")]
    config["num_hash_layers"] = config.pop("mlp_layer_types").count("hash_moe")
    config["qk_rope_head_dim"] = int(config["head_dim"] * config.pop("partial_rotary_factor"))
    config.pop("rope_parameters")
    path.write_text(json.dumps({**config, "rope_scaling": None}))


def _deepseek_v4(key: str) -> str:
    for ours, published in (
        ("embed_tokens.", "embed."),
        ("hc_head.hc_", "hc_head_"),
        (".attn.norm.", ".attn.kv_norm."),
    ):
        key = key.removeprefix("model.").replace(ours, published)
    return key
