"""Handing packed experts to their layers before a model's own loading code sees them.

vLLM's model files load experts in many ways: through its `AutoWeightsLoader`, by looking parameters up by name, by
splitting fused tensors, and most rename what they read. None of them knows packed experts. So ``load_weights`` of the
model's outermost class, which every loader of vLLM calls, is wrapped: packed tensors leave the stream there, everything
else goes on to the model file as before.

A stored name belongs to a layer by the container of the layers, the layer's number and the last part
(``layers.3.….experts``), the same three parts as in config.json's targets. What lies before and between them differs
between transformers, files and vLLM (``model.language_model.layers.3.experts``, ``layers.3.moe.experts``).
"""

import functools
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..errors import CheckpointError
from ..storage.packed import TENSOR_NAMES
from .vllm_api import RoutedExperts

_MARK = "_bitsmoe_diverts"
_TENSOR = re.compile(r"(.+)\.(" + "|".join(TENSOR_NAMES) + ")")
_NUMBERED = re.compile(r"(?:.*\.)?([^.]+)\.(\d+)\.(?:[^.]+\.)?([^.]+)")


def divert(model_class: type, method_class: type) -> None:
    """Make ``load_weights`` of a model class give packed tensors to the layers whose method is a ``method_class``.

    Classes are changed once; models without such a layer load as before.
    """
    if _MARK in vars(model_class):
        return
    original: Any = model_class.load_weights  # type: ignore[attr-defined]

    @functools.wraps(original)
    def load_weights(self: torch.nn.Module, weights: Iterable[tuple[str, torch.Tensor]], *args: Any, **kw: Any) -> Any:
        layers = packed_layers(self, method_class)
        if not layers:
            return original(self, weights, *args, **kw)
        taken: set[str] = set()
        loaded = original(self, _rest(weights, layers, taken), *args, **kw)
        return loaded | taken if isinstance(loaded, set) else loaded

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
    return numbered.groups() if numbered else name


def _rest(
    weights: Iterable[tuple[str, torch.Tensor]], layers: dict[object, tuple[str, RoutedExperts]], taken: set[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights:
        stored = _TENSOR.fullmatch(name)
        owner = layers.get(place(stored[1])) if stored else None
        if stored and owner:
            owner[1].quant_method.take(owner[1], stored[2], tensor)
            taken.add(f"{owner[0]}.{stored[2]}")
        else:
            yield name, tensor
