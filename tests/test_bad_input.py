"""Bad input gets an error that names the field or module and the remedy, before any long work, and leaves no files.

Every case goes through `oneshot`. "Before any long work" is checked by a model whose first forward pass fails the test.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers import ModifierFactory
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bitsmoe_modifier import BitsMoEError, BitsMoEModifier, CalibrationError, CheckpointError, RecipeError
from helpers import calibration, load, packed_modules

pytestmark = pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")

Checkpoint = Callable[..., Path]

FIRST, SECOND = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"
NO_DATA = DataLoader([], batch_size=None)


def modifier(**changes: object) -> BitsMoEModifier:
    fields = {"bits": 3.0, "group_size": 16, "block_size": 16, "scope": "layer", "solver": "lagrangian"}
    return BitsMoEModifier(**{**fields, **changes})


def unrun(model: PreTrainedModel) -> PreTrainedModel:
    """The model, failing the test as soon as it is run."""

    def fail(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if not inputs[0].is_meta:  # llm-compressor traces the model with meta tensors, which is no long work
            pytest.fail("calibration started before the input was checked")

    model.get_input_embeddings().register_forward_pre_hook(fail)
    return model


def refused(model: PreTrainedModel, out: Path, recipe: object = None, data: DataLoader | None = None) -> str:
    """Run `oneshot`, which must refuse before calibration and write nothing; the error's text."""
    recipe = [modifier()] if recipe is None else recipe
    with pytest.raises((BitsMoEError, ValidationError)) as caught:
        oneshot(model=unrun(model), recipe=recipe, dataset=calibration() if data is None else data, output_dir=out)
    assert not out.exists(), "nothing half-written"
    assert isinstance(caught.value, ValueError)
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def model(dense_checkpoint: Checkpoint) -> PreTrainedModel:
    return load(dense_checkpoint("qwen3_moe"))


# --------------------------------------------------------------------------------------------- no layer matched


def test_dense_model(out: Path, dense_checkpoint: Checkpoint, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 128}
    config = AutoConfig.for_model("llama", num_attention_heads=2, num_key_value_heads=2, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llama")
    for file in dense_checkpoint("qwen3_moe").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "llama")
    said = refused(load(tmp_path / "llama"), out)
    assert said.startswith("RecipeError: LlamaForCausalLM (model_type llama) has no mixture-of-experts layer")


@pytest.mark.parametrize(
    "fields",
    [{"targets": ["re:.*moe.*"]}, {"ignore": ["re:.*experts$"]}, {"targets": [FIRST], "ignore": [FIRST]}],
    ids=["targets", "ignore", "both"],
)
def test_no_layer_matched(model: PreTrainedModel, out: Path, fields: dict[str, list[str]]) -> None:
    said = refused(model, out, [modifier(**fields)])
    assert said.startswith("RecipeError: targets")
    assert all(repr(patterns) in said for patterns in fields.values())
    assert f"match none of the model's MoE layers ({FIRST}, {SECOND})" in said
    assert "drop `targets`" in said


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"ignore": ["model.layers.0.mlp.expert"]},
            f"ignore: 'model.layers.0.mlp.expert' matches no module of the model; near it are {FIRST}",
        ),
        ({"ignore": ["re:.*layer[.]0[.].*"]}, "ignore: 're:.*layer[.]0[.].*' matches no module of the model; near it"),
        ({"ignore": ["lm_haed"]}, "ignore: 'lm_haed' matches no module of the model; near it is lm_head"),
        (
            {"targets": [FIRST, "model.layers.7.mlp.experts"]},
            "targets: 'model.layers.7.mlp.experts' matches no experts module of the model; near it are model.layers.",
        ),
        (
            {"targets": [FIRST, "lm_head"]},
            f"'lm_head' matches no experts module of the model; the experts modules are {FIRST}",
        ),
        ({"ignore": ["re:*experts"]}, "'re:*experts' is no regular expression (nothing to repeat at position 0)"),
        ({"ignore": ["re:.*mtp.*"]}, "ignore: 're:.*mtp.*' matches no module of the model"),
    ],
    ids=["name", "pattern", "other", "second-target", "no-experts", "regex", "absent"],
)
def test_an_entry_that_matches_nothing(
    model: PreTrainedModel, out: Path, fields: dict[str, list[str]], said: str
) -> None:
    assert said in refused(model, out, [modifier(**fields)])


