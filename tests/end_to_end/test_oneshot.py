"""llm-compressor's `oneshot` with BitsMoEModifier, alone and beside GPTQ: quantize, save, reload, compare."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.offload import dispatch_with_map
from compressed_tensors.quantization import QuantizationStatus
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.recipe import Recipe
from safetensors import safe_open
from transformers import PreTrainedModel

from bitsmoe_modifier import BitsMoEModifier
from bitsmoe_modifier.storage.layout import ExpertsLayout
from bitsmoe_modifier.storage.packed import check_content, check_structure
from helpers import ARCHITECTURES, calibration, experts_names, load, logits, packed_modules

pytestmark = pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")

Checkpoint = Callable[..., Path]

YAML = """
quant_stage:
  quant_modifiers:
    BitsMoEModifier:
      bits: 3.0
      group_size: 16
      block_size: 16
      scope: layer
      solver: lagrangian
"""
#: 4 bits for attention in groups that divide every projection of the tiny models. Activation order is left out: its
#: default makes llm-compressor write a recipe.yaml that it cannot read.
GPTQ = """
    GPTQModifier:
      ignore: ["re:.*experts.*", "re:.*gate$", lm_head]
      config_groups:
        group_0:
          targets: ["re:.*self_attn[.].*_proj$"]
          weights: {num_bits: 4, type: int, strategy: group, group_size: 16, symmetric: true}
"""


def modifier(**changes: object) -> BitsMoEModifier:
    """The same as an object."""
    fields = {"bits": 3.0, "group_size": 16, "block_size": 16, "scope": "layer", "solver": "lagrangian"}
    return BitsMoEModifier(**{**fields, **changes})


def run(folder: Path, recipe: object, **options: object) -> PreTrainedModel:
    return oneshot(model=load(folder), dataset=calibration(), recipe=recipe, **options)


def check_quantized(model: PreTrainedModel, dense: PreTrainedModel, bits: float = 3.0, scope: str = "layer") -> None:
    """Every experts module is packed, sound, within its budget; every other weight is what it was."""
    modules = packed_modules(model)
    assert list(modules) == experts_names(dense)
    assert not any(isinstance(module, LinearExperts2D) for module in model.modules())
    for name, module in modules.items():
        layout = check_structure(dict(module.packed.items()), name)
        check_content(module.packed, name)
        assert module.quantization_status == QuantizationStatus.COMPRESSED
        assert module.packed.bits_per_weight == module.report.bits
        assert not module._cache.whole, "what the rows went through decoded is let go"
        assert module.report.relative_output_error < 0.5
        assert sum(module.report.tokens_per_expert) == 6 * 32 * model.config.num_experts_per_tok, "routed tokens only"
        # what is left is less than the dearest step of a unit, from 0 to 1 or from 4 to 6 bits
        unit = 16 * layout.intermediate_size * 2 / layout.dense_elements
        if scope == "layer":
            assert bits - unit < module.report.bits <= bits
    average = sum(module.report.bits for module in modules.values()) / len(modules)
    assert bits - unit < average <= bits, "all layers have one size"


def check_reload(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Logits of the reloaded checkpoint are those from before saving, bit for bit."""
    loaded = load(folder)
    assert packed_modules(loaded).keys() == packed_modules(model).keys()
    assert loaded.dtype == model.dtype
    assert torch.equal(logits(loaded), logits(model))
    return loaded


# ------------------------------------------------------------------------------------------------------- alone


