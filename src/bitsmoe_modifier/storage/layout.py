"""The stored layout of one MoE layer's experts: header, unit index, packing and decoding (docs/format.md).

Symbols follow docs/method.md: E experts, H hidden size, I intermediate size, R / R' directions of the input / output
side. A *unit* is a block of ``block_size`` consecutive directions of one matrix (gate, up or down) of one expert; it
has one width. Along I, steps and payload come in groups of ``group_size``. The payload is counted in *quanta*: the
bytes of one bit of one (unit, group), ``block_size * group_size / 8``; every offset is a whole number of quanta, so a
kernel that multiplies a small integer by a constant keeps its alignment.

Payload order, which every reader can rebuild from the widths alone:
    codes_in   [expert][gate, up][group][unit, widest first, then by index][plane][column of the group][directions]
    codes_out  [expert][unit, widest first, then by index][group][plane][direction][columns of the group]
    steps_in   [expert][gate, up][group][unit, as above, width > 0][direction]
    steps_out  [expert][unit, as above, width > 0][group][direction]
A tensor-parallel shard along I and an expert-parallel shard are slices of these.
"""

from dataclasses import dataclass, fields

import torch

from ..errors import CheckpointError

#: The format version that is written; older ones are read. Version 1 has scalar codes only, and steps in fp16.
FORMAT_VERSION = 2
BASIS_BITS = (0, 4, 8, 16)
_HEADER_SIZE = 16


