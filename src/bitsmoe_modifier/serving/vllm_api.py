"""Every name that the plugin takes from vLLM: the one module to read when a release moves something.

Besides these names the plugin relies on, as of vLLM 0.32:

- `RoutedExperts` is the module that owns a layer's experts; it asks ``quant_config.get_quant_method`` for its method,
  calls its ``create_weights`` from ``__init__`` and its ``apply`` from ``forward_modular``. Attributes read:
  ``layer_name``, ``moe_config``, ``expert_map``, ``activation``, ``apply_router_weight_on_input``.
- Every loader calls ``load_weights`` of the model's outermost class with an iterator of names and tensors.
- ``ForwardContext.no_compile_layers`` maps a layer's name to its ``MoERunner``.
"""

from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.model_loader import get_model_architecture
from vllm.model_executor.models import ModelRegistry
from vllm.utils.torch_utils import direct_register_custom_op

__all__ = [
    "BaseKVCacheMethod",
    "CompressedTensorsConfig",
    "FusedMoEConfig",
    "FusedMoEMethodBase",
    "FusedMoEParallelConfig",
    "MoEActivation",
    "ModelRegistry",
    "RoutedExperts",
    "direct_register_custom_op",
    "get_current_vllm_config",
    "get_forward_context",
    "get_model_architecture",
    "register_quantization_config",
]
