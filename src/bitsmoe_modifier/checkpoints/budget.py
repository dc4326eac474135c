"""From a size on disk, or the memory of GPUs, to bits per expert weight: headers and config.json, no weights."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .. import messages
from ..calibration.recipe import Stage, check_stage, with_fields
from ..errors import RecipeError, check_at_least
from ..storage.factors import WRITTEN_BYTES
from .plan import Headers, bitsmoe_fields, model_shape, read_headers
from .planning import LayerShape, ModelShape

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
#: bits from which on nothing is gained, of the bit-widths that there are by default
_MOST_BITS = 6.0
#: tensors of a packed layer, and bytes of JSON that the header of a file spends on a tensor beside its name
_PACKED_TENSORS, _HEADER_BYTES = 13, 72
#: share of a GPU's memory that vLLM takes by default
_USABLE = 0.92
#: bytes that a process takes on a GPU before any weight: context, kernels, libraries' buffers
_CONTEXT_BYTES = 10**9
#: tokens that a server works on at once while it reads prompts
_PREFILL_TOKENS = 2048
_CACHE_ITEMSIZE = 2


@dataclass(frozen=True)
class Budget:
    """How large a checkpoint shall be, in one of several ways; with none of them, as the recipe says.

    Attributes:
        bits: per expert weight, one checkpoint each; texts of numbers.
        size: of the checkpoint's weight files, e.g. ``10GB``.
        fit: GPUs, e.g. ``24GB`` or ``2x24GB``.
        context: tokens of each sequence on those GPUs, e.g. ``32k``.
        batch: sequences on them at a time.
        max_kld: nats per token, which the stage has already; given here so that no other budget goes with it.
    """

    bits: tuple[str, ...] = ()
    size: str | None = None
    fit: str | None = None
    context: str = "8k"
    batch: int = 1
    max_kld: float | None = None

    def stages(self, stage: Stage, model: str) -> list[Stage]:
        """The stage at each of the budgets; says what it solved for.

        Args:
            stage: of a recipe.
            model: folder or hub name of the unquantized model.

        Raises:
            RecipeError: when there is more than one kind of budget, or one cannot be met.
        """
        given = [name for name in ("bits", "size", "fit", "max_kld") if getattr(self, name)]
        if len(given) > 1:
            options = " and ".join(f"--{name.replace('_', '-')}" for name in given)
            raise RecipeError(f"{options} exclude each other; give one of them")
        if not self.fit and (self.context, self.batch) != (Budget.context, Budget.batch):
            raise RecipeError("--context and --batch say what --fit shall hold; give --fit, or leave them out")
        if not given or self.max_kld:
            return [stage]
        fields = bitsmoe_fields(stage)
        if fields is None or (len(stage.modifiers) > 1 and not self.bits):
            raise RecipeError(
                f"{stage.name}: --{given[0]} needs a recipe with a BitsMoEModifier"
                + ("" if self.bits else " alone: what others make of the rest is not counted")
            )
        if fields.get("max_kld") is not None:
            raise RecipeError(
                f"{stage.name}: the recipe's max_kld chooses the bits; drop it there, or leave out --{given[0]}"
            )
        if self.bits:
            _check_commas(self.bits)
            wanted = [_number(bits) for bits in self.bits]
            if len(set(wanted)) < len(wanted):
                raise RecipeError(f"--bits {','.join(self.bits)} has a size twice; give each once")
            return [with_fields(stage, bits=bits) for bits in wanted]
        check_stage(stage)
        if self.size:
            bits = bits_for_size(model, parse_size(self.size), fields)
            messages.say("note", f"--size {self.size}: {bits:.4f} bits per expert weight")
        else:
            check_at_least(1, batch=self.batch)
            found = bits_for_memory(model, *parse_gpus(str(self.fit)), parse_tokens(self.context), self.batch, fields)
            bits = found.bits
            messages.say("note", f"--fit {self.fit}: {bits:.4f} bits per expert weight; {'; '.join(found.assumed)}")
        most = most_bits(fields)
        if bits == most:
            messages.say("note", f"the experts get no more than {most} bits: the checkpoint will be smaller")
        return [with_fields(stage, bits=round(bits, 4))]


def _check_commas(bits: Sequence[str]) -> None:
    """Refuse pairs of whole numbers: 1,6 are two sizes to us, and one to those who write 1.6 so.

    Raises:
        RecipeError: with both ways to write what may be meant.
    """
    if len(bits) % 2 or not all(text.isdigit() for text in bits):
        return
    one = ",".join(f"{whole}.{part}" for whole, part in zip(bits[::2], bits[1::2], strict=True))
    several = ",".join(f"{text}.0" for text in bits)
    raise RecipeError(f"--bits {','.join(bits)} may mean {one} or {several}; write it in one of these ways")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise RecipeError(f"--bits {text!r} is no number; write --bits 2.0 or --bits 1.6,2.0,2.5") from None


def parse_size(text: str) -> int:
    """Bytes of ``10GB`` (10⁹ bytes each), ``9.5 GiB`` (2³⁰) or a plain number.

    Raises:
        RecipeError: when it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B)?\s*", text.upper())
    if not found or float(found[1]) == 0:
        raise RecipeError(f"{text!r} is no size; write 10GB, 9.5GiB or a number of bytes")
    return round(float(found[1]) * _UNITS[found[2] or ""])


