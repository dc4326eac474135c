"""Entries of ``targets`` and ``ignore`` that match nothing: typos, of which a run would say nothing."""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from compressed_tensors.utils.match import is_match
from torch import nn

from ..errors import RecipeError

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
