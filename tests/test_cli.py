"""The command line: options, exit codes, one-line errors, and that help costs nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bitsmoe_modifier import cli, messages
from bitsmoe_modifier.calibration.recipe import Stage, with_resume
from bitsmoe_modifier.cli import build_parser, demo_asset, main
from bitsmoe_modifier.errors import BitsMoEError, RecipeError
from helpers import pack_randomly, save, tiny_model
from tiny_text import save_tiny, write_text


@pytest.mark.parametrize(
    "command", [[], ["quantize"], ["compare"], ["eval"], ["inspect"], ["export"]], ids=lambda c: "".join(c)
)
def test_help_lists_the_options(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    assert "usage: bitsmoe" in capsys.readouterr().out


def test_help_imports_nothing_heavy():
    code = "import sys; from bitsmoe_modifier.cli import build_parser; build_parser(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "llmcompressor", "compressed_tensors", "matplotlib", "datasets"}
    assert not heavy & set(done.stdout.split())


@pytest.mark.parametrize(
    "arguments",
    [[], ["compare", "--samples", "many"], ["quantize"], ["inspect"], ["eval", "x", "--dtype", "int2"]],
    ids=["no-command", "no-number", "no-out", "no-folder", "no-dtype"],
)
def test_wrong_usage_ends_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: bitsmoe" in capsys.readouterr().err


def test_our_errors_are_one_line_and_exit_code_2(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "missing")]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"bitsmoe inspect: {tmp_path}/missing: no such model folder\n"
    assert captured.out == ""


def test_only_quantize_runs_under_torchrun(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(["compare"]) == 2
    assert "start this command without torchrun" in capsys.readouterr().err


def test_verbose_adds_the_traceback(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "missing"), "--verbose"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_errors_as_json(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "missing"), "--log-json"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    entry = json.loads(line)
    assert entry["event"] == "error"
    assert "no such model folder" in entry["message"]


def test_the_messages_of_a_comparison(capsys):
    from bitsmoe_modifier.comparison.processes import Status

    for mode, expected in (("text", ["arm a"]), ("quiet", []), ("json", ["begin", "end"])):
        messages.configure(mode)
        status = Status(1)
        status.begin("a")
        status.end("arm a")
        status.close()
        lines = capsys.readouterr().err.split("\n")
        said = [line.strip("\r") for line in lines if line.strip()]
        assert [json.loads(line)["event"] for line in said] == expected if mode == "json" else said == expected
    messages.configure("text")


@pytest.mark.parametrize("command", ["quantize", "compare", "eval", "inspect", "export", "completion"])
def test_every_command_shows_examples_that_parse(command):
    parser = build_parser()
    (commands,) = (action for action in parser._actions if hasattr(action, "choices") and action.choices)
    examples = [line.strip() for line in commands.choices[command].epilog.splitlines() if "bitsmoe " in line]
    assert examples
    for line in examples:
        words = line.split("  ")[0].removeprefix("source <(").split(" > ")[0].rstrip(")").split()
        assert words[0] == "bitsmoe"
        assert parser.parse_args(words[1:]).command == command


def test_compare_passes_every_option_on(monkeypatch: pytest.MonkeyPatch, tmp_path, capsys):
    from bitsmoe_modifier.comparison import runner

    seen = {}

    def fake(settings, command):
        seen.update(settings=settings, command=command)
        return {"reference": {"name": "unquantized"}, "arms": [{"name": "a", "error": "no"}]}

    monkeypatch.setattr(runner, "compare", fake)
    options = "--model m --recipe r --calibration c --eval-text e --out o --arms a,b --samples 3 --seq-len 4 --seed 5"
    options += " --eval-rows 6 --batch-size 7 --device cpu --dtype bfloat16 --pipeline sequential --text-column body"
    options += " --tasks t,u --task-items 8"
    flags = ["--calibrate-all-experts", "--fresh", "--verbose"]
    assert main(["compare", *options.split(), *flags]) == 1, "an arm failed"
    assert seen["settings"] == runner.CompareSettings(
        model="m",
        recipe="r",
        calibration="c",
        eval_text="e",
        out="o",
        arms=["a", "b"],
        samples=3,
        seq_len=4,
        seed=5,
        eval_rows=6,
        batch_size=7,
        device="cpu",
        dtype="bfloat16",
        pipeline="sequential",
        calibrate_all_experts=True,
        tasks=("t", "u"),
        task_items=8,
        text_column="body",
        fresh=True,
        verbose=True,
    )
    assert seen["command"].startswith("bitsmoe compare --model m")


def test_the_demo_is_the_default(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli, "demo_asset", lambda name: f"demo/{name}")
    args = build_parser().parse_args(["compare"])
    assert args.model is None
    assert cli._given(args.model, "docmoe") == "demo/docmoe"
    assert args.recipe == "ab_gptq_bitsmoe"


def test_a_missing_demo_is_explained():
    with pytest.raises(BitsMoEError, match="the embedded demo is not installed"):
        demo_asset("nothing_of_this_name")


# ------------------------------------------------------------------------------------------------- inspect


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model("qwen3_moe")
    pack_randomly(model)
    return save(model, tmp_path_factory.mktemp("packed"))


def test_inspect_prints_sizes_and_widths(packed, capsys):
    assert main(["inspect", str(packed)]) == 0
    out = capsys.readouterr().out
    assert "model.layers.0.mlp.experts: 8 experts of 32 × 64" in out
    assert "down    widths" in out


def test_inspect_prints_json(packed, capsys):
    assert main(["inspect", str(packed), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["layers"]) == 2
    assert found["bits_per_expert_weight"] > 0


# ------------------------------------------------------------------------------------------ quantize and eval


@pytest.mark.parametrize("occupied", ["file", "folder"])
def test_quantize_refuses_an_occupied_output_first(occupied, tmp_path, capsys):
    out = tmp_path / "out"
    if occupied == "file":
        out.write_text("")
    else:
        out.mkdir()
        (out / "x").write_text("")
    assert main(["quantize", "--model", "/nowhere", "--calibration", "/nowhere.txt", "--out", str(out)]) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err


def test_quantize_asks_which_stage(tmp_path, capsys):
    arguments = ["--model", "m", "--calibration", "c", "--recipe", "ab_gptq_bitsmoe", "--out", str(tmp_path / "out")]
    assert main(["quantize", *arguments]) == 2
    assert "several stages (gptq_w2, gptq_w3, gptq_w4, bitsmoe_2_0, bitsmoe_1_6); choose one by --stage" in (
        capsys.readouterr().err
    )


def test_a_dense_model_without_experts_is_refused(tmp_path, capsys):
    save_file({"model.embed.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    out = str(tmp_path / "out")
    assert main(["quantize", "--model", str(tmp_path), "--calibration", "c", "--out", out]) == 2
    assert "model_type llama) has no routed experts" in capsys.readouterr().err


def test_quantize_by_bitsmoe_then_eval_then_inspect(tmp_path, capsys):
    model = save_tiny(tmp_path / "model")
    text = write_text(tmp_path / "text.txt", 3000, seed=0)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("a_stage: {q_modifiers: {BitsMoEModifier: {bits: 4.5, group_size: 32, block_size: 16}}}")
    common = ["--model", str(model), "--seq-len", "32", "--batch-size", "4", "--device", "cpu"]
    out = tmp_path / "out"
    quantize = ["quantize", *common, "--recipe", str(recipe), "--calibration", str(text), "--samples", "16"]
    assert main([*quantize, "--out", str(out)]) == 0

    figures = tmp_path / "figures.json"
    measure = ["eval", str(out), *common, "--eval-text", str(text), "--eval-rows", "4", "--json", str(figures)]
    assert main(measure) == 0
    found = json.loads(figures.read_text())["checkpoint"]
    # what was asked for, rounded down to whole units: one of 2 bits is 0.02 bits per weight of so small a layer
    assert 4.5 - 0.02 <= found["measured_bits_per_expert_weight"] <= 4.5
    assert 1e-5 < found["kld_mean"] < 1

    assert "bits: 4.5" in (out / "README.md").read_text()
    assert main(["inspect", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "model.layers.1.mlp.experts: 8 experts of 32 × 64, 4." in printed
    assert "tokens  per expert" in printed
    assert "of the layer's output power" in printed


def test_quantize_keeps_layers_and_continues(tmp_path, capsys):
    model, text = save_tiny(tmp_path / "model"), write_text(tmp_path / "text.txt", 3000, seed=0)
    kept = tmp_path / "kept"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("a_stage: {q_modifiers: {BitsMoEModifier: {bits: 4.5, group_size: 32, block_size: 16}}}")
    command = ["quantize", "--model", str(model), "--seq-len", "32", "--device", "cpu", "--recipe", str(recipe)]
    command += ["--calibration", str(text), "--samples", "16", "--resume-dir", str(kept)]
    assert main([*command, "--out", str(tmp_path / "one")]) == 0
    layers = sorted(kept.glob("model.*.safetensors"))
    assert len(layers) == 2
    layers[1].unlink()
    assert main([*command, "--out", str(tmp_path / "two")]) == 0
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    assert str(kept) not in (tmp_path / "one" / "recipe.yaml").read_text(), "no path of this machine in the checkpoint"
    capsys.readouterr()
    assert main([*command, "--samples", "15", "--out", str(tmp_path / "three")]) == 2
    assert "holds the layers of another run (calibration" in capsys.readouterr().err
    assert not (tmp_path / "three").exists()


def test_only_bitsmoe_continues():
    stage = Stage("plain", (("GPTQModifier", {}),), "plain_stage: {q_modifiers: {GPTQModifier: {}}}")
    with pytest.raises(RecipeError, match="plain: only BitsMoEModifier continues where it was killed"):
        with_resume(stage, "kept")


def test_quantize_by_gptq_then_eval_then_inspect(tmp_path, capsys):
    model = save_tiny(tmp_path / "model")
    text = write_text(tmp_path / "text.txt", 3000, seed=0)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "a_stage: {q_modifiers: {GPTQModifier: {config_groups: {e: {targets: ['re:.*[.]experts[.].*_proj$'], "
        "weights: {num_bits: 6, type: int, symmetric: true, strategy: group, group_size: 32}}}}}}"
    )
    common = ["--model", str(model), "--seq-len", "32", "--batch-size", "4", "--device", "cpu"]
    out = tmp_path / "sub" / "out"
    quantize = ["quantize", *common, "--recipe", str(recipe), "--calibration", str(text), "--samples", "16"]
    assert main([*quantize, "--out", str(out)]) == 0
    assert "6.5625 bits per expert weight" in capsys.readouterr().out
    assert sorted(p.name for p in out.parent.iterdir()) == ["out"], "nothing half-written beside it"

    figures = tmp_path / "figures.json"
    measure = ["eval", str(out), *common, "--eval-text", str(text), "--eval-rows", "4", "--json", str(figures)]
    assert main(measure) == 0
    assert "| out |" in capsys.readouterr().out
    found = json.loads(figures.read_text())
    assert found["checkpoint"]["measured_bits_per_expert_weight"] == pytest.approx(6.5625)
    # 6-bit weights: far above rounding, far below another model
    assert 1e-5 < found["checkpoint"]["kld_mean"] < 0.2

    assert main(["inspect", str(out)]) == 0
    assert "no experts packed by BitsMoE" in capsys.readouterr().out
