"""Hard numbers: whatever a layer holds, the result is finite and says what was done, or an error names the cause."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsmoe_modifier.errors import CalibrationError
from bitsmoe_modifier.method.candidates import plan_layer
from bitsmoe_modifier.method.gating import Gating
from bitsmoe_modifier.method.layer import DenseExperts, QuantizerSettings
from bitsmoe_modifier.method.numerics import all_finite, collected, note
from bitsmoe_modifier.method.quantize import LayerReport, quantize_layer
from bitsmoe_modifier.method.rounding import feedback_factor
from bitsmoe_modifier.method.spectral import symmetric_sqrt
from bitsmoe_modifier.method.statistics import RoutedTokens
from bitsmoe_modifier.runtime.experts import BitsMoEExperts
from bitsmoe_modifier.storage.packed import PackedExperts, check_content, check_structure

EXPERTS, HIDDEN, WIDTH, TOKENS, CHOICES = 4, 32, 32, 128, 2
SETTINGS = QuantizerSettings(bits=3.0, group_size=16, block_size=8, solver="lagrangian")
PLAIN = replace(SETTINGS, input_basis="none", output_basis="none", error_feedback=False)


@dataclass
class Layer:
    """A layer's weights, inputs and routing, to be made hard."""

    x: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    ids: torch.Tensor
    p: torch.Tensor

    def run(
        self, settings: QuantizerSettings = SETTINGS, metric: torch.Tensor | None = None
    ) -> tuple[PackedExperts, LayerReport]:
        experts = DenseExperts(self.gate_up, self.down, Gating("silu"))
        tokens = RoutedTokens.from_router(self.x, self.ids, self.p, EXPERTS)
        design = plan_layer(experts, tokens, settings, metric).choose(settings.bits * experts.elements)
        packed, report = quantize_layer(experts, tokens, design, settings, metric)
        check_structure(dict(packed.items()), "layer")
        check_content(packed, "layer")
        return packed, report


def make_layer(seed: int = 0) -> Layer:
    gen = torch.Generator().manual_seed(seed)
    p = torch.rand(TOKENS, CHOICES, generator=gen)
    return Layer(
        x=torch.randn(TOKENS, HIDDEN, generator=gen) * torch.linspace(0.2, 3, HIDDEN),
        gate_up=torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, generator=gen) / HIDDEN**0.5,
        down=torch.randn(EXPERTS, HIDDEN, WIDTH, generator=gen) / WIDTH**0.5,
        ids=torch.stack([torch.randperm(EXPERTS, generator=gen)[:CHOICES] for _ in range(TOKENS)]),
        p=p / p.sum(1, keepdim=True),
    )


def _few_experts(layer: Layer) -> None:
    layer.ids = torch.tensor([[0, 1]]).repeat(TOKENS, 1)


def _one_token(layer: Layer) -> None:
    layer.x, layer.ids, layer.p = layer.x[:1], layer.ids[:1], layer.p[:1]


def _constant_inputs(layer: Layer) -> None:
    layer.x = layer.x[:1].repeat(TOKENS, 1)


def _zero_inputs(layer: Layer) -> None:
    layer.x.zero_()


def _two_dimensional_inputs(layer: Layer) -> None:
    layer.x = layer.x[:, :2] @ layer.x[:2]


def _dead_channels(layer: Layer) -> None:
    layer.x[:, HIDDEN // 2 :] = 0


def _equal_experts(layer: Layer) -> None:
    layer.gate_up[:], layer.down[:] = layer.gate_up[:1].clone(), layer.down[:1].clone()


def _zero_expert(layer: Layer) -> None:
    layer.gate_up[1], layer.down[1] = 0, 0


def _zero_experts(layer: Layer) -> None:
    layer.gate_up.zero_()
    layer.down.zero_()


def _zero_routing_weights(layer: Layer) -> None:
    layer.p.zero_()


def _an_expert_without_weight(layer: Layer) -> None:
    layer.p[layer.ids == 2] = 0


def _subnormal_inputs(layer: Layer) -> None:
    layer.x *= 1e-40


def _subnormal_weights(layer: Layer) -> None:
    layer.gate_up *= 1e-40


def _massive_activation(layer: Layer) -> None:
    layer.x[5, 3] = 1e6


def _large_weight(layer: Layer) -> None:
    layer.gate_up[1, 3, 4] = 1e4


HARD: tuple[Callable[[Layer], None], ...] = (
    _few_experts,
    _one_token,
    _constant_inputs,
    _zero_inputs,
    _two_dimensional_inputs,
    _dead_channels,
    _equal_experts,
    _zero_expert,
    _zero_experts,
    _zero_routing_weights,
    _an_expert_without_weight,
    _subnormal_inputs,
    _subnormal_weights,
    _massive_activation,
    _large_weight,
)


def _name(value: object) -> str:
    return getattr(value, "__name__", str(value)).strip("_")


@pytest.mark.parametrize("settings", [SETTINGS, PLAIN], ids=["spectral", "plain"])
@pytest.mark.parametrize("make_hard", HARD, ids=_name)
def test_hard_layers_are_quantized(make_hard: Callable[[Layer], None], settings: QuantizerSettings) -> None:
    """Finite, within the budget, and about as good as an ordinary layer at these bits."""
    layer = make_layer()
    ordinary = layer.run(settings)[1].relative_output_error
    make_hard(layer)
    packed, report = layer.run(settings)
    module = BitsMoEExperts(packed, Gating("silu"))
    assert all(bool(torch.isfinite(w).all()) for w in module.dense_weights())
    assert bool(torch.isfinite(module.forward_plain(layer.x, layer.ids, layer.p)).all())
    assert report.bits <= settings.bits
    assert report.relative_output_error < 1.5 * ordinary
    unseen = report.tokens_per_expert.count(0)
    said = [text for text in report.warnings if "got no calibration tokens" in text]
    assert said == ([] if not unseen else said[:1])
    assert not unseen or said[0].startswith(f"{unseen} experts")


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    combination=st.lists(st.sampled_from(HARD), min_size=1, max_size=3, unique=True),
    scales=st.tuples(*[st.floats(-20, 20)] * 3),
    seed=st.integers(0, 3),
    feedback=st.booleans(),
)
def test_any_combination_at_any_scale(
    combination: list[Callable[[Layer], None]], scales: tuple[float, float, float], seed: int, feedback: bool
) -> None:
    """Weights and inputs from 1e-20 to 1e20: a valid layer with finite weights, or an error of ours."""
    layer = make_layer(seed)
    for make_hard in combination:
        make_hard(layer)
    for tensor, exponent in zip((layer.x, layer.gate_up, layer.down), scales, strict=True):
        tensor *= 10.0**exponent
    try:
        packed, report = layer.run(replace(SETTINGS, error_feedback=feedback))
    except CalibrationError as caught:
        refusal = str(caught)
    else:
        refusal = ""
    if refusal:
        assert "overflow" in refusal
        return
    assert all(bool(torch.isfinite(w).all()) for w in BitsMoEExperts(packed, Gating("silu")).dense_weights())
    lost = not report.relative_output_error <= 0.5
    assert lost == any("of the layer's output power" in text for text in report.warnings)


