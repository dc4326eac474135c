"""Output folders that appear whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import BitsMoEError


def check_new_folder(out: Path) -> None:
    """Refuse an output folder that holds something.

    Raises:
        BitsMoEError: naming it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BitsMoEError(f"{out} exists and is not an empty folder; give another --out")


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A temporary folder beside ``out``, which takes its name when the block ends, and vanishes when it fails.

    Raises:
        BitsMoEError: when ``out`` holds something.
    """
    check_new_folder(out)
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
