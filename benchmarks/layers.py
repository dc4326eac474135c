"""What the speed benchmarks share: model shapes, layers to compare, and honest timing.

A timed call replays a CUDA graph that holds the operation once for each of several copies of the weights, which
together are larger than three times the L2 cache: replaying one copy would time the cache. Medians over replays,
events around each. On a CPU the same code runs the plain path at a small shape, so that it is tested; its times say
nothing about a GPU.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from bitsmoe_kernels import prepare
from bitsmoe_kernels.reference import decode_bases, decode_expert_factors, moe_reference
from bitsmoe_kernels.synthetic import random_experts

from bitsmoe_modifier.method.gating import Gating
from bitsmoe_modifier.storage.layout import ExpertsLayout
from bitsmoe_modifier.storage.packed import PackedExperts

GATING = Gating()
#: A call: (x, ids, weights) to the layer's output.
Layer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """One MoE layer of a model; a unit's width is drawn uniformly from ``widths``, 2 bits on average."""

    experts: int
    top_k: int
    hidden: int
    inner: int
    block: int = 128
    group: int = 128
    widths: tuple[int, ...] = (6, 4, 2, 2, 2, 0, 0, 0)


SHAPES = {
    "qwen3-30b-a3b": Shape(128, 8, 2048, 768),
    # units of 1 and 3 bits too, as the default recipe makes them: other kernels, and narrower tiles for many tokens
    "qwen3-30b-a3b-default": Shape(128, 8, 2048, 768, widths=(4, 3, 3, 2, 2, 1, 1, 0)),
    "qwen3-235b-a22b": Shape(128, 8, 4096, 1536),
    "deepseek-v3": Shape(256, 8, 7168, 2048),
    "gpt-oss-120b": Shape(128, 4, 2880, 2880, block=64, group=64),
    "deepseek-v2-lite": Shape(64, 6, 2048, 1408),
    "mixtral-8x7b": Shape(8, 2, 4096, 14336),
    "bookmoe": Shape(64, 4, 256, 128, block=16, group=128),
    "tiny": Shape(4, 2, 64, 64, block=16, group=32),
}


def stored_layer(shape: Shape, kind: str, device: torch.device, seed: int) -> PackedExperts:
    """A random layer: "trellis" or "scalar" codes (mixed widths, 4-bit input basis), "plain-2", "plain-4": no bases."""
    mixed, trellis = kind in ("scalar", "trellis"), int(kind == "trellis")
    basis = 4 if mixed else 0
    widths = shape.widths if mixed else (int(kind[-1]),)
    layout = ExpertsLayout(
        shape.experts, shape.hidden, shape.inner, shape.hidden, shape.hidden, shape.block, shape.group, basis, 0,
        min(128, shape.block * 4), codes=trellis, stripes=trellis,
    )  # fmt: skip
    return random_experts(layout, widths, seed, device)


def kernel_layer(packed: PackedExperts) -> Layer:
    """Our kernels on CUDA; the plain fp32 layer elsewhere."""
    if packed.codes_in.device.type != "cuda":
        return lambda x, ids, p: moe_reference(x, ids, p, packed, GATING).to(x.dtype)
    from bitsmoe_kernels import moe_forward

    experts = prepare(packed)
    return lambda x, ids, p: moe_forward(x, ids, p, experts, GATING)


