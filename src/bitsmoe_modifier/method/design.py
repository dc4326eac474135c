"""What a layer will be stored as, before any weight is rounded: shared bases, and a bit-width for every unit.

    plan = plan_layer(experts, tokens, settings)   # statistics, candidate bases, cost tables
    design = plan.choose(budget)                   # the allocation under a budget

A plan holds neither experts nor tokens, so that global allocation can keep those of all layers (`LayerPlan.curve`), and
a design all that is needed of the statistics to round by it: calibration's second pass measures second moments only.
"""

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TypeVar

import numpy as np
import torch

from ..errors import RecipeError
from .allocation import Allocation, allocate, hull_curve
from .costs import SideCosts, unit_cost
from .layer import QuantizerSettings
from .spectral import SharedBasis

#: Bits per weight, everything counted, at which bases are tried (`trial`).
TRIAL_BITS = (1.25, 2.0)
#: Bits per weight from which on what was found at 2 counts alone. At 1.6 bits it chose within 4 % of the best on all
#: models but one (docs/quality.md); at 1.25, where half of the directions are dropped, it lost 5 times the best there.
_LARGE_BITS = 1.6
#: What a basis must be expected to win by. Of the input: held-out rows are of the calibration text, which it fits more
#: closely than the channels do (on a layer cut out of a real language model, in scalar codes, it won by 2 % on held-out
#: rows and lost by 17 % on other text). Of the output: on bookmoe at 2 bits one that won a trial by 5 % lost 7 % on
#: other text.
_MARGIN_IN, _MARGIN_OUT = 0.05, 0.1

T = TypeVar("T")


@dataclass(frozen=True)
class SidePlan:
    """One side (input or output) of a layer in one basis.

    Attributes:
        basis: the rounded basis, None where the side keeps its own channels.
        costs: distortion per unit and width.
        weight: importance of the elements along I, ``[matrices, I]``.
        rank: directions.
        times: how many times what the costs foretell is lost with this candidate (`trial`) at each of `TRIAL_BITS`, in
            units of what is lost at that size with the pair of the input's and the output's that is best at the last;
            None without a trial.
    """

    basis: SharedBasis | None
    costs: SideCosts
    weight: torch.Tensor
    rank: int
    times: tuple[float, ...] | None = None

    @property
    def bits_per_direction(self) -> int:
        """Stored bits of one row of an input basis."""
        if self.basis is None:
            return 0
        return sum(8 * t[0].nbytes for t in (self.basis.stored, self.basis.step) if t is not None)

    @property
    def basis_bits(self) -> int:
        """Stored bits of the basis, its tensors' checksums included."""
        if self.basis is None:
            return 0
        tensors = [t for t in (self.basis.stored, self.basis.step) if t is not None]
        return sum(8 * t.nbytes + 64 for t in tensors)


@dataclass(frozen=True)
class SideDesign:
    """One side as it will be stored.

    Attributes:
        basis: None where the side keeps its own channels.
        widths: of every unit, uint8 ``[2E, units]`` (gate and up of each expert) or ``[E, units]`` (down).
        weight: importance of the elements along I, ``[matrices, I]``.
        energy: what dropping each unit of directions would lose, summed over the matrices, in the unit of the layer's
            squared output error; empty where width 0 is not allowed.
    """

    basis: SharedBasis | None
    widths: torch.Tensor
    weight: torch.Tensor
    energy: tuple[float, ...] = ()


