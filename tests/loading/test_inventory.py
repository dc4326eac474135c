"""Which tensors of a source its model holds, and what becomes of the others."""

import json
from pathlib import Path

import pytest
import torch
from llmcompressor import oneshot
from transformers import AutoConfig

from bitsmoe_modifier import BitsMoEModifier, CheckpointError
from bitsmoe_modifier.calibration.patches import _Published
from bitsmoe_modifier.loading.claims import matches
from bitsmoe_modifier.loading.inventory import Instead, check_nothing_lost, keep_beside, take_inventory
from bitsmoe_modifier.sources.companions import let_save
from bitsmoe_modifier.storage.mtp import is_mtp
from helpers import calibration, load, pack_randomly, packed_modules, save, tiny_model
from published import add_shard, publish, stored_tensors

MTP = {
    "model.layers.2.mlp.experts.0.gate_proj.weight": torch.ones(32, 64),
    "model.layers.2.eh_proj.weight": torch.arange(64 * 128).reshape(64, 128).bfloat16(),
    "model.layers.2.shared_head.fp8": torch.ones(4, 4).to(torch.float8_e4m3fn),
}


@pytest.fixture(params=["qwen3_moe", "mixtral"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return publish(tiny_model(request.param, num_hidden_layers=2), tmp_path / "source", MTP)


def test_the_layers_beyond_the_last_are_beside(source: Path) -> None:
    inventory = take_inventory(load(source), source)
    assert set(inventory.beside) == set(MTP) == set(inventory.mtp)
    assert len(inventory.loaded) == len(stored_tensors(source)) - len(MTP)


def test_they_are_kept_bit_for_bit(source: Path, tmp_path: Path) -> None:
    model = load(source)
    inventory = take_inventory(model, source)
    pack_randomly(model)
    let_save(model)
    out = save(model, tmp_path / "out")
    kept = keep_beside(inventory, out)
    check_nothing_lost(inventory, model, out)
    assert set(kept.kept) == set(MTP)
    assert "bit for bit" in kept.sentences()[0]
    stored = stored_tensors(out)
    assert all(stored[key].dtype == tensor.dtype for key, tensor in MTP.items())
    assert all(torch.equal(stored[key].float(), tensor.float()) for key, tensor in MTP.items())
    load(out)


def test_they_are_dropped_on_request_and_no_longer_counted(tmp_path: Path) -> None:
    source = publish(tiny_model("deepseek_v3"), tmp_path / "source", {"model.layers.3.eh_proj.weight": torch.ones(4)})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    model = load(source)
    inventory = take_inventory(model, source)
    let_save(model)
    out = save(model, tmp_path / "out")
    kept = keep_beside(inventory, out, "drop")
    check_nothing_lost(inventory, model, out)
    assert kept.dropped == ("model.layers.3.eh_proj.weight",)
    assert "dropped" in kept.sentences()[0]
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize("treatment", ["keep", "drop", "quantize"])
def test_what_llm_compressor_copied_of_them_goes(treatment: str, tmp_path: Path) -> None:
    """It copies ``mtp.*`` for configs that count such layers as Qwen3.5's does, and has config.json ignore them."""
    experts = {f"mtp.layers.0.mlp.experts.{leaf}": torch.ones(4, 4, 4) for leaf in ("gate_up_proj", "down_proj")}
    mtp = {"mtp.fc.weight": torch.ones(4, 8), **experts}
    source = publish(tiny_model("qwen3_moe", num_hidden_layers=2), tmp_path / "source", mtp)
    model = load(source)
    inventory = take_inventory(model, source)
    pack_randomly(model)
    let_save(model)
    out = save(model, tmp_path / "out")
    files = dict.fromkeys(stored_tensors(out), "model.safetensors")
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    add_shard(out, {key: tensor + 1 for key, tensor in mtp.items()}, "model_mtp.safetensors")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["ignore"] = ["re:^mtp.*"]
    (out / "config.json").write_text(json.dumps(config))

    packed = {"mtp.layers.0.mlp.experts.layout": torch.zeros(3)}
    instead = [Instead(frozenset(experts), packed, "mtp.layers.0.mlp.experts")] if treatment == "quantize" else []
    keep_beside(inventory, out, treatment, instead=instead)
    wanted = {"keep": set(mtp), "drop": set(), "quantize": {"mtp.fc.weight", *packed}}[treatment]
    stored = {key: tensor for key, tensor in stored_tensors(out).items() if key.startswith("mtp.")}
    assert set(stored) == wanted
    assert all(torch.equal(tensor, mtp[key]) for key, tensor in stored.items() if key in mtp)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["ignore"] == []


def test_other_groups_do_not_mean_them(source: Path, tmp_path: Path) -> None:
    model = load(source)
    inventory = take_inventory(model, source)
    pack_randomly(model)
    let_save(model)
    out = save(model, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["config_groups"]["other"] = {"format": "pack-quantized", "targets": ["Linear"]}
    (out / "config.json").write_text(json.dumps(config))
    keep_beside(inventory, out)
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    modules = {key.rpartition(".")[0] for key in MTP if key.startswith(("mtp.", "model.layers."))}
    assert modules
    assert all(matches(name, ignored) for name in modules)
    assert not any(matches(name.rpartition(".")[0], ignored) for name in inventory.loaded)


def test_a_tensor_that_was_not_saved_is_an_error(source: Path, tmp_path: Path) -> None:
    model = load(source)
    inventory = take_inventory(model, source)
    del model.model.norm
    let_save(model)
    out = save(model, tmp_path / "out")
    keep_beside(inventory, out)
    with pytest.raises(CheckpointError, match=r"1 tensors of the source would be missing .*\(model\.norm\.weight\)"):
        check_nothing_lost(inventory, model, out)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mtp.layers.0.mlp.experts.gate_up_proj", True),
        ("model.mtp.fc.weight", True),
        ("model.layers.2.mlp.up_proj.weight", True),
        ("model.language_model.layers.2.mlp.up_proj.weight", True),
        ("model.layers.1.mlp.up_proj.weight", False),
        ("model.visual.layers.7.mlp.up_proj.weight", False),
        ("model.layers.1.prompt.weight", False),
    ],
)
def test_names_of_multi_token_prediction(name: str, expected: bool) -> None:
    assert is_mtp(name, 2) is expected


def test_oneshot_on_a_folder_keeps_them(tmp_path: Path) -> None:
    """llm-compressor's own entry point, which saves what transformers has loaded and nothing else."""
    source, out = publish(tiny_model("qwen3_moe", num_hidden_layers=2), tmp_path / "source", MTP), tmp_path / "out"
    (source / "generation_config.json").unlink()
    config = json.loads((source / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]  # as it was published
    (source / "config.json").write_text(json.dumps(config))
    modifier = BitsMoEModifier(bits=6.0, block_size=16, scope="layer", solver="lagrangian", refine_passes=0)
    oneshot(model=str(source), dataset=calibration(vocab=30), recipe=[modifier], output_dir=out)
    stored = stored_tensors(out)
    assert all(torch.equal(stored[key].float(), tensor.float()) for key, tensor in MTP.items())
    assert len(packed_modules(load(out))) == 2
    made = json.loads((out / "config.json").read_text())
    assert made.pop("quantization_config")
    assert made == {**config, "transformers_version": made["transformers_version"]}


def test_oneshot_on_a_hub_model_keeps_them_too(tmp_path: Path) -> None:
    """Its files are in the hub's cache, links to files of other names."""
    source = publish(tiny_model("qwen3_moe", num_hidden_layers=2), tmp_path / "source", MTP)
    cache, commit = tmp_path / "cache", 40 * "a"
    model = cache / "models--org--tiny"
    for folder in ("blobs", "refs", f"snapshots/{commit}"):
        (model / folder).mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    for number, file in enumerate(sorted(source.iterdir())):
        file.rename(model / "blobs" / str(number))
        (model / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{number}")
    where = {"cache_dir": cache, "revision": "main", "local_files_only": True}
    config = AutoConfig.from_pretrained("org/tiny", **where)
    inventory = _Published.from_pretrained("org/tiny", config=config, **where).source_inventory
    assert set(inventory.mtp) == set(MTP)
    assert inventory.folder == model / "snapshots" / commit
