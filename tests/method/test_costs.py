"""Cost tables: the distortion of what would be stored, recomputed by brute force, and the bits of a unit."""

import itertools

import pytest
import torch

from bitsmoe_modifier.method import costs as costs_module
from bitsmoe_modifier.method.costs import SideCosts, chosen_steps, side_costs, unit_cost
from bitsmoe_modifier.method.rounding import encode, search_step
from bitsmoe_modifier.storage.factors import decode_factor, pack_factor
from bitsmoe_modifier.storage.layout import ExpertsLayout, index_units
from bitsmoe_modifier.storage.planes import WIDTHS
from bitsmoe_modifier.storage.steps import storable_steps

MATRICES, LENGTH, DIRECTIONS, BLOCK, GROUP = 4, 48, 32, 16, 16
KINDS = ["gauss", "outliers", "heavy-tails", "zeros", "constant", "tiny", "huge", "dead-weights"]


def problem(kind: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(factor, weight, gain)."""
    gen = torch.Generator().manual_seed(seed)
    factor = torch.randn(MATRICES, LENGTH, DIRECTIONS, generator=gen)
    weight = torch.rand(MATRICES, LENGTH, generator=gen) + 0.01
    gain = torch.rand(MATRICES, DIRECTIONS, generator=gen)
    if kind == "outliers":
        factor[:, ::7] *= 30
    elif kind == "heavy-tails":
        factor = factor**5
    elif kind == "zeros":
        factor[:, :, ::2] = 0
    elif kind == "constant":
        factor = torch.full_like(factor, -0.37)
    elif kind == "tiny":
        factor = factor * 1e-6
    elif kind == "huge":
        factor = factor * 1e4
    elif kind == "dead-weights":
        weight[:, ::3] = 0
        gain[0] = 0
    return factor, weight, gain


def table(kind: str, widths: tuple[int, ...] = WIDTHS) -> SideCosts:
    factor, weight, gain = problem(kind)
    return side_costs([factor], weight, gain, widths, BLOCK, GROUP)


def nearest(a: torch.Tensor, step: torch.Tensor, width: int) -> torch.Tensor:
    """The nearest of all 2**width grid values, found by trying each."""
    grid = torch.arange(-(2**width - 1), 2**width, 2, dtype=torch.float64)
    values = step.double()[..., None] * grid
    return values.gather(-1, (values - a.double()[..., None]).abs().argmin(-1, keepdim=True)).squeeze(-1)


def rounding_floor(w: torch.Tensor) -> float:
    """Squared error of one weight that float32 cannot resolve.

    A weight that lies on the grid keeps the error of its fp16 step, 2^-12 of it; float32 knows that error to 2^-23 of
    the weight: 2 * 2^-12 * 2^-23.
    """
    return float(w.square().amax()) * 2.0**-34


def uniform(width: int) -> torch.Tensor:
    """The same width for all units."""
    return torch.full((MATRICES, DIRECTIONS // BLOCK), width, dtype=torch.uint8)


def energy_of(kind: str) -> torch.Tensor:
    """What dropping each unit would lose, ``[matrices, units]``."""
    factor, weight, gain = (t.double() for t in problem(kind))
    return ((factor.square() * weight[:, :, None]).sum(1) * gain).view(MATRICES, -1, BLOCK).sum(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_distortion_is_the_error_of_the_nearest_grid_values(kind: str) -> None:
    """Over all matrices, in double precision, every grid value tried. The table sums in float32."""
    factor, weight, gain = problem(kind)
    costs = table(kind)
    for column, width in enumerate(costs.widths):
        rest = factor.double()
        if width:
            step = chosen_steps(factor, weight, uniform(width), BLOCK, GROUP).repeat_interleave(GROUP, 1)
            rest = nearest(factor, step, width) - rest
        loss = (rest.square() * weight.double()[:, :, None]).sum(1) * gain.double()
        expected = loss.view(MATRICES, -1, BLOCK).sum(-1).sum(0)
        floor = rounding_floor(factor) * LENGTH * BLOCK * MATRICES
        torch.testing.assert_close(costs.distortion[:, :, column].sum(0), expected, rtol=1e-4, atol=floor)


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_share_what_rounding_leaves(kind: str) -> None:
    """A unit's distortion is its energy times a share that is the same for all matrices."""
    energy, distortion = energy_of(kind), table(kind).distortion
    share = distortion.sum(0) / energy.sum(0).clamp_min(1e-300)[:, None]
    torch.testing.assert_close(distortion, energy[:, :, None] * share, rtol=1e-4, atol=1e-30)


def test_a_sample_of_the_matrices_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for two of four matrices the shares are theirs; what dropping loses is every matrix's own."""
    factor, weight, gain = problem("gauss")
    monkeypatch.setattr(costs_module, "SAMPLE_ELEMENTS", 2 * LENGTH * DIRECTIONS)
    costs = table("gauss")
    two = side_costs([factor[::2]], weight[::2], gain[::2], WIDTHS, BLOCK, GROUP).distortion
    share = two.sum(0) / two[:, :, 0].sum(0)[:, None]
    torch.testing.assert_close(costs.distortion, energy_of("gauss")[:, :, None] * share, rtol=1e-5, atol=0)
    monkeypatch.setattr(costs_module, "SAMPLE_ELEMENTS", 1)
    assert bool(torch.isfinite(table("gauss").distortion).all())


@pytest.mark.parametrize("width", [w for w in WIDTHS if w])
@pytest.mark.parametrize("kind", ["gauss", "outliers", "zeros"])
def test_distortion_is_the_error_of_decoding_what_is_stored(kind: str, width: int) -> None:
    """Through the real payload: encode, pack, decode, compare."""
    factor, weight, gain = problem(kind)
    costs = side_costs([factor], weight, gain, (width,), BLOCK, GROUP)
    layout = ExpertsLayout(MATRICES // 2, DIRECTIONS, LENGTH, DIRECTIONS, DIRECTIONS, BLOCK, GROUP, 0, 0, 8)
    widths = uniform(width)
    steps = chosen_steps(factor, weight, widths, BLOCK, GROUP)
    codes = encode(factor, steps.repeat_interleave(GROUP, 1), 2**width - 1).to(torch.uint8)
    payload, stored = pack_factor(codes.view(-1, 2, LENGTH, DIRECTIONS), steps, widths.view(-1, 2, 2), layout, "in")
    index = index_units(widths, layout.groups, group_major=True)
    rest = decode_factor(payload, stored, widths, index, layout, "in").double() - factor.double()
    loss = ((rest.square() * weight[:, :, None]).sum(1) * gain).view(MATRICES, -1, BLOCK).sum(-1)
    torch.testing.assert_close(costs.distortion[:, :, 0].sum(0), loss.sum(0), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_can_be_stored(kind: str) -> None:
    factor, weight, _ = problem(kind)
    widths = torch.tensor(WIDTHS[:8], dtype=torch.uint8)[torch.arange(MATRICES * 2) % len(WIDTHS)].view(MATRICES, 2)
    steps = chosen_steps(factor, weight, widths, BLOCK, GROUP)
    assert torch.equal(storable_steps(steps), steps)
    assert bool((steps > 0).all())
    assert steps.shape == (MATRICES, LENGTH // GROUP, DIRECTIONS)


def test_every_unit_gets_the_steps_of_its_own_width() -> None:
    factor, weight, _ = problem("outliers")
    widths = torch.tensor([[0, 6], [2, 1], [8, 3], [4, 2]], dtype=torch.uint8)
    steps = chosen_steps(factor, weight, widths, BLOCK, GROUP)
    for matrix, unit in itertools.product(range(MATRICES), range(2)):
        if width := int(widths[matrix, unit]):
            part = slice(unit * BLOCK, unit * BLOCK + BLOCK)
            w = factor[matrix, :, part].reshape(-1, GROUP, BLOCK)
            expected, _ = search_step(w, weight[matrix].view(-1, GROUP, 1), width)
            assert torch.equal(steps[matrix, :, part], expected.squeeze(1))


@pytest.mark.parametrize("kind", ["gauss", "outliers", "dead-weights", "huge"])
def test_distortion_falls_with_the_width(kind: str) -> None:
    """Half the distance between grid values with every bit: on ordinary weights each width beats the one before."""
    assert bool((table(kind).distortion.diff(dim=-1) <= 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_no_width_is_worse_than_dropping(kind: str) -> None:
    """The fitted step of any codes is at worst zero's error; fp16 rounds it by 2^-11, which costs 2^-22 of the energy.

    ("tiny" weights lie near the smallest step that fp16 holds, where its rounding is coarser.)
    """
    distortion, energy = table(kind).distortion, energy_of(kind)
    slack = 1e-3 if kind == "tiny" else 2**-22
    # all-zero groups get the smallest step: 2^-24 per weight instead of 0
    floor = (LENGTH * BLOCK * MATRICES) * 2.0**-48
    assert bool((distortion[..., 1:].sum(0) <= (energy.sum(0) * (1 + slack))[..., None] + floor).all())
    torch.testing.assert_close(distortion[..., 0], energy, rtol=1e-5, atol=0)


@pytest.mark.parametrize("chunk", [1, 600, 1 << 18])
def test_chunks_do_not_change_the_steps(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    factor, weight, _ = problem("gauss")
    whole = chosen_steps(factor, weight, uniform(3), BLOCK, GROUP)
    monkeypatch.setattr(costs_module, "_CHUNK_ELEMENTS", chunk)
    assert torch.equal(chosen_steps(factor, weight, uniform(3), BLOCK, GROUP), whole)


def test_factor_may_be_a_view() -> None:
    factor, weight, gain = problem("gauss")
    strided = factor.transpose(1, 2).contiguous().transpose(1, 2)
    got, expected = (side_costs([f], weight, gain, WIDTHS, BLOCK, GROUP) for f in (strided, factor))
    torch.testing.assert_close(got.distortion, expected.distortion)
    got, expected = (chosen_steps(f, weight, uniform(2), BLOCK, GROUP) for f in (strided, factor))
    assert torch.equal(got, expected)


def test_parts_do_not_change_the_result() -> None:
    factor, weight, gain = problem("heavy-tails")
    for size in (1, 3, 4):
        got = side_costs(factor.split(size), weight, gain, WIDTHS, BLOCK, GROUP)
        assert torch.equal(got.distortion, table("heavy-tails").distortion)


def test_widths_come_sorted() -> None:
    assert table("gauss", (6, 0, 2)).widths == (0, 2, 6)
    torch.testing.assert_close(table("gauss", (6, 0, 2)).distortion, table("gauss").distortion[..., [0, 2, 5]])


def test_gain_and_weight_scale_the_distortion() -> None:
    factor, weight, gain = problem("gauss")
    once, twice = (side_costs(factor.split(1), weight * w, gain * g, WIDTHS, BLOCK, GROUP) for w, g in ((1, 1), (2, 4)))
    torch.testing.assert_close(twice.distortion, 8 * once.distortion)


# -------------------------------------------------------------------------------------------- the step search


@pytest.mark.parametrize("width", [w for w in WIDTHS if w])
@pytest.mark.parametrize("kind", KINDS)
def test_search_is_never_worse_than_the_covering_step(kind: str, width: int) -> None:
    factor, weight, _ = problem(kind)
    w, rho = factor.view(-1, GROUP, DIRECTIONS), weight.view(-1, GROUP, 1)
    step, error = search_step(w, rho, width)
    covering = storable_steps(w.abs().amax(-2, keepdim=True) / (2**width - 1))

    def loss(s: torch.Tensor) -> torch.Tensor:
        return ((nearest(w, s.expand_as(w), width) - w.double()).square() * rho.double()).sum(-2)

    floor = rounding_floor(w) * GROUP
    assert bool((loss(step) <= loss(covering) * (1 + 1e-5) + floor).all())
    torch.testing.assert_close(error.double(), loss(step), rtol=1e-4, atol=floor)


@pytest.mark.parametrize(("width", "limit"), [(1, 0.37), (2, 0.12), (3, 0.036), (4, 0.0118)])
def test_gaussian_error_is_near_the_best_uniform_quantizer(width: int, limit: float) -> None:
    """Known errors of the best uniform mid-rise quantizer of a normal variable: 0.3634, 0.1188, 0.0374, 0.0115.

    A step per 128 weights fits each group's own sample, a little better than the one for the distribution.
    """
    w = torch.randn(64, 128, 16, generator=torch.Generator().manual_seed(0))
    _, error = search_step(w, torch.ones(()), width)
    assert float(error.sum() / w.square().sum()) < limit


def test_exact_grids_are_found() -> None:
    """Weights that lie on a storable grid come back without error."""
    for width in (2, 3, 4, 6, 8):
        codes = torch.randint(1 << width, (16, 64, 3), generator=torch.Generator().manual_seed(width))
        codes[:, 0] = 2**width - 1  # the covering step is the grid's own
        w = (2 * codes - (2**width - 1)) * 0.03125
        step, error = search_step(w, torch.ones(()), width)
        assert not bool(error.any())
        assert torch.equal(step, torch.full_like(step, 0.03125))


def test_weights_decide_the_step() -> None:
    """With all importance on the small weights the step follows them, although larger ones are clipped."""
    w = torch.tensor([0.11, -0.1, 0.09, 8.0]).view(1, 4, 1)
    step, _ = search_step(w, torch.tensor([1.0, 1.0, 1.0, 0.0]).view(1, 4, 1), 1, candidates=64)
    everything, _ = search_step(w, torch.ones(()), 1, candidates=64)
    assert float(step) < 0.2 < float(everything)


def test_no_candidates_are_refused() -> None:
    with pytest.raises(ValueError, match=r"candidates must be at least \d, got 0"):
        search_step(torch.ones(1, 8, 1), torch.ones(()), 2, candidates=0)


# ------------------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("block", "length", "group"), [(16, 48, 16), (8, 8, 8), (128, 768, 128), (24, 40, 40)])
def test_unit_cost_is_what_a_unit_adds_to_the_payload(width: int, block: int, length: int, group: int) -> None:
    layout = ExpertsLayout(1, block, length, block, block, block, group, 0, 0, 8)
    for side, shape in (("in", (1, 2, 1)), ("out", (1, 1))):
        widths = torch.full(shape, width, dtype=torch.uint8)
        codes = torch.zeros((1, 2, length, block) if side == "in" else (1, block, length), dtype=torch.uint8)
        steps = torch.ones((1, 2, layout.groups, block) if side == "in" else (1, layout.groups, block))
        payload, stored = pack_factor(codes, steps, widths, layout, side)
        assert 8 * (payload.nbytes + stored.nbytes) == widths.numel() * unit_cost(width, block, length, group)
