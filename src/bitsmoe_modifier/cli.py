"""The command line: ``bitsmoe quantize | compare | eval | inspect``."""

import argparse
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from . import __version__
from .errors import BitsMoEError

_AB_RECIPE = "ab_gptq_bitsmoe"
_REPORT = "bitsmoe-report"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0: done. 1: some arms failed, the report says which. 2: the inputs cannot be used. 130: interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = build_parser().parse_args(given)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # end like Ctrl-C, taking the arm's process along
    try:
        return args.run(args, shlex.join(["bitsmoe", *given]))
    except BitsMoEError as error:
        if args.verbose:
            traceback.print_exc()
        print(f"bitsmoe {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"bitsmoe {args.command}: interrupted", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The whole command line. Nothing heavy is imported for it."""
    parser = argparse.ArgumentParser(
        prog="bitsmoe",
        description="Quantize the experts of mixture-of-experts models, and measure what it costs.",
        epilog="Without options, compare runs on the small model that comes with the package.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    quantize = commands.add_parser("quantize", help="quantize a model by a recipe and save it", description=_QUANTIZE)
    _model_options(quantize, recipe="w2", recipe_help="recipe file or name of a shipped recipe (default: w2)")
    quantize.add_argument("--stage", metavar="NAME", help="which stage of the recipe, where it has several")
    quantize.add_argument("--out", required=True, metavar="DIR", help="checkpoint folder to create")
    _calibration_options(quantize)
    _common_options(quantize)
    quantize.set_defaults(run=_run_quantize)

    compare = commands.add_parser("compare", help="quantize by every stage of a recipe, compare", description=_COMPARE)
    _model_options(compare, recipe=_AB_RECIPE, recipe_help=f"recipe; each stage is an arm (default: {_AB_RECIPE})")
    compare.add_argument("--arms", type=_names, default=(), metavar="NAME,…", help="only these stages")
    compare.add_argument("--out", default=_REPORT, metavar="DIR", help=f"folder to write (default: {_REPORT})")
    compare.add_argument("--fresh", action="store_true", help="run arms again that an earlier run in DIR finished")
    _calibration_options(compare)
    _evaluation_options(compare)
    _common_options(compare)
    compare.set_defaults(run=_run_compare)

    evaluate = commands.add_parser("eval", help="measure a checkpoint against the unquantized model", description=_EVAL)
    evaluate.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of the quantized model")
    evaluate.add_argument("--model", metavar="DIR|ID", help="the unquantized model (default: the embedded demo model)")
    evaluate.add_argument("--json", metavar="FILE", help="write the figures there too")
    evaluate.add_argument("--seq-len", type=int, default=256, metavar="N", help="tokens per row (default: 256)")
    _evaluation_options(evaluate)
    _common_options(evaluate)
    evaluate.set_defaults(run=_run_eval)

    inspect = commands.add_parser("inspect", help="show sizes, widths and bases of a checkpoint", description=_INSPECT)
    inspect.add_argument("checkpoint", metavar="DIR", help="checkpoint folder")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.add_argument("--html", metavar="FILE", help="draw it as a page of its own, and print where it is")
    inspect.add_argument("--verbose", action="store_true", help="show tracebacks")
    inspect.set_defaults(run=_run_inspect)
    export = commands.add_parser(
        "export", help="write a checkpoint's dense weights for other tools", description=_EXPORT
    )
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="folder with packed experts")
    export.add_argument("--out", required=True, metavar="DIR", help="folder to create")
    export.add_argument("--to", default="dense", choices=["dense", "w4"], help="what to write (default: dense)")
    export.add_argument(
        "--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"], help="of dense weights (bfloat16)"
    )
    export.add_argument("--group-size", type=int, default=128, metavar="N", help="weights per scale of w4 (128)")
    export.add_argument("--verbose", action="store_true", help="show all messages of the libraries, and tracebacks")
    export.set_defaults(run=_run_export)
    return parser


_QUANTIZE = "Quantize a model by one stage of a recipe and save a checkpoint that AutoModelForCausalLM loads."
_COMPARE = """Quantize a model by every stage of a recipe, each in its own process from the unquantized model and with
the same calibration rows; load every saved checkpoint again, measure it against the unquantized model, and write
report.json, report.md and report.html. A rerun with the same inputs uses what is finished."""
_EVAL = "Perplexity of a checkpoint, and how far its predictions are from the unquantized model's."
_EXPORT = """Decode the experts and write an ordinary checkpoint, under the architecture's own tensor names: dense, or
(w4) with the experts as packed 4-bit Linears of compressed-tensors, rounded to nearest from the decoded weights. Needs
memory for the whole dense model."""
_INSPECT = "What a checkpoint stores, from its headers: sizes per layer, widths, bases, tokens per expert."


def _model_options(parser: argparse.ArgumentParser, recipe: str, recipe_help: str) -> None:
    parser.add_argument("--model", metavar="DIR|ID", help="folder or hub name (default: the embedded demo model)")
    parser.add_argument("--recipe", default=recipe, metavar="FILE|NAME", help=recipe_help)


