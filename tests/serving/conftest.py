"""Settings for the tests against a real vLLM on CPU, which run in an environment of their own (`make test-vllm`)."""

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

# read when vLLM is imported, here and in the processes that tests start
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
# one thread and no binding: models this small only wait for each other's threads
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

sys.path.insert(0, str(Path(__file__).parents[1] / "families"))

_OPERATORS = Path(__file__).parent / "torchvision_ops"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_OPERATORS), os.environ.get("PYTHONPATH"))))
runpy.run_path(str(_OPERATORS / "sitecustomize.py"))

#: of the environment that quantizes
_PYTHON = Path(os.environ.get("BITSMOE_PYTHON", Path(__file__).parents[2] / ".venv" / "bin" / "python"))


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Path of a family's quantized folder, ``packed``, beside the published one, ``dense`` (`published_folders`)."""
    if not _PYTHON.exists():
        pytest.fail(f"{_PYTHON} is not there: `make test-vllm` builds it, or set BITSMOE_PYTHON")
    out = tmp_path_factory.mktemp("published")
    script = Path(__file__).with_name("published_folders.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    @cache
    def quantize(published_type: str) -> Path:
        command = [_PYTHON, script, out, published_type]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return out / published_type / "packed"

    return quantize
