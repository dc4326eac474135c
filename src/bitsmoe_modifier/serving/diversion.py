"""Handing packed experts to their layers before a model's own loading code sees them.

vLLM's model files load experts in many ways: through its `AutoWeightsLoader`, by looking parameters up by name, by
splitting fused tensors, and most rename what they read. None of them knows packed experts. So ``load_weights`` of the
model's outermost class, which every loader of vLLM calls, is wrapped: packed tensors leave the stream there, everything
else goes on to the model file as before.

A stored name belongs to a layer by the container of the layers, the layer's number and the last part
(``layers.3.….experts``), the same three parts as in config.json's targets, and by whether it is of a layer for
multi-token prediction (``mtp.layers.0.….experts``). What else lies before and between them differs between
transformers, files and vLLM (``model.language_model.layers.3.experts``, ``layers.3.moe.experts``).

A draft model for multi-token prediction is loaded from the same files: it takes its own layers' packed tensors, and
those of the model itself go on to its loading code, which passes over them.
"""

import functools
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..errors import CheckpointError
from ..storage.mtp import is_mtp
from ..storage.packed import TENSOR_NAMES
from .vllm_api import BaseKVCacheMethod, RoutedExperts

_MARK = "_bitsmoe_diverts"
_LOADED = "_bitsmoe_loaded"
_TENSOR = re.compile(r"(.+)\.(" + "|".join(TENSOR_NAMES) + ")")
#: parameters that vLLM makes from config.json
_FROM_CONFIG = ("input_scale_ub",)
#: parameters of a draft model in whose place vLLM puts those of the model that it speculates for
_OF_THE_TARGET = re.compile(r"(?:^|[.])(?:embed_tokens|lm_head|shared_head[.]head)[.]")
_NUMBERED = re.compile(r"(?:.*\.)?([^.]+)\.(\d+)\.(?:[^.]+\.)?([^.]+)")


def divert(model_class: type, method_class: type, is_draft: bool = False) -> None:
    """Make ``load_weights`` of a model class give packed tensors to the layers whose method is a ``method_class``.

    The method also learns which parameters of the model no file held (``missing``), for which vLLM looks in unquantized
    models alone: what they were allocated with would be served. Classes are changed once; models without such a layer
    load as before.

    Args:
        model_class: of vLLM.
        method_class: of the layers that are served packed.
        is_draft: whether the model speculates for another one, whose embedding and head vLLM gives it after loading.

    Raises:
        CheckpointError: by ``load_weights`` of a draft model for which the files hold nothing of its own, where vLLM
            would speculate with whatever the memory held.
    """
    if _MARK in vars(model_class):
        return
    original: Any = model_class.load_weights  # type: ignore[attr-defined]

    @functools.wraps(original)
    def load_weights(self: torch.nn.Module, weights: Iterable[tuple[str, torch.Tensor]], *args: Any, **kw: Any) -> Any:
        layers = packed_layers(self, method_class)
        if not layers and not is_draft:
            return original(self, weights, *args, **kw)
        loaded = original(self, _rest(weights, layers, is_draft), *args, **kw)
        if isinstance(loaded, set):
            loaded |= {f"{name}.{leaf}" for name, layer in layers.values() for leaf, _ in layer.named_parameters()}
            # a wrapper may hand its language model the files' tensors in several parts
            so_far = vars(self).setdefault(_LOADED, set())
            so_far |= loaded
            missing = _missing(self, so_far)
            if is_draft:
                if all(_OF_THE_TARGET.search(name) for name in so_far):
                    raise CheckpointError(
                        f"no file of the checkpoint holds a layer for {type(self).__name__} to speculate with; serve "
                        "without --speculative-config, or quantize the source again with --mtp keep"
                    )
                missing = frozenset(name for name in missing if not _OF_THE_TARGET.search(name))
            for _, layer in layers.values():
                layer.quant_method.missing = missing
        return loaded

    model_class.load_weights = load_weights  # type: ignore[attr-defined]
    setattr(model_class, _MARK, True)


def packed_layers(model: torch.nn.Module, method_class: type) -> dict[object, tuple[str, RoutedExperts]]:
    """The layers of a model that are served packed: key of the place (see `place`) to (name in the model, layer).

    Raises:
        CheckpointError: when two of them could own the same stored tensors.
    """
    found: dict[object, tuple[str, RoutedExperts]] = {}
    for name, module in model.named_modules():
        if isinstance(module, RoutedExperts) and isinstance(module.quant_method, method_class):
            key = place(module.layer_name)
            if key in found:
                raise CheckpointError(
                    f"{type(model).__name__} has two layers for the same packed experts, {found[key][0]} and {name}; "
                    "run this checkpoint with transformers"
                )
            found[key] = name, module
    return found


def place(name: str) -> object:
    """What is the same in the names that files and vLLM have for one layer's experts."""
    numbered = _NUMBERED.fullmatch(name)
    return (is_mtp(name, None), *numbered.groups()) if numbered else name


def _missing(model: torch.nn.Module, loaded: set[str]) -> frozenset[str]:
    """Names of the parameters that no file held and that a file has to hold.

    It need not hold, as in vLLM's own check, scales of the key-value cache, a bound from config.json and what is empty.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    there = {id(named[name]) for name in loaded & named.keys()}  # under any of its names
    missing = {
        name
        for name, parameter in model.named_parameters()
        if parameter.numel() and id(parameter) not in there and name.rsplit(".", 1)[-1] not in _FROM_CONFIG
    }
    for name, module in model.named_modules():
        if isinstance(getattr(module, "quant_method", None), BaseKVCacheMethod):
            missing -= {f"{name}.{leaf}" for leaf, _ in module.named_parameters()}
    return frozenset(missing)


def _rest(
    weights: Iterable[tuple[str, torch.Tensor]], layers: dict[object, tuple[str, RoutedExperts]], is_draft: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights:
        stored = _TENSOR.fullmatch(name)
        owner = layers.get(place(stored[1])) if stored else None
        if stored and owner:
            owner[1].quant_method.take(owner[1], stored[2], tensor)
        elif stored and is_draft and is_mtp(name, None):
            raise CheckpointError(
                f"{name}: packed, but no target of config.json names a layer for multi-token prediction; quantize the "
                "source again, or serve without --speculative-config"
            )
        else:
            yield name, tensor
