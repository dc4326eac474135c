"""Launch sizes: choices that depend on the batch and the machine, not on the mathematics.

Few tokens: two warps, each decoding 64 rows of weights for 8 tokens with `mma.sync`, the same code on every GPU since
sm_80. Many tokens: eight warps, with the widest tensor-core instruction that the GPU has.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
import triton

#: Pairs (tokens × experts per token) up to which every pair has programs; beyond it the pairs are sorted.
DECODE_PAIRS = 512

#: Tokens up to which a basis is decoded inside its product.
BASIS_TOKENS = 64

#: Programs of two warps that fill a large GPU: four on each of 132 multiprocessors.
PROGRAMS_WANTED = 528


@dataclass(frozen=True)
class Launch:
    """How one operation is launched.

    Attributes:
        warps: per program.
        stages: of the software pipeline: loads in flight.
        pack: bytes that one instance of the decoding assembly converts (`digits.digit_values`); 0 interprets.
        registers: per thread at most; None leaves it to the compiler.
    """

    warps: int
    stages: int
    pack: int
    registers: int | None = None


def interpreting() -> bool:
    """Whether the kernels run in Triton's interpreter (TRITON_INTERPRET=1 before triton was imported)."""
    return bool(triton.knobs.runtime.interpret)


def capability(device: torch.device) -> int:
    """10 × major + minor of the GPU; 0 in the interpreter."""
    if interpreting():
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch(tile: int, rows: int, cc: int) -> Launch:
    """Warps, stages and packing of gate_up, and of down but for its registers.

    Args:
        tile: BM, pairs of a tile.
        rows: BN or BR, weight rows of a program; every 16 rows feed one warp.
        cc: `capability`.
    """
    # Blackwell's own products take weights through tensor memory, which pays for wide tiles only
    wanted = 2 if tile <= (16 if cc >= 100 else 8) else 4 if tile <= 16 else 8
    warps = max(1, min(wanted, rows // 16))
    # Hopper's warpgroup products (4 warps and more, 64 rows and more) leave two bytes side by side in a thread
    pack = 0 if cc == 0 else 2 if 90 <= cc < 100 and warps >= 4 and rows >= 64 else 4
    return Launch(warps, 3 if tile <= 16 else 2, pack)


def launch_down(tile: int, rows: int, cc: int) -> Launch:
    """`launch` for down: at two warps the compiler aims for 96 registers by itself and spills for want of a few."""
    how = launch(tile, rows, cc)
    return replace(how, registers=144) if tile <= 8 else how


def on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current GPU; make it the tensors' own (models spread over several GPUs)."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def power_of_two(count: int) -> int:
    """The smallest power of two ≥ ``count``, at least 16."""
    return max(16, triton.next_power_of_2(count))


def basis_stages(bits: int) -> int:
    """Loads in flight of the basis kernel: fewer for 8 bits, whose four would not fit the registers."""
    return 3 if bits == 8 else 4


def decode_tile(pairs: int, experts: int) -> int:
    """BM of decode: 8, or 16 where experts have more than 8 pairs on average."""
    return 8 if pairs <= 8 * experts else 16


def prefill_tile(pairs: int, experts: int) -> int:
    """BM of prefill: about the pairs of an expert, so that most tiles are full; a wider tile decodes weights less
    often."""
    return min(64, power_of_two(pairs // experts))


def gate_up_tile(programs: int, columns: int, group: int, units: int) -> tuple[int, int]:
    """(BN, SPLIT) of gate_up: wide tiles share the scaled activations among more columns, many programs fill the GPU.

    Args:
        programs: tiles of pairs, at most.
        columns: I.
        group: columns that share a step; BN divides it.
        units: directions / block_size of one matrix; SPLIT deals them out.
    """
    bn = min(128, group)
    grid = programs * (columns // bn)
    split = 1
    if grid < PROGRAMS_WANTED:  # a split also separates gate from up: 2 * split as many programs
        while split < 8 and 2 * split <= units and grid * 2 * split < PROGRAMS_WANTED:
            split *= 2
    return bn, split


def down_tile(programs: int, directions: int, block: int, tile: int) -> int:
    """BR of down: a divisor of the unit, smaller where few programs would leave most of the GPU idle."""
    br = min(64 if tile <= 8 else 128, block)  # two warps keep 64 rows of digits in registers
    while br > 32 and programs * (directions // br) < PROGRAMS_WANTED:
        br //= 2
    return br
