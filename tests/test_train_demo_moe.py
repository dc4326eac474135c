"""The shipped demonstration model, and the script that makes it, at a size that takes seconds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_demo_moe as demo
from demo_moe import choices, training
from demo_moe import documents as collected

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "src" / "bitsmoe_modifier" / "assets"
TEXTS = ("docmoe_calibration.txt", "docmoe_heldout.txt", "docmoe_continuations.jsonl")
PERPLEXITY_BOUND = 50.0


@pytest.fixture(scope="module")
def documents() -> list:
    """Documents of a slice of the shipped text: enough of them for both sides of the split."""
    text = (ASSETS / "docmoe_calibration.txt").read_text(encoding="utf-8")[:200_000]
    return [
        collected.Document(f"part{index}", part)
        for index, part in enumerate(text.split(collected.DOCUMENT_GAP))
        if part
    ]


def stdlib(folder: Path, files: dict[str, str]) -> Path:
    """A make-believe standard library: ``files`` maps relative paths to sources."""
    for name, source in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return folder


def options(**values: object) -> list[str]:
    """Command-line arguments ``--name value``."""
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def test_docstrings_are_named_and_cleaned():
    method = '    def f(self):\n        """\n        Go.\n        """\n'
    source = f'"""Module.\n\n    Indented.\n"""\nclass A:\n    """Class."""\n{method}'
    assert collected.docstrings(source) == [("", "Module.\n\nIndented."), ("A", "Class."), ("A.f", "Go.")]


def test_stdlib_documents_leave_out_what_is_not_ours_and_what_repeats(tmp_path):
    long = "A paragraph that is long enough not to be repeated in another module."
    root = stdlib(
        tmp_path,
        {
            "a.py": f'"""First of all.\n\n{long}"""\n',
            "b/__init__.py": f'"""Second.\n\n{long}"""\ndef f():\n    """First of all."""\n',
            "b/test/t.py": '"""A test."""\n',
            "foreign.py": '# Copyright (C) 2001 Somebody Else\n"""Foreign."""\n',
            "own_terms.py": '# Licensed to PSF. Released under the MIT license.\n"""Own terms."""\n',
            "given.py": '# Copyright 2007 Somebody. Licensed to PSF under a Contributor Agreement.\n"""Given."""\n',
            "psf.py": '# Copyright (C) 2001 Python Software Foundation\n"""Ours."""\n',
        },
    )
    texts = {document.name: document.text for document in collected.stdlib_documents(root)}
    modules = {name: text for name, text in texts.items() if not name.startswith("topic:")}
    assert modules == {
        "a": f"module a\n\nFirst of all.\n\n{long}",
        "b": "module b\n\nSecond.\n\nb.f\n\nFirst of all.",
        "given": "module given\n\nGiven.",
        "psf": "module psf\n\nOurs.",
    }
    assert len(texts) > 50  # the topics


def test_split_is_disjoint_by_module_and_stable(documents):
    train, held_out = collected.split(documents)
    names = {document.name for document in train}, {document.name for document in held_out}
    assert not names[0] & names[1]
    assert names[0] | names[1] == {document.name for document in documents}
    assert collected.split(documents[::-1]) == (train, held_out)
    assert [collected.is_held_out(name) for name in ("unittest.mock", "json")] == [True, False]
    share = sum(collected.is_held_out(f"module{index}") for index in range(5000)) / 5000
    assert share == pytest.approx(0.08, abs=0.015)


def test_split_needs_text_on_both_sides():
    with pytest.raises(ValueError, match="one side of the split empty"):
        collected.split([collected.Document("alone", "text")])


def test_text_files_become_documents(tmp_path):
    text = "\n\n".join(f"Paragraph {index}." for index in range(100))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    documents = collected.file_documents([tmp_path / "book.txt"], block=200)
    assert len(documents) > 3
    assert [document.name for document in documents[:2]] == ["book:0", "book:1"]
    assert "\n\n".join(document.text for document in documents) == text
    (tmp_path / "book.txt").write_text(text.replace("\n\n", "\n \n"), encoding="utf-8")
    assert collected.file_documents([tmp_path / "book.txt"], block=200) == documents, "a line of blanks is a blank line"


def test_excerpt_ends_with_a_paragraph(documents):
    text = collected.excerpt(documents, 10_000)
    assert 5_000 < len(text.encode()) <= 10_000
    assert collected.excerpt(documents, 10**9).startswith(text.strip())


def test_tokenizer_round_trips_text(documents):
    tokenizer = training.train_tokenizer([document.text for document in documents], 512, 128)
    assert len(tokenizer) == 512
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    for text in (documents[0].text, "  indented\n\n\tcode(x) != 'naïve – ☃' \n", " a , b ."):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    ids = training.encode(tokenizer, documents[:2]).tolist()
    assert ids.count(0) == ids.count(1) == 2
    assert (ids[0], ids[-1]) == (0, 1)


def check_items(items: list[dict], texts: list[str]) -> None:
    """Assert that the items are well-formed, balanced and taken from ``texts``."""
    labels = [item["label"] for item in items]
    counts = [labels.count(label) for label in range(4)]
    assert max(counts) - min(counts) <= 1
    for item in items:
        assert set(item) == {"context", "endings", "label"}
        assert 40 <= len(item["context"].split()) <= 60
        assert len(set(item["endings"])) == 4
        assert len({len(ending.split()) for ending in item["endings"]}) == 1
        assert 12 <= len(item["endings"][0].split()) <= 20
        joined = [f"{item['context']} {ending}" for ending in item["endings"]]
        assert [any(passage in text for text in texts) for passage in joined].index(True) == item["label"]


def test_continuations_are_well_formed_and_balanced(documents):
    items = choices.make_continuations(documents, 30)
    assert len(items) == 30
    assert items == choices.make_continuations(documents, 30)
    assert items != choices.make_continuations(documents, 30, seed=1)
    check_items(items, [document.text for document in documents])


def test_continuations_need_other_documents(documents):
    assert choices.make_continuations(documents[:1], 30) == []


def test_balance_loss_is_one_when_even_and_the_number_of_experts_when_collapsed():
    even = torch.arange(8).repeat(4).view(-1, 2)
    assert training.balance_loss(torch.zeros(16, 8), even).item() == pytest.approx(1)
    collapsed = torch.full((16, 8), -50.0)
    collapsed[:, 3] = 50.0
    assert training.balance_loss(collapsed, torch.full((16, 1), 3)).item() == pytest.approx(8)


def test_learning_rate_rises_then_falls():
    factors = [training.cosine_with_warmup(step, 100) for step in range(100)]
    assert max(factors) == factors[4] == 1
    assert factors[0] == 0.25
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert factors[-1] < 0.001


@pytest.fixture(scope="module")
def book(tmp_path_factory, documents) -> Path:
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text(collected.excerpt(documents, 100_000), encoding="utf-8")
    return path


@pytest.mark.parametrize("arch", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_script_writes_a_model_that_loads(tmp_path, book, arch):
    out = tmp_path / "tiny"
    shape = options(hidden=64, layers=2, experts=4, topk=2, intermediate=64, vocab=300, seq=64, steps=3)
    report = demo.main(options(out=out, text=book, arch=arch) + shape)
    assert math.isfinite(report.perplexity)
    assert report.usage.shape[1] == 4

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.config.model_type == arch
    assert len(training.moe_blocks(model)) == len(report.usage) == (1 if arch == "deepseek_v3" else 2)
    assert model(**tokenizer("Return the sum.", return_tensors="pt")).logits.isfinite().all()

    assert (tmp_path / "tiny_calibration.txt").stat().st_size > 50_000
    held_out = (tmp_path / "tiny_heldout.txt").read_text(encoding="utf-8")
    assert held_out not in (tmp_path / "tiny_calibration.txt").read_text(encoding="utf-8")
    check_items(
        [json.loads(line) for line in (tmp_path / "tiny_continuations.jsonl").read_text(encoding="utf-8").splitlines()],
        [held_out],
    )
    assert f"{report.perplexity:.2f}" in (out / "README.md").read_text(encoding="utf-8")


def test_training_lowers_the_loss_and_a_tokenizer_can_be_reused(tmp_path, book):
    shape = options(hidden=64, layers=1, experts=4, topk=2, intermediate=64, seq=64, batch=8, steps=60)
    report = demo.main(options(out=tmp_path / "m", text=book, tokenizer=ASSETS / "docmoe") + shape)
    assert report.perplexity < 0.5 * 2048
    assert json.loads((tmp_path / "m" / "config.json").read_text())["vocab_size"] == 2048


def test_hidden_size_is_checked(capsys):
    with pytest.raises(SystemExit):
        demo.parse_args(options(out="x", hidden=100))
    assert "multiple of 64" in capsys.readouterr().err


def test_shipped_texts():
    calibration, held_out, lines = ((ASSETS / name).read_text(encoding="utf-8") for name in TEXTS)
    assert len(calibration) > 0.9 * demo.CALIBRATION_BYTES
    assert len(held_out) > 0.8 * demo.HELD_OUT_BYTES
    paragraphs = [
        {" ".join(paragraph.split()) for paragraph in text.split("\n\n") if len(paragraph) >= 80}
        for text in (calibration, held_out)
    ]
    assert not paragraphs[0] & paragraphs[1]
    items = [json.loads(line) for line in lines.splitlines()]
    assert len(items) == demo.CONTINUATIONS
    assert sorted({item["label"] for item in items}) == [0, 1, 2, 3]
    assert "Python Software Foundation" in (ASSETS / "NOTICE").read_text(encoding="utf-8")


class Bigram(torch.nn.Module):
    """A language model of eight tokens that expects each token to be followed by the next one, and token 5 anywhere."""

    device = torch.device("cpu")

    def forward(self, ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        logits = 3.0 * torch.nn.functional.one_hot((ids + 1) % 8, 8).float()
        logits[..., 5] += 4.0
        return SimpleNamespace(logits=logits)


def test_ending_log_likelihoods_and_both_accuracies():
    model = Bigram()
    short, long = choices.ending_log_likelihoods(model, [1], [[2], [2, 3]])
    step = math.log(math.exp(3) / (math.exp(3) + math.exp(4) + 6))
    assert (short.item(), long.item()) == pytest.approx((step, 2 * step))

    class Digits:
        bos_token_id = 0

        def __call__(self, text: str) -> SimpleNamespace:
            return SimpleNamespace(input_ids=[int(digit) for digit in text.split()])

    # Token 5 is likely after anything: only the score that subtracts log p(ending) sees that 3 belongs after 2.
    items = [{"context": "1 2", "endings": ["5", "7", "3", "6"], "label": 2}]
    assert choices.continuation_accuracy(model, Digits(), items) == (0, 1)


def test_shipped_sizes():
    files = [*(ASSETS / "docmoe").iterdir(), ASSETS / "NOTICE", *(ASSETS / name for name in TEXTS)]
    assert (ASSETS / "docmoe" / "model.safetensors").stat().st_size <= 7.2e6
    assert sum(path.stat().st_size for path in files) <= 8e6


def test_shipped_model_is_trained_and_uses_every_expert():
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "docmoe", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "docmoe")
    config = model.config
    assert config.model_type == "qwen3_moe"
    assert config.hidden_size % 128 == config.moe_intermediate_size % 128 == 0
    ids = torch.tensor(tokenizer((ASSETS / TEXTS[1]).read_text(encoding="utf-8"), verbose=False).input_ids)
    perplexity, usage = training.evaluate(model, ids, config.max_position_embeddings)
    assert perplexity < PERPLEXITY_BOUND
    assert usage.shape == (config.num_hidden_layers, config.num_experts)
    assert usage.min() > 0
