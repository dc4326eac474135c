"""The gate function: its formula, its slopes, and how it is read from experts modules."""

import math

import pytest
import torch
from torch import nn

from bitsmoe_modifier.errors import RecipeError
from bitsmoe_modifier.method.gating import Gating, gating_of
from helpers import ARCHITECTURES, experts_names, tiny_model


def scalar(gating: Gating, g: float, u: float) -> float:
    """The formula of the docstring with Python's floats."""
    if gating.limit is not None:
        g = g if gating.late_limit else min(g, gating.limit)
        u = max(-gating.limit, min(u, gating.limit))
    act = {
        "silu": lambda: g / (1 + math.exp(-gating.alpha * g)),
        "gelu": lambda: 0.5 * g * (1 + math.erf(g / math.sqrt(2))),
        "gelu_tanh": lambda: 0.5 * g * (1 + math.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))),
        "relu": lambda: max(g, 0.0),
        "relu2": lambda: max(g, 0.0) ** 2,
    }[gating.activation]()
    if gating.late_limit:
        act = min(act, gating.limit)
    return act * (u + gating.up_shift)


GATINGS = [
    Gating(),
    Gating("gelu"),
    Gating("gelu_tanh"),
    Gating("relu"),
    Gating("silu", limit=7.0, alpha=1.702, up_shift=1.0),
    Gating("gelu", limit=0.5),
    Gating("relu2", up_shift=1.0),
    Gating("silu", limit=0.5, late_limit=True),
]


@pytest.mark.parametrize("gating", GATINGS, ids=str)
def test_formula(gating: Gating) -> None:
    g, u = torch.linspace(-9, 9, 61, dtype=torch.float64), torch.linspace(8, -8.5, 61, dtype=torch.float64)
    values = [scalar(gating, *pair) for pair in zip(g.tolist(), u.tolist(), strict=True)]
    # a handful of float64 roundings (2e-16 each) of values below 100
    torch.testing.assert_close(gating(g, u), torch.tensor(values, dtype=torch.float64), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("gating", GATINGS, ids=str)
def test_slopes_exist_and_shape_and_dtype_stay(gating: Gating) -> None:
    g = torch.tensor([[0.31, -1.7], [12.0, 0.2]], dtype=torch.float64, requires_grad=True)
    u = torch.tensor([[1.1, 0.3], [-20.0, 0.4]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gating, (g, u))
    z = gating(g.detach().bfloat16(), u.detach().bfloat16())
    assert z.dtype == torch.bfloat16
    assert z.shape == g.shape


def test_unknown_activation_is_named() -> None:
    with pytest.raises(RecipeError, match=r"'tanh' is not supported; known: \['gelu'"):
        Gating("tanh")
    with pytest.raises(RecipeError, match="alpha is defined for silu only"):
        Gating("gelu", alpha=1.7)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tiny_models(architecture: str) -> None:
    model = tiny_model(architecture)
    assert {gating_of(model.get_submodule(name)) for name in experts_names(model)} == {Gating()}


@pytest.mark.parametrize(
    ("activation", "expected"), [("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("relu", "relu")]
)
def test_activation_of_the_config(activation: str, expected: str) -> None:
    model = tiny_model("qwen3_moe", hidden_act=activation, num_hidden_layers=1)
    assert gating_of(model.get_submodule(experts_names(model)[0])) == Gating(expected)


def test_gpt_oss_has_clamps_slope_and_shift() -> None:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig(hidden_size=16, intermediate_size=16, num_local_experts=2, num_hidden_layers=1)
    assert gating_of(GptOssExperts(config)) == Gating("silu", limit=7.0, alpha=1.702, up_shift=1.0)


class ClampedExperts(nn.Module):
    """As a family with a clamp far out (hy_v4's is at 10), which has an activation once it is linearized."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.act_fn, self.swiglu_limit = nn.SiLU(), limit

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate.clamp(max=self.swiglu_limit)) * up.clamp(-self.swiglu_limit, self.swiglu_limit)


@pytest.mark.parametrize("limit", [0.5, 10.0, 1000.0])
def test_clamps_far_out_are_seen(limit: float) -> None:
    assert gating_of(ClampedExperts(limit)) == Gating("silu", limit=limit)


class OddExperts(nn.Module):
    """A family with a formula of its own."""

    def __init__(self, act_fn: nn.Module) -> None:
        super().__init__()
        self.act_fn = act_fn

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate) * up.sin()


@pytest.mark.parametrize("act_fn", [nn.SiLU(), nn.Tanh()], ids=["formula", "activation"])
def test_unknown_formula_is_refused(act_fn: nn.Module) -> None:
    with pytest.raises(RecipeError, match=r"OddExperts combines gate and up in a way .* add its modules to `ignore`"):
        gating_of(OddExperts(act_fn))
