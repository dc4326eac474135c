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
import ast
import hashlib
import inspect
import json
import math
import platform
import random
import re
import shlex
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
HEAD_DIM = 32
HELD_OUT_PERCENT = 8
BALANCE_COEFFICIENT = 0.001
WEIGHT_DECAY = 1.0
CALIBRATION_BYTES = 340_000
HELD_OUT_BYTES = 150_000
CONTINUATIONS = 400
REPEATABLE = 40
DOCUMENT_GAP = "\n\n\n"

# Folders without documentation worth reading (`encodings` is machine-written one-liners) or that are not Python's own.
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "site-packages", "dist-packages"}
)
# A module with terms of its own, or by a copyright holder who has not licensed it to the PSF, is left out: shipping its
# text would take more notices than the PSF's.
COPYRIGHT_LINE = re.compile(
    r"copyright\W+(?:\(c\)\W*)?(?:\d{4}|cnri|disney)(?!.*python software foundation)", re.IGNORECASE
)
OWN_TERMS = re.compile(
    r"permission to use, copy|permission is hereby granted|redistribution and use|mit licen[cs]e|spdx-license",
    re.IGNORECASE,
)
LICENSED_TO_PSF = re.compile(r"licensed to (?:the )?psf", re.IGNORECASE)

PLAIN_WORD = re.compile(r"[(\"'“‘]*[A-Za-z]+(?:[-'’][A-Za-z]+)*[)\"'”’,.;:!?]*")
DOTTED_NAME = re.compile(r"[A-Za-z_]\.[A-Za-z_]")

PSF_NOTE = """The texts are documentation of Python, copyright Python Software Foundation, under the PSF License
Agreement; see `NOTICE` in the folder above. Weights and tokenizer are derived from them and carry the same notice."""


@dataclass(frozen=True)
class Document:
    """One unit of the split: a module (or a topic, or a block of a text file) and its text."""

    name: str
    text: str


@dataclass(frozen=True)
class Shape:
    """Shape of the model. ``hidden`` is a multiple of 2 * HEAD_DIM; ``seq`` is the training length in tokens."""

    arch: str = "qwen3_moe"
    hidden: int = 128
    layers: int = 2
    experts: int = 32
    topk: int = 4
    intermediate: int = 128
    seq: int = 512


# ---------------------------------------------------------------------------------------------------------------------
# 1. Collect
# ---------------------------------------------------------------------------------------------------------------------


def docstrings(source: str) -> list[tuple[str, str]]:
    """(qualified name, cleaned docstring) of the module, classes and functions in ``source``, in source order."""
    found: list[tuple[str, str]] = []

    def visit(node: ast.AST, path: str) -> None:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if not isinstance(node, ast.Module):
                path = f"{path}.{node.name}" if path else node.name
            text = ast.get_docstring(node, clean=False)
            if text and (cleaned := inspect.cleandoc(text).strip()):
                found.append((path, cleaned))
        for child in ast.iter_child_nodes(node):
            visit(child, path)

    visit(ast.parse(source), "")
    return found


def is_shippable(source: str) -> bool:
    """Whether the module's text is under the PSF licence alone, going by the copyright and licence lines it carries."""
    if OWN_TERMS.search(source):
        return False
    return not COPYRIGHT_LINE.search(source) or bool(LICENSED_TO_PSF.search(source))


