"""The quantization method "bitsmoe" of vLLM: which checkpoints and layers are ours. Importing this registers it."""

import inspect
from typing import Any

import regex
import torch

from ..errors import CheckpointError
from ..loading.claims import METHOD, is_bitsmoe, matches, split_groups
from ..storage.packed import TENSOR_NAMES
from .method import BitsMoEMethod
from .vllm_api import (
    CompressedTensorsConfig,
    RoutedExperts,
    WeightsMapper,
    get_current_vllm_config,
    get_model_architecture,
    register_quantization_config,
)

# ``(?<!routed_)``: the mapping may be applied to names that it has changed already
_EXPERTS_TENSOR = regex.compile(r"(?<!routed_)experts\.(" + "|".join(TENSOR_NAMES) + r")$")


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
        if isinstance(layer, RoutedExperts) and matches(prefix, self.targets):
            check_model_class(get_model_architecture(get_current_vllm_config().model_config)[0])
            return BitsMoEMethod(layer.moe_config, self.group_size)
        return super().get_quant_method(layer, prefix)

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Point the stored names at the module that owns the experts: ``experts.NAME`` to
        ``experts.routed_experts.NAME``."""
        ours = WeightsMapper(orig_to_new_regex={_EXPERTS_TENSOR: r"experts.routed_experts.\1"})
        return CompressedTensorsConfig.get_checkpoint_weight_mapper() | ours


def check_model_class(model_class: type) -> None:
    """Refuse a model file that reads the checkpoint past vLLM's loader, which hands our tensors to the layer.

    Raises:
        CheckpointError: naming the class and its file.
    """
    for base in model_class.__mro__:
        own = inspect.unwrap(vars(base).get("load_weights", check_model_class))
        if "AutoWeightsLoader" in getattr(getattr(own, "__code__", None), "co_names", ()):
            return
    raise CheckpointError(
        f"{model_class.__name__} ({model_class.__module__}) reads its checkpoint without vLLM's AutoWeightsLoader, so "
        "packed experts cannot be handed to its layers; run this checkpoint with transformers"
    )
