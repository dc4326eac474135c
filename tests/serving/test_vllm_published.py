"""``bitsmoe quantize`` on folders of the published shape, and vLLM on what it writes."""

import base64
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import cpu_stand_ins
import pytest
import torch
from engines import TOKENS, continuations, engine, generate
from expected import check, clear, expected, greedy
from processors import SIDE
from rows import ROWS, Row
from servers import ask, server

from helpers import load
from published import stored_tensors
from tiny_text import LETTERS

pytestmark = pytest.mark.vllm

#: what is served by `vllm serve` with an image in the prompt; the others by the engine alone, which starts sooner
_SERVED = "qwen3_vl_moe"
_OFFLINE = (
    "qwen3_moe",
    "qwen3_next",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "glm4_moe",
    "gpt_oss",
    "minimax_m2",
    "mixtral",
    "nemotron_h",
)
_TEXT = "some text, and more"
_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_WITH_IMAGE = f"ab{_IMAGE}cd"
#: prompts with an image of which some are taken
_DRAWN = 512


@pytest.fixture(autouse=True)
def _stand_ins() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        cpu_stand_ins.install(patch)
        yield


def row(model_type: str) -> Row:
    return next(one for one in ROWS if one.model_type == model_type)


def check_folder(packed: Path) -> None:
    """It is of the published shape: shards, and every tensor for multi-token prediction is still there."""
    before = json.loads((packed.with_name("dense") / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(before.values())) > 2
    assert {name for name, file in before.items() if file == "mtp.safetensors"} <= set(stored_tensors(packed))


def pictures() -> list[object]:
    """Two images of noise, as many pixels as the tiny towers take."""
    from PIL import Image

    drawn = torch.randint(256, (2, SIDE, SIDE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return [Image.fromarray(one.numpy()) for one in drawn]


def image_inputs(folder: Path, texts: list[str], images: list[object]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(ids ``[n, tokens]``, what else the model takes) by the folder's own processor."""
    from transformers import AutoProcessor

    inputs = AutoProcessor.from_pretrained(folder)(text=texts, images=images, return_tensors="pt")
    ids = inputs.pop("input_ids")
    inputs.pop("attention_mask")
    return ids, dict(inputs)


def tokens_after_image(folder: Path, image: object) -> tuple[list[int], list[int]]:
    """(prompt, greedy continuation) by transformers."""
    prompt, inputs = image_inputs(folder, [_WITH_IMAGE], [image])
    ids = greedy(load(folder, dtype=torch.float32), prompt, **inputs)[0].tolist()
    return ids[: prompt.shape[1]], ids[prompt.shape[1] :]


def test_a_published_folder_is_served_with_images(quantized: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder, images = quantized(_SERVED), pictures()
    check_folder(folder)
    wanted = [tokens_after_image(folder, image) for image in images]
    assert wanted[0][1] != wanted[1][1], "the image has to change what follows"
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def complete(image: object) -> dict[str, list[int]]:
        file = io.BytesIO()
        image.save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        parts = [
            {"type": "text", "text": "ab"},
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": "cd"},
        ]
        answer = ask(
            address,
            "/v1/chat/completions",
            model="model",
            messages=[{"role": "user", "content": parts}],
            temperature=0,
            max_tokens=TOKENS,
            ignore_eos=True,
            return_token_ids=True,
        )
        return {"prompt": answer["prompt_token_ids"], "tokens": answer["choices"][0]["token_ids"]}

    settings = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "4")
    with server(folder, tmp_path / "log", *settings) as address:
        found = [complete(image) for image in images]
        text = ask(
            address, "/v1/completions", model="model", prompt=_TEXT, max_tokens=1, temperature=0, return_token_ids=True
        )
    assert [(one["prompt"], one["tokens"]) for one in found] == wanted
    assert text["choices"][0]["prompt_token_ids"] == tokenizer(_TEXT)["input_ids"]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", _OFFLINE)
def test_a_published_folder_in_the_engine(model_type: str, quantized: Callable[[str], Path]) -> None:
    from transformers import AutoTokenizer

    one, folder = row(model_type), quantized(model_type)
    check_folder(folder)
    wanted, tokenizer = expected(folder, one.dtype), AutoTokenizer.from_pretrained(folder)
    with engine(folder, dtype=one.dtype, skip_tokenizer_init=False) as llm:
        sampling = llm.get_default_sampling_params()
        assert (sampling.temperature, sampling.top_p) == (0.6, 0.95), "of generation_config.json"
        written = llm.generate([_TEXT], use_tqdm=False)[0]
        assert written.prompt_token_ids == tokenizer(_TEXT)["input_ids"], "the folder's own tokenizer"
        found = generate(llm, wanted.prompts)
    check(found, wanted)


@pytest.mark.slow
def test_images_in_the_engine(quantized: Callable[[str], Path]) -> None:
    """Of many prompts with an image those whose continuation rounding to bfloat16 does not turn over."""
    one, folder, images = row("qwen3_5_moe"), quantized("qwen3_5_moe"), pictures()
    draw = torch.randint(len(LETTERS), (_DRAWN, 8), generator=torch.Generator().manual_seed(0)).tolist()
    words = ["".join(LETTERS[n] for n in letters) for letters in draw]
    texts = [word[:4] + _IMAGE + word[4:] for word in words]
    ids, inputs = image_inputs(folder, texts, [images[n % 2] for n in range(_DRAWN)])
    model = load(folder, dtype=torch.float32)
    wanted = clear(model, load(folder, dtype=torch.bfloat16), ids, **inputs)
    chosen = [ids.tolist().index(prompt) for prompt in wanted.prompts]
    _, swapped = image_inputs(folder, [texts[n] for n in chosen], [images[(n + 1) % 2] for n in chosen])
    others = greedy(model, ids[chosen], **swapped)[:, ids.shape[1] :]
    assert others.tolist() != wanted.tokens, "the image has to change what follows"
    prompts = [{"prompt": texts[n], "multi_modal_data": {"image": images[n % 2]}} for n in chosen]
    with engine(folder, dtype=one.dtype, skip_tokenizer_init=False) as llm:
        check(continuations(llm, prompts), wanted)


@pytest.mark.slow
def test_a_published_folder_whose_names_transformers_changes(quantized: Callable[[str], Path]) -> None:
    """vLLM gets as far with DeepSeek-V4's quantized folder as a CPU lets it: to the caches, past all weights."""
    one, folder = row("deepseek_v4"), quantized("deepseek_v4")
    with pytest.raises(NotImplementedError, match=one.error), engine(folder, dtype=one.dtype, **one.settings):
        pass
