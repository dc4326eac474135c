"""``bitsmoe quantize``, and ``bitsmoe plan``, which says what it would take."""

from pathlib import Path
from typing import Annotated

import typer

from .. import messages
from . import options as o
from .app import command


@command(
    "quantize",
    "Quantize a model by a recipe and save it.",
    "bitsmoe quantize --out docmoe-2bit                               the demo model, to see what happens",
    "bitsmoe quantize --model Qwen/Qwen3-30B-A3B --calibration wikitext.txt --samples 256 --seq-len 2048 --out OUT",
    "bitsmoe quantize --model DIR --recipe w2_attn_gptq_w4 --calibration FILE --out DIR2   attention too, by GPTQ",
    "torchrun --nproc-per-node 8 -m bitsmoe_modifier quantize --model DIR --calibration FILE --out OUT   8 GPUs",
)
def quantize(
    out: Annotated[str, typer.Option(metavar="DIR", help="Checkpoint folder to create.", show_default=False)],
    model: o.ModelOption = None,
    recipe: o.RecipeOption = "w2",
    stage: o.StageOption = None,
    resume_dir: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Keep finished layers there; the same command continues after a kill."),
    ] = None,
    offload_dir: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Let weights that memory cannot hold wait there, in a temporary folder."),
    ] = None,
    no_preflight: o.NoPreflight = False,
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
    from ..comparison.single import Options, quantize_one
    from ..sources.demo import demo_asset

    made = quantize_one(
        model=model or demo_asset("docmoe"),
        recipe=recipe,
        stage=stage,
        calibration=calibration or demo_asset("docmoe_calibration.txt"),
        out=Path(out),
        options=Options(
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            pipeline=pipeline,
            calibrate_all_experts=calibrate_all_experts,
            text_column=text_column,
            preflight=not no_preflight,
            resume_dir=resume_dir,
            offload_dir=offload_dir,
            verbose=verbose,
        ),
    )
    if made is None:
        return
    print(
        f"{out}: {made['measured_bits_per_expert_weight']:.4f} bits per expert weight, "
        f"{made['checkpoint_bytes'] / 1e6:.2f} MB, {made['quantize_seconds']:.0f} s"
    )
    for warning in made["warnings"]:
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

    print(plan_command(model, recipe, stage, bits, samples * seq_len, dtype, device))
