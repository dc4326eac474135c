"""Settings for all tests."""

import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tiny_text import LETTERS, save_tiny, write_text


@pytest.fixture(autouse=True, scope="session")
def _small_machine() -> None:
    """Tiny tensors: threads only cost time."""
    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def dense_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folder of a tiny random model: ``dense_checkpoint(architecture, dtype, **config)``; not to be changed.

    `oneshot` wants a model that was loaded from somewhere, and a tokenizer beside it even for data that needs none.
    """
    from helpers import save_tokenizer, tiny_model

    folders: dict[object, Path] = {}

    def folder(architecture: str, dtype: torch.dtype = torch.float32, **overrides: object) -> Path:
        key = (architecture, dtype, *sorted(overrides.items()))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(architecture)
            tiny_model(architecture, dtype, **overrides).save_pretrained(folders[key])
            save_tokenizer(folders[key])
        return folders[key]

    return folder


@pytest.fixture(autouse=True)
def _no_recipe_left_behind() -> Iterator[None]:
    """llm-compressor's session is global: what one test ran would be saved as part of the next one's recipe."""
    yield
    if "llmcompressor.core" in sys.modules:
        sys.modules["llmcompressor.core"].reset_session()


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
