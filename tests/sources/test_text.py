"""Text to rows: windows, sources, and what is refused."""

import json
import os
import types
from pathlib import Path

import pytest
import torch

from bitsmoe_modifier.errors import CalibrationError
from bitsmoe_modifier.sources.model import load_tokenizer
from bitsmoe_modifier.sources.text import calibration_rows, dataloader, evaluation_rows, read_text, tokenize

TOKENS = torch.arange(1000)


def test_calibration_rows_are_windows_of_the_text():
    rows = calibration_rows(TOKENS, samples=15, seq_len=64, seed=3, source="x")
    assert rows.shape == (15, 64)
    assert rows.dtype == torch.int64
    # the text counts up, so a window is its own first token onwards
    assert torch.equal(rows, rows[:, :1] + torch.arange(64))


def test_calibration_rows_follow_the_seed():
    first, again, other = (calibration_rows(TOKENS, 8, 32, seed, "x") for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_every_window_can_be_drawn():
    rows = calibration_rows(torch.arange(6), samples=1, seq_len=5, seed=0, source="x")
    starts = {calibration_rows(torch.arange(6), 1, 5, seed, "x")[0, 0].item() for seed in range(40)}
    assert rows.shape == (1, 5)
    assert starts == {0, 1}


@pytest.mark.parametrize(("samples", "seq_len"), [(16, 64), (1, 1001)], ids=["many", "long"])
def test_too_short_a_calibration_text_says_how_much_is_needed(samples, seq_len):
    with pytest.raises(CalibrationError, match=rf"needs {samples * seq_len} tokens .* file\.txt has 1000.*--samples"):
        calibration_rows(TOKENS, samples, seq_len, 0, "file.txt")


@pytest.mark.parametrize(("samples", "seq_len"), [(0, 64), (4, 1)], ids=["no-rows", "no-tokens"])
def test_empty_calibration_rows_are_refused(samples, seq_len):
    with pytest.raises(CalibrationError, match="--samples must be 1 or more, --seq-len 2 or more"):
        calibration_rows(TOKENS, samples, seq_len, 0, "x")


@pytest.mark.parametrize(("asked", "expected"), [(3, 3), (0, 10), (99, 10)], ids=["some", "all", "more-than-there-are"])
def test_evaluation_rows_are_consecutive(asked, expected):
    rows = evaluation_rows(TOKENS, seq_len=99, rows=asked, source="x")
    assert torch.equal(rows, torch.arange(expected * 99).view(expected, 99))


def test_too_short_an_evaluation_text_is_refused():
    with pytest.raises(CalibrationError, match=r"needs 1001 tokens at least, file\.txt has 1000"):
        evaluation_rows(TOKENS, 1001, 5, "file.txt")


def test_dataloader_keeps_order_and_shape():
    rows = TOKENS[:70].view(7, 10)
    batches = list(dataloader(rows, 3))
    assert [tuple(b["input_ids"].shape) for b in batches] == [(3, 10), (3, 10), (1, 10)]
    assert torch.equal(torch.cat([b["input_ids"] for b in batches]), rows)


def test_tokenize_adds_no_special_tokens(tmp_path: Path):
    seen = {}

    def tokenizer(content, **options):
        seen.update(options, content=content)
        return {"input_ids": [5, 6]}

    path = tmp_path / "t.txt"
    path.write_text("some text")
    assert tokenize(read_text(str(path)), tokenizer).tolist() == [5, 6]
    assert seen["add_special_tokens"] is False


def test_a_tokenizer_that_makes_no_tokens_is_named(tmp_path: Path) -> None:
    """What transformers makes of a folder that has a model and no files of a tokenizer."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    (tmp_path / "t.txt").write_text("some text")
    with pytest.raises(CalibrationError, match=r"the tokenizer of .* makes no tokens of .*t\.txt; are its files there"):
        tokenize(read_text(str(tmp_path / "t.txt")), load_tokenizer(tmp_path))


def test_a_text_file_is_read_as_it_is(tmp_path: Path):
    path = tmp_path / "t.txt"
    path.write_text("zwei\n\nWörter", encoding="utf-8")
    text = read_text(str(path))
    assert text.content == "zwei\n\nWörter"
    assert len(text.sha256) == 64


def test_documents_of_a_table_are_joined(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps({"body": f"document {i}"}) for i in range(3)))
    assert read_text(str(path), column="body").content == "document 0\n\ndocument 1\n\ndocument 2"


def test_a_table_is_read_no_further_than_needed(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps({"text": "x" * 100}) for _ in range(50)))
    assert 320 <= len(read_text(str(path), tokens=10).content) < 600


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.write_text(""), "is empty"),
        (lambda p: p.write_text(" \n\t"), "is empty"),
        (lambda p: p.write_bytes(b"\xff\xfe\x00caf\xe9"), "not UTF-8"),
        (lambda p: p.mkdir(), "is a folder"),
        (lambda p: os.mkfifo(p), "is a pipe or a device, which is read once; write its text to a file first"),
        (lambda p: None, "no such file"),
    ],
    ids=["empty", "blank", "binary", "folder", "pipe", "missing"],
)
def test_unusable_texts_are_refused(tmp_path: Path, make, message):
    path = tmp_path / "t.txt"
    make(path)
    with pytest.raises(CalibrationError, match=message):
        read_text(str(path))


def test_a_folder_says_what_to_give_instead(tmp_path: Path):
    with pytest.raises(CalibrationError, match="is a folder; give a text file or a dataset's name"):
        read_text(str(tmp_path))
    (tmp_path / "data").mkdir()
    for name in ("dataset_info.json", "data/train.parquet", "data/b.md"):
        (tmp_path / name).touch()
    with pytest.raises(CalibrationError, match=f"give one of its files, such as {tmp_path}/data/train.parquet"):
        read_text(str(tmp_path))
    (tmp_path / "data-00000-of-00001.arrow").touch()  # as save_to_disk leaves it
    with pytest.raises(CalibrationError, match="give a file that the dataset's to_parquet writes"):
        read_text(str(tmp_path))


def test_a_wrong_column_is_refused_with_the_columns_there_are(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"title": "a", "body": "b"}))
    with pytest.raises(
        CalibrationError, match=r"its row cannot be used; .*no column 'text' but title, body; .*--text-c"
    ):
        read_text(str(path))
    path.write_text(json.dumps({f"column{n}": "a" for n in range(40)}))
    with pytest.raises(CalibrationError, match=r"but column0, .*, column11 and 28 more; name the column"):
        read_text(str(path))


def test_a_dataset_is_asked_for_by_name_configuration_and_split(monkeypatch: pytest.MonkeyPatch):
    import datasets

    asked = types.SimpleNamespace()

    def load_dataset(name, config, split, streaming):
        asked.all = (name, config, split, streaming)
        return [{"text": "hello"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_text("org/name:part@test").content == "hello"
    assert asked.all == ("org/name", "part", "test", True)
    read_text("name")
    assert asked.all == ("name", None, "train", True)


def test_a_seed_that_does_not_fit_is_refused():
    with pytest.raises(CalibrationError, match=r"--seed .* is too large"):
        calibration_rows(TOKENS, 2, 8, 2**70, "x")
