"""benchmarks/gpu.py, dry: interpreted kernels, tiny layers. Stages end at the deadline and go on; tables follow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def call(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
    environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_stages_go_on_where_they_stopped(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    out = tmp_path / "results"
    ended = call("gpu.py", "--stage", "check", "--out", str(out), "--deadline", "-1")
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "goes on there" in ended.stdout
    lines = out / "check.jsonl"
    assert lines.read_text() == ""
    cut_off, failed = '{"task": "tiny, bits', {"task": "another", "device": "CPU", "exception": "X"}
    lines.write_text(json.dumps(failed) + "\n" + cut_off)
    ran = call("gpu.py", "--stage", "check", "--out", str(out))
    assert ran.returncode == 0, ran.stdout + ran.stderr[-2000:]
    found = [json.loads(line) for line in lines.read_text().splitlines() if line.endswith("}")]
    assert [line.get("passed") for line in found] == [None, True, True]
    assert all(0 < line["error"] <= line["bound"] for line in found[1:])
    size = lines.stat().st_size
    assert call("gpu.py", "--stage", "check", "--out", str(out)).returncode == 0
    assert lines.stat().st_size == size, "nothing is run twice"
    assert call("gpu.py", "--stage", "decode", "--shape", "tiny", "--repeats", "1", "--out", str(out)).returncode == 0
    report = call("gpu_report.py", str(out))
    assert "2 of 3 checks passed on CPU; failed: another" in report.stdout
    assert "| tiny | 1 |" in report.stdout
