"""Held-out rows: which they are, and what they decide about moments and prices."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from bitsmoe_modifier.calibration.capture import more_text
from bitsmoe_modifier.method.candidates import plan_layer, unseen_bases
from bitsmoe_modifier.method.design import TRIAL_BITS, margin
from bitsmoe_modifier.method.distributed import Ranks
from bitsmoe_modifier.method.gating import Gating
from bitsmoe_modifier.method.layer import DenseExperts, QuantizerSettings
from bitsmoe_modifier.method.quantize import quantize_layer
from bitsmoe_modifier.method.rounding import damp_, feedback_factor, round_with_feedback
from bitsmoe_modifier.method.shrinkage import SHARES, absorbed_energy, sample_experts, towards_diagonal_
from bitsmoe_modifier.method.statistics import RoutedTokens, collect_statistics, held_rows
from bitsmoe_modifier.method.trial import Trials, trial_experts, trial_losses


@pytest.mark.parametrize(("rows", "held"), [(1, 0), (3, 0), (4, 1), (7, 1), (8, 1), (16, 2), (20, 2), (128, 16)])
def test_an_eighth_of_the_rows_is_held_out(rows: int, held: int) -> None:
    chosen = held_rows(rows)
    assert len(chosen) == rows
    assert sum(chosen) == held
    places = [at for at, one in enumerate(chosen) if one]
    assert all(b - a <= -(-rows // held) for a, b in itertools.pairwise(places)), "evenly spread"


def correlated(tokens: int, hidden: int, generator: torch.Generator, mix: torch.Tensor) -> torch.Tensor:
    return torch.randn(tokens, hidden, generator=generator) @ mix


def make(rows: int, length: int = 32, hidden: int = 64, width: int = 32, num_experts: int = 4, seed: int = 0):
    gen = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(hidden, hidden, generator=gen))[0] * torch.logspace(0.5, -1, hidden)[:, None]
    mix = mix.T @ torch.linalg.qr(torch.randn(hidden, hidden, generator=gen))[0]
    x = correlated(rows * length, hidden, gen, mix)
    ids = torch.rand(len(x), num_experts, generator=gen).argsort(1)[:, :2]
    p = torch.rand(ids.shape, generator=gen) + 0.1
    experts = DenseExperts(
        torch.randn(num_experts, 2 * width, hidden, generator=gen) / 8,
        torch.randn(num_experts, hidden, width, generator=gen) / 6,
        Gating(),
    )
    return experts, x, ids, p, mix


def test_held_out_tokens_and_the_others_are_all() -> None:
    experts, x, ids, p, _ = make(8)
    tokens = RoutedTokens.from_router(x, ids, p, 4, rows=8)
    rows = torch.arange(len(x)) // 32
    kept = rows != 7
    assert torch.equal(tokens.held, rows == 7)
    fitted = tokens.fitted()
    alone = RoutedTokens.from_router(x[kept], ids[kept], p[kept], 4)
    assert fitted.counts == alone.counts
    assert sum(tokens.held_out().counts) + sum(fitted.counts) == sum(tokens.counts)
    one, two = (collect_statistics(t, experts.gate_up, experts.down, experts.gating) for t in (fitted, alone))
    torch.testing.assert_close(one.input_moment, two.input_moment)
    assert torch.equal(one.row_importance, two.row_importance)


def test_a_trial_rounds_by_the_fitted_rows_alone() -> None:
    """Other inputs on the held-out rows change what is lost there and nothing else."""
    experts, x, ids, p, _ = make(8)
    settings = QuantizerSettings(bits=3.0, block_size=16, group_size=16, shrinkage=0.1)
    tokens = RoutedTokens.from_router(x, ids, p, 4, rows=8)
    design = plan_layer(experts, tokens, settings).choose(3.0 * experts.elements)
    found = []
    for factor in (1.0, 3.0):
        changed = torch.where(tokens.held[:, None], x * factor, x)
        other = RoutedTokens.from_router(changed, ids, p, 4, rows=8)
        found.append(
            trial_losses(experts, other.fitted(), other.held_out(), design, settings, None, [1, 3], ("held", "fitted"))
        )
    assert torch.equal(found[0][1], found[1][1])
    assert bool((found[1][0] > 2 * found[0][0]).all())


def test_fewer_rows_promise_less_on_unseen_ones() -> None:
    settings = QuantizerSettings(bits=2.0, block_size=16, group_size=16)
    gaps = []
    for length in (8, 256):
        experts, x, ids, p, _ = make(16, length)
        tokens = RoutedTokens.from_router(x, ids, p, 4, rows=16)
        design = plan_layer(experts, tokens, settings).choose(2.0 * experts.elements)
        _, report = quantize_layer(experts, tokens, design, settings)
        gaps.append(report.unseen_output_error / report.relative_output_error)
    assert gaps[0] > 1.3
    assert 1.0 <= gaps[1] < 1.1


def test_few_rows_are_all_fitted_and_the_error_says_so() -> None:
    experts, x, ids, p, _ = make(3)
    tokens = RoutedTokens.from_router(x, ids, p, 4, rows=3)
    assert tokens.held is None
    settings = QuantizerSettings(bits=3.0, block_size=16, group_size=16)
    design = plan_layer(experts, tokens, settings).choose(3.0 * experts.elements)
    _, report = quantize_layer(experts, tokens, design, settings)
    assert report.relative_output_error == report.unseen_output_error
    assert report.shrinkage == (0.0, 0.0)


def test_shrinking_leaves_the_diagonal() -> None:
    moment = torch.arange(18.0).view(2, 3, 3)
    shrunk = towards_diagonal_(moment.clone(), 0.25)
    assert torch.equal(shrunk.diagonal(dim1=1, dim2=2), moment.diagonal(dim1=1, dim2=2))
    assert torch.equal(shrunk[:, 0, 1:], moment[:, 0, 1:] * 0.75)
    assert torch.equal(towards_diagonal_(moment.clone(), 0.0), moment)


def test_absorbed_energy_is_the_conditional_variance() -> None:
    """On the inputs that the moment is made of: what is left of a column once the later ones have explained it."""
    gen = torch.Generator().manual_seed(0)
    h = correlated(400, 24, gen, torch.randn(24, 24, generator=gen)).double()
    order = torch.randperm(24, generator=gen)
    found = absorbed_energy((h.T @ h).float(), order, h.float(), 0.0, (0.0,))[0]
    for at, column in enumerate(order.tolist()):
        later = h[:, order[at + 1 :]]
        left = h[:, column] - later @ torch.linalg.lstsq(later, h[:, column, None]).solution[:, 0]
        assert float(found[column]) == pytest.approx(float(left.square().sum()), rel=1e-3)


def test_absorbed_energy_foretells_what_rounding_loses() -> None:
    gen = torch.Generator().manual_seed(1)
    mix = torch.randn(48, 48, generator=gen)
    h, other = (correlated(n, 48, gen, mix) for n in (200, 150))
    w = torch.randn(1, 64, 48, generator=gen)
    moment, order = h.T @ h, torch.arange(48)
    energy = absorbed_energy(moment, order, other, 0.01)
    for share, expected in zip(SHARES, energy.sum(1) * (0.1**2 / 3) * 64, strict=True):
        shrunk = damp_(towards_diagonal_(moment.clone(), share), 0.01)
        factor = feedback_factor(shrunk[None], order[None])
        steps, level = torch.full((1, 1, 48), 0.1), torch.full((1, 1, 48), 255.0)
        codes, _ = round_with_feedback(w, factor, steps, level, order[None])
        lost = ((w - (codes * 2 - 255) * 0.1) @ other.T).square().sum()
        assert float(lost) == pytest.approx(float(expected), rel=0.1)


def test_correlations_are_believed_as_far_as_they_hold() -> None:
    """Those of a few tokens of independent channels are chance; those of many tokens of correlated ones are not."""
    settings = QuantizerSettings(bits=3.0, block_size=16, group_size=16, input_basis="none", output_basis="none")
    chosen = []
    for length, correlate in ((8, False), (200, True)):
        experts, x, ids, p, _ = make(16, length)
        x = x if correlate else torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
        tokens = RoutedTokens.from_router(x, ids, p, 4, rows=16)
        design = plan_layer(experts, tokens, settings).choose(3.0 * experts.elements)
        chosen.append(quantize_layer(experts, tokens, design, settings)[1].shrinkage[0])
    assert chosen[0] >= 0.5
    assert chosen[1] <= 0.05


def test_samples_of_all_processes_make_the_whole_sample() -> None:
    whole = sample_experts(37, range(37))
    assert sample_experts(37, range(20)) + sample_experts(37, range(20, 37)) == whole
    assert 3 <= len(whole) <= 4
    assert sample_experts(1, range(1)) == [0]


@pytest.mark.parametrize("codes", ["scalar", "trellis"])
@pytest.mark.parametrize(("spread", "bits", "spectral"), [(2.5, 1.25, True), (0.0, 2.0, False)])
def test_auto_takes_what_loses_less_on_held_out_rows(spread: float, bits: float, spectral: bool, codes: str) -> None:
    """Where few directions carry the inputs, the basis; where all carry alike, the channels."""
    gen = torch.Generator().manual_seed(9)
    turn = torch.linalg.qr(torch.randn(64, 64, generator=gen))[0]
    x = torch.randn(2048, 64, generator=gen) * torch.logspace(0, -spread, 64) @ turn
    ids = torch.rand(2048, 16, generator=gen).argsort(1)[:, :4]
    tokens = RoutedTokens.from_router(x, ids, torch.rand(ids.shape, generator=gen) + 0.1, 16, rows=32)
    experts = DenseExperts(
        torch.randn(16, 64, 64, generator=gen) / 8, torch.randn(16, 64, 32, generator=gen) / 6, Gating()
    )
    settings = QuantizerSettings(bits=bits, block_size=16, group_size=32, codes=codes)
    chosen = plan_layer(experts, tokens, settings).choose(bits * experts.elements)
    losses = {}
    for choice in ("spectral", "none"):
        fixed = replace(settings, input_basis=choice, output_basis="none")
        design = plan_layer(experts, tokens, fixed).choose(bits * experts.elements)
        losses[choice] = quantize_layer(experts, tokens, design, fixed)[1].relative_output_error
    assert (losses["spectral"] < losses["none"]) == spectral
    assert (chosen.inputs.basis is not None) == spectral


def test_a_trial_rounds_in_the_codes_of_the_run() -> None:
    """Which basis is best depends on them: scalar codes lose many times more in a few experts of some layers."""
    experts, x, ids, p, _ = make(16, 200)
    tokens = RoutedTokens.from_router(x, ids, p, 4, rows=16)
    fitted, held = tokens.fitted(), tokens.held_out()
    assert held is not None
    plan = plan_layer(experts, tokens, QuantizerSettings(bits=2.0, block_size=16, group_size=16, codes="trellis"))
    found = [
        Trials(replace(plan.settings, codes=codes), experts, fitted, held, None).of(plan, (1, 1), 2.0)
        for codes in ("trellis", "scalar")
    ]
    assert found[0].foretold == found[1].foretold
    assert found[0].times != found[1].times


def test_a_trial_corrects_what_the_cost_tables_choose_by() -> None:
    """At every budget, and nothing else: what a layer is foretold to lose stays what the tables say."""
    experts, x, ids, p, _ = make(16, 200)
    tokens = RoutedTokens.from_router(x, ids, p, 4, rows=16)
    # without width 0, so that no basis is cut after the choice
    plan = plan_layer(experts, tokens, QuantizerSettings(bits=2.0, widths=(1, 2, 4, 6), block_size=16, group_size=16))
    assert None not in {side.times for side in (*plan.inputs, *plan.outputs)}
    assert plan.outputs[-1].times == (1.0, 1.0)  # without a basis: what the output's candidates are measured by
    pairs = {(i, o): (plan.inputs[i], plan.outputs[o]) for i in range(2) for o in range(2)}
    times = {at: i.times[-1] * o.times[-1] * margin(i, o) for at, (i, o) in pairs.items()}
    assert min(times.values()) <= 1.0 + 1e-9  # the unit is that of the best pair
    # bases take more than a bit and a half of so small a layer: what was found at 2 bits counts below, too
    assert {side.times[0] == side.times[1] for side in (*plan.inputs, *plan.outputs)} == {True}
    for bits in (3.0, 4.0, 5.0):
        foretold = {at: plan.only(*at).choose(bits * experts.elements).predicted_distortion for at in pairs}
        expected = {at: lost * times[at] for at, lost in foretold.items()}
        best = min(expected, key=expected.__getitem__)
        design = plan.choose(bits * experts.elements)
        assert (design.inputs.basis is None, design.outputs.basis is None) == tuple(at == 1 for at in best)
        assert design.predicted_distortion == pytest.approx(foretold[best], rel=1e-9)
        sizes, curve = plan.curve()
        assert np.interp(bits * experts.elements, sizes, curve) == pytest.approx(expected[best], rel=0.1)
        assert (np.diff(curve) <= 0).all()
    other = replace(
        plan, inputs=tuple(replace(side, times=(t, t)) for side, t in zip(plan.inputs, (1e9, 1.0), strict=True))
    )
    assert other.choose(3.0 * experts.elements).inputs.basis is None


def test_what_is_tried_at_a_small_size_counts_at_small_sizes() -> None:
    experts, x, ids, p, _ = make(16, 200, num_experts=32)
    tokens = RoutedTokens.from_router(x, ids, p, 32, rows=16)
    settings = QuantizerSettings(bits=2.0, block_size=16, group_size=16)
    plan = plan_layer(experts, tokens, settings)
    assert {side.times[0] == side.times[1] for side in plan.inputs} == {False}
    large = plan_layer(experts, tokens, replace(settings, least_bits=2.0))  # of no use below, and not tried there
    assert [side.times for side in large.inputs] == [(side.times[1], side.times[1]) for side in plan.inputs]
    below = plan_layer(experts, tokens, replace(settings, least_bits=1.9))
    assert [side.times for side in below.inputs] == [side.times for side in plan.inputs]

    def with_basis(bits: float, times: tuple[float, float]) -> bool:
        one = replace(plan, inputs=(replace(plan.inputs[0], times=times), replace(plan.inputs[1], times=(1.0, 1.0))))
        return one.choose(bits * experts.elements).inputs.basis is not None

    assert [with_basis(bits, (1e9, 1e-9)) for bits in (TRIAL_BITS[0], 1.6, 2.0, 3.0)] == [False, True, True, True]
    assert [with_basis(bits, (1e-9, 1e9)) for bits in (TRIAL_BITS[0], 1.6, 2.0, 3.0)] == [True, False, False, False]


def test_bases_on_trial_know_nothing_of_the_rows_that_judge_them() -> None:
    experts, x, ids, p, _ = make(8, 64)
    settings = QuantizerSettings(bits=2.0, block_size=16, group_size=16)
    other = torch.where(torch.arange(len(x))[:, None] < 7 * 64, x, x.flip(1))
    plans, unseen = [], []
    for inputs in (x, other):
        tokens = RoutedTokens.from_router(inputs, ids, p, 4, rows=8)
        plans.append(plan_layer(experts, tokens, settings))
        unseen.append(unseen_bases(plans[-1], experts, tokens, None, Ranks.alone()))
    for side in ("inputs", "outputs"):
        (one, _), (two, _) = (getattr(plan, side) for plan in unseen)
        assert torch.equal(one.basis.matrix, two.basis.matrix)
        (one, none), (two, _) = (getattr(plan, side) for plan in plans)
        assert not torch.equal(one.basis.matrix, two.basis.matrix)
        assert none.basis is None


def test_experts_of_a_trial() -> None:
    _, x, ids, p, _ = make(8)
    held = RoutedTokens.from_router(x, ids, p, 4, rows=8).held_out()
    assert trial_experts(torch.ones(4, dtype=torch.float64), held, (), 4) == [0, 1, 2, 3]
    assert trial_experts(torch.tensor([1.0, 1.0, 1.0, 97.0], dtype=torch.float64), held, (), 2) == [3]
    assert trial_experts(torch.ones(4, dtype=torch.float64), held, (1, 2), 4) == [0, 3]
    assert trial_experts(torch.zeros(4, dtype=torch.float64), held, (), 4) == []


def test_more_text_is_advised_where_it_would_help() -> None:
    def reports(*pairs: tuple[float, float]) -> list[dict[str, float]]:
        return [{"relative_output_error": fitted, "unseen_output_error": unseen} for fitted, unseen in pairs]

    (said,) = more_text(reports((0.01, 0.03), (0.03, 0.05)))
    assert "2.0 times" in said
    assert "4.00 % of their output's power in place of 2.00 %" in said
    assert "to about 3.50 %" in said
    assert more_text(reports((0.02, 0.03))) == []
    assert more_text(reports((0.0, 0.0))) == []
    assert more_text([]) == []
