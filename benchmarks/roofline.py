"""A model of a decoding step's time on GPUs that nobody here has: `python benchmarks/roofline.py --gpu H100`.

It compiles the kernels for the GPU, reads their instructions per weight, programs per multiprocessor and rounds of
copies in flight from the machine code (`bitsmoe_kernels.compile_gates`), and prints microseconds per layer, beside a
bf16 layer, a 4-bit and a plain 2-bit kernel at fixed shares of the bandwidth. A kernel takes

    launch + start + max(bytes / bandwidth, instructions / issue rate, rounds one after another, bytes in flight)

and a layer the sum of its kernels. Where the weights of a step are fetched ahead (`bitsmoe_kernels.ahead`), gate_up and
down read the second cache, at its latency and bandwidth, and end no earlier than their weights have come from memory.
`LAUNCH` to `IDLE_PROGRAM` below are assumptions, from what such kernels usually show, and so are those of the other
layers (`OTHERS`). `START_LOADS` and `ISSUE_SHARE` were fitted to three steps measured on an H200 with trellis codes
(docs/kernels.md): before, they were 3 and 0.7, and the model promised 19, 49 and 97 µs where 46, 129 and 250 were
measured. The model cannot know: how evenly a router loads experts (it assumes random choices), caches (all bytes come
from memory), clocks under load, contention of programs for an issue slot or a bank, how often a warp waits for its next
instructions, and whether the compiled code is right. Order is more reliable than size.
"""

import argparse
from dataclasses import dataclass, replace

from bitsmoe_kernels import compile_gates, trellis_gates
from bitsmoe_kernels.ahead import fits_ahead
from bitsmoe_kernels.launch import (
    decode_tile,
    down_tile,
    expected_tiles,
    gate_up_tile,
    trellis_down_warps,
    trellis_warps,
)
from bitsmoe_kernels.machine_code import Report, compile_case
from bitsmoe_kernels.prepare import width_set
from bitsmoe_kernels.routing import tile_count
from layers import SHAPES, Shape, markdown

from bitsmoe_modifier.method.viterbi import PRELUDE

#: Seconds between the end of a kernel and the start of one that depends on it, inside a CUDA graph.
LAUNCH = 1.5e-6
#: Seconds of one load that the next instruction needs, and how many of them come before the first copy of weights.
LATENCY, START_LOADS = 0.7e-6, 10
#: The same from the second cache, and how many times the memory's bandwidth that has.
CACHE_LATENCY, CACHE_BANDWIDTH = 0.35e-6, 1.6
#: Share of the bandwidth and of the issue slots that a kernel reaches at best.
BANDWIDTH_SHARE, ISSUE_SHARE = 0.85, 0.25
#: Share of the issue slots that the encoder reaches, whose loop is short; not measured.
ENCODER_ISSUE_SHARE = 0.7
#: Seconds that a program takes to find that it has nothing to do, per multiprocessor.
IDLE_PROGRAM = 0.03e-6
#: Instructions of a warp that trace a weight back in the encoder of trellis codes: its loops have 13 and 17.
TRACE = 15
#: Sizes that kernels of trellis codes are compiled for; nothing that is read from them depends on these.
_R, _I = 2048, 768
_SCALAR = compile_gates._gate_up, compile_gates._down
_TRELLIS = trellis_gates.gate_up_case, trellis_gates.down_case
#: Other layers: bits of a weight, seconds besides, share of the bandwidth; of bf16 as measured on an H200
#: (`fused_moe.py`).
OTHERS = {"bf16": (16, 12e-6, 0.92), "W4": (4 + 16 / 128, 9e-6, 0.6), "plain 2 bit": (2 + 16 / 128, 8e-6, 0.6)}


@dataclass(frozen=True)
class Gpu:
    """Compute capability, multiprocessors, bytes per second, clock in Hz, bytes of the second cache."""

    cc: int
    processors: int
    bandwidth: float
    clock: float
    cache: int


GPUS = {
    "H100": Gpu(90, 132, 3.35e12, 1.755e9, 50 * 10**6),
    "H200": Gpu(90, 132, 4.8e12, 1.755e9, 50 * 10**6),
    "A100": Gpu(80, 108, 2.04e12, 1.41e9, 40 * 10**6),
    "4090": Gpu(89, 128, 1.008e12, 2.52e9, 72 * 10**6),
    "B200": Gpu(100, 148, 8.0e12, 1.85e9, 126 * 10**6),
}
MODELS = ("qwen3-30b-a3b", "qwen3-235b-a22b", "deepseek-v3", "gpt-oss-120b")


@dataclass(frozen=True)
class Kernel:
    """What the compiler made of a decode kernel.

    Attributes:
        planes: instructions per weight of a 4-bit and a 2-bit plane; of trellis codes, of every width.
        resident: programs per multiprocessor of the kernel of all widths.
        flying: its rounds of copies in flight.
        start: its instructions before the first copy.
    """

    planes: dict[int, float]
    resident: int
    flying: float
    start: int


