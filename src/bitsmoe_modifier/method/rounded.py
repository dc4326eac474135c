"""One side of a layer as it is stored: packed expert by expert while it is rounded, read back where values are needed.

Unpacked, the codes of all experts of a large layer take several times what they are stored in.
"""

from dataclasses import dataclass, field, replace

import torch

from ..storage.chains import index_side
from ..storage.factors import decode_factor, pack_factor
from ..storage.layout import ExpertsLayout, UnitIndex
from .design import LayerDesign, idle_units
from .distributed import Ranks
from .layer import DenseExperts, QuantizerSettings

#: Weights that are decoded at once on a GPU, where an expert alone takes a hundred launches as short as any.
_DECODED_AT_ONCE = 1 << 25


def layout_of(experts: DenseExperts, design: LayerDesign, settings: QuantizerSettings, stripes: int) -> ExpertsLayout:
    """The layout of a layer that is rounded by a design; directions that no expert uses are left out.

    Args:
        experts, design, settings: as for `quantize_layer`, the group size resolved.
        stripes: of trellis codes, 0 of scalar ones.
    """
    num_experts, hidden, length = experts.down.shape
    bases = design.inputs.basis, design.outputs.basis
    idle = 0 if bases[0] is None else idle_units(design.inputs.widths)
    return ExpertsLayout(
        num_experts=num_experts,
        hidden_size=hidden,
        intermediate_size=length,
        rank_in=(design.inputs.widths.shape[1] - idle) * design.block_size,
        rank_out=design.outputs.widths.shape[1] * design.block_size,
        block_size=design.block_size,
        group_size=settings.group_size,
        basis_in_bits=0 if bases[0] is None else bases[0].bits,
        basis_out_bits=0 if bases[1] is None else bases[1].bits,
        basis_group_size=settings.resolve_basis_group(hidden),
        num_dense=len(design.dense_ids),
        has_bias=int(experts.in_bias is not None),
        ungated=int(experts.ungated),
        codes=int(settings.codes == "trellis"),
        stripes=stripes,
    )


