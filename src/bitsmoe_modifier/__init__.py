"""BitsMoE for llm-compressor, transformers and vLLM.

``import bitsmoe_modifier`` is all that is needed to

- read checkpoints with packed experts through ``AutoModelForCausalLM.from_pretrained``,
- find ``BitsMoEModifier`` in llm-compressor recipes.

Both are registered as soon as compressed-tensors and llm-compressor are in the process, before or after this import.
"""

import importlib
import sys
import warnings
from typing import TYPE_CHECKING, Any

from ._after_import import after_import, is_imported
from .errors import BitsMoEError, CalibrationError, CheckpointError, RecipeError

if TYPE_CHECKING:
    from .calibration.modifier import BitsMoEModifier
    from .runtime.experts import BitsMoEExperts

__version__ = "0.1.0"

_LAZY = {"BitsMoEExperts": ".runtime.experts", "BitsMoEModifier": ".calibration.modifier"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _register_loader() -> None:
    from .loading.registration import register

    register()


def _import_modifier() -> None:
    """Import it with llm-compressor, so that recipes find it; a module of ours that waits for llm-compressor first."""
    room = f"{__name__}.calibration."
    busy = [name for name in sys.modules if name.startswith(room) and not is_imported(name)]
    if busy:
        after_import(busy[0], _import_modifier)
        return
    try:
        importlib.import_module(".calibration.modifier", __name__)
    except ImportError as error:  # another release of llm-compressor: it works as without us
        warnings.warn(f"BitsMoEModifier cannot be used in recipes: {error}", stacklevel=2)


def _register_modifier() -> None:
    from llmcompressor.modifiers import ModifierFactory

    from .calibration.modifier import BitsMoEModifier

    ModifierFactory.register("BitsMoEModifier", BitsMoEModifier)


after_import("compressed_tensors", _register_loader)
after_import("llmcompressor", _import_modifier)
# not in the callback above: importing the modifier first imports llm-compressor in the middle of it
after_import(f"{__name__}.calibration.modifier", _register_modifier)

__all__ = [
    "BitsMoEError",
    "BitsMoEExperts",
    "BitsMoEModifier",
    "CalibrationError",
    "CheckpointError",
    "RecipeError",
]