def compiled(make: object, cc: int, widths: tuple[int, ...], block: int) -> Kernel:
    """Compile the kernel for its widths and each plane alone."""
    case = make(cc, widths, 8, block=block)  # type: ignore[operator]
    whole = compile_case(case, cc)
    planes = {f: compile_case(make(cc, (f,), 8, block=block), cc).per_weight for f in (4, 2)}  # type: ignore[operator]
    return Kernel(planes, whole.resident, whole.flying or 0.0, whole.start or 0)


def compiled_trellis(make: object, cc: int, widths: tuple[int, ...], block: int) -> Kernel:
    """`compiled` for trellis codes; make: of `trellis_gates`."""

    def report(some: tuple[int, ...]) -> Report:
        return compile_case(make(cc, some, 8, _R, _I, block=block), cc)  # type: ignore[operator]

    whole = report(widths)
    planes = {b: report((b,)).per_weight for b in widths}
    return Kernel(planes, whole.resident, whole.flying or 0.0, whole.start or 0)


def encoder_table(name: str, weights: float) -> str:
    """Seconds that the encoder of trellis codes takes for so many weights, by width."""
    gpu, rows = GPUS[name], []
    for width in (1, 2, 3, 4, 6):
        spent, span = compile_case(trellis_gates.encoder_case(width), gpu.cc).per_weight, PRELUDE[width]
        whole = (128 + 2 * span) / 128 * spent + (128 + span) / 128 * TRACE
        seconds = weights * whole / (gpu.processors * 4 * gpu.clock * ENCODER_ISSUE_SHARE)
        rows.append([str(width), f"{spent:.0f}", f"{whole:.0f}", f"{seconds:.1f}"])
    header = ["bits", "instructions a weight, forward", "in all", f"s for {weights:.3g} weights"]
    return f"{name}, encoder of trellis codes, sequences of 128:\n\n{markdown(header, rows)}"


def kernel_seconds(
    gpu: Gpu, kernel: Kernel, nbytes: float, instructions: float, programs: float, idle: float, rounds: float,
    cached: bool = False,
) -> float:  # fmt: skip
    """The formula above.

    ``rounds``: of one program, each of which waits for its copies at least; ``cached``: the weights come from the
    second cache.
    """
    latency, bandwidth = LATENCY, gpu.bandwidth * BANDWIDTH_SHARE
    if cached:
        latency, bandwidth = CACHE_LATENCY, bandwidth * CACHE_BANDWIDTH
    held = min(programs, gpu.processors * kernel.resident)
    waves = programs / held
    in_flight = held * (1 + kernel.flying) * nbytes / (programs * rounds)
    bounds = (
        nbytes / bandwidth,
        instructions / (gpu.processors * 128 * gpu.clock * ISSUE_SHARE) * max(1.0, gpu.processors / programs),
        max(1.0, waves) * rounds * latency / (1 + kernel.flying),
        nbytes / (in_flight / latency),
    )
    begin = START_LOADS * latency + kernel.start / (gpu.clock / 2)
    return LAUNCH + begin + max(bounds) + idle * IDLE_PROGRAM / gpu.processors


