"""A gradient for what computes without one: the Triton kernels, of which autograd sees the result only.

Packed experts are constant, but what flows through them is not: adapters are trained on the attention before them.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch.autograd.function import FunctionCtx, once_differentiable

#: x ``[T, H]``, expert ids ``[T, k]``, p ``[T, k]`` to y ``[T, H]``
Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def with_gradient(run: Forward, plain: Forward, x: torch.Tensor, ids: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """``run(x, ids, p)``, with the gradient of ``plain``, which computes the same and is run where there is one.

    Args:
        run: without a gradient.
        plain: differentiable in x and p.
        x, ids, p: as `BitsMoEExperts.forward` takes them.
    """
    if torch.is_grad_enabled() and (x.requires_grad or p.requires_grad):
        return cast(torch.Tensor, _Recomputed.apply(run, plain, x, ids, p))
    return run(x, ids, p)


class _Recomputed(torch.autograd.Function):
    """`run` forward; backward, `plain` once more and through it."""

    @staticmethod
    def forward(
        ctx: Any, run: Forward, plain: Forward, x: torch.Tensor, ids: torch.Tensor, p: torch.Tensor
    ) -> torch.Tensor:
        """Keeps the inputs, which is less than what `plain` would keep."""
        ctx.plain = plain
        ctx.save_for_backward(x, ids, p)
        return run(x, ids, p)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *gradients: torch.Tensor) -> Any:
        """Gradients of x and p, of those that are wanted."""
        known: Any = ctx
        x, ids, p = known.saved_tensors
        wanted = known.needs_input_grad[2], known.needs_input_grad[4]
        with torch.enable_grad():
            x, p = (t.detach().requires_grad_(want) for t, want in zip((x, p), wanted, strict=True))
            y = known.plain(x, ids, p)
        inputs = [t for t, want in zip((x, p), wanted, strict=True) if want]
        found = iter(torch.autograd.grad(y, inputs, gradients[0], allow_unused=True))
        of_x, of_p = (next(found) if want else None for want in wanted)
        return None, None, of_x, None, of_p
