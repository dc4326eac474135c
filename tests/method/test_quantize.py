"""One layer from dense experts to stored tensors, without any framework."""

import dataclasses
import itertools
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from bitsmoe_modifier.errors import CalibrationError, RecipeError
from bitsmoe_modifier.method import candidates, design, rounded, sides
from bitsmoe_modifier.method import layer as layer_module
from bitsmoe_modifier.method.candidates import plan_layer, super_experts
from bitsmoe_modifier.method.costs import chosen_steps, unit_cost
from bitsmoe_modifier.method.design import LayerPlan
from bitsmoe_modifier.method.gating import Gating
from bitsmoe_modifier.method.layer import DenseExperts, QuantizerSettings
from bitsmoe_modifier.method.quantize import LayerReport, quantize_layer
from bitsmoe_modifier.method.rounding import decode
from bitsmoe_modifier.method.statistics import RoutedTokens, collect_statistics
from bitsmoe_modifier.runtime.experts import BitsMoEExperts
from bitsmoe_modifier.storage.layout import ExpertsLayout
from bitsmoe_modifier.storage.packed import PackedExperts, check_content, check_structure
from helpers import other_defaults

CLAMPED = Gating("silu", limit=1.5, alpha=1.702, up_shift=1.0)
BASES = ("auto", "spectral", "none")


@dataclass(frozen=True)
class Layer:
    """A random layer with correlated inputs, as trained models have them, and its routing."""

    experts: DenseExperts
    x: torch.Tensor
    ids: torch.Tensor
    p: torch.Tensor

    @property
    def tokens(self) -> RoutedTokens:
        return RoutedTokens.from_router(self.x, self.ids, self.p, len(self.experts.down))

    @property
    def weights(self) -> int:
        return self.experts.gate_up.numel() + self.experts.down.numel()

    def plan(self, settings: QuantizerSettings, **kwargs: object) -> LayerPlan:
        return plan_layer(self.experts, self.tokens, settings, **kwargs)

    def run(self, settings: QuantizerSettings, **kwargs: object) -> tuple[PackedExperts, LayerReport]:
        return self.round(self.plan(settings, **kwargs), metric=kwargs.get("metric"))

    def round(self, plan: LayerPlan, **kwargs: object) -> tuple[PackedExperts, LayerReport]:
        design = plan.choose(plan.settings.bits * self.weights)
        return quantize_layer(self.experts, self.tokens, design, plan.settings, **kwargs)

    def dense_forward(self) -> torch.Tensor:
        """The routed experts' output in float64, biases of the output left out as the report does."""
        y = torch.zeros(len(self.x), self.experts.down.shape[1], dtype=torch.float64)
        for e in range(len(self.experts.down)):
            gate_up, down = self.experts.gate_up[e].double(), self.experts.down[e].double()
            token, choice = (self.ids == e).nonzero(as_tuple=True)
            a = self.x[token].double() @ gate_up.T
            if self.experts.in_bias is not None:
                a = a + self.experts.in_bias[e].double()
            out = self.experts.gating(*a.chunk(2, 1)) @ down.T
            y.index_add_(0, token, out * self.p[token, choice, None].double())
        return y

    def packed_forward(self, packed: PackedExperts) -> torch.Tensor:
        if packed.out_bias is not None:
            packed = dataclasses.replace(packed, out_bias=torch.zeros_like(packed.out_bias))
        module = BitsMoEExperts(packed, self.experts.gating)
        return module.forward_plain(self.x.float(), self.ids, self.p).double()

    def relative_error(self, packed: PackedExperts) -> float:
        exact = self.dense_forward()
        return float((self.packed_forward(packed) - exact).square().sum() / exact.square().sum())


