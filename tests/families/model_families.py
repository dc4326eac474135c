"""Tiny random models of the MoE families of transformers: the rows of the matrix in test_families.py.

`config_of` sets the sizes that configs share, under whichever of their names a config has; a family's own ``sizes`` set
the rest. The models have two MoE layers, 8 experts of 48 × 64 (I × H) and about 100 thousand weights.
"""

from dataclasses import dataclass, field

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

_EXPERTS = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8)
_CHOICES = dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2)
#: Sizes by the names that configs have for them.
_COMMON: dict[str, object] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "intermediate_size": 48,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "shared_intermediate_size": 48,
    "sliding_window": 16,
    "num_nextn_predict_layers": 0,
    **_EXPERTS,
    **_CHOICES,
}
#: Multi-head latent attention.
_LATENT: dict[str, object] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
#: Attention that picks its keys.
_SPARSE: dict[str, object] = {**_LATENT, "index_topk": 8, "index_head_dim": 16, "index_n_heads": 2}
#: Gated linear attention in the first layer.
_LINEAR: dict[str, object] = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
#: A dense layer before the MoE layers, and its own width.
_DENSE: dict[str, object] = {"num_hidden_layers": 3, "intermediate_size": 96}
_FIRST: dict[str, object] = {**_DENSE, "first_k_dense_replace": 1}
_LISTED: dict[str, object] = {**_DENSE, "mlp_layer_types": ["dense", "sparse", "sparse"]}
_GROUPED: dict[str, object] = {"n_group": 2, "topk_group": 1}
_MAMBA_AND_ATTENTION = ["mamba", "attention"]


@dataclass(frozen=True)
class Family:
    """A row of the matrix.

    Attributes:
        model_type: as in config.json.
        sizes: fields of its config beyond the common ones.
        refusal: for a family that cannot be quantized, words of the message that says so.
        fast: whether `make test` runs it too; the rest is left to `make test-slow`.
    """

    model_type: str
    sizes: dict[str, object] = field(default_factory=dict)
    refusal: str = ""
    fast: bool = False


_NOT_COMMON = "does not follow transformers' common experts interface"

FAMILIES = (
    Family("afmoe", {"num_hidden_layers": 3}),
    Family("axk1", {**_LATENT, **_GROUPED, **_FIRST}),
    Family("axk2", {**_SPARSE, **_LISTED, "gated_norm_rank": 4}),
    Family("cohere2_moe", {"mlp_layer_types": ["sparse"] * 2, "layer_types": ["sliding_attention", "full_attention"]}),
    Family("deepseek_v2", {**_LATENT, **_FIRST}),
    Family("deepseek_v3", {**_LATENT, **_GROUPED, **_FIRST}),
    Family("deepseek_v32", {**_SPARSE, **_GROUPED, **_LISTED}),
    Family("deepseek_v4", fast=True),
    Family("dots1", {**_FIRST, "n_shared_experts": 1}),
    Family("ernie4_5_moe", {**_DENSE, "moe_layer_end_index": 2}),
    Family("exaone_moe", _LISTED),
    Family("flex_olmo"),
    Family("gemma4_text", {"enable_moe_block": True, "intermediate_size": 96, "vocab_size_per_layer_input": 128}),
    Family("glm4_moe", _FIRST),
    Family("glm4_moe_lite", {**_LATENT, **_LISTED}),
    Family("glm_moe_dsa", {**_SPARSE, **_LISTED}),
    Family("gpt_oss", fast=True),
    Family("granitemoe"),
    Family("granitemoe_swa"),
    Family("granitemoehybrid", {"mamba_n_heads": 8, "mamba_d_head": 16, "layer_types": _MAMBA_AND_ATTENTION}),
    Family("granitemoeshared"),
    Family("hunyuan_v1_moe"),
    Family("hy_v3", _LISTED),
    Family("hy_v4", {**_SPARSE, **_LISTED}),
    Family("jamba", {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2, "mamba_dt_rank": 8}),
    Family(
        "kimi_linear",
        {
            **_LATENT,
            **_LISTED,
            "q_lora_rank": None,
            "linear_head_dim": 16,
            "linear_num_heads": 4,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
    Family("laguna", _LISTED, fast=True),
    Family("lfm2_moe", {**_DENSE, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]}, fast=True),
    Family("llama4_text", {"intermediate_size_mlp": 96}, fast=True),
    Family("mellum"),
    Family("mimo_v2_flash", {**_LISTED, "v_head_dim": 16}),
    Family("minimax", {"layer_types": ["linear_attention", "full_attention"], "block_size": 16}),
    Family("minimax_m2"),
    Family("mixtral", fast=True),
    Family("olmoe"),
    Family("phimoe"),
    Family("qwen2_moe", {"intermediate_size": 96}),
    Family("qwen3_5_moe_text", _LINEAR),
    Family("qwen3_moe", {"intermediate_size": 96}),
    Family("qwen3_next", _LINEAR, fast=True),
    Family(
        "qwen4_exp_text",
        {
            **_LINEAR,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        },
    ),
    Family("solar_open"),
    Family("zaya", {"num_experts_per_tok": 1, "router_hidden_size": 16}),
    Family(
        "dbrx",
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 2},
        },
        refusal=f"DbrxExperts .* {_NOT_COMMON}",
        fast=True,
    ),
    Family("jetmoe", {"kv_channels": 16}, refusal=f"JetMoeParallelExperts .* {_NOT_COMMON}"),
    Family(
        "longcat_flash",
        {
            **_LATENT,
            "num_layers": 2,
            "num_hidden_layers": 4,
            "ffn_hidden_size": 96,
            "expert_ffn_hidden_size": 48,
            "zero_expert_num": 2,
        },
        refusal=f"LongcatFlashExperts .* {_NOT_COMMON}",
    ),
    Family(
        "nemotron_h",
        {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
            "moe_shared_expert_intermediate_size": 48,
        },
        refusal="have no gate projection",
        fast=True,
    ),
)


def config_of(family: Family) -> PreTrainedConfig:
    """The family's config at the sizes above."""
    kind = CONFIG_MAPPING[family.model_type]
    known = {*kind().to_dict(), *kind.attribute_map}
    common = {name: value for name, value in _COMMON.items() if name in known}
    return kind(**{**common, **family.sizes})


def model_of(family: Family, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of the family, in evaluation mode: norms about 1, everything else about 0 and none of it zero."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family), dtype=dtype)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and parameter.ndim == 1), std=0.1)
    return model.eval()
