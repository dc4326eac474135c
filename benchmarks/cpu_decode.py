"""One token through one MoE layer on a CPU: `python benchmarks/cpu_decode.py --shape qwen3-30b-a3b --threads 1`.

Milliseconds per layer and token of the packed experts (compiled, and in PyTorch as where no compiler is), of trellis
codes (compiled; without a compiler experts are decoded), of the same layer in bf16 and float32 as plain matrix
products, and the memory that each reads. The layers' copies together are larger than the last cache, as in a model
whose other layers run in between; bases are decoded once and kept, as the runtime does within BITSMOE_CACHE_MB. A
thread's own time is taken where there is one.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from layers import SHAPES, Shape, markdown, needed_bytes, random_weights, routing, stored_layer

from bitsmoe_modifier.method.gating import Gating
from bitsmoe_modifier.runtime import native_product
from bitsmoe_modifier.runtime.experts import BitsMoEExperts
from bitsmoe_modifier.storage.packed import PackedExperts

#: Routings that a layer is timed with: the experts of one are out of the caches when its turn comes again.
TURNS = 6

Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def milliseconds(layer: Call, shape: Shape, tokens: int, dtype: torch.dtype, repeats: int) -> float:
    """Median over calls, each with experts of its own."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    inputs = []
    for turn in range(TURNS):
        x = torch.randn(tokens, shape.hidden, generator=torch.Generator().manual_seed(turn)).to(dtype)
        inputs.append((x, *routing(shape, tokens, torch.device("cpu"), turn)))
    times = []
    for _ in range(repeats + 1):
        for arguments in inputs:
            start = clock()
            layer(*arguments)
            times.append(clock() - start)
    return statistics.median(times[TURNS:]) * 1e3


def plain_layer(shape: Shape, dtype: torch.dtype) -> Call:
    """The layer as a 16- or 32-bit model has it: two matrix products per expert reached."""
    w_in, w_out = random_weights(shape, torch.device("cpu"), dtype, 0)
    gating = Gating()

    def layer(x: torch.Tensor, ids: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        for e in ids.unique().tolist():
            token, choice = (ids == e).nonzero(as_tuple=True)
            z = gating(*torch.nn.functional.linear(x[token], w_in[e]).chunk(2, 1))
            out = torch.nn.functional.linear(z, w_out[e])
            y.index_add_(0, token, out * p[token, choice, None].to(x.dtype))
        return y

    return layer


def run(shape: Shape, batches: list[int], repeats: int) -> str:
    """The table."""
    packed = stored_layer(shape, "scalar", torch.device("cpu"), 0)
    ours, dense, wide = BitsMoEExperts(packed, Gating()), plain_layer(shape, torch.bfloat16), None
    trellis = BitsMoEExperts(stored_layer(shape, "trellis", torch.device("cpu"), 0), Gating())
    rows = []
    for tokens in batches:
        times = {"packed, compiled": milliseconds(ours, shape, tokens, torch.bfloat16, repeats)}
        with mock.patch.object(native_product, "native_library", return_value=None):
            times["packed, PyTorch"] = milliseconds(ours, shape, tokens, torch.bfloat16, max(1, repeats // 5))
        times["trellis codes, compiled"] = milliseconds(trellis, shape, tokens, torch.bfloat16, repeats)
        times["bf16"] = milliseconds(dense, shape, tokens, torch.bfloat16, repeats)
        wide = wide or plain_layer(shape, torch.float32)
        times["float32"] = milliseconds(wide, shape, tokens, torch.float32, repeats)
        first = times["packed, compiled"]
        for name, each in times.items():
            size = _bytes(name, shape, packed, tokens)
            rows.append([str(tokens), name, f"{size / 1e6:.1f}", f"{each:.2f}", f"{each / first:.1f}"])
    threads = f"{torch.get_num_threads()} threads; {torch.backends.cpu.get_cpu_capability()}; medians"
    return f"{threads}\n\n" + markdown(["tokens", "layer", "MB read", "ms / layer", "× packed, compiled"], rows)


def _bytes(name: str, shape: Shape, packed: PackedExperts, tokens: int) -> float:
    ids, _ = routing(shape, tokens, torch.device("cpu"), 0)
    if name.startswith(("packed", "trellis")):  # its basis is kept in bf16
        return (
            needed_bytes(packed, ids)
            - (packed.basis_in.nbytes if packed.basis_in is not None else 0)
            + (2 * shape.hidden**2)
        )
    return len(ids.unique()) * 3 * shape.hidden * shape.inner * (2 if name == "bf16" else 4)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description="One token through one MoE layer on a CPU.")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--batch", default="1", help="comma-separated numbers of tokens")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        print(run(SHAPES[options.shape], [int(b) for b in options.batch.split(",")], options.repeats))


if __name__ == "__main__":
    main()
