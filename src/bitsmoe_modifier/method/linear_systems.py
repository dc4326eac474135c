"""Linear systems of many symmetric positive definite matrices at once.

The one place that solves batches. torch 2.13's batched LU (`torch.linalg.solve`, `inv`, `lu_solve` of a batch and their
``_ex`` forms) is broken on a CPU with two threads or more: MKL gets wrong pivots, and the call raises "Pivots given to
lu_solve must all be greater or equal to 1" at random. Cholesky has no pivots, and second moments allow it. Single
matrices are not affected.
"""

import torch


def solve_positive(matrices: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve ``matrices[n] @ x[n] = right[n]`` for every n.

    Args:
        matrices: float ``[N, I, I]``, symmetric positive definite.
        right: ``[N, I, K]`` of the same dtype.

    Returns:
        (x ``[N, I, K]``, bool ``[N]``: which of them are solutions. The others belong to matrices that are not positive
        definite in their dtype, or are not finite, and hold anything.)
    """
    factor, info = torch.linalg.cholesky_ex(matrices)
    solution = torch.cholesky_solve(right, factor)
    return solution, (info == 0) & torch.isfinite(solution).flatten(1).all(1)
