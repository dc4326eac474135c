"""Batches that a model cannot read are refused before calibration."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llmcompressor import oneshot
from torch.utils.data import DataLoader

from bitsmoe_modifier import BitsMoEModifier, CalibrationError
from bitsmoe_modifier.calibration.capture import count_tokens
from helpers import load

IDS = torch.arange(32).view(1, 32)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"input_ids": IDS + 100}, "batch 1 has the token 131, and the model has 128; tokenize with the model's"),
        ({"text": "some text"}, r"batch 1 has no tensor input_ids \(text\); give batches such as"),
        ({"input_ids": IDS.tolist()}, r"batch 1 has no tensor input_ids \(input_ids\)"),
        (IDS, r"batch 1 has no tensor input_ids \(Tensor\)"),
    ],
    ids=["other-tokenizer", "text", "lists", "tensors"],
)
def test_a_batch_that_cannot_be_read(dense_checkpoint: Callable[..., Path], batch: Any, said: str) -> None:
    model = load(dense_checkpoint("qwen3_moe"))
    model.register_forward_pre_hook(lambda *_: pytest.fail("calibration started"))
    batches = DataLoader([{"input_ids": IDS}, batch], batch_size=None, collate_fn=lambda given: given)
    recipe = [BitsMoEModifier(bits=3.0, group_size=16, block_size=16)]
    with pytest.raises(CalibrationError, match=said):
        oneshot(model=model, recipe=recipe, dataset=batches)


def test_ids_beside_images_are_the_models_affair() -> None:
    assert count_tokens([{"input_ids": IDS + 100, "pixel_values": torch.zeros(1)}], 128) == 32
    assert count_tokens([{"input_ids": IDS + 100}]) == 32
