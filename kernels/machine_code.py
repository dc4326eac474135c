"""What the compiler makes of one kernel for a GPU that need not be there: its resources, and its innermost loop.

Kernels are compiled as they would be launched, and disassembled with the tools of Triton's package.
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .ahead import FETCHED_PAIRS
from .launch import FUSION, Launch
from .launcher import options

#: Instructions before the first copy.
START_BUDGET = 400

#: KiB of shared memory per multiprocessor; 1 of a program's is the system's.
SHARED = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}
#: Threads per multiprocessor.
THREADS = {80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
_REGISTERS = 65536


#: A kernel that could fetch weights ahead, without.
_APART: dict[str, object] = {"spans_ptr": None}
_APART |= {f"{name}_{side}_ptr": None for name in ("codes", "steps", "head", "order") for side in ("in", "out")}
_APART["AHEAD"] = False


@dataclass(frozen=True)
class Case:
    """One kernel as launched; ``weights``: decoded by a thread per round of its loop, 0 where there is no such loop.

    ``flies``: copies must be under way in the loop; ``stores``: to shared memory there at most.
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
    stores: int | None = None
    fusion: dict[str, bool] = field(default_factory=lambda: FUSION)


@dataclass(frozen=True)
class Report:
    """What one compiled case uses.

    ``resident``: programs per multiprocessor; ``byte_loads``: in the loop; ``flying``: rounds of the loop whose copies
    are under way while it waits, and ``start``: instructions before the first copy, None where nothing is copied;
    ``outside``: instructions of the kernel beside its innermost loops; ``spills``: inside these, to the stack.
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
    outside: int
    spills: int

    def failures(self, case: Case) -> list[str]:
        """The gates that this report misses."""
        checks = {
            f"{self.stack} bytes of stack, {case.stack} allowed": self.stack > case.stack,
            f"{self.spills} loads and stores of the stack in a loop": self.spills > 0,
            f"{self.resident} programs resident, {case.programs} wanted": self.resident < case.programs,
            f"{self.byte_loads} byte loads": self.byte_loads > 0,
            f"{self.per_weight:.2f} instructions per weight > {case.budget}": self.per_weight > case.budget,
            "the loop was not found": case.weights > 0 and self.per_weight == 0,
            f"{self.shared} bytes of shared memory do not fit": not self.fits,
            f"{self.flying} rounds of copies under way": case.flies and (self.flying is None or self.flying < 1),
            f"{self.stores} stores to shared memory": case.stores is not None and self.stores > case.stores,
            f"{self.start} instructions before the first copy": (self.start or 0) > START_BUDGET,
        }
        return [text for text, failed in checks.items() if failed]


def compile_case(case: Case, cc: int) -> Report:
    """Compile one case for a target and read its machine code.

    Raises:
        RuntimeError: where the disassembler of Triton's package does not know the target.
    """
    names = case.kernel.arg_names
    apart = {} if case.constants.get("AHEAD") else _APART
    given, chosen = options(case.kernel, case.how, case.fusion)
    known = {"PAIRS": FETCHED_PAIRS, **apart, **case.constants, **given}
    fixed = {name: known[name] for name in names if name in known}
    signature = {n: "constexpr" if n in fixed else case.signature[n] for n in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    constants = {(names.index(n),): value for n, value in fixed.items()}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", cc, 32), options=chosen)
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
    resident = min(_REGISTERS // (-(-registers // 8) * 8 * threads), THREADS[cc] // threads)
    if shared:
        resident = min(resident, SHARED[cc] * 1024 // (shared + 1024))
    loop, loops = main_loop(code), [_opcodes(text) for text in inner_loops(code)]
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
        fits=shared <= (SHARED[cc] - 1) * 1024,
        stores=sum(op.split(".")[0] in ("STS", "STSM") for op in opcodes.elements()),
        outside=len(_opcodes(code)) - sum(map(len, loops)),
        spills=sum(op.startswith(("LDL", "STL")) for ops in loops for op in ops),
    )


def _tool(name: str, *arguments: str) -> str:
    """Output of one of the CUDA tools that Triton's package carries."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    ran = subprocess.run([str(path), *arguments], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{name} failed: {(ran.stderr or ran.stdout).strip()[-400:]}")
    return ran.stdout


def main_loop(code: str) -> str:
    """The innermost loop that decodes: the one with most HFMA2.

    It is not found by its products: Blackwell's are issued by one thread, from code that lies outside the loop's text.
    """
    return max(inner_loops(code), key=lambda text: text.count("HFMA2"), default="")


def inner_loops(code: str) -> list[str]:
    """The loops without another inside (waiting loops aside)."""
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
    return [a[2] for a in loops if not any(b is not a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]


def _opcodes(code: str) -> list[str]:
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]+)", code)
