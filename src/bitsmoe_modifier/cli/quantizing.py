"""``bitsmoe quantize``, and ``bitsmoe plan``, which says what it would take."""

import json
import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from .. import messages
from ..errors import BitsMoEError, check_at_least
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
    options=(*o.RECIPE, *o.TEXT, *o.BATCHES, *o.COMPUTING, *o.CALIBRATING),
)
def quantize(
    call: typer.Context,
    *,
    out: Annotated[
        str,
        typer.Option(
            metavar="DIR", help="Checkpoint folder to create; with several --bits, their parent.", show_default=False
        ),
    ],
    model: str | None,
    recipe: str,
    stage: str | None,
    bits: o.Bits = "",
    size: o.Size = None,
    fit: o.FitOption = None,
    context: o.Context = "8k",
    batch: o.Batch = 1,
    max_kld: o.MaxKld = None,
    codes: o.Codes = None,
    ignore: o.Ignore = "",
    fast: Annotated[
        bool, typer.Option("--fast", help="Round without error feedback: half of the time, 2.5 to 3 times the loss.")
    ] = False,
    best: Annotated[
        bool, typer.Option("--best", help="Refine what was rounded twice: hardly less loss, a tenth more time.")
    ] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload the checkpoint; of several, -BITS-bits is added.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Let only you see the repository, if it is new.")] = False,
    resume_dir: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Keep finished layers there; the same command continues after a kill."),
    ] = None,
    offload_dir: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Let weights that memory cannot hold wait there, in a temporary folder."),
    ] = None,
    mtp: Annotated[
        Literal["keep", "quantize", "drop"] | None,
        typer.Option(
            help="Layers for multi-token prediction: keep them as they are (by default), pack their experts too, or "
            "leave them out."
        ),
    ] = None,
    rest: Annotated[
        Literal["source", "bf16"],
        typer.Option(help="What is not quantized of a source in FP8, INT4 or FP4: as it is stored there, or in bf16."),
    ] = "source",
    no_preflight: o.NoPreflight = False,
    calibration: str | None,
    verbose: bool,
) -> None:
    """Quantize a model by one stage of a recipe and save a checkpoint that AutoModelForCausalLM loads.

    Give calibration text of the kind that the model will see; 128 rows of 256 tokens are enough to try, 256 of 2048
    for a model to keep. Every expert should see some 64 tokens at least; `inspect` says how many each saw.
    """
    from ..calibration.recipe import one_stage, with_fields

    sizes = o.names(bits)
    if bits and not sizes:
        raise BitsMoEError(f"--bits {bits!r} is no number; write --bits 2.0 or --bits 1.6,2.0,2.5")
    if private and not push_to_hub:
        raise BitsMoEError("--private says how to upload; give --push-to-hub too, or leave it out")
    chosen = with_fields(  # before the heavy imports
        one_stage(recipe, stage),
        ignore=list(o.module_names(ignore)) or None,
        max_kld=max_kld,
        codes=codes,
        error_feedback=False if fast else None,
        refine_passes=2 if best else None,
        mtp=mtp if mtp == "quantize" else None,
    )
    if not verbose:
        os.environ.setdefault("TQDM_DISABLE", "1")  # one line of our own in place of the libraries' bars
    from ..checkpoints.budget import Budget
    from ..comparison.single import Options, quantize_each
    from ..sources.demo import demo_asset
    from ..storage.folders import resolved
    from ..storage.sizes import ExpertBits

    if fast and best:
        raise BitsMoEError("--fast and --best exclude each other; give one of them")
    if push_to_hub:
        from ..checkpoints.push import check_login

        check_login(push_to_hub)
    if call.params["pipeline"] != "datafree":
        o.say_whose_text(model, calibration, "--calibration")
    model = model or demo_asset("docmoe")
    stages = Budget(sizes, size, fit, context, batch, max_kld).stages(chosen, model)
    folders = [Path(out)] if len(stages) == 1 else [Path(out) / f"{text}-bits" for text in sizes]
    made = quantize_each(
        model,
        list(zip(stages, folders, strict=True)),
        calibration or demo_asset("docmoe_calibration.txt"),
        o.settings(Options, call, preflight=not no_preflight),
    )
    asked = {str(resolved(folder)): folder for folder in folders}
    for one in made:
        print(
            f"{asked[one['folder']]}: {one['measured_bits_per_expert_weight']:.4f} bits per expert weight "
            f"({ExpertBits(**one['bits_apart'])}), "
            f"{one['checkpoint_bytes'] / 1e6:.2f} MB, {one['quantize_seconds']:.0f} s"
        )
    for warning in dict.fromkeys(warning for one in made for warning in one["warnings"]):  # sizes have most in common
        messages.say("warning", f"warning: {warning}")
    if push_to_hub and made:
        from ..checkpoints.push import push

        for folder in folders:
            repo = push_to_hub if len(folders) == 1 else f"{push_to_hub}-{folder.name}"
            print(push(folder, repo, private))


