"""Which bases a layer takes, by trial: a few experts are rounded each way and judged on the held-out rows.

What plain rounding would lose on the calibration rows, which the cost tables say, is a fair price within one choice of
bases and a poor one between them. Feedback takes much off where inputs correlate (the channels) and little where a
basis has made them white; and the weak directions of a basis carry more energy on other text than they seemed to. How
much of either, neither theory nor the calibration rows say well enough (docs/quality.md). Trials at two sizes do, for
all sizes. One would not: where half of the directions are dropped, bases count otherwise than where hardly any are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from ..errors import RecipeError
from .design import TRIAL_BITS, LayerDesign, LayerPlan, SideDesign, margin, moved
from .distributed import Ranks
from .layer import DenseExperts, QuantizerSettings
from .sides import LayerTask, expert_gate_up, round_input, round_output
from .spectral import project
from .statistics import RoutedTokens

#: Experts that are rounded for a trial: so many, or as many as have so many weights, which is most of a small layer.
#: Losses differ more between experts than between bases, and a few experts can be what decides.
_TRIAL_EXPERTS, _TRIAL_WEIGHTS = 8, 1 << 24
#: Shrinkage of their moments where it is not set.
_TRIAL_SHRINKAGE = 0.1


def to_be_tried(plan: LayerPlan, tokens: RoutedTokens) -> bool:
    """Whether there is a choice of bases, and held-out rows to judge them. Without error feedback the cost tables are
    right, and nothing is tried."""
    choice = max(len(plan.inputs), len(plan.outputs)) > 1
    return choice and tokens.held is not None and plan.settings.error_feedback


def settled(
    plan: LayerPlan,
    unseen: LayerPlan,
    experts: DenseExperts,
    tokens: RoutedTokens,
    metric: torch.Tensor | None,
    ranks: Ranks,
) -> LayerPlan:
    """The plan with what trials found (`SidePlan.times`), by which it chooses bases at every budget.

    Tried at `TRIAL_BITS`, because one plan may serve many budgets; where it need not serve smaller ones
    (`QuantizerSettings.least_bits`) the trial at the last stands for all. Tried in the layer's own codes: scalar ones
    lose many times more in a few experts, and a layer was judged by those. The input's candidates first. The first
    process decides for all.

    Args:
        plan: with its candidates.
        unseen: the same with bases made without the held-out rows. Bases that were made from all rows win by a tenth to
            a quarter more on those rows than they should, where calibration rows are few.
        experts, tokens, metric: as in `quantize_layer`.
        ranks: the processes that plan the layer together.
    """
    fitted, held = tokens.fitted(), tokens.held_out()
    if held is None or not to_be_tried(plan, tokens):
        return plan
    found = ranks.compute(lambda: _found(unseen, Trials(plan.settings, experts, fitted, held, metric)))
    if found is None:
        return plan
    inputs, outputs = found
    return replace(
        plan,
        inputs=tuple(replace(side, times=times) for side, times in zip(plan.inputs, inputs, strict=True)),
        outputs=tuple(replace(side, times=times) for side, times in zip(plan.outputs, outputs, strict=True)),
    )


def _found(plan: LayerPlan, trials: "Trials") -> tuple[list[tuple[float, ...]], list[tuple[float, ...]]] | None:
    """`SidePlan.times` of the candidates of the two sides; None where no trial is possible."""
    last = len(plan.outputs) - 1

    def expected(inputs: int, outputs: int) -> float:
        one = trials.of(plan, (inputs, outputs), TRIAL_BITS[-1])
        return one.foretold * one.times * margin(plan.inputs[inputs], plan.outputs[outputs])

    best = int(np.argmin([expected(at, last) for at in range(len(plan.inputs))]))
    if not np.isfinite(expected(best, last)):
        return None
    taken = int(np.argmin([expected(best, at) for at in range(len(plan.outputs))]))

    def factors(bits: float) -> tuple[np.ndarray, np.ndarray]:
        inputs = np.array([trials.of(plan, (at, last), bits).times for at in range(len(plan.inputs))])
        outputs = np.array([trials.of(plan, (best, at), bits).times for at in range(len(plan.outputs))])
        unit = outputs[taken] * margin(plan.inputs[best], plan.outputs[taken])
        if not np.isfinite(unit):  # the bases take more than so few bits
            return np.full_like(inputs, np.inf), np.full_like(outputs, np.inf)
        return inputs / unit, outputs / outputs[last]

    tried = TRIAL_BITS if plan.settings.least_bits < TRIAL_BITS[-1] else TRIAL_BITS[-1:] * len(TRIAL_BITS)
    by_size = [factors(bits) for bits in tried]

    def of_side(side: int) -> list[tuple[float, ...]]:
        sizes = [np.where(np.isfinite(found[side]), found[side], by_size[-1][side]).tolist() for found in by_size]
        return list(zip(*sizes, strict=True))

    return of_side(0), of_side(1)


@dataclass(frozen=True)
class Tried:
    """What a trial of one pair of candidates found.

    Attributes:
        foretold: what the cost tables say that the layer loses; infinite where its bases take more than the budget.
        times: how many times that is lost on held-out rows; infinite where there was no trial.
    """

    foretold: float
    times: float


class Trials:
    """Trials of one layer's candidates on the same experts."""

    def __init__(
        self,
        settings: QuantizerSettings,
        experts: DenseExperts,
        tokens: RoutedTokens,
        held: RoutedTokens,
        metric: torch.Tensor | None,
    ) -> None:
        shrinkage = _TRIAL_SHRINKAGE if settings.shrinkage is None else settings.shrinkage
        self.settings = replace(settings, shrinkage=shrinkage, refine_passes=0, compensation=True)
        self.layer, self.held, self.metric = (experts, tokens), held, metric
        self.known: dict[tuple[tuple[int, int], float], Tried] = {}
        self.ids: list[int] = []

    def of(self, plan: LayerPlan, at: tuple[int, int], bits: float) -> Tried:
        """That of the candidates at these places of the inputs' and the outputs', at so many bits per weight, or half a
        bit more than the narrowest width where that is more."""
        bits = max(bits, plan.settings.widths[0] + 0.5)
        if (at, bits) not in self.known:
            self.known[at, bits] = self._measure(plan.only(*at), bits)
        return self.known[at, bits]

    def _measure(self, one: LayerPlan, bits: float) -> Tried:
        experts, tokens = self.layer
        one = replace(one, settings=replace(one.settings, solver="lagrangian"))  # the same whatever solves the rest
        try:
            design = one.choose(bits * experts.elements)
        except RecipeError:  # its bases alone take more than the budget
            return Tried(np.inf, np.inf)
        foretold = predicted_losses(one, design)
        self.ids = self.ids or trial_experts(foretold, self.held, one.dense_ids, _sample_size(experts))
        if not self.ids:
            return Tried(float(foretold.sum()), np.inf)
        found = trial_losses(experts, tokens, self.held, design, self.settings, self.metric, self.ids, ("held",))
        times = (found[0] / foretold[self.ids].clamp_min(1e-300)).clamp_min(0)
        # squares of mean roots: the held-out tokens of one expert may be unlike its others, and must not decide for all
        return Tried(float(foretold.sum()), float(times.sqrt().mean().square().clamp_min(1e-30)))


