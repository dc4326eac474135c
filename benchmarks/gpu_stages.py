"""The stages of gpu.py: what each measures, as tasks by name. A task returns the fields of its line."""

import functools
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import decode
import prefill
import torch
from bitsmoe_kernels import PreparedExperts, moe_forward, prepare, tuned
from bitsmoe_kernels.reference import moe_reference
from layers import GATING, SHAPES, Shape, copies_beyond_cache, copy_bandwidth, routing, seconds_per_call, stored_layer

from bitsmoe_modifier.method import rounding
from bitsmoe_modifier.method.trellis import GroupTrellis

Line = dict[str, object]
Task = tuple[str, Callable[[], Line]]

#: Layers whose kernels are checked: the recipe's blocks, those of gpt-oss, and small ones.
CHECKED = {
    "recipe": Shape(16, 4, 512, 256),
    "blocks of 64": Shape(8, 2, 256, 128, block=64, group=64),
    "tiny": SHAPES["tiny"],
}

#: Layers in this project's format, the default first.
OURS = ("trellis", "scalar")

#: What is tried of gate_up and of down: all that fit, of each. They do not depend on each other, so that one step tries
#: sizes of both.
TRIED: dict[str, dict[str, tuple[int, ...]]] = {
    "gate_up": {"parts": (1, 2, 4, 6, 8, 10, 12, 16), "stages_in": (2, 3), "warps_in": (1, 2, 4)},
    "down": {"rows": (32, 64, 128), "warps": (1, 2, 4), "splits": (1, 2, 3, 6), "stages_out": (2, 3)},
}


def dtype_of(device: torch.device) -> torch.dtype:
    """What layers are timed in; the interpreter and the plain path take float32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def batches_of(device: torch.device) -> tuple[int, ...]:
    """Tokens of the decoding steps that are timed."""
    return (1, 2, 4, 8, 16, 32, 64) if device.type == "cuda" else (1,)


# -------------------------------------------------------------------------------------------------------- check


def check(shape: Shape, kind: str, tokens: int, dtype: torch.dtype, device: torch.device) -> Line:
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
    result: Line = {"error": error, "bound": 10 * torch.finfo(dtype).eps}
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


def run_tests(paths: list[Path], until: float = math.inf) -> Line:
    """Files of the kernels' own tests, compiled, all at once: each in a process of its own, ended at ``until``, of
    `time.time`. Where one was, the line counts as a failure and not as done."""
    with ThreadPoolExecutor(len(paths)) as pool:
        ran = pool.map(lambda path: run_file(path, until), paths)
        found = dict(zip((path.name for path in paths), ran, strict=True))
    failed = {name: output for name, (passed, output) in found.items() if not passed}
    results = {name: output.strip().splitlines()[-1] for name, (_, output) in found.items() if output.strip()}
    ended = [name for name, (passed, _) in found.items() if passed is None]
    more: Line = {"exception": f"no time was left for {', '.join(ended)}"} if ended else {}
    return {"passed": not failed, "results": results, **({"output": failed} if failed else {}), **more}


def run_file(path: Path, until: float) -> tuple[bool | None, str]:
    """(whether it passed, the end of what it said) of one file of tests, compiled; None: it did not end in time."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    folder = path.parents[2]
    environment |= {"BITSMOE_TEST_KERNELS": "compiled"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, sys.path)])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", str(path)]
    wait = None if until == math.inf else max(0.0, until - time.time())
    try:
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=wait)
    except subprocess.TimeoutExpired as ended:
        return None, (ended.stdout or b"").decode(errors="replace")[-4000:]
    return ran.returncode == 0, (ran.stderr + ran.stdout)[-4000:]


