"""What the compiler made of the kernels, checked without a GPU: `python -m bitsmoe_kernels.compile_gates [--cc 80 90]`.

Every kernel is compiled as it would be launched for a Qwen3-30B-A3B layer (R = 2048, I = 768, blocks and groups of
128) and disassembled with the tools of Triton's package. A row passes when
- no thread uses the stack, which is where spilled registers go (four registers may, outside the loops, in kernels of
  six widths or of blocks of 64), and no loop does;
- the shared memory fits a program of the smallest GPU of its kind, and that of one multiprocessor, with its registers,
  holds the programs that are wanted there;
- no byte is loaded alone in the loop over the weights;
- the loops of trellis codes store next to nothing in shared memory (steps may go there, which take two instructions):
  what they decode goes to the tensor cores from registers;
- that loop waits for the copies of one round while those of another are under way: it reads two buffers at least;
- at most 400 instructions come before the first copy of weights is issued;
- the loop spends no more instructions per weight than the width's budget.
Instructions are counted in the machine code of the innermost loop that decodes, over the weights that a thread
decodes in one round of it. A 2-bit weight at full memory bandwidth leaves time for about 1.7 of them on an H200 (4.3
TB/s, 132 multiprocessors, 4 instructions of 32 lanes a clock at 1.75 GHz). Nothing depends on the number of pairs but
the routing, which is compiled for up to 128 and for more.

As many processes as there are cores compile. What was compiled stays in Triton's cache, so that a call that was ended
goes through what it had done in a second a case.
"""

import argparse
import itertools
import multiprocessing
import os
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
import triton

from .basis import basis_kernel
from .combine import combine_kernel
from .decoded import decode_in_kernel, decode_launch, decode_out_kernel
from .grouped import grouped_kernel, grouped_sizes
from .launch import NO_FUSION, Launch, basis_stages, prefill_rows
from .machine_code import SHARED, Case, compile_case
from .prepare import BASIS_GROUPS, BLOCKS, GROUPS, WIDTH_SETS
from .products import down_launch, gate_up_launch
from .rounding import constants_of, round_block_kernel
from .routing import route_arguments, route_kernel
from .trellis_gates import trellis_cases, trellis_shapes

TARGETS = (80, 86, 89, 90, 100, 120)

#: Instructions per weight that the loop may spend, by width: a plane costs about 1.5 plus the share of the activations.
#: The 16-byte rows of 1-bit planes (1 and 3 bits) cost more: their digits pass through shared memory.
BUDGET = {1: 5.5, 2: 2.0, 3: 7.5, 4: 2.3, 6: 4.3, 8: 4.6}
#: For 16 pairs of a tile, whose activations cost twice as much.
WIDE_BUDGET = {**BUDGET, 2: 3.5, 4: 3.5}
BASIS_BUDGET = {4: 3.5, 8: 6.0}
#: Prefill scales and multiplies 64 tokens per weight: its loop is bound by the products, a generous budget.
PREFILL_BUDGET = 10.0

_R, _I = 2048, 768


# -------------------------------------------------------------------------------------------------- the kernels


_INPUTS = {"tiles_ptr": "*i32", "pairs_ptr": "*i32", "codes_ptr": "*u8", "steps_ptr": "*bf16"}
_META = {"head_ptr": "*i32", "order_ptr": "*i32", "arrivals_ptr": "*i32", "P": "i32", "E": "i32", "PARTS": "i32"}
_GATE = {"bias_ptr": None, "HAS_BIAS": False, "ACTIVATION": "silu", "LIMIT": None, "ALPHA": 1.0, "SHIFT": 0.0}


def _gate_up(
    cc: int, widths: tuple[int, ...], tile: int, dtype: str = "bf16", shared: bool = False, block: int = 128,
    group: int | None = None,
) -> Case:  # fmt: skip
    group = group or block
    rows = group if tile <= 16 else prefill_rows(group, cc)
    kernel, how, share = gate_up_launch(tile, rows, block, widths, cc, trellis=False, shared=shared)
    constants = {
        **_GATE, "TOP_K": 8, "R": _R, "I": _I, "BS": block, "GS": group, "WIDTHS": widths,
        "BM": tile, "BN": rows, "SHARED": shared, "SWAP": how.pack != 2,
        "SPREAD": share,
    }  # fmt: skip
    if not shared:
        constants |= {"part_ptr": None, "arrivals_ptr": None}
    signature = {
        **_INPUTS, **_META, "h_ptr": f"*{dtype}", "z_ptr": f"*{dtype}", "part_ptr": "*fp32",
        "gain": "fp32", "inverse_gain": "fp32",
    }  # fmt: skip
    name = _name("gate_up", widths, tile, dtype, block, group) + (", shared" if shared else "")
    return Case(name, kernel, signature, constants, how, *_loop(widths, rows * block, tile, how), flies=how.stages > 2)


