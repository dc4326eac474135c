"""What transformers makes of a checkpoint, and the comparison of vLLM's answers with it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from engines import PROMPTS, TOKENS, TOLERANCE, Generated

from helpers import load


@dataclass(frozen=True)
class Expected:
    """Greedy continuations of `PROMPTS` in float32.

    Attributes:
        tokens: the continuation of each.
        logprobs: for each, ``[tokens, V]`` of what follows every token of prompt and continuation.
    """

    tokens: list[list[int]]
    logprobs: list[torch.Tensor]


def expected(folder: Path) -> Expected:
    """Ask transformers. To be called before vLLM serves the folder: its Transformers backend changes their classes."""
    model = load(folder, dtype=torch.float32)
    tokens, logprobs = [], []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        for _ in range(TOKENS):
            ids = torch.cat([ids, _logprobs(model, ids)[-1].argmax()[None, None]], 1)
        tokens.append(ids[0, len(prompt) :].tolist())
        logprobs.append(_logprobs(model, ids))
    return Expected(tokens, logprobs)


def check(found: list[Generated], wanted: Expected) -> None:
    """Tokens equal, log-probabilities within `TOLERANCE`."""
    assert [one.tokens for one in found] == wanted.tokens
    for generated, logprobs in zip(found, wanted.logprobs, strict=True):
        for place, reported in enumerate(generated.logprobs):
            for token, logprob in reported.items():
                assert abs(logprob - float(logprobs[place, token])) < TOLERANCE


@torch.no_grad()
def _logprobs(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits[0].float().log_softmax(-1)
