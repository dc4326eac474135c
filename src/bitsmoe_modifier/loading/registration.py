"""Putting the loader into transformers so that nobody else notices.

Checkpoints with packed experts go to `BitsMoEHfQuantizer`; every other one goes to the class that was there before, as
if this package were not installed. Where a library's version is not known, or names that the loader needs are gone,
only the first kind changes: those checkpoints are refused, with the reason.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from .claims import METHOD, is_bitsmoe
from .versions import SUPPORTED, installed, unsupported_versions

_KEY = "compressed-tensors"


def register() -> None:
    """Make ``from_pretrained`` load checkpoints with packed experts, or refuse them; a second call does no harm."""
    reason = unsupported_versions()
    if not reason:
        try:
            # the format must be known before config.json is read; the quantizer is needed later, and imported here to
            # see whether it can be
            importlib.import_module(".format", __package__)
            importlib.import_module(".quantizer", __package__)
            _dispatch()
        except (ImportError, AttributeError, TypeError, ValueError, KeyError) as error:
            versions = " and ".join(f"{package.replace('_', '-')} {installed(package)[0]}" for package in SUPPORTED)
            reason = f"the loader of bitsmoe-modifier does not work with {versions} ({error})"
    if reason:
        refuse_checkpoints(f"{reason}; install versions that it supports, or a newer bitsmoe-modifier")


def _dispatch() -> None:
    """Choose by checkpoint: ours, or the class that transformers, or another plugin, had put there."""
    auto: Any = importlib.import_module("transformers.quantizers.auto")
    stock: Any = auto.AUTO_QUANTIZER_MAPPING[_KEY]
    if getattr(stock, "is_bitsmoe_dispatch", False):
        return

    class Dispatch(stock):  # a class, because others may ask for its attributes or derive from it
        """Makes the quantizer that a checkpoint needs; there are no instances of this class itself."""

        is_bitsmoe_dispatch = True

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            if cls is not Dispatch:  # somebody's own class
                return super().__new__(cls)
            if not any(map(_has_packed_experts, (*args, *kwargs.values()))):
                return stock(*args, **kwargs)
            from .quantizer import BitsMoEHfQuantizer

            return BitsMoEHfQuantizer(*args, **kwargs)

    auto.AUTO_QUANTIZER_MAPPING[_KEY] = Dispatch


def _has_packed_experts(quantization_config: Any) -> bool:
    """Whether transformers' ``CompressedTensorsConfig`` has a config group in our format."""
    parsed = getattr(quantization_config, "quantization_config", None)
    groups = getattr(parsed, "config_groups", None) or {}
    return any(getattr(scheme, "format", None) == METHOD for scheme in groups.values())


def refuse_checkpoints(reason: str) -> None:
    """Let transformers raise ``reason`` for checkpoints with packed experts, before anything of theirs is parsed."""
    try:
        mapping: Any = importlib.import_module("transformers.quantizers.auto").AUTO_QUANTIZATION_CONFIG_MAPPING
        stock: Any = mapping[_KEY]
    except (ImportError, AttributeError, KeyError):
        return  # no place to say why; readers refuse a format that they do not know

    def check(config: Any) -> None:
        if isinstance(config, Mapping) and is_bitsmoe(
            {"quant_method": _KEY, **config.get("quantization_config", config)}
        ):
            raise CheckpointError(f"this checkpoint's experts are packed as {METHOD}: {reason}")

    class Refusal(stock):
        """Reads every configuration but ours as the stock class does, into an instance of that class."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            if cls is not Refusal:
                return super().__new__(cls)
            check(kwargs)
            return stock(*args, **kwargs)

        @classmethod
        def from_dict(cls, config_dict: Any, *args: Any, **kwargs: Any) -> Any:
            check(config_dict)
            if cls is not Refusal:
                return super().from_dict(config_dict, *args, **kwargs)
            return stock.from_dict(config_dict, *args, **kwargs)

    mapping[_KEY] = Refusal
