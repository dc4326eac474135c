"""What the tests of the comparison share."""

from pathlib import Path

import pytest

from tiny_text import save_tiny, write_text


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model``, ``calibration.txt`` and ``held_out.txt``."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder / "model")
    write_text(folder / "calibration.txt", 3000, seed=0)
    write_text(folder / "held_out.txt", 1000, seed=1)
    return folder