def make_layer(
    *,
    num_experts: int = 6,
    hidden: int = 64,
    width: int = 48,
    tokens: int = 400,
    choices: int = 2,
    idle: int = 0,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    gating: Gating | None = None,
    seed: int = 0,
) -> Layer:
    gen = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen)

    mix = torch.linalg.qr(randn(hidden, hidden))[0] * torch.logspace(0.6, -1, hidden)
    x = randn(tokens, hidden) @ mix.T
    ids = torch.rand(tokens, num_experts - idle, generator=gen).argsort(1)[:, :choices]
    p = torch.rand(tokens, choices, generator=gen) + 0.1
    biases = (randn(num_experts, 2 * width) / 3, randn(num_experts, hidden) / 3) if bias else (None, None)
    experts = DenseExperts(
        (randn(num_experts, 2 * width, hidden) / hidden**0.5).to(dtype),
        (randn(num_experts, hidden, width) / width**0.5).to(dtype),
        gating or Gating(),
        *(None if b is None else b.to(dtype) for b in biases),
    )
    return Layer(experts, x.to(dtype), ids, p / p.sum(1, keepdim=True))


def settings(**changes: object) -> QuantizerSettings:
    """Of scalar codes, whose oracles are here; trellis codes have theirs in test_trellis.py."""
    return QuantizerSettings(**{"bits": 3.0, "codes": "scalar", "block_size": 16, "group_size": 16, **changes})


def unit_bits(layer: Layer, packed: PackedExperts) -> int:
    """Stored bits of all units, from the widths alone."""
    layout = ExpertsLayout.from_tensor(packed.layout)
    widths = torch.cat([packed.widths_in.flatten(), packed.widths_out.flatten()]).tolist()
    return sum(unit_cost(w, layout.block_size, layout.intermediate_size, layout.group_size) for w in widths)


def check_budget(layer: Layer, packed: PackedExperts, report: LayerReport, s: QuantizerSettings) -> None:
    """Never above; below by less than the cheapest thing left to buy, or everything is bought."""
    measured = 8 * sum(tensor.nbytes for _, tensor in packed.items())
    assert report.bits == measured / layer.weights == packed.bits_per_weight
    assert measured <= s.bits * layer.weights
    costs = sorted(unit_cost(w, s.block_size, layer.experts.down.shape[2], s.group_size) for w in s.widths)
    left = s.bits * layer.weights - measured
    widest = torch.cat([packed.widths_in.flatten(), packed.widths_out.flatten()]) == max(s.widths)
    assert left < max(np.diff(costs), default=0) or bool(widest.all())


LAYERS = {
    "plain": {},
    "one-choice": {"choices": 1},
    "idle-experts": {"idle": 3},
    "few-tokens": {"tokens": 20},
    "bias-clamped": {"bias": True, "gating": CLAMPED},
    "bfloat16": {"dtype": torch.bfloat16},
    "wide": {"num_experts": 3, "hidden": 40, "width": 88},
    "single-expert": {"num_experts": 1, "choices": 1},
}


# --------------------------------------------------------------------------------------------------- the whole


@pytest.mark.parametrize("kind", LAYERS)
def test_stored_tensors_do_what_the_report_says(kind: str) -> None:
    """Structure, checksums, budget, and the output error measured through the stored bytes alone."""
    layer, s = make_layer(**LAYERS[kind]), settings(bits=3.3, block_size=8, group_size=8)
    packed, report = layer.run(s)
    layout = check_structure(dict(packed.items()), "experts")
    check_content(packed, "experts")
    assert (layout.num_experts, layout.hidden_size) == layer.experts.down.shape[:2]
    check_budget(layer, packed, report, s)
    assert report.tokens_per_expert == layer.tokens.counts
    # two float32 evaluations of the same small difference
    assert layer.relative_error(packed) == pytest.approx(report.relative_output_error, rel=1e-2)
    assert report.relative_output_error < 0.2
    if layer.experts.in_bias is not None:
        assert torch.equal(packed.in_bias, layer.experts.in_bias)
        assert torch.equal(packed.out_bias, layer.experts.out_bias)
    for counts, units in zip(report.width_counts.values(), (1, 1, 1), strict=True):
        assert sum(counts.values()) == units * layout.num_experts * layout.hidden_size // 8


