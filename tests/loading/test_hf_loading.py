"""Saving through llm-compressor, loading through transformers: equal logits, and an error for every bad checkpoint."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from llmcompressor.modeling.moe.linearize import linearize_moe
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel

from bitsmoe_modifier import CheckpointError
from bitsmoe_modifier.loading import quantizer as hf
from bitsmoe_modifier.runtime.experts import BitsMoEExperts
from bitsmoe_modifier.storage.packed import TENSOR_NAMES, PackedExperts
from helpers import ARCHITECTURES, experts_names, logits, pack_randomly, random_layer, save, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")


FIRST, SECOND = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"


def _load(folder: Path, **kwargs: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def _packed(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """All stored tensors of all packed layers."""
    modules = {n: m for n, m in model.named_modules() if isinstance(m, BitsMoEExperts)}
    return {f"{name}.{leaf}": t for name, m in modules.items() for leaf, t in m.packed.items()}


def _assert_same_tensors(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


# ----------------------------------------------------------------------------------------------- what must work


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reloaded_model_gives_the_same_logits(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(architecture, dtype)
    stripes = int(architecture == "olmoe")  # trellis codes
    pack_randomly(model, dense=(1,) if architecture == "qwen3_moe" else (), stripes=stripes)
    before = logits(model)
    save(model, tmp_path)
    assert torch.equal(logits(model), before), "saving leaves the model as it was"
    loaded = _load(tmp_path, dtype="auto")
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded), before)
    _assert_same_tensors(_packed(loaded), _packed(model))
    assert not any(p.requires_grad for m in loaded.modules() if isinstance(m, BitsMoEExperts) for p in m.parameters())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """A float32 Qwen3-MoE with packed experts, and its checkpoint. Not to be changed."""
    model = tiny_model("qwen3_moe")
    pack_randomly(model)
    return model, save(model, tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({"dtype": torch.bfloat16}, torch.bfloat16),
        ({"dtype": "float32", "device_map": "cpu"}, torch.float32),
        ({"dtype": "bfloat16", "device_map": "auto"}, torch.bfloat16),
    ],
    ids=["default", "bfloat16", "device_map-cpu", "device_map-auto"],
)
def test_loading_options(saved: tuple[PreTrainedModel, Path], options: dict, dtype: torch.dtype) -> None:
    model, folder = saved
    loaded = _load(folder, **options)
    assert loaded.dtype == dtype
    _assert_same_tensors(_packed(loaded), _packed(model))
    assert torch.equal(logits(loaded), logits(_rebuilt(model, dtype)))


def _rebuilt(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The fixture's model without the hooks and wrappers that saving left behind."""
    fresh = tiny_model("qwen3_moe", dtype)
    pack_randomly(fresh)
    fresh.load_state_dict(model.state_dict())
    return fresh


