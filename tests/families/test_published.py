"""Folders as they are published, through the command line and back."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from building import Family, model_of
from text_families import TEXT_FAMILIES
from wrapper_families import WRAPPER_FAMILIES

import published_names
from bitsmoe_modifier.checkpoints.export import fused_weights
from bitsmoe_modifier.cli import main
from bitsmoe_modifier.loading.inventory import take_inventory
from bitsmoe_modifier.loading.source_keys import restore_keys
from bitsmoe_modifier.storage.renaming import rename_tensors
from helpers import load, logits, packed_modules
from low_precision import publish_v4
from published import BESIDE, PROCESSOR, publish, stored_tensors
from tiny_text import write_text

MTP = {
    "mtp.fc.weight": torch.arange(64 * 128).reshape(64, 128).bfloat16(),
    "mtp.layers.0.mlp.experts.gate_up_proj": torch.ones(2, 96, 64, dtype=torch.bfloat16),
}
RECIPE = "quant_stage: {quant_modifiers: {BitsMoEModifier: {bits: 4.0, group_size: 16, block_size: 16}}}"


def family(model_type: str) -> Family:
    return next(one for one in WRAPPER_FAMILIES if one.model_type == model_type)


def quantize(folder: Path, out: Path, *options: str) -> int:
    recipe, text = out.with_name("recipe.yaml"), write_text(out.with_name("calibration.txt"), 4000, seed=0)
    recipe.write_text(RECIPE)
    inputs = ["--model", str(folder), "--recipe", str(recipe), "--calibration", str(text)]
    return main(["quantize", *inputs, "--out", str(out), "--samples", "16", "--seq-len", "32", *options])


@pytest.mark.parametrize("model_type", ["qwen3_5_moe", pytest.param("llama4", marks=pytest.mark.slow)])
def test_a_wrapper_keeps_its_tower(model_type: str, tmp_path: Path) -> None:
    dense = model_of(family(model_type), torch.bfloat16)
    source, out, back = publish(dense, tmp_path / "dense", MTP), tmp_path / "packed", tmp_path / "back"
    assert quantize(source, out) == 0
    loaded = load(out)
    assert type(loaded) is type(dense)
    assert len(packed_modules(loaded)) == 2
    before, after = stored_tensors(source), stored_tensors(out)
    others = [name for name in before if ".experts." not in name or name in MTP]
    assert any("visual" in name or "vision" in name for name in others)
    assert not [name for name in others if name not in after or not torch.equal(before[name], after[name])]
    assert json.loads((out / "config.json").read_text())["architectures"] == [type(dense).__name__]
    card = (out / "README.md").read_text()
    assert "import AutoModelForImageTextToText, AutoProcessor" in card
    assert "2 tensors (0.04 MB) for multi-token prediction" in card
    for name in (*BESIDE, *PROCESSOR):
        assert (out / name).read_bytes() == (source / name).read_bytes(), name

    assert main(["export", str(out), "--to", "dense", "--out", str(back), "--dtype", "bfloat16"]) == 0
    assert type(load(back)) is type(dense)
    exported = stored_tensors(back)
    assert not [name for name in others if name not in exported or not torch.equal(before[name], exported[name])]
    dense_again = load(back)
    for name, module in packed_modules(loaded).items():
        expected = fused_weights(module, dense_again.get_submodule(name), torch.bfloat16)
        own = dict(dense_again.get_submodule(name).named_parameters())
        assert all(torch.equal(own[leaf], tensor) for leaf, tensor in expected.items())


def saved_in_shards(folder: Path) -> tuple[Path, Path, torch.nn.Module]:
    """DeepSeek-V4 as it is published, the same as transformers saves it, in shards, and the model."""
    own = next(one for one in TEXT_FAMILIES if one.model_type == "deepseek_v4")
    source, target = publish(model_of(own), folder / "dense", rewrite=published_names.deepseek_v4), folder / "again"
    (source / "generation_config.json").unlink()
    model = load(source)
    model.save_pretrained(target, max_shard_size="100KB")
    return source, target, model


def test_the_index_says_what_the_files_hold_where_a_renaming_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that becomes full: the finished checkpoint stays one that can be read."""
    source, target, model = saved_in_shards(tmp_path)
    inventory = take_inventory(model, source)
    done: list[Path] = []

    def rename(file: Path, names: Mapping[str, str]) -> None:
        if len(done) == 2:
            raise OSError("no space left on device")
        done.append(file)
        rename_tensors(file, names)

    monkeypatch.setattr("bitsmoe_modifier.loading.source_keys.rename_tensors", rename)
    with pytest.raises(OSError, match="no space left"):
        restore_keys(inventory, model, target)
    listed = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(listed) == set(stored_tensors(target))
    monkeypatch.undo()
    assert restore_keys(inventory, model, target)
    assert torch.equal(logits(load(target)), logits(model))


