"""The command line: ``bitsmoe quantize | compare | eval | try | plan | inspect | export | import``.

In: words. Out: an exit code. May import: every room, but only inside the function that runs a command, so that
``bitsmoe --help`` and the completion of words cost nothing.
"""

import io
import shlex
import sys
from collections.abc import Sequence

import typer

from .app import app

from . import quantizing, measuring, trying, checkpoints  # noqa: F401 - the order of the commands  # isort: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the words after ``bitsmoe``; those of this process unless given.

    Returns:
        0: done. 1: some runs failed, the report says which. 2: the inputs cannot be used. 130: interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="replace")  # a "×" that the terminal does not have shall not end a run
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        typer.main.get_command(app)(args=given, prog_name="bitsmoe", obj=shlex.join(["bitsmoe", *given]))
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    return 0
