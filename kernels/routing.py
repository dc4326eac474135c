"""Which pairs a program works on: pairs (token, choice) of one expert, gathered into tiles of BM.

Pair ``p`` is choice ``p % k`` of token ``p // k``. Ids outside ``[0, E)`` belong to no tile. The tiles are written
once, for all kernels of a layer and for any number of pairs, by one program per expert: it counts the pairs of all
experts, so that it knows where its own begin, and writes them. Nothing depends on what another program does, and the
number of tiles that are laid out depends on shapes only; those past the last one end at once. In a decoding step these
programs are part of the launch that multiplies by the input basis (`basis.py`).
"""

import torch
import triton
import triton.language as tl

from .ahead import arguments, constants, fetch
from .launch import Launch, power_of_two
from .launcher import run


@triton.jit
def pair_tile(tiles_ptr, pairs_ptr, program, BM: tl.constexpr):
    """The expert of this program's tile (-1: nothing to do) and its pairs int32 ``[BM]`` (-1: empty place).

    ``tiles_ptr`` [tiles, 3] and ``pairs_ptr`` [P] as `route` returns them.
    """
    e = tl.load(tiles_ptr + program * 3)
    place = tl.load(tiles_ptr + program * 3 + 1) + tl.arange(0, BM)
    pair = tl.load(pairs_ptr + place, mask=place < tl.load(tiles_ptr + program * 3 + 2), other=-1)
    return e, pair


@triton.jit
def _chosen(ids_ptr, q, P, E):
    """Ids of the pairs q; E where there is no such pair or no such expert."""
    ids = tl.load(ids_ptr + q, mask=q < P, other=-1).to(tl.int32)
    return tl.where((ids >= 0) & (ids < E), ids, E)


