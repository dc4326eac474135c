"""Files as people have them, to text or to rows: compressed or not, in any of the usual encodings, partly broken.

A row that cannot be read is handed on as a `Broken` one, for the caller to count; a file that cannot be read is an
error of one line.
"""

import bz2
import codecs
import csv
import gzip
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

from ..errors import CalibrationError
from ..extras import install_line

#: first bytes of compressed files
_COMPRESSED: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.GzipFile,
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
}
_ZSTANDARD = b"\x28\xb5\x2f\xfd"
_PACKED_ENDINGS = (".gz", ".bz2", ".xz", ".zst")
_CHATS = {"messages", "conversations", "conversation"}
#: endings of tables, without that of a compression
TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
#: share of bytes of 0 that a text may have, which something else has written into it
_STRAY_NULLS = 0.01
_UNICODE_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


@dataclass(frozen=True)
class Broken:
    """A row that is none.

    Attributes:
        reason: as a message counts it ("not JSON").
        detail: more about this one.
    """

    reason: str
    detail: str = ""


#: where a row is ("row 3", "line 3"), and what is there
Row = tuple[str, Any]


def ending(path: Path) -> str:
    """The ending that tells the kind of a file, lower case, that of a compression left out."""
    name = path.name.lower()
    for packed in _PACKED_ENDINGS:
        name = name.removesuffix(packed)
    return Path(name).suffix


