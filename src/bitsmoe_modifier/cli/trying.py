"""``bitsmoe try``: what a checkpoint writes, beside the unquantized model."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import check_at_least
from . import options as o
from .app import command


@command(
    "try",
    "Let a checkpoint write, beside the unquantized model.",
    "bitsmoe try docmoe-2bit --model src/bitsmoe_modifier/assets/docmoe",
    'bitsmoe try qwen3-2bit --model Qwen/Qwen3-30B-A3B --prompt "The capital of France" --length 100',
    options=o.COMPUTING,
)
def try_(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Folder of the quantized model.")],
    model: Annotated[
        str | None,
        typer.Option(metavar="DIR|ID", help="The unquantized model; without it, there is nothing to compare with."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="To continue; may be given several times.")
    ] = None,
    length: Annotated[int, typer.Option(metavar="N", help="Tokens to write.")] = 60,
    *,
    device: str,
    dtype: str,
    verbose: bool,
) -> None:
    """Continue prompts by the likeliest token each time.

    With --model, the unquantized model reads what the checkpoint writes, and every token has the colour of the KL
    divergence between both predictions: green below 0.02 nats, yellow below 0.2, red above. What the unquantized model
    itself would have written follows below. Without colours (NO_COLOR, or no terminal), tokens above 0.2 nats are
    marked by their divergence in brackets.
    """
    check_at_least(1, length=length)
    from ..comparison.trying import load_both
    from ..evaluation.trying import LARGE, NOTICED, PROMPTS, generate

    coloured = sys.stdout.isatty() and o.colours_wanted()
    ours, dense, tokenizer = load_both(checkpoint, model, device, dtype, verbose)
    for text in prompt or PROMPTS:
        print(f"{text}", end="", flush=True)
        klds = []
        for token in generate(ours, dense, tokenizer, text, length):
            if token.kld is None:
                print(token.text, end="", flush=True)
                continue
            klds.append(token.kld)
            if coloured:
                colour = "green" if token.kld < NOTICED else "yellow" if token.kld < LARGE else "red"
                print(typer.style(token.text, fg=colour), end="", flush=True)
            else:
                print(token.text + (f"[{token.kld:.2f}]" if token.kld >= LARGE else ""), end="", flush=True)
        print()
        if dense is not None:
            theirs = "".join(token.text for token in generate(dense, None, tokenizer, text, length))
            print(f"  {Path(str(model)).name} writes: {text}{theirs}")
            mean = sum(klds) / len(klds) if klds else 0.0
            print(f"  KL divergence: mean {mean:.4f}, largest {max(klds, default=0.0):.3f} nats")
        print()
