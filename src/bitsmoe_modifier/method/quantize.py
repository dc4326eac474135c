"""One layer from dense experts to stored tensors: the paper's steps in order, free of any framework.

plan = plan_layer(experts, tokens, settings)                            # `design`: bases and cost tables
design = plan.choose(budget)                                            # a bit-width for every unit
packed, report = quantize_layer(experts, tokens, design, settings)      # rounding with feedback, packing
"""

from dataclasses import dataclass, field, replace
from itertools import chain

import torch

from ..storage.layout import ExpertsLayout, PackedExperts, pack_factor
from .costs import chosen_steps
from .design import LayerDesign, idle_units, output_coupling, plan_layer, project
from .distributed import Ranks
from .layer import DenseExperts, QuantizerSettings
from .numerics import collected, stored_trouble
from .rounding import damp_, decode, encode, feedback_factor, refine, refit_row_steps, round_with_feedback
from .spectral import refit_inverse
from .statistics import RoutedTokens, down_moments, expert_moments, prior_share, second_moment, shrink

__all__ = ["DenseExperts", "LayerReport", "QuantizerSettings", "plan_layer", "quantize_layer"]

#: Groups of output directions, each absorbing in the loss what those before it lost. More gain little.
_ROW_BLOCKS = 4
#: Tokens on which the report's output error is measured.
_REPORT_TOKENS = 1024


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


@dataclass(frozen=True)
class _Layer:
    """What every step of a layer's rounding works with: the arguments of `quantize_layer`, and its inputs.

    Attributes:
        h: the inputs in the coordinates of the input basis, float32 ``[T, R]``.
    """

    experts: DenseExperts
    tokens: RoutedTokens
    design: LayerDesign
    settings: QuantizerSettings
    metric: torch.Tensor | None
    ranks: Ranks
    h: torch.Tensor


