"""`bitsmoe plan --survey`: the predicted loss of every size of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..calibration.oneshot import QuantizeSettings
from ..calibration.recipe import Stage, check_stage, with_fields
from ..logs import set_up_logging
from ..sources.fitting import check_rows
from ..sources.model import load_tokenizer, open_dense
from ..sources.text import calibration_rows, read_text, tokenize
from .device import resolve_device, use_device
from .runner import resolve_dtype
from .single import Options

if TYPE_CHECKING:
    from ..calibration.prediction import Prediction

#: sizes that are printed, bits per expert weight
_SIZES = (1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.5, 4.0, 5.0)
_BAR = 40


def survey_one(model: str, stage: Stage, calibration: str, options: Options) -> Prediction:
    """Survey a model, with the rows that `quantize_one` would take.

    Args:
        model, calibration: as the command line takes them.
        stage: of a recipe, with a BitsMoEModifier.
        options: the rest; the survey is kept in ``resume_dir``.

    Raises:
        BitsMoEError: when the inputs cannot be used.
    """
    import llmcompressor  # noqa: F401 - before ours: importing it brings the modifier, which must not come amid them

    from ..calibration.surveying import survey

    chosen = with_fields(stage, resume_dir=options.resume_dir)
    device = use_device(resolve_device(options.device))
    dense = open_dense(model)
    dtype = resolve_dtype(options.dtype, str(device), dense.folder)
    tokenizer = load_tokenizer(dense.folder)
    text = read_text(calibration, options.text_column, options.samples * options.seq_len, tokenizer)
    rows = calibration_rows(tokenize(text, tokenizer), options.samples, options.seq_len, options.seed, text.source)
    check_rows(rows, dense.folder, text.source)
    set_up_logging(options.verbose)
    check_stage(chosen)
    batch = chosen.calibration_batch(options.batch_size)
    settings = QuantizeSettings(batch, dtype, options.pipeline, options.calibrate_all_experts, options.seed)
    return survey(dense.folder, chosen, rows, settings)


def curve_lines(prediction: Prediction, sizes: Sequence[float] = _SIZES) -> list[str]:
    """The curve for a terminal: a line and a bar, as long as the logarithm, for every size."""
    from ..calibration.prediction import UNSEEN_ERROR

    shown = [(size, prediction.at(size)) for size in sizes if size <= prediction.bits[-1] + 0.5]
    shown = [(size, kld) for size, kld in shown if np.isfinite(kld) and kld > 0]
    lines = ["bits per expert weight   predicted KL divergence x 1000, nats per token"]
    if shown:
        lowest, highest = (float(np.log(f(kld for _, kld in shown))) for f in (min, max))
        for size, kld in shown:
            share = (float(np.log(kld)) - lowest) / (highest - lowest or 1.0)
            lines.append(f"{size:>22.2f}   {1000 * kld:>8.3g}  {'#' * (1 + round((_BAR - 1) * share))}")
    return [*lines, f"to a factor of {UNSEEN_ERROR} on a model of which no loss is known"]
