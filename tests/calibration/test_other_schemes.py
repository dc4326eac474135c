"""What other modifiers could not store, or nobody could read, is refused before weights are read."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from bitsmoe_modifier.calibration.other_schemes import check_schemes
from bitsmoe_modifier.calibration.recipe import read_stages
from bitsmoe_modifier.cli import main
from bitsmoe_modifier.comparison.runs import Job, check_inputs
from bitsmoe_modifier.errors import RecipeError
from tiny_text import save_letters, write_text

EXPERTS = "re:.*[.]experts[.]\\d+[.](gate|up|down)_proj$"
FIRST = "model.layers.0.mlp.experts.0.down_proj"


def groups(targets: str, size: int) -> dict[str, object]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": size}
    return {"config_groups": {"some": {"targets": [targets], "weights": weights}}}


def write_recipe(path: Path, **fields: object) -> Path:
    """A run of our modifier, and one of GPTQ with these fields beside it."""
    ours = {"BitsMoEModifier": {"bits": 4.0, "group_size": 16, "block_size": 16, "scope": "layer"}}
    other = {"first_stage": {"q_modifiers": ours}, "other_stage": {"q_modifiers": {"GPTQModifier": fields, **ours}}}
    path.write_text(yaml.safe_dump(other))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder without weights: experts of 8 × 48 × 64, of which nobody may read more than the sizes."""
    from helpers import tiny_config

    folder = tmp_path_factory.mktemp("wide")
    tiny_config("qwen3_moe", moe_intermediate_size=48, architectures=["Qwen3MoeForCausalLM"]).save_pretrained(folder)
    return save_letters(folder)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (groups(EXPERTS, 32), f"its group size 32 does not divide 48, the columns of {FIRST} and of 15 more; in con"),
        (groups(EXPERTS, 32), "set group_size to 16, or add these layers to its `ignore`"),
        ({**groups(EXPERTS, 32), "bypass_divisibility_checks": True}, "its group size 32 does not divide 48"),
        (
            {"scheme": "W4A16", "targets": ["re:.*o_proj$"]},
            "128 does not divide 64, the columns of model.layers.0.self",
        ),
        (
            {"scheme": "FP8_BLOCK", "targets": ["re:.*o_proj$"]},
            "128 does not divide 64, the columns of model.layers.0.",
        ),
        ({**groups("Linear", 24), "ignore": ["re:.*experts.*"]}, "24 does not divide 64, the columns of model.layers."),
        (groups("re:.*self_attn[.]q_proj$", 11), "set strategy to channel"),
        ({**groups(EXPERTS, 32), "ignore": [f"re:{FIRST}"]}, "the columns of model.layers.0.mlp.experts.1.down_proj"),
    ],
    ids=["experts", "remedy", "bypassed", "longer", "activations", "class", "channel", "ignored"],
)
def test_groups_that_do_not_divide(model: Path, tmp_path: Path, fields: dict[str, object], said: str) -> None:
    stages = read_stages(write_recipe(tmp_path / "recipe.yaml", **fields))
    with pytest.raises(RecipeError) as caught:
        check_schemes(stages, str(model))
    assert str(caught.value).startswith("other: GPTQModifier: its group size ")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        groups(EXPERTS, 16),
        {**groups(EXPERTS, 32), "ignore": ["re:.*down_proj$"]},
        {"scheme": "W8A8", "targets": ["Linear"]},
    ],
    ids=["divides", "ignored", "channels"],
)
def test_groups_that_pass(model: Path, tmp_path: Path, fields: dict[str, object]) -> None:
    check_schemes(read_stages(write_recipe(tmp_path / "recipe.yaml", **fields)), str(model))


def beside(first: dict[str, object], second: dict[str, object], ignore: list[str]) -> str:
    """A recipe that packs gate and up of the first layer by one group, down by another, and the rest by ours."""
    layer = r"re:.*layers[.]0[.]mlp[.]experts[.]\d+[.]"
    some = {"type": "int", "strategy": "group", "group_size": 16}
    config = {
        "a": {"targets": [f"{layer}(gate|up)_proj$"], "weights": {**some, **first}},
        "b": {"targets": [f"{layer}down_proj$"], "weights": {**some, **second}},
    }
    ours = {"bits": 4.0, "group_size": 16, "block_size": 16, "ignore": ignore}
    return yaml.safe_dump(
        {"a_stage": {"m_modifiers": {"GPTQModifier": {"config_groups": config}, "BitsMoEModifier": ours}}}
    )


