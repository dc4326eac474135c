"""The command line: options, exit codes, one-line errors, and that help costs nothing."""

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file

from bitsmoe_modifier import __version__, messages
from bitsmoe_modifier.calibration.recipe import Stage, with_fields
from bitsmoe_modifier.cli import main
from bitsmoe_modifier.cli.app import app
from bitsmoe_modifier.errors import BitsMoEError, RecipeError
from bitsmoe_modifier.sources.demo import demo_asset
from helpers import pack_randomly, save, tiny_model
from tiny_text import save_tiny, write_text

COMMANDS = {command.name: command for command in app.registered_commands}


@pytest.fixture(autouse=True)
def _speak_as_before() -> Iterator[None]:
    """Commands choose how the process speaks; the next test shall not inherit it."""
    yield
    messages.configure("text")


#: A report's noise floor.
NOISE = {"how": "bfloat16 against float32", "rows": 1, "kld_mean": 1e-4, "kld_median": 1e-5, "kld_stderr": 1e-5}


def test_help_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Usage: bitsmoe [OPTIONS] COMMAND")
    assert list(COMMANDS) == ["quantize", "plan", "compare", "eval", "try", "inspect", "export", "import"]
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_the_options_in_groups(command, capsys):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Usage: bitsmoe {command} [OPTIONS]")
    assert "\nOptions:\n" in out
    assert "--log-json" in out.split("\nMessages:\n")[1]


