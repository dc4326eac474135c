"""Files that are there whole or not at all, and how two records of the same kind differ."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def write_text(path: Path, text: str) -> None:
    """Write a text file; a reader never sees half of it, not even after a power cut."""
    _write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file in the same way; the tensors may be on any device."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _write(path, lambda temporary: save_file(plain, temporary, metadata=dict(metadata)))


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Write under a temporary name, wait for the disk, then rename."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        write(temporary)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except Exception:
        temporary.unlink(missing_ok=True)  # half a file only takes the room that is missing
        raise


def differences(old: Any, new: Any, at: str = "") -> list[str]:
    """Where two JSON values differ, as ``calibration.samples: 128, now 64``."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted({*old, *new})
            for line in differences(old.get(key), new.get(key), f"{at}.{key}" if at else key)
        ]
    return [] if old == new else [f"{at}: {old}, now {new}"]