def predicted_losses(plan: LayerPlan, design: LayerDesign) -> torch.Tensor:
    """What the cost tables say of each expert, float64 ``[E]``, for a design of a plan with one candidate per side."""
    losses = torch.zeros(plan.shape[0], dtype=torch.float64, device="cpu")
    for side, chosen in ((plan.inputs[0], design.inputs), (plan.outputs[0], design.outputs)):
        known = torch.tensor(side.costs.widths, device="cpu")
        column = torch.searchsorted(known, chosen.widths.to("cpu", torch.int64))
        lost = side.costs.distortion.gather(2, column[:, :, None]).sum((1, 2))
        losses += lost.view(plan.shape[0], -1).sum(1)
    return losses


def trial_experts(losses: torch.Tensor, held: RoutedTokens, dense_ids: tuple[int, ...], number: int) -> list[int]:
    """So many experts for a trial, evenly spread over the sum of ``losses [E]``: those with more of it are likelier.

    None that is kept dense, or that no held-out token reached.
    """
    usable = [e for e, count in enumerate(held.counts) if count and e not in dense_ids and float(losses[e]) > 0]
    if not usable:
        return []
    reached = losses[usable].cumsum(0)
    marks = (torch.arange(number, dtype=torch.float64, device="cpu") + 0.5) / number * reached[-1]
    found = torch.searchsorted(reached, marks).clamp_max(len(usable) - 1)
    return [usable[at] for at in sorted(set(found.tolist()))]


