"""What a quantization's result depends on, as a JSON record: model, recipe, calibration rows, versions, machine."""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from compressed_tensors.offload import disable_offloading
from torch import nn

from .. import __version__
from ..sources.stacks import stored_parameters

_PACKAGES = ("torch", "transformers", "llmcompressor", "compressed-tensors", "numpy", "scipy")


def fingerprint(
    model: Any, modifiers: Mapping[str, Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The record, in JSON types.

    Args:
        model: with the weights that it starts from.
        modifiers: fields of every modifier that works on the model.
        rows: `rows_digest` of every process.
    """
    config = json.loads(model.config.to_json_string(use_diff=False))
    record = {
        "model": {"class": type(model).__name__, "config": _without_origin(config), "weights": weight_digests(model)},
        "recipe": modifiers,
        "calibration": rows[0] if len(rows) == 1 else {f"rank {n}": digest for n, digest in enumerate(rows)},
        "versions": versions(),
        "machine": machine(),
    }
    return json.loads(json.dumps(record, default=str))


def _without_origin(config: Any) -> Any:
    """A configuration without the folder it was loaded from, and without what it says about itself."""
    if not isinstance(config, dict):
        return config
    return {k: _without_origin(v) for k, v in config.items() if k not in ("_name_or_path", "transformers_version")}


def versions() -> dict[str, str]:
    """Versions of this package and of those that its results depend on."""
    return {"bitsmoe-modifier": __version__, **{name: version(name) for name in _PACKAGES}}


def machine() -> dict[str, Any]:
    """What decides the order of float sums: the accelerator, or the CPU's instructions and the number of threads."""
    if torch.cuda.is_available():
        return {"device": torch.cuda.get_device_name()}
    return {"device": f"cpu {torch.backends.cpu.get_cpu_capability()}", "threads": torch.get_num_threads()}


def rows_digest(batches: Iterable[Any]) -> dict[str, Any]:
    """Number of batches and tokens, and a digest of their contents and shapes."""
    digest, count, tokens = hashlib.sha256(), 0, 0
    for batch in batches:
        count += 1
        for key in sorted(batch):
            value = batch[key]
            digest.update(key.encode())
            if isinstance(value, torch.Tensor):
                _update(digest, value)
                tokens += value.numel() if key == "input_ids" else 0
            else:
                digest.update(repr(value).encode())
    return {"batches": count, "tokens": tokens, "sha256": digest.hexdigest()}


def weight_digests(model: nn.Module) -> dict[str, str]:
    """Digest of the parameters and buffers of every numbered block of the model, and of every module outside of them;
    of experts that stay in files, of what is stored.

    Every byte is read once, one module at a time, so offloaded models are welcome.
    """
    from .stored_experts import stored_matrices  # needs llm-compressor, which records of runs do not

    digests: dict[str, Any] = defaultdict(hashlib.sha256)
    for name, module in model.named_modules():
        stored = stored_matrices(module)
        stacks = stored_parameters(module) if stored is None else stored.stacks
        numbered = re.match(r"(?:[^.]+\.)*?\d+(?=\.|$)", name)
        digest = digests[numbered[0] if numbered else name]
        with disable_offloading():
            for leaf, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                digest.update(f"{name}.{leaf}".encode())
                _update(digest, tensor)
        for leaf, stack in stacks.items():
            for one in stack.stored():
                digest.update(f"{name}.{leaf} {one.key}".encode())
                _update(digest, one.read())
    empty = hashlib.sha256().hexdigest()
    return {name: found for name, digest in digests.items() if (found := digest.hexdigest()) != empty}


def _update(digest: Any, tensor: torch.Tensor) -> None:
    """Add dtype, shape and bytes of a tensor."""
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
