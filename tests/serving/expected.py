"""What transformers makes of a checkpoint, and the comparison of vLLM's answers with it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from engines import PROMPTS, TOKENS, TOLERANCE, Generated

from helpers import load

#: random prompts of which `clear` takes some, and tokens of each
_DRAWN, _LENGTH = 512, 7
#: By how many times transformers' own error in bfloat16 vLLM's may be off there; half of the lead of the chosen token.
_TIMES = 3


@dataclass(frozen=True)
class Expected:
    """Greedy continuations of some prompts, in float32.

    Attributes:
        prompts: ids of each.
        tokens: the continuation of each.
        logprobs: for each, ``[tokens, V]`` of what follows every token of prompt and continuation.
        tolerances: for each, by how much vLLM's log-probabilities may differ.
        first: place of the first of these that are compared.
    """

    prompts: list[list[int]]
    tokens: list[list[int]]
    logprobs: list[torch.Tensor]
    tolerances: list[float]
    first: int = 0


def expected(folder: Path, dtype: str = "float32") -> Expected:
    """Ask transformers. To be called before vLLM serves the folder: its Transformers backend changes their classes.

    Args:
        folder: the checkpoint.
        dtype: that vLLM runs it in. Of bfloat16 only what rounding does not turn over can be compared: continuations
            that are `clear`.
    """
    model = load(folder, dtype=torch.float32)
    if dtype != "float32":
        prompts = torch.randint(3, 96, (_DRAWN, _LENGTH), generator=torch.Generator().manual_seed(0))
        return clear(model, load(folder, dtype=getattr(torch, dtype)), prompts)
    tokens, logprobs = [], []
    for prompt in PROMPTS:
        ids = greedy(model, torch.tensor([prompt]))
        tokens.append(ids[0, len(prompt) :].tolist())
        logprobs.append(_logprobs(model, ids)[0])
    return Expected(PROMPTS, tokens, logprobs, [TOLERANCE] * len(PROMPTS))


def clear(model: torch.nn.Module, rounded: torch.nn.Module, prompts: torch.Tensor, **inputs: Any) -> Expected:
    """The prompts whose greedy tokens stand out most from what rounding to bfloat16 changes.

    Args:
        model: in float32.
        rounded: the same in bfloat16. Its error, of the five likeliest tokens at every place of the continuation, in
            the median of all prompts, times `_TIMES` is the tolerance; every greedy token has to lead by twice that.
        prompts: ids ``[n, tokens]``.
        inputs: those beside the ids, of images.
    """
    start = prompts.shape[1]
    ids = greedy(model, prompts, **inputs)
    logprobs = _logprobs(model, ids, **inputs)
    exact, other = (found[:, start - 1 : -1] for found in (logprobs, _logprobs(rounded, ids, **inputs)))
    top = exact.topk(2).values
    lead = (top[..., 0] - top[..., 1]).amin(1)
    tolerance = _TIMES * float((exact - other).gather(2, exact.topk(5).indices).abs().amax((1, 2)).median())
    chosen = lead.topk(len(PROMPTS)).indices
    assert bool((lead[chosen] > 2 * tolerance).all()), "too few continuations are clear: draw more"
    tokens = ids[chosen, start:].tolist()
    found = [logprobs[n] for n in chosen.tolist()]
    return Expected(prompts[chosen].tolist(), tokens, found, [tolerance] * len(chosen), start - 1)


@torch.no_grad()
def greedy(model: torch.nn.Module, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Prompts ``[n, tokens]`` with their greedy continuation; ``inputs`` are those beside the ids, of images."""
    for _ in range(TOKENS):
        ids = torch.cat([ids, _logits(model, ids, **inputs)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


def check(found: list[Generated], wanted: Expected) -> None:
    """Tokens equal, log-probabilities within the tolerance."""
    assert [one.tokens for one in found] == wanted.tokens
    for generated, logprobs, tolerance in zip(found, wanted.logprobs, wanted.tolerances, strict=True):
        for place, reported in enumerate(generated.logprobs):
            if place >= wanted.first:
                for token, logprob in reported.items():
                    assert abs(logprob - float(logprobs[place, token])) < tolerance


def _logprobs(model: torch.nn.Module, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    return _logits(model, ids, **inputs).float().log_softmax(-1)


@torch.no_grad()
def _logits(model: torch.nn.Module, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    kinds = inputs.get("mm_token_type_ids")
    if kinds is not None:  # what follows is text
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(kinds, (0, ids.shape[1] - kinds.shape[1]))
    pixels = inputs.get("pixel_values")
    if pixels is not None:
        inputs["pixel_values"] = pixels.to(model.dtype)
    return model(input_ids=ids, **inputs).logits
