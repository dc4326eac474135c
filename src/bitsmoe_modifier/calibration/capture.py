"""What calibration captures of a layer, counted and checked, and what is said of a finished one."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from loguru import logger

from ..errors import BitsMoEError, CalibrationError
from ..method.quantize import LayerReport
from ..method.statistics import RoutedTokens
from .padding import mask_of
from .survey import Inputs

#: Calibration tokens per expert, on average, below which a run is refused / warned about.
_LEAST_TOKENS_PER_EXPERT = 1
_GOOD_TOKENS_PER_EXPERT = 64


@contextlib.contextmanager
def naming_layer(name: str) -> Iterator[None]:
    """Put the layer's name in front of errors from the pure modules, which know no names."""
    try:
        yield
    except BitsMoEError as error:
        raise type(error)(f"{name}: {error}") from error


def routed_tokens(module: LinearExperts2D, inputs: list[Inputs]) -> RoutedTokens:
    """A layer's routed calibration tokens."""
    x, index, weight = (torch.cat(parts) for parts in zip(*inputs, strict=True))
    return RoutedTokens.from_router(x, index, weight, module.num_experts)


def choices_per_token(model: Any) -> int:
    """k of the model's router, 1 where the config does not tell."""
    config = model.config.get_text_config()
    return next(
        (k for key in ("num_experts_per_tok", "top_k_experts", "moe_topk") if (k := getattr(config, key, None))), 1
    )


def count_tokens(calibration: Any) -> int:
    """Calibration tokens in a dataloader, padding not counted.

    Raises:
        CalibrationError: when there is no dataloader or it is empty.
    """
    total = 0 if calibration is None else sum(_text_tokens(batch) for batch in calibration)
    if not total:
        raise CalibrationError("there is no calibration data; pass `dataset` to oneshot")
    return total


def _text_tokens(batch: Any) -> int:
    mask = mask_of(batch)
    return int(batch["input_ids"].numel() if mask is None else mask.sum())


def check_calibration(name: str, num_experts: int, tokens: int, choices: int) -> None:
    share = tokens * choices / num_experts
    if share < _LEAST_TOKENS_PER_EXPERT:
        raise CalibrationError(
            f"{name}: {tokens} calibration tokens are less than {_LEAST_TOKENS_PER_EXPERT} per expert for its "
            f"{num_experts} experts; calibrate with at least {_GOOD_TOKENS_PER_EXPERT * num_experts // choices} tokens"
        )
    if share < _GOOD_TOKENS_PER_EXPERT:
        logger.warning(
            f"{name}: {share:.0f} calibration tokens per expert are few; "
            f"{_GOOD_TOKENS_PER_EXPERT * num_experts // choices} tokens or more give better experts"
        )


def log_layer(name: str, report: LayerReport) -> None:
    logger.info(
        f"{name}: {report.bits:.3f} bits per weight, bases {report.input_basis_bits}/{report.output_basis_bits} bits, "
        f"relative output error {report.relative_output_error:.2e}"
        + (f", dense experts {list(report.dense_experts)}" if report.dense_experts else "")
    )
    for warning in report.warnings:
        logger.warning(f"{name}: {warning}")
