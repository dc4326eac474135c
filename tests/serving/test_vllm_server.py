"""The OpenAI-compatible server with a packed checkpoint."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from engines import TOKENS
from servers import ask, server

from checkpoints import add_tokenizer, packed_checkpoint

pytestmark = pytest.mark.vllm

SETTINGS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "64", "--max-num-seqs", "8")


def greedy(folder: Path, prompt: list[int]) -> list[int]:
    from transformers import AutoModelForCausalLM

    import bitsmoe_modifier  # noqa: F401 - registers the loader

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = list(prompt)
    for _ in range(TOKENS):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_concurrent_requests(tmp_path: Path) -> None:
    folder = packed_checkpoint("qwen3_moe", tmp_path / "model")
    add_tokenizer(folder)
    prompts = [[5 + i, 9, 77, *range(3, 3 + i)] for i in range(12)]

    def complete(prompt: list[int]) -> list[int]:
        answer = ask(
            address, "/v1/completions", model="model", prompt=prompt, temperature=0, max_tokens=TOKENS, ignore_eos=True
        )
        return [int(word.removeprefix("t")) for word in answer["choices"][0]["text"].split()]

    with server(folder, tmp_path / "log", *SETTINGS) as address, ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(complete, prompts))
    assert answers == [greedy(folder, prompt) for prompt in prompts]
