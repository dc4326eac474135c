"""What other modifiers quantize beside packed experts is loaded as it was in memory."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file

from bitsmoe_modifier import BitsMoEModifier, CheckpointError
from bitsmoe_modifier.calibration import other_schemes
from bitsmoe_modifier.evaluation.evaluate import load_model
from helpers import calibration, load, logits, packed_modules

FIELDS = {"bits": 4.0, "group_size": 16, "block_size": 16, "scope": "layer"}
ATTENTION, EXPERTS = "re:.*self_attn[.](q|k|v|o)_proj$", r"re:.*layers[.]0[.]mlp[.]experts[.]\d+[.].*_proj$"
CHANNELS, GROUPS = {"strategy": "channel"}, {"strategy": "group", "group_size": 32}


@pytest.mark.parametrize(
    ("kind", "bits", "groups", "symmetric", "target"),
    [
        (GPTQModifier, 4, GROUPS, False, ATTENTION),
        (QuantizationModifier, 4, CHANNELS, False, ATTENTION),
        (QuantizationModifier, 3, GROUPS, False, ATTENTION),
        (QuantizationModifier, 4, CHANNELS, True, ATTENTION),
        (GPTQModifier, 4, GROUPS, True, EXPERTS),
    ],
    ids=["asymmetric", "asymmetric-channels", "asymmetric-3", "symmetric", "experts"],
)
def test_integer_weights(
    kind: type,
    bits: int,
    groups: dict[str, object],
    symmetric: bool,
    target: str,
    dense_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Zero points of asymmetric ones, as AWQ's recipes have them, are stored packed."""
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, **groups}
    other = kind(config_groups={"some": {"targets": [target], "weights": weights}})
    ours = BitsMoEModifier(**FIELDS, ignore=["re:.*layers[.]0[.].*"] if target == EXPERTS else [])
    model = load(dense_checkpoint("qwen3_moe"))
    oneshot(model=model, recipe=[other, ours], dataset=calibration(), output_dir=tmp_path)
    loaded = load(tmp_path)
    assert len(packed_modules(loaded)) == (1 if target == EXPERTS else 2)
    assert any(key.endswith("zero_point") for key in load_file(tmp_path / "model.safetensors")) == (not symmetric)
    with torch.no_grad():
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrong", ["asymmetric", "several"])
def test_experts_that_transformers_misreads(
    wrong: str, dense_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes one symmetric scheme for all; what cannot be decoded by that is not to be measured either."""
    monkeypatch.setattr(other_schemes, "_misread", lambda *_: "")  # such recipes are refused by now

    def group(names: str, bits: int) -> dict[str, object]:
        weights = {"num_bits": bits, "type": "int", "symmetric": wrong != "asymmetric", **GROUPS}
        return {"targets": [f"re:.*layers[.]0[.]mlp[.]experts[.]\\d+[.]({names})_proj$"], "weights": weights}

    groups = {"a": group("gate|up", 4), "b": group("down", 4 if wrong == "asymmetric" else 8)}
    recipe = [QuantizationModifier(config_groups=groups), BitsMoEModifier(**FIELDS, ignore=["re:.*layers[.]0[.].*"])]
    model = load(dense_checkpoint("qwen3_moe"))
    oneshot(model=model, recipe=recipe, dataset=calibration(), output_dir=tmp_path)
    said = "let one symmetric scheme quantize the experts that are not packed as bitsmoe"
    with pytest.raises(CheckpointError, match=said):
        load(tmp_path)
    with pytest.raises(CheckpointError, match=said):
        load_model(str(tmp_path), torch.float32, torch.device("cpu"))
