"""Datasets that llm-compressor's `oneshot` fails at with an error about something else: found before it reads them.

llm-compressor 0.14 reads the column of text (`text`, or the one that `text_column` names), or rows that are tokenized
already. Of all other columns it keeps none and then misses the rows; and it asks everything for its length.
"""

from typing import Any

from torch.utils.data import DataLoader

from ..errors import CalibrationError

#: columns that it reads under any `text_column`
_READ = {"input_ids", "text"}


def check_dataset(dataset: Any, text_column: str = "text", prepared: bool = False) -> None:
    """Refuse calibration data that llm-compressor cannot read.

    Args:
        dataset: as `oneshot` takes it; None and names are left to others.
        text_column: the argument of `oneshot`.
        prepared: whether a function of the user's own makes other columns first.

    Raises:
        CalibrationError: naming what is missing, and what to give.
    """
    if dataset is None or isinstance(dataset, str):
        return
    kind = type(dataset).__name__
    if isinstance(dataset, dict) and hasattr(dataset, "column_names"):  # splits, of which llm-compressor takes "train"
        dataset = dataset.get("train")
    loader = isinstance(dataset, DataLoader)
    if not loader and dataset is not None and not hasattr(dataset, "column_names"):
        raise CalibrationError(
            f"dataset: llm-compressor cannot read a {kind}; give a datasets.Dataset (datasets.Dataset.from_list), or a "
            "DataLoader of batches such as {'input_ids': int64 [rows, tokens]}"
        )
    try:
        rows = None if dataset is None else len(dataset)
    except TypeError:
        raise CalibrationError(
            f"dataset: a stream ({kind}) has no length, which llm-compressor asks for; take as many rows as you want "
            "first, such as datasets.Dataset.from_list(list(stream.take(512)))"
        ) from None
    if rows == 0:
        raise CalibrationError(f"dataset: the {kind} has no rows")
    if loader or dataset is None or prepared:
        return
    columns = list(dataset.column_names)
    if not {*_READ, text_column} & {*columns}:
        chat = (
            ": a chat is text by tokenizer.apply_chat_template(…, tokenize=False)"
            if {"messages", "conversations"} & {*columns}
            else ""
        )
        raise CalibrationError(
            f"dataset: its columns are {', '.join(columns)}, and llm-compressor reads {text_column}; name the column "
            f"of text by text_column, or make one by dataset.map{chat}"
        )
