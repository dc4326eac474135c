"""`bitsmoe eval --backend vllm` where it cannot run; needs no vLLM."""

import pytest

from bitsmoe_modifier.cli import main
from bitsmoe_modifier.errors import BitsMoEError
from bitsmoe_modifier.extras import install_line
from bitsmoe_modifier.serving import evaluation, versions


@pytest.mark.parametrize(
    ("found", "message"),
    [(None, "no vLLM is installed"), ("0.31.0", "serves with vLLM 0.32.*, 0.33.*, this is 0.31.0")],
)
def test_names_what_is_missing(
    found: str | None, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(versions, "installed", lambda: found)
    assert main(["eval", "checkpoint", "--backend", "vllm", "--tasks", "continuations"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert f"{install_line('vllm')} lm-eval" in error


def test_names_a_missing_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda: "0.32.0")
    monkeypatch.setattr(evaluation, "find_spec", lambda name: None)
    with pytest.raises(BitsMoEError, match="lm-eval is not installed; pip install lm-eval"):
        evaluation.check_environment()


def test_wants_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda: "0.32.0")
    with pytest.raises(BitsMoEError, match="give --tasks"):
        evaluation.evaluate_served("checkpoint", (), 0, "auto", "")


def test_engine_arguments() -> None:
    found = evaluation.engine_arguments("tensor_parallel_size=2,enforce_eager=True,gpu_memory_utilization=0.5")
    assert found == {"tensor_parallel_size": 2, "enforce_eager": True, "gpu_memory_utilization": 0.5}
    with pytest.raises(BitsMoEError, match="--engine eager: expected name=value"):
        evaluation.engine_arguments("eager")
