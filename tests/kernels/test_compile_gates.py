"""The compiled kernels keep their promises on five kinds of GPUs, checked without one (see the module's
docstring).

`python -m bitsmoe_kernels.compile_gates` checks every width, dtype and tile and prints the table of docs/kernels.md;
the test takes the decoding step of widths 6, 4 and 2, in a process without TRITON_INTERPRET.
"""

import os
import subprocess
import sys
import time

import pytest


@pytest.mark.parametrize("target", ["80", "89", "90", "100", "120"], ids=lambda cc: f"sm_{cc}")
def test_compile_gates(target):
    pytest.importorskip("triton.backends.nvidia")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-m", "bitsmoe_kernels.compile_gates", "--quick", "--cc", target]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(ran.stdout)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-2000:]


def test_processes_share_the_cases_and_keep_their_order(monkeypatch):
    pytest.importorskip("triton.backends.nvidia")
    from bitsmoe_kernels import compile_gates

    def compiled(cc, case):
        time.sleep(0.05 * (3 - case))  # the first ones take longest
        return f"sm_{cc} {case} by {os.getpid()}", [f"{cc} {case}"]

    monkeypatch.setattr(compile_gates, "cases", lambda cc, every: iter(range(4)))
    monkeypatch.setattr(compile_gates, "row", compiled)
    texts, missed = zip(*compile_gates.rows((80, 90), processes=2), strict=True)
    assert [one for each in missed for one in each] == [f"{cc} {case}" for cc in (80, 90) for case in range(4)]
    assert len({text.split()[-1] for text in texts} - {str(os.getpid())}) == 2
    assert [each for _, each in compile_gates.rows((80, 90))] == list(missed)


def test_the_package_imports_without_triton(tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('absent')")
    program = "import bitsmoe_kernels as k; k.prepare, k.unsupported"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
