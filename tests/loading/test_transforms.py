"""Checkpoints whose transforms transformers does not apply."""

import json
from pathlib import Path

import pytest
from llmcompressor import oneshot
from llmcompressor.modifiers.transform import QuIPModifier, SpinQuantModifier

from bitsmoe_modifier import BitsMoEModifier, CheckpointError, RecipeError
from helpers import calibration, load

FIELDS = {"bits": 4.0, "group_size": 16, "block_size": 16, "scope": "layer"}
ATTENTION = ["re:.*self_attn.*_proj$"]


def test_a_transform_of_activations_is_refused(dense_checkpoint, tmp_path: Path) -> None:
    """It would load, and compute something else than what was quantized."""
    model = load(dense_checkpoint("qwen3_moe"))
    recipe = [QuIPModifier(targets=ATTENTION, transform_type="hadamard"), BitsMoEModifier(**FIELDS)]
    oneshot(model=model, recipe=recipe, dataset=calibration(), output_dir=tmp_path)
    with pytest.raises(CheckpointError, match=r"the transforms v of its config.json .* transformers does not do"):
        load(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for group in config["quantization_config"]["transform_config"]["config_groups"].values():
        group["apply"] = [part for part in group["apply"] if part["location"].startswith("weight")]
    file.write_text(json.dumps(config))
    load(tmp_path)


def test_a_modifier_that_leaves_another_model_is_refused(dense_checkpoint) -> None:
    model = load(dense_checkpoint("qwen3_moe"))
    recipe = [SpinQuantModifier(rotations=["R1"], transform_type="hadamard"), BitsMoEModifier(**FIELDS)]
    with pytest.raises(RecipeError, match="SpinQuantModifier does not reach the routers"):
        oneshot(model=model, recipe=recipe, dataset=calibration())
