"""Tiny random models from the configs of transformers, wrappers with vision and audio towers among them.

`config_of` sets the sizes that configs share, under whichever of their names a config has; a family's own ``sizes`` set
the rest, in nested mappings for the configs inside a wrapper's. The models have two MoE layers (where a family has a
choice), 8 experts of 48 × 64 (I × H) and some 100 thousand weights.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from bitsmoe_modifier.sources.classes import build_published, class_of

_EXPERTS = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8)
_CHOICES = dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2)
#: Sizes by the names that configs of language models have for them.
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
#: Sizes of vision and audio towers.
_TOWER: dict[str, object] = {
    **dict.fromkeys(("depth", "num_hidden_layers", "n_layers"), 2),
    "hidden_size": 32,
    "intermediate_size": 48,
    **dict.fromkeys(("num_heads", "num_attention_heads"), 2),
    **dict.fromkeys(("in_channels", "num_channels"), 3),
    "patch_size": 4,
    "image_size": 16,
    "num_position_embeddings": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    **dict.fromkeys(("out_hidden_size", "text_hidden_size", "output_dim"), 64),
    "deepstack_visual_indexes": [0],
    "vocab_size": 128,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "d_model": 32,
    "max_source_positions": 64,
    "downsample_hidden_size": 16,
    "n_window": 4,
    "n_window_infer": 8,
}
#: Of the wrapper itself; the ids of its special tokens are counted up from 100.
_WRAPPER: dict[str, object] = {
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "projector_hidden_size": 64,
    "projection_hidden_size": 32,
}
_LANGUAGE = ("text_config", "thinker_config")


@dataclass(frozen=True)
class Family:
    """A row of the matrix.

    Attributes:
        model_type: as in config.json.
        sizes: fields of its config beyond the common ones, those of the configs inside it in mappings of their own.
        refusal: for a family that cannot be quantized, words of the message that says so.
        architecture: the class that config.json names, where the family has several.
        fast: whether `make test` runs it too; the rest is left to `make test-slow`.
    """

    model_type: str
    sizes: dict[str, Any] = field(default_factory=dict)
    refusal: str = ""
    architecture: str = ""
    fast: bool = False


def config_of(family: Family) -> PreTrainedConfig:
    """The family's config at the sizes above, under the architecture that its checkpoints are published with."""
    kind = CONFIG_MAPPING[family.model_type]
    config = _sized(kind, family.sizes, _WRAPPER if _parts(kind) else _COMMON)
    config.architectures = [family.architecture or class_of(config).__name__]
    return config


def _sized(kind: Any, sizes: dict[str, Any], common: dict[str, object]) -> PreTrainedConfig:
    default = kind()
    known = {*default.to_dict(), *kind.attribute_map}
    parts = {}
    for name, part in _parts(kind).items():
        own = dict(sizes.get(name, {}))
        model_type = own.pop("model_type", None)
        if name not in sizes and getattr(default, name, None) is None:
            continue  # a tower that the family can do without
        if model_type is not None:
            part = CONFIG_MAPPING[model_type]
        elif part is AutoConfig:
            part = type(getattr(default, name))
        parts[name] = _sized(part, own, _COMMON if name in _LANGUAGE else _TOWER).to_dict()
    shared = {name: value for name, value in common.items() if name in known}
    tokens = sorted(n for n in known if n.endswith(("_token_id", "_token_index"))) if _parts(kind) else []
    special = {name: 100 + n for n, name in enumerate(tokens) if name not in shared}
    own = {name: value for name, value in sizes.items() if name not in parts}
    return kind(**{**shared, **special, **own, **parts})


def _parts(kind: Any) -> dict[str, Any]:
    """The configs inside a wrapper's, by name; none of a config that merely has sections."""
    return kind.sub_configs if any(name in kind.sub_configs for name in _LANGUAGE) else {}


def model_of(family: Family, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of the family, in evaluation mode: norms about 1, everything else about 0 and none of it zero."""
    torch.manual_seed(0)
    model = build_published(config_of(family), dtype=dtype)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and parameter.ndim == 1), std=0.1)
    return model.eval()