def _down(
    cc: int, widths: tuple[int, ...], tile: int, dtype: str = "bf16", total: bool | None = None, block: int = 128,
    group: int | None = None, rows: int = 128, split: bool = False,
) -> Case:  # fmt: skip
    group = group or block
    total = tile <= 16 if total is None else total
    rows = min(block, rows) if tile <= 16 else prefill_rows(block, cc)
    kernel, how, _ = down_launch(tile, rows, group, 0, cc, trellis=False)
    constants = {
        "bias_ptr": None, "base_ptr": None, "HAS_BIAS": False, "HAS_BASE": False, "SUM": total, "TOP_K": 8,
        "R": _R, "I": _I, "BS": block, "GS": group, "WIDTHS": widths, "BM": tile, "BR": rows,
        "SPLIT": split,
    }  # fmt: skip
    if not total:
        constants |= dict.fromkeys(("ids_ptr", "p_ptr", "y_ptr", "arrivals_ptr"))
    signature = {
        **_INPUTS, **_META, "z_ptr": f"*{dtype}", "t_ptr": "*fp32" if total else f"*{dtype}", "ids_ptr": "*i64",
        "p_ptr": "*fp32", "y_ptr": f"*{dtype}", "T": "i32", "TILES": "i32", "EACH": "i32",
    }  # fmt: skip
    name = _name("down", widths, tile, dtype, block, group) + (f", {rows} rows" if rows < block and tile <= 16 else "")
    name += ("" if total or tile > 16 else ", not summed") + (", split" if split else "")
    return Case(name, kernel, signature, constants, how, *_loop(widths, rows * block, tile, how), flies=how.stages > 2)


def _name(operation: str, widths: tuple[int, ...], tile: int, dtype: str, block: int, group: int) -> str:
    bits = ",".join(map(str, widths))
    name = f"{operation} {bits} bit, {tile} pairs, {dtype}" + (f", blocks of {block}" if block != 128 else "")
    return name + (f", groups of {group}" if group != block else "")


def _loop(widths: tuple[int, ...], weights: int, tile: int, how: Launch) -> tuple[float, float, int]:
    """(weights, budget, programs wanted): a loop of several widths is gated on its resources only."""
    programs = 3 if tile <= 8 else 2 if how.warps <= 4 else 1
    if len(widths) > 1:
        return 0, 0, programs
    return (
        weights / (32 * how.warps),
        (BUDGET if tile <= 8 else WIDE_BUDGET if tile <= 16 else {}).get(widths[0], PREFILL_BUDGET),
        programs,
    )


_ROUTING = {"ids_ptr": "*i64", "tiles_ptr": "*i32", "pairs_ptr": "*i32", "arrivals_ptr": "*i32"}
_ROUTING |= dict.fromkeys(("P", "E", "TILES", "ARRIVALS"), "i32")
_AHEAD = {"spans_ptr": "*i32", **dict.fromkeys(("codes_in_ptr", "codes_out_ptr"), "*u8")}
_AHEAD |= dict.fromkeys(("steps_in_ptr", "steps_out_ptr"), "*bf16")
_AHEAD |= dict.fromkeys(("head_in_ptr", "order_in_ptr", "head_out_ptr", "order_out_ptr"), "*i32")


def _basis(bits: int, dtype: str = "bf16", tokens: int = 8, group: int = 128, routing: bool = False) -> Case:
    chunk = 64 if bits == 16 else group
    how = Launch(warps=4, stages=basis_stages(bits, chunk, tokens), pack=4)
    constants: dict[str, object] = {
        "N": _R, "K": 4 * _R,  # a row as long as the layer's has so few rounds that their loop may be unrolled
        "BITS": bits, "BM": tokens, "BN": 16, "BK": chunk, "SLICES": 4, "ROUTE": routing, "TILE": 8,
        **route_arguments(8 * tokens, 128),
    }  # fmt: skip
    if bits == 16:
        constants["step_ptr"] = None
    if not routing:
        constants |= dict.fromkeys(("ids_ptr", "tiles_ptr", "pairs_ptr", "arrivals_ptr"))
    signature = {"x_ptr": f"*{dtype}", "w_ptr": "*bf16" if bits == 16 else "*u8", "step_ptr": "*fp16"}
    signature |= {"y_ptr": f"*{dtype}", "T": "i32", **_ROUTING}
    name = f"basis {bits} bit, {tokens} tokens, {dtype}" + (f", groups of {group}" if group != 128 else "")
    programs = 2 if group <= 128 else 1
    if bits == 16 or routing:  # nothing to decode, or counted without the routing
        return Case(name + ", routing" * routing, basis_kernel, signature, constants, how, programs=programs)
    return Case(name, basis_kernel, signature, constants, how, 16 * chunk * 4 / 128, BASIS_BUDGET[bits], programs)


