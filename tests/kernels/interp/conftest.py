"""These tests run in processes of their own, interpreted or compiled: ../test_interpreter.py starts them."""

import os

import pytest
import torch
from kernel_backend import COMPILED, DEVICE

if not COMPILED and os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True, scope="session")
def _device():
    """New tensors lie where the kernels run."""
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device("cpu")


@pytest.fixture(autouse=True, scope="session")
def _small_grids():
    """Interpreted programs run one after another: the splits that fill a GPU only cost time here (splits have own
    tests)."""
    from bitsmoe_kernels import launch

    if not COMPILED:
        launch.PROGRAMS_WANTED, launch.SCALAR_PROGRAMS = 8, 0


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fill what torch.empty returns with NaN, so that an element no program wrote is seen."""
    torch.use_deterministic_algorithms(
        True, warn_only=COMPILED
    )  # PyTorch's own sums of integers on a GPU have no other
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
