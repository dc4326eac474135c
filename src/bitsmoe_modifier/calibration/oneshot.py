"""One quantization: load the dense model, run llm-compressor's oneshot, save the checkpoint under its final name.

The model computes in ``dtype`` (float32 on a CPU without bf16 units is three to four times faster than bf16) and is
stored in the dtypes it came in, whatever it computed in: otherwise a float32 calibration would double the embeddings of
the checkpoint and count GPTQ's scales at 4 bytes instead of 2.
"""

import gc
import json
import os
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from loguru import logger
from torch import nn

from ..errors import BitsMoEError
from ..loading.inventory import check_nothing_lost, keep_beside, take_inventory
from ..loading.keeping import keep_as_stored
from ..loading.source import load_source
from ..loading.source_keys import restore_keys
from ..sources.classes import auto_class_of, load_published, read_auto_config
from ..sources.companions import copy_companions, let_save
from ..sources.precision import is_low_precision_source
from ..sources.provenance import REPORT_NAME, source_record
from ..sources.stacks import stored_parameters
from ..sources.text import dataloader
from ..storage.folders import OutputFolder, check_new_folder, resolved
from .fingerprint import fingerprint, rows_digest


@dataclass(frozen=True)
class Offload:
    """Where weights wait that memory cannot hold.

    Attributes:
        folder: an existing one.
        reserve_bytes: of memory, left to everything but weights.
    """

    folder: Path
    reserve_bytes: int


@dataclass(frozen=True)
class QuantizeSettings:
    """How to run oneshot, apart from recipe and data.

    Attributes:
        batch_size: calibration rows per forward pass.
        dtype: what the model computes in while it is calibrated; None: the dtype it is stored in.
        pipeline: llm-compressor's pipeline ("independent": each modifier its own pass; "sequential": all in one).
        calibrate_all_experts: send every token through every expert (llm-compressor's default). Off by default: GPTQ's
            Hessians then come from the tokens that an expert sees in use, as BitsMoE's statistics always do.
        seed: by which the rows were chosen, for the record.
        model_name: as the user named the model, for the record; None: that of its folder.
        mtp: what to do with layers for multi-token prediction, which transformers does not load: keep them as they
            are, or leave them out. None: what the recipe says, which alone can have their experts quantized.
        rest: what is not quantized of a source in low precision: "source", as it is stored there, or "bf16".
        offload: for models larger than memory, with ``dtype`` None; None: all weights are in memory.
    """

    batch_size: int = 16
    dtype: torch.dtype | None = None
    pipeline: str = "independent"
    calibrate_all_experts: bool = False
    seed: int | None = None
    offload: Offload | None = None
    model_name: str | None = None
    mtp: Literal["keep", "quantize", "drop"] | None = None
    rest: Literal["source", "bf16"] = "source"

    def noted(self) -> dict[str, str | None]:
        """What a checkpoint depends on of these, in JSON types, for its record."""
        return {"dtype": None if self.dtype is None else str(self.dtype), "mtp": self.mtp, "rest": self.rest}


@dataclass(frozen=True)
class QuantizeRecord:
    """What a quantization took.

    Attributes:
        load_seconds, seconds, save_seconds: of loading the dense model, of oneshot, of writing the checkpoint.
        peak_memory_bytes: peak resident memory of the process up to here; on CUDA, peak allocated device memory.
        warnings: what the user should know about the result.
    """

    load_seconds: float
    seconds: float
    save_seconds: float
    peak_memory_bytes: int
    warnings: tuple[str, ...]


def quantize(
    model_folder: Path, recipe: str, rows: torch.Tensor, out: Path | OutputFolder, settings: QuantizeSettings
) -> QuantizeRecord:
    """Quantize a model by a recipe and save it; nothing appears under ``out`` unless all of it was written.

    What saving could refuse of the model's settings is checked before anything is computed. When saving fails, what was
    written stays, and the error names it.

    Several processes (`distributed.torchrun_job`) call it together with the same arguments; the first one writes.

    Args:
        model_folder: the dense model.
        recipe: YAML text with one stage.
        rows: calibration tokens, int64 ``[n, T]``.
        out: folder to create, or to fill if it is empty; an `OutputFolder` that was entered, where the caller holds it.
        settings: how to run.

    Raises:
        BitsMoEError: when ``out`` holds something, or another run is writing it, before anything is computed.
    """
    if isinstance(out, OutputFolder):
        return _quantize(model_folder, recipe, rows, out, settings)
    if int(os.environ.get("RANK", "0")):
        check_new_folder(resolved(out))
        return _quantize(model_folder, recipe, rows, OutputFolder(out), settings)
    with OutputFolder(out) as output:
        return _quantize(model_folder, recipe, rows, output, settings)


