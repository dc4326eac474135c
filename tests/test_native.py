"""C++ files are compiled once, again when they change, and not at all where that is impossible or not wanted."""

import ctypes
from pathlib import Path

import pytest

from bitsmoe_modifier import native


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITSMOE_NATIVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BITSMOE_NATIVE", raising=False)


def source(folder: Path, factor: int) -> Path:
    path = folder / f"times{factor}" / "times.cpp"
    path.parent.mkdir()
    path.write_text(f'extern "C" int times(int x) {{ return {factor} * x; }}')
    return path


def test_compiles_once_for_each_text(tmp_path: Path) -> None:
    for factor in (2, 3):
        library = native.native_library(source(tmp_path, factor))
        if library is None:
            pytest.skip("no C++ compiler")
        assert library.times(ctypes.c_int(7)) == 7 * factor
    files = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()}
    assert len(files) == 2
    native.native_library.cache_clear()  # as another process would find it
    assert native.native_library(tmp_path / "times2" / "times.cpp") is not None
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()} == files


@pytest.mark.parametrize("problem", ["file", "home"])
def test_a_cache_that_cannot_be_written(
    problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a container that runs as any user: with scalar codes in the place of trellis codes a run would lose half as
    much again, although there is a compiler."""
    if native.native_library(source(tmp_path, 2)) is None:
        pytest.skip("no C++ compiler")
    if problem == "file":
        (tmp_path / "file").touch()
        monkeypatch.setenv("BITSMOE_NATIVE_CACHE", str(tmp_path / "file" / "cache"))
    else:

        def home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("BITSMOE_NATIVE_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", home)
    library = native.native_library(source(tmp_path, 3))
    assert library is not None, caplog.text
    assert library.times(ctypes.c_int(7)) == 21
    assert "not compiled" not in caplog.text


@pytest.mark.parametrize("problem", ["text", "compiler", "off"])
def test_none_where_it_cannot_be(problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    path = source(tmp_path, 5)
    if problem == "text":
        path.write_text("no C++ at all")
    elif problem == "compiler":
        monkeypatch.setenv("CXX", str(tmp_path / "absent"))
    else:
        monkeypatch.setenv("BITSMOE_NATIVE", "0")
    assert native.native_library(path) is None
    assert ("not compiled" in caplog.text) == (problem != "off")