def test_offloaded_to_disk(saved: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    """Parameters are on the meta device between calls."""
    model, folder = saved
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu"}
    device_map |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    loaded = _load(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(loaded), logits(model))


def test_sharded(saved: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    model, _ = saved
    again = _rebuilt(model)
    save(again, tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert torch.equal(logits(_load(tmp_path)), logits(model))


def test_generates(saved: tuple[PreTrainedModel, Path]) -> None:
    model, folder = saved
    ids = torch.arange(12).view(1, 12)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(_load(folder).generate(ids, max_new_tokens=8, do_sample=False), expected)


@pytest.mark.parametrize("after_forward", [False, True], ids=["as-loaded", "after-forward"])
@pytest.mark.parametrize("how", ["transformers", "llmcompressor"])
def test_saving_a_reloaded_model(
    saved: tuple[PreTrainedModel, Path], how: str, after_forward: bool, tmp_path: Path
) -> None:
    model, folder = saved
    loaded = _load(folder)
    if after_forward:
        logits(loaded)
    if how == "transformers":
        loaded.save_pretrained(tmp_path)
    else:
        save(loaded, tmp_path)
    _assert_same_tensors(load_file(tmp_path / "model.safetensors"), load_file(folder / "model.safetensors"))
    configs = [json.loads((at / "config.json").read_text())["quantization_config"] for at in (folder, tmp_path)]
    assert configs[0]["config_groups"] == configs[1]["config_groups"]
    assert torch.equal(logits(_load(tmp_path)), logits(model))


def test_dense_experts_are_never_allocated(
    saved: tuple[PreTrainedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced: list[str] = []
    original = hf._placeholder

    def spy(stored, module, name):
        assert all(p.is_meta for p in module.parameters())
        experts = original(stored, module, name)
        assert all(p.is_meta for p in experts.parameters())
        replaced.append(name)
        return experts

    monkeypatch.setattr(hf, "_placeholder", spy)
    loaded = _load(saved[1])
    assert replaced == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert experts_names(loaded) == []


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_some_layers_stay_dense(architecture: str, tmp_path: Path) -> None:
    """The experts that are not packed are loaded as ever."""
    model = tiny_model(architecture)
    pack_randomly(model, ["model.layers.1.mlp.experts"])
    before = logits(model)
    loaded = _load(save(model, tmp_path))
    assert experts_names(loaded) == ["model.layers.0.mlp.experts"]
    assert torch.equal(logits(loaded), before)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_another_dtype_than_the_files(architecture: str, tmp_path: Path) -> None:
    """Also tensors that transformers renames on the way (Mixtral's routers) come in the dtype that was asked for."""
    model = tiny_model(architecture).bfloat16()
    pack_randomly(model)
    save(model, tmp_path)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for n, p in wide.named_parameters() if ".experts." not in n} == {torch.float32}
    assert bool(torch.isfinite(logits(wide)).all())


def _quantize_linears(model: PreTrainedModel, target: str) -> None:
    """Round-to-nearest 4 bits in groups of 16 with compressed-tensors' own code, as GPTQModifier leaves it."""
    weights = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=16, symmetric=True)
    scheme = QuantizationScheme(targets=[target], weights=weights)
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}), show_progress=False)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and hasattr(module, "weight_scale"):
            groups = module.weight.detach().unflatten(1, (-1, 16))
            module.weight_scale.data.copy_(groups.abs().amax(-1) / 7.5)
            module.quantization_status = QuantizationStatus.FROZEN


def test_attention_in_four_bits_in_the_same_checkpoint(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    _quantize_linears(model, r"re:.*self_attn\.._proj$")
    pack_randomly(model)
    save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert sorted(group["format"] for group in config["config_groups"].values()) == ["bitsmoe", "pack-quantized"]
    loaded = _load(tmp_path)
    assert loaded.model.layers[0].self_attn.q_proj.weight_packed.dtype == torch.int32
    assert torch.equal(logits(loaded), logits(model))
    assert isinstance(loaded.model.layers[0].mlp.experts, BitsMoEExperts)
    # the stock classes have now decompressed the attention, and transformers saves it dense
    loaded.save_pretrained(tmp_path / "again")
    again = _load(tmp_path / "again")
    assert again.model.layers[0].self_attn.q_proj.weight.dtype == torch.float32
    assert torch.equal(logits(again), logits(model))
    _assert_same_tensors(_packed(again), _packed(model))
    assert again.config.quantization_config is not None


def test_other_experts_packed_as_linears(tmp_path: Path) -> None:
    """Layer 0's experts by our format, layer 1's in 4 bits by the stock one, as one recipe with two modifiers does."""
    model = tiny_model("qwen3_moe")
    pack_randomly(model, [FIRST])
    linearize_moe(model)
    _quantize_linears(model, r"re:.*layers\.1\.mlp\.experts\.\d+\.\w+_proj$")
    loaded = _load(save(model, tmp_path))
    assert f"{SECOND}.0.gate_proj.weight_packed" in load_file(tmp_path / "model.safetensors")
    assert experts_names(loaded) == [SECOND], "the stock loader fuses them"
    assert torch.allclose(logits(loaded), logits(model), rtol=1e-4, atol=1e-5), "other kernels, same weights"


def test_other_checkpoints_pass_through(tmp_path: Path) -> None:
    """A dense model quantized by the stock format alone."""
    config = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=128, **config)).eval()
    _quantize_linears(model, "Linear")
    loaded = _load(save(model, tmp_path))
    assert loaded.model.layers[0].mlp.up_proj.weight_packed.dtype == torch.int32
    assert torch.equal(logits(loaded), logits(model))


# -------------------------------------------------------------------------------------------- what must be refused

Tensors = dict[str, torch.Tensor]


def _flip(tensor: torch.Tensor, place: int = 5) -> torch.Tensor:
    """A copy with one bit of one byte flipped."""
    flipped = tensor.clone()
    flipped.view(-1).view(torch.uint8)[place] ^= 1
    return flipped


