"""A model of a decoding step's time on GPUs that nobody here has: `python benchmarks/roofline.py --gpu H100`.

It compiles the kernels for the GPU, reads their instructions per weight and beside the loops, programs per
multiprocessor and rounds of copies in flight from the machine code (`bitsmoe_kernels.compile_gates`), and prints
microseconds per layer, beside a bf16 layer, a 4-bit and a plain 2-bit kernel at fixed shares of the bandwidth. A kernel
takes

    launch + beginning and end + max(bytes / bandwidth, issue, rounds one after another, bytes in flight)

and a layer the sum of its kernels. *Issue* is the time of the busiest multiprocessor: so many instructions as a warp
has, one each `ALONE` cycles and `SHARED` more for every warp that is there with it. Where the weights of a step are
fetched ahead (`bitsmoe_kernels.ahead`), gate_up and down read the second cache, at its latency and bandwidth, and end
no earlier than their weights have come from memory. `LAUNCH`, `LATENCY`, `CACHE_LATENCY`, `CACHE_BANDWIDTH`,
`BANDWIDTH_SHARE` and `IDLE_PROGRAM` are assumptions, from what such kernels usually show, and so are those of the other
layers (`OTHERS`). `ALONE`, `SHARED`, `GATE_UP` and `DOWN` were fitted to what gate_up and down of trellis codes took on
an H100 (docs/kernels.md) at 1, 8 and 64 tokens and with other numbers of programs and of warps; `--fit` prints these
times beside the model's. Instructions beside a loop count for every program, although one of several adds a token up.
The model cannot know: how evenly a router loads experts (it assumes random choices), caches (all bytes come from
memory), clocks under load, what instructions wait for (they are fetched late where loops are long), and whether the
compiled code is right. Order is more reliable than size.
"""

import argparse
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

from bitsmoe_kernels import compile_gates, trellis_gates
from bitsmoe_kernels.ahead import fits_ahead
from bitsmoe_kernels.launch import (
    decode_tile,
    down_splits,
    down_tile,
    expected_tiles,
    gate_up_tile,
    launch,
    trellis_warps,
)
from bitsmoe_kernels.machine_code import Case, compile_case
from bitsmoe_kernels.prepare import width_set
from bitsmoe_kernels.routing import tile_count
from layers import SHAPES, Shape, markdown

from bitsmoe_modifier.method.viterbi import PRELUDE

