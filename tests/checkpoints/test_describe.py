"""What `inspect` says about a checkpoint, against the layers that were packed."""

import json
from collections import Counter
from pathlib import Path

import pytest

from bitsmoe_modifier.checkpoints.describe import describe, render
from bitsmoe_modifier.errors import CheckpointError
from helpers import pack_randomly, save, tiny_model


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory):
    """A packed tiny model on disk, and its layers by name."""
    folder = tmp_path_factory.mktemp("packed")
    model = tiny_model("qwen3_moe")
    layers = pack_randomly(model)
    return save(model, folder), layers


def test_layers_are_described_as_they_were_packed(packed):
    folder, layers = packed
    found = describe(folder)
    assert [layer["name"] for layer in found["layers"]] == sorted(layers)
    for layer in found["layers"]:
        made = layers[layer["name"]].packed
        assert sum(layer["bytes"].values()) == made.nbytes
        assert layer["bytes"]["codes"] == made.codes_in.nbytes + made.codes_out.nbytes
        assert layer["bytes"]["scales"] == made.steps_in.nbytes + made.steps_out.nbytes
        assert layer["bits"] == pytest.approx(made.bits_per_weight)
        assert sum(layer["bits_apart"].values()) == pytest.approx(layer["bits"], rel=1e-12)
        bases = made.basis_in.nbytes + made.basis_in_step.nbytes + made.basis_out.nbytes + made.basis_out_step.nbytes
        assert layer["bits_apart"]["bases"] == 8 * bases / (8 * 3 * 32 * 64)
        assert layer["bit_widths"]["gate"] == dict(Counter(made.widths_in[:, 0].flatten().tolist()))
        assert layer["bit_widths"]["up"] == dict(Counter(made.widths_in[:, 1].flatten().tolist()))
        assert layer["bit_widths"]["down"] == dict(Counter(made.widths_out.flatten().tolist()))
    total = sum(m.packed.nbytes for m in layers.values())
    assert found["bytes"]["packed experts"] == found["bytes"]["experts"] == total


def test_the_description_is_json_and_readable(packed):
    found = describe(packed[0])
    assert json.loads(json.dumps(found))["model_type"] == "qwen3_moe"
    text = render(found)
    assert "bits per expert weight" in text
    assert f"bases {found['bits_apart']['bases']:.3f}" in text
    for layer in found["layers"]:
        assert layer["name"] in text
    assert "tokens" not in text


def test_what_the_quantization_noted_is_shown(packed, tmp_path: Path):
    folder, layers = packed
    copied = tmp_path / "checkpoint"
    copied.mkdir()
    for file in folder.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    first, second = sorted(layers)
    note = {"tokens_per_expert": [0, 9, 4, 0, 7], "relative_output_error": 0.0123}
    for noted in ({first: note}, {"renamed.0.x": note, "renamed.1.x": {}}, {second: {}, first: note}):
        (copied / "bitsmoe_report.json").write_text(json.dumps({"layers": noted}))
        found = describe(copied)
        assert found["layers"][0]["quantization"] == note
        text = render(found)
        assert "per expert 0 … 9, median 4, none for 2" in text
        assert "1.23 %" in text


def test_a_dense_checkpoint_is_described_too(tmp_path: Path):
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    found = describe(str(tmp_path))
    assert found["layers"] == []
    assert "no experts packed by BitsMoE" in render(found)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        describe(tmp_path)
