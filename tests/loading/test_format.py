"""The compressed-tensors format: registration, the scheme, what it matches, what saving writes and refuses."""

import importlib
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, QuantizationStatus
from compressed_tensors.utils.match import match_name

import bitsmoe_modifier
from bitsmoe_modifier import CheckpointError
from bitsmoe_modifier.loading.format import FORMAT, BitsMoECompressor, attach, bitsmoe_schemes, make_scheme, targets_of
from bitsmoe_modifier.method.gating import Gating
from bitsmoe_modifier.runtime.experts import BitsMoEExperts
from helpers import experts_names, pack_randomly, random_layer, save, tiny_model


def _matched(names: list[str], candidates: list[str]) -> list[str]:
    """The candidates that targets made of ``names`` match."""
    targets = targets_of(names)
    return [name for name in candidates if any(match_name(name, target) for target in targets)]


def test_enum_member_is_valid_everywhere() -> None:
    assert CompressionFormat(FORMAT).value == FORMAT == "bitsmoe"
    assert CompressionFormat(FORMAT) in list(CompressionFormat)
    scheme = QuantizationScheme(targets=["Linear"], format=FORMAT)
    config = QuantizationConfig(config_groups={"group_0": scheme}, format=FORMAT)
    again = QuantizationConfig.model_validate(json.loads(json.dumps(config.model_dump())))
    assert again.config_groups["group_0"].format == FORMAT
    with pytest.raises(ValueError, match="nonsense"):
        QuantizationScheme(targets=["Linear"], format="nonsense")


def test_registration_is_idempotent() -> None:
    before = list(CompressionFormat)
    importlib.import_module("bitsmoe_modifier.loading.format")._extend_enum()
    assert list(CompressionFormat) == before


@pytest.mark.parametrize(
    ("names", "others"),
    [
        (
            ["model.layers.0.mlp.experts", "model.layers.2.mlp.experts", "model.layers.11.mlp.experts"],
            ["model.layers.1.mlp.experts", "model.layers.12.mlp.experts", "model.layers.0.mlp.shared_experts"],
        ),
        (["model.language_model.layers.3.mlp.experts"], ["model.layers.33.mlp.experts", "model.layers.3.mlp.gate"]),
        (["model.layers.1.feed_forward.experts"], ["model.layers.1.self_attn.q_proj", "lm_head", "experts"]),
        (["layers.1.experts"], ["layers.10.experts", "layers.1", "experts"]),
        (["model.encoder.moe.experts"], ["model.decoder.moe.experts", "moe.experts"]),
    ],
)
def test_targets_match_the_given_modules_only(names: list[str], others: list[str]) -> None:
    below = [f"{name}.0.gate_proj" for name in names]
    assert _matched(names, names + below + others) == names + below


@pytest.mark.parametrize(
    "renamed",
    ["model.layers.4.block_sparse_moe.experts", "language_model.model.layers.4.mlp.experts", "layers.4.mlp.experts"],
)
def test_targets_follow_renamings(renamed: str) -> None:
    """Checkpoints of Mixtral and the model classes of vLLM name the same layer differently."""
    assert _matched(["model.layers.4.mlp.experts"], [renamed]) == [renamed]


