"""What the source distribution and the wheel hold and say."""

import os
import shutil
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every file of the source distribution by its path, with the text of PKG-INFO."""
    if find_spec("setuptools") is None or int(__import__("setuptools").__version__.split(".")[0]) < 77:
        pytest.skip("the build backend, setuptools 77 or later, is not installed")
    folder = tmp_path_factory.mktemp("sdist")
    # a copy, because the backend writes beside its sources
    left_out = shutil.ignore_patterns(
        ".*venv*", ".git", "*.egg-info", "__pycache__", "site", "build", "dist", ".*_cache"
    )
    shutil.copytree(ROOT, folder / "tree", ignore=left_out)
    build = "import setuptools.build_meta as backend, sys; backend.build_sdist(sys.argv[1])"
    command = [sys.executable, "-c", build, str(folder)]
    done = subprocess.run(command, cwd=folder / "tree", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2]: "" for name in archive.getnames()}
        top = next(name for name in archive.getnames() if name.endswith("/PKG-INFO") and name.count("/") == 1)
        names["PKG-INFO"] = archive.extractfile(top).read().decode()
    return names


def test_the_tests_of_a_source_distribution_can_run(sdist: dict[str, str]) -> None:
    """Every file under tests/ is in it, and what `make test` reads beside them."""
    tests = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*") if path.is_file()}
    tests = {name for name in tests if "__pycache__" not in name and not os.path.basename(name).startswith(".")}
    assert {"tests/conftest.py", "tests/helpers.py", "tests/newest/stored/packed/model.safetensors"} <= tests
    assert tests <= sdist.keys()
    assert {
        "Makefile",
        "constraints.txt",
        "constraints-newest.txt",
        "recipes/w2.yaml",
        "docs/format.md",
    } <= sdist.keys()


def test_the_licence_covers_the_demo(sdist: dict[str, str]) -> None:
    assert "License-Expression: Apache-2.0 AND PSF-2.0\n" in sdist["PKG-INFO"]
    assert "License-File: src/bitsmoe_modifier/assets/NOTICE\n" in sdist["PKG-INFO"]
