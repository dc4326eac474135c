"""What `bitsmoe try` loads."""

from typing import Any

from ..evaluation.evaluate import load_model
from ..logs import set_up_logging
from ..sources.model import find_model, load_tokenizer
from .device import resolve_device, use_device
from .runner import resolve_dtype


def load_both(
    checkpoint: str, model: str | None, device: str, dtype: str, verbose: bool
) -> tuple[Any, Any | None, Any]:
    """The quantized model, the unquantized one where it is named, and their tokenizer.

    Raises:
        BitsMoEError: when one of them cannot be used.
    """
    folder = find_model(checkpoint)
    place = use_device(resolve_device(device))
    computed = resolve_dtype(dtype, str(place), folder)
    set_up_logging(verbose)
    import bitsmoe_modifier  # noqa: F401 - registers the loader

    dense = None if model is None else load_model(str(find_model(model)), computed, place)
    return load_model(str(folder), computed, place), dense, load_tokenizer(folder)
