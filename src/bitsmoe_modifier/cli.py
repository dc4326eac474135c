"""The command line: ``bitsmoe quantize | compare | eval | plan | inspect | export | import | completion``."""

import argparse
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from . import __version__, completion, messages
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
    together = int(os.environ.get("WORLD_SIZE", "1")) > 1  # a torchrun job, in which the first process speaks for all
    silent = args.quiet or (together and os.environ.get("RANK") != "0")
    messages.configure("quiet" if silent else "json" if args.log_json else "text")
    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")  # while importing; `logs.set_up_logging` comes after it
    if messages.mode() != "text":
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported, so before anything else
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # end like Ctrl-C, taking the arm's process along
    try:
        if together and args.command != "quantize":
            raise BitsMoEError("only `quantize` runs in several processes; start this command without torchrun")
        return args.run(args, shlex.join(["bitsmoe", *given]))
    except BitsMoEError as error:
        if args.verbose:
            traceback.print_exc()
        messages.say("error", f"bitsmoe {args.command}: {error}")
        return 2
    except KeyboardInterrupt:
        messages.say("error", f"bitsmoe {args.command}: interrupted")
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

    quantize = _command(commands, "quantize", "quantize a model by a recipe and save it", _QUANTIZE)
    _model_options(quantize, recipe="w2", recipe_help="recipe file or name of a shipped recipe (default: w2)")
    quantize.add_argument("--stage", metavar="NAME", help="which stage of the recipe, where it has several")
    quantize.add_argument("--out", required=True, metavar="DIR", help="checkpoint folder to create")
    quantize.add_argument(
        "--resume-dir", metavar="DIR", help="keep finished layers there; the same command continues after a kill"
    )
    quantize.add_argument(
        "--offload-dir", metavar="DIR", help="let weights wait there, in a temporary folder, that memory cannot hold"
    )
    _preflight_option(quantize)
    _calibration_options(quantize)
    _common_options(quantize)
    quantize.set_defaults(run=_run_quantize)

    compare = _command(commands, "compare", "quantize by every stage of a recipe, compare", _COMPARE)
    _model_options(compare, recipe=_AB_RECIPE, recipe_help=f"recipe; each stage is an arm (default: {_AB_RECIPE})")
    compare.add_argument("--arms", type=_names, default=(), metavar="NAME,…", help="only these stages")
    compare.add_argument("--out", default=_REPORT, metavar="DIR", help=f"folder to write (default: {_REPORT})")
    _preflight_option(compare)
    compare.add_argument("--fresh", action="store_true", help="run arms again that an earlier run in DIR finished")
    _calibration_options(compare)
    _evaluation_options(compare)
    _common_options(compare)
    compare.set_defaults(run=_run_compare)

    evaluate = _command(commands, "eval", "measure a checkpoint against the unquantized model", _EVAL)
    evaluate.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of the quantized model")
    evaluate.add_argument("--model", metavar="DIR|ID", help="the unquantized model (default: the embedded demo model)")
    evaluate.add_argument("--json", metavar="FILE", help="write the figures there too")
    evaluate.add_argument("--seq-len", type=int, default=256, metavar="N", help="tokens per row (default: 256)")
    evaluate.add_argument(
        "--backend",
        default="transformers",
        choices=["transformers", "vllm"],
        help="what runs the checkpoint; vllm measures --tasks only, in an environment with vLLM and lm-eval",
    )
    evaluate.add_argument(
        "--engine", default="", metavar="NAME=VALUE,…", help="vLLM's engine arguments, e.g. tensor_parallel_size=2"
    )
    _evaluation_options(evaluate)
    _common_options(evaluate)
    evaluate.set_defaults(run=_run_eval)

    plan = _command(commands, "plan", "what quantizing a model would take", _PLAN)
    plan.add_argument("--model", required=True, metavar="DIR|ID", help="folder, or hub name; no weights are fetched")
    plan.add_argument("--recipe", default="w2", metavar="FILE|NAME", help="recipe file or name (default: w2)")
    plan.add_argument("--stage", metavar="NAME", help="which stage of the recipe, where it has several")
    plan.add_argument("--bits", type=float, metavar="N", help="instead of the recipe's")
    plan.add_argument("--samples", type=int, default=128, metavar="N", help="calibration rows (default: 128)")
    plan.add_argument("--seq-len", type=int, default=256, metavar="N", help="tokens per row (default: 256)")
    plan.add_argument("--device", default="auto", help="cpu, cuda, … (default: cuda where there is one)")
    plan.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    _speech_options(plan)
    plan.set_defaults(run=_run_plan)

    inspect = _command(commands, "inspect", "show sizes, widths and bases of a checkpoint", _INSPECT)
    inspect.add_argument("checkpoint", metavar="DIR", help="checkpoint folder")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.add_argument("--html", metavar="FILE", help="draw it as a page of its own, and print where it is")
    _speech_options(inspect)
    inspect.set_defaults(run=_run_inspect)
    export = _command(commands, "export", "write a checkpoint's dense weights for other tools", _EXPORT)
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="folder with packed experts")
    export.add_argument("--out", required=True, metavar="DIR", help="folder to create")
    export.add_argument("--to", default="dense", choices=["dense", "w4"], help="what to write (default: dense)")
    export.add_argument(
        "--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"], help="of dense weights (bfloat16)"
    )
    export.add_argument("--group-size", type=int, default=128, metavar="N", help="weights per scale of w4 (128)")
    _speech_options(export)
    export.set_defaults(run=_run_export)

    foreign = _command(commands, "import", "decode a checkpoint of the BitsMoE authors' runtime", _IMPORT)
    foreign.add_argument("checkpoint", metavar="DIR|ID", help="folder or hub name")
    foreign.add_argument("--out", required=True, metavar="DIR", help="folder to create")
    foreign.add_argument(
        "--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"], help="of decoded weights (bfloat16)"
    )
    _speech_options(foreign)
    foreign.set_defaults(run=_run_import)

    complete = _command(commands, "completion", "print a completion script for your shell", _COMPLETION)
    complete.add_argument("shell", choices=completion.SHELLS)
    _speech_options(complete)
    complete.set_defaults(run=_run_completion)
    return parser