def _put(tensor: torch.Tensor, value: float, place: int = 3) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(-1)[place] = value
    return changed


def _sealed(tensors: Tensors, name: str) -> Tensors:
    """Checksums that fit the tensors, as a forger would write them."""
    parts = {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}
    packed = PackedExperts(**{n: t for n, t in parts.items() if n in TENSOR_NAMES}).sealed()
    return tensors | {f"{name}.checksums": packed.checksums}


def _change(name: str, leaf: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {f"{name}.{leaf}": change(tensors[f"{name}.{leaf}"])}


def _without(*keys: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: t for k, t in tensors.items() if not any(k == x or k.startswith(f"{x}.") for x in keys)}


def _swap(leaf: str) -> Callable[[Tensors], Tensors]:
    one, two = f"{FIRST}.{leaf}", f"{SECOND}.{leaf}"
    return lambda tensors: tensors | {one: tensors[two], two: tensors[one]}


def _other_layer(**sizes: int) -> Callable[[Tensors], Tensors]:
    """A whole and valid layer of other sizes."""
    packed = random_layer(**{"num_experts": 8, "intermediate": 32, **sizes}).packed
    layer = {f"{FIRST}.{leaf}": tensor for leaf, tensor in packed.items()}
    return lambda tensors: _without(FIRST)(tensors) | layer


BAD_TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], tuple[str, ...]]] = {
    "codes-flipped": (_change(FIRST, "codes_in", _flip), (FIRST, "codes_in", "checksum")),
    "basis-flipped": (_change(SECOND, "basis_out", _flip), (SECOND, "basis_out", "checksum")),
    "steps-flipped": (_change(FIRST, "steps_out", _flip), (FIRST, "steps_out", "checksum")),
    "checksum-flipped": (_change(FIRST, "checksums", _flip), (FIRST, "layout", "checksum")),
    "nan-step": (_change(FIRST, "basis_in_step", lambda t: _put(t, float("nan"))), (FIRST, "basis_in_step", "NaN")),
    "infinite-step": (
        _change(FIRST, "basis_in_step", lambda t: _put(t, float("inf"))),
        (FIRST, "basis_in_step", "infinity"),
    ),
    "unknown-width": (_change(FIRST, "widths_in", lambda t: _put(t, 5)), (FIRST, "widths_in", "[5]")),
    "other-width": (_change(FIRST, "widths_out", lambda t: _put(t, 8 - int(t.view(-1)[3]))), (FIRST, "codes_out")),
    "newer-version": (_change(FIRST, "layout", lambda t: _put(t, 3, 0)), (FIRST, "layout", "version 3", "upgrade")),
    "no-header": (_change(FIRST, "layout", torch.zeros_like), (FIRST, "layout", "not a bitsmoe header")),
    "absurd-header": (_change(FIRST, "layout", lambda t: _put(t, 2**31 - 1, 4)), (FIRST, "layout", "rank_in")),
    "negative-header": (_change(FIRST, "layout", lambda t: _put(t, -1, 1)), (FIRST, "layout", "num_experts")),
    "wide-header": (_change(FIRST, "layout", lambda t: t.long()), (FIRST, "layout", "int64")),
    "other-dtype": (_change(FIRST, "steps_in", lambda t: t.float()), (FIRST, "steps_in", "float32", "uint8")),
    "other-shape": (_change(FIRST, "basis_in", lambda t: t[:-1]), (FIRST, "basis_in")),
    "unknown-dtype": (
        _change(FIRST, "steps_in", lambda t: t.float().to(torch.float8_e4m3fn)),
        (FIRST, "steps_in", "float8_e4m3fn"),
    ),
    "shorter-codes": (_change(FIRST, "codes_in", lambda t: t[:-1]), (FIRST, "codes_in")),
    "missing-codes": (_without(f"{FIRST}.codes_out"), (FIRST, "codes_out", "missing")),
    "missing-header": (_without(f"{FIRST}.layout"), (FIRST, "layout", "missing")),
    "missing-checksums": (_without(f"{FIRST}.checksums"), (FIRST, "checksums", "missing")),
    "missing-layer": (_without(SECOND), (SECOND, "no file holds")),
    "extra-tensor": (lambda t: t | {f"{FIRST}.surprise": torch.zeros(1)}, (FIRST, "surprise", "does not belong")),
    "dense-beside": (
        lambda t: t | {f"{FIRST}.0.gate_proj.weight": torch.zeros(32, 64)},
        (FIRST, "0.gate_proj.weight", "does not belong"),
    ),
    "super-expert-not-announced": (
        lambda t: t | {f"{FIRST}.dense_ids": torch.zeros(1, dtype=torch.int32)},
        (FIRST, "dense_ids", "does not belong"),
    ),
    "swapped-codes": (_swap("codes_in"), (FIRST, "codes_in")),
    "swapped-equal-sizes": (_swap("basis_in"), (FIRST, "basis_in", "checksum")),
    "more-experts": (_other_layer(num_experts=9), (FIRST, "num_experts is 9", "8")),
    "wider-experts": (_other_layer(intermediate=48), (FIRST, "intermediate_size is 48", "32")),
    "other-hidden": (_other_layer(hidden=128), (FIRST, "hidden_size is 128", "64")),
    "biased": (lambda t: _other_layer(bias=True)(t), (FIRST, "has_bias is True", "False")),
    "repeated-super-expert": (
        lambda t: _sealed(_change(FIRST, "dense_ids", lambda i: i * 0)(_other_layer(dense=(1, 2))(t)), FIRST),
        (FIRST, "dense_ids", "distinct"),
    ),
    "layer-of-no-model": (
        lambda t: t | {k.replace("layers.0", "layers.7"): v.clone() for k, v in t.items() if k.startswith(FIRST)},
        ("layers.7", "do not belong together"),
    ),
}


