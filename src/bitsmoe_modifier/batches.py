"""Batches as large as memory allows: half of them when it does not."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from . import messages
from .errors import BitsMoEError

T = TypeVar("T")
#: what torch says on a CPU, in a plain RuntimeError
_CPU_WORDS = ("can't allocate memory", "not enough memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was not enough, on any device."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _CPU_WORDS)
    )


def with_smaller_batches(
    run: Callable[[int], T], batch_size: int, what: str, remedy: str = "give shorter rows by --seq-len"
) -> tuple[T, int]:
    """Run something, with half the batch size again and again while memory is not enough.

    Args:
        run: from a batch size to a result; starts over each time.
        batch_size: to begin with.
        what: names it in messages.
        remedy: what the user can do when a single row is too much.

    Returns:
        The result, and the batch size that it was made with.

    Raises:
        BitsMoEError: when a single row is too much.
    """
    while True:
        try:
            return run(batch_size), batch_size
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if batch_size == 1:
                raise BitsMoEError(f"{what}: out of memory with one row at a time; {remedy}") from error
        batch_size //= 2
        messages.say(
            "warning", f"{what}: out of memory; going on with --batch-size {batch_size}", batch_size=batch_size
        )
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
