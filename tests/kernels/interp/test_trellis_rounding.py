"""The fused rounding of a block of columns to trellis codes against `rounding.round_block` in PyTorch.

Sums have another order, so a target may differ in its last bit and a window next to a tie fall on either side: all but
one in some hundreds are equal, and what a matrix loses is.
"""

import pytest
import torch
from kernel_backend import DEVICE, seeded

from bitsmoe_modifier.method import rounding, sides
from bitsmoe_modifier.method.coders import ColumnCoder
from bitsmoe_modifier.method.trellis import NORMAL_STEP, ChainTrellis, GroupTrellis, grid_values
from bitsmoe_modifier.storage.steps import storable_steps

WIDTHS = torch.tensor([0, 1, 2, 3, 4, 6, 8], device="cpu")


class Block:
    """Random arguments: slices of larger tensors, as the two passes hand them over."""

    def __init__(self, width: torch.Tensor, groups: int, rows: int, seed: int) -> None:
        """width ``[N, B, 1]`` or ``[N, B, rows]``; rows: of a matrix."""
        gen = seeded(seed)
        count, columns, _ = width.shape

        def part(*shape: int) -> torch.Tensor:
            whole = torch.randn(shape[0], shape[1] + 5, shape[2], generator=gen)
            return whole[:, 2 : 2 + shape[1]]

        self.target, self.reference = part(count, columns, rows), part(count, columns, rows)
        self.response = 0.3 * part(count, columns, columns + 3)[:, :, 1 : 1 + columns]
        self.width, self.level = width, (2.0**width - 1).float()
        spread = 0.7 + 0.6 * torch.rand(count, columns, groups, generator=gen)
        normal = torch.tensor([NORMAL_STEP.get(b, 1.0) for b in range(9)])
        self.step = storable_steps(spread * normal[width.expand(-1, -1, groups).long()])
        self.row_weight = torch.rand(count, rows, generator=gen) + 0.05

    def before(self, coder: ColumnCoder) -> torch.Tensor:
        """Windows of a target close by, as refinement has them."""
        near = self.target + 0.1 * torch.randn(self.target.shape, generator=seeded(1))
        return self.run(near, coder, None, True)[0]

    def run(
        self, target: torch.Tensor, coder: ColumnCoder, codes: torch.Tensor | None, weighted: bool
    ) -> tuple[torch.Tensor, ...]:
        weight = self.row_weight if weighted else None
        arguments = target.clone(), self.response, self.reference, self.step, self.level, weight, codes
        return rounding.round_block(*arguments, coder)

    def loss(self, found: tuple[torch.Tensor, ...], gain: torch.Tensor) -> torch.Tensor:
        """What the rows lose by their windows and steps, weighted by ``gain [N, 1, m]``: a sum per matrix."""
        codes, step, _ = found
        values = step.repeat_interleave(codes.shape[2] // step.shape[2], 2) * grid_values(codes, self.level)
        moved = self.target - self.response.triu(1).mT @ (values - self.reference)  # by the columns before
        return ((values - moved).square() * gain).sum((1, 2))


def both(
    block: Block, coder: ColumnCoder, codes: torch.Tensor | None, weighted: bool, patch: pytest.MonkeyPatch
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """By the kernel, and in PyTorch."""
    patch.setattr(rounding, "_on_kernels", lambda _: False)
    expected = block.run(block.target, coder, codes, weighted)
    patch.setattr(rounding, "_on_kernels", lambda _: True)
    return block.run(block.target, coder, codes, weighted), expected


def assert_alike(block: Block, got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    """Equal windows, steps and changes of all columns before which nothing fell on the other side of a tie."""
    gain = block.row_weight[:, None]
    torch.testing.assert_close(block.loss(got, gain), block.loss(expected, gain), rtol=2e-2, atol=0)
    alike = [(mine == other).all(2) for mine, other in zip(got[:2], expected[:2], strict=True)]
    columns = (alike[0] & alike[1]).cumprod(1).bool()
    assert float(columns.float().mean()) > 0.8, columns
    torch.testing.assert_close(got[2][columns], expected[2][columns], rtol=1e-5, atol=1e-6)


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "_on_kernels", lambda _: False)


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "equal rows"])
@pytest.mark.parametrize("before", [False, True], ids=["anew", "from windows"])
@pytest.mark.parametrize(("rows", "groups"), [(16, 1), (48, 2)], ids=str)
def test_groups_of_mixed_widths(
    rows: int, groups: int, before: bool, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each matrix with widths of its own, coarse columns first; some are dropped."""
    drawn = torch.randint(len(WIDTHS), (2, 6, 1), generator=torch.Generator().manual_seed(rows), device="cpu")
    width = WIDTHS[drawn.sort(1).values].to(DEVICE)
    block, coder = Block(width, groups, rows, rows), GroupTrellis()
    codes = block.before(coder) if before else None
    assert_alike(block, *both(block, coder, codes, weighted, monkeypatch))


@pytest.mark.parametrize("width", [b for b in WIDTHS.tolist() if b])
def test_groups_of_each_width(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    block, coder = Block(torch.full((1, 3, 1), width), 2, 64, width), GroupTrellis([width])
    for codes in (None, block.before(coder)):
        assert_alike(block, *both(block, coder, codes, True, monkeypatch))


def chains(units: list[list[int]], columns: int, stripe: int | None, seed: int) -> tuple[Block, ChainTrellis]:
    """Matrices with units of 16 directions of these widths; of two stripes, one alone or both."""
    widths = torch.tensor(units, dtype=torch.uint8, device="cpu")
    own = widths if stripe is None else widths[:, stripe::2]
    each = own.repeat_interleave(16, 1).to(DEVICE)[:, None].long()
    block = Block(each.expand(-1, columns, -1), each.shape[2], each.shape[2], seed)
    gain = torch.rand(each.shape[2], generator=seeded(seed + 1)) + 0.1
    return block, ChainTrellis(widths, 2, stripe, gain, 16)


@pytest.mark.parametrize("before", [False, True], ids=["anew", "from windows"])
@pytest.mark.parametrize("stripe", [None, 1], ids=["all units", "a stripe"])
def test_chains(before: bool, stripe: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains of one to three units, of several widths; a matrix that is dropped whole, and units that are."""
    units = [[2, 2, 0, 2, 2, 4], [0, 0, 0, 0, 0, 0], [1, 6, 3, 6, 0, 8]]
    block, coder = chains(units, 4, stripe, 5)
    codes = block.before(coder) if before else None
    got, expected = both(block, coder, codes, False, monkeypatch)
    assert_alike(block, got, expected)
    assert torch.equal(got[1], block.step), "steps are kept"
    dropped = (block.width == 0).expand_as(got[0])
    assert not bool(got[0][dropped].any())
    assert torch.equal(got[2][dropped], -block.reference[dropped])


def test_matrices_without_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    block, coder = chains([[0, 0], [0, 0]], 2, None, 0)
    got, expected = both(block, coder, None, False, monkeypatch)
    for mine, other in zip(got, expected, strict=True):
        assert torch.equal(mine, other)


def test_targets_of_zero_keep_the_least_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that no token reached: all of weight 0, or all of value 0."""
    block, coder = Block(torch.full((2, 3, 1), 2), 1, 32, 0), GroupTrellis([2])
    block.target, block.reference = torch.zeros_like(block.target), torch.zeros_like(block.reference)
    block.row_weight[1] = 0
    for codes in (None, torch.zeros_like(block.target)):
        got, expected = both(block, coder, codes, True, monkeypatch)
        for mine, other in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, other)


def test_whole_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Feedback and refinement with the kernel in place lose what they lose without, over several blocks of columns."""
    gen = seeded(0)
    w = torch.randn(1, 16, 36, generator=gen)
    x = torch.randn(1, 90, 36, generator=gen) + 0.5
    moment = rounding.damp_(x.mT @ x, 0.01)
    level = (2.0 ** torch.tensor([0.0, 2.0, 4.0]).repeat_interleave(torch.tensor([4, 20, 12])) - 1).view(1, 1, 36)
    step, rho = torch.ones(1, 1, 36), torch.rand(1, 16, generator=gen) + 0.1
    order, coder = level[:, 0].argsort(dim=1, stable=True), GroupTrellis([0, 2, 4])

    def passes() -> torch.Tensor:
        factor = rounding.feedback_factor(moment, order)
        codes, steps = rounding.round_with_feedback(w, factor, step, level, order, rho, coder)
        codes, steps = rounding.refine(w, moment, codes, steps, level, rho, coder)
        error = w - grid_values(codes, level) * steps.repeat_interleave(16, 1)
        return (rho[:, :, None] * error * (error @ moment)).sum((1, 2))

    expected = passes()
    monkeypatch.setattr(rounding, "_on_kernels", lambda _: True)
    torch.testing.assert_close(passes(), expected, rtol=2e-2, atol=0)


@pytest.mark.parametrize("side", ["in", "out"])
def test_columns_without_feedback_are_rounded_together(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`error_feedback: false`: no column moves another, and a launch takes a block of them."""
    widths, columns, rows = torch.tensor([[2, 0, 2]], dtype=torch.uint8, device="cpu"), 33, 48
    gen = seeded(4)
    w = torch.randn(1, rows, columns, generator=gen)
    coder: ColumnCoder
    if side == "in":
        drawn = torch.tensor([0, 2, 4])[torch.arange(columns) * 3 // columns]
        coder, level, weight = GroupTrellis([2, 4]), (2.0**drawn - 1)[None, None], torch.rand(1, rows, generator=gen)
        step = torch.ones(1, 3, columns)
    else:
        coder, weight = ChainTrellis(widths, 1, None, torch.rand(rows, generator=gen) + 0.1, 16), None
        level = (2.0 ** widths.to(DEVICE).repeat_interleave(16, 1) - 1)[:, :, None]
        step = storable_steps(torch.rand(1, rows, columns, generator=gen) + 0.5)
    expected = sides._columns(coder, w, step, level, weight)
    launches, block = [], coder.block

    def counted(target: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
        launches.append(target.shape[1])
        return block(target, *others)

    monkeypatch.setattr(coder, "block", counted)
    monkeypatch.setattr(rounding, "_on_kernels", lambda _: True)
    found = sides._columns(coder, w, step, level, weight)
    assert launches == [32, 1]
    alike = [(mine == other).all(1) for mine, other in zip(found, expected, strict=True)]
    assert float((alike[0] & alike[1]).float().mean()) > 0.9
    dropped = level.expand_as(w) == 0
    assert bool(dropped.any())
    assert not bool(found[0][dropped].any())
