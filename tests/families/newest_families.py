"""The rows of the matrix whose classes came with transformers after 5.17: `make test-newest` runs them."""

from building import Family
from text_families import DENSE, FIRST, GROUPED, LATENT, LINEAR, LISTED, SPARSE
from wrapper_families import SMALL_SAM, rope

NORMALIZED = "normalizes the output of each expert"
SOFTCAPPED = "combines gate and up in a way this version does not know"
#: those that it computes otherwise, packed or not, and why
CHANGED = {"inkling_mm_model": "5.17 normalizes the embeddings twice"}
#: those whose forward pass fails there, packed or not, by an attribute that is not there
BROKEN = {"llama4": "image_outputs"}

_INKLING2 = {
    "text_config": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "unpadded_vocab_size": 120,
        "rel_extent": 16,
        "d_rel": 4,
        "n_layers_per_attn_res_block": 1,
    },
    "vision_config": {"model_type": "inkling2_vision"},
}

NEWEST_FAMILIES = (
    Family("bailing_hybrid", {**LATENT, **GROUPED, **FIRST, "q_lora_rank": None, "layer_group_size": 3}),
    Family("beam", {**LISTED, **GROUPED, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    Family("flint", {**DENSE, "mlp_only_layers": [0]}),
    Family("kolibri1", {"layer_types": ["sliding_attention", "full_attention"]}),
    Family("lara_mini", {**LINEAR, "layer_types": ["linear_attention", "sliding_attention"]}),
    Family(
        "dots3_note",
        {
            "text_config": {
                **SPARSE,
                **LISTED,
                "shared_experts_intermediate_size": 48,
                "layer_types": ["indexed_attention"] * 3,
            },
            "vision_config": {
                "mlp_layer_types": ["dense"] * 2,
                "moe_intermediate_size": 48,
                "adapter_in_dim": 32,
                "adapter_out_dim": 64,
            },
            "audio_config": {
                "whisper_config": {
                    "d_model": 32,
                    "encoder_attention_heads": 2,
                    "encoder_layers": 1,
                    "encoder_ffn_dim": 32,
                    "num_mel_bins": 16,
                },
                "whisper_adapter_in_dim": 32,
                "whisper_adapter_out_dim": 64,
                "feature_size": 16,
            },
        },
    ),
    Family("hy_v4_vl", {"text_config": {**SPARSE, **LISTED, **rope(2, 1, 1)}}),
    Family("mistral_large4", {"text_config": {**SPARSE, **LISTED}}),
    Family(
        "unlimited_ocr",
        {"text_config": {"mlp_layer_types": ["sparse"] * 2, "num_key_value_heads": 4}, "vision_config": SMALL_SAM},
    ),
    Family("inkling2", _INKLING2, refusal=SOFTCAPPED),
    Family("inkling2_loop", _INKLING2, refusal=SOFTCAPPED),
    Family(
        "muse_spark",
        {
            "text_config": {"moe_hidden_size": 64},
            "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [8, 8, 16, 16], "out_hidden_size": 64},
        },
        refusal=NORMALIZED,
    ),
)
