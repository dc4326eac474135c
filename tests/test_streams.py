"""Terminals and pipes that cannot take what a command prints."""

import io
from pathlib import Path

import pytest

from bitsmoe_modifier.cli import main
from helpers import pack_randomly, save, tiny_model


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model("qwen3_moe")
    pack_randomly(model)
    return save(model, tmp_path_factory.mktemp("packed"))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_without_unicode(packed: Path, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    held = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(held, encoding=encoding, write_through=True))
    assert main(["inspect", str(packed)]) == 0
    assert b"model.layers.0.mlp.experts: 8 experts of 32 " in held.getvalue()


def test_a_disk_that_is_full(packed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(full, encoding="utf-8", write_through=True))
        assert main(["inspect", str(packed)]) == 1
        monkeypatch.undo()
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1] == "bitsmoe inspect: [Errno 28] No space left on device (--verbose shows what was being done)"
    assert not any(line.startswith("Traceback") for line in said)
