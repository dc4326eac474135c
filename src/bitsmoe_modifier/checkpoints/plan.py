"""`bitsmoe plan`, and the same numbers as a check before a run: from config.json and the headers of the files alone."""

import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..calibration.recipe import Stage, check_stage
from ..errors import BitsMoEError, RecipeError, check_at_least
from ..extras import require
from ..method.rounding import round_block
from ..method.trellis import GroupTrellis
from ..sources.classes import build_empty
from ..sources.hub import hub_errors, reason
from ..sources.model import check_hub_name, find_model
from ..sources.precision import (
    decoded_tensors,
    is_low_precision_source,
    low_precision,
    source_sizes,
    source_tensors,
)
from ..sources.provenance import REPORT_NAME
from ..storage.folders import existing_parent
from ..storage.shards import read_json, stored_of
from ..storage.sizes import TensorSize, tensor_sizes
from .planning import LayerShape, ModelShape, Plan, Run, plan_run, table

#: Memory left to modifiers that are not ours.
_OTHERS_MEMORY = 5 * 10**9
_CGROUP = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True)
class Headers:
    """What is known of a model without its weights.

    Attributes:
        source: where its configuration is.
        sizes: of its tensors: dtypes and shapes that they have unquantized, bytes as they are stored.
        is_low: whether it is a source in low precision, whose experts stay in its files.
    """

    source: str
    sizes: dict[str, TensorSize]
    is_low: bool = False


def read_headers(model: str) -> Headers:
    """A folder's headers, or those of a hub model, of which only the first bytes of each file are fetched.

    Raises:
        CheckpointError: when there is no such folder, or its files are damaged.
    """
    if Path(model).is_dir():
        folder = find_model(model)
        sizes, is_low = tensor_sizes(folder), is_low_precision_source(folder)
        return Headers(model, source_sizes(source_tensors(folder), sizes) if is_low else sizes, is_low)
    check_hub_name(model)
    from huggingface_hub import get_safetensors_metadata, hf_hub_download
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        config = read_json(Path(hf_hub_download(model, "config.json")))  # first: it says why a model cannot be had
        found = get_safetensors_metadata(model)
    except NotASafetensorsRepoError as error:
        raise BitsMoEError(f"{model} is neither a folder nor a hub model with safetensors files: {error}") from error
    except hub_errors() as error:
        raise BitsMoEError(f"{model} is neither a folder nor a model that {reason(error)}") from error
    sizes = {
        name: TensorSize(t.dtype, tuple(t.shape), t.data_offsets[1] - t.data_offsets[0])
        for file in found.files_metadata.values()
        for name, t in file.tensors.items()
    }
    tensors = {name: stored_of("", name, size.dtype, size.shape) for name, size in sizes.items()}
    sizes = source_sizes(decoded_tensors(tensors, config, model), sizes)
    return Headers(model, sizes, low_precision(config) is not None)


def check_unquantized(model: str, headers: Headers) -> None:
    """Refuse a checkpoint that is quantized already.

    Raises:
        RecipeError: naming its format.
    """
    from transformers import AutoConfig

    try:
        scheme = getattr(AutoConfig.from_pretrained(headers.source), "quantization_config", None)
    except (ValueError, OSError, KeyError):
        return  # `model_shape` says what is wrong with it
    if scheme is not None:
        known = scheme if isinstance(scheme, dict) else vars(scheme)
        ours = Path(headers.source).is_dir() and (Path(headers.source) / REPORT_NAME).exists()
        if low_precision({"quantization_config": known}) and not ours:
            return  # a source like any other
        kind = known.get("format") or known.get("quant_method") or "of an unknown kind"
        raise RecipeError(
            f"{model} is quantized already ({kind}); plan takes the unquantized model, `bitsmoe inspect` shows what a "
            "finished checkpoint holds"
        )


def bitsmoe_fields(stage: Stage) -> dict[str, Any] | None:
    """The fields of the stage's BitsMoEModifier, None where it has none."""
    return next((dict(fields) for kind, fields in stage.modifiers if kind == "BitsMoEModifier"), None)


