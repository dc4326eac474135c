"""Damage to a checkpoint folder, by chance or by design; every mutation is a function of a seeded generator.

Three kinds: bytes of a file (transport and disk), tensors and headers that a forger wrote with checksums that fit, and
settings in the JSON files. `mutate` applies one to three of them.
"""

import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bitsmoe_modifier.storage.packed import TENSOR_NAMES, PackedExperts

Mutation = Callable[[random.Random, Path], None]

#: values that no setting expects. Numbers of layers stay small: transformers builds every layer before it asks the
#: quantizer, and a loop over 2**31 layers is not ours to stop.
_HOSTILE: tuple[Any, ...] = (
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    7,
    2**15,
    2**31 - 1,
    2**31,
    2**63,
    -(2**63),
    0.5,
    -1.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "re:",
    "re:(",
    "re:.*",
    "../../../etc/passwd",
    "/etc/passwd",
    "file:///etc/passwd",
    "\x00",
    "ü" * 300,
    "dense",
    "bitsmoe",
    "float-quantized",
    "__import__('os').system('false')",
    "torch.load",
    [],
    [[]],
    [None, -1],
    {},
    {"a": {"b": []}},
)
_INTEGERS = (-(2**31), -1, 0, 1, 2, 3, 5, 7, 8, 12, 16, 24, 48, 64, 128, 255, 256, 2**15, 2**24, 2**30, 2**31 - 1)
#: settings that decide how many modules transformers builds
_LOOPS = ("num_hidden_layers", "num_layers", "n_layers", "layer_types", "num_local_experts", "num_experts")


def mutate(seed: int, folder: Path) -> str:
    """Damage the checkpoint in ``folder``; the names of what was done."""
    rng = random.Random(seed)
    chosen = [rng.choice(MUTATIONS) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    done = []
    for mutation in chosen:
        try:
            mutation(rng, folder)
        except _Impossible:
            continue
        done.append(mutation.__name__.strip("_"))
    return ", ".join(done)


class _Impossible(Exception):
    """An earlier mutation left nothing that this one could damage."""


def _shard(rng: random.Random, folder: Path) -> Path:
    files = [file for file in sorted(folder.glob("*.safetensors")) if file.stat().st_size]
    if not files:
        raise _Impossible
    return rng.choice(files)


# ---------------------------------------------------------------------------------------------------------- bytes


def _place(rng: random.Random, data: bytearray) -> int:
    """A byte, in the length and the header as often as in the tensors."""
    (header,) = struct.unpack("<Q", data[:8].ljust(8, b"\0"))
    end = min(len(data), 8 + header)
    return rng.choice((rng.randrange(min(8, len(data))), rng.randrange(end), rng.randrange(len(data))))


def _flip_bits(rng: random.Random, folder: Path) -> None:
    file = _shard(rng, folder)
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 1, 2, 16))):
        data[_place(rng, data)] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def _truncate(rng: random.Random, folder: Path) -> None:
    file = _shard(rng, folder)
    data = bytearray(file.read_bytes())
    file.write_bytes(data[: rng.choice((0, 1, 7, 8, 9, _place(rng, data), len(data) - 1))])


def _extend(rng: random.Random, folder: Path) -> None:
    file = _shard(rng, folder)
    file.write_bytes(file.read_bytes() + rng.randbytes(rng.choice((1, 8, 4096))))


def _splice(rng: random.Random, folder: Path) -> None:
    """Exchange, drop, repeat or blank a run of bytes."""
    file = _shard(rng, folder)
    data = bytearray(file.read_bytes())
    at, other, size = _place(rng, data), _place(rng, data), rng.choice((1, 4, 64, 1024))
    what = rng.randrange(4)
    if what == 0:
        data[at : at + size], data[other : other + size] = data[other : other + size], data[at : at + size]
    elif what == 1:
        del data[at : at + size]
    elif what == 2:
        data[at:at] = data[other : other + size]
    else:
        data[at : at + size] = bytes(min(size, len(data) - at))
    file.write_bytes(data)


def _header_length(rng: random.Random, folder: Path) -> None:
    file = _shard(rng, folder)
    data = bytearray(file.read_bytes())
    length = rng.choice((0, 1, 2**16, 10**8, 10**8 + 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1))
    file.write_bytes(struct.pack("<Q", length) + data[8:])


# --------------------------------------------------------------------------------------------- headers and tensors


