"""The config.json of what is made of a published folder: of the published fields, none is lost."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from bitsmoe_modifier.sources.published import keep_config

#: quantization of a source, which its checkpoint has another of
_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
_PACKED = {"quant_method": "compressed-tensors", "format": "bitsmoe"}

_DEEPSEEK_V4: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "architectures": ["DeepseekV4ForCausalLM"],
    "num_hidden_layers": 3,
    "compress_ratios": [128, 4, 0],
    "num_hash_layers": 1,
    "head_dim": 64,
    "qk_rope_head_dim": 32,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536},
    "torch_dtype": "bfloat16",
    "quantization_config": _FP8,
}
_MINIMAX_M3: dict[str, Any] = {
    "model_type": "minimax_m3_vl",
    "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
    "image_token_index": 100,
    "text_config": {
        "model_type": "minimax_m3_text",
        "num_hidden_layers": 2,
        "hidden_act": "swigluoai",
        "moe_layer_freq": [0, 1],
        "torch_dtype": "bfloat16",
        "sparse_attention_config": {"sparse_num_index_heads": 2, "sparse_attention_freq": [0, 1]},
    },
    "vision_config": {"hidden_size": 32, "img_token_compression_config": {"temporal_patch_size": 2}},
}
_STEP: dict[str, Any] = {
    "model_type": "step3p7",
    "architectures": ["Step3p7ForConditionalGeneration"],
    "text_config": {
        "model_type": "step3p5",
        "num_hidden_layers": 4,
        "moe_layers_enum": "2,3",
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "attention_other_setting": {"attention_type": "sliding_attention", "num_attention_heads": 96},
        "num_attention_groups": 8,
        "rope_theta": [5e6, 1e4, 5e6, 1e4],
    },
    "vision_config": {"width": 32, "layers": 2, "heads": 2, "output_dim": 64},
}
_GLM: dict[str, Any] = {
    "model_type": "glm4_moe",
    "architectures": ["Glm4MoeForCausalLM"],
    "num_hidden_layers": 2,
    "num_nextn_predict_layers": 1,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "torch_dtype": "bfloat16",
    "some_runtime_needs": {"this": 1},
}
_NEMOTRON: dict[str, Any] = {
    "model_type": "nemotron_h",
    "architectures": ["NemotronHForCausalLM"],
    "num_hidden_layers": 2,
    "hybrid_override_pattern": "ME",
    "time_step_limit": [0.0, {"__float__": "Infinity"}],
}


_PUBLISHED = (_DEEPSEEK_V4, _MINIMAX_M3, _STEP, _GLM, _NEMOTRON)


def saved(published: dict[str, Any], folder: Path, **changed: Any) -> tuple[Path, Path]:
    """The published folder, and what transformers makes of its config.json for a quantized model."""
    source, target = folder / "source", folder / "target"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(published))
    config = AutoConfig.from_pretrained(source, dtype="float32")
    for name, value in changed.items():
        setattr(config, name, value)
    config.quantization_config = _PACKED
    config.save_pretrained(target)
    return source, target


@pytest.mark.parametrize(
    "published", [_DEEPSEEK_V4, _MINIMAX_M3, _STEP, _GLM, _NEMOTRON], ids=lambda one: one["model_type"]
)
def test_published_fields_are_kept(published: dict[str, Any], tmp_path: Path) -> None:
    source, target = saved(published, tmp_path)
    written = AutoConfig.from_pretrained(target).to_dict()
    assert keep_config(source, target)
    found = json.loads((target / "config.json").read_text())
    assert found.pop("quantization_config") == _PACKED
    assert found.pop("dtype") == "float32", "of the checkpoint's own weights"
    for part in (found, *(value for value in found.values() if isinstance(value, dict))):
        for name in ("transformers_version", "_name_or_path", "dtype"):
            part.pop(name, None)
    published = json.loads(json.dumps(published))
    for part in (published, *(value for value in published.values() if isinstance(value, dict))):
        part.pop("torch_dtype", None)
        part.pop("quantization_config", None)
    assert found == published
    read = AutoConfig.from_pretrained(target).to_dict()
    assert {name: read[name] for name in written} == written


def test_a_model_that_was_changed_keeps_its_own(tmp_path: Path) -> None:
    source, target = saved(_GLM, tmp_path, vocab_size=96)
    written = (target / "config.json").read_text()
    assert not keep_config(source, target)
    assert (target / "config.json").read_text() == written


def test_what_transformers_does_not_take_is_left(tmp_path: Path) -> None:
    source, target = saved(_NEMOTRON, tmp_path)
    (source / "config.json").write_text(json.dumps({**_NEMOTRON, "time_step_limit": "none"}))
    assert not keep_config(source, target)


def test_a_model_of_another_class_keeps_its_own(tmp_path: Path) -> None:
    source, target = saved(_MINIMAX_M3, tmp_path)
    AutoConfig.from_pretrained(source).text_config.save_pretrained(target)
    written = (target / "config.json").read_text()
    assert not keep_config(source, target)
    assert (target / "config.json").read_text() == written


def test_what_is_kept_can_be_saved_again(tmp_path: Path) -> None:
    """transformers refuses to save a configuration with settings of generation."""
    source, target = saved(_GLM, tmp_path)
    (source / "config.json").write_text(json.dumps({**_GLM, "temperature": 0.6, "early_stopping": True}))
    assert keep_config(source, target)
    assert json.loads((target / "config.json").read_text())["rope_theta"] == _GLM["rope_theta"]
    AutoConfig.from_pretrained(target).save_pretrained(tmp_path / "again")


def test_schemes_inside_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    """Kimi-K2.5's language model has the quantization of its source; nothing is left of it once it is decoded."""
    source, target = saved(_MINIMAX_M3, tmp_path)
    published = json.loads((source / "config.json").read_text())
    published["text_config"]["quantization_config"] = _FP8
    (source / "config.json").write_text(json.dumps(published))
    assert keep_config(source, target)
    found = json.loads((target / "config.json").read_text())
    assert found["quantization_config"] == _PACKED
    assert "quantization_config" not in found["text_config"]


def test_a_class_by_another_name(tmp_path: Path) -> None:
    source, target = saved(
        {**_GLM, "architectures": ["NamedOtherwise"]}, tmp_path, architectures=["Glm4MoeForCausalLM"]
    )
    assert keep_config(source, target)
    assert json.loads((target / "config.json").read_text())["architectures"] == ["NamedOtherwise"]
