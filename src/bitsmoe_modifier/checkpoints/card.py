"""The model card (README.md) of a checkpoint: what it was made of, what it weighs, how good it is, how to use it."""

import re
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from .. import __version__
from ..evaluation.columns import table
from ..rendering import render
from ..sources.classes import auto_class_of, has_processor, read_auto_config
from ..storage.mtp import decoder_layers, is_mtp
from ..storage.packed import TENSOR_NAMES
from ..storage.records import write_text
from ..storage.sizes import bits_per_expert_weight, tensor_sizes
from .describe import describe
from .quality import keep_quality


def write_card(folder: Path, base_model: str, recipe: str, quality: Mapping[str, Any] | None = None) -> None:
    """Write the checkpoint's README.md, and keep its figures beside it.

    Args:
        folder: of the checkpoint.
        base_model: the unquantized model as the user named it.
        recipe: YAML that was run.
        quality: as in `keep_quality`; None where nothing was measured.
    """
    write_text(folder / "README.md", card(folder, base_model, recipe, quality and keep_quality(folder, quality)))


def note_quality(folder: Path, quality: Mapping[str, Any]) -> bool:
    """Keep figures, and put them in the place of what the card of a checkpoint says of quality.

    Args:
        folder: of the checkpoint.
        quality: as in `keep_quality`.

    Returns:
        Whether there is such a card; one that somebody else wrote has no such section and stays as it is.
    """
    kept = keep_quality(folder, quality)
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.search(r"(?<=\n## Quality\n\n).*?(?=\n\n## )", text, flags=re.DOTALL)
    if found is None:
        return False
    write_text(path, text[: found.start()] + _quality(kept).strip() + text[found.end() :])
    return True


def _quality(kept: Mapping[str, Any] | None) -> str:
    """The section about quality, from what `keep_quality` kept."""
    if kept is None:
        return render("quality.md", table=None)
    samples = [
        {
            "prompt": _cell(sample["prompt"]),
            "unquantized": _cell("".join(text for text, _ in sample["unquantized"])),
            "quantized": _cell(sample["quantized"]),
            "kld": fmean(kld for _, kld in sample["unquantized"]) if sample["unquantized"] else 0.0,
        }
        for sample in kept.get("samples", [])
    ]
    figures = table(kept["reference"], [kept["run"]])
    return render("quality.md", table=figures, how=kept["how"], date=kept["date"], samples=samples)


def _cell(text: str) -> str:
    """Any text in a cell of a Markdown table."""
    shown = re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", text).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"\s*\n\s*", " ⏎ ", shown).strip()


def card(folder: Path, base_model: str, recipe: str, quality: Mapping[str, Any] | None = None) -> str:
    """The card as Markdown with the hub's metadata; see `write_card`. ``quality`` is what `keep_quality` returned."""
    found = describe(folder)
    packed = bool(found["layers"])
    bits = bits_per_expert_weight(folder)
    # a path means nothing on another machine, and may say more than it should
    local = Path(base_model).exists()
    metadata: dict[str, Any] = {} if local else {"base_model": base_model, "base_model_relation": "quantized"}
    metadata["library_name"] = "transformers"
    metadata["tags"] = ["compressed-tensors", "mixture-of-experts", *(["bitsmoe"] if packed else [])]
    size, total = found["bytes"], found["checkpoint_bytes"]
    sizes = [
        f"{bits.total:.4f} bits per expert weight, everything stored counted: {bits}",
        f"{total / 1e6:.2f} MB: experts {size['experts'] / 1e6:.2f}, everything else {size['rest'] / 1e6:.2f}",
        f"format: compressed-tensors, {found['format'] or 'not quantized'}",
    ]
    if packed:
        sizes.append(f"{len(found['layers'])} layers of {found['layers'][0]['experts']} packed experts")
    layers = decoder_layers(folder)
    beside = {key: size.nbytes for key, size in tensor_sizes(folder).items() if is_mtp(key, layers)}
    mtp = [size for key, size in beside.items() if key.rpartition(".")[2] not in TENSOR_NAMES]
    if mtp:
        others = sum(beside.values()) - sum(mtp)
        packed_too = f", beside {others / 1e6:.2f} MB of their experts, packed" if others else ""
        said = f"{len(mtp)} tensors ({sum(mtp) / 1e6:.2f} MB) for multi-token prediction, as the model had them"
        sizes.append(said + packed_too)
    return render(
        "card.md",
        metadata=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True),
        version=__version__,
        name=folder.name.removeprefix(".").removesuffix(".partial"),
        base=Path(base_model).name if local else base_model,
        packed=packed,
        auto=auto_class_of(read_auto_config(folder)).__name__,
        processor=has_processor(folder),
        sizes=sizes,
        quality=_quality(quality).strip(),
        recipe=recipe.strip(),
    )
