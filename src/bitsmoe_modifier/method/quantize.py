"""One layer from dense experts to stored tensors: the paper's steps in order, free of any framework.

plan = plan_layer(experts, tokens, settings)                            # `design`: bases and cost tables
design = plan.choose(budget)                                            # a bit-width for every unit
packed, report = quantize_layer(experts, tokens, design, settings)      # rounding with feedback, packing
"""

from dataclasses import dataclass, field, replace
from itertools import chain

import torch

from ..storage.layout import ExpertsLayout
from ..storage.packed import PackedExperts
from .design import LayerDesign
from .distributed import Ranks
from .layer import DenseExperts, QuantizerSettings
from .numerics import collected, stored_trouble
from .rounded import RoundedSide
from .sides import LayerTask, expert_gate_up, round_input, round_output
from .spectral import project
from .statistics import RoutedTokens, prior_share
from .trial import optimism

#: Tokens on which the report's output error is measured.
_REPORT_TOKENS = 1024


@dataclass(frozen=True)
class LayerReport:
    """What was done to one layer, for reports and logs.

    ``relative_output_error`` is ‖y - ŷ‖² / ‖y‖² of the layer's output on calibration tokens, and
    ``unseen_output_error`` what to expect on other rows of such text: that times by how much more a sample of the
    experts, rounded without an eighth of the rows, loses on those than on the others. The two are the same where too
    few rows were. ``shrinkage`` is by how much the off-diagonal parts of the input's and the output's moments were
    scaled down for rounding.
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
    unseen_output_error: float
    shrinkage: tuple[float, float]
    dense_experts: tuple[int, ...] = ()
    warnings: tuple[str, ...] = field(default=())
    energy: dict[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def unseen_times(self) -> float:
        """How many times ``relative_output_error`` the ``unseen_output_error`` is."""
        return self.unseen_output_error / self.relative_output_error if self.relative_output_error > 0 else 1.0


def quantize_layer(
    experts: DenseExperts,
    tokens: RoutedTokens,
    design: LayerDesign,
    settings: QuantizerSettings,
    metric: torch.Tensor | None = None,
    ranks: Ranks | None = None,
    unseen: float | None = None,
) -> tuple[PackedExperts, LayerReport]:
    """Round and pack one layer by its design (method.md section 5).

    Args:
        experts: dense experts on the device to work on.
        tokens: their routed calibration tokens, with the errors of the layers quantized before this one.
        design: bases and widths.
        settings: how to quantize.
        metric: ``[H, H]`` loss curvature in the layer's output, None for squared output error.
        ranks: the processes that divide the experts among them, all with the same arguments; None for this one alone.
        unseen: how many times more the layer loses on other text, where that is known from another size; None: measured
            (`trial.optimism`).

    Returns:
        (stored tensors on the CPU, what was done), the same on all processes.

    Raises:
        CalibrationError: NaN or infinity in weights or activations, naming the expert.
    """
    ranks = ranks or Ranks.alone()
    experts.check_finite()
    h, settings = project(tokens.x, design.inputs.basis), settings.for_sizes(*experts.down.shape[1:])
    held = tokens.held_out()
    fitted = None if held is None else tokens.fitted()
    layer = LayerTask(experts, tokens, fitted, held, design, settings, metric, ranks, h)
    warnings: list[str] = []
    with collected(warnings):
        inputs = round_input(layer)
        outputs = round_output(layer, inputs)
    inputs, outputs = inputs.gathered(ranks), outputs.gathered(ranks)
    said = dict.fromkeys(design.warnings) | dict.fromkeys(chain.from_iterable(ranks.everyones(warnings)))
    return ranks.compute(lambda: _finished(layer, inputs, outputs, tuple(said), unseen))


def _finished(
    layer: LayerTask, inputs: RoundedSide, outputs: RoundedSide, warnings: tuple[str, ...], unseen: float | None
) -> tuple[PackedExperts, LayerReport]:
    """Pack the rounded sides and report on them."""
    tokens, design = layer.tokens, layer.design
    packed = _pack(layer, inputs, outputs)
    names = {"gate": inputs.widths[0::2], "up": inputs.widths[1::2], "down": outputs.widths}
    layout = ExpertsLayout.from_tensor(packed.layout)
    error = _relative_error(layer, tokens, inputs, outputs)
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
        unseen_output_error=error * (optimism(layer, inputs.shrinkage) if unseen is None else unseen),
        shrinkage=(inputs.shrinkage, outputs.shrinkage),
        dense_experts=design.dense_ids,
        warnings=(*warnings, *stored_trouble(packed, tokens.counts, error if layer.metric is None else None)),
        energy={"in": design.inputs.energy, "out": design.outputs.energy},
    )
    return packed.to("cpu"), report


def _histogram(widths: torch.Tensor) -> dict[int, int]:
    values, counts = widths.unique(return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def _pack(layer: LayerTask, inputs: RoundedSide, outputs: RoundedSide) -> PackedExperts:
    experts, design, layout = layer.experts, layer.design, outputs.layout
    bases, device = (design.inputs.basis, design.outputs.basis), inputs.codes.device
    packed = PackedExperts(
        layout=layout.to_tensor().to(device),
        widths_in=inputs.stored_widths.to(device).view(layout.num_experts, 2, -1),
        widths_out=outputs.stored_widths.to(device),
        codes_in=inputs.codes,
        codes_out=outputs.codes,
        steps_in=inputs.steps,
        steps_out=outputs.steps,
        in_bias=experts.in_bias,
        out_bias=experts.out_bias,
    )
    if bases[0] is not None:
        step = bases[0].step
        packed = replace(
            packed,
            basis_in=bases[0].stored[: layout.rank_in].contiguous(),
            basis_in_step=None if step is None else step[: layout.rank_in].contiguous(),
        )
    if bases[1] is not None:
        packed = replace(packed, basis_out=bases[1].stored, basis_out_step=bases[1].step)
    if design.dense_ids:
        ids = torch.tensor(design.dense_ids, device=device)
        packed = replace(
            packed, dense_ids=ids.to(torch.int32), dense_in=experts.gate_up[ids], dense_out=experts.down[ids]
        )
    return packed.sealed()


def _relative_error(layer: LayerTask, tokens: RoutedTokens, inputs: RoundedSide, outputs: RoundedSide) -> float:
    """‖y - ŷ‖² / ‖y‖² of the layer's routed output on the first of the tokens."""
    experts, design, h = layer.experts, layer.design, layer.h
    chosen = tokens.token.unique()[:_REPORT_TOKENS]
    place = torch.full((len(tokens.x),), -1, device=h.device)
    place[chosen] = torch.arange(len(chosen), device=h.device)
    exact = torch.zeros(len(chosen), experts.down.shape[1], dtype=torch.float32, device=h.device)
    error = torch.zeros_like(exact)
    for expert, pairs in zip(range(len(tokens.counts)), tokens.pairs(range(len(tokens.counts))), strict=True):
        token = tokens.token[pairs]
        inside = place[token] >= 0
        token, weight = token[inside], tokens.weight[pairs][inside].sqrt()[:, None]
        if not len(token):
            continue
        z = experts.activations(expert, tokens.x[token].to(torch.float32))
        y = z @ experts.down[expert].to(torch.float32).T
        exact.index_add_(0, place[token], weight * y)
        if expert in design.dense_ids:
            continue
        rounded = experts.activations(expert, h[token], expert_gate_up(inputs, expert))
        rounded = rounded @ outputs.decoded(expert)[0]
        if design.outputs.basis is not None:
            rounded = rounded @ design.outputs.basis.matrix.T
        error.index_add_(0, place[token], weight * (rounded - y))
    return float(error.square().sum() / exact.square().sum().clamp_min(torch.finfo(torch.float32).tiny))
