"""Stages of recipes: what is read, what is refused, and that the shipped recipes are sound."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bitsmoe_modifier.calibration.recipe import check_stage, find_recipe, read_stages, select, with_fields
from bitsmoe_modifier.calibration.recipe_names import fields_of, modifiers
from bitsmoe_modifier.checkpoints.plan import plan_command
from bitsmoe_modifier.errors import RecipeError
from bitsmoe_modifier.sources.demo import demo_asset

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
        ("a_stage: {q_modifiers: [{X: {}}]}", "q_modifiers is a list; .* without dashes"),
        ("a_stage: {q_modifiers: {X: 3}}", "X must have its fields below it, found 3"),
        ("../up_stage: {q_modifiers: {X: {}}}", "names a folder"),
        ("_stage: {q_modifiers: {X: {}}}", "names a folder"),
    ],
    ids=["empty", "no-stage", "list", "broken", "no-body", "no-group", "dashes", "no-fields", "path", "no-name"],
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
        ("BitsMoEModifier: {bitz: 2}", r"recipe\.yaml:1: BitsMoEModifier has no field 'bitz'; did you mean 'bits'\?"),
        ("BitsMoEModifier: {bit_widths: [5]}", r"a: bit_widths: .*5.* cannot be stored"),
        ("GPTQModifier: {block_size: many}", r"a: block_size: .*integer"),
        ("NoSuchModifier: {}", r"recipe\.yaml:1: no modifier is called 'NoSuchModifier'; there are .*BitsMoEModifier"),
    ],
    ids=["value", "field", "width", "other-modifier", "modifier"],
)
def test_wrong_fields_are_found_before_any_work(tmp_path, modifier, message):
    stage = read_stages(recipe(tmp_path, f"a_stage: {{q_modifiers: {{{modifier}}}}}"))[0]
    with pytest.raises(RecipeError, match=message):
        check_stage(stage)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "q_stage:\n  q_modifiers:\n    BitsMoEModifer:\n      bits: 2",
            "l:3: no modifier .*; did you mean 'BitsMoEMod",
        ),
        ("q_stage:\n  q_modifiers:\n    bitsmoemodifier: {}", "l:3: no modifier .*; did you mean 'BitsMoEModifier'"),
        ("q_stage:\n  q_modifiers:\n    GTPQModifier: {}", "l:3: no modifier .*; did you mean 'GPTQModifier'"),
        (
            "# a\nq_stage:\n  q_modifiers:\n    BitsMoEModifier:\n      bits: 2\n      groupsize: 64",
            r"l:6: BitsMoEModifier has no field 'groupsize'; did you mean 'group_size'\?",
        ),
        (
            "q_stage:\n  q_modifiers:\n    GPTQModifier:\n      damp: 0.1",
            "l:4: GPTQModifier has no field 'damp'; .*dampening_frac",
        ),
        (
            "q_stage:\n  q_modifiers:\n    BitsMoEModifier:\n      bits: 2\n      bits: 3",
            r"l:5: 'bits' .*second .*line 4",
        ),
        (
            "q_stages:\n  q_modifiers: {}\nb_stage: {q_modifiers: {BitsMoEModifier: {}}}",
            "l:1: 'q_stages' .*write q_stage",
        ),
        ("q_stage:\n  quant_modifier: {BitsMoEModifier: {}}", "l:2: 'quant_modifier' .*write quant_modifiers"),
    ],
    ids=["modifier", "case", "other-modifier", "field", "other-field", "twice", "stage", "group"],
)
def test_typos_say_file_line_and_the_nearest_name_before_heavy_imports(tmp_path, text, message):
    path = recipe(tmp_path, text)
    with pytest.raises(RecipeError, match=message):
        select(read_stages(path), None)
    code = (
        "import sys; from pathlib import Path; from bitsmoe_modifier.calibration.recipe import read_stages, select\n"
        f"try: select(read_stages(Path({str(path)!r})), None)\n"
        "except ValueError: print([m for m in ('torch', 'transformers', 'llmcompressor') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_a_typo_in_a_stage_that_is_not_run_does_not_matter(tmp_path):
    text = "a_stage: {q_modifiers: {BitsMoEModifier: {}}}\nb_stage: {q_modifiers: {BitsMoEModifier: {bitz: 2}}}"
    assert [stage.name for stage in select(read_stages(recipe(tmp_path, text)), ["a"])] == ["a"]


def test_fields_and_modifiers_are_those_that_there_are():
    """What is read from the sources is what the classes have."""
    from llmcompressor.modifiers import ModifierFactory

    import bitsmoe_modifier  # noqa: F401

    ModifierFactory.refresh()
    registered = {**ModifierFactory._main_registry, **ModifierFactory._registered_registry}
    assert {name for name in registered if name.endswith("Modifier") and name != "Modifier"} <= modifiers()
    for name, kind in registered.items():
        if kind.__name__ == name:
            assert set(kind.model_fields) <= fields_of(name), name


def test_an_unknown_recipe_name_gets_the_nearest():
    with pytest.raises(RecipeError, match=r"ab_gptq_bitmoe: no such recipe file; did you mean 'ab_gptq_bitsmoe'\?"):
        find_recipe("ab_gptq_bitmoe")


def test_autoround_is_calibrated_row_by_row() -> None:
    shipped = {stage.name: stage for stage in read_stages(find_recipe("ab_all"))}
    assert shipped["autoround_w3"].calibration_batch(16) == 1
    assert shipped["gptq_w3"].calibration_batch(16) == 16


def test_options_are_called_as_on_the_command_line(tmp_path: Path) -> None:
    (stage,) = read_stages(recipe(tmp_path, "a_stage: {q_modifiers: {GPTQModifier: {scheme: W4A16}}}"))
    with pytest.raises(RecipeError, match="a: only a BitsMoEModifier takes --fast, --max-kld; the recipe has none"):
        with_fields(stage, error_feedback=False, max_kld=0.1)


def test_fields_for_two_of_ours(tmp_path: Path) -> None:
    text = "q_stage: {a_modifiers: {BitsMoEModifier: {ignore: [a]}}, b_modifiers: {BitsMoEModifier: {ignore: [b]}}}"
    (stage,) = read_stages(recipe(tmp_path, text))
    with pytest.raises(RecipeError, match="bits is of one BitsMoEModifier, the recipe has 2; write it in the recipe"):
        with_fields(stage, bits=2.0)
    both = [args["ignore"] for _, args in with_fields(stage, ignore=["c"]).modifiers]
    assert both == [["a", "c"], ["b", "c"]]
    with pytest.raises(RecipeError, match="plan counts one BitsMoEModifier, the stage q has 2"):
        plan_command(demo_asset("docmoe"), stage, 1000, "auto", "cpu")


def test_mappings_that_are_merged_in(tmp_path: Path) -> None:
    text = """
    a_stage: {q_modifiers: {BitsMoEModifier: &common {bits: 2.0, codes: scalar}}}
    b_stage: {q_modifiers: {BitsMoEModifier: {<<: *common, bits: 3.0}}}
    """
    stages = read_stages(recipe(tmp_path, text))
    assert [stage.problem for stage in stages] == ["", ""]
    assert stages[1].modifiers == (("BitsMoEModifier", {"bits": 3.0, "codes": "scalar"}),)


@pytest.mark.parametrize("value", ["'re:.*layers.0.*'", ""])
def test_what_to_ignore_is_added_to_a_list_alone(tmp_path: Path, value: str) -> None:
    (stage,) = read_stages(recipe(tmp_path, f"a_stage:\n q_modifiers:\n  BitsMoEModifier:\n   ignore: {value}\n"))
    with pytest.raises(RecipeError, match=r"a: ignore: .* is no list; write ignore: "):
        with_fields(stage, ignore=["b"])


def test_a_recipes_text_is_no_name_of_one() -> None:
    with pytest.raises(RecipeError, match=r"^a_stage: .{191}…: no such recipe file"):
        find_recipe("a_stage: " + 1000 * "x")