#: Seconds between the end of a kernel and the start of one that depends on it, inside a CUDA graph.
LAUNCH = 1.5e-6
#: Seconds of one load that the next instruction needs.
LATENCY = 0.7e-6
#: The same from the second cache, and how many times the memory's bandwidth that has.
CACHE_LATENCY, CACHE_BANDWIDTH = 0.35e-6, 1.6
#: Share of the bandwidth that a kernel reaches at best.
BANDWIDTH_SHARE = 0.85
#: Cycles between two instructions of a warp that is alone on its multiprocessor, and for every warp that is there.
ALONE, SHARED = 1.3, 0.5
#: Seconds before the first copy of weights and after the last product: of the basis as assumed, of the others fitted.
BASIS, GATE_UP, DOWN = 1.4e-6, 1.3e-6, 5.6e-6
#: Share of the issue slots that the encoder reaches, whose loop is short; not measured.
ENCODER_ISSUE_SHARE = 0.7
#: Seconds that a program takes to find that it has nothing to do, per multiprocessor.
IDLE_PROGRAM = 0.03e-6
#: Instructions of a warp that trace a weight back in the encoder of trellis codes: its loops have 13 and 17.
TRACE = 15
#: Sizes that kernels of trellis codes are compiled for; nothing that is read from them depends on these.
_R, _I = 2048, 768
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
        outside: instructions beside the loop of the kernel of the narrowest width: a program has units of few widths.
        warps: of a program.
        columns: of a tile of trellis codes that a warp takes in a round; 0: its share of the tile.
    """

    planes: dict[int, float]
    resident: int
    flying: float
    outside: int
    warps: int
    columns: int = 0

    def rounds(self, columns: int) -> int:
        """Of its loop for one tile of so many columns, which the warps share."""
        return max(1, columns // self.warps // self.columns) if self.columns else 1


#: The basis kernel, whose rounds go to the four warps of its programs.
BASIS_KERNEL = Kernel({4: 3.0}, 6, 2.0, 200, 4)


@functools.cache
def compiled(
    name: str, cc: int, widths: tuple[int, ...], block: int, trellis: bool, warps: int = 0, rows: int = 128,
    split: bool = False,
) -> Kernel:  # fmt: skip
    """Compile "gate_up" or "down" for all widths together, and each width (of scalar codes each plane) alone.

    warps: of a program of down with trellis codes, likewise whether programs share its groups. rows: of a program of
    down with scalar codes.
    """
    more: dict[str, object] = {"shared": True} if name == "gate_up" else {}
    if name == "down":
        more = {"warps": warps, "split": split} if trellis else {"rows": rows}

    def case(some: tuple[int, ...]) -> Case:
        if trellis:
            return (trellis_gates.gate_up_case if name == "gate_up" else trellis_gates.down_case)(
                cc, some, 8, _R, _I, block=block, **more
            )
        return (compile_gates._gate_up if name == "gate_up" else compile_gates._down)(cc, some, 8, block=block, **more)

    whole, alone = compile_case(case(widths), cc), {b: compile_case(case((b,)), cc) for b in widths if trellis or b < 6}
    planes = {b: report.per_weight for b, report in alone.items()}
    how, beside = case(widths).how, alone[min(alone)].outside
    return Kernel(planes, whole.resident, whole.flying or 0.0, beside, how.warps, how.columns if trellis else 0)


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
    gpu: Gpu, kernel: Kernel, begin: float, nbytes: float, instructions: float, programs: float, rounds: float,
    idle: float = 0, cached: bool = False,
) -> float:  # fmt: skip
    """The formula above.

    begin: seconds before and after; instructions: of all threads, in loops; programs: that work; rounds: of one
    program, each of which waits for its copies at least; idle: programs without work; cached: the weights come from the
    second cache.
    """
    latency, bandwidth = LATENCY, gpu.bandwidth * BANDWIDTH_SHARE
    if cached:
        latency, bandwidth = CACHE_LATENCY, bandwidth * CACHE_BANDWIDTH
    each = programs / gpu.processors
    held = min(math.ceil(each), kernel.resident)
    waves = 1.0 if held == math.ceil(each) else each / held
    of_warp = instructions / (programs * 32 * kernel.warps) + kernel.outside
    in_flight = min(programs, gpu.processors * kernel.resident) * (1 + kernel.flying) * nbytes / (programs * rounds)
    bounds = (
        nbytes / bandwidth,
        waves * of_warp * (ALONE + SHARED * held * kernel.warps) / gpu.clock,
        waves * rounds * latency / (1 + kernel.flying),
        nbytes / (in_flight / latency),
    )
    return LAUNCH + begin + max(bounds) + idle * IDLE_PROGRAM / gpu.processors


@dataclass(frozen=True)
class Step:
    """Seconds of a step's three kernels; bytes that it reads; programs of down that share a tile's groups."""

    basis: float
    gate_up: float
    down: float
    nbytes: float
    splits: int

    @property
    def seconds(self) -> float:
        """Of all."""
        return self.basis + self.gate_up + self.down


def step_of(
    gpu: Gpu, shape: Shape, batch: int, trellis: bool = True, parts: int = 0, warps: int = 0, splits: int = 0
) -> Step:
    """One step with a 4-bit input basis; parts of gate_up, warps and splits of down: 0 as they are launched."""
    pairs, tile = batch * shape.top_k, decode_tile(batch * shape.top_k, shape.experts)
    reached = shape.experts * (1 - (1 - shape.top_k / shape.experts) ** batch)
    tiles, laid = expected_tiles(pairs, shape.experts, tile), tile_count(pairs, shape.experts, tile)
    kept, mean = sum(b > 0 for b in shape.widths) / len(shape.widths), sum(shape.widths) / len(shape.widths)
    used = width_set(shape.widths)

    def work(kernel: Kernel) -> float:
        """Instructions per stored weight position, over the mixture of widths; the kernel's planes of 4 and 2 bits."""
        planes = {b: (b,) if b in kernel.planes else (4, 2) for b in (2, 4, 6)} | {0: ()}
        return sum(kernel.planes[f] for b in shape.widths for f in planes[b]) / len(shape.widths)

    weights = shape.hidden * shape.inner
    matrix = weights * (mean + kept * 16 / shape.group) / 8
    basis = shape.hidden**2 * (4 + 16 / 128) / 8
    reads = max(1.0, tiles / reached)  # tiles of one expert meet in the second cache: bytes once, instructions twice
    cached = fits_ahead(pairs, shape.experts, int(3 * matrix * shape.experts), gpu.cache // 3)

    kernel = compiled("gate_up", gpu.cc, used, shape.block, trellis)
    units = shape.hidden // shape.block
    bn, ruled = gate_up_tile(tiles, shape.inner, shape.group, units, trellis, gpu.processors)
    parts = parts or ruled
    programs = shape.inner // bn * parts  # of a tile
    first = kernel_seconds(
        gpu, kernel, GATE_UP, 2 * matrix * reached, 2 * weights * work(kernel) * reached * reads, tiles * programs,
        max(1.0, units * kept * 2 / parts) * kernel.rounds(shape.block), (laid - tiles) * programs, cached,
    )  # fmt: skip

    rows, groups = shape.block if trellis else down_tile(tiles, shape.hidden, shape.block), shape.inner // shape.group
    blocks = shape.hidden // rows
    if not trellis:
        warps = launch(min(tile, 8), rows, gpu.cc).warps  # whose kernels are compiled for 8 pairs
    warps = warps or trellis_warps(tile, rows, shape.group)
    splits = splits or down_splits(tiles, blocks, groups, rows * shape.group, warps, gpu.processors)
    kernel = compiled("down", gpu.cc, used, shape.block, trellis, warps if trellis else 0, rows, splits > 1)
    second = kernel_seconds(
        gpu, kernel, DOWN, matrix * reached, weights * work(kernel) * reached * reads, tiles * blocks * kept * splits,
        math.ceil(groups / splits) * kernel.rounds(shape.group), (laid - tiles) * blocks * splits, cached,
    )  # fmt: skip

    turns = math.ceil(batch / 16)  # tiles of tokens, each of which decodes the basis
    base = kernel_seconds(
        gpu, BASIS_KERNEL, BASIS, basis, shape.hidden**2 * BASIS_KERNEL.planes[4] * turns, shape.hidden / 16 * turns,
        shape.hidden / 128 / 4,
    )  # fmt: skip
    if cached:  # requests leave once ids and places are read
        begun = LAUNCH + 2 * LATENCY
        first = max(base + first, begun + (basis + 2 * matrix * reached) / (gpu.bandwidth * BANDWIDTH_SHARE)) - base
        arrived = begun + (basis + 3 * matrix * reached) / (gpu.bandwidth * BANDWIDTH_SHARE)
        second = max(base + first + second, arrived) - base - first
    return Step(base, first, second, 3 * matrix * reached + basis, splits)


def micro(seconds: float) -> str:
    """In a table."""
    return f"{seconds * 1e6:.0f}"


def table(name: str, shapes: list[str], batches: list[int], codes: str = "trellis") -> str:
    """The Markdown table of one GPU, for "trellis" or "scalar" codes."""
    gpu, rows, trellis = GPUS[name], [], codes == "trellis"
    for shape_name in shapes:
        shape = SHAPES[shape_name]
        for batch in batches:
            step = step_of(gpu, shape, batch, trellis)
            whole = step.down if step.splits == 1 else step_of(gpu, shape, batch, trellis, splits=1).down
            reached = shape.experts * (1 - (1 - shape.top_k / shape.experts) ** batch)
            weights = 3 * shape.hidden * shape.inner * reached
            others = [weights * bits / 8 / (gpu.bandwidth * share) + fixed for bits, fixed, share in OTHERS.values()]
            rows.append([
                shape_name, str(batch), micro(step.seconds), f"{step.nbytes / step.seconds / gpu.bandwidth:.0%}",
                micro(step.gate_up), micro(step.down), str(step.splits), micro(whole), *map(micro, others),
                f"{others[0] / step.seconds:.1f}",
            ])  # fmt: skip
    figures = "; ".join(
        f"{name_}, {codes} codes, blocks of {block}: {k.planes[2]:.2f} and {k.planes[4]:.2f} instructions per 2- and "
        f"4-bit weight, {k.resident} programs per multiprocessor"
        for block in sorted({SHAPES[shape].block for shape in shapes}, reverse=True)
        for name_ in ("gate_up", "down")
        for k in [compiled(name_, gpu.cc, width_set(SHAPES[shapes[0]].widths), block, trellis)]
    )
    header = [
        "layer", "batch", "µs modelled", "of bandwidth", "gate_up µs", "down µs", "splits of down", "down µs unsplit",
        *(f"{k} µs" for k in OTHERS), "bf16 / ours",
    ]  # fmt: skip
    return f"{name}: {figures}\n\n{markdown(header, rows)}"


def fit_table() -> str:
    """Kernels as measured on an H100 with other launch sizes (`measured/h100/tune.jsonl`), beside the model's."""
    rows = []
    for text in (Path(__file__).parent / "measured/h100/tune.jsonl").read_text().splitlines():
        line = json.loads(text)
        sizes = line["sizes"]
        if sizes["warps_in"] not in (None, 2):  # the model has gate_up's programs as they are launched
            continue
        chosen = {name: sizes[name] or 0 for name in ("parts", "warps", "splits")}
        step = step_of(GPUS["H100"], SHAPES[line["shape"]], line["batch"], line["kind"] == "trellis", **chosen)
        for kernel, seconds in (("gate_up", step.gate_up), ("down", step.down)):
            if kernel in line:
                text = ", ".join(f"{name} {value}" for name, value in chosen.items() if value)
                rows.append([str(line["batch"]), kernel, text, f"{line[kernel] * 1e6:.1f}", f"{seconds * 1e6:.1f}"])
    return markdown(["batch", "kernel", "with", "µs measured", "µs modelled"], rows)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(description="Modelled time of a decoding step, from the compiled kernels.")
    parser.add_argument("--gpu", choices=GPUS, nargs="+", default=["H100"])
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(MODELS))
    parser.add_argument("--batch", default="1,4,8,32", help="comma-separated numbers of tokens")
    parser.add_argument("--codes", choices=("trellis", "scalar"), default="trellis")
    parser.add_argument("--encoder", action="store_true", help="the encoder of trellis codes instead")
    parser.add_argument("--fit", action="store_true", help="kernels measured on an H100 beside the model's instead")
    options = parser.parse_args(argv)
    if options.fit:
        print(fit_table())
        return
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
