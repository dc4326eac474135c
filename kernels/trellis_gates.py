"""The kernels of trellis codes as `compile_gates` checks them: what each is compiled for, and its budget."""

from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import triton

from bitsmoe_modifier.method.viterbi import PRELUDE

from .launch import Launch, trellis_rows
from .machine_code import Case
from .prepare import WIDTH_SETS
from .products import down_launch, gate_up_launch
from .trellis_encoder import encode_kernel
from .trellis_rounding import HOW, constants_of, round_chains_kernel, round_groups_kernel

#: Instructions per weight that the loop over the weights may spend, by width: 3.7 decode it. Gate_up has shorter loops.
BUDGET = {1: 5.0, 2: 5.0, 3: 5.4, 4: 5.4, 6: 5.5, 8: 5.5}
SHORT_BUDGET = {1: 5.6, 2: 5.6, 3: 6.0, 4: 6.0, 6: 6.1, 8: 6.1}
#: Instructions of a warp per weight of a sequence in the encoder's forward pass, by width.
ENCODER_BUDGET = {1: 67, 2: 65, 3: 86, 4: 101, 6: 130, 8: 99}
#: Prefill multiplies 32 tokens per weight: a generous budget.
PREFILL_BUDGET = 8.0

_INPUTS = {"tiles_ptr": "*i32", "pairs_ptr": "*i32", "codes_ptr": "*u16", "steps_ptr": "*bf16", "z_ptr": "*fp16"}
_INPUTS |= {"arrivals_ptr": "*i32", "P": "i32", "PARTS": "i32", "T": "i32", "TILES": "i32", "E": "i32", "EACH": "i32"}


