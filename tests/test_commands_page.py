"""What docs/commands.md shows is what the commands print."""

from pathlib import Path

import pytest

from bitsmoe_modifier.cli.app import app
from commands_page import PAGE, commands, differences, output, prepare

#: what the demo model is no input for
_NOT_RUN = {"import"}


def test_every_command_is_shown() -> None:
    shown = {command.split()[0] for command, _ in commands()}
    assert shown == {command.name for command in app.registered_commands} - _NOT_RUN
    assert all(name in PAGE.read_text(encoding="utf-8") for name in _NOT_RUN)
    assert all(printed.strip() for _, printed in commands())


@pytest.mark.slow
def test_the_commands_print_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    for command, printed in commands():
        assert differences(printed, output(command)) == [], command


@pytest.mark.parametrize(
    ("expected", "found", "same"),
    [
        ("2.000 bits, KLD 1.52 ± 0.04", "2.000 bits, KLD 1.61 ± 0.05", True),
        ("2.000 bits, KLD 1.52", "2.000 bits, KLD 2.52", False),
        ("| a | … |", "| a | 37 |", True),
        ("size 1.53", "seize 1.53", False),
        ("a\nb", "a", False),
        ("model.layers.0.mlp", "model.layers.1.mlp", False),
        ("KLD -0.5", "KLD 0.5", False),
    ],
)
def test_what_counts_as_different(expected: str, found: str, same: bool) -> None:
    assert (differences(expected, found) == []) is same
