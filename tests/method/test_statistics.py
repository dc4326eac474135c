"""Calibration statistics against a float64 computation that takes one token and one expert at a time."""

import math
from dataclasses import dataclass

import pytest
import torch

from bitsmoe_modifier.errors import CalibrationError
from bitsmoe_modifier.method.candidates import direction_gain
from bitsmoe_modifier.method.gating import Gating
from bitsmoe_modifier.method.layer import DenseExperts
from bitsmoe_modifier.method.spectral import SharedBasis
from bitsmoe_modifier.method.statistics import (
    _SPREAD,
    _TEMPER,
    LayerStatistics,
    RoutedTokens,
    activate,
    collect_statistics,
    down_moments,
    expert_moments,
    prior_share,
    second_moment,
    shrink,
)

#: Sums of some hundred float32 products of either sign: each rounds by 2^-24, errors of independent sign add up by
#: the square root of their number, and cancellation costs another digit.
RTOL, ATOL = 2e-5, 2e-6


@dataclass(frozen=True)
class Case:
    """A random layer and its routing."""

    x: torch.Tensor
    ids: torch.Tensor
    p: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    bias: torch.Tensor | None = None
    metric: torch.Tensor | None = None
    token_weight: torch.Tensor | None = None

    @property
    def num_experts(self) -> int:
        return len(self.down)

    def tokens(self) -> RoutedTokens:
        return RoutedTokens.from_router(self.x, self.ids, self.p, self.num_experts, self.token_weight)

    def collect(self, gating: Gating | None = None, peaks: bool = False) -> LayerStatistics:
        arguments = self.tokens(), self.gate_up, self.down, gating or Gating(), self.bias, self.metric
        return collect_statistics(*arguments, peaks=peaks)


def make_case(
    kind: str = "plain", *, tokens: int = 60, num_experts: int = 5, choices: int = 2, hidden: int = 12, width: int = 8
) -> Case:
    gen = torch.Generator().manual_seed(sum(map(ord, kind)))

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen)

    x = randn(tokens, hidden) * torch.logspace(-1, 0.5, hidden)
    choices = 1 if kind == "one-choice" else choices
    open_to = 3 if kind == "idle-experts" else num_experts
    ids = torch.rand(tokens, open_to, generator=gen).argsort(1)[:, :choices]
    if kind == "one-expert":
        ids = torch.full((tokens, 1), 2)
    p = torch.rand(tokens, ids.shape[1], generator=gen) + 0.1
    gate_up, down = randn(num_experts, 2 * width, hidden) / 3, randn(num_experts, hidden, width) / 3
    extra: dict[str, torch.Tensor] = {}
    if kind == "bias":
        extra["bias"] = randn(num_experts, 2 * width)
    if kind == "metric":
        root = randn(hidden, hidden)
        extra["metric"] = root @ root.T
    if kind == "token-weight":
        extra["token_weight"] = torch.rand(tokens, generator=gen) * 3
    if kind == "bfloat16":
        x, gate_up, down = x.bfloat16(), gate_up.bfloat16(), down.bfloat16()
    return Case(x, ids, p, gate_up, down, **extra)


KINDS = ["plain", "one-choice", "one-expert", "idle-experts", "bias", "metric", "token-weight", "bfloat16"]


def silu(g: float) -> tuple[float, float]:
    """Value and derivative."""
    s = 1 / (1 + math.exp(-g))
    return g * s, s * (1 + g * (1 - s))


@dataclass
class Direct:
    """What `LayerStatistics` stands for before any prior, summed pair by pair in float64."""

    c: torch.Tensor
    slopes: torch.Tensor
    cross: torch.Tensor
    z: torch.Tensor
    output: torch.Tensor
    mass: torch.Tensor
    peak: torch.Tensor
    counts: list[int]


