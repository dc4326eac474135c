"""Write docs/fields.md from `BitsMoEModifier`: ``python tests/calibration/fields_page.py``."""

import inspect
import re
from pathlib import Path
from typing import Any

from bitsmoe_modifier import BitsMoEModifier

PAGE = Path(__file__).parents[2] / "docs" / "fields.md"
_HEAD = """# Fields of BitsMoEModifier

<!-- Written by `python tests/calibration/fields_page.py` from the class; do not edit. -->

Every field that a recipe may have, with its default; only `bits` is worth thinking about at first. The same from
Python: `BitsMoEModifier(bits=2.0, ...)`. Fields that llm-compressor gives every modifier are left out.
"""


def documented() -> dict[str, str]:
    """What the class's docstring says of every field, on one line each."""
    text = inspect.cleandoc(BitsMoEModifier.__doc__ or "").split("\nArgs:\n")[1]
    entries: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        found = re.match(r"    (\w+): (.*)", line)
        if found:
            name = found[1]
            entries[name] = found[2]
        elif line.strip():
            entries[name] += " " + line.strip()
    return entries


def own_fields() -> dict[str, Any]:
    """The fields that the class adds to llm-compressor's modifiers, without those that are no part of a recipe."""
    bases = (base for base in BitsMoEModifier.__mro__ if base.__module__.startswith("llmcompressor."))
    inherited = {name for base in bases for name in getattr(base, "model_fields", {})}
    return {
        name: field
        for name, field in BitsMoEModifier.model_fields.items()
        if name not in inherited and name not in ("survey_only", "sweep")
    }


def page() -> str:
    """The page as Markdown."""
    said, lines = documented(), [_HEAD, "| field | default | meaning |", "|---|---|---|"]
    for name, field in own_fields().items():
        default = field.get_default(call_default_factory=True)
        shown = "none" if default is None else str(default).lower() if isinstance(default, bool) else f"{default}"
        lines.append(f"| `{name}` | {_cell(f'`{shown}`')} | {_cell(said[name])} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
