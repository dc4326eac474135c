"""What the libraries say while they work: quiet by default, everything on request."""

import functools
import logging
import os
import sys
import warnings
from typing import Any

from . import messages

#: warnings that say nothing about the result; the experts are linearized by every oneshot, pipelines are chosen
_EXPECTED = (
    "llmcompressor.modeling.moe",
    "llmcompressor.entrypoints.oneshot",
    "llmcompressor.utils.dev",
    "llmcompressor.pipelines.registry",
)
#: nor does this, of every Linear whose FP8 source has a part of a block at its end, as DeepSeek-V3's have
_PART_OF_A_BLOCK = "block quantization strategy requires strict division"
#: loggers that warn about the libraries' own affairs: deprecations, targets of experts that are fused while loading,
#: how lm-eval was called
_INTERNAL = ("torch.fx", "compressed_tensors", "lm_eval")


def set_up_logging(verbose: bool) -> None:
    """Route the libraries' messages to stderr: warnings that matter, or with ``verbose`` all of them.

    Where llm-compressor is installed, imports its logger, which otherwise configures itself for stdout as soon as it is
    imported.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not verbose:
        warnings.filterwarnings("ignore", category=UserWarning, module="transformers|compressed_tensors|torch")
    import transformers
    from loguru import logger

    try:
        from llmcompressor.entrypoints import utils  # its own configuration comes first, ours replaces it

        utils.configure_distributed_logger = lambda *_: None  # oneshot would turn back to stdout in a torchrun job
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "llmcompressor":
            raise
    if os.environ.get("TQDM_DISABLE", "0") not in ("", "0"):
        _hide_bars()
    logger.remove()
    sink = _as_message if messages.mode() == "json" else sys.stderr
    level = "INFO" if verbose else "ERROR" if messages.mode() == "quiet" else "WARNING"
    if verbose:
        logger.add(sink, level=level)
    else:
        logger.add(sink, level=level, filter=_worth_saying, format=_as_our_own)
    transformers.logging.set_verbosity(logging.INFO if verbose else logging.ERROR)
    for name in _INTERNAL:
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.ERROR)


def _hide_bars() -> None:
    """Show no bar of any library: TQDM_DISABLE does not reach those that are told whether to show themselves."""
    from tqdm.std import tqdm

    begin: Any = tqdm.__init__
    if getattr(begin, "hides", False):
        return

    @functools.wraps(begin)
    def begin_hidden(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **{**kwargs, "disable": True})

    begin_hidden.hides = True  # type: ignore[attr-defined]
    tqdm.__init__ = begin_hidden


def _as_message(text: Any) -> None:
    record = text.record
    messages.say("log", record["message"], level=record["level"].name, logger=record["name"])


def _as_our_own(record: Any) -> str:
    """loguru's format of a message that reads like those of `messages.say`: no time, no line of code."""
    return f"{record['level'].name.lower()}: {{message}}\n{{exception}}"


def _worth_saying(record: Any) -> bool:
    """Not what is no concern of the user's, nor what a command says at its end anyway: warnings about layers."""
    if record["level"].name == "METRIC":  # GPTQ's seconds and errors, three lines for every matrix
        return False
    if record["message"].startswith(_PART_OF_A_BLOCK):
        return False
    said_later = record["function"] == "log_layer"
    return not (record["level"].name == "WARNING" and ((record["name"] or "").startswith(_EXPECTED) or said_later))
