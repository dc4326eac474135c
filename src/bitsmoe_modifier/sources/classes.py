"""The class that a checkpoint's config.json names, and the auto class of transformers that leads to it.

Most models of today are published as a wrapper around a language model: `Qwen3_5MoeForConditionalGeneration` holds a
vision tower beside the experts. `AutoModelForCausalLM` takes such a folder too, for some families by leaving the tower
out without a word. What config.json lists under ``architectures`` is what was published, so it decides.
"""

from pathlib import Path
from typing import Any

from ..errors import CheckpointError, RecipeError

#: auto classes of transformers whose models calibrate on text, from the plainest to the one that takes in most
AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
#: what a model with a processor of images, sound or video has beside its tokenizer
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def auto_class_of(config: Any) -> Any:
    """The auto class through which transformers builds the class that a configuration names.

    Args:
        config: a `PreTrainedConfig`; without ``architectures``, or with those of another version of transformers or of
            a headless model, the auto class that makes most of it is taken: the one with the towers.

    Raises:
        CheckpointError: when no auto class knows models of this kind.
    """
    import transformers

    named = set(config.architectures or ())
    known = []
    for name in AUTO_CLASSES:
        auto = getattr(transformers, name, None)
        if auto is not None and type(config) in auto._model_mapping:
            known.append((auto, [k for k in _classes(auto._model_mapping[type(config)]) if _has_forward(k)]))
    if known and not any(classes for _, classes in known):
        raise CheckpointError(
            f"model_type {config.model_type!r}: its class has no forward pass of its own, its parts run apart; "
            "it cannot be calibrated or measured as one model"
        )
    known = [(auto, classes) for auto, classes in known if classes]
    for auto, classes in known:
        if named & {kind.__name__ for kind in classes}:
            return auto
    if not known:
        raise CheckpointError(
            f"model_type {config.model_type!r} ({', '.join(sorted(named)) or 'no architectures'}) is not a language "
            f"model for transformers {transformers.__version__}: {', '.join(AUTO_CLASSES)} do not know it"
        )
    return known[-1][0]


def class_of(config: Any) -> Any:
    """The model class that `auto_class_of` leads to."""
    classes = _classes(auto_class_of(config)._model_mapping[type(config)])
    return next((kind for kind in classes if kind.__name__ in (config.architectures or ())), classes[0])


def read_auto_config(folder: Path | str) -> Any:
    """A checkpoint's configuration as transformers reads it.

    Raises:
        CheckpointError: when transformers does not know the model type, or config.json is damaged.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(f"{folder}: transformers cannot read its config.json ({error})") from error


def load_published(folder: Path | str, config: Any = None, **kwargs: Any) -> Any:
    """``from_pretrained`` of the class that config.json names, but no weight is made up.

    transformers fills what no file holds with random numbers, and says it in a log that is often switched off. Of a
    quantized checkpoint only experts are looked for: other formats may have parameters that no file needs to hold.

    Args:
        folder: of the checkpoint, or its name on the hub.
        config: its configuration, where it was read before.
        kwargs: as `from_pretrained` takes them.

    Raises:
        CheckpointError: when transformers does not know the model; naming a tensor that no file holds.
    """
    given = {} if config is None else {"config": config}
    kind = auto_class_of(read_auto_config(folder) if config is None else config)
    loaded: Any = kind.from_pretrained(folder, output_loading_info=True, **given, **kwargs)
    model, info = loaded
    whole = getattr(model.config, "quantization_config", None) is None
    missing = sorted(name for name in info["missing_keys"] if whole or ".experts." in name)
    if missing:
        raise CheckpointError(
            f"{folder}: no file holds {missing[0]} (of {len(missing)} missing tensors), and transformers would make it "
            "up; fetch the model again, or save it with all its weights. After llm-compressor's load_quantizable_moe, "
            "which leaves transformers reading such models otherwise, start a new process"
        )
    return model


def build_published(config: Any, **kwargs: Any) -> Any:
    """A model with random weights of the class that a configuration names, on the default device."""
    return auto_class_of(config).from_config(config, **kwargs)


def build_empty(source: Path | str) -> Any:
    """The model that a folder's or hub model's configuration describes, without weights: on the meta device.

    Raises:
        CheckpointError: when config.json is damaged, or transformers does not know the model type.
        RecipeError: when transformers cannot build the model.
    """
    import torch

    config = read_auto_config(source)
    try:
        with torch.device("meta"):
            return build_published(config)
    except (ValueError, OSError, KeyError) as error:
        raise RecipeError(f"{source}: transformers cannot build this model ({error})") from error


def has_processor(folder: Path) -> bool:
    """Whether a checkpoint has a processor of images, sound or video beside its tokenizer."""
    return any((folder / name).exists() for name in PROCESSOR_FILES)


def _classes(found: Any) -> list[Any]:
    return list(found) if isinstance(found, (list, tuple)) else [found]


def _has_forward(kind: Any) -> bool:
    from torch import nn

    return kind.forward is not nn.Module.forward
