"""Dense export: the same predictions, the architecture's own tensor names, no trace of the format."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from bitsmoe_modifier.cli import main
from helpers import load, logits, pack_randomly, save, tiny_model
from tiny_text import save_tiny, write_text

_GPT_OSS = {
    "num_local_experts": 4,
    "intermediate_size": 32,
    "head_dim": 16,
    "sliding_window": 16,
    "layer_types": ["full_attention", "full_attention"],
}


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            found.update({key: tuple(shard.get_slice(key).get_shape()) for key in shard.keys()})  # noqa: SIM118
    return found


def with_tokenizer(folder: Path, dense_checkpoint) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((dense_checkpoint("qwen3_moe") / name).read_bytes())
    return folder


@pytest.mark.parametrize("architecture", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_the_dense_model_predicts_the_same(architecture, dense_checkpoint, tmp_path, monkeypatch):
    import helpers

    monkeypatch.setitem(helpers._SPECIFIC, "gpt_oss", _GPT_OSS)
    bias = architecture == "gpt_oss"
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path / "original")
    # super experts too, and a side without a basis
    pack_randomly(model, dense=(1,), bias=bias, basis_bits=(8, 0))
    packed = with_tokenizer(save(model, tmp_path / "packed"), dense_checkpoint)
    assert main(["export", str(packed), "--dtype", "float32", "--out", str(tmp_path / "dense")]) == 0

    assert shapes(tmp_path / "dense") == shapes(tmp_path / "original")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    # the same float32 weights; only the order of the products differs
    torch.testing.assert_close(logits(load(tmp_path / "dense")), logits(load(packed)), rtol=2e-4, atol=2e-4)


def test_a_checkpoint_without_packed_experts_is_refused(dense_checkpoint, tmp_path, capsys):
    assert main(["export", str(dense_checkpoint("qwen3_moe")), "--out", str(tmp_path / "out")]) == 2
    assert "no experts packed by BitsMoE" in capsys.readouterr().err


def test_an_occupied_folder_is_refused_first(tmp_path, capsys):
    (tmp_path / "x").write_text("")
    assert main(["export", "/nowhere", "--out", str(tmp_path)]) == 2
    assert "not an empty folder" in capsys.readouterr().err


def test_a_group_size_that_does_not_divide_is_refused(tmp_path, capsys):
    model = tiny_model("qwen3_moe")
    pack_randomly(model)
    save(model, tmp_path / "packed")
    arguments = ["export", str(tmp_path / "packed"), "--to", "w4", "--out", str(tmp_path / "w4")]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "--group-size 128 does not divide 64 and 32, the sizes of the experts of model.layers.0.mlp.experts" in said
    assert "give a divisor of both, such as 32" in said
    assert not (tmp_path / "w4").exists()


@pytest.mark.slow
def test_gptq_attention_is_decompressed_and_w4_can_be_written(tmp_path, capsys):
    model = save_tiny(tmp_path / "model")
    text = write_text(tmp_path / "text.txt", 3000, seed=0)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "a_stage: {q_modifiers: {GPTQModifier: {config_groups: {a: {targets: ['re:.*self_attn[.].*_proj$'], weights: "
        "{num_bits: 8, type: int, symmetric: true, strategy: group, group_size: 32}}}}, "
        "BitsMoEModifier: {bits: 6, group_size: 32, block_size: 16}}}"
    )
    common = ["--seq-len", "32", "--batch-size", "4", "--device", "cpu"]
    quantize = ["quantize", "--model", str(model), "--recipe", str(recipe), "--calibration", str(text), *common]
    assert main([*quantize, "--samples", "16", "--out", str(tmp_path / "packed")]) == 0
    assert main(["export", str(tmp_path / "packed"), "--out", str(tmp_path / "dense")]) == 0
    assert shapes(tmp_path / "dense") == shapes(model)
    dense = load(tmp_path / "dense", dtype=torch.float32)
    ours, original = logits(load(tmp_path / "packed", dtype=torch.float32)), logits(load(model, dtype=torch.float32))
    # bfloat16 weights, 8 bits of mantissa, against the error of 6-bit experts and 8-bit attention
    assert (logits(dense) - ours).norm() < 0.3 * (ours - original).norm()

    assert (
        main(["export", str(tmp_path / "packed"), "--to", "w4", "--group-size", "32", "--out", str(tmp_path / "w4")])
        == 0
    )
    stored = shapes(tmp_path / "w4")
    assert "model.layers.0.mlp.experts.3.up_proj.weight_packed" in stored
    assert "model.layers.0.self_attn.q_proj.weight" in stored
    four = logits(load(tmp_path / "w4", dtype=torch.float32))
    assert 0 < (four - ours).norm() < ours.norm()