def _split(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    try:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
    except (struct.error, ValueError, OverflowError, MemoryError, RecursionError):
        raise _Impossible from None
    if not isinstance(header, dict) or not all(isinstance(v, dict) for v in header.values()):
        raise _Impossible
    return header, data[8 + length :]


def _header_entry(rng: random.Random, folder: Path) -> None:
    """Rewrite one tensor's description: dtype, shape, place, or name."""
    file = _shard(rng, folder)
    header, payload = _split(file)
    names = [name for name in header if name != "__metadata__" and "shape" in header[name]]
    if not names:
        raise _Impossible
    name = rng.choice(names)
    entry = header[name]
    what = rng.randrange(6)
    if what == 0:
        entry["dtype"] = rng.choice(
            ("F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F4", "U64", "?")
        )
    elif what == 1:
        entry["shape"] = rng.choice(
            ([], [0], [-1], [2**62, 4], [2**32, 2**32], [1, *entry["shape"]], entry["shape"][::-1])
        )
    elif what == 2:
        entry["data_offsets"] = [rng.choice((0, 1, -1, 2**40, 2**63)), rng.choice((0, 8, len(payload), 2**40, 2**64))]
    elif what == 3:
        entry[rng.choice(("dtype", "shape", "data_offsets"))] = rng.choice(_HOSTILE)
    elif what == 4:
        header[rng.choice(("../" + name, name + ".0", "a" * 5000, "", "\u0000", name.upper()))] = header.pop(name)
    else:
        other = rng.choice(names)
        header[name], header[other] = header[other], header[name]
    _join(file, header, payload)


def _metadata(rng: random.Random, folder: Path) -> None:
    file = _shard(rng, folder)
    header, payload = _split(file)
    header["__metadata__"] = rng.choice(
        ({"format": "flax"}, {}, {"format": 3}, {"a": "b" * 10000}, rng.choice(_HOSTILE))
    )
    _join(file, header, payload)


def _join(file: Path, header: dict[str, Any], payload: bytes) -> None:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + payload)


def _loaded(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except Exception:  # noqa: BLE001 - whatever an earlier mutation did to it
        raise _Impossible from None


def _packed_leaves(tensors: dict[str, torch.Tensor]) -> list[str]:
    return [key for key in sorted(tensors) if key.rpartition(".")[2] in TENSOR_NAMES]


def _forge_values(rng: random.Random, folder: Path) -> None:
    """Change a stored tensor of packed experts, mostly with checksums that fit."""
    file = _shard(rng, folder)
    tensors = _loaded(file)
    keys = [key for key in _packed_leaves(tensors) if tensors[key].numel()]
    if not keys:
        raise _Impossible
    key = rng.choice(
        (*keys, *(k for k in keys if k.endswith((".layout", "widths_in", "widths_out")) for _ in range(6)))
    )
    tensor = tensors[key].clone()
    flat = tensor.view(-1)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(min(len(flat), rng.choice((16, len(flat)))))
        if tensor.is_floating_point():
            flat[at] = rng.choice((float("nan"), float("inf"), -1.0, 0.0, 6e-8, 65504.0))
        else:
            info = torch.iinfo(tensor.dtype)
            value = rng.choice((*_INTEGERS, int(flat[at]) ^ 1, int(flat[at]) * 2))
            flat[at] = max(info.min, min(info.max, value))
    tensors[key] = tensor
    _save(rng, file, tensors)


def _forge_shapes(rng: random.Random, folder: Path) -> None:
    """Cut, grow, cast, drop, exchange or add a tensor, mostly with checksums that fit."""
    file = _shard(rng, folder)
    tensors = _loaded(file)
    keys = sorted(tensors)
    packed = _packed_leaves(tensors)
    key = rng.choice(packed) if packed and rng.random() < 0.7 else rng.choice(keys)
    tensor, what = tensors[key], rng.randrange(8)
    if what == 0:
        tensors[key] = tensor[: rng.randrange(len(tensor) + 1)] if tensor.ndim else tensor[None]
    elif what == 1:
        tensors[key] = torch.cat([tensor, tensor]) if tensor.ndim else tensor[None]
    elif what == 2:
        kinds = (torch.float64, torch.float32, torch.float16, torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn)
        tensors[key] = tensor.to(rng.choice(kinds))
    elif what == 3:
        del tensors[key]
    elif what == 4:
        other = rng.choice(keys)
        tensors[key], tensors[other] = tensors[other], tensor
    elif what == 5:
        parent = key.rpartition(".")[0]
        tensors[f"{parent}.{rng.choice((*TENSOR_NAMES, 'weight', '0.gate_proj.weight'))}"] = torch.zeros(4)
    elif what == 6:
        tensors[key] = tensor.reshape(-1)
    else:
        tensors[key.replace("layers.0", "layers.9").replace("layers.1", "layers.0")] = tensors.pop(key)
    _save(rng, file, tensors)


def _swap_layers(rng: random.Random, folder: Path) -> None:
    """Exchange one tensor, or all, of two layers."""
    file = _shard(rng, folder)
    tensors = _loaded(file)
    leaf = rng.choice((*TENSOR_NAMES, "", "weight"))
    swapped = {}
    for key, tensor in tensors.items():
        other = (
            key.replace("layers.0.", "layers.@.").replace("layers.1.", "layers.0.").replace("layers.@.", "layers.1.")
        )
        swapped[other if key.endswith(leaf) and other in tensors else key] = tensor
    _save(rng, file, swapped, seal=rng.random() < 0.3)


def _save(rng: random.Random, file: Path, tensors: dict[str, torch.Tensor], seal: bool | None = None) -> None:
    if rng.random() < 0.8 if seal is None else seal:
        for prefix in {key.rpartition(".")[0] for key in tensors if key.endswith(".checksums")}:
            parts = {leaf: tensors[f"{prefix}.{leaf}"] for leaf in TENSOR_NAMES if f"{prefix}.{leaf}" in tensors}
            if {"layout", "widths_in", "widths_out", "codes_in", "codes_out", "steps_in", "steps_out"} <= parts.keys():
                tensors[f"{prefix}.checksums"] = PackedExperts(**parts).sealed().checksums
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, file, metadata={"format": "pt"})


