"""Where every tensor of a source goes: into the model, or beside it.

transformers leaves out what its class of a model does not have, without a word: layers for multi-token prediction
(``mtp.*``, layers beyond the last, ``nextn``) above all, while config.json goes on counting them. An `Inventory` of the
source, taken before anything is changed, knows those tensors; they are copied to the result bit for bit, and what else
would be missing there is an error.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..errors import CheckpointError
from ..sources.decoded import Decoded
from ..sources.precision import source_tensors
from ..sources.published import keep_config
from ..sources.stacks import StoredStack, stored_parameters
from ..storage.mtp import COUNTS, decoder_layers, is_mtp
from ..storage.shards import Stored, checkpoint_files, read_json, scan
from .claims import METHOD, is_packed, split_groups
from .decoding import family_key
from .format import targets_of
from .keeping import add_groups
from .transformers_api import WeightConverter, WeightRenaming, get_model_conversion_mapping, rename_source_key

#: bytes of a file of tensors that are copied; they pass through memory
_SHARD_BYTES = 4 * 10**9
_INDEX = "model.safetensors.index.json"
#: file into which llm-compressor copies layers for multi-token prediction, and what it has config.json say of them
_COPIES, _MTP_IGNORED = "model_mtp.safetensors", "re:^mtp.*"


@dataclass(frozen=True)
class Inventory:
    """The tensors of a source.

    Attributes:
        folder: of the source.
        loaded: by their keys in the files, the names of the model's tensors that they go into.
        beside: those that the model's class does not have, by key.
        mtp: keys of those among them that belong to multi-token prediction.
    """

    folder: Path
    loaded: dict[str, str]
    beside: dict[str, Stored]
    mtp: frozenset[str]


@dataclass(frozen=True)
class Instead:
    """Tensors that stand in for some that are beside the model.

    Attributes:
        keys: what they stand in for.
        tensors: by name, on the CPU.
        experts: the experts module that they are, where they are packed; "" where they are not.
    """

    keys: frozenset[str]
    tensors: dict[str, torch.Tensor]
    experts: str = ""


@dataclass(frozen=True)
class Kept:
    """What became of the tensors beside the model.

    Attributes:
        kept, dropped: their keys.
        packed: experts modules of theirs that were packed.
    """

    kept: tuple[str, ...]
    dropped: tuple[str, ...]
    packed: tuple[str, ...] = ()

    def sentences(self) -> list[str]:
        """For the terminal and the model card; none where there was nothing beside the model."""
        said = []
        for keys, what in ((self.kept, "kept as they were, bit for bit"), (self.dropped, "dropped, as asked")):
            if keys:
                shown = ", ".join(keys[:2]) + (", …" if len(keys) > 2 else "")
                said.append(f"{len(keys)} tensors that transformers does not load were {what} ({shown})")
        if self.packed:
            said.append(f"experts for multi-token prediction were packed: {', '.join(self.packed)}")
        return said


def take_inventory(model: Any, folder: Path) -> Inventory:
    """Compare a source's files with the model that was loaded from them.

    Args:
        model: of transformers, as loaded, nothing replaced.
        folder: of the source.

    Raises:
        CheckpointError: when the files are damaged.
    """
    found = {family_key(key): stored for key, stored in source_tensors(folder).items()}
    expected = {**model.state_dict(), **_stacks(model)}
    names = _model_names(model, found, expected)
    layers = decoder_layers(folder)
    beside = {key: stored for key, stored in found.items() if names[key] not in expected}
    return Inventory(
        folder=Path(folder),
        loaded={key: name for key, name in names.items() if key not in beside},
        beside=beside,
        mtp=frozenset(key for key in beside if is_mtp(key, layers)),
    )


def _stacks(model: Any) -> dict[str, StoredStack]:
    """Experts' tensors that a model reads from the source's files, by the names that they have in the model."""
    return {
        f"{prefix}.{name}": stack
        for prefix, module in model.named_modules()
        for name, stack in stored_parameters(module).items()
    }


def model_names(model: Any, keys: Iterable[str], expected: dict[str, Any]) -> dict[str, tuple[str, bool]]:
    """The model's names of stored tensors, by transformers' own conversion, and whether it converts them otherwise too.

    Args:
        model: of transformers.
        keys: in the files.
        expected: the model's tensors by name.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    names = {}
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, expected)
        names[key] = (key if name not in expected and key in expected else name, pattern is not None)
    return names


