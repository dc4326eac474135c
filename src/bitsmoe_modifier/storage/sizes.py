"""What a checkpoint weighs: read from the headers of its safetensors files, so from what is stored, not what was meant.

*Bits per expert weight* are 8 × the bytes of all tensors stored under ``.experts.`` (codes, steps or scales, bases,
widths, shapes, checksums: everything) divided by the number of expert weights of the unquantized model.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from .shards import checkpoint_files, scan


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
