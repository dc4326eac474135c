"""The rows of the matrix that are published as wrappers: a language model beside towers for images or sound."""

from typing import Any

from building import Family
from text_families import FIRST, GROUPED, LATENT, LINEAR, NOT_COMMON, SPARSE, TEXT_FAMILIES


def rope(*sections: int, share: float = 1.0) -> dict[str, Any]:
    """Rotary embeddings whose frequencies are shared out over time, height and width."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [*sections], "partial_rotary_factor": share}
    return {"rope_parameters": rope}


#: By default the towers of these models alone take 20 GB.
SMALL_SAM: dict[str, Any] = {
    "sam_config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 64},
    "encoder_config": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
}
_GEMMA_TOWER: dict[str, Any] = {"model_type": "gemma4_vision", "head_dim": 16, "num_key_value_heads": 2}
_QWEN4 = next(family.sizes for family in TEXT_FAMILIES if family.model_type == "qwen4_exp_text")

WRAPPER_FAMILIES = (
    Family("qwen3_5_moe", {"text_config": {**LINEAR, **rope(2, 1, 1, share=0.5)}}, fast=True),
    Family("qwen3_vl_moe", {"text_config": {"intermediate_size": 96, **rope(2, 3, 3)}}, fast=True),
    Family("qwen4_exp", {"text_config": _QWEN4}),
    Family("glm4v_moe", {"text_config": {**FIRST, **rope(2, 3, 3)}}),
    Family(
        "llama4",
        {
            "text_config": {"intermediate_size_mlp": 96},
            "vision_config": {
                "intermediate_size": 128,
                "vision_output_dim": 64,
                "projector_input_dim": 64,
                "projector_output_dim": 64,
            },
        },
        fast=True,
    ),
    Family(
        "minimax_m3_vl",
        {
            "text_config": {
                "dense_intermediate_size": 96,
                "rotary_dim": 8,
                "index_n_heads": 2,
                "index_head_dim": 16,
                "index_block_size": 8,
            }
        },
    ),
    Family(
        "gemma4",
        {
            "text_config": {
                "enable_moe_block": True,
                "intermediate_size": 96,
                "vocab_size_per_layer_input": 128,
                "hidden_size_per_layer_input": 16,
            },
            "vision_config": _GEMMA_TOWER,
        },
        fast=True,
    ),
    Family("kimi_k25", {"text_config": {"model_type": "deepseek_v3", **LATENT, **GROUPED, **FIRST}}),
    Family("mistral3", {"text_config": {"model_type": "mistral4", **LATENT, "head_dim": 16}}),
    Family(
        "step3p7",
        {
            "text_config": {
                "num_sliding_attention_heads": 4,
                "share_expert_dim": 48,
                "mlp_layer_types": ["sparse", "sparse"],
                "layer_types": ["full_attention", "sliding_attention"],
                "swiglu_limits": [0.0, 0.1],
            }
        },
    ),
    Family(
        "ernie4_5_vl_moe",
        {
            "text_config": {
                "num_hidden_layers": 3,
                "intermediate_size": 96,
                "moe_intermediate_size": [48, 48],
                "mlp_layer_types": ["dense", "sparse", "sparse"],
                **rope(3, 3, 2),
            }
        },
        refusal="store the experts for text and for images in one list",
    ),
    Family(
        "glm5_next",
        {
            "text_config": {
                **SPARSE,
                "num_key_value_heads": 4,
                "qk_rope_head_dim": 0,
                "index_kpool": 4,
                "mlp_layer_types": ["sparse", "sparse"],
                "layer_types": ["linear_attention", "full_attention"],
                "head_dim": 0,
            }
        },
    ),
    Family("inkling_mm_model"),
    Family(
        "deepseek_ocr2",
        {
            "text_config": {"mlp_layer_types": ["sparse"] * 2, "num_key_value_heads": 4},
            "vision_config": {
                **SMALL_SAM,
                "encoder_config": {**SMALL_SAM["encoder_config"], "num_key_value_heads": 4},
            },
        },
    ),
    Family("diffusion_gemma", {"vision_config": _GEMMA_TOWER}, refusal="does not predict the next token"),
    Family("aria", refusal=f"AriaExperts .* {NOT_COMMON}"),
)