def _model_names(model: Any, keys: Iterable[str], expected: dict[str, Any]) -> dict[str, str]:
    return {key: name for key, (name, _) in model_names(model, keys, expected).items()}


def keep_beside(
    inventory: Inventory, target: Path, mtp: str = "keep", as_stored: bool = True, instead: Sequence[Instead] = ()
) -> Kept:
    """Copy what is beside the model to a checkpoint that was made of it, and the source's config.json (`keep_config`).

    Args:
        inventory: of the source.
        target: folder with the checkpoint's files, which may hold some of the tensors already.
        mtp: "keep", or "drop" for layers of multi-token prediction, which config.json then counts no longer.
        as_stored: whether what the source has in low precision stays so, with a config group for it.
        instead: what stands in for some of it.
    """
    keep_config(inventory.folder, target)
    _take_back_copies(target)
    there = scan(map(str, checkpoint_files(target)))
    dropped = inventory.mtp if mtp == "drop" else frozenset()
    replaced = frozenset(key for one in instead for key in one.keys)
    copied = {k: s for k, s in inventory.beside.items() if k not in dropped and k not in there and k not in replaced}
    files = {key: Path(stored.file).name for key, stored in there.items()}
    decoded = {key: s.as_stored for key, s in copied.items() if isinstance(s, Decoded)}
    low = {key: kept for key, kept in decoded.items() if as_stored and kept is not None}
    for number, keys in enumerate(_shards(copied)):
        name = f"beside-{number:05d}.safetensors"
        tensors = {}
        for key in keys:
            prefix, kept = key.removesuffix("weight"), low.get(key)
            read = {key: copied[key].read()} if kept is None else {prefix + k: t for k, t in kept.read().items()}
            tensors.update(read)
        save_file(tensors, target / name, {"format": "pt"})
        files.update(dict.fromkeys(tensors, name))
    for number, one in enumerate(instead):
        name = f"mtp-{number:05d}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in one.tensors.items()}, target / name, {"format": "pt"})
        files.update(dict.fromkeys(one.tensors, name))
    packed = tuple(one.experts for one in instead if one.experts)
    if copied or instead:
        write_index(target, files)
    if packed:
        _declare_packed(target / "config.json", packed)
    add_groups(target / "config.json", {key.removesuffix(".weight"): one for key, one in low.items()})
    plain = [key for key in copied if key in inventory.mtp]
    if not any(key in inventory.mtp for key in low):
        _ignore_mtp(target / "config.json", plain)
    if dropped:
        _forget_mtp(target / "config.json")
    return Kept(tuple(sorted(inventory.beside.keys() - dropped - replaced)), tuple(sorted(dropped)), packed)


