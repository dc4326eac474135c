"""Text of a quantized model, with the distance of every token's prediction from the unquantized model's."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import BitsMoEError
from .metrics import token_metrics

#: shown where no prompt is given
PROMPTS = (
    "The history of the city begins",
    "Three things to remember when writing a program:",
    "She opened the door and",
)
#: a divergence in nats below which nobody would notice, and above which the text may go elsewhere
NOTICED, LARGE = 0.02, 0.2


@dataclass(frozen=True)
class Token:
    """A generated token.

    Attributes:
        id: of the vocabulary.
        text: what it adds to the text.
        kld: KL(P ‖ Q) in nats of the prediction that it was chosen by, P the unquantized model's; None without one.
    """

    id: int
    text: str
    kld: float | None


@torch.no_grad()
def generate(model: Any, dense: Any | None, tokenizer: Any, prompt: str, length: int) -> Iterator[Token]:
    """Continue a prompt by the likeliest token each time, until the model ends it.

    Args:
        model: the quantized model, which chooses.
        dense: the unquantized model, which reads the same text beside it; None for no divergences.
        tokenizer: of both.
        prompt: to continue.
        length: tokens at most.

    Raises:
        BitsMoEError: when the prompt is no token, and the tokenizer puts none before it.
    """
    given = tokenizer(prompt)["input_ids"]
    if not given:
        raise BitsMoEError(f"--prompt {prompt!r} has no token that could be continued; write a word at least")
    ids = torch.tensor([given], device=model.device)
    ends = _ends(model)
    caches: list[Any] = [None, None]
    written: list[int] = []
    # decoded with the prompt: some tokenizers leave out the space before the first word of what they decode
    step, said = ids, tokenizer.decode(given)
    for _ in range(length):
        logits = _next_logits(model, step, caches, 0)
        chosen = int(logits.argmax())
        kld = None
        if dense is not None:
            theirs = _next_logits(dense, step.to(dense.device), caches, 1).to(logits.device)
            kld = float(token_metrics(logits[None], theirs[None], torch.tensor([chosen], device=logits.device)).kld)
        if chosen in ends:
            return
        written.append(chosen)
        whole = tokenizer.decode([*given, *written])
        # a character may take several tokens; it is said with the last of them
        text = "" if whole.endswith("\ufffd") else whole[len(said) :]
        said = whole if text else said
        yield Token(chosen, text, kld)
        step = torch.tensor([[chosen]], device=model.device)


def _next_logits(model: Any, step: torch.Tensor, caches: list[Any], which: int) -> torch.Tensor:
    """Logits ``[V]`` of the next token, by a model and its cache of all tokens before ``step``."""
    made = model(input_ids=step, past_key_values=caches[which], use_cache=True)
    caches[which] = made.past_key_values
    return made.logits[0, -1]


def _ends(model: Any) -> set[int]:
    """Tokens that end a text."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return set(found) if isinstance(found, (list, tuple)) else set() if found is None else {int(found)}
