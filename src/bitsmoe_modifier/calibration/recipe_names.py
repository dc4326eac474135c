"""Names in a recipe that nothing has, found in its text with file and line, before anything heavy is imported.

Which modifiers there are and which fields they have is read from the sources of this package and of llm-compressor,
without running them.
"""

import ast
import re
from collections.abc import Iterator
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import yaml

from ..errors import RecipeError
from ..extras import installed

_CLASS = re.compile(r"^class (\w+)\(([^)]*)\)", re.MULTILINE)
#: names of fields that are no longer among a class's own
_OLD_NAMES = {"BitsMoEModifier": ("widths",)}
_STAGE, _GROUP = "_stage", "_modifiers"


def check_keys(path: Path, text: str) -> dict[str, str]:
    """Check the keys of a recipe.

    Args:
        path: of the recipe, for messages.
        text: its YAML, which can be parsed.

    Returns:
        By the keys of stages: what is wrong with a modifier's name or fields, with file, line and the nearest known
        name. Stages that nothing is wrong with are left out.

    Raises:
        RecipeError: when a key is given twice, of which YAML takes the last, or a stage's or a group's key is
            misspelled, which llm-compressor passes over.
    """
    problems: dict[str, str] = {}
    for stage, body in _items(yaml.compose(text), path):
        if not stage.value.endswith(_STAGE):
            _refuse_near(path, stage, _STAGE)
            continue
        for group, modifiers in _items(body, path):
            if not group.value.endswith(_GROUP):
                _refuse_near(path, group, _GROUP)
                continue
            for modifier, fields in _items(modifiers, path):
                found = _unknown_modifier(modifier.value)
                if found:
                    problems.setdefault(stage.value, f"{_at(path, modifier)}: {found}")
                    continue
                for field, value in _items(fields, path):
                    found = _unknown_field(modifier.value, field.value)
                    if found:
                        problems.setdefault(stage.value, f"{_at(path, field)}: {found}")
                    _walk(value, path)
    return problems


def did_you_mean(name: str, known: list[str]) -> str:
    """``; did you mean 'x'?`` with the nearest of the known names, case aside; "" where none is near."""
    lower = {one.lower(): one for one in known}
    near = get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    return f"; did you mean {lower[near[0]]!r}?" if near else ""


def _items(node: yaml.Node | None, path: Path) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
    """The pairs of a mapping; nothing of another node."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, yaml.ScalarNode] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.value == "<<":  # the pairs of another mapping, merged in
            continue
        if key.value in seen:
            first = seen[key.value].start_mark.line + 1
            raise RecipeError(
                f"{_at(path, key)}: {key.value!r} is given a second time (line {first}); keep one of them"
            )
        seen[key.value] = key
        yield key, value


def _walk(node: yaml.Node, path: Path) -> None:
    """Look for keys that are given twice further down."""
    for _, value in _items(node, path):
        _walk(value, path)
    for value in node.value if isinstance(node, yaml.SequenceNode) else ():
        _walk(value, path)


def _refuse_near(path: Path, key: yaml.ScalarNode, ending: str) -> None:
    """Refuse a key whose ending is nearly, but not quite, the one that makes it count."""
    last = "_" + key.value.rpartition("_")[2]
    if get_close_matches(last.lower(), [ending], cutoff=0.7):
        remedy = f"write {key.value.rpartition('_')[0] or 'quant'}{ending}"
        raise RecipeError(
            f"{_at(path, key)}: {key.value!r} does not end in {ending!r} and would be passed over; {remedy}"
        )


def _at(path: Path, node: yaml.Node) -> str:
    return f"{path}:{node.start_mark.line + 1}"


def _unknown_modifier(name: str) -> str:
    known = modifiers()
    if name in known or len(known) == 1:  # without llm-compressor nothing is known of the others
        return ""
    stems = {one.removesuffix("Modifier").lower(): one for one in known}
    close = get_close_matches(name.removesuffix("Modifier").lower(), stems, n=1, cutoff=0.6)
    near = f"; did you mean {stems[close[0]]!r}?" if close else ""
    return f"no modifier is called {name!r}{near or '; there are ' + ', '.join(sorted(known))}"


def _unknown_field(modifier: str, name: str) -> str:
    known = fields_of(modifier)
    if not known or name in known or name in _OLD_NAMES.get(modifier, ()):
        return ""
    near = did_you_mean(name, sorted(known))
    return f"{modifier} has no field {name!r}{near or '; it has ' + ', '.join(sorted(known))}"


@cache
def modifiers() -> frozenset[str]:
    """Names of the modifiers that can be used in a recipe."""
    return frozenset(name for name in _classes() if name.endswith("Modifier") and name != "Modifier")


@cache
def fields_of(modifier: str) -> frozenset[str]:
    """Fields of a modifier, its base classes' included; none where its source is not here."""
    found: set[str] = set()
    for file, bases in _classes().get(modifier, ()):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name == modifier:
                annotated = [one.target for one in node.body if isinstance(one, ast.AnnAssign)]
                found |= {target.id for target in annotated if isinstance(target, ast.Name)}
        found |= {name for base in bases if base != modifier for name in fields_of(base)}
    return frozenset(name for name in found if not name.startswith("_"))


@cache
def _classes() -> dict[str, list[tuple[Path, tuple[str, ...]]]]:
    """File and base classes of every class of llm-compressor's modifiers, and of ours; some are defined twice."""
    found: dict[str, list[tuple[Path, tuple[str, ...]]]] = {}
    spec = find_spec("llmcompressor") if installed("llmcompressor") else None
    folders = [Path(place) / "modifiers" for place in (spec.submodule_search_locations or ())] if spec else []
    files = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    ours = (Path(__file__).with_name(name) for name in ("fields.py", "modifier.py"))
    for file in [*files, *ours]:
        for name, bases in _CLASS.findall(file.read_text(encoding="utf-8")):
            names = tuple(base.strip().rpartition(".")[2] for base in bases.split(",") if "=" not in base)
            found.setdefault(name, []).append((file, names))
    return found