def check_nothing_lost(inventory: Inventory, model: Any, target: Path) -> None:
    """Check that every tensor of the source is in the checkpoint: itself, or what its module was packed to.

    Args:
        inventory: of the source.
        model: that was saved.
        target: folder with the checkpoint's files.

    Raises:
        CheckpointError: naming what is missing.
    """
    there = scan(map(str, checkpoint_files(target)))
    names = {*there, *_model_names(model, there, model.state_dict()).values()}
    modules = {".".join(parts[:n]) for name in names for parts in [name.split(".")] for n in range(1, len(parts))}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    packed = [name for name, one in model.named_modules() if getattr(one, "quantization_scheme", None) is not None]
    replaced = (*(f"{name}." for name in packed), *(f"{name}." for name in _experts(model)))
    lost = [
        key
        for key, name in inventory.loaded.items()
        if key not in there
        and name not in names
        and name not in tied
        and not (name.startswith(replaced) and name.rpartition(".")[0] in modules)
    ]
    kept = {*there, *(key.removesuffix("_packed") for key in there)}
    lost += [key for key in inventory.beside if key not in kept and key not in inventory.mtp]
    if lost:
        raise CheckpointError(
            f"{len(lost)} tensors of the source would be missing from the checkpoint ({', '.join(sorted(lost)[:3])}); "
            "this is an error of the library that saves this family, please report it"
        )


def _experts(model: Any) -> list[str]:
    """Names of modules of routed experts in whatever form they are in."""
    return [name for name, _ in model.named_modules() if name.endswith("experts")]


def _shards(tensors: Mapping[str, Stored]) -> list[list[str]]:
    shards: list[list[str]] = []
    room = 0
    for key, stored in tensors.items():
        size = math.prod(stored.shape) * (stored.dtype.itemsize if stored.dtype else 1)
        if not shards or size > room:
            shards.append([])
            room = _SHARD_BYTES
        shards[-1].append(key)
        room -= size
    return shards


def write_index(target: Path, files: Mapping[str, str]) -> None:
    """Write the index of a checkpoint's files: name of the file by tensor."""
    total = sum((target / name).stat().st_size for name in set(files.values()))
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
    (target / _INDEX).write_text(json.dumps(content, indent=2), encoding="utf-8")


def _declare_packed(path: Path, names: Iterable[str]) -> None:
    """Add experts modules to the config group of the packed ones, unless its targets match them already."""
    content = read_json(path)
    groups = content["quantization_config"]["config_groups"].values()
    group = next(group for group in groups if group.get("format") == METHOD)
    missing = [name for name in names if not is_packed(name, group["targets"])]
    group["targets"] += targets_of(missing)
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _take_back_copies(target: Path) -> None:
    """Remove what llm-compressor copied of ``mtp.*``, by the source's names and in its precision, and said about it.

    It does so for configs that count such layers as Qwen3.5's does, whatever is to become of them.
    """
    if not (target / _COPIES).is_file():
        return
    files = read_json(target / _INDEX)["weight_map"]
    write_index(target, {key: file for key, file in files.items() if file != _COPIES})
    (target / _COPIES).unlink()  # after the index, which never names a file that is gone
    content = read_json(target / "config.json")
    quantization = content.get("quantization_config") or {}
    if _MTP_IGNORED in (quantization.get("ignore") or ()):
        quantization["ignore"].remove(_MTP_IGNORED)
        (target / "config.json").write_text(json.dumps(content, indent=2), encoding="utf-8")


def _ignore_mtp(path: Path, keys: Iterable[str]) -> None:
    """Say in config.json that the Linears of MTP layers are not quantized, where groups beside ours may match them."""
    content = read_json(path)
    quantization = content.get("quantization_config") or {}
    if not split_groups(quantization)[1]:
        return
    ignored = quantization["ignore"] = list(quantization.get("ignore") or ())
    for key in sorted(keys):
        numbered = re.match(r"(?:.*[.])?layers[.](\d+)[.]", key)
        if key.startswith("mtp."):
            pattern = _MTP_IGNORED
        elif numbered and not is_mtp(key, None):
            pattern = rf"re:(?:.*\.)?layers\.{numbered[1]}\..*"
        else:
            continue
        if pattern not in ignored:
            ignored.append(pattern)
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _forget_mtp(path: Path) -> None:
    """Set the counts of MTP layers in a config.json to zero, those of the configs inside it too."""
    content = read_json(path)
    for config in (content, *(part for part in content.values() if isinstance(part, dict))):
        config.update({name: 0 for name in COUNTS if config.get(name)})
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
