"""Which unit gets how many bits: a multiple-choice knapsack (method.md section 4; paper, integer program).

    minimize Σ_u D(u, b_u)   subject to   Σ_u cost(u, b_u) ≤ budget

`highs` and `pulp` solve it exactly as an integer program; `lagrangian` is the vectorized solver for layers of 10^5
units and more: the linear relaxation by its multiplier, then a greedy use of what is left. All report how far the
result can be from the optimum.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import RecipeError

Solver = Literal["auto", "highs", "pulp", "lagrangian"]

#: Choices (units x widths) up to which `auto` takes the exact solver: about a second, mostly.
_EXACT_LIMIT = 4_000
#: Gap, relative to the distortion, that `auto` does not pay an exact solver for. Units that are alike can keep one busy
#: for minutes over the last per mille.
_GOOD_GAP = 5e-3


@dataclass(frozen=True)
class Allocation:
    """A solved knapsack.

    Attributes:
        choice: int64 ``[U]``, chosen column of each unit.
        cost: total cost, ≤ the budget.
        distortion: total distortion.
        gap: upper bound on ``distortion - optimum``, ≥ 0.
        multiplier: λ, distortion saved per unit of cost at the margin.
        solver: which solver ran.
    """

    choice: np.ndarray
    cost: float
    distortion: float
    gap: float
    multiplier: float
    solver: str


def allocate(distortion: np.ndarray, cost: np.ndarray, budget: float, solver: Solver = "auto") -> Allocation:
    """Choose one column per unit.

    Args:
        distortion: float64 ``[U, n]``, finite, ≥ 0.
        cost: float64 ``[U, n]`` or ``[n]`` (the same for every unit), in bits.
        budget: bits.
        solver: "auto" is lagrangian where its gap is below `_GOOD_GAP` or the problem is large, and exact elsewhere.

    Raises:
        RecipeError: when even the cheapest choices exceed the budget, or the solver is unknown.
    """
    distortion = np.asarray(distortion, dtype=np.float64)
    cost = np.broadcast_to(np.asarray(cost, dtype=np.float64), distortion.shape)
    if not np.isfinite(distortion).all():
        raise ValueError(f"distortion of unit {int(np.argwhere(~np.isfinite(distortion))[0][0])} is not finite")
    least = float(cost.min(1).sum())
    if least > budget:
        raise RecipeError(f"a budget of {budget:.0f} bits is below the least possible {least:.0f}; raise `bits`")
    if solver == "auto":
        quick = _lagrangian(distortion, cost, float(budget))
        if quick.gap <= _GOOD_GAP * quick.distortion or distortion.size > _EXACT_LIMIT:
            return quick
        solver = "highs"
    if solver not in _SOLVERS:
        raise RecipeError(f"solver {solver!r} is unknown; choose from auto, {', '.join(_SOLVERS)}")
    return _SOLVERS[solver](distortion, cost, float(budget))


def _result(
    distortion: np.ndarray, cost: np.ndarray, choice: np.ndarray, bound: float, lam: float, name: str
) -> Allocation:
    units = np.arange(len(choice))
    total = float(distortion[units, choice].sum())
    return Allocation(choice, float(cost[units, choice].sum()), total, max(0.0, total - bound), lam, name)


# ---------------------------------------------------------------------------------------------- lagrangian


def _hull_increments(distortion: np.ndarray, cost: np.ndarray) -> tuple[np.ndarray, ...]:
    """Steps along every unit's lower convex hull, cheapest choice first.

    Returns:
        start ``[U]`` and, for every step, unit, target column, slope (distortion saved per bit) and extra cost.
    """
    units = np.arange(len(distortion))
    start = np.lexsort((distortion, cost), axis=1)[:, 0]
    current = start.copy()
    steps = []
    for _ in range(distortion.shape[1] - 1):
        extra = cost - cost[units, current][:, None]
        saved = distortion[units, current][:, None] - distortion
        usable = (extra > 0) & (saved > 0)
        slope = np.where(usable, saved / np.where(usable, extra, 1.0), -np.inf)
        # among equal slopes the longest step, so that a straight piece of the hull is one step
        best = np.lexsort((-extra, -slope), axis=1)[:, 0]
        gain = slope[units, best]
        moved = np.isfinite(gain)
        if not moved.any():
            break
        steps.append((units[moved], best[moved], gain[moved], extra[units, best][moved]))
        current = np.where(moved, best, current)
    if not steps:
        return (start, *(np.empty(0, dtype=np.int64),) * 2, *(np.empty(0),) * 2)
    return (start, *(np.concatenate(column) for column in zip(*steps, strict=True)))


def hull_curve(distortion: np.ndarray, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least distortion at every cost, by the linear relaxation: a convex curve, given at its corners.

    Args:
        distortion: ``[U, n]``.
        cost: ``[U, n]`` or ``[n]``.

    Returns:
        (cost rising, distortion falling), 1-D of equal length.
    """
    cost = np.broadcast_to(np.asarray(cost, dtype=np.float64), distortion.shape)
    start, _, _, slope, extra = _hull_increments(distortion, cost)
    units = np.arange(len(distortion))
    order = np.argsort(-slope, kind="stable")
    spent = np.concatenate([[0.0], np.cumsum(extra[order])])
    saved = np.concatenate([[0.0], np.cumsum((slope * extra)[order])])
    return cost[units, start].sum() + spent, distortion[units, start].sum() - saved


