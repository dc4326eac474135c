"""Accuracies over the same items, and whether their difference could be chance.

Two models answer the same items, so their accuracies are not independent: what tells them apart are the items that
only one of them gets right. McNemar's exact test asks how likely a split of those at least so uneven would be if
either model were as likely to be the right one; it needs no assumption about the items.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class Mean:
    """A mean over items.

    Attributes:
        value: the mean.
        stderr: its standard error, from the items' spread (n − 1); None for one item.
    """

    value: float
    stderr: float | None


@dataclass(frozen=True)
class Paired:
    """How one model differs from another on the same items.

    Attributes:
        difference: mean of model − reference.
        stderr: standard error of that mean, from the spread of the items' differences; None for one item.
        only_model, only_reference: items that only one of them got right; None where scores are not 0 or 1.
        p_value: of McNemar's exact test, two-sided; None where scores are not 0 or 1.
    """

    difference: float
    stderr: float | None
    only_model: int | None
    only_reference: int | None
    p_value: float | None


def mean(scores: Sequence[float]) -> Mean:
    """Mean and standard error of the items' scores.

    >>> mean([1, 0, 1, 1])
    Mean(value=0.75, stderr=0.25)
    """
    from scipy.stats import sem  # half a second, needed only where tasks are measured

    return Mean(fmean(scores), float(sem(scores)) if len(scores) > 1 else None)


def paired(model: Sequence[float], reference: Sequence[float]) -> Paired:
    """Compare two models' scores item by item.

    >>> paired([1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 1])
    Paired(difference=0.571..., stderr=0.297..., only_model=5, only_reference=1, p_value=0.21875)

    Raises:
        ValueError: when they did not answer equally many items.
    """
    from scipy.stats import binomtest

    differences = [own - other for own, other in zip(model, reference, strict=True)]
    found = mean(differences)
    if not {*model, *reference} <= {0, 1}:
        return Paired(found.value, found.stderr, None, None, None)
    gained, lost = differences.count(1), differences.count(-1)
    p_value = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return Paired(found.value, found.stderr, gained, lost, p_value)
