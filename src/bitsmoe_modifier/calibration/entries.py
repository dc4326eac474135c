"""Entries of ``targets`` and ``ignore`` that match nothing: typos, of which a run would say nothing."""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from compressed_tensors.utils.match import is_match
from torch import nn

from .. import messages
from ..errors import RecipeError
from .linearizing import experts_modules

#: names that a message offers
_OFFERED = 3


def check_entries(
    model: nn.Module, experts: Mapping[str, nn.Module], targets: Sequence[str], ignore: Sequence[str]
) -> None:
    """Refuse entries of ``targets`` that match no experts module, and of ``ignore`` that match no module at all.

    Args:
        model: any of its modules may be ignored.
        experts: its experts modules by name.
        targets, ignore: names, names of classes, or regular expressions after "re:".

    Raises:
        RecipeError: naming the entry and the nearest names.
    """
    check_patterns(targets, ignore)
    everything = dict(model.named_modules())
    for field, entries, modules, kind in (
        ("targets", targets, experts, "experts module"),
        ("ignore", ignore, everything, "module"),
    ):
        for entry in entries:
            if not any(is_match(name, module, entry) for name, module in modules.items()):
                raise RecipeError(
                    f"{field}: {entry!r} matches no {kind} of the model; {near_names(entry, modules, experts)}"
                )


def check_patterns(*fields: Sequence[str]) -> None:
    """Refuse regular expressions that are none.

    Raises:
        RecipeError: naming the entry.
    """
    for entry in (entry for entries in fields for entry in entries):
        if entry.startswith("re:"):
            try:
                re.compile(entry.removeprefix("re:"))
            except re.error as error:
                raise RecipeError(f"{entry!r} is no regular expression ({error}); write re:.*name.*") from None


def near_names(entry: str, modules: Mapping[str, nn.Module], experts: Mapping[str, nn.Module]) -> str:
    """What was perhaps meant, for a message: names like the entry, or else the experts modules."""
    literal = re.sub(r"^re:|\\[dwsDWS][+*?]?|[.][*+?]+|[\\^$()\[\]?*+|]", "", entry).strip(".")
    names = [name for name in modules if name]
    near = get_close_matches(literal, names, n=_OFFERED, cutoff=0.7)
    if not near:  # a part of a name
        parts = literal.count(".") + 1
        pieces: dict[str, str] = {}
        for name in names:
            words = name.split(".")
            for start in range(len(words) - parts + 1):
                pieces.setdefault(".".join(words[start : start + parts]), name)
        near = [pieces[piece] for piece in get_close_matches(literal, pieces, n=_OFFERED, cutoff=0.6)]
    if near:
        return f"near it {'is' if len(near) == 1 else 'are'} {', '.join(near)}"
    rest = len(experts) - _OFFERED
    shown = ", ".join(list(experts)[:_OFFERED]) + (f" and {rest} more" if rest > 0 else "")
    return f"the experts modules are {shown}"


def check_others(model: nn.Module, recipe: Mapping[str, Any]) -> None:
    """Check the entries of a recipe's other modifiers, of which llm-compressor says nothing: it quantizes nothing then.

    Args:
        model: as transformers builds it.
        recipe: its YAML as an object.

    Raises:
        RecipeError: when an entry of ``targets`` matches nothing, naming the nearest names.
    """
    linear = nn.Linear(1, 1, device="meta")
    modules = dict(model.named_modules())
    experts = dict(experts_modules(model))
    for name, module in experts.items():
        for expert in range(int(getattr(module, "num_experts", 0))):
            modules |= {f"{name}.{expert}.{projection}_proj": linear for projection in ("gate", "up", "down")}
    groups = (group for stage in recipe.values() for group in (stage or {}).values())
    for kind, fields in ((kind, fields or {}) for group in groups for kind, fields in (group or {}).items()):
        if kind == "BitsMoEModifier":
            continue
        within = [body for body in (fields.get("config_groups") or {}).values() if isinstance(body, Mapping)]
        targets = [entry for body in (fields, *within) for entry in _entries(body.get("targets"))]
        check_others_entries(kind, targets, _entries(fields.get("ignore")), modules, experts)


def check_others_entries(
    kind: str,
    targets: Sequence[str],
    ignore: Sequence[str],
    modules: Mapping[str, nn.Module],
    experts: Mapping[str, nn.Module],
) -> None:
    """The same of one modifier.

    An entry of ``ignore`` that matches nothing is only said: recipes are written for many models, and it does no harm.

    Args:
        kind: the modifier's class, for the message.
        targets, ignore: its entries.
        modules: all that may be meant, by name.
        experts: the experts modules among them, which a message names where no name is near.

    Raises:
        RecipeError: when an entry of ``targets`` matches nothing, naming the nearest names.
    """
    check_patterns(targets, ignore)
    for entry in targets:
        if not _matches(entry, modules):
            near = near_names(entry, modules, experts)
            raise RecipeError(f"{kind}: targets: {entry!r} matches no module of the model; {near}")
    for entry in ignore:
        if not _matches(entry, modules):
            near = near_names(entry, modules, experts)
            messages.say("warning", f"{kind}: ignore: {entry!r} matches no module of the model; {near}")


def _entries(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [entry for entry in value or () if isinstance(entry, str)]


def _matches(entry: str, modules: Mapping[str, nn.Module]) -> bool:
    return any(is_match(name, module, entry) for name, module in modules.items())
