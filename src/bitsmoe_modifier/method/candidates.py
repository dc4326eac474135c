"""From statistics to a `LayerPlan`: candidate bases of both sides, each with its cost tables."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, TypeVar

import torch
from torch.nn.functional import embedding_bag

from ..errors import CalibrationError, RecipeError
from .costs import side_costs
from .design import LayerPlan, SidePlan, moved
from .distributed import Ranks
from .layer import BasisChoice, DenseExperts, QuantizerSettings
from .numerics import collected, note
from .spectral import (
    SharedBasis,
    input_directions,
    output_coupling,
    output_directions,
    project,
    round_and_refit,
)
from .statistics import LayerStatistics, RoutedTokens, collect_statistics, prior_share, shrink
from .trial import settled, to_be_tried

#: An expert is super when its largest output norm exceeds this many times the median expert's.
_SUPER_RATIO = 20.0

T = TypeVar("T")


def plan_layer(
    experts: DenseExperts,
    tokens: RoutedTokens,
    settings: QuantizerSettings,
    metric: torch.Tensor | None = None,
    dense_ids: Sequence[int] | Literal["auto"] = (),
    ranks: Ranks | None = None,
) -> LayerPlan:
    """Measure a layer, build its candidate bases and cost tables (method.md sections 1 to 3).

    Args:
        experts: dense experts on the device to work on.
        tokens: their routed calibration tokens, on the same device.
        settings: how to quantize.
        metric: ``[H, H]`` loss curvature in the layer's output, None for squared output error.
        dense_ids: experts to keep dense; "auto" finds those with an outlying down-projection output.
        ranks: the processes that plan the layer together, all with the same arguments; None for this one alone.

    Raises:
        CalibrationError: NaN or infinity in weights or activations, naming the expert.
    """
    settings = settings.for_sizes(*experts.down.shape[1:])
    ranks = ranks or Ranks.alone()
    experts.check_finite()
    statistics = collect_statistics(
        tokens, experts.gate_up, experts.down, experts.gating, experts.in_bias, metric, ranks, dense_ids == "auto"
    )
    if dense_ids == "auto":
        dense_ids = super_experts(statistics)
    if dense_ids and 0 not in settings.widths:
        raise RecipeError("super_experts store no codes, which takes width 0; add 0 to `bit_widths`")
    block_size = settings.resolve_block_size(experts.down.shape[1])
    warnings: list[str] = []
    with collected(warnings):
        inputs = _candidates(
            settings.input_basis,
            lambda spectral: _plan_input(experts, tokens, statistics, settings, block_size, spectral, ranks),
        )
        outputs = _candidates(
            settings.output_basis,
            lambda spectral: _plan_output(experts, statistics, settings, block_size, spectral, metric, ranks),
        )
    num_experts, hidden, width = experts.down.shape
    plan = LayerPlan(
        settings,
        (num_experts, hidden, width),
        inputs,
        outputs,
        block_size,
        _constant_bits(experts, len(dense_ids)),
        statistics.slope_ratio,
        statistics.mass,
        tuple(dense_ids),
        tuple(warnings),
        int(experts.ungated),
    )
    return settled(plan, unseen_bases(plan, experts, tokens, metric, ranks), experts, tokens, metric, ranks)


def unseen_bases(
    plan: LayerPlan, experts: DenseExperts, tokens: RoutedTokens, metric: torch.Tensor | None, ranks: Ranks
) -> LayerPlan:
    """The plan with bases made without the held-out rows, which are to judge them in a trial.

    Its cost tables stay: what they allocate by differs little. A basis that these rows alone do not give (its inverse
    does not exist) stays too.
    """
    if not to_be_tried(plan, tokens):
        return plan
    settings = plan.settings
    statistics = collect_statistics(
        tokens.fitted(), experts.gate_up, experts.down, experts.gating, experts.in_bias, metric, ranks
    )

    def remade(side: SidePlan, make: Callable[[], tuple[SharedBasis, torch.Tensor]]) -> SidePlan:
        try:
            return side if side.basis is None else replace(side, basis=make()[0])
        except RecipeError:
            return side

    inputs = (remade(side, lambda: _input_basis(experts, statistics, settings, ranks)) for side in plan.inputs)
    outputs = (remade(side, lambda: _output_basis(statistics, settings, metric, ranks)) for side in plan.outputs)
    return replace(plan, inputs=tuple(inputs), outputs=tuple(outputs))


def _constant_bits(experts: DenseExperts, num_dense: int) -> int:
    """Header, dense experts with their ids, biases, and a checksum of 64 bits per tensor outside the bases."""
    _, hidden, width = experts.down.shape
    dense = num_dense * (3 * hidden * width * experts.down.element_size() * 8 + 32)
    bias = sum(t.nbytes * 8 for t in (experts.in_bias, experts.out_bias) if t is not None)
    tensors = 7 + 3 * bool(num_dense) + 2 * (experts.in_bias is not None)
    return 16 * 32 + 64 * tensors + dense + bias


def super_experts(statistics: LayerStatistics) -> tuple[int, ...]:
    """Experts whose largest output norm stands out of the layer's: at most one in 32, all above 20 medians."""
    peak = statistics.peak_output
    routed = peak[peak > 0]
    if not len(routed):
        return ()
    limit = _SUPER_RATIO * float(routed.median())
    found = [int(e) for e in peak.argsort(descending=True) if float(peak[e]) > limit]
    return tuple(sorted(found[: max(1, len(peak) // 32)]))


def _candidates(choice: BasisChoice, plan: Callable[[bool], SidePlan]) -> tuple[SidePlan, ...]:
    """Plans of a side with and without a basis, as the choice allows; "auto" goes on without one that fails.

    Raises:
        CalibrationError: when no candidate has finite costs.
    """
    plans = []
    if choice != "none":
        try:
            plans.append(plan(True))
        except RecipeError as error:
            if choice == "spectral":
                raise
            note(str(error))
    if choice != "spectral":
        plans.append(plan(False))
    finite = tuple(side for side in plans if bool(torch.isfinite(side.costs.distortion).all()))
    if not finite:
        raise CalibrationError(
            "the squares of its rounding errors overflow; check the base model for outlying weights, and the "
            "calibration text"
        )
    return finite


def _input_basis(
    experts: DenseExperts, statistics: LayerStatistics, settings: QuantizerSettings, ranks: Ranks
) -> tuple[SharedBasis, torch.Tensor]:
    """The rounded basis of the inputs, and its inverse."""
    moment, hidden = statistics.input_moment, experts.down.shape[1]
    b = input_directions(moment, experts.gate_up, statistics.row_importance, hidden, settings.dampening_frac, ranks)
    group = settings.resolve_basis_group(hidden)
    return _decided(lambda: round_and_refit(b, settings.basis_bits, group, moment, "in"), b.device, ranks)


def _output_basis(
    statistics: LayerStatistics, settings: QuantizerSettings, metric: torch.Tensor | None, ranks: Ranks
) -> tuple[SharedBasis, torch.Tensor]:
    """The rounded basis of the outputs, and its inverse."""
    hidden = len(statistics.down_output_moment)
    u = output_directions(statistics.down_output_moment, hidden, metric)
    group = settings.resolve_basis_group(hidden)
    return _decided(lambda: round_and_refit(u, settings.basis_bits, group, None, "out"), u.device, ranks)


def _plan_input(
    experts: DenseExperts,
    tokens: RoutedTokens,
    statistics: LayerStatistics,
    settings: QuantizerSettings,
    block_size: int,
    spectral: bool,
    ranks: Ranks,
) -> SidePlan:
    num_experts, _, length = experts.down.shape
    basis, inverse = _input_basis(experts, statistics, settings, ranks) if spectral else (None, None)
    weight = statistics.row_importance.view(2 * num_experts, length)
    gain = direction_gain(tokens, statistics, basis).repeat_interleave(2, dim=0)
    mine = ranks.mine(num_experts)
    factors = (experts.in_factors(part, inverse) for part in experts.parts(mine))
    own = range(2 * mine.start, 2 * mine.stop)
    trellis: Literal["group"] | None = "group" if settings.codes == "trellis" else None
    costs = side_costs(factors, weight, gain, settings.widths, block_size, settings.group_size, own, ranks, trellis)
    return SidePlan(basis, costs, weight, gain.shape[1])


def _decided(make: Callable[[], T], device: torch.device, ranks: Ranks) -> T:
    """What the first process makes, on all of them: eigenvectors, and whether a basis can be inverted, may depend on
    the machine, and processes that went on differently would wait for each other for ever."""
    if ranks.size == 1:
        return make()
    return moved(ranks.compute(lambda: moved(make(), "cpu")), device)


def _plan_output(
    experts: DenseExperts,
    statistics: LayerStatistics,
    settings: QuantizerSettings,
    block_size: int,
    spectral: bool,
    metric: torch.Tensor | None,
    ranks: Ranks,
) -> SidePlan:
    num_experts, hidden, _ = experts.down.shape
    basis, inverse = _output_basis(statistics, settings, metric, ranks) if spectral else (None, None)
    coupling = output_coupling(basis, metric, hidden, experts.down.device)
    gain = coupling.diagonal().expand(num_experts, -1)
    weight = statistics.down_moment_diagonal
    mine = ranks.mine(num_experts)
    factors = (experts.out_factors(part, inverse).transpose(1, 2) for part in experts.parts(mine))
    trellis: Literal["chain"] | None = "chain" if settings.codes == "trellis" else None
    costs = side_costs(factors, weight, gain, settings.widths, block_size, settings.group_size, mine, ranks, trellis)
    return SidePlan(basis, costs, weight, gain.shape[1])


def direction_gain(tokens: RoutedTokens, statistics: LayerStatistics, basis: SharedBasis | None) -> torch.Tensor:
    """diag(B C[e] Bᵀ) of every expert with the prior's share, boosted, float32 ``[E, R]``."""
    h2 = project(tokens.x, basis).square()
    starts = torch.tensor((0, *tokens.counts[:-1]), device=h2.device).cumsum(0)
    gain = embedding_bag(tokens.token, h2, starts, mode="sum", per_sample_weights=tokens.weight)
    total = tokens.weight.sum().clamp_min(torch.finfo(torch.float32).tiny)
    share = prior_share(tokens.counts, tokens.x.shape[1], h2.device)
    return shrink(gain, gain.sum(0) / total, statistics.mass, share) * statistics.boost[:, None]
