"""These tests run in Triton's interpreter, in a process of its own: ../test_interpreter.py starts it."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True, scope="session")
def _small_grids():
    """Interpreted programs run one after another: the splits that fill a GPU only cost time here (splits have own
    tests)."""
    from bitsmoe_kernels import launch

    launch.PROGRAMS_WANTED = 8


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fill what torch.empty returns with NaN, so that an element no program wrote is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
