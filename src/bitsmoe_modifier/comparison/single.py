"""One checkpoint at a time, in this process: what `bitsmoe quantize` and `bitsmoe eval` do."""

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import yaml

from .. import messages
from ..aftermath import attempted
from ..batches import with_smaller_batches
from ..calibration.oneshot import Offload, QuantizeRecord, QuantizeSettings, quantize
from ..calibration.recipe import Stage, check_stage, find_recipe, one_stage, with_fields
from ..calibration.resume import reserved
from ..calibration.sweep import leading, sweep_of
from ..checkpoints.card import note_quality, write_card
from ..checkpoints.describe import describe
from ..checkpoints.export import export_dense
from ..checkpoints.plan import check_machine, working_memory
from ..errors import BitsMoEError, check_at_least
from ..evaluation.accuracy import Accuracy, check_tasks, compare_accuracy, measure_tasks
from ..evaluation.evaluate import evaluate, evaluate_reference, load_model
from ..evaluation.reference import record
from ..evaluation.samples import Written, read, write
from ..extras import require
from ..logs import set_up_logging
from ..method.distributed import torchrun_job
from ..pages.verdicts import LEGEND, place
from ..sources.fitting import check_rows
from ..sources.model import find_model, load_tokenizer, open_dense
from ..sources.provenance import check_predictions, check_source, source_of
from ..sources.text import calibration_rows, evaluation_rows, read_text, tokenize
from ..storage.folders import OutputFolder, check_new_folder, check_outside, existing_parent, is_occupied, resolved
from .device import resolve_device, use_device
from .kept import SharedWork, is_finished
from .runner import DTYPES, resolve_dtype
from .runs import sizes_of, stored_dtype

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """The options that both commands know, with the command line's names (see `CompareSettings`)."""

    samples: int = 128
    seq_len: int = 256
    seed: int = 0
    batch_size: int = 16
    device: str = "auto"
    dtype: str = "auto"
    pipeline: str = "independent"
    calibrate_all_experts: bool = False
    text_column: str = "text"
    tasks: tuple[str, ...] = ()
    task_items: int = 0
    preflight: bool = True
    resume_dir: str | None = None
    offload_dir: str | None = None
    mtp: Literal["keep", "quantize", "drop"] | None = None
    rest: Literal["source", "bf16"] = "source"
    verbose: bool = False


def _check_options(options: Options) -> None:
    """Refuse numbers that nothing can be done with, before anything is read."""
    check_at_least(1, batch_size=options.batch_size, samples=options.samples)
    check_at_least(2, seq_len=options.seq_len)
    check_at_least(0, task_items=options.task_items)


def quantize_one(
    model: str, recipe: str, stage: str | None, calibration: str, out: Path, options: Options
) -> dict[str, Any] | None:
    """Quantize a model by one stage of a recipe and save it; under torchrun, with the job's other processes.

    Args:
        model, recipe, calibration: as the command line takes them.
        stage: name of the stage; None where the recipe has only one.
        out: checkpoint folder to create; it may exist if it is empty.
        options: the rest.

    Returns:
        As `quantize_each` says.

    Raises:
        BitsMoEError: when the inputs cannot be used, before any long work.
    """
    made = quantize_each(model, [(one_stage(recipe, stage), out)], calibration, options)
    return made[0] if made else None


def quantize_each(
    model: str, stages: Sequence[tuple[Stage, Path]], calibration: str, options: Options
) -> list[dict[str, Any]]:
    """Quantize a model by each of several stages, with the same rows and, as far as they agree, by the same survey.

    Args:
        model, calibration: as the command line takes them.
        stages: each with its checkpoint folder.
        options: the rest. Without ``resume_dir``, a survey that several stages share waits in a temporary folder. With
            it, sizes that an earlier run of the same command has finished are left as they are.

    Returns:
        Folder, sizes, time, memory and warnings of each that was made, named as in report.json; none on all processes
        but the first.

    Raises:
        BitsMoEError: when the inputs cannot be used, before any long work.
    """
    require("llmcompressor", "quantizing")
    _check_options(options)
    with ExitStack() as held:
        outputs = [OutputFolder(out) for _, out in stages]
        check_outside([one.path for one in outputs], resume_dir=options.resume_dir, offload_dir=options.offload_dir)
        if not int(os.environ.get("RANK", "0")):  # the first process of a torchrun job writes for all
            for output in outputs:
                if not _may_be_finished(output, stages, options):
                    held.enter_context(output)
            held.enter_context(reserved(options.resume_dir))
        return _quantize_each(model, [stage for stage, _ in stages], outputs, calibration, options)


