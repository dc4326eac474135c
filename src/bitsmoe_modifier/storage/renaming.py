"""Other names for the tensors of a safetensors file, whose bytes stay where they are."""

import json
import os
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path

_ALIGNMENT = 8


def rename_tensors(file: Path, names: Mapping[str, str]) -> None:
    """Give tensors of a file other names.

    The header alone is written again where the new one is not longer; else the file is copied beside itself first.

    Args:
        file: safetensors.
        names: new name by old one; those that the file does not hold are passed over.
    """
    with file.open("rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(size))
    renamed = {names.get(key, key): entry for key, entry in header.items()}
    if not names.keys() & header.keys():
        return
    content = json.dumps(renamed, separators=(",", ":")).encode()
    content += b" " * (-len(content) % _ALIGNMENT)
    if len(content) <= size:
        with file.open("r+b") as stream:
            stream.seek(8)
            stream.write(content.ljust(size))
        return
    partial = file.with_name(f"{file.name}.partial")
    with file.open("rb") as stream, partial.open("wb") as other:
        stream.seek(8 + size)
        other.write(struct.pack("<Q", len(content)) + content)
        shutil.copyfileobj(stream, other)
    os.replace(partial, file)
