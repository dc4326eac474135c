"""What the processes of a comparison do: check the recipe, record the reference, quantize and measure one run."""

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..calibration.oneshot import QuantizeSettings, quantize
from ..calibration.recipe import Stage, check_stage
from ..checkpoints.card import write_card
from ..checkpoints.plan import check_machine
from ..evaluation.accuracy import check_tasks, measure_tasks
from ..evaluation.evaluate import evaluate, evaluate_reference, load_model
from ..evaluation.metrics import Summary
from ..evaluation.reference import load, record
from ..evaluation.samples import keep_written, kept_written, read, write
from ..loading.decoding import misread_experts
from ..sources.model import load_tokenizer
from ..sources.provenance import read_prediction
from ..storage.sizes import bits_per_expert_weight, checkpoint_bytes
from .workspace import Workspace

#: rows of the noise floor: it is a second run of the dense model, in a dtype that a CPU may be slow at
_NOISE_ROWS = 32


@dataclass(frozen=True)
class Job:
    """What every process of a comparison needs to know; picklable.

    Attributes:
        model: folder of the dense model.
        model_name: as the user named it.
        out: folder of the comparison.
        device: where models run.
        dtype: what models compute in while they are calibrated and measured.
        batch_size: rows per forward pass.
        pipeline, calibrate_all_experts, seed: see `QuantizeSettings`.
        tasks: of lm-eval (see `accuracy`).
        task_items: items per task at most; None: all.
    """

    model: Path
    model_name: str
    out: Path
    device: str
    dtype: torch.dtype
    batch_size: int
    pipeline: str
    calibrate_all_experts: bool
    seed: int
    tasks: tuple[str, ...] = ()
    task_items: int | None = None


def check_inputs(stages: list[Stage], job: Job, tokens: int | None) -> None:
    """Build every stage's modifiers and load every task once, and check that the machine can hold the runs.

    Args:
        tokens: calibration tokens; None to leave out what `check_machine` finds.
    """
    for stage in stages:
        check_stage(stage)
    check_tasks(job.tasks)
    if tokens is not None:
        check_machine(stages, job.model, job.out, tokens, job.dtype, job.device)


def run_reference(job: Job) -> dict[str, Any]:
    """Record the dense model's predictions, and measure how far it is from itself.

    Returns:
        ``reference``: its figures; ``noise_floor``: those of a second run, with a ``how``.
    """
    device = use_device(job.device)
    workspace = Workspace(job.out)
    rows = workspace.rows("evaluation")
    temporary = workspace.reference.with_name(".reference.partial")
    for stale in (temporary, workspace.reference):
        shutil.rmtree(stale, ignore_errors=True)
    temporary.mkdir(parents=True)
    started = time.perf_counter()
    model = load_model(str(job.model), job.dtype, device)
    record(model, rows, job.batch_size, temporary)
    keep_written(write(model, load_tokenizer(job.model)), temporary)
    temporary.rename(workspace.reference)
    seconds = time.perf_counter() - started
    reference = load(workspace.reference).to(device)
    own = evaluate_reference(rows, reference, job.batch_size)
    stored = stored_dtype(job.model)
    few = rows[:_NOISE_ROWS]
    if stored != job.dtype:
        model = load_model(str(job.model), stored, device)
        how, batch_size = f"run again in {_name(stored)}, its storage dtype", job.batch_size
    else:
        batch_size = job.batch_size // 2 or 2
        how = f"run again with batch size {batch_size} instead of {job.batch_size}"
    again = evaluate(model, few, reference, batch_size, desc="Noise floor")
    return {
        "reference": {**asdict(own), "evaluate_seconds": seconds},
        "noise_floor": {"how": how, "rows": len(few), **asdict(again)},
    }


def run_stage(job: Job, stage: Stage) -> dict[str, Any]:
    """Quantize the dense model by one stage, save the checkpoint, load it again and measure it.

    Returns:
        The entry of the report.
    """
    device = use_device(job.device)
    workspace = Workspace(job.out)
    checkpoint = workspace.checkpoint(stage.name)
    shutil.rmtree(checkpoint, ignore_errors=True)  # of an earlier run with another recipe
    batch = stage.calibration_batch(job.batch_size)
    settings = QuantizeSettings(
        batch, job.dtype, job.pipeline, job.calibrate_all_experts, job.seed, model_name=job.model_name
    )
    made = quantize(job.model, stage.text, workspace.rows("calibration"), checkpoint, settings)
    write_card(checkpoint, job.model_name, stage.text)
    misread = misread_experts(checkpoint)
    warnings = [*made.warnings, *([f"{misread}; measured on weights decoded here"] if misread else [])]
    started = time.perf_counter()
    summary, samples = measure(job, checkpoint, device)
    return {
        **sizes_of(checkpoint),
        "load_seconds": made.load_seconds,
        "quantize_seconds": made.seconds,
        "save_seconds": made.save_seconds,
        "peak_memory_bytes": made.peak_memory_bytes,
        "evaluate_seconds": time.perf_counter() - started,
        **asdict(summary),
        "prediction": read_prediction(checkpoint),
        "samples": samples,
        "warnings": warnings,
    }


def measure(job: Job, checkpoint: Path, device: torch.device) -> tuple[Summary, list[dict[str, Any]]]:
    """Load a checkpoint and compare it with the recorded reference: its figures, and its texts (`samples.read`)."""
    workspace = Workspace(job.out)
    model = load_model(str(checkpoint), job.dtype, device)
    figures = evaluate(model, workspace.rows("evaluation"), load(workspace.reference), job.batch_size)
    return figures, read(model, load_tokenizer(checkpoint), kept_written(workspace.reference))


def run_tasks(job: Job, checkpoint: Path) -> dict[str, Any]:
    """Load a checkpoint, or the dense model, and run the tasks on it.

    Returns:
        ``accuracy`` and ``seconds``.
    """
    started = time.perf_counter()
    model = load_model(str(checkpoint), job.dtype, use_device(job.device))
    accuracy = measure_tasks(model, load_tokenizer(checkpoint), job.tasks, job.batch_size, job.task_items)
    return {"accuracy": accuracy, "seconds": time.perf_counter() - started}


def sizes_of(checkpoint: Path) -> dict[str, Any]:
    """The sizes of a saved checkpoint as the report names them."""
    bits = bits_per_expert_weight(checkpoint)
    return {
        "measured_bits_per_expert_weight": bits.total,
        "bits_apart": asdict(bits),
        "checkpoint_bytes": checkpoint_bytes(checkpoint),
    }


def use_device(device: str) -> torch.device:
    """Hide accelerators from llm-compressor, which takes the first it finds, where the CPU was asked for."""
    if torch.device(device).type == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return torch.device(device)


def stored_dtype(folder: Path) -> torch.dtype:
    """What config.json declares."""
    config = json.loads((folder / "config.json").read_text())
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    return getattr(torch, str(name).removeprefix("torch."))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
