"""Which model a checkpoint was made from, by its own record: so that it is measured against that one and no other."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from ..errors import BitsMoEError, CheckpointError
from ..storage.shards import checkpoint_files, read_json, scan
from .demo import demo_asset

#: in a checkpoint's folder: what it was made of, and what was noted about every layer; `bitsmoe inspect` shows it
REPORT_NAME = "bitsmoe_report.json"
#: bytes of each end of a tensor that its digest is of: whatever was trained differs there
_ENDS = 4096
#: settings that tell models apart where a checkpoint has no record
_TELLING = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "moe_intermediate_size")
_DEMO = "docmoe"


def source_record(folder: Path, name: str | None = None) -> dict[str, str]:
    """The record of a model that a checkpoint is made from.

    Args:
        folder: of the model.
        name: as the user gave it. A path is cut to its last part: it means nothing elsewhere, and may tell too much.

    Returns:
        ``name``, and ``weights``: their digest. Of what was exported from a checkpoint, that checkpoint's own record.
    """
    return read_source(folder) or {"name": _portable(name or str(folder)), "weights": weights_digest(folder)}


def weights_digest(folder: Path) -> str:
    """A digest of a checkpoint's tensors: names, dtypes, shapes, and both ends of each one's bytes.

    It is the same however the tensors are dealt out to files, and takes a few kilobytes of reading per tensor.
    """
    files = checkpoint_files(folder)
    scan(map(str, files))  # checks the headers, which are believed from here on
    found = {}
    for file in files:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                start, end = entry["data_offsets"]
                stream.seek(8 + length + start)
                head = stream.read(min(_ENDS, end - start))
                stream.seek(8 + length + max(start, end - _ENDS))
                tail = stream.read(min(_ENDS, end - start))
                digest = hashlib.sha256(f"{entry['dtype']}{entry['shape']}".encode() + head + tail)
                found[name] = digest.hexdigest()
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def read_source(checkpoint: Path) -> dict[str, str]:
    """A checkpoint's `source_record`; {} where it has none."""
    path = checkpoint / REPORT_NAME
    found = read_json(path).get("source") if path.exists() else None
    return found if isinstance(found, dict) and {"name", "weights"} <= found.keys() else {}


def read_prediction(checkpoint: Path) -> dict[str, list[float]] | None:
    """The KL divergence in nats (``kld``) that the checkpoint's survey expected of sizes (``bits``, rising)."""
    path = checkpoint / REPORT_NAME
    found = read_json(path).get("prediction") if path.exists() else None
    return found if isinstance(found, dict) else None


def is_of_the_demo(checkpoint: str) -> bool:
    """Whether a folder's record names the embedded demo model."""
    return Path(checkpoint).is_dir() and read_source(Path(checkpoint)).get("name") == _DEMO


def source_of(checkpoint: Path) -> str:
    """The model to measure a checkpoint against where the user names none.

    Raises:
        BitsMoEError: when the checkpoint does not say, or says the name of a folder that is not here.
    """
    record = read_source(checkpoint)
    if not record:
        raise BitsMoEError(f"{checkpoint} does not say what it was made from; give the unquantized model by --model")
    name = record["name"]
    if "/" in name:
        return name
    candidates = [checkpoint.resolve().parent / name, Path(name)]
    if name == _DEMO:
        candidates.append(Path(demo_asset(_DEMO)))
    for folder in candidates:
        if (folder / "config.json").exists() and weights_digest(folder) == record["weights"]:
            return str(folder)
    raise BitsMoEError(f"{checkpoint} was made from a folder {name}, which is not here; say where by --model")


def check_source(checkpoint: Path, model: str, folder: Path) -> None:
    """Refuse a model that a checkpoint was not made from.

    Args:
        checkpoint: folder of the quantized model.
        model: as the user named the unquantized one.
        folder: its folder.

    Raises:
        CheckpointError: naming both models.
    """
    record = read_source(checkpoint)
    if record and read_source(folder) == record:
        return  # one was exported from the other, or both from the same checkpoint
    if record:
        digest = weights_digest(folder)
        if digest != record["weights"]:
            raise CheckpointError(
                f"{checkpoint} was made from {record['name']} (weights {record['weights'][:12]}), and {model} is "
                f"another model (weights {digest[:12]}); give that one by --model, or measure by --any-model anyway"
            )
        return
    one, two = (_settings(read_json(path / "config.json")) for path in (checkpoint, folder))
    different = [f"{key} {one[key]} and {two[key]}" for key in _TELLING if one[key] != two[key]]
    if different:
        raise CheckpointError(f"{checkpoint} was not made from {model}: {', '.join(different)}; give the right --model")


def check_predictions(checkpoint: Path, model: str, folder: Path) -> None:
    """Refuse two models whose predictions cannot be compared at all.

    Raises:
        CheckpointError: naming the sizes of their vocabularies.
    """
    one, two = (_settings(read_json(path / "config.json"))["vocab_size"] for path in (checkpoint, folder))
    if one != two:
        raise CheckpointError(f"{checkpoint} predicts {one} tokens, {model} {two}: they cannot be compared")


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    text = config.get("text_config")
    nested = text if isinstance(text, dict) else {}
    return {key: nested.get(key, config.get(key)) for key in _TELLING}


def _portable(name: str) -> str:
    path = Path(name)
    if not path.exists() and name.count("/") <= 1:
        return name  # of the hub
    path = path.resolve()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.name
