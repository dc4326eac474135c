"""What the compiler made of the kernels, checked without a GPU: `python -m bitsmoe_kernels.compile_gates [--cc 80 90]`.

Every kernel is compiled as it would be launched for a Qwen3-30B-A3B layer (R = 2048, I = 768, blocks and groups of
128) and disassembled with the tools of Triton's package. A row passes when
- no thread uses the stack, which is where spilled registers go (off the default recipe, four registers may: kernels of
  six widths, or of blocks of 64);
- the shared memory fits a program of the smallest GPU of its kind, and that of one multiprocessor, with its registers,
  holds the programs that are wanted there;
- no byte is loaded alone in the loop over the weights;
- the loops of trellis codes store nothing in shared memory: what they decode goes to the tensor cores from registers;
- that loop waits for the copies of one round while those of another are under way: it reads two buffers at least;
- at most 400 instructions come before the first copy of weights is issued;
- the loop spends no more instructions per weight than the width's budget.
Instructions are counted in the machine code of the innermost loop that decodes, over the weights that a thread
decodes in one round of it. A 2-bit weight at full memory bandwidth leaves time for about 1.7 of them on an H200 (4.3
TB/s, 132 multiprocessors, 4 instructions of 32 lanes a clock at 1.75 GHz). Nothing depends on the number of pairs but
the routing, which is compiled for up to 128 and for more.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .basis import basis_kernel
from .combine import combine_kernel
from .down import down_kernel
from .gate_up import gate_up_kernel
from .launch import FUSION, NO_FUSION, Launch, basis_stages, launch, launch_down, spread
from .rounding import constants_of, round_block_kernel
from .routing import route_arguments, route_kernel
from .trellis_gates import trellis_cases

TARGETS = (80, 89, 90, 100, 120)

#: Instructions per weight that the loop may spend, by width: a plane costs about 1.5 plus the share of the activations.
#: The 16-byte rows of 1-bit planes (1 and 3 bits) cost more: their digits pass through shared memory.
BUDGET = {1: 5.5, 2: 2.0, 3: 7.5, 4: 2.3, 6: 4.3, 8: 4.6}
#: For 16 pairs of a tile, whose activations cost twice as much.
WIDE_BUDGET = {**BUDGET, 2: 3.5, 4: 3.5}
BASIS_BUDGET = {4: 3.5, 8: 6.0}
#: Instructions before the first copy.
START_BUDGET = 400
#: Prefill scales and multiplies 64 tokens per weight: its loop is bound by the products, a generous budget.
PREFILL_BUDGET = 10.0

_R, _I = 2048, 768
_SHARED = {80: 164, 89: 100, 90: 228, 100: 228, 120: 100}  # KiB per multiprocessor; 1 of a program's is the system's
_REGISTERS = 65536


@dataclass(frozen=True)
class Case:
    """One kernel as launched; ``weights``: decoded by a thread per round of its loop, 0 where there is no such loop.

    ``flies``: copies must be under way in the loop; ``direct``: nothing may be stored in shared memory there.
    """

    name: str
    kernel: triton.JITFunction
    signature: dict[str, str]
    constants: dict[str, object]
    how: Launch
    weights: float = 0
    budget: float = 0
    programs: int = 1
    stack: int = 0
    flies: bool = False
    direct: bool = False
    fusion: dict[str, bool] = field(default_factory=lambda: FUSION)


@dataclass(frozen=True)
class Report:
    """What one compiled case uses.

    ``resident``: programs per multiprocessor; ``byte_loads``: in the loop; ``flying``: rounds of the loop whose copies
    are under way while it waits, and ``start``: instructions before the first copy, None where nothing is copied.
    """

    registers: int
    stack: int
    shared: int
    resident: int
    per_weight: float
    byte_loads: int
    flying: float | None
    start: int | None
    fits: bool
    stores: int

    def failures(self, case: Case) -> list[str]:
        """The gates that this report misses."""
        checks = {
            f"{self.stack} bytes of stack, {case.stack} allowed": self.stack > case.stack,
            f"{self.resident} programs resident, {case.programs} wanted": self.resident < case.programs,
            f"{self.byte_loads} byte loads": self.byte_loads > 0,
            f"{self.per_weight:.2f} instructions per weight > {case.budget}": self.per_weight > case.budget,
            "the loop was not found": case.weights > 0 and self.per_weight == 0,
            f"{self.shared} bytes of shared memory do not fit": not self.fits,
            f"{self.flying} rounds of copies under way": case.flies and (self.flying is None or self.flying < 1),
            f"{self.stores} stores to shared memory": case.direct and self.stores > 0,
            f"{self.start} instructions before the first copy": (self.start or 0) > START_BUDGET,
        }
        return [text for text, failed in checks.items() if failed]


# -------------------------------------------------------------------------------------------------- the kernels


_INPUTS = {"tiles_ptr": "*i32", "pairs_ptr": "*i32", "codes_ptr": "*u8", "steps_ptr": "*bf16"}
_META = {"head_ptr": "*i32", "order_ptr": "*i32", "arrivals_ptr": "*i32", "P": "i32", "E": "i32", "PARTS": "i32"}
_GATE = {"bias_ptr": None, "HAS_BIAS": False, "ACTIVATION": "silu", "LIMIT": None, "ALPHA": 1.0, "SHIFT": 0.0}


def _gate_up(
    cc: int, widths: tuple[int, ...], tile: int, dtype: str = "bf16", shared: bool = False, block: int = 128
) -> Case:
    rows = block
    how = launch(tile, rows, cc)
    constants = {
        **_GATE, "TOP_K": 8, "R": _R, "I": _I, "BS": block, "GS": block, "WIDTHS": widths,
        "BM": tile, "BN": rows, "SHARED": shared, "SWAP": how.pack != 2,
        "SPREAD": spread(tile, block, how.warps, widths),
        "STAGES": how.stages, "PACK": how.pack,
    }  # fmt: skip
    if not shared:
        constants |= {"part_ptr": None, "arrivals_ptr": None}
    signature = {
        **_INPUTS, **_META, "h_ptr": f"*{dtype}", "z_ptr": f"*{dtype}", "part_ptr": "*fp32",
        "gain": "fp32", "inverse_gain": "fp32",
    }  # fmt: skip
    name = _name("gate_up", widths, tile, dtype, block) + (", shared" if shared else "")
    return Case(
        name, gate_up_kernel, signature, constants, how, *_loop(widths, rows * block, tile, how), flies=tile <= 16
    )


def _down(
    cc: int, widths: tuple[int, ...], tile: int, dtype: str = "bf16", total: bool | None = None, block: int = 128
) -> Case:
    total = tile <= 16 if total is None else total
    rows = min(block, 128)
    how = launch_down(tile, rows, cc)
    constants = {
        "bias_ptr": None, "base_ptr": None, "HAS_BIAS": False, "HAS_BASE": False, "SUM": total, "TOP_K": 8,
        "R": _R, "I": _I, "BS": block, "GS": block, "WIDTHS": widths, "BM": tile, "BR": rows,
        "STAGES": how.stages, "PACK": how.pack,
    }  # fmt: skip
    if not total:
        constants |= dict.fromkeys(("ids_ptr", "p_ptr", "y_ptr", "arrivals_ptr"))
    signature = {
        **_INPUTS, **_META, "z_ptr": f"*{dtype}", "t_ptr": "*fp32" if total else f"*{dtype}", "ids_ptr": "*i64",
        "p_ptr": "*fp32", "y_ptr": f"*{dtype}", "T": "i32", "TILES": "i32",
    }  # fmt: skip
    name = _name("down", widths, tile, dtype, block) + ("" if total or tile > 16 else ", not summed")
    return Case(name, down_kernel, signature, constants, how, *_loop(widths, rows * block, tile, how), flies=tile <= 16)


def _name(operation: str, widths: tuple[int, ...], tile: int, dtype: str, block: int) -> str:
    bits = ",".join(map(str, widths))
    return f"{operation} {bits} bit, {tile} pairs, {dtype}" + (f", blocks of {block}" if block != 128 else "")


def _loop(widths: tuple[int, ...], weights: int, tile: int, how: Launch) -> tuple[float, float, int]:
    """(weights, budget, programs wanted): a loop of several widths is gated on its resources only."""
    programs = 3 if tile <= 8 else 2 if tile <= 16 else 1
    if len(widths) > 1:
        return 0, 0, programs
    return (
        weights / (32 * how.warps),
        (BUDGET if tile <= 8 else WIDE_BUDGET if tile <= 16 else {}).get(widths[0], PREFILL_BUDGET),
        programs,
    )


_ROUTING = {"ids_ptr": "*i64", "tiles_ptr": "*i32", "pairs_ptr": "*i32", "arrivals_ptr": "*i32"}
_ROUTING |= dict.fromkeys(("P", "E", "TILES", "ARRIVALS"), "i32")


def _basis(bits: int, dtype: str = "bf16", tokens: int = 8, group: int = 128, routing: bool = False) -> Case:
    chunk = 64 if bits == 16 else group
    how = Launch(warps=4, stages=basis_stages(bits, chunk, tokens), pack=4)
    constants: dict[str, object] = {
        "N": _R, "K": 4 * _R,  # a row as long as the layer's has so few rounds that their loop may be unrolled
        "BITS": bits, "BM": tokens, "BN": 16, "BK": chunk, "SLICES": 4, "STAGES": how.stages,
        "PACK": 4, "ROUTE": routing, "TILE": 8, **route_arguments(8 * tokens, 128),
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
    """The kernels to check for one target; ``every=False``: decode with the default recipe's widths only."""
    mixed = (6, 4, 2)
    for make in (_gate_up, _down):
        for width in (1, 2, 3, 4, 6, 8) if every else (2, 4):
            yield make(cc, (width,), 8)
        yield make(cc, mixed, 8)
        if make is _gate_up:
            yield make(cc, mixed, 8, shared=True)
        if every:
            yield make(cc, mixed, 64)
            yield make(cc, (2,), 8, "fp16")
            yield make(cc, (2,), 16)
            yield make(cc, mixed, 16)
            yield make(cc, (2,), 64)
            yield replace(make(cc, (8, 6, 4, 3, 2, 1), 8), stack=16)
            yield replace(make(cc, mixed, 8, block=64), stack=16)
    yield from (Case(**case) for case in trellis_cases(cc, every, _R, _I))
    yield _basis(4)
    yield _basis(4, routing=True)
    yield from _rounding()
    if every:
        yield _basis(4, "fp16")
        yield _basis(4, tokens=16, group=256)
        yield _basis(8)
        yield _basis(16)
        yield from _small()


