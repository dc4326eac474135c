"""Collecting, checking and cutting a layer's tensors; needs no vLLM."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bitsmoe_modifier.errors import CheckpointError
from bitsmoe_modifier.serving.loading import LayerLoader, Part, local_experts
from bitsmoe_modifier.storage.packed import PackedExperts
from bitsmoe_modifier.storage.sharding import shard
from helpers import random_layer

CPU = torch.device("cpu")
WHOLE = random_layer(6, 64, 96, dense=(2,), bias=True).packed


def part(**changes: object) -> Part:
    sizes = {"num_experts": 6, "hidden_size": 64, "intermediate_size": 96, "has_bias": True}
    return Part("model.layers.3.mlp.experts", **{**sizes, **changes})


def loader_with(packed: PackedExperts = WHOLE, **changes: object) -> LayerLoader:
    loader = LayerLoader(part(**changes))
    for name, tensor in packed.items():
        loader.add(name, tensor)
    return loader


@pytest.mark.parametrize(
    ("rank", "size", "experts"), [(0, 1, None), (1, 3, None), (0, 1, (4, 2)), (1, 2, (5,))], ids=str
)
def test_cuts_what_shard_cuts(rank: int, size: int, experts: tuple[int, ...] | None) -> None:
    found = loader_with(tp_rank=rank, tp_size=size, experts=experts).cut(CPU)
    for (name, tensor), (other, expected) in zip(found.items(), shard(WHOLE, rank, size, experts).items(), strict=True):
        assert name == other
        assert torch.equal(tensor, expected)


def test_keeps_no_memory_of_the_checkpoint() -> None:
    mapped = [(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for _, t in WHOLE.items()]
    for tp_size, experts in ((1, None), (2, None), (1, (3, 4))):
        for name, tensor in loader_with(tp_size=tp_size, experts=experts).cut(CPU).items():
            start = tensor.untyped_storage().data_ptr()
            assert not any(at <= start < at + size for at, size in mapped), name
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


def test_complete_only_with_the_last_tensor() -> None:
    loader = LayerLoader(part())
    names = [name for name, _ in WHOLE.items()]
    assert loader.empty
    for name in sorted(names):
        assert not loader.complete
        loader.add(name, getattr(WHOLE, name))
    assert loader.complete
    loader.cut(CPU)
    assert loader.empty


@pytest.mark.parametrize("name", [name for name, _ in WHOLE.items()])
def test_names_what_is_missing(name: str) -> None:
    loader = LayerLoader(part())
    for other, tensor in WHOLE.items():
        if other != name:
            loader.add(other, tensor)
    assert not loader.complete
    with pytest.raises(CheckpointError, match=rf"model\.layers\.3\.mlp\.experts\.{name}: missing"):
        loader.cut(CPU)


@pytest.mark.parametrize("name", ["codes_in", "steps_out", "basis_in", "dense_out", "widths_out", "layout"])
def test_names_what_is_of_another_size(name: str) -> None:
    loader = LayerLoader(part())
    for other, tensor in WHOLE.items():
        loader.add(other, tensor[:-1] if other == name else tensor)
    with pytest.raises(CheckpointError, match=rf"experts\.{name}"):
        loader.cut(CPU)


@pytest.mark.parametrize("name", ["codes_in", "codes_out", "basis_in", "dense_in", "out_bias"])
def test_names_what_is_damaged(name: str) -> None:
    loader = LayerLoader(part())
    for other, tensor in WHOLE.items():
        damaged = tensor.clone()
        if other == name:
            damaged.view(torch.uint8).flatten()[7] ^= 1
        loader.add(other, damaged)
    with pytest.raises(CheckpointError, match=rf"experts\.{name}: the checksum does not match"):
        loader.cut(CPU)


@pytest.mark.parametrize(
    "changes",
    [{"num_experts": 8}, {"hidden_size": 128}, {"intermediate_size": 192}, {"has_bias": False}],
    ids=lambda changes: next(iter(changes)),
)
def test_refuses_another_model(changes: dict[str, object]) -> None:
    (field,) = changes
    with pytest.raises(CheckpointError, match=rf"experts\.layout: {field} is .* do not belong together"):
        loader_with(**changes).cut(CPU)


def test_refuses_unknown_and_repeated_names() -> None:
    loader = LayerLoader(part())
    with pytest.raises(CheckpointError, match=r"mlp\.experts\.w13_weight: packed experts have no such tensor"):
        loader.add("w13_weight", torch.zeros(1))
    loader.add("codes_in", WHOLE.codes_in)
    with pytest.raises(CheckpointError, match=r"mlp\.experts\.codes_in: is stored twice"):
        loader.add("codes_in", WHOLE.codes_in)


def test_names_the_layer_that_cannot_be_cut() -> None:
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.mlp\.experts: 4 tensor-parallel ranks"):
        loader_with(tp_size=4).cut(CPU)


def test_local_experts_follow_their_local_ids() -> None:
    assert local_experts(None) is None
    assert local_experts([0, 1, -1, -1]) == (0, 1)
    assert local_experts([-1, 1, -1, 0]) == (3, 1)


class PeakBytes(TorchDispatchMode):
    """Bytes of all storages that operations created and that are still alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._known.add(tensor.untyped_storage()._cdata)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._known:
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                self._known.add(key)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, key, size)
        return result

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


@pytest.mark.parametrize("changes", [{}, {"tp_size": 2, "tp_rank": 1}, {"experts": tuple(range(8))}], ids=str)
def test_peak_memory_is_the_shard_and_little_more(changes: dict[str, object]) -> None:
    layers, sizes = 8, {"num_experts": 16, "hidden_size": 128, "intermediate_size": 256, "has_bias": False}
    whole = random_layer(16, 128, 256, group_size=64, widths=(2, 4)).packed
    held = []
    with PeakBytes() as memory:
        for _ in range(layers):
            loader = LayerLoader(Part("layer", **{**sizes, **changes}))
            for name, tensor in whole.items():
                loader.add(name, tensor)
            held.append(loader.cut(CPU))
    total = sum(packed.nbytes for packed in held)
    assert memory.peak >= 0.9 * total  # the measurement sees the copies
    assert memory.peak <= 1.2 * total
