"""Sources in low precision: decoded exactly, quantized from their folder, and without a trace of it in the result."""

import json
import operator
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from bitsmoe_modifier import CheckpointError
from bitsmoe_modifier.calibration.linearizing import experts_modules
from bitsmoe_modifier.cli import main
from bitsmoe_modifier.loading.source import load_source
from bitsmoe_modifier.sources.classes import class_of, load_published
from bitsmoe_modifier.sources.codecs import decode_mxfp4, decode_packed_integers, decode_scaled
from bitsmoe_modifier.sources.decoded import Decoded
from bitsmoe_modifier.sources.model import open_dense
from bitsmoe_modifier.sources.precision import source_tensors
from helpers import load, logits, packed_modules
from low_precision import (
    bit_stream,
    encode_fp8,
    encode_integers,
    encode_mxfp4,
    publish_compressed,
    publish_fp8,
    publish_mxfp4,
    publish_v4,
)
from published import stored_tensors
from tiny_text import save_letters, save_tiny, write_text

RECIPE = "quant_stage: {quant_modifiers: {BitsMoEModifier: {bits: 4.0, block_size: 16}}}"
GPT_OSS = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "sliding_window": 16,
    "pad_token_id": 0,
    "eos_token_id": 2,
}

DEEPSEEK_V4 = {
    **{key: value for key, value in GPT_OSS.items() if key not in ("num_local_experts", "num_key_value_heads")},
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "q_lora_rank": 64,
    "o_lora_rank": 16,
}


@pytest.mark.parametrize("shape", [(64, 64), (96, 40), (33, 70)])
def test_block_fp8_is_exact(shape: tuple[int, int]) -> None:
    codes, scales, values = encode_fp8(torch.randn(shape), 32)
    assert torch.equal(decode_scaled(codes, scales, (32, 32)), values)


def test_scales_of_another_size_are_refused() -> None:
    codes, scales, _ = encode_fp8(torch.randn(64, 64), 32)
    with pytest.raises(CheckpointError, match=r"scales of \(2, 2\) for weights of \(64, 64\) in blocks of \(16, 16\)"):
        decode_scaled(codes, scales, (16, 16))


def test_mxfp4_is_exact() -> None:
    blocks, scales, values = encode_mxfp4(torch.randn(3, 8, 64) * torch.logspace(-6, 6, 8)[None, :, None])
    assert torch.equal(decode_mxfp4(blocks, scales), values)
    assert torch.equal(values.bfloat16().float(), values), "bfloat16 holds them all"