@dataclass(frozen=True)
class RoundedSide:
    """One side's factors, rounded.

    Attributes:
        codes: uint8 ``[matrices, I, directions]``.
        steps: float32 ``[matrices, groups, directions]``.
        widths: uint8 ``[matrices, units]``.
        block_size: directions per unit.
    """

    codes: torch.Tensor
    steps: torch.Tensor
    widths: torch.Tensor
    block_size: int

    @classmethod
    def empty(
        cls, widths: torch.Tensor, block_size: int, length: int, group_size: int, device: torch.device
    ) -> "RoundedSide":
        """To be filled part by part."""
        directions = widths.shape[1] * block_size
        codes = torch.zeros(len(widths), length, directions, dtype=torch.uint8, device=device)
        steps = torch.ones(len(widths), length // group_size, directions, device=device)
        return cls(codes, steps, widths, block_size)

    def gather(self, ranks: Ranks, num_experts: int) -> None:
        """Fill in, on the first process, the experts that the others rounded."""
        for tensor in (self.codes, self.steps):
            ranks.gather_rows(tensor.unflatten(0, (num_experts, -1)))

    def levels(self, matrices: slice) -> torch.Tensor:
        """``2**b - 1`` of every direction of some matrices, float32 ``[n, directions]``."""
        widths = self.widths[matrices].to(self.codes.device, torch.float32)
        return (2.0**widths - 1).repeat_interleave(self.block_size, dim=1)

    def decoded(self, matrices: slice) -> torch.Tensor:
        """Values of some matrices, float32 ``[n, I, directions]``."""
        return _decoded(self.codes[matrices].to(torch.float32), self.steps[matrices], self.levels(matrices))


def quantize_layer(
    experts: DenseExperts,
    tokens: RoutedTokens,
    design: LayerDesign,
    settings: QuantizerSettings,
    metric: torch.Tensor | None = None,
    ranks: Ranks | None = None,
) -> tuple[PackedExperts, LayerReport]:
    """Round and pack one layer by its design (method.md section 5).

    Args:
        experts: dense experts on the device to work on.
        tokens: their routed calibration tokens, with the errors of the layers quantized before this one.
        design: bases and widths.
        settings: how to quantize.
        metric: ``[H, H]`` loss curvature in the layer's output, None for squared output error.
        ranks: the processes that divide the experts among them, all with the same arguments; None for this one alone.

    Returns:
        (stored tensors on the CPU, what was done), the same on all processes.

    Raises:
        CalibrationError: NaN or infinity in weights or activations, naming the expert.
    """
    ranks = ranks or Ranks.alone()
    experts.check_finite()
    layer = _Layer(experts, tokens, design, settings, metric, ranks, project(tokens.x, design.inputs.basis))
    warnings: list[str] = []
    with collected(warnings):
        inputs = _round_input(layer)
        outputs = _round_output(layer, inputs)
    for side in (inputs, outputs):
        side.gather(ranks, len(tokens.counts))
    said = dict.fromkeys(design.warnings) | dict.fromkeys(chain.from_iterable(ranks.everyones(warnings)))
    return ranks.compute(lambda: _finished(layer, inputs, outputs, tuple(said)))


def _finished(
    layer: _Layer, inputs: RoundedSide, outputs: RoundedSide, warnings: tuple[str, ...]
) -> tuple[PackedExperts, LayerReport]:
    """Pack the rounded sides and report on them."""
    tokens, design = layer.tokens, layer.design
    packed = _pack(layer, inputs, outputs)
    names = {"gate": inputs.widths[0::2], "up": inputs.widths[1::2], "down": outputs.widths}
    layout = ExpertsLayout.from_tensor(packed.layout)
    error = _relative_error(layer, inputs, outputs)
    report = LayerReport(
        bits=packed.bits_per_weight,
        tokens_per_expert=tokens.counts,
        prior_share=tuple(prior_share(tokens.counts, layout.hidden_size).tolist()),
        width_counts={name: _histogram(widths) for name, widths in names.items()},
        input_basis_bits=layout.basis_in_bits,
        output_basis_bits=layout.basis_out_bits,
        predicted_distortion=design.predicted_distortion,
        allocation_gap=design.allocation_gap,
        solver=design.solver,
        relative_output_error=error,
        dense_experts=design.dense_ids,
        warnings=(*warnings, *stored_trouble(packed, tokens.counts, error if layer.metric is None else None)),
        energy={"in": design.inputs.energy, "out": design.outputs.energy},
    )
    return packed.to("cpu"), report


def _histogram(widths: torch.Tensor) -> dict[int, int]:
    values, counts = widths.unique(return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def _decoded(codes: torch.Tensor, step: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """`decode` of codes ``[matrices, I, directions]``, steps ``[matrices, groups, directions]``, levels without I."""
    return decode(codes.unflatten(1, (step.shape[1], -1)), step[:, :, None], level[:, None, None]).flatten(1, 2)


def _encoded(w: torch.Tensor, step: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """`encode` to uint8 of weights ``[matrices, I, directions]``; steps and levels as in `_decoded`."""
    codes = encode(w.unflatten(1, (step.shape[1], -1)), step[:, :, None], level[:, None, None])
    return codes.flatten(1, 2).to(torch.uint8)


def _gate_up(inputs: RoundedSide, expert: int) -> torch.Tensor:
    """The rounded gate and up of one expert, float32 ``[2I, R]``."""
    return inputs.decoded(slice(2 * expert, 2 * expert + 2)).flatten(0, 1)


def _round_input(layer: _Layer) -> RoundedSide:
    """Gate, then up, of every expert under the second moment of its inputs.

    Up absorbs what gate lost: an error δ of gate i costs least when up i is off by ``-slope_ratio_i δ``. Of several
    processes each rounds its share of the experts here, as in `_round_output`.
    """
    experts, tokens, design, settings, h = layer.experts, layer.tokens, layer.design, layer.settings, layer.h
    side, rank, length = design.inputs, h.shape[1], experts.down.shape[2]
    inverse = None if side.basis is None else refit_inverse(side.basis, None, "in")
    share = prior_share(tokens.counts, rank, h.device)
    common = second_moment(h, tokens.token_weights) / tokens.weight.sum().clamp_min(torch.finfo(torch.float32).tiny)
    rounded = RoundedSide.empty(side.widths, design.block_size, length, settings.group_size, h.device)
    for part in experts.parts(layer.ranks.mine(len(tokens.counts))):
        matrices = slice(2 * part.start, 2 * part.stop)
        factor, weight, level = experts.in_factors(part, inverse), side.weight[matrices], rounded.levels(matrices)
        steps = chosen_steps(factor, weight, side.widths[matrices], design.block_size, settings.group_size)
        if not settings.error_feedback:
            rounded.codes[matrices] = _encoded(factor, steps, level)
            rounded.steps[matrices] = steps
            continue
        ids = range(part.start, part.stop)
        moments = expert_moments(lambda _, pairs: h[tokens.token[pairs]], tokens, ids, rank)
        moments = damp_(shrink(moments, common, design.mass[part], share[part]), settings.dampening_frac)
        # the coarsest columns first, so that finer ones absorb their errors; gate and up share an order and a factor
        order = torch.argsort(level[0::2] + level[1::2], dim=1, stable=True)
        feedback = feedback_factor(moments, order)
        target = factor[0::2]
        for half in (0, 1):
            limits, rho = level[half::2, None], weight[half::2]
            codes, step = round_with_feedback(target, feedback, steps[half::2], limits, order, rho)
            for _ in range(settings.refine_passes):
                codes, step = refine(target, moments, codes, step, limits, rho)
            rounded.codes[matrices][half::2] = codes.to(torch.uint8)
            rounded.steps[matrices][half::2] = step
            if half == 0:
                lost = target - _decoded(codes, step, level[half::2])
                target = factor[1::2]
                if settings.compensation:
                    target = target + design.slope_ratio[part, :, None] * lost
    return rounded


def _round_output(layer: _Layer, inputs: RoundedSide) -> RoundedSide:
    """Down of every expert under the second moment of the activations that the rounded gate and up make.

    Down absorbs twice: first what gate and up lost, as far as it is linear in the activations that are left
    (`_compensated`); then, group of output directions by group, what the groups before it lost, as far as the loss sees
    it in the same place (`output_coupling`).
    """
    experts, tokens, design, settings, h = layer.experts, layer.tokens, layer.design, layer.settings, layer.h
    side, (_, hidden, length) = design.outputs, experts.down.shape
    inverse = None if side.basis is None else refit_inverse(side.basis, None, "out")
    rounded = RoundedSide.empty(side.widths, design.block_size, length, settings.group_size, h.device)
    coupling = None
    if settings.compensation and not (side.basis is None and layer.metric is None):
        coupling = output_coupling(side.basis, layer.metric, hidden, h.device)
        coupling = damp_(coupling.clone(), settings.dampening_frac)
    mine = layer.ranks.mine(len(tokens.counts))
    if settings.error_feedback:
        moments, lost = down_moments(experts, tokens, h, lambda expert: _gate_up(inputs, expert), mine)
        total = tokens.weight.sum().clamp_min(torch.finfo(torch.float32).tiny)
        own = slice(mine.start, mine.stop)
        share = prior_share(tokens.counts, length, h.device)[own]
        moments = shrink(moments, layer.ranks.total(moments.sum(0)) / total, design.mass[own], share)
        damp_(moments, settings.dampening_frac)
        lost *= (1 - share)[:, None, None]
    for part in experts.parts(mine):
        at = slice(part.start - mine.start, part.stop - mine.start)
        factor, level = experts.out_factors(part, inverse), rounded.levels(part)
        columns = factor.transpose(1, 2)
        steps = chosen_steps(columns, side.weight[part], side.widths[part], design.block_size, settings.group_size)
        if settings.error_feedback:
            if settings.compensation:
                factor = _compensated(factor, moments[at], lost[at])
            # rows are directions here, so that the columns to round are those along I
            rows = steps.transpose(1, 2), level[:, :, None]
            codes, rows_steps = _round_row_blocks(factor, moments[at], *rows, settings.refine_passes, coupling)
            codes, steps = codes.transpose(1, 2).to(torch.uint8), rows_steps.transpose(1, 2)
        else:
            codes = _encoded(columns, steps, level)
        rounded.codes[part], rounded.steps[part] = codes, steps
    return rounded


def _compensated(factor: torch.Tensor, moments: torch.Tensor, lost: torch.Tensor) -> torch.Tensor:
    """F with what it must make of ẑ to come nearest F z: ``F + F E[(z - ẑ) ẑᵀ] E[ẑ ẑᵀ]⁻¹``, per expert.

    Args:
        factor: ``[E, R', I]``; moments: E[ẑ ẑᵀ], damped, and lost: E[(z - ẑ) ẑᵀ], ``[E, I, I]``, at equal mass.
    """
    mean = moments.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float32).tiny)[:, None, None]
    response, info = torch.linalg.solve_ex(moments / mean, (lost / mean).transpose(1, 2))
    # an expert whose moments cannot be solved keeps its weights
    usable = (info == 0) & torch.isfinite(response).flatten(1).all(1)
    return factor + factor @ torch.where(usable[:, None, None], response, 0.0).transpose(1, 2)


def _round_row_blocks(
    w: torch.Tensor,
    moments: torch.Tensor,
    steps: torch.Tensor,
    level: torch.Tensor,
    refine_passes: int,
    coupling: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round ``w [E, R', I]`` with feedback along its columns and, with a coupling, from block to block of its rows.

    Args:
        w: target.
        moments: ``[E, I, I]``, damped; steps: ``[E, R', groups]``; level: ``[E, R', 1]``.
        refine_passes: of `refine`, each after the steps were refitted.
        coupling: ``[R', R']``, damped, or None for rows that the loss sees apart.

    Returns:
        (codes ``[E, R', I]``, steps ``[E, R', groups]``).
    """
    rows = w.shape[1]
    order = torch.argsort(moments.diagonal(dim1=1, dim2=2), dim=1, descending=True, stable=True)
    feedback = feedback_factor(moments, order)
    # every n-th row, so that neighbours, which are most alike, stand in different blocks
    apart = 1 if coupling is None else _ROW_BLOCKS
    blocks = [torch.arange(first, rows, apart, device=w.device) for first in range(apart)]
    done = blocks[0][:0]
    codes, steps, lost = torch.empty_like(w), steps.clone(), torch.zeros_like(w)
    factor = None if coupling is None else feedback_factor(coupling[None], torch.cat(blocks)[None])[0]
    for block in blocks:
        target, limits, step = w[:, block], level[:, block], steps[:, block]
        if factor is not None and len(done):
            response = factor[: len(done), len(done) : len(done) + len(block)]
            target = target + torch.einsum("jb,eji->ebi", response, lost[:, done])
        found, _ = round_with_feedback(target, feedback, _per_row(step, w.shape[2]), limits, order)
        for _ in range(refine_passes):
            step = refit_row_steps(target, moments, found, step, limits)
            found, _ = refine(target, moments, found, _per_row(step, w.shape[2]), limits)
        codes[:, block], steps[:, block] = found, step
        # what later rows absorb is measured against the weights, not against the target
        lost[:, block] = w[:, block] - decode(found, _per_row(step, w.shape[2]), limits)
        done = torch.cat([done, block])
    return codes, steps


def _per_row(step: torch.Tensor, length: int) -> torch.Tensor:
    """Steps ``[E, rows, groups]`` to one per element, ``[E, rows, I]``."""
    return step.repeat_interleave(length // step.shape[2], dim=2)


def _pack(layer: _Layer, inputs: RoundedSide, outputs: RoundedSide) -> PackedExperts:
    experts, design, settings = layer.experts, layer.design, layer.settings
    num_experts, hidden, length = experts.down.shape
    bases = design.inputs.basis, design.outputs.basis
    idle = 0 if bases[0] is None else idle_units(inputs.widths)
    units_in = inputs.widths.shape[1] - idle
    rank_in = units_in * design.block_size
    layout = ExpertsLayout(
        num_experts=num_experts,
        hidden_size=hidden,
        intermediate_size=length,
        rank_in=rank_in,
        rank_out=outputs.codes.shape[2],
        block_size=design.block_size,
        group_size=settings.group_size,
        basis_in_bits=0 if bases[0] is None else bases[0].bits,
        basis_out_bits=0 if bases[1] is None else bases[1].bits,
        basis_group_size=settings.resolve_basis_group(hidden),
        num_dense=len(design.dense_ids),
        has_bias=int(experts.in_bias is not None),
    )
    device = inputs.codes.device
    width_in, width_out = inputs.widths[:, :units_in].to(device).contiguous(), outputs.widths.to(device)
    codes_in, all_steps_in = inputs.codes[:, :, :rank_in], inputs.steps[:, :, :rank_in]
    payload_in, steps_in = pack_factor(codes_in, all_steps_in, width_in, layout, "in")
    payload_out, steps_out = pack_factor(outputs.codes.transpose(1, 2), outputs.steps, width_out, layout, "out")
    packed = PackedExperts(
        layout=layout.to_tensor().to(device),
        widths_in=width_in.view(num_experts, 2, -1),
        widths_out=width_out,
        codes_in=payload_in,
        codes_out=payload_out,
        steps_in=steps_in,
        steps_out=steps_out,
        in_bias=experts.in_bias,
        out_bias=experts.out_bias,
    )
    if bases[0] is not None:
        step = bases[0].step
        packed = replace(
            packed,
            basis_in=bases[0].stored[:rank_in].contiguous(),
            basis_in_step=None if step is None else step[:rank_in].contiguous(),
        )
    if bases[1] is not None:
        packed = replace(packed, basis_out=bases[1].stored, basis_out_step=bases[1].step)
    if design.dense_ids:
        ids = torch.tensor(design.dense_ids, device=device)
        packed = replace(
            packed, dense_ids=ids.to(torch.int32), dense_in=experts.gate_up[ids], dense_out=experts.down[ids]
        )
    return packed.sealed()


def _relative_error(layer: _Layer, inputs: RoundedSide, outputs: RoundedSide) -> float:
    """‖y - ŷ‖² / ‖y‖² of the layer's routed output on the first calibration tokens."""
    experts, tokens, design, h = layer.experts, layer.tokens, layer.design, layer.h
    sample = min(len(tokens.x), _REPORT_TOKENS)
    exact = torch.zeros(sample, experts.down.shape[1], device=h.device)
    error = torch.zeros_like(exact)
    for expert, pairs in zip(range(len(tokens.counts)), tokens.pairs(range(len(tokens.counts))), strict=True):
        token = tokens.token[pairs]
        inside = token < sample
        token, weight = token[inside], tokens.weight[pairs][inside].sqrt()[:, None]
        if not len(token):
            continue
        z = experts.activations(expert, tokens.x[token].to(torch.float32))
        y = z @ experts.down[expert].to(torch.float32).T
        exact.index_add_(0, token, weight * y)
        if expert in design.dense_ids:
            continue
        rounded = experts.activations(expert, h[token], _gate_up(inputs, expert))
        rounded = rounded @ outputs.decoded(slice(expert, expert + 1))[0]
        if design.outputs.basis is not None:
            rounded = rounded @ design.outputs.basis.matrix.T
        error.index_add_(0, token, weight * (rounded - y))
    return float(error.square().sum() / exact.square().sum().clamp_min(torch.finfo(torch.float32).tiny))
