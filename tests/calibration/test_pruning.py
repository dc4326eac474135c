"""Experts that a modifier of llm-compressor removes before they are quantized."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier

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