def stdlib_sources(root: Path) -> Iterator[tuple[str, str]]:
    """(dotted module name, source) of the standard library's documented Python files, in name order."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts) or not all(part.isidentifier() for part in relative.parts[:-1]):
            continue
        parts = relative.with_suffix("").parts
        source = path.read_text(encoding="utf-8", errors="replace")
        if is_shippable(source):
            yield ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts), source


def drop_seen(text: str, seen: set[str]) -> str:
    """``text`` without the paragraphs already in ``seen``, which grows by the paragraphs kept.

    Paragraphs shorter than ``REPEATABLE`` characters ("For example:") may repeat. Whitespace is not compared.
    """
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        key = " ".join(paragraph.split())
        if len(key) < REPEATABLE or key not in seen:
            seen.add(key)
            kept.append(paragraph)
    return "\n\n".join(kept).strip()


def stdlib_documents(root: Path | None = None) -> list[Document]:
    """Documentation of this Python: one document per topic of ``pydoc_data``, one per module with docstrings.

    Repeated docstrings and repeated paragraphs are kept once, so the two sides of the split share none.
    """
    from pydoc_data.topics import topics

    paragraphs: set[str] = set()
    documents = [
        Document(f"topic:{name}", drop_seen(text.strip(), paragraphs)) for name, text in sorted(topics.items())
    ]
    seen: set[str] = set()
    for module, source in stdlib_sources(root or Path(sysconfig.get_paths()["stdlib"])):
        sections = []
        for name, text in docstrings(source):
            if text not in seen and (fresh := drop_seen(text, paragraphs)):
                sections.append(f"{module}.{name}\n\n{fresh}" if name else f"module {module}\n\n{fresh}")
            seen.add(text)
        if sections:
            documents.append(Document(module, "\n\n".join(sections)))
    return [document for document in documents if document.text]


def file_documents(paths: Sequence[Path], block: int = 4000) -> list[Document]:
    """Text files cut at blank lines into documents of about ``block`` characters, named ``<stem>:<number>``."""
    documents = []
    for path in paths:
        pending: list[str] = []
        count = size = 0
        for paragraph in [*re.split(r"\n\s*\n", path.read_text(encoding="utf-8")), None]:
            if pending and (paragraph is None or size >= block):
                documents.append(Document(f"{path.stem}:{count}", "\n\n".join(pending).strip()))
                pending, size, count = [], 0, count + 1
            if paragraph is not None:
                pending.append(paragraph)
                size += len(paragraph)
    return [document for document in documents if document.text]


# ---------------------------------------------------------------------------------------------------------------------
# 2. Split
# ---------------------------------------------------------------------------------------------------------------------


def stable_hash(name: str) -> int:
    """64-bit hash of a name, the same in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def is_held_out(name: str) -> bool:
    """Which side of the split a module is on; a function of its name alone."""
    return stable_hash(f"split:{name}") % 100 < HELD_OUT_PERCENT


def split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents, each in hash order so that any prefix is a fair sample of its side."""
    ordered = sorted(documents, key=lambda document: stable_hash(f"order:{document.name}"))
    train = [document for document in ordered if not is_held_out(document.name)]
    held_out = [document for document in ordered if is_held_out(document.name)]
    if not train or not held_out:
        raise ValueError(f"{len(documents)} documents leave one side of the split empty: give more text")
    return train, held_out


def excerpt(documents: Sequence[Document], limit: int) -> str:
    """The documents' texts in order, cut at a paragraph end to at most ``limit`` UTF-8 bytes."""
    data = DOCUMENT_GAP.join(document.text for document in documents).encode()
    if len(data) > limit:
        data = data[: data.rfind(b"\n\n", 0, limit)]
    return data.decode().strip() + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# 3. Tokenize
# ---------------------------------------------------------------------------------------------------------------------


