"""Checkpoints that transformers would misread are noticed, and decode to the weights that were packed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitsmoe_modifier.errors import CheckpointError
from bitsmoe_modifier.evaluation.evaluate import load_model
from bitsmoe_modifier.loading.decoding import load_decoded, misread_experts
from helpers import logits, tiny_model

GATE_UP, DOWN = r"re:.*experts\.\d+\.(gate|up)_proj$", r"re:.*experts\.\d+\.down_proj$"


def weights(bits: int, symmetric: bool = True) -> dict:
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 32}


CONFIGS = {
    "one-scheme": ({GATE_UP: weights(4), DOWN: weights(4)}, None),
    "asymmetric": ({GATE_UP: weights(4, False), DOWN: weights(4, False)}, "asymmetric"),
    "two-schemes": ({GATE_UP: weights(2), DOWN: weights(4)}, "by one scheme"),
    "mixed": ({GATE_UP: weights(3, False), DOWN: weights(8)}, "asymmetric"),
}


def quantized(weight: torch.Tensor, args: dict) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Round to nearest per group of 32: (tensors before packing, the weights they stand for)."""
    low, high = -(2 ** (args["num_bits"] - 1)), 2 ** (args["num_bits"] - 1) - 1
    groups = weight.float().unflatten(1, (-1, 32))
    if args["symmetric"]:
        scale = groups.abs().amax(2) / high
        zero = torch.zeros_like(scale)
    else:
        least, most = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scale = (most - least) / (high - low)
        zero = (low - least / scale).round().clamp(low, high)
    codes = (groups / scale[..., None] + zero[..., None]).round().clamp(low, high)
    dense = ((codes - zero[..., None]) * scale[..., None]).flatten(1)
    return {"weight_scale": scale, "weight_zero_point": zero.to(torch.int8), "codes": codes.flatten(1)}, dense


def write(folder: Path, groups: dict[str, dict], architecture: str = "qwen3_moe") -> dict[str, torch.Tensor]:
    """Save a tiny model with its experts packed by compressed-tensors; return the dense tensors it stands for."""
    import re

    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    sizes = {"intermediate_size": 64} if architecture == "mixtral" else {}
    tiny_model(architecture, **sizes).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for theirs, ours in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):  # llm-compressor's names
        tensors = {name.replace(f".{theirs}.weight", f".{ours}.weight"): t for name, t in tensors.items()}
    dense = dict(tensors)
    for target, args in groups.items():
        scheme = QuantizationScheme.model_validate({"targets": [target], "weights": args})
        for name in [n for n in tensors if re.match(target[3:], n.removesuffix(".weight"))]:
            parts, dense[name] = quantized(tensors.pop(name), args)
            # compress() rounds the weights itself; handed the exact grid points it finds the same codes
            local = {k: parts[k] for k in ("weight_scale", "weight_zero_point")} | {"weight": dense[name]}
            packed = PackedQuantizationCompressor.compress(local, scheme)
            tensors |= {f"{name.removesuffix('weight')}{key}": t.contiguous() for key, t in packed.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {"targets": [target], "weights": args} for i, (target, args) in enumerate(groups.items())
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return dense


@pytest.mark.parametrize(("groups", "reason"), CONFIGS.values(), ids=CONFIGS)
def test_experts_are_measured_as_they_were_packed(tmp_path: Path, groups, reason):
    dense = write(tmp_path / "packed", groups)
    found = misread_experts(tmp_path / "packed")
    assert (found is None) if reason is None else (reason in found)
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "dense")
    save_file(dense, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    model = load_model(str(tmp_path / "packed"), torch.float32, torch.device("cpu"))
    expected = load_model(str(tmp_path / "dense"), torch.float32, torch.device("cpu"))
    # the same float32 weights up to the last bit of code times scale
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-5)


def test_decoding_by_hand_agrees_with_transformers_where_both_work(tmp_path: Path):
    write(tmp_path, CONFIGS["one-scheme"][0])
    stock = load_model(str(tmp_path), torch.float32, torch.device("cpu"))
    torch.testing.assert_close(logits(load_decoded(tmp_path, torch.float32)), logits(stock), rtol=1e-4, atol=1e-5)


def test_dense_checkpoints_are_left_alone(tmp_path: Path):
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    assert misread_experts(tmp_path) is None


def test_experts_under_llm_compressors_names(tmp_path: Path) -> None:
    """Mixtral: transformers knows w1, w2, w3 only, and would go on with random experts."""
    dense = write(tmp_path / "packed", {GATE_UP: weights(4), DOWN: weights(4)}, "mixtral")
    assert "names of these experts" in misread_experts(tmp_path / "packed")
    model = load_model(str(tmp_path / "packed"), torch.float32, torch.device("cpu"))
    for layer, expert in ((0, 0), (1, 3)):
        experts = model.model.layers[layer].mlp.experts
        prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
        gate, up, down = (dense[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        assert torch.equal(experts.gate_up_proj[expert], torch.cat([gate, up]))
        assert torch.equal(experts.down_proj[expert], down)


def test_made_up_experts_are_refused(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if "layers.1.mlp.experts" not in n}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no file holds model\.layers\.1\.mlp\.experts"):
        load_model(str(tmp_path), torch.float32, torch.device("cpu"))
