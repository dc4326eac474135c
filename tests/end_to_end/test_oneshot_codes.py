"""Families of codes from `oneshot` to the loaded checkpoint. Trellis is the default: the other tests have it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from loguru import logger
from quantize_once import quantize
from safetensors.torch import load_file
from test_oneshot import check_quantized, check_reload, modifier, run

from bitsmoe_modifier import RecipeError
from bitsmoe_modifier.checkpoints.describe import describe, render
from bitsmoe_modifier.checkpoints.export import export_dense
from bitsmoe_modifier.method import native_viterbi
from helpers import load, logits, packed_modules

pytestmark = pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")

Checkpoint = Callable[..., Path]


@pytest.mark.parametrize(
    ("architecture", "codes", "dtype", "scope"),
    [
        ("qwen3_moe", "scalar", torch.float32, "global"),
        ("mixtral", "scalar", torch.bfloat16, "layer"),
        ("mixtral", "trellis", torch.bfloat16, "layer"),
    ],
)
def test_quantize_save_load(
    architecture: str, codes: str, dtype: torch.dtype, scope: str, dense_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = dense_checkpoint(architecture, dtype)
    model = run(source, [modifier(codes=codes, scope=scope)], output_dir=tmp_path / "out")
    check_quantized(model, load(source), scope=scope)
    assert {module.spec.version for module in packed_modules(model).values()} == {2}
    loaded = check_reload(model, tmp_path / "out")
    # one decoding step meets fewer experts than the batch, and each of them the same weights
    step = loaded(input_ids=torch.tensor([[3, 5, 7]]), use_cache=True)
    assert torch.isfinite(step.logits).all()
    found = describe(tmp_path / "out")
    assert {layer["codes"] for layer in found["layers"]} == {codes}
    assert ("trellis codes" in render(found)) == (codes == "trellis")
    export_dense(tmp_path / "out", tmp_path / "dense", dtype=torch.float32)
    torch.testing.assert_close(logits(load(tmp_path / "dense")).float(), logits(loaded).float(), rtol=0.05, atol=0.05)


def test_a_run_that_was_interrupted_ends_with_the_same_bytes(dense_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = dense_checkpoint("qwen3_moe")
    results = []
    for name in ("first", "second"):
        quantize(source, tmp_path / name, tmp_path / "resume", codes="trellis")
        results.append(load_file(tmp_path / name))
        (layer,) = (tmp_path / "resume").rglob("model.layers.1.*.safetensors")
        layer.unlink()
    assert results[0].keys() == results[1].keys()
    for key, tensor in results[0].items():
        assert torch.equal(tensor.view(torch.uint8), results[1][key].view(torch.uint8)), key
    with pytest.raises(RecipeError, match="codes"):
        quantize(source, tmp_path / "third", tmp_path / "resume", codes="scalar")


def test_sizes_that_no_stream_fits_are_refused(dense_checkpoint: Checkpoint) -> None:
    with pytest.raises(RecipeError, match=r"codes: trellis needs a group_size that is a multiple of 16, not 8"):
        run(dense_checkpoint("qwen3_moe"), [modifier(codes="trellis", group_size=8)])


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """What is warned about."""
    said: list[str] = []
    sink = logger.add(said.append, level="WARNING", format="{message}")
    yield said
    logger.remove(sink)


def test_trellis_codes_are_what_one_gets(dense_checkpoint: Checkpoint, warned: list[str]) -> None:
    made = run(dense_checkpoint("qwen3_moe"), [modifier()])
    assert {module.spec.codes for module in packed_modules(made).values()} == {1}
    assert not any("scalar codes" in message for message in warned)
    made = run(dense_checkpoint("qwen3_moe"), [modifier(group_size=8)])
    assert {module.spec.codes for module in packed_modules(made).values()} == {0}, "no stream fits groups of 8"
    assert any("2 layers get scalar codes" in message for message in warned)


def test_scalar_codes_where_trellis_codes_would_take_hours(
    dense_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, warned: list[str]
) -> None:
    monkeypatch.setattr(native_viterbi, "library", lambda: None)
    chosen = modifier()
    made = run(dense_checkpoint("qwen3_moe"), [chosen])
    assert {module.spec.codes for module in packed_modules(made).values()} == {0}
    assert chosen.codes == "scalar", "what stands in the recipe that is saved"
    assert any("takes a C++ compiler" in message for message in warned)
