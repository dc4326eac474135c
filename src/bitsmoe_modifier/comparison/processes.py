"""Run a function in a process of its own, with its output in a log file and its progress in a bar here.

Runs have processes of their own because oneshot leaves traces (a global session, changed conversion mappings),
because the peak memory of one must not hide another's, and because a crash must not take the others along. Importing
the libraries takes ten seconds: on a CPU the processes are forked from a server that has imported them once. CUDA does
not survive a fork, so there every process starts afresh.
"""

import multiprocessing
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .. import messages
from ..errors import BitsMoEError
from ..logs import set_up_logging

_PRELOAD = ["llmcompressor", "transformers", "bitsmoe_modifier.comparison.runs"]
#: the latest state of any tqdm bar in a log: its title and percentage
_BAR = re.compile(r"([^\r\n:|]{1,60}(?::[^\r\n:|]{1,30})?):\s+(\d+)%\|")
_TAIL_BYTES = 2000
_SAFE_PATH = "PYTHONSAFEPATH"


@dataclass(frozen=True)
class Failure:
    """A function that did not return.

    Attributes:
        message: one line.
        details: the traceback; empty where the process died.
        expected: whether it was one of our own errors, which speak for themselves.
    """

    message: str
    details: str
    expected: bool


def start_context(device: str) -> Any:
    """The multiprocessing context for work on ``device``; begins importing the libraries in the background."""
    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")  # while importing; `set_up_logging` comes after it
    if torch.device(device).type != "cpu" or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    # the server would start with the first process; started now, it imports while this one reads the text
    from multiprocessing.forkserver import ensure_running

    with _safe_path():
        ensure_running()
    return context


@contextmanager
def _safe_path() -> Iterator[None]:
    """Let Python processes that begin meanwhile not look for modules in the current folder before they know better.

    They get this process's path later, but by then a user's ``datasets.py`` or ``random.py`` would have been imported
    in the place of the library's. Python 3.10 knows no such thing.
    """
    before = os.environ.get(_SAFE_PATH)
    os.environ[_SAFE_PATH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SAFE_PATH]
        else:
            os.environ[_SAFE_PATH] = before


def run_in_process(
    context: Any,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    log: Path,
    show: Callable[[str], None],
    verbose: bool = False,
) -> Any:
    """Call ``function(*arguments)`` in a new process.

    Args:
        context: from `start_context`.
        function: of a module, so that the process can import it.
        arguments: picklable.
        log: file that takes everything the process prints.
        show: called about twice a second with what the process is doing.
        verbose: let the process print to the terminal instead, with all messages of the libraries.

    Returns:
        What ``function`` returned, or a `Failure`.
    """
    receiver, sender = context.Pipe(duplex=False)
    options = (str(log), verbose, torch.get_num_threads(), dict(os.environ))
    process = context.Process(target=_entry, args=(sender, function, arguments, options))
    with _safe_path():
        process.start()
    sender.close()
    result: Any = None
    try:
        while not receiver.poll(0.5):
            if not process.is_alive() and not receiver.poll():
                break
            show(_progress(log))
        try:
            result = receiver.recv()
        except EOFError:
            result = None
        process.join()
    finally:
        if process.is_alive():
            process.terminate()
            process.join()
        receiver.close()
    if result is None:
        return Failure(f"the process {_ending(process.exitcode)}", "", expected=False)
    return result[0]


def _entry(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...], options: Any) -> None:
    """What the new process runs: redirect its output, call, send the result back."""
    log, verbose, threads, environment = options
    os.environ.update(environment)  # the fork server may have started with another one
    if not verbose:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
    torch.set_num_threads(threads)
    # tqdm's own is a semaphore between processes, of whose leaking Python warns where this one is ended by Ctrl-C
    tqdm.set_lock(threading.RLock())
    set_up_logging(verbose=True)  # all of it: into the log, or to who asked for it
    result: Any
    try:
        result = function(*arguments)
    except Exception as error:  # noqa: BLE001 - it is reported, not swallowed
        traceback.print_exc()
        message = str(error) if isinstance(error, BitsMoEError) else f"{type(error).__name__}: {error}"
        result = Failure(message, traceback.format_exc(), isinstance(error, BitsMoEError))
    sys.stdout.flush()
    sys.stderr.flush()
    sender.send((result,))
    sender.close()


def _progress(log: Path) -> str:
    """The last progress bar in a log, as ``(2/5): Calibrating 40%``."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            tail = stream.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    found = _BAR.findall(tail)
    return f"{found[-1][0].strip()} {found[-1][1]}%" if found else ""


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        reason = " (out of memory?)" if code == -9 else ""
        return f"was killed by signal {-code}{reason}"
    return f"ended with exit code {code} and no result"


class Status:
    """One line at the bottom of the terminal: which run it is, what it does, for how long.

    Where there is no terminal (a log file), only the lines that stay are printed; in the modes of `messages` that have
    no bar, events.
    """

    def __init__(self, total: int) -> None:
        shape = "{n_fmt}/{total_fmt} |{bar:20}| {elapsed} {desc}"
        plain = True if messages.mode() != "text" else None  # None: disabled where there is no terminal
        self._bar = tqdm(total=total, bar_format=shape, unit="run", disable=plain, leave=False)
        self._name = ""
        self._since = time.monotonic()

    def begin(self, name: str) -> None:
        """Something starts."""
        self._name, self._since = name, time.monotonic()
        if messages.mode() == "json":
            messages.say("begin", name)
        self.show("")

    def show(self, doing: str) -> None:
        """What it is doing now."""
        self._bar.set_description_str(f"{self._name} {time.monotonic() - self._since:.0f} s {doing}")

    def end(self, line: str) -> None:
        """It is done: leave a line about it above the bar."""
        self._say("end", line)
        self._bar.update()

    def note(self, line: str) -> None:
        """Leave a line above the bar."""
        self._say("note", line)

    def _say(self, event: str, line: str) -> None:
        if messages.mode() == "text":
            tqdm.write(line, file=sys.stderr)  # above the bar
        else:
            messages.say(event, line, name=self._name, seconds=round(time.monotonic() - self._since, 1))

    def close(self) -> None:
        """Remove the line."""
        self._bar.close()
