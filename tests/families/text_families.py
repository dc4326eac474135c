"""The rows of the matrix in test_families.py that are language models and nothing else."""

from building import Family

#: Multi-head latent attention.
LATENT: dict[str, object] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
#: Attention that picks its keys.
SPARSE: dict[str, object] = {**LATENT, "index_topk": 8, "index_head_dim": 16, "index_n_heads": 2}
#: Gated linear attention in the first layer.
LINEAR: dict[str, object] = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
#: A dense layer before the MoE layers, and its own width.
DENSE: dict[str, object] = {"num_hidden_layers": 3, "intermediate_size": 96}
FIRST: dict[str, object] = {**DENSE, "first_k_dense_replace": 1}
LISTED: dict[str, object] = {**DENSE, "mlp_layer_types": ["dense", "sparse", "sparse"]}
GROUPED: dict[str, object] = {"n_group": 2, "topk_group": 1}
_MAMBA_AND_ATTENTION = ["mamba", "attention"]

NOT_COMMON = "does not follow transformers' common experts interface"

TEXT_FAMILIES = (
    Family("afmoe", {"num_hidden_layers": 3}),
    Family("axk1", {**LATENT, **GROUPED, **FIRST}),
    Family("axk2", {**SPARSE, **LISTED, "gated_norm_rank": 4}),
    Family("cohere2_moe", {"mlp_layer_types": ["sparse"] * 2, "layer_types": ["sliding_attention", "full_attention"]}),
    Family("deepseek_v2", {**LATENT, **FIRST}),
    Family("deepseek_v3", {**LATENT, **GROUPED, **FIRST}),
    Family("deepseek_v32", {**SPARSE, **GROUPED, **LISTED}),
    Family("deepseek_v4", fast=True),
    Family("dots1", {**FIRST, "n_shared_experts": 1}),
    Family("ernie4_5_moe", {**DENSE, "moe_layer_end_index": 2}),
    Family("exaone_moe", LISTED),
    Family("flex_olmo"),
    Family("gemma4_text", {"enable_moe_block": True, "intermediate_size": 96, "vocab_size_per_layer_input": 128}),
    Family("glm4_moe", FIRST),
    Family("glm4_moe_lite", {**LATENT, **LISTED}),
    Family("glm_moe_dsa", {**SPARSE, **LISTED}),
    Family("gpt_oss", fast=True),
    Family("granitemoe"),
    Family("granitemoe_swa"),
    Family("granitemoehybrid", {"mamba_n_heads": 8, "mamba_d_head": 16, "layer_types": _MAMBA_AND_ATTENTION}),
    Family("granitemoeshared"),
    Family("hunyuan_v1_moe"),
    Family("hy_v3", LISTED),
    Family("hy_v4", {**SPARSE, **LISTED}),
    Family("jamba", {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2, "mamba_dt_rank": 8}),
    Family(
        "kimi_linear",
        {
            **LATENT,
            **LISTED,
            "q_lora_rank": None,
            "linear_head_dim": 16,
            "linear_num_heads": 4,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
    Family("laguna", LISTED, fast=True),
    Family("lfm2_moe", {**DENSE, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]}, fast=True),
    Family("llama4_text", {"intermediate_size_mlp": 96}, fast=True),
    Family("mellum"),
    Family("mimo_v2_flash", {**LISTED, "v_head_dim": 16}),
    Family("minimax", {"layer_types": ["linear_attention", "full_attention"], "block_size": 16}),
    Family("minimax_m2"),
    Family("mixtral", fast=True),
    Family("olmoe"),
    Family("phimoe"),
    Family("qwen2_moe", {"intermediate_size": 96}),
    Family("qwen3_5_moe_text", LINEAR),
    Family("qwen3_moe", {"intermediate_size": 96}),
    Family("qwen3_next", LINEAR, fast=True),
    Family(
        "qwen4_exp_text",
        {
            **LINEAR,
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
        refusal="keeps the rows of all its experts in one matrix",
        fast=True,
    ),
    Family("jetmoe", {"kv_channels": 16}, refusal=f"JetMoeParallelExperts .* {NOT_COMMON}"),
    Family(
        "longcat_flash",
        {
            **LATENT,
            "num_layers": 2,
            "num_hidden_layers": 4,
            "ffn_hidden_size": 96,
            "expert_ffn_hidden_size": 48,
            "zero_expert_num": 2,
        },
        refusal="chooses experts that hand a token on as it is",
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
        fast=True,
    ),
)
