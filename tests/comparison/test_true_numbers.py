"""Figures are of the model that the checkpoint was made from, or there are none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitsmoe_modifier.cli import main
from bitsmoe_modifier.errors import BitsMoEError, CheckpointError
from bitsmoe_modifier.sources import provenance
from bitsmoe_modifier.sources.provenance import check_source, source_of, source_record, weights_digest
from helpers import tiny_model

RECIPES = {
    "bitsmoe": "{BitsMoEModifier: {bits: 4.5, group_size: 32, block_size: 16, scope: layer, solver: lagrangian}}",
    "rtn": "{QuantizationModifier: {config_groups: {e: {targets: ['re:.*[.]experts[.].*_proj$'], "
    "weights: {num_bits: 6, type: int, symmetric: true, strategy: group, group_size: 32}}}}}",
}
Run = Callable[..., int]


@pytest.fixture(scope="module", params=list(RECIPES))
def folder(request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model`` and ``out``, a checkpoint that was made from it."""
    folder = tmp_path_factory.mktemp(request.param)
    shutil.copytree(tiny / "model", folder / "model")
    (folder / "recipe.yaml").write_text(f"a_stage: {{q_modifiers: {RECIPES[request.param]}}}")
    command = ["quantize", "--model", str(folder / "model"), "--recipe", str(folder / "recipe.yaml"), "--device", "cpu"]
    command += ["--calibration", str(tiny / "calibration.txt"), "--samples", "8", "--seq-len", "32"]
    assert main([*command, "--out", str(folder / "out")]) == 0
    return folder


@pytest.fixture
def measure(folder: Path, tiny: Path) -> Run:
    """`eval` of the checkpoint with these options; its exit code."""
    text = ["--eval-text", str(tiny / "held_out.txt"), "--eval-rows", "2", "--seq-len", "16", "--device", "cpu"]
    return lambda *options: main(["eval", str(folder / "out"), *text, *options])


def other_model(model: Path, out: Path) -> Path:
    """The same sizes, other weights, as of a fine-tuned model."""
    shutil.copytree(model, out)
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][3, 5] += 1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_eval_measures_against_what_the_checkpoint_was_made_from(
    folder: Path, measure: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measure("--json", str(tmp_path / "one.json")) == 0, "no --model: the folder beside it, by the record"
    assert measure("--json", str(tmp_path / "two.json"), "--model", str(folder / "model")) == 0
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one == two
    assert one["checkpoint"]["kld_mean"] > 0


def test_eval_against_another_model_of_the_same_sizes_is_refused(
    folder: Path, measure: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = other_model(folder / "model", tmp_path / "other")
    assert measure("--model", str(other)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "was made from model (weights" in said
    assert f"and {other} is another model" in said
    assert measure("--model", str(other), "--any-model") == 0


def test_eval_against_another_vocabulary_is_refused(
    measure: Run, tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("qwen3_moe", vocab_size=96).save_pretrained(tmp_path / "other")
    for file in (tiny / "model").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "other")
    for options in ((), ("--any-model",)):
        assert measure("--model", str(tmp_path / "other"), *options) == 2
    assert "predicts 128 tokens" in capsys.readouterr().err


def test_eval_of_a_checkpoint_without_a_record(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an earlier version, or made in Python: --model is required, and must have the same sizes."""
    copy = shutil.copytree(folder / "out", tmp_path / "copy")
    (copy / "bitsmoe_report.json").unlink()
    assert main(["eval", str(copy)]) == 2
    assert "does not say what it was made from; give the unquantized model by --model" in capsys.readouterr().err
    tiny_model("qwen3_moe", hidden_size=32).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="was not made from theirs: hidden_size 64 and 32; give the right --mod"):
        check_source(copy, "theirs", tmp_path / "other")
    check_source(copy, "ours", folder / "model")


def test_a_model_that_is_not_here_is_asked_for(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder / "out", tmp_path / "copy")
    with pytest.raises(BitsMoEError, match="was made from a folder model, which is not here; say where by --model"):
        source_of(copy)
    (copy / "bitsmoe_report.json").write_text('{"source": {"name": "org/name", "weights": "x"}, "layers": {}}')
    assert source_of(copy) == "org/name"


def test_what_was_made_from_the_demo_finds_it(tmp_path: Path) -> None:
    demo = Path(provenance.demo_asset("docmoe"))
    (tmp_path / "bitsmoe_report.json").write_text(json.dumps({"source": source_record(demo), "layers": {}}))
    assert source_of(tmp_path) == str(demo)
    assert provenance.is_of_the_demo(str(tmp_path))
    assert not provenance.is_of_the_demo(str(demo))


def test_no_path_is_recorded(tmp_path: Path, tiny: Path) -> None:
    assert source_record(tiny / "model", str(tiny / "model"))["name"] == "model"
    assert source_record(tiny / "model", "org/name")["name"] == "org/name"
    cached = tmp_path / "models--org--name" / "snapshots" / "abc"
    shutil.copytree(tiny / "model", cached)
    assert source_record(cached)["name"] == "org/name"


def test_the_digest_knows_weights_and_not_files(tiny: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny / "model" / "model.safetensors")
    names = sorted(tensors)
    for part, chosen in (("a", names[::2]), ("b", names[1::2])):
        save_file({name: tensors[name] for name in chosen}, tmp_path / f"{part}.safetensors")
    assert weights_digest(tmp_path) == weights_digest(tiny / "model")
    other = other_model(tiny / "model", tmp_path / "other")
    assert weights_digest(other) != weights_digest(tiny / "model")
    assert torch.is_tensor(tensors[names[0]])


def test_an_export_keeps_the_record(folder: Path, tmp_path: Path) -> None:
    if folder.name.startswith("rtn"):
        pytest.skip("nothing to decode")
    for to, options in (("dense", []), ("w4", ["--group-size", "32"])):
        assert main(["export", str(folder / "out"), "--to", to, *options, "--out", str(tmp_path / to)]) == 0
        check_source(tmp_path / to, "model", folder / "model")
        assert provenance.read_source(tmp_path / to) == provenance.read_source(folder / "out")
        check_source(folder / "out", "its export", tmp_path / to)


def test_plan_of_a_quantized_checkpoint_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", str(folder / "out")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "is quantized already (" in said.err
    assert "plan takes the unquantized model" in said.err
