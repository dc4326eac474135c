"""A row of a table or dataset to a document: text, chat, pairs of prompt and answer, or tokens."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from .. import messages
from ..errors import CalibrationError
from .tables import Broken, Row

#: text, or token ids
Document = str | list[int]

_CHATS = ("messages", "conversations", "conversation")
#: columns that belong together, in the order in which they are read
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "input", "output"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
)
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}
#: rows without one usable after which a source is given up
_PATIENCE = 1000
#: columns that a message names
_NAMED = 12


class Unusable(Exception):
    """A row gives no document. ``args``: the column that it is about, and what is wrong with it."""


def documents(source: str, rows: Iterable[Row], column: str, tokenizer: Any = None) -> Iterator[Document]:
    """The documents of a table, row by row. Rows that give none are skipped, and counted on stderr at the end.

    Args:
        source: for messages.
        rows: with their places.
        column: that holds the text. Where it is ``text``, the default, and a row has none, its ``messages`` or
            ``conversations`` are rendered by the tokenizer's chat template; prompt and completion, instruction and
            output, question and answer follow each other; ``input_ids`` are taken as they are.
        tokenizer: None where no chat can be rendered.

    Raises:
        CalibrationError: when none of the rows, or of the first thousand, gives a document: naming row and column.
    """
    skipped: Counter[str] = Counter()
    first: dict[str, str] = {}
    used, number = 0, 0
    try:
        for number, (where, row) in enumerate(rows, 1):
            try:
                found = _documents(row, column, tokenizer)
            except Unusable as problem:
                place, reason = problem.args
                skipped[reason] += 1
                first.setdefault(reason, where + place)
                if not used and number >= _PATIENCE:
                    break
                continue
            used += 1
            yield from found
    finally:
        if used and skipped:
            _say_skipped(source, number, skipped, first)
    if number and not used:
        reason = next(iter(first))
        which = f"none of the {'first ' * (number >= _PATIENCE)}{number} rows can" if number > 1 else "its row cannot"
        raise CalibrationError(
            f"{source}: {which} be used; {first[reason]}: {reason}; name the column that holds text by --text-column"
        )


def _say_skipped(source: str, rows: int, skipped: Counter[str], first: dict[str, str]) -> None:
    parts = ", ".join(f"{count}: {reason} (first: {first[reason]})" for reason, count in skipped.most_common())
    total = sum(skipped.values())
    messages.say("warning", f"{source}: {total} of {rows} rows read were skipped: {parts}", skipped=total, rows=rows)


def _documents(row: Any, column: str, tokenizer: Any) -> list[Document]:
    """What one row gives, at least one document.

    Raises:
        Unusable: saying why it gives none.
    """
    if isinstance(row, Broken):
        raise Unusable("", row.reason)
    if isinstance(row, str):
        return [_text(row, column)]
    if isinstance(row, list) and row:
        ids = all(isinstance(one, int) for one in row)
        return _tokens(row, "of a bare list", None, tokenizer) if ids else [_chat(row, "of a bare list", tokenizer)]
    if not isinstance(row, dict):
        raise Unusable("", f"{_kind(row)}, not an object with columns")
    if row.get(column) is not None:
        return _value(row[column], column, row, tokenizer)
    if column == "text":
        for chat in _CHATS:
            if row.get(chat) is not None:
                return [_chat(row[chat], chat, tokenizer)]
        for pair in _PAIRS:
            if all(row.get(name) is not None for name in (pair[0], pair[-1])) and all(name in row for name in pair):
                return [_pair([(name, row[name]) for name in pair], tokenizer)]
        if row.get("input_ids") is not None:
            return _tokens(row["input_ids"], "input_ids", row.get("attention_mask"), tokenizer)
    if column in row:
        raise Unusable(f", column {column!r}", "null")
    names = list(map(str, row))
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    raise Unusable("", f"no column {column!r} but {', '.join(names[:_NAMED]) or 'none'}{more}")


def _value(value: Any, column: str, row: dict[str, Any], tokenizer: Any) -> list[Document]:
    """The document in the column that holds text."""
    if isinstance(value, list) and value:
        if all(isinstance(part, str) for part in value):
            return [_text("\n\n".join(value), column)]
        if all(isinstance(part, dict) for part in value):
            return [_chat(value, column, tokenizer)]
        if column == "input_ids":
            return _tokens(value, column, row.get("attention_mask"), tokenizer)
    return [_text(value, column)]


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise Unusable(f", column {column!r}", f"{_kind(value)}, not text")
    if not value.strip():
        raise Unusable(f", column {column!r}", "blank")
    return value


def _pair(cells: list[tuple[str, Any]], tokenizer: Any) -> str:
    """Columns that follow each other; as chats (lists of turns) they are one."""
    if any(isinstance(value, list) for _, value in cells):
        turns = [turn for _, value in cells for turn in (value if isinstance(value, list) else [value])]
        return _chat(turns, cells[0][0], tokenizer)
    texts = [(name, value) for name, value in cells if value is not None and value != ""]
    return "\n\n".join(_text(value, name).strip() for name, value in texts)


def _chat(value: Any, column: str, tokenizer: Any) -> str:
    """A list of turns by the chat template; without one, what was said, turn by turn."""
    place = f", column {column!r}"
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return _text(value, column)
    if not isinstance(value, list) or not value:
        raise Unusable(place, f"{_kind(value)}, not a list of turns")
    turns = [_turn(turn, place) for turn in value]
    if getattr(tokenizer, "chat_template", None) is None:
        return _text("\n\n".join(turn["content"] for turn in turns if turn["content"]), column)
    try:
        return _text(tokenizer.apply_chat_template(turns, tokenize=False), column)
    except Unusable:
        raise
    except Exception as error:  # noqa: BLE001 - a template is a program of the model's authors
        reason = " ".join(str(error).split())[:120]
        raise Unusable(place, f"the chat template refuses it ({reason})") from None


def _turn(turn: Any, place: str) -> dict[str, Any]:
    """A turn with ``role`` and ``content``, whatever its keys were."""
    if not isinstance(turn, dict):
        raise Unusable(place, f"{_kind(turn)} among the turns")
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        content = "".join(
            part if isinstance(part, str) else str(part.get("text") or "")
            for part in content
            if isinstance(part, (str, dict))
        )
    if not isinstance(role, str) or not (content is None or isinstance(content, str)):
        raise Unusable(place, "a turn without role or content")
    rest = {key: turn[key] for key in turn if key not in ("role", "from", "content", "value") and turn[key] is not None}
    return {**rest, "role": _ROLES.get(role, role), "content": content or ""}


def _tokens(value: Any, column: str, mask: Any, tokenizer: Any) -> list[Document]:
    """Token ids, padding left out: what the mask says, or runs of the padding token at both ends."""
    place = f", column {column!r}"
    if isinstance(value, list) and value and all(isinstance(part, list) for part in value):
        masks = mask if isinstance(mask, list) and len(mask) == len(value) else [None] * len(value)
        return [found for ids, one in zip(value, masks, strict=True) for found in _tokens(ids, column, one, tokenizer)]
    if not isinstance(value, list) or not all(isinstance(one, int) and not isinstance(one, bool) for one in value):
        raise Unusable(place, f"{_kind(value)}, not token ids")
    ids = list(value)
    if isinstance(mask, list):
        if len(mask) != len(ids):
            raise Unusable(place, "an attention_mask of another length")
        ids = [one for one, kept in zip(ids, mask, strict=True) if kept]
    padding = getattr(tokenizer, "pad_token_id", None)
    if padding is not None and padding != getattr(tokenizer, "eos_token_id", None):
        while ids and ids[-1] == padding:
            ids.pop()
        while ids and ids[0] == padding:
            ids.pop(0)
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else None
    if any(one < 0 or (size is not None and one >= size) for one in ids):
        raise Unusable(place, "token ids that the tokenizer does not have")
    if not ids:
        raise Unusable(place, "no token ids")
    return [ids]


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