@pytest.mark.parametrize("kind", ["int4", "int4-zero", "int3", "fp8-channel", "fp8-block", "nvfp4", "mxfp4"])
def test_compressed_tensors_are_exact(kind: str, tmp_path: Path) -> None:
    """Of rows of unequal size, one of them of zeros; read from a file, as a source is."""
    weight = torch.randn(40, 96) * torch.logspace(-3, 1, 40)[:, None]
    weight[7] = 0 if kind != "fp8-channel" else 1e-3
    (tmp_path / "model").mkdir()
    save_file({"model.layers.0.mlp.experts.0.up_proj.weight": weight}, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text("{}")
    stands = publish_compressed(tmp_path / "model", kind)
    ((name, value),) = source_tensors(tmp_path / "model", torch.float32).items()
    assert torch.equal(value.read(), stands[name])
    assert value.shape == weight.shape


@pytest.mark.parametrize("bits", range(1, 9))
def test_integers_of_all_widths(bits: int) -> None:
    stored, values = encode_integers(torch.randn(16, 96), bits, 32, symmetric=bits > 1)
    found = decode_packed_integers(
        stored["weight_packed"], stored["weight_scale"], (16, 96), bits, stored.get("weight_zero_point")
    )
    assert torch.equal(found, values)


def test_groups_in_any_order_of_columns() -> None:
    """GPTQ with activation order says for every column whose scale it has."""
    order = torch.randperm(96)
    stored, values = encode_integers(torch.randn(8, 96)[:, order], 4, 32)
    shuffled = {column: place for place, column in enumerate(order.tolist())}
    back = torch.tensor([shuffled[column] for column in range(96)])
    packed = encode_integers(values[:, back], 4, 32)[0]["weight_packed"]
    integers = (values / stored["weight_scale"].float().repeat_interleave(32, 1)).round()[:, back]
    words = bit_stream(integers, 4)
    found = decode_packed_integers(words, stored["weight_scale"], (8, 96), 4, None, (back // 32).int())
    assert torch.equal(found, values[:, back])
    assert packed.shape == words.shape


def fp8_folder(folder: Path) -> dict[str, torch.Tensor]:
    save_tiny(folder, "deepseek_v3")
    return publish_fp8(folder)


def mxfp4_folder(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", **GPT_OSS), dtype=torch.bfloat16)
    return publish_mxfp4(_saved(model, folder))


def v4_folder(folder: Path) -> dict[str, torch.Tensor]:
    config = AutoConfig.for_model("deepseek_v4", **DEEPSEEK_V4)
    return publish_v4(_saved(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), folder))


def kimi_folder(folder: Path) -> dict[str, torch.Tensor]:
    save_tiny(folder, "deepseek_v3")
    return publish_compressed(folder, "int4")


def nvfp4_folder(folder: Path) -> dict[str, torch.Tensor]:
    save_tiny(folder)
    return publish_compressed(folder, "nvfp4", everything=True)


def channel_folder(folder: Path) -> dict[str, torch.Tensor]:
    save_tiny(folder, "mixtral", intermediate_size=64)
    return publish_compressed(folder, "fp8-channel")


def _saved(model: torch.nn.Module, folder: Path) -> Path:
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and parameter.ndim == 1), std=0.1)
    model.save_pretrained(folder)
    return save_letters(folder)


FOLDERS = [fp8_folder, mxfp4_folder, v4_folder, kimi_folder, nvfp4_folder, channel_folder]


@pytest.mark.parametrize("make", FOLDERS)
def test_a_source_loads_as_what_it_stands_for(make, tmp_path: Path) -> None:
    stands = make(tmp_path / "source")
    assert stands
    tensors = source_tensors(tmp_path / "source", torch.float32)
    assert set(stands) <= set(tensors)
    assert all(torch.equal(tensors[key].read(), value) for key, value in stands.items())
    assert all(tensors[key].shape == tuple(value.shape) for key, value in stands.items())
    for dtype in (torch.bfloat16, torch.float32):
        model = load_source(tmp_path / "source", dtype)
        assert model.dtype == dtype
        assert not hasattr(model.config, "quantization_config")
        assert not [n for n, _ in model.named_parameters() if re.search(r"[.]experts[.].*_proj$", n)], "stay in files"
        whole = {key: stored.read().to(dtype) for key, stored in tensors.items()}
        config = AutoConfig.from_pretrained(tmp_path / "source")
        del config.quantization_config
        dense = class_of(config).from_pretrained(None, config=config, state_dict=whole, dtype=dtype).eval()
        names = [name for name, _ in dense.named_parameters() if re.search(r"[.]experts[.]\w+_proj$", name)]
        assert names
        for name in names:
            assert torch.equal(operator.attrgetter(name)(model)[:], dense.get_parameter(name))
    assert torch.allclose(logits(model), logits(dense), atol=1e-5)


def test_a_source_comes_with_its_generation_settings(tmp_path: Path) -> None:
    """Without its tokens that end a text, a model would not stop."""
    settings = {"eos_token_id": [2, 3], "do_sample": True, "temperature": 0.6}
    fp8_folder(tmp_path / "source")
    (tmp_path / "source" / "generation_config.json").write_text(json.dumps(settings))
    found = load_source(tmp_path / "source").generation_config.to_dict()
    assert {name: found[name] for name in settings} == settings


@pytest.mark.parametrize("make", FOLDERS)
def test_experts_in_files_are_known_to_a_process_that_saw_no_others(
    make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llm-compressor registers a class when it meets its parameters: a plan does that before `quantize` loads, no plan
    comes before a stage of `compare`."""
    make(tmp_path / "source")
    LinearExperts2D.get_registration(object)  # imports those that register themselves, once in a process
    own = {kind: one for kind, one in LinearExperts2D._registry.items() if one.__name__ != "LinearExperts2D"}
    monkeypatch.setattr(LinearExperts2D, "_registry", own)
    assert len(experts_modules(load_source(tmp_path / "source"))) == 2


def test_gptq_for_attention_beside_experts_of_an_fp8_source(tmp_path: Path) -> None:
    """And a stage of GPTQ alone, whose experts are read into memory: targets in a list are texts, not recipes."""
    source, out = tmp_path / "source", tmp_path / "out"
    fp8_folder(source)
    weights = "{num_bits: 4, type: int, symmetric: true, strategy: group, group_size: 16}"
    attention = f"GPTQModifier: {{config_groups: {{a: {{targets: ['re:.*self_attn[.]o_proj$'], weights: {weights}}}}}}}"
    assert quantize(source, out, recipe=RECIPE.replace("{BitsMoE", f"{{{attention}, BitsMoE")) == 0
    assert len(packed_modules(load(out))) == 2
    assert "model.layers.0.self_attn.o_proj.weight_packed" in stored_tensors(out)
    alone = attention.replace("self_attn[.]o_proj", "[.]experts[.][0-9]+[.](gate|up|down)_proj")
    assert quantize(source, tmp_path / "gptq", recipe=f"quant_stage: {{quant_modifiers: {{{alone}}}}}") == 0
    assert "model.layers.2.mlp.experts.7.down_proj.weight_packed" in stored_tensors(tmp_path / "gptq")


def test_the_rest_stays_in_fp8_whatever_the_run_computes_in(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    fp8_folder(source)
    config = source / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}))
    assert quantize(source, out, "--dtype", "bfloat16") == 0
    low = [key for key, one in source_tensors(source).items() if ".experts." not in key and isinstance(one, Decoded)]
    stored = stored_tensors(out)
    assert low
    assert all(stored[key].dtype == torch.float8_e4m3fn for key in low)


@pytest.mark.parametrize("make", [*FOLDERS[:4], *(pytest.param(make, marks=pytest.mark.slow) for make in FOLDERS[4:])])
def test_a_source_is_quantized_from_its_folder(make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the experts is ever read but one expert's matrix at a time, or some, for one layer's work."""
    source, out, text = tmp_path / "source", tmp_path / "out", write_text(tmp_path / "text", 4000, seed=0)
    make(source)
    assert open_dense(str(source)).expert_bits < 10
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    inputs = ["--model", str(source), "--recipe", str(tmp_path / "recipe.yaml")]
    assert main(["plan", *inputs, "--samples", "8", "--seq-len", "32"]) == 0

    def refused(*args: object) -> None:
        raise AssertionError("a layer's experts were read whole")

    monkeypatch.setattr("bitsmoe_modifier.calibration.stored_experts.read_parameters", refused)
    assert quantize(source, out) == 0
    loaded = load(out)
    assert len(packed_modules(loaded)) == 2
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"
    others = {key: one for key, one in source_tensors(source).items() if ".experts." not in key}
    stored = stored_tensors(out)
    assert not [key for key in stored if key.endswith(("_scale_inv", ".scale", "_blocks", "_scales"))]
    assert not [key for key in stored if ".experts." in key and key.endswith(("weight", "weight_packed"))]
    low = {key: one.as_stored for key, one in others.items() if isinstance(one, Decoded)}
    assert bool(low) == (make in (fp8_folder, v4_folder, nvfp4_folder))
    for key, one in others.items():
        if key not in low:
            assert torch.equal(stored[key], one.read())
            continue
        expected = under(key.removesuffix("weight"), low[key].read())
        assert all(torch.equal(as_bytes(stored[name]), as_bytes(tensor)) for name, tensor in expected.items())
    for dtype in (torch.bfloat16, torch.float32) if make is not v4_folder else (torch.float32,):
        loaded, reference = load_published(out, dtype=dtype), load_source(source, dtype)
        assert torch.isfinite(logits(loaded)).all()  # compressed-tensors decodes before the first forward
        if make is not nvfp4_folder or dtype is torch.bfloat16:  # it decodes NVFP4 to bfloat16, whatever is asked for
            found = dict(loaded.named_parameters())
            assert not [n for n, p in rest(reference) if not torch.equal(p, found[n].to(p.dtype))]
            assert all(p.dtype == found[n].dtype for n, p in rest(reference))
    assert main(["eval", str(out), "--model", str(source), "--eval-text", str(text), "--seq-len", "32"]) == 0


def rest(model: Any) -> list[tuple[str, torch.Tensor]]:
    """Parameters of a source but its experts' biases, which are packed with the experts."""
    return [(name, value) for name, value in model.named_parameters() if ".experts." not in name]


def under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def test_the_rest_in_bf16_on_request(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    fp8_folder(source)
    assert quantize(source, out, "--rest", "bf16") == 0
    stored = stored_tensors(out)
    others = {key: one for key, one in source_tensors(source).items() if ".experts." not in key}
    assert not [key for key, one in others.items() if not torch.equal(stored[key], one.read())]
    assert len(json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]) == 1


def test_layers_for_multi_token_prediction_stay_in_fp8(tmp_path: Path) -> None:
    """A layer beyond the last, as DeepSeek-V3 has one: its codes and scales are copied, and config.json names them."""
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(source, "deepseek_v3")
    file = source / "model.safetensors"
    mtp = {
        "model.layers.3.mlp.experts.0.gate_proj.weight": torch.randn(32, 64).bfloat16(),
        "model.layers.3.self_attn.q_a_proj.weight": torch.randn(16, 64).bfloat16(),
        "model.layers.3.enorm.weight": torch.randn(64).bfloat16(),
    }
    save_file({**load_file(file), **mtp}, file, {"format": "pt"})
    publish_fp8(source)
    assert quantize(source, out) == 0
    before, after = stored_tensors(source), stored_tensors(out)
    for key in (key for key in before if ".layers.3." in key):
        assert torch.equal(as_bytes(before[key]), as_bytes(after[key.replace("_scale_inv", "_scale")]))
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    (fp8,) = [group["targets"] for group in groups.values() if group["format"] == "float-quantized"]
    for name in ("model.layers.3.mlp.experts.0.gate_proj", "model.layers.3.self_attn.q_a_proj"):
        assert any(re.match(target[3:], name) for target in fp8)
    assert len(packed_modules(load(out))) == 2


def quantize(source: Path, out: Path, *options: str, recipe: str = RECIPE) -> int:
    file, text = out.with_name("recipe.yaml"), write_text(out.with_name("text"), 4000, seed=0)
    file.write_text(recipe)
    inputs = ["--model", str(source), "--recipe", str(file), "--calibration", str(text), "--out", str(out)]
    return main(["quantize", *inputs, "--samples", "16", "--seq-len", "32", *options])


def test_missing_scales_are_named(tmp_path: Path) -> None:
    mxfp4_folder(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.experts.down_proj_scales"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"down_proj_blocks has no .*down_proj_scales"):
        source_tensors(tmp_path / "source")