def read_plain(path: Path) -> tuple[str, str]:
    """The text of a file, and what had to be done to read it ("" for nothing). Line ends become ``\\n``.

    Raises:
        CalibrationError: when it cannot be opened or is no text.
    """
    with _opened(path) as stream:
        data = stream.read()
    for mark, encoding in _UNICODE_MARKS:
        if data.startswith(mark):
            try:
                return _with_line_ends(data[len(mark) :].decode(_without_mark(encoding, mark))), ""
            except UnicodeDecodeError as error:
                raise CalibrationError(f"{path} is not UTF-8 text ({error}); convert it first") from None
    unmarked = _unmarked_utf_16(data)
    if unmarked:
        return _with_line_ends(data.decode(unmarked, errors="replace")), "it was read as UTF-16, without a mark"
    nulls = data.count(b"\0")
    try:
        text = _with_line_ends(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        if nulls:
            raise CalibrationError(f"{path} is not UTF-8 text ({error}); convert it first") from None
    else:
        if nulls > _STRAY_NULLS * len(data):
            raise CalibrationError(f"{path} is no text: {nulls} of its {len(data)} bytes are 0; give a text file")
        return text.replace("\0", ""), f"{nulls} bytes of 0 were left out" if nulls else ""
    decoded = data.decode("utf-8", errors="replace")
    wrong = decoded.count("\ufffd")
    if wrong <= sum(character > "\x7f" for character in decoded) - wrong:  # UTF-8 with some damage
        return _with_line_ends(decoded.replace("\ufffd", "")), f"{wrong} bytes that are not UTF-8 were left out"
    return _with_line_ends(_latin(data)), "it is not UTF-8 and was read as Latin-1"


def rows_of(path: Path) -> Iterator[Row]:
    """The rows of a table, in order.

    Raises:
        CalibrationError: when the file cannot be opened, or its kind needs a package that is not installed.
    """
    kind = ending(path)
    if kind == ".parquet":
        return _parquet(path)
    return _csv(path, kind) if kind in (".csv", ".tsv") else _json(path)


def _json(path: Path) -> Iterator[Row]:
    """JSON lines, or one JSON value: a list of rows, an object of columns or of one list of rows."""
    with _opened(path) as stream:
        filled = ((number, line) for number, line in _lines(stream) if line.strip())
        first, second = next(filled, None), next(filled, None)
        if first is None:
            return
        if second is not None and not first[1].lstrip().startswith("[") and _parsed(first[1]) is not None:
            yield from _json_lines(chain([first, second], filled))
            return
    with _opened(path) as stream:
        everything = list(_lines(stream))
    whole = _parsed("\n".join(line for _, line in everything))
    if whole is not None:
        yield from ((f"row {number}", row) for number, row in enumerate(_rows_of_value(whole), 1))
    else:
        yield from _json_lines(everything)


def _json_lines(lines: Iterable[tuple[int, str]]) -> Iterator[Row]:
    for number, line in lines:
        if line.strip():
            row = _parsed(line)
            yield f"line {number}", Broken("not JSON", line.strip()[:40]) if row is None else row


def _rows_of_value(value: Any) -> Iterable[Any]:
    """Rows of a whole JSON document."""
    if isinstance(value, list):
        return value
    columns = list(value.values()) if isinstance(value, dict) else []
    if not columns or not all(isinstance(column, list) for column in columns):
        nested = [column for column in columns if isinstance(column, list)]
        rows = len(nested) == 1 and all(isinstance(row, dict) and "role" not in row for row in nested[0])
        return nested[0] if rows and nested[0] and not _CHATS & value.keys() else [value]
    if len(columns) == 1 and columns[0] and all(isinstance(row, dict) for row in columns[0]):
        return [value] if _CHATS & value.keys() else columns[0]  # {"data": [rows]}, but {"messages": [turns]} is a row
    if len({len(column) for column in columns}) == 1 and all(isinstance(c, (str, list)) for c in columns[0]):
        return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
    return [value]


def _parsed(text: str) -> Any:
    """The JSON value in a text, None where there is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _csv(path: Path, kind: str) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with _opened(path) as stream:
        lines = (text + "\n" for _, text in _lines(stream))
        header = next((line for line in lines if line.strip()), "")
        delimiter = "\t" if kind == ".tsv" else max(",;\t", key=header.count)
        names = next(csv.reader([header], delimiter=delimiter), [])
        reader = csv.DictReader(lines, [name.strip() for name in names], delimiter=delimiter)
        number = 0
        while True:
            number += 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield f"row {number}", Broken("not CSV", str(error))
                continue
            yield f"row {number}", {name: cell for name, cell in row.items() if name is not None}


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        message = f"{path}: reading .parquet needs pyarrow; {install_line('quantize')}"
        raise CalibrationError(message) from None
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (OSError, pyarrow.ArrowException) as error:
        raise CalibrationError(f"{path} is not a readable parquet file ({_short(error)}); fetch it again") from None


def _opened(path: Path) -> "_Reading":
    return _Reading(path)


class _Reading:
    """A file opened for reading, unpacked on the way; what goes wrong is an error of one line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> IO[bytes]:
        try:
            with self.path.open("rb") as stream:
                start = stream.read(8)
            if start.startswith(_ZSTANDARD):
                raise CalibrationError(f"{self.path} is packed by zstd; unpack it first")
            opener = next((o for magic, o in _COMPRESSED.items() if start.startswith(magic)), None)
            self.stream: IO[bytes] = opener(self.path) if opener is not None else self.path.open("rb")
        except OSError as error:
            raise CalibrationError(f"{self.path} cannot be read ({error.strerror or error})") from None
        return self.stream

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        self.stream.close()
        if isinstance(error, (EOFError, OSError, lzma.LZMAError, zlib.error)):
            raise CalibrationError(f"{self.path} is damaged or cut off ({_short(error)}); fetch it again") from None


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, str]]:
    """Numbered lines without their ends; each is UTF-8, or else Latin-1. UTF-16 is decoded as a whole."""
    for number, raw in enumerate(stream, 1):
        line = raw
        if number == 1:
            for mark, encoding in _UNICODE_MARKS:
                if line.startswith(mark) and encoding == "utf-16":
                    text = (line + stream.read())[len(mark) :].decode(_without_mark(encoding, mark), errors="replace")
                    yield from enumerate(text.splitlines(), 1)
                    return
            unmarked = _unmarked_utf_16(line)
            if unmarked:
                yield from enumerate((line + stream.read()).decode(unmarked, errors="replace").splitlines(), 1)
                return
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            yield number, line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            yield number, _latin(line).rstrip("\r\n")


def _unmarked_utf_16(data: bytes) -> str:
    """The encoding of a text in UTF-16 that does not begin with its mark, told by the zeros of Latin letters; or ""."""
    start = data[:4096]
    for encoding, high in (("utf-16-le", 1), ("utf-16-be", 0)):
        zeros, others = start[high::2].count(0), start[1 - high :: 2].count(0)
        if 2 * zeros > len(start[high::2]) and not others:
            return encoding
    return ""


def _without_mark(encoding: str, mark: bytes) -> str:
    if encoding != "utf-16":
        return encoding
    return "utf-16-le" if mark == codecs.BOM_UTF16_LE else "utf-16-be"


def _latin(data: bytes) -> str:
    """Windows' Latin-1 where it is, else the standard one, which every byte is of."""
    try:
        return data.decode("cp1252")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _with_line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _short(error: BaseException | None) -> str:
    return " ".join(str(error).split())[:160]
