"""The commands of docs/commands.md and what they print; ``python tests/commands_page.py`` writes it.

A block of the page that starts with ``$ bitsmoe`` is a command and its output. "…" in an output stands for anything.
"""

import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path

from bitsmoe_modifier.cli import main
from bitsmoe_modifier.sources.demo import demo_asset

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"
_BLOCK = re.compile(r"(?<=```console\n)\$ bitsmoe ([^\n]*)\n(.*?)(?=```)", flags=re.DOTALL)
#: what differs from machine to machine and from run to run: the rest of such a line, and seconds at the end of one
_OWN = re.compile(
    r"^(  (?:made with|on|from|time|tokens) +|  (?:gate|up|down) +bit-widths +).*$|(?<=, )[\d.]+(?= s$)",
    flags=re.MULTILINE,
)
#: the columns of a summary that are times and memory
_MEASURED = ("quantize, s", "peak memory, MB")
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
#: how far a figure may be from the page's, as a factor: other processors sum in another order, and a small model
#: calibrated on few tokens answers with some per cent
WITHIN = 1.3
#: or how far apart, for figures near 0
ABOUT = 0.02


def commands() -> list[tuple[str, str]]:
    """Every command of the page and what it prints."""
    return _BLOCK.findall(PAGE.read_text(encoding="utf-8"))


def prepare(folder: Path) -> None:
    """Put the demo model into a folder, as the page's commands find it."""
    (folder / "docmoe").symlink_to(demo_asset("docmoe"))


def output(command: str) -> str:
    """What a command prints to standard output in the current folder, without what is the machine's own.

    Raises:
        RuntimeError: when it fails.
    """
    said, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
        code = main(shlex.split(command))
    if code:
        raise RuntimeError(f"bitsmoe {command} ended with {code}:\n{complained.getvalue()[-2000:]}")
    return _masked(said.getvalue().strip("\n")) + "\n"


def _masked(text: str) -> str:
    text = _OWN.sub(lambda found: f"{found[1] or ''}…", text.replace(demo_asset("docmoe"), "docmoe"))
    lines = text.splitlines()
    heads = next(([cell.strip() for cell in line.split("|")] for line in lines if _MEASURED[0] in line), [])
    measured = [place for place, head in enumerate(heads) if head in _MEASURED]
    shown = []
    for line in lines:
        cells = line.split("|")
        if len(cells) == len(heads) and not set(line) <= set("|-: ") and _MEASURED[0] not in line:
            cells = [" … " if place in measured else cell for place, cell in enumerate(cells)]
        shown.append("|".join(cells).rstrip())
    return "\n".join(shown)


def differences(expected: str, found: str) -> list[str]:
    """Lines that say something else: other words, or a figure further off than `WITHIN` and `ABOUT`."""
    one, other = expected.strip().splitlines(), found.strip().splitlines()
    if len(one) != len(other):
        return [f"{len(one)} lines on the page, {len(other)} printed"]
    return [f"{a!r} on the page, {b!r} printed" for a, b in zip(one, other, strict=True) if not _agree(a, b)]


def _agree(expected: str, found: str) -> bool:
    pattern = "".join(
        r"(-?[\d.,e+-]+)" if piece[0] else re.escape(piece[1]).replace("…", ".*").replace(r"\ ", r"\s*")
        for piece in _pieces(expected)
    )
    match = re.fullmatch(pattern, found)
    if match is None:
        return False
    wanted = [_value(text) for is_number, text in _pieces(expected) if is_number]
    return all(_near(a, _value(b)) for a, b in zip(wanted, match.groups(), strict=True))


def _pieces(line: str) -> list[tuple[bool, str]]:
    """A line in numbers (True) and what is between them."""
    pieces, end = [], 0
    for number in _NUMBER.finditer(line):
        pieces += [(False, line[end : number.start()]), (True, number[0])]
        end = number.end()
    return [piece for piece in [*pieces, (False, line[end:])] if piece[1]]


def _value(text: str) -> float:
    return float(text.replace(",", "").rstrip(".-+e") or "nan")


def _near(expected: float, found: float) -> bool:
    if abs(expected - found) <= ABOUT:
        return True
    return expected * found > 0 and max(expected / found, found / expected) <= WITHIN


def write() -> None:
    """Run every command of the page and put what it prints in its place."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        os.chdir(folder)
        for command, _ in commands():
            print(f"$ bitsmoe {command}", file=sys.stderr, flush=True)
            printed = output(command)
            text = PAGE.read_text(encoding="utf-8")
            place = text.index(f"$ bitsmoe {command}\n") + len(f"$ bitsmoe {command}\n")
            PAGE.write_text(text[:place] + printed + text[text.index("```", place) :], encoding="utf-8")


if __name__ == "__main__":
    write()
