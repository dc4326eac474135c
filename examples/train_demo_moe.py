#!/usr/bin/env python
"""Train a small mixture-of-experts language model from nothing but a Python installation.

The project ships one such model ("docmoe") so that every example, test and demo has real, trained experts to
quantize without a download. Everything it is made of is made here, in five steps:

1. **collect** documentation that every Python carries: the topics of ``pydoc_data`` and the docstrings of the standard
   library, read with :mod:`ast` (no module is imported). ``--text FILE ...`` takes text files in their place;
2. **split** by module: a stable hash of the name sends about 8 % of the modules to the held-out side;
3. **tokenize**: a byte-level BPE trained on the training side;
4. **train** a Qwen3-MoE, Mixtral or DeepSeek-V3 model, with a load-balancing loss in every layer that lets experts
   specialize but leaves none idle;
5. **write** the model folder ``--out DIR`` and, next to it, ``DIR_calibration.txt``, ``DIR_heldout.txt`` and
   ``DIR_continuations.jsonl`` (multiple-choice items made of the held-out text).

The shipped assets were made with::

    python examples/train_demo_moe.py --out src/bitsmoe_modifier/assets/docmoe

A run is determined by its arguments, the Python version (whose documentation it reads) and the arithmetic of the
machine; the sides of the split depend on module names only.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from demo_moe.card import PSF_NOTE, Report
from demo_moe.choices import continuation_accuracy, make_continuations
from demo_moe.documents import Document, excerpt, file_documents, split, stdlib_documents
from demo_moe.training import (
    BALANCE_COEFFICIENT,
    HEAD_DIM,
    WEIGHT_DECAY,
    Shape,
    encode,
    evaluate,
    make_config,
    train,
    train_tokenizer,
)

CALIBRATION_BYTES = 340_000
HELD_OUT_BYTES = 150_000
CONTINUATIONS = 400


def neighbour(out: Path, suffix: str) -> Path:
    """The file next to the model folder that carries its name: ``out`` + ``suffix``."""
    return out.with_name(out.name + suffix)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model in bfloat16 and the tokenizer, in the layout the hub uses for the architecture."""
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def write_texts(
    out: Path, train_side: Sequence[Document], held_out: Sequence[Document], seed: int
) -> tuple[str, list[dict]]:
    """Write calibration text, held-out text and continuations beside ``out``; return the latter two."""
    neighbour(out, "_calibration.txt").write_text(excerpt(train_side, CALIBRATION_BYTES), encoding="utf-8")
    text = excerpt(held_out, HELD_OUT_BYTES)
    neighbour(out, "_heldout.txt").write_text(text, encoding="utf-8")
    items = make_continuations(held_out, CONTINUATIONS, seed)
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    neighbour(out, "_continuations.jsonl").write_text(lines, encoding="utf-8")
    return text, items


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line; the defaults are the shipped model's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="model folder; the texts go next to it")
    parser.add_argument("--arch", choices=("qwen3_moe", "mixtral", "deepseek_v3"), default=Shape.arch)
    parser.add_argument(
        "--text", type=Path, nargs="+", metavar="FILE", help="train on these files, not on Python's docs"
    )
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="use this tokenizer in place of training one")
    parser.add_argument("--vocab", type=int, default=2048, help="entries of the tokenizer to train")
    parser.add_argument("--hidden", type=int, default=Shape.hidden, help=f"hidden size, a multiple of {2 * HEAD_DIM}")
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--experts", type=int, default=Shape.experts, help="experts per layer")
    parser.add_argument("--topk", type=int, default=Shape.topk, help="experts per token")
    parser.add_argument("--intermediate", type=int, default=Shape.intermediate, help="channels of one expert")
    parser.add_argument(
        "--seq", type=int, default=Shape.seq, help="tokens per training window, and the model's maximum"
    )
    parser.add_argument("--batch", type=int, default=2, help="windows per step")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument(
        "--balance",
        type=float,
        default=BALANCE_COEFFICIENT,
        help="weight of the load-balancing loss per layer; the default is what large models are trained with, 0.02 "
        "keeps all experts equally busy",
    )
    parser.add_argument(
        "--decay",
        type=float,
        default=WEIGHT_DECAY,
        help="AdamW's weight decay. A large model's training forgets its random start (learning rate x decay x steps "
        "is far above 1); a short one needs a decay as large as the default for that",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    if args.hidden % (2 * HEAD_DIM):
        parser.error(f"--hidden must be a multiple of {2 * HEAD_DIM}")
    return args


def main(argv: Sequence[str] | None = None) -> Report:
    """Collect, split, tokenize, train, write, evaluate what was written; return the findings."""
    args = parse_args(argv)
    arguments = sys.argv[1:] if argv is None else argv
    shape = Shape(args.arch, args.hidden, args.layers, args.experts, args.topk, args.intermediate, args.seq)
    torch.manual_seed(args.seed)

    train_side, held_out = split(file_documents(args.text) if args.text else stdlib_documents())
    args.out.mkdir(parents=True, exist_ok=True)
    held_out_text, items = write_texts(args.out, train_side, held_out, args.seed)

    texts = [document.text for document in train_side]
    if args.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    else:
        tokenizer = train_tokenizer(texts, args.vocab, shape.seq)
    ids = encode(tokenizer, train_side)

    model = AutoModelForCausalLM.from_config(make_config(shape, tokenizer), experts_implementation="grouped_mm")
    model.to(args.device)
    began = time.monotonic()
    train(
        model,
        ids,
        steps=args.steps,
        batch=args.batch,
        seq=shape.seq,
        lr=args.lr,
        seed=args.seed,
        balance=args.balance,
        decay=args.decay,
    )
    seconds = time.monotonic() - began
    save(model, tokenizer, args.out)

    saved = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(args.device)
    held_out_ids = torch.tensor(tokenizer(held_out_text, verbose=False).input_ids)
    perplexity, usage = evaluate(saved, held_out_ids, shape.seq)
    report = Report(
        command=f"python examples/train_demo_moe.py {shlex.join(map(str, arguments))}",
        source="the text files given"
        if args.text
        else "the topics of `pydoc_data` and the standard library's docstrings",
        units="block of some 4,000 characters" if args.text else "module",
        tokenizer=f"the tokenizer of `{args.tokenizer.name}`"
        if args.tokenizer
        else "a tokenizer trained on the same text",
        licence="That of the texts it was trained on." if args.text else PSF_NOTE,
        parameters=sum(parameter.numel() for parameter in saved.parameters()),
        train_tokens=len(ids),
        train_bytes=sum(len(text.encode()) for text in texts),
        steps=args.steps,
        seconds=seconds,
        perplexity=perplexity,
        bits=math.log2(perplexity) * len(held_out_ids) / len(held_out_text.encode()),
        accuracy=continuation_accuracy(saved, tokenizer, items),
        items=len(items),
        usage=usage,
    )
    (args.out / "README.md").write_text(report.card(args.out.name, shape), encoding="utf-8")
    print(
        f"held-out perplexity {perplexity:.2f} ({report.bits:.3f} bits per byte), continuations "
        f"{report.accuracy[0]:.3f} and {report.accuracy[1]:.3f}, tokens per expert {usage.min()} to {usage.max()}"
    )
    return report


if __name__ == "__main__":
    main()
