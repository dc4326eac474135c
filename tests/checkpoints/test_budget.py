"""Sizes and memory to bits: against checkpoints that are written, and caches that transformers fills."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from bitsmoe_modifier import RecipeError
from bitsmoe_modifier.calibration import modifier
from bitsmoe_modifier.calibration.recipe import Stage, read_stages, with_fields
from bitsmoe_modifier.calibration.sweep import leading, sweep_of
from bitsmoe_modifier.checkpoints.budget import (
    Budget,
    bits_for_memory,
    bits_for_size,
    cache_bytes,
    parse_gpus,
    parse_size,
    parse_tokens,
)
from bitsmoe_modifier.cli import main
from bitsmoe_modifier.sources.demo import demo_asset
from bitsmoe_modifier.storage.sizes import checkpoint_bytes, is_expert, tensor_sizes
from helpers import tiny_config, tiny_model
from tiny_text import save_tiny, write_text

QUICK = "error_feedback: false, refine_passes: 0, solver: lagrangian"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    fields = f"bits: 4.0, block_size: 16, {QUICK}"  # and each layer's own group size
    path.write_text(f"quant_stage: {{quant_modifiers: {{BitsMoEModifier: {{{fields}}}}}}}")
    return path


@pytest.mark.parametrize(
    ("text", "size"), [("10GB", 10**10), ("9.5 gib", 9.5 * 2**30), ("700MB", 7 * 10**8), ("1234", 1234)]
)
def test_sizes(text: str, size: float) -> None:
    assert parse_size(text) == size
    assert parse_gpus(f"2x{text}") == (2, size)
    assert parse_gpus(text) == (1, size)


@pytest.mark.parametrize("text", ["", "GB", "ten", "0GB", "10GBit", "-3GB", "1e9", "0xGB", "2xGB", "ax24GB", "0x24GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(RecipeError, match=r"is no (size|number of GPUs)"):
        parse_gpus(text)


def test_tokens() -> None:
    assert (parse_tokens("32k"), parse_tokens("1000")) == (32768, 1000)
    with pytest.raises(RecipeError, match="write 32k"):
        parse_tokens("32kk")


def test_size_is_hit_within_one_percent(tmp_path: Path) -> None:
    """The embedded model, whose embeddings are a good part of it, by the command line and without a recipe file."""
    out, size = tmp_path / "out", 2.1e6
    quick = tmp_path / "quick.yaml"
    quick.write_text(f"q_stage: {{q_modifiers: {{BitsMoEModifier: {{scope: layer, {QUICK}}}}}}}")
    arguments = ["--recipe", str(quick), "--samples", "16", "--seq-len", "64", "--quiet"]
    assert main(["quantize", "--size", "2.1MB", "--out", str(out), *arguments]) == 0
    assert abs(checkpoint_bytes(out) / size - 1) < 0.01


def test_memory_is_filled_by_the_folder_that_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its weight files, with the cache and the workspace that the command names, take what a GPU has to within 1 %."""
    quick = tmp_path / "quick.yaml"
    quick.write_text(f"q_stage: {{q_modifiers: {{BitsMoEModifier: {{scope: layer, {QUICK}}}}}}}")
    model, out = demo_asset("docmoe"), tmp_path / "out"
    fields = {"bits": 2.0, "scope": "layer"}
    beside = bits_for_memory(model, 1, 10**10, 1024, 2, fields)
    memory = round((1_700_000 + beside.cache + beside.workspace) / 0.92)
    arguments = ["--recipe", str(quick), "--samples", "16", "--seq-len", "64", "--context", "1k", "--batch", "2"]
    assert main(["quantize", "--fit", str(memory), "--out", str(out), *arguments]) == 0
    assert "KV cache of 2 × 1024 tokens" in capsys.readouterr().err
    assert abs((checkpoint_bytes(out) + beside.cache + beside.workspace) / (0.92 * memory) - 1) < 0.01
    assert abs(checkpoint_bytes(out) / 1_700_000 - 1) < 0.01, "the weights alone, too, which are little here"


def test_layers_left_dense_are_counted() -> None:
    model = demo_asset("docmoe")
    ignore = {"ignore": [r"re:.*layers\.0\..*"]}
    dense = sum(s.nbytes for name, s in tensor_sizes(Path(model)).items() if "layers.0" in name and is_expert(name))
    # what layer 0 takes goes to it, and layer 1, half of the experts, gets all that both would have had
    both = bits_for_size(model, 1_800_000, {})
    assert bits_for_size(model, 1_800_000 + dense, ignore) == pytest.approx(2 * both, 0.01)
    with pytest.raises(RecipeError, match=r"is less than what is not a quantized expert"):
        bits_for_size(model, 1_800_000, ignore)


