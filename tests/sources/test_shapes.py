"""Calibration text as people have it: used, or skipped with a count; an unusable file is an error of one line."""

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bitsmoe_modifier.errors import CalibrationError
from bitsmoe_modifier.sources.text import read_text, tokenize

GOOD = {"text": "the quick brown fox"}
TURNS = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Two."}]


class Tokenizer:
    """Characters are tokens; chats are rendered as transformers' template would."""

    chat_template = "a template"
    pad_token_id, eos_token_id = 0, 2

    def __len__(self) -> int:
        return 1000

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}

    def apply_chat_template(self, turns: list[dict[str, Any]], tokenize: bool) -> str:
        assert not tokenize
        if turns[0]["role"] == "assistant":
            raise ValueError("Conversation roles must\nalternate")
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in turns)


def jsonl(path: Path, *rows: object) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return str(path)


def read(source: str, **options: Any) -> str:
    return read_text(source, tokenizer=Tokenizer(), **options).content


# ---------------------------------------------------------------------------------------- rows that give no text


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": None}, "null (first: line 2, column 'text')"),
        ({"title": "x"}, "no column 'text' but title (first: line 2)"),
        ({}, "no column 'text' but none (first: line 2)"),
        ({"text": 17}, "a number, not text (first: line 2, column 'text')"),
        ({"text": 1.5}, "a number, not text (first: line 2, column 'text')"),
        ({"text": True}, "true or false, not text (first: line 2, column 'text')"),
        ({"text": {"a": 1}}, "an object, not text (first: line 2, column 'text')"),
        ({"text": []}, "a list, not text (first: line 2, column 'text')"),
        ({"text": "  \n"}, "blank (first: line 2, column 'text')"),
        ("{broken", "not JSON (first: line 2)"),
        ('"', "not JSON (first: line 2)"),
        ("17", "a number, not an object with columns (first: line 2)"),
    ],
    ids=str,
)
def test_one_row_without_text_is_skipped_and_counted(
    row: object, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = jsonl(tmp_path / "t.jsonl", GOOD, row, GOOD)
    assert read(source) == "the quick brown fox\n\nthe quick brown fox"
    assert capsys.readouterr().err == f"{source}: 1 of 3 rows read were skipped: 1: {reason}\n"


def test_a_first_line_that_is_broken_is_skipped_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert read(jsonl(tmp_path / "t.jsonl", "{'text': 'python'}", GOOD, GOOD)).count("fox") == 2
    assert "1 of 3 rows read were skipped: 1: not JSON (first: line 1)" in capsys.readouterr().err


def test_blank_csv_cells_are_skipped_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.csv").write_text('id,text\n1,"one, two"\n2,\n3\n4,"a\nb",more\n', newline="\r\n")
    assert read(str(tmp_path / "t.csv")) == "one, two\n\na\nb"
    said = capsys.readouterr().err
    assert "2 of 4 rows read were skipped" in said
    assert "1: blank (first: row 2, column 'text')" in said
    assert "1: null (first: row 3, column 'text')" in said


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": None}] * 3, "none of the 3 rows can be used; line 1, column 'text': null"),
        ([{"text": 5}] * 2, "none of the 2 rows can be used; line 1, column 'text': a number, not text"),
        ([{"title": "a", "body": "b"}] * 2, "line 1: no column 'text' but title, body; name .* by --text-column"),
        (["{broken"] * 2, "none of the 2 rows can be used; line 1: not JSON"),
        ([{"text": None}] * 3000, "none of the first 1000 rows can be used"),
    ],
    ids=["nulls", "numbers", "another-column", "no-json", "long"],
)
def test_an_unusable_table_is_one_line_with_row_and_column(rows: list[object], said: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=said) as caught:
        read(jsonl(tmp_path / "t.jsonl", *rows))
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ other columns


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {"conversations": [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Two."}]},
        {"conversation": TURNS},
        {"text": None, "messages": TURNS},
        {"messages": json.dumps(TURNS)},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "How many?"}]}, TURNS[1]]},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"text": TURNS},
    ],
    ids=["messages", "sharegpt", "conversation", "text-null", "json-in-json", "parts", "prompt-completion", "in-text"],
)
def test_chats_are_rendered_by_the_chat_template(row: dict[str, object], tmp_path: Path) -> None:
    assert read(jsonl(tmp_path / "t.jsonl", row, row)) == "\n\n".join(["<user>How many?<assistant>Two."] * 2)


def test_a_named_column_of_chats(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "t.jsonl", {"text": "no", "dialogue": TURNS}, {"text": "no", "dialogue": TURNS})
    assert read(source, column="dialogue").startswith("<user>")


def test_a_chat_that_the_template_refuses_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert read(jsonl(tmp_path / "t.jsonl", {"messages": TURNS[1:]}, {"messages": TURNS})) == (
        "<user>How many?<assistant>Two."
    )
    assert "the chat template refuses it (Conversation roles must alternate)" in capsys.readouterr().err


