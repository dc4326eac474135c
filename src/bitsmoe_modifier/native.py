"""C++ sources of this package, compiled at their first use and loaded with ctypes.

A source is one file with a plain C interface and no headers but the standard library's, so that compiling takes a
second and no build system. The shared object stays in a cache folder under a name that hashes everything it depends on:
source, flags, compiler, and the CPU whose instructions it uses. Where no compiler is, callers have a slower way in
PyTorch.

Environment: BITSMOE_NATIVE=0 turns compiled code off; BITSMOE_NATIVE_CACHE is the cache folder (default: bitsmoe in the
user's cache folder); CXX is the compiler. Where the cache folder cannot be written, or nothing on its disk may be run,
every process compiles into a temporary folder of its own.
"""

import atexit
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

_LOGGER = logging.getLogger(__name__)

FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC")


@cache
def native_library(source: Path, flags: tuple[str, ...] = ()) -> ctypes.CDLL | None:
    """The compiled form of a C++ file, or None where there is none, which a warning explains once.

    Calls through ctypes release Python's lock; a caller may run several at a time in threads.

    Args:
        source: of one file; every function that is called is ``extern "C"``.
        flags: for the compiler, besides `FLAGS`.
    """
    if os.environ.get("BITSMOE_NATIVE") == "0":
        return None
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        _LOGGER.warning(
            "%s is not compiled, PyTorch runs in its place, slower: no C++ compiler found; install one (apt-get "
            "install g++), or name it by CXX",
            source.name,
        )
        return None
    details = ""
    for folder in (_cache_folder, _temporary_folder):
        try:
            return ctypes.CDLL(str(_compiled(source, compiler, flags, folder())))
        except subprocess.SubprocessError as error:
            details = getattr(error, "stderr", None) or str(error)
            break  # wherever it is compiled to
        except (OSError, RuntimeError) as error:  # no such compiler, nowhere to write, no home folder
            details = str(error)
    _LOGGER.warning(
        "%s is not compiled, PyTorch runs in its place, slower: %s: %s", source.name, compiler, details.strip()
    )
    return None


def _compiled(source: Path, compiler: str, flags: tuple[str, ...], folder: Path) -> Path:
    """Path of the shared object in the folder, compiled unless it is there."""
    text = source.read_bytes()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    parts = (text, "\0".join((*FLAGS, *flags, version, _cpu())).encode())
    name = f"{source.stem}-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:20]}.so"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    if not path.exists():
        # compiled beside it and moved there in one step: other processes may be doing the same
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            fresh = Path(scratch) / name
            command = [compiler, *FLAGS, *flags, str(source), "-o", str(fresh)]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
            os.replace(fresh, path)
    return path


def _cache_folder() -> Path:
    chosen = os.environ.get("BITSMOE_NATIVE_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitsmoe"


@cache
def _temporary_folder() -> Path:
    """This process's own, gone when it ends."""
    folder = tempfile.mkdtemp(prefix="bitsmoe-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _cpu() -> str:
    """What decides which instructions ``-march=native`` allows: a home folder may be shared among machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
