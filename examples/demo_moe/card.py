"""What a run of the trainer found out about its model, as the model folder's README.md."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch
import transformers

from .training import Shape

PSF_NOTE = """The texts are documentation of Python, copyright Python Software Foundation, under the PSF License
Agreement; see `NOTICE` in the folder above. Weights and tokenizer are derived from them and carry the same notice."""


@dataclass(frozen=True)
class Report:
    """What a run found out about its model.

    ``perplexity`` is per token and ``bits`` per UTF-8 byte of held-out text, ``accuracy`` as `continuation_accuracy`
    returns it, ``usage`` the held-out tokens of each expert [layers, experts], ``seconds`` the training's; ``source``,
    ``units`` (of the split) and ``tokenizer`` say what it was made of.
    """

    command: str
    source: str
    units: str
    tokenizer: str
    licence: str
    parameters: int
    train_tokens: int
    train_bytes: int
    steps: int
    seconds: float
    perplexity: float
    bits: float
    accuracy: tuple[float, float]
    items: int
    usage: torch.Tensor

    def card(self, name: str, shape: Shape) -> str:
        """The model folder's README.md."""
        layers = "\n".join(
            f"| {layer} | {counts.min().item()} | {counts.max().item()} | {counts.sum().item() / len(counts):.0f} |"
            for layer, counts in enumerate(self.usage)
        )
        return f"""# {name}

A small mixture-of-experts language model: {shape.arch}, {shape.layers} layers, {shape.experts} experts of
{shape.intermediate} channels, top-{shape.topk}, hidden size {shape.hidden}, {self.parameters:,} parameters in bfloat16.
It is big enough to have real, trained experts that 2-bit quantization can harm, and small enough to ship. It is a test
piece, not a language model for use.

## How it was made

Trained from scratch on {self.source} ({self.train_bytes:,} bytes, {self.train_tokens:,} tokens;
{self.steps} steps, {self.seconds / 60:.1f} minutes), with {self.tokenizer}, by

    {self.command}

with Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}.
The script writes this folder and, beside it, `{name}_calibration.txt` (training side), `{name}_heldout.txt` and
`{name}_continuations.jsonl` (held-out side, {self.items} multiple-choice items). The split is by {self.units}.

## What it does

On `{name}_heldout.txt`, in windows of {shape.seq} tokens, with the weights as saved and arithmetic in float32:

| | |
|---|---|
| perplexity per token | {self.perplexity:.2f} |
| bits per byte | {self.bits:.3f} |
| `{name}_continuations.jsonl` by log p(ending given context) per character (chance 0.25) | {self.accuracy[0]:.3f} |
| the same by log p(ending given context) - log p(ending) | {self.accuracy[1]:.3f} |

Tokens received by an expert of each mixture-of-experts layer on that text:

| layer | min | max | mean |
|---|---|---|---|
{layers}

## Licence

{self.licence}
"""
