"""``bitsmoe compare`` and ``bitsmoe eval``."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .. import messages
from ..errors import BitsMoEError
from . import options as o
from .app import command


@command(
    "compare",
    "Quantize by every stage of a recipe, and compare.",
    "bitsmoe compare                                                  the demo model, five runs",
    "bitsmoe compare --tasks continuations --out REPORT               accuracy too",
    "bitsmoe compare --model DIR --recipe ab_all --arms gptq_w3,bitsmoe_2_0 --calibration FILE --eval-text FILE",
    options=(*o.TEXT, *o.BATCHES, *o.COMPUTING, *o.CALIBRATING, *o.EVALUATION),
)
def compare(
    context: typer.Context,
    model: o.ModelOption = None,
    recipe: Annotated[
        str,
        typer.Option(metavar="FILE|NAME", help="Recipe file, or name of a shipped recipe; each stage is one run."),
    ] = "ab_gptq_bitsmoe",
    arms: Annotated[str, typer.Option(metavar="NAME,…", help="Run only these stages.", show_default="all")] = "",
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder to write.")] = "bitsmoe-report",
    no_preflight: o.NoPreflight = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run again what an earlier run in DIR finished.")] = False,
    *,
    calibration: str | None,
    eval_text: str | None,
    tasks: str,
) -> None:
    """Quantize a model by every stage of a recipe, and measure each result against the unquantized model.

    Each stage runs in its own process, from the unquantized model and with the same calibration rows. Every saved
    checkpoint is loaded again and measured. The result is report.json, report.md and report.html. A rerun with the
    same inputs uses what is finished.
    """
    from ..calibration.recipe import find_recipe, read_stages, select

    select(read_stages(find_recipe(recipe)), list(o.names(arms)) or None)  # typos, before the heavy imports
    from ..comparison.runner import CompareSettings
    from ..comparison.runner import compare as run
    from ..evaluation.columns import table
    from ..pages.verdicts import of_model
    from ..sources.demo import demo_asset

    o.say_whose_text(model, calibration, "--calibration")
    o.say_whose_text(model, eval_text, "--eval-text")
    settings = o.settings(
        CompareSettings,
        context,
        model=model or demo_asset("docmoe"),
        calibration=calibration or demo_asset("docmoe_calibration.txt"),
        eval_text=eval_text or demo_asset("docmoe_heldout.txt"),
        arms=list(o.names(arms)) or None,
        tasks=o.names(tasks),
        preflight=not no_preflight,
    )
    report = run(settings, context.obj)
    done = [arm for arm in report["arms"] if "error" not in arm]
    figures = table(report["reference"], done, report["noise_floor"])
    print(f"\n{figures}\n\n{of_model(report)}\n\n{Path(out) / 'report.html'}")
    if len(done) < len(report["arms"]):
        raise typer.Exit(1)


@command(
    "eval",
    "Measure a checkpoint against the unquantized model.",
    "bitsmoe eval qwen3-2bit --model Qwen/Qwen3-30B-A3B --eval-text held_out.txt --seq-len 2048",
    "bitsmoe eval qwen3-2bit --model Qwen/Qwen3-30B-A3B --tasks arc_easy,hellaswag --task-items 500",
    options=(*o.TEXT, *o.BATCHES, *o.COMPUTING, *o.EVALUATION),
)
def evaluate(
    context: typer.Context,
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Folder of the quantized model.")],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|ID", help="The unquantized model.", show_default="what the checkpoint says it was made from"
        ),
    ] = None,
    any_model: Annotated[
        bool, typer.Option("--any-model", help="Measure against --model even if it was made from another one.")
    ] = False,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the figures there too.")
    ] = None,
    backend: Annotated[
        Literal["transformers", "vllm"],
        typer.Option(help="What runs it; vllm measures --tasks only, in an environment with vLLM and lm-eval."),
    ] = "transformers",
    engine: Annotated[
        str,
        typer.Option(
            metavar="NAME=VALUE,…", help="vLLM's engine arguments, e.g. tensor_parallel_size=2.", show_default=False
        ),
    ] = "",
    *,
    dtype: str,
    eval_text: str | None,
    eval_rows: int,
    tasks: str,
    task_items: int,
) -> None:
    """Perplexity of a checkpoint, and how far its predictions are from the unquantized model's."""
    if json_file:
        from ..storage.folders import check_file_place

        check_file_place(json_file, "--json")
    if engine and backend != "vllm":
        raise BitsMoEError("--engine says how vLLM runs it; give --backend vllm too, or leave it out")
    figures: dict[str, Any]
    if backend == "vllm":
        from ..serving.evaluation import evaluate_served, table

        figures = evaluate_served(checkpoint, o.names(tasks), task_items, dtype, engine)
        print(f"\n{table(figures)}")
    else:
        from ..comparison.single import Options, evaluate_one
        from ..evaluation.columns import table as all_columns
        from ..sources.demo import demo_asset
        from ..sources.provenance import is_of_the_demo

        if model or not is_of_the_demo(checkpoint):
            o.say_whose_text(model or checkpoint, eval_text, "--eval-text")
        figures = evaluate_one(
            checkpoint=checkpoint,
            model=model,
            any_model=any_model,
            eval_text=eval_text or demo_asset("docmoe_heldout.txt"),
            eval_rows=eval_rows,
            options=o.settings(Options, context, tasks=o.names(tasks)),
        )
        print(f"\n{all_columns(figures['reference'], [figures['checkpoint']])}")
    if json_file:
        from ..storage.records import write_text

        write_text(Path(json_file), json.dumps(figures, indent=2))
    failed = [str(sentence) for sentence in figures.get("warnings", ())]
    for sentence in failed:
        messages.say("error", f"bitsmoe eval: {sentence}")
    if failed:
        raise typer.Exit(1)
