"""A layer's packed experts as vLLM's layer wants them: parameters, loading and forward."""

from typing import Any

import torch
import torch.nn.functional as F

from ..errors import CheckpointError
from ..runtime.experts import BitsMoEExperts
from ..storage.packed import PackedExperts
from .gating import gating_of_layer
from .loading import LayerLoader, Part, local_experts
from .vllm_api import (
    FusedMoEConfig,
    FusedMoEMethodBase,
    FusedMoEParallelConfig,
    RoutedExperts,
    direct_register_custom_op,
    get_current_vllm_config,
    get_forward_context,
)

#: Name under which the runtime module hangs below vLLM's layer.
_CHILD = "packed"

#: By which vLLM is told not to look for missing parameters.
_AS_IT_IS = """--model-loader-extra-config '{"enable_weights_track": false}'"""

#: Ways to exchange tokens between data-parallel ranks that leave expert ids as the router gave them.
_PLAIN_ALL2ALL = ("naive", "allgather_reducescatter")


class BitsMoEMethod(FusedMoEMethodBase):
    """Serves one layer from a `BitsMoEExperts` that holds this rank's part.

    Args:
        moe: vLLM's description of the layer.
        group_size: columns along I that share a step, for dummy experts.

    Attributes:
        missing: parameters of the whole model that no file held, see `divert`.
    """

    def __init__(self, moe: FusedMoEConfig, group_size: int) -> None:
        super().__init__(moe)
        self.group_size = group_size
        self.missing: frozenset[str] = frozenset()

    def maybe_roundup_sizes(
        self,
        hidden_size: int,
        intermediate_size_per_partition: int,
        act_dtype: torch.dtype,
        moe_parallel_config: FusedMoEParallelConfig,
    ) -> tuple[int, int]:
        """Our sizes are those of the checkpoint."""
        return hidden_size, intermediate_size_per_partition

    # ------------------------------------------------------------------------------------------------- loading

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Prepare for the layer's tensors; their sizes follow from the stored widths, so nothing is allocated yet."""
        moe, parallel = self.moe, self.moe.moe_parallel_config
        _check_parallel(parallel, layer.layer_name)
        if layer.apply_router_weight_on_input and moe.experts_per_token != 1:
            raise CheckpointError(
                f"{layer.layer_name}: routing weights on the input are defined for one expert per token, "
                f"not for {moe.experts_per_token}"
            )
        self.gating = gating_of_layer(moe, layer.layer_name)
        self.dtype = params_dtype
        self.device = torch.empty(0).device  # vLLM builds models under the device that weights are loaded to
        self.loader = LayerLoader(
            Part(
                where=layer.layer_name,
                num_experts=moe.num_experts,
                hidden_size=hidden_size,
                intermediate_size=moe.intermediate_size - (moe.intermediate_pad or 0),
                has_bias=moe.has_bias,
                ungated=not moe.is_act_and_mul,
                tp_rank=parallel.tp_rank,
                tp_size=parallel.tp_size,
                experts=local_experts(None if layer.expert_map is None else layer.expert_map.tolist()),
            )
        )
        vllm_config = get_current_vllm_config()
        self.eager = bool(vllm_config.model_config.enforce_eager)
        self.dummy = vllm_config.load_config.load_format == "dummy"
        extra = vllm_config.load_config.model_loader_extra_config
        self.complete = not isinstance(extra, dict) or extra.get("enable_weights_track") is not False
        self.model = ", ".join(vllm_config.model_config.architectures)

    def take(self, layer: RoutedExperts, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor of the checkpoint; the last one of the layer installs it."""
        if hasattr(layer, _CHILD):
            raise CheckpointError(
                f"{layer.layer_name}.{name}: the layer is complete without it; fetch the checkpoint again"
            )
        self.loader.add(name, tensor)
        if self.loader.complete:
            self._install(layer, self.loader.cut(self.device))

    def _install(self, layer: RoutedExperts, packed: PackedExperts) -> None:
        layer.add_module(_CHILD, BitsMoEExperts(packed, self.gating))

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Refuse a layer that did not get all its tensors; fill it where weights are to be made up.

        Raises:
            CheckpointError: naming the layer and the tensor that is missing, or the model if none ever arrived, or
                what is missing elsewhere in the model.
        """
        if self.missing and self.complete:
            raise CheckpointError(
                f"no file of the checkpoint holds what {self.model} has as {', '.join(sorted(self.missing))}; "
                f"fetch the checkpoint again, or, where the model does without, add {_AS_IT_IS}"
            )
        part, device = self.loader.part, self.moe.device
        if not hasattr(layer, _CHILD):
            if self.dummy:
                from .dummy import dummy_experts

                count = part.num_experts if part.experts is None else len(part.experts)
                intermediate = part.intermediate_size // part.tp_size
                packed = dummy_experts(
                    count, part.hidden_size, intermediate, self.group_size, part.has_bias, part.ungated
                )
                self._install(layer, packed.to(self.device))
            elif self.loader.empty:
                raise CheckpointError(
                    f"{part.where}: no tensor of its packed experts arrived, although config.json says that "
                    f"{self.model} has them there; fetch the checkpoint again"
                )
            else:
                self._install(layer, self.loader.cut(self.device))
        if torch.device(device).type == "cuda" and not self.eager:
            _check_kernels(getattr(layer, _CHILD), self.dtype, part.where)

    # ------------------------------------------------------------------------------------------------- forward

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        """vLLM's own kernels are not used."""

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """The routed experts' output ``[T, H]``, this rank's summand of it; vLLM runs shared experts and the sum."""
        return torch.ops.bitsmoe_vllm.experts(x, topk_weights, topk_ids, layer.layer_name)

    def run(
        self, layer: RoutedExperts, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> torch.Tensor:
        """What the custom op computes: x ``[T, H or wider]``, p and global expert ids ``[T, k]``."""
        experts: BitsMoEExperts = getattr(layer, _CHILD)
        ids = topk_ids
        if layer.expert_map is not None:  # the id of padding is -1, which must not be the last expert's
            ids = layer.expert_map[ids.clamp(min=0).long()].masked_fill(ids < 0, -1)
        padding = x.shape[1] - experts.hidden_dim
        if padding:
            x = x[:, : experts.hidden_dim]
        if layer.apply_router_weight_on_input:
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        y = experts(x, ids, topk_weights)
        return F.pad(y, (0, padding)) if padding else y


def _check_parallel(parallel: FusedMoEParallelConfig, where: str) -> None:
    if parallel.use_all2all_kernels and parallel.all2all_backend not in _PLAIN_ALL2ALL:
        raise CheckpointError(
            f"{where}: packed experts cannot exchange tokens through {parallel.all2all_backend!r}; "
            f"use --all2all-backend {_PLAIN_ALL2ALL[-1]}"
        )


def _check_kernels(experts: BitsMoEExperts, dtype: torch.dtype, where: str) -> None:
    """The plain path waits for the device, which a CUDA graph cannot capture."""
    from bitsmoe_kernels import unsupported

    reason = unsupported(experts.spec, dtype)
    if reason:
        raise CheckpointError(f"{where}: {reason}; run it in plain PyTorch with --enforce-eager")


# An opaque op: torch.compile must not trace the choice of experts, which depends on the data.


def _experts(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: str) -> torch.Tensor:
    layer = get_forward_context().no_compile_layers[layer_name].routed_experts
    return layer.quant_method.run(layer, x, topk_weights, topk_ids)


def _experts_fake(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: str) -> torch.Tensor:
    return torch.empty_like(x)


_LIBRARY = torch.library.Library("bitsmoe_vllm", "FRAGMENT")
direct_register_custom_op("experts", _experts, fake_impl=_experts_fake, target_lib=_LIBRARY)
