"""Starts the kernels' tests in processes of their own: in Triton's interpreter, for which TRITON_INTERPRET must be set
before triton is imported, and compiled wherever a GPU is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "interp"


@pytest.mark.parametrize("part", sorted(path.name for path in FOLDER.glob("test_*.py")))
@pytest.mark.parametrize("backend", ["interpreted", "compiled"])
def test_kernels(backend: str, part: str) -> None:
    pytest.importorskip("triton")
    if backend == "compiled" and not torch.cuda.is_available():
        pytest.skip("compiled kernels run on a GPU only, and none is here")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"BITSMOE_TEST_KERNELS": backend, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if backend == "interpreted":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / part)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