@dataclass(frozen=True)
class RoundedSide:
    """One side's factors, rounded and packed.

    Attributes:
        side: "in" or "out".
        layout: of the whole layer.
        widths: uint8 ``[matrices, units]`` of all experts' matrices, units that are left out among them.
        experts: those whose factors are here.
        codes, steps: of these experts, as stored.
        shrinkage: by which the off-diagonal parts of the moments were scaled down.
        index: where the units lie in ``codes`` and ``steps``.
    """

    side: str
    layout: ExpertsLayout
    widths: torch.Tensor
    experts: range
    codes: torch.Tensor
    steps: torch.Tensor
    shrinkage: float
    index: UnitIndex
    _recent: dict[int, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def joined(
        cls,
        side: str,
        layout: ExpertsLayout,
        widths: torch.Tensor,
        experts: range,
        codes: torch.Tensor,
        steps: torch.Tensor,
        shrinkage: float,
    ) -> "RoundedSide":
        """From what is stored of ``experts``; the arguments are the attributes."""
        own = stored_widths(widths, layout, side, experts).to(codes.device)
        return cls(side, layout, widths, experts, codes, steps, shrinkage, index_side(own, layout, side))

    @property
    def stored_widths(self) -> torch.Tensor:
        """Widths of all matrices without the units that are left out, uint8 ``[matrices, units]``."""
        return stored_widths(self.widths, self.layout, self.side, range(self.layout.num_experts))

    def gathered(self, ranks: Ranks) -> "RoundedSide":
        """On the first process, with the experts that the others rounded."""
        if ranks.size == 1:
            return self
        codes, steps = ranks.concatenated(self.codes), ranks.concatenated(self.steps)
        if not ranks.first:
            return self
        experts = range(self.layout.num_experts)
        return self.joined(self.side, self.layout, self.widths, experts, codes, steps, self.shrinkage)

    def decoded(self, expert: int) -> torch.Tensor:
        """Values of one expert: float32 ``[2, I, directions]`` of gate and up, or ``[1, I, directions]`` of down.

        On a GPU those next to it are decoded with it, and kept until others are asked for.
        """
        per, layout, at_once = _per_expert(self.side), self.layout, 1
        if self.codes.is_cuda:
            directions = layout.rank_in if self.side == "in" else layout.rank_out
            at_once = max(1, _DECODED_AT_ONCE // max(1, per * layout.intermediate_size * directions))
        place = expert - self.experts.start
        first = place - place % at_once
        if first not in self._recent:
            self._recent.clear()
            self._recent[first] = self._decoded(range(first, min(first + at_once, len(self.experts))))
        at = (place - first) * per
        values = self._recent[first][at : at + per] if at_once > 1 else self._recent.pop(first)
        if self.side == "out":
            return values.transpose(1, 2).contiguous()
        missing = self.widths.shape[1] * layout.block_size - values.shape[2]
        return torch.nn.functional.pad(values, (0, missing)) if missing else values

    def _decoded(self, places: range) -> torch.Tensor:
        """Factors as `decode_factor` gives them, of the experts at these places of `experts`."""
        per = _per_expert(self.side)
        at = slice(places.start * per, places.stop * per)
        start = self.experts.start * per
        widths = self.widths[start + at.start : start + at.stop].to(self.codes.device)
        index = UnitIndex(self.index.code_offset[at], self.index.step_offset[at])
        units = self.index.code_offset.shape[2]
        return decode_factor(self.codes, self.steps, widths[:, :units], index, self.layout, self.side)


class SidePacker:
    """Packs one side, some experts at a time.

    Args:
        side: "in" or "out".
        layout: of the whole layer.
        widths: uint8 ``[matrices, units]`` of all experts.
        experts: those that will be added, in order.
    """

    def __init__(self, side: str, layout: ExpertsLayout, widths: torch.Tensor, experts: range) -> None:
        self._side, self._layout, self._widths, self._experts = side, layout, widths, experts
        self._packed: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, part: slice, codes: torch.Tensor, steps: torch.Tensor) -> None:
        """Pack the next experts.

        Args:
            part: the experts.
            codes: uint8 ``[matrices, I, directions]``; windows of trellis codes.
            steps: float32 ``[matrices, groups, directions]``, storable.
        """
        layout = replace(self._layout, num_experts=part.stop - part.start)
        widths = stored_widths(self._widths, layout, self._side, range(part.start, part.stop)).to(codes.device)
        kept = widths.shape[1] * layout.block_size
        codes, steps = codes[:, :, :kept], steps[:, :, :kept]
        if self._side == "out":
            codes = codes.transpose(1, 2)
        self._packed.append(pack_factor(codes, steps, widths, layout, self._side))

    def finished(self, device: torch.device, shrinkage: float) -> RoundedSide:
        """The side; ``device`` for that of a process without experts."""
        codes, steps = (list(tensors) for tensors in zip(*self._packed, strict=True)) if self._packed else ([], [])
        self._packed = []
        if not codes:
            codes = [torch.empty(0, dtype=torch.uint8, device=device)]
            steps = [torch.empty(0, dtype=self._layout.step_dtype, device=device)]
        joined = torch.cat(codes), torch.cat(steps)
        return RoundedSide.joined(self._side, self._layout, self._widths, self._experts, *joined, shrinkage)


def stored_widths(widths: torch.Tensor, layout: ExpertsLayout, side: str, experts: range) -> torch.Tensor:
    """Widths of some experts' matrices, of all matrices' ``[matrices, units]``, without the units that are left out."""
    units, per = layout.units_in if side == "in" else layout.units_out, _per_expert(side)
    return widths[experts.start * per : experts.stop * per, :units].contiguous()


def _per_expert(side: str) -> int:
    return 2 if side == "in" else 1
