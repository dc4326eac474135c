"""The kernels of trellis codes as `compile_gates` checks them: what each is compiled for, and its budget."""

from collections.abc import Iterator

from .launch import launch_trellis
from .trellis_down import trellis_down_kernel
from .trellis_gate_up import trellis_gate_up_kernel

#: Instructions per weight that the loop over the weights may spend, by width: 3.7 decode it.
BUDGET = {1: 4.5, 2: 4.5, 3: 4.9, 4: 4.9, 6: 5.0, 8: 5.0}
#: Prefill multiplies 32 tokens per weight: a generous budget.
PREFILL_BUDGET = 8.0

_INPUTS = {"tiles_ptr": "*i32", "pairs_ptr": "*i32", "codes_ptr": "*u16", "steps_ptr": "*fp16", "z_ptr": "*fp16"}
_INPUTS |= {"arrivals_ptr": "*i32", "P": "i32", "PARTS": "i32", "T": "i32", "TILES": "i32", "E": "i32"}


def _sizes(widths: tuple[int, ...], tile: int, block: int, how_warps: int) -> dict[str, object]:
    """Of a case: its loop's weights and budget, and the programs wanted on a multiprocessor."""
    one = len(widths) == 1 and block == 128
    return {
        "weights": block * block / (32 * how_warps) if one else 0,
        "budget": (BUDGET[widths[0]] if tile <= 8 else PREFILL_BUDGET) if one else 0,
        "programs": 3 if tile <= 8 else 2 if tile <= 16 else 1,
        "flies": tile <= 16,
        "direct": one,
    }


def _name(operation: str, widths: tuple[int, ...], tile: int, dtype: str, block: int, more: str) -> str:
    bits = ",".join(map(str, widths))
    where = f", blocks of {block}" if block != 128 else ""
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
) -> dict[str, object]:
    """The arguments of a `compile_gates.Case`."""
    how = launch_trellis(tile, block, cc)
    constants: dict[str, object] = {
        "bias_ptr": None, "HAS_BIAS": False, "ACTIVATION": "silu", "LIMIT": None, "ALPHA": 1.0, "SHIFT": 0.0,
        "TOP_K": 8, "R": r, "I": i, "BS": block, "GS": block, "WIDTHS": widths, "BM": tile, "SHARED": shared,
        "SPREAD": how.warps, "STAGES": how.stages, "PACK": how.pack,
    }  # fmt: skip
    if not shared:
        constants |= {"part_ptr": None, "arrivals_ptr": None}
    signature = _INPUTS | {"head_ptr": "*i32", "order_ptr": "*i32", "h_ptr": f"*{dtype}", "part_ptr": "*fp32"}
    signature |= {"gain": "fp32", "inverse_gain": "fp32"}
    return {
        "name": _name("gate_up", widths, tile, dtype, block, ", shared" if shared else ""),
        "kernel": trellis_gate_up_kernel, "signature": signature, "constants": constants, "how": how,
        **_sizes(widths, tile, block, how.warps),
    }  # fmt: skip


def down_case(
    cc: int,
    widths: tuple[int, ...],
    tile: int,
    r: int,
    i: int,
    dtype: str = "bf16",
    block: int = 128,
    warps: int | None = None,
) -> dict[str, object]:
    """The arguments of a `compile_gates.Case`."""
    total = tile <= 16
    how = launch_trellis(tile, block, cc, warps)
    constants: dict[str, object] = {
        "bias_ptr": None, "base_ptr": None, "HAS_BIAS": False, "HAS_BASE": False, "SUM": total, "TOP_K": 8,
        "R": r, "I": i, "BS": block, "GS": block, "WIDTHS": widths, "BM": tile, "SPREAD": how.warps,
        "JOINED": block < 128, "STAGES": how.stages, "PACK": how.pack,
    }  # fmt: skip
    if not total:
        constants |= dict.fromkeys(("ids_ptr", "p_ptr", "y_ptr", "arrivals_ptr"))
    signature = _INPUTS | {"places_ptr": "*i32", "t_ptr": "*fp32" if total else f"*{dtype}", "ids_ptr": "*i64"}
    signature |= {"p_ptr": "*fp32", "y_ptr": f"*{dtype}"}
    return {
        "name": _name("down", widths, tile, dtype, block, f", {how.warps} warps" if warps else ""),
        "kernel": trellis_down_kernel, "signature": signature, "constants": constants, "how": how,
        **_sizes(widths, tile, block, how.warps),
    }  # fmt: skip


def trellis_cases(cc: int, every: bool, r: int, i: int) -> Iterator[dict[str, object]]:
    """The kernels to check for one target; ``every=False``: decode with the default recipe's widths only.

    Args:
        cc: the target.
        every: all widths, and the tiles of prefill.
        r: directions of the layer.
        i: I of the layer.
    """
    mixed = (6, 4, 2)
    for width in (1, 2, 3, 4, 6, 8) if every else (2, 4):
        yield gate_up_case(cc, (width,), 8, r, i)
        yield down_case(cc, (width,), 8, r, i)
    yield gate_up_case(cc, mixed, 8, r, i, shared=True)
    yield down_case(cc, mixed, 8, r, i)
    if every:
        for tile in (16, 32):
            yield gate_up_case(cc, (2,), tile, r, i)
            yield gate_up_case(cc, mixed, tile, r, i)
            yield down_case(cc, (2,), tile, r, i)
            yield down_case(cc, mixed, tile, r, i)
        yield gate_up_case(cc, (2,), 8, r, i, "fp16")
        yield down_case(cc, (2,), 8, r, i, warps=8)
        yield gate_up_case(cc, (8, 6, 4, 3, 2, 1), 8, r, i)
        yield gate_up_case(cc, mixed, 8, r, i, block=64)
        yield down_case(cc, mixed, 8, r, i, block=64)
