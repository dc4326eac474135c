"""One layer from dense experts to stored tensors: the paper's steps in order, free of any framework.

    plan = plan_layer(experts, tokens, settings)      # statistics, bases, refit, cost tables
    packed, report = quantize_layer(plan, budget)     # allocation, rounding with feedback, packing

`plan_layer` is also what global allocation needs of every layer before the first one is rounded: `LayerPlan.curve`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from .allocation import Allocation, Solver, allocate, hull_curve
from .costs import SideCosts, side_costs, unit_cost
from .errors import CalibrationError, RecipeError
from .gating import Gating
from .layout import ExpertsLayout, PackedExperts, pack_factor
from .rounding import decode, encode, refine, refit_row_steps, round_with_feedback
from .spectral import SharedBasis, input_directions, output_directions, round_and_refit
from .statistics import (
    LayerStatistics,
    RoutedTokens,
    collect_statistics,
    expert_moments,
    prior_share,
    shrink,
)

BasisChoice = Literal["auto", "spectral", "none"]

#: Elements of the moments that feedback factors at once: bounds its temporaries to about a gigabyte.
_MOMENT_ELEMENTS = 1 << 26
#: Tokens on which the report's output error is measured.
_REPORT_TOKENS = 4096
#: An expert is super when its largest output norm exceeds this many times the median expert's.
_SUPER_RATIO = 20.0


@dataclass(frozen=True)
class QuantizerSettings:
    """Everything that decides how a layer is quantized; `BitsMoEModifier` documents the fields for users."""

    bits: float = 2.0
    widths: tuple[int, ...] = (0, 1, 2, 3, 4, 6)
    block_size: int | None = None
    group_size: int = 128
    basis_bits: int = 4
    input_basis: BasisChoice = "auto"
    output_basis: BasisChoice = "auto"
    error_feedback: bool = True
    refine_passes: int = 2
    solver: Solver = "auto"
    dampening_frac: float = 0.01

    def resolve_block_size(self, rank: int) -> int:
        """The block size for ``rank`` directions: as set, or the power of two in 16..128 nearest ``rank / 16``."""
        if self.block_size is not None:
            return self.block_size
        size = 128
        while size > 16 and (size > rank // 16 or rank % size):
            size //= 2
        return size if rank % size == 0 else 8

    def resolve_basis_group(self, columns: int) -> int:
        """Elements of a basis row per step: the largest of 128, 64, … 8 that divides ``columns``."""
        return next((g for g in (128, 64, 32, 16, 8) if columns % g == 0), columns)


@dataclass(frozen=True)
class DenseExperts:
    """The unquantized experts of a layer.

    Attributes:
        gate_up: ``[E, 2I, H]``, gate rows first.
        down: ``[E, H, I]``.
        gating: elementwise function between them.
        in_bias, out_bias: ``[E, 2I]``, ``[E, H]`` or None.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    gating: Gating
    in_bias: torch.Tensor | None = None
    out_bias: torch.Tensor | None = None

    def check_finite(self) -> None:
        """Raise CalibrationError naming the first expert with NaN or infinity in its weights."""
        for name in ("gate_up", "down", "in_bias", "out_bias"):
            tensor = getattr(self, name)
            bad = torch.zeros(()) if tensor is None else ~torch.isfinite(tensor).flatten(1).all(1)
            if bool(bad.any()):
                expert = int(bad.nonzero()[0])
                raise CalibrationError(
                    f"expert {expert}: its {name} weights hold NaN or infinity; check the base model"
                )


@dataclass(frozen=True)
class SidePlan:
    """One side (input or output) of a layer in one basis, ready to be rounded.

    Attributes:
        basis: the rounded basis, None where the side keeps its own channels.
        factor: float32, ``[2E, I, R]`` (gate and up of each expert) or ``[E, I, R']`` (down, transposed).
        weight: importance of the elements along I, ``[matrices, I]``.
        costs: distortion and steps per unit and width.
        basis_bits: stored bits of the basis.
    """

    basis: SharedBasis | None
    factor: torch.Tensor
    weight: torch.Tensor
    costs: SideCosts
    basis_bits: int


