"""What all commands have in common: how they are shown, how they speak, and how they end."""

import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from inspect import Parameter, signature
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .. import __version__, messages
from ..aftermath import reason
from ..errors import BitsMoEError
from .options import MESSAGES

app = typer.Typer(
    help="Quantize the experts of mixture-of-experts models, and measure what it costs.",
    epilog="Without options, compare runs on the small model that comes with the package.",
    rich_markup_mode=None,  # plain text: a third of the time, and examples that can be copied
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"max_content_width": 100},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _bitsmoe(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options before the command."""


class Command(TyperCommand):
    """A command: its options in groups, its errors in one line."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """One section of the help for every ``rich_help_panel``, which typer shows with rich only."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                default = "Arguments" if param.param_type_name == "argument" else "Options"
                sections.setdefault(getattr(param, "rich_help_panel", None) or default, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)

    def _expand(self, ctx: Any) -> None:
        """Refuse texts that are given and empty, which would pass for options that are not given; expand a ``~``, which
        shells leave in ``--model=~/folder``."""
        for param in self.get_params(ctx):
            value = ctx.params.get(param.name)
            if value == "" and getattr(ctx.get_parameter_source(param.name), "name", "") == "COMMANDLINE":
                given = param.opts[0] if param.param_type_name == "option" else param.metavar
                raise BitsMoEError(f"{given} is empty (a variable that is not set?); give it a value, or leave it out")
            if isinstance(value, str) and value.startswith("~/"):
                ctx.params[param.name] = os.path.expanduser(value)

    def invoke(self, ctx: Any) -> Any:
        """Run it as its options about messages and the job of torchrun want."""
        chosen = [name for name in ("verbose", "quiet", "log_json") if ctx.params[name]]
        if len(chosen) > 1:
            ctx.fail(" and ".join(f"--{name.replace('_', '-')}" for name in chosen) + " exclude each other")
        together = int(os.environ.get("WORLD_SIZE", "1")) > 1  # a torchrun job; its first process speaks for all
        silent = ctx.params["quiet"] or (together and os.environ.get("RANK") != "0")
        messages.configure("quiet" if silent else "json" if ctx.params["log_json"] else "text")
        os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")  # while importing; then `logs.set_up_logging`
        if messages.mode() != "text":
            os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported, so before anything else
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # end like Ctrl-C, with the processes of a run
        try:
            self._expand(ctx)
            if together and ctx.info_name != "quantize":
                raise BitsMoEError("only `quantize` runs in several processes; start this command without torchrun")
            return super().invoke(ctx)
        except BitsMoEError as error:
            if ctx.params["verbose"]:
                traceback.print_exc()
            messages.say("error", f"bitsmoe {ctx.info_name}: {error}")
            sys.exit(2)
        except OSError as error:
            if error.errno == errno.EPIPE:  # typer knows: who reads has read enough
                raise
            if ctx.params["verbose"]:
                traceback.print_exc()
            where = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else reason(error)
            messages.say("error", f"bitsmoe {ctx.info_name}: {where} (--verbose shows what was being done)")
            sys.exit(1)
        except EOFError as error:  # typer would take it for the end of a prompt, and hide it
            raise RuntimeError("a process ended before it answered") from error
        except KeyboardInterrupt:
            messages.say("error", f"bitsmoe {ctx.info_name}: interrupted")
            sys.exit(130)


def command(
    name: str, summary: str, *examples: str, options: tuple[Parameter, ...] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a command to the command line.

    Args:
        name: what one types after ``bitsmoe``.
        summary: its line in the list of commands; the function's docstring explains it.
        examples: shown after the options; whole command lines, perhaps two blanks and a remark.
        options: of the groups in `options`; those about messages are every command's. The function gets those that it
            has a parameter for; the others are in the context's.
    """
    shown = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in examples)  # \b: click keeps the lines as they are

    def add(function: Callable[..., None]) -> Callable[..., None]:
        own = signature(function).parameters
        groups = {option.name: option for option in (*options, *MESSAGES)}

        def run(**values: Any) -> None:
            function(**{name: value for name, value in values.items() if name in own})

        here = [groups.get(name, one).replace(kind=Parameter.KEYWORD_ONLY) for name, one in own.items()]
        parameters = [*here, *(option for name, option in groups.items() if name not in own)]
        run.__name__, run.__doc__, run.__module__ = function.__name__, function.__doc__, function.__module__
        run.__signature__ = signature(run).replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        app.command(name, cls=Command, short_help=summary, epilog=shown)(run)
        return function

    return add
