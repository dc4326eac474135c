"""How the model computes while it is quantized."""

import pytest
import torch

from bitsmoe_modifier.calibration.oneshot import _cast
from helpers import tiny_model


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_not_stored_in_the_models_dtype_keeps_its_own(stored: torch.dtype, dtype: torch.dtype) -> None:
    model = tiny_model("deepseek_v3", dtype=stored)
    correction = model.model.layers[1].mlp.gate.e_score_correction_bias
    correction.data = torch.full_like(correction, 1 / 3, dtype=torch.float32)
    frequencies = {name: buffer.clone() for name, buffer in model.named_buffers() if "inv_freq" in name}
    assert frequencies
    _cast(model, dtype)
    assert model.model.layers[0].self_attn.o_proj.weight.dtype == dtype
    assert model.dtype == model.config.dtype == dtype
    for name, before in frequencies.items():
        assert torch.equal(model.get_buffer(name), before), "positions are computed from them"
    if stored != torch.float32:
        assert model.model.layers[1].mlp.gate.e_score_correction_bias[0] == torch.tensor(1 / 3)
    loss = model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss
    assert torch.isfinite(loss)
