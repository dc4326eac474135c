"""What is not quantized of a source in low precision, put back into the form in which the source stores it.

The run computes with decoded weights. Before the checkpoint is written, every Linear that still has exactly the weights
of the source gets the source's own codes and scales again, and a config group that says what they are: transformers and
vLLM read both.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.utils.module import replace_direct_state_dict
from torch import nn

from ..sources.decoded import AsStored, Decoded
from ..sources.precision import source_tensors
from .compressed_tensors_api import QuantizationScheme, QuantizationStatus
from .decoding import family_key
from .source import NamesOf


@torch.no_grad()
def keep_as_stored(model: Any, folder: Path, computed: torch.dtype | None = None) -> list[str]:
    """Put a source's low-precision weights back into the Linears that nothing has changed.

    Args:
        model: made by `load_source` from the folder, in the dtypes that it will be saved in.
        folder: of the source.
        computed: what the weights were rounded to on the way; None: nothing.

    Returns:
        Names of the modules that are stored as the source has them now.
    """
    names = NamesOf(model)
    found: dict[str, AsStored] = {}
    for key, stored in source_tensors(folder).items():
        if not isinstance(stored, Decoded) or stored.as_stored is None:
            continue
        name = names.of(family_key(key))[0]
        module = _linear(model, name.removesuffix(".weight")) if name.endswith(".weight") else None
        if module is None:
            continue
        with disable_onloading():
            read = stored.read(dtype=module.weight.dtype)
            same = torch.equal(module.weight.cpu(), read.to(computed or read.dtype).to(read.dtype))
        if same:
            found[name.removesuffix(".weight")] = stored.as_stored
    for group, members in _by_group(found):
        scheme = QuantizationScheme(**{**group, "targets": targets_of(members)})
        for name in members:
            module = model.get_submodule(name)
            tensors = {leaf: tensor.to(module.weight.device) for leaf, tensor in found[name].read().items()}
            bias = {} if module.bias is None else {"bias": module.bias}
            replace_direct_state_dict(module, {**tensors, **bias})
            module.quantization_scheme = scheme
            module.quantization_status = QuantizationStatus.COMPRESSED
    return sorted(found)


def _linear(model: Any, name: str) -> Any:
    """A Linear of the model that no modifier has claimed; None for anything else."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    plain = type(module) is nn.Linear and getattr(module, "quantization_scheme", None) is None
    return module if plain else None


def _by_group(found: Mapping[str, AsStored]) -> Iterable[tuple[dict[str, Any], list[str]]]:
    """Modules that share a config group, with that group."""
    members: dict[str, list[str]] = {}
    for name, one in found.items():
        members.setdefault(json.dumps(dict(one.group), sort_keys=True), []).append(name)
    return [(json.loads(group), names) for group, names in members.items()]


def targets_of(names: Iterable[str]) -> list[str]:
    """Regular expressions for modules by their names, any number in the place of each number.

    What lies before the first number's container is left open: vLLM puts other names there.
    """
    patterns = set()
    for name in names:
        parts = name.split(".")
        first = next((place for place, part in enumerate(parts) if part.isdigit()), None)
        if first is None:
            patterns.add(name)
            continue
        tail = [r"\d+" if part.isdigit() else re.escape(part) for part in parts[max(0, first - 1) :]]
        patterns.add(r"re:(?:.*\.)?" + r"\.".join(tail) + "$")
    return sorted(patterns)


def add_groups(config_file: Path, kept: Mapping[str, AsStored]) -> None:
    """Say in a checkpoint's config.json how modules beside the model are stored.

    Args:
        config_file: with ``quantization_config``, which the checkpoint's packed experts have written.
        kept: by module names.
    """
    if not kept:
        return
    content = json.loads(config_file.read_text(encoding="utf-8"))
    groups = content["quantization_config"]["config_groups"]
    for group, members in _by_group(kept):
        scheme = QuantizationScheme(**{**group, "targets": targets_of(members)}).model_dump(mode="json")
        same = [one for one in groups.values() if {**one, "targets": []} == {**scheme, "targets": []}]
        if same:
            same[0]["targets"] = sorted({*same[0]["targets"], *scheme["targets"]})
        else:
            groups[f"group_{len(groups)}"] = scheme
    config_file.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")