def _quantize(
    model_folder: Path, recipe: str, rows: torch.Tensor, output: OutputFolder, settings: QuantizeSettings
) -> QuantizeRecord:
    from compressed_tensors.distributed import is_source_process
    from llmcompressor import oneshot
    from llmcompressor.core import active_session

    import bitsmoe_modifier  # registers modifier, format and loader

    from . import patches, tracing  # noqa: F401 - for every modifier alike
    from .capture import more_text

    started = time.perf_counter()
    source = source_record(model_folder, settings.model_name)
    model = load_checked(model_folder, recipe, settings.offload)
    inventory = model.source_inventory
    stored_dtype = model.dtype
    stored = {name: tensor.dtype for name, tensor in _tensors(model)}
    if settings.dtype is not None:
        _cast(model, settings.dtype)
    made_of = fingerprint(model, {"recipe": without_places(recipe)}, [rows_digest([{"input_ids": rows}])])
    loaded = time.perf_counter()
    oneshot(
        model=model,
        recipe=recipe,
        dataset=dataloader(rows, settings.batch_size),
        pipeline=settings.pipeline,
        moe_calibrate_all_experts=settings.calibrate_all_experts,
    )
    finished = time.perf_counter()
    modifiers = active_session().lifecycle.recipe.modifiers
    ours = [one for one in modifiers if isinstance(one, bitsmoe_modifier.BitsMoEModifier)]
    expected = [one.prediction.record() for one in ours if one.prediction is not None]
    reports = layer_reports(model)
    warnings = zeroed_experts(model)
    warnings += [f"{name}: {warning}" for name, report in reports.items() for warning in report["warnings"]]
    warnings += more_text(reports.values())
    restore_dtypes(model, stored, stored_dtype)
    as_stored = settings.rest == "source" and is_low_precision_source(model_folder)
    if as_stored:
        number = len(keep_as_stored(model, model_folder, settings.dtype))
        logger.info(f"{number} modules that were not quantized are stored as the source has them")
    if not is_source_process():
        model.save_pretrained(output.path)  # takes part in what the first process writes, and writes nothing
    else:
        with output.written() as temporary:
            model.save_pretrained(temporary)
            treatment = str(settings.mtp or getattr(model, "mtp_treatment", "keep"))
            instead = [one.instead() for one in packed_mtp(model)]
            restore_keys(inventory, model, temporary)
            kept = keep_beside(inventory, temporary, treatment, as_stored, instead)
            check_nothing_lost(inventory, model, temporary)
            for sentence in kept.sentences():
                logger.info(sentence)
            copy_companions(model_folder, temporary)
            _keep_recipe_loadable(temporary / "recipe.yaml", recipe)
            noted: dict[str, Any] = {"source": source, "layers": reports, "beside": asdict(kept)}
            if packed_mtp(model):
                noted["mtp_per_expert"] = {one.layer.experts: not one.layer.fused for one in packed_mtp(model)}
            if reports:
                noted["made_of"] = {**made_of, "seed": settings.seed, "settings": settings.noted()}
            if expected:
                noted["prediction"] = expected[0]
            (temporary / REPORT_NAME).write_text(json.dumps(noted), encoding="utf-8")
    record = QuantizeRecord(
        load_seconds=loaded - started,
        seconds=finished - loaded,
        save_seconds=time.perf_counter() - finished,
        peak_memory_bytes=peak_memory_bytes(),
        warnings=tuple(warnings),
    )
    del model
    gc.collect()
    return record


def without_places(recipe: str) -> Any:
    """The recipe's content for the record, without folders of this machine."""
    content = yaml.safe_load(recipe)
    for stage in content.values() if isinstance(content, dict) else ():
        for modifiers in stage.values():
            modifiers.get("BitsMoEModifier", {}).pop("resume_dir", None)
    return content


def load_checked(folder: Path, recipe: str, offload: Offload | None) -> Any:
    """The dense model as a modifier takes it that knows its folder, with settings that can be saved.

    Args:
        folder: of the model.
        recipe: YAML text, whose entries are looked for in the model.
        offload: as in `QuantizeSettings`.

    Raises:
        BitsMoEError: when the model's files are damaged, its settings cannot be saved, or the recipe does not fit it.
    """
    from .entries import check_others

    model = _load(folder, offload)
    model.source_inventory = take_inventory(model, folder)
    let_save(model)
    check_others(model, yaml.safe_load(recipe))
    return model