def _may_be_finished(output: OutputFolder, stages: Sequence[Any], options: Options) -> bool:
    """Whether a folder may hold a size that an earlier run of the same command has finished."""
    return options.resume_dir is not None and len(stages) > 1 and is_occupied(output.path)


def _quantize_each(
    model: str, stages: Sequence[Stage], outputs: Sequence[OutputFolder], calibration: str, options: Options
) -> list[dict[str, Any]]:
    device = use_device(resolve_device(options.device))
    dense = open_dense(model)
    dtype = resolve_dtype(options.dtype, str(device), dense.folder)
    if options.offload_dir is not None:
        dtype = _offloaded_dtype(options.dtype, dense.folder)
    tokenizer = load_tokenizer(dense.folder)
    text = read_text(calibration, options.text_column, options.samples * options.seq_len, tokenizer)
    tokens = tokenize(text, tokenizer)
    rows = calibration_rows(tokens, options.samples, options.seq_len, options.seed, text.source)
    check_rows(rows, dense.folder, text.source)
    set_up_logging(options.verbose)
    for stage in stages:
        check_stage(stage)
    from ..calibration.other_schemes import check_schemes  # imports llm-compressor

    check_schemes(stages, str(dense.folder))
    settings = QuantizeSettings(
        options.batch_size,
        dtype,
        options.pipeline,
        options.calibrate_all_experts,
        options.seed,
        model_name=model,
        mtp=options.mtp,
        rest=options.rest,
    )
    run = rows.numel(), dtype, str(device)
    with ExitStack() as held:
        ranks = held.enter_context(torchrun_job(str(device)))
        offload = held.enter_context(_offload(options.offload_dir, stages[0], dense.folder, *run))
        left = [one for one, out in zip(stages, outputs, strict=True) if not _may_be_finished(out, stages, options)]
        if options.preflight and left:
            waiting = None if offload is None else offload.folder
            ranks.compute(lambda: check_machine(left, dense.folder, outputs[0].path, *run, waiting))
        if offload is not None:
            settings = replace(settings, dtype=None, offload=offload)
        shared = None
        if options.resume_dir is None and len(stages) > 1:
            shared = held.enter_context(SharedWork(existing_parent(outputs[0].path)))
        batch, sweep = options.batch_size, sweep_of(stages)
        lead = stages[sweep.index(leading(sweep))] if sweep else None

        def attempt(size: int, stage: Stage, output: OutputFolder) -> QuantizeRecord:
            nonlocal batch
            if size < batch:
                if options.resume_dir is not None:
                    raise BitsMoEError(f"run again with --batch-size {size} and another --resume-dir")
                if shared is not None:
                    shared.renew()
            batch = size
            pipeline = "datafree" if sweep and stage is not lead else settings.pipeline  # layers are made already
            now = replace(settings, batch_size=stage.calibration_batch(size), pipeline=pipeline)
            kept = options.resume_dir if shared is None else str(shared.folder)
            recipe = with_fields(stage, resume_dir=kept, sweep=sweep or None).text
            with _pointing_at(options.resume_dir, output):
                return quantize(dense.folder, recipe, rows, output, now)

        made: dict[int, dict[str, Any]] = {}
        for place in sorted(range(len(stages)), key=lambda place: stages[place] is not lead):
            stage, output = stages[place], outputs[place]
            if _may_be_finished(output, stages, options):
                if is_finished(output.path, dense.folder, with_fields(stage, sweep=sweep or None), rows, settings):
                    messages.say("note", f"{output.asked} was finished by an earlier run of this command, and stays")
                    continue
                check_new_folder(output.path)  # says that it holds something else
            run_stage = partial(attempt, stage=stage, output=output)
            record, batch = with_smaller_batches(
                run_stage, batch, f"{stage.name}: calibration", "give shorter rows by --seq-len, or --offload-dir"
            )
            if ranks.first:
                made[place] = _finished(output.path, model, stage, record)
    return [made[place] for place in sorted(made)]


