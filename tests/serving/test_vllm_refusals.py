"""What vLLM must refuse, and how it says so."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engines import engine

from bitsmoe_modifier.errors import CheckpointError
from checkpoints import edit_tensors, packed_checkpoint

pytestmark = pytest.mark.vllm


def damage(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.experts.codes_out"][100] ^= 1


def shorten(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.experts.steps_in"] = tensors["model.layers.1.mlp.experts.steps_in"][:-1]


def remove(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.experts.basis_out_step"]


def remove_layer(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if key.startswith("model.layers.1.mlp.experts.")]:
        del tensors[key]


def remove_others(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.input_layernorm.weight"]
    del tensors["model.layers.0.self_attn.o_proj.weight"]


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage, r"layers\.1\.mlp\.experts\.codes_out: the checksum does not match"),
        (shorten, r"layers\.1\.mlp\.experts\.steps_in: is torch\.uint8 \(\d+,\), the layout and widths imply"),
        (remove, r"layers\.1\.mlp\.experts\.basis_out_step: missing"),
        (remove_layer, r"layers\.1\.mlp\.experts: no tensor of its packed experts arrived.*(Qwen3|DeepseekV3)"),
        (remove_others, r"as model\.layers\.0\.self_attn\.o_proj\.weight, model\.layers\.1\.input_layernorm\.weight;"),
    ],
    ids=["damaged", "mis-sized", "missing", "whole layer missing", "missing elsewhere"],
)
def test_incomplete_or_damaged_checkpoint(architecture: str, change: object, message: str, tmp_path: Path) -> None:
    folder = packed_checkpoint(architecture, tmp_path)
    edit_tensors(folder, change)
    with pytest.raises(CheckpointError, match=message), engine(folder):
        pass


def test_what_is_missing_elsewhere_may_be_waived(tmp_path: Path) -> None:
    folder = packed_checkpoint("qwen3_moe", tmp_path)
    edit_tensors(folder, remove_others)
    with engine(folder, model_loader_extra_config={"enable_weights_track": False}):
        pass


def test_config_of_another_model(tmp_path: Path) -> None:
    folder = packed_checkpoint("qwen3_moe", tmp_path)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "moe_intermediate_size": 64}))
    message = r"layout: intermediate_size is 32, config\.json makes it 64"
    with pytest.raises(CheckpointError, match=message), engine(folder):
        pass


def test_without_the_plugin(tmp_path: Path) -> None:
    folder = packed_checkpoint("qwen3_moe", tmp_path)
    program = (
        "import sys; from vllm import LLM\n"
        "LLM(sys.argv[1], skip_tokenizer_init=True, enforce_eager=True, max_model_len=64)\n"
        "print('THE MODEL IS UP')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        env={**os.environ, "VLLM_PLUGINS": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode != 0
    assert "THE MODEL IS UP" not in done.stdout
    # vLLM finds a scheme for the experts' projections that none of its kernels takes
    assert "For Fused MoE layers, only format" in done.stderr


def test_unsupported_vllm_version() -> None:
    from vllm.model_executor.layers import quantization

    from bitsmoe_modifier.serving.refusal import refuse_checkpoints

    ours = {"quant_method": "compressed-tensors", "format": "bitsmoe", "config_groups": {}}
    registered = dict(quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG)
    try:
        refuse_checkpoints("this is vLLM 9")
        method = quantization.get_quantization_config("bitsmoe")
        with pytest.raises(CheckpointError, match="packed as bitsmoe: this is vLLM 9"):
            method.override_quantization_method(ours, None, hf_config=None)
        assert method.override_quantization_method({"quant_method": "gptq"}, None, hf_config=None) is None
    finally:
        quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG.update(registered)