@pytest.mark.parametrize("bases", list(itertools.product(BASES, BASES)), ids="-".join)
def test_every_choice_of_bases(bases: tuple[str, str]) -> None:
    layer, s = make_layer(), settings(input_basis=bases[0], output_basis=bases[1])
    packed, report = layer.run(s)
    check_structure(dict(packed.items()), "experts")
    check_budget(layer, packed, report, s)
    stored = (packed.basis_in is not None, packed.basis_out is not None)
    assert (report.input_basis_bits > 0, report.output_basis_bits > 0) == stored
    for choice, there in zip(bases, stored, strict=True):
        assert there == (choice == "spectral") or choice == "auto"
    assert layer.relative_error(packed) == pytest.approx(report.relative_output_error, rel=1e-2)


def test_auto_takes_the_best_prediction() -> None:
    layer = make_layer()
    fixed = [
        layer.run(settings(input_basis=i, output_basis=o))[1].predicted_distortion
        for i, o in itertools.product(("spectral", "none"), repeat=2)
    ]
    assert layer.run(settings())[1].predicted_distortion == pytest.approx(min(fixed))


@pytest.mark.parametrize("basis_bits", [4, 8, 16])
def test_basis_bits(basis_bits: int) -> None:
    layer = make_layer()
    s = settings(basis_bits=basis_bits, input_basis="spectral", output_basis="spectral", bits=4.0)
    packed, report = layer.run(s)
    assert (report.input_basis_bits, report.output_basis_bits) == (basis_bits, basis_bits)
    assert report.warnings == ()
    check_structure(dict(packed.items()), "experts")
    check_budget(layer, packed, report, s)


@pytest.mark.parametrize("widths", [(1,), (3,), (8,), (0, 1), (1, 3, 8), (0, 8), (0, 1, 2, 3, 4, 6, 8)], ids=str)
def test_every_width(widths: tuple[int, ...]) -> None:
    layer, s = make_layer(), settings(bits=min(max(widths) + 1.9, 5.2 if 0 in widths or 1 in widths else 9.9))
    s = dataclasses.replace(s, widths=widths)
    packed, report = layer.run(s)
    assert set(packed.widths_in.unique().tolist()) | set(packed.widths_out.unique().tolist()) <= set(widths)
    check_structure(dict(packed.items()), "experts")
    check_budget(layer, packed, report, s)
    assert layer.relative_error(packed) == pytest.approx(report.relative_output_error, rel=1e-2)


@pytest.mark.parametrize("solver", ["highs", "pulp", "lagrangian"])
def test_every_solver(solver: str) -> None:
    layer, s = make_layer(num_experts=3), settings(solver=solver, input_basis="none")
    packed, report = layer.run(s)
    assert report.solver == solver
    assert report.allocation_gap >= 0
    check_budget(layer, packed, report, s)


def test_output_error_falls_with_the_bits() -> None:
    layer = make_layer()
    errors = [layer.run(settings(bits=b))[1].relative_output_error for b in (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]
    assert all(more < 0.85 * less for less, more in itertools.pairwise(errors))
    assert errors[0] < 1.0
    assert errors[-1] < 0.01


@pytest.mark.parametrize("seed", range(3))
def test_error_feedback_pays(seed: int) -> None:
    layer = make_layer(seed=seed, tokens=600)
    off, on = (layer.run(settings(error_feedback=f))[1].relative_output_error for f in (False, True))
    assert on < 0.95 * off


@pytest.mark.parametrize("seed", range(3))
def test_compensation_pays(seed: int) -> None:
    """Less output error at the same widths and bytes, with and without a metric."""
    layer = make_layer(seed=seed, tokens=1500)
    root = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)) + 2 * torch.eye(64)
    for metric in (None, root @ root.T):
        off, on = (layer.run(settings(bits=2.0, compensation=c), metric=metric)[0] for c in (False, True))
        assert torch.equal(off.widths_in, on.widths_in)
        cost = []
        for packed in (off, on):
            rest = (layer.packed_forward(packed) - layer.dense_forward()).float()
            cost.append(float((rest @ (torch.eye(64) if metric is None else metric) * rest).sum()))
        assert cost[1] < 0.97 * cost[0]


