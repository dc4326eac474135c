"""The whole comparison: inputs checked, reference recorded, recipes run one after the other, report written."""

import hashlib
import platform
import shlex
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import __version__, messages
from ..aftermath import attempted
from ..calibration.recipe import Stage, find_recipe, read_stages, select
from ..checkpoints.card import write_card
from ..errors import BitsMoEError, RecipeError, check_at_least
from ..evaluation.accuracy import Accuracy, compare_accuracy, contents
from ..extras import require
from ..pages.verdicts import LEGEND, how_measured
from ..sources.fitting import check_rows
from ..sources.model import DenseModel, load_tokenizer, open_dense, read_config
from ..sources.text import Text, calibration_rows, evaluation_rows, read_text, tokenize
from ..storage.folders import resolved
from .device import resolve_device
from .processes import Failure, Status, run_in_process, start_context
from .report import write_report
from .runs import Job, check_inputs, run_reference, run_stage, run_tasks
from .workspace import Workspace

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PACKAGES = ("bitsmoe-modifier", "llmcompressor", "compressed-tensors", "transformers", "torch")


@dataclass(frozen=True)
class CompareSettings:
    """Everything `compare` can be told. The command line's options have the same names.

    Attributes:
        model: folder or hub name of the dense model.
        recipe: recipe file, or the name of a shipped one; every stage is one run.
        calibration, eval_text: text file, table or dataset (see `data`).
        out: folder to write.
        arms: names of the stages to run; None: all.
        samples, seq_len, seed: calibration rows, tokens per row (of both texts), and which rows.
        eval_rows: evaluation rows at most; 0: the whole text.
        batch_size: rows per forward pass.
        device: "cpu", "cuda", "cuda:1", or "auto".
        dtype: key of `DTYPES`, or "auto": float32 on a CPU, the model's own elsewhere.
        pipeline, calibrate_all_experts: see `QuantizeSettings`.
        tasks: lm-eval tasks (see `accuracy`).
        task_items: items per task at most; 0: all.
        text_column: column of tables and datasets.
        preflight: refuse runs that this machine's memory or disk cannot hold.
        fresh: do not use what an earlier run in ``out`` finished.
        verbose: let the libraries print to the terminal instead of into log files.
    """

    model: str
    recipe: str
    calibration: str
    eval_text: str
    out: str
    arms: list[str] | None = None
    samples: int = 128
    seq_len: int = 256
    seed: int = 0
    eval_rows: int = 256
    batch_size: int = 16
    device: str = "auto"
    dtype: str = "auto"
    pipeline: str = "independent"
    calibrate_all_experts: bool = False
    tasks: tuple[str, ...] = ()
    task_items: int = 0
    text_column: str = "text"
    preflight: bool = True
    fresh: bool = False
    verbose: bool = False


def compare(settings: CompareSettings, command: str | None = None) -> dict[str, Any]:
    """Run the comparison and write its report.

    Args:
        settings: what to compare.
        command: the command line, for the report; by default the one of this process.

    Returns:
        The content of report.json.

    Raises:
        BitsMoEError: when the inputs cannot be used, before any long work. A run that fails is an entry of the report.
    """
    require("llmcompressor", "comparing, which quantizes,")
    require("matplotlib", "the report's charts")
    with Workspace(resolved(settings.out)).alone():
        return _compare(settings, command)


