"""What shells do to a command: variables that are not set, ``~``, terminals that cannot take its words."""

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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quantize", "--model", "m", "--calibration", "", "--out", "o"], "bitsmoe quantize: --calibration is empty"),
        (["quantize", "--model=", "--out", "o"], "bitsmoe quantize: --model is empty"),
        (["compare", "--eval-text", ""], "bitsmoe compare: --eval-text is empty"),
        (["eval", "folder", "--json", ""], "bitsmoe eval: --json is empty"),
        (["inspect", ""], "bitsmoe inspect: DIR is empty"),
    ],
)
def test_a_variable_that_is_not_set(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Would pass for an option that is not given: the demo's text in the place of the user's."""
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"{said} (a variable that is not set?); give it a value, or leave it out\n"


def test_a_tilde_that_the_shell_has_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of/nobody")
    assert main(["inspect", "~/checkpoint"]) == 2
    assert "/home/of/nobody/checkpoint: no such model folder" in capsys.readouterr().err


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
