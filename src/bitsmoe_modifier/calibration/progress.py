"""Where a long run stands: one line, in place of the libraries' bars."""

import os
import sys
import time

from .. import messages


class Progress:
    """Says at every layer and phase what has been done, and about how long the rest takes.

    In a terminal the line stays where it is; in a file there is one for every step; with ``--log-json`` it is an event.
    While tqdm's bars are shown (``TQDM_DISABLE`` is not set), it is silent.

    Args:
        steps: how many there will be, all about as long.
    """

    def __init__(self, steps: int) -> None:
        self.steps, self.done = steps, 0
        self._started = time.monotonic()
        self._in_place = messages.mode() == "text" and sys.stderr.isatty()

    def begin(self, layer: str, phase: str) -> None:
        """A step begins."""
        if os.environ.get("TQDM_DISABLE", "0") in ("", "0"):
            self.done += 1
            return
        elapsed = time.monotonic() - self._started
        remaining = elapsed / self.done * (self.steps - self.done) if self.done else None
        left = "" if remaining is None else f", about {duration(remaining)} left"
        line = f"{self.done + 1}/{self.steps} {phase}: {layer}, {duration(elapsed)}{left}"
        if self._in_place:
            print(f"\r\033[2K{line}", end="", file=sys.stderr, flush=True)
        else:
            messages.say(
                "progress",
                line,
                layer=layer,
                phase=phase,
                step=self.done + 1,
                steps=self.steps,
                elapsed=round(elapsed, 1),
                remaining=None if remaining is None else round(remaining, 1),
            )
        self.done += 1

    def end(self) -> None:
        """Remove the line of a terminal."""
        if self._in_place:
            print("\r\033[2K", end="", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds as ``45 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
