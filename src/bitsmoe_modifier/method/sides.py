"""Rounding of one side of a layer: gate and up, or down (method.md section 5)."""

from dataclasses import dataclass

import torch

from .coders import ColumnCoder
from .costs import chosen_steps
from .design import LayerDesign
from .distributed import Ranks
from .layer import DenseExperts, QuantizerSettings
from .linear_systems import solve_positive
from .rounded import RoundedSide, SidePacker, layout_of
from .rounding import (
    column_blocks,
    columns_at_once,
    damp_,
    encode,
    feedback_factor,
    grid_of,
    refine,
    refit_row_steps,
    round_block,
    round_with_feedback,
)
from .shrinkage import absorbed_energy, least_share, sample_experts, towards_diagonal_
from .spectral import output_coupling, refit_inverse
from .statistics import RoutedTokens, down_moments, expert_moments, prior_share, second_moment, shrink
from .trellis import ChainTrellis, GroupTrellis, chain_steps

#: Groups of output directions, each absorbing in the loss what those before it lost. More gain little.
_ROW_BLOCKS = 4
#: Elements of the experts' moments of down that are kept from their sum to their use: 2 GB in float32, with `lost`.
KEPT_MOMENTS = 1 << 28


@dataclass(frozen=True)
class LayerTask:
    """What every step of a layer's rounding works with: the arguments of `quantize_layer`, and its inputs.

    Attributes:
        fitted, held: those of the tokens by which free choices are tried and judged; None where too few rows are.
        h: the inputs in the coordinates of the input basis, float32 ``[T, R]``.
    """

    experts: DenseExperts
    tokens: RoutedTokens
    fitted: RoutedTokens | None
    held: RoutedTokens | None
    design: LayerDesign
    settings: QuantizerSettings
    metric: torch.Tensor | None
    ranks: Ranks
    h: torch.Tensor


def _levels(widths: torch.Tensor, block_size: int) -> torch.Tensor:
    """``2**b - 1`` of every direction, float32 ``[n, directions]``, of widths ``[n, units]``."""
    return (2.0 ** widths.to(torch.float32) - 1).repeat_interleave(block_size, dim=1)


def _decoded(codes: torch.Tensor, step: torch.Tensor, level: torch.Tensor, coder: ColumnCoder | None) -> torch.Tensor:
    """Values of codes ``[matrices, I, directions]``, steps ``[matrices, groups, directions]``, levels without I."""
    grid = grid_of(codes.unflatten(1, (step.shape[1], -1)), level[:, None, None], coder)
    return (grid * step[:, :, None]).flatten(1, 2)


