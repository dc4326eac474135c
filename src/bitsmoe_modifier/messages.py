"""What a command says on stderr while it works: text, JSON lines, or nothing but errors."""

import json
import sys
import time
from typing import Literal, TextIO

Mode = Literal["text", "json", "quiet"]
_mode: Mode = "text"


def configure(mode: Mode) -> None:
    """Choose how this process speaks."""
    global _mode
    _mode = mode


def mode() -> Mode:
    """How this process speaks."""
    return _mode


def say(event: str, message: str, *, stream: TextIO | None = None, **fields: object) -> None:
    """Say one thing.

    Args:
        event: what kind of thing; "error" is said in every mode.
        message: one line for people.
        stream: stderr unless given.
        fields: more for programs, in the JSON mode only; JSON types.
    """
    stream = stream or sys.stderr
    if _mode == "json":
        entry = {"time": round(time.time(), 3), "event": event, "message": message, **fields}
        print(json.dumps(entry, ensure_ascii=False), file=stream, flush=True)
    elif _mode == "text" or event == "error":
        print(message, file=stream, flush=True)
