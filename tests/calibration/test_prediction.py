"""The survey's prediction: what it says of a size is what the designs of that size say, and budgets are found by it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from llmcompressor import oneshot

from bitsmoe_modifier import BitsMoEModifier, RecipeError
from bitsmoe_modifier.calibration import modifier as calibrating
from bitsmoe_modifier.calibration import surveying
from bitsmoe_modifier.calibration.oneshot import QuantizeSettings
from bitsmoe_modifier.calibration.prediction import Prediction, Surveyed, corrected, designs_under
from bitsmoe_modifier.calibration.recipe import read_stages
from bitsmoe_modifier.comparison.predicting import curve_lines
from bitsmoe_modifier.method.design import LayerPlan
from bitsmoe_modifier.method.layer import QuantizerSettings
from helpers import calibration, experts_names, load, tiny_model
from published import publish

#: without an input basis, of which a design may leave out directions and spend what that saves
FIELDS = {
    "input_basis": "none",
    "group_size": 16,
    "block_size": 16,
    "solver": "lagrangian",
    "refine_passes": 0,
    "error_feedback": False,
}
TOKENS = 6 * 32

Checkpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def source(dense_checkpoint: Checkpoint) -> Path:
    return dense_checkpoint("qwen3_moe")


@pytest.fixture(scope="module")
def surveyed(source: Path) -> tuple[dict[str, LayerPlan], Prediction]:
    plans: dict[str, LayerPlan] = {}
    survey, recipe = calibrating.survey_layers, [BitsMoEModifier(**FIELDS, survey_only=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrating, "survey_layers", lambda *args: plans.update(survey(*args)) or plans)
        with pytest.raises(Surveyed) as caught:
            oneshot(model=load(source), dataset=calibration(), recipe=recipe)
    return plans, caught.value.prediction


@pytest.mark.parametrize("bits", [2.5, 3.0, 4.0])
def test_prediction_is_the_designs_cost(surveyed: tuple[dict[str, LayerPlan], Prediction], bits: float) -> None:
    plans, prediction = surveyed
    designs = designs_under(plans, bits)
    cost = sum(design.predicted_distortion for design in designs.values())
    # the curve is of linear relaxations; designs are whole, and layers share in steps of 256 points
    assert prediction.at(bits) == pytest.approx(float(corrected(cost / (2 * TOKENS))), rel=0.05)


def test_more_bits_lose_less(surveyed: tuple[dict[str, LayerPlan], Prediction]) -> None:
    _, prediction = surveyed
    assert (np.diff(prediction.bits) >= 0).all()
    assert (np.diff(prediction.kld) <= 0).all()
    assert prediction.at(0.01) == np.inf


def test_least_size_for_a_loss() -> None:
    prediction = Prediction(np.array([1.0, 2.0, 3.0]), np.array([0.1, 0.01, 0.001]))
    assert prediction.at(1.5) == pytest.approx(0.1**1.5)
    assert prediction.bits_for(0.01, 4) == 2.0
    assert prediction.bits_for(1.0, 4) == 1.0
    bits = prediction.bits_for(0.005, 4)
    assert prediction.at(bits) <= 0.005 < prediction.at(bits - 0.001)
    with pytest.raises(RecipeError, match=r"max_kld: 0\.0001 is not reached by 4 bits, where 0\.001 is predicted"):
        prediction.bits_for(0.0001, 4)


def test_a_run_finds_its_own_budget(
    source: Path, surveyed: tuple[dict[str, LayerPlan], Prediction], tmp_path: Path
) -> None:
    """And its record has the bits, so that the recipe in the checkpoint says what was made."""
    _, prediction = surveyed
    wanted = prediction.at(3.3)
    recipe = BitsMoEModifier(**FIELDS, max_kld=wanted, resume_dir=str(tmp_path / "kept"))
    model = load(source)
    oneshot(model=model, dataset=calibration(), recipe=[recipe])
    assert recipe.bits == pytest.approx(3.3, abs=2e-3)
    measured = [model.get_submodule(name).report.bits for name in experts_names(load(source))]
    assert np.mean(measured) == pytest.approx(recipe.bits, rel=0.02)
    assert [path.name[:8] for path in (tmp_path / "kept").glob("*-bits-*")] == [f"{recipe.bits:g}-bits"[:8]]


def test_it_takes_a_survey() -> None:
    with pytest.raises(ValueError, match="max_kld needs the survey"):
        BitsMoEModifier(max_kld=0.01, scope="layer")


def test_the_rounding_settings_change_no_plan(
    source: Path, surveyed: tuple[dict[str, LayerPlan], Prediction], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kept survey serves any value of the fields that its record leaves out."""
    other: dict[str, LayerPlan] = {}
    survey = calibrating.survey_layers
    monkeypatch.setattr(calibrating, "survey_layers", lambda *args: other.update(survey(*args)) or other)
    changes = {"bits": 5.0, "compensation": False, "refine_passes": 2, "solver": "highs"}
    assert changes.keys() | {"max_kld"} == calibrating._ROUNDING_FIELDS
    recipe = [BitsMoEModifier(**{**FIELDS, **changes}, survey_only=True)]
    with pytest.raises(Surveyed):
        oneshot(model=load(source), dataset=calibration(), recipe=recipe)
    for name, plan in surveyed[0].items():
        assert isinstance(plan.settings, QuantizerSettings)
        for one, two in zip((*plan.inputs, *plan.outputs), (*other[name].inputs, *other[name].outputs), strict=True):
            assert torch.equal(one.costs.distortion, two.costs.distortion)
            assert torch.equal(one.weight, two.weight)


def test_the_curve_in_a_terminal() -> None:
    prediction = Prediction(np.array([1.0, 2.0, 4.0]), np.array([0.1, 0.01, 0.0001]))
    lines = curve_lines(prediction)
    assert lines[1].split() == ["1.00", "100", "#" * 40]
    assert lines[-2].split() == ["4.00", "0.1", "#"]
    assert lines[-1] == "to a factor of 1.8 on a model of which no loss is known"


def test_a_survey_takes_what_quantize_takes(tmp_path: Path) -> None:
    """Settings that cannot be saved as they are, and a recipe that asks for the folder's layers beside the model."""
    source = publish(tiny_model("qwen3_moe", num_hidden_layers=2), tmp_path / "source")
    fields = "bits: 3.0, block_size: 16, codes: scalar, error_feedback: false, mtp: quantize"
    (tmp_path / "recipe.yaml").write_text(f"a_stage: {{q_modifiers: {{BitsMoEModifier: {{{fields}}}}}}}")
    (stage,) = read_stages(tmp_path / "recipe.yaml")
    rows = torch.randint(4, 30, (8, 32), generator=torch.Generator().manual_seed(0))
    assert surveying.survey(source, stage, rows, QuantizeSettings(batch_size=4)).bits[0] < 3
