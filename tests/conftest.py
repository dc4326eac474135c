"""Settings for all tests."""

import os

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _small_machine() -> None:
    """Tiny tensors: threads only cost time."""
    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