def _calibration_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calibration",
        metavar="FILE|DATASET",
        help="text file, table (.jsonl, .csv, .parquet) or dataset NAME[:CONFIG][@SPLIT] (default: the demo's text)",
    )
    group.add_argument("--samples", type=int, default=128, metavar="N", help="calibration rows (default: 128)")
    group.add_argument("--seq-len", type=int, default=256, metavar="N", help="tokens per row (default: 256)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="which rows of the text (default: 0)")
    group.add_argument(
        "--calibrate-all-experts", action="store_true", help="send every token through every expert (not for BitsMoE)"
    )
    group.add_argument("--pipeline", default="independent", choices=["independent", "sequential", "basic", "datafree"])


def _evaluation_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("evaluation")
    group.add_argument("--eval-text", metavar="FILE|DATASET", help="held-out text (default: the demo's)")
    group.add_argument(
        "--eval-rows", type=int, default=256, metavar="N", help="rows at most; 0: the whole text (default: 256)"
    )
    group.add_argument(
        "--tasks",
        type=_names,
        default=(),
        metavar="NAME,…",
        help="accuracy on lm-eval tasks: any installed one, `continuations` (comes with the package), an lm-eval YAML "
        "file, or a .jsonl file of {context, endings, label}",
    )
    group.add_argument("--task-items", type=int, default=0, metavar="N", help="items per task at most (default: all)")


def _names(value: str) -> tuple[str, ...]:
    """A comma-separated list."""
    return tuple(name for name in value.split(",") if name)


def _common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text-column", default="text", metavar="NAME", help="column of tables and datasets (text)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="rows per forward pass (default: 16)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="what the model computes in (default: float32 on a CPU, its own elsewhere)",
    )
    parser.add_argument("--verbose", action="store_true", help="show all messages of the libraries, and tracebacks")


def demo_asset(name: str) -> str:
    """Path of a file of the embedded demo.

    Raises:
        BitsMoEError: where the package was installed without it.
    """
    path = Path(str(files(__package__))) / "assets" / name
    if not path.exists():
        raise BitsMoEError(f"the embedded demo is not installed ({path} is missing); give --model and the texts")
    return str(path)


def _given(value: str | None, asset: str) -> str:
    return value if value is not None else demo_asset(asset)


def _run_compare(args: argparse.Namespace, command: str) -> int:
    from .compare.runner import CompareSettings, compare

    settings = CompareSettings(
        model=_given(args.model, "docmoe"),
        recipe=args.recipe,
        calibration=_given(args.calibration, "docmoe_calibration.txt"),
        eval_text=_given(args.eval_text, "docmoe_heldout.txt"),
        out=args.out,
        arms=list(args.arms) or None,
        samples=args.samples,
        seq_len=args.seq_len,
        seed=args.seed,
        eval_rows=args.eval_rows,
        batch_size=args.batch_size,
        device=args.device,
        dtype=args.dtype,
        pipeline=args.pipeline,
        calibrate_all_experts=args.calibrate_all_experts,
        tasks=args.tasks,
        task_items=args.task_items,
        text_column=args.text_column,
        fresh=args.fresh,
        verbose=args.verbose,
    )
    report = compare(settings, command)
    from .compare.columns import table
    from .compare.verdicts import headline

    done = [arm for arm in report["arms"] if "error" not in arm]
    print(f"\n{table(report['reference'], done)}\n\n{headline(done)}\n\n{Path(args.out) / 'report.html'}")
    return 0 if len(done) == len(report["arms"]) else 1


def _run_quantize(args: argparse.Namespace, command: str) -> int:
    from .compare.single import quantize_one

    made = quantize_one(
        model=_given(args.model, "docmoe"),
        recipe=args.recipe,
        stage=args.stage,
        calibration=_given(args.calibration, "docmoe_calibration.txt"),
        out=Path(args.out),
        options=_options(args),
    )
    print(
        f"{args.out}: {made['measured_bits_per_expert_weight']:.4f} bits per expert weight, "
        f"{made['checkpoint_bytes'] / 1e6:.2f} MB, {made['quantize_seconds']:.0f} s"
    )
    for warning in made["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    return 0


def _run_eval(args: argparse.Namespace, command: str) -> int:
    from .compare.single import evaluate_one

    figures = evaluate_one(
        checkpoint=args.checkpoint,
        model=_given(args.model, "docmoe"),
        eval_text=_given(args.eval_text, "docmoe_heldout.txt"),
        eval_rows=args.eval_rows,
        options=_options(args),
    )
    from .compare.columns import table

    print(f"\n{table(figures['reference'], [figures['checkpoint']])}")
    if args.json:
        import json

        from .compare.workspace import write_text

        write_text(Path(args.json), json.dumps(figures, indent=2))
    return 0


def _run_inspect(args: argparse.Namespace, command: str) -> int:
    from .compare.describe import describe, render
    from .compare.model import find_model

    folder = find_model(args.checkpoint)
    if args.html:
        from .compare.workspace import write_text
        from .pages.checkpoint import checkpoint_page

        write_text(Path(args.html), checkpoint_page(folder))
        print(args.html)
        return 0
    found = describe(folder)
    if args.json:
        import json

        print(json.dumps(found, indent=2))
    else:
        print(render(found))
    return 0


def _run_export(args: argparse.Namespace, command: str) -> int:
    from .compare.single import export_one

    export_one(args.checkpoint, Path(args.out), args.to, args.dtype, args.group_size, args.verbose)
    print(args.out)
    return 0


def _options(args: argparse.Namespace) -> Any:
    from .compare.single import Options

    known = {name: value for name, value in vars(args).items() if name in Options.__dataclass_fields__}
    return Options(**known)


if __name__ == "__main__":
    sys.exit(main())