def _small() -> Iterator[Case]:
    how = Launch(warps=4, stages=1, pack=0)
    yield Case(
        "combine", combine_kernel,
        {"t_ptr": "*fp32", "ids_ptr": "*i64", "p_ptr": "*fp32", "y_ptr": "*bf16", "E": "i32"},
        {"bias_ptr": None, "base_ptr": None, "TOP_K": 8, "N": _R, "BLOCK": 512, "HAS_T": True, "HAS_BIAS": False,
         "HAS_BASE": False}, how,
    )  # fmt: skip
    for pairs in (16, 512):
        constants = {"BM": 8, **route_arguments(pairs, 128)}
        yield Case(f"routing of {pairs} pairs", route_kernel, _ROUTING, constants, how)
    fetching = {"AHEAD": True, "BM": 8, **route_arguments(16, 128)}
    yield Case("routing of 16 pairs, weights fetched", route_kernel, _ROUTING | _AHEAD, fetching, how)


def _written(cc: int, widths: tuple[int, ...], trellis: bool, block: int = 128, group: int = 128) -> Iterator[Case]:
    """Factors written out in 16 bits; a program's weights are few, so there is no loop to count in."""
    for output, kernel in ((False, decode_in_kernel), (True, decode_out_kernel)):
        rows, across = (block, group) if output == trellis else (group, block)
        part, how = decode_launch(rows, across, cc)
        constants = {"R": _R, "I": _I, "BS": block, "GS": group, "WIDTHS": widths, "TRELLIS": trellis, "PART": part}
        constants |= {"JOINED": block < 128} if output else {}
        signature = {**_INPUTS, "codes_ptr": "*u16" if trellis else "*u8", "head_ptr": "*i32", "order_ptr": "*i32"}
        signature |= {"w_ptr": "*bf16", "FIRST": "i32", "gain": "fp32"}
        side, codes = "down" if output else "gate and up", "trellis codes, " if trellis else ""
        name = _name(f"write {side}, {codes}", widths, part, "bf16", block, group).replace("pairs", "a part")
        yield Case(name, kernel, signature, constants, how, programs=2, stack=16)


def _grouped(cc: int, tile: int, gated: bool) -> Case:
    (bn, bk), how = grouped_sizes(tile, _I if gated else _R, _R if gated else _I, gated, cc)
    constants = {
        **_GATE, "N": _I if gated else _R, "K": _R if gated else _I, "TOP_K": 8, "GATED": gated, "BM": tile, "BN": bn,
        "BK": bk,
    }  # fmt: skip
    signature = {**_INPUTS, "x_ptr": "*bf16", "w_ptr": "*bf16", "out_ptr": "*bf16", "FIRST": "i32", "COUNT": "i32"}
    name = f"grouped {'gate_up' if gated else 'down'}, {tile} pairs, bf16"
    # the loop of down is unrolled, and the copies of sm_100 are counted in another way
    flies = gated and cc != 100
    return Case(name, grouped_kernel, signature | {"scale": "fp32"}, constants, how, flies=flies)


def _rounding() -> Iterator[Case]:
    """Quantization: 32 columns, groups of 128 rows; with steps refitted (gate and up) and kept (down)."""
    pointers = dict.fromkeys(("target", "response", "reference", "step", "level", "weight", "before"), "*fp32")
    pointers |= dict.fromkeys(("codes", "step_out", "change"), "*fp32")
    signature = dict.fromkeys(round_block_kernel.arg_names, "i32") | {f"{k}_ptr": v for k, v in pointers.items()}
    for name, refit in (("round 32 columns, refit", True), ("round 32 columns", False)):
        constants = constants_of(32, 128 if refit else None, True, torch.float32)
        yield Case(
            name,
            round_block_kernel,
            signature,
            constants,
            Launch(warps=4, stages=1, pack=0),
            programs=2,
            fusion=NO_FUSION,
        )


def cases(cc: int, every: bool = True) -> Iterator[Case]:
    """The kernels to check for one target; ``every=False``: decode with widths 6, 4 and 2 only."""
    mixed = (6, 4, 2)
    for make in (_gate_up, _down):
        for width in (1, 2, 3, 4, 6, 8) if every else (2, 4):
            yield make(cc, (width,), 8)
        yield make(cc, mixed, 8)
        if make is _gate_up:
            yield make(cc, mixed, 8, shared=True)
        elif every:
            yield make(cc, mixed, 8, rows=32, split=True)
        if every:
            yield make(cc, mixed, 64)
            yield make(cc, (2,), 8, "fp16")
            yield make(cc, (2,), 16)
            yield make(cc, mixed, 16)
            yield make(cc, (2,), 64)
            yield replace(make(cc, (8, 6, 4, 3, 2, 1), 8), stack=16)
            yield replace(make(cc, mixed, 8, block=64), stack=16)
    yield from trellis_cases(cc, every, _R, _I)
    yield _basis(4)
    yield _basis(4, routing=True)
    yield from _rounding()
    if every:
        yield _basis(4, "fp16")
        yield _basis(4, tokens=16, group=256)
        yield _basis(8)
        yield _basis(16)
        yield from _small()
        for trellis in (False, True):
            yield from _written(cc, mixed, trellis)
        for tile in (64, 128):
            yield from (_grouped(cc, tile, gated) for gated in (True, False))