@pytest.mark.parametrize("pipeline", ["sequential", "independent"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_alone(architecture: str, pipeline: str, dense_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The recipe is a YAML text in one pipeline and a Python object in the other; dtype and scope alternate too."""
    yaml = (pipeline == "sequential") == (architecture in ("qwen3_moe", "olmoe"))
    source = dense_checkpoint(architecture, torch.float32 if yaml else torch.bfloat16)
    recipe = YAML if yaml else [modifier(scope="global")]
    model = run(source, recipe, pipeline=pipeline, output_dir=tmp_path / "out")
    dense = load(source)
    check_quantized(model, dense, scope="layer" if yaml else "global")
    check_reload(model, tmp_path / "out")
    before, after = dense.state_dict(), model.state_dict()
    untouched = [name for name in before if ".experts." not in name]
    assert untouched
    assert all(torch.equal(before[name], after[name]) for name in untouched)
    assert not torch.equal(logits(model), logits(dense))


def test_config_and_recipe_of_the_checkpoint(dense_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """config.json names the format; recipe.yaml can be run again and gives the same bytes."""
    source = dense_checkpoint("qwen3_moe")
    model = run(source, YAML, output_dir=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "bitsmoe")
    (saved,) = Recipe.create_instance(str(tmp_path / "out" / "recipe.yaml")).modifiers
    assert isinstance(saved, BitsMoEModifier)
    assert saved.settings == modifier().settings
    again = run(source, str(tmp_path / "out" / "recipe.yaml"))
    for name, module in packed_modules(model).items():
        for leaf, tensor in module.packed.items():
            assert torch.equal(getattr(again.get_submodule(name), leaf), tensor), f"{name}.{leaf}"


def test_every_field_survives_the_saved_recipe(dense_checkpoint: Checkpoint, tmp_path: Path) -> None:
    changes = {
        "bits": 4.5,
        "bit_widths": [0, 1, 3, 8],
        "block_size": 8,
        "basis_bits": 8,
        "input_basis": "spectral",
        "output_basis": "none",
        "error_feedback": False,
        "solver": "highs",
        "refine_passes": 0,
        "super_experts": ["model.layers.1.mlp.experts.3"],
        "ignore": ["re:.*layers.0.*"],
        "dampening_frac": 0.02,
    }
    model = run(dense_checkpoint("qwen3_moe", torch.bfloat16), [modifier(**changes)], output_dir=tmp_path / "out")
    (saved,) = Recipe.create_instance(str(tmp_path / "out" / "recipe.yaml")).modifiers
    assert {name: getattr(saved, name) for name in changes} == changes
    assert list(packed_modules(model)) == ["model.layers.1.mlp.experts"]
    layout = ExpertsLayout.from_tensor(model.model.layers[1].mlp.experts.layout)
    assert (layout.block_size, layout.basis_in_bits, layout.basis_out_bits) == (8, 8, 0)


def test_recipe_from_a_file(dense_checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(YAML)
    source = dense_checkpoint("mixtral")
    check_quantized(run(source, str(tmp_path / "recipe.yaml")), load(source))


def test_stages_are_selected(dense_checkpoint: Checkpoint) -> None:
    source = dense_checkpoint("olmoe")
    recipe = YAML + YAML.replace("quant_stage", "other_stage").replace("bits: 3.0", "bits: 4.0")
    check_quantized(run(source, recipe, stage="other"), load(source), bits=4.0)


def test_datasets_of_tokens(dense_checkpoint: Checkpoint) -> None:
    """Not only data loaders: a dataset with input_ids goes through llm-compressor's own collation."""
    from datasets import Dataset

    rows = [batch["input_ids"][0].tolist() for batch in calibration()]
    source = dense_checkpoint("qwen3_moe")
    dataset = Dataset.from_dict({"input_ids": rows})
    model = oneshot(model=load(source), dataset=dataset, recipe=[modifier()], num_calibration_samples=6)
    check_quantized(model, load(source))


# ------------------------------------------------------------------------------------------------ beside GPTQ


def stored_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names |= set(opened.keys())
    return names


@pytest.mark.parametrize(
    ("architecture", "pipeline"),
    [
        ("qwen3_moe", "sequential"),
        ("qwen3_moe", "independent"),
        ("mixtral", "sequential"),
        ("olmoe", "independent"),
        ("deepseek_v3", "sequential"),
    ],
)
def test_beside_gptq(architecture: str, pipeline: str, dense_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Experts in our format, attention in GPTQ's, in one recipe and one checkpoint."""
    source = dense_checkpoint(architecture)
    model = run(source, YAML + GPTQ, pipeline=pipeline, output_dir=tmp_path / "out")
    check_quantized(model, load(source))
    check_reload(model, tmp_path / "out")
    names = stored_names(tmp_path / "out")
    assert "model.layers.1.self_attn.o_proj.weight_packed" in names
    assert any(name.endswith("experts.codes_in") for name in names)
    assert not any(".experts." in name and name.endswith("weight_packed") for name in names)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert sorted(group["format"] for group in config["config_groups"].values()) == ["bitsmoe", "pack-quantized"]


@pytest.mark.parametrize("order", ["bitsmoe-first", "gptq-first"])
def test_w4a16_preset_beside_ours(order: str, dense_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The scheme that recipes name (groups of 128), as Python objects, in either order."""
    source = dense_checkpoint("qwen3_moe", hidden_size=128, head_dim=32)
    gptq = GPTQModifier(targets=["re:.*self_attn[.].*_proj$"], scheme="W4A16", actorder=None)
    recipe = [modifier(), gptq] if order == "bitsmoe-first" else [gptq, modifier()]
    model = run(source, recipe, output_dir=tmp_path / "out")
    check_quantized(model, load(source))
    check_reload(model, tmp_path / "out")


# ------------------------------------------------------------------------------------------------- what is asked


def kl_divergence(model: PreTrainedModel, dense: PreTrainedModel) -> float:
    p, q = logits(dense).double().log_softmax(-1), logits(model).double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_more_bits_are_closer_to_the_dense_model(dense_checkpoint: Checkpoint) -> None:
    source = dense_checkpoint("qwen3_moe")
    dense = load(source)
    divergence = [kl_divergence(run(source, [modifier(bits=bits)]), dense) for bits in (1.5, 3.0, 6.0)]
    assert divergence[0] > 3 * divergence[1] > 9 * divergence[2]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_calibration_sees_what_the_model_computes(
    architecture: str, dense_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first MoE layer's inputs in the sequential pipeline are those of the model itself: attention is causal."""
    source, seen = dense_checkpoint(architecture), []
    model = load(source)
    name = experts_names(model)[0]
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in calibration():
            model(**batch)
    expected, captured = torch.cat(seen), []
    make = BitsMoEModifier._make

    def spy(self: BitsMoEModifier, module: torch.nn.Module, layer: str, inputs: list) -> object:
        if layer == name:
            captured.extend(x for x, _, _ in inputs)
        return make(self, module, layer, inputs)

    monkeypatch.setattr(BitsMoEModifier, "_make", spy)
    run(source, [modifier(refine_passes=0)], pipeline="sequential")
    # eager attention sums in another order than the default one
    torch.testing.assert_close(torch.cat(captured), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_quantized_layers_are_seen_by_the_next(dense_checkpoint: Checkpoint) -> None:
    """Calibration of layer 1 runs on what the packed layer 0 gives: its inputs depend on how layer 0 was quantized."""
    source = dense_checkpoint("qwen3_moe")
    both, second = run(source, [modifier(bits=1.5)]), run(source, [modifier(bits=1.5, ignore=["re:.*layers.0.*"])])
    name = "model.layers.1.mlp.experts"
    assert list(packed_modules(second)) == [name]
    one, two = (m.get_submodule(name).report.relative_output_error for m in (both, second))
    assert one != two


def test_ignored_layers_stay_dense(dense_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = dense_checkpoint("deepseek_v3")
    model = run(source, [modifier(ignore=["re:.*layers[.]2[.].*"])], output_dir=tmp_path / "out")
    assert list(packed_modules(model)) == ["model.layers.1.mlp.experts"]
    loaded = check_reload(model, tmp_path / "out")
    dense, kept = load(source).model.layers[2].mlp.experts, loaded.model.layers[2].mlp.experts
    assert torch.equal(kept.gate_up_proj, dense.gate_up_proj)
    assert torch.equal(kept.down_proj, dense.down_proj)


def test_super_experts_are_kept(dense_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = dense_checkpoint("qwen3_moe", torch.bfloat16)
    listed = ["model.layers.0.mlp.experts.5", "model.layers.1.mlp.experts.0", "model.layers.1.mlp.experts.2"]
    model = run(source, [modifier(bits=6.5, super_experts=listed)], output_dir=tmp_path / "out")
    loaded, dense = check_reload(model, tmp_path / "out"), load(source)
    for layer, ids in ((0, [5]), (1, [0, 2])):
        experts, original = loaded.model.layers[layer].mlp.experts, dense.model.layers[layer].mlp.experts
        assert experts.dense_ids.tolist() == ids
        assert experts.packed.bits_per_weight <= 6.5
        assert torch.equal(experts.dense_in, original.gate_up_proj[ids])
        assert torch.equal(experts.dense_out, original.down_proj[ids])


def test_scopes_differ(dense_checkpoint: Checkpoint) -> None:
    """Equal budgets per layer, or one for all; the second follows what the layers are worth."""
    source = dense_checkpoint("qwen3_moe", num_hidden_layers=3)
    bits = {}
    for scope in ("layer", "global"):
        model = run(source, [modifier(scope=scope)])
        check_quantized(model, load(source), scope=scope)
        bits[scope] = [module.report.bits for module in packed_modules(model).values()]
    assert max(bits["layer"]) - min(bits["layer"]) < 0.05 < max(bits["global"]) - min(bits["global"])


def test_basic_pipeline(dense_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """One pass over the whole model; quantized layers are not seen by the next, everything else is the same."""
    source = dense_checkpoint("olmoe")
    model = run(source, YAML, pipeline="basic", output_dir=tmp_path / "out")
    check_quantized(model, load(source))
    check_reload(model, tmp_path / "out")


def test_offloaded_to_disk(dense_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A model whose weights live on disk quantizes to the same bytes."""
    source = dense_checkpoint("qwen3_moe")
    offloaded = load(source)
    owners = [name for name, module in offloaded.named_modules() if list(module.parameters(recurse=False))]
    (tmp_path / "weights").mkdir()
    dispatch_with_map(offloaded, {name: (torch.device("cpu"), "disk") for name in owners}, str(tmp_path / "weights"))
    for model, out in ((offloaded, "one"), (load(source), "two")):
        oneshot(model=model, dataset=calibration(), recipe=YAML, output_dir=tmp_path / out)
    one, two = (load(tmp_path / out).state_dict() for out in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_two_runs_give_the_same_bytes(dense_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = dense_checkpoint("mixtral")
    files = []
    for attempt in ("one", "two"):
        run(source, YAML, output_dir=tmp_path / attempt)
        files.append((tmp_path / attempt / "model.safetensors").read_bytes())
    assert files[0] == files[1]
