"""Settings for all tests."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch


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