# ------------------------------------------------------------------------------------------------------ what is said


def test_ordinary_layers_say_nothing() -> None:
    assert make_layer().run()[1].warnings == ()


@pytest.mark.parametrize(
    ("scale", "said"),
    [
        (4e3, r"\d+ of \d+ steps were cut to 480, .*`super_experts`"),
        (1e-6, r"\d+ of \d+ steps were raised to 1.2e-07, .*`ignore`"),
        (1e-9, r"rounding loses 100 % of the layer's output power; raise `bits`"),
    ],
)
def test_steps_out_of_range(scale: float, said: str) -> None:
    layer = make_layer()
    layer.gate_up *= scale
    (warning,) = layer.run(PLAIN)[1].warnings
    with pytest.raises(ValueError, match=said):
        raise ValueError(warning)


def test_what_the_predictions_do_not_miss_is_no_trouble() -> None:
    """Global allocation may take nearly all bits from a layer whose errors cost little."""
    plain, weighed = replace(PLAIN, bits=0.4), torch.eye(HIDDEN) * 1e-6
    assert any("output power" in text for text in make_layer().run(plain)[1].warnings)
    _, report = make_layer().run(plain, weighed)
    assert report.relative_output_error > 0.5
    assert report.warnings == ()


def test_costs_that_overflow_are_an_error() -> None:
    layer = make_layer()
    layer.gate_up[1, 3, 4] = 1e18
    with pytest.raises(CalibrationError, match="the squares of its rounding errors overflow; check the base model"):
        layer.run(PLAIN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_finite_finds_one_bad_element(dtype: torch.dtype) -> None:
    values = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert bool(all_finite(values))
    assert bool(all_finite(values[:0]))
    for bad in (torch.nan, torch.inf, -torch.inf):
        for place in (0, 5, 230):
            broken = values.clone()
            broken.view(-1)[place] = bad
            assert not bool(all_finite(broken))


def test_indefinite_moments_are_damped_and_said() -> None:
    """Sums in float32 can leave a singular moment with a negative eigenvalue."""
    moment = torch.diag(torch.tensor([4.0, 1.0, -0.1]))
    notes: list[str] = []
    with collected(notes):
        factor = feedback_factor(moment[None], torch.arange(3)[None])
    assert bool(torch.isfinite(factor).all())
    assert len(notes) == 1
    assert "could not be factored" in notes[0]
    assert "raise `dampening_frac`" in notes[0]
    with collected(notes):
        root, inverse = symmetric_sqrt(moment, 1e-3)
    assert bool(torch.isfinite(root).all() and torch.isfinite(inverse).all())
    assert len(notes) == 2
    assert "singular even with its dampening" in notes[1]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_moments_that_overflow_are_an_error(value: float) -> None:
    moments = torch.eye(4).repeat(2, 1, 1)
    moments[1, 2, 3] = moments[1, 3, 2] = value
    with pytest.raises(CalibrationError, match="second moments of its experts overflow; check the base model"):
        feedback_factor(moments, torch.arange(4).repeat(2, 1))


def test_notes_are_collected_once_and_where_they_were_said() -> None:
    note("nobody hears this")
    outer: list[str] = []
    inner: list[str] = []
    with collected(outer):
        note("one")
        with collected(inner):
            note("two")
            note("two")
        note("three")
    assert (outer, inner) == (["one", "three"], ["two"])
