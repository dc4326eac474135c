"""Which families vLLM serves packed: the rows of the test matrix in tests/families at sizes that vLLM can run on a CPU.

`serving_page.py` writes the table in docs/serving.md from these rows, `test_vllm_families.py` tests every one of them.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from building import Family
from text_families import TEXT_FAMILIES
from wrapper_families import WRAPPER_FAMILIES

import published_names

#: ids from here on are those of a wrapper's special tokens (`building.config_of`)
_SPECIAL = 100
FAMILIES = {family.model_type: family for family in (*WRAPPER_FAMILIES, *TEXT_FAMILIES)}

#: vLLM's CPU attention has kernels for heads of 32 and more
_HEADS: dict[str, Any] = {"head_dim": 32}
_TWO_HEADS: dict[str, Any] = {"num_attention_heads": 2}
#: as published, and as vLLM takes these models to be whatever their config says
_TIED: dict[str, Any] = {"tie_word_embeddings": True}
#: and its latent attention for these sizes alone
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
    "head_dim": 64,
}

#: and its gated delta rule for those of the published models
_LINEAR: dict[str, Any] = {"linear_key_head_dim": 128, "linear_value_head_dim": 128}


def _rope(*sections: int, share: float = 1.0) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [*sections], "partial_rotary_factor": share}
    return {"rope_parameters": {**rope, "mrope_interleaved": True}}


@dataclass(frozen=True)
class Row:
    """One family.

    Attributes:
        model_type: as in config.json.
        sizes: fields of its config beyond those in tests/families: sizes that vLLM's kernels have, and fields of
            published files that vLLM reads and transformers does not.
        published: fields of its published config.json that transformers has under other names.
        rewrite: puts a folder that transformers saved into the form in which the family is published.
        like: what its tokens are compared with: "transformers", or "dense", which is vLLM with the decoded model.
        dtype: that vLLM on a CPU runs it in.
        settings: of vLLM's engine beyond those of every row.
        note: what is particular about it, or why the build of vLLM for CPUs cannot run it.
        error: where that cannot, words of its error.
    """

    model_type: str
    sizes: dict[str, Any] = field(default_factory=dict)
    published: dict[str, Any] = field(default_factory=dict)
    rewrite: Callable[[Path], object] | None = None
    like: str = "transformers"
    dtype: str = "float32"
    settings: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    error: str = ""

    @property
    def family(self) -> Family:
        """The family with these sizes."""
        family = FAMILIES[self.model_type]
        sizes = dict(family.sizes)
        for name, value in self.sizes.items():
            sizes[name] = {**sizes.get(name, {}), **value} if name.endswith("_config") else value
        return dataclasses.replace(family, sizes=sizes)

    def sharpen(self, model: torch.nn.Module) -> None:
        """Scale a random model's output so that its next tokens are far from equally likely.

        In bfloat16, by which the likeliest are often turned over, a few tokens stand out of all others. Those that
        stand for images are never next.
        """
        head = model.get_output_embeddings().weight.data
        head.mul_(4)
        if self.dtype == "bfloat16":
            head[::16].mul_(4)
            head[_SPECIAL:].mul_(float(not self.has_tower))

    @property
    def has_tower(self) -> bool:
        """Whether it is published with a tower beside the language model."""
        return "text_config" in self.sizes


_BIAS = "vLLM's router on a CPU leaves the bias of the choice out; the test puts plain PyTorch in its place"
_NO_GATE = "vLLM on a CPU refuses experts without a gate; the test lifts the check, which guards vLLM's own kernels"
_DELTA = "in bfloat16, which vLLM's gated delta rule on a CPU needs"
_OTHER = "vLLM's own dense model differs from transformers there"
_TEXT_ALONE: dict[str, Any] = {"limit_mm_per_prompt": {"image": 0, "video": 0, "audio": 0}}
_BACKEND = "by vLLM's Transformers backend"

_NO_SPARSE = "vLLM has no sparse attention on a CPU"
_SPARSE = "Sparse Attention is not supported on CPU"
_TRITON = "vLLM's class starts Triton kernels, which it has no replacement for on a CPU; the packed layers are loaded"
_FLASH = "vLLM's attention of this family is for GPUs alone"
#: what transformers derives in a way of its own
_MIMO: dict[str, Any] = {
    **dict.fromkeys(("head_dim", "v_head_dim", "swa_head_dim", "swa_v_head_dim"), 32),
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "sliding_window_size": 16,
    "hybrid_layer_pattern": [0, 1, 1],
    "moe_layer_freq": [0, 1, 1],
    "layernorm_epsilon": 1e-5,
    "rope_theta": 5e6,
    "swa_rope_theta": 1e4,
    "partial_rotary_factor": 0.334,
    "add_swa_attention_sink_bias": True,
}
_QWEN4: dict[str, Any] = {
    **_HEADS,
    **_LINEAR,
    **_rope(4, 6, 6),
    "indexer_head_dim": 32,
    "output_gate_type": "sigmoid",
}
_MINIMAX_M3: dict[str, Any] = {
    "text_config": {
        "model_type": "minimax_m3_text",
        "moe_layer_freq": [1, 1],
        "hidden_act": "swigluoai",
        "sparse_attention_config": {
            "sparse_index_dim": 32,
            "sparse_num_index_heads": 2,
            "sparse_topk_blocks": 16,
            "sparse_block_size": 8,
            "sparse_attention_freq": [0, 0],
        },
    },
    "vision_config": {"img_token_compression_config": {"temporal_patch_size": 2, "spatial_merge_size": 2}},
}
_INKLING: dict[str, Any] = {
    "text_config": {
        "local_layer_ids": [0, 1],
        "dense_mlp_idx": 0,
        "sconv_kernel_size": 4,
        **dict.fromkeys(("use_sconv", "use_embed_norm", "use_gate_bias", "use_global_scale"), True),
    },
    "audio_config": {
        "decoder_dmodel": 64,
        "dmel_min_value": -7.0,
        "dmel_max_value": 2.0,
        "use_audio_norm": True,
        "audio_mode": "dmel",
    },
    "vision_config": {
        "decoder_dmodel": 64,
        "vision_encoder_type": "hmlp",
        "n_channels": 3,
        "use_vision_norm": True,
    },
}

ROWS = (
    Row("qwen3_moe", _HEADS),
    Row("qwen2_moe", _TWO_HEADS),
    Row("qwen3_vl_moe", {"text_config": {**_HEADS, "norm_topk_prob": True, **_rope(4, 6, 6)}}),
    Row("qwen3_next", {**_HEADS, **_LINEAR}, dtype="bfloat16", note=_DELTA),
    Row(
        "qwen3_5_moe",
        {"text_config": {**_HEADS, **_LINEAR, **_rope(2, 1, 1, share=0.25), "mtp_num_hidden_layers": 1}},
        dtype="bfloat16",
        note=_DELTA,
    ),
    Row("glm4_moe", _HEADS),
    Row(
        "deepseek_v2",
        {**_LATENT, "topk_method": "greedy", "q_lora_rank": None, "n_group": 1, "topk_group": 1},
        like="dense",
    ),
    Row("deepseek_v3", {**_LATENT, "topk_method": "noaux_tc"}, like="dense", note=_OTHER),
    Row("gpt_oss", {**_HEADS, "intermediate_size": 64}),  # MXFP4 is in blocks of 32
    Row("mixtral", _HEADS),
    Row("olmoe", _TWO_HEADS),
    Row("llama4_text", {**_HEADS, "num_experts_per_tok": 1}),
    Row("llama4", {"text_config": {**_HEADS, "num_experts_per_tok": 1}}, settings=_TEXT_ALONE, note="text alone"),
    Row("minimax_m2", {**_HEADS, "rotary_dim": 16, "scoring_func": "sigmoid", "use_routing_bias": True}, note=_BIAS),
    Row("nemotron_h", _HEADS, note=_NO_GATE),
    Row("exaone_moe", _HEADS),
    Row("granitemoe", _TWO_HEADS),
    Row("granitemoe_swa", _TWO_HEADS),
    Row("granitemoeshared", _TWO_HEADS),
    Row("granitemoehybrid", _TWO_HEADS),
    Row("ernie4_5_moe", _HEADS),
    Row("glm4_moe_lite", {**_LATENT, "first_k_dense_replace": 1, "topk_method": "noaux_tc"}, like="dense", note=_OTHER),
    Row("laguna", _HEADS, like="dense", note=_OTHER),
    Row("flex_olmo", _TWO_HEADS, note=_BACKEND),
    Row("hunyuan_v1_moe", _HEADS, note=_BACKEND),
    Row("mellum", _HEADS, note=_BACKEND),
    Row("gemma4_text", _HEADS),
    Row("afmoe", {**_HEADS, "score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1}),
    Row(
        "hy_v3",
        {**_HEADS, "first_k_dense_replace": 1, "expert_hidden_dim": 48, "qk_norm": True, "route_norm": True},
    ),
    Row("cohere2_moe", {**_HEADS, **_TIED}),
    Row("lfm2_moe", {**_TWO_HEADS, **_TIED}, like="dense", note=_OTHER),
    Row("gemma4", {"text_config": _HEADS}, settings=_TEXT_ALONE, note="text alone"),
    Row(
        "deepseek_v32",
        {**_LATENT, "topk_method": "noaux_tc", "first_k_dense_replace": 1, "index_head_dim": 128},
        note=_NO_SPARSE,
        error=_SPARSE,
    ),
    Row(
        "glm4v_moe",
        {"text_config": {**_HEADS, "use_qk_norm": False, **_rope(4, 6, 6)}},
        settings=_TEXT_ALONE,
        note="text alone",
    ),
    Row("axk1", {**_LATENT, "topk_method": "noaux_tc", "first_k_dense_replace": 0}, like="dense", note=_OTHER),
    Row("mimo_v2_flash", _MIMO, like="dense", note=_OTHER),
    Row("qwen3_5_moe_text", {**_HEADS, **_LINEAR}, dtype="bfloat16", note=_DELTA),
    Row("glm_moe_dsa", {**_LATENT, "index_head_dim": 128}, note=_NO_SPARSE, error=_SPARSE),
    Row(
        "glm5_next",
        {
            "text_config": {
                **_LATENT,
                "qk_rope_head_dim": 0,
                "head_dim": 0,
                "mla_use_nope": True,
                "mhc": True,
                "topk_method": "noaux_tc",
                "scoring_func": "sigmoid",
                "indexer_rope_interleave": True,
            }
        },
        settings=_TEXT_ALONE,
        note=_NO_SPARSE,
        error=_SPARSE,
    ),
    Row(
        "hy_v4",
        {**_LATENT, "index_head_dim": 128},
        note=_NO_SPARSE,
        error="no valid sparse MLA backend is available for current runtime",
    ),
    Row("qwen4_exp_text", _QWEN4, dtype="bfloat16", note=_FLASH, error="Qwen4Exp QSA requires FlashAttention"),
    Row(
        "qwen4_exp",
        {"text_config": _QWEN4, "vision_config": {"deepstack_visual_indexes": []}},
        dtype="bfloat16",
        settings=_TEXT_ALONE,
        note=_FLASH,
        error="Qwen4Exp QSA requires FlashAttention",
    ),
    Row("kimi_linear", _LATENT, note="vLLM's class is written for GPUs alone", error="No module named 'cutlass'"),
    Row(
        "minimax_m3_vl",
        {"text_config": {**_HEADS, "rotary_dim": 16, "index_head_dim": 32}},
        published=_MINIMAX_M3,
        settings=_TEXT_ALONE,
        note="vLLM's class is written for GPUs alone",
        error="No module named 'flashinfer'",
    ),
    Row(
        "inkling_mm_model",
        {
            "text_config": {
                **_HEADS,
                "swa_head_dim": 32,
                "swa_num_attention_heads": 4,
                "swa_num_key_value_heads": 2,
            }
        },
        published=_INKLING,
        dtype="bfloat16",
        settings=_TEXT_ALONE,
        note=_TRITON,
        error="'function' object is not subscriptable",
    ),
    Row(
        "deepseek_v4",
        {
            "head_dim": 512,
            "index_head_dim": 128,
            "o_groups": 2,
            "o_lora_rank": 64,
            "q_lora_rank": 64,
            "scoring_func": "sqrtsoftplus",
            "topk_method": "noaux_tc",
        },
        rewrite=published_names.deepseek_v4,
        dtype="bfloat16",
        settings={"block_size": 256},
        note="vLLM on a CPU has no layout for its caches, and where one is set (`VLLM_KV_CACHE_LAYOUT=BLHNC`) starts "
        "Triton kernels; the packed layers are loaded",
        error="page size is not divisible by the maximum page size",
    ),
    Row(
        "mistral3",
        {"text_config": {**_LATENT, "head_dim": 96}},
        settings=_TEXT_ALONE,
        note="vLLM has no class for the language model, Mistral4ForCausalLM",
        error="No model architectures are specified",
    ),
    Row(
        "step3p7",
        {"text_config": _HEADS},
        settings=_TEXT_ALONE,
        note="vLLM reads config.json through transformers, which renames fields that vLLM's class looks for",
        error="'Step3p7VisionConfig' object has no attribute",
    ),
    Row("jamba", _TWO_HEADS, note="vLLM's build for CPUs has no selective scan (Mamba 1)", error="selective_scan_fwd"),
)
