"""The tensors of a compressed-tensors source: ``X.weight_packed`` or ``X.weight`` with ``X.weight_scale`` and more."""

from collections.abc import Callable
from functools import partial

import torch

from ..errors import CheckpointError
from ..storage.shards import Stored
from .codecs import decode_mxfp4, decode_nvfp4, decode_packed_integers, decode_scaled
from .decoded import AsStored, Decoded
from .schemes import WeightScheme, scheme_of

#: what compressed-tensors stores for a module beside ``weight`` or ``weight_packed``
_LEAVES = (
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_global_scale",
    "weight_g_idx",
    "input_scale",
    "input_zero_point",
    "input_global_scale",
)


def compressed_tensors(
    found: dict[str, Stored], schemes: list[tuple[list[str], WeightScheme]], where: str, dtype: torch.dtype
) -> dict[str, Stored]:
    """Every tensor by the name that it has unquantized, as `precision.source_tensors`.

    Args:
        found: of the files.
        schemes: of config.json.
        where: for messages.
        dtype: of what is decoded.

    Raises:
        CheckpointError: when a weight lacks its scales or its group.
    """
    modules: dict[str, dict[str, Stored]] = {}
    for key, stored in found.items():
        prefix, _, leaf = key.rpartition(".")
        if leaf in (*_LEAVES, "weight_packed"):
            modules.setdefault(prefix, {})[leaf] = stored
    tensors = {
        key: stored for key, stored in found.items() if key.rpartition(".")[2] not in (*_LEAVES, "weight_packed")
    }
    for prefix, leaves in modules.items():
        if f"{prefix}.weight" in found:
            leaves["weight"] = found[f"{prefix}.weight"]
        if "weight_scale" not in leaves:
            if "weight_packed" in leaves:
                file = leaves["weight_packed"].file
                raise CheckpointError(f"{file}: {prefix} has no weight_scale; the checkpoint is incomplete")
            tensors.update({f"{prefix}.{leaf}": stored for leaf, stored in leaves.items() if leaf != "weight"})
            continue  # scales of a cache or of inputs alone
        scheme = scheme_of(prefix, schemes, where)
        tensors[f"{prefix}.weight"] = _compressed(prefix, leaves, scheme, dtype)
    return tensors


def _compressed(prefix: str, leaves: dict[str, Stored], scheme: WeightScheme, dtype: torch.dtype) -> Decoded:
    """One module's weight."""
    wanted = "weight" if scheme.kind in ("float-quantized", "int-quantized", "naive-quantized") else "weight_packed"
    if wanted not in leaves:
        file = next(iter(leaves.values())).file
        raise CheckpointError(f"{file}: {prefix} has no {wanted}; the checkpoint is incomplete")
    codes = leaves[wanted]
    names: tuple[str, ...] = (wanted, "weight_scale")
    decode: Callable[..., torch.Tensor]
    if wanted == "weight":
        shape: tuple[int, ...] = codes.shape
        if "weight_zero_point" in leaves:
            raise CheckpointError(f"{codes.file}: {prefix}: 8-bit weights with zero points are not taken as a source")
        decode = partial(_decode_bytes, scheme=scheme)
    elif scheme.kind == "pack-quantized":
        shape = _packed_shape(prefix, leaves, scheme)
        names = (*names, *(name for name in ("weight_zero_point", "weight_g_idx") if name in leaves))
        decode = partial(_decode_integers, names=names, shape=shape, bits=scheme.bits)
    else:
        shape, decode = (*codes.shape[:-1], 2 * codes.shape[-1]), decode_mxfp4
        if scheme.kind == "nvfp4-pack-quantized":
            names, decode = (*names, "weight_global_scale"), decode_nvfp4
    missing = [name for name in names if name not in leaves]
    if missing:
        raise CheckpointError(f"{codes.file}: {prefix} has no {missing[0]}; the checkpoint is incomplete")
    group = {**scheme.group, "format": scheme.kind}
    return Decoded(
        codes.file,
        f"{prefix}.weight",
        dtype,
        shape,
        tuple(leaves[name] for name in names),
        decode,
        others=tuple(stored for name, stored in leaves.items() if name not in names),
        as_stored=AsStored(leaves, group),
    )


def _decode_bytes(weight: torch.Tensor, scale: torch.Tensor, scheme: WeightScheme) -> torch.Tensor:
    rows, columns = weight.shape
    blocks = {"block": scheme.block, "channel": (1, columns), "group": (1, scheme.group_size or columns)}
    return decode_scaled(
        weight, scale if scale.ndim > 1 else scale.reshape(-1, 1), blocks.get(scheme.strategy, (rows, columns))
    )


def _decode_integers(*parts: torch.Tensor, names: tuple[str, ...], shape: tuple[int, int], bits: int) -> torch.Tensor:
    found = dict(zip(names, parts, strict=True))
    zero, index = found.get("weight_zero_point"), found.get("weight_g_idx")
    return decode_packed_integers(found["weight_packed"], found["weight_scale"], shape, bits, zero, index)


def _packed_shape(prefix: str, leaves: dict[str, Stored], scheme: WeightScheme) -> tuple[int, int]:
    """Rows and columns of packed integers; their file is opened only where the scales' shape does not tell."""
    packed, scale = leaves["weight_packed"], leaves.get("weight_scale")
    if scheme.strategy == "group" and scheme.group_size > 0 and scale is not None and len(scale.shape) == 2:
        shape = (packed.shape[0], scale.shape[1] * scheme.group_size)
    elif not packed.file:  # of the hub, whose headers alone are here: to within the padding of a row
        shape = (packed.shape[0], packed.shape[1] * 32 // scheme.bits)
    elif "weight_shape" in leaves:
        rows, columns = leaves["weight_shape"].read().tolist()
        shape = (int(rows), int(columns))
    else:
        raise CheckpointError(f"{packed.file}: {prefix} has no weight_shape; the checkpoint is incomplete")
    if packed.shape != (shape[0], -(-shape[1] * scheme.bits // 32)):
        raise CheckpointError(
            f"{packed.file}: {prefix}: {packed.shape} words do not hold {shape} integers of {scheme.bits} bits; "
            "config.json and the files do not belong together"
        )
    return shape
