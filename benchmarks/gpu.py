"""A GPU's first minutes: `python benchmarks/gpu.py --stage all --deadline 500 --out results`, or some of the stages.

Every result is one flushed line of JSON in OUT/STAGE.jsonl. A call that was cut off goes on where it stopped; none
begins a task after DEADLINE seconds, and none of the tests runs on beyond them. A stage has half of the time that is
left, so that those after it have their turn; then the stages that are not done go on with what is left. On a GPU all
kernels of a stage are compiled first, by as many processes as there are cores. Stages, in the order in which to run
them:

    check    the compiled kernels against the fp32 layer, on poisoned memory: error, equal bits when repeated, and a
             CUDA graph's replay equal to the eager result
    decode   microseconds per layer and step by the committed rules, and then the same layer in other forms (decode.py)
    prefill  milliseconds per layer at many tokens (prefill.py)
    quant    the rounding kernels against PyTorch; a layer against GPTQ where llm-compressor is installed
    profile  the time of every kernel of a step
    tests    the kernels' own tests, compiled
    tune     gate_up and down with all sizes that they may be launched with, and OUT/tuned.json, the table of those
             that are faster than the rules': name it in BITSMOE_TUNED

On a CPU the stages run in Triton's interpreter (TRITON_INTERPRET=1) on tiny layers, as a test of their own code.
`gpu_report.py` turns the lines into tables. It needs torch, triton and this repository on the path, not llm-compressor.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton
from gpu_stages import Task, finish, tasks
from layers import SHAPES

STAGES = ("check", "decode", "prefill", "quant", "profile", "tests", "tune")
#: Stages that begin when those before them are done.
LONG = ("tests", "tune")
#: Stages whose kernels are compiled before: the others have few of their own.
COMPILED = ("check", "decode", "prefill", "tune")


def compile_share(
    stage: str, shapes: list[str], device: str, done: set[str], rank: int, count: int, until: float
) -> int:
    """Run every ``count``-th task of a stage that is not done once, for what is compiled by it; how many ran.

    Results are discarded, and so are failures (memory is short while all processes run): the stage itself meets them.
    ``until``: of `time.time`.
    """
    ran = 0
    with torch.inference_mode():
        left = [task for name, task in tasks(stage, shapes, torch.device(device), 1, until) if name not in done]
        for task in left[rank::count]:
            if time.time() > until:
                break
            try:
                task()
                ran += 1
            except Exception:  # noqa: BLE001
                continue
            finally:
                if device.startswith("cuda"):
                    torch.cuda.empty_cache()
    return ran


def compiled_mark(stage: str) -> Path:
    """The file that says in Triton's cache that it was filled for a stage: a later call may come to a fresh machine."""
    return Path(triton.knobs.cache.dir) / f"bitsmoe-{stage}-compiled"


def precompile(
    stage: str, shapes: list[str], device: torch.device, done: set[str], processes: int, deadline: float
) -> Task:
    """The task that fills Triton's cache."""

    def run() -> dict[str, object]:
        # a kernel that is left over compiles in its task, in a second or two
        begin, until = time.monotonic(), time.time() + deadline / 4
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            shares = [
                pool.submit(compile_share, stage, shapes, str(device), done, rank, processes, until)
                for rank in range(processes)
            ]
            ran = sum(share.result() for share in shares)
        compiled_mark(stage).parent.mkdir(parents=True, exist_ok=True)
        compiled_mark(stage).touch()
        return {"processes": processes, "tasks": ran, "seconds_in_all": time.monotonic() - begin}

    return "compile", run


def lines_of(path: Path) -> list[dict[str, object]]:
    """The whole lines of a file; none where there is no file."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def run(
    stage: str, shapes: list[str], device: torch.device, repeats: int, deadline: float, out: Path, processes: int
) -> tuple[int, bool]:
    """Run what is left of a stage: the number of tasks that failed, of all that ran so far; whether none is left."""
    out.mkdir(parents=True, exist_ok=True)
    path, begin = out / f"{stage}.jsonl", time.monotonic()
    lines = lines_of(path)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    done = {str(line["task"]) for line in lines if line["device"] == where and "exception" not in line} - {"compile"}
    failed = sum(not line.get("passed", True) for line in lines if line["task"] in done and line["device"] == where)
    cut_off = bool(lines or path.exists()) and not path.read_text().endswith("\n") and path.stat().st_size > 0
    todo = [task for task in tasks(stage, shapes, device, repeats, time.time() + deadline) if task[0] not in done]
    if processes and todo and stage in COMPILED and not compiled_mark(stage).exists():
        todo.insert(0, precompile(stage, shapes, device, done, processes, deadline))
    whole = True
    with path.open("a") as file:
        if cut_off:
            file.write("\n")
        for name, task in todo:
            if time.monotonic() - begin > deadline:
                print(f"{stage}: its time ended before {name!r}; the same command goes on there")
                whole = False
                break
            try:
                result = task()
            except Exception as error:  # noqa: BLE001 - one task that fails must not end the others
                result = {"passed": False, "exception": f"{type(error).__name__}: {error}"[:2000]}
            failed += not result.get("passed", True)
            line = {"task": name, "device": where, "torch": torch.__version__, **result}
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
            print(json.dumps(line), flush=True)
    finish(stage, out, lines_of(path))
    return failed, whole


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, run, and return 1 where a task failed."""
    parser = argparse.ArgumentParser(description="Check and time the kernels on a GPU, in pieces that may be cut off.")
    parser.add_argument("--stage", choices=(*STAGES, "all"), nargs="+", required=True, help="one after another")
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=["qwen3-30b-a3b", "qwen3-30b-a3b-default"])
    parser.add_argument("--deadline", type=float, default=500, help="seconds after which no task begins")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON lines")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, help="that compile first; as many as cores on a GPU, 0: none")
    options = parser.parse_args(argv)
    device, processes = torch.device(options.device), options.processes
    if processes is None:
        processes = (os.cpu_count() or 1) if device.type == "cuda" else 0
    stages = list(STAGES) if "all" in options.stage else options.stage
    # a stage that takes long must not leave nothing for those after it
    turns = [(stage, 0.5) for stage in stages if stage not in LONG] + [(stage, 1.0) for stage in stages]
    end, failed, whole = time.monotonic() + options.deadline, dict.fromkeys(stages, 0), dict.fromkeys(stages, False)
    with torch.inference_mode():
        for stage, share in turns:
            if not whole[stage]:
                left = share * (end - time.monotonic())
                arguments = stage, options.shape, device, options.repeats, left, options.out, processes
                failed[stage], whole[stage] = run(*arguments)
    return 1 if any(failed.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