@pytest.mark.parametrize("prefix", ["model.layers.4.mlp.experts", "model.layers.4.mlp.experts.routed_experts"])
@pytest.mark.parametrize("projections", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
def test_vllm_finds_a_scheme_it_cannot_run(prefix: str, projections: tuple[str, ...]) -> None:
    """vLLM looks for a scheme of each projection of expert 0; with one that no kernel of it takes, it refuses to load.

    Its kernels for integer weights in groups take the format "pack-quantized" only.
    """
    scheme = make_scheme(["model.layers.4.mlp.experts"], group_size=64)
    for projection in projections:
        assert any(match_name(f"{prefix}.0.{projection}", target) for target in scheme.targets)
    assert (scheme.weights.type, scheme.weights.strategy, scheme.format) == ("int", "group", FORMAT)


@pytest.mark.parametrize("value", ["dense", "pack-quantized", CompressionFormat.dense, None])
def test_scheme_keeps_its_format(value: object) -> None:
    scheme = make_scheme(["model.layers.0.mlp.experts"], group_size=64)
    with pytest.raises(CheckpointError, match="save_compressed=False"):
        scheme.format = value
    scheme.format = CompressionFormat(FORMAT)
    assert scheme.format == FORMAT


def test_attach_accepts_a_scheme_read_from_a_config() -> None:
    scheme = make_scheme(["model.layers.0.mlp.experts"], group_size=64)
    read = QuantizationScheme.model_validate(json.loads(scheme.model_dump_json()))
    modules = [BitsMoEExperts(random_layer().packed, Gating()) for _ in range(2)]
    attach(modules[0], scheme)
    attach(modules[1], read)
    assert modules[0].quantization_scheme == modules[1].quantization_scheme
    assert all(m.quantization_status == QuantizationStatus.COMPRESSED for m in modules)


def test_compressor_leaves_packed_modules_alone() -> None:
    module = BitsMoEExperts(random_layer().packed, Gating())
    attach(module, make_scheme(["experts"], group_size=16))
    model = torch.nn.ModuleDict({"experts": module})
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    compressor.decompress_model(model)
    assert module.quantization_status == QuantizationStatus.COMPRESSED
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert BaseCompressor.get_value_from_registry(FORMAT) is BitsMoECompressor


def test_compressor_refuses_other_modules() -> None:
    linear = torch.nn.Linear(8, 8)
    linear.quantization_scheme = QuantizationScheme(
        targets=["Linear"], format=FORMAT, weights=QuantizationArgs(num_bits=2, group_size=8, strategy="group")
    )
    with pytest.raises(CheckpointError, match="Linear cannot be packed"):
        BitsMoECompressor.compress_module(linear)


def test_schemes_of_a_config() -> None:
    ours = make_scheme(["model.layers.0.mlp.experts"], group_size=64)
    other = QuantizationScheme(targets=["Linear"], format="pack-quantized")
    config = QuantizationConfig(config_groups={"group_0": other, "group_1": ours})
    assert bitsmoe_schemes(config) == [ours]
    assert bitsmoe_schemes(None) == []


def test_saving_writes_one_group(tmp_path: Path) -> None:
    model = tiny_model("deepseek_v3")
    pack_randomly(model)
    config = json.loads((save(model, tmp_path / "out") / "config.json").read_text())["quantization_config"]
    assert config["format"] == FORMAT
    assert config["quantization_status"] == "compressed"
    assert config["quant_method"] == "compressed-tensors"
    (group,) = config["config_groups"].values()
    assert group["format"] == FORMAT
    (target,) = group["targets"]
    names = [name for name, _ in model.named_modules() if re.fullmatch(target.removeprefix("re:"), name)]
    assert names == ["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"]


@pytest.mark.parametrize("options", [{"save_compressed": False}, {"quantization_format": "pack-quantized"}], ids=str)
def test_saving_in_another_format_is_refused(tmp_path: Path, options: dict[str, object]) -> None:
    model = tiny_model("qwen3_moe")
    pack_randomly(model)
    with pytest.raises(CheckpointError, match="drop `save_compressed=False`"):
        save(model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists(), "nothing half-written"
    save(model, tmp_path / "out")


def _run(program: str, checkpoint: Path) -> str:
    """Run a program in a fresh interpreter, in a folder of its own."""
    source = str(Path(bitsmoe_modifier.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), source, str(checkpoint)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=checkpoint,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_readers_without_the_package_fail(tmp_path: Path) -> None:
    """transformers alone raises; after the import, in the same process, it reads the checkpoint."""
    model = tiny_model("qwen3_moe")
    pack_randomly(model)
    save(model, tmp_path)
    out = _run(
        """
        import sys
        from transformers import AutoModelForCausalLM
        try:
            AutoModelForCausalLM.from_pretrained(sys.argv[2])
        except Exception as error:
            assert "bitsmoe" in str(error), error
            assert not any(name.startswith("bitsmoe_modifier") for name in sys.modules)
            print("refused", type(error).__name__)
        sys.path.insert(0, sys.argv[1])
        import bitsmoe_modifier
        model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
        print(type(model.model.layers[0].mlp.experts).__name__)
        """,
        tmp_path,
    )
    assert out.splitlines()[-2:] == ["refused ValidationError", "BitsMoEExperts"]


def test_import_is_light_and_registers_later(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    pack_randomly(model)
    save(model, tmp_path)
    out = _run(
        """
        import sys
        sys.path.insert(0, sys.argv[1])
        import bitsmoe_modifier
        print(sorted({"torch", "transformers", "compressed_tensors", "llmcompressor"} & set(sys.modules)))
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
        print(type(model.model.layers[0].mlp.experts).__name__, "llmcompressor" in sys.modules)
        """,
        tmp_path,
    )
    assert out.splitlines()[-2:] == ["[]", "BitsMoEExperts False"]


def test_names_of_the_package() -> None:
    assert bitsmoe_modifier.BitsMoEExperts is BitsMoEExperts
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = bitsmoe_modifier.nothing_here


def test_experts_modules_of_the_tiny_models() -> None:
    assert experts_names(tiny_model("deepseek_v3")) == ["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"]
