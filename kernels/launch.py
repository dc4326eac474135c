"""Launch sizes: choices that depend on the batch and the machine, not on the mathematics.

Few tokens: two warps, each decoding 64 rows of weights for 8 tokens with `mma.sync`, the same code on every GPU since
sm_80. Many tokens: eight warps, with the widest tensor-core instruction that the GPU has.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace

import torch
import triton

from bitsmoe_modifier.storage.factors import WRITTEN_BYTES

from .prepare import PROCESSORS, SHARED_BYTES

#: Pairs (tokens × experts per token) up to which every pair has programs; beyond it the pairs are sorted.
DECODE_PAIRS = 512

#: Tokens up to which a basis is decoded inside its product.
BASIS_TOKENS = 64

#: Programs of two warps that fill a large GPU: eight on each of 132 multiprocessors.
PROGRAMS_WANTED = 1056

#: Warps of down for each multiprocessor that its groups are split for, those of absent units among them: on an H100 6
#: programs were fastest at one token of a layer of Qwen3-30B-A3B, 3 at two, 2 at four and 1 or 2 at eight.
WARPS_WANTED = 15

#: Weights of trellis codes that a warp decodes in a round of down's loop, and of gate_up's for up to 16 pairs. On an
#: H100 half as many took up to 7 % longer in down, twice as many 6 % longer in gate_up, all of a tile 15 to 25 %.
ROUND_WEIGHTS, ROUND_WEIGHTS_IN = 4096, 2048

#: Programs of gate_up for each multiprocessor, up to which more of them share a tile of few pairs with trellis codes.
GATE_UP_PROGRAMS = 4.25

#: With scalar codes: up to which 4 share a tile, and up to which more of them do.
SCALAR_PROGRAMS, MORE_SCALAR_PROGRAMS = 16, 5

#: Pairs for each expert from which factors are written out and then multiplied (`decoded.py`), for trellis codes and
#: for scalar ones. On an H200 both ways took as long at 52 pairs and at 206.
WRITTEN_PAIRS = {True: 56, False: 208}

#: Weights that a warp of down decodes at least where its groups are split, beside what beginning and ending cost it.
SPLIT_WEIGHTS = 8192


def _known_options() -> set[str]:
    """What this Triton takes at a launch on an NVIDIA GPU."""
    try:
        from triton.backends.nvidia.compiler import CUDAOptions
    except ImportError:
        return set()
    return {field.name for field in fields(CUDAOptions)}


#: For every launch: a product and a sum become one instruction. Triton's default changes from version to version.
FUSION: dict[str, bool] = {"enable_fp_fusion": True} if "enable_fp_fusion" in _known_options() else {}
#: For what shall round as PyTorch does.
NO_FUSION: dict[str, bool] = dict.fromkeys(FUSION, False)


@dataclass(frozen=True)
class Launch:
    """How one operation is launched.

    Attributes:
        warps: per program.
        stages: of the software pipeline: loads in flight.
        pack: bytes that one instance of the decoding assembly converts (`digits.digit_values`); 0 interprets.
        registers: per thread at most; None leaves it to the compiler.
        columns: of trellis codes: what a warp decodes in a round of its loop. Few cost more instructions for a weight,
            and less of what decoding waited for on a GPU: a short loop is fetched once where instructions came too
            late, and leaves registers for more programs.
    """

    warps: int
    stages: int
    pack: int
    registers: int | None = None
    columns: int = 32


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
    """Warps, stages, packing and registers of gate_up, and of down but for its registers.

    Args:
        tile: BM, pairs of a tile.
        rows: BN or BR, weight rows of a program; every 16 rows feed one warp.
        cc: `capability`.
    """
    # the large Blackwells' own products take weights through tensor memory, which pays for wide tiles only
    wanted = 2 if tile <= (16 if 100 <= cc < 120 else 8) else 4 if tile <= 16 else 8
    warps = max(1, min(wanted, rows // 16))
    # Hopper's warpgroup products (4 warps and more, 64 rows and more) leave two bytes side by side in a thread
    pack = 0 if cc == 0 else 2 if 90 <= cc < 100 and warps >= 4 and rows >= 64 else 4
    # without a bound the compiler aims for fewer registers by itself and spills for want of a few
    return Launch(warps, _stages(tile, cc), pack, 200 if tile <= 8 else None)


def _stages(tile: int, cc: int) -> int:
    """Of the pipeline of scalar codes: 3 keep a round of copies in flight. In wide tiles, with the activations' copies,
    that takes more than the 99 KiB of sm_86, sm_89 and sm_120, and spills on sm_80."""
    return 3 if tile <= 16 or 90 <= cc < 120 else 2


def spread(tile: int, block: int, warps: int, widths: Iterable[int]) -> int:
    """How many parts the directions of a unit are cut into for as many warps of gate_up.

    Warps that share the columns each scale the same activations; those that share the directions scale their own, for
    which half a row of every plane must be long enough: not of 1-bit digits (1 and 3 bits).
    """
    return 2 if tile <= 16 and warps == 2 and block == 128 and not {1, 3} & set(widths) else 1


def launch_down(tile: int, rows: int, cc: int) -> Launch:
    """`launch` for down."""
    how = launch(tile, rows, cc)
    return replace(how, registers=168) if tile <= 8 else how


def round_columns(rows: int, weights: int) -> int:
    """Columns of a tile of so many rows that make about so many weights: 16 or 32, for 64 spill where units of 64 rows
    have 1 or 3 bits."""
    return 16 if rows * 32 > weights else 32


def trellis_warps(tile: int, rows: int, columns: int) -> int:
    """Warps of a program with trellis codes that share the columns of a tile of codes: one for small tiles, whose
    weights would be too few beside what a round costs every warp.

    Args:
        tile: BM, pairs of a tile.
        rows: of a tile of codes that the program takes.
        columns: of it.
    """
    if tile > 8:
        return 4
    return 1 if rows * columns <= 64 * 64 else 2


def launch_trellis(tile: int, rows: int, columns: int, cc: int, warps: int | None = None) -> Launch:
    """`launch` for trellis codes, whose warps share the columns of a tile of codes and not its rows.

    Args:
        tile: BM, pairs of a tile.
        rows: of a tile of codes that the program takes.
        columns: of it; 16 or more go to a warp.
        cc: `capability`.
        warps: that are wanted; None: `trellis_warps`.
    """
    wanted = warps or trellis_warps(tile, rows, columns)
    # without a bound, and with one much lower, the compiler spills
    registers = 216 if tile <= 8 else None
    # of few tokens rounds are short and loops end soon: a third stage took 2 to 8 % longer on an H100
    how = Launch(max(1, min(wanted, columns // 16)), 2 if tile <= 8 else 3, 0 if cc == 0 else 2, registers)
    return replace(how, columns=round_columns(rows, ROUND_WEIGHTS))


def launch_trellis_down(tile: int, rows: int, columns: int, cc: int, warps: int | None = None) -> Launch:
    """`launch_trellis` for down."""
    how = launch_trellis(tile, rows, columns, cc, warps)
    # three programs of four warps share a multiprocessor
    return replace(how, registers=168 if how.warps == 4 else 200) if tile <= 8 else how


def swaps(tile: int, br: int, cc: int) -> bool:
    """Whether down takes z with the middle two of every four columns exchanged (`digits.swapped`)."""
    return launch_down(tile, br, cc).pack != 2


def on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current GPU; make it the tensors' own (models spread over several GPUs)."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def power_of_two(count: int) -> int:
    """The smallest power of two ≥ ``count``, at least 16."""
    return max(16, triton.next_power_of_2(count))


def basis_stages(bits: int, group: int, tokens: int) -> int:
    """Loads in flight of the basis kernel: fewer for 8 bits, whose four would not fit the registers, and where the
    shared memory of small GPUs is too short for more.

    Args:
        bits: of the basis.
        group: elements of a row that a warp reads in a round.
        tokens: of a tile.
    """
    stages = 3 if bits == 8 else 4
    round_bytes = 4 * group * (16 * bits // 8 + 2 * tokens)  # four warps; 16 rows of codes, tokens of 16 bits
    return max(2, min(stages, SHARED_BYTES // round_bytes))


def decode_tile(pairs: int, experts: int) -> int:
    """BM of decode: 8, or 16 where experts have more than 8 pairs on average."""
    return 8 if pairs <= 8 * experts else 16


def prefill_tile(pairs: int, experts: int) -> int:
    """BM of prefill: about the pairs of an expert, so that most tiles are full; a wider tile decodes weights less
    often."""
    return min(64, power_of_two(pairs // experts))


def prefill_rows(size: int, cc: int) -> int:
    """Rows of weights that a program of many tokens takes with scalar codes, of a group's columns or a unit's
    directions. 64, for four warps: two programs share a multiprocessor, and one decodes while the other waits. On GPUs
    other than Hopper and the large Blackwells that spills: 128, eight warps.
    """
    return min(64 if 90 <= cc < 120 else 128, size)


def trellis_rows(tile: int, size: int, widths: Iterable[int]) -> int:
    """Rows of a tile of codes that a program takes: half of 128 for tiles of more than 16 pairs, since a warp's sums
    for all of them would spill, and all where half a segment is no whole word (1 and 3 bits).

    Args:
        tile: BM, pairs of a tile.
        size: rows of the tile of codes: columns of a group, or directions of a unit.
        widths: that occur.
    """
    half = tile > 16 and size == 128 and all(b * size // 2 % 128 == 0 for b in widths)
    return size // 2 if half else size


def trellis_prefill_tile(pairs: int, experts: int, widths: Iterable[int]) -> int:
    """`prefill_tile` for trellis codes: a warp's sums for 64 rows and 32 pairs, or 128 and 16, are what registers
    hold.
    """
    most = 32 if trellis_rows(32, 128, widths) == 64 else 16
    return min(most, prefill_tile(pairs, experts))


def written_experts(pairs: int, experts: int, expert_bytes: int, trellis: bool) -> int:
    """Experts whose factors are written out at a time, about `WRITTEN_BYTES`; 0: none, they are decoded in registers.

    Args:
        pairs: tokens × experts per token.
        experts: E.
        expert_bytes: of an expert's gate and up in 16 bits.
        trellis: the family of codes.
    """
    if pairs < WRITTEN_PAIRS[trellis] * experts:
        return 0
    parts = triton.cdiv(experts, max(1, WRITTEN_BYTES // expert_bytes))
    return triton.cdiv(experts, parts)


def launch_grouped(tile: int, gated: bool, cc: int) -> tuple[int, int, Launch]:
    """(columns of the result and terms of a round of a program, launch) of a product with factors in 16 bits.

    Args:
        tile: BM, pairs of a tile: 64 or 128.
        gated: two products in one program.
        cc: `capability`.
    """
    large = 90 <= cc < 120  # whose products take both operands from shared memory; elsewhere 128 columns spill
    columns = 128 if large and (tile == 128 or not gated) else 64
    return columns, 64, Launch(tile // 16, 3, 4 if cc else 0)


def grouped_tile(pairs: int, experts: int) -> int:
    """BM, pairs of a tile of such a product: 64 or 128.

    Args:
        pairs: tokens × experts per token.
        experts: E.
    """
    return 128 if pairs >= 96 * experts else 64


def expected_tiles(pairs: int, experts: int, tile: int) -> int:
    """Tiles that have pairs, about, where tokens choose experts at random: every expert reached has one or more."""
    reached = experts * (1 - (1 - 1 / experts) ** pairs)
    return max(1, round(max(reached, pairs / tile)))


def gate_up_tile(
    tiles: int, columns: int, group: int, units: int, short: bool, processors: int = PROCESSORS
) -> tuple[int, int]:
    """(BN, PARTS) of gate_up: wide tiles share the scaled activations among more columns, many programs fill the GPU.

    Scalar codes: on an H200 a layer of Qwen3-30B-A3B was fastest with 8 parts at one token, 6 to 8 at two, 4 at four,
    eight and sixteen (2 took 3 to 22 % longer), 2 beyond; with one 24 % longer at 64.

    Short loops of trellis codes: on an H100 a layer of Qwen3-30B-A3B was fastest with 8 to 12 parts at one token, 6 at
    two and four, 4 to 6 at eight and 2 to 4 beyond (4 at 64, by 2 %); a program that does both matrices keeps twice as
    many sums, which took 30 % longer at 64.

    Args:
        tiles: of pairs that have any (`expected_tiles`).
        columns: I.
        group: columns that share a step; BN divides it.
        units: directions / block_size of one matrix, which the programs of a matrix share.
        short: tiles of few pairs with trellis codes.
        processors: multiprocessors of the GPU.

    Returns:
        BN; and programs that share a tile: 1 does gate and up, 2 one of them each, more of them a part of one, for
        which a matrix has units enough if none is absent.
    """
    bn = min(128, group)
    grid = tiles * (columns // bn)
    if short:
        parts, more, most = min(4, 2 * units), range(6, 17, 2), int(GATE_UP_PROGRAMS * processors)
    else:
        few = 4 * grid <= SCALAR_PROGRAMS * processors
        parts = min(4, 2 * units) if few else 2 if 4 * grid < 3 * PROGRAMS_WANTED else 1
        more, most = (8, 16) if few else (), MORE_SCALAR_PROGRAMS * processors
    return bn, max([parts, *(n for n in more if n <= 2 * units and grid * n <= most)])


def down_tile(tiles: int, directions: int, block: int) -> int:
    """BR of down: a divisor of the unit, smaller where few programs would leave most of the GPU idle."""
    br = min(128, block)
    while br > 32 and tiles * (directions // br) < PROGRAMS_WANTED // 2:
        br //= 2
    return br


def down_splits(tiles: int, blocks: int, groups: int, weights: int, warps: int, processors: int = PROCESSORS) -> int:
    """Programs of down that share a tile of pairs and a block of directions, each for a part of the groups: 1 where
    tiles and blocks fill the GPU, as from some 8 tokens on.

    Args:
        tiles: of pairs that have any (`expected_tiles`).
        blocks: of directions that a program has: R' / BR.
        groups: of a matrix's columns: I / group size.
        weights: of a group and a block.
        warps: of a program.
        processors: multiprocessors of the GPU.

    Returns:
        from 1 to ``groups``; each takes the same number of groups, the last perhaps fewer.
    """
    splits, wanted = 1, WARPS_WANTED * processors
    while tiles * blocks * warps * (splits + 1) <= wanted and splits < groups:
        each = -(-groups // (splits + 1))
        if each * weights < warps * SPLIT_WEIGHTS:
            break
        splits += 1
    return even_splits(splits, groups)


def even_splits(splits: int, groups: int) -> int:
    """How many of ``splits`` programs have work where each takes as many of the groups: 4 of 6 groups are 3 of 2."""
    return -(-groups // -(-groups // splits))
