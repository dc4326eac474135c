"""Rows against the model that reads them: tokens that it does not have, and rows that are too long for it."""

import json
from pathlib import Path

import pytest
import torch

from bitsmoe_modifier.cli import main
from bitsmoe_modifier.errors import CalibrationError
from bitsmoe_modifier.sources.fitting import check_rows


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "wrapper"])
def test_rows_and_models(nested: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"vocab_size": 100, "max_position_embeddings": 16}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": sizes, "model_type": "x"} if nested else sizes))
    check_rows(torch.full((2, 16), 99), tmp_path, "t.txt")
    assert capsys.readouterr().err == ""
    check_rows(torch.full((2, 17), 99), tmp_path, "t.txt")
    assert "rows of 17 tokens are longer than the 16 that the model is made for" in capsys.readouterr().err
    with pytest.raises(
        CalibrationError, match=r"t.txt: the tokenizer of .* makes the token 100 of it, and the model has"
    ):
        check_rows(torch.full((2, 16), 100), tmp_path, "t.txt")


def test_a_model_that_says_neither(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    check_rows(torch.full((2, 17), 10**6), tmp_path, "t.txt")


def test_a_tokenizer_with_tokens_that_were_added(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside a model whose embedding was not enlarged for them."""
    from transformers import AutoTokenizer

    model = tmp_path / "model"
    model.mkdir()
    for file in (tiny / "model").iterdir():
        (model / file.name).symlink_to(file)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<new{n}>" for n in range(200)])
    for file in model.glob("tokenizer*"):
        file.unlink()
    tokenizer.save_pretrained(model)
    text = tmp_path / "t.txt"
    text.write_text("some text <new150> " * 40)
    arguments = ["--model", str(model), "--calibration", str(text), "--samples", "8", "--seq-len", "32"]
    assert main(["quantize", *arguments, "--bits", "4", "--out", str(tmp_path / "out")]) == 2
    assert f"{text}: the tokenizer of {model} makes the token " in capsys.readouterr().err