def direct(case: Case) -> Direct:
    e, hidden, width = case.down.shape
    x, gate_up, down = case.x.double(), case.gate_up.double(), case.down.double()
    out = Direct(
        *(
            torch.zeros(*s, dtype=torch.float64)
            for s in ((hidden, hidden), (e, 2 * width), (e, width), (e, width, width))
        ),
        *(torch.zeros(*shape, dtype=torch.float64) for shape in ((hidden, hidden), (e,), (e,))),
        [0] * e,
    )
    for t in range(len(x)):
        for j in range(case.ids.shape[1]):
            n = int(case.ids[t, j])
            w = float(case.p[t, j]) ** 2 * (1.0 if case.token_weight is None else float(case.token_weight[t]))
            a = gate_up[n] @ x[t] + (0 if case.bias is None else case.bias[n].double())
            z, slope = torch.zeros(width, dtype=torch.float64), torch.zeros(2 * width, dtype=torch.float64)
            for i in range(width):
                value, derivative = silu(float(a[i]))
                z[i] = value * a[width + i]
                slope[i], slope[width + i] = a[width + i] * derivative, value
            out.c += w * torch.outer(x[t], x[t])
            out.slopes[n] += w * slope**2
            out.cross[n] += w * slope[:width] * slope[width:]
            out.z[n] += w * torch.outer(z, z)
            out.output += w * torch.outer(down[n] @ z, down[n] @ z)
            out.mass[n] += w
            out.peak[n] = max(float(out.peak[n]), float((down[n] @ z).norm()))
            out.counts[n] += 1
    return out


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(got.double(), expected, rtol=RTOL, atol=ATOL * scale)


# ------------------------------------------------------------------------------------------------- the router


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_are_the_routers_choices(kind: str) -> None:
    case = make_case(kind)
    tokens = case.tokens()
    assert tokens.counts == tuple(int((case.ids == e).sum()) for e in range(case.num_experts))
    got = set()
    for e, pairs in enumerate(tokens.pairs(range(case.num_experts))):
        for token, weight in zip(tokens.token[pairs].tolist(), tokens.weight[pairs].tolist(), strict=True):
            choice = case.ids[token].tolist().index(e)
            loss = 1.0 if case.token_weight is None else float(case.token_weight[token])
            assert weight == pytest.approx(float(case.p[token, choice]) ** 2 * loss, rel=1e-6)
            got.add((token, choice))
    assert got == {(t, j) for t in range(len(case.x)) for j in range(case.ids.shape[1])}


@pytest.mark.parametrize("kind", ["plain", "token-weight", "one-choice"])
def test_token_weights_sum_over_the_choices(kind: str) -> None:
    case = make_case(kind)
    expected = case.p.double().square().sum(1) * (1 if case.token_weight is None else case.token_weight.double())
    torch.testing.assert_close(case.tokens().token_weights.double(), expected, rtol=1e-6, atol=0)


def test_router_weights_of_any_dtype() -> None:
    case = make_case()
    tokens = RoutedTokens.from_router(case.x, case.ids.int(), case.p.bfloat16(), case.num_experts)
    assert tokens.weight.dtype == torch.float32
    assert sum(tokens.counts) == case.ids.numel()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_inputs_are_refused(value: float) -> None:
    case = make_case()
    x, p = case.x.clone(), case.p.clone()
    x[3, 4] = p[1, 1] = value
    with pytest.raises(CalibrationError, match="calibration inputs hold NaN or infinity"):
        RoutedTokens.from_router(x, case.ids, case.p, case.num_experts)
    with pytest.raises(CalibrationError, match="routing weights hold NaN or infinity"):
        RoutedTokens.from_router(case.x, case.ids, p, case.num_experts)


# ------------------------------------------------------------------------------------------------ the moments


@pytest.mark.parametrize("kind", KINDS)
def test_input_moment(kind: str) -> None:
    case = make_case(kind)
    close(case.collect().input_moment, direct(case).c)


@pytest.mark.parametrize("tokens", [9, 60], ids=["experts of fewer tokens than channels", "of more"])
@pytest.mark.parametrize("kind", KINDS)
def test_down_output_moment(kind: str, tokens: int) -> None:
    case = make_case(kind, tokens=tokens)
    close(case.collect().down_output_moment, direct(case).output)


@pytest.mark.parametrize("kind", KINDS)
def test_mass_and_peak(kind: str) -> None:
    case = make_case(kind)
    statistics, expected = case.collect(peaks=True), direct(case)
    seen = expected.mass > 0
    close(statistics.mass[seen], expected.mass[seen])
    close(statistics.peak_output, expected.peak)
    assert not bool(case.collect().peak_output.any()), "not asked for"
    assert bool((statistics.mass > 0).all()), "an idle expert is never free to destroy"
    if not bool(seen.all()):
        assert float(statistics.mass[~seen].max()) < float(expected.mass[seen].mean())