def test_memory_is_filled(tmp_path: Path) -> None:
    """Weights as a checkpoint of those bits has them, cache and workspace, on one GPU and on two."""
    model = demo_asset("docmoe")
    wanted = 2_100_000
    one = bits_for_memory(model, 1, 10**10, 1024, 2, {})
    assert one.bits == 6.0, "no more than helps"
    for gpus in (1, 2):
        other = bits_for_memory(model, gpus, 10**10, 1024, 2, {})
        memory = round((wanted / gpus + other.cache + other.workspace) / 0.92)
        fit = bits_for_memory(model, gpus, memory, 1024, 2, {})
        assert abs(gpus * fit.weights / wanted - 1) < 0.01
        assert fit.bits == pytest.approx(bits_for_size(model, wanted, {}), abs=0.01)
        assert len(fit.assumed) == 2 + gpus
    with pytest.raises(RecipeError, match=r"shorter --context"):
        bits_for_memory(model, 1, 10**9, 1024, 2, {})


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "olmoe"])
def test_cache_is_what_transformers_keeps(architecture: str) -> None:
    model = tiny_model(architecture, torch.bfloat16)
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.ones(3, 17, dtype=torch.int64), past_key_values=cache)
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert cache_bytes(model.config, 17, 3) == held
    assert cache_bytes(model.config, 17, 3, gpus=2) == held // 2
    assert cache_bytes(model.config, 17, 3, gpus=4) == held // 2, "no less than one head on each"


def test_caches_that_do_not_grow_with_the_context() -> None:
    latent = tiny_config("deepseek_v3")
    assert cache_bytes(latent, 100, 1) == cache_bytes(latent, 100, 1, gpus=2) == 3 * 100 * (16 + 8) * 2
    windowed = tiny_config("qwen3_moe")
    windowed.layer_types, windowed.sliding_window = ["sliding_attention", "full_attention"], 10
    assert cache_bytes(windowed, 100, 1) == (10 + 100) * 2 * 2 * 16 * 2
    windowed.layer_types = ["linear_attention", "full_attention"]
    assert cache_bytes(windowed, 100, 1) == 100 * 2 * 2 * 16 * 2


def test_one_kind_of_budget(recipe: Path) -> None:
    (stage,) = read_stages(recipe)
    with pytest.raises(RecipeError, match="--bits and --size exclude each other"):
        Budget(("2.0",), "10GB").stages(stage, "nowhere")
    with pytest.raises(RecipeError, match="'two' is no number"):
        Budget(("two",)).stages(stage, "nowhere")
    assert Budget().stages(stage, "nowhere") == [stage]
    with pytest.raises(RecipeError, match=r"--bits 2,2\.0 has a size twice"):
        Budget(("2", "2.0")).stages(stage, "nowhere")
    with pytest.raises(RecipeError, match=r"--bits 1,6 may mean 1\.6 or 1\.0,6\.0; write it in one of these ways"):
        Budget(("1", "6")).stages(stage, "nowhere")
    with pytest.raises(RecipeError, match=r"--bits 1,6,2,0 may mean 1\.6,2\.0 or 1\.0,6\.0,2\.0,0\.0; write"):
        Budget(("1", "6", "2", "0")).stages(stage, "nowhere")
    for sizes in (("2",), ("2", "3", "4"), ("2.0", "3"), ("2.0", "3.0")):
        assert len(Budget(sizes).stages(stage, "nowhere")) == len(sizes)
    with pytest.raises(RecipeError, match="--fit and --max-kld exclude each other"):
        Budget(fit="24GB", max_kld=0.01).stages(stage, "nowhere")
    with pytest.raises(RecipeError, match="the recipe's max_kld chooses the bits; drop it there, or leave out --bits"):
        Budget(("2.0",)).stages(with_fields(stage, max_kld=0.01), "nowhere")
    gptq = Stage("q", (("GPTQModifier", {}), ("BitsMoEModifier", {})), "")
    with pytest.raises(RecipeError, match="BitsMoEModifier alone"):
        Budget(size="10GB").stages(gptq, "nowhere")


