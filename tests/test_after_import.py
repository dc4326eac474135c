"""Callbacks after another package's import."""

import importlib
import sys
from pathlib import Path

import pytest

from bitsmoe_modifier._after_import import after_import


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package that is not imported yet."""
    (tmp_path / "slow_library").mkdir()
    (tmp_path / "slow_library" / "__init__.py").write_text("from . import part\nfinished = True\n")
    (tmp_path / "slow_library" / "part.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "modules", sys.modules.copy())
    return "slow_library"


def test_calls_back_when_the_package_is_complete(package: str) -> None:
    seen: list[bool] = []
    after_import(package, lambda: seen.append(sys.modules[package].finished))
    assert importlib.util.find_spec(package) is not None, "looking for the package is not importing it"
    assert seen == []
    importlib.import_module(f"{package}.part")
    assert seen == [True]
    importlib.import_module(package)
    assert seen == [True]


def test_calls_back_at_once_when_already_imported(package: str) -> None:
    importlib.import_module(package)
    seen: list[int] = []
    after_import(package, lambda: seen.append(1))
    assert seen == [1]


def test_several_callbacks(package: str) -> None:
    seen: list[int] = []
    after_import(package, lambda: seen.append(1))
    after_import(package, lambda: seen.append(2))
    importlib.import_module(package)
    assert sorted(seen) == [1, 2]


def test_a_failed_import_can_be_repeated(package: str, tmp_path: Path) -> None:
    part = tmp_path / package / "part.py"
    part.write_text("raise ImportError('not today')")
    seen: list[int] = []
    after_import(package, lambda: seen.append(1))
    with pytest.raises(ImportError, match="not today"):
        importlib.import_module(package)
    assert seen == []
    part.write_text("#fixed, and of another length")
    importlib.invalidate_caches()
    importlib.import_module(package)
    assert seen == [1]


def test_waits_for_an_import_that_has_begun(package: str, tmp_path: Path) -> None:
    """A package may import this one, or something that does, in the middle of its own import."""
    seen: list[bool] = []
    register = lambda: after_import(package, lambda: seen.append(sys.modules[package].finished))  # noqa: E731
    (tmp_path / package / "part.py").write_text("import sys\nsys.register()\nimport colorsys\n")
    sys.modules.pop("colorsys", None)
    sys.register = register  # type: ignore[attr-defined]
    try:
        importlib.import_module(package)
    finally:
        del sys.register  # type: ignore[attr-defined]
    assert seen == []
    sys.modules.pop("colorsys", None)
    importlib.import_module("colorsys")
    assert seen == [True]


def test_a_module_inside_a_package(package: str) -> None:
    seen: list[str] = []
    after_import(f"{package}.part", lambda: seen.append("part"))
    after_import(package, lambda: seen.append("package"))
    importlib.import_module(package)
    assert seen == ["part", "package"]


def test_missing_package_stays_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    after_import("no_such_library", lambda: pytest.fail("called"))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_library")
