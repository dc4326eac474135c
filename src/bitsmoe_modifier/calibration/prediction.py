"""What the survey expects of every size, before anything is rounded.

The survey's costs are squared errors of the layers' outputs under the Fisher information: half of their mean over the
calibration tokens is the KL divergence that small and independent errors would cost. They are priced by rounding to
nearest. What error feedback gains is not in them; nor is what grows faster than the errors: losses of one layer that
the next ones pass on, tokens that go to other experts, text that is not the calibration text. `corrected` is for that.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from loguru import logger

from ..errors import RecipeError
from ..method.allocation import hull_curve
from ..method.design import LayerDesign, LayerPlan
from .capture import naming_layer
from .survey import share_budget

#: Measured KL divergence over cost, fitted to measurements on three models, one of real weights (docs/quality.md,
#: "Prediction", which also says how far it is off).
_FACTOR = 1.45
#: how many times too high or too low it was on a model that it was not fitted to (docs/quality.md, "Prediction")
UNSEEN_ERROR = 1.8


def corrected(kld: np.ndarray | float) -> np.ndarray:
    """The KL divergence to be expected on held-out text where the costs alone predict ``kld``, nats per token."""
    return _FACTOR * np.asarray(kld, dtype=np.float64)


@dataclass(frozen=True)
class Prediction:
    """KL divergence against size.

    Attributes:
        bits: per expert weight, rising, float64 ``[n]``.
        kld: nats per token to be expected on held-out text, not rising, float64 ``[n]``.
    """

    bits: np.ndarray
    kld: np.ndarray

    def at(self, bits: float) -> float:
        """Nats per token at a size; infinite below the least size there is.

        Between the points the logarithm is interpolated, which is nearly straight.
        """
        if bits < self.bits[0]:
            return float("inf")
        logs = np.log(np.maximum(self.kld, np.finfo(np.float64).tiny))
        return float(np.exp(np.interp(bits, self.bits, logs)))

    def record(self, points: int = 64) -> dict[str, list[float]]:
        """The curve at evenly spaced sizes, in JSON types: ``bits``, and ``kld`` in nats per token."""
        sizes = np.linspace(self.bits[0], self.bits[-1], points)
        return {"bits": sizes.round(4).tolist(), "kld": [float(f"{self.at(float(size)):.4g}") for size in sizes]}

    def bits_for(self, kld: float, most: float) -> float:
        """The least size, in steps of a thousandth of a bit, whose divergence is at most ``kld``.

        Args:
            kld: nats per token.
            most: bits that are allowed.

        Raises:
            RecipeError: when that is not reached.
        """
        least = np.ceil(1000 * float(self.bits[0])) / 1000
        sizes = np.arange(least, most + 5e-4, 1e-3)
        reached = [size for size in sizes if self.at(float(size)) <= kld * (1 + 1e-9)]
        if not reached:
            raise RecipeError(
                f"max_kld: {kld} is not reached by {most:g} bits, where {self.at(most):.2g} is predicted; "
                "raise it, or add wider `bit_widths`"
            )
        return round(float(reached[0]), 3)


def predict(plans: Mapping[str, LayerPlan], tokens: int) -> Prediction:
    """The prediction of a survey.

    Args:
        plans: of every layer.
        tokens: calibration tokens that the plans were measured on.
    """
    weights = sum(plan.elements for plan in plans.values())
    curves = [plan.curve() for plan in plans.values()]
    spent, cost = hull_curve(np.stack([c for _, c in curves]), np.stack([b for b, _ in curves]))
    return Prediction(spent / weights, corrected(np.maximum(cost, 0.0) / (2 * tokens)))


def designs_under(plans: Mapping[str, LayerPlan], bits: float) -> dict[str, LayerDesign]:
    """Every layer's design under one budget of ``bits`` per weight for all.

    Raises:
        RecipeError: when the budget does not pay what all layers store at least, naming the layer where it is one.
    """
    weights = {name: plan.elements for name, plan in plans.items()}
    curves = {name: plan.curve() for name, plan in plans.items()}
    designs = {}
    for name, budget in share_budget(curves, bits * sum(weights.values())).items():
        logger.info(f"{name}: {budget / weights[name]:.3f} bits per weight")
        with naming_layer(name):
            designs[name] = plans[name].choose(budget)
    return designs


def decide(
    plans: Mapping[str, LayerPlan], tokens: int, bits: float, max_kld: float | None, most: float
) -> tuple[float, dict[str, LayerDesign]]:
    """The budget of a run and every layer's design under it.

    Args:
        plans: of a survey on ``tokens`` calibration tokens.
        bits: that were asked for, unless ``max_kld`` is given: then the least that it takes, up to ``most``.

    Raises:
        RecipeError: when the budget is too small, or the loss is not reached.
    """
    prediction = predict(plans, tokens)
    if max_kld is not None:
        bits = prediction.bits_for(max_kld, most)
    logger.info(f"{bits} bits per weight, predicted KL divergence {prediction.at(bits):.2g}")
    return bits, designs_under(plans, bits)


class Surveyed(Exception):
    """The survey is done, and no more was asked for.

    Attributes:
        prediction: of the survey.
    """

    def __init__(self, prediction: Prediction) -> None:
        super().__init__("the survey is done")
        self.prediction = prediction
