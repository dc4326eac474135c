"""Which files a checkpoint has, and what they hold, read from their headers alone.

Nothing here believes a file: names that lead out of the checkpoint's folder are refused, and no size is used before it
was compared with the bytes that are there.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from .layout import ExpertsLayout
from .packed import TENSOR_NAMES, check_structure

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
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


#: the tensors of a layer that say how large the others are
_HEADERS = ("layout", "widths_in", "widths_out")

#: beginnings of names of safetensors files that may lie beside a model and are none of its
_BESIDE = ("adapter_model", "consolidated")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """A tensor as a safetensors header describes it.

    Attributes:
        file: path of the file that holds it.
        key: its name there.
        dtype: None where torch has no equivalent.
        shape: its shape.
    """

    file: str
    key: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]

    def read(self, row: int | None = None) -> torch.Tensor:
        """The tensor itself, on the CPU; or one row of its first dimension alone, of which the others are not read."""
        # a loader may run under a meta default device, which would catch the tensor that safetensors creates
        with torch.device("cpu"), safe_open(self.file, "pt") as shard:
            return shard.get_tensor(self.key) if row is None else shard.get_slice(self.key)[row]


def stored_of(file: str, key: str, dtype: str, shape: tuple[int, ...]) -> Stored:
    """A tensor by what a header says of it, its dtype in safetensors' spelling ("BF16")."""
    return Stored(file, key, _DTYPES.get(dtype), shape)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint.

    Raises:
        CheckpointError: when the file is missing, no JSON, nested without end, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}; give the folder of a saved model") from None
    except (OSError, ValueError, RecursionError) as error:
        problem = str(error)[:200]
        raise CheckpointError(f"{path} is not JSON ({problem}); fetch the checkpoint again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no settings; fetch the checkpoint again")
    return content


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder: those that its index names, or all there are.

    An adapter beside model.safetensors, or a consolidated copy of it, is no part of the model.

    Links that a download made inside the folder are followed.

    Raises:
        CheckpointError: when there are none, the index is damaged, or it names a file that is missing, elsewhere, or
            of another kind.
    """
    single, index = folder / _SINGLE, folder / _INDEX
    named = _shards_of(index) if index.exists() else []
    beside = single.is_file() and single not in named
    if beside and any(file.is_file() for file in named):
        raise CheckpointError(
            f"{folder} holds two checkpoints, {_SINGLE} and the files that {_INDEX} names; transformers reads the "
            "first, vLLM the others: delete the one that is not meant"
        )
    if not named or beside:  # an index that is left of a checkpoint in several files, which are gone
        files = sorted(folder.glob("*.safetensors"))
        if single in files:
            files = [file for file in files if not file.name.startswith(_BESIDE)]
        if not files:
            raise CheckpointError(f"{folder} has no safetensors files; it is not a checkpoint, or of an older kind")
        return files
    for file in named:
        if not file.is_file():
            raise CheckpointError(f"{file}: named by the index but missing; fetch the checkpoint again")
    return named


def drop_older(folder: Path) -> None:
    """Of a folder into which a checkpoint was saved twice, delete what is left of the older one.

    A single file and an index with its files do not replace each other, and transformers reads the single file of both.
    It deletes the older files of an index itself.
    """
    single, index = folder / _SINGLE, folder / _INDEX
    if single.is_file() and index.is_file() and single not in _shards_of(index):
        min(single, index, key=lambda file: file.stat().st_mtime_ns).unlink()


def _shards_of(index: Path) -> list[Path]:
    """The files that an index names, whether they are there or not.

    Raises:
        CheckpointError: when it is damaged, or names what is elsewhere or of another kind.
    """
    folder = index.parent
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index}: weight_map does not say which file holds which tensor; fetch it again")
    root = os.path.join(os.path.abspath(folder), "")
    found = [folder / name for name in sorted(set(names.values()))]
    for file in found:
        if not os.path.abspath(file).startswith(root) or file.suffix != ".safetensors" or "\0" in str(file):
            raise CheckpointError(
                f"{index}: names {str(file)!r}, not a safetensors file in this folder; do not use this checkpoint"
            )
    return found


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
                    found[key] = stored_of(file, key, part.get_dtype(), tuple(part.get_shape()))
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


def read_structure(
    stored: dict[str, Stored], where: str
) -> tuple[ExpertsLayout, dict[str, torch.Tensor | tuple[torch.dtype, tuple[int, ...]]]]:
    """Read a layer's header and widths, and check the sizes of its other tensors against them.

    Returns:
        the layout; by name the tensors that were read, and (dtype, shape) of those that were not.

    Raises:
        CheckpointError: naming files, module and tensor.
    """
    where = f"{file_names(stored.values())}: {where}"
    tensors: dict[str, torch.Tensor | tuple[torch.dtype, tuple[int, ...]]] = {}
    for leaf, part in stored.items():
        if part.dtype is None:
            raise CheckpointError(f"{where}.{leaf}: unknown dtype; the checkpoint was written by something else")
        tensors[leaf] = part.read() if leaf in _HEADERS else (part.dtype, part.shape)
    with torch.device("cpu"):
        return check_structure(tensors, where), tensors


def file_names(tensors: Iterable[Stored]) -> str:
    """The files that hold the tensors, for messages."""
    return " + ".join(sorted({os.path.basename(stored.file) for stored in tensors}))


def _ancestors(key: str) -> Iterable[str]:
    """``a.b``, ``a`` for ``a.b.c`` (outermost first)."""
    parts = key.split(".")
    return (".".join(parts[:n]) for n in range(1, len(parts)))
