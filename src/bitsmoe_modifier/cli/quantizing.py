"""``bitsmoe quantize``, and ``bitsmoe plan``, which says what it would take."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .. import messages
from . import options as o
from .app import command


@command(
    "quantize",
    "Quantize a model by a recipe and save it.",
    "bitsmoe quantize --out docmoe-2bit                               the demo model, to see what happens",
    "bitsmoe quantize --model Qwen/Qwen3-30B-A3B --calibration wikitext.txt --samples 256 --seq-len 2048 --out OUT",
    "bitsmoe quantize --model DIR --calibration FILE --bits 1.6,2.0,2.5 --out DIR2   three sizes, calibrated once",
    "bitsmoe quantize --model DIR --calibration FILE --fit 24GB --context 32k --out DIR2   what one GPU holds",
    "bitsmoe quantize --model DIR --recipe w2_attn_gptq_w4 --calibration FILE --out DIR2   attention too, by GPTQ",
    "torchrun --nproc-per-node 8 -m bitsmoe_modifier quantize --model DIR --calibration FILE --out OUT   8 GPUs",
)
def quantize(
    call: typer.Context,
    out: Annotated[
        str,
        typer.Option(
            metavar="DIR", help="Checkpoint folder to create; with several --bits, their parent.", show_default=False
        ),
    ],
    model: o.ModelOption = None,
    recipe: o.RecipeOption = "w2",
    stage: o.StageOption = None,
    bits: o.Bits = "",
    size: o.Size = None,
    fit: o.FitOption = None,
    context: o.Context = "8k",
    batch: o.Batch = 1,
    ignore: o.Ignore = "",
    resume_dir: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Keep finished layers there; the same command continues after a kill."),
    ] = None,
    offload_dir: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Let weights that memory cannot hold wait there, in a temporary folder."),
    ] = None,
    mtp: Annotated[
        Literal["keep", "drop"],
        typer.Option(help="Layers for multi-token prediction: keep them as they are, or leave them out."),
    ] = "keep",
    no_preflight: o.NoPreflight = False,
    trust_remote_code: o.TrustRemoteCode = False,
    text_column: o.TextColumn = "text",
    seq_len: o.SeqLen = 256,
    batch_size: o.BatchSize = 16,
    device: o.Device = "auto",
    dtype: o.DtypeOption = "auto",
    calibration: o.Calibration = None,
    samples: o.Samples = 128,
    seed: o.Seed = 0,
    calibrate_all_experts: o.AllExperts = False,
    pipeline: o.PipelineOption = "independent",
    verbose: o.Verbose = False,
    quiet: o.Quiet = False,
    log_json: o.LogJson = False,
) -> None:
    """Quantize a model by one stage of a recipe and save a checkpoint that AutoModelForCausalLM loads.

    Give calibration text of the kind that the model will see; 128 rows of 256 tokens are enough to try, 256 of 2048
    for a model to keep. Every expert should see some 64 tokens at least; `inspect` says how many each saw.
    """
    from ..calibration.recipe import one_stage, with_fields

    chosen = with_fields(one_stage(recipe, stage), ignore=list(o.names(ignore)) or None)  # before the heavy imports
    from ..checkpoints.budget import Budget
    from ..comparison.single import Options, quantize_each
    from ..sources.demo import demo_asset

    o.say_whose_text(model, calibration, "--calibration")
    model = model or demo_asset("docmoe")
    stages = Budget(o.names(bits), size, fit, context, batch).stages(chosen, model)
    folders = [Path(out)] if len(stages) == 1 else [Path(out) / f"{text}-bits" for text in o.names(bits)]
    made = quantize_each(
        model,
        list(zip(stages, folders, strict=True)),
        calibration or demo_asset("docmoe_calibration.txt"),
        o.settings(Options, call, preflight=not no_preflight),
    )
    for folder, one in zip(folders, made, strict=False):
        print(
            f"{folder}: {one['measured_bits_per_expert_weight']:.4f} bits per expert weight, "
            f"{one['checkpoint_bytes'] / 1e6:.2f} MB, {one['quantize_seconds']:.0f} s"
        )
        for warning in one["warnings"]:
            messages.say("warning", f"warning: {warning}")


@command(
    "plan",
    "What quantizing a model would take.",
    "bitsmoe plan --model Qwen/Qwen3-30B-A3B --bits 2",
    "bitsmoe plan --model DIR --recipe w2_attn_gptq_w4 --samples 256 --seq-len 2048 --device cuda",
)
def plan(
    model: Annotated[
        str, typer.Option(metavar="DIR|ID", help="Folder, or hub name; no weights are fetched.", show_default=False)
    ],
    recipe: o.RecipeOption = "w2",
    stage: o.StageOption = None,
    bits: Annotated[float | None, typer.Option(metavar="N", help="Instead of the recipe's.")] = None,
    samples: o.Samples = 128,
    seq_len: o.SeqLen = 256,
    device: o.Device = "auto",
    dtype: o.DtypeOption = "auto",
    verbose: o.Verbose = False,
    quiet: o.Quiet = False,
    log_json: o.LogJson = False,
) -> None:
    """What quantizing a model would take: memory, disk, time, and the size of the result.

    Reads config.json and the headers of the safetensors files, no weights; of a hub model, a few kilobytes per file
    are fetched.
    """
    from ..checkpoints.plan import plan_command
    from ..errors import check_at_least

    check_at_least(1, samples=samples)
    check_at_least(2, seq_len=seq_len)
    print(plan_command(model, recipe, stage, bits, samples * seq_len, dtype, device))
