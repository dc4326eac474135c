"""Layers for multi-token prediction (MTP) that have routed experts: found in a source, built and run beside the model.

transformers has no module for them. What they compute is published with DeepSeek-V3 (arXiv 2412.19437, section 2.2) and
is the same in all families read here: a decoder layer like those of the model, on

    x_t = W [norm_e(E(token t+1)), norm_h(h_t)]

E the model's embedding, h_t its last hidden state, after the final norm, as vLLM hands it on; of a further such layer,
what the one before it gives. Two spellings are known: ``eh_proj``, ``enorm``, ``hnorm`` in the layer itself, a decoder
layer beyond the last (DeepSeek-V3, GLM-4.x), and ``mtp.fc``, ``mtp.pre_fc_norm_embedding``, ``mtp.pre_fc_norm_hidden``
before ``mtp.layers.0`` (Qwen3-Next, Qwen3.5).
"""

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import RecipeError
from ..loading.inventory import Inventory
from ..storage.shards import Stored

_EXPERT = re.compile(
    r"(?P<layer>.*layers[.]\d+)[.](?P<experts>(?:.*[.])?experts)[.]"
    r"(?:(?P<number>\d+)[.](?:gate|up|down)_proj[.]weight|(?:gate_up|down)_proj)$"
)
#: of the layer's own tensors, those that only predict tokens: shared with the model, or of no matter to its experts
_OF_THE_HEAD = ("embed_tokens.", "shared_head.")


@dataclass(frozen=True)
class MtpLayer:
    """One such layer in a source.

    Attributes:
        name: prefix of its tensors.
        experts: name of its experts module, ``NAME.mlp.experts``.
        stored_experts: its experts' tensors, by their keys in the source.
        fused: whether these are two tensors for all experts, not three per expert.
        embedding_norm, hidden_norm, projection: tensors that make its input.
        others: its remaining tensors, by their names in the layer.
    """

    name: str
    experts: str
    stored_experts: Mapping[str, Stored]
    fused: bool
    embedding_norm: Stored
    hidden_norm: Stored
    projection: Stored
    others: Mapping[str, Stored]

    @property
    def num_experts(self) -> int:
        """E."""
        if self.fused:
            return next(iter(self.stored_experts.values())).shape[0]
        numbers = (key.removeprefix(f"{self.experts}.").partition(".")[0] for key in self.stored_experts)
        return 1 + max(int(number) for number in numbers)

    @property
    def sizes(self) -> tuple[int, int]:
        """(H, I)."""
        down = next(stored for key, stored in self.stored_experts.items() if "down_proj" in key)
        return down.shape[-2], down.shape[-1]


def find_mtp_layers(inventory: Inventory) -> list[MtpLayer]:
    """The MTP layers with routed experts of a source, in their order.

    Raises:
        RecipeError: when there are some that are not named as this module knows, naming a tensor.
    """
    experts: dict[tuple[str, str], list[tuple[str, bool]]] = defaultdict(list)
    for key in sorted(inventory.mtp):
        match = _EXPERT.match(key)
        if match:
            experts[match["layer"], match["experts"]].append((key, match["number"] is None))
    routed = (key for key in inventory.mtp if ".experts." in key)
    loose = [key for key in routed if not _EXPERT.match(key)]
    if loose:
        raise RecipeError(
            f"mtp: quantize does not know experts that are named like {min(loose)}; use mtp: keep, which stores them "
            "as they are"
        )
    ordered = sorted(experts, key=lambda pair: [int(n) for n in re.findall(r"\d+", pair[0])])
    return [_layer(inventory, *pair, experts[pair]) for pair in ordered]


