"""Settings for the tests against a real vLLM on CPU, which run in an environment of their own (`make test-vllm`)."""

import os
import runpy
import sys
from pathlib import Path

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
