"""Padding tokens do not enter the statistics: padded batches give those of the rows without padding."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llmcompressor import oneshot
from torch.utils.data import DataLoader

from bitsmoe_modifier import BitsMoEModifier, CalibrationError
from bitsmoe_modifier.calibration import modifier as lifecycle
from bitsmoe_modifier.calibration.capture import count_tokens
from bitsmoe_modifier.calibration.padding import mask_of, text_rows
from helpers import load, packed_modules

LENGTHS = (32, 20, 27, 9, 31, 14)
Batch = dict[str, torch.Tensor]


def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 128, (length,), generator=generator) for length in LENGTHS]


def batches(side: str, together: int) -> list[Batch]:
    """The rows in batches, padded at a side to 40 tokens; "none": one by one without padding."""
    made = []
    for row in rows():
        empty = torch.zeros(40 - len(row), dtype=torch.int64)
        ids = row if side == "none" else torch.cat([row, empty] if side == "right" else [empty, row])
        text = torch.ones_like(row)
        mask = text if side == "none" else torch.cat([text, empty] if side == "right" else [empty, text])
        made.append({"input_ids": ids[None], "attention_mask": mask[None]})
    if side == "none":
        return made
    groups = [made[start : start + together] for start in range(0, len(made), together)]
    return [{key: torch.cat([one[key] for one in group]) for key in group[0]} for group in groups]


@pytest.fixture
def run(dense_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Quantize with these batches: (tokens of every layer as they entered the statistics, metrics, reports)."""

    def run(data: list[Batch], pipeline: str = "sequential", scope: str = "layer", shuffle: bool = False) -> Any:
        seen: list[Any] = []
        original = lifecycle.routed_tokens

        def recording(module: Any, inputs: list[Any], *rest: Any) -> Any:
            seen.append([torch.cat(parts) for parts in zip(*inputs, strict=True)])
            return original(module, inputs, *rest)

        one = BitsMoEModifier(bits=3.0, group_size=16, block_size=16, scope=scope, solver="lagrangian", refine_passes=0)
        with monkeypatch.context() as patched:
            patched.setattr(lifecycle, "routed_tokens", recording)
            model = load(dense_checkpoint("qwen3_moe"))
            loader = DataLoader(data, batch_size=None, shuffle=shuffle)
            oneshot(model=model, recipe=[one], dataset=loader, pipeline=pipeline)
        return seen, one._metrics, [module.report for module in packed_modules(model).values()]

    return run


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pipeline", ["sequential", "basic"])
def test_padded_batches_give_the_statistics_of_unpadded_rows(
    pipeline: str, side: str, together: int, run: Callable[..., Any]
) -> None:
    (expected, *_), _, _ = run(batches("none", 1), pipeline)
    (found, *_), _, reports = run(batches(side, together), pipeline)
    # the first layer: the one after it sees what rounding made of it
    assert len(found[0]) == sum(LENGTHS)
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-4)
    assert sum(reports[0].tokens_per_expert) == 2 * sum(LENGTHS)


def test_the_survey_leaves_padding_out(run: Callable[..., Any]) -> None:
    expected, metrics, _ = run(batches("none", 1), scope="global")
    found, padded, _ = run(batches("right", 1), scope="global")
    for value, wanted in zip(found[:2], expected[:2], strict=True):  # both layers as the survey saw them
        assert len(value[0]) == sum(LENGTHS)
        torch.testing.assert_close(value[0], wanted[0], rtol=1e-4, atol=1e-4)
    for name, metric in metrics.items():
        torch.testing.assert_close(padded[name], metric, rtol=1e-3, atol=1e-3 * float(metric.abs().max()))


def test_a_loader_that_shuffles_each_time_anew(run: Callable[..., Any]) -> None:
    """As llm-compressor's own does: masks and rows stay together."""
    torch.manual_seed(0)
    (expected, *_), _, _ = run(batches("none", 1))
    (found, *_), _, _ = run(batches("right", 1), shuffle=True)
    ordered = [x[x[:, 0].argsort()] for x in (found[0], expected[0])]
    torch.testing.assert_close(*ordered, rtol=1e-4, atol=1e-4)


def test_padding_is_not_counted_as_tokens() -> None:
    assert count_tokens(batches("right", 2)) == sum(LENGTHS)
    with pytest.raises(CalibrationError, match="there is no calibration data"):
        count_tokens([{"input_ids": torch.ones(1, 4), "attention_mask": torch.zeros(1, 4)}])


def test_masks_that_say_nothing() -> None:
    assert mask_of({"input_ids": torch.ones(1, 4)}) is None
    assert mask_of({"attention_mask": torch.ones(1, 4)}) is None
    assert mask_of({"attention_mask": torch.zeros(1, 1, 4, 4)}) is None, "of pairs of tokens"


def test_rows_that_are_copies_for_every_expert() -> None:
    mask = torch.tensor([True, False, True])
    assert text_rows(mask, torch.zeros(6, 2)).tolist() == [True, False, True] * 2
    with pytest.raises(CalibrationError, match="experts got 4 rows of a batch of 3 tokens with padding"):
        text_rows(mask, torch.zeros(4, 2))
