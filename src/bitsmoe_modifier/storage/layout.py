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

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace

import torch

from ..errors import CheckpointError
from .planes import WIDTHS, code_values, levels, pack_codes, unpack_codes

FORMAT_VERSION = 1
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
        version: format version.
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
        if problems:
            raise CheckpointError("impossible layout: " + ", ".join(problems))

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
        """Weights of the layer's experts before quantization: ``3 * E * I * H``."""
        return 3 * self.num_experts * self.intermediate_size * self.hidden_size

    def to_tensor(self) -> torch.Tensor:
        """The header as int32 ``[16]``: version first, then the fields in order, zero-padded."""
        values = [self.version] + [getattr(self, f.name) for f in fields(self) if f.name != "version"]
        return torch.tensor(values + [0] * (_HEADER_SIZE - len(values)), dtype=torch.int32)

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
        names = [f.name for f in fields(cls) if f.name != "version"]
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
            "steps_in": (torch.float16, (kept[0],)),
            "steps_out": (torch.float16, (kept[1],)),
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


@dataclass(frozen=True)
class PackedExperts:
    """All stored tensors of one MoE layer. Optional ones are None where the layout has none of them.

    See docs/format.md for dtypes and shapes; `ExpertsLayout.shapes` computes them.
    """

    layout: torch.Tensor
    widths_in: torch.Tensor
    widths_out: torch.Tensor
    codes_in: torch.Tensor
    codes_out: torch.Tensor
    steps_in: torch.Tensor
    steps_out: torch.Tensor
    basis_in: torch.Tensor | None = None
    basis_in_step: torch.Tensor | None = None
    basis_out: torch.Tensor | None = None
    basis_out_step: torch.Tensor | None = None
    dense_ids: torch.Tensor | None = None
    dense_in: torch.Tensor | None = None
    dense_out: torch.Tensor | None = None
    in_bias: torch.Tensor | None = None
    out_bias: torch.Tensor | None = None
    checksums: torch.Tensor | None = None

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of every tensor that is there, in storage order."""
        for f in fields(self):
            tensor = getattr(self, f.name)
            if tensor is not None:
                yield f.name, tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors: what the byte budget counts."""
        return sum(t.nbytes for _, t in self.items())

    @property
    def bits_per_weight(self) -> float:
        """Measured bits per expert weight, everything stored counted."""
        return 8 * self.nbytes / ExpertsLayout.from_tensor(self.layout).dense_elements

    def sealed(self) -> "PackedExperts":
        """The same tensors with their checksums (crc32 of each, in storage order)."""
        sums = [_crc32(tensor) for name, tensor in self.items() if name != "checksums"]
        return replace(self, checksums=torch.tensor(sums, dtype=torch.int64, device=self.layout.device))

    def to(self, device: torch.device | str) -> "PackedExperts":
        """All tensors moved to ``device``."""
        return PackedExperts(**{name: tensor.to(device) for name, tensor in self.items()})


TENSOR_NAMES = tuple(f.name for f in fields(PackedExperts))


def _crc32(tensor: torch.Tensor) -> int:
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return zlib.crc32(flat.numpy().data)


