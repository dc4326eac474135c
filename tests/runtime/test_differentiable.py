"""Gradients through packed experts whose forward pass runs in kernels."""

import sys
import types

import pytest
import torch

from bitsmoe_modifier.method.gating import Gating
from bitsmoe_modifier.runtime import experts
from bitsmoe_modifier.runtime.experts import BitsMoEExperts
from helpers import random_layer


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, ids and p of nine tokens that choose two of four experts."""
    gen = torch.Generator().manual_seed(0)
    ids = torch.rand(9, 4, generator=gen).argsort(1)[:, :2]
    return torch.randn(9, 64, generator=gen), ids, torch.rand(9, 2, generator=gen)


def apart(made: torch.Tensor, known: torch.Tensor) -> float:
    """Relative difference."""
    return float((made - known).norm() / known.norm())


@pytest.mark.parametrize(
    "kind",
    [{}, {"stripes": 2}, {"bias": True, "dense": (2,), "basis_bits": (8, 0)}],
    ids=["bases", "trellis", "dense-bias"],
)
def test_gradients_go_through_the_kernels(kind: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which have none of their own: without help an adapter on the attention before them would learn nonsense."""
    layer = random_layer(**kind)
    module = BitsMoEExperts(layer.packed, Gating())
    calls: list[torch.Tensor] = []

    def kernel(x: torch.Tensor, ids: torch.Tensor, p: torch.Tensor, experts: object, gating: Gating) -> torch.Tensor:
        with torch.no_grad():
            calls.append(BitsMoEExperts(layer.packed, gating).forward_plain(x.detach(), ids, p.detach()))
        return calls[-1]

    kernels = types.ModuleType("bitsmoe_kernels")
    kernels.moe_forward = kernel
    x, ids, p = (t.requires_grad_(t.is_floating_point()) for t in inputs())
    module.forward_plain(x, ids, p).square().sum().backward()
    expected, x.grad, p.grad = (x.grad, p.grad), None, None
    assert all(float(one.norm()) > 0 for one in expected)

    monkeypatch.setitem(sys.modules, "bitsmoe_kernels", kernels)
    monkeypatch.setattr(experts, "kernels_wanted", lambda _: True)
    monkeypatch.setattr(module, "_prepare_kernels", lambda _: "prepared")
    module(x, ids, p).square().sum().backward()
    assert len(calls) == 1
    for made, known in zip((x.grad, p.grad), expected, strict=True):
        assert apart(made, known) < 1e-5
    x.grad = None
    module(x, ids, p.detach()).square().sum().backward()
    assert apart(x.grad, expected[0]) < 1e-5
    with torch.no_grad():
        assert not module(x, ids, p).requires_grad
    assert not module(x.detach(), ids, p.detach()).requires_grad
