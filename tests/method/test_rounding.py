"""The mid-rise grid, rounding with feedback against GPTQ's update in its textbook form, and refinement."""

import pytest
import torch

from bitsmoe_modifier.method import rounding
from bitsmoe_modifier.method.rounding import (
    damp_,
    decode,
    encode,
    feedback_factor,
    refine,
    refit_row_steps,
    round_with_feedback,
    search_step,
)
from bitsmoe_modifier.storage.planes import code_values
from bitsmoe_modifier.storage.steps import step_values, storable_steps, stored_steps

DAMPENING = 0.01


def moments(
    count: int, n: int, *, rank: int | None = None, seed: int = 0, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Correlated second moments ``[count, n, n]`` of ``rank`` samples each (4 n by default)."""
    gen = torch.Generator().manual_seed(seed)
    mix = torch.randn(count, n, n, generator=gen, dtype=torch.float64) / n**0.5 + 0.3
    x = torch.randn(count, rank or 4 * n, n, generator=gen, dtype=torch.float64) @ mix
    return (x.mT @ x / x.shape[1]).to(dtype)


class Problem:
    """Random matrices with mixed widths, steps per group of rows, and an order of columns."""

    def __init__(
        self,
        count: int = 3,
        m: int = 6,
        n: int = 12,
        *,
        groups: int = 2,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        gen = torch.Generator().manual_seed(seed)
        self.w = torch.randn(count, m, n, generator=gen, dtype=torch.float64).to(dtype)
        self.moment = moments(count, n, seed=seed, dtype=dtype)
        width = torch.tensor([0, 1, 2, 3, 4])[torch.randint(5, (count, 1, n), generator=gen)]
        self.level = (2.0**width - 1).to(dtype)
        step = (0.7 + 0.6 * torch.rand(count, groups, n, generator=gen)) * 2.0 / self.level.clamp_min(1).float()
        self.step = storable_steps(step).to(dtype)
        self.order = torch.rand(count, n, generator=gen).argsort(1)
        self.row_weight = (torch.rand(count, m, generator=gen) + 0.05).to(dtype)

    def solve(self, row_weight: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        factor = feedback_factor(self.damped, self.order)
        return round_with_feedback(self.w, factor, self.step, self.level, self.order, row_weight)

    def refined(
        self, codes: torch.Tensor, step: torch.Tensor, row_weight: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return refine(self.w, self.damped, codes, step, self.level, row_weight)

    def per_row(self, step: torch.Tensor) -> torch.Tensor:
        return step.repeat_interleave(self.w.shape[1] // step.shape[1], 1)

    def plain(self) -> torch.Tensor:
        return encode(self.w, self.per_row(self.step), self.level)

    @property
    def damped(self) -> torch.Tensor:
        return damp_(self.moment.clone(), DAMPENING)

    def loss(
        self, codes: torch.Tensor, step: torch.Tensor | None = None, row_weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        """tr(E H Eᵀ) per matrix, rows weighted; H as damped."""
        rest = (self.w - decode(codes, self.per_row(self.step if step is None else step), self.level)).double()
        rows = torch.ones(rest.shape[:2]) if row_weight is None else row_weight
        return torch.einsum("bij,bjk,bik,bi->b", rest, self.damped.double(), rest, rows.double())


def gptq(w: torch.Tensor, h: torch.Tensor, step: torch.Tensor, level: torch.Tensor, order: list[int]) -> torch.Tensor:
    """OBQ/GPTQ of one matrix in float64, straight from the paper (arXiv 2210.17323, equations 2 and 3).

    Quantize column q; move the remaining columns by -(w_q - quant(w_q)) / [H⁻¹]_qq * [H⁻¹]_q,F with H restricted to the
    columns F that are not quantized yet. The inverse is computed anew for every column.
    """
    w, left = w.clone(), list(order)
    codes = torch.empty_like(w)
    for q in order:
        inverse = torch.linalg.inv(h[left][:, left])
        at = left.index(q)
        for i in range(len(w)):
            best, best_error = 0, float("inf")
            for code in range(int(level[i, q]) + 1):
                error = abs(float(w[i, q]) - float(step[i, q]) * (2 * code - float(level[i, q])))
                if error < best_error:
                    best, best_error = code, error
            codes[i, q] = best
        error = w[:, q] - step[:, q] * (2 * codes[:, q] - level[:, q])
        for column, other in enumerate(left):
            w[:, other] -= error / inverse[at, at] * inverse[at, column]
        left.remove(q)
    return codes


# ---------------------------------------------------------------------------------------------------- the grid


@pytest.mark.parametrize("width", [1, 2, 3, 4, 6, 8])
def test_encode_finds_the_nearest_value(width: int) -> None:
    level = 2**width - 1
    w = torch.linspace(-1.6, 1.6, 997)[:, None]
    step = torch.tensor([[1.0 / level, 0.7 / level, 0.013]]).half().float()
    codes = encode(w, step, level)
    assert float(codes.min()) == 0
    assert float(codes.max()) == level
    values = code_values(torch.arange(level + 1), width) * step[0, :, None]
    best = (values[None] - w[:, :, None]).abs().amin(-1)
    torch.testing.assert_close((decode(codes, step, level) - w).abs(), best, rtol=0, atol=2e-7)


def test_encode_takes_levels_per_element() -> None:
    w = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    level = torch.tensor([0.0, 1.0, 3.0, 7.0, 15.0, 255.0]).expand(4, -1)
    step = torch.full((4, 6), 0.125)
    codes = encode(w, step, level)
    for column, width in enumerate((0, 1, 2, 3, 4, 8)):
        assert torch.equal(codes[:, column], encode(w[:, column], step[:, column], 2**width - 1))
    assert not bool(codes[:, 0].any())
    assert not bool(decode(codes, step, level)[:, 0].any()), "a dropped weight is zero"


def test_encode_decode_round_trip() -> None:
    for width in (1, 2, 3, 4, 6, 8):
        codes = torch.arange(2.0**width)
        for step in (2.0**-23, 0.017, 300.0):
            stored = storable_steps(torch.tensor(step))
            assert torch.equal(encode(decode(codes, stored, 2**width - 1), stored, 2**width - 1), codes)


@pytest.mark.parametrize("value", [0.0, 1e-30, 2.0**-25, 0.9375, 0.9376, 1.0, 479.9, 1e9])
def test_every_step_can_be_stored(value: float) -> None:
    step = storable_steps(torch.tensor([value]))
    assert torch.equal(step_values(stored_steps(step, torch.uint8)), step)


# -------------------------------------------------------------------------------------------------- the factor


def orders(count: int, n: int) -> torch.Tensor:
    """Random orders of columns, ``[count, n]``."""
    return torch.rand(count, n, generator=torch.Generator().manual_seed(n)).argsort(1)


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 70])
def test_factor_reproduces_the_moment(n: int) -> None:
    """M is unit upper triangular and M D Mᵀ = H, columns in order, with a positive diagonal D."""
    h, order = damp_(moments(2, n), DAMPENING), orders(2, n)
    factor = feedback_factor(h, order)
    torch.testing.assert_close(factor.diagonal(dim1=1, dim2=2), torch.ones(2, n, dtype=torch.float64))
    assert not bool(factor.tril(-1).any())
    turned = torch.stack([m[o][:, o] for m, o in zip(h, order, strict=True)])
    inverse = torch.linalg.inv(factor)
    d = inverse @ turned @ inverse.mT
    assert bool((d.diagonal(dim1=1, dim2=2) > 0).all())
    torch.testing.assert_close(factor @ torch.diag_embed(d.diagonal(dim1=1, dim2=2)) @ factor.mT, turned)


@pytest.mark.parametrize("dampening", [0.01, 1.0])
def test_damping_adds_to_the_diagonals(dampening: float) -> None:
    h = moments(3, 7)
    mean = h.diagonal(dim1=1, dim2=2).mean(1)
    expected = h + dampening * mean[:, None, None] * torch.eye(7)
    torch.testing.assert_close(damp_(h, dampening), expected)
    torch.testing.assert_close(h, expected)


def test_factor_of_the_identity_is_the_identity() -> None:
    eye = torch.eye(9).expand(2, -1, -1)
    assert torch.equal(feedback_factor(eye, orders(2, 9)), eye)


@pytest.mark.parametrize("kind", ["zero", "rank-1", "slightly-negative"])
def test_factor_of_singular_moments(kind: str) -> None:
    h = {
        "zero": lambda: torch.zeros(2, 16, 16),
        "rank-1": lambda: moments(2, 16, rank=1, dtype=torch.float32),
        "slightly-negative": lambda: moments(2, 16, rank=2, dtype=torch.float32) - 1e-3 * torch.eye(16),
    }[kind]()
    factor = feedback_factor(damp_(h, 1e-4), orders(2, 16))
    assert bool(torch.isfinite(factor).all())
    assert torch.equal(factor.diagonal(dim1=1, dim2=2), torch.ones(2, 16))


@pytest.mark.parametrize("scale", [1e-20, 1e12])
def test_factor_does_not_depend_on_units(scale: float) -> None:
    h, order = damp_(moments(2, 16, dtype=torch.float32), DAMPENING), orders(2, 16)
    torch.testing.assert_close(feedback_factor(h * scale, order), feedback_factor(h, order), rtol=1e-4, atol=1e-5)


def test_one_singular_entry_leaves_the_batch_alone() -> None:
    """More is added to the diagonal of the entry that needs it, and to no other."""
    h, order = moments(3, 8, dtype=torch.float32), orders(3, 8)
    expected = feedback_factor(h, order)
    h[1] = -torch.eye(8)
    together = feedback_factor(h, order)
    assert torch.equal(together[0::2], expected[0::2])
    assert bool(torch.isfinite(together[1]).all())


# --------------------------------------------------------------------------------------------------- feedback


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("n", [1, 5, 12, 40])
def test_feedback_is_gptq(n: int, groups: int) -> None:
    """Code by code in float64: the update without an inverse is the textbook's."""
    problem = Problem(count=2, m=4, n=n, groups=groups, seed=n)
    codes, step = problem.solve()
    assert torch.equal(step, problem.step), "without row weights the steps stay"
    wide, level = problem.per_row(step), problem.level.expand_as(problem.w)
    for k in range(2):
        expected = gptq(problem.w[k], problem.damped[k], wide[k], level[k], problem.order[k].tolist())
        assert torch.equal(codes[k], expected)


@pytest.mark.parametrize("block", [1, 5, 32, 1000])
@pytest.mark.parametrize("weighted", [False, True])
def test_blocks_do_not_change_the_result(block: int, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(n=70)
    weight = problem.row_weight if weighted else None
    codes, step = problem.solve(weight)
    refined = problem.refined(codes, step, weight)
    monkeypatch.setattr(rounding, "_COLUMN_BLOCK", block)
    again = problem.solve(weight)
    assert torch.equal(again[0], codes)
    torch.testing.assert_close(again[1], step)
    again = problem.refined(codes, step, weight)
    assert torch.equal(again[0], refined[0])
    torch.testing.assert_close(again[1], refined[1])


def test_float32_is_as_good_as_float64() -> None:
    """A code differs only where the target lies within float32's error of the middle between two grid values."""
    wide, narrow = (Problem(count=8, m=32, n=64, dtype=dtype) for dtype in (torch.float64, torch.float32))
    codes, codes32 = wide.solve()[0], narrow.solve()[0].double()
    assert float((codes == codes32).double().mean()) > 0.999
    torch.testing.assert_close(wide.loss(codes32), wide.loss(codes), rtol=1e-3, atol=0)


@pytest.mark.parametrize("order", ["forward", "random"])
def test_uncorrelated_inputs_mean_plain_rounding(order: str) -> None:
    problem = Problem(n=40)
    problem.moment = torch.diag_embed(torch.rand(3, 40, dtype=torch.float64) + 0.1)
    if order == "forward":
        problem.order = torch.arange(40).expand(3, -1)
    codes, step = problem.solve()
    assert torch.equal(codes, problem.plain())
    assert torch.equal(problem.refined(codes, step)[0], codes)


def test_dropped_columns_are_absorbed() -> None:
    """Two equal inputs, one dropped, the other on a fine grid: the kept column takes the sum."""
    w = torch.tensor([[[0.3, 0.5]]], dtype=torch.float64)
    moment = torch.ones(1, 2, 2, dtype=torch.float64)
    level = torch.tensor([[[0.0, 255.0]]], dtype=torch.float64)
    step = torch.full((1, 1, 2), 0.0078125, dtype=torch.float64)
    order = torch.tensor([[0, 1]])
    codes, _ = round_with_feedback(w, feedback_factor(damp_(moment, 1e-6), order), step, level, order)
    assert float(codes[0, 0, 0]) == 0
    assert float(decode(codes, step, level)[0, 0, 1]) == pytest.approx(0.8, abs=0.008)


@pytest.mark.parametrize("weighted", [False, True])
def test_all_columns_dropped(weighted: bool) -> None:
    problem = Problem()
    problem.level = torch.zeros_like(problem.level)
    codes, step = problem.solve(problem.row_weight if weighted else None)
    assert not bool(codes.any())
    assert torch.equal(step, problem.step)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_feedback_beats_plain_rounding(seed: int, weighted: bool) -> None:
    """On correlated inputs; each matrix on its own may be unlucky, all together never."""
    problem = Problem(count=16, m=8, n=48, seed=seed)
    problem.order = torch.argsort(problem.level[:, 0], dim=1, stable=True)
    weight = problem.row_weight if weighted else None
    plain, fed = problem.loss(problem.plain(), row_weight=weight), problem.loss(*problem.solve(weight), weight)
    assert float(fed.sum()) < 0.8 * float(plain.sum())
    assert float((fed < plain).double().mean()) > 0.8


def test_coarse_columns_first_is_better() -> None:
    """Rising width beats falling width: fine columns can absorb what coarse ones lose, not the other way round."""
    problem = Problem(count=16, m=8, n=48)
    losses = []
    for descending in (False, True):
        problem.order = torch.argsort(problem.level[:, 0], dim=1, descending=descending, stable=True)
        losses.append(float(problem.loss(problem.solve()[0]).sum()))
    assert losses[0] < 0.9 * losses[1]


@pytest.mark.parametrize("weighted", [False, True])
def test_codes_stay_in_their_range_and_steps_storable(weighted: bool) -> None:
    problem = Problem(count=4, m=16, n=64, dtype=torch.float32)
    problem.w = problem.w * 20
    weight = problem.row_weight if weighted else None
    codes, step = problem.solve(weight)
    for _ in range(2):
        assert bool(((codes >= 0) & (codes <= problem.level) & (codes == codes.round())).all())
        assert torch.equal(step.half().float(), step)
        assert bool((step > 0).all())
        codes, step = problem.refined(codes, step, weight)


def test_inputs_stay_as_they_are() -> None:
    problem, again = Problem(n=40), Problem(n=40)
    codes, step = problem.solve(problem.row_weight)
    copies = codes.clone(), step.clone()
    problem.refined(codes, step, problem.row_weight)
    refit_row_steps(problem.w, problem.damped, codes, torch.ones(3, 6, 4).double(), problem.level)
    assert torch.equal(codes, copies[0])
    assert torch.equal(step, copies[1])
    for name in ("w", "moment", "step", "level", "order", "row_weight"):
        assert torch.equal(getattr(problem, name), getattr(again, name)), name


def test_expanded_levels_and_transposed_weights() -> None:
    """Callers pass expanded levels and transposed factors."""
    problem = Problem(n=40)
    expected = problem.solve()[0]
    problem.level = problem.level.expand(-1, problem.w.shape[1], -1)
    problem.w = problem.w.mT.contiguous().mT
    problem.step = problem.step.mT.contiguous().mT
    assert torch.equal(problem.solve()[0], expected)


def test_row_weights_refit_the_steps() -> None:
    """Steps follow what a column has to absorb, so the weighted loss falls; equal weights of any size do the same."""
    problem = Problem(count=16, m=16, n=48)
    problem.order = torch.argsort(problem.level[:, 0], dim=1, stable=True)
    weight = problem.row_weight
    kept, refitted = problem.loss(*problem.solve(), weight), problem.loss(*problem.solve(weight), weight)
    assert float(refitted.sum()) < float(kept.sum())
    one, two = (problem.solve(torch.full_like(weight, value)) for value in (1.0, 2.0))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


# ------------------------------------------------------------------------------------------------- refinement


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("start", ["plain", "feedback", "zero-codes"])
def test_no_pass_raises_the_objective(start: str, weighted: bool) -> None:
    """Matrix by matrix, pass by pass, from any start."""
    problem = Problem(count=8, m=12, n=40)
    weight = problem.row_weight if weighted else None
    codes, step = {
        "plain": lambda: (problem.plain(), problem.step),
        "feedback": lambda: problem.solve(weight),
        "zero-codes": lambda: (torch.zeros_like(problem.w), problem.step),
    }[start]()
    before = problem.loss(codes, step, weight)
    for _ in range(4):
        codes, step = problem.refined(codes, step, weight)
        after = problem.loss(codes, step, weight)
        assert bool((after <= before * (1 + 1e-12)).all())
        before = after


def test_refine_equals_coordinate_descent() -> None:
    """One matrix, one column after another, each to the nearest value of its best target; float64 throughout."""
    problem = Problem(count=1, m=3, n=9, groups=1)
    h, level, step = problem.damped[0], problem.level[0, 0], problem.step[0, 0]
    q = decode(problem.plain(), problem.step, problem.level)[0]
    for k in range(9):
        if level[k]:
            rest = problem.w[0] - q
            rest[:, k] = problem.w[0, :, k]
            target = rest @ h[:, k] / h[k, k]  # minimizes the quadratic in column k with all others as they are
            grid = step[k] * torch.arange(-float(level[k]), float(level[k]) + 1, 2, dtype=torch.float64)
            q[:, k] = grid[(grid[None] - target[:, None]).abs().argmin(1)]
    codes, kept = problem.refined(problem.plain(), problem.step)
    torch.testing.assert_close(decode(codes, kept, problem.level)[0], q)


def test_refining_a_fixed_point_changes_nothing() -> None:
    problem = Problem(count=2, m=4, n=16)
    codes, step = problem.solve()
    for _ in range(50):
        codes, step = problem.refined(codes, step)
    again = problem.refined(codes, step)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], step)


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_row_steps_never_raise_a_rows_objective(groups: int) -> None:
    problem = Problem(count=4, m=6, n=40, dtype=torch.float32)
    gen = torch.Generator().manual_seed(0)
    problem.level = (2.0 ** torch.randint(0, 5, (4, 6, 1), generator=gen) - 1).expand(-1, -1, 40)
    step = storable_steps(torch.rand(4, 6, groups, generator=gen) + 0.05)

    def losses(steps: torch.Tensor) -> torch.Tensor:
        rest = (problem.w - decode(codes, steps.repeat_interleave(40 // groups, 2), problem.level)).double()
        return torch.einsum("bij,bjk,bik->bi", rest, problem.damped.double(), rest)

    codes = encode(problem.w, step.repeat_interleave(40 // groups, 2), problem.level)
    refitted = refit_row_steps(problem.w, problem.damped, codes, step, problem.level)
    assert torch.equal(storable_steps(refitted), refitted)
    assert bool((refitted > 0).all())
    before, after = losses(step), losses(refitted)
    assert bool((after <= before * (1 + 1e-5)).all())
    assert float(after.sum()) < float(before.sum())
    if groups == 1:  # one unknown per row: the exact minimum is known
        grid = (codes * 2 - problem.level).double()
        best = torch.einsum("bij,bjk,bik->bi", grid, problem.damped.double(), problem.w.double())
        best = best / torch.einsum("bij,bjk,bik->bi", grid, problem.damped.double(), grid).clamp_min(1e-30)
        assert torch.equal(refitted[..., 0][best > 0], storable_steps(best[best > 0]))


# ----------------------------------------------------------------------------------------------- both halves


def test_search_then_feedback() -> None:
    """As the quantizer joins them: steps from the search, codes from the feedback, then a pass of refinement."""
    gen = torch.Generator().manual_seed(0)
    w = torch.randn(2, 64, 32, generator=gen)
    h = damp_(moments(2, 32, dtype=torch.float32), DAMPENING)
    step, _ = search_step(w, torch.ones(1, 64, 1), 2)
    level, order, rho = torch.full((2, 1, 32), 3.0), torch.arange(32).expand(2, -1), torch.ones(2, 64)

    def loss(codes: torch.Tensor, steps: torch.Tensor) -> float:
        rest = (decode(codes, steps, level) - w).double()
        return float(torch.einsum("bij,bjk,bik->", rest, h.double(), rest))

    fed = round_with_feedback(w, feedback_factor(h, order), step, level, order, rho)
    refined = refine(w, h, *fed, level, rho)
    assert loss(*fed) < 0.7 * loss(encode(w, step, level), step)
    assert loss(*refined) < loss(*fed)
