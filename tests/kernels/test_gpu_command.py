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
    out.mkdir()
    lines = out / "check.jsonl"
    cut_off, failed = '{"task": "tiny, bits', {"task": "another", "device": "CPU", "exception": "X"}
    lines.write_text(json.dumps(failed) + "\n" + cut_off)
    ended = call("gpu.py", "--stage", "check", "--out", str(out), "--deadline", "-1")
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "goes on there" in ended.stdout
    every = ["check", "decode", "prefill", "quant", "profile", "tests", "tune"]
    arguments = ("--shape", "tiny", "--repeats", "1", "--processes", "0", "--out", str(out))
    ran = call("gpu.py", "--stage", "all", *arguments)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-2000:]
    found = [json.loads(line) for line in lines.read_text().splitlines() if line.endswith("}")]
    assert [line.get("passed") for line in found] == [None, True, True, True, True]
    assert all(0 < line["error"] <= line["bound"] for line in found[1:])
    sizes = {stage: (out / f"{stage}.jsonl").stat().st_size for stage in every}
    again = call("gpu.py", "--stage", "all", *arguments)
    assert again.returncode == 0, again.stderr[-2000:]
    assert sizes == {stage: (out / f"{stage}.jsonl").stat().st_size for stage in every}, "nothing is run twice"
    report = call("gpu_report.py", str(out)).stdout
    assert "4 of 5 checks passed on CPU; failed: another" in report
    for row in (
        "| tiny | 1 |",
        "| tiny | trellis | 1 |",
        "| tiny | scalar | 1 |",
        "Launch sizes",
        "`bitsmoe::gate_up`",
        "| block of columns |",
        "| 8 |",
    ):
        assert row in report, report


