"""BitsMoEModifier inside llm-compressor's lifecycle: fields, what it targets, hooks, and what it says."""

import logging
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import yaml
from llmcompressor.core import State
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers import ModifierFactory
from llmcompressor.recipe import Recipe
from loguru import logger
from pydantic import ValidationError
from transformers import PreTrainedModel

from bitsmoe_modifier import BitsMoEModifier, CalibrationError, RecipeError
from bitsmoe_modifier.calibration.targets import check_sizes, dense_experts, least_bits
from bitsmoe_modifier.method.quantize import QuantizerSettings
from helpers import ARCHITECTURES, calibration, experts_names, logits, packed_modules, tiny_model

FIRST, SECOND = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"


def modifier(**changes: object) -> BitsMoEModifier:
    fields = {"bits": 3.0, "group_size": 16, "block_size": 16, "scope": "layer", "solver": "lagrangian"}
    return BitsMoEModifier(**{**fields, **changes})


def linearized(architecture: str = "qwen3_moe", **config: object) -> PreTrainedModel:
    """A tiny model as `oneshot` hands it to modifiers."""
    model = tiny_model(architecture, **config)
    linearize_moe(model)
    return model


def state_of(model: PreTrainedModel, **data: int) -> State:
    state = State()
    state.update(model=model, calib_data=calibration(**data))
    return state


def calibrate(one: BitsMoEModifier, state: State) -> None:
    """The sequential pipeline's events, with the whole model for one target."""
    one.on_calibration_start(state, None)
    with torch.no_grad():
        for batch in state.data.calib:
            state.model(**batch)
    one.on_sequential_epoch_end(state, None, modules=list(state.model.modules()))
    one.on_calibration_end(state, None)


@pytest.fixture
def messages() -> Iterator[list[tuple[str, str]]]:
    """(level, message) of what is logged."""
    seen: list[tuple[str, str]] = []
    sink = logger.add(lambda m: seen.append((m.record["level"].name, m.record["message"])), level=logging.INFO)
    yield seen
    logger.remove(sink)


# ------------------------------------------------------------------------------------------------------ fields


def test_defaults_are_those_of_the_pure_settings() -> None:
    assert BitsMoEModifier().settings == QuantizerSettings(least_bits=2.0)


def test_fields_reach_the_settings() -> None:
    fields = {
        "bits": 1.7,
        "bit_widths": [0, 3],
        "block_size": 32,
        "group_size": 64,
        "basis_bits": 8,
        "input_basis": "none",
        "output_basis": "spectral",
        "error_feedback": False,
        "refine_passes": 5,
        "solver": "pulp",
        "dampening_frac": 0.1,
        "shrinkage": 0.2,
    }
    widths = tuple(fields["bit_widths"])
    rest = {name: value for name, value in fields.items() if name != "bit_widths"}
    assert BitsMoEModifier(**fields).settings == QuantizerSettings(**rest, widths=widths, least_bits=1.7)


@pytest.mark.parametrize(
    ("more", "least"),
    [({}, 2.5), ({"max_kld": 0.1}, 0.0), ({"survey_only": True}, 0.0), ({"resume_dir": "kept"}, 0.0)],
)
def test_plans_that_may_serve_other_sizes_are_tried_at_small_ones(more: dict[str, object], least: float) -> None:
    assert BitsMoEModifier(bits=2.5, scope="global", **more).settings.least_bits == least


def test_the_old_name_of_a_field_still_works_and_says_so() -> None:
    with pytest.warns(FutureWarning, match="widths is called bit_widths now"):
        made = BitsMoEModifier(widths=[2, 0])
    assert made.bit_widths == [0, 2]
    assert "widths" not in made.model_dump(), "a saved recipe has the new name only"
    with pytest.raises(ValidationError, match="widths is the old name of bit_widths; leave it out"):
        BitsMoEModifier(widths=[2, 0], bit_widths=[2, 0])