def _command(commands: Any, name: str, summary: str, description: str) -> argparse.ArgumentParser:
    """A command; what follows ``Examples:`` in its description is printed after the options, as it is."""
    text, _, examples = description.partition("Examples:\n")
    return commands.add_parser(
        name,
        help=summary,
        description=text,
        epilog=f"examples:\n{examples}" if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


_QUANTIZE = """Quantize a model by one stage of a recipe and save a checkpoint that AutoModelForCausalLM loads.

Give calibration text of the kind that the model will see; 128 rows of 256 tokens are enough to try, 256 of 2048 for
a model to keep. Every expert should see some 64 tokens at least; `inspect` says how many each saw.

Examples:
  bitsmoe quantize --out docmoe-2bit                               the demo model, to see what happens
  bitsmoe quantize --model Qwen/Qwen3-30B-A3B --calibration wikitext.txt --samples 256 --seq-len 2048 --out OUT
  bitsmoe quantize --model DIR --recipe w2_attn_gptq_w4 --calibration FILE --out DIR2   attention too, by GPTQ
  torchrun --nproc-per-node 8 -m bitsmoe_modifier quantize --model DIR --calibration FILE --out OUT   8 GPUs together
"""
_COMPARE = """Quantize a model by every stage of a recipe, each in its own process from the unquantized model and with
the same calibration rows; load every saved checkpoint again, measure it against the unquantized model, and write
report.json, report.md and report.html. A rerun with the same inputs uses what is finished.

Examples:
  bitsmoe compare                                                  the demo model, five arms
  bitsmoe compare --tasks continuations --out REPORT               accuracy too
  bitsmoe compare --model DIR --recipe ab_all --arms gptq_w3,bitsmoe_2_0 --calibration FILE --eval-text FILE --out DIR2
"""
_EVAL = """Perplexity of a checkpoint, and how far its predictions are from the unquantized model's.

Examples:
  bitsmoe eval qwen3-2bit --model Qwen/Qwen3-30B-A3B --eval-text held_out.txt --seq-len 2048
  bitsmoe eval qwen3-2bit --model Qwen/Qwen3-30B-A3B --tasks arc_easy,hellaswag --task-items 500
"""
_PLAN = """What quantizing a model would take: memory, disk, time, and the size of the result. Reads config.json and the
headers of the safetensors files, no weights; of a hub model, a few kilobytes per file are fetched.

Examples:
  bitsmoe plan --model Qwen/Qwen3-30B-A3B --bits 2
  bitsmoe plan --model DIR --recipe w2_attn_gptq_w4 --samples 256 --seq-len 2048 --device cuda
"""
_INSPECT = """What a checkpoint stores, from its headers: sizes per layer, widths, bases, tokens per expert.

Examples:
  bitsmoe inspect qwen3-2bit
  bitsmoe inspect qwen3-2bit --html qwen3-2bit.html                the same, drawn
"""
_EXPORT = """Decode the experts and write an ordinary checkpoint, under the architecture's own tensor names: dense, or
(w4) with the experts as packed 4-bit Linears of compressed-tensors, rounded to nearest from the decoded weights. Needs
memory for the whole dense model.

Examples:
  bitsmoe export qwen3-2bit --out qwen3-2bit-dense                 for tools that know nothing of us
"""
_IMPORT = """Decode a checkpoint that the BitsMoE authors published for their own runtime to a dense one, which every
tool loads and `eval` measures. Their grids hold zero and ours do not, so packed weights cannot be taken over exactly;
docs/comparison.md says more.

Examples:
  bitsmoe import zjiayu064/Qwen3-30B-A3B-Base-BitsMoE-2bit --out theirs
"""
_COMPLETION = """Print a script that completes commands and options.

Examples:
  source <(bitsmoe completion bash)                                or zsh; put it in your shell's startup file
  bitsmoe completion fish > ~/.config/fish/completions/bitsmoe.fish
"""


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


def _preflight_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-preflight",
        dest="preflight",
        action="store_false",
        help="run even if memory or disk seem too small for it",
    )


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
    _speech_options(parser)


