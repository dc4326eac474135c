"""The config groups of a compressed-tensors source, read as plain dictionaries: how a module's weight is stored."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError

#: formats whose weights are decoded here, by the name that config.json gives them
FORMATS = (
    "pack-quantized",
    "float-quantized",
    "int-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
)


@dataclass(frozen=True)
class WeightScheme:
    """How the weights of a group's modules are stored.

    Attributes:
        kind: one of `FORMATS`.
        bits: of a code.
        strategy: what shares a scale: "tensor", "channel", "group", "block" or "tensor_group".
        group_size: columns that share a scale, where strategy is a group.
        block: rows and columns that share one, where it is a block.
        group: the whole entry of config.json, for what is kept as it is.
    """

    kind: str
    bits: int
    strategy: str
    group_size: int
    block: tuple[int, int]
    group: Mapping[str, Any]


def weight_schemes(quantization_config: Mapping[str, Any], where: str) -> list[tuple[list[str], WeightScheme]]:
    """Targets and scheme of every config group.

    Args:
        quantization_config: of config.json.
        where: for messages.

    Raises:
        CheckpointError: naming a format that is not decoded here.
    """
    found = []
    for name, group in (quantization_config.get("config_groups") or {}).items():
        weights = group.get("weights")
        if weights is None:
            continue
        kind = group.get("format") or quantization_config.get("format")
        if kind not in FORMATS:
            raise CheckpointError(
                f"{where}: its weights are in compressed-tensors' format {kind!r} (group {name}); the formats that are "
                f"taken as sources are {', '.join(FORMATS)}: give another copy of the model"
            )
        block = weights.get("block_structure") or (128, 128)
        if isinstance(block, str):
            block = tuple(int(size) for size in block.lower().split("x"))
        scheme = WeightScheme(
            kind,
            int(weights.get("num_bits") or 8),
            str(weights.get("strategy") or "tensor"),
            int(weights.get("group_size") or 0),
            (int(block[0]), int(block[1])),
            group,
        )
        found.append((list(group.get("targets") or ()), scheme))
    return found


def scheme_of(name: str, schemes: list[tuple[list[str], WeightScheme]], where: str) -> WeightScheme:
    """The scheme of a module that is stored in low precision: by its name, else that of all Linears.

    Raises:
        CheckpointError: when no group of config.json targets it.
    """
    for named in (True, False):
        for targets, scheme in schemes:
            if any(_is_named(target, name) if named else _is_class(target) for target in targets):
                return scheme
    raise CheckpointError(f"{where}: {name} is stored in low precision, but no group of config.json targets it")


def _is_class(target: str) -> bool:
    """Whether a target is a class of modules (``Linear``) rather than one module's name."""
    return not target.startswith("re:") and "." not in target


def _is_named(target: str, name: str) -> bool:
    return re.match(target[3:], name) is not None if target.startswith("re:") else target == name