@pytest.fixture
def copy_of(saved: tuple[PreTrainedModel, Path], tmp_path: Path) -> Path:
    """A copy of the checkpoint to damage."""
    return shutil.copytree(saved[1], tmp_path / "copy")


def _assert_refused(folder: Path, *words: str, **options: object) -> None:
    with pytest.raises(CheckpointError) as caught:
        _load(folder, **options)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_named(case: str, copy_of: Path) -> None:
    damage, words = BAD_TENSORS[case]
    file = copy_of / "model.safetensors"
    tensors = {k: t.contiguous() for k, t in damage(load_file(file)).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    _assert_refused(copy_of, *words)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999], ids=str)
def test_truncated_file_is_named(keep: float, copy_of: Path) -> None:
    file = copy_of / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if keep < 1 else int(keep)])
    _assert_refused(copy_of, "model.safetensors", "damaged or incomplete")


@pytest.fixture(scope="module")
def shards(saved: tuple[PreTrainedModel, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(_rebuilt(saved[0]), tmp_path_factory.mktemp("shards"), max_shard_size="60KB")


def test_missing_shard_is_named(shards: Path, tmp_path: Path) -> None:
    """transformers resolves the list of files itself, before the quantizer sees it."""
    folder = shutil.copytree(shards, tmp_path / "copy")
    victim = sorted(folder.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises((CheckpointError, OSError), match=victim.name):
        _load(folder)


def test_truncated_shard_is_named(shards: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(shards, tmp_path / "copy")
    victim = sorted(folder.glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-10])
    _assert_refused(folder, victim.name)


def test_repeated_tensor_is_named(shards: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(shards, tmp_path / "copy")
    one, two = sorted(folder.glob("*.safetensors"))[:2]
    repeated = dict([next(iter(load_file(one).items()))])
    save_file(load_file(two) | repeated, two, metadata={"format": "pt"})
    _assert_refused(folder, one.name, two.name, *repeated)


def test_config_without_one_of_the_layers(copy_of: Path) -> None:
    file = copy_of / "config.json"
    config = json.loads(file.read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    group["targets"] = [target.replace("(?:0|1)", "(?:0)") for target in group["targets"]]
    file.write_text(json.dumps(config))
    _assert_refused(copy_of, "model.safetensors", SECOND, "config.json")


def test_dense_loading_is_refused(saved: tuple[PreTrainedModel, Path]) -> None:
    _assert_refused(saved[1], "dequantize", quantization_config=CompressedTensorsConfig(dequantize=True))


def test_dense_weights_are_to_be_had_elsewhere(saved: tuple[PreTrainedModel, Path]) -> None:
    with pytest.raises(CheckpointError, match="`bitsmoe export` writes dense weights"):
        _load(saved[1]).dequantize()


def test_pickles_are_refused(copy_of: Path) -> None:
    file = copy_of / "model.safetensors"
    torch.save(load_file(file), copy_of / "pytorch_model.bin")
    _assert_refused(copy_of, "pytorch_model.bin", "safetensors", use_safetensors=False)
