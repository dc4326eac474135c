"""Sources decoded, and models measured, on the emulated GPU."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from emulated import GPU, emulated_gpu

from bitsmoe_modifier.evaluation.evaluate import evaluate, evaluate_reference
from bitsmoe_modifier.evaluation.reference import record
from bitsmoe_modifier.evaluation.samples import read, write
from bitsmoe_modifier.evaluation.trying import generate
from bitsmoe_modifier.sources import codecs
from bitsmoe_modifier.sources.model import load_tokenizer
from helpers import save_tokenizer, tiny_model

GEN = torch.Generator().manual_seed(0)


def octets(*shape: int) -> torch.Tensor:
    return torch.randint(120, 134, shape, generator=GEN).to(torch.uint8)


WORDS = torch.randint(-(2**31), 2**31, (8, 4), generator=GEN).to(torch.int32)
FORMATS: dict[str, tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]] = {
    "mxfp4": (codecs.decode_mxfp4, (octets(3, 8, 32), octets(3, 8, 2))),
    "mxfp4 of gpt-oss": (codecs.decode_mxfp4, (octets(3, 8, 2, 16), octets(3, 8, 2).view(torch.float8_e8m0fnu))),
    "nvfp4": (
        codecs.decode_nvfp4,
        (octets(8, 32), torch.rand(8, 4, generator=GEN).to(torch.float8_e4m3fn), torch.rand(1, generator=GEN)),
    ),
    "fp8 in blocks": (
        lambda weight, scale: codecs.decode_scaled(weight, scale, (4, 16)),
        (torch.randn(6, 40, generator=GEN).to(torch.float8_e4m3fn), torch.rand(2, 3, generator=GEN)),
    ),
    "int4": (
        lambda packed, scale: codecs.decode_packed_integers(packed, scale, (8, 32), 4),
        (WORDS, torch.rand(8, 2, generator=GEN)),
    ),
    "int4 with zero points and an order": (
        lambda packed, scale, zeros, order: codecs.decode_packed_integers(packed, scale, (8, 32), 4, zeros, order),
        (WORDS, torch.rand(8, 2, generator=GEN), WORDS[:1, :2], torch.arange(32) % 2),
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_decoded_there(name: str) -> None:
    decode, parts = FORMATS[name]
    expected = decode(*parts)
    with emulated_gpu():
        made = decode(*(part.to(GPU) for part in parts))
        assert made.device == GPU
        assert made.tolist() == expected.tolist()


def test_a_model_is_measured_there(tmp_path: Path) -> None:
    rows = torch.randint(128, (5, 16), generator=GEN)
    save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    found = []
    for place in (torch.device("cpu"), GPU):
        folder = tmp_path / place.type
        folder.mkdir()
        with emulated_gpu():
            dense, other = (tiny_model("qwen3_moe", seed=seed).to(place) for seed in (0, 1))
            reference = record(dense, rows, 2, folder)
            own = evaluate_reference(rows, reference.to(place), 2)
            figures = evaluate(other, rows, reference, 2)
            texts = read(other, tokenizer, write(dense, tokenizer, ["word3 word5"], 4))
            tokens = list(generate(other, dense, tokenizer, "word7", 3))
        found.append((asdict(own), asdict(figures), texts[0], tokens))
    (own, figures, texts, tokens), there = found
    for here, on_gpu in ((own, there[0]), (figures, there[1])):
        assert on_gpu.pop("kld_rows") == pytest.approx(here.pop("kld_rows"), rel=1e-4)
        assert on_gpu == pytest.approx(here, rel=1e-4)
    assert there[2]["quantized"] == texts["quantized"]
    assert [token.id for token in there[3]] == [token.id for token in tokens]
