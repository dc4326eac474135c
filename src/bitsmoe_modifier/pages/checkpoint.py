"""The page of one checkpoint: sizes, and for every packed layer its widths, spectrum and tokens."""

from html import escape
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.describe import describe
from ..checkpoints.kinds import expert_kinds
from ..storage.shards import packed_modules, scan
from .charts import columns, over_layers, spectrum, stacked_bars
from .heatmap import width_map
from .style import bullets, figure, page, paragraph


def checkpoint_page(folder: Path) -> str:
    """All of a checkpoint on one page.

    Raises:
        CheckpointError: when the folder is no checkpoint, or its files are damaged.
    """
    found = describe(folder)
    size, total = found["bytes"], found["checkpoint_bytes"]
    lines = [
        f"{found['model_type']}, {found['format'] or 'not quantized'}",
        f"{total / 1e6:.2f} MB: experts {size['experts'] / 1e6:.2f}, rest {size['rest'] / 1e6:.2f}",
    ]
    if found["layers"]:
        lines.append(f"{found['bits_per_expert_weight']:.4f} bits per expert weight, everything stored counted")
    parts = [bullets(lines)]
    megabytes = {kind: n / 1e6 for kind, n in expert_kinds(folder).items()}
    if megabytes:
        parts.append(figure(stacked_bars("Where the experts' bytes went", {"experts": megabytes}, "MB"), ""))
    parts += layer_figures({folder.name: found})
    parts.append(layer_sections(found, folder))
    return page(folder.name, *parts)


def layer_figures(found: dict[str, dict[str, Any]]) -> list[str]:
    """Bits and output error over the layers, a line per checkpoint (`describe`, by name)."""
    figures = []
    packed = {name: entry["layers"] for name, entry in found.items() if entry["layers"]}
    if packed:
        bits = {name: [layer["bits"] for layer in layers] for name, layers in packed.items()}
        chart = over_layers("Bits by layer", "bits per expert weight", bits)
        figures.append(figure(chart, "What the budget gave each layer."))
    errors = {
        name: [100 * layer["quantization"]["relative_output_error"] for layer in layers]
        for name, layers in packed.items()
        if all(layer["quantization"].get("relative_output_error") is not None for layer in layers)
    }
    if errors:
        chart = over_layers("Output error by layer", "% of the layer's output power", errors)
        figures.append(
            figure(chart, "Squared error of the experts' output on calibration tokens, per cent of its power.")
        )
    return figures


def layer_sections(found: dict[str, Any], folder: Path) -> str:
    """Widths, spectrum and tokens of every packed layer; empty without any."""
    modules = packed_modules(scan(str(file) for file in sorted(folder.glob("*.safetensors"))))
    sections = []
    for layer in found["layers"]:
        stored = modules[layer["name"]]
        sections.append(_layer(layer, stored["widths_in"].read(), stored["widths_out"].read()))
    return f'<div class="layers">{"".join(sections)}</div>' if sections else ""


def _layer(layer: dict[str, Any], widths_in: torch.Tensor, widths_out: torch.Tensor) -> str:
    name, noted = layer["name"], layer["quantization"]
    said = (
        f"{layer['experts']} experts of {layer['intermediate_size']} × {layer['hidden_size']}, {layer['bits']:.3f} bits"
    )
    parts = [f"<h3>{escape(name)}</h3>", paragraph(said), width_map(f"Widths, {name}", widths_in, widths_out)]
    energy = {
        f"{title} ({'basis' if layer[f'basis_{side}_bits'] else 'own channels'})": noted["energy"][side]
        for side, title in (("in", "gate, up"), ("out", "down"))
        if noted.get("energy", {}).get(side)
    }
    if any(sum(values) > 0 for values in energy.values()):
        parts.append(spectrum(f"Spectral energy, {name}", energy))
    if noted.get("tokens_per_expert"):
        parts.append(columns(f"Tokens per expert, {name}", "tokens", noted["tokens_per_expert"], "expert"))
    return f"<section>{''.join(parts)}</section>"
