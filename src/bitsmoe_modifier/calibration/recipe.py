"""Recipes as sets of runs: every ``NAME_stage`` of a YAML recipe is one way to quantize the model."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import RecipeError
from ..extras import require
from .recipe_names import check_keys, did_you_mean

_SUFFIX = "_stage"
#: options of the command line that set a field of another name
_OPTIONS = {"error_feedback": "--fast", "refine_passes": "--best"}
_SHIPPED = (Path(__file__).parents[1] / "recipes", Path(__file__).parents[3] / "recipes")  # installed; checkout


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe.

    Attributes:
        name: its key without ``_stage``.
        modifiers: the modifiers' class names and arguments, in order.
        text: the stage alone as a YAML recipe. llm-compressor itself selects stages by a prefix of their names, which
            would take ``gptq_w2_long_stage`` along with ``gptq_w2``.
        problem: a modifier or field in it that does not exist, with file and line; "" where there is none.
    """

    name: str
    modifiers: tuple[tuple[str, dict[str, Any]], ...]
    text: str
    problem: str = ""

    @property
    def nominal_bits(self) -> float | None:
        """The bit-width that the recipe asks for: ``bits`` of BitsMoE, or the weights' ``num_bits``."""
        for kind, args in self.modifiers:
            if kind == "BitsMoEModifier" and isinstance(args.get("bits"), (int, float)):
                return float(args["bits"])
        for _, args in self.modifiers:
            for group in (args.get("config_groups") or {}).values():
                bits = ((group or {}).get("weights") or {}).get("num_bits")
                if bits is not None:
                    return float(bits)
            scheme = re.match(r"W(\d+)A", str(args.get("scheme", "")))
            if scheme:
                return float(scheme.group(1))
        return None

    def calibration_batch(self, wanted: int) -> int:
        """Rows per calibration pass: those wanted, but one for AutoRound, which takes every batch for a row and makes
        nothing usable of larger ones."""
        return 1 if any(kind == "AutoRoundModifier" for kind, _ in self.modifiers) else wanted


def find_recipe(recipe: str) -> Path:
    """A recipe file, or a shipped recipe by its name (``w2``, ``ab_gptq_bitsmoe``).

    Raises:
        RecipeError: when there is neither.
    """
    if os.path.isfile(recipe):  # of a text that is no path, `Path.is_file` raises that it is too long
        return Path(recipe)
    for folder in _SHIPPED:
        if os.path.isfile(folder / f"{recipe}.yaml"):
            return folder / f"{recipe}.yaml"
    known = sorted({file.stem for folder in _SHIPPED for file in folder.glob("*.yaml")})
    near = did_you_mean(recipe, known)
    shown = recipe if len(recipe) < 200 else f"{recipe[:200]}…"
    raise RecipeError(f"{shown}: no such recipe file{near or ';'} the shipped recipes are {', '.join(known)}")


