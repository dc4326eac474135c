"""The speed benchmarks run on a CPU at a small shape: their code is tested, their times mean nothing there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DEMO = Path(__file__).parents[2] / "src/bitsmoe_modifier/assets/docmoe"


@pytest.mark.parametrize(
    ("script", "arguments", "columns"),
    [
        ("decode.py", "--shape tiny --batch 1,3 --repeats 1 --device cpu", 12),
        ("decode.py", "--shape qwen3-30b-a3b --bytes", 9),
        ("prefill.py", "--shape tiny --tokens 8 --repeats 1 --device cpu", 7),
        # compiles kernels
        pytest.param("roofline.py", "--shape qwen3-30b-a3b --batch 1,8", 12, marks=pytest.mark.slow),
        ("basis_cost.py", "", 8),
        ("cpu_decode.py", "--shape tiny --batch 1,20 --repeats 1", 5),
        ("generate.py", f"{DEMO} {DEMO} --new-tokens 3 --prompt-tokens 4 --repeats 1 --device cpu", 7),
    ],
    ids=["decode", "decode-bytes", "prefill", "roofline", "basis-cost", "cpu-decode", "generate"],
)
def test_benchmark_prints_its_table(script, arguments, columns):
    compiled = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment = {**compiled, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(BENCHMARKS / script), *arguments.split()]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    table = [line for line in ran.stdout.splitlines() if line.startswith("|")]
    assert len(table) >= 3
    assert all(line.count("|") == columns + 1 for line in table)