@command(
    "plan",
    "What quantizing a model would take.",
    "bitsmoe plan --model Qwen/Qwen3-30B-A3B --bits 2",
    "bitsmoe plan --model DIR --survey --calibration FILE             the loss that every size would have",
    "bitsmoe plan --model DIR --recipe w2_attn_gptq_w4 --samples 256 --seq-len 2048 --device cuda",
    options=(*o.RECIPE, *o.TEXT, *o.BATCHES, *o.COMPUTING, *o.CALIBRATION),
)
def plan(
    call: typer.Context,
    *,
    model: str | None,
    recipe: str,
    stage: str | None,
    bits: Annotated[float | None, typer.Option(metavar="N", help="Instead of the recipe's.")] = None,
    codes: o.Codes = None,
    survey: Annotated[
        bool, typer.Option("--survey", help="Survey the model for the KL divergence of every size; reads the weights.")
    ] = False,
    resume_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="Keep the survey there, for `quantize --resume-dir`.")
    ] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the survey's points there too.")
    ] = None,
    calibration: str | None,
    samples: int,
    seq_len: int,
    device: str,
    dtype: str,
) -> None:
    """What quantizing a model would take: memory, disk, time, and the size of the result.

    Reads config.json and the headers of the safetensors files, no weights; of a hub model, a few kilobytes per file
    are fetched. With --survey, the model is loaded and surveyed, and the KL divergence of every size is predicted.
    """
    from ..calibration.recipe import one_stage, with_fields
    from ..checkpoints.plan import plan_command

    check_at_least(1, samples=samples)
    check_at_least(2, seq_len=seq_len)
    for option, value in (("--json", json_file), ("--resume-dir", resume_dir)):
        if value and not survey:
            raise BitsMoEError(f"{option} keeps what --survey finds; give --survey too, or leave it out")
    if json_file:
        from ..storage.folders import check_file_place

        check_file_place(json_file, "--json")
    from ..sources.demo import demo_asset

    chosen = with_fields(one_stage(recipe, stage), bits=bits, codes=codes)
    if survey:
        o.say_whose_text(model, calibration, "--calibration")
    model = model or demo_asset("docmoe")
    if survey:
        if not call.params["verbose"]:
            os.environ.setdefault("TQDM_DISABLE", "1")
        from ..comparison.predicting import curve_lines, survey_one
        from ..comparison.single import Options

        options = o.settings(Options, call)
        found = survey_one(model, chosen, calibration or demo_asset("docmoe_calibration.txt"), options)
        print("\n".join(curve_lines(found)))
        if json_file:
            from ..storage.records import write_text

            points = list(zip(found.bits.tolist(), found.kld.tolist(), strict=True))
            write_text(Path(json_file), json.dumps({"points": points}))
        return
    print(plan_command(model, chosen, samples * seq_len, dtype, device))