def test_compensated_factors_are_the_least_squares() -> None:
    """F' ẑ is nearest F z over the samples, against a solver of plain least squares."""
    gen = torch.Generator().manual_seed(0)
    z = torch.randn(2, 500, 24, generator=gen)
    left = z + 0.3 * torch.randn(2, 500, 24, generator=gen) * z.abs()
    factor = torch.randn(2, 10, 24, generator=gen)
    moments, lost = left.transpose(1, 2) @ left, (z - left).transpose(1, 2) @ left
    got = sides._compensated(factor, moments, lost)
    expected = torch.linalg.lstsq(left.double(), (z @ factor.transpose(1, 2)).double()).solution.transpose(1, 2)
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-4)


def test_experts_whose_moments_say_nothing_keep_their_weights() -> None:
    factor = torch.randn(3, 8, 16)
    nothing = torch.zeros(3, 16, 16)
    assert torch.equal(sides._compensated(factor, nothing, nothing), factor)


def test_rows_absorb_what_rows_before_them_lost() -> None:
    """Row feedback lowers the coupled error of many matrices together; without coupling it changes nothing."""
    gen = torch.Generator().manual_seed(1)
    # float64, because products over other numbers of rows round differently
    w = torch.randn(48, 32, 16, generator=gen, dtype=torch.float64)
    root = torch.randn(32, 40, generator=gen, dtype=torch.float64) + 1.0
    coupling, moments = root @ root.T, torch.eye(16, dtype=torch.float64).expand(48, 16, 16)
    steps, level = (torch.full((48, 32, 1), value, dtype=torch.float64) for value in (0.5, 3.0))

    def cost(coupled: torch.Tensor | None) -> float:
        blocks = sides._row_blocks(32, 1 if coupled is None else 4, w.device)
        codes, step = sides._round_row_blocks(w, moments, steps, level, 1, blocks, coupled)
        error = w - decode(codes, step.repeat_interleave(16, 2), level)
        return float(torch.einsum("eik,ij,ejk->", error, coupling, error))

    assert cost(coupling) < cost(None)
    assert cost(torch.eye(32, dtype=torch.float64)) == pytest.approx(cost(None), rel=1e-12)


def test_codes_without_feedback_are_the_nearest() -> None:
    """The stored factors, decoded, are those of plain rounding with the steps of the chosen widths."""
    layer, s = make_layer(), settings(error_feedback=False, input_basis="spectral", output_basis="none")
    chosen = layer.plan(s).choose(s.bits * layer.weights)
    packed, _ = quantize_layer(layer.experts, layer.tokens, chosen, s)
    a, f = BitsMoEExperts(packed, Gating())._decode(list(range(6)), torch.float32)
    inverse = torch.linalg.inv(chosen.inputs.basis.matrix.double())
    factors = (layer.experts.gate_up.double() @ inverse).float().view(12, 48, 64), layer.experts.down.transpose(1, 2)
    for side, factor, decoded in zip(
        (chosen.inputs, chosen.outputs), factors, (a.view(12, 48, -1), f.transpose(1, 2)), strict=True
    ):
        decoded = torch.nn.functional.pad(decoded, (0, 64 - decoded.shape[2]))  # directions that are not stored
        steps = chosen_steps(factor, side.weight, side.widths, 16, 16)
        for matrix, unit in itertools.product(range(len(factor)), range(4)):
            width, part = int(side.widths[matrix, unit]), slice(16 * unit, 16 * unit + 16)
            got, wanted = decoded[matrix, :, part], factor[matrix, :, part]
            if width == 0:
                assert not bool(got.any())
                continue
            # the basis's inverse in float64 here and by another solver there: factors differ in the last place
            step = steps[matrix, :, part].repeat_interleave(16, 0)
            limit = step * (2**width - 1)
            inside = (got - wanted).abs() <= step * (1 + 1e-3)
            assert bool((inside | ((got.abs() >= 0.99 * limit) & (wanted.abs() >= 0.99 * limit))).all())