def test_entries_that_match_something_are_fine(model: PreTrainedModel, out: Path) -> None:
    fields = {"targets": ["re:.*experts$"], "ignore": ["lm_head", "re:.*layers[.]0[.].*"]}
    oneshot(model=model, recipe=[modifier(**fields)], dataset=calibration())
    assert list(packed_modules(model)) == [SECOND]


# ------------------------------------------------------------------------------- what could not be saved at the end


def test_generation_config_that_saving_refuses_is_refused_before_calibration(model: PreTrainedModel, out: Path) -> None:
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.6
    said = refused(model, out)
    assert said.startswith("RecipeError: the model could not be saved afterwards: ")
    assert "temperature" in said
    assert "mend model.config and model.generation_config" in said


# ----------------------------------------------------------------------------- quantized or claimed by others


@pytest.mark.parametrize("pipeline", ["sequential", "independent"])
@pytest.mark.parametrize("order", ["ours-first", "gptq-first"])
def test_experts_claimed_by_another_modifier(model: PreTrainedModel, out: Path, order: str, pipeline: str) -> None:
    gptq = GPTQModifier(
        ignore=["lm_head"],
        config_groups={
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": True},
            }
        },
    )
    recipe = [modifier(), gptq] if order == "ours-first" else [gptq, modifier()]
    with pytest.raises(RecipeError) as caught:
        oneshot(model=unrun(model), recipe=recipe, dataset=calibration(), pipeline=pipeline, output_dir=out)
    said = str(caught.value)
    assert f"48 expert projections ({FIRST}.0." in said
    assert "claimed by another modifier" in said
    assert r"add 're:.*\.experts\.\d+\..*' to that modifier's `ignore`" in said
    assert not out.exists()


def test_the_advised_pattern_works(model: PreTrainedModel, out: Path) -> None:
    """What the message says to add, added."""
    other = QuantizationModifier(
        targets=["Linear"],
        ignore=["lm_head", r"re:.*\.experts\.\d+\..*"],
        config_groups={
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": True},
            }
        },
    )
    oneshot(model=model, recipe=[modifier(), other], dataset=calibration())
    assert list(packed_modules(model)) == [FIRST, SECOND]


@pytest.mark.parametrize("pipeline", ["sequential", "independent"])
def test_two_of_ours_in_one_recipe(model: PreTrainedModel, out: Path, tmp_path: Path, pipeline: str) -> None:
    """Each has layers of its own, and a folder of its own to keep them in."""
    both = [modifier(), modifier(bits=4.0, ignore=[SECOND])]
    said = refused(model, out, both)
    assert f"RecipeError: two BitsMoEModifiers of the recipe target {FIRST}; give one of them other `targets`" in said
    kept = str(tmp_path / "kept")
    apart = [modifier(ignore=[FIRST], resume_dir=kept), modifier(bits=4.0, ignore=[SECOND], resume_dir=kept)]
    assert f"resume_dir: {kept} is for one BitsMoEModifier, the recipe has 2" in refused(model, out, apart)
    model.get_input_embeddings()._forward_pre_hooks.clear()
    apart = [modifier(ignore=[FIRST]), modifier(bits=4.0, ignore=[SECOND])]
    oneshot(model=model, recipe=apart, dataset=calibration(), pipeline=pipeline)
    assert sorted(packed_modules(model)) == [FIRST, SECOND]


