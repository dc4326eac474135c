"""One layer's experts as they are stored: the tensors, their checksums, and whether they belong together."""

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace

import torch

from ..errors import CheckpointError
from .layout import ExpertsLayout
from .planes import WIDTHS


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
