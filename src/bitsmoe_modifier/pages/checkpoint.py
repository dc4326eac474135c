"""The page of one checkpoint: what it is and how good, charts over all layers, and details of the worst ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..checkpoints.describe import describe
from ..checkpoints.quality import kept_quality
from ..evaluation.columns import Mark, summary
from ..rendering import render
from ..sources.provenance import read_source
from ..storage.shards import checkpoint_files, packed_modules, scan
from ..storage.sizes import ExpertBits, expert_kinds
from .charts import stacked_bars
from .layers import Series, amounts_over_layers, bars_over_layers, columns, spectrum, width_map, widths_over_layers
from .samples import EXPLAINED, SampleView, sample_views
from .style import BYTES, METHODS
from .verdicts import LEGEND, without_folders

#: layers that are drawn on their own
_DETAILED = 3
_ON_OTHER_TEXT = (
    "Squared error of the experts' output, per cent of its power: bars, as estimated for other text of the "
    "calibration's kind; ticks, as measured on the calibration text."
)


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
    figures: list[Figure]


@dataclass(frozen=True)
class LayersView:
    """What a page shows of a checkpoint's layers: charts over all, and the worst on their own.

    Attributes:
        figures: over all layers.
        why: by what the worst were chosen, and how many there are.
        worst: the worst, in the order of the model.
    """

    figures: list[Figure]
    why: str
    worst: list[LayerView]


@dataclass(frozen=True)
class QualityView:
    """What was measured of a checkpoint: the summary's cells (text, mark), how, and the texts."""

    heads: list[str]
    rows: list[list[tuple[str, Mark]]]
    how: str
    samples: list[SampleView]


def checkpoint_page(folder: Path) -> str:
    """All of a checkpoint on one page.

    Raises:
        CheckpointError: when the folder is no checkpoint, or its files are damaged.
    """
    found = describe(folder)
    figures = [*stored_figures({"experts": folder}), *layer_figures({folder.name: found})]
    return render(
        "checkpoint.html",
        title=folder.resolve().name,
        facts=_facts(found, folder),
        quality=_quality_view(folder),
        explained=EXPLAINED,
        figures=figures,
        layers=layers_view(found, folder),
    )


def _facts(found: Mapping[str, Any], folder: Path) -> list[tuple[str, str]]:
    """What the checkpoint is, a name and a value per line."""
    size, total, made = found["bytes"], found["checkpoint_bytes"], found["made_of"]
    lines = [
        ("Base model", read_source(folder).get("name", "")),
        ("Architecture", str(found["model_type"] or "")),
        ("Format", found["format"] or "not quantized"),
        ("Size", f"{total / 1e6:.2f} MB: experts {size['experts'] / 1e6:.2f}, rest {size['rest'] / 1e6:.2f}"),
    ]
    if found["layers"]:
        apart = ExpertBits(**found["bits_apart"])
        bits = f"{found['bits_per_expert_weight']:.4f}, everything that is stored for the experts counted: {apart}"
        lines.append(("Bits per expert weight", bits))
    if made:
        rows = made.get("calibration") or {}
        if rows.get("tokens"):
            lines.append(("Calibration", f"{rows['tokens']} tokens, seed {made.get('seed')}"))
        lines.append(("Made with", ", ".join(f"{name} {v}" for name, v in (made.get("versions") or {}).items())))
        lines.append(("On", ", ".join(f"{name} {v}" for name, v in (made.get("machine") or {}).items())))
    lines.append(("Date", _date(folder)))
    return [(name, without_folders(value)) for name, value in lines if value]


def _date(folder: Path) -> str:
    """When the newest file of weights was written; of a fetched checkpoint, when it was fetched."""
    from datetime import datetime, timezone

    written = max((file.stat().st_mtime for file in checkpoint_files(folder)), default=None)
    if written is None:
        return ""
    return f"{datetime.fromtimestamp(written, timezone.utc):%Y-%m-%d} (of the files of weights, UTC)"


def _quality_view(folder: Path) -> QualityView | None:
    """What `keep_quality` kept; None where nothing was measured."""
    kept = kept_quality(folder)
    if kept is None:
        return None
    heads, rows = summary(kept["reference"], [kept["run"]])
    how = f"{without_folders(kept['how']).replace('`', '')} Measured on {kept['date']} (UTC)."
    if LEGEND not in how:
        how += f" {LEGEND}"
    return QualityView(heads, rows, how, sample_views({folder.resolve().name: kept.get("samples") or []}))


def stored_figures(folders: Mapping[str, Path]) -> list[Figure]:
    """Bytes of the experts by kind, a bar per checkpoint; nothing without any."""
    kinds = {name: {kind: n / 1e6 for kind, n in expert_kinds(at).items()} for name, at in folders.items()}
    if not any(kinds.values()):
        return []
    caption = (
        "Of the experts only. Codes: the rounded weights; scales: what turns them into numbers, with zero points; "
        "bases: what the experts of a layer share; other: headers, shapes, checksums."
    )
    return [Figure(stacked_bars("Where the experts' bytes went", "experts, MB", kinds, "MB", BYTES), caption)]


