"""A source in low precision as a model of transformers, its experts left in the files.

The model is built on the meta device, and every tensor outside the experts is decoded and loaded. Experts stay where
they are: `StoredStack` decodes one at its turn. So the whole model is never in memory in the wider dtype, and on
disk there is nothing but the source.
"""

import copy
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from ..errors import CheckpointError
from ..sources.classes import class_of, read_auto_config
from ..sources.decoded import Decoded
from ..sources.precision import source_tensors
from ..sources.stacks import Pieces, StoredStack
from ..storage.shards import Stored
from .decoding import family_key
from .transformers_api import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    get_model_conversion_mapping,
    rename_source_key,
)


class _WithoutExperts(nn.Module):
    """In the place of an experts module while the rest is loaded: the parameters that are no stacks."""

    def __init__(self, experts: nn.Module, stacks: dict[str, StoredStack]) -> None:
        super().__init__()
        for name, parameter in experts.named_parameters(recurse=False):
            if name not in stacks:
                self.register_parameter(name, parameter)
        for name, buffer in experts.named_buffers(recurse=False):
            self.register_buffer(name, buffer)


def load_source(folder: Path, dtype: torch.dtype | str = "auto") -> Any:
    """The model that a source in low precision stands for, on the CPU.

    Experts stay in the files, but of families that put their tensors together in a way that is not experts one after
    another; those are decoded.

    Args:
        folder: of the source; it has to stay there as long as the model is used.
        dtype: of its weights, and of experts when they are read; "auto": what config.json declares, bfloat16 where it
            declares none.

    Raises:
        CheckpointError: when the files are damaged or transformers does not know the model.
    """
    config = read_auto_config(folder)
    _forget_quantization(config)
    chosen = dtype if isinstance(dtype, torch.dtype) else (config.dtype or torch.bfloat16)
    kind = class_of(config)
    with torch.device("meta"):
        skeleton = kind(copy.deepcopy(config))
    names = NamesOf(skeleton)
    found = {family_key(key): stored for key, stored in source_tensors(folder, chosen).items()}
    tensors = {key: stored for key, stored in found.items() if names.has(key)}
    stacks = _stacks(skeleton, tensors, names, chosen)
    left = {key for key in tensors if names.module(key) in stacks and names.leaf(key) in stacks[names.module(key)]}

    class Built(kind):  # type: ignore[misc, valid-type]
        """The class with nothing in the places of the experts that stay in the files."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            for name, replaced in stacks.items():
                self.set_submodule(name, _WithoutExperts(self.get_submodule(name), replaced))

    Built.__name__, Built.__qualname__, Built.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    implementation = {"experts_implementation": "eager"} if stacks else {}  # the one that reads expert after expert
    state = {key: stored.read() for key, stored in tensors.items() if key not in left}
    asked = {"config": config, "state_dict": state, "dtype": chosen, "output_loading_info": True, **implementation}
    loaded: Any = Built.from_pretrained(None, **asked)
    model, info = loaded
    del state, asked
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CheckpointError(f"{folder}: no file holds {missing[0]} ({len(missing)} tensors); fetch it again")
    model.__class__ = kind
    for name, replaced in stacks.items():
        model.set_submodule(name, _with_stacks(skeleton.get_submodule(name), model.get_submodule(name), replaced))
        if hasattr(model.get_submodule(name), "config"):
            model.get_submodule(name).config = _config_beside(model, name)
    model.config._name_or_path = model.name_or_path = str(folder)
    if model.can_generate() and (folder / GENERATION_CONFIG_NAME).is_file():  # which is read of a folder alone
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.decoded_from = str(folder)
    return model


def _forget_quantization(config: Any) -> None:
    """Let transformers take the model for an unquantized one, the language model inside a wrapper too."""
    for one in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if one is not None and hasattr(one, "quantization_config"):
            del one.quantization_config


def _with_stacks(experts: Any, loaded: nn.Module, stacks: dict[str, StoredStack]) -> nn.Module:
    """The experts module of the skeleton with the stacks, and with what was loaded beside them."""
    for name, stack in stacks.items():
        delattr(experts, name)
        setattr(experts, name, stack)
    for name, parameter in loaded.named_parameters(recurse=False):
        experts._parameters[name] = parameter
    for name, buffer in loaded.named_buffers(recurse=False):
        experts._buffers[name] = buffer
    return experts.train(loaded.training)


def _config_beside(model: Any, name: str) -> Any:
    """The configuration that the loaded model's own modules around the experts use: the one that says "eager"."""
    while name:
        name = name.rpartition(".")[0]
        config = getattr(model.get_submodule(name), "config", None)
        if config is not None:
            return config
    return model.config


