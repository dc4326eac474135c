"""What calibration captures of a layer, counted and checked, and what is said of a finished one."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
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
#: Share of the loss on other text that twice as many rows must save to be worth a word.
_WORTH_MORE_TEXT = 0.1
#: what a batch of nothing but text has
_TEXT = frozenset({"input_ids", "attention_mask", "position_ids", "token_type_ids", "labels"})


@contextlib.contextmanager
def naming_layer(name: str) -> Iterator[None]:
    """Put the layer's name in front of errors from the pure modules, which know no names."""
    try:
        yield
    except BitsMoEError as error:
        raise type(error)(f"{name}: {error}") from error


def routed_tokens(module: LinearExperts2D, inputs: list[Inputs], rows: int) -> RoutedTokens:
    """A layer's routed calibration tokens, of so many rows."""
    x, index, weight = (torch.cat(parts) for parts in zip(*inputs, strict=True))
    return RoutedTokens.from_router(x, index, weight, module.num_experts, rows=rows)


def choices_per_token(model: Any) -> int:
    """k of the model's router, 1 where the config does not tell."""
    config = model.config.get_text_config()
    return next(
        (k for key in ("num_experts_per_tok", "top_k_experts", "moe_topk") if (k := getattr(config, key, None))), 1
    )


def count_tokens(calibration: Any, vocabulary: int | None = None) -> int:
    """Calibration tokens in a dataloader, padding not counted.

    Args:
        calibration: the dataloader, or None.
        vocabulary: tokens that the model has; None where that is not known.

    Raises:
        CalibrationError: when there is no dataloader, it is empty, or a batch is not what the model reads.
    """
    total = 0
    for number, batch in enumerate(() if calibration is None else calibration):
        if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), torch.Tensor):
            found = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
            raise CalibrationError(
                f"calibration batch {number} has no tensor input_ids ({found}); give batches such as "
                "{'input_ids': int64 [rows, tokens]}"
            )
        # beside images there may be ids that stand for no token
        largest = int(batch["input_ids"].max()) if batch["input_ids"].numel() and _TEXT.issuperset(batch) else 0
        if vocabulary is not None and largest >= vocabulary:
            raise CalibrationError(
                f"calibration batch {number} has the token {largest}, and the model has {vocabulary}; tokenize with "
                "the model's own tokenizer"
            )
        total += _text_tokens(batch)
    if not total:
        raise CalibrationError("there is no calibration data; pass `dataset` to oneshot")
    return total


def _text_tokens(batch: Any) -> int:
    mask = mask_of(batch)
    return int(batch["input_ids"].numel() if mask is None else mask.sum())


def count_rows(calibration: Any) -> int:
    """Calibration rows in a dataloader."""
    return sum(len(batch["input_ids"]) for batch in calibration)


def check_calibration(name: str, num_experts: int, tokens: int, choices: int) -> None:
    share = tokens * choices / num_experts
    if share < _LEAST_TOKENS_PER_EXPERT:
        raise CalibrationError(
            f"{name}: {tokens} calibration tokens are less than {_LEAST_TOKENS_PER_EXPERT} per expert for its "
            f"{num_experts} experts; calibrate with at least {_GOOD_TOKENS_PER_EXPERT * num_experts // choices} tokens"
        )
    if share < _GOOD_TOKENS_PER_EXPERT:
        logger.warning(
            f"{name}: {int(share)} calibration tokens per expert are few; give {_GOOD_TOKENS_PER_EXPERT} for each, "
            f"{_GOOD_TOKENS_PER_EXPERT * num_experts // choices} in all, or more"
        )


def log_layer(name: str, report: LayerReport) -> None:
    logger.info(
        f"{name}: {report.bits:.3f} bits per weight, bases {report.input_basis_bits}/{report.output_basis_bits} bits, "
        f"relative output error {report.relative_output_error:.2e}, on other text {report.unseen_output_error:.2e}"
        + (f", dense experts {list(report.dense_experts)}" if report.dense_experts else "")
    )
    for warning in report.warnings:
        logger.warning(f"{name}: {warning}")


def more_text(reports: Iterable[Mapping[str, Any]]) -> list[str]:
    """A warning where twice as many calibration rows would help by a tenth or more, with what to expect of them.

    What the layers lose on rows that were fitted to is below what endless text would bring them to, and what they lose
    on others above, by about as much, which falls as the rows grow: twice as many halve it.

    Args:
        reports: of the layers, as in bitsmoe_report.json.
    """
    pairs = [(r["relative_output_error"], r["unseen_output_error"]) for r in reports]
    if not pairs:
        return []
    fitted, unseen = (sum(errors) / len(pairs) for errors in zip(*pairs, strict=True))
    hoped = unseen - (unseen - fitted) / 4
    if not unseen > 0 or hoped > (1 - _WORTH_MORE_TEXT) * unseen:
        return []
    return [
        f"on text that was not calibrated on, expect the layers to lose {unseen / fitted:.1f} times what they lose on "
        f"the calibration rows ({100 * unseen:.2f} % of their output's power in place of {100 * fitted:.2f} %); twice "
        f"as many rows would bring that to about {100 * hoped:.2f} %"
    ]
