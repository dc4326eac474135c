"""Running tiny checkpoints in vLLM."""

import gc
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPTS = [[5, 9, 77, 3, 40, 41, 42], [11, 12, 13], [90, 3, 99, 4, 98]]
TOKENS = 6

#: float32 models of two or three layers, whose sums run in another order: some thousand times the dtype's epsilon on
#: logits of size 10.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Generated:
    """One greedy continuation: the tokens, and logprobs of some tokens at every place of prompt and continuation.

    ``logprobs[i]`` belongs to the token at place ``i + 1`` of prompt + continuation.
    """

    tokens: list[int]
    logprobs: list[dict[int, float]]


@contextmanager
def engine(folder: Path, **settings: Any) -> Iterator[Any]:
    """A vLLM engine in this process, eager unless asked otherwise."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 64,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "enable_prefix_caching": False,
    }
    llm = None
    try:
        llm = LLM(str(folder), **{**defaults, **settings})
        yield llm
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they hold the engine, which would end in the middle of the next
        raise
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def generate(llm: Any, prompts: list[list[int]] = PROMPTS) -> list[Generated]:
    """Greedy continuations of ``prompts``, all in one batch."""
    return continuations(llm, [{"prompt_token_ids": ids} for ids in prompts])


def continuations(llm: Any, prompts: list[dict[str, Any]]) -> list[Generated]:
    """`generate` of prompts as vLLM takes them, with images."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=TOKENS, logprobs=5, prompt_logprobs=5, ignore_eos=True, detokenize=False
    )
    found = []
    for request in llm.generate(prompts, sampling, use_tqdm=False):
        completion = request.outputs[0]
        places = [*request.prompt_logprobs[1:], *completion.logprobs]
        logprobs = [{token: entry.logprob for token, entry in place.items()} for place in places]
        found.append(Generated(list(completion.token_ids), logprobs))
    return found


def run(folder: Path, **settings: Any) -> list[Generated]:
    """`generate` with an engine of its own."""
    with engine(folder, **settings) as llm:
        return generate(llm)


def check_equal(found: list[Generated], expected: list[Generated]) -> None:
    """Compare two engines' results: greedy tokens equal, logprobs within `TOLERANCE`."""
    for one, other in zip(found, expected, strict=True):
        assert one.tokens == other.tokens
        for here, there in zip(one.logprobs, other.logprobs, strict=True):
            # near ties may exchange the last of the reported tokens
            for token in here.keys() & there.keys():
                assert abs(here[token] - there[token]) < TOLERANCE
            assert max(here, key=here.__getitem__) == max(there, key=there.__getitem__)
