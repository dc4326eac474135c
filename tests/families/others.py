"""Modules of transformers with routed experts that are in no row of the matrix, because no text can calibrate them."""

#: by the name of the module, the model type of its checkpoints and words of the message that refuses it
OTHERS = {
    "nllb_moe": ("nllb-moe", "is not a language model"),
    "switch_transformers": ("switch_transformers", "is not a language model"),
    "openai_privacy_filter": ("openai_privacy_filter", "is not a language model"),
    "qwen3_omni_moe": ("qwen3_omni_moe", "no forward pass of its own"),
}
