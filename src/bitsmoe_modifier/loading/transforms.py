"""Transforms of llm-compressor (QuIP, SpinQuant) that a checkpoint was made with, and that have to be run with it."""

from pathlib import Path

from ..errors import CheckpointError
from ..storage.shards import read_json

#: where a transform is part of the stored weights; elsewhere it is applied to what flows through the model
_IN_WEIGHTS = {"weight_input", "weight_output"}


def check_transforms(folder: Path) -> None:
    """Refuse checkpoints with transforms of activations: no version of transformers that we know applies them.

    It leaves them out, with their tensors in a list of unexpected keys, and what the model writes is nonsense.

    Args:
        folder: of the checkpoint.

    Raises:
        CheckpointError: naming the transforms.
    """
    file = folder / "config.json"
    scheme = read_json(file).get("quantization_config") if file.is_file() else None
    config = scheme.get("transform_config") if isinstance(scheme, dict) else None
    groups = config.get("config_groups") if isinstance(config, dict) else None
    online = [
        name
        for name, group in (groups.items() if isinstance(groups, dict) else ())
        if any(part.get("location") not in _IN_WEIGHTS for part in group.get("apply", ()))
    ]
    if online:
        raise CheckpointError(
            f"{folder}: the transforms {', '.join(online)} of its config.json (QuIP, SpinQuant) have to be applied "
            "while the model runs, which transformers does not do; quantize without them"
        )
