"""Which tensors of a checkpoint belong to layers for multi-token prediction: by the names in use."""

import re
from pathlib import Path

from ..errors import CheckpointError
from .shards import read_json


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