# -------------------------------------------------------------------------------------------------- the compiler


def compile_case(case: Case, cc: int) -> Report:
    """Compile one case for a target and read its machine code.

    Raises:
        RuntimeError: where the disassembler of Triton's package does not know the target.
    """
    names = case.kernel.arg_names
    signature = {n: "constexpr" if n in case.constants else case.signature[n] for n in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    constants = {(names.index(n),): value for n, value in case.constants.items()}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": case.how.warps, "num_stages": case.how.stages, "maxnreg": case.how.registers}
    options |= case.fusion
    compiled = triton.compile(source, target=GPUTarget("cuda", cc, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", path)
        code = _tool("nvdisasm", "-c", path)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    if not found:
        raise RuntimeError(f"no resource usage of {case.name} for sm_{cc} in: {usage[-400:]}")
    registers, stack, local = map(int, found.groups())
    shared = compiled.metadata.shared
    threads = 32 * case.how.warps
    resident = min(_REGISTERS // (-(-registers // 8) * 8 * threads), 2048 // threads)
    if shared:
        resident = min(resident, _SHARED[cc] * 1024 // (shared + 1024))
    loop = main_loop(code)
    opcodes = Counter(_opcodes(loop))
    waits, groups = re.findall(r"DEPBAR\.LE SB0, (0x\w+)", loop), opcodes["LDGDEPBAR"]
    loads = [op for op in opcodes.elements() if op.startswith(("LDG", "LDS."))]
    return Report(
        registers=registers,
        stack=stack + local,
        shared=shared,
        resident=resident,
        per_weight=sum(opcodes.values()) / case.weights if case.weights else 0.0,
        byte_loads=sum(".U8" in op or ".S8" in op for op in loads),
        flying=min(int(n, 16) for n in waits) / groups if waits and groups else None,
        start=len(_opcodes(code[: code.index("LDGSTS")])) if "LDGSTS" in code else None,
        fits=shared <= (_SHARED[cc] - 1) * 1024,
        stores=sum(op.split(".")[0] in ("STS", "STSM") for op in opcodes.elements()),
    )


def _tool(name: str, *arguments: str) -> str:
    """Output of one of the CUDA tools that Triton's package carries."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    ran = subprocess.run([str(path), *arguments], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{name} failed: {(ran.stderr or ran.stdout).strip()[-400:]}")
    return ran.stdout


def main_loop(code: str) -> str:
    """The innermost loop that decodes: of those without another inside (waiting loops aside), the one with most HFMA2.

    It is not found by its products: Blackwell's are issued by one thread, from code that lies outside the loop's text.
    """
    lines = code.splitlines()
    labels, loops = {}, []
    for i, line in enumerate(lines):
        label = re.match(r"\s*(\.L_\w+):", line)
        if label:
            labels[label[1]] = i
        jump = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
        if jump and jump[1] in labels:
            text = "\n".join(lines[labels[jump[1]] : i + 1])
            if len(_opcodes(text)) >= 32:
                loops.append((labels[jump[1]], i, text))
    inner = [a for a in loops if not any(b is not a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return max((text for *_, text in inner), key=lambda text: text.count("HFMA2"), default="")


def _opcodes(code: str) -> list[str]:
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]+)", code)


# ------------------------------------------------------------------------------------------------------ command


def table(targets: tuple[int, ...], every: bool = True) -> tuple[str, list[str]]:
    """(the table in Markdown, the gates missed)."""
    lines = [
        "| target | kernel | warps | registers | stack | shared KiB | programs per SM | in flight | start "
        "| per weight | budget |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    missed = []
    for cc in targets:
        for case in cases(cc, every):
            if _SHARED[cc] <= 100:  # the shared memory of small GPUs holds two of the mixed kernels
                case = replace(case, programs=min(case.programs, 2))
            report = compile_case(case, cc)
            missed += [f"sm_{cc} {case.name}: {failure}" for failure in report.failures(case)]
            spent, budget = (f"{report.per_weight:.2f}", f"{case.budget}") if case.weights else ("", "")
            cells = (
                f"sm_{cc}", case.name, case.how.warps, report.registers, report.stack, f"{report.shared / 1024:.1f}",
                report.resident, "" if report.flying is None else f"{report.flying:g}",
                "" if report.start is None else report.start, spent, budget,
            )  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines), missed


def main(argv: list[str] | None = None) -> int:
    """Print the table and the gates missed; 1 where there are some."""
    parser = argparse.ArgumentParser(description="Check the compiled kernels without a GPU.")
    parser.add_argument("--cc", type=int, nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--quick", action="store_true", help="only decode with the default recipe's widths")
    options = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: these kernels would be interpreted, not compiled")
    text, missed = table(tuple(options.cc), not options.quick)
    print(f"Triton {triton.__version__}\n\n{text}\n")
    print("\n".join(f"MISSED {line}" for line in missed) or "all gates passed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
