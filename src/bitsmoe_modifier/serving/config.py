"""The quantization method "bitsmoe" of vLLM: which checkpoints and layers are ours. Importing this registers it."""

from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..loading.claims import METHOD, is_bitsmoe, is_packed, split_groups
from .diversion import divert
from .method import BitsMoEMethod
from .vllm_api import (
    CompressedTensorsConfig,
    ModelRegistry,
    RoutedExperts,
    get_current_vllm_config,
    get_model_architecture,
    register_quantization_config,
)


@register_quantization_config(METHOD)
class BitsMoEConfig(CompressedTensorsConfig):
    """compressed-tensors as vLLM knows it, with our config groups taken out and served by `BitsMoEMethod`.

    Attributes:
        targets: names and regular expressions of the layers whose experts are packed.
        group_size: columns along I that share a step, for dummy experts; the stored layout says it for real ones.
    """

    targets: tuple[str, ...] = ()
    group_size: int = 128

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> Any:
        """Claim checkpoints that have a config group in our format, alone or beside others."""
        return METHOD if is_bitsmoe(hf_quant_cfg) else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "BitsMoEConfig":
        """Read config.json's ``quantization_config``; what is not ours goes to the base class."""
        ours, others = split_groups(config)
        made: Any = super().from_config({**config, "config_groups": others})
        made.targets = tuple(target for group in ours.values() for target in group["targets"])
        sizes = [size for group in ours.values() if (size := (group.get("weights") or {}).get("group_size"))]
        made.group_size = sizes[0] if sizes else cls.group_size
        return made

    def get_name(self) -> Any:
        """The method's name."""
        return METHOD

    @classmethod
    def get_min_capability(cls) -> int:
        """The kernels use bfloat16 tensor cores."""
        return 80

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Ours for the experts that config.json names, compressed-tensors' for everything else."""
        if isinstance(layer, RoutedExperts) and is_packed(prefix, self.targets):
            vllm_config = get_current_vllm_config()
            for model_class in _model_classes(vllm_config.model_config):
                divert(model_class, BitsMoEMethod)
            # built after this model, of the same files, and with this model as the current one
            draft = getattr(vllm_config.speculative_config, "draft_model_config", None)
            for model_class in _model_classes(draft) if draft else ():
                divert(model_class, BitsMoEMethod, is_draft=True)
            return BitsMoEMethod(layer.moe_config, self.group_size)
        return super().get_quant_method(layer, prefix)


def _model_classes(model_config: Any) -> list[type]:
    """The class that a configuration names, and that of its model type where vLLM has one.

    They differ where a wrapper builds its language model under another's name: Llama 4's says "LlamaForCausalLM".
    """
    classes = [get_model_architecture(model_config)[0]]
    own = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_config.hf_config.model_type)
    if own in ModelRegistry.get_supported_archs():
        classes.append(ModelRegistry.resolve_model_cls(own, model_config)[0])
    return classes