def test_without_a_chat_template_what_was_said_is_used(tmp_path: Path) -> None:
    assert read_text(jsonl(tmp_path / "t.jsonl", {"messages": TURNS}), tokenizer=None).content == "How many?\n\nTwo."


def test_the_chat_template_of_a_real_tokenizer(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    text = read_text(jsonl(tmp_path / "t.jsonl", {"messages": TURNS}), tokenizer=tokenizer)
    assert text.content == "user: How many?\nassistant: Two.\n"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Q", "completion": "A"}, "Q\n\nA"),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, "Add.\n\n1 2\n\n3"),
        ({"instruction": "Sing.", "input": "", "output": "La"}, "Sing.\n\nLa"),
        ({"question": "Q", "answer": "A", "id": 7}, "Q\n\nA"),
    ],
    ids=["prompt", "alpaca", "alpaca-without-input", "question"],
)
def test_pairs_follow_each_other(row: dict[str, object], expected: str, tmp_path: Path) -> None:
    assert read(jsonl(tmp_path / "t.jsonl", row)) == expected


# ------------------------------------------------------------------------------------------------------ tokens


def ids_of(source: str) -> list[int]:
    return tokenize(read_text(source, tokenizer=Tokenizer()), Tokenizer()).tolist()


def test_rows_of_input_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    assert ids_of(jsonl(tmp_path / "t.jsonl", {"input_ids": [5, 6, 7]}, {"input_ids": [8]})) == [5, 6, 7, 8]
    (tmp_path / "one.json").write_text(json.dumps({"input_ids": [[5, 6], [7]]}))
    assert ids_of(str(tmp_path / "one.json")) == [5, 6, 7]


def test_padding_of_input_ids_is_left_out(tmp_path: Path) -> None:
    masked = {"input_ids": [9, 9, 5, 6], "attention_mask": [0, 0, 1, 1]}
    assert ids_of(jsonl(tmp_path / "t.jsonl", masked, {"input_ids": [0, 0, 7, 0, 8, 0]})) == [5, 6, 7, 0, 8]


@pytest.mark.parametrize("ids", [[5, -100], [5, 1000], ["5"], [True], [], 5], ids=str)
def test_what_are_no_input_ids_is_skipped(ids: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ids_of(jsonl(tmp_path / "t.jsonl", {"input_ids": [5]}, {"input_ids": ids})) == [5]
    assert "1 of 2 rows read were skipped" in capsys.readouterr().err


def test_text_and_tokens_may_be_mixed(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "t.jsonl", {"text": "a"}, {"text": "b"}, {"input_ids": [5]}, {"text": "c"})
    assert ids_of(source) == [97, 10, 10, 98, 5, 99]
    assert tokenize(read_text(source), Tokenizer()).dtype == torch.int64


# ------------------------------------------------------------------------------------------- files and their bytes

ROW = json.dumps(GOOD)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("t.jsonl.gz", gzip.compress(f"{ROW}\n{ROW}".encode())),
        ("t.jsonl", gzip.compress(f"{ROW}\n{ROW}".encode())),
        ("t.jsonl.bz2", bz2.compress(f"{ROW}\n{ROW}".encode())),
        ("t.json.gz", gzip.compress(f"[{ROW},\n{ROW}]".encode())),
        ("t.JSONL", f"{ROW}\r\n\r\n{ROW}\r\n".encode()),
        ("t.jsonl", f"\ufeff{ROW}\n{ROW}".encode()),
        ("t.jsonl", f"\ufeff{ROW}\n{ROW}".encode("utf-16-le")),
        ("t.json", f"[{ROW}, {ROW}]".encode()),
        ("t.jsonl", f"[{ROW}, {ROW}]".encode()),
        ("t.json", json.dumps({"data": [GOOD, GOOD]}, indent=1).encode()),
        ("t.json", json.dumps({"version": 1, "data": [GOOD, GOOD]}).encode()),
        ("t.json", json.dumps({"text": [GOOD["text"]] * 2, "id": [1, 2]}).encode()),
        ("t.json", f"{ROW}\n{ROW}".encode()),
        ("t.csv.gz", gzip.compress(f"id,text\n1,{GOOD['text']}\n2,{GOOD['text']}".encode())),
        ("t.csv", f"\ufeffid;text\r\n1;{GOOD['text']}\r\n2;{GOOD['text']}\r\n".encode()),
        ("t.tsv", f"id\ttext\n1\t{GOOD['text']}\n2\t{GOOD['text']}".encode()),
        ("t.txt.gz", gzip.compress(f"{GOOD['text']}\n\n{GOOD['text']}".encode())),
        ("t.txt", f"\ufeff{GOOD['text']}\r\n\r\n{GOOD['text']}".encode()),
    ],
    ids=[
        *("jsonl-gz", "gz-without-ending", "jsonl-bz2", "json-gz", "upper-case-crlf", "mark", "utf-16", "json-list"),
        *("list-in-jsonl", "rows-in-data", "rows-in-data-on-one-line", "columns", "lines-in-json", "csv-gz"),
        *("csv-with-semicolons", "tsv", "txt-gz", "txt-with-mark"),
    ],
)
def test_a_file_is_read_however_it_is_packed(
    name: str, data: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(data)
    assert read(str(tmp_path / name)) == f"{GOOD['text']}\n\n{GOOD['text']}"
    assert capsys.readouterr().err == ""


def test_a_single_chat_in_a_json_file_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps({"messages": TURNS}, indent=1))
    assert read(str(tmp_path / "t.json")) == "<user>How many?<assistant>Two."


