"""What follows a finished result. Its failure is said, and takes nothing back."""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def reason(error: BaseException) -> str:
    """An error in one line, with its type where the text alone says too little."""
    text = next(iter(str(error).strip().splitlines()), "")
    return text if isinstance(error, OSError) and text else f"{type(error).__name__}: {text}".rstrip(": ")


def attempted(what: str, do: Callable[[], T], otherwise: T) -> tuple[T, list[str]]:
    """Do what the result that is there already does not depend on.

    Args:
        what: what it means when that fails, e.g. ``OUT is written, but its README.md is not``.
        do: the work.
        otherwise: in place of its result.

    Returns:
        The result, and a sentence for the user where there is none.
    """
    try:
        return do(), []
    except Exception as error:  # noqa: BLE001 - whatever it is, hours of work are on disk and shall be said so
        return otherwise, [f"{what} ({reason(error)})"]
