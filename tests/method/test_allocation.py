"""The multiple-choice knapsack: three solvers against a dynamic program that is exact by construction."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsmoe_modifier.errors import RecipeError
from bitsmoe_modifier.method.allocation import Allocation, allocate, hull_curve

SOLVERS = ("highs", "pulp", "lagrangian")
KINDS = (
    "convex",
    "arbitrary",
    "rising",
    "ties",
    "equal-costs",
    "wide-range",
    "zero-rows",
    "same-rows",
    "per-unit-costs",
)


def exact(distortion: np.ndarray, cost: np.ndarray, budget: int) -> float:
    """Least distortion by dynamic programming over every whole budget."""
    best = np.zeros(budget + 1)
    for row, prices in zip(distortion, np.broadcast_to(cost, distortion.shape).astype(int), strict=True):
        following = np.full(budget + 1, np.inf)
        for d, price in zip(row, prices, strict=True):
            if price <= budget:
                following[price:] = np.minimum(following[price:], best[: budget + 1 - price] + d)
        best = following
    return float(best[budget])


def instance(kind: str, seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(distortion ``[U, n]``, cost, budget): sizes, costs and tightness are drawn too."""
    rng = np.random.default_rng([KINDS.index(kind), seed])
    units, columns = int(rng.integers(1, 13)), int(rng.integers(1, 6))
    cost = np.sort(rng.choice(30, columns, replace=False)).astype(float)
    if kind in ("convex", "wide-range"):
        scale = rng.lognormal(0, 4 if kind == "wide-range" else 1, (units, 1))
        distortion = scale * 4.0 ** -(cost / 5) * rng.uniform(0.9, 1.1, (units, columns))
    elif kind == "ties":
        distortion = rng.integers(0, 4, (units, columns)).astype(float)
    elif kind == "rising":
        distortion = np.sort(rng.uniform(0, 1, (units, columns)), 1)  # more bits are worse: nothing is worth buying
    else:
        distortion = rng.uniform(0, 1, (units, columns))
    if kind == "equal-costs":
        cost[1:] = cost[-1]
    if kind == "zero-rows":
        distortion[::2] = 0
    if kind == "same-rows":
        distortion[:] = -np.sort(-distortion[0])
    if kind == "per-unit-costs":
        cost = rng.integers(0, 30, (units, columns)).astype(float)
    prices = np.broadcast_to(cost, distortion.shape)
    least, most = int(prices.min(1).sum()), int(prices.max(1).sum())
    return distortion, cost, int(rng.integers(least, most + 2))


def check(solved: Allocation, distortion: np.ndarray, cost: np.ndarray, budget: float) -> None:
    """What every solver promises: a choice per unit, honest sums, never above the budget."""
    units = np.arange(len(distortion))
    prices = np.broadcast_to(cost, distortion.shape)
    assert solved.choice.shape == units.shape
    assert ((solved.choice >= 0) & (solved.choice < distortion.shape[1])).all()
    assert solved.cost == pytest.approx(prices[units, solved.choice].sum())
    assert solved.distortion == pytest.approx(distortion[units, solved.choice].sum())
    assert solved.cost <= budget
    assert solved.gap >= 0


#: The integer programs' solvers stop within 1e-6 of the optimum (HiGHS' absolute gap, CBC's tolerances).
EXACT = 3e-6


def assert_exact(solved: Allocation, optimum: float) -> None:
    assert optimum * (1 - 1e-9) <= solved.distortion <= optimum * (1 + EXACT)
    assert solved.gap <= EXACT * solved.distortion


@pytest.mark.parametrize("kind", KINDS)
def test_highs_and_lagrangian_against_the_dynamic_program(kind: str) -> None:
    for seed in range(60):
        distortion, cost, budget = instance(kind, seed)
        optimum = exact(distortion, cost, budget)
        highs, lagrangian = (allocate(distortion, cost, budget, solver) for solver in ("highs", "lagrangian"))
        for solved in (highs, lagrangian):
            check(solved, distortion, cost, budget)
        assert_exact(highs, optimum)
        assert optimum * (1 - 1e-9) <= lagrangian.distortion
        # the bound is a difference of sums over all distortions
        assert lagrangian.distortion - optimum <= lagrangian.gap + 1e-12 * distortion.sum(), "the gap is a bound"


@pytest.mark.parametrize("kind", KINDS)
def test_pulp_against_the_dynamic_program(kind: str) -> None:
    for seed in range(25):
        distortion, cost, budget = instance(kind, seed)
        solved = allocate(distortion, cost, budget, "pulp")
        check(solved, distortion, cost, budget)
        assert_exact(solved, exact(distortion, cost, budget))