def _case(
    name: str, kernel: triton.JITFunction, signature: dict[str, str], constants: dict[str, object], how: Launch
) -> Case:
    """A case of gate_up or down with its budget, and the programs wanted on a multiprocessor."""
    widths = cast(tuple[int, ...], constants["WIDTHS"])
    tile, block, group = (cast(int, constants[name]) for name in ("BM", "BS", "GS"))
    rows = cast(int, constants["BN" if "BN" in constants else "BR"])
    columns = min((block if "BN" in constants else group) // how.warps, how.columns)
    budget = BUDGET if columns > 16 else SHORT_BUDGET
    one, wide = len(widths) == 1, 1.0 if block == group == 128 else 1.6  # short rows share activations among few
    return Case(
        name, kernel, signature, constants, how,
        weights=rows * columns / 32 if one else 0,
        budget=(wide * budget[widths[0]] if tile <= 8 else PREFILL_BUDGET) if one else 0,
        programs=3 if tile <= 8 and how.warps <= 4 else 2 if how.warps <= 4 else 1,
        stack=16 if len(widths) > 3 or block < 128 or group < 128 else 0,
        flies=how.stages > 2,
        stores=4 if one else None,
    )  # fmt: skip


def _name(operation: str, widths: tuple[int, ...], tile: int, dtype: str, block: int, group: int, more: str) -> str:
    bits = ",".join(map(str, widths))
    where = (f", blocks of {block}" if block != 128 else "") + (f", groups of {group}" if group != block else "")
    return f"trellis {operation} {bits} bit, {tile} pairs, {dtype}{where}{more}"


def gate_up_case(
    cc: int,
    widths: tuple[int, ...],
    tile: int,
    r: int,
    i: int,
    dtype: str = "bf16",
    shared: bool = False,
    block: int = 128,
    group: int | None = None,
) -> Case:
    """One case; group: as the block unless given."""
    group = group or block
    rows = trellis_rows(tile, group, widths)
    kernel, how, share = gate_up_launch(tile, rows, block, widths, cc, trellis=True, shared=shared)
    constants: dict[str, object] = {
        "bias_ptr": None, "HAS_BIAS": False, "ACTIVATION": "silu", "LIMIT": None, "ALPHA": 1.0, "SHIFT": 0.0,
        "TOP_K": 8, "R": r, "I": i, "BS": block, "GS": group, "WIDTHS": widths, "BM": tile,
        "BN": rows, "SHARED": shared, "SPREAD": share,
    }  # fmt: skip
    if not shared:
        constants |= {"part_ptr": None, "arrivals_ptr": None}
    signature = _INPUTS | {"head_ptr": "*i32", "order_ptr": "*i32", "h_ptr": f"*{dtype}", "part_ptr": "*fp32"}
    signature |= {"gain": "fp32", "inverse_gain": "fp32"}
    name = _name("gate_up", widths, tile, dtype, block, group, ", shared" if shared else "")
    return _case(name, kernel, signature, constants, how)


def down_case(
    cc: int,
    widths: tuple[int, ...],
    tile: int,
    r: int,
    i: int,
    dtype: str = "bf16",
    block: int = 128,
    warps: int = 0,
    group: int | None = None,
    split: bool = False,
) -> Case:
    """One case; warps: 0 leaves them to the rules; group: as the block unless given; split: programs share groups."""
    group, total = group or block, tile <= 16
    kernel, how, share = down_launch(tile, trellis_rows(tile, block, widths), group, warps, cc, trellis=True)
    constants: dict[str, object] = {
        "bias_ptr": None, "base_ptr": None, "HAS_BIAS": False, "HAS_BASE": False, "SUM": total, "TOP_K": 8,
        "R": r, "I": i, "BS": block, "GS": group, "WIDTHS": widths, "BM": tile,
        "BR": trellis_rows(tile, block, widths), "SPREAD": share, "JOINED": block < 128, "SPLIT": split,
    }  # fmt: skip
    if not total:
        constants |= dict.fromkeys(("ids_ptr", "p_ptr", "y_ptr", "arrivals_ptr"))
    signature = _INPUTS | {"places_ptr": "*i32", "t_ptr": "*fp32" if total else f"*{dtype}", "ids_ptr": "*i64"}
    signature |= {"p_ptr": "*fp32", "y_ptr": f"*{dtype}"}
    more = (f", {how.warps} warps" if warps else "") + (", split" if split else "")
    name = _name("down", widths, tile, dtype, block, group, more)
    return _case(name, kernel, signature, constants, how)


def encoder_case(width: int) -> Case:
    """One case: a warp for each sequence, 256 windows at each of its weights."""
    signature = {"u_ptr": "*fp32", "g_ptr": "*fp32", "begin_ptr": "*i64", "length_ptr": "*i32", "values_ptr": "*fp32"}
    signature |= {"branches_ptr": "*u8", "out_ptr": "*u8", "steps": "i32"}
    constants: dict[str, object] = {"B": width, "PRELUDE": PRELUDE[width]}
    return Case(
        f"trellis encoder {width} bit", encode_kernel, signature, constants, Launch(warps=1, stages=1, pack=0),
        weights=1, budget=ENCODER_BUDGET[width], programs=24,
    )  # fmt: skip


def rounding_cases(widths: tuple[int, ...], length: int = 128) -> Iterator[Case]:
    """Gate and up, then down: a warp for each sequence of so many weights, through all columns of a block."""
    constants = constants_of(widths, length)
    pointers = dict.fromkeys(("branches_ptr", "windows_ptr"), "*u8")
    pointers |= {"begin_ptr": "*i64", "place_ptr": "*i64", "width_ptr": "*i32"}
    bits = ",".join(map(str, widths))
    kernels: dict[str, tuple[triton.JITFunction, dict[str, object]]] = {
        "groups": (round_groups_kernel, {"WEIGHTED": True}), "chains": (round_chains_kernel, {}),
    }  # fmt: skip
    for kind, (kernel, more) in kernels.items():
        signature = {n: pointers.get(n, "*fp32" if n.endswith("_ptr") else "i32") for n in kernel.arg_names}
        name = f"trellis rounding of {kind} {bits} bit"
        yield Case(name, kernel, signature, constants | more, HOW, programs=8)


def trellis_cases(cc: int, every: bool, r: int, i: int) -> Iterator[Case]:
    """The kernels to check for one target; ``every=False``: decode with widths 6, 4 and 2, and with all, only.

    Args:
        cc: the target.
        every: all widths, and the tiles of prefill.
        r: directions of the layer.
        i: I of the layer.
    """
    mixed = (6, 4, 2)
    for width in (1, 2, 3, 4, 6, 8) if every else (2,):
        yield gate_up_case(cc, (width,), 8, r, i, shared=True)
        yield down_case(cc, (width,), 8, r, i)
        yield encoder_case(width)
    yield from rounding_cases((1, 2, 3, 4, 6))
    yield gate_up_case(cc, mixed, 8, r, i, shared=True)
    yield down_case(cc, mixed, 8, r, i)
    yield down_case(cc, mixed, 8, r, i, split=True)  # as at one token
    # what layers of the default recipe are launched with, which have units of 1 and 3 bits
    yield gate_up_case(cc, WIDTH_SETS[-1], 8, r, i, shared=True)
    yield down_case(cc, WIDTH_SETS[-1], 8, r, i)
    if every:
        for tile in (16, 32):
            yield gate_up_case(cc, (2,), tile, r, i, shared=tile == 16)
            yield gate_up_case(cc, mixed, tile, r, i)
            # of 32 pairs it is the compiler that leaves two registers, before and after the loops, for a third program
            shared = gate_up_case(cc, mixed, tile, r, i, shared=True)
            yield shared if tile == 16 else replace(shared, stack=8)
            yield down_case(cc, (2,), tile, r, i)
            yield down_case(cc, mixed, tile, r, i)
        yield gate_up_case(cc, (2,), 8, r, i, "fp16", shared=True)
        yield gate_up_case(cc, WIDTH_SETS[-1], 16, r, i, shared=True)
        yield down_case(cc, WIDTH_SETS[-1], 16, r, i)
        yield gate_up_case(cc, mixed, 8, r, i, shared=True, block=64)
        yield down_case(cc, mixed, 8, r, i, block=64)


def trellis_shapes(cc: int, widths: tuple[int, ...], block: int, group: int, r: int, i: int) -> Iterator[Case]:
    """Every tile and number of warps that a block and a group may be launched with; arguments as of `trellis_cases`.

    Above 8 pairs programs share a tile where tiles are few; where they do not, more registers are needed.
    """
    for tile in (8, 16, 32):
        some = widths if tile <= 16 else WIDTH_SETS[0]  # layers with units of 1 or 3 bits have narrower tiles
        yield gate_up_case(cc, some, tile, r, i, shared=tile == 8, block=block, group=group)
        yield down_case(cc, some, tile, r, i, block=block, group=group)
    yield down_case(cc, widths, 8, r, i, block=block, group=group, split=True)
