"""Which tokens of a calibration batch are padding: the experts see them, the statistics must not.

Experts get the tokens of a batch as rows, without its attention mask. llm-compressor's pipelines differ in how a batch
reaches them: the basic one calls the model with it; the sequential ones read all batches into a cache first, in an
order of their own (its loaders shuffle each time anew), and say which one is in the model. `install` makes the cache
remember the masks.
"""

from collections.abc import Mapping
from typing import Any

import torch
from llmcompressor.core import active_session
from llmcompressor.pipelines.cache import IntermediatesCache

from ..errors import CalibrationError

#: of the batches that were read into a cache last, in its order
_latest: list[torch.Tensor | None] = []


def mask_of(batch: Mapping[str, Any]) -> torch.Tensor | None:
    """The tokens of a batch that are text, bool ``[tokens]``; None where all are, or no mask of tokens is there."""
    mask = batch.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.dim() > 2:
        return None
    kept = mask.flatten() != 0
    return None if bool(kept.all()) else kept.cpu()


def text_rows(mask: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor | None:
    """Which rows of ``[n, …]`` are text; n is a multiple of the batch's tokens where every expert got its own copy.

    Raises:
        CalibrationError: when the rows are not the tokens of the batch.
    """
    if mask is None:
        return None
    copies, rest = divmod(len(rows), len(mask))
    if rest or not copies:
        raise CalibrationError(
            f"experts got {len(rows)} rows of a batch of {len(mask)} tokens with padding: which of them are padding is "
            "not known; calibrate with rows of one length"
        )
    return mask.repeat(copies).to(rows.device)


class Padding:
    """The mask of the batch that is in the model now."""

    def __init__(self) -> None:
        self._called = False
        self._mask: torch.Tensor | None = None

    def begin(self, _model: Any, _args: Any, kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook of the whole model, for pipelines that call it."""
        self._called, self._mask = True, mask_of(kwargs)

    def mask(self) -> torch.Tensor | None:
        """As `mask_of` gives it."""
        if self._called:
            return self._mask
        number = active_session().state.current_batch_idx
        return _latest[number] if 0 <= number < len(_latest) else None


def install() -> None:
    """Make caches of batches remember their masks; does nothing the second time."""
    original: Any = IntermediatesCache.from_dataloader.__func__  # type: ignore[attr-defined]
    if getattr(original, "remembers_masks", False):
        return

    def from_dataloader(cls: Any, *args: Any, **kwargs: Any) -> Any:
        cache = original(cls, *args, **kwargs)
        count = len(cache.batch_intermediates)
        _latest[:] = [mask_of(cache.fetch(number, ["attention_mask"])) for number in range(count)]
        return cache

    from_dataloader.remembers_masks = True  # type: ignore[attr-defined]
    IntermediatesCache.from_dataloader = classmethod(from_dataloader)  # type: ignore[method-assign, assignment]


install()
