"""Multiple-choice items made of a text: which of four passages continues it? And how often a model knows."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from .documents import Document

PLAIN_WORD = re.compile(r"[(\"'“‘]*[A-Za-z]+(?:[-'’][A-Za-z]+)*[)\"'”’,.;:!?]*")
DOTTED_NAME = re.compile(r"[A-Za-z_]\.[A-Za-z_]")


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
