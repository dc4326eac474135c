"""Batches of linear systems, and what rests on them, with one thread and with several."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_quantize import make_layer

from bitsmoe_modifier.method.layer import QuantizerSettings
from bitsmoe_modifier.method.linear_systems import solve_positive

PACKAGE = Path(__file__).parents[2] / "src" / "bitsmoe_modifier"
#: With batches of these torch 2.13 fails at random on a CPU; `method/linear_systems.py` is the remedy.
BROKEN = {"solve", "solve_ex", "inv", "inv_ex", "lu", "lu_solve", "lu_factor", "lu_factor_ex", "tensorsolve"}
#: Calls of single matrices, by file.
SINGLE = {"method/spectral.py": {"solve_ex", "inv_ex"}}


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 4], indirect=True)
@pytest.mark.parametrize(("count", "size"), [(4, 256), (64, 16)])
def test_batches_are_solved(threads: int, count: int, size: int) -> None:
    """The sizes with which torch's batched LU raises; against the same systems one by one in float64."""
    gen = torch.Generator().manual_seed(0)
    root = torch.randn(count, size, 2 * size, generator=gen)
    matrices = root @ root.mT / (2 * size) + 0.1 * torch.eye(size)
    right = torch.randn(count, size, size, generator=gen)
    found, usable = solve_positive(matrices, right)
    assert bool(usable.all())
    for at in (0, count - 1):
        exact = torch.linalg.solve(matrices[at].double(), right[at].double())
        torch.testing.assert_close(found[at].double(), exact, rtol=1e-3, atol=1e-4)


def test_what_is_not_positive_is_told() -> None:
    good = torch.eye(8)
    matrices = torch.stack([good, -good, torch.zeros(8, 8), torch.full((8, 8), torch.nan), good])
    found, usable = solve_positive(matrices, torch.ones(5, 8, 2))
    assert usable.tolist() == [True, False, False, False, True]
    assert torch.equal(found[[0, 4]], torch.ones(2, 8, 2))


@pytest.mark.parametrize("threads", [2, 4], indirect=True)
def test_a_layer_is_rounded_alike_with_any_number_of_threads(threads: int) -> None:
    """The whole way from statistics to stored tensors, with a batch of the size that failed."""
    layer = make_layer(num_experts=2, hidden=32, width=256, tokens=128)
    settings = QuantizerSettings(bits=2, group_size=64, refine_passes=0)
    several = layer.relative_error(layer.run(settings)[0])
    torch.set_num_threads(1)
    one = layer.relative_error(layer.run(settings)[0])
    # sums come in another order, and near a rounding boundary a code may become its neighbour
    assert several == pytest.approx(one, rel=1e-3)


def test_no_other_call_of_the_broken_kind() -> None:
    """A batch that is solved elsewhere would bring the crash back; single matrices are listed by name."""
    for file in PACKAGE.rglob("*.py"):
        name = file.relative_to(PACKAGE).as_posix()
        calls = {
            node.func.attr
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and ast.unparse(node.func.value) in ("torch.linalg", "torch", "linalg")
        }
        assert calls & BROKEN <= SINGLE.get(name, set()), name
