"""Datasets that llm-compressor would fail at with an error about something else are refused in words."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from llmcompressor import oneshot
from torch.utils.data import DataLoader, IterableDataset

from bitsmoe_modifier import BitsMoEModifier
from bitsmoe_modifier.calibration.given_rows import check_rows
from bitsmoe_modifier.errors import CalibrationError
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
        check_rows(YAML, dataset)


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
    check_rows([BitsMoEModifier(bits=3.0)], dataset, **options)


def test_runs_without_our_modifier_are_left_alone() -> None:
    check_rows("a_stage: {q_modifiers: {GPTQModifier: {scheme: W4A16}}}", CHATS)


def test_oneshot_says_it(dense_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(CalibrationError, match="its columns are messages"):
        oneshot(model=load(dense_checkpoint("qwen3_moe")), dataset=CHATS, recipe=YAML)
