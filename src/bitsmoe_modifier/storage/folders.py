"""Output folders that appear whole or not at all, and results that stay where they are when that fails.

A result is written to a temporary folder of its own: beside the output folder, whose name it takes at the end; or,
where the output folder exists, inside of it, and its files move up at the end (a mount point or the current folder
cannot be replaced). Links are resolved first. When something fails at the end, the temporary folder stays and the error
names it: it may hold the work of days.
"""

import glob
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from .. import messages
from ..errors import BitsMoEError
from .locks import locked

#: what an empty filesystem holds
_OF_THE_FILESYSTEM = ("lost+found",)
#: moved into place last: what makes a folder a checkpoint
_LAST = ("config.json",)


def check_new_folder(out: Path) -> None:
    """Refuse an output folder that holds something.

    Raises:
        BitsMoEError: naming it.
    """
    try:
        occupied = is_occupied(out) or (out.exists() and not out.is_dir())
    except OSError as error:
        raise BitsMoEError(f"{out} cannot be read ({error.strerror}); give another --out") from None
    if occupied:
        raise BitsMoEError(f"{out} exists and is not an empty folder; give another --out")


def is_occupied(folder: Path) -> bool:
    """Whether a folder holds something that is not of a filesystem, a running run or a failed one."""
    return folder.is_dir() and any(not _ignored(entry.name) for entry in folder.iterdir())


def _ignored(name: str) -> bool:
    return name in _OF_THE_FILESYSTEM or (name.startswith(".") and name.endswith((".partial", ".lock")))


def resolved(out: Path | str) -> Path:
    """The folder that a path stands for: absolute, links followed, whether it exists or not.

    Raises:
        BitsMoEError: when the links lead nowhere, or the path is not UTF-8.
    """
    try:
        path = Path(out).expanduser().resolve()
        str(path).encode()  # safetensors writes to no other paths, and would say so at the end
        return path
    except UnicodeEncodeError:
        raise BitsMoEError(f"{os.fsencode(out)!r} is not UTF-8; give another --out") from None
    except (OSError, RuntimeError) as error:
        raise BitsMoEError(f"{out}: its links lead nowhere ({error}); give another --out") from None


def check_outside(outs: Iterable[Path], **folders: str | None) -> None:
    """Refuse folders of a run that are an output folder, or inside of one: it would never be empty.

    Args:
        outs: output folders, as `resolved` returns them.
        folders: by their options; None is not given.

    Raises:
        BitsMoEError: naming the option and both folders.
    """
    for name, folder in folders.items():
        for out in outs:
            if folder is None:
                continue
            inside = resolved(folder)
            if inside == out or out in inside.parents:
                raise BitsMoEError(
                    f"--{name.replace('_', '-')} {folder} is in {out}, which holds nothing but the result; give a "
                    "folder beside it"
                )


def existing_parent(out: Path) -> Path:
    """The folder whose filesystem ``out`` is going to be written to."""
    path = resolved(out)
    return next(folder for folder in (path, *path.parents) if folder.exists())


class OutputFolder:
    """An output folder that this run alone writes, from entering the block to its end.

    Attributes:
        asked: the path as the user gave it.
        path: the folder that it stands for.
        failed: whether writing it was begun and failed.

    Raises:
        BitsMoEError: on entering: when it holds something, cannot be written, or another run is writing it.
    """

    def __init__(self, out: Path | str) -> None:
        self.asked = Path(out)
        self.path = resolved(out)
        self.failed = False
        self._ends = ExitStack()
        self._temporary = Path()

    def __enter__(self) -> "OutputFolder":
        check_new_folder(self.path)
        place = self.path if self.path.exists() else self.path.parent
        refusal = f"another run is writing {self.asked}; wait for it, or give another --out"
        with ExitStack() as entered:
            try:
                place.mkdir(parents=True, exist_ok=True)
                entered.enter_context(locked(place / f".{self.path.name}.lock", refusal))
                check_new_folder(self.path)  # the run before may have finished meanwhile
                for folder in leftovers(self.path):
                    self._say_left(folder)
                # made now, so that a permission that is lost meanwhile does not keep the result from being written
                prefix, suffix = f".{self.path.name}.", ".partial"
                self._temporary = Path(tempfile.mkdtemp(dir=place, prefix=prefix, suffix=suffix))
                self._temporary.chmod(0o777 & ~_umask())
            except OSError as error:
                raise BitsMoEError(f"{place} cannot be written ({error.strerror}); give another --out") from None
            self._ends = entered.pop_all()
        return self

    def __exit__(self, *raised: object) -> None:
        with suppress(OSError):
            self._temporary.rmdir()  # only where nothing was written
        self._ends.close()

    @contextmanager
    def written(self) -> Iterator[Path]:
        """A temporary folder, which becomes the output folder when the block ends.

        Raises:
            BitsMoEError: when the block or what follows it fails: naming the folder, which stays.
        """
        try:
            yield self._temporary
            self._put_in_place()
        except Exception as error:
            self.failed = True
            reason = str(error) if isinstance(error, BitsMoEError) else f"{type(error).__name__}: {error}"
            raise BitsMoEError(f"{self.asked} could not be written ({reason}){self._kept()}") from error
        except BaseException:
            messages.say("error", f"{self.asked} was not finished{self._kept()}")
            raise

    def _put_in_place(self) -> None:
        """Rename the temporary folder, or move what it holds into the folder that exists; all of it or nothing."""
        check_new_folder(self.path)
        if not self.path.exists():
            self._temporary.rename(self.path)
            return
        moved: list[Path] = []
        try:
            for file in sorted(self._temporary.iterdir(), key=lambda file: (file.name in _LAST, file.name)):
                os.rename(file, self.path / file.name)
                moved.append(file)
        except OSError:
            for file in moved:
                with suppress(OSError):  # then both folders hold a part
                    os.rename(self.path / file.name, file)
            raise
        self._temporary.rmdir()

    def _kept(self) -> str:
        """Where the result is, for a message."""
        try:
            held = any(self._temporary.iterdir())
        except OSError:
            return ""
        return f"; what was written is in {self._temporary}" if held else ""

    def _say_left(self, folder: Path) -> None:
        """An empty one is of a run that was killed before it wrote: delete it."""
        try:
            folder.rmdir()
        except OSError:
            messages.say("warning", f"an earlier run for {self.asked} left {folder}; delete it if you do not need it")


def leftovers(out: Path) -> list[Path]:
    """Temporary folders of earlier runs for ``out`` that were killed or failed."""
    path = resolved(out)
    beside = path.parent.glob(f".{glob.escape(path.name)}.*.partial") if path.parent.is_dir() else ()
    inside = path.glob(f".{glob.escape(path.name)}.*.partial") if path.is_dir() else ()
    # what `tempfile` put there has no point: with one it is of a folder whose name begins with this one's and a point
    return sorted(one for one in {*beside, *inside} if "." not in one.name[len(path.name) + 2 : -len(".partial")])


def check_file_place(file: str | Path, option: str) -> None:
    """Refuse a file to write whose folder does not exist or cannot be written, before the work that it is to hold.

    Raises:
        BitsMoEError: naming the option and the folder.
    """
    path = Path(file)
    if path.is_dir():
        raise BitsMoEError(f"{option} {file} is a folder; give a file name")
    if not path.parent.is_dir():
        raise BitsMoEError(f"{option} {file}: there is no folder {path.parent}; create it first")
    if not os.access(path.parent, os.W_OK):
        raise BitsMoEError(f"{option} {file}: {path.parent} cannot be written; give another file")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