def parse_gpus(text: str) -> tuple[int, int]:
    """(number of GPUs, bytes of each) of ``24GB`` or ``2x24GB``.

    Raises:
        RecipeError: when it is neither.
    """
    count, x, size = text.lower().rpartition("x")
    if x and not (count.strip().isdigit() and int(count)):
        raise RecipeError(f"{text!r} is no number of GPUs; write 24GB or 2x24GB")
    return (int(count) if x else 1), parse_size(size)


def parse_tokens(text: str) -> int:
    """Tokens of ``32k`` (1,024 each) or a plain number.

    Raises:
        RecipeError: when it is neither.
    """
    found = re.fullmatch(r"\s*(\d+)\s*(k?)\s*", text.lower())
    if not found or not int(found[1]):
        raise RecipeError(f"{text!r} is no number of tokens; write 32k or 32768")
    return int(found[1]) * (1024 if found[2] else 1)


def rest_bytes(headers: Headers, shape: ModelShape) -> int:
    """Bytes of a checkpoint that do not depend on the bits: all but the quantized experts, and the files' headers."""
    names = [layer.name for layer in shape.layers]
    kept = [name for name in headers.sizes if not name.startswith(tuple(f"{layer}." for layer in names))]
    header = sum(len(name) + _HEADER_BYTES for name in kept)
    header += sum(_PACKED_TENSORS * (len(name) + 10 + _HEADER_BYTES) for name in names)
    return shape.stored_bytes - shape.expert_bytes + header


def most_bits(fields: dict[str, Any]) -> float:
    """Bits per expert weight that are of use at most, with the bit-widths that a BitsMoEModifier's fields allow."""
    return min(_MOST_BITS, float(max(fields.get("bit_widths") or fields.get("widths") or [_MOST_BITS])))


def packed_weights(layers: Sequence[LayerShape]) -> int:
    """Expert weights that will be packed."""
    return sum(layer.weights for layer in layers)


def bits_for_size(model: str, size: int, fields: dict[str, Any]) -> float:
    """Bits per expert weight at which the weight files of the checkpoint take ``size`` bytes, all else included.

    Args:
        model: folder or hub name of the unquantized model.
        size: bytes.
        fields: of the BitsMoEModifier that is going to quantize it.

    Raises:
        RecipeError: when what is not an expert takes that much already, or the model cannot be used.
    """
    headers = read_headers(model)
    shape = _shape(headers, fields)
    rest = rest_bytes(headers, shape)
    bits = 8 * (size - rest) / packed_weights(shape.layers)
    if bits <= 0:
        raise RecipeError(
            f"{_gb(size)} is less than what is not a quantized expert, {_gb(rest)}; give a larger size, quantize more "
            "layers, or the rest by another modifier"
        )
    return min(bits, most_bits(fields))


@dataclass(frozen=True)
class Fit:
    """What fits on one or several GPUs.

    Attributes:
        bits: per expert weight.
        weights, cache, workspace: bytes on each GPU.
        assumed: what was assumed, a sentence each.
    """

    bits: float
    weights: int
    cache: int
    workspace: int
    assumed: tuple[str, ...]


