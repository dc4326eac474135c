"""config.json as the source has it.

transformers reads published fields under names of its own and saves only those: of DeepSeek-V4's ``compress_ratios``
and ``num_hash_layers``, MiniMax-M3's ``sparse_attention_config`` or Step 3.7's ``attention_other_setting`` nothing is
left. Runtimes with configurations of their own, vLLM among them, know the published names alone.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..storage.shards import read_json

_CONFIG, _SCHEME = "config.json", "quantization_config"
#: what a checkpoint says about itself and not about the model
_OWN = ("dtype", "torch_dtype", "transformers_version", "_name_or_path", _SCHEME)


def keep_config(source: Path, target: Path) -> bool:
    """Write the source's config.json to a checkpoint that was made of it, with the checkpoint's own quantization.

    What `save_pretrained` wrote stays where transformers would not read the same model from the source's file: where
    the model was changed, or is of another class.

    Args:
        source: folder of the model that the checkpoint was made of.
        target: the checkpoint's folder.

    Returns:
        Whether it was written.

    Raises:
        CheckpointError: when one of the two files cannot be read.
    """
    written, published = read_json(target / _CONFIG), read_json(source / _CONFIG)
    made = _with_own(published, written)
    before, after = _as_read(written), _as_read(made)
    if before is None or after is None:
        return False
    for name in after._get_generation_parameters():  # with which it could not be saved again
        made.pop(name, None)
    if not _same(before.to_dict(), after.to_dict(), published):
        return False
    (target / _CONFIG).write_text(json.dumps(made, indent=2), encoding="utf-8")
    return True


def _with_own(published: dict[str, Any], written: dict[str, Any]) -> dict[str, Any]:
    """What is published, with what a checkpoint says about itself as it was written; the same of configs inside."""
    made = {name: value for name, value in published.items() if name not in _OWN}
    made.update({name: written[name] for name in _OWN if name in written})
    for name, part in made.items():
        own = written.get(name)
        if isinstance(part, dict) and name != _SCHEME:
            made[name] = _with_own(part, own if isinstance(own, dict) else {})
    return made


def _as_read(content: dict[str, Any]) -> Any:
    """transformers' configuration of a config.json's content; None where it does not take it."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    with TemporaryDirectory() as folder:  # from the file, where an infinite number is written as an object
        (Path(folder) / _CONFIG).write_text(json.dumps(content), encoding="utf-8")
        try:
            return CONFIG_MAPPING[content.get("model_type", "")].from_pretrained(folder)
        except (KeyError, TypeError, ValueError, AttributeError, StrictDataclassError):
            return None


def _same(before: dict[str, Any], after: dict[str, Any], published: dict[str, Any]) -> bool:
    """Whether everything that was written is read from the other file too."""
    import transformers

    # a class that transformers has under another name: what loads it is looked up by the model type
    renamed = not any(hasattr(transformers, name) for name in published.get("architectures") or ())
    left_out = ("architectures",) if renamed else ()
    wanted, found = _without_own(before), _without_own(after)
    return all(name in left_out or found.get(name) == value for name, value in wanted.items())


def _without_own(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: _without_own(part) for name, part in value.items() if name not in _OWN}
