"""What the tests of the comparison share."""

import json
import random
from pathlib import Path

import pytest

from tiny_text import LETTERS, save_tiny, write_text


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model``, ``calibration.txt`` and ``held_out.txt``."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder / "model")
    write_text(folder / "calibration.txt", 3000, seed=0)
    write_text(folder / "held_out.txt", 1000, seed=1)
    return folder


@pytest.fixture(scope="session")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 multiple-choice items for the tokenizer of single characters."""
    draw = random.Random(0)

    def text(n: int) -> str:
        return "".join(draw.choices(LETTERS[:26], k=n))

    rows = [{"context": text(20), "endings": [text(3 + 2 * i) for i in range(3)], "label": i % 3} for i in range(24)]
    path = tmp_path_factory.mktemp("items") / "letters.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path
