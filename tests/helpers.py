"""Random packed layers and tiny random models for the tests."""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from bitsmoe_modifier.method import native_viterbi
from bitsmoe_modifier.runtime import packed_product, trellis_product
from bitsmoe_modifier.storage.factors import pack_basis, pack_factor
from bitsmoe_modifier.storage.layout import FORMAT_VERSION, ExpertsLayout
from bitsmoe_modifier.storage.packed import PackedExperts
from bitsmoe_modifier.storage.planes import WIDTHS, code_values, levels
from bitsmoe_modifier.storage.steps import storable_steps
from bitsmoe_modifier.storage.trellis import sequence_order, value_tables
from trellis_reader import read_factors


@contextlib.contextmanager
def other_defaults(dtype: torch.dtype) -> Iterator[None]:
    """As in a script that set a default dtype and a default device; nothing may be made on the latter, so it is meta.

    What is made once for all calls is made anew inside, and after it.
    """
    made_once = (value_tables, sequence_order, trellis_product._tables, native_viterbi._tables, packed_product._table)
    before = torch.get_default_dtype()
    for one in made_once:
        one.cache_clear()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)
        for one in made_once:
            one.cache_clear()


@dataclass(frozen=True)
class RandomLayer:
    """A random packed layer and the float32 matrices it must decode to, computed without the packing code.

    Attributes:
        packed: the stored tensors.
        a: A ``[E, 2I, R]``.
        f: F ``[E, R', I]``.
        b: B ``[R, H]``, the identity where there is no input basis.
        u: U ``[H, R']``, likewise.
    """

    packed: PackedExperts
    a: torch.Tensor
    f: torch.Tensor
    b: torch.Tensor
    u: torch.Tensor

    @property
    def layout(self) -> ExpertsLayout:
        return ExpertsLayout.from_tensor(self.packed.layout)

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(gate_up ``[E, 2I, H]``, down ``[E, H, I]``) in float64, super experts inserted."""
        gate_up, down = self.a.double() @ self.b.double(), self.u.double() @ self.f.double()
        if self.packed.dense_ids is not None:
            gate_up[self.packed.dense_ids.long()] = self.packed.dense_in.double()
            down[self.packed.dense_ids.long()] = self.packed.dense_out.double()
        return gate_up, down


def random_layer(
    num_experts: int = 4,
    hidden: int = 64,
    intermediate: int = 48,
    *,
    rank_in: int | None = None,
    rank_out: int | None = None,
    block_size: int = 16,
    group_size: int = 16,
    basis_bits: tuple[int, int] = (8, 4),
    widths: tuple[int, ...] = WIDTHS,
    dense: tuple[int, ...] = (),
    bias: bool = False,
    stripes: int = 0,
    version: int = FORMAT_VERSION,
    gain: float = 1.0,
    ungated: bool = False,
    seed: int = 0,
) -> RandomLayer:
    """A layer with random widths, codes, steps, bases, biases and super experts, sealed with checksums.

    Its codes are trellis codes where it has ``stripes``; both factors are ``gain`` times their usual size.
    """
    gen = torch.Generator().manual_seed(seed)
    layout = ExpertsLayout(
        num_experts=num_experts,
        hidden_size=hidden,
        intermediate_size=intermediate,
        rank_in=rank_in or hidden,
        rank_out=rank_out or hidden,
        block_size=block_size,
        group_size=group_size,
        basis_in_bits=basis_bits[0],
        basis_out_bits=basis_bits[1],
        basis_group_size=16,
        num_dense=len(dense),
        has_bias=int(bias),
        codes=int(stripes > 0),
        stripes=stripes,
        version=version,
        ungated=int(ungated),
    )
    groups, scalar = layout.groups, dataclasses.replace(layout, codes=0, stripes=0)

    def choose(*shape: int) -> torch.Tensor:
        drawn = torch.tensor(widths)[torch.randint(len(widths), shape, generator=gen)].to(torch.uint8)
        if dense:
            drawn[list(dense)] = 0
        return drawn

    def codes_for(elementwise: torch.Tensor) -> torch.Tensor:
        drawn = torch.rand(elementwise.shape, generator=gen) * (1 << elementwise.long())
        return drawn.to(torch.uint8)

    def values_for(codes: torch.Tensor, elementwise: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        top = (1 << elementwise.long()) - 1
        return torch.where(elementwise > 0, (2 * codes.long() - top).float() * steps.float(), 0.0)

    def steps_for(elementwise: torch.Tensor) -> torch.Tensor:
        top = ((1 << elementwise.long()) - 1).clamp(min=1, max=1 if stripes else None)  # of the largest value
        return storable_steps(gain * (0.5 + torch.rand(elementwise.shape, generator=gen)) / (4 * hidden**0.5 * top))

    widths_in, widths_out = choose(num_experts, 2, layout.units_in), choose(num_experts, layout.units_out)
    if ungated:
        widths_in[:, 1] = 0
    # side "in": codes [E, 2, I, R], steps [E, 2, groups, R]
    per_direction = widths_in.repeat_interleave(block_size, -1)
    wide = per_direction[:, :, None].expand(-1, -1, intermediate, -1)
    codes = codes_for(wide)
    steps = steps_for(per_direction[:, :, None].expand(-1, -1, groups, -1))
    a = values_for(codes, wide, steps.repeat_interleave(group_size, 2)).flatten(1, 2)
    codes_in, steps_in = pack_factor(codes, steps, widths_in, scalar, "in")
    # side "out": codes [E, R', I], steps [E, groups, R']
    per_direction = widths_out.repeat_interleave(block_size, -1)
    wide = per_direction[:, :, None].expand(-1, -1, intermediate)
    codes = codes_for(wide)
    steps = steps_for(per_direction[:, None].expand(-1, groups, -1))
    f = values_for(codes, wide, steps.transpose(1, 2).repeat_interleave(group_size, 2))
    codes_out, steps_out = pack_factor(codes, steps, widths_out, scalar, "out")

    if stripes:  # any bytes are trellis codes
        codes_in, codes_out = (
            torch.randint(256, codes.shape, generator=gen).to(torch.uint8) for codes in (codes_in, codes_out)
        )
        names = ("layout", "widths_in", "widths_out", "codes_in", "codes_out", "steps_in", "steps_out")
        stored = (layout.to_tensor(), widths_in, widths_out, codes_in, codes_out, steps_in, steps_out)
        a, f = read_factors(dict(zip(names, stored, strict=True)))

    tensors: dict[str, torch.Tensor | None] = {}
    bases = []
    for side, bits, rows, columns in (
        ("basis_in", basis_bits[0], layout.rank_in, hidden),
        ("basis_out", basis_bits[1], hidden, layout.rank_out),
    ):
        if bits == 0:
            bases.append(torch.eye(hidden))
        elif bits == 16:
            tensors[side] = (torch.randn(rows, columns, generator=gen) / 8).bfloat16()
            bases.append(tensors[side].float())
        else:
            group = layout.basis_group_size
            codes = torch.randint(1 << bits, (rows, columns), generator=gen).to(torch.uint8)
            step = (torch.rand(rows, columns // group, generator=gen) / (8 * levels(bits))).half()
            tensors[side], tensors[f"{side}_step"] = pack_basis(codes, bits, group), step
            bases.append(code_values(codes, bits) * step.float().repeat_interleave(group, 1))
    if dense:
        tensors["dense_ids"] = torch.tensor(dense, dtype=torch.int32)
        tensors["dense_in"] = (torch.randn(len(dense), 2 * intermediate, hidden, generator=gen) / 8).bfloat16()
        tensors["dense_out"] = (torch.randn(len(dense), hidden, intermediate, generator=gen) / 8).bfloat16()
    if bias:
        tensors["in_bias"] = torch.randn(num_experts, 2 * intermediate, generator=gen).bfloat16()
        tensors["out_bias"] = torch.randn(num_experts, hidden, generator=gen).bfloat16()
    packed = PackedExperts(
        layout=layout.to_tensor(),
        widths_in=widths_in,
        widths_out=widths_out,
        codes_in=codes_in,
        codes_out=codes_out,
        steps_in=steps_in,
        steps_out=steps_out,
        **tensors,
    )
    return RandomLayer(packed.sealed(), a, f, *bases)


def with_tensors(packed: PackedExperts, **tensors: torch.Tensor | None) -> PackedExperts:
    """``packed`` with some tensors exchanged, checksums untouched."""
    return dataclasses.replace(packed, **tensors)


# --------------------------------------------------------------------------------------------------- tiny models

ARCHITECTURES = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3")

_COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SPECIFIC = {
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 32, "intermediate_size": 96, "head_dim": 16},
    "mixtral": {"num_local_experts": 4, "intermediate_size": 48},
    "olmoe": {"num_experts": 6, "intermediate_size": 32},
    "deepseek_v3": {
        "n_routed_experts": 8,
        "moe_intermediate_size": 32,
        "intermediate_size": 96,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
        "n_shared_experts": 1,
        "num_nextn_predict_layers": 0,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
    },
}


def tiny_config(architecture: str, **overrides: object):
    """Config of a model of some 100 thousand weights."""
    from transformers import AutoConfig

    return AutoConfig.for_model(architecture, **{**_COMMON, **_SPECIFIC[architecture], **overrides})


def tiny_model(architecture: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: object):
    """A random model of the architecture, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, **overrides), dtype=dtype)
    for parameter in model.parameters():  # some are zero by default, which would make every model the same
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def experts_names(model: torch.nn.Module) -> list[str]:
    """Names of the fused experts modules of a transformers model."""
    names = [name for name, module in model.named_modules() if _is_fused(module)]
    return [name for name in names if not name.endswith("shared_experts")]