@dataclass(frozen=True)
class LayerPlan:
    """A layer measured and decomposed, before any bit is spent.

    Attributes:
        experts, tokens, settings: what was planned.
        statistics: calibration statistics.
        inputs, outputs: the candidate plans of each side (with and without a basis, as the settings allow).
        block_size: directions per unit.
        dense_ids: super experts, kept dense.
        warnings: recoverable numerical trouble, in words for the user.
    """

    experts: DenseExperts
    tokens: RoutedTokens
    settings: QuantizerSettings
    statistics: LayerStatistics
    inputs: tuple[SidePlan, ...]
    outputs: tuple[SidePlan, ...]
    block_size: int
    dense_ids: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()

    def fixed_bits(self, inputs: SidePlan, outputs: SidePlan) -> int:
        """Stored bits that do not depend on the allocation: bases, widths, header, checksums, dense experts, biases."""
        num_experts, hidden, width = self.experts.down.shape
        units = num_experts * (2 * inputs.factor.shape[2] + outputs.factor.shape[2]) // self.block_size
        dense = len(self.dense_ids) * 3 * hidden * width * self.experts.down.element_size() * 8
        bias = sum(t.nbytes * 8 for t in (self.experts.in_bias, self.experts.out_bias) if t is not None)
        tensors = 7 + sum(0 if s.basis is None else 1 + (s.basis.step is not None) for s in (inputs, outputs))
        tensors += 3 * bool(self.dense_ids) + 2 * (self.experts.in_bias is not None)
        ids = 32 * len(self.dense_ids)
        return inputs.basis_bits + outputs.basis_bits + 8 * units + 16 * 32 + 64 * tensors + dense + ids + bias

    def curve(self, points: int = 256) -> tuple[np.ndarray, np.ndarray]:
        """Least distortion against stored bits, over both sides' candidate bases.

        Returns:
            (bits ``[points]`` rising, distortion ``[points]`` not rising).
        """
        cost = self._unit_costs()
        corners = []
        for inputs in self.inputs:
            for outputs in self.outputs:
                spent, distortion = hull_curve(self._table(inputs, outputs), cost)
                corners.append((spent + self.fixed_bits(inputs, outputs), distortion))
        bits = np.linspace(min(c[0][0] for c in corners), max(c[0][-1] for c in corners), points)
        return bits, np.min([np.interp(bits, *c, left=np.inf) for c in corners], axis=0)

    def choose(self, budget_bits: float) -> tuple[SidePlan, SidePlan, Allocation]:
        """The pair of bases with the least predicted distortion under the budget, and its allocation.

        Raises:
            RecipeError: when the budget does not even pay what every option stores regardless of width.
        """
        best: tuple[SidePlan, SidePlan, Allocation] | None = None
        cost, least = self._unit_costs(), np.inf
        for inputs in self.inputs:
            for outputs in self.outputs:
                table, fixed = self._table(inputs, outputs), self.fixed_bits(inputs, outputs)
                least = min(least, fixed + len(table) * cost[0])
                if budget_bits < fixed + len(table) * cost[0]:
                    continue
                solved = allocate(table, cost, budget_bits - fixed, self.settings.solver)
                if best is None or solved.distortion < best[2].distortion:
                    best = (inputs, outputs, solved)
        if best is None:
            weights = self.experts.gate_up.numel() + self.experts.down.numel()
            raise RecipeError(
                f"bits: {budget_bits / weights:.3f} is below the {least / weights:.3f} bits per weight that this "
                "layer's bases, widths, dense experts and narrowest codes take; raise `bits`, lower `basis_bits`, set "
                "the bases to none or add 0 to `widths`"
            )
        return best

    def _unit_costs(self) -> np.ndarray:
        length = self.experts.down.shape[2]
        widths = self.inputs[0].costs.widths
        return np.array(
            [unit_cost(w, self.block_size, length, self.settings.group_size) for w in widths], dtype=np.float64
        )

    def _table(self, inputs: SidePlan, outputs: SidePlan) -> np.ndarray:
        table = torch.cat([s.costs.distortion.flatten(0, 1) for s in (inputs, outputs)]).numpy()
        if not self.dense_ids:
            return table
        # A dense expert's units lose nothing at width 0, so no solver buys them more while another unit gains by it;
        # `quantize_layer` takes back what is bought from a budget that exceeds every need.
        table = table.copy()
        matrices = torch.zeros(len(self.experts.down), dtype=torch.bool)
        matrices[list(self.dense_ids)] = True
        units_in, units_out = inputs.costs.distortion.shape[1], outputs.costs.distortion.shape[1]
        mask = torch.cat([matrices.repeat_interleave(2 * units_in), matrices.repeat_interleave(units_out)])
        table[mask.numpy()] = 0.0
        return table


