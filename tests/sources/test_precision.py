"""Sources in low precision: decoded exactly, quantized from their folder, and without a trace of it in the result."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from bitsmoe_modifier import CheckpointError
from bitsmoe_modifier.cli import main
from bitsmoe_modifier.loading.source import load_source
from bitsmoe_modifier.sources.codecs import decode_mxfp4, decode_scaled
from bitsmoe_modifier.sources.model import open_dense
from bitsmoe_modifier.sources.precision import source_tensors
from helpers import load, logits, packed_modules
from low_precision import encode_fp8, encode_mxfp4, publish_fp8, publish_mxfp4
from published import stored_tensors
from tiny_text import save_tiny, write_text

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


def fp8_folder(folder: Path) -> dict[str, torch.Tensor]:
    save_tiny(folder, "deepseek_v3")
    return publish_fp8(folder)


def mxfp4_folder(folder: Path) -> dict[str, torch.Tensor]:
    save_tiny(folder)  # for its tokenizer
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", **GPT_OSS), dtype=torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return publish_mxfp4(folder)


@pytest.mark.parametrize("make", [fp8_folder, mxfp4_folder])
def test_a_source_loads_as_what_it_stands_for(make, tmp_path: Path) -> None:
    stands = make(tmp_path / "source")
    assert stands
    tensors = source_tensors(tmp_path / "source", torch.float32)
    assert set(stands) <= set(tensors)
    assert all(torch.equal(tensors[key].read(), value) for key, value in stands.items())
    assert all(tensors[key].shape == tuple(value.shape) for key, value in stands.items())
    model = load_source(tmp_path / "source")
    assert model.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")
    assert torch.isfinite(logits(model)).all()
    experts = [module.down_proj[:] for name, module in model.named_modules() if name.endswith("mlp.experts")]
    assert not [name for name, _ in model.named_parameters() if ".experts." in name and not name.endswith("bias")]
    expected = [value for key, value in stands.items() if ".experts." in key and "down_proj" in key]
    if make is mxfp4_folder:
        assert all(torch.equal(a, b.bfloat16()) for a, b in zip(experts, expected, strict=True))
    else:
        assert torch.equal(torch.cat([p.flatten(0, 1) for p in experts]), torch.cat(expected).bfloat16())


@pytest.mark.parametrize("make", [fp8_folder, mxfp4_folder])
def test_a_source_is_quantized_from_its_folder(make, tmp_path: Path) -> None:
    source, out, recipe = tmp_path / "source", tmp_path / "out", tmp_path / "recipe.yaml"
    make(source)
    assert open_dense(str(source)).expert_bits < 10
    recipe.write_text(RECIPE)
    text = write_text(tmp_path / "text", 4000, seed=0)
    assert main(["plan", "--model", str(source), "--recipe", str(recipe), "--samples", "8", "--seq-len", "32"]) == 0
    inputs = ["--model", str(source), "--recipe", str(recipe), "--calibration", str(text), "--out", str(out)]
    assert main(["quantize", *inputs, "--samples", "16", "--seq-len", "32"]) == 0
    loaded = load(out)
    assert len(packed_modules(loaded)) == 2
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"
    others = {key: one for key, one in source_tensors(source).items() if ".experts." not in key}
    stored = stored_tensors(out)
    assert not [key for key, one in others.items() if not torch.equal(stored[key], one.read())]
    assert not [key for key in stored if key.endswith(("_scale_inv", "_blocks", "_scales"))]


def test_missing_scales_are_named(tmp_path: Path) -> None:
    mxfp4_folder(tmp_path / "source")
    from safetensors.torch import load_file, save_file

    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.experts.down_proj_scales"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"down_proj_blocks has no .*down_proj_scales"):
        source_tensors(tmp_path / "source")
