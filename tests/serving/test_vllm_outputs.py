"""What vLLM computes from a checkpoint with packed experts."""

import json
import math
from pathlib import Path

import pytest
import wna16
from engines import check_equal, run
from expected import check, expected

from checkpoints import decoded_checkpoint, packed_checkpoint

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "olmoe"])
def test_equal_to_transformers(architecture: str, tmp_path: Path) -> None:
    folder = packed_checkpoint(architecture, tmp_path)
    check(run(folder), expected(folder))


@pytest.mark.parametrize("architecture", ["deepseek_v2", "deepseek_v3"])
def test_equal_to_the_decoded_model(architecture: str, tmp_path: Path) -> None:
    packed = packed_checkpoint(architecture, tmp_path / "packed")
    decoded = decoded_checkpoint(architecture, tmp_path / "decoded")
    check_equal(run(packed), run(decoded))


@pytest.mark.parametrize(
    "layer",
    [
        {"basis_bits": (0, 0), "widths": (0, 2, 4, 6)},
        {"basis_bits": (4, 0), "rank_in": 32, "dense": (1, 4)},
        {"basis_bits": (16, 16), "rank_out": 48},
        {"stripes": 2, "dense": (1,)},
    ],
    ids=["no bases", "input basis and super experts", "16-bit bases", "trellis codes"],
)
def test_every_kind_of_layer(layer: dict[str, object], tmp_path: Path) -> None:
    folder = packed_checkpoint("qwen3_moe", tmp_path, **layer)
    check(run(folder), expected(folder))


def test_layers_that_stayed_dense(tmp_path: Path) -> None:
    folder = packed_checkpoint("qwen3_moe", tmp_path, names=["model.layers.1.mlp.experts"])
    check(run(folder), expected(folder))


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3"])
def test_torch_compile(architecture: str, tmp_path: Path) -> None:
    folder = packed_checkpoint(architecture, tmp_path)
    check_equal(run(folder, enforce_eager=False), run(folder))


def test_w4a16_attention_beside_packed_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm._custom_ops

    monkeypatch.setattr(vllm._custom_ops, "cpu_gemm_wna16", wna16.gemm)
    folder = packed_checkpoint("qwen3_moe", tmp_path, w4a16=True)
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    assert sorted(group["format"] for group in groups.values()) == ["bitsmoe", "pack-quantized"]
    check(run(folder), expected(folder))


def test_dummy_weights(tmp_path: Path) -> None:
    folder = packed_checkpoint("deepseek_v3", tmp_path)
    (folder / "model.safetensors").unlink()
    for generated in run(folder, load_format="dummy"):
        assert all(math.isfinite(value) for place in generated.logprobs for value in place.values())