def dense_weights(packed: PackedExperts, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's weights as a bf16 model holds them: ``[E, 2 I, H]`` and ``[E, H, I]``."""
    a, f = decode_expert_factors(packed)
    b, u = decode_bases(packed)
    inputs = a.flatten(1, 2) if b is None else a.flatten(1, 2) @ b
    return inputs.to(dtype), (f if u is None else u @ f).to(dtype)


def grouped_layer(w_in: torch.Tensor, w_out: torch.Tensor) -> Layer:
    """The 16-bit layer as a grouped matrix product over pairs sorted by expert; nothing waits for the device on
    CUDA."""
    experts = w_in.shape[0]

    def product(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cuda":
            grouped = getattr(torch.nn.functional, "grouped_mm", torch._grouped_mm)  # public since torch 2.10
            return grouped(x, w.transpose(1, 2), offs=ends)
        begin = [0, *ends.tolist()[:-1]]
        return torch.cat([x[i:j] @ w[e].T for e, (i, j) in enumerate(zip(begin, ends.tolist(), strict=True))])

    def layer(x: torch.Tensor, ids: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        k = ids.shape[1]
        ordered, pairs = torch.sort(ids.flatten(), stable=True)
        ends = torch.searchsorted(ordered, torch.arange(1, experts + 1, device=x.device)).to(torch.int32)
        gate, up = product(x[pairs // k], w_in, ends).chunk(2, 1)
        t = product(GATING(gate, up), w_out, ends)
        back = torch.empty_like(t)
        back[pairs] = t
        return (back.view(-1, k, t.shape[1]) * p[:, :, None].to(t.dtype)).sum(1)

    return layer


def random_weights(
    shape: Shape, device: torch.device, dtype: torch.dtype, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random 16-bit experts: ``[E, 2 I, H]`` and ``[E, H, I]``."""
    g = torch.Generator(device=device).manual_seed(seed)
    sizes = (shape.experts, 2 * shape.inner, shape.hidden), (shape.experts, shape.hidden, shape.inner)
    w_in, w_out = (torch.randn(size, generator=g, device=device, dtype=dtype) / size[2] ** 0.5 for size in sizes)
    return w_in, w_out


def dequantizing_layer(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int) -> Layer:
    """A plain 2-bit layer served by decoding whole matrices and then multiplying, as GPTQModel's 2-bit path does.

    Codes ``[E, N, K / 4]``, four to a byte, a step per (row, group). It is kinder than the original: the decoding is
    one compiled kernel, no expert is decoded twice where there are more pairs than experts, and nothing waits for the
    device.
    """
    g = torch.Generator(device=device).manual_seed(seed)

    def matrix(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.randint(256, (shape.experts, n, k // 4), generator=g, device=device, dtype=torch.uint8)
        steps = torch.rand(shape.experts, n, k // shape.group, generator=g, device=device) / k**0.5
        return codes, steps.to(dtype)

    side_in, side_out = matrix(2 * shape.inner, shape.hidden), matrix(shape.hidden, shape.inner)
    shifts = torch.arange(0, 8, 2, device=device, dtype=torch.uint8)

    def decode(codes: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        values = ((codes[..., None] >> shifts) & 3).to(dtype).flatten(-2) * 2 - 3
        return (values.view(*steps.shape, -1) * steps[..., None]).flatten(-2)

    decoded = torch.compile(decode) if device.type == "cuda" else decode

    def layer(x: torch.Tensor, ids: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        k, flat = ids.shape[1], ids.flatten()
        if len(flat) >= shape.experts:
            return grouped_layer(decoded(*side_in), decoded(*side_out))(x, ids, p)
        rows = x.repeat_interleave(k, 0)[:, :, None]
        gate, up = (decoded(side_in[0][flat], side_in[1][flat]) @ rows)[:, :, 0].chunk(2, 1)
        z = GATING(gate, up)[:, :, None]
        t = (decoded(side_out[0][flat], side_out[1][flat]) @ z)[:, :, 0]
        return (t.view(-1, k, t.shape[1]) * p[:, :, None].to(t.dtype)).sum(1)

    return layer


def needed_bytes(packed: PackedExperts, ids: torch.Tensor) -> int:
    """Bytes that a step must read: bases, biases and metadata once, and the chosen experts' codes and steps once
    each."""
    layout = ExpertsLayout.from_tensor(packed.layout.cpu())
    chosen = ids.flatten().unique().cpu()
    total = sum(t.nbytes for name, t in packed.items() if name.startswith(("basis", "widths", "dense")))
    for widths in (packed.widths_in.cpu()[chosen], packed.widths_out.cpu()[chosen]):
        total += int(widths.sum(dtype=torch.int64)) * layout.groups * layout.quantum
        total += int((widths > 0).sum()) * layout.groups * layout.block_size * 2
    return total


def routing(shape: Shape, tokens: int, device: torch.device, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct random experts per token, with weights that sum to 1."""
    g = torch.Generator(device=device).manual_seed(seed)
    scores = torch.rand(tokens, shape.experts, generator=g, device=device)
    values, ids = scores.topk(shape.top_k, 1)
    return ids, values / values.sum(1, keepdim=True)


def seconds_per_call(
    calls: list[Callable[[], torch.Tensor]], repeats: int, device: torch.device, graph: bool = True
) -> float:
    """Median seconds of one call; on CUDA from replays of a graph that holds each of ``calls`` once.

    ``graph=False``: launched one by one, for what cannot be captured.
    """
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            for call in calls:
                call()
            times.append((time.perf_counter() - start) / len(calls))
        return statistics.median(times)

    def all_calls() -> None:
        for call in calls:
            call()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and fills the allocator's pools
            all_calls()
    torch.cuda.current_stream().wait_stream(stream)
    play = all_calls
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            all_calls()
        play = captured.replay
    for _ in range(3):
        play()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        play()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


def copies_beyond_cache(nbytes: int, device: torch.device) -> int:
    """How many copies of ``nbytes`` are needed so that a round over them is three times the L2 cache."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(64, -(-3 * cache // max(nbytes, 1))))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large device-to-device copy, reads plus writes."""
    size = 2**30 if device.type == "cuda" else 2**24
    source = torch.randint(255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # launched by itself: a copy that is a graph's node took half as long again on an H200
    return 2 * size / seconds_per_call([lambda: target.copy_(source)], 20, device, graph=False)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
