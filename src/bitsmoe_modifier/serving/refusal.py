"""Refusing bitsmoe checkpoints where vLLM's version is not supported."""

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from ..loading.claims import METHOD, is_bitsmoe


def refuse_checkpoints(reason: str) -> None:
    """Register a quantization method that raises ``reason`` for our checkpoints and leaves all others alone.

    This uses the one interface for custom methods that vLLM has kept over its releases.
    """
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    def override_quantization_method(cls: type, hf_quant_cfg: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        if is_bitsmoe(hf_quant_cfg):
            raise CheckpointError(f"this checkpoint's experts are packed as {METHOD}: {reason}")

    refusing = type(
        "RefusedBitsMoEConfig",
        (QuantizationConfig,),
        {"override_quantization_method": classmethod(override_quantization_method)},
    )
    register_quantization_config(METHOD)(refusing)