class NamesOf:
    """transformers' names of a source's tensors."""

    def __init__(self, model: Any) -> None:
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._expected = model.state_dict()
        self._known: dict[str, tuple[str, str | None]] = {}

    def of(self, key: str) -> tuple[str, str | None]:
        """Name in the model, and the pattern of the converter that puts the tensor there, if there is one."""
        if key not in self._known:
            args = (self._renamings, self._converters, self._prefix, self._expected)
            name, pattern = rename_source_key(key, *args)
            self._known[key] = (key, None) if name not in self._expected and key in self._expected else (name, pattern)
        return self._known[key]

    def has(self, key: str) -> bool:
        """Whether the model has a place for the tensor."""
        return self.of(key)[0] in self._expected

    def module(self, key: str) -> str:
        """Name of the module that the tensor goes into."""
        return self.of(key)[0].rpartition(".")[0]

    def leaf(self, key: str) -> str:
        """The tensor's name in that module."""
        return self.of(key)[0].rpartition(".")[2]

    def order(self, key: str) -> int | None:
        """Which of an expert's matrices the tensor is; None where it is not simply one of them, one below another."""
        pattern = self.of(key)[1]
        for converter in self._converters if pattern is not None else ():
            if pattern in converter.source_patterns:
                merge, *rest = [(type(one).__name__, getattr(one, "dim", None)) for one in converter.operations]
                plain = merge == ("MergeModulelist", 0) and rest in ([], [("Concatenate", 1)])
                return converter.source_patterns.index(pattern) if plain else None
        return None


def _stacks(
    skeleton: Any, tensors: dict[str, Stored], names: NamesOf, dtype: torch.dtype
) -> dict[str, dict[str, StoredStack]]:
    """Stacks by module and parameter, of modules all of whose three-dimensional parameters can be stacks."""
    keys: dict[str, dict[str, list[str]]] = {}
    for key in sorted(tensors, key=dot_natural_key):
        module = names.module(key)
        if module.endswith("experts"):
            keys.setdefault(module, {}).setdefault(names.leaf(key), []).append(key)
    stacks: dict[str, dict[str, StoredStack]] = {}
    for module, by_leaf in keys.items():
        experts = skeleton.get_submodule(module)
        wanted = {name: p for name, p in experts.named_parameters(recurse=False) if p.ndim == 3}
        low = any(isinstance(tensors[key], Decoded) for name in wanted for key in by_leaf.get(name, ()))
        found = {name: _stack(p.shape, by_leaf.get(name, []), tensors, names, dtype) for name, p in wanted.items()}
        complete = {name: stack for name, stack in found.items() if stack is not None}
        if low and wanted and len(complete) == len(wanted) and _is_read_by_index(experts):
            stacks[module] = complete
    return stacks


def _is_read_by_index(experts: Any) -> bool:
    """Whether the family's own forward reads one expert after the other: all that carry transformers' decorator."""
    return hasattr(experts, "is_transposed")


def _stack(
    shape: torch.Size, keys: list[str], tensors: dict[str, Stored], names: NamesOf, dtype: torch.dtype
) -> StoredStack | None:
    if len(keys) == 1 and tensors[keys[0]].shape == tuple(shape):
        return StoredStack(shape, tensors[keys[0]], dtype)
    experts: dict[int, dict[int, Stored]] = {}
    for key in keys:
        number, order = re.search(r"experts[.](\d+)[.]", key), names.order(key)
        if number is None or order is None:
            return None
        experts.setdefault(int(number[1]), {})[order] = tensors[key]
    pieces: list[Pieces] = [tuple(one for _, one in sorted(experts.get(e, {}).items())) for e in range(shape[0])]
    rows = [sum(piece.shape[0] for piece in parts) for parts in pieces]
    if len(experts) != shape[0] or any(n != shape[1] for n in rows):
        return None
    return StoredStack(shape, pieces, dtype)
