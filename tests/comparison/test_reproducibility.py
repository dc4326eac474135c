"""The same command gives the same bytes, and the checkpoint says what it was made of."""

import json
from pathlib import Path

import pytest

from bitsmoe_modifier import __version__
from bitsmoe_modifier.checkpoints.describe import describe
from bitsmoe_modifier.cli import main


def quantized(tiny: Path, out: Path, seed: int = 3) -> Path:
    recipe = out.with_suffix(".yaml")
    recipe.write_text("quant_stage: {quant_modifiers: {BitsMoEModifier: {bits: 3.0, group_size: 16, block_size: 16}}}")
    sizes = ["--samples", "16", "--seq-len", "32", "--seed", str(seed)]
    files = ["--model", str(tiny / "model"), "--calibration", str(tiny / "calibration.txt"), "--recipe", str(recipe)]
    assert main(["quantize", *files, *sizes, "--out", str(out)]) == 0
    return out


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def test_same_inputs_same_bytes(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two, other = (quantized(tiny, tmp_path / name, seed) for name, seed in (("one", 3), ("two", 3), ("other", 4)))
    assert weights(one) == weights(two) != weights(other)
    for name in ("config.json", "recipe.yaml", "bitsmoe_report.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name

    made = [describe(folder)["made_of"] for folder in (one, other)]
    assert made[0]["seed"] == 3
    assert made[0]["versions"]["bitsmoe-modifier"] == __version__
    assert made[0]["calibration"]["tokens"] == 16 * 32
    assert made[0]["calibration"] != made[1]["calibration"]
    assert made[0]["model"]["weights"] == made[1]["model"]["weights"]
    capsys.readouterr()
    assert main(["inspect", str(one)]) == 0
    said = capsys.readouterr().out
    assert f"bitsmoe-modifier {__version__}" in said
    assert "512 tokens" in said
    assert "seed 3" in said


def test_checkpoint_without_a_record_is_described(tiny: Path, tmp_path: Path) -> None:
    folder = quantized(tiny, tmp_path / "out")
    report = folder / "bitsmoe_report.json"
    report.write_text(json.dumps({"layers": json.loads(report.read_text())["layers"]}))
    assert describe(folder)["made_of"] == {}
    assert main(["inspect", str(folder)]) == 0