def test_test_files_are_run_at_once_and_each_one_answers(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    folder = tmp_path / "tests" / "kernels" / "interp"
    folder.mkdir(parents=True)
    (folder / "test_right.py").write_text("def test_right(): pass\n")
    (folder / "test_wrong.py").write_text("def test_wrong(): assert not 'reached'\n")
    program = f"""
import json, sys
sys.path.insert(0, {str(BENCHMARKS)!r})
from pathlib import Path
from gpu_stages import run_tests
print(json.dumps(run_tests(sorted(Path({str(folder)!r}).glob("*.py")))))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    line = json.loads(ran.stdout.splitlines()[-1])
    assert not line["passed"]
    assert "1 passed" in line["results"]["test_right.py"]
    assert list(line["output"]) == ["test_wrong.py"]
    assert "not 'reached'" in line["output"]["test_wrong.py"]


def test_a_stage_leaves_time_for_those_after_it_and_a_fresh_machine_compiles_again(tmp_path: Path) -> None:
    """Tests end in time too, ours are timed before other forms, and what was compiled counts where it lies."""
    pytest.importorskip("triton")
    folder = tmp_path / "tests" / "kernels" / "interp"
    folder.mkdir(parents=True)
    (folder / "test_slow.py").write_text("import time; time.sleep(60)\n")
    program = f"""
import json, sys, time, torch, triton
sys.path.insert(0, {str(BENCHMARKS)!r})
from pathlib import Path
import gpu, gpu_stages
line = gpu_stages.run_tests([Path({str(folder / "test_slow.py")!r})], time.time() + 0.1)
shapes = ["qwen3-30b-a3b", "qwen3-30b-a3b-default", "tiny"]
kinds = [name.split(", ") for name, _ in list(gpu_stages.decodes(shapes, torch.device("cuda"), 1))[1:]]
now, log = [0.0], []
gpu.time.monotonic = lambda: now[0]

def spend():
    now[0] += 30
    return {{"passed": True}}

gpu.tasks = lambda stage, *_: [(f"{{stage}} {{i}}", spend) for i in range(9)]
gpu.precompile = lambda stage, *_: ("compile", lambda: log.append(stage) or {{}})
gpu.finish = lambda *_: None
triton.knobs.cache.dir = {str(tmp_path / "cache")!r}
out, arguments = Path({str(tmp_path / "out")!r}), ["--processes", "1", "--device", "cpu"]
gpu.main(["--stage", "all", *arguments, "--deadline", "500", "--out", str(out)])
lines = {{stage: len(gpu.lines_of(out / f"{{stage}}.jsonl")) for stage in gpu.STAGES}}
first, log[:] = list(log), []
gpu.compiled_mark("decode").parent.mkdir()
gpu.compiled_mark("decode").touch()
gpu.main(["--stage", "decode", "prefill", *arguments, "--deadline", "1000", "--out", str(out)])
print(json.dumps([line, kinds, lines, first, log]))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    line, kinds, lines, first, log = json.loads(ran.stdout.splitlines()[-1])
    assert not line["passed"]
    assert line["exception"] == "no time was left for test_slow.py"
    ours, others = kinds[: 3 * 14], kinds[3 * 14 :]
    assert {kind for _, _, kind in ours} == {"trellis", "scalar"}
    assert not {"trellis", "scalar"} & {kind for _, _, kind in others}
    assert {name for name, _, _ in others} == {"qwen3-30b-a3b", "tiny"}, "they know nothing of our bit-widths"
    assert lines["check"] >= 9
    assert min(lines[stage] for stage in ("decode", "prefill", "quant", "profile")) >= 1
    assert lines["tune"] == 0
    assert first[:3] == ["check", "decode", "prefill"]
    assert set(log) == {"prefill"}


@pytest.mark.parametrize("codes", ["scalar", "trellis"])
def test_a_table_of_launch_sizes_changes_the_launch_and_nothing_else(tmp_path: Path, codes: str) -> None:
    pytest.importorskip("triton")
    program = f"""
import json, sys, torch
sys.path.insert(0, {str(BENCHMARKS)!r})
from bitsmoe_kernels import moe_forward, prepare, tuned
from bitsmoe_kernels.forward import plan
from gpu_stages import best_sizes
from layers import GATING, SHAPES, routing, stored_layer

shape, cpu, kind = SHAPES["tiny"], torch.device("cpu"), {codes!r}
experts = prepare(stored_layer(shape, kind, cpu, 0))
layer, none = tuned.layer_key(experts.layout), dict.fromkeys(("parts", "splits", "stages_in", "stages_out"))
lines = [
    {{"device": "", "layer": layer, "pairs": 4, "sizes": none, "gate_up": 10.0, "down": 5.0}},
    {{"device": "", "layer": layer, "pairs": 4, "sizes": {{**none, "parts": 2}}, "gate_up": 9.0}},
    {{"device": "", "layer": layer, "pairs": 4, "sizes": {{**none, "parts": 1}}, "gate_up": 8.0}},
    {{"device": "", "layer": layer, "pairs": 4, "sizes": {{**none, "splits": 2}}, "down": 4.95}},
]
x, (ids, p) = torch.randn(2, 64), routing(shape, 2, cpu, 0)
before, sizes = moe_forward(x, ids, p, experts, GATING), plan(2, 2, experts)
with open({str(tmp_path / "tuned.json")!r}, "w") as file:
    json.dump(best_sizes(lines), file)
tuned.table.cache_clear()
experts = prepare(stored_layer(shape, kind, cpu, 0))
after = plan(2, 2, experts)
print(sizes.parts, sizes.splits, after.parts, after.splits)
print(float((moe_forward(x, ids, p, experts, GATING) - before).norm() / before.norm()) < 1e-5)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TRITON_INTERPRET": "1"}
    environment["BITSMOE_TUNED"] = str(tmp_path / "tuned.json")
    (tmp_path / "tuned.json").write_text("{}")
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    first, second = ran.stdout.splitlines()
    parts, splits, tuned_parts, tuned_splits = map(int, first.split())
    assert parts != tuned_parts == 1
    assert splits == tuned_splits, "1 % is no gain"
    assert second == "True"


@pytest.mark.parametrize(
    "content", ["[]", '{"GPU": {"layer": {"8": {"parts": 3}}}}', '{"GPU": {"layer": {"8": {"speed": 1}}}}', "{"]
)
def test_a_file_that_is_no_table_is_named(tmp_path: Path, content: str) -> None:
    pytest.importorskip("triton")
    from bitsmoe_kernels import tuned

    path = tmp_path / "tuned.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"tuned\.json is no table of launch sizes .*; write it by benchmarks/gpu"):
        tuned.read(path)