def _speech_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("messages").add_mutually_exclusive_group()
    group.add_argument("--verbose", action="store_true", help="show all messages of the libraries, and tracebacks")
    group.add_argument("--quiet", action="store_true", help="only the result and errors, no progress")
    group.add_argument("--log-json", action="store_true", help="progress, messages and errors as JSON lines on stderr")


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
    from .comparison.runner import CompareSettings, compare

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
        preflight=args.preflight,
        fresh=args.fresh,
        verbose=args.verbose,
    )
    report = compare(settings, command)
    from .evaluation.columns import table
    from .pages.verdicts import headline

    done = [arm for arm in report["arms"] if "error" not in arm]
    print(f"\n{table(report['reference'], done)}\n\n{headline(done)}\n\n{Path(args.out) / 'report.html'}")
    return 0 if len(done) == len(report["arms"]) else 1


def _run_quantize(args: argparse.Namespace, command: str) -> int:
    from .comparison.single import quantize_one

    made = quantize_one(
        model=_given(args.model, "docmoe"),
        recipe=args.recipe,
        stage=args.stage,
        calibration=_given(args.calibration, "docmoe_calibration.txt"),
        out=Path(args.out),
        options=_options(args),
    )
    if made is None:
        return 0
    print(
        f"{args.out}: {made['measured_bits_per_expert_weight']:.4f} bits per expert weight, "
        f"{made['checkpoint_bytes'] / 1e6:.2f} MB, {made['quantize_seconds']:.0f} s"
    )
    for warning in made["warnings"]:
        messages.say("warning", f"warning: {warning}")
    return 0


def _run_plan(args: argparse.Namespace, command: str) -> int:
    from .checkpoints.plan import plan_command

    print(
        plan_command(
            args.model, args.recipe, args.stage, args.bits, args.samples * args.seq_len, args.dtype, args.device
        )
    )
    return 0


def _run_eval(args: argparse.Namespace, command: str) -> int:
    figures: dict[str, Any]
    if args.backend == "vllm":
        from .serving.evaluation import evaluate_served, table

        figures = evaluate_served(args.checkpoint, args.tasks, args.task_items, args.dtype, args.engine)
        print(f"\n{table(figures)}")
    else:
        from .comparison.single import evaluate_one
        from .evaluation.columns import table as all_columns

        figures = evaluate_one(
            checkpoint=args.checkpoint,
            model=_given(args.model, "docmoe"),
            eval_text=_given(args.eval_text, "docmoe_heldout.txt"),
            eval_rows=args.eval_rows,
            options=_options(args),
        )
        print(f"\n{all_columns(figures['reference'], [figures['checkpoint']])}")
    if args.json:
        import json

        from .storage.records import write_text

        write_text(Path(args.json), json.dumps(figures, indent=2))
    return 0


def _run_inspect(args: argparse.Namespace, command: str) -> int:
    from .checkpoints.describe import describe, render
    from .sources.model import find_model

    folder = find_model(args.checkpoint)
    if args.html:
        from .pages.checkpoint import checkpoint_page
        from .storage.records import write_text

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
    from .comparison.single import export_one

    export_one(args.checkpoint, Path(args.out), args.to, args.dtype, args.group_size, args.verbose)
    print(args.out)
    return 0


def _run_import(args: argparse.Namespace, command: str) -> int:
    from .checkpoints.authors import import_authors
    from .comparison.runner import DTYPES
    from .sources.model import find_model

    import_authors(find_model(args.checkpoint), Path(args.out), DTYPES[args.dtype])
    print(args.out)
    return 0


def _run_completion(args: argparse.Namespace, command: str) -> int:
    print(completion.script(build_parser(), args.shell), end="")
    return 0


def _options(args: argparse.Namespace) -> Any:
    from .comparison.single import Options

    known = {name: value for name, value in vars(args).items() if name in Options.__dataclass_fields__}
    return Options(**known)


if __name__ == "__main__":
    sys.exit(main())
