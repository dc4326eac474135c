"""Calibration on images and text together, through `oneshot` and the wrapper's own forward pass."""

from pathlib import Path

import pytest
import torch
from building import Family, config_of, model_of
from llmcompressor import oneshot
from torch.utils.data import DataLoader
from transformers import AutoTokenizer
from wrapper_families import WRAPPER_FAMILIES

from bitsmoe_modifier import BitsMoEModifier
from helpers import load, logits, packed_modules, save_tokenizer

LENGTH, IMAGE = 32, 4  # tokens of a row, and those among them that stand for its image


def family(model_type: str) -> Family:
    return next(one for one in WRAPPER_FAMILIES if one.model_type == model_type)


def batches(model_type: str, rows: int = 6) -> DataLoader:
    """Rows of text around one image of 4 × 4 patches, which the tower merges 2 × 2 into `IMAGE` tokens."""
    config = config_of(family(model_type))
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(rows):
        ids = torch.randint(3, 100, (1, LENGTH), generator=generator)
        ids[:, 2] = config.vision_start_token_id
        ids[:, 3 : 3 + IMAGE] = config.image_token_id
        ids[:, 3 + IMAGE] = config.vision_end_token_id
        made.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "mm_token_type_ids": (ids == config.image_token_id).int(),
                "pixel_values": torch.randn(16, 3 * 2 * 4 * 4, generator=generator),
                "image_grid_thw": torch.tensor([[1, 4, 4]]),
            }
        )
    return DataLoader(made, batch_size=None)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "qwen3_5_moe"])
def test_image_tokens_are_routed_tokens(model_type: str, tmp_path: Path) -> None:
    dense = model_of(family(model_type))
    dense.save_pretrained(tmp_path / "dense")
    save_tokenizer(tmp_path / "dense")
    modifier = BitsMoEModifier(bits=6.0, group_size=16, block_size=16, solver="lagrangian", refine_passes=0)
    model = oneshot(
        model=str(tmp_path / "dense"),
        processor=AutoTokenizer.from_pretrained(tmp_path / "dense"),
        dataset=batches(model_type),
        recipe=[modifier],
        moe_calibrate_all_experts=False,
        output_dir=tmp_path / "packed",
    )
    packed = packed_modules(model)
    assert len(packed) == 2
    choices = config_of(family(model_type)).text_config.num_experts_per_tok
    for module in packed.values():
        assert sum(module.report.tokens_per_expert) == 6 * LENGTH * choices, "the image's tokens among them"
    assert torch.equal(logits(load(tmp_path / "packed")), logits(model))
