"""Texts of both models, side by side, the unquantized one's coloured by how far the other's predictions are from it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ..evaluation.trying import LARGE, NOTICED

#: what the classes of tokens mean
EXPLAINED = (
    "Every model continues the prompt by its likeliest token each time. The unquantized model's tokens are marked "
    f"where the quantized one predicts another distribution: dotted where the KL divergence is above {NOTICED} nats, "
    f"solid above {LARGE}."
)


@dataclass(frozen=True)
class Piece:
    """A token of the unquantized model's text: what it adds, how it is marked, and its divergence in words."""

    text: str
    mark: str
    said: str


@dataclass(frozen=True)
class Continuation:
    """What a run writes, and how far its predictions are from the unquantized model's on that one's text."""

    name: str
    text: str
    kld: str


@dataclass(frozen=True)
class SampleView:
    """One prompt: the unquantized model's text, marked by the first run, and what every run writes."""

    prompt: str
    pieces: list[Piece]
    runs: list[Continuation]


def sample_views(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[SampleView]:
    """Views of `evaluation.samples.read`'s texts.

    Args:
        runs: name -> what `read` returned for it, or nothing; the first one's divergences mark the tokens.
    """
    written = {name: samples for name, samples in runs.items() if samples}
    if not written:
        return []
    views = []
    for place, first in enumerate(next(iter(written.values()))):
        pieces = _pieces(first["unquantized"])
        rest = [
            Continuation(name, _shown(sample["quantized"]), f"{1000 * _mean(sample):.2f}")
            for name, samples in written.items()
            for sample in samples[place : place + 1]
        ]
        views.append(SampleView(first["prompt"], pieces, rest))
    return views


def _pieces(tokens: Sequence[tuple[str, float]]) -> list[Piece]:
    """Tokens that together read as `_shown` shows a whole text: several line breaks take one line there."""
    pieces: list[Piece] = []
    broken = False  # whether the line has just ended
    for text, kld in tokens:
        shown = _shown(text.lstrip(" \t\r\n") if broken else text)
        pieces.append(Piece(shown, _mark(kld), f"{kld:.3f} nats"))
        broken = shown.endswith("\n") or (broken and not shown)
    return pieces


def _shown(text: str) -> str:
    """A text whose line breaks can be seen, and take no more than one line."""
    return re.sub(r"[ \t]*(\r?\n[ \t]*)+", "⏎\n", text)


def _mark(kld: float) -> str:
    return "" if kld < NOTICED else "off" if kld < LARGE else "far"


def _mean(sample: Mapping[str, Any]) -> float:
    return fmean(kld for _, kld in sample["unquantized"]) if sample["unquantized"] else 0.0
