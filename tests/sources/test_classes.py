"""Which class of transformers a checkpoint is loaded as."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

from bitsmoe_modifier import CheckpointError
from bitsmoe_modifier.sources.classes import auto_class_of, class_of, has_processor, load_published, read_auto_config
from helpers import tiny_model


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


@pytest.mark.parametrize(
    "lacking", ["model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.experts.0.down_proj.weight"]
)
@pytest.mark.parametrize("device_map", [None, "meta"])
def test_weights_that_no_file_holds_are_not_made_up(tmp_path: Path, lacking: str, device_map: str | None) -> None:
    whole = tiny_model("qwen3_moe")
    whole.save_pretrained(tmp_path)
    load_published(tmp_path, device_map=device_map)
    tensors = load_file(tmp_path / "model.safetensors")
    left = {name: tensor for name, tensor in tensors.items() if not name.startswith(lacking.partition(".0.down")[0])}
    assert len(left) < len(tensors)
    save_file(left, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"no file holds model[.]layers[.].* missing tensors.*fetch the model again"
    ):
        load_published(tmp_path, device_map=device_map)


def test_a_processor_is_found_by_its_files(tmp_path: Path) -> None:
    assert not has_processor(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert has_processor(tmp_path)
