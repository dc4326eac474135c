"""Which tensors of a checkpoint belong to layers for multi-token prediction: by the names in use."""

import re
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .shards import read_json

#: what config.json calls the number of layers for multi-token prediction
COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "mtp_num_layers")


def decoder_layers(folder: Path) -> int | None:
    """Number of decoder layers by a checkpoint's config.json, a wrapper's language model; None where it says none."""
    try:
        config = read_json(folder / "config.json")
    except CheckpointError:
        return None
    text = config.get("text_config")
    for one in (text if isinstance(text, dict) else {}, config):
        layers = one.get("num_hidden_layers")
        if isinstance(layers, int):
            return layers
    return None


def is_mtp(name: str, layers: int | None) -> bool:
    """Whether a tensor belongs to such a layer: ``mtp.…``, ``…nextn…``, or a decoder layer beyond the last.

    Args:
        name: of the tensor in its file.
        layers: number of decoder layers; None where unknown.
    """
    if re.search(r"(?:^|[._])(?:mtp|nextn)(?:[._]|$)", name):
        return True
    numbered = re.match(r"(?:model[.]|language_model[.])*layers[.](\d+)[.]", name)
    return numbered is not None and layers is not None and int(numbered[1]) >= layers


def is_counted_mtp(name: str, config: Any) -> bool:
    """Whether a tensor belongs to a layer for multi-token prediction that a model's configuration knows of.

    Args:
        name: of the tensor in its file.
        config: of the model, whose class need not have such layers.
    """
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", None)
    counted = max((getattr(one, count, None) or 0 for one in (text, config) for count in COUNTS), default=0)
    if not is_mtp(name, layers):
        return False
    return is_mtp(name, None) or not is_mtp(name, (layers or 0) + counted)