def test_help_imports_nothing_heavy():
    code = "import sys; from bitsmoe_modifier.cli import main; main(['--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "llmcompressor", "compressed_tensors", "matplotlib", "datasets", "rich", "scipy"}
    assert not heavy & set(done.stdout.split())


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "bitsmoe_modifier", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Usage: bitsmoe"),
        (["compare", "--samples", "many"], "'--samples'"),
        (["quantize"], "Missing option '--out'"),
        (["inspect"], "Missing argument 'DIR'"),
        (["eval", "x", "--dtype", "int2"], "'--dtype'"),
        (["inspect", "x", "--quiet", "--log-json"], "--quiet and --log-json exclude each other"),
        (["quantise"], "Did you mean 'quantize'?"),
        (["compare", "--sample", "3"], "--samples"),
    ],
    ids=["no-command", "no-number", "no-out", "no-folder", "no-dtype", "both", "command-typo", "option-typo"],
)
def test_wrong_usage_ends_with_2_and_says_what_was_meant(arguments, said, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "Usage: bitsmoe" in captured.out + captured.err
    assert said in captured.out + captured.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("bitsmoe comp", ["compare"]),
        ("bitsmoe compare --ar", ["--arms"]),
        ("bitsmoe compare --dtype b", ["bfloat16"]),
        ("bitsmoe inspect --fresh", []),
    ],
)
def test_words_are_completed(words, expected, monkeypatch, capsys):
    monkeypatch.setenv("_BITSMOE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    assert main([]) == 0
    assert capsys.readouterr().out.split() == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_can_be_told(shell, monkeypatch, capsys):
    monkeypatch.setenv("_BITSMOE_COMPLETE", f"source_{shell}")
    assert main([]) == 0
    assert f"complete_{shell}" in capsys.readouterr().out


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


def test_a_process_that_died_is_not_taken_for_the_end_of_input(monkeypatch):
    from bitsmoe_modifier.checkpoints import describe

    def died(folder):
        raise EOFError

    monkeypatch.setattr(describe, "describe", died)
    monkeypatch.setattr("bitsmoe_modifier.sources.model.find_model", Path)
    with pytest.raises(RuntimeError, match="ended before it answered"):
        main(["inspect", "x"])


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


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_examples_that_parse(name):
    examples = [line.strip() for line in COMMANDS[name].epilog.splitlines() if "bitsmoe" in line]
    assert examples
    group = typer.main.get_command(app)
    for line in examples:
        words = shlex.split(line.split("  ")[0])
        words = words[words.index("-m") + 1 :] if words[0] == "torchrun" else words
        assert words[0].startswith("bitsmoe")
        assert words[1] == name
        with group.make_context("bitsmoe", words[1:]) as context:
            _, command, rest = group.resolve_command(context, words[1:])
            command.make_context(name, rest, parent=context)


def test_options_of_quantize_become_fields(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from bitsmoe_modifier.comparison import single

    seen: list[Stage] = []
    monkeypatch.setattr(single, "quantize_each", lambda _model, stages, *_: seen.extend(one for one, _ in stages) or [])
    options = "--codes trellis --bits 1.5,2 --ignore re:a[.]\\d{1,2}$,b --best --samples 3"
    assert main(["quantize", "--out", str(tmp_path / "out"), *options.split()]) == 0
    fields = [dict(stage.modifiers)["BitsMoEModifier"] for stage in seen]
    assert [one["bits"] for one in fields] == [1.5, 2.0]
    for one in fields:
        assert (one["codes"], one["ignore"], one["refine_passes"]) == ("trellis", [r"re:a[.]\d{1,2}$", "b"], 2)


def test_compare_passes_every_option_on(monkeypatch: pytest.MonkeyPatch, tmp_path, capsys):
    from bitsmoe_modifier.comparison import runner

    seen = {}

    def fake(settings, command):
        seen.update(settings=settings, command=command)
        return {
            "model": {"name": "m"},
            "reference": {"name": "unquantized"},
            "noise_floor": NOISE,
            "arms": [{"name": "a", "error": "no"}],
        }

    monkeypatch.setattr(runner, "compare", fake)
    options = "--model m --recipe ab_gptq_bitsmoe --calibration c --eval-text e --out o --arms gptq_w2,gptq_w3"
    options += " --samples 3 --seq-len 4 --seed 5"
    options += " --eval-rows 6 --batch-size 7 --device cpu --dtype bfloat16 --pipeline sequential --text-column body"
    options += " --tasks t,u --task-items 8"
    flags = ["--calibrate-all-experts", "--fresh", "--verbose"]
    assert main(["compare", *options.split(), *flags]) == 1, "an arm failed"
    assert seen["settings"] == runner.CompareSettings(
        model="m",
        recipe="ab_gptq_bitsmoe",
        calibration="c",
        eval_text="e",
        out="o",
        arms=["gptq_w2", "gptq_w3"],
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
    from bitsmoe_modifier.comparison import runner

    seen = {}
    report = {
        "model": {"name": "m"},
        "reference": {"name": "unquantized"},
        "noise_floor": NOISE,
        "arms": [{"name": "a", "error": "no"}],
    }
    monkeypatch.setattr(runner, "compare", lambda settings, command: seen.update(settings=settings) or report)
    assert main(["compare"]) == 1
    assert seen["settings"] == runner.CompareSettings(
        model=demo_asset("docmoe"),
        recipe="ab_gptq_bitsmoe",
        calibration=demo_asset("docmoe_calibration.txt"),
        eval_text=demo_asset("docmoe_heldout.txt"),
        out="bitsmoe-report",
    ), "and the defaults of the command line are those of the settings"


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
    assert "down    bit-widths" in out


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
    assert "model.layers.1.mlp.experts: 8 experts of 32 × 64, " in printed  # its share of the bits is the survey's
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
    layers = sorted(kept.rglob("model.*.safetensors"))
    assert len(layers) == 2
    layers[1].unlink()
    assert main([*command, "--out", str(tmp_path / "two")]) == 0
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    assert str(kept) not in (tmp_path / "one" / "recipe.yaml").read_text(), "no path of this machine in the checkpoint"
    capsys.readouterr()
    assert main([*command, "--samples", "15", "--out", str(tmp_path / "three")]) == 2
    assert "holds the survey of another run (calibration" in capsys.readouterr().err
    assert not (tmp_path / "three").exists()


def test_only_bitsmoe_continues():
    stage = Stage("plain", (("GPTQModifier", {}),), "plain_stage: {q_modifiers: {GPTQModifier: {}}}")
    with pytest.raises(RecipeError, match="plain: only a BitsMoEModifier takes --resume-dir"):
        with_fields(stage, resume_dir="kept")
    assert with_fields(stage, resume_dir=None) is stage


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
