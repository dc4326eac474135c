"""Versions of the libraries that are not known: ours are refused in a sentence, others load as if we were not there."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bitsmoe_modifier  # noqa: F401 - registers the loader
from bitsmoe_modifier.errors import CheckpointError
from bitsmoe_modifier.loading import versions
from bitsmoe_modifier.loading.registration import register
from helpers import load, logits

ROOT = Path(__file__).parents[2]
STORED = ROOT / "tests" / "newest" / "stored"


@pytest.fixture
def mappings(monkeypatch: pytest.MonkeyPatch) -> object:
    """transformers' tables as they are without us, put back afterwards."""
    from transformers.quantizers import auto

    stock = auto.CompressedTensorsHfQuantizer
    kept = {**auto.AUTO_QUANTIZER_MAPPING, "compressed-tensors": stock}
    monkeypatch.setattr(auto, "AUTO_QUANTIZER_MAPPING", kept)
    monkeypatch.setattr(auto, "AUTO_QUANTIZATION_CONFIG_MAPPING", dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING))
    return auto


def a_future_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(transformers, "__version__", "5.99.0.dev0")


def a_future_compressed_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    real = versions.version
    monkeypatch.setattr(versions, "version", lambda name: "1.2.0" if name == "compressed-tensors" else real(name))


def _without_name(monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> None:
    """Take a name out of a library, and let our modules be imported anew."""
    __import__(module)
    monkeypatch.delattr(sys.modules[module], name)
    for ours in [key for key in sys.modules if key.startswith("bitsmoe_modifier.loading.")]:
        if ours.rpartition(".")[2] in ("quantizer", "fit", "transformers_api", "compressed_tensors_api"):
            monkeypatch.delitem(sys.modules, ours)


def a_name_of_transformers_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    _without_name(monkeypatch, "transformers.core_model_loading", "dot_natural_key")


def a_name_of_compressed_tensors_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    _without_name(monkeypatch, "compressed_tensors.utils", "match_named_modules")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (a_future_transformers, r"transformers 5\.99\.0\.dev0 is not a version .* knows \(>=5\.17,<5\.25\)"),
        (a_future_compressed_tensors, r"compressed-tensors 1\.2\.0 is not a version .* knows \(>=0\.17,<0\.21\)"),
        (
            a_name_of_transformers_gone,
            r"does not work with transformers 5\.\S+ and compressed-.*dot_natural_key",
        ),
        (a_name_of_compressed_tensors_gone, r"does not work with transformers .*match_named_modules"),
    ],
)
def test_ours_are_refused_and_others_load(
    change: Callable[[pytest.MonkeyPatch], None], named: str, mappings: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load(STORED / "stock", dtype=torch.float32)
    with monkeypatch.context() as patch:
        change(patch)
        register()
    with pytest.raises(CheckpointError, match=rf"packed as bitsmoe: .*{named}.*; install versions") as raised:
        load(STORED / "packed")
    assert "\n" not in str(raised.value)
    found = load(STORED / "stock", dtype=torch.float32)
    assert torch.equal(logits(found), logits(expected))
    assert type(found.hf_quantizer) is mappings.CompressedTensorsHfQuantizer
    assert type(found.config.quantization_config) is mappings.CompressedTensorsConfig


def test_another_plugin_keeps_its_place(mappings: object) -> None:
    """Who replaced the stock class before us is asked for checkpoints that are not ours; who derives from what we put
    there gets what it wrote."""

    class Theirs(mappings.CompressedTensorsHfQuantizer):
        pass

    mappings.AUTO_QUANTIZER_MAPPING["compressed-tensors"] = Theirs
    register()
    assert type(load(STORED / "stock").hf_quantizer) is Theirs
    assert type(load(STORED / "packed").hf_quantizer).__name__ == "BitsMoEHfQuantizer"
    derived = type("Derived", (mappings.AUTO_QUANTIZER_MAPPING["compressed-tensors"],), {})
    mappings.AUTO_QUANTIZER_MAPPING["compressed-tensors"] = derived
    assert type(load(STORED / "stock").hf_quantizer) is derived


def test_registering_twice_changes_nothing(mappings: object) -> None:
    register()
    once = mappings.AUTO_QUANTIZER_MAPPING["compressed-tensors"]
    register()
    assert mappings.AUTO_QUANTIZER_MAPPING["compressed-tensors"] is once


def test_arguments_of_later_releases_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a release adds to a call must reach the stock method, not end in a TypeError."""
    from bitsmoe_modifier.loading.format import BitsMoECompressor
    from bitsmoe_modifier.loading.quantizer import BitsMoEHfQuantizer

    quantizer = load(STORED / "packed").hf_quantizer
    stock = BitsMoEHfQuantizer.__mro__[1]
    for name in ("update_tp_plan", "update_attn_implementation", "update_weight_conversions"):
        monkeypatch.setattr(stock, name, lambda self, *args, **kwargs: (args, kwargs), raising=False)
        quantizer._packed_linears = True
        assert getattr(quantizer, name)([], "new", later=1) == (([], "new"), {"later": 1})
    assert BitsMoECompressor.decompress_module(torch.nn.Identity(), leave_decompressed=False, later=1) is None


def test_declared_ranges_are_the_tested_ones() -> None:
    declared = (ROOT / "pyproject.toml").read_text()
    for package, span in versions.SUPPORTED.items():
        assert f'    "{package.replace("_", "-")}{versions._spelled(*span)}",\n' in declared


def test_experts_with_a_norm_of_their_own_are_refused() -> None:
    """transformers 5.24 knows families that normalize each expert's output; packed experts would leave that out."""
    from bitsmoe_modifier.loading.quantizer import experts_sizes

    experts = torch.nn.Module()
    experts.gate_up_proj, experts.down_proj = torch.empty(4, 64, 16), torch.empty(4, 16, 32)
    assert experts_sizes(experts) == (4, 16, 32)
    experts.has_post_expert_norm = True
    with pytest.raises(CheckpointError, match="the experts class Module normalizes the output of each expert"):
        experts_sizes(experts)
