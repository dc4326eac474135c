"""Pairs of a token and an expert it chose, brought together by expert."""

import torch


def in_turn(spans: dict[int, slice]) -> tuple[list[int], list[int]]:
    """The expert and the position of every pair in the given spans."""
    experts = [e for e, span in spans.items() for _ in range(span.start, span.stop)]
    return experts, [row for span in spans.values() for row in range(span.start, span.stop)]


def group_by_expert(top_k_index: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, dict[int, slice]]:
    """Sort the (token, choice) pairs by expert.

    Returns:
        Positions in the flattened ``[T, k]``, ascending within an expert, without ids outside ``[0, E)``; and the part
        of them that belongs to each expert that has any.
    """
    ids = top_k_index.flatten()
    ids = torch.where((ids < 0) | (ids >= num_experts), num_experts, ids)
    pairs = torch.argsort(ids, stable=True)
    spans, start = {}, 0
    for e, count in enumerate(torch.bincount(ids, minlength=num_experts + 1)[:num_experts].tolist()):
        if count:
            spans[e] = slice(start, start + count)
            start += count
    return pairs[:start], spans
