"""The model card (README.md) of a checkpoint: what it was made of, what it weighs, how good it is, how to use it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..evaluation.columns import table
from ..rendering import render
from ..sources.classes import auto_class_of, has_processor, read_auto_config
from ..storage.mtp import decoder_layers, is_mtp
from ..storage.records import write_text
from ..storage.sizes import bits_per_expert_weight, tensor_sizes
from .describe import describe


def write_card(folder: Path, base_model: str, recipe: str, quality: Mapping[str, Any] | None = None) -> None:
    """Write the checkpoint's README.md.

    Args:
        folder: of the checkpoint.
        base_model: the unquantized model as the user named it.
        recipe: YAML that was run.
        quality: ``reference`` and ``run``, entries of a comparison's report, and ``how``, a sentence; None where
            nothing was measured.
    """
    write_text(folder / "README.md", card(folder, base_model, recipe, quality))


def note_quality(folder: Path, quality: Mapping[str, Any]) -> bool:
    """Put figures in the place of what the card of a checkpoint says of quality.

    Args:
        folder: of the checkpoint.
        quality: as in `write_card`.

    Returns:
        Whether there is such a card; one that somebody else wrote has no such section and stays as it is.
    """
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.search(r"(?<=\n## Quality\n\n).*?(?=\n\n## )", text, flags=re.DOTALL)
    if found is None:
        return False
    said = f"{table(quality['reference'], [quality['run']])}\n\n{quality['how']}"
    write_text(path, text[: found.start()] + said + text[found.end() :])
    return True


def card(folder: Path, base_model: str, recipe: str, quality: Mapping[str, Any] | None = None) -> str:
    """The card as Markdown with the hub's metadata; see `write_card`."""
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
    mtp = [size.nbytes for key, size in tensor_sizes(folder).items() if is_mtp(key, layers)]
    if mtp:
        sizes.append(f"{len(mtp)} tensors ({sum(mtp) / 1e6:.2f} MB) for multi-token prediction, as the model had them")
    return render(
        "card.md",
        metadata=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True),
        name=folder.name.removeprefix(".").removesuffix(".partial"),
        base=Path(base_model).name if local else base_model,
        packed=packed,
        auto=auto_class_of(read_auto_config(folder)).__name__,
        processor=has_processor(folder),
        sizes=sizes,
        quality=quality and {"table": table(quality["reference"], [quality["run"]]), "how": quality["how"]},
        recipe=recipe.strip(),
    )
