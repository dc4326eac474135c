"""Which modules a recipe means, and every reason to refuse them before calibration starts.

This module and `modifier` are the only ones that know llm-compressor's classes.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from compressed_tensors.offload import disable_offloading
from compressed_tensors.utils import match_named_modules
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from loguru import logger
from torch import nn
from transformers import GenerationMixin

from ..errors import CalibrationError, RecipeError
from ..method.costs import unit_cost
from ..method.gating import gating_of
from ..method.numerics import all_finite
from ..method.quantize import DenseExperts, QuantizerSettings
from ..runtime.experts import BitsMoEExperts
from ..storage.layout import ExpertsLayout
from .entries import check_entries, check_patterns
from .linearizing import experts_modules
from .stored_experts import stored_matrices

#: why families are refused that are known and have routed experts, by model type
_REFUSED = {
    "dbrx": "it keeps the rows of all its experts in one matrix (w1, v1, w2), which llm-compressor cannot take apart",
    "longcat_flash": "its router also chooses experts that hand a token on as it is; packed experts have no such ones",
    "ernie4_5_vl_moe": "its checkpoints store the experts for text and for images in one list, of which transformers "
    "cannot save a part; text calibrates the first alone",
}
#: relative difference of two sums of the same numbers, perhaps on different devices
_SAME = 1e-9
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def find_experts(model: nn.Module, targets: Sequence[str], ignore: Sequence[str]) -> dict[str, LinearExperts2D]:
    """Experts modules that the recipe targets, by name, in model order.

    Raises:
        RecipeError: when none is matched, an entry matches nothing, or the model's experts are already quantized, or of
            a kind that the format cannot hold; naming the model's family.
    """
    _check_class(model)
    check_patterns(targets, ignore)
    matched = dict(match_named_modules(model, list(targets), list(ignore)))
    packed = [name for name, module in matched.items() if isinstance(module, BitsMoEExperts)]
    if packed:
        raise RecipeError(f"the experts of {_some(packed)} are already packed; start from the unquantized model")
    found = {name: module for name, module in matched.items() if isinstance(module, LinearExperts2D)}
    present = {name: module for name, module in model.named_modules() if isinstance(module, LinearExperts2D)}
    if not found and not present:
        raise RecipeError(_unsupported(model))
    if not found:
        raise RecipeError(
            f"targets {list(targets)} minus ignore {list(ignore)} match none of the model's MoE layers "
            f"({_some(list(present))}); drop `targets` to quantize them all"
        )
    check_entries(model, present, targets, ignore)
    return found


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Experts modules of a model as transformers builds it, on any device, by name: for checks before weights are read.

    Raises:
        RecipeError: when the family is one that cannot be quantized.
    """
    _check_class(model)
    found = dict(experts_modules(model))
    if not found:
        raise RecipeError(_unsupported(model))
    return found


def _check_class(model: nn.Module) -> None:
    """Refuse classes that cannot be calibrated on rows of tokens as one model."""
    if hasattr(model, "_orig_mod"):
        raise RecipeError("the model went through torch.compile; give what was compiled (model._orig_mod)")
    if hasattr(model, "merge_and_unload"):
        raise RecipeError("the model carries adapters of PEFT; give model.merge_and_unload()")
    reason = _REFUSED.get(cast(Any, model).config.model_type)
    if reason is not None:
        raise RecipeError(f"{_family(model)} is not supported: {reason}")
    if not isinstance(model, GenerationMixin):
        raise RecipeError(
            f"{_family(model)} is not supported: it does not predict the next token of a text, which calibration needs"
        )


def _family(model: Any) -> str:
    return f"{type(model).__name__} (model_type {model.config.model_type})"


def _unsupported(model: nn.Module) -> str:
    """Why a model without one experts module that could be linearized cannot be quantized."""
    kinds = ((name, type(module).__name__) for name, module in model.named_modules())
    foreign = [(name, kind) for name, kind in kinds if re.search(r"(Experts|MoE)$", kind)]
    if not foreign:
        return f"{_family(model)} has no mixture-of-experts layer; BitsMoEModifier quantizes routed experts only"
    name, kind = foreign[-1]
    return (
        f"{_family(model)} is not supported: its experts class {kind} (e.g. {name}) does not follow transformers' "
        "common experts interface, so llm-compressor cannot linearize it; docs/models.md lists the families that work"
    )


def check_unclaimed(experts: Iterable[tuple[str, LinearExperts2D]]) -> None:
    """Refuse experts that another modifier of the recipe, or an earlier quantization, has claimed.

    Raises:
        RecipeError: with the pattern to add to the other modifier's ``ignore``.
    """
    claimed = [
        f"{name}.{child}"
        for name, module in experts
        for child, linear in module.named_modules()
        if getattr(linear, "quantization_scheme", None) is not None
    ]
    if claimed:
        raise RecipeError(
            f"{len(claimed)} expert projections ({_some(claimed)}) are already quantized or claimed by another "
            r"modifier; add 're:.*\.experts\.\d+\..*' to that modifier's `ignore`, or start from an unquantized model"
        )


