"""Fallbacks that numerical trouble made necessary, in words for the user.

A pure function that falls back says so by `note`; whoever reports on a layer collects what was said meanwhile. Trouble
that shows only in what is stored is found there (`stored_trouble`). Every note ends with a remedy.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import torch

from ..storage.packed import PackedExperts
from ..storage.steps import GREATEST_STEP, LEAST_STEP, step_values

#: Share of the steps that may be the smallest before it is worth a word: those of zeros are.
_FEW = 0.01
#: Share of a layer's output power that rounding may lose before it is worth a word.
_LOST = 0.5

_collecting: ContextVar[list[str] | None] = ContextVar("_collecting", default=None)


def note(text: str) -> None:
    """Say what was done instead, once; nobody hears it outside of `collected`."""
    notes = _collecting.get()
    if notes is not None and text not in notes:
        notes.append(text)


@contextlib.contextmanager
def collected(notes: list[str]) -> Iterator[None]:
    """Add what is said inside to ``notes``."""
    token = _collecting.set(notes)
    try:
        yield
    finally:
        _collecting.reset(token)


def all_finite(tensor: torch.Tensor) -> torch.Tensor:
    """Whether no element is NaN or infinite: a bool scalar on the tensor's device.

    Least and greatest element show either, in one pass without the mask of the tensor's size that `torch.isfinite`
    makes (on a CPU twenty times faster).
    """
    if not tensor.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    low, high = torch.aminmax(tensor)
    return torch.isfinite(low) & torch.isfinite(high)


def stored_trouble(packed: PackedExperts, tokens_per_expert: Sequence[int], output_error: float | None) -> list[str]:
    """What the stored tensors of a layer, and the tokens it was calibrated with, show of trouble.

    Args:
        packed: the layer.
        tokens_per_expert: calibration tokens of each of its experts.
        output_error: of the rounded layer, relative to its output's power; None where that was not what its bits were
            to keep small, but its share in the loss of the whole model.
    """
    found = []
    unseen = [expert for expert, count in enumerate(tokens_per_expert) if count == 0]
    if unseen:
        named = ", ".join(map(str, unseen[:8])) + (", …" if len(unseen) > 8 else "")
        those = (
            "1 expert got no calibration tokens and uses"
            if len(unseen) == 1
            else (f"{len(unseen)} experts got no calibration tokens and use")
        )
        found.append(
            f"{those} the layer's average ({named}); calibrate with more text, or with text that reaches "
            + ("it" if len(unseen) == 1 else "them")
        )
    steps = step_values(torch.cat([packed.steps_in, packed.steps_out]))
    above, below = int((steps >= GREATEST_STEP).sum()), int((steps <= LEAST_STEP).sum())
    if above:
        found.append(
            f"{above} of {len(steps)} steps were cut to {GREATEST_STEP:.0f}, the largest that is stored, their weights "
            "with them; "
            "keep the experts with the outliers dense by `super_experts`, or add the layer to `ignore`"
        )
    if below > _FEW * len(steps):
        found.append(
            f"{below} of {len(steps)} steps were raised to {LEAST_STEP:.1e}, the smallest that is stored; if the "
            "layer's error is large, add it to `ignore`"
        )
    if output_error is not None and output_error > _LOST:
        found.append(
            f"rounding loses {100 * output_error:.0f} % of the layer's output power; raise `bits`, or add the layer to "
            "`ignore`"
        )
    return found
