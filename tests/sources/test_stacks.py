"""Experts in files answer like the tensors that they stand for."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bitsmoe_modifier.sources.stacks import StoredStack, Turned, read_parameters, stored_parameters
from bitsmoe_modifier.storage.shards import scan


@pytest.fixture(params=["fused", "one by one"])
def stack(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[StoredStack, torch.Tensor]:
    """4 experts of 6 × 5: one tensor, or two matrices of each expert."""
    whole = torch.randn(4, 6, 5).bfloat16()
    tensors = {"all": whole} if request.param == "fused" else {}
    for expert in range(4 if request.param != "fused" else 0):
        tensors[f"{expert}.gate"], tensors[f"{expert}.up"] = whole[expert, :2].clone(), whole[expert, 2:].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    found = scan([str(tmp_path / "model.safetensors")])
    pieces = found.get("all") or [(found[f"{e}.gate"], found[f"{e}.up"]) for e in range(4)]
    return StoredStack((4, 6, 5), pieces, torch.float32), whole.float()


@pytest.mark.parametrize(
    "index",
    [2, -1, torch.tensor(1), slice(1, 3), slice(None), slice(4, None), [3, 0], torch.tensor([2, 2]), (1, slice(2))],
    ids=str,
)
def test_any_index(stack: tuple[StoredStack, torch.Tensor], index: object) -> None:
    stored, whole = stack
    assert torch.equal(stored[index], whole[index])
    turned = Turned(stored, lambda matrix: matrix.T)
    assert torch.equal(turned[index if not isinstance(index, tuple) else 1], whole.transpose(1, 2)[_first(index)])


def _first(index: object) -> object:
    return index[0] if isinstance(index, tuple) else index


def test_sizes(stack: tuple[StoredStack, torch.Tensor]) -> None:
    stored, whole = stack
    assert (stored.shape, len(stored), stored.numel(), stored.ndim) == (whole.shape, 4, whole.numel(), 3)
    assert Turned(stored, lambda matrix: matrix.T).shape == (4, 5, 6)
    assert [one.shape for one in stored] == [(6, 5)] * 4
    stored.dtype = torch.bfloat16
    assert stored[0].dtype == torch.bfloat16
    assert stored.element_size() == 2


def test_read_into_a_module(stack: tuple[StoredStack, torch.Tensor]) -> None:
    stored, whole = stack
    module = nn.Module()
    module.down_proj = stored
    assert stored_parameters(module) == {"down_proj": stored}
    assert not dict(module.named_parameters())
    read_parameters(module)
    assert torch.equal(module.down_proj, whole)
    assert not stored_parameters(module)
