"""`bitsmoe quantize --offload-dir`: weights wait on disk, and the checkpoint is the one of a model in memory."""

from pathlib import Path
from typing import Any

import pytest
from compressed_tensors.offload import load

from bitsmoe_modifier.calibration import oneshot as quantizing
from bitsmoe_modifier.calibration.oneshot import restore_dtypes
from bitsmoe_modifier.cli import main

RECIPE = """
quant_stage:
  quant_modifiers:
    GPTQModifier:
      targets: ["re:.*self_attn.*_proj$"]
      config_groups:
        attention:
          targets: ["re:.*self_attn.*_proj$"]
          weights: {num_bits: 4, type: int, symmetric: true, strategy: group, group_size: 16}
    BitsMoEModifier: {bits: 4.0, group_size: 16, block_size: 16}
"""


def command(tiny: Path, out: Path, *options: str) -> list[str]:
    recipe = out.with_name("recipe.yaml")
    recipe.write_text(RECIPE)
    inputs = ["--model", str(tiny / "model"), "--recipe", str(recipe), "--calibration", str(tiny / "calibration.txt")]
    return ["quantize", *inputs, "--out", str(out), "--samples", "16", "--seq-len", "32", *options]


def test_same_checkpoint_as_in_memory(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting, on_disk = tmp_path / "waiting", []

    def finishing(*arguments: Any) -> None:
        on_disk.extend(waiting.glob("*/*"))
        restore_dtypes(*arguments)

    monkeypatch.setattr(load, "_get_cpu_memory", lambda *_: {"cpu": 10_000})  # no machine of tests is that small
    monkeypatch.setattr(quantizing, "restore_dtypes", finishing)
    offloaded, plain = tmp_path / "offloaded", tmp_path / "plain"
    assert main(command(tiny, offloaded, "--offload-dir", str(waiting))) == 0
    assert len(on_disk) > 10, "a file for every tensor"
    assert not list(waiting.iterdir()), "nothing stays there"
    assert main(command(tiny, plain, "--dtype", "bfloat16")) == 0
    for name in ("model.safetensors", "config.json"):
        assert (offloaded / name).read_bytes() == (plain / name).read_bytes()


def test_another_dtype_is_refused(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--offload-dir", str(tmp_path / "waiting"), "--dtype", "float32")
    assert main(command(tiny, tmp_path / "out", *options)) == 2
    assert "leave out --dtype" in capsys.readouterr().err