def _compare(settings: CompareSettings, command: str | None) -> dict[str, Any]:
    device = resolve_device(settings.device)
    check_at_least(1, batch_size=settings.batch_size, samples=settings.samples)
    check_at_least(2, seq_len=settings.seq_len)
    check_at_least(0, eval_rows=settings.eval_rows, task_items=settings.task_items)
    recipe = find_recipe(settings.recipe)
    stages = select(read_stages(recipe), settings.arms)
    model = open_dense(settings.model)
    context = start_context(device)
    tokenizer = load_tokenizer(model.folder)
    dtype = resolve_dtype(settings.dtype, device, model.folder)
    wanted = settings.samples * settings.seq_len
    calibration = read_text(settings.calibration, settings.text_column, wanted, tokenizer)
    wanted = settings.eval_rows * settings.seq_len
    evaluation = read_text(settings.eval_text, settings.text_column, wanted or None, tokenizer)
    calibration_tokens = tokenize(calibration, tokenizer)
    rows = calibration_rows(calibration_tokens, settings.samples, settings.seq_len, settings.seed, calibration.source)
    held_out = evaluation_rows(tokenize(evaluation, tokenizer), settings.seq_len, settings.eval_rows, evaluation.source)
    check_rows(rows, model.folder, calibration.source)
    check_rows(held_out, model.folder, evaluation.source)

    inputs = _inputs(settings, model, calibration, evaluation, len(held_out), device, dtype)
    workspace = Workspace(resolved(settings.out))
    workspace.prepare(inputs, settings.fresh)
    workspace.save_rows(rows, held_out)
    job = Job(
        model=model.folder,
        model_name=model.name,
        out=workspace.folder,
        device=device,
        dtype=dtype,
        batch_size=settings.batch_size,
        pipeline=settings.pipeline,
        calibrate_all_experts=settings.calibrate_all_experts,
        seed=settings.seed,
        tasks=tuple(settings.tasks),
        task_items=settings.task_items or None,
        versions={name: installed(name) for name in _PACKAGES},
    )
    status = Status(len(stages) + 1)
    try:
        runner = _Runner(context, workspace, job, status, settings.verbose)
        dense = runner.reference(stages, rows.numel() if settings.preflight else None)
        arms = [runner.arm(stage) for stage in stages]
    finally:
        status.close()
    report = {
        "version": 1,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": command or shlex.join(["bitsmoe", *sys.argv[1:]]),
        "environment": environment(device),
        "model": {"name": model.name, "model_type": model.model_type, "expert_weights": model.expert_elements},
        "recipe": str(recipe),
        **{key: inputs[key] for key in ("calibration", "evaluation", "compute")},
        "reference": {
            "name": "unquantized",
            "measured_bits_per_expert_weight": model.expert_bits,
            "checkpoint_bytes": model.checkpoint_bytes,
            **dense["reference"],
            "accuracy": compare_accuracy(runner.dense_accuracy, {}),
        },
        "noise_floor": dense["noise_floor"],
        "arms": arms,
    }
    write_report(report, workspace.folder)
    for stage, arm in zip(stages, arms, strict=True):
        if "error" not in arm:
            how = f"{' '.join(how_measured(report)[:2])} {LEGEND}"
            run = {key: value for key, value in arm.items() if key != "samples"}
            quality = {"reference": report["reference"], "run": run, "how": how, "samples": arm.get("samples", [])}
            folder = workspace.checkpoint(stage.name)
            card = partial(write_card, folder, model.name, stage.text, quality)
            for sentence in attempted(f"{folder}: its figures could not be written into README.md", card, None)[1]:
                messages.say("error", sentence)
    return report