def check_targeted_once(experts: Iterable[str], others: Iterable[Iterable[str]]) -> None:
    """Refuse experts that another BitsMoEModifier of the recipe targets too.

    Args:
        experts: names of the experts modules of one modifier.
        others: those of the recipe's others.

    Raises:
        RecipeError: naming them.
    """
    twice = [name for name in experts for other in others if name in other]
    if twice:
        raise RecipeError(
            f"two BitsMoEModifiers of the recipe target {_some(twice)}; give one of them other `targets`, or add these "
            "to its `ignore`"
        )


def check_transforms(model: nn.Module, modifiers: Iterable[Any]) -> None:
    """Refuse modifiers of the recipe that leave another model, and say which make one that transformers cannot run.

    SpinQuant of llm-compressor 0.14 centers the embeddings, fuses norms into what follows them, and rotates it, but for
    the routers: alone it changes the demo model's logits by half (R1) or a twentieth (R2). Cohere's models, which
    it prepares routers of, are its exception.

    Raises:
        RecipeError: naming the modifier.
    """
    kinds = {type(one).__name__ for one in modifiers}
    if "SpinQuantModifier" in kinds and not cast(Any, model).config.model_type.startswith("cohere2"):
        raise RecipeError(
            "SpinQuantModifier does not reach the routers of mixture-of-experts models, and would leave another model; "
            "leave it out"
        )
    if "QuIPModifier" in kinds:
        logger.warning("QuIPModifier: transformers cannot run what it makes, and loading it there is refused")


def mark_of(module: LinearExperts2D) -> tuple[int, float]:
    """The number of a layer's experts, and a number that changes with the weights of the first (0 where they stay in
    files, where nothing changes them)."""
    if stored_matrices(module) is not None:
        return module.num_experts, 0.0
    up: Any = cast(Any, module[0]).up_proj.weight
    return module.num_experts, float(up.detach().double().abs().sum())


def check_unchanged(name: str, module: LinearExperts2D, before: tuple[int, float]) -> None:
    """Refuse a layer that another modifier has changed since this one's calibration began: what was surveyed and
    captured is of the layer before.

    Args:
        before: `mark_of` the layer then.

    Raises:
        CalibrationError: naming the layer, and the pipeline that runs one modifier after the other.
    """
    count, weights = mark_of(module)
    if count == before[0] and abs(weights - before[1]) <= _SAME * abs(before[1]):
        return
    what = f"left {count} of its {before[0]} experts" if count != before[0] else "changed the weights of its experts"
    raise CalibrationError(
        f"{name}: another modifier {what} in the pass that quantizes them; use the pipeline independent, in which it "
        "comes first"
    )


def check_experts(
    name: str, module: LinearExperts2D, settings: QuantizerSettings, num_dense: int = 0
) -> QuantizerSettings:
    """Check that one layer can be quantized as asked: gating, sizes, budget, finite weights. Returns its settings.

    Args:
        num_dense: experts that the recipe keeps dense.

    Raises:
        RecipeError, CalibrationError: naming the layer, the offender and the remedy.
    """
    try:
        gating_of(module)
    except RecipeError as error:
        raise RecipeError(f"{name}: {error}") from None
    stored = stored_matrices(module)
    down: Any = cast(Any, module[0]).down_proj.weight if stored is None else stored.down()
    if not module.has_gate and 0 not in settings.widths:
        raise RecipeError(f"{name}: experts without a gate need bit-width 0 for what stands in its place; add it")
    hidden, width = down.shape[-2:]
    dense_share = num_dense / module.num_experts
    dense_bits = 8 * down.element_size()
    check_sizes(name, module.num_experts, hidden, width, settings, dense_share, dense_bits, bool(module.has_gate))
    if stored is not None:
        return settings.for_sizes(hidden, width)  # its weights are read, and looked at, when the layer is measured
    with torch.no_grad(), disable_offloading():
        for expert in range(module.num_experts):
            for projection in _PROJECTIONS[0 if module.has_gate else 1 :]:
                for kind, tensor in getattr(module[expert], projection).named_parameters():
                    if not bool(all_finite(tensor)):
                        raise CalibrationError(
                            f"{name}: the {projection} {kind} of expert {expert} holds NaN or infinity; "
                            "check the base model"
                        )
    return settings.for_sizes(hidden, width)