def _is_fused(module: torch.nn.Module) -> bool:
    found = (getattr(module, name, None) for name in ("gate_up_proj", "up_proj"))
    return any(isinstance(tensor, torch.nn.Parameter) and tensor.ndim == 3 for tensor in found)


def pack_randomly(model: torch.nn.Module, names: list[str] | None = None, **layer: object) -> dict[str, RandomLayer]:
    """Replace the experts modules of ``model`` by random packed ones with the scheme attached; return them by name."""
    from bitsmoe_modifier.loading.format import attach, make_scheme
    from bitsmoe_modifier.loading.quantizer import experts_sizes
    from bitsmoe_modifier.method.gating import gating_of
    from bitsmoe_modifier.runtime.experts import BitsMoEExperts

    names = experts_names(model) if names is None else names
    scheme = make_scheme(names, group_size=16)
    layers = {}
    for seed, name in enumerate(names):
        original = model.get_submodule(name)
        bias = bool(getattr(original, "has_bias", False))
        layers[name] = random_layer(*experts_sizes(original), **{"seed": seed, "bias": bias, **layer})
        experts = BitsMoEExperts(layers[name].packed, gating_of(original))
        attach(experts, scheme)
        model.set_submodule(name, experts)
    return layers


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of 128 words; `oneshot` wants one beside a model even for data that needs none."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"word{i}": i for i in range(128)}, unk_token="word0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def save(model: torch.nn.Module, folder: Path, **kwargs: object) -> Path:
    """Save through llm-compressor's wrapper of ``save_pretrained``, as ``oneshot`` does."""
    pytest.importorskip("llmcompressor", reason="saves as llm-compressor does")
    from llmcompressor.transformers.compression.compressed_tensors_utils import modify_save_pretrained

    modify_save_pretrained(model)
    model.save_pretrained(folder, **kwargs)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Logits of a fixed batch."""
    ids = torch.arange(40).reshape(2, 20) * 7 % 128
    with torch.no_grad():
        return model(input_ids=ids).logits


# ----------------------------------------------------------------------------------------------------- calibration


def calibration(rows: int = 6, length: int = 32, vocab: int = 128, seed: int = 0) -> DataLoader:
    """Batches of one random row of tokens each, as `oneshot` takes them."""
    gen = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab, (rows, 1, length), generator=gen)
    return DataLoader([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids], batch_size=None)


def load(folder: Path, **kwargs: object):
    """The model of a checkpoint as the class that its config.json names, in its own dtype."""
    from bitsmoe_modifier.sources.classes import load_published

    return load_published(folder, **{"dtype": "auto", **kwargs})


def packed_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The packed experts modules of a model, by name."""
    from bitsmoe_modifier.runtime.experts import BitsMoEExperts

    return {name: module for name, module in model.named_modules() if isinstance(module, BitsMoEExperts)}