def _finished(out: Path, model: str, stage: Stage, made: QuantizeRecord) -> dict[str, Any]:
    """Write the card of a saved checkpoint, and say what it took."""
    what = f"{out} is written, but its README.md could not be"
    _, trouble = attempted(what, lambda: write_card(out, model, stage.text), None)
    return {
        "folder": str(out),
        **sizes_of(out),
        "load_seconds": made.load_seconds,
        "quantize_seconds": made.seconds,
        "save_seconds": made.save_seconds,
        "peak_memory_bytes": made.peak_memory_bytes,
        "warnings": [*made.warnings, *trouble],
    }


@contextmanager
def _pointing_at(resume_dir: str | None, output: OutputFolder) -> Iterator[None]:
    """Say, where saving failed, that the layers are kept."""
    try:
        yield
    except BitsMoEError as error:
        if resume_dir is None or not output.failed:
            raise
        message = f"{error}; the finished layers are kept: the same command finishes from {resume_dir}"
        raise BitsMoEError(message) from error


def _offloaded_dtype(wanted: str, folder: Path) -> torch.dtype:
    """The dtype that a model is stored in, which it computes in when its weights wait on disk."""
    stored = stored_dtype(folder)
    if wanted not in ("auto", str(stored).removeprefix("torch.")):
        raise BitsMoEError(f"--offload-dir: the model computes in {stored} then, as it is stored; leave out --dtype")
    return stored


@contextmanager
def _offload(
    parent: str | None, stage: Stage, model: Path, tokens: int, dtype: torch.dtype, device: str
) -> Iterator[Offload | None]:
    """A temporary folder in ``parent`` for weights, and what quantization needs of memory beside them."""
    if parent is None:
        yield None
        return
    try:
        Path(parent).mkdir(parents=True, exist_ok=True)
        waiting = tempfile.TemporaryDirectory(dir=parent, prefix="weights-")
    except OSError as error:
        raise BitsMoEError(f"{parent} cannot be written ({error.strerror}); give another --offload-dir") from None
    with waiting as folder:
        yield Offload(Path(folder), working_memory(stage, model, tokens, dtype, device))


def evaluate_one(
    checkpoint: str, model: str | None, eval_text: str, eval_rows: int, options: Options, any_model: bool = False
) -> dict[str, Any]:
    """Measure one checkpoint against the unquantized model.

    Args:
        checkpoint: folder or hub name.
        model: the unquantized model; None: the one that the checkpoint says it was made from.
        eval_text: as the command line takes it.
        eval_rows: rows at most; 0: the whole text.
        options: the rest.
        any_model: measure against ``model`` even if the checkpoint was made from another one.

    Returns:
        ``reference`` and ``checkpoint``: their figures, named as in report.json; ``warnings``: what failed beside them.

    Raises:
        BitsMoEError: when the inputs cannot be used, or the checkpoint was made from another model.
    """
    _check_options(options)
    check_at_least(0, eval_rows=eval_rows)
    folder = find_model(checkpoint)
    dense = open_dense(model or source_of(folder))
    if not any_model:
        check_source(folder, dense.name, dense.folder)
    check_predictions(folder, dense.name, dense.folder)
    device = use_device(resolve_device(options.device))
    dtype = resolve_dtype(options.dtype, str(device), dense.folder)
    tokenizer = load_tokenizer(dense.folder)
    text = read_text(eval_text, options.text_column, eval_rows * options.seq_len or None, tokenizer)
    rows = evaluation_rows(tokenize(text, tokenizer), options.seq_len, eval_rows, text.source)
    check_rows(rows, dense.folder, text.source)
    sizes = sizes_of(folder)
    set_up_logging(options.verbose)
    import bitsmoe_modifier  # noqa: F401 - registers the loader

    check_tasks(options.tasks)
    trouble: list[str] = []

    def also(what: str, do: Callable[[], T], otherwise: T) -> T:
        """What the figures do not depend on, and are not lost by."""
        done, said = attempted(what, do, otherwise)
        trouble.extend(said)
        return done

    with tempfile.TemporaryDirectory() as scratch:
        loaded: Any = load_model(str(dense.folder), dtype, device)
        reference, batch = with_smaller_batches(
            lambda size: record(loaded, rows, size, Path(scratch)), options.batch_size, "evaluation"
        )
        tasks = "the tasks failed on the unquantized model"
        expected: Accuracy = also(tasks, lambda: _accuracy(loaded, dense.folder, options), {})
        texts = "the models' texts could not be written"
        written: list[Written] = also(texts, lambda: write(loaded, tokenizer), [])
        own = evaluate_reference(rows, reference.to(device), options.batch_size)
        loaded = None  # not both in memory
        loaded = load_model(str(folder), dtype, device)
        figures, _ = with_smaller_batches(lambda size: evaluate(loaded, rows, reference, size), batch, "evaluation")
        measured: Accuracy = also("the tasks failed", lambda: _accuracy(loaded, folder, options), {})
        samples: list[dict[str, Any]] = also(texts, lambda: read(loaded, load_tokenizer(folder), written), [])
    found = {
        "reference": {
            "name": "unquantized",
            "measured_bits_per_expert_weight": dense.expert_bits,
            "checkpoint_bytes": dense.checkpoint_bytes,
            **asdict(own),
            "accuracy": compare_accuracy(expected, {}),
        },
        "checkpoint": {
            "name": folder.name,
            **sizes,
            **asdict(figures),
            "accuracy": compare_accuracy(measured, expected),
        },
    }
    if Path(checkpoint).is_dir():  # not a copy of the hub's in its cache
        computed = str(dtype).removeprefix("torch.")
        where = f"{len(rows)} rows of {options.seq_len} tokens of {place(text.source)}, computed in {computed}"
        how = f"Measured by `bitsmoe eval` on {where}. {LEGEND}"
        figures_of = {"reference": found["reference"], "run": found["checkpoint"]}
        quality = {**figures_of, "how": how, "samples": samples}
        also(f"the figures could not be written into {folder}", lambda: note_quality(folder, quality), False)
    return {**found, "warnings": trouble}