@dataclass(frozen=True)
class LayerReport:
    """What was done to one layer, for reports and logs.

    ``energy`` is what dropping each unit of directions would lose, summed over the experts' matrices of a side, in the
    unit of the layer's squared output error; empty where width 0 is not allowed.
    """

    bits: float
    tokens_per_expert: tuple[int, ...]
    prior_share: tuple[float, ...]
    width_counts: dict[str, dict[int, int]]
    input_basis_bits: int
    output_basis_bits: int
    predicted_distortion: float
    allocation_gap: float
    solver: str
    relative_output_error: float
    dense_experts: tuple[int, ...] = ()
    warnings: tuple[str, ...] = field(default=())
    energy: dict[str, tuple[float, ...]] = field(default_factory=dict)


def plan_layer(
    experts: DenseExperts,
    tokens: RoutedTokens,
    settings: QuantizerSettings,
    metric: torch.Tensor | None = None,
    dense_ids: Sequence[int] | Literal["auto"] = (),
) -> LayerPlan:
    """Measure a layer, build its candidate bases and cost tables (method.md sections 1 to 3).

    Args:
        experts: dense experts on the device to work on.
        tokens: their routed calibration tokens, on the same device.
        settings: how to quantize.
        metric: ``[H, H]`` loss curvature in the layer's output, None for squared output error.
        dense_ids: experts to keep dense; "auto" finds those with an outlying down-projection output.

    Raises:
        CalibrationError: NaN or infinity in weights or activations, naming the expert.
    """
    experts.check_finite()
    statistics = collect_statistics(tokens, experts.gate_up, experts.down, experts.gating, experts.in_bias, metric)
    if dense_ids == "auto":
        dense_ids = super_experts(statistics)
    if dense_ids and 0 not in settings.widths:
        raise RecipeError("super_experts store no codes, which takes width 0; add 0 to `widths`")
    block_size = settings.resolve_block_size(experts.down.shape[1])
    warnings: list[str] = []
    inputs = _candidates(
        settings.input_basis,
        lambda spectral: _plan_input(experts, tokens, statistics, settings, block_size, spectral, warnings),
        warnings,
    )
    outputs = _candidates(
        settings.output_basis,
        lambda spectral: _plan_output(experts, statistics, settings, block_size, spectral, metric, warnings),
        warnings,
    )
    return LayerPlan(
        experts, tokens, settings, statistics, inputs, outputs, block_size, tuple(dense_ids), tuple(warnings)
    )


