"""`down` for trellis codes: ``t = F z`` for every pair, weights decoded in registers.

A program owns a tile of pairs of one expert and one unit, whose rows are part of the sequences of its chain
(docs/format.md, "Tiles"), and walks the groups of I; the warps share the columns of a group. Everything else is as in
`down`: steps scale the sum over a group, and for few tokens the last program of a token adds its experts.
"""

import torch
import triton
import triton.language as tl

from .ahead import begin
from .arrival import arrive
from .digits import product
from .down import _finish_tokens, _present, down_reference
from .launch import FUSION, capability, launch_trellis_down, on, overlap
from .routing import pair_tile
from .trellis_codes import slices, tile_values
from .trellis_gate_up import Z_SCALE


@triton.jit(do_not_specialize=["T", "TILES", "E"])
def trellis_down_kernel(
    z_ptr, tiles_ptr, pairs_ptr, codes_ptr, steps_ptr, places_ptr, t_ptr,
    ids_ptr, p_ptr, bias_ptr, base_ptr, y_ptr, arrivals_ptr, T, TILES, E,
    TOP_K: tl.constexpr, R: tl.constexpr, I: tl.constexpr, BS: tl.constexpr, GS: tl.constexpr, WIDTHS: tl.constexpr,
    BM: tl.constexpr, SPREAD: tl.constexpr, JOINED: tl.constexpr, SUM: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_BASE: tl.constexpr, STAGES: tl.constexpr, PACK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (tile of pairs, unit in payload order): t [P, R'] from z [P, I], a sixteenth of it.

    codes: uint16. places: [E, units, 6], see `prepare`. JOINED: chains may have several units. SUM as in `down_kernel`.
    """
    begin(OVERLAP)
    UNITS: tl.constexpr = R // BS
    GROUPS: tl.constexpr = I // GS
    QUANTUM: tl.constexpr = BS * GS // 16  # of uint16
    SLICES: tl.constexpr = slices(GS // SPREAD)
    K: tl.constexpr = GS // SPREAD // SLICES
    program = tl.program_id(0)
    if program < TILES:
        e, token_pair = pair_tile(tiles_ptr, pairs_ptr, program, BM)
        if e >= 0:
            place = places_ptr + (e * UNITS + tl.program_id(1)) * 6
            unit, width, code = tl.load(place), tl.load(place + 1), tl.load(place + 2)
            units = tl.load(place + 3) if JOINED else 1
            number = tl.load(place + 4) if JOINED else 0
            row = tl.load(place + 5)
            n = tl.arange(0, BS)
            part = tl.arange(0, SPREAD)[:, None]
            k = part * (K * SLICES) + tl.arange(0, K)[None, :]
            pair = part * (K * SLICES // 2) + tl.arange(0, K // 2)[None, :]
            here = token_pair >= 0
            z = z_ptr + token_pair[None, None, :].to(tl.int64) * I + k[:, :, None]
            steps = steps_ptr + row.to(tl.int64) * BS + n
            acc = tl.zeros((SPREAD, BS, BM), tl.float32)
            for s in tl.static_range(len(WIDTHS)):
                rounds = tl.where(width == WIDTHS[s], GROUPS, 0)  # a loop of no rounds instead of a branch
                step = tl.load(steps, mask=n * 0 + rounds > 0, other=0.0)
                for g in tl.range(0, rounds, num_stages=STAGES):
                    tile = codes_ptr + (code + g * units * WIDTHS[s]).to(tl.int64) * QUANTUM
                    dot = tl.zeros((SPREAD, BS, BM), tl.float32)
                    for j in tl.static_range(SLICES):
                        values = tile_values(tile, pair + j * (K // 2), units, number, WIDTHS[s], BS, JOINED, PACK)
                        x = tl.load(z + (g * GS + j * K), mask=here[None, None, :], other=0.0)
                        dot = product(values.to(x.dtype), x, dot, PACK)
                    acc += dot * step.to(tl.float32)[None, :, None]
                    step = tl.load(steps + tl.minimum(g + 1, GROUPS - 1) * BS)  # the last round loads its own once more
            total = tl.sum(acc, 0) * (1 / Z_SCALE)
            direction = unit * BS + n
            t = t_ptr + token_pair[None, :].to(tl.int64) * R + direction[:, None]
            tl.store(t, total.to(t_ptr.dtype.element_ty), mask=here[None, :])
            if SUM:
                tokens = tl.where(here, token_pair // TOP_K, 0)
                before = arrive(arrivals_ptr + tokens * UNITS + unit, here)
                last = here & (before + 1 == _present(ids_ptr, tokens, here, E, TOP_K))
                if tl.max(last.to(tl.int32), 0) > 0:
                    _finish_tokens(
                        tokens, direction, last, t_ptr, ids_ptr, p_ptr, bias_ptr, base_ptr, y_ptr, E,
                        TOP_K, R, HAS_BIAS, HAS_BASE,
                    )  # fmt: skip
    elif SUM:
        tokens = (program - TILES) * BM + tl.arange(0, BM)
        n = tl.program_id(1) * BS + tl.arange(0, BS)
        alone = (tokens < T) & (_present(ids_ptr, tokens, tokens < T, E, TOP_K) == 0)
        _finish_tokens(
            tokens, n, alone, t_ptr, ids_ptr, p_ptr, bias_ptr, base_ptr, y_ptr, E, TOP_K, R, HAS_BIAS, HAS_BASE
        )


def _launch(
    z: torch.Tensor,
    tiles: torch.Tensor,
    pairs: torch.Tensor,
    codes: torch.Tensor,
    steps: torch.Tensor,
    places: torch.Tensor,
    t: torch.Tensor,
    widths: list[int],
    sizes: tuple[int, int, int, int],
    total: tuple[torch.Tensor | None, ...] = (None,) * 6,
) -> None:
    """Run the kernel; ``total``: ids, p, bias, base, y and arrivals where it adds the token's experts up."""
    block_size, group_size, tile, warps = sizes
    ids, _, bias, base, _, _ = total
    cc = capability(z.device)
    how = launch_trellis_down(tile, group_size, cc, warps)
    count, top_k = (0, 1) if ids is None else ids.shape
    programs = tiles.shape[0] + triton.cdiv(count, tile)
    with on(z.device):
        trellis_down_kernel[(programs, t.shape[1] // block_size)](
            z, tiles, pairs, codes.view(torch.uint16), steps, places, t, *total, count, tiles.shape[0], len(places),
            TOP_K=top_k, R=t.shape[1], I=z.shape[1], BS=block_size, GS=group_size, WIDTHS=tuple(widths),
            BM=tile, SPREAD=how.warps, JOINED=block_size < 128, SUM=ids is not None, HAS_BIAS=bias is not None,
            HAS_BASE=base is not None, STAGES=how.stages, PACK=how.pack, num_warps=how.warps, maxnreg=how.registers,
            **overlap(cc), **FUSION,
        )  # fmt: skip


@torch.library.custom_op("bitsmoe::trellis_down", mutates_args=())
def trellis_down(
    z: torch.Tensor,
    tiles: torch.Tensor,
    pairs: torch.Tensor,
    codes: torch.Tensor,
    steps: torch.Tensor,
    places: torch.Tensor,
    widths: list[int],
    block_size: int,
    group_size: int,
    pair_tile: int,
    warps: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """t ``[T k, R']`` of ``dtype``; rows of pairs whose id is outside ``[0, E)`` are not written.

    Args:
        z: ``[T k, I]`` contiguous, a sixteenth of it (`trellis_gate_up`).
        places: int32 ``[E, units, 6]`` (`prepare.PreparedSide.order` of the output side).
        warps: of a program (`launch.trellis_down_warps`); the others as in `trellis_gate_up.trellis_gate_up`.
    """
    t = z.new_empty(z.shape[0], places.shape[1] * block_size, dtype=dtype)
    if len(z):
        _launch(z, tiles, pairs, codes, steps, places, t, widths, (block_size, group_size, pair_tile, warps))
    return t


@trellis_down.register_fake
def _(
    z: torch.Tensor,
    tiles: torch.Tensor,
    pairs: torch.Tensor,
    codes: torch.Tensor,
    steps: torch.Tensor,
    places: torch.Tensor,
    widths: list[int],
    block_size: int,
    group_size: int,
    pair_tile: int,
    warps: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return z.new_empty(z.shape[0], places.shape[1] * block_size, dtype=dtype)


@torch.library.custom_op("bitsmoe::trellis_down_and_combine", mutates_args=("arrivals",))
def trellis_down_and_combine(
    z: torch.Tensor,
    tiles: torch.Tensor,
    pairs: torch.Tensor,
    arrivals: torch.Tensor,
    codes: torch.Tensor,
    steps: torch.Tensor,
    places: torch.Tensor,
    ids: torch.Tensor,
    p: torch.Tensor,
    bias: torch.Tensor | None,
    base: torch.Tensor | None,
    widths: list[int],
    block_size: int,
    group_size: int,
    pair_tile: int,
    warps: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``y = base + sum_j p_j (F[id_j] z_j + bias[id_j])``, ``[T, R']`` of ``dtype``; as `down.down_and_combine`.

    Args:
        z: as in `trellis_down`.
        arrivals: int32 zeros, ``T * R' / block_size``; not zeros afterwards.
        ids: ``[T, k]`` contiguous integers.
        p: ``[T, k]`` contiguous floats.
        bias: ``[E, R']`` or None.
        base: ``[T, R']`` or None; the others as in `trellis_down`.
    """
    directions = places.shape[1] * block_size
    y = z.new_empty(ids.shape[0], directions, dtype=dtype)
    if len(ids):
        t = torch.empty(z.shape[0], directions, dtype=torch.float32, device=z.device)
        sizes, total = (block_size, group_size, pair_tile, warps), (ids, p, bias, base, y, arrivals)
        _launch(z, tiles, pairs, codes, steps, places, t, widths, sizes, total)
    return y


@trellis_down_and_combine.register_fake
def _(
    z: torch.Tensor,
    tiles: torch.Tensor,
    pairs: torch.Tensor,
    arrivals: torch.Tensor,
    codes: torch.Tensor,
    steps: torch.Tensor,
    places: torch.Tensor,
    ids: torch.Tensor,
    p: torch.Tensor,
    bias: torch.Tensor | None,
    base: torch.Tensor | None,
    widths: list[int],
    block_size: int,
    group_size: int,
    pair_tile: int,
    warps: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return z.new_empty(ids.shape[0], places.shape[1] * block_size, dtype=dtype)


def trellis_down_reference(z: torch.Tensor, ids: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Oracle: `down_reference` of a z that comes as a sixteenth; factor ``[E, R', I]`` decoded."""
    return down_reference(z, ids, factor) / Z_SCALE.value
