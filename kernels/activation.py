"""The gate inside a kernel: `bitsmoe_modifier.method.gating.Gating` on float32 registers."""

import triton
import triton.language as tl

from bitsmoe_modifier.method.gating import Gating


@triton.jit
def gate_value(g, u, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, SHIFT: tl.constexpr):
    """``z = act(min(g, LIMIT)) * (clamp(u, -LIMIT, LIMIT) + SHIFT)``, float32; LIMIT None: no clamps.

    "silu_late" clamps the gate after its activation. "relu2" is the square of "relu".
    """
    if LIMIT is not None:
        if ACTIVATION != "silu_late":
            g = tl.minimum(g, LIMIT)
        u = tl.maximum(tl.minimum(u, LIMIT), -LIMIT)
    if ACTIVATION == "silu_late":
        act = tl.minimum(g * tl.sigmoid(g), LIMIT)
    elif ACTIVATION == "relu2":
        act = tl.maximum(g, 0.0)
        act = act * act
    elif ACTIVATION == "silu":
        act = g * tl.sigmoid(g * ALPHA)
    elif ACTIVATION == "gelu":
        act = 0.5 * g * (1 + tl.erf(g * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(v)) / 2 = sigmoid(2 v), v = sqrt(2 / pi) (g + 0.044715 g^3)
        act = g * tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
    else:
        tl.static_assert(ACTIVATION == "relu")
        act = tl.maximum(g, 0.0)
    return act * (u + SHIFT)


def gating_arguments(gating: Gating) -> tuple[str, float | None, float, float]:
    """The constants of a gating in the order that the custom ops take them."""
    activation = f"{gating.activation}_late" if gating.late_limit else gating.activation
    return activation, gating.limit, gating.alpha, gating.up_shift
