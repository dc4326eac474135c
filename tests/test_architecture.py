"""The order of the rooms: nothing imports upwards, and the method and the format know no framework."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "bitsmoe_modifier"
#: From the bottom to the top; a room may import itself and those before it. Files beside the rooms that everybody may
#: import come first, the front door last.
BASE = (
    "errors",
    "extras",
    "remote_code",
    "messages",
    "logs",
    "devices",
    "batches",
    "aftermath",
    "native",
    "rendering",
    "_after_import",
)
ROOMS = (
    "storage",
    "method",
    "runtime",
    "sources",
    "loading",
    "calibration",
    "evaluation",
    "checkpoints",
    "pages",
    "comparison",
    "serving",
)
FRONT = ("cli", "__main__", "__init__")
ORDER = {name: level for level, name in enumerate((*BASE, *ROOMS, *FRONT))}
FRAMEWORKS = ("transformers", "compressed_tensors", "llmcompressor", "vllm", "lm_eval", "datasets", "huggingface_hub")

FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def imported(file: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a file imports, wherever in it; relative names from the package on."""
    here = ["bitsmoe_modifier", *file.parts[:-1]]
    for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{name}.{alias.name}") for alias in node.names)


def room(file: Path) -> str:
    return file.parts[0] if len(file.parts) > 1 else file.stem


def test_every_room_has_its_place() -> None:
    assert {room(file) for file in FILES} <= set(ORDER)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_no_import_goes_upwards(file: Path) -> None:
    upwards = [
        f"{file}:{line} imports {name}"
        for line, name in imported(file)
        if name.startswith("bitsmoe_modifier.")
        and (target := name.split(".")[1]) in ORDER
        and ORDER[target] > max(ORDER[room(file)], len(BASE) - 1)
    ]
    assert not upwards


@pytest.mark.parametrize("file", [f for f in FILES if f.parts[0] in ("method", "storage")], ids=str)
def test_method_and_storage_know_no_framework(file: Path) -> None:
    assert not [name for _, name in imported(file) if name.split(".")[0] in FRAMEWORKS]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_files_are_short(file: Path) -> None:
    """One idea per file (CONTRIBUTING.md)."""
    assert len((PACKAGE / file).read_text().splitlines()) <= 400
