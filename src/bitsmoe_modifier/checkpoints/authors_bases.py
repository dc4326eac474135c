"""The shared bases in checkpoints of the BitsMoE authors, in both of their layouts.

Until 2026-09 a basis is a float16 matrix under its own name. Since 2026-10 it has 8 bits, in two tensors:

    NAME_qweight    int32 ``[K/16, 4N]``, codes of a matrix ``[K, N]`` in the order of the Marlin kernels
    NAME_scales     float16 ``[K/128, N]``, a scale per 128 rows and column, its columns in that order too

x @ W is what their runtime multiplies: K is the hidden size for ``shared_vh_*`` and the number of directions for
``shared_u_down``, so W is the transposed basis. A code u stands for (u − 128) · scale. The order is that of
IST-DASLab's Marlin kernel for 8 bits, as vLLM packs it: W is cut into tiles of 16 rows and 64 columns, of 1024 bytes,
row of tiles by row of tiles. In a tile, each of the 32 lanes of a warp finds its 32 codes side by side: for each of
four blocks of 16 columns the 2 × 4 codes that a tensor-core instruction wants of it, two columns eight apart, four rows
``2 (lane mod 4) + {0, 1, 8, 9}``; and the second and third of every four bytes are exchanged.
"""

from collections.abc import Mapping

import numpy as np
import torch

from ..errors import CheckpointError
from ..storage.shards import Stored

#: names of a layer's bases, of gate, up and down
BASES = ("shared_vh_gate_proj", "shared_vh_up_proj", "shared_u_down")

_ROWS, _COLUMNS, _GROUP = 16, 64, 128
#: the row of a fragment's codes, by lane modulo 4: two neighbours, and the same eight further down
_LANE_ROWS = (0, 1, 8, 9)
#: in a kernel's order of eight bytes' halves: which of four neighbours stands where
_INTERLEAVED = (0, 2, 1, 3)
#: columns of 32 that stand side by side where there is one group of rows only, for the first of four lanes
_SINGLE_COLUMNS = (0, 1, 8, 9, 16, 17, 24, 25)


def tile_order() -> np.ndarray:
    """Where a tile's codes come from: for every byte in stored order, its place ``row · 64 + column``, ``[1024]``."""
    places = [
        (2 * (lane % 4) + row) * _COLUMNS + 16 * block + 8 * half + lane // 4
        for lane in range(32)
        for block in range(4)
        for half in (0, 1)
        for row in _LANE_ROWS
    ]
    return np.array(places).reshape(-1, 4)[:, _INTERLEAVED].reshape(-1)


def scale_order(groups: int) -> np.ndarray:
    """The column that every stored scale belongs to, within 64 columns; 32 where there is one group of rows only."""
    if groups > 1:
        return np.arange(64).reshape(8, 8).T.reshape(-1)
    return np.array([2 * lane + column for lane in range(4) for column in _SINGLE_COLUMNS])


def decode_marlin(codes: torch.Tensor, scales: torch.Tensor, where: str) -> torch.Tensor:
    """A matrix of 8 bits in Marlin order.

    Args:
        codes: int32 ``[K/16, 4N]``.
        scales: float16 ``[K/128, N]``.
        where: names the matrix in messages.

    Returns:
        float32 ``[K, N]``: products of small integers and float16 numbers, exact.

    Raises:
        CheckpointError: when shapes or dtypes are not those of the layout.
    """
    if codes.dtype is not torch.int32 or scales.dtype is not torch.float16 or codes.ndim != 2 or scales.ndim != 2:
        raise CheckpointError(
            f"{where}: {codes.dtype} {tuple(codes.shape)} with scales {scales.dtype} {tuple(scales.shape)}, expected "
            "int32 and float16 matrices; this layout is newer than what is read here"
        )
    groups, columns = scales.shape
    rows = groups * _GROUP
    if not groups or not columns or columns % _COLUMNS or tuple(codes.shape) != (rows // _ROWS, 4 * columns):
        raise CheckpointError(
            f"{where}: codes {tuple(codes.shape)} and scales {tuple(scales.shape)} do not fit each other in tiles of "
            f"{_ROWS} × {_COLUMNS} and groups of {_GROUP} rows; the checkpoint is damaged"
        )
    stored = codes.contiguous().view(torch.uint8).view(rows // _ROWS, columns // _COLUMNS, _ROWS * _COLUMNS)
    tiles = torch.empty_like(stored)
    tiles[..., torch.from_numpy(tile_order())] = stored
    whole = tiles.view(rows // _ROWS, columns // _COLUMNS, _ROWS, _COLUMNS).transpose(1, 2).reshape(rows, columns)
    order = torch.from_numpy(scale_order(groups))
    blocks = scales.float().view(groups, -1, len(order))
    sorted_scales = torch.empty_like(blocks)
    sorted_scales[..., order] = blocks
    return (whole.float() - 128) * sorted_scales.view(groups, columns).repeat_interleave(_GROUP, 0)


def layers_with_bases(found: Mapping[str, Stored]) -> list[str]:
    """Names of the modules that have shared bases, in whichever layout."""
    ends = (f".{BASES[0]}", f".{BASES[0]}_qweight")
    return sorted({key.removesuffix(end) for key in found for end in ends if key.endswith(end)})


def read_basis(found: Mapping[str, Stored], name: str) -> tuple[torch.Tensor, set[str]]:
    """A basis as its experts use it, and the tensors that it came from.

    Args:
        found: the checkpoint's tensors.
        name: of the basis, with its module's.

    Returns:
        float32: ``[R, H]`` for gate and up, ``[H, R]`` for down.

    Raises:
        CheckpointError: naming what is missing or unknown.
    """
    codes, scales = f"{name}_qweight", f"{name}_scales"
    plain = found.get(name)
    if codes in found:
        if scales not in found:
            raise CheckpointError(f"{scales}: missing; fetch the checkpoint again")
        # beside the new tensors an empty one may have been left under the old name
        used = {codes, scales} | ({name} if plain is not None and 0 in plain.shape else set())
        return decode_marlin(found[codes].read(), found[scales].read(), name).T.contiguous(), used
    if plain is None or plain.dtype is not torch.float16 or 0 in plain.shape:
        raise CheckpointError(f"{name}: missing, or neither float16 nor of 8 bits, which is all that is read here")
    return plain.read().float(), {name}