def _accuracy(model: Any, folder: Path, options: Options) -> Accuracy:
    if not options.tasks:
        return {}
    return measure_tasks(model, load_tokenizer(folder), options.tasks, options.batch_size, options.task_items or None)


def export_one(checkpoint: str, out: Path, to: str, dtype: str, group_size: int, verbose: bool) -> None:
    """Write what a checkpoint with packed experts stands for in a form that other tools read.

    Args:
        checkpoint: folder or hub name.
        out: folder to create.
        to: "dense", or "w4": experts rounded once more, to compressed-tensors' packed 4-bit Linears.
        dtype: of the dense weights, a key of `DTYPES`.
        group_size: weights per scale of "w4".
        verbose: let the libraries speak.

    Raises:
        BitsMoEError: when the checkpoint or the folder cannot be used.
    """
    if to == "w4":
        require("llmcompressor", "export --to w4, which rounds once more,")
    check_at_least(1, group_size=group_size)
    check_new_folder(resolved(out))
    folder = find_model(checkpoint)
    set_up_logging(verbose)
    import bitsmoe_modifier  # noqa: F401 - registers the loader

    if to == "dense":
        export_dense(folder, out, DTYPES[dtype])
        return
    for layer in describe(folder)["layers"]:
        sizes = layer["hidden_size"], layer["intermediate_size"]
        if any(size % group_size for size in sizes):
            raise BitsMoEError(
                f"--group-size {group_size} does not divide {sizes[0]} and {sizes[1]}, the sizes of the experts of "
                f"{layer['name']}; give a divisor of both, such as {math.gcd(128, *sizes)}"
            )
    with OutputFolder(out) as output, tempfile.TemporaryDirectory(dir=existing_parent(out.parent)) as scratch:
        export_dense(folder, Path(scratch) / "dense", DTYPES[dtype])
        recipe = _experts_w4(group_size)
        settings = QuantizeSettings(pipeline="datafree")
        quantize(Path(scratch) / "dense", recipe, torch.zeros(0, 1, dtype=torch.int64), output, settings)


def _experts_w4(group_size: int) -> str:
    """The shipped recipe of this name with another group size, as YAML."""
    content = yaml.safe_load(find_recipe("experts_w4").read_text(encoding="utf-8"))
    modifier = content["quant_stage"]["quant_modifiers"]["QuantizationModifier"]
    modifier["config_groups"]["experts"]["weights"]["group_size"] = group_size
    return yaml.safe_dump(content)
