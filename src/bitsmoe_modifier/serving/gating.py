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


def gating_of_layer(moe: FusedMoEConfig, layer_name: str) -> Gating:
    """The function between gate/up and down of a vLLM layer.

    Raises:
        CheckpointError: when it is none that `Gating` can express.
    """
    limit, alpha, shift = moe.swiglu_limit, moe.swiglu_alpha, moe.swiglu_beta
    if moe.activation in _PLAIN:
        return Gating(_PLAIN[moe.activation], limit=limit, alpha=alpha or 1.0, up_shift=shift or 0.0)
    # the two differ in how a checkpoint orders gate and up rows; ours always stores gate before up
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