class _Runner:
    """Runs the processes of one comparison, or takes what an earlier run of it finished."""

    def __init__(self, context: Any, workspace: Workspace, job: Job, status: Status, verbose: bool) -> None:
        self.context, self.workspace, self.job, self.status, self.verbose = context, workspace, job, status, verbose
        self.dense_accuracy: Accuracy = {}

    def _call(self, name: str, function: Any, *arguments: Any) -> Any:
        log = self.workspace.log(name)
        return run_in_process(self.context, function, arguments, log, self.status.show, self.verbose)

    def reference(self, stages: list[Stage], tokens: int | None) -> dict[str, Any]:
        """Check all inputs (see `check_inputs`), then the dense model's figures; all of it or an error."""
        self.status.begin("checking the recipe")
        checked = self._call("recipe", check_inputs, stages, self.job, tokens)
        if isinstance(checked, Failure):
            where = "" if checked.expected else f" (all of it in {self.workspace.log('recipe')})"
            raise RecipeError(f"{checked.message}{where}")
        key = {"versions": self.job.versions}
        kept = self.workspace.finished("_reference", key) if self.workspace.reference.exists() else None
        self.status.begin("unquantized model")
        made = kept or self._call("reference", run_reference, self.job)
        if isinstance(made, Failure):
            log = self.workspace.log("reference")
            raise BitsMoEError(f"the unquantized model could not be measured: {made.message} (all of it in {log})")
        self.workspace.keep("_reference", key, made)
        figures = made["reference"]
        self.dense_accuracy, _, warnings = self.accuracy("_reference", key, self.job.model, reuse=kept is not None)
        for warning in (*made.get("warnings", ()), *warnings):
            self.status.note(f"unquantized: {warning}")
        said = f"unquantized: perplexity {figures['perplexity']:.2f}{_accuracies(self.dense_accuracy)}"
        self.status.end(said + (" (as before)" if kept else ""))
        return made

    def accuracy(
        self, name: str, key: dict[str, Any], checkpoint: Path, reuse: bool
    ) -> tuple[Accuracy, float, list[str]]:
        """The accuracy of one model, the seconds it took, and warnings; {} without tasks or where they failed."""
        job = self.job
        if not job.tasks:
            return {}, 0.0, []
        key = {**key, "tasks": list(job.tasks), "items": job.task_items, "files": contents(job.tasks)}
        kept = self.workspace.finished(f"{name}.tasks", key) if reuse else None
        log = f"{name.removeprefix('_')}.tasks"
        made = kept or self._call(log, run_tasks, job, checkpoint)
        if isinstance(made, Failure):
            return {}, 0.0, [f"the tasks failed: {made.message} (all of it in logs/{log}.log)"]
        self.workspace.keep(f"{name}.tasks", key, made)
        return made["accuracy"], made["seconds"], []

    def arm(self, stage: Stage) -> dict[str, Any]:
        """One run's entry of the report, with its figures or its error."""
        head = {
            "name": stage.name,
            "modifiers": [kind for kind, _ in stage.modifiers],
            "nominal_bits": stage.nominal_bits,
            "checkpoint": str(Path("arms", stage.name)),
        }
        key = {"versions": self.job.versions, "stage": stage.text}
        present = self.workspace.checkpoint(stage.name).exists()
        kept = self.workspace.finished(stage.name, key) if present else None
        self.status.begin(stage.name)
        made = kept or self._call(stage.name, run_stage, self.job, stage)
        if isinstance(made, Failure):
            log = Path("logs", f"{stage.name}.log")
            self.status.end(f"{stage.name}: failed: {made.message} (all of it in {self.workspace.folder / log})")
            return {**head, "error": made.message, "log": str(log)}
        self.workspace.keep(stage.name, key, made)
        checkpoint = self.workspace.checkpoint(stage.name)
        accuracy, seconds, warnings = self.accuracy(stage.name, key, checkpoint, reuse=kept is not None)
        made = {**made, "warnings": [*made["warnings"], *warnings]}
        self.status.end(
            f"{stage.name}: {made['measured_bits_per_expert_weight']:.3f} bits, KL divergence × 1000 "
            f"{1000 * made['kld_mean']:.2f}, perplexity {made['perplexity']:.2f}"
            f"{_accuracies(accuracy)}" + (" (as before)" if kept else "")
        )
        for warning in made["warnings"]:
            self.status.note(f"{stage.name}: {warning}")
        compared = compare_accuracy(accuracy, self.dense_accuracy)
        return {**head, **made, "accuracy": compared, "tasks_seconds": seconds, "reused": kept is not None}


def _accuracies(accuracy: Accuracy) -> str:
    return "".join(f", {task} {100 * entry['acc']:.1f} %" for task, entry in accuracy.items())


def resolve_dtype(dtype: str, device: str, model: Path) -> torch.dtype:
    """``auto`` is float32 on a CPU and the dtype that the model is stored in elsewhere.

    Raises:
        BitsMoEError: when the name is not one of `DTYPES`.
    """
    if dtype == "auto":
        config = read_config(model)
        stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        dtype = "float32" if torch.device(device).type == "cpu" else stored.removeprefix("torch.")
    if dtype not in DTYPES:
        raise BitsMoEError(f"--dtype {dtype} is unknown; choose one of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def installed(package: str) -> str | None:
    """Version of an installed package, or of ourselves where we run from a checkout."""
    try:
        return version(package)
    except PackageNotFoundError:
        return __version__ if package == "bitsmoe-modifier" else None


def environment(device: str) -> dict[str, Any]:
    """What the figures were measured with."""
    return {
        "packages": {name: installed(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device,
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _inputs(
    settings: CompareSettings,
    model: DenseModel,
    calibration: Text,
    evaluation: Text,
    eval_rows: int,
    device: str,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Everything that the figures depend on, apart from the recipe."""
    files = sorted(f for f in model.folder.iterdir() if f.suffix in {".safetensors", ".json"})
    states = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return {
        "model": {"name": model.name, "files": hashlib.sha256(repr(states).encode()).hexdigest()},
        "calibration": {
            "source": calibration.source,
            "sha256": calibration.sha256,
            "rows": settings.samples,
            "seq_len": settings.seq_len,
            "seed": settings.seed,
            "all_experts": settings.calibrate_all_experts,
        },
        "evaluation": {
            "source": evaluation.source,
            "sha256": evaluation.sha256,
            "rows": eval_rows,
            "seq_len": settings.seq_len,
        },
        "compute": {
            "device": device,
            "dtype": str(dtype).removeprefix("torch."),
            "pipeline": settings.pipeline,
        },
    }
