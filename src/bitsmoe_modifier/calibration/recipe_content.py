"""The fields of the BitsMoEModifiers of a recipe, in any form that `oneshot` takes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ..errors import RecipeError

#: `BitsMoEModifier.targets` where a recipe does not say
EVERY = (r"re:.*\.experts$",)


def bitsmoe_fields(recipe: Any) -> Iterator[dict[str, Any]]:
    """The fields of every BitsMoEModifier of a recipe: those that were given, or, of a modifier, where it works.

    Args:
        recipe: a YAML text, a file's path, its content, a modifier, a recipe of llm-compressor, or a list of these.
    """
    if isinstance(recipe, (str, Path)):
        yield from _within(_content(recipe))
    elif isinstance(recipe, dict):
        yield from _within(recipe)
    elif isinstance(recipe, (list, tuple)):
        for one in recipe:
            yield from bitsmoe_fields(one)
    elif type(recipe).__name__ == "BitsMoEModifier":
        yield {"targets": recipe.targets, "ignore": recipe.ignore}
    else:
        yield from (bitsmoe_fields(recipe.modifiers) if hasattr(recipe, "modifiers") else ())


def check_places(recipe: Any, stage: str | None = None) -> None:
    """Refuse a YAML recipe with a BitsMoEModifier where llm-compressor reads no modifiers: it would pass over it, and
    save the model as it was, without a word.

    Args:
        recipe: in any form that `oneshot` takes; in all others every modifier is run.
        stage: with which the names of the stages begin that are to be run; None: all.

    Raises:
        RecipeError: saying where modifiers belong, or naming the stages.
    """
    if not isinstance(recipe, (str, Path)):
        return
    content = _content(recipe)
    stages = {name: body for name, body in _items(content) if name.endswith("_stage")}
    groups = [group for body in stages.values() for name, group in _items(body) if name.endswith("_modifiers")]
    read = sum(name == "BitsMoEModifier" for group in groups for name, _ in _items(group))
    if read < sum(1 for _ in _within(content)):
        raise RecipeError(
            "the recipe has a BitsMoEModifier where llm-compressor reads no modifiers, and would pass over it; write "
            "it under a key that ends in '_modifiers' (quant_modifiers:), and that under one that ends in '_stage' "
            "(quant_stage:), without dashes"
        )
    if read and stage and not any(name.startswith(stage) for name in stages):
        known = ", ".join(name.removesuffix("_stage") for name in stages)
        raise RecipeError(f"stage={stage!r}: the recipe has no such stage; it has {known}")


def _content(recipe: str | Path) -> Any:
    """What the text of a recipe says, or of the file that it names."""
    path = Path(recipe)
    is_file = len(str(recipe)) < 4096 and "\n" not in str(recipe) and path.is_file()
    return yaml.safe_load(path.read_text(encoding="utf-8") if is_file else str(recipe))


def _items(content: Any) -> list[tuple[str, Any]]:
    return [(str(name), value) for name, value in content.items()] if isinstance(content, dict) else []


def _within(content: Any) -> Iterator[dict[str, Any]]:
    """The same of a recipe's content, in which a text is a value and no recipe."""
    for name, value in content.items() if isinstance(content, dict) else ():
        if name == "BitsMoEModifier":
            yield value or {}
        else:
            yield from _within(value)
    for one in content if isinstance(content, list) else ():
        yield from _within(one)
