"""Collect documentation that every Python carries, or text files, and split it by module into two sides."""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_PERCENT = 8
REPEATABLE = 40
DOCUMENT_GAP = "\n\n\n"

# Folders without documentation worth reading (`encodings` is machine-written one-liners) or that are not Python's own.
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "site-packages", "dist-packages"}
)
# A module with terms of its own, or by a copyright holder who has not licensed it to the PSF, is left out: shipping its
# text would take more notices than the PSF's.
COPYRIGHT_LINE = re.compile(
    r"copyright\W+(?:\(c\)\W*)?(?:\d{4}|cnri|disney)(?!.*python software foundation)", re.IGNORECASE
)
OWN_TERMS = re.compile(
    r"permission to use, copy|permission is hereby granted|redistribution and use|mit licen[cs]e|spdx-license",
    re.IGNORECASE,
)
LICENSED_TO_PSF = re.compile(r"licensed to (?:the )?psf", re.IGNORECASE)


@dataclass(frozen=True)
class Document:
    """One unit of the split: a module (or a topic, or a block of a text file) and its text."""

    name: str
    text: str


# ------------------------------------------------------------------------------------------ collect


def docstrings(source: str) -> list[tuple[str, str]]:
    """(qualified name, cleaned docstring) of the module, classes and functions in ``source``, in source order."""
    found: list[tuple[str, str]] = []

    def visit(node: ast.AST, path: str) -> None:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if not isinstance(node, ast.Module):
                path = f"{path}.{node.name}" if path else node.name
            text = ast.get_docstring(node, clean=False)
            if text and (cleaned := inspect.cleandoc(text).strip()):
                found.append((path, cleaned))
        for child in ast.iter_child_nodes(node):
            visit(child, path)

    visit(ast.parse(source), "")
    return found


def is_shippable(source: str) -> bool:
    """Whether the module's text is under the PSF licence alone, going by the copyright and licence lines it carries."""
    if OWN_TERMS.search(source):
        return False
    return not COPYRIGHT_LINE.search(source) or bool(LICENSED_TO_PSF.search(source))


def stdlib_sources(root: Path) -> Iterator[tuple[str, str]]:
    """(dotted module name, source) of the standard library's documented Python files, in name order."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts) or not all(part.isidentifier() for part in relative.parts[:-1]):
            continue
        parts = relative.with_suffix("").parts
        source = path.read_text(encoding="utf-8", errors="replace")
        if is_shippable(source):
            yield ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts), source


def drop_seen(text: str, seen: set[str]) -> str:
    """``text`` without the paragraphs already in ``seen``, which grows by the paragraphs kept.

    Paragraphs shorter than ``REPEATABLE`` characters ("For example:") may repeat. Whitespace is not compared.
    """
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        key = " ".join(paragraph.split())
        if len(key) < REPEATABLE or key not in seen:
            seen.add(key)
            kept.append(paragraph)
    return "\n\n".join(kept).strip()


def stdlib_documents(root: Path | None = None) -> list[Document]:
    """Documentation of this Python: one document per topic of ``pydoc_data``, one per module with docstrings.

    Repeated docstrings and repeated paragraphs are kept once, so the two sides of the split share none.
    """
    from pydoc_data.topics import topics

    paragraphs: set[str] = set()
    documents = [
        Document(f"topic:{name}", drop_seen(text.strip(), paragraphs)) for name, text in sorted(topics.items())
    ]
    seen: set[str] = set()
    for module, source in stdlib_sources(root or Path(sysconfig.get_paths()["stdlib"])):
        sections = []
        for name, text in docstrings(source):
            if text not in seen and (fresh := drop_seen(text, paragraphs)):
                sections.append(f"{module}.{name}\n\n{fresh}" if name else f"module {module}\n\n{fresh}")
            seen.add(text)
        if sections:
            documents.append(Document(module, "\n\n".join(sections)))
    return [document for document in documents if document.text]


def file_documents(paths: Sequence[Path], block: int = 4000) -> list[Document]:
    """Text files cut at blank lines into documents of about ``block`` characters, named ``<stem>:<number>``."""
    documents = []
    for path in paths:
        pending: list[str] = []
        count = size = 0
        for paragraph in [*re.split(r"\n\s*\n", path.read_text(encoding="utf-8")), None]:
            if pending and (paragraph is None or size >= block):
                documents.append(Document(f"{path.stem}:{count}", "\n\n".join(pending).strip()))
                pending, size, count = [], 0, count + 1
            if paragraph is not None:
                pending.append(paragraph)
                size += len(paragraph)
    return [document for document in documents if document.text]


# -------------------------------------------------------------------------------------------- split


def stable_hash(name: str) -> int:
    """64-bit hash of a name, the same in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def is_held_out(name: str) -> bool:
    """Which side of the split a module is on; a function of its name alone."""
    return stable_hash(f"split:{name}") % 100 < HELD_OUT_PERCENT


def split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents, each in hash order so that any prefix is a fair sample of its side."""
    ordered = sorted(documents, key=lambda document: stable_hash(f"order:{document.name}"))
    train = [document for document in ordered if not is_held_out(document.name)]
    held_out = [document for document in ordered if is_held_out(document.name)]
    if not train or not held_out:
        raise ValueError(f"{len(documents)} documents leave one side of the split empty: give more text")
    return train, held_out


def excerpt(documents: Sequence[Document], limit: int) -> str:
    """The documents' texts in order, cut at a paragraph end to at most ``limit`` UTF-8 bytes."""
    data = DOCUMENT_GAP.join(document.text for document in documents).encode()
    if len(data) > limit:
        data = data[: data.rfind(b"\n\n", 0, limit)]
    return data.decode().strip() + "\n"