def super_experts(statistics: LayerStatistics) -> tuple[int, ...]:
    """Experts whose largest output norm stands out of the layer's: at most one in 32, all above 20 medians."""
    peak = statistics.peak_output
    routed = peak[peak > 0]
    if not len(routed):
        return ()
    limit = _SUPER_RATIO * float(routed.median())
    found = [int(e) for e in peak.argsort(descending=True) if float(peak[e]) > limit]
    return tuple(sorted(found[: max(1, len(peak) // 32)]))


def _candidates(
    choice: BasisChoice, plan: Callable[[bool], SidePlan], warnings: list[str]
) -> tuple[SidePlan, ...]:
    """Plans of a side with and without a basis, as the choice allows; "auto" goes on without one that fails."""
    plans = []
    if choice != "none":
        try:
            plans.append(plan(True))
        except RecipeError as error:
            if choice == "spectral":
                raise
            warnings.append(str(error))
    if choice != "spectral":
        plans.append(plan(False))
    return tuple(plans)


def _plan_input(
    experts: DenseExperts,
    tokens: RoutedTokens,
    statistics: LayerStatistics,
    settings: QuantizerSettings,
    block_size: int,
    spectral: bool,
    warnings: list[str],
) -> SidePlan:
    num_experts, hidden, length = experts.down.shape
    gate_up = experts.gate_up.to(torch.float32)
    basis, basis_bits, moment = None, 0, statistics.input_moment
    if spectral:
        b = input_directions(moment, gate_up, statistics.row_importance, hidden, settings.dampening_frac)
        group = settings.resolve_basis_group(hidden)
        basis, inverse, warning = round_and_refit(b, settings.basis_bits, group, moment, "in")
        warnings.extend([warning] if warning else [])
        gate_up = gate_up @ inverse.to(torch.float32)
        basis_bits = _stored_bits(basis)
    factor = gate_up.reshape(2 * num_experts, length, -1)
    weight = statistics.row_importance.view(2 * num_experts, length)
    gain = direction_gain(tokens, statistics, basis).repeat_interleave(2, dim=0)
    costs = side_costs(factor, weight, gain, settings.widths, block_size, settings.group_size)
    return SidePlan(basis, factor, weight, costs, basis_bits)


def _plan_output(
    experts: DenseExperts,
    statistics: LayerStatistics,
    settings: QuantizerSettings,
    block_size: int,
    spectral: bool,
    metric: torch.Tensor | None,
    warnings: list[str],
) -> SidePlan:
    num_experts, hidden, _ = experts.down.shape
    down = experts.down.to(torch.float32)
    basis, basis_bits = None, 0
    gain = torch.ones(hidden, device=down.device) if metric is None else metric.diagonal().clone()
    if spectral:
        u = output_directions(statistics.down_output_moment, hidden, metric)
        group = settings.resolve_basis_group(hidden)
        basis, inverse, warning = round_and_refit(u, settings.basis_bits, group, None, "out")
        warnings.extend([warning] if warning else [])
        down = inverse.to(torch.float32) @ down
        gain = (basis.matrix * (basis.matrix if metric is None else metric @ basis.matrix)).sum(0)
        basis_bits = _stored_bits(basis)
    factor = down.transpose(1, 2)
    weight = statistics.down_moment_diagonal
    gain = gain.expand(num_experts, -1)
    costs = side_costs(factor, weight, gain, settings.widths, block_size, settings.group_size)
    return SidePlan(basis, factor, weight, costs, basis_bits)


def _stored_bits(basis: SharedBasis) -> int:
    return 8 * (basis.stored.nbytes + (0 if basis.step is None else basis.step.nbytes))


def direction_gain(tokens: RoutedTokens, statistics: LayerStatistics, basis: SharedBasis | None) -> torch.Tensor:
    """diag(B C[e] Bᵀ) of every expert with the prior's share, boosted, float32 ``[E, R]``."""
    num_experts = len(tokens.counts)
    h2 = _project(tokens.x, basis).square()
    gain = torch.zeros(num_experts, h2.shape[1], device=h2.device)
    for expert, pairs in zip(range(num_experts), tokens.pairs(range(num_experts)), strict=True):
        gain[expert] = tokens.weight[pairs] @ h2[tokens.token[pairs]]
    total = tokens.weight.sum().clamp_min(torch.finfo(torch.float32).tiny)
    share = prior_share(tokens.counts, tokens.x.shape[1], h2.device)
    return shrink(gain, gain.sum(0) / total, statistics.mass, share) * statistics.boost[:, None]


def _project(x: torch.Tensor, basis: SharedBasis | None) -> torch.Tensor:
    """h = B x of every token, float32 ``[T, R]``."""
    wide = x.to(torch.float32)
    return wide if basis is None else wide @ basis.matrix.T


# -------------------------------------------------------------------------------------------- quantization


def quantize_layer(plan: LayerPlan, budget_bits: float) -> tuple[PackedExperts, LayerReport]:
    """Allocate, round and pack one planned layer (method.md sections 4 and 5).

    Args:
        plan: from `plan_layer`.
        budget_bits: stored bits of the whole layer, everything counted.

    Raises:
        RecipeError: when the budget is too small.
    """
    inputs, outputs, allocation = plan.choose(budget_bits)
    num_experts, hidden, length = plan.experts.down.shape
    rank_in, rank_out = inputs.factor.shape[2], outputs.factor.shape[2]
    chosen = torch.from_numpy(allocation.choice)
    cut = 2 * num_experts * rank_in // plan.block_size
    pick_in = chosen[:cut].view(2 * num_experts, -1)
    pick_out = chosen[cut:].view(num_experts, -1)
    for expert in plan.dense_ids:
        pick_in[2 * expert : 2 * expert + 2] = 0
        pick_out[expert] = 0

    h = _project(plan.tokens.x, inputs.basis)
    codes_in, step_in, width_in = _round_input(plan, inputs, pick_in, h)
    level_in = _levels(width_in, plan.block_size).to(h.device)
    rounded_in = decode(codes_in, _per_column(step_in, plan.settings.group_size), level_in[:, None])
    rounded_in = rounded_in.view(num_experts, 2 * length, rank_in)
    codes_out, step_out, width_out = _round_output(plan, outputs, pick_out, h, rounded_in)
    level_out = _levels(width_out, plan.block_size).to(h.device)
    rounded_out = decode(codes_out, _per_column(step_out, plan.settings.group_size), level_out[:, None])

    basis_group = plan.settings.resolve_basis_group(hidden)
    layout = ExpertsLayout(
        num_experts=num_experts,
        hidden_size=hidden,
        intermediate_size=length,
        rank_in=rank_in,
        rank_out=rank_out,
        block_size=plan.block_size,
        group_size=plan.settings.group_size,
        basis_in_bits=0 if inputs.basis is None else inputs.basis.bits,
        basis_out_bits=0 if outputs.basis is None else outputs.basis.bits,
        basis_group_size=basis_group,
        num_dense=len(plan.dense_ids),
        has_bias=int(plan.experts.in_bias is not None),
    )
    packed = _pack(plan, layout, inputs, outputs, codes_in, step_in, width_in, codes_out, step_out, width_out)
    error = _relative_error(plan, outputs, h, rounded_in, rounded_out)
    names = {"gate": width_in[0::2], "up": width_in[1::2], "down": width_out}
    report = LayerReport(
        bits=packed.bits_per_weight,
        tokens_per_expert=plan.tokens.counts,
        prior_share=tuple(prior_share(plan.tokens.counts, hidden).tolist()),
        width_counts={name: _histogram(widths) for name, widths in names.items()},
        input_basis_bits=layout.basis_in_bits,
        output_basis_bits=layout.basis_out_bits,
        predicted_distortion=allocation.distortion,
        allocation_gap=allocation.gap,
        solver=allocation.solver,
        relative_output_error=error,
        dense_experts=plan.dense_ids,
        warnings=plan.warnings,
        energy={"in": _energy(inputs.costs), "out": _energy(outputs.costs)},
    )
    return packed, report


def _energy(costs: SideCosts) -> tuple[float, ...]:
    return tuple(costs.distortion[:, :, 0].sum(0).tolist()) if costs.widths[0] == 0 else ()


def _histogram(widths: torch.Tensor) -> dict[int, int]:
    values, counts = widths.unique(return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def _levels(widths: torch.Tensor, block_size: int) -> torch.Tensor:
    """``2**b - 1`` per direction, float32 ``[matrices, directions]``, from unit widths ``[matrices, units]``."""
    return (2.0 ** widths.to(torch.float32) - 1).repeat_interleave(block_size, dim=1)


def _per_column(step: torch.Tensor, group_size: int) -> torch.Tensor:
    """Steps ``[matrices, groups, directions]`` to one per element, ``[matrices, I, directions]``."""
    return step.repeat_interleave(group_size, dim=1)


def _chosen_steps(side: SidePlan, pick: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps ``[matrices, groups, directions]`` and uint8 widths ``[matrices, units]`` of the allocated columns."""
    columns = pick.repeat_interleave(block_size, dim=1).to(side.costs.steps.device)
    steps = side.costs.steps.gather(0, columns[None, :, None].expand(1, *side.costs.steps.shape[1:]))[0]
    return steps, torch.tensor(side.costs.widths, dtype=torch.uint8)[pick]


def _round_input(
    plan: LayerPlan, side: SidePlan, pick: torch.Tensor, h: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (float32 ``[2E, I, R]``), steps and widths of gate and up."""
    steps, widths = _chosen_steps(side, pick, plan.block_size)
    level = _levels(widths, plan.block_size).to(h.device)
    if not plan.settings.error_feedback:
        return encode(side.factor, _per_column(steps, plan.settings.group_size), level[:, None]), steps, widths
    num_experts, rank = len(plan.tokens.counts), h.shape[1]
    order = torch.argsort(level, dim=1, stable=True)
    share = prior_share(plan.tokens.counts, rank, h.device)
    common = _common_moment(plan, side)
    codes = torch.empty_like(side.factor)
    chunk = max(1, _MOMENT_ELEMENTS // (2 * rank * rank))
    for start in range(0, num_experts, chunk):
        experts = range(start, min(start + chunk, num_experts))
        moments = expert_moments(lambda _, pairs: h[plan.tokens.token[pairs]], plan.tokens, experts, rank)
        part = slice(experts.start, experts.stop)
        moments = shrink(moments, common, plan.statistics.mass[part], share[part])
        matrices = slice(2 * experts.start, 2 * experts.stop)
        moments = moments.repeat_interleave(2, dim=0)
        w, limits, rho = side.factor[matrices], level[matrices][:, None], side.weight[matrices]
        damp = plan.settings.dampening_frac
        codes[matrices], steps[matrices] = round_with_feedback(
            w, moments, steps[matrices], limits, order[matrices], damp, rho
        )
        for _ in range(plan.settings.refine_passes):
            codes[matrices], steps[matrices] = refine(w, moments, codes[matrices], steps[matrices], limits, damp, rho)
    return codes, steps, widths


def _common_moment(plan: LayerPlan, side: SidePlan) -> torch.Tensor:
    """B C Bᵀ per unit of pair weight, float32 ``[R, R]``."""
    moment = plan.statistics.input_moment
    if side.basis is not None:
        moment = side.basis.matrix @ moment @ side.basis.matrix.T
    return moment / plan.tokens.weight.sum().clamp_min(torch.finfo(torch.float32).tiny)


def _activations(plan: LayerPlan, expert: int, h: torch.Tensor, rounded_in: torch.Tensor) -> torch.Tensor:
    """z of one expert after rounding, for inputs ``h [pairs, R]``."""
    bias = None if plan.experts.in_bias is None else plan.experts.in_bias[expert].to(torch.float32)
    gate, up = torch.nn.functional.linear(h, rounded_in[expert], bias).chunk(2, dim=1)
    return plan.experts.gating(gate, up)


def _round_output(
    plan: LayerPlan, side: SidePlan, pick: torch.Tensor, h: torch.Tensor, rounded_in: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (float32 ``[E, I, R']``), steps and widths of down, under the activations of the rounded gate and up."""
    steps, widths = _chosen_steps(side, pick, plan.block_size)
    level = _levels(widths, plan.block_size).to(h.device)
    per_column = _per_column(steps, plan.settings.group_size)
    if not plan.settings.error_feedback:
        return encode(side.factor, per_column, level[:, None]), steps, widths
    num_experts, length = side.factor.shape[:2]
    moments = expert_moments(
        lambda expert, pairs: _activations(plan, expert, h[plan.tokens.token[pairs]], rounded_in),
        plan.tokens,
        range(num_experts),
        length,
    )
    total = plan.tokens.weight.sum().clamp_min(torch.finfo(torch.float32).tiny)
    share = prior_share(plan.tokens.counts, length, h.device)
    moments = shrink(moments, moments.sum(0) / total, plan.statistics.mass, share)
    order = torch.argsort(moments.diagonal(dim1=1, dim2=2), dim=1, descending=True, stable=True)
    # rows are directions here, so that the columns to round are those along I
    w, limits, damp = side.factor.transpose(1, 2), level[:, :, None], plan.settings.dampening_frac
    per_row = per_column.transpose(1, 2)
    codes, _ = round_with_feedback(w, moments, per_row, limits, order, damp)
    steps = steps.transpose(1, 2)
    for _ in range(plan.settings.refine_passes):
        steps = refit_row_steps(w, moments, codes, steps, limits, damp)
        per_row = steps.repeat_interleave(plan.settings.group_size, dim=2)
        codes, _ = refine(w, moments, codes, per_row, limits, damp)
    return codes.transpose(1, 2), steps.transpose(1, 2).contiguous(), widths


def _pack(
    plan: LayerPlan,
    layout: ExpertsLayout,
    inputs: SidePlan,
    outputs: SidePlan,
    codes_in: torch.Tensor,
    step_in: torch.Tensor,
    width_in: torch.Tensor,
    codes_out: torch.Tensor,
    step_out: torch.Tensor,
    width_out: torch.Tensor,
) -> PackedExperts:
    device = codes_in.device
    width_in, width_out = width_in.to(device), width_out.to(device)
    payload_in, steps_in = pack_factor(codes_in.to(torch.uint8), step_in, width_in, layout, "in")
    payload_out, steps_out = pack_factor(codes_out.transpose(1, 2).to(torch.uint8), step_out, width_out, layout, "out")
    packed = PackedExperts(
        layout=layout.to_tensor().to(device),
        widths_in=width_in.view(layout.num_experts, 2, -1),
        widths_out=width_out,
        codes_in=payload_in,
        codes_out=payload_out,
        steps_in=steps_in,
        steps_out=steps_out,
        in_bias=plan.experts.in_bias,
        out_bias=plan.experts.out_bias,
    )
    if inputs.basis is not None:
        packed = replace(packed, basis_in=inputs.basis.stored, basis_in_step=inputs.basis.step)
    if outputs.basis is not None:
        packed = replace(packed, basis_out=outputs.basis.stored, basis_out_step=outputs.basis.step)
    if plan.dense_ids:
        ids = torch.tensor(plan.dense_ids, device=device)
        packed = replace(
            packed,
            dense_ids=ids.to(torch.int32),
            dense_in=plan.experts.gate_up[ids],
            dense_out=plan.experts.down[ids],
        )
    return packed.sealed()


def _relative_error(
    plan: LayerPlan, outputs: SidePlan, h: torch.Tensor, rounded_in: torch.Tensor, rounded_out: torch.Tensor
) -> float:
    """‖y - ŷ‖² / ‖y‖² of the layer's routed output on the first calibration tokens."""
    tokens, experts = plan.tokens, plan.experts
    sample = min(len(tokens.x), _REPORT_TOKENS)
    hidden = experts.down.shape[1]
    exact = torch.zeros(sample, hidden, device=h.device)
    error = torch.zeros(sample, hidden, device=h.device)
    for expert, pairs in zip(range(len(tokens.counts)), tokens.pairs(range(len(tokens.counts))), strict=True):
        token = tokens.token[pairs]
        inside = token < sample
        token, weight = token[inside], tokens.weight[pairs][inside].sqrt()[:, None]
        if not len(token):
            continue
        bias = None if experts.in_bias is None else experts.in_bias[expert].to(torch.float32)
        x = tokens.x[token].to(torch.float32)
        gate, up = torch.nn.functional.linear(x, experts.gate_up[expert].to(torch.float32), bias).chunk(2, dim=1)
        y = experts.gating(gate, up) @ experts.down[expert].to(torch.float32).T
        exact.index_add_(0, token, weight * y)
        if expert in plan.dense_ids:
            continue
        rounded = _activations(plan, expert, h[token], rounded_in) @ rounded_out[expert]
        if outputs.basis is not None:
            rounded = rounded @ outputs.basis.matrix.T
        error.index_add_(0, token, weight * (rounded - y))
    return float(error.square().sum() / exact.square().sum().clamp_min(torch.finfo(torch.float32).tiny))