def shrunk_diagonal(case: Case, expected: Direct) -> torch.Tensor:
    """diag of Z[e] <- (1 - a_e) Z[e] + a_e (n_e / n) Z, masses in the place of counts; then boosted."""
    width = case.down.shape[2]
    diagonal = expected.z.diagonal(dim1=1, dim2=2)
    common = diagonal.sum(0) / expected.mass.sum()
    share = prior_share(expected.counts, width).double()[:, None]
    shrunk = (1 - share) * diagonal + share * case.collect().mass.double()[:, None] * common
    return shrunk * expected_boost(expected)[:, None]


def expected_boost(expected: Direct) -> torch.Tensor:
    """(share + spread)^temper / share, the share counted in average experts; an idle expert's share is the spread."""
    average = expected.mass.mean()
    used = (expected.mass / average + _SPREAD) ** _TEMPER
    share = torch.where(expected.mass > 0, expected.mass / average, _SPREAD)
    return used / share


@pytest.mark.parametrize("kind", KINDS)
def test_costs_of_rare_experts_are_boosted(kind: str) -> None:
    case = make_case(kind)
    statistics, expected = case.collect(), direct(case)
    close(statistics.boost, expected_boost(expected))
    idle = expected.mass == 0
    if bool(idle.any()):
        close(statistics.mass[idle], (_SPREAD * expected.mass.mean()).expand(int(idle.sum())))


