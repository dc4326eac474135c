"""What the processes of a comparison do: check the recipe, record the reference, quantize and measure one run."""

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..aftermath import attempted
from ..calibration.oneshot import QuantizeSettings, quantize
from ..calibration.recipe import Stage, check_stage
from ..checkpoints.card import write_card
from ..checkpoints.plan import check_machine
from ..evaluation.accuracy import check_tasks, measure_tasks
from ..evaluation.evaluate import evaluate, evaluate_reference, load_model
from ..evaluation.metrics import Summary
from ..evaluation.reference import load, record
from ..evaluation.samples import Written, keep_written, kept_written, read, write
from ..loading.decoding import misread_experts
from ..sources.model import load_tokenizer
from ..sources.provenance import read_prediction
from ..storage.sizes import bits_per_expert_weight, checkpoint_bytes
from .device import use_device
from .workspace import Workspace

#: rows of the noise floor: it is a second run of the dense model, in a dtype that a CPU may be slow at
_NOISE_ROWS = 32
#: what failed, for the report
_CARD, _TEXTS = "the checkpoint's README.md could not be written", "the texts of the report could not be written"


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
        versions: of the packages that results depend on.
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
    versions: Mapping[str, str | None] = field(default_factory=dict)


def check_inputs(stages: list[Stage], job: Job, tokens: int | None) -> None:
    """Build every stage's modifiers and load every task once, and check that the machine can hold the runs.

    Args:
        tokens: calibration tokens; None to leave out what `check_machine` finds.
    """
    for stage in stages:
        check_stage(stage)
    from ..calibration.other_schemes import check_schemes  # imports llm-compressor

    check_schemes(stages, str(job.model))
    check_tasks(job.tasks)
    if tokens is not None:
        check_machine(stages, job.model, job.out, tokens, job.dtype, job.device)


def run_reference(job: Job) -> dict[str, Any]:
    """Record the dense model's predictions, and measure how far it is from itself.

    Returns:
        ``reference``: its figures; ``noise_floor``: those of a second run, with a ``how``; ``warnings``.
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
    none: list[Written] = []
    texts, trouble = attempted(_TEXTS, lambda: write(model, load_tokenizer(job.model)), none)
    keep_written(texts, temporary)
    temporary.rename(workspace.reference)
    seconds = time.perf_counter() - started
    reference = load(workspace.reference).to(device)
    own = evaluate_reference(rows, reference, job.batch_size)
    stored = stored_dtype(job.model)
    few = rows[:_NOISE_ROWS]
    if stored != job.dtype:
        del model  # not both in memory
        model = load_model(str(job.model), stored, device)
        how, batch_size = f"run again in {_name(stored)}, its storage dtype", job.batch_size
    else:
        batch_size = job.batch_size // 2 or 2
        how = f"run again with batch size {batch_size} instead of {job.batch_size}"
    again = evaluate(model, few, reference, batch_size, desc="Noise floor")
    return {
        "reference": {**asdict(own), "evaluate_seconds": seconds},
        "noise_floor": {"how": how, "rows": len(few), **asdict(again)},
        "warnings": trouble,
    }


def run_stage(job: Job, stage: Stage) -> dict[str, Any]:
    """Quantize the dense model by one stage, save the checkpoint, load it again and measure it.

    Where an earlier run has quantized it and failed to measure it, it is only measured.

    Returns:
        The entry of the report.
    """
    device = use_device(job.device)
    workspace = Workspace(job.out)
    checkpoint = workspace.checkpoint(stage.name)
    name, key = f"{stage.name}.quantized", {"versions": job.versions, "stage": stage.text}
    made = workspace.finished(name, key) if checkpoint.exists() else None
    if made is None:
        made = _quantized(job, stage, workspace)
        workspace.keep(name, key, made)
    misread = misread_experts(checkpoint)
    warnings = [*made["warnings"], *([f"{misread}; measured on weights decoded here"] if misread else [])]
    started = time.perf_counter()
    summary, samples, trouble = measure(job, checkpoint, device)
    return {
        **made,
        "evaluate_seconds": time.perf_counter() - started,
        **asdict(summary),
        "prediction": read_prediction(checkpoint),
        "samples": samples,
        "warnings": [*warnings, *trouble],
    }


def _quantized(job: Job, stage: Stage, workspace: Workspace) -> dict[str, Any]:
    """Quantize by one stage; what another recipe made under its name before is there until the new one is finished.

    Returns:
        Sizes, times, memory and warnings, as in the report.
    """
    checkpoint = workspace.checkpoint(stage.name)
    new = checkpoint.with_name(f".{stage.name}.next")
    shutil.rmtree(new, ignore_errors=True)  # of a run that was killed
    batch = stage.calibration_batch(job.batch_size)
    settings = QuantizeSettings(
        batch, job.dtype, job.pipeline, job.calibrate_all_experts, job.seed, model_name=job.model_name
    )
    record = quantize(job.model, stage.text, workspace.rows("calibration"), new, settings)
    old = checkpoint.with_name(f".{stage.name}.last")
    shutil.rmtree(old, ignore_errors=True)
    if checkpoint.exists():
        checkpoint.rename(old)  # takes no time, which deleting does
    new.rename(checkpoint)
    shutil.rmtree(old, ignore_errors=True)
    _, trouble = attempted(_CARD, lambda: write_card(checkpoint, job.model_name, stage.text), None)
    return {
        **sizes_of(checkpoint),
        "load_seconds": record.load_seconds,
        "quantize_seconds": record.seconds,
        "save_seconds": record.save_seconds,
        "peak_memory_bytes": record.peak_memory_bytes,
        "warnings": [*record.warnings, *trouble],
    }


def measure(job: Job, checkpoint: Path, device: torch.device) -> tuple[Summary, list[dict[str, Any]], list[str]]:
    """Load a checkpoint and compare it with the recorded reference.

    Returns:
        Its figures, its texts (`samples.read`), and what went wrong with those.
    """
    workspace = Workspace(job.out)
    model = load_model(str(checkpoint), job.dtype, device)
    figures = evaluate(model, workspace.rows("evaluation"), load(workspace.reference), job.batch_size)
    none: list[dict[str, Any]] = []
    written = kept_written(workspace.reference)
    texts, trouble = attempted(_TEXTS, lambda: read(model, load_tokenizer(checkpoint), written), none)
    return figures, texts, trouble


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


def stored_dtype(folder: Path) -> torch.dtype:
    """What config.json declares."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    return getattr(torch, str(name).removeprefix("torch."))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
