"""The comparison end to end on a tiny model: processes, checkpoints, figures, failures, reruns.

Processes are forked from a server that imports llm-compressor once for all of these tests.
"""

import dataclasses
import json
import os
import time
from pathlib import Path

import pytest
import torch
import yaml

from bitsmoe_modifier.comparison import runner
from bitsmoe_modifier.comparison.processes import Failure, run_in_process, start_context
from bitsmoe_modifier.comparison.runner import CompareSettings, compare
from bitsmoe_modifier.comparison.runs import sizes_of
from bitsmoe_modifier.errors import BitsMoEError, CalibrationError, RecipeError
from bitsmoe_modifier.evaluation.accuracy import measure_tasks
from bitsmoe_modifier.evaluation.evaluate import load_model
from bitsmoe_modifier.evaluation.paired import paired
from bitsmoe_modifier.sources.model import load_tokenizer

RECIPE = """
gptq_w4_stage:
  quant_modifiers:
    GPTQModifier:
      config_groups:
        experts:
          targets: ['re:.*[.]experts[.]\\d+[.](gate|up|down)_proj$']
          weights: {num_bits: 4, type: int, symmetric: true, strategy: group, group_size: 32}
      batched_quantization: 64
unmatched_stage:
  quant_modifiers:
    GPTQModifier: {scheme: W4A16, targets: ['re:.*nothing$']}
"""


def settings(tiny: Path, out: Path, **changes: object) -> CompareSettings:
    recipe = tiny / "recipe.yaml"
    recipe.write_text(RECIPE)
    base = CompareSettings(
        model=str(tiny / "model"),
        recipe=str(recipe),
        calibration=str(tiny / "calibration.txt"),
        eval_text=str(tiny / "held_out.txt"),
        out=str(out),
        samples=16,
        seq_len=32,
        eval_rows=8,
        batch_size=4,
        device="cpu",
    )
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def done(tiny: Path, tmp_path_factory: pytest.TempPathFactory):
    """(folder, report) of a comparison of one arm that works and one that does not."""
    out = tmp_path_factory.mktemp("compare") / "out"
    return out, compare(settings(tiny, out), command="bitsmoe compare …")


def test_every_figure_of_an_arm_is_there(done):
    _, report = done
    arm = report["arms"][0]
    assert arm["name"] == "gptq_w4"
    assert arm["nominal_bits"] == 4
    assert arm["modifiers"] == ["GPTQModifier"]
    assert 0 < arm["kld_median"] <= arm["kld_p90"]
    assert arm["kld_mean"] > 0
    assert 0 < arm["top1_agreement"] < 1
    assert arm["perplexity"] > 1
    assert arm["quantize_seconds"] > 0
    assert arm["peak_memory_bytes"] > 10e6
    assert not arm["reused"]


def test_measured_bits_are_codes_scales_and_shapes(done):
    arm = done[1]["arms"][0]
    # 4-bit codes, a bf16 scale per 32 weights, and three int64 pairs of shapes per expert of 3 · 32 · 64 weights
    assert arm["measured_bits_per_expert_weight"] == pytest.approx(4 + 16 / 32 + 3 * 128 / (3 * 32 * 64))


def test_a_failed_arm_is_reported_and_the_others_go_on(done):
    out, report = done
    failed = report["arms"][1]
    assert failed["name"] == "unmatched"
    assert "matches no module of the model" in failed["error"]
    assert "Traceback" in (out / failed["log"]).read_text()
    assert not (out / "arms" / "unmatched").exists()


def test_the_reference_and_the_noise_floor_are_reported(done):
    report = done[1]
    assert report["reference"]["measured_bits_per_expert_weight"] == 16
    assert report["reference"]["kld_mean"] == 0
    assert 0 < report["noise_floor"]["kld_mean"] < report["arms"][0]["kld_mean"]
    assert "bfloat16" in report["noise_floor"]["how"]