def test_published_names_come_out_again_in_shards(tmp_path: Path) -> None:
    source, target, model = saved_in_shards(tmp_path)
    inventory = take_inventory(model, source)
    assert restore_keys(inventory, model, target)
    after = stored_tensors(target)
    assert {name for name in stored_tensors(source) if ".experts." not in name} < set(after)
    assert set(json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]) == set(after)
    assert torch.equal(logits(load(target)), logits(model))
    assert not restore_keys(inventory, model, target)


def test_published_names_come_out_again(tmp_path: Path) -> None:
    """transformers cannot turn all of its own names of DeepSeek-V4 back: neither the tensors' nor config.json's."""
    own = next(one for one in TEXT_FAMILIES if one.model_type == "deepseek_v4")
    source, out, back = (tmp_path / name for name in ("dense", "packed", "back"))
    publish(model_of(own, torch.bfloat16), source, rewrite=published_names.deepseek_v4)
    assert quantize(source, out) == 0
    before, after = stored_tensors(source), stored_tensors(out)
    others = {name for name in before if ".experts." not in name}
    assert {"embed.weight", "hc_head_fn", "layers.0.attn.kv_norm.weight", "norm.weight", "head.weight"} < others
    assert others == {name for name in after if ".experts." not in name}
    assert all(torch.equal(before[name], after[name]) for name in others)
    published, made = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    assert made.pop("quantization_config")
    assert made == {**published, "transformers_version": made["transformers_version"]}
    packed = load(out, dtype=torch.float32)
    assert len(packed_modules(packed)) == 2

    assert main(["export", str(out), "--to", "dense", "--out", str(back), "--dtype", "float32"]) == 0
    assert {name for name in stored_tensors(back) if ".experts." not in name} == others
    torch.testing.assert_close(logits(load(back, dtype=torch.float32)), logits(packed), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_published_names_come_out_again_in_low_precision(tmp_path: Path) -> None:
    own = next(one for one in TEXT_FAMILIES if one.model_type == "deepseek_v4")
    own = replace(own, sizes={"intermediate_size": 64, "moe_intermediate_size": 64})  # MXFP4 is in blocks of 32
    stands: dict[str, torch.Tensor] = {}

    def rewrite(folder: Path) -> None:
        published_names.deepseek_v4(folder)
        stands.update(publish_v4(folder))

    source, out, back = (tmp_path / name for name in ("dense", "packed", "back"))
    publish(model_of(own, torch.bfloat16), source, rewrite=rewrite)
    assert quantize(source, out) == 0
    wanted = {name.replace(".scale", ".weight_scale") for name in stored_tensors(source) if ".experts." not in name}
    assert wanted == {name for name in stored_tensors(out) if ".experts." not in name}
    assert sum(name.endswith(".weight_scale") for name in wanted) > 8
    assert main(["export", str(out), "--to", "dense", "--out", str(back), "--dtype", "float32"]) == 0
    decoded = stored_tensors(back)
    kept = {name: tensor for name, tensor in stands.items() if ".experts." not in name}
    assert all(torch.equal(decoded[name].float(), tensor.float()) for name, tensor in kept.items())
