"""A layer's unquantized experts and the settings that decide how they are quantized."""

from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch

from ..errors import CalibrationError
from .allocation import Solver
from .gating import Gating
from .numerics import all_finite

#: Elements of weights or moments that are worked on at once: bounds the float32 temporaries to some gigabytes. On a GPU
#: the least of them: there a part is as large as memory allows, for launches take longer than what they do.
PART_ELEMENTS = 1 << 26
#: Tensors of a part's size that rounding holds at once: weights, target, codes, errors, moments, their factors, …
PART_TENSORS = 12
#: Share of a GPU's free memory that a part may take: what else belongs to a layer comes and goes meanwhile.
_PART_SHARE = 0.5

BasisChoice = Literal["auto", "spectral", "none"]
CodesChoice = Literal["auto", "scalar", "trellis"]


#: in the place of a group size: the one that fits a layer (`QuantizerSettings.resolve_group_size`)
AUTO_GROUP_SIZE = 0


@dataclass(frozen=True)
class QuantizerSettings:
    """Everything that decides how a layer is quantized; `BitsMoEModifier` documents the fields for users, but of

    Attributes:
        least_bits: the smallest budget that a layer's plan has to serve; 0: any. Small ones need a trial more.
    """

    bits: float = 2.0
    least_bits: float = 0.0
    codes: CodesChoice = "auto"
    widths: tuple[int, ...] = (0, 1, 2, 3, 4, 6)
    block_size: int | None = None
    group_size: int = AUTO_GROUP_SIZE
    basis_bits: int = 4
    input_basis: BasisChoice = "auto"
    output_basis: BasisChoice = "auto"
    error_feedback: bool = True
    compensation: bool = True
    refine_passes: int = 1
    solver: Solver = "auto"
    dampening_frac: float = 0.01
    shrinkage: float | None = None

    def resolve_block_size(self, rank: int) -> int:
        """The block size for ``rank`` directions: as set, or the power of two in 16..128 nearest ``rank / 16``."""
        if self.block_size is not None:
            return self.block_size
        size = 128
        while size > 16 and (size > rank // 16 or rank % size):
            size //= 2
        return size if rank % size == 0 else 8

    def resolve_group_size(self, length: int) -> int:
        """Weights along I that share a scale in a layer of expert size ``length``.

        As set; else 128 where it divides I, or the largest power of two from 64 to 16 that does, of which the kernels
        take 64 and 32; where none does, the largest multiple of 8 below 128, or 128, which then is refused by name.
        """
        if self.group_size != AUTO_GROUP_SIZE:
            return self.group_size
        return next((g for g in (128, 64, 32, 16, *range(120, 0, -8)) if length % g == 0), 128)

    def for_sizes(self, hidden: int, length: int) -> "QuantizerSettings":
        """The settings of a layer of hidden size H and expert size I, with its group size and its family of codes."""
        group_size = self.resolve_group_size(length)
        whole = not any(size % 16 for size in (group_size, self.resolve_block_size(hidden)))  # quanta of trellis codes
        codes = self.codes if self.codes != "auto" else "trellis" if whole else "scalar"
        return replace(self, group_size=group_size, codes=codes)

    def resolve_basis_group(self, columns: int) -> int:
        """Elements of a basis row per step: the largest of 128, 64, … 8 that divides ``columns``."""
        return next((g for g in (128, 64, 32, 16, 8) if columns % g == 0), columns)


class Matrices(Protocol):
    """A tensor ``[E, rows, columns]``, or what answers like one and reads an expert's matrix when asked for it."""

    @property
    def shape(self) -> torch.Size:
        """(E, rows, columns)."""

    @property
    def dtype(self) -> torch.dtype:
        """Of a matrix."""

    @property
    def device(self) -> torch.device:
        """Of a matrix."""

    def numel(self) -> int:
        """Weights."""

    def element_size(self) -> int:
        """Bytes of a weight."""

    def __len__(self) -> int:
        """E."""

    def __getitem__(self, index: Any, /) -> torch.Tensor:
        """One expert's matrix by its number; those of a slice or a tensor of numbers."""


def part_elements(device: torch.device) -> int:
    """Elements of a part on a device: `PART_ELEMENTS`, or more on a GPU that has the memory for them now."""
    if device.type != "cuda":
        return PART_ELEMENTS
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + cached
    return max(PART_ELEMENTS, int(free * _PART_SHARE) // (PART_TENSORS * 4))


@dataclass(frozen=True)
class DenseExperts:
    """The unquantized experts of a layer.

    Attributes:
        gate_up: ``[E, 2I, H]``, gate rows first.
        down: ``[E, H, I]``.
        gating: elementwise function between them.
        in_bias, out_bias: ``[E, 2I]``, ``[E, H]`` or None.
        ungated: of experts without a gate, ``down(act(W x))``: W is in the gate's rows, those of up are zero, and
            ``gating`` adds 1 to them. Zeros cost nothing: they get width 0.
    """

    gate_up: Matrices
    down: Matrices
    gating: Gating
    in_bias: torch.Tensor | None = None
    out_bias: torch.Tensor | None = None
    ungated: bool = False

    def parts(self, experts: range) -> list[slice]:
        """Consecutive experts of some, so many at a time that `part_elements` hold their weights, and their moments."""
        elements = part_elements(self.down.device)
        size = max(1, elements // max(self.gate_up.shape[1:].numel(), self.down.shape[1] ** 2))
        return [slice(at, min(at + size, experts.stop)) for at in range(experts.start, experts.stop, size)]

    def in_factors(self, part: slice, inverse: torch.Tensor | None) -> torch.Tensor:
        """A of a part's gate and up matrices in turn, float32 ``[2n, I, R]``.

        Args:
            part: experts.
            inverse: ``[H, R]`` of the basis (`spectral.refit_inverse`), None for the hidden channels themselves.
        """
        factor = self.gate_up[part].to(torch.float32)
        factor = factor if inverse is None else factor @ inverse.to(torch.float32)
        return factor.reshape(2 * len(factor), self.down.shape[2], -1)

    def out_factors(self, part: slice, inverse: torch.Tensor | None) -> torch.Tensor:
        """F of a part, float32 ``[n, R', I]``; ``inverse [R', H]`` as in `in_factors`."""
        factor = self.down[part].to(torch.float32)
        return factor if inverse is None else inverse.to(torch.float32) @ factor

    @property
    def elements(self) -> int:
        """Weights, biases not counted, nor the zeros in the place of a gate."""
        return self.gate_up.numel() // (1 + self.ungated) + self.down.numel()

    def activations(self, expert: int, x: torch.Tensor, gate_up: torch.Tensor | None = None) -> torch.Tensor:
        """z of one expert, float32 ``[T, I]``.

        Args:
            expert: which.
            x: float32 ``[T, H]``, or ``[T, R]`` in a basis's coordinates.
            gate_up: ``[2I, H]`` or ``[2I, R]`` to use in place of the expert's own.
        """
        weight = self.gate_up[expert].to(torch.float32) if gate_up is None else gate_up
        bias = None if self.in_bias is None else self.in_bias[expert].to(torch.float32)
        gate, up = torch.nn.functional.linear(x, weight, bias).chunk(2, dim=1)
        return self.gating(gate, up)

    def check_finite(self) -> None:
        """Raise CalibrationError naming the first expert with NaN or infinity in its weights."""
        for name in ("gate_up", "down", "in_bias", "out_bias"):
            tensor = getattr(self, name)
            experts = range(0 if tensor is None else len(tensor))
            bad = [] if tensor is None else (~torch.stack([all_finite(tensor[e]) for e in experts])).nonzero().tolist()
            if bad:
                expert = bad[0][0]
                raise CalibrationError(
                    f"expert {expert}: its {name} weights hold NaN or infinity; check the base model"
                )