def _lagrangian(distortion: np.ndarray, cost: np.ndarray, budget: float) -> Allocation:
    start, unit, target, slope, extra = _hull_increments(distortion, cost)
    units = np.arange(len(distortion))
    left = budget - cost[units, start].sum()
    # steps of one unit come in order of falling slope; the stable sort keeps that order among ties
    order = np.argsort(-slope, kind="stable")
    unit, target, slope, extra = unit[order], target[order], slope[order], extra[order]
    spent = np.cumsum(extra)
    taken = int(np.searchsorted(spent, left, side="right"))
    bound = float(distortion[units, start].sum() - (slope * extra)[:taken].sum())
    lam = 0.0
    if taken < len(slope):
        lam = float(slope[taken])
        bound -= lam * (left - (spent[taken - 1] if taken else 0.0))
    choice = start.copy()
    choice[unit[:taken]] = target[:taken]  # numpy keeps the last of repeated indices, the furthest step
    left -= spent[taken - 1] if taken else 0.0
    choice = _use_up(distortion, cost, choice, left)
    return _result(distortion, cost, choice, bound, lam, "lagrangian")


def _use_up(distortion: np.ndarray, cost: np.ndarray, choice: np.ndarray, left: float) -> np.ndarray:
    """Spend what the multiplier left over: the best affordable change of a single unit, until none helps."""
    choice = choice.copy()
    units = np.arange(len(choice))
    while True:
        extra = cost - cost[units, choice][:, None]
        saved = distortion[units, choice][:, None] - distortion
        saved = np.where(extra <= left, saved, -np.inf)
        best = int(saved.argmax())
        unit, column = divmod(best, distortion.shape[1])
        if saved[unit, column] <= 0:
            return choice
        left -= extra[unit, column]
        choice[unit] = column


# --------------------------------------------------------------------------------------- integer programs


def _normalized(
    distortion: np.ndarray, cost: np.ndarray, budget: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float, float]:
    """The problem in numbers that suit the solvers' absolute tolerances of about 1e-6.

    Distortions are divided by the lagrangian's total, so that the optimum is near 1; a column that alone exceeds that
    total is not `possible`. Whole costs are divided by their common divisor: a budget missed by a bit is then missed by
    a whole number.

    Returns:
        objective ``[U, n]``, possible ``[U, n]`` bool, cost ``[U, n]``, budget, and the scale of the objective.
    """
    scale = _lagrangian(distortion, cost, budget).distortion or 1.0
    possible = distortion <= scale
    divisor = 1
    if (cost == np.rint(cost)).all():
        divisor = int(np.gcd.reduce(cost.astype(np.int64), axis=None)) or 1
        budget = float(np.floor(budget / divisor))
    return np.where(possible, distortion / scale, 0.0), possible, cost / divisor, budget, scale


def _highs(distortion: np.ndarray, cost: np.ndarray, budget: float) -> Allocation:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, eye_array, kron

    objective, possible, price, limit, scale = _normalized(distortion, cost, budget)
    num_units, columns = distortion.shape
    one_each = kron(eye_array(num_units), np.ones((1, columns)), format="csr")
    solution = milp(
        objective.ravel(),
        integrality=np.ones(distortion.size),
        bounds=Bounds(0, possible.ravel().astype(float)),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(csr_array(price.reshape(1, -1)), -np.inf, limit),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if solution.x is None:
        raise RuntimeError(f"HiGHS found no allocation: {solution.message}; use solver: lagrangian")
    choice = solution.x.reshape(distortion.shape).argmax(1)
    return _result(distortion, cost, choice, solution.mip_dual_bound * scale, 0.0, "highs")


def _pulp(distortion: np.ndarray, cost: np.ndarray, budget: float) -> Allocation:
    import pulp

    objective, possible, price, limit, _ = _normalized(distortion, cost, budget)
    num_units, columns = distortion.shape
    problem = pulp.LpProblem("bitsmoe", pulp.LpMinimize)
    x = [
        [pulp.LpVariable(f"x_{u}_{b}", 0, int(possible[u, b]), pulp.LpInteger) for b in range(columns)]
        for u in range(num_units)
    ]
    problem += pulp.lpSum(objective[u, b] * x[u][b] for u in range(num_units) for b in range(columns))
    for row in x:
        problem += pulp.lpSum(row) == 1
    problem += pulp.lpSum(price[u, b] * x[u][b] for u in range(num_units) for b in range(columns)) <= limit
    # the preprocessing of CBC 2.10.3, which PuLP brings, fixes variables that the optimum needs
    status = problem.solve(pulp.PULP_CBC_CMD(msg=False, gapRel=0.0, gapAbs=0.0, options=["preprocess off"]))
    if pulp.LpStatus[status] != "Optimal":
        raise RuntimeError(f"CBC found no allocation: {pulp.LpStatus[status]}; use solver: lagrangian")
    choice = np.array([[variable.value() for variable in row] for row in x]).argmax(1)
    result = _result(distortion, cost, choice, 0.0, 0.0, "pulp")
    return Allocation(choice, result.cost, result.distortion, 0.0, 0.0, "pulp")


_SOLVERS = {"highs": _highs, "pulp": _pulp, "lagrangian": _lagrangian}
