"""Checkpoints of the BitsMoE authors' own runtime, decoded to dense weights.

Their layout, learned from their code (https://github.com/zjiayu064/BitsMoE, MIT; at 51e17a37 for what came in 2026-10).
Per layer, beside the router: bases ``shared_vh_gate_proj`` and ``shared_vh_up_proj`` ``[R, H]``, ``shared_u_down``
``[H, R']``, in float16 or, since 2026-10, in 8 bits (`authors_bases`). Per expert and matrix (``gate_``, ``up_``,
``down_``):

    payload_buffer    uint32, [slab][tile][stage][micro][row][word]
    rank_idx_buffer   int32, the direction of every row, slab by slab
    slab_meta_buffer  [slabs, 4]: bits, rows, first place in rank_idx, first tile
    tile_meta_buffer  [tiles, 3]: first word, first scale, valid columns
    scale_buffer      float16, a scale per tile and row
    s_buffer          float16, a singular value per row, in the order of rank_idx

A slab is up to 64 directions of one width, a tile 128 columns along I, a stage 16 rows, a micro 32 columns. Word w of a
row holds bit w of its 32 columns, one per bit position; at 16 bits, two float16. A code u stands for u − 2**(bits − 1),
at one bit for 2u − 1, times scale and singular value. Gate and up are A B with A = (codes)ᵀ and B the shared Vh, down
is U F. A matrix without a slab, whose buffers are empty, is zero: so are experts dropped.

Above one bit these grids hold zero, which those of the format "bitsmoe" leave out: the weights can be decoded exactly,
but not stored exactly in packed form by format version 1.
"""

import json
from pathlib import Path

import torch
from tqdm import tqdm

from ..errors import CheckpointError
from ..sources.companions import copy_companions
from ..storage.folders import OutputFolder
from ..storage.shards import Stored, checkpoint_files, read_json, scan
from .authors_bases import BASES, layers_with_bases, read_basis

_STAGE, _TILE, _MICRO = 16, 128, 32
_WIDTHS = (1, 2, 3, 4, 6, 8, 16)
_MATRICES = ("gate", "up", "down")
_PARTS = ("payload", "rank_idx", "tile_meta", "slab_meta", "scale", "s")
#: buffers that repeat what the others say
_REDUNDANT = ("segments", "original_indices", "original_rank", "groupsize", "packed_expert_mask")
#: what their config.json says to their loader
_THEIRS = ("quantization_config", "auto_map", "bitsmoe", "bitsmoe_model_type", "bitsmoe_vllm")


