"""`bitsmoe plan` and the check before a run, against what the files and a run hold."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bitsmoe_modifier import BitsMoEError, RecipeError
from bitsmoe_modifier.calibration.recipe import Stage
from bitsmoe_modifier.checkpoints import plan as planning
from bitsmoe_modifier.checkpoints.plan import check_machine, encoding_rate, make_plan, matrix_rate, read_headers
from bitsmoe_modifier.checkpoints.planning import Plan
from bitsmoe_modifier.cli import main
from bitsmoe_modifier.storage.sizes import checkpoint_bytes
from helpers import save_tokenizer
from low_precision import publish_fp8
from tiny_text import save_tiny

FIELDS = {"bits": 4.0, "group_size": 16, "block_size": 16}


_disk = shutil.disk_usage


def stage(name: str = "ours", **fields: object) -> Stage:
    return Stage(name, (("BitsMoEModifier", {**FIELDS, **fields}),), "")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "quant_stage: {quant_modifiers: {BitsMoEModifier: {bits: 4.0, group_size: 16, block_size: 16, scope: layer}}}"
    )
    return path


def test_experts_that_stay_in_files_are_not_held(tmp_path: Path) -> None:
    """Of a source in FP8: only what is beside the experts is in memory, and it is stored as the source has it."""
    save_tiny(tmp_path / "bf16")
    shutil.copytree(tmp_path / "bf16", tmp_path / "fp8")
    publish_fp8(tmp_path / "fp8")
    plans = [
        make_plan(read_headers(str(tmp_path / name)), FIELDS, 1024, torch.float32, "cpu") for name in ("bf16", "fp8")
    ]
    (shape, dense), (_, low) = plans
    experts = sum(layer.weights for layer in shape.layers)
    assert dense.cpu["model"] - low.cpu["model"] == 4 * experts
    assert low.cpu["layer: weights"] == dense.cpu["layer: weights"] // 8
    assert low.result_bytes < dense.result_bytes


def test_sizes_of_the_model_and_of_the_result(tiny: Path, recipe: Path, tmp_path: Path) -> None:
    """The result's size is that of a real run's checkpoint, up to headers and a budget that is not spent whole."""
    shape, plan = make_plan(read_headers(str(tiny / "model")), FIELDS, 1024, torch.float32, "cpu")
    assert shape.stored_bytes == sum(size.nbytes for size in read_headers(str(tiny / "model")).sizes.values())
    out = tmp_path / "out"
    arguments = [
        "--calibration",
        str(tiny / "calibration.txt"),
        "--samples",
        "16",
        "--seq-len",
        "32",
        "--out",
        str(out),
    ]
    assert main(["quantize", "--model", str(tiny / "model"), "--recipe", str(recipe), *arguments]) == 0
    assert 0.95 < plan.result_bytes / checkpoint_bytes(out) < 1.05
    assert 0 < shape.expert_bytes < shape.stored_bytes


def test_no_weights_are_read(tiny: Path, tmp_path: Path) -> None:
    """Files that end after their headers' promise are refused, but bytes of tensors may be anything."""
    copy = tmp_path / "model"
    shutil.copytree(tiny / "model", copy)
    for file in copy.glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        content[start:] = b"\xff" * (len(content) - start)
        file.write_bytes(content)
    plans = [
        make_plan(read_headers(str(folder)), FIELDS, 512, torch.float32, "cpu") for folder in (tiny / "model", copy)
    ]
    assert plans[0] == plans[1]


def test_memory_grows_with_what_it_depends_on(tiny: Path) -> None:
    headers = read_headers(str(tiny / "model"))

    def memory(tokens: int = 512, dtype: torch.dtype = torch.float32, device: str = "cpu", **fields: object) -> int:
        return make_plan(headers, {**FIELDS, **fields}, tokens, dtype, device)[1].cpu_bytes

    base = memory()
    assert memory(tokens=5120) > base
    assert memory(dtype=torch.bfloat16) < base
    assert memory(error_feedback=False) < base
    assert memory(scope="layer") < base
    assert memory(device="cuda") < base, "layers are quantized elsewhere"