def model_shape(headers: Headers, modifier: Any) -> ModelShape:
    """Sizes of the model, built on the meta device.

    Args:
        headers: of its files.
        modifier: the BitsMoEModifier that is going to quantize it.

    Raises:
        RecipeError: when the family is not supported, or the recipe matches none of its layers or does not fit them.
    """
    from compressed_tensors.utils import match_named_modules

    from ..calibration.capture import choices_per_token
    from ..calibration.entries import check_entries
    from ..calibration.targets import check_sizes, fused_experts
    from ..loading.quantizer import experts_sizes

    model = build_empty(headers.source)
    present = fused_experts(model)
    check_entries(model, present, modifier.targets, modifier.ignore)
    chosen = {name for name, _ in match_named_modules(model, modifier.targets, modifier.ignore)} & present.keys()
    if not chosen:
        raise RecipeError(f"targets and ignore of the recipe match none of {', '.join(present)}")
    layers = tuple(
        LayerShape(name, *experts_sizes(module), gated=bool(getattr(module, "has_gate", True)))
        for name, module in present.items()
        if name in chosen
    )
    for layer in layers:
        check_sizes(layer.name, layer.experts, layer.hidden, layer.width, modifier.settings, gated=layer.gated)
    elements = sum(torch.Size(size.shape).numel() for size in headers.sizes.values())
    stored = sum(size.nbytes for size in headers.sizes.values())
    return ModelShape(
        layers=layers,
        stored_bytes=stored,
        expert_bytes=round(sum(layer.weights for layer in layers) * _bytes_per_weight(headers.sizes)),
        parameters=elements,
        decoder_layers=model.config.get_text_config().num_hidden_layers,
        choices=choices_per_token(model),
        in_files=headers.is_low,
    )


def _bytes_per_weight(sizes: dict[str, TensorSize]) -> float:
    """Stored bytes of a routed-expert weight."""
    experts = [size for name, size in sizes.items() if ".experts." in name and len(size.shape) > 1]
    return sum(s.nbytes for s in experts) / max(1, sum(torch.Size(s.shape).numel() for s in experts))


def make_plan(
    headers: Headers, fields: dict[str, Any], tokens: int, dtype: torch.dtype, device: str
) -> tuple[ModelShape, Plan]:
    """The plan of one quantization.

    Args:
        fields: of BitsMoEModifier.
        tokens: calibration tokens.
        dtype: what the model computes in.
        device: where its layers are quantized.
    """
    from ..calibration.modifier import BitsMoEModifier

    modifier = BitsMoEModifier(**fields)
    shape = model_shape(headers, modifier)
    run = Run(tokens, dtype.itemsize, torch.device(device).type != "cpu", modifier.scope == "global")
    return shape, plan_run(shape, modifier.settings, run)


def plan_command(model: str, chosen: Stage, tokens: int, dtype: str, device: str) -> str:
    """What `bitsmoe plan` prints of a stage; the other arguments are its options. The machine need not have ``device``.

    Raises:
        BitsMoEError: when the model or the recipe cannot be used.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(device)
    except RuntimeError as error:
        raise BitsMoEError(f"--device {device} is unknown: {str(error).splitlines()[0]}") from None
    check_at_least(1, samples=tokens)
    headers = read_headers(model)
    check_unquantized(model, headers)
    require("llmcompressor", "planning, which asks it what it can do with a family,")
    from ..calibration.other_schemes import check_schemes

    check_stage(chosen)
    fields = bitsmoe_fields(chosen)
    if fields is None:
        raise RecipeError(f"the stage {chosen.name} has no BitsMoEModifier to plan for")
    ours = sum(kind == "BitsMoEModifier" for kind, _ in chosen.modifiers)
    if ours > 1:
        raise RecipeError(f"plan counts one BitsMoEModifier, the stage {chosen.name} has {ours}; plan each alone")
    check_schemes([chosen], headers.source)
    if dtype == "auto":
        dtype = "float32" if torch.device(device).type == "cpu" else _commonest_dtype(headers.sizes)
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    shape, plan = make_plan(headers, fields, tokens, known[dtype], device)
    here = torch.device(device).type == "cpu" or (torch.device(device).type == "cuda" and torch.cuda.is_available())
    rates = (matrix_rate(device), encoding_rate(device) if plan.encoded else None) if here else (None, None)
    return render(f"{model}, {tokens} calibration tokens, {dtype} on {device}", shape, plan, *rates)


def _commonest_dtype(sizes: dict[str, TensorSize]) -> str:
    spelled = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    counts = Counter(dict.fromkeys(spelled.values(), 0))
    for size in sizes.values():
        counts[spelled.get(size.dtype, "bfloat16")] += size.nbytes
    return counts.most_common(1)[0][0]


def matrix_rate(device: str, dtype: torch.dtype = torch.float32, size: int = 1024) -> float:
    """Float operations per second of a square matrix product, measured for a fraction of a second."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    (a @ a).sum().item()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < 0.3:
        (a @ a).sum().item()
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - started)


