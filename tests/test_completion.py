"""Completion scripts: bash's is run, fish's is read."""

import shutil
import subprocess

import pytest

from bitsmoe_modifier.cli import build_parser, main
from bitsmoe_modifier.completion import SHELLS, script


def complete(words: list[str], tmp_path) -> list[str]:
    """What bash offers at the end of a command line."""
    source = tmp_path / "bitsmoe.bash"
    source.write_text(script(build_parser(), "bash"))
    line = " ".join(f"'{word}'" for word in words)
    state = f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}"
    command = f"source {source}; {state}; _bitsmoe; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, cwd=tmp_path)
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["bitsmoe", "comp"], ["compare", "completion"]),
        (["bitsmoe", "compare", "--ar"], ["--arms"]),
        (["bitsmoe", "compare", "--dtype", "b"], ["bfloat16"]),
        (["bitsmoe", "completion", "z"], ["zsh"]),
        (["bitsmoe", "inspect", "my"], ["my-folder"]),
        (["bitsmoe", "compare", "--model", "my"], ["my-folder"]),
        (["bitsmoe", "inspect", "--fresh"], []),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) and value else None,
)
def test_bash_completes(words, expected, tmp_path):
    (tmp_path / "my-folder").mkdir()
    assert complete(words, tmp_path) == expected


@pytest.mark.parametrize("shell", SHELLS)
def test_every_command_is_known_to_every_shell(shell, capsys):
    assert main(["completion", shell]) == 0
    printed = capsys.readouterr().out
    for name in ("quantize", "compare", "eval", "inspect", "export", "import", "completion"):
        assert name in printed
    assert "calibrate-all-experts" in printed
