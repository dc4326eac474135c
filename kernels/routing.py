"""Which pairs a program works on: pairs (token, choice) of one expert, gathered into tiles of BM.

Decode (few pairs): every pair has programs; each counts its expert's earlier pairs, and the one at every BM-th place
leads a tile of the next BM pairs while the others end. No sort and no extra launch. Prefill (many pairs): the pairs are
sorted by expert once and a static number of tiles is laid over them; tiles past the last one end at once.

Pair ``p`` is choice ``p % k`` of token ``p // k``. Ids outside ``[0, E)`` belong to no tile.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def pair_tile(ids_ptr, tiles_ptr, pairs_ptr, program, P, E, BM: tl.constexpr, PP: tl.constexpr, SORTED: tl.constexpr):
    """The expert of this program's tile (-1: nothing to do) and its pairs int32 ``[BM]`` (-1: empty place).

    ``ids_ptr`` [P], read by decode; ``tiles_ptr`` [tiles, 3] and ``pairs_ptr`` [P], read by prefill (`sort_pairs`).
    PP: a power of two, at least P (decode).
    """
    i = tl.arange(0, BM)
    if SORTED:
        e = tl.load(tiles_ptr + program * 3)
        place = tl.load(tiles_ptr + program * 3 + 1) + i
        pair = tl.load(pairs_ptr + place, mask=place < tl.load(tiles_ptr + program * 3 + 2), other=-1)
    else:
        q = tl.arange(0, PP)
        ids = tl.load(ids_ptr + q, mask=q < P, other=-1).to(tl.int32)
        e = tl.load(ids_ptr + program).to(tl.int32)
        same = (ids == e).to(tl.int32)
        mine = tl.sum(tl.where(q < program, same, 0), 0)
        nth = tl.cumsum(same, 0) - 1
        hit = (nth[None, :] == (mine + i)[:, None]) & (same[None, :] != 0)
        pair = tl.sum(tl.where(hit, q[None, :] + 1, 0), 1) - 1
        e = tl.where((e < E) & (mine % BM == 0), e, -1)
    return e, pair


def sort_pairs(top_k_index: torch.Tensor, num_experts: int, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles of at most ``tile`` pairs of one expert, for any routing, without waiting for the device.

    Args:
        top_k_index: ``[T, k]`` integers; those outside ``[0, num_experts)`` get no tile.
        num_experts: E.
        tile: BM.

    Returns:
        tiles int32 ``[P // tile + min(E, P), 3]``: expert (-1: unused), first and last + 1 place in ``pairs``;
        pairs int32 ``[P]``: the pairs by expert, in rising order within one.
    """
    ids = top_k_index.flatten().to(torch.int64)
    count, device = ids.numel(), ids.device
    ids = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    ordered, pairs = torch.sort(ids, stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(num_experts + 1, device=device))
    first, end = bounds[:-1], bounds[1:]
    tiles_until = ((end - first + tile - 1) // tile).cumsum(0)
    number = torch.arange(count // tile + min(num_experts, count), device=device)
    e = torch.searchsorted(tiles_until, number, right=True)
    used = e < num_experts
    e_safe = e.clamp(max=num_experts - 1)
    within = number - torch.where(e_safe > 0, tiles_until[e_safe - 1], 0)
    begin = first[e_safe] + within * tile
    stop = torch.minimum(begin + tile, end[e_safe])
    tiles = torch.stack([torch.where(used, e, -1), begin, stop], 1)
    return tiles.to(torch.int32), pairs.to(torch.int32)


def tiles_reference(top_k_index: torch.Tensor, num_experts: int, tile: int) -> list[tuple[int, list[int]]]:
    """Oracle of both ways: (expert, pairs) of every tile, by expert."""
    ids = top_k_index.flatten().tolist()
    found = []
    for e in range(num_experts):
        mine = [p for p, id_ in enumerate(ids) if id_ == e]
        found += [(e, mine[i : i + tile]) for i in range(0, len(mine), tile)]
    return found
