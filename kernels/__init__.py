"""Triton kernels for the stored layout of BitsMoE experts, each with a plain fp32 oracle beside it (docs/kernels.md).

The stable surface, for callers that dispatch by device:

    reason = unsupported(layout, dtype)          # "" or why these kernels cannot run it (then use the plain path)
    experts = prepare(packed)                    # once after loading, on the tensors' device; reads a few sizes back
    y = moe_forward(x, top_k_index, top_k_weights, experts, gating)

``x`` is ``[T, H]`` fp16 or bf16, ``top_k_index`` ``[T, k]`` of any integer dtype, ``top_k_weights`` ``[T, k]`` of any
float dtype; ``y`` is ``[T, H]`` of ``x``'s dtype. Ids outside ``[0, E)`` contribute nothing (expert parallelism maps
experts of other ranks to -1). The forward never waits for the device and can be captured in a CUDA graph.

Importing this package does not import triton; `moe_forward` does, at its first use.
"""

from .prepare import PreparedExperts, PreparedSide, prepare, unsupported


def __getattr__(name: str) -> object:
    """Load what needs triton at its first use only."""
    if name == "moe_forward":
        from .forward import moe_forward

        return moe_forward
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["PreparedExperts", "PreparedSide", "moe_forward", "prepare", "unsupported"]
