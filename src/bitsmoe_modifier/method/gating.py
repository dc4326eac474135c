"""The elementwise function between an expert's input projections and its down projection.

Every gated MoE family computes ``z = act(gate) * up`` up to clamps and constants; `Gating` is that function with its
constants as plain values, so that calibration, the plain forward, the kernels and vLLM share one definition.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import RecipeError

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda g: F.relu(g).square(),
}


@dataclass(frozen=True)
class Gating:
    """``z = act(min(gate, limit)) * (clamp(up, -limit, limit) + up_shift)``, or ``min(act(gate), limit) * …``.

    Attributes:
        activation: "silu", "gelu", "gelu_tanh", "relu" or "relu2" (its square).
        limit: clamp of both inputs; None for none.
        alpha: slope inside the sigmoid of "silu": ``act(g) = g * sigmoid(alpha * g)`` (1.702 in gpt-oss).
        up_shift: added to ``up`` (1 in gpt-oss).
        late_limit: whether the gate is clamped after its activation (Step 3.7).
    """

    activation: str = "silu"
    limit: float | None = None
    alpha: float = 1.0
    up_shift: float = 0.0
    late_limit: bool = False

    def __post_init__(self) -> None:
        if self.activation not in _ACTIVATIONS:
            raise RecipeError(f"activation {self.activation!r} is not supported; known: {sorted(_ACTIVATIONS)}")
        if self.alpha != 1.0 and self.activation != "silu":
            raise RecipeError(f"alpha is defined for silu only, not for {self.activation!r}")
        if self.late_limit and (self.activation != "silu" or self.limit is None or self.alpha != 1.0):
            raise RecipeError("late_limit is defined for silu with a limit and without alpha only")

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Apply elementwise to ``gate`` and ``up`` of one shape; differentiable, same dtype out."""
        if self.limit is not None:
            gate = gate if self.late_limit else gate.clamp(max=self.limit)
            up = up.clamp(min=-self.limit, max=self.limit)
        act = gate * torch.sigmoid(self.alpha * gate) if self.alpha != 1.0 else _ACTIVATIONS[self.activation](gate)
        if self.late_limit and self.limit is not None:
            act = act.clamp(max=self.limit)
        return act * (up + self.up_shift) if self.up_shift else act * up


def gating_of(experts: nn.Module) -> Gating:
    """Read the gating of an experts module: transformers' (fused or a list of MLPs) or llm-compressor's linear one.

    The class's own ``_apply_gate`` is evaluated on probe values and compared with the candidates built from the
    module's attributes, so that a family with another formula is refused instead of quantized wrongly.

    Raises:
        RecipeError: naming the class, when the activation or the formula is unknown.
    """
    name = type(experts).__name__
    owner = experts[0] if isinstance(experts, nn.ModuleList) and not hasattr(experts, "act_fn") else experts
    act_fn = getattr(owner, "act_fn", getattr(owner, "activation_fn", None))
    activation, place = ("", torch.device("cpu")) if act_fn is None else _activation_of(act_fn)
    limit = getattr(experts, "limit", None) or getattr(experts, "swiglu_limit", None)
    if limit is not None and math.isinf(limit):
        limit = None
    alpha = getattr(experts, "alpha", None) or getattr(experts, "swiglu_alpha", None)
    if getattr(experts, "has_gate", True) is False:
        if activation:
            return Gating(activation, up_shift=1.0)  # up is zero
        raise RecipeError(f"the experts class {name} has an activation that this version does not know: {act_fn}")
    candidates = [Gating(activation)] if activation else []
    if limit is not None:
        candidates += [Gating(activation or "silu", limit=float(limit))]
        candidates += [Gating("silu", limit=float(limit), late_limit=True)]
        if alpha is not None:
            candidates += [Gating("silu", limit=float(limit), alpha=float(alpha), up_shift=1.0)]
    values = _probe_values(limit)
    reference = _probe(experts, *(v.to(place) for v in values))
    for gating in candidates:
        if reference is None or torch.allclose(gating(*values), reference, rtol=1e-5, atol=1e-6):
            return gating
    raise RecipeError(
        f"the experts class {name} combines gate and up in a way this version does not know "
        f"(activation {getattr(act_fn, '__name__', type(act_fn).__name__)}, limit {limit}, alpha {alpha}); "
        "add its modules to `ignore`"
    )


def _activation_of(act_fn: Callable[[torch.Tensor], torch.Tensor]) -> tuple[str, torch.device]:
    """Name of the known activation with the values of ``act_fn`` (a module or a function), "" where there is none; and
    the device on which it gives them: calibration lets every module of a model move its inputs to the GPU."""
    gate, _ = _probe_values()
    try:
        values = act_fn(gate)
    except TypeError:  # a function of gate and up at once (Inkling 2): the class's own formula decides
        return "", gate.device
    found = (name for name, known in _ACTIVATIONS.items() if torch.allclose(values.cpu(), known(gate), 1e-5, 1e-6))
    return next(found, ""), values.device


def _probe_values(limit: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of gate and up on which formulas are told apart: on both sides of the clamp, where there is one."""
    reach = 9.0 if limit is None else max(9.0, 1.5 * float(limit))
    gate = torch.linspace(-reach, reach, 37, dtype=torch.float32, device="cpu")
    return gate, torch.linspace(reach - 0.5, 1.0 - reach, 37, dtype=torch.float32, device="cpu")


def _probe(experts: nn.Module, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor | None:
    """The class's own formula on these values, on the CPU; None where it defines none (plain ``act(gate) * up``)."""
    apply_gate = getattr(experts, "_apply_gate", None)
    if apply_gate is None:
        return None
    # llm-compressor's linearized experts (a ModuleList) always hand over halves, also for interleaved families
    interleaved = not getattr(experts, "is_concatenated", True) and not isinstance(experts, nn.ModuleList)
    return apply_gate(torch.stack([gate, up], -1).flatten() if interleaved else torch.cat([gate, up])).cpu()
