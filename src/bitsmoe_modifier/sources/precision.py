"""Models that are published in low precision: their tensors, decoded one at a time as they are read.

Three methods of config.json's ``quantization_config`` have no unquantized original that anybody could download, so they
are sources themselves:

- ``fp8``: 8-bit floats (E4M3) with a scale per block of 128 × 128, ``X.weight`` and ``X.weight_scale_inv``
  (DeepSeek-V3, MiniMax-M2) or ``X.scale`` (DeepSeek-V4, there a power of two, E8M0). Where ``X.weight`` is int8, each
  byte holds two 4-bit floats, and a row has a scale per 32 of them: MXFP4 (DeepSeek-V4's experts).
- ``mxfp4``: 4-bit floats (E2M1), two in a byte, low half first, with a power of two per 32 weights along the input,
  ``X_blocks`` ``[E, rows, groups, 16]`` and ``X_scales`` ``[E, rows, groups]`` (gpt-oss). transformers keeps these
  experts transposed, ``[E, input, rows]``.
- ``compressed-tensors``: what `schemes` lists, ``X.weight_packed`` or ``X.weight`` with ``X.weight_scale`` and more
  (Kimi-K2, INT4 with a scale per 32).

What is decoded has the dtype of the model: the product of code and scale, rounded to it once (`codecs`). A tensor that
the checkpoint keeps as it is (routers, norms, embeddings) stays so.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..storage.shards import Stored, checkpoint_files, read_json, scan
from ..storage.sizes import TensorSize
from .codecs import MX_GROUP, decode_mxfp4, decode_scaled
from .compressed import compressed_tensors
from .decoded import AsStored, Decoded
from .provenance import REPORT_NAME
from .schemes import FORMATS, weight_schemes

#: the methods of config.json's ``quantization_config`` that are decoded here
METHODS = ("fp8", "mxfp4", "compressed-tensors")
_BLOCKS, _SCALES = "_blocks", "_scales"


def low_precision(config: Mapping[str, Any]) -> str | None:
    """The method of a config.json whose source is decoded here; None for all others.

    A checkpoint of compressed-tensors counts where all of its weights are in `FORMATS`; our own do not.
    """
    scheme = quantization_of(config)
    method = scheme.get("quant_method") if scheme else None
    if method not in METHODS:
        return None
    if method == "compressed-tensors":
        whole, groups = scheme.get("format"), (scheme.get("config_groups") or {}).values()
        if not groups or not all((group.get("format") or whole) in FORMATS for group in groups):
            return None
    return method


def is_low_precision_source(folder: Path) -> bool:
    """Whether a folder is a source in low precision, and not a checkpoint that this package made of one."""
    return low_precision(read_json(folder / "config.json")) is not None and not (folder / REPORT_NAME).exists()


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """``quantization_config`` of a config.json, or that of the language model inside it; {} where neither has one."""
    inner = config.get("text_config")
    for one in (config, inner if isinstance(inner, dict) else {}):
        scheme = one.get("quantization_config")
        if isinstance(scheme, dict):
            return scheme
    return {}


def source_tensors(folder: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, Stored]:
    """Every tensor of a source by the name that it has unquantized; those in low precision are decoded when read.

    Args:
        folder: of the source, in low precision or not.
        dtype: of what is decoded.

    Raises:
        CheckpointError: when the files are damaged, or a tensor lacks its scales.
    """
    found = scan(map(str, checkpoint_files(folder)))
    return decoded_tensors(found, read_json(folder / "config.json"), str(folder), dtype)


def decoded_tensors(
    found: dict[str, Stored], config: Mapping[str, Any], where: str, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Stored]:
    """As `source_tensors`, of what is known of the files and of config.json.

    Args:
        found: the files' tensors by key.
        config: the content of config.json.
        where: for messages.
        dtype: of what is decoded.

    Raises:
        CheckpointError: when a tensor lacks its scales.
    """
    method, scheme = low_precision(config), quantization_of(config)
    if method is None:
        return found
    if method == "mxfp4":
        return _mxfp4_tensors(found, dtype)
    if method == "fp8":
        rows, columns = scheme.get("weight_block_size") or (128, 128)
        return _fp8_tensors(found, (int(rows), int(columns)), dtype)
    return compressed_tensors(found, weight_schemes(scheme, where), where, dtype)


def _fp8_tensors(found: dict[str, Stored], block: tuple[int, int], dtype: torch.dtype) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    scales = {}
    for key in found:
        prefix, _, leaf = key.rpartition(".")
        if leaf.endswith("_scale_inv"):
            scales[key] = key.removesuffix("_scale_inv")
        elif leaf == "scale" and _is_byte(found.get(f"{prefix}.weight")):
            scales[key] = f"{prefix}.weight"
    for key, name in scales.items():
        if name not in found:
            raise CheckpointError(f"{found[key].file}: {key} scales nothing; the checkpoint is incomplete")
    scale_of = {name: found[key] for key, name in scales.items()}
    for key, stored in found.items():
        if key in scales:
            continue
        scale = scale_of.get(key)
        if scale is None:
            if _is_byte(stored):
                raise CheckpointError(f"{stored.file}: {key} has no {key}_scale_inv; the checkpoint is incomplete")
            tensors[key] = stored
        elif stored.dtype is torch.int8:
            tensors[key] = _mxfp4_matrix(stored, scale, key, dtype)
        else:
            kept = AsStored({"weight": stored, "weight_scale": scale}, _fp8_group(block))
            plain = key.endswith(".weight") and len(stored.shape) == 2
            tensors[key] = Decoded(
                stored.file,
                key,
                dtype,
                stored.shape,
                (stored, scale),
                lambda w, s: decode_scaled(w, s, block),
                as_stored=kept if plain else None,
            )
    return tensors


def _is_byte(stored: Stored | None) -> bool:
    return stored is not None and stored.dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)


def _fp8_group(block: tuple[int, int]) -> dict[str, Any]:
    """Block-FP8 as compressed-tensors spells it, weights alone.

    The source's kernels round a Linear's inputs to 8 bits as well, by groups of 128. With that in the group,
    transformers does so too, where a run of the source as it is decoded here does not: what is compared would differ by
    more than the experts.
    """
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "block", "block_structure": list(block)}
    return {"format": "float-quantized", "weights": {**weights, "dynamic": False}}


def _mxfp4_matrix(packed: Stored, scale: Stored, key: str, dtype: torch.dtype) -> Decoded:
    """Two 4-bit floats in a byte of a two-dimensional weight."""
    *lead, columns = packed.shape
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": MX_GROUP}
    kept = AsStored(
        {"weight_packed": packed, "weight_scale": scale},
        {"format": "mxfp4-pack-quantized", "weights": {**weights, "dynamic": False, "scale_dtype": "torch.uint8"}},
        {"weight_packed": torch.uint8, "weight_scale": torch.uint8},
    )
    shape = (*lead, 2 * columns)
    return Decoded(packed.file, key, dtype, shape, (packed, scale), decode_mxfp4, as_stored=kept)


def _mxfp4_tensors(found: dict[str, Stored], dtype: torch.dtype) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    for key, stored in found.items():
        if key.endswith(_SCALES) and f"{key.removesuffix(_SCALES)}{_BLOCKS}" in found:
            continue
        if not key.endswith(_BLOCKS):
            tensors[key] = stored
            continue
        name = key.removesuffix(_BLOCKS)
        scales = found.get(f"{name}{_SCALES}")
        if scales is None:
            raise CheckpointError(f"{stored.file}: {key} has no {name}{_SCALES}; the checkpoint is incomplete")
        *lead, rows, groups, _ = stored.shape
        shape = (*lead, groups * MX_GROUP, rows)
        tensors[name] = Decoded(stored.file, name, dtype, shape, (stored, scales), _transposed_mxfp4)
    return tensors


def _transposed_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return decode_mxfp4(blocks, scales).transpose(-1, -2).contiguous()


def source_sizes(tensors: Mapping[str, Stored], sizes: Mapping[str, TensorSize]) -> dict[str, TensorSize]:
    """Sizes of a source's tensors with the shapes that they have unquantized and the bytes that they take as stored.

    Args:
        tensors: by `decoded_tensors`.
        sizes: of everything in the files.
    """
    made = {}
    for name, stored in tensors.items():
        if isinstance(stored, Decoded):
            nbytes = sum(sizes[part.key].nbytes for part in (*stored.parts, *stored.others))
            made[name] = TensorSize("BF16", stored.shape, nbytes)
        else:
            made[name] = sizes[name]
    return made