def checks(device: torch.device) -> Iterator[Task]:
    """Layers: ours in the recipe's blocks first."""
    dtypes, on_gpu = [torch.bfloat16, torch.float16], device.type == "cuda"
    for name, shape in CHECKED.items() if on_gpu else [("tiny", SHAPES["tiny"])]:
        for kind in (*OURS, "plain-2", "plain-4") if on_gpu else OURS:
            for tokens in (1, 3, 20, 64, 200) if on_gpu else (1, 3):
                for dtype in dtypes if on_gpu else dtypes[:1]:
                    arguments = shape, kind, tokens, dtype, device
                    title = f"{name}, {kind}, {tokens} tokens, {str(dtype).removeprefix('torch.')}"
                    yield title, lambda arguments=arguments: check(*arguments)


def tests(device: torch.device, until: float) -> Iterator[Task]:
    """The kernels' test files, compiled: on a GPU only."""
    files = sorted((Path(__file__).parents[1] / "tests/kernels/interp").glob("test_*.py"))
    installed = all(importlib.util.find_spec(name) for name in ("pytest", "hypothesis"))
    if device.type == "cuda" and files and installed:
        yield "tests compiled", lambda: run_tests(files, until)


# ------------------------------------------------------------------------------------------------- decode, prefill


def sizes_once(shapes: list[str]) -> list[str]:
    """Those of the shapes that differ from the ones before in more than their bit-widths."""
    sizes = [replace(SHAPES[name], widths=()) for name in shapes]
    return [name for i, name in enumerate(shapes) if sizes[i] not in sizes[:i]]


def decodes(shapes: list[str], device: torch.device, repeats: int) -> Iterator[Task]:
    """Every form of every layer at every batch, ours first."""
    yield "copy", lambda: {"bytes_per_second": copy_bandwidth(device)}
    others = [kind for kind in decode.OTHERS if kind not in OURS]  # which have one bit-width
    for names, kinds in ((shapes, OURS), (sizes_once(shapes), others)):
        for name, batch, kind in itertools.product(names, batches_of(device), kinds):

            def timed(name: str = name, batch: int = batch, kind: str = kind) -> Line:
                arguments = kind, SHAPES[name], batch, device, dtype_of(device), repeats
                seconds, nbytes = decode.time_of(*arguments)
                return {"shape": name, "batch": batch, "kind": kind, "seconds": seconds, "bytes": nbytes}

            yield f"{name}, batch {batch}, {kind}", timed


def prefills(shapes: list[str], device: torch.device, repeats: int) -> Iterator[Task]:
    """Tables of many tokens."""
    for name in shapes:
        for kind in OURS:
            for tokens in (512, 2048, 8192) if device.type == "cuda" else (8,):
                arguments = SHAPES[name], [tokens], device, repeats, kind
                yield f"{name}, {kind}, {tokens} tokens", lambda a=arguments: {"table": prefill.run(*a)}


# --------------------------------------------------------------------------------------------------------- tune


@functools.lru_cache(maxsize=1)  # the sizes that are tried share them: making them takes longer than timing them
def kernel_calls(shape: Shape, kind: str, batch: int, device: torch.device) -> list[Callable[[], torch.Tensor]]:
    """One step of the packed kernels on each of several copies that exceed the second cache."""
    calls = []
    for i in range(copies_beyond_cache(decode.chosen_bytes(kind, shape, batch * shape.top_k), device)):
        experts = prepare(stored_layer(shape, kind, device, i))
        g = torch.Generator(device=device).manual_seed(i)
        x = torch.randn(batch, shape.hidden, generator=g, device=device).to(dtype_of(device))
        arguments = (x, *routing(shape, batch, device, i), experts, GATING)
        calls.append(lambda a=arguments: moe_forward(*a))
    return calls


def sample_of(shape: Shape, kind: str, device: torch.device) -> PreparedExperts:
    """A layer of few experts that says it has all of them: for what follows from sizes alone."""
    experts = prepare(stored_layer(replace(shape, experts=shape.top_k), kind, device, 0))
    return replace(experts, layout=replace(experts.layout, num_experts=shape.experts))


