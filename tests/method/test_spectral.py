"""Shared bases: whitening, order, rounding and the exact refit to what was rounded."""

import pytest
import torch

from bitsmoe_modifier.errors import RecipeError
from bitsmoe_modifier.method import spectral
from bitsmoe_modifier.method.numerics import collected
from bitsmoe_modifier.method.spectral import (
    SharedBasis,
    input_directions,
    output_directions,
    refit_inverse,
    round_and_refit,
    round_basis,
    symmetric_sqrt,
)
from bitsmoe_modifier.storage.factors import decode_basis


def refit_with_notes(*args: object) -> tuple[SharedBasis, torch.Tensor, list[str]]:
    notes: list[str] = []
    with collected(notes):
        return (*round_and_refit(*args), notes)


def moment(n: int, *, condition: float = 1e3, rank: int | None = None, seed: int = 0) -> torch.Tensor:
    """A random positive (semi)definite matrix, float32."""
    gen = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=gen, dtype=torch.float64))
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), n, dtype=torch.float64)
    values[n if rank is None else rank :] = 0
    c = (q * values) @ q.T
    return ((c + c.T) / 2).float()


def weights(experts: int, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(experts, rows, columns, generator=torch.Generator().manual_seed(seed)) / columns**0.5


def importance(experts: int, rows: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(experts, rows, generator=torch.Generator().manual_seed(seed)) + 0.05


def off_diagonal(matrix: torch.Tensor) -> float:
    """Largest off-diagonal entry as a correlation."""
    scale = matrix.diagonal().sqrt()
    correlation = matrix / scale[:, None] / scale
    return float((correlation - torch.eye(len(matrix), dtype=matrix.dtype)).abs().max())


# --------------------------------------------------------------------------------------------- the directions


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_input_is_white_in_the_directions(condition: float) -> None:
    """B C Bᵀ is diagonal. B is rounded to float32: correlations of 2^-24 times the condition number of C remain."""
    c = moment(48, condition=condition)
    b = input_directions(c, weights(3, 40, 48), importance(3, 40), 48, dampening=0.0)
    assert b.dtype == torch.float32
    torch.testing.assert_close(b.norm(dim=1), torch.ones(48))
    assert off_diagonal(b.double() @ c.double() @ b.double().T) < max(1e-5, 2**-24 * condition)


def test_input_directions_decorrelate_the_experts_too() -> None:
    """A = W B⁻¹ has uncorrelated columns under rho: they are the eigenvectors that the method asks for, in order."""
    c, w, rho = moment(48), weights(4, 40, 48), importance(4, 40)
    b = input_directions(c, w, rho, 48, dampening=0.0).double()
    a = w.double() @ torch.linalg.inv(b)
    energy = torch.einsum("eir,ei,eis->rs", a, rho.double(), a)
    assert off_diagonal(energy) < 1e-3
    strength = energy.diagonal() * (b @ c.double() @ b.T).diagonal()
    assert bool((strength.diff() <= 1e-6 * strength[0]).all()), "strongest first"


def test_truncated_input_directions_are_the_first() -> None:
    c, w, rho = moment(32), weights(2, 20, 32), importance(2, 20)
    whole = input_directions(c, w, rho, 32, 0.01)
    assert torch.equal(input_directions(c, w, rho, 10, 0.01), whole[:10])


def test_no_fewer_directions_serve_the_outputs_better() -> None:
    """The first R directions lose the least weighted output error of any R: the theorem behind the choice of B."""
    c, w, rho, rank = moment(24), weights(3, 16, 24), importance(3, 16), 8

    def loss(b: torch.Tensor) -> float:
        inverse = refit_inverse(SharedBasis(16, b, None, b), c, "in")
        rest = w.double() - w.double() @ inverse @ b.double()
        return float(torch.einsum("eij,jk,eik,ei->", rest, c.double(), rest, rho.double()))

    best = loss(input_directions(c, w, rho, rank, dampening=0.0))
    gen = torch.Generator().manual_seed(0)
    for _ in range(20):
        assert best < loss(torch.randn(rank, 24, generator=gen))
    _, vectors = torch.linalg.eigh(c.double())
    assert best < loss(vectors.flip(1).T[:rank].float()), "better than the input's principal directions"


def test_output_directions_without_metric() -> None:
    z = moment(40)
    u = output_directions(z, 40).double()
    torch.testing.assert_close(u.T @ u, torch.eye(40, dtype=torch.float64), rtol=0, atol=1e-6)
    energy = u.T @ z.double() @ u
    assert off_diagonal(energy + 1e-9 * torch.eye(40)) < 2e-3
    assert bool((energy.diagonal().diff() <= 1e-6).all()), "strongest first"
    assert torch.equal(output_directions(z, 7), output_directions(z, 40)[:, :7])


def test_output_directions_with_metric_do_not_interact_in_the_loss() -> None:
    z, m = moment(32), moment(32, condition=10, seed=3)
    u = output_directions(z, 32, m).double()
    torch.testing.assert_close(u.norm(dim=0), torch.ones(32, dtype=torch.float64))
    # the metric's factor is damped by a hundredth of its mean
    assert off_diagonal(u.T @ (m.double() + 0.01 * m.diagonal().mean() * torch.eye(32)) @ u) < 1e-5


# ---------------------------------------------------------------------------------------------- square roots


@pytest.mark.parametrize("dampening", [0.0, 0.01, 1.0])
def test_square_root(dampening: float) -> None:
    c = moment(30).double()
    root, inverse = symmetric_sqrt(c, dampening)
    damped = c + dampening * c.diagonal().mean() * torch.eye(30)
    torch.testing.assert_close(root @ root.T, damped)
    torch.testing.assert_close(root @ inverse, torch.eye(30, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["rank-3", "slightly-negative", "zero", "one-dead-channel"])
def test_square_root_of_singular_moments(kind: str) -> None:
    dampening = 0.01
    c = {
        "rank-3": lambda: moment(20, rank=3),
        "slightly-negative": lambda: moment(20, rank=3) - 1e-7 * torch.eye(20),
        "zero": lambda: torch.zeros(20, 20),
        "one-dead-channel": lambda: moment(20) * (torch.arange(20) != 4) * (torch.arange(20) != 4)[:, None],
    }[kind]()
    root, inverse = symmetric_sqrt(c, dampening)
    assert bool(torch.isfinite(root).all() and torch.isfinite(inverse).all())
    torch.testing.assert_close(root @ inverse, torch.eye(20, dtype=torch.float64), rtol=0, atol=1e-6)
    b = input_directions(c, weights(2, 10, 20), importance(2, 10), 20, dampening)
    assert bool(torch.isfinite(b).all())
    torch.testing.assert_close(b.norm(dim=1), torch.ones(20))


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_fewer_tokens_than_channels(bits: int) -> None:
    """The common case of a short calibration: C has the rank of the tokens; the refit is exact nevertheless."""
    c, w = moment(64, rank=5), weights(2, 40, 64)
    b = input_directions(c, w, importance(2, 40), 64, dampening=0.01)
    basis, inverse = round_and_refit(b, bits, 16, c, "in")
    a = w.double() @ inverse
    torch.testing.assert_close(a.float() @ basis.matrix, w, rtol=0, atol=1e-4 * float(w.abs().max()))


# --------------------------------------------------------------------------------------- rounding and refit


@pytest.mark.parametrize("columns", [8, 24, 40, 128, 136])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_rounded_basis_is_what_is_stored(bits: int, columns: int) -> None:
    matrix = weights(1, 11, columns)[0]
    group = 8 if columns % 16 else 16
    basis = round_basis(matrix, bits, group)
    assert torch.equal(decode_basis(basis.stored, basis.step, bits, group), basis.matrix)
    assert basis.stored.nbytes == 11 * columns * bits // 8
    if bits == 16:
        assert basis.step is None
        assert basis.stored.dtype == torch.bfloat16
    else:
        assert basis.step.dtype == torch.float16
        assert basis.step.shape == (11, columns // group)
    # half a step of the covering grid, of the largest entry of a group; searching may clip, but only to do better
    worst = {4: 1 / 15, 8: 1 / 255, 16: 2**-8}[bits]
    error = (basis.matrix - matrix).view(11, -1, group).square().sum(-1)
    bound = (worst * matrix.view(11, -1, group).abs().amax(-1)).square() * group
    assert bool((error <= bound).all())


def test_groups_must_divide_the_columns() -> None:
    with pytest.raises(RecipeError, match="basis groups of 16 do not divide 24 columns; set basis_bits: 16"):
        round_basis(torch.eye(24), 4, 16)


@pytest.mark.parametrize("size", [24, 64, 128])
@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_refit_reproduces_the_weights(bits: int, side: str, size: int) -> None:
    """A square basis is a change of coordinates: W comes back to float error, at 4 bits too.

    Factors are rounded to float32 once (2^-24), the product of `size` terms once more; the change of coordinates
    multiplies that by the condition number, which is checked to be harmless.
    """
    w = weights(3, 40, size)
    if side == "in":
        matrix = input_directions(moment(size), w, importance(3, 40), size, 0.01)
    else:
        w = w.mT.contiguous()
        matrix = output_directions(moment(size), size)
    basis, inverse, warnings = refit_with_notes(matrix, bits, 8, moment(size), side)
    assert basis.bits == bits
    assert warnings == []
    condition = float(torch.linalg.cond(basis.matrix.double()))
    if side == "in":
        rebuilt = (w.double() @ inverse).float() @ basis.matrix
    else:
        rebuilt = basis.matrix @ (inverse @ w.double()).float()
    error = float((rebuilt - w).norm() / w.norm())
    assert error < 4 * 2**-24 * size**0.5 * condition
    assert error < 1e-4


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_truncated_input_refit_is_the_least_squares_fit(bits: int) -> None:
    """(W - A B̂) C B̂ᵀ = 0: no other A has a smaller error under C."""
    c, w = moment(32), weights(2, 20, 32)
    basis, inverse = round_and_refit(input_directions(c, w, importance(2, 20), 12, 0.01), bits, 8, c, "in")
    assert inverse.shape == (32, 12)
    b, wide = basis.matrix.double(), w.double()
    rest = wide - wide @ inverse @ b
    gradient = rest @ c.double() @ b.T
    assert float(gradient.abs().max()) < 1e-9 * float((wide @ c.double() @ b.T).abs().max())


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_truncated_output_refit_is_the_least_squares_fit(bits: int) -> None:
    w = weights(2, 32, 20)
    basis, inverse = round_and_refit(output_directions(moment(32), 16), bits, 8, None, "out")
    assert inverse.shape == (16, 32)
    u, wide = basis.matrix.double(), w.double()
    gradient = u.T @ (wide - u @ (inverse @ wide))
    assert float(gradient.abs().max()) < 1e-9


def nearly_equal_rows(size: int, distance: float) -> torch.Tensor:
    """Rows 0 and 1 differ by ``distance`` only: a coarse grid cannot tell them apart."""
    matrix = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(1)))[0]
    matrix[1] = matrix[0] + distance * matrix[1]
    return matrix / matrix.norm(dim=1, keepdim=True)


@pytest.mark.parametrize(("distance", "bits"), [(0.05, 4), (0.004, 8), (0.001, 16)])
def test_nearly_merged_directions_get_more_bits(distance: float, bits: int) -> None:
    """Two directions that a coarse grid nearly merges: the refit would lose digits."""
    matrix = nearly_equal_rows(32, distance)
    basis, inverse, warnings = refit_with_notes(matrix, 4, 8, moment(32), "in")
    assert basis.bits == bits
    if bits == 4:
        assert warnings == []
    else:
        assert warnings[0].startswith(f"the input basis at {bits // 2} bits has condition number ")
        assert warnings[0].endswith("using more bits for it, or set input_basis: none")
    torch.testing.assert_close(inverse @ basis.matrix.double(), torch.eye(32, dtype=torch.float64), rtol=0, atol=1e-6)


def test_exactly_singular_rounding_gets_more_bits() -> None:
    """Rows that round to the same codes and steps: the matrix has no inverse at all, at 8 bits it has one."""
    matrix = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))[0]
    matrix[:2] = 1
    matrix[:2, 5] = torch.tensor([0.04, 0.09])  # both are nearest to 1/15, the smallest value of a 4-bit grid
    coarse = round_basis(matrix, 4, 16)
    assert torch.equal(coarse.matrix[0], coarse.matrix[1]), "what this test is about"
    basis, _, warnings = refit_with_notes(matrix, 4, 16, None, "in")
    assert basis.bits == 8
    assert warnings[0].startswith("the input basis at 4 bits")


@pytest.mark.parametrize("side", ["in", "out"])
def test_hopeless_basis_is_an_error_with_a_remedy(side: str) -> None:
    matrix = torch.ones(16, 16)
    with pytest.raises(RecipeError, match=rf"the {side}put basis cannot be inverted .*; set {side}put_basis: none"):
        round_and_refit(matrix, 4, 16, None, side)


def test_orthogonal_bases_are_well_conditioned_at_every_size() -> None:
    """Real models have 2048 channels and more; what is measured must not grow with their number."""
    hadamard = torch.ones(1, 1)
    while len(hadamard) < 2048:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    basis, _, warnings = refit_with_notes(hadamard / 2048**0.5, 16, 16, None, "in")
    assert (basis.bits, warnings) == (16, [])


def test_refit_tolerance_is_float_error() -> None:
    """The bound on the condition number keeps the refit a hundred times below the coarsest useful rounding error."""
    assert spectral._REFIT_TOLERANCE <= 1e-4
