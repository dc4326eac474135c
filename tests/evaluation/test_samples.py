"""Texts of two models that are never in memory together: the divergences are those of both side by side."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from bitsmoe_modifier.evaluation.evaluate import load_model
from bitsmoe_modifier.evaluation.samples import keep_written, kept_written, read, write
from bitsmoe_modifier.evaluation.trying import generate
from tiny_text import save_tiny

PROMPTS = ("the end of", "a")


def test_read_after_write_is_both_side_by_side(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    dense, other = (load_model(str(folder), torch.float32, torch.device("cpu")) for _ in range(2))
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if ".experts." in name:
                parameter.mul_(1.3)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    keep_written(write(dense, tokenizer, PROMPTS, 9), tmp_path)
    found = read(other, tokenizer, kept_written(tmp_path))
    assert [one["prompt"] for one in found] == list(PROMPTS)
    for one in found:
        # the roles are swapped here: the dense model writes and the other one reads along
        written = list(generate(dense, None, tokenizer, one["prompt"], 9))
        assert [text for text, _ in one["unquantized"]] == [token.text for token in written]
        ids = torch.tensor([*tokenizer(one["prompt"]).input_ids, *(token.id for token in written)])
        with torch.no_grad():
            p, q = (model(ids[None]).logits[0].double().log_softmax(-1) for model in (dense, other))
        wanted = (p.exp() * (p - q)).sum(-1)[-len(written) - 1 : -1]
        klds = torch.tensor([kld for _, kld in one["unquantized"]]).double()
        torch.testing.assert_close(klds, wanted, rtol=1e-3, atol=2e-6)  # kept with six digits
        assert klds.max() > 1e-3
        own = generate(other, None, tokenizer, one["prompt"], len(written))
        assert one["quantized"] == "".join(token.text for token in own)


def test_a_model_is_no_distance_from_itself(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    model = load_model(str(folder), torch.float32, torch.device("cpu"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for one in read(model, tokenizer, write(model, tokenizer, PROMPTS, 5)):
        assert one["quantized"] == "".join(text for text, _ in one["unquantized"])
        assert all(kld == pytest.approx(0, abs=1e-6) for _, kld in one["unquantized"])


def test_nothing_kept_is_no_text(tmp_path: Path) -> None:
    assert kept_written(tmp_path) == []
