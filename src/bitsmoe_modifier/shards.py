"""What the safetensors files of a checkpoint hold, read from their headers alone."""

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open

from .errors import CheckpointError
from .layout import TENSOR_NAMES

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class Stored:
    """A tensor as a safetensors header describes it.

    Attributes:
        file: path of the file that holds it.
        key: its name there.
        dtype: None where torch has no equivalent among the dtypes a bitsmoe checkpoint uses.
        shape: its shape.
    """

    file: str
    key: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]

    def read(self) -> torch.Tensor:
        """The tensor itself, on the CPU."""
        # a loader may run under a meta default device, which would catch the tensor that safetensors creates
        with torch.device("cpu"), safe_open(self.file, "pt") as shard:
            return shard.get_tensor(self.key)


def scan(files: Iterable[str]) -> dict[str, Stored]:
    """The tensors of all files by key.

    Raises:
        CheckpointError: naming the file that is missing, not safetensors, damaged, or repeats another one's tensor.
    """
    found: dict[str, Stored] = {}
    for file in files:
        name = os.path.basename(file)
        if not name.endswith(".safetensors"):
            raise CheckpointError(f"{name}: bitsmoe checkpoints are read from safetensors files only")
        try:
            with safe_open(file, "pt") as shard:
                for key in shard.keys():  # noqa: SIM118 - not a dict
                    part = shard.get_slice(key)
                    if key in found:
                        other = os.path.basename(found[key].file)
                        raise CheckpointError(f"{name}: repeats {key} of {other}; fetch the checkpoint again")
                    found[key] = Stored(file, key, _DTYPES.get(part.get_dtype()), tuple(part.get_shape()))
        except FileNotFoundError:
            raise CheckpointError(f"{name}: the file is missing; fetch the checkpoint again") from None
        except SafetensorError as error:
            raise CheckpointError(
                f"{name}: not a whole safetensors file ({error}); it is damaged or incomplete, fetch it again"
            ) from error
    return found


def packed_modules(found: dict[str, Stored]) -> dict[str, dict[str, Stored]]:
    """Group the tensors of packed experts by module: prefix -> everything stored under it, by the rest of its key.

    A prefix counts when one of its tensors has a name of `TENSOR_NAMES`; what else lies under it is included, so that a
    check can refuse it.
    """
    prefixes = {key.rpartition(".")[0] for key in found if key.rpartition(".")[2] in TENSOR_NAMES}
    modules: dict[str, dict[str, Stored]] = defaultdict(dict)
    for key, stored in found.items():
        for prefix in _ancestors(key):
            if prefix in prefixes:
                modules[prefix][key[len(prefix) + 1 :]] = stored
                break
    return dict(modules)


def file_names(tensors: Iterable[Stored]) -> str:
    """The files that hold the tensors, for messages."""
    return " + ".join(sorted({os.path.basename(stored.file) for stored in tensors}))


def _ancestors(key: str) -> Iterable[str]:
    """``a.b``, ``a`` for ``a.b.c`` (outermost first)."""
    parts = key.split(".")
    return (".".join(parts[:n]) for n in range(1, len(parts)))