def layer_seconds(
    gpu: Gpu, shape: Shape, batch: int, gate_up: Kernel, down: Kernel, trellis: bool = False
) -> tuple[float, float]:
    """(seconds, bytes) of one step: three launches with a 4-bit input basis."""
    pairs, tile = batch * shape.top_k, decode_tile(batch * shape.top_k, shape.experts)
    reached = shape.experts * (1 - (1 - shape.top_k / shape.experts) ** batch)
    tiles, laid = expected_tiles(pairs, shape.experts, tile), tile_count(pairs, shape.experts, tile)
    kept, mean = sum(b > 0 for b in shape.widths) / len(shape.widths), sum(shape.widths) / len(shape.widths)

    def work(kernel: Kernel) -> float:
        """Instructions per stored weight position, over the mixture of widths; the kernel's planes of 4 and 2 bits."""
        planes = {b: (b,) if b in kernel.planes else (4, 2) for b in (2, 4, 6)} | {0: ()}
        return sum(kernel.planes[f] for b in shape.widths for f in planes[b]) / len(shape.widths)

    weights = shape.hidden * shape.inner
    matrix = weights * (mean + kept * 16 / shape.group) / 8
    basis = shape.hidden**2 * (4 + 16 / 128) / 8
    reads = max(1.0, tiles / reached)  # tiles of one expert meet in the second cache: bytes once, instructions twice

    bn, parts = gate_up_tile(tiles, shape.inner, shape.group, shape.hidden // shape.block)
    columns = shape.inner // bn
    units = shape.hidden // shape.block * kept * 2 / parts  # rounds of a program
    matrices = 3 * matrix * shape.experts
    cached = fits_ahead(pairs, shape.experts, int(matrices), gpu.cache // 3)
    first = kernel_seconds(
        gpu, gate_up, 2 * matrix * reached, 2 * weights * work(gate_up) * reached * reads, tiles * columns * parts,
        (laid - tiles) * columns * parts, max(1.0, units), cached=cached,
    )  # fmt: skip
    rows = shape.hidden // (shape.block if trellis else down_tile(tiles, shape.hidden, shape.block))
    if trellis:  # whole units, of more warps where they are few
        least = trellis_warps(tile, shape.block, shape.group)
        warps = trellis_down_warps(tile, shape.block, shape.group, tiles, rows)
        down = replace(down, resident=max(1, down.resident * least // warps))
    second = kernel_seconds(
        gpu, down, matrix * reached, weights * work(down) * reached * reads, tiles * rows * kept,
        (laid - tiles) * rows, shape.inner / shape.group, cached=cached,
    )  # fmt: skip
    # the basis kernel deals its rounds to the warps of 128 programs and more
    rounds = shape.hidden / 128 / 4
    base = kernel_seconds(gpu, Kernel({}, 6, 2.0, 100), basis, shape.hidden**2 * 3.0, shape.hidden / 16, 0, rounds)
    shared = LAUNCH + 2 * LATENCY  # the last arrivals add parts up
    if cached:  # requests leave once ids and places are read
        begun = LAUNCH + 2 * LATENCY
        first = max(base + first, begun + (basis + 2 * matrix * reached) / (gpu.bandwidth * BANDWIDTH_SHARE)) - base
        arrived = begun + (basis + 3 * matrix * reached) / (gpu.bandwidth * BANDWIDTH_SHARE)
        second = max(base + first + second, arrived) - base - first
    return base + first + second + shared, 3 * matrix * reached + basis


def table(name: str, shapes: list[str], batches: list[int], codes: str = "trellis") -> str:
    """The Markdown table of one GPU, for "trellis" or "scalar" codes."""
    gpu, rows = GPUS[name], []
    kernels: dict[int, tuple[Kernel, Kernel]] = {}
    for shape_name in shapes:
        shape = SHAPES[shape_name]
        if shape.block not in kernels:
            widths = width_set(shape.widths)
            if codes == "trellis":
                pair = [compiled_trellis(make, gpu.cc, widths, shape.block) for make in _TRELLIS]
            else:
                pair = [compiled(make, gpu.cc, widths, shape.block) for make in _SCALAR]
            kernels[shape.block] = pair[0], pair[1]
        for batch in batches:
            ours, nbytes = layer_seconds(gpu, shape, batch, *kernels[shape.block], codes == "trellis")
            reached = shape.experts * (1 - (1 - shape.top_k / shape.experts) ** batch)
            weights = 3 * shape.hidden * shape.inner * reached
            others = [weights * bits / 8 / (gpu.bandwidth * share) + fixed for bits, fixed, share in OTHERS.values()]
            row = [shape_name, str(batch), f"{ours * 1e6:.0f}", f"{nbytes / ours / gpu.bandwidth:.0%}"]
            rows.append(row + [f"{other * 1e6:.0f}" for other in others] + [f"{others[0] / ours:.1f}"])
    figures = "; ".join(
        f"{name_}, {codes} codes, blocks of {block}: {k.planes[2]:.2f} and {k.planes[4]:.2f} instructions per 2- and "
        f"4-bit weight, {k.resident} programs per multiprocessor"
        for block, pair in kernels.items()
        for name_, k in zip(("gate_up", "down"), pair, strict=True)
    )
    header = ["layer", "batch", "µs modelled", "of bandwidth", *(f"{k} µs" for k in OTHERS), "bf16 / ours"]
    return f"{name}: {figures}\n\n{markdown(header, rows)}"


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(description="Modelled time of a decoding step, from the compiled kernels.")
    parser.add_argument("--gpu", choices=GPUS, nargs="+", default=["H100"])
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(MODELS))
    parser.add_argument("--batch", default="1,4,8,32", help="comma-separated numbers of tokens")
    parser.add_argument("--codes", choices=("trellis", "scalar"), default="trellis")
    parser.add_argument("--encoder", action="store_true", help="the encoder of trellis codes instead")
    options = parser.parse_args(argv)
    if options.encoder:
        print("Modelled, not measured.\n\n" + "\n\n".join(encoder_table(name, 29e9) for name in options.gpu))
        return
    batches = [int(b) for b in options.batch.split(",")]
    print(
        "Modelled, not measured.\n\n"
        + "\n\n".join(table(name, options.shape, batches, options.codes) for name in options.gpu)
    )


if __name__ == "__main__":
    main()