def shapes(cc: int) -> Iterator[Case]:
    """Every block, group and tile that `prepare.unsupported` accepts, with all widths: their resources only. Those
    that need most come first."""
    widths = WIDTH_SETS[-1]
    found: list[Case] = []
    for block in BLOCKS[::-1]:
        for group in GROUPS[::-1]:
            for tile in (8, 16, 64):
                found.append(_gate_up(cc, widths, tile, block=block, group=group))
                found.append(_down(cc, widths, tile, block=block, group=group))
            found.append(_gate_up(cc, widths, 8, shared=True, block=block, group=group))
            if block > 32:
                found.append(_down(cc, widths, 8, block=block, group=group, rows=32, split=True))
            found += trellis_shapes(cc, widths, block, group, _R, _I)
            found += [case for trellis in (False, True) for case in _written(cc, widths, trellis, block, group)]
    basis = [_basis(bits, tokens=t, group=g) for bits in (4, 8) for t in (8, 16) for g in BASIS_GROUPS[::-1]]
    for case in basis + found:
        yield replace(case, weights=0, budget=0, programs=1, flies=False)


# ------------------------------------------------------------------------------------------------------ command


HEADER = (
    "| target | kernel | warps | registers | stack | shared KiB | programs per SM | in flight | start "
    "| per weight | budget |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def row(cc: int, case: Case) -> tuple[str, list[str]]:
    """(a row of the table in Markdown, the gates that it misses)."""
    if SHARED[cc] <= 100:  # the shared memory of small GPUs holds two of the mixed kernels
        case = replace(case, programs=min(case.programs, 2))
    report = compile_case(case, cc)
    spent, budget = (f"{report.per_weight:.2f}", f"{case.budget}") if case.weights else ("", "")
    cells = (
        f"sm_{cc}", case.name, case.how.warps, report.registers, report.stack, f"{report.shared / 1024:.1f}",
        report.resident, "" if report.flying is None else f"{report.flying:g}",
        "" if report.start is None else report.start, spent, budget,
    )  # fmt: skip
    missed = [f"sm_{cc} {case.name}: {failure}" for failure in report.failures(case)]
    return "| " + " | ".join(map(str, cells)) + " |", missed


def rows(
    targets: tuple[int, ...], every: bool = True, all_shapes: bool = False, processes: int = 1
) -> Iterator[tuple[str, list[str]]]:
    """`row` of every case, in their order, as soon as it and those before it are compiled."""
    numbers = [
        (cc, every, all_shapes, number)
        for cc in targets
        for number in range(sum(1 for _ in _chosen(cc, every, all_shapes)))
    ]
    if processes == 1:
        yield from map(_row, numbers)
        return
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        yield from pool.imap(_row, numbers)


def _chosen(cc: int, every: bool, all_shapes: bool) -> Iterator[Case]:
    return shapes(cc) if all_shapes else cases(cc, every)


def _row(which: tuple[int, bool, bool, int]) -> tuple[str, list[str]]:
    """`row` of a case by its number, for cases hold kernels, which cannot be sent to another process."""
    cc, every, all_shapes, number = which
    return row(cc, next(itertools.islice(_chosen(cc, every, all_shapes), number, None)))


def main(argv: list[str] | None = None) -> int:
    """Print the table and the gates missed; 1 where there are some."""
    parser = argparse.ArgumentParser(description="Check the compiled kernels without a GPU.")
    parser.add_argument("--cc", type=int, nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--quick", action="store_true", help="decode only, with widths 6, 4, 2 (trellis: all too)")
    parser.add_argument("--shapes", action="store_true", help="instead, every block, group and tile with all widths")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that compile; as many as cores")
    options = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: these kernels would be interpreted, not compiled")
    print(f"Triton {triton.__version__}\n\n{HEADER}", flush=True)
    missed = []
    for text, failures in rows(tuple(options.cc), not options.quick, options.shapes, options.processes):
        print(text, flush=True)
        missed += failures
    print("\n" + ("\n".join(f"MISSED {line}" for line in missed) or "all gates passed"))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
