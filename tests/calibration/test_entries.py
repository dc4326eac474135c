"""Entries of other modifiers that match nothing: of these llm-compressor says nothing."""

import pytest

from bitsmoe_modifier.calibration.entries import check_others
from bitsmoe_modifier.errors import RecipeError
from helpers import tiny_model


def recipe(**fields: object) -> dict[str, object]:
    return {"a_stage": {"q_modifiers": {"GPTQModifier": fields, "BitsMoEModifier": None}}}


GROUPS = {"targets": ["re:.*[.]experts[.]\\d+[.](gate|up|down)_proj$"], "weights": {"num_bits": 4}}


@pytest.mark.parametrize(
    "fields",
    [
        {"targets": ["Linear"], "ignore": ["lm_head"]},
        {"targets": "Linear"},
        {"config_groups": {"experts": GROUPS}},
        {"targets": ["model.layers.0.self_attn.q_proj"], "ignore": ["re:.*experts.*"]},
        {},
    ],
    ids=["class", "text", "experts", "name", "none"],
)
def test_entries_that_match_pass(fields: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    check_others(tiny_model("qwen3_moe"), recipe(**fields))
    assert "matches no module" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"targets": ["Liner"]}, "GPTQModifier: targets: 'Liner' matches no module of the model"),
        (
            {"config_groups": {"a": {"targets": ["re:.*self_atn[.]q_proj$"]}}},
            "targets: 're:.*self_atn.* near it .*self_attn.q_proj",
        ),
        ({"targets": ["re:*"]}, "is no regular expression"),
    ],
    ids=["class", "group", "regex"],
)
def test_targets_that_match_nothing_are_refused(fields: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        check_others(tiny_model("qwen3_moe"), recipe(**fields))


def test_ignored_names_that_match_nothing_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    check_others(tiny_model("qwen3_moe"), recipe(targets=["Linear"], ignore=["lm_haed"]))
    expected = "GPTQModifier: ignore: 'lm_haed' matches no module of the model; near it is lm_head"
    assert capsys.readouterr().err == expected + "\n"