def test_the_report_says_what_was_run(done):
    out, report = done
    assert report["version"] == 1
    assert report["command"] == "bitsmoe compare …"
    assert report["calibration"]["rows"] == 16
    assert report["calibration"]["seed"] == 0
    assert len(report["evaluation"]["sha256"]) == 64
    assert report["evaluation"]["rows"] == 8
    assert report["environment"]["packages"]["torch"] == torch.__version__
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    assert "gptq_w4" in (out / "report.md").read_text()


def test_the_checkpoint_can_be_loaded_and_keeps_the_models_dtypes(done):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = done[0] / "arms" / "gptq_w4"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert len(AutoTokenizer.from_pretrained(folder)("abc")["input_ids"]) == 3
    from bitsmoe_modifier.storage.sizes import tensor_sizes

    floats = {s.dtype for name, s in tensor_sizes(folder).items() if s.dtype.startswith(("F", "BF"))}
    assert floats == {"BF16"}


def test_the_checkpoint_explains_itself(done):
    out, report = done
    text = (out / "arms" / "gptq_w4" / "README.md").read_text()
    assert "num_bits: 4" in text
    assert f"| {1000 * report['arms'][0]['kld_mean']:.2f} ± " in text


def test_the_checkpoints_recipe_can_be_loaded_safely(done):
    saved = yaml.safe_load((done[0] / "arms" / "gptq_w4" / "recipe.yaml").read_text())
    assert "gptq_w4_stage" in saved


def test_nothing_half_written_is_left(done):
    left = [p for p in done[0].rglob("*") if p.name.startswith(".") or "partial" in p.name]
    assert left == []


def test_a_rerun_uses_what_is_finished_and_tries_failures_again(done, tiny):
    out, first = done
    checkpoint = out / "arms" / "gptq_w4" / "model.safetensors"
    written = checkpoint.stat().st_mtime_ns
    again = compare(settings(tiny, out, arms=["gptq_w4"]))
    assert checkpoint.stat().st_mtime_ns == written
    assert again["arms"][0]["reused"]
    assert again["arms"][0]["kld_mean"] == first["arms"][0]["kld_mean"]


def test_tasks_are_run_on_the_saved_checkpoints_and_compared_item_by_item(done, tiny, items):
    out, _ = done
    report = compare(settings(tiny, out, arms=["gptq_w4"], tasks=(str(items),), task_items=20))
    arm = report["arms"][0]
    assert arm["reused"], "asking for tasks must not quantize again"
    scores = {}
    for name, folder in (("dense", tiny / "model"), ("arm", out / "arms" / "gptq_w4")):
        model = load_model(str(folder), torch.float32, torch.device("cpu"))
        scores[name] = measure_tasks(model, load_tokenizer(folder), [str(items)], 4, 20)["letters"]["scores"]
    assert scores["arm"] != scores["dense"], "a test that could not tell the models apart"
    assert arm["accuracy"]["letters"]["acc"] == pytest.approx(sum(scores["arm"]) / 20)
    assert arm["accuracy"]["letters"]["paired"] == dataclasses.asdict(paired(scores["arm"], scores["dense"]))
    assert report["reference"]["accuracy"]["letters"]["acc"] == pytest.approx(sum(scores["dense"]) / 20)
    assert "letters" in (out / "report.md").read_text()
    assert "letters" in (out / "report.html").read_text()


def test_items_that_were_changed_are_answered_again(done, tiny, items, tmp_path):
    """By their name alone, the figures of the earlier items would pass for those of the present ones."""
    own = tmp_path / "letters.jsonl"
    lines = items.read_text().splitlines(keepends=True)
    told = []
    for count in (12, 8):
        own.write_text("".join(lines[:count]))
        report = compare(settings(tiny, done[0], arms=["gptq_w4"], tasks=(str(own),)))
        told += [report["reference"]["accuracy"]["letters"]["items"], report["arms"][0]["accuracy"]["letters"]["items"]]
    assert told == [12, 12, 8, 8]