def test_parquet_with_nulls_and_chats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", None], "n": [1, 2]}), tmp_path / "t.parquet")
    assert read(str(tmp_path / "t.parquet")) == "a"
    assert "1 of 2 rows read were skipped: 1: null (first: row 2, column 'text')" in capsys.readouterr().err
    parquet.write_table(pyarrow.table({"messages": [TURNS]}), tmp_path / "c.parquet")
    assert read(str(tmp_path / "c.parquet")) == "<user>How many?<assistant>Two."


def test_latin_1_is_read_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_bytes("Café, déjà vu".encode("latin-1"))
    assert read(str(tmp_path / "t.txt")) == "Café, déjà vu"
    assert "it is not UTF-8 and was read as Latin-1" in capsys.readouterr().err
    (tmp_path / "t.jsonl").write_bytes('{"text": "Café"}\n{"text": "déjà"}'.encode("latin-1"))
    assert read(str(tmp_path / "t.jsonl")) == "Café\n\ndéjà"


def test_utf_8_with_damage_loses_the_damage_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_bytes("Wörter über Wörter".encode() + b"\xff!")
    assert read(str(tmp_path / "t.txt")) == "Wörter über Wörter!"
    assert "1 bytes that are not UTF-8 were left out" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize(
    ("name", "data"), [("t.txt", GOOD["text"]), ("t.jsonl", ROW), ("t.csv", f"text\n{GOOD['text']}")]
)
def test_utf_16_without_a_mark(tmp_path: Path, name: str, data: str, encoding: str) -> None:
    (tmp_path / name).write_bytes(f"{data}\n".encode(encoding))
    assert read(str(tmp_path / name)).strip() == GOOD["text"]


def test_stray_zeros_are_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_bytes(b"a text " * 100 + b"\0" + b"of a log")
    assert read(str(tmp_path / "t.txt")).endswith("a text of a log")
    assert "1 bytes of 0 were left out" in capsys.readouterr().err


def test_one_huge_line(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("word " * 400_000)
    assert len(read(str(tmp_path / "t.txt"))) == 2_000_000
    assert len(read(jsonl(tmp_path / "t.jsonl", {"text": "word " * 400_000}))) == 2_000_000
    (tmp_path / "t.csv").write_text("text\n" + "word " * 400_000)
    assert len(read(str(tmp_path / "t.csv"))) == 2_000_000


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("t.jsonl", b"", "is empty"),
        ("t.csv", b"text\n", "is empty"),
        ("t.csv", b"", "is empty"),
        ("t.json", b"[]", "is empty"),
        ("t.jsonl.gz", gzip.compress(b""), "is empty"),
        ("t.jsonl.gz", gzip.compress(f"{ROW}\n".encode() * 500)[:-20], "is damaged or cut off"),
        ("t.txt.gz", gzip.compress(bytes(range(1, 250)) * 50)[:60], "is damaged or cut off"),
        ("t.jsonl.zst", b"\x28\xb5\x2f\xfd1234", "packed by zstd; unpack it first"),
        ("t.parquet", b"PAR1 and nothing else", "is not a readable parquet file"),
        ("t.txt", b"name" + bytes(100) + b"ustar" + bytes(200) + b"text", "is no text: 300 of its 313 bytes are 0"),
        ("t.txt", b"%PDF-1.7\0\xff\xfe\xe9", "is not UTF-8 text"),
    ],
    ids=[
        *("empty", "header-only", "empty-csv", "empty-list", "empty-gz", "cut-off", "txt-cut-off", "zstd"),
        *("parquet", "tar", "binary"),
    ],
)
def test_an_unusable_file_is_one_line(name: str, data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CalibrationError, match=said) as caught:
        read(str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_dataset_that_fails_in_a_row_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def rows() -> Any:
        yield GOOD
        raise TypeError("cannot cast\nthis column")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows())
    with pytest.raises(CalibrationError, match="org/name: row 2 cannot be read: cannot cast this column"):
        read("org/name")
