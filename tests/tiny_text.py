"""A tiny model with a tokenizer, and texts for it."""

import random
from pathlib import Path

import torch

from helpers import tiny_model

LETTERS = "abcdefghijklmnopqrstuvwxyz .,\n"


def write_text(path: Path, characters: int, seed: int) -> Path:
    """Random text; with the tokenizer of `save_tiny`, a character is a token."""
    path.write_text("".join(random.Random(seed).choices(LETTERS, k=characters)))
    return path


def save_tiny(
    folder: Path, architecture: str = "qwen3_moe", dtype: torch.dtype = torch.bfloat16, **overrides: object
) -> Path:
    """A random model, in which the experts carry much of the output, with a tokenizer of single characters."""
    model = tiny_model(architecture, dtype=dtype, **overrides)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1)
        elif ".experts." in name:
            parameter.data.mul_(3)
    model.save_pretrained(folder)
    return save_letters(folder)


def save_letters(folder: Path) -> Path:
    """A tokenizer of single characters beside a model."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {c: i for i, c in enumerate(["<pad>", "<s>", "</s>", "<unk>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    return folder
