"""The fused rounding of a block of columns to trellis codes against `rounding.round_block` in PyTorch.

Sums have another order, so a target may differ in its last bit and a window next to a tie fall on either side: all but
one in some hundreds are equal, and what a matrix loses is.
"""

import pytest
import torch
from bitsmoe_kernels.trellis_rounding import round_groups
from kernel_backend import seeded

from bitsmoe_modifier.method import rounding
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

    def before(self, coder: rounding.ColumnCoder) -> torch.Tensor:
        """Windows of a target close by, as refinement has them."""
        near = self.target + 0.1 * torch.randn(self.target.shape, generator=seeded(1))
        return self.run(near, coder, None, True)[0]

    def run(
        self, target: torch.Tensor, coder: rounding.ColumnCoder, codes: torch.Tensor | None, weighted: bool
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
    block: Block, coder: rounding.ColumnCoder, codes: torch.Tensor | None, weighted: bool, patch: pytest.MonkeyPatch
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
    width = WIDTHS[drawn.sort(1).values].to(monkeypatch and torch.get_default_device())
    block, coder = Block(width, groups, rows, rows), GroupTrellis()
    codes = block.before(coder) if before else None
    assert_alike(block, *both(block, coder, codes, weighted, monkeypatch))
