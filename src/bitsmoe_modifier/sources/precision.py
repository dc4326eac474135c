"""Models that are published in low precision: their tensors, decoded one at a time as they are read.

Two formats have no unquantized original that anybody could download, so they are sources themselves:

- ``fp8``: 8-bit floats (E4M3) with a scale per block of 128 × 128, ``X.weight`` and ``X.weight_scale_inv``
  (DeepSeek-V3, MiniMax-M2)
- ``mxfp4``: 4-bit floats (E2M1), two in a byte, low half first, with a power of two per 32 weights along the input,
  ``X_blocks`` ``[E, rows, groups, 16]`` and ``X_scales`` ``[E, rows, groups]`` (gpt-oss). transformers keeps these
  experts transposed, ``[E, input, rows]``.

What is decoded has the dtype of the model. That is exact for ``mxfp4``; for ``fp8`` it rounds the product of an 8-bit
float and its float32 scale once, as the format's own conversion to bfloat16 does. A tensor that the checkpoint keeps as
it is (routers, norms, embeddings) stays so.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..storage.shards import Stored, checkpoint_files, read_json, scan
from ..storage.sizes import TensorSize
from .classes import class_of, read_auto_config

#: the methods of config.json's ``quantization_config`` that are decoded here
METHODS = ("fp8", "mxfp4")
_FP8_SCALE, _BLOCKS, _SCALES = "_scale_inv", "_blocks", "_scales"
#: values of the 4-bit floats with one exponent bit more than mantissa, by their bits; the upper eight are negative
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MX_GROUP, _E8M0_BIAS = 32, 127


def decode_block_fp8(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Weights of 8-bit floats with a scale per block, float32.

    Args:
        weight: float8_e4m3fn ``[…, N, K]``.
        scale: ``[…, ceil(N / block[0]), ceil(K / block[1])]``, any float dtype, to be multiplied with.
        block: rows and columns that share a scale; blocks at the ends may be smaller.
    """
    rows, columns = weight.shape[-2:]
    wanted = (-(-rows // block[0]), -(-columns // block[1]))
    if tuple(scale.shape[-2:]) != wanted:
        raise CheckpointError(
            f"scales of {tuple(scale.shape)} for weights of {tuple(weight.shape)} in blocks of {block}"
        )
    spread = scale.float().repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[..., :columns]
    return weight.float() * spread


def decode_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Weights of 4-bit floats with a power of two per 32, float32 ``[…, rows, 32 groups]``.

    Args:
        blocks: uint8 ``[…, rows, groups, 16]``, two values a byte, the first in the low half.
        scales: uint8 ``[…, rows, groups]``: exponents, 127 too large.
    """
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=blocks.device)
    halves = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
    values = torch.ldexp(table[halves.long()], (scales.int() - _E8M0_BIAS).unsqueeze(-1))
    return values.flatten(-2)


@dataclass(frozen=True)
class Decoded(Stored):
    """A tensor that is stored in low precision, read as the tensor that it stands for.

    Attributes:
        parts: what is stored.
        decode: from the parts to float32.
    """

    parts: tuple[Stored, ...] = ()
    decode: Callable[..., torch.Tensor] = field(default=torch.Tensor.float)

    def read(self) -> torch.Tensor:
        """The decoded tensor, in ``dtype``, on the CPU."""
        with torch.device("cpu"):
            return self.decode(*(part.read() for part in self.parts)).to(self.dtype)


def low_precision(config: Mapping[str, Any]) -> str | None:
    """The method of a config.json whose source is decoded here; None for all others."""
    scheme = config.get("quantization_config")
    method = scheme.get("quant_method") if isinstance(scheme, dict) else None
    return method if method in METHODS else None


def source_tensors(folder: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, Stored]:
    """Every tensor of a source by the name that it has unquantized; those in low precision are decoded when read.

    Args:
        folder: of the source, in low precision or not.
        dtype: of what is decoded.

    Raises:
        CheckpointError: when the files are damaged, or a tensor lacks its scales.
    """
    found = scan(map(str, checkpoint_files(folder)))
    config = read_json(folder / "config.json")
    method = low_precision(config)
    if method is None:
        return found
    return _mxfp4_tensors(found, dtype) if method == "mxfp4" else _fp8_tensors(found, _block(config), dtype)


def _block(config: Mapping[str, Any]) -> tuple[int, int]:
    rows, columns = config["quantization_config"].get("weight_block_size") or (128, 128)
    return int(rows), int(columns)


def _fp8_tensors(found: dict[str, Stored], block: tuple[int, int], dtype: torch.dtype) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    for key, stored in found.items():
        if key.endswith(_FP8_SCALE):
            if key.removesuffix(_FP8_SCALE) not in found:
                raise CheckpointError(f"{stored.file}: {key} scales nothing; the checkpoint is incomplete")
            continue
        scale = found.get(f"{key}{_FP8_SCALE}")
        if scale is None:
            tensors[key] = stored
        else:
            tensors[key] = Decoded(
                stored.file, key, dtype, stored.shape, (stored, scale), lambda w, s: decode_block_fp8(w, s, block)
            )
    return tensors


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
        shape = (*lead, groups * _MX_GROUP, rows)
        tensors[name] = Decoded(stored.file, name, dtype, shape, (stored, scales), _transposed_mxfp4)
    return tensors


def _transposed_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return decode_mxfp4(blocks, scales).transpose(-1, -2).contiguous()


def source_sizes(folder: Path, sizes: Mapping[str, TensorSize]) -> dict[str, TensorSize]:
    """Sizes of a source's tensors with the shapes that they have unquantized and the bytes that they take as stored."""
    names = source_tensors(folder)
    made = {}
    for name, stored in names.items():
        parts = stored.parts if isinstance(stored, Decoded) else (stored,)
        nbytes = sum(sizes[part.key].nbytes for part in parts)
        made[name] = TensorSize("BF16", stored.shape, nbytes) if isinstance(stored, Decoded) else sizes[name]
    return made


def decoded_sizes(folder: Path, sizes: Mapping[str, TensorSize]) -> dict[str, TensorSize]:
    """Sizes of a source's tensors as they are after decoding."""
    return {
        name: TensorSize(size.dtype, size.shape, 2 * math.prod(size.shape))
        if name not in sizes or size != sizes[name]
        else size
        for name, size in source_sizes(folder, sizes).items()
    }


def load_source(folder: Path, dtype: torch.dtype | str = "auto") -> Any:
    """The dense model that a source in low precision stands for; all of it, in memory, in ``dtype``.

    Args:
        folder: of the source.
        dtype: of its weights; "auto": what config.json declares, bfloat16 where it declares none.

    Raises:
        CheckpointError: when the files are damaged or transformers does not know the model.
    """
    config = read_auto_config(folder)
    del config.quantization_config
    chosen = dtype if isinstance(dtype, torch.dtype) else (config.dtype or torch.bfloat16)
    tensors = {name: stored.read() for name, stored in source_tensors(folder, chosen).items()}
    model = class_of(config).from_pretrained(None, config=config, state_dict=tensors, dtype=chosen)
    model.config._name_or_path = model.name_or_path = str(folder)
    model.decoded_from = str(folder)
    return model
