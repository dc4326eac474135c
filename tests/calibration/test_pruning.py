"""Experts that a modifier of llm-compressor removes or changes before they are quantized."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

from bitsmoe_modifier import BitsMoEModifier, CalibrationError
from helpers import calibration, load, logits, packed_modules

FIELDS = {"bits": 4.0, "group_size": 16, "block_size": 16}


def recipe() -> list[object]:
    return [REAPPruningModifier(sparsity=0.25), BitsMoEModifier(**FIELDS)]


def test_what_is_left_is_quantized(dense_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model = load(dense_checkpoint("qwen3_moe"))
    oneshot(model=model, recipe=recipe(), dataset=calibration(), output_dir=tmp_path)
    assert [module.num_experts for module in packed_modules(model).values()] == [6, 6]
    loaded = load(tmp_path)
    assert [module.num_experts for module in packed_modules(loaded).values()] == [6, 6]
    assert torch.equal(logits(loaded), logits(model))


def test_both_in_one_pass(dense_checkpoint: Callable[..., Path]) -> None:
    """Where all experts have been surveyed, and six are left when they are to be rounded."""
    model = load(dense_checkpoint("qwen3_moe"))
    with pytest.raises(CalibrationError, match=r"another modifier left 6 of its 8 experts .* the pipeline independent"):
        oneshot(model=model, recipe=recipe(), dataset=calibration(), pipeline="sequential")


def test_weights_that_are_smoothed_in_the_same_pass(dense_checkpoint: Callable[..., Path]) -> None:
    """What was captured of a layer's inputs is from before: five times the error, where nobody would look for it."""
    experts = [[r"re:.*experts[.]\d+[.](gate|up)_proj"], "re:.*post_attention_layernorm"]
    for pipeline in ("independent", "sequential"):
        model = load(dense_checkpoint("qwen3_moe"))
        both = [SmoothQuantModifier(smoothing_strength=0.5, mappings=[experts]), BitsMoEModifier(**FIELDS)]
        if pipeline == "independent":
            oneshot(model=model, recipe=both, dataset=calibration(), pipeline=pipeline)
            assert len(packed_modules(model)) == 2
        else:
            with pytest.raises(
                CalibrationError, match="another modifier changed the weights of its experts in the pass"
            ):
                oneshot(model=model, recipe=both, dataset=calibration(), pipeline=pipeline)
