"""What users run on a GPU, run on an emulated one (`emulated`), in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_everything_runs_on_an_emulated_gpu() -> None:
    checks = sorted(map(str, HERE.glob("checks_*.py")))
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *checks]
    environment = os.environ | {"BITSMOE_FORCE_PLAIN": "1"}
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