def train_tokenizer(texts: Sequence[str], vocab: int, seq: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of ``vocab`` entries with <|bos|>, <|eos|>, <|pad|> as ids 0, 1, 2; decoding inverts encoding."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=seq,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> torch.Tensor:
    """Token ids [n] of the documents in order, each between a <|bos|> and an <|eos|>."""
    ids: list[int] = []
    for document in documents:
        tokens = tokenizer(document.text, add_special_tokens=False, verbose=False).input_ids
        ids += [tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id]
    return torch.tensor(ids)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Train
# ---------------------------------------------------------------------------------------------------------------------


def make_config(shape: Shape, tokenizer: PreTrainedTokenizerFast) -> transformers.PreTrainedConfig:
    """Configuration of the architecture ``shape.arch``: grouped-query (DeepSeek: latent) attention, tied embeddings."""
    heads = shape.hidden // HEAD_DIM
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": heads,
        "num_experts_per_tok": shape.topk,
        "max_position_embeddings": shape.seq,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    grouped = {"num_key_value_heads": heads // 2, "head_dim": HEAD_DIM, "router_aux_loss_coef": BALANCE_COEFFICIENT}
    if shape.arch == "qwen3_moe":
        return transformers.Qwen3MoeConfig(
            **common,
            **grouped,
            intermediate_size=4 * shape.intermediate,
            moe_intermediate_size=shape.intermediate,
            num_experts=shape.experts,
            norm_topk_prob=True,
        )
    if shape.arch == "mixtral":
        return transformers.MixtralConfig(
            **common, **grouped, intermediate_size=shape.intermediate, num_local_experts=shape.experts
        )
    return transformers.DeepseekV3Config(
        **common,
        num_key_value_heads=heads,
        intermediate_size=4 * shape.intermediate,
        moe_intermediate_size=shape.intermediate,
        n_routed_experts=shape.experts,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        first_k_dense_replace=min(1, shape.layers - 1),
        num_nextn_predict_layers=0,
        q_lora_rank=None,
        kv_lora_rank=shape.hidden // 2,
        qk_nope_head_dim=HEAD_DIM,
        qk_rope_head_dim=HEAD_DIM,
        v_head_dim=HEAD_DIM,
    )


def moe_blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The mixture-of-experts blocks by module name, first layer first."""
    return {
        name: module for name, module in model.named_modules() if hasattr(module, "experts") and hasattr(module, "gate")
    }


@contextmanager
def record_routing(model: PreTrainedModel) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Collect (router logits [tokens, experts], chosen experts [tokens, topk]) of every block during the forward pass.

    The list grows by one entry per block and pass; empty it between passes.
    """
    routing: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(_module: nn.Module, _inputs: object, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        logits, _weights, chosen = output
        routing.append((logits, chosen))

    handles = [block.gate.register_forward_hook(keep) for block in moe_blocks(model).values()]
    try:
        yield routing
    finally:
        for handle in handles:
            handle.remove()


def balance_loss(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Switch-style load-balancing loss of one layer: ``E * sum_e share_e * probability_e``, 1 when even.

    ``logits`` is [tokens, E], ``chosen`` [tokens, topk]; the gradient flows through the probabilities only.
    """
    experts = logits.shape[-1]
    share = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()
    return experts * (share * logits.float().softmax(-1).mean(0)).sum()


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy in nats of predicting ids[:, 1:] from logits [batch, seq, vocab] at the positions before."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def cosine_with_warmup(step: int, steps: int) -> float:
    """Learning-rate factor: linear over the first 4 % of the steps, then half a cosine down to zero."""
    warmup = max(1, steps // 25)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_optimizer(model: PreTrainedModel, lr: float, decay: float) -> torch.optim.AdamW:
    """AdamW; weight decay on the matrices, none on the norms."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def train(
    model: PreTrainedModel,
    ids: torch.Tensor,
    *,
    steps: int,
    batch: int,
    seq: int,
    lr: float,
    seed: int,
    balance: float = BALANCE_COEFFICIENT,
    decay: float = WEIGHT_DECAY,
) -> None:
    """Train in place on ``steps`` batches of random windows, ``seq`` tokens each, of the token stream ``ids`` [n].

    ``balance`` weighs `balance_loss`, summed over the layers, against the cross entropy in nats.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = make_optimizer(model, lr, decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_with_warmup(step, steps))
    offsets = torch.arange(seq)
    running = math.log(model.config.vocab_size)
    model.train()
    with record_routing(model) as routing, tqdm(range(steps), desc="training", unit="step") as bar:
        for _ in bar:
            starts = torch.randint(len(ids) - seq, (batch, 1), generator=generator)
            window = ids[starts + offsets].to(model.device)
            loss = next_token_loss(model(window, use_cache=False).logits, window)
            imbalance = torch.stack([balance_loss(*layer) for layer in routing])
            routing.clear()
            (loss + balance * imbalance.sum()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            running = 0.98 * running + 0.02 * loss.item()
            bar.set_postfix(loss=f"{running:.3f}", balance=f"{imbalance.max().item():.2f}", refresh=False)


@torch.inference_mode()
def evaluate(model: PreTrainedModel, ids: torch.Tensor, seq: int, batch: int = 8) -> tuple[float, torch.Tensor]:
    """(perplexity per token, tokens per expert [layers, experts]) of ids [n], in whole windows of ``seq`` tokens."""
    windows = ids[: len(ids) // seq * seq].view(-1, seq)
    nats = 0.0
    passes = []
    model.eval()
    with record_routing(model) as routing:
        for window in windows.split(batch):
            window = window.to(model.device)
            nats += next_token_loss(model(window, use_cache=False).logits, window).item() * len(window)
            passes.append(
                torch.stack([chosen.flatten().bincount(minlength=scores.shape[-1]) for scores, chosen in routing])
            )
            routing.clear()
    return math.exp(nats / len(windows)), torch.stack(passes).sum(0).cpu()


# ---------------------------------------------------------------------------------------------------------------------
# Multiple choice
# ---------------------------------------------------------------------------------------------------------------------


def is_prose(words: Sequence[str]) -> bool:
    """Whether at least four words in five are plain words, so that the passage is neither code nor a table."""
    return sum(bool(PLAIN_WORD.fullmatch(word)) for word in words) >= 0.8 * len(words)


def make_continuations(documents: Sequence[Document], count: int, seed: int = 0) -> list[dict]:
    """Up to ``count`` items {"context": str, "endings": [4 strings], "label": int} made of the documents' prose.

    The context has 40 to 60 words, the true ending is the 12 to 20 words that follow it after a space, and the three
    distractors are the like-sized passages (same number of words, nearest number of characters among 24 drawn) of other
    documents. Endings hold no dotted names, whose module would give the answer away; true endings do not overlap, and
    every label occurs equally often up to one. Line breaks are kept.
    """
    generator = random.Random(seed)
    longest_context, longest_ending = 60, 20
    words = [list(re.finditer(r"\S+", document.text)) for document in documents]

    def passage(index: int, first: int, last: int) -> str:
        """Words ``first`` to ``last`` - 1 of a document, verbatim."""
        return documents[index].text[words[index][first].start() : words[index][last - 1].end()]

    places: list[tuple[int, int]] = []  # (document, index of the ending's first word in it)
    for index, found in enumerate(words):
        for start in range(longest_context, len(found) - longest_ending + 1, longest_ending):
            before, after = (
                passage(index, start - longest_context, start),
                passage(index, start, start + longest_ending),
            )
            joined = passage(index, start - longest_context, start + longest_ending) == f"{before} {after}"
            if joined and is_prose([*before.split(), *after.split()]) and not DOTTED_NAME.search(after):
                places.append((index, start))
    per_document = Counter(index for index, _ in places)
    usable = [place for place in places if len(places) - per_document[place[0]] >= 3]
    chosen = generator.sample(usable, min(count, len(usable)))
    labels = [index % 4 for index in range(len(chosen))]
    generator.shuffle(labels)

    items = []
    for (index, start), label in zip(chosen, labels, strict=True):
        context_length, ending_length = generator.randint(40, longest_context), generator.randint(12, longest_ending)
        ending = passage(index, start, start + ending_length)
        elsewhere = [place for place in places if place[0] != index]
        others = generator.sample(elsewhere, min(24, len(elsewhere)))
        drawn = [passage(other, at, at + ending_length) for other, at in others]
        endings = sorted(drawn, key=lambda text: abs(len(text) - len(ending)))[:3]
        endings.insert(label, ending)
        items.append({"context": passage(index, start - context_length, start), "endings": endings, "label": label})
    return items


@torch.inference_mode()
def ending_log_likelihoods(
    model: PreTrainedModel, context: Sequence[int], endings: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Log-likelihood [endings] in nats of each ending's tokens after the context's tokens."""
    longest = max(map(len, endings))
    ids = torch.tensor([[*context, *ending, *[0] * (longest - len(ending))] for ending in endings], device=model.device)
    log_probs = model(ids, use_cache=False).logits[:, len(context) - 1 : -1].float().log_softmax(-1)
    tokens = log_probs.gather(-1, ids[:, len(context) :, None]).squeeze(-1).cpu()
    return torch.stack([row[: len(ending)].sum() for row, ending in zip(tokens, endings, strict=True)])


def continuation_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, items: Sequence[dict]
) -> tuple[float, float]:
    """Shares of items whose true ending scores highest, by two scores; chance is 0.25 for both.

    The first score is log p(ending | context) per character, the second log p(ending | context) - log p(ending), which
    takes out how common the ending's words are.
    """
    by_character = by_information = 0
    model.eval()
    for item in items:
        endings = [tokenizer(" " + ending).input_ids for ending in item["endings"]]
        given = ending_log_likelihoods(model, tokenizer(item["context"]).input_ids, endings)
        alone = ending_log_likelihoods(model, [tokenizer.bos_token_id], endings)
        characters = torch.tensor([len(ending) for ending in item["endings"]])
        by_character += int((given / characters).argmax()) == item["label"]
        by_information += int((given - alone).argmax()) == item["label"]
    return (by_character / len(items), by_information / len(items)) if items else (math.nan, math.nan)


# ---------------------------------------------------------------------------------------------------------------------
# 5. Write
# ---------------------------------------------------------------------------------------------------------------------


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
