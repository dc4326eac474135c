"""Decode speed of one MoE layer: `python benchmarks/decode.py --shape qwen3-30b-a3b --batch 1,2,4,8,16,32,64`.

For every batch: time per layer step and per token with trellis codes, the bytes that the step needs (the chosen
experts' codes and steps, the bases) over the time as a share of this machine's copy bandwidth, and the same layer in
other forms:
    scalar    scalar codes of the same widths
    fused     16-bit experts in two fused launches whose sizes are tried (fused_moe.py)
    bf16      grouped matrix product over 16-bit experts, by PyTorch
    plain-4   these kernels, every unit 4 bits wide, no basis: GPTQ 4 bits, group 128, as these kernels would serve it
    plain-2   likewise 2 bits
    decode    plain 2-bit experts, decoded whole and then multiplied
Ratios are other time / our time: above 1 we are faster. `--bytes` prints what must be read instead, without a GPU. See
layers.py for how times are taken.
"""

import argparse
import platform

import torch
import triton
from fused_moe import fused_layer
from layers import (
    SHAPES,
    Layer,
    Shape,
    copies_beyond_cache,
    copy_bandwidth,
    dequantizing_layer,
    grouped_layer,
    kernel_layer,
    markdown,
    needed_bytes,
    random_weights,
    routing,
    seconds_per_call,
    stored_layer,
)

from bitsmoe_modifier.storage.packed import PackedExperts

#: Forms beside ours, which are trellis codes.
OTHERS = ("scalar", "fused", "bf16", "plain-4", "plain-2", "decode")


def build(
    kind: str, shape: Shape, device: torch.device, dtype: torch.dtype, seed: int
) -> tuple[Layer, PackedExperts | None]:
    """One copy of the layer in one of its forms, with its stored tensors where it has our layout."""
    if kind == "fused" and (device.type == "cuda" or triton.knobs.runtime.interpret):
        return fused_layer(*random_weights(shape, device, dtype, seed)), None
    if kind in ("bf16", "fused"):  # the plain path of a CPU has no kernels
        return grouped_layer(*random_weights(shape, device, dtype, seed)), None
    if kind == "decode":
        return dequantizing_layer(shape, device, dtype, seed), None
    packed = stored_layer(shape, kind, device, seed)
    return kernel_layer(packed), packed


def chosen_bytes(kind: str, shape: Shape, pairs: int) -> int:
    """Bytes of the experts that a step reads, about: they decide how many copies exceed the cache."""
    bits = {"bf16": 16, "fused": 16, "plain-4": 4}.get(kind, 2)
    return min(shape.experts, pairs) * 3 * shape.hidden * shape.inner * bits // 8


def time_of(
    kind: str, shape: Shape, batch: int, device: torch.device, dtype: torch.dtype, repeats: int
) -> tuple[float, float]:
    """(median seconds, mean bytes needed) of one step of the layer; bytes are 0 for other layouts."""
    copies = copies_beyond_cache(chosen_bytes(kind, shape, batch * shape.top_k), device)
    calls, needed = [], []
    for i in range(copies):
        layer, packed = build(kind, shape, device, dtype, i)
        g = torch.Generator(device=device).manual_seed(i)
        x = torch.randn(batch, shape.hidden, generator=g, device=device).to(dtype)
        ids, p = routing(shape, batch, device, i)
        needed.append(0 if packed is None else needed_bytes(packed, ids))
        calls.append(lambda layer=layer, arguments=(x, ids, p): layer(*arguments))
    return seconds_per_call(calls, repeats, device), sum(needed) / copies


def run(shape: Shape, batches: list[int], device: torch.device, repeats: int) -> str:
    """The table for one shape."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bandwidth = copy_bandwidth(device)
    header = ["batch", "µs / layer", "µs / token", "needed MB", "GB/s", "of copy"]
    header += [f"{kind} / ours" for kind in OTHERS]
    rows = []
    for batch in batches:
        ours, bytes_ = time_of("trellis", shape, batch, device, dtype, repeats)
        row = [str(batch), f"{ours * 1e6:.1f}", f"{ours * 1e6 / batch:.2f}", f"{bytes_ / 1e6:.2f}"]
        row += [f"{bytes_ / ours / 1e9:.0f}", f"{bytes_ / ours / bandwidth:.0%}"]
        row += [f"{time_of(kind, shape, batch, device, dtype, repeats)[0] / ours:.2f}" for kind in OTHERS]
        rows.append(row)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.processor() or 'CPU'}, plain path"
    note = f"{where}; copy bandwidth {bandwidth / 1e9:.0f} GB/s; medians of {repeats}"
    return f"{note}\n\n{markdown(header, rows)}"


def bytes_table(shape: Shape, batches: list[int]) -> str:
    """MB that one step of the layer must read, by arithmetic: experts chosen at random, each read once, bases once."""
    weights = 3 * shape.hidden * shape.inner
    step = 16 / shape.group  # fp16, per weight of a unit that is there
    mean = sum(shape.widths) / len(shape.widths)
    kept = sum(b > 0 for b in shape.widths) / len(shape.widths)
    square = shape.hidden**2
    columns = {
        "bf16": (16, 0),
        "plain 4 bit": (4 + step, 0),
        "plain 2 bit": (2 + step, 0),
        f"mixed {mean:g} bit": (mean + kept * step, 0),
        "+ 4-bit input basis": (mean + kept * step, 4 + step),
        "+ 8-bit": (mean + kept * step, 8 + step),
        "+ 16-bit": (mean + kept * step, 16),
    }
    rows = []
    for batch in batches:
        active = shape.experts * (1 - (1 - shape.top_k / shape.experts) ** batch)
        sizes = [(active * weights * expert + square * basis) / 8e6 for expert, basis in columns.values()]
        rows.append([str(batch), f"{active:.1f}", *(f"{size:.1f}" for size in sizes)])
    return markdown(["batch", "experts read", *columns], rows)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description="Decode speed of one MoE layer.")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--batch", default="1,2,4,8,16,32,64", help="comma-separated numbers of tokens")
    parser.add_argument("--bytes", action="store_true", help="print what a step must read, and measure nothing")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    batches = [int(b) for b in options.batch.split(",")]
    if options.bytes:
        print(bytes_table(SHAPES[options.shape], batches))
        return
    with torch.inference_mode():
        print(run(SHAPES[options.shape], batches, torch.device(options.device), options.repeats))


if __name__ == "__main__":
    main()
