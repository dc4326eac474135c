"""Experts modules of transformers, taken apart into Linears as llm-compressor calibrates them.

llm-compressor 0.14 takes every class that carries transformers' experts decorator. Beside those there are classes that
compute exactly the same without the decorator (Step 3.7's); here they are taken too. Sizes, clamps and slopes are the
module's own: llm-compressor reads them from the configuration, under names that not every family has, and where one
number stands for all layers.
"""

import copy
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from compressed_tensors.offload import disable_onloading
from llmcompressor.modeling.moe.helpers import get_use_experts_implementation_args
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.linearize import get_non_linearized_moes
from llmcompressor.modeling.moe.llama4 import Llama4LinearExperts
from torch import nn

from ..sources.stacks import StoredStack, stored_parameters
from .stored_experts import take_apart

#: what transformers calls an experts module with
_INTERFACE = ["self", "hidden_states", "top_k_index", "top_k_weights"]
#: what an experts module holds: tensors, or those of a source in low precision that stay in its files
_WEIGHTS = (nn.Parameter, StoredStack)
_PLAIN = {"is_concatenated": True, "is_transposed": False, "has_bias": False, "has_gate": True}


def experts_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of the routed experts of a model as transformers builds it, on any device."""
    for module in model.modules():
        kind = type(module)
        if LinearExperts2D.get_registration(kind) is not None:
            continue
        if _is_plain(module):
            namespace = {**_PLAIN, "_apply_gate": kind._apply_gate}  # type: ignore[attr-defined]
            LinearExperts2D._registry[kind] = type("LinearExperts2D", (LinearExperts2D,), namespace)
        elif stored_parameters(module) and get_use_experts_implementation_args(kind):
            LinearExperts2D.get_linear_experts_cls(cast(Any, kind))  # which it knows by parameters that are no files
    return get_non_linearized_moes(model)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module has fused experts in rows of gate before rows of up, the interface, and a formula of its own."""
    gate_up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if not isinstance(gate_up, _WEIGHTS) or not isinstance(down, _WEIGHTS) or len(gate_up.shape) != 3:
        return False
    return (
        gate_up.shape[0] == down.shape[0] == getattr(module, "num_experts", None)
        and gate_up.shape[1:] == (2 * down.shape[2], down.shape[1])
        and hasattr(module, "_apply_gate")
        and list(inspect.signature(type(module).forward).parameters) == _INTERFACE
    )


def linearize(model: nn.Module) -> nn.Module:
    """What llm-compressor's `linearize_moe` does, with one layer's experts in memory twice instead of all."""
    for name in [name for name, _ in experts_modules(model)]:
        model.set_submodule(name, _taken_apart(model.get_submodule(name), model))
    return model


def _taken_apart(experts: Any, model: Any) -> LinearExperts2D:
    kind = LinearExperts2D.get_linear_experts_cls(type(experts))
    config = getattr(experts, "config", None) or model.config
    if issubclass(kind, Llama4LinearExperts):  # takes the wrapper's configuration, and has all it needs
        return kind.from_experts_module(experts, config)
    for attribute in _PLAIN:  # the decorator sets them
        if not hasattr(experts, attribute):
            setattr(experts, attribute, getattr(kind, attribute))
    sized: Any = _Sized(config.get_text_config(), experts, kind)
    if stored_parameters(experts):
        made: Any = take_apart(experts, kind, sized)
    else:
        made = kind.from_experts_module(experts, sized)
        made._source_experts_cls, made._source_config = _rebuilder(experts), config
    for name, value in vars(experts).items():
        if isinstance(value, float):
            setattr(made, name, value)
    if kind.has_gate and hasattr(experts, "act_fn"):
        made.act_fn = experts.act_fn if isinstance(experts.act_fn, nn.Module) else _Activation(experts.act_fn)
    return made


class _Activation(nn.Module):
    """A function as a module: LFM2's experts have one, llm-compressor's want the other."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class _Sized:
    """A family's configuration with an experts module's sizes in the places where llm-compressor looks for them."""

    def __init__(self, config: Any, experts: Any, kind: type[LinearExperts2D]) -> None:
        with disable_onloading():
            down = experts.down_proj
            num_experts, hidden, width = down.shape
        if kind.is_transposed:
            hidden, width = width, hidden
        self._config = config
        self.num_local_experts = num_experts
        self.moe_latent_size = self.hidden_size = hidden
        self.moe_intermediate_size = width
        self.use_bias = kind.has_bias
        self.top_k_experts = 1  # of no consequence to the module
        self.dtype = down.dtype
        self.hidden_act = next(
            (a for key in ("hidden_act", "hidden_activation", "mlp_hidden_act") if (a := getattr(config, key, None))),
            "silu",
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _rebuilder(experts: Any) -> Callable[[Any], nn.Module]:
    """What makes an empty module of the same kind, with everything that the module got beside its configuration."""
    skeleton = copy.copy(experts)
    with disable_onloading():
        own = dict(experts.named_parameters(recurse=False))
    skeleton._parameters = {
        name: nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for name, parameter in own.items()
    }
    return lambda config: copy.deepcopy(skeleton).to_empty(device="cpu")