def test_recipes_find_the_class_by_name() -> None:
    made = ModifierFactory.create("BitsMoEModifier", allow_experimental=False, allow_registered=True, bits=2.5)
    assert isinstance(made, BitsMoEModifier)
    assert made.bits == 2.5


def test_recipe_survives_plain_yaml() -> None:
    """Fields are plain types: what llm-compressor dumps, the safe loader reads, into an equal modifier."""
    original = modifier(super_experts=[f"{FIRST}.0"], bit_widths=[0, 1, 8], ignore=["re:.*layers[.]0[.].*"])
    text = Recipe.from_modifiers([original]).yaml()
    assert isinstance(yaml.safe_load(text), dict)
    (again,) = Recipe.create_instance(text).modifiers
    assert again.model_dump(exclude={"group"}) == original.model_dump(exclude={"group"})


def test_widths_are_sorted_and_unique() -> None:
    assert BitsMoEModifier(bit_widths=[6, 0, 2, 2]).bit_widths == [0, 2, 6]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("bits", 0, "greater than 0"),
        ("bits", 9, "less than or equal to 8"),
        ("bits", "two", "valid number"),
        ("bit_widths", [0, 5], r"bit_widths \[5\] cannot be stored; choose from \[0, 1, 2, 3, 4, 6, 8\]"),
        ("bit_widths", [-2], r"bit_widths \[-2\] cannot be stored"),
        ("bit_widths", [0], "at least one above 0"),
        ("bit_widths", [], "at least one above 0"),
        ("block_size", 12, "12 is not a positive multiple of 8"),
        ("group_size", 0, "0 is not a positive multiple of 8"),
        ("group_size", -8, "-8 is not a positive multiple of 8"),
        ("basis_bits", 5, "4, 8 or 16"),
        ("input_basis", "fourier", "'auto', 'spectral' or 'none'"),
        ("output_basis", "fourier", "'auto', 'spectral' or 'none'"),
        ("solver", "simplex", "'auto', 'highs', 'pulp' or 'lagrangian'"),
        ("scope", "model", "'layer' or 'global'"),
        ("refine_passes", -1, "greater than or equal to 0"),
        ("dampening_frac", 0, "greater than 0"),
        ("shrinkage", 1, "less than 1"),
        ("super_experts", "some", "'none' or 'auto'"),
        ("bit", 2, "Extra inputs are not permitted"),
    ],
)
def test_bad_values_name_the_field(field: str, value: object, said: str) -> None:
    with pytest.raises(ValidationError, match=said) as caught:
        BitsMoEModifier(**{field: value})
    assert field in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"bits": 4.0, "bit_widths": [0, 2]}, r"bits 4\.0 cannot be spent with bit_widths \[0, 2\]; add wider ones"),
        (
            {"super_experts": "auto", "bit_widths": [2, 4]},
            r"super_experts.*add 0 to bit_widths \[2, 4\]",
        ),
    ],
)
def test_fields_must_fit_each_other(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        BitsMoEModifier(**fields)


# ----------------------------------------------------------------------------------------------- the lifecycle


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lifecycle(architecture: str) -> None:
    model = linearized(architecture)
    names = [name for name, module in model.named_modules() if isinstance(module, LinearExperts2D)]
    assert names == experts_names(tiny_model(architecture))
    one, state = modifier(), state_of(model)
    one.initialize(state)
    calibrate(one, state)
    one.finalize(state)
    assert list(packed_modules(model)) == names
    assert one.finalized
    assert not one._hooks, "no hook stays behind"
    assert not one._inputs, "no activation stays behind"
    assert bool(torch.isfinite(logits(model)).all())


def test_targets_and_ignore() -> None:
    for fields, expected in (
        ({"targets": [FIRST]}, [FIRST]),
        ({"targets": ["re:.*layers[.]1[.].*experts$"]}, [SECOND]),
        ({"ignore": [FIRST]}, [SECOND]),
    ):
        model = linearized()
        one, state = modifier(**fields), state_of(model)
        one.initialize(state)
        calibrate(one, state)
        one.finalize(state)
        assert list(packed_modules(model)) == expected


def test_dense_weights_are_read_as_they_are() -> None:
    fused, model = tiny_model("qwen3_moe"), linearized()
    experts = dense_experts(model.get_submodule(FIRST))
    assert torch.equal(experts.gate_up, fused.get_submodule(FIRST).gate_up_proj)
    assert torch.equal(experts.down, fused.get_submodule(FIRST).down_proj)
    assert experts.in_bias is None


def test_a_layer_without_calibration_is_an_error() -> None:
    """The model's second half is never run: silence would leave it unquantized."""
    model = linearized()
    one, state = modifier(), state_of(model)
    one.initialize(state)
    one.on_calibration_start(state, None)
    one.on_sequential_epoch_end(state, None, modules=list(model.modules()))
    one.on_calibration_end(state, None)
    with pytest.raises(CalibrationError, match=rf"2 MoE layers were never calibrated: {FIRST}, {SECOND}; use the seq"):
        one.finalize(state)


def test_an_interrupted_run_is_called_that() -> None:
    """Its end comes when the next run begins, which has nothing to do with layers that were not reached."""
    model = linearized()
    one, state = modifier(), state_of(model)
    one.initialize(state)
    one.on_calibration_start(state, None)
    with pytest.raises(CalibrationError, match="an earlier run was interrupted, with 2 MoE layers to go"):
        one.finalize(state)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_reports_follow_the_modules() -> None:
    model = linearized()
    one, state = modifier(input_basis="spectral"), state_of(model)
    one.initialize(state)
    calibrate(one, state)
    for module in packed_modules(model).values():
        assert module.report.input_basis_bits == 4
        assert len(module.report.tokens_per_expert) == 8
        assert set(module.report.width_counts) == {"gate", "up", "down"}


def test_few_tokens_are_warned_about(messages: list[tuple[str, str]]) -> None:
    """64 tokens per expert: 256 for 8 experts of which every token takes 2."""
    modifier().initialize(state_of(linearized(), rows=2))
    warnings = [text for level, text in messages if level == "WARNING" and "experts" in text]
    assert f"{FIRST}: 16 calibration tokens per expert are few; give 64 for each, 256 in all, or more" in warnings
    messages.clear()
    modifier().initialize(state_of(linearized(), rows=8))
    assert not [text for level, text in messages if level == "WARNING" and "tokens per expert" in text]


def test_idle_experts_are_reported(messages: list[tuple[str, str]]) -> None:
    model = linearized()
    one, state = modifier(), state_of(model, rows=1, length=4)
    one.initialize(state)
    calibrate(one, state)
    said = [text for level, text in messages if level == "WARNING" and text.startswith(FIRST)]
    unseen = sum(count == 0 for count in packed_modules(model)[FIRST].report.tokens_per_expert)
    assert unseen > 0
    assert sum(f"{unseen} experts got no calibration tokens and use the layer's average" in text for text in said) == 1
    assert any(level == "INFO" and text.startswith(FIRST) and "bits per weight" in text for level, text in messages)


def test_super_experts_are_found_and_reported(messages: list[tuple[str, str]]) -> None:
    model = linearized()
    with torch.no_grad():
        model.get_submodule(SECOND)[6].down_proj.weight.mul_(300)
    one, state = modifier(super_experts="auto", bits=7.0), state_of(model, rows=20)
    one.initialize(state)
    calibrate(one, state)
    assert [packed_modules(model)[name].report.dense_experts for name in (FIRST, SECOND)] == [(), (6,)]
    assert any(level == "INFO" and text.startswith(SECOND) and "dense experts [6]" in text for level, text in messages)


# ------------------------------------------------------------------------------------------------------- sizes


SETTINGS = QuantizerSettings(bits=2.0, group_size=128)


def test_group_size_that_does_not_divide_says_which_do() -> None:
    with pytest.raises(RecipeError, match=r"layer: group_size 128 does not divide .* I = 192; .*\[8, 16, 24"):
        check_sizes("layer", 64, 1024, 192, SETTINGS)
    with pytest.raises(RecipeError, match="I = 100; add the layer to `ignore`"):
        check_sizes("layer", 64, 1024, 100, SETTINGS)


def test_block_size_that_does_not_divide_says_which_do() -> None:
    settings = QuantizerSettings(block_size=48)
    with pytest.raises(RecipeError, match=r"block_size 48 does not divide .* H = 1024; .*\[8, 16, 32, 64, 128"):
        check_sizes("layer", 64, 1024, 768, settings)
    with pytest.raises(RecipeError, match="H = 1002; add the layer to `ignore`"):
        check_sizes("layer", 64, 1002, 768, QuantizerSettings())


@pytest.mark.parametrize(
    ("changes", "least"),
    [
        # a byte for every unit of 128 x 768 weights; what is dropped has no steps
        ({"input_basis": "none", "output_basis": "none"}, 8 / (128 * 768)),
        # two bases of 2048 x 2048 at 4 + 16/128 bits for 128 experts of 3 x 2048 x 768 weights
        ({"input_basis": "spectral", "output_basis": "spectral"}, 0.0001 + 2 * 2048 * 4.125 / (128 * 3 * 768)),
        ({"input_basis": "auto", "output_basis": "spectral", "basis_bits": 16}, 0.0001 + 2048 * 16 / (128 * 3 * 768)),
        # a byte for the step of every 128 weights
        ({"widths": (2, 4), "input_basis": "none"}, 2.0626),
    ],
)
def test_least_bits(changes: dict[str, object], least: float) -> None:
    """The size of a Qwen3-30B-A3B layer."""
    settings = QuantizerSettings(**changes)
    assert least_bits(128, 2048, 768, settings) == pytest.approx(least, abs=1e-4)
    with pytest.raises(RecipeError, match=rf"layer: bits 5e-05 is below {least:.3f}, .* raise `bits`"):
        check_sizes("layer", 128, 2048, 768, QuantizerSettings(bits=5e-5, **changes))
    check_sizes("layer", 128, 2048, 768, QuantizerSettings(bits=least + 1e-3, **changes))


def test_least_bits_without_a_gate() -> None:
    """A basis is spread over two matrices of each expert in place of three."""
    settings = QuantizerSettings(input_basis="spectral", output_basis="none")
    assert least_bits(128, 2048, 768, settings, gated=False) == pytest.approx(2048 * 4.125 / (128 * 2 * 768), abs=2e-4)
    check_sizes("layer", 128, 2048, 768, QuantizerSettings(bits=0.044, input_basis="spectral"))
    with pytest.raises(RecipeError, match=r"is below"):
        check_sizes("layer", 128, 2048, 768, QuantizerSettings(bits=0.04, input_basis="spectral"), gated=False)


def test_super_experts_raise_the_least_bits() -> None:
    with pytest.raises(RecipeError, match=r"bits 2\.0 is below 2\.0\d\d, .*super experts"):
        check_sizes("layer", 128, 2048, 768, SETTINGS, dense_share=1 / 8, dense_bits=16)
    check_sizes("layer", 128, 2048, 768, SETTINGS, dense_share=1 / 16, dense_bits=16)


def test_choices_per_token_of_any_config() -> None:
    from bitsmoe_modifier.calibration.capture import choices_per_token

    for fields, expected in (({"num_experts_per_tok": 8}, 8), ({"moe_topk": 6}, 6), ({}, 1)):
        config = SimpleNamespace(get_text_config=lambda fields=fields: SimpleNamespace(**fields))
        assert choices_per_token(SimpleNamespace(config=config)) == expected
