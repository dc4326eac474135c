"""Quantizing the experts of layers for multi-token prediction: on the same rows, by the model as it was quantized."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from loguru import logger
from torch import nn
from tqdm import tqdm

from ..errors import CalibrationError, RecipeError
from ..loading.inventory import Instead
from ..method.candidates import plan_layer
from ..method.design import moved
from ..method.distributed import Ranks
from ..method.gating import gating_of
from ..method.layer import DenseExperts, QuantizerSettings
from ..method.quantize import LayerReport, quantize_layer
from ..storage.packed import PackedExperts
from .capture import naming_layer, routed_tokens
from .mtp_layers import MtpLayer, MtpModule, decoder_of, find_mtp_layers, like
from .survey import Inputs, experts_inputs
from .targets import check_sizes


@dataclass(frozen=True)
class PackedMtp:
    """The packed experts of one MTP layer.

    Attributes:
        layer: what they were in the source.
        packed: their stored tensors, on the CPU.
        report: as of every layer.
    """

    layer: MtpLayer
    packed: PackedExperts
    report: LayerReport

    def instead(self) -> Instead:
        """What is stored in the place of what."""
        tensors = {f"{self.layer.experts}.{leaf}": tensor for leaf, tensor in self.packed.items()}
        return Instead(frozenset(self.layer.stored_experts), tensors, self.layer.experts)


def plan_mtp(model: Any, settings: QuantizerSettings) -> list[tuple[MtpLayer, int]]:
    """The MTP layers with routed experts of the source that a model was loaded from, before anything is computed.

    Args:
        model: as it was loaded from its folder.
        settings: how its experts are quantized.

    Returns:
        Each layer with the number of the model's decoder layer that it is like; none where the source has none.

    Raises:
        RecipeError: when the model was not loaded from a folder, or a layer cannot be run or quantized.
    """
    inventory = getattr(model, "source_inventory", None)
    if inventory is None:
        raise RecipeError(
            "mtp: quantize needs the folder that the model was loaded from; give it to `oneshot` in place of a model"
        )
    layers = find_mtp_layers(inventory)
    if not layers:
        logger.warning("mtp: quantize finds no layers for multi-token prediction with routed experts; nothing to do")
    for layer in layers:
        hidden, width = layer.sizes
        check_sizes(layer.experts, layer.num_experts, hidden, width, settings)
    return [(layer, like(model, layer)) for layer in layers]


def quantize_mtp(
    model: Any,
    layers: Iterable[tuple[MtpLayer, int]],
    batches: Iterable[Mapping[str, Any]],
    settings: QuantizerSettings,
    ranks: Ranks,
    rows: int,
) -> list[PackedMtp]:
    """Pack the experts of MTP layers, each with the same bits per weight as the model's.

    Args:
        model: whose experts have been packed, so that the layers get the hidden states that they get in use.
        layers: with the number of the decoder layer that each is like, in the order in which they follow each other.
        batches: of calibration; run through the model once more.
        settings: ``bits`` is what the layers get.
        ranks: the processes that share the batches.
        rows: calibration rows of all processes.

    Raises:
        CalibrationError, RecipeError: naming the layer.
    """
    built = [(layer, number, MtpModule(model, layer, number)) for layer, number in layers]
    modules = [module.to(_device_of(model)) for _, _, module in built]
    inputs: list[list[Inputs]] = [[] for _ in built]
    with torch.no_grad():
        for batch in tqdm(list(batches), desc="Calibrating MTP layers"):
            run_mtp(model, batch, [(number, module) for _, number, module in built], inputs)
    made = []
    for (layer, _, _), module, captured in zip(built, modules, inputs, strict=True):
        with naming_layer(layer.experts), torch.no_grad():
            tokens = routed_tokens(module.experts, ranks.collect(captured), rows)
            experts = dense_mtp_experts(module.experts)
            plan = moved(plan_layer(experts, tokens, settings, None, (), ranks), "cpu")
            choose = partial(plan.choose, settings.bits * experts.elements)
            design = moved(ranks.compute(choose), tokens.x.device)
            packed, report = quantize_layer(experts, tokens, design, settings, None, ranks)
        made.append(PackedMtp(layer, packed.to("cpu"), report))
    return made


def dense_mtp_experts(experts: Any) -> DenseExperts:
    """The weights of a layer that was built, in rows of gate before rows of up."""
    return DenseExperts(experts.gate_up_proj.detach(), experts.down_proj.detach(), gating_of(experts))


def run_mtp(
    model: Any, batch: Mapping[str, Any], layers: list[tuple[int, MtpModule]], inputs: list[list[Inputs]]
) -> None:
    """Run one batch through the model and on through the MTP layers; append what their experts got to ``inputs``."""
    decoder, calls, last = decoder_of(model), {}, []

    def note(number: int) -> Any:
        return lambda _module, args, kwargs: calls.update({number: (args, kwargs)})

    handles = [decoder[number].register_forward_pre_hook(note(number), with_kwargs=True) for number, _ in layers]
    head: nn.Module = model.get_output_embeddings()
    handles.append(head.register_forward_pre_hook(lambda _module, args: last.append(args[0])))
    device = _device_of(model)
    try:
        model(**{name: _to(value, device) for name, value in batch.items()}, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    tokens = batch["input_ids"].to(device)
    usable = _text(batch, tokens)
    if len(last) != 1 or last[0].shape[:2] != tokens.shape:
        raise CalibrationError("mtp: quantize needs the hidden state of every token, and the model's head got others")
    hidden = last[0]
    for (number, module), captured in zip(layers, inputs, strict=True):
        # every layer looks one token further than the one before it; what is rolled in at the end does not count
        tokens, usable = tokens.roll(-1, 1), usable & usable.roll(-1, 1)
        usable[:, -1] = False
        embedded = model.get_input_embeddings()(tokens).to(hidden.dtype)

        mask = usable.flatten().cpu()
        handle = module.experts.register_forward_pre_hook(_capturing(captured, mask), with_kwargs=True)
        try:
            hidden = module(embedded, hidden, calls[number])
        finally:
            handle.remove()


def _capturing(captured: list[Inputs], mask: torch.Tensor) -> Any:
    """A hook that appends what an experts module gets of the tokens in a mask."""

    def hook(experts: Any, args: Any, kwargs: Any) -> None:
        captured.append(experts_inputs(experts, args, kwargs, mask))

    return hook


def _text(batch: Mapping[str, Any], tokens: torch.Tensor) -> torch.Tensor:
    """The tokens that are no padding, bool ``[batch, T]``."""
    mask = batch.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.shape == tokens.shape:
        return mask.to(tokens.device) != 0
    return torch.ones_like(tokens, dtype=torch.bool)


def _device_of(model: Any) -> torch.device:
    return model.get_input_embeddings().weight.device


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