def test_predicted_distortion_is_the_error_of_plain_rounding() -> None:
    """Without feedback and with everything independent, the cost table's sum is the output error, to a factor."""
    layer = make_layer(tokens=2000)
    s = settings(error_feedback=False, input_basis="spectral", output_basis="spectral", bits=4.0)
    packed, report = layer.run(s)
    measured = float((layer.packed_forward(packed) - layer.dense_forward()).square().sum())
    assert 0.4 < report.predicted_distortion / measured < 2.5


@pytest.mark.parametrize("codes", ["scalar", "trellis"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_defaults_of_the_user_change_nothing(dtype: torch.dtype, codes: str) -> None:
    layer, s = make_layer(num_experts=3), settings(codes=codes)

    def run() -> tuple[PackedExperts, LayerReport]:
        tokens = RoutedTokens.from_router(layer.x, layer.ids, layer.p, 3, rows=8)  # some are held out
        plan = plan_layer(layer.experts, tokens, s, dense_ids="auto")
        return quantize_layer(layer.experts, tokens, plan.choose(s.bits * layer.weights), s)

    packed, report = run()
    with other_defaults(dtype):
        again, same = run()
    assert same == report
    assert all(
        torch.equal(tensor, other) for (_, tensor), (_, other) in zip(packed.items(), again.items(), strict=True)
    )


def test_result_is_the_same_twice() -> None:
    layer = make_layer()
    first, second = (layer.run(settings())[0] for _ in range(2))
    for (name, one), (_, two) in zip(first.items(), second.items(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("elements", [1, 2 * 2 * 64 * 64])
def test_batches_of_experts_do_not_change_the_result(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts are factored in batches; batch sizes change float32 sums in the last place at most."""
    layer = make_layer()
    whole, _ = layer.run(settings())
    monkeypatch.setattr(layer_module, "PART_ELEMENTS", elements)
    parts, _ = layer.run(settings())
    assert torch.equal(parts.widths_in, whole.widths_in)
    assert float((parts.codes_in == whole.codes_in).float().mean()) > 0.98
    assert layer.relative_error(parts) == pytest.approx(layer.relative_error(whole), rel=1e-2)


def test_parts_grow_with_the_free_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take half of it, what the allocator keeps for later included, and never less than on a CPU."""
    memory = {"memory_reserved": 3 << 30, "memory_allocated": 1 << 30}
    for name, size in memory.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, size=size: size)
    least, gpu = layer_module.PART_ELEMENTS, torch.device("cuda", 0)
    for free, expected in ((94 << 30, 2**31 // 2), (1 << 30, least)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 100 << 30))
        assert layer_module.part_elements(gpu) == expected
    assert layer_module.part_elements(torch.device("cpu")) == least


def test_moments_that_are_measured_twice_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of down, where all experts' together would take too much memory."""
    layer = make_layer()
    whole, _ = layer.run(settings())
    monkeypatch.setattr(sides, "KEPT_MOMENTS", 0)
    parts, _ = layer.run(settings())
    assert torch.equal(parts.codes_in, whole.codes_in)
    assert float((parts.codes_out == whole.codes_out).float().mean()) > 0.98
    assert layer.relative_error(parts) == pytest.approx(layer.relative_error(whole), rel=1e-2)


def test_dense_weights_stay_as_they_are() -> None:
    layer, again = make_layer(), make_layer()
    layer.run(settings())
    for name in ("gate_up", "down"):
        assert torch.equal(getattr(layer.experts, name), getattr(again.experts, name))
    assert torch.equal(layer.x, again.x)


def test_metric_steers_the_bits() -> None:
    """Where the loss does not see an output channel, errors go there."""
    layer = make_layer()
    metric = torch.diag((torch.arange(64) >= 32).float() + 1e-4)
    s = settings(input_basis="none", output_basis="none")
    error = []
    for m in (None, metric):
        packed, _ = layer.run(s, metric=m)
        rest = (layer.packed_forward(packed) - layer.dense_forward()).square().sum(0)
        error.append(float(rest[32:].sum()))
    assert error[1] < 0.8 * error[0]


# ------------------------------------------------------------------------------------------------------ budget


@pytest.mark.parametrize("dense", [(), (1, 4)], ids=["plain", "super"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("bases", list(itertools.product(("spectral", "none"), repeat=2)), ids="-".join)
def test_fixed_bits_are_everything_but_the_units(bases: tuple[str, str], bias: bool, dense: tuple[int, ...]) -> None:
    layer = make_layer(bias=bias, dtype=torch.bfloat16)
    s = settings(bits=7.5, input_basis=bases[0], output_basis=bases[1])
    plan = layer.plan(s, dense_ids=dense)
    packed, _ = layer.round(plan)
    fixed = plan.fixed_bits(plan.inputs[0], plan.outputs[0])
    absent = 64 - ExpertsLayout.from_tensor(packed.layout).rank_in
    saved = absent * plan.inputs[0].bits_per_direction + absent // 16 * 8 * 2 * 6
    assert 8 * packed.nbytes == fixed - saved + unit_bits(layer, packed)


@pytest.mark.parametrize("bits", [0.7, 1.0, 1.6, 2.0, 2.5, 3.7, 5.0])
def test_budget_is_met_within_a_unit(bits: float) -> None:
    layer, s = make_layer(num_experts=12), settings(bits=bits, block_size=8)
    packed, report = layer.run(s)
    check_budget(layer, packed, report, s)
    assert report.bits > bits - 0.015, "a unit of this layer is 0.015 bits"


def test_a_budget_below_the_least_says_the_least() -> None:
    layer = make_layer()
    s = settings(bits=0.01, input_basis="spectral", output_basis="spectral")
    with pytest.raises(RecipeError, match=r"bits: 0\.010 is below the \d\.\d+ bits .*raise `bits`") as caught:
        layer.run(s)
    least = float(re.search(r"below the (\d+\.\d+)", str(caught.value))[1])
    packed, _ = layer.run(dataclasses.replace(s, bits=least + 1e-3))
    assert packed.bits_per_weight <= least + 1e-3


def test_a_budget_below_the_narrowest_width_says_the_least() -> None:
    """Without width 0 every unit costs something; the message speaks of bits per weight, as the recipe does."""
    layer = make_layer()
    s = settings(bits=2.0, widths=(2, 4), input_basis="none", output_basis="none")
    with pytest.raises(RecipeError, match=r"bits: 2\.000 is below the \d\.\d+ bits per weight") as caught:
        layer.run(s)
    least = float(re.search(r"below the (\d+\.\d+)", str(caught.value))[1])
    packed, _ = layer.run(dataclasses.replace(s, bits=least + 1e-3))
    assert set(packed.widths_in.unique().tolist()) == {2}


def test_auto_gives_up_bases_that_the_budget_cannot_pay() -> None:
    """Two bases of 64 x 64 do not fit beside 2 bits for every weight; none do."""
    layer = make_layer()
    packed, report = layer.run(settings(bits=2.63, widths=(2, 4)))
    assert (report.input_basis_bits, report.output_basis_bits) == (0, 0)
    assert set(packed.widths_in.unique().tolist()) <= {2, 4}


def test_auto_goes_on_without_a_basis_that_cannot_be_inverted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RecipeError(f"the {args[-1]}put basis cannot be inverted")

    layer = make_layer()
    monkeypatch.setattr(candidates, "round_and_refit", fail)
    _, report = layer.run(settings())
    assert (report.input_basis_bits, report.output_basis_bits) == (0, 0)
    assert any("cannot be inverted" in warning for warning in report.warnings)
    with pytest.raises(RecipeError, match="the output basis cannot be inverted"):
        layer.run(settings(input_basis="none", output_basis="spectral"))


def test_directions_that_no_expert_uses_are_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """R < H: the layer computes the same without them, and what they would take is spent elsewhere."""
    layer, s = make_layer(width=32), settings(bits=1.5, input_basis="spectral", block_size=8)
    layer = dataclasses.replace(layer, x=layer.x * torch.tensor([1.0] * 24 + [1e-4] * 40))
    plan, budget = layer.plan(s), s.bits * layer.weights
    chosen = plan.choose(budget)
    packed, report = quantize_layer(layer.experts, layer.tokens, chosen, s)
    layout = ExpertsLayout.from_tensor(packed.layout)
    check_structure(dict(packed.items()), "layer")
    used = int(chosen.inputs.widths.amax(0).nonzero().max()) + 1
    assert layout.rank_in == 8 * used <= 24
    assert packed.basis_in.shape[0] == 8 * used
    check_budget(layer, packed, report, s)

    monkeypatch.setattr(design, "idle_units", lambda _: 0)
    monkeypatch.setattr(rounded, "idle_units", lambda _: 0)
    assert chosen.predicted_distortion < plan.choose(budget).predicted_distortion
    whole, _ = quantize_layer(layer.experts, layer.tokens, chosen, s)
    assert ExpertsLayout.from_tensor(whole.layout).rank_in == 64
    torch.testing.assert_close(layer.packed_forward(packed), layer.packed_forward(whole))


@pytest.mark.parametrize(
    ("widths", "idle"), [([[1, 0, 2, 0, 0], [0, 0, 1, 0, 0]], 2), ([[0, 0, 3]], 0), ([[0, 0]], 1), ([[4, 0]], 1)]
)
def test_idle_units_are_the_last_ones(widths: list[list[int]], idle: int) -> None:
    assert design.idle_units(torch.tensor(widths, dtype=torch.uint8)) == idle


def test_more_bits_than_anything_costs() -> None:
    layer, s = make_layer(), settings(bits=8.0, widths=(0, 2))
    packed, report = layer.run(s)
    assert set(packed.widths_in.unique().tolist()) == {2}
    check_budget(layer, packed, report, s)


def test_curve_is_what_the_allocation_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The curve bounds the exact allocation from below at every budget, and falls; directions left out come on top."""
    monkeypatch.setattr(design, "idle_units", lambda _: 0)
    layer = make_layer()
    plan = layer.plan(settings())
    bits, distortion = plan.curve(points=40)
    assert (np.diff(bits) > 0).all()
    assert (np.diff(distortion) <= 1e-9 * distortion[0]).all()
    for at in (0, 5, 20, 39):
        reached = plan.choose(bits[at]).predicted_distortion
        assert distortion[at] <= reached * (1 + 1e-6)
        assert reached <= distortion[at] + 0.1 * distortion[0]


# ----------------------------------------------------------------------------------------------- super experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dense", [(2,), (0, 5), (0, 1, 2, 3, 4, 5)], ids=str)
def test_super_experts_stay_bit_exact(dense: tuple[int, ...], dtype: torch.dtype) -> None:
    layer, s = make_layer(dtype=dtype), settings(bits=33.0)
    packed, report = layer.run(s, dense_ids=dense)
    check_structure(dict(packed.items()), "experts")
    check_content(packed, "experts")
    assert packed.dense_ids.tolist() == list(dense) == list(report.dense_experts)
    assert torch.equal(packed.dense_in, layer.experts.gate_up[list(dense)])
    assert torch.equal(packed.dense_out, layer.experts.down[list(dense)])
    assert packed.dense_in.dtype == dtype
    gate_up, down = BitsMoEExperts(packed, Gating()).dense_weights()
    for e in dense:
        assert torch.equal(gate_up[e], layer.experts.gate_up[e].float())
        assert torch.equal(down[e], layer.experts.down[e].float())
    assert layer.relative_error(packed) == pytest.approx(report.relative_output_error, rel=1e-2, abs=1e-11)


@pytest.mark.parametrize("solver", ["highs", "lagrangian"])
def test_super_experts_have_no_codes(solver: str) -> None:
    """Their widths are all 0, also where the budget would pay for more."""
    layer, s = make_layer(dtype=torch.bfloat16), settings(bits=12.0, solver=solver)
    packed, _ = layer.run(s, dense_ids=(1, 4))
    assert not bool(packed.widths_in[[1, 4]].any())
    assert not bool(packed.widths_out[[1, 4]].any())
    with pytest.raises(RecipeError, match=r"super_experts .* add 0 to `bit_widths`"):
        layer.run(settings(bits=12.0, widths=(2, 4)), dense_ids=(1, 4))


def test_super_experts_count_against_the_budget() -> None:
    layer, s = make_layer(dtype=torch.bfloat16), settings(bits=5.0)
    packed, report = layer.run(s, dense_ids=(3,))
    check_budget(layer, packed, report, s)
    free, _ = layer.run(s)
    assert float(packed.widths_in.float().mean()) < float(free.widths_in.float().mean())
    with pytest.raises(RecipeError, match="dense experts and narrowest codes take"):
        layer.run(settings(bits=2.0), dense_ids=(3,))


def test_super_experts_are_found() -> None:
    layer = make_layer()
    layer.experts.down[4] *= 200
    assert layer.plan(settings(), dense_ids="auto").dense_ids == (4,)
    assert make_layer().plan(settings(), dense_ids="auto").dense_ids == ()


def test_no_super_expert_without_tokens() -> None:
    layer = make_layer()
    statistics = collect_statistics(layer.tokens, layer.experts.gate_up, layer.experts.down, Gating())
    assert super_experts(dataclasses.replace(statistics, peak_output=torch.zeros(6))) == ()


# --------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", ["gate_up", "down"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_weights_name_the_expert(name: str, value: float) -> None:
    layer = make_layer()
    getattr(layer.experts, name)[4, 3, 2] = value
    with pytest.raises(CalibrationError, match=f"expert 4: its {name} weights hold NaN or infinity"):
        layer.run(settings())


@pytest.mark.parametrize("name", ["in_bias", "out_bias"])
def test_bad_biases_name_the_expert(name: str) -> None:
    layer = make_layer(bias=True)
    getattr(layer.experts, name)[2, 1] = torch.nan
    with pytest.raises(CalibrationError, match="expert 2"):
        layer.run(settings())


@pytest.mark.parametrize(
    ("rank", "expected"), [(64, 16), (256, 16), (512, 32), (2048, 128), (4096, 128), (1536, 64), (72, 8), (2880, 64)]
)
def test_block_size_follows_the_rank(rank: int, expected: int) -> None:
    assert QuantizerSettings().resolve_block_size(rank) == expected
    assert QuantizerSettings(block_size=24).resolve_block_size(rank) == 24


@pytest.mark.parametrize(("columns", "expected"), [(4096, 128), (2880, 64), (96, 32), (72, 8)])
def test_basis_group_divides_the_columns(columns: int, expected: int) -> None:
    assert QuantizerSettings().resolve_basis_group(columns) == expected
