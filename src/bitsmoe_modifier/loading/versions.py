"""Which versions of transformers and compressed-tensors the loader is written for."""

import importlib
import re
from importlib.metadata import PackageNotFoundError, version

#: By package, the releases (major, minor) from the first to before the second; pyproject.toml declares the same. The
#: tests run with the first of transformers, with one between (`make test-vllm`) and with the last (`make test-newest`).
SUPPORTED = {"transformers": ((5, 17), (5, 25)), "compressed_tensors": ((0, 17), (0, 21))}


def unsupported_versions() -> str:
    """Why the installed libraries cannot be used, in words for the user; "" where they can."""
    return "; ".join(filter(None, (_unsupported(package, *span) for package, span in SUPPORTED.items())))


def installed(package: str) -> list[str]:
    """What the package says of its version, and what was installed under its name; the two should agree."""
    stated = getattr(importlib.import_module(package), "__version__", None)
    try:
        recorded = version(package.replace("_", "-"))
    except PackageNotFoundError:  # found by its path alone
        recorded = None
    return [found for found in (stated, recorded) if found]


def _unsupported(package: str, first: tuple[int, int], end: tuple[int, int]) -> str:
    name = package.replace("_", "-")
    for found in installed(package):
        numbers = re.match(r"(\d+)\.(\d+)", found)
        release = (int(numbers[1]), int(numbers[2])) if numbers else None
        if release is None or not first <= release < end:
            return f"{name} {found} is not a version that bitsmoe-modifier knows ({_spelled(first, end)})"
    return ""


def _spelled(first: tuple[int, int], end: tuple[int, int]) -> str:
    return f">={first[0]}.{first[1]},<{end[0]}.{end[1]}"
