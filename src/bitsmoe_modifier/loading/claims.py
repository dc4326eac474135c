"""What config.json says about packed experts, read as plain dictionaries (no framework)."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..storage.mtp import is_mtp

#: Name of the format in config.json, of the compressor in compressed-tensors and of the quantization method in vLLM.
METHOD = "bitsmoe"


def is_bitsmoe(quantization_config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's ``quantization_config`` has experts in our format."""
    if quantization_config.get("quant_method") not in ("compressed-tensors", METHOD):
        return False
    return quantization_config.get("format") == METHOD or bool(split_groups(quantization_config)[0])


def split_groups(quantization_config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(our config groups, the others) by name."""
    groups = quantization_config.get("config_groups") or {}
    whole = quantization_config.get("format")
    ours = {name: group for name, group in groups.items() if (group.get("format") or whole) == METHOD}
    return ours, {name: group for name, group in groups.items() if name not in ours}


def is_packed(experts: str, targets: Iterable[str]) -> bool:
    """Whether config.json says that an experts module is packed, by the ``targets`` of our config groups.

    ``mtp.layers.0.mlp.experts``, of a layer for multi-token prediction, has the number of one of the model's own layers
    and, in config.json, targets of its own: one that names no ``mtp`` does not mean it.
    """
    return matches(experts, (one for one in targets if not is_mtp(experts, None) or re.search("mtp|nextn", one)))


def matches(prefix: str, targets: Iterable[str]) -> bool:
    """Whether a module's name is one of ``targets``: names, or regular expressions after ``re:``."""
    return any(
        re.match(target.removeprefix("re:"), prefix) is not None if target.startswith("re:") else target == prefix
        for target in targets
    )