def test_fields_from_the_command_line_join_the_recipes() -> None:
    text = "q_stage: {q_modifiers: {BitsMoEModifier: {bits: 2.0, ignore: [a]}}}"
    stage = Stage("q", (("BitsMoEModifier", {"bits": 2.0, "ignore": ["a"]}),), text)
    changed = with_fields(stage, bits=1.5, ignore=["b"])
    assert dict(changed.modifiers)["BitsMoEModifier"] == {"bits": 1.5, "ignore": ["a", "b"]}
    assert changed.nominal_bits == 1.5
    assert dict(stage.modifiers)["BitsMoEModifier"] == {"bits": 2.0, "ignore": ["a"]}


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_many_sizes_by_one_survey(
    architecture: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One survey and one calibration, by the middle size, which is, to the byte, what it would be alone."""
    model = save_tiny(tmp_path / "model", architecture)
    common = ["--model", str(model), "--recipe", str(recipe), "--samples", "12", "--seq-len", "32"]
    common += ["--calibration", str(write_text(tmp_path / "text.txt", 3000, seed=0))]
    calls: list[str] = []

    def counted(name: str) -> None:
        real = getattr(modifier, name)
        monkeypatch.setattr(modifier, name, lambda *args: calls.append(name) or real(*args))

    for name in ("survey_layers", "experts_inputs", "quantize_layer"):
        counted(name)
    sizes, alone = tmp_path / "sizes", tmp_path / "alone"
    assert main(["quantize", *common, "--bits", "3.0,4.5,3.5", "--out", str(sizes)]) == 0
    once = calls.count("experts_inputs")
    assert calls.count("survey_layers") == 1
    assert calls.count("quantize_layer") == 2 * 3
    said = capsys.readouterr().out.splitlines()
    assert [path.name for path in sorted(sizes.iterdir()) if path.is_dir()] == ["3.0-bits", "3.5-bits", "4.5-bits"]
    for line, expected in zip(said, ("3.0-bits: 2.9", "4.5-bits: 4.", "3.5-bits: 3."), strict=True):
        assert line.startswith(f"{sizes}/{expected}"), line
    calls.clear()
    assert main(["quantize", *common, "--bits", "3.5", "--out", str(alone)]) == 0
    assert calls.count("survey_layers") == 1
    assert calls.count("experts_inputs") == once, "the rows went through the model once for all sizes"
    assert (alone / "model.safetensors").read_bytes() == (sizes / "3.5-bits" / "model.safetensors").read_bytes()
    record = (sizes / "3.0-bits" / "bitsmoe_report.json").read_text()
    assert '"sweep": [3.0, 4.5, 3.5]' in record, "it says that others were made together with it"
    assert "resume_dir" not in record
    predicted = json.loads(record)["prediction"]
    assert predicted["bits"] == sorted(predicted["bits"])
    assert predicted["kld"] == sorted(predicted["kld"], reverse=True)
    assert predicted["kld"][0] > predicted["kld"][-1] > 0


@pytest.mark.parametrize(
    ("stages", "budgets"),
    [
        ([{"bits": 1.6}, {"bits": 2.5}, {"bits": 2.0}], [1.6, 2.5, 2.0]),
        ([{"bits": 1.6}], []),
        ([{"bits": 1.6}, {"bits": 2.5, "codes": "trellis"}], []),
        ([{"bits": 1.6, "max_kld": 0.1}, {"bits": 2.5, "max_kld": 0.1}], []),
        ([{"bits": 2.0}, {"bits": 2.0}], []),
        ([{"bits": 2.0}, {}], []),
    ],
)
def test_which_stages_share_a_calibration(stages: list[dict[str, object]], budgets: list[float]) -> None:
    made = [Stage("q", (("BitsMoEModifier", fields),), "") for fields in stages]
    assert sweep_of(made) == budgets
    gptq = [Stage(one.name, (*one.modifiers, ("GPTQModifier", {})), "") for one in made]
    assert sweep_of(gptq) == [], "what others do depends on the experts before them"
    assert not budgets or leading(budgets) == 2.0


def test_a_size_with_other_bit_widths(tmp_path: Path) -> None:
    """Bits that these bit-widths cannot take are not asked for, and wrong fields are found before the headers."""

    def solved(fields: str) -> Any:
        (tmp_path / "recipe.yaml").write_text(f"a_stage: {{q_modifiers: {{BitsMoEModifier: {{{fields}}}}}}}")
        (stage,) = Budget(size="1TB").stages(*read_stages(tmp_path / "recipe.yaml"), demo_asset("docmoe"))
        return stage.modifiers[0][1]["bits"]

    assert solved("bits: 2.0") == 6.0
    assert solved("bit_widths: [0, 1, 2, 3]") == 3.0
    with pytest.raises(RecipeError, match="a: codes: Input should be 'auto', 'scalar' or 'trellis'"):
        solved("codes: other")