@dataclass(frozen=True)
class ExpertsLayout:
    """The header of a stored layer: every size that the other tensors' shapes follow from.

    Attributes:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I, a multiple of ``group_size``.
        rank_in: R, directions of the input side (H where there is no input basis); a multiple of ``block_size``.
        rank_out: R', directions of the output side; a multiple of ``block_size``.
        block_size: directions per unit, a multiple of 8.
        group_size: columns along I that share a step, a multiple of 8.
        basis_in_bits: 0 (no input basis: the directions are the hidden channels), 4, 8 or 16.
        basis_out_bits: likewise for the output side.
        basis_group_size: elements of a basis row that share a step (4 and 8 bits).
        num_dense: experts kept dense (super experts).
        has_bias: 1 where gate/up and down have biases.
        codes: family of the experts' codes, 0 scalar (`planes`), 1 trellis (`trellis`).
        stripes: of trellis codes, which units of the output side may share a sequence: every n-th; 0 of scalar codes.
        ungated: 1 where the model's experts have no gate: the input projection is stored in the gate's place, the
            up-projection has width 0 throughout and stands for the constant 1.
        version: of the format.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    rank_in: int
    rank_out: int
    block_size: int
    group_size: int
    basis_in_bits: int
    basis_out_bits: int
    basis_group_size: int
    num_dense: int = 0
    has_bias: int = 0
    codes: int = 0
    stripes: int = 0
    ungated: int = 0
    version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        problems = [f.name for f in fields(self) if not 0 <= getattr(self, f.name) < 2**31]
        for name in ("num_experts", "hidden_size", "intermediate_size", "rank_in", "rank_out"):
            if getattr(self, name) < 1:
                problems.append(f"{name} = {getattr(self, name)}")
        for name in ("block_size", "group_size", "basis_group_size"):
            if getattr(self, name) < 8 or getattr(self, name) % 8:
                problems.append(f"{name} = {getattr(self, name)} is not a positive multiple of 8")
        if problems:
            raise CheckpointError("impossible layout: " + ", ".join(problems))
        for divisor, total in (
            ("block_size", "rank_in"),
            ("block_size", "rank_out"),
            ("group_size", "intermediate_size"),
        ):
            if getattr(self, total) % getattr(self, divisor):
                problems.append(f"{divisor} {getattr(self, divisor)} does not divide {total} {getattr(self, total)}")
        for name, rank in (("basis_in_bits", self.rank_in), ("basis_out_bits", self.rank_out)):
            bits = getattr(self, name)
            if bits not in BASIS_BITS:
                problems.append(f"{name} = {bits} is not one of {BASIS_BITS}")
            if bits == 0 and rank != self.hidden_size:
                problems.append(f"{name} = 0 needs as many directions as hidden channels, not {rank}")
            # basis_in rows have H elements, basis_out rows have R'
            row = self.hidden_size if name == "basis_in_bits" else self.rank_out
            if bits in (4, 8) and row % self.basis_group_size:
                problems.append(f"basis_group_size {self.basis_group_size} does not divide {row}")
        if self.rank_in > self.hidden_size or self.rank_out > self.hidden_size:
            problems.append("more directions than hidden channels")
        if self.num_dense > self.num_experts:
            problems.append(f"num_dense {self.num_dense} of {self.num_experts} experts")
        if self.has_bias not in (0, 1):
            problems.append(f"has_bias = {self.has_bias}")
        if self.ungated not in (0, 1):
            problems.append(f"ungated = {self.ungated}")
        if not 1 <= self.version <= FORMAT_VERSION or (self.version == 1 and self.codes):
            problems.append(f"version = {self.version} with codes = {self.codes}")
        if self.codes not in (0, 1) or (self.stripes > 0) != (self.codes == 1):
            problems.append(f"codes = {self.codes} with stripes = {self.stripes}")
        if self.codes == 1:
            for name in ("block_size", "group_size"):
                if getattr(self, name) % 16:
                    problems.append(f"{name} = {getattr(self, name)} is not a multiple of 16, as trellis codes need")
        if problems:
            raise CheckpointError("impossible layout: " + ", ".join(problems))

    @property
    def step_dtype(self) -> torch.dtype:
        """Of the stored steps (`steps`)."""
        return torch.float16 if self.version == 1 else torch.uint8

    @property
    def groups(self) -> int:
        """Groups along I."""
        return self.intermediate_size // self.group_size

    @property
    def units_in(self) -> int:
        """Units of one input matrix (gate or up) of one expert."""
        return self.rank_in // self.block_size

    @property
    def units_out(self) -> int:
        """Units of one down matrix."""
        return self.rank_out // self.block_size

    @property
    def quantum(self) -> int:
        """Bytes of one bit of one (unit, group)."""
        return self.block_size * self.group_size // 8

    @property
    def dense_elements(self) -> int:
        """Weights of the layer's experts before quantization: ``3 * E * I * H``, a third less without a gate."""
        return (3 - self.ungated) * self.num_experts * self.intermediate_size * self.hidden_size

    def to_tensor(self) -> torch.Tensor:
        """The header as int32 ``[16]`` on the CPU: version first, then the other fields in order, zero-padded."""
        values = [self.version, *(getattr(self, f.name) for f in fields(self)[:-1])]
        return torch.tensor(values + [0] * (_HEADER_SIZE - len(values)), dtype=torch.int32, device="cpu")

    @classmethod
    def from_tensor(cls, header: torch.Tensor) -> "ExpertsLayout":
        """Read a header written by `to_tensor`.

        Raises:
            CheckpointError: on another version, another shape or impossible sizes.
        """
        if header.dtype != torch.int32 or tuple(header.shape) != (_HEADER_SIZE,):
            raise CheckpointError(f"layout is {header.dtype} {tuple(header.shape)}, expected int32 ({_HEADER_SIZE},)")
        version, *values = header.tolist()
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"layout: the checkpoint has format version {version}, this package reads up to {FORMAT_VERSION}; "
                "upgrade bitsmoe-modifier"
            )
        names = [f.name for f in fields(cls)[:-1]]
        if version < 1 or any(values[len(names) :]):
            raise CheckpointError(f"layout: not a bitsmoe header: {header.tolist()}")
        return cls(**dict(zip(names, values, strict=False)), version=version)

    def shapes(
        self, widths_in: torch.Tensor, widths_out: torch.Tensor
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of every tensor the layer must have, given its widths (on any device but meta).

        ``dense_in``, ``dense_out``, ``in_bias`` and ``out_bias`` keep the model's own float dtype: theirs is reported
        as bfloat16 and not checked.
        """
        n, g, bs = self.num_experts, self.groups, self.block_size
        bits = int(widths_in.sum(dtype=torch.int64)) * g, int(widths_out.sum(dtype=torch.int64)) * g
        kept = int((widths_in > 0).sum()) * g * bs, int((widths_out > 0).sum()) * g * bs
        specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "layout": (torch.int32, (_HEADER_SIZE,)),
            "widths_in": (torch.uint8, (n, 2, self.units_in)),
            "widths_out": (torch.uint8, (n, self.units_out)),
            "codes_in": (torch.uint8, (bits[0] * self.quantum,)),
            "codes_out": (torch.uint8, (bits[1] * self.quantum,)),
            "steps_in": (self.step_dtype, (kept[0],)),
            "steps_out": (self.step_dtype, (kept[1],)),
        }
        for side, basis_bits, rows, columns in (
            ("basis_in", self.basis_in_bits, self.rank_in, self.hidden_size),
            ("basis_out", self.basis_out_bits, self.hidden_size, self.rank_out),
        ):
            if basis_bits == 16:
                specs[side] = (torch.bfloat16, (rows, columns))
            elif basis_bits:
                specs[side] = (torch.uint8, (rows, columns * basis_bits // 8))
                specs[f"{side}_step"] = (torch.float16, (rows, columns // self.basis_group_size))
        if self.num_dense:
            width = self.intermediate_size
            specs["dense_ids"] = (torch.int32, (self.num_dense,))
            specs["dense_in"] = (torch.bfloat16, (self.num_dense, 2 * width, self.hidden_size))
            specs["dense_out"] = (torch.bfloat16, (self.num_dense, self.hidden_size, width))
        if self.has_bias:
            specs["in_bias"] = (torch.bfloat16, (n, 2 * self.intermediate_size))
            specs["out_bias"] = (torch.bfloat16, (n, self.hidden_size))
        specs["checksums"] = (torch.int64, (len(specs),))
        return specs


@dataclass(frozen=True)
class UnitIndex:
    """Where each (unit, group) of one side lies in the payload, in the units' own order.

    Attributes:
        code_offset: int64 ``[..., groups, units]`` in quanta.
        step_offset: int64 ``[..., groups, units]`` in rows of ``block_size`` steps; -1 for a unit of width 0.
    """

    code_offset: torch.Tensor
    step_offset: torch.Tensor


def index_units(widths: torch.Tensor, groups: int, group_major: bool) -> UnitIndex:
    """Rebuild the payload index of one side from its widths.

    Args:
        widths: uint8 ``[matrices, units]``; a matrix is an (expert, gate | up) or an expert's down.
        groups: groups along I.
        group_major: True for the input side (group outside of units), False for the output side.

    Returns:
        The offsets, each ``[matrices, groups, units]``.
    """
    wide = widths.to(torch.int64)
    order = torch.argsort(wide, dim=1, descending=True, stable=True)
    bits = wide.gather(1, order)
    kept = (bits > 0).to(torch.int64)
    group = torch.arange(groups, device=widths.device)[None, :, None]

    def offsets(size: torch.Tensor) -> torch.Tensor:
        """Start of every (group, unit in payload order), when each (unit, group) takes ``size`` places."""
        total = size.sum(1)
        start = (total.cumsum(0) - total) * groups
        before = size.cumsum(1) - size
        if group_major:
            return start[:, None, None] + group * total[:, None, None] + before[:, None]
        return start[:, None, None] + group * size[:, None] + before[:, None] * groups

    inverse = torch.argsort(order, dim=1)[:, None].expand(-1, groups, -1)
    code_offset = offsets(bits).gather(2, inverse)
    step_offset = offsets(kept).gather(2, inverse)
    return UnitIndex(code_offset, torch.where(wide[:, None] > 0, step_offset, -1))