@pytest.fixture(scope="module")
def packed_checkpoint(dense_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as `oneshot` writes it; not to be changed."""
    folder = tmp_path_factory.mktemp("packed") / "out"
    oneshot(
        model=load(dense_checkpoint("qwen3_moe")),
        recipe=[modifier(input_basis="spectral", output_basis="spectral")],
        dataset=calibration(),
        output_dir=folder,
    )
    return folder


def test_experts_packed_already(packed_checkpoint: Path, out: Path) -> None:
    said = refused(load(packed_checkpoint), out)
    assert f"RecipeError: the experts of {FIRST}, {SECOND} are already packed" in said
    assert "start from the unquantized model" in said


def test_experts_quantized_by_an_earlier_run(model: PreTrainedModel, out: Path) -> None:
    rtn = QuantizationModifier(
        config_groups={
            "group_0": {
                "targets": ["re:.*experts.*_proj$"],
                "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": True},
            }
        }
    )
    oneshot(model=model, recipe=[rtn])
    said = refused(model, out)
    assert f"RecipeError: 48 expert projections ({FIRST}.0." in said
    assert "already quantized" in said
    assert "start from an unquantized model" in said


# ----------------------------------------------------------------------------------------------- recipe fields


def test_bits_below_the_least(model: PreTrainedModel, out: Path) -> None:
    said = refused(model, out, [modifier(bits=0.5, input_basis="spectral", output_basis="spectral")])
    # two bases of 64 x 64 at 4 + 16/64 bits for 3 x 8 x 32 x 64 weights, and bytes for the widths
    assert "RecipeError: model.layers.0.mlp.experts: bits 0.5 is below 0.72" in said
    assert "raise `bits`, lower `basis_bits`" in said


def test_bits_below_the_narrowest_width(model: PreTrainedModel, out: Path) -> None:
    said = refused(model, out, [modifier(bits=2.5, bit_widths=[2, 4])])
    # 2 bits, a byte of steps for 16 weights, and a byte for the width of 16 x 32
    assert f"RecipeError: {FIRST}: bits 2.5 is below 2.516" in said
    assert "add 0 to `bit_widths`" in said


def test_bits_below_the_super_experts(model: PreTrainedModel, out: Path) -> None:
    """Float32 experts kept dense: two of eight are 8 bits per weight."""
    said = refused(model, out, [modifier(bits=6.0, super_experts=[f"{SECOND}.1", f"{SECOND}.2"])])
    assert f"RecipeError: {SECOND}: bits 6.0 is below 8." in said
    assert "super experts" in said


@pytest.mark.parametrize(("group_size", "fitting"), [(24, "[8, 16, 32]"), (128, "[8, 16, 32]")])
def test_group_size_that_does_not_divide(model: PreTrainedModel, out: Path, group_size: int, fitting: str) -> None:
    said = refused(model, out, [modifier(group_size=group_size)])
    assert f"RecipeError: {FIRST}: group_size {group_size} does not divide the expert size I = 32" in said
    assert f"set group_size to one of {fitting}" in said


def test_block_size_that_does_not_divide(model: PreTrainedModel, out: Path) -> None:
    said = refused(model, out, [modifier(block_size=24)])
    assert f"RecipeError: {FIRST}: block_size 24 does not divide the hidden size H = 64" in said
    assert "set block_size to one of [8, 16, 32, 64]" in said


@pytest.mark.parametrize("entry", ["model.layers.9.mlp.experts.0", f"{FIRST}.8", f"{FIRST}.x", "7", FIRST])
def test_unknown_super_expert(model: PreTrainedModel, out: Path, entry: str) -> None:
    said = refused(model, out, [modifier(super_experts=[entry])])
    assert f"RecipeError: super_experts: {entry!r} is not an expert of a targeted layer" in said
    assert f"write MODULE.EXPERT, e.g. {FIRST}.0" in said


@pytest.mark.parametrize(
    ("line", "field", "remedy"),
    [
        ("bit_widths: [0, 5]", "widths", "choose from [0, 1, 2, 3, 4, 6, 8]"),
        ("group_size: 12", "group_size", "multiple of 8"),
        ("bits: many", "bits", "valid number"),
        ("basis_bits: 2", "basis_bits", "4, 8 or 16"),
        ("sope: layer", "sope", "not permitted"),
    ],
)
def test_bad_fields_of_a_yaml_recipe(model: PreTrainedModel, out: Path, line: str, field: str, remedy: str) -> None:
    recipe = f"quant_stage:\n  quant_modifiers:\n    BitsMoEModifier:\n      {line}\n"
    said = refused(model, out, recipe)
    assert field in said
    assert remedy in said
    assert "BitsMoEModifier" in said


def test_recipe_without_the_import(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
    """llm-compressor's own message; README says that the package must be imported before a YAML recipe is read."""
    registry = dict(ModifierFactory._registered_registry)
    registry.pop("BitsMoEModifier")
    monkeypatch.setattr(ModifierFactory, "_registered_registry", registry)
    recipe = "quant_stage:\n  quant_modifiers:\n    BitsMoEModifier:\n      bits: 2.0\n"
    with pytest.raises(ValueError, match="No modifier of type 'BitsMoEModifier' found"):
        oneshot(model=unrun(model), recipe=recipe, dataset=calibration(), output_dir=out)
    assert not out.exists()


# ------------------------------------------------------------------------------------------------ calibration


def test_no_calibration_data(model: PreTrainedModel, out: Path) -> None:
    with pytest.raises(CalibrationError, match="there is no calibration data; pass `dataset` to oneshot"):
        oneshot(model=unrun(model), recipe=[modifier()], output_dir=out)
    assert refused(model, out, data=NO_DATA) == "CalibrationError: dataset: the DataLoader has no rows"


def test_too_short_calibration(model: PreTrainedModel, out: Path) -> None:
    said = refused(model, out, data=calibration(rows=1, length=3))
    assert f"CalibrationError: {FIRST}: 3 calibration tokens are less than 1 per expert for its 8 experts" in said
    assert "calibrate with at least 256 tokens" in said


def test_pipeline_without_calibration(model: PreTrainedModel, out: Path) -> None:
    """The data-free pipeline calls no layer: an error instead of a model that was left as it is."""
    with pytest.raises(CalibrationError, match=f"2 MoE layers were never calibrated: {FIRST}, {SECOND}; use the seq"):
        oneshot(model=unrun(model), recipe=[modifier()], dataset=calibration(), pipeline="datafree", output_dir=out)
    assert not out.exists()


# -------------------------------------------------------------------------------------------- NaN and infinity


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize(("projection", "expert"), [("gate_up_proj", 3), ("down_proj", 7)])
def test_bad_weights(model: PreTrainedModel, out: Path, projection: str, expert: int, value: float) -> None:
    with torch.no_grad():
        getattr(model.get_submodule(SECOND), projection)[expert, 5, 2] = value
    said = refused(model, out)
    name = "gate_proj" if projection == "gate_up_proj" else projection
    assert f"CalibrationError: {SECOND}: the {name} weight of expert {expert} holds NaN or infinity" in said
    assert "check the base model" in said


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_bad_activations_name_the_layer(model: PreTrainedModel, out: Path, scope: str) -> None:
    """Weights are fine, what the model computes is not: only calibration can tell."""
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = torch.nan
    with pytest.raises(CalibrationError, match=rf"{SECOND}: .*NaN or infinity; calibrate in"):
        oneshot(model=model, recipe=[modifier(scope=scope)], dataset=calibration(), output_dir=out)
    assert not out.exists()


def test_overflowing_expert_names_layer_and_expert(model: PreTrainedModel, out: Path) -> None:
    with torch.no_grad():
        model.get_submodule(FIRST).gate_up_proj[6].mul_(1e25)
        model.get_submodule(FIRST).down_proj[6].mul_(1e-25)
    with pytest.raises(CalibrationError, match=f"{FIRST}: expert 6: its activations overflow; check the weights"):
        oneshot(model=model, recipe=[modifier()], dataset=calibration(), output_dir=out)
    assert not out.exists()


# ------------------------------------------------------------------------------- checkpoints that were written


def damaged(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of the checkpoint with some tensors changed."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_tampered_checkpoint(packed_checkpoint: Path, tmp_path: Path) -> None:
    name = f"{SECOND}.codes_out"
    folder = damaged(packed_checkpoint, tmp_path / "copy", lambda t: t[name].__setitem__(3, t[name][3] ^ 16))
    with pytest.raises(CheckpointError, match=rf"{SECOND}\.codes_out: the checksum does not match.*fetch it again"):
        load(folder)


def test_truncated_tensor(packed_checkpoint: Path, tmp_path: Path) -> None:
    name = f"{FIRST}.steps_in"
    folder = damaged(packed_checkpoint, tmp_path / "copy", lambda t: t.update({name: t[name][:-16].clone()}))
    with pytest.raises(CheckpointError, match=rf"{FIRST}\.steps_in: is .* imply"):
        load(folder)


def test_newer_version(packed_checkpoint: Path, tmp_path: Path) -> None:
    name = f"{FIRST}.layout"
    folder = damaged(packed_checkpoint, tmp_path / "copy", lambda t: t[name].__setitem__(0, 99))
    with pytest.raises(CheckpointError, match=rf"{FIRST}\.layout: .* version 99.*upgrade bitsmoe-modifier"):
        load(folder)


def test_truncated_file(packed_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(packed_checkpoint, tmp_path / "copy")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(folder)