def _load(folder: Path, offload: Offload | None) -> Any:
    """The dense model in the dtype it is stored in; what memory cannot hold of an offloaded one stays on disk.

    llm-compressor's session holds the model of the run before, and what its modifiers captured: of a size that was
    made, or of a batch that was too large for the memory. They go first.
    """
    from llmcompressor.core import reset_session

    reset_session()
    gc.collect()
    if is_low_precision_source(folder):
        if offload is not None:
            raise BitsMoEError(
                f"{folder}: the experts of a source in low precision stay on disk as it is; leave out --offload-dir"
            )
        return load_source(folder)
    if offload is None:
        return load_published(folder, dtype="auto")
    from compressed_tensors.offload import load_offloaded_model

    load_published(folder, dtype="auto", device_map="meta")  # says what is missing, which the other does not
    auto = auto_class_of(read_auto_config(folder))
    with load_offloaded_model(auto, extra_cpu_mem=offload.reserve_bytes):
        return auto.from_pretrained(folder, dtype="auto", device_map="auto_offload", offload_folder=offload.folder)


@torch.no_grad()
def _cast(model: Any, dtype: torch.dtype) -> None:
    """Let the model compute in ``dtype``.

    As `from_pretrained` would: what is stored wider than the rest stays so (routers' corrections), and so do buffers
    that are not stored at all. ``model.to`` would round the frequencies of rotary embeddings to bfloat16.
    """
    stored, persistent = model.dtype, model.state_dict().keys()
    for name, tensor in _tensors(model):
        if name in persistent and tensor.dtype == stored:
            tensor.data = tensor.data.to(dtype)
    for module in model.modules():
        for stack in stored_parameters(module).values():
            stack.dtype = dtype  # from the stored codes at once, not by way of the dtype that the model came in
    _declare_dtype(model, dtype)


def peak_memory_bytes() -> int:
    """Peak allocated CUDA memory where CUDA was used, else the process's peak resident memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts kilobytes


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


@torch.no_grad()
def restore_dtypes(model: Any, stored: dict[str, torch.dtype], default: torch.dtype) -> None:
    """Give everything that was not quantized the dtype it had on disk, and quantized Linears scales of that dtype.

    Rounding a scale from float32 to bf16 afterwards leaves every code as it is and moves the weights by 2⁻⁹ at most,
    which is what loading in bf16 would have done to the scale beforehand.

    Args:
        model: after oneshot; experts may have been linearized or packed since ``stored`` was taken.
        stored: dtype by tensor name, of the model as loaded.
        default: for tensors that were not there under this name.
    """
    from compressed_tensors.offload import disable_onloading

    from ..runtime.experts import BitsMoEExperts

    with disable_onloading():  # change the tensors that will be saved, not copies of them on another device
        for prefix, module in model.named_modules():
            if isinstance(module, BitsMoEExperts):
                continue  # its dtypes are the format's
            quantized = getattr(module, "quantization_scheme", None) is not None
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if not tensor.is_floating_point() or (quantized and not name.endswith(("_scale", "bias"))):
                    continue
                dtype = stored.get(f"{prefix}.{name}", default)
                if tensor.dtype != dtype:
                    tensor.data = tensor.data.to(dtype)
    _declare_dtype(model, default)


def _declare_dtype(model: Any, dtype: torch.dtype) -> None:
    """Write the dtype to the configuration: llm-compressor makes its Linears by it, and it is saved."""
    for config in (model.config, *(getattr(model.config, name) for name in model.config.sub_configs)):
        config.dtype = dtype


def layer_reports(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What BitsMoE noted about each layer it quantized, by module name."""
    from ..runtime.experts import BitsMoEExperts

    packed = ((name, module) for name, module in model.named_modules() if isinstance(module, BitsMoEExperts))
    noted: dict[str, Any] = {name: getattr(module, "report", None) for name, module in packed}
    noted |= {one.layer.experts: one.report for one in packed_mtp(model)}
    return {name: asdict(report) for name, report in noted.items() if report is not None}


def packed_mtp(model: Any) -> list[Any]:
    """The packed experts of a model's layers for multi-token prediction (`mtp.PackedMtp`)."""
    return getattr(model, "packed_mtp", [])


def zeroed_experts(model: nn.Module) -> list[str]:
    """Say which expert projections GPTQ set to zero.

    GPTQ takes an input channel without any energy for dead and zeroes its weights; of an expert that no calibration
    token reached, that is the whole matrix.
    """
    zeroed = [
        name
        for name, module in model.named_modules()
        if ".experts." in name
        and isinstance(module, nn.Linear)
        and getattr(module, "quantization_scheme", None) is not None
        and not bool(module.weight.any())
    ]
    if not zeroed:
        return []
    return [
        f"{len(zeroed)} expert projections were set to zero because no calibration token reached their experts "
        f"({zeroed[0]}{', …' if len(zeroed) > 1 else ''}); use more calibration rows or --calibrate-all-experts"
    ]


def _keep_recipe_loadable(path: Path, recipe: str) -> None:
    """Replace a saved recipe that yaml.safe_load refuses by the text that was run.

    llmcompressor 0.14 writes GPTQ's `actorder` as a Python object, which makes the checkpoint's recipe unsafe to load.
    """
    try:
        yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError:
        path.write_text(recipe, encoding="utf-8")
    except FileNotFoundError:
        return
