"""Which checkpoints, layers and vLLM versions are ours; needs no vLLM."""

import pytest

from bitsmoe_modifier.loading.claims import is_bitsmoe, is_packed, split_groups
from bitsmoe_modifier.loading.format import targets_of
from bitsmoe_modifier.serving import versions

OURS = {"format": "bitsmoe", "targets": ["re:.*experts$"]}
PACKED = "pack-quantized"
OTHER = {"format": PACKED, "targets": ["re:.*self_attn.*"]}


@pytest.mark.parametrize(
    ("config", "claimed"),
    [
        ({"quant_method": "compressed-tensors", "format": "bitsmoe", "config_groups": {"group_0": OURS}}, True),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "mixed-precision",
                "config_groups": {"group_0": OTHER, "group_1": OURS},
            },
            True,
        ),
        ({"quant_method": "bitsmoe", "format": "bitsmoe"}, True),
        ({"quant_method": "compressed-tensors", "format": PACKED, "config_groups": {"group_0": OTHER}}, False),
        ({"quant_method": "compressed-tensors", "format": PACKED, "config_groups": None}, False),
        ({"quant_method": "gptq", "bits": 4}, False),
        ({}, False),
    ],
    ids=["alone", "beside another group", "own method", "another format", "no groups", "another method", "empty"],
)
def test_claims_checkpoints_with_our_groups(config: dict[str, object], claimed: bool) -> None:
    assert is_bitsmoe(config) is claimed


def test_splits_groups() -> None:
    config = {"format": "mixed-precision", "config_groups": {"group_0": OTHER, "group_1": OURS}}
    assert split_groups(config) == ({"group_1": OURS}, {"group_0": OTHER})
    # a group without a format of its own has the checkpoint's
    inherited = {"targets": ["Linear"]}
    assert split_groups({"format": "bitsmoe", "config_groups": {"group_0": inherited}}) == ({"group_0": inherited}, {})


@pytest.mark.parametrize(
    ("prefix", "ours"),
    [
        ("model.layers.3.mlp.experts", True),
        ("model.layers.3.block_sparse_moe.experts", True),
        ("language_model.model.layers.3.mlp.experts", True),
        ("model.layers.4.mlp.experts", False),
        ("model.layers.33.mlp.experts", False),
        ("model.layers.3.mlp.shared_experts", False),
        ("model.layers.3.self_attn.qkv_proj", False),
        ("mtp.layers.3.mlp.experts", False),
    ],
)
def test_takes_the_layers_that_config_json_names(prefix: str, ours: bool) -> None:
    assert is_packed(prefix, targets_of(["model.layers.3.mlp.experts"])) is ours


@pytest.mark.parametrize(
    ("prefix", "ours"),
    [
        ("mtp.layers.0.mlp.experts", True),
        ("model.mtp.layers.0.mlp.experts", True),
        ("mtp.layers.1.mlp.experts", False),
        ("model.layers.0.mlp.experts", False),
        ("model.layers.4.mlp.experts", True),
    ],
)
def test_layers_for_multi_token_prediction_have_targets_of_their_own(prefix: str, ours: bool) -> None:
    assert is_packed(prefix, targets_of(["model.layers.4.mlp.experts", "mtp.layers.0.mlp.experts"])) is ours


@pytest.mark.parametrize("found", ["0.32.0", "0.32.1+cu129", "0.33.0", "0.33.0.dev7"])
def test_supported_versions(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda: found)
    assert versions.unsupported_version() == ""


@pytest.mark.parametrize("found", ["0.31.2", "0.34.0", "1.0.0"])
def test_unsupported_versions_are_named(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda: found)
    assert versions.unsupported_version() == (
        f"bitsmoe-modifier serves with vLLM 0.32.*, 0.33.*, this is {found}; install a supported one"
    )