def layer_figures(found: Mapping[str, Mapping[str, Any]]) -> list[Figure]:
    """Bits and output error over the layers, a panel per checkpoint (`describe`, by name)."""
    colour = METHODS["BitsMoEModifier"].colour  # only its layers are packed
    packed = {name: entry["layers"] for name, entry in found.items() if entry["layers"]}
    if not packed:
        return []
    bits = [Series(name, colour, [layer["bits"] for layer in layers]) for name, layers in packed.items()]
    chart = bars_over_layers("Bits by layer", "bits per expert weight", bits)
    figures = [Figure(chart, "What the budget gave each layer; the budget is one for all layers, by their effect.")]
    errors = [
        Series(
            name,
            colour,
            [100 * _error(layer["quantization"]) for layer in layers],
            [100 * float(layer["quantization"]["relative_output_error"]) for layer in layers],
        )
        for name, layers in packed.items()
        if all(layer["quantization"].get("relative_output_error") is not None for layer in layers)
    ]
    if errors:
        chart = bars_over_layers("Output error by layer", "% of the output's power", errors, "on the calibration text")
        figures.append(Figure(chart, _ON_OTHER_TEXT))
    return figures


def _error(noted: Mapping[str, Any]) -> float:
    """On other text; on the calibration text where a checkpoint of an earlier version knows no more."""
    return float(noted.get("unseen_output_error", noted["relative_output_error"]))


def layers_view(found: Mapping[str, Any], folder: Path) -> LayersView | None:
    """Bit-widths, energy and tokens over all packed layers, and the worst layers; None without any."""
    layers = found["layers"]
    if not layers:
        return None
    chart = widths_over_layers("Bit-widths by layer", [layer["bit_widths"] for layer in layers])
    caption = (
        "A unit is a few neighbouring directions of an expert's matrix, which get one bit-width; at 0 bits it is left "
        "out. Gate and up read the layer's input, down writes its output."
    )
    figures = [Figure(chart, caption)]
    energy = _over_layers(layers, "in", "gate, up"), _over_layers(layers, "out", "down")
    panels = {title: rows for side in energy for title, rows in side.items()}
    if panels:
        chart = amounts_over_layers(
            "Spectral energy", "unit of directions, strongest first", "% of the side's energy", panels
        )
        caption = "How much would be lost without a unit: dark at the left means that few directions matter."
        figures.append(Figure(chart, caption))
    tokens = [layer["quantization"].get("tokens_per_expert") for layer in layers]
    if all(tokens):
        chart = amounts_over_layers("Tokens per expert", "expert", "tokens", {"calibration": tokens}, "no tokens")
        caption = (
            "How often calibration reached every expert. What was never reached is rounded by the layer's average."
        )
        figures.append(Figure(chart, caption))
    worst, why = _worst(layers)
    modules = packed_modules(scan(map(str, checkpoint_files(folder))))
    return LayersView(figures, why, [_layer_view(layer, modules[layer["name"]]) for layer in worst])


def _over_layers(layers: Sequence[Mapping[str, Any]], side: str, title: str) -> dict[str, list[list[float]]]:
    """Per cent of a side's energy by layer and unit; {} where a layer does not know."""
    found = [layer["quantization"].get("energy", {}).get(side) or [] for layer in layers]
    if not all(sum(values) > 0 for values in found):
        return {}
    return {title: [[100 * v / sum(values) for v in values] for values in found]}


def _worst(layers: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], str]:
    """The layers to draw on their own, in the model's order, and by what they were chosen."""
    known = all(layer["quantization"].get("relative_output_error") is not None for layer in layers)
    if len(layers) <= _DETAILED:
        return list(layers), ""
    if known:
        worst = sorted(layers, key=lambda layer: -_error(layer["quantization"]))[:_DETAILED]
        why = f"The {_DETAILED} of {len(layers)} layers with the largest output error."
    else:
        worst = sorted(layers, key=lambda layer: -layer["bits"])[:_DETAILED]
        why = f"The {_DETAILED} of {len(layers)} layers with the most bits."
    names = {layer["name"] for layer in worst}
    return [layer for layer in layers if layer["name"] in names], why


def _layer_view(layer: Mapping[str, Any], stored: Mapping[str, Any]) -> LayerView:
    """Bit-widths, spectrum and tokens of a packed layer."""
    name, noted = layer["name"], layer["quantization"]
    apart = ExpertBits(**layer["bits_apart"])
    sizes = f"{layer['experts']} experts of {layer['intermediate_size']} × {layer['hidden_size']}"
    sizes += f", {layer['bits']:.3f} bits ({apart})"
    if noted.get("relative_output_error") is not None:
        sizes += f", output error {100 * _error(noted):.3g} %"
    chart = width_map(f"Bit-widths, {name}", stored["widths_in"].read(), stored["widths_out"].read())
    figures = [Figure(chart, "Bit-width of every unit of every expert.")]
    energy = {
        f"{title} ({'basis' if layer[f'basis_{side}_bits'] else 'own channels'})": noted["energy"][side]
        for side, title in (("in", "gate, up"), ("out", "down"))
        if noted.get("energy", {}).get(side)
    }
    if any(sum(values) > 0 for values in energy.values()):
        figures.append(
            Figure(spectrum(f"Spectral energy, {name}", energy), "What the layer would lose without a unit.")
        )
    if noted.get("tokens_per_expert"):
        chart = columns(f"Tokens per expert, {name}", "tokens", noted["tokens_per_expert"], "expert")
        figures.append(Figure(chart, "Calibration tokens that the router sent to every expert."))
    return LayerView(name, sizes, figures)
