"""Options that several commands know: their names, types, defaults, and what the help says of them.

The groups at the end are given to `app.command`, which adds their options to a command's own; a command's function has
parameters for those that it reads itself.
"""

import os
import re
from dataclasses import fields
from inspect import Parameter
from typing import Annotated, Any, Literal, TypeVar, cast

import typer

from .. import messages
from ..remote_code import trust_remote_code

T = TypeVar("T")
Dtype = Literal["float32", "bfloat16", "float16"]
DtypeOrAuto = Literal["auto", "float32", "bfloat16", "float16"]
Pipeline = Literal["independent", "sequential", "basic", "datafree"]

_CALIBRATION = "Calibration"
_EVALUATION = "Evaluation"
_MESSAGES = "Messages"


def say_whose_text(model: str | None, text: str | None, option: str) -> None:
    """Say that the demo's text is used with a model that is not the demo's."""
    if model is not None and text is None:
        messages.say(
            "warning",
            f"no {option}: the demo's text is used, which is hardly what {model} will see; "
            f"give text of your own by {option}",
        )


def colours_wanted() -> bool:
    """Whether nobody asked for no colours (https://no-color.org)."""
    return not os.environ.get("NO_COLOR")


def names(value: str) -> tuple[str, ...]:
    """A comma-separated list."""
    return tuple(name.strip() for name in value.split(",") if name.strip())


def module_names(value: str) -> tuple[str, ...]:
    """A comma-separated list of names or expressions, whose own commas stand in brackets: ``re:a{1,2},b`` are two."""
    return tuple(name.strip() for name in re.split(r",(?![^{}\[\]()]*[}\])])", value) if name.strip())


def settings(kind: type[T], context: typer.Context, **others: object) -> T:
    """A dataclass whose fields are named like the command's options; ``others``: fields that are not as given."""
    known = {field.name for field in fields(cast(Any, kind))}
    return kind(**{**{name: value for name, value in context.params.items() if name in known}, **others})


# ---------------------------------------------------------------------------------------- the model and the recipe

ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="DIR|ID", help="Folder or hub name.", show_default="the embedded demo model"),
]
RecipeOption = Annotated[
    str, typer.Option("--recipe", metavar="FILE|NAME", help="Recipe file, or name of a shipped recipe.")
]
StageOption = Annotated[
    str | None,
    typer.Option("--stage", metavar="NAME", help="Which stage of the recipe, where it has several."),
]
NewFolder = Annotated[str, typer.Option("--out", metavar="DIR", help="Folder to create.", show_default=False)]
NoPreflight = Annotated[bool, typer.Option("--no-preflight", help="Run even if memory or disk seem too small for it.")]

# ---------------------------------------------------------------------------------------------------- how much of it

_SIZE = "Size (one of --bits, --size, --fit, --max-kld)"
Bits = Annotated[
    str,
    typer.Option(
        "--bits",
        metavar="N,…",
        help="Bits per expert weight, everything stored counted; several make one checkpoint each, by one survey.",
        show_default="the recipe's",
        rich_help_panel=_SIZE,
    ),
]
Size = Annotated[
    str | None,
    typer.Option(
        "--size",
        metavar="10GB",
        help="Size of the checkpoint's weight files, everything included that is not an expert.",
        rich_help_panel=_SIZE,
    ),
]
FitOption = Annotated[
    str | None,
    typer.Option(
        "--fit",
        metavar="24GB|2x24GB",
        help="Memory of the GPUs that weights, KV cache and workspace shall fill.",
        rich_help_panel=_SIZE,
    ),
]
Context = Annotated[
    str, typer.Option("--context", metavar="N", help="Tokens of a sequence, for --fit.", rich_help_panel=_SIZE)
]
Batch = Annotated[
    int, typer.Option("--batch", metavar="N", help="Sequences at a time, for --fit.", rich_help_panel=_SIZE)
]
MaxKld = Annotated[
    float | None,
    typer.Option(
        "--max-kld",
        metavar="NATS",
        help="The smallest size whose predicted KL divergence is at most this.",
        rich_help_panel=_SIZE,
    ),
]
Codes = Annotated[
    Literal["auto", "scalar", "trellis"] | None,
    typer.Option(
        "--codes",
        help="Family of codes: trellis loses a third less at the same bytes; auto takes it where it can.",
        show_default="the recipe's",
    ),
]
Ignore = Annotated[
    str,
    typer.Option(
        "--ignore",
        metavar="NAME,…",
        help="Experts modules to leave as they are, beside the recipe's: names, or re:EXPRESSION.",
        show_default=False,
    ),
]