def decode_matrix(parts: dict[str, torch.Tensor], rank: int, where: str) -> torch.Tensor:
    """One matrix of one expert in its basis.

    Args:
        parts: its buffers by their names without ``_buffer``.
        rank: directions of the basis.
        where: names the matrix in messages.

    Returns:
        float32 ``[rank, columns]``; directions without a slab are zero. The products are of float16 numbers and small
        integers, exact in float32 up to one rounding.

    Raises:
        CheckpointError: when the tables do not fit each other.
    """
    slabs, tiles = parts["slab_meta"].tolist(), parts["tile_meta"].tolist()
    payload, order = parts["payload"].contiguous().view(torch.int32), parts["rank_idx"].long()
    scale, s = parts["scale"].float(), parts["s"].float()
    if not slabs:
        raise CheckpointError(f"{where}: no slabs; the checkpoint is damaged")
    per_slab = len(tiles) // len(slabs)
    columns = sum(valid for _, _, valid in tiles[:per_slab])
    used = sum(rows for _, rows, _, _ in slabs)
    if used != len(order) or len(s) != used or len(order.unique()) != used or (used and int(order.max()) >= rank):
        raise CheckpointError(
            f"{where}: slabs of {used} directions and a rank index that does not fit a basis of {rank}"
        )
    decoded = torch.zeros(rank, columns)
    for bits, rows, first, first_tile in slabs:
        if bits not in _WIDTHS:
            raise CheckpointError(f"{where}: a slab of {bits} bits, known are {_WIDTHS}")
        directions = order[first : first + rows]
        start = 0
        for word, at, valid in tiles[first_tile : first_tile + per_slab]:
            count = rows * (_TILE // _MICRO) * bits if bits < 16 else rows * _TILE // 2
            words = payload[word : word + count]
            if len(words) != count or len(scale[at : at + rows]) != rows:
                raise CheckpointError(f"{where}: a tile lies outside of the payload; the checkpoint is damaged")
            values = _unpack(words, bits, rows)[:, :valid]
            decoded[directions, start : start + valid] = (
                values * scale[at : at + rows, None] * s[first : first + rows, None]
            )
            start += valid
    return decoded


def _unpack(words: torch.Tensor, bits: int, rows: int) -> torch.Tensor:
    """The values of one tile before scaling: int32 words to float32 ``[rows, 128]``."""
    stages, per_row = [], bits if bits < 16 else _MICRO // 2
    for stage in words.split(_STAGE * (_TILE // _MICRO) * per_row):
        block = stage.view(_TILE // _MICRO, -1, per_row)
        stages.append(_values(block, bits).transpose(0, 1).reshape(-1, _TILE))
    return torch.cat(stages)[:rows]


def _values(words: torch.Tensor, bits: int) -> torch.Tensor:
    """``[micro, rows, words]`` int32 to float32 ``[micro, rows, 32]``."""
    if bits == 16:
        return words.contiguous().view(torch.float16).float()
    planes = (words[..., None, :] >> torch.arange(_MICRO, dtype=torch.int32)[:, None]) & 1
    codes = (planes << torch.arange(bits, dtype=torch.int32)).sum(-1)
    return (2 * codes - 1 if bits == 1 else codes - (1 << (bits - 1))).float()


def import_authors(checkpoint: Path, out: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Decode a checkpoint of the authors' layout to a dense one; nothing appears under ``out`` unless all was written.

    Args:
        checkpoint: folder with config.json and safetensors files.
        out: folder to create; an empty one is replaced.
        dtype: of the decoded weights; the others keep theirs.

    Raises:
        CheckpointError: naming what is missing, damaged or unknown.
        BitsMoEError: when ``out`` holds something.
    """
    with OutputFolder(out) as output:
        _import(checkpoint, output, dtype)


def _import(checkpoint: Path, output: OutputFolder, dtype: torch.dtype) -> None:
    from huggingface_hub import save_torch_state_dict

    config = read_json(checkpoint / "config.json")
    found = scan(map(str, checkpoint_files(checkpoint)))
    layers = layers_with_bases(found)
    if not layers:
        raise CheckpointError(f"{checkpoint} has no {BASES[0]}; it is not of the BitsMoE authors' layout")
    dense: dict[str, torch.Tensor] = {}
    taken: set[str] = set()
    for layer in tqdm(layers, desc="Decoding"):
        weights, used = _decode_layer(found, layer, config.get("moe_intermediate_size"))
        dense.update({name: weight.to(dtype) for name, weight in weights.items()})
        taken |= used
    for key, stored in found.items():
        if key in taken or key.endswith(_REDUNDANT):
            continue
        if ".experts." in key and not key.endswith("_proj.weight"):
            raise CheckpointError(
                f"{key}: unknown tensor among the experts; this layout is newer than what is read here"
            )
        dense[key] = stored.read()
    with output.written() as folder:
        save_torch_state_dict(dense, folder)
        plain = {key: value for key, value in config.items() if key not in _THEIRS}
        (folder / "config.json").write_text(json.dumps(plain, indent=2), encoding="utf-8")
        copy_companions(checkpoint, folder)


def _decode_layer(found: dict[str, Stored], layer: str, width: int | None) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Dense weights of a layer's packed experts by name, and the tensors that they came from.

    ``width`` is the expert size I by config.json, which counts where all experts of the layer were dropped.
    """
    bases: dict[str, torch.Tensor] = {}
    used: set[str] = set()
    for matrix, name in zip(_MATRICES, BASES, strict=True):
        bases[matrix], taken = read_basis(found, f"{layer}.{name}")
        used |= taken
    factors: dict[str, torch.Tensor | None] = {}
    experts = [key.removesuffix(".gate_payload_buffer") for key in found if key.endswith(".gate_payload_buffer")]
    for expert in (name for name in experts if name.startswith(f"{layer}.experts.")):
        for matrix in _MATRICES:
            keys = {part: f"{expert}.{matrix}_{part}_buffer" for part in _PARTS}
            absent = [key for key in keys.values() if key not in found]
            if absent:
                raise CheckpointError(f"{absent[0]}: missing; fetch the checkpoint again")
            used |= set(keys.values())
            name = f"{expert}.{matrix}_proj.weight"
            parts = {part: found[key].read() for part, key in keys.items()}
            if not parts["payload"].numel():
                _check_empty(parts, f"{expert}.{matrix}")
                factors[name] = None
                continue
            basis = bases[matrix]
            rank = basis.shape[1] if matrix == "down" else basis.shape[0]
            factors[name] = decode_matrix(parts, rank, f"{expert}.{matrix}")
    if not factors:
        return {}, used
    columns = {factor.shape[1] for factor in factors.values() if factor is not None}
    columns = columns or ({width} if width else set())
    if len(columns) != 1:
        raise CheckpointError(
            f"{layer}: experts of {sorted(columns) or 'no known'} columns, which is not one size; the checkpoint is "
            "damaged, fetch it again"
        )
    weights = {}
    for name, factor in factors.items():
        matrix = name.rpartition(".")[0].rpartition(".")[2].removesuffix("_proj")
        basis = bases[matrix]
        if factor is None:
            hidden = basis.shape[0 if matrix == "down" else 1]
            size = (hidden, *columns) if matrix == "down" else (*columns, hidden)
            weights[name] = torch.zeros(size)
        else:
            weights[name] = basis @ factor if matrix == "down" else factor.T @ basis
    return weights, used


def _check_empty(parts: dict[str, torch.Tensor], where: str) -> None:
    """Check that the tables of an empty payload, which stands for a zero matrix, are empty as well."""
    filled = [part for part in ("rank_idx", "slab_meta", "s") if parts[part].numel()]
    if filled:
        raise CheckpointError(f"{where}: an empty payload with a {filled[0]} that is not; the checkpoint is damaged")