def _layer(inventory: Inventory, name: str, module: str, found: list[tuple[str, bool]]) -> MtpLayer:
    root = name.rpartition(".layers.")[0]
    spellings = (
        [f"{name}.{leaf}.weight" for leaf in ("enorm", "hnorm", "eh_proj")],
        [f"{root}.{leaf}.weight" for leaf in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc")],
    )
    inputs = next((keys for keys in spellings if all(key in inventory.beside for key in keys)), None)
    if inputs is None:
        raise RecipeError(
            f"mtp: quantize does not know how the input of {name} is made: it has neither {spellings[0][2]} with its "
            f"norms nor {spellings[1][2]}; use mtp: keep"
        )
    keys = {key: inventory.beside[key] for key, _ in found}
    own = {key: stored for key, stored in inventory.beside.items() if key.startswith(f"{name}.") and key not in keys}
    others = {key.removeprefix(f"{name}."): stored for key, stored in own.items() if key not in inputs}
    embedding_norm, hidden_norm, projection = (inventory.beside[key] for key in inputs)
    return MtpLayer(
        name=name,
        experts=f"{name}.{module}",
        stored_experts=keys,
        fused=all(fused for _, fused in found),
        embedding_norm=embedding_norm,
        hidden_norm=hidden_norm,
        projection=projection,
        others={leaf: stored for leaf, stored in others.items() if not leaf.startswith(_OF_THE_HEAD)},
    )


def decoder_of(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a model: the largest list of modules that share a class name ending in DecoderLayer."""
    lists = [module for _, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    decoders = [one for one in lists if type(one[0]).__name__.endswith("DecoderLayer")]
    if not decoders:
        raise RecipeError(f"mtp: quantize finds no decoder layers in {type(model).__name__}; use mtp: keep")
    return max(decoders, key=len)


def like(model: Any, layer: MtpLayer) -> int:
    """Number of the decoder layer that an MTP layer is like: the last one with the same tensors.

    Raises:
        RecipeError: when there is none, naming what differs.
    """
    experts = layer.experts.removeprefix(f"{layer.name}.")
    decoder = decoder_of(model)
    nearest: set[str] | None = None
    for number in reversed(range(len(decoder))):
        own = {key for key in decoder[number].state_dict() if not key.startswith(f"{experts}.")}
        has_experts = any(name == experts for name, _ in decoder[number].named_modules())
        different = own ^ set(layer.others)
        if has_experts and not different:
            return number
        if has_experts and (nearest is None or len(different) < len(nearest)):
            nearest = different
    shown = ", ".join(sorted(nearest or {experts})[:3])
    raise RecipeError(
        f"mtp: quantize runs {layer.name} as a decoder layer of {type(model).__name__}, and none has its tensors "
        f"(different: {shown}); use mtp: keep"
    )


class MtpModule(nn.Module):
    """An MTP layer that runs: its input's norms and projection, and a decoder layer with its weights."""

    def __init__(self, model: Any, layer: MtpLayer, number: int) -> None:
        super().__init__()
        dtype = model.dtype
        kind: Any = type(decoder_of(model)[number])
        with torch.device("meta"):
            self.block: Any = kind(model.config.get_text_config(), number)
        self.experts_name = layer.experts.removeprefix(f"{layer.name}.")
        weights = {leaf: _read(stored, dtype) for leaf, stored in layer.others.items()}
        weights |= {f"{self.experts_name}.{leaf}": tensor for leaf, tensor in _fused(layer, dtype).items()}
        norm: nn.Module = copy.deepcopy(self.block.input_layernorm)
        try:
            self.block.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise RecipeError(f"mtp: quantize cannot build {layer.name}: {error}; use mtp: keep") from error
        self.embedding_norm, self.hidden_norm = norm, copy.deepcopy(norm)
        self.embedding_norm.load_state_dict({"weight": _read(layer.embedding_norm, dtype)}, assign=True)
        self.hidden_norm.load_state_dict({"weight": _read(layer.hidden_norm, dtype)}, assign=True)
        projection = _read(layer.projection, dtype)
        self.projection = nn.Linear(projection.shape[1], projection.shape[0], bias=False, device="meta")
        self.projection.load_state_dict({"weight": projection}, assign=True)
        left = [name for name, tensor in _tensors(self) if tensor.is_meta]
        if left:
            raise RecipeError(f"mtp: quantize cannot build {layer.name}: nothing fills its {left[0]}; use mtp: keep")
        self.requires_grad_(False)

    @property
    def experts(self) -> Any:
        """transformers' experts module of the layer."""
        return self.block.get_submodule(self.experts_name)

    def forward(
        self, embedded: torch.Tensor, hidden: torch.Tensor, arguments: tuple[tuple[Any, ...], dict[str, Any]]
    ) -> torch.Tensor:
        """What the layer gives, ``[batch, T, H]``.

        Args:
            embedded: of the tokens that come next.
            hidden: the model's last hidden states.
            arguments: that the model called its own decoder layer with, whose hidden states are exchanged.
        """
        x = self.projection(torch.cat([self.embedding_norm(embedded), self.hidden_norm(hidden)], -1))
        args, kwargs = arguments
        out = self.block(x, *args[1:], **{name: value for name, value in kwargs.items() if name != "hidden_states"})
        return out[0] if isinstance(out, tuple) else out


def _read(stored: Stored, dtype: torch.dtype) -> torch.Tensor:
    tensor = stored.read()
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _fused(layer: MtpLayer, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The experts' weights as transformers fuses them: ``gate_up_proj [E, 2I, H]`` and ``down_proj [E, H, I]``."""
    by_name = {key.removeprefix(f"{layer.experts}."): stored for key, stored in layer.stored_experts.items()}
    if layer.fused:
        return {name: _read(stored, dtype) for name, stored in by_name.items()}
    count = layer.num_experts

    def stacked(*projections: str) -> torch.Tensor:
        rows = [[_read(by_name[f"{e}.{p}_proj.weight"], dtype) for p in projections] for e in range(count)]
        return torch.stack([torch.cat(parts) for parts in rows])

    try:
        return {"gate_up_proj": stacked("gate", "up"), "down_proj": stacked("down")}
    except KeyError as error:
        raise RecipeError(f"mtp: quantize: {layer.experts}.{error.args[0]} is missing from the source") from None


def _tensors(module: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
