"""The model card of a checkpoint."""

from pathlib import Path

import pytest
import yaml

from bitsmoe_modifier.checkpoints.card import card, write_card
from entries import REFERENCE, ours
from helpers import pack_randomly, save, tiny_model


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A checkpoint and the bytes of its experts."""
    model = tiny_model("qwen3_moe")
    layers = pack_randomly(model)
    folder = save(model, tmp_path_factory.mktemp("card") / "tiny-2bit")
    return folder, sum(layer.packed.nbytes for layer in layers.values())


RECIPE = "quant_stage: {quant_modifiers: {BitsMoEModifier: {bits: 2.0}}}"
WEIGHTS = 2 * 8 * 3 * 32 * 64


def test_a_card_of_a_hub_model(packed):
    folder, experts = packed
    text = card(folder, "org/model", RECIPE)
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["base_model"] == "org/model"
    assert "bitsmoe" in metadata["tags"]
    assert f"{8 * experts / WEIGHTS:.4f} bits per expert weight" in text
    assert "# tiny-2bit" in text
    assert RECIPE in text
    assert "import bitsmoe_modifier" in text
    assert "Not measured yet" in text


def test_an_odd_name_stays_yaml(packed):
    text = card(packed[0], 'org/a: "b" # <c>', RECIPE)
    assert yaml.safe_load(text.split("---")[1])["base_model"] == 'org/a: "b" # <c>'
    assert 'org/a: "b" # <c>, quantized by' in text, "Markdown is not HTML"


def test_a_local_model_is_named_without_its_path(packed, tmp_path):
    text = card(packed[0], str(tmp_path), RECIPE)
    assert "base_model" not in text
    assert str(tmp_path) not in text
    assert f"{tmp_path.name}, quantized by" in text


def test_quality_is_a_table(packed):
    quality = {"reference": REFERENCE, "run": ours("bitsmoe_2_0", 2.0, 0.004), "how": "So it was measured."}
    write_card(packed[0], "org/model", RECIPE, quality)
    text = (packed[0] / "README.md").read_text()
    assert "| unquantized |" in text
    assert "| bitsmoe_2_0 |" in text
    assert "So it was measured." in text


def test_a_dense_checkpoint_needs_no_plugin(dense_checkpoint):
    assert "bitsmoe_modifier" not in card(dense_checkpoint("qwen3_moe"), "org/model", RECIPE)