def _encoded(w: torch.Tensor, step: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """`encode` to uint8 of weights ``[matrices, I, directions]``; steps and levels as in `_decoded`."""
    codes = encode(w.unflatten(1, (step.shape[1], -1)), step[:, :, None], level[:, None, None])
    return codes.flatten(1, 2).to(torch.uint8)


def _columns(
    coder: ColumnCoder, w: torch.Tensor, step: torch.Tensor, level: torch.Tensor, row_weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`round_with_feedback` without feedback: codes uint8 ``[N, m, n]``, steps ``[N, groups, n]``."""
    count, _, n = w.shape
    level = level.expand(-1, -1, n).mT
    codes, steps = torch.empty(w.shape, dtype=torch.uint8, device=w.device), torch.empty_like(step)
    for block in column_blocks(n, columns_at_once(w)):
        target = w.mT[:, block].contiguous()
        columns = target.shape[1]
        none = target.new_zeros(count, columns, columns)  # what a column changes moves no other
        given = target, none, torch.zeros_like(target), step.mT[:, block].contiguous(), level[:, block]
        found, fitted, _ = round_block(*given, row_weight, coder=coder)
        codes[:, :, block], steps[:, :, block] = found.mT, fitted.mT
    return codes, steps


def expert_gate_up(inputs: RoundedSide, expert: int) -> torch.Tensor:
    """The rounded gate and up of one expert, float32 ``[2I, R]``."""
    return inputs.decoded(expert).flatten(0, 1)


def round_input(layer: LayerTask) -> RoundedSide:
    """Gate, then up, of every expert under the second moment of its inputs.

    Up absorbs what gate lost: an error δ of gate i costs least when up i is off by ``-slope_ratio_i δ``. Of several
    processes each rounds its share of the experts here, as in `round_output`.
    """
    experts, tokens, design, settings, h = layer.experts, layer.tokens, layer.design, layer.settings, layer.h
    side, rank, length = design.inputs, h.shape[1], experts.down.shape[2]
    inverse = None if side.basis is None else refit_inverse(side.basis, None, "in")
    share = prior_share(tokens.counts, rank, h.device)
    common = second_moment(h, tokens.token_weights) / tokens.weight.sum().clamp_min(torch.finfo(torch.float32).tiny)
    shrinkage = _input_shrinkage(layer, inverse, common, share)
    coder = GroupTrellis(settings.widths) if settings.codes == "trellis" else None
    mine = layer.ranks.mine(len(tokens.counts))
    packer = SidePacker("in", layout_of(experts, design, settings, len(_stripes(layer))), side.widths, mine)
    for part in experts.parts(mine):
        matrices = slice(2 * part.start, 2 * part.stop)
        factor, weight, widths = experts.in_factors(part, inverse), side.weight[matrices], side.widths[matrices]
        level = _levels(widths.to(h.device), design.block_size)
        if coder is None:
            steps = chosen_steps(factor, weight, widths, design.block_size, settings.group_size)
        else:  # its columns find their own
            groups = length // settings.group_size
            steps = torch.ones(len(factor), groups, rank, dtype=torch.float32, device=h.device)
        if not settings.error_feedback:
            if coder is None:
                codes = _encoded(factor, steps, level)
            else:
                codes, steps = _columns(coder, factor, steps, level[:, None], weight)
            packer.add(part, codes, steps)
            continue
        ids = range(part.start, part.stop)
        moments = expert_moments(lambda _, pairs: h[tokens.token[pairs]], tokens, ids, rank)
        moments = towards_diagonal_(shrink(moments, common, design.mass[part], share[part]), shrinkage)
        damp_(moments, settings.dampening_frac)
        # the coarsest columns first, so that finer ones absorb their errors; gate and up share an order and a factor
        order = coarse_first(level[0::2] + level[1::2], moments)
        feedback = feedback_factor(moments, order)
        target = factor[0::2]
        all_codes = torch.empty(factor.shape, dtype=torch.uint8, device=h.device)
        for half in (0, 1):
            limits, rho = level[half::2, None], weight[half::2]
            codes, step = round_with_feedback(target, feedback, steps[half::2], limits, order, rho, coder)
            for _ in range(settings.refine_passes):
                codes, step = refine(target, moments, codes, step, limits, rho, coder)
            all_codes[half::2], steps[half::2] = codes.to(torch.uint8), step
            if half == 0:
                lost = target - _decoded(codes, step, level[half::2], coder)
                target = factor[1::2]
                if settings.compensation:
                    target = target + design.slope_ratio[part, :, None] * lost
        packer.add(part, all_codes, steps)
    return packer.finished(h.device, shrinkage)


def coarse_first(level: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """Columns in order of rounding, int64 ``[n, R]``: rising in level ``[n, R]``, of equal ones the loudest first,
    whose errors would cost most if nothing were left to absorb them."""
    loud = torch.argsort(moments.diagonal(dim1=1, dim2=2), dim=1, descending=True, stable=True)
    return loud.gather(1, torch.argsort(level.gather(1, loud), dim=1, stable=True))


def _input_shrinkage(
    layer: LayerTask, inverse: torch.Tensor | None, common: torch.Tensor, share: torch.Tensor
) -> float:
    """The share of `SHARES` that serves gate and up best on the held-out rows."""
    tokens, held, design, settings, h = layer.fitted, layer.held, layer.design, layer.settings, layer.h
    if settings.shrinkage is not None or tokens is None or held is None or not settings.error_feedback:
        return settings.shrinkage or 0.0
    losses = []
    for expert in sample_experts(len(tokens.counts), layer.ranks.mine(len(tokens.counts))):
        part, matrices, ids = slice(expert, expert + 1), slice(2 * expert, 2 * expert + 2), range(expert, expert + 1)
        moment = expert_moments(lambda _, pairs: h[tokens.token[pairs]], tokens, ids, h.shape[1])
        moment = shrink(moment, common, design.mass[part], share[part])[0]
        widths, weight = design.inputs.widths[matrices], design.inputs.weight[matrices]
        factor, level = layer.experts.in_factors(part, inverse), _levels(widths.to(h.device), design.block_size)
        steps = chosen_steps(factor, weight, widths, design.block_size, settings.group_size)
        error = factor - _decoded(_encoded(factor, steps, level).to(torch.float32), steps, level, None)
        noise = (error.square() * weight[:, :, None]).sum((0, 1))
        order = coarse_first(level.sum(0)[None], moment[None])[0]
        (pairs,) = held.pairs([expert])
        inputs = h[held.token[pairs]] * held.weight[pairs].sqrt()[:, None]
        losses.append(absorbed_energy(moment, order, inputs, settings.dampening_frac) @ noise)
    return least_share(losses, h.device, layer.ranks)


def round_output(layer: LayerTask, inputs: RoundedSide) -> RoundedSide:
    """Down of every expert under the second moment of the activations that the rounded gate and up make.

    Down absorbs twice: first what gate and up lost, as far as it is linear in the activations that are left
    (`_compensated`); then, group of output directions by group, what the groups before it lost, as far as the loss sees
    it in the same place (`output_coupling`).
    """
    experts, tokens, design, settings, h = layer.experts, layer.tokens, layer.design, layer.settings, layer.h
    side, hidden = design.outputs, experts.down.shape[1]
    inverse = None if side.basis is None else refit_inverse(side.basis, None, "out")
    coupled = output_coupling(side.basis, layer.metric, hidden, h.device)
    coupling = None
    if _is_coupled(layer):
        coupling = damp_(coupled.clone(), settings.dampening_frac)
    blocks, units = _row_blocks(len(coupled), 1 if coupling is None else _ROW_BLOCKS, h.device), _stripes(layer)
    if units:
        inside = torch.arange(design.block_size, device=h.device)
        blocks = [(block[:, None] * design.block_size + inside).flatten() for block in units]
    mine, shrinkage = layer.ranks.mine(len(tokens.counts)), 0.0
    packer = SidePacker("out", layout_of(experts, design, settings, len(units)), side.widths, mine)
    if settings.error_feedback:
        statistics = _DownMoments(layer, inputs, mine)
        shrinkage = _output_shrinkage(layer, inputs, inverse)
    for part in experts.parts(mine):
        factor, widths = experts.out_factors(part, inverse), side.widths[part]
        level = _levels(widths.to(h.device), design.block_size)
        columns = factor.transpose(1, 2)
        coders: list[ColumnCoder] | None = None
        if units:
            coders = [
                ChainTrellis(widths, len(units), stripe, coupled.diagonal()[block], design.block_size, settings.widths)
                for stripe, block in enumerate(blocks)
            ]
            steps = chain_steps(columns, side.weight[part], level, settings.group_size)
        else:
            steps = chosen_steps(columns, side.weight[part], widths, design.block_size, settings.group_size)
        if settings.error_feedback:
            moments, lost = statistics.of(part, shrinkage)
            if settings.compensation:
                factor = _compensated(factor, moments, lost)
            # rows are directions here, so that the columns to round are those along I
            rows = steps.transpose(1, 2), level[:, :, None]
            passes = settings.refine_passes
            codes, rows_steps = _round_row_blocks(factor, moments, *rows, passes, blocks, coupling, coders)
            codes, steps = codes.transpose(1, 2).to(torch.uint8), rows_steps.transpose(1, 2)
        elif coders is not None:
            each = steps.transpose(1, 2).repeat_interleave(settings.group_size, dim=2)
            codes = _columns(coders[0], factor, each, level[:, :, None], None)[0].transpose(1, 2)
        else:
            codes = _encoded(columns, steps, level)
        packer.add(part, codes, steps)
    return packer.finished(h.device, shrinkage)


def _stripes(layer: LayerTask) -> list[torch.Tensor]:
    """Units of output directions by the order in which they are rounded, of which sequences of trellis codes are made;
    none of scalar codes."""
    settings, outputs = layer.settings, layer.design.outputs
    if settings.codes != "trellis":
        return []
    return _row_blocks(outputs.widths.shape[1], _ROW_BLOCKS if _is_coupled(layer) else 1, layer.h.device)


def _is_coupled(layer: LayerTask) -> bool:
    """Whether output directions absorb what those before them lost: the loss sees some of them in the same place."""
    settings = layer.settings
    apart = layer.design.outputs.basis is None and layer.metric is None
    return settings.error_feedback and settings.compensation and not apart


class _DownMoments:
    """Second moments of the activations that down sees, a part of the experts at a time.

    Those of all experts are pulled towards what they have in common, which is therefore summed first. Where they take
    little memory they are kept from that, where they would take much they are measured twice.
    """

    def __init__(self, layer: LayerTask, inputs: RoundedSide, mine: range) -> None:
        self._layer, self._gate_up = layer, lambda expert: expert_gate_up(inputs, expert)
        self._start = mine.start
        length = layer.experts.down.shape[2]
        small = len(mine) * length**2 <= KEPT_MOMENTS
        self._kept = self._measured(mine) if small else None
        if self._kept is not None:
            common = self._kept[0].sum(0)
        else:
            common = torch.zeros(length, length, dtype=torch.float32, device=layer.h.device)
            for expert, pairs in zip(mine, layer.tokens.pairs(mine), strict=True):
                x, root = layer.h[layer.tokens.token[pairs]], layer.tokens.weight[pairs].sqrt()[:, None]
                z = layer.experts.activations(expert, x, self._gate_up(expert)) * root
                common.addmm_(z.T, z)
        total = layer.tokens.weight.sum().clamp_min(torch.finfo(torch.float32).tiny)
        self._common = layer.ranks.total(common) / total
        self._share = prior_share(layer.tokens.counts, length, layer.h.device)

    def _measured(self, ids: range) -> tuple[torch.Tensor, torch.Tensor]:
        return down_moments(self._layer.experts, self._layer.tokens, self._layer.h, self._gate_up, ids)

    def of(self, part: slice, shrinkage: float) -> tuple[torch.Tensor, torch.Tensor]:
        """E[ẑ ẑᵀ], damped, and E[(z - ẑ) ẑᵀ] of some experts, float32 ``[n, I, I]``, at equal mass."""
        if self._kept is None:
            moments, lost = self._measured(range(part.start, part.stop))
        else:
            moments, lost = (kept[part.start - self._start : part.stop - self._start] for kept in self._kept)
        share = self._share[part]
        moments = shrink(moments, self._common, self._layer.design.mass[part], share)
        lost = towards_diagonal_(lost * (1 - share)[:, None, None], shrinkage)
        return damp_(towards_diagonal_(moments, shrinkage), self._layer.settings.dampening_frac), lost


def _output_shrinkage(layer: LayerTask, inputs: RoundedSide, inverse: torch.Tensor | None) -> float:
    """The share of `SHARES` that serves down best on the held-out rows."""
    tokens, held, design, settings = layer.fitted, layer.held, layer.design, layer.settings
    if settings.shrinkage is not None or tokens is None or held is None:
        return settings.shrinkage or 0.0
    mine, side, losses = layer.ranks.mine(len(tokens.counts)), layer.design.outputs, []
    for expert in sample_experts(len(tokens.counts), mine):
        part, ids = slice(expert, expert + 1), range(expert, expert + 1)
        moment = down_moments(layer.experts, tokens, layer.h, lambda e: expert_gate_up(inputs, e), ids)[0][0]
        factor = layer.experts.out_factors(part, inverse).transpose(1, 2)
        level = _levels(side.widths[part].to(factor.device), design.block_size)
        steps = chosen_steps(factor, side.weight[part], side.widths[part], design.block_size, settings.group_size)
        error = factor - _decoded(_encoded(factor, steps, level).to(torch.float32), steps, level, None)
        order = torch.argsort(moment.diagonal(), descending=True, stable=True)
        (pairs,) = held.pairs([expert])
        z = layer.experts.activations(expert, layer.h[held.token[pairs]], expert_gate_up(inputs, expert))
        z = z * held.weight[pairs].sqrt()[:, None]
        losses.append(absorbed_energy(moment, order, z, settings.dampening_frac) @ error[0].square().sum(1))
    return least_share(losses, layer.h.device, layer.ranks)


def _compensated(factor: torch.Tensor, moments: torch.Tensor, lost: torch.Tensor) -> torch.Tensor:
    """F with what it must make of ẑ to come nearest F z: ``F + F E[(z - ẑ) ẑᵀ] E[ẑ ẑᵀ]⁻¹``, per expert.

    Args:
        factor: ``[E, R', I]``; moments: E[ẑ ẑᵀ], damped, and lost: E[(z - ẑ) ẑᵀ], ``[E, I, I]``, at equal mass.
    """
    mean = moments.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float32).tiny)[:, None, None]
    response, usable = solve_positive(moments / mean, (lost / mean).transpose(1, 2))
    # an expert whose moments cannot be solved keeps its weights
    return factor + factor @ torch.where(usable[:, None, None], response, 0.0).transpose(1, 2)


def _round_row_blocks(
    w: torch.Tensor,
    moments: torch.Tensor,
    steps: torch.Tensor,
    level: torch.Tensor,
    refine_passes: int,
    blocks: list[torch.Tensor],
    coupling: torch.Tensor | None,
    coders: list[ColumnCoder] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round ``w [E, R', I]`` with feedback along its columns and, with a coupling, from block to block of its rows.

    Args:
        w: target.
        moments: ``[E, I, I]``, damped; steps: ``[E, R', groups]``; level: ``[E, R', 1]``.
        refine_passes: of `refine`, each after the steps were refitted.
        blocks: of rows, in order.
        coupling: ``[R', R']``, damped, or None for rows that the loss sees apart.
        coders: of the blocks, of other codes than the grid's.

    Returns:
        (codes ``[E, R', I]``, steps ``[E, R', groups]``).
    """
    order = torch.argsort(moments.diagonal(dim1=1, dim2=2), dim=1, descending=True, stable=True)
    feedback = feedback_factor(moments, order)
    done = blocks[0][:0]
    codes, steps, lost = torch.empty_like(w), steps.clone(), torch.zeros_like(w)
    factor = None if coupling is None else feedback_factor(coupling[None], torch.cat(blocks)[None])[0]
    for number, block in enumerate(blocks):
        coder = None if coders is None else coders[number]
        target, limits, step = w[:, block], level[:, block], steps[:, block]
        if factor is not None and len(done):
            response = factor[: len(done), len(done) : len(done) + len(block)]
            target = target + torch.einsum("jb,eji->ebi", response, lost[:, done])
        found, _ = round_with_feedback(target, feedback, _per_row(step, w.shape[2]), limits, order, coder=coder)
        for _ in range(refine_passes):
            step = refit_row_steps(target, moments, found, step, limits, coder)
            found, _ = refine(target, moments, found, _per_row(step, w.shape[2]), limits, coder=coder)
        codes[:, block], steps[:, block] = found, step
        # what later rows absorb is measured against the weights, not against the target
        lost[:, block] = w[:, block] - grid_of(found, limits, coder) * _per_row(step, w.shape[2])
        done = torch.cat([done, block])
    return codes, steps


def _row_blocks(rows: int, apart: int, device: torch.device) -> list[torch.Tensor]:
    """Every n-th row, so that neighbours, which are most alike, stand in different blocks; none is empty."""
    return [torch.arange(first, rows, apart, device=device) for first in range(min(apart, rows))]


def _per_row(step: torch.Tensor, length: int) -> torch.Tensor:
    """Steps ``[E, rows, groups]`` to one per element, ``[E, rows, I]``."""
    return step.repeat_interleave(length // step.shape[2], dim=2)
