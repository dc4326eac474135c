"""What is in a checkpoint: bytes by kind, bit-widths, bases, tokens per expert. Reads headers, no weights."""

import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..sources.model import read_config
from ..sources.provenance import REPORT_NAME
from ..storage.kinds import kind_of
from ..storage.layout import ExpertsLayout
from ..storage.shards import Stored, checkpoint_files, packed_modules, read_json, read_structure, scan
from ..storage.sizes import ExpertBits, checkpoint_bytes, expert_bytes, tensor_sizes


@dataclass(frozen=True)
class Layer:
    """One layer of packed experts.

    Attributes:
        name: of its experts module.
        layout: its sizes.
        kinds: bytes by kind, "other" for header and checksums.
        bit_widths: units of every bit-width, by matrix ("gate", "up", "down").
        report: what the quantization noted about it, {} where nothing is known.
    """

    name: str
    layout: ExpertsLayout
    kinds: dict[str, int]
    bit_widths: dict[str, dict[int, int]]
    report: dict[str, Any]

    @property
    def bits(self) -> ExpertBits:
        """Per expert weight."""
        return ExpertBits.of(self.kinds, self.layout.dense_elements)


def describe_layer(name: str, stored: dict[str, Stored], report: dict[str, Any]) -> Layer:
    """Read one layer's header and bit-widths, and count its bytes.

    Raises:
        CheckpointError: naming the tensor that is missing or does not fit the others.
    """
    layout, tensors = read_structure(stored, name)
    kinds: dict[str, int] = defaultdict(int)
    for leaf, tensor in stored.items():
        size = torch.Size(tensor.shape).numel() * (tensor.dtype.itemsize if tensor.dtype else 0)
        kinds[kind_of(leaf)] += size
    widths_in, widths_out = torch.as_tensor(tensors["widths_in"]), torch.as_tensor(tensors["widths_out"])
    widths = {
        matrix: dict(sorted(Counter(w.flatten().tolist()).items()))
        for matrix, w in (("gate", widths_in[:, 0]), ("up", widths_in[:, 1]), ("down", widths_out))
    }
    return Layer(name, layout, dict(kinds), widths, report)


def describe(folder: Path | str) -> dict[str, Any]:
    """Everything `inspect` prints, in JSON types.

    Raises:
        CheckpointError: when the folder is no checkpoint, or its files are damaged.
    """
    folder = Path(folder)
    config = read_config(folder)
    scheme = config.get("quantization_config")
    sizes = tensor_sizes(folder)
    modules = packed_modules(scan(map(str, checkpoint_files(folder))))
    names = sorted(modules, key=_natural)
    noted = _read_report(folder, names)
    layers = [describe_layer(name, modules[name], noted.get(name, {})) for name in names]
    packed = sum((Counter(layer.kinds) for layer in layers), Counter[str]())
    elements = sum(layer.layout.dense_elements for layer in layers)
    bits = ExpertBits.of(packed, elements) if elements else None
    total = sum(s.nbytes for s in sizes.values())
    return {
        "folder": str(folder),
        "model_type": config.get("model_type"),
        "format": scheme.get("format") if isinstance(scheme, dict) else None,
        "checkpoint_bytes": checkpoint_bytes(folder),
        "bytes": {
            "experts": expert_bytes(sizes),
            "packed experts": packed.total(),
            "rest": total - expert_bytes(sizes),
        },
        "made_of": made_of(folder),
        "bits_per_expert_weight": bits and bits.total,
        "bits_apart": bits and asdict(bits),
        "layers": [
            {
                "name": layer.name,
                "experts": layer.layout.num_experts,
                "hidden_size": layer.layout.hidden_size,
                "intermediate_size": layer.layout.intermediate_size,
                "codes": "trellis" if layer.layout.codes else "scalar",
                "block_size": layer.layout.block_size,
                "group_size": layer.layout.group_size,
                "basis_in_bits": layer.layout.basis_in_bits,
                "basis_out_bits": layer.layout.basis_out_bits,
                "dense_experts": layer.layout.num_dense,
                "bits": layer.bits.total,
                "bits_apart": asdict(layer.bits),
                "bytes": layer.kinds,
                "bit_widths": layer.bit_widths,
                "quantization": layer.report,
            }
            for layer in layers
        ],
    }