def bits_for_memory(model: str, gpus: int, memory: int, context: int, batch: int, fields: dict[str, Any]) -> Fit:
    """Bits per expert weight at which weights, KV cache and workspace fill the memory of the GPUs.

    Args:
        model: folder or hub name of the unquantized model.
        gpus: number of GPUs, which split the model by tensor parallelism.
        memory: bytes of each.
        context: tokens of each sequence.
        batch: sequences at a time.
        fields: of the BitsMoEModifier that is going to quantize it.

    Raises:
        RecipeError: when cache and everything that is not an expert take more than there is.
    """
    from transformers import AutoConfig

    headers = read_headers(model)
    shape = _shape(headers, fields)
    config = AutoConfig.from_pretrained(headers.source).get_text_config()
    cache = cache_bytes(config, context, batch, gpus)
    workspace = _workspace_bytes(config, shape, batch)
    usable = round(memory * _USABLE)
    left = usable - cache - workspace
    rest = rest_bytes(headers, shape)
    bits = 8 * (left * gpus - rest) / packed_weights(shape.layers)
    assumed = (
        f"{_USABLE:.0%} of {_gb(memory)} are usable, as vLLM takes them by default",
        f"KV cache of {batch} × {context} tokens in 16 bits: {_gb(cache)}" + (" on each GPU" if gpus > 1 else ""),
        f"context, activations of {_PREFILL_TOKENS} tokens, factors written out and logits: {_gb(workspace)}",
        *(("weights split evenly over the GPUs",) if gpus > 1 else ()),
    )
    if bits <= 0:
        raise RecipeError(
            f"{gpus} × {_gb(memory)} do not hold what is not a quantized expert, {_gb(rest)} ({'; '.join(assumed)}); "
            "give more memory, a shorter --context or a smaller --batch"
        )
    bits = min(bits, most_bits(fields))
    weights = (rest + bits * packed_weights(shape.layers) / 8) / gpus
    return Fit(bits, round(weights), cache, workspace, assumed)


def cache_bytes(config: Any, context: int, batch: int, gpus: int = 1) -> int:
    """Bytes of the KV cache on each GPU.

    Layers with a sliding window keep no more tokens than it is long; those with linear attention keep a state that does
    not grow and is left out; latent attention (MLA) keeps the latent vector, on every GPU.

    Args:
        config: transformers' configuration of the text model.
        context: tokens of each sequence.
        batch: sequences.
        gpus: tensor parallelism.
    """
    layers = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    window = getattr(config, "sliding_window", None)
    latent = getattr(config, "kv_lora_rank", None)
    if latent:
        per_token = latent + config.qk_rope_head_dim
    else:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        per_token = 2 * math.ceil(heads / gpus) * size
    kept = {"sliding_attention": min(context, window or context), "linear_attention": 0}
    tokens = sum(kept.get(kind, context) for kind in kinds)
    return batch * tokens * per_token * _CACHE_ITEMSIZE


def _workspace_bytes(config: Any, shape: ModelShape, batch: int) -> int:
    """Bytes on each GPU of context, activations, factors written out (one expert's at least) and logits; a guess, and a
    generous one."""
    largest = max(shape.layers, key=lambda layer: layer.width)
    row = 8 * largest.hidden + 3 * shape.choices * largest.width
    written = max(WRITTEN_BYTES, 4 * largest.hidden * largest.width)
    return _CONTEXT_BYTES + written + 2 * _PREFILL_TOKENS * row + 4 * batch * config.vocab_size


def _shape(headers: Headers, fields: dict[str, Any]) -> ModelShape:
    from ..calibration.modifier import BitsMoEModifier

    return model_shape(headers, BitsMoEModifier(**{**fields, "bits": most_bits(fields)}))


def _gb(n: float) -> str:
    """Bytes in the unit in which they are no less than one."""
    unit = next((unit for unit in ("TB", "GB", "MB", "KB") if n >= _UNITS[unit]), "")
    return f"{n / _UNITS[unit]:.2f} {unit}" if unit else f"{n:.0f} bytes"