def test_rare_experts_are_boosted_more() -> None:
    """Costs keep the order of the experts' shares, and spread less than the shares do."""
    statistics = make_case("plain").collect()
    order = statistics.mass.argsort()
    used = (statistics.mass * statistics.boost)[order]
    assert bool((used.diff() > 0).all())
    assert bool((statistics.boost[order].diff() < 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_slope_ratio(kind: str) -> None:
    case = make_case(kind)
    expected, width = direct(case), case.down.shape[2]
    own = expected.cross / expected.slopes[:, width:].clamp_min(1e-300)
    close(case.collect().slope_ratio, own * (1 - prior_share(expected.counts, width).double())[:, None])


@pytest.mark.parametrize("kind", ["plain", "one-choice", "idle-experts", "bias", "token-weight", "bfloat16"])
def test_down_moments(kind: str) -> None:
    """Second moments of what rounded gate and up make, and of what they lost, pair by pair."""
    case = make_case(kind)
    tokens, width = case.tokens(), case.down.shape[2]
    rounded = (case.gate_up.float() * 4).round() / 4
    experts = DenseExperts(case.gate_up, case.down, Gating(), case.bias)
    ids = range(case.num_experts)
    moments, lost = down_moments(experts, tokens, case.x.float(), lambda expert: rounded[expert], ids)
    some = down_moments(experts, tokens, case.x.float(), lambda expert: rounded[expert], ids[1:])
    assert all(torch.equal(part, whole[1:]) for part, whole in zip(some, (moments, lost), strict=True))
    seen, missing = (torch.zeros(case.num_experts, width, width, dtype=torch.float64) for _ in range(2))
    for e, pairs in enumerate(tokens.pairs(range(case.num_experts))):
        for token, weight in zip(tokens.token[pairs].tolist(), tokens.weight[pairs].double().tolist(), strict=True):
            bias = 0 if case.bias is None else case.bias[e].double()
            z, less = (
                torch.nn.functional.silu(g) * u
                for g, u in (
                    ((w[e].double() @ case.x[token].double()) + bias).chunk(2) for w in (case.gate_up, rounded)
                )
            )
            seen[e] += weight * torch.outer(less, less)
            missing[e] += weight * torch.outer(z - less, less)
    close(moments, seen)
    close(lost, missing)


@pytest.mark.parametrize("kind", KINDS)
def test_down_moment_diagonal(kind: str) -> None:
    case = make_case(kind)
    close(case.collect().down_moment_diagonal, shrunk_diagonal(case, direct(case)))


@pytest.mark.parametrize("kind", KINDS)
def test_row_importance(kind: str) -> None:
    """E[p^2 slope^2] / E[p^2] times the energy of the down column, shrunk towards the layer's average."""
    case = make_case(kind)
    expected = direct(case)
    down = case.down.double()
    weighted = down if case.metric is None else case.metric.double() @ down
    energy = (down * weighted).sum(1).repeat(1, 2)
    mass = expected.mass.clamp_min(1e-30)[:, None]
    own = expected.slopes / mass * energy
    average = (expected.mass[:, None] * own).sum(0, keepdim=True) / expected.mass.sum()
    share = prior_share(expected.counts, case.down.shape[2]).double()[:, None]
    close(case.collect().row_importance, ((1 - share) * own + share * average).clamp_min(float(average.mean()) * 1e-3))


def test_row_importance_predicts_the_output_error() -> None:
    """Small random errors of gate and up cost what rho and C[e] say: sum_i rho[e, i] d_iᵀ C[e] d_i.

    rho and C[e] are averages over the same tokens, and their product neglects how far inputs and slopes correlate: the
    prediction is good to a factor, not to digits.
    """
    case = make_case(tokens=200, num_experts=2)
    tokens, gating = case.tokens(), Gating()
    statistics = case.collect()
    gen = torch.Generator().manual_seed(5)
    expert, size = 1, 1e-4
    pairs = tokens.pairs([expert])[0]
    x, weight = case.x[tokens.token[pairs]].double(), tokens.weight[pairs].double()
    w, down = case.gate_up[expert].double(), case.down[expert].double()

    def outputs(matrix: torch.Tensor) -> torch.Tensor:
        return gating(*(x @ matrix.T).chunk(2, 1)) @ down.T

    measured = predicted = 0.0
    own = (x * weight[:, None]).T @ x
    for _ in range(40):
        delta = size * torch.randn(w.shape, generator=gen, dtype=torch.float64)
        measured += float((weight @ (outputs(w + delta) - outputs(w)).square()).sum())
        predicted += float((statistics.row_importance[expert].double() * ((delta @ own) * delta).sum(1)).sum())
    assert 0.5 < predicted / measured < 2


def test_statistics_of_another_gating() -> None:
    """The slopes are those of the gating, not of silu: relu's are 0 or 1 times the other branch."""
    case = make_case(tokens=300, num_experts=1, choices=1)
    got = collect_statistics(case.tokens(), case.gate_up, case.down, Gating("relu"))
    a = case.x.double() @ case.gate_up[0].double().T
    gate, up = a.chunk(2, 1)
    weight = case.p[:, 0].double().square()
    slopes = torch.cat([(gate > 0) * up, gate.clamp_min(0)], 1)
    own = (weight @ slopes.square()) / weight.sum() * case.down[0].double().square().sum(0).repeat(2)
    close(got.row_importance[0], own)


def test_an_experts_statistics_do_not_depend_on_order() -> None:
    case = make_case()
    order = torch.randperm(len(case.x), generator=torch.Generator().manual_seed(0))
    again = Case(case.x[order], case.ids[order], case.p[order], case.gate_up, case.down)
    for name in ("input_moment", "row_importance", "down_moment_diagonal", "down_output_moment", "mass"):
        close(getattr(again.collect(), name), getattr(case.collect(), name).double())


@pytest.mark.parametrize("where", ["weights", "inputs"])
def test_overflowing_activations_name_the_expert(where: str) -> None:
    case = make_case()
    if where == "weights":
        case.gate_up[3] *= 1e30
    else:
        case = Case(case.x * 1e30, case.ids.clamp_min(3), case.p, case.gate_up, case.down)
    with pytest.raises(CalibrationError, match="expert 3: its activations overflow"):
        case.collect()


def test_overflowing_moments_name_the_expert() -> None:
    """z is finite but its square is not: nothing may enter the allocation as infinity."""
    case = make_case()
    case.gate_up[3] *= 1e11
    case.down[3] *= 1e-11
    with pytest.raises(CalibrationError, match="expert 3"):
        case.collect()


# ------------------------------------------------------------------------------------------- pieces, and prior


@pytest.mark.parametrize("chunk", [1, 7, 60, 1000])
def test_second_moment_in_chunks(chunk: int) -> None:
    case = make_case()
    weight = torch.rand(len(case.x), generator=torch.Generator().manual_seed(1))
    x = case.x.double()
    close(second_moment(case.x, weight, chunk), x.T @ (x * weight.double()[:, None]))


@pytest.mark.parametrize("kind", ["plain", "idle-experts", "one-expert"])
def test_expert_moments(kind: str) -> None:
    case = make_case(kind)
    tokens = case.tokens()
    experts = [4, 0, 2]
    got = expert_moments(lambda _, pairs: case.x[tokens.token[pairs]], tokens, experts, case.x.shape[1])
    for moment, e in zip(got, experts, strict=True):
        rows = [(t, j) for t in range(len(case.x)) for j in range(case.ids.shape[1]) if int(case.ids[t, j]) == e]
        expected = torch.zeros(12, 12, dtype=torch.float64)
        for t, j in rows:
            expected += float(case.p[t, j]) ** 2 * torch.outer(case.x[t].double(), case.x[t].double())
        if rows:
            close(moment, expected)
        else:
            assert not bool(moment.any())


@pytest.mark.parametrize("spectral", [False, True], ids=["channels", "basis"])
@pytest.mark.parametrize("kind", ["plain", "idle-experts", "one-expert", "token-weight", "bfloat16"])
def test_direction_gain_is_the_diagonal_of_the_moments_in_the_basis(kind: str, spectral: bool) -> None:
    case = make_case(kind)
    tokens, statistics, hidden = case.tokens(), case.collect(), case.x.shape[1]
    b = torch.randn(7, hidden, generator=torch.Generator().manual_seed(1)) if spectral else torch.eye(hidden)
    got = direction_gain(tokens, statistics, SharedBasis(16, b.bfloat16(), None, b) if spectral else None)
    own = expert_moments(lambda _, pairs: case.x[tokens.token[pairs]].float(), tokens, range(case.num_experts), hidden)
    common = second_moment(case.x, tokens.token_weights) / tokens.weight.sum()
    full = shrink(own, common, statistics.mass, prior_share(tokens.counts, hidden))
    expected = torch.einsum("rh,ehj,rj->er", b.double(), full.double(), b.double()) * statistics.boost[:, None]
    close(got, expected)


def test_activate_is_the_gating_and_its_slopes() -> None:
    case = make_case("bias")
    z, slope_gate, slope_up = activate(case.x, case.gate_up[1], case.bias[1], Gating())
    assert not z.requires_grad
    for t in (0, 17):
        a = case.gate_up[1].double() @ case.x[t].double() + case.bias[1].double()
        for i in range(8):
            value, derivative = silu(float(a[i]))
            expected = (value * float(a[8 + i]), derivative * float(a[8 + i]), value)
            got = (float(z[t, i]), float(slope_gate[t, i]), float(slope_up[t, i]))
            assert got == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_prior_share_falls_with_tokens() -> None:
    share = prior_share([0, 1, 10, 100, 10_000, 10_000_000], 64)
    assert float(share[0]) == 1
    assert bool((share.diff() < 0).all())
    assert float(share[-1]) < 1e-4, "an expert with many tokens is its own judge"
    assert bool((prior_share([50], 128) > prior_share([50], 64)).all()), "a wider moment needs more tokens"


@pytest.mark.parametrize("diagonal", [False, True], ids=["moments", "diagonals"])
def test_shrink_mixes_at_equal_mass(diagonal: bool) -> None:
    gen = torch.Generator().manual_seed(0)
    root = torch.randn(3, 6, 6, generator=gen)
    own, common = root @ root.mT, root[0].T @ root[0]
    mass, share = torch.tensor([2.0, 0.5, 0.01]), torch.tensor([0.0, 0.25, 1.0])
    expected = torch.stack([(1 - s) * o + s * m * common for o, m, s in zip(own, mass, share, strict=True)])
    if diagonal:
        own, common, expected = (t.diagonal(dim1=-2, dim2=-1) for t in (own, common, expected))
    torch.testing.assert_close(shrink(own, common, mass, share), expected)
    assert torch.equal(shrink(own, common, mass, share)[0], own[0])


def test_overflowing_input_moment_is_refused() -> None:
    case = make_case()
    with pytest.raises(CalibrationError, match="squares of its inputs"):
        Case(case.x * 1e20, case.ids, case.p, case.gate_up * 1e-20, case.down).collect()


def test_an_idle_expert_takes_the_average() -> None:
    case = make_case("idle-experts")
    statistics = case.collect()
    idle = [e for e, n in enumerate(case.tokens().counts) if n == 0]
    assert idle == [3, 4]
    assert torch.equal(statistics.row_importance[3], statistics.row_importance[4])
    assert bool((statistics.row_importance > 0).all())
    assert bool((statistics.down_moment_diagonal[idle] > 0).all())
    ratio = statistics.down_moment_diagonal[3] / statistics.down_moment_diagonal[:3].sum(0)
    assert float(ratio.max()) < 0.1, "cheap"


def test_no_routed_weight_at_all() -> None:
    """Routing weights of zero: everything stays finite."""
    case = make_case()
    statistics = Case(case.x, case.ids, torch.zeros_like(case.p), case.gate_up, case.down).collect()
    for name in ("input_moment", "row_importance", "down_moment_diagonal", "down_output_moment", "mass"):
        assert bool(torch.isfinite(getattr(statistics, name)).all()), name
