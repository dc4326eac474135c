"""The BitsMoEModifiers of a recipe, in any form that `oneshot` takes."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from llmcompressor.recipe import Recipe
from llmcompressor.recipe.utils import _parse_recipe_from_md

from ..errors import RecipeError

#: `BitsMoEModifier.targets` where a recipe does not say
EVERY = (r"re:.*\.experts$",)


def bitsmoe_modifiers(recipe: Any, stage: str | None = None) -> list[Any]:
    """The BitsMoEModifiers of a recipe, read as llm-compressor is going to read it.

    Args:
        recipe: a YAML or JSON text, a file's path, a modifier, a recipe of llm-compressor, or a list of modifiers.
        stage: the beginning of the names of the stages that count, as `oneshot` takes it; None: all.

    Raises:
        ValueError: when it is none of these.
    """
    if not recipe:
        return []
    found = Recipe.create_instance(path_or_modifiers=recipe, target_stage=stage).modifiers
    return [one for one in found if type(one).__name__ == "BitsMoEModifier"]


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
    """What the text of a recipe says, or of the file that it names, as llm-compressor reads them."""
    name = str(recipe)
    if not os.path.isfile(name):  # of a text that is no path, `Path.is_file` raises that it is too long
        return yaml.safe_load(name)
    text = Path(name).read_text(encoding="utf-8")
    return yaml.safe_load(_parse_recipe_from_md(name, text) if name.lower().endswith(".md") else text)


def _items(content: Any) -> list[tuple[str, Any]]:
    return [(str(name), value) for name, value in content.items()] if isinstance(content, dict) else []


def _within(content: Any) -> Iterator[str]:
    """The names of the BitsMoEModifiers in a recipe's content, wherever they are; a text is a value and no recipe."""
    for name, value in content.items() if isinstance(content, dict) else ():
        if name == "BitsMoEModifier":
            yield name
        else:
            yield from _within(value)
    for one in content if isinstance(content, list) else ():
        yield from _within(one)
