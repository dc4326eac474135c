"""Several budgets of one model by one calibration.

One run, the leading one, makes every layer at all budgets from the same inputs: those that its own layers before leave.
It keeps the others' in its resume folder, where the runs at those budgets find them and need no calibration text.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RecipeError
from ..method.design import LayerDesign, LayerPlan
from .recipe import Stage


def leading(sweep: Sequence[float]) -> float:
    """The budget whose run calibrates for all: the middle one, whose errors are nearest to everyone's."""
    return sorted(sweep)[len(sweep) // 2]


def budgets(bits: float, sweep: Sequence[float]) -> list[float]:
    """What a run makes layers for: its own budget, and all others of its sweep where it leads that."""
    leads = bool(sweep) and bits == leading(sweep)
    return [bits, *(other for other in sweep if leads and other != bits)]


def roundings(fields: Mapping[str, Any], bits: float, sweep: Sequence[float]) -> list[dict[str, Any]]:
    """What the layers of each of a run's `budgets` are kept by: what was made of another run's inputs is another layer.

    Args:
        fields: all that a layer's rounding depends on.
    """
    lead = leading(sweep) if sweep else bits
    return [{**fields, "bits": each} | ({"inputs": lead} if each != lead else {}) for each in budgets(bits, sweep)]


def check_lead(bits: float, sweep: Sequence[float], missing: int) -> None:
    """Refuse a run that would have to make layers which the leading run makes.

    Raises:
        RecipeError: when so many layers are missing.
    """
    if sweep and missing and bits != leading(sweep):
        raise RecipeError(f"sweep: the run at {leading(sweep)} bits makes the layers of {bits}; run that one first")


def sweep_of(stages: Sequence[Stage]) -> list[float]:
    """The budgets of stages that differ in nothing else and have a BitsMoEModifier alone; none where they are not so.

    With other modifiers every budget takes a calibration of its own: what those do depends on the experts before them.
    """
    found = [dict(args) for stage in stages for kind, args in stage.modifiers if kind == "BitsMoEModifier"]
    modifiers = sum(len(stage.modifiers) for stage in stages)
    budgets = [float(fields.pop("bits", 0)) for fields in found]
    alike = len(found) == len(stages) == modifiers and all(fields == found[0] for fields in found)
    if not alike or "max_kld" in found[0] or len(set(budgets)) < max(2, len(budgets)) or 0 in budgets:
        return []
    return budgets


def decide_each(
    plans: Mapping[str, LayerPlan], tokens: int, budgets: Sequence[float], max_kld: float | None, most: float
) -> tuple[float, dict[float, dict[str, LayerDesign]]]:
    """Every layer's design under each budget, and the first budget, which ``max_kld`` may decide (`decide`).

    Raises:
        RecipeError: as `decide`.
    """
    from .prediction import decide  # needs llm-compressor, which commands on finished checkpoints do not

    bits, own = decide(plans, tokens, budgets[0], max_kld, most)
    return bits, {bits: own} | {other: decide(plans, tokens, other, None, most)[1] for other in budgets[1:]}
