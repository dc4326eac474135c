"""The fused rounding of a block of columns against `rounding.round_block`.

In float64 hardly a target lies so near the middle between two values that another order of a sum could tell them apart:
codes and steps are equal interpreted, whose sums have one order; compiled, one in a thousand may differ if what the
rows lose stays the same. In float32 one in thousands may differ.
"""

import pytest
import torch
from bitsmoe_kernels.rounding import round_block
from kernel_backend import COMPILED, seeded

from bitsmoe_modifier.method import rounding
from bitsmoe_modifier.storage.steps import storable_steps


@pytest.fixture(autouse=True)
def _oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel is compared with stays in PyTorch on a GPU too."""
    monkeypatch.setattr(rounding, "_on_kernels", lambda _: False)


class Block:
    """Random arguments: slices of larger tensors, as the two passes hand them over."""

    def __init__(self, count: int, columns: int, rows: int, groups: int, dtype: torch.dtype, seed: int) -> None:
        gen = seeded(seed)

        def part(*shape: int) -> torch.Tensor:
            """The middle of a tensor that is larger in every dimension but the last."""
            whole = torch.randn(shape[0], shape[1] + 5, shape[2], generator=gen, dtype=torch.float64)
            return whole[:, 2 : 2 + shape[1]].to(dtype)

        self.target, self.reference = part(count, columns, rows), part(count, columns, rows)
        self.response = 0.4 * part(count, columns, columns + 3)[:, :, 1 : 1 + columns]
        width = torch.tensor([0, 1, 2, 3, 4, 6])[torch.randint(6, (count, columns, 1), generator=gen)]
        self.level = (2.0**width - 1).to(dtype)
        spread = 0.7 + 0.6 * torch.rand(count, columns, groups, generator=gen)
        self.step = storable_steps(spread * 2.0 / self.level.clamp_min(1).float()).to(dtype)
        self.row_weight = (torch.rand(count, rows, generator=gen) + 0.05).to(dtype)
        self.codes = (torch.rand(count, columns, rows, generator=gen) * (self.level + 0.99)).floor().to(dtype)

    def run(self, function, refit: bool, before: bool):
        arguments = self.target.clone(), self.response, self.reference, self.step, self.level
        return function(*arguments, self.row_weight if refit else None, self.codes if before else None)

    def loss(self, found) -> torch.Tensor:
        """What the rows lose by their codes and steps: a sum of squares per matrix."""
        codes, step, _ = found
        values = step.repeat_interleave(codes.shape[2] // step.shape[2], 2) * (2 * codes - self.level)
        moved = self.target - self.response.triu(1).mT @ (values - self.reference)  # by the columns before
        return ((values - moved).square() * self.row_weight[:, None]).sum((1, 2))

    def both(self, refit: bool, before: bool):
        return self.run(round_block, refit, before), self.run(rounding.round_block, refit, before)


def assert_alike(block: Block, got, expected) -> None:
    """Equal codes, steps and changes; compiled, one in a thousand may differ at the same loss."""
    if COMPILED:
        for mine, other in zip(got, expected, strict=True):
            assert float(torch.isclose(mine, other, rtol=1e-9, atol=1e-12).double().mean()) > 0.999
        torch.testing.assert_close(block.loss(got), block.loss(expected), rtol=1e-6, atol=0)
    else:
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
        torch.testing.assert_close(got[2], expected[2])


@pytest.mark.parametrize("before", [False, True], ids=["nearest", "from codes"])
@pytest.mark.parametrize(("rows", "groups"), [(16, 1), (48, 2), (72, 3), (192, 1)], ids=str)
@pytest.mark.parametrize("columns", [1, 5, 32])
def test_refitted_steps(columns: int, rows: int, groups: int, before: bool) -> None:
    block = Block(3, columns, rows, groups, torch.float64, columns + rows)
    assert_alike(block, *block.both(True, before))


@pytest.mark.parametrize("groups", [1, 4, 200], ids=lambda g: f"{g} steps")
@pytest.mark.parametrize("rows", [200])
def test_kept_steps(rows: int, groups: int) -> None:
    block = Block(2, 7, rows, groups, torch.float64, groups)
    assert_alike(block, *block.both(False, False))


def test_levels_of_rows() -> None:
    """As the down projection's: each row of a level of its own, columns expanded."""
    block = Block(2, 6, 40, 40, torch.float64, 0)
    block.level = block.level[:, :1].mT.expand(-1, 40, 6).mT.contiguous()[:, :1].expand(-1, 6, -1)
    assert block.level.stride(1) == 0
    assert_alike(block, *block.both(False, False))


def test_targets_in_the_middle_and_zeros_round_alike() -> None:
    block = Block(1, 4, 32, 1, torch.float32, 0)
    block.target = torch.zeros_like(block.target)
    block.target[0, :, :16] = 2 * block.step[0, :, 0, None] * torch.arange(16)
    block.response = torch.zeros_like(block.response)
    got, expected = block.both(False, False)
    assert torch.equal(got[0], expected[0])


@pytest.mark.parametrize("refit", [False, True])
def test_float32(refit: bool) -> None:
    got, expected = Block(4, 32, 256, 2, torch.float32, 0).both(refit, refit)
    steps = [step.repeat_interleave(128, 2) for step in (got[1], expected[1])]
    alike = (got[0] == expected[0]) & (steps[0] == steps[1])
    assert float(alike.float().mean()) > 0.999
    assert torch.equal(got[2][alike], expected[2][alike]), "a change follows from code, step and reference"


def test_whole_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Feedback and refinement with the kernel in place give the codes and steps that they give without."""
    gen = seeded(0)
    w = torch.randn(2, 32, 40, generator=gen, dtype=torch.float64)
    x = torch.randn(2, 90, 40, generator=gen, dtype=torch.float64) + 0.5
    moment = rounding.damp_(x.mT @ x, 0.01)
    level = (2.0 ** torch.randint(0, 5, (2, 1, 40), generator=gen) - 1).double()
    step = storable_steps(torch.rand(2, 2, 40, generator=gen) + 0.1).double()
    order, rho = level[:, 0].argsort(dim=1, stable=True), torch.rand(2, 32, generator=gen, dtype=torch.float64) + 0.1

    def passes():
        found = rounding.round_with_feedback(w, rounding.feedback_factor(moment, order), step, level, order, rho)
        return rounding.refine(w, moment, *found, level, rho)

    expected = passes()
    monkeypatch.setattr(rounding, "_on_kernels", lambda _: True)
    for got, plain in zip(passes(), expected, strict=True):
        if COMPILED:
            assert float((got == plain).double().mean()) > 0.999
        else:
            assert torch.equal(got, plain)
