"""One run at a time: locks that the system takes back when their process ends, however it ends."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import BitsMoEError

#: locks that this process keeps: descriptors by path
_KEPT: dict[str, int] = {}


def acquire(path: Path, refusal: str) -> int:
    """Lock a file, which is created where it does not exist.

    Returns:
        The open descriptor; closing it, or the end of the process, gives the lock back. −1 on filesystems without
        locks, where nothing is locked.

    Raises:
        BitsMoEError: ``refusal``, when another run holds the lock.
        OSError: when the file cannot be created.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
                return descriptor
        except FileNotFoundError:
            pass  # its holder deleted the file between our opening and our locking it: try again
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise BitsMoEError(refusal) from None
            return -1
        os.close(descriptor)


@contextmanager
def locked(path: Path, refusal: str) -> Iterator[None]:
    """Hold a lock while the block runs; see `acquire`."""
    descriptor = acquire(path, refusal)
    try:
        yield
    finally:
        with suppress(OSError):  # a file that cannot be deleted locks nothing once its descriptor is closed
            path.unlink(missing_ok=True)
        if descriptor >= 0:
            os.close(descriptor)


def keep_locked(path: Path, refusal: str) -> None:
    """Hold a lock until `release` or the end of this process; once more does nothing. See `acquire`."""
    key = str(path.resolve())
    if key not in _KEPT:
        _KEPT[key] = acquire(path, refusal)


def release(path: Path) -> None:
    """Give back what `keep_locked` took."""
    descriptor = _KEPT.pop(str(path.resolve()), -1)
    if descriptor >= 0:
        os.close(descriptor)
