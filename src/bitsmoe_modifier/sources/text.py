"""Text to token rows: the calibration and evaluation rows that every arm of a comparison shares.

A source is a text file, a table of documents (.jsonl, .json, .csv, .parquet) or a dataset of the `datasets` library,
written ``NAME[:CONFIG][@SPLIT]`` (``Salesforce/wikitext:wikitext-2-raw-v1@test``).
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..errors import CalibrationError
from ..method.distributed import share

#: file endings read as tables of documents, and the name under which the datasets library knows them
_TABLES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
#: characters read per token wanted, so that a dataset of any size is never read as a whole
_CHARACTERS_PER_TOKEN = 32


@dataclass(frozen=True)
class Text:
    """A text and where it came from.

    Attributes:
        source: file or dataset, as the user wrote it.
        content: the text.
        sha256: digest of ``content`` in UTF-8, for the report.
    """

    source: str
    content: str
    sha256: str


def read_text(source: str, column: str = "text", tokens: int | None = None) -> Text:
    """Read a text file, or join the documents of a table or dataset with blank lines.

    Args:
        source: path of a file, or ``NAME[:CONFIG][@SPLIT]`` of a dataset (split ``train`` unless given).
        column: column of a table or dataset that holds the text.
        tokens: how many tokens will be wanted; a dataset is read only so far (32 characters a token). None: all of it.

    Raises:
        CalibrationError: when there is no such file or dataset, it is not UTF-8 text, or it is empty.
    """
    path = Path(source)
    if path.is_dir():
        raise CalibrationError(f"{source} is a folder; give a text file or a dataset's name")
    if path.is_file() and path.suffix not in _TABLES:
        try:
            content = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CalibrationError(f"{source} is not UTF-8 text ({error}); convert it first") from None
    else:
        limit = None if tokens is None else tokens * _CHARACTERS_PER_TOKEN
        content = "\n\n".join(_until(_documents(source, path, column), limit))
    if not content.strip():
        raise CalibrationError(f"{source} is empty; give a file with text in it")
    return Text(source, content, hashlib.sha256(content.encode()).hexdigest())


def _documents(source: str, path: Path, column: str) -> Iterable[str]:
    """The text column of a table or dataset, row by row."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        if path.is_file():
            rows: Any = load_dataset(_TABLES[path.suffix], data_files=str(path), split="train", streaming=True)
        elif path.suffix in {*_TABLES, ".txt"}:
            raise CalibrationError(f"{source}: no such file")
        else:
            name, _, split = source.partition("@")
            name, _, config = name.partition(":")
            rows = load_dataset(name, config or None, split=split or "train", streaming=True)
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError, OSError) as error:
        raise CalibrationError(f"{source} is neither a file nor a dataset that can be loaded: {error}") from error
    for row in rows:
        if column not in row:
            raise CalibrationError(
                f"{source} has no column {column!r} but {', '.join(row)}; name the one that holds text by --text-column"
            )
        yield row[column]


def _until(documents: Iterable[str], characters: int | None) -> Iterable[str]:
    """Documents until so many characters are together."""
    total = 0
    for document in documents:
        yield document
        total += len(document)
        if characters is not None and total >= characters:
            return


def tokenize(text: Text, tokenizer: Any) -> torch.Tensor:
    """All tokens of the text, int64 ``[N]``, without special tokens."""
    encoded = tokenizer(text.content, add_special_tokens=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def calibration_rows(tokens: torch.Tensor, samples: int, seq_len: int, seed: int, source: str) -> torch.Tensor:
    """Windows at random places of the text.

    Args:
        tokens: int64 ``[N]``.
        samples, seq_len: rows and tokens per row wanted.
        seed: of the places; the same seed gives the same rows on every machine.
        source: for the message.

    Returns:
        int64 ``[samples, seq_len]``.

    Raises:
        CalibrationError: when the text has fewer tokens than the rows need.
    """
    need = samples * seq_len
    if samples < 1 or seq_len < 2:
        raise CalibrationError(
            f"{samples} calibration rows of {seq_len} tokens are none; --samples must be 1 or more, --seq-len 2 or more"
        )
    if len(tokens) < need:
        raise CalibrationError(
            f"calibration needs {need} tokens ({samples} rows of {seq_len}), {source} has {len(tokens)}; "
            "pass more text or fewer --samples/--seq-len"
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(tokens) - seq_len + 1, (samples,), generator=generator)
    return tokens[starts[:, None] + torch.arange(seq_len)]


def evaluation_rows(tokens: torch.Tensor, seq_len: int, rows: int, source: str) -> torch.Tensor:
    """Consecutive windows from the beginning of the text, at most ``rows`` of them (0: all that the text has).

    Returns:
        int64 ``[n, seq_len]``; a rest shorter than a row is dropped.

    Raises:
        CalibrationError: when the text has not one row.
    """
    available = len(tokens) // seq_len
    if available < 1:
        raise CalibrationError(
            f"evaluation needs {seq_len} tokens at least, {source} has {len(tokens)}; "
            "pass more text or a lower --seq-len"
        )
    n = min(available, rows) if rows > 0 else available
    return tokens[: n * seq_len].view(n, seq_len)


def dataloader(rows: torch.Tensor, batch_size: int) -> DataLoader:
    """The rows in order, in batches ``{"input_ids": int64 [batch, seq_len]}``, as llm-compressor's oneshot takes it.

    Of several processes that calibrate together, each gets its share of the batches.

    Raises:
        CalibrationError: when there are fewer batches than processes.
    """
    batches = share([{"input_ids": batch} for batch in rows.split(batch_size)])
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