def test_command(tiny: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", str(tiny / "model"), "--recipe", str(recipe), "--bits", "3"]) == 0
    said = capsys.readouterr().out
    for words in ("layers have experts to quantize", "MB on disk", "GB at the peak", "libraries", "time"):
        assert words in said


def test_trellis_codes_take_the_encoders_time(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every weight passes the encoder once and once more for each refinement; what prices bit-widths comes on top."""
    headers = read_headers(str(tiny / "model"))

    def planned(**fields: object) -> tuple[int, Plan]:
        shape, plan = make_plan(headers, {**FIELDS, **fields}, 512, torch.float32, "cpu")
        return sum(layer.weights for layer in shape.layers), plan

    weights, scalar = planned(codes="scalar")
    assert scalar.encoded == 0
    once, twice = (planned(codes="trellis", refine_passes=passes)[1] for passes in (0, 1))
    assert twice.encoded - once.encoded == weights
    assert once.encoded > weights
    assert once.seconds(1e9, 1e6) - once.seconds(1e9) == pytest.approx(once.encoded / 1e6)
    assert encoding_rate("cpu") > 1e4
    assert main(["plan", "--model", str(tiny / "model"), "--codes", "trellis", "--samples", "8"]) == 0
    assert "M trellis codes at" in capsys.readouterr().out


def test_no_time_by_the_rates_of_another_device(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan for a GPU that is elsewhere said how long this machine's CPU would take: days in place of minutes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["plan", "--model", str(tiny / "model"), "--samples", "8", "--device", "cuda"]) == 0
    said = capsys.readouterr().out
    assert "accelerator" in said
    assert said.splitlines()[-1].endswith(
        "time            not known: this machine has no such device; run plan on one that has"
    )


@pytest.mark.parametrize("what", ["memory", "disk"])
def test_run_that_cannot_fit_is_refused(what: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if what == "memory":
        monkeypatch.setattr(planning, "available_memory", lambda: 10**8)
    else:
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(planning.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(BitsMoEError, match=rf"need.* {what}.*--no-preflight to try it anyway"):
        check_machine([stage()], tiny / "model", tmp_path / "out", 512, torch.float32, "cpu")


def test_weights_that_may_wait_on_disk_need_no_memory(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, plan = make_plan(read_headers(str(tiny / "model")), {**FIELDS, "scope": "layer"}, 512, torch.float32, "cpu")
    run: Any = (tiny / "model", tmp_path / "out", 512, torch.float32, "cpu")
    monkeypatch.setattr(planning, "available_memory", lambda: plan.cpu_bytes - shape.parameters)
    with pytest.raises(BitsMoEError, match="let weights wait on disk by --offload-dir"):
        check_machine([stage(scope="layer")], *run)
    check_machine([stage(scope="layer")], *run, tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda at: usage if at == tmp_path / "w" else _disk(at))
    with pytest.raises(BitsMoEError, match="of weights have to wait on disk"):
        check_machine([stage(scope="layer")], *run, tmp_path / "w")


def test_every_process_of_a_machine_needs_its_memory(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: Any = ([stage()], tiny / "model", tmp_path / "out", 512, torch.float32, "cpu")
    monkeypatch.setattr(planning, "available_memory", lambda: 3 * 10**9)
    check_machine(*arguments)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(BitsMoEError, match=r"of memory, 8 times \(.*fewer processes"):
        check_machine(*arguments)


def test_refusal_and_its_override_on_the_command_line(
    tiny: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planning, "available_memory", lambda: 10**8)
    command = [
        "quantize",
        "--model",
        str(tiny / "model"),
        "--recipe",
        str(recipe),
        "--samples",
        "16",
        "--seq-len",
        "32",
    ]
    command += ["--calibration", str(tiny / "calibration.txt"), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "--no-preflight" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, "--no-preflight"]) == 0


def test_stages_without_our_modifier_are_not_planned(tiny: Path, tmp_path: Path) -> None:
    check_machine([Stage("gptq", (("GPTQModifier", {}),), "")], tiny / "model", tmp_path, 512, torch.float32, "cpu")


def test_experts_without_a_gate_count_two_matrices(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "vocab_size": 128, "intermediate_size": 48, "moe_intermediate_size": 48}
    mixer = {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "n_routed_experts": 8}
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2}
    config = AutoConfig.for_model(
        "nemotron_h", layers_block_type=["moe", "full_attention", "moe"], **sizes, **mixer, **attention
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    headers = read_headers(str(tmp_path / "model"))
    stored = sum(size.nbytes for name, size in headers.sizes.items() if ".experts." in name)
    shape, plan = make_plan(headers, {**FIELDS, "scope": "layer"}, 512, torch.float32, "cpu")
    assert shape.expert_bytes == stored == 2 * 2 * 8 * 64 * 48 * 4
    assert plan.result_bytes == shape.stored_bytes - stored + 2 * 2 * 8 * 64 * 48 * FIELDS["bits"] / 8


def test_unsupported_family_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128, "intermediate_size": 48, "kv_channels": 16}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("jetmoe", **sizes)).save_pretrained(tmp_path / "jetmoe")
    save_tokenizer(tmp_path / "jetmoe")
    with pytest.raises(RecipeError, match=r"model_type jetmoe\) is not supported"):
        make_plan(read_headers(str(tmp_path / "jetmoe")), FIELDS, 512, torch.float32, "cpu")


def test_matrix_rate_is_of_the_order_of_a_machine() -> None:
    assert 1e8 < matrix_rate("cpu", size=256) < 1e15
