"""A model whose files lack a tensor is refused by every way in: transformers would make the tensor up."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from llmcompressor import oneshot
from safetensors.torch import load_file, save_file

from bitsmoe_modifier import CheckpointError
from bitsmoe_modifier.calibration.oneshot import Offload, QuantizeSettings, quantize
from bitsmoe_modifier.evaluation.evaluate import load_model
from helpers import calibration

YAML = "a_stage: {q_modifiers: {BitsMoEModifier: {bits: 3.0}}}"
LACKING = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def lacking(dense_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    folder = tmp_path / "lacking"
    shutil.copytree(dense_checkpoint("qwen3_moe"), folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[LACKING]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("offload", [False, True])
def test_the_commands(lacking: Path, tmp_path: Path, offload: bool) -> None:
    settings = QuantizeSettings(offload=Offload(tmp_path, 0) if offload else None)
    with pytest.raises(CheckpointError, match=f"no file holds {LACKING}"):
        quantize(lacking, YAML, torch.zeros(2, 8, dtype=torch.int64), tmp_path / "out", settings)


def test_measuring(lacking: Path) -> None:
    with pytest.raises(CheckpointError, match=f"no file holds {LACKING}"):
        load_model(str(lacking), torch.float32, torch.device("cpu"))


def test_oneshot_with_a_path(lacking: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"no file holds {LACKING}"):
        oneshot(model=str(lacking), recipe=YAML, dataset=calibration(), output_dir=tmp_path / "out")