# ------------------------------------------------------------------------------------------------------- settings


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from _places(child, (*path, key))


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (ValueError, OSError, RecursionError):
        raise _Impossible from None


def _change_setting(rng: random.Random, folder: Path) -> None:
    """One value somewhere in config.json."""
    file = folder / "config.json"
    config = _read_json(file)
    if not isinstance(config, dict):
        raise _Impossible
    paths = [p for p in _places(config) if p[0] not in _LOOPS]
    if not paths:
        raise _Impossible
    ours = [p for p in paths if p[0] == "quantization_config"]
    path = rng.choice(rng.choice((ours or paths, paths)))
    parent = config
    for key in path[:-1]:
        parent = parent[key]
    if rng.random() < 0.15:
        del parent[path[-1]]
    elif isinstance(parent[path[-1]], int) and rng.random() < 0.5:
        parent[path[-1]] = rng.choice(_INTEGERS)
    else:
        parent[path[-1]] = rng.choice(_HOSTILE)
    file.write_text(json.dumps(config))


def _add_setting(rng: random.Random, folder: Path) -> None:
    """A setting that makes readers look elsewhere, or run something."""
    file = folder / "config.json"
    config = _read_json(file)
    if not isinstance(config, dict):
        raise _Impossible
    name = rng.choice(
        ("auto_map", "transformers_weights", "adapter_path", "base_model_name_or_path", "_name_or_path", "torch_dtype")
    )
    values = (
        "../outside.safetensors",
        "/etc/hostname",
        "evil.bin",
        "evil--repo",
        {"AutoModelForCausalLM": "evil.Model"},
    )
    config[name] = rng.choice((*values, rng.choice(_HOSTILE)))
    file.write_text(json.dumps(config))


def _damage_json(rng: random.Random, folder: Path) -> None:
    files = sorted(folder.glob("*.json"))
    file = rng.choice(files)
    text = bytearray(file.read_bytes())
    what = rng.randrange(4)
    if what == 0:
        del text[rng.randrange(len(text) + 1) :]
    elif what == 1 and text:
        text[rng.randrange(len(text))] = rng.randrange(256)
    elif what == 2:
        text = bytearray(rng.choice((b"[]", b"null", b"1", b'""', b"{}", b"[" * 100_000, b"\xff\xfe", b"1e999999")))
    else:
        file.unlink()
        return
    file.write_bytes(text)


def _change_index(rng: random.Random, folder: Path) -> None:
    """Which file is said to hold a tensor."""
    file = folder / "model.safetensors.index.json"
    index = _read_json(file)
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict) or not index["weight_map"]:
        raise _Impossible
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    tricks = (
        "../outside.safetensors",
        str(folder.parent / "outside.safetensors"),
        "config.json",
        "/dev/zero",
        "none",
        "",
    )
    value = rng.choice((*tricks, *files, rng.choice(_HOSTILE)))
    names = sorted(index["weight_map"])
    what = rng.randrange(5)
    if what == 0:
        index["weight_map"] = dict.fromkeys(names, value)
    elif what == 1:
        del index["weight_map"][rng.choice(names)]
    elif what == 2:
        index[rng.choice(("weight_map", "metadata"))] = rng.choice(_HOSTILE)
    else:
        index["weight_map"][rng.choice(names)] = value
    file.write_text(json.dumps(index))


def _exchange_files(rng: random.Random, folder: Path) -> None:
    """Remove a file, put another one in its place, or leave a pickle only."""
    file = _shard(rng, folder)
    what = rng.randrange(4)
    if what == 0:
        file.unlink()
    elif what == 1:
        file.write_bytes(_shard(rng, folder).read_bytes())
    elif what == 2:
        file.rename(folder / "pytorch_model.bin")
    else:
        tensors = _loaded(file)
        file.unlink()
        torch.save(tensors, folder / "pytorch_model.bin")


MUTATIONS: tuple[Mutation, ...] = (
    _flip_bits,
    _flip_bits,
    _truncate,
    _extend,
    _splice,
    _header_length,
    _header_entry,
    _header_entry,
    _metadata,
    _forge_values,
    _forge_values,
    _forge_values,
    _forge_shapes,
    _forge_shapes,
    _swap_layers,
    _change_setting,
    _change_setting,
    _change_setting,
    _add_setting,
    _damage_json,
    _change_index,
    _exchange_files,
)