# --------------------------------------------------------------------------------------------------- how to compute

BatchSize = Annotated[int, typer.Option("--batch-size", metavar="N", help="Rows per forward pass.")]
Device = Annotated[
    str,
    typer.Option("--device", metavar="NAME", help="cpu, cuda, cuda:1, …", show_default="cuda where there is one"),
]
DtypeOption = Annotated[
    DtypeOrAuto,
    typer.Option(
        "--dtype", help="What the model computes in.", show_default="float32 on a CPU, the model's own elsewhere"
    ),
]

# ---------------------------------------------------------------------------------------------------- the two texts

TextColumn = Annotated[str, typer.Option("--text-column", metavar="NAME", help="Column of tables and datasets.")]
SeqLen = Annotated[int, typer.Option("--seq-len", metavar="N", help="Tokens per row.")]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="FILE|DATASET",
        help="Text file, table (.jsonl, .csv, .parquet) or dataset NAME[:CONFIG][@SPLIT].",
        show_default="the demo's text",
        rich_help_panel=_CALIBRATION,
    ),
]
Samples = Annotated[int, typer.Option("--samples", metavar="N", help="Calibration rows.", rich_help_panel=_CALIBRATION)]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Which rows of the text.", rich_help_panel=_CALIBRATION)]
AllExperts = Annotated[
    bool,
    typer.Option(
        "--calibrate-all-experts",
        help="Send every token through every expert (not for BitsMoE).",
        rich_help_panel=_CALIBRATION,
    ),
]
PipelineOption = Annotated[
    Pipeline, typer.Option("--pipeline", help="llm-compressor's pipeline.", rich_help_panel=_CALIBRATION)
]
EvalText = Annotated[
    str | None,
    typer.Option(
        "--eval-text",
        metavar="FILE|DATASET",
        help="Held-out text.",
        show_default="the demo's",
        rich_help_panel=_EVALUATION,
    ),
]
EvalRows = Annotated[
    int,
    typer.Option("--eval-rows", metavar="N", help="Rows at most; 0: the whole text.", rich_help_panel=_EVALUATION),
]
Tasks = Annotated[
    str,
    typer.Option(
        "--tasks",
        metavar="NAME,…",
        help="Accuracy on lm-eval tasks: any installed one, `continuations` (comes with the package), an lm-eval YAML "
        "file, or a .jsonl file of {context, endings, label}.",
        show_default=False,
        rich_help_panel=_EVALUATION,
    ),
]
TaskItems = Annotated[
    int,
    typer.Option("--task-items", metavar="N", help="Items per task at most; 0: all.", rich_help_panel=_EVALUATION),
]

TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the code that comes with the model's tokenizer, where it has its own.",
        callback=lambda wanted: trust_remote_code(wanted) or wanted,
    ),
]

# ------------------------------------------------------------------------------------------------------- messages

Verbose = Annotated[
    bool,
    typer.Option("--verbose", help="Show all messages of the libraries, and tracebacks.", rich_help_panel=_MESSAGES),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", help="Only the result and errors, no progress.", rich_help_panel=_MESSAGES)
]
LogJson = Annotated[
    bool,
    typer.Option(
        "--log-json", help="Progress, messages and errors as JSON lines on stderr.", rich_help_panel=_MESSAGES
    ),
]

# --------------------------------------------------------------------------------------------------------- groups


def _group(**options: tuple[Any, Any]) -> tuple[Parameter, ...]:
    """Parameters from names to (type with its `typer.Option`, default)."""
    return tuple(
        Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in options.items()
    )


RECIPE = _group(model=(ModelOption, None), recipe=(RecipeOption, "w2"), stage=(StageOption, None))
TEXT = _group(trust_remote_code=(TrustRemoteCode, False), text_column=(TextColumn, "text"), seq_len=(SeqLen, 256))
COMPUTING = _group(device=(Device, "auto"), dtype=(DtypeOption, "auto"))
BATCHES = _group(batch_size=(BatchSize, 16))
CALIBRATION = _group(calibration=(Calibration, None), samples=(Samples, 128), seed=(Seed, 0))
CALIBRATING = (
    *CALIBRATION,
    *_group(calibrate_all_experts=(AllExperts, False), pipeline=(PipelineOption, "independent")),
)
EVALUATION = _group(eval_text=(EvalText, None), eval_rows=(EvalRows, 256), tasks=(Tasks, ""), task_items=(TaskItems, 0))
MESSAGES = _group(verbose=(Verbose, False), quiet=(Quiet, False), log_json=(LogJson, False))
