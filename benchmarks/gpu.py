"""A GPU's first minutes: `python benchmarks/gpu.py --stage check --deadline 500 --out results`, and other stages.

Every result is one flushed line of JSON in OUT/STAGE.jsonl. A call that was cut off goes on where it stopped; none
begins a task after DEADLINE seconds. Stages:

    check    the compiled kernels against the fp32 layer, on poisoned memory: error, equal bits when repeated, and a
             CUDA graph's replay equal to the eager result
    decode   microseconds per layer and step, and the same layer in other forms (decode.py)
    prefill  milliseconds per layer at many tokens (prefill.py)

On a CPU `check` runs in Triton's interpreter (TRITON_INTERPRET=1) on tiny layers, as a test of its own code.
`gpu_report.py` turns the lines into tables. It needs torch, triton and this repository on the path, not llm-compressor.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from bitsmoe_kernels import moe_forward, prepare
from bitsmoe_kernels.reference import moe_reference
from layers import GATING, SHAPES, Shape, copy_bandwidth, routing, stored_layer

Task = tuple[str, Callable[[], dict[str, object]]]

#: Layers whose kernels are checked: the recipe's blocks, those of gpt-oss, and small ones.
CHECKED = {
    "recipe": Shape(16, 4, 512, 256),
    "blocks of 64": Shape(8, 2, 256, 128, block=64, group=64),
    "tiny": SHAPES["tiny"],
}


def check(shape: Shape, kind: str, tokens: int, dtype: torch.dtype, device: torch.device) -> dict[str, object]:
    """One layer, one batch."""
    packed = stored_layer(shape, kind, device, tokens)
    x = torch.randn(tokens, shape.hidden, generator=torch.Generator().manual_seed(tokens)).to(device, dtype)
    ids, p = routing(shape, tokens, device, tokens)
    ids[0, 0] = -1  # an expert of another rank
    experts = prepare(packed)
    want = moe_reference(x, ids, p, packed, GATING)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new tensors with NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        runs = [moe_forward(x, ids, p, experts, GATING) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    error = float((runs[0].float() - want).norm() / want.norm().clamp_min(1e-30))
    result: dict[str, object] = {"error": error, "bound": 10 * torch.finfo(dtype).eps}
    result["repeats_equal"] = all(torch.equal(runs[0], other) for other in runs[1:])
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = moe_forward(x, ids, p, experts, GATING)
        graph.replay()
        torch.cuda.synchronize()
        result["graph_equal"] = torch.equal(y, runs[0])
    equal = all(value for name, value in result.items() if name.endswith("_equal"))
    return {**result, "passed": error <= 10 * torch.finfo(dtype).eps and equal}


def tasks(stage: str, shapes: list[str], device: torch.device, repeats: int) -> Iterator[Task]:
    """The stage's tasks, cheapest first."""
    if stage == "check":
        dtypes = [torch.bfloat16, torch.float16]
        on_gpu = device.type == "cuda"
        for name, shape in CHECKED.items() if on_gpu else [("tiny", SHAPES["tiny"])]:
            for kind in ("bitsmoe", "plain-2", "plain-4") if on_gpu else ("bitsmoe",):
                for tokens in (1, 3, 20, 64, 200) if on_gpu else (1, 3):
                    for dtype in dtypes if on_gpu else dtypes[:1]:
                        arguments = shape, kind, tokens, dtype, device
                        title = f"{name}, {kind}, {tokens} tokens, {str(dtype).removeprefix('torch.')}"
                        yield title, lambda arguments=arguments: check(*arguments)
        return
    import decode
    import prefill

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    yield "copy", lambda: {"bytes_per_second": copy_bandwidth(device)}
    for shape_name in shapes:
        shape = SHAPES[shape_name]
        if stage == "prefill":
            for tokens in (512, 2048, 8192) if device.type == "cuda" else (8,):
                yield (
                    f"{shape_name}, {tokens} tokens",
                    lambda shape=shape, tokens=tokens: {"table": prefill.run(shape, [tokens], device, repeats)},
                )
            continue
        for batch in (1, 2, 4, 8, 16, 32, 64) if device.type == "cuda" else (1,):
            for kind in ("bitsmoe", *decode.OTHERS):

                def timed(
                    name: str = shape_name, shape: Shape = shape, batch: int = batch, kind: str = kind
                ) -> dict[str, object]:
                    seconds, nbytes = decode.time_of(kind, shape, batch, device, dtype, repeats)
                    return {"shape": name, "batch": batch, "kind": kind, "seconds": seconds, "bytes": nbytes}

                yield f"{shape_name}, batch {batch}, {kind}", timed


def run(stage: str, shapes: list[str], device: torch.device, repeats: int, deadline: float, out: Path) -> int:
    """Run what is left of a stage; the number of tasks that failed, of all that ran so far."""
    out.mkdir(parents=True, exist_ok=True)
    path, begin = out / f"{stage}.jsonl", time.monotonic()
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    done = {line["task"] for line in lines if line["device"] == where and "exception" not in line}
    failed = sum(not line.get("passed", True) for line in lines if line["task"] in done and line["device"] == where)
    with path.open("a") as file:
        if text and not text.endswith("\n"):
            file.write("\n")  # a line that was cut off
        for name, task in tasks(stage, shapes, device, repeats):
            if name in done:
                continue
            if time.monotonic() - begin > deadline:
                print(f"{stage}: the deadline ended it before {name!r}; the same command goes on there")
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
    return failed


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, run, and return 1 where a task failed."""
    parser = argparse.ArgumentParser(description="Check and time the kernels on a GPU, in pieces that may be cut off.")
    parser.add_argument("--stage", choices=("check", "decode", "prefill"), required=True)
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=["qwen3-30b-a3b"])
    parser.add_argument("--deadline", type=float, default=500, help="seconds after which no task begins")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON lines")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    with torch.inference_mode():
        device = torch.device(options.device)
        failed = run(options.stage, options.shape, device, options.repeats, options.deadline, options.out)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
