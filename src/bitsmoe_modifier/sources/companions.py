"""The files beside a model's weights: taken along to what is made of it exactly as they are.

`save_pretrained` validates what it writes, and refuses at the end of a run what it accepted at its start: a
generation_config.json with ``do_sample: false, temperature: 0.6``, say, which is common on the hub. So nothing of the
user's is written through it: it gets plain settings, and the source's own files take the place of what it writes.
"""

import shutil
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "tokenizer*", "vocab*", "merges*")
#: what a model may be used for; whoever passes it on has to pass these on
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
_FOLDERS = ("additional_chat_templates",)
#: about the weights of the folder they are in
_NOT_TAKEN = (
    "config.json",
    "quantize_config.json",
    "hf_quant_config.json",
    "adapter_config.json",
    "bitsmoe_quality.json",
    "bitsmoe_report.json",
)
_GENERATION = "generation_config.json"


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template, generation settings, processors, code and licences from one folder to another.

    Of the generation settings, what is in ``target`` already is replaced or, where the source has none, deleted.
    """
    (target / _GENERATION).unlink(missing_ok=True)
    for file in sorted({file for pattern in (*_PATTERNS, *LICENCES) for file in source.glob(pattern)}):
        name = file.name
        if file.is_file() and name not in _NOT_TAKEN and not name.endswith(".index.json") and not name.startswith("."):
            shutil.copyfile(file, target / name)
    for name in _FOLDERS:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, dirs_exist_ok=True)


def let_save(model: Any) -> None:
    """Take from a loaded model whatever `save_pretrained` could refuse, and check the rest now.

    Its generation settings become the defaults (`copy_companions` brings the source's back), and those among its
    configuration go.

    Raises:
        CheckpointError: when the configuration is one that cannot be saved.
    """
    from transformers import GenerationConfig

    if getattr(model, "generation_config", None) is not None:
        model.generation_config = GenerationConfig()
    for name in model.config._get_generation_parameters():
        delattr(model.config, name)
    problem = unsavable(model)
    if problem:
        raise CheckpointError(f"the model's config.json cannot be saved again: {problem}")


def unsavable(model: Any) -> str:
    """What `save_pretrained` would refuse of a model's settings, in one line; "" where it would not."""
    try:
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            generation.validate(strict=True)
        found = model.config._get_generation_parameters()
        if found:
            return f"generation parameters in config.json: {', '.join(found)}"
        if hasattr(model.config, "validate"):
            model.config.validate()
        model.config.to_json_string()
    except (ValueError, TypeError, AttributeError) as error:
        return " ".join(str(error).split())
    return ""
