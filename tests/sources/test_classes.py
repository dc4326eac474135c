"""Which class of transformers a checkpoint is loaded as."""

from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from bitsmoe_modifier import CheckpointError
from bitsmoe_modifier.sources.classes import auto_class_of, class_of, has_processor, read_auto_config


def config(model_type: str, *architectures: str):
    made = CONFIG_MAPPING[model_type]()
    made.architectures = list(architectures) or None
    return made


@pytest.mark.parametrize(
    ("model_type", "architecture", "auto"),
    [
        ("qwen3_moe", "Qwen3MoeForCausalLM", "AutoModelForCausalLM"),
        ("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", "AutoModelForImageTextToText"),
        ("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", "AutoModelForCausalLM"),
        ("llama4", "Llama4ForConditionalGeneration", "AutoModelForImageTextToText"),
        ("llama4", "Llama4ForCausalLM", "AutoModelForCausalLM"),
        ("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", "AutoModelForImageTextToText"),
        ("gemma4", "Gemma4ForConditionalGeneration", "AutoModelForCausalLM"),
    ],
)
def test_the_class_that_the_configuration_names(model_type: str, architecture: str, auto: str) -> None:
    made = config(model_type, architecture)
    assert auto_class_of(made).__name__ == auto
    if made.model_type == model_type and architecture != "Llama4ForCausalLM":
        assert class_of(made).__name__ == architecture


@pytest.mark.parametrize("architectures", [(), ("NoSuchClass",), ("Qwen3_5MoeModel",)])
def test_without_a_usable_name_the_tower_is_kept(architectures: tuple[str, ...]) -> None:
    assert class_of(config("qwen3_5_moe", *architectures)).__name__ == "Qwen3_5MoeForConditionalGeneration"


def test_a_model_of_another_kind_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"'vit' .*ViTModel.* is not a language model"):
        auto_class_of(config("vit", "ViTModel"))


def test_an_unknown_model_type_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}')
    with pytest.raises(CheckpointError, match=r"transformers cannot read its config\.json.*no_such_type"):
        read_auto_config(tmp_path)


def test_a_processor_is_found_by_its_files(tmp_path: Path) -> None:
    assert not has_processor(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert has_processor(tmp_path)
