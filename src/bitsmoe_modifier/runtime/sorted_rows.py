"""Experts whose caller sorts the rows by expert and weighs them beforehand, as Llama 4's does.

Such a layer gets one tensor ``[E·T, H]``: all T tokens for expert 0, then all for expert 1, each row multiplied by its
routing weight. Rows of tokens that an expert was not chosen for are zero, and so is what gated experts without biases
make of them.
"""

import torch


def routing_of(rows: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The routing that stands in ``rows [E·T, H]``, in the terms of the common experts interface.

    Returns:
        (ids int64 ``[E·T, 1]``, weights ``[E·T, 1]`` in the dtype of ``rows``). A zero row gets the id E, which no
        expert has; the other weights are 1, because the caller has applied them.
    """
    ids = torch.arange(num_experts, device=rows.device).repeat_interleave(rows.shape[0] // num_experts)
    used = (rows != 0).any(dim=1)
    return torch.where(used, ids, num_experts)[:, None], used[:, None].to(rows.dtype)


def routed_rows(rows: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rows ``[n, H]``, ids ``[n, 1]``, weights ``[n, 1]``) of those rows that an expert was chosen for, by token."""
    ids, weights = routing_of(rows, num_experts)
    used = (ids[:, 0] < num_experts).view(num_experts, -1).T.nonzero()
    at = used[:, 1] * (len(rows) // num_experts) + used[:, 0]
    return rows[at], ids[at], weights[at]