def check_structure(
    tensors: Mapping[str, torch.Tensor | tuple[torch.dtype, tuple[int, ...]]], where: str
) -> ExpertsLayout:
    """Check the names, dtypes and sizes of a layer's tensors before any of the large ones is read.

    Args:
        tensors: by name; ``layout``, ``widths_in`` and ``widths_out`` as tensors, the others as tensors or as
            (dtype, shape) from a safetensors header.
        where: module name for messages.

    Raises:
        CheckpointError: naming module and tensor.
    """

    def fail(name: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{where}.{name}: {problem}; the checkpoint is damaged or was written by something else")

    for name in ("layout", "widths_in", "widths_out"):
        if not isinstance(tensors.get(name), torch.Tensor):
            raise fail(name, "missing")
    try:
        layout = ExpertsLayout.from_tensor(_tensor(tensors["layout"]))
    except CheckpointError as error:
        raise CheckpointError(f"{where}.{error}") from None
    widths = {name: _tensor(tensors[name]) for name in ("widths_in", "widths_out")}
    sizes = {
        "widths_in": (layout.num_experts, 2, layout.units_in),
        "widths_out": (layout.num_experts, layout.units_out),
    }
    for name, tensor in widths.items():
        if tensor.dtype != torch.uint8 or tuple(tensor.shape) != sizes[name]:
            raise fail(name, f"is {tensor.dtype} {tuple(tensor.shape)}, expected uint8 {sizes[name]}")
        unknown = sorted(set(tensor.unique().tolist()) - set(WIDTHS))
        if unknown:
            raise fail(name, f"holds the widths {unknown}, known are {WIDTHS}")
    expected = layout.shapes(widths["widths_in"], widths["widths_out"])
    for name in sorted(set(tensors) - set(expected)):
        raise fail(name, "does not belong to this layout")
    for name, (dtype, shape) in expected.items():
        if name not in tensors:
            raise fail(name, "missing")
        found = tensors[name]
        got_dtype, got_shape = (found.dtype, tuple(found.shape)) if isinstance(found, torch.Tensor) else found
        free_dtype = name in ("dense_in", "dense_out", "in_bias", "out_bias")
        if got_shape != shape or (got_dtype != dtype if not free_dtype else not got_dtype.is_floating_point):
            raise fail(name, f"is {got_dtype} {got_shape}, the layout and widths imply {dtype} {shape}")
    return layout


def check_content(packed: PackedExperts, where: str) -> None:
    """Check what the tensors hold: finite floats, checksums, distinct dense experts. Reads every byte once.

    Raises:
        CheckpointError: naming module and tensor.
    """
    layout = ExpertsLayout.from_tensor(packed.layout)
    for name, tensor in packed.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{where}.{name}: holds NaN or infinity; the checkpoint is damaged")
    if packed.dense_ids is not None:
        ids = packed.dense_ids.tolist()
        if len(set(ids)) != len(ids) or any(not 0 <= i < layout.num_experts for i in ids):
            raise CheckpointError(f"{where}.dense_ids: {ids} are not distinct experts of {layout.num_experts}")
    stored = [] if packed.checksums is None else packed.checksums.tolist()
    names = [name for name, _ in packed.items() if name != "checksums"]
    for name, expected in zip(names, stored, strict=True):
        if _crc32(getattr(packed, name)) != expected:
            raise CheckpointError(f"{where}.{name}: the checksum does not match; the file is damaged, fetch it again")


def _tensor(value: object) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise CheckpointError(f"expected a tensor, got {type(value).__name__}")
    return value


# ------------------------------------------------------------------------------------------------- factors


def pack_factor(
    codes: torch.Tensor, steps: torch.Tensor, widths: torch.Tensor, layout: ExpertsLayout, side: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay out the codes and steps of one side in payload order.

    Args:
        codes: uint8, ``[E, 2, I, R]`` (side "in") or ``[E, R', I]`` (side "out").
        steps: fp16, ``[E, 2, groups, R]`` or ``[E, groups, R']``.
        widths: uint8, ``[E, 2, units]`` or ``[E, units]``.
        layout: sizes.
        side: "in" or "out".

    Returns:
        (codes uint8 1-D, steps fp16 1-D) as stored.
    """
    bs, gs, groups = layout.block_size, layout.group_size, layout.groups
    if side == "in":
        flat = widths.reshape(-1, layout.units_in)
        # [matrix, group, unit, column, direction]
        tiles = codes.reshape(len(flat), groups, gs, layout.units_in, bs).transpose(2, 3)
    else:
        flat = widths.reshape(-1, layout.units_out)
        # [matrix, group, unit, direction, column]
        tiles = codes.reshape(len(flat), layout.units_out, bs, groups, gs).permute(0, 3, 1, 2, 4)
    step_rows = steps.reshape(len(flat), groups, -1, bs)
    index = index_units(flat, groups, group_major=side == "in")
    bits = int(flat.sum(dtype=torch.int64)) * groups
    kept = int((flat > 0).sum()) * groups
    payload = torch.empty(bits, layout.quantum, dtype=torch.uint8, device=codes.device)
    packed_steps = torch.empty(kept, bs, dtype=torch.float16, device=codes.device)
    for width in flat.unique().tolist():
        if width:
            chosen = (flat == width)[:, None].expand(-1, groups, -1)
            rows = pack_codes(tiles[chosen], width).view(-1, width, layout.quantum)
            places = index.code_offset[chosen][:, None] + torch.arange(width, device=codes.device)
            payload[places.flatten()] = rows.flatten(0, 1)
            packed_steps[index.step_offset[chosen]] = step_rows[chosen].to(torch.float16)
    return payload.flatten(), packed_steps.flatten()


def decode_factor(
    codes: torch.Tensor,
    steps: torch.Tensor,
    widths: torch.Tensor,
    index: UnitIndex,
    layout: ExpertsLayout,
    side: str,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Decode the factors of the given matrices; the oracle of every faster path.

    Args:
        codes: uint8 1-D, the side's whole payload.
        steps: fp16 1-D, the side's whole steps.
        widths: uint8 ``[matrices, units]`` of the matrices wanted.
        index: their rows of the side's `UnitIndex`.
        layout: sizes.
        side: "in" or "out".
        dtype: of the result; the products are formed in float32, where they are exact.

    Returns:
        ``[matrices, I, R]`` (side "in") or ``[matrices, R', I]`` (side "out").
    """
    bs, gs, groups = layout.block_size, layout.group_size, layout.groups
    matrices, units = widths.shape
    m, n = (gs, bs) if side == "in" else (bs, gs)
    tiles = torch.zeros(matrices, groups, units, m, n, dtype=dtype, device=codes.device)
    payload, step_rows = codes.view(-1, layout.quantum), steps.view(-1, bs)
    for width in widths.unique().tolist():
        if width:
            chosen = (widths == width)[:, None].expand(-1, groups, -1)
            places = index.code_offset[chosen][:, None] + torch.arange(width, device=codes.device)
            values = code_values(unpack_codes(payload[places].flatten(1), width, m, n), width)
            step = step_rows[index.step_offset[chosen]].to(torch.float32)
            tiles[chosen] = (values * (step[:, None, :] if side == "in" else step[:, :, None])).to(dtype)
    if side == "in":
        return tiles.transpose(2, 3).reshape(matrices, layout.intermediate_size, layout.rank_in)
    return tiles.permute(0, 2, 3, 1, 4).reshape(matrices, layout.rank_out, layout.intermediate_size)


# --------------------------------------------------------------------------------------------------- bases


def pack_basis(codes: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Pack basis codes row by row: uint8 ``[rows, columns]`` to uint8 ``[rows, columns * bits / 8]``.

    The columns of each group of ``group`` elements form a row of one plane (4 or 8 bits: one or two 4-bit digits; an
    8-bit code is stored as itself).
    """
    if bits == 8:
        return codes.contiguous()
    rows, columns = codes.shape
    return pack_codes(codes.reshape(rows, columns // group, group), bits).view(rows, columns * bits // 8)


def decode_basis(basis: torch.Tensor, step: torch.Tensor | None, bits: int, group: int) -> torch.Tensor:
    """Decode a stored basis to float32 ``[rows, columns]``; ``step`` is fp16 ``[rows, columns / group]`` or None."""
    if bits == 16 or step is None:
        return basis.to(torch.float32)
    rows = basis.shape[0]
    columns = basis.shape[1] * 8 // bits
    codes = basis if bits == 8 else unpack_codes(basis.reshape(rows, -1), bits, columns // group, group)
    values = code_values(codes.reshape(rows, columns // group, group), bits)
    return (values * step.to(torch.float32)[:, :, None]).view(rows, columns)


__all__ = [
    "BASIS_BITS",
    "FORMAT_VERSION",
    "TENSOR_NAMES",
    "ExpertsLayout",
    "PackedExperts",
    "UnitIndex",
    "check_content",
    "check_structure",
    "decode_basis",
    "decode_factor",
    "index_units",
    "levels",
    "pack_basis",
    "pack_factor",
]