@triton.jit
def route_expert(
    e, ids_ptr, tiles_ptr, pairs_ptr, arrivals_ptr, P, E, TILES, ARRIVALS,
    BM: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Write the tiles and the pairs of expert e, and its share of the zeros in ``arrivals``.

    CHUNK: pairs looked at together. BINS: a power of two above E.
    """
    q = tl.arange(0, CHUNK)
    expert = tl.arange(0, BINS)
    count = tl.zeros((BINS,), tl.int32)
    for start in tl.range(0, P, CHUNK):
        count += tl.histogram(_chosen(ids_ptr, start + q, P, E), BINS)
    before = expert < e
    first = tl.sum(tl.where(before, count, 0), 0)
    mine = tl.sum(tl.where(expert == e, count, 0), 0)
    tile = tl.sum(tl.where(before, tl.cdiv(count, BM), 0), 0)
    used = tile + tl.cdiv(mine, BM)
    while tile < used:
        tl.store(tiles_ptr + tile * 3, e)
        tl.store(tiles_ptr + tile * 3 + 1, first)
        tl.store(tiles_ptr + tile * 3 + 2, first + tl.minimum(mine, BM))
        first += BM
        mine -= BM
        tile += 1
    if e == E - 1:
        for start in tl.range(used * 3, TILES * 3, CHUNK):  # expert -1, no places
            tl.store(tiles_ptr + start + q, tl.where((start + q) % 3 == 0, -1, 0), mask=start + q < TILES * 3)
    for start in tl.range(e * CHUNK, ARRIVALS, E * CHUNK):
        tl.store(arrivals_ptr + start + q, 0, mask=start + q < ARRIVALS)
    place = tl.sum(tl.where(before, count, 0), 0)
    end = place + tl.sum(tl.where(expert == e, count, 0), 0)
    start = 0
    while place < end:
        hit = (_chosen(ids_ptr, start + q, P, E) == e).to(tl.int32)
        tl.store(pairs_ptr + place + tl.cumsum(hit, 0) - 1, start + q, mask=hit != 0)
        place += tl.sum(hit, 0)
        start += CHUNK


@triton.jit(do_not_specialize=["P", "E", "TILES", "ARRIVALS"])
def route_kernel(
    ids_ptr, tiles_ptr, pairs_ptr, arrivals_ptr, P, E, TILES, ARRIVALS,
    spans_ptr, codes_in_ptr, steps_in_ptr, head_in_ptr, order_in_ptr,
    codes_out_ptr, steps_out_ptr, head_out_ptr, order_out_ptr,
    BM: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr,
    AHEAD: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Program (expert); AHEAD: it also asks for its share of the weights (`ahead.fetch`)."""
    e = tl.program_id(0)
    if AHEAD:
        fetch(
            ids_ptr, spans_ptr, codes_in_ptr, steps_in_ptr, head_in_ptr, order_in_ptr,
            codes_out_ptr, steps_out_ptr, head_out_ptr, order_out_ptr, e, E, P, E, PAIRS,
        )  # fmt: skip
    route_expert(e, ids_ptr, tiles_ptr, pairs_ptr, arrivals_ptr, P, E, TILES, ARRIVALS, BM, CHUNK, BINS)


def tile_count(pairs: int, experts: int, tile: int) -> int:
    """Tiles that are laid out for any choice of experts: enough, and known from shapes."""
    return min(pairs, pairs // tile + min(experts, pairs))


def route_arguments(pairs: int, experts: int) -> dict[str, int]:
    """Constants of `route_expert`; two sizes of CHUNK, so that few kernels are compiled."""
    return {"CHUNK": 128 if pairs <= 128 else 1024, "BINS": power_of_two(experts + 1)}


def routed_tensors(ids: torch.Tensor, experts: int, tile: int, arrivals: int) -> list[torch.Tensor]:
    """Uninitialized (tiles int32 ``[tiles, 3]``, pairs int32 ``[P]``, arrivals int32 ``[arrivals]``)."""
    shapes = (tile_count(ids.numel(), experts, tile), 3), (ids.numel(),), (arrivals,)
    return [ids.new_empty(shape, dtype=torch.int32) for shape in shapes]


@torch.library.custom_op("bitsmoe::route", mutates_args=())
def route(
    ids: torch.Tensor,
    experts: int,
    tile: int,
    arrivals: int,
    ahead: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tiles of at most ``tile`` pairs of one expert, for any routing, without waiting for the device.

    Args:
        ids: ``[T, k]`` contiguous integers; those outside ``[0, experts)`` get no tile.
        experts: E.
        tile: BM.
        arrivals: how many zeros to return as well.
        ahead: spans (`prepare.line_spans`) and the eight payloads that are fetched ahead (`ahead.py`); empty: none.

    Returns:
        tiles int32 ``[tile_count, 3]``: expert (-1: unused), first and last + 1 place in ``pairs``; pairs int32
        ``[P]``: the pairs by expert, in rising order within one; arrivals int32 ``[arrivals]``: zeros.
    """
    tiles, pairs, zeros = routed_tensors(ids, experts, tile, arrivals)
    if len(pairs):
        run(
            route_kernel,
            (experts,),
            (ids, tiles, pairs, zeros, len(pairs), experts, len(tiles), arrivals, *arguments(ahead)),
            Launch(warps=4, stages=1, pack=0),
            ids.device,
            {"BM": tile, **route_arguments(len(pairs), experts), **constants(ahead)},
        )
    return tiles, pairs, zeros


@route.register_fake
def _(
    ids: torch.Tensor, experts: int, tile: int, arrivals: int, ahead: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tiles, pairs, zeros = routed_tensors(ids, experts, tile, arrivals)
    return tiles, pairs, zeros


def tiles_reference(top_k_index: torch.Tensor, num_experts: int, tile: int) -> list[tuple[int, list[int]]]:
    """Oracle: (expert, pairs) of every tile, by expert."""
    ids = top_k_index.flatten().tolist()
    found = []
    for e in range(num_experts):
        mine = [p for p, id_ in enumerate(ids) if id_ == e]
        found += [(e, mine[i : i + tile]) for i in range(0, len(mine), tile)]
    return found
