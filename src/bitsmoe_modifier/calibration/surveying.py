"""The survey alone: what every size would lose, without making any of them."""

from pathlib import Path

import torch

from ..errors import RecipeError
from ..sources.text import dataloader
from .oneshot import QuantizeSettings, _cast, load_checked
from .prediction import Prediction, Surveyed
from .recipe import Stage, with_fields


def survey(model_folder: Path, stage: Stage, rows: torch.Tensor, settings: QuantizeSettings) -> Prediction:
    """Survey a model as `quantize` does, and stop there. With a ``resume_dir`` in the stage, the survey is kept.

    Args:
        model_folder: the dense model.
        stage: of a recipe with a BitsMoEModifier whose scope is global.
        rows: calibration tokens, int64 ``[n, T]``.
        settings: how to run.

    Raises:
        BitsMoEError: as `quantize`; RecipeError when the stage surveys nothing.
    """
    from llmcompressor import oneshot

    import bitsmoe_modifier  # noqa: F401 - registers modifier, format and loader

    recipe = with_fields(stage, survey_only=True).text
    model = load_checked(model_folder, recipe, settings.offload)
    if settings.dtype is not None:
        _cast(model, settings.dtype)
    try:
        oneshot(
            model=model,
            recipe=recipe,
            dataset=dataloader(rows, settings.batch_size),
            pipeline=settings.pipeline,
            moe_calibrate_all_experts=settings.calibrate_all_experts,
        )
    except Surveyed as done:
        return done.prediction
    raise RecipeError(f"{stage.name}: nothing was surveyed; it takes a BitsMoEModifier with scope: global")
