"""The model card of a checkpoint."""

from pathlib import Path

import pytest
import yaml

from bitsmoe_modifier.checkpoints.card import card, note_quality, write_card
from bitsmoe_modifier.checkpoints.quality import kept_quality
from bitsmoe_modifier.errors import CheckpointError
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


def test_eval_puts_its_figures_in_the_place_of_earlier_ones(packed):
    folder = packed[0]
    write_card(folder, "org/model", RECIPE)
    before = (folder / "README.md").read_text()
    for kld in (0.004, 0.005):
        assert note_quality(folder, {"reference": REFERENCE, "run": ours("mine", 2.0, kld), "how": "By eval."})
        text = (folder / "README.md").read_text()
        assert f"| {1000 * kld:.2f} ± 0.01 |" in text.replace("**", "")
        assert text.count("By eval.") == 1
        assert "Not measured yet" not in text
        sections = [line for line in text.splitlines() if line.startswith("## ")]
        assert sections == [line for line in before.splitlines() if line.startswith("## ")]
    (folder / "README.md").write_text("# Mine")
    assert not note_quality(folder, {"reference": REFERENCE, "run": ours("mine", 2.0, 0.1), "how": ""})
    assert (folder / "README.md").read_text() == "# Mine"


def test_texts_of_both_models_stand_in_the_card(packed):
    tokens = [["\n\n", 0.0], [" a|b", 0.002], [" *c* <d>", 0.004]]
    samples = [{"prompt": "Once | upon", "unquantized": tokens, "quantized": "x\n# y"}]
    write_card(packed[0], "org/model", RECIPE)
    for run in ("first", "second"):
        quality = {"reference": REFERENCE, "run": ours(run, 2.0, 0.004), "how": "So.", "samples": samples}
        assert note_quality(packed[0], quality)
    text = (packed[0] / "README.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("| Once")]
    assert row == "| Once \\| upon | ⏎ a\\|b \\*c\\* &lt;d> | x ⏎ \\# y | 2.00 |"
    assert "| second |" in text.replace("**", "")
    assert "| first |" not in text
    kept = kept_quality(packed[0])
    assert kept["samples"] == samples
    assert kept["run"]["kld_mean"] == 0.004


def test_figures_that_are_none_are_refused_by_name(tmp_path):
    assert kept_quality(tmp_path) is None
    (tmp_path / "bitsmoe_quality.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"bitsmoe_quality\.json holds no figures; delete it"):
        kept_quality(tmp_path)


def test_install_lines_are_those_of_a_clone_or_a_wheel(packed):
    text = card(packed[0], "org/model", RECIPE)
    assert "pip install ." in text
    assert 'pip install ".[vllm]"' in text
    assert "pip install bitsmoe-modifier" not in text
