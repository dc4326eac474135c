"""The layer's method by itself: activation settings, padding, routing weights on the input, parallel settings."""

from types import SimpleNamespace

import pytest
import torch

from bitsmoe_modifier.errors import CheckpointError
from bitsmoe_modifier.method.gating import Gating
from bitsmoe_modifier.runtime.experts import BitsMoEExperts
from helpers import random_layer

pytestmark = pytest.mark.vllm


def moe(activation: str, **settings: float) -> SimpleNamespace:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    unset = {"swiglu_limit": None, "swiglu_alpha": None, "swiglu_beta": None}
    return SimpleNamespace(activation=MoEActivation(activation), **{**unset, **settings})


@pytest.mark.parametrize(
    ("activation", "settings", "expected"),
    [
        ("silu", {}, Gating("silu")),
        ("gelu", {}, Gating("gelu")),
        ("gelu_tanh", {}, Gating("gelu_tanh")),
        ("silu", {"swiglu_limit": 10.0}, Gating("silu", limit=10.0)),
        ("relu2_no_mul", {}, Gating("relu2", up_shift=1.0)),
        ("silu_no_mul", {}, Gating("silu", up_shift=1.0)),
        ("swiglustep", {}, Gating("silu", limit=7.0, late_limit=True)),
        ("swigluoai", {}, Gating("silu", limit=7.0, alpha=1.702, up_shift=1.0)),
        (
            "swigluoai_uninterleave",
            {"swiglu_limit": 5.0, "swiglu_alpha": 1.5, "swiglu_beta": 1.0},
            Gating("silu", limit=5.0, alpha=1.5, up_shift=1.0),
        ),
    ],
)
def test_gating_of_layer(activation: str, settings: dict[str, float], expected: Gating) -> None:
    from bitsmoe_modifier.serving.gating import gating_of_layer

    assert gating_of_layer(moe(activation, **settings), "layer") == expected


@pytest.mark.parametrize("activation", ["relu2", "situ"])
def test_other_activations_are_refused(activation: str) -> None:
    from bitsmoe_modifier.serving.gating import gating_of_layer

    with pytest.raises(CheckpointError, match=rf"layers\.2: experts with the activation '{activation}'"):
        gating_of_layer(moe(activation), "layers.2")


@pytest.fixture
def layer() -> SimpleNamespace:
    packed = BitsMoEExperts(random_layer(bias=True).packed, Gating())
    return SimpleNamespace(packed=packed, expert_map=None, apply_router_weight_on_input=False)


def run(layer: SimpleNamespace, x: torch.Tensor, p: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    from bitsmoe_modifier.serving.method import BitsMoEMethod

    return BitsMoEMethod.run(None, layer, x, p, ids)


X = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[0, 3], [1, 2], [2, 0], [3, 1], [0, 1]])
P = torch.rand(5, 2, generator=torch.Generator().manual_seed(1))


def test_padded_hidden_states(layer: SimpleNamespace) -> None:
    padded = torch.nn.functional.pad(X, (0, 16), value=3.0)
    found = run(layer, padded, P, IDS)
    assert torch.equal(found[:, :64], layer.packed(X, IDS, P))
    assert torch.equal(found[:, 64:], torch.zeros(5, 16))


def test_router_weight_on_the_input(layer: SimpleNamespace) -> None:
    layer.apply_router_weight_on_input = True
    found = run(layer, X, P[:, :1], IDS[:, :1])
    assert torch.equal(found, layer.packed(X * P[:, :1], IDS[:, :1], torch.ones(5, 1)))


def test_experts_of_other_ranks_add_nothing(layer: SimpleNamespace) -> None:
    layer.expert_map = torch.tensor([-1, 0, -1, 1, 2, 3], dtype=torch.int32)
    local = torch.tensor([[-1, 1], [0, -1], [-1, -1], [1, 0], [-1, 0]])
    assert torch.equal(run(layer, X, P, IDS.int()), layer.packed(X, local, P))


@pytest.mark.parametrize("experts", [None, [2, -1, 0, 1]], ids=["all experts", "this rank's"])
def test_padding_adds_nothing(layer: SimpleNamespace, experts: list[int] | None) -> None:
    """Data parallel ranks pad their tokens, with -1 for an expert; the last expert is on this rank."""
    layer.expert_map = None if experts is None else torch.tensor(experts, dtype=torch.int32)
    padded = torch.cat([IDS[:3], torch.full((2, 2), -1)])
    found = run(layer, X, P, padded.int())
    torch.testing.assert_close(found[:3], run(layer, X[:3], P[:3], IDS[:3].int()))  # products of other sizes
    assert torch.equal(found[3:], torch.zeros(2, 64))


@pytest.mark.parametrize(("backend", "used", "refused"), [("deepep_low_latency", True, True), ("pplx", False, False)])
def test_token_exchange_with_ids_of_its_own_is_refused(backend: str, used: bool, refused: bool) -> None:
    from bitsmoe_modifier.serving.method import _check_parallel

    parallel = SimpleNamespace(use_all2all_kernels=used, all2all_backend=backend)
    if refused:
        with pytest.raises(CheckpointError, match=f"layers.2: .*'{backend}'; use --all2all-backend"):
            _check_parallel(parallel, "layers.2")
    else:
        _check_parallel(parallel, "layers.2")