def encoding_rate(device: str) -> float:
    """Weights per second that trellis codes are found for, measured for a fraction of a second: columns of experts of
    a common size at 2 bits, with all that is done for them."""
    generator, (matrices, columns) = torch.Generator().manual_seed(0), (16, 2) if device == "cpu" else (256, 32)
    target, weight = (torch.rand(matrices, *n, generator=generator).to(device) for n in ((columns, 512), (512,)))
    step, level = (torch.full((matrices, columns, n), value, device=device) for n, value in ((4, 1.0), (1, 3.0)))
    block = torch.zeros(matrices, columns, columns, device=device), target, step, level, weight
    # the first call may have to compile the encoder
    windows, _, _ = round_block(target.clone(), *block, coder=GroupTrellis([2]))
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < 0.3:
        round_block(target.clone(), *block, windows, GroupTrellis([2]))[2].sum().item()
        count += 1
    return target.numel() * count / (time.perf_counter() - started)


def render(model: str, shape: ModelShape, plan: Plan, rate: float | None, encoding: float | None = None) -> str:
    """The plan for a terminal, with the rates of the device (`Plan.seconds`); None: it is not in this machine, whose
    own rates say nothing of it."""
    sizes = sorted({(layer.experts, layer.width, layer.hidden) for layer in shape.layers})
    lines = [
        f"{model}: {_readable(shape.parameters)} parameters, {_readable(shape.stored_bytes)}B",
        f"  {len(shape.layers)} of {shape.decoder_layers} layers have experts to quantize: "
        + ", ".join(f"{e} of {i} × {h}" for e, i, h in sizes),
        f"  result          {_readable(plan.result_bytes)}B on disk",
        f"  memory          {plan.cpu_bytes / 1e9:.2f} GB at the peak",
        *table(plan.cpu),
    ]
    if plan.accelerator:
        lines += [f"  accelerator     {plan.accelerator_bytes / 1e9:.2f} GB at the peak", *table(plan.accelerator)]
    return "\n".join([*lines, f"  time            {_time(plan, rate, encoding)}"])


def _time(plan: Plan, rate: float | None, encoding: float | None) -> str:
    if rate is None:
        return "not known: this machine has no such device; run plan on one that has"
    codes = f", and {plan.encoded / 1e6:.0f} M trellis codes at {encoding / 1e6:.1f} M/s" if encoding else ""
    return (
        f"{_duration(plan.seconds(rate, encoding))}, to a factor of three or so: {plan.operations / 1e12:.1f} T float "
        f"operations at a quarter of the {rate / 1e9:.0f} G/s that a matrix product reaches on this machine now{codes}"
    )


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def available_memory() -> int | None:
    """Bytes that this process may still take: of the machine's, within the container's limit. None where unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
    limits = []
    for file in _CGROUP:
        try:
            limits.append(int(file.read_text()))
        except (OSError, ValueError):
            continue  # no limit, or no such controller
    return min([*limits, free]) if free is not None else None


def working_memory(stage: Stage, model: Path, tokens: int, dtype: torch.dtype, device: str) -> int:
    """Bytes of memory that a stage needs beside the model's weights; a guess for stages of other modifiers."""
    fields = bitsmoe_fields(stage)
    if fields is None:
        return _OTHERS_MEMORY
    return _beside_model(make_plan(read_headers(str(model)), fields, tokens, dtype, device)[1])


