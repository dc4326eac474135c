"""What the unquantized model and a quantized one write to the same prompts, without both in memory at once.

The unquantized model writes first, and its predictions are kept. The quantized one reads that text, which gives every
token's divergence, and then writes its own.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..storage.records import write_tensors
from .metrics import token_metrics
from .trying import PROMPTS, generate

#: tokens of each text
LENGTH = 32
_FILE = "samples.safetensors"


@dataclass(frozen=True)
class Written:
    """A text of the unquantized model.

    Attributes:
        prompt: what it continues.
        texts: what every token adds.
        ids: of prompt and continuation, int64 ``[n]``.
        logits: that the continuation's tokens were chosen by, float32 ``[tokens, V]``.
    """

    prompt: str
    texts: list[str]
    ids: torch.Tensor
    logits: torch.Tensor


@torch.no_grad()
def write(model: Any, tokenizer: Any, prompts: Sequence[str] = PROMPTS, length: int = LENGTH) -> list[Written]:
    """Let the unquantized model continue prompts by the likeliest token each time.

    Args:
        model: the unquantized model.
        tokenizer: its tokenizer.
        prompts: to continue.
        length: tokens of each text at most.
    """
    found = []
    for prompt in prompts:
        tokens = list(generate(model, None, tokenizer, prompt, length))
        start = tokenizer(prompt, return_tensors="pt").input_ids[0]
        ids = torch.cat([start, torch.tensor([token.id for token in tokens], dtype=torch.int64)])
        logits = _predictions(model, ids, len(tokens))
        found.append(Written(prompt, [token.text for token in tokens], ids, logits))
    return found


@torch.no_grad()
def read(model: Any, tokenizer: Any, written: Sequence[Written]) -> list[dict[str, Any]]:
    """Let a quantized model read the unquantized model's texts and write its own.

    Returns:
        For every prompt, in JSON types: ``prompt``; ``unquantized``, a list of [what the token adds, the KL divergence
        in nats of the quantized model's prediction of it from the unquantized one's]; ``quantized``, a text.
    """
    found = []
    for one in written:
        count = len(one.texts)
        own = "".join(token.text for token in generate(model, None, tokenizer, one.prompt, max(count, 1)))
        klds = token_metrics(_predictions(model, one.ids, count), one.logits, one.ids[len(one.ids) - count :]).kld
        tokens = [[text, round(kld, 6)] for text, kld in zip(one.texts, klds.tolist(), strict=True)]
        found.append({"prompt": one.prompt, "unquantized": tokens, "quantized": own})
    return found


def _predictions(model: Any, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Logits, float32 ``[count, V]`` on the CPU, of the last ``count`` tokens of a text."""
    logits = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0]
    return logits[len(ids) - count - 1 : len(ids) - 1].float().cpu()


def keep_written(written: Sequence[Written], folder: Path) -> None:
    """Keep texts for `kept_written`, in a process that has another model."""
    tensors = {f"{part}.{i}": getattr(one, part) for i, one in enumerate(written) for part in ("ids", "logits")}
    said = json.dumps([[one.prompt, one.texts] for one in written])
    write_tensors(folder / _FILE, tensors, {"texts": said})


def kept_written(folder: Path) -> list[Written]:
    """What `keep_written` kept; none where nothing is."""
    path = folder / _FILE
    if not path.exists():
        return []
    with safe_open(path, framework="pt") as stored:
        texts = json.loads(stored.metadata()["texts"])
        return [
            Written(prompt, pieces, stored.get_tensor(f"ids.{i}"), stored.get_tensor(f"logits.{i}"))
            for i, (prompt, pieces) in enumerate(texts)
        ]