FOUR, EIGHT = {"num_bits": 4, "symmetric": True}, {"num_bits": 8, "symmetric": True}


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({**FOUR, "symmetric": False}, {**FOUR, "symmetric": False}, "by an asymmetric scheme, and transformers reads"),
        (FOUR, EIGHT, "by several schemes, and transformers reads them by one symmetric scheme; take one such"),
        (FOUR, FOUR, ""),
    ],
    ids=["asymmetric", "several", "one"],
)
def test_experts_beside_ours(
    model: Path, tmp_path: Path, first: dict[str, object], second: dict[str, object], said: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    for ignore in ([], ["re:.*layers[.]0[.].*"]):
        recipe.write_text(beside(first, second, ignore))
        stages = read_stages(recipe)
        if not said or not ignore:  # experts that both modifiers mean are refused elsewhere
            check_schemes(stages, str(model))
            continue
        with pytest.raises(RecipeError, match=said):
            check_schemes(stages, str(model))


def test_a_model_that_cannot_be_built_without_weights_is_left_to_others(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "of_tomorrow"}')
    check_schemes(read_stages(write_recipe(tmp_path / "recipe.yaml", **groups(EXPERTS, 32))), str(tmp_path))


@pytest.mark.parametrize("command", ["plan", "quantize"])
def test_commands_say_it_before_weights_are_read(
    tiny: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", **groups(EXPERTS, 24))
    arguments = [command, "--model", str(tiny / "model"), "--recipe", str(recipe), "--stage", "other"]
    if command == "quantize":
        text = str(write_text(tmp_path / "text.txt", 600, seed=0))
        arguments += ["--calibration", text, "--samples", "8", "--seq-len", "32", "--no-preflight"]
        arguments += ["--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"bitsmoe {command}: other: GPTQModifier: its group size 24 does not divide 64, ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("first", ["ours", "gptq"])
def test_oneshot_says_it_before_calibration(first: str, dense_checkpoint: Callable[..., Path]) -> None:
    """A group longer than a row llm-compressor itself finds while it calibrates, by an error of torch."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    from bitsmoe_modifier import BitsMoEModifier
    from helpers import calibration, load

    tiny = load(dense_checkpoint("qwen3_moe"))
    tiny.register_forward_pre_hook(lambda *_: pytest.fail("calibration started"))
    recipe = [
        BitsMoEModifier(bits=4.0, group_size=16, block_size=16, scope="layer"),
        GPTQModifier(scheme="W4A16", targets=["re:.*self_attn.*_proj$"]),
    ]
    said = (
        "^GPTQModifier: its group size 128 does not divide 64, the columns of model.layers.0.self_attn.q_proj and of "
    )
    with pytest.raises(RecipeError, match=said):
        oneshot(model=tiny, dataset=calibration(), recipe=recipe if first == "ours" else recipe[::-1])


def check_in_python(text: str) -> None:
    from llmcompressor.recipe import Recipe

    from bitsmoe_modifier.calibration.linearizing import linearize
    from bitsmoe_modifier.calibration.other_schemes import check_modifiers
    from bitsmoe_modifier.calibration.targets import find_experts
    from helpers import tiny_model

    tiny = linearize(tiny_model("qwen3_moe"))
    check_modifiers(Recipe.create_instance(text).modifiers, tiny, find_experts(tiny, ["re:.*experts$"], []))


def test_experts_beside_ours_in_python() -> None:
    check_in_python(beside(FOUR, FOUR, ["re:.*layers[.]0[.].*"]))
    with pytest.raises(RecipeError, match=r"^GPTQModifier: it packs experts .* by several schemes"):
        check_in_python(beside(FOUR, EIGHT, ["re:.*layers[.]0[.].*"]))


def test_typos_in_python(capsys: pytest.CaptureFixture[str]) -> None:
    """Of targets that match nothing llm-compressor says nothing, and quantizes nothing."""
    some = "a_stage: {m_modifiers: {QuantizationModifier: {targets: [%s], scheme: W8A8, ignore: [lm_haed]}}}"
    check_in_python(some % "Linear")
    assert "QuantizationModifier: ignore: 'lm_haed' matches no module" in capsys.readouterr().err
    with pytest.raises(
        RecipeError, match=r"^QuantizationModifier: targets: 're:.*self_atn.*' matches no module .*self_att"
    ):
        check_in_python(some % "'re:.*self_atn.q_proj'")


def test_a_comparison_says_it_before_its_first_run(model: Path, tmp_path: Path) -> None:
    stages = read_stages(write_recipe(tmp_path / "recipe.yaml", **groups(EXPERTS, 32)))
    job = Job(model, "name", tmp_path / "out", "cpu", torch.float32, 4, "independent", False, 0)
    with pytest.raises(RecipeError, match="other: GPTQModifier: its group size 32 does not divide 48"):
        check_inputs(stages, job, None)