def read_stages(path: Path) -> list[Stage]:
    """The stages of a recipe file, in order.

    Raises:
        RecipeError: when the file is not YAML, has no stages, or a stage has no modifiers or an unusable name.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    problems = check_keys(path, text)
    stages = []
    for key, body in (content if isinstance(content, dict) else {}).items():
        name = str(key).removesuffix(_SUFFIX)
        if name == key:
            continue
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise RecipeError(f"{path}: the stage {key!r} names a folder; use letters, digits, '_', '-' and '.' only")
        groups = _modifier_groups(body, f"{path}: {key}")
        modifiers = tuple(pair for group in groups.values() for pair in group.items())
        text = yaml.safe_dump({key: groups}, sort_keys=False)
        stages.append(Stage(name, modifiers, text, problems.get(str(key), "")))
    if not stages:
        raise RecipeError(f"{path} has no stages; write its modifiers under a key that ends in '_stage' (quant_stage:)")
    return stages


def select(stages: list[Stage], names: list[str] | None) -> list[Stage]:
    """The stages of the given names, in the recipe's order; all where no names are given.

    Raises:
        RecipeError: naming those that the recipe does not have, or what is wrong with one of them.
    """
    known = [stage.name for stage in stages]
    unknown = [name for name in names or [] if name not in known]
    if unknown:
        raise RecipeError(f"the recipe has no stage {', '.join(unknown)}; it has {', '.join(known)}")
    chosen = [stage for stage in stages if not names or stage.name in names]
    for stage in chosen:
        if stage.problem:
            raise RecipeError(stage.problem)
    return chosen


def one_stage(recipe: str, name: str | None) -> Stage:
    """The stage of a recipe (file or shipped name) that is called ``name``, or its only one.

    Raises:
        RecipeError: when there is no such recipe or stage, or several and no name.
    """
    stages = select(read_stages(find_recipe(recipe)), [name] if name else None)
    if len(stages) > 1:
        names = ", ".join(stage.name for stage in stages)
        raise RecipeError(f"the recipe has several stages ({names}); choose one by --stage")
    return stages[0]


def with_fields(stage: Stage, **fields: Any) -> Stage:
    """The stage with other values of its BitsMoEModifier's fields.

    Args:
        stage: as it was read.
        fields: None leaves the recipe's value; ``ignore`` is added to the recipe's.

    Raises:
        RecipeError: when fields are given and the stage has no BitsMoEModifier.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    if not given:
        return stage
    if not any(kind == "BitsMoEModifier" for kind, _ in stage.modifiers):
        options = ", ".join(_OPTIONS.get(name, f"--{name.replace('_', '-')}") for name in given)
        raise RecipeError(f"{stage.name}: only a BitsMoEModifier takes {options}; the recipe has none, drop them")
    ours = sum(kind == "BitsMoEModifier" for kind, _ in stage.modifiers)
    for name in ("bits", "max_kld"):
        if ours > 1 and name in given:
            raise RecipeError(
                f"{stage.name}: {name} is of one BitsMoEModifier, the recipe has {ours}; write it in the recipe"
            )
    content = yaml.safe_load(stage.text)
    for groups in content.values():
        for modifiers in groups.values():
            if "BitsMoEModifier" in modifiers:
                own = modifiers["BitsMoEModifier"]
                before = own.get("ignore", [])
                if "ignore" in given and not isinstance(before, list):
                    raise RecipeError(f"{stage.name}: ignore: {before!r} is no list; write ignore: [NAME, …]")
                own |= given
                if "ignore" in given:
                    own["ignore"] = [*before, *given["ignore"]]
    pairs = tuple(pair for groups in content.values() for group in groups.values() for pair in group.items())
    return Stage(stage.name, pairs, yaml.safe_dump(content, sort_keys=False))


def check_stage(stage: Stage) -> None:
    """Build the stage's modifiers once, so that a wrong field is found before any long work.

    Raises:
        RecipeError: naming the stage and what is wrong with it.
    """
    require("llmcompressor", "a recipe")
    if stage.problem:
        raise RecipeError(stage.problem)
    from llmcompressor.recipe import Recipe

    import bitsmoe_modifier  # noqa: F401 - registers BitsMoEModifier

    try:
        Recipe.create_instance(stage.text)
    except RecipeError as error:
        raise RecipeError(f"{stage.name}: {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # what llm-compressor and pydantic raise
        raise RecipeError(f"{stage.name}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """A pydantic error in one line, another one as it is."""
    details = getattr(error, "errors", None)
    if not callable(details):
        return str(error)
    lines = (f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in details())
    return "; ".join(line.replace(": Value error,", ":") for line in lines)


def _modifier_groups(body: Any, where: str) -> dict[str, dict[str, dict[str, Any]]]:
    """The stage's groups of modifiers; one without fields gets an empty mapping, which llm-compressor insists on."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for group, modifiers in (body if isinstance(body, dict) else {}).items():
        if str(group).endswith("_modifiers") and isinstance(modifiers, list):
            raise RecipeError(f"{where}: {group} is a list; write its modifiers one below the other, without dashes")
        if str(group).endswith("_modifiers") and isinstance(modifiers, dict):
            for kind, args in modifiers.items():
                if args is not None and not isinstance(args, dict):
                    raise RecipeError(
                        f"{where}: {kind} must have its fields below it, found {args!r}; indent what is "
                        f"meant for a modifier by more than the modifier's name"
                    )
                found.setdefault(str(group), {})[str(kind)] = args or {}
    if not found:
        raise RecipeError(f"{where} has no modifiers; write them under a key that ends in '_modifiers'")
    return found