def realistic(units: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Distortions that fall four-fold per bit from unit strengths over many orders of magnitude; real unit costs."""
    rng = np.random.default_rng(seed)
    widths = np.array([0, 2, 4, 6])
    cost = 16 * 768 * widths + 16 * 16 * 6 * (widths > 0)
    strength = rng.lognormal(0, 3, (units, 1))
    return strength * np.array([1, 0.118, 0.0115, 0.001]) * rng.uniform(0.8, 1.2, (units, 4)), cost.astype(float)


def test_pulp_on_a_realistic_layer() -> None:
    distortion, cost = realistic(60, seed=4)
    budget = 2.0 * 60 * 16 * 768
    solved = [allocate(distortion, cost, budget, solver) for solver in ("highs", "pulp")]
    for one in solved:
        check(one, distortion, cost, budget)
    assert solved[1].distortion == pytest.approx(solved[0].distortion, rel=EXACT)


@pytest.mark.parametrize("average", [0.1, 0.5, 1.0, 2.0, 3.7, 5.9])
def test_realistic_layers(average: float) -> None:
    """The lagrangian's gap is at most one unit's distortion, and a vanishing part of the whole with many units."""
    distortion, cost = realistic(400, seed=1)
    budget = average * 400 * 16 * 768
    exactly, quickly = (allocate(distortion, cost, budget, solver) for solver in ("highs", "lagrangian"))
    for solved in (exactly, quickly):
        check(solved, distortion, cost, budget)
    assert quickly.distortion - exactly.distortion <= quickly.gap + 1e-9 * quickly.distortion
    assert quickly.distortion <= exactly.distortion * (1 + 1e-2)
    assert quickly.gap <= float(np.abs(np.diff(distortion, axis=1)).max())


def test_large_layer_is_fast_and_close() -> None:
    """As many units as a Qwen3-30B-A3B layer with blocks of 16: far beyond an integer program."""
    distortion, cost = realistic(50_000, seed=2)
    budget = 2.0 * 50_000 * 16 * 768
    solved = allocate(distortion, cost, budget, "lagrangian")
    check(solved, distortion, cost, budget)
    assert solved.gap < 1e-4 * solved.distortion
    assert budget - solved.cost < cost[1], "less is left than the smallest purchase"


def test_multiplier_is_the_price_at_the_margin() -> None:
    """A little more budget saves what the multiplier says: the other direction of the same tangent."""
    distortion, cost = realistic(20_000, seed=3)
    budget = 1.5 * 20_000 * 16 * 768
    base, more = (allocate(distortion, cost, b, "lagrangian") for b in (budget, budget * 1.001))
    saved = (base.distortion - more.distortion) / (more.cost - base.cost)
    assert saved == pytest.approx(base.multiplier, rel=0.05)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_lagrangian_on_anything(data: st.DataObject) -> None:
    """Any finite table and any whole costs, also many columns of one cost, zeros and repeated numbers."""
    units, columns = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    number = st.one_of(st.integers(0, 5).map(float), st.floats(0, 1e6, allow_subnormal=False))
    row = st.lists(number, min_size=columns, max_size=columns)
    distortion = np.array(data.draw(st.lists(row, min_size=units, max_size=units)))
    cost = np.array(data.draw(st.lists(st.integers(0, 12), min_size=columns, max_size=columns)), dtype=float)
    budget = data.draw(st.integers(int(cost.min()) * units, int(cost.max()) * units + 1))
    solved = allocate(distortion, cost, budget, "lagrangian")
    check(solved, distortion, cost, budget)
    optimum = exact(distortion, cost, budget)
    slack = 1e-9 * (1 + float(distortion.sum()))
    assert optimum - slack <= solved.distortion <= optimum + solved.gap + slack


@pytest.mark.parametrize("kind", KINDS)
def test_hull_curve_bounds_every_budget(kind: str) -> None:
    """Convex and falling, below the optimum everywhere, and reached by it at the corners."""
    for seed in range(20):
        distortion, cost, _ = instance(kind, seed)
        at, least = hull_curve(distortion, cost)
        slack = 1e-9 * (1 + float(distortion.sum()))
        assert at.shape == least.shape
        assert (np.diff(at) > 0).all()
        assert (np.diff(least) <= slack).all()
        if len(at) > 2:
            slope = np.diff(least) / np.diff(at)
            assert (np.diff(slope) >= -1e-9 * np.abs(slope[:-1])).all()
        prices = np.broadcast_to(cost, distortion.shape)
        assert at[0] == prices.min(1).sum()
        assert least[-1] == pytest.approx(distortion.min(1).sum(), abs=slack)
        for corner, value in zip(at, least, strict=True):
            assert exact(distortion, cost, int(corner)) == pytest.approx(value, abs=slack)
        for budget in np.linspace(at[0], at[-1], 7):
            assert np.interp(budget, at, least) <= exact(distortion, cost, int(budget)) + slack


# ------------------------------------------------------------------------------------------------- the edges


@pytest.mark.parametrize("solver", SOLVERS)
def test_budget_of_exactly_the_least(solver: str) -> None:
    distortion, cost = np.array([[5.0, 3.0, 1.0], [4.0, 0.5, 0.1]]), np.array([2.0, 5.0, 9.0])
    solved = allocate(distortion, cost, 4, solver)
    assert solved.choice.tolist() == [0, 0]
    assert solved.cost == 4


@pytest.mark.parametrize("solver", SOLVERS)
def test_more_budget_than_needed(solver: str) -> None:
    distortion, cost = np.array([[5.0, 3.0, 1.0], [4.0, 0.1, 0.5]]), np.array([2.0, 5.0, 9.0])
    solved = allocate(distortion, cost, 1e9, solver)
    assert solved.choice.tolist() == [2, 1], "the best column, not the most expensive one"
    assert solved.gap == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_choice_only(solver: str) -> None:
    solved = allocate(np.array([[2.0], [3.0]]), np.array([4.0]), 8, solver)
    assert solved.choice.tolist() == [0, 0]
    assert solved.distortion == 5


@pytest.mark.parametrize("solver", SOLVERS)
def test_all_zero_distortion(solver: str) -> None:
    distortion, cost = np.zeros((5, 3)), np.array([0.0, 2.0, 4.0])
    check(allocate(distortion, cost, 7, solver), distortion, cost, 7)


@pytest.mark.parametrize("solver", SOLVERS)
def test_budget_is_not_exceeded_by_a_bit(solver: str) -> None:
    """Real costs are millions of bits; one bit less than a set of purchases must not buy it."""
    distortion, cost = np.tile([1.0, 0.1], (6, 1)), np.array([0.0, 128 * 8192 * 6.0 + 128 * 64 * 16])
    for missing in (1, 0.25):
        budget = 3 * cost[1] - missing
        solved = allocate(distortion, cost, budget, solver)
        check(solved, distortion, cost, budget)
        assert solved.choice.sum() == 2
    assert allocate(distortion, cost, 3 * cost[1], solver).choice.sum() == 3


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("solver", SOLVERS)
def test_units_of_the_distortion_do_not_matter(solver: str, scale: float) -> None:
    distortion, cost, budget = instance("convex", 5)
    base, scaled = allocate(distortion, cost, budget, solver), allocate(distortion * scale, cost, budget, solver)
    assert scaled.distortion == pytest.approx(base.distortion * scale, rel=1e-6)


@pytest.mark.parametrize("solver", ["auto", *SOLVERS])
def test_infeasible_budget_says_the_minimum(solver: str) -> None:
    with pytest.raises(RecipeError, match=r"a budget of 9 bits is below the least possible 10; raise `bits`"):
        allocate(np.ones((5, 2)), np.array([2.0, 4.0]), 9, solver)


def test_unknown_solver_is_named() -> None:
    with pytest.raises(RecipeError, match="solver 'simplex' is unknown; choose from auto, highs, pulp, lagrangian"):
        allocate(np.ones((1, 2)), np.array([0.0, 1.0]), 1, "simplex")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_distortion_must_be_finite(value: float) -> None:
    distortion = np.ones((4, 2))
    distortion[2, 1] = value
    with pytest.raises(ValueError, match="distortion of unit 2 is not finite"):
        allocate(distortion, np.array([0.0, 1.0]), 3)


@pytest.mark.parametrize("units", [3, 20, 100, 600, 5_000])
def test_auto_is_exact_where_the_quick_solver_leaves_a_gap(units: int) -> None:
    chosen = [allocate(*realistic(units, seed), units * 16 * 768 * 2.03) for seed in range(10)]
    assert all(solved.solver == "highs" or solved.gap <= 5e-3 * solved.distortion for solved in chosen)
    if units == 3:
        assert any(solved.solver == "highs" for solved in chosen)
    if units >= 600:
        assert all(solved.solver == "lagrangian" for solved in chosen)


@pytest.mark.parametrize("solver", SOLVERS)
def test_inputs_stay_as_they_are(solver: str) -> None:
    distortion, cost, budget = instance("arbitrary", 3)
    copies = distortion.copy(), cost.copy()
    allocate(distortion, cost, budget, solver)
    assert (distortion == copies[0]).all()
    assert (cost == copies[1]).all()