def _beside_model(plan: Plan) -> int:
    return plan.cpu_bytes - plan.cpu["model"]


def check_machine(
    stages: Sequence[Stage],
    model: Path,
    out: Path,
    tokens: int,
    dtype: torch.dtype,
    device: str,
    offload: Path | None = None,
) -> None:
    """Refuse the BitsMoE stages that this machine's memory or disk cannot hold, and families that are not supported.

    Each of the processes that torchrun started on this machine holds the model.

    Args:
        offload: folder for weights that memory cannot hold; None: it must hold them all.

    Raises:
        BitsMoEError: naming the stage, what it needs, what there is, and the remedies.
    """
    headers = read_headers(str(model))
    ours = [(stage.name, fields) for stage in stages if (fields := bitsmoe_fields(stage)) is not None]
    plans = [(name, make_plan(headers, fields, tokens, dtype, device)[1]) for name, fields in ours]
    _check_fits(plans, out, device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), offload)


def _check_fits(
    plans: Sequence[tuple[str, Plan]], out: Path, device: str, processes: int, offload: Path | None
) -> None:
    """Refuse runs that this machine cannot hold.

    Args:
        plans: name and plan of each run, which come one after the other and keep their checkpoints.
        out: folder that the checkpoints are written under.
        device: where layers are quantized.
        processes: that run each plan together on this machine.
        offload: as in `check_machine`.

    Raises:
        BitsMoEError: with what is needed, what there is, and the remedies.
    """
    parent = existing_parent(out)
    needed, free = sum(plan.result_bytes for _, plan in plans), shutil.disk_usage(parent).free
    if needed > free:
        raise _refusal(f"the checkpoints need {_gb(needed)} of disk, {parent} has {_gb(free)}", "give another --out")
    memory = available_memory()
    for name, plan in plans:
        held = plan.cpu_bytes if offload is None else _beside_model(plan)
        if memory is not None and processes * held > memory:
            each = f", {processes} times" if processes > 1 else ""
            largest = ", ".join(f"{part} {_gb(n)}" for part, n in sorted(plan.cpu.items(), key=lambda i: -i[1])[:3])
            raise _refusal(
                f"{name} needs about {_gb(held)} of memory{each} ({largest}), {_gb(memory)} are available",
                "use --dtype bfloat16, fewer --samples"
                + (", fewer processes" if each else "")
                + ("" if offload else ", or let weights wait on disk by --offload-dir"),
            )
        if offload is not None and memory is not None and plan.cpu_bytes > memory:
            waiting, free = plan.cpu_bytes - memory, shutil.disk_usage(offload).free
            if waiting > free:
                problem = f"{_gb(waiting)} of weights have to wait on disk, {offload} has {_gb(free)}"
                raise _refusal(problem, "give another --offload-dir")
        if plan.accelerator:
            there = torch.cuda.mem_get_info(torch.device(device))[0]
            if plan.accelerator_bytes > there:
                raise _refusal(
                    f"{name} needs about {_gb(plan.accelerator_bytes)} on {device}, {_gb(there)} are free",
                    "use another --device or fewer --samples",
                )


def _refusal(problem: str, remedy: str) -> BitsMoEError:
    return BitsMoEError(f"{problem}; {remedy}, or --no-preflight to try it anyway")


def _readable(n: float) -> str:
    """``30.53 G``, or, of what is small, ``3.52 M``."""
    return f"{n / 1e6:.2f} M" if n < 1e8 else f"{n / 1e9:.2f} G"


def _gb(n: int) -> str:
    return f"{n / 1e6:.1f} MB" if 0 < n < 1e8 else f"{n / 1e9:.1f} GB"