def render(found: dict[str, Any]) -> str:
    """What `describe` found, for a terminal."""
    size = found["bytes"]
    experts, rest, total = (n / 1e6 for n in (size["experts"], size["rest"], found["checkpoint_bytes"]))
    lines = [
        f"{found['folder']}: {found['model_type']}, {found['format'] or 'not quantized'}",
        f"  {total:.2f} MB: experts {experts:.2f}, rest {rest:.2f}",
    ]
    lines += _made_of_lines(found["made_of"])
    if not found["layers"]:
        return "\n".join([*lines, "  no experts packed by BitsMoE"])
    lines.append(f"  {bits_line(found)}")
    for layer in found["layers"]:
        whole = sum(layer["bytes"].values())
        parts = ", ".join(f"{kind} {100 * n / whole:.1f} %" for kind, n in layer["bytes"].items() if n)
        bases = (f"{side} {layer[f'basis_{side}_bits'] or 'none'}" for side in ("in", "out"))
        lines += [
            "",
            f"{layer['name']}: {layer['experts']} experts of {layer['intermediate_size']} × {layer['hidden_size']}, "
            f"{layer['bits']:.4f} bits, {whole / 1e6:.3f} MB",
            f"  bits    {ExpertBits(**layer['bits_apart'])}",
            f"  bytes   {parts}",
            f"  bases   bits: {', '.join(bases)}; blocks of {layer['block_size']}, "
            f"groups of {layer['group_size']}, {layer['codes']} codes",
        ]
        for matrix, counts in layer["bit_widths"].items():
            units = sum(counts.values())
            shares = "  ".join(f"{width}: {100 * n / units:4.1f} %" for width, n in counts.items())
            lines.append(f"  {matrix:<7} bit-widths  {shares}")
        noted = layer["quantization"]
        tokens = noted.get("tokens_per_expert")
        if tokens:
            ordered = sorted(tokens)
            lines.append(
                f"  tokens  per expert {ordered[0]} … {ordered[-1]}, median {ordered[len(ordered) // 2]}, "
                f"none for {ordered.count(0)}"
            )
        if noted.get("relative_output_error") is not None:
            error = f"  error   {100 * noted['relative_output_error']:.2f} % of the layer's output power"
            unseen = noted.get("unseen_output_error")
            lines.append(error if unseen is None else f"{error}, {100 * unseen:.2f} % expected on other text")
    return "\n".join(lines)


def bits_line(found: dict[str, Any]) -> str:
    """The bits that `describe` found, whole and in parts."""
    apart = ExpertBits(**found["bits_apart"])
    return f"{found['bits_per_expert_weight']:.4f} bits per expert weight, everything stored counted: {apart}"


def made_of(folder: Path) -> dict[str, Any]:
    """What the checkpoint was made of (`fingerprint`: versions, machine, recipe, digests of weights and rows; and the
    seed of the rows); {} where nothing is known."""
    path = folder / REPORT_NAME
    found = read_json(path).get("made_of") if path.exists() else None
    return found if isinstance(found, dict) else {}


def _made_of_lines(found: dict[str, Any]) -> list[str]:
    """A record of `made_of` for a terminal; the weights' digests as one."""

    def part(name: str) -> dict[str, Any]:
        value = found.get(name)
        return value if isinstance(value, dict) else {}

    if not found:
        return []
    weights = hashlib.sha256(json.dumps(part("model").get("weights"), sort_keys=True).encode()).hexdigest()
    rows = part("calibration")
    return [
        f"  made with   {', '.join(f'{name} {v}' for name, v in part('versions').items())}",
        f"  on          {', '.join(f'{name} {v}' for name, v in part('machine').items())}",
        f"  from        weights {weights[:16]}, {rows.get('tokens')} tokens {str(rows.get('sha256'))[:16]}, "
        f"seed {found.get('seed')}",
    ]


def _read_report(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """What the quantization noted, by module; {} where it wrote nothing.

    It noted the model's names, which some architectures rename in their files: layers are then matched by their order.
    """
    path = folder / REPORT_NAME
    if not path.exists():
        return {}
    noted = read_json(path).get("layers")
    if not isinstance(noted, dict) or not all(isinstance(layer, dict) for layer in noted.values()):
        raise CheckpointError(f"{path} holds no layers; delete it, or fetch the checkpoint again")
    in_order = [noted[name] for name in sorted(noted, key=_natural)]
    return dict(zip(names, in_order, strict=True)) if len(noted) == len(names) else noted


def _natural(name: str) -> list[tuple[int, str]]:
    """Order layers by number."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
