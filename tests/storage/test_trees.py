"""Nested dataclasses go to tensors and JSON and come back the same, to the last bit."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from bitsmoe_modifier.storage.trees import put_together, taken_apart


@dataclass(frozen=True)
class Leaf:
    value: torch.Tensor | None
    scale: float


@dataclass(frozen=True)
class Tree:
    leaves: tuple[Leaf, ...]
    name: str
    sizes: tuple[int, ...]
    flag: bool = True


def same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, Leaf):
        return isinstance(two, Leaf) and same(one.value, two.value) and one.scale == two.scale
    return one == two


def test_there_and_back() -> None:
    shared = torch.arange(12, dtype=torch.float64).view(3, 4)
    tree = Tree((Leaf(shared, 0.1), Leaf(None, 1 / 3), Leaf(shared[1:], -0.0)), "x.y 3", (3, 0))
    tensors, notes = taken_apart([("layer", tree)])
    pointers = [tensor.untyped_storage().data_ptr() for tensor in tensors.values()]
    assert len(set(pointers)) == len(pointers) == 2, "safetensors refuses tensors that share memory"
    ((name, back),) = put_together(json.loads(json.dumps(notes)), tensors, [Tree, Leaf])
    assert (name, back.name, back.sizes, back.flag) == ("layer", tree.name, tree.sizes, True)
    assert all(same(a, b) for a, b in zip(tree.leaves, back.leaves, strict=True))


def test_what_cannot_be_kept_is_named() -> None:
    with pytest.raises(TypeError, match=r"^0\.value is a complex"):
        taken_apart([Leaf(3j, 1.0)])  # type: ignore[arg-type]
    tensors, notes = taken_apart(Leaf(torch.ones(1), 1.0))
    with pytest.raises(KeyError):
        put_together(notes, tensors, [Tree])
