"""Stages of recipes: what is read, what is refused, and that the shipped recipes are sound."""

from pathlib import Path

import pytest
import yaml

from bitsmoe_modifier.calibration.recipe import check_stage, find_recipe, read_stages, select
from bitsmoe_modifier.errors import RecipeError

SHIPPED = ("ab_gptq_bitsmoe", "w2", "w2_attn_gptq_w4")


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


TWO = """
notes: {x_modifiers: {Other: {}}}
w2_stage:
  quant_modifiers:
    GPTQModifier: {config_groups: {a: {targets: [Linear], weights: {num_bits: 2}}}}
w2_long_stage:
  first_modifiers: {BitsMoEModifier: {bits: 1.6}}
  second_modifiers: {GPTQModifier: {scheme: W4A16, targets: [Linear]}}
plain_stage:
  quant_modifiers:
    BitsMoEModifier:
"""


def test_stages_are_read_in_order(tmp_path):
    stages = read_stages(recipe(tmp_path, TWO))
    assert [s.name for s in stages] == ["w2", "w2_long", "plain"]
    assert [[kind for kind, _ in s.modifiers] for s in stages] == [
        ["GPTQModifier"],
        ["BitsMoEModifier", "GPTQModifier"],
        ["BitsMoEModifier"],
    ]


def test_nominal_bits_are_those_of_the_experts(tmp_path):
    assert [s.nominal_bits for s in read_stages(recipe(tmp_path, TWO))] == [2.0, 1.6, None]


@pytest.mark.parametrize(("scheme", "bits"), [("W4A16", 4), ("W8A8", 8), ("FP8_DYNAMIC", None)])
def test_nominal_bits_of_preset_schemes(tmp_path, scheme, bits):
    text = f"a_stage: {{q_modifiers: {{QuantizationModifier: {{scheme: {scheme}, targets: [Linear]}}}}}}"
    assert read_stages(recipe(tmp_path, text))[0].nominal_bits == bits


def test_a_stage_carries_itself_alone(tmp_path):
    first, *_, plain = read_stages(recipe(tmp_path, TWO))
    assert list(yaml.safe_load(first.text)) == ["w2_stage"]
    assert yaml.safe_load(plain.text) == {"plain_stage": {"quant_modifiers": {"BitsMoEModifier": {}}}}


def test_select_keeps_the_recipes_order(tmp_path):
    stages = read_stages(recipe(tmp_path, TWO))
    assert [s.name for s in select(stages, ["plain", "w2"])] == ["w2", "plain"]
    assert select(stages, None) == stages


def test_select_refuses_unknown_arms_and_names_the_known(tmp_path):
    with pytest.raises(RecipeError, match=r"no stage w5, w6; it has w2, w2_long, plain"):
        select(read_stages(recipe(tmp_path, TWO)), ["w5", "w2", "w6"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no stages"),
        ("quant: {a_modifiers: {X: {}}}", "has no stages.*'_stage'"),
        ("- a\n- b", "has no stages"),
        ("a: [", "not valid YAML"),
        ("a_stage:", "a_stage has no modifiers.*'_modifiers'"),
        ("a_stage: {quant: {X: {}}}", "has no modifiers"),
        ("a_stage: {q_modifiers: {X: 3}}", "X must have its fields below it, found 3"),
        ("../up_stage: {q_modifiers: {X: {}}}", "names a folder"),
        ("_stage: {q_modifiers: {X: {}}}", "names a folder"),
    ],
    ids=["empty", "no-stage", "list", "broken", "no-body", "no-group", "no-fields", "path", "no-name"],
)
def test_unusable_recipes_are_refused(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message):
        read_stages(recipe(tmp_path, text))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_are_found_by_name_and_can_be_built(name):
    stages = read_stages(find_recipe(name))
    for stage in stages:
        check_stage(stage)
        assert stage.nominal_bits is not None


def test_the_default_recipe_has_the_arms_that_it_promises():
    stages = read_stages(find_recipe("ab_gptq_bitsmoe"))
    assert {s.name: s.nominal_bits for s in stages} == {
        "gptq_w2": 2,
        "gptq_w3": 3,
        "gptq_w4": 4,
        "bitsmoe_2_0": 2.0,
        "bitsmoe_1_6": 1.6,
    }


def test_an_unknown_recipe_is_refused_with_the_shipped_ones():
    shipped = ", ".join(sorted(path.stem for path in (Path(__file__).parents[2] / "recipes").glob("*.yaml")))
    with pytest.raises(RecipeError, match=f"w3: no such recipe file; the shipped recipes are {shipped}$"):
        find_recipe("w3")


@pytest.mark.parametrize(
    ("modifier", "message"),
    [
        ("BitsMoEModifier: {bits: -1}", r"a: bits: .*greater than 0"),
        ("BitsMoEModifier: {bitz: 2}", r"a: bitz: .*not permitted"),
        ("BitsMoEModifier: {bit_widths: [5]}", r"a: bit_widths: .*5.* cannot be stored"),
        ("GPTQModifier: {block_size: many}", r"a: block_size: .*integer"),
        ("NoSuchModifier: {}", r"a: .*NoSuchModifier"),
    ],
    ids=["value", "field", "width", "other-modifier", "modifier"],
)
def test_wrong_fields_are_found_before_any_work(tmp_path, modifier, message):
    stage = read_stages(recipe(tmp_path, f"a_stage: {{q_modifiers: {{{modifier}}}}}"))[0]
    with pytest.raises(RecipeError, match=message):
        check_stage(stage)


def test_autoround_is_calibrated_row_by_row() -> None:
    shipped = {stage.name: stage for stage in read_stages(find_recipe("ab_all"))}
    assert shipped["autoround_w3"].calibration_batch(16) == 1
    assert shipped["gptq_w3"].calibration_batch(16) == 16