@dataclass(frozen=True)
class LayerDesign:
    """A layer as it will be stored.

    Attributes:
        inputs, outputs: the sides.
        block_size: directions per unit.
        slope_ratio, mass: of the `LayerStatistics` that the design was made from.
        dense_ids: super experts, kept dense.
        predicted_distortion: what the cost tables say of the allocation.
        allocation_gap: upper bound on its distance from the optimum.
        solver: which solver ran.
        warnings: recoverable numerical trouble, in words for the user.
    """

    inputs: SideDesign
    outputs: SideDesign
    block_size: int
    slope_ratio: torch.Tensor
    mass: torch.Tensor
    dense_ids: tuple[int, ...]
    predicted_distortion: float
    allocation_gap: float
    solver: str
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class LayerPlan:
    """A layer measured and decomposed, before any bit is spent.

    Attributes:
        settings: how to quantize.
        shape: (E, H, I).
        inputs, outputs: the candidates of each side (with and without a basis, as the settings allow).
        block_size: directions per unit.
        constant_bits: stored bits that neither the bases nor the allocation change: header, checksums, dense experts,
            biases.
        slope_ratio, mass: of the layer's `LayerStatistics`.
        dense_ids: super experts, kept dense.
        warnings: recoverable numerical trouble, in words for the user.
        ungated: 1 where experts have no gate.
    """

    settings: QuantizerSettings
    shape: tuple[int, int, int]
    inputs: tuple[SidePlan, ...]
    outputs: tuple[SidePlan, ...]
    block_size: int
    constant_bits: int
    slope_ratio: torch.Tensor
    mass: torch.Tensor
    dense_ids: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()
    ungated: int = 0

    def only(self, inputs: int, outputs: int) -> "LayerPlan":
        """The plan with one candidate of each side."""
        return replace(self, inputs=(self.inputs[inputs],), outputs=(self.outputs[outputs],))

    @property
    def elements(self) -> int:
        """Weights that the plan is for, biases not counted: ``3 E H I``, ``2 E H I`` without a gate."""
        return (3 - self.ungated) * self.shape[0] * self.shape[1] * self.shape[2]

    def fixed_bits(self, inputs: SidePlan, outputs: SidePlan) -> int:
        """Stored bits that do not depend on the allocation: `constant_bits`, bases and the units' widths."""
        units = self.shape[0] * (2 * inputs.rank + outputs.rank) // self.block_size
        return self.constant_bits + inputs.basis_bits + outputs.basis_bits + 8 * units

    def curve(self, points: int = 256) -> tuple[np.ndarray, np.ndarray]:
        """What is expected to be lost against stored bits, with the bases that `choose` takes.

        Returns:
            (bits ``[points]`` rising, distortion ``[points]`` not rising: that of the cost tables for the pair of bases
            that is best at 2 bits, for others as much more or less as trials found).
        """
        cost = self._unit_costs()
        pairs = [(inputs, outputs) for inputs in self.inputs for outputs in self.outputs]
        corners = []
        for inputs, outputs in pairs:
            spent, distortion = hull_curve(self._table(inputs, outputs), cost)
            corners.append((spent + self.fixed_bits(inputs, outputs), distortion))
        bits = np.linspace(min(spent[0] for spent, _ in corners), max(spent[-1] for spent, _ in corners), points)
        foretold = np.stack([np.interp(bits, *corner, left=np.inf) for corner in corners])
        times = np.stack([_expected_times(*pair, bits / self.elements) for pair in pairs])
        return bits, np.minimum.accumulate((foretold * times).min(0))

    def choose(self, budget_bits: float) -> LayerDesign:
        """The pair of bases that is expected to lose least under the budget, and its allocation.

        Raises:
            RecipeError: when the budget does not even pay what every option stores regardless of width.
        """
        best: tuple[SidePlan, SidePlan, Allocation] | None = None
        cost, least, expected = self._unit_costs(), np.inf, np.inf
        bits = np.asarray(budget_bits / self.elements)
        for inputs in self.inputs:
            for outputs in self.outputs:
                table, fixed = self._table(inputs, outputs), self.fixed_bits(inputs, outputs)
                least = min(least, fixed + len(table) * cost[0])
                if budget_bits < fixed + len(table) * cost[0]:
                    continue
                solved = allocate(table, cost, budget_bits - fixed, self.settings.solver)
                here = solved.distortion * float(_expected_times(inputs, outputs, bits))
                if best is None or here < expected:
                    best, expected = (inputs, outputs, solved), here
        if best is None:
            weights = self.elements
            raise RecipeError(
                f"bits: {budget_bits / weights:.3f} is below the {least / weights:.3f} bits per weight that this "
                "layer's bases, bit-widths, dense experts and narrowest codes take; raise `bits`, lower `basis_bits`, "
                "set the bases to none or add 0 to `bit_widths`"
            )
        inputs, outputs, solved = best
        return self._design(inputs, outputs, self._without_idle(inputs, outputs, solved, budget_bits))

    def _without_idle(
        self, inputs: SidePlan, outputs: SidePlan, allocation: Allocation, budget_bits: float
    ) -> Allocation:
        """The allocation once more, with the bits of the last input directions if no expert uses them (R < H).

        They are not stored, neither their rows of the basis nor their widths; the other units get what that saves.
        """
        num_experts = self.shape[0]
        cut, units = 2 * num_experts * inputs.rank // self.block_size, inputs.rank // self.block_size
        idle = 0 if inputs.basis is None else idle_units(self._widths(allocation.choice[:cut]).view(-1, units))
        if not idle:
            return allocation
        saved = idle * (self.block_size * inputs.bits_per_direction + 8 * 2 * num_experts)
        kept = np.ones(len(allocation.choice), dtype=bool)
        kept[:cut] = np.tile(np.arange(units) < units - idle, 2 * num_experts)
        table = self._table(inputs, outputs)
        budget = budget_bits - self.fixed_bits(inputs, outputs) + saved
        solved = allocate(table[kept], self._unit_costs(), budget, self.settings.solver)
        choice = allocation.choice.copy()
        choice[kept] = solved.choice
        return replace(solved, choice=choice, distortion=solved.distortion + float(table[~kept, 0].sum()))

    def _widths(self, choice: np.ndarray) -> torch.Tensor:
        """Widths, uint8, of chosen columns of the cost tables."""
        return torch.tensor(self.inputs[0].costs.widths, dtype=torch.uint8, device="cpu")[torch.from_numpy(choice)]

    def _design(self, inputs: SidePlan, outputs: SidePlan, allocation: Allocation) -> LayerDesign:
        num_experts = self.shape[0]
        widths = self._widths(allocation.choice)
        cut = 2 * num_experts * inputs.rank // self.block_size
        widths_in, widths_out = widths[:cut].view(2 * num_experts, -1), widths[cut:].view(num_experts, -1)
        for expert in self.dense_ids:
            # takes back what was bought from a budget that exceeds every need
            widths_in[2 * expert : 2 * expert + 2] = 0
            widths_out[expert] = 0
        return LayerDesign(
            SideDesign(inputs.basis, widths_in, inputs.weight, _energy(inputs.costs)),
            SideDesign(outputs.basis, widths_out, outputs.weight, _energy(outputs.costs)),
            self.block_size,
            self.slope_ratio,
            self.mass,
            self.dense_ids,
            allocation.distortion,
            allocation.gap,
            allocation.solver,
            self.warnings,
        )

    def _unit_costs(self) -> np.ndarray:
        widths = self.inputs[0].costs.widths
        return np.array(
            [unit_cost(w, self.block_size, self.shape[2], self.settings.group_size) for w in widths], dtype=np.float64
        )

    def _table(self, inputs: SidePlan, outputs: SidePlan) -> np.ndarray:
        table = torch.cat([s.costs.distortion.flatten(0, 1) for s in (inputs, outputs)]).numpy()
        if not self.dense_ids:
            return table
        # A dense expert's units lose nothing at width 0, so no solver buys them more while another unit gains by it.
        table = table.copy()
        matrices = torch.zeros(self.shape[0], dtype=torch.bool, device="cpu")
        matrices[list(self.dense_ids)] = True
        units_in, units_out = inputs.costs.distortion.shape[1], outputs.costs.distortion.shape[1]
        mask = torch.cat([matrices.repeat_interleave(2 * units_in), matrices.repeat_interleave(units_out)])
        table[mask.numpy()] = 0.0
        return table


