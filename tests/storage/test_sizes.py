"""Sizes from headers: what is counted, against tensors written with known sizes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitsmoe_modifier.errors import CheckpointError, RecipeError
from bitsmoe_modifier.sources.model import open_dense
from bitsmoe_modifier.storage.sizes import (
    bits_per_expert_weight,
    checkpoint_bytes,
    expert_bytes,
    expert_elements,
    tensor_sizes,
)
from helpers import pack_randomly, save, tiny_model

TENSORS = {
    "model.layers.0.mlp.experts.0.up_proj.weight": torch.zeros(6, 4, dtype=torch.bfloat16),
    "model.layers.0.mlp.experts.gate_up_proj": torch.zeros(2, 8, 4),
    "model.layers.0.mlp.experts.gate_up_proj_bias": torch.zeros(2, 8),
    "model.layers.0.mlp.experts.0.up_proj.bias": torch.zeros(6),
    "model.layers.0.mlp.shared_experts.up_proj.weight": torch.zeros(5, 4),
    "model.layers.0.mlp.shared_expert.up_proj.weight": torch.zeros(5, 4),
    "model.layers.0.mlp.gate.weight": torch.zeros(2, 4),
}
EXPERTS = 6 * 4 + 2 * 8 * 4


def test_only_routed_experts_are_counted(tmp_path: Path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    sizes = tensor_sizes(tmp_path)
    assert sizes.keys() == TENSORS.keys()
    assert expert_elements(sizes) == EXPERTS
    assert expert_bytes(sizes) == 6 * 4 * 2 + 2 * 8 * 4 * 4 + 2 * 8 * 4 + 6 * 4
    assert checkpoint_bytes(tmp_path) == (tmp_path / "model.safetensors").stat().st_size


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_bytes_of_every_dtype(tmp_path: Path, dtype):
    save_file({"a.experts.x": torch.zeros(3, 5).to(dtype)}, tmp_path / "model.safetensors")
    assert expert_bytes(tensor_sizes(tmp_path)) == 15 * dtype.itemsize


def test_shards_are_read_by_the_index(tmp_path: Path):
    names = list(TENSORS)
    for shard, part in (("a.safetensors", names[:3]), ("b.safetensors", names[3:])):
        save_file({name: TENSORS[name] for name in part}, tmp_path / shard)
    save_file({"stale.experts.x": torch.zeros(9)}, tmp_path / "old.safetensors")
    weight_map = {name: "a.safetensors" if name in names[:3] else "b.safetensors" for name in names}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert tensor_sizes(tmp_path).keys() == TENSORS.keys()
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors: named by the index but missing"):
        tensor_sizes(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 40], ids=["empty", "no-length", "half-a-header"])
def test_cut_off_files_are_refused(tmp_path: Path, keep):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a whole safetensors file"):
        tensor_sizes(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="has no safetensors files"):
        tensor_sizes(tmp_path)


# ------------------------------------------------------------------------------------- bits per expert weight


@pytest.mark.parametrize("kept", ["all", "first", "mtp-in-bf16"])
def test_bits_count_the_packed_modules_against_their_own_weights(kept: str, tmp_path: Path):
    """Layers that a recipe ignores and multi-token-prediction experts, kept in bf16 or dropped, change nothing."""
    model = tiny_model("qwen3_moe")
    names = ["model.layers.1.mlp.experts"] if kept == "first" else None
    layers = pack_randomly(model, names)
    folder = save(model, tmp_path / "m")
    if kept == "mtp-in-bf16":
        tensors = load_file(folder / "model.safetensors")
        for expert in range(8):
            for projection in ("gate", "up", "down"):
                tensors[f"mtp.layers.0.mlp.experts.{expert}.{projection}_proj.weight"] = torch.zeros(32, 64).bfloat16()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    weights = len(layers) * 8 * 3 * 32 * 64
    packed = [(name, tensor.nbytes) for layer in layers.values() for name, tensor in layer.packed.items()]
    found = bits_per_expert_weight(folder)
    assert found.total == pytest.approx(8 * sum(nbytes for _, nbytes in packed) / weights, rel=1e-12)
    assert found.bases == 8 * sum(nbytes for name, nbytes in packed if name.startswith("basis")) / weights > 0
    codes = sum(nbytes for name, nbytes in packed if name.startswith(("codes", "steps", "dense")))
    assert found.codes == 8 * codes / weights > found.metadata > 0


@pytest.mark.parametrize(
    ("parts", "bits"),
    [
        ({"weight_packed": torch.zeros(6, 2, dtype=torch.int32), "weight_shape": torch.tensor([6, 16])}, 4 + 128 / 96),
        ({"weight_packed": torch.zeros(6, 2, dtype=torch.int32), "weight_shape": torch.tensor([6, 21])}, 512 / 126),
        ({"weight": torch.zeros(6, 16, dtype=torch.int8)}, 8),
        ({"weight": torch.zeros(6, 16).to(torch.float8_e4m3fn)}, 8),
        ({"weight_packed": torch.zeros(6, 8, dtype=torch.uint8)}, 4),
    ],
    ids=["int4", "int3", "int8", "float8", "float4"],
)
def test_bits_of_quantized_linears(parts: dict[str, torch.Tensor], bits: float, tmp_path: Path):
    linear = {f"a.experts.0.up_proj.{leaf}": tensor for leaf, tensor in parts.items()}
    scales = {"a.experts.0.up_proj.weight_scale": torch.zeros(6, dtype=torch.bfloat16)}
    kept = {"a.experts.1.up_proj.weight": torch.zeros(6, 16), "a.up_proj.weight": torch.zeros(6, 16)}
    save_file({**linear, **scales, **kept}, tmp_path / "model.safetensors")
    weights = 6 * 21 if bits == 512 / 126 else 6 * 16
    found = bits_per_expert_weight(tmp_path)
    assert found.total == pytest.approx(bits + 16 * 6 / weights)
    assert found.bases == 0


def test_bits_of_an_unquantized_model(tmp_path: Path):
    save_file({"a.experts.0.up_proj.weight": torch.zeros(6, 4).bfloat16()}, tmp_path / "model.safetensors")
    assert bits_per_expert_weight(tmp_path).total == 16
    save_file({"a.up_proj.weight": torch.zeros(6, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="has no routed experts"):
        bits_per_expert_weight(tmp_path)


# ------------------------------------------------------------------------------------------------ open_dense


def write_model(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", **config}))
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def test_open_dense_counts_weights_and_bits(tmp_path: Path):
    found = open_dense(write_model(tmp_path / "m", TENSORS))
    assert found.expert_elements == EXPERTS
    assert found.expert_bits == 8 * (6 * 4 * 2 + 2 * 8 * 4 * 4) / EXPERTS


def test_a_quantized_model_is_refused(tmp_path: Path):
    scheme = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    with pytest.raises(RecipeError, match=r"is quantized already \(pack-quantized\); give the unquantized model"):
        open_dense(write_model(tmp_path / "m", TENSORS, quantization_config=scheme))


def test_a_model_without_experts_is_refused(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"model_type qwen3_moe\) has no routed experts"):
        open_dense(write_model(tmp_path / "m", {"model.layers.0.mlp.up_proj.weight": torch.zeros(3)}))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_missing_folder_is_refused_without_asking_the_hub(name):
    with pytest.raises(CheckpointError, match="no such model folder"):
        open_dense(name)


def test_a_folder_without_config_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        open_dense(str(tmp_path))


def test_a_broken_config_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        open_dense(str(tmp_path))
