"""Text to token rows: the calibration and evaluation rows that all runs of a comparison share.

A source is a text file, a table of documents (`tables`; what may be in its rows: `documents`) or a dataset of the
`datasets` library, written ``NAME[:CONFIG][@SPLIT]`` (``Salesforce/wikitext:wikitext-2-raw-v1@test``).
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from .. import messages
from ..errors import CalibrationError
from ..extras import install_line
from ..method.distributed import share
from .documents import Document, documents
from .tables import TABLES, Row, ending, read_plain, rows_of

#: characters read per token wanted, so that a dataset of any size is never read as a whole
_CHARACTERS_PER_TOKEN = 32


@dataclass(frozen=True)
class Text:
    """A text and where it came from.

    Attributes:
        source: file or dataset, as the user wrote it.
        content: the text; of token ids, the ids.
        sha256: digest of ``content`` in UTF-8, for the report.
        parts: text, and rows of token ids, in order; documents of text that follow each other are one part.
    """

    source: str
    content: str
    sha256: str
    parts: tuple[Document, ...]


def read_text(source: str, column: str = "text", tokens: int | None = None, tokenizer: Any = None) -> Text:
    """Read a text file, or join the documents of a table or dataset with blank lines.

    What had to be skipped or repaired is said on stderr.

    Args:
        source: path of a file, or ``NAME[:CONFIG][@SPLIT]`` of a dataset (split ``train`` unless given).
        column: column of a table or dataset that holds the text.
        tokens: how many tokens will be wanted; a table is read only so far (32 characters a token). None: all of it.
        tokenizer: that will read the text; it renders chats.

    Raises:
        CalibrationError: when there is no such file or dataset, nothing in it can be used, or it is empty.
    """
    path = Path(source)
    try:
        is_folder, is_file, is_there = path.is_dir(), path.is_file(), path.exists()
    except OSError as error:
        raise CalibrationError(f"{source[:200]} cannot be opened ({error.strerror})") from None
    if is_folder:
        raise CalibrationError(f"{source} is a folder; give {_instead_of(path)}")
    if source == "-" or (is_there and not is_file):
        raise CalibrationError(f"{source} is a pipe or a device, which is read once; write its text to a file first")
    parts: list[Document]
    if is_file and ending(path) not in TABLES:
        content, mended = read_plain(path)
        if mended:
            messages.say("warning", f"{source}: {mended}")
        parts = [content]
    else:
        limit = None if tokens is None else tokens * _CHARACTERS_PER_TOKEN
        found = documents(source, _rows(source, path, is_file), column, tokenizer)
        parts = [joined for group in groupby(_until(found, limit), type) for joined in _joined(*group)]
    content = "\n\n".join(part if isinstance(part, str) else " ".join(map(str, part)) for part in parts)
    if not content.strip():
        raise CalibrationError(f"{source} is empty; give a file with text in it")
    return Text(source, content, hashlib.sha256(content.encode(errors="replace")).hexdigest(), tuple(parts))


def _instead_of(folder: Path) -> str:
    """What to give in the place of a folder, for a message: a file in it, where there is one that can be read."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    readable = [file for file in files if ending(file) in {*TABLES, ".txt"} and not file.name.endswith("_info.json")]
    if any(file.suffix == ".arrow" for file in files):
        return "a file that the dataset's to_parquet writes"
    return f"one of its files, such as {readable[0]}" if readable else "a text file or a dataset's name"


def _joined(kind: type, group: Iterable[Any]) -> list[Document]:
    return ["\n\n".join(group)] if kind is str else list(group)


def _rows(source: str, path: Path, is_file: bool) -> Iterator[Row]:
    """The rows of a table or dataset."""
    if is_file:
        yield from rows_of(path)
        return
    if ending(path) in {*TABLES, ".txt"}:
        raise CalibrationError(f"{source}: no such file")
    try:
        from datasets import load_dataset
    except ImportError:
        message = f"{source} is no file, and datasets need the datasets library; {install_line('quantize')}"
        raise CalibrationError(message) from None
    name, _, split = source.partition("@")
    name, _, config = name.partition(":")
    number = 0
    try:
        for number, row in enumerate(load_dataset(name, config or None, split=split or "train", streaming=True), 1):
            yield f"row {number}", row
    except Exception as error:  # a dataset is code of others, which raises what it likes
        reason = " ".join(str(error).split())[:300]
        if number:
            raise CalibrationError(f"{source}: row {number + 1} cannot be read: {reason}") from error
        raise CalibrationError(f"{source} is neither a file nor a dataset that can be loaded: {reason}") from error


def _until(found: Iterable[Document], characters: int | None) -> Iterator[Document]:
    """Documents until so many characters, or as many tokens as those are, are together."""
    total = 0
    for document in found:
        yield document
        total += len(document) * (1 if isinstance(document, str) else _CHARACTERS_PER_TOKEN)
        if characters is not None and total >= characters:
            return


def tokenize(text: Text, tokenizer: Any) -> torch.Tensor:
    """All tokens of the text, int64 ``[N]``, without special tokens.

    Raises:
        CalibrationError: when there are none: transformers makes an empty tokenizer where a folder has no files of one.
    """
    ids = [
        id_
        for part in text.parts
        for id_ in (
            tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] if isinstance(part, str) else part
        )
    ]
    if not ids:
        raise CalibrationError(
            f"the tokenizer of {tokenizer.name_or_path} makes no tokens of {text.source}; are its files there "
            "(tokenizer.json, tokenizer_config.json)? copy them to it"
        )
    return torch.tensor(ids, dtype=torch.int64)


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
    if not -(2**63) <= seed < 2**63:
        raise CalibrationError(f"--seed {seed} is too large; it has 64 bits")
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
