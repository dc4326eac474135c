"""Datasets that llm-compressor would fail at with an error about something else are refused in words."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from llmcompressor import oneshot
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import bitsmoe_modifier  # noqa: F401 - registers the modifier
from bitsmoe_modifier.calibration import patches
from bitsmoe_modifier.calibration.given_rows import check_dataset
from bitsmoe_modifier.errors import CalibrationError, RecipeError
from helpers import calibration, load

YAML = "a_stage: {q_modifiers: {BitsMoEModifier: {bits: 3.0}}}"
TEXTS = Dataset.from_dict({"text": ["one", "two"]})
CHATS = Dataset.from_dict({"messages": [[{"role": "user", "content": "one"}]]})


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter([{"input_ids": torch.arange(8)}])


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        (CHATS, "its columns are messages, and llm-compressor reads text; name .*dataset.map: .*apply_chat_template"),
        (
            Dataset.from_dict({"body": ["one"], "id": [1]}),
            "its columns are body, id, and llm-compressor reads text; name",
        ),
        (DatasetDict({"train": CHATS}), "its columns are messages"),
        (Dataset.from_dict({"text": []}), "the Dataset has no rows"),
        (DataLoader([], batch_size=4), "the DataLoader has no rows"),
        (TEXTS.to_iterable_dataset(), "a stream .IterableDataset. has no length.*stream.take"),
        (DataLoader(Stream(), batch_size=2), "a stream .DataLoader. has no length"),
        (
            ({"input_ids": one} for one in torch.arange(8)),
            "llm-compressor cannot read a generator; give a datasets.Datas",
        ),
        ([{"text": "one"}], "cannot read a list"),
    ],
    ids=["chat", "column", "splits", "empty", "no-batches", "stream", "loader-of-a-stream", "generator", "list"],
)
def test_rows_that_cannot_be_read(dataset: Any, said: str) -> None:
    with pytest.raises(CalibrationError, match=f"^dataset: .*{said}"):
        check_dataset(dataset)


@pytest.mark.parametrize(
    ("dataset", "options"),
    [
        (TEXTS, {}),
        (DatasetDict({"train": TEXTS}), {}),
        (DatasetDict({"test": CHATS}), {}),  # which split to take is llm-compressor's question
        (Dataset.from_dict({"body": ["one"]}), {"text_column": "body"}),
        (Dataset.from_dict({"input_ids": [[1, 2]]}), {}),
        (CHATS, {"prepared": True}),
        (calibration(), {}),
        ("open_platypus", {}),
        (None, {}),
    ],
    ids=["text", "splits", "other-splits", "column", "tokens", "prepared", "loader", "name", "none"],
)
def test_rows_that_pass(dataset: Any, options: dict[str, Any]) -> None:
    check_dataset(dataset, **options)


def test_runs_without_our_modifier_are_left_alone() -> None:
    """Of a recipe only the stage counts that is run."""
    gptq = "b_stage: {q_modifiers: {GPTQModifier: {scheme: W4A16, targets: [Linear]}}}"
    run = SimpleNamespace(
        recipe=gptq,
        output_dir="out",
        recipe_args=SimpleNamespace(stage=None),
        model_args=SimpleNamespace(save_compressed=False),
        dataset_args=SimpleNamespace(dataset=CHATS, text_column="text", preprocessing_func=None),
    )
    model = nn.Module()
    model.decoded_from = "elsewhere"
    patches._oneshot.Oneshot.validate_model(run, model)
    run.recipe, run.recipe_args.stage = f"{YAML}\n{gptq}", "b"
    patches._oneshot.Oneshot.validate_model(run, model)
    run.recipe_args.stage = None
    with pytest.raises(RecipeError, match="save_compressed=False: experts are packed"):
        patches._oneshot.Oneshot.validate_model(run, model)
    run.model_args.save_compressed = True
    with pytest.raises(CalibrationError, match="its columns are messages"):
        patches._oneshot.Oneshot.validate_model(run, model)


def test_oneshot_says_it(dense_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(CalibrationError, match="its columns are messages"):
        oneshot(model=load(dense_checkpoint("qwen3_moe")), dataset=CHATS, recipe=YAML)
