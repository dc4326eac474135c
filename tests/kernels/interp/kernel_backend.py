"""Where the tests of this folder run: interpreted on the CPU, or compiled on a GPU (../test_interpreter.py)."""

import os

import torch

#: The process was started to run compiled kernels.
COMPILED = os.environ.get("BITSMOE_TEST_KERNELS") == "compiled"
DEVICE = torch.device("cuda" if COMPILED else "cpu")


def seeded(seed: int) -> torch.Generator:
    """A generator on the device of the tests."""
    return torch.Generator(device=DEVICE).manual_seed(seed)