def margin(inputs: SidePlan, outputs: SidePlan) -> float:
    """How many times less than a pair without bases a pair of candidates has to lose."""
    return (1 + _MARGIN_IN * (inputs.basis is not None)) * (1 + _MARGIN_OUT * (outputs.basis is not None))


def _expected_times(inputs: SidePlan, outputs: SidePlan, bits: np.ndarray) -> np.ndarray:
    """What corrects the costs of a pair of candidates at so many bits per weight, the margin included; 1 without a
    trial."""
    if inputs.times is None or outputs.times is None:
        return np.ones_like(bits)
    least, most = (one * other for one, other in zip(inputs.times, outputs.times, strict=True))
    part = np.clip((bits - TRIAL_BITS[0]) / (_LARGE_BITS - TRIAL_BITS[0]), 0.0, 1.0)
    return least ** (1 - part) * most**part * margin(inputs, outputs)


def _energy(costs: SideCosts) -> tuple[float, ...]:
    return tuple(costs.distortion[:, :, 0].sum(0).tolist()) if costs.widths[0] == 0 else ()


def idle_units(widths: torch.Tensor) -> int:
    """How many of the last units no matrix uses, of ``widths [matrices, units]``; one is always kept."""
    used = widths.amax(0).nonzero()
    return widths.shape[1] - 1 - (int(used[-1]) if len(used) else 0)


def moved(value: T, device: torch.device | str) -> T:
    """A (nested) dataclass or tuple with its tensors on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)  # type: ignore[return-value]
    if isinstance(value, tuple):
        return tuple(moved(item, device) for item in value)  # type: ignore[return-value]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: moved(getattr(value, f.name), device) for f in fields(value)})
    return value
