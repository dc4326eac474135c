"""vLLM's activation settings of a layer as a `Gating`."""

from ..errors import CheckpointError
from ..method.gating import Gating
from .vllm_api import FusedMoEConfig, MoEActivation

# of gpt-oss, which vLLM's "swigluoai" implies where the model does not set its own
_OAI_LIMIT, _OAI_ALPHA, _OAI_SHIFT = 7.0, 1.702, 1.0

_PLAIN = {
    MoEActivation.SILU: "silu",
    MoEActivation.GELU: "gelu",
    MoEActivation.GELU_TANH: "gelu_tanh",
}
# of experts without a gate: up is zero in their stored layout, so the constant makes it 1
_UNGATED = {
    MoEActivation.SILU_NO_MUL: "silu",
    MoEActivation.GELU_NO_MUL: "gelu",
    MoEActivation.GELU_TANH_NO_MUL: "gelu_tanh",
    MoEActivation.RELU2_NO_MUL: "relu2",
}
# of Step 3.7, the one limit that vLLM's "swiglustep" knows
_STEP_LIMIT = 7.0


def gating_of_layer(moe: FusedMoEConfig, layer_name: str) -> Gating:
    """The function between gate/up and down of a vLLM layer.

    Raises:
        CheckpointError: when it is none that `Gating` can express.
    """
    limit, alpha, shift = moe.swiglu_limit, moe.swiglu_alpha, moe.swiglu_beta
    if moe.activation in _PLAIN:
        return Gating(_PLAIN[moe.activation], limit=limit, alpha=alpha or 1.0, up_shift=shift or 0.0)
    if moe.activation in _UNGATED:
        return Gating(_UNGATED[moe.activation], up_shift=1.0)
    if moe.activation is MoEActivation.SWIGLUSTEP:
        return Gating("silu", limit=limit or _STEP_LIMIT, late_limit=True)
    # the next two differ in how a checkpoint orders gate and up rows; ours always stores gate before up
    if moe.activation is MoEActivation.SWIGLUOAI:
        return Gating("silu", limit=limit or _OAI_LIMIT, alpha=alpha or _OAI_ALPHA, up_shift=_given(shift, _OAI_SHIFT))
    if moe.activation is MoEActivation.SWIGLUOAI_UNINTERLEAVE:
        return Gating("silu", limit=limit, alpha=alpha or 1.0, up_shift=shift or 0.0)
    raise CheckpointError(
        f"{layer_name}: experts with the activation {moe.activation.value!r} cannot be packed as bitsmoe; "
        "config.json and the files do not belong together"
    )


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
