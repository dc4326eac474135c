"""The page of one checkpoint: sizes, and for every packed layer its bit-widths, spectrum and tokens."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..checkpoints.describe import bits_line, describe
from ..rendering import render
from ..storage.shards import packed_modules, scan
from ..storage.sizes import ExpertBits, expert_kinds
from .charts import columns, over_layers, spectrum, stacked_bars, width_map


@dataclass(frozen=True)
class Figure:
    """A chart and the sentence below it."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class LayerView:
    """What a page shows of one layer: its name, a line about sizes, charts."""

    name: str
    sizes: str
    charts: list[Markup]


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
        lines.append(bits_line(found))
    figures = [*stored_figures({"experts": folder}), *layer_figures({folder.name: found})]
    view = {"lines": lines, "figures": figures, "layers": layer_views(found, folder)}
    return render("checkpoint.html", title=folder.name, **view)


def stored_figures(folders: dict[str, Path]) -> list[Figure]:
    """Bytes of the experts by kind, a bar per checkpoint; nothing without any."""
    kinds = {name: {kind: n / 1e6 for kind, n in expert_kinds(at).items()} for name, at in folders.items()}
    if not any(kinds.values()):
        return []
    caption = "Of the experts only. Scales: with zero points; other: headers, shapes, checksums."
    return [Figure(stacked_bars("Where the experts' bytes went", kinds, "MB"), caption)]


def layer_figures(found: dict[str, dict[str, Any]]) -> list[Figure]:
    """Bits and output error over the layers, a line per checkpoint (`describe`, by name)."""
    figures = []
    packed = {name: entry["layers"] for name, entry in found.items() if entry["layers"]}
    if packed:
        bits = {name: [layer["bits"] for layer in layers] for name, layers in packed.items()}
        chart = over_layers("Bits by layer", "bits per expert weight", bits)
        figures.append(Figure(chart, "What the budget gave each layer."))
    errors = {
        name: [100 * _error(layer["quantization"]) for layer in layers]
        for name, layers in packed.items()
        if all(layer["quantization"].get("relative_output_error") is not None for layer in layers)
    }
    if errors:
        chart = over_layers("Output error by layer", "% of the layer's output power", errors)
        caption = "Squared error of the experts' output as expected on other text, per cent of its power."
        figures.append(Figure(chart, caption))
    return figures


def _error(noted: dict[str, Any]) -> float:
    """On other text; on the calibration text where a checkpoint of an earlier version knows no more."""
    return float(noted.get("unseen_output_error", noted["relative_output_error"]))


def layer_views(found: dict[str, Any], folder: Path) -> list[LayerView]:
    """Bit-widths, spectrum and tokens of every packed layer; empty without any."""
    modules = packed_modules(scan(str(file) for file in sorted(folder.glob("*.safetensors"))))
    views = []
    for layer in found["layers"]:
        name, noted, stored = layer["name"], layer["quantization"], modules[layer["name"]]
        apart = ExpertBits(**layer["bits_apart"])
        sizes = f"{layer['intermediate_size']} × {layer['hidden_size']}, {layer['bits']:.3f} bits ({apart})"
        charts = [width_map(f"Bit-widths, {name}", stored["widths_in"].read(), stored["widths_out"].read())]
        energy = {
            f"{title} ({'basis' if layer[f'basis_{side}_bits'] else 'own channels'})": noted["energy"][side]
            for side, title in (("in", "gate, up"), ("out", "down"))
            if noted.get("energy", {}).get(side)
        }
        if any(sum(values) > 0 for values in energy.values()):
            charts.append(spectrum(f"Spectral energy, {name}", energy))
        if noted.get("tokens_per_expert"):
            charts.append(columns(f"Tokens per expert, {name}", "tokens", noted["tokens_per_expert"], "expert"))
        views.append(LayerView(name, f"{layer['experts']} experts of {sizes}", charts))
    return views
