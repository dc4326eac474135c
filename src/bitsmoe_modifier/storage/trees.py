"""Nested dataclasses of tensors as a safetensors file can hold them: tensors by name, and all the rest as JSON."""

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch

_TENSOR, _KIND, _ITEMS = "tensor", "kind", "items"


def taken_apart(value: Any, name: str = "") -> tuple[dict[str, torch.Tensor], Any]:
    """The tensors of a value by the path to them, and everything else.

    Args:
        value: dataclasses, tuples and lists of tensors, numbers, strings and None, nested as they like.
        name: path of the value itself.

    Returns:
        (tensors, none of which shares its memory with another; notes in JSON types).

    Raises:
        TypeError: for anything else, naming its path.
    """
    tensors: dict[str, torch.Tensor] = {}
    memory: set[int] = set()

    def walk(part: Any, at: str) -> Any:
        if isinstance(part, torch.Tensor):
            shared = part.untyped_storage().data_ptr() in memory
            memory.add(part.untyped_storage().data_ptr())
            tensors[at] = part.clone() if shared else part
            return {_TENSOR: at}
        if is_dataclass(part) and not isinstance(part, type):
            inside = {field.name: walk(getattr(part, field.name), _below(at, field.name)) for field in fields(part)}
            return {_KIND: type(part).__name__, _ITEMS: inside}
        if isinstance(part, (tuple, list)):
            return [walk(item, _below(at, str(number))) for number, item in enumerate(part)]
        if part is None or isinstance(part, (bool, int, float, str)):
            return part
        raise TypeError(f"{at or 'the value'} is a {type(part).__name__}, which cannot be kept")

    notes = walk(value, name)
    return tensors, notes


def put_together(notes: Any, tensors: Mapping[str, torch.Tensor], kinds: Iterable[type]) -> Any:
    """The inverse of `taken_apart`; lists come back as tuples.

    Args:
        notes, tensors: what `taken_apart` returned.
        kinds: the dataclasses that may be in there.

    Raises:
        KeyError: for a class that is not among ``kinds``, or a tensor that is not there.
        TypeError: when a class has other fields than it had then.
    """
    known = {kind.__name__: kind for kind in kinds}

    def walk(part: Any) -> Any:
        if isinstance(part, dict):
            if _TENSOR in part:
                return tensors[part[_TENSOR]]
            return known[part[_KIND]](**{name: walk(item) for name, item in part[_ITEMS].items()})
        return tuple(walk(item) for item in part) if isinstance(part, list) else part

    return walk(notes)


def _below(at: str, name: str) -> str:
    return f"{at}.{name}" if at else name
