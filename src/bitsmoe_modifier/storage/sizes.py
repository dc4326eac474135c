"""What a checkpoint weighs: read from the headers of its safetensors files, so from what is stored, not what was meant.

*Bits per expert weight* are 8 × the bytes of everything stored for the experts modules that were quantized (codes,
steps or scales, bases, widths, shapes, checksums, biases) divided by the weights of those same modules. Experts that a
recipe leaves as they are (``ignore``, multi-token prediction), and those that are not in the checkpoint, count neither
above nor below the line. They are told apart in three parts, because a basis that all experts of a layer share costs
a model with many experts per hidden size a tenth of what it costs a model with few.
"""

import json
import math
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from ..errors import CheckpointError
from .kinds import kind_of, part_of
from .layout import ExpertsLayout
from .packed import TENSOR_NAMES
from .shards import Stored, checkpoint_files, packed_modules, scan


@dataclass(frozen=True)
class TensorSize:
    """A tensor as its file's header describes it.

    Attributes:
        dtype: name of the dtype in safetensors' spelling ("BF16").
        shape: its shape.
        nbytes: the bytes it takes in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def tensor_sizes(folder: Path) -> dict[str, TensorSize]:
    """Every tensor of a checkpoint folder.

    Raises:
        CheckpointError: when the folder has no safetensors files, or one of them is damaged.
    """
    files = checkpoint_files(folder)
    scan(map(str, files))  # checks the headers, which are believed from here on
    sizes: dict[str, TensorSize] = {}
    for file in files:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                sizes[name] = TensorSize(entry["dtype"], tuple(entry["shape"]), end - start)
    return sizes


def checkpoint_bytes(folder: Path) -> int:
    """Bytes of the checkpoint's safetensors files."""
    return sum(file.stat().st_size for file in checkpoint_files(folder))


def expert_elements(sizes: dict[str, TensorSize]) -> int:
    """Routed-expert weights of an unquantized checkpoint; biases are not counted."""
    return sum(math.prod(s.shape) for name, s in sizes.items() if is_expert(name) and not name.endswith("bias"))


def expert_bytes(sizes: dict[str, TensorSize]) -> int:
    """Bytes of everything stored for the routed experts."""
    return sum(s.nbytes for name, s in sizes.items() if is_expert(name))


def is_expert(name: str) -> bool:
    """Whether a tensor belongs to the routed experts (``mlp.experts.3.up_proj.weight``; not the shared ones)."""
    return ".experts." in name


def expert_kinds(folder: Path) -> dict[str, int]:
    """Bytes by kind of everything a checkpoint stores for its routed experts."""
    kinds: dict[str, int] = defaultdict(int)
    for name, size in tensor_sizes(folder).items():
        if is_expert(name):
            kinds[kind_of(name.rpartition(".")[2])] += size.nbytes
    return dict(kinds)


@dataclass(frozen=True)
class ExpertBits:
    """Bits per expert weight, in three parts.

    Attributes:
        codes: codes and their scales, experts kept dense, biases.
        bases: the bases that a layer's experts share.
        metadata: bit-widths, headers, shapes, checksums.
    """

    codes: float
    bases: float
    metadata: float

    @classmethod
    def of(cls, kinds: Mapping[str, int], weights: int) -> "ExpertBits":
        """From bytes by kind (`kinds.kind_of`)."""
        parts = {"codes": 0, "bases": 0, "metadata": 0}
        for kind, nbytes in kinds.items():
            parts[part_of(kind)] += nbytes
        return cls(**{part: 8 * nbytes / weights for part, nbytes in parts.items()})

    @property
    def total(self) -> float:
        """Everything stored counted: what a budget is about."""
        return self.codes + self.bases + self.metadata

    def __str__(self) -> str:
        return f"codes and scales {self.codes:.3f}, bases {self.bases:.3f}, metadata {self.metadata:.4f}"


def bits_per_expert_weight(folder: Path) -> ExpertBits:
    """Bits per weight of the routed experts that were quantized; of all, where none was.

    Raises:
        CheckpointError: when the folder has no safetensors files, one of them is damaged, or there are no experts.
    """
    stored = {key: one for key, one in scan(map(str, checkpoint_files(folder))).items() if is_expert(key)}
    sizes = {key: size for key, size in tensor_sizes(folder).items() if is_expert(key)}
    packed = packed_modules(stored)
    weights, kinds = 0, dict[str, int]()

    def count(name: str, parts: Iterable[str]) -> None:
        for leaf in parts:
            kinds[kind_of(leaf)] = kinds.get(kind_of(leaf), 0) + sizes[f"{name}.{leaf}"].nbytes

    for name, parts in packed.items():
        weights += ExpertsLayout.from_tensor(parts["layout"].read()).dense_elements if "layout" in parts else 0
        count(name, parts)
    linears: dict[str, dict[str, Stored]] = defaultdict(dict)
    for key, one in stored.items():
        module, _, leaf = key.rpartition(".")
        if module not in packed and leaf not in TENSOR_NAMES:
            linears[module][leaf] = one
    shapes = _read_all(parts["weight_shape"] for parts in linears.values() if "weight_shape" in parts)
    for name, parts in linears.items():
        quantized = _linear_weights(parts, shapes)
        if quantized:
            weights += quantized
            count(name, parts)
    if not weights:
        weights, kinds = expert_elements(sizes), {"unpacked weights": expert_bytes(sizes)}
    if not weights:
        raise CheckpointError(f"{folder} has no routed experts (no tensor under '.experts.')")
    return ExpertBits.of(kinds, weights)


def _linear_weights(parts: dict[str, Stored], shapes: dict[str, torch.Tensor]) -> int:
    """Weights of a quantized Linear of compressed-tensors; 0 of one that is not quantized."""
    if "weight_shape" in parts:
        return math.prod(shapes[parts["weight_shape"].key].tolist())
    if "weight_packed" in parts:
        packed = parts["weight_packed"]
        return math.prod(packed.shape) * (2 if packed.dtype is torch.uint8 else 1)  # two 4-bit floats in a byte
    return math.prod(parts["weight"].shape) if "weight" in parts and "weight_scale" in parts else 0


def _read_all(tensors: Iterable[Stored]) -> dict[str, torch.Tensor]:
    """Small tensors by key, every file opened once."""
    by_file: dict[str, list[str]] = defaultdict(list)
    for one in tensors:
        by_file[one.file].append(one.key)
    read = {}
    for file, keys in by_file.items():
        with torch.device("cpu"), safe_open(file, "pt") as shard:
            read.update({key: shard.get_tensor(key) for key in keys})
    return read