def check_sizes(
    name: str,
    num_experts: int,
    hidden: int,
    width: int,
    settings: QuantizerSettings,
    dense_share: float = 0.0,
    dense_bits: int = 16,
    gated: bool = True,
) -> None:
    """Check group size, block size and budget against one layer's sizes.

    Args:
        dense_share: share of the experts that is kept dense.
        dense_bits: bits of a weight of those.
        gated: whether experts have a gate.

    Raises:
        RecipeError: naming the field and values that would do.
    """
    settings = settings.for_sizes(hidden, width)
    if width % settings.group_size:
        fitting = [g for g in range(8, 257, 8) if width % g == 0]
        advice = f"set group_size to one of {fitting}" if fitting else "add the layer to `ignore`"
        raise RecipeError(
            f"{name}: group_size {settings.group_size} does not divide the expert size I = {width}; {advice}"
        )
    block = settings.resolve_block_size(hidden)
    if hidden % block:
        fitting = [b for b in (8, 16, 32, 64, 128) if hidden % b == 0]
        advice = f"set block_size to one of {fitting}" if fitting else "add the layer to `ignore`"
        raise RecipeError(f"{name}: block_size {block} does not divide the hidden size H = {hidden}; {advice}")
    if settings.codes == "trellis":
        for field, size in (("group_size", settings.group_size), ("block_size", block)):
            if size % 16:
                raise RecipeError(
                    f"{name}: codes: trellis needs a {field} that is a multiple of 16, not {size}; set codes: scalar "
                    f"or another {field}"
                )
    coded = least_bits(num_experts, hidden, width, settings, gated)
    least = coded * (1 - dense_share) + dense_bits * dense_share
    if settings.bits < least:
        raise RecipeError(
            f"{name}: bits {settings.bits} is below {least:.3f}, what bases, scales, narrowest bit-widths and super "
            "experts cost; raise `bits`, lower `basis_bits`, add 0 to `bit_widths`, or set both bases to none"
        )


def least_bits(num_experts: int, hidden: int, width: int, settings: QuantizerSettings, gated: bool = True) -> float:
    """Bits per weight at the narrowest bit-width: forced bases, scales and bit-widths of every unit, codes."""
    settings = settings.for_sizes(hidden, width)
    basis_group = settings.resolve_basis_group(hidden)
    forced = sum(choice == "spectral" for choice in (settings.input_basis, settings.output_basis))
    per_entry = settings.basis_bits + (0 if settings.basis_bits == 16 else 16 / basis_group)
    layout = ExpertsLayout(
        num_experts,
        hidden,
        width,
        hidden,
        hidden,
        settings.resolve_block_size(hidden),
        settings.group_size,
        basis_in_bits=0,
        basis_out_bits=0,
        basis_group_size=8,
        ungated=int(not gated),
    )
    units = num_experts * (2 * layout.units_in + layout.units_out)
    fixed = forced * hidden**2 * per_entry + 8 * units
    narrowest = unit_cost(min(settings.widths), layout.block_size, width, settings.group_size)
    return fixed / layout.dense_elements + narrowest / (layout.block_size * width)


def dense_experts(module: LinearExperts2D, device: torch.device | str = "cpu") -> DenseExperts:
    """The weights of a linearized experts module; call under ``disable_offloading`` for offloaded models.

    Linears are stacked, on the device where they are; experts that stay in files are read to ``device`` one by one.
    """
    stored = stored_matrices(module)
    if stored is not None:
        return stored.dense(device)
    experts: list[Any] = [module[e] for e in range(module.num_experts)]
    with torch.no_grad():
        down = torch.stack([e.down_proj.weight for e in experts])
        if not module.has_gate:
            if experts[0].up_proj.bias is not None:
                raise RecipeError("experts without a gate but with biases are not supported; add them to `ignore`")
            own = torch.stack([e.up_proj.weight for e in experts])
            gate_up = torch.cat([own, torch.zeros_like(own)], 1)
            return DenseExperts(gate_up, down, gating_of(module), ungated=True)
        gate_up = torch.stack([torch.cat([e.gate_proj.weight, e.up_proj.weight]) for e in experts])
        in_bias = out_bias = None
        if experts[0].gate_proj.bias is not None:
            in_bias = torch.stack([torch.cat([e.gate_proj.bias, e.up_proj.bias]) for e in experts])
            out_bias = torch.stack([e.down_proj.bias for e in experts])
    return DenseExperts(gate_up, down, gating_of(module), in_bias, out_bias)


def check_super_experts(listed: str | Sequence[str], experts: Mapping[str, LinearExperts2D]) -> None:
    """Check the recipe's list of super experts, where it is a list.

    Raises:
        RecipeError: naming an entry that is no expert of a targeted layer.
    """
    for entry in () if isinstance(listed, str) else listed:
        name, _, expert = entry.rpartition(".")
        if name not in experts or not expert.isdigit() or int(expert) >= experts[name].num_experts:
            raise RecipeError(
                f"super_experts: {entry!r} is not an expert of a targeted layer; "
                f"write MODULE.EXPERT, e.g. {next(iter(experts))}.0"
            )


def dense_ids(listed: str | Sequence[str], name: str) -> tuple[int, ...] | Literal["auto"]:
    """Which experts of a layer the recipe keeps dense; "auto" where the layer's statistics decide."""
    if listed == "auto":
        return "auto"
    entries = () if isinstance(listed, str) else listed
    return tuple(sorted({int(e.rpartition(".")[2]) for e in entries if e.rpartition(".")[0] == name}))


def _some(names: Sequence[str], limit: int = 3) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
