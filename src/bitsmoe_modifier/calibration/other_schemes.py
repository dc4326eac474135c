"""What a recipe's other modifiers store, against the model and beside packed experts, before weights are read.

Group sizes that do not divide a layer's columns llm-compressor finds once the model is loaded (of a comparison's last
run, after all others have been quantized), and a group that is longer than a row only while it calibrates. It has
`bypass_divisibility_checks`, and in 0.14 no code that could do with such a group afterwards.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from compressed_tensors.quantization import QuantizationStrategy
from compressed_tensors.utils.match import is_match
from torch import nn

from ..errors import CheckpointError, RecipeError
from ..loading.claims import matches
from ..loading.quantizer import experts_sizes
from ..sources.classes import build_empty
from .entries import check_others_entries
from .linearizing import experts_modules
from .recipe import Stage
from .recipe_content import EVERY

_GROUPED = (QuantizationStrategy.GROUP, QuantizationStrategy.TENSOR_GROUP)
#: below this, scales take more than they give
_LEAST = 8


def check_schemes(stages: Iterable[Stage], source: str) -> None:
    """Refuse stages whose other modifiers share a scale among more weights than divide a layer's rows, or pack experts
    beside a BitsMoEModifier's as transformers could not read them.

    Args:
        stages: that `recipe.check_stage` found nothing wrong with.
        source: the model's folder or name; its config.json is read.

    Raises:
        RecipeError: naming stage, modifier, layer and remedy.
    """
    others = [(stage, modifier) for stage in stages for modifier in _others(stage)]
    if not others:
        return
    try:
        layers = linear_layers(build_empty(source))
    except (CheckpointError, RecipeError, RuntimeError):
        return  # of a family that cannot be built without weights; what is wrong with it is said where it is loaded
    for stage, modifier in others:
        ours = [fields for kind, fields in stage.modifiers if kind == "BitsMoEModifier"]
        problem = _problem(modifier, layers) or _misread(modifier, ours, layers)
        if problem:
            raise RecipeError(f"{stage.name}: {type(modifier).__name__}: {problem}")


def check_modifiers(modifiers: Iterable[Any], model: nn.Module, experts: Mapping[str, nn.Module]) -> None:
    """What `check_schemes` and `entries.check_others` say of a recipe's text, of modifiers at a model that is there.

    Args:
        modifiers: of the whole recipe.
        model: its experts taken apart into Linears.
        experts: its experts modules, by name.

    Raises:
        RecipeError: naming modifier, layer or entry, and remedy.
    """
    modifiers = list(modifiers)
    others = _quantizing(modifiers)
    layers = linear_layers(model) if others else {}
    named = [one for one in modifiers if type(one).__name__ == "BitsMoEModifier"]
    ours = [{"targets": one.targets, "ignore": one.ignore} for one in named]
    for modifier in others:
        kind, groups = type(modifier).__name__, modifier.resolved_config.config_groups.values()
        targets = [entry for scheme in groups for entry in scheme.targets]
        check_others_entries(kind, targets, modifier.ignore, dict(model.named_modules()), experts)
        problem = _problem(modifier, layers) or _misread(modifier, ours, layers)
        if problem:
            raise RecipeError(f"{kind}: {problem}")


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The Linears of a model by name, those included that llm-compressor makes of experts (on the meta device)."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, module in experts_modules(model):
        try:
            count, hidden, width = experts_sizes(module)
        except CheckpointError:  # of a kind that packed experts cannot replace, others may quantize it
            continue
        inward = nn.Linear(hidden, width, device="meta")
        each = {"gate": inward, "up": inward, "down": nn.Linear(width, hidden, device="meta")}
        if not getattr(module, "has_gate", True):
            del each["gate"]
        for expert in range(count):
            found |= {f"{name}.{expert}.{projection}_proj": linear for projection, linear in each.items()}
    return found


def _others(stage: Stage) -> list[Any]:
    """The stage's modifiers that quantize by compressed-tensors' schemes."""
    from llmcompressor.recipe import Recipe

    return _quantizing(Recipe.create_instance(stage.text).modifiers)


def _quantizing(modifiers: Iterable[Any]) -> list[Any]:
    from llmcompressor.modifiers.quantization.quantization.mixin import QuantizationMixin

    return [one for one in modifiers if isinstance(one, QuantizationMixin)]


def _groups(modifier: Any) -> Iterator[tuple[list[str], int]]:
    """Targets and group size of each of a modifier's groups of layers that have one."""
    for scheme in modifier.resolved_config.config_groups.values():
        for what in (scheme.weights, scheme.input_activations):  # both divide a layer's columns
            if what is not None and what.strategy in _GROUPED and what.group_size:
                yield list(scheme.targets), int(what.group_size)


def _misread(modifier: Any, ours: list[dict[str, Any]], layers: Mapping[str, nn.Linear]) -> str:
    """Why transformers could not read the experts that a modifier packs beside ours; "" where it could.

    It takes one symmetric scheme for all (`loading.decoding`). ``ours`` has the fields of the BitsMoEModifiers.
    """
    found = {}
    for scheme in modifier.resolved_config.config_groups.values() if ours else ():
        weights = scheme.weights
        if weights is None or weights.type != "int":
            continue
        for name, linear in layers.items():
            experts = name.rpartition(".")[0].rpartition(".")[0]
            if not experts.endswith(".experts") or not is_match(name, linear, scheme.targets, modifier.ignore):
                continue
            taken = any(
                matches(experts, one.get("targets") or EVERY) and not matches(experts, one.get("ignore") or ())
                for one in ours
            )
            if not taken:  # else the modifiers get in each other's way, which is said with the remedy elsewhere
                found[weights.model_dump_json()] = weights
                break
    if len(found) < 2 and all(weights.symmetric for weights in found.values()):
        return ""
    return (
        "it packs experts beside those of BitsMoEModifier by "
        + ("several schemes" if len(found) > 1 else "an asymmetric scheme")
        + ", and transformers reads them by one symmetric scheme; take one such"
    )


def _problem(modifier: Any, layers: Mapping[str, nn.Linear]) -> str:
    """What is wrong with a modifier's group sizes, and what to do; "" where nothing is."""
    for targets, size in _groups(modifier):
        columns = {
            name: linear.in_features
            for name, linear in layers.items()
            if is_match(name, linear, targets) and not is_match(name, linear, modifier.ignore)
        }
        wrong = [name for name, number in columns.items() if number % size]
        if wrong:
            fitting = math.gcd(size, *columns.values())
            more = f" and of {len(wrong) - 1} more" if len(wrong) > 1 else ""
            advice = f"set group_size to {fitting}" if fitting >= _LEAST else "set strategy to channel"
            return (
                f"its group size {size} does not divide {columns[wrong[0]]}, the columns of {wrong[0]}{more}; in "
                f"config_groups, {advice}, or add these layers to its `ignore`"
            )
    return ""
