"""Rows of tokens against the model that is going to read them."""

from pathlib import Path

import torch

from .. import messages
from ..errors import CalibrationError
from .model import read_config


def check_rows(rows: torch.Tensor, folder: Path, source: str) -> None:
    """Refuse tokens that the model does not have, and say that rows are longer than the texts it was made for.

    Args:
        rows: int64 ``[n, T]``.
        folder: of the model.
        source: of the text, for messages.

    Raises:
        CalibrationError: naming the token.
    """
    config = read_config(folder)
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    vocabulary, longest = text.get("vocab_size"), text.get("max_position_embeddings")
    if isinstance(vocabulary, int) and int(rows.max()) >= vocabulary:
        raise CalibrationError(
            f"{source}: the tokenizer of {folder} makes the token {int(rows.max())} of it, and the model has "
            f"{vocabulary} (vocab_size): the tokenizer's files are of another model, or have tokens added"
        )
    if isinstance(longest, int) and rows.shape[1] > longest:
        messages.say(
            "warning",
            f"rows of {rows.shape[1]} tokens are longer than the {longest} that the model is made for "
            "(max_position_embeddings): what is computed beyond them is no use; lower --seq-len",
        )
