"""A way around transformers 5.17, which cannot load every checkpoint that llm-compressor writes for fused experts.

On loading it decodes the packed Linears of all experts by one scheme, the first that names experts, and without their
zero points. Asymmetric experts then end with an error about conversions, and experts of several schemes (gate and up at
2 bits, down at 4) are decoded wrongly without any error. Experts that llm-compressor wrote by its own names where the
family has others (Mixtral's w1, w2, w3) are left out, and random ones take their place. Such checkpoints are decoded
here, by compressed-tensors' own compressors, and loaded as the dense model that they stand for. Remove this module when
transformers does it.
"""

import re
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..sources.model import read_config
from ..storage.shards import checkpoint_files, packed_modules, scan

_PACKED = ".weight_packed"
#: llm-compressor's names of an expert's Linears, and what families that call their blocks `block_sparse_moe` store
_FAMILY_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_COMPRESSOR_NAMES = re.compile(r"(.*[.]block_sparse_moe[.]experts[.]\d+[.])(gate_proj|down_proj|up_proj)([.]weight)")


def misread_experts(folder: Path) -> str | None:
    """Why transformers would not load the checkpoint's experts as they were written; None where it does."""
    raw = read_config(folder).get("quantization_config") or {}
    packed = [name for name in _tensors(folder) if name.endswith(_PACKED) and ".experts." in name]
    if not packed or raw.get("quant_method") != "compressed-tensors":
        return None
    if any(_COMPRESSOR_NAMES.match(name) for name in packed):
        return "transformers does not know the names of these experts"
    schemes = _schemes(raw)
    used = {i for name in packed if (i := _index(schemes, name.removesuffix(_PACKED))) is not None}
    if any(schemes[i].weights is not None and not schemes[i].weights.symmetric for i in used):
        return "transformers cannot load asymmetric packed experts"
    if len({schemes[i].weights.model_dump_json() for i in used if schemes[i].weights is not None}) > 1:
        return "transformers decodes all packed experts by one scheme, these have several"
    return None


def refuse_misread(folder: Path) -> None:
    """Refuse a checkpoint with experts packed as bitsmoe beside others that transformers would misread.

    Raises:
        CheckpointError: naming the reason and the remedy.
    """
    reason = misread_experts(folder)
    if reason is not None:
        raise CheckpointError(
            f"{folder}: {reason}; let one symmetric scheme quantize the experts that are not packed as bitsmoe"
        )


def load_decoded(folder: Path, dtype: torch.dtype) -> Any:
    """The dense model that a compressed-tensors checkpoint of packed Linears stands for, weights decoded here.

    Raises:
        CheckpointError: when it has experts packed as bitsmoe too, which are no Linears.
    """
    import transformers

    if packed_modules(_tensors(folder)):
        refuse_misread(folder)

    from .compressed_tensors_api import BaseCompressor

    config = transformers.AutoConfig.from_pretrained(folder)
    schemes = _schemes(config.quantization_config)
    del config.quantization_config
    tensors = {name: stored.read() for name, stored in _tensors(folder).items()}
    for prefix in [name.removesuffix(_PACKED) for name in tensors if name.endswith(_PACKED)]:
        local = {name: tensors.pop(f"{prefix}.{name}") for name in _local_names(tensors, prefix)}
        index = _index(schemes, prefix)
        if index is None:
            raise KeyError(f"{prefix}: packed, but no group of config.json targets it")
        compressor = BaseCompressor.get_value_from_registry(schemes[index].format)
        tensors[f"{prefix}.weight"] = compressor.decompress(local, schemes[index])["weight"]
    tensors = {family_key(name): tensor for name, tensor in tensors.items()}
    architecture = getattr(transformers, config.architectures[0])  # AutoModel insists on a folder
    return architecture.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)


def family_key(name: str) -> str:
    """A tensor's name as its family stores it, where llm-compressor wrote it by its own."""
    return _COMPRESSOR_NAMES.sub(_family_name, name)


def _family_name(found: re.Match[str]) -> str:
    return found[1] + _FAMILY_NAMES[found[2]] + found[3]


def _tensors(folder: Path) -> dict[str, Any]:
    return scan(map(str, checkpoint_files(folder)))


def _local_names(tensors: dict[str, torch.Tensor], prefix: str) -> list[str]:
    names = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
    return [name for name in names if f"{prefix}.{name}" in tensors]


def _schemes(raw: Any) -> list[Any]:
    """The groups of a quantization configuration, each with its format filled in."""
    from .compressed_tensors_api import QuantizationConfig

    config = QuantizationConfig.model_validate(raw if isinstance(raw, dict) else raw.to_dict())
    for scheme in config.config_groups.values():
        scheme.format = scheme.format or config.format
    return list(config.config_groups.values())


def _index(schemes: list[Any], name: str) -> int | None:
    """Which scheme a Linear of this name has: the first one with a matching pattern, else one for all Linears."""
    for kind in ("re:", "Linear"):
        for i, scheme in enumerate(schemes):
            for target in scheme.targets:
                if kind == "re:" and target.startswith("re:") and re.match(target[3:], name):
                    return i
                if kind == "Linear" and target in ("Linear", name):
                    return i
    return None
