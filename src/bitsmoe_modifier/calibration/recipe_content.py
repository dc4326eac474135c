"""The fields of the BitsMoEModifiers of a recipe, in any form that `oneshot` takes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

#: `BitsMoEModifier.targets` where a recipe does not say
EVERY = (r"re:.*\.experts$",)


def bitsmoe_fields(recipe: Any) -> Iterator[dict[str, Any]]:
    """The fields of every BitsMoEModifier of a recipe: those that were given, or, of a modifier, where it works.

    Args:
        recipe: a YAML text, a file's path, its content, a modifier, a recipe of llm-compressor, or a list of these.
    """
    if isinstance(recipe, (str, Path)):
        path = Path(recipe)
        is_file = len(str(recipe)) < 4096 and "\n" not in str(recipe) and path.is_file()
        yield from _within(yaml.safe_load(path.read_text(encoding="utf-8") if is_file else str(recipe)))
    elif isinstance(recipe, dict):
        yield from _within(recipe)
    elif isinstance(recipe, (list, tuple)):
        for one in recipe:
            yield from bitsmoe_fields(one)
    elif type(recipe).__name__ == "BitsMoEModifier":
        yield {"targets": recipe.targets, "ignore": recipe.ignore}
    else:
        yield from (bitsmoe_fields(recipe.modifiers) if hasattr(recipe, "modifiers") else ())


def _within(content: Any) -> Iterator[dict[str, Any]]:
    """The same of a recipe's content, in which a text is a value and no recipe."""
    for name, value in content.items() if isinstance(content, dict) else ():
        if name == "BitsMoEModifier":
            yield value or {}
        else:
            yield from _within(value)
    for one in content if isinstance(content, list) else ():
        yield from _within(one)
