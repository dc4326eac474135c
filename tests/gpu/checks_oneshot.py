"""llm-compressor's `oneshot` on the emulated GPU, which it takes for the machine's accelerator."""

from pathlib import Path

import torch
from compressed_tensors.offload import set_onload_device
from emulated import GPU, emulated_gpu
from llmcompressor import oneshot
from llmcompressor.modeling.offset_norm import norm_calibration_context
from torch import nn
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

from bitsmoe_modifier import BitsMoEModifier
from helpers import calibration, load, packed_modules, save_tokenizer, tiny_model

FIELDS = {"bits": 3.0, "group_size": 16, "block_size": 16, "input_basis": "spectral", "output_basis": "none"}


def test_a_model_is_quantized_on_the_gpu(tmp_path: Path) -> None:
    tiny_model("qwen3_moe", torch.float32, num_experts=4, hidden_size=32, moe_intermediate_size=16).save_pretrained(
        tmp_path / "dense"
    )
    save_tokenizer(tmp_path / "dense")
    recipe = [BitsMoEModifier(**FIELDS, refine_passes=0)]
    with emulated_gpu():
        model = oneshot(
            model=load(tmp_path / "dense"), dataset=calibration(rows=4), recipe=recipe, output_dir=tmp_path / "out"
        )
        modules = packed_modules(model)
        assert modules
        assert all(module.codes_in.device == GPU for module in modules.values())
        assert all(module.report.relative_output_error < 0.5 for module in modules.values())
        made = {f"{name}.{leaf}": t.tolist() for name, module in modules.items() for leaf, t in module.packed.items()}
    loaded = packed_modules(load(tmp_path / "out"))
    assert made == {f"{name}.{leaf}": t.tolist() for name, one in loaded.items() for leaf, t in one.packed.items()}


def test_norms_that_calibration_replaced_run_on_the_gpu_again() -> None:
    """Those of Gemma and Qwen3-Next, which are put back after their model was dispatched."""
    model = nn.Module()
    model.config, model.norm = None, Qwen3NextRMSNorm(8)
    with emulated_gpu():
        x = torch.randn(2, 8)
        expected = model.norm(x)
        with norm_calibration_context(model):
            set_onload_device(model, GPU)
        assert isinstance(model.norm, Qwen3NextRMSNorm)
        assert torch.equal(model.norm(x.to(GPU)).cpu(), expected)