def test_an_unknown_task_is_refused_before_the_reference_is_run(tiny, tmp_path):
    with pytest.raises(RecipeError, match=r"/no/items[.]jsonl: no such file"):
        compare(settings(tiny, tmp_path / "out", tasks=("/no/items.jsonl",)))
    assert not (tmp_path / "out" / "work" / "reference").exists()


def test_a_rerun_with_other_inputs_is_refused(done, tiny):
    with pytest.raises(BitsMoEError, match=r"calibration\.seed: 0, now 7"):
        compare(settings(tiny, done[0], seed=7))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"samples": 1000}, CalibrationError, "needs 32000 tokens"),
        ({"model": "/nowhere"}, BitsMoEError, "no such model folder"),
        ({"arms": ["x"]}, RecipeError, "no stage x; it has gptq_w4, unmatched"),
        ({"device": "warp"}, BitsMoEError, "--device warp cannot be used"),
        ({"dtype": "int3"}, BitsMoEError, "--dtype int3 is unknown"),
        ({"batch_size": 0}, BitsMoEError, "--batch-size 0"),
    ],
    ids=["samples", "model", "arms", "device", "dtype", "batch-size"],
)
def test_unusable_inputs_are_refused_before_anything_is_written(tiny, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        compare(settings(tiny, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_a_wrong_recipe_field_is_refused_before_the_reference_is_run(tiny, tmp_path):
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text("a_stage: {q_modifiers: {BitsMoEModifier: {bits: -2}}}")
    with pytest.raises(RecipeError, match="a: bits"):
        compare(settings(tiny, tmp_path / "out", recipe=str(recipe)))
    assert not (tmp_path / "out" / "work" / "reference").exists()


def test_a_check_that_dies_says_where_to_look(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "check_inputs", die)
    with pytest.raises(RecipeError, match=r"ended with exit code 3 and no result \(all of it in .*recipe.log\)"):
        compare(settings(tiny, tmp_path / "out"))


# ------------------------------------------------------------------------------------------------ processes


def square(number: int) -> int:
    print("squaring", number)
    return number * number


def die(*_: object) -> None:
    os._exit(3)


def refuse() -> None:
    raise CalibrationError("too little of it")


def dawdle() -> None:
    print("(1/2): Calibrating:  40%|####      | 4/10 [00:01<00:02]", flush=True)
    time.sleep(1.5)


@pytest.fixture(scope="module")
def context():
    return start_context("cpu")


def test_a_process_returns_its_result_and_writes_its_log(context, tmp_path):
    log = tmp_path / "log"
    assert run_in_process(context, square, (7,), log, lambda text: None) == 49
    assert "squaring 7" in log.read_text()


def test_our_own_errors_come_back_as_their_message(context, tmp_path):
    failure = run_in_process(context, refuse, (), tmp_path / "log", lambda text: None)
    assert isinstance(failure, Failure)
    assert failure.message == "too little of it"
    assert failure.expected
    assert "CalibrationError" in failure.details


def test_other_errors_come_back_with_their_type(context, tmp_path):
    failure = run_in_process(context, square, ("x",), tmp_path / "log", lambda text: None)
    assert failure.message.startswith("TypeError: ")
    assert not failure.expected


def test_a_dead_process_is_a_failure(context, tmp_path):
    failure = run_in_process(context, die, (), tmp_path / "log", lambda text: None)
    assert "exit code 3" in failure.message


def test_progress_bars_of_the_log_are_shown(context, tmp_path):
    shown: list[str] = []
    run_in_process(context, dawdle, (), tmp_path / "log", shown.append)
    assert "(1/2): Calibrating 40%" in shown


def test_sizes_of_an_unquantized_checkpoint(tiny):
    sizes = sizes_of(tiny / "model")
    assert sizes["measured_bits_per_expert_weight"] == 16