def _sample_size(experts: DenseExperts) -> int:
    return min(len(experts.down), max(_TRIAL_EXPERTS, _TRIAL_WEIGHTS * len(experts.down) // experts.elements))


def trial_losses(
    experts: DenseExperts,
    tokens: RoutedTokens,
    held: RoutedTokens,
    design: LayerDesign,
    settings: QuantizerSettings,
    metric: torch.Tensor | None,
    ids: list[int],
    judges: Sequence[Literal["held", "fitted"]],
) -> torch.Tensor:
    """Squared output error (under the metric) of some experts, rounded by the fitted tokens as the layer would be.

    Args:
        experts, settings, metric: as in `quantize_layer`; design: of all experts.
        tokens: the fitted ones; held: the others.
        ids: which experts.
        judges: the tokens that the errors are of. Most are fitted, and their errors take as long as rounding.

    Returns:
        float64 ``[len(judges), len(ids)]`` on the CPU.
    """
    device = tokens.x.device
    at = torch.tensor(ids, device=device)
    bias = None if experts.in_bias is None else experts.in_bias[at]
    some = replace(experts, gate_up=experts.gate_up[at], down=experts.down[at], in_bias=bias, out_bias=None)
    fitted, held = _compact(tokens.of(ids), held.of(ids))
    part = moved(_of_experts(design, ids), device)
    h = project(fitted.x, part.inputs.basis)
    layer = LayerTask(some, fitted, None, None, part, settings, metric, Ranks.alone(), h)
    inputs = round_input(layer)
    outputs = round_output(layer, inputs)
    losses = torch.zeros(len(judges), len(ids), dtype=torch.float64, device="cpu")
    for loss, judge in zip(losses, judges, strict=True):
        seen = {"held": held, "fitted": fitted}[judge]
        for expert, pairs in enumerate(seen.pairs(range(len(ids)))):
            token = seen.token[pairs]
            error = some.activations(expert, h[token], expert_gate_up(inputs, expert))
            error = error @ outputs.decoded(expert)[0]
            if part.outputs.basis is not None:
                error = error @ part.outputs.basis.matrix.T
            error -= some.activations(expert, seen.x[token].to(torch.float32)) @ some.down[expert].to(torch.float32).T
            weighted = error if metric is None else error @ metric
            loss[expert] = float(((weighted * error).sum(1) * seen.weight[pairs]).sum())
    return losses


def optimism(layer: LayerTask, shrinkage: float) -> float:
    """How many times more a layer's sample of experts loses on held-out tokens than on those it is rounded by.

    At least 1; 1 where nothing is held out, or nothing was lost.

    Args:
        layer: as it was rounded.
        shrinkage: of its moments.
    """
    fitted, held, design = layer.fitted, layer.held, layer.design
    if fitted is None or held is None:
        return 1.0
    ids = trial_experts(design.mass.to("cpu", torch.float64), held, design.dense_ids, _TRIAL_EXPERTS)
    if not ids:
        return 1.0
    settings = replace(layer.settings, shrinkage=shrinkage)
    judges: tuple[Literal["held", "fitted"], ...] = ("held", "fitted")
    lost = trial_losses(layer.experts, fitted, held, design, settings, layer.metric, ids, judges).sum(1)
    mass = [sum(float(one.weight[pairs].sum()) for pairs in one.pairs(ids)) for one in (held, fitted)]
    if not float(lost[1]) > 0 or not min(mass) > 0:
        return 1.0
    return max(1.0, float(lost[0] / lost[1]) * mass[1] / mass[0])


def _compact(fitted: RoutedTokens, held: RoutedTokens) -> tuple[RoutedTokens, RoutedTokens]:
    """Both with the inputs of no other tokens than theirs."""
    used = torch.cat([fitted.token, held.token]).unique()
    x = fitted.x[used]
    one, two = (replace(some, x=x, token=torch.searchsorted(used, some.token)) for some in (fitted, held))
    return one, two


def _of_experts(design: LayerDesign, ids: list[int]) -> LayerDesign:
    """The design of some experts alone, none of them dense."""

    def rows(side: SideDesign, matrices: int) -> SideDesign:
        widths = side.widths.unflatten(0, (-1, matrices))[ids].flatten(0, 1)
        weight = side.weight.unflatten(0, (-1, matrices))[ids].flatten(0, 1)
        return replace(side, widths=widths, weight=weight)

    return replace(
        design,
        inputs=rows(design.inputs, 2),
        outputs=rows(design.outputs, 1),
        slope_ratio=design.slope_ratio[ids],
        mass=design.mass[ids],
        dense_ids=(),
    )