def candidates(experts: PreparedExperts) -> list[tuned.Sizes]:
    """The rules, and then sizes of gate_up with sizes of down; those that the layer has no use for are left out."""
    sides = []
    for tried in TRIED.values():
        fitting = {
            name: [value for value in values if tuned.Sizes(**{name: value}).fits(experts.layout)]
            for name, values in tried.items()
        }
        names = [name for name, values in fitting.items() if values]
        each = itertools.product(*(fitting[name] for name in names))
        sides.append([dict(zip(names, values, strict=True)) for values in each])
    pairs = [[sizes[i % len(sizes)] for sizes in sides] for i in range(max(map(len, sides)))]
    return [tuned.RULES, *(tuned.Sizes(**first, **second) for first, second in pairs)]


def tunes(shapes: list[str], device: torch.device, repeats: int) -> Iterator[Task]:
    """Times of gate_up and of down with every candidate; the table has one entry for all bit-widths."""
    for name, kind in itertools.product(sizes_once(shapes), OURS):
        experts = sample_of(SHAPES[name], kind, device)
        layer = tuned.layer_key(experts.layout)
        for batch in batches_of(device):
            for sizes in candidates(experts)[: None if device.type == "cuda" else 3]:
                text = ", ".join(f"{k} {v}" for k, v in asdict(sizes).items() if v is not None) or "rules"
                line = {"shape": name, "kind": kind, "batch": batch, "layer": layer, "sizes": asdict(sizes)}
                line["pairs"] = tuned.rounded(batch * SHAPES[name].top_k)

                def timed(line: Line = line, batch: int = batch, sizes: tuned.Sizes = sizes) -> Line:
                    calls = kernel_calls(SHAPES[str(line["shape"])], str(line["kind"]), batch, device)
                    with tuned.forcing(sizes):
                        times = kernel_times(calls, max(1, repeats // 10), device)
                    found = {key: sum(t for name, t in times.items() if key in name) for key in TRIED}
                    return {**line, **found}

                yield f"{name}, {kind}, batch {batch}, {text}", timed


def best_sizes(lines: list[Line], margin: float = 0.02) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """The table that `bitsmoe_kernels.tuned` reads, from the lines of the stage `tune`.

    The sizes of gate_up, and those of down, that were fastest, where they save more than ``margin`` of what the kernel
    takes by the rules.
    """
    steps: dict[tuple[str, str, str], list[Line]] = {}
    for line in lines:
        if "sizes" in line:
            steps.setdefault((line["device"], line["layer"], str(line["pairs"])), []).append(line)
    found: dict[str, dict[str, dict[str, dict[str, int]]]] = {}
    for (gpu, layer, pairs), tried in steps.items():
        entry: dict[str, int] = {}
        for kernel, names in TRIED.items():
            timed = [line for line in tried if kernel in line]
            ruled = [line[kernel] for line in timed if not any(line["sizes"].values())]
            best = min(timed, key=lambda line: line[kernel], default=None)
            if ruled and best and best[kernel] < (1 - margin) * ruled[0]:
                sizes = ((name, best["sizes"].get(name)) for name in names)
                entry |= {name: value for name, value in sizes if value is not None}
        found.setdefault(gpu, {}).setdefault(layer, {})[pairs] = entry
    return found


# ------------------------------------------------------------------------------------------------ profile, quant


def kernel_times(calls: list[Callable[[], torch.Tensor]], repeats: int, device: torch.device) -> dict[str, float]:
    """Seconds of every kernel of a call; on a CPU of every operator."""
    activity, on_gpu = torch.profiler.ProfilerActivity, device.type == "cuda"
    for call in calls:
        call()
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as profiler:
        for _ in range(repeats):
            for call in calls:
                call()
        if on_gpu:
            torch.cuda.synchronize()
    times = {}
    for event in profiler.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        kernel = event.device_type == torch.profiler.DeviceType.CUDA
        if spent and (kernel or (not on_gpu and event.key.startswith("bitsmoe::"))):
            times[event.key] = spent * 1e-6 / repeats / len(calls)
    return times


def profiles(shapes: list[str], device: torch.device, repeats: int) -> Iterator[Task]:
    """Seconds of every kernel of a step; on a CPU of every operator."""
    for name, kind in itertools.product(shapes, OURS):
        for batch in batches_of(device):

            def profiled(name: str = name, kind: str = kind, batch: int = batch) -> Line:
                calls = kernel_calls(SHAPES[name], kind, batch, device)
                line = {"shape": name, "kind": kind, "batch": batch}
                return {**line, "kernels": kernel_times(calls, repeats, device)}

            yield f"{name}, {kind}, batch {batch}", profiled


def quants(device: torch.device, repeats: int) -> Iterator[Task]:
    """The rounding kernels against the same in PyTorch, and a layer against GPTQ where llm-compressor is installed."""
    on_gpu = device.type == "cuda"
    # matrices, columns, rows, groups of a block of gate and up of Qwen3-30B-A3B
    count, columns, rows, groups = (128, 32, 768, 6) if on_gpu else (2, 4, 32, 2)

    def block(seed: int) -> tuple[torch.Tensor, ...]:
        g = torch.Generator(device=device).manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.rand(shape, generator=g, device=device)

        level = torch.full((count, columns, 1), 3.0, device=device)
        target, reference = 4 * draw(count, columns, rows) - 2, 4 * draw(count, columns, rows) - 2
        response, step = 0.1 * draw(count, columns, columns), 0.5 + 0.1 * draw(count, columns, groups)
        return target, response, reference, step, level, draw(count, rows)

    def timed(kernel: bool, coder: GroupTrellis | None) -> Line:
        target, *rest = block(0)
        wanted = rounding._on_kernels
        rounding._on_kernels = lambda _: kernel
        try:
            call = lambda: rounding.round_block(target.clone(), *rest, coder=coder)[0]  # noqa: E731 - it is spent
            seconds = seconds_per_call([call], repeats, device, graph=False)
        finally:
            rounding._on_kernels = wanted
        sizes = f"{count} x {columns} columns of {rows} rows"
        kind = "kernel" if kernel else "PyTorch"
        operation = "block of columns" + (", trellis codes" if coder else "")
        return {"operation": operation, "kind": kind, "sizes": sizes, "seconds": seconds}

    for coder, name in ((None, "rounding"), (GroupTrellis([2]), "rounding to trellis codes")):
        yield f"{name} by a kernel", lambda coder=coder: timed(True, coder)
        yield f"{name} in PyTorch", lambda coder=coder: timed(False, coder)
    if on_gpu and importlib.util.find_spec("llmcompressor"):

        def layer(arm: str) -> Line:
            import quantization_time

            with torch.inference_mode(False), torch.enable_grad():  # calibration takes gradients
                seconds = quantization_time.time_layer(quantization_time.Shape(), [arm], torch.bfloat16)[arm]
            return {"operation": "layer", "kind": arm, "sizes": str(quantization_time.Shape()), "seconds": seconds}

        for arm in ("BitsMoE, trellis codes", "BitsMoE", "GPTQModifier W2, routed tokens only", "GPTQModifier W2"):
            yield f"layer, {arm}", lambda arm=arm: layer(arm)


def tasks(stage: str, shapes: list[str], device: torch.device, repeats: int, until: float = math.inf) -> Iterator[Task]:
    """The stage's tasks, those first whose results are missed most; ``until``, of `time.time`: tests end then."""
    if stage == "check":
        yield from checks(device)
    elif stage == "tests":
        yield from tests(device, until)
    elif stage == "quant":
        yield from quants(device, repeats)
    else:
        stages = {"decode": decodes, "tune": tunes, "prefill": prefills, "profile": profiles}
        yield from stages[stage](shapes, device, repeats)


def finish(stage: str, out: Path, lines: list[Line]) -> None:
    """What a stage leaves besides its lines: the table of launch sizes."""
    if stage == "tune":
        (out / "tuned.json").write_text(json.dumps(best_sizes(lines), indent=1) + "\n")
